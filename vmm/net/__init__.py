"""Networks on the host's side: taps, bridges, addresses, translation, passt.

    VM process ─fork─► keeper ─fork─► worker: links, rules ── taps, facts ──► VM process
                         └ waits until the VM process has ended, then clears away

    plan      what vm.yaml asks for, as data
    keeper    the two processes, and what the VM process holds
    links     interfaces, by pyroute2, which nothing else imports: 100 ms and 26 MiB
    tun       queues of taps
    rules     nftables, by nft(8)
    passt     the network of a user without rights

The worker ends as soon as all is set up. The keeper stays, with the rights of whoever has started
the VM, only where something would outlast the VM: a bridge of ours, or rules. It reads nothing
from anybody. What else we make, taps and what belongs to them, the kernel removes with the last
descriptor. Should the keeper be killed, too, then whoever looks at the VMs next clears away
(`rundir.clean`): everything of ours says so in its name or alias, and is useless without its tap.
"""

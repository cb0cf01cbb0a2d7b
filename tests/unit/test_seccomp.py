"""seccomp filters: what they say of every call, found by running them as the kernel would."""

from __future__ import annotations

import errno

import pytest

from devices import policy, seccomp, syscalls
from devices.seccomp import ALLOW, KILL, Arg, Rule
from tests.unit import bpf

ROWS = {
    **policy.DEVICES,
    "spawner": policy.SPAWNER,
    "VM process": policy.VM_PROCESS,
}
EVERY_NUMBER = range(512)
KERNEL_LIMIT = 4096  # BPF_MAXINSNS


def test_an_empty_list_allows_nothing() -> None:
    """What no rule names gets the default: the process ends."""
    code = seccomp.program([])
    assert {bpf.run(code, number) for number in EVERY_NUMBER} == {KILL}


def test_a_rule_allows_its_call_and_no_other() -> None:
    """The list is an allow-list."""
    code = seccomp.program([Rule("read"), Rule("rseq")])
    allowed = [number for number in EVERY_NUMBER if bpf.run(code, number) == ALLOW]
    assert allowed == [syscalls.NUMBERS["read"], syscalls.NUMBERS["rseq"]]


@pytest.mark.parametrize("arch", [bpf.I386, 0, 0x400000B7])
def test_another_architecture_ends_the_process(arch: int) -> None:
    """With int 0x80 come i386 numbers: 3 would be read there and close here."""
    code = seccomp.program([Rule("close")], default=ALLOW)
    assert bpf.run(code, 3, arch=arch) == KILL


@pytest.mark.parametrize("number", [0x40000000, 0x40000000 + 3, 0xFFFFFFFF, 0x80000003])
def test_x32_numbers_end_the_process(number: int) -> None:
    """x32 has its own numbers above bit 30, under the same architecture."""
    code = seccomp.program([Rule("close")], default=ALLOW)
    assert bpf.run(code, number) == KILL


def test_the_default_can_be_an_error() -> None:
    """A caller may prefer that calls fail."""
    code = seccomp.program([Rule("read")], default=seccomp.refuse(errno.EPERM))
    assert bpf.run(code, syscalls.NUMBERS["write"]) == 0x00050000 | errno.EPERM


def test_an_argument_is_one_of_several_values() -> None:
    """Each of the values is allowed, wherever it stands in the list."""
    values = (1, 2, 0x80081272)
    code = seccomp.program([Rule("ioctl", (Arg(1, 0xFFFFFFFF, values),)), Rule("close")])
    number = syscalls.NUMBERS["ioctl"]
    assert [bpf.run(code, number, 7, value) for value in values] == [ALLOW] * 3
    assert [bpf.run(code, number, 7, value) for value in (0, 3, 0x1272)] == [KILL] * 3
    assert bpf.run(code, syscalls.NUMBERS["close"], 7, 3) == ALLOW  # the rule after it still counts


def test_an_argument_is_compared_under_its_mask() -> None:
    """Bits outside the mask do not matter, and each bit inside does."""
    code = seccomp.program([Rule("mmap", (Arg(2, 4, (0,)),))])
    number = syscalls.NUMBERS["mmap"]
    assert bpf.run(code, number, 0, 4096, 3) == ALLOW
    for exec_bits in (4, 5, 7, 0xFFFFFFFF):
        assert bpf.run(code, number, 0, 4096, exec_bits) == KILL


def test_only_the_low_word_counts() -> None:
    """The kernel takes commands and flags as 32 bits, so the upper half must not hide anything."""
    code = seccomp.program([Rule("ioctl", (Arg(1, 0xFFFFFFFF, (5,)),))])
    number = syscalls.NUMBERS["ioctl"]
    assert bpf.run(code, number, 0, 5 | 1 << 40) == ALLOW
    assert bpf.run(code, number, 0, 6 | 5 << 32) == KILL


def test_all_arguments_must_hold() -> None:
    """Two conditions of one rule are an and."""
    rule = Rule("fcntl", (Arg(0, 0xFFFFFFFF, (9,)), Arg(1, 0xFFFFFFFF, (3, 4))))
    code = seccomp.program([rule])
    number = syscalls.NUMBERS["fcntl"]
    answers = {(fd, cmd): bpf.run(code, number, fd, cmd) for fd in (8, 9) for cmd in (2, 3, 4, 5)}
    assert {call for call, answer in answers.items() if answer == ALLOW} == {(9, 3), (9, 4)}


def test_rules_of_one_name_are_alternatives() -> None:
    """What the first rule of a name does not take, the second may."""
    first = Rule("ioctl", (Arg(1, 0xFF00, (0xAE00,)),))
    code = seccomp.program([first, Rule("read"), Rule("ioctl", (Arg(1, 0xFFFFFFFF, (0x5421,)),))])
    number = syscalls.NUMBERS["ioctl"]
    assert [bpf.run(code, number, 3, cmd) for cmd in (0xAE80, 0x5421, 0x5422)] == [
        ALLOW,
        ALLOW,
        KILL,
    ]


def test_a_rule_may_refuse() -> None:
    """clone3 keeps its flags where no filter can look: libc is told that it does not exist."""
    code = seccomp.program([Rule("clone3", action=seccomp.refuse(errno.ENOSYS))])
    assert bpf.run(code, syscalls.NUMBERS["clone3"]) == 0x00050000 | errno.ENOSYS


def test_a_word_stands_for_a_number_of_the_running_process() -> None:
    """A rule about descriptor "image" holds for that number, and for nothing without one."""
    rules = [Rule("fcntl", (Arg(0, 0xFFFFFFFF, ("image",)),)), Rule("read")]
    number = syscalls.NUMBERS["fcntl"]
    code = seccomp.program(rules, numbers={"image": 11})
    assert [bpf.run(code, number, fd) for fd in (0, 11, 12)] == [KILL, ALLOW, KILL]
    code = seccomp.program(rules)
    assert {bpf.run(code, number, fd) for fd in range(64)} == {KILL}
    assert bpf.run(code, syscalls.NUMBERS["read"]) == ALLOW


def test_numbers_are_those_of_the_kernel() -> None:
    """A few from each part of the table, against the kernel's own (syscall_64.tbl)."""
    known = {"read": 0, "execve": 59, "epoll_wait": 232, "seccomp": 317, "rseq": 334}
    known |= {"pidfd_send_signal": 424, "clone3": 435, "landlock_restrict_self": 446, "mseal": 462}
    assert {name: syscalls.NUMBERS[name] for name in known} == known
    assert len(set(syscalls.NUMBERS.values())) == len(syscalls.NUMBERS)


@pytest.mark.parametrize("name", ROWS)
def test_a_filter_says_what_its_row_says(name: str) -> None:
    """For every number there is: allowed exactly when the row has it for some arguments."""
    row = ROWS[name]
    code = seccomp.program(row.calls, row.otherwise)
    plain = {rule.name for rule in row.calls if not rule.args and rule.action == ALLOW}
    for call, number in syscalls.NUMBERS.items():
        if call in plain:
            assert bpf.run(code, number, 1 << 62, 1 << 62) == ALLOW, call
        elif call not in {rule.name for rule in row.calls}:
            assert bpf.run(code, number) == row.otherwise, call
    unknown = set(EVERY_NUMBER) - set(syscalls.NUMBERS.values())
    assert {bpf.run(code, number) for number in unknown} == {row.otherwise}


@pytest.mark.parametrize("name", ROWS)
def test_a_filter_fits_the_kernel(name: str) -> None:
    """A row can grow a lot before the kernel refuses it."""
    row = ROWS[name]
    assert len(seccomp.program(row.calls, row.otherwise)) // 8 < KERNEL_LIMIT // 8


@pytest.mark.parametrize("name", ROWS)
def test_no_row_lets_memory_become_executable(name: str) -> None:
    """Neither mmap nor mprotect takes PROT_EXEC."""
    row = ROWS[name]
    code = seccomp.program(row.calls, row.otherwise, {"self": 1})
    for call in ("mmap", "mprotect"):
        for prot in (4, 5, 6, 7):
            assert bpf.run(code, syscalls.NUMBERS[call], 0, 4096, prot) == row.otherwise


@pytest.mark.parametrize("kind", policy.DEVICES)
def test_a_device_has_few_calls(kind: str) -> None:
    """The shared part stays at 30 calls or fewer, and no kind asks for a dangerous one."""
    assert len({rule.name for rule in policy.BASE}) <= 30
    names = {rule.name for rule in policy.DEVICES[kind].calls}
    never = "open openat openat2 execve execveat socket connect bind clone clone3 fork vfork ptrace"
    never += " process_vm_readv process_vm_writev kill tkill tgkill mount unshare setns bpf prctl"
    never += " perf_event_open userfaultfd keyctl io_uring_setup io_uring_register memfd_create"
    never += " mprotect seccomp setuid setresuid capset dup dup2 dup3 pidfd_getfd init_module"
    assert not names & set(never.split())


def test_the_vm_process_makes_threads_and_no_processes() -> None:
    """clone(2) as glibc makes a thread is allowed; a fork, or a new namespace, is not."""
    row = policy.VM_PROCESS
    code = seccomp.program(row.calls, row.otherwise, {"self": 77})
    number = syscalls.NUMBERS["clone"]
    thread = 0x3D0F00
    assert bpf.run(code, number, thread) == ALLOW
    assert bpf.run(code, number, 0x01200011) == KILL  # fork(3): SIGCHLD and two tid flags
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert bpf.run(code, number, thread | namespace) == KILL


def test_the_vm_process_signals_only_its_own_threads() -> None:
    """Other processes it can signal by the pidfds that it was given, and in no other way."""
    row = policy.VM_PROCESS
    code = seccomp.program(row.calls, row.otherwise, {"self": 77})
    number = syscalls.NUMBERS["tgkill"]
    assert [bpf.run(code, number, pid, 5, 10) for pid in (77, 78, 1)] == [ALLOW, KILL, KILL]
    for call in ("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open"):
        assert bpf.run(code, syscalls.NUMBERS[call], 77) == KILL


def test_the_spawner_allows_what_devices_may_do() -> None:
    """Its filter stays in force in every device, so it must not forbid what theirs allows."""
    spawner = {rule.name for rule in policy.SPAWNER.calls if rule.action == ALLOW}
    for kind, row in policy.DEVICES.items():
        assert {rule.name for rule in row.calls} <= spawner, kind

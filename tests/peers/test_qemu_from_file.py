"""A guest of QEMU's goes on in another QEMU, from a file, at the same back ends."""

from __future__ import annotations

from typing import Final

import pytest

from tests.peers.debian import HOST, Guest, fio

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1200)]

# A file, from the disk into pages that may have been copied already.
READ: Final = "echo 1 > /proc/sys/vm/drop_caches; sha256sum < /root/f"


def test_migration(guest: Guest) -> None:
    """Memory is copied while back ends write to it; not one write is missed, no request lost.

    Their dirty logs say what to copy again. QEMU 7.2 cannot migrate its entropy device.
    """
    qmp = guest.qemu.qmp
    guest.unplug("rng")
    guest.run("dd if=/dev/urandom of=/root/f bs=1M count=12 conv=fsync 2>/dev/null")
    digest = guest.run("sha256sum < /root/f")
    reading = guest.repeat(READ, "/tmp/sums")
    writing = guest.repeat(fio("/dev/vdb", "2M"))
    guest.progress("vdb", 100)

    state = f"{guest.directory}/state"
    qmp.call("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 2000})
    qmp.call("migrate", uri=f"exec:cat > {state}")
    guest.qemu.wait_status("postmigrate")
    guest.start("-incoming", f"exec:cat {state}", without="rng")
    guest.qemu.wait_status("running")
    guest.qemu.console.send("\n")
    guest.qemu.console.shell()
    guest.progress("vdb", 100)
    guest.finish(reading, writing)
    assert set(guest.run("cat /tmp/sums").splitlines()) == {digest}
    guest.run("mount -t iso9660 -o ro /dev/sr0 /mnt")
    assert guest.run("sha256sum < /mnt/file").split()[0] == guest.digest
    guest.run(f"umount /mnt && ping -q -c 1 {HOST}")
    guest.plug_rng()

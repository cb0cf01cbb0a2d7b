"""The VM process gives up what it does not need, before it loads a guest.

From then on it is its owner's process, without capabilities, and can open nothing but files in
its runtime directory. A reset of the guest makes nothing that its first boot did not make under
the same rules: vCPU threads, KVM's VM, an unpacked kernel.
"""

from __future__ import annotations

import pwd
from typing import TYPE_CHECKING

from devices import jail
from vmm import log

if TYPE_CHECKING:
    from devices.jail import Report


def confine(directory: str, uid: int, gid: int | None, level: str) -> Report:
    """Confine this process to its runtime directory, as user `uid` if it is root's now.

    Call it with one thread, with everything open, with the directory given to its owner. `gid`
    None is the user's own group. `level` is vm.yaml's word: required, best-effort, off. Raises
    HostError.
    """
    # Nothing can be imported afterwards, and a packed kernel needs this at every reset.
    import zlib  # noqa: F401

    report = jail.confine(level, directory, uid, _group_of(uid) if gid is None else gid)
    for lack in report.lacking:
        log.warning(f"not confined: {lack}")
    return report


def _group_of(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return jail.NOBODY

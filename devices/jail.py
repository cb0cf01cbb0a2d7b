"""The jail: how a spawner and its device processes give up what they do not need.

    spawner    prepare(level, uid)        once, when all is imported: an empty root, namespaces
       fork()                             instead of os.fork(): the child has namespaces of its own
    device     enter(kind, level)         once, when all is open and mapped: the rest, for good

Every step is tried, and judged by what the kernel says afterwards rather than by intention. What
this host cannot do is named in the Report. `level` is vm.yaml's word: with "required" a lack is an
error, with "best-effort" it is told, with "off" nothing is done at all.

**After enter() nothing can be opened**, so nothing can be imported: what an error needs on its way
out is loaded by prepare(). One forbidden system call ends the process; the VM
process sees SIGSYS, and docs/jail.md says how to find out which call it was.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import HostError
from devices import landlock, namespaces, policy, privileges, seccomp
from devices.spec import SPECS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REQUIRED: Final = "required"
BEST_EFFORT: Final = "best-effort"
OFF: Final = "off"

# Beyond what a jail is made of: good to have, missing on kernels that are still in use.
NOBODY: Final = privileges.NOBODY

EXTRAS: Final = ("cgroup namespace", "no new code")

_CODECS: Final = ("utf-8", "ascii", "latin-1", "unicode_escape", "utf-8-sig")

_SPACE: Final = " namespace"


class Report(NamedTuple):
    """What was really applied to this process, and what this host lacks and why."""

    applied: tuple[str, ...]
    lacking: tuple[str, ...]  # "user namespace: Operation not permitted"

    def summary(self) -> str:
        """Return what applies, in one line for the log."""
        spaces = [step.removesuffix(_SPACE) for step in self.applied if step.endswith(_SPACE)]
        rest = [step for step in self.applied if not step.endswith(_SPACE)]
        named = [f"namespaces ({', '.join(spaces)})"] if spaces else []
        return "jail: " + (", ".join(named + rest) or "none")


class _Findings:
    """What has been tried so far; a forked process goes on with its parent's."""

    def __init__(self) -> None:
        self.applied: dict[str, str] = {}  # step → what to say of it
        self.lacking: dict[str, str] = {}  # step → why
        self.inherited = 0  # bytes of private memory that the spawner had

    def attempt(self, step: str, function: Callable[[], object]) -> bool:
        """Run one step, and note how it went."""
        try:
            function()
        except (OSError, ValueError) as err:
            self.lack(step, getattr(err, "strerror", None) or str(err))
            return False
        self.have(step)
        return True

    def have(self, step: str, words: str = "") -> None:
        """Note that a step is done; `words` say more than its name."""
        self.applied[step] = words or step
        self.lacking.pop(step, None)

    def lack(self, step: str, why: str) -> None:
        """Note that a step could not be done."""
        self.applied.pop(step, None)
        self.lacking[step] = why

    def report(self) -> Report:
        """Sum up."""
        lacking = tuple(f"{step}: {why}" for step, why in self.lacking.items())
        return Report(tuple(self.applied.values()), lacking)

    def insist(self, level: str, whom: str) -> None:
        """Raise HostError if the level does not allow what is lacking."""
        missing = [step for step in self.lacking if step not in EXTRAS]
        if level == REQUIRED and missing:
            what = "; ".join(f"{step}: {self.lacking[step]}" for step in missing)
            raise HostError(
                f"this host cannot jail {whom}: {what}",
                hint="`jail: best-effort` in vm.yaml does without",
            )


_found = _Findings()


def prepare(level: str, uid: int | None = None) -> None:
    """Jail this process as a spawner. Call it when nothing will be imported or opened any more.

    `uid` is the user that the VM process will run as, and that may end its device processes. What
    cannot be done is reported, or complained about, by the device processes.
    """
    if level == OFF:
        return
    with suppress(OSError):
        _found.inherited = privileges.private_memory()
    for name in _CODECS:
        codecs.lookup(name)
    _found.attempt("orphans", privileges.adopt_orphans)
    del _found.applied["orphans"]
    if os.geteuid() == 0:
        nobody, saved = privileges.NOBODY, 0 if uid is None else uid
        _found.attempt("user nobody", lambda: privileges.become(nobody, nobody, saved))
    own_uid, own_gid = os.geteuid(), os.getegid()
    spaces = [name for name in namespaces.SPACES if name != "pid"]
    _note_spaces(namespaces.unshare(spaces), spaces)
    if "user namespace" in _found.applied:
        # Without it device processes share this one, which is a lack of theirs to find out.
        with suppress(OSError):
            namespaces.map_self(own_uid, own_gid)
    if "mount namespace" not in _found.applied or not _done(namespaces.empty_root):
        _done(namespaces.vanished_root)
    # What is left makes namespaces, where a device process cannot have a user namespace for it.
    _done(lambda: privileges.drop_capabilities(keep=1 << privileges.CAP_SYS_ADMIN))
    _done(lambda: privileges.dumpable(False))
    row = policy.SPAWNER
    _done(lambda: privileges.limit(row.limits))
    if _found.attempt("no_new_privs", privileges.no_new_privs):
        _done(lambda: seccomp.install(seccomp.program(row.calls, row.otherwise)))


def fork(level: str) -> int:
    """Fork a process that will be a device; returns as os.fork() does.

    The child's process id is the one that this process sees. Raises HostError, OSError.
    """
    if level == OFF:
        return os.fork()
    spaces = list(namespaces.SPACES)
    pid, failed = namespaces.fork(spaces)
    if not pid:
        _note_spaces(failed, spaces)
    return pid


def enter(kind: str, level: str, *, vhost: bool = False) -> Report:
    """Jail this process as a device of `kind`, for good; `vhost`: behind a vhost-user socket.

    Raises HostError if the level is "required" and the host cannot do it.
    """
    if level == OFF:
        return Report((), ())
    row = policy.DEVICES.get(kind)
    if row is None:
        raise HostError(f"there is no jail for devices of kind {kind}")
    if vhost:
        row = policy.behind_vhost(row)
    sys.excepthook = _say_error
    sys.unraisablehook = _say_unraisable
    found = _found
    found.attempt("empty root", _see_empty_root)
    found.attempt("no capabilities", _drop_all)
    found.attempt("not dumpable", lambda: privileges.dumpable(False))
    found.attempt("no new code", privileges.no_new_code)
    found.attempt("no_new_privs", privileges.no_new_privs)
    _landlock(found)
    # From here on no descriptor can be made, and only so many can come.
    room = {"NOFILE": policy.VHOST_DESCRIPTORS} if vhost else _room(SPECS[kind].descriptors)
    limits = {**policy.LIMITS, **row.limits, **room}
    limits["DATA"] += found.inherited
    found.attempt("limits", lambda: privileges.limit(limits))
    found.insist(level, "a device process")
    _seccomp(found, row)
    found.insist(level, "a device process")
    return found.report()


def confine(level: str, directory: str, uid: int, gid: int) -> Report:
    """Confine this process as a VM process, to the files beneath `directory`.

    As root it becomes `uid` and `gid`. For good, and for all threads there will be; call it while
    there is one. Raises HostError if the level is "required" and the host cannot do it.
    """
    if level == OFF:
        return Report((), ())
    found, row = _Findings(), policy.VM_PROCESS
    # A start that fails takes its directory away again, empty.
    files = {directory: row.files, os.path.dirname(directory): landlock.Access.REMOVE_DIR}
    # Opened while this process still has the right to.
    beneath = {os.open(path, os.O_PATH | os.O_CLOEXEC): access for path, access in files.items()}
    if os.geteuid() == 0:
        found.attempt("owner", lambda: privileges.become(uid, gid, uid))
    found.attempt("no capabilities", _drop_all)
    found.attempt("limits", lambda: privileges.limit(row.limits))
    found.attempt("not dumpable", lambda: privileges.dumpable(False))
    found.attempt("no new code", privileges.no_new_code)
    found.attempt("no_new_privs", privileges.no_new_privs)
    _landlock(found, beneath, signals=False)
    for fd in beneath:
        os.close(fd)
    found.insist(level, "the VM process")
    _seccomp(found, row, {"self": os.getpid()})
    found.insist(level, "the VM process")
    return found.report()


def confine_connector(level: str) -> None:
    """Confine this process to connecting to sockets by path. For good.

    Root's capabilities go but for the one by which root reaches any path. What cannot be done
    here is told by the VM process, which does the same.
    """
    if level == OFF:
        return
    found, row = _Findings(), policy.CONNECTOR
    keep = 1 << privileges.CAP_DAC_OVERRIDE
    found.attempt("no capabilities", lambda: privileges.drop_capabilities(keep=keep))
    found.attempt("limits", lambda: privileges.limit(row.limits))
    found.attempt("not dumpable", lambda: privileges.dumpable(False))
    found.attempt("no new code", privileges.no_new_code)
    found.attempt("no_new_privs", privileges.no_new_privs)
    _landlock(found)
    _seccomp(found, row)
    found.insist(level, "the connector")


def _note_spaces(failed: Mapping[str, str], spaces: list[str]) -> None:
    for name in spaces:
        step = name + _SPACE
        if name not in failed:
            _found.have(step)
        elif step not in _found.applied:  # else the spawner's serves
            _found.lack(step, failed[name])


def _done(function: Callable[[], object]) -> bool:
    """Try something whose effect is looked at later."""
    try:
        function()
    except (OSError, ValueError):
        return False
    return True


def _room(count: int) -> dict[str, int]:
    """Return the limit that leaves room for `count` descriptors beside those that are open.

    RLIMIT_NOFILE bounds the number of a new descriptor, not how many there are: it has to lie
    just above the `count` lowest numbers that are free. Raises OSError.
    """
    if not count:
        return {}
    free = [os.dup(0) for _ in range(count)]
    for fd in free:
        os.close(fd)
    return {"NOFILE": max(free) + 1}


def _see_empty_root() -> None:
    if os.listdir("/"):
        raise OSError(errno.EBUSY, "the host's files are still there")


def _drop_all() -> None:
    privileges.drop_capabilities()
    if privileges.permitted():
        raise OSError(errno.EPERM, "some are still there")


def _seccomp(
    found: _Findings, row: policy.Policy, numbers: Mapping[str, int] | None = None
) -> None:
    code = seccomp.program(row.calls, row.otherwise, numbers)
    if found.attempt("seccomp", lambda: seccomp.install(code)):
        names = {rule.name for rule in row.calls}
        found.have("seccomp", f"seccomp ({len(names)} system calls)")


def _landlock(
    found: _Findings, allowed: Mapping[int, landlock.Access] | None = None, *, signals: bool = True
) -> None:
    """Deny all that this kernel's Landlock can but `allowed`, and see that it does."""
    try:
        version = landlock.restrict(allowed, signals=signals)
    except OSError as err:
        found.lack("Landlock", err.strerror or "")
        return
    if not version:
        found.lack("Landlock", "this kernel has none, or it is switched off (lsm=)")
        return
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        denies = ", ".join(landlock.denied(version, signals=signals))
        found.have("Landlock", f"Landlock {version} ({denies})")
    else:
        found.lack("Landlock", "it lets directories be opened all the same")


def _say_error(kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """Stand in for the traceback printer, which opens source files."""
    with suppress(Exception):
        os.write(2, f"{kind.__name__}: {error}\n".encode(errors="replace"))


def _say_unraisable(what: object) -> None:
    error = getattr(what, "exc_value", None)
    if error is not None:
        _say_error(type(error), error, None)

"""What this host has for running VMs, one line each with the remedy: `pyvmctl doctor`.

Everything is found by trying, as the user who asks. A failed check means that no VM can start
here; a warning means that something is slower, less confined or missing for some VMs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from config.errors import HostError, PyvmError
from vmm import checks, kvm, kvmabi, runroot
from vmm.checks import Check

if TYPE_CHECKING:
    from collections.abc import Callable

_MODULES: Final = ("kvm_intel", "kvm_amd", "kvm_pvm")


def kvm_device(device: str = kvm.DEVICE) -> Check:
    """/dev/kvm: there, open to this user, the right API, every capability that we need."""
    try:
        system = kvm.System(device)
    except HostError as err:
        denied = isinstance(err.__cause__, PermissionError)
        return Check("fail", err.what, checks.join_group(device) if denied else err.hint, None)
    try:
        return Check(
            "ok",
            f"{device}, API version {kvmabi.API_VERSION}, up to {system.max_vcpus} vCPUs",
            value={"api_version": kvmabi.API_VERSION, "max_vcpus": system.max_vcpus},
        )
    finally:
        system.close()


def kvm_module() -> Check:
    """The kernel module behind /dev/kvm; it tells the kind of virtualisation."""
    found = [name for name in _MODULES if os.path.isdir(f"/sys/module/{name}")]
    if not found:
        return Check("warn", "none of " + ", ".join(_MODULES) + " is loaded", value=[])
    return Check("ok", ", ".join(found), value=found)


def stock_kernels() -> Check:
    """Whether this KVM can run the kernels that distributions ship; a tiny guest tries."""
    from vmm import probe  # brings the whole machine along

    try:
        able, why = probe.can_run_stock_kernels()
    except PyvmError as err:
        return Check("warn", f"not known: {err.what}", err.hint, False)
    if able:
        return Check("ok", "this KVM runs stock kernels", value=True)
    return Check("warn", f"no: {why}", "run such guests inside tools/kvmhost", False)


def groups() -> Check:
    """Who asks, and in which groups."""
    import grp  # no other verb needs it
    import pwd

    def name(gid: int) -> str:
        try:
            return grp.getgrgid(gid).gr_name
        except KeyError:
            return str(gid)

    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    names = sorted({name(gid) for gid in (os.getegid(), *os.getgroups())})
    return Check("ok", f"{user}, in {', '.join(names)}", value={"user": user, "groups": names})


def runtime_directory() -> Check:
    """Where running VMs have their sockets: safe from others, and ours to write."""
    place = root = runroot.root()
    try:
        os.close(runroot.open_root())
    except FileNotFoundError:  # made by the first start, if it can be
        while not os.path.exists(place):
            place = os.path.dirname(place)
    except HostError as err:
        return Check("fail", err.what, err.hint, None)
    if not os.access(place, os.W_OK | os.X_OK):
        hint = "set PYVMD_RUNTIME_DIR to a directory of your own"
        return Check("fail", f"{root}: cannot write to {place}", hint, None)
    return Check("ok", root, value=root)


def seabios() -> Check:
    """The firmware that `boot: {firmware: seabios}` starts."""
    from vmm import firmware  # no other check needs it

    path = firmware.installed()
    if not path:
        return Check("warn", "no SeaBIOS (for boot.firmware)", firmware.REMEDY, "")
    try:
        firmware.open_firmware(path).close()
    except PyvmError as err:
        return Check("warn", err.what, firmware.REMEDY, "")
    return Check("ok", path, value=path)


CHECKS: Final[tuple[tuple[str, Callable[[], Check]], ...]] = (
    ("python", checks.python),
    ("kernel", checks.kernel),
    ("kvm", kvm_device),
    ("kvm_module", kvm_module),
    ("stock_kernels", stock_kernels),
    ("groups", groups),
    ("runtime_directory", runtime_directory),
    ("tun", lambda: checks.device("/dev/net/tun", "tun", "for network interfaces")),
    ("nft", lambda: checks.program("nft", "nftables", "for 'nat: true'")),
    ("passt", lambda: checks.program("passt", "passt", "for 'type: user'")),
    ("net_admin", checks.net_admin),
    ("vhost_net", lambda: checks.device("/dev/vhost-net", "vhost_net", "for faster networking")),
    ("seabios", seabios),
    ("landlock", checks.landlock),
    ("seccomp", checks.seccomp),
    ("user_namespaces", checks.user_namespaces),
    ("cgroup", checks.cgroup),
    ("memory", checks.memory),
    ("bytecode", checks.bytecode),
)


def examine() -> dict[str, Check]:
    """Run every check. A check that breaks is a warning of its own and stops none of the rest."""
    report = {}
    for name, check in CHECKS:
        try:
            report[name] = check()
        except (OSError, ValueError, LookupError) as err:
            report[name] = Check("warn", f"not known: {err}")
    return report


def can_start(report: dict[str, Check]) -> bool:
    """Whether a VM can be started on this host."""
    return all(check.state != "fail" for check in report.values())

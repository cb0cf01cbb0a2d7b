"""Tiers, what they need, and fixtures that every tier may use.

Tests in tests/kvm, tests/peers and tests/guest get the marker of that name. A test whose tier
cannot run on this machine is skipped with the reason; `--no-skip` makes that, and any other skip
in those tiers, a failure.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any, Final

import pytest

from config.errors import PyvmError
from tests.descriptors import count_before
from tests.guestvm import IMAGES, GuestVm

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

TIERS: Final = ("kvm", "peers", "guest")
DESCRIPTORS_MOST: Final = 300  # that tests may leave; what is in garbage is not counted
GUEST_TIMEOUT: Final = 600  # seconds for a test that boots Linux, perhaps inside tools/kvmhost


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this project."""
    group = parser.getgroup("pyvmd")
    group.addoption(
        "--no-skip",
        action="store_true",
        help="a skipped test of the kvm, peers or guest tier fails",
    )
    group.addoption(
        "--update-golden", action="store_true", help="write golden files; then review the diff"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let --update-golden reach tests that look at the environment; keep tmp_path off 9p.

    A shell's background job has SIGINT and SIGQUIT ignored, what nohup starts SIGHUP, and so would
    all that tests start.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if config.getoption("--update-golden"):
        os.environ["PYVMD_UPDATE_GOLDEN"] = "1"
    if "PYVMD_KVMHOST" in os.environ:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier."""
    here = os.path.dirname(__file__)
    for item in items:
        tier = os.path.relpath(item.path, here).split(os.sep)[0]
        if tier in TIERS:
            item.add_marker(tier)
        if tier in ("peers", "guest") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(GUEST_TIMEOUT))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    reasons = (("kvm", why_no_kvm), ("peers", why_no_peers), ("guest", why_no_guests))
    for tier, why_not in reasons:
        if item.get_closest_marker(tier) and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def _descriptors() -> Iterator[None]:
    """See that few are left open: what is beyond 1023 is nothing for select(2)."""
    yield
    if (count := len(os.listdir("/proc/self/fd"))) >= DESCRIPTORS_MOST:
        count = count_before()
    assert count < DESCRIPTORS_MOST, f"{count} descriptors are open after this file, or before it"


@functools.cache
def why_no_kvm() -> str:
    """Return why bare-metal guests cannot run here, "" if they can."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as err:
        return f"/dev/kvm: {err.strerror} (tools/kvmhost has one)"
    return ""


@functools.cache
def why_no_peers() -> str:
    """Return why no other monitor's guests can run here, "" if they can."""
    if shutil.which("qemu-system-x86_64") is None:
        return "no qemu-system-x86_64 (tools/setup installs it)"
    if not os.path.exists(f"{IMAGES}/debian.img"):
        return "no guest image (tools/guest-image --debian makes it)"
    return ""


@functools.cache
def why_no_guests() -> str:
    """Return why Linux guests cannot run here, "" if they can; found by trying."""
    if reason := why_no_kvm():
        return reason
    from vmm.probe import can_run_stock_kernels

    try:
        possible, reason = can_run_stock_kernels()
    except PyvmError as err:
        possible, reason = False, str(err)
    return "" if possible else f"{reason} (tools/test guest runs these tests in tools/kvmhost)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --no-skip, turn a skip in a tier that must run into a failure."""
    report = yield
    tiers = [tier for tier in TIERS if item.get_closest_marker(tier)]
    if report.skipped and tiers and item.config.getoption("--no-skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"the {tiers[0]} tier must not skip (--no-skip): {reason}"
    return report


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return an empty runtime directory of pyvmctl, used by all that this test starts.

    Its path is short, since a socket's path ends at 107 bytes, and not on a shared file system.
    """
    parent = next(path for path in ("/run", "/dev/shm", "/tmp") if os.access(path, os.W_OK))
    path = tempfile.mkdtemp(prefix="pyvmd-", dir=parent)
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", path)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_vm(runtime_dir: str) -> Iterator[Callable[[dict[str, Any]], GuestVm]]:
    """Return a function that starts a VM from a vm.yaml's content. The VM ends with the test."""
    started: list[GuestVm] = []

    def start(config: dict[str, Any]) -> GuestVm:
        started.append(GuestVm(config, runtime_dir))
        return started[-1]

    yield start
    for vm in started:
        vm.end()

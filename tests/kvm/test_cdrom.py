"""pyvmctl cdrom end to end: real command, VM process and device process; a guest that looks on."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from devices.images import Access, open_image
from tests.guestvm import TREE, pyvmctl
from vmm.qmpclient import QmpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm

DEADLINE = 30.0


@pytest.fixture
def directory(runtime_dir: str) -> Iterator[str]:
    """The runtime directory, with two discs in it; VMs end with the test."""
    for name in ("first", "second"):
        with open(f"{runtime_dir}/{name}.iso", "wb") as file:
            file.write(name.encode() * 2048)
    yield runtime_dir
    pyvmctl("stop", "-a", "-f")


def start(directory: str, cdrom: str) -> None:
    """Start the example guest with a drive."""
    config = {
        "name": "hello",
        "memory": "16M",
        "boot": {"kernel": f"{TREE}/config/examples/hello.elf"},
        "cdrom": cdrom,
    }
    with open(f"{directory}/hello.yaml", "w") as file:
        json.dump(config, file)
    done = pyvmctl("start", f"{directory}/hello.yaml")
    assert done.returncode == 0, done.stderr


def drive() -> dict[str, Any]:
    """What status tells of the drive."""
    facts = json.loads(pyvmctl("status", "--json", "hello").stdout)
    [found] = [row for row in facts["live"]["devices"] if row["name"] == "vioscsi"]
    return {key: found[key] for key in ("state", "medium", "tray_open", "locked")}


def locked(path: str) -> bool:
    """Whether somebody reads the image, so that it cannot be written."""
    try:
        os.close(open_image(Access(path, "image", write=True)))
    except HostError:
        return True
    return False


def test_discs_come_and_go(directory: str) -> None:
    """Out and in, by name; each disc is locked while it is in, and status and events tell."""
    first, second = f"{directory}/first.iso", f"{directory}/second.iso"
    start(directory, "first.iso")
    facts = {"state": "running", "medium": first, "tray_open": False, "locked": False}
    assert drive() == facts
    assert (locked(first), locked(second)) == (True, False)
    with QmpClient(f"{directory}/hello/control.sock") as client:
        done = pyvmctl("cdrom", "eject", "hello")
        assert (done.returncode, done.stderr) == (0, "hello/vioscsi: no disc, tray open\n")
        assert drive() == {**facts, "medium": None, "tray_open": True}
        assert (locked(first), locked(second)) == (False, False)
        done = pyvmctl("cdrom", "insert", "hello", second)
        assert (done.returncode, done.stderr) == (0, f"hello/vioscsi: {second}, tray closed\n")
        assert drive() == {**facts, "medium": second}
        assert (locked(first), locked(second)) == (False, True)
        moved = [
            event["data"]
            for event, _ in zip(client.events(DEADLINE), range(2), strict=False)
            if event["event"] == "DEVICE_TRAY_MOVED"
        ]
        assert moved == [{"id": "vioscsi", "tray-open": on} for on in (True, False)]
    before = fds(directory)
    for path in (first, second) * 5:
        assert pyvmctl("cdrom", "insert", "hello", path).returncode == 0
    assert drive()["medium"] == second
    assert fds(directory) == before


def fds(directory: str) -> list[int]:
    """How many descriptors VM process and drive have, with this one control client."""
    facts = json.loads(pyvmctl("status", "--json", "hello").stdout)
    [found] = [row for row in facts["live"]["devices"] if row["name"] == "vioscsi"]
    with QmpClient(f"{directory}/hello/control.sock"):  # by then those before it have gone
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (facts["pid"], found["pid"])]


def test_an_empty_drive_and_mistakes(directory: str) -> None:
    """A drive may start empty; what cannot be put in leaves it so; without a drive it is told."""
    start(directory, "empty")
    assert drive()["medium"] is None
    done = pyvmctl("cdrom", "insert", "hello")
    assert (done.returncode, "no disc lies in the drive" in done.stderr) == (1, True)
    assert pyvmctl("cdrom", "insert", "hello", directory).returncode == 2
    assert pyvmctl("cdrom", "insert", "hello", f"{directory}/first.iso").returncode == 0
    assert drive()["medium"] == f"{directory}/first.iso"
    assert pyvmctl("stop", "-f", "hello").returncode == 0
    config = f"{TREE}/config/examples/hello.yaml"
    assert pyvmctl("start", config).returncode == 0
    done = pyvmctl("cdrom", "eject", "hello")
    assert (done.returncode, "no CD-ROM drive" in done.stderr) == (1, True)


def test_what_is_no_disc_keeps_the_vm_from_starting(directory: str) -> None:
    """Missing, empty, or being written: named, with status 2 or 1."""
    open(f"{directory}/nothing.iso", "w").close()
    for path, words in (("none.iso", "No such file"), ("nothing.iso", "is empty")):
        config = {"boot": {"kernel": f"{TREE}/config/examples/hello.elf"}, "cdrom": path}
        with open(f"{directory}/bad.yaml", "w") as file:
            json.dump(config, file)
        done = pyvmctl("start", f"{directory}/bad.yaml")
        assert done.returncode == 2
        assert words in done.stderr

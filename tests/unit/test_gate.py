"""Parking vCPUs, one of which waits for whoever parks them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from vmm.vcpu import Gate

if TYPE_CHECKING:
    import pytest


def test_what_a_vcpu_waits_for_is_done_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is being replaced by the thread that wants everybody parked."""
    monkeypatch.setattr("vmm.vcpu.PARK_LOOK", 0.01)
    gate, there = Gate(), threading.Event()

    def vcpu() -> None:
        if there.wait(10):
            gate.wait()

    thread = threading.Thread(target=vcpu)
    thread.start()
    gate.set(Gate.Mode.PARK)
    assert gate.all_parked(1, there.set)
    gate.set(Gate.Mode.LEAVE)
    thread.join()


def test_a_vcpu_that_does_not_come_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller is told, and has been asked meanwhile."""
    monkeypatch.setattr("vmm.vcpu.PARK_LOOK", 0.01)
    monkeypatch.setattr("vmm.vcpu.PARK_DEADLINE", 0.05)
    asked: list[bool] = []
    assert not Gate().all_parked(1, lambda: asked.append(True))
    assert asked

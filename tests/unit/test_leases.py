"""Leases in what a VM says of itself: what is there, and nothing of what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.leases import of_vm

NIC: dict[str, Any] = {
    "name": "vionet1",
    "kind": "vionet",
    "lladdr": "fe:e1:bb:d1:00:01",
    "addresses": ["100.64.1.5", "fd00::2"],
    "network": {"local": {"offer": 3, "ack": 2, "bootp": 1, "advertisement": 9}},
}


def test_a_lease() -> None:
    """Offers are not counted: who has been offered an address has not taken it."""
    other = {"name": "vioblk0", "kind": "vioblk"}
    assert list(of_vm({"devices": [other, NIC]})) == [
        {
            "nic": "vionet1",
            "lladdr": "fe:e1:bb:d1:00:01",
            "addresses": ["100.64.1.5", "fd00::2"],
            "given": 3,
        }
    ]


def test_one_that_nobody_has_asked_for() -> None:
    """It is there all the same: the address is this guest's."""
    [lease] = of_vm({"devices": [{**NIC, "network": {"local": {}}}]})
    assert lease["given"] == 0


@pytest.mark.parametrize(
    "live",
    [
        None,
        [],
        {},
        {"devices": 5},
        {"devices": [None, [], "x"]},
        {"devices": [{**NIC, "addresses": []}]},
        {"devices": [{**NIC, "addresses": [7]}]},
        {"devices": [{**NIC, "addresses": "100.64.1.5"}]},
        {"devices": [{**NIC, "network": None}]},
        {"devices": [{**NIC, "network": {"local": []}}]},
        {"devices": [{**NIC, "name": 1}]},
        {"devices": [{**NIC, "lladdr": {}}]},
    ],
)
def test_what_makes_no_sense_is_left_out(live: Any) -> None:
    """The VM process may be its guest's by now."""
    assert list(of_vm(live)) == []


@pytest.mark.parametrize("count", ["7", None, 1.5, True, {}])
def test_counts_that_are_none(count: Any) -> None:
    """They count as 0."""
    [lease] = of_vm({"devices": [{**NIC, "network": {"local": {"ack": count}}}]})
    assert lease["given"] == 0

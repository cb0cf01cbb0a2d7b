"""The memory map: regions of the memfd, e820, and what the host cannot provide."""

from __future__ import annotations

import itertools
import os

import pytest

from config.errors import ConfigError
from vmm import loader, memory
from vmm.boot import E820Range
from vmm.memory import ABOVE_4G, GIB, HIGH_RAM, MIB, PCI_WINDOW


@pytest.mark.parametrize("size", [MIB, 16 * MIB, PCI_WINDOW - 4096, PCI_WINDOW, 5 * GIB])
def test_regions_hold_all_of_ram(size: int) -> None:
    """Low memory is filled first, the rest continues at 4 GiB, and no byte is used twice."""
    regions = memory.regions(size)
    assert sum(region.size for region in regions) == size
    assert regions[0] == (0, min(size, PCI_WINDOW), 0)
    assert regions[1:] == ([(ABOVE_4G, size - PCI_WINDOW, PCI_WINDOW)] if size > PCI_WINDOW else [])


@pytest.mark.parametrize("size", [MIB, 16 * MIB, PCI_WINDOW, 5 * GIB])
def test_e820(size: int) -> None:
    """The map is sorted, without overlaps, and RAM in it is RAM that exists."""
    ranges = memory.e820(size)
    for before, after in itertools.pairwise(ranges):
        assert before.start + before.size <= after.start
    ram = [item for item in ranges if item.type == loader.E820_RAM]
    lost = HIGH_RAM - memory.EBDA  # backed, but not the guest's to use
    assert sum(item.size for item in ram) == size - lost
    for item in ram:
        assert any(
            region.gpa <= item.start and item.start + item.size <= region.gpa + region.size
            for region in memory.regions(size)
        )
    assert E820Range(0, memory.EBDA, loader.E820_RAM) in ranges


def test_ram_is_sealed() -> None:
    """Nobody who shares guest RAM can shrink it under us, or seal it any further."""
    ram = memory.Ram("t", MIB)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, 4096)
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, 2 * MIB)
        assert ram.resident() == 0
        ram.memory.write(0, b"x")
        assert 0 < ram.resident() <= 2 * MIB  # a huge page at most
    finally:
        ram.close()


def test_more_memory_than_the_host_has() -> None:
    """A VM that could never fit is refused, and told by how much."""
    with pytest.raises(ConfigError, match=r"big: memory \d+M is more than this host has \(\d+M\)"):
        memory.Ram("big", memory.host_memory() + 4096)

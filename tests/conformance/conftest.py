"""Fixtures for tests of device processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.devicehost import DeviceHost, shared_spawner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.launch import Spawner


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """One spawner for all; its devices are jailed as far as this host can."""
    with shared_spawner("best-effort") as spawner:
        yield spawner


@pytest.fixture
def host(spawner: Spawner) -> Iterator[DeviceHost]:
    """An entropy device."""
    with DeviceHost("viornd", spawner=spawner) as host:
        yield host

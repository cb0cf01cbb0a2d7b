"""Fixtures for tests of device processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices import process
from tests.devicehost import DeviceHost, shared_spawner
from tests.odddevice import no_more_imports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.launch import Spawner


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    """One spawner for all; its devices are not jailed, but cannot import as if they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "confine", no_more_imports)
        spawners = shared_spawner()
        spawner = spawners.__enter__()
    yield spawner
    spawners.__exit__(None, None, None)


@pytest.fixture
def host(spawner: Spawner) -> Iterator[DeviceHost]:
    """An entropy device."""
    with DeviceHost("viornd", spawner=spawner) as host:
        yield host

"""vmmci as drivers written for vmd expect it (reference §d.2, §e.6), and where it does better.

The register map is vmd's byte by byte; OpenBSD's vmmci(4) and Linux's legacy accessors are the
readers in mind.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError
from devices import clockwatch
from devices.viodev import CONFIG_CHANGE, ImsgType
from devices.virtio import CommonCfg
from tests.vmmcilab import (
    ALL,
    COMMAND,
    CONFIG,
    DRIVER_FEATURES,
    FEATURES,
    ISR,
    MICROSECONDS,
    MICROSECONDS_HIGH,
    NONE,
    NOW,
    REBOOT,
    SECONDS,
    SECONDS_HIGH,
    SHUTDOWN,
    STATUS,
    SYNCRTC,
    VmmciLab,
)
from tools.viodriver.private import DEADLINE, DeviceHost

if TYPE_CHECKING:
    from collections.abc import Callable

DRIVER_OK = 7


@pytest.fixture
def lab() -> VmmciLab:
    """A device whose driver is up and has accepted everything."""
    lab = VmmciLab()
    lab.start()
    return lab


# Registers.


def test_features_are_vmds_three_and_no_others() -> None:
    """TIMESYNC, ACK, SYNCRTC: no queue, so none of virtio's ring features."""
    lab = VmmciLab()
    assert lab.read(FEATURES) == ALL
    lab.write(FEATURES, 0xFFFF)
    assert lab.read(FEATURES) == ALL
    lab.write(DRIVER_FEATURES, 5)
    assert lab.read(DRIVER_FEATURES) == 5


def test_there_are_no_queues(lab: VmmciLab) -> None:
    """Any queue that is selected has size 0 and no address; writing changes nothing."""
    for queue in (0, 1, 0xFFFF):
        lab.write(CONFIG - 6, queue, 2)  # queue select
        assert lab.read(CONFIG - 6, 2) == queue
        lab.write(CONFIG - 12, 0x10)  # address
        lab.write(CONFIG - 4, queue, 2)  # notify
        assert (lab.read(CONFIG - 12), lab.read(CONFIG - 8, 2)) == (0, 0)
    lab.write(STATUS, 0, 1)
    lab.start()
    assert lab.read(STATUS, 1) == DRIVER_OK


def test_status_takes_the_legacy_steps(lab: VmmciLab) -> None:
    """ACKNOWLEDGE, DRIVER, DRIVER_OK; 0 resets."""
    assert lab.read(STATUS, 1) == DRIVER_OK
    lab.write(STATUS, 0, 1)
    assert lab.read(STATUS, 1) == 0


def test_the_command_interrupts_by_isr_2(lab: VmmciLab) -> None:
    """ISR says "configuration", reading clears it and lowers the line (§d.6)."""
    assert lab.ask("shutdown") == "asked"
    assert lab.interrupts == 1
    assert lab.registers.read(ISR, 1) == (2, -1)
    assert lab.registers.read(ISR, 1) == (0, -1)
    assert lab.read(COMMAND) == SHUTDOWN


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_register_can_be_read_in_every_width(size: int, lab: VmmciLab) -> None:
    """Linux reads legacy configuration byte by byte, OpenBSD in words of 32 bits."""
    lab.ask("reboot")

    def field(offset: int, width: int) -> int:
        pieces = [lab.read(CONFIG + offset + at, size) << 8 * at for at in range(0, width, size)]
        return sum(pieces)

    assert field(0, 4) == REBOOT
    assert field(4, 8) == NOW // 10**9
    assert field(12, 8) == NOW // 1000 % 10**6
    assert lab.read(CONFIG + 20, size) == 0


def test_the_time_is_taken_when_its_first_word_is_read(lab: VmmciLab) -> None:
    """The others show that time, however long the driver takes to read them."""
    assert lab.read(SECONDS) == NOW // 10**9
    lab.now += 3_600_000_000_000
    assert lab.read(MICROSECONDS) == 123456
    assert lab.read(MICROSECONDS_HIGH) == 0
    assert lab.read(SECONDS_HIGH) == 0
    assert lab.read(SECONDS) == NOW // 10**9 + 3600
    lab.now += 1_000_000_000
    assert lab.read(SECONDS) == NOW // 10**9 + 3601


def read_up(lab: VmmciLab) -> tuple[int, int]:
    """Seconds and microseconds, low halves first."""
    words = [lab.read(reg) for reg in (SECONDS, SECONDS_HIGH, MICROSECONDS, MICROSECONDS_HIGH)]
    return words[0] | words[1] << 32, words[2] | words[3] << 32


def read_down(lab: VmmciLab) -> tuple[int, int]:
    """The same, high halves first, as OpenBSD's virtio_pci(4) reads 64 bits."""
    words = [lab.read(reg) for reg in (SECONDS_HIGH, SECONDS, MICROSECONDS_HIGH, MICROSECONDS)]
    return words[1] | words[0] << 32, words[3] | words[2] << 32


@pytest.mark.parametrize("read", [read_up, read_down])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_both_halves_are_of_one_time(
    read: Callable[[VmmciLab], tuple[int, int]], step: int, lab: VmmciLab
) -> None:
    """Also where the upper half changes, whose word vmd shows as 0 for ever.

    Time passes with every access: the pair must be a time that was.
    """
    tick = 400_000_000  # ns per access
    rollover = (1 << 32) * 10**9
    lab.now = rollover - step * tick - 1
    original = lab.read

    def slowly(reg: int, size: int = 4) -> int:
        lab.now += tick
        return original(reg, size)

    lab.read = slowly  # type: ignore[method-assign]
    for _ in range(4):
        began = lab.now
        seconds, micros = read(lab)
        assert began // 1000 <= seconds * 10**6 + micros <= lab.now // 1000


def test_the_time_cannot_be_written(lab: VmmciLab) -> None:
    """It is dropped and told; so is what lies past the end."""
    stamp = lab.read(SECONDS)
    lab.write(SECONDS, 1)
    lab.write(CONFIG + 20, 1)
    assert lab.read(SECONDS) == stamp
    assert len(lab.said) == len([line for line in lab.said if "write" in line]) + 1


# Commands and answers.


@pytest.mark.parametrize(("word", "command"), [("shutdown", SHUTDOWN), ("reboot", REBOOT)])
def test_a_command_is_acknowledged_by_writing_it_back(
    word: str, command: int, lab: VmmciLab
) -> None:
    """The VM process is told once; the command stays, as in vmd."""
    assert lab.ask(word) == "asked"
    assert lab.read(COMMAND) == command
    assert lab.told == []
    for _ in range(3):
        lab.write(COMMAND, command)
    assert lab.told == ["acknowledged"]
    assert lab.read(COMMAND) == command


def test_an_acknowledgement_may_come_byte_by_byte(lab: VmmciLab) -> None:
    """As Linux's legacy accessors write it."""
    lab.ask("reboot")
    for at, byte in enumerate((REBOOT, 0, 0, 0)):
        lab.write(COMMAND + at, byte, 1)
    assert lab.told == ["acknowledged"]
    assert not [line for line in lab.said if line.startswith("2")]


def test_asked_the_same_again_the_driver_is_left_alone(lab: VmmciLab) -> None:
    """No second interrupt; one that has acknowledged is told to have."""
    lab.ask("shutdown")
    assert lab.ask("shutdown") == "asked"
    assert (lab.interrupts, lab.told) == (1, [])
    lab.write(COMMAND, SHUTDOWN)
    assert lab.ask("shutdown") == "asked"
    assert (lab.interrupts, lab.told) == (1, ["acknowledged"] * 2)


def test_a_driver_that_does_not_acknowledge_cannot_be_asked() -> None:
    """Without DRIVER_OK, or without ACK: the VM process hears why, and nothing is pending."""
    lab = VmmciLab()
    assert lab.ask("shutdown") == "no driver"
    lab.start(features=ALL & ~2)
    assert lab.ask("shutdown") == "the driver does not support it"
    lab.write(STATUS, 0, 1)
    assert lab.ask("reboot") == "no driver"
    assert (lab.read(COMMAND), lab.interrupts) == (NONE, 0)


@pytest.mark.parametrize(
    ("pending", "command"),
    [
        *(("", command) for command in (NONE, REBOOT, 4, 0xFFFF_FFFF, 0x100)),
        *(("shutdown", command) for command in (NONE, REBOOT, 4, 0xFFFF_FFFF, 0x101)),
        *(("reboot", command) for command in (NONE, 4, 0xFFFF_FFFF, 0x200)),
    ],
)
def test_what_nobody_asked_for_is_no_answer(pending: str, command: int, lab: VmmciLab) -> None:
    """It is told in the log, and changes nothing; SHUTDOWN has a meaning of its own."""
    if pending:
        lab.ask(pending)
    before = lab.read(COMMAND)
    lab.said.clear()
    lab.write(COMMAND, command)
    assert (lab.read(COMMAND), lab.told) == (before, [])
    assert len(lab.said) == 1
    assert f"driver wrote command {command}" in lab.said[0]


def test_a_guest_that_goes_down_by_itself_says_so(lab: VmmciLab) -> None:
    """SHUTDOWN with nothing pending, told once; while it reboots as asked, it is expected."""
    lab.write(COMMAND, SHUTDOWN)
    lab.write(COMMAND, SHUTDOWN)
    assert lab.told == ["announced"]
    assert lab.read(COMMAND) == NONE
    lab.ask("none")  # the machine was reset
    lab.write(COMMAND, SHUTDOWN)
    assert lab.told == ["announced"] * 2
    lab.ask("reboot")
    lab.write(COMMAND, REBOOT)
    lab.write(COMMAND, SHUTDOWN)
    assert lab.told == ["announced", "announced", "acknowledged"]


def test_a_command_outlives_its_driver_but_not_the_machine(lab: VmmciLab) -> None:
    """Status 0 withdraws nothing: a driver that comes back is told; a reset of the VM does."""
    lab.ask("shutdown")
    lab.write(STATUS, 0, 1)
    assert lab.read(ISR, 1) == 0
    assert lab.read(COMMAND) == SHUTDOWN
    lab.start()
    assert (lab.read(ISR, 1), lab.read(COMMAND)) == (2, SHUTDOWN)
    lab.write(COMMAND, SHUTDOWN)
    lab.write(STATUS, 0, 1)
    lab.start()
    assert lab.read(ISR, 1) == 0  # it has acknowledged
    assert lab.ask("none") == "asked"
    assert lab.read(COMMAND) == NONE
    lab.ask("shutdown")
    lab.write(COMMAND, SHUTDOWN)
    assert lab.told == ["acknowledged"] * 2


def test_settings_are_checked(lab: VmmciLab) -> None:
    """What a client may send comes to nothing: another name, another word, no word."""
    for value in ("halt", "", 1, None, ["shutdown"], {"a": 1}):
        with pytest.raises(ConfigError):
            lab.device.setting("command", value)
    with pytest.raises(ConfigError):
        lab.device.setting("clock", 1)
    assert lab.read(COMMAND) == NONE


# The clock.


def test_syncrtc_is_answered_by_taking_it_away(lab: VmmciLab) -> None:
    """The driver looks at the clock and writes SYNCRTC: nothing is pending any more."""
    assert lab.ask("syncrtc") == "asked"
    assert (lab.read(ISR, 1), lab.read(COMMAND)) == (2, SYNCRTC)
    lab.write(COMMAND, SYNCRTC)
    assert (lab.read(COMMAND), lab.told) == (NONE, [])


def test_syncrtc_that_was_not_answered_is_repeated(lab: VmmciLab) -> None:
    """The clock has changed again; a driver that missed the first gets another interrupt."""
    lab.ask("syncrtc")
    lab.ask("syncrtc")
    assert lab.interrupts == 2


def test_syncrtc_only_for_drivers_that_know_it() -> None:
    """Without the feature it is not asked, and nothing is left pending."""
    lab = VmmciLab()
    assert lab.ask("syncrtc") == "no driver"
    lab.device.unpause()
    lab.start(features=ALL & ~4)
    assert lab.ask("syncrtc") == "the driver does not support it"
    lab.device.unpause()
    assert (lab.read(COMMAND), lab.interrupts) == (NONE, 0)


def test_syncrtc_does_not_touch_a_shutdown(lab: VmmciLab) -> None:
    """Neither does a new one replace it, nor a late answer to an old one wipe it out, as in vmd."""
    lab.ask("syncrtc")
    lab.ask("shutdown")
    lab.write(COMMAND, SYNCRTC)
    assert lab.read(COMMAND) == SHUTDOWN
    lab.ask("syncrtc")
    lab.device.unpause()
    assert lab.read(COMMAND) == SHUTDOWN
    lab.write(COMMAND, SHUTDOWN)
    assert lab.told == ["acknowledged"]


def test_unpause_has_the_guest_look_at_the_clock(lab: VmmciLab) -> None:
    """It stood still meanwhile, and some guests count their own time."""
    lab.device.pause()
    lab.device.unpause()
    assert (lab.interrupts, lab.read(COMMAND)) == (1, SYNCRTC)


@pytest.mark.parametrize(
    ("steps", "asked"),
    [
        ([4.9], 0),  # what vmd tolerates
        ([5.1], 1),
        ([-5.1], 1),  # set back
        ([-3600.0, 3600.0], 2),
        ([3.0, 3.0], 1),  # small steps add up
        ([3.0, -3.0, 3.0], 0),
    ],
)
def test_a_step_of_the_hosts_clock(
    steps: list[float], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than five seconds from where it would be, forwards or back: the guest is to look."""
    offset = 1000.0
    monkeypatch.setattr(clockwatch, "offset", lambda: offset)
    lab = VmmciLab()
    lab.start()
    [clock_was_set] = lab.watched.values()
    for step in steps:
        offset += step
        clock_was_set(1)
    assert lab.interrupts == asked
    assert lab.read(COMMAND) == (SYNCRTC if asked else NONE)


def test_the_clocks_timer_never_wakes_by_itself() -> None:
    """It is armed for the far future: the offset is what it is, and nothing is readable."""
    lab = VmmciLab()
    [fd] = lab.watched
    with pytest.raises(BlockingIOError):
        os.read(fd, 8)
    assert abs(clockwatch.offset() - (time.time() - time.monotonic())) < 1


# Saving.


def test_saved_and_loaded_it_goes_on(lab: VmmciLab) -> None:
    """A process that takes over has the command, the time being read, and the interrupt."""
    lab.ask("shutdown")
    lab.read(SECONDS)
    state = lab.registers.save()
    other = VmmciLab()
    other.now = NOW + 10**12
    other.registers.load(state)
    assert other.read(MICROSECONDS) == 123456
    assert (other.read(ISR, 1), other.read(COMMAND)) == (2, SHUTDOWN)
    other.write(COMMAND, SHUTDOWN)
    assert other.told == ["acknowledged"]


# In its process.


@pytest.fixture
def host() -> Any:
    """A real, jailed device process."""
    with DeviceHost("vmmci", jail="best-effort") as host:
        yield host


def start_driver(host: DeviceHost) -> None:
    """Drive it to DRIVER_OK through the legacy registers."""
    for status in (0, 1, 3):
        host.write(STATUS, 1, status)
    host.write(DRIVER_FEATURES, 4, ALL)
    host.write(STATUS, 1, 7)
    assert host.read(STATUS, 1) == 7


def set_command(host: DeviceHost, word: str) -> Any:
    """Ask through the async channel."""
    return host.ask(ImsgType.SETTING, {"name": "command", "value": word})


def test_in_its_process(host: DeviceHost) -> None:
    """Jailed, it tells the time, is asked, interrupts, and passes the answer on as an EVENT."""
    start_driver(host)
    before = int(time.time())
    assert before <= host.read(SECONDS, 4) <= int(time.time())
    assert set_command(host, "shutdown") == {"value": "asked"}
    assert host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert host.access(ISR, 1) == (2, -1)
    assert host.read(COMMAND, 4) == SHUTDOWN
    host.write(COMMAND, 4, SHUTDOWN)
    imsg = host.async_.receive()
    while imsg.type == ImsgType.LOG:
        imsg = host.async_.receive()
    assert (imsg.type, imsg.data) == (ImsgType.EVENT, b"acknowledged")


def test_the_vm_process_resets_it_by_the_modern_status(host: DeviceHost) -> None:
    """Which no guest can reach: its BAR has the legacy registers alone."""
    start_driver(host)
    host.write(CommonCfg.DEVICE_STATUS, 1, 0)
    assert host.read(STATUS, 1) == 0
    assert set_command(host, "shutdown") == {"value": "no driver"}


def test_pause_and_unpause_in_its_process(host: DeviceHost) -> None:
    """The message of the VM process leads to SYNCRTC."""
    start_driver(host)
    host.ask(ImsgType.PAUSE)
    host.ask(ImsgType.UNPAUSE)
    assert host.wait_call(CONFIG_CHANGE, DEADLINE)
    assert host.read(COMMAND, 4) == SYNCRTC

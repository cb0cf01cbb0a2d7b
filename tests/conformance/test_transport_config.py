"""ISR, configuration space and access widths: virtio 1.2 §2.5, §4.1.3.1, §4.1.4.5, §4.1.4.6."""

from __future__ import annotations

import pytest

from devices.features import F_RING_RESET, F_VERSION_1
from devices.spec import COMMON_LENGTH, Block
from devices.viodev import CONFIG_CHANGE
from devices.virtio import CommonCfg
from tests.registerlab import SIZES, Lab


@pytest.fixture
def lab() -> Lab:
    """A device with its features negotiated."""
    lab = Lab()
    assert lab.negotiate(F_VERSION_1 | F_RING_RESET)
    return lab


# ISR, §4.1.4.5.


def test_reading_isr_clears_it_and_lowers_the_line(lab: Lab) -> None:
    """The device MUST reset ISR to 0 on driver read (§4.1.4.5.1), and the line with it."""
    lab.start()
    lab.call(0)
    lab.config_changed()
    assert lab.isr(peek=True) == 3
    assert lab.registers.read(Block.ISR, 1) == (3, -1)
    assert lab.registers.read(Block.ISR, 1) == (0, -1)


def test_only_the_isr_byte_clears_it(lab: Lab) -> None:
    """Other widths and neighbours are no access to ISR."""
    lab.start()
    lab.call(0)
    for reg, size in ((Block.ISR, 2), (Block.ISR, 4), (Block.ISR + 2, 1), (Block.ISR_PEEK, 2)):
        assert lab.read(reg, size) == 0
    assert lab.isr() == 1


# Configuration space, §2.5 and §4.1.4.6.


def test_configuration_can_be_read_in_any_width_at_any_time() -> None:
    """The device MUST allow it before FEATURES_OK (§2.5.2); fields of any width are read."""
    lab = Lab()
    assert [lab.read_config(offset, 1) for offset in range(16)] == list(range(1, 17))
    assert lab.read_config(2, 2) == 0x0403
    assert lab.read_config(4, 4) == 0x08070605
    assert lab.read_config(8, 8) == 0x100F0E0D0C0B0A09


def test_past_its_end_configuration_reads_0(lab: Lab) -> None:
    """A driver can tell an old device's missing fields by their 0."""
    assert lab.read_config(14, 4) == 0x100F
    assert lab.read_config(16, 4) == 0
    assert lab.read_config(0xCFC, 4) == 0


def test_configuration_writes(lab: Lab) -> None:
    """Writable fields change, and the generation with them; read-only ones do not (§2.5)."""
    generation = lab.read(CommonCfg.CONFIG_GENERATION, 1)
    lab.write_config(4, 4, 0xCAFEF00D)
    assert lab.read_config(4, 4) == 0xCAFEF00D
    assert lab.read(CommonCfg.CONFIG_GENERATION, 1) == generation + 1
    lab.write_config(8, 4, 0)
    lab.write_config(14, 4, 0)
    lab.write_config(0x400, 4, 0)
    assert lab.read_config(8, 8) == 0x100F0E0D0C0B0A09
    assert lab.read(CommonCfg.CONFIG_GENERATION, 1) == generation + 1


def test_a_change_is_announced() -> None:
    """ISR bit 1 and a config interrupt (§4.1.4.5.1)."""
    lab = Lab()
    lab.start()
    lab.config_changed()
    assert lab.interrupts == [CONFIG_CHANGE]
    assert lab.isr() == 2


@pytest.mark.parametrize("changes", [1, 2, 255, 256, 257])
def test_a_generation_shows_torn_reads(changes: int) -> None:
    """What changed between two reads shows as another generation after them (§4.1.4.3.1)."""
    lab = Lab()
    lab.read_config(0, 4)
    before = lab.read(CommonCfg.CONFIG_GENERATION, 1)
    lab.read_config(0, 4)
    for _ in range(changes):
        lab.config_changed()
    lab.read_config(4, 4)
    after = lab.read(CommonCfg.CONFIG_GENERATION, 1)
    assert after != before
    lab.read_config(0, 8)
    assert lab.read(CommonCfg.CONFIG_GENERATION, 1) == after


# Widths, §4.1.3.1.


def test_narrower_reads_give_parts_of_a_field(lab: Lab) -> None:
    """Byte by byte every field reads the same."""
    lab.write(CommonCfg.QUEUE_SELECT, 2, 2)
    lab.write(CommonCfg.QUEUE_DESC, 4, 0x11223344)
    whole = b"".join(lab.read(reg, 1).to_bytes(1, "little") for reg in range(COMMON_LENGTH))
    assert whole[CommonCfg.QUEUE_DESC : CommonCfg.QUEUE_DESC + 4].hex() == "44332211"
    assert lab.read(CommonCfg.QUEUE_DESC + 2, 2) == 0x1122
    assert whole[CommonCfg.NUM_QUEUES] == len(SIZES)
    assert whole[CommonCfg.QUEUE_SIZE] == SIZES[2]


@pytest.mark.parametrize(
    ("reg", "size"),
    [
        (CommonCfg.NUM_QUEUES, 4),  # two fields
        (CommonCfg.DEVICE_FEATURE + 2, 4),
        (CommonCfg.DEVICE_STATUS, 2),
        (CommonCfg.QUEUE_DESC + 6, 4),
        (CommonCfg.QUEUE_RESET, 4),
        (CommonCfg.QUEUE_RESET + 2, 2),  # past the last field
        (COMMON_LENGTH - 1, 4),
        (COMMON_LENGTH, 4),
        (Block.NOTIFY, 2),
        (Block.DEVICE - 1, 1),
    ],
)
def test_no_such_read(lab: Lab, reg: int, size: int) -> None:
    """Accesses across fields or beside them read 0 and are logged."""
    lab.said.clear()
    assert lab.read(reg, size) == 0
    assert "no such access" in lab.said[-1]


@pytest.mark.parametrize(
    ("reg", "size"),
    [
        (CommonCfg.DEVICE_STATUS, 2),
        (CommonCfg.DEVICE_STATUS, 4),
        (CommonCfg.QUEUE_SELECT, 1),
        (CommonCfg.QUEUE_SIZE, 1),
        (CommonCfg.QUEUE_SIZE, 4),
        (CommonCfg.QUEUE_DESC, 2),
        (CommonCfg.QUEUE_DESC + 2, 4),
        (CommonCfg.DRIVER_FEATURE, 2),
        (CommonCfg.DEVICE_FEATURE, 4),  # read-only
        (CommonCfg.NUM_QUEUES, 2),
        (CommonCfg.CONFIG_GENERATION, 1),
        (CommonCfg.QUEUE_NOTIFY_OFF, 2),
        (CommonCfg.QUEUE_NOTIFY_DATA, 2),
        (COMMON_LENGTH - 2, 2),
        (Block.NOTIFY, 4),
        (Block.NOTIFY + 2, 2),
        (Block.ISR, 1),
        (0xFF, 1),
    ],
)
def test_no_such_write(lab: Lab, reg: int, size: int) -> None:
    """Writes of another width, and of read-only registers, change nothing and are logged."""
    before = [lab.read(at, 1) for at in range(COMMON_LENGTH)]
    lab.said.clear()
    lab.write(reg, size, 0x01010101)
    assert "no such access" in lab.said[-1]
    assert [lab.read(at, 1) for at in range(COMMON_LENGTH)] == before

"""What the time and alarm registers of an MC146818 mean: bytes to seconds and back.

A register is BCD or binary, an hour counts to 12 or 24, as register B says. Seconds count from
1970-01-01 UTC. The guest may write any rubbish: every function takes any bytes and never raises.
"""

from __future__ import annotations

import time
from typing import Final

SECONDS: Final = 0x00
SECONDS_ALARM: Final = 0x01
MINUTES: Final = 0x02
MINUTES_ALARM: Final = 0x03
HOURS: Final = 0x04
HOURS_ALARM: Final = 0x05
DAY_OF_WEEK: Final = 0x06  # 1 is Sunday; follows from the date
DAY_OF_MONTH: Final = 0x07
MONTH: Final = 0x08
YEAR: Final = 0x09
REG_B: Final = 0x0B
CENTURY: Final = 0x32

TIME: Final = frozenset((*range(SECONDS, DAY_OF_WEEK, 2), *range(DAY_OF_WEEK, 10), CENTURY))
ALARM: Final = frozenset((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM))

B_BINARY: Final = 0x04
B_24H: Final = 0x02

HOUR_PM: Final = 0x80
ANY: Final = 0xC0  # an alarm byte from here on matches every value


def store(ram: bytearray, seconds: int) -> None:
    """Set the time registers in `ram`."""
    # gmtime takes years far beyond the five digits that load() can make.
    now = time.gmtime(seconds)
    hour, pm = now.tm_hour, 0
    if not ram[REG_B] & B_24H:
        hour, pm = hour % 12 or 12, HOUR_PM if hour >= 12 else 0
    for at, value in (
        (SECONDS, now.tm_sec),
        (MINUTES, now.tm_min),
        (HOURS, hour),
        (DAY_OF_WEEK, (now.tm_wday + 1) % 7 + 1),
        (DAY_OF_MONTH, now.tm_mday),
        (MONTH, now.tm_mon),
        (YEAR, now.tm_year % 100),
        (CENTURY, now.tm_year // 100 % 100),
    ):
        ram[at] = value if ram[REG_B] & B_BINARY else value // 10 << 4 | value % 10
    ram[HOURS] |= pm


def load(ram: bytearray) -> int:
    """Return the time in the registers; a field beyond its range carries into the next."""
    year = _number(ram, ram[CENTURY]) * 100 + _number(ram, ram[YEAR])
    month = min(max(_number(ram, ram[MONTH]), 1), 12)
    days = _days(year, month, _number(ram, ram[DAY_OF_MONTH]))
    minutes = (days * 24 + _hour(ram, ram[HOURS])) * 60 + _number(ram, ram[MINUTES])
    return minutes * 60 + _number(ram, ram[SECONDS])


def next_alarm(ram: bytearray, after: int) -> int | None:
    """Return the first second past `after` that the alarm registers match; None if none can."""
    second = None if ram[SECONDS_ALARM] >= ANY else _number(ram, ram[SECONDS_ALARM])
    minute = None if ram[MINUTES_ALARM] >= ANY else _number(ram, ram[MINUTES_ALARM])
    hour = None if ram[HOURS_ALARM] >= ANY else _hour(ram, ram[HOURS_ALARM])
    if (second or 0) >= 60 or (minute or 0) >= 60 or (hour or 0) >= 24:
        return None
    at = after + 1
    while True:  # a few hundred steps at most, since each field comes round
        if hour not in {None, at // 3600 % 24}:
            at += 3600 - at % 3600
        elif minute not in {None, at // 60 % 60}:
            at += 60 - at % 60
        elif second not in {None, at % 60}:
            at += 1
        else:
            return at


def _number(ram: bytearray, value: int) -> int:
    return value if ram[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)


def _hour(ram: bytearray, value: int) -> int:
    if ram[REG_B] & B_24H:
        return _number(ram, value)
    hour = _number(ram, value & ~HOUR_PM) % 12
    return hour + 12 if value & HOUR_PM else hour


def _days(year: int, month: int, day: int) -> int:
    """Return the days from 1970-01-01 to a Gregorian date; only `month` must be in range."""
    # Count years from March on: then the leap day is the last of its year.
    year, month = (year - 1, month + 9) if month <= 2 else (year, month - 3)
    leap_days = year // 4 - year // 100 + year // 400
    return year * 365 + leap_days + (month * 153 + 2) // 5 + day - 1 - 719468

"""Sizes and rates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.units import (
    MAX_SIZE,
    format_rate,
    format_size,
    format_time,
    parse_rate,
    parse_size,
    parse_time,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0755", 755),
        ("512B", 512),
        ("1K", 1 << 10),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("1.5G", 3 << 29),
        ("0.25K", 256),
        ("3T", 3 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        (" 512 M ", 512 << 20),
    ],
)
def test_parse_size_reads_what_people_write(text: str, size: int) -> None:
    """Units are powers of 1024 in either case, with and without iB; fractions of them are fine."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a size"),
        ("M", "not a size"),
        ("-1", "not a size"),
        ("+1", "not a size"),
        ("1e3", "not a size"),
        ("0x10", "not a size"),
        ("1_000", "not a size"),
        (".5G", "not a size"),
        ("1.G", "not a size"),
        ("1.2.3", "not a size"),
        ("٣M", "not a size"),
        ("9" * 5000, "not a size"),
        ("512X", "unknown unit 'X'"),
        ("512Mi", "unknown unit 'Mi'"),
        ("512MB", "'MB' may mean 1000 or 1024: write M or MiB"),
        ("0.3K", "not a whole number of bytes"),
        ("1.5", "not a whole number of bytes"),
        ("8E", "larger than any size"),
    ],
)
def test_parse_size_says_what_is_wrong(text: str, why: str) -> None:
    """A text that is no size, or not surely one, is refused with the reason."""
    with pytest.raises(ValueError, match=why):
        parse_size(text)


@settings(deadline=None)
@given(st.integers(0, MAX_SIZE))
def test_sizes_survive_the_round_trip(size: int) -> None:
    """parse_size(format_size(n)) is n, for every size."""
    assert parse_size(format_size(size)) == size


@settings(deadline=None)
@given(st.integers(0, 7), st.sampled_from("KMGTPE"))
def test_format_size_uses_the_largest_exact_unit(number: int, unit: str) -> None:
    """What was written with one digit and a unit is shown so; zero has no unit."""
    text = f"{number}{unit}"
    assert format_size(parse_size(text)) == (text if number else "0")


@settings(deadline=None)
@given(st.integers(0, MAX_SIZE))
def test_rates_survive_the_round_trip(rate: int) -> None:
    """parse_rate(format_rate(n)) is n."""
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize("text", ["1M", "1M/m", "/s", "1MB/s", "M/s"])
def test_parse_rate_wants_a_size_per_second(text: str) -> None:
    """A rate without "/s", or without a good size before it, is refused."""
    with pytest.raises(ValueError, match=r"not a|may mean"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("30", 30, "30s"),
        ("1.5", 1.5, "1.5s"),
        ("90s", 90, "90s"),
        ("0.1s", 0.1, "0.1s"),
        ("5m", 300, "5m"),
        ("2h", 7200, "2h"),
        ("120", 120, "2m"),
        ("0", 0, "0s"),
    ],
)
def test_times_are_read_and_shown(text: str, seconds: float, shown: str) -> None:
    """Seconds unless a unit says otherwise; what is shown reads back as the same."""
    assert parse_time(text) == seconds
    assert format_time(seconds) == shown
    assert parse_time(shown) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1e3", "1.2.3", "3 s", "٣", "9" * 30, "inf"])
def test_what_is_no_time(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="not a time"):
        parse_time(text)

"""Bar charts as SVG: groups of horizontal bars with their spread, one chart beside the other."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#1b6ca8", "#b0b7bf", "#8d969f", "#c9a227", "#6b7280", "#a3785f")
BAR, GAP, LABELS, WIDTH, HEAD = 9, 12, 330, 360, 64  # pixels
FONT = "font-family='sans-serif' font-size"


class Chart(NamedTuple):
    """A title, and per group its label and bars: name → value, least, most."""

    title: str
    groups: Sequence[tuple[str, Mapping[str, tuple[float, ...]]]]


def draw(charts: Sequence[Chart]) -> str:
    """Return the SVG file; all charts have the same groups."""
    names = list(dict.fromkeys(name for _, bars in charts[0].groups for name in bars))
    heights = [len(bars) * BAR + GAP for _, bars in charts[0].groups]
    width, height = LABELS + len(charts) * (WIDTH + 30), HEAD + sum(heights) + 24
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'"
        f" viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *_legend(names),
    ]
    at = HEAD
    for (label, bars), room in zip(charts[0].groups, heights, strict=True):
        middle = at + len(bars) * BAR / 2 + 4
        parts.append(_text(LABELS - 10, middle, label, size=12, anchor="end"))
        at += room
    for index, chart in enumerate(charts):
        parts += _chart(chart, names, LABELS + index * (WIDTH + 30), heights)
    return "\n".join([*parts, "</svg>", ""])


def _chart(chart: Chart, names: Sequence[str], left: float, heights: Sequence[int]) -> list[str]:
    most = max(value for _, bars in chart.groups for bar in bars.values() for value in bar)
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 25, 50, 100) if most / step <= 8)
    scale = WIDTH / (-(-most // step) * step)
    bottom = HEAD + sum(heights)
    parts = [_text(left, HEAD - 22, chart.title, size=13, weight="bold")]
    for tick in range(int(-(-most // step)) + 1):
        x = left + tick * step * scale
        parts.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{HEAD - 4}' y2='{bottom}' stroke='#ddd'/>"
        )
        parts.append(_text(x, HEAD - 8, f"{tick * step:g}", size=10, anchor="middle"))
    at = float(HEAD)
    for (_, bars), room in zip(chart.groups, heights, strict=True):
        for place, (name, (value, least, highest)) in enumerate(bars.items()):
            y, colour = at + place * BAR, COLOURS[names.index(name) % len(COLOURS)]
            middle = y + (BAR - 2) / 2
            parts += [
                f"<rect x='{left}' y='{y:.1f}' width='{value * scale:.1f}' height='{BAR - 2}'"
                f" fill='{colour}'/>",
                f"<line x1='{left + least * scale:.1f}' x2='{left + highest * scale:.1f}'"
                f" y1='{middle:.1f}' y2='{middle:.1f}' stroke='black' stroke-opacity='0.55'/>",
            ]
        at += room
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], 10.0
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f"<rect x='{x}' y='8' width='12' height='12' fill='{colour}'/>")
        parts.append(_text(x + 17, 18, name, size=12))
        x += 34 + 7.2 * len(name)
    return parts


def _text(
    x: float, y: float, words: str, *, size: int, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT}='{size}' text-anchor='{anchor}'"
        f" font-weight='{weight}'>{escape(words)}</text>"
    )

"""Draws speed per user against total speed, as SVG for a page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 20, 52
_COLOURS = ("#0b6fb8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#4b5563", "#a16207", "#0e7490")
_TICKS = 5


class Point(NamedTuple):
    """Holds one run: output tokens per second, and its label.

    ``per_user`` is the rate of one user, ``total`` that of all.
    """

    per_user: float
    total: float
    label: str


class Line(NamedTuple):
    """Holds the runs of one mode, in any order."""

    name: str
    points: Sequence[Point]


class _Scale(NamedTuple):
    """Maps values from 0 to ``most`` to a length in pixels."""

    most: float
    length: float

    def at(self, value: float) -> float:
        return self.length * value / self.most


def pareto_svg(lines: Sequence[Line]) -> str:
    """Return a scatter plot with a line for each mode.

    Args:
        lines: Modes; an empty sequence gives empty axes.
    """
    points = [point for line in lines for point in line.points]
    x = _Scale(_most(point.per_user for point in points), _WIDTH - _LEFT - _RIGHT)
    y = _Scale(_most(point.total for point in points), _HEIGHT - _TOP - _BOTTOM)
    parts = [*_axes(x, y), *(part for n, line in enumerate(lines) for part in _line(n, line, x, y))]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Output tokens per second per user against total output tokens per second">'
        f"{''.join(parts)}</svg>"
    )


def nice_step(most: float, count: int = _TICKS) -> float:
    """Return a round step that needs at most ``count`` steps.

    It is the least of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        most: Value to reach, above 0.
        count: Most steps.
    """
    power = 10.0 ** math.floor(math.log10(most / count))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power * count >= most * (1 - 1e-9))


def _most(values: Iterable[float]) -> float:
    most = max((value for value in values if value > 0), default=1.0)
    step = nice_step(most)
    return step * math.ceil(most / step - 1e-9)


def _axes(x: _Scale, y: _Scale) -> Iterator[str]:
    left, bottom = _LEFT, _HEIGHT - _BOTTOM
    for value in _ticks(x.most):
        place = left + x.at(value)
        yield f'<path class="grid" d="M{place:.1f} {_TOP}V{bottom}"/>'
        yield _text(place, bottom + 18, f"{value:g}", "middle")
    for value in _ticks(y.most):
        place = bottom - y.at(value)
        yield f'<path class="grid" d="M{left} {place:.1f}H{left + x.length:.1f}"/>'
        yield _text(left - 8, place + 4, f"{value:g}", "end")
    yield _text(left + x.length / 2, _HEIGHT - 8, "output tokens/s per user", "middle")
    middle = _TOP + y.length / 2
    yield (
        f'<text x="16" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.1f})">output tokens/s in all</text>'
    )


def _ticks(most: float) -> list[float]:
    step = nice_step(most)
    return [step * n for n in range(round(most / step) + 1)]


def _line(number: int, line: Line, x: _Scale, y: _Scale) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = "" if number < len(_COLOURS) else ' stroke-dasharray="5 3"'
    places = [
        (_LEFT + x.at(point.per_user), _HEIGHT - _BOTTOM - y.at(point.total), point)
        for point in sorted(line.points)
    ]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)
    yield f'<polyline fill="none" stroke="{colour}" stroke-width="1.5"{dash} points="{path}"/>'
    for a, b, point in places:
        title = f"{line.name}, {point.label}: {point.per_user:.1f} per user, {point.total:.1f}"
        yield f"<g><title>{html.escape(title)}</title>{_marker(number, a, b, colour)}</g>"
        yield _text(a + 7, b - 6, point.label, "start", "label")
    top = _TOP + 12 + 20 * number
    yield _marker(number, _WIDTH - _RIGHT + 16, top - 4, colour)
    yield _text(_WIDTH - _RIGHT + 28, top, line.name, "start")


def _marker(number: int, a: float, b: float, colour: str) -> str:
    """Draw one of four shapes, so that colour is not all."""
    shapes = (
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5"',
        f'<rect x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"',
        f'<path d="M{a:.1f} {b - 5.5:.1f}l5 9.5h-10z"',
        f'<path d="M{a:.1f} {b - 6:.1f}l6 6l-6 6l-6 -6z"',
    )
    return f'{shapes[number % len(shapes)]} fill="{colour}"/>'


def _text(a: float, b: float, text: str, anchor: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    shown = html.escape(text)
    return f'<text{attribute} x="{a:.1f}" y="{b:.1f}" text-anchor="{anchor}">{shown}</text>'

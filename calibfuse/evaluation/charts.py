"""Charts as inline SVG: the curve of toxicity against perplexity, and bars by group. No plotting library, no script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calibfuse.evaluation.metrics import Estimate

_COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#aa5533", "#666666")
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 52


@dataclass(frozen=True)
class Point:
    """A point of a curve with intervals in both directions.

    Attributes:
        label: beside the point.
        x: figure with interval.
        y: figure with interval.
    """

    label: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`

    def place(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)


def curves(families: Mapping[str, Sequence[Point]], *, x_title: str, y_title: str) -> str:
    """Points joined by lines, one curve per family, with error bars.

    Args:
        families: name -> points in the order of their strength; a family of one point is a mark.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.

    Returns:
        An SVG element; empty where no point is finite.
    """
    kept = {name: [point for point in points if _is_finite(point)] for name, points in families.items()}
    kept = {name: points for name, points in kept.items() if points}
    everything = [point for points in kept.values() for point in points]
    if not everything:
        return ""
    x = _axis([point.x for point in everything], _LEFT, _WIDTH - _RIGHT, from_zero=False)
    y = _axis([point.y for point in everything], _HEIGHT - _BOTTOM, _TOP, from_zero=True)
    parts = [*_grid(x, y), _text(_WIDTH / 2, _HEIGHT - 8, x_title, "middle"), _vertical(y_title)]
    for number, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x.place(point.x.value), y.place(point.y.value)) for point in points]
        if len(places) > 1:
            line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point, (left, top) in zip(points, places, strict=True):
            parts += _error_bars(point, left, top, x, y, colour)
            title = f"{name}, {point.label}: {point.x.value:.4g}, {point.y.value:.4g}"
            parts.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4.5" fill="{colour}"><title>{html.escape(title)}</title>'
                "</circle>"
            )
            parts.append(_text(left + 7, top - 6, point.label, "start", size=11))
    return _svg(parts, _HEIGHT) + _legend(list(kept))


def bars(rows: Mapping[str, Mapping[str, Estimate]], *, title: str, reference: float | None = None) -> str:
    """Horizontal bars, grouped.

    Args:
        rows: row -> series -> figure with interval (nan ends: no interval is drawn).
        title: of the axis.
        reference: where a line is drawn.

    Returns:
        An SVG element; empty without rows.
    """
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    values = [each for row in rows.values() for each in row.values() if math.isfinite(each.value)]
    if not values:
        return ""
    height_of_bar, left = 11, 200
    row_height = height_of_bar * len(series) + 8
    bottom = _TOP + row_height * len(rows)
    ends = [each.high if math.isfinite(each.high) else each.value for each in values]
    axis = _Axis(0.0, max([*ends, reference or 0.0, 1e-9]) * 1.05, left, _WIDTH - _RIGHT)
    parts = []
    for tick in _ticks(axis.low, axis.high):
        place = axis.place(tick)
        parts.append(f'<line x1="{place:.1f}" y1="{_TOP}" x2="{place:.1f}" y2="{bottom}" class="grid"/>')
        parts.append(_text(place, bottom + 16, f"{tick:g}", "middle", size=11))
    for number, (row, figures) in enumerate(rows.items()):
        top = _TOP + number * row_height
        parts.append(_text(left - 8, top + row_height / 2, row, "end", size=12))
        for which, name in enumerate(series):
            each = figures.get(name)
            if each is None or not math.isfinite(each.value):
                continue
            y = top + which * height_of_bar
            width = axis.place(each.value) - left
            colour = _COLOURS[which % len(_COLOURS)]
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height_of_bar - 2}" '
                f'fill="{colour}">'
                f"<title>{html.escape(f'{row}, {name}: {each.value:.4g}')}</title></rect>"
            )
            if math.isfinite(each.low) and math.isfinite(each.high):
                middle = y + (height_of_bar - 2) / 2
                parts.append(_line(axis.place(each.low), middle, axis.place(each.high), middle, "#8888"))
    if reference is not None:
        parts.append(_line(axis.place(reference), _TOP, axis.place(reference), bottom, "currentColor"))
    parts.append(_text((left + _WIDTH) / 2, bottom + 36, title, "middle"))
    return _svg(parts, bottom + 46) + _legend(series)


def _is_finite(point: Point) -> bool:
    return math.isfinite(point.x.value) and math.isfinite(point.y.value)


def _axis(figures: Sequence[Estimate], start: float, end: float, *, from_zero: bool) -> _Axis:
    """An axis that holds the values; long intervals may leave it."""
    values = [each.value for each in figures]
    low, high = min(values), max(values)
    ends = [value for each in figures for value in (each.low, each.high) if math.isfinite(value)]
    room = max(high - low, 0.05 * abs(high), 1e-9)
    low = max(min([low, *ends]), low - room) - 0.05 * room
    high = min(max([high, *ends]), high + room) + 0.05 * room
    return _Axis(0.0 if from_zero else low, high, start, end)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about six of them."""
    raw = (high - low) / 6.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1.0, 2.0, 5.0, 10.0) if factor * unit >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for tick in _ticks(x.low, x.high):
        place = x.place(tick)
        parts.append(f'<line x1="{place:.1f}" y1="{y.end}" x2="{place:.1f}" y2="{y.start}" class="grid"/>')
        parts.append(_text(place, y.start + 16, f"{tick:g}", "middle", size=11))
    for tick in _ticks(y.low, y.high):
        place = y.place(tick)
        parts.append(f'<line x1="{x.start}" y1="{place:.1f}" x2="{x.end}" y2="{place:.1f}" class="grid"/>')
        parts.append(_text(x.start - 6, place + 4, f"{tick:g}", "end", size=11))
    return parts


def _error_bars(point: Point, left: float, top: float, x: _Axis, y: _Axis, colour: str) -> list[str]:
    parts = []
    if math.isfinite(point.x.low) and math.isfinite(point.x.high):
        parts.append(_line(x.place(point.x.low), top, x.place(point.x.high), top, f"{colour}66"))
    if math.isfinite(point.y.low) and math.isfinite(point.y.high):
        parts.append(_line(left, y.place(point.y.low), left, y.place(point.y.high), f"{colour}66"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str, *, size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'


def _vertical(text: str) -> str:
    place = f"translate(16 {(_HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)"
    return f'<text transform="{place}" text-anchor="middle" font-size="13">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" class="chart">{inner}</svg>'


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span><i style="background:{_COLOURS[number % len(_COLOURS)]}"></i>{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'

"""Charts as SVG: the curve of toxicity against perplexity, and bars by group. No plotting library, no script.

Inside a page the colours come from the page's style sheet (`CHART_STYLE`), so they follow light and dark; `standalone`
makes a file of its own that carries the style with it. A number in `colours` is one colour (and, on a curve, one shape
of its marks) wherever it is used, so that a page shows a method in the same colour throughout.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_LIGHT = (
    *("#0b6bcb", "#d1480f", "#0a8754", "#8a3ffc", "#b8860b"),
    *("#c2185b", "#00838f", "#6d4c41", "#5c6bc0", "#6b7280"),
)
_DARK = (
    *("#5aa9ff", "#ff9166", "#4fd6a0", "#bd9bff", "#f2c14e"),
    *("#ff80ab", "#4dd0e1", "#c8a391", "#9fa8ff", "#a8b0bd"),
)
_SHAPES = (  # outlines of marks around (0, 0)
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6L5.5 4.2H-5.5z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
    "M0 6L5.5 -4.2H-5.5z",
)
_RING = "M-6.5 0a6.5 6.5 0 1 0 13 0a6.5 6.5 0 1 0 -13 0z"
_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 20, 52
_BAR, _BAR_LABELS = 11, 200
_LEGEND_ROW, _LEGEND_COLUMNS = 20, 4
_LOG_FROM = 3.0  # largest over smallest value from which on a horizontal axis is logarithmic
_MANY = 4  # curves; the intervals of more are drawn fainter
_LABEL_SIZE = 12
_LABEL_PLACES = (  # anchor of the text, and its distance from the point, best first
    *(("start", 9, -6), ("start", 9, 14), ("end", -9, -6), ("end", -9, 14)),
    *(("start", 11, 4), ("end", -11, 4), ("middle", 0, -10), ("middle", 0, 19)),
)


def _palette(colours: Sequence[str], text: str, surface: str) -> str:
    return " ".join(
        [
            *(f"--c{number}: {colour};" for number, colour in enumerate(colours)),
            f"--ink: {text};",
            f"--paper: {surface};",
        ]
    )


CHART_STYLE = (
    f":root {{ {_palette(_LIGHT, '#1c2430', '#ffffff')} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK, '#e4e8ee', '#161b22')} }} }}\n"
    ".chart text { fill: var(--ink); font-family: system-ui, -apple-system, 'Segoe UI', sans-serif; }\n"
    ".chart .grid { stroke: var(--ink); stroke-opacity: .13; }\n"
    ".chart .axis { stroke: var(--ink); stroke-opacity: .5; }\n"
    ".chart .dot { stroke: var(--paper); stroke-width: 1.2; } .chart .tick { opacity: .8; }\n"
    ".chart .label { paint-order: stroke; stroke: var(--paper); stroke-width: 3.5px; stroke-linejoin: round; }\n"
    ".chart .origin { fill: var(--paper); stroke: var(--ink); stroke-width: 2.5; }\n"
    ".chart .fp, .legend .fp { fill: var(--ink); background: var(--ink); }\n"
    + "\n".join(
        f".chart .f{number}, .legend .f{number} {{ fill: var(--c{number}); background: var(--c{number}); }} "
        f".chart .s{number} {{ stroke: var(--c{number}); fill: none; }} "
        f".chart .t{number} {{ fill: color-mix(in srgb, var(--c{number}) 65%, var(--ink)); }}"
        for number in range(len(_LIGHT))
    )
)
"""Style sheet of the charts; a page that shows them includes it once."""


class Estimate(Protocol):
    """A figure with its interval; nan ends: there is none."""

    @property
    def value(self) -> float:
        """The figure."""

    @property
    def low(self) -> float:
        """Lower end."""

    @property
    def high(self) -> float:
        """Upper end."""


@dataclass(frozen=True)
class Point:
    """A point of a curve with intervals in both directions.

    Attributes:
        label: beside the point, where there is room.
        x: figure with interval.
        y: figure with interval.
    """

    label: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Curve:
    """Points in the order of their strength; a single one is a mark.

    Attributes:
        points: at least one.
        from_origin: whether the line begins at the chart's origin.
    """

    points: Sequence[Point]
    from_origin: bool = False


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    is_log: bool = False

    def place(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        low, high, inside = (math.log(each) if self.is_log else each for each in (self.low, self.high, inside))
        return self.start + (inside - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True)
class _Label:
    text: str
    left: float  # of the point that it belongs to
    top: float
    colour: str = ""


def curves(
    families: Mapping[str, Curve],
    *,
    x_title: str,
    y_title: str,
    origin: Point | None = None,
    y_is_share: bool = False,
    standalone: bool = False,
) -> str:
    """Points joined by lines, one curve per family, with intervals.

    Args:
        families: name -> curve; colours and marks go by their order.
        x_title: of the horizontal axis, which is logarithmic where the values differ by a factor of 3 or more.
        y_title: of the vertical axis, which begins at 0.
        origin: what the curves are compared with; None: nothing.
        y_is_share: show the vertical axis in per cent.
        standalone: a file of its own, with style, background and legend; else an element of a page, legend below.

    Returns:
        Markup; empty where no point is finite.
    """
    if origin is not None and not _is_finite(origin):
        origin = None
    colours = {name: number for number, name in enumerate(families)}
    kept = {name: [point for point in curve.points if _is_finite(point)] for name, curve in families.items()}
    kept = {name: points for name, points in kept.items() if points}
    everything = [*(point for points in kept.values() for point in points), *([origin] if origin else [])]
    if not everything:
        return ""
    x = _axis([point.x for point in everything], _LEFT, _WIDTH - _RIGHT, may_be_log=True)
    y = _axis([point.y for point in everything], _HEIGHT - _BOTTOM, _TOP, from_zero=True)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    x_title += ", logarithmic" if x.is_log else ""
    parts = [*_grid(x, y, y_is_share=y_is_share), _text(middle, _HEIGHT - 10, x_title, "middle"), _vertical(y_title)]
    marks: list[str] = []
    opacity = 0.4 if len(kept) <= _MANY else 0.18
    labels: list[_Label] = []
    for name, points in kept.items():
        number = colours[name]
        places = [(x.place(point.x.value), y.place(point.y.value)) for point in points]
        parts += [_error_bars(point, x, y, f"s{number % len(_LIGHT)}", opacity) for point in points]
        start = [(x.place(origin.x.value), y.place(origin.y.value))] if origin and families[name].from_origin else []
        parts.append(_polyline([*start, *places], number))
        for point, (left, top) in zip(points, places, strict=True):
            marks.append(_mark(left, top, number, _tooltip(name, point)))
        # the ends of a curve say most, so their labels get their places first
        ends = [0, len(points) - 1] if len(points) > 1 else [0]
        for rank in [*reversed(ends), *range(1, len(points) - 1)]:
            left, top = places[rank]
            labels.append(_Label(points[rank].label, left, top, f"t{number % len(_LIGHT)}"))
    boxes = [_Box(left - 5, top - 5, left + 5, top + 5) for left, top in _places(kept, x, y)]
    if origin is not None:
        left, top = x.place(origin.x.value), y.place(origin.y.value)
        parts.append(_error_bars(origin, x, y, "axis", opacity))
        marks.insert(0, _shape(_RING, left, top, "origin", _tooltip(origin.label, origin)))
        labels.insert(0, _Label(origin.label, left, top))
        boxes.append(_Box(left - 7, top - 7, left + 7, top + 7))
    parts += [*marks, *_labels(labels, boxes)]
    title = f"{y_title} against {x_title}"
    if not standalone:
        return _svg(parts, _HEIGHT, title) + _legend({name: colours[name] for name in kept}, with_marks=True)
    rows = math.ceil(len(kept) / _LEGEND_COLUMNS)
    parts += _inner_legend({name: colours[name] for name in kept}, _HEIGHT + 10)
    bottom = _HEIGHT + 16 + rows * _LEGEND_ROW
    note = "Down and to the left is better. Numbers: strengths. Thin lines: 95 % intervals."
    parts.append(_text(_LEFT - 5, bottom + 6, note, "start", size=_LABEL_SIZE, kind="tick"))
    return _file(parts, bottom + 20, title)


def bars(
    rows: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    reference: float | None = None,
    is_share: bool = False,
    colours: Mapping[str, int | None] | None = None,
) -> str:
    """Horizontal bars, grouped.

    Args:
        rows: row -> series -> figure with interval (nan ends: no interval is drawn).
        title: of the axis.
        reference: where a line is drawn.
        is_share: show the axis in per cent.
        colours: of the series, None is that of text; by default in their order.

    Returns:
        A legend and an SVG element; empty without rows.
    """
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    chosen = {name: (colours or {}).get(name, place) for place, name in enumerate(series)}
    values = [each for row in rows.values() for each in row.values() if math.isfinite(each.value)]
    if not values:
        return ""
    left = _BAR_LABELS
    row_height = _BAR * len(series) + 10
    bottom = _TOP + row_height * len(rows)
    ends = [each.high if math.isfinite(each.high) else each.value for each in values]
    axis = _Axis(0.0, max([*ends, reference or 0.0, 1e-9]) * 1.05, left, _WIDTH - _RIGHT)
    parts = []
    for tick in axis.ticks():
        place = axis.place(tick)
        parts.append(f'<line x1="{place:.1f}" y1="{_TOP}" x2="{place:.1f}" y2="{bottom}" class="grid"/>')
        shown = _shown(tick, is_share=is_share)
        parts.append(_text(place, bottom + 16, shown, "middle", size=_LABEL_SIZE, kind="tick"))
    for number, (row, figures) in enumerate(rows.items()):
        top = _TOP + number * row_height
        label = _shortened(row.replace("_", " "), 30)
        parts.append(_text(left - 8, top + (row_height - 10) / 2 + 4, label, "end", size=_LABEL_SIZE))
        for which, name in enumerate(series):
            each = figures.get(name)
            if each is not None and math.isfinite(each.value):
                parts += _bar(each, axis, top + which * _BAR, _fill(chosen[name]), f"{row}, {name}: {each.value:.4g}")
    if reference is not None:
        parts.append(_line(axis.place(reference), _TOP, axis.place(reference), bottom, "axis"))
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, bottom + 38, title, "middle"))
    return _legend(chosen, with_marks=False) + _svg(parts, bottom + 48, title)  # a long chart is read with its key


def _bar(each: Estimate, axis: _Axis, top: float, fill: str, title: str) -> list[str]:
    width = axis.place(each.value) - axis.start
    parts = [
        f'<rect x="{axis.start:g}" y="{top:.1f}" width="{max(width, 0.5):.1f}" height="{_BAR - 2}" rx="1.5" '
        f'class="{fill}"><title>{html.escape(title)}</title></rect>'
    ]
    if math.isfinite(each.low) and math.isfinite(each.high):
        middle = top + (_BAR - 2) / 2
        parts.append(_line(axis.place(each.low), middle, axis.place(each.high), middle, "axis"))
    return parts


def _is_finite(point: Point) -> bool:
    return math.isfinite(point.x.value) and math.isfinite(point.y.value)


def _axis(
    figures: Sequence[Estimate], start: float, end: float, *, from_zero: bool = False, may_be_log: bool = False
) -> _Axis:
    """An axis that holds the values; long intervals may leave it."""
    values = [each.value for each in figures]
    ends = [value for each in figures for value in (each.low, each.high) if math.isfinite(value)]
    is_log = may_be_log and min([*values, *ends]) > 0.0 and max(values) >= _LOG_FROM * min(values)
    if is_log:
        values, ends = [math.log(value) for value in values], [math.log(value) for value in ends]
    low, high = min(values), max(values)
    room = max(high - low, 0.05 * abs(high), 1e-9)
    if is_log:
        room = min(room, 0.4)  # a ruined perplexity needs no precision
    low = max(min([low, *ends]), low - room) - 0.05 * (high - low + room)
    high = min(max([high, *ends]), high + room) + 0.05 * (high - low + room)
    if is_log:
        return _Axis(math.exp(low), math.exp(high), start, end, is_log=True)
    return _Axis(0.0 if from_zero else low, high, start, end)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about six of them."""
    raw = (high - low) / 6.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1.0, 2.0, 5.0, 10.0) if factor * unit >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten; of a short axis also the numbers between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) > 4:
            break
    return found


def _shown(value: float, *, is_share: bool) -> str:
    return f"{100 * value:g} %" if is_share else f"{value:g}"


def _grid(x: _Axis, y: _Axis, *, y_is_share: bool) -> list[str]:
    parts = []
    for tick in x.ticks():
        place = x.place(tick)
        parts.append(f'<line x1="{place:.1f}" y1="{y.end}" x2="{place:.1f}" y2="{y.start}" class="grid"/>')
        parts.append(_text(place, y.start + 17, f"{tick:g}", "middle", size=_LABEL_SIZE, kind="tick"))
    for tick in y.ticks():
        place = y.place(tick)
        parts.append(f'<line x1="{x.start}" y1="{place:.1f}" x2="{x.end}" y2="{place:.1f}" class="grid"/>')
        shown = _shown(tick, is_share=y_is_share)
        parts.append(_text(x.start - 7, place + 4, shown, "end", size=_LABEL_SIZE, kind="tick"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    return parts


def _places(kept: Mapping[str, Sequence[Point]], x: _Axis, y: _Axis) -> list[tuple[float, float]]:
    return [(x.place(point.x.value), y.place(point.y.value)) for points in kept.values() for point in points]


def _labels(labels: Sequence[_Label], taken: Sequence[_Box]) -> list[str]:
    """Texts beside their points where they cover neither a mark nor each other; those without room are left out."""
    parts = []
    boxes = list(taken)
    for label in labels:
        width, height = 0.62 * _LABEL_SIZE * len(label.text), 0.8 * _LABEL_SIZE
        for anchor, across, down in _LABEL_PLACES if label.text else ():
            x, y = label.left + across, label.top + down
            start = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = _Box(start - 3, y - height, start + width + 3, y)
            is_inside = _LEFT < box.left and box.right < _WIDTH - 4 and 0 < box.top and box.bottom < _HEIGHT - _BOTTOM
            if is_inside and not any(box.overlaps(other) for other in boxes):
                boxes.append(box)
                parts.append(_text(x, y, label.text, anchor, size=_LABEL_SIZE, kind=f"label {label.colour}".rstrip()))
                break
    return parts


def _polyline(places: Sequence[tuple[float, float]], number: int) -> str:
    if len(places) < 2:
        return ""
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    dashes = ' stroke-dasharray="6 4"' if number >= len(_LIGHT) else ""  # a second round of the colours
    return f'<polyline points="{line}" class="s{number % len(_LIGHT)}" stroke-width="2"{dashes}/>'


def _error_bars(point: Point, x: _Axis, y: _Axis, kind: str, opacity: float) -> str:
    left, top = x.place(point.x.value), y.place(point.y.value)
    parts = []
    if math.isfinite(point.x.low) and math.isfinite(point.x.high):
        parts.append(_line(x.place(point.x.low), top, x.place(point.x.high), top, kind, opacity))
    if math.isfinite(point.y.low) and math.isfinite(point.y.high):
        parts.append(_line(left, y.place(point.y.low), left, y.place(point.y.high), kind, opacity))
    return "".join(parts)


def _tooltip(name: str, point: Point) -> str:
    strength = f", {point.label}" if point.label and point.label != name else ""
    return f"{name}{strength}: {point.x.value:.4g}, {point.y.value:.4g}"


def _mark(left: float, top: float, number: int, title: str = "") -> str:
    shape = _SHAPES[(number + number // len(_LIGHT)) % len(_SHAPES)]
    return _shape(shape, left, top, f"dot {_fill(number)}", title)


def _shape(outline: str, left: float, top: float, kind: str, title: str) -> str:
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<path d="{outline}" transform="translate({left:.1f} {top:.1f})" class="{kind}">{inner}</path>'


def _fill(number: int | None) -> str:
    return "fp" if number is None else f"f{number % len(_LIGHT)}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, opacity: float | None = None) -> str:
    faint = "" if opacity is None else f' style="stroke-opacity: {opacity:g}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="1.3" class="{kind}"{faint}/>'


def _text(x: float, y: float, text: str, anchor: str, *, size: int = 13, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{name}>{html.escape(text)}</text>'


def _vertical(text: str) -> str:
    place = f"translate(16 {(_HEIGHT - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)"
    return f'<text transform="{place}" text-anchor="middle" font-size="13">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    inner = "".join(parts)
    return (
        f'<div class="wide" tabindex="0"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(label)}" class="chart">{inner}</svg></div>'
    )


def _file(parts: Sequence[str], height: float, label: str) -> str:
    """A file of its own."""
    inner = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}" class="chart">'
        f'<style>{CHART_STYLE}</style><rect width="{_WIDTH}" height="{height:.0f}" rx="6" '
        f'style="fill: var(--paper)"/>\n{inner}\n</svg>\n'
    )


def _inner_legend(colours: Mapping[str, int], top: float) -> list[str]:
    parts = []
    width = (_WIDTH - _LEFT - _RIGHT) / _LEGEND_COLUMNS
    for place, (name, number) in enumerate(colours.items()):
        row, column = divmod(place, _LEGEND_COLUMNS)
        left, y = _LEFT + column * width, top + row * _LEGEND_ROW
        parts.append(_mark(left, y, number))
        parts.append(_text(left + 12, y + 4, _shortened(name, 22), "start", size=13))
    return parts


def _legend(colours: Mapping[str, int | None], *, with_marks: bool) -> str:
    items = []
    for name, number in colours.items():
        if with_marks and number is not None:
            key = f'<svg viewBox="-8 -8 16 16" class="chart key">{_mark(0, 0, number)}</svg>'
        else:
            key = f'<i class="{_fill(number)}"></i>'
        items.append(f"<span>{key}{html.escape(name)}</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"

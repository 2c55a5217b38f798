"""Charts drawn by matplotlib: parts of a page that follow light and dark, and files of their own.

A chart is drawn in the light palette; in SVG each of its colours then becomes a variable of the style sheet
(`CHART_STYLE`). A page holds every chart twice, for wide and for narrow screens, since text inside a picture shrinks
with it. Matplotlib comes with the extra `eval` and is imported when a chart is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import numpy as np

from calibfuse.errors import InputError
from calibfuse.html import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

LIGHT = (
    *("#0b6bcb", "#d1480f", "#0a8754", "#8a3ffc", "#b8860b"),
    *("#c2185b", "#00838f", "#6d4c41", "#5c6bc0", "#6b7280"),
)
_DARK = (
    *("#5aa9ff", "#ff9166", "#4fd6a0", "#bd9bff", "#f2c14e"),
    *("#ff80ab", "#4dd0e1", "#c8a391", "#9fa8ff", "#a8b0bd"),
)
_INK, _PAPER = "#1c2430", "#fefefe"
_TIP = "tip: "
_MARKS = "osD^v"
_WIDE, _NARROW = 7.6, 3.9  # inches; a page scales them to its width
_LOG_FROM = 3.0  # largest over smallest value from which on a horizontal axis is logarithmic
_SMOOTH_FROM = 60  # records from which on a running mean is drawn over a training curve
_SPACE = "http://www.w3.org/2000/svg"
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
_SETTINGS: dict[Any, Any] = {
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    **{"axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.facecolor": "none", "figure.facecolor": "none"},
    **{"grid.alpha": 0.15, "axes.grid": True, "axes.axisbelow": True, "font.size": 9.5, "legend.frameon": False},
    **{
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "figure.dpi": 72.0,
        "text.parse_math": False,
    },
}
_LABEL_PLACES = (  # offset from the point and alignment, best first
    *((7, 5, "left"), (7, -12, "left"), (-7, 5, "right"), (-7, -12, "right")),
    *((9, -3, "left"), (-9, -3, "right"), (0, 9, "center"), (0, -17, "center")),
)


def _palette(colours: Sequence[str], ink: str, paper: str) -> str:
    variables = [*(f"--c{number}: {colour};" for number, colour in enumerate(colours)), f"--ink: {ink};"]
    return " ".join([*variables, f"--paper: {paper};"])


CHART_STYLE = (
    f":root {{ {_palette(LIGHT, _INK, _PAPER)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK, '#e4e8ee', '#161b22')} }} }}\n"
    ".chart * { stroke-linejoin: round; stroke-linecap: butt; }\n"
    ".chart .label text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }\n"
)
"""Style sheet of the charts, with the colours of a page's text and paper; a page includes it once."""


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
        is_default: marked by a ring.
    """

    label: str
    x: Estimate
    y: Estimate
    is_default: bool = False


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
class Chart:
    """What can be drawn at any width.

    Attributes:
        title: what it shows, for those who cannot see it.
        draw: width in inches -> the figure. What is shown where the mouse rests is the gid of its artists, after _TIP.
    """

    title: str
    draw: Callable[[float], Figure]

    def markup(self) -> str:
        """Two SVG elements of a page, of which its style sheet shows the one that fits."""
        return "".join(
            _svg(self.draw(width), self.title, kind) for kind, width in (("broad", _WIDE), ("slim", _NARROW))
        )

    def svg(self) -> str:
        """An SVG file of its own, light and dark."""
        return _svg(self.draw(_WIDE), self.title, "file")

    def save(self, path: str | Path) -> None:
        """Write an .svg or, in light colours, a .png."""
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        elif path.suffix == ".png":
            self.draw(_WIDE).savefig(path, dpi=144, facecolor=_PAPER)
        else:
            raise InputError(f"A chart is saved as .svg or .png, got {path.name!r}.")


def curves(
    families: Mapping[str, Curve],
    *,
    x_title: str,
    y_title: str,
    origin: Point | None = None,
    y_is_share: bool = False,
) -> Chart | None:
    """Points joined by lines, one curve per family, with intervals: toxicity against fluency at several strengths.

    Args:
        families: name -> curve; colours and marks go by their order.
        x_title: of the horizontal axis, which is logarithmic where the values differ by a factor of 3 or more.
        y_title: of the vertical axis, which begins at 0.
        origin: what the curves are compared with; None: nothing.
        y_is_share: show the vertical axis in per cent.

    Returns:
        The chart, whose drawing raises MissingDependencyError without matplotlib; None where no point is finite.
    """
    origin = origin if origin is not None and _is_finite(origin) else None
    kept = {name: [point for point in curve.points if _is_finite(point)] for name, curve in families.items()}
    everything = [*([origin] if origin else []), *(point for points in kept.values() for point in points)]
    faint = 0.45 if sum(map(bool, kept.values())) <= 4 else 0.2  # intervals of many curves

    def draw(width: float) -> Figure:
        height = (width * 0.5 if width > 5 else width * 0.75) + _legend_height(list(kept), width)
        with _drawing(width, height) as (figure, axes):
            for number, (name, points) in enumerate(kept.items()):
                if points:
                    start = [origin] if origin is not None and families[name].from_origin else []
                    _draw_curve(axes, name, number, [*start, *points], skipped=len(start), faint=faint)
            if origin is not None:
                _draw_intervals(axes, origin, _INK, 0.6)
                ring = {"marker": "o", "markersize": 9, "color": _PAPER, "markeredgecolor": _INK, "markeredgewidth": 2}
                _draw_mark(axes, origin, _tooltip(origin.label, origin), **ring)
            _finish_axes(axes, everything, y_is_share=y_is_share)
            axes.set_xlabel(x_title + (", logarithmic" if axes.get_xscale() == "log" else ""))
            axes.set_ylabel(y_title)
            _add_legend(figure, width, "outside lower center")
            _place_labels(axes, [*([origin] if origin else []), *_ends_first(kept.values())])
        return figure

    return Chart(f"{y_title} against {x_title}", draw) if everything else None


def bars(
    rows: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    reference: float | None = None,
    is_share: bool = False,
    colours: Mapping[str, int | None] | None = None,
) -> Chart | None:
    """Horizontal bars, grouped.

    Args:
        rows: row -> series -> figure with interval (nan ends: no interval is drawn).
        title: of the axis.
        reference: where a line is drawn.
        is_share: show the axis in per cent.
        colours: of the series, None is that of text; by default in their order.

    Returns:
        The chart, whose drawing raises MissingDependencyError without matplotlib; None where no figure is finite.
    """
    series = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    chosen = {name: (colours or {}).get(name, place) for place, name in enumerate(series)}
    step = 0.85 / max(1, len(series))

    def draw(width: float) -> Figure:
        height = 0.7 + len(rows) * (0.13 * len(series) + 0.12) + _legend_height(series, width)
        with _drawing(width, height) as (figure, axes):
            for place, name in enumerate(series):
                axes.barh(0, 0, color=_colour(chosen[name]), label=name)  # the key
                for row, (group, figures) in enumerate(rows.items()):
                    each = figures.get(name)
                    if each is not None and math.isfinite(each.value):
                        at = row + (place - (len(series) - 1) / 2) * step
                        (bar,) = axes.barh(at, each.value, 0.85 * step, color=_colour(chosen[name]))
                        bar.set_gid(f"{_TIP}{group}, {name}: {each.value:.4g}")
                        _draw_line(axes, (each.low, each.high), (at, at), color=_INK, alpha=0.55)
            longest = 30 if width > 5 else 16
            axes.set_yticks(range(len(rows)), [_shortened(name, longest) for name in rows])
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            if reference is not None:
                axes.axvline(reference, color=_INK, alpha=0.6, linewidth=1)
            low, high = axes.get_xlim()
            axes.set_xlim(low if low < -1e-9 else 0.0, max(high, 0.01))
            if is_share:
                _show_percent(axes.xaxis)
            axes.set_xlabel(title)
            _add_legend(figure, width, "outside upper center")
        return figure

    is_empty = not any(math.isfinite(each.value) for figures in rows.values() for each in figures.values())
    return None if is_empty else Chart(title, draw)


def training_curves(records: Sequence[Mapping[str, float]], *, panels: Mapping[str, str] | None = None) -> Chart | None:
    """The curves of a training run, one above the other; `Chart.save` writes them.

    Args:
        records: rows of the run's log, each with "step" and figures.
        panels: key of a figure -> its title; by default "loss" and "bits_per_byte".

    Returns:
        The chart, whose drawing raises MissingDependencyError without matplotlib; None where no row has a figure.
    """
    titles = panels or {"loss": "loss, nats per token", "bits_per_byte": "bits per byte"}
    points = {
        key: [(row["step"], row[key]) for row in records if math.isfinite(row.get(key, math.nan))] for key in titles
    }
    kept = {key: found for key, found in points.items() if found}

    def draw(width: float) -> Figure:
        with _drawing(width, 2.4 * len(kept) + 0.3, rows=len(kept)) as (figure, _):
            for number, (axes, (key, found)) in enumerate(zip(figure.axes, kept.items(), strict=True)):
                steps, values = zip(*found, strict=True)
                smooth = len(found) >= _SMOOTH_FROM
                axes.plot(steps, values, color=_colour(number), alpha=0.35 if smooth else 1.0, linewidth=1.2)
                if smooth:
                    half = len(found) // 40
                    means = np.convolve(values, np.full(2 * half + 1, 1.0 / (2 * half + 1)), "valid")
                    axes.plot(steps[half:-half], means, color=_colour(number), linewidth=1.8)
                axes.set_ylabel(titles[key])
            figure.axes[-1].set_xlabel("step")
        return figure

    return Chart("training curves", draw) if kept else None


@contextmanager
def _drawing(width: float, height: float, rows: int = 1) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one column of axes; matplotlib's settings hold inside the block."""
    matplotlib = require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, squeeze=False, sharex=True)[0][0]
        yield figure, axes


def _draw_curve(axes: Axes, name: str, number: int, points: Sequence[Point], *, skipped: int, faint: float) -> None:
    """A line through all points; marks and intervals for those after the first `skipped`."""
    colour = _colour(number)
    dashes = "-" if number < len(LIGHT) else "--"  # a second round of the colours
    axes.plot([point.x.value for point in points], [point.y.value for point in points], dashes, color=colour, zorder=3)
    mark = _MARKS[(number + number // len(LIGHT)) % len(_MARKS)]
    own = points[skipped:]
    for point in own:
        _draw_intervals(axes, point, colour, faint)
        _draw_mark(axes, point, _tooltip(name, point), marker=mark, markersize=6, color=colour, markeredgecolor=_PAPER)
        if point.is_default:
            _draw_mark(axes, point, "ring", marker="o", markersize=11, color="none", markeredgecolor=_INK)
    axes.plot([], [], dashes if len(own) > 1 else "", color=colour, marker=mark, label=name)


def _draw_mark(axes: Axes, point: Point, name: str, **style: Any) -> None:  # noqa: ANN401
    axes.plot(point.x.value, point.y.value, clip_on=False, zorder=4, gid=name, **style)


def _draw_intervals(axes: Axes, point: Point, colour: str, alpha: float) -> None:
    x, y = point.x, point.y
    for xs, ys in (((x.low, x.high), (y.value, y.value)), ((x.value, x.value), (y.low, y.high))):
        _draw_line(axes, xs, ys, color=colour, alpha=alpha, gid="interval")


def _draw_line(axes: Axes, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:  # noqa: ANN401
    """A thin line, if all of its ends are known."""
    if all(map(math.isfinite, (*xs, *ys))):
        axes.plot(xs, ys, linewidth=1, **style)


def _finish_axes(axes: Axes, points: Sequence[Point], *, y_is_share: bool) -> None:
    """Scales that hold all intervals; the vertical one from 0, and never of no height."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = [point.x.value for point in points]
    lows = [end for point in points for end in (point.x.value, point.x.low) if math.isfinite(end)]
    if min(lows) > 0.0 and max(values) >= _LOG_FROM * min(values):
        axes.set_xscale("log")
        decades = math.log10(max(values) / min(lows))
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
    highs = [end for point in points for end in (point.y.value, point.y.high) if math.isfinite(end)]
    axes.set_ylim(0.0, max(1.05 * max(highs), 0.01))
    if y_is_share:
        _show_percent(axes.yaxis)


def _place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Texts beside their points where they cover neither marks, intervals nor each other; others are left out."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    figure.draw_without_rendering()
    centres = [axes.transData.transform((point.x.value, point.y.value)) for point in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    intervals = [line.get_window_extent().padded(1.0) for line in axes.lines if line.get_gid() == "interval"]
    for point in points:
        for avoided in ([*taken, *intervals], taken) if point.label else ():
            box = _place_label(axes, point, avoided)
            if box is not None:
                taken.append(box)
                break


def _place_label(axes: Axes, point: Point, avoided: Sequence[Bbox]) -> Bbox | None:
    """Write one label at the first free place; the box that it takes, None where no place is free."""
    where = (point.x.value, point.y.value)
    for across, up, alignment in _LABEL_PLACES:
        text = axes.annotate(
            point.label, where, (across, up), textcoords="offset points", ha=alignment, fontsize=8.5, gid="label"
        )
        text.set_in_layout(False)
        box = text.get_window_extent().padded(1.0)
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1 and axes.bbox.y0 <= box.y0
        if inside and box.y1 <= axes.figure.bbox.y1 and not any(box.overlaps(other) for other in avoided):
            return box
        text.remove()
    return None


def _ends_first(curves: Iterable[Sequence[Point]]) -> list[Point]:
    """The ends of all curves before what lies between: they say most, so their labels get their places first."""
    ranked = [(min(rank, len(curve) - 1 - rank) > 0, point) for curve in curves for rank, point in enumerate(curve)]
    return [point for _, point in sorted(ranked, key=lambda each: each[0])]


def _legend_columns(names: Sequence[str], width: float) -> int:
    return max(1, min(len(names), int(width * 72 / (6 * max(map(len, names), default=1) + 34))))


def _legend_height(names: Sequence[str], width: float) -> float:
    """Inches."""
    return 0.19 * math.ceil(len(names) / _legend_columns(names, width)) + 0.1


def _add_legend(figure: Any, width: float, place: str) -> None:  # noqa: ANN401
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc=place, ncols=_legend_columns(names, width), fontsize=9)


def _show_percent(axis: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _svg(figure: Figure, label: str, kind: str) -> str:
    """The figure as an element of a page, or, where its kind is "file", as a file that brings its style."""
    buffer = io.BytesIO()
    with require("matplotlib").rc_context({**_SETTINGS, "svg.hashsalt": f"{label} {kind}"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue().decode("utf-8").replace("xlink:href", "href")
    text = re.sub(r"(font(?:-family)?: [^;\"']*)'[^;\"]*", rf"\1{_FONT}", text)
    for number, colour in enumerate(LIGHT):
        text = text.replace(colour, f"var(--c{number})")
    text = text.replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', text))
    ElementTree.register_namespace("", _SPACE)
    root = ElementTree.fromstring(text)
    for style in root.findall(f".//{{{_SPACE}}}defs/{{{_SPACE}}}style/.."):
        style.clear()  # it would hold for the whole page
    for element in root.iter():
        name = element.attrib.pop("id", "")
        if name in used:
            element.set("id", name)
        if name == "label":
            element.set("class", name)
        if name.startswith(_TIP):
            element.insert(0, ElementTree.Element("title"))
            element[0].text = name.removeprefix(_TIP)
    size = {side: root.attrib.pop(side) for side in ("width", "height")}
    root.attrib |= {"role": "img", "aria-label": label, "class": f"chart {kind}"}
    if kind == "file":
        root.attrib |= size
        style = ElementTree.Element("style")
        style.text = CHART_STYLE
        paper = {"width": "100%", "height": "100%", "style": "fill: var(--paper)"}
        root[:0] = [style, ElementTree.Element("rect", paper)]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _is_finite(point: Point) -> bool:
    return math.isfinite(point.x.value) and math.isfinite(point.y.value)


def _tooltip(name: str, point: Point) -> str:
    strength = f", {point.label}" if point.label and point.label != name else ""
    return f"{_TIP}{name}{strength}: {point.x.value:.4g}, {point.y.value:.4g}"


def _colour(number: int | None) -> str:
    return _INK if number is None else LIGHT[number % len(LIGHT)]


def _shortened(text: str, length: int) -> str:
    text = "".join(each for each in text.replace("_", " ") if each.isprintable())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"

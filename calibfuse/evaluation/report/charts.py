"""Charts drawn by matplotlib: parts of a page that follow light and dark, and files of their own.

A chart is drawn in the light palette; inside a page each of its colours becomes the variable of the style sheet that
html/base.html.jinja defines. What is shown where the mouse rests is the gid of an artist, after `_TIP`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibfuse.evaluation.bootstrap import Estimate
from calibfuse.html import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (
    *("#0b6bcb", "#d1480f", "#0a8754", "#8a3ffc", "#b8860b"),
    *("#c2185b", "#00838f", "#6d4c41", "#5c6bc0", "#6b7280"),
)
_INK, _PAPER = "#1c2430", "#fefefe"
_TIP = "tip: "
_MARKS = "osD^v"
_WIDTH = 5.2  # inches; a page scales them to its width, down to that of a telephone
_LOG_FROM = 3.0  # largest over smallest value from which on a horizontal axis is logarithmic
_SETTINGS: dict[Any, Any] = {
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    **{"axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.facecolor": "none", "figure.facecolor": "none"},
    **{"grid.alpha": 0.15, "axes.grid": True, "axes.axisbelow": True, "font.size": 9.5, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "text.parse_math": False},
    **{"svg.hashsalt": "calibfuse"},
}


@dataclass(frozen=True)
class Point:
    """A point of a curve with intervals in both directions; nan ends: there is no interval."""

    label: str  # its strength
    x: Estimate
    y: Estimate
    is_default: bool = False  # marked by a ring, and by its label

    @property
    def is_finite(self) -> bool:
        """Whether it can be drawn."""
        return math.isfinite(self.x.value) and math.isfinite(self.y.value)


@dataclass(frozen=True)
class Chart:
    """What can be drawn; drawing raises MissingDependencyError without matplotlib."""

    title: str  # what it shows, for those who cannot see it
    draw: Callable[[], Figure]

    def svg(self) -> str:
        """An SVG file of its own, on paper."""
        buffer = io.BytesIO()
        with require("matplotlib").rc_context(_SETTINGS):
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.draw().savefig(buffer, format="svg", metadata=metadata, facecolor=_PAPER)
        return buffer.getvalue().decode("utf-8")

    def markup(self) -> str:
        """An element of a page, in the colours of its style sheet."""
        head, _, body = self.svg().partition("<svg")[2].replace("xlink:href", "href").partition(">")
        body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", body)
        body = re.sub(r'<g id="[^"]*">', "<g>", body)  # nothing refers to groups, and pages hold several charts
        body = re.sub(r"(font(?:-family)?: [^;\"']*)'[^;\"]*", r"\1system-ui, sans-serif", body)
        for number, colour in enumerate(PALETTE):
            body = body.replace(colour, f"var(--c{number})")
        body = body.replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
        box = re.findall(r'viewBox="[^"]*"', head)[0]
        return f'<svg class="chart" role="img" aria-label="{self.title}" {box}>{body}\n'


def curves(
    families: Mapping[str, Sequence[Point]], *, x_title: str, y_title: str, origin: Point | None = None
) -> Chart | None:
    """A line for each family, through points in the order of their strength; None where no point is finite.

    The horizontal axis is logarithmic where the values differ by a factor of 3 or more; the vertical one is of shares.
    """
    start = [origin] if origin is not None and origin.is_finite else []
    kept = {name: [point for point in points if point.is_finite] for name, points in families.items()}
    everything = [*start, *(point for points in kept.values() for point in points)]

    def draw() -> Figure:
        with _drawing(0.6 * _WIDTH, len(kept)) as (figure, axes):
            for number, (name, points) in enumerate(kept.items()):
                _draw_curve(axes, name, number, points)
            for point in start:
                style = {"marker": "o", "markersize": 9, "color": _PAPER, "markeredgecolor": _INK, "markeredgewidth": 2}
                _draw_mark(axes, point, point.label, _INK, **style)
                _write(axes, point)
            _set_scales(axes, everything)
            axes.set_xlabel(x_title + (", logarithmic" if axes.get_xscale() == "log" else ""))
            axes.set_ylabel(y_title)
            _add_legend(figure, "outside lower center")
        return figure

    return Chart(f"{y_title} against {x_title}", draw) if everything else None


def bars(
    rows: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    reference: float | None = None,
    is_share: bool = False,
    colours: Mapping[str, int] | None = None,
) -> Chart | None:
    """Horizontal bars of row -> series -> figure, grouped, with a line at `reference`; None where no figure is finite.

    Colours are numbers of the palette, by default in the order of the series.
    """
    series = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    step = 0.85 / max(1, len(series))

    def draw() -> Figure:
        with _drawing(0.7 + len(rows) * (0.13 * len(series) + 0.12), len(series)) as (figure, axes):
            for place, name in enumerate(series):
                colour = PALETTE[(colours or {}).get(name, place) % len(PALETTE)]
                axes.barh(0, 0, color=colour, label=name)  # the key
                for row, (group, figures) in enumerate(rows.items()):
                    each = figures.get(name)
                    if each is not None and math.isfinite(each.value):
                        at = row + (place - (len(series) - 1) / 2) * step
                        (bar,) = axes.barh(at, each.value, 0.85 * step, color=colour)
                        bar.set_gid(f"{_TIP}{group}, {name}: {each.value:.4g}")
                        _draw_line(axes, (each.low, each.high), (at, at), _INK)
            axes.set_yticks(range(len(rows)), [_shortened(name) for name in rows])
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.grid(visible=False, axis="y")
            if reference is not None:
                axes.axvline(reference, color=_INK, alpha=0.6, linewidth=1)
            low, high = axes.get_xlim()
            axes.set_xlim(low if low < -1e-9 else 0.0, max(high, 0.01))
            if is_share:
                from matplotlib.ticker import PercentFormatter

                axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
            axes.set_xlabel(title)
            _add_legend(figure, "outside upper center")
        return figure

    is_empty = not any(math.isfinite(each.value) for figures in rows.values() for each in figures.values())
    return None if is_empty else Chart(title, draw)


@contextmanager
def _drawing(height: float, entries: int) -> Iterator[tuple[Figure, Axes]]:
    matplotlib = require("matplotlib")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height + 0.1 + 0.19 * math.ceil(entries / 3)), layout="constrained")
        yield figure, figure.subplots()


def _draw_curve(axes: Axes, name: str, number: int, points: Sequence[Point]) -> None:
    colour = PALETTE[number % len(PALETTE)]
    dashes = "-" if number < len(PALETTE) else "--"  # a second round of the colours
    axes.plot([each.x.value for each in points], [each.y.value for each in points], dashes, color=colour, zorder=3)
    mark = _MARKS[(number + number // len(PALETTE)) % len(_MARKS)]
    for point in points:
        _draw_mark(axes, point, name, colour, marker=mark, markersize=6, color=colour, markeredgecolor=_PAPER)
        if point.is_default:
            x, y = point.x.value, point.y.value
            axes.plot(x, y, marker="o", markersize=11, color="none", markeredgecolor=_INK, zorder=4, gid="ring")
        if point.is_default or point is points[-1]:
            _write(axes, point)
    axes.plot([], [], dashes if len(points) > 1 else "", color=colour, marker=mark, label=name)


def _draw_mark(axes: Axes, point: Point, name: str, colour: str, **style: Any) -> None:  # noqa: ANN401
    x, y = point.x, point.y
    _draw_line(axes, (x.low, x.high), (y.value, y.value), colour)
    _draw_line(axes, (x.value, x.value), (y.low, y.high), colour)
    strength = f", {point.label}" if point.label and point.label != name else ""
    tip = f"{_TIP}{name}{strength}: {x.value:.4g}, {y.value:.4g}"
    axes.plot(x.value, y.value, clip_on=False, zorder=4, gid=tip, **style)


def _draw_line(axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
    if all(map(math.isfinite, (*xs, *ys))):
        axes.plot(xs, ys, linewidth=1, color=colour, alpha=0.4)


def _write(axes: Axes, point: Point) -> None:
    axes.annotate(point.label, (point.x.value, point.y.value), (7, 5), textcoords="offset points", fontsize=8.5)


def _set_scales(axes: Axes, points: Sequence[Point]) -> None:
    """Scales that hold all intervals; the vertical one from 0, and never of no height."""
    from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

    values = [point.x.value for point in points]
    lows = [end for point in points for end in (point.x.value, point.x.low) if math.isfinite(end)]
    if min(lows) > 0.0 and max(values) >= _LOG_FROM * min(values):
        axes.set_xscale("log")
        wide = max(values) > 100 * min(lows)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
    highs = [end for point in points for end in (point.y.value, point.y.high) if math.isfinite(end)]
    axes.set_ylim(0.0, max(1.05 * max(highs), 0.01))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _add_legend(figure: Any, place: str) -> None:  # noqa: ANN401
    handles, names = figure.axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc=place, ncols=min(3, len(names)), fontsize=9)


def _shortened(text: str, length: int = 30) -> str:
    text = "".join(each for each in text.replace("_", " ") if each.isprintable())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"

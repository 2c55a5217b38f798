"""A coverage report as a self-contained HTML page, and its tables as rows for a terminal.

No external file, no JavaScript; light and dark as the reader's system is. All text is escaped; nothing that a tokenizer
says can become markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibfuse.html.markup import escape, unchanged, visible
from calibfuse.inspection.coverage import TextReport, VocabularyReport
from calibfuse.inspection.spelling import Mask

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea; --paper: #f6f7f9; --card: #fff;
  --bar: #3b6fd4; --track: #e6eaf1; --warn: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #2e3542; --paper: #12151b;
  --card: #1a1e27; --bar: #6f9bf2; --track: #2a303c; --warn: #f0955a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; } h2 { font-size: 1.05rem; margin: 0 0 .25rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: 0 0 1.5rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr)); gap: .75rem; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.tile strong { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
section { margin-top: 1rem; } .note { color: var(--soft); font-size: .9rem; margin: 0 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
tr:first-child th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .88rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere; }
td:last-child, th:last-child { padding-right: 0; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--track); border-radius: .25rem;
  padding: .05rem .3rem; white-space: pre-wrap; }
.bar { width: 30%; min-width: 4.5rem; } .track { display: block; height: .55rem; border-radius: .3rem;
  background: var(--track); overflow: hidden; } .track span { display: block; height: 100%; background: var(--bar); }
.bar.warn .track span { background: var(--warn); }
@media (max-width: 34rem) { .bar { display: none; } }
footer { color: var(--soft); font-size: .85rem; margin-top: 1.5rem; }
"""


def coverage_page(
    vocabulary: VocabularyReport,
    text: TextReport | None,
    *,
    facts: Mapping[str, str],
    mask: Mask | None = None,
) -> str:
    """A coverage report as an HTML page.

    Args:
        vocabulary: of `report_vocabulary`.
        text: of `report_text`; None leaves that part out.
        facts: names and values for the head of the page.
        mask: replaces the letters of offensive words, one character by one; None shows them.

    Returns:
        The page.
    """
    mask = mask or unchanged
    parts = [_tiles(vocabulary, text), _vocabulary_section(vocabulary)]
    if text is not None:
        parts += [_text_section(text), _worst_section(text, mask)]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    title = "What the calibrator covers"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title} - calibfuse</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<dl>{listed}</dl>\n{body}\n"
        f"<footer>Made by calibfuse align --report.</footer>\n</main>\n</body>\n</html>\n"
    )


def vocabulary_rows(report: VocabularyReport) -> list[tuple[str, str, str]]:
    """The table of a vocabulary report: what, how many, share of all ids."""
    return [(name, f"{count:,}", _percent(count / report.size)) for name, count in _counts(report)]


def text_rows(report: TextReport) -> list[tuple[str, str]]:
    """The table of a text report: what, and its value."""
    return [
        ("passages", f"{report.passages:,}"),
        ("bytes", f"{report.bytes:,}"),
        ("tokens", f"{report.tokens + report.skipped:,} ({report.distinct:,} different)"),
        ("covered tokens of the text", _percent(report.covered_mass, 3)),
        *((f"bits per byte, head {head!r}", f"{value:.3f}") for head, value in report.bits_per_byte.items()),
    ]


def _counts(report: VocabularyReport) -> list[tuple[str, int]]:
    unspelled = [("text that the calibrator cannot spell", report.unspelled)] if report.unspelled else []
    return [
        ("in the vocabulary", report.size),
        ("covered (have text)", report.covered),
        *unspelled,
        ("special or holes (never moved)", report.special),
        ("same bytes as another id", report.duplicates),
        ("parts of characters", report.partial),
    ]


def _tiles(vocabulary: VocabularyReport, text: TextReport | None) -> str:
    tiles = [(_percent(vocabulary.coverage), f"of {vocabulary.size:,} ids are covered")]
    if text is not None:
        tiles.append((_percent(text.covered_mass), "of the text's tokens are covered"))
        tiles += [(f"{value:.3f}", f"bits per byte, head {head}") for head, value in text.bits_per_byte.items()]
    cells = "".join(
        f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _vocabulary_section(report: VocabularyReport) -> str:
    rows = [
        [escape(name), f"{count:,}", _percent(count / report.size), _bar(count / report.size)]
        for name, count in _counts(report)
    ]
    note = "Covered ids are those that fusion can move. Ids with equal bytes share the probability of these bytes."
    return _section("Vocabulary", note, ["ids", "count", "share", ""], rows)


def _text_section(report: TextReport) -> str:
    note = "Bits per byte of the text when it is cut into the target's tokens: lower is better, at any vocabulary."
    return _section("Text", note, ["measure", "value"], [[escape(a), escape(b)] for a, b in text_rows(report)])


def _worst_section(report: TextReport, mask: Mask) -> str:
    most = max((fit.bits_per_byte for fit in report.worst), default=1.0)
    rows = [
        [
            _token(mask(fit.text)),
            str(fit.token_id),
            f"{fit.count:,}",
            f"{fit.nats:.2f}",
            f"{fit.bits_per_byte:.2f}",
            _bar(fit.bits_per_byte / most, warn=True),
        ]
        for fit in report.worst
    ]
    note = "Mean surprise under the non-toxic head, among tokens that the text has often enough."
    return _section("Worst predicted tokens", note, ["token", "id", "count", "nats", "bits per byte", ""], rows)


def _section(title: str, note: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table; note and cells are markup already."""
    head = "".join(f"<th>{escape(cell)}</th>" if cell else '<th class="bar"></th>' for cell in headers)
    body = "".join(
        f"<tr>{''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{note}</p>'
        f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div></section>'
    )


def _bar(share: float, *, warn: bool = False) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    kind = "bar warn" if warn else "bar"
    return f'<td class="{kind}"><span class="track"><span style="width: {width:.1f}%"></span></span></td>'


def _token(text: str) -> str:
    return f"<code>{escape(visible(text))}</code>"


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"

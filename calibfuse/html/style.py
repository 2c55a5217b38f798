"""The style sheet of the report's page; the charts bring their own (charts.py), which defines the colours of text."""

from __future__ import annotations

PAGE_STYLE = """
:root { color-scheme: light dark; --page: #f4f6f9; --line: #d8dee6; --soft: #5b6675; --warn: #b3261e; --good: #0a7a4b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --line: #2d3540; --soft: #9aa4b2; --warn: #ff8a80; --good: #5fd6a0; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0;
  background: var(--page); color: var(--ink); }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
.lead, section > p { color: var(--soft); margin: .3rem 0; overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem;
  margin: 1.1rem 0; }
.wide { overflow-x: auto; max-width: 100%; } .wide:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; margin: .4rem 0 .6rem; font-size: .87rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; } tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: color-mix(in srgb, var(--ink) 4%, var(--paper)); }
th:first-child, td:first-child, .said td, .said th { text-align: left; } td { font-variant-numeric: tabular-nums; }
td:first-child { font-weight: 600; } .said td:first-child { font-weight: 400; }
.said td { min-width: 13rem; max-width: 22rem; }
.figures th:first-child, .figures td:first-child { position: sticky; left: 0; z-index: 1; background: var(--paper);
  min-width: 8rem; max-width: 12rem; padding-left: 0; } .figures td:not(:first-child) { white-space: nowrap; }
small { color: var(--soft); display: block; white-space: nowrap; } small.good { color: var(--good); }
small.bad { color: var(--warn); }
.note { border-left: 4px solid var(--warn); background: var(--paper); padding: .5rem .9rem; margin: .6rem 0;
  overflow-wrap: anywhere; }
.chart { width: 100%; min-width: 38rem; max-width: 58rem; display: block; }
.chart.key { display: inline-block; width: 1.2em; height: 1.2em; min-width: 0; margin-right: .4em;
  vertical-align: -.2em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .87rem; margin: .5rem 0; }
.legend i { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .2rem 1rem; margin: 0;
  font-size: .87rem; }
dt { color: var(--soft); } dd { margin: 0; } .prompt { color: var(--soft); } dd, .said td { overflow-wrap: anywhere; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""

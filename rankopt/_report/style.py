"""The style sheet of reports; light or dark as the reader's system is."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2430; --muted: #667085; --rule: #e3e7ee;
  --page: #f6f7f9; --card: #ffffff; --strong: #1f6feb; --pale: #cfdcf3; --second: #d9730d;
  --third: #1a7f5a; --chip: #e8f0fe; --kept: #eef0f3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --muted: #98a2b3; --rule: #2b3341;
  --page: #12161d; --card: #1a202a; --strong: #6ea8ff; --pale: #33435f; --second: #f0a35e;
  --third: #5fc9a0; --chip: #24344f; --kept: #272e3a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 60px }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 36px 0 8px }
.lead { color: var(--muted); margin: 0 0 12px }
.lead b { color: var(--ink) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 20px 0 8px }
.tile, figure, .scroll { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px }
.tile { padding: 12px 16px }
.tile .value { font-size: 28px; font-weight: 650; font-variant-numeric: tabular-nums }
.tile .name, .tile .note { color: var(--muted); font-size: 13px }
.verdict { margin: 4px 0 0; font-weight: 550 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: left; color: var(--muted); font-weight: 550; white-space: nowrap }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--rule); vertical-align: top }
td:first-child { white-space: nowrap }
tbody tr:last-child td { border-bottom: 0 }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace;
  white-space: nowrap }
.small { color: var(--muted); font-size: 12.5px }
.chip { border-radius: 9px; padding: 1px 8px; font-size: 12.5px; white-space: nowrap;
  background: var(--chip) }
.chip.keep { background: var(--kept); color: var(--muted) }
.bar { position: relative; width: 200px; height: 10px; margin: 5px 0 2px }
.bar i, .bar b { position: absolute; left: 0; top: 0; height: 100%; min-width: 1px;
  border-radius: 2px; background: var(--pale) }
.bar b { background: var(--strong) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px }
figure { margin: 0; padding: 10px 12px 8px }
figcaption { font-size: 13px; font-weight: 550; padding-left: 4px }
svg { display: block; width: 100%; height: auto }
.grid { stroke: var(--rule); fill: none }
.tick { fill: var(--muted); font-size: 10.5px; text-anchor: end }
.tick.mid { text-anchor: middle }
.axis { text-align: center; color: var(--muted); font-size: 12px; margin-top: -4px }
.line { fill: none; stroke: var(--strong); stroke-width: 1.8; stroke-linejoin: round }
.dot { fill: var(--strong) }
.line.s2 { stroke: var(--second) } .dot.s2 { fill: var(--second) }
.line.s3 { stroke: var(--third) } .dot.s3 { fill: var(--third) }
.key { font-weight: 400; margin-left: 8px } .key::before { content: "● " }
.key.s1::before { color: var(--strong) } .key.s2::before { color: var(--second) }
.key.s3::before { color: var(--third) }
details { margin-top: 28px } summary { cursor: pointer; color: var(--muted); margin-bottom: 8px }
details td { overflow-wrap: anywhere }
@media print { body { background: none } .tile, figure, tr { break-inside: avoid } }
"""

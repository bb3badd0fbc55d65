"""A lowered step as a page of HTML that stands alone: what became of each site, and what it costs.

Bars are of the longest site, layer or kind on the page. Nothing is loaded: the page opens offline.
"""

from collections.abc import Iterable
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qnext.lowering.text import LEFT, WHOLE, Line, lines_of

if TYPE_CHECKING:
    from qnext.lowering.stages import Lowered

WIDEST = 50  # percent of a cell that the longest bar takes
LEAST = 1e-8  # seconds: less is not told
STYLE = """
:root { --ink: #1c2430; --soft: #667; --line: #dde3ea; --bar: #3b6fb6; --less: #e0a030; }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); margin: 2rem auto;
  max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line) }
th, td { padding: .15rem .6rem .15rem 0; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code, td.c { font: 12.5px/1.5 ui-monospace, monospace }
tr.left td.c { color: #b3261e } tr.site:hover { background: #f5f8fb }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0 }
.figures b { display: block; font-size: 1.35rem }
.bar { background: var(--bar); height: .7rem; min-width: 1px; display: inline-block }
.bar.l { background: var(--less) }
summary { cursor: pointer; padding: .25rem 0; border-bottom: 1px solid var(--line) }
summary .n { float: right; color: var(--soft) }
input { font: inherit; padding: .3rem .5rem; width: 22rem; max-width: 100% }
td.bars { width: 16rem; white-space: nowrap }
.part table { table-layout: fixed } .part td { overflow-wrap: anywhere }
.part th:nth-child(1) { width: 2.6rem } .part th:nth-child(2) { width: 8.5rem }
.part th:nth-child(3) { width: 11rem } .part th:nth-child(4) { width: 7.5rem }
.part th:nth-child(6) { width: 4.5rem } .part th:nth-child(7) { width: 13rem }
"""
SCRIPT = """
const find = document.getElementById("find");
find.addEventListener("input", () => {
  const want = find.value.toLowerCase();
  for (const part of document.querySelectorAll("details.part")) {
    let some = false;
    for (const row of part.querySelectorAll("tr.site")) {
      const hit = row.textContent.toLowerCase().includes(want);
      row.hidden = !hit;
      some ||= hit;
    }
    part.hidden = !some;
    if (want) part.open = some;
  }
});
"""


def as_html(lowered: "Lowered") -> str:
    """The page. Times are the chip's roofline and what launches take; a target without a chip has
    none, and bars are of bytes."""
    cost = lowered.cost_analysis()
    lines = lines_of(lowered.graph.graph, lowered.verdicts, lowered.writes)
    title = f"{lowered.trace.name} on {lowered.target.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_subtitle(lowered, cost))}</p>',
        _figures(cost),
        "<h2>Kinds of layers</h2>",
        _kinds(cost),
        "<h2>What became of primitives</h2>",
        f"<pre><code>{escape(lowered.report())}</code></pre>",
        "<h2>Sites</h2>",
        '<p><input id="find" placeholder="find a site, a rule, a call" aria-label="find"></p>',
        *_parts(lines, cost),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head>'
    inside = "\n".join(body)
    return f"{page}<body>{inside}<script>{SCRIPT}</script></body></html>\n"


def _subtitle(lowered: "Lowered", cost: dict[str, Any]) -> str:
    chip = cost["chip"] or "no chip: bytes and operations alone"
    donated = f"; donated: {', '.join(lowered.donate)}" if lowered.donate else ""
    left = len(lowered.left)
    state = f"{left} primitives left on the reference" if left else "nothing on the reference"
    return f"{chip}; {len(cost['by_site']):,} sites, {state}{donated}"


def _figures(cost: dict[str, Any]) -> str:
    told = [
        ("launches", f"{cost['launches']:,}"),
        ("moved", f"{cost['bytes'] / 1e9:.3g} GB"),
        ("computed", f"{cost['flops'] / 1e9:.3g} GFLOP"),
    ]
    if cost["chip"]:
        told += [
            ("at the roofline", _time(cost["seconds_at_roofline"])),
            ("of launching alone", _time(cost["seconds_of_launches"])),
        ]
    cells = (f"<div><b>{escape(figure)}</b>{escape(name)}</div>" for name, figure in told)
    return f'<div class="figures">{"".join(cells)}</div>'


def _kinds(cost: dict[str, Any]) -> str:
    """A line a kind of part, with bars of its roofline and of its launches."""
    rows = sorted(cost["by_kind"].items(), key=lambda item: -_weight(item[1]))
    each = (cost["seconds_of_launches"] or 0) / max(cost["launches"], 1)  # seconds of a launch
    most = max((max(_weight(t), t["launches"] * each) for _, t in rows), default=0)
    head = ("kind", "parts", "launches", "GFLOP", "GB", "roofline" if cost["chip"] else "bytes")
    body = []
    for name, total in rows:
        bars = f"{_bar(_weight(total), most)}{_told(total)}"
        if cost["chip"]:
            launching = total["launches"] * each
            bars += f"<br>{_bar(launching, most, 'bar l')} {_time(launching)} of launching"
        cells = f"<td>{escape(name)}</td>{_numbers(total['parts'], total)}"
        body.append(f'<tr>{cells}<td class="bars">{bars}</td></tr>')
    return f"<table>{_head(head)}{''.join(body)}</table>"


def _parts(lines: list[Line], cost: dict[str, Any]) -> Iterable[str]:
    """Each layer, folded, with its sites."""
    of_node = {site["node"]: site for site in cost["by_site"]}
    most = max((_weight(site) for site in cost["by_site"]), default=0)
    number = 0
    for part, group in groupby(lines, key=lambda line: line.part):
        rows = []
        total = {"launches": 0, "bytes": 0}
        for line in group:
            site = of_node[line.node.name]
            rows.append(_site(number, line, site, most))
            total = {name: total[name] + site[name] for name in total}
            number += 1
        figures = f"{total['launches']} launches, {total['bytes'] / 1e6:,.1f} MB"
        head = ("", "site", "result", "became", "by", "MB", "time" if cost["chip"] else "bytes")
        yield (
            f'<details class="part"{" open" if number < 80 else ""}><summary>'
            f'{escape(part or WHOLE)} <span class="n">{figures}</span></summary>'
            f"<table>{_head(head)}{''.join(rows)}</table></details>"
        )


def _site(number: int, line: Line, site: dict[str, Any], most: float) -> str:
    left = " left" if line.became == LEFT else ""
    cells = "".join(
        f'<td class="c">{escape(text)}</td>'
        for text in (line.site, line.shape, line.became, line.why)
    )
    return (
        f'<tr class="site{left}"><td class="n soft">{number}</td>{cells}'
        f'<td class="n">{site["bytes"] / 1e6:,.3f}</td>'
        f'<td class="bars">{_bar(_weight(site), most)}{_told(site)}</td></tr>'
    )


def _numbers(parts: int, total: dict[str, Any]) -> str:
    figures = (
        f"{parts}",
        f"{total['launches']:,}",
        f"{total['flops'] / 1e9:.3g}",
        f"{total['bytes'] / 1e9:.3g}",
    )
    return "".join(f'<td class="n">{figure}</td>' for figure in figures)


def _head(names: Iterable[str]) -> str:
    wide = {"parts", "launches", "GFLOP", "GB", "MB"}
    cells = (f'<th class="n">{n}</th>' if n in wide else f"<th>{n}</th>" for n in names)
    return f"<tr>{''.join(cells)}</tr>"


def _weight(total: dict[str, Any]) -> float:
    """What bars show: seconds at the roofline, or bytes where there is no chip."""
    seconds = total["seconds_at_roofline"]
    return float(total["bytes"] if seconds is None else seconds)


def _told(total: dict[str, Any]) -> str:
    seconds = total["seconds_at_roofline"]
    return "" if seconds is None else f" {_time(seconds)}"


def _bar(weight: float, most: float, kind: str = "bar") -> str:
    width = WIDEST * weight / most if most else 0
    return f'<span class="{kind}" style="width: {width:.2f}%"></span>'


def _time(seconds: float) -> str:
    if seconds < LEAST:
        return f"&lt; {1e6 * LEAST:g} us"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} us"

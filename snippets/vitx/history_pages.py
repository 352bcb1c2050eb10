"""When methods appeared and who builds on whom: two pages as HTML text. No mkdocs, no torch, no files.

Drawings are SVG text. As in the mind map, colours, fonts and the choice between the wide and the narrow layout come
from docs/assets/vitx.css, and lengths are CSS pixels at scale one.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import count, groupby
from math import inf, sqrt
from typing import NamedTuple

from vitx.markup import captioned, heading, link, table
from vitx.mindmap import WIDE, clip, legend, text_width
from vitx.pages import BACKWARD, FORWARD, SURVEY, Atlas, Page, method_link
from vitx.schema import Catalog, Method

TEXT = 13  # size of labels; on the wide layout, shrunk to a window of 1280 px, 11
ROW = 20  # height of a line of labels
NARROW = 328  # width of the content on a phone of 360 px
SURVEY_YEAR = 2023  # it appeared on 12 November; methods of which in_survey says "no" became public after that day


def _short(name: str) -> str:
    """A name for a drawing: without what stands in brackets at its end, or those letters if they abbreviate it."""
    outer, mark, inner = name.removesuffix(")").partition(" (")
    if not mark or not name.endswith(")") or "(" in inner or not outer or not inner:
        return name
    letters = iter(outer.lower())
    abbreviates = " " not in inner and all(letter in letters for letter in inner.lower())
    return inner if abbreviates else outer


def _labels(names: Iterable[str], rooms: Iterable[float]) -> list[str]:
    """Short names cut to ``rooms`` pixels; where the cut leaves several alike, each keeps its end."""
    short = [(_short(name), room) for name, room in zip(names, rooms, strict=True)]
    cut = [clip(name, TEXT, room) for name, room in short]
    number = Counter(cut)

    def ends(name: str, room: float) -> str:
        head = clip(name, TEXT, 0.45 * room)
        tail = clip(name[::-1], TEXT, room - text_width(head, TEXT))[::-1].removeprefix("…")
        return head + (tail.partition(" ")[2] or tail)

    return [ends(*whole) if number[label] > 1 else label for label, whole in zip(cut, short, strict=True)]


def _widths(counts: Sequence[int], room: float, least: float) -> list[float]:
    """Widths of columns that add up to ``room``: ``least`` for each, and the rest by the root of what they hold."""
    roots = [sqrt(one) for one in counts]
    rest = max(0.0, room - least * len(counts)) / (sum(roots) or 1)
    return [least + rest * root for root in roots]


def _starts(widths: Iterable[float], start: float = 0) -> list[float]:
    found = [start]
    for width in widths:
        found.append(found[-1] + width)
    return found


def _leaf(href: str, label: str, title: str, classes: str, x: float, y: float, more: str = "") -> str:
    """A link with a dot at (x, y) and its label to the right."""
    width = text_width(label, TEXT) + 16
    return (
        f'<a href="{escape(href)}" class="{classes}"{more}><title>{escape(title)}</title>'
        f'<rect x="{x - 6:.0f}" y="{y - ROW / 2:.0f}" width="{width + 6:.0f}" height="{ROW}" rx="4"/>'
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4"/>'
        f'<text x="{x + 9:.0f}" y="{y + 4.5:.1f}">{escape(label)}</text></a>'
    )


def _svg(parts: Iterable[str], layout: str, label: str, width: float, height: float) -> str:
    """A drawing; the wide one scrolls inside itself where the window is too narrow for text of 11 px."""
    smallest = f' style="min-width:{0.85 * width:.0f}px"' if layout == "wide" else ""
    svg = (
        f'<svg class="vx-history vx-history--{layout}" role="group" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"{smallest}>'
        f"{''.join(parts)}</svg>"
    )
    if layout == "narrow":
        return svg
    return f'<div class="vx-scroll" tabindex="0" role="region" aria-label="{escape(label)}">{svg}</div>'


def _tabs(path: str) -> str:
    places = {"mindmap/": "Mind map", "timeline/": "Timeline", "lineage/": "Who extends whom"}
    links = "".join(
        f'<a href="/{place}"{" aria-current=page" * (place == path)}>{name}</a>' for place, name in places.items()
    )
    return f'<nav class="vx-tabs" aria-label="Overviews">{links}</nav>'


def _details(inner: str) -> str:
    return f'<details class="vx-history-list"><summary>The same as a list</summary>{inner}</details>'


# --- timeline ----------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A dated entry."""

    name: str
    href: str
    year: int
    hollow: bool


class Lane(NamedTuple):
    """The entries of one family, or the criteria, oldest first."""

    label: str
    href: str
    colour: int  # as in the mind map, 0 for neutral
    items: list[Item]


def lanes(atlas: Atlas) -> list[Lane]:
    """A lane for each family, and one for the criteria of evaluation that a paper dates."""
    families = atlas.catalog.taxonomy.families
    found = {
        term.id: Lane(term.label.removesuffix(" methods"), f"/families/{term.id}/", atlas.colours[term.id], [])
        for term in families
    }
    for one in atlas.catalog.methods.values():
        found[one.family].items.append(Item(one.name, f"/methods/{one.id}/", one.paper.year, one.snippet is None))
    dated = [
        Item(one.name, f"/criteria/{one.id}/", one.paper.year, one.snippet is None)
        for one in atlas.catalog.criteria.values()
        if one.paper
    ]
    every = [*found.values(), Lane("Criteria of evaluation", "/criteria/", 0, dated)]
    for lane in every:
        lane.items.sort(key=lambda item: item.year)
    return [lane for lane in every if lane.items]


def _title(item: Item, lane: Lane) -> str:
    return f"{item.name} ({item.year}), {lane.label}"


def _years(lanes: Iterable[Lane]) -> dict[int, int]:
    """Year -> number of entries, ascending; years without any are left out."""
    return dict(sorted(Counter(item.year for lane in lanes for item in lane.items).items()))


def _packed(items: Iterable[tuple[float, float]]) -> Iterator[int]:
    """Line of each (left, right) so that none overlaps another of its line: always the first that is free.

    ``items`` come by ascending left edge. n log n.
    """
    busy: list[tuple[float, int]] = []  # (right edge, line)
    free: list[int] = []
    for left, right in items:
        while busy and busy[0][0] <= left:
            heapq.heappush(free, heapq.heappop(busy)[1])
        row = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (right, row))
        yield row


def timeline_svg(lanes: Sequence[Lane]) -> str:
    """Years from left to right, families below one another. A label may reach into later years that leave it room."""
    years = _years(lanes)
    widths = _widths(list(years.values()), WIDE - 90, 44)
    starts = dict(zip(years, _starts(widths, 8), strict=False))
    most = {year: max(width - 20, 118) for year, width in zip(years, widths, strict=True)}  # room of a label
    names, y, right = [], 44.0, WIDE - 82.0
    for lane in lanes:
        y += 30
        names.append(
            f'<a href="{escape(lane.href)}" class="lane c{lane.colour}"><rect x="0" y="{y - 24:.0f}" '
            f'width="{text_width(lane.label, 15) * 1.1 + 50:.0f}" height="24" rx="4"/>'
            f'<text x="2" y="{y - 7:.0f}">{escape(lane.label)} ({len(lane.items)})</text></a>'
        )
        labels = _labels((item.name for item in lane.items), (most[item.year] for item in lane.items))
        boxes = [
            (starts[item.year], starts[item.year] + text_width(label, TEXT) + 22)
            for item, label in zip(lane.items, labels, strict=True)
        ]
        last = 0
        for item, label, box, row in zip(lane.items, labels, boxes, _packed(boxes), strict=True):
            classes = f"leaf c{lane.colour}{' hollow' * item.hollow}"
            names.append(_leaf(item.href, label, _title(item, lane), classes, box[0] + 6, y + ROW * (row + 0.5)))
            last, right = max(last, row), max(right, box[1])
        y += ROW * (last + 1) + 6
    y += 24
    parts = []
    for number, (year, start) in enumerate(starts.items()):
        width = widths[number]
        if number % 2:
            parts.append(f'<rect class="band" x="{start - 4:.0f}" y="0" width="{width:.0f}" height="{y:.0f}"/>')
        parts += [f'<text class="year" x="{start + 2:.0f}" y="{at:.0f}">{year}</text>' for at in (18, y - 7)]
    after = next((start for year, start in starts.items() if year > SURVEY_YEAR), None)
    if after is not None and after > 160:
        parts.append(f'<path class="survey" d="M{after - 5:.0f} 26V{y - 24:.0f}"/>')
        parts.append(f'<text class="note" x="{after - 10:.0f}" y="38" text-anchor="end">survey, November 2023</text>')
    return _svg([f'<g aria-hidden="true">{"".join(parts)}</g>', *names], "wide", "Timeline of methods", right, y)


def _by_year(lanes: Sequence[Lane]) -> list[tuple[int, list[tuple[Lane, list[Item]]]]]:
    """(year, (lane, its entries of the year)), of years and lanes with entries."""
    found: dict[int, list[tuple[Lane, list[Item]]]] = {year: [] for year in _years(lanes)}
    for lane in lanes:
        for year, items in groupby(lane.items, key=lambda item: item.year):
            found[year].append((lane, list(items)))
    return list(found.items())


def timeline_narrow_svg(lanes: Sequence[Lane]) -> str:
    """Years downwards, the entries of a family in two columns: for a phone."""
    parts, y = [], 0.0
    column = NARROW / 2
    for year, held in _by_year(lanes):
        parts.append(f'<rect class="band" x="0" y="{y:.0f}" width="{NARROW}" height="28"/>')
        parts.append(f'<text class="year" x="8" y="{y + 19:.0f}">{year}</text>')
        y += 30
        for lane, items in held:
            y += 20
            parts.append(f'<text class="note c{lane.colour}" x="4" y="{y - 5:.0f}">{escape(lane.label)}</text>')
            labels = _labels((item.name for item in items), [column - 24] * len(items))
            for place, (item, label) in enumerate(zip(items, labels, strict=True)):
                x, row = place % 2 * column + 8, place // 2
                classes = f"leaf c{lane.colour}{' hollow' * item.hollow}"
                parts.append(_leaf(item.href, label, _title(item, lane), classes, x, y + 24 * (row + 0.5)))
            y += 24 * ((len(items) + 1) // 2)
        y += 8
    return _svg(parts, "narrow", "Timeline of methods", NARROW, y)


def timeline_outline(lanes: Sequence[Lane]) -> str:
    years = []
    for year, held in _by_year(lanes):
        below = "".join(
            f"<li>{escape(lane.label)}: {', '.join(link(item.href, item.name) for item in items)}</li>"
            for lane, items in held
        )
        years.append(f"<li>{year}<ul>{below}</ul></li>")
    return f'<ul class="vx-history-outline">{"".join(years)}</ul>'


def stacked_svg(years: Sequence[int], series: Iterable[tuple[str, str, Sequence[int]]], title: str) -> str:
    """A bar for each year, of one piece for each (name, class of its colour, numbers), the first at the bottom."""
    left, bar, high, top = 36, 46, 220, 20
    series = list(series)
    totals = [sum(numbers[place] for _, _, numbers in series) for place in range(len(years))]
    unit = high / max(totals)
    parts = [f'<path class="axis" d="M{left} {top + high}H{left + bar * len(years)}"/>']
    for place, (year, total) in enumerate(zip(years, totals, strict=True)):
        x, y = left + bar * place + 6, float(top + high)
        for name, colour, numbers in series:
            tall = numbers[place] * unit
            y -= tall
            if tall:
                said = f"<title>{year}, {escape(name)}: {numbers[place]}</title>"
                parts.append(
                    f'<rect class="{colour}" x="{x}" y="{y:.1f}" width="{bar - 12}" height="{tall:.1f}">{said}</rect>'
                )
        middle = x + bar / 2 - 6
        parts.append(f'<text x="{middle:.0f}" y="{y - 5:.0f}" text-anchor="middle">{total}</text>')
        parts.append(f'<text x="{middle:.0f}" y="{top + high + 17}" text-anchor="middle">{year}</text>')
    width, height = left + bar * len(years) + 10, top + high + 26
    return (
        f'<div class="vx-scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<svg class="vx-chart vx-stacked" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><title>{escape(title)}</title>{"".join(parts)}</svg></div>'
    )


def timeline_page(atlas: Atlas) -> Page:
    methods = atlas.catalog.methods.values()
    parts = ["<h1>Timeline</h1>", _tabs("timeline/")]
    if not methods:
        parts.append('<p class="vx-missing">No entry yet.</p>')
        return Page("timeline/", "Timeline", "Methods by year.", "\n".join(parts))
    every = lanes(atlas)
    years = dict(sorted(Counter(one.paper.year for one in methods).items()))
    busiest = max(years, key=lambda year: years[year])
    later = sum(one.in_survey == "no" for one in methods)
    undated = sum(one.paper is None for one in atlas.catalog.criteria.values())
    parts += [
        f"<p>The first of the <strong>{len(methods)}</strong> methods is of {min(years)}, the latest of {max(years)}; "
        f"the busiest year is {busiest} with {years[busiest]}. <strong>{later}</strong> became public only after the "
        f"{link(SURVEY, 'survey')} of November 2023. A work is dated by its preprint or by its venue. "
        "Every name is a link.</p>",
        "<div data-search-exclude>",
        timeline_svg(every),
        timeline_narrow_svg(every),
        legend(atlas.catalog),
        _details(timeline_outline(every)),
        "</div>",
        heading(2, "counts", "Methods by year and family"),
    ]
    families = atlas.catalog.taxonomy.families
    held = Counter((one.family, one.paper.year) for one in methods)
    series = [(term.label, f"c{atlas.colours[term.id]}", [held[term.id, year] for year in years]) for term in families]
    drawn = stacked_svg(list(years), series, "Methods by year and family")
    parts.append(captioned(drawn, "Methods of each year; colours are families, as above, the first at the bottom."))
    rows = [
        [str(year), *(str(held[term.id, year] or "") for term in families), f"<strong>{number}</strong>"]
        for year, number in years.items()
    ]
    totals = Counter(one.family for one in methods)
    rows.append(
        ["All", *(f"<strong>{totals[term.id]}</strong>" for term in families), f"<strong>{len(methods)}</strong>"]
    )
    heads = ("Year", *(link(f"/families/{term.id}/", term.label) for term in families), "All")
    parts.append(table(heads, rows, "Methods by year and family", "vx-years-table"))
    if undated:
        parts.append(
            f'<p class="vx-small">{undated} of the {len(atlas.catalog.criteria)} criteria of evaluation have no paper '
            "of their own and stand nowhere above.</p>"
        )
    return Page("timeline/", "Timeline", "The methods by year and family.", "\n".join(parts))


# --- relations ---------------------------------------------------------------------------------------------------

# What is drawn, the closest kinship first, with what it says. Comparisons are no kinship and would hide the rest.
DRAWN = {
    "extends": "generalises or refines the other",
    "supersedes": "is what the authors of the other now recommend",
    "applies": "carries the other unchanged to another task",
    "uses": "contains the other as a building block",
    "same-idea-as": "was found independently of the other",
}
COUNTED = {**DRAWN, "compares-with": "is measured against the other in its paper"}
DRAW = 300  # methods at most in the drawing, those with most relations


class Edge(NamedTuple):
    """``source`` says that it extends, uses, ... ``target``."""

    type: str
    source: str
    target: str


def relations(catalog: Catalog) -> list[Edge]:
    """Relations between different methods, each once."""
    return list(
        dict.fromkeys(
            Edge(one.type, method.id, one.id)
            for method in catalog.methods.values()
            for one in method.relations
            if one.id in catalog.methods and one.id != method.id
        )
    )


def _lists(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _postorder(ids: Iterable[str], below: Mapping[str, Sequence[str]]) -> list[str]:
    """Every id after those below it, except across the edges that close a cycle. Without recursion."""
    order: list[str] = []
    seen: set[str] = set()
    for root in ids:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(below.get(root, ())))]
        while stack:
            child = next((one for one in stack[-1][1] if one not in seen), None)
            if child is None:
                order.append(stack.pop()[0])
            else:
                seen.add(child)
                stack.append((child, iter(below.get(child, ()))))
    return order


def descendants(ids: Iterable[str], below: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many others can be reached from each id, directly or through others; cycles do no harm.

    Sets are the bits of whole numbers: one pass over the edges without a cycle, a few more with.
    """
    order = _postorder(ids, below)
    place = {id: number for number, id in enumerate(order)}
    reached = [0] * len(order)
    changed = True
    while changed:
        changed = False
        for number, id in enumerate(order):
            bits = reached[number]
            for child in below.get(id, ()):
                bits |= reached[place[child]] | 1 << place[child]
            if bits != reached[number]:
                reached[number], changed = bits, True
    return {id: (reached[number] & ~(1 << number)).bit_count() for number, id in enumerate(order)}


def longest_chain(ids: Iterable[str], below: Mapping[str, Sequence[str]]) -> list[str]:
    """A longest path downwards; the edges that close a cycle are left out."""
    chain: dict[str, tuple[int, str]] = {}  # length of the longest path from here, and where it goes next
    for id in _postorder(ids, below):
        lengths = [(chain[child][0] + 1, child) for child in below.get(id, ()) if child in chain]
        chain[id] = max(lengths, default=(1, ""), key=lambda one: one[0])
    id = max(chain, key=lambda id: chain[id][0], default="")
    found = []
    while id:
        found.append(id)
        id = chain[id][1]
    return found


# --- drawing of the relations ------------------------------------------------------------------------------------

CELL = 16  # width of the cells in which the layout looks for collisions; their height is that of a line
SWEEPS = 12
CROSSING = 3  # an edge below one cell of a label costs as much as so many rows of distance
FAR = 15  # rows up and down among which the cheapest is looked for, or as many as it takes to find one free
FEW = 8  # members of a component that is drawn with others of its kind below the large ones


class Graph(NamedTuple):
    """What is drawn. An edge runs from its left end to its right end, which is later, or of the same year and below."""

    ids: list[str]  # by column
    column: dict[str, tuple[int, int]]  # (year, level within the year)
    edges: list[tuple[str, str, str]]  # (type, left end, right end)


def graph(catalog: Catalog, edges: Iterable[Edge], most: int = DRAW) -> Graph:
    """The methods that have drawn relations, at most ``most`` of them, in columns by year."""
    edges = [edge for edge in edges if edge.type in DRAWN]
    degree = Counter(id for edge in edges for id in edge[1:])
    chosen = set(sorted(degree, key=lambda id: -degree[id])[:most])
    edges = [edge for edge in edges if edge.source in chosen and edge.target in chosen]
    joined = {id for edge in edges for id in edge[1:]}
    ids = [id for id in catalog.methods if id in joined]
    year = {id: catalog.methods[id].paper.year for id in ids}
    same = _lists((edge.target, edge.source) for edge in edges if year[edge.target] == year[edge.source])
    order = _postorder(ids, same)
    place = {id: number for number, id in enumerate(order)}
    level = dict.fromkeys(ids, 0)
    for id in reversed(order):
        for child in same.get(id, ()):
            if place[child] < place[id]:
                level[child] = max(level[child], level[id] + 1)
    column = {id: (year[id], level[id]) for id in ids}
    ends = [
        (kind, target, source) if column[target] < column[source] else (kind, source, target)
        for kind, source, target in edges
    ]
    return Graph(sorted(ids, key=lambda id: column[id]), column, ends)


def components(graph: Graph) -> list[list[str]]:
    """Connected parts, the largest first, each in the order of the graph."""
    near = _lists(pair for _, left, right in graph.edges for pair in ((left, right), (right, left)))
    number: dict[str, int] = {}
    for root in graph.ids:
        stack = [root] if root not in number else []
        while stack:
            id = stack.pop()
            if id not in number:
                number[id] = number.get(root, len(number))
                stack += near.get(id, ())
    parts = _lists((str(number[id]), id) for id in graph.ids)
    return sorted(parts.values(), key=len, reverse=True)


def _crossed(x1: float, row1: int, x2: float, row2: int) -> Iterator[tuple[int, int]]:
    """Cells (row, column) of which an edge meets the text.

    The edge is a parabola that leaves the left dot upright and arrives level: at a share t of the way it has gone
    t^2 across and 1 - (1 - t)^2 down.
    """
    drop, across = abs(row2 - row1), x2 - x1
    for step in range(drop + 1):
        start, end = 0.0, 1.0
        if drop:  # text fills the middle 0.72 of its row
            start = (1 - sqrt(1 - max(step - 0.36, 0) / drop)) ** 2
            end = (1 - sqrt(1 - min(step + 0.36, drop) / drop)) ** 2
        row = row1 + step if row2 > row1 else row1 - step
        for cell in range(int((x1 + start * across) / CELL), int((x1 + end * across) / CELL) + 1):
            yield row, cell


def arrange(
    ids: Sequence[str],
    x: Mapping[str, float],
    width: Mapping[str, float],
    edges: Iterable[tuple[str, str, str]],
    floor: float = -inf,
) -> dict[str, int]:
    """A row for each id, at least ``floor``, so that no label overlaps another and edges are short and free.

    Columns are placed from left to right, each id at the free row near the mean of its neighbours where it costs least;
    the next sweep knows the neighbours to the right from the one before. The best sweep counts.

    Args:
        ids: by ascending ``x``, where their dots are. width: of dot and label.
        edges: (type, left end, right end).
    """
    own = set(ids)
    lefts = _lists((right, left) for _, left, right in edges if left in own and right in own)
    rights = _lists((left, right) for right, many in lefts.items() for left in many)
    best: tuple[float, dict[str, int]] = (inf, {})
    rows: dict[str, int] = {}
    for _ in range(SWEEPS):
        total, rows = _sweep(ids, x, width, lefts, rights, rows, floor)
        best = min(best, (total, rows), key=lambda one: one[0])
    return best[1]


def _sweep(
    ids: Sequence[str],
    x: Mapping[str, float],
    width: Mapping[str, float],
    lefts: Mapping[str, Sequence[str]],
    rights: Mapping[str, Sequence[str]],
    before: Mapping[str, int],
    floor: float,
) -> tuple[float, dict[str, int]]:
    """Cost and rows of one sweep. ``before``: the rows of the last one, empty at first."""
    rows: dict[str, int] = {}
    labels: dict[tuple[int, int], str] = {}  # cell -> whose label is there
    lines: Counter[tuple[int, int]] = Counter()  # edges that meet the text of a cell
    total = 0.0
    for _, column in groupby(ids, key=lambda id: x[id]):
        wanted = []
        for id in column:
            known = [rows[one] for one in lefts.get(id, ())]
            known += [before[one] for one in rights.get(id, ()) if one in before]
            wanted.append((sum(known) / len(known) if known else before.get(id, 0), id))
        for middle, id in sorted(wanted):
            cells = range(int((x[id] - 6) / CELL), int((x[id] + width[id]) / CELL) + 1)
            cost, chosen, crossed = inf, 0, []
            for distance in count():
                if distance - 1 >= cost or (distance > FAR and cost < inf):
                    break
                for row in (round(middle) - distance, round(middle) + distance):
                    far = abs(row - middle)
                    if row < floor or far >= cost or any((row, cell) in labels for cell in cells):
                        continue
                    met = [
                        cell
                        for one in lefts.get(id, ())
                        for cell in _crossed(x[one], rows[one], x[id], row)
                        if labels.get(cell) != one
                    ]
                    hurt = sum(cell in labels for cell in met) + sum(lines[row, cell] for cell in cells)
                    if far + CROSSING * hurt < cost:
                        cost, chosen, crossed = far + CROSSING * hurt, row, met
            rows[id] = chosen
            total += cost
            labels.update(((chosen, cell), id) for cell in cells)
            lines.update(crossed)
    return total, rows


def _drawn_edge(type: str, colour: int, ends: str, path: str) -> str:
    return f'<path class="{type} c{colour}" data-ends="{ends}" d="{path}"/>'


def lineage_svg(atlas: Atlas, graph: Graph) -> str:
    """Time from left to right; large components below one another, then the small ones together."""
    methods = atlas.catalog.methods
    held = dict(sorted(Counter(graph.column.values()).items()))
    starts = dict(zip(held, _starts(_widths(list(held.values()), WIDE - 125, 34), 10), strict=False))
    x = {id: starts[graph.column[id]] for id in graph.ids}
    names = _labels((methods[id].name for id in graph.ids), [150] * len(graph.ids))
    label = dict(zip(graph.ids, names, strict=True))
    width = {id: text_width(label[id], TEXT) + 22 for id in graph.ids}
    parts = components(graph)
    areas = [part for part in parts if len(part) >= FEW]
    few = sorted((id for part in parts if len(part) < FEW for id in part), key=lambda id: x[id])
    y: dict[str, float] = {}
    top = 34.0
    notes = []
    for area in [*areas, few] if few else areas:
        if area is few and areas:
            top += 26
            notes.append(f'<text class="note" x="10" y="{top - 8:.0f}">Small groups</text>')
        rows = arrange(area, x, width, graph.edges, 0 if area is few else -inf)
        used = {row: number for number, row in enumerate(sorted(set(rows.values())))}  # empty rows are left out
        y |= {id: top + ROW * (used[row] + 0.5) for id, row in rows.items()}
        top += ROW * len(used) + 12
    bottom = top + 22
    right = max((x[id] + width[id] for id in graph.ids), default=0) + 4
    years = {year: start for (year, level), start in starts.items() if level == 0}
    edge_of = [*list(years.values())[1:], right + 10]
    for number, ((year, start), end) in enumerate(zip(years.items(), edge_of, strict=True)):
        if number % 2:
            notes.append(
                f'<rect class="band" x="{start - 10:.0f}" y="0" width="{end - start:.0f}" height="{bottom:.0f}"/>'
            )
        notes += [f'<text class="year" x="{start - 4:.0f}" y="{at:.0f}">{year}</text>' for at in (18, bottom - 7)]
    number_of = {id: number for number, id in enumerate(graph.ids)}
    curves = [
        _drawn_edge(
            type,
            atlas.colours[methods[newer].family],
            f"{number_of[older]} {number_of[newer]}",
            f"M{x[older]:.0f} {y[older]:.0f}Q{x[older]:.0f} {y[newer]:.0f} {x[newer]:.0f} {y[newer]:.0f}",
        )
        for type, older, newer in graph.edges
    ]
    leaves = [_method_leaf(atlas, id, number_of[id], label[id], x[id], y[id]) for id in graph.ids]
    notes.sort(key=lambda one: not one.startswith("<rect"))
    back = f'<g aria-hidden="true">{"".join(notes)}{"".join(curves)}</g>'
    return _svg([back, *leaves], "wide", "Who builds on whom", right, bottom)


def _method_leaf(atlas: Atlas, id: str, number: int, label: str, x: float, y: float) -> str:
    method = atlas.catalog.methods[id]
    classes = f"leaf c{atlas.colours[method.family]}{' hollow' * (method.snippet is None)}"
    title = f"{method.name} ({method.paper.year}), {atlas.terms['family', method.family].label}"
    return _leaf(f"/methods/{id}/", label, title, classes, x, y, f' data-n="{number}"')


def forest(graph: Graph) -> list[tuple[str, int, str, str]]:
    """Each id once, below the one that it is closest to: (id, depth, id above, type of the edge), in reading order."""
    kinds = list(DRAWN)
    above: dict[str, tuple[str, str]] = {}
    for type, left, right in sorted(graph.edges, key=lambda edge: kinds.index(edge[0])):
        above.setdefault(right, (left, type))
    below = _lists((above[id][0], id) for id in graph.ids if id in above)
    rows = []
    for part in components(graph):
        stack = [(id, 0) for id in reversed(part) if id not in above]
        while stack:
            id, depth = stack.pop()
            rows.append((id, depth, *above.get(id, ("", ""))))
            stack += [(child, depth + 1) for child in reversed(below.get(id, ()))]
    return rows


def lineage_narrow_svg(atlas: Atlas, graph: Graph) -> str:
    """One line for each method, below the one that it is closest to: for a phone."""
    methods = atlas.catalog.methods
    number_of = {id: number for number, id in enumerate(graph.ids)}
    high, place, rails, leaves = 26, {}, [], []
    for row, (id, depth, above, type) in enumerate(forest(graph)):
        x, y = 10.0 + 15 * min(depth, 8), high * (row + 0.5) + 2
        place[id] = x, y
        year = methods[id].paper.year
        label = clip(_short(methods[id].name), TEXT, NARROW - x - 50)
        leaves.append(_method_leaf(atlas, id, number_of[id], label, x, y))
        leaves.append(f'<text class="note" x="{NARROW}" y="{y + 4:.0f}" text-anchor="end">{year}</text>')
        if above:
            left, top = place[above]
            path = f"M{left:.0f} {top:.0f}V{y:.0f}H{x:.0f}"
            colour = atlas.colours[methods[id].family]
            rails.append(_drawn_edge(type, colour, f"{number_of[above]} {number_of[id]}", path))
    parts = [f'<g aria-hidden="true">{"".join(rails)}</g>', *leaves]
    return _svg(parts, "narrow", "Who builds on whom", NARROW, high * len(place) + 4)


def _outline(atlas: Atlas, methods: Iterable[Method], edges: Iterable[Edge]) -> str:
    """Every relation at both of its ends."""
    said: dict[str, dict[str, list[str]]] = {}
    for type, source, target in edges:
        if type in DRAWN:
            said.setdefault(source, {}).setdefault(FORWARD[type].lower(), []).append(target)
            said.setdefault(target, {}).setdefault(BACKWARD[type].lower(), []).append(source)

    def links(ids: Iterable[str]) -> str:
        return ", ".join(link(f"/methods/{id}/", atlas.catalog.methods[id].name) for id in dict.fromkeys(ids))

    items = "".join(
        f"<li>{link(f'/methods/{one.id}/', one.name)} ({one.paper.year}): "
        f"{'; '.join(f'{words} {links(ids)}' for words, ids in said[one.id].items())}</li>"
        for one in methods
        if one.id in said
    )
    return f'<ul class="vx-history-outline">{items}</ul>'


def lineage_page(atlas: Atlas) -> Page:
    methods = atlas.catalog.methods
    edges = relations(atlas.catalog)
    related = {id for edge in edges if edge.type in DRAWN for id in edge[1:]}
    parts = ["<h1>Who extends whom</h1>", _tabs("lineage/")]
    description = "Which method extends, uses or applies which."
    if not related:
        parts.append('<p class="vx-missing">No relation between methods is recorded yet.</p>')
        return Page("lineage/", "Who extends whom", description, "\n".join(parts))
    lone = len(methods) - len({id for edge in edges for id in edge[1:]})
    drawn = graph(atlas.catalog, edges)
    shown = "" if len(drawn.ids) == len(related) else f" The drawing shows the {len(drawn.ids)} with most relations."
    below = _lists((edge.target, edge.source) for edge in edges if edge.type == "extends")
    by_year = sorted(methods.values(), key=lambda one: (one.paper.year, one.name))
    reached = descendants(methods, below)
    top = sorted(below, key=lambda id: (-reached[id], -len(below[id]), methods[id].paper.year))
    samples = "".join(
        f'<li><svg class="vx-history" width="38" height="10" aria-hidden="true"><path class="{type} c0" d="M0 5H38"/>'
        f"</svg>{FORWARD[type].lower()}</li>"
        for type in DRAWN
    )
    parts += [
        f"<p><strong>{len(related)}</strong> of {len(methods)} methods stand in such a relation: one extends, "
        "supersedes, applies or uses the other, or both found the same idea. "
        f"{len(methods) - len(related)} do not, and {lone} of these are not even compared "
        f"with another on record.{shown} A line has the colour of the later method. Every name is a link"
        '<span class="vx-script"> and shows, under the pointer, what it comes from and what came from it</span>.</p>',
        "<div data-search-exclude>",
        lineage_svg(atlas, drawn),
        '<p class="vx-small vx-history-hint">Each method stands once, below the one that it is closest to; the list '
        "below the drawing says all its relations.</p>",
        lineage_narrow_svg(atlas, drawn),
        legend(atlas.catalog),
        f'<ul class="vx-legend">{samples}</ul>',
        _details(_outline(atlas, by_year, edges)),
        "</div>",
        heading(2, "built-upon", "Most built upon"),
    ]
    chain = longest_chain((one.id for one in by_year), below)
    if chain:
        names = ", extended by ".join(link(f"/methods/{id}/", methods[id].name) for id in chain)
        parts.append(
            f"<p>Counted by <em>extends</em> alone. No chain is longer than these {len(chain)} methods: {names}.</p>"
        )
    most = reached[top[0]] if top else 0
    rows = [
        (
            method_link(atlas, id),
            str(methods[id].paper.year),
            str(len(below[id])),
            f'<span class="vx-bar" style="--value:{100 * reached[id] / most:.1f}%">{reached[id]}</span>',
        )
        for id in top[:20]
    ]
    if rows:
        heads = ("Method", "Year", "Extended directly by", "Directly or through others by")
        parts.append(table(heads, rows, "Most built upon"))
        if len(top) > len(rows):
            parts.append(f'<p class="vx-small">The first {len(rows)} of {len(top)} methods that others extend.</p>')
    kinds, sources = Counter(edge.type for edge in edges), _lists((edge.type, edge.source) for edge in edges)
    rows = [
        (
            FORWARD[type].lower(),
            f"The method {meaning}.",
            str(kinds[type]),
            str(len(set(sources.get(type, ())))),
            "yes" if type in DRAWN else "no",
        )
        for type, meaning in COUNTED.items()
    ]
    parts += [
        heading(2, "relations", "Relations by kind"),
        "<p>As the entries say them, between two methods.</p>",
        table(("Relation", "Meaning", "Number", "Methods that say it", "Drawn"), rows, "Relations by kind"),
        '<script src="/assets/lineage.js" defer></script>',
    ]
    return Page("lineage/", "Who extends whom", description, "\n".join(parts))


def render(atlas: Atlas) -> list[Page]:
    """The timeline and the lineage."""
    return [timeline_page(atlas), lineage_page(atlas)]

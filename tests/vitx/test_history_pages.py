"""Timeline and lineage: every method once, in its year; every line a relation of the catalogue; cycles do no harm."""

import random
import re
import runpy
from collections import Counter
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from vitx import catalog, history_pages, pages
from vitx.schema import Catalog, Relation

helpers = runpy.run_path(str(Path(__file__).with_name("test_pages.py")))
tiny, Elements = helpers["tiny"], helpers["Elements"]
SVG = "{http://www.w3.org/2000/svg}"


def atlas_of(read: Catalog) -> pages.Atlas:
    return pages.prepare(read, {}, {}, {})


def related(count: int, relations: list[tuple[int, str, int]], years: list[int] | None = None, nasty: str = "") -> Any:
    """Tiny catalogue of ``count`` methods with relations (source, type, target) and years."""
    full = tiny["catalog"](count, nasty)
    stated: dict[str, tuple[Relation, ...]] = {}
    for source, kind, target in relations:
        said: Any = {"type": kind, "id": f"m-{target}"}
        stated[f"m-{source}"] = (*stated.get(f"m-{source}", ()), Relation(**said))
    methods = {}
    for id, method in full.methods.items():
        number = int(id.removeprefix("m-"))
        year = years[number] if years else method.paper.year
        paper = method.paper.model_copy(update={"year": year})
        methods[id] = method.model_copy(update={"relations": stated.get(id, ()), "paper": paper})
    return full._replace(methods=methods)


def tangled(count: int, seed: int = 0, nasty: str = "") -> Any:
    """Relations of every kind, forwards, backwards, within a year, twice, in circles."""
    draw = random.Random(seed)
    kinds = list(history_pages.COUNTED)
    edges = [
        (source, draw.choice(kinds), target)
        for source in range(count)
        for target in draw.sample(range(count), min(2, count))
        if source != target
    ]
    edges += [(0, "extends", 1), (1, "extends", 2), (2, "extends", 0), (3, "extends", 2), (2, "extends", 3)]
    return related(count, edges, [draw.randint(2013, 2026) for _ in range(count)], nasty)


@pytest.fixture(scope="module", params=["tiny", "tangled", "real"])
def atlas(request: pytest.FixtureRequest) -> pages.Atlas:
    made = {"tiny": lambda: tiny["catalog"](4, ""), "tangled": lambda: tangled(60), "real": catalog.load}
    return atlas_of(made[request.param]())


def drawing(html: str, layout: str) -> ElementTree.Element:
    svg = re.search(rf'<svg class="vx-history vx-history--{layout}".*?</svg>', html, re.DOTALL)
    assert svg
    return ElementTree.fromstring(svg[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def dots(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Address -> centre of its dot."""
    found = {}
    for leaf in svg.iter(f"{SVG}a"):
        circle = leaf.find(f"{SVG}circle")
        if circle is not None:
            href = leaf.get("href", "")
            assert href not in found, "drawn twice"
            found[href] = float(circle.get("cx", "")), float(circle.get("cy", ""))
    return found


def years(atlas: pages.Atlas) -> dict[str, int]:
    entries = {**atlas.catalog.methods, **atlas.catalog.criteria}
    return {atlas.places[id]: one.paper.year for id, one in entries.items() if one.paper}


def timeline(atlas: pages.Atlas) -> str:
    return history_pages.timeline_page(atlas).html


_lineages: list[tuple[pages.Atlas, str]] = []


def lineage(atlas: pages.Atlas) -> str:
    """The page, arranged once for each atlas."""
    for known, html in _lineages:
        if known is atlas:
            return html
    _lineages.append((atlas, history_pages.lineage_page(atlas).html))
    return _lineages[-1][1]


def text(html: str) -> str:
    return re.sub(r"\s+", " ", Elements(html).text)


def boxes(svg: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    found = []
    for rect in (leaf.find(f"{SVG}rect") for leaf in svg.iter(f"{SVG}a")):
        assert rect is not None
        x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


# --- timeline ----------------------------------------------------------------------------------------------------


def test_every_method_stands_once_on_the_timeline_in_each_layout(atlas: pages.Atlas) -> None:
    html = timeline(atlas)
    for layout in ("wide", "narrow"):
        assert dots(drawing(html, layout)).keys() == years(atlas).keys(), layout
    outline = re.search(r'<ul class="vx-history-outline">.*?</ul></li></ul>', html, re.DOTALL)
    assert outline
    links = Elements(outline[0]).all("a", "href")
    assert sorted(links) == sorted(years(atlas))


def test_positions_follow_the_years(atlas: pages.Atlas) -> None:
    html, year = timeline(atlas), years(atlas)
    across = {href: x for href, (x, _) in dots(drawing(html, "wide")).items()}
    down = {href: y for href, (_, y) in dots(drawing(html, "narrow")).items()}
    for one, other in combinations(year, 2):
        if year[one] == year[other]:
            assert across[one] == across[other]
        else:
            first, second = sorted((one, other), key=year.__getitem__)
            assert across[first] < across[second]
            assert down[first] < down[second]


def test_families_are_lanes_that_do_not_mix(atlas: pages.Atlas) -> None:
    placed = dots(drawing(timeline(atlas), "wide"))
    reach = []
    for term in atlas.catalog.taxonomy.families:
        rows = [placed[atlas.places[id]][1] for id, one in atlas.catalog.methods.items() if one.family == term.id]
        reach.append((min(rows), max(rows)))
    for (_, above), (below, _) in pairwise(reach):
        assert above < below


@pytest.mark.parametrize("page", [timeline, lineage])
@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_labels_neither_overlap_nor_leave_the_drawing(atlas: pages.Atlas, page: Any, layout: str) -> None:
    svg = drawing(page(atlas), layout)
    _, _, width, height = (float(value) for value in svg.get("viewBox", "").split())
    found = sorted(boxes(svg), key=lambda box: box[1])
    for place, one in enumerate(found):
        assert one[0] >= -1
        assert one[1] >= 0
        assert one[2] <= width + 1
        assert one[3] <= height
        for other in found[place + 1 :]:
            if other[1] >= one[3] - 0.5:
                break
            assert other[0] >= one[2] - 1 or one[0] >= other[2] - 1, (one, other)


@pytest.mark.parametrize("page", [timeline, lineage])
def test_text_of_the_real_catalogue_is_legible_without_scrolling(page: Any) -> None:
    html = page(atlas_of(catalog.load()))
    width = float(drawing(html, "wide").get("width", ""))
    shrunk = float(re.findall(r"min-width:(\d+)px", html)[0])
    assert history_pages.TEXT * shrunk / width >= 11
    assert shrunk <= 1248, "scrolls sideways in a window of 1280 px"
    assert float(drawing(html, "narrow").get("width", "")) <= 328


def test_labels_are_packed_into_as_few_lines_as_overlap_somewhere() -> None:
    draw = random.Random(1)
    items = sorted((left := draw.randint(0, 90), left + draw.randint(1, 30)) for _ in range(200))
    lines = list(history_pages._packed(items))
    by_line: dict[int, list[tuple[int, int]]] = {}
    for item, line in zip(items, lines, strict=True):
        by_line.setdefault(line, []).append(item)
    for held in by_line.values():
        assert all(one[1] <= other[0] for one, other in pairwise(held))
    assert len(by_line) == max(sum(left <= x < right for left, right in items) for x in range(121))


def test_the_numbers_of_the_timeline_are_counted_from_the_catalogue(atlas: pages.Atlas) -> None:
    html, methods = timeline(atlas), atlas.catalog.methods.values()
    per_year = Counter(one.paper.year for one in methods)
    said = text(html)
    busiest = max(sorted(per_year), key=per_year.__getitem__)
    assert f"The first of the {len(methods)} methods is of {min(per_year)}, the latest of {max(per_year)};" in said
    assert f"the busiest year is {busiest} with {per_year[busiest]}." in said
    assert f"{sum(one.in_survey == 'no' for one in methods)} became public only after the survey" in said
    table = html.partition("<table")[2]
    rows = [
        [text(cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]
    ]
    families = [term.id for term in atlas.catalog.taxonomy.families]
    for year, row in zip(sorted(per_year), rows[:-1], strict=True):
        counts = [sum((one.family, one.paper.year) == (family, year) for one in methods) for family in families]
        assert row == [str(year), *(str(n or "") for n in counts), str(sum(counts))]
    assert rows[-1] == [
        "All",
        *(str(sum(one.family == family for one in methods)) for family in families),
        str(len(methods)),
    ]


def test_bars_are_as_tall_as_their_numbers() -> None:
    chart = history_pages.stacked_svg([2020, 2021], [("a", "c1", [3, 0]), ("b", "c2", [1, 2])], "Bars")
    tall = {
        (colour, said): float(height)
        for colour, height, said in re.findall(r'<rect class="(c\d)".*?height="([\d.]+)"><title>(.*?)</title>', chart)
    }
    assert tall.keys() == {("c1", "2020, a: 3"), ("c2", "2020, b: 1"), ("c2", "2021, b: 2")}
    unit = tall["c2", "2020, b: 1"]
    assert tall["c1", "2020, a: 3"] == pytest.approx(3 * unit)
    assert tall["c2", "2021, b: 2"] == pytest.approx(2 * unit)


# --- lineage -----------------------------------------------------------------------------------------------------


def stated(read: Catalog) -> set[tuple[str, str, str]]:
    return {(one.type, method.id, one.id) for method in read.methods.values() for one in method.relations}


def lines(svg: ElementTree.Element) -> list[tuple[str, str, str]]:
    """(type, id of the first end, id of the second end) of each line."""
    ids = {leaf.get("data-n"): leaf.get("href", "").split("/")[2] for leaf in svg.iter(f"{SVG}a")}
    found = []
    for path in svg.iter(f"{SVG}path"):
        older, newer = path.get("data-ends", "").split()
        found.append((path.get("class", "").split()[0], ids[older], ids[newer]))
    return found


def test_every_line_is_a_relation_and_no_drawn_relation_is_missing(atlas: pages.Atlas) -> None:
    relations = {one for one in stated(atlas.catalog) if one[0] in history_pages.DRAWN}
    either_way = {(kind, *sorted(ends)) for kind, *ends in relations}
    drawn = lines(drawing(lineage(atlas), "wide"))
    assert {(kind, *sorted(ends)) for kind, *ends in drawn} == either_way
    assert len(drawn) == len(relations)
    # On a phone each method but the first of a tree hangs on one of its own relations.
    hung = lines(drawing(lineage(atlas), "narrow"))
    assert {(kind, *sorted(ends)) for kind, *ends in hung} <= either_way
    assert len({newer for _, _, newer in hung}) == len(hung)


def test_every_kind_of_relation_is_drawn_or_counted() -> None:
    kinds = set(Relation.model_fields["type"].annotation.__args__)  # type: ignore[union-attr]
    assert history_pages.COUNTED.keys() == kinds
    assert kinds - history_pages.DRAWN.keys() == {"compares-with"}


def test_lines_are_drawn_from_dot_to_dot_and_from_the_earlier_year_to_the_later(atlas: pages.Atlas) -> None:
    for layout in ("wide", "narrow"):
        svg = drawing(lineage(atlas), layout)
        place = {href.split("/")[2]: at for href, at in dots(svg).items()}
        for (_, older, newer), path in zip(lines(svg), svg.iter(f"{SVG}path"), strict=True):
            methods = atlas.catalog.methods
            assert methods[older].paper.year <= methods[newer].paper.year
            numbers = [float(one) for one in re.findall(r"-?[\d.]+", path.get("d", ""))]
            assert tuple(numbers[:2]) == place[older]
            x, y = place[newer]
            assert numbers[-1] == (y if layout == "wide" else x)
            if layout == "wide":
                assert place[older][0] < x
            else:
                assert place[older][1] < y


def test_dots_of_the_lineage_stand_in_the_order_of_their_years(atlas: pages.Atlas) -> None:
    year = years(atlas)
    placed = sorted(dots(drawing(lineage(atlas), "wide")).items(), key=lambda one: one[1][0])
    assert [year[href] for href, _ in placed] == sorted(year[href] for href, _ in placed)


def test_only_methods_with_a_drawn_relation_are_in_the_drawing(atlas: pages.Atlas) -> None:
    html, relations = lineage(atlas), stated(atlas.catalog)
    related = {id for kind, *ends in relations if kind != "compares-with" for id in ends}
    for layout in ("wide", "narrow"):
        assert {href.split("/")[2] for href in dots(drawing(html, layout))} == related
    methods, said = atlas.catalog.methods, text(html)
    assert f"{len(related)} of {len(methods)} methods stand in such a relation" in said
    lone = len(methods) - len({id for _, *ends in relations for id in ends})
    assert f"{len(methods) - len(related)} do not, and {lone} of these" in said
    for kind in history_pages.COUNTED:
        number = sum(one[0] == kind for one in relations)
        sources = len({source for one, source, _ in relations if one == kind})
        words = pages.FORWARD[kind].lower()
        row = re.search(rf'<tr><th scope="row">{words}</th><td>.*?</td><td>(\d+)</td><td>(\d+)</td>', html)
        assert row
        assert (int(row[1]), int(row[2])) == (number, sources), kind


def test_the_list_says_every_drawn_relation_at_both_ends(atlas: pages.Atlas) -> None:
    outline = re.search(r'<ul class="vx-history-outline">(.*?)</ul>', lineage(atlas), re.DOTALL)
    assert outline
    said = set()
    for item in re.findall(r"<li>(.*?)</li>", outline[1]):
        own = re.findall(r'href="/methods/([^/]+)/', item)[0]
        for part in item.partition("): ")[2].split("; "):
            words = text(part.partition("<a")[0]).strip()
            said |= {(own, words, other) for other in re.findall(r'href="/methods/([^/]+)/', part)}
    expected = set()
    for kind, source, target in stated(atlas.catalog):
        if kind in history_pages.DRAWN:
            expected |= {(source, pages.FORWARD[kind].lower(), target), (target, pages.BACKWARD[kind].lower(), source)}
    assert said == expected


# --- counting ----------------------------------------------------------------------------------------------------


def closure(below: dict[str, list[str]], id: str) -> set[str]:
    """Everything below ``id``, by walking; itself left out."""
    seen: set[str] = set()
    queue = [id]
    while queue:
        for child in below.get(queue.pop(), ()):
            if child not in seen:
                seen.add(child)
                queue.append(child)
    return seen - {id}


@pytest.mark.parametrize("seed", range(20))
def test_descendants_are_those_of_a_walk_also_with_cycles(seed: int) -> None:
    draw = random.Random(seed)
    ids = [str(n) for n in range(40)]
    below: dict[str, list[str]] = {}
    for _ in range(draw.randint(10, 90)):
        below.setdefault(draw.choice(ids), []).append(draw.choice(ids))  # circles, doubles and loops among them
    counted = history_pages.descendants(ids, below)
    assert counted == {id: len(closure(below, id)) for id in ids}


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_chain_is_the_longest_of_all_paths(seed: int) -> None:
    draw = random.Random(seed)
    ids = [str(n) for n in range(7)]
    below: dict[str, list[str]] = {}
    for older, newer in combinations(ids, 2):
        if draw.random() < 0.3:
            below.setdefault(older, []).append(newer)
    chain = history_pages.longest_chain(draw.sample(ids, 7), below)
    assert all(newer in below[older] for older, newer in pairwise(chain))
    longest = max(
        len(path)
        for size in range(1, 8)
        for path in permutations(ids, size)
        if all(newer in below.get(older, ()) for older, newer in pairwise(path))
    )
    assert len(chain) == longest


@pytest.mark.parametrize("count", [1, 2, 3, 5000])
def test_a_circle_of_extensions_ends(count: int) -> None:
    ids = [str(n) for n in range(count)]
    below = {id: [ids[(n + 1) % count]] for n, id in enumerate(ids)}
    assert set(history_pages.descendants(ids, below).values()) == {count - 1}
    assert len(history_pages.longest_chain(ids, below)) == count


def test_circles_of_one_year_and_of_several_are_drawn() -> None:
    circle = [(0, "extends", 1), (1, "extends", 2), (2, "extends", 0), (3, "uses", 3), (4, "extends", 0)]
    for dates in ([2020] * 6, [2020, 2021, 2022, 2023, 2019, 2020]):
        atlas = atlas_of(related(6, circle, dates))
        drawn = lines(drawing(lineage(atlas), "wide"))
        assert len(drawn) == 4, "all but the method that uses itself"
        assert len({id for _, *ends in drawn for id in ends}) == 4
        ranked = re.findall(
            r'<tr><th scope="row">.*?/methods/(m-\d)/.*?<td>(\d+)</td><td><span[^>]*>(\d+)<', lineage(atlas)
        )
        assert sorted(ranked) == [("m-0", "2", "3"), ("m-1", "1", "3"), ("m-2", "1", "3")]


def test_most_built_upon_is_ranked_by_all_descendants(atlas: pages.Atlas) -> None:
    below: dict[str, list[str]] = {}
    for kind, source, target in sorted(stated(atlas.catalog)):
        if kind == "extends":
            below.setdefault(target, []).append(source)
    html = lineage(atlas)
    ranked = re.findall(r'<tr><th scope="row">.*?/methods/([^/]+)/.*?<td>(\d+)</td><td><span[^>]*>(\d+)<', html)
    assert len(ranked) == min(20, len(below))
    assert all((int(direct), int(every)) == (len(below[id]), len(closure(below, id))) for id, direct, every in ranked)
    numbers = [int(every) for _, _, every in ranked]
    assert numbers == sorted((len(closure(below, id)) for id in below), reverse=True)[:20]
    chain = re.findall(
        r'href="/methods/([^/]+)/', html.partition("No chain is longer than these ")[2].partition("</p>")[0]
    )
    assert all(newer in below[older] for older, newer in pairwise(chain))
    assert f"No chain is longer than these {len(chain)} methods:" in html


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_huge_graph_is_drawn_in_part_and_the_page_says_so() -> None:
    star = [(n, "extends", 0) for n in range(1, 40)] + [(n, "uses", n - 1) for n in range(2, 20)]
    read = related(41, star)
    some = history_pages.graph(read, history_pages.relations(read), 10)
    assert len(some.ids) == 10
    assert "m-0" in some.ids
    assert {id for _, *ends in some.edges for id in ends} == set(some.ids)
    count = history_pages.DRAW + 20
    atlas = atlas_of(related(count, [(n, "extends", n // 2) for n in range(1, count)]))
    html = lineage(atlas)
    assert f"The drawing shows the {history_pages.DRAW} with most relations." in html
    assert len(dots(drawing(html, "wide"))) == history_pages.DRAW
    assert len(re.findall("<li>", html.partition("vx-history-outline")[2].partition("</ul>")[0])) == count


def test_a_long_chain_neither_recurses_nor_leaves_the_phone() -> None:
    read = related(80, [(n, "extends", n - 1) for n in range(1, 80)], [2020] * 80)
    svg = drawing(lineage(atlas_of(read)), "narrow")
    assert all(0 < x < 160 for x, _ in dots(svg).values())


def test_pages_grow_in_proportion_to_methods() -> None:
    for page in (timeline, lineage):
        sizes = [
            len(page(atlas_of(related(n, [(one, "compares-with", 0) for one in range(1, n)] + [(1, "uses", 0)]))))
            for n in (400, 800, 1600)
        ]
        assert sizes[2] - sizes[1] <= 2.2 * (sizes[1] - sizes[0]) + 100


def test_hostile_text_in_any_field_shows_as_text() -> None:
    for page in history_pages.render(atlas_of(tangled(30, nasty=tiny["NASTY"]))):
        plain = {one.path: one for one in history_pages.render(atlas_of(tangled(30)))}[page.path]
        parsed, expected = Elements(page.html), Elements(plain.html)
        assert not parsed.faults
        assert not {name for _, attributes in parsed.tags for name in attributes if name.startswith("on")}
        # The same elements as with harmless text; shapes stand elsewhere, for labels are longer.
        kinds = [Counter(tag for tag, _ in one.tags) for one in (parsed, expected)]
        assert kinds[0] == kinds[1]
        assert "<img src=x" in parsed.text
        for layout in ("wide", "narrow"):
            tags = {element.tag.removeprefix(SVG) for element in drawing(page.html, layout).iter()}
            assert tags <= {"svg", "g", "a", "title", "rect", "circle", "path", "text"}
        for address in parsed.all("a", "href"):
            assert re.match(r"https://|/|#", address), address
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_catalogues_without_methods_or_relations_have_both_pages() -> None:
    full = tiny["catalog"](4, "")
    for read in (full._replace(methods={}), full._replace(methods={}, criteria={}), related(4, [])):
        for page in history_pages.render(atlas_of(read)):
            assert not Elements(page.html).faults
    assert "No entry yet." in timeline(atlas_of(full._replace(methods={})))
    assert "No relation between methods" in lineage(atlas_of(related(4, [(1, "compares-with", 0)])))


def test_short_names_lose_what_explains_them_and_stay_apart() -> None:
    short = {
        "Class-Discriminative Attention Maps (CDAM)": "CDAM",
        "CRATE (white-box transformer)": "CRATE",
        "Explain Any Concept (SAM)": "Explain Any Concept",
        "ViT (a) and (b)": "ViT (a) and (b)",
        "(x)": "(x)",
        "plain": "plain",
    }
    assert {name: history_pages._short(name) for name in short} == short
    names = ["Generic attention explainability on a DETR", "Generic attention explainability for a tower", "TAM"]
    labels = history_pages._labels(names, [110] * 3)
    assert len(set(labels)) == 3
    assert all(history_pages.text_width(label, history_pages.TEXT) <= 111 for label in labels)

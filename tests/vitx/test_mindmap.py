"""The mind map: every node a link, nothing overlaps, nothing is too small to read, hostile labels stay text."""

import re
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from vitx import mindmap
from vitx.mindmap import Node

tiny = runpy.run_path(str(Path(__file__).parents[1] / "site" / "tiny.py"))
SVG = "{http://www.w3.org/2000/svg}"
AXES: tuple[mindmap.Axis, ...] = ("family", "motivation", "task", "year", "needs")


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def nodes(tree: Node) -> list[Node]:
    return [tree, *(below for child in tree.children for below in nodes(child))]


def rectangles(svg: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of every node."""
    found = []
    for rect in svg.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


@pytest.fixture(params=[4, 12, 204], ids="{} methods".format)
def catalog(request: pytest.FixtureRequest) -> Any:
    return tiny["catalog"](request.param, "")


@pytest.mark.parametrize("by", AXES)
def test_every_node_is_a_link_with_its_own_name(catalog: Any, by: mindmap.Axis) -> None:
    tree = mindmap.tree(catalog, by)
    links = list(parse(mindmap.svg(tree)).iter(f"{SVG}a"))
    expected = sorted((node.href, node.title or node.label) for node in nodes(tree))
    assert sorted((link.get("href"), link.findtext(f"{SVG}title")) for link in links) == expected
    assert all(link.findtext(f"{SVG}text") for link in links)


@pytest.mark.parametrize("by", AXES)
def test_every_method_hangs_under_all_its_terms_and_no_other(catalog: Any, by: mindmap.Axis) -> None:
    expected = []
    for method in catalog.methods.values():
        terms = {
            "family": (method.family,),
            "motivation": method.motivation.terms,
            "task": method.tasks,
            "year": (str(method.paper.year),),
            "needs": method.needs,
        }[by]
        twig = method.subfamily if by == "family" else method.family
        expected += [(term, f"{term}.{twig}", f"/methods/{method.id}/") for term in terms]
    found = [
        (branch.id, twig.id, leaf.href)
        for branch in mindmap.tree(catalog, by).children
        for twig in branch.children
        for leaf in twig.children
    ]
    assert sorted(found) == sorted(expected)


def test_years_run_from_the_newest_to_the_oldest(catalog: Any) -> None:
    years = [int(branch.label) for branch in mindmap.tree(catalog, "year").children]
    assert years == sorted({method.paper.year for method in catalog.methods.values()}, reverse=True)


@pytest.mark.parametrize("by", AXES)
def test_branches_lead_to_their_methods(catalog: Any, by: mindmap.Axis) -> None:
    """Branch and twig of every axis but the families: the browse page, filtered to what hangs below."""
    for branch in mindmap.tree(catalog, by).children:
        for twig in branch.children:
            below = {leaf.href for leaf in twig.children}
            if by == "family":
                assert branch.href == f"/families/{branch.id}/"
                assert twig.href == f"{branch.href}#{twig.id.partition('.')[2]}"
                continue
            query = parse_qs(urlsplit(twig.href).query)
            assert query.pop("family") == [twig.id.partition(".")[2]]
            assert query == parse_qs(urlsplit(branch.href).query)
            assert query == ({"from": [branch.id], "to": [branch.id]} if by == "year" else {by: [branch.id]})
            assert {catalog.methods[href.split("/")[-2]].family for href in below} == {twig.id.partition(".")[2]}


@pytest.mark.parametrize("by", AXES)
def test_nodes_neither_overlap_nor_leave_the_drawing(catalog: Any, by: mindmap.Axis) -> None:
    svg = parse(mindmap.svg(mindmap.tree(catalog, by)))
    left, top, width, height = (float(value) for value in svg.get("viewBox", "").split())
    boxes = sorted(rectangles(svg), key=lambda box: box[1])
    for box in boxes:
        assert left <= box[0] < box[2] <= left + width
        assert top <= box[1] < box[3] <= top + height
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            if other[1] >= one[3] - 0.5:
                break
            assert other[0] >= one[2] or one[0] >= other[2], (one, other)


def test_text_stays_legible() -> None:
    catalog = tiny["catalog"](204, " with a rather long name")
    for by in AXES:
        wide = mindmap.svg(mindmap.tree(catalog, by))
        width = float(parse(wide).get("width", ""))
        shrunk = float(re.findall(r"min-width:(\d+)px", wide)[0])
        assert min(mindmap.SIZE) * shrunk / width >= 11
        assert shrunk <= 1248, "scrolls sideways in a window of 1280 px"


def test_a_long_label_is_cut_and_stays_whole_in_its_title() -> None:
    name = "An extraordinarily long name of a method that no map has the room to show in full"
    tree = Node("root", "/", (Node("branch", "/b/", (Node(name, "/m/"),)),))
    link = next(a for a in parse(mindmap.svg(tree)).iter(f"{SVG}a") if a.get("href") == "/m/")
    shown = link.findtext(f"{SVG}text") or ""
    assert link.findtext(f"{SVG}title") == name
    assert shown.endswith("…")
    assert name.startswith(shown[:-1])


def test_hostile_and_foreign_labels_stay_text() -> None:
    label = tiny["NASTY"]
    tree = Node(label, '/"><script>/', (Node(label, "/a/", (Node("注意力回滚", "/b/", id=label),), title="t" + label),))
    svg = parse(mindmap.svg(tree))  # well-formed, so nothing broke out of its attribute
    tags = {element.tag.removeprefix(SVG) for element in svg.iter()}
    assert tags <= {"svg", "g", "a", "title", "rect", "circle", "path", "text"}
    assert "注意力回滚" in ElementTree.tostring(svg, "unicode")
    outline = ElementTree.fromstring(mindmap.outline(tree))
    assert {element.tag for element in outline.iter()} == {"ul", "li", "a"}
    assert {name for element in outline.iter() for name in element.attrib} <= {"class", "href", "title", "data-id"}


@pytest.mark.parametrize("by", AXES)
def test_the_outline_is_the_same_tree(catalog: Any, by: mindmap.Axis) -> None:
    tree = mindmap.tree(catalog, by)

    def read(item: ElementTree.Element) -> tuple:
        link = item.find("a")
        assert link is not None
        return link.text, link.get("href"), tuple(map(read, item.findall("ul/li")))

    def expected(node: Node) -> tuple:
        return node.label, node.href, tuple(map(expected, node.children))

    root = ElementTree.fromstring(mindmap.outline(tree)).find("li")
    assert root is not None
    assert read(root) == expected(tree)
    drawn = sorted(a.get("href", "") for a in parse(mindmap.svg(tree)).iter(f"{SVG}a"))
    assert drawn == sorted(a.get("href", "") for a in root.iter("a"))


@pytest.mark.parametrize("by", AXES)
def test_the_outline_says_what_the_script_needs(catalog: Any, by: mindmap.Axis) -> None:
    """Level, colour and hollow as classes; ids that are unique and name what is above them; no title said twice."""
    tree = mindmap.tree(catalog, by)
    items = list(ElementTree.fromstring(mindmap.outline(tree)).iter("li"))
    ids = [item.get("data-id") for item in items]
    kept = [id for id in ids if id]
    assert len(kept) == len(set(kept)) == sum(bool(node.id) for node in nodes(tree))
    for item, node in zip(items, nodes(tree), strict=True):
        link = item.find("a")
        assert link is not None
        assert link.get("title", link.text) == node.title
        classes = item.get("class", "").split()
        assert f"c{node.colour}" in classes
        assert ("hollow" in classes) == node.hollow
        level = next(int(name[1:]) for name in classes if name.startswith("l"))
        assert level == (3 if node.href.startswith("/methods/") else (node.id.count(".") + 1) if node.id else 0)
        assert bool(item.get("data-id")) == (0 < level < 3)
        for child in item.findall("ul/li"):
            assert not node.id or not child.get("data-id") or child.get("data-id", "").startswith(node.id + ".")


def test_the_overview_counts_the_methods_that_it_leaves_out(catalog: Any) -> None:
    tree = mindmap.tree(catalog, "family")
    small = mindmap.overview(tree)
    assert not [node for node in nodes(small) if node.href.startswith("/methods/")]
    counted = sum(
        int(twig.label.rpartition("(")[2].rstrip(")")) for branch in small.children for twig in branch.children
    )
    assert counted == len(catalog.methods)


def test_the_overview_does_not_grow_with_its_methods() -> None:
    roots = [mindmap.overview(mindmap.tree(tiny["catalog"](n, ""), "family")) for n in (12, 204)]
    few, many = (len(mindmap.drawing(root) + mindmap.outline(root)) for root in roots)
    assert many - few < 100  # digits


def test_a_method_without_a_snippet_is_hollow() -> None:
    catalog = tiny["catalog"](4, "")
    hollow = {node.href for node in nodes(mindmap.tree(catalog, "family")) if node.hollow}
    assert hollow == {"/methods/m-3/"}
    assert mindmap.svg(mindmap.tree(catalog, "family")).count(" hollow") == 1


def test_both_sides_are_about_equally_tall() -> None:
    leaves = tuple(Node("x", "/x/") for _ in range(10))
    branches = tuple(Node(str(n), "/b/", (Node("t", "/t/", leaves),)) for n in range(4))
    svg = parse(mindmap.svg(Node("root", "/", branches)))
    lefts = sum(rect[2] < 0 for rect in rectangles(svg))
    assert lefts == 2 * (1 + 1 + 10)


def test_an_empty_catalogue_still_has_its_families() -> None:
    catalog = tiny["catalog"](4, "")._replace(methods={})
    svg = parse(mindmap.svg(mindmap.tree(catalog, "family")))
    assert [a.get("href") for a in svg.iter(f"{SVG}a")] == [
        "/families/",
        "/families/attribution/",
        "/families/attention/",
    ]
    parse(mindmap.svg(mindmap.tree(catalog, "task")))


def test_the_drawing_grows_in_proportion_to_its_methods() -> None:
    sizes = [len(mindmap.svg(mindmap.tree(tiny["catalog"](n, ""), "family"))) for n in (200, 400, 800)]
    steps = [later - earlier for earlier, later in pairwise(sizes)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.1)


def test_estimated_widths() -> None:
    assert mindmap.text_width("注意", 10) > mindmap.text_width("mm", 10) > mindmap.text_width("ii", 10) > 0
    assert mindmap.clip("short", 13, 200) == "short"
    cut = mindmap.clip("a long name (with brackets)", 13, 90)
    assert mindmap.text_width(cut, 13) <= 90
    assert cut == "a long name…"


def test_a_nine_family_taxonomy_reuses_colours() -> None:
    families = tuple(
        term.model_copy(update={"id": f"f{n}"}) for n, term in enumerate(tiny["catalog"](4, "").taxonomy.families * 5)
    )
    catalog = tiny["catalog"](4, "")
    catalog = catalog._replace(taxonomy=catalog.taxonomy.model_copy(update={"families": families}))
    assert list(mindmap.family_colours(catalog).values()) == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]

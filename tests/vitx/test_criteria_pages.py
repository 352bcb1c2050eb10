"""Pages of criteria and the benchmark: what was measured stands there, what goes in as text comes out as text."""

import re
import runpy
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from vitx import benchmark_pages, criteria_pages, markup, pages

helpers = runpy.run_path(str(Path(__file__).with_name("test_pages.py")))
tiny, Elements, prepared = helpers["tiny"], helpers["Elements"], helpers["prepared"]
INSERTS = [f"{kind}-glyph" for kind in criteria_pages._BENCHMARK] + ["scale"]


def every_page(atlas: pages.Atlas) -> list[pages.Page]:
    made = [criteria_pages.criterion_page(atlas, id, "<p>code</p>") for id in atlas.catalog.criteria]
    inserts = [pages.Page(name, name, "", criteria_pages.insert(atlas, name)) for name in INSERTS]
    return [*criteria_pages.render(atlas), *made, *inserts]


def text(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


@pytest.mark.parametrize("page", every_page(prepared(nasty=tiny["NASTY"])), ids=lambda page: page.path)
def test_hostile_text_in_any_field_shows_as_text(page: pages.Page) -> None:
    plain = {page.path: page for page in every_page(prepared())}[page.path]
    parsed, expected = Elements(page.html), Elements(plain.html)
    assert not parsed.faults
    assert not {name for _, attributes in parsed.tags for name in attributes if name.startswith("on")}
    count = {tag: sum(one == tag for one, _ in parsed.tags) for tag, _ in parsed.tags}
    usual = {tag: sum(one == tag for one, _ in expected.tags) for tag, _ in expected.tags}
    assert {tag: n for tag, n in count.items() if tag != "a"} == {tag: n for tag, n in usual.items() if tag != "a"}
    for address in parsed.all("a", "href"):
        assert re.match(r"https://|/|#", address), address
    if page.path not in ("curves-glyph", "ranks-glyph"):  # these show ids alone
        assert "<img src=x" in parsed.text


def test_pages_have_balanced_html_unique_ids_and_links_that_lead_somewhere() -> None:
    atlas = prepared()
    written = {"/benchmark/", "/coverage/", "/about/", "/cost/", "/criteria/"} | set(atlas.places.values())
    for page in every_page(atlas):
        parsed = Elements(page.html)
        assert not parsed.faults, page.path
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), page.path
        if page.path.endswith("/"):
            assert page.html.count("<h1") == 1
        for link in parsed.all("a", "href"):
            place = re.sub(r"[?#].*", "", link)
            if link.startswith("/") and not link.startswith(("/snippets/", "/assets/")):
                assert place in written, (page.path, link)
    anchors = Elements(criteria_pages.criteria_page(atlas).html).tags
    assert {"faithfulness", "cost", "correct"} <= {attributes.get("id") for _, attributes in anchors}


def test_a_criterion_page_holds_the_entry() -> None:
    atlas = prepared()._replace(reads={"deletion": ("relevance", "most_first", "target", "new_thing")})
    html = criteria_pages.criterion_page(atlas, "deletion", "<p>the executed code</p>").html
    for expected in (
        "Faithfulness",
        "Lower is better",
        "On 0",
        "quantus.X",
        "the map; predictions as patches are hidden, most relevant first; new thing",
        "Unknown. Older than the survey",
        'evaluate.measure("deletion"',
        "the executed code",
        "1.0e-9",
        "Uses",
        "@article{deletion",
        "seen",
        "Note.",
    ):
        assert expected in text(html), expected
    assert 'href="/criteria/insertion/"' in html, "the relation, and the code span of the definition"
    assert 'href="/methods/m-0/"' in html
    assert "Used by" in criteria_pages.criterion_page(atlas, "insertion", None).html


def test_a_criterion_without_code_says_why() -> None:
    html = criteria_pages.criterion_page(prepared(), "human-study", None).html
    assert "It needs people." in html
    assert "evaluate.measure" not in html
    assert "@article" not in html


def test_index_says_what_is_computed_in_one_sentence() -> None:
    shown = text(criteria_pages.criteria_page(prepared()).html)
    assert "4 ways to judge an explanation, 3 of them run here" in shown
    assert "away." in shown
    assert "Then see" not in shown


@pytest.mark.parametrize(
    ("definition", "first"),
    [
        ("One. Two.", "One."),
        ("Scaled to 0 ... 1, as $a. B$ says. Two.", "Scaled to 0 ... 1, as $a. B$ says."),
        ("From 0.1 to 0.9\nby tenths.\n\nTwo.", "From 0.1 to 0.9\nby tenths."),
        ("No stop", "No stop"),
    ],
)
def test_first_sentence(definition: str, first: str) -> None:
    assert criteria_pages._first_sentence(definition) == first


def test_reads_names_the_parameters_before_the_star() -> None:
    source = "import torch\ndef other(x): ...\ndef score(relevance, most_first, *, steps=3):\n    return relevance\n"
    assert criteria_pages.reads(source) == ("relevance", "most_first")
    assert criteria_pages.reads("x = 1") == ()


# --- the benchmark -----------------------------------------------------------------------------------------------


def cells(html: str) -> dict[str, list[str]]:
    """Row of the table of scores -> HTML of its cells."""
    rows = re.findall(r'<tr [^>]*data-id="([^"]+)"[^>]*>(.*?)</tr>', html)
    return {id: re.findall(r"<td[^>]*>.*?</td>", row) for id, row in rows}


def test_scores_hold_means_intervals_and_what_chance_gives() -> None:
    html = criteria_pages.insert(prepared(), "scores-glyph")
    found = cells(html)
    assert list(found) == ["m-0", "m-1", "random", "object-mask"], "what the catalogue does not know is left out"
    assert found["m-0"] == [  # deletion, insertion, pointing game
        '<td data-v="0.188 0.375 128 0"><b>0.25</b></td>',  # the lowest deletion of a method
        '<td data-v="0.188 0.375 128 0.5"><i>0.25</i></td>',  # p = 0.5
        '<td data-v="0.188 0.375 128 0"><b>0.25</b></td>',
    ]
    assert found["m-1"][1] == '<td data-v="0.438 0.625 128 0"><b>0.5</b></td>'
    assert found["m-1"][2] == "<td></td>", "a mean that does not exist is a gap"
    assert found["object-mask"][1] == '<td data-v="0.938 1.12 128">1</td>', "baselines are never the best"
    heads = [attributes for tag, attributes in Elements(html).tags if tag == "th" and "data-better" in attributes]
    assert [(head["data-id"], head["data-better"]) for head in heads] == [
        ("deletion", "down"),
        ("insertion", "up"),
        ("pointing-game", "up"),
    ]
    assert {head["data-category"] for head in heads} == {"faithfulness", "cost"}
    assert "passes 12800" in text(html)


def test_maps_behind_a_method_are_linked() -> None:
    atlas = prepared()
    atlas = atlas._replace(figures={"maps-m-1": markup.Figure("/assets/figures/maps-m-1.jpg", 9, 3)})
    html = criteria_pages.insert(atlas, "scores-glyph")
    assert html.count("vx-maps-link") == 1
    assert 'href="/assets/figures/maps-m-1.jpg"' in html


def test_charts_show_known_methods_and_baselines() -> None:
    atlas = prepared()
    made = {name: criteria_pages.insert(atlas, name) for name in INSERTS}
    counts = {"curves": 2, "ranks": 1, "pareto": 2, "agreement": 2, "cascade": 1}
    for kind, count in counts.items():
        assert made[f"{kind}-glyph"].count("<svg") == count, kind
        assert made[f"{kind}-glyph"].count("<figcaption>") == count, kind
    for kind in ("curves", "ranks", "pareto", "cascade"):
        assert "gone" not in made[f"{kind}-glyph"], kind
    assert "Random map" in made["curves-glyph"]
    insertion = made["curves-glyph"].partition("Insertion")[2]
    assert insertion.index("m-0") < insertion.index("m-1"), "m-0 has the better mean rank"
    deletion, insertion = re.findall(r'class="line" d="([^"]+)"', made["curves-glyph"])[1::4]  # of m-1, the second line
    (start, *_, end) = [float(point.split()[1]) for point in insertion[1:].split("L")]
    assert start > end, "insertion begins with nothing visible, where the probability is 0, and rises"
    (start, *_, end) = [float(point.split()[1]) for point in deletion[1:].split("L")]
    assert start < end, "deletion falls"
    assert made["pareto-glyph"].count(">1 m-0<") == 2


def test_a_ranking_stands_on_the_criterions_page_where_it_was_measured() -> None:
    atlas = prepared()
    html = criteria_pages.criterion_page(atlas, "insertion", "").html
    names = [name for name in re.findall(r"<text[^>]*>([^<]*)</text>", html) if name in ("m-0", "m-1", "Random map")]
    assert names == ["m-1", "m-0", "Random map"], "best first"
    lower = benchmark_pages.ranking(atlas, "glyph", "deletion")
    assert lower.index(">Random map</text>") < lower.index(">m-0</text>") < lower.index(">m-1</text>")
    assert '<g class="c1 hollow"><text' in html.replace("\n", ""), "m-0 is not shown to be better than random"
    assert "Mean ranks over" in criteria_pages.criterion_page(atlas, "deletion", "").html
    assert "Mean ranks over" not in html
    bare = prepared(results={})
    assert "What it says of the methods" not in criteria_pages.criterion_page(bare, "insertion", "").html


def test_skipped_says_why_once_for_all_methods() -> None:
    shown = text(criteria_pages.insert(prepared(), "skipped-glyph"))
    assert shown.count("nobody to ask") == 1
    assert re.search(r"Human-Study all nobody to ask", shown)
    assert "failed: it broke" in shown
    assert "failed: it went" in shown


@pytest.mark.parametrize("name", [*INSERTS, "scores-caltech101"])
def test_what_was_not_measured_says_the_command(name: str) -> None:
    said = criteria_pages.insert(prepared(results={}), name)
    assert "Not measured yet." in said
    assert "vitx bench --" in said


def test_a_result_without_a_part_says_so() -> None:
    results: dict[str, Any] = {"benchmark-glyph": {"methods": ["m-0"], "rows": [], "provenance": {}}}
    atlas = prepared(results=results)
    for kind in ("curves", "ranks", "pareto", "agreement", "cascade"):
        assert "holds no such numbers" in criteria_pages.insert(atlas, f"{kind}-glyph"), kind
    assert "Nothing was skipped" in criteria_pages.insert(atlas, "skipped-glyph")


def test_unknown_inserts_are_refused_and_the_others_still_work() -> None:
    atlas = prepared()
    for name in ("nonsense", "scores-nonsense", "scores"):
        with pytest.raises(KeyError):
            criteria_pages.insert(atlas, name)
    assert "methods" in criteria_pages.insert(atlas, "counts")


def test_scale_multiplies_what_was_measured() -> None:
    """Two methods of 3.1 passes, 1 s for a pass; the benchmark took 12,800 passes for 128 pictures."""
    html = criteria_pages.insert(prepared(), "scale")
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)[1:]]
    assert rows[0][1:] == ["6", "9.3e5", "258", "0.26"]  # 6.2 x 150,000 = 930,000 passes of 1 s: 258 hours
    assert rows[2][1:] == ["100", "1.5e7", "4,167", "4.2"]  # 100 x 150,000 passes; at 1,000 a second 4.17 hours
    assert "assumption and was not measured" in html


def test_settings_that_are_not_the_default_are_named() -> None:
    shown = text(criteria_pages.insert(prepared(), "scores-glyph"))
    assert re.search(r"Not at default settings: .{0,9}Method 1 \(steps=3\) ?\.", shown)

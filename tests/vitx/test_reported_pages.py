"""The page and the sections of what papers report: text stays text, like stands by like, nothing claims too much."""

import re
import runpy
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from vitx import ATLAS, catalog, pages, reported_pages

helpers = runpy.run_path(str(Path(__file__).with_name("test_pages.py")))
tiny, Elements, prepared = helpers["tiny"], helpers["Elements"], helpers["prepared"]


def page(atlas: pages.Atlas | None = None) -> str:
    [made] = reported_pages.render(atlas or prepared())
    assert made.path == "reported/"
    return made.html


def method_html(nasty: str = "", id: str = "m-0", results: Any = None) -> str:
    return pages.method_page(prepared(nasty=nasty, results=results), id, None).html


def section(html: str) -> str:
    """What stands under the heading of a method's page."""
    return re.split(r"<h2", html.split('<h2 id="reported"')[1])[0]


def text(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html))).strip()


def rows(html: str) -> list[list[str]]:
    return [
        [text(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", html)
    ]


def real() -> pages.Atlas:
    citation = catalog.parse((ATLAS / "CITATION.cff").read_text(encoding="utf-8"))[0].data
    return pages.prepare(catalog.load(), {}, {}, citation)


def benchmark(model: str, data: str, rows: tuple[tuple[str, str, float | None], ...] = ()) -> dict[str, Any]:
    return {
        "provenance": {"model": model, "data": {"name": data}},
        "rows": [{"method": method, "criterion": criterion, "mean": mean} for method, criterion, mean in rows],
    }


# --- safety ------------------------------------------------------------------------------------------------------


def test_hostile_text_in_any_field_shows_as_text() -> None:
    nasty = tiny["NASTY"]
    for made, plain in ((page(prepared(nasty=nasty)), page()), (method_html(nasty), method_html())):
        parsed, usual = Elements(made), Elements(plain)
        assert not parsed.faults
        assert not {key for _, attributes in parsed.tags for key in attributes if key.startswith("on")}
        count = [
            {tag: sum(one == tag for one, _ in of.tags) for tag, _ in of.tags if tag != "a"} for of in (parsed, usual)
        ]
        assert count[0] == count[1]
        for address in parsed.all("a", "href"):
            assert re.match(r"https://|/|#", address), address
        assert parsed.text.count("<img src=x") > 15


@pytest.mark.parametrize("prepare", [prepared, real])
def test_the_page_has_balanced_html_unique_ids_and_links_that_lead_somewhere(prepare: Any) -> None:
    atlas = prepare()
    parsed = Elements(page(atlas))
    assert not parsed.faults
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for address in parsed.all("a", "href"):
        assert address.startswith(("https://", "#")) or address in {"/benchmark/", *atlas.places.values()}, address
    for made in (pages.method_page(atlas, id, None) for id in atlas.catalog.methods):
        assert not Elements(made.html).faults, made.path


def test_a_catalogue_without_numbers_says_so() -> None:
    full = tiny["catalog"](nasty="")
    bare = {id: method.model_copy(update={"reported": ()}) for id, method in full.methods.items()}
    html = page(pages.prepare(full._replace(methods=bare), {}, {}, {}))
    assert "No number was found yet." in text(html)
    assert "<table" not in html


# --- the section of a method ---------------------------------------------------------------------------------------


def test_a_method_page_shows_its_numbers_with_their_places() -> None:
    assert rows(section(method_html())) == [
        ["Metric", "Value", "Model", "Data", "Where seen"],
        ["Del. AUC Here: Deletion", "0.25", "Model 0", "Glyph", "Table 1 Seen in: code.example/a&b"],
        ["Top 1", "79.8 %", "Model 1", "ImageNet", "Table 1 Seen in: github:some/code:README.md"],
        ["Del. AUC Here: Deletion", "12345.5", "Model 2", "Glyph", "Table 1 Seen in: seen By others."],
    ]
    addresses = Elements(section(method_html())).all("a", "href")
    assert {"https://code.example/a&b", "https://github.com/some/code", "/criteria/deletion/"} <= {*addresses}
    assert 'id="reported"' not in method_html(id="m-1")


def test_a_method_page_leads_to_the_criteria_that_are_measured_here() -> None:
    said = "our own numbers, on the benchmark page and with deletion , are of other models"
    assert said in text(section(method_html())).lower()
    missing = benchmark("m", "d", (("m-0", "deletion", None), ("m-0", "insertion", 0.5)))
    for results in (
        {},
        {"benchmark-glyph": missing},
        {"glyph-benchmark": benchmark("m", "d", (("m-0", "deletion", 1.0),))},
    ):
        shown = text(section(method_html(results=results))).lower()
        assert "on the benchmark page , are of other models" in shown


# --- the page of all -----------------------------------------------------------------------------------------------


def test_like_stands_by_like() -> None:
    html = page()
    assert "3 numbers of 1 method, copied" in text(html)
    assert re.findall(r'<h2 id="([^"]+)"', html) == ["deletion", "others"]
    deletion, others = html.split('<h2 id="others"')
    assert [row[:5] for row in rows(deletion)[1:]] == [
        ["Method 0", "Del. AUC", "0.25", "Model 0", "Glyph"],
        ["Method 0", "Del. AUC", "12345.5", "Model 2", "Glyph"],
    ]
    assert [row[1:3] for row in rows(others)[1:]] == [["Top 1", "79.8 %"]]
    assert {row[-1] for row in rows(html)} == {"Reproduced here", "other model and data"}


def test_rows_of_a_criterion_stand_by_data_then_metric_then_model() -> None:
    full = tiny["catalog"](nasty="")
    [one, *_] = full.methods["m-0"].reported
    orders = [("b", "x", "m"), ("A", "y", "m"), ("a", "X", "n"), ("a", "x", "M")]
    mixed = tuple(one.model_copy(update={"data": d, "metric": m, "model": n}) for d, m, n in orders)
    methods = full.methods | {"m-0": full.methods["m-0"].model_copy(update={"reported": mixed})}
    html = page(pages.prepare(full._replace(methods=methods), {}, {}, {}))
    assert [(row[4], row[1], row[3]) for row in rows(html)[1:]] == [orders[3], orders[2], orders[1], orders[0]]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({}, "other model and data"),
        ({"benchmark-a": benchmark("other", "elsewhere")}, "other model and data"),
        ({"benchmark-a": benchmark("MODEL-0", "elsewhere")}, "other data"),
        ({"benchmark-a": benchmark("other", "glyph!")}, "other model"),
        ({"benchmark-a": benchmark("model 0", "x"), "benchmark-b": benchmark("y", "Glyph")}, "other data"),
        ({"benchmark-a": benchmark("model_0", "GLYPH")}, "same model and data, but not this number"),
        (
            {"benchmark-a": benchmark("model0", "Glyph", (("m-0", "insertion", 0.5), ("m-1", "deletion", 0.5)))},
            "same model and data, but not this number",
        ),
        (
            {"benchmark-a": benchmark("model0", "Glyph", (("m-0", "deletion", None),))},
            "same model and data, but not this number",
        ),
        ({"benchmark-a": benchmark("model0", "Glyph", (("m-0", "deletion", 0.125),))}, "yes: 0.125"),
        ({"glyph": benchmark("model0", "Glyph", (("m-0", "deletion", 0.125),))}, "other model and data"),
        ({"benchmark-a": {"rows": []}}, "other model and data"),
    ],
)
def test_only_a_number_of_the_same_model_and_data_reproduces(results: dict[str, Any], expected: str) -> None:
    method = tiny["catalog"](nasty="").methods["m-0"]
    atlas = prepared(results=results)
    assert reported_pages.reproduced(atlas, method, method.reported[0]) == expected


def test_names_without_letters_are_the_same_as_none() -> None:
    method = tiny["catalog"](nasty="").methods["m-0"]
    one = method.reported[0].model_copy(update={"model": "-", "data": "?"})
    atlas = prepared(results={"benchmark-a": benchmark("", "!"), "benchmark-b": {"provenance": {}}})
    assert reported_pages.reproduced(atlas, method, one) == "other model and data"


# --- the catalogue -------------------------------------------------------------------------------------------------


def test_every_number_of_the_catalogue_names_where_it_was_seen() -> None:
    methods = catalog.load().methods.values()
    for method in methods:
        places = [(one.metric, one.model, one.data, one.where, one.note) for one in method.reported]
        assert len(places) == len(set(places)), f"{method.id} has two numbers that only their value tells apart"
        for one in method.reported:
            assert re.match(r"https://|github:[\w-]+/[\w.-]+:\S|GitHub code index, file [0-9]+: \S", one.source), (
                f"{method.id}: {one.source}"
            )
            if one.unit == "%":
                assert -100 <= one.value <= 100, f"{method.id}: {one.metric}"

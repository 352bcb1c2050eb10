"""The browse page as text: every facet of the form on every row, what is searched, nothing unescaped."""

import re
import runpy
from pathlib import Path

from vitx import browse_pages

helpers = runpy.run_path(str(Path(__file__).with_name("test_pages.py")))
tiny, Elements, prepared = helpers["tiny"], helpers["Elements"], helpers["prepared"]


def rows(parsed) -> list[dict[str, str]]:
    return [attributes for tag, attributes in parsed.tags if tag == "tr" and "data-family" in attributes]


def test_hostile_text_shows_as_text() -> None:
    (page,) = browse_pages.render(prepared(nasty=tiny["NASTY"]))
    (plain,) = browse_pages.render(prepared())
    parsed, expected = Elements(page.html), Elements(plain.html)
    assert not parsed.faults
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in expected.tags]
    assert not {name for _, attributes in parsed.tags for name in attributes if name.startswith("on")}
    assert "<img src=x" in parsed.text
    assert tiny["NASTY"] in rows(parsed)[0]["data-text"]


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    atlas = prepared()
    (page,) = browse_pages.render(atlas)
    parsed = Elements(page.html)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.html.count("<h1") == 1
    files = {f"/catalog.{kind}" for kind in ("json", "csv", "bib", "csl.json")}
    links = {re.sub(r"[?#].*", "", link) for link in parsed.all("a", "href")}
    assert links <= {"/contributing/", *files, *atlas.places.values()}
    assert files <= links


def test_rows_carry_every_facet_of_the_form() -> None:
    (page,) = browse_pages.render(prepared(8))
    parsed = Elements(page.html)
    facets = {
        a["name"] for tag, a in parsed.tags if tag == "input" and a.get("type") == "checkbox" and a["name"] != "only"
    }
    assert len(rows(parsed)) == 8
    values = {(a["name"], a["value"]) for tag, a in parsed.tags if tag == "input" and "value" in a}
    for row in rows(parsed):
        for facet in facets:
            for value in (row[f"data-{facet}"] or "").split():
                assert (facet, value) in values


def test_every_column_can_be_named_in_an_address() -> None:
    (page,) = browse_pages.render(prepared())
    parsed = Elements(page.html)
    keys = [attributes.get("data-key") for tag, attributes in parsed.tags if tag == "th" and "scope" in attributes]
    columns = [key for key in keys if key]
    assert len(columns) == len(set(columns)) == len(keys) - len(rows(parsed))
    assert all(re.fullmatch("[a-z]+", key) for key in columns), "a minus in front means the other way round"


def test_fields_outside_the_form_belong_to_it() -> None:
    (page,) = browse_pages.render(prepared())
    parsed = Elements(page.html)
    (form,) = [attributes["id"] for tag, attributes in parsed.tags if tag == "form"]
    assert {a["name"] for tag, a in parsed.tags if tag == "input" and a.get("form") == form} == {"text", "only"}


def test_the_page_grows_linearly_and_slowly() -> None:
    sizes = [len(browse_pages.render(prepared(count))[0].html) for count in (100, 200, 400)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    assert (sizes[2] - sizes[1]) / 200 < 1500, "characters for a method"

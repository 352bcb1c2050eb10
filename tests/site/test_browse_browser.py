"""The browse page in Chromium: search, sort, pick, share, save; by keyboard, without scripts, from a folder."""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from vitx import cite, export
from vitx.schema import Method


@pytest.fixture
def content(site: Path) -> Any:
    """The catalogue as the site serves it."""
    return json.loads((site / "catalog.json").read_text(encoding="utf-8"))


@pytest.fixture
def methods(content: Any) -> dict[str, Method]:
    return {one["id"]: Method.model_validate_json(json.dumps(one)) for one in content["methods"]}


@pytest.fixture
def browse(site: Path, serve: Any, open_page: Any) -> Callable[..., Any]:
    """browse(query, ...) -> the page at that address."""
    return lambda query="", **options: open_page(f"{serve(site)}/browse/{query}", **options)


def shown(page: Any) -> list[str]:
    """Ids of the visible rows, in their order."""
    return page.locator(".vx-methods tbody tr").evaluate_all(
        "rows => rows.filter(row => row.checkVisibility()).map(row => row.dataset.id)"
    )


def pick(page: Any, *ids: str) -> None:
    for id in ids:
        page.locator(f'tr[data-id="{id}"] input').check()


def query(page: Any) -> dict[str, list[str]]:
    return parse_qs(page.evaluate("location.search").removeprefix("?"))


def folded(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.category(c).startswith("M"))
    for letter, meant in {"ł": "l", "ø": "o", "đ": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe"}.items():
        plain = plain.lower().replace(letter, meant)
    return plain


def found(content: Any, *words: str) -> list[str]:
    """Ids of the methods that a search for the words must find."""
    taxonomy = content["taxonomy"]
    labels = {
        name: {term["id"]: term["label"] for term in taxonomy[name]}
        for name in ("families", "subfamilies", "motivations", "tasks", "needs", "outputs")
    }

    def text(one: Any) -> str:
        paper = one["paper"]
        values = [one["id"], one["name"], paper["title"], *paper["authors"], str(paper["year"]), one["in_survey"]]
        values += [paper["venue"] or "", paper["arxiv"] or "", paper["doi"] or ""]
        values += [one["family"], one["subfamily"], one["output"], "yes" if one["snippet"] else "no"]
        values += [*one["motivation"]["terms"], *one["tasks"], *one["needs"]]
        values += [labels["families"][one["family"]], labels["subfamilies"][one["subfamily"]]]
        values += [labels["motivations"][id] for id in one["motivation"]["terms"]]
        values += [labels["tasks"][id] for id in one["tasks"]] + [labels["needs"][id] for id in one["needs"]]
        values += [labels["outputs"][one["output"]], {True: "yes", False: "no", None: "unknown"}[one["class_specific"]]]
        return folded(" ".join(values))

    return [one["id"] for one in content["methods"] if all(folded(word) in text(one) for word in words)]


# --- search --------------------------------------------------------------------------------------------------------


def test_all_words_must_be_found_somewhere(browse: Any, content: Any) -> None:
    one = content["methods"][1]
    words = [one["paper"]["title"].split()[-1].upper(), one["paper"]["authors"][0].split(",")[0].split()[0].lower()]
    expected = found(content, *words)
    assert one["id"] in expected
    page = browse()
    page.locator("[name=text]").fill("  ".join(words))
    assert shown(page) == expected
    assert query(page)["text"] == ["  ".join(words)]
    page.reload()
    assert page.locator("[name=text]").input_value() == "  ".join(words)
    assert shown(page) == expected
    page.locator("[name=text]").fill(f"{words[0]} nowheretobefound")
    assert shown(page) == []
    assert page.locator(".vx-count").inner_text() == f"0 of {len(content['methods'])} methods"


def test_accents_and_capitals_do_not_matter(browse: Any, content: Any) -> None:
    names = [name for one in content["methods"] for name in one["paper"]["authors"]]
    families = [name.split(",")[0] for name in names] + ["é"]  # of the tiny atlas only the hostile text has an accent
    name = next(name for name in families if not name.isascii() and folded(name).isascii())
    page = browse()
    for written in (name, folded(name), name.upper()):
        page.locator("[name=text]").fill(written)
        assert shown(page) == found(content, *written.split())
        assert shown(page)


@pytest.mark.parametrize("field", ["id", "name", "title", "venue", "arxiv", "family", "needs"])
def test_every_field_is_searched(browse: Any, content: Any, field: str) -> None:
    taxonomy = content["taxonomy"]
    one = next(one for one in reversed(content["methods"]) if one["paper"]["arxiv"] and one["paper"]["venue"])
    labels = {term["id"]: term["label"] for term in [*taxonomy["families"], *taxonomy["needs"]]}
    text = one | one["paper"] | {"family": labels[one["family"]], "needs": labels[one["needs"][0]]}
    page = browse()
    page.locator("[name=text]").fill(text[field])
    assert one["id"] in shown(page)
    assert shown(page) == found(content, *text[field].split())


def test_counts_beside_boxes_know_the_search(browse: Any, content: Any) -> None:
    one = content["methods"][0]
    page = browse(f"?text={one['id']}")
    expected = found(content, one["id"])
    family = page.locator("label", has=page.locator(f'input[name="family"][value="{one["family"]}"]'))
    same = [other for other in content["methods"] if other["id"] in expected and other["family"] == one["family"]]
    assert family.locator("output").inner_text() == str(len(same))


# --- sort ----------------------------------------------------------------------------------------------------------


def test_a_head_sorts_up_then_down_then_as_catalogued(browse: Any, methods: dict[str, Method]) -> None:
    page = browse()
    head = page.locator("th[data-key=year]")
    for state, way, order in (
        ("ascending", "year", sorted(methods, key=lambda id: methods[id].paper.year)),
        ("descending", "-year", sorted(methods, key=lambda id: methods[id].paper.year, reverse=True)),
        (None, None, list(methods)),
    ):
        head.locator("button").click()
        assert shown(page) == order
        assert head.get_attribute("aria-sort") == state
        assert query(page).get("sort") == (way and [way])
        assert page.locator("th[aria-sort]").count() == (state is not None)
        page.reload()
        assert shown(page) == order
        assert head.get_attribute("aria-sort") == state
    head.locator("button").click()
    page.locator("th[data-key=name] button").click()  # another column starts upwards
    names = page.locator(".vx-methods tbody th a").all_inner_texts()
    collated = page.evaluate("names => names.toSorted(new Intl.Collator('en', {numeric: true}).compare)", names)
    assert names == collated
    assert page.locator("th[aria-sort]").count() == 1


# --- pick and share ------------------------------------------------------------------------------------------------


def test_a_selection_is_shared_by_its_address(browse: Any, open_page: Any, methods: dict[str, Method]) -> None:
    first, *_, last = methods
    page = browse("?sort=-name")
    pick(page, last, first)
    assert query(page)["ids"] == [f"{first},{last}"]
    assert page.locator(".vx-count").inner_text() == f"{len(methods)} methods, 2 picked"
    assert page.locator(".vx-chosen").inner_text() == "the 2 picked"
    page.locator("[name=only]").check()
    expected = shown(page)
    assert set(expected) == {first, last}

    page.evaluate("document.addEventListener('copy', () => (window.copied = document.activeElement.value), true)")
    page.locator(".vx-copy").click()
    assert page.locator(".vx-said").inner_text() == "Link copied."
    link = page.evaluate("window.copied")
    assert link == page.evaluate("location.href") == page.locator(".vx-address").input_value()

    other = open_page(link)  # a browser that knows nothing of the first
    assert shown(other) == expected
    assert other.locator(f'tr[data-id="{first}"] input').is_checked()
    assert other.locator("th[data-key=name]").get_attribute("aria-sort") == "descending"
    other.locator(".vx-clear").click()
    assert len(shown(other)) == len(methods)
    assert query(other) == {"sort": ["-name"]}
    assert other.locator("[name=only]").is_disabled()


def test_clearing_the_filters_keeps_what_was_picked(browse: Any, methods: dict[str, Method]) -> None:
    first, second, *_ = methods
    page = browse(f"?text=nowheretobefound&from=1&ids={second},{first}&family=none")
    assert shown(page) == []
    page.locator(".vx-facets button[type=reset]").click()
    page.wait_for_function("!location.search.includes('text=')")
    assert len(shown(page)) == len(methods)
    assert query(page) == {"ids": [f"{first},{second}"]}


def test_nonsense_in_the_address_is_ignored(browse: Any, methods: dict[str, Method]) -> None:
    page = browse("?sort=%3Cimg%20src=x%3E&ids=constructor,%3Cb%3E,,&only=picked&text=%20")
    assert shown(page) == list(methods)
    assert page.locator("th[aria-sort]").count() == 0
    assert page.locator(".vx-count").inner_text() == f"{len(methods)} methods"


# --- save ----------------------------------------------------------------------------------------------------------


def saved(page: Any, format: str) -> str:
    with page.expect_download() as download:
        page.locator(f'[data-save="{format}"]').click()
    assert download.value.suggested_filename == f"vitx-selection.{format}"
    return Path(download.value.path()).read_bytes().decode()


def files(entries: list[Method]) -> dict[str, str]:
    """What each button must save: the same as `vitx cite`, and a byte order mark before the CSV."""
    return {
        "csv": "\ufeff" + export.csv_text(entries),
        "bib": cite.bibtex(entries),
        "csl.json": cite.csl_json(entries),
    }


def shared(methods: dict[str, Method]) -> list[str]:
    """Two methods that rest on one paper, the later one first."""
    last: dict[str, str] = {}
    for id, method in methods.items():
        key = cite.paper_key(method)
        if key in last:
            return [id, last[key]]
        last[key] = id
    raise AssertionError("no two methods share a paper")


def test_what_is_shown_is_saved_in_that_order(browse: Any, methods: dict[str, Method]) -> None:
    page = browse("?sort=-year")
    assert page.locator("script[src*='selection.js']").count() == 0, "loaded before anybody asked"
    order = shown(page)
    expected = files([methods[id] for id in order])
    for format, text in expected.items():
        assert saved(page, format) == text
    assert page.locator("script[src*='selection.js']").count() == 1


def test_what_is_picked_is_saved_though_hidden(browse: Any, methods: dict[str, Method]) -> None:
    later, earlier = shared(methods)
    other = next(id for id in methods if id not in (later, earlier))
    page = browse(f"?ids={other},{earlier},{later}&text=nowheretobefound")
    assert page.locator(".vx-chosen").inner_text() == "the 3 picked"
    order = [id for id in methods if id in (later, earlier, other)]
    for format, text in files([methods[id] for id in order]).items():
        assert saved(page, format) == text
    assert "  ids = {" in files([methods[id] for id in order])["bib"], "the shared paper is cited once"

    page.locator(".vx-clear").click()
    page.locator('[data-save="bib"]').click()
    assert page.locator(".vx-said").inner_text() == "There is nothing to save."


def test_a_script_that_does_not_load_is_said_and_asked_for_again(browse: Any, methods: dict[str, Method]) -> None:
    page = browse()
    page.route("**/selection.js", lambda route: route.abort("aborted"))
    page.locator('[data-save="bib"]').click()
    page.locator(".vx-said", has_text="could not be loaded").wait_for()
    page.unroute("**/selection.js")
    assert saved(page, "bib") == files(list(methods.values()))["bib"]


def test_saving_and_sharing_work_from_a_folder(site: Path, open_page: Any, methods: dict[str, Method]) -> None:
    first, *_, last = methods
    page = open_page(site.as_uri() + "/browse/index.html")
    page.locator("[name=text]").fill(methods[last].id)
    assert last in shown(page)
    pick(page, last)
    page.locator("[name=text]").fill("")
    pick(page, first)
    page.locator("th[data-key=year] button").click()
    for format, text in files([methods[id] for id in shown(page) if id in (first, last)]).items():
        assert saved(page, format) == text
    other = open_page(page.locator(".vx-address").input_value())
    assert shown(other) == shown(page)
    assert other.locator(".vx-chosen").inner_text() == "the 2 picked"


# --- ways to read --------------------------------------------------------------------------------------------------


def test_by_keyboard_alone(browse: Any, methods: dict[str, Method]) -> None:
    page = browse()
    seen = []

    def tab_to(selector: str) -> None:
        for _ in range(150):
            page.keyboard.press("Tab")
            state = "(element, selector) => [element.matches(selector), getComputedStyle(element).outlineStyle]"
            there, outline = page.locator(":focus").evaluate(state, selector)
            if there:
                seen.append(outline)
                return
        pytest.fail(f"{selector} cannot be reached with the Tab key")

    id = list(methods)[-1]
    tab_to("[name=text]")
    page.keyboard.type(id)
    assert id in shown(page)
    assert len(shown(page)) < len(methods)
    tab_to("[data-save=bib]")
    order = shown(page)
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert Path(download.value.path()).read_text() == cite.bibtex([methods[id] for id in order])
    tab_to("th[data-key=year] button")
    page.keyboard.press("Space")
    assert page.locator("th[data-key=year]").get_attribute("aria-sort") == "ascending"
    assert page.locator("th[data-key=year] button").evaluate("button => button === document.activeElement")
    tab_to("tbody input")
    page.keyboard.press("Space")
    assert query(page)["ids"] == [shown(page)[0]]
    assert all(outline != "none" for outline in seen), "the focus must be visible"


def test_names_of_fields_and_buttons(browse: Any, methods: dict[str, Method]) -> None:
    page = browse()
    for role, name in (
        ("searchbox", "Search"),
        ("textbox", "Link"),
        ("checkbox", "only picked"),
        ("button", "Year"),
        ("button", "CSL-JSON"),
    ):
        assert page.locator(".vx-browse").get_by_role(role, name=name, exact=True).count() == 1, name
    assert page.get_by_role("checkbox", name=re.compile("^Pick ")).count() == len(methods)


def test_without_scripts_the_table_is_complete(browse: Any, methods: dict[str, Method], site: Path) -> None:
    page = browse(java_script_enabled=False)
    assert page.locator(".vx-methods tbody tr").count() == len(methods)
    for selector in (".vx-facets", ".vx-choose"):
        assert not page.locator(selector).is_visible()
    assert page.locator(".vx-browse :is(button, input):visible").count() == 0
    assert page.get_by_text("search, sorting and saving").is_visible()
    links = [link.get_attribute("href") for link in page.locator(".vx-browse a[href*='/catalog.']").all()]
    assert links == [f"../catalog.{kind}" for kind in ("json", "csv", "bib", "csl.json")]
    for link in links:
        assert (site / "browse" / link).is_file()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_does_not_scroll_sideways(browse: Any, methods: dict[str, Method], width: int) -> None:
    page = browse(f"?ids={','.join(methods)}", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for button in page.locator(".vx-choose button").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width

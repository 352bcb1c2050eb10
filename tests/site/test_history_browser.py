"""Timeline and lineage in Chromium: wide and on a phone, ancestors light up, nothing is lost without a script."""

import json
from pathlib import Path
from typing import Any

import pytest

PLACES = ("timeline/", "lineage/")


@pytest.fixture(scope="session")
def methods(atlas_site: Path) -> dict[str, Any]:
    content = json.loads((atlas_site / "catalog.json").read_text(encoding="utf-8"))
    return {method["id"]: method for method in content["methods"]}


@pytest.fixture(scope="session")
def home(atlas_site: Path, serve: Any) -> str:
    return serve(atlas_site) + "/"


def kin(methods: dict[str, Any], start: str) -> set[str]:
    """``start``, its ancestors, its descendants, and those of the same idea as itself."""
    later: dict[str, set[str]] = {}
    earlier: dict[str, set[str]] = {}
    found = {start}
    for id, method in methods.items():
        for relation in method["relations"]:
            ends = {id, relation["id"]}
            if relation["type"] == "same-idea-as" and start in ends:
                found |= ends
            elif relation["type"] in ("extends", "supersedes", "applies", "uses"):
                later.setdefault(relation["id"], set()).add(id)
                earlier.setdefault(id, set()).add(relation["id"])
    for near in (later, earlier):
        queue, seen = [start], {start}
        while queue:
            new = near.get(queue.pop(), set()) - seen
            seen |= new
            queue += new
        found |= seen
    return found


def lit(page: Any) -> set[str]:
    links = page.locator(".vx-history--wide.vx-lit a.vx-on")
    return set(links.evaluate_all("links => links.map((link) => link.getAttribute('href').split('/').at(-2))"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("width", "layout"), [(1280, "wide"), (1440, "wide"), (360, "narrow")])
def test_one_layout_is_shown_legible_and_within_the_window(
    home: str, open_page: Any, methods: dict[str, Any], place: str, width: int, layout: str
) -> None:
    page = open_page(home + place, width=width)
    drawing = page.locator(".vx-history--wide:visible, .vx-history--narrow:visible")
    assert drawing.count() == 1
    assert f"vx-history--{layout}" in drawing.get_attribute("class")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = drawing.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width, "the drawing scrolls sideways"
    smallest = drawing.evaluate(
        """svg => Math.min(...[...svg.querySelectorAll('a.leaf text')]
            .map((text) => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a))"""
    )
    assert smallest >= 11
    wide = drawing.evaluate(
        """svg => [...svg.querySelectorAll('a')]
            .filter((a) => a.querySelector('text').getBBox().width > a.querySelector('rect').getBBox().width)
            .map((a) => a.textContent)"""
    )
    assert not wide, "labels wider than the room kept for them"
    link = drawing.locator("a.leaf").last
    id = link.get_attribute("href").split("/")[-2]
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{id}/**")


def test_ancestors_and_descendants_light_up_under_the_pointer_and_the_focus(
    home: str, open_page: Any, methods: dict[str, Any]
) -> None:
    page = open_page(home + "lineage/")
    svg = page.locator(".vx-history--wide")
    ids = svg.locator("a").evaluate_all("links => links.map((link) => link.getAttribute('href').split('/').at(-2))")
    assert not lit(page)
    most = max(ids, key=lambda id: len(kin(methods, id)))
    for id in (most, ids[0], ids[-1]):
        svg.locator(f'a[href="../methods/{id}/index.html"] circle').hover()
        assert lit(page) == kin(methods, id), id
        assert lit(page) < set(ids)
    page.mouse.move(2, 2)
    page.wait_for_function("!document.querySelector('.vx-lit')")
    svg.locator(f'a[href="../methods/{most}/index.html"]').focus()
    assert lit(page) == kin(methods, most)
    page.keyboard.press("Tab")
    assert lit(page) != kin(methods, most)
    page.locator(".vx-tabs a").first.focus()
    assert not lit(page)


@pytest.mark.parametrize("place", PLACES)
def test_without_a_script_pages_are_complete(home: str, open_page: Any, methods: dict[str, Any], place: str) -> None:
    page = open_page(home + place, java_script_enabled=False)
    assert page.locator(".vx-history--wide").is_visible()
    page.locator(".vx-history-list summary").click()
    assert page.locator(".vx-history-outline").is_visible()
    drawn, listed = (
        {one.get_attribute("href") for one in page.locator(f"{where} a[href*='/methods/']").all()}
        for where in (".vx-history--wide", ".vx-history-outline")
    )
    assert drawn == listed
    assert page.get_by_text("under the pointer").count() == 0 or not page.get_by_text("under the pointer").is_visible()
    page.locator(".vx-tabs a", has_text="Timeline" if place == "lineage/" else "Who extends whom").click()
    page.wait_for_url(f"**/{'timeline' if place == 'lineage/' else 'lineage'}/**")


def test_both_work_from_a_folder(atlas_site: Path, open_page: Any) -> None:
    page = open_page((atlas_site / "lineage" / "index.html").as_uri())
    page.locator(".vx-history--wide a circle").first.hover()
    assert lit(page)
    page.locator(".vx-tabs a", has_text="Timeline").click()
    page.wait_for_url("file://**/timeline/index.html")
    page.locator(".vx-history--wide a.leaf").first.click()
    page.wait_for_url("file://**/methods/**/index.html")


@pytest.mark.parametrize("place", PLACES)
def test_hostile_text_fits_a_phone_and_runs_nothing(tiny_site: Path, serve: Any, open_page: Any, place: str) -> None:
    page = open_page(f"{serve(tiny_site)}/{place}", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("article img[src='x']").count() == 0


def test_the_script_is_small_and_served_as_it_is(site: Path) -> None:
    script = (site / "assets" / "lineage.js").read_text()
    assert len(script) < 6000
    assert script == (Path(__file__).resolve().parents[2] / "docs" / "assets" / "lineage.js").read_text()

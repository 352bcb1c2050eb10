"""The page of coverage in Chromium, what built pages say to machines, and the addresses of renamed entries."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

SCRIPT = re.compile(r'<script type="application/ld\+json">(.*?)</script>', re.DOTALL)


def served(site: Path, name: str) -> Any:
    return json.loads((site / name).read_text(encoding="utf-8"))


# --- JSON-LD -----------------------------------------------------------------------------------------------------


def test_every_page_of_an_entry_describes_it_once(site: Path) -> None:
    content = served(site, "catalog.json")
    for folder, entries in (("methods", content["methods"]), ("criteria", content["criteria"])):
        for entry in entries:
            html = (site / folder / entry["id"] / "index.html").read_text(encoding="utf-8")
            assert html.count("application/ld+json") == 1, entry["id"]
            head = html.partition("</head>")[0]
            (text,) = SCRIPT.findall(head)
            assert not re.search("[<>&\u2028\u2029]", text), entry["id"]
            graph = json.loads(text)["@graph"]
            article = graph[0]
            assert article["@type"] == "TechArticle"
            assert (article["name"], article["identifier"]) == (entry["name"], entry["id"])
            papers = [node for node in graph if node["@type"] == "ScholarlyArticle"]
            assert [node["name"] for node in papers] == ([entry["paper"]["title"]] if entry["paper"] else [])
            codes = [node for node in graph if node["@type"] == "SoftwareSourceCode"]
            assert len(codes) == (entry["snippet"] is not None), entry["id"]


def test_the_home_page_offers_files_that_are_there(site: Path) -> None:
    (text,) = SCRIPT.findall((site / "index.html").read_text(encoding="utf-8"))
    dataset = next(node for node in json.loads(text)["@graph"] if node["@type"] == "Dataset")
    names = [one["name"] for one in dataset["distribution"]]
    assert {"catalog.json", "catalog.csv", "catalog.bib"} <= set(names)
    for name in names:
        assert (site / name).is_file(), name
    (text,) = SCRIPT.findall((site / "vocabulary" / "index.html").read_text(encoding="utf-8"))
    assert {node["@type"] for node in json.loads(text)["@graph"]} == {"DefinedTermSet"}


# --- renamed entries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [True, False])
def test_a_former_address_leads_to_the_entry(tiny_site: Path, serve: Any, open_page: Any, script: bool) -> None:
    page = open_page(serve(tiny_site) + "/methods/m-uno/", java_script_enabled=script)
    page.wait_for_url("**/methods/m-1/index.html")
    assert page.locator("h1").inner_text().startswith("Method 1")


def test_a_former_address_leads_to_the_entry_in_a_folder(tiny_site: Path, open_page: Any) -> None:
    page = open_page((tiny_site / "methods" / "m-one" / "index.html").as_uri())
    page.wait_for_url("**/methods/m-1/index.html")
    canonical = (tiny_site / "methods" / "m-one" / "index.html").read_text(encoding="utf-8")
    assert '<link rel="canonical"' in canonical


# --- coverage ----------------------------------------------------------------------------------------------------


def test_marks_lead_to_what_to_write(tiny_site: Path, serve: Any, open_page: Any) -> None:
    """The tiny atlas names no repository."""
    page = open_page(serve(tiny_site) + "/coverage/", java_script_enabled=False)
    page.locator(".vx-gap", has_text="class-specific").first.click()
    assert page.url.endswith("#gap-class_specific")
    place = page.locator("#gap-class_specific").bounding_box()
    assert 0 <= place["y"] < 900
    assert "class_specific" in page.locator("#gap-class_specific dd").inner_text()


def test_marks_can_be_reached_and_seen_by_keyboard(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(serve(tiny_site) + "/coverage/")
    first = page.locator(".vx-gap").first
    first.evaluate("link => { const all = [...document.querySelectorAll('a')]; all[all.indexOf(link) - 1].focus() }")
    page.keyboard.press("Tab")
    assert first.evaluate("link => link === document.activeElement")
    assert first.evaluate("link => getComputedStyle(link).outlineStyle") != "none"
    page.keyboard.press("Enter")
    assert "#gap-" in page.url


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_of_coverage_fits(atlas_site: Path, serve: Any, open_page: Any, width: int) -> None:
    page = open_page(serve(atlas_site) + "/coverage/", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    content = served(atlas_site, "catalog.json")
    assert page.locator("section:has(#by-family) tbody tr").count() == len(content["taxonomy"]["families"])
    without = [method["id"] for method in content["methods"] if method["snippet"] is None]
    assert page.locator(".md-content").inner_text().count("stock model") > 1
    # A phone shows rows as blocks, with nothing to the right of the screen.
    if width == 360:
        boxes = page.evaluate(
            "[...document.querySelectorAll('.vx-lacks td, .vx-gap')].map(one => one.getBoundingClientRect().right)"
        )
        assert max(boxes) <= width
    for id in without[:5]:
        assert page.locator(f'.vx-lacks a[href="../methods/{id}/index.html"]').count() == 2  # why, and what else


def test_bars_show_the_share_with_code(atlas_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(serve(atlas_site) + "/coverage/")
    counts = page.locator("section:has(#by-family) tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(2).map(cell => Number(cell.innerText)))"
    )
    assert all(total == runs + rest for total, runs, rest in counts)
    bar = page.locator("section:has(#by-family) .vx-share").first
    assert "gradient" in bar.evaluate("bar => getComputedStyle(bar).backgroundImage")
    assert bar.bounding_box()["height"] > 4

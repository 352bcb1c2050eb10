"""The two languages of the built site: each page has its twin, no furniture is forgotten, the switch works."""

import json
import os
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest

# Names of formats, and of methods as other libraries have them.
NAMES = {"vitx", "BibTeX", "CSL-JSON", "CSV", "kernelshap of single patches", "kernelshap, unpaired", "Photo ViT-S"}


def pages(site: Path) -> list[str]:
    """Paths of the English pages that have a switch."""
    found = []
    for path in sorted(site.rglob("index.html")):
        place = path.relative_to(site).as_posix()
        if not place.startswith("zh/") and 'class="vx-languages"' in path.read_text(encoding="utf-8"):
            found.append(place)
    return found


def strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(below)


# --- every page ------------------------------------------------------------------------------------------------------


def test_every_page_has_its_twin_and_every_link_of_it_leads_somewhere(site: Path) -> None:
    english = pages(site)
    assert len(english) > 20
    files = [path for path in (site / "zh").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(site / "zh").as_posix() for path in files) == sorted(english)
    missing = set()
    for place in english:
        html = (site / "zh" / place).read_text(encoding="utf-8")
        assert '<html lang="zh"' in html
        assert f'href="{os.path.relpath(place, Path("zh", place).parent)}" lang="en" hreflang="en"' in html
        for address in set(re.findall(r'<[a-zA-Z][^<>]*?\s(?:href|src)="([^"#?:]+)[#?"]', html)):
            target = urlsplit(urljoin(f"/zh/{place}", unescape(address))).path
            if not (site / target.lstrip("/")).is_file():
                missing.add((place, address))
    assert not missing


def test_links_between_pages_stay_in_their_language(site: Path) -> None:
    english = set(pages(site))
    for place in sorted(english):
        html = (site / "zh" / place).read_text(encoding="utf-8")
        for tag in re.findall(r"<a [^<>]*>", html):
            href = re.search(r'\shref="([^"#?:]+)[#?"]', tag)
            if href and 'hreflang="en"' not in tag:
                target = urljoin(f"/zh/{place}", unescape(href[1])).lstrip("/")
                assert target not in english, f"{place}: {tag} leaves Chinese"


def test_the_furniture_of_every_page_is_chinese(atlas_site: Path) -> None:
    """Fails with the phrases that catalog/languages/zh.yml lacks, by kind of page."""
    import material
    from vitx import catalog, languages

    content = json.loads((atlas_site / "catalog.json").read_text(encoding="utf-8"))
    taxonomy = content.pop("taxonomy")
    names = NAMES | set(strings(content))
    names |= {name.rstrip("0123456789 .:") for name in names}
    theme = Path(material.__file__).parent / "templates" / "partials" / "languages"
    known = languages.theme_phrases(*((theme / f"{name}.html").read_text("utf-8") for name in languages.NAMES))
    known |= languages.taxonomy_phrases(catalog.load().taxonomy)
    words = languages.compiled(catalog.read_phrases("zh").pages, known)
    assert taxonomy == catalog.load().taxonomy.model_dump(mode="json"), "the site was built from other words"
    lacking: dict[str, set[str]] = {}
    for place in pages(atlas_site):
        html = (atlas_site / place).read_text(encoding="utf-8")
        folder, _, page = Path(place).parent.as_posix().rpartition("/")
        found = languages.untranslated(html, words, names)
        if found:
            lacking.setdefault(folder or page, set()).update(found)
    assert lacking == {}


def test_prose_that_stays_english_is_marked_and_announced(site: Path) -> None:
    for place in pages(site):
        if place.startswith("methods/"):
            html = (site / "zh" / place).read_text(encoding="utf-8")
            assert 'lang="en">' in html
            assert 'class="vx-english"' in html


# --- in a browser ----------------------------------------------------------------------------------------------------


def switch(page: Any, name: str) -> None:
    page.locator(".vx-languages").get_by_text(name, exact=True).click()


@pytest.fixture(params=["server", "folder", "no script"])
def opened(request: pytest.FixtureRequest, tiny_site: Path, serve: Any, open_page: Any) -> Any:
    """opened(place, ...) -> page, on a server, from a folder, and without scripts."""
    root = serve(tiny_site) if request.param == "server" else tiny_site.as_uri()
    script = request.param != "no script"
    return lambda place, **options: open_page(f"{root}/{place}index.html", java_script_enabled=script, **options)


@pytest.mark.parametrize("place", ["", "methods/m-0/", "families/attribution/", "mindmap/", "criteria/deletion/"])
def test_the_switch_leads_to_the_same_page_and_back(opened: Any, place: str) -> None:
    page = opened(place)
    english = page.url
    assert page.locator("html").get_attribute("lang") == "en"
    switch(page, "中文")
    assert page.url == english.replace(f"/{place}index.html", f"/zh/{place}index.html")
    assert page.locator("html").get_attribute("lang") == "zh"
    assert "首页" in page.locator(".md-tabs").inner_text()
    assert page.locator('head link[hreflang="en"]').get_attribute("href")
    for picture in page.locator("article img").all()[:1]:
        picture.evaluate("image => image.decode()")
    switch(page, "English")
    assert page.url == english


def test_a_link_on_a_chinese_page_leads_to_a_chinese_page(opened: Any) -> None:
    page = opened("zh/methods/m-0/")
    page.locator(".md-tabs").get_by_text("方法家族").click()
    assert page.url.endswith("/zh/families/index.html")
    assert page.locator("html").get_attribute("lang") == "zh"


def test_the_theme_goes_with_the_reader(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(f"{serve(tiny_site)}/methods/m-0/", color_scheme="light")
    page.locator('label[title="Switch to dark"]').click()
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    switch(page, "中文")
    page.wait_for_selector('body[data-md-color-scheme="slate"]')
    assert page.locator('label[title="切换到浅色模式"]').is_visible()


@pytest.mark.parametrize("place", ["", "methods/m-0/", "browse/", "mindmap/", "benchmark/"])
def test_on_a_phone(tiny_site: Path, serve: Any, open_page: Any, place: str) -> None:
    page = open_page(f"{serve(tiny_site)}/zh/{place}", width=360, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator(".vx-languages a").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    switch(page, "English")
    assert page.locator("html").get_attribute("lang") == "en"


def test_the_switch_by_keyboard(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(f"{serve(tiny_site)}/about/")
    link = page.locator(".vx-languages a")
    for _ in range(20):
        page.keyboard.press("Tab")
        if link.evaluate("link => link === document.activeElement"):
            break
    else:
        pytest.fail("the switch cannot be reached with the Tab key")
    page.keyboard.press("Enter")
    page.wait_for_url("**/zh/about/**")


def test_what_scripts_write_is_chinese(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(f"{serve(tiny_site)}/zh/browse/")
    assert page.locator(".vx-count").inner_text() == "4 种方法"
    page.locator('input[name="family"]').first.check()
    assert re.fullmatch(r"4 种方法中的 \d 种", page.locator(".vx-count").inner_text())
    page = open_page(f"{serve(tiny_site)}/zh/benchmark/")
    assert "排序" in page.locator(".vx-scores thead button").nth(1).get_attribute("aria-label")
    page.locator('.vx-scores tr[data-id="m-0"] td').nth(1).click()
    said = page.locator("dialog.vx-maps").inner_text()
    assert "均值 0.25，95 % 区间 0.188 至 0.375，128 幅图像。与随机图的检验：p = 0.5。" in said
    assert "关闭" in said


def test_search_finds_pages_from_a_chinese_page(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(f"{serve(tiny_site)}/zh/methods/m-0/")
    assert page.locator(".md-search__input").get_attribute("placeholder") == "搜索"
    page.locator(".md-search__input").fill("method")
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    assert "个符合条件的结果" in page.locator(".md-search-result__meta").inner_text()
    address = urljoin(page.url, found.get_attribute("href"))
    assert "/zh/" not in address, "what is found is English"
    found.click()
    page.wait_for_url(address.split("?")[0].split("#")[0] + "**")
    assert page.locator("html").get_attribute("lang") == "en"

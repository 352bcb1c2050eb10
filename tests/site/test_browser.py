"""The built site in Chromium: filtering, the map, the theme, a phone, the keyboard, no script, no server."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

PAGES = ["", "mindmap/", "mindmap/needs/", "browse/", "families/", "comparison/", "how-to-read/", "contributing/"]
PAGES += ["about/", "vocabulary/", "models/", "criteria/", "benchmark/", "scale/"]
PAGES += ["tools/", "leaderboards/", "perspectives/", "coverage/"]


@pytest.fixture(scope="session")
def content(atlas_site: Path) -> Any:
    """The catalogue as the site serves it."""
    return json.loads((atlas_site / "catalog.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def places(content: Any) -> list[str]:
    """A page of each kind."""
    family = content["taxonomy"]["families"][0]["id"]
    return [
        *PAGES,
        f"families/{family}/",
        f"methods/{content['methods'][0]['id']}/",
        f"criteria/{content['criteria'][0]['id']}/",
    ]


@pytest.fixture(scope="session")
def home(atlas_site: Path, serve: Any) -> str:
    return serve(atlas_site) + "/"


def visible(page: Any) -> list[str]:
    """Ids of the methods in the visible rows."""
    links = page.locator(".vx-methods tbody tr:visible th a")
    return [urlsplit(link.get_attribute("href")).path.split("/")[-2] for link in links.all()]


def tick(page: Any, facet: str, value: str) -> None:
    box = page.locator(f'input[name="{facet}"][value="{value}"]')
    box.evaluate("box => box.closest('details').open = true")
    box.check()


# --- browse --------------------------------------------------------------------------------------------------------


def test_filter_changes_rows_and_url_and_survives_a_reload(home: str, open_page: Any, content: Any) -> None:
    methods = content["methods"]
    family = methods[0]["family"]
    need = methods[0]["needs"][0]
    page = open_page(home + "browse/")
    assert visible(page) == [method["id"] for method in methods]
    assert page.locator(".vx-count").inner_text() == f"{len(methods)} methods"

    tick(page, "family", family)
    tick(page, "needs", need)
    expected = [method["id"] for method in methods if method["family"] == family and need in method["needs"]]
    assert visible(page) == expected
    assert 0 < len(expected) < len(methods)
    assert page.locator(".vx-count").inner_text() == f"{len(expected)} of {len(methods)} methods"
    assert page.locator(".vx-count").get_attribute("role") == "status"
    assert parse_qs(urlsplit(page.url).query) == {"family": [family], "needs": [need]}

    page.reload()
    assert visible(page) == expected
    assert page.locator(f'input[name="family"][value="{family}"]').is_checked()

    page.locator(".vx-facets button[type=reset]").click()
    page.wait_for_function("!location.search")
    assert len(visible(page)) == len(methods)


def test_boxes_of_one_facet_add_up(home: str, open_page: Any, content: Any) -> None:
    first, second = (term["id"] for term in content["taxonomy"]["families"][:2])
    page = open_page(f"{home}browse/?family={first}&family={second}")
    expected = [method["id"] for method in content["methods"] if method["family"] in (first, second)]
    assert visible(page) == expected


def test_years_and_every_other_facet(home: str, open_page: Any, content: Any) -> None:
    years = sorted(method["paper"]["year"] for method in content["methods"])
    middle = years[len(years) // 2]
    page = open_page(f"{home}browse/?from={middle}&class=yes")
    expected = [
        method["id"]
        for method in content["methods"]
        if method["paper"]["year"] >= middle and method["class_specific"] is True
    ]
    assert visible(page) == expected
    assert page.locator("input[name=from]").input_value() == str(middle)


def test_the_number_beside_a_box_is_what_it_shows(home: str, open_page: Any, content: Any) -> None:
    family = content["methods"][0]["family"]
    page = open_page(f"{home}browse/?family={family}")
    for need in content["taxonomy"]["needs"]:
        label = page.locator("label", has=page.locator(f'input[name="needs"][value="{need["id"]}"]'))
        claimed = int(label.locator("output").inner_text())
        if claimed:
            tick(page, "needs", need["id"])
            assert len(visible(page)) == claimed
            page.locator(f'input[name="needs"][value="{need["id"]}"]').uncheck()


def test_nonsense_in_the_url_is_ignored(home: str, open_page: Any, content: Any) -> None:
    page = open_page(home + "browse/?family=%3Cimg%3E&from=abc&nothing=1")
    assert len(visible(page)) == len(content["methods"])


def test_browse_by_keyboard_alone(home: str, open_page: Any) -> None:
    page = open_page(home + "browse/")
    box = page.locator('.vx-facets input[type="checkbox"]').first
    for _ in range(60):
        page.keyboard.press("Tab")
        if box.evaluate("box => box === document.activeElement"):
            break
    else:
        pytest.fail("the first box cannot be reached with the Tab key")
    before = len(visible(page))
    page.keyboard.press("Space")
    assert box.is_checked()
    assert 0 < len(visible(page)) < before
    outline = box.evaluate("box => getComputedStyle(box).outlineStyle")
    assert outline != "none", "the focus must be visible"


# --- scores --------------------------------------------------------------------------------------------------------


def scores(page: Any) -> dict[str, list[str]]:
    """Visible rows of the table of scores: id of the method -> texts of its visible cells."""
    rows = page.locator(".vx-scores tbody tr:visible").all()
    return {row.get_attribute("data-id"): row.locator("td:visible").all_inner_texts() for row in rows}


@pytest.fixture
def benchmark(tiny_site: Path, serve: Any, open_page: Any) -> Any:
    return open_page(serve(tiny_site) + "/benchmark/")


def test_scores_are_sorted_best_first_with_gaps_last(benchmark: Any) -> None:
    """Means of the tiny result: random 0.125, m-0 0.25, m-1 0.5, object-mask 1; m-1 has no pointing game."""
    catalogued = list(scores(benchmark))
    assert catalogued == ["m-0", "m-1", "random", "object-mask"]
    head = benchmark.locator('.vx-scores th[data-id="insertion"]')
    head.locator("button").click()
    assert list(scores(benchmark)) == ["object-mask", "m-1", "m-0", "random"]
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert list(scores(benchmark)) == ["random", "m-0", "m-1", "object-mask"]
    benchmark.locator('.vx-scores th[data-id="deletion"] button').click()  # the lower the better
    assert list(scores(benchmark)) == ["random", "m-0", "m-1", "object-mask"]
    assert head.get_attribute("aria-sort") is None
    for _ in range(2):
        benchmark.locator('.vx-scores th[data-id="pointing-game"] button').click()
        assert list(scores(benchmark))[-1] == "m-1"
    benchmark.locator(".vx-scores thead th button").first.click()
    assert list(scores(benchmark)) == catalogued


def test_scores_are_filtered_and_baselines_stay(benchmark: Any) -> None:
    form = benchmark.locator(".vx-score-form")
    form.locator("[name=text]").fill("METHOD 1")
    assert list(scores(benchmark)) == ["m-1", "random", "object-mask"]
    assert form.locator("output").inner_text() == "1 of 2 methods, 3 of 3 criteria"
    form.locator("[name=text]").fill("")
    form.locator("[name=category]").select_option("cost")
    assert scores(benchmark) == {"m-0": ["0.25"], "m-1": [""], "random": ["0.125"], "object-mask": ["1"]}
    form.locator("[name=family]").select_option("attribution")
    families = {row.get_attribute("data-family") for row in benchmark.locator(".vx-scores tbody tr:visible").all()}
    assert families == {"attribution", None}


def test_csv_holds_what_is_shown(benchmark: Any) -> None:
    benchmark.locator(".vx-score-form [name=category]").select_option("faithfulness")
    benchmark.locator(".vx-score-form [name=text]").fill("m-0")
    with benchmark.expect_download() as saved:
        benchmark.locator(".vx-score-form [name=csv]").click()
    assert saved.value.suggested_filename == "vitx-glyph.csv"
    lines = Path(saved.value.path()).read_text().splitlines()
    assert lines[:3] == [
        "method,criterion,mean,low,high,count,p",
        "m-0,deletion,0.25,0.188,0.375,128,0",
        "m-0,insertion,0.25,0.188,0.375,128,0.5",
    ]
    assert [line.split(",")[0] for line in lines[3:]] == ["random", "random", "object-mask", "object-mask"]


def test_a_number_shows_its_interval_and_the_maps(benchmark: Any) -> None:
    dialog = benchmark.locator("dialog.vx-maps")
    cell = benchmark.locator('.vx-scores tr[data-id="m-0"] td').nth(1)
    cell.click()
    said = dialog.inner_text()
    assert "Method 0" in said
    assert "Mean 0.25, 95 % interval 0.188 to 0.375, 128 pictures. Test against the random map: p = 0.5." in said
    picture = dialog.locator("img")
    picture.evaluate("image => image.decode()")
    assert picture.evaluate("image => image.naturalWidth") > 0
    dialog.locator("button").click()
    assert not dialog.is_visible()
    benchmark.keyboard.press("ArrowDown")  # the same by keyboard: the row below, which has no picture
    benchmark.keyboard.press("Enter")
    assert "Method 1" in dialog.inner_text()
    assert "p < 0.0005" in dialog.inner_text()
    assert dialog.locator("img").count() == 0
    benchmark.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_scores_without_scripts_are_complete(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(serve(tiny_site) + "/benchmark/", java_script_enabled=False)
    assert list(scores(page)) == ["m-0", "m-1", "random", "object-mask"]
    assert not page.locator(".vx-score-form").is_visible()
    assert page.get_by_text("need JavaScript").is_visible()
    page.locator(".vx-maps-link").click()
    page.wait_for_url("**/maps-m-0.png")


# --- appearance ----------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    channels = [float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_have_readable_contrast(home: str, open_page: Any, places: list[str], scheme: str) -> None:
    page = open_page(home, color_scheme=scheme)
    for place in places:
        page.goto(home + place)
        pairs = page.evaluate(
            """() => {
                const background = (element) => {
                    for (; element; element = element.parentElement) {
                        const colour = getComputedStyle(element).backgroundColor;
                        if (!/, 0\\)$|transparent/.test(colour)) return colour;
                    }
                };
                const chosen = document.querySelectorAll('article :is(p, a, h1, h2, td, dt)');
                return [...chosen].filter((one) => one.checkVisibility() && one.textContent.trim())
                    .map((one) => [getComputedStyle(one).color, background(one), one.textContent.slice(0, 40)]);
            }"""
        )
        assert pairs
        for front, back, text in pairs:
            if "rgba" in front or not back.startswith("rgb("):
                continue
            light, dark = sorted((luminance(front), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (place, text, front, back)
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(body) < 0.1) == (scheme == "dark")


def test_the_switch_keeps_its_choice(home: str, open_page: Any) -> None:
    page = open_page(home, color_scheme="light")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "default"
    page.locator("label[title='Switch to dark']").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    page.goto(home + "mindmap/")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_page_scrolls_sideways(home: str, open_page: Any, places: list[str], width: int) -> None:
    page = open_page(home, width=width)
    for place in places:
        page.goto(home + place)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place


def test_hostile_text_fits_a_phone_and_runs_nothing(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(serve(tiny_site) + "/methods/m-1/", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("article img[src='x']").count() == 0
    for place in (
        "",
        "browse/",
        "mindmap/",
        "vocabulary/",
        "families/attention/",
        "methods/m-3/",
        "criteria/",
        "criteria/deletion/",
        "benchmark/",
    ):
        page.goto(serve(tiny_site) + "/" + place)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, place


def test_hostile_text_in_search_results_runs_nothing(tiny_site: Path, serve: Any, open_page: Any) -> None:
    page = open_page(serve(tiny_site) + "/")
    search(page, "alert")
    assert page.locator(".md-search-result__link").count() > 0
    assert page.locator(".md-search-result img, .md-search-result script").count() == 0


# --- method page ---------------------------------------------------------------------------------------------------


def test_bibtex_is_copied_by_a_button(home: str, open_page: Any, content: Any) -> None:
    method = next(method for method in content["methods"] if method["snippet"])
    page = open_page(f"{home}methods/{method['id']}/")
    page.evaluate("document.addEventListener('copy', () => (window.copied = document.activeElement.value), true)")
    block = page.locator("#cite + .highlight")
    block.locator("button").click()
    copied = page.evaluate("window.copied")
    assert copied.strip() == block.locator("code").inner_text().strip()
    assert copied.startswith("@")


def test_pictures_load_and_formulas_are_drawn(home: str, open_page: Any, content: Any) -> None:
    method = next(method for method in content["methods"] if method["snippet"] and "$" in method["mechanism"])
    page = open_page(f"{home}methods/{method['id']}/")
    for picture in page.locator("article img").all():
        picture.scroll_into_view_if_needed()
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => image.naturalWidth") > 0
    box = page.locator("article math").first.bounding_box()
    assert box["width"] > 5
    assert box["height"] > 5


# --- without a server, without scripts -----------------------------------------------------------------------------


def search(page: Any, words: str) -> None:
    page.locator("[data-md-component=search-query]").first.click()
    page.keyboard.type(words)
    page.locator(".md-search-result__link").first.wait_for()


@pytest.mark.parametrize("way", ["server", "folder"])
def test_search_finds_a_method(atlas_site: Path, home: str, open_page: Any, content: Any, way: str) -> None:
    method = content["methods"][0]
    page = open_page(home if way == "server" else atlas_site.as_uri() + "/index.html")
    search(page, method["paper"]["title"])
    page.locator(f".md-search-result__link[href*='{method['id']}']").first.click()
    page.wait_for_url(f"**/methods/{method['id']}/**")
    assert page.locator("h1").inner_text().startswith(method["name"])


def test_the_site_works_from_a_folder(atlas_site: Path, open_page: Any, content: Any) -> None:
    page = open_page(atlas_site.as_uri() + "/index.html")
    page.locator(".md-tabs__link", has_text="Browse").click()
    page.wait_for_url("file://**/browse/index.html")
    family = content["methods"][0]["family"]
    tick(page, "family", family)
    page.wait_for_url(f"**/browse/index.html?family={family}")
    page.reload()
    assert visible(page) == [method["id"] for method in content["methods"] if method["family"] == family]
    page.locator(".vx-methods tbody tr:visible th a").first.click()
    page.wait_for_url(f"file://**/methods/{content['methods'][0]['id']}/index.html")
    page.locator(".md-logo").first.click()
    page.wait_for_url("file://**/index.html")
    assert page.locator(".vx-map").is_visible()


def test_without_scripts_only_filtering_is_missing(home: str, open_page: Any, content: Any) -> None:
    page = open_page(home + "browse/", java_script_enabled=False)
    assert page.locator(".vx-methods tbody tr").count() == len(content["methods"])
    assert not page.locator(".vx-facets").is_visible()
    assert page.get_by_text("Filtering needs JavaScript").is_visible()
    page.goto(home)
    page.locator(".vx-map a.l1").first.click()
    page.wait_for_url("**/families/**")
    page.goto(home + "mindmap/")
    page.locator("nav.vx-tabs a", has_text="By motivation").click()
    page.wait_for_url("**/mindmap/motivation/**")
    assert page.locator(".vx-outline").is_visible()


def test_links_and_buttons_are_reached_in_order_with_visible_focus(home: str, open_page: Any) -> None:
    page = open_page(home)
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                    const rect = e.querySelector?.('rect');
                    const shown = s.outlineStyle !== 'none' || (rect && getComputedStyle(rect).strokeWidth === '3px')
                        || e.matches('input, .md-skip, label');
                    return [e.tagName.toLowerCase(), e.getAttribute('href') || '', shown]; }"""
            )
        )
    assert any("families/" in href for _, href, _ in seen), "no node of the map was reached"
    assert all(shown for _, _, shown in seen), seen

"""The mind map in Chromium: opens, closes, searches, zooms; by mouse, by keyboard, on a phone, without scripts."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

AXES = {
    "": lambda method: [method["family"]],
    "motivation/": lambda method: method["motivation"]["terms"],
    "task/": lambda method: method["tasks"],
    "year/": lambda method: [str(method["paper"]["year"])],
    "needs/": lambda method: method["needs"],
}


@pytest.fixture(scope="session")
def methods(atlas_site: Path) -> list[dict[str, Any]]:
    return json.loads((atlas_site / "catalog.json").read_text(encoding="utf-8"))["methods"]


@pytest.fixture(scope="session")
def maps(atlas_site: Path, serve: Any) -> str:
    return serve(atlas_site) + "/mindmap/"


def opened(page: Any) -> set[str]:
    """Ids of the open branches, as the buttons tell them."""
    return set(
        page.evaluate(
            """() => [...document.querySelectorAll('.vx-tree button[aria-expanded=true]')]
                .map((button) => button.parentElement.dataset.id)"""
        )
    )


def in_sight(page: Any, selector: str = ".l3") -> list[str]:
    """Addresses of the names that are shown, whether the view is scrolled to them or not."""
    return page.evaluate(
        """(selector) => [...document.querySelectorAll(`.vx-tree ${selector} > a`)]
            .filter((link) => link.checkVisibility()).map((link) => link.getAttribute('href'))""",
        selector,
    )


def query(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def item(page: Any, id: str) -> Any:
    return page.locator(f'.vx-tree li[data-id="{id}"]')


def button(page: Any, id: str) -> Any:
    return item(page, id).locator("> button")


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.closest('li')?.querySelector('a').getAttribute('href')")


def say(page: Any) -> str:
    return page.locator(".vx-map-tools [role=status]").inner_text()


# --- open and close ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_the_shape_comes_first_and_fits_the_screen(maps: str, open_page: Any, methods: Any, axis: str) -> None:
    page = open_page(maps + axis)
    branches = {branch for method in methods for branch in AXES[axis](method)}
    assert opened(page) == branches
    assert in_sight(page) == []
    assert len(in_sight(page, ".l2")) == page.locator(".vx-tree .l2").count() > len(branches)
    counts = {id: int(re.findall(r"\d+", button(page, id).inner_text())[0]) for id in branches}
    assert counts == {id: sum(id in AXES[axis](method) for method in methods) for id in branches}
    room = page.locator(".vx-view").evaluate("view => [view.scrollWidth - view.clientWidth, view.clientHeight]")
    assert room[0] <= 0, "scrolls sideways before anything is opened"
    assert room[1] <= 820
    assert query(page) == {}


@pytest.mark.parametrize("axis", AXES)
def test_all_opened_shows_every_method_under_every_term(maps: str, open_page: Any, methods: Any, axis: str) -> None:
    page = open_page(maps + axis)
    page.get_by_role("button", name="Open all").click()
    assert query(page) == {"open": ["all"]}
    shown = in_sight(page)
    expected = sorted(method["id"] for method in methods for _ in AXES[axis](method))
    assert sorted(href.split("/")[-2] for href in shown) == expected
    page.get_by_role("button", name="Close all").click()
    assert in_sight(page) == in_sight(page, ".l2") == []
    assert query(page) == {"open": ["none"]}
    assert len(in_sight(page, ".l1")) > 1


@pytest.mark.parametrize("side", [0, -1], ids=["right", "left"])
def test_a_click_opens_a_branch_into_sight_and_closes_it(maps: str, open_page: Any, methods: Any, side: int) -> None:
    page = open_page(maps)
    twig = page.locator(".vx-tree .l2").nth(side).get_attribute("data-id")
    subfamily = twig.partition(".")[2]
    below = [method["id"] for method in methods if method["subfamily"] == subfamily]
    assert button(page, twig).get_attribute("aria-label").endswith(f", methods: {len(below)}")
    button(page, twig).click()
    assert [href.split("/")[-2] for href in in_sight(page)] == below
    assert twig in query(page)["open"][0].split(",")
    frame = page.locator(".vx-view").bounding_box()
    for seen in (button(page, twig), item(page, twig).locator("> ul a").first, item(page, twig).locator("> ul a").last):
        own = seen.bounding_box()
        assert frame["x"] <= own["x"] <= own["x"] + own["width"] <= frame["x"] + frame["width"]
        assert frame["y"] <= own["y"] <= own["y"] + own["height"] <= frame["y"] + frame["height"]
    button(page, twig).click()
    assert in_sight(page) == []
    assert query(page) == {}


def test_by_keyboard(maps: str, open_page: Any, methods: Any) -> None:
    """Buttons by Space and Enter; arrows away from the middle open and go in, towards it close and go out."""
    page = open_page(maps)
    root = page.locator(".vx-tree a").first
    first = page.locator(".vx-tree .l1").first.get_attribute("data-id")
    root.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # past the name, to its button
    assert button(page, first).evaluate("button => button === document.activeElement")
    outline = button(page, first).evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Space")
    assert first not in opened(page)
    page.keyboard.press("Enter")
    assert first in opened(page)

    for id, away, towards in (
        (first, "ArrowRight", "ArrowLeft"),
        (page.locator(".vx-tree .left .l1").first.get_attribute("data-id"), "ArrowLeft", "ArrowRight"),
    ):
        name = item(page, id).locator("> a")
        name.focus()
        page.keyboard.press(away)  # it is open: into it
        twig = item(page, id).locator(".l2").first
        assert focused(page) == twig.locator("> a").get_attribute("href")
        page.keyboard.press(away)
        assert twig.get_attribute("data-id") in opened(page)
        page.keyboard.press(away)
        assert focused(page) == twig.locator("> ul a").first.get_attribute("href")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowDown")
        assert focused(page) == twig.locator("> ul a").first.get_attribute("href")
        page.keyboard.press(towards)
        assert focused(page) == twig.locator("> a").get_attribute("href")
        page.keyboard.press(towards)
        assert twig.get_attribute("data-id") not in opened(page)
        page.keyboard.press(towards)
        assert focused(page) == name.get_attribute("href")
        page.keyboard.press(towards)
        assert id not in opened(page)
        page.keyboard.press(towards)
        assert focused(page) == root.get_attribute("href")
    page.keyboard.press("Escape")
    assert page.locator("[name=find]").evaluate("field => field === document.activeElement")


def test_a_name_is_a_link(maps: str, open_page: Any, methods: Any) -> None:
    page = open_page(f"{maps}?open=all")
    for way in ("click", "Enter"):
        link = page.locator(".vx-tree .l3 > a").last
        place = link.get_attribute("href").split("/")[-2]
        if way == "click":
            link.click()
        else:
            link.focus()
            page.keyboard.press("Enter")
        page.wait_for_url(f"**/methods/{place}/**")
        page.go_back()


# --- search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_search_opens_the_way_to_each_match(maps: str, open_page: Any, methods: Any, axis: str) -> None:
    page = open_page(maps + axis)
    before = opened(page)
    wanted = methods[len(methods) // 2]
    page.locator("[name=find]").fill(wanted["name"].upper())
    marked = page.locator(".vx-tree mark")
    texts = marked.all_inner_texts()
    assert texts
    own = [text for text in texts if text == wanted["name"]]
    assert len(own) == len(AXES[axis](wanted))
    assert say(page) == f"Matches: {len(texts)}"
    assert all(one.is_visible() for one in marked.all())
    needed = page.evaluate(
        """() => [...document.querySelectorAll('.vx-tree li[data-id]')]
            .filter((item) => item.querySelector(':scope > ul mark')).map((item) => item.dataset.id)"""
    )
    assert opened(page) == set(needed), "no branch without a match stays open"
    assert query(page) == {"find": [wanted["name"].upper()]}
    words = f"{wanted['paper']['year']} {wanted['name']}".lower()  # all of them, in any order
    page.locator("[name=find]").fill(words)
    said = marked.evaluate_all("marks => marks.map((one) => `${one.textContent} ${one.parentElement.title}`)")
    assert len(said) >= len(own)
    assert all(word in text.lower() for text in said for word in words.split())
    page.locator("[name=find]").fill("")
    assert opened(page) == before
    assert marked.count() == 0
    assert say(page) == ""
    assert query(page) == {}


def test_matches_are_visited_in_turn_and_entered(maps: str, open_page: Any) -> None:
    page = open_page(maps + "motivation/")
    field = page.locator("[name=find]")
    field.fill("rollout" if page.get_by_text("rollout").count() else "method 1")
    total = int(say(page).removeprefix("Matches: "))
    assert total > 1
    rings = []
    for number in range(total):
        ring = page.locator(".vx-tree .here")
        assert ring.count() == 1
        frame, own = page.locator(".vx-view").bounding_box(), ring.bounding_box()
        assert frame["y"] - 1 <= own["y"] <= own["y"] + own["height"] <= frame["y"] + frame["height"] + 1
        rings.append(page.evaluate("[...document.querySelectorAll('.vx-tree a')].findIndex((a) => a.matches('.here'))"))
        page.keyboard.press("Enter")
        assert say(page) == f"Match {(number + 1) % total + 1} of {total}"
    assert rings == sorted(set(rings))
    page.keyboard.press("ArrowDown")  # from the field into the map
    assert page.evaluate("document.activeElement.matches('.here')")


def test_search_finds_years_and_chinese_labels_and_says_when_nothing_fits(maps: str, open_page: Any) -> None:
    page = open_page(maps)
    title = page.locator(".vx-tree .l1 > a").first.get_attribute("title")
    field = page.locator("[name=find]")
    field.fill(re.findall(r"[\u4e00-\u9fff]{2,}", title + " 归因")[0])
    assert page.locator(".vx-tree .l1 mark").count() + page.locator(".vx-tree .l2 mark").count() > 0
    field.fill("(20")
    assert page.locator(".vx-tree .l3 mark").count() == page.locator(".vx-tree .l3").count()
    field.fill("no method is called this")
    assert say(page) == "Matches: 0"
    assert opened(page) == set()


# --- zoom ----------------------------------------------------------------------------------------------------------


def size(page: Any) -> float:
    return page.locator(".vx-tree").evaluate("tree => parseFloat(getComputedStyle(tree).fontSize)")


def test_zoom_by_buttons_and_wheel(maps: str, open_page: Any) -> None:
    page = open_page(f"{maps}?open=all")
    start = size(page)
    page.get_by_role("button", name="Zoom in").focus()
    page.keyboard.press("Enter")
    assert size(page) == pytest.approx(1.25 * start, rel=0.01)
    page.get_by_role("button", name="Zoom out").click()
    assert size(page) == pytest.approx(start, rel=0.01)
    page.get_by_role("button", name="Fit").click()
    assert size(page) < start
    inside = page.locator(".vx-view").evaluate("view => [view.scrollWidth, view.scrollHeight]")
    shown = page.locator(".vx-view").evaluate("view => [view.clientWidth, view.clientHeight]")
    assert inside[0] <= shown[0] + 2 or size(page) < 0.31 * 13, "the whole map, or as small as it goes"

    small = size(page)
    box = page.locator(".vx-view").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function(
        "(small) => parseFloat(getComputedStyle(document.querySelector('.vx-tree')).fontSize) > small", arg=small
    )
    assert page.evaluate("window.devicePixelRatio") == 1, "the page itself is not zoomed"


def test_dragging_moves_the_map_and_follows_no_link(maps: str, open_page: Any) -> None:
    page = open_page(f"{maps}?open=all")
    view = page.locator(".vx-view")
    place = "view => [view.scrollLeft, view.scrollTop]"
    before, address = view.evaluate(place), page.url
    link = page.locator(".vx-tree > li > a").bounding_box()
    x, y = link["x"] + link["width"] / 2, link["y"] + link["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 30, y - 60)
    page.mouse.move(x - 60, y - 120)
    page.mouse.up()
    after = view.evaluate(place)
    assert after[1] - before[1] == pytest.approx(120, abs=2)
    assert page.url == address
    page.locator(".vx-tree > li > a").click()
    page.wait_for_url("**/families/**")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("width", [1280, 1440, 360])
def test_text_of_the_tree_is_at_least_11_pixels(maps: str, open_page: Any, axis: str, width: int) -> None:
    page = open_page(maps + axis, width=width)
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('.vx-tree :is(a, button)')]
            .filter((one) => one.checkVisibility()).map((one) => parseFloat(getComputedStyle(one).fontSize)))"""
    )
    assert smallest >= 11


# --- a shared address ----------------------------------------------------------------------------------------------


def test_a_shared_address_restores_the_map(maps: str, open_page: Any) -> None:
    page = open_page(maps)
    twig = page.locator(".vx-tree .l2").first.get_attribute("data-id")
    other = page.locator(".vx-tree .l1").last.get_attribute("data-id")
    button(page, twig).click()
    button(page, other).click()
    state = opened(page)
    copy = open_page(page.url)
    assert opened(copy) == state
    copy.locator("[name=find]").fill("method" if copy.get_by_text("Method 1").count() else "grad")
    closed = opened(copy)
    button(copy, other).click()  # a branch without a match, or with one
    again = open_page(copy.url)
    assert opened(again) == opened(copy) != closed
    assert again.locator("[name=find]").input_value() == copy.locator("[name=find]").input_value()
    assert again.locator(".vx-tree mark").count() == copy.locator(".vx-tree mark").count() > 0
    assert not again.locator("[data-md-component=search-query]").input_value(), "the site's own search stays out of it"


def test_nonsense_in_the_address_is_ignored(maps: str, open_page: Any) -> None:
    page = open_page(f"{maps}?open=nothing,%3Cimg%3E&find=%3Cimg%20src=x%20onerror=alert(1)%3E&more=1")
    assert opened(page) == set()
    assert page.locator(".vx-tree img").count() == 0
    assert page.locator("[name=find]").input_value().startswith("<img")


def test_hostile_names_stay_text(tiny_site: Path, serve: Any, open_page: Any) -> None:
    for axis in AXES:
        page = open_page(f"{serve(tiny_site)}/mindmap/{axis}?open=all")
        page.locator("[name=find]").fill("<img src=x")
        assert page.locator(".vx-tree .l3 mark").count() == page.locator(".vx-tree .l3").count() > 0
        assert page.locator(".vx-mindmap :is(img, script)").count() == 0


# --- without scripts, from a folder, on a phone ----------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_without_scripts_drawing_and_outline_are_complete(maps: str, open_page: Any, methods: Any, axis: str) -> None:
    page = open_page(maps + axis, java_script_enabled=False)
    assert page.locator(".vx-map").is_visible()
    assert page.locator(".vx-outline").is_visible()
    assert not page.locator(".vx-map-tools").is_visible()
    for place in (".vx-map a.l3", ".vx-outline .l3 > a"):
        shown = [link.get_attribute("href").split("/")[-2] for link in page.locator(place).all()]
        assert sorted(shown) == sorted(method["id"] for method in methods for _ in AXES[axis](method))
    page.set_viewport_size({"width": 360, "height": 800})
    assert not page.locator(".vx-map").is_visible()
    assert page.locator(".vx-outline .l3 > a").last.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".vx-outline .l3 > a").first.click()
    page.wait_for_url("**/methods/**")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("width", [1280, 1440])
def test_labels_of_the_drawing_fit_and_are_at_least_11_pixels(maps: str, open_page: Any, axis: str, width: int) -> None:
    page = open_page(maps + axis, width=width, java_script_enabled=False)
    smallest, too_wide = page.evaluate(
        """() => [
            Math.min(...[...document.querySelectorAll('.vx-map text')]
                .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)),
            [...document.querySelectorAll('.vx-map a')]
                .filter((a) => a.querySelector('text').getBBox().width > a.querySelector('rect').getBBox().width)
                .map((a) => a.textContent),
        ]"""
    )
    assert smallest >= 11
    assert not too_wide


def test_the_map_works_from_a_folder(atlas_site: Path, open_page: Any) -> None:
    page = open_page(f"{atlas_site.as_uri()}/mindmap/index.html")
    twig = page.locator(".vx-tree .l2").first.get_attribute("data-id")
    button(page, twig).click()
    page.reload()
    assert twig in opened(page)


@pytest.mark.parametrize("axis", AXES)
def test_a_phone_opens_and_closes_the_list(maps: str, open_page: Any, axis: str) -> None:
    page = open_page(maps + axis, width=360, has_touch=True)
    assert opened(page) == set()
    branch = page.locator(".vx-tree .l1").first.get_attribute("data-id")
    button(page, branch).tap()
    assert opened(page) == {branch}
    assert item(page, branch).locator(".l2 > a").first.is_visible()
    page.get_by_role("button", name="Open all").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    lefts = [page.locator(f".vx-tree .l{level} > a").first.bounding_box()["x"] for level in range(4)]
    assert lefts == sorted(lefts)
    assert lefts[1] < lefts[2] < lefts[3]
    low = page.evaluate("Math.min(...[...document.querySelectorAll('.vx-tree button')].map((b) => b.offsetHeight))")
    assert low >= 22
    assert not page.get_by_role("button", name="Zoom in").is_visible()


# --- care ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("axis", AXES)
def test_text_stands_out_and_buttons_have_names(maps: str, open_page: Any, axis: str, scheme: str) -> None:
    page = open_page(f"{maps}{axis}?open=all&find=a", color_scheme=scheme)
    contrasts = page.evaluate(
        """() => {
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const rgba = (colour) => {  // also of color-mix
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return canvas.getImageData(0, 0, 1, 1).data;
            };
            const ground = (element) => {
                for (; element; element = element.parentElement) {
                    const colour = rgba(getComputedStyle(element).backgroundColor);
                    if (colour[3] === 255) return colour;
                }
            };
            const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
                const c = colour[i] / 255;
                return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            }, 0);
            const chosen = '.vx-tree :is(a, button, mark, span), .vx-map-tools button';
            return [...document.querySelectorAll(chosen)].map((one) => {
                const [a, b] = [light(rgba(getComputedStyle(one).color)), light(ground(one))];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.tagName, one.textContent];
            });
        }"""
    )
    assert len(contrasts) > 20
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    names = page.evaluate(
        "[...document.querySelectorAll('.vx-tree button')].map((b) => [b.ariaLabel, b.ariaExpanded, b.textContent])"
    )
    assert len({name for name, _, _ in names}) >= len(names) / 5
    for name, expanded, text in names:
        assert name.endswith(f", methods: {text}")
        assert expanded in ("true", "false")
    assert page.locator(".vx-view").get_attribute("role") == "region"
    assert page.locator(".vx-view").get_attribute("aria-label")


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_for_those_who_ask_for_it(maps: str, open_page: Any, motion: str) -> None:
    page = open_page(maps, reduced_motion=motion)
    animation = page.locator(".vx-tree ul").first.evaluate("list => getComputedStyle(list).animationName")
    assert (animation == "none") == (motion == "reduce")


def test_the_first_page_shows_the_map_without_methods(atlas_site: Path, serve: Any, open_page: Any) -> None:
    """Light enough: all that the home page asks for, but pictures and the site's search index, is under 500 kB."""
    page = open_page("about:blank")
    asked = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    page.goto(serve(atlas_site) + "/", wait_until="networkidle")
    left_out = (".png", ".jpg", ".jpeg", ".webp", "search_index.json")
    files = {path: atlas_site / (path.lstrip("/") or "index.html") for path in asked if not path.endswith(left_out)}
    weights = {path: file.stat().st_size for path, file in files.items()}
    assert "/" in weights
    assert sum(weights.values()) < 500_000, weights
    assert page.locator(".vx-map").is_visible()
    assert page.locator(".vx-map a[href*='methods/']").count() == 0
    page.set_viewport_size({"width": 360, "height": 800})
    assert not page.locator(".vx-map").is_visible()
    assert page.locator(".vx-map-overview .vx-outline").is_visible()

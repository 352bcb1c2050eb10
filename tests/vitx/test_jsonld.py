"""What pages say to machines: it can be read back whatever the text, holds what is known, and nothing that is not."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from vitx import jsonld, pages
from vitx.schema import Catalog, Paper

helpers = runpy.run_path(str(Path(__file__).with_name("test_reference_pages.py")))
tiny, prepared, Elements = helpers["tiny"], helpers["prepared"], helpers["Elements"]
SITE = "https://atlas.example/vitx/"
REQUIRED = {
    "WebSite": {"name"},
    "Dataset": {"name", "description", "distribution"},
    "DataDownload": {"contentUrl", "encodingFormat"},
    "TechArticle": {"headline", "description", "identifier", "isPartOf", "keywords"},
    "ScholarlyArticle": {"@id", "headline", "author", "datePublished"},
    "SoftwareSourceCode": {"@id", "name", "programmingLanguage"},
    "DefinedTerm": {"name", "termCode"},
    "DefinedTermSet": {"name"},
    "Person": set(),
    "Organization": {"name"},
    "PropertyValue": {"propertyID", "value", "url"},
    "PublicationEvent": {"name"},
}


def read(*nodes: jsonld.Node) -> Any:
    """What a reader of the page gets from the script."""
    script = re.fullmatch(r'<script type="application/ld\+json">([^<>&\u2028\u2029]*)</script>', jsonld.script(*nodes))
    assert script, "the script holds nothing that a reader of HTML would take for markup"
    return json.loads(script[1])


def described(atlas: pages.Atlas, site: str) -> dict[str, list[jsonld.Node]]:
    """Page -> its nodes."""
    nodes = {id: jsonld.entry(atlas, id, site, f"About {id}") for id in atlas.places}
    served = list(jsonld.FORMATS)
    return nodes | {"home": jsonld.home(atlas, site, served), "vocabulary": jsonld.vocabulary(atlas, site)}


def every(value: Any) -> list[dict[str, Any]]:
    """All objects inside a value."""
    if isinstance(value, dict):
        return [value, *(one for below in value.values() for one in every(below))]
    return [one for below in value for one in every(below)] if isinstance(value, list) else []


def typed(value: Any, kind: str) -> list[dict[str, Any]]:
    return [one for one in every(value) if one.get("@type") == kind]


# --- safety ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "</ScRiPt >",
        "<!-- <script> -->",
        "]]>",
        "&lt;/script&gt;",
        '"},{"@type":"Person',
        "\\u003c/script\\u003e",
        "\\",
        "a\u2028b\u2029c\nd\te",
        "{{ 7*7 }} {% raw %} 不 é 𝄞",
    ],
)
def test_any_text_comes_back_as_it_was_and_ends_nothing(text: str) -> None:
    assert read({"@type": "Person", "name": text, text: [text]})["@graph"] == [
        {"@type": "Person", "name": text, text: [text]}
    ]
    parsed = Elements(jsonld.script({"name": text}))
    assert [tag for tag, _ in parsed.tags] == ["script"]
    assert not parsed.faults


@pytest.mark.parametrize("site", ["", SITE])
def test_hostile_entries_come_back_as_they_are(site: str) -> None:
    atlas = prepared(nasty=tiny["NASTY"])
    for page, nodes in described(atlas, site).items():
        assert tiny["NASTY"] in json.dumps(read(*nodes), ensure_ascii=False).replace('\\"', '"'), page
    article, paper, *_ = read(*jsonld.entry(atlas, "m-1", site, "x"))["@graph"]
    assert article["name"] == atlas.catalog.methods["m-1"].name
    assert paper["name"] == atlas.catalog.methods["m-1"].paper.title


# --- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [prepared, helpers["real"]])
@pytest.mark.parametrize("site", ["", SITE])
def test_every_node_holds_what_its_type_needs_and_refers_to_what_is_there(make: Any, site: str) -> None:
    for page, nodes in described(make(), site).items():
        content = read(*nodes)
        assert content["@context"] == "https://schema.org"
        ids = {node["@id"] for node in every(content["@graph"]) if set(node) > {"@id"} and "@id" in node}
        for node in every(content["@graph"]):
            assert None not in node.values(), page
            assert all(value not in ("", [], {}) for value in node.values()), (page, node)
            if "@type" in node:
                assert set(node) >= REQUIRED[node["@type"]], (page, node)
            elif set(node) == {"@id"}:
                assert node["@id"] in ids, (page, node)
            else:
                assert set(node) in ({"@context", "@graph"}, {"@language", "@value"}), (page, node)
        defined = [node["@id"] for node in content["@graph"] if "@id" in node]
        assert len(defined) == len(set(defined)), page


def test_addresses_are_absolute_where_the_site_has_one_and_absent_where_not() -> None:
    atlas = prepared()
    for site in ("", SITE, SITE.rstrip("/")):
        for page, nodes in described(atlas, site).items():
            for node in every(read(*nodes)["@graph"]):
                for key in ("url", "@id", "contentUrl"):
                    address = node.get(key, "https://")
                    local = not site and (key == "contentUrl" or address.startswith("_:"))
                    assert address.startswith("https://") or local, (page, key, address)
                    assert "//" not in address.removeprefix("https://"), address
    (article,) = typed(jsonld.entry(atlas, "m-1", SITE, "x"), "TechArticle")
    assert article["url"] == f"{SITE}methods/m-1/"
    assert [term["url"] for term in article["keywords"]] == [
        f"{SITE}families/attribution/",
        f"{SITE}families/attribution/#occlusion",
        f"{SITE}vocabulary/#motivation-faithfulness",
        f"{SITE}vocabulary/#motivation-speed",
    ]
    assert "url" not in read(*jsonld.entry(atlas, "m-1", "", "x"))["@graph"][0]


def test_a_page_is_about_the_paper_and_its_code_computes_it() -> None:
    atlas = prepared()
    article, paper, code = read(*jsonld.entry(atlas, "m-1", SITE, "x"))["@graph"]
    assert (article["@type"], paper["@type"], code["@type"]) == (
        "TechArticle",
        "ScholarlyArticle",
        "SoftwareSourceCode",
    )
    assert article["about"] == code["about"] == [{"@id": paper["@id"]}]
    assert article["hasPart"] == {"@id": code["@id"]}
    assert code["url"] == f"{SITE}snippets/attribution/m_1.py"
    assert [term["termCode"] for term in article["keywords"]] == ["attribution", "occlusion", "faithfulness", "speed"]
    assert [node["@type"] for node in jsonld.entry(atlas, "m-3", SITE, "x")] == ["TechArticle", "ScholarlyArticle"]
    assert "hasPart" not in jsonld.entry(atlas, "m-3", SITE, "x")[0]
    (alone,) = read(*jsonld.entry(atlas, "human-study", SITE, "x"))["@graph"]
    assert "about" not in alone
    assert [term["termCode"] for term in alone["keywords"]] == ["cost"]
    assert "codeRepository" not in code
    named = atlas._replace(citation={**atlas.citation, "repository-code": "https://code.example/us/vitx/"})
    assert jsonld.entry(named, "m-1", SITE, "x")[2]["codeRepository"] == "https://code.example/us/vitx"


def test_a_paper_has_its_authors_and_identifiers() -> None:
    names = ("Abnar, Samira", "Madonna", "van der Berg, Jan J.", "others")
    full = Paper(title="T", authors=names, year=2020, venue="ACL 2020", arxiv="2005.00928", doi=None, url=None)
    node = read(jsonld.paper(full.model_copy(update={"doi": "10.1000/a<b>"})))["@graph"][0]
    assert node["author"] == [
        {"@type": "Person", "name": "Samira Abnar", "familyName": "Abnar", "givenName": "Samira"},
        {"@type": "Person", "name": "Madonna"},
        {"@type": "Person", "name": "Jan J. van der Berg", "familyName": "van der Berg", "givenName": "Jan J."},
    ]
    assert node["sameAs"] == ["https://doi.org/10.1000/a%3Cb%3E", "https://arxiv.org/abs/2005.00928"]
    assert node["@id"] == node["sameAs"][0]
    assert [(one["propertyID"], one["value"]) for one in node["identifier"]] == [
        ("DOI", "10.1000/a<b>"),
        ("arXiv", "2005.00928"),
    ]
    assert node["datePublished"] == "2020"
    assert node["publication"]["name"] == "ACL 2020"
    bare = Paper(title="T", authors=("A, B",), year=2020, venue=None, arxiv=None, doi=None, url=None)
    (node,) = read(jsonld.paper(bare))["@graph"]
    assert set(node) == {"@type", "@id", "name", "headline", "author", "datePublished"}


def test_the_vocabulary_holds_every_term_in_both_languages() -> None:
    atlas = helpers["real"]()
    sets = read(*jsonld.vocabulary(atlas, SITE))["@graph"]
    taxonomy = atlas.catalog.taxonomy
    expected = [getattr(taxonomy, name) for name in type(taxonomy).model_fields]
    assert sorted(len(one["hasDefinedTerm"]) for one in sets) == sorted(map(len, expected))
    written = {
        (term["termCode"], term["name"], term["alternateName"]["@value"], term["description"])
        for one in sets
        for term in one["hasDefinedTerm"]
    }
    assert written == {(t.id, t.label, t.label_zh, t.definition) for terms in expected for t in terms}
    assert typed(sets, "DefinedTerm")[0]["alternateName"]["@language"] == "zh"


def test_the_catalogue_is_a_data_set_with_the_files_that_are_served() -> None:
    full: Catalog = tiny["catalog"](nasty="")
    citation = {
        "title": "vitx: an atlas",
        "authors": [{"name": "Us"}, {"family-names": "A", "given-names": "B"}],
        "version": "1.2",
        "date-released": "2026-01-02",
        "license": "MIT",
        "keywords": ["a", "b"],
    }
    atlas = pages.prepare(full, {}, {}, citation)
    site, dataset = read(*jsonld.home(atlas, SITE, ["catalog.json", "catalog.bib"]))["@graph"]
    assert (site["@type"], site["url"], site["name"]) == ("WebSite", SITE, "vitx: an atlas")
    assert [one["contentUrl"] for one in dataset["distribution"]] == [f"{SITE}catalog.json", f"{SITE}catalog.bib"]
    assert [one["encodingFormat"] for one in dataset["distribution"]] == ["application/json", "application/x-bibtex"]
    assert "4 methods and 4 criteria" in dataset["description"]
    assert 50 <= len(dataset["description"]) <= 5000, "what search engines of data sets take"
    assert dataset["license"] == "https://spdx.org/licenses/MIT"
    assert dataset["creator"] == [
        {"@type": "Organization", "name": "Us"},
        {"@type": "Person", "familyName": "A", "givenName": "B"},
    ]
    assert (dataset["version"], dataset["datePublished"], dataset["keywords"]) == ("1.2", "2026-01-02", ["a", "b"])
    there = read(*jsonld.home(atlas, "", ["catalog.csv"]))["@graph"][1]
    assert [one["contentUrl"] for one in there["distribution"]] == ["catalog.csv"]
    assert "url" not in there

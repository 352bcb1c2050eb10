"""Citations survive a round trip: what a reader of BibTeX or CSL-JSON gets back is what the entries hold."""

import json
import re
import unicodedata

import jsonschema
import pytest
from vitx import catalog, cite
from vitx.schema import Method


def method(id: str = "a-method", **paper) -> Method:
    facts = {"title": "A Title", "authors": ["Abnar, Samira"], "year": 2020, "venue": None}
    facts |= {"arxiv": None, "doi": None, "url": None} | paper
    return Method.model_validate(
        {
            "id": id,
            "name": "A method",
            "paper": facts,
            "code": None,
            "family": "attention",
            "subfamily": "attention-aggregation",
            "motivation": {"terms": ["faithfulness"], "text": "Because."},
            "tasks": ["image-classification"],
            "needs": ["gradients"],
            "class_specific": None,
            "output": "heatmap",
            "mechanism": "It works.",
            "in_survey": "unknown",
            "why_no_snippet": "Not written.",
            "sources": ["here"],
        }
    )


# ---------------------------------------------------------------------------------------------- a small BibTeX reader


def read_bibtex(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """(kind, key, fields) of each entry. Braces are counted as bibtex counts them: a backslash hides none."""
    entries, at = [], 0
    while match := re.compile(r"\s*@(\w+)\{([^,\s{}]+),").match(text, at):
        kind, key, at = match[1], match[2], match.end()
        fields = {}
        while field := re.compile(r"\s*(\w+) = \{").match(text, at):
            start = at = field.end()
            depth = 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                at += 1
            assert text[at] == ","
            fields[field[1]] = text[start : at - 1]
            at += 1
        end = re.compile(r"\s*\}\n").match(text, at)
        assert end, text[at : at + 40]
        at = end.end()
        entries.append((kind, key, fields))
    assert not text[at:].strip()
    return entries


MARKS = {"`": 0x300, "'": 0x301, "^": 0x302, "~": 0x303, "=": 0x304, "u": 0x306, ".": 0x307, '"': 0x308}
MARKS |= {"r": 0x30A, "H": 0x30B, "v": 0x30C, "c": 0x327, "k": 0x328}
COMMANDS = {"textbackslash": "\\", "textbraceleft": "{", "textbraceright": "}", "textasciitilde": "~"}
COMMANDS |= {"textasciicircum": "^", "ss": "ß", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "ae": "æ", "AE": "Æ"}
COMMANDS |= {"oe": "œ", "OE": "Œ", "dj": "đ", "DJ": "Đ", "i": "ı", "aa": "å", "AA": "Å"}
COMMANDS |= {"alpha": "α", "beta": "β", "omega": "ω", "Omega": "Ω", "nabla": "∇", "neq": "≠"}


def from_latex(text: str) -> str:
    """The Unicode text that LaTeX would print."""

    def accent(match: re.Match) -> str:
        return unicodedata.normalize("NFC", match[2].removeprefix("\\") + chr(MARKS[match[1]]))

    def punctuation(match: re.Match) -> str:
        return {"---": "—", "--": "–", "``": "“", "''": "”"}[match[0]]

    hidden = re.sub(r"\{\\([`'^~=u.\"rHvck])\{(\\?\w)\}\}", accent, text)
    hidden = re.sub(r"\{\$?\\([a-zA-Z]+)\$?\}", lambda match: f"\0{ord(COMMANDS[match[1]])}\0", hidden)
    hidden = re.sub(r"\\([&%$#_])", lambda match: f"\0{ord(match[1])}\0", hidden)
    plain = re.sub(r"---|--|``|''", punctuation, hidden.replace("{", "").replace("}", "")).replace("~", "\u00a0")
    assert "\\" not in plain
    return re.sub("\0([0-9]+)\0", lambda match: chr(int(match[1])), plain)


ODD = [
    "Grad-CAM: Visual Explanations From Deep Networks",
    "Müller, Łukasz; Żółć; Erdős; Škrlj; Çelik; Ångström; Nguyễn; Þór; ïóéèñǎ",
    "100 % of $x_i$ & {braces} # ~ ^ \\ \\input{/etc/passwd}",
    "An en – dash, an em — dash, “quoted” and ‘single’",
    "视觉 Transformer 的解释 α-β × ∇ ω Ω ≠ ²",
    "Unbalanced } brace {{",
    "@article{evil, title={x}}",
]


@pytest.mark.parametrize("title", ODD)
def test_bibtex_titles_survive(title):
    ((kind, key, fields),) = read_bibtex(cite.bibtex([method(title=title)]))
    assert (kind, key) == ("misc", "a-method")
    prose = re.sub(r"\{\$\\[a-zA-Z]+\$\}", "", fields["title"])  # without formulas of one sign
    assert not re.search(r"(?<!\\)[&%$#_]|\^(?!\{)", prose)  # each would be a command to LaTeX
    expected = unicodedata.normalize("NFC", title).replace("‘", "`").replace("’", "'")
    assert from_latex(fields["title"]) == expected


def test_bibtex_is_ascii_for_european_names():
    text = cite.bibtex([method(authors=["Müller, Žaneta", "Erdős, Gaël", "Łoś, François", "Bjørn, Åse", "Weiß, Í."])])
    assert text.isascii()
    ((_, _, fields),) = read_bibtex(text)
    assert from_latex(fields["author"]).split(" and ")[2:] == ["Łoś, François", "Bjørn, Åse", "Weiß, Í."]
    assert r"M{\"{u}}ller, {\v{Z}}aneta" in fields["author"]
    assert r"Wei{\ss}, {\'{I}}." in fields["author"]
    assert r"title = {Na{\"{\i}}ve}" in cite.bibtex([method(title="Naïve")])


def test_signs_that_latex_knows_only_in_formulas_become_formulas():
    text = cite.bibtex([method(title="β-VAE ≠ Ωmega")])
    assert r"title = {{{$\beta$}-VAE} {$\neq$} {$\Omega$}mega}" in text
    everything = cite.bibtex(catalog.load().methods.values())
    assert not [sign for sign in everything if ord(sign) > 0xFF and not sign.isalpha()], "LaTeX would stop at it"


def test_capitals_that_styles_would_lower_are_braced():
    ((_, _, fields),) = read_bibtex(
        cite.bibtex([method(title="ViT-CX: Causal Patches of 16x16 in Vision Transformers")])
    )
    assert fields["title"] == "{ViT-CX}: Causal Patches of {16x16} in Vision Transformers"


def test_whole_catalogue_round_trips():
    read = catalog.load()
    entries = read_bibtex(cite.bibtex(read.methods.values()))
    keys = [key for _, key, _ in entries]
    aliases = [alias for _, _, fields in entries for alias in fields.get("ids", "").split(", ") if alias]
    assert sorted(keys + aliases) == sorted(read.methods)
    for kind, key, fields in entries:
        paper = read.methods[key].paper
        assert from_latex(fields["title"]) == paper.title
        assert from_latex(fields["author"]).split(" and ") == list(paper.authors)
        assert fields.get("eprint") == paper.arxiv
        assert fields.get("doi") == paper.doi
        assert {"inproceedings": "booktitle", "article": "journal", "misc": "title"}[kind] in fields


def test_a_shared_paper_is_cited_once():
    read = catalog.load().methods
    pair = [read["generic-attention-explainability"], read["generic-attention-two-tower"]]
    ((_, key, fields),) = read_bibtex(cite.bibtex(pair))
    assert key == "generic-attention-explainability"
    assert fields["ids"] == "generic-attention-two-tower"
    assert len(json.loads(cite.csl_json(pair))) == 1
    ((_, key, fields),) = read_bibtex(cite.bibtex(pair[1:]))
    assert key == "generic-attention-two-tower"
    assert "ids" not in fields
    assert cite.bibtex([pair[0], pair[0]]) == cite.bibtex([pair[0]])
    same_title = [method("one", title="The Same, Title"), method("two", title="The same title")]
    assert len(read_bibtex(cite.bibtex(same_title))) == 1


WACV = "Winter Conference on Applications of Computer Vision (WACV)"


@pytest.mark.parametrize(
    ("venue", "year", "kind", "container", "printed"),
    [
        ("ICCV 2017", 2017, "inproceedings", "International Conference on Computer Vision (ICCV)", 2017),
        ("ECCV 2014", 2013, "inproceedings", "European Conference on Computer Vision (ECCV)", 2014),
        ("WACV 2020 workshop", 2019, "inproceedings", f"{WACV} Workshop", 2020),
        ("WACV 2024 / arXiv 2023", 2023, "inproceedings", WACV, 2024),
        ("Conference on Data Mining 2022", 2022, "inproceedings", "Conference on Data Mining", 2022),
        ("Pattern Recognition 2023 / arXiv 2022", 2022, "article", "Pattern Recognition", 2023),
        ("PLoS ONE 10", 2015, "article", "PLoS ONE 10", 2015),
        ("arXiv 2023 (Dec)", 2023, "misc", None, 2023),
        ("bioRxiv 2026", 2026, "misc", "bioRxiv", 2026),
        (None, 2024, "misc", None, 2024),
    ],
)
def test_venue_decides_the_kind(venue, year, kind, container, printed):
    ((found, _, fields),) = read_bibtex(cite.bibtex([method(venue=venue, year=year)]))
    assert found == kind
    assert fields.get({"inproceedings": "booktitle", "article": "journal", "misc": "howpublished"}[kind]) == container
    assert fields["year"] == str(printed)


def test_nothing_is_claimed_of_an_unknown_venue():
    unknown = method()
    assert "arXiv" not in cite.bibtex([unknown]) + cite.csl_json([unknown]) + cite.apa(unknown)
    assert cite.apa(unknown) == "Abnar, S. (2020). A Title."


def test_incomplete_author_lists():
    cut = method(authors=["Simonyan, Karen", "others"])
    assert "author = {Simonyan, Karen and others}," in cite.bibtex([cut])
    (item,) = json.loads(cite.csl_json([cut]))
    assert item["author"] == [{"family": "Simonyan", "given": "Karen"}]
    assert item["note"] == "The author list is incomplete."
    assert cite.apa(cut) == "Simonyan, K., et al. (2020). A Title."


def test_organisations_are_not_split():
    body = method(authors=["Research and Development Group"])
    assert "author = {{Research and Development Group}}," in cite.bibtex([body])
    assert json.loads(cite.csl_json([body]))[0]["author"] == [{"literal": "Research and Development Group"}]


# The part of the CSL-JSON schema that these items touch; no other field may appear.
CSL = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["id", "type", "title", "author", "issued"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "string"},
            "type": {"enum": ["paper-conference", "article-journal", "article"]},
            "author": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {"type": "string"} for name in ("family", "given", "literal")},
                },
            },
            "issued": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "date-parts": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
                },
            },
            **{
                n: {"type": "string"} for n in ("title", "container-title", "publisher", "number", "DOI", "URL", "note")
            },
        },
    },
}


def test_csl_json_is_valid_and_complete():
    methods = catalog.load().methods
    items = json.loads(cite.csl_json([*methods.values(), *(method(f"odd-{i}", title=t) for i, t in enumerate(ODD))]))
    jsonschema.Draft202012Validator(CSL).validate(items)
    for item in items:
        if item["id"] in methods:
            paper = methods[item["id"]].paper
            assert item["title"] == paper.title
            names = [a.get("literal") or f"{a['family']}, {a['given']}" for a in item["author"]]
            assert names == [name for name in paper.authors if name != "others"]
    assert [item["title"] for item in items[-len(ODD) :]] == ODD
    assert cite.csl_json([]) == "[]\n"
    assert cite.bibtex([]) == ""


def test_apa():
    assert cite.apa(catalog.load().methods["grad-cam"]) == (
        "Selvaraju, R. R., Cogswell, M., Das, A., Vedantam, R., Parikh, D., & Batra, D. (2017). Grad-CAM: Visual "
        "Explanations From Deep Networks via Gradient-Based Localization. In International Conference on Computer "
        "Vision (ICCV). https://doi.org/10.1109/ICCV.2017.74"
    )
    assert cite.apa(
        method(authors=["Ba, Jean-Luc", "Li, Xi"], title="Why?", venue="TPAMI 2021", arxiv="2005.00928")
    ) == ("Ba, J.-L., & Li, X. (2021). Why? TPAMI. https://arxiv.org/abs/2005.00928")
    many = method(authors=[f"Name{i}, A." for i in range(25)])
    assert cite.apa(many).startswith("Name0, A., Name1, A.,")
    assert ", Name18, A., … Name24, A. (2020)" in cite.apa(many)

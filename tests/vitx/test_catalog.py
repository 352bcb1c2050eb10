"""The loader refuses bad files with one line each, names file and line, reports all faults together and never hangs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitx import ATLAS, catalog
from vitx.catalog import CatalogError, NoSnippet, UnknownId

TWELVE = [
    "saliency-input-gradient",
    "integrated-gradients",
    "grad-cam",
    "occlusion",
    "raw-attention",
    "attention-rollout",
    "generic-attention-explainability",
    "transformer-attribution",
    "evit",
    "concept-transformer",
    "tokencut",
    "generic-attention-two-tower",
]
FILE = "catalog/methods/attention/attention-rollout.yml"
ENTRY = """\
# yaml-language-server: $schema=../../schema/method.json
id: attention-rollout
name: Attention rollout
paper:
  title: Quantifying Attention Flow in Transformers
  authors: ["Abnar, Samira", "Zuidema, Willem"]
  year: 2020
  venue: ACL 2020
  arxiv: "2005.00928"
  doi: null
  url: null
code: null
family: attention
subfamily: attention-aggregation
motivation:
  terms: [information-flow]
  text: Deep layers see mixtures.
tasks: [image-classification]
needs: [forward-pass, attention-weights]
class_specific: false
output: heatmap
mechanism: Multiply the layers.
relations:
  - {type: extends, id: raw-attention}
in_survey: "yes"
snippet: snippets/attention/attention_rollout.py
sources: [here]
"""

CRITERION_FILE = "catalog/evaluation/deletion.yml"
CRITERION = """\
# yaml-language-server: $schema=../schema/criterion.json
id: deletion
name: Deletion
paper: null
category: faithfulness
definition: Hide the patches.
better: down
implemented_in: [a, b]
in_survey: unknown
snippet: snippets/evaluation/deletion.py
relations:
  - {type: compares-with, id: insertion}
sources: [here]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The catalog folder of a small sound atlas: two entries, their snippets, the real taxonomy."""
    return make_atlas(tmp_path)


def make_atlas(folder: Path) -> Path:
    root = folder / "catalog"
    (root / "methods" / "attention").mkdir(parents=True)
    (root / "models").mkdir()
    shutil.copy(ATLAS / "catalog" / "taxonomy.yml", root)
    other = (
        ENTRY.replace("rollout", "raw")
        .replace("attention-raw", "raw-attention")
        .replace("attention_raw", "raw_attention")
    )
    other = other.replace("relations:\n  - {type: extends, id: raw-attention}\n", "relations: []\n")
    other = other.replace("year: 2020", "year: 2019")
    (root / "methods" / "attention" / "attention-rollout.yml").write_text(ENTRY, encoding="utf-8")
    (root / "methods" / "attention" / "raw-attention.yml").write_text(other, encoding="utf-8")
    snippets = folder / "snippets" / "attention"
    snippets.mkdir(parents=True)
    for name in ("attention_rollout.py", "raw_attention.py"):
        (snippets / name).write_text("def explain(model, images, target=None): ...\n", encoding="utf-8")
    return root


@pytest.fixture
def judged(root: Path) -> Path:
    """The same with two criteria and their snippets."""
    (root / "evaluation").mkdir()
    (root.parent / "snippets" / "evaluation").mkdir()
    other = CRITERION.replace("deletion", "insertion").replace("id: insertion}", "id: deletion}")
    for id, text in (("deletion", CRITERION), ("insertion", other.replace("faithfulness", "cost"))):
        (root / "evaluation" / f"{id}.yml").write_text(text, encoding="utf-8")
        (root.parent / "snippets" / "evaluation" / f"{id}.py").write_text("def score(relevance): ...\n")
    return root


def with_criterion(root: Path, text: str) -> list[str]:
    """What check says when the entry of deletion holds ``text``."""
    (root.parent / CRITERION_FILE).write_text(text, encoding="utf-8")
    return catalog.check(root)


def with_entry(root: Path, text: str | bytes) -> list[str]:
    """What check says when the entry of attention rollout holds ``text``."""
    data = text if isinstance(text, bytes) else text.encode()
    (root.parent / FILE).write_bytes(data)
    return catalog.check(root)


# ----------------------------------------------------------------------------------------------- the real catalogue


def test_the_real_catalogue_loads_in_taxonomy_order():
    read = catalog.load()
    assert set(TWELVE) <= set(read.methods)
    family = {term.id: term.order for term in read.taxonomy.families}
    subfamily = {term.id: term.order for term in read.taxonomy.subfamilies}
    keys = [(family[m.family], subfamily[m.subfamily], m.paper.year, m.id) for m in read.methods.values()]
    assert keys == sorted(keys)
    assert all(key == method.id for key, method in read.methods.items())
    assert catalog.load() is read


def test_the_real_catalogue_is_sound():
    assert catalog.check() == []


def test_the_taxonomy_has_the_five_families_and_the_three_kinds_of_pruning():
    taxonomy = catalog.load().taxonomy
    assert [term.id for term in taxonomy.families] == ["attribution", "attention", "pruning", "inherent", "tasks"]
    pruning = [term.id for term in taxonomy.subfamilies if term.family == "pruning"]
    assert pruning == ["explicitly-explainable", "implicitly-explainable", "possibly-explainable"]
    needs = ["forward-pass", "gradients", "attention-weights", "training", "changed-architecture"]
    assert [term.id for term in taxonomy.needs] == needs
    for name in type(taxonomy).model_fields:
        terms = getattr(taxonomy, name)
        assert len({term.label for term in terms}) == len({term.label_zh for term in terms}) == len(terms) or (
            name == "subfamilies"
        )
        assert all(any("\u4e00" <= letter <= "\u9fff" for letter in term.label_zh) for term in terms)


def test_the_criteria_stand_in_order_of_category_year_and_id():
    read = catalog.load()
    category = {term.id: term.order for term in read.taxonomy.categories}
    keys = [(category[c.category], c.paper.year if c.paper else 9999, c.id) for c in read.criteria.values()]
    assert keys == sorted(keys)
    assert {c.category for c in read.criteria.values()} == set(category), "no category is empty"
    assert all(key == criterion.id for key, criterion in read.criteria.items())
    assert not set(read.criteria) & set(read.methods)


def test_every_formula_becomes_mathml():
    pages = pytest.importorskip("vitx.pages")
    read = catalog.load()
    texts = {method.id: method.mechanism for method in read.methods.values()}
    texts |= {criterion.id: criterion.definition for criterion in read.criteria.values()}
    for id, text in texts.items():
        html = pages.markdown_html(text)
        assert "vx-bad-math" not in html, id
        assert "$" not in html, id


def test_checking_imports_no_torch():
    code = "import sys; from vitx import catalog; catalog.check(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------- YAML


def test_a_sound_atlas_has_no_problem(root):
    assert catalog.check(root) == []
    assert list(catalog.load(root).methods) == ["raw-attention", "attention-rollout"]


TRAP = 'is a number, a date or a merge to some readers; write "{0}" if it is text'
TRUTH = 'is a truth value to some readers; write true or false, or "{0}"'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  year: 2020", "  year: 2020\n  year: 2021", "8: paper.year: given twice, first in line 7"),
        ("class_specific: false", "class_specific: no", f"20: class_specific: unquoted no {TRUTH.format('no')}"),
        ("class_specific: false", "class_specific: Off", f"20: class_specific: unquoted Off {TRUTH.format('Off')}"),
        ("class_specific: false", "class_specific: y", f"20: class_specific: unquoted y {TRUTH.format('y')}"),
        (
            "class_specific: false",
            "class_specific: False",
            "20: class_specific: write false, or quote it if it is text",
        ),
        ("class_specific: false", "class_specific:", "20: class_specific: write null for an unknown value"),
        ("class_specific: false", "class_specific: ~", "20: class_specific: write null for an unknown value"),
        ('"yes"', "yes", f"25: in_survey: unquoted yes {TRUTH.format('yes')}"),
        ('"2005.00928"', "2005.00928", "9: paper.arxiv: must be a valid string, not 2005.00928"),
        ("ACL 2020", "2020-07-05", f"8: paper.venue: unquoted 2020-07-05 {TRAP.format('2020-07-05')}"),
        ("year: 2020", "year: 010", f"7: paper.year: unquoted 010 {TRAP.format('010')}"),
        ("year: 2020", "year: 33:40", f"7: paper.year: unquoted 33:40 {TRAP.format('33:40')}"),
        ("year: 2020", "year: 2_020", f"7: paper.year: unquoted 2_020 {TRAP.format('2_020')}"),
        ("year: 2020", "year: 0x7e4", f"7: paper.year: unquoted 0x7e4 {TRAP.format('0x7e4')}"),
        ("code: null", "code: &x null", "12: anchor &x is not allowed; write the value out"),
        ("code: null", "code: *x", "12: alias *x is not allowed; write the value out"),
        ("code: null", "code: !!str null", "12: tag tag:yaml.org,2002:str is not allowed"),
        (
            "code: null",
            "code: !!python/object/apply:os.system [ls]",
            "12: tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
        ),
        ("code: null", "<<: {code: null}", "12: merge key << is not allowed; write the values out"),
        ("code: null", "code: null\n12: x", "13: key 12 must be text; quote it"),
        ("code: null", "code: null\nyes: x", "13: key yes must be text; quote it"),
        ("code: null", "? [a]\n: x", "12: a key must be plain text"),
        ("code: null", 'code: null\n"a\\u0007": x', "13: a key holds a control character"),
        ("code: null", "---\ncode: null", "12: a second document starts here; one file holds one entry"),
        ("code: null", "code: " + "[" * 200, "12: nested more than 10 levels deep"),
        ("code: null", "code: " + "{a: " * 200, "12: nested more than 10 levels deep"),
        ("code: null", "code: null\u0000", "12: holds the character U+0000; remove it"),
        ("code: null", "code: \u202enull", "12: holds the character U+202E; remove it"),
        ("Attention rollout", '"a\\u0007b"', "3: name: holds the character U+0007, which no reader would see"),
        (
            "code: null",
            "code: 'null",
            "28: not valid YAML: while scanning a quoted scalar, found unexpected end of stream",
        ),
        ("code: null", "code: a: b", "12: not valid YAML: mapping values are not allowed in this context"),
        ("code: null", "\tcode: null", None),
    ],
)
def test_yaml_refusals(root, old, new, problem):
    assert old in ENTRY
    lines = with_entry(root, ENTRY.replace(old, new, 1))
    if problem is None:
        assert len(lines) == 1
        assert "not valid YAML" in lines[0]
    else:
        assert lines == [f"{FILE}:{problem}"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "1: the file is empty"),
        (b"# nothing\n", "1: the file is empty"),
        (b"[a, b]\n", "1: the file must hold one mapping (key: value lines)"),
        (b"word\n", "1: the file must hold one mapping (key: value lines)"),
        (b"a: b\nc: \xff\n", "2: not UTF-8 text"),
        (ENTRY.encode("utf-16"), "1: not UTF-8 text"),
        (b"\xef\xbb\xbf" + ENTRY.encode(), "1: holds the character U+FEFF; remove it"),
        (b"a: " + b"x" * 1_000_001, "1: larger than 1,000,000 bytes"),
    ],
)
def test_file_refusals(root, data, problem):
    assert with_entry(root, data) == [f"{FILE}:{problem}"]


def test_an_alias_bomb_is_refused_at_its_first_anchor(root):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert with_entry(root, bomb) == [f"{FILE}:1: anchor &a is not allowed; write the value out"]


def test_windows_line_ends_are_fine(root):
    assert with_entry(root, ENTRY.replace("\n", "\r\n")) == []


def test_text_that_looks_like_something_else_stays_text():
    document, faults = catalog.parse('a: "2021-01-01"\nb: |-\n  no\nc: 10.1/x\nd: 1e3\ne: -2\nf: v1.2\ng: "yes"\n')
    assert faults == []
    assert document.data == {"a": "2021-01-01", "b": "no", "c": "10.1/x", "d": 1000.0, "e": -2, "f": "v1.2", "g": "yes"}


# ----------------------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  year: 2020\n", "", "4: paper.year: is missing"),
        ("name: Attention rollout\n", "", "1: name: is missing"),
        ("  year: 2020", "  year: 1890", "7: paper.year: must be greater than or equal to 1950, not 1890"),
        ("  year: 2020", '  year: "2020"', "7: paper.year: must be a valid integer, not '2020'"),
        ("name: Att", "nmae: x\nname: Att", "3: nmae: is not a field; did you mean name?"),
        ("  venue: ACL 2020", "  venue: ACL 2020\n  tilte: x", "9: paper.tilte: is not a field; did you mean title?"),
        ("name: Attention rollout", 'name: " "', "3: name: must not be blank; write null for an unknown value"),
        ("tasks: [image-classification]", "tasks: []", "18: tasks: must hold at least one item"),
        ("tasks: [image-classification]", "tasks: image-classification", "18: tasks: must be a list"),
        (
            "tasks: [image-classification]",
            "tasks: [Image]",
            "18: tasks[0]: must be an id: lower-case words joined by hyphens",
        ),
        ("code: null", "code: here", "12: code: must be a mapping (key: value lines)"),
        (
            "code: null",
            "code:\n  url: http://x.org\n  licence: null",
            "13: code.url: must be an address that starts with https://",
        ),
        (
            '"2005.00928"',
            '"arXiv:2005.00928"',
            '9: paper.arxiv: must be an arXiv identifier such as "2005.00928", without a version',
        ),
        (
            "doi: null",
            "doi: https://doi.org/10.18653/x",
            "10: paper.doi: must be a DOI such as 10.18653/v1/2020.acl-main.385, without https://doi.org/",
        ),
        (
            "type: extends",
            "type: improves",
            "24: relations[0].type: must be 'extends', 'compares-with', 'supersedes', 'same-idea-as', 'applies' or"
            " 'uses', not 'improves'",
        ),
        (
            '"Zuidema, Willem"]',
            'others, "Zuidema, Willem"]',
            '4: paper: "others" stands last in authors, after at least one name',
        ),
        (
            "snippet: snippets/attention/attention_rollout.py\n",
            "",
            "1: give exactly one of snippet and why_no_snippet",
        ),
    ],
)
def test_schema_refusals(root, old, new, problem):
    assert old in ENTRY
    lines = with_entry(root, ENTRY.replace(old, new, 1))
    assert [line for line in lines if "has no entry" not in line] == [f"{FILE}:{problem}"]


# ------------------------------------------------------------------------------------------------------ cross-checks


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("id: attention-rollout", "id: attention-roll", "2: id: attention-roll is not the file name attention-rollout"),
        (
            "subfamily: attention-aggregation",
            "subfamily: attention-agregation",
            "14: subfamily: attention-agregation is not in the subfamilies of taxonomy.yml;"
            " did you mean attention-aggregation, attention-perturbation, attention-visualisation?",
        ),
        (
            "subfamily: attention-aggregation",
            "subfamily: gradient",
            "14: subfamily: gradient belongs to the family attribution",
        ),
        ("[information-flow]", "[speed]", "16: motivation.terms[0]: speed is not in the motivations of taxonomy.yml"),
        (
            "[forward-pass, attention-weights]",
            "[gradient]",
            "19: needs[0]: gradient is not in the needs of taxonomy.yml; did you mean gradients?",
        ),
        (
            "[image-classification]",
            "[image-classification, image-classification]",
            "18: tasks[1]: is listed twice",
        ),
        (
            "output: heatmap",
            "output: heat-map",
            "21: output: heat-map is not in the outputs of taxonomy.yml; did you mean heatmap?",
        ),
        ("id: raw-attention}", "id: attention-rollout}", "24: relations[0].id: an entry is not related to itself"),
        (
            "id: raw-attention}",
            "id: raw-atention}",
            "24: relations[0].id: there is no entry raw-atention; did you mean raw-attention?",
        ),
        (
            "sources: [here]",
            "sources: [here]\nmodel: glyf",
            "28: model: glyf has no card in catalog/models; did you mean glyph?",
        ),
        (
            "snippets/attention/attention_rollout.py",
            "snippets/attention/rollout.py",
            "26: snippet: must be snippets/attention/attention_rollout.py",
        ),
    ],
)
def test_cross_check_refusals(root, old, new, problem):
    assert old in ENTRY
    lines = with_entry(root, ENTRY.replace(old, new, 1))
    assert f"{FILE}:{problem}" in lines
    assert len(lines) == (2 if "rollout.py" in new else 1)  # the wrong path does not exist either
    with pytest.raises(CatalogError) as caught:
        catalog.load(root)
    assert caught.value.problems == [f"{FILE}:{problem}"]


def test_family_must_be_the_folder(root):
    (root / "methods" / "pruning").mkdir()
    (root.parent / FILE).rename(root / "methods" / "pruning" / "attention-rollout.yml")
    moved = FILE.replace("attention/", "pruning/", 1)
    assert f"{moved}:13: family: attention is not the folder pruning" in catalog.check(root)


def test_ids_are_unique_over_the_families(root):
    (root / "methods" / "pruning").mkdir()
    shutil.copy(root.parent / FILE, root / "methods" / "pruning")
    assert catalog.check(root) == [
        f"catalog/methods/pruning/attention-rollout.yml:1: id: attention-rollout is taken by {FILE}"
    ]


def test_files_in_the_wrong_place(root):
    (root / "methods" / "loose.yml").write_text(ENTRY)
    (root / "methods" / "attention" / "x.yaml").write_text(ENTRY)
    (root / "methods" / "attention" / ".hidden").write_text("")
    assert catalog.check(root) == [
        "catalog/methods/attention/x.yaml:1: is not an entry; entries are <id>.yml files",
        "catalog/methods/loose.yml:1: belongs in catalog/methods/<family>/",
    ]


def test_missing_taxonomy(root):
    (root / "taxonomy.yml").unlink()
    assert catalog.check(root) == ["catalog/taxonomy.yml:1: cannot be read: No such file or directory"]


def test_taxonomy_ids_and_orders_are_unique(root):
    path = root / "taxonomy.yml"
    text = path.read_text(encoding="utf-8")
    text = text.replace("id: gradients", "id: forward-pass", 1)
    text = text.replace("family: tasks\n    label: Segmentation", "family: task\n    label: Segmentation", 1)
    text = text.replace("id: attention\n    label: Attention-based methods", "id: attention\n    label: x", 1)
    start = text.index("id: robustness")
    text = text[:start] + text[start:].replace("order: 7", "order: 6", 1)
    path.write_text(text, encoding="utf-8")
    said = [line.split(": ", 1)[1] for line in catalog.check(root)]
    assert said == [
        "subfamilies[42].family: task is not in the families; did you mean tasks?",
        "motivations[6].order: 6 is used twice in motivations",
        "needs[1].id: forward-pass is used twice in needs",
    ]


def test_an_id_must_not_shadow_a_module(root):
    for name in ("json", "yaml"):
        path = root / "methods" / "attention" / f"{name}.yml"
        path.write_text(ENTRY.replace("attention-rollout", name).replace("attention_rollout", name))
        (root.parent / "snippets" / "attention" / f"{name}.py").write_text("def explain(): ...")
    assert catalog.check(root) == [
        "catalog/methods/attention/json.yml:2: id: json shadows the Python module json",
        "catalog/methods/attention/yaml.yml:2: id: yaml shadows the Python module yaml",
    ]


def test_snippets_must_exist_parse_and_define_explain(root):
    snippet = root.parent / "snippets" / "attention" / "attention_rollout.py"
    snippet.write_text("import nothing_of_this_name\nclass A:\n    def explain(self): ...\n")
    assert catalog.check(root) == ["snippets/attention/attention_rollout.py:1: defines no top-level function explain"]
    snippet.write_text("x = 1\ndef explain(:\n")
    assert catalog.check(root) == ["snippets/attention/attention_rollout.py:2: is not Python: invalid syntax"]
    snippet.unlink()
    assert catalog.check(root) == [
        f"{FILE}:26: snippet: snippets/attention/attention_rollout.py does not exist; write it, or say why_no_snippet"
    ]
    assert list(catalog.load(root).methods) == ["raw-attention", "attention-rollout"]  # load asks for no snippet


def test_every_snippet_has_an_entry(root):
    (root.parent / "snippets" / "attention" / "left_over.py").write_text("def explain(): ...")
    assert catalog.check(root) == [
        "snippets/attention/left_over.py:1: has no entry catalog/methods/attention/left-over.yml"
    ]


def test_the_first_line_leads_editors_to_the_schema(root):
    line = "# yaml-language-server: $schema=../../schema/method.json"
    assert with_entry(root, ENTRY.replace(line, "# x")) == [f"{FILE}:1: the first line must be: {line}"]
    entries = [path for folder in ("methods", "evaluation") for path in (ATLAS / "catalog" / folder).rglob("*.yml")]
    for path in [ATLAS / "catalog" / "taxonomy.yml", *entries]:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert (path.parent / first.partition("$schema=")[2]).is_file(), path


def test_all_problems_of_all_files_come_together_sorted_by_line(root):
    bad = ENTRY.replace("year: 2020", "year: 3000").replace("class_specific: false", "class_specific: no")
    bad = bad.replace("[image-classification]", "[a, b]").replace("output: heatmap", "output: 1")
    raw = root / "methods" / "attention" / "raw-attention.yml"
    raw.write_text("id: [", encoding="utf-8")
    lines = with_entry(root, bad)
    assert [line.rsplit("/", 1)[1].split(": ")[:2] for line in lines] == [
        ["attention-rollout.yml:7", "paper.year"],
        ["attention-rollout.yml:20", "class_specific"],
        ["attention-rollout.yml:21", "output"],
        ["raw-attention.yml:1", "not valid YAML"],
    ]
    with pytest.raises(CatalogError) as caught:
        catalog.load(root)
    assert str(caught.value).splitlines() == caught.value.problems == lines


def test_todos_are_listed_with_their_line(root):
    text = ENTRY.replace("code: null", f"code: null  # {catalog.TODO} look it up")
    snippet = root.parent / "snippets" / "attention" / "attention_rollout.py"
    snippet.write_text(f"def explain(): ...\n# {catalog.TODO} write it\n")
    assert with_entry(root, text) == [
        f"{FILE}:12: to do: look it up",
        "snippets/attention/attention_rollout.py:2: to do: write it",
    ]


def test_model_cards_are_read_and_named_after_their_file(root):
    card = "id: glyph\nname: Glyph\narchitecture: ViT\n"
    card += "parameters: 1\ninput_size: 112\nclasses: 12\nlicence: MIT\ntraining: x\ncommand: x\nseed: 0\nminutes: 1\n"
    card += f'sha256: "{"a" * 64}"\nmetrics: {{top1: 0.98}}\nlimits: x\nsource: x\n'
    (root / "models" / "glyph.yml").write_text(card)
    assert catalog.check(root) == []
    assert catalog.load(root).models["glyph"].metrics == {"top1": 0.98}
    (root / "models" / "glyph.yml").write_text(card.replace("id: glyph", "id: glif"))
    assert catalog.check(root) == ["catalog/models/glyph.yml:1: id: glif is not the file name glyph"]


def test_a_reported_number_names_a_criterion_of_the_catalogue(judged):
    number = "metric: AUC, criterion: deletion, value: 3, unit: null, model: m, data: d, where: w, source: s"
    entry = ENTRY.replace("sources: [here]", f"reported:\n  - {{{number}}}\nsources: [here]")
    assert with_entry(judged, entry) == []
    assert catalog.load(judged).methods["attention-rollout"].reported[0].value == 3.0
    for wrong, complaint in (
        ("criterion: deletoin", "28: reported[0].criterion: there is no entry deletoin; did you mean deletion?"),
        ("criterion: raw-attention", "28: reported[0].criterion: there is no entry raw-attention"),
        ("criterion: null, vaule: 3", "28: reported[0].vaule: is not a field; did you mean value?"),
    ):
        assert with_entry(judged, entry.replace("criterion: deletion", wrong)) == [f"{FILE}:{complaint}"]
    twice = entry.replace("sources:", f"  - {{{number}}}\nsources:")
    assert with_entry(judged, twice) == [f"{FILE}:29: reported[1]: is listed twice"]


def test_a_model_card_names_the_method_that_loads_it(root):
    card = "id: glyph\nname: Glyph\nmethod: attention-rolout\narchitecture: ViT\n"
    card += "parameters: 1\ninput_size: 112\nclasses: 12\nlicence: MIT\ntraining: x\ncommand: x\nseed: 0\nminutes: 1\n"
    card += f'sha256: "{"a" * 64}"\nmetrics: {{top1: 0.98}}\nlimits: x\nsource: x\n'
    (root / "models" / "glyph.yml").write_text(card)
    complaint = "method: there is no entry attention-rolout; did you mean attention-rollout, raw-attention?"
    assert with_entry(root, ENTRY) == [f"catalog/models/glyph.yml:3: {complaint}"]
    assert catalog.model_card("glyph", root).method == "attention-rolout"
    (root / "models" / "glyph.yml").write_text(card.replace("classes: 12", "classes: none"))
    with pytest.raises(catalog.CatalogError, match=r"glyph\.yml:7: classes"):
        catalog.model_card("glyph", root)


# --------------------------------------------------------------------------------------------------------- criteria


def test_a_sound_atlas_with_criteria_has_no_problem(judged):
    assert catalog.check(judged) == []
    read = catalog.load(judged)
    assert list(read.criteria) == ["deletion", "insertion"]
    assert list(read.methods) == ["raw-attention", "attention-rollout"]


def test_an_atlas_needs_no_criteria(root):
    assert not (root / "evaluation").exists()
    assert catalog.load(root).criteria == {}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("id: deletion\n", "id: delete\n", "2: id: delete is not the file name deletion"),
        (
            "category: faithfulness",
            "category: faithfulnes",
            "5: category: faithfulnes is not in the categories of taxonomy.yml; did you mean faithfulness?",
        ),
        ("[a, b]", "[a, a]", "8: implemented_in[1]: is listed twice"),
        ("id: insertion}", "id: deletion}", "12: relations[0].id: an entry is not related to itself"),
        (
            "id: insertion}",
            "id: insertoin}",
            "12: relations[0].id: there is no entry insertoin; did you mean insertion?",
        ),
        ("id: insertion}", "id: raw-attention}", "12: relations[0].id: there is no entry raw-attention"),
        ("better: down", "better: less", "7: better: must be 'up', 'down' or 'neither', not 'less'"),
        ("  - {type: compares-with", "  - {type: beats", None),
        ("name: Deletion", "nmae: Deletion", None),
        ("in_survey: unknown", "in_survey: yes", None),
        (
            "snippets/evaluation/deletion.py",
            "snippets/attention/deletion.py",
            "10: snippet: must be a path such as snippets/evaluation/deletion.py",
        ),
        ("snippet: snippets/evaluation/deletion.py\n", "", "1: give exactly one of snippet and why_no_snippet"),
        ("# yaml", "# xaml", "1: the first line must be: # yaml-language-server: $schema=../schema/criterion.json"),
        ("sources: [here]", f"sources: [here]  # {catalog.TODO} look", "13: to do: look"),
    ],
)
def test_criteria_are_read_as_strictly_as_methods(judged, old, new, problem):
    assert old in CRITERION
    lines = with_criterion(judged, CRITERION.replace(old, new, 1))
    assert lines
    assert all(line.startswith(f"{CRITERION_FILE}:") for line in lines)
    if problem is not None:
        assert lines == [f"{CRITERION_FILE}:{problem}"]


def test_a_relation_of_a_method_leads_to_no_criterion(judged):
    text = ENTRY.replace("id: raw-attention}", "id: deletion}")
    assert with_entry(judged, text) == [f"{FILE}:24: relations[0].id: there is no entry deletion"]


def test_ids_are_unique_over_methods_and_criteria(judged):
    text = CRITERION.replace("id: deletion", "id: raw-attention").replace("deletion.py", "raw_attention.py")
    (judged / "evaluation" / "raw-attention.yml").write_text(text)
    taken = "catalog/methods/attention/raw-attention.yml"
    assert catalog.check(judged) == [
        f"catalog/evaluation/raw-attention.yml:1: id: raw-attention is taken by {taken}",
    ]


def test_criteria_lie_in_no_folder(judged):
    (judged / "evaluation" / "more").mkdir()
    (judged / "evaluation" / "more" / "x.yml").write_text(CRITERION)
    assert catalog.check(judged) == ["catalog/evaluation/more/x.yml:1: belongs in catalog/evaluation/"]


def test_snippets_of_criteria_must_exist_and_define_score(judged):
    snippet = judged.parent / "snippets" / "evaluation" / "deletion.py"
    snippet.write_text("def explain(): ...\n")
    assert catalog.check(judged) == ["snippets/evaluation/deletion.py:1: defines no top-level function score"]
    snippet.unlink()
    missing = "snippet: snippets/evaluation/deletion.py does not exist; write it, or say why_no_snippet"
    assert catalog.check(judged) == [f"{CRITERION_FILE}:10: {missing}"]
    snippet.write_text("def score(): ...\n")
    (snippet.parent / "left_over.py").write_text("def score(): ...\n")
    orphan = "snippets/evaluation/left_over.py:1: has no entry catalog/evaluation/left-over.yml"
    assert catalog.check(judged) == [orphan]


def test_todos_of_a_criterion_are_found_in_snippet_and_test(judged):
    tests = judged.parent / "tests" / "evaluation"
    tests.mkdir(parents=True)
    (tests / "test_deletion.py").write_text(f"# {catalog.TODO} test it\n")
    assert catalog.check(judged) == ["tests/evaluation/test_deletion.py:1: to do: test it"]


def test_snippet_path_of_a_criterion(judged):
    assert catalog.snippet_path("deletion", judged) == judged.parent / "snippets" / "evaluation" / "deletion.py"
    (judged.parent / "snippets" / "evaluation" / "deletion.py").unlink()
    text = CRITERION.replace("snippet: snippets/evaluation/deletion.py", "why_no_snippet: Needs people.")
    (judged.parent / CRITERION_FILE).write_text(text)
    with pytest.raises(NoSnippet, match=r"^deletion has no snippet: Needs people\.$"):
        catalog.snippet_path("deletion", judged)


def test_entry_knows_methods_and_criteria(judged):
    read = catalog.load(judged)
    assert catalog.entry(read, "deletion") is read.criteria["deletion"]
    assert catalog.entry(read, "raw-attention") is read.methods["raw-attention"]
    with pytest.raises(UnknownId, match='there is no method or criterion "delettion"; did you mean deletion'):
        catalog.entry(read, "delettion")
    with pytest.raises(UnknownId, match='there is no method or criterion "raw"; did you mean raw-attention'):
        catalog.entry(read, "raw")
    with pytest.raises(UnknownId, match='there is no method "deletion"'):
        catalog.get(read, "deletion")


# ---------------------------------------------------------------------------------------------------------- renamed


def test_a_former_id_names_the_present_one(judged):
    assert with_entry(judged, ENTRY + "formerly: [rollout, old-rollout]\n") == []
    (judged.parent / CRITERION_FILE).write_text(CRITERION + "formerly: [deleting]\n")
    catalog.load.cache_clear()
    read = catalog.load(judged)
    for ask, old, new in (
        (catalog.get, "old-rollout", "attention-rollout"),
        (catalog.entry, "rollout", "attention-rollout"),
        (catalog.entry, "deleting", "deletion"),
    ):
        with pytest.raises(UnknownId, match=f'^"{old}" is now called "{new}"$'):
            ask(read, old)
    for old, new in (("rollout", "attention-rollout"), ("deleting", "deletion")):
        with pytest.raises(UnknownId, match=f'^"{old}" is now called "{new}"$'):
            catalog.snippet_path(old, judged)
    with pytest.raises(UnknownId, match='there is no method "deleting"'):
        catalog.get(read, "deleting")
    for unknown in ("", "attention", "old"):
        with pytest.raises(UnknownId, match="there is no method or criterion"):
            catalog.snippet_path(unknown, judged)


def test_snippet_path_finds_a_former_id_beside_broken_entries(judged):
    (judged / "methods" / "attention" / "broken.yml").write_text("formerly: [rollout\n")
    with_entry(judged, ENTRY + "formerly: [rollout]\n")
    with pytest.raises(UnknownId, match=r'^"rollout" is now called "attention-rollout"$'):
        catalog.snippet_path("rollout", judged)


def test_a_former_id_leads_to_one_entry(judged):
    last = ENTRY.count("\n") + 1
    present = "formerly[0]: raw-attention is the id of catalog/methods/attention/raw-attention.yml"
    assert with_entry(judged, ENTRY + "formerly: [raw-attention]\n") == [f"{FILE}:{last}: {present}"]
    own = f"formerly[0]: attention-rollout is the id of {FILE}"
    assert with_entry(judged, ENTRY + "formerly: [attention-rollout]\n") == [f"{FILE}:{last}: {own}"]
    shared = "formerly[0]: deletion is the id of catalog/evaluation/deletion.yml"
    assert with_entry(judged, ENTRY + "formerly: [deletion]\n") == [f"{FILE}:{last}: {shared}"]
    twice = "formerly[1]: is listed twice"
    assert with_entry(judged, ENTRY + "formerly:\n  - old\n  - old\n") == [f"{FILE}:{last + 2}: {twice}"]

    with_entry(judged, ENTRY + "formerly: [old]\n")
    other = f"{CRITERION_FILE}:{CRITERION.count(chr(10)) + 1}: formerly[0]: old is listed by {FILE} too"
    assert with_criterion(judged, CRITERION + "formerly: [old]\n") == [other]
    with pytest.raises(CatalogError, match="old is listed by"):
        catalog.load.__wrapped__(judged)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("old", "formerly: must be a list"),
        ("[Old One]", "formerly[0]: must be an id: lower-case words joined by hyphens"),
        ("[1]", "formerly[0]: must be a valid string, not 1"),
        ("null", "formerly: must be a list"),
    ],
)
def test_former_ids_are_a_list_of_ids(root, written, said):
    line = ENTRY.count("\n") + 1
    assert with_entry(root, ENTRY + f"formerly: {written}\n") == [f"{FILE}:{line}: {said}"]


def test_a_relation_to_a_former_id_is_told_the_present_one(root):
    text = ENTRY.replace("relations:\n  - {type: extends, id: raw-attention}", "formerly: [rollout]\nrelations: []")
    with_entry(root, text)
    raw = root / "methods" / "attention" / "raw-attention.yml"
    raw.write_text(raw.read_text().replace("relations: []", "relations:\n  - {type: uses, id: rollout}"))
    (said,) = catalog.check(root)
    assert said.endswith("relations[0].id: there is no entry rollout; it is now called attention-rollout")


# -------------------------------------------------------------------------------------------------------- reference


TOOL = """\
# yaml-language-server: $schema=../schema/tool.json
id: one
name: One
url: https://code.example/one
licence: null
methods: [Rollout, More]
evaluates: null
vit_support: Some.
runs_on_stock_timm: {answer: "yes", reason: It was tried.}
implements: [attention-rollout, deletion]
sources: [here]
verified: true
"""
BOARD = """\
# yaml-language-server: $schema=../schema/leaderboard.json
id: board
name: Board
metric: accuracy
unit: "%"
as_of: "2023-11"
rows:
  - {rank: 1, model: A, score: 92, year: 2023, architecture: cnn, arxiv: null, sources: [here], verified: true}
  - {rank: 2, model: B, score: 91.5, year: 2023, architecture: cnn, arxiv: null, sources: [here], verified: true}
"""
PERSPECTIVE = """\
# yaml-language-server: $schema=../schema/perspective.json
id: open
name: Open
description: It is open.
survey_wording_seen: false
later_papers:
  - title: Later
    authors: null
    year: 2024
    venue: null
    arxiv: null
    how: By magic.
    entry: deletion
    sources: [here]
    verified: true
entries: [raw-attention, insertion]
"""
REFERENCE = {"tools/one.yml": TOOL, "leaderboards/board.yml": BOARD, "perspectives/open.yml": PERSPECTIVE}


@pytest.fixture
def referred(judged: Path) -> Path:
    """The same with a tool, a leaderboard and a perspective."""
    for name, text in REFERENCE.items():
        (judged / name).parent.mkdir()
        (judged / name).write_text(text, encoding="utf-8")
    return judged


def test_reference_entries_load_and_an_atlas_needs_none(referred):
    assert catalog.check(referred) == []
    read = catalog.load(referred)
    assert list(read.tools) == ["one"]
    assert read.tools["one"].implements == ("attention-rollout", "deletion")
    assert read.leaderboards["board"].rows[0].score == 92
    assert read.perspectives["open"].later_papers[0].entry == "deletion"
    for name in REFERENCE:
        shutil.rmtree((referred / name).parent)
    catalog.load.cache_clear()
    read = catalog.load(referred)
    assert read.tools == read.leaderboards == read.perspectives == {}


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("tools/one.yml", "id: one", "id: won", "2: id: won is not the file name one"),
        ("tools/one.yml", "deletion]", "delettion]", "10: implements[1]: there is no entry delettion; did you mean"),
        ("tools/one.yml", "deletion]", "attention-rollout]", "10: implements[1]: is listed twice"),
        ("tools/one.yml", "[Rollout, More]", "[Rollout, Rollout]", "6: methods[1]: is listed twice"),
        ("tools/one.yml", '"yes"', "yes", "9: runs_on_stock_timm.answer: unquoted yes is a truth value"),
        ("tools/one.yml", '"yes"', "mostly", "9: runs_on_stock_timm.answer: must be 'yes', 'partly', 'no' or"),
        ("tools/one.yml", "evaluates: null", "stars: 5", "7: stars: is not a field"),
        ("tools/one.yml", "https:", "http:", "4: url: must be an address that starts with https://"),
        ("tools/one.yml", "# yaml", "# xaml", "1: the first line must be: # yaml-language-server: $schema=../schema/t"),
        ("tools/one.yml", "sources: [here]", f"sources: [here] # {catalog.TODO} look", "11: to do: look"),
        ("leaderboards/board.yml", '"2023-11"', "now", '6: as_of: must be a year and a month such as "2023-11"'),
        ("leaderboards/board.yml", "rank: 2", "rank: 3", "1: rows stand in order of rank: 1, 2, 3 and so on"),
        ("leaderboards/board.yml", "91.5", "92.5", "1: no row has a higher score than the row above it"),
        ("leaderboards/board.yml", "score: 91.5", "points: 91.5", "9: rows[1].points: is not a field"),
        ("perspectives/open.yml", "entry: deletion", "entry: x", "13: later_papers[0].entry: there is no entry x"),
        ("perspectives/open.yml", "insertion]", "insertoin]", "16: entries[1]: there is no entry insertoin; did you"),
        ("perspectives/open.yml", "insertion]", "raw-attention]", "16: entries[1]: is listed twice"),
        ("perspectives/open.yml", "insertion]", "one]", "16: entries[1]: there is no entry one"),
        (
            "perspectives/open.yml",
            "how: By magic.",
            "hwo: By magic.",
            "12: later_papers[0].hwo: is not a field; did you",
        ),
    ],
)
def test_reference_entries_are_read_as_strictly_as_methods(referred, name, old, new, problem):
    assert old in REFERENCE[name]
    (referred / name).write_text(REFERENCE[name].replace(old, new, 1), encoding="utf-8")
    lines = catalog.check(referred)
    assert any(line.startswith(f"catalog/{name}:{problem}") for line in lines), lines
    assert all(line.startswith(f"catalog/{name}:") for line in lines)


def test_reference_entries_lie_in_no_folder_and_may_share_an_id_with_a_method(referred):
    (referred / "tools" / "deletion.yml").write_text(TOOL.replace("id: one", "id: deletion"))
    assert catalog.check(referred) == []
    (referred / "tools" / "more").mkdir()
    (referred / "tools" / "more" / "x.yml").write_text(TOOL)
    assert catalog.check(referred) == ["catalog/tools/more/x.yml:1: belongs in catalog/tools/"]


def test_a_tool_holds_every_criterion_that_names_it():
    read = catalog.load()
    names = {"quantus.": "quantus", "captum.": "captum", "Xplique ": "xplique", "pytorch-grad-cam ": "pytorch-grad-cam"}
    names |= {"Transformer-Explainability ": "transformer-explainability", "PnPXAI ": "pnpxai"}
    for criterion in read.criteria.values():
        for place in criterion.implemented_in:
            for start, tool in names.items():
                assert not place.startswith(start) or criterion.id in read.tools[tool].implements, (criterion.id, tool)


def test_the_survey_is_carried_over_whole():
    read = catalog.load()
    assert len(read.tools) >= 27
    assert [len(read.leaderboards[id].rows) for id in ("ade20k-val", "coco-test-dev", "imagenet-top1")] == [5, 5, 5]
    assert len(read.perspectives) >= 11
    assert sum(len(one.later_papers) for one in read.perspectives.values()) >= 24


# -------------------------------------------------------------------------------------------------------------- ask


def test_unknown_ids_name_the_nearest():
    read = catalog.load()
    with pytest.raises(UnknownId, match='there is no method "attention-rolout"; did you mean attention-rollout'):
        catalog.get(read, "attention-rolout")
    with pytest.raises(UnknownId, match="did you mean attention-rollout"):
        catalog.snippet_path("rollout")
    with pytest.raises(UnknownId, match='there is no method or criterion "zzzz"; `vitx list` shows them all'):
        catalog.snippet_path("zzzz")
    for odd in ("", "../../etc/passwd", "*", "a" * 10_000, "\x00"):
        with pytest.raises(UnknownId):
            catalog.snippet_path(odd)


def test_snippet_path_reads_no_other_entry(root):
    (root / "methods" / "attention" / "raw-attention.yml").write_text("id: [")
    assert catalog.snippet_path("attention-rollout", root) == (
        root.parent / "snippets" / "attention" / "attention_rollout.py"
    )


def test_no_snippet_says_why(root):
    snippet = "snippet: snippets/attention/attention_rollout.py"
    (root.parent / "snippets" / "attention" / "attention_rollout.py").unlink()
    with pytest.raises(NoSnippet, match=r"attention-rollout has no snippet: snippets/.* does not exist"):
        catalog.snippet_path("attention-rollout", root)
    (root.parent / FILE).write_text(ENTRY.replace(snippet, "why_no_snippet: Needs a cluster."))
    with pytest.raises(NoSnippet, match=r"^attention-rollout has no snippet: Needs a cluster\.$"):
        catalog.snippet_path("attention-rollout", root)


def test_find_filters():
    read = catalog.load()

    def ids(**filters: str) -> list[str]:
        return [method.id for method in catalog.find(read, **filters)]

    assert ids() == list(read.methods)
    assert set(ids(family="attribution")) >= {"grad-cam", "occlusion"}
    assert "attention-rollout" in ids(family="attention", year="2020")
    assert "attention-rollout" not in ids(year="2021-2022")
    assert set(ids(year="2020-2022")) == set(ids(year="2020") + ids(year="2021") + ids(year="2022"))
    assert "tokencut" in ids(task="object-discovery")
    assert "evit" in ids(motivation="efficiency", needs="changed-architecture")
    assert all("gradients" in read.methods[id].needs for id in ids(needs="gradients"))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"family": "atention"}, '"atention" is not one of the families; did you mean attention, attribution?'),
        ({"needs": "gpu"}, '"gpu" is not one of the needs; they are forward-pass, gradients, attention-weights'),
        ({"year": ">=2021"}, 'the year must be written as 2021 or as 2020-2022, not ">=2021"'),
        ({"year": "2022-2020"}, "the years 2022-2020 run backwards"),
    ],
)
def test_find_refusals(filters, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        catalog.find(catalog.load(), **filters)
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------------------------- fuzz


YAML_PIECES = st.sampled_from(
    ["\n", " ", "  ", ":", ": ", "- ", "? ", "[", "]", "{", "}", ",", "&a ", "*a", "!!x ", "|", ">", "'", '"', "#", "%",
     "---", "...", "<<", "\t", "\x00", "\u2028", "\ud7ff", "é", "no", "010", "1:30", "null", "{{", "\\", "@", "`", "\r"]
)  # fmt: skip
MUTATION = st.tuples(
    st.integers(0, len(ENTRY)), st.integers(0, 40), st.one_of(YAML_PIECES, st.text(max_size=8), st.just(""))
)


def check_anything(root: Path, data: bytes) -> None:
    """Whatever the file holds, check answers in lines and load answers or raises CatalogError."""
    lines = with_entry(root, data)
    for line in lines:
        line.encode()
        file, number, text = line.split(":", 2)
        assert file.startswith(("catalog/methods/attention/", "snippets/attention/"))
        assert int(number) >= 1
        assert text.strip()
        assert "\n" not in line
    catalog.load.cache_clear()
    try:
        catalog.load(root)
    except CatalogError as error:
        assert set(error.problems) <= set(lines)  # noqa: PT017 - it may also load


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Path:
    root = make_atlas(tmp_path_factory.mktemp("atlas"))
    for path in root.glob("methods/*/*.yml"):
        path.write_text(path.read_text().replace("forward-pass, ", ""))
    # A small taxonomy, so that each example is quick.
    term = "label: x, label_zh: x, order: 1, definition: x, definition_zh: x"
    words = {"families": "attention", "subfamilies": "attention-aggregation", "motivations": "information-flow"}
    words |= {"tasks": "image-classification", "needs": "attention-weights", "outputs": "heatmap"}
    words |= {"categories": "faithfulness"}
    lines = [
        f"{name}: [{{id: {word}, {term}{', family: attention' * (name == 'subfamilies')}}}]\n"
        for name, word in words.items()
    ]
    (root / "taxonomy.yml").write_text("# yaml-language-server: $schema=schema/taxonomy.json\n" + "".join(lines))
    assert catalog.check(root) == []
    return root


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(MUTATION, min_size=1, max_size=6))
def test_mutated_entries_never_break_the_loader(shared_root, mutations):
    text = ENTRY.replace("forward-pass, ", "")
    for start, length, piece in mutations:
        text = text[:start] + piece + text[start + length :]
    check_anything(shared_root, text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.binary(max_size=300), st.lists(YAML_PIECES, max_size=60).map(lambda p: "".join(p).encode())))
def test_random_files_never_break_the_loader(shared_root, data):
    check_anything(shared_root, data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 999_999,
        "{" * 999_999,
        "- " * 499_999,
        "? " * 499_999,
        "a: " * 300_000,
        "a:\n" + "".join(f"{' ' * depth}- a:\n" for depth in range(1, 1000)),
        "&a " * 300_000,
        "x" * 999_999,
        "a: '" + "''" * 400_000,
        "a: |\n" + " \n" * 400_000,
        "".join(f"k{i}: 1\n" for i in range(60_000)),
        "tasks: [" + "x, " * 300_000 + "]",
        "#" * 999_999,
        "%" * 999_999,
        "a: 1" + "0" * 900_000,
    ],
    ids=lambda text: text[:8].replace("\n", " "),
)
def test_large_and_deep_files_are_answered(root, text):
    assert with_entry(root, text)

"""A new method starts from skeletons that are sound but for the TODOs that check lists; nothing is ever overwritten."""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vitx
from vitx import ATLAS, catalog, scaffold
from vitx.metadata import Work


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clone with the real taxonomy and no entry."""
    root = tmp_path / "catalog"
    root.mkdir()
    shutil.copy(ATLAS / "catalog" / "taxonomy.yml", root)
    (tmp_path / "tests").mkdir()
    return root


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"skeleton_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def files(root: Path) -> set[str]:
    return {path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["attribution", "attention", "pruning", "inherent", "tasks"])
def test_new_passes_check_but_for_its_todos(root, family):
    before = files(root)
    paths = scaffold.new("my-method", family, root)
    names = [path.relative_to(root.parent).as_posix() for path in paths]
    assert names == [
        f"catalog/methods/{family}/my-method.yml",
        f"snippets/{family}/my_method.py",
        f"tests/{family}/test_my_method.py",
    ]
    assert files(root) == before | set(names)
    problems = catalog.check(root)
    assert all(": to do: " in line for line in problems)
    assert {line.split(":")[0] for line in problems} == set(names)
    marked = sum(path.read_text(encoding="utf-8").count(catalog.TODO) for path in paths)
    assert len(problems) == marked
    assert catalog.load(root).methods["my-method"].snippet == names[1]
    assert catalog.snippet_path("my-method", root) == paths[1]


def test_a_criterion_passes_check_but_for_its_todos(root):
    paths = scaffold.new_criterion("my-criterion", root)
    names = [path.relative_to(root.parent).as_posix() for path in paths]
    assert names == [
        "catalog/evaluation/my-criterion.yml",
        "snippets/evaluation/my_criterion.py",
        "tests/evaluation/test_my_criterion.py",
    ]
    problems = catalog.check(root)
    assert all(": to do: " in line for line in problems)
    assert len(problems) == sum(path.read_text(encoding="utf-8").count(catalog.TODO) for path in paths)
    assert catalog.load(root).criteria["my-criterion"].snippet == names[1]


@pytest.mark.parametrize(
    "write", [lambda root: scaffold.new("x-y", "tasks", root), lambda root: scaffold.new_criterion("x-y", root)]
)
def test_the_skeletons_are_formatted(root, write):
    files = [str(path) for path in write(root) if path.suffix == ".py"]
    configured = ["--config", str(ATLAS / "pyproject.toml"), *files]
    assert subprocess.run([sys.executable, "-m", "ruff", "format", "--check", *configured]).returncode == 0
    assert subprocess.run([sys.executable, "-m", "ruff", "check", "--ignore", "E501", *configured]).returncode == 0


def blocks_of_the_page() -> dict[str, str]:
    """The files that docs/contributing.md shows, by name."""
    page = (ATLAS / "docs" / "contributing.md").read_text(encoding="utf-8")
    return dict(re.findall(r'^```[a-z]+ title="([^"]+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL))


def test_the_walk_of_the_contributors_page(root, monkeypatch):
    """Its command writes the files that it shows; with what it shows in them the check is clean and the tests pass."""
    (root / "methods" / "attention").mkdir(parents=True)
    (root.parent / "snippets" / "attention").mkdir(parents=True)
    for name in ("catalog/methods/attention/raw-attention.yml", "snippets/attention/raw_attention.py"):
        shutil.copy(ATLAS / name, root.parent / name)
    shown = blocks_of_the_page()
    paths = scaffold.new("last-layer-norm", "attention", root, Work(title="Last Layers Know"))
    assert [path.relative_to(root.parent).as_posix() for path in paths] == list(shown)
    for path in paths:
        assert len(catalog.check(root)) > 0
        path.write_text(shown[path.relative_to(root.parent).as_posix()], encoding="utf-8")
    assert [line for line in catalog.check(root) if "raw" not in line] == []

    explain = module(paths[1]).explain
    real = vitx.load
    monkeypatch.setattr(vitx, "load", lambda id: explain if id == "last-layer-norm" else real(id))

    def proof(method, check, value, *, at_most=math.inf, at_least=-math.inf, kind, oracle=""):
        assert at_least <= value <= at_most, check

    tests = [test for name, test in vars(module(paths[2])).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test(proof)


def test_check_is_clean_once_the_todos_are_done(root):
    for path in [*scaffold.new("my-method", "attention", root), *scaffold.new_criterion("my-criterion", root)]:
        path.write_text(path.read_text(encoding="utf-8").replace(catalog.TODO, "done:"), encoding="utf-8")
    assert catalog.check(root) == []


def test_the_skeleton_runs(root):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    path = scaffold.new("my-method", "attention", root)[1]
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    relevance = module(path).explain(model, torch.randn(2, 3, 32, 32))
    assert relevance.shape == (2, 2, 2)
    assert (relevance > 0).all()
    score = module(scaffold.new_criterion("my-criterion", root)[1]).score
    assert torch.allclose(score(torch.ones(2, 3, 4)), torch.full((2,), 1 / 12))


@pytest.mark.parametrize(
    ("id", "family", "message"),
    [
        ("My-Method", "attention", '"My-Method" is not an id: write lower-case words joined by hyphens, such as'),
        ("../x", "attention", '"../x" is not an id'),
        ("a_b", "attention", '"a_b" is not an id'),
        ("", "attention", '"" is not an id'),
        ("json", "attention", "json would shadow the Python module json; add a word to the id"),
        ("numpy", "attention", "numpy would shadow the Python module numpy; add a word to the id"),
        ("no", "attention", '"no" is a truth value or nothing to YAML; add a word to the id'),
        ("true", "attention", '"true" is a truth value or nothing to YAML; add a word to the id'),
        ("null", "attention", '"null" is a truth value or nothing to YAML; add a word to the id'),
        ("my-method", "atention", '"atention" is not one of the families; did you mean attention, attribution?'),
        (
            "my-method",
            "zzz",
            '"zzz" is not one of the families; they are attribution, attention, pruning, inherent, tasks',
        ),
    ],
)
def test_refusals_write_nothing(root, id, family, message):
    before = files(root)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        scaffold.new(id, family, root)
    assert str(caught.value).startswith(message)
    assert files(root) == before


def test_an_entry_of_any_family_blocks_the_id(root):
    scaffold.new("my-method", "attention", root)
    with pytest.raises(ValueError, match=r"^my-method exists already: catalog/methods/attention/my-method\.yml$"):
        scaffold.new("my-method", "pruning", root)


def test_existing_files_are_left_alone(root):
    test = root.parent / "tests" / "attention" / "test_my_method.py"
    test.parent.mkdir()
    test.write_text("mine")
    before = files(root)
    with pytest.raises(ValueError, match=r"^tests/attention/test_my_method\.py exists already; nothing was written$"):
        scaffold.new("my-method", "attention", root)
    assert files(root) == before
    assert test.read_text() == "mine"


def test_outside_a_clone(root):
    (root.parent / "tests").rmdir()
    with pytest.raises(ValueError, match="works in a clone of the repository"):
        scaffold.new("my-method", "attention", root)


@pytest.mark.parametrize("place", ["evaluation", "tools", "leaderboards", "perspectives", "models", "methods/tasks"])
def test_an_entry_of_any_kind_blocks_the_id(root, place):
    (root / place).mkdir(parents=True)
    (root / place / "taken-id.yml").write_text("unreadable: [")
    for write in (
        lambda: scaffold.new("taken-id", "attention", root),
        lambda: scaffold.new_criterion("taken-id", root),
    ):
        with pytest.raises(ValueError, match=rf"^taken-id exists already: catalog/{place}/taken-id\.yml$"):
            write()


def test_a_former_id_is_taken(root):
    path = scaffold.new("new-name", "attention", root)[0]
    with path.open("a") as file:
        file.write("formerly: [old-name]\n")
    with pytest.raises(ValueError, match=r"^old-name was the id of new-name before"):
        scaffold.new("old-name", "tasks", root)


WORK = Work(
    title="On ViTs",
    authors=("Abnar, Samira", "Zuidema, Willem"),
    year=2020,
    venue="ACL 2020",
    arxiv="2005.00928",
    doi="10.18653/v1/2020.ACL-main.385",
    url="https://example.org/",
    source="https://arxiv.org/abs/2005.00928",
)


def test_what_is_known_is_filled_in(root):
    path = scaffold.new("my-method", "attention", root, WORK)[0]
    entry = catalog.load(root).methods["my-method"]
    assert entry.paper.model_dump() == {
        field: getattr(WORK, field) for field in ("title", "authors", "year", "venue", "arxiv", "doi", "url")
    }
    assert entry.sources[0] == "https://arxiv.org/abs/2005.00928 (the paper's facts)"
    block = path.read_text().split("paper:")[1].split("code:")[0]
    assert catalog.TODO not in block
    assert not any("paper." in line for line in catalog.check(root))


def test_what_is_unsure_or_unknown_is_to_do(root):
    work = Work(
        title="T", authors=("Van Gool, Luc",), venue="arXiv 2020", arxiv="2005.00928", unsure=("authors", "venue")
    )
    path = scaffold.new("my-method", "attention", root, work)[0]
    lines = [line for line in path.read_text().split("code:")[0].splitlines() if catalog.TODO in line]
    assert [line.split(":")[0].strip() for line in lines] == ["name", "authors", "year", "venue", "doi"]
    paper = catalog.load(root).methods["my-method"].paper
    assert (paper.arxiv, paper.doi, paper.authors) == ("2005.00928", None, ("Van Gool, Luc",))


HOSTILE = [
    'a" b: [c, {d}] #e',
    "--- !!python/object x",
    "back\\slash \\n \\x41 {braces} {todo} %s",
    "'quoted' & *alias | > ? - : `",
    "null",
    "<script>alert(1)</script> $\\frac{1}{2}$ \u4e2d\u6587 \U0001f600",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_facts_stay_text(root, text):
    work = WORK._replace(title=text, authors=(text, text + "2"), venue=text, source=text)
    scaffold.new("my-method", "attention", root, work)
    scaffold.new_criterion("my-criterion", root, work._replace(arxiv=None, doi=None))
    read = catalog.load(root)
    for entry in (read.methods["my-method"], read.criteria["my-criterion"]):
        assert entry.paper is not None
        assert (entry.paper.title, entry.paper.authors, entry.paper.venue) == (text, (text, text + "2"), text)
    assert all(": to do: " in line for line in catalog.check(root))


@pytest.mark.parametrize("known", [{"arxiv": "2005.00928"}, {"doi": "10.18653/v1/2020.acl-MAIN.385"}])
def test_a_paper_that_the_catalogue_holds_is_refused(root, known):
    scaffold.new("my-method", "attention", root, WORK)
    before = files(root)
    for write in (scaffold.new_criterion, lambda *words: scaffold.new(words[0], "tasks", *words[1:])):
        with pytest.raises(
            ValueError, match=r"is the paper of my-method already \(catalog/methods/attention/my-method"
        ):
            write("another", root, Work(**known))
    assert files(root) == before
    scaffold.new("another", "attention", root, Work(arxiv="2005.00929"))

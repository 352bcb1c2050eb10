"""A new method starts from skeletons that are sound but for the TODOs that check lists; nothing is ever overwritten."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from vitx import ATLAS, catalog, scaffold


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clone with the real taxonomy and no entry."""
    root = tmp_path / "catalog"
    root.mkdir()
    shutil.copy(ATLAS / "catalog" / "taxonomy.yml", root)
    (tmp_path / "tests").mkdir()
    return root


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


def test_check_is_clean_once_the_todos_are_done(root):
    for path in scaffold.new("my-method", "attention", root):
        path.write_text(path.read_text(encoding="utf-8").replace(catalog.TODO, "done:"), encoding="utf-8")
    assert catalog.check(root) == []


def test_the_skeleton_runs(root):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    path = scaffold.new("my-method", "attention", root)[1]
    spec = importlib.util.spec_from_file_location("my_method_skeleton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    relevance = module.explain(model, torch.randn(2, 3, 32, 32))
    assert relevance.shape == (2, 2, 2)
    assert relevance.isfinite().all()


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

"""Keys say what a result depends on, executed notebooks are kept, failures name the snippet."""

import json
import shutil
import sys

import pytest
from vitx import ATLAS, catalog, execute, glyphs, load, models, vit


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A small copy of the atlas to change: kit, two snippets, their entries."""
    for folder in ("snippets", "catalog"):
        shutil.copytree(ATLAS / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(execute, "ATLAS", tmp_path)
    monkeypatch.setattr(execute, "KIT", tmp_path / "snippets" / "vitx")
    monkeypatch.setattr(execute, "CACHE", tmp_path / ".cache")
    return tmp_path


def test_what_a_source_uses_of_the_kit(copy):
    kit = copy / "snippets" / "vitx"
    (kit / "one.py").write_text(
        "from vitx import two\nfrom vitx.two import deep as far\nLIMIT = 3\n"
        "def near():\n    return LIMIT\n"
        "def other():\n    return far() + two.shallow()\n"
        "def late():\n    from vitx import two as second\n    return second\n"
        "def local(near):\n    two = [other for other in near]\n"
        "    def inner():\n        return two, LIMIT\n    return inner\n"
    )
    (kit / "two.py").write_text(
        "import math\nprint('always')\ndef deep():\n    return shallow()\n"
        "def shallow():\n    return math.pi\ndef free():\n    pass\n"
    )

    def used(source: str) -> set[str]:
        return {f"{module}.{name}" for module, name in execute.kit_pieces(source)}

    assert used("from vitx.one import near") == {"one.near", "one.LIMIT"}
    assert used("from vitx import one\none.other()") == {"one.other", "two.*", "two.deep", "two.shallow"}
    assert used("from vitx import two\ntwo.free") == {"two.*", "two.free"}
    whole = {"two.*", "two.deep", "two.shallow", "two.free"}
    assert used("from vitx import two") == whole, "nothing of it is named: all of it counts"
    assert used("from vitx import two\nf(two)") == whole
    assert used("from vitx.one import late") == {"one.late"} | whole
    assert used("from vitx.one import local") == {"one.local", "one.LIMIT"}, "arguments and variables share names only"
    assert used("import torch") == set()


@pytest.mark.parametrize("id", ["attention-rollout", "grad-cam", "transformer-attribution", "occlusion", "dynamicvit"])
def test_no_function_that_runs_is_missed(id):
    """Against what Python calls while the method runs."""
    called: set[str] = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == vit.__file__:
            called.add(frame.f_code.co_qualname.split(".")[0])

    entry = catalog.load().methods[id]
    loaded = models.load(entry.model or "glyph").model
    sys.setprofile(note)
    try:
        load(id)(loaded, glyphs.normalise(glyphs.scenes(1, seed=7).images))
    finally:
        sys.setprofile(None)
    pieces = execute.kit_pieces((ATLAS / str(entry.snippet)).read_text())
    assert called
    assert called <= {name for module, name in pieces if module == "vit"} | {"<module>"}


def keys() -> dict[str, str]:
    return {id: execute.snippet_key(id) for id, entry in catalog.load().methods.items() if entry.snippet}


def changed(before: dict[str, str]) -> set[str]:
    after = keys()
    return {id for id in before if before[id] != after[id]}


def append(path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")


def test_what_changes_a_key(copy):
    before = keys()
    assert len(set(before.values())) == len(before)
    append(copy / "snippets" / "vitx" / "pages.py")  # no snippet uses the pages
    append(copy / "snippets" / "vitx" / "bench.py")
    assert changed(before) == set()
    append(copy / "snippets" / "attribution" / "grad_cam.py")
    assert changed(before) == {"grad-cam"}
    append(copy / "snippets" / "tasks" / "generic_attention_detr.py")  # builds the detector that three methods explain
    assert changed(before) == {"grad-cam", "generic-attention-detr", "d-rise", "odam"}
    before = keys()
    append(copy / "snippets" / "attribution" / "grad_cam.py")
    append(copy / "catalog" / "methods" / "attention" / "raw-attention.yml")
    assert changed(before) == {"grad-cam", "raw-attention"}
    before, adapter = keys(), copy / "snippets" / "vitx" / "vit.py"
    append(adapter)
    adapter.write_text(adapter.read_text() + "\n\ndef unused():\n    pass\n")
    assert changed(before) == set()
    adapter.write_text(adapter.read_text().replace("def random_masks(", "def random_masks(  # changed\n", 1))
    assert changed(before) == {"rise", "d-rise"}
    adapter.write_text(adapter.read_text().replace("def check(", "def check(  # changed\n", 1))
    assert changed(before) == set(before), "every snippet checks its input"


def test_what_changes_the_key_of_a_criterion(copy):
    """Its script and entry, the methods that its demo shows, the models that it loads; no other criterion or method."""
    ids = ("deletion", "insertion")

    def after(path) -> set[str]:
        before = {id: execute.snippet_key(id) for id in ids}
        append(path) if path.suffix != ".safetensors" else path.write_bytes(b"other")
        return {id for id in ids if before[id] != execute.snippet_key(id)}

    snippets = copy / "snippets"
    assert after(snippets / "evaluation" / "deletion.py") == {"deletion"}
    assert after(copy / "catalog" / "evaluation" / "insertion.yml") == {"insertion"}
    assert after(snippets / "attribution" / "grad_cam.py") == set(ids)
    assert after(snippets / "attribution" / "rise.py") == set()
    assert after(snippets / "models" / "glyph.safetensors") == set(ids)
    assert after(snippets / "vitx" / "criteria_pages.py") == set()


def test_the_key_of_what_a_method_computes(copy, monkeypatch):
    """Not its demo, nor the words of its entry: measured rows hold when these change."""
    ids = ("rise", "d-rise", "grad-cam")

    def after(path, old: str, new: str) -> set[str]:
        before = {id: execute.method_key(id) for id in ids}
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return {id for id in ids if before[id] != execute.method_key(id)}

    kit, rise = copy / "snippets" / "vitx", copy / "snippets" / "attribution" / "rise.py"
    assert after(rise, "    demo.heatmap(", "    demo.heatmap(  # changed\n") == set()
    assert after(kit / "catalog.py", "def load(", "def load(  # changed\n") == set()
    assert after(rise, "def explain(", "def explain(  # changed\n") == {"rise"}
    assert after(kit / "vit.py", "def random_masks(", "def random_masks(  # changed\n") == {"rise", "d-rise"}
    builder = copy / "snippets" / "tasks" / "generic_attention_detr.py"
    assert after(builder, "def explain(", "def explain(  # changed\n") == {"d-rise"}

    before, atlas = execute.method_key("rise"), catalog.load()

    def with_entry(**fields) -> str:
        methods = atlas.methods | {"rise": atlas.methods["rise"].model_copy(update=fields)}
        monkeypatch.setattr(catalog, "load", lambda: atlas._replace(methods=methods))
        return execute.method_key("rise")

    assert with_entry(mechanism="other words") == before
    assert with_entry(quick={"masks": 501}) != before


def test_a_checkpoint_and_a_library_change_every_key(copy, monkeypatch):
    before = keys()
    path = copy / "snippets" / "models" / "glyph.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    assert changed(before) == set(before)
    before = keys()
    path = copy / "snippets" / "models" / "ice-glyph.safetensors"  # a model that one method uses
    path.write_bytes(path.read_bytes() + b" ")
    assert changed(before) == {"ice"}
    before = keys()
    monkeypatch.setattr(execute, "_versions", lambda: "torch 99")
    assert changed(before) == set(before)


def write(copy, id: str, code: str) -> None:
    entry = catalog.load().methods[id]
    (copy / str(entry.snippet)).write_text(f"# %% [markdown]\n# # Title\n\n# %%\n{code}\n")


def test_notebooks_run_once(copy):
    write(copy, "grad-cam", "print('seen', 6 * 7)")
    first = execute.notebooks(["grad-cam"])["grad-cam"]
    assert "seen 42" in json.dumps(json.loads(first.read_text()))
    modified = first.stat().st_mtime_ns
    assert execute.notebooks(["grad-cam"])["grad-cam"].stat().st_mtime_ns == modified
    write(copy, "grad-cam", "print('other')")
    second = execute.notebooks(["grad-cam"])["grad-cam"]
    assert second != first
    assert not first.exists(), "the stale one is removed"


def test_notebooks_of_criteria(copy):
    (copy / "snippets" / "evaluation" / "deletion.py").write_text("# %%\nprint('seen', 6 * 7)\n")
    path = execute.notebooks(["deletion"])["deletion"]
    assert path.name.startswith("deletion-")
    assert "seen 42" in path.read_text()


def test_a_failure_names_the_snippet_and_keeps_the_others(copy):
    write(copy, "grad-cam", "print('fine')")
    write(copy, "occlusion", "raise ValueError('no such window')")
    with pytest.raises(
        execute.ExecutionError, match=r"snippets/attribution/occlusion\.py: ValueError: no such window"
    ) as error:
        execute.notebooks(["grad-cam", "occlusion"])
    assert "\n" not in str(error.value)
    assert len(list((copy / ".cache" / "notebooks").glob("grad-cam-*.ipynb"))) == 1
    assert not list((copy / ".cache" / "notebooks").glob("occlusion-*"))
    assert "no such window" in next((copy / ".cache" / "failed").glob("occlusion.txt")).read_text()

"""The command line as a user meets it: what it prints, what it writes, one sentence and exit code 2 for a mistake."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm import create_model
from vitx import ATLAS, catalog, cli, links, metadata, scaffold
from vitx.metadata import Work


@pytest.fixture
def vitx(capsys, monkeypatch, tmp_path):
    """vitx(*words) -> (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "_width", 200)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitx", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one sentence that holds the words, no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


def test_list(vitx):
    code, out, _ = vitx("list")
    assert code == 0
    assert all(id in out for id in catalog.load().methods)
    code, out, _ = vitx("list", "--family", "attention", "--needs", "gradients", "--json")
    entries = json.loads(out)
    assert {"transformer-attribution", "generic-attention-explainability"} <= {entry["id"] for entry in entries}
    assert all(entry["family"] == "attention" and "gradients" in entry["needs"] for entry in entries)
    assert "raw-attention" not in {entry["id"] for entry in entries}
    assert {"id", "family", "subfamily", "in_survey", "output", "snippet", "stochastic"} <= set(entries[0])
    assert json.loads(vitx("list", "--year", "1990", "--json")[1]) == []


def test_list_criteria(vitx):
    code, out, _ = vitx("list", "--criteria")
    assert code == 0
    criteria = catalog.load().criteria
    shown = [line.split()[0] for line in out.splitlines()[1:]]
    assert shown == [*criteria, str(len(criteria))], "all of them, in catalogue order"
    entries = json.loads(vitx("list", "--criteria", "--json")[1])
    assert [entry["id"] for entry in entries] == list(criteria)
    assert {"id", "category", "better", "definition", "snippet"} <= set(entries[0])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("list", "--criteria", "--family", "attention"), "filters are for methods"),
        (("show", "deletoin"), "deletion"),
        (("cite", "insertoin"), "insertion"),
        (("cite", "pair-discrimination"), "CITATION.cff"),
        (("run", "deletion"), "no method"),
        (("bench", "--methods", "deletion"), "no method"),
        (("list", "--family", "atention"), "attention"),
        (("list", "--year", "twenty"), "2021"),
        (("show", "attention-rolout"), "attention-rollout"),
        (("cite", "grad-cm"), "grad-cam"),
        (("cite", "grad-cam", "--format", "ris"), "bibtex, csl-json, apa or csv"),
        (("run", "grad-cm"), "grad-cam"),
        (("run", "grad-cam", "--image", "nothing.png"), "nothing.png"),
        (("run", "grad-cam", "--target", "99"), "classes 0 to 11"),
        (("run", "grad-cam", "--target", "dragon"), "no class"),
        (("run", "grad-cam", "--model", "resnet18"), "VisionTransformer"),
        (("run", "grad-cam", "--model", "vit_tinny_patch16_224"), "vit_tiny_patch16_224"),
        (("run", "grad-cam", "--model", "vit_tiny_patch16_224"), "glyph"),
        (("run", "grad-cam", "--device", "toaster"), "toaster"),
        (("run", "grad-cam", "--out", "picture.tiff"), ".png"),
        (("run", "grad-cam", "--checkpoint", "mine.pth"), "--model"),
        (("compare", "--methods", ","), "at least one method"),
        (("compare", "--methods", "grad-cam,lyme"), "lime"),
        (("compare", "--methods", "grad-cam,savit"), "vitx run savit"),
    ],
)
def test_mistakes(vitx, tmp_path, words, reason):
    refused(vitx(*words), reason)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_unknown_option_and_no_command(vitx):
    code, _, err = vitx("list", "--colour", "red")
    assert code == 2
    assert "--colour" in err


def test_show_and_cite(vitx):
    code, out, _ = vitx("show", "attention-rollout")
    assert code == 0
    assert "Abnar" in out
    assert "snippets/attention/attention_rollout.py" in out
    code, out, _ = vitx("cite", "attention-rollout", "--format", "bibtex")
    assert code == 0
    assert out.count("@") == 1
    assert len(json.loads(vitx("cite", "--family", "attention", "--format", "csl-json")[1])) >= 3
    assert "(2020)" in vitx("cite", "attention-rollout", "--format", "apa")[1]
    lines = vitx("cite", "attention-rollout", "pair-discrimination", "--format", "csv")[1].splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "attention-rollout", "pair-discrimination"]


def test_show_and_cite_a_criterion(vitx):
    code, out, _ = vitx("show", "deletion")
    assert code == 0
    for word in ("Petsiuk", "faithfulness", "down", "snippets/evaluation/deletion.py", r"$$\int_0^1"):
        assert word in out
    assert "no paper of its own" in vitx("show", "pair-discrimination")[1]
    assert "none: It needs participants" in vitx("show", "human-study")[1]
    code, out, _ = vitx("cite", "deletion", "rise", "sparseness")
    assert code == 0
    assert out.count("@") == 2, "deletion and RISE share a paper"
    assert "@inproceedings{deletion," in out
    assert "ids = {rise}" in out
    assert "Chalasani" in vitx("cite", "sparseness", "--format", "apa")[1]


def test_run_writes_picture_and_map(vitx, tmp_path):
    code, out, err = vitx("run", "attention-rollout", "--out", "deep/map.png")
    assert code == 0, err
    assert "%" in out, "the predicted classes"
    assert Image.open(tmp_path / "deep" / "map.png").width > 200
    relevance = np.load(tmp_path / "deep" / "map.npy")
    assert relevance.shape == (14, 14)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["map.npy", "map.png"]


def test_run_writes_scores_of_units(vitx, tmp_path):
    code, _, err = vitx("run", "savit")
    assert code == 0, err
    assert Image.open(tmp_path / "savit.png").width > 200
    arrays = np.load(tmp_path / "savit.npz")
    assert {"scores_heads", "kept_heads", "scores_neurons", "kept_neurons"} <= set(arrays.files)
    assert arrays["scores_heads"].shape[-2:] == (6, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["savit.npz", "savit.png"]


def test_target_by_name_is_target_by_number(vitx, tmp_path):
    from vitx import glyphs

    assert vitx("run", "grad-cam", "--target", glyphs.CLASS_NAMES[3], "--out", "a.png")[0] == 0
    assert vitx("run", "grad-cam", "--target", "3", "--out", "b.png")[0] == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_own_checkpoint_and_own_picture(vitx, tmp_path):
    """A reader's fine-tuned timm model on a reader's picture."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "mine.safetensors")
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "mine.jpg")
    words = ("run", "raw-attention", "--image", "mine.jpg", "--model", "vit_tiny_patch16_224")
    code, out, err = vitx(*words, "--checkpoint", "mine.safetensors", "--num-classes", 3)
    assert code == 0, err
    assert "class 2" in out
    assert np.load(tmp_path / "raw-attention.npy").shape == (14, 14)
    refused(vitx(*words, "--checkpoint", "mine.safetensors", "--num-classes", 5), "head.weight")


def test_compare(vitx, tmp_path):
    words = ("--model", "glyph", "--image", "sample", "--image", "glyph:3", "--out", "c.png")
    code, _, err = vitx("compare", "--methods", "raw-attention,grad-cam", *words)
    assert code == 0, err
    picture = Image.open(tmp_path / "c.png")
    assert picture.width > picture.height  # two rows of three


def test_check_and_new(vitx):
    code, out, _ = vitx("check")
    assert code == 0, out
    assert "no problems" in out
    refused(vitx("new", "Grad CAM", "--family", "attention"), "Grad CAM")
    refused(vitx("new", "grad-cam", "--family", "attribution"), "grad-cam")


def test_show_every_kind(vitx):
    code, out, _ = vitx("show", "lime")
    assert code == 0
    assert "(method lime)" in out
    assert "(tool lime)" in out, "the tool has the id of the method"
    atlas = catalog.load()
    shown = {
        "captum": "on a stock timm model",
        "imagenet-top1": "1. ",
        "efficiency": "later papers",
        "glyph": "measured",
    }
    for id, words in shown.items():
        out = vitx("show", id)[1]
        assert catalog.named(atlas, id)[0].name in out
        assert words in out
    refused(vitx("show", "captumm"), "captum")


# --- contributing --------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with the real taxonomy and no entry, in which `vitx new` writes; nobody is at the terminal."""
    root = tmp_path / "clone" / "catalog"
    root.mkdir(parents=True)
    (root.parent / "tests").mkdir()
    shutil.copy(ATLAS / "catalog" / "taxonomy.yml", root)
    for name in ("new", "new_criterion", "check_new"):
        monkeypatch.setattr(scaffold, name, functools.partial(getattr(scaffold, name), root=root))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return root


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self):
        return True


def test_new_without_a_terminal_names_what_is_missing(vitx, clone):
    refused(vitx("new", "my-method"), "--family is missing; give one of attribution, attention, pruning, inherent")
    refused(vitx("new", "my-method", "--criterion", "--family", "attention"), "a criterion has no family")
    refused(vitx("new", "my-method", "--family", "attention", "--arxiv", "1", "--doi", "2"), "give one of --arxiv")
    refused(vitx("new", "my-method", "--family", "attention", "--arxiv", ""), "neither an arXiv identifier")
    refused(vitx("new", "my-method", "--family", "attention", "--bibtex", "x.bib"), "x.bib")
    assert not list(clone.rglob("*/*.yml"))
    assert vitx("new", "my-method", "--family", "attention", "--title", "A Title")[0] == 0
    assert catalog.load(clone).methods["my-method"].paper.title == "A Title"


def test_new_asks_at_a_terminal(vitx, clone, monkeypatch):
    answers = ["attenshun", "attention", "", "A Title", "Doe, Jane; Roe, Richard", "2021"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    code, out, err = vitx("new", "my-method")
    assert code == 0, err
    assert "Family (attribution, attention, pruning, inherent, tasks)" in out
    assert '"attenshun" is not one of them' in out + err
    paper = catalog.load(clone).methods["my-method"].paper
    assert (paper.title, paper.authors, paper.year) == ("A Title", ("Doe, Jane", "Roe, Richard"), 2021)
    monkeypatch.setattr(sys, "stdin", Terminal("\n\n\n\n"))
    assert vitx("new", "my-criterion", "--criterion")[0] == 0
    catalog.load.cache_clear()
    assert catalog.load(clone).criteria["my-criterion"].paper is not None


def test_new_asks_for_a_name_of_the_paper(vitx, clone, tmp_path, monkeypatch):
    (tmp_path / "x.bib").write_text("@misc{x, title={From a file}, author={Doe, Jane}, year=2022}")
    monkeypatch.setattr(sys, "stdin", Terminal("x.bib\n"))
    assert vitx("new", "my-method", "--family", "tasks")[0] == 0
    assert catalog.load(clone).methods["my-method"].paper.title == "From a file"


def test_new_with_a_network(vitx, clone, monkeypatch):
    found = Work(title="Found", authors=("Doe, Jane",), year=2020, arxiv="2005.00928", source="https://arxiv.org/abs/1")
    monkeypatch.setattr(metadata, "complete", lambda work: found._replace(arxiv=work.arxiv))
    words = ("--family", "attention", "--arxiv", "https://arxiv.org/abs/2005.00928v2")
    code, out, _ = vitx("new", "my-method", *words)
    assert code == 0
    assert "wrote" in out
    assert catalog.load(clone).methods["my-method"].paper.title == "Found"

    def not_asked(work):
        raise AssertionError("a paper that the catalogue holds is not looked up")

    monkeypatch.setattr(metadata, "complete", not_asked)
    refused(vitx("new", "another", *words), "2005.00928 is the paper of my-method already")


@pytest.mark.parametrize("given", [("--arxiv", "2005.00928v3"), ("--doi", "https://doi.org/10.1000/182")])
def test_new_without_a_network_keeps_what_is_given(vitx, clone, monkeypatch, given):
    def unreachable(url, accept):
        raise metadata.NoAnswer("there is no network, or it does not reach that host")

    monkeypatch.setattr(metadata, "fetch", unreachable)
    code, out, _ = vitx("new", "my-method", "--family", "attention", *given)
    assert code == 0
    told = [line for line in out.splitlines() if "no network" in line]
    assert len(told) == 1
    paper = catalog.load(clone).methods["my-method"].paper
    assert (paper.arxiv or paper.doi) in told[0]
    assert {paper.arxiv, paper.doi} in ({"2005.00928", None}, {"10.1000/182", None})


def test_new_for_a_work_that_nobody_knows(vitx, clone, monkeypatch):
    def nothing(url, accept):
        return b'<feed xmlns="http://www.w3.org/2005/Atom"/>'

    monkeypatch.setattr(metadata, "fetch", nothing)
    refused(vitx("new", "my-method", "--family", "attention", "--arxiv", "2005.99999"), "arXiv knows no 2005.99999")
    assert not list(clone.rglob("*/*.yml"))


def test_check_links(vitx, monkeypatch):
    places = {"https://a/": [links.Place("catalog/x.yml", 3, "code.url")], "https://b/": [links.Place("y", 1, "z")]}
    answers = {
        "https://a/": links.Answer(links.State.DEAD, "404 Not Found"),
        "https://b/": links.Answer(links.State.UNDECIDED, "403 Forbidden"),
    }
    monkeypatch.setattr(links, "addresses", lambda: places)
    monkeypatch.setattr(links, "look_up", lambda urls, done: answers)
    code, out, err = vitx("check", "--links")
    assert code == 1
    assert "catalog/x.yml:3: code.url: https://a/: 404 Not Found" in out.splitlines()
    assert err == "y:1: z: https://b/: 403 Forbidden\n"
    assert "2 addresses: 0 answer, 1 are dead, 1 do not let a program decide" in out
    del answers["https://a/"]
    assert vitx("check", "--links")[0] == 0

    def no_network(urls, done):
        raise ValueError("there is no network")

    monkeypatch.setattr(links, "look_up", no_network)
    refused(vitx("check", "--links"), "there is no network")


def test_diff(vitx):
    folder = str(ATLAS / "catalog")
    code, out, _ = vitx("diff", folder, folder)
    assert code == 0
    assert out.endswith("Nothing changed.\n")
    assert json.loads(vitx("diff", folder, folder, "--json")[1]) == {"terms": {}, "entries": {}}
    refused(vitx("diff", "no-such-version", folder), "neither a folder")


def test_python_m_vitx():
    environment = os.environ | {"COLUMNS": "200"}
    result = subprocess.run([sys.executable, "-m", "vitx", "list"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    assert "attention-rollout" in result.stdout

"""What holds for every criterion: its form, what it reads, one value for each picture whatever stands beside it."""

import ast
from typing import Any

import pytest
import torch
from torch import Tensor
from vitx import ATLAS, catalog, evaluate, load_module
from vitx.evaluate import Settings, Study, Unavailable

ENTRIES = {entry.id: entry for entry in catalog.load().criteria.values() if entry.snippet}
IMPORTS = {
    "math",
    "typing",
    "torch",
    "numpy",
    "scipy",
    "vitx",
    "vitx.metrics",
    "vitx.removal",
    "vitx.retest",
    "vitx.vit",
}
# Fields that are the same for every picture.
COMMON = {"shares", "hidden", "group", "names"}
PICTURES = 16
SETTINGS = Settings(pictures=PICTURES, few=PICTURES, steps=14, masking="drop")
# Criteria by which the true mask is not meant to be better than noise, with the reason.
NOT_BY_THE_MASK = {
    "non-sensitivity": "a mask gives nothing to the background, and hiding a patch of that changes the logit a little",
    "leave-one-out": "no patch of a creature is missed alone: hiding one often raises the logit",
    "monotonicity": "where all patches of the creature are equal their order is that of chance",
}


def source(id: str) -> str:
    return (ATLAS / str(ENTRIES[id].snippet)).read_text()


@pytest.mark.parametrize("id", ENTRIES)
def test_form(id):
    """One function, the allowed imports, parameters that say what it reads, no docstring of the module, a demo."""
    tree = ast.parse(source(id))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert functions == ["score"]
    above = [node for node in tree.body if not isinstance(node, ast.If)]
    imported = set()
    for node in (n for statement in above for n in ast.walk(statement)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported <= IMPORTS
    assert ast.get_docstring(tree) is None
    score = load_module(id).score
    assert score.__doc__ is not None
    assert "Returns:" in score.__doc__
    known = evaluate.QUANTITIES.keys() | {"target", "inside"}
    assert set(evaluate.reads(score)) <= known
    assert f'demo.criterion("{id}")' in source(id)
    assert "## Where this departs from" in source(id)


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    """Sixteen scenes with the maps of one method, of noise and of the true mask."""
    about = evaluate.given(SETTINGS, 0, PICTURES)
    shared = Study(**about)
    about |= {name: shared(name) for name in evaluate.SHARED}
    return {
        "grad-cam": Study(explain=evaluate.explainer("grad-cam"), **about),
        "random": Study(explain=evaluate.explainer("random"), **about),
        "object-mask": Study(explain=evaluate.explainer("object-mask"), relevance=about["inside"], **about),
    }


def of_picture(value: Any, row: int) -> Any:
    """A quantity of one picture alone."""
    if hasattr(value, "_asdict"):
        own = {name: of_picture(field, row) for name, field in value._asdict().items() if name not in COMMON}
        return value._replace(**own)
    return value[row : row + 1] if isinstance(value, Tensor) else value


@pytest.mark.parametrize("id", ENTRIES)
def test_one_value_for_each_picture(id, studies, proof):
    score = load_module(id).score
    study = studies["grad-cam"]
    values = study.apply(score)
    assert values.shape == (PICTURES,)
    assert values.is_floating_point()
    assert not values.isinf().any()
    assert values.isfinite().sum() >= PICTURES // 2
    given = {name: study(name) for name in evaluate.reads(score)}
    alone = torch.cat([score(**{n: of_picture(value, row) for n, value in given.items()}) for row in range(PICTURES)])
    assert torch.equal(values.isnan(), alone.isnan())
    error = ((values - alone).abs().nan_to_num().max() / values.abs().nan_to_num().max().clamp(min=1e-12)).item()
    proof(id, "a batch of sixteen equals sixteen singles", error, at_most=1e-5, kind="contract")


@pytest.mark.parametrize("id", [id for id, entry in ENTRIES.items() if entry.better != "neither"])
def test_the_true_mask_beats_noise(id, studies, proof):
    """Where the true mask has a score, it is better in the mean than normal noise."""
    score, sign = load_module(id).score, -1 if ENTRIES[id].better == "down" else 1
    try:
        mask = studies["object-mask"].apply(score)
    except Unavailable:
        pytest.skip("the true mask explains no model")
    gain = (sign * (mask - studies["random"].apply(score))).nanmean().item()
    if id in NOT_BY_THE_MASK:
        assert gain <= 0, "no exception any more"
        return
    proof(id, "the true mask scores better than normal noise, 16 glyph scenes", gain, at_least=0.0, kind="ground truth")
    assert gain > 0


def test_the_exceptions_exist():
    assert NOT_BY_THE_MASK.keys() <= ENTRIES.keys()

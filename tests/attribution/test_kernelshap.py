"""KernelSHAP: exact where all coalitions are seen, efficient always, and nearer to the truth with more samples."""

import itertools
import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import LimeBase
from helpers import pictures, relative_error, tiny, variant
from vitx.vit import UnsupportedModel

ID = "kernelshap"
shap: Any = import_module("shap")  # its own types leave out half of it
snippet = vitx.load_module(ID)


def model_of(depth=2):
    return tiny(depth, img_size=(24, 32))  # twelve patches: 4,096 coalitions


def worth(model, image, target, score="logit"):
    """v(z) for rows of zeros and ones (n, 12): a numpy function, one picture painted patch by patch for each row."""

    def function(rows):
        painted, hidden = image.repeat(len(rows), 1, 1, 1), torch.tensor(rows) == 0
        for patch in range(12):
            i, j = divmod(patch, 4)
            painted[hidden[:, patch], :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = 0
        with torch.no_grad():
            logits = model(painted)
        return (logits if score == "logit" else logits.softmax(-1))[:, target].numpy()

    return function


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("score", ["logit", "probability"])
def test_all_coalitions_give_the_shapley_values(depth, score, proof):
    model = model_of(depth)
    x = pictures(model, 2)
    ours = vitx.load(ID)(model, x, torch.tensor([1, 3]), samples=4094, score=score)
    errors = []
    for image, target, phi in zip(x, (1, 3), ours, strict=True):
        explainer = shap.explainers.Exact(
            worth(model, image, target, score), shap.maskers.Independent(np.zeros((1, 12)))
        )
        errors.append(relative_error(phi.flatten(), explainer(np.ones((1, 12)), silent=True).values[0]))
    oracle = "shap ExactExplainer, all 4,096 coalitions"
    proof(ID, f"{score}, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_agrees_with_the_authors_code(proof):
    model = model_of()
    x = pictures(model, 1)
    explainer = shap.KernelExplainer(worth(model, x[0], 2), np.zeros((1, 12)))
    theirs = explainer.shap_values(np.ones((1, 12)), nsamples=5000, l1_reg=False, silent=True)[0]
    ours = vitx.load(ID)(model, x, torch.tensor([2]), samples=5000)[0]
    error = relative_error(ours.flatten(), theirs)
    proof(ID, "no penalty, all coalitions", error, at_most=1e-8, kind="parity", oracle="shap KernelExplainer")


def sampled(paired, samples=300):
    """A sample of coalitions of twelve patches and the logits of a model for them."""
    model = model_of()
    x = pictures(model, 1)
    z, weights = snippet.coalitions(12, samples, paired, torch.Generator().manual_seed(3))
    function = worth(model, x[0], 2)
    values, ends = function(z.numpy()), function(np.array([[0] * 12, [1] * 12]))
    empty, full = torch.tensor(ends)[:, None]
    return model, x, z, weights, torch.tensor(values), empty, full


@pytest.mark.parametrize("paired", [True, False])
def test_a_sample_is_solved_as_with_lagrange(paired, proof):
    """Covert and Lee 2021, equation 8: A^-1 (b - 1 (1' A^-1 b - v(1) + v(0)) / (1' A^-1 1))."""
    model, x, z, _, values, empty, full = sampled(paired)
    a = np.mean([np.outer(row, row) for row in z.numpy()], axis=0)
    b = np.mean([row * (v - float(empty)) for row, v in zip(z.numpy(), values.numpy(), strict=True)], axis=0)
    one, inverse = np.ones(12), np.linalg.inv(a)
    surplus = one @ inverse @ b - float(full - empty)
    theirs = inverse @ (b - one * surplus / (one @ inverse @ one))
    options = {"samples": 300, "paired": paired, "generator": torch.Generator().manual_seed(3)}
    ours = vitx.load(ID)(model, x, torch.tensor([2]), **options)
    what = "300 samples, paired" if paired else "300 samples"
    oracle = "closed form with a Lagrange multiplier, in numpy"
    proof(ID, what, relative_error(ours.flatten(), theirs), at_most=1e-9, kind="parity", oracle=oracle)


def test_a_sample_is_solved_as_by_captum(proof):
    """Captum meets the constraint by a weight of a million for the empty and the full coalition."""
    _, _, z, weights, values, empty, full = sampled(False)
    rows = torch.cat([torch.zeros(1, 12), torch.ones(1, 12), z.float()])
    answers = torch.cat([empty, full, values])
    asked = iter(answers)

    def samples(*_, **__):
        yield from rows.split(1)

    lime = LimeBase(
        lambda _: next(asked)[None],
        SkLearnLinearRegression(),
        lambda *given, **_: torch.tensor([1e6 if given[2].sum() in (0, 12) else 1.0]),
        samples,
        True,
        lambda row, *_, **__: row,
        None,
    )
    theirs = lime.attribute(torch.ones(1, 12), n_samples=len(rows))
    ours = snippet.solve(z, weights, values[None], empty, full)
    error = relative_error(ours, theirs)
    oracle = "captum's regression on the same samples (float32, soft constraint)"
    proof(ID, "300 samples", error, at_most=1e-3, kind="parity", oracle=oracle)


@pytest.mark.parametrize("removal", ["grey", "drop"])
@pytest.mark.parametrize("samples", [6, 40, 4094])
def test_values_add_up(removal, samples, proof):
    model = model_of()
    x, target = pictures(model, 3), torch.tensor([0, 4, 2])
    phi = vitx.load(ID)(model, x, target, samples=samples, removal=removal)
    with torch.no_grad():
        if removal == "grey":
            nothing = model(torch.zeros_like(x))
        else:
            token = model._pos_embed(model.patch_embed(x))[:, :1]
            nothing = model.forward_head(model.norm(model.blocks(token)))
        gain = (model(x) - nothing).gather(1, target[:, None])[:, 0]
    error = relative_error(phi.sum((1, 2)), gain)
    what = f"efficiency, {samples} samples, removal {removal}"
    proof(ID, what, error, at_most=1e-9, kind="closed form", oracle="v(all) - v(none)")


def test_dropped_tokens_are_a_shorter_sequence(proof):
    model = tiny(3)
    x, target = pictures(model, 2), torch.tensor([1, 4])
    ours = vitx.load(ID)(model, x, target, samples=14, removal="drop")
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))

        def value(members, picture):
            rest = tokens[picture : picture + 1, [0, *(1 + member for member in members)]]
            return float(model.forward_head(model.norm(model.blocks(rest)))[0, target[picture]])

        theirs = np.zeros((2, 4))
        for picture, order in itertools.product(range(2), itertools.permutations(range(4))):
            for place, patch in enumerate(order):
                gain = value(sorted(order[: place + 1]), picture) - value(sorted(order[:place]), picture)
                theirs[picture, patch] += gain / math.factorial(4)
    error = relative_error(ours.flatten(1), theirs)
    oracle = "mean gain over all orders of the patches, tokens cut out one by one"
    proof(ID, "dropped tokens, all coalitions", error, at_most=1e-9, kind="parity", oracle=oracle)


def test_a_patch_that_changes_nothing_gets_nothing(proof):
    model = model_of()
    x = pictures(model, 1)
    x[:, :, 8:16, 16:24] = 0  # already of the colour that hides: patch (1, 2)
    phi = vitx.load(ID)(model, x, samples=4094)[0]
    proof(ID, "null player", (phi[1, 2] / phi.abs().max()).abs(), at_most=1e-9, kind="closed form")
    assert phi[0, 0].abs() > 1e-6


@pytest.mark.parametrize("paired", [True, False])
def test_an_additive_game_is_solved_by_any_sample(paired, proof):
    z, weights = snippet.coalitions(20, 80, paired, torch.Generator().manual_seed(0))
    gains = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    empty = torch.tensor([0.3, -1.0], dtype=torch.float64)
    phi = snippet.solve(z, weights, empty[:, None] + gains @ z.T, empty, empty + gains.sum(1))
    what = "an additive game, paired" if paired else "an additive game"
    proof(ID, what, relative_error(phi, gains), at_most=1e-9, kind="closed form")


def test_more_samples_come_nearer(proof):
    model = model_of(3)
    x = pictures(model, 4)
    target = model(x).argmax(-1)
    exact = vitx.load(ID)(model, x, target, samples=4094)
    errors = {}
    for samples in (60, 240, 960):
        runs = [
            vitx.load(ID)(model, x, target, samples=samples, generator=torch.Generator().manual_seed(seed))
            for seed in range(5)
        ]
        errors[samples] = float(torch.stack([(run - exact).norm() / exact.norm() for run in runs]).mean())
    assert errors[60] > errors[240] > errors[960]
    proof(
        ID,
        "relative error, 12 patches, 960 samples",
        errors[960],
        at_most=0.2,
        kind="closed form",
        oracle="exact values",
    )


def test_sizes_follow_the_kernel():
    z, weights = snippet.coalitions(9, 40_000, False, torch.Generator().manual_seed(0))
    assert len(z) == 510  # all of them
    z, weights = snippet.coalitions(14, 16_000, False, torch.Generator().manual_seed(0))
    sizes = torch.arange(1, 14, dtype=torch.float64)
    expected = 1 / (sizes * (14 - sizes))
    counts = torch.bincount(z.sum(1).long(), minlength=14)[1:]
    assert torch.allclose(counts.double() / 16_000, expected / expected.sum(), atol=0.012)
    assert torch.allclose(z.mean(0), torch.full((14,), 0.5, dtype=torch.float64), atol=0.02)
    assert torch.equal(weights, torch.ones(16_000, dtype=torch.float64))
    z, _ = snippet.coalitions(14, 100, True, torch.Generator().manual_seed(0))
    assert torch.equal(z[:50] + z[50:], torch.ones(50, 14, dtype=torch.float64))


def test_enumerated_weights_are_the_kernel():
    z, weights = snippet.coalitions(6, 62, True, torch.Generator())
    assert len({tuple(row) for row in z.tolist()}) == 62
    for row, weight in zip(z.tolist(), weights.tolist(), strict=True):
        k = int(sum(row))
        assert weight == pytest.approx(5 / (math.comb(6, k) * k * (6 - k)))


def test_chunks_make_no_difference():
    model = model_of()
    x = pictures(model, 3)
    for removal in ("grey", "drop"):
        options = {"samples": 30, "removal": removal}
        small, large = (vitx.load(ID)(model, x, chunk=chunk, **options) for chunk in (7, 1000))
        assert relative_error(small, large) < 1e-12


@pytest.mark.parametrize("options", [{"samples": 1}, {"samples": 5}, {"removal": "blur"}, {"score": "odds"}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match=r"samples must|removal is"):
        vitx.load(ID)(model, pictures(model), **options)


def test_nothing_left_is_refused():
    model = variant("no class token, average pooling")
    with pytest.raises(UnsupportedModel, match="removal='grey'"):
        vitx.load(ID)(model, pictures(model), samples=10, removal="drop")
    assert vitx.load(ID)(model, pictures(model), samples=10).isfinite().all()

from itertools import count
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from captum.attr import GradientShap, IntegratedGradients
from helpers import pictures, relative_error, tiny
from shap import GradientExplainer
from torch import nn

ID = "gradientshap"


def draws(samples, background, x, seed=0):
    """Background picture, point on the path and noise of every sample, as the default generator gives them."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(len(background), (samples,), generator=generator)
    alpha = torch.rand(samples, generator=generator)
    return reference, alpha.double(), torch.randn((samples, *x.shape[1:]), generator=generator).double()


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("depth", [2, 3])
def test_captum(depth, noise, proof, monkeypatch):
    model, target, samples = tiny(depth), torch.tensor([4, 2]), 7
    x, background = pictures(model), pictures(model, 3, seed=9)
    settings = {"samples": samples, "baselines": background, "noise": noise}
    ours = vitx.load(ID)(model, x, target, **settings, chunk=5, pool=None)
    reference, alpha, epsilon = draws(samples, background, x)
    monkeypatch.setattr(np.random, "choice", lambda *_: reference.numpy())
    monkeypatch.setattr(np.random, "uniform", lambda *_: alpha.numpy())
    monkeypatch.setattr(torch, "normal", lambda *_: noise * epsilon)
    theirs: list[Any] = [
        GradientShap(model).attribute(image[None], background, n_samples=samples, stdevs=noise, target=int(label))
        for image, label in zip(x, target, strict=True)
    ]
    error = relative_error(ours, torch.cat(theirs).sum(1).detach())
    oracle = "captum GradientShap, with the same draws"
    proof(ID, f"pixels, noise {noise}, depth {depth}", error, at_most=1e-9, kind="parity", oracle=oracle)


def test_the_authors_library(proof, monkeypatch):
    model, samples = tiny(2), 6
    x, background = pictures(model), pictures(model, 3, seed=9)
    reference, alpha, _ = draws(samples, background, x)
    order, place = count(), count()
    monkeypatch.setattr(np.random, "choice", lambda *_: int(reference[next(order) % samples]))
    monkeypatch.setattr(np.random, "uniform", lambda *_: float(alpha[next(place) % samples]))
    torch.set_default_dtype(torch.float64)  # the library allocates its samples in the default precision
    try:
        explainer: Any = GradientExplainer
        theirs = np.asarray(explainer(model, background).shap_values(x, nsamples=samples, rseed=0))
    finally:
        torch.set_default_dtype(torch.float32)
    errors = []
    for label in range(5):
        ours = vitx.load(ID)(model, x, torch.full((2,), label), samples=samples, baselines=background, pool=None)
        errors.append(relative_error(ours, theirs[..., label].sum(1)))
    oracle = "shap GradientExplainer, with the same draws"
    proof(ID, "pixels, all classes", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_one_pass_a_draw_in_loops(proof):
    model, target, samples, noise = tiny(2, img_size=(16, 24)), (1, 3), 4, 0.2
    x, background = pictures(model), pictures(model, 2, seed=5)
    reference, alpha, epsilon = draws(samples, background, x)
    theirs = torch.zeros(2, 2, 3, dtype=torch.float64)
    for b in range(2):
        for k in range(samples):
            difference = x[b] + noise * epsilon[k] - background[reference[k]]
            point = (background[reference[k]] + alpha[k] * difference)[None].requires_grad_()
            gradient = torch.autograd.grad(model(point)[0, target[b]], point)[0][0]
            for i in range(16):
                for j in range(24):
                    theirs[b, i // 8, j // 8] += (difference * gradient)[:, i, j].sum() / samples
    ours = vitx.load(ID)(model, x, torch.tensor(target), samples=samples, baselines=background, noise=noise)
    proof(ID, "patches", relative_error(ours, theirs), at_most=1e-12, kind="parity", oracle="one pass a draw, in loops")


def test_a_linear_model_has_exact_shapley_values(proof):
    """Patches of a linear model enter a coalition one by one, the rest coming from the background pictures drawn."""
    model = tiny(0, class_token=False, global_pool="avg", norm_layer=nn.Identity, fc_norm=False)
    x, background, samples, target = pictures(model, 1), pictures(model, 3, seed=9), 5, 2
    reference = background[draws(samples, background, x)[0]]
    worth = {}
    for coalition in range(16):
        mask = torch.tensor([coalition >> patch & 1 for patch in range(4)], dtype=torch.float64).view(1, 1, 2, 2)
        mask = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)
        with torch.no_grad():
            worth[coalition] = float(model(mask * x + (1 - mask) * reference)[:, target].mean())
    shapley = np.zeros(4)
    for patch in range(4):
        for coalition in range(16):
            size = coalition.bit_count()
            if not coalition >> patch & 1:
                weight = factorial(size) * factorial(3 - size) / factorial(4)
                shapley[patch] += weight * (worth[coalition | 1 << patch] - worth[coalition])
    ours = vitx.load(ID)(model, x, torch.tensor([target]), samples=samples, baselines=background).flatten()
    proof(ID, "linear model: exact Shapley values", relative_error(ours, shapley), at_most=1e-11, kind="closed form")


def test_it_tends_to_integrated_gradients_averaged_over_the_background(proof):
    model, target = tiny(2), torch.tensor([3])
    x, background = pictures(model, 1), pictures(model, 2, seed=9)
    oracle: Any = IntegratedGradients(model)
    parts = [oracle.attribute(x, b[None], target, n_steps=200, method="gausslegendre") for b in background]
    exact = 64 * nn.functional.avg_pool2d(torch.stack(parts).mean(0).sum(1), 8).detach()
    errors, maps = [], []
    for samples in (100, 6400):
        settings = {"samples": samples, "baselines": background, "chunk": 800}
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        maps = [vitx.load(ID)(model, x, target, **settings, generator=generator) for generator in generators]
        errors.append(sum(relative_error(map, exact) for map in maps) / 3)
    assert errors[1] < errors[0] / 3, "the error falls with the root of the samples: 8 in expectation"
    name = "captum IntegratedGradients, mean over two baselines"
    proof(ID, "patches, 6400 samples", errors[1], at_most=0.05, kind="parity", oracle=name)
    with torch.no_grad():
        difference = (model(x)[0, 3] - model(background)[:, 3].mean()).item()
    error = abs(float(maps[0].sum()) / difference - 1)
    proof(ID, "sum against F(x) - E F(x'), 6400 samples", error, at_most=0.05, kind="closed form")


def test_the_generator_decides():
    model = tiny(2)
    x = pictures(model)
    explain = vitx.load(ID)
    assert torch.equal(explain(model, x, samples=2), explain(model, x, samples=2))
    seeded = [explain(model, x, samples=2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert torch.equal(explain(model, x, samples=2), seeded[0])
    assert not torch.equal(*seeded)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": 0}, "samples and chunk must be at least 1"),
        ({"noise": -0.1}, "noise at least 0"),
        ({"baselines": torch.zeros(3, 16, 16)}, "baselines must have shape"),
        ({"baselines": torch.zeros(0, 3, 16, 16)}, "baselines must have shape"),
        ({"baselines": torch.zeros(2, 3, 8, 8)}, "baselines must have shape"),
    ],
)
def test_bad_options_are_named(options, reason):
    model = tiny(2)
    with pytest.raises(ValueError, match=reason):
        vitx.load(ID)(model, pictures(model), **options)

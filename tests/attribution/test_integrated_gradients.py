import itertools

import pytest
import torch
import vitx
from captum.attr import IntegratedGradients
from helpers import pictures, relative_error, tiny

ID = "integrated-gradients"


@pytest.mark.parametrize("depth", [2, 3])
def test_captum(depth, proof):
    model = tiny(depth)
    x, target, baseline = pictures(model), torch.tensor([4, 2]), pictures(model, seed=9)
    oracle = IntegratedGradients(model)  # keeps its steps in float32, where 1/16 is exact
    theirs = oracle.attribute(x, baseline, target, n_steps=16, method="riemann_right").sum(1)
    ours = vitx.load(ID)(model, x, target, steps=16, baseline=baseline, pool=None)
    name = "captum IntegratedGradients, riemann_right"
    proof(ID, f"pixels, depth {depth}", relative_error(ours, theirs), at_most=1e-9, kind="parity", oracle=name)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_trapezoidal_rule_of_the_authors_code(depth, proof):
    """Gradients at both ends of every step, one after the other, and the mean of each pair."""
    model = tiny(depth)
    x, target, baseline = pictures(model), torch.tensor([4, 2]), pictures(model, seed=9)
    theirs = []
    for image, start, label in zip(x, baseline, target, strict=True):
        gradients = []
        for k in range(8):
            point = (start + k / 7 * (image - start))[None].requires_grad_()
            gradients.append(torch.autograd.grad(model(point)[0, label], point)[0][0])
        mean = sum((one + other) / 2 for one, other in itertools.pairwise(gradients)) / 7
        theirs.append(((image - start) * mean).sum(0))
    ours = vitx.load(ID)(model, x, target, steps=7, rule="trapezoid", baseline=baseline, pool=None, chunk=5)
    error = relative_error(ours, torch.stack(theirs))
    proof(ID, f"trapezoidal rule, depth {depth}", error, at_most=1e-9, kind="parity", oracle="loop over the steps")


def test_completeness(proof):
    model = tiny(2)
    x, target = pictures(model), torch.tensor([3, 0])
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0].detach()
    errors = []
    for steps in (100, 400, 1600):
        total = vitx.load(ID)(model, x, target, steps=steps).sum((1, 2))
        errors.append(float(((total - difference) / difference).abs().max()))
    assert errors[1] < errors[0] / 3, "a right Riemann sum converges with the number of steps"
    assert errors[2] < errors[1] / 3
    proof(ID, "sum against F(x) - F(x'), 1600 steps", errors[-1], at_most=0.01, kind="closed form")


def test_chunks_change_nothing():
    model = tiny(2)
    x = pictures(model, 3)
    whole, parts = (vitx.load(ID)(model, x, steps=7, chunk=chunk) for chunk in (100, 4))
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-15)


def test_a_pixel_of_the_baselines_colour_receives_nothing():
    model = tiny(2)
    x = pictures(model)
    x[:, :, 3:6, 2:9] = 0
    assert vitx.load(ID)(model, x, steps=5, pool=None)[:, 3:6, 2:9].abs().max() == 0


def test_the_trapezoidal_rule_converges_faster():
    model = tiny(2)
    x, target = pictures(model), torch.tensor([3, 0])
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0].detach()
    totals = [vitx.load(ID)(model, x, target, steps=400, rule=rule).sum((1, 2)) for rule in ("right", "trapezoid")]
    right, trapezoid = ((total - difference).abs().max() for total in totals)
    assert trapezoid < right / 10


def test_no_steps():
    model = tiny(2)
    with pytest.raises(ValueError, match="rule is 'right' or 'trapezoid'"):
        vitx.load(ID)(model, pictures(model), rule="left")
    with pytest.raises(ValueError, match="steps and chunk must be at least 1"):
        vitx.load(ID)(model, pictures(model), steps=0)

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


def test_no_steps():
    model = tiny(2)
    with pytest.raises(ValueError, match="steps and chunk must be at least 1"):
        vitx.load(ID)(model, pictures(model), steps=0)

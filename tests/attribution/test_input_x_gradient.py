import pytest
import torch
import vitx
from captum.attr import InputXGradient
from helpers import pictures, relative_error, tiny, twin_forward, variant
from torch import nn

ID = "input-x-gradient"


@pytest.mark.parametrize("depth", [2, 3])
def test_captum(depth, proof):
    model = tiny(depth)
    x, target = pictures(model), torch.tensor([4, 2])
    theirs = InputXGradient(model).attribute(x.clone(), target).sum(1).detach()
    error = relative_error(vitx.load(ID)(model, x, target, pool=None), theirs)
    proof(ID, f"pixels, depth {depth}", error, at_most=1e-9, kind="parity", oracle="captum InputXGradient")


@pytest.mark.parametrize("depth", [2, 3])
def test_every_patch_by_finite_differences(depth, proof):
    """Scaling one patch by 1 + h changes the logit by h times its relevance."""
    model, target, h = tiny(depth), 3, 1e-5
    x = pictures(model, 1)
    ours = vitx.load(ID)(model, x, torch.tensor([target]))[0]
    slopes = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            logits = []
            for step in (h, -h):
                scaled = x[0].clone()
                scaled[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] *= 1 + step
                logits.append(twin_forward(model, scaled)[1][target])
            slopes[i, j] = (logits[0] - logits[1]) / (2 * h)
    oracle = "finite differences in a model of plain loops"
    proof(ID, f"patches, depth {depth}", relative_error(ours, slopes), at_most=1e-7, kind="parity", oracle=oracle)


def test_the_sum_is_the_slope_along_the_ray(proof):
    model = variant("registers, qk-norm, gap")
    x, target, h = pictures(model), torch.tensor([3, 0]), 1e-5
    total = vitx.load(ID)(model, x, target).sum((1, 2))
    with torch.no_grad():
        slope = (model(x * (1 + h)) - model(x * (1 - h))).gather(1, target[:, None])[:, 0] / (2 * h)
    proof(ID, "sum against d F(t x) / dt at t = 1", relative_error(total, slope), at_most=1e-6, kind="closed form")


def test_a_linear_model_is_explained_exactly(proof):
    """Without blocks and norms all is linear: the map is complete, and each patch is what removal takes away."""
    model = tiny(0, class_token=False, global_pool="avg", norm_layer=nn.Identity, fc_norm=False)
    x, target = pictures(model), torch.tensor([1, 4])
    ours = vitx.load(ID)(model, x, target)
    with torch.no_grad():
        score = lambda images: model(images).gather(1, target[:, None])[:, 0]  # noqa: E731
        proof(
            ID,
            "linear model: sum against F(x) - F(0)",
            relative_error(ours.sum((1, 2)), score(x) - score(torch.zeros_like(x))),
            at_most=1e-12,
            kind="closed form",
        )
        without = x.clone()
        without[:, :, 8:, :8] = 0
        assert relative_error(ours[:, 1, 0], score(x) - score(without)) < 1e-11


def test_it_is_integrated_gradients_with_one_step(proof):
    model = tiny(2)
    x, target = pictures(model), torch.tensor([0, 3])
    theirs = vitx.load("integrated-gradients")(model, x, target, steps=1)
    error = relative_error(vitx.load(ID)(model, x, target), theirs)
    proof(ID, "equals integrated gradients with one step", error, at_most=1e-12, kind="closed form")


def test_a_grey_pixel_receives_nothing():
    model = tiny(2)
    x = pictures(model)
    x[:, :, 3:6, 2:9] = 0
    assert vitx.load(ID)(model, x, pool=None)[:, 3:6, 2:9].abs().max() == 0

import pytest
import torch
import vitx
from captum.attr import Saliency
from helpers import pictures, relative_error, tiny, variant

ID = "saliency-input-gradient"


@pytest.mark.parametrize("depth", [2, 3])
def test_captum(depth, proof):
    model = tiny(depth)
    x, target = pictures(model), torch.tensor([4, 2])
    theirs = Saliency(model).attribute(x, target).amax(1)
    proof(
        ID,
        f"pixels, depth {depth}",
        relative_error(vitx.load(ID)(model, x, target, pool=None), theirs),
        at_most=1e-9,
        kind="parity",
        oracle="captum Saliency",
    )


def test_patches_are_sums_of_pixels():
    model = variant("not square")
    x = pictures(model)
    pixels, patches = vitx.load(ID)(model, x, pool=None), vitx.load(ID)(model, x)
    for i in range(patches.shape[1]):
        for j in range(patches.shape[2]):
            inside = pixels[:, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16].sum((1, 2))
            assert torch.allclose(patches[:, i, j], inside, rtol=1e-12)


def test_it_is_the_slope(proof):
    """Moving the most salient pixel by h changes the logit by h times the saliency."""
    model = tiny(2)
    x, target = pictures(model, 1), torch.tensor([1])
    pixels = vitx.load(ID)(model, x, target, pool=None)
    row, column = divmod(int(pixels[0].argmax()), pixels.shape[-1])
    slopes = []
    for channel in range(3):
        step = torch.zeros_like(x)
        step[0, channel, row, column] = 1e-5
        slopes.append(float((model(x + step) - model(x - step))[0, 1].detach().abs() / 2e-5))
    proof(
        ID,
        "the slope by finite differences",
        abs(max(slopes) / float(pixels.max()) - 1),
        at_most=1e-6,
        kind="closed form",
    )

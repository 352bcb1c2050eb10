from typing import Any

import pytest
import torch
import vitx
from captum.attr import NoiseTunnel, Saliency
from helpers import pictures, relative_error, tiny
from torch import nn

ID = "smoothgrad"
NOISE = 0.15


def draws(samples, x, seed=0):
    """The noise (samples, 3, H, W) of the default generator, before it is scaled."""
    return torch.randn((samples, *x.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(x)


def sigma(image):
    return NOISE * float(image.max() - image.min())


@pytest.mark.parametrize("average", ["gradient", "square"])
@pytest.mark.parametrize("depth", [2, 3])
def test_captum(depth, average, proof, monkeypatch):
    model, target, samples = tiny(depth), torch.tensor([4, 2]), 7
    x = pictures(model)
    x[1] *= 3  # pictures of different range
    ours = vitx.load(ID)(model, x, target, samples=samples, noise=NOISE, average=average, chunk=5, pool=None)
    theirs = []
    for image, label in zip(x, target, strict=True):
        scaled = sigma(image) * draws(samples, x)
        monkeypatch.setattr(torch, "normal", lambda mean, std, scaled=scaled: scaled)
        map: Any = NoiseTunnel(Saliency(model)).attribute(
            image[None],
            nt_type={"gradient": "smoothgrad", "square": "smoothgrad_sq"}[average],
            nt_samples=samples,
            stdevs=sigma(image),
            target=int(label),
            abs=False,
        )
        theirs.append(map.abs().sum(1))
    error = relative_error(ours, torch.cat(theirs).detach())
    oracle = "captum NoiseTunnel of Saliency, with the same noise"
    proof(ID, f"pixels, mean {average}, depth {depth}", error, at_most=1e-9, kind="parity", oracle=oracle)


def test_one_pass_a_copy_in_loops(proof):
    """Copy by copy and picture by picture, with patches summed pixel by pixel."""
    model, target, samples = tiny(2, img_size=(16, 24)), (1, 3), 4
    x = pictures(model)
    theirs = torch.zeros(2, 2, 3, dtype=torch.float64)
    for b, image in enumerate(x):
        mean = torch.zeros_like(image)
        for noise in draws(samples, x):
            noisy = (image + sigma(image) * noise)[None].requires_grad_()
            mean += torch.autograd.grad(model(noisy)[0, target[b]], noisy)[0][0] / samples
        for colour in range(3):
            for i in range(16):
                for j in range(24):
                    theirs[b, i // 8, j // 8] += mean[colour, i, j].abs()
    ours = vitx.load(ID)(model, x, torch.tensor(target), samples=samples, noise=NOISE)
    proof(ID, "patches", relative_error(ours, theirs), at_most=1e-12, kind="parity", oracle="one pass a copy, in loops")


def test_it_is_the_slope_of_the_smoothed_score(proof):
    """Moving a pixel by h changes the mean score over the noisy copies by h times the mean gradient."""
    model, samples, h = tiny(3), 6, 1e-5
    x = pictures(model, 1)
    scaled = sigma(x) * draws(samples, x)
    ours = vitx.load(ID)(model, x, torch.tensor([2]), samples=samples, noise=NOISE, pool=None)[0]
    errors = []
    for row, column in ((0, 0), (5, 11), (15, 3)):
        slope = 0.0
        for colour in range(3):
            step = torch.zeros_like(x)
            step[0, colour, row, column] = h
            with torch.no_grad():
                up, down = (model(x + scaled + sign * step)[:, 2].mean() for sign in (1, -1))
            slope += abs(float(up - down)) / (2 * h)
        errors.append(abs(slope / float(ours[row, column]) - 1))
    proof(ID, "slope of the smoothed score, finite differences", max(errors), at_most=1e-6, kind="closed form")


def test_without_noise_it_is_the_gradient(proof):
    model, target = tiny(2), torch.tensor([0, 4])
    x = pictures(model)
    ours = vitx.load(ID)(model, x, target, samples=3, noise=0, pool=None)
    theirs = Saliency(model).attribute(x.clone(), target).sum(1)
    proof(
        ID, "no noise: |gradient|", relative_error(ours, theirs), at_most=1e-12, kind="parity", oracle="captum Saliency"
    )


def test_noise_does_not_move_the_gradient_of_a_linear_model(proof):
    model = tiny(0, class_token=False, global_pool="avg", norm_layer=nn.Identity, fc_norm=False)
    x, target = pictures(model), torch.tensor([1, 4])
    maps = [vitx.load(ID)(model, x, target, samples=3, noise=noise) for noise in (0.0, 0.2)]
    proof(ID, "linear model: noise changes nothing", relative_error(*maps), at_most=1e-12, kind="closed form")


def test_it_converges_with_the_root_of_the_samples():
    model, target = tiny(2), torch.tensor([1])
    x = pictures(model, 1)

    def spread(samples: int) -> float:
        maps = [
            vitx.load(ID)(model, x, target, samples=samples, generator=torch.Generator().manual_seed(seed), chunk=600)
            for seed in range(8)
        ]
        return float(torch.stack(maps).std(0).mean())

    assert 2.5 < spread(8) / spread(8 * 16) < 6.5  # 4 in expectation


def test_the_generator_decides():
    model = tiny(2)
    x = pictures(model)
    explain = vitx.load(ID)
    assert torch.equal(explain(model, x, samples=2), explain(model, x, samples=2))
    assert torch.equal(
        explain(model, x, samples=2), explain(model, x, samples=2, generator=torch.Generator().manual_seed(0))
    )
    assert not torch.equal(
        explain(model, x, samples=2), explain(model, x, samples=2, generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("options", [{"samples": 0}, {"noise": -0.1}, {"average": "median"}, {"chunk": 0}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="samples and chunk must be at least 1"):
        vitx.load(ID)(model, pictures(model), **options)

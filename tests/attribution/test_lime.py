"""LIME: the authors' package on the same samples, and what its regression promises."""

from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny
from lime.lime_base import LimeBase
from lime.lime_image import LimeImageExplainer

ID = "lime"
snippet = vitx.load_module(ID)


class Given:
    """A numpy random state that gives the samples it was given."""

    def __init__(self, z):
        self.z = z

    def randint(self, low, high=None, size=None):
        return 0 if size is None else self.z.astype(int).flatten()


def theirs(model, image, target, z, hide_color):
    """Weights of the patches by lime_image, whose segments are the patches of 8 x 8 pixels."""
    segments = (np.arange(24)[:, None] // 8) * 4 + np.arange(32) // 8
    explainer: Any = LimeImageExplainer(feature_selection="auto", random_state=0)
    explainer.random_state = Given(z.numpy())

    def classifier(pictures):
        with torch.no_grad():
            return model(torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2)).softmax(-1).numpy()

    explanation = explainer.explain_instance(
        image.permute(1, 2, 0).numpy(),
        classifier,
        labels=(target,),
        top_labels=None,
        hide_color=hide_color,
        num_samples=len(z),
        segmentation_fn=lambda _: segments,
    )
    return [weight for _, weight in sorted(explanation.local_exp[target])]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("hide", ["grey", "mean"])
@pytest.mark.parametrize("sampling", ["size", "coin"])
def test_agrees_with_the_authors_package(sampling, hide, depth, proof):
    model = tiny(depth, img_size=(24, 32))
    x, targets = pictures(model, 2), torch.tensor([1, 4])
    z = snippet.sample(12, 90, sampling, torch.Generator().manual_seed(5))
    options = {"samples": 90, "sampling": sampling, "hide": hide, "generator": torch.Generator().manual_seed(5)}
    ours = vitx.load(ID)(model, x, targets, **options)
    colour = None if hide == "mean" else 0
    oracle = [theirs(model, image, int(target), z, colour) for image, target in zip(x, targets, strict=True)]
    error = relative_error(ours.flatten(1), oracle)
    what = f"sampling {sampling}, hidden in {hide}, depth {depth}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="lime 0.2 LimeImageExplainer, same samples")


@pytest.mark.parametrize(("width", "alpha"), [(0.25, 1.0), (0.1, 0.02)])
def test_regression_is_the_authors(width, alpha, proof):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import pairwise_distances

    z = snippet.sample(15, 60, "coin", torch.Generator().manual_seed(1))
    z[7] = 0  # shows nothing: distance 1
    values = torch.rand(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = snippet.linear_model(z, values, width, alpha)
    distances = pairwise_distances(z.numpy(), np.ones((1, 15)), metric="cosine").ravel()
    base: Any = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / width**2)), random_state=0)
    rows = []
    for row in values:
        given = (z.numpy(), row.numpy()[:, None], distances, 0, 15)
        _, weights, _, _ = base.explain_instance_with_data(*given, "none", Ridge(alpha=alpha))
        rows.append([weight for _, weight in sorted(weights)])
    error = relative_error(ours, rows)
    what = f"regression, width {width}, alpha {alpha}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="lime_base with scikit-learn's Ridge")


def test_a_linear_classifier_is_found(proof):
    """With a vanishing penalty the weights of a linear function come back, whatever the kernel."""
    z = snippet.sample(15, 200, "size", torch.Generator().manual_seed(1))
    truth = torch.randn(3, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = snippet.linear_model(z, 0.7 + truth @ z.T, 0.25, 1e-10)
    proof(ID, "a linear function, no penalty", relative_error(found, truth), at_most=1e-6, kind="closed form")


def test_a_patch_that_changes_nothing_weighs_little():
    model = tiny(2, img_size=(24, 32))
    x = pictures(model, 1)
    x[:, :, :8, :8] = 0
    weights = vitx.load(ID)(model, x, samples=4000, alpha=1e-6)[0].abs()
    assert weights[0, 0] < 0.1 * weights.max()


def test_samples_are_as_published():
    z = snippet.sample(10, 20_000, "size", torch.Generator().manual_seed(0))
    assert z[0].all()
    shares = torch.bincount(z.sum(1).long(), minlength=11) / 20_000
    assert shares[0] == 0
    assert torch.allclose(shares[1:], torch.full((10,), 0.1), atol=0.01)
    assert torch.allclose(z.mean(0), torch.full((10,), 0.55, dtype=torch.float64), atol=0.02)
    z = snippet.sample(10, 20_000, "coin", torch.Generator().manual_seed(0))
    assert z.mean() == pytest.approx(0.5, abs=0.01)
    assert z.sum(1).var() == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(
    "options", [{"samples": 1}, {"sampling": "x"}, {"hide": "blur"}, {"kernel_width": 0.0}, {"alpha": 0.0}]
)
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match=r"samples must|sampling is"):
        vitx.load(ID)(model, pictures(model), **options)

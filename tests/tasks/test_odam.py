"""ODAM: gradient times features against loops, pytorch-grad-cam and scipy, and the object that is asked for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, tiny, tiny_detector
from pytorch_grad_cam import HiResCAM
from scipy.ndimage import gaussian_filter
from torch import nn
from vitx import glyphs, load_module, metrics, models
from vitx.vit import UnsupportedModel

ID = "odam"
snippet, detectors = load_module(ID), load_module("generic-attention-detr")
TARGET = torch.tensor([3, 0])


@pytest.fixture(scope="module")
def model():
    return tiny_detector((24, 32))


@pytest.fixture(scope="module")
def x(model):
    return pictures(model.encoder)


def predicted(model: Any, memory: torch.Tensor, query: int, label: int, attribute: str) -> float:
    """Y of the first picture, from its patches with their places (P, D)."""
    logits, boxes = model.read(model.decode(memory[None]).states[-1])
    if attribute == "class":
        powers = [math.exp(float(z)) for z in logits[0, query]]
        return powers[label] / sum(powers)
    x, y, width, height = boxes[0, query].tolist()
    sides = {"left": width / 2 - x, "right": x + width / 2, "top": height / 2 - y, "bottom": y + height / 2}
    return sides[attribute] * {"left": 32, "right": 32, "top": 24, "bottom": 24}[attribute]


@pytest.mark.parametrize("attribute", snippet.ATTRIBUTES)
def test_in_loops(model, x, attribute, proof):
    """Gradients by central differences, smoothed by scipy, times the features, patch by patch."""
    found = snippet.explain(model, x, TARGET, attribute=attribute, smoothing=0.7)
    with torch.no_grad():
        memory = model.encoder.forward_features(x)[0, 1:] + detectors.sine_places(3, 4, 8)  # (12, 8)
        gradient = np.zeros((3, 4, 8))
        for p, k in np.ndindex(12, 8):
            ends = []
            for step in (1e-5, -1e-5):
                nudged = memory.clone()
                nudged[p, k] += step
                ends.append(predicted(model, nudged, int(found.query[0]), 3, attribute))
            gradient[p // 4, p % 4, k] = (ends[0] - ends[1]) / 2e-5
    expected = np.zeros((3, 4))
    for k in range(8):
        smooth = gaussian_filter(gradient[:, :, k], 0.7, mode="nearest")
        for i, j in np.ndindex(3, 4):
            expected[i, j] += smooth[i, j] * float(memory[4 * i + j, k])
    error = relative_error(found.relevance[0], np.maximum(expected, 0))
    oracle = "finite differences, scipy.ndimage.gaussian_filter, sum in loops"
    proof(ID, f"map of the {attribute}", error, at_most=1e-6, kind="parity", oracle=oracle)


class Probabilities(nn.Module):
    """What pytorch-grad-cam can call: (B, Q, K + 1)."""

    def __init__(self, detector: Any):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.detector.detect(images).probabilities


class OnTheGrid(HiResCAM):
    def get_target_width_height(self, input_tensor: torch.Tensor) -> Any:
        """None leaves the map on the grid of patches."""
        return None


def test_pytorch_grad_cam(model, x, proof):
    found = snippet.explain(model, x, TARGET, smoothing=0)

    def on_the_grid(memory: torch.Tensor) -> torch.Tensor:
        return memory.mT.unflatten(2, (3, 4))

    targets: list[Any] = [
        lambda out, q=int(q), c=int(c): out[q, c] for q, c in zip(found.query, found.label, strict=True)
    ]
    copy = tiny_detector((24, 32))
    with OnTheGrid(Probabilities(copy), [copy.memory], reshape_transform=on_the_grid) as cam:
        theirs = cam(input_tensor=x, targets=targets)
    low, high = found.relevance.amin((1, 2), keepdim=True), found.relevance.amax((1, 2), keepdim=True)
    error = relative_error((found.relevance - low) / (high - low), theirs)
    what = "map of the class without smoothing, scaled to 0 to 1"
    proof(ID, what, error, at_most=1e-5, kind="parity", oracle="HiResCAM of pytorch-grad-cam")


def test_smoothing_in_one_direction(proof):
    """The matrix of a line of places is scipy's filter; without width it is the identity."""
    errors = []
    for size, deviation in ((4, 0.7), (14, 1.0), (14, 3.0), (3, 2.0)):
        line = np.random.default_rng(size).normal(size=(size, 1))
        ours = snippet.gaussian(size, deviation, torch.zeros(1).double()).numpy() @ line
        errors.append(relative_error(ours, gaussian_filter(line, (deviation, 0), mode="nearest")))
    proof(ID, "smoothing of a line", max(errors), at_most=1e-6, kind="parity", oracle="scipy.ndimage.gaussian_filter")
    assert torch.equal(snippet.gaussian(6, 0, torch.zeros(1)), torch.eye(6))


def test_which_object_is_asked_for(model, x):
    probabilities = model.detect(x).probabilities
    found = snippet.explain(model, x, TARGET)
    assert torch.equal(found.query, torch.stack([probabilities[0, :, 3].argmax(), probabilities[1, :, 0].argmax()]))
    torch.testing.assert_close(found.score, probabilities[range(2), found.query, TARGET])
    torch.testing.assert_close(found.box, model.detect(x).boxes[range(2), found.query])
    other = snippet.explain(model, x, TARGET, query=(found.query + 1) % 3)
    assert not torch.allclose(found.relevance, other.relevance)
    assert torch.equal(snippet.explain(model, x).label, model(x).argmax(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attribute": "middle"}, "attribute must be one of class, left, top, right, bottom, not 'middle'"),
        ({"smoothing": -1}, "smoothing must be at least 0"),
        ({"target": torch.tensor([0, 5])}, "class 5 is out of range"),
        ({"query": torch.tensor([0, 3])}, "the detector has queries 0 to 2"),
    ],
)
def test_bad_arguments(model, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, x, **arguments)


def test_what_is_refused(x):
    with pytest.raises(UnsupportedModel, match="VisionTransformer is no detector"):
        snippet.explain(tiny(1), pictures(tiny(1)))
    spoilt = tiny_detector((24, 32))
    with torch.no_grad():
        spoilt.classify.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"classify\.bias of the model holds NaN"):
        snippet.explain(spoilt, x)


def test_frozen_weights(model, x):
    expected, frozen = snippet.explain(model, x), tiny_detector((24, 32)).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(snippet.explain(frozen, x).relevance, expected.relevance)
    assert not expected.relevance.requires_grad
    assert not expected.box.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the model that ships ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return models.load("detector-glyph").model


@pytest.fixture(scope="module")
def scenes():
    return glyphs.scenes(40, 43, creatures=2)


def test_the_map_is_that_of_the_object_asked_for(shipped, scenes, proof):
    images, share = glyphs.normalise(scenes.images), glyphs.patch_fraction(scenes.object_masks, (14, 14))
    own, hits = [], []
    for which in (0, 1):
        maps = snippet.explain(shipped, images, scenes.labels[:, which]).relevance
        mass = (maps[:, None] * share).sum((2, 3))
        own.append(mass[:, which] > mass[:, 1 - which])
        hits.append(metrics.pointing_game(maps, share[:, which]))
    oracle = "40 glyph scenes of two creatures"
    what = "maps with more mass on the object asked for than on the other"
    proof(ID, what, torch.cat(own).float().mean(), at_least=0.85, kind="ground truth", oracle=oracle)
    what = "pointing game, object asked for"
    proof(ID, what, torch.cat(hits).mean(), at_least=0.75, kind="ground truth", oracle=oracle)


def test_the_maps_of_opposite_sides_lie_apart(shipped, scenes, proof):
    """What draws the left side lies further left than what draws the right side, and so for top and bottom."""
    images, places, apart = glyphs.normalise(scenes.images), torch.arange(14.0), []
    for which in (0, 1):
        for one, other, sums in (("left", "right", 1), ("top", "bottom", 2)):
            middles = []
            for attribute in (one, other):
                maps = snippet.explain(shipped, images, scenes.labels[:, which], attribute=attribute).relevance
                line = maps.sum(sums)
                middles.append((line * places).sum(1) / line.sum(1).clamp(min=1e-30))
            apart.append(middles[0] < middles[1])
    what = "pairs of opposite sides whose maps lie in their order"
    value = torch.cat(apart).float().mean()
    proof(ID, what, value, at_least=0.7, kind="ground truth", oracle="40 glyph scenes of two creatures")

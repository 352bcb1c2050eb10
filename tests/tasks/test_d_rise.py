"""D-RISE: masks and similarity against other implementations, from the same draws, and what the weights must be."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, tiny, tiny_detector
from scipy.spatial.distance import cosine
from skimage.transform import resize
from torchvision.ops import box_iou
from vitx import glyphs, load_module, metrics, models
from vitx.vit import UnsupportedModel

ID = "d-rise"
snippet, detectors = load_module(ID), load_module("generic-attention-detr")


@pytest.fixture(scope="module")
def model():
    return tiny_detector((16, 24))


@pytest.fixture(scope="module")
def x(model):
    return pictures(model.encoder)


def masks_of(count: int, cells: int, probability: float) -> np.ndarray:
    """What explain draws, enlarged by scikit-image: (count, 16, 24)."""
    generator = torch.Generator().manual_seed(0)
    grid = (torch.rand(count, cells, cells, generator=generator) < probability).double().numpy()
    cell = [math.ceil(side / cells) for side in (16, 24)]
    shifts = [torch.randint(side, (count,), generator=generator).tolist() for side in cell]
    whole = ((cells + 1) * cell[0], (cells + 1) * cell[1])
    large: list[Any] = [resize(one, whole, order=1, mode="reflect", anti_aliasing=False) for one in grid]
    return np.stack([a[y : y + 16, x : x + 24] for a, y, x in zip(large, *shifts, strict=True)])


@pytest.mark.parametrize("cells", [3, 7])
def test_in_loops(model, x, cells, proof):
    """Mask by mask and proposal by proposal."""
    target, expected = torch.tensor([3, 0]), np.zeros((2, 16, 24))
    with torch.no_grad():
        whole = model.detect(x)
        for b, mask in ((b, mask) for b in range(2) for mask in masks_of(12, cells, 0.4)):
            query = int(whole.probabilities[b, :, target[b]].argmax())
            found = model.detect(x[b : b + 1] * torch.tensor(mask))
            best = 0.0
            for q in range(3):
                iou = float(box_iou(whole.boxes[b, query][None], found.boxes[0, q][None]))
                alike = 1 - cosine(whole.probabilities[b, query, :5].numpy(), found.probabilities[0, q, :5].numpy())
                best = max(best, iou * alike * (1 - float(found.probabilities[0, q, 5])))
            expected[b] += best * mask / (12 * 0.4)
    options = {"masks": 12, "cells": cells, "probability": 0.4, "chunk": 5}
    pixels = snippet.explain(model, x, target, pool=None, **options).relevance
    oracle = "skimage resize, torchvision box_iou, scipy cosine, in loops"
    proof(ID, f"pixels, {cells} cells", relative_error(pixels, expected), at_most=1e-9, kind="parity", oracle=oracle)
    patches = expected.reshape(2, 2, 8, 3, 8).sum((2, 4))
    assert relative_error(snippet.explain(model, x, target, **options).relevance, patches) < 1e-9


def test_a_detection_is_like_itself(model, x, proof):
    """Through a mask that hides nothing the similarity is the object's own objectness."""
    found = model.detect(x)
    errors = []
    for q in range(3):
        probabilities, boxes = found.probabilities[:, q : q + 1], found.boxes[:, q : q + 1]
        value = snippet.similarity(probabilities, boxes, boxes[:, 0], probabilities[:, 0, :-1])
        errors.append(float((value - (1 - probabilities[:, 0, -1])).detach().abs().max()))
    proof(ID, "nothing hidden: similarity less objectness", max(errors), at_most=1e-12, kind="closed form")


def test_what_lowers_the_similarity():
    """Half of the box, another class, or nothing there: each factor alone."""
    box, sure = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[1.0, 0, 0]])

    def like(proposal: list[float], probabilities: list[float]) -> float:
        one, where = torch.tensor([[probabilities]]).float(), torch.tensor([[proposal]]).float()
        return float(snippet.similarity(one, where, box, sure))

    assert like([0, 0, 10, 10], [1, 0, 0, 0]) == 1
    assert like([0, 0, 10, 5], [1, 0, 0, 0]) == 0.5
    assert like([20, 0, 30, 10], [1, 0, 0, 0]) == 0
    assert like([0, 0, 10, 10], [0, 1, 0, 0]) == 0
    assert like([0, 0, 10, 10], [0.3, 0.3, 0, 0.4]) == pytest.approx(0.6 / math.sqrt(2))
    assert like([0, 0, 10, 10], [0.2, 0, 0, 0.8]) == pytest.approx(0.2)
    both = torch.tensor([[[0.2, 0, 0, 0.8], [0.9, 0, 0, 0.1]]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8]]])
    assert float(snippet.similarity(both, boxes, box, sure)) == pytest.approx(0.72)  # the best one, not their sum


def test_a_detector_that_does_not_look_gives_a_flat_map(proof):
    """Every pixel is visible with the same probability, so nothing stands out."""
    model = tiny_detector((16, 24))
    with torch.no_grad():
        for layer in model.layers:
            layer.search.out.weight.zero_()
    x = pictures(model.encoder)
    found = snippet.explain(model, x, masks=3000, cells=4, pool=None)
    known = (1 - model.detect(x).probabilities[0, found.query[0], -1]).detach()
    error = (found.relevance.mean((1, 2)) / known - 1).abs().max()
    proof(ID, "a blind detector: mean of the map against objectness", error, at_most=0.02, kind="closed form")
    spread = found.relevance.std((1, 2)) / found.relevance.mean((1, 2))
    proof(ID, "a blind detector: spread of the map", spread.max(), at_most=0.03, kind="closed form")


def test_draws(model, x):
    options: dict[str, Any] = {"masks": 8, "cells": 3}
    one = snippet.explain(model, x, **options).relevance
    assert torch.equal(one, snippet.explain(model, x, generator=torch.Generator().manual_seed(0), **options).relevance)
    assert not torch.equal(
        one, snippet.explain(model, x, generator=torch.Generator().manual_seed(1), **options).relevance
    )
    torch.testing.assert_close(snippet.explain(model, x[1:], **options).relevance, one[1:], rtol=1e-12, atol=0)


def test_which_object_is_asked_for(model, x):
    probabilities = model.detect(x).probabilities
    options: dict[str, Any] = {"masks": 8, "cells": 3}
    found = snippet.explain(model, x, torch.tensor([3, 0]), **options)
    assert torch.equal(found.query, torch.stack([probabilities[0, :, 3].argmax(), probabilities[1, :, 0].argmax()]))
    torch.testing.assert_close(found.box, model.detect(x).boxes[range(2), found.query])
    other = snippet.explain(model, x, query=(found.query + 1) % 3, **options)
    assert not torch.allclose(found.relevance, other.relevance)
    assert torch.equal(snippet.explain(model, x, **options).label, model(x).argmax(1))
    assert not any(field.is_inference() for field in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": 0}, "masks must be at least 1"),
        ({"probability": 1.0}, "probability between 0 and 1"),
        ({"cells": 1}, "cells at least 2"),
        ({"target": torch.tensor([0, 5])}, "class 5 is out of range"),
        ({"query": torch.tensor([0, 3])}, "the detector has queries 0 to 2"),
    ],
)
def test_bad_arguments(model, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, x, **({"masks": 4} | arguments))


def test_what_is_refused(x):
    with pytest.raises(UnsupportedModel, match="VisionTransformer is no detector"):
        snippet.explain(tiny(1), pictures(tiny(1)))
    spoilt = tiny_detector((16, 24))
    with torch.no_grad():
        spoilt.classify.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"classify\.bias of the model holds NaN"):
        snippet.explain(spoilt, x, masks=4)


def test_the_map_points_at_the_object_asked_for(proof):
    """The model that ships, few and coarse masks, for both creatures of each scene."""
    model: Any = models.load("detector-glyph").model
    scenes = glyphs.scenes(6, 51, creatures=2)
    images, share = glyphs.normalise(scenes.images), glyphs.patch_fraction(scenes.object_masks, (14, 14))
    hits, own = [], []
    for which in (0, 1):
        maps = snippet.explain(model, images, scenes.labels[:, which], masks=120, cells=7).relevance
        hits.append(metrics.pointing_game(maps, share[:, which]))
        means = (maps[:, None] * share).sum((2, 3)) / share.sum((2, 3))  # (B, 2): mean value on each creature
        own.append(means[:, which] > means[:, 1 - which])
    oracle = "6 glyph scenes of two creatures, masks=120, cells=7"
    proof(
        ID, "pointing game, object asked for", torch.cat(hits).mean(), at_least=0.7, kind="ground truth", oracle=oracle
    )
    what = "maps that are higher on the object asked for than on the other"
    proof(ID, what, torch.cat(own).float().mean(), at_least=0.85, kind="ground truth", oracle=oracle)

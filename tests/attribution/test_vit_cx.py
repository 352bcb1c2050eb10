import math

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward
from sklearn.cluster import AgglomerativeClustering
from vitx import glyphs, models

ID = "vit-cx"
SIZE = (24, 32)


def bilinear(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel by pixel, between the centres of the patches, clamped at the border."""
    out, (rows, columns) = np.zeros((height, width)), grid.shape
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = min(int(y), rows - 2), min(int(x), columns - 2)
            for di, wy in ((0, 1 - (y - top)), (1, y - top)):
                for dj, wx in ((0, 1 - (x - left)), (1, x - left)):
                    out[i, j] += wy * wx * grid[top + di, left + dj]
    return out


def unit_range(mask: np.ndarray) -> np.ndarray:
    return (mask - mask.min()) / (mask.max() - mask.min())


def twin(model, image, label, threshold, sigma):
    """The paper's steps for one picture; clusters by scikit-learn, in the order of their first channel."""
    normed = twin_forward(model, image)[0][-1]["normed"][1:]  # (P, D)
    masks = [unit_range(bilinear(channel.reshape(3, 4), *SIZE)) for channel in normed.T]
    distance = np.zeros((len(masks), len(masks)))
    for i, a in enumerate(masks):
        for j, b in enumerate(masks):
            distance[i, j] = 0 if i == j else 1 - (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    settings = {"n_clusters": None, "distance_threshold": threshold, "metric": "precomputed", "linkage": "complete"}
    labels = AgglomerativeClustering(**settings).fit(distance).labels_
    merged = [unit_range(np.sum([m for m, own in zip(masks, labels, strict=True) if own == c], 0)) for c in set(labels)]
    draw = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(11)).double().numpy()

    def probability(x):
        logits = twin_forward(model, torch.as_tensor(x))[1]
        return float(np.exp(logits[label]) / np.exp(logits).sum())

    x, total, cover = image.numpy(), np.zeros(SIZE), np.zeros(SIZE)
    for mask in merged:
        noise = sigma * draw * (1 - mask)
        impact = probability(x * mask + noise) - probability(x + noise) + probability(x)
        total, cover = total + impact * mask, cover + mask
    return total / cover, len(merged)


@pytest.mark.parametrize(("depth", "threshold", "sigma"), [(2, 0.1, 0.0), (3, 0.1, 0.5), (2, 0.2, 0.5)])
def test_loops(depth, threshold, sigma, proof, monkeypatch):
    model = tiny(depth, img_size=SIZE)
    x, target = pictures(model), torch.tensor([4, 2])
    draw = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(11))
    # Every mask sees the same draw, so that the order of the masks does not matter.
    monkeypatch.setattr(vitx.load_module(ID).torch, "randn", lambda *_, **__: draw)
    ours = vitx.load(ID)(model, x, target, threshold=threshold, noise=sigma, pool=None)
    twins = [twin(model, image, int(label), threshold, sigma) for image, label in zip(x, target, strict=True)]
    assert all(2 < count < 8 for _, count in twins)
    error = relative_error(ours, np.stack([map for map, _ in twins]))
    oracle = "the paper's steps in plain loops, clusters by scikit-learn"
    proof(
        ID,
        f"pixels, threshold {threshold}, noise {sigma}, depth {depth}",
        error,
        at_most=1e-9,
        kind="parity",
        oracle=oracle,
    )


def test_patches_are_sums_of_pixels():
    model = tiny(2, img_size=SIZE)
    x = pictures(model)
    pixels = vitx.load(ID)(model, x, pool=None)
    assert pixels.shape == (2, *SIZE)
    sums = pixels.unflatten(2, (4, 8)).unflatten(1, (3, 8)).sum((2, 4))
    assert torch.allclose(vitx.load(ID)(model, x), sums, rtol=1e-12)


def test_masks_that_change_nothing_leave_the_probability(proof):
    """A head that reads no token has P(y | anything) = P(y), so every impact, and every mean of impacts, is P(y)."""
    model = tiny(2, img_size=SIZE)
    with torch.no_grad():
        model.head.weight.zero_()
        x = pictures(model)
        probability = model(x).softmax(-1)[:, 3]
    relevance = vitx.load(ID)(model, x, torch.tensor([3, 3]), pool=None)
    covered = relevance != 0
    assert covered.float().mean() > 0.99
    error = (relevance - probability[:, None, None])[covered].abs().max() / probability.max()
    proof(ID, "a constant model: every covered pixel is P(y)", error, at_most=1e-12, kind="closed form")


def test_one_cluster_gives_a_flat_map():
    """Coverage cancels: s M(x) / M(x) = s."""
    model = tiny(2, img_size=SIZE)
    pixels = vitx.load(ID)(model, pictures(model), threshold=1.0, pool=None)
    for values in pixels:
        values = values[values != 0]
        assert values.max() - values.min() < 1e-12


def test_noise_follows_the_generator_alone():
    model = tiny(2, img_size=SIZE)
    x = pictures(model)
    explain, state = vitx.load(ID), torch.get_rng_state()
    same = explain(model, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(explain(model, x), same)
    assert not torch.allclose(explain(model, x, generator=torch.Generator().manual_seed(1)), same)
    assert torch.allclose(explain(model, x, chunk=1), same, rtol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_channel_without_variation_counts_as_a_mask_of_zeros():
    model = tiny(2, img_size=SIZE)
    x = pictures(model)
    with torch.no_grad():
        model.blocks[-1].norm1.weight[2] = 0
    assert vitx.load(ID)(model, x).isfinite().all()


def test_creatures_are_found(proof):
    loaded = models.load("glyph")
    scenes = glyphs.scenes(6, seed=31)
    relevance = vitx.load(ID)(loaded.model, glyphs.normalise(scenes.images))
    truth = glyphs.patch_fraction(scenes.object_masks[:, :1].any(1), (14, 14)) > 0.5
    gaps = [float(r[t].mean() / r.mean()) for r, t in zip(relevance, truth, strict=True)]
    what = "mean relevance of the creature's patches over that of all patches"
    proof(ID, what, np.mean(gaps), at_least=1.05, kind="ground truth", oracle="6 glyph scenes")


@pytest.mark.parametrize("layer", [2, -3])
def test_bad_options_are_named(layer):
    model = tiny(2)
    with pytest.raises(ValueError, match="layer"):
        vitx.load(ID)(model, pictures(model), layer=layer)

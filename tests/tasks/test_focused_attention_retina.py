"""Focused attention against loops over the drawn patches; its fine maps against the true lesions."""

from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, variant
from vitx import glyphs, lesions, load_module, models
from vitx.vit import UnsupportedModel, embed

ID = "focused-attention-retina"
snippet = load_module(ID)


def test_one_grid_is_transformer_attribution(proof):
    model = tiny(3, img_size=(16, 24))
    x, target = pictures(model, 3), torch.tensor([4, 0, 2])
    ours = snippet.explain(model, x, target, iterations=1)
    theirs = vitx.load("transformer-attribution")(model, x, target).clamp(max=1)
    oracle = "transformer-attribution, which is held against plain loops"
    proof(ID, "one grid", relative_error(ours, theirs), at_most=1e-12, kind="parity", oracle=oracle)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "registers and layer scale", "not square"])
def test_usual_patches_are_the_models_own_tokens(name):
    model = variant(name)
    x = pictures(model)
    tokens, size = snippet.fine_tokens(model, x, 1)
    assert size == model.patch_embed.grid_size
    assert torch.allclose(tokens, embed(model, x), atol=1e-12)


def test_fine_patches_one_by_one(proof):
    """Every patch of the finer grid, cut out and projected by hand, with the position of the nearest usual one."""
    model = tiny(1, img_size=(16, 24))
    x = pictures(model)
    tokens, (rows, columns) = snippet.fine_tokens(model, x, 4)  # stride 2
    assert (rows, columns) == (5, 9)
    weight, bias = model.patch_embed.proj.weight.detach(), model.patch_embed.proj.bias.detach()
    expected = torch.zeros_like(tokens[:, 1:])
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, 2 * i : 2 * i + 8, 2 * j : 2 * j + 8]
            value = (patch[:, None] * weight).sum((2, 3, 4)) + bias
            place = 1 + (i * 2 // rows) * 3 + j * 3 // columns
            expected[:, i * columns + j] = value + model.pos_embed[0, place].detach()
    error = relative_error(tokens[:, 1:], expected)
    proof(ID, "patches of a quarter of the stride", error, at_most=1e-12, kind="parity", oracle="plain loops")


def test_neighbours_stay_in_the_grid():
    found = snippet.with_neighbours(torch.tensor([[0, 7, 11]]), (3, 4))[0].reshape(5, 3).T.tolist()
    assert found == [[0, 0, 4, 0, 1], [7, 3, 11, 6, 7], [11, 7, 11, 10, 11]]


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarged with half-pixel centres, as torch does without aligned corners."""
    result = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = max((i + 0.5) * values.shape[0] / size[0] - 0.5, 0)
            x = max((j + 0.5) * values.shape[1] / size[1] - 0.5, 0)
            low, left = int(y), int(x)
            high, right = min(low + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
            above = values[low, left] * (1 - x + left) + values[low, right] * (x - left)
            below = values[high, left] * (1 - x + left) + values[high, right] * (x - left)
            result[i, j] = above * (1 - y + low) + below * (y - low)
    return result


def test_in_plain_loops(proof):
    """Draws, neighbours, scaling and blending of three grids, picture by picture and patch by patch."""
    model: Any = tiny(2, img_size=(16, 24))
    x, target, errors = pictures(model), torch.tensor([3, 1]), []
    options: dict[str, Any] = {"iterations": 3, "samples": 6, "smoothing": 0.3}
    ours = snippet.explain(model, x, target, pool=None, generator=torch.Generator().manual_seed(7), **options)
    pooled = snippet.explain(model, x, target, generator=torch.Generator().manual_seed(7), **options)
    for index in range(2):
        one, label = x[index : index + 1], target[index : index + 1]
        relevance = vitx.load("transformer-attribution")(model, one, label)[0].numpy()
        generator = torch.Generator().manual_seed(7)
        for i in (1, 2):
            tokens, (rows, columns) = snippet.fine_tokens(model, one, 2**i)
            relevance = np.clip(bilinear(relevance, (rows, columns)), 0, 1).ravel()
            edges = np.cumsum(relevance / relevance.sum())
            for _ in range({1: 1, 2: 2}[i]):
                drawn = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
                chosen = [min(sum(edge < u for edge in edges), rows * columns - 1) for u in drawn]
                for up, across in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    for centre in chosen[:6]:
                        row, column = divmod(centre, columns)
                        chosen.append(
                            min(max(row + up, 0), rows - 1) * columns + min(max(column + across, 0), columns - 1)
                        )
                sequence = torch.stack([tokens[0, 0], *(tokens[0, 1 + patch] for patch in chosen)])[None]
                found = snippet.attribution(model, sequence, label)[0].numpy()
                found = (found - found.min()) / (found.max() - found.min())
                before = relevance.copy()
                for patch, value in zip(chosen, found, strict=True):
                    relevance[patch] = 0.3 * value + 0.7 * before[patch]
            relevance = relevance.reshape(rows, columns)
        pixels = np.zeros((16, 24))
        for i in range(16):
            for j in range(24):
                pixels[i, j] = min(relevance[i * rows // 16, j * columns // 24], 1)
        errors.append(relative_error(ours[index], pixels))
        means = pixels.reshape(2, 8, 3, 8).mean((1, 3))
        errors.append(relative_error(pooled[index], means))
    proof(ID, "three grids", max(errors), at_most=1e-9, kind="parity", oracle="plain loops")


def test_without_new_relevance_nothing_is_focused():
    model = tiny(2)
    x = pictures(model)
    found = snippet.explain(model, x, iterations=2, smoothing=0.0, pool=None)
    coarse = vitx.load("transformer-attribution")(model, x)
    for ours, theirs in zip(found, coarse, strict=True):
        enlarged = bilinear(theirs.numpy(), (3, 3)).clip(0, 1)
        expected = [[enlarged[i * 3 // 16, j * 3 // 16] for j in range(16)] for i in range(16)]
        assert relative_error(ours, expected) < 1e-12


def test_other_draws_give_another_map():
    model = tiny(2)
    x = pictures(model)
    maps = [snippet.explain(model, x, samples=2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


def test_what_is_refused():
    model = tiny(1)
    x = pictures(model)
    with pytest.raises(ValueError, match="a stride of 8 pixels allows 1 to 4 iterations"):
        snippet.explain(model, x, iterations=5)
    with pytest.raises(ValueError, match="pool is 'mean' or None"):
        snippet.explain(model, x, pool="sum")
    with pytest.raises(UnsupportedModel, match="adds no positions"):
        snippet.explain(tiny(1, pos_embed="none"), x)


def test_a_finer_look_finds_specks_better(proof):
    """Mass and overlap by pixels, on the true specks: four grids against the usual one, and against chance."""
    labels = torch.full((8,), 2)
    scenes, model = lesions.scenes(8, 37, labels=labels), models.load("lesion").model
    x = glyphs.normalise(scenes.images)
    coarse = snippet.explain(model, x, labels, iterations=1, pool=None)
    fine = snippet.explain(model, x, labels, samples=64, pool=None)
    before, after, chance = (lesions.grade(maps, scenes.masks) for maps in (coarse, fine, fine.roll(1, 0)))
    oracle = "8 invented pictures with bright specks"
    gain = after.iou.mean() / before.iou.mean()
    what = "overlap with the specks, over that of the usual grid"
    proof(ID, what, gain, at_least=1.05, kind="ground truth", oracle=oracle)
    gain = after.iou.mean() / chance.iou.mean()
    what = "overlap with the specks, over that of another picture's map"
    proof(ID, what, gain, at_least=2, kind="ground truth", oracle=oracle)

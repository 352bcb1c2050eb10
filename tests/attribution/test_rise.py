"""RISE: the authors' masks from the same draws, and the mean that they estimate."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny
from skimage.transform import resize
from vitx import vit

ID = "rise"
snippet = vitx.load_module(ID)


def draws(size, masks, cells, probability, seed=0):
    """What explain draws, in its order."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(masks, cells, cells, generator=generator) < probability
    cell = [math.ceil(side / cells) for side in size]
    shifts = [torch.randint(side, (masks,), generator=generator) for side in cell]
    return grid.double().numpy(), cell, torch.stack(shifts, 1).tolist()


def authors_masks(size, masks, cells, probability, seed=0):
    """The masks by scikit-image's resize, as the authors' code enlarges and cuts them."""
    grid, cell, shifts = draws(size, masks, cells, probability, seed)
    whole = ((cells + 1) * cell[0], (cells + 1) * cell[1])
    large: list[Any] = [resize(one, whole, order=1, mode="reflect", anti_aliasing=False) for one in grid]
    return np.stack([a[y : y + size[0], x : x + size[1]] for a, (y, x) in zip(large, shifts, strict=True)])


@pytest.mark.parametrize(("size", "cells"), [((24, 32), 3), ((16, 16), 7), ((24, 32), 2)])
@pytest.mark.parametrize("depth", [2, 3])
def test_map_of_the_authors_masks(depth, size, cells, proof):
    model = tiny(depth, img_size=size)
    x, target = pictures(model, 2), torch.tensor([1, 4])
    masks = authors_masks(size, 12, cells, 0.4)
    theirs = np.zeros((2, *size))
    with torch.no_grad():
        for picture in range(2):
            for mask in masks:
                seen = x[picture] * torch.tensor(mask)
                theirs[picture] += float(model(seen[None]).softmax(-1)[0, target[picture]]) * mask / (12 * 0.4)
    options = {"masks": 12, "cells": cells, "probability": 0.4, "chunk": 5}
    pixels = vitx.load(ID)(model, x, target, pool=None, **options)
    oracle = "authors' masks (skimage resize) and their sum, in loops"
    what = f"pixels, {size[0]} x {size[1]}, {cells} cells, depth {depth}"
    proof(ID, what, relative_error(pixels, theirs), at_most=1e-9, kind="parity", oracle=oracle)
    patches = theirs.reshape(2, size[0] // 8, 8, size[1] // 8, 8).sum((2, 4))
    assert relative_error(vitx.load(ID)(model, x, target, **options), patches) < 1e-9


def test_every_pixel_is_visible_with_the_same_probability(proof):
    """With a classifier that always says the same, the map is flat: its mean visibility is p everywhere."""
    model = tiny(1, num_classes=2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, math.log(3)]))
    x = pictures(model, 1)
    flat = vitx.load(ID)(model, x, masks=6000, cells=3, probability=0.3, pool=None, chunk=500)[0]
    proof(
        ID, "a constant classifier: farthest from flat", (flat / 0.75 - 1).abs().max(), at_most=0.1, kind="closed form"
    )


def test_masks_are_smooth_and_between_zero_and_one():
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(5, (50,), generator=generator)
    rows = vit.enlarge(7, 33, shift, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(rows.sum(-1), torch.ones(50, 33, dtype=torch.float64))
    assert rows.min() >= 0
    grid = (torch.rand(50, 7, 7, generator=generator) < 0.5).double()
    masks = rows @ grid @ rows.transpose(1, 2)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.diff(dim=1).abs().max() < 0.18  # a cell is 40 / 7 pixels wide


def test_finds_what_the_class_needs():
    """The glyph model names a creature by its parts: the map is higher on it than beside it."""
    from vitx import glyphs, models

    scenes = glyphs.scenes(2, 31)
    model = models.load("glyph").model
    relevance = vitx.load(ID)(model, glyphs.normalise(scenes.images), scenes.labels[:, 0], masks=150)
    inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)) > 0.5
    for heat, mask in zip(relevance, inside, strict=True):
        assert heat[mask].mean() > heat[~mask].mean()


@pytest.mark.parametrize("options", [{"masks": 0}, {"cells": 1}, {"probability": 0.0}, {"probability": 1.0}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="masks must"):
        vitx.load(ID)(model, pictures(model), **options)

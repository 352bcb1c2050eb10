"""DINO's head maps and masks against loops, and what a mask that keeps a share must fulfil."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward
from vitx import glyphs, models

ID = "dino-self-attention"
SIZE: dict[str, Any] = {"img_size": (32, 48)}  # 4 x 6 patches


def strongest(row: np.ndarray, keep: float) -> np.ndarray:
    """The mask of one head, patch after patch from the strongest, until enough is kept."""
    mask, held = np.zeros(len(row), dtype=bool), 0.0
    for patch in sorted(range(len(row)), key=lambda patch: -row[patch]):
        if held >= keep * row.sum():
            break
        mask[patch], held = True, held + row[patch]
    return mask


@pytest.mark.parametrize("depth", [2, 3])
def test_heads_and_masks_are_those_of_the_class_token(depth, proof):
    model = tiny(depth, **SIZE)
    x = pictures(model)
    ours = vitx.load(ID)(model, x)
    assert ours.masks.dtype == torch.bool
    errors, wrong = [], 0
    for image, attention, masks, heatmap in zip(x, ours.attention, ours.masks, ours.heatmap(), strict=True):
        rows = twin_forward(model, image)[0][-1]["attention"][:, 0, 1:]
        expected = np.stack([strongest(row, 0.6) for row in rows])
        errors.append(relative_error(attention.flatten(1), rows))
        wrong += int((masks.flatten(1).numpy() != expected).sum())
        errors.append(relative_error(heatmap.flatten(), (rows * expected).mean(0)))
    oracle = "attention and sorted patches in plain loops"
    proof(ID, f"heads and map, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)
    proof(ID, f"patches whose mask differs, depth {depth}", wrong, at_most=0, kind="parity", oracle=oracle)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.95])
def test_a_mask_is_the_smallest_that_keeps_its_share(keep):
    model = tiny(3, **SIZE)
    attention, masks = (maps.flatten(2) for maps in vitx.load(ID)(model, pictures(model), keep=keep))
    share = attention / attention.sum(-1, keepdim=True)
    held = (share * masks).sum(-1)
    weakest = share.where(masks, torch.inf).amin(-1)
    assert (held >= keep - 1e-12).all()
    assert (held - weakest < keep).all()
    assert (weakest >= share.where(~masks, -torch.inf).amax(-1)).all()


def test_masks_grow_with_the_share():
    model = tiny(2, **SIZE)
    masks = [vitx.load(ID)(model, pictures(model), keep=keep).masks for keep in (1e-9, 0.2, 0.6, 0.9, 1.0)]
    assert all((smaller <= larger).all() for smaller, larger in itertools.pairwise(masks))
    assert (masks[0].sum((2, 3)) == 1).all()
    assert masks[-1].all()


def test_keeping_all_is_raw_attention(proof):
    for options in (SIZE, SIZE | {"reg_tokens": 3}, SIZE | {"class_token": False, "global_pool": "avg"}):
        model = tiny(2, **options)
        x = pictures(model)
        error = relative_error(vitx.load(ID)(model, x, keep=1.0).heatmap(), vitx.load("raw-attention")(model, x))
        proof(ID, "keeping all of every head is raw attention", error, at_most=1e-12, kind="closed form")


def test_uniform_attention_keeps_the_share_of_patches(proof):
    model = tiny(2, **SIZE)
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight[:16] = 0  # no queries, no keys: all scores equal
        model.blocks[-1].attn.qkv.bias[:16] = 0
    kept = vitx.load(ID)(model, pictures(model)).masks.sum((2, 3))
    error = (kept - math.ceil(0.6 * 24)).abs().max()
    proof(ID, "uniform attention keeps 60 % of the patches, rounded up", error, at_most=0, kind="closed form")


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(keep):
    model = tiny(2)
    with pytest.raises(ValueError, match="keep must lie above 0"):
        vitx.load(ID)(model, pictures(model), keep=keep)


def test_the_best_head_finds_the_creature(proof):
    """The paper's measure: Jaccard similarity of the best head's mask with the object, and chance."""
    scenes = glyphs.scenes(32, seed=4_100)
    found = vitx.load(ID)(models.load("glyph").model, glyphs.normalise(scenes.images))
    truth = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)) > 0.5  # (B, 14, 14)

    def jaccard(masks: torch.Tensor) -> float:
        both, either = (masks & truth[:, None]).sum((2, 3)), (masks | truth[:, None]).sum((2, 3))
        return float((both / either).amax(1).mean())

    order = torch.randperm(196, generator=torch.Generator().manual_seed(0))
    chance = jaccard(found.masks.flatten(2)[..., order].unflatten(-1, (14, 14)))
    gain = jaccard(found.masks) / chance
    what = "Jaccard similarity of the best head's mask with the creature, over that of shuffled masks"
    proof(ID, what, gain, at_least=3, kind="ground truth", oracle="32 glyph scenes")

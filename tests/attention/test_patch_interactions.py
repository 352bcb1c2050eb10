"""Interactions and responsive fields against loops, and fields that are known in closed form."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward

ID = "patch-interactions"
SIZE: dict[str, Any] = {"img_size": (32, 48)}  # 4 x 6 patches
PLACES = list(np.ndindex(4, 6))
fields = vitx.load_module(ID).fields


def twin(attention: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Interactions, use, radius and tendency of attention (P, P), pair by pair."""
    interactions, radius, tendency = np.zeros((24, 24)), np.zeros((4, 6)), np.zeros((4, 6, 2))
    for p in range(24):
        total = sum(attention[p, q] for q in range(24) if q != p)
        for q in range(24):
            interactions[p, q] = 0 if p == q else attention[p, q] / total
    for p, (i, j) in enumerate(PLACES):
        while True:
            near = [q for q, (k, m) in enumerate(PLACES) if max(abs(k - i), abs(m - j)) <= radius[i, j]]
            if sum(interactions[p, q] for q in near) >= share - 1e-12:
                break
            radius[i, j] += 1
        for q, (k, m) in enumerate(PLACES):
            tendency[i, j] += interactions[p, q] * np.array([k - i, m - j])
    return interactions, interactions.sum(0).reshape(4, 6), radius, tendency


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_interactions_and_fields(depth, share, proof):
    model, errors = tiny(depth, **SIZE), []
    x = pictures(model)
    for layer in (None, *range(depth)):
        ours = vitx.load(ID)(model, x, layer=layer, share=share)
        for index, image in enumerate(x):
            blocks = [record["attention"].mean(0)[1:, 1:] for record in twin_forward(model, image)[0]]
            theirs = twin(np.mean(blocks, 0) if layer is None else blocks[layer], share)
            found = [field[index] for field in ours]
            errors += [relative_error(one, other) for one, other in zip(found, theirs, strict=True)]
            assert torch.equal(ours.heatmap()[index], found[1])
    oracle = "attention, windows and offsets in plain loops"
    what = f"interactions and fields, depth {depth}, share {share:g}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_rows_are_distributions_over_the_others(proof):
    for options in (SIZE, SIZE | {"reg_tokens": 3}, SIZE | {"class_token": False, "global_pool": "avg"}):
        model = tiny(3, **options)
        found = vitx.load(ID)(model, pictures(model))
        assert found.interactions.diagonal(dim1=1, dim2=2).abs().max() == 0
        errors = [(found.interactions.sum(-1) - 1).abs().max(), (found.use.mean((1, 2)) - 1).abs().max()]
        proof(ID, "rows sum to one, columns to one on the average", max(errors), at_most=1e-12, kind="closed form")


def test_patches_that_all_look_right(proof):
    """Every patch reads the one to its right, the last of a row the first: radius one, but for the ends of rows."""
    attention = torch.zeros(1, 24, 24, dtype=torch.float64)
    for p, (i, j) in enumerate(PLACES):
        attention[0, p, 6 * i + (j + 1) % 6] = 0.25
        attention[0, p, p] = 0.75  # what a patch keeps does not count
    found = fields(attention, (4, 6), 0.5)
    assert (found.radius[..., :-1] == 1).all()
    assert (found.radius[..., -1] == 5).all()
    expected = torch.tensor([[0.0, 1.0]] * 5 + [[0.0, -5.0]], dtype=torch.float64).expand(1, 4, 6, 2)
    error = max((found.tendency - expected).abs().max(), (found.use - 1).abs().max())
    proof(ID, "attention to the right neighbour: radius, tendency, use", error, at_most=1e-12, kind="closed form")


def test_uniform_attention_looks_to_the_middle(proof):
    """Without preference a patch looks to the mean of all others, and its window grows with the share."""
    uniform = torch.full((1, 24, 24), 1 / 24, dtype=torch.float64)
    found = fields(uniform, (4, 6), 0.3)
    places = torch.tensor(PLACES, dtype=torch.float64).view(4, 6, 2)
    expected = (places.mean((0, 1)) - places) * 24 / 23
    error = max((found.tendency[0] - expected).abs().max(), (found.use - 1).abs().max())
    proof(ID, "uniform attention: tendency to the middle, even use", error, at_most=1e-12, kind="closed form")
    # 0.3 of 23 others is 6.9: an inner patch has 8 around it, one at the edge only 5.
    assert found.radius[0, 1, 2] == 1
    assert found.radius[0, 0, 2] == 2
    radii = [fields(uniform, (4, 6), share).radius for share in (0.1, 0.3, 0.6, 1.0)]
    assert all((narrow <= wide).all() for narrow, wide in itertools.pairwise(radii))


def test_a_mirrored_picture_has_mirrored_fields():
    attention = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mirror = torch.arange(24).view(4, 6).flip(1).flatten()
    one, other = fields(attention, (4, 6), 0.5), fields(attention[:, mirror][:, :, mirror], (4, 6), 0.5)
    assert torch.equal(one.radius.flip(2), other.radius)
    assert torch.allclose(one.use.flip(2), other.use, rtol=1e-12)
    assert torch.allclose(one.tendency.flip(2) * torch.tensor([1.0, -1.0]), other.tendency, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.2}, {"layer": 2}, {"layer": -3}])
def test_options_out_of_range_are_refused(options):
    model = tiny(2, **SIZE)
    with pytest.raises(ValueError, match=r"share must lie above 0|layer -?\d is out of range"):
        vitx.load(ID)(model, pictures(model), **options)


def test_a_single_patch_is_refused():
    model = tiny(2, img_size=8)
    with pytest.raises(ValueError, match="one patch"):
        vitx.load(ID)(model, pictures(model))

"""Token norms against loops, outliers that were planted, and the finding that small models have none."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward, weights
from vitx import images, models

ID = "registers"
SIZE: dict[str, Any] = {"img_size": (32, 48)}  # 4 x 6 patches


def neighbours(i: int, j: int) -> list[tuple[int, int]]:
    around = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
    return [(row, column) for row, column in around if 0 <= row < 4 and 0 <= column < 6]


def similarity(model: Any, image: torch.Tensor) -> np.ndarray:
    """Mean cosine with the neighbours, patch by patch."""
    w, embeddings = weights(model), np.zeros((4, 6, 8))
    for i, j in np.ndindex(4, 6):
        patch = image[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
        embeddings[i, j] = (w["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
    result = np.zeros((4, 6))
    for i, j in np.ndindex(4, 6):
        one, others = embeddings[i, j], [embeddings[place] for place in neighbours(i, j)]
        result[i, j] = np.mean([one @ other / math.sqrt((one @ one) * (other @ other)) for other in others])
    return result


@pytest.mark.parametrize("depth", [2, 3])
def test_norms_attention_and_similarity(depth, proof):
    model = tiny(depth, **SIZE)
    x = pictures(model)
    ours = vitx.load(ID)(model, x)
    errors = []
    for index, image in enumerate(x):
        records, _ = twin_forward(model, image)
        for layer, record in enumerate(records):
            norms = [math.sqrt(sum(v * v for v in token)) for token in record["output"][1:]]
            errors.append(relative_error(ours.norms[index, layer].flatten(), norms))
            row = record["attention"].mean(0)[0, 1:]
            errors.append(relative_error(ours.attention[index, layer].flatten(), row))
        assert torch.equal(ours.heatmap()[index], ours.norms[index, -1])
        errors.append(relative_error(ours.similarity[index], similarity(model, image)))
    oracle = "tokens, attention and neighbours in plain loops"
    proof(ID, f"norms, attention, similarity, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_blocks_that_do_nothing_leave_the_norms_of_the_embedding(proof):
    model = tiny(3, **SIZE)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    x = pictures(model)
    norms = vitx.load(ID)(model, x).norms.flatten(2)
    expected = (model.patch_embed(x) + model.pos_embed[:, 1:]).norm(dim=-1)[:, None].expand(-1, 3, -1)
    error = relative_error(norms, expected.detach())
    proof(ID, "identity blocks keep the norms of the embedding", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_planted_outliers_are_found(options):
    """Tokens that are made long, and no others, are outliers; the cutoff may also be given as a norm."""
    model = tiny(3, **(SIZE | options))
    x = pictures(model)
    explain = vitx.load(ID)
    assert not explain(model, x).outliers.any()
    planted = torch.zeros(4, 6, dtype=torch.bool)
    planted[0, 5] = planted[2, 1] = True
    with torch.no_grad():
        model.pos_embed[0, model.num_prefix_tokens :][planted.flatten()] += 1000
    found = explain(model, x)
    assert (found.outliers == planted).all()
    assert found.norms[:, :, planted].min() > 1000
    assert torch.equal(explain(model, x, cutoff=1000.0).outliers, found.outliers)
    assert explain(model, x, cutoff=0).outliers.all()
    assert not explain(model, x, cutoff=math.inf).outliers.any()


def test_the_cutoff_is_three_medians_of_the_last_block():
    model = tiny(2, **SIZE)
    with torch.no_grad():  # lengths that grow with the patch, and a last block that changes them
        model.pos_embed[0, 1:] *= torch.logspace(0, 2.5, 24, dtype=torch.float64)[:, None]
        model.blocks[-1].mlp.fc2.weight *= 5
    x = pictures(model, 3)
    found = vitx.load(ID)(model, x)

    def above(layer: int, times: float) -> list[list[bool]]:
        lengths = found.norms[:, layer].flatten(1).tolist()
        medians = [sorted(norms)[11] for norms in lengths]  # the lower of the two in the middle of 24
        return [[n > times * median for n in norms] for norms, median in zip(lengths, medians, strict=True)]

    assert found.outliers.flatten(1).tolist() == above(-1, 3)
    assert found.outliers.any()
    assert above(-1, 3) not in (above(0, 3), above(-1, 2), above(-1, 4))  # so that the test can tell them apart


def test_a_plain_picture_is_like_its_neighbours(proof):
    model = tiny(2, **SIZE)
    plain = torch.full((1, 3, 32, 48), 0.7, dtype=torch.float64)
    error = (vitx.load(ID)(model, plain).similarity - 1).abs().max()
    proof(ID, "on a plain picture every patch is like its neighbours", error, at_most=1e-12, kind="closed form")


def test_patches_that_alternate_in_sign_are_opposite(proof):
    model = tiny(2, **SIZE)
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
    sign = torch.tensor([[(-1.0) ** (i + j) for j in range(6)] for i in range(4)], dtype=torch.float64)
    board = pictures(model, 1)[:, :, :8, :8].tile(1, 1, 4, 6) * sign.repeat_interleave(8, 0).repeat_interleave(8, 1)
    error = (vitx.load(ID)(model, board).similarity + 1).abs().max()
    proof(ID, "on a chequerboard every patch is its neighbours' opposite", error, at_most=1e-12, kind="closed form")


def test_small_models_have_no_outliers(proof):
    """Figure 4c of the paper: models smaller than ViT-Large have none. `photo` is a ViT-S."""
    loaded = models.load("photo")
    x = torch.stack([loaded.preprocess(images.open_image(name)) for name in ("chelsea", "coffee", "rocket")])
    found = vitx.load(ID)(loaded.model, x)
    assert not found.outliers.any()
    norms = found.norms.flatten(2)  # (B, L, P)
    largest = (norms.amax(2) / norms.median(dim=2).values).max()
    what = "photo: largest norm of any block over the median of its picture"
    proof(ID, what, largest, at_most=3, kind="sanity", oracle="3 photographs")


@pytest.mark.parametrize("cutoff", [-1, math.nan])
def test_a_cutoff_that_is_no_norm_is_refused(cutoff):
    model = tiny(2)
    with pytest.raises(ValueError, match="must be at least 0"):
        vitx.load(ID)(model, pictures(model), cutoff=cutoff)

"""Patch Slimming: rows of a block, scores against every path of heads, the search against a search in loops."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_norm, pictures, relative_error, tiny, training_script, twin_block, twin_tokens, weights
from vitx import catalog, load_module, models
from vitx.vit import UnsupportedModel, embed

ID = "patch-slimming"
snippet: Any = load_module(ID)
WIDE: dict[str, Any] = {"img_size": (24, 32)}  # 3 x 4 patches


def nested(layers: int = 3, seed: int = 0) -> torch.Tensor:
    """Masks (L, 12), each within the one before, the last empty."""
    order = torch.rand(12, generator=torch.Generator().manual_seed(seed)).argsort()
    masks = torch.zeros(layers, 12, dtype=torch.bool)
    for layer, count in enumerate((9, 5, 2, 1)[4 - layers : -1] if layers > 1 else ()):
        masks[layer, order[:count]] = True
    return masks


def twin_rows(model, index: int, x: dict[int, np.ndarray], kept: list[int]) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Block ``index`` on the tokens at their places, 0 the class token: the kept rows, and weights (h, 13, 13)."""
    places = sorted(x)
    record = twin_block(model, index, np.stack([x[p] for p in places]))
    whole = np.zeros((2, 13, 13))
    for row in kept:
        for column in places:
            whole[:, row, column] = record["attention"][:, places.index(row), places.index(column)]
    return {p: record["output"][places.index(p)] for p in kept}, whole


def places_of(mask: torch.Tensor) -> list[int]:
    return [0, *(int(p) + 1 for p in mask.nonzero()[:, 0])]


def twin_scores(model, index: int, z: dict[int, np.ndarray], masks: torch.Tensor) -> list[float]:
    """s_t of the patches for block ``index``, by the published formula: every choice of heads, one product each."""
    depth, everywhere = len(model.blocks), list(range(13))
    x, p = twin_rows(model, index, z, everywhere)
    u = [p[h] @ np.abs(np.stack([z[i] for i in everywhere])) for h in range(2)]
    above = []
    for layer in range(index + 1, depth):
        x, p = twin_rows(model, layer, x, places_of(masks[layer]))
        above.append(p)
    total = np.zeros(13)
    for choice in itertools.product(range(2), repeat=len(above) + 1):
        a = np.eye(13)
        for head, p in zip(choice[1:], above, strict=True):
            a = p[head] @ a  # the highest block comes to stand first
        for i in everywhere:
            total[i] += np.linalg.norm(np.outer(a[:, i], u[choice[0]][i])) ** 2
    return [float(s) / 2 ** (len(above) + 1) for s in total[1:]]


def twin_slim(model, images, tolerance: float, step: int) -> list[list[int]]:
    """Masks as lists of patches, found in loops."""
    depth, full = len(model.blocks), []
    for image in images:
        x = [dict(enumerate(twin_tokens(model, image)))]
        for index in range(depth):
            x.append(twin_rows(model, index, x[-1], list(range(13)))[0])
        full.append(x)
    masks = torch.zeros(depth, 12, dtype=torch.bool)
    for index in reversed(range(depth - 1)):
        every = [twin_scores(model, index, x[index], masks) for x in full]
        score = [sum(column) / len(every) for column in zip(*every, strict=True)]
        base = masks[index + 1].nonzero()[:, 0].tolist()
        others = sorted((p for p in range(12) if p not in base), key=lambda p: -score[p])
        goal, added = places_of(masks[index + 1]), 0
        while True:
            kept = [0, *sorted(p + 1 for p in base + others[:added])]
            error = size = 0.0
            for x in full:
                found = twin_rows(model, index + 1, {p: x[index + 1][p] for p in kept}, goal)[0]
                error += sum(float(((found[p] - x[index + 2][p]) ** 2).sum()) for p in goal)
                size += sum(float((x[index + 2][p] ** 2).sum()) for p in goal)
            if error <= tolerance * size or added >= len(others):
                break
            added = min(added + step, len(others))
        masks[index, [p - 1 for p in kept[1:]]] = True
    return [mask.nonzero()[:, 0].tolist() for mask in masks]


def test_token_by_token(proof):
    model = tiny(3, **WIDE)
    x, masks, w, errors = pictures(model, 3), nested(), weights(model), []
    ours = snippet.explain(model, x, masks=masks)
    for index, image in enumerate(x):
        tokens = dict(enumerate(twin_tokens(model, image)))
        for layer in range(3):
            tokens = twin_rows(model, layer, tokens, places_of(masks[layer]))[0]
        logits = layer_norm(tokens[0], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]
        errors.append(relative_error(ours.logits[index], logits))
        assert torch.equal(ours.alive[index].flatten(1), masks)
    proof(ID, "logits of a slimmed model", max(errors), at_most=1e-9, kind="parity", oracle="token by token in loops")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_scores_of_every_path_of_heads(index, proof):
    model, masks = tiny(4, **WIDE), nested(4)
    x = pictures(model)
    tokens = embed(model, x)
    for block in model.blocks[:index]:
        tokens = block(tokens)
    ours = snippet.scores(list(model.blocks)[index:], tokens, masks[index:], 1)
    errors = []
    for row, z in enumerate(tokens.detach().numpy()):
        errors.append(relative_error(ours[row].detach(), twin_scores(model, index, dict(enumerate(z)), masks)))
    what = f"scores of block {index + 1} of 4"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="the formula, path of heads by path of heads")


@pytest.mark.parametrize(("tolerance", "step"), [(0.02, 1), (0.05, 2), (0.3, 3)])
def test_the_search_in_loops(tolerance, step):
    model = tiny(3, **WIDE)
    x = pictures(model, 4)
    masks = snippet.slim(model, x, tolerance, step, chunk=3)
    assert [mask.nonzero()[:, 0].tolist() for mask in masks] == twin_slim(model, x, tolerance, step)
    assert not masks[-1].any()
    assert (masks[1:] <= masks[:-1]).all()


def test_no_tolerance_keeps_all_that_the_class_token_reads():
    model = tiny(3, **WIDE)
    masks = snippet.slim(model, pictures(model, 4), 0.0)
    assert masks.sum(1).tolist() == [12, 12, 0]


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "qk_norm": True, "init_values": 0.1}, {"qkv_bias": False}])
def test_dropping_nothing_is_the_plain_model(options, proof):
    model = tiny(3, **WIDE, **options)
    x = pictures(model)
    plain = model(x).detach()
    name = ", ".join(options) or "class token"
    error = relative_error(snippet.explain(model, x, tolerance=0).logits, plain)
    proof(ID, f"tolerance 0 is the plain model, {name}", error, at_most=1e-12, kind="closed form")
    masks = torch.ones(3, 12, dtype=torch.bool)
    masks[-1] = False  # the class token reads all patches still, and nobody reads theirs
    error = relative_error(snippet.explain(model, x, masks=masks).logits, plain)
    proof(ID, f"the last block needs the class token alone, {name}", error, at_most=1e-12, kind="closed form")


def test_what_cannot_be_slimmed_is_named():
    model = tiny(3, **WIDE)
    x = pictures(model)
    with pytest.raises(UnsupportedModel, match="brings no masks"):
        snippet.explain(model, x)
    with pytest.raises(UnsupportedModel, match="class token that the head reads"):
        snippet.slim(tiny(2, global_pool="avg"), pictures(tiny(2)))
    for bad in (nested(4), nested().flip(0), nested().float()):
        with pytest.raises(ValueError, match=r"masks must be bool of shape \(3, 12\)"):
            snippet.explain(model, x, masks=bad)


def test_the_shipped_model(proof, monkeypatch):
    """The card holds on unseen scenes, and the masks are those that the file's weights were trained with."""
    script, card = training_script("patch_slimming_glyph"), catalog.load().models["patch-slimming-glyph"]
    model: Any = models.load("patch-slimming-glyph").model
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(model, 200)
    for name, value in measured.items():
        assert abs(value - card.metrics[name]) < 0.05, name
    with pytest.raises(ValueError, match="brings masks for the tolerances 0 and"):
        snippet.explain(model, pictures(model), tolerance=0.77)
    name, oracle = f"{model.tolerances[0]:g}", "200 glyph scenes"
    loss = measured[f"top1_{name}"] - measured["top1_glyph"]
    proof(ID, "accuracy less that of the plain model", loss, at_least=-0.05, kind="ground truth", oracle=oracle)
    lift = measured[f"on_creature_{name}"] / measured["chance"]
    proof(ID, "kept patches on the creature, against chance", lift, at_least=1.0, kind="ground truth", oracle=oracle)

"""ViT-Slim: soft masks and dropped units in plain loops, the smaller model on the shorter sequence, and the ranking."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    close_to_card,
    layer_norm,
    pictures,
    relative_error,
    roughen,
    tiny,
    twin_tokens,
    weights,
)
from safetensors.torch import save_file
from scipy.special import erf
from torch.func import functional_call
from vitx import load_module
from vitx.vit import UnsupportedModel

ID = "vit-slim"
snippet = load_module(ID)
TINY: dict[str, Any] = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 12, "num_heads": 3, "mlp_ratio": 2}
TINY |= {"depth": 3, "num_classes": 5}  # 12 patches, heads of width 4


def slim_model() -> Any:
    """A rough model of three blocks whose masks all differ."""
    model = roughen(snippet.SlimTransformer(**TINY))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for mask in model.masks.values():
            mask.copy_(torch.randn(mask.shape, generator=generator, dtype=torch.float64))
    return model


def twin(model: Any, image: torch.Tensor, gates: dict[str, np.ndarray], drop: bool) -> np.ndarray:
    """Logits of one picture in loops over heads and tokens.

    Queries, keys, values and neurons are multiplied with their gates. A patch is multiplied with its gate where
    attention and MLP read it or, with ``drop``, taken out of the list of tokens when its gate is 0.
    """
    w, tokens = weights(model), [(-1, row) for row in twin_tokens(model, image)]
    tokens = [(place - 1, row) for place, (_, row) in enumerate(tokens)]  # place -1 is the class token
    for index in range(len(model.blocks)):
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
        patches, dimensions = gates["patches"][index], gates["head_dimensions"][index]
        if drop:
            tokens = [(place, row) for place, row in tokens if place < 0 or patches[place]]
        weight = [1.0 if drop or place < 0 else patches[place] for place, _ in tokens]
        x = np.stack([row for _, row in tokens])
        read = layer_norm(x, of["norm1.weight"], of["norm1.bias"]) * np.array(weight)[:, None]
        qkv = read @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
        mixed = np.zeros_like(x)
        for head in range(3):
            q, k, v = (qkv[:, p * 12 + head * 4 : p * 12 + head * 4 + 4] * dimensions[head] for p in range(3))
            for i in range(len(x)):
                powers = np.array([math.exp(float(q[i] @ row) / 2) for row in k])
                mixed[i, head * 4 : head * 4 + 4] = powers / powers.sum() @ v
        x = x + mixed @ of["attn.proj.weight"].T + of["attn.proj.bias"]
        read = layer_norm(x, of["norm2.weight"], of["norm2.bias"]) * np.array(weight)[:, None]
        hidden = read @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))) * gates["neurons"][index]
        x = x + hidden @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]
        tokens = [(place, row) for (place, _), row in zip(tokens, x, strict=True)]
    return layer_norm(tokens[0][1], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]


def test_soft_masks(proof):
    """The search: all three kinds of masks, against loops."""
    model = slim_model()
    x, scores = pictures(model), model.scores()
    handles = snippet.gate_patches(model, scores["patches"])
    ours = functional_call(model, snippet.gated(model, scores), (x,)).detach()
    for handle in handles:
        handle.remove()
    gates = {kind: score.detach().numpy() for kind, score in scores.items()}
    error = max(relative_error(row, twin(model, image, gates, False)) for row, image in zip(ours, x, strict=True))
    proof(ID, "soft masks", error, at_most=1e-9, kind="parity", oracle="masked transformer in plain loops")
    assert all(not block.attn._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize(("keep_rate", "keep_patches"), [(0.7, 1.0), (1.0, 0.5), (0.5, 0.4), (0.1, 0.1)])
def test_the_smaller_model_is_the_masked_one(keep_rate, keep_patches, proof):
    model = slim_model()
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=keep_rate, keep_patches=keep_patches)
    gates = {kind: kept.double().numpy() for kind, kept in found.kept.items()}
    pairs = zip(found.logits, x, strict=True)
    error = max(relative_error(row, twin(model, image, gates, True)) for row, image in pairs)
    what = f"smaller model, {keep_rate} of the units, {keep_patches} of the patches"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="transformer without the tokens, in plain loops")


def test_the_smaller_model_is_small():
    model = slim_model()
    x = pictures(model)
    found, smaller = snippet.explain(model, x, keep_rate=0.4), snippet.prune(model, 0.4)
    lengths = []
    for block in smaller.blocks:
        block.norm1.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    smaller(x)
    assert lengths == (found.kept["patches"].sum(1) + 1).tolist()  # the sequence is really shorter
    for block, dimensions, neurons in zip(
        smaller.blocks, found.kept["head_dimensions"], found.kept["neurons"], strict=True
    ):
        heads, wide = int(dimensions.any(1).sum()), int(dimensions.sum(1).max())
        assert (block.attn.num_heads, block.attn.head_dim) == (heads, wide)
        assert block.attn.qkv.weight.shape == (3 * heads * wide, 12)
        assert block.mlp.fc1.weight.shape == (int(neurons.sum()), 12)
    for block in smaller.blocks:
        block.attn.fused_attn = not block.attn.fused_attn  # both ways to divide by the root of the width
    assert relative_error(smaller(x).detach(), found.logits) < 1e-12


def test_keeping_all_is_the_plain_model(proof):
    model, plain = slim_model(), tiny(**TINY)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("masks")})
    x = pictures(model)
    found = snippet.explain(model, x, keep_rate=1.0)
    assert all(kept.all() for kept in found.kept.values())
    assert torch.equal(model(x), plain(x))
    error = relative_error(found.logits, plain(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.35])
def test_one_ranking_over_all_blocks(budget):
    """The authors' rule in plain Python: a unit stays when its mask reaches the one at the budget's place."""
    model = slim_model()
    found = snippet.explain(model, pictures(model, 1), keep_rate=budget)
    for kind in ("head_dimensions", "neurons"):
        values = sorted(found.scores[kind].flatten().tolist())
        threshold = values[int(round((1.0 - budget) * len(values), 6))]
        expected = found.scores[kind] >= threshold
        assert torch.equal(found.kept[kind] | expected, found.kept[kind])
        alone = (found.kept[kind] & ~expected).flatten(1).sum(1)  # the last one of a block that would be left without
        assert (alone <= (expected.flatten(1).sum(1) == 0)).all()
    values = sorted(found.scores["patches"].flatten().tolist())
    threshold = values[int(round((1.0 - budget) * len(values), 6))]
    needed = (found.scores["patches"] >= threshold).tolist()
    for patch in range(12):
        for block in range(3):
            assert found.kept["patches"][block, patch] == any(needed[later][patch] for later in range(block, 3))


def test_what_is_refused():
    model = tiny(2)
    with pytest.raises(UnsupportedModel, match="carries none"):
        snippet.explain(model, pictures(model))
    model = slim_model()
    with pytest.raises(UnsupportedModel, match="carries none"):  # the masks are used up
        snippet.explain(snippet.prune(model, 0.5), pictures(model))
    for options in ({"keep_rate": 0.0}, {"keep_rate": 1.2}, {"keep_patches": 0.0}):
        with pytest.raises(ValueError, match="shares to keep lie above 0"):
            snippet.explain(model, pictures(model), **options)


def test_a_file_gives_back_its_model(tmp_path):
    model = slim_model().float()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors", {"backbone": json.dumps(TINY)})
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    x = pictures(model)
    assert not again.training
    assert torch.equal(snippet.explain(again, x).logits, snippet.explain(model, x).logits)


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("vit-slim-glyph", monkeypatch, within=0.12)
    what, oracle = "accuracy with 60% of units and patches", "100 glyph scenes"
    proof(ID, what, measured["top1_60"], at_least=0.9, kind="ground truth", oracle=oracle)
    value = measured["top1_40_all_patches"] - measured["top1_40_random"]
    what = "accuracy above that of random masks, 40% of the units kept"
    proof(ID, what, value, at_least=0.3, kind="sanity", oracle=oracle)

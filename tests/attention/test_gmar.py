"""GMAR against full matrix products in plain loops, and its limits."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_attention_gradients, twin_forward, weights
from vitx.vit import UnsupportedModel

ID = "gmar"


def importance(gradient: np.ndarray, norm: str) -> float:
    return float(np.abs(gradient).sum() if norm == "l1" else np.sqrt((gradient**2).sum()))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("depth", [2, 3])
def test_weighted_rollout_in_loops(depth, norm, proof):
    model = tiny(depth, seed=4)
    x, target = pictures(model), [1, 4]
    theirs = []
    for image, label in zip(x, target, strict=True):
        rollout = np.eye(5)
        gradients = twin_attention_gradients(model, image, label)
        for record, gradient in zip(twin_forward(model, image)[0], gradients, strict=True):
            sizes = [importance(gradient[m], norm) for m in range(2)]
            mixed = sum(size / sum(sizes) * record["attention"][m] for m, size in enumerate(sizes)) + np.eye(5)
            rollout = (mixed / mixed.sum(-1, keepdims=True)) @ rollout
        theirs.append(rollout[0, 1:].reshape(2, 2))
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target), norm=norm), theirs)
    oracle = "full products in plain loops, gradients by finite differences"
    proof(ID, f"{norm}, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def twin_of_the_code(model, image, target: int, norm: str, step: float = 1e-5) -> np.ndarray:
    """Gradient of the last norm1 output on patches, by finite differences; whole matrices for every head."""
    w, records = weights(model), twin_forward(model, image)[0]
    last = {n.removeprefix(f"blocks.{len(records) - 1}."): t for n, t in w.items()}

    def logit(normed: np.ndarray) -> float:
        record, mixed = records[-1], np.zeros((5, 8))
        qkv = normed @ last["attn.qkv.weight"].T + last["attn.qkv.bias"]
        for m in range(2):
            q, k, v = (qkv[:, p * 8 + m * 4 : p * 8 + m * 4 + 4] for p in range(3))
            scores = np.exp(q @ k.T / 2)
            mixed[:, m * 4 : m * 4 + 4] = scores / scores.sum(-1, keepdims=True) @ v
        middle = record["input"] + mixed @ last["attn.proj.weight"].T + last["attn.proj.bias"]
        with torch.no_grad():  # the MLP and the head, from the model itself
            block, tokens = model.blocks[-1], torch.as_tensor(middle)[None]
            tokens = tokens + block.mlp(block.norm2(tokens))
        final = layer_norm(tokens[0].numpy(), w["norm.weight"], w["norm.bias"])[0]
        return final @ w["head.weight"][target] + w["head.bias"][target]

    gradient = np.zeros((5, 8))
    for place in np.ndindex(5, 8):
        up, down = records[-1]["normed"].copy(), records[-1]["normed"].copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (logit(up) - logit(down)) / (2 * step)
    sizes = [importance(gradient[1:, m * 4 : m * 4 + 4], norm) for m in range(2)]
    rollout = np.stack([np.eye(5)] * 2)  # (heads, N, N)
    for record in records:
        rollout = np.stack([rollout[m] @ (record["attention"][m] * sizes[m] / sum(sizes)) for m in range(2)])
        rollout = rollout + 0.25 * 5e-5 * rollout.mean() * np.eye(5)
    result = np.zeros(4)
    for row in range(4):  # the patches, as queries of the first head
        for column in range(5):
            result[(row + column) % 4] += rollout[0][1 + row, column] / 5
    return result.reshape(2, 2)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_authors_code_in_loops(norm, proof):
    model = tiny(3, seed=4)
    x, target = pictures(model), [1, 4]
    theirs = [twin_of_the_code(model, image, label, norm) for image, label in zip(x, target, strict=True)]
    ours = vitx.load(ID)(model, x, torch.tensor(target), norm=norm, authors_code=True)
    oracle = "full products in plain loops, gradients by finite differences"
    error = relative_error(ours, theirs)
    proof(ID, f"as in the authors' code, {norm}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_equal_heads_give_attention_rollout(proof):
    """Where all heads attend alike, their weights cannot matter: the map is rollout's."""
    model = tiny(3)
    with torch.no_grad():
        for block in model.blocks:
            for part in (0, 8):  # queries and keys of the second head are those of the first
                block.attn.qkv.weight[part + 4 : part + 8] = block.attn.qkv.weight[part : part + 4]
                block.attn.qkv.bias[part + 4 : part + 8] = block.attn.qkv.bias[part : part + 4]
    x = pictures(model)
    error = relative_error(vitx.load(ID)(model, x), vitx.load("attention-rollout")(model, x))
    proof(ID, "equal heads give attention rollout", error, at_most=1e-12, kind="closed form")


def test_the_map_is_a_distribution(proof):
    model = tiny(3, class_token=False, global_pool="avg")
    total = vitx.load(ID)(model, pictures(model)).sum((1, 2))
    proof(ID, "average pooling: the map sums to one", (total - 1).abs().max(), at_most=1e-12, kind="closed form")


def test_what_is_refused():
    model = tiny(2)
    x = pictures(model)
    with pytest.raises(ValueError, match="norm must be 'l1' or 'l2', not 'max'"):
        vitx.load(ID)(model, x, norm="max")
    with torch.no_grad():
        model.head.weight[2] = 0
    with pytest.raises(ValueError, match="no head has a gradient"):
        vitx.load(ID)(model, x, torch.tensor([2, 2]))
    gap = tiny(2, class_token=False, global_pool="avg")
    with pytest.raises(UnsupportedModel, match="no class token"):
        vitx.load(ID)(gap, pictures(gap), authors_code=True)

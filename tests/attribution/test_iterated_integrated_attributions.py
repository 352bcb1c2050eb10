from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_tokens, variant, weights
from scipy.special import erf
from torch import nn
from vitx.vit import capture, replaced_attention, target_scores

ID = "iterated-integrated-attributions"


def mixed_by(model: Any, index: int, x: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Output of one block that mixes its values with the given attention (heads, N, N)."""
    w = {n.removeprefix(f"blocks.{index}."): t for n, t in weights(model).items() if n.startswith(f"blocks.{index}.")}
    values = np.split((layer_norm(x, w["norm1.weight"], w["norm1.bias"]) @ w["attn.qkv.weight"].T), 3, 1)[2]
    values = np.split(values + w["attn.qkv.bias"][2 * x.shape[1] :], len(attention), 1)
    middle = x + np.concatenate([a @ v for a, v in zip(attention, values, strict=True)], 1) @ w["attn.proj.weight"].T
    middle = middle + w["attn.proj.bias"]
    hidden = layer_norm(middle, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return middle + hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def twin_run(model: Any, image, faded: dict[int, np.ndarray], change: tuple | None = None):
    """The attention of every block, and the logits; ``faded`` fixes that of some, ``change`` adds to one entry."""
    x, attentions = twin_tokens(model, image), []
    for index in range(len(model.blocks)):
        attention = (faded[index] if index in faded else twin_block(model, index, x)["attention"]).copy()
        if change is not None and change[0] == index:
            attention[change[1:4]] += change[4]
        attentions.append(attention)
        x = mixed_by(model, index, x, attention)
    w = weights(model)
    final = layer_norm(x, w["norm.weight"], w["norm.bias"])
    return attentions, final[0] @ w["head.weight"].T + w["head.bias"]


def twin(model: Any, image, target: int, alphas: list[float], layers: int) -> np.ndarray:
    """The map of one picture by nested loops, gradients by central differences."""
    depth, step = len(model.blocks), 1e-5
    integrals: list[np.ndarray] = [np.zeros((5, 5)) for _ in range(depth)]

    def visit(scaled, faded: dict[int, np.ndarray], index: int) -> None:
        if index < depth:
            attention = twin_run(model, scaled, faded)[0][index]
            for alpha in alphas:
                visit(scaled, faded | {index: alpha * attention}, index + 1)
            return
        attentions, _ = twin_run(model, scaled, faded)
        for layer, attention in enumerate(attentions):
            for head, i, j in np.ndindex(attention.shape):
                up, down = (twin_run(model, scaled, faded, (layer, head, i, j, s * step))[1][target] for s in (1, -1))
                product = attention[head, i, j] * (up - down) / (2 * step)
                integrals[layer][i, j] += max(product, 0.0) / len(attention) / len(alphas) ** (1 + layers)

    for alpha in alphas:
        visit(alpha * image, {}, depth - layers)
    rollout = np.eye(5)
    for integral in integrals:
        matrix = np.eye(5) + integral
        rollout = matrix / matrix.sum(1, keepdims=True) @ rollout
    return rollout[0, 1:].reshape(2, 2)


@pytest.mark.parametrize(
    ("depth", "steps", "layers", "from_zero"), [(2, 2, 1, False), (3, 2, 1, True), (2, 2, 2, False), (3, 1, 2, True)]
)
def test_nested_loops(depth, steps, layers, from_zero, proof):
    model, target = tiny(depth), [4, 2]
    x = pictures(model)
    ours = vitx.load(ID)(model, x, torch.tensor(target), steps=steps, layers=layers, from_zero=from_zero, chunk=3)
    alphas = [k / steps for k in range(0 if from_zero else 1, steps + 1)]
    b = depth - 2  # which picture the slow twin does
    theirs = twin(model, x[b], target[b], alphas, layers)
    check = f"patches, depth {depth}, IIA{1 + layers}, points {', '.join(map(str, alphas))}"
    oracle = "nested loops in numpy, gradients by finite differences"
    proof(ID, check, relative_error(ours[b], theirs), at_most=1e-7, kind="parity", oracle=oracle)


def test_the_map_is_a_share(proof):
    """Rows of the rollout sum to one: the patches get what the class token keeps not for itself."""
    model = tiny(3)
    x = pictures(model)
    total = vitx.load(ID)(model, x, steps=3).sum((1, 2))
    assert total.min() > 0
    proof(ID, "largest sum over a map, at most one", total.max(), at_most=1.0, kind="closed form")
    model = variant("no class token, average pooling")
    total = vitx.load(ID)(model, pictures(model), steps=2).sum((1, 2))
    error = (total - 1).abs().max()
    proof(ID, "no prefix token: a map sums to one", error, at_most=1e-12, kind="closed form")


def test_one_point_is_gradient_rollout(proof):
    """With a single point nothing is faded: one pass with the last attention held fixed, rolled out."""
    model, target = tiny(3), torch.tensor([1, 3])
    x = pictures(model)
    ours = vitx.load(ID)(model, x, target, steps=1)
    with torch.no_grad(), capture(model, "attention") as record:
        model(x)
    last = record["attention"].pop().requires_grad_()
    with capture(model, "attention") as record, replaced_attention(model.blocks[2], last):
        scores = target_scores(model(x), target)
    used = [*record["attention"][:2], last]
    row = torch.eye(5, dtype=torch.float64)[0].expand(2, 1, 5)
    for attention, gradient in list(zip(used, torch.autograd.grad(scores.sum(), used), strict=True))[::-1]:
        matrix = torch.eye(5) + (attention * gradient).clamp(min=0).mean(1)
        row = row @ (matrix / matrix.sum(-1, keepdim=True))
    error = relative_error(ours.flatten(1), row[:, 0, 1:].detach())
    proof(ID, "one point: gradient rollout", error, at_most=1e-12, kind="closed form")


def test_a_head_that_reads_nothing_leaves_an_empty_map():
    """Without a gradient every matrix is the identity: nothing reaches the class token."""
    model = tiny(2)
    nn.init.zeros_(model.head.weight)
    assert vitx.load(ID)(model, pictures(model), steps=2).abs().max() == 0


def test_chunks_change_nothing():
    model = tiny(2)
    x = pictures(model, 3)
    whole, parts = (vitx.load(ID)(model, x, steps=3, chunk=chunk) for chunk in (100, 4))
    assert torch.allclose(whole, parts, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("options", [{"steps": 0}, {"layers": 0}, {"layers": 3}, {"chunk": 0}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="layers between 1 and 2"):
        vitx.load(ID)(model, pictures(model), **options)

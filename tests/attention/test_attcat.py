"""AttCAT against loops with gradients by finite differences, and its limits."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_forward, weights
from vitx.vit import embed, logits_of_tokens

ID = "attcat"


def logit_of(model, tokens: np.ndarray, first: int, target: int) -> float:
    """The class logit when block ``first`` receives these tokens (N, D)."""
    w = weights(model)
    for index in range(first, len(model.blocks)):
        tokens = twin_block(model, index, tokens)["output"]
    final = layer_norm(tokens, w["norm.weight"], w["norm.bias"])[0]
    return final @ w["head.weight"][target] + w["head.bias"][target]


def twin(model, image, target: int, step: float = 1e-5) -> np.ndarray:
    scores = np.zeros(5)
    for layer, record in enumerate(twin_forward(model, image)[0]):
        for i in range(5):
            cat = 0.0
            for d in range(8):
                up, down = record["input"].copy(), record["input"].copy()
                up[i, d] += step
                down[i, d] -= step
                gradient = (logit_of(model, up, layer, target) - logit_of(model, down, layer, target)) / (2 * step)
                cat += gradient * record["input"][i, d]
            received = sum(record["attention"][m, q, i] for m in range(2) for q in range(5)) / (2 * 5)
            scores[i] += received * cat
    return scores[1:].reshape(2, 2)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_papers_sum_in_loops(depth, proof):
    model = tiny(depth, seed=2)
    x, target = pictures(model), [4, 0]
    theirs = [twin(model, image, label) for image, label in zip(x, target, strict=True)]
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    oracle = "plain loops, gradients by finite differences"
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_uniform_attention_leaves_gradient_times_feature(proof):
    """Where every key receives 1 / N, one layer's AttCAT is gradient times input of the tokens, divided by N."""
    model = tiny(1)
    model.blocks[0].attn.fused_attn = False  # the fused kernel's derivative is exact to 1e-9 only
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16] = 0
        model.blocks[0].attn.qkv.bias[:16] = 0
    x = pictures(model)
    tokens = embed(model, x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(logits_of_tokens(model, tokens)[:, 3].sum(), tokens)
    theirs = (gradient * tokens).sum(-1)[:, 1:].unflatten(1, (2, 2)) / 5
    error = relative_error(vitx.load(ID)(model, x, torch.tensor([3, 3])), theirs.detach())
    proof(ID, "uniform attention leaves input x gradient", error, at_most=1e-12, kind="closed form")


def test_the_map_is_linear_in_the_score(proof):
    """Explaining the sum of two logits gives the sum of the two maps, signs included."""
    model = tiny(3)
    x = pictures(model)
    maps = [vitx.load(ID)(model, x, torch.tensor([k, k])) for k in (1, 2)]
    with torch.no_grad():
        model.head.weight[0] = model.head.weight[1] + model.head.weight[2]
    error = relative_error(vitx.load(ID)(model, x, torch.tensor([0, 0])), maps[0] + maps[1])
    proof(ID, "the map of a sum of logits is the sum of the maps", error, at_most=1e-12, kind="closed form")
    assert min(m.min() for m in maps) < 0 < max(m.max() for m in maps)

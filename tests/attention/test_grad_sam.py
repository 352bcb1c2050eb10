"""Grad-SAM against the paper's sum in plain loops, and what the sum implies."""

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_attention_gradients, twin_forward
from vitx.vit import embed

ID = "grad-sam"


@pytest.mark.parametrize("depth", [2, 3])
def test_the_papers_sum_in_loops(depth, proof):
    model = tiny(depth, seed=5)
    x, target = pictures(model), [3, 1]
    theirs = []
    for image, label in zip(x, target, strict=True):
        gradients = twin_attention_gradients(model, image, label)
        scores = np.zeros(5)
        for record, gradient in zip(twin_forward(model, image)[0], gradients, strict=True):
            for m, i, j in np.ndindex(2, 5, 5):
                scores[j] += record["attention"][m, i, j] * max(gradient[m, i, j], 0) / (depth * 2 * 5)
        theirs.append(scores[1:].reshape(2, 2))
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    oracle = "triple sum in plain loops, gradients by finite differences"
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_the_score_is_homogeneous(proof):
    """Doubling the class logit doubles the map: the gradient is linear in the score, and so is its positive part."""
    model = tiny(3)
    x, target = pictures(model), torch.tensor([2, 4])
    before = vitx.load(ID)(model, x, target)
    with torch.no_grad():
        model.head.weight *= 2
    error = relative_error(vitx.load(ID)(model, x, target), 2 * before)
    proof(ID, "twice the logit, twice the map", error, at_most=1e-12, kind="closed form")


def test_uniform_attention_and_linear_readout(proof):
    """One layer with uniform attention: the gradient of a link i = class, j is v_j times what reads it, over heads."""
    model = tiny(1, mlp_layer=lambda *a, **k: torch.nn.Identity())
    model.norm = torch.nn.Identity()
    model.blocks[0].norm2 = torch.nn.Identity()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16] = 0
        model.blocks[0].attn.qkv.bias[:16] = 0
    x = pictures(model)
    block = model.blocks[0]
    values = block.attn.qkv(block.norm1(embed(model, x)))[..., 16:]
    reader = 2 * model.head.weight[3] @ block.attn.proj.weight  # x + x: the MLP branch is the identity here
    links = (values * reader).unflatten(-1, (2, 4)).sum(-1)  # (B, N, heads): d logit / d A_{class, j}
    theirs = (links.clamp(min=0).sum(-1) / 5 / (1 * 2 * 5))[:, 1:].unflatten(1, (2, 2))
    ours = vitx.load(ID)(model, x, torch.tensor([3, 3]))
    error = relative_error(ours, theirs.detach())
    proof(ID, "uniform attention and a linear head", error, at_most=1e-12, kind="closed form")


def test_a_class_that_nothing_raises_is_zero():
    model = tiny(2)
    with torch.no_grad():
        model.head.weight[2] = 0
    assert vitx.load(ID)(model, pictures(model), torch.tensor([2, 2])).abs().max() == 0

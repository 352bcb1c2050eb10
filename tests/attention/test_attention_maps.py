"""Raw attention, rollout and generic attention explainability against loops, closed forms and limits."""

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_attention_gradients, twin_forward

DEPTHS = (2, 3)


def patches_of(row: np.ndarray) -> np.ndarray:
    return row[1:].reshape(2, 2)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_twin_is_the_model(depth):
    model = tiny(depth)
    x = pictures(model, 1)
    assert relative_error(twin_forward(model, x[0])[1], model(x)[0].detach()) < 1e-12


@pytest.mark.parametrize("depth", DEPTHS)
def test_raw_attention_is_the_class_row(depth, proof):
    model = tiny(depth)
    x = pictures(model)
    errors = []
    for layer in range(depth):
        ours = vitx.load("raw-attention")(model, x, layer=layer)
        theirs = [patches_of(twin_forward(model, image)[0][layer]["attention"].mean(0)[0]) for image in x]
        errors.append(relative_error(ours, theirs))
    oracle = "attention in plain loops"
    proof("raw-attention", f"every layer, depth {depth}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("depth", DEPTHS)
def test_rollout_is_the_product_of_all_layers(depth, proof):
    model = tiny(depth)
    x = pictures(model)
    theirs = []
    for image in x:
        rollout = np.eye(5)
        for record in twin_forward(model, image)[0]:
            with_residual = record["attention"].mean(0) + np.eye(5)
            rollout = (with_residual / with_residual.sum(-1, keepdims=True)) @ rollout
        theirs.append(patches_of(rollout[0]))
    error = relative_error(vitx.load("attention-rollout")(model, x), theirs)
    oracle = "full matrix product in plain loops"
    proof("attention-rollout", f"map, depth {depth}", error, at_most=1e-9, kind="parity", oracle=oracle)


def test_rollout_of_uniform_attention(proof):
    model = tiny(3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0  # no queries, no keys: all scores equal
            block.attn.qkv.bias[:16] = 0
    relevance = vitx.load("attention-rollout")(model, pictures(model))
    # Each layer keeps half and spreads half evenly, so a patch receives (1 - 2^-3) / 5.
    error = (relevance - (1 - 0.5**3) / 5).abs().max() / relevance.max()
    proof("attention-rollout", "uniform attention gives a uniform map", error, at_most=1e-12, kind="closed form")


def test_rollout_is_a_distribution(proof):
    model = tiny(3, class_token=False, global_pool="avg")
    total = vitx.load("attention-rollout")(model, pictures(model)).sum((1, 2))
    proof(
        "attention-rollout",
        "average pooling: the map sums to one",
        (total - 1).abs().max(),
        at_most=1e-12,
        kind="closed form",
    )


@pytest.mark.parametrize("depth", DEPTHS)
def test_generic_attention_is_the_papers_update(depth, proof):
    model = tiny(depth)
    x, target = pictures(model), [3, 1]
    theirs = []
    for image, label in zip(x, target, strict=True):
        relevance = np.eye(5)
        gradients = twin_attention_gradients(model, image, label)
        for record, gradient in zip(twin_forward(model, image)[0], gradients, strict=True):
            weighted = np.maximum(gradient * record["attention"], 0).mean(0)
            relevance = relevance + weighted @ relevance
        theirs.append(patches_of(relevance[0]))
    ours = vitx.load("generic-attention-explainability")(model, x, torch.tensor(target))
    error = relative_error(ours, theirs)
    oracle = "update rule in plain loops, gradients by finite differences"
    proof("generic-attention-explainability", f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_generic_attention_of_a_class_that_nothing_raises_is_zero():
    """Adding a constant to a logit changes nothing; a head that ignores its input leaves no relevance."""
    model = tiny(2)
    x = pictures(model)
    explain = vitx.load("generic-attention-explainability")
    before = explain(model, x, torch.tensor([2, 2]))
    with torch.no_grad():
        model.head.bias[2] += 7
        assert torch.allclose(before, explain(model, x, torch.tensor([2, 2])), rtol=1e-12)
        model.head.weight[2] = 0
    assert explain(model, x, torch.tensor([2, 2])).abs().max() == 0


def test_attention_pooling_counts_as_cross_attention():
    """With attention pooling the map is the pooling row carried through the layers, as for a query stream."""
    model = tiny(2, class_token=False, global_pool="map")
    x = pictures(model, 1)
    with vitx.load_module("generic-attention-explainability").capture(model, "attention") as record:
        logit = model(x)[0, 1]
        weights = [*record["attention"], *record["pool_attention"]]
        gradients = torch.autograd.grad(logit, weights)
    cam = [(g * a).clamp(min=0).mean(1)[0] for g, a in zip(gradients, weights, strict=True)]
    theirs = cam[2] @ (torch.eye(4) + cam[1]) @ (torch.eye(4) + cam[0])
    ours = vitx.load("generic-attention-explainability")(model, x, torch.tensor([1]))
    assert relative_error(ours.flatten(), theirs.flatten().detach()) < 1e-12

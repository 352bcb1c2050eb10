"""LibraGrad against messages in loops, and the completeness that balanced gradients promise at every layer."""

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward, weights
from relevance_twin import tokens_relevance
from torch import nn

ID = "libragrad"


@pytest.mark.parametrize("depth", [2, 3])
def test_messages_in_loops(depth, proof):
    """Relevance at the input of every block and what the biases keep, by division; no gradient is taken."""
    model = tiny(depth)
    x, target = pictures(model), [4, 0]
    first, plus = [], []
    for image, label in zip(x, target, strict=True):
        biases = np.zeros(5)
        layers = tokens_relevance(model, image, label, share=0, identity=True, biases=biases)
        first.append(layers[0].sum(1)[1:].reshape(2, 2))
        plus.append((np.sum(layers, axis=(0, 2)) + biases)[1:].reshape(2, 2))
    for base, theirs in (("input-x-gradient", first), ("fullgrad-plus", plus)):
        error = relative_error(vitx.load(ID)(model, x, torch.tensor(target), base=base), theirs)
        proof(ID, f"{base}, depth {depth}", error, at_most=1e-9, kind="parity", oracle="messages in plain loops")


def test_the_twin_is_complete():
    """Tokens at any block, biases from there on and the head's bias make up the logit: the loops above are right."""
    model, target = tiny(3), 2
    image = pictures(model, 1)[0]
    biases = np.zeros(5)
    tokens = tokens_relevance(model, image, target, share=0, identity=True, biases=biases)[0]
    logit = twin_forward(model, image)[1][target]
    assert abs(tokens.sum() + biases.sum() + weights(model)["head.bias"][target] - logit) < 1e-9 * abs(logit)


@pytest.mark.parametrize("mlp", ["plain", "gated", "parallel"])
def test_completeness(mlp, proof):
    """One block without class token: patches and biases make up the logit but for the head's bias."""
    from timm.layers.mlp import SwiGLU
    from timm.models.vision_transformer import Block, ParallelScalingBlock

    options = {"gated": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}, "parallel": {"block_fn": ParallelScalingBlock}}
    settings = {"block_fn": Block, "class_token": False, "global_pool": "avg", "fc_norm": False, "reg_tokens": 0}
    for bias in (True, False):
        model = tiny(1, **settings | options.get(mlp, {}), qkv_bias=bias)
        x, target = pictures(model), torch.tensor([4, 1])
        expected = (model(x) - model.head.bias).gather(1, target[:, None])[:, 0].detach()
        error = relative_error(vitx.load(ID)(model, x, target).sum((1, 2)), expected)
        what = f"completeness, {mlp} block, {'with' if bias else 'without'} qkv bias"
        proof(ID, what, error, at_most=1e-9, kind="closed form")


def test_every_layer_is_complete_without_biases(proof):
    """Each of the L blocks' inputs holds the whole logit, so FullGrad+ sums to L times it."""
    model = tiny(3, class_token=False, global_pool="avg", fc_norm=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    x, target = pictures(model), torch.tensor([4, 1])
    logits = model(x).gather(1, target[:, None])[:, 0].detach()
    for base, times in (("input-x-gradient", 1), ("fullgrad-plus", 3)):
        error = relative_error(vitx.load(ID)(model, x, target, base=base).sum((1, 2)), times * logits)
        proof(ID, f"{base} sums to {times} x logit, no biases", error, at_most=1e-9, kind="closed form")


@pytest.mark.parametrize("base", ["input-x-gradient", "fullgrad-plus"])
def test_the_probability_is_a_contrast_of_logits(base, proof):
    model = tiny(2)
    x, target = pictures(model, 1), 3
    p = model(x).softmax(-1)[0].detach()
    maps = torch.stack([vitx.load(ID)(model, x, torch.tensor([k]), base=base)[0] for k in range(5)])
    expected = p[target] * (maps[target] - (p[:, None, None] * maps).sum(0))
    ours = vitx.load(ID)(model, x, torch.tensor([target]), base=base, score="probability")[0]
    proof(ID, f"probability, {base}", relative_error(ours, expected), at_most=1e-9, kind="closed form")


def test_it_is_conservative_propagation_with_an_identity(proof):
    model = tiny(3, reg_tokens=2, init_values=0.5)
    x, target = pictures(model), torch.tensor([4, 1])
    theirs = vitx.load("conservative-lrp")(model, x, target, activation="identity")
    error = relative_error(vitx.load(ID)(model, x, target, base="input-x-gradient"), theirs)
    proof(ID, "input-x-gradient equals conservative-lrp", error, at_most=1e-12, kind="closed form")


def test_gated_products_are_halved(proof):
    """Without positions and biases, pixels and tokens hold the same: gates are treated as AttnLRP treats them."""
    from timm.layers.mlp import SwiGLU

    model = tiny(2, class_token=False, global_pool="avg", mlp_layer=SwiGLU, act_layer=nn.SiLU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "pos_embed":
                parameter.zero_()
    x, target = pictures(model), torch.tensor([4, 1])
    ours = vitx.load(ID)(model, x, target, base="input-x-gradient")
    theirs = vitx.load("attnlrp")(model, x, target, through_softmax=False)
    constant = vitx.load("conservative-lrp")(model, x, target, activation="identity")
    assert relative_error(ours, constant) > 0.01
    proof(ID, "gated MLPs as in attnlrp", relative_error(ours, theirs), at_most=1e-9, kind="closed form")


@pytest.mark.parametrize("options", [{"base": "integrated-gradients"}, {"score": "loss"}])
def test_unknown_options(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="must be"):
        vitx.load(ID)(model, pictures(model), **options)

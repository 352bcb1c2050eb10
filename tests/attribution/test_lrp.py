"""The rules of layer-wise relevance propagation against zennit and messages in loops, and the sums that they keep."""

import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny
from relevance_twin import alpha_beta, epsilon, gamma, lxt_patches, pixel_relevance, tokens_relevance
from torch import nn
from vitx.vit import backward_rules
from zennit import rules as zennit
from zennit.core import BasicHook

ID = "lrp"
TWINS = {"epsilon": epsilon, "alpha-beta": alpha_beta, "gamma": gamma}
CASES = [("epsilon", 0.0), ("epsilon", 0.2), ("alpha-beta", 1.0), ("alpha-beta", 2.0), ("gamma", 0.25)]
TINY = 1e-15  # zennit's stabiliser, as good as none in float64
ZENNIT = {
    "epsilon": lambda amount: zennit.Epsilon(amount or TINY),
    "alpha-beta": lambda alpha: zennit.AlphaBeta(alpha, alpha - 1, TINY),
    "gamma": lambda amount: zennit.Gamma(amount, TINY),
}


def spoil(layer: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize(("rule", "amount"), CASES)
def test_zennit_layer_by_layer(rule, amount, proof):
    """Linear layers and a convolution with and without bias, inputs of both signs."""
    errors = []
    for bias in (True, False):
        generator = torch.Generator().manual_seed(int(bias))
        draw = lambda *shape, generator=generator: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        for layer, x in ((nn.Linear(6, 5, bias), draw(3, 4, 6)), (nn.Conv2d(3, 5, 2, 2, bias=bias), draw(2, 3, 4, 4))):
            spoil(layer, 7)
            x.requires_grad_()
            relevance = draw(*layer(x).shape)
            handles = ZENNIT[rule](amount).register(layer)
            (theirs,) = torch.autograd.grad(layer(x), x, relevance)
            handles.remove()
            output = vitx.load_module(ID).RULES[rule](layer, x, amount)
            assert torch.allclose(output, layer(x))
            (gradient,) = torch.autograd.grad(output, x, relevance / output.detach())
            errors.append(relative_error((x * gradient).detach(), theirs))
    oracle = f"zennit {type(ZENNIT[rule](amount)).__name__}"
    proof(ID, f"{rule} {amount:g}, one layer", max(errors), at_most=1e-8, kind="parity", oracle=oracle)


@pytest.mark.parametrize(("rule", "amount"), CASES)
def test_messages_in_loops(rule, amount, proof):
    errors = []
    for depth in (2, 3):
        model = tiny(depth, seed=1)
        x, target = pictures(model), [4, 0]
        theirs = []
        for image, label in zip(x, target, strict=True):
            twin = TWINS[rule](amount)
            tokens = tokens_relevance(model, image, label, share=0, identity=True, rule=twin)[0]
            theirs.append(pixel_relevance(model, image, tokens, twin).sum(0))
        ours = vitx.load(ID)(model, x, torch.tensor(target), rule=rule, amount=amount, pool=None)
        errors.append(relative_error(ours, theirs))
    what = f"{rule} {amount:g}, pixels, depths 2 and 3"
    proof(ID, what, max(errors), at_most=1e-7, kind="parity", oracle="messages in plain loops")


@pytest.mark.parametrize(("rule", "amount"), [("epsilon", 0.2), ("gamma", 0.25)])
def test_zennit_through_the_model(rule, amount, proof, monkeypatch):
    """zennit's hooks on every linear layer, carried from layer to layer by lxt's bridge to gradient form."""
    lxt_patches()
    from lxt.efficient import zennit_patches

    monkeypatch.setattr(BasicHook, "forward", zennit_patches.forward)
    monkeypatch.setattr(BasicHook, "backward", zennit_patches.backward)
    model = tiny(2, seed=4)
    x, target = pictures(model), torch.tensor([1, 3])
    ours = vitx.load(ID)(model, x, target, rule=rule, amount=amount, pool=None)
    x.requires_grad_()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [ZENNIT[rule](amount).register(module) for module in linear]  # before the hooks that scale their outputs
    with backward_rules(model, attention=0, gate=0, activation=True):
        (gradient,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    for hook in hooks:
        hook.remove()
    error = relative_error(ours, (x * gradient).sum(1).detach())
    proof(ID, f"{rule} {amount:g}, pixels", error, at_most=1e-6, kind="parity", oracle="zennit in lxt's gradient form")


def bare(depth: int = 3, **options) -> nn.Module:
    """No class token, no position, no bias: all relevance must reach the pixels."""
    model = tiny(depth, class_token=False, global_pool="avg", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "pos_embed":
                parameter.zero_()
    return model


@pytest.mark.parametrize(("rule", "amount"), [("epsilon", 0.0), ("gamma", 0.25), ("gamma", 10.0)])
def test_relevance_is_conserved_without_biases(rule, amount, proof):
    model = bare()
    x, target = pictures(model), torch.tensor([4, 1])
    logits = model(x).gather(1, target[:, None])[:, 0].detach()
    total = vitx.load(ID)(model, x, target, rule=rule, amount=amount).sum((1, 2))
    what = f"{rule} {amount:g}: the map sums to the logit, no biases"
    proof(ID, what, relative_error(total, logits), at_most=1e-9, kind="closed form")


def test_alpha_beta_conserves_where_both_signs_meet(proof):
    """One wide layer, so that every unit has terms of both signs: sum R = alpha - (alpha - 1) times what came in."""
    layer, generator = spoil(nn.Linear(64, 32, bias=False), 1), torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    relevance = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    for alpha in (1.0, 2.0, 3.0):
        output = vitx.load_module(ID).RULES["alpha-beta"](layer, x, alpha)
        (gradient,) = torch.autograd.grad(output, x, relevance / output.detach())
        error = relative_error((x * gradient).sum(1).detach(), relevance.sum(1))
        proof(ID, f"alpha {alpha:g}: a layer keeps its sum", error, at_most=1e-9, kind="closed form")


def test_epsilon_zero_is_conservative_propagation(proof):
    """Without positions and biases a patch embedding hands on all it has, and the two methods agree patch by patch."""
    model = bare()
    x, target = pictures(model), torch.tensor([4, 1])
    ours = vitx.load(ID)(model, x, target, amount=0.0)
    theirs = vitx.load("conservative-lrp")(model, x, target, activation="identity")
    proof(ID, "epsilon 0 equals conservative-lrp", relative_error(ours, theirs), at_most=1e-9, kind="closed form")


def test_epsilon_absorbs_relevance():
    """The larger epsilon, the less arrives."""
    model = bare()
    x, target = pictures(model), torch.tensor([4, 1])
    sizes = [float(vitx.load(ID)(model, x, target, amount=e).abs().sum()) for e in (0.0, 1.0, 10.0, 100.0)]
    assert sizes[3] < sizes[2] < sizes[1]
    assert sizes[3] < 1e-3 * sizes[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": "zplus"}, "rule must be one of epsilon, alpha-beta, gamma, not 'zplus'"),
        ({"amount": -1.0}, "the amount of the epsilon rule must be at least 0"),
        ({"rule": "alpha-beta", "amount": 0.5}, "the amount of the alpha-beta rule must be at least 1"),
    ],
)
def test_what_is_refused(options, reason):
    model = tiny(2)
    with pytest.raises(ValueError, match=reason):
        vitx.load(ID)(model, pictures(model), **options)

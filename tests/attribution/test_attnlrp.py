"""AttnLRP against its authors' primitives, messages in loops, zennit's gamma rule, and where relevance goes."""

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny
from lxt.explicit import functional as lxt
from lxt.explicit.rules import identity
from relevance_twin import gamma, lxt_patches, pixel_relevance, tokens_relevance
from torch import Tensor, nn
from vitx.vit import backward_rules, capture, gamma_rule
from zennit.rules import Gamma

ID = "attnlrp"
TINY = 1e-15  # lxt's stabiliser, as good as none in float64


def by_lxt(model, image: Tensor, target: int) -> Tensor:
    """Relevance (H, W) of the pixels of one picture, the model being rebuilt from lxt's primitives."""

    def linear(x, layer):
        return lxt.linear_epsilon(x, layer.weight, layer.bias, TINY)

    def norm(x, layer):
        return lxt.layer_norm_grad_fn.apply(x, layer.weight, layer.bias, layer.eps, TINY)

    size, dim = model.patch_embed.patch_size[0], model.embed_dim
    pixels = image.clone().requires_grad_()
    patches = pixels.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    conv = model.patch_embed.proj
    embedded = lxt.linear_epsilon(patches, conv.weight.flatten(1), conv.bias, TINY)  # (P, D)
    x = torch.cat(
        [
            (model.cls_token[0] + model.pos_embed[0, :1]).detach(),
            lxt.add2(embedded, model.pos_embed[0, 1:], False, TINY),
        ]
    )
    for block in model.blocks:
        qkv = linear(norm(x, block.norm1), block.attn.qkv).unflatten(1, (3, 2, dim // 2)).permute(1, 2, 0, 3)
        q, k, v = qkv  # (heads, N, d)
        scores = lxt.mul2(lxt.matmul(q, k.transpose(1, 2), False, TINY), torch.tensor(block.attn.scale))
        mixed = lxt.matmul(lxt.softmax(scores, -1), v, False, TINY).transpose(0, 1).flatten(1)
        x = lxt.add2(x, linear(mixed, block.attn.proj), False, TINY)
        hidden = identity(block.mlp.act, linear(norm(x, block.norm2), block.mlp.fc1))
        x = lxt.add2(x, linear(hidden, block.mlp.fc2), False, TINY)
    logits = linear(norm(x[:1], model.norm), model.head)[0]
    assert torch.allclose(logits, model(image[None])[0])
    logits[target].backward(logits[target].detach())
    assert pixels.grad is not None
    return pixels.grad.sum(0)


@pytest.mark.parametrize("depth", [2, 3])
def test_lxt_primitives(depth, proof):
    model = tiny(depth).requires_grad_(False)
    x, target = pictures(model), [4, 2]
    theirs = torch.stack([by_lxt(model, image, label) for image, label in zip(x, target, strict=True)])
    ours = vitx.load(ID)(model, x, torch.tensor(target), pool=None)
    oracle = "lxt.explicit primitives, by the authors"
    proof(ID, f"pixels, depth {depth}", relative_error(ours, theirs), at_most=1e-8, kind="parity", oracle=oracle)


@pytest.mark.parametrize("options", [{}, {"through_softmax": False}, {"gamma": 0.25}])
@pytest.mark.parametrize("depth", [2, 3])
def test_messages_in_loops(depth, options, proof):
    model = tiny(depth, seed=1)
    x, target = pictures(model), [4, 0]
    share = 0.5 if options.get("through_softmax", True) else 0
    rule = gamma(options["gamma"]) if options.get("gamma") else None
    theirs = []
    for image, label in zip(x, target, strict=True):
        tokens = tokens_relevance(model, image, label, share=share, identity=True, rule=rule)[0]
        theirs.append(pixel_relevance(model, image, tokens, rule).sum(0))
    ours = vitx.load(ID)(model, x, torch.tensor(target), pool=None, **options)
    what = "".join(f", {name} {value}" for name, value in options.items())
    proof(
        ID,
        f"pixels, depth {depth}{what}",
        relative_error(ours, theirs),
        at_most=1e-8,
        kind="parity",
        oracle="plain loops",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gamma_rule_is_zennits(bias, proof):
    """Relevance through a linear layer and a convolution, inputs of both signs."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    layers = {nn.Linear(6, 5, bias=bias): draw(3, 4, 6), nn.Conv2d(3, 5, 2, stride=2, bias=bias): draw(2, 3, 4, 4)}
    errors = []
    for layer, x in layers.items():
        layer.double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(draw(*parameter.shape))
        relevance = draw(*layer(x).shape)
        handles = Gamma(0.3, stabilizer=1e-15).register(layer)
        x = x.requires_grad_()
        (theirs,) = torch.autograd.grad(layer(x), x, relevance)
        handles.remove()
        output = gamma_rule(layer, x, 0.3)
        assert torch.allclose(output, layer(x))
        (gradient,) = torch.autograd.grad(output, x, relevance / output.detach())
        errors.append(relative_error((x * gradient).detach(), theirs))
    what = "gamma rule, " + ("with" if bias else "without") + " bias"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="zennit Gamma")


def test_what_the_softmax_keeps(proof):
    """Without biases and positions, logit = map + what the expansion of every softmax does not hand on."""
    model = tiny(3, class_token=False, global_pool="avg")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "pos_embed":
                parameter.zero_()
    x, target = pictures(model, 1), torch.tensor([3])
    with backward_rules(model, attention=0.5, gate=0.5, activation=True), capture(model, "attention") as record:
        logit = model(x)[0, 3]
        gradients = torch.autograd.grad(logit, record["attention"])
    kept = 0.0
    for weights, gradient in zip(record["attention"], gradients, strict=True):
        of_weights = (weights * gradient / 2).detach()  # half of the relevance of the attention output
        # The rule does not change when a constant is added to the scores, so log s serves as well as x.
        of_scores = weights.detach().log() * (of_weights - weights.detach() * of_weights.sum(-1, keepdim=True))
        kept += float(of_weights.sum() - of_scores.sum())
    logit = float(logit.detach())
    assert abs(kept / logit) > 1e-3
    total = float(vitx.load(ID)(model, x, target).sum())
    proof(
        ID,
        "the map and the softmax's share sum to the logit",
        abs(total + kept - logit) / abs(logit),
        at_most=1e-9,
        kind="closed form",
    )
    total = float(vitx.load(ID)(model, x, target, through_softmax=False).sum())
    error = abs(total - logit) / abs(logit)
    proof(ID, "values only: the map sums to the logit", error, at_most=1e-9, kind="closed form")


def test_large_gamma_keeps_only_the_winning_sign():
    """As gamma grows, a layer's relevance goes to the terms of the output's sign alone."""
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
    x = torch.tensor([1.0, 1.0, -0.5, 4.0], dtype=torch.float64, requires_grad=True)  # terms 1, -2, -1.5, 2: sum -0.5
    (gradient,) = torch.autograd.grad(gamma_rule(layer, x, 1e9).sum(), x)
    assert np.allclose((x * gradient).detach(), [0, -0.5 * 2 / 3.5, -0.5 * 1.5 / 3.5, 0], atol=1e-8)


def test_gated_mlp_is_lxts(proof):
    """lxt's rules for language models: identity for the activation, half of the product for each factor."""
    from timm.layers.mlp import SwiGLU

    model = tiny(1, mlp_layer=SwiGLU, act_layer=nn.SiLU)
    block, rules = model.blocks[0], lxt_patches()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    with backward_rules(model, attention=0.5, gate=0.5, activation=True):
        (ours,) = torch.autograd.grad(block.mlp(x).sum(), x)
    product = rules.identity_rule_implicit(nn.functional.silu, block.mlp.fc1_g(x)) * block.mlp.fc1_x(x)
    (theirs,) = torch.autograd.grad(block.mlp.fc2(rules.divide_gradient(product, 2)).sum(), x)
    proof(ID, "gated MLP", relative_error(ours, theirs), at_most=1e-8, kind="parity", oracle="lxt.efficient rules")


def test_negative_gamma():
    model = tiny(2)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        vitx.load(ID)(model, pictures(model), gamma=-1)

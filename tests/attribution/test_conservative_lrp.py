"""Conservative propagation against messages in loops, frozen functions, lxt's rules, and its conservation."""

import math
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward, twin_tokens, weights
from relevance_twin import lxt_patches, tokens_relevance
from scipy.special import erf
from timm.layers.norm import RmsNorm
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer
from vitx.vit import UnsupportedModel, backward_rules, capture, embed, logits_of_tokens

ID = "conservative-lrp"


def without_biases(model: Any) -> Any:
    """Nothing but weights: no bias, and a class token and position of zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "cls_token":
                parameter.zero_()
            elif name == "pos_embed":
                parameter[:, 0] = 0
    return model


@pytest.mark.parametrize("activation", ["gradient", "identity"])
@pytest.mark.parametrize("depth", [2, 3])
def test_messages_in_loops(depth, activation, proof):
    model = tiny(depth)
    x, target = pictures(model), [4, 0]
    theirs = [
        tokens_relevance(model, image, label, share=0, identity=activation == "identity")[0].sum(1)[1:].reshape(2, 2)
        for image, label in zip(x, target, strict=True)
    ]
    ours = vitx.load(ID)(model, x, torch.tensor(target), activation=activation)
    error = relative_error(ours, theirs)
    proof(ID, f"map, depth {depth}, activation {activation}", error, at_most=1e-9, kind="parity", oracle="plain loops")


def frozen_logits(model, x: np.ndarray, records: list[dict]) -> np.ndarray:
    """The forward pass with the attention weights and the deviations of ``records``, whatever the tokens."""
    w = weights(model)

    def norm(x, reference, name):
        deviation = np.sqrt(reference.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    for index, r in enumerate(records):
        at = f"blocks.{index}"
        linear = lambda x, name, at=at: x @ w[f"{at}.{name}.weight"].T + w[f"{at}.{name}.bias"]  # noqa: E731
        values = linear(norm(x, r["input"], f"{at}.norm1"), "attn.qkv")[:, 16:].reshape(-1, 2, 4)
        x = x + linear(np.einsum("hij,jhd->ihd", r["attention"], values).reshape(x.shape), "attn.proj")
        hidden = linear(norm(x, r["middle"], f"{at}.norm2"), "mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, "mlp.fc2")
    return norm(x[0], records[-1]["output"][0], "norm") @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("depth", [2, 3])
def test_it_explains_the_model_with_frozen_attention_and_deviations(depth, proof):
    """That model has the same logit, and the map is its gradient (by finite differences) times the tokens."""
    model = tiny(depth, seed=5)
    x, target = pictures(model, 1), 2
    records, logits = twin_forward(model, x[0])
    tokens = twin_tokens(model, x[0])
    assert relative_error(frozen_logits(model, tokens, records), logits) < 1e-12
    gradient = np.zeros_like(tokens)
    for place in np.ndindex(tokens.shape):
        step = np.zeros_like(tokens)
        step[place] = 1e-5
        up, down = (frozen_logits(model, tokens + s * step, records)[target] for s in (1, -1))
        gradient[place] = (up - down) / 2e-5
    theirs = (tokens * gradient).sum(1)[1:].reshape(1, 2, 2)
    error = relative_error(vitx.load(ID)(model, x, torch.tensor([target])), theirs)
    proof(ID, f"frozen function, depth {depth}", error, at_most=1e-7, kind="closed form", oracle="finite differences")


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.5}])
def test_relevance_is_conserved_without_biases(options, proof):
    model = without_biases(tiny(3, **options))
    x, target = pictures(model), torch.tensor([1, 3])
    logits = model(x).gather(1, target[:, None])[:, 0].detach()
    error = relative_error(vitx.load(ID)(model, x, target, activation="identity").sum((1, 2)), logits)
    what = next(iter(options), "class token")
    proof(ID, f"the map sums to the logit, no biases, {what}", error, at_most=1e-9, kind="closed form")


def test_the_gradient_of_gelu_leaks_what_it_must(proof):
    """Without biases, all that is missing from the logit is sum (x f'(x) - f(x)) g over the activations."""
    model = without_biases(tiny(3))
    x, target = pictures(model, 1), torch.tensor([3])
    with (
        backward_rules(model, attention=0, gate=0, activation=False),
        capture(model, "mlp.act.input", "mlp.act") as record,
    ):
        logit = logits_of_tokens(model, embed(model, x))[0, 3]
        hidden, activated = record["mlp.act.input"], record["mlp.act"]
        gradients = torch.autograd.grad(logit, [*hidden, *activated])
    leak = sum(
        (h * of_hidden - a * of_activated).sum()
        for h, a, of_hidden, of_activated in zip(hidden, activated, gradients[:3], gradients[3:], strict=True)
    )
    total = vitx.load(ID)(model, x, target).sum()
    assert abs(leak / logit) > 1e-3
    proof(ID, "GELU's leak", (logit + leak - total).abs() / logit.abs(), at_most=1e-9, kind="closed form")


def torchvision_twin(model: Any) -> nn.Module:
    """torchvision's Vision Transformer with the weights of a tiny timm model, under lxt's CP-LRP rules."""
    twin = TorchvisionTransformer(16, 8, len(model.blocks), 2, 8, 16, num_classes=5).double().eval()
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "norm.": "encoder.ln."}
    names |= {"patch_embed.proj.": "conv_proj.", "head.": "heads.head."}
    inner = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "self_attention.in_proj_",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    inner |= {"attn.proj.": "self_attention.out_proj."}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, index, path = name.split(".", 2)
            old = next(old for old in inner if path.startswith(old))
            state[f"encoder.layers.encoder_layer_{index}.{path.replace(old, inner[old])}"] = tensor
        else:
            old = next(old for old in names if name.startswith(old))
            state[name.replace(old, names[old])] = tensor
    twin.load_state_dict(state)
    lxt = lxt_patches()
    rules = {
        nn.LayerNorm: lxt.layer_norm_forward,
        nn.GELU: lxt.non_linear_forward,
        nn.MultiheadAttention: lxt.cp_multi_head_attention_forward,
    }
    for module in twin.modules():
        for kind, rule in rules.items():
            if isinstance(module, kind):
                vars(module)["original_forward"] = module.forward
                vars(module)["forward"] = MethodType(rule, module)
    return twin


@pytest.mark.parametrize("depth", [2, 3])
def test_lxt(depth, proof):
    """The rules that the authors of AttnLRP ship for this method (CP-LRP), on torchvision's own model."""
    model = tiny(depth)
    x, target = pictures(model), torch.tensor([4, 2])
    twin = torchvision_twin(model)
    tokens = []
    handle = twin.get_submodule("encoder.dropout").register_forward_hook(lambda m, i, output: tokens.append(output))
    logits = twin(x)
    handle.remove()
    assert torch.allclose(logits, model(x), rtol=1e-9)
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), tokens)
    theirs = (tokens[0] * gradient).sum(-1)[:, 1:].unflatten(1, (2, 2)).detach()
    error = relative_error(vitx.load(ID)(model, x, target, activation="identity"), theirs)
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle="lxt CP-LRP on torchvision's ViT")


def test_a_gate_is_a_constant():
    """A gated MLP conserves relevance too, and its gate changes no gradient."""
    from timm.layers.mlp import GluMlp

    model = without_biases(tiny(2, mlp_layer=GluMlp, act_layer=nn.SiLU))
    x, target = pictures(model), torch.tensor([1, 3])
    logits = model(x).gather(1, target[:, None])[:, 0].detach()
    for activation in ("gradient", "identity"):
        total = vitx.load(ID)(model, x, target, activation=activation).sum((1, 2))
        assert relative_error(total, logits) < 1e-9


def test_unknown_activation_rule():
    model = tiny(2)
    with pytest.raises(ValueError, match='"gradient" or "identity", not \'relu\''):
        vitx.load(ID)(model, pictures(model), activation="relu")


def test_forwards_are_given_back():
    """Also one that a user has set on a single module, and also when the run fails."""
    model = tiny(2)
    own = model.norm.forward
    model.norm.forward = own
    expected = model(pictures(model)).detach()

    def fail() -> None:
        with backward_rules(model, attention=0, gate=0, activation=True):
            assert model.norm.forward is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.norm.forward is own
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["norm"]
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(pictures(model)), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_layer": RmsNorm}, "has a rule for LayerNorm, and blocks.0.norm1 is a RmsNorm"),
        ({"attn_layer": "diff"}, "DiffAttention|RmsNorm"),
        ({"act_layer": nn.Sigmoid}, r"needs f\(0\) = 0, and blocks.0.mlp.act \(Sigmoid\) has not"),
    ],
)
def test_models_without_a_rule(options, reason):
    model = tiny(2, **options)
    with pytest.raises(UnsupportedModel, match=reason):
        vitx.load(ID)(model, pictures(model), activation="identity")
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())

"""CDAM against loops with gradients by finite differences, and the limits of its variants."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_forward, weights
from scipy.special import erf

ID = "cdam"


def logit(model, x: np.ndarray, normed: np.ndarray, target: int) -> float:
    """The class logit when the last attention reads ``normed`` (N, D) and its residual path still carries ``x``."""
    w = weights(model)
    last = {n.removeprefix(f"blocks.{len(model.blocks) - 1}."): t for n, t in w.items()}
    qkv, mixed = normed @ last["attn.qkv.weight"].T + last["attn.qkv.bias"], np.zeros_like(x)
    for m in range(2):
        q, k, v = (qkv[:, p * 8 + m * 4 : p * 8 + m * 4 + 4] for p in range(3))
        for i in range(5):
            scores = np.array([np.exp(q[i] @ k[j] / 2) for j in range(5)])
            mixed[i, m * 4 : m * 4 + 4] = scores / scores.sum() @ v
    x = x + mixed @ last["attn.proj.weight"].T + last["attn.proj.bias"]
    hidden = layer_norm(x, last["norm2.weight"], last["norm2.bias"]) @ last["mlp.fc1.weight"].T + last["mlp.fc1.bias"]
    x = x + hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ last["mlp.fc2.weight"].T + last["mlp.fc2.bias"]
    final = layer_norm(x[0], w["norm.weight"], w["norm.bias"])
    return final @ w["head.weight"][target] + w["head.bias"][target]


def scores(model, x: np.ndarray, normed: np.ndarray, target: int, step: float = 1e-5) -> np.ndarray:
    """S_i of the equation for all tokens (N,)."""
    total = np.zeros(5)
    for i, j in np.ndindex(5, 8):
        up, down = normed.copy(), normed.copy()
        up[i, j] += step
        down[i, j] -= step
        total[i] += normed[i, j] * (logit(model, x, up, target) - logit(model, x, down, target)) / (2 * step)
    return total


@pytest.mark.parametrize("depth", [2, 3])
def test_the_papers_equation_in_loops(depth, proof):
    model = tiny(depth, seed=7)
    x, target = pictures(model), [3, 0]
    theirs = []
    for image, label in zip(x, target, strict=True):
        record = twin_forward(model, image)[0][-1]
        theirs.append(scores(model, record["input"], record["normed"], label)[1:].reshape(2, 2))
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    oracle = "plain loops, gradients by finite differences"
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


@pytest.mark.parametrize("variant", ["smooth", "integrated"])
def test_the_variants_average_the_equation(variant, proof):
    """The same draws, cut from the generator in order, one altered copy of the tokens after another."""
    model, samples = tiny(2, seed=7), 3
    x, target = pictures(model), [3, 0]
    scales = [1.0] * samples if variant == "smooth" else [k / samples for k in range(samples + 1)]
    draws = torch.randn(len(scales), 5, 8, generator=torch.Generator().manual_seed(4)).double().numpy()
    theirs = []
    for image, label in zip(x, target, strict=True):
        record, total = twin_forward(model, image)[0][-1], np.zeros(5)
        spread = record["normed"].max() - record["normed"].min()
        for scale, draw in zip(scales, draws, strict=True):
            altered = scale * record["normed"] + 0.1 * spread * draw
            total += scores(model, record["input"], altered, label) / len(scales)
        theirs.append(total[1:].reshape(2, 2))
    generator = torch.Generator().manual_seed(4)
    settings = {"variant": variant, "samples": samples, "noise": 0.1, "chunk": 3, "generator": generator}
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target), **settings), theirs)
    oracle = "plain loops, gradients by finite differences"
    proof(ID, f"{variant}, three samples", error, at_most=1e-6, kind="parity", oracle=oracle)


def linear_model():
    """Uniform attention and nothing curved behind it: the logit is linear in the normalised tokens."""
    model = tiny(1, mlp_layer=lambda *a, **k: torch.nn.Identity())
    model.norm = model.blocks[0].norm2 = torch.nn.Identity()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16] = 0
        model.blocks[0].attn.qkv.bias[:] = 0
    model.blocks[0].attn.fused_attn = False  # the fused kernel's derivative is exact to 1e-9 only
    return model


def test_scores_add_up_in_a_linear_model(proof):
    """Gradient times input of a linear function is complete: all tokens together explain what attention adds."""
    model = linear_model()
    x, target = pictures(model), torch.tensor([2, 2])
    maps = vitx.load(ID)(model, x, target)
    handle = model.blocks[0].norm1.register_forward_hook(lambda module, args, output: with_patches_at_zero(output))
    without = model(x)[:, 2]
    handle.remove()
    error = relative_error(maps.sum((1, 2)), (model(x)[:, 2] - without).detach())
    proof(ID, "linear head: patches add up to their part", error, at_most=1e-12, kind="closed form")
    settings = {"variant": "integrated", "noise": 0.0, "samples": 4}
    assert relative_error(vitx.load(ID)(model, x, target, **settings), maps / 2) < 1e-12  # the mean of k / m is 1/2


def with_patches_at_zero(tokens):
    return torch.cat([tokens[:, :1], torch.zeros_like(tokens[:, 1:])], 1)


def test_without_noise_smooth_is_vanilla(proof):
    model = tiny(3)
    x = pictures(model)
    smooth = vitx.load(ID)(model, x, variant="smooth", noise=0.0, samples=3, chunk=2)
    error = relative_error(smooth, vitx.load(ID)(model, x))
    proof(ID, "smooth without noise is vanilla", error, at_most=1e-12, kind="closed form")


def test_what_is_refused():
    model = tiny(2)
    x = pictures(model)
    with pytest.raises(ValueError, match="not 'rough'"):
        vitx.load(ID)(model, x, variant="rough")
    with pytest.raises(ValueError, match="samples and chunk must be at least 1"):
        vitx.load(ID)(model, x, variant="smooth", samples=0)

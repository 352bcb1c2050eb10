"""Relevance through the transformer in plain numpy, as messages R_j = sum_i z_ij / z_i R_i and never as gradients."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from helpers import layer_norm, twin_forward, twin_tokens, weights
from scipy.special import erf
from torch import Tensor


def lxt_patches() -> ModuleType:
    """lxt.efficient.patches, by the authors of AttnLRP, without its language models, which ask for transformers."""
    if "lxt.efficient" not in sys.modules:
        spec = importlib.util.find_spec("lxt")
        assert spec is not None
        assert spec.origin is not None
        package = ModuleType("lxt.efficient")
        package.__path__ = [str(Path(spec.origin).parent / "efficient")]
        sys.modules["lxt.efficient"] = package
    return importlib.import_module("lxt.efficient.patches")


LinearRule = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def sign(z: float) -> float:
    return 1.0 if z >= 0 else -1.0


def epsilon(amount: float) -> LinearRule:
    """R_j = sum_i x_j w_ij / (z_i + amount sign z_i) R_i, with z_i the output and its bias."""

    def rule(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x)
        for i in range(len(weight)):
            z = float(weight[i] @ x + bias[i])
            for j in range(len(x)):
                result[j] += x[j] * weight[i, j] / (z + amount * sign(z)) * relevance[i]
        return result

    return rule


def gamma(amount: float) -> LinearRule:
    """Contributions of the sign of z_i count (1 + amount) times, the others once; the bias likewise."""

    def rule(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x)
        for i in range(len(weight)):
            z = float(weight[i] @ x + bias[i])
            terms = [*(x * weight[i]), bias[i]]
            terms = [t * (1 + amount) if t * z > 0 else t for t in terms]
            for j in range(len(x)):
                result[j] += terms[j] / sum(terms) * relevance[i]
        return result

    return rule


def alpha_beta(alpha: float) -> LinearRule:
    """R_j = sum_i (alpha z_ij+ / z_i+ - (alpha - 1) z_ij- / z_i-) R_i, biases among the contributions."""

    def rule(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        result = np.zeros_like(x)
        for i in range(len(weight)):
            terms = np.array([*(x * weight[i]), bias[i]])
            positive, negative = np.maximum(terms, 0), np.minimum(terms, 0)
            for j in range(len(x)):
                if positive.sum():
                    result[j] += alpha * positive[j] / positive.sum() * relevance[i]
                if negative.sum():
                    result[j] -= (alpha - 1) * negative[j] / negative.sum() * relevance[i]
        return result

    return rule


def norm(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """LayerNorm with its deviation constant: a linear map with matrix (delta_ij - 1/D) w_i / deviation."""
    deviation = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)
    matrix = (np.eye(len(x)) - 1 / len(x)) * (weight / deviation)[:, None]
    return epsilon(0)(relevance, x, matrix, bias)


def activation(relevance: np.ndarray, hidden: np.ndarray, identity: bool) -> np.ndarray:
    """GELU: all relevance to the input, or gradient times input: x f'(x) / f(x) of it."""
    if identity:
        return relevance
    cdf = (1 + erf(hidden / math.sqrt(2))) / 2
    slope = cdf + hidden * np.exp(-(hidden**2) / 2) / math.sqrt(2 * math.pi)
    return relevance * slope / cdf


def attention(relevance: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, share: float) -> tuple:
    """Relevance (N, d) of one head's output to its queries, keys and values."""
    mixed, scores = a @ v, q @ k.T / math.sqrt(q.shape[1])
    of_q, of_k, of_v, of_a = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(a)
    for i in range(len(q)):
        for j in range(len(k)):
            for d in range(q.shape[1]):
                message = a[i, j] * v[j, d] / mixed[i, d] * relevance[i, d]
                of_v[j, d] += (1 - share) * message
                of_a[i, j] += share * message
    for i in range(len(q)):
        for j in range(len(k)):
            of_score = scores[i, j] * (of_a[i, j] - a[i, j] * of_a[i].sum())  # Taylor expansion of the softmax
            for d in range(q.shape[1]):
                message = q[i, d] * k[j, d] / math.sqrt(q.shape[1]) / scores[i, j] * of_score
                of_q[i, d] += message / 2
                of_k[j, d] += message / 2
    return of_q, of_k, of_v


def tokens_relevance(
    model: Any,
    image: Tensor,
    target: int,
    *,
    share: float,
    identity: bool,
    rule: LinearRule | None = None,
    biases: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Relevance (N, D) at the input of every block, for one picture of a class-token model.

    ``biases`` (N,) is added the relevance that biases keep, b_i / z_i R_i, at each token below the head.
    """
    w, rule = weights(model), rule or epsilon(0)
    heads = model.blocks[0].attn.num_heads
    records, logits = twin_forward(model, image)
    last = records[-1]["output"]
    final = layer_norm(last, w["norm.weight"], w["norm.bias"])
    relevance = np.zeros_like(last)
    start = np.eye(len(logits))[target] * logits
    relevance[0] = norm(
        rule(start, final[0], w["head.weight"], w["head.bias"]), last[0], w["norm.weight"], w["norm.bias"]
    )
    if biases is not None:
        after = rule(start, final[0], w["head.weight"], w["head.bias"])
        biases[0] += (w["norm.bias"] / final[0] * after).sum()
    result = []
    for index in reversed(range(len(records))):
        r = records[index]
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}

        def each(rule, relevance, x, name, of=of):
            pairs = zip(relevance, x, strict=True)
            if biases is not None:
                weight, bias = of[f"{name}.weight"], of[f"{name}.bias"]
                output = layer_norm(x, weight, bias) if "norm" in name else x @ weight.T + bias
                biases[:] += (bias / output * relevance).sum(1)
            return np.stack([rule(a, b, of[f"{name}.weight"], of[f"{name}.bias"]) for a, b in pairs])

        branch, stream = (relevance * part / r["output"] for part in (r["output"] - r["middle"], r["middle"]))
        hidden = r["mlp_input"] @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        branch = activation(each(rule, branch, r["activated"], "mlp.fc2"), hidden, identity)
        relevance = stream + each(norm, each(rule, branch, r["mlp_input"], "mlp.fc1"), r["middle"], "norm2")
        branch, stream = (relevance * part / r["middle"] for part in (r["middle"] - r["input"], r["input"]))
        branch = each(rule, branch, r["mixed"], "attn.proj")
        width = branch.shape[1] // heads
        of_qkv = np.zeros_like(r["qkv"])
        for m in range(heads):
            place = [p * heads * width + m * width + np.arange(width) for p in range(3)]
            q, k, v = (r["qkv"][:, p] for p in place)
            parts = attention(branch[:, place[0]], q, k, v, r["attention"][m], share)
            for p, part in zip(place, parts, strict=True):
                of_qkv[:, p] = part
        relevance = stream + each(norm, each(rule, of_qkv, r["normed"], "attn.qkv"), r["input"], "norm1")
        result.insert(0, relevance)
    return result


def pixel_relevance(model: Any, image: Tensor, relevance: np.ndarray, rule: LinearRule | None = None) -> np.ndarray:
    """Relevance (3, H, W) of the pixels from that of the tokens (N, D); position and bias keep their share."""
    w, size, rule = weights(model), model.patch_embed.patch_size[0], rule or epsilon(0)
    tokens, result = twin_tokens(model, image), np.zeros(image.shape)
    columns = model.patch_embed.grid_size[1]
    matrix, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    for p in range(len(tokens) - 1):
        i, j = divmod(p, columns)
        inside = (slice(None), slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
        patch = image[inside].numpy().ravel()
        embedded = matrix.reshape(len(matrix), -1) @ patch + bias
        share = relevance[p + 1] * embedded / tokens[p + 1]
        result[inside] = rule(share, patch, matrix.reshape(len(matrix), -1), bias).reshape(3, size, size)
    return result

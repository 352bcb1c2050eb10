"""Transformer attribution against the paper's rules in plain loops, and the conservation that they promise."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_attention_gradients, twin_forward, weights
from vitx.vit import linear_relevance, product_relevance, sum_relevance

ID = "transformer-attribution"


def linear(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """R_j = sum_i (x_j w_ij)+ / sum_j' (x_j' w_ij')+ R_i for one token (in,) with weight (out, in)."""
    result = np.zeros_like(x)
    for i in range(len(weight)):
        terms = [max(x[j] * weight[i, j], 0) for j in range(len(x))]
        for j in range(len(x)):
            result[j] += terms[j] / sum(terms) * relevance[i] if sum(terms) else 0
    return result


def residual(relevance: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    of_u, of_v = relevance * u / (u + v), relevance * v / (u + v)
    size_u, size_v = abs(of_u.sum()), abs(of_v.sum())
    of_u = of_u * size_u / (size_u + size_v) * relevance.sum() / of_u.sum()
    of_v = of_v * size_v / (size_u + size_v) * relevance.sum() / of_v.sum()
    return of_u, of_v


def product(relevance: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, d) relevance of u @ v to u (i, j) and v (j, d), each given one half."""
    total, of_u, of_v = u @ v, np.zeros_like(u), np.zeros_like(v)
    for i in range(u.shape[0]):
        for d in range(v.shape[1]):
            for j in range(u.shape[1]):
                share = u[i, j] * v[j, d] / total[i, d] * relevance[i, d] / 2
                of_u[i, j] += share
                of_v[j, d] += share
    return of_u, of_v


def twin(model, image, target: int) -> np.ndarray:
    w = weights(model)
    records, _ = twin_forward(model, image)
    gradients = twin_attention_gradients(model, image, target)
    relevance = np.zeros_like(records[-1]["output"])
    final = layer_norm(records[-1]["output"], w["norm.weight"], w["norm.bias"])
    relevance[0] = linear(np.eye(5)[target], final[0], w["head.weight"])
    of_attention = []
    for index in reversed(range(len(records))):
        r = records[index]
        of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}

        def each(relevance, x, weight):
            return np.stack([linear(a, b, weight) for a, b in zip(relevance, x, strict=True)])

        stream, branch = residual(relevance, r["middle"], r["output"] - r["middle"])
        branch = each(each(branch, r["activated"], of["mlp.fc2.weight"]), r["mlp_input"], of["mlp.fc1.weight"])
        stream, branch = residual(stream + branch, r["input"], r["middle"] - r["input"])
        branch = each(branch, r["mixed"], of["attn.proj.weight"])
        q, k, v = (r["qkv"][:, p * 8 : (p + 1) * 8] for p in range(3))
        heads, of_qkv = [], np.zeros_like(r["qkv"])
        for m in range(2):
            c = slice(m * 4, m * 4 + 4)
            of_a, of_v = product(branch[:, c], r["attention"][m], v[:, c])
            of_q, of_k = product(of_a, q[:, c], k[:, c].T)
            heads.append(of_a)
            for p, part in enumerate((of_q, of_k.T, of_v)):
                of_qkv[:, p * 8 + m * 4 : p * 8 + m * 4 + 4] = part
        of_attention.insert(0, np.stack(heads))
        relevance = stream + each(of_qkv, r["normed"], of["attn.qkv.weight"])
    result = np.eye(5)
    for gradient, of_a in zip(gradients, of_attention, strict=True):
        result = (np.eye(5) + np.maximum(gradient * of_a, 0).mean(0)) @ result
    return result[0, 1:].reshape(2, 2)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_papers_rules_in_loops(depth, proof):
    model = tiny(depth, seed=3)
    x, target = pictures(model), [4, 0]
    theirs = [twin(model, image, label) for image, label in zip(x, target, strict=True)]
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    oracle = "relevance rules in plain loops, gradients by finite differences"
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_rules_keep_the_sum_of_relevance(proof):
    """Each rule hands on all that it received, so relevance neither leaks nor grows from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    relevance, x = draw(2, 5, 6).abs(), draw(2, 5, 8)
    errors = [linear_relevance(relevance, x, draw(6, 8)).sum() / relevance.sum() - 1]
    u, v = draw(2, 5, 6), draw(2, 5, 6)
    errors.append(sum(part.sum() for part in sum_relevance(relevance, u, v)) / relevance.sum() - 1)
    a, b = draw(2, 5, 4), draw(2, 4, 6)
    errors.append(sum(part.sum() for part in product_relevance(relevance, a, b, a @ b)) / relevance.sum() - 1)
    proof(ID, "every rule conserves relevance", max(abs(float(e)) for e in errors), at_most=1e-6, kind="closed form")


def test_gated_mlps_are_refused():
    from timm.layers import GluMlp  # pyright: ignore[reportPrivateImportUsage]

    model = tiny(2, mlp_layer=GluMlp)
    with pytest.raises(ValueError, match="two-layer MLPs"):
        vitx.load(ID)(model, pictures(model))

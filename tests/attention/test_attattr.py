"""Self-attention attribution against loops with gradients by finite differences, and its completeness."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_forward, weights
from scipy.special import erf
from vitx.vit import replaced_attention

ID = "attattr"


def outcome(model, layer: int, record: dict, attention: np.ndarray, target: int, probability: bool) -> float:
    """F: the score of the class when block ``layer`` mixes its values with ``attention`` (h, N, N)."""
    w = weights(model)
    block = {n.removeprefix(f"blocks.{layer}."): t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
    mixed = np.zeros((5, 8))
    for m, i, j in np.ndindex(2, 5, 5):
        mixed[i, m * 4 : m * 4 + 4] += attention[m, i, j] * record["qkv"][j, 16 + m * 4 : 16 + m * 4 + 4]
    x = record["input"] + mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"]
    hidden = layer_norm(x, block["norm2.weight"], block["norm2.bias"]) @ block["mlp.fc1.weight"].T
    hidden = hidden + block["mlp.fc1.bias"]
    x = x + hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
    for above in range(layer + 1, len(model.blocks)):
        x = twin_block(model, above, x)["output"]
    logits = layer_norm(x[0], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"]
    return float(np.exp(logits[target]) / np.exp(logits).sum() if probability else logits[target])


def twin(model, image, target: int, points: list[float], probability: bool, step: float = 1e-5) -> list[np.ndarray]:
    layers = []
    for layer, record in enumerate(twin_forward(model, image)[0]):
        result = np.zeros((2, 5, 5))
        for alpha in points:
            for place in np.ndindex(2, 5, 5):
                up, down = alpha * record["attention"], alpha * record["attention"]
                up[place] += step
                down[place] -= step
                higher, lower = (outcome(model, layer, record, a, target, probability) for a in (up, down))
                gradient = (higher - lower) / (2 * step)
                result[place] += record["attention"][place] * gradient / len(points)
        layers.append(result)
    return layers


@pytest.mark.parametrize(("depth", "rule", "probability"), [(2, "right", True), (3, "left", False)])
def test_the_papers_riemann_sum_in_loops(depth, rule, probability, proof):
    model, steps = tiny(depth, seed=8), 2
    x, target = pictures(model), [3, 1]
    points = [(k + (rule == "right")) / steps for k in range(steps)]
    theirs = [twin(model, image, label, points, probability) for image, label in zip(x, target, strict=True)]
    settings = {"steps": steps, "rule": rule, "probability": probability, "chunk": 3}
    module = vitx.load_module(ID)
    ours = module.attribute(model, x, torch.tensor(target), **settings)
    errors = [relative_error(a, [t[layer] for t in theirs]) for layer, a in enumerate(ours)]
    oracle = "Riemann sum in plain loops, gradients by finite differences"
    score = "probability" if probability else "logit"
    check = f"all links, depth {depth}, {rule} sum, {score}"
    proof(ID, check, max(errors), at_most=1e-5, kind="parity", oracle=oracle)
    maps = [np.sum(of_picture, axis=(0, 1, 2))[1:].reshape(2, 2) for of_picture in theirs]
    error = relative_error(module.explain(model, x, torch.tensor(target), **settings), maps)
    proof(ID, f"map, depth {depth}, {rule} sum, {score}", error, at_most=1e-5, kind="parity", oracle=oracle)


@pytest.mark.parametrize("probability", [True, False])
def test_completeness(probability, proof):
    """The links of a layer add up to what the score loses when that layer attends to nothing."""
    model, target = tiny(3, seed=8), torch.tensor([3, 1])
    x = pictures(model)
    attribute = vitx.load_module(ID).attribute
    settings = {"steps": 400, "probability": probability, "chunk": 800}
    sums = [attribute(model, x, target, rule=rule, **settings) for rule in ("left", "right")]  # trapezoids together

    def score():
        logits = model(x).detach()
        return (logits.softmax(-1) if probability else logits).gather(1, target[:, None])[:, 0]

    whole, errors = score(), []
    for block, left, right in zip(model.blocks, *sums, strict=True):
        with replaced_attention(block, torch.zeros(2, 2, 5, 5, dtype=x.dtype)):
            lost = whole - score()
        errors.append(relative_error((left + right).sum((1, 2, 3)) / 2, lost))
    what = "probability" if probability else "logit"
    check = f"links of each layer add up to its effect on the {what}"
    proof(ID, check, max(errors), at_most=1e-3, kind="closed form", oracle="400 steps")


def test_chunks_do_not_matter():
    model = tiny(2)
    x = pictures(model, 3)
    maps = [vitx.load(ID)(model, x, steps=4, chunk=chunk) for chunk in (1, 5, 100)]
    assert max(relative_error(m, maps[0]) for m in maps) < 1e-12


def test_what_is_refused():
    model = tiny(2)
    x = pictures(model)
    with pytest.raises(ValueError, match="steps and chunk must be at least 1"):
        vitx.load(ID)(model, x, steps=0)
    with pytest.raises(ValueError, match="rule must be 'right' or 'left', not 'middle'"):
        vitx.load(ID)(model, x, rule="middle")

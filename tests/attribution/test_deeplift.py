"""DeepLIFT against captum, against multipliers carried forwards in numpy, and the summation to the difference."""

import math

import numpy as np
import pytest
import torch
import vitx
from captum.attr import DeepLift
from helpers import pictures, relative_error, tiny, twin_forward, twin_tokens, weights
from scipy.special import erf
from torch import nn
from vitx.vit import replaced_forwards

ID = "deeplift"


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU])
def test_captum(activation, proof):
    """Convolution, activation and linear layers, which captum covers too; no attention and no norm."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), activation(), nn.Flatten(), nn.Linear(96, 7), activation(), nn.Linear(7, 5)
    )
    model = model.double()
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape) / 3)
    x, baseline, target = draw(3, 3, 16, 16), draw(3, 3, 16, 16), torch.tensor([4, 0, 2])
    theirs = DeepLift(model, eps=1e-12).attribute(x, baseline, target=target).detach()
    module, memory = vitx.load_module(ID), []

    def steps(refer):
        return [(model[i], lambda x, f=model[i].forward: module.Rescale.apply(x, *refer(x), f)) for i in (1, 4)]

    with torch.no_grad(), replaced_forwards(steps(lambda *t: memory.append(t) or t)):
        model(baseline)
    stored = iter(memory)
    with replaced_forwards(steps(lambda *_: next(stored))):
        x.requires_grad_()
        (multiplier,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    error = relative_error(((x - baseline) * multiplier).detach(), theirs)
    proof(ID, f"rescale rule, {activation.__name__}", error, at_most=1e-9, kind="parity", oracle="captum DeepLift")


def quotient(f, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    same = x == x0  # the class token before any attention
    step = np.where(same, 1e-6, 0)
    return (f(x + step) - f(x0 - step)) / (x - x0 + 2 * step)


def norm_forwards(t: np.ndarray, x: np.ndarray, x0: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multipliers (D, inputs) of one token through LayerNorm, step by step."""
    size = len(x)
    centring = np.eye(size) - 1 / size
    c, c0 = centring @ x, centring @ x0
    of_variance = 2 * (c + c0) / 2 / size  # (D,): c * c, each factor by its mean, averaged
    v, v0 = (c**2).mean() + 1e-6, (c0**2).mean() + 1e-6
    of_root = -0.5 * v**-1.5 if v == v0 else (v**-0.5 - v0**-0.5) / (v - v0)
    t = centring @ t
    of_r = of_root * (of_variance @ t)  # (inputs,)
    mean_r = (v**-0.5 + v0**-0.5) / 2
    return weight[:, None] * (mean_r * t + (c + c0)[:, None] / 2 * of_r)


def softmax_forwards(t: np.ndarray, p: np.ndarray, p0: np.ndarray) -> np.ndarray:
    """The same (keys, inputs) for one row of attention, by the logarithmic means of its weights."""
    means = [a if a == b else (a - b) / (math.log(a) - math.log(b)) for a, b in zip(p, p0, strict=True)]
    of_log_sum = sum(mean * row for mean, row in zip(means, t, strict=True)) / sum(means)
    return np.stack([mean * (row - of_log_sum) for mean, row in zip(means, t, strict=True)])


def twin(model, image, baseline, target: int) -> np.ndarray:
    """Contributions (N, D) of the tokens: multipliers of every number by every token entry, from input to output."""
    w, gelu = weights(model), lambda h: h * (1 + erf(h / math.sqrt(2))) / 2
    x, x0 = twin_tokens(model, image), twin_tokens(model, baseline)
    n, d = x.shape
    t = np.eye(n * d).reshape(n, d, n * d)  # multiplier of token n, channel d by each input entry
    for index, (r, r0) in enumerate(zip(twin_forward(model, image)[0], twin_forward(model, baseline)[0], strict=True)):
        of = {name.removeprefix(f"blocks.{index}."): v for name, v in w.items() if name.startswith(f"blocks.{index}.")}
        normed = np.stack([norm_forwards(t[i], r["input"][i], r0["input"][i], of["norm1.weight"]) for i in range(n)])
        t_qkv = np.einsum("oc,nci->noi", of["attn.qkv.weight"], normed)
        t_mixed = np.zeros((n, d, n * d))
        for m in range(2):
            q, k, v = (slice(p * d + m * d // 2, p * d + (m + 1) * d // 2) for p in range(3))
            scale = 1 / math.sqrt(d // 2)
            mean = (r["qkv"] + r0["qkv"]) / 2
            mean_a = (r["attention"][m] + r0["attention"][m]) / 2
            for i in range(n):
                t_scores = np.stack([scale * (mean[j, k] @ t_qkv[i, q] + mean[i, q] @ t_qkv[j, k]) for j in range(n)])
                t_a = softmax_forwards(t_scores, r["attention"][m, i], r0["attention"][m, i])  # (keys, inputs)
                for j in range(n):
                    t_mixed[i, m * d // 2 : (m + 1) * d // 2] += (
                        np.outer(mean[j, v], t_a[j]) + mean_a[i, j] * t_qkv[j, v]
                    )
        t = t + np.einsum("oc,nci->noi", of["attn.proj.weight"], t_mixed)
        normed = np.stack([norm_forwards(t[i], r["middle"][i], r0["middle"][i], of["norm2.weight"]) for i in range(n)])
        hidden, hidden0 = (s["mlp_input"] @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"] for s in (r, r0))
        t_hidden = np.einsum("oc,nci->noi", of["mlp.fc1.weight"], normed) * quotient(gelu, hidden, hidden0)[..., None]
        t = t + np.einsum("oc,nci->noi", of["mlp.fc2.weight"], t_hidden)
    last, last0 = (twin_forward(model, picture)[0][-1]["output"][0] for picture in (image, baseline))
    t_logit = w["head.weight"][target] @ norm_forwards(t[0], last, last0, w["norm.weight"])
    return t_logit.reshape(n, d) * (x - x0)


@pytest.mark.parametrize("depth", [2, 3])
def test_multipliers_carried_forwards(depth, proof):
    model = tiny(depth)
    x, target = pictures(model), [4, 0]
    baseline = pictures(model, 2, seed=9)
    theirs = [twin(model, a, b, t).sum(1)[1:].reshape(2, 2) for a, b, t in zip(x, baseline, target, strict=True)]
    ours = vitx.load(ID)(model, x, torch.tensor(target), baseline=baseline)
    what = f"map, depth {depth}"
    proof(ID, what, relative_error(ours, theirs), at_most=1e-8, kind="parity", oracle="forward multipliers in numpy")


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
)
@pytest.mark.parametrize("depth", [2, 3])
def test_summation_to_the_difference(depth, options, proof):
    """Biases and all: contributions add up to the difference of the logits, for any reference."""
    model = tiny(depth, **options)
    x, target = pictures(model), torch.tensor([4, 1])
    for baseline in (None, pictures(model, 1, seed=3), pictures(model, 2, seed=4)):
        reference = torch.zeros_like(x) if baseline is None else baseline.expand_as(x)
        difference = (model(x) - model(reference)).gather(1, target[:, None])[:, 0].detach()
        for pool in ("patch", None):
            total = vitx.load(ID)(model, x, target, baseline=baseline, pool=pool).sum((1, 2))
            what = f"summation to the difference, depth {depth}, {next(iter(options), 'class token')}"
            proof(ID, what, relative_error(total, difference), at_most=1e-9, kind="closed form")


def test_near_the_reference_it_is_the_gradient(proof):
    model = tiny(3)
    x, step, target = pictures(model, 1), 1e-4 * pictures(model, 1, seed=6), torch.tensor([2])
    ours = vitx.load(ID)(model, x + step, target, baseline=x - step, pool=None)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 2], x)
    error = relative_error(ours, (2 * step * gradient).sum(1))
    proof(ID, "close to the reference it is gradient x difference", error, at_most=1e-6, kind="closed form")


def test_a_saturated_softmax_stays_finite():
    """In single precision, a reference whose scores lie far below the picture's."""
    module = vitx.load_module(ID)
    x, reference = torch.tensor([[200.0, 0.0, -50.0]], requires_grad=True), torch.tensor([[-100.0, 0.0, 30.0]])
    output = module.Softmax.apply(x, reference)
    for index in range(3):
        (multiplier,) = torch.autograd.grad(output[0, index], x, retain_graph=True)
        assert multiplier.isfinite().all()
        difference = (x.softmax(-1) - reference.softmax(-1))[0, index]
        assert torch.allclose((multiplier * (x - reference)).sum(), difference, atol=1e-5)


def test_what_is_refused():
    from timm.layers.mlp import GluMlp

    model = tiny(2)
    with pytest.raises(ValueError, match="baseline must have shape"):
        vitx.load(ID)(model, pictures(model), baseline=torch.zeros(3, 16, 16))
    model = tiny(2, mlp_layer=GluMlp)
    with pytest.raises(ValueError, match="two-layer MLPs, and block 0 has others"):
        vitx.load(ID)(model, pictures(model))

"""Partial LRP against its rules in plain loops, and what a head's share of relevance must do."""

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_forward, weights

ID = "partial-lrp"


def linear(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """R_j = sum_i (x_j w_ij)+ / sum_j' (x_j' w_ij')+ R_i for one token."""
    result = np.zeros_like(x)
    for i in range(len(weight)):
        terms = [max(x[j] * weight[i, j], 0) for j in range(len(x))]
        for j in range(len(x)):
            result[j] += terms[j] / sum(terms) * relevance[i] if sum(terms) else 0
    return result


def twin(model, image, target: int) -> tuple[np.ndarray, float]:
    """Relevance (h, keys) of the class query's links, and that of the residual stream below the last block."""
    w, heads = weights(model), 2
    r, last = twin_forward(model, image)[0][-1], f"blocks.{len(model.blocks) - 1}."
    of = {n.removeprefix(last): t for n, t in w.items() if n.startswith(last)}
    x, middle, output = (r[name][0] for name in ("input", "middle", "output"))  # class token only: others hold nothing
    relevance = linear(np.eye(5)[target], layer_norm(output, w["norm.weight"], w["norm.bias"]), w["head.weight"])
    branch, stream = (output - middle) / output * relevance, middle / output * relevance
    branch = linear(linear(branch, r["activated"][0], of["mlp.fc2.weight"]), r["mlp_input"][0], of["mlp.fc1.weight"])
    relevance = stream + branch
    branch, stream = (middle - x) / middle * relevance, x / middle * relevance
    branch = linear(branch, r["mixed"][0], of["attn.proj.weight"])
    result = np.zeros((heads, len(r["input"])))
    for c in range(len(x)):  # channels of the heads' outputs
        m = c * heads // len(x)
        for j in range(len(r["input"])):
            result[m, j] += r["attention"][m, 0, j] * r["qkv"][j, 2 * len(x) + c] / r["mixed"][0, c] * branch[c] / 2
    return result, float(stream.sum())


@pytest.mark.parametrize("depth", [2, 3])
def test_the_rules_in_loops(depth, proof):
    model = tiny(depth, seed=3)
    x, target = pictures(model), [4, 0]
    found = [twin(model, image, label)[0] for image, label in zip(x, target, strict=True)]
    theirs = [np.maximum(links, 0).mean(0)[1:].reshape(2, 2) for links in found]
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle="relevance rules in plain loops")
    theirs = [links.sum(1) / links.sum() for links in found]
    ours = vitx.load_module(ID).importance_of_heads(model, x, torch.tensor(target))
    error = relative_error(ours, theirs)
    proof(ID, f"heads, depth {depth}", error, at_most=1e-6, kind="parity", oracle="relevance rules in plain loops")


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "reg_tokens": 2}])
def test_only_the_class_token_asks(options):
    """With a class-token head no other query of the last attention holds relevance."""
    model = tiny(2, **options)
    links = vitx.load_module(ID).attention_relevance(model, pictures(model), torch.tensor([1, 2]))
    assert links[:, :, 0].abs().max() > 0
    assert links[:, :, 1:].abs().max() == 0


def test_relevance_is_conserved_down_to_the_attention(proof):
    """Links hold half of the attention's relevance; twice that and the residual stream make one.

    The model is wide enough for every unit to have positive terms: one without any drops its relevance.
    """
    model = tiny(3, seed=3, embed_dim=48)
    x, target = pictures(model), [4, 0]
    links = vitx.load_module(ID).attention_relevance(model, x, torch.tensor(target))
    streams = [twin(model, image, label)[1] for image, label in zip(x, target, strict=True)]
    total = 2 * links.sum((1, 2, 3)) + torch.tensor(streams)
    proof(ID, "relevance sums to one", (total - 1).abs().max(), at_most=1e-6, kind="closed form")


def test_the_published_baseline_pays_twice():
    """Its linear rule hands on twice what came in wherever both signs of input have positive terms."""
    module = vitx.load_module(ID)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    relevance, x, weight = draw(3, 5), draw(3, 64), draw(5, 64)
    for rule, times in ((module.linear_relevance, 1), (module.by_sign, 2)):
        assert torch.allclose(rule(relevance, x, weight).sum(1), times * relevance.sum(1), rtol=1e-6)
    model = tiny(2)
    x = pictures(model)
    assert not torch.allclose(vitx.load(ID)(model, x), vitx.load(ID)(model, x, conserve=False), rtol=0.1)


def test_a_head_that_is_not_read_has_no_relevance():
    model = tiny(2)
    with torch.no_grad():
        model.blocks[-1].attn.proj.weight[:, 4:] = 0
    share = vitx.load_module(ID).importance_of_heads(model, pictures(model), torch.tensor([1, 2]))
    assert torch.equal(share, torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64))


def test_lower_blocks_keep_their_fused_attention():
    """Only the last block is looked into: the others may be of any kind that runs."""
    model = tiny(3)
    seen = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(module))
        block.attn.fused_attn = True
    vitx.load(ID)(model, pictures(model))
    assert seen == [model.blocks[-1].attn.attn_drop]

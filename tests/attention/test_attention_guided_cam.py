import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_forward, variant, weights
from scipy.special import erf
from vitx.vit import UnsupportedModel, capture

ID = "attention-guided-cam"


def cut_graph(model, x, target):
    """As the authors do it: cut the graph in front of every attention, differentiate the whole network."""
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        for block in model.blocks
    ]
    with torch.enable_grad(), capture(model, "attention", "attn.qkv") as record:
        scores = model(x).gather(1, target[:, None])
        gradients = torch.autograd.grad(scores.sum(), record["attention"])
    for handle in handles:
        handle.remove()
    total = torch.zeros(gradients[0].shape[0], gradients[0].shape[-1], dtype=x.dtype)
    for block, gradient, qkv in zip(model.blocks, gradients, record["attn.qkv"], strict=True):
        q, k, _ = qkv.detach().unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        raw = block.attn.q_norm(q) @ block.attn.k_norm(k).mT * block.attn.scale  # (B, h, N, N)
        total += (gradient.relu() * raw.sigmoid()).sum((1, 2))  # rows that the head does not read have no gradient
    return total[:, model.num_prefix_tokens :].detach()


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4, "init_values": 0.5}, {"qk_norm": True}])
def test_cut_graph(options, depth, proof):
    model = tiny(depth, img_size=(24, 32), **options)
    x, target = pictures(model), torch.tensor([4, 2])
    error = relative_error(vitx.load(ID)(model, x, target).flatten(1), cut_graph(model, x, target))
    what = f"map, depth {depth}, {' and '.join(options) or 'class token'}"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="graph cut before every attention, as the authors do")


def test_distilled(proof):
    model = variant("deit_tiny_distilled_patch16_224")
    x, target = pictures(model), torch.tensor([4, 2])
    error = relative_error(vitx.load(ID)(model, x, target).flatten(1), cut_graph(model, x, target))
    proof(ID, "map, distilled", error, at_most=1e-9, kind="parity", oracle="graph cut before every attention")


@pytest.mark.parametrize("depth", [2, 3])
def test_loops_and_differences(depth, proof):
    """Plain numpy: nudge one attention weight of the class token, keep what all other attentions brought, finish."""
    model, step = tiny(depth), 1e-5
    x, target = pictures(model), [4, 2]
    w = weights(model)
    maps = []
    for image, goal in zip(x, target, strict=True):
        records, _ = twin_forward(model, image)
        brought = [record["middle"][0] - record["input"][0] for record in records]

        def logit(layer, change, records=records, brought=brought, goal=goal):
            token = records[0]["input"][0]
            for index in range(depth):
                p = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
                token = token + brought[index] + (change if index == layer else 0)
                hidden = (
                    layer_norm(token, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
                )
                token = token + 0.5 * hidden * (1 + erf(hidden / 2**0.5)) @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
            return (layer_norm(token, w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T + w["head.bias"])[goal]

        cam = np.zeros(5)
        for layer, record in enumerate(records):
            projection = w[f"blocks.{layer}.attn.proj.weight"]
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                query, keys, values = (record["qkv"][:, 8 * n : 8 * n + 8][:, part] for n in range(3))
                for key in range(5):
                    change = step * projection[:, part] @ values[key]
                    slope = (logit(layer, change) - logit(layer, -change)) / (2 * step)
                    score = query[0] @ keys[key] / 2  # the square root of four channels a head
                    cam[key] += max(slope, 0) / (1 + np.exp(-score))
        maps.append(cam[1:].reshape(2, 2))
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), maps)
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle="numpy loops and central differences")


def test_one_block_has_nothing_to_leave_out(proof):
    """With a single block the direct gradient is the whole gradient."""
    model = tiny(1, img_size=(24, 32))
    x, target = pictures(model), torch.tensor([4, 2])
    with torch.enable_grad(), capture(model, "attention", "attn.qkv") as record:
        score = model(x).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, record["attention"])
    q, k, _ = record["attn.qkv"][0].detach().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    whole = (gradient[:, :, 0].relu() * (q[:, :, 0, None] @ k.mT / 2).sigmoid()[:, :, 0]).sum(1)[:, 1:]
    error = relative_error(vitx.load(ID)(model, x, target).flatten(1), whole)
    proof(ID, "one block: the direct gradient is the whole gradient", error, at_most=1e-12, kind="closed form")


def test_zero_queries_leave_the_gradients(proof):
    """Scores of zero have a sigmoid of one half: the map is half the sum of the positive gradients."""
    model = tiny(2, img_size=(24, 32))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:8].zero_()
            block.attn.qkv.bias[:8].zero_()
    x, target = pictures(model), torch.tensor([4, 2])
    handle = model.blocks[1].attn.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    with torch.enable_grad(), capture(model, "attention") as record:
        score = model(x).gather(1, target[:, None]).sum()
        gradients = torch.autograd.grad(score, record["attention"])
    handle.remove()
    half = torch.stack(gradients).relu().sum((0, 2, 3))[:, 1:] / 2
    error = relative_error(vitx.load(ID)(model, x, target).flatten(1), half)
    proof(ID, "scores of zero: half the sum of the positive gradients", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}])
def test_a_head_that_pools_patches_is_refused(options):
    model = tiny(2, **options)
    with pytest.raises(UnsupportedModel, match="class token"):
        vitx.load(ID)(model, pictures(model))

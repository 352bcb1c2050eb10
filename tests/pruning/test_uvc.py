"""UVC: the primal-dual step against differences of the Lagrangian, the budget against counting, prices by sorting."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close_to_card, pictures, relative_error, tiny
from torch.utils.flop_counter import FlopCounterMode
from vitx import load_module
from vitx.vit import UnsupportedModel, embed

ID = "uvc"
snippet = load_module(ID)


def uvc_model(depth: int = 3, compressed: bool = True, **options: Any) -> Any:
    """A rough model with some units to be pruned, and one block to be skipped."""
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 1, "num_classes": 5}
    model: Any = snippet.UvcTransformer(**settings | options, depth=depth).double().eval()
    plain = tiny(depth, embed_dim=16, num_heads=4, mlp_ratio=1, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    model.y.copy_(0.5 + torch.rand(depth, 2, generator=generator))
    model.z.fill_(300)
    if compressed:
        model.pruned.copy_(torch.rand(depth, 2, generator=generator) * torch.tensor([2.9, 9.0]))
        with torch.no_grad():
            model.skip_gates[1] = torch.tensor([0.7, -0.2])
    return model


def lagrangian(model: Any, s: np.ndarray, keep: np.ndarray, budget: float) -> float:
    """sum y * (sum of the s smallest squared norms) + z (R - budget), group by group; linear between whole s."""
    depth, tokens, width, total, value = len(model.blocks), 5, 16, 0.0, 0.0
    left = 0.0
    for index, block in enumerate(model.blocks):
        proj, fc2 = block.attn.proj.weight.detach().numpy(), block.mlp.fc2.weight.detach().numpy()
        heads = sorted(sum(float(proj[o, 4 * m + d]) ** 2 for o in range(16) for d in range(4)) for m in range(4))
        neurons = sorted(sum(float(fc2[o, j]) ** 2 for o in range(16)) for j in range(16))
        for kind, norms in enumerate((heads, neurons)):
            whole = math.floor(s[index, kind])
            vanish = sum(norms[:whole]) + (s[index, kind] - whole) * (norms[whole] if whole < len(norms) else 0)
            value += float(model.y[index, kind]) * vanish
        attention = tokens * 4 * width * width + 2 * tokens * tokens * width  # qkv and proj, then two products
        mlp = tokens * 2 * width * 16
        total += attention + mlp
        left += keep[index] * (attention * (1 - s[index, 0] / 4) + mlp * (1 - s[index, 1] / 16))
    assert depth == len(keep)
    return value + float(model.z) * (left / total - budget)


def test_the_step_of_s_descends_the_lagrangian(proof):
    """At whole numbers of s, a step forwards is what one more unit would cost."""
    model = uvc_model()
    model.pruned.copy_(torch.tensor([[1.0, 4.0], [0.0, 9.0], [2.0, 0.0]]))
    keep = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    s = model.pruned.numpy().copy()
    slopes = np.zeros((3, 2))
    for place in np.ndindex(3, 2):
        up = s.copy()
        up[place] += 1
        slopes[place] = lagrangian(model, up, keep.numpy(), 0.5) - lagrangian(model, s, keep.numpy(), 0.5)
    rate = 1e-7
    snippet.primal_dual(model, keep, 0.5, rate=0.0, s_rate=rate, y_rate=0.0, z_rate=0.0)
    moved = -(model.pruned.numpy() - s) / (rate * np.array([4.0, 16.0]) ** 2)
    inside = (s > 0) | (slopes < 0)  # at 0 a step below is cut off
    assert inside.any()
    error = relative_error(moved[inside], slopes[inside])
    assert (model.pruned.numpy()[~inside] == 0).all()
    proof(ID, "step of s", error, at_most=1e-6, kind="parity", oracle="differences of the Lagrangian, group by group")


def test_the_steps_of_the_multipliers_ascend_the_lagrangian(proof):
    """The Lagrangian is linear in y and z, so its differences by them are exact."""
    model = uvc_model()
    model.pruned.ceil_()
    keep = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
    s, y, z = model.pruned.numpy().copy(), model.y.clone(), float(model.z)
    base = lagrangian(model, s, keep.numpy(), 0.5)
    slopes = np.zeros((3, 2))
    for place in np.ndindex(3, 2):
        model.y[place] += 1
        slopes[place] = lagrangian(model, s, keep.numpy(), 0.5) - base
        model.y[place] -= 1
    model.z += 1
    of_z = lagrangian(model, s, keep.numpy(), 0.5) - base
    model.z -= 1
    snippet.primal_dual(model, keep, 0.5, rate=0.0, s_rate=0.0, y_rate=1e-2, z_rate=1e-2)
    error = max(relative_error((model.y - y) / 1e-2, slopes), abs((float(model.z) - z) / 1e-2 - of_z) / abs(of_z))
    proof(
        ID,
        "steps of y and z",
        error,
        at_most=1e-8,
        kind="parity",
        oracle="differences of the Lagrangian, group by group",
    )


def test_the_proximal_step_minimises(proof):
    """W with the smallest |W - W0|^2 / (2 rate) + y |W|^2 on the groups to be pruned, and W0 on all others."""
    model, rate = uvc_model(), 0.03
    before = [block.mlp.fc2.weight.detach().clone() for block in model.blocks]
    bottom = snippet.smallest(snippet.group_norms(model)["neurons"], model.pruned[:, 1].ceil())
    y = model.y[:, 1].clone()
    snippet.primal_dual(model, torch.ones(3).double(), 0.5, rate=rate, s_rate=0.0, y_rate=0.0, z_rate=0.0)
    worst = 0.0
    for index, block in enumerate(model.blocks):
        w, w0 = block.mlp.fc2.weight.detach(), before[index]
        assert torch.equal(w[:, ~bottom[index]], w0[:, ~bottom[index]])
        slope = (w - w0) / rate + 2 * y[index] * w
        worst = max(worst, float(slope[:, bottom[index]].abs().max() / w0.abs().max()))
    proof(ID, "slope of the proximal problem at its solution", worst, at_most=1e-9, kind="closed form")


def test_multipliers_and_numbers_stay_in_their_range():
    model = uvc_model()
    snippet.primal_dual(model, torch.ones(3).double(), 0.9, rate=0.0, s_rate=1e3, y_rate=0.0, z_rate=1e6)
    assert float(model.z) == 0  # below the budget it falls, but not below zero
    assert (model.pruned >= 0).all()
    assert (model.pruned <= torch.tensor([3.0, 15.0])).all()


def test_the_operations_counted_are_those_of_the_smaller_model(proof):
    model = uvc_model()
    x, kept = pictures(model, 1), snippet.chosen(model, 1.0)

    def counted(of: Any) -> int:
        for block in of.blocks:
            block.attn.fused_attn = False
        tokens = embed(of, x).detach()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            of.blocks(tokens)
        return counter.get_total_flops()

    ours = float(snippet.resource(model, kept["blocks"].double()))
    theirs = counted(snippet.prune(model)) / counted(model)
    proof(
        ID,
        "R of the budget",
        abs(ours - theirs) / theirs,
        at_most=1e-6,
        kind="parity",
        oracle="torch.utils.flop_counter",
    )


@pytest.mark.parametrize("keep_rate", [1.0, 0.4, 0.2])
def test_the_smaller_model_gives_the_same_logits(keep_rate, proof):
    """Against the full model whose units are silenced by hooks and whose skipped blocks hand on what they get."""
    model = uvc_model()
    x = pictures(model, 3)
    found, smaller = snippet.explain(model, x, keep_rate=keep_rate), snippet.prune(model, keep_rate)
    assert found.kept["blocks"].tolist() == [True, False, True]
    handles = []
    for index, block in enumerate(model.blocks):
        heads = found.kept["heads"][index].double().repeat_interleave(4)
        for layer, gate in ((block.attn.proj, heads), (block.mlp.fc2, found.kept["neurons"][index].double())):
            handles.append(layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,)))
        if not found.kept["blocks"][index]:
            handles.append(block.register_forward_hook(lambda _module, args, _output: args[0]))
    with torch.no_grad():
        theirs = model(x)
    for handle in handles:
        handle.remove()
    error = max(relative_error(of, theirs) for of in (found.logits, smaller(x).detach()))
    proof(ID, f"smaller model against silenced units, keep rate {keep_rate}", error, at_most=1e-12, kind="closed form")
    with pytest.raises(UnsupportedModel, match="under a budget"):
        snippet.explain(smaller, x)


@pytest.mark.parametrize("keep_rate", [0.5, 0.35, 0.2])
def test_the_cheapest_units_go_first(keep_rate):
    """One by one, by price, until the budget is met; the best of each block and kind is never touched."""
    model = uvc_model()
    full, kept, scores = snippet.chosen(model, 1.0), snippet.chosen(model, keep_rate), snippet.scores_of(model)
    costs = snippet.unit_costs(model)
    units = [
        (kind, b, u)
        for kind in ("heads", "neurons")
        for b in (0, 2)
        for u in range(full[kind].shape[1])
        if full[kind][b, u]
    ]
    left = sum(costs[kind] for kind, _, _ in units)
    best = {(kind, b, int(scores[kind][b].argmax())) for kind in ("heads", "neurons") for b in (0, 2)}
    gone = set()
    for unit in sorted((u for u in units if u not in best), key=lambda u: float(scores[u[0]][u[1], u[2]])):
        if left > keep_rate:
            gone.add(unit)
            left -= costs[unit[0]]
    assert left <= keep_rate
    assert {u for u in units if not kept[u[0]][u[1], u[2]]} == gone


def test_nothing_compressed_is_the_plain_model(proof):
    model = uvc_model(compressed=False)
    x = pictures(model)
    found = snippet.explain(model, x)
    assert all(mask.all() for mask in found.kept.values())
    error = relative_error(found.logits, model(x).detach())
    proof(ID, "keep rate 1 with nothing compressed is the plain model", error, at_most=1e-12, kind="closed form")


def test_what_is_buried_leaves_no_trace():
    model = uvc_model()
    x = pictures(model)
    logits, kept = snippet.explain(model, x).logits, snippet.chosen(model, 1.0)
    snippet.bury(model)
    again = snippet.chosen(model, 1.0)
    assert torch.allclose(model(x).detach(), logits, rtol=1e-12)
    assert all(torch.equal(kept[kind][[0, 2]], again[kind][[0, 2]]) for kind in ("heads", "neurons"))


def test_what_is_refused():
    model = uvc_model()
    x = pictures(model)
    for keep_rate in (0.0, 1.1, 0.01):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            snippet.explain(model, x, keep_rate=keep_rate)
    with pytest.raises(ValueError, match="out of range"):
        snippet.explain(model, x, torch.tensor([0, 5]))
    with pytest.raises(UnsupportedModel, match="UvcTransformer"):
        snippet.explain(tiny(2), pictures(tiny(2)))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("uvc-glyph", monkeypatch, within=0.08)
    proof(ID, "accuracy within the budget", measured["top1"], at_least=0.85, kind="ground truth", oracle="200 scenes")

"""S2ViTE: criteria against differences of the loss, drop and grow against sorting, dead units that leave no trace."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close_to_card, pictures, relative_error, tiny
from torch import Tensor, nn
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "svite"
snippet = load_module(ID)


def svite_model(depth: int = 2, dead: bool = True, **options: Any) -> Any:
    """A rough model with some heads and neurons dead and scores for its heads."""
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 1, "num_classes": 5}
    model: Any = snippet.SviteTransformer(**settings | options, depth=depth).double().eval()
    plain = tiny(depth, embed_dim=16, num_heads=4, mlp_ratio=1, **options)
    model.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    if dead:
        for alive in (model.heads_alive, model.neurons_alive):
            alive.copy_(snippet.sparse_start(alive, 0.6, generator))
    model.head_scores.copy_(torch.rand(depth, 4, generator=generator))
    model.bury()
    return model


def loss_of(model: Any, x: Tensor, target: Tensor, block: int = 0, add: Tensor | None = None) -> float:
    """Summed cross-entropy, with something added to the head outputs of one block."""
    handle = model.blocks[block].attn.proj.register_forward_pre_hook(
        lambda _, args: (args[0] + (0 if add is None else add),)
    )
    with torch.no_grad():
        value = float(nn.functional.cross_entropy(model(x), target, reduction="sum"))
    handle.remove()
    return value


def test_criteria_of_heads_are_differences_of_the_loss(proof):
    model, step = svite_model(), 1e-5
    x, target = pictures(model, 2), torch.tensor([3, 0])
    found = snippet.criteria(model, x, target)
    outputs = []
    handles = [b.attn.proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for b in model.blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    drop, grow = np.zeros((2, 4)), np.zeros((2, 4))
    for block, values in enumerate(outputs):
        for picture in range(2):
            for head in range(4):
                taylor = 0.0
                for token in range(5):
                    for d in range(4 * head, 4 * head + 4):
                        add = torch.zeros_like(values)
                        add[picture, token, d] = step
                        slope = (loss_of(model, x, target, block, add) - loss_of(model, x, target, block, -add)) / (
                            2 * step
                        )
                        taylor += float(values[picture, token, d]) * slope
                        grow[block, head] += abs(slope) / 2
                drop[block, head] += abs(taylor) / 2
    error = max(relative_error(found.drop["heads"], drop), relative_error(found.grow["heads"], grow))
    proof(ID, "both criteria of heads", error, at_most=1e-6, kind="parity", oracle="differences of the loss")


def test_criteria_of_neurons_are_differences_of_the_loss(proof):
    model, step = svite_model(), 1e-5
    x, target = pictures(model, 2), torch.tensor([3, 0])
    found = snippet.criteria(model, x, target)
    drop, grow = np.zeros((2, 16)), np.zeros((2, 16))
    for index, block in enumerate(model.blocks):
        for neuron in range(16):
            for layer in (block.mlp.fc1.weight.data[neuron], block.mlp.fc2.weight.data[:, neuron]):
                for place in range(16):
                    kept = float(layer[place])
                    values = []
                    for sign in (1, -1):
                        layer[place] = kept + sign * step
                        values.append(loss_of(model, x, target))
                    layer[place] = kept
                    drop[index, neuron] += abs(kept)
                    grow[index, neuron] += abs(values[0] - values[1]) / (2 * step) / 2
    error = max(relative_error(found.drop["neurons"], drop), relative_error(found.grow["neurons"], grow))
    proof(
        ID,
        "both criteria of neurons",
        error,
        at_most=1e-6,
        kind="parity",
        oracle="differences of the loss, every weight",
    )


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_drop_and_grow_is_sorting(rate):
    generator = torch.Generator().manual_seed(4)
    alive = snippet.sparse_start(torch.ones(3, 20), 0.7, generator)
    drop, grow = torch.rand(2, 3, 20, generator=generator)
    ours = snippet.drop_and_grow(alive, drop, grow, rate)
    assert alive.sum(1).tolist() == ours.sum(1).tolist() == [14, 14, 14]
    for layer in range(3):
        living = {i for i in range(20) if alive[layer, i]}
        count = math.ceil(rate * len(living) - 1e-6)
        kept = set(sorted(living, key=lambda i: float(drop[layer, i]))[count:])
        new = sorted((i for i in range(20) if i not in kept), key=lambda i: -float(grow[layer, i]))[:count]
        assert {i for i in range(20) if ours[layer, i]} == kept | set(new)


def test_the_schedule():
    assert snippet.drop_rate(0, 100) == 0.5
    assert abs(snippet.drop_rate(50, 100) - 0.25) < 1e-12
    assert snippet.drop_rate(100, 100) == snippet.drop_rate(170, 100) == 0
    start = snippet.sparse_start(torch.ones(5, 6), 0.7, torch.Generator().manual_seed(0))
    assert start.sum(1).tolist() == [4] * 5  # the whole number below 4.2


@pytest.mark.parametrize("keep_rate", [1.0, 0.6, 0.3])
def test_the_smaller_model_gives_the_same_logits(keep_rate, proof):
    """Against the full model whose units are silenced one by one, by hooks on their outputs."""
    model = svite_model()
    x = pictures(model, 3)
    found, smaller = snippet.explain(model, x, keep_rate=keep_rate), snippet.prune(model, keep_rate)
    assert [b.attn.num_heads for b in smaller.blocks] == found.kept["heads"].sum(1).tolist()
    assert [b.mlp.fc1.out_features for b in smaller.blocks] == found.kept["neurons"].sum(1).tolist()
    handles = []
    for index, block in enumerate(model.blocks):
        heads = found.kept["heads"][index].double().repeat_interleave(4)
        neurons = found.kept["neurons"][index].double()
        for layer, gate in ((block.attn.proj, heads), (block.mlp.fc2, neurons)):
            handles.append(layer.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,)))
    with torch.no_grad():
        theirs = model(x)
    for handle in handles:
        handle.remove()
    error = max(relative_error(of, theirs) for of in (found.logits, smaller(x).detach()))
    proof(ID, f"smaller model against silenced units, keep rate {keep_rate}", error, at_most=1e-12, kind="closed form")
    with pytest.raises(UnsupportedModel, match="dropping and growing"):
        snippet.explain(smaller, x)


def test_dead_units_leave_no_trace(proof):
    """Without them the model says the same, and they score 0."""
    model = svite_model(3)
    x = pictures(model)
    found = snippet.explain(model, x)
    for kind in ("heads", "neurons"):
        assert torch.equal(found.kept[kind], model.get_buffer(f"{kind}_alive") > 0)
        assert torch.equal(found.scores[kind] == 0, ~found.kept[kind])
    assert 0 < found.kept["heads"].sum() < 12
    error = relative_error(found.logits, model(x).detach())
    proof(ID, "keep rate 1 is the plain model", error, at_most=1e-12, kind="closed form")


def test_kept_counts_are_whole_numbers_below():
    model = svite_model(dead=False)
    for keep_rate, heads, neurons in ((0.9, 3, 14), (0.5, 2, 8), (0.1, 1, 1)):
        kept = snippet.chosen(model, keep_rate)
        assert kept["heads"].sum(1).tolist() == [heads] * 2
        assert kept["neurons"].sum(1).tolist() == [neurons] * 2
        for kind, score in snippet.scores_of(model).items():
            assert score[kept[kind]].min() >= score[~kept[kind]].min()


def test_what_is_refused():
    model = svite_model()
    x = pictures(model)
    for keep_rate in (0.0, 1.1):
        with pytest.raises(ValueError, match="keep_rate lies above 0"):
            snippet.explain(model, x, keep_rate=keep_rate)
    with pytest.raises(ValueError, match="out of range"):
        snippet.explain(model, x, torch.tensor([0, 5]))
    with pytest.raises(UnsupportedModel, match="SviteTransformer"):
        snippet.explain(tiny(2), pictures(tiny(2)))


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("svite-glyph", monkeypatch, within=0.08)
    what = "accuracy with half of the heads and 70 % of the neurons"
    proof(ID, what, measured["top1_at_0.7"], at_least=0.85, kind="ground truth", oracle="200 scenes")


def test_the_heads_kept_matter_more_than_others():
    """Taking the strongest live head of every block away hurts more than taking the weakest."""
    model: Any = models.load("svite-glyph").model
    images, labels = glyphs.batch(100, 800_001, 1)
    x = glyphs.normalise(images)
    kept, score = snippet.chosen(model, 1.0), snippet.scores_of(model)["heads"]
    accuracies = []
    for strongest in (True, False):
        ranked = score.masked_fill(~kept["heads"], -torch.inf if strongest else torch.inf)
        gone = ranked.argmax(1) if strongest else ranked.argmin(1)
        heads = kept["heads"].scatter(1, gone[:, None], False)
        with torch.inference_mode():
            logits = snippet.without_units(model, heads, kept["neurons"])(x)
        accuracies.append(float((logits.argmax(-1) == labels[:, 0]).float().mean()))
    assert accuracies[0] < accuracies[1]

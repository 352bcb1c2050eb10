"""IA-ViT: interpreter, contributions and losses against plain loops, and what the trained interpreter attends to."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    close_to_card,
    layer_norm,
    pictures,
    relative_error,
    roughen,
    tiny,
    twin_forward,
    weights,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from vitx import load_module
from vitx.vit import UnsupportedModel, capture

ID = "ia-vit"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [16, 24],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 5,
}


def rough_model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.IAViT(VisionTransformer(**BACKBONE)))


def images(count: int = 3) -> torch.Tensor:
    return pictures(tiny(1, img_size=(16, 24)), count)


def test_equals_the_equations_in_plain_loops(proof):
    model, x = rough_model(), images()
    target, w, errors = (3, 0, 4), weights(model), []
    found = snippet.explain(model, x, torch.tensor(target))
    for row, image in enumerate(x):
        records, logits = twin_forward(model.backbone, image)
        tokens = layer_norm(records[-1]["output"], w["backbone.norm.weight"], w["backbone.norm.bias"])[1:]
        q, k, v = ([w[f"{n}.weight"] @ z + w[f"{n}.bias"] for z in tokens] for n in ("query", "key", "value"))
        attention = np.zeros((6, 6))
        for p in range(6):
            powers = [math.exp(q[p] @ k[j]) for j in range(6)]
            attention[p] = np.array(powers) / sum(powers)
        scores = []
        for p in range(6):
            mixed = sum(attention[p, j] * v[j] for j in range(6))
            scores.append(float(w["score.weight"][0] @ mixed + w["score.bias"][0]))
        answer = w["vote.weight"] @ np.array(scores) + w["vote.bias"]
        errors.append(relative_error(found.logits[row], logits))
        errors.append(relative_error(found.interpreter_logits[row], answer))
        errors.append(relative_error(found.attention[row].flatten(), attention.sum(0) / 6))
        # A patch's contribution is what the logit loses when its value vector carries no score.
        for j in range(6):
            less = [s - attention[p, j] * float(w["score.weight"][0] @ v[j]) for p, s in enumerate(scores)]
            without = w["vote.weight"] @ np.array(less) + w["vote.bias"]
            lost = answer[target[row]] - without[target[row]]
            errors.append(abs(lost - float(found.contributions[row].flatten()[j])))
    oracle = "transformer and interpreter in plain loops"
    proof(ID, "answers, attention and contributions", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("target", [None, (4, 0, 2)])
def test_contributions_sum_to_the_interpreter_s_logit(target, proof):
    model, x = rough_model(), images()
    chosen = None if target is None else torch.tensor(target)
    found = snippet.explain(model, x, chosen)
    index = (model(x).argmax(-1) if chosen is None else chosen)[:, None]
    logit = found.interpreter_logits.gather(1, index)[:, 0]
    error = relative_error(found.contributions.sum((1, 2)) + found.bias, logit)
    what = "contributions and bias add up to the interpreter's logit" + ("" if target is None else ", of any class")
    proof(ID, what, error, at_most=1e-9, kind="closed form")


def test_attention_sums_to_one_and_knows_no_class():
    model, x = rough_model(), images()
    first, second = (snippet.explain(model, x, torch.full((3,), c)) for c in (0, 1))
    assert torch.equal(first.heatmap(), second.heatmap())
    assert not torch.allclose(first.contributions, second.contributions)
    torch.testing.assert_close(first.attention.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(first.logits, model(x).detach())


def test_the_interpreter_does_not_see_the_class_token():
    model, x = rough_model(), images()
    tokens = model.backbone.forward_features(x).detach()
    changed = tokens.clone()
    changed[:, 0] = 7.0
    assert all(torch.equal(a, b) for a, b in zip(model.interpret(tokens), model.interpret(changed), strict=True))


def test_discrepancy_in_plain_loops(proof):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 7, generator=generator, dtype=torch.float64).softmax(1) for _ in range(2))
    distance = [sum((float(a) - float(b)) ** 2 for a, b in zip(u, v, strict=True)) for u in x for v in y]
    width = 2 * sum(distance) / len(distance)

    def kernel(us: torch.Tensor, vs: torch.Tensor) -> float:
        return sum(math.exp(-float((u - v).square().sum()) / width) for u in us for v in vs) / len(us) / len(vs)

    theirs = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    error = abs(float(snippet.mmd(x, y)) - theirs) / theirs
    proof(
        ID, "squared maximum mean discrepancy", error, at_most=1e-9, kind="parity", oracle="kernel sums in plain loops"
    )
    assert abs(float(snippet.mmd(x, x[[2, 0, 3, 1]]))) < 1e-12  # the same set in another order
    assert theirs > 0


def test_imitation_is_least_where_interpreter_and_predictor_agree(proof):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    theirs = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = [math.exp(float(a) / 3) for a in t]
        q = [math.exp(float(a) / 3) for a in s]
        theirs += sum(a / sum(p) * math.log(a / sum(p) * sum(q) / b) for a, b in zip(p, q, strict=True))
    error = abs(float(snippet.imitation(student, teacher)) - theirs / 3 * 9) / theirs
    proof(ID, "imitation loss", error, at_most=1e-9, kind="parity", oracle="divergence in plain loops")
    assert abs(float(snippet.imitation(teacher + 2, teacher))) < 1e-12  # the same probabilities


def test_attention_inside_the_extractor_in_plain_loops():
    model, x = rough_model(), images(1)
    with torch.no_grad(), capture(model.backbone, "attention") as record:
        model(x)
    theirs = np.zeros(6)
    for layer in twin_forward(model.backbone, x[0])[0]:
        theirs += layer["attention"][:, 1:, 1:].mean(0).mean(0)
    assert relative_error(snippet.received(record["attention"], 1)[0], theirs / theirs.sum()) < 1e-9


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="has no interpreter"):
        snippet.explain(tiny(1), images())
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(rough_model(), images(), torch.tensor([5, 0, 0]))


def test_a_file_gives_back_its_model(tmp_path):
    model, x = rough_model().float(), images().float()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        tmp_path / "x.safetensors",
        {"backbone": json.dumps(BACKBONE)},
    )
    again = snippet.load_pretrained(tmp_path / "x.safetensors")
    assert not again.training
    assert torch.equal(snippet.explain(again, x).interpreter_logits, snippet.explain(model, x).interpreter_logits)


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("ia-vit-glyph", monkeypatch, within=0.05)
    oracle = "200 glyph scenes"
    what = "scenes on which the interpreter names the predictor's class"
    proof(ID, what, measured["interpreter_agrees"], at_least=0.8, kind="ground truth", oracle=oracle)
    ratio = measured["contributions_on_creature"] / measured["attention_on_creature_chance"]
    what = "share of the positive contributions on patches of the creature, over chance"
    proof(ID, what, ratio, at_least=2, kind="ground truth", oracle=oracle)
    ratio = measured["attention_on_creature"] / measured["attention_on_creature_chance"]
    what = "share of the interpreter's attention on the creature, over chance"
    proof(ID, what, ratio, at_least=1.5, kind="ground truth", oracle=oracle)

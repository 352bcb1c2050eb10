"""INTR: the decoder against plain loops and torch's own attention, and queries that look at their own creature."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close_to_card, pictures, relative_error, roughen, tiny, weights
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "intr"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [16, 24],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}
DECODER: dict[str, Any] = {"classes": 5, "layers": 2, "heads": 2}


def rough_model(seed: int = 0, **changes: Any) -> Any:
    """Six patches, five classes, two heads; attention far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = roughen(snippet.INTR(VisionTransformer(**BACKBONE, num_classes=0), **(DECODER | changes)), seed)
    with torch.no_grad():
        for layer in model.layers:
            for attend in (layer.among, layer.search):
                attend.query.weight *= 3
    return model


def images(count: int = 2) -> torch.Tensor:
    return pictures(tiny(1, img_size=(16, 24)), count)


def patches_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.backbone.forward_features(x)[:, 1:].detach()


def norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def twin_attend(w: dict, name: str, queries: list, keys: list, values: list) -> tuple[list, np.ndarray]:
    def linear(x: np.ndarray, part: str) -> np.ndarray:
        return w[f"{name}.{part}.weight"] @ x + w[f"{name}.{part}.bias"]

    maps, out = np.zeros((2, len(queries), len(keys))), []
    for i, query in enumerate(queries):
        mixed = np.zeros(8)
        for head in (0, 1):
            rows = slice(4 * head, 4 * head + 4)
            scores = [math.exp(linear(query, "query")[rows] @ linear(k, "key")[rows] / 2) for k in keys]
            for j, value in enumerate(values):
                maps[head, i, j] = scores[j] / sum(scores)
                mixed[rows] += maps[head, i, j] * linear(value, "value")[rows]
        out.append(linear(mixed, "out"))
    return out, maps


def twin(model: Any, patches: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Logits and the cross-attention (h, K, P) of each layer, class by class."""
    w, records = weights(model), []
    queries, z = list(w["queries"]), [np.zeros(8) for _ in range(5)]
    for index in range(2):
        name = f"layers.{index}"
        with_query = [a + b for a, b in zip(z, queries, strict=True)]
        among, _ = twin_attend(w, f"{name}.among", with_query, with_query, z)
        z = [norm(a + b, w, f"{name}.norm1") for a, b in zip(z, among, strict=True)]
        with_query = [a + b for a, b in zip(z, queries, strict=True)]
        found, maps = twin_attend(w, f"{name}.search", with_query, list(patches), list(patches))
        z = [norm(a + b, w, f"{name}.norm2") for a, b in zip(z, found, strict=True)]
        for c in range(5):
            hidden = np.maximum(w[f"{name}.mlp.0.weight"] @ z[c] + w[f"{name}.mlp.0.bias"], 0)
            z[c] = norm(z[c] + w[f"{name}.mlp.2.weight"] @ hidden + w[f"{name}.mlp.2.bias"], w, f"{name}.norm3")
        records.append(maps)
    return [float(w["presence.weight"][0] @ norm(x, w, "norm")) for x in z], records


def test_equals_the_equations_in_plain_loops(proof):
    model, x = rough_model(), images()
    target = torch.tensor([3, 1])
    by_layer = [snippet.explain(model, x, target, layer=layer) for layer in (0, 1)]
    errors = []
    for index, tokens in enumerate(patches_of(model, x).numpy()):
        logits, maps = twin(model, tokens)
        errors.append(relative_error(by_layer[1].logits[index], logits))
        for layer in (0, 1):
            theirs = maps[layer][:, int(target[index])]  # (h, P)
            errors.append(relative_error(by_layer[layer].attention[index].flatten(1), theirs))
    assert torch.equal(snippet.explain(model, x, target).attention, by_layer[1].attention)  # the last layer by default
    proof(
        ID, "logits and cross-attention", max(errors), at_most=1e-9, kind="parity", oracle="the decoder in plain loops"
    )


def test_attention_is_that_of_torch(proof):
    attend, oracle = rough_model().layers[0].search, nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(layer, kind) for layer in (attend.query, attend.key, attend.value)]
            getattr(oracle, f"in_proj_{kind}").copy_(torch.cat(parts))
            getattr(oracle.out_proj, kind).copy_(getattr(attend.out, kind))
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, n, 8, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
        ours, theirs = attend(query, key, value), oracle(query, key, value, average_attn_weights=False)
    error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    proof(ID, "attention", error, at_most=1e-12, kind="parity", oracle="torch.nn.MultiheadAttention")


def test_permuting_the_queries_permutes_the_classes(proof):
    """No part of the decoder but its query knows a class."""
    model, x, order = rough_model(), images(), torch.tensor([2, 4, 0, 1, 3])
    before = [snippet.explain(model, x, torch.full((2,), c)) for c in range(5)]
    with torch.no_grad():
        model.queries.copy_(model.queries[order].clone())
    errors = []
    for c in range(5):
        after = snippet.explain(model, x, torch.full((2,), c))
        errors.append(relative_error(after.logits, before[0].logits[:, order]))
        errors.append(relative_error(after.attention, before[order[c]].attention))
    what = "permuting the queries permutes logits and maps"
    proof(ID, what, max(errors), at_most=1e-9, kind="closed form")


def test_each_head_sums_to_one_and_the_map_is_their_mean(proof):
    found = snippet.explain(rough_model(), images())
    error = float((found.attention.sum((2, 3)) - 1).abs().max())
    proof(ID, "attention of a head sums to one", error, at_most=1e-12, kind="closed form")
    torch.testing.assert_close(found.heatmap(), sum(found.attention.unbind(1)) / 2)
    assert found.attention.shape == (2, 2, 2, 3)


def test_the_class_asked_about():
    model, x = rough_model(), images()
    predicted = model(x).argmax(-1)
    default = snippet.explain(model, x)
    assert torch.equal(default.attention, snippet.explain(model, x, predicted).attention)
    assert not torch.allclose(default.attention, snippet.explain(model, x, (predicted + 1) % 5).attention)
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))
    with pytest.raises(ValueError, match="layer 2 is out of range: the decoder has 2 layers"):
        snippet.explain(model, x, layer=2)


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match="has no class queries"):
        snippet.explain(tiny(1), images())


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    metadata = {"backbone": json.dumps(BACKBONE), "decoder": json.dumps(DECODER)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "x.safetensors", metadata)
    again, x = snippet.load_pretrained(tmp_path / "x.safetensors"), images().float()
    assert not again.training
    assert torch.equal(again(x), model(x))


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = close_to_card("intr-glyph", monkeypatch, within=0.05)
    oracle = "200 glyph scenes"
    ratio = measured["attention_on_creature"] / measured["attention_on_creature_chance"]
    what = "share of the true class's attention on patches of its creature, over chance"
    proof(ID, what, ratio, at_least=1.5, kind="ground truth", oracle=oracle)
    what = "of a query's attention on two creatures, the share on its own"
    proof(ID, what, measured["query_on_its_own_of_two"], at_least=0.55, kind="ground truth", oracle=oracle)


def test_an_absent_creature_finds_less(proof):
    """Where the class is in the picture its query attends more sharply than the query of a class that is not."""
    model, scenes = models.load("intr-glyph").model, glyphs.scenes(50, 31)
    x, label = glyphs.normalise(scenes.images), scenes.labels[:, 0]
    inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)) > 0
    present, absent = (snippet.explain(model, x, t).heatmap() for t in (label, (label + 1) % 12))
    gain = ((present - absent) * inside).sum((1, 2)).mean()
    what = "attention on the creature: its own query's less another's"
    proof(ID, what, gain, at_least=0.05, kind="ground truth", oracle="50 glyph scenes")

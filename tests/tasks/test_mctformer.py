"""MCTformer: class tokens, their attention and what refines it, against loops and true masks."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    masks_of_both,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    twin_block,
    weakly_supervised,
    weights,
)
from scipy.signal import correlate
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "mctformer"
snippet = load_module(ID)
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def rough_model(depth: int = 4) -> Any:
    """4 x 6 patches, two heads, five classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.ClassTokenTransformer(5, **(BACKBONE | {"depth": depth})), 4)


def images() -> torch.Tensor:
    return pictures(tiny(1, img_size=(32, 48)))


def twin(model: Any, image: torch.Tensor) -> dict[str, np.ndarray]:
    """Everything for one picture: tokens 0 to 4 are the classes, 5 to 28 the patches."""
    w, rows = weights(model), [weights(model)["cls_token"][0, 0], *weights(model)["reg_token"][0]]
    for i in range(4):
        for j in range(6):
            patch = image[:, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8].numpy()
            rows.append((w["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    stream, means = np.stack(rows) + w["pos_embed"][0], []
    for index in range(len(model.blocks)):
        record = twin_block(model, index, stream)
        stream = record["output"]
        means.append((record["attention"][0] + record["attention"][1]) / 2)  # over heads
    framed = np.zeros((8, 6, 8))  # a frame of zeros
    for p in range(24):
        framed[:, 1 + p // 6, 1 + p % 6] = stream[5 + p]
    kernels, bias = w["patch_head.weight"], w["patch_head.bias"]
    activation = [
        correlate(framed, kernel, mode="valid")[0].flatten() + b for kernel, b in zip(kernels, bias, strict=True)
    ]
    affinity = np.zeros((24, 24))
    for mean in means:
        affinity += mean[5:, 5:]
    return {
        "means": np.stack(means),
        "activation": np.stack(activation),
        "affinity": affinity,
        "logits": np.array([token.mean() for token in stream[:5]]),
    }


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_in_plain_loops(activation, refine, layers, proof):
    model, errors, targets = rough_model(), [], (3, 0)
    x = images()
    options = {"layers": layers, "activation": activation, "refine": refine}
    ours = snippet.explain(model, x, torch.tensor(targets), **options)
    for index, (image, target) in enumerate(zip(x, targets, strict=True)):
        found = twin(model, image)
        row = np.sum([mean[target, 5:] for mean in found["means"][-layers:]], 0)
        if activation:
            row = row * np.maximum(found["activation"][target], 0)
        if refine:
            row = np.array([sum(found["affinity"][p, q] * row[q] for q in range(24)) for p in range(24)])
        errors.append(relative_error(ours[index].flatten(), row))
        tokens, patches = model.both_logits(image[None])
        errors.append(relative_error(tokens[0].detach(), found["logits"]))
        errors.append(relative_error(patches[0].detach(), found["activation"].mean(1)))
    what = f"map of the last {layers} layers, activation {activation}, refinement {refine}"
    oracle = "transformer in plain loops, scipy.signal.correlate"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_uniform_attention_knows_no_place(proof):
    """With queries and keys of zero a token attends to all 29 alike, and refining gives all patches the same."""
    model, x = rough_model(), images()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
            block.attn.qkv.bias[:16] = 0
    target = torch.tensor([1, 4])
    activation = snippet.class_maps(model, x).activation[torch.arange(2), target]  # (B, 4, 6), rectified
    fused = snippet.explain(model, x, target, layers=2, refine=False)
    error = relative_error(fused, activation * 2 / 29)
    proof(ID, "uniform attention: activation times layers over tokens", error, at_most=1e-12, kind="closed form")
    refined = snippet.explain(model, x, target, layers=2)
    expected = (activation.sum((1, 2)) * 2 / 29 * 4 / 29)[:, None, None].expand_as(refined)
    error = relative_error(refined, expected)
    proof(ID, "uniform attention: the refined map is flat", error, at_most=1e-12, kind="closed form")


def test_exchanging_two_class_tokens_exchanges_their_maps(proof):
    """A class is its token: swap two of them, with positions and kernels, and the classes swap."""
    model, x, order = rough_model(), images(), torch.tensor([0, 3, 2, 1, 4])
    before = snippet.class_maps(model, x)
    with torch.no_grad():
        tokens = torch.cat([model.cls_token, model.reg_token], 1)[:, order]
        model.cls_token.copy_(tokens[:, :1])
        model.reg_token.copy_(tokens[:, 1:])
        model.pos_embed[:, :5] = model.pos_embed[:, :5][:, order]
        for parameter in model.patch_head.parameters():
            parameter.copy_(parameter[order].clone())
    after = snippet.class_maps(model, x)
    errors = [relative_error(after.logits, before.logits[:, order])]
    errors.append(relative_error(after.refined(after.fused()), before.refined(before.fused())[:, order]))
    proof(ID, "swapped class tokens swap logits and maps", max(errors), at_most=1e-10, kind="closed form")


def test_the_class_asked_about():
    model, x = rough_model(), images()
    predicted = model(x).argmax(-1)
    default = snippet.explain(model, x)
    assert torch.equal(default, snippet.explain(model, x, predicted))
    assert not torch.allclose(default, snippet.explain(model, x, (predicted + 1) % 5))
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))
    for layers in (0, 5):
        with pytest.raises(ValueError, match="layers must be 1 to 4"):
            snippet.explain(model, x, layers=layers)


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match="no class token for every class"):
        snippet.explain(tiny(3), pictures(tiny(3)))


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    assert torch.equal(again(images().float()), model(images().float()))


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = weakly_supervised(ID, monkeypatch)
    masks_of_both(ID, measured, proof, iou=0.4, gain=0.2)


def test_a_class_token_attends_to_its_own_creature(proof):
    """Of the attention that a token pays to both creatures, more than half falls on its own."""
    scenes = glyphs.scenes(100, 31, creatures=2)
    x, model = glyphs.normalise(scenes.images), models.load("mctformer-glyph").model
    attention = snippet.explain(model, x, scenes.labels[:, 0], activation=False, refine=False)
    own, other = (
        (attention * share).sum((1, 2)) for share in glyphs.patch_fraction(scenes.object_masks, (14, 14)).unbind(1)
    )
    what = "of a token's attention to two creatures, the share on its own"
    proof(ID, what, (own / (own + other)).mean(), at_least=0.55, kind="ground truth", oracle="100 glyph scenes")

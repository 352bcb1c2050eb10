"""TransCAM: a small Conformer written out a second time, and its maps against true masks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    layer_norm,
    masks_of_both,
    peaks_on_its_own,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    twin_block,
    twin_tokens,
    weakly_supervised,
    weights,
)
from scipy.signal import correlate
from scipy.special import erf
from vitx import load_module, models
from vitx.vit import UnsupportedModel

ID = "transcam"
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
    """4 x 6 patches, two heads, five classes, 8 and 16 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.Conformer(5, width=8, **(BACKBONE | {"depth": depth})), 4)


def images() -> torch.Tensor:
    return pictures(tiny(1, img_size=(32, 48)))


# --- a Conformer in numpy ------------------------------------------------------------------------------------------


def convolve(x: np.ndarray, w: dict, name: str, stride: int = 1, frame: int = 0) -> np.ndarray:
    framed = np.pad(x, ((0, 0), (frame, frame), (frame, frame)))
    planes = [correlate(framed, kernel, mode="valid")[0][::stride, ::stride] for kernel in w[f"{name}.weight"]]
    return np.stack(planes) + w.get(f"{name}.bias", np.zeros(len(planes)))[:, None, None]


def norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    scaled = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def positive(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def twin_convolutions(
    x: np.ndarray, w: dict, name: str, stride: int = 1, added: float | np.ndarray = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    hidden = positive(norm(convolve(x, w, f"{name}.reduce"), w, f"{name}.norms.0")) + added
    middle = positive(norm(convolve(hidden, w, f"{name}.spatial", stride, 1), w, f"{name}.norms.1"))
    wide = norm(convolve(middle, w, f"{name}.expand"), w, f"{name}.norms.2")
    if f"{name}.shortcut.0.weight" in w:
        x = norm(convolve(x, w, f"{name}.shortcut.0", stride), w, f"{name}.shortcut.1")
    return positive(wide + x), middle


def enlarged(x: np.ndarray, times: int) -> np.ndarray:
    return x.repeat(times, 1).repeat(times, 2)


def twin(model: Any, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activation maps (5, 24), attention among patches (24, 24) and logits (5,) of one picture."""
    w, depth = weights(model), len(model.blocks)
    stem = positive(norm(convolve(image.numpy(), w, "stem.0", 2, 3), w, "stem.1"))  # (8, 16, 24)
    framed = np.pad(stem, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    pooled = np.zeros((8, 8, 12))
    for i in range(8):
        for j in range(12):
            pooled[:, i, j] = framed[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    features = twin_convolutions(pooled, w, "first")[0]
    tokens, attention = twin_tokens(model, image), np.zeros((24, 24))
    for index in range(depth):
        if index:
            name, cells = f"couplings.{index - 1}", 2 if index < depth // 2 else 1
            stride = 2 if index == depth // 2 else 1
            features, middle = twin_convolutions(features, w, f"{name}.convolution", stride)
            local = convolve(middle, w, f"{name}.down.0")
            local = local.reshape(8, 4, cells, 6, cells).mean((2, 4)).reshape(8, 24).T  # (24, D)
            local = layer_norm(local, w[f"{name}.down_norm.weight"], w[f"{name}.down_norm.bias"])
            tokens = tokens.copy()
            tokens[1:] += local * 0.5 * (1 + erf(local / math.sqrt(2)))
        record = twin_block(model, index, tokens)
        tokens = record["output"]
        attention += (record["attention"][0, 1:, 1:] + record["attention"][1, 1:, 1:]) / 2
        if index:
            back = convolve(tokens[1:].T.reshape(8, 4, 6), w, f"{name}.up.0")
            back = enlarged(positive(norm(back, w, f"{name}.up.1")), cells)
            features = twin_convolutions(features, w, f"{name}.fusion", added=back)[0]
    activation = convolve(features, w, "activation_head", 1, 1).reshape(5, 24)
    final = layer_norm(tokens, w["norm.weight"], w["norm.bias"])[0]
    logits = activation.mean(1) + w["token_head.weight"] @ final + w["token_head.bias"]
    return activation, attention, logits


@pytest.mark.parametrize("depth", [2, 4])
def test_in_plain_loops(depth, proof):
    model, errors, targets = rough_model(depth), [], (3, 0)
    x = images()
    ours = snippet.explain(model, x, torch.tensor(targets))
    for index, (image, target) in enumerate(zip(x, targets, strict=True)):
        activation, attention, logits = twin(model, image)
        spread = [sum(attention[p, q] * activation[target, q] for q in range(24)) for p in range(24)]
        errors.append(relative_error(ours[index].flatten(), spread))
        errors.append(relative_error(model(image[None])[0].detach(), logits))
    oracle = "both branches in plain loops, scipy.signal.correlate"
    proof(ID, f"map and logits, depth {depth}", max(errors), at_most=1e-8, kind="parity", oracle=oracle)


def test_uniform_attention_knows_no_place(proof):
    """With queries and keys of zero a patch attends to all 25 tokens alike: every patch gets the sum of F, scaled."""
    model, x = rough_model(), images()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
            block.attn.qkv.bias[:16] = 0
    target = torch.tensor([1, 4])
    activation = snippet.class_maps(model, x).activation[torch.arange(2), target]
    ours = snippet.explain(model, x, target)
    expected = (activation.sum((1, 2)) * 4 / 25)[:, None, None].expand_as(ours)
    proof(ID, "uniform attention: a flat map", relative_error(ours, expected), at_most=1e-10, kind="closed form")


def test_closed_couplings_leave_the_transformer_alone(proof):
    """Where training starts, with the path to the tokens at zero, the tokens are those of the plain transformer."""
    model, plain = rough_model(), tiny(4, img_size=(32, 48))
    with torch.no_grad():
        for coupling in model.couplings:
            coupling.down_norm.weight.zero_()
            coupling.down_norm.bias.zero_()
    state = {key: value for key, value in plain.state_dict().items() if not key.startswith("head")}
    model.load_state_dict(state, strict=False)
    x = images()
    with torch.no_grad():
        error = relative_error(model.branches(x)[1], plain.forward_features(x))
    proof(
        ID, "closed couplings: tokens of the plain transformer", error, at_most=1e-12, kind="closed form", oracle="timm"
    )


def test_the_class_asked_about():
    model, x = rough_model(), images()
    predicted = model(x).argmax(-1)
    default = snippet.explain(model, x)
    assert torch.equal(default, snippet.explain(model, x, predicted))
    assert not torch.allclose(default, snippet.explain(model, x, (predicted + 1) % 5))
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([5, 0]))


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModel, match="no convolutional branch"):
        snippet.explain(tiny(1), pictures(tiny(1)))


def test_a_file_gives_back_its_model(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = snippet.Conformer(5, **BACKBONE).eval()
    again = read_back(snippet, model, {"backbone": BACKBONE, "num_classes": 5}, tmp_path)
    assert torch.equal(again(images().float()), model(images().float()))


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof, monkeypatch):
    measured = weakly_supervised(ID, monkeypatch)
    masks_of_both(ID, measured, proof, iou=0.25, gain=0.15)


def test_each_class_is_found_where_it_is(proof):
    """Of two creatures, the map of a class lies on its own: its peak is in its mask, not in the other's."""
    on_own = peaks_on_its_own(snippet.explain, models.load("transcam-glyph").model)
    what = "of two creatures, the map peaks on the one asked about"
    proof(ID, what, on_own, at_least=0.8, kind="ground truth", oracle="100 glyph scenes")

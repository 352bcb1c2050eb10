"""Models that show mistakes, and a Vision Transformer written out in plain numpy and loops."""

import importlib.util
import json
import math
import sys
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from scipy.special import erf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx import ATLAS, catalog, glyphs, load_module, models


def roughen(model: nn.Module, seed: int = 0) -> Any:
    """The model in float64 and eval mode with random biases and norms and enlarged qkv weights.

    timm's initialisation has zero biases, unit norms and nearly uniform attention, which hide mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if ".norm" in name or name.startswith(("norm", "fc_norm")) or "gamma" in name:
                parameter += 0.3 * noise
            elif "qkv.weight" in name:
                parameter.copy_(3 * noise / math.sqrt(parameter.shape[-1]))
            elif name.endswith("weight") and parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter += 0.3 * noise
    return model


def tiny(depth: int = 2, seed: int = 0, img_size: int | tuple[int, int] = 16, **options: Any) -> Any:
    """A rough class-token model of 16 x 16 pixels, four patches, two heads, dimension 8, five classes."""
    settings: dict[str, Any] = {"patch_size": 8, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return roughen(VisionTransformer(img_size=img_size, depth=depth, **(settings | options)), seed)


def pictures(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """Random normalised pictures (B, 3, H, W) of the size and dtype of the model."""
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)  # type: ignore[misc]


# Architectures that every method must either explain or refuse in a sentence.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {}),
    "deit_tiny_distilled_patch16_224": ("deit_tiny_distilled_patch16_224", {}),
    "registers and layer scale": ("vit_tiny_patch16_224", {"reg_tokens": 4, "init_values": 0.1}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no class token, average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "no class token, attention pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "registers, qk-norm, gap": ("vit_pwee_patch16_reg1_gap_256", {}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
}


def variant(name: str, **options: Any) -> Any:
    """A rough float64 model of ``VARIANTS``, four blocks deep, on 64 x 64 pixels."""
    architecture, settings = VARIANTS[name]
    settings: dict[str, Any] = {"img_size": 64, "depth": 4, "num_classes": 7} | settings | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(timm.create_model(architecture, pretrained=False, **settings))


TWO_TOWER = ("a cat", "a dog", "a red dog")
# What explain(model, images, target) of a two-tower model says of captions for three pictures, ``tiny_two_tower``'s.
REFUSED_CAPTIONS: list[tuple[Any, str]] = [
    (["a rde cat"] * 3, "does not know the word 'rde'; nearest: red"),
    (["a cat"], "there are 1 captions for 3 pictures"),
    (["a a a a a a"] * 3, "a caption has 6 words, and the text tower reads at most 5"),
    (torch.tensor([0, 3, 0]), "class 3 is out of range"),
]


def tiny_two_tower(depth: int = 3, text_depth: int = 2, **options: Any) -> Any:
    """A two-tower model of ``tiny`` with six outputs and of a text tower that knows five words, in double precision."""
    snippet = load_module("generic-attention-two-tower")
    image = tiny(depth, img_size=(16, 24), num_classes=6, **options)
    words = ("a", "cat", "dog", "red", "blue")
    with torch.random.fork_rng(devices=[]):
        text = snippet.TextTower(words=words, length=7, width=8, depth=text_depth, heads=2, outputs=6)
        return snippet.TwoTower(image, roughen(text, 1), TWO_TOWER).double().eval()


def scenes_of_two(count: int, seed: int = 33) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """The model two-tower-glyph, and ``count`` scenes of two creatures that are asked for in turn.

    Returns:
        model; images (2 count, 3, 112, 112); the class asked for (2 count,); patches (2 count, 196) bool of that
        creature and of the other one, without those that both touch.
    """
    scenes = glyphs.scenes(count, seed, creatures=2)
    images = glyphs.normalise(scenes.images).repeat(2, 1, 1, 1)
    inside = (glyphs.patch_fraction(scenes.object_masks, (14, 14)) > 0).flatten(2)
    named, other = torch.cat([inside[:, 0], inside[:, 1]]), torch.cat([inside[:, 1], inside[:, 0]])
    return models.load("two-tower-glyph").model, images, scenes.labels.T.flatten(), named & ~other, other & ~named


def area_under_curve(maps: Tensor, named: Tensor) -> Tensor:
    """(n,) area under the ROC curve of maps (n, gh, gw) or (n, P) for the named patches (n, P); 1/2 by chance."""
    ranks = maps.flatten(1).argsort(1).argsort(1).double() + 1
    inside = named.sum(1)
    return ((ranks * named).sum(1) - inside * (inside + 1) / 2) / (inside * (named.shape[1] - inside))


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest magnitude of the oracle."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# --- the transformer in plain loops --------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def twin_tokens(model: Any, image: Tensor) -> np.ndarray:
    """(N, D): patches cut out, projected and given positions one by one."""
    w, size = weights(model), model.patch_embed.patch_size[0]
    gh, gw = model.patch_embed.grid_size
    rows = [w["cls_token"][0, 0]]
    for i in range(gh):
        for j in range(gw):
            patch = image[:, i * size : (i + 1) * size, j * size : (j + 1) * size].numpy()
            rows.append((w["patch_embed.proj.weight"] * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    return np.stack(rows) + w["pos_embed"][0]


def twin_block(model: Any, index: int, x: np.ndarray, change: tuple | None = None) -> dict[str, np.ndarray]:
    """All that one block computes for one picture; ``change`` = (head, query, key, amount) acts on the attention."""
    w = {n.removeprefix(f"blocks.{index}."): t for n, t in weights(model).items() if n.startswith(f"blocks.{index}.")}
    heads = model.blocks[index].attn.num_heads
    width = x.shape[1] // heads
    normed = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
    qkv = normed @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    attention = np.zeros((heads, len(x), len(x)))
    mixed = np.zeros_like(x)
    for m in range(heads):
        q, k, v = (qkv[:, p * heads * width + m * width : p * heads * width + (m + 1) * width] for p in range(3))
        for i in range(len(x)):
            scores = [math.exp(float(q[i] @ k[j]) / math.sqrt(width)) for j in range(len(x))]
            attention[m, i] = np.array(scores) / sum(scores)
            if change is not None and change[:2] == (m, i):
                attention[m, i, change[2]] += change[3]
            for j in range(len(x)):
                mixed[i, m * width : (m + 1) * width] += attention[m, i, j] * v[j]
    middle = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    mlp_input = layer_norm(middle, w["norm2.weight"], w["norm2.bias"])
    hidden = mlp_input @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    activated = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    output = middle + activated @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return {
        "input": x,
        "normed": normed,
        "qkv": qkv,
        "attention": attention,
        "mixed": mixed,
        "middle": middle,
        "mlp_input": mlp_input,
        "activated": activated,
        "output": output,
    }


def twin_forward(
    model: Any, image: Tensor, layer: int = -1, change: tuple | None = None
) -> tuple[list[dict], np.ndarray]:
    """Records of all blocks, and the logits, for one picture; ``change`` acts in block ``layer``."""
    x, records, w = twin_tokens(model, image), [], weights(model)
    for index in range(len(model.blocks)):
        records.append(twin_block(model, index, x, change if index == layer else None))
        x = records[-1]["output"]
    final = layer_norm(x, w["norm.weight"], w["norm.bias"])
    return records, final[0] @ w["head.weight"].T + w["head.bias"]


def twin_attention_gradients(model: Any, image: Tensor, target: int, step: float = 1e-5) -> list[np.ndarray]:
    """d logit / d attention for every layer, head, query and key, by central differences."""
    records, _ = twin_forward(model, image)
    gradients = []
    for layer, record in enumerate(records):
        gradient = np.zeros_like(record["attention"])
        for place in np.ndindex(gradient.shape):
            up, down = (twin_forward(model, image, layer, (*place, sign * step))[1][target] for sign in (1, -1))
            gradient[place] = (up - down) / (2 * step)
        gradients.append(gradient)
    return gradients


def twin_last_row_gradient(model: Any, image: Tensor, target: int, step: float = 1e-5) -> np.ndarray:
    """d logit / d attention of the class token in the last layer, (h, N), by central differences."""
    attention = twin_forward(model, image)[0][-1]["attention"]  # (h, N, N)
    gradient, last = np.zeros((len(attention), attention.shape[-1])), len(model.blocks) - 1
    for head, key in np.ndindex(gradient.shape):
        up, down = (twin_forward(model, image, last, (head, 0, key, sign * step))[1][target] for sign in (1, -1))
        gradient[head, key] = (up - down) / (2 * step)
    return gradient


def linear_in_features() -> Any:
    """One block of uniform attention and average pooling: the logits are linear in the output of its norm1."""
    model = tiny(1, class_token=False, global_pool="avg")
    with torch.no_grad():
        block = model.blocks[0]
        block.norm1, model.fc_norm = nn.Identity(), nn.Identity()
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        block.attn.qkv.weight[16:] = torch.eye(8)  # no queries, no keys; values are the features themselves
        block.attn.proj.weight.copy_(torch.eye(8))
    return model


def close_to_card(model: str, monkeypatch: Any, within: float) -> dict[str, float]:
    """What the training script of a model measures on 200 unseen scenes; each metric as near as that to the card's."""
    script = training_script(model.replace("-", "_"))
    for function in (script.measure, getattr(script, "measure_pruned", script.measure)):
        monkeypatch.setitem(function.__globals__, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(models.load(model).model, 200)
    for name, value in measured.items():
        assert abs(value - catalog.load().models[model].metrics[name]) < within, name
    return measured


def weakly_supervised(id: str, monkeypatch: Any) -> dict[str, float]:
    """What the training script of a weakly supervised model measures on 200 unseen scenes, close to its card."""
    script, model = training_script("weakly_supervised_glyph"), f"{id}-glyph"
    monkeypatch.setattr(script, "UNSEEN", 800_000)  # a seed of neither the training nor the card
    measured = script.measure(id, models.load(model).model, 200)
    for name, value in measured.items():
        assert abs(value - catalog.load().models[model].metrics[name]) < 0.06, name
    return measured


def masks_of_both(id: str, measured: dict[str, float], proof: Any, iou: float, gain: float) -> None:
    """Prove the overlap of maps and creatures: at least ``iou``, and ``gain`` above that of another scene's maps."""
    for creatures in (1, 2):
        what, oracle = f"mask of the class asked about, {creatures} in a scene: IoU", "200 glyph scenes"
        value = measured[f"iou_{creatures}_{id}"]
        proof(id, what, value, at_least=iou, kind="ground truth", oracle=oracle)
        more = value - measured[f"iou_{creatures}_chance"]
        proof(id, f"{what} above that of another scene's map", more, at_least=gain, kind="ground truth", oracle=oracle)


def peaks_on_its_own(explain: Any, model: Any) -> Tensor:
    """How often, of two creatures, the map of a class peaks in the mask of its own and not in the other's."""
    scenes = glyphs.scenes(100, 31, creatures=2)
    peaks = explain(model, glyphs.normalise(scenes.images), scenes.labels[:, 0]).flatten(1).argmax(1, keepdim=True)
    own, other = glyphs.patch_fraction(scenes.object_masks, (14, 14)).flatten(2).unbind(1)
    return (own.gather(1, peaks) > other.gather(1, peaks)).float().mean()


def read_back(snippet: Any, model: nn.Module, about: dict[str, Any], folder: Any) -> Any:
    """What ``snippet.load_pretrained`` makes of a file with the weights of the model and JSON metadata."""
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "x.safetensors", {key: json.dumps(value) for key, value in about.items()})
    again = snippet.load_pretrained(folder / "x.safetensors")
    assert not again.training
    return again


def tiny_detector(img_size: tuple[int, int], seed: int = 0) -> Any:
    """A rough detector of patches of 8 pixels with three queries, five classes and two layers on either side."""
    encoder: dict[str, Any] = {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VisionTransformer(img_size=img_size, **encoder, num_classes=0)
        detector = load_module("generic-attention-detr").Detector
        return roughen(detector(network, classes=5, queries=3, layers=2, heads=2), seed)


def training_script(name: str) -> Any:
    """The script snippets/models/train_<name>.py as a module, which may import the scripts beside it."""
    folder = ATLAS / "snippets" / "models"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"train_{name}", folder / f"train_{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))

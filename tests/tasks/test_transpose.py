"""Keypoints and their dependency areas: against loops, against derivatives, against the true parts."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    layer_norm,
    pictures,
    read_back,
    relative_error,
    roughen,
    tiny,
    training_script,
    twin_block,
    twin_tokens,
    weights,
)
from scipy import ndimage
from vitx import catalog, glyphs, load_module, metrics, models
from vitx.vit import UnsupportedModel, capture

ID = "transpose"
snippet = load_module(ID)
NAMES = ("head", "hand", "foot")
BACKBONE: dict[str, Any] = {
    "img_size": [32, 48],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def rough_model(**options: Any) -> Any:
    """4 x 6 patches, two heads, three keypoints."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return roughen(snippet.PoseTransformer(NAMES, **(BACKBONE | options)), 5)


def images(batch: int = 3) -> torch.Tensor:
    return pictures(tiny(1, img_size=(32, 48)), batch)


def twin(model: Any, image: torch.Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """Heat maps (3, 8, 12) and attention of every layer, (24, 24) among patches, of one picture."""
    w, stream, attention = weights(model), twin_tokens(model, image), []
    for index in range(len(model.blocks)):
        record = twin_block(model, index, stream)
        stream = record["output"]
        attention.append((record["attention"][0] + record["attention"][1])[1:, 1:] / 2)
    tokens = layer_norm(stream, w["norm.weight"], w["norm.bias"])[1:]
    h = np.zeros((3, 8, 12))
    for k, y, x in np.ndindex(h.shape):
        column = w["keypoint_head.weight"][:, k, y % 2, x % 2]
        h[k, y, x] = tokens[(y // 2) * 6 + x // 2] @ column + w["keypoint_head.bias"][k]
    return h, attention


@pytest.mark.parametrize(("layer", "mode"), [(-1, "dependency"), (0, "dependency"), (1, "affect")])
def test_in_plain_loops(layer, mode, proof):
    model, x, errors = rough_model(), images(), []
    found = snippet.explain(model, x, layer=layer, mode=mode)
    places = set()
    for row, image in enumerate(x):
        h, attention = twin(model, image)
        for k in range(3):
            y, column = np.unravel_index(h[k].argmax(), h[k].shape)
            assert found.places[row, k].tolist() == [4 * column + 2, 4 * y + 2]
            patch = (y // 2) * 6 + column // 2
            places.add(int(patch))
            area = attention[layer][patch] if mode == "dependency" else attention[layer][:, patch]
            errors.append(relative_error(found.attention[row, k], area.reshape(4, 6)))
            errors.append(abs(float(found.scores[row, k]) - h[k].max()))
    assert len(places) > 3  # else a wrong place could go unseen
    oracle = "transformer in plain loops"
    proof(ID, f"areas and heights, layer {layer}, {mode}", max(errors), at_most=1e-9, kind="parity", oracle=oracle)


def test_the_maximum_responds_to_values_by_its_area(proof):
    """d h / d v_j is the attention of place and j times a factor that is the same for all j, in every head."""
    model, x, errors = rough_model(), images(1), []
    found = snippet.explain(model, x)
    with torch.enable_grad(), capture(model, "attention", "attn.qkv", "attn.proj.input") as record:
        h = model.heatmaps(model.forward_features(x))
    strengths = []
    for k in range(3):
        top = h[0, k].max()
        read = record["attn.qkv"][-1], record["attn.proj.input"][-1]
        by_qkv, by_mixed = torch.autograd.grad(top, read, retain_graph=True)
        by_values = by_qkv[0].unflatten(-1, (3, 2, 4))[1:, 2]  # (P, h, d)
        column, y = ((found.places[0, k] - 2) / 4).long().tolist()
        patch = (y // 2) * 6 + column // 2
        factor = by_mixed[0, 1 + patch].unflatten(-1, (2, 4))  # (h, d): g
        rows = record["attention"][-1][0, :, 1 + patch, 1:].T  # (P, h)
        errors.append(relative_error(by_values.detach(), (rows[..., None] * factor).detach()))
        errors.append(relative_error(found.attention[0, k].flatten(), rows.mean(1).detach()))
        strengths.append(float(factor.norm()))
    assert min(strengths) > 1e-3
    check = "derivative of a keypoint's height by values: attention times a factor of the place"
    proof(ID, check, max(errors), at_most=1e-12, kind="closed form", oracle="autograd")


def test_a_cell_reads_one_patch():
    model = rough_model()
    tokens = torch.randn(1, 25, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = model.heatmaps(tokens)
    tokens[0, 1 + 2 * 6 + 3] += 1  # the patch in row 2, column 3
    changed = (model.heatmaps(tokens) != before)[0].any(0)  # (8, 12)
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:6, 6:8] = True
    assert torch.equal(changed, expected)
    tokens[0, 0] += 1  # the class token takes no part
    assert torch.equal((model.heatmaps(tokens) != before)[0].any(0), expected)


def test_uniform_attention_depends_on_all_places_alike(proof):
    model = rough_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
            block.attn.qkv.bias[:16] = 0
    error = relative_error(snippet.explain(model, images()).attention, np.full((3, 3, 4, 6), 1 / 25))
    proof(ID, "uniform attention: one over the number of tokens", error, at_most=1e-12, kind="closed form")


def test_the_keypoint_asked_for():
    model, x = rough_model(), images()
    found = snippet.explain(model, x)
    assert torch.equal(found.chosen, model(x).argmax(1))
    assert torch.allclose(found.scores, model(x))
    for k in range(3):
        asked = snippet.explain(model, x, torch.full((3,), k))
        assert torch.equal(asked.heatmap(), found.attention[:, k])
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 2"):
        snippet.explain(model, x, torch.tensor([0, 1, 3]))


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="no keypoint heat maps"):
        snippet.explain(tiny(1), pictures(tiny(1)))
    with pytest.raises(ValueError, match="layer 2 is out of range: the model has 2 blocks"):
        snippet.explain(rough_model(), images(), layer=2)
    with pytest.raises(ValueError, match='"dependency" or "affect"'):
        snippet.explain(rough_model(), images(), mode="both")


def test_centres_are_centres_of_mass(proof):
    masks = glyphs.scenes(4, 21).part_masks[:, 0, :, :, :100]  # (4, 5, 112, 100), not square
    found, errors = snippet.centres(masks), []
    assert masks.flatten(2).any(2).all()
    for scene, part in np.ndindex(4, 5):
        y, x = np.array(ndimage.center_of_mass(masks[scene, part].numpy())) + 0.5
        errors.append(np.abs(found[scene, part].numpy() - [x, y]).max())
    oracle = "scipy.ndimage.center_of_mass"
    proof(ID, "middles of parts, in pixels", max(errors), at_most=1e-3, kind="parity", oracle=oracle)


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    again = read_back(snippet, model, {"backbone": BACKBONE, "keypoints": NAMES}, tmp_path)
    assert again.class_names == NAMES
    assert torch.equal(again(images().float()), model(images().float()))


def test_what_the_training_aims_at():
    """A bell of height 1 at the keypoint, whose place is read back to within half a cell."""
    script = training_script("pose_glyph")
    places = torch.tensor([[[18.0, 34.0], [70.0, 5.0]]])
    bells = script.bells(places, 28)
    assert bells.shape == (1, 2, 28, 28)
    assert float(bells[0, 0, 8, 4]) == 1  # rows are y
    best = bells.flatten(2).argmax(2)
    found = torch.stack([best % 28, best // 28], -1) * 4 + 2
    assert float((found - places).abs().max()) <= 2


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_scenes(proof):
    script, card = training_script("pose_glyph"), catalog.load().models["pose-glyph"].metrics
    scenes = glyphs.scenes(200, 800_000)
    found = script.means({key: [value] for key, value in script.score(models.load("pose-glyph").model, scenes).items()})
    assert found.keys() == card.keys()
    where = "200 unseen scenes"
    pixels = max(abs(found[key] - card[key]) for key in ("error", "error_crest", "error_tail"))
    proof(ID, "keypoint errors of the card, in pixels", pixels, at_most=0.8, kind="ground truth", oracle=where)
    shares = max(abs(found[key] - card[key]) for key in ("pck", "own_part", "own_part_other", "creature"))
    proof(ID, "shares of the card", shares, at_most=0.05, kind="ground truth", oracle=where)

    proof(ID, "mean error of a keypoint, in pixels", found["error"], at_most=6, kind="ground truth", oracle=where)
    proof(
        ID,
        "error over that of the middle of the creature's box",
        found["error"] / found["error_box"],
        at_most=0.5,
        kind="ground truth",
        oracle=where,
    )
    check = "keypoints found (PCK at a fifth of the radius)"
    proof(ID, check, found["pck"], at_least=0.6, kind="ground truth", oracle=where)
    assert found["pck_chance"] < 0.05
    check = "share of the dependency area on the creature, over an even spread"
    ratio = found["creature"] / found["creature_uniform"]
    proof(ID, check, ratio, at_least=3, kind="ground truth", oracle=where)
    check = "share of the area on its own part, over that of the other keypoints' areas"
    ratio = found["own_part"] / found["own_part_other"]
    proof(ID, check, ratio, at_least=1.3, kind="ground truth", oracle=where)


def test_an_area_moves_with_its_creature(proof):
    """The area of a keypoint lies on its part in its own scene, and hardly in another."""
    scenes = glyphs.scenes(40, 800_001)
    areas = snippet.explain(models.load("pose-glyph").model, glyphs.normalise(scenes.images)).attention  # type: ignore
    truth = glyphs.patch_fraction(scenes.part_masks[:, 0], (14, 14))
    own, other = (metrics.mass_inside(m.flatten(0, 1), truth.flatten(0, 1)).mean() for m in (areas, areas.roll(1, 0)))
    check = "share on the own part, over that of another scene's area"
    proof(ID, check, own / other, at_least=2, kind="ground truth", oracle="40 unseen scenes")

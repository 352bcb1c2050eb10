"""Relevance in space and in time: against numpy and loops, by its identities, and against forgeries that are known."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_norm, pictures, read_back, relative_error, roughen, tiny, training_script, weights
from scipy.special import erf, softmax
from vitx import catalog, glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "istvt"
snippet = load_module(ID)
EXTRACTOR: dict[str, Any] = {
    "img_size": [16, 24],
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2,
}
ARGUMENTS: dict[str, Any] = {"class_names": ("a", "b", "c"), "frames": 4, "depth": 2, "extractor": EXTRACTOR}


def rough_model(seed: int = 3, **options: Any) -> Any:
    """Four frames of 2 x 3 patches, two space-time blocks, two heads, three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = roughen(snippet.VideoTransformer(**ARGUMENTS | options), seed)
    with torch.no_grad():
        for block in model.blocks:
            block.qk.weight *= 2
    return model


def clips(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return pictures(tiny(1, img_size=(16, 24)), 4 * batch, seed).unflatten(0, (batch, 4))


# --- a twin in numpy -----------------------------------------------------------------------------------------------


def block_weights(model: Any, index: int) -> dict[str, np.ndarray]:
    prefix = f"blocks.{index}."
    return {name.removeprefix(prefix): value for name, value in weights(model).items() if name.startswith(prefix)}


def twin_block(w: dict[str, np.ndarray], x: np.ndarray, change: tuple | None = None) -> dict[str, np.ndarray]:
    """One block for a table x (S, N, 8); change = ("time" or "space", place in its attention, amount)."""
    z = layer_norm(x, w["norm_t.weight"], w["norm_t.bias"])
    r = z.copy()
    for t in range(2, len(z)):  # 0 is the temporal token, 1 the first frame
        r[t] = z[t] - z[t - 1]
    q, k = (r @ w["qk.weight"].T)[..., :8], (r @ w["qk.weight"].T)[..., 8:]
    v = z @ w["v.weight"].T
    time, u = np.zeros((2, x.shape[1], len(x), len(x))), np.zeros_like(x)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for n in range(x.shape[1]):
            time[head, n] = softmax(q[:, n, part] @ k[:, n, part].T / 2, -1)
            if change is not None and change[0] == "time" and change[1][:2] == (head, n):
                time[head, n][change[1][2:]] += change[2]
            u[:, n, part] = time[head, n] @ v[:, n, part]
    y = layer_norm(u @ w["proj_t.weight"].T + w["proj_t.bias"], w["norm_s.weight"], w["norm_s.bias"])
    qkv = y @ w["qkv.weight"].T + w["qkv.bias"]
    space, mixed = np.zeros((2, len(x), x.shape[1], x.shape[1])), np.zeros_like(x)
    for head in range(2):
        p, o, e = (slice(8 * kind + 4 * head, 8 * kind + 4 * head + 4) for kind in range(3))
        for s in range(len(x)):
            space[head, s] = softmax(qkv[s, :, p] @ qkv[s, :, o].T / 2, -1)
            if change is not None and change[0] == "space" and change[1][:2] == (head, s):
                space[head, s][change[1][2:]] += change[2]
            mixed[s, :, p] = space[head, s] @ qkv[s, :, e]
    middle = x + mixed @ w["proj_s.weight"].T + w["proj_s.bias"]
    inner = layer_norm(middle, w["norm_m.weight"], w["norm_m.bias"])
    hidden = inner @ w["fc1.weight"].T + w["fc1.bias"]
    hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    output = middle + hidden @ w["fc2.weight"].T + w["fc2.bias"]
    return {
        "x": x, "z": z, "r": r, "q": q, "k": k, "v": v, "time": time, "u": u, "y": y, "qkv": qkv, "space": space,
        "w": mixed, "middle": middle, "inner": inner, "hidden": hidden, "output": output,
    }  # fmt: skip


def twin_forward(
    model: Any, table: np.ndarray, layer: int = 0, change: tuple | None = None
) -> tuple[list[dict], np.ndarray]:
    """Records of all blocks from ``layer`` on, which reads the table, and the logits."""
    records, w = [], weights(model)
    for index in range(layer, len(model.blocks)):
        records.append(twin_block(block_weights(model, index), table, change if index == layer else None))
        table = records[-1]["output"]
    final = layer_norm(table[0, 0], w["norm.weight"], w["norm.bias"])
    return records, final @ w["head.weight"].T + w["head.bias"]


def linear(relevance: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Positive terms share the relevance of their sum: (..., out) to (..., in), output by output."""
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        for i, row in enumerate(weight):
            terms = np.maximum(x[place] * row, 0)
            if terms.sum() > 0:
                result[place] += terms / (terms.sum() + 1e-9) * relevance[(*place, i)]
    return result


def addition(relevance: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    of_a, of_b = a * relevance / (a + b + 1e-9), b * relevance / (a + b + 1e-9)
    size_a, size_b = abs(of_a.sum()), abs(of_b.sum())
    whole = size_a + size_b + 1e-9
    return (
        of_a * size_a / whole * relevance.sum() / (of_a.sum() + 1e-9),
        of_b * size_b / whole * relevance.sum() / (of_b.sum() + 1e-9),
    )


def product(relevance: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relevance of both operands of left @ right, term by term, each of them half."""
    of_left, of_right = np.zeros_like(left), np.zeros_like(right)
    for i, j in np.ndindex(relevance.shape):
        total = float(left[i] @ right[:, j])
        for n in range(left.shape[1]):
            share = left[i, n] * right[n, j] / (total + 1e-9) * relevance[i, j] / 2
            of_left[i, n] += share
            of_right[n, j] += share
    return of_left, of_right


def twin_relevance(w: dict[str, np.ndarray], s: dict[str, np.ndarray], relevance: np.ndarray) -> tuple:
    """Relevance of both attentions and of the block's input."""
    stream, branch = addition(relevance, s["middle"], s["output"] - s["middle"])
    branch = linear(linear(branch, s["hidden"], w["fc2.weight"]), s["inner"], w["fc1.weight"])
    stream, branch = addition(stream + branch, s["x"], s["middle"] - s["x"])
    branch = linear(branch, s["w"], w["proj_s.weight"])
    of_space, of_qkv = np.zeros_like(s["space"]), np.zeros_like(s["qkv"])
    for head, frame in np.ndindex(s["space"].shape[:2]):
        p, o, e = (slice(8 * kind + 4 * head, 8 * kind + 4 * head + 4) for kind in range(3))
        of_space[head, frame], of_qkv[frame, :, e] = product(
            branch[frame, :, p], s["space"][head, frame], s["qkv"][frame, :, e]
        )
        of_qkv[frame, :, p], of_k = product(of_space[head, frame], s["qkv"][frame, :, p], s["qkv"][frame, :, o].T)
        of_qkv[frame, :, o] = of_k.T
    branch = linear(linear(of_qkv, s["y"], w["qkv.weight"]), s["u"], w["proj_t.weight"])
    of_time, of_v = np.zeros_like(s["time"]), np.zeros_like(s["v"])
    of_q, of_k = np.zeros_like(s["q"]), np.zeros_like(s["k"])
    for head, n in np.ndindex(s["time"].shape[:2]):
        p = slice(4 * head, 4 * head + 4)
        of_time[head, n], of_v[:, n, p] = product(branch[:, n, p], s["time"][head, n], s["v"][:, n, p])
        of_q[:, n, p], transposed = product(of_time[head, n], s["q"][:, n, p], s["k"][:, n, p].T)
        of_k[:, n, p] = transposed.T
    of_r = linear(np.concatenate([of_q, of_k], -1), s["r"], w["qk.weight"])
    of_z = linear(of_v, s["z"], w["v.weight"])
    of_z[:2] += of_r[:2]
    now, before = addition(of_r[2:], s["z"][2:], -s["z"][1:-1])
    for t in range(2, len(of_z)):
        of_z[t] += now[t - 2]
        of_z[t - 1] += before[t - 2]
    return of_time, of_space, stream + of_z


def twin_gradient(model: Any, table: np.ndarray, layer: int, kind: str, shape: tuple, target: int) -> np.ndarray:
    """By central differences; the table is the input of the layer."""
    gradient = np.zeros(shape)
    for place in np.ndindex(*shape):
        up, down = (twin_forward(model, table, layer, (kind, place, sign * 1e-5))[1][target] for sign in (1, -1))
        gradient[place] = (up - down) / 2e-5
    return gradient


def test_in_numpy_and_loops(proof):
    model, x, target = rough_model(), clips(1), 1
    with torch.no_grad():
        table = model.table(model.features(x))[0].numpy()
    records, logits = twin_forward(model, table)
    found = snippet.explain(model, x, torch.tensor([target]))
    errors = [relative_error(found.logits[0], logits)]
    w = weights(model)
    relevance = np.zeros_like(table)
    one = np.eye(3)[target]
    final = layer_norm(records[-1]["output"][0, 0], w["norm.weight"], w["norm.bias"])
    relevance[0, 0] = linear(one[None], final[None], w["head.weight"])[0]
    time, space = np.tile(np.eye(5), (7, 1, 1)), np.tile(np.eye(7), (5, 1, 1))  # C of every place, of every frame
    for index in (1, 0):
        of_time, of_space, relevance = twin_relevance(block_weights(model, index), records[index], relevance)
        for kind, matrix, of_matrix in (("time", time, of_time), ("space", space, of_space)):
            gradient = twin_gradient(model, records[index]["x"], index, kind, of_matrix.shape, target)
            cam = np.maximum(gradient * of_matrix, 0).mean(0)
            for group in range(len(matrix)):
                matrix[group] = matrix[group] @ (np.eye(len(cam[group])) + cam[group])
    expected_space = space[1:, 0, 1:].reshape(4, 2, 3)
    expected_time = time[1:, 0, 1:].T.reshape(4, 2, 3)
    assert np.abs(expected_space).max() > 1e-4
    assert np.abs(expected_time).max() > 1e-4
    errors.append(relative_error(found.spatial[0], expected_space))
    errors.append(relative_error(found.temporal[0], expected_time))
    oracle = "forward in numpy, relevance in plain loops, central differences"
    proof(ID, "spatial and temporal relevance, logits", max(errors), at_most=1e-5, kind="parity", oracle=oracle)


# --- identities ----------------------------------------------------------------------------------------------------


def test_relevance_is_kept(proof):
    """Every block hands back what it received: the class holds one, and so does the table that enters.

    In a wide model: with few channels an output may have no positive term at all, and its relevance goes nowhere.
    """
    model, errors = rough_model(extractor=EXTRACTOR | {"embed_dim": 64}), []
    with torch.no_grad():
        table, done = model.table(model.features(clips(3))), []
        for block in model.blocks:
            done.append(block(table))
            table = done[-1].output
        relevance = snippet.class_relevance(model, table, torch.tensor([0, 1, 2]))
        for block, steps in zip(reversed(model.blocks), reversed(done), strict=True):
            _, _, relevance = snippet.block_relevance(block, steps, relevance)
            errors.append(float((relevance.sum((1, 2, 3)) - 1).abs().max()))
    proof(ID, "sum of relevance before every block, less one", max(errors), at_most=1e-4, kind="closed form")


def test_self_subtract_is_blind_to_what_stands_still(proof):
    """Without positions in time, all frames but the first of a still clip are alike to temporal attention."""
    model = rough_model()
    x = clips(1)[:, :1].expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        model.time_embed.zero_()
        attention = model.blocks[0](model.table(model.features(x))).temporal[3]  # (B, h, N, S, S)
        later = attention[..., 2:]
        first = float((attention[..., 1] - attention[..., 2]).abs().max())
        error = float((later - later[..., :1]).abs().max())
    assert first > 1e-3
    proof(ID, "attention to frames of a still clip, differences", error, at_most=1e-14, kind="closed form")


def test_the_two_attentions_are_decomposed():
    """Along time a place sees only itself; along space a frame sees only itself."""
    model = rough_model()
    with torch.no_grad():
        table = model.table(model.features(clips(1)))
        before = model.blocks[0](table)
        moved = table.clone()
        moved[0, 2, 4] += 1
        after = model.blocks[0](moved)
    places = (after.u != before.u)[0].any(-1)  # (S, N)
    assert places[:, 4].all()
    assert not places[:, [0, 1, 2, 3, 5, 6]].any()
    attention = (after.temporal[3] != before.temporal[3])[0].flatten(2).any(2).any(0)  # (N,)
    assert attention.tolist() == [n == 4 for n in range(7)]


def test_a_picture_is_a_clip_that_stands_still():
    model, x = rough_model(), clips(2)
    still, clip = (snippet.explain(model, images) for images in (x[:, 0], x[:, :1].expand(-1, 4, -1, -1, -1)))
    assert torch.equal(still.temporal, clip.temporal)
    assert torch.equal(still.spatial, clip.spatial)
    assert torch.equal(still.heatmap(), clip.temporal.sum(1))


def test_the_class_asked_about():
    model, x = rough_model(), clips(2)
    default = snippet.explain(model, x)
    assert torch.equal(default.temporal, snippet.explain(model, x, model(x).argmax(1)).temporal)
    other = snippet.explain(model, x, (model(x).argmax(1) + 1) % 3)
    assert not torch.allclose(default.temporal, other.temporal)
    assert not torch.allclose(default.spatial, other.spatial)
    frozen = rough_model().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(snippet.explain(frozen, x).spatial, default.spatial)


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="no attention along time"):
        snippet.explain(tiny(1), pictures(tiny(1)))
    with pytest.raises(ValueError, match=r"must have shape \(B, 4, 3, H, W\)"):
        snippet.explain(rough_model(), clips(1)[:, :3])
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 2"):
        snippet.explain(rough_model(), clips(1), torch.tensor([3]))


def test_a_file_gives_back_its_model(tmp_path):
    model = rough_model().float()
    again = read_back(snippet, model, ARGUMENTS, tmp_path)
    assert again.class_names == ("a", "b", "c")
    assert torch.equal(again(clips().float()), model(clips().float()))


# --- clips ---------------------------------------------------------------------------------------------------------


def test_only_the_false_frame_of_a_spliced_clip_differs():
    script = training_script("video_glyph")
    found = script.clips(12, 31, evidence=True)
    assert 3 <= int(found.label.sum()) <= 9
    changed = found.evidence.flatten(2).any(2)  # (B, T)
    expected = (torch.arange(6) == found.frame[:, None]) & (found.label[:, None] == 1)
    assert torch.equal(changed, expected)
    assert int(found.frame.min()) >= 1
    assert int(found.frame.max()) <= 4
    again = script.clips(3, 31, start=5)
    assert torch.equal(again.images, found.images[5:8])
    still = script.clips(2, 31, motion=0)
    genuine = still.images[still.label == 0]
    assert torch.equal(genuine, genuine[:, :1].expand_as(genuine))


def test_no_single_frame_tells_what_is_false():
    """One part of the false frame has another variant; every combination of variants is as likely in whole clips."""
    labels, parameters = glyphs.draw(400, 32)
    numbers = torch.rand(400, 12, generator=torch.Generator().manual_seed(0))
    film = snippet.film(parameters, numbers, 6)
    shown, whole = (p.variants[:, 0].unflatten(0, (400, 6)) for p in (film.shown, film.whole))  # (B, T, 5)
    differs = shown != whole
    false = film.label == 1
    assert torch.equal(differs.flatten(1).sum(1), false.long())
    rows = torch.arange(400)[false]
    assert differs[rows, film.frame[false], film.part[false]].all()
    frames = shown[rows, film.frame[false]]  # (F, 5)
    share = torch.nn.functional.one_hot(frames, 3).float().mean(0)  # (5, 3)
    assert float((share - 1 / 3).abs().max()) < 0.15
    room = film.shown.centres - film.shown.radii[..., None]
    assert float(room.min()) >= 0
    assert float((film.shown.centres + film.shown.radii[..., None]).max()) <= 112
    assert len(labels) == 400


# --- the model that ships ------------------------------------------------------------------------------------------


def test_the_card_holds_on_unseen_clips(proof):
    script, card = training_script("video_glyph"), catalog.load().models["video-glyph"].metrics
    model, values = models.load("video-glyph").model, {}
    batches = [script.clips(20, 800_000, start=start, evidence=True) for start in (0, 20)]
    for batch in batches:
        for key, value in script.score(model, batch).items():
            values.setdefault(key, []).append(value)
    found = script.means(values)
    assert found.keys() == {key for key in card if not key.endswith("untrained")}
    where = "40 unseen clips"
    keys = ("accuracy", "temporal_in_frame", "temporal_in_part", "spatial_in_part")
    change = max(abs(found[key] - card[key]) for key in keys)
    proof(ID, "accuracy and shares of the card", change, at_most=0.2, kind="ground truth", oracle=where)
    proof(ID, "accuracy", found["accuracy"], at_least=0.85, kind="ground truth", oracle=where)
    for kind, floor in (("temporal", 8), ("spatial", 2)):
        check = f"share of the {kind} map on what is false, over an even spread"
        ratio = found[f"{kind}_in_part"] / found["area"]
        proof(ID, check, ratio, at_least=floor, kind="ground truth", oracle=where)
    assert found["temporal_in_part"] > 4 * found["temporal_in_part_chance"]
    check = "false frame found by the temporal map (chance one in six)"
    proof(ID, check, found["temporal_frame_found"], at_least=0.3, kind="ground truth", oracle=where)

    # Temporal attention reads changes by construction, so the map before training is the sterner baseline.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = script.score(script.untrained()[0].eval(), batches[0])["temporal_in_part"].mean()
    check = "share of the temporal map on what is false, over that before training"
    ratio = values["temporal_in_part"][0].mean() / before
    proof(ID, check, ratio, at_least=1.5, kind="ground truth", oracle="20 unseen clips")


def test_the_temporal_map_finds_the_false_frame_or_the_next(proof):
    """The frame after a false one differs from its predecessor too, and self-subtract cannot know which is false."""
    script, model = training_script("video_glyph"), models.load("video-glyph").model
    batch = script.clips(30, 800_100)
    false = batch.label == 1
    target = torch.ones(int(false.sum()), dtype=torch.long)
    found = snippet.explain(model, glyphs.normalise(batch.images[false]), target)  # type: ignore[arg-type]
    late = found.temporal.sum((2, 3)).argmax(1) - batch.frame[false]
    share = ((late == 0) | (late == 1)).float().mean()
    check = "temporal map highest in the false frame or the next (chance two in six)"
    proof(ID, check, share, at_least=0.8, kind="ground truth", oracle="spliced ones of 30 unseen clips")

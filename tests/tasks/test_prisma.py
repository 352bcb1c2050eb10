"""Activation patching: every run in plain loops, what patching all and nothing gives, and one creature exchanged."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, tiny, twin_block, twin_tokens, weights
from vitx import glyphs, load_module, models

ID = "prisma"
snippet = load_module(ID)


def rough(depth: int = 3, **options: Any) -> Any:
    """A rough model of 2 x 3 patches and five classes."""
    return tiny(depth, img_size=(16, 24), **options)


def twin_streams(model: Any, image: torch.Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The residual stream at every block's input and at the end, and z of every block, for one picture."""
    streams, outputs = [twin_tokens(model, image)], []
    for index in range(len(model.blocks)):
        record = twin_block(model, index, streams[-1])
        streams.append(record["output"])
        outputs.append(record["mixed"])
    return streams, outputs


def twin_logits(model: Any, stream: np.ndarray, layer: int, heads: tuple[int, int, np.ndarray] | None = None):
    """Logits from the residual stream at a layer; heads = (block, head, z of the clean run) patches one head."""
    w = weights(model)
    for index in range(layer, len(model.blocks)):
        record = twin_block(model, index, stream)
        if heads is not None and heads[0] == index:
            width = stream.shape[1] // model.blocks[index].attn.num_heads
            columns = slice(heads[1] * width, (heads[1] + 1) * width)
            mixed = record["mixed"].copy()
            mixed[:, columns] = heads[2][:, columns]
            name = f"blocks.{index}.attn.proj"
            middle = stream + mixed @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            stream = middle + twin_mlp(model, index, middle)
        else:
            stream = record["output"]
    with torch.no_grad():
        return model.forward_head(model.norm(torch.as_tensor(stream)[None]))[0].numpy()


def twin_mlp(model: Any, index: int, middle: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        block = model.blocks[index]
        return block.mlp(block.norm2(torch.as_tensor(middle))).numpy()


@pytest.mark.parametrize("cell", [1, 2])
def test_patched_tokens_in_plain_loops(cell, proof):
    """Each cell of patches and the class token, in a run of its own, at every layer."""
    model, errors = rough(), []
    clean, corrupted = pictures(model, 2), pictures(model, 2, seed=5)
    target, foil = [3, 0], [1, 4]
    cells = np.array([[0, 1, 2], [3, 4, 5]]) if cell == 1 else np.array([[0, 0, 1], [0, 0, 1]])
    for layer in range(4):
        found = snippet.explain(
            model,
            clean,
            torch.tensor(target),
            corrupted=corrupted,
            foil=torch.tensor(foil),
            layer=layer,
            cell=cell,
            chunk=3,
        )
        for row in range(2):
            one, other = twin_streams(model, clean[row])[0], twin_streams(model, corrupted[row])[0]

            def difference(logits: np.ndarray, row: int = row) -> float:
                return float(logits[target[row]] - logits[foil[row]])

            before = difference(twin_logits(model, other[-1], 3))
            theirs = np.zeros((2, 3))
            for place in np.ndindex(2, 3):
                stream = other[layer].copy()
                for i, j in np.ndindex(2, 3):
                    if cells[i, j] == cells[place]:
                        stream[1 + 3 * i + j] = one[layer][1 + 3 * i + j]
                theirs[place] = difference(twin_logits(model, stream, layer)) - before
            stream = other[layer].copy()
            stream[0] = one[layer][0]
            gains = np.append(theirs, difference(twin_logits(model, stream, layer)) - before)
            ours = np.append(found.gain[row], found.prefix[row])
            whole = difference(twin_logits(model, one[-1], 3))
            errors.append(relative_error(ours, gains))
            errors.append(relative_error([found.clean[row], found.corrupted[row]], [whole, before]))
            recovered = found.recovered(found.gain)[row]
            errors.append(relative_error(recovered, theirs / (whole - before)) if layer < 3 else 0.0)
    what = f"gains of all patches and the class token, cells of {cell}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="one run for each place, in plain loops")


def test_patched_heads_in_plain_loops(proof):
    model, errors = rough(), []
    clean, corrupted = pictures(model, 2), pictures(model, 2, seed=5)
    runs = snippet.two_runs(model, clean, corrupted=corrupted)
    gains = snippet.head_gains(model, clean, runs, chunk=3)
    for row in range(2):
        outputs = twin_streams(model, clean[row])[1]
        streams = twin_streams(model, corrupted[row])[0]
        target, foil = runs.pair[row].tolist()
        theirs = np.zeros((3, 2))
        before = twin_logits(model, streams[-1], 3)
        for index, head in np.ndindex(3, 2):
            logits = twin_logits(model, streams[index], index, (index, head, outputs[index]))
            theirs[index, head] = logits[target] - logits[foil] - (before[target] - before[foil])
        errors.append(relative_error(gains[row], theirs))
    proof(ID, "gains of all heads", max(errors), at_most=1e-9, kind="parity", oracle="one run for each head, in loops")


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_all_is_the_clean_run_and_nothing_the_corrupted(options, proof):
    """To the last bit: every token patched gives the clean logits, none the corrupted ones, at every layer."""
    model = rough(**options)
    clean, corrupted = pictures(model, 3), pictures(model, 3, seed=5)
    runs = snippet.two_runs(model, clean, corrupted=corrupted)
    with torch.no_grad():
        whole, other = model(clean), model(corrupted)
    errors = []
    for layer in range(4):
        everything = torch.ones(1, runs.clean[0].shape[1], dtype=torch.bool)
        errors.append((snippet.patched_logits(model, runs, layer, everything)[:, 0] - whole).abs().max())
        errors.append((snippet.patched_logits(model, runs, layer, ~everything)[:, 0] - other).abs().max())
    none = torch.zeros(3, 3, 2, dtype=torch.bool)
    logits = snippet.logits_with_clean_heads(model, runs.corrupted[0], snippet.head_outputs(model, clean), none)
    errors.append((logits - other).abs().max())
    name = ", ".join(options) or "class token"
    what = f"all tokens patched is the clean run, none the corrupted: {name}"
    proof(ID, what, max(errors), at_most=0, kind="closed form")


def test_all_heads_together_are_the_clean_run_where_the_class_token_answers(proof):
    """Before the first block the class token knows nothing of the picture, and heads alone tell it."""
    errors = []  # second, a model whose answer also reads the patches
    for options in ({}, {"class_token": False, "global_pool": "avg"}):
        model = rough(**options)
        clean, corrupted = pictures(model, 2), pictures(model, 2, seed=5)
        runs = snippet.two_runs(model, clean, corrupted=corrupted)
        every = torch.ones(2, 3, 2, dtype=torch.bool)
        with torch.no_grad():
            whole = model(clean)
            outputs = snippet.head_outputs(model, clean)
            logits = snippet.logits_with_clean_heads(model, runs.corrupted[0], outputs, every)
        errors.append(relative_error(logits, whole))
    assert errors[1] > 0.01
    proof(ID, "all heads patched is the clean run, class token", errors[0], at_most=1e-12, kind="closed form")


def test_clean_into_corrupted_is_the_rest_of_corrupted_into_clean(proof):
    """Patching S from the one run into the other mixes the same tokens as patching the rest the other way round."""
    model = rough()
    clean, corrupted = pictures(model, 2), pictures(model, 2, seed=5)
    there = snippet.two_runs(model, clean, corrupted=corrupted)
    back = snippet.two_runs(model, corrupted, corrupted=clean)
    sets = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    errors = []
    for layer in range(4):
        one, other = (snippet.patched_logits(model, *way) for way in ((there, layer, sets), (back, layer, ~sets)))
        errors.append(relative_error(one, other))
    what = "clean into corrupted against the rest of corrupted into clean"
    proof(ID, what, max(errors), at_most=1e-12, kind="closed form")


def test_pixels_that_differ_recover_all_at_the_first_layer(proof):
    """Pictures that differ in one patch: restored at block 0 it recovers everything, and every other patch nothing."""
    model = rough()
    clean = pictures(model, 2)
    corrupted = clean.clone()
    corrupted[:, :, 8:, 8:16] = 0.3
    found = snippet.explain(model, clean, corrupted=corrupted, layer=0)
    recovered = found.recovered(found.gain)
    truth = torch.zeros(2, 3, dtype=torch.float64)
    truth[1, 1] = 1
    error = (recovered - truth).abs().max()
    proof(ID, "one changed patch recovers 1, all others 0, at block 0", error, at_most=1e-12, kind="closed form")


def test_after_the_last_block_only_the_class_token_counts(proof):
    model = rough()
    found = snippet.explain(model, pictures(model, 2), corrupted=pictures(model, 2, seed=5), layer=3)
    error = max(found.gain.abs().max(), (found.recovered(found.prefix) - 1).abs().max())
    proof(ID, "after the last block the class token recovers 1, patches 0", error, at_most=1e-12, kind="closed form")


def test_the_corrupted_picture_is_the_mean_colour_where_none_is_given():
    model = rough()
    clean = pictures(model, 2)
    blank = clean.mean((2, 3), keepdim=True).expand_as(clean).contiguous()
    found, given = snippet.explain(model, clean), snippet.explain(model, clean, corrupted=blank, layer=1)
    assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))


def test_the_foil_is_the_strongest_other_class():
    model = rough()
    clean, corrupted = pictures(model, 4), pictures(model, 4, seed=5)
    with torch.no_grad():
        order = model(corrupted).argsort(-1, descending=True)
    for target in (None, order[:, 0]):
        runs = snippet.two_runs(model, clean, target, corrupted)
        for row, (first, second) in enumerate(order[:, :2].tolist()):
            assert int(runs.pair[row, 1]) == (second if first == int(runs.pair[row, 0]) else first)
    with pytest.raises(ValueError, match="another class than the target"):
        snippet.explain(model, clean, order[:, 0], corrupted=corrupted, foil=order[:, 0])
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, clean, foil=torch.tensor([0, 1, 2, 5]))


def test_what_is_refused():
    model = rough()
    clean = pictures(model, 2)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="between 0 and the 3 blocks"):
            snippet.explain(model, clean, layer=layer)
    for cell in (0, 4):
        with pytest.raises(ValueError, match="grid of 2 x 3 patches"):
            snippet.explain(model, clean, cell=cell)
    with pytest.raises(ValueError, match="one corrupted picture for each of the 2"):
        snippet.explain(model, clean, corrupted=clean[:1])
    with pytest.raises(ValueError, match="holds NaN"):
        snippet.explain(model, clean, corrupted=clean * torch.nan)


def test_heads_leave_no_trace():
    model = rough()
    before = copy.deepcopy(model.state_dict())
    runs = snippet.two_runs(model, pictures(model), corrupted=pictures(model, seed=5))
    gains = snippet.head_gains(model, pictures(model), runs)
    assert not gains.requires_grad
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- scenes in which one creature changes its class -----------------------------------------------------------------


def exchanged(count: int, seed: int) -> tuple[glyphs.Scenes, glyphs.Scenes]:
    """Scenes of two creatures, and the same scenes with the first creature of a class that is in neither."""
    clean = glyphs.scenes(count, seed, creatures=2)
    labels, variants = clean.labels.clone(), clean.parameters.variants.clone()
    labels[:, 0] = (labels[:, 0] + 5) % 12
    labels[:, 0] = (labels[:, 0] + (labels[:, 0] == labels[:, 1])) % 12
    variants[:, 0] = torch.tensor(glyphs.CLASS_PARTS)[labels[:, 0]]
    return clean, glyphs.render(clean.parameters._replace(variants=variants), labels)


@pytest.fixture(scope="module")
def glyph() -> Any:
    return models.load("glyph").model


COUNT = 12


@pytest.fixture(scope="module")
def scenes() -> tuple[glyphs.Scenes, glyphs.Scenes]:
    return exchanged(COUNT, 41)


def patched(model: Any, scenes: tuple[glyphs.Scenes, ...], **options: Any) -> Any:
    pair = [part.labels[:, 0] for part in scenes]
    clean, corrupted = (glyphs.normalise(part.images) for part in scenes)
    return snippet.explain(model, clean, pair[0], corrupted=corrupted, foil=pair[1], **options)


def test_the_exchange_changes_the_answer(glyph, scenes):
    found = patched(glyph, scenes, layer=6, cell=14)
    assert ((found.clean > 0) & (found.corrupted < 0)).float().mean() > 0.9


def test_gains_lie_on_the_creature_that_was_exchanged(glyph, scenes, proof):
    clean, other = scenes
    changed = glyphs.patch_fraction((clean.images != other.images).any(1), (14, 14)) > 0  # (B, 14, 14)
    found = patched(glyph, scenes)
    oracle = f"{COUNT} glyph scenes with one of two creatures exchanged"
    peak = found.gain.flatten(1).argmax(1, keepdim=True)
    hit = changed.flatten(1).gather(1, peak).float().mean()
    proof(ID, "largest gain on a changed patch, middle layer", hit, at_least=0.9, kind="ground truth", oracle=oracle)
    positive = found.gain.clamp(min=0)
    share = ((positive * changed).sum((1, 2)) / positive.sum((1, 2))).mean()
    what = "share of the gain on changed patches, over that of a uniform map, middle layer"
    proof(ID, what, share / changed.float().mean(), at_least=2, kind="ground truth", oracle=oracle)


def test_only_changed_pixels_count_at_the_first_layer(glyph, scenes, proof):
    few = tuple(glyphs.select(part, torch.arange(3)) for part in scenes)
    changed = (few[0].images != few[1].images).any(1)
    changed = glyphs.patch_fraction(changed, (7, 7)).repeat_interleave(2, 1).repeat_interleave(2, 2) > 0
    found = patched(glyph, few, layer=0, cell=2)
    outside = (found.recovered(found.gain) * ~changed).abs().max()
    what = "share recovered by patches that did not change, block 0"
    proof(ID, what, outside, at_most=1e-4, kind="ground truth", oracle="3 glyph scenes with one creature exchanged")


def test_the_difference_moves_into_the_class_token(glyph, scenes):
    shares = []
    for layer in range(7):
        found = patched(glyph, scenes, layer=layer, cell=14)
        shares.append(found.recovered(found.prefix).median())
    assert shares[0] == pytest.approx(0, abs=1e-4)
    assert shares[6] == pytest.approx(1, abs=1e-4)
    assert shares[5] > shares[1]


def test_the_best_heads_together_recover_more_than_others(glyph, scenes, proof):
    clean, other = (glyphs.normalise(part.images) for part in scenes)
    runs = snippet.two_runs(glyph, clean, scenes[0].labels[:, 0], other, scenes[1].labels[:, 0])
    gains = snippet.head_gains(glyph, clean, runs).flatten(1)  # (B, 24)
    outputs = snippet.head_outputs(glyph, clean)
    whole = runs.differences[0] - runs.differences[1]
    order = torch.rand(gains.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    shares = []
    for chosen in (gains.argsort(1, descending=True)[:, :6], order[:, :6]):
        mask = torch.zeros_like(gains, dtype=torch.bool).scatter(1, chosen, True).unflatten(1, (6, 4))
        with torch.no_grad():
            logits = snippet.logits_with_clean_heads(glyph, runs.corrupted[0], outputs, mask)
        gain = snippet.logit_difference(logits, runs.pair) - runs.differences[1]
        shares.append((gain / whole).median())
    what = "share recovered by the six heads of largest gain together, less that of six random heads"
    oracle = f"{COUNT} glyph scenes with one of two creatures exchanged"
    proof(ID, what, shares[0] - shares[1], at_least=0.2, kind="ground truth", oracle=oracle)

"""A sparse autoencoder on patches: its equations in plain loops, edits that keep the error, and features that name."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pictures, relative_error, tiny, training_script, twin_block, twin_tokens, weights
from safetensors.torch import save_file
from vitx import catalog, glyphs, images, load_module, models
from vitx.vit import UnsupportedModel

ID = "saev"
NAME = "saev-glyph"
snippet = load_module(ID)
FEATURES = 20


def with_dictionary(depth: int = 3, layer: int = 1, **options: Any) -> Any:
    """A rough model of 2 x 3 patches and five classes with a rough dictionary of twenty features, in float64."""
    model = tiny(depth, img_size=(16, 24), **options)
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        dictionary = snippet.Dictionary(8, FEATURES, layer).double()
    with torch.no_grad():
        for tensor in (*dictionary.parameters(), dictionary.mean):
            tensor += 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        dictionary.scale.fill_(1.7)
        dictionary.largest.copy_(3 * torch.rand(FEATURES, generator=generator, dtype=torch.float64))
    model.add_module("dictionary", dictionary.eval())
    return model


def twin_patch(w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, reconstruction and unit directions for one patch, number by number."""
    f = np.zeros(FEATURES)
    for k in range(FEATURES):
        total = w["encoder_bias"][k]
        for d in range(8):
            total += w["encoder"][d, k] * ((x[d] - w["mean"][d]) / float(w["scale"]) - w["decoder_bias"][d])
        f[k] = max(total, 0)
    directions = np.stack([row / math.sqrt(sum(value * value for value in row)) for row in w["decoder"]])
    found = np.array([w["decoder_bias"][d] + sum(f[k] * directions[k, d] for k in range(FEATURES)) for d in range(8)])
    return f, found * float(w["scale"]) + w["mean"], directions


def twin_rest(model: Any, tokens: np.ndarray, layer: int) -> np.ndarray:
    for index in range(layer + 1, len(model.blocks)):
        tokens = twin_block(model, index, tokens)["output"]
    with torch.no_grad():
        return model.forward_head(model.norm(torch.as_tensor(tokens)[None]))[0].numpy()


def twin_read(model: Any, image: torch.Tensor, layer: int) -> np.ndarray:
    tokens = twin_tokens(model, image)
    for index in range(layer + 1):
        tokens = twin_block(model, index, tokens)["output"]
    return tokens


@pytest.mark.parametrize("layer", [0, 1])
def test_features_and_edits_in_plain_loops(layer, proof):
    """Encoder, decoder, and each feature that fires set to a value in every patch, with the error added back."""
    model = with_dictionary(layer=layer)
    x, w = pictures(model), weights(model.dictionary)
    targets = [3, 0]
    encoded, decoded, effects = [], [], []
    for factor in (0.0, -2.0):
        found = snippet.explain(model, x, torch.tensor(targets), factor=factor, chunk=3)
        for row, image in enumerate(x):
            tokens = twin_read(model, image, layer)
            parts = [twin_patch(w, token) for token in tokens[1:]]
            f = np.stack([part[0] for part in parts])  # (P, S)
            assert 0 < (f > 0).mean() < 1
            encoded.append(relative_error(found.activations[row].flatten(1), f.T))
            ours = model.dictionary.decode(torch.as_tensor(f)).detach()
            decoded.append(relative_error(ours, np.stack([part[1] for part in parts])))
            before = twin_rest(model, tokens, layer)
            theirs = np.zeros(FEATURES)
            for k in range(FEATURES):
                if not (f[:, k] > 0).any():
                    continue
                edited = tokens.copy()
                for p, (values, reconstruction, directions) in enumerate(parts):
                    changed = values.copy()
                    changed[k] = factor * w["largest"][k]
                    again = (w["decoder_bias"] + changed @ directions) * float(w["scale"]) + w["mean"]
                    edited[1 + p] = again + (tokens[1 + p] - reconstruction)
                theirs[k] = before[targets[row]] - twin_rest(model, edited, layer)[targets[row]]
            effects.append(relative_error(found.scores[row], theirs))
            assert relative_error(found.logits[row], before) < 1e-9
    oracle = "equations and edited runs in plain loops"
    proof(ID, f"features of every patch, block {layer}", max(encoded), at_most=1e-9, kind="parity", oracle=oracle)
    proof(ID, f"reconstruction of every patch, block {layer}", max(decoded), at_most=1e-9, kind="parity", oracle=oracle)
    proof(ID, f"effect of every feature, block {layer}", max(effects), at_most=1e-9, kind="parity", oracle=oracle)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_all_features_and_the_error_are_the_model(options, proof):
    model = with_dictionary(**options)
    x = pictures(model)
    with torch.no_grad():
        plain = model(x)
        tokens = snippet.tokens_after(model, x, 1)
        patches = tokens[:, model.num_prefix_tokens :]
        f = model.dictionary.encode(patches)
        error = patches - model.dictionary.decode(f)
        patches.copy_(model.dictionary.decode(f) + error)
        rebuilt = snippet.logits_of_tokens(model, tokens, 2)
    differences = [relative_error(rebuilt, plain)]
    differences.append(relative_error(snippet.edit(model, x, {}), plain))
    differences.append(relative_error(snippet.explain(model, x).logits, plain))
    name = ", ".join(options) or "class token"
    what = f"all features and the error added back against the model's logits: {name}"
    proof(ID, what, max(differences), at_most=1e-12, kind="closed form")


def test_an_edit_is_that_of_explain_and_stays_where_it_is_made(proof):
    model = with_dictionary()
    x = pictures(model)
    target = torch.tensor([3, 0])
    errors = []
    for factor in (0.0, -2.0):
        found = snippet.explain(model, x, target, factor=factor)
        for k in range(FEATURES):
            if (found.activations[:, k].amax((1, 2)) > 0).all():
                effect = found.logits - snippet.edit(model, x, {k: factor})
                errors.append(relative_error(effect.gather(1, target[:, None])[:, 0], found.scores[:, k]))
    assert len(errors) > 4
    proof(ID, "edit() against the scores of explain()", max(errors), at_most=1e-9, kind="closed form")
    nowhere = torch.zeros(2, 2, 3, dtype=torch.bool)
    one = nowhere.clone()
    one[:, 1, 2] = True
    with torch.no_grad():
        plain = model(x)
    assert torch.allclose(snippet.edit(model, x, {3: 2.0, 5: -1.0}, nowhere), plain, rtol=1e-12)
    some, all_of_it = snippet.edit(model, x, {3: 2.0}, one), snippet.edit(model, x, {3: 2.0})
    assert not torch.allclose(some, plain, rtol=1e-3)
    assert not torch.allclose(some, all_of_it, rtol=1e-3)


def test_silent_features_have_no_effect_and_the_map_holds_all_scores(proof):
    model = with_dictionary()
    found = snippet.explain(model, pictures(model))
    silent = found.activations.amax((2, 3)) == 0
    assert silent.any()
    assert (found.scores[silent] == 0).all()
    assert (found.activations >= 0).all()
    error = relative_error(found.heatmap().sum((1, 2)), found.scores.sum(1))
    proof(ID, "sum of the map against the sum of all scores", error, at_most=1e-12, kind="closed form")


def test_the_loss_is_the_published_one(proof):
    """Mean squared error per channel and lambda times the sum of features, with directions of unit length."""
    model = with_dictionary()
    dictionary, w = model.dictionary, weights(model.dictionary)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    squares = sums = 0.0
    for row in x.numpy():
        f, found, _ = twin_patch(w, row)
        squares += sum(((a - b) / float(w["scale"])) ** 2 for a, b in zip(found, row, strict=True)) / 8
        sums += sum(f)
    theirs = squares / 5 + 0.3 * sums / 5
    loss = dictionary.loss(x, 0.3)
    error = abs(float(loss.detach()) - theirs) / theirs
    proof(ID, "loss", error, at_most=1e-12, kind="parity", oracle="equation in plain loops")
    (gradient,) = torch.autograd.grad(loss, dictionary.decoder)
    along = (gradient * dictionary.decoder.detach()).sum(1).abs().max() / gradient.abs().max()
    proof(ID, "gradient along the directions, relative", along, at_most=1e-12, kind="closed form")


def test_prepared_activations_have_the_norm_of_their_width():
    model = with_dictionary()
    x = 3 + 5 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.dictionary.prepare(x)
    scaled = (x - model.dictionary.mean) / model.dictionary.scale
    assert torch.allclose(scaled.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-12)
    assert float(scaled.norm(dim=1).mean()) == pytest.approx(math.sqrt(8))


def test_learning_finds_the_directions_that_made_the_activations(proof):
    """Patches that are sums of two out of twelve directions: the dictionary finds these."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator, dtype=torch.float64), dim=1)
    values = torch.zeros(4000, 12, dtype=torch.float64)
    values.scatter_(1, torch.rand(4000, 12, generator=generator).topk(2).indices, 1.0)
    values *= 1 + torch.rand(4000, 12, generator=generator, dtype=torch.float64)
    pool = values @ truth
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dictionary = snippet.Dictionary(16, 32, 0).double()
    dictionary.prepare(pool)
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=3e-3)
    for _ in range(600):
        rows = torch.randint(4000, (512,), generator=generator)
        optimiser.zero_grad()
        dictionary.loss(pool[rows], 0.02).backward()
        optimiser.step()
    cosine = (truth @ dictionary.directions().detach().T).amax(1)
    what = "smallest cosine of twelve true directions with the nearest learned one"
    proof(ID, what, cosine.min(), at_least=0.9, kind="ground truth", oracle="activations made of twelve directions")


def test_a_dictionary_for_another_model_is_learned_and_repeatable():
    model = tiny(3, img_size=(16, 24))
    x = pictures(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = snippet.learn(model, x, features=16, steps=20, batch=8)
    again = snippet.learn(model, x, features=16, steps=20, batch=8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first.layer == 1
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert value.dtype == torch.float64
    found = snippet.explain(model, x, dictionary=first)
    assert found.activations.shape == (3, 16, 2, 3)
    assert torch.equal(found.activations.amax((0, 2, 3)), first.largest)
    for layer in (-4, 3):
        with pytest.raises(ValueError, match="out of range: the model has 3 blocks"):
            snippet.learn(model, x, layer=layer)


def test_what_is_refused():
    model = with_dictionary()
    x = pictures(model)
    with pytest.raises(ValueError, match="out of range: the model has classes 0 to 4"):
        snippet.explain(model, x, torch.tensor([0, 5]))
    plain = tiny(2)
    for run in (snippet.explain, lambda *arguments: snippet.edit(*arguments, {0: 1.0})):
        with pytest.raises(UnsupportedModel, match="no dictionary"):
            run(plain, pictures(plain))
    with torch.no_grad():
        model.dictionary.encoder[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"parameter dictionary\.encoder of the model holds NaN"):
        snippet.explain(model, x)


def test_photo_with_a_dictionary_of_its_own(proof):
    """On the five photographs: features and error give the model's logits, and features alone explain most of it."""
    loaded = models.load("photo")
    x = torch.stack([loaded.preprocess(images.open_image(name)) for name in images.PHOTOGRAPHS])
    dictionary = snippet.learn(loaded.model, x, features=768, steps=60)
    with torch.no_grad():
        tokens = snippet.tokens_after(loaded.model, x, dictionary.layer)
        plain = snippet.logits_of_tokens(loaded.model, tokens, dictionary.layer + 1)
        patches = tokens[:, 1:]
        rebuilt = dictionary.decode(dictionary.encode(patches))
        explained = 1 - (patches - rebuilt).square().sum() / (patches - patches.mean((0, 1))).square().sum()
        patches.copy_(rebuilt + (patches - rebuilt))
        again = snippet.logits_of_tokens(loaded.model, tokens, dictionary.layer + 1)
    error = relative_error(again, plain)
    what = "all features and the error added back against the logits of photo, float32"
    proof(ID, what, error, at_most=1e-4, kind="closed form")
    what = "variance of photo's patches that features learned from these photographs explain"
    proof(ID, what, explained, at_least=0.5, kind="sanity", oracle="five photographs")


# --- the dictionary that ships ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    return training_script("saev_glyph")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return models.load(NAME).model


@pytest.fixture(scope="module")
def measured(script, shipped) -> dict[str, float]:
    script.UNSEEN = 800_000  # a seed of neither the training nor the card
    return script.measure(shipped, 200)


def test_the_classifier_is_glyph(shipped):
    x = glyphs.normalise(glyphs.scenes(2, 900_001).images)
    assert torch.equal(shipped(x), models.load("glyph").model(x))


def test_the_card_holds_on_unseen_scenes(measured):
    card = catalog.load().models[NAME]
    assert measured.keys() == card.metrics.keys()
    for name, value in measured.items():
        allowed = 0.1 * card.metrics[name] if name == "firing" else 0.1
        assert abs(value - card.metrics[name]) < allowed, name


def test_features_name_what_the_glyph_world_shows(measured, proof):
    oracle = "200 glyph scenes"
    for kind in ("creatures", "parts", "variants"):
        value, always = measured[f"f1_of_{kind}"], measured[f"f1_of_{kind}_always"]
        what = f"mean F1 of the best features for {kind}, less that of firing always"
        proof(ID, what, value - always, at_least=0.2, kind="ground truth", oracle=oracle)
    gap = measured["f1_of_creatures"] - measured["f1_of_creatures_channels"]
    what = "mean F1 of the best features for creatures, less that of the best channels"
    proof(ID, what, gap, at_least=0.1, kind="ground truth", oracle=oracle)


def test_suppressing_a_creature_s_feature_loses_that_creature(measured, proof):
    oracle = "100 glyph scenes of two creatures"
    gap = measured["lost"] - measured["lost_at_random"]
    what = "first creature lost when its feature is set to -2, less when a random one is"
    proof(ID, what, gap, at_least=0.3, kind="ground truth", oracle=oracle)


def test_labels_of_patches_are_those_of_the_scene(script):
    """Against loops over pixels, for a few patches; and what is present is never absent."""
    scenes = glyphs.scenes(2, 61, creatures=2)
    present, absent = script.concept_labels(scenes)
    assert not (present & absent).any()
    concepts = [concept for kind in script.KINDS.values() for concept in kind]
    assert present.shape == (2 * 196, len(concepts))
    for b, i, j in [(0, 5, 5), (1, 7, 6), (0, 9, 3), (1, 2, 10)]:
        window = (slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        row = b * 196 + 14 * i + j
        for c, name in enumerate(glyphs.CLASS_NAMES):
            share = sum(
                float(scenes.object_masks[b, k][window].float().mean())
                for k in range(2)
                if glyphs.CLASS_NAMES[int(scenes.labels[b, k])] == name
            )
            assert bool(present[row, c]) == (share >= 0.5)
            assert bool(absent[row, c]) == (share == 0)
        for p, name in enumerate(glyphs.PARTS):
            share = float(scenes.part_masks[b, :, p][:, window[0], window[1]].float().mean((1, 2)).sum())
            assert bool(present[row, concepts.index(name)]) == (share >= 0.25)
    red, grey, teal = torch.tensor([[0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.1, 0.7, 0.7]])
    assert script.hues(torch.stack([red, grey, teal]), 0.4).nonzero().tolist() == [[0, 0], [2, 3]]


def test_f1_is_counted_as_in_loops(script):
    """One concept and two features, patch by patch."""
    network = models.load("glyph").model
    largest = torch.tensor([2.0, 1.0])

    def features(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :2].clamp(min=0), largest

    score, always = script.f1_scores(features, network, 62, 100)
    concept = list(glyphs.CLASS_NAMES).index("femo")
    counts = np.zeros((len(script.SHARES), 2, 3))  # hits, false alarms, misses
    total, others = 0, 0
    for creatures in (1, 2):
        scenes = glyphs.scenes(50, 62, creatures)
        f = features(script.activations(network, scenes.images))[0].numpy()
        present, absent = (labels[:, concept].numpy() for labels in script.concept_labels(scenes))
        total, others = total + present.sum(), others + absent.sum()
        for t, share in enumerate(script.SHARES):
            for k in range(2):
                fired = f[:, k] > share * float(largest[k])
                counts[t, k] += (fired & present).sum(), (fired & absent).sum(), (~fired & present).sum()
    hits, alarms, misses = np.moveaxis(counts, -1, 0)
    assert relative_error(score[:, concept], 2 * hits / (2 * hits + alarms + misses)) < 1e-5
    assert float(always[concept]) == pytest.approx(2 * total / (2 * total + others))


def test_a_file_gives_back_its_model(tmp_path, script):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dictionary = snippet.Dictionary(128, 16, 3)
    about = {"backbone": script.BACKBONE, "num_classes": 12, "layer": 3, "names": [f"n{k}" for k in range(16)]}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    state = {key: value.contiguous() for key, value in dictionary.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors", metadata)
    (tmp_path / "glyph.safetensors").write_bytes((models.WEIGHTS / "glyph.safetensors").read_bytes())
    model = snippet.load_pretrained(tmp_path / "x.safetensors")
    assert not model.training
    assert model.dictionary.layer == 3
    x = glyphs.normalise(glyphs.scenes(2, 63).images)
    found = snippet.explain(model, x)
    assert found.names[:2] == ("n0", "n1")
    given = snippet.explain(models.load("glyph").model, x, dictionary=dictionary)
    assert torch.equal(found.activations, given.activations)

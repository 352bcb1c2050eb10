"""Text-based decomposition: nothing is lost, each term is what the loops say, and TextSpan finds planted directions."""

import itertools

import numpy as np
import pytest
import torch
from helpers import (
    REFUSED_CAPTIONS,
    area_under_curve,
    layer_norm,
    pictures,
    relative_error,
    scenes_of_two,
    tiny_two_tower,
    twin_block,
    twin_tokens,
    weights,
)
from vitx import glyphs, load_module, models
from vitx.vit import UnsupportedModel

ID = "clip-text-decomposition"
snippet = load_module(ID)


# --- the identity ----------------------------------------------------------------------------------------------------

TOWERS = {
    "class token": {},
    "class token and registers": {"reg_tokens": 2},
    "layer scale": {"init_values": 0.3},
    "qk-norm": {"qk_norm": True},
    "a norm before the blocks, as CLIP has": {"pre_norm": True},
    "no bias of queries, keys and values": {"qkv_bias": False},
}


@pytest.mark.parametrize("name", TOWERS)
def test_all_contributions_sum_to_the_picture_vector(name, proof):
    model = tiny_two_tower(4, **TOWERS[name])
    x = pictures(model.image, 3)
    parts = snippet.decompose(model.image, x)
    with torch.no_grad():
        truth = torch.nn.functional.normalize(model.image(x), dim=-1)
    error = relative_error(parts.heads.sum((1, 2, 3)) + parts.rest.sum(1), truth)
    what = f"sum over layers, heads, tokens and the rest, and the unit vector that the tower gives: {name}"
    proof(ID, what, error, at_most=1e-12, kind="closed form")
    torch.testing.assert_close(parts.vector, truth)


def test_all_contributions_sum_to_the_picture_vector_of_the_model_that_ships(proof):
    model = models.load("two-tower-glyph").model.double()
    x = glyphs.normalise(glyphs.scenes(8, 40, creatures=2).images.double())
    parts = snippet.decompose(model.image, x)
    error = relative_error(parts.heads.sum((1, 2, 3)) + parts.rest.sum(1), parts.vector)
    proof(ID, "the same sum on two-tower-glyph in float64, 8 scenes", error, at_most=1e-12, kind="closed form")
    found = snippet.explain(model, x)
    total = found.heatmap().sum((1, 2)) + found.prefix.sum((1, 2)) + found.rest.sum(1)
    with torch.no_grad():
        cosine = (model(x) / torch.as_tensor(model.log_scale).exp()).amax(1)
    what = "map, prefix and rest sum to the cosine of picture and caption, two-tower-glyph in float64"
    proof(ID, what, relative_error(total, cosine), at_most=1e-12, kind="closed form")


def test_every_term_equals_the_equations_in_plain_loops(proof):
    """c = P alpha W_VO z token by token, with what belongs to no term shared out evenly, as in the authors' code."""
    model = tiny_two_tower(2)
    x = pictures(model.image, 1)
    parts = snippet.decompose(model.image, x)
    w, tokens = weights(model.image), twin_tokens(model.image, x[0])
    records = []
    for index in range(2):
        records.append(twin_block(model.image, index, records[-1]["output"] if records else tokens))
    z = records[-1]["output"][0]
    mean, deviation = z.mean(), np.sqrt(z.var() + 1e-6)
    final = layer_norm(z, w["norm.weight"], w["norm.bias"])
    length = np.sqrt(((w["head.weight"] @ final + w["head.bias"]) ** 2).sum())

    def projected(term: np.ndarray, terms: float) -> np.ndarray:
        """What one of that many terms gives: norm, projection and length of the whole, a share of all constants."""
        normed = w["norm.weight"] * (term - mean / terms) / deviation + w["norm.bias"] / terms
        return (w["head.weight"] @ normed + w["head.bias"] / terms) / length

    truth = np.zeros(parts.heads.shape[1:])
    for layer, h, i in np.ndindex(2, 2, len(tokens)):
        record, name = records[layer], f"blocks.{layer}.attn.proj"
        value = record["qkv"][i, 16 + 4 * h : 16 + 4 * h + 4]
        given = record["attention"][h, 0, i] * (w[f"{name}.weight"][:, 4 * h : 4 * h + 4] @ value)
        truth[layer, h, i] = projected(given + w[f"{name}.bias"] / (2 * len(tokens)), 5 * 2 * len(tokens))
    error = relative_error(parts.heads[0], truth)
    oracle = "equations in plain loops"
    proof(ID, "contribution of every token through every head", error, at_most=1e-9, kind="parity", oracle=oracle)
    mlps = [record["output"][0] - record["middle"][0] for record in records]
    truth = np.stack([projected(term, 5) for term in (tokens[0], *mlps)])
    error = relative_error(parts.rest[0], truth)
    proof(
        ID, "contribution of the embedded class token and the MLPs", error, at_most=1e-9, kind="parity", oracle=oracle
    )


def test_the_last_layer_is_felt_directly_and_nowhere_else():
    """Values of the last layer's patches reach the class token through that layer alone."""
    model = tiny_two_tower(3)
    x = pictures(model.image, 2)
    before = snippet.decompose(model.image, x).heads
    with torch.no_grad():
        model.image.blocks[-1].attn.proj.weight[:, :4] = 0  # the first head of the last layer
    after = snippet.decompose(model.image, x).heads
    spread = after[:, -1, 0] - after[:, -1, 0].mean(1, keepdim=True)
    assert spread.abs().max() < 1e-12  # only its share of the constants is left
    assert (before[:, -1, 0] - before[:, -1, 0].mean(1, keepdim=True)).abs().max() > 1e-3


# --- explain ---------------------------------------------------------------------------------------------------------


def test_shares_sum_to_the_similarity_also_with_contrast():
    model = tiny_two_tower(reg_tokens=2)
    x = pictures(model.image, 3)
    cosines = torch.stack([snippet.explain(model, x, torch.full((3,), k)).similarity for k in range(3)])
    logits = (model(x) / model.log_scale.exp()).detach()
    torch.testing.assert_close(cosines.T, logits)
    for contrast in (False, True):
        found = snippet.explain(model, x, torch.tensor([2, 0, 1]), contrast=contrast)
        total = found.heatmap().sum((1, 2)) + found.prefix.sum((1, 2)) + found.rest.sum(1)
        torch.testing.assert_close(total, found.similarity)
        chosen = logits[torch.arange(3), [2, 0, 1]]
        torch.testing.assert_close(found.similarity, chosen - logits.mean(1) if contrast else chosen)


def test_the_contrasts_of_all_classes_sum_to_zero(proof):
    model = tiny_two_tower()
    x = pictures(model.image, 3)
    maps = torch.stack([snippet.explain(model, x, torch.full((3,), k), contrast=True).heatmap() for k in range(3)])
    error = maps.sum(0).abs().max() / maps.abs().max()
    proof(
        ID,
        "contrast=True: sum of the maps of all classes, over the largest value",
        error,
        at_most=1e-12,
        kind="closed form",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contract(dtype):
    model = tiny_two_tower(reg_tokens=2).to(dtype)
    x = pictures(model.image, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    captions = ["a red cat", "dog", "a blue red blue dog"]
    found = snippet.explain(model, x, captions)
    assert found.patches.shape == (3, 3, 2, 2, 3)
    assert found.prefix.shape == (3, 3, 2)
    assert found.rest.shape == (3, 4)
    assert found.heatmap().shape == (3, 2, 3)
    for tensor in found:
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
    for row in range(3):
        alone = snippet.explain(model, x[row : row + 1], captions[row : row + 1])
        torch.testing.assert_close(alone.patches[0], found.patches[row], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("target", "message"), REFUSED_CAPTIONS)
def test_bad_targets(target, message):
    model = tiny_two_tower()
    with pytest.raises(ValueError, match=message):
        snippet.explain(model, pictures(model.image, 3), target)


def test_other_models_are_refused():
    model = tiny_two_tower()
    with pytest.raises(UnsupportedModel, match="VisionTransformer has no text tower"):
        snippet.explain(model.image, pictures(model.image, 1))
    other = tiny_two_tower()
    other.image.norm = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="a last LayerNorm"):
        snippet.explain(other, pictures(other.image, 1))


# --- TextSpan --------------------------------------------------------------------------------------------------------


def planted(noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (200, 12) that vary along three of ten orthonormal texts, least along the first, and the texts."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q[:10]
    amounts = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    amounts = torch.linalg.qr(torch.cat([torch.ones(200, 1).double(), amounts], 1)).Q[:, 1:]  # no mean, orthogonal
    outputs = amounts @ (torch.tensor([[1.0], [2.0], [3.0]]).double() * texts[[4, 7, 2]]) + 5 * texts[9]
    return outputs + noise * torch.randn(200, 12, generator=generator, dtype=torch.float64), texts


def test_text_span_finds_the_texts_that_were_planted(proof):
    outputs, texts = planted()
    span = snippet.text_span(outputs, texts, 3, 4)
    assert span.texts.tolist() == [2, 7, 4]
    error = relative_error(span.explained, np.array([9, 13, 14]) / 14)
    what = "TextSpan: share of variance explained by three planted texts of variance 9, 4 and 1"
    proof(ID, what, error, at_most=1e-9, kind="closed form")


def test_text_span_equals_the_algorithm_in_plain_loops(proof):
    outputs, texts = planted(0.02)
    texts = texts + 0.3 * texts.roll(1, 0)  # no longer orthogonal
    span = snippet.text_span(outputs, texts, 5, 8)
    C, R = outputs.numpy().copy(), texts.numpy().copy()
    directions = np.linalg.svd(C, full_matrices=False)[2][:8]
    R = np.array([sum((r @ d) * d for d in directions) for r in R])
    C = C - C.mean(0)
    total, chosen, explained = (C**2).sum(), [], []
    for _ in range(5):
        variances = [np.var([c @ r for c in C]) for r in R]
        best = int(np.argmax(variances))
        r = R[best].copy()
        C = np.array([c - (c @ r) / (r @ r) * r for c in C])
        R = np.array([other - (other @ r) / (r @ r) * r for other in R])
        chosen.append(best)
        explained.append(1 - (C**2).sum() / total)
    assert span.texts.tolist() == chosen
    error = relative_error(span.explained, explained)
    proof(ID, "TextSpan: variance explained by five texts", error, at_most=1e-9, kind="parity", oracle="plain loops")
    # Equation 7 does not care how the span was found.
    centred = outputs.numpy() - outputs.numpy().mean(0)
    span_of = np.linalg.qr((texts.numpy() @ directions.T @ directions)[chosen].T)[0]
    error = relative_error(span.explained[-1], ((centred @ span_of) ** 2).sum() / total)
    what = "TextSpan: variance explained, by projecting on the span of all chosen texts at once (equation 7)"
    proof(ID, what, error, at_most=1e-9, kind="parity", oracle="numpy.linalg.qr")


def test_as_many_texts_as_the_rank_explain_everything():
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(30, 4, generator=generator).double() @ torch.randn(4, 9, generator=generator).double()
    texts = torch.randn(12, 9, generator=generator).double()
    span = snippet.text_span(outputs, texts, 4, 4)
    assert (span.explained.diff() > 0).all()
    torch.testing.assert_close(span.explained[-1], torch.tensor(1.0).double())


@pytest.mark.parametrize(("count", "rank"), [(0, 3), (4, 3), (2, 13)])
def test_text_span_refuses_what_it_cannot_count(count, rank):
    with pytest.raises(ValueError, match="count and rank must obey"):
        snippet.text_span(*planted(), count, rank)


# --- the model that ships, against the truth of the glyph world ------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return models.load("two-tower-glyph").model


@pytest.mark.parametrize("contrast", [False, True])
def test_the_creature_that_the_caption_names_stands_out(contrast, shipped, proof):
    _, images, labels, named, other = scenes_of_two(60)
    maps = snippet.explain(shipped, images, labels, contrast=contrast).heatmap().flatten(1)
    with torch.no_grad():
        vectors = shipped.image.head(shipped.image.forward_features(images))
        text = shipped.text(shipped.class_tokens[labels])
        raw = torch.cosine_similarity(vectors, text[:, None], dim=-1)[:, 1:]
    oracle = "60 glyph scenes of two creatures, each asked for"
    options = ", contrast=True" if contrast else ""
    means = [(maps * mask).sum(1) / mask.sum(1) for mask in (named, other)]
    what = f"captions whose map favours the named creature (chance 0.5){options}"
    proof(ID, what, (means[0] > means[1]).float().mean(), at_least=0.9, kind="ground truth", oracle=oracle)
    hit, chance = named.gather(1, maps.argmax(1, keepdim=True)).float().mean(), float(named.float().mean())
    what = f"captions whose most relevant patch is on the named creature (chance {chance:.2f}){options}"
    proof(ID, what, hit, at_least=0.7, kind="ground truth", oracle=oracle)
    found, before = area_under_curve(maps, named).mean(), area_under_curve(raw, named).mean()
    what = f"area under the ROC curve of the named creature's patches (chance 0.5){options}"
    proof(ID, what, found, at_least=0.75, kind="ground truth", oracle=oracle)
    what = f"the same, less that of the raw similarity map{options}"
    proof(ID, what, found - before, at_least=0.25, kind="ground truth", oracle=oracle)


@pytest.fixture(scope="module")
def free(shipped):
    """Variants (n, 5) of creatures whose parts are drawn independently, and the decomposition of their pictures."""
    labels, parameters = glyphs.draw(300, 800_000)
    variants = torch.randint(3, (300, 1, 5), generator=torch.Generator().manual_seed(2))
    images = glyphs.normalise(glyphs.render(parameters._replace(variants=variants), labels).images)
    parts = [snippet.decompose(shipped.image, part) for part in images.split(50)]
    return variants[:, 0], torch.cat([p.heads.sum(3) for p in parts]), torch.cat([p.rest for p in parts])


def sentence(body: str, crest: str, tail: str, eyes: str, pattern: str) -> str:
    return f"a {pattern} {body} {eyes} creature with a {crest} crest and a {tail} tail"


def test_text_span_names_the_part_that_a_head_sees(shipped, free, proof):
    """Which heads vary with the variants of one part is known; their texts should name that part."""
    variants, heads, _ = free
    every = list(itertools.product(*glyphs.VARIANTS.values()))
    words = [word for names in glyphs.VARIANTS.values() for word in names]
    texts = snippet.text_vectors(shipped, [[sentence(*row) for row in every if word in row] for word in words])
    right, explained = [], []
    for layer, head in itertools.product(range(6), range(4)):
        outputs = heads[:, layer, head] - heads[:, layer, head].mean(0)
        between = torch.zeros(5)  # share of the variance between the variants of each part
        for part, variant in itertools.product(range(5), range(3)):
            group = outputs[variants[:, part] == variant]
            between[part] += len(group) * group.mean(0).square().sum() / outputs.square().sum()
        span = snippet.text_span(heads[:, layer, head], texts, 3, 32)
        if between.max() > 0.4:
            right += (span.texts // 3 == between.argmax()).tolist()
        explained.append(float(span.explained[-1]))
    assert len(right) >= 12  # four heads
    oracle = "300 glyph scenes of free variants"
    what = "TextSpan: texts that name the right part, of three for each head that one part moves (chance 0.2)"
    proof(ID, what, sum(right) / len(right), at_least=0.6, kind="ground truth", oracle=oracle)
    what = "TextSpan: variance that three of fifteen words explain, mean over the heads of the last layer"
    proof(ID, what, sum(explained[-4:]) / 4, at_least=0.65, kind="ground truth", oracle=oracle)


def test_only_late_attention_is_felt_directly(shipped, free, proof):
    """The paper's finding on CLIP holds here: the mean of the MLPs and of early attention serves as well."""
    variants, heads, rest = free
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))
    names = list(glyphs.VARIANTS.values())
    captions = [[sentence(*(names[part][v] for part, v in enumerate(row)))] for row in every.tolist()]
    texts = snippet.text_vectors(shipped, captions)

    def words_right(vectors: torch.Tensor) -> float:
        return float((every[(vectors @ texts.T).argmax(1)] == variants).float().mean())

    attention, mlps = heads.sum(2), rest  # (n, L, E), (n, L + 1, E)
    full = words_right(attention.sum(1) + mlps.sum(1))
    without_mlps = words_right(attention.sum(1) + mlps.mean(0).sum(0))
    early = words_right(attention[:, :4].mean(0).sum(0) + attention[:, 4:].sum(1) + mlps.sum(1))
    late = words_right(attention[:, :4].sum(1) + attention[:, 4:].mean(0).sum(0) + mlps.sum(1))
    oracle = "300 glyph scenes of free variants"
    what = "words of the best of 243 captions that are lost with the mean of all MLPs"
    proof(ID, what, full - without_mlps, at_most=0.03, kind="ground truth", oracle=oracle)
    what = "words of the best of 243 captions that are lost with the mean of the attention of layers 1 to 4"
    proof(ID, what, full - early, at_most=0.03, kind="ground truth", oracle=oracle)
    what = "words of the best of 243 captions that are lost with the mean of the attention of layers 5 and 6"
    proof(ID, what, full - late, at_least=0.1, kind="ground truth", oracle=oracle)

"""ViT-Shapley: values that add up, an objective whose optimum is the Shapley value, and the model that ships."""

from typing import Any

import pytest
import torch
import vitx
from helpers import pictures, relative_error, roughen, training_script
from timm.models.vision_transformer import VisionTransformer
from vitx import ATLAS, catalog, glyphs, models, shapley
from vitx.vit import UnsupportedModel, logits_of_visible

ID = "vit-shapley"
snippet = vitx.load_module(ID)
FOLDER = ATLAS / "snippets" / "models"
FILE = FOLDER / "vit-shapley-glyph.safetensors"
NETWORK: dict[str, Any] = {
    "img_size": (24, 32),
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
}


def random_model(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = (VisionTransformer(**NETWORK | options, num_classes=count) for count in (5, 0))
        return roughen(snippet.ShapleyTransformer(*networks, 16))


@pytest.fixture(scope="module")
def script():
    return training_script("vit_shapley_glyph")


@pytest.mark.parametrize("depth", [2, 3])
def test_values_add_up_to_what_hiding_everything_takes(depth, proof):
    model = random_model(depth=depth)
    x, target = pictures(model.surrogate, 3), torch.tensor([4, 0, 2])
    values = vitx.load(ID)(model, x, target)
    with torch.no_grad():
        hidden = logits_of_visible(model.surrogate, x, torch.zeros(3, 12, dtype=torch.bool)).softmax(-1)
        gain = (model(x).softmax(-1) - hidden).gather(1, target[:, None])[:, 0]
    error = relative_error(values.sum((1, 2)), gain)
    what = f"efficiency, depth {depth}"
    proof(ID, what, error, at_most=1e-10, kind="closed form", oracle="surrogate, all patches masked in every attention")


def test_is_the_head_shifted_alike_everywhere():
    model = random_model()
    x = pictures(model.surrogate, 2)
    with torch.no_grad():
        tokens = model.backbone.norm(model.backbone.blocks(model.backbone._pos_embed(model.backbone.patch_embed(x))))
        block = model.attention
        mixed = tokens + block.attn(tokens)  # no norm between the backbone's and the attention
        mixed = mixed + block.mlp(block.norm2(mixed))
        raw = model.head(mixed[:, 1:])[..., 3]  # (2, 12)
    shift = vitx.load(ID)(model, x, torch.tensor([3, 3])).flatten(1) - raw
    assert shift.std(1).max() < 1e-12
    assert shift.abs().min() > 1e-6


def test_the_objective_is_least_at_the_shapley_values(proof):
    """All coalitions of a small game, weighed as they are drawn: the loss is stationary at the exact values only."""
    kernelshap = vitx.load_module("kernelshap")
    z, weights = kernelshap.coalitions(6, 62, True, torch.Generator())
    worth = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = worth[(z.long() << torch.arange(6)).sum(1)]
    phi = torch.zeros(1, 6, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(500):
        added = snippet.add_up(phi, worth[None, -1:], worth[None, :1])
        loss = (weights * (values - worth[0] - (z @ added)[0, :, 0]).square()).sum() / weights.sum()
        (gradient,) = torch.autograd.grad(loss, phi)
        phi = (phi - gradient).detach().requires_grad_()
    found = snippet.add_up(phi, worth[None, -1:], worth[None, :1]).detach()[0, :, 0]
    error = relative_error(found, shapley.exact(worth))
    proof(ID, "optimum of the objective, 6 players", error, at_most=1e-6, kind="closed form", oracle="exact values")


def test_training_draws_what_the_paper_says(script):
    generator = torch.Generator().manual_seed(0)
    chosen, rest = script.subsets(50, 20, generator)
    assert chosen.shape == (50, 20)
    together = torch.cat([chosen, rest], 1).sort(1).values
    assert torch.equal(together, torch.arange(script.PATCHES).expand(50, -1))
    teacher = script.classifier(ATLAS)
    images = script.pictures(2, 5, 0)
    with torch.no_grad():
        tokens = script.embed(teacher, images)
        visible = torch.zeros(2, script.PATCHES, dtype=torch.bool).scatter_(1, chosen[:2], True)
        masked = logits_of_visible(teacher, images, visible)
        assert (script.shown(teacher, tokens, chosen[:2]) - masked).abs().max() < 0.15  # bfloat16
    model = script.untrained(script.classifier(ATLAS))
    assert model.patch_values(images).abs().max() == 0
    learned, equal = script.explainer_loss(model, images, torch.Generator().manual_seed(1))
    assert torch.equal(learned, equal)  # an explainer that knows nothing gives equal shares


def test_what_is_refused():
    model = random_model()
    x = pictures(model.surrogate)
    with pytest.raises(UnsupportedModel, match="brings no trained explainer"):
        vitx.load(ID)(model.surrogate, x)
    with pytest.raises(ValueError, match="out of range"):
        vitx.load(ID)(model, x, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="training mode"):
        vitx.load(ID)(random_model().train(), x)
    with torch.no_grad():
        model.head[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        vitx.load(ID)(model, x)


def test_what_the_card_says_of_training(proof):
    card = catalog.load().models["vit-shapley-glyph"]
    assert card.metrics["top1"] >= 0.97
    assert card.metrics["agrees_with_glyph"] >= 0.97
    proof(
        ID,
        "top-1 of the surrogate, half of the patches hidden",
        card.metrics["top1_half_hidden"],
        at_least=0.8,
        kind="ground truth",
    )
    share = card.metrics["explainer_loss"] / card.metrics["explainer_loss_equal_shares"]
    proof(ID, "loss of the explainer over that of equal shares", share, at_most=0.9, kind="ground truth")


def test_agrees_with_sampled_shapley_values(proof):
    """Unseen scenes: the predicted values against KernelSHAP of the same surrogate."""
    scenes = glyphs.scenes(3, 60)
    model: Any = models.load("vit-shapley-glyph").model
    x, labels = glyphs.normalise(scenes.images), scenes.labels[:, 0]
    ours = vitx.load(ID)(model, x, labels).flatten(1)
    options = {"samples": 1000, "removal": "drop", "score": "probability"}
    theirs = vitx.load("kernelshap")(model.surrogate, x, labels, **options).flatten(1)
    correlation = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(ours, theirs, strict=True)]
    ).mean()
    inside = glyphs.patch_fraction(scenes.object_masks[:, 0], (14, 14)).flatten(1)
    positive = ours.clamp(min=0)
    share = ((positive * inside).sum(1) / positive.sum(1)).mean()
    oracle = "KernelSHAP, 1,000 coalitions, 3 unseen scenes"
    proof(ID, "correlation with sampled values", correlation, at_least=0.5, kind="ground truth", oracle=oracle)
    proof(
        ID, "positive relevance inside the creature", share, at_least=0.4, kind="ground truth", oracle="3 unseen scenes"
    )

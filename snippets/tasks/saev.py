# %% [markdown]
# # SAEV: a sparse autoencoder on the patches of a Vision Transformer
#
# What do the directions in a model's feature space stand for, and does the model use them? A sparse autoencoder writes the
# activation $x$ of each patch, after one block, as a sum of few out of many learned directions:
#
# $$f = \operatorname{ReLU}\big(W_\text{enc}(x - b_\text{dec}) + b_\text{enc}\big),\qquad
# \hat x = W_\text{dec} f + b_\text{dec},\qquad
# L = \tfrac1D \lVert \hat x - x \rVert_2^2 + \lambda \lVert f \rVert_1 .$$
#
# Each of the $S \gg D$ features is shown by the patches where it is large, which gives a hypothesis of what it means. The
# test is an edit: set feature $k$ to another value $v$, keep the error $\varepsilon = x - \hat x$ that the autoencoder
# made, and let the rest of the model run on
#
# $$x' = \hat x(f') + \varepsilon = x + (v - f_k)\,w_k,\qquad w_k \text{ column } k \text{ of } W_\text{dec}.$$
#
# Catalogue entry: `saev`.

# %%
import math
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import (
    UnsupportedModel,
    check,
    embed,
    grid,
    logits_of_tokens,
    require_finite,
    stored,
    target_classes,
    target_scores,
)


class Dictionary(nn.Module):
    """A sparse autoencoder of the patch tokens after one block of a model.

    Args:
        width: D. features: S.
        layer: index of the block, from 0.
        names: S names; by default "feature 0" and so on.
    """

    def __init__(self, width: int, features: int, layer: int, names: tuple[str, ...] = ()):
        super().__init__()
        self.layer = layer
        self.names = tuple(names) or tuple(f"feature {index}" for index in range(features))
        start = nn.functional.normalize(torch.randn(features, width), dim=1)
        self.decoder = nn.Parameter(start)  # (S, D): the transpose of W_dec, but for the length of its rows
        self.encoder = nn.Parameter(start.T.clone())  # (D, S): the transpose of W_enc
        self.encoder_bias = nn.Parameter(torch.zeros(features))
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        # x in the equations is (activation - mean) / scale, whose norm is sqrt(D) on the average.
        self.mean: Tensor
        self.scale: Tensor
        self.largest: Tensor  # (S,): the largest value of each feature that was seen
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("largest", torch.ones(features))

    def prepare(self, activations: Tensor) -> None:
        """Set mean and scale from activations (n, D)."""
        self.mean.copy_(activations.mean(0))
        self.scale.copy_((activations - self.mean).norm(dim=-1).mean() / math.sqrt(len(self.mean)))

    def directions(self) -> Tensor:
        """w (S, D), each of unit length: without that, large directions would buy small, cheap values."""
        return nn.functional.normalize(self.decoder, dim=1)

    def encode(self, activations: Tensor) -> Tensor:
        """f (..., S) of activations (..., D), at least 0."""
        x = (activations - self.mean) / self.scale
        return ((x - self.decoder_bias) @ self.encoder + self.encoder_bias).relu()

    def decode(self, f: Tensor) -> Tensor:
        """Activations (..., D) of features (..., S)."""
        return (f @ self.directions() + self.decoder_bias) * self.scale + self.mean

    def loss(self, activations: Tensor, weight: float) -> Tensor:
        """L of activations (n, D), averaged over them; weight is lambda."""
        f = self.encode(activations)
        error = (self.decode(f) - activations) / self.scale
        return error.square().mean() + weight * f.sum(-1).mean()


class Features(NamedTuple):
    """Which features fire where, and what the answer owes to each."""

    names: tuple[str, ...]  # S
    scores: Tensor  # (B, S): fall of the target logit when the feature is edited; 0 where it is silent
    activations: Tensor  # (B, S, gh, gw): f, at least 0
    logits: Tensor  # (B, classes) of the model as it is

    @property
    def attention(self) -> Tensor:
        """The activations, under the name by which vitx shows the map of a concept."""
        return self.activations

    def heatmap(self) -> Tensor:
        """(B, gh, gw): the scores of all features, each shared out over the patches where it fires; sums to theirs."""
        total = self.activations.sum((2, 3), keepdim=True)
        share = self.activations / total.where(total > 0, 1)
        return (self.scores[..., None, None] * share).sum(1)


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    dictionary: Dictionary | None = None,
    factor: float = 0.0,
    chunk: int = 64,
) -> Features:
    """Features of every patch, and the effect on the target logit of editing each one that fires.

    Args:
        model: timm VisionTransformer in eval mode, with a dictionary of its own such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        dictionary: for a model without one, such as ``learn`` gives.
        factor: what a feature is set to at all patches, as a multiple of the largest value seen in training. 0 takes
            it out; the authors suppress with -2.
        chunk: edited pictures per forward pass; bounds the memory.

    Returns:
        Features; ``.heatmap()`` gives (B, gh, gw), signed.

    Raises:
        UnsupportedModel: the model has no dictionary. ValueError: see ``vitx.vit.check``.

    Source: Stevens et al. 2025, by the authors' code.
    """
    check(model, images)
    dictionary, prefix = dictionary_of(model, dictionary), model.num_prefix_tokens
    with torch.no_grad():
        tokens = tokens_after(model, images, dictionary.layer)  # (B, N, D)
        f = dictionary.encode(tokens[:, prefix:])  # (B, P, S)
        logits = require_finite(model, logits_of_tokens(model, tokens, dictionary.layer + 1))
        require_finite(model, f)
        classes = target_classes(logits, target)
        before = target_scores(logits, classes)  # (B,)
        directions = dictionary.scale * dictionary.directions()  # (S, D), in units of the activations
        scores = torch.zeros_like(f[:, 0])  # (B, S)
        for picture, feature in zip(*(part.split(chunk) for part in f.amax(1).nonzero().T), strict=True):
            change = factor * dictionary.largest[feature, None] - f[picture, :, feature]  # (n, P): v - f_k
            edited = tokens[picture]
            edited[:, prefix:] += change[..., None] * directions[feature, None]  # (n, P, D)
            after = logits_of_tokens(model, edited, dictionary.layer + 1)
            scores[picture, feature] = before[picture] - target_scores(after, classes[picture])
    return Features(dictionary.names, scores, f.transpose(1, 2).unflatten(2, grid(model, images)), logits)


def edit(
    model: VisionTransformer,
    images: Tensor,
    factors: dict[int, float],
    patches: Tensor | None = None,
    dictionary: Dictionary | None = None,
) -> Tensor:
    """Logits (B, classes) when features are set to multiples of their largest value.

    Args:
        factors: by feature, as -2 to suppress it or 2 to force it.
        patches: (B, gh, gw) bool, where; None is everywhere. What the autoencoder misses is left as it is.
        dictionary: as in ``explain``.
    """
    check(model, images)
    dictionary, prefix = dictionary_of(model, dictionary), model.num_prefix_tokens
    with torch.no_grad():
        tokens = tokens_after(model, images, dictionary.layer)
        index = torch.tensor(list(factors), dtype=torch.long, device=images.device)  # (K,)
        values = dictionary.largest[index] * torch.tensor(list(factors.values())).to(dictionary.largest)
        change = values - dictionary.encode(tokens[:, prefix:])[..., index]  # (B, P, K)
        if patches is not None:
            change = change * patches.flatten(1)[..., None]
        tokens[:, prefix:] += change @ (dictionary.scale * dictionary.directions()[index])
        return logits_of_tokens(model, tokens, dictionary.layer + 1)


def tokens_after(model: VisionTransformer, images: Tensor, layer: int) -> Tensor:
    """Tokens (B, N, D) after block ``layer``."""
    return model.blocks[: layer + 1](embed(model, images))


def dictionary_of(model: VisionTransformer, dictionary: Dictionary | None) -> Dictionary:
    """The dictionary that is given, or the model's own; UnsupportedModel where there is none."""
    found: Any = getattr(model, "dictionary", None) if dictionary is None else dictionary
    if found is None:
        raise UnsupportedModel(
            "this model has no dictionary of sparse features: take the model saev-glyph, or let learn() fit one."
        )
    return found


def learn(
    model: VisionTransformer,
    images: Tensor,
    *,
    layer: int = -2,
    features: int = 1024,
    weight: float = 1e-3,
    steps: int = 200,
    batch: int = 1024,
    rate: float = 2e-3,
    generator: torch.Generator | None = None,
) -> Dictionary:
    """A dictionary learned from the patches of a few pictures: quick, and good for these only.

    Args:
        model: any timm VisionTransformer in eval mode. images: (B, 3, H, W), normalised.
        layer: index of the block that is read, the last but one as in the paper; negative from the end.
        features: S. weight: lambda. steps, batch: of Adam, in patches. rate: its largest learning rate.
        generator: draws start and batches; None is a new one seeded 0.
    """
    check(model, images)
    generator = generator or torch.Generator().manual_seed(0)
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer} is out of range: the model has {depth} blocks.")
    with torch.no_grad():
        pool = tokens_after(model, images, layer % depth)[:, prefix:].flatten(0, 1)  # (B P, D)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        dictionary = Dictionary(model.embed_dim, features, layer % depth).to(pool)
        dictionary.prepare(pool)
        optimiser = torch.optim.Adam(dictionary.parameters())
        for step in range(steps):
            rows = torch.randint(len(pool), (batch,), generator=generator).to(pool.device)
            share = min(1.0, (step + 1) / (0.1 * steps))  # learning rate and lambda warm up
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.zero_grad()
            dictionary.loss(pool[rows], weight * share).backward()
            optimiser.step()
    with torch.no_grad():
        dictionary.largest.copy_(dictionary.encode(pool).amax(0))
    return dictionary.requires_grad_(False).eval()


def load_pretrained(path) -> VisionTransformer:
    """The classifier in glyph.safetensors with the dictionary in a safetensors file beside it, in eval mode."""
    metadata, weights = stored(path)
    model = VisionTransformer(**metadata["backbone"], num_classes=metadata["num_classes"])
    model.load_state_dict(load_file(path.with_name("glyph.safetensors")))
    width, features = weights["encoder"].shape
    dictionary = Dictionary(width, features, metadata["layer"], tuple(metadata["names"]))
    dictionary.load_state_dict(weights)
    model.add_module("dictionary", dictionary)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The authors train dictionaries of some 24,000 features, by default on 100 million patches, of ViT-B models such as CLIP
#    and DINOv2. The dictionary of `saev-glyph` has 1,024 features, eight for each channel, and learned for two minutes from
#    392,000 patches of the glyph world. The block is the last but one, as theirs, which leaves one block between edit and
#    answer. $\lambda = 0.012$ lets about 29 features fire in a patch; in a short trial with 0.001, of the size of the
#    authors', some 400 of them did.
# 2. The paper's exploration is done by a person at a screen: look at patches that excite a feature, guess its meaning, move a
#    slider. Here the truth of the glyph world names the features, by the F1 score of firing against what the patch shows,
#    as the authors' code does with the labels of ADE20K; and `explain` edits every feature that fires, one after the other.
# 3. `explain` sets a feature to 0, which takes out what it contributes. The authors' code and its notes set it to $-2$ times its
#    largest value at every patch (`factor=-2`, and `edit`), which also pushes patches where it was silent.
# 4. Unit length of the directions is built into the decoder, where the authors' code takes the gradient along them off and
#    rescales after each step. Encoder and decoder start as transposes of each other, as in their later code.
# 5. Only patch tokens are read and edited; class token and registers are left alone.
#
# What the small model cannot show: glyph was trained to name creatures at their patches, so features that stand for
# creatures are no surprise; and its world has no abstractions, cultures or styles, which the paper finds in CLIP.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, images, models, plot

    def show(seed: int) -> None:
        """A scene with the features that count for each creature, the answers after edits; and features of photographs."""
        shown = 4
        figure = Figure(figsize=(13, 7.2), layout="constrained")
        axes = figure.subplots(3, 3 + shown)
        for place in axes.flat:
            place.axis("off")
        scene = glyphs.scenes(1, seed, creatures=2)
        picture = scene.images[0].permute(1, 2, 0).numpy()
        model: Any = models.load("saev-glyph").model
        x = glyphs.normalise(scene.images)
        for row, label in enumerate(scene.labels[0].tolist()):
            found = explain(model, x, torch.tensor([label]))
            best = found.scores[0].argsort(descending=True)[:shown].tolist()
            plot.overlay(axes[row, 0], picture, None, "the picture")
            plot.overlay(axes[row, 1], picture, found.heatmap()[0], f"scores for {glyphs.CLASS_NAMES[label]}")
            for place, feature in zip(axes[row, 2:], best, strict=False):
                title = f"{found.names[feature]}: {float(found.scores[0, feature]):+.1f}"
                plot.overlay(place, picture, found.activations[0, feature], title)
            bars = axes[row, -1]
            bars.axis("on")
            edited = edit(model, x, {best[0]: -2})
            for offset, logits, name in ((0.2, found.logits, "as it is"), (-0.2, edited, "edited")):
                bars.barh(torch.arange(12) + offset, logits[0].softmax(-1), height=0.4, label=name)
            bars.set_yticks(range(12), glyphs.CLASS_NAMES)
            bars.tick_params(labelsize=6, length=0)
            bars.set_title(f"{found.names[best[0]]} set to -2", fontsize=8, pad=3)
            bars.legend(fontsize=6)
        photo = models.load("photo")
        x = torch.stack([photo.preprocess(images.open_image(name)) for name in images.PHOTOGRAPHS])
        learned = learn(photo.model, x)  # pyright: ignore[reportArgumentType]
        found = explain(photo.model, x[:1], dictionary=learned)  # pyright: ignore[reportArgumentType]
        picture = images.to_array(x[0], photo.mean, photo.std)
        plot.overlay(axes[2, 0], picture, None, f"photo: {photo.class_names[int(found.logits[0].argmax())]}")
        plot.overlay(axes[2, 1], picture, found.heatmap()[0], "scores")
        for place, feature in zip(axes[2, 2:], found.scores[0].argsort(descending=True).tolist(), strict=False):
            title = f"{found.names[feature]}: {float(found.scores[0, feature]):+.2f}"
            plot.overlay(place, picture, found.activations[0, feature], title)
        demo.show(figure, "saev")

    show(seed=7)

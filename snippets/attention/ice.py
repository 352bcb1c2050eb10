# %% [markdown]
# # ICE: a class for every patch
#
# Which patches, asked one by one, name the class? ICE trains a Vision Transformer to classify each patch token $z_p$ after
# the last block, with one class more that stands for background:
#
# $$s_p = W z_p \in \mathbb R^{K+1},\qquad \hat c_p = \arg\max_k s_{p,k},\qquad
# \mathcal F = \{p : \hat c_p \ne \mathrm{bg}\}.$$
#
# The picture's logits are the mean of $s_p$ over the foreground $\mathcal F$. Two losses pull against each other,
#
# $$\mathcal L = \mathrm{CE}\Big(\tfrac{1}{|\mathcal F| + 1}\sum_{p \in \mathcal F} s_p,\ y\Big)
# + \lambda\,\mathrm{CE}\Big(\tfrac{1}{2P}\sum_{p} s_p,\ \mathrm{bg}\Big),$$
#
# so that patches which the class does not need become background. The map is $\operatorname{softmax}(s_p)_c$.
# Catalogue entry: `ice`.

# %%
from typing import Any, NamedTuple

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, check, grid, require_finite, stored, target_classes


class IceTransformer(VisionTransformer):
    """A Vision Transformer that classifies its patch tokens, as they leave the last block, into K classes and background.

    Args:
        classes: K. options: of timm's ``VisionTransformer``.
    """

    def __init__(self, classes: int, **options: Any):
        super().__init__(num_classes=0, global_pool="", final_norm=False, **options)
        self.num_classes = classes
        self.patch_head = nn.Linear(self.embed_dim, classes + 1, bias=False)  # W; the last row is the background

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of the picture from tokens (B, N, D): what its foreground says on the average."""
        return foreground_mean(self.patch_head(x[:, self.num_prefix_tokens :]))[:, :-1]


def foreground_mean(scores: Tensor) -> Tensor:
    """Sum of patch scores (B, P, K + 1) over the foreground, over one more than its size: (B, K + 1)."""
    foreground = scores.argmax(-1, keepdim=True) != scores.shape[-1] - 1  # (B, P, 1)
    return (scores * foreground).sum(1) / (foreground.sum(1) + 1)


def ice_loss(scores: Tensor, wanted: Tensor, weight: float = 0.025, least: float = 0.1) -> Tensor:
    """The adversarial pair of losses, from patch scores (B, P, K + 1) and class probabilities (B, K).

    Args:
        weight: lambda, of the loss that makes background.
        least: share of foreground in the batch below which lambda is 0.
    """
    background = wanted.new_zeros(len(wanted)).unsqueeze(1)
    loss = nn.functional.cross_entropy(foreground_mean(scores), torch.cat([wanted, background], 1))
    last = scores.shape[-1] - 1
    if (scores.argmax(-1) != last).to(scores.dtype).mean() < least:
        return loss
    everywhere = torch.full((len(scores),), last, device=scores.device)
    return loss + weight * nn.functional.cross_entropy(scores.mean(1) / 2, everywhere)


class PatchClasses(NamedTuple):
    """What every patch, asked alone, says."""

    relevance: Tensor  # (B, gh, gw) in [0, 1]: probability of the class asked about
    classes: Tensor  # (B, gh, gw) int: strongest class of the patch; K is the background of an ICE model
    scores: Tensor  # (B, gh, gw, K or K + 1): logits of the patch

    def heatmap(self) -> Tensor:
        """(B, gh, gw): probability of the class asked about."""
        return self.relevance


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> PatchClasses:
    """Class of every patch, and its probability of the class asked about, from one forward pass.

    Args:
        model: an ``IceTransformer`` in eval mode; or any timm VisionTransformer with a classifier, whose head then
            reads every patch token as if it were pooled. Its tokens were not trained for that.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        ``PatchClasses``; ``.heatmap()`` gives the probability of the class, (B, gh, gw).

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a head that reads no single token.

    Source: Choi, Jin, Han 2023, by the authors' code.
    """
    check(model, images)
    with torch.inference_mode():
        tokens = model.forward_features(images)  # (B, N, D)
        classes = target_classes(require_finite(model, model.forward_head(tokens)), target)  # (B,)
        scores = patch_scores(model, tokens[:, model.num_prefix_tokens :])  # (B, P, K or K + 1)
        index = classes[:, None, None].expand(-1, scores.shape[1], 1)
        relevance = scores.softmax(-1).gather(2, index)[..., 0]  # (B, P)
        parts = relevance, scores.argmax(-1), require_finite(model, scores)
    return PatchClasses(*(part.clone().unflatten(1, grid(model, images)) for part in parts))


def patch_scores(model: VisionTransformer, patches: Tensor) -> Tensor:
    """Logits of single patch tokens (B, P, D) by the ICE head, or by the model's own head."""
    if hasattr(model, "patch_head"):  # not isinstance: in a notebook IceTransformer exists twice
        return model.get_submodule("patch_head")(patches)
    if isinstance(model.attn_pool, AttentionPoolLatent):
        patches = model.attn_pool(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])  # each one alone
    elif model.global_pool not in ("token", "avg"):
        raise UnsupportedModel(f"the head of this model reads global_pool={model.global_pool!r}, not single tokens.")
    patches = model.fc_norm(patches)
    if hasattr(model, "dist_token"):
        return (model.head(patches) + model.get_submodule("head_dist")(patches)) / 2
    return model.head(patches)


def load_pretrained(path) -> IceTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = IceTransformer(metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper's picture is binary: foreground or background, `classes != K` here. The map is the probability of a class
#    instead, so that it can be asked about any class; the background's share is taken from it.
# 2. The model below, `ice-glyph`, is small and knows the glyph world only. It started from `glyph`, which had learned to
#    name creatures in their patches, and took $\lambda = 1$: with the authors' 0.025 nearly every patch stayed foreground in
#    a training this short.
# 3. A stock model has no background and never classified single patches: on it its own head reads them, which the paper does
#    not propose. There every patch of the picture names a class, since nothing taught it to say none.
# 4. Half a mean in the second loss, one more in the denominator of the first, no final norm, and no second loss when fewer
#    than a tenth of the patches are foreground: these details are from the authors' code, which trains on single labels.
# 5. Other heads: a distilled model's two heads are averaged; attention pooling reads each patch as if it were alone.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures, the patches called foreground, and the map of each creature's class."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        images = glyphs.normalise(scenes.images)
        model = models.load("ice-glyph").model
        first, second = (explain(model, images, label) for label in scenes.labels.T)  # pyright: ignore[reportArgumentType]
        foreground = first.classes.ne(len(glyphs.CLASS_NAMES)).float()
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row]]
            cells = [plot.Cell(picture, None), plot.Cell(picture, foreground[row], "foreground")]
            maps = (first.relevance, second.relevance)
            cells += [plot.Cell(picture, m[row], name) for m, name in zip(maps, names, strict=True)]
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.1), "ice")

    show(seed=7)

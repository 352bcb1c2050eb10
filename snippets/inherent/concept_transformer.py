# %% [markdown]
# # ConceptTransformer: class logits that are linear in the attention to named concepts
#
# Which named concepts made up this decision, how much did each add, and where were they seen? The classifier head is
# replaced by cross-attention: each image token $x_p$ asks, learned concept embeddings $e_c$ answer,
#
# $$\alpha_{pc} = \operatorname{softmax}_c\Big(\tfrac{1}{\sqrt d}\,(W_Q x_p)^\top (W_K e_c)\Big),\qquad
# y_i = b_i + \sum_{c=1}^{C} \beta_c\,\gamma_{ci},\quad
# \beta_c = \frac1P \sum_{p=1}^{P} \alpha_{pc},\quad \gamma_c = O\,W_V\,e_c .$$
#
# The $\gamma_{ci}$ are constants once training is over, so $\beta_c\,\gamma_{ci}$ is exactly what concept $c$ adds to the
# logit of class $i$, and $\alpha_{pc}\,\gamma_{ci} / P$ what it adds at patch $p$. Training ties the attention to annotated
# concepts $H$: $L = L_\text{cls} + \lambda\,\lVert \alpha - H \rVert_F^2$. Catalogue entry: `concept-transformer`.

# %%
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, check, grid, require_finite, stored, target_scores


class ConceptTransformer(nn.Module):
    """A timm VisionTransformer whose head is cross-attention from patch tokens to concepts.

    Args:
        backbone: its patch tokens (after the final norm, D channels) are the queries; its own head is not used.
        concepts: K names. One more embedding, "no part", takes the attention of patches that show none of them;
            it has no value vector, so it votes for no class.
        num_classes: number of classes.
    """

    def __init__(self, backbone: VisionTransformer, concepts: tuple[str, ...], num_classes: int):
        super().__init__()
        width = backbone.embed_dim
        self.backbone = backbone
        self.concept_names = concepts
        self.concepts = nn.Parameter(torch.randn(len(concepts) + 1, width) * width**-0.5)  # e, "no part" last
        self.query = nn.Linear(width, width, bias=False)  # W_Q
        self.key = nn.Linear(width, width, bias=False)  # W_K
        self.value = nn.Linear(width, width, bias=False)  # W_V
        self.output = nn.Linear(width, num_classes)  # O and b

    def attend(self, tokens: Tensor) -> Tensor:
        """alpha (B, P, K + 1) of patch tokens (B, P, D): attention to each concept and, last, to none. Rows sum to one."""
        scale = tokens.shape[-1] ** -0.5
        return (scale * self.query(tokens) @ self.key(self.concepts).T).softmax(-1)

    def concept_attention(self, images: Tensor) -> Tensor:
        """alpha (B, P, K + 1) of normalised images (B, 3, H, W)."""
        return self.attend(self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :])

    def concept_values(self) -> Tensor:
        """gamma (K, classes): the logits that a concept would add if every patch attended to it alone."""
        return self.value(self.concepts[:-1]) @ self.output.weight.T

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""
        attention = self.concept_attention(images)[..., :-1].mean(1)  # (B, K)
        return attention @ self.concept_values() + self.output.bias


class Concepts(NamedTuple):
    """What each concept added to the target logit, exactly: ``scores.sum(1) + bias == logit``."""

    names: tuple[str, ...]  # K
    scores: Tensor  # (B, K): contribution of each concept to the target logit; negative speaks against the class
    attention: Tensor  # (B, K, gh, gw): attention of each patch to each concept; over K it sums to at most one
    values: Tensor  # (B, K): gamma of the target class, so that scores = values * attention.mean((2, 3))
    bias: Tensor  # (B,): of the target class

    def heatmap(self) -> Tensor:
        """(B, gh, gw): what each patch added to the target logit, over all concepts; sums to ``logit - bias``."""
        return torch.einsum("bk,bkyx->byx", self.values, self.attention) / self.attention[0, 0].numel()


def explain(model: ConceptTransformer, images: Tensor, target: Tensor | None = None) -> Concepts:
    """The target logit split into concepts and, within each, into patches.

    Args:
        model: a ConceptTransformer in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        Concepts; its ``scores`` and ``heatmap()`` sum to the logit less its bias.

    Raises:
        UnsupportedModel: the model has no attention to concepts.
        ValueError: see ``vitx.vit.check``; also NaN in the weights.

    Source: Rigotti et al. 2022 (ICLR), section 3.
    """
    if not hasattr(model, "concept_attention"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no attention to named concepts: the method explains only a ConceptTransformer, "
            "which was trained with them (the model concept-glyph)."
        )
    check(model.backbone, images)
    with torch.no_grad():
        attention = model.concept_attention(images)[..., :-1]  # (B, P, K)
        values, biases = model.concept_values(), model.output.bias  # (K, classes), (classes,)
        logits = attention.mean(1) @ values + biases
        require_finite(model, logits)
        if target is None:
            target = logits.argmax(-1)
        target_scores(logits, target)  # refuses a class that the model does not have
        target = torch.as_tensor(target, device=images.device).long()
        values = values.T[target]  # (B, K)
    return Concepts(
        names=model.concept_names,
        scores=values * attention.mean(1),
        attention=attention.transpose(1, 2).unflatten(-1, grid(model.backbone, images)),
        values=values,
        bias=biases.detach()[target],
    )


def load_pretrained(path) -> ConceptTransformer:
    """The model in a safetensors file, in eval mode: its metadata names the backbone's arguments, concepts and classes."""

    metadata, weights = stored(path)
    backbone = VisionTransformer(**metadata["backbone"], num_classes=0)
    model = ConceptTransformer(backbone, tuple(metadata["concepts"]), metadata["num_classes"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. One attention head. Both the paper's softmax and its proof of faithfulness are about one attention matrix; the official
#    code has several heads, whose mean is shown while each head has its own $\gamma$.
# 2. A further embedding, "no part", which takes the attention of background patches and has no value vector. In the paper a
#    patch without annotation is left out of the explanation loss and may attend to whatever it likes; here most patches show
#    background, and their votes would drown those of the parts.
# 3. All fifteen concepts are spatial, so there are no global ones, which the paper reads from one pooled token.
# 4. $H$ holds the share of each patch that a part covers, not zeros and ones; the loss is the mean over patches of
#    $\lVert \alpha_p - H_p \rVert^2$ with $\lambda = 10$.
#
# What the small model cannot show: its concepts come from the generator that also defines the classes, and every patch is
# annotated, so it says nothing about concepts that people name on photographs, or that are missing from the list. The
# contributions are exact for the head only: how the backbone came to see a forked tail in a patch is not explained, and its
# tokens have seen the whole picture. A head that is linear in what it saw also has a price: the model card of concept-glyph
# beside that of glyph shows it, most of all for scenes with two creatures, whose parts the sum over patches mixes.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """One scene of two creatures, asked for each: map, contributions by concept, and where the strongest were seen."""
        scene = glyphs.scenes(1, seed, creatures=2)
        picture = scene.images[0].permute(1, 2, 0).numpy()
        images = glyphs.normalise(scene.images).expand(2, -1, -1, -1)
        found = explain(models.load("concept-glyph").model, images, scene.labels[0])  # pyright: ignore[reportArgumentType]
        heat, shown = found.heatmap(), 5
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        axes = figure.subplots(2, 3 + shown, width_ratios=[1, 1, 1.2] + [1] * shown)
        for row, label in enumerate(scene.labels[0].tolist()):
            scores = found.scores[row]
            plot.overlay(axes[row, 0], picture, None, "the picture")
            plot.overlay(axes[row, 1], picture, heat[row], f"for and against {glyphs.CLASS_NAMES[label]}")
            of_class = {3 * part + variant for part, variant in enumerate(glyphs.CLASS_PARTS[label])}
            colours = ["#b5512f" if concept in of_class else "#9aa5ad" for concept in range(len(scores))]
            axes[row, 2].barh(found.names, scores.tolist(), color=colours)
            axes[row, 2].invert_yaxis()
            axes[row, 2].axvline(0, color="black", linewidth=0.6)
            axes[row, 2].tick_params(labelsize=6, length=0)
            axes[row, 2].spines[["top", "right", "left"]].set_visible(False)
            axes[row, 2].set_title(
                f"added to its logit (brown: parts of a {glyphs.CLASS_NAMES[label]})", fontsize=8, pad=3
            )
            for place, concept in zip(axes[row, 3:], scores.argsort(descending=True).tolist()[:shown], strict=True):
                title = f"{found.names[concept]}: {float(scores[concept]):+.1f}"
                plot.overlay(place, picture, found.attention[row, concept], title)
        demo.show(figure, "concept-transformer")

    show(seed=7)

# %% [markdown]
# # MCTformer: one class token for every class
#
# The one class token of a Vision Transformer attends to whatever is there, of whichever class. MCTformer has $C$ class tokens,
# and a picture's label is the sign that token $c$ was needed: its logit is the mean of its channels after the last block. Its
# attention to the patches is then a map of class $c$. A $3 \times 3$ convolution over the patch tokens gives a class
# activation map $F_c$ beside it, and the patches' attention to each other says which of them belong together:
#
# $$A_c = \sum_{l > L - K} \mathbb E_h\big[A^{(l)}_{c,\,\text{patches}}\big],\qquad
# M_c = A_c \odot F_c^{+},\qquad \hat M_c = \Big(\sum_l \mathbb E_h\big[A^{(l)}_{\text{patches},\,\text{patches}}\big]\Big) M_c.$$
#
# $\hat M_c$ is the map. Two multi-label losses train the model, one on the class tokens' logits and one on the mean of $F$.
# Catalogue entry: `mctformer`.

# %%
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, capture, check, grid, require_finite, stored, target_classes, to_grid


class ClassTokenTransformer(VisionTransformer):
    """A Vision Transformer with one class token for every class and a convolution over its patch tokens.

    The class tokens are timm's class token, for class 0, and its register tokens, for the others. There is no final norm.

    Args:
        classes: C, at least 2. options: of timm's ``VisionTransformer``.
    """

    def __init__(self, classes: int, **options: Any):
        super().__init__(num_classes=0, global_pool="", final_norm=False, reg_tokens=classes - 1, **options)
        self.num_classes = classes
        self.patch_head = nn.Conv2d(self.embed_dim, classes, 3, padding=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, C) of final tokens (B, N, D): what the class tokens say."""
        return x[:, : self.num_classes].mean(-1)

    def activation_maps(self, tokens: Tensor) -> Tensor:
        """F (B, C, gh, gw) of final tokens (B, N, D)."""
        return self.patch_head(tokens[:, self.num_classes :].mT.unflatten(2, self.patch_embed.grid_size))

    def both_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the class tokens and of the patches; training adds the loss of both."""
        tokens = self.forward_features(images)
        return self.forward_head(tokens), self.activation_maps(tokens).mean((2, 3))


class Maps(NamedTuple):
    """What one forward pass says of every class."""

    attention: Tensor  # (B, C, gh, gw), at least 0: class tokens to patches
    activation: Tensor  # (B, C, gh, gw), at least 0: F, rectified
    affinity: Tensor  # (B, P, P), at least 0: patches to patches
    logits: Tensor  # (B, C) of the class tokens

    def fused(self) -> Tensor:
        """M (B, C, gh, gw)."""
        return self.attention * self.activation

    def refined(self, maps: Tensor) -> Tensor:
        """Maps (B, C, gh, gw), where each patch takes the values of the patches that it attends to."""
        return (maps.flatten(2) @ self.affinity.mT).view_as(maps)


def class_maps(model: VisionTransformer, images: Tensor, layers: int = 3) -> Maps:
    """All maps of pictures (B, 3, H, W). Arguments and errors as ``explain``."""
    check(model, images, class_token=True)
    if not hasattr(model, "both_logits"):  # not isinstance: in a notebook ClassTokenTransformer exists twice
        raise UnsupportedModel("this model has no class token for every class: train them, as for mctformer-glyph.")
    if not 1 <= layers <= len(model.blocks):
        raise ValueError(f"layers must be 1 to {len(model.blocks)}, the depth of the model, not {layers}.")
    with torch.no_grad(), capture(model, "attention") as record:
        tokens = model.forward_features(images)  # (B, N, D)
        activation = model.activation_maps(tokens).relu()  # type: ignore[operator]
        logits = require_finite(model, model.forward_head(tokens))
    weights = torch.stack(record["attention"]).mean(2)  # (L, B, N, N)
    classes = model.num_classes
    attention = weights[-layers:, :, :classes, classes:].sum(0).unflatten(2, grid(model, images))
    return Maps(attention, activation, weights[:, :, classes:, classes:].sum(0), logits)


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layers: int = 3,
    activation: bool = True,
    refine: bool = True,
) -> Tensor:
    """Map of a class: its token's attention, times its activation map, spread among patches that belong together.

    Args:
        model: a ``ClassTokenTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the class whose token has the highest logit.
        layers: K, the last layers whose attention of the class tokens counts.
        activation: multiply by the class activation map, as MCTformer-V2 does; False leaves the attention alone (V1).
        refine: spread by the attention among patches, of all layers.

    Returns:
        (B, gh, gw), at least 0.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a model without class tokens for all classes; no such layers.

    Source: Xu et al. 2022, by the authors' code.
    """
    found = class_maps(model, images, layers)
    classes = target_classes(found.logits, target)
    maps = found.fused() if activation else found.attention
    maps = found.refined(maps) if refine else maps
    return to_grid(model, images, maps[torch.arange(len(classes)), classes].flatten(1))


def load_pretrained(path) -> ClassTokenTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = ClassTokenTransformer(metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Taken over from the authors' code: logits as channel means of the class tokens without a final norm, the convolution over
#    patches, the two multi-label losses, the product, the rectified activation map, and the refinement. $K = 3$ is the code's
#    setting for a DeiT of 12 layers; of the six layers here it is half.
# 2. Scaled down: `mctformer-glyph` was fine-tuned for minutes from `glyph`, first on crops round one creature; the authors train
#    DeiT-S for 60 epochs. Their class tokens start as copies of one trained token. Here each also gets the direction of its
#    class in the head of `glyph`: copies did not grow apart in so short a training. The maps here are of one picture at one
#    scale.
# 3. Left out: what the authors make of the maps. They turn them into pseudo labels with another network (PSA) and train a
#    segmentation network on these.
# 4. `activation=False` is the formula of MCTformer-V1 on a model trained as V2.
# 5. What the small model cannot show: `glyph` had learned to name creatures in their patches, masks included, so the numbers on
#    the card say little about labels alone. There are twelve classes and at most two in a picture; the authors have 20 and 80.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures: for each class the attention of its token, and the fused and refined map."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        images = glyphs.normalise(scenes.images)
        model: Any = models.load("mctformer-glyph").model
        rows = [[plot.Cell(picture, None)] for picture in scenes.images.permute(0, 2, 3, 1).numpy()]
        for label in scenes.labels.T:
            attention = explain(model, images, label, activation=False, refine=False)
            whole = explain(model, images, label)
            for row, cells in enumerate(rows):
                name = glyphs.CLASS_NAMES[label[row]]
                cells.append(plot.Cell(cells[0].picture, attention[row], f"attention of {name}"))
                cells.append(plot.Cell(cells[0].picture, whole[row], f"fused, refined: {name}"))
        demo.show(plot.grid(rows, cell=2.1), "mctformer")

    show(seed=7)

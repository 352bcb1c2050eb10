# %% [markdown]
# # TransCAM: a class activation map spread by attention
#
# A convolutional network sees a few pixels at a time, and its class activation map marks the few that tell the class. A
# Conformer runs a transformer beside the convolutions, and the transformer's attention knows which patches belong together, by
# texture in its early layers and by meaning in its late ones. TransCAM takes the activation map $F_c$ of the convolutional
# branch and lets every patch collect the values of the patches that it attends to:
#
# $$M_c = \Big(\sum_l \mathbb E_h\big[A^{(l)}_{\text{patches},\,\text{patches}}\big]\Big) F_c,\qquad
# y_c = \tfrac1P \sum_p F_{c,p} + w_c^\top z_\text{cls}.$$
#
# $F$ is a $3 \times 3$ convolution over the last feature map, which has one cell for each patch. The logits $y$ add both
# branches, and one multi-label loss trains them. Catalogue entry: `transcam`.

# %%
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from vitx.vit import UnsupportedModel, capture, check, embed, require_finite, stored, target_classes, to_grid


class ConvBlock(nn.Module):
    """A residual bottleneck of 1 x 1, 3 x 3 and 1 x 1 convolutions; the middle has a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        middle = outputs // 4
        self.reduce = nn.Conv2d(inputs, middle, 1, bias=False)
        self.spatial = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.expand = nn.Conv2d(middle, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in (middle, middle, outputs))
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(1, outputs))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else nn.Sequential(*projection)

    def forward(self, x: Tensor, added: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Output (B, outputs, H, W) and the middle (B, outputs / 4, H, W); ``added`` joins before the 3 x 3 convolution."""
        hidden = self.norms[0](self.reduce(x)).relu() + added
        middle = self.norms[1](self.spatial(hidden)).relu()
        return (self.norms[2](self.expand(middle)) + self.shortcut(x)).relu(), middle


class Coupling(nn.Module):
    """What goes with one transformer block: two convolutional blocks, and the paths to the tokens and back.

    Args:
        ratio: cells of the feature map along one side of a patch.
    """

    def __init__(self, inputs: int, outputs: int, width: int, stride: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.convolution, self.fusion = ConvBlock(inputs, outputs, stride), ConvBlock(outputs, outputs)
        self.down = nn.Sequential(nn.Conv2d(outputs // 4, width, 1), nn.AvgPool2d(ratio))
        self.down_norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Sequential(nn.Conv2d(width, outputs // 4, 1), nn.GroupNorm(1, outputs // 4), nn.ReLU())

    def forward(self, features: Tensor, tokens: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
        """Features (B, channels, H, W) and tokens (B, N, D) of the next stage."""
        features, middle = self.convolution(features)
        local = self.down(middle)  # (B, D, gh, gw)
        added = functional.gelu(self.down_norm(local.flatten(2).mT))  # (B, P, D)
        prefix = tokens.shape[1] - added.shape[1]
        tokens = block(tokens + functional.pad(added, (0, 0, prefix, 0)))
        back = self.up(tokens[:, prefix:].mT.unflatten(2, local.shape[2:]))
        return self.fusion(features, functional.interpolate(back, scale_factor=self.ratio))[0], tokens


class Conformer(VisionTransformer):
    """A transformer and a convolutional network, coupled block by block, which classify together.

    Args:
        classes: K. width: channels of the first convolutional stage; the second has twice as many.
        options: of timm's ``VisionTransformer``, with patch_size 8.
    """

    def __init__(self, classes: int, width: int = 64, **options: Any):
        super().__init__(num_classes=0, **options)
        self.num_classes = classes
        depth = len(self.blocks)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(1, width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )  # two cells along one side of a patch
        self.first = ConvBlock(width, width)
        half = depth // 2  # from this block on, a cell for each patch
        self.couplings = nn.ModuleList(
            Coupling(width, width, self.embed_dim, 1, 2)
            if index < half
            else Coupling(width * (2 if index > half else 1), 2 * width, self.embed_dim, 2 if index == half else 1, 1)
            for index in range(1, depth)
        )
        self.activation_head = nn.Conv2d(2 * width, classes, 3, padding=1)
        self.token_head = nn.Linear(self.embed_dim, classes)

    def branches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """F (B, K, gh, gw) of the convolutional branch and final tokens (B, N, D) of the transformer."""
        features = self.first(self.stem(images))[0]
        tokens = self.blocks[0](embed(self, images))
        for block, coupling in zip(list(self.blocks)[1:], self.couplings, strict=True):
            features, tokens = coupling(features, tokens, block)
        return self.activation_head(features), self.norm(tokens)

    def both_logits(self, activation: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, K) of what ``branches`` gives."""
        return activation.mean((2, 3)) + self.token_head(tokens[:, 0])

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, K) of pictures (B, 3, H, W); there are no masks."""
        return self.both_logits(*self.branches(x))


class Maps(NamedTuple):
    """What one forward pass says of every class."""

    activation: Tensor  # (B, K, gh, gw): F, of any sign
    attention: Tensor  # (B, P, P), at least 0: patches to patches
    logits: Tensor  # (B, K)

    def refined(self) -> Tensor:
        """M (B, K, gh, gw)."""
        return (self.activation.flatten(2) @ self.attention.mT).view_as(self.activation)


def class_maps(model: VisionTransformer, images: Tensor) -> Maps:
    """All maps of pictures (B, 3, H, W). Errors as ``explain``."""
    check(model, images, class_token=True)
    if not hasattr(model, "couplings"):  # not isinstance: in a notebook Conformer exists twice
        raise UnsupportedModel("this model has no convolutional branch: train a Conformer, as for transcam-glyph.")
    conformer: Any = model
    with torch.no_grad(), capture(model, "attention") as record:
        activation, tokens = conformer.branches(images)
        logits = require_finite(model, conformer.both_logits(activation, tokens))
    patches = torch.stack(record["attention"])[..., model.num_prefix_tokens :, model.num_prefix_tokens :]
    return Maps(activation, patches.mean(2).sum(0), logits)


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Class activation map of the convolutional branch, spread by the attention of the transformer branch.

    Args:
        model: a ``Conformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        M_c (B, gh, gw), raw; the authors set negative values to 0 before they segment.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``; a model without a convolutional branch.

    Source: Li et al. 2022, by the authors' code.
    """
    found = class_maps(model, images)
    classes = target_classes(found.logits, target)
    return to_grid(model, images, found.refined()[torch.arange(len(classes)), classes].flatten(1))


def load_pretrained(path) -> Conformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = Conformer(metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Taken over from the authors' code: two branches coupled before and after every transformer block but the first, the
#    $3 \times 3$ head over a last feature map with one cell for each patch, the summed logits under one multi-label loss, and the
#    map: the attention of all layers among patches, mean over heads, summed, times the activation map.
# 2. Scaled down: Conformer-S has 12 blocks, patches of 16 pixels and three convolutional stages of 256 to 1024 channels, and
#    the authors start from pretrained weights of both branches. `transcam-glyph` has the six blocks of `glyph`, patches of 8,
#    which leave room for two stages (64 and 128 channels), and minutes of training; only its transformer branch was trained
#    before.
# 3. Changed so that the transformer could start from `glyph`: it cuts its own patches from the picture and has positions,
#    where Conformer's reads the convolutional stem and has none; the path from convolutions to tokens starts at zero; and the
#    class token is left alone at a coupling, where the code adds it to itself. Batch norm became group norm with one group.
# 4. Left out: the sum over scales and mirror images, the dense CRF, and the networks (PSA, DeepLab) trained on the result.
# 5. What the small model cannot show: `glyph` had learned to name creatures in their patches, masks included, and the
#    convolutional branch receives its tokens, so the numbers on the card say little about labels alone or about how far a
#    convolutional network trained for long falls short. Attention betters the maps of scenes with one creature, and of scenes
#    with two it does not: the card has both.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures: for each class the activation map and what attention makes of it."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        found = class_maps(models.load("transcam-glyph").model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
        before, after = found.activation.relu(), found.refined().relu()
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            cells = [plot.Cell(picture, None)]
            for label in scenes.labels[row].tolist():
                cells.append(plot.Cell(picture, before[row, label], f"CAM, {glyphs.CLASS_NAMES[label]}"))
                cells.append(plot.Cell(picture, after[row, label], f"TransCAM, {glyphs.CLASS_NAMES[label]}"))
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.1), "transcam")

    show(seed=7)

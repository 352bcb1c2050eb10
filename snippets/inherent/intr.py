# %% [markdown]
# # INTR: every class looks for itself
#
# Where did the class look when it claimed the picture, and at which attributes? INTR gives each class $c$ a learned query
# $q^{(c)}$. A decoder lets all queries search the picture by cross-attention, and one vector $w$, the same for all classes,
# asks each answer whether the class was found. In every decoder layer, with $z^{(c)} = 0$ at the start and patch tokens $X$,
#
# $$\begin{aligned}
# z^{(c)} &\leftarrow \operatorname{LN}\big(z^{(c)} + \text{self-attention of } z + q \text{ over all classes}\big),\\
# \alpha^{(c)}_m &= \operatorname{softmax}_p\Big(\tfrac{1}{\sqrt d}\,(W_Q^m (z^{(c)} + q^{(c)}))^\top W_K^m x_p\Big),\qquad
# z^{(c)} \leftarrow \operatorname{LN}\Big(z^{(c)} + W_O \big[\textstyle\sum_p \alpha^{(c)}_{m,p}\,W_V^m x_p\big]_m\Big),
# \end{aligned}$$
#
# then an MLP with its own norm. The logit is $y_c = w^\top \operatorname{LN}(z^{(c)})$. Since $w$ knows no class, what speaks for
# $c$ must have come through its own attention $\alpha^{(c)}$: the heads $m$ of the last layer show the class's attributes, and
# their mean is the map. Catalogue entry: `intr`.

# %%
import math
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, check, grid, require_finite, stored, target_classes


class Attend(nn.Module):
    """Multi-head attention that also returns its weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries (B, Q, D), keys and values (B, N, D): (B, Q, D), and weights (B, h, Q, N) that sum to one over N."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, Q or N, d)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class DecoderLayer(nn.Module):
    """Classes compare notes, search the picture, and think: each step with a residual path and a norm behind it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.among, self.search = Attend(width, heads), Attend(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """z and queries (B, K, D), patches (B, P, D): the new z, and the cross-attention (B, h, K, P)."""
        z = self.norm1(z + self.among(z + queries, z + queries, z)[0])
        found, weights = self.search(z + queries, patches, patches)
        z = self.norm2(z + found)
        return self.norm3(z + self.mlp(z)), weights


class INTR(nn.Module):
    """A Vision Transformer whose head is a decoder with one query for each class.

    Args:
        backbone: its patch tokens after the final norm are searched; its own head is not used.
        classes: K. layers, heads: of the decoder.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, layers: int = 2, heads: int = 4):
        super().__init__()
        width = backbone.embed_dim
        self.backbone = backbone
        self.queries = nn.Parameter(torch.randn(classes, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.presence = nn.Linear(width, 1, bias=False)  # w

    def decode(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K), and cross-attention (B, h, K, P) of every layer, from patch tokens (B, P, D)."""
        queries = self.queries.expand(len(patches), -1, -1)
        z, attention = torch.zeros_like(queries), []
        for layer in self.layers:
            z, weights = layer(z, queries, patches)
            attention.append(weights)
        return self.presence(self.norm(z))[..., 0], attention

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, 3, H, W)."""
        return self.decode(self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :])[0]


class ClassAttention(NamedTuple):
    """Where the query of one class looked."""

    attention: Tensor  # (B, h, gh, gw) of each head; each map sums to one
    logits: Tensor  # (B, K)

    def heatmap(self) -> Tensor:
        """(B, gh, gw): mean over the heads; sums to one."""
        return self.attention.mean(1)


def explain(model: INTR, images: Tensor, target: Tensor | None = None, *, layer: int = -1) -> ClassAttention:
    """Cross-attention of the query of a class, head by head.

    Args:
        model: an INTR in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        layer: of the decoder; the last one by default, whose answer the class vector reads.

    Returns:
        ClassAttention; ``.heatmap()`` is the mean over heads, (B, gh, gw).

    Raises:
        UnsupportedModel: the model has no class queries.
        ValueError: see ``vitx.vit.check``; also NaN in the weights, or no such layer.

    Source: Paul et al. 2024 (ICLR), section 3, as the authors' code computes it.
    """
    if not hasattr(model, "presence"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no class queries: the method explains only an INTR, which was trained with them "
            "(the model intr-glyph)."
        )
    check(model.backbone, images)
    if not -len(model.layers) <= layer < len(model.layers):
        raise ValueError(f"layer {layer} is out of range: the decoder has {len(model.layers)} layers.")
    with torch.no_grad():
        patches = model.backbone.forward_features(images)[:, model.backbone.num_prefix_tokens :]  # (B, P, D)
        logits, attention = model.decode(patches)
        classes = target_classes(require_finite(model, logits), target)
        chosen = attention[layer][range(len(images)), :, classes]  # (B, h, P)
    return ClassAttention(chosen.unflatten(-1, grid(model.backbone, images)), logits)


def load_pretrained(path) -> INTR:
    """The model in a safetensors file, in eval mode; its metadata names the arguments of backbone and decoder."""
    about, weights = stored(path)
    model = INTR(VisionTransformer(**about["backbone"], num_classes=0), **about["decoder"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The patch tokens come from a Vision Transformer. The authors take a ResNet-50 and a DETR encoder of six layers, which
#    does the same work: tokens that have seen each other.
# 2. Two decoder layers with four heads of 32 channels, where the authors have six layers with eight heads.
# 3. No bias beside $w$. The authors' linear layer has one; as the same number for every class it cannot change a decision.
# 4. Scenes with two creatures are trained with both labels, each worth a half.
#
# What the small model shows, and cannot show: it names nearly every creature, yet its queries look only about twice as
# much at their creature as at any other place of that size, and little more at their own creature than at another beside
# it; the card has the numbers. Some heads look everywhere or at the background. Attention says where a query looked, not
# what it took from there: the tokens have seen the whole picture, so that those of the background may hold the class as
# well. Twelve classes whose parts are drawn to be told apart leave little for heads to specialise in.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes of two creatures: where the query of each class looked, and the heads of the first."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        model, images = models.load("intr-glyph").model, glyphs.normalise(scenes.images)
        both = [explain(model, images, label) for label in scenes.labels.T]  # pyright: ignore[reportArgumentType]
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            cells = [plot.Cell(picture, None)]
            names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row]]
            cells += [plot.Cell(picture, f.heatmap()[row], f"query {n}") for f, n in zip(both, names, strict=True)]
            heads = both[0].attention[row]
            cells += [plot.Cell(picture, heads[m], f"{names[0]}, head {m + 1}") for m in range(len(heads))]
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.1), "intr")

    show(seed=7)

# %% [markdown]
# # CRATE: a transformer whose layers are steps of one optimisation
#
# What does each layer do to the tokens, and towards which aim? CRATE derives its layers from an objective, the sparse rate
# reduction. Tokens $Z = [z_1 \dots z_N]$ should cost few bits within $K$ subspaces $U_k \in \mathbb R^{d \times p}$,
#
# $$R^c(Z \mid U) = \sum_{k=1}^K \tfrac12 \log\det\Big(I + \tfrac{p}{N\varepsilon^2}\,(U_k^\top Z)(U_k^\top Z)^\top\Big),$$
#
# many bits as a whole, and have few entries that are not 0. One layer is one step for each part. Attention, with one matrix
# $U_k$ for queries, keys, values and output, is an approximate gradient step that lowers $R^c$; the MLP is one step of
# iterative shrinkage (ISTA) towards a sparse code of the tokens in a dictionary $D$:
#
# $$Z^{\ell + 1/2} = (1 - a)\,Z^\ell + a \sum_k U_k\,(U_k^\top Z^\ell)\,
# \operatorname{softmax}\big((U_k^\top Z^\ell)^\top (U_k^\top Z^\ell)\big),$$
# $$Z^{\ell + 1} = \operatorname{ReLU}\big(Z^{\ell + 1/2} + \eta D^\top (Z^{\ell + 1/2} - D Z^{\ell + 1/2}) - \eta\lambda\big).$$
#
# So one can check that a layer did what it is for, and tokens of one thing gather in one subspace: the attention of the class
# token in a head outlines objects, after training with class labels alone. Catalogue entry: `crate`.

# %%
import math
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from vitx.vit import UnsupportedModel, check, grid, require_finite, stored, target_classes


class Step(NamedTuple):
    """What happens in one layer."""

    attention: Tensor  # (B, K, N, N), rows sum to one
    before: Tensor  # (B, N, d): Z, normalised
    half: Tensor  # (B, N, d): Z after attention
    after: Tensor  # (B, N, d): Z after ISTA, nowhere negative


class CrateBlock(nn.Module):
    """One layer: multi-head subspace self-attention (MSSA), then one ISTA step.

    Args:
        width: d. heads: K subspaces of p = d / K dimensions. eta: step of ISTA. sparsity: lambda.
    """

    def __init__(self, width: int, heads: int, eta: float = 0.1, sparsity: float = 0.1):
        super().__init__()
        self.heads, self.eta, self.sparsity = heads, eta, sparsity
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.subspaces = nn.Linear(width, width, bias=False)  # its rows: U_1, ..., U_K, p rows each
        self.compression = nn.Parameter(torch.zeros(()))  # a = sigmoid of it, the step of the attention
        self.dictionary = nn.Parameter(torch.randn(width, width) / math.sqrt(width))  # D

    def project(self, z: Tensor) -> Tensor:
        """U_k^T Z: (B, K, N, p) of tokens (B, N, d)."""
        return self.subspaces(z).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def steps(self, z: Tensor) -> Step:
        """Both steps of the layer, from tokens (B, N, d)."""
        z = self.norm1(z)
        y = self.project(z)  # (B, K, N, p)
        attention = (y @ y.transpose(-2, -1) / math.sqrt(y.shape[-1])).softmax(-1)
        mssa = (attention @ y).transpose(1, 2).flatten(2) @ self.subspaces.weight  # (B, N, d): sum of U_k (...)
        a = self.compression.sigmoid()
        half = (1 - a) * z + a * mssa
        x = self.norm2(half)
        residual = x - x @ self.dictionary.T  # Z - D Z
        after = (x + self.eta * (residual @ self.dictionary) - self.eta * self.sparsity).relu()
        return Step(attention, z, half, after)

    def forward(self, z: Tensor) -> Tensor:
        return self.steps(z).after


class CrateTransformer(VisionTransformer):
    """A Vision Transformer of CRATE layers with class token and learned positions.

    Args:
        classes: of the head. depth, num_heads, eta, sparsity: of the layers. options: of timm's ``VisionTransformer``.
    """

    def __init__(
        self, classes: int, depth: int, num_heads: int, eta: float = 0.1, sparsity: float = 0.1, **options: Any
    ):
        super().__init__(depth=0, num_heads=num_heads, num_classes=classes, **options)
        width = self.embed_dim
        self.norm_pre = nn.LayerNorm(width)  # of the patches, before the positions are added
        self.blocks = nn.Sequential(*(CrateBlock(width, num_heads, eta, sparsity) for _ in range(depth)))

    def tokens(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        """Z before the first layer, (B, N, d), class token first; ``places`` (B, P) of the patches in the grid of positions."""
        assert self.pos_embed is not None
        assert self.cls_token is not None
        x = self.norm_pre(self.patch_embed.proj(images).flatten(2).transpose(1, 2))  # (B, P, d)
        positions = self.pos_embed[:, 1:] if places is None else self.pos_embed[0, 1:][places]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x + positions], 1)

    def forward_features(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens (B, N, d) after the last layer."""
        return self.norm(self.blocks(self.tokens(x)))


class Layers(NamedTuple):
    """What the class token attends to in every head of one layer, and how far each layer got with its objective."""

    heads: Tensor  # (B, K, gh, gw): attention of the class token; with its own share, a head sums to one
    rate: Tensor  # (B, L, 2): R^c in the layer's own subspaces, in nats, before and after its attention
    nonzero: Tensor  # (B, L): share of the entries of the tokens that are not 0 after the layer

    def heatmap(self) -> Tensor:
        """(B, gh, gw): mean over the heads."""
        return self.heads.mean(1)


def coding_rate(y: Tensor, epsilon: float = 0.1, unit: bool = False) -> Tensor:
    """R^c (B,) in nats of tokens in their subspaces, (B, K, N, p); ``unit`` scales each to length one first."""
    y = normalize(y, dim=-1) if unit else y
    scale = y.shape[-1] / (y.shape[-2] * epsilon**2)
    gram = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) + scale * y.transpose(-2, -1) @ y  # (B, K, p, p)
    return torch.logdet(gram).sum(1) / 2


def explain(
    model: CrateTransformer, images: Tensor, target: Tensor | None = None, *, layer: int = -1, unit: bool = False
) -> Layers:
    """Attention of the class token in each subspace of a layer, with the compression and sparsity of all layers.

    Args:
        model: a CrateTransformer in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; checked, and of no influence: the maps are the same for every class.
        layer: whose attention is shown; the last one by default.
        unit: measure the coding rate of tokens of length one in each subspace, as the authors' code does.

    Returns:
        ``Layers``; ``.heatmap()`` is the mean over the heads, (B, gh, gw).

    Raises:
        UnsupportedModel: the model has no CRATE layers.
        ValueError: see ``vitx.vit.check``; a layer that the model does not have.

    Source: Yu et al. 2023 (NeurIPS), section 2; the maps: Yu et al., Emergence of Segmentation with Minimalistic
    White-Box Transformers (CPAL 2024).
    """
    if not all(hasattr(block, "dictionary") for block in getattr(model, "blocks", [object()])):
        raise UnsupportedModel(
            f"the layers of this {type(model).__name__} are no steps of the sparse rate reduction: the method explains "
            "only a CrateTransformer (the model crate-glyph)."
        )
    check(model, images)
    if not -len(model.blocks) <= layer < len(model.blocks):
        raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {len(model.blocks) - 1}.")
    with torch.inference_mode():
        z, maps, rates, shares = model.tokens(images), [], [], []
        for block in model.blocks:
            step = block.steps(z)  # type: ignore[operator]
            both = (block.project(tokens) for tokens in (step.before, step.half))  # type: ignore[operator]
            rates.append(torch.stack([coding_rate(y, unit=unit) for y in both], -1))
            shares.append((step.after != 0).to(z.dtype).mean((1, 2)))
            maps.append(step.attention[:, :, 0, 1:])  # (B, K, P)
            z = step.after
        target_classes(require_finite(model, model.forward_head(model.norm(z))), target)
        heads = maps[layer].unflatten(2, grid(model, images))
        found = heads, torch.stack(rates, 1), torch.stack(shares, 1)
    return Layers(*(tensor.clone() for tensor in found))


def load_pretrained(path) -> CrateTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the arguments."""
    about, weights = stored(path)
    model = CrateTransformer(**about["options"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. $U_k$ also maps the result of the attention back, as in the paper's derivation. The authors' code learns a matrix of its
#    own for that, and adds the result to tokens that were not normalised; with it a layer need not lower its $R^c$. The step
#    $a$ is learned for each layer.
# 2. From the code: a LayerNorm before either step, the softmax of products divided by $\sqrt p$, $\eta = \lambda = 0.1$. The
#    code also normalises the pixels of each patch, which is left out.
# 3. $R^c$ is measured before and after the attention of a layer, in the subspaces of that layer, so that both numbers are of
#    the same objective; the paper's figure follows one number from layer to layer. $\varepsilon = 0.1$. The authors' code
#    gives all projected tokens length one first (`unit=True`).
# 4. The model below is small and did not learn from labels alone: for a short training its tokens also imitate those of the
#    model `glyph`, through layers that are then thrown away. So its maps say little about what emerges without a teacher.
#
# What the small model cannot show: that objects are outlined in photographs, and that a head keeps its meaning, as legs or
# heads of animals, over many classes. Scenes with one kind of creature have no such parts in common.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes, the attention of the class token in every head, and what each layer did to its objective."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        found = explain(models.load("crate-glyph").model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
        count = found.heads.shape[1]
        figure = Figure(figsize=(2 * (count + 3), 6.4), layout="constrained")
        axes = figure.subplots(3, count + 3)
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            plot.overlay(axes[row, 0], picture)
            for head in range(count):
                plot.overlay(axes[row, 1 + head], picture, found.heads[row, head], f"head {head + 1}")
            layers = range(1, found.rate.shape[1] + 1)
            for side, name in enumerate(("before attention", "after")):
                axes[row, -2].plot(layers, found.rate[row, :, side], marker="o", markersize=3, label=name)
            axes[row, -2].set_title("coding rate in a layer", fontsize=8, pad=3)
            axes[row, -2].legend(fontsize=6)
            axes[row, -1].plot(layers, found.nonzero[row], marker="o", markersize=3, color="#b5512f")
            axes[row, -1].set_title("share of entries not 0", fontsize=8, pad=3)
            for place in axes[row, -2:]:
                place.tick_params(labelsize=6)
        demo.show(figure, "crate")

    show(seed=7)

# %% [markdown]
# # Multi-dimensional compression: what depends on the answer stays
#
# A head or a neuron is worth keeping if what it says depends, in whatever way, on what the model answers. The dependence of
# two random vectors is the Hilbert-Schmidt norm of their cross-covariance operator, which kernels estimate from $B$ pictures.
# With Gram matrices $K_u$ of the outputs of unit $u$ and $L$ of the predicted probabilities, and $H = I - \frac1B 11^\top$,
#
# $$D(u) = \operatorname{tr}(H K_u H\; H L H).$$
#
# How many heads and neurons each block loses, and how many tokens the sequence, is one policy $\lambda \in [0, \tfrac12]^{2L+1}$.
# A Gaussian process learns the accuracy of policies that meet a budget, and the next one tried has the largest expected
# improvement over the best, $\mathbb E\,[\max(0, f(\lambda) - f^*)]$. Catalogue entry: `md-vit`.

# %%
import math
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist
from scipy.stats import norm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import (
    Units,
    UnsupportedModel,
    capture,
    check,
    embed,
    plain_blocks,
    require_finite,
    stored,
    target_classes,
    without_units,
)

SIGMAS = (1, 2, 4, 8, 16)  # widths of the Gaussian kernels, whose mean is used


class MdVitTransformer(VisionTransformer):
    """A Vision Transformer with a class token whose sequence gets shorter in three blocks.

    Args:
        policies: number of stored policies. options: of timm's ``VisionTransformer``.
    """

    def __init__(self, policies: int = 0, **options: Any):
        super().__init__(**options)
        blocks: list[Any] = list(plain_blocks(self))
        depth = len(blocks)
        self.token_ratio = 0.0  # share of the tokens that each reduction takes away
        self.register_buffer("heads", torch.zeros(depth, blocks[0].attn.num_heads))  # scores (L, h)
        self.register_buffer("neurons", torch.zeros(depth, blocks[0].mlp.fc1.out_features))  # scores (L, hidden)
        self.register_buffer("rates", torch.zeros(policies))  # shares of the operations, of ...
        self.register_buffer(
            "policies", torch.zeros(policies, 2 * depth + 1)
        )  # ... shares pruned: neurons, heads, tokens

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, n, D) after the last norm, n of the shortened sequence."""
        x = embed(self, x)
        blocks: Any = self.blocks
        for index, block in enumerate(blocks):
            if self.token_ratio and index in reductions(len(blocks)):
                with capture(self, "attention") as record:
                    x = x + block.ls1(block.attn(block.norm1(x)))
                x = shortened(x, record["attention"][0].mean(1)[:, 0], self.token_ratio)
                x = x + block.ls2(block.mlp(block.norm2(x)))
            else:
                x = block(x)
        return self.norm(x)


def reductions(depth: int) -> tuple[int, ...]:
    """Blocks that shorten the sequence: the 4th, 7th and 10th of 12, or the same shares of any depth."""
    return tuple(depth * i // 4 for i in (1, 2, 3))


def shortened(x: Tensor, attention: Tensor, ratio: float) -> Tensor:
    """The tokens (B, N, D) that the class token attends to most, itself first, and the mean of the others.

    Args:
        attention: (B, N) of the class token. ratio: share of the tokens that is averaged.
    """
    attention = attention.clone()
    attention[:, 0] = torch.inf
    order = attention.argsort(dim=1, descending=True, stable=True)
    x = x.gather(1, order[..., None].expand_as(x))
    kept = kept_tokens(x.shape[1], ratio)
    return torch.cat([x[:, :kept], x[:, kept:].mean(1, keepdim=True)], 1)


def kept_tokens(tokens: int, ratio: float) -> int:
    """Tokens that one reduction keeps; the mean of the others is one more."""
    return int(tokens * (1 - ratio) + 1e-9)


def gram(x: Tensor, kernel: str) -> Tensor:
    """Centred Gram matrices (..., B, B) of vectors (..., B, F), by the "linear" kernel or the mean of "gaussian" ones."""
    inner = x @ x.transpose(-2, -1)
    if kernel == "gaussian":
        square = inner.diagonal(dim1=-2, dim2=-1)
        distance = (square[..., None] + square[..., None, :] - 2 * inner).clamp(min=0)
        inner = torch.stack([torch.exp(-distance / (2 * sigma**2)) for sigma in SIGMAS]).mean(0)
    return inner - inner.mean(-1, keepdim=True) - inner.mean(-2, keepdim=True) + inner.mean((-2, -1), keepdim=True)


def dependence_scores(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Scores of all heads (L, h) and neurons (L, hidden) from pictures (B, 3, H, W), two at least."""
    blocks: list[Any] = list(plain_blocks(model))
    with torch.no_grad(), capture(model, "attn.proj.input", "mlp.fc2.input") as record:
        answers = gram(model(images).softmax(-1), "linear")  # (B, B)
    scores: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
    for block, mixed, hidden in zip(blocks, record["attn.proj.input"], record["mlp.fc2.input"], strict=True):
        heads = mixed.unflatten(2, (block.attn.num_heads, -1)).mean(3).permute(2, 0, 1)  # (h, B, N)
        grams = gram(heads, "gaussian")  # (h, B, B)
        shared = torch.einsum("hij,gji->hg", grams, grams)  # dependence of every two heads
        redundancy = (shared.sum(1) - shared.diagonal()) / max(len(heads) - 1, 1)
        scores["heads"].append((grams * answers.T).sum((1, 2)) - 0.1 * redundancy)
        relevance = torch.cat(
            [(gram(part, "gaussian") * answers.T).sum((1, 2)) for part in hidden.permute(2, 0, 1).split(32)]
        )
        size = hidden.abs().sum((0, 1))
        scores["neurons"].append(0.1 * unit_range(relevance) + 0.9 * unit_range(size))
    return {kind: torch.stack(rows) for kind, rows in scores.items()}


def unit_range(x: Tensor) -> Tensor:
    """Values moved and scaled to lie between 0 and 1."""
    return (x - x.min()) / (x.max() - x.min())


def kept_units(scores: Tensor, ratios: Tensor) -> Tensor:
    """Mask of the whole number below units * (1 - ratio) best units of every block, one at least; (L, units) bool."""
    count = (scores.shape[1] * (1 - ratios.double()) + 1e-6).floor().clamp(min=1)
    return scores.argsort(dim=1, descending=True, stable=True).argsort(1) < count[:, None]


def operations(model: Any, policies: np.ndarray) -> np.ndarray:
    """Share of the operations of the blocks that policies (P, 2L + 1) leave: (P,)."""
    depth, block, width = len(model.blocks), model.blocks[0], model.embed_dim
    heads, hidden, head_width = block.attn.num_heads, block.mlp.fc1.out_features, block.attn.head_dim

    def kept(ratios: np.ndarray, units: int) -> np.ndarray:
        return np.maximum(np.floor(units * (1 - ratios) + 1e-6), 1)

    def count(policies: np.ndarray) -> np.ndarray:
        shorter, total = policies[:, -1], np.zeros(len(policies))
        tokens = np.full(len(policies), model.patch_embed.num_patches + 1.0)
        for index in range(depth):
            total += kept(policies[:, depth + index], heads) * head_width * tokens * (4 * width + 2 * tokens)
            if index in reductions(depth):
                tokens = np.where(shorter > 0, np.floor(tokens * (1 - shorter) + 1e-9) + 1, tokens)
            total += 2 * tokens * width * kept(policies[:, index], hidden)
        return total

    return count(np.asarray(policies, dtype=float)) / count(np.zeros((1, 2 * depth + 1)))


def expected_improvement(tried: np.ndarray, found: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Of candidates (C, n) over the best of the values ``found`` (T,) at the points ``tried`` (T, n): (C,).

    The Gaussian process has mean 0, a Matern kernel of smoothness 3/2 and variance 1, and noise of variance 1e-5; the
    length of its kernel is that of a grid under which the values are likeliest.
    """

    def kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
        distance = math.sqrt(3) * cdist(a, b) / length
        return (1 + distance) * np.exp(-distance)

    best = (-math.inf, None, 1.0)
    for length in np.logspace(-1.5, 1.5, 31):
        factor = cho_factor(kernel(tried, tried, length) + 1e-5 * np.eye(len(tried)), lower=True)
        likelihood = -0.5 * found @ cho_solve(factor, found) - np.log(np.diag(factor[0])).sum()
        best = max(best, (likelihood, factor, length), key=lambda entry: entry[0])
    _, factor, length = best
    cross = kernel(candidates, tried, length)  # (C, T)
    mean = cross @ cho_solve(factor, found)
    deviation = np.sqrt(np.clip(1 - (cross * cho_solve(factor, cross.T).T).sum(1), 1e-12, None))
    z = (mean - found.max()) / deviation
    return (mean - found.max()) * norm.cdf(z) + deviation * norm.pdf(z)


def explain(model: MdVitTransformer, images: Tensor, target: Tensor | None = None, *, keep_rate: float = 0.6) -> Units:
    """Dependence scores of heads and neurons, and the logits under the policy that was found for a budget.

    Args:
        model: an ``MdVitTransformer`` in eval mode.
        images: (B, 3, H, W), normalised.
        target: checked, and without effect: the scores belong to the whole answer.
        keep_rate: share of the operations of the blocks; one that a policy was searched for, or 1 (nothing is pruned).

    Returns:
        Units of the kinds "heads" (L, h) and "neurons" (L, hidden); the logits are also of a shorter sequence.

    Raises:
        UnsupportedModel: a model without dependence scores and policies.
        ValueError: see ``vitx.vit.check``; a keep rate without a policy.

    Source: the authors' code (zejiangh/Multi-dimensional-vit-compression), dependency_criterion.py, vit.py and
        expected_improvement.py; Hou and Kung 2022.
    """
    check(model, images)
    smaller = prune(model, keep_rate)
    target_classes(images.new_empty(len(images), model.num_classes), target)
    with torch.no_grad():
        logits = require_finite(model, smaller(images))
    scores = {kind: model.get_buffer(kind) for kind in ("heads", "neurons")}
    return Units(scores, chosen(model, policy_of(model, keep_rate)), logits)


def policy_of(model: Any, keep_rate: float) -> Tensor:
    """The policy (2L + 1,) that the model stores for a rate."""
    if not hasattr(model, "policies"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} stores no dependence scores and policies: the method explains an MdVitTransformer, "
            "such as the model md-vit-glyph."
        )
    rates = [round(float(rate), 3) for rate in model.rates]
    if keep_rate == 1:
        return torch.zeros_like(model.policies[0])
    if keep_rate not in rates:
        raise ValueError(
            f"policies were searched for the keep rates {', '.join(map(str, [1, *rates]))}; not {keep_rate}."
        )
    return model.policies[rates.index(keep_rate)]


def chosen(model: Any, policy: Tensor) -> dict[str, Tensor]:
    """Masks of the units that a policy keeps: (L, h) and (L, hidden) bool."""
    depth = len(model.blocks)
    return {
        "heads": kept_units(model.heads, policy[depth : 2 * depth]),
        "neurons": kept_units(model.neurons, policy[:depth]),
    }


def prune(model: Any, keep_rate: float = 0.6) -> VisionTransformer:
    """The smaller model of the policy that was found for a budget, which shortens the sequence too."""
    policy = policy_of(model, keep_rate)
    kept = chosen(model, policy)
    smaller: Any = without_units(model, kept["heads"], kept["neurons"])
    smaller.token_ratio = float(policy[-1])
    del smaller.heads, smaller.neurons, smaller.rates, smaller.policies  # they belong to the full model
    return smaller


def load_pretrained(path) -> MdVitTransformer:
    """The model in a safetensors file, in eval mode."""
    about, weights = stored(path)
    options = about["backbone"] | {"num_classes": about["num_classes"]}
    model = MdVitTransformer(len(weights["rates"]), **options)
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Of the paper the abstract could be read, and a reader's notes on its method. The scores follow the authors' code: heads
#    lose a tenth of their mean dependence on the other heads of the block, and neurons take nine tenths of their score from
#    the size of their activation. Outputs of a head are averaged over its features, and all tokens make up one vector.
# 2. Which tokens go is decided by the attention of the class token, as in that code, where a choice by dependence stands
#    commented out; the tokens that go are replaced by their mean.
# 3. The code standardises features and answers before the kernels by subtracting constants, which changes no centred Gram
#    matrix of these kernels, and so is left out.
# 4. The authors search 100 policies and 100 more by expected improvement for every budget, on a model that was trained with
#    randomly drawn policies, and train the best one on. `md-vit-glyph` was trained for minutes with random policies, was
#    searched with sixteen evaluations for each budget, and is not trained on. The largest ratio of a policy in the search is
#    drawn first, since ratios that are all drawn up to one half hardly ever leave four fifths of the operations.
# 5. With four heads in a block a ratio of up to one half can only take one or two of them.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    model = models.load("md-vit-glyph").model
    found = explain(model, glyphs.normalise(glyphs.scenes(1, seed=7).images))  # pyright: ignore[reportArgumentType]
    demo.show(plot.units(found), "md-vit")

# %% [markdown]
# # DynamicViT: a small network says which tokens may go
#
# Which patches does the model keep for itself? Before a few blocks, a light predictor looks at every token that is left,
# beside the average of all that are left, and gives it a probability to be dropped and one to be kept:
#
# $$z_i = \big[\,u_i^{\mathrm{local}},\ \tfrac{\sum_j \hat D_j\,u_j^{\mathrm{global}}}{\sum_j \hat D_j}\,\big],\qquad
# \pi_i = \operatorname{softmax}(\mathrm{MLP}(z_i)) \in \mathbb R^2,\qquad \hat D \leftarrow \hat D \odot D .$$
#
# In training, the decisions $D$ are drawn from $\pi$ by Gumbel-softmax and a dropped token is only cut off from the others:
#
# $$\tilde A_{ij} = \frac{\exp(P_{ij})\,G_{ij}}{\sum_k \exp(P_{ik})\,G_{ik}},\qquad
# G_{ij} = 1 \text{ if } i = j \text{ else } \hat D_j .$$
#
# Afterwards the $\lfloor\rho^s N\rfloor$ tokens with the highest $\pi_{i,1}$ go on after stage $s$, and the others really are
# gone. Catalogue entry: `dynamicvit`.

# %%
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Selection, UnsupportedModel, check, embed, grid, keep_tokens, masked_block, require_finite, stored


class Predictor(nn.Module):
    """Log-probabilities that a token is dropped or kept, from the token itself and the mean of the tokens that are left.

    Args:
        width: D, channels of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())  # u: local, then global
        self.classify = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(-1),
        )

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        """(B, n, 2), dropped and kept, from patches (B, n, D) and the decisions so far (B, n), ones and zeros."""
        local, spread = self.project(patches).chunk(2, -1)  # (B, n, D / 2) each
        whole = (spread * kept[..., None]).sum(1, keepdim=True) / kept.sum(1).clamp(min=1)[
            :, None, None
        ]  # (B, 1, D / 2)
        return self.classify(torch.cat([local, whole.expand_as(local)], -1))


class DynamicTransformer(VisionTransformer):
    """A Vision Transformer with predictors before some blocks. Called as it is, it keeps every token.

    Args:
        stages: blocks before which tokens are dropped, 0 the first; None is the 4th, 7th and 10th of 12, or the same
            shares of any depth. options: of timm's ``VisionTransformer``, with a class token.
    """

    def __init__(self, stages: tuple[int, ...] | None = None, **options: Any):
        super().__init__(**options)
        depth = len(self.blocks)
        self.stages = tuple(sorted({depth * i // 4 for i in (1, 2, 3)}) if stages is None else stages)
        self.predictors = nn.ModuleList(Predictor(self.embed_dim) for _ in self.stages)

    def masked_forward(self, images: Tensor, decide: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The pass of training: all tokens stay in the sequence, and dropped ones are cut off by the mask G.

        Args:
            images: (B, 3, H, W), normalised.
            decide: from log-probabilities (B, P, 2) and the decisions so far (B, P), the new decisions (B, P).

        Returns:
            normalised final tokens (B, N, D), and the decisions after each stage, (B, P) each.
        """
        x, prefix = embed(self, images), self.num_prefix_tokens
        kept, decisions = x.new_ones(len(x), x.shape[1] - prefix), []
        for index, block in enumerate(self.blocks):
            if index in self.stages:
                kept = kept * decide(self.predictors[len(decisions)](x[:, prefix:], kept), kept)
                decisions.append(kept)
            x = masked_block(block, x, nn.functional.pad(kept, (prefix, 0), value=1.0))
        return self.norm(x), decisions


def ratio_loss(decisions: list[Tensor], rates: list[float]) -> Tensor:
    """Mean over pictures and stages of the squared distance of the kept share from the wanted one."""
    terms = [(rate - kept.mean(1)).square().mean() for kept, rate in zip(decisions, rates, strict=True)]
    return torch.stack(terms).mean()


def explain(
    model: DynamicTransformer, images: Tensor, target: Tensor | None = None, *, keep_rate: float = 0.7
) -> Selection:
    """Run the model with its predictors; tokens that they drop leave the sequence.

    Args:
        model: a ``DynamicTransformer`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: ignored: the predictors serve no class in particular.
        keep_rate: rho, above 0 and up to 1 (nothing is dropped). After stage s, floor(rho^s P) patches are left.

    Returns:
        Selection(alive (B, L, gh, gw) bool, logits (B, classes)).

    Raises:
        UnsupportedModel: the model has no trained predictors.
        ValueError: see ``vitx.vit.check``; a keep rate out of range, or so low that no patch would be left.

    Source: Rao et al. 2021, by the abstract and the authors' code.
    """
    if not hasattr(model, "predictors"):  # not isinstance: in a notebook DynamicTransformer exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no trained predictors: the method runs a DynamicTransformer, such as the model "
            "dynamicvit-glyph."
        )
    check(model, images, class_token=True)
    gh, gw = grid(model, images)
    stages = range(1, len(model.stages) + 1) if 0 < keep_rate <= 1 else ()  # NaN is no rate either
    counts = [math.floor(round(keep_rate**s * gh * gw, 6)) for s in stages]
    if min(counts, default=0) < 1:
        raise ValueError(f"keep_rate lies above 0 and up to 1 and leaves at least one patch; {keep_rate} does not.")
    alive = []
    with torch.inference_mode():
        x, prefix = embed(model, images), model.num_prefix_tokens  # (B, N, D)
        place = torch.arange(gh * gw, device=x.device).expand(len(x), -1)  # (B, n): patch of each token
        for index, block in enumerate(model.blocks):
            if index in model.stages:
                stage = model.stages.index(index)
                patches = x[:, prefix:]
                scores = model.predictors[stage](patches, torch.ones_like(patches[..., 0]))[..., 1]  # (B, n)
                order = scores.argsort(dim=1, descending=True, stable=True)[:, : counts[stage]].sort(1).values  # (B, k)
                x, place = keep_tokens(model, x, order), place.gather(1, order)
            x = block(x)
            here = torch.zeros(len(x), gh * gw, dtype=torch.bool, device=x.device)
            alive.append(here.scatter_(1, place, True))
        logits = require_finite(model, model.forward_head(model.norm(x)))
    return Selection(torch.stack(alive, 1).unflatten(2, (gh, gw)).clone(), logits.clone())


def load_pretrained(path) -> DynamicTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the backbone's arguments and the classes."""
    metadata, weights = stored(path)
    model = DynamicTransformer(num_classes=metadata["num_classes"], **metadata["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper fine-tunes DeiT and LV-ViT on ImageNet for 30 epochs, one model for each $\rho$ of 0.7, 0.8 and 0.9. The model
#    below, `dynamicvit-glyph`, was fine-tuned from `glyph` for minutes, for $\rho = 0.6$ alone: so the tokens left at the end
#    cover about as much as one creature. At other rates the same predictors are only asked for more or fewer tokens.
# 2. The paper's predictors stand before the 4th, 7th and 10th of 12 blocks; here before the same shares of six, the 2nd,
#    4th and 5th.
# 3. One layer makes both halves of $u$, and its norm and activations are those of the authors' code. The code adds a
#    small number to the numerators and the sum of the masked softmax, for stability; here only the equation stands.
# 4. The glyph world is small and its creatures stand out, so that nearly any criterion would do well on it. How the method
#    fares on photographs, where evidence is spread over object and scene, this model cannot show.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes, what is left after each stage, and for how many blocks each patch lived."""
        scenes = glyphs.scenes(3, seed, creatures=2)
        model = models.load("dynamicvit-glyph").model
        found = explain(model, glyphs.normalise(scenes.images))  # pyright: ignore[reportArgumentType]
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            names = [glyphs.CLASS_NAMES[label] for label in scenes.labels[row]]
            cells = [plot.Cell(picture, None, " and ".join(names))]
            for stage in model.stages:  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
                left = found.alive[row, stage]
                cells.append(
                    plot.Cell(plot.hide(picture, left), None, f"from block {stage + 1}: {int(left.sum())} patches")
                )
            rows.append([*cells, plot.Cell(picture, found.heatmap()[row], "share of blocks lived")])
        demo.show(plot.grid(rows, cell=2.1), "dynamicvit")

    show(seed=7)

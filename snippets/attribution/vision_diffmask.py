# %% [markdown]
# # Vision DiffMask
#
# Which patches can go without changing what the model says? A small network is trained once to answer that for every
# picture. At each layer a gate looks at a patch's embedding $h^{(0)}_p$ and its hidden state $h^{(l)}_p$ and votes,
#
# $$v^{(l)}_p\sim\mathrm{HardConcrete}\big(g_l(h^{(0)}_p, h^{(l)}_p)\big)\in[0,1],\qquad
# z_p=\prod_{l} v^{(l)}_p,\qquad \tilde h^{(0)}_p=z_p\,h^{(0)}_p+(1-z_p)\,b,$$
#
# with a learned vector $b$ in place of what is taken away. Training keeps as few patches as possible while the output
# distribution stays: $\min\,\mathbb E\big[\tfrac1P\sum_p 1(z_p>0)\big]$ subject to
# $D_\mathrm{KL}\big(f(x)\,\Vert\,f(\tilde x)\big)\le\epsilon$. The explanation is the probability that a patch is kept,
#
# $$M_p=P(z_p>0)=\prod_l P\big(v^{(l)}_p>0\big).$$
#
# Catalogue entry: `vision-diffmask`.

# %%
import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, capture, check, logits_of_tokens, require_finite, stored, target_classes, to_grid

TEMPERATURE = 0.2  # of the binary concrete distribution
LOW, HIGH = -0.2, 1.0  # to which it is stretched before it is clipped to [0, 1]; exact ones have probability 0


def sample_votes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Hard concrete votes in [0, 1], differentiable in the logits; ``uniform`` holds numbers in (0, 1), same shape."""
    concrete = ((uniform.log() - (1 - uniform).log() + logits) / TEMPERATURE).sigmoid()
    return (LOW + (HIGH - LOW) * concrete).clamp(0, 1)


def kept_probability(logits: Tensor) -> Tensor:
    """P(every vote > 0) for independent votes (..., l): (...)."""
    return nn.functional.logsigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH)).sum(-1).exp()


class VisionDiffMask(nn.Module):
    """A classifier with gates that say which of its patches it needs.

    Args:
        backbone: the classifier, with a class token; it is not trained any more.
        scale, offset: a gate's logit is scale * tanh(...) + offset; the offset, which is trained, starts with all kept.
    """

    def __init__(self, backbone: VisionTransformer, scale: float = 10.0, offset: float = 5.0):
        super().__init__()
        width, layers = backbone.embed_dim, len(backbone.blocks) + 2  # h_0, the input of every block, the last output
        self.backbone = backbone.requires_grad_(False)
        self.scale = scale
        self.offsets = nn.Parameter(torch.full((layers,), offset))
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width // 4), nn.Tanh(), nn.Linear(width // 4, 1), nn.Tanh())
            for _ in range(layers)
        )
        self.placeholder = nn.Parameter(torch.randn(width) * width**-0.5)  # b

    def hidden_states(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes) and the L + 2 hidden states of the patches, (B, P, D) each, of normalised images."""
        with capture(self.backbone, "block_input", "block_output") as record:
            logits = self.backbone(images)
        prefix = self.backbone.num_prefix_tokens
        states = [*record["block_input"], record["block_output"][-1]]
        return logits, [self.backbone.patch_embed(images).flatten(1, -2), *(state[:, prefix:] for state in states)]

    def vote_logits(self, states: list[Tensor], layers: int) -> Tensor:
        """Logits of the votes of the first ``layers`` gates, (B, P, layers)."""
        votes = [gate(torch.cat([states[0], state], -1)) for gate, state in zip(self.gates, states, strict=True)]
        return self.scale * torch.cat(votes[:layers], -1) + self.offsets[:layers]

    def masked_logits(self, patches: Tensor, kept: Tensor) -> Tensor:
        """The classifier's logits when patch embeddings (B, P, D) keep the share ``kept`` (B, P) of themselves."""
        patches = kept[..., None] * patches + (1 - kept[..., None]) * self.placeholder
        return logits_of_tokens(self.backbone, self.backbone.norm_pre(self.backbone._pos_embed(patches)))

    def forward(self, images: Tensor) -> Tensor:
        """The classifier's logits (B, classes) of normalised images (B, 3, H, W), nothing masked."""
        return self.backbone(images)


def explain(model: VisionDiffMask, images: Tensor, target: Tensor | None = None, *, layer: int | None = None) -> Tensor:
    """Probability that each patch is kept, by the votes of all gates.

    Args:
        model: a VisionDiffMask in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: checked, and without effect: the gates answer for the whole output distribution.
        layer: the last gate whose vote counts, 0 (patch embeddings) to L + 1 (output of the last block); None is all.

    Returns:
        (B, gh, gw); probabilities.

    Raises:
        UnsupportedModel: the model has no trained gates.
        ValueError: see ``vitx.vit.check``; no such layer.

    Source: Nalmpantis et al. 2023 (CVPR workshops), by the authors' code; De Cao et al. 2020 for the text model that it follows.
    """
    if not hasattr(model, "vote_logits"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} has no trained gates: the method explains only a VisionDiffMask, such as the model "
            "vision-diffmask-glyph."
        )
    check(model.backbone, images)
    last = len(model.gates) - 1
    if layer is not None and not 0 <= layer <= last:
        raise ValueError(f"layer {layer} is out of range: the votes are numbered from 0 to {last}.")
    with torch.inference_mode():
        logits, states = model.hidden_states(images)
        target_classes(require_finite(model, logits), target)
        kept = kept_probability(model.vote_logits(states, len(model.gates) if layer is None else layer + 1))  # (B, P)
    return to_grid(model.backbone, images, kept.clone())


def load_pretrained(path) -> VisionDiffMask:
    """The gates in a safetensors file over the classifier in glyph.safetensors beside it, in eval mode."""

    from safetensors.torch import load_file

    metadata, weights = stored(path)
    backbone = VisionTransformer(**metadata["backbone"], num_classes=metadata["num_classes"])
    backbone.load_state_dict(load_file(path.with_name("glyph.safetensors")))
    model = VisionDiffMask(backbone)
    kept = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    model.load_state_dict(weights | kept)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The authors train gates for a ViT-B/16 on CIFAR-10 and ImageNet; the gates here belong to the small model glyph and to
#    no other, and were trained for minutes. Another model needs gates of its own.
# 2. Training minimises the expected share of kept patches. The authors' code takes the mean of the logarithms of the
#    probabilities instead, and counts the class token's gate among them although the class token is never masked.
# 3. The gates' linear layers have no weight normalisation, and the Lagrange multipliers, one for each depth, climb by plain
#    gradient ascent instead of Adam with lookahead.
# 4. Distillation and register tokens have no gates, nor has the class token.
#
# The map says what the gates learned to be enough, over all training pictures; for one picture it is an estimate, and the
# bound on the KL divergence holds on average only. It explains the whole output distribution, not one class of it.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Scenes, the probability that each patch is kept, and how it falls as more gates vote."""
        scenes = glyphs.scenes(3, seed)
        model = models.load("vision-diffmask-glyph").model
        images = glyphs.normalise(scenes.images)
        maps = {layer: explain(model, images, layer=layer) for layer in (0, 2, 4, None)}  # pyright: ignore[reportArgumentType]
        rows = []
        for row, picture in enumerate(scenes.images.permute(0, 2, 3, 1).numpy()):
            cells = [plot.Cell(picture, None, glyphs.CLASS_NAMES[scenes.labels[row, 0]])]
            for layer, relevance in maps.items():
                cells.append(
                    plot.Cell(picture, relevance[row], "all gates" if layer is None else f"gates 0 to {layer}")
                )
            rows.append(cells)
        demo.show(plot.grid(rows, cell=2.1), "vision-diffmask")

    show(seed=7)

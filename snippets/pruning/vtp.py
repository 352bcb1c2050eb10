# %% [markdown]
# # VTP: a learned score for every dimension
#
# Which dimensions of its features does a Vision Transformer need? VTP puts a score $\hat a_i$, one to begin with, on every
# dimension that a linear layer reads: $\hat X = X \operatorname{diag}(\hat a)$. Scores and weights are trained together
# under an $\ell_1$ penalty that pulls all scores down, so that only those hold out which the loss needs:
#
# $$\min_{W,\hat a}\ \mathcal L(W, \hat a) + \lambda \lVert \hat a \rVert_1,\qquad
# a^*_i = \begin{cases} 1 & \hat a_i \ge \tau \\ 0 & \text{otherwise.} \end{cases}$$
#
# One threshold $\tau$ for the whole model follows from the share that is to be kept. The dimensions with $a^*_i = 0$ leave
# the network, and the rest is fine-tuned. Catalogue entry: `vtp`.

# %%
import copy
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import Units, UnsupportedModel, check, require_finite, stored

# Prune(...) stands before each of these linear layers of a block: a score for each of their inputs.
LAYERS = {
    "attention_inputs": "attn.qkv",
    "attention_outputs": "attn.proj",
    "mlp_inputs": "mlp.fc1",
    "neurons": "mlp.fc2",
}


class VtpTransformer(VisionTransformer):
    """A Vision Transformer with a score for every input of the linear layers of its blocks; ``options`` are timm's.

    Its forward pass is that of the plain model, with every dimension kept (all $a^*$ are one).
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        block: Any = self.blocks[0]
        widths = {kind: block.get_submodule(layer).in_features for kind, layer in LAYERS.items()}
        self.scores = nn.ParameterDict({k: torch.ones(len(self.blocks), n) for k, n in widths.items()})  # (L, n)


def gated(model: VtpTransformer, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that make the model read X diag(a): the column of every dimension times its gate.

    Args:
        gates: a by kind, (L, n) each.

    Returns:
        parameters by name, for ``torch.func.functional_call``; gradients flow into model and gates.
    """
    names = {f"blocks.{i}.{layer}.weight": gate for k, layer in LAYERS.items() for i, gate in enumerate(gates[k])}
    return {name: model.get_parameter(name) * gate for name, gate in names.items()}


def keep(scores: dict[str, Tensor], keep_rate: float) -> dict[str, Tensor]:
    """a* by kind, (L, n) bool: the share ``keep_rate`` of all dimensions, rounded up, of the largest magnitude.

    A layer that would be left without inputs keeps its best one.
    """
    sizes = [score.numel() for score in scores.values()]
    every = torch.cat([score.detach().flatten() for score in scores.values()]).abs()
    count = math.ceil(round(keep_rate * len(every), 6))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.argsort(descending=True, stable=True)[:count]] = True
    found = {k: part.view(scores[k].shape) for k, part in zip(scores, chosen.split(sizes), strict=True)}
    best = {k: nn.functional.one_hot(score.abs().argmax(1), score.shape[1]).bool() for k, score in scores.items()}
    return {k: part | best[k] for k, part in found.items()}


class ChosenInputs(nn.Linear):
    """A linear layer that reads only the chosen inputs, ``kept`` (in,) bool, of the layer that it is made from."""

    def __init__(self, layer: nn.Linear, kept: Tensor):
        super().__init__(int(kept.sum()), layer.out_features, device="meta")  # draws no random weights
        self.weight, self.bias = nn.Parameter(layer.weight.detach()[:, kept]), layer.bias  # (out, kept)
        self.register_buffer("places", kept.nonzero()[:, 0])

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input[..., self.get_buffer("places")], self.weight, self.bias)


def prune(model: VtpTransformer, keep_rate: float = 0.6) -> VtpTransformer:
    """A smaller copy that lacks the dimensions below the threshold; arguments and errors as ``explain``."""
    kept = _kept(model, keep_rate)
    smaller: Any = copy.deepcopy(model)
    for index, block in enumerate(smaller.blocks):
        attention, mlp, neurons = block.attn, block.mlp, kept["neurons"][index]
        attention.qkv = ChosenInputs(attention.qkv, kept["attention_inputs"][index])
        attention.proj = ChosenInputs(attention.proj, kept["attention_outputs"][index])
        mlp.fc1 = ChosenInputs(mlp.fc1, kept["mlp_inputs"][index])
        # Nobody reads the other neurons now, so fc1 does not compute them, and fc2 takes what it is given.
        mlp.fc1.weight = nn.Parameter(mlp.fc1.weight.detach()[neurons])
        mlp.fc1.bias = nn.Parameter(mlp.fc1.bias.detach()[neurons])
        mlp.fc2.weight = nn.Parameter(mlp.fc2.weight.detach()[:, neurons])
    del smaller.scores
    return smaller


def _kept(model: Any, keep_rate: float) -> dict[str, Tensor]:
    if not isinstance(getattr(model, "scores", None), nn.ParameterDict):
        raise UnsupportedModel("VTP learns a score for every dimension in training, and this model carries none.")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate lies above 0 and up to 1, not {keep_rate}.")
    return keep(dict(model.scores.items()), keep_rate)


def explain(model: VtpTransformer, images: Tensor, target: Tensor | None = None, *, keep_rate: float = 0.6) -> Units:
    """Scores of all dimensions, those above the threshold, and what the model without the others says.

    Args:
        model: a ``VtpTransformer`` in eval mode; its scores were learned in training and do not depend on the images.
        images: (B, 3, H, W), normalised.
        target: ignored: a dimension is kept or pruned for all classes.
        keep_rate: share of all dimensions that are kept, above 0 and up to 1 (the whole model).

    Returns:
        Units, its kinds the inputs of the linear layers: "attention_inputs" (L, D), "attention_outputs" (L, h d),
        "mlp_inputs" (L, D) and "neurons" (L, hidden); logits (B, classes) of the smaller model.

    Raises:
        UnsupportedModel: a model without scores, and see ``vitx.vit.check``.
        ValueError: see ``vitx.vit.check``; a keep rate out of range.

    Source: Zhu et al. 2021, its equations as a summary of the paper gives them.
    """
    check(model, images)
    kept = _kept(model, keep_rate)
    with torch.no_grad():
        logits = require_finite(model, prune(model, keep_rate)(images))
    return Units({kind: score.detach().abs().clone() for kind, score in model.scores.items()}, kept, logits)


def load_pretrained(path) -> VtpTransformer:
    """The model in a safetensors file, in eval mode; its metadata names the arguments of timm's class."""
    about, weights = stored(path)
    model = VtpTransformer(**about["backbone"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Of the paper only a summary made by a machine could be read, and the authors published no code. That summary has the
#    equations and the four places of Prune, but not the norm and the activation: here scores stand behind the norm and behind
#    the activation, where a dimension can be taken out without changing the others.
# 2. The threshold compares magnitudes, for a score below zero counts too. A layer always keeps one input.
# 3. The paper fine-tunes the pruned model anew for each rate. `vtp-glyph` was fine-tuned once, the rate drawn anew in every
#    step, so that one file serves all rates; and the scores were multiplied into the weights before, so that the fine-tuning
#    starts from the function that was learned, not from one in which kept scores jump to one.
# 4. The paper trains DeiT-B for 100 epochs with $\lambda = 0.0001$; the small model, for minutes with a larger one. How
#    accuracy falls with the rate says nothing about ImageNet: the glyph world needs few dimensions.
# 5. Rows that compute values which nobody reads any more stay in the layer of queries, keys and values, because its heads
#    are of one size in timm; the other layers shrink on both sides.

# %%
if __name__ == "__main__":
    from vitx import demo, glyphs, models, plot

    images = glyphs.normalise(glyphs.scenes(1, seed=7).images)
    model: Any = models.load("vtp-glyph").model
    demo.show(plot.units(explain(model, images)), "vtp")

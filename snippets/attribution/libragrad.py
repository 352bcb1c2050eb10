# %% [markdown]
# # LibraGrad
#
# Input times gradient should add up to the score, together with each bias times its gradient (FullGrad completeness):
#
# $$f_c(x) = \sum_d x_d \frac{\partial f_c}{\partial x_d} + \sum_b b \frac{\partial f_c}{\partial b}.$$
#
# It does in a network that is affine around its input; a transformer is not, and its gradients flow out of balance. LibraGrad
# balances the backward pass and leaves the forward pass alone. Paths are pruned where one factor of a product is a function
# of the same input (attention weights, the gate $\Phi(x)$ in $\mathrm{GELU}(x) = x\,\Phi(x)$, the deviation in LayerNorm), and
# halved where two equal factors meet (gated MLPs). Any gradient method can be run on top. The one its authors prefer is
# FullGrad+: inputs times gradients at all $L$ blocks, and all biases times gradients, per token $n$,
#
# $$M_n = \sum_{l=1}^{L} \sum_d x^{(l)}_{nd} \frac{\partial f_c}{\partial x^{(l)}_{nd}} +
# \sum_{b} \sum_d b_d \frac{\partial f_c}{\partial z^{(b)}_{nd}},$$
#
# with $z^{(b)}$ the output of the layer to which bias $b$ belongs. Catalogue entry: `libragrad`.

# %%
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vitx.vit import backward_rules, capture, check, embed, logits_of_tokens, target_classes, target_scores, to_grid


def explain(
    model: VisionTransformer,
    images: Tensor,
    target: Tensor | None = None,
    *,
    base: str = "fullgrad-plus",
    score: str = "logit",
) -> Tensor:
    """Contribution of every patch token to the class score, by balanced gradients.

    Args:
        model: timm VisionTransformer in eval mode, with LayerNorms.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.
        base: the gradient method that runs on the balanced gradients: "fullgrad-plus", or "input-x-gradient" for token
            embeddings (with position) times gradient.
        score: "logit", or "probability" as in the preset of the authors' code.

    Returns:
        (B, gh, gw), signed.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check`` and ``vitx.vit.backward_rules``; unknown ``base`` or ``score``.

    Source: Mehri, Baghshah, Pilehvar 2025; FullGrad+ as in their code (decompv-libragrad-v1, transform_fullgrad).
    """
    check(model, images)
    if base not in ("fullgrad-plus", "input-x-gradient"):
        raise ValueError(f'base must be "fullgrad-plus" or "input-x-gradient", not {base!r}.')
    if score not in ("logit", "probability"):
        raise ValueError(f'score must be "logit" or "probability", not {score!r}.')
    with torch.no_grad():
        tokens = embed(model, images)  # (B, N, D)
    total = tokens.new_zeros(tokens.shape[:2])  # (B, N)
    handles = watch_biases(model, total) if base == "fullgrad-plus" else []
    rules = {"attention": 0.0, "gate": 0.5, "activation": True}
    try:  # biases are watched below the hooks that prune: a pruned path gives its bias nothing
        with torch.enable_grad(), backward_rules(model, **rules), capture(model, "block_input") as record:
            logits = logits_of_tokens(model, tokens.detach().requires_grad_())
            scores = target_scores(logits if score == "logit" else logits.softmax(-1), target_classes(logits, target))
            inputs = record["block_input"] if base == "fullgrad-plus" else record["block_input"][:1]
            gradients = torch.autograd.grad(scores.sum(), inputs)  # L times (B, N, D)
    finally:
        for handle in handles:
            handle.remove()
    for x, gradient in zip(inputs, gradients, strict=True):
        total += (x.detach() * gradient).sum(-1)
    return to_grid(model, images, total[:, model.num_prefix_tokens :])


def watch_biases(model: VisionTransformer, total: Tensor) -> list[RemovableHandle]:
    """Hooks that add to ``total`` (B, N), in the backward pass, each token's bias times gradient in every layer."""

    def watch(module: nn.Module, bias: Tensor) -> RemovableHandle:
        def add(gradient: Tensor) -> None:
            total.add_((gradient * bias).sum(-1))

        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if output.requires_grad and output.shape[:-1] == total.shape:  # what comes after pooling has no token
                output.register_hook(add)

        return module.register_forward_hook(hook)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            handles.append(watch(module, module.bias.detach()))
        elif isinstance(module, ParallelScalingBlock) and module.mlp_bias is not None:  # kept apart from its layer
            bias = nn.functional.pad(module.mlp_bias.detach(), (0, sum(module.in_split[1:])))
            handles.append(watch(module.in_proj, bias))
    return handles


# %% [markdown]
# ## Where this departs from the paper
#
# 1. FullGrad+ is what the authors' code for Vision Transformers computes: one sum over the inputs of all blocks and one over
#    all biases. Their notebook for language models, which have no biases, takes the mean over blocks instead of the sum.
# 2. The map shows patches. The share of the class token, and that of biases after pooling (the head's), belongs to no patch
#    and is left out; the authors' code gives the head's bias to the class token.
# 3. The authors' preset differentiates the softmax probability of the class; here it is the logit unless
#    `score="probability"`. The probability's map is $p_c (M^{(c)} - \sum_k p_k M^{(k)})$, a contrast with the other classes.
# 4. On a model without gated MLPs, `base="input-x-gradient"` is `conservative-lrp` with the identity rule for GELU.
# 5. Attention pooling is pruned like any attention. Models with RMSNorm, differential or gated attention are refused.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "libragrad")

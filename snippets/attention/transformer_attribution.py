# %% [markdown]
# # Transformer attribution
#
# Rollout knows no class and gradients know no path. Transformer attribution sends the class score back through the
# network as relevance, layer by layer, keeps the relevance $R^{(l)}$ that arrives at every attention matrix, and weights it
# with the gradient of the same score:
#
# $$\bar A^{(l)} = I + \mathbb E_h\big[(\nabla A^{(l)} \odot R^{(l)})^{+}\big],\qquad
# C = \bar A^{(L)} \cdots \bar A^{(1)},$$
#
# and shows the class token's row of $C$. Relevance passes a linear layer by its positive terms $x_j w_{ji}$ (deep Taylor),
#
# $$R_j = \sum_i \frac{(x_j w_{ji})^{+}}{\sum_{j'} (x_{j'} w_{j'i})^{+}}\, R_i,$$
#
# and non-parametric operations of two operands $u, v$ (matrix product, residual sum) in proportion to what each
# contributed; there the two shares are rescaled so that together they keep the sum,
# $\bar R_u = R_u \cdot \frac{|\sum R_u|}{|\sum R_u| + |\sum R_v|} \cdot \frac{\sum R}{\sum R_u}$.
# Catalogue entry: `transformer-attribution`.

# %%
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from vitx.vit import (
    capture,
    check,
    head_relevance,
    linear_relevance,
    plain_relevance_blocks,
    product_relevance,
    ratio,
    readout,
    target_classes,
    target_scores,
    to_grid,
)


def sum_relevance(relevance: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance (B, N, D) of the operands of ``u + v``, rescaled per picture so that the two sums add up to its sum."""
    share = ratio(relevance, u + v)
    of_u, of_v = u * share, v * share
    total, sum_u, sum_v = (r.sum((1, 2), keepdim=True) for r in (relevance, of_u, of_v))
    scale = ratio(total, sum_u.abs() + sum_v.abs())
    return of_u * ratio(sum_u.abs(), sum_u) * scale, of_v * ratio(sum_v.abs(), sum_v) * scale


# The tensors of every block that the backward walk reads.
READ = (
    "block_input",  # (B, N, D): the residual stream
    "attn.qkv.input",  # (B, N, D)
    "attn.q_norm",  # (B, h, N, d): queries
    "attn.k_norm",  # (B, h, N, d): keys
    "attn.qkv",  # (B, N, 3 h d)
    "attention",  # (B, h, N, N)
    "attn.proj.input",  # (B, N, h d)
    "norm2.input",  # (B, N, D): the residual stream between attention and MLP
    "mlp.fc1.input",  # (B, N, D)
    "mlp.fc2.input",  # (B, N, hidden)
    "block_output",  # (B, N, D)
)


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Relevance of every patch for the class: layer-wise relevance of the attention, weighted with its gradient.

    Args:
        model: timm VisionTransformer of plain pre-norm blocks in eval mode; class-token, distilled or average-pooling head.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices; None explains the predicted class.

    Returns:
        (B, gh, gw); values of at least 0.

    Raises:
        UnsupportedModel: blocks or a head for which the paper gives no rule (parallel or post-norm blocks, gated MLPs and
            attention, attention pooling, max pooling).
        ValueError: see ``vitx.vit.check``.

    Source: Chefer, Gur, Wolf 2021 (CVPR), equations 1 to 14.
    """
    check(model, images)
    blocks = plain_relevance_blocks(model)
    with torch.enable_grad(), capture(model, *READ) as record:
        logits = model(images)
        gradients = torch.autograd.grad(target_scores(logits, target).sum(), record["attention"])
    with torch.no_grad():
        relevance = head_relevance(model, record["block_output"][-1], target_classes(logits, target))  # (B, N, D)
        row = readout(model, record)[:, None]  # (B, 1, N): one row of the product of all layers is enough
        for index in reversed(range(len(blocks))):
            layer = {name: tensors[index] for name, tensors in record.items()}
            of_attention, relevance = block_relevance(blocks[index], layer, relevance, last=index == 0)
            row = row + row @ (gradients[index] * of_attention).clamp(min=0).mean(1)
    return to_grid(model, images, row[:, 0, model.num_prefix_tokens :])


def block_relevance(block: Block, layer: dict[str, Tensor], relevance: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Relevance of the block's attention (B, h, N, N) and of its input (B, N, D), from that of its output.

    Norms, activations, softmax, layer scale and dropout pass relevance on unchanged. ``last`` skips the block's input.
    """
    x, middle, output, attention = (layer[name] for name in ("block_input", "norm2.input", "block_output", "attention"))
    stream, branch = sum_relevance(relevance, middle, output - middle)  # second residual sum
    branch = linear_relevance(branch, layer["mlp.fc2.input"], block.get_parameter("mlp.fc2.weight"))
    branch = linear_relevance(branch, layer["mlp.fc1.input"], block.get_parameter("mlp.fc1.weight"))
    stream, branch = sum_relevance(stream + branch, x, middle - x)  # first residual sum
    branch = linear_relevance(branch, layer["attn.proj.input"], block.get_parameter("attn.proj.weight"))
    heads = (attention.shape[1], -1)
    values = layer["attn.qkv"].unflatten(-1, (3, *heads))[:, :, 2].transpose(1, 2)  # (B, h, N, d)
    mixed, branch = (t.unflatten(-1, heads).transpose(1, 2) for t in (layer["attn.proj.input"], branch))  # (B, h, N, d)
    of_attention, of_values = product_relevance(branch, attention, values, mixed)
    if last:
        return of_attention, relevance
    queries, keys = layer["attn.q_norm"], layer["attn.k_norm"]
    of_queries, of_keys = product_relevance(
        of_attention, queries, keys.transpose(-2, -1), queries @ keys.transpose(-2, -1)
    )
    branch = torch.stack([of_queries, of_keys.transpose(-2, -1), of_values])  # (3, B, h, N, d)
    branch = branch.permute(1, 3, 0, 2, 4).flatten(2)  # (B, N, 3 h d)
    return of_attention, stream + linear_relevance(
        branch, layer["attn.qkv.input"], block.get_parameter("attn.qkv.weight")
    )


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The factor of a matrix product. Both operands of a product claim the whole relevance, so the paper's normalisation
#    gives each one half wherever no entry of the product is zero; like the authors' code, we divide by two outright.
# 2. The paper says nothing of layer scale, query and key norms and registers, which came later. Layer scale and norms pass
#    relevance on unchanged, as the paper treats its LayerNorms; registers are tokens like any other.
# 3. Heads: a distilled model's mean of two heads is treated as one linear layer on both tokens; average pooling passes
#    relevance in proportion to each token's value. The paper has the class token only.
# 4. The normalisation of a residual sum takes its sums per picture. The authors' code takes them over the batch, which is
#    the same for the single pictures that it runs on.
# 5. Relevance is not carried below the first block's attention, which the map does not need.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "transformer-attribution")

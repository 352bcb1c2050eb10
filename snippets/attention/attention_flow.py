# %% [markdown]
# # Attention flow
#
# How much of a patch could reach the class token at most, if every attention weight were the width of a pipe? The layers
# form a graph: one node for each token before the first layer and after each layer, and an edge from token $i$ after layer
# $l$ to every token $k$ before it. Its capacity is the head-averaged attention with the residual path added and
# renormalised, as in `attention-rollout`:
#
# $$\tilde A^{(l)} = \tfrac12\Big(\frac1h\sum_m A^{(l,m)} + I\Big).$$
#
# The relevance of a patch $j$ is the maximum flow from the class token at the top to token $j$ at the bottom. A path carries
# no more than its narrowest edge, and paths that share an edge share its capacity; rollout would multiply and add instead.
# One maximum flow is solved for each patch. Catalogue entry: `attention-flow`.

# %%
import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vitx.vit import capture, check, readout, require_finite, to_grid

SCALE = 2**30  # integer capacity of a pipe of width one: the solver counts in 32-bit integers


def explain(model: VisionTransformer, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Maximum flow from what the head reads to every input patch, through attention and residual paths.

    Args:
        model: timm VisionTransformer in eval mode.
        images: (B, 3, H, W), normalised.
        target: ignored: attention weights belong to no class.

    Returns:
        (B, gh, gw); values from 0 to 1, each a flow of its own: they share no capacity and do not sum to one.

    Raises:
        UnsupportedModel, ValueError: see ``vitx.vit.check``.

    Source: Abnar, Zuidema 2020, section 3.
    """
    check(model, images)
    with torch.inference_mode(), capture(model, "attention") as record:
        model(images)
        top = require_finite(model, readout(model, record))  # (B, N): widths of the pipes from the source
        attention = torch.stack([weights.mean(1) for weights in record["attention"]], 1)  # (B, L, N, N)
    require_finite(model, attention)
    widths = (attention.double().cpu().numpy() + np.eye(attention.shape[-1])) / 2
    prefix = model.num_prefix_tokens
    pairs = zip(top.double().cpu().numpy(), widths, strict=True)
    return to_grid(model, images, images.new_tensor(np.stack([flows(*pair)[prefix:] for pair in pairs])))


def flows(top: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Maximum flow from the source to each input token: (N,).

    Args:
        top: (N,) capacities from the source to the tokens after the last layer, of sum one.
        widths: (L, N, N) capacities from each token after a layer (row) to each before it; first layer first, rows of
            sum one.

    The solver finds a minimum cut of the capacities rounded down to multiples of 2^-30; the result is the capacity of this
    cut before rounding. It is never below the true maximum flow, and exceeds it by less than 2^-30 for each edge of the
    cut: by nothing unless another cut is equal that closely.
    """
    depth, tokens, _ = widths.shape
    graph = network(top, widths)  # (L N + 2, L N + 2)
    whole = graph.astype(np.int32)
    source, sink = 0, depth * tokens + 1
    result = np.empty(tokens)
    for token in range(tokens):
        graph.data[-tokens:] = widths[0, :, token]  # the only edges into the sink
        whole.data = np.floor(graph.data * SCALE).astype(np.int32)
        residual = (
            whole - maximum_flow(whole, source, sink).flow
        )  # what each edge could still carry, in both directions
        residual.eliminate_zeros()
        above = np.zeros(sink + 1)  # the source's side of the minimum cut
        above[breadth_first_order(residual, source, return_predecessors=False)] = 1
        result[token] = above @ (graph @ (1 - above))
    return result


def network(top: np.ndarray, widths: np.ndarray) -> csr_array:
    """The layered graph: node 0 is the source, then the tokens after the last layer, ..., after the first, then one sink.

    The last N entries of its data are the edges of the tokens after the first layer to the sink.
    """
    depth, tokens, _ = widths.shape
    layers = widths[:0:-1] * np.ones((depth - 1, 1, 1))  # (L - 1, N, N), last layer first
    if depth > 1:
        layers[0] *= top[:, None] > 0  # what the source does not reach needs no edges
    level, start, end = np.nonzero(layers)
    row = np.concatenate(
        [np.zeros(tokens, int), 1 + level * tokens + start, 1 + (depth - 1) * tokens + np.arange(tokens)]
    )
    column = np.concatenate(
        [1 + np.arange(tokens), 1 + (level + 1) * tokens + end, np.full(tokens, depth * tokens + 1)]
    )
    capacity = np.concatenate([top, layers[level, start, end], np.ones(tokens)])
    return csr_array(coo_array((capacity, (row, column)), shape=(depth * tokens + 2,) * 2))


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The solver works on capacities rounded down to multiples of $2^{-30}$. Only the minimum cut is taken from it, and its
#    capacity is summed in double precision from the unrounded weights; see `flows` for what this can change.
# 2. The values are the maximum flows themselves, as the paper defines them. The authors' code divides them by their sum over
#    all input tokens, the class token included, which changes the scale of a map and nothing else.
# 3. Models without class token start from what their head reads (`vitx.vit.readout`): the source is joined to each token
#    after the last layer by an edge as wide as the head's weight for it. The paper has the class token only.
#
# A flow to token $j$ can exceed neither the capacity at the source, which is one, nor what flows into $j$ in the first
# layer, $\sum_i \tilde A^{(1)}_{ij}$. In deep models whose attention is spread out, one of these two cuts is usually the
# minimum already, and the map then depends on the first layer's attention alone.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.heatmap(explain, "attention-flow")

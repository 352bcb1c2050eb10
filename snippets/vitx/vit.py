"""The adapter to timm's VisionTransformer: its tokens, its grid, its attention, without editing the model.

Everything works on a stock model: fused attention, class token, registers, distillation token, qk-norm, layer scale,
average pooling or attention pooling. Every function leaves the model as it found it.

Shapes: B pictures, N tokens = prefix tokens (class, distillation, registers) + P patches, P = gh * gw,
h heads, D channels.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.diff_attention import DiffAttention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.utils.hooks import RemovableHandle


class UnsupportedModel(ValueError):
    """The model is not a timm VisionTransformer, or lacks what the method needs; the message says which."""


# --- what the model is ---------------------------------------------------------------------------------------------


def check(model: nn.Module, images: Tensor, *, class_token: bool = False) -> None:
    """Refuse what no method can explain, in one sentence each.

    Args:
        model: must be a timm ``VisionTransformer`` in eval mode.
        images: (B, 3, H, W), normalised, finite.
        class_token: the method reads the class token.

    Raises:
        UnsupportedModel: another architecture, or no class token where one is needed.
        ValueError: training mode, wrong shape, picture size or dtype, NaN in a picture.
    """
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a timm VisionTransformer, and this method reads its tokens and blocks."
        )
    if class_token and not model.has_class_token:
        raise UnsupportedModel(
            f"this model has no class token (its head reads global_pool={model.global_pool!r}), which the method needs."
        )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first.")
    if images.ndim != 4 or images.shape[1] != model.in_chans or not len(images):
        raise ValueError(
            f"images must have shape (B, {model.in_chans}, H, W) with B at least 1, not {tuple(images.shape)}."
        )
    size, expected = tuple(images.shape[-2:]), model.patch_embed.img_size
    if model.patch_embed.strict_img_size and expected is not None and size != tuple(expected):
        raise ValueError(
            f"this model reads pictures of {expected[0]} x {expected[1]} pixels, not {size[0]} x {size[1]}."
        )
    parameter = next(model.parameters())
    if images.dtype != parameter.dtype or images.device != parameter.device:
        raise ValueError(
            f"images are {images.dtype} on {images.device}, but the model is {parameter.dtype} on {parameter.device}."
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"picture {int((~finite).nonzero()[0])} of images holds NaN or infinite values.")


def plain_blocks(model: VisionTransformer) -> list[Block]:
    """The blocks, all timm's pre-norm ``Block``; UnsupportedModel for a method that walks inside other kinds."""
    blocks = [block for block in model.blocks if type(block) is Block]
    if len(blocks) < len(model.blocks):
        other = next(type(block).__name__ for block in model.blocks if type(block) is not Block)
        raise UnsupportedModel(f"this method reads inside pre-norm blocks (attention, then MLP), and {other} is none.")
    return blocks


def grid(model: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """(gh, gw): rows and columns of patches that the model cuts ``images`` (B, 3, H, W) into."""
    return model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))


def to_grid(model: VisionTransformer, images: Tensor, values: Tensor) -> Tensor:
    """Patch values (B, P) on the patch grid: (B, gh, gw), detached. Raises ValueError as ``require_finite``."""
    return require_finite(model, values.detach()).unflatten(1, grid(model, images))


def require_finite(model: nn.Module, values: Tensor) -> Tensor:
    """The values; ValueError when one is NaN or infinite, naming the parameter of the model that is, if one is."""
    if not values.isfinite().all():
        culprit = non_finite_parameter(model)
        raise ValueError(
            f"the relevance is not finite: parameter {culprit} of the model holds NaN or infinite values."
            if culprit
            else f"the relevance is not finite in {values.dtype}, although pictures and weights are: try a wider dtype."
        )
    return values


def non_finite_parameter(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that holds NaN or infinite values, or None."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


def pool_patches(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """Sum of a pixel map (B, H, W) over every patch: (B, P). Pixels beyond the last whole patch belong to none."""
    ph, pw = model.patch_embed.patch_size
    padding = (0, -pixels.shape[-1] % pw, 0, -pixels.shape[-2] % ph) if model.patch_embed.dynamic_img_pad else (0,) * 4
    pixels = nn.functional.pad(pixels, padding)
    return (nn.functional.avg_pool2d(pixels[:, None], (ph, pw)) * (ph * pw)).flatten(1)


def target_classes(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """The class to explain, for every picture: (B,) indices.

    Args:
        logits: (B, classes).
        target: (B,) class indices, or None for the predicted class.

    Raises:
        ValueError: wrong shape or dtype, or a class that the model does not have.
    """
    if target is None:
        return logits.argmax(-1)
    target = torch.as_tensor(target, device=logits.device)
    if target.shape != logits.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target must hold one class index for each of the {len(logits)} pictures: "
            f"integers of shape ({len(logits)},), not {target.dtype} of shape {tuple(target.shape)}."
        )
    outside = target[(target < 0) | (target >= logits.shape[1])]
    if len(outside):
        raise ValueError(f"class {int(outside[0])} is out of range: the model has classes 0 to {logits.shape[1] - 1}.")
    return target.long().clone()  # a target made in inference mode would be refused by a backward pass


def target_scores(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """The logit of the class to explain, for every picture: (B,). Arguments and errors as ``target_classes``."""
    return logits.gather(1, target_classes(logits, target)[:, None])[:, 0]


def caption_tokens(model: Any, images: Tensor, target: list[str] | Tensor | None) -> Tensor:
    """Token ids (B, L) of the caption to explain for each picture.

    Args:
        model: two towers, ``image`` and ``text``, such as the model two-tower-glyph has.
        images: (B, 3, H, W), normalised.
        target: B captions; or their token ids (B, L); or (B,) class indices, which stand for the classes' captions;
            None takes the most similar of these.

    Raises:
        UnsupportedModel: no two towers, or an image tower that is not read from its class token.
        ValueError: see ``check``; not one caption for each picture, a caption too long, a word that the text tower does
            not know, no such class.
    """
    if not (hasattr(model, "image") and hasattr(model, "text")):
        raise UnsupportedModel(
            f"{type(model).__name__} has no text tower: the method explains the similarity of a picture and a caption "
            "(the model two-tower-glyph)."
        )
    check(model.image, images, class_token=True)
    if model.image.global_pool != "token":
        raise UnsupportedModel(f"the image tower reads global_pool={model.image.global_pool!r}, not its class token.")
    if target is None or (isinstance(target, Tensor) and target.ndim == 1):
        with torch.no_grad():
            return model.class_tokens[target_classes(model(images), target)]
    tokens: Tensor = (
        target
        if isinstance(target, Tensor)
        else model.text.tokenize([target] if isinstance(target, str) else list(target))
    )
    longest = len(model.text.pos_embed)
    if len(tokens) != len(images):
        raise ValueError(f"there are {len(tokens)} captions for {len(images)} pictures: give one for each.")
    if tokens.shape[1] > longest:
        raise ValueError(f"a caption has {tokens.shape[1] - 2} words, and the text tower reads at most {longest - 2}.")
    return tokens.to(images.device)


# --- looking inside ------------------------------------------------------------------------------------------------


@contextmanager
def capture(model: nn.Module, *names: str) -> Iterator[dict[str, list[Tensor]]]:
    """Record tensors inside every block while the model runs; hooks and flags are taken back at the end.

        with capture(model, "attention") as record:
            logits = model(images)
        gradients = torch.autograd.grad(target_scores(logits).sum(), record["attention"])

    Args:
        model: a timm VisionTransformer, or any module with timm blocks in ``.blocks``, such as a text tower.
        names: any of
            "attention": attention weights after the softmax, (B, h, N, N) per block. Fused attention is switched off
                for the call. A model with attention pooling also records "pool_attention", (B, h, 1, N or P), once.
            "block_input", "block_output": (B, N, D) per block.
            a path inside the block, as "norm1", "attn.qkv" or "mlp.fc1": the output of that module;
                with ".input" behind it, its input.

    Yields:
        {name: list over blocks, first block first}. With gradients enabled the tensors are in the graph, also when
        every parameter of the model is frozen, so ``torch.autograd.grad`` can differentiate by them.

    Raises:
        UnsupportedModel: a block without the module or without one plain attention matrix.
    """
    record: dict[str, list[Tensor]] = {name: [] for name in names}
    handles: list[RemovableHandle] = []
    flags: list[tuple[nn.Module, str, bool]] = []
    blocks = list(model.get_submodule("blocks").children())

    def switch(module: nn.Module, flag: str, value: bool) -> None:
        flags.append((module, flag, getattr(module, flag)))
        setattr(module, flag, value)

    def keep(name: str, tensor: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()  # a leaf, so that frozen models have gradients too
        record[name].append(tensor)
        return tensor

    def keep_output(name: str) -> Callable:
        # An Identity returns its input, which others may read too: a view has a gradient of its own.
        return lambda module, args, output: keep(name, output.view_as(output) if output is args[0] else output)

    def keep_input(name: str) -> Callable:
        return lambda module, args: (keep(name, args[0]), *args[1:])

    def keep_pool_attention(pool: AttentionPoolLatent, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return _attention_pooling(pool, *args, **kwargs, keep=lambda weights: keep("pool_attention", weights))

    try:
        if hasattr(model, "grad_checkpointing"):
            switch(model, "grad_checkpointing", False)  # it would run every hook twice
        for name in names:
            path = {"block_input": ".input", "block_output": ""}.get(name, name)
            for index, block in enumerate(blocks):
                if name == "attention":
                    attention = _attention_module(block, index)
                    switch(attention, "fused_attn", False)
                    module = attention.get_submodule("attn_drop")
                else:
                    module = _submodule(block, index, path.removesuffix(".input"))
                if path.endswith(".input"):
                    handles.append(module.register_forward_pre_hook(keep_input(name)))
                else:
                    handles.append(module.register_forward_hook(keep_output(name)))
            pool = getattr(model, "attn_pool", None)
            if name == "attention" and isinstance(pool, AttentionPoolLatent):
                record["pool_attention"] = []
                handles.append(pool.register_forward_hook(keep_pool_attention, with_kwargs=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for module, flag, value in reversed(flags):
            setattr(module, flag, value)


def _submodule(block: nn.Module, index: int, path: str) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"block {index} ({type(block).__name__}) has no module {path!r}, which this method reads."
        ) from None


def _attention_module(block: nn.Module, index: int) -> nn.Module:
    attention = getattr(block, "attn", block)  # a parallel-scaling block is its own attention
    if isinstance(attention, DiffAttention) or hasattr(attention, "lambda_init"):
        raise UnsupportedModel(
            f"block {index} uses differential attention: a difference of two softmaxes is no attention matrix."
        )
    if not (hasattr(attention, "attn_drop") and hasattr(attention, "fused_attn")):
        raise UnsupportedModel(
            f"block {index} ({type(block).__name__}) does not have one attention matrix, which this method reads."
        )
    return attention


def _attention_pooling(
    pool: AttentionPoolLatent,
    tokens: Tensor,
    attn_mask: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Tensor:
    """timm's AttentionPoolLatent, with ``keep`` seeing (and perhaps replacing) its attention weights (B, h, 1, N)."""
    batch, heads = len(tokens), pool.num_heads
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    queries = pool.q(pool.latent.expand(batch, -1, -1)).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = pool.kv(tokens).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d) each
    queries, keys = pool.q_norm(queries), pool.k_norm(keys)
    scores = (queries * pool.scale) @ keys.transpose(-2, -1)  # (B, h, latent, N)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    mixed = (keep(scores.softmax(-1)) @ values).transpose(1, 2).flatten(2)  # (B, latent, D)
    mixed = pool.proj_drop(pool.proj(mixed))
    if pool.mlp is not None:
        mixed = mixed + pool.mlp(pool.norm(mixed))
    return mixed[:, 0] if pool.pool == "token" else mixed.mean(1) if pool.pool == "avg" else mixed


def readout(model: VisionTransformer, record: dict[str, list[Tensor]]) -> Tensor:
    """How the head reads the final tokens: weights (B, N) that sum to one. Attention maps start from here.

    One for the class token; one half each for class and distillation token; uniform for average pooling; the
    head-averaged pooling attention for attention pooling.

    Args:
        record: of ``capture(model, "attention")`` after the forward pass.

    Raises:
        UnsupportedModel: the head reads tokens in another way (max pooling, none).
    """
    attention = record["attention"][-1]
    weights = attention.new_zeros(len(attention), attention.shape[-1])
    if hasattr(model, "dist_token"):
        weights[:, :2] = 0.5
    elif model.global_pool == "token":
        weights[:, 0] = 1
    elif model.global_pool == "avg":
        weights[:, 0 if model.pool_include_prefix else model.num_prefix_tokens :] = 1
    elif record.get("pool_attention"):
        return pool_row(model, record["pool_attention"][0].mean(1)[:, 0])
    else:
        raise UnsupportedModel(
            f"the head of this model reads its tokens by global_pool={model.global_pool!r}, "
            "which gives no fixed weight to a token; class-token, average and attention pooling do."
        )
    return weights / weights.sum(-1, keepdim=True)


def pool_row(model: VisionTransformer, row: Tensor) -> Tensor:
    """A row (B, N or P) over the tokens that attention pooling reads, as a row (B, N) over all tokens."""
    return row if model.pool_include_prefix else nn.functional.pad(row, (model.num_prefix_tokens, 0))


# --- models that ship ----------------------------------------------------------------------------------------------


def stored(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint of this project holds: its metadata, each value read as JSON, and its weights as float32."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


# --- removing tokens -----------------------------------------------------------------------------------------------


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens (B, N, D) with their positions, as the first block receives them."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def keep_tokens(model: VisionTransformer, tokens: Tensor, patches: Tensor) -> Tensor:
    """The prefix tokens and the chosen patches of each picture: (B, prefix + K, D), a really shorter sequence.

    Args:
        tokens: (B, N, D).
        patches: (B, K) patch indices, 0 to P - 1.
    """
    prefix = model.num_prefix_tokens
    kept = tokens[:, prefix:].gather(1, patches[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat([tokens[:, :prefix], kept], 1)


def logits_of_tokens(model: VisionTransformer, tokens: Tensor, first: int = 0) -> Tensor:
    """Logits (B, classes) from tokens (B, any number, D) at the input of block ``first``; len(blocks) is the end."""
    for block in list(model.blocks)[first:]:
        tokens = block(tokens)
    return model.forward_head(model.norm(tokens))


@contextmanager
def replaced_attention(block: nn.Module, attention: Tensor) -> Iterator[None]:
    """Let ``block`` mix its values with the given weights (B, h, N, N) instead of its own attention.

    Gradients flow into ``attention``. Raises UnsupportedModel where the block has no one attention matrix.
    """
    module = _attention_module(block, -1)
    fused, module.fused_attn = module.fused_attn, False  # pyright: ignore[reportArgumentType]
    handle = module.get_submodule("attn_drop").register_forward_hook(lambda *_: attention)
    try:
        yield
    finally:
        handle.remove()
        module.fused_attn = fused


def logits_of_visible(model: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """Logits (B, classes) when only the visible patches can be attended to and pooled.

    The shapes stay and the hidden tokens are masked: equal to dropping them (``keep_tokens``), but each picture may
    hide another number of them.

    Args:
        visible: (B, P) bool, with at least one visible patch in each picture when there is no prefix token.

    Raises:
        UnsupportedModel: pooling other than by class token, average or attention.
    """
    prefix = model.num_prefix_tokens
    mask = nn.functional.pad(visible, (prefix, 0), value=True)  # (B, N)
    tokens = model.forward_features(images, attn_mask=mask[:, None, None])
    if model.global_pool == "token":
        return model.forward_head(tokens)
    start = 0 if model.pool_include_prefix else prefix
    tokens, mask = tokens[:, start:], mask[:, start:]
    if isinstance(model.attn_pool, AttentionPoolLatent):
        pooled = model.attn_pool(tokens, attn_mask=mask[:, None, None])
    elif model.global_pool == "avg":
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        raise UnsupportedModel(f"patches cannot be hidden from a head that reads global_pool={model.global_pool!r}.")
    return model.head(model.head_drop(model.fc_norm(pooled)))


def patches_to_pixels(model: VisionTransformer, images: Tensor, patches: Tensor) -> Tensor:
    """Values of patches (n, P) or (n, C, P) laid over the pixels of the pictures, (n, C, H, W)."""
    height, width = images.shape[-2:]
    ph, pw = model.patch_embed.patch_size
    values = patches.view(len(patches), -1, *grid(model, images)).to(images.dtype)
    return values.repeat_interleave(ph, 2).repeat_interleave(pw, 3)[..., :height, :width]  # less what was padded


def integrated_attention_gradient(
    model: VisionTransformer, images: Tensor, classes: Tensor, alpha: Tensor, rows: Tensor, chunk: int
) -> Tensor:
    """Mean over alpha (K,) of the gradient of the class logit of alpha * x by the rows (R,) of the last attention.

    The last attention is that of the last block, or of attention pooling. Nothing below it is differentiated.

    Args:
        images: (B, 3, H, W), x. classes: (B,). chunk: pictures per pass; bounds the memory.

    Returns:
        (B, h, R, N).
    """
    pooled = model.attn_pool is not None
    first = len(model.blocks) - (not pooled)  # the block whose attention is differentiated
    # Every picture at every step, in one long batch that is worked through in chunks.
    order = torch.arange(len(images) * len(alpha), device=images.device)
    total: Tensor | None = None
    for part in order.split(chunk):
        picture, step = part % len(images), part // len(images)
        with torch.no_grad():
            tokens = embed(model, images[picture] * alpha[step, None, None, None])  # (chunk, N, D)
            for block in list(model.blocks)[:first]:
                tokens = block(tokens)
        with torch.enable_grad(), capture(model, "attention") as record:
            scores = target_scores(logits_of_tokens(model, tokens, first), classes[picture])
            weights = record["pool_attention" if pooled else "attention"]
            (gradient,) = torch.autograd.grad(scores.sum(), weights)  # (chunk, h, N, N)
        gradient = gradient[:, :, rows]  # (chunk, h, R, N)
        if pooled:
            gradient = pool_row(model, gradient)
        if total is None:
            total = gradient.new_zeros(len(images), *gradient.shape[1:])
        total.index_add_(0, picture, gradient)
    assert total is not None
    return total / len(alpha)


def normalised_cut(joined: Tensor, epsilon: float) -> Tensor:
    """Second eigenvector of the normalised cut of graphs of patches, (B, P) in float64, of unit length in y' D y.

    Its sign is arbitrary. Source: Shi, Malik 2000.

    Args:
        joined: (B, P, P) bool, symmetric: pairs of weight 1. epsilon: weight of all others, which connects the graph.

    Raises:
        ValueError: a graph that joins all patches, or none, and so has no cut.
    """
    degenerate = joined.flatten(1).all(1) | (joined.sum((1, 2)) <= joined.shape[1])
    if degenerate.any():
        raise ValueError(
            f"all patches of picture {int(degenerate.nonzero()[0])} are joined, or none of them: its graph has no cut, "
            "choose another tau or centred=True."
        )
    weights = joined.double().clamp(min=epsilon)  # (B, P, P): E
    # With y = D^(-1/2) z the generalised problem is an ordinary symmetric one: D^(-1/2) (D - E) D^(-1/2) z = lambda z.
    root = weights.sum(-1).rsqrt()  # (B, P): D^(-1/2)
    laplacian = torch.eye(joined.shape[1]).to(weights) - root[:, :, None] * weights * root[:, None]
    return root * torch.linalg.eigh(laplacian).eigenvectors[..., 1]


def features_and_gradient(
    model: VisionTransformer, images: Tensor, target: Tensor | None, layer: int
) -> tuple[Tensor, Tensor]:
    """Patch tokens after ``norm1`` of one block, and the gradient of the class logit by them: (B, P, D) each.

    The class is ``target`` (B,), or the predicted one. Blocks below ``layer`` run without a graph.

    Raises:
        UnsupportedModel: blocks that are not pre-norm.
        ValueError: no such layer.
    """
    depth, prefix = len(plain_blocks(model)), model.num_prefix_tokens
    if not -depth <= layer < depth:
        raise ValueError(f"layer {layer} is out of range: the model has {depth} blocks.")
    with torch.no_grad():  # what lies below the layer needs no graph
        tokens = model.blocks[: layer % depth](embed(model, images))  # (B, N, D)
    with torch.enable_grad(), capture(model, "norm1") as record:
        scores = target_scores(logits_of_tokens(model, tokens, first=layer % depth), target)  # (B,) logits y^c
        features = record["norm1"][0]  # (B, N, D), of the first block that ran
        (gradient,) = torch.autograd.grad(scores.sum(), features)
    return features[:, prefix:].detach(), gradient[:, prefix:]


# --- what pruning keeps --------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """Which patches live after each block."""

    alive: Tensor  # (B, L, gh, gw) bool
    logits: Tensor  # (B, classes) of the pruned model

    def heatmap(self) -> Tensor:
        """Share of the blocks after which a patch is still in the sequence: (B, gh, gw), from 0 to 1."""
        return self.alive.to(self.logits.dtype).mean(1)


class Units(NamedTuple):
    """How much parts of the model matter, and which of them are kept.

    Kinds are "heads" (L, h), "neurons" of the MLPs (L, hidden), "channels" of the tokens (D,) and "blocks" (L,).
    """

    scores: dict[str, Tensor]  # by kind, any scale; higher is more relevant
    kept: dict[str, Tensor]  # by kind, bool
    logits: Tensor  # (B, classes) of the pruned model


class Likeness(NamedTuple):
    """A prototype that was looked for in a picture, and the training scene that it comes from, for ``vitx.plot``."""

    title: str
    patches: list[int]  # of the picture, row by row from 0, that are most like it
    relation: str  # what joins the two: "is like that"
    source: list[int]  # of the scene of the glyph world: seed, index, and the patches that the prototype is


def masked_block(block: nn.Module, tokens: Tensor, kept: Tensor) -> Tensor:
    """A block in which tokens (B, N, D) attend to themselves and to kept ones only; differentiable in kept (B, N).

    This is how DynamicViT (Rao et al. 2021) trains token selection: dropped tokens, where kept is 0 and not 1, stay in
    the sequence, but no other token sees them.
    """
    parts: Any = block
    attention = parts.attn
    queries, keys, values = (
        attention.qkv(parts.norm1(tokens)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)  # (B, h, N, d)
    scores = (queries * attention.scale) @ keys.transpose(-2, -1)  # (B, h, N, N)
    itself = torch.eye(tokens.shape[1], device=tokens.device, dtype=kept.dtype)
    gates = (kept[:, None] * (1 - itself) + itself)[:, None].to(scores.dtype)  # (B, 1, N, N)
    powers = (scores - scores.detach().amax(-1, keepdim=True)).exp() * gates
    mixed = (powers / powers.sum(-1, keepdim=True).clamp(min=1e-20)) @ values  # (B, h, N, d)
    tokens = tokens + parts.ls1(attention.proj(mixed.transpose(1, 2).flatten(2)))
    return tokens + parts.ls2(parts.mlp(parts.norm2(tokens)))


def gumbel_decisions(scores: Tensor, uniform: Tensor) -> Tensor:
    """Decisions (B, P), 1 for kept, drawn from scores (B, P, 2), for dropping and keeping, by Gumbel-softmax.

    Scores are logarithms of probabilities, up to a constant; uniform (B, P, 2) holds random numbers in (0, 1). The
    gradient is that of the soft decisions.
    """
    soft = (scores - (-uniform.log()).log()).softmax(-1)[..., 1]
    return (soft > 0.5).to(soft) - soft.detach() + soft


@contextmanager
def gated_units(model: VisionTransformer, heads: Tensor | None = None, neurons: Tensor | None = None) -> Iterator[None]:
    """Multiply the output of every head, and of every MLP neuron after its activation, with a gate.

    Gradients flow into the gates. Raises UnsupportedModel for blocks that are not plain.

    Args:
        heads: (L, h), or (L, B, h) for gates of each picture. neurons: (L, hidden), or (L, B, hidden).
    """
    handles = []
    try:
        for index, block in enumerate(plain_blocks(model)):
            if heads is not None:
                attention: Any = block.attn
                gates = heads[index].repeat_interleave(attention.head_dim, -1)  # (h * width,) or (B, h * width)
                handles.append(attention.proj.register_forward_pre_hook(partial(_gate, gates)))
            if neurons is not None:
                hook = partial(_gate, neurons[index])
                handles.append(block.mlp.get_submodule("fc2").register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate(gates: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * (gates if gates.ndim == 1 else gates[:, None]), *args[1:])


def without_units(
    model: VisionTransformer, heads: Tensor, neurons: Tensor, blocks: Tensor | None = None
) -> VisionTransformer:
    """A smaller copy of the model that really lacks the units which are not kept.

    Its logits are those of the model inside ``gated_units`` with gates of 0 and 1, where all blocks are kept.

    Args:
        heads: (L, h) bool, kept. neurons: (L, hidden) bool, kept; at least one of each in every block that is kept.
        blocks: (L,) bool, kept; None keeps all.

    Raises:
        UnsupportedModel: blocks other than plain ones with plain attention and MLP.
        ValueError: a block that is kept without a head or a neuron.
    """
    model = copy.deepcopy(model)
    stays = [True] * len(heads) if blocks is None else blocks.tolist()
    for index, block in enumerate(plain_blocks(model)):
        attention: Any = block.attn
        mlp: Any = block.mlp
        plain = type(attention) is Attention and attention.gate is None and type(attention.norm) is nn.Identity
        if not plain or type(mlp) is not Mlp or type(mlp.norm) is not nn.Identity:
            raise UnsupportedModel("units are taken out of plain attention and plain MLPs, without gate or norm.")
        if not stays[index]:
            continue
        if not heads[index].any() or not neurons[index].any():
            raise ValueError(f"block {index} would be left without a head or without a neuron.")
        rows = heads[index].repeat_interleave(attention.head_dim)  # (D,)
        attention.qkv = _part(attention.qkv, rows.repeat(3), None)
        attention.proj = _part(attention.proj, None, rows)
        attention.num_heads = int(heads[index].sum())
        attention.attn_dim = attention.num_heads * attention.head_dim
        mlp.fc1, mlp.fc2 = _part(mlp.fc1, neurons[index], None), _part(mlp.fc2, None, neurons[index])
    model.blocks = nn.Sequential(*(block for block, stay in zip(model.blocks, stays, strict=True) if stay))
    return model


def _part(layer: Any, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    """The chosen outputs (rows) or inputs (columns) of a linear layer, bool masks; None keeps all."""
    weight, bias = layer.weight.detach(), layer.bias
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")  # draws no random numbers
    part.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if bias is not None:
        part.bias = nn.Parameter((bias if rows is None else bias[rows]).detach().clone(), bias.requires_grad)
    return part


# --- other rules for the backward pass -----------------------------------------------------------------------------
# Relevance in gradient form: a tensor x with gradient g holds the relevance x * g. A linear step hands on all that it
# received, less the share of its bias: sum(x * W.T @ g) = sum((y - b) * g). The other steps of a transformer do not, so
# they are given another backward pass here. Values of the forward pass never change.


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return gradients[0] * ctx.factor, None


class _ConstantDeviation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        output, _, inverse = torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        ctx.scale = inverse if norm.weight is None else norm.weight * inverse  # (..., D): 1 / deviation, weighted
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        gradient = gradients[0] * ctx.scale
        return gradient - gradient.mean(-1, keepdim=True), None


class _IdentityRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        output = activation(x)
        ctx.gate = torch.where(x == 0, 0, output / x)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return gradients[0] * ctx.gate, None


class _GammaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear | nn.Conv2d, gamma: float) -> Tensor:
        output = linear_map(layer, x, layer.weight, layer.bias)
        ctx.layer, ctx.gamma = layer, gamma
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (x, output), layer, gamma = ctx.saved_tensors, ctx.layer, ctx.gamma
        # The terms t = x w of the output's sign sum to (sum t + sign sum |t|) / 2, so two products with |w| are enough.
        sign, magnitude = output.sign(), layer.weight.abs()
        bias = None if layer.bias is None else layer.bias.abs()
        favoured = (output + sign * linear_map(layer, x.abs(), magnitude, bias)) / 2
        total = output + gamma * favoured
        share = torch.where(total == 0, 0, gradients[0] * output / total)
        plain, signed = (
            linear_transpose(layer, x, share, layer.weight),
            linear_transpose(layer, x, sign * share, magnitude),
        )
        return (1 + gamma / 2) * plain + gamma / 2 * x.sign() * signed, None, None


def linear_map(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's output for ``x`` with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def linear_transpose(layer: nn.Linear | nn.Conv2d, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient by ``x`` of ``linear_map(layer, x, weight)``, given the gradient by its output."""
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    if isinstance(layer.padding, str):
        raise UnsupportedModel(f"relevance has no rule for a convolution with padding={layer.padding!r}.")
    settings: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return conv2d_input(x.shape, weight, gradient, *settings)


def scaled_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """``x``, with its gradient multiplied by ``factor``: a relevance that is shared out."""
    return _ScaledGradient.apply(x, factor)  # type: ignore[return-value]


def constant_deviation(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm whose backward pass takes the standard deviation for a constant, and so is linear in ``x``."""
    return _ConstantDeviation.apply(x, norm)  # type: ignore[return-value]


def identity_rule(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An activation y = f(x) with f(0) = 0 whose backward pass multiplies by y / x: the input keeps all relevance."""
    return _IdentityRule.apply(x, activation)  # type: ignore[return-value]


def gamma_rule(layer: nn.Linear | nn.Conv2d, x: Tensor, gamma: float) -> Tensor:
    """A linear layer whose terms x_j w_ij (and bias) of the sign of their sum z_i count (1 + gamma) times.

    R_j = sum_i (x_j w_ij + gamma (x_j w_ij)^s) / (z_i + gamma z_i^s) R_i, where ^s keeps the part with the sign of z_i.
    """
    return _GammaRule.apply(x, layer, gamma)  # type: ignore[return-value]


@contextmanager
def replaced_forwards(replaced: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Let each module compute with the function beside it, called as its ``forward``; taken back at the end."""
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, function in replaced:
            vars(module)["forward"] = function
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


@contextmanager
def backward_rules(
    model: VisionTransformer,
    *,
    attention: float,
    gate: float,
    activation: bool,
    linear: Callable[[nn.Linear | nn.Conv2d, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Let relevance pass the model, in gradient form, while it runs and is differentiated; taken back at the end.

        with torch.enable_grad(), backward_rules(model, attention=0, gate=0, activation=True):
            scores = target_scores(logits_of_tokens(model, tokens), target)
            (gradient,) = torch.autograd.grad(scores.sum(), tokens)
        relevance = tokens * gradient

    Every LayerNorm takes its standard deviation for a constant (``constant_deviation``).

    Args:
        attention: share of the relevance of (attention weights @ values) that goes through the attention weights, and
            from there, halved, to queries and keys; the values take the rest. 0 takes the weights for constants.
        gate: the same for the gate of a gated MLP.
        activation: apply ``identity_rule`` to the activations of the MLPs; False leaves their gradient as it is.
        linear: forward of every linear and convolutional layer, with a backward pass of its own; None leaves it.

    Raises:
        UnsupportedModel: norms, attention or MLPs for which there is no rule here.
    """
    replaced: list[tuple[nn.Module, Callable]] = []
    scaled: list[tuple[nn.Module, Tensor | float]] = []
    weight = next(model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            replaced.append((module, partial(constant_deviation, module)))
        elif "norm" in name.rsplit(".")[-1] and not isinstance(module, nn.Identity):
            raise UnsupportedModel(f"relevance has a rule for LayerNorm, and {name} is a {type(module).__name__}.")
        elif linear and isinstance(module, nn.Linear | nn.Conv2d):
            replaced.append((module, partial(linear, module)))
        elif name.endswith(("act", "mlp_act")) and activation:
            if float(module(weight.new_zeros(1))) != 0:
                raise UnsupportedModel(
                    f"the identity rule needs f(0) = 0, and {name} ({type(module).__name__}) has not."
                )
            replaced.append((module, partial(identity_rule, module.forward)))
        scaled += _shares(name, module, attention, gate, weight)
    handles = [module.register_forward_hook(partial(_scale_output, factor)) for module, factor in scaled]
    try:
        with replaced_forwards(replaced):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _scale_output(factor: Tensor | float, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    return scaled_gradient(output, factor)


def _shares(
    name: str, module: nn.Module, attention: float, gate: float, like: Tensor
) -> list[tuple[nn.Module, Tensor | float]]:
    """Modules whose output's gradient is to be scaled, and by what, so that every product shares its relevance out."""
    if type(module) is Attention and module.gate is None:
        shares, widths = (attention / 2, attention / 2, 1 - attention), (module.attn_dim,) * 3  # queries, keys, values
        return [(module.qkv, _columns(shares, widths, like))]
    if type(module) is ParallelScalingBlock:
        shares = (1.0, attention / 2, attention / 2, 1 - attention)
        return [(module.in_proj, _columns(shares, tuple(module.in_split), like))]
    if type(module) is AttentionPoolLatent:  # its query is a constant, so the keys take the whole share of the weights
        width = module.kv.out_features // 2
        return [(module.kv, _columns((attention, 1 - attention), (width, width), like))]
    if isinstance(module, GluMlp | SwiGLU):  # both factors first, then the gate relative to the other
        return [(module.drop1, 1 - gate), (module.act, gate / (1 - gate))]
    if name.rsplit(".")[-1] in ("attn", "mlp", "attn_pool") and not isinstance(module, Mlp):
        raise UnsupportedModel(f"relevance has no rule for {name} ({type(module).__name__}).")
    return []


def _columns(shares: tuple[float, ...], widths: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.cat([like.new_full((width,), share) for share, width in zip(shares, widths, strict=True)])


# --- deep-Taylor relevance, from a class down to the last blocks -----------------------------------------------------
# The rules of Chefer et al. 2021 (CVPR) for methods that read the relevance of attention. Here relevance is explicit.


def plain_relevance_blocks(model: VisionTransformer) -> list[Block]:
    """The blocks; UnsupportedModel unless the functions below have a rule for every step of blocks and head."""
    blocks = plain_blocks(model)
    for block in blocks:
        inner = (block.get_submodule("attn.norm"), block.get_submodule("mlp.norm"))
        gated = getattr(block.attn, "gate", None) is not None
        if (
            type(block.attn) is not Attention
            or type(block.mlp) is not Mlp
            or gated
            or any(type(module) is not nn.Identity for module in inner)
        ):
            raise UnsupportedModel(
                "this method has relevance rules for plain attention and two-layer MLPs, without gates or inner norms."
            )
    if model.global_pool not in ("token", "avg"):
        raise UnsupportedModel(f"this method has no relevance rule for a global_pool={model.global_pool!r} head.")
    return blocks


def ratio(relevance: Tensor, total: Tensor) -> Tensor:
    """relevance / total, stabilised, and 0 where the total is 0."""
    return torch.where(total == 0, 0, relevance / (total + 1e-9))


def linear_relevance(relevance: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Deep-Taylor rule for a linear layer: relevance (..., out) of the output to relevance (..., in) of x (..., in)."""
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)  # (out, in)
    x_positive, x_negative = x.clamp(min=0), x.clamp(max=0)
    total = x_positive @ positive.T + x_negative @ negative.T  # (..., out): sum of the positive terms
    share = ratio(relevance, total)
    return x_positive * (share @ positive) + x_negative * (share @ negative)


def product_relevance(relevance: Tensor, u: Tensor, v: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of the operands of ``product = u @ v``. Each operand claims all of it, so each is given one half."""
    share = ratio(relevance, product)
    return u * (share @ v.transpose(-2, -1)) / 2, v * (u.transpose(-2, -1) @ share) / 2


def enlarge(cells: int, size: int, shift: Tensor, like: Tensor) -> Tensor:
    """Matrices (n, size, cells) that enlarge a line of cells bilinearly and cut ``size`` pixels out at each shift (n,).

    A line of ``cells`` becomes (cells + 1) ceil(size / cells) pixels; beyond its ends the line is mirrored.
    """
    length = (cells + 1) * math.ceil(size / cells)
    pixel = (shift[:, None] + torch.arange(size)).double()  # (n, size)
    place = ((pixel + 0.5) * cells / length - 0.5).abs()  # in cells, mirrored at the first
    place = (cells - 1) - (cells - 1 - place).abs()  # ... and at the last
    weights = 1 - (place[..., None] - torch.arange(cells)).abs()  # of the two nearest cells
    return weights.clamp(min=0).to(like)


def random_masks(
    images: Tensor, count: int, cells: int, probability: float, generator: torch.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """RISE's random smooth masks for pictures (B, 3, H, W): from numbers of masks (n,) to masks (n, H, W) in [0, 1].

    A grid of ``cells`` by ``cells``, each open with ``probability``, is enlarged bilinearly to one cell more than the
    picture and cut out at a random shift. Only the grids are kept in memory. Source: Petsiuk et al. 2018, section 3.2.

    Args:
        generator: draws grids and shifts; None is a new one seeded 0.

    Raises:
        ValueError: a number out of range.
    """
    if count < 1 or cells < 2 or not 0 < probability < 1:
        raise ValueError("masks must be at least 1, cells at least 2, and probability between 0 and 1.")
    generator = generator or torch.Generator().manual_seed(0)
    height, width = images.shape[-2:]
    open_cells = (torch.rand(count, cells, cells, generator=generator) < probability).to(images)
    shift_y = torch.randint(math.ceil(height / cells), (count,), generator=generator)
    shift_x = torch.randint(math.ceil(width / cells), (count,), generator=generator)

    def mask(number: Tensor) -> Tensor:
        rows = enlarge(cells, height, shift_y[number], images)  # (n, H, cells)
        return rows @ open_cells[number] @ enlarge(cells, width, shift_x[number], images).transpose(1, 2)

    return mask


def sum_relevance(relevance: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance (B, ...) of the operands of ``u + v``, rescaled per picture so that the two sums add up to its sum."""
    share = ratio(relevance, u + v)
    of_u, of_v = u * share, v * share
    rest = tuple(range(1, relevance.ndim))
    total, sum_u, sum_v = (r.sum(rest, keepdim=True) for r in (relevance, of_u, of_v))
    scale = ratio(total, sum_u.abs() + sum_v.abs())
    return of_u * ratio(sum_u.abs(), sum_u) * scale, of_v * ratio(sum_v.abs(), sum_v) * scale


# What ``capture`` must record of every block for ``block_relevance``.
RELEVANCE_TENSORS = (
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


def block_relevance(
    block: nn.Module, layer: dict[str, Tensor], relevance: Tensor, last: bool = False
) -> tuple[Tensor, Tensor]:
    """Relevance of a block's attention (B, h, N, N) and of its input (B, N, D), from that of its output.

    The rules of Chefer, Gur, Wolf 2021 (CVPR) for the blocks of ``plain_relevance_blocks``. Norms, activations,
    softmax, layer scale and dropout pass relevance on unchanged.

    Args:
        layer: the block's ``RELEVANCE_TENSORS`` by name. last: leaves the input out.
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


def head_relevance(
    model: VisionTransformer,
    tokens: Tensor,
    target: Tensor,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_relevance,
) -> Tensor:
    """Relevance (B, N, D) of the last block's output when the target class holds relevance one."""
    one_hot = nn.functional.one_hot(target, model.num_classes).to(tokens.dtype)  # (B, classes)
    tokens = model.norm(tokens)
    relevance = torch.zeros_like(tokens)
    if hasattr(model, "dist_token"):  # the logit is the mean of two heads: one linear layer on both tokens
        weight = torch.cat([model.get_parameter("head.weight"), model.get_parameter("head_dist.weight")], 1) / 2
        relevance[:, :2] = linear(one_hot, tokens[:, :2].flatten(1), weight).unflatten(1, (2, -1))
    elif model.global_pool == "token":
        relevance[:, 0] = linear(one_hot, model.fc_norm(tokens[:, 0]), model.get_parameter("head.weight"))
    else:  # the mean over tokens passes relevance in proportion to each token's value
        start = 0 if model.pool_include_prefix else model.num_prefix_tokens
        pooled = linear(one_hot, model.fc_norm(tokens[:, start:].mean(1)), model.get_parameter("head.weight"))  # (B, D)
        read = tokens[:, start:]
        relevance[:, start:] = read * ratio(pooled, read.sum(1))[:, None]
    return relevance

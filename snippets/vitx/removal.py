"""What the model says when patches are hidden: along an order, one by one, in random sets, in groups.

Shapes: B pictures, P = gh * gw patches, C classes. Patches are counted row by row. ``masking`` says how patches are
hidden: "mean", "blur" and "zero" paint their pixels with the picture's mean colour, with the blurred picture, with the
zero of the normalised picture; "attention" masks their tokens in every block and in the pooling; "drop" leaves their
tokens out, so that the sequence is really shorter.
"""

import math
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from vitx.vit import embed, keep_tokens, logits_of_tokens, logits_of_visible, patches_to_pixels

MASKINGS = ("mean", "blur", "zero", "attention", "drop")
CHUNK = 64  # pictures in one forward pass
ROAD_SHARES = tuple(tenth / 10 for tenth in range(1, 10))
ROAD_NOISE = 0.01  # standard deviation of the imputed pixels' noise, as in the authors' code


class Curve(NamedTuple):
    """Patches hidden cumulatively in an order of each picture."""

    shares: Tensor  # (S + 1,) share of the patches that is hidden, ascending
    logits: Tensor  # (B, S + 1, C)


class Single(NamedTuple):
    """Every patch hidden alone."""

    logits: Tensor  # (B, P, C)


class Sets(NamedTuple):
    """Random sets of patches hidden, the same for every picture."""

    hidden: Tensor  # (K, P) bool, ordered by the number of hidden patches
    logits: Tensor  # (B, K, C)


class Groups(NamedTuple):
    """Exact Shapley values of groups of patches for the target's logit."""

    group: Tensor  # (P,) int64, 0 to G - 1
    values: Tensor  # (B, G)


class Parts(NamedTuple):
    """What each part of a creature is worth to the model."""

    inside: Tensor  # (B, parts, gh, gw) share of each patch that the part covers
    falls: Tensor  # (B, parts) fall of the target's logit when the part is painted out


class Mosaic(NamedTuple):
    """Four pictures in one, of which some show the class asked about."""

    relevance: Tensor  # (B, gh, gw)
    of_target: Tensor  # (B, gh, gw) bool


class Pair(NamedTuple):
    """Scenes of two creatures; the map is asked for the first."""

    relevance: Tensor  # (B, gh, gw)
    inside: Tensor  # (B, 2, gh, gw) share of each patch that the first and the second creature cover


class Bands(NamedTuple):
    """Patches cut by relevance rank into bands of nearly equal size, most relevant first, each hidden alone."""

    members: Tensor  # (B, K, P) bool
    logits: Tensor  # (B, K, C)


# --- hiding ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def hidden_logits(model: VisionTransformer, images: Tensor, hidden: Tensor, masking: str = "mean") -> Tensor:
    """Logits of every picture with sets of its patches hidden: (B, n, C), from exactly B n forward passes.

    Args:
        images: (B, 3, H, W), normalised. hidden: (B, n, P) or (1, n, P) bool, the same sets for all pictures.
            Dropping is quick where many sets hide the same number of patches.

    Raises:
        ValueError: an unknown masking. UnsupportedModel: see ``vit.logits_of_visible``.
    """
    if masking not in MASKINGS:
        raise ValueError(f"patches cannot be hidden by {masking!r}; there are {', '.join(MASKINGS)}.")
    visible = ~hidden.expand(len(images), -1, -1)  # (B, n, P)
    batch, sets = visible.shape[:2]
    picture = torch.arange(batch, device=images.device).repeat_interleave(sets)  # (B n,)
    visible = visible.flatten(0, 1)
    groups = [torch.arange(batch * sets, device=images.device)]
    size = CHUNK
    if masking == "drop":
        tokens, counts = embed(model, images), visible.sum(1)
        groups = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
    elif masking != "attention":
        fill = _fill(model, images, masking).expand(batch, -1, -1, -1)

    logits = []
    for group in groups:
        if masking == "drop":
            size = _rows_of(int(counts[group[0]]), visible.shape[1])
        for rows in group.split(size):
            which = picture[rows]
            if masking == "drop":
                kept = visible[rows].nonzero()[:, 1].view(len(rows), -1)
                logits.append(logits_of_tokens(model, keep_tokens(model, tokens[which], kept)))
            elif masking == "attention":
                logits.append(logits_of_visible(model, images[which], visible[rows]))
            else:
                shown = patches_to_pixels(model, images, visible[rows].to(images)).bool()
                logits.append(model(torch.where(shown, images[which], fill[which])))
    found = torch.cat(logits)[torch.cat(groups).argsort()]
    return found.unflatten(0, (batch, sets))


def _rows_of(count: int, patches: int) -> int:
    """Sequences in one pass: more of them where they are short."""
    return min(4 * CHUNK, CHUNK * patches // max(1, count))


def _fill(model: VisionTransformer, images: Tensor, masking: str) -> Tensor:
    """What is painted over hidden patches: (B, 3, H, W), or (B, 3, 1, 1) in one colour."""
    if masking == "zero":
        return torch.zeros_like(images[..., :1, :1])
    if masking == "mean":
        return images.mean((2, 3), keepdim=True)
    side = max(model.patch_embed.patch_size)
    return gaussian_blur(images, [4 * side + 1, 4 * side + 1], [float(side), float(side)])


# --- orders ----------------------------------------------------------------------------------------------------------


def ranking(relevance: Tensor) -> Tensor:
    """Patches (B, P) from most to least relevant; equal ones in the same shuffled order for every picture.

    Args:
        relevance: (B, gh, gw).
    """
    flat = relevance.flatten(1)
    shuffled = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    return shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]


def removal_curve(
    model: VisionTransformer,
    images: Tensor,
    order: Tensor,
    steps: int,
    masking: str,
    logits: Tensor,
    empty_logits: Tensor,
) -> Curve:
    """Hide patches cumulatively in the order of each picture, in ``steps`` steps of nearly equal size.

    Args:
        order: (B, P) patch indices, the first hidden first. logits, empty_logits: (B, C) with nothing and with all
            hidden, which do not depend on the order: steps - 1 forward passes for each picture are left.
    """
    patches = order.shape[1]
    counts = torch.linspace(0, patches, min(steps, patches) + 1).round().long().to(order.device)
    hidden = order.argsort(1)[:, None] < counts[1:-1, None]  # (B, S - 1, P)
    between = hidden_logits(model, images, hidden, masking)
    return Curve(counts / patches, torch.cat([logits[:, None], between, empty_logits[:, None]], 1))


def bands(model: VisionTransformer, images: Tensor, order: Tensor, count: int, masking: str) -> Bands:
    """Cut the order into ``count`` bands and hide each alone: count forward passes for each picture."""
    patches = order.shape[1]
    band = torch.arange(patches, device=order.device) * count // patches  # (P,) of the position
    members = band[order.argsort(1)][:, None] == torch.arange(count, device=order.device)[:, None]  # (B, K, P)
    return Bands(members, hidden_logits(model, images, members, masking))


# --- sets that no map chooses ----------------------------------------------------------------------------------------


def random_sets(patches: int, sizes: int, repeats: int, seed: int) -> Tensor:
    """Sets of patches (sizes * repeats, P) bool; the sizes are spread evenly between none and all, ascending."""
    counts = torch.linspace(0, patches, sizes + 2)[1:-1].round().long().repeat_interleave(repeats)
    draws = torch.rand(len(counts), patches, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1).argsort(1) < counts[:, None]


def single(model: VisionTransformer, images: Tensor, patches: int, masking: str) -> Single:
    """Every patch hidden alone: P forward passes for each picture."""
    return Single(hidden_logits(model, images, torch.eye(patches, dtype=torch.bool)[None].to(images.device), masking))


def shapley_groups(shape: tuple[int, int], side: int) -> Tensor:
    """Group (P,) of every patch when the grid is cut into side x side blocks of nearly equal size."""
    rows, columns = (torch.arange(n) * side // n for n in shape)
    return (rows[:, None] * side + columns).flatten()


def shapley(model: VisionTransformer, images: Tensor, target: Tensor, group: Tensor, masking: str) -> Groups:
    """Exact Shapley values of groups of patches for the target's logit: 2^G forward passes for each picture.

    The worth of a coalition is the logit with all other groups hidden (Shapley 1953, by the formula over coalitions).
    """
    players = int(group.max()) + 1
    member = (torch.arange(2**players)[:, None] >> torch.arange(players) & 1).bool()  # (2^G, G)
    hidden = ~member[:, group.cpu()]  # (2^G, P)
    logits = hidden_logits(model, images, hidden[None].to(images.device), masking)
    worth = logits.gather(2, target[:, None, None].expand(-1, len(hidden), 1))[..., 0].double()  # (B, 2^G)
    size = member.sum(1)
    weight = torch.tensor([1 / (players * math.comb(players - 1, k)) for k in range(players)], dtype=torch.float64)
    inner = torch.where(member, weight[(size - 1).clamp(min=0)][:, None], -weight[size.clamp(max=players - 1)][:, None])
    return Groups(group, (worth @ inner.to(worth)).to(logits.dtype))


# --- pictures that are changed otherwise -----------------------------------------------------------------------------


@torch.inference_mode()
def multiplied_logits(model: VisionTransformer, images: Tensor, relevance: Tensor) -> Tensor:
    """Logits (B, C) of the normalised pictures times their maps, scaled to 0 ... 1 and enlarged bilinearly.

    A constant map has no scale and shows nothing.
    """
    low, high = relevance.amin((1, 2), keepdim=True), relevance.amax((1, 2), keepdim=True)
    scaled = torch.where(high > low, (relevance - low) / torch.where(high > low, high - low, 1), 0)
    large = nn.functional.interpolate(scaled[:, None], images.shape[-2:], mode="bilinear", align_corners=False)
    return model(images * large.to(images))


@torch.inference_mode()
def imputed_curve(model: VisionTransformer, images: Tensor, order: Tensor, seed: int) -> Curve:
    """Fill the first tenth, two tenths ... of the order by noisy linear imputation (ROAD, Rong et al. 2022).

    Nine forward passes for each picture. The noise is drawn once and is the same for every picture and method.
    """
    patches = order.shape[1]
    shares = torch.tensor(ROAD_SHARES, device=order.device)
    counts = (shares * patches).round().long()
    hidden = order.argsort(1)[:, None] < counts[:, None]  # (B, 9, P)
    noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images)
    logits = []
    for step in range(len(shares)):
        known = patches_to_pixels(model, images, (~hidden[:, step]).to(images)).bool()  # (B, 1, H, W)
        filled = linear_imputation(images, known)
        logits.append(model(torch.where(known, images, filled + ROAD_NOISE * noise)))
    return Curve(shares, torch.stack(logits, 1))


def linear_imputation(images: Tensor, known: Tensor, tolerance: float = 1e-3, rounds: int = 1000) -> Tensor:
    """Fill unknown pixels so that each is the weighted mean of its eight neighbours, those beyond the border left out.

    Direct neighbours weigh 1/6, diagonal ones 1/12 (Rong et al. 2022, section 4). The equations are solved by
    conjugate gradients for all pictures at once, starting from the solution at half the size.

    Args:
        images: (B, C, H, W). known: (B, 1, H, W) bool, at least one pixel of each picture. tolerance: largest residual
            over the right-hand side, in Euclidean length.
    """

    def neighbours(x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (1, 1, 1, 1))
        along = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
        return (along[..., :-2, :] + 2 * along[..., 1:-1, :] + along[..., 2:, :] - 4 * x[..., 1:-1, 1:-1]) / 12

    total = neighbours(torch.ones_like(images[:1, :1]))  # less than 1 at the border
    unknown = (~known).to(images)  # (B, 1, H, W)
    right = neighbours(images * known) * unknown
    enough = tolerance**2 * right.square().sum((1, 2, 3), keepdim=True)
    x = _rough_imputation(images, known, tolerance, rounds) * unknown
    residual = right - (total * x - neighbours(x)) * unknown
    direction = residual
    power = residual.square().sum((1, 2, 3), keepdim=True)
    for _ in range(rounds):
        if bool((power <= enough).all()):
            break
        image = (total * direction - neighbours(direction)) * unknown
        step = power / (direction * image).sum((1, 2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x, residual = x + step * direction, residual - step * image
        before, power = power, residual.square().sum((1, 2, 3), keepdim=True)
        direction = residual + power / before.clamp(min=torch.finfo(x.dtype).tiny) * direction
    return torch.where(known, images, x)


def _rough_imputation(images: Tensor, known: Tensor, tolerance: float, rounds: int) -> Tensor:
    """The solution at half the size, enlarged; for small or odd sizes the mean of the known pixels."""
    height, width = images.shape[-2:]
    if height % 2 or width % 2 or min(height, width) < 16:
        return (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    share = nn.functional.avg_pool2d(known.to(images), 2)
    small = nn.functional.avg_pool2d(images * known, 2) / share.clamp(min=0.25)
    filled = linear_imputation(small, share > 0, tolerance, rounds)
    return nn.functional.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)


# --- what criteria read from a curve ---------------------------------------------------------------------------------


def target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """What (B, S, C) says of the class of each picture (B,): (B, S); log-probabilities serve as well."""
    return logits.take_along_dim(target[:, None, None], 2)[..., 0]


def target_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax probability (B, S), 0 to 1, of the class of each picture (B,), from logits (B, S, C)."""
    return target_logits(logits.softmax(2), target)


def area(shares: Tensor, values: Tensor) -> Tensor:
    """Area (B,) under curves through values (B, S) at ascending shares (S,), by the trapezoid rule."""
    return torch.trapezoid(values, shares.to(values))


def value_at(shares: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Values (B, n) between the steps of curves through values (B, S) at ascending shares (S,), linearly interpolated.

    Args:
        at: (n,) shares, greater than the first and at most the last.
    """
    right = torch.searchsorted(shares, at)  # (n,) first step that hides as much or more
    weight = (at - shares[right - 1]) / (shares[right] - shares[right - 1])
    return torch.lerp(values[:, right - 1], values[:, right], weight.to(values))


def first_class_area(curve: Curve, target: Tensor) -> Tensor:
    """Area (B,), 0 to 0.9, under "is the class still the first", read at 0, 0.1 ... 0.9 at the nearest step.

    Source: Chefer, Gur, Wolf 2021 (CVPR), section 4, perturbation tests.
    """
    tenths = torch.arange(10, device=target.device) / 10
    nearest = (curve.shares - tenths[:, None]).abs().argmin(1)  # (10,) steps of the curve
    stands = (curve.logits.argmax(2) == target[:, None]).to(curve.logits)  # (B, S + 1)
    return area(tenths, stands[:, nearest])

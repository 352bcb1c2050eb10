# %% [markdown]
# # Generic attention explainability, for a detector with encoder and decoder
#
# Why does a detector see this object, and where did it look? In a DETR the patches $i$ attend to each other in an encoder, a few
# object queries $q$ attend to each other and to the patches in a decoder, and each query says one class and one box. The method
# keeps $R^{ii}$ (patches on patches), $R^{qq}$ (queries on queries) and $R^{qi}$ (patches on queries), from attention $A$
# and the gradient of the logit $y_t$ of one query's class:
#
# $$\begin{aligned}
# \bar A &= \mathbb E_h\big[(\nabla A \odot A)^{+}\big],\quad R^{ii} = R^{qq} = I,\quad R^{qi} = 0\ \text{at the start} && (5)\\
# \text{encoder:}\quad R^{ii} &\leftarrow R^{ii} + \bar A^{ii} R^{ii} && (6)\\
# \text{decoder, among queries:}\quad R^{qq} &\leftarrow R^{qq} + \bar A^{qq} R^{qq},\qquad R^{qi} \leftarrow R^{qi} + \bar A^{qq} R^{qi} && (6, 7)\\
# \text{decoder, queries to patches:}\quad R^{qi} &\leftarrow R^{qi} + (\bar R^{qq})^\top \bar A^{qi}\, \bar R^{ii} && (10)
# \end{aligned}$$
#
# where $\bar R = \hat R / \sum_k \hat R_{\cdot k} + I$ with $\hat R = R - I$ gives what was gathered the weight of one (8, 9). The row
# of $R^{qi}$ that belongs to the query is the map. Catalogue entry: `generic-attention-detr`; the single-tower method is
# `generic-attention-explainability`. The same detector is explained by `d-rise` and `odam`.

# %%
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, capture, check, require_finite, stored, target_classes, to_grid


class Attend(nn.Module):
    """Multi-head attention that also returns its weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries (B, Q, D), keys and values (B, N, D): (B, Q, D), and weights (B, h, Q, N) that sum to one over N."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, Q or N, d)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        if torch.is_grad_enabled() and not weights.requires_grad:
            weights.requires_grad_()  # first layer, frozen model: nothing that these weights are made of has a gradient
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class DecoderLayer(nn.Module):
    """Queries compare notes, search the picture, and think: each step with a residual path and a norm behind it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.among, self.search = Attend(width, heads), Attend(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z and queries (B, Q, D), memory (B, P, D): the new z, and attention among queries and to patches."""
        told, among = self.among(z + queries, z + queries, z)  # among: (B, h, Q, Q)
        z = self.norm1(z + told)
        found, search = self.search(z + queries, memory, memory)  # search: (B, h, Q, P)
        z = self.norm2(z + found)
        return self.norm3(z + self.mlp(z)), among, search


class Memory(nn.Module):
    """What the queries search: the patch tokens, each with its place (rows * columns, width) in the picture."""

    def __init__(self, rows: int, columns: int, width: int, prefix: int):
        super().__init__()
        self.prefix = prefix
        self.places: Tensor
        self.register_buffer("places", sine_places(rows, columns, width), persistent=False)  # (P, D)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D) of the encoder's final tokens (B, N, D)."""
        return tokens[:, self.prefix :] + self.places


class Decoded(NamedTuple):
    """What the decoder makes of a picture, layer by layer; ``Detector.read`` turns a state into classes and boxes."""

    states: list[Tensor]  # (B, Q, D) behind each layer
    among: list[Tensor]  # (B, h, Q, Q) attention among the queries
    search: list[Tensor]  # (B, h, Q, P) attention of the queries to the patches


class Detections(NamedTuple):
    """What every query says."""

    probabilities: Tensor  # (B, Q, K + 1), the last one for "no object"
    boxes: Tensor  # (B, Q, 4): left, top, right, bottom in pixels


class Detector(nn.Module):
    """A DETR: a Vision Transformer as encoder, and a decoder whose object queries each say one class and one box.

    Args:
        encoder: its patch tokens after the final norm are searched; its own head is not used.
        classes: K. queries: Q, most objects in a picture. layers, heads: of the decoder.
    """

    def __init__(self, encoder: VisionTransformer, classes: int, queries: int = 6, layers: int = 3, heads: int = 4):
        super().__init__()
        width = encoder.embed_dim
        self.encoder, self.num_classes = encoder, classes
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes + 1)
        locate = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
        self.locate = nn.Sequential(*locate)
        rows, columns = encoder.patch_embed.grid_size
        self.memory = Memory(rows, columns, width, encoder.num_prefix_tokens)

    def decode(self, memory: Tensor) -> Decoded:
        """From what ``memory`` makes (B, P, D) of the encoder's final tokens."""
        queries = self.queries.expand(len(memory), -1, -1)
        z, decoded = torch.zeros_like(queries), Decoded([], [], [])
        for layer in self.layers:
            z, *attention = layer(z, queries, memory)
            for kept, new in zip(decoded, (z, *attention), strict=True):
                kept.append(new)
        return decoded

    def read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, K + 1), and boxes (B, Q, 4): middle x and y, width, height, as shares of the picture."""
        state = self.norm(state)
        return self.classify(state), self.locate(state).sigmoid()

    def pixels(self, boxes: Tensor) -> Tensor:
        """Boxes of ``read`` as left, top, right, bottom in pixels."""
        height, width = (side * size for side, size in zip(self._grid, self._patch, strict=True))
        middle, half = boxes[..., :2], boxes[..., 2:] / 2
        return torch.cat([middle - half, middle + half], -1) * boxes.new_tensor([width, height, width, height])

    def detect(self, images: Tensor) -> Detections:
        """Of normalised images (B, 3, H, W)."""
        logits, boxes = self.read(self.decode(self.memory(self.encoder.forward_features(images))).states[-1])
        return Detections(logits.softmax(-1), self.pixels(boxes))

    def ask(self, probabilities: Tensor, target: Tensor | None, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The detection to explain, for every picture: its query (B,) and its class (B,).

        Args:
            probabilities: (B, Q, K + 1). target: (B,) class indices: the query that is surest of the class; None takes the
                surest query of all, or of ``query``, and its class.
            query: (B,) indices of queries, where the query itself is asked for.

        Raises:
            ValueError: not one class or query for each picture, or none of that number.
        """
        classes = probabilities[..., :-1]  # (B, Q, K)
        if query is None:
            label = target_classes(classes.amax(1), target)
            return classes.gather(2, label[:, None, None].expand(-1, classes.shape[1], 1))[..., 0].argmax(1), label
        query = torch.as_tensor(query, device=classes.device)
        if query.shape != classes.shape[:1] or query.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"query must hold one index for each of the {len(classes)} pictures.")
        if ((query < 0) | (query >= classes.shape[1])).any():
            raise ValueError(f"there is no such query: the detector has queries 0 to {classes.shape[1] - 1}.")
        return query.long(), target_classes(classes[range(len(classes)), query.long()], target)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K): the logarithm of the probability of each class, at the query that is surest of it."""
        return self.detect(images).probabilities[..., :-1].amax(1).log()

    @property
    def _grid(self) -> tuple[int, int]:
        return self.encoder.patch_embed.grid_size

    @property
    def _patch(self) -> tuple[int, int]:
        return self.encoder.patch_embed.patch_size


def sine_places(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): where each patch lies, in waves; half of the channels for its row, half for its column."""
    frequency = math.pi * 8 ** torch.linspace(0, 1, width // 4)  # from half a wave to four waves over the picture
    waves = [((torch.arange(n) + 0.5) / n)[:, None] * frequency for n in (rows, columns)]
    y, x = (torch.cat([wave.sin(), wave.cos()], -1) for wave in waves)  # (n, D / 2)
    return torch.cat([y[:, None].expand(-1, columns, -1), x.expand(rows, -1, -1)], -1).flatten(0, 1)


class Explained(NamedTuple):
    """One detected object of each picture, and what speaks for it."""

    relevance: Tensor  # (B, gh, gw), at least 0
    query: Tensor  # (B,) which object query
    label: Tensor  # (B,) the class that is explained
    score: Tensor  # (B,) its probability
    box: Tensor  # (B, 4): left, top, right, bottom in pixels

    def heatmap(self) -> Tensor:
        """(B, gh, gw)."""
        return self.relevance


def explain(model: Any, images: Tensor, target: Tensor | None = None, *, query: Tensor | None = None) -> Explained:
    """Relevance of every patch for one detected object.

    Args:
        model: a ``Detector`` in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: (B,) class indices: the surest detection of that class is explained; None explains the surest of all.
        query: (B,) indices of object queries, to ask for a detection by its number.

    Returns:
        Explained; ``.heatmap()`` is the row of the query in R^qi.

    Raises:
        UnsupportedModel: the model is no detector.
        ValueError: see ``vitx.vit.check`` and ``Detector.ask``; also NaN in the weights.

    Source: Chefer, Gur, Wolf 2021 (ICCV), equations 5 to 11, as the authors' code computes them for DETR.
    """
    if not hasattr(model, "detect"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} is no detector with object queries: the method explains one detected object "
            "(the model detector-glyph)."
        )
    check(model.encoder, images)
    with torch.enable_grad(), capture(model.encoder, "attention") as record:
        decoded = model.decode(model.memory(model.encoder.forward_features(images)))
        logits, boxes = model.read(decoded.states[-1])
        require_finite(model, logits)
        probabilities = logits.detach().softmax(-1)
        asked, label = model.ask(probabilities, target, query)
        one = torch.arange(len(images), device=images.device)
        weights = [*record["attention"], *decoded.among, *decoded.search]
        gradients = torch.autograd.grad(logits[one, asked, label].sum(), weights)
    gathered = [(g * a.detach()).clamp(min=0).mean(1) for g, a in zip(gradients, weights, strict=True)]  # equation 5
    depth, layers = len(record["attention"]), len(decoded.among)
    R_qi = relevance(gathered[:depth], gathered[depth : depth + layers], gathered[depth + layers :])  # (B, Q, N)
    return Explained(
        relevance=to_grid(model.encoder, images, R_qi[one, asked, model.encoder.num_prefix_tokens :]),
        query=asked,
        label=label,
        score=probabilities[one, asked, label],
        box=model.pixels(boxes.detach())[one, asked],
    )


def relevance(encoder: Sequence[Tensor], among: Sequence[Tensor], search: Sequence[Tensor]) -> Tensor:
    """R^qi (B, Q, N) from the gathered attention of every layer, first layer first.

    Args:
        encoder: (B, N, N) each, prefix tokens first. among: (B, Q, Q) each. search: (B, Q, P) each, P the patches.
    """
    batch, tokens, _ = encoder[0].shape
    queries, prefix = among[0].shape[1], tokens - search[0].shape[2]
    R_ii = torch.eye(tokens).to(encoder[0]).expand(batch, -1, -1)
    for A_ii in encoder:
        R_ii = R_ii + A_ii @ R_ii  # equation 6
    R_qq = torch.eye(queries).to(encoder[0]).expand(batch, -1, -1)
    R_qi = encoder[0].new_zeros(batch, queries, tokens)
    for A_qq, A_qi in zip(among, search, strict=True):
        R_qi = R_qi + A_qq @ R_qi  # equation 7
        R_qq = R_qq + A_qq @ R_qq  # equation 6
        R_qi = R_qi + normalised(R_qq).mT @ A_qi @ normalised(R_ii)[:, prefix:]  # equation 10
    return R_qi


def normalised(R: Tensor) -> Tensor:
    """Equations 8 and 9: what was gathered on top of the identity, each row (B, n, n) scaled to sum to one, plus identity."""
    eye = torch.eye(R.shape[-1]).to(R)
    gathered = R - eye
    total = gathered.sum(-1, keepdim=True)
    return torch.where(total > 0, gathered / total, 0) + eye


def segment(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (B, H, W) bool of the patches whose relevance (B, gh, gw) exceeds Otsu's threshold, at ``size``.

    The threshold parts the 256 levels of each map, scaled from its smallest to its largest value, so that the variance between
    the two parts is largest (Otsu 1979). The authors make masks of objects in this way.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    levels = (255 * (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)).long()  # (B, gh, gw), cut off
    count = nn.functional.one_hot(levels.flatten(1), 256).sum(1).double()  # (B, 256)
    below = count.cumsum(1)  # patches up to each level
    mass = (count * torch.arange(256).to(count)).cumsum(1)
    above = below[:, -1:] - below
    apart = mass / below.clamp(min=1) - (mass[:, -1:] - mass) / above.clamp(min=1)
    threshold = (below * above * apart**2).argmax(1)  # (B,): the best level, the lowest of several
    inside = (levels > threshold[:, None, None]).to(maps)
    return nn.functional.interpolate(inside[:, None], size, mode="nearest")[:, 0] > 0


def load_pretrained(path) -> Detector:
    """The model in a safetensors file, in eval mode; its metadata names the arguments of encoder and decoder."""
    about, weights = stored(path)
    model = Detector(VisionTransformer(**about["encoder"], num_classes=0), **about["decoder"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The rules are the paper's, in the numbering of the authors' code; the full text could not be read. Equation 11 adds
#    $\bar A^{qi} R^{iq}$ to $R^{qq}$, which is zero here, since no patch attends to a query. Where nothing was gathered, the
#    normalisation divides zero by zero; this counts as zero, while the authors' code then drops the whole of equation 10 for that layer.
# 2. The detector is small. DETR has a ResNet-50, six encoder and six decoder layers with eight heads and 100 queries; here the model
#    `glyph` is backbone and encoder, and three decoder layers with four heads serve six queries. Places are added once to what the
#    queries search, in other waves than DETR's, which adds them to the keys alone and in the encoder too. "No object" weighs 0.2 in the loss,
#    0.1 in DETR.
# 3. The encoder has a class token, which the queries do not search: it takes part in $R^{ii}$ and is left out of the map.
# 4. `segment` cuts at Otsu's threshold on the grid of patches, as the authors' code does before COCO's evaluation enlarges the mask.
#    The masks are compared with the creatures' true ones, where the paper compares with segmentations of COCO.
#
# What the small model cannot show: many objects, objects of the same class, small ones. With one creature in a scene the encoder's
# attention alone outlines it (under an untrained decoder Otsu's mask fits no worse), so only scenes with two say whether the map
# belongs to the object asked about. The first layer's attention among queries mixes nothing, since their states start at zero, and
# yet receives relevance: this is the method's own doing.

# %%
if __name__ == "__main__":
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle
    from vitx import demo, glyphs, metrics, models, plot

    def frame(axes: Axes, box: Tensor, colour: str) -> None:
        left, top, right, bottom = box.tolist()
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.8))

    def count(model: Any, scenes: glyphs.Scenes) -> None:
        """Prints how well the maps of the creatures fit what is known of them."""
        images, share = glyphs.normalise(scenes.images), glyphs.patch_fraction(scenes.object_masks, (14, 14))
        rows = []
        for which in (0, 1):
            found = explain(model, images, scenes.labels[:, which])
            mask, true = segment(found.relevance, (glyphs.SIZE, glyphs.SIZE)), scenes.object_masks[:, which]
            own, other = (metrics.mass_inside(found.relevance, share[:, i]) for i in (which, 1 - which))
            iou = (mask & true).sum((1, 2)) / (mask | true).sum((1, 2))
            rows.append(torch.stack([own, other, metrics.pointing_game(found.relevance, share[:, which]), iou]))
        own, other, hit, iou = torch.cat(rows, 1).mean(1).tolist()
        print(
            f"{len(images)} scenes of two creatures: share of the map on the one asked about {own:.2f}, on the other {other:.2f}; "
            f"pointing game {hit:.2f}; overlap of Otsu's mask with the true one {iou:.2f}"
        )

    def show(model: Any, scenes: glyphs.Scenes) -> None:
        """Scenes of two creatures: true boxes in green, and for each creature its map, its detected box and its mask."""
        images, pictures = glyphs.normalise(scenes.images), scenes.images.permute(0, 2, 3, 1).numpy()
        rows = [[plot.Cell(picture, None, "true boxes")] for picture in pictures]
        boxes = []
        for label in scenes.labels.T:
            found = explain(model, images, label)
            mask = segment(found.relevance, (glyphs.SIZE, glyphs.SIZE)).float()
            for row, cells in enumerate(rows):
                title = (
                    f"{glyphs.CLASS_NAMES[label[row]]}, query {int(found.query[row])}: {float(found.score[row]):.2f}"
                )
                cells.append(plot.Cell(pictures[row], found.relevance[row], title))
                cells.append(plot.Cell(plot.hide(pictures[row], mask[row]), None, "Otsu's mask"))
            boxes.append(found.box)
        figure = plot.grid(rows, cell=2.1)
        for row in range(len(rows)):
            for which in (0, 1):
                frame(figure.axes[5 * row], scenes.boxes[row, which], "#009e73")
                frame(figure.axes[5 * row + 1 + 2 * which], boxes[which][row], "#e4002b")
        demo.show(figure, "generic-attention-detr")

    detector = models.load("detector-glyph").model
    count(detector, glyphs.scenes(100, 31, creatures=2))
    show(detector, glyphs.scenes(3, 7, creatures=2))

# %% [markdown]
# # VL-InterpreT: what each head does with words and patches
#
# In a transformer over words and patches together, every attention matrix has four parts: words that see words, words that
# see patches, patches that see words, patches that see patches. VL-InterpreT tracks their size in every layer and head, to
# find the heads in which the modalities meet. With $A^{l,m}$ the attention of head $m$ in layer $l$, rows the queries,
# $t$ the words of the text and $i$ the patches, both without the tokens before and behind the text,
#
# $$\underset{\text{image-to-text}}{\frac1{|t||i|}\sum_{t,i} A^{l,m}_{ti}},\qquad
# \underset{\text{text-to-image}}{\frac1{|i||t|}\sum_{i,t} A^{l,m}_{it}},\qquad
# \underset{\text{text-to-text}}{\frac1{|t|^2}\sum_{t,t'} A^{l,m}_{tt'}},\qquad
# \underset{\text{image-to-image}}{\frac1{|i|^2}\sum_{i,i'} A^{l,m}_{ii'}}.$$
#
# The names follow what is carried: image-to-text is what the words take from the picture. For comparison each is
# standardised over the layers, and cross-modal and intra-modal attention are the means of two of them, standardised again. Of a
# head that stands out one then looks at the attention of single words, as a map on the picture, and at the hidden states
# of words and patches from layer to layer. Catalogue entry: `vl-interpret`.

# %%
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vitx.vit import UnsupportedModel, caption_tokens, capture, require_finite, to_grid

COMPONENTS = (
    "image-to-text",
    "text-to-image",
    "image-to-image",
    "image-to-image without itself",
    "text-to-text",
)
SUMMARIES = (*COMPONENTS, "cross-modal", "intra-modal")


class HeadStatistics(NamedTuple):
    """Attention within and across the modalities in every layer and head, and one head in detail."""

    means: Tensor  # (B, 5, L, h): the mean weight of each of COMPONENTS
    image: Tensor  # (B, gh, gw): attention of the words, or of one, to the patches in the chosen head
    text: Tensor  # (B, words): attention of the patches to each word there, mean over patches; 0 behind a shorter text
    words: tuple[tuple[str, ...], ...]  # B texts
    chosen: Tensor  # (B, 2) int64: layer and head
    states: Tensor  # (B, 1 + L, N, D): tokens before the first layer and after each one; the text's tokens first

    def heatmap(self) -> Tensor:
        """(B, gh, gw): attention of the words to the patches in the chosen head."""
        return self.image

    def standardised(self) -> Tensor:
        """(B, 7, L, h): SUMMARIES, each with mean 0 and deviation 1 over the layers of every head."""
        z = standard(self.means)
        cross, intra = standard(z[:, :2].mean(1)), standard(z[:, [2, 4]].mean(1))
        return torch.cat([z, cross[:, None], intra[:, None]], 1)


def explain(
    model: Any,
    images: Tensor,
    target: list[str] | Tensor | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    word: int | None = None,
) -> HeadStatistics:
    """Mean attention between words and patches in every head, hidden states, and the attention of one head.

    Args:
        model: answers questions by one attention over words and patches, such as ``vqa-merged-glyph``.
        images: (B, 3, H, W), normalised.
        target: B questions; or their token ids (B, L); or (B,) class indices or None: the question for the name.
        layer, head: what ``image`` and ``text`` show; None is the one, or the one there, with most image-to-text attention.
        word: position of the word whose attention ``image`` shows, 0 the first; None is the mean over the words.

    Returns:
        HeadStatistics.

    Raises:
        UnsupportedModel: the model reads no text, or keeps words and patches in attentions of their own.
        ValueError: see ``vitx.vit.check``; a word that the model does not know, not one question for each picture, no such
            layer, head or word.

    Source: Aflalo et al. 2022; authors' code, app/database/db_analyzer.py: VliDataBaseAnalyzer.get_all_attn_stats.
    """
    if any(kind != "merged" for kind in getattr(model, "fusion", ("none",))):
        raise UnsupportedModel(
            f"{type(model).__name__} has no layers in which words and patches share one attention, whose parts this method "
            "compares (the model vqa-merged-glyph has)."
        )
    tokens = caption_tokens(model, images, target)  # (B, L)
    with torch.no_grad(), capture(model, "attention", "block_input", "block_output") as record:
        require_finite(model, model.answer(images, tokens))
    A = torch.stack(record["attention"], 1)  # (B, L, h, N, N)
    states = torch.stack([record["block_input"][0], *record["block_output"]], 1)  # (B, 1 + L, N, D)

    end = (tokens == model.text.vocabulary.index("<end>")).int().argmax(1)  # (B,)
    length, (depth, heads) = tokens.shape[1], A.shape[1:3]
    place = torch.arange(A.shape[-1], device=A.device)  # (N,)
    is_patch = (place >= length).to(A).expand(len(A), -1)  # (B, N)
    is_word = ((place > 0) & (place < end[:, None])).to(A)  # (B, N): not the tokens before and behind the text
    means = torch.stack(
        [
            part(A, is_word, is_patch),
            part(A, is_patch, is_word),
            part(A, is_patch, is_patch),
            part(A, is_patch, is_patch, itself=False),
            part(A, is_word, is_word),
        ],
        1,
    )  # (B, 5, L, h)

    for name, index, size in (("layer", layer, depth), ("head", head, heads)):
        if index is not None and not -size <= index < size:
            raise ValueError(f"{name} {index} is out of range: the model has {size}.")
    if word is not None and not 0 <= word < int(end.min()) - 1:
        raise ValueError(f"word {word} is out of range: the shortest question has {int(end.min()) - 1} words.")
    allowed = torch.zeros(depth, heads, device=A.device)
    allowed[slice(None) if layer is None else layer, slice(None) if head is None else head] = 1
    strongest = means[:, 0].masked_fill(allowed == 0, -1).flatten(1).argmax(1)  # (B,)
    chosen = torch.stack([strongest // heads, strongest % heads], 1)  # (B, 2)
    one = A[torch.arange(len(A)), chosen[:, 0], chosen[:, 1]]  # (B, N, N)
    of = is_word / is_word.sum(1, keepdim=True) if word is None else (place == 1 + word).to(A).expand(len(A), -1)
    return HeadStatistics(
        means,
        to_grid(model.image, images, (of[:, None] @ one)[:, 0, length:]),
        ((is_patch[:, None] @ one)[:, 0] / is_patch.sum(1, keepdim=True) * is_word)[:, 1 : length - 1],
        tuple(
            tuple(model.text.vocabulary[token] for token in row[1:stop])
            for row, stop in zip(tokens.tolist(), end.tolist(), strict=True)
        ),
        chosen,
        states,
    )


def part(A: Tensor, queries: Tensor, keys: Tensor, itself: bool = True) -> Tensor:
    """(B, L, h): mean of A (B, L, h, N, N) over the pairs of the marked queries and keys, (B, N) each."""
    pairs = queries[:, :, None] * keys[:, None]  # (B, N, N)
    if not itself:
        pairs = pairs * (1 - torch.eye(A.shape[-1]).to(A))
    return torch.einsum("blhqk,bqk->blh", A, pairs) / pairs.sum((1, 2))[:, None, None]


def standard(values: Tensor) -> Tensor:
    """Values (..., L, h) with mean 0 and deviation 1 over the layers; all zero where they do not differ."""
    centred = values - values.mean(-2, keepdim=True)
    deviation = centred.square().mean(-2, keepdim=True).sqrt()
    return centred / deviation.clamp(min=torch.finfo(values.dtype).tiny)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Written from the authors' code and the abstract; the full text could not be read. The paper explains KD-VLP, twelve layers
#    over words and a grid of picture features; here four layers follow a Vision Transformer, and only they are tracked.
# 2. The authors' code takes the tokens before and behind the text out of the matrix, but cuts it into its parts at the place
#    that the text ended before, so that as many patches count as words. Here they do not.
# 3. Its image-to-image attention without itself also leaves out each patch's neighbours in reading order, and divides by the
#    number of all pairs; here it is the mean over the pairs of different patches. Its intra-modal summary is the mean of
#    image-to-image attention with and without itself; here, as the name says, of image-to-image and text-to-text.
# 4. Standardising over the layers of each head, rather than over all heads, is that of the code.
# 5. The tool is a web page on which one picks words, heads and layers. Here they are arguments, and the hidden states, which the
#    tool draws by t-SNE, are returned as they are; the picture below shows their first two principal components.
#
# Means hide what single tokens do, and a weight of attention is no measure of what changes the answer; the tool shows where
# to look, and claims no more. A model in which words and patches have attentions of their own has nothing to compare: each
# row sums to one within its part.
#
# What the small model cannot show: its questions have at most nine words, in a dozen forms, and with four layers a value
# standardised over layers can hardly exceed 1.7.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """A question about a scene of two creatures: every head's four parts, what its words see, and hidden states."""
        model: Any = models.load("vqa-merged-glyph").model
        scene = glyphs.scenes(1, seed, creatures=2)
        picture, images = scene.images[0].permute(1, 2, 0).numpy(), glyphs.normalise(scene.images)
        left = int(scene.parameters.centres[0, :, 0].argmin())
        question = "which crest does the left creature have"
        found = explain(model, images, [question])
        words, depth, heads = question.split(), *found.means.shape[2:]
        inside = glyphs.patch_fraction(scene.part_masks[0, left, glyphs.PARTS.index("crest")], (14, 14)) > 0
        chance = float(inside.float().mean())

        figure = Figure(figsize=(11, 7.4), layout="constrained")
        axes = figure.subplots(3, 5)
        uniform = 1 / found.states.shape[2]
        for place, row in zip(axes[0], (0, 1, 2, 4), strict=False):
            grid(place, found.means[0, row] / uniform, f"{COMPONENTS[row]}\n(1: attention everywhere alike)")
        # A measure of one's own, as the tool allows: does the word "crest" see the crest that is asked about?
        on = torch.zeros(depth, heads)
        for layer in range(depth):
            for head in range(heads):
                seen = explain(model, images, [question], layer=layer, head=head, word=words.index("crest")).image[0]
                on[layer, head] = (seen * inside).sum() / seen.sum() / chance
        grid(axes[0, 4], on, '"crest" on the left crest\n(1: as much as any patch)')
        best = divmod(int(on.argmax()), heads)
        plot.overlay(axes[1, 0], picture, None, f"{question}?")
        plot.overlay(axes[1, 1], picture, inside.float(), "truth: the left crest")
        layer, head = found.chosen[0].tolist()
        plot.overlay(
            axes[1, 2], picture, found.image[0], f"words, layer {layer + 1} head {head + 1}\nmost image-to-text"
        )
        detail = explain(model, images, [question], layer=best[0], head=best[1], word=words.index("crest"))
        plot.overlay(axes[1, 3], picture, detail.image[0], f'"crest", layer {best[0] + 1} head {best[1] + 1}')
        axes[1, 4].barh([f"{k + 1} {word}" for k, word in enumerate(words)], found.text[0].tolist(), color="#b5512f")
        axes[1, 4].invert_yaxis()
        axes[1, 4].tick_params(labelsize=7, length=0)
        axes[1, 4].set_title(f"patches to words, layer {layer + 1} head {head + 1}", fontsize=8)
        for step, place in enumerate(axes[2]):
            states = found.states[0, step] - found.states[0, step].mean(0)
            flat = states @ torch.linalg.svd(states, full_matrices=False).Vh[:2].T  # (N, 2)
            text, patches = flat[: len(words) + 2], flat[len(words) + 2 :]
            asked = patches[inside.flatten()]
            place.scatter(*patches.T.tolist(), s=4, color="#9db4c8", label="patches")
            place.scatter(*asked.T.tolist(), s=9, color="#0072b2", label="on the left crest")
            place.scatter(*text.T.tolist(), s=12, color="#b5512f", label="words")
            place.set_title("hidden states, before" if step == 0 else f"after layer {step}", fontsize=8)
            place.set_xticks([])
            place.set_yticks([])
        axes[2, 0].legend(fontsize=6, loc="best")
        print(f"{question}? {model.answers[int(model.answer(images, model.text.tokenize([question])).argmax())]}")
        for name, values in zip(COMPONENTS, found.means[0] / uniform, strict=True):
            print(f"{name}: {float(values.mean()):.2f} of uniform attention, {float(values.max()):.2f} in one head")
        print(
            f'"crest" on the left crest: {float(on.max()):.1f} times chance in one head, {float(on.mean()):.1f} in all'
        )
        demo.show(figure, "vl-interpret")

    def grid(place: Any, values: Tensor, title: str) -> None:
        """Values (layers, heads) as a coloured table."""
        place.imshow(values, cmap="plasma", vmin=0)
        for layer, row in enumerate(values.tolist()):
            for head, value in enumerate(row):
                light = value > 0.6 * float(values.max())
                place.text(
                    head, layer, f"{value:.2g}", ha="center", va="center", fontsize=7, color="k" if light else "w"
                )
        place.set_title(title, fontsize=8)
        place.set_xlabel("head", fontsize=7)
        place.set_ylabel("layer", fontsize=7)
        place.set_xticks(range(values.shape[1]), [str(k + 1) for k in range(values.shape[1])], fontsize=7)
        place.set_yticks(range(values.shape[0]), [str(k + 1) for k in range(values.shape[0])], fontsize=7)

    show(seed=7)

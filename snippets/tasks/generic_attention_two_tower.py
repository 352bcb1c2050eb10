# %% [markdown]
# # Generic attention explainability, for a two-tower image-text model
#
# Which patches and which words make a picture and a caption similar? Both towers are transformers, and their only meeting
# point is the similarity $y = s \cdot \langle z_\text{image}, z_\text{text}\rangle$ of two unit vectors. Each tower keeps a relevance map $R$ of
# its tokens, which starts as the identity and gains, layer by layer, the attention whose gradient raises $y$:
#
# $$\bar A = \mathbb E_h\big[(\nabla A \odot A)^{+}\big],\quad \nabla A = \frac{\partial y}{\partial A},\qquad
# R^{ii} \leftarrow R^{ii} + \bar A^{ii} R^{ii},\qquad R^{tt} \leftarrow R^{tt} + \bar A^{tt} R^{tt}.$$
#
# The class token's row of $R^{ii}$ is the picture's map, the end token's row of $R^{tt}$ the words' relevance. No attention
# runs between the towers, so the cross-modal maps $R^{it}$ and $R^{ti}$ of the bi-modal method stay zero.
# Catalogue entry: `generic-attention-two-tower`; the single-tower method is `generic-attention-explainability`.

# %%
import difflib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from vitx.vit import caption_tokens, capture, require_finite, stored, to_grid

START, END = 0, 1  # token ids; END also fills up shorter captions


class TextTower(nn.Module):
    """A causal transformer over a closed vocabulary, read at the end token, as in CLIP.

    Args:
        words: the vocabulary; token 2 + i is words[i].
        length: most tokens that a caption may have, start and end included.
    """

    def __init__(self, words: tuple[str, ...], length: int, width: int, depth: int, heads: int, outputs: int):
        super().__init__()
        self.vocabulary = ("<start>", "<end>", *words)
        self.embed = nn.Embedding(len(self.vocabulary), width)
        self.pos_embed = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=2, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.embed.weight, std=0.02)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Token ids (B, L), L that of the longest caption. ValueError for an unknown word, naming the nearest."""
        rows = []
        for caption in captions:
            words = caption.split()
            for word in words:
                if word not in self.vocabulary[2:]:
                    near = difflib.get_close_matches(word, self.vocabulary[2:], n=3, cutoff=0.5)
                    hint = f"; nearest: {', '.join(near)}" if near else ""
                    raise ValueError(f"the text tower does not know the word {word!r}{hint}.")
            rows.append([START, *(self.vocabulary.index(word, 2) for word in words), END])
        longest = max(map(len, rows))
        return torch.tensor([row + [END] * (longest - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, outputs) of token ids (B, L)."""
        length = tokens.shape[1]
        x = self.embed(tokens) + self.pos_embed[:length]  # (B, L, D)
        ahead = torch.full((length, length), -torch.inf).to(x).triu(1)  # (L, L): no word sees later ones
        for block in self.blocks:
            x = block(x, attn_mask=ahead)
        return self.head(self.norm(x)[torch.arange(len(x)), end_positions(tokens)])


def end_positions(tokens: Tensor) -> Tensor:
    """(B,) position of the first end token of each caption (B, L)."""
    return (tokens == END).int().argmax(1)


class TwoTower(nn.Module):
    """An image tower and a text tower, as in CLIP: similar vectors for a picture and a caption that describes it.

    Args:
        image: a timm VisionTransformer with class token; its head projects to E channels.
        text: a TextTower with E outputs.
        class_captions: one caption for each class, so that the model also classifies.
    """

    def __init__(self, image: VisionTransformer, text: TextTower, class_captions: tuple[str, ...]):
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.class_tokens: Tensor
        self.register_buffer("class_tokens", text.tokenize(list(class_captions)), persistent=False)  # (classes, L)

    def compare(self, pictures: Tensor, captions: Tensor) -> Tensor:
        """(B, captions): scaled cosine of the towers' vectors, (B, E) and (captions, E)."""
        normalize = nn.functional.normalize
        return self.log_scale.exp() * normalize(pictures, dim=-1) @ normalize(captions, dim=-1).T

    def similarity(self, images: Tensor, tokens: Tensor) -> Tensor:
        """(B, captions) of every picture (B, 3, H, W) and every caption (captions, L)."""
        return self.compare(self.image(images), self.text(tokens))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes): the similarity of each picture to each class's caption."""
        return self.similarity(images, self.class_tokens)


class Bimodal(NamedTuple):
    """Relevance of patches and of words for the similarity of each picture and its caption."""

    image: Tensor  # (B, gh, gw), at least 0
    text: Tensor  # (B, L), at least 0: a value for each word; 0 beyond the end of a shorter caption
    words: tuple[tuple[str, ...], ...]  # B captions
    similarity: Tensor  # (B,): what is explained

    def heatmap(self) -> Tensor:
        """(B, gh, gw): the map of the picture."""
        return self.image


def explain(
    model: TwoTower, images: Tensor, target: list[str] | Tensor | None = None, *, start_layer: int = 0
) -> Bimodal:
    """Relevance of every patch and every word for the similarity of each picture to its caption.

    Args:
        model: a TwoTower in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: B captions; or their token ids (B, L); or (B,) class indices, which stand for the classes' captions; None
            explains the most similar of the classes' captions.
        start_layer: first layer of either tower that counts; -1 counts the last one alone, as the official CLIP notebook does.

    Returns:
        Bimodal.

    Raises:
        UnsupportedModel: the model has no two towers.
        ValueError: see ``vitx.vit.check``; a word that the text tower does not know, a caption too long, not one caption
            for each picture.

    Source: Chefer, Gur, Wolf 2021 (ICCV), equations 5 and 6 for both modalities.
    """
    tokens = caption_tokens(model, images, target)  # (B, L)
    with torch.enable_grad(), capture(model.image, "attention") as image, capture(model.text, "attention") as text:
        similarity = model.similarity(images, tokens).diagonal()  # (B,): each picture with its own caption
        require_finite(model, similarity)
        weights = [*image["attention"], *text["attention"]]
        gradients = torch.autograd.grad(similarity.sum(), weights)
    depth = len(image["attention"])
    patches = relevance(weights[:depth][start_layer:], gradients[:depth][start_layer:])  # (B, N, N)
    words = relevance(weights[depth:][start_layer:], gradients[depth:][start_layer:])  # (B, L, L)
    end = end_positions(tokens)  # (B,)
    words = words[torch.arange(len(words)), end, 1:-1]  # (B, words): the end token's row, without start and last end
    is_word = torch.arange(words.shape[1]).to(end) < end[:, None] - 1
    return Bimodal(
        image=to_grid(model.image, images, patches[:, 0, model.image.num_prefix_tokens :]),
        text=words * is_word,
        words=tuple(
            tuple(model.text.vocabulary[token] for token in row[1:stop])
            for row, stop in zip(tokens.tolist(), end.tolist(), strict=True)
        ),
        similarity=similarity.detach(),
    )


def relevance(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """R (B, N, N) of one tower from the attention of its layers (B, h, N, N), first layer first, and its gradients."""
    size = attention[0].shape[-1]
    R = torch.eye(size).to(attention[0]).expand(len(attention[0]), size, size)
    for A, gradient in zip(attention, gradients, strict=True):
        A_bar = (gradient * A.detach()).clamp(min=0).mean(1)  # (B, N, N), equation 5
        R = R + A_bar @ R  # equation 6
    return R


def load_pretrained(path) -> TwoTower:
    """The model in a safetensors file, in eval mode: its metadata holds the towers' arguments and the class captions."""

    metadata, weights = stored(path)
    image, text = VisionTransformer(**metadata["image"]), TextTower(**metadata["text"])
    model = TwoTower(image, text, tuple(metadata["class_captions"]))
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. All layers of both towers count, as in equations 5 and 6. The official CLIP notebook counts the last layer of each tower
#    alone: `start_layer=-1`.
# 2. Relevance of the start and the end token is left out, as in the notebook; the words are not rescaled to sum to one.
# 3. $y$ is the similarity of each picture with its own caption, scaled as the model was trained, where the paper has a class
#    logit. Scaling $y$ scales $\nabla A$ and hence the share of the identity in $R$.
#
# What the small model cannot show: it knows 21 words and one form of sentence, so there is no grammar, synonym or unseen word
# to explain; its text tower never needs to read word order, and the relevance of a filler word says little about real captions.
# With two creatures in the picture it finds the one that is named, but its best caption out of all 243 often mixes the two
# (the numbers are on its model card), and a word can be relevant that fits both.

# %%
if __name__ == "__main__":
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def write(axes: Axes, words: tuple[str, ...], values: Tensor, largest: float) -> None:
        """The words of a caption, each on a ground as strong as its relevance."""
        axes.axis("off")
        x, y = 0, 0
        for word, value in zip(words, values.tolist(), strict=False):
            if x + len(word) > 34:
                x, y = 0, y + 1
            ground = {"facecolor": "#e8743b", "alpha": 0.9 * value / largest, "edgecolor": "none", "pad": 2.5}
            axes.text(x, -y, word, family="monospace", fontsize=9, bbox=ground)
            x += len(word) + 1
        axes.set_xlim(0, 35)
        axes.set_ylim(-3.6, 1)

    def show(seed: int) -> None:
        """One scene of two creatures under three captions: of the first, of the second, and of the first with a wrong tail."""
        scene = glyphs.scenes(1, seed, creatures=2)
        picture = scene.images[0].permute(1, 2, 0).numpy()
        both = [
            scene._replace(parameters=scene.parameters._replace(variants=v[None, None]))
            for v in scene.parameters.variants[0]
        ]
        captions = [glyphs.captions(one)[0] for one in both]
        tails = glyphs.VARIANTS["tail"]
        tail = captions[0].split()[-2]
        captions.append(captions[0].replace(tail, tails[tails.index(tail) - 1]))
        images = glyphs.normalise(scene.images).expand(3, -1, -1, -1)
        found = explain(models.load("two-tower-glyph").model, images, captions)  # pyright: ignore[reportArgumentType]
        largest = float(found.text.max())
        figure = Figure(figsize=(11.5, 3.9), layout="constrained")
        axes = figure.subplots(2, 4, height_ratios=[3, 1])
        plot.overlay(axes[0, 0], picture, None, "the picture")
        axes[1, 0].axis("off")
        for column, name in enumerate(("first creature", "second creature", "first creature, wrong tail"), 1):
            title = f"{name}: similarity {float(found.similarity[column - 1]):.1f}"
            plot.overlay(axes[0, column], picture, found.image[column - 1], title)
            write(axes[1, column], found.words[column - 1], found.text[column - 1], largest)
        demo.show(figure, "generic-attention-two-tower")

    show(seed=7)

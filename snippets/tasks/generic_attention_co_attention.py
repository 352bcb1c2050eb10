# %% [markdown]
# # Generic attention explainability, for co-attention
#
# Which patches and which words led to this answer? A picture has tokens $i$, its question tokens $t$, and the answer's logit
# $y$ is read from the question's first token. Four relevance maps say how much each token holds of each other one:
# $R^{tt} = I$, $R^{ii} = I$, $R^{ti} = 0$, $R^{it} = 0$ at the start. Every layer adds the attention whose gradient raises $y$,
#
# $$\bar A = \mathbb E_h\big[(\nabla A \odot A)^{+}\big],\qquad \nabla A = \frac{\partial y}{\partial A}. \qquad (5)$$
#
# A layer of **self-attention** of one modality $s$ mixes what its tokens hold of themselves and of the other modality $q$:
#
# $$R^{ss} \leftarrow R^{ss} + \bar A\,R^{ss}, \qquad R^{sq} \leftarrow R^{sq} + \bar A\,R^{sq}. \qquad (6, 7)$$
#
# A layer of **co-attention**, in which the queries are of $s$ and the keys of $q$, carries over what has been gathered in
# either. The gathered part counts as much as the token itself, so each row of $R - I$ is scaled to sum to one:
#
# $$\hat R^{xx} = R^{xx} - I,\qquad \bar R^{xx}_{m} = \hat R^{xx}_{m} \Big/ \sum_n \hat R^{xx}_{mn} + I_m, \qquad (8, 9)$$
#
# $$R^{sq} \leftarrow R^{sq} + (\bar R^{ss})^{\top} \bar A\,\bar R^{qq}, \qquad
# R^{ss} \leftarrow R^{ss} + \bar A\,R^{qs}. \qquad (10, 11)$$
#
# The first token's row of $R^{ti}$ is the picture's map, its row of $R^{tt}$ the words' relevance. Catalogue entry:
# `generic-attention-co-attention`. The rules for one modality are `generic-attention-explainability`, and
# `generic-attention-two-tower` applies them where no attention runs between picture and text.

# %%
import difflib
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from vitx.vit import UnsupportedModel, caption_tokens, capture, require_finite, stored, target_classes, to_grid

PAD, ASK, END = 0, 1, 2  # token ids: behind a shorter question, before every question, and after it


class Question(nn.Module):
    """A transformer over the words of a question, from a closed vocabulary.

    Args:
        words: the vocabulary; token 3 + i is words[i].
        length: most tokens of a question, with the one before and the one after it.
    """

    def __init__(self, words: tuple[str, ...], length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.vocabulary = ("<pad>", "<ask>", "<end>", *words)
        self.embed = nn.Embedding(len(self.vocabulary), width)
        self.pos_embed = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=2, qkv_bias=True) for _ in range(depth))
        nn.init.normal_(self.embed.weight, std=0.5)

    def tokenize(self, questions: list[str]) -> Tensor:
        """Token ids (B, L), L that of the longest question. ValueError for an unknown word, naming the nearest."""
        numbers = {word: token for token, word in enumerate(self.vocabulary)}
        rows = []
        for question in questions:
            words = question.lower().removesuffix("?").split()
            for word in words:
                if word not in self.vocabulary[3:]:
                    near = difflib.get_close_matches(word, self.vocabulary[3:], n=3, cutoff=0.5)
                    hint = f"; nearest: {', '.join(near)}" if near else ""
                    raise ValueError(f"the model does not know the word {word!r}{hint}.")
            rows.append([ASK, *(numbers[word] for word in words), END])
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) of token ids (B, L)."""
        x = self.embed(tokens) + self.pos_embed[: tokens.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x, attn_mask=(tokens != PAD)[:, None, None])
        return x


class QuestionAnswering(nn.Module):
    """Answers questions about a picture: patch tokens and words meet in layers of attention.

    Args:
        image: a timm VisionTransformer with class token; its patch tokens are read, its head is not.
        text: a Question as wide as the picture's tokens.
        answers: all that can be answered; the first ``classes`` are the names of the picture's classes.
        fusion: the kind of attention in each layer over words and patches together: "cross" lets words see the patches only
            and patches the words only, as in a co-attention layer; "self" lets each see its own kind; "merged" all of it.
        question: what ``forward`` asks, to classify.
    """

    def __init__(
        self,
        image: VisionTransformer,
        text: Question,
        answers: tuple[str, ...],
        classes: int,
        fusion: tuple[str, ...],
        question: str,
    ):
        super().__init__()
        width, heads = image.embed_dim, image.blocks[0].get_submodule("attn").num_heads
        self.image, self.text, self.answers, self.classes, self.fusion = image, text, answers, classes, fusion
        self.place = nn.Parameter(torch.randn(image.patch_embed.num_patches, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=2, qkv_bias=True) for _ in fusion)  # type: ignore
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(answers))
        self.class_tokens: Tensor  # (classes, L): the same question for every class
        self.register_buffer("class_tokens", text.tokenize([question] * classes), persistent=False)

    def visible(self, tokens: Tensor, patches: int) -> dict[str, Tensor]:
        """Which token sees which in each kind of layer, (B, 1, N, N) bool, N = L words and patches."""
        length = tokens.shape[1]
        of_text = torch.arange(length + patches, device=tokens.device) < length  # (N,)
        same = of_text[:, None] == of_text
        real = nn.functional.pad(tokens != PAD, (0, patches), value=True)[:, None, None]  # (B, 1, 1, N)
        return {"self": real & same, "cross": real & ~same, "merged": real & torch.ones_like(same)}

    def fuse(self, patches: Tensor, tokens: Tensor, place: Tensor | None = None) -> Tensor:
        """Logits (B, answers) of patch tokens (B, P, D) and questions (B, L); ``place`` (B, P, D) for a part of the grid."""
        x = torch.cat([self.text(tokens), patches + (self.place if place is None else place)], 1)  # (B, N, D)
        visible = self.visible(tokens, patches.shape[1])
        for kind, block in zip(self.fusion, self.blocks, strict=True):
            x = block(x, attn_mask=visible[kind])
        return self.head(self.norm(x[:, 0]))

    def answer(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, answers) of pictures (B, 3, H, W), each with its question (B, L)."""
        return self.fuse(self.image.forward_features(images)[:, self.image.num_prefix_tokens :], tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes): the answers to the question for the creature's name."""
        return self.answer(images, self.class_tokens[:1].expand(len(images), -1))[:, : self.classes]


class Bimodal(NamedTuple):
    """Relevance of patches and of words for the answer to a question about each picture."""

    image: Tensor  # (B, gh, gw), at least 0
    text: Tensor  # (B, L), at least 0: a value for each word; 0 beyond the end of a shorter question
    words: tuple[tuple[str, ...], ...]  # B questions
    answers: tuple[str, ...]  # B: what is explained
    score: Tensor  # (B,): its logit

    def heatmap(self) -> Tensor:
        """(B, gh, gw): the map of the picture."""
        return self.image


def explain(
    model: QuestionAnswering,
    images: Tensor,
    target: list[str] | Tensor | None = None,
    *,
    answers: list[str] | None = None,
    normalised: bool = True,
    gathered: bool = True,
) -> Bimodal:
    """Relevance of every patch and every word for the answer to a question about each picture.

    Args:
        model: a QuestionAnswering in eval mode, such as ``load_pretrained`` gives.
        images: (B, 3, H, W), normalised.
        target: B questions; or their token ids (B, L); or (B,) class indices: the question for the name, and why it would
            be these; None asks for the name.
        answers: B answers to explain; None explains what the model answers.
        normalised: scale what has been gathered by equations 8 and 9; False takes the maps as they are, the ablation of the
            authors' code.
        gathered: carry over what has been gathered in equation 10; False adds the attention alone, another ablation there.

    Returns:
        Bimodal.

    Raises:
        UnsupportedModel: the model answers no questions.
        ValueError: see ``vitx.vit.check``; a word that the model does not know, a question too long, not one question or
            answer for each picture, no such answer.

    Source: Chefer, Gur, Wolf 2021 (ICCV), equations 5 to 11; authors' code, lxmert/lxmert/src/ExplanationGenerator.py:
    GeneratorOurs.generate_ours.
    """
    if not hasattr(model, "fusion"):  # not isinstance: in a notebook this class exists twice
        raise UnsupportedModel(
            f"{type(model).__name__} answers no questions: the method follows attention between words and patches (the model "
            "vqa-glyph)."
        )
    tokens = caption_tokens(model, images, target)  # (B, L)
    with (
        torch.enable_grad(),
        capture(model.image, "attention") as image,
        capture(model.text, "attention") as text,
        capture(model, "attention") as fusion,
    ):
        logits = require_finite(model, model.answer(images, tokens))  # (B, answers)
        chosen = answer_indices(model, logits, target, answers)
        score = logits.gather(1, chosen[:, None])[:, 0]  # (B,): y
        weights = [*image["attention"], *text["attention"], *fusion["attention"]]
        gradients = torch.autograd.grad(score.sum(), weights)
    A_bar = [
        (gradient * A.detach()).clamp(min=0).mean(1) for A, gradient in zip(weights, gradients, strict=True)
    ]  # (B, tokens, tokens) each, equation 5
    depth, words = len(image["attention"]), len(text["attention"])
    R_ii, R_tt = gather(A_bar[:depth]), gather(A_bar[depth : depth + words])
    prefix = model.image.num_prefix_tokens
    R = joined(R_tt, R_ii[:, prefix:, prefix:])  # (B, N, N): R^tt, R^ti above R^it, R^ii
    length = tokens.shape[1]
    for kind, A in zip(model.fusion, A_bar[depth + words :], strict=True):
        R = co_attention(R, A, length, normalised, gathered) if kind == "cross" else R + A @ R  # equations 6 and 7
    end = (tokens == END).int().argmax(1)  # (B,)
    is_word = torch.arange(1, length - 1).to(end) < end[:, None]
    return Bimodal(
        image=to_grid(model.image, images, R[:, 0, length:]),
        text=R[:, 0, 1 : length - 1] * is_word,
        words=tuple(
            tuple(model.text.vocabulary[token] for token in row[1:stop])
            for row, stop in zip(tokens.tolist(), end.tolist(), strict=True)
        ),
        answers=tuple(model.answers[index] for index in chosen.tolist()),
        score=score.detach(),
    )


def answer_indices(
    model: QuestionAnswering, logits: Tensor, target: list[str] | Tensor | None, answers: list[str] | None
) -> Tensor:
    """(B,) index of the answer to explain: the one given, the class given, or the model's own."""
    if answers is None:
        given = target if isinstance(target, Tensor) and target.ndim == 1 else None
        return target_classes(logits, given)
    for answer in answers:
        if answer not in model.answers:
            near = difflib.get_close_matches(answer, model.answers, n=3, cutoff=0.5) or model.answers
            raise ValueError(f"the model never answers {answer!r}; nearest: {', '.join(near)}.")
    return target_classes(logits, torch.tensor([model.answers.index(answer) for answer in answers]))


def gather(attention: list[Tensor]) -> Tensor:
    """R (B, n, n) after layers of self-attention of one modality, from their A_bar (B, n, n): equation 6."""
    R = torch.eye(attention[0].shape[-1]).to(attention[0]).expand_as(attention[0])
    for A in attention:
        R = R + A @ R
    return R


def joined(R_tt: Tensor, R_ii: Tensor) -> Tensor:
    """(B, N, N) with both maps on its diagonal and zero elsewhere."""
    after = nn.functional.pad(R_tt, (0, R_ii.shape[-1]))
    return torch.cat([after, nn.functional.pad(R_ii, (R_tt.shape[-1], 0))], 1)


def co_attention(R: Tensor, A: Tensor, length: int, normalised: bool = True, gathered: bool = True) -> Tensor:
    """Equations 8 to 11 for both directions at once, from the old maps: R and A (B, N, N), the first ``length`` are words.

    A has nothing within a modality, so that D' A D holds equation 10 of both directions off the diagonal.
    """
    of_text = torch.arange(R.shape[-1], device=R.device) < length  # (N,)
    same = of_text[:, None] == of_text  # (N, N)
    eye = torch.eye(R.shape[-1]).to(R)
    R_hat = R * same - eye  # equation 8
    if normalised:
        R_hat = R_hat / R_hat.sum(-1, keepdim=True).clamp(min=torch.finfo(R.dtype).tiny)  # equation 9; 0 stays 0
    D = R_hat + eye if gathered else eye.expand_as(R)  # R_bar^tt and R_bar^ii on the diagonal
    return R + D.mT @ A @ D + (A @ R) * same  # equations 10 and 11


def load_pretrained(path) -> QuestionAnswering:
    """The model in a safetensors file, in eval mode: its metadata holds the arguments of the networks."""

    metadata, weights = stored(path)
    text = Question(**metadata["text"] | {"words": tuple(metadata["text"]["words"])})
    image = VisionTransformer(**metadata["image"], num_classes=0)
    answers, fusion = tuple(metadata["answers"]), tuple(metadata["fusion"])
    model = QuestionAnswering(image, text, answers, metadata["classes"], fusion, metadata["question"])
    model.load_state_dict(weights)
    return model.eval()


# %% [markdown]
# ## Where this departs from the paper
#
# 1. The paper explains LXMERT, whose picture tokens are boxes of a detector. Here they are the patches of a Vision
#    Transformer, and its blocks count as the picture's layers of self-attention. Its class token is not handed on to the
#    question, and is left out of $R^{ii}$ when the two meet.
# 2. LXMERT has weights of its own for each modality's self-attention and MLP, and shares those of its co-attention between
#    the two directions. Here all of a layer's weights are shared, with an MLP behind co-attention too. The rules read the
#    attention alone, and a layer of either kind is one block over words and patches with the other kind masked out.
# 3. A token that has gathered nothing yet has a row of zeros in $\hat R$, which stays zero; the authors' code divides by its
#    sum. In the last layer of co-attention the patches' own attention has no gradient, since only the first word is read from
#    there on: the equations leave it out by themselves, as the authors' code does by hand.
# 4. The authors' code can put the relevance of attention (LRP) in place of $A$, and its question-answering generator does so
#    unless told otherwise; equation 5 has $A$, and so has this.
# 5. The row of the first token holds the token itself, which is left out, as in the authors' code, and so is the last one.
#
# A model that was trained with one attention over words and patches together (`vqa-merged-glyph`) has layers of the kind that
# the paper treats first: there $R \leftarrow R + \bar A R$ over all tokens.
#
# What the small model cannot show: it knows fifty words and some ten forms of question about drawn creatures, so nothing here
# speaks of free language or of photographs. It was trained by answers alone, no loss tells it where to look, and in ten
# minutes it did not learn everything: it describes and names a single creature well, but hardly tells the left creature from
# the right one, knows a colour less than half of the time, and does not count (its card has the numbers). The maps show as
# much: asked for the colour of a part, they hold the word "colour" for relevant and the part's name for next to nothing.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def raw_attention(model: QuestionAnswering, images: Tensor, tokens: Tensor) -> Tensor:
        """(B, P): attention of the first token to the patches in the last layer of co-attention, mean over heads."""
        with torch.no_grad(), capture(model, "attention") as record:
            model.answer(images, tokens)
        last = max(layer for layer, kind in enumerate(model.fusion) if kind == "cross")
        return record["attention"][last].mean(1)[:, 0, tokens.shape[1] :]

    def show(seed: int) -> None:
        """Questions about one scene: where the answer can be seen, where the attention lies, and what it rests on."""
        model: QuestionAnswering = models.load("vqa-glyph").model  # type: ignore[assignment]
        scene = glyphs.scenes(1, seed)
        picture = scene.images[0].permute(1, 2, 0).numpy()
        crest, tail, pattern = (
            scene.part_masks[0, 0, glyphs.PARTS.index(part)] for part in ("crest", "tail", "pattern")
        )
        asked = {
            "which crest does the creature have": crest,
            "does the creature have a forked tail": tail,
            "which pattern does the creature have": pattern,
            "what colour is the crest of the creature": crest,
            "what is the creature called": scene.object_masks[0, 0],
        }
        images = glyphs.normalise(scene.images).expand(len(asked), -1, -1, -1)
        found = explain(model, images, list(asked))
        raw = raw_attention(model, images, model.text.tokenize(list(asked))).unflatten(1, found.image.shape[1:])
        figure = Figure(figsize=(11, 2.3 * len(asked)), layout="constrained")
        axes = figure.subplots(len(asked), 4, width_ratios=[1, 1, 1, 1.2])
        for row, (question, evidence) in enumerate(asked.items()):
            inside = glyphs.patch_fraction(evidence, (14, 14)) > 0
            shares = [float((x * inside).sum() / x.sum()) for x in (torch.ones(14, 14), raw[row], found.image[row])]
            print(
                f"{question}? {found.answers[row]}. On the evidence: {shares[2]:.0%} of the relevance, "
                f"{shares[1]:.0%} of raw attention, {shares[0]:.0%} of the picture"
            )
            plot.overlay(axes[row, 0], picture * (0.25 + 0.75 * evidence[..., None].numpy()), None, f"{question}?")
            plot.overlay(axes[row, 1], picture, raw[row], f"raw attention, {shares[1]:.0%} on the evidence")
            plot.overlay(axes[row, 2], picture, found.image[row], f"why {found.answers[row]}: {shares[2]:.0%}")
            bars, words = axes[row, 3], found.words[row]
            bars.barh(
                [f"{k + 1} {word}" for k, word in enumerate(words)],
                found.text[row, : len(words)].tolist(),
                color="#b5512f",
            )
            bars.invert_yaxis()
            bars.tick_params(labelsize=7, length=0)
            bars.spines[["top", "right"]].set_visible(False)
        demo.show(figure, "generic-attention-co-attention")

    show(seed=7)

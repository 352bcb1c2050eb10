# %% [markdown]
# # Interpretable question answering for pathology: the mechanism, on glyph questions
#
# **No picture of pathology is here.** TraP-VQA answers questions about pathology pictures with a transformer over picture
# features and the words of the question, and shows three things beside each answer, so that a reader can see what it rests on.
# Here they are computed for a small model that answers questions about drawn scenes, where the evidence of every answer is known.
#
# 1. **What the fusion attends to**: the attention of its last layer, mean over heads, from the token that is answered from to
#    the patches.
# 2. **Which picture features speak for the answer**: Grad-CAM on the features $X$ (position $p$, channel $k$) that the vision
#    encoder hands to the fusion, with $y$ the answer's logit,
#
# $$\alpha_k = \frac1P\sum_p \frac{\partial y}{\partial X_{pk}},\qquad L_p = \operatorname{ReLU}\Big(\sum_k \alpha_k X_{pk}\Big).$$
#
# 3. **Which words speak for the answer**: their Shapley values. With $v(S)$ the logit when only the words $S$ of the question's
#    $n$ words can be seen,
#
# $$\phi_j = \sum_{S \not\ni j} \frac{|S|!\,(n-|S|-1)!}{n!}\,\big(v(S\cup\{j\}) - v(S)\big),$$
#
# which together make up the difference between the whole question and none, $\sum_j\phi_j = v(\text{all}) - v(\varnothing)$.
#
# Catalogue entry: `pathology-vqa-transformer`. The same model is explained by `generic-attention-co-attention`.

# %%
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vitx.vit import UnsupportedModel, caption_tokens, capture, require_finite, target_classes, to_grid

AT_ONCE = 128  # questions with hidden words that pass the fusion together


class Answer(NamedTuple):
    """An answer to a question about each picture, and what it rests on."""

    image: Tensor  # (B, gh, gw), at least 0: Grad-CAM of the picture features
    attention: (
        Tensor  # (B, gh, gw): attention of the last layer from words to patches, of the token that is answered from
    )
    text: Tensor  # (B, words): Shapley values, any sign; 0 beyond the end of a shorter question
    words: tuple[tuple[str, ...], ...]  # B questions
    answers: tuple[str, ...]  # B: what is explained
    score: Tensor  # (B,): its logit
    wordless: Tensor  # (B,): its logit when no word of the question can be seen

    def heatmap(self) -> Tensor:
        """(B, gh, gw): Grad-CAM of the picture features."""
        return self.image


def explain(
    model: Any,
    images: Tensor,
    target: list[str] | Tensor | None = None,
    *,
    answers: list[str] | None = None,
    relu: bool = True,
) -> Answer:
    """Grad-CAM on the picture features, attention of the fusion, and Shapley values of the words.

    Args:
        model: answers questions about pictures, such as ``vqa-glyph``.
        images: (B, 3, H, W), normalised.
        target: B questions of at most 10 words; or their token ids (B, L); or (B,) class indices: the question for the name,
            and why it would be these; None asks for the name.
        answers: B answers to explain; None explains what the model answers.
        relu: keep only what speaks for the answer in Grad-CAM; False keeps the sign.

    Returns:
        Answer.

    Raises:
        UnsupportedModel: the model answers no questions.
        ValueError: see ``vitx.vit.check``; a word that the model does not know, a question too long, not one question or
            answer for each picture, no such answer.

    Source: Naseem, Khushi, Kim 2022, whose interpretation is by attention, Grad-CAM (Selvaraju et al. 2017, equations 1 and 2)
    and SHAP (Lundberg, Lee 2017, equation 4).
    """
    if not hasattr(model, "fuse"):
        raise UnsupportedModel(
            f"{type(model).__name__} answers no questions: the method explains an answer by picture and question (the model "
            "vqa-glyph)."
        )
    tokens = caption_tokens(model, images, target)  # (B, L)
    unknown = [answer for answer in answers or [] if answer not in model.answers]
    if unknown:
        raise ValueError(f"the model never answers {unknown[0]!r}; it knows {', '.join(model.answers)}.")
    given = target if isinstance(target, Tensor) and target.ndim == 1 else None
    if answers is not None:
        given = torch.tensor([model.answers.index(answer) for answer in answers])
    with torch.no_grad():
        X = model.image.forward_features(images)[:, model.image.num_prefix_tokens :]  # (B, P, D)
    with torch.enable_grad(), capture(model, "attention") as record:
        X = X.detach().requires_grad_()
        logits = require_finite(model, model.fuse(X, tokens))  # (B, answers)
        chosen = target_classes(logits, given)  # (B,)
        score = logits.gather(1, chosen[:, None])[:, 0]  # (B,): y
        (gradient,) = torch.autograd.grad(score.sum(), X)
    X, length = X.detach(), tokens.shape[1]
    # The last layer in which words see patches.
    last = max(layer for layer, kind in enumerate(model.fusion) if kind != "self")
    seen = record["attention"][last].detach().mean(1)[:, 0, length:]  # (B, P)
    cam = (gradient.mean(1, keepdim=True) * X).sum(-1)  # (B, P): alpha_k X_k
    values, wordless = shapley_values(model, X, tokens, chosen)
    end = (tokens == model.text.vocabulary.index("<end>")).int().argmax(1)  # (B,)
    return Answer(
        to_grid(model.image, images, cam.relu() if relu else cam),
        to_grid(model.image, images, seen),
        values,
        tuple(
            tuple(model.text.vocabulary[token] for token in row[1:stop])
            for row, stop in zip(tokens.tolist(), end.tolist(), strict=True)
        ),
        tuple(model.answers[index] for index in chosen.tolist()),
        score.detach(),
        wordless,
    )


@torch.no_grad()
def shapley_values(model: Any, X: Tensor, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Exact Shapley values (B, L - 2) of the words of each question, and the logit (B,) without them.

    Args:
        X: (B, P, D) picture features.
        tokens: (B, L) question. A word that is not in the coalition is padding, which nobody sees; the others keep their places.
        chosen: (B,) index of the answer.
    """
    blank, last = model.text.vocabulary.index("<pad>"), model.text.vocabulary.index("<end>")
    values, wordless = X.new_zeros(len(X), tokens.shape[1] - 2), X.new_zeros(len(X))
    for row, question in enumerate(tokens):
        n = int((question == last).int().argmax()) - 1  # words
        sets = torch.arange(2**n, device=X.device)[:, None] >> torch.arange(n, device=X.device) & 1  # (2^n, n)
        asked = question[: n + 2].repeat(len(sets), 1)  # (2^n, n + 2)
        asked[:, 1:-1][sets == 0] = blank
        v = torch.cat(
            [model.fuse(X[row].expand(len(some), -1, -1), some)[:, chosen[row]] for some in asked.split(AT_ONCE)]
        )  # (2^n,)
        weight = v.new_tensor(
            [math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) for size in range(n)]
        )
        for word in range(n):
            without = (sets[:, word] == 0).nonzero()[:, 0]
            gain = v[without + 2**word] - v[without]
            values[row, word] = (weight[sets[without].sum(1)] * gain).sum()
        wordless[row] = v[0]
    return values, wordless


# %% [markdown]
# ## Where this departs from the paper
#
# 1. **What is here is not TraP-VQA but its way of explaining.** TraP-VQA takes picture features from a ResNet-50 and word
#    features from BioELMo and a bidirectional LSTM, joins them in two transformer layers whose queries and keys are the question
#    and whose values are the picture, and writes the answer word by word with a decoder. The model here is a Vision Transformer
#    whose patches meet the words in layers of co-attention, and it chooses one of 36 answers.
# 2. The paper was not read; its abstract was, and a reader's notes on the full text, which name attention weights, Grad-CAM and
#    SHAP as its means of explaining but not their settings. Where they were open the plainest choice was made: the last layer
#    that sees patches, the mean over its heads, the features that enter the fusion, Shapley values without sampling.
# 3. SHAP is also shown for the picture in the paper; here only for the words, of which all $2^n$ subsets can be tried.
# 4. Hidden words are taken out of every attention; the token before the question and the one behind it always stay.
#
# The paper shows examples and measures nothing about its explanations. In the glyph world the evidence of an answer is known, so
# the test measures how much of each map lies on it.
#
# What the small model cannot show: anything about tissue, stains, medical language, or whether a pathologist is helped.

# %%
if __name__ == "__main__":
    from matplotlib.figure import Figure
    from vitx import demo, glyphs, models, plot

    def show(seed: int) -> None:
        """Questions about two scenes: where the answer can be seen, both maps, and the words' Shapley values."""
        model: Any = models.load("vqa-glyph").model
        scenes = glyphs.scenes(2, seed)
        names = ("crest", "tail")
        asked = [f"which {name} does the creature have" for name in names]
        parts = [scenes.part_masks[row, 0, glyphs.PARTS.index(name)] for row, name in enumerate(names)]
        found = explain(model, glyphs.normalise(scenes.images), asked)
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        axes = figure.subplots(2, 4, width_ratios=[1, 1, 1, 1.2])
        for row, (question, mask) in enumerate(zip(asked, parts, strict=True)):
            picture = scenes.images[row].permute(1, 2, 0).numpy()
            inside = glyphs.patch_fraction(mask, (14, 14)) > 0
            maps = {"Grad-CAM": found.image[row], "attention": found.attention[row], "chance": torch.ones(14, 14)}
            shares = {name: float((x * inside).sum() / x.sum()) for name, x in maps.items()}
            print(
                f"{question}? {found.answers[row]}. On the evidence: "
                + ", ".join(f"{share:.0%} ({name})" for name, share in shares.items())
                + f"; logit {float(found.score[row]):.1f}, without words {float(found.wordless[row]):.1f}"
            )
            plot.overlay(axes[row, 0], picture * (0.25 + 0.75 * mask[..., None].numpy()), None, f"{question}?")
            for place, name in zip(axes[row, 1:3], ("Grad-CAM", "attention"), strict=True):
                title = f"{found.answers[row]}: {name}, {shares[name]:.0%} on the evidence"
                plot.overlay(place, picture, maps[name], title)
            bars, words = axes[row, 3], found.words[row]
            values = found.text[row, : len(words)].tolist()
            colours = ["#b5512f" if value > 0 else "#4c78a8" for value in values]
            bars.barh([f"{k + 1} {word}" for k, word in enumerate(words)], values, color=colours)
            bars.invert_yaxis()
            bars.tick_params(labelsize=7, length=0)
            bars.spines[["top", "right"]].set_visible(False)
            bars.set_title(f"Shapley values of the words for {found.answers[row]}", fontsize=8, pad=3)
        demo.show(figure, "pathology-vqa-transformer")

    show(seed=7)

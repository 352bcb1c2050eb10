# %% [markdown]
# # Negative perturbation
#
# How long does the model still choose the class while the least relevant patches are hidden first? Let $a(t)$ be 1 if
# the class has the largest logit with the share $t$ hidden, and 0 if not. The score is the area under $a$ through the
# points $t = 0, 0.1, \dots, 0.9$, by the trapezoid rule:
#
# $$\text{negative perturbation} = \int_0^{0.9} a(t)\,dt,\qquad
# a(t) = \big[\arg\max_k f_k(x_{\setminus \text{bottom } t}) = c\big].$$
#
# Averaged over pictures, $a(t)$ is the accuracy with the share $t$ hidden. With the true class as $c$ it is the
# accuracy, with the predicted class it is the share of decisions that stand.
#
# **Reading it.** 0 to 0.9, higher is better: what the map calls irrelevant can go without loss, and a tenth of the
# picture is enough for the decision. A random order has no fixed value: compare with the random map. On average over
# random orders, negative and positive perturbation are equal.
#
# **Trap.** Only the decision counts, not how narrow it was: a picture has few values, so many pictures are needed.
# Hidden patches make pictures that are unlike those of the training. Catalogue entry: `negative-perturbation`.

# %%
from torch import Tensor
from vitx.removal import Curve, first_class_area


def score(least_first: Curve, target: Tensor) -> Tensor:
    """Area under "is the class still the first", the least relevant patches hidden first, up to nine tenths.

    Args:
        least_first: patches hidden cumulatively, least relevant first: shares (S + 1,) from 0 to 1,
            logits (B, S + 1, C).
        target: (B,) class asked about.

    Returns:
        (B,), 0 to 0.9; higher is better.

    Source: Chefer, Gur, Wolf 2021 (CVPR), section 4, perturbation tests.
    """
    return first_class_area(least_first, target)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Whole patches are hidden. The paper enlarges the map to the pixels and removes the lowest pixels.
# 2. What hides a patch is a setting of the measurement and is named with every number. The authors' code paints
#    pixels black.
# 3. The tenths are read at the nearest step of the curve that all criteria share, which is exact where the steps hit
#    them.
# 4. The paper's numbers are 100 times these. Its code prints the accuracy at 0.1 to 0.9; that the area begins with
#    the untouched picture and follows the trapezoid rule is the authors' answer in issue 31 of their repository.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.criterion("negative-perturbation")

# %% [markdown]
# # Sufficiency
#
# Are the top patches of the map enough, so that the model is as sure with them alone as with the whole picture? The
# fall of the probability of the class is averaged over five amounts $b$ that are kept:
#
# $$\text{sufficiency} = \frac{1}{|\mathcal B|} \sum_{b \in \mathcal B} p_c(x) - p_c\big(x_{\text{only top } b}\big),
# \qquad \mathcal B = \{1, 5, 10, 20, 50\}\,\%.$$
#
# The picture with only the top $b$ visible is the one with the $1 - b$ least relevant patches hidden.
#
# **Reading it.** -1 to 1, **lower** is better: 0 means that nothing is lost, a negative value that the model is surer
# of the part than of the whole. It cannot exceed the probability of the untouched picture. A random order has no
# fixed value: compare with the random map.
#
# **Trap.** One patch in a hundred is seldom enough for any model, so that even the best map scores well above 0.
# Pictures of which little is left are unlike those of the training. Catalogue entry: `sufficiency`.

# %%
from torch import Tensor
from vitx.removal import Curve, target_probabilities, value_at

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # shares of the picture


def score(least_first: Curve, target: Tensor) -> Tensor:
    """Mean fall of the probability of the class with only the top 1, 5, 10, 20 and 50 % of the patches visible.

    Args:
        least_first: patches hidden cumulatively, least relevant first: shares (S + 1,) from 0 to 1,
            logits (B, S + 1, C).
        target: (B,) class asked about.

    Returns:
        (B,), -1 to 1; lower is better.

    Source: DeYoung et al. 2020 (ERASER), section 4.2.
    """
    shares, probabilities = least_first.shares, target_probabilities(least_first.logits, target)  # (S + 1,), (B, S + 1)
    only = value_at(shares, probabilities, 1 - shares.new_tensor(BINS))  # (B, 5)
    return (probabilities[:, :1] - only).mean(1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Between two steps of the curve that all criteria share, the probability is interpolated linearly: 1 % lies beyond
#    the last but one of 28 steps.
# 2. The mean is over the five bins, as in the authors' code. The formula of the paper also counts an empty bin.
# 3. Patches are kept instead of words; what hides the others is a setting of the measurement that is named with every
#    number.
# 4. The class is the one that the map was asked for. The paper follows the predicted class.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.criterion("sufficiency")

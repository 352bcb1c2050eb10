# %% [markdown]
# # Comprehensiveness
#
# Does the map contain all the evidence, so that the model is at a loss without its top patches? The fall of the
# probability of the class is averaged over five amounts $b$ that are taken away:
#
# $$\text{comprehensiveness}
# = \frac{1}{|\mathcal B|} \sum_{b \in \mathcal B} p_c(x) - p_c\big(x_{\setminus \text{top } b}\big),
# \qquad \mathcal B = \{1, 5, 10, 20, 50\}\,\%.$$
#
# **Reading it.** -1 to 1, higher is better; it cannot exceed the probability of the untouched picture. Small amounts
# weigh most, other than in `deletion`: the first patches of the map decide. A random order has no fixed value:
# compare with the random map.
#
# **Trap.** Evidence that is there twice is not missed when it is hidden once: a map may be right and score low.
# Pictures with holes are unlike those of the training. Catalogue entry: `comprehensiveness`.

# %%
from torch import Tensor
from vitx.removal import Curve, target_probabilities, value_at

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # shares of the picture


def score(most_first: Curve, target: Tensor) -> Tensor:
    """Mean fall of the probability of the class without the top 1, 5, 10, 20 and 50 % of the patches.

    Args:
        most_first: patches hidden cumulatively, most relevant first: shares (S + 1,) from 0 to 1, logits (B, S + 1, C).
        target: (B,) class asked about.

    Returns:
        (B,), -1 to 1; higher is better.

    Source: DeYoung et al. 2020 (ERASER), section 4.2.
    """
    shares, probabilities = most_first.shares, target_probabilities(most_first.logits, target)  # (S + 1,), (B, S + 1)
    without = value_at(shares, probabilities, shares.new_tensor(BINS))  # (B, 5)
    return (probabilities[:, :1] - without).mean(1)


# %% [markdown]
# ## Where this departs from the paper
#
# 1. Between two steps of the curve that all criteria share, the probability is interpolated linearly: 1 % lies before
#    the first of 28 steps.
# 2. The mean is over the five bins, as in the authors' code. The formula of the paper also counts the empty bin, in
#    which nothing falls, and so gives 5/6 of this value.
# 3. Patches are hidden instead of words; by what is a setting of the measurement that is named with every number.
# 4. The class is the one that the map was asked for. The paper follows the predicted class.

# %%
if __name__ == "__main__":
    from vitx import demo

    demo.criterion("comprehensiveness")

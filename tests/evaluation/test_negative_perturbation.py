"""Negative perturbation is positive perturbation in the other order."""

import curves
import torch
import vitx
from helpers import relative_error
from vitx import evaluate
from vitx.removal import Curve

score = vitx.load_module("negative-perturbation").score
positive = vitx.load_module("positive-perturbation").score


def test_the_least_relevant_go_first(proof):
    """On every order of four patches: the score of an order is the positive one of the order reversed."""
    assert evaluate.reads(score) == ("least_first", "target")
    errors, apart = [], 0
    contributions = torch.tensor([2.0, -1.0, 0.5, 0.25], dtype=torch.float64)
    for order in curves.all_orders(4):
        forwards, target = curves.of_sum(contributions, order)
        backwards, _ = curves.of_sum(contributions, order[::-1])
        errors.append(relative_error(score(least_first=backwards, target=target), positive(backwards, target)))
        apart += bool(score(least_first=backwards, target=target) != positive(forwards, target))
    assert apart > 0  # the direction matters
    proof("negative-perturbation", "positive perturbation of the reversed order, 24 orders", max(errors),
          at_most=1e-12, kind="closed form")  # fmt: skip


def test_a_class_that_is_never_lost_scores_nine_tenths():
    shares = torch.arange(11) / 10
    curve, target = curves.of_probabilities(torch.full((1, 11), 0.9), shares)
    assert abs(score(curve, target).item() - 0.9) < 1e-6
    assert isinstance(curve, Curve)

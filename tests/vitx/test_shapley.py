"""Exact Shapley values against their definition, and the game of sixteen players."""

import itertools

import pytest
import torch
from helpers import pictures, tiny
from vitx import shapley
from vitx.vit import logits_of_visible


def game(players, seed=0):
    return torch.randn(2**players, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("players", [1, 2, 5])
def test_equals_the_mean_gain_over_all_orders(players):
    worth = game(players)
    orders = list(itertools.permutations(range(players)))
    expected = torch.zeros(players, dtype=torch.float64)
    for order in orders:
        coalition = 0
        for player in order:
            expected[player] += (worth[coalition | 1 << player] - worth[coalition]) / len(orders)
            coalition |= 1 << player
    torch.testing.assert_close(shapley.exact(worth), expected)


def test_axioms():
    a, b = game(6, 1), game(6, 2)
    phi = shapley.exact(a)
    torch.testing.assert_close(phi.sum(), a[-1] - a[0])
    torch.testing.assert_close(shapley.exact(2 * a - 3 * b), 2 * phi - 3 * shapley.exact(b))
    index = torch.arange(64)
    blind = a[index & ~(1 << 2)]  # player 2 changes nothing
    torch.testing.assert_close(shapley.exact(blind)[2], torch.tensor(0.0, dtype=torch.float64))
    size = (index[:, None] >> torch.arange(6) & 1).sum(1)
    assert shapley.exact(size.double() ** 2).std() < 1e-12  # players that nobody can tell apart


def test_groups_are_a_grid_of_sixteen():
    player = shapley.groups().view(14, 14)
    assert sorted(player.unique().tolist()) == list(range(16))
    counts = torch.bincount(player.flatten())
    assert set(counts.tolist()) == {9, 12, 16}
    for group in range(16):
        rows, columns = (player == group).nonzero().T
        assert (rows.amax() - rows.amin() + 1) * (columns.amax() - columns.amin() + 1) == counts[group]


def test_table_equals_hiding_by_attention_masks():
    model = tiny(2, img_size=(24, 32)).float()
    x = pictures(model, 1)
    player = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3])
    worth = shapley.table(model, x[0], 2, player, chunk=3)
    member = torch.arange(16)[:, None] >> torch.arange(4) & 1
    with torch.no_grad():
        expected = logits_of_visible(model, x.expand(16, -1, -1, -1), member[:, player].bool()).softmax(-1)[:, 2]
    torch.testing.assert_close(worth, expected, atol=1e-5, rtol=1e-4)


def test_distance_measures():
    truth = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    same = shapley.measure(truth, truth)
    torch.testing.assert_close(same, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(shapley.measure(-2 * truth, truth), torch.tensor([-1.0, 3.0], dtype=torch.float64))

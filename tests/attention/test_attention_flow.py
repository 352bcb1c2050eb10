"""Attention flow against networkx, against the definition by cuts, and at its closed forms and bounds."""

from itertools import product

import networkx as nx
import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_forward

ID = "attention-flow"


def widths_of(model, image) -> np.ndarray:
    """(L, N, N), first layer first."""
    records, _ = twin_forward(model, image)
    return np.stack([(r["attention"].mean(0) + np.eye(len(r["input"]))) / 2 for r in records])


def peaked(layers: int, tokens: int, seed: int, sharpness: float = 4.0) -> np.ndarray:
    """Capacities of sharp random attention, where neither the source nor the sink is the narrowest place."""
    scores = sharpness * np.random.default_rng(seed).standard_normal((layers, tokens, tokens))
    attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return (attention + np.eye(tokens)) / 2


def network(widths: np.ndarray, top: np.ndarray) -> nx.DiGraph:
    graph = nx.DiGraph()
    depth, tokens, _ = widths.shape
    for token in range(tokens):
        graph.add_edge("source", (depth, token), capacity=top[token])
        for layer, other in product(range(depth), range(tokens)):
            graph.add_edge((layer + 1, token), (layer, other), capacity=widths[layer, token, other])
    return graph


def networkx_flows(widths: np.ndarray, top: np.ndarray) -> list[float]:
    graph = network(widths, top)
    return [nx.maximum_flow_value(graph, "source", (0, token)) for token in range(len(top))]  # type: ignore[misc]


def smallest_cut(widths: np.ndarray, sink: int) -> float:
    """Minimum over every way to put the tokens between the layers on one side or the other."""
    depth, tokens, _ = widths.shape
    sides = [np.array(side, dtype=bool) for side in product((False, True), repeat=tokens)]
    first, last = np.arange(tokens) == 0, np.arange(tokens) != sink
    values = []
    for middle in product(sides, repeat=depth - 1):
        levels = [last, *middle, first]  # True: on the source's side; level 0 first
        values.append(sum(widths[n][np.ix_(levels[n + 1], ~levels[n])].sum() for n in range(depth)))
    return min(values)


@pytest.mark.parametrize("depth", [2, 3])
def test_networkx_on_the_models_graph(depth, proof):
    model = tiny(depth, img_size=24)  # nine patches
    x = pictures(model)
    theirs = [np.reshape(networkx_flows(widths_of(model, image), np.eye(10)[0])[1:], (3, 3)) for image in x]
    error = relative_error(vitx.load(ID)(model, x), theirs)
    proof(ID, f"map, depth {depth}", error, at_most=1e-9, kind="parity", oracle="networkx, preflow-push in floats")


@pytest.mark.parametrize("seed", range(3))
def test_networkx_where_the_middle_is_narrow(seed, proof):
    widths, top = peaked(5, 12, seed), np.eye(12)[0]
    ours, theirs = vitx.load_module(ID).flows(top, widths), networkx_flows(widths, top)
    bound = np.minimum(1, widths[0].sum(0))
    assert (theirs < bound - 1e-3).sum() >= 3, "the graph should be harder than its two outer cuts"
    error = relative_error(ours, theirs)
    proof(ID, f"sharp attention, graph {seed}", error, at_most=1e-9, kind="parity", oracle="networkx")


def test_flow_is_the_smallest_of_all_cuts(proof):
    widths = peaked(3, 4, 7)
    ours = vitx.load_module(ID).flows(np.eye(4)[0], widths)
    error = relative_error(ours, [smallest_cut(widths, sink) for sink in range(4)])
    proof(ID, "the flow is the smallest of all cuts", error, at_most=1e-12, kind="parity", oracle="every cut in loops")


def test_one_layer_is_the_attention_with_its_residual(proof):
    """With one layer every flow is its one edge, so flow and rollout agree, as the paper notes."""
    model = tiny(1)
    x = pictures(model)
    error = relative_error(vitx.load(ID)(model, x), vitx.load("attention-rollout")(model, x))
    proof(ID, "one layer: the same as rollout", error, at_most=1e-12, kind="closed form")


@pytest.mark.parametrize(("depth", "value"), [(2, 1 / 2), (3, 1 - 1 / 10)])
def test_uniform_attention(depth, value, proof):
    """With N tokens an edge holds 1/2N, and 1/2 more where it stays with its token.

    Two layers: each token in between can pass on 1/2N only, the lesser of its two edges: 1/2 together. Three layers:
    the class token's 1/2 + 1/2N can go on by N ways of 1/2N each, so 1/2N of the unit stays behind.
    """
    model = tiny(depth)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0  # no queries, no keys: all scores equal
            block.attn.qkv.bias[:16] = 0
    error = (vitx.load(ID)(model, pictures(model)) - value).abs().max()
    proof(ID, f"uniform attention, {depth} layers", error, at_most=1e-12, kind="closed form")


def test_flow_lies_between_rollout_and_the_outer_cuts(proof):
    """Rollout is one of the flows that the capacities allow; the edges at either end allow no more than they hold."""
    model = tiny(3, img_size=24)
    x = pictures(model)
    flow, rollout = vitx.load(ID)(model, x), vitx.load("attention-rollout")(model, x)
    bound = torch.tensor(np.stack([np.minimum(1, widths_of(model, image)[0].sum(0))[1:] for image in x])).view_as(flow)
    excess = torch.maximum(rollout - flow, flow - bound).max()
    proof(ID, "at least rollout, at most the outer cuts", excess, at_most=1e-12, kind="closed form")


def test_average_pooling_starts_from_all_tokens(proof):
    model = tiny(2, class_token=False, global_pool="avg", img_size=24)
    x = pictures(model)
    with vitx.load_module(ID).capture(model, "attention") as record:
        model(x)
    theirs = []
    for picture in range(2):
        attention = torch.stack([a[picture].mean(0) for a in record["attention"]]).detach().numpy()
        theirs.append(np.reshape(networkx_flows((attention + np.eye(9)) / 2, np.full(9, 1 / 9)), (3, 3)))
    error = relative_error(vitx.load(ID)(model, x), theirs)
    proof(ID, "average pooling", error, at_most=1e-9, kind="parity", oracle="networkx")

"""TokenTM against the equations in plain loops, its reduction to the method that it extends, and its invariances."""

import math

import numpy as np
import pytest
import torch
import vitx
from helpers import pictures, relative_error, tiny, twin_attention_gradients, twin_forward, weights
from vitx.vit import UnsupportedModel

ID = "tokentm"


def transformation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """w (N,) of tokens before and after (N, D)."""
    length = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(after, before, strict=True)]
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(after, before, strict=True)]
    total = sum(math.exp(c) for c in cosine)
    return np.array([n * math.exp(c) / total for n, c in zip(length, cosine, strict=True)])


def twin(model, image, target: int) -> np.ndarray:
    records, _ = twin_forward(model, image)
    contribution = np.diag(np.linalg.norm(records[0]["input"], axis=1))
    gradients = twin_attention_gradients(model, image, target)
    for index, (record, gradient) in enumerate(zip(records, gradients, strict=True)):
        projection = weights(model)[f"blocks.{index}.attn.proj.weight"]
        update = np.eye(5)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            values = record["qkv"][:, 16:][:, part]
            w = transformation(record["input"], np.stack([projection[:, part] @ value for value in values]))
            update = update + np.maximum(gradient[head], 0) * (record["attention"][head] @ np.diag(w)) / 2
        mlp = np.diag(1 + transformation(record["middle"], record["output"] - record["middle"]))
        contribution = mlp @ update @ contribution  # first block first
    return contribution[0, 1:].reshape(2, 2)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_equations_in_loops(depth, proof):
    model = tiny(depth)
    x, target = pictures(model), [3, 1]
    theirs = [twin(model, image, label) for image, label in zip(x, target, strict=True)]
    error = relative_error(vitx.load(ID)(model, x, torch.tensor(target)), theirs)
    oracle = "equations in plain loops, gradients by finite differences"
    proof(ID, f"map, depth {depth}", error, at_most=1e-6, kind="parity", oracle=oracle)


def test_the_direction_is_shared_out_among_the_tokens(proof):
    """Tokens that keep their length have weights that sum to one; one that is turned around has the least."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    after = before @ turn
    after[:, 2] = -before[:, 2]
    w = vitx.load_module(ID).weights(before, after)
    assert (w.argmin(1) == 2).all()
    proof(ID, "kept lengths: weights sum to one", (w.sum(1) - 1).abs().max(), at_most=1e-12, kind="closed form")


def test_weights_scale_with_length_only(proof):
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 3, 6, 8, generator=generator, dtype=torch.float64)
    module = vitx.load_module(ID)
    error = relative_error(module.weights(2 * before, 5 * after), 2.5 * module.weights(before, after))
    proof(ID, "twice as long after: twice the weight", error, at_most=1e-12, kind="closed form")


def test_without_weights_it_is_generic_attention(proof, monkeypatch):
    """With weights of one for attention and none for the MLP, only the lengths of the embedded tokens are left."""
    model = tiny(3)
    x, target = pictures(model), torch.tensor([3, 1])
    module = vitx.load_module(ID)
    by_head = 4  # dimensions of the stacked tokens of the heads
    monkeypatch.setattr(
        module, "weights", lambda e, after: after.new_full(after.shape[:-1], float(after.ndim == by_head))
    )
    generic = vitx.load("generic-attention-explainability")(model, x, target)
    with torch.no_grad(), module.capture(model, "block_input") as record:
        model(x)
    lengths = record["block_input"][0].norm(dim=-1)[:, 1:].view(2, 2, 2)
    # Generic attention clamps the product with the attention, which is the same, as attention is positive.
    error = relative_error(module.explain(model, x, target), generic * lengths)
    oracle = "generic-attention-explainability"
    proof(ID, "without weights: the method it extends", error, at_most=1e-12, kind="parity", oracle=oracle)


def test_nothing_to_attend_to_is_zero():
    """A head that ignores its input leaves only the class token's own contribution."""
    model = tiny(2)
    x, target = pictures(model), torch.tensor([2, 2])
    before = vitx.load(ID)(model, x, target)
    with torch.no_grad():
        model.head.bias[2] += 7
        assert torch.allclose(before, vitx.load(ID)(model, x, target), rtol=1e-12)
        model.head.weight[2] = 0
    assert vitx.load(ID)(model, x, target).abs().max() == 0


def test_layer_scale_is_part_of_the_transformation(proof):
    """A model with layer scale is the same as one whose projections are scaled, and so is its map."""
    scaled = tiny(2, init_values=0.5)
    plain = tiny(2)
    state = {name: tensor.clone() for name, tensor in scaled.state_dict().items() if ".ls" not in name}
    for index, block in enumerate(scaled.blocks):
        for gamma, path in ((block.ls1.gamma, "attn.proj"), (block.ls2.gamma, "mlp.fc2")):
            state[f"blocks.{index}.{path}.weight"] *= gamma.detach()[:, None]
            state[f"blocks.{index}.{path}.bias"] *= gamma.detach()
    plain.load_state_dict(state)
    x = pictures(plain)
    error = relative_error(vitx.load(ID)(scaled, x), vitx.load(ID)(plain, x))
    proof(ID, "layer scale or scaled projections: one map", error, at_most=1e-10, kind="closed form")


def test_gated_attention_is_refused():
    model = tiny(2)
    model.blocks[1].attn.norm = torch.nn.LayerNorm(8).double()
    with pytest.raises(UnsupportedModel, match="without gate or norm"):
        vitx.load(ID)(model, pictures(model))

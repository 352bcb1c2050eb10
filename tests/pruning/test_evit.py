import math

import numpy as np
import pytest
import torch
import vitx
from helpers import layer_norm, pictures, relative_error, tiny, twin_block, twin_tokens, weights

ID = "evit"


def twin(model, image, keep_rate: float, layers: tuple[int, ...], fuse: bool) -> tuple[np.ndarray, list[set[int]]]:
    """Reorganisation token by token; logits and the patches alive after each block."""
    w = weights(model)
    x, place, alive = list(twin_tokens(model, image)), list(range(-1, 4)), []  # place -1 is the class token
    for index in range(len(model.blocks)):
        record = twin_block(model, index, np.stack(x))
        if index in layers and keep_rate < 1:
            attentiveness = record["attention"].mean(0)[0]
            order = sorted(range(1, len(x)), key=lambda i: -attentiveness[i])
            kept = order[: math.ceil(keep_rate * (len(x) - 1))]
            dropped = [i for i in order if i not in kept]
            middle = [record["middle"][0]] + [record["middle"][i] for i in kept]
            place = [-1] + [place[i] for i in kept]
            if fuse and dropped:
                middle.append(sum(attentiveness[i] * record["middle"][i] for i in dropped))
                place.append(99)
            of = {n.removeprefix(f"blocks.{index}."): t for n, t in w.items() if n.startswith(f"blocks.{index}.")}
            x = []
            for token in middle:
                hidden = (
                    layer_norm(token, of["norm2.weight"], of["norm2.bias"]) @ of["mlp.fc1.weight"].T
                    + of["mlp.fc1.bias"]
                )
                gelu = torch.nn.functional.gelu(torch.as_tensor(hidden)).numpy()
                x.append(token + gelu @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"])
        else:
            x = list(record["output"])
        alive.append({p for p in place if 0 <= p < 4})
    final = layer_norm(x[0], w["norm.weight"], w["norm.bias"])
    return final @ w["head.weight"].T + w["head.bias"], alive


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep_rate", [0.8, 0.5, 0.3])
def test_token_by_token(keep_rate, fuse, proof):
    model = tiny(4)
    x = pictures(model, 3)
    ours = vitx.load(ID)(model, x, keep_rate=keep_rate, layers=(1, 2), fuse=fuse)
    errors = []
    for index, image in enumerate(x):
        logits, alive = twin(model, image, keep_rate, (1, 2), fuse)
        errors.append(relative_error(ours.logits[index], logits))
        ours_alive = [{int(p) for p in layer.flatten().nonzero()} for layer in ours.alive[index]]
        assert ours_alive == alive
    what = f"logits, keep rate {keep_rate}, {'fused' if fuse else 'dropped'}"
    proof(ID, what, max(errors), at_most=1e-9, kind="parity", oracle="reorganisation token by token in loops")


def test_keeping_all_is_the_plain_model(proof):
    model = tiny(4)
    x = pictures(model)
    ours = vitx.load(ID)(model, x, keep_rate=1.0)
    assert ours.alive.all()
    assert (ours.heatmap() == 1).all()
    proof(
        ID,
        "keep rate 1 is the plain model",
        relative_error(ours.logits, model(x).detach()),
        at_most=1e-12,
        kind="closed form",
    )


def test_kept_counts_follow_the_papers_rounding():
    model = tiny(4, img_size=(40, 56))  # 35 patches
    alive = vitx.load(ID)(model, pictures(model), keep_rate=0.7, fuse=False).alive.flatten(2).sum(-1)
    first = math.ceil(0.7 * 35)
    second = math.ceil(0.7 * first)
    assert alive.tolist() == [[35, first, second, math.ceil(0.7 * second)]] * 2


def test_a_dropped_patch_never_returns():
    model = tiny(4, img_size=(40, 56))
    alive = vitx.load(ID)(model, pictures(model), keep_rate=0.5).alive
    assert (alive[:, 1:] <= alive[:, :-1]).all()


@pytest.mark.parametrize("options", [{"keep_rate": 0.0}, {"keep_rate": 1.2}, {"layers": (9,)}])
def test_bad_options_are_named(options):
    model = tiny(2)
    with pytest.raises(ValueError, match="keep_rate lies above 0"):
        vitx.load(ID)(model, pictures(model), **options)

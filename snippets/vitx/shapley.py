"""Exact Shapley values on a game of sixteen players, and how close cheaper methods come to them.

The players are the patches of the glyph world's 14 x 14 grid in 4 x 4 groups of 9 to 16; a coalition is the sequence of
their tokens, the class token always in front, and its worth the probability of the picture's class under the surrogate
of vit-shapley-glyph, which was trained to see parts of pictures. All 65,536 coalitions fit in a table, so that the
Shapley values are a sum and a method that asks for a sample of coalitions can be rerun as often as we like.

    python -m vitx.shapley        writes catalog/results/shapley.json

A table takes minutes; each is kept in vitx.cache_dir(), so that an interrupted run goes on.
"""

import argparse
import hashlib
import math
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitx import ATLAS, bench, cache_dir, glyphs, load, load_module, models
from vitx.vit import embed, keep_tokens, logits_of_tokens

SEED = 20_401  # of the scenes; no training script uses it
RESULT = ATLAS / "catalog" / "results" / "shapley.json"
SIDE, GRID = 4, 14  # players and patches along a side
SAMPLES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # coalitions that KernelSHAP sees
REPEATS = 20  # draws of each number of coalitions
PATCH_SAMPLES = 8192  # coalitions of single patches, for the sums over groups


def exact(worth: Tensor) -> Tensor:
    """Shapley values (n,) of a game with n players, in float64.

    phi_i is the mean over all orders of the players of what player i adds to those before it:
    the sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)).

    Args:
        worth: (2^n,), v of every coalition; bit i of the index says whether player i takes part.
    """
    n = len(worth).bit_length() - 1
    index = torch.arange(len(worth))
    size = (index[:, None] >> torch.arange(n) & 1).sum(1)  # (2^n,)
    weight = torch.tensor([1 / (n * math.comb(n - 1, k)) for k in range(n)], dtype=torch.float64)
    values = []
    for i in range(n):
        without = index[(index >> i & 1) == 0]
        values.append((weight[size[without]] * (worth[without | 1 << i] - worth[without]).double()).sum())
    return torch.stack(values)


def groups() -> Tensor:
    """The player (196,) to whom each patch belongs, 0 to 15, row by row."""
    axis = torch.arange(GRID) * SIDE // GRID
    return (SIDE * axis[:, None] + axis).flatten()


def table(model: VisionTransformer, image: Tensor, target: int, player: Tensor, chunk: int = 256) -> Tensor:
    """Probability of the class for every coalition: (2^n,), n the number of players.

    Args:
        model: with a class token. image: (3, H, W), normalised. player: (P,), of every patch.
        chunk: sequences per forward pass, all of one length.
    """
    n = int(player.max()) + 1
    member = torch.arange(2**n)[:, None] >> torch.arange(n) & 1  # (2^n, n)
    visible = member[:, player].bool()  # (2^n, P)
    length, worth = visible.sum(1), torch.empty(2**n)
    with torch.inference_mode():
        tokens = embed(model, image[None])  # (1, N, D)
        for count in length.unique().tolist():
            for part in (length == count).nonzero()[:, 0].split(chunk):
                patches = visible[part].nonzero()[:, 1].view(len(part), count)
                logits = logits_of_tokens(model, keep_tokens(model, tokens.expand(len(part), -1, -1), patches))
                worth[part] = logits.softmax(-1)[:, target]
    return worth


def kept_table(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
    """``table`` of the sixteen players, read from the cache when it was computed before."""
    content = hashlib.sha256(image.numpy().tobytes() + bytes([target]))
    for weight in model.state_dict().values():
        content.update(weight.numpy().tobytes())
    path = cache_dir() / "shapley" / f"{content.hexdigest()[:24]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        save_file({"worth": table(model, image, target, groups())}, beside)
        beside.replace(path)
    return load_file(path)["worth"]


def compare(scenes: int) -> dict[str, Any]:
    """Distances from the exact values: {"provenance": ..., "rows": [...], "scenes": [...]}.

    A row gives method, samples (coalitions or passes through the surrogate for each picture) and the mean over scenes
    and repeats of correlation (Pearson, over the sixteen players) and relative_error (Euclidean, over the length of
    the exact values), each with the standard deviation over scenes.
    """
    kernelshap = load_module("kernelshap")
    loaded = models.load("vit-shapley-glyph")
    surrogate, player = loaded.model.surrogate, groups()
    assert isinstance(surrogate, VisionTransformer)
    drawn = glyphs.scenes(scenes, SEED)
    images = glyphs.normalise(drawn.images)
    with torch.inference_mode():
        target = surrogate(images).argmax(-1)
    truth, found = [], {}

    def note(method: str, samples: int, values: Tensor) -> None:
        found.setdefault((method, samples), []).append(measure(values, truth[-1]))

    def by_player(patches: Tensor) -> Tensor:
        return torch.zeros(SIDE**2, dtype=torch.float64).index_add_(0, player, patches.flatten().double())

    with Progress() as bar:
        for i in bar.track(range(scenes), description="scenes"):
            worth = kept_table(surrogate, images[i], int(target[i])).double()
            picture, goal = images[i : i + 1], target[i : i + 1]
            truth.append(exact(worth))
            empty, full = worth[:1], worth[-1:]
            for paired in (True, False):
                for samples in SAMPLES:
                    for seed in range(REPEATS):
                        generator = torch.Generator().manual_seed(seed)
                        z, weights = kernelshap.coalitions(SIDE**2, samples, paired, generator)
                        values = worth[(z.long() << torch.arange(SIDE**2)).sum(1)]
                        phi = kernelshap.solve(z, weights, values[None], empty, full)[0]
                        note("kernelshap" if paired else "kernelshap, unpaired", samples, phi)
            all_but_one = (2 ** (SIDE**2) - 1) - (1 << torch.arange(SIDE**2))
            note("occlusion", SIDE**2 + 1, full - worth[all_but_one])
            note("vit-shapley", 2, by_player(load("vit-shapley")(loaded.model, picture, goal)))
            rollout = by_player(load("attention-rollout")(surrogate, picture))
            note("attention-rollout", 1, rollout / rollout.sum() * (full - empty))
            patchwise = load("kernelshap")(
                surrogate, picture, goal, samples=PATCH_SAMPLES, removal="drop", score="probability"
            )
            note("kernelshap of single patches", PATCH_SAMPLES, by_player(patchwise))
    rows = []
    for (method, samples), measured in found.items():
        grades = torch.stack(measured).view(scenes, -1, 2)  # (scenes, repeats, 2)
        mean, spread = grades.mean((0, 1)).tolist(), grades.mean(1).std(0).tolist()
        rows.append(
            {
                "method": method,
                "samples": samples,
                "correlation": round(mean[0], 4),
                "correlation_deviation": round(spread[0], 4),
                "relative_error": round(mean[1], 4),
                "relative_error_deviation": round(spread[1], 4),
            }
        )
    return {
        "provenance": bench.provenance(seed=SEED, scenes=scenes, players=SIDE**2, repeats=REPEATS),
        "rows": rows,
        "scenes": [
            {"class": glyphs.CLASS_NAMES[int(goal)], "exact": [round(value, 5) for value in phi.tolist()]}
            for goal, phi in zip(target, truth, strict=True)
        ],
    }


def measure(values: Tensor, truth: Tensor) -> Tensor:
    """(2,): Pearson correlation with the exact values, and distance from them over their length."""
    a, b = values - values.mean(), truth - truth.mean()
    return torch.stack([a @ b / (a.norm() * b.norm()), (values - truth).norm() / truth.norm()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare methods with exact Shapley values.")
    parser.add_argument("--scenes", type=int, default=6)
    result = compare(parser.parse_args().scenes)
    bench.write(result, RESULT)
    for row in result["rows"]:
        print(f"{row['method']:30}{row['samples']:6}{row['correlation']:9.4f}{row['relative_error']:9.4f}")

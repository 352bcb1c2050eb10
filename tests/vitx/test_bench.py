"""The measurements: what the cost table counts, what it keeps, and how differences are scored."""

import json

import pytest
import timm
import timm.models.vision_transformer
import torch
from helpers import tiny
from vitx import bench, catalog, compare, cost, glyphs, metrics, models, peers
from vitx.schema import Difference


@pytest.fixture
def small(monkeypatch):
    model = tiny(3, img_size=224, patch_size=32).float()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    return model


def test_operations_are_counted_in_forward_passes(small):
    def three_passes(model, images, target):
        with torch.inference_mode():
            for _ in range(3):
                model(images)

    row = cost._costs(three_passes, repeats=2)
    assert row["operations"] == 3.0
    assert row["runs"] == {"1": 2, "8": 2}
    assert set(row["forwards"]) == set(row["seconds"]) == set(row["memory"]) == {"1", "8"}


def test_a_backward_pass_counts_about_two(small):
    def gradient(model, images, target):
        images = images.clone().requires_grad_()
        torch.autograd.grad(model.requires_grad_(False)(images).sum(), images)

    assert 1.9 < cost._costs(gradient, repeats=1)["operations"] <= 3.1


def test_long_runs_are_not_repeated_and_longer_batches_left_out(small, monkeypatch):
    monkeypatch.setattr(cost, "ENOUGH", 0)
    monkeypatch.setattr(cost, "TOO_LONG", 0)
    with pytest.raises(ZeroDivisionError):  # at least one run is always made
        cost._costs(lambda *_: 1 / 0, repeats=5)
    monkeypatch.setattr(cost, "ENOUGH", 1e-9)
    row = cost._costs(lambda model, images, target: model(images), repeats=5)
    assert row["runs"] == {"1": 1}
    assert set(row["forwards"]) == {"1"}


def test_memory_is_that_of_the_batch(small):
    """Each batch has a peak of its own, above that of the plain pass, however much the process has freed before."""
    held = [torch.ones(4_000_000) for _ in range(40)]
    last = torch.ones(1)  # what follows it in the heap keeps the freed memory from being given back by itself
    del held

    def run(model, images, target):
        torch.zeros(len(images), 25_000_000).add_(1)  # 100 MB a picture

    memory = cost._costs(run, repeats=1)["memory"]
    assert 90 < memory["1"] < 180
    assert 700 < memory["8"] < 1000
    assert last


def test_rows_are_kept_until_the_method_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cost, "RESULT", tmp_path / "cost.json")
    monkeypatch.setattr(cost, "OPTIONS", {"raw-attention": [{"layer": 0}]})
    monkeypatch.setattr(cost, "_in_own_process", lambda *job: made.append(job[:3]) or {"operations": len(made)})
    ids = ["raw-attention", "attention-rollout"]
    cost.measure(ids)
    assert made == [(ids[0], "vitx", {}), (ids[0], "vitx", {"layer": 0}), (ids[1], "vitx", {})]
    written = cost.RESULT.read_text()
    assert cost.measure(ids[:1]) == json.loads(written)
    assert len(made) == 3
    assert cost.RESULT.read_text() == written, "where nothing was measured, nothing is written"
    cost.measure(ids, repeats=7)
    assert len(made) == 6


def test_a_run_that_is_stopped_loses_no_row(tmp_path):
    """Rows that the run had not come to yet stay as they were; rows of methods that are gone do not."""
    path = tmp_path / "rows.json"
    first, second = ({"method": id, "key": "old"} for id in ("grad-cam", "raw-attention"))
    bench.measure_rows("x", [(row, lambda: {"value": 1}) for row in (second, first)], path, {})
    content = json.loads(path.read_text())
    assert [row["method"] for row in content["rows"]] == ["grad-cam", "raw-attention"], "in the catalogue's order"
    path.write_text(json.dumps(content | {"rows": [*content["rows"], {"method": "gone", "key": "old"}]}))

    def stop():
        raise KeyboardInterrupt

    jobs = [(first | {"key": "new"}, lambda: {"value": 2}), (second | {"key": "new"}, stop)]
    with pytest.raises(KeyboardInterrupt):
        bench.measure_rows("x", jobs, path, {})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["key"], row["value"]) for row in rows] == [
        ("grad-cam", "new", 2),
        ("raw-attention", "old", 1),
    ]


def test_a_failure_is_a_row_with_its_reason(monkeypatch):
    sent = []
    monkeypatch.setattr(cost, "_runner", lambda id, by: print)

    class Sender:
        send = staticmethod(sent.append)

    monkeypatch.setattr(cost, "_costs", lambda run, repeats: 1 / 0)
    cost._measure_one("raw-attention", "vitx", {}, 1, Sender())
    assert sent == [{"failed": "ZeroDivisionError: division by zero"}]


def test_correlation_of_maps():
    draw = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(metrics.correlation(draw, 3 * draw + 1), torch.ones(4))
    assert torch.allclose(metrics.correlation(draw, -draw), -torch.ones(4))
    assert metrics.correlation(draw, torch.ones(4, 5, 5)).tolist() == [0] * 4


def test_differences_compare_an_option_with_the_default(monkeypatch, tmp_path):
    """The layer of raw attention as the option: the last layer is the default, so it changes nothing."""
    entries = catalog.load()
    one = {"paper": "p", "code": "c", "repository": "https://a.example/b", "commit": "0123456", "function": "f"}
    options = [{"layer": -1}, {"layer": 0}]
    differences = tuple(Difference(**one, options=option) for option in options)  # pyright: ignore[reportArgumentType]
    entry = entries.methods["raw-attention"].model_copy(update={"differences": differences})
    monkeypatch.setattr(catalog, "load", lambda: entries._replace(methods=entries.methods | {entry.id: entry}))
    loaded = models.load("glyph")
    monkeypatch.setattr(models, "load", lambda *_: loaded)
    monkeypatch.setattr(compare, "photographs_tensor", lambda: glyphs.normalise(glyphs.scenes(2, 3).images))
    path = tmp_path / "differences.json"
    result = bench.differences(["raw-attention"], scenes=2, path=path)
    same, other = result["rows"]
    assert (same["method"], same["options"]) == (entry.id, {"layer": -1})
    assert same["glyph"] == same["photo"] == {"mean": 1.0, "smallest": 1.0}
    monkeypatch.setattr(bench, "heatmap", lambda *_: pytest.fail("measured again"))
    assert bench.differences(["raw-attention"], scenes=2, path=path)["rows"] == json.loads(path.read_text())["rows"]
    assert other["glyph"]["smallest"] <= other["glyph"]["mean"] < 0.999


def test_a_method_with_a_model_of_its_own_is_compared_on_that_model(tmp_path, monkeypatch):
    one = {"paper": "p", "code": "c", "repository": "https://a.example/b", "commit": "0123456", "function": "f"}
    difference = Difference(**one, options={"layer": 0})  # pyright: ignore[reportArgumentType]
    entries = catalog.load()
    update = {"differences": (difference,), "model": "own-glyph"}
    entry = entries.methods["raw-attention"].model_copy(update=update)
    monkeypatch.setattr(catalog, "load", lambda: entries._replace(methods=entries.methods | {entry.id: entry}))
    monkeypatch.setattr(compare, "photographs_tensor", lambda: glyphs.normalise(glyphs.scenes(2, 3).images))
    loaded, asked = models.load("glyph"), []
    monkeypatch.setattr(models, "load", lambda name: asked.append(name) or loaded)
    (row,) = bench.differences([entry.id], scenes=1, path=tmp_path / "differences.json")["rows"]
    assert set(asked) == {"own-glyph"}
    assert row["photographs"] == 0
    assert "glyph" in row
    assert "photo" not in row


@pytest.mark.parametrize(("id", "by"), [(id, by) for id, libraries in peers.PEERS.items() for by in libraries])
def test_peers_run_as_the_cost_table_runs_them(id, by):
    """On a shallow model of the same grid; the result is a map of every picture."""
    assert by in peers.installed(id), "the test extra installs every peer"
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=16, embed_dim=8, depth=2, num_heads=2
    ).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    result = peers.PEERS[id][by](model, images, torch.tensor([3, 5]))
    assert len(result) == 2
    assert torch.as_tensor(result).shape[-2:] == (224, 224)


def test_ground_truth_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "glyph.json"
    first = bench.glyph_truth(["raw-attention", "grad-cam"], scenes=4, path=path)
    assert [row["method"] for row in first["rows"]] == ["grad-cam", "raw-attention", "random", "object-mask"]
    assert all(row["scenes"] == 4 for row in first["rows"])
    asked, score = [], bench._score

    def scored(name, *rest):
        asked.append(name)
        return score(name, *rest)

    monkeypatch.setattr(bench, "_score", scored)
    again = bench.glyph_truth(["raw-attention", "cdam"], scenes=4, path=path)
    assert asked == ["cdam"]
    assert json.loads(path.read_text()) == again
    assert {row["method"]: row["mass_inside"] for row in first["rows"]}.items() <= {
        row["method"]: row["mass_inside"] for row in again["rows"]
    }.items()
    bench.glyph_truth(["raw-attention"], scenes=6, path=path)
    assert asked == ["cdam", "raw-attention", "random", "object-mask"]
    truth = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert truth["object-mask"]["mass_inside"] > 0.7 > 0.3 > truth["random"]["mass_inside"]


def test_a_map_of_what_counts_agrees_on_the_parts(tmp_path, monkeypatch):
    """Relevance that is itself the fall of the model's score without each part scores 1, and its negative -1."""
    model = models.load("glyph").model

    def falls(name, drawn, batch):
        with torch.no_grad():
            labels = drawn.labels[:, :1]

            def log(x):
                return model(glyphs.normalise(x)).log_softmax(1).gather(1, labels)[:, 0]

            of_parts = torch.stack([log(drawn.images) - log(glyphs.without_part(drawn, p)) for p in glyphs.PARTS], 1)
        share = glyphs.patch_fraction(drawn.part_masks[:, 0], (14, 14)).flatten(2).double()  # (B, 5, 196)
        wanted = of_parts.double() * (1 if name == "grad-cam" else -1)
        found = torch.linalg.pinv(share) @ wanted[..., None]  # a map with just that much on every part
        return found[..., 0].unflatten(1, (14, 14)).float()

    monkeypatch.setattr(bench, "maps", falls)
    rows = bench.balance(["grad-cam", "raw-attention"], scenes=8, path=tmp_path / "balance.json")["rows"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["grad-cam"]["parts"] > 0.99
    assert by_method["raw-attention"]["parts"] < -0.99
    assert by_method["grad-cam"]["accuracy"] > 0.8


def test_methods_are_scored_only_where_the_model_names_the_creatures():
    """A pose model finds parts, a video model forgeries: no creature can be asked for."""
    scored, entries = bench.heat_map_methods(), catalog.load()
    assert {"grad-cam", "clip-surgery", "saev"} <= set(scored)
    assert not {"transpose", "istvt", "covid-transformer", "x-pruner"} & set(scored)
    for id in scored:
        assert models.load(entries.methods[id].model).class_names == glyphs.CLASS_NAMES

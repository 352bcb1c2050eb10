"""What the pruning table measures: shares of the full model, and the evidence among the patches that live."""

import pytest
import torch
from vitx import catalog, glyphs, models, pruned


def test_a_method_that_keeps_all_is_the_full_model(monkeypatch, tmp_path):
    methods = catalog.load().methods
    entry = methods["evit"].model_copy(update={"rates": ({"keep_rate": 1.0}, {"keep_rate": 0.5})})
    monkeypatch.setitem(methods, "evit", entry)
    full, half = pruned.measure(["evit"], scenes=32, repeats=1, path=tmp_path / "pruned.json")["rows"]
    assert full["accuracy"] == full["plain_accuracy"] > 0.9
    assert full["operations"] == pytest.approx(1, abs=1e-3)
    assert full["agreement"] == pytest.approx(1, abs=1e-3)
    assert full["tokens"] == full["recall"] == 1
    assert 0.3 < half["operations"] < 0.8
    assert 0.05 < half["tokens"] < 0.3
    assert half["agreement"] < 0.99
    with pytest.raises(ValueError, match=r"grad-cam has no rates to measure; these have: .*, dynamicvit,"):
        pruned.measure(["grad-cam"])


def test_evidence():
    inside = torch.tensor([[[1.0, 0.5], [0, 0]], [[0, 0], [0, 1.0]]])
    alive = torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]])
    found = pruned.evidence(alive, inside)
    assert found["tokens"] == 0.5
    assert found["precision"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["recall"] == pytest.approx((1 / 1.5 + 1) / 2)


def test_occlusion_is_that_of_the_snippet():
    """The same numbers as the method occlusion with logits, for any function from pictures to logits."""
    import vitx

    scenes = glyphs.scenes(2, 5)
    images, labels = glyphs.normalise(scenes.images), scenes.labels[:, 0]
    model = models.load("glyph").model
    with torch.inference_mode():
        ours = pruned.occlusion(model, images, labels)
    theirs = vitx.load("occlusion")(model, images, labels, score="logit")
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_operations_count_plain_attention():
    model = models.load("glyph").model
    images = torch.zeros(2, 3, 112, 112)
    whole = pruned.operations(model, images, model)
    tokens, width, hidden = 197, 128, 256
    block = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width
    ends = 2 * 196 * 192 * width + 2 * width * 12
    assert whole == 2 * (6 * block + ends)
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))

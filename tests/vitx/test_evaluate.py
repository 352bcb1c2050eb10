"""Each quantity is computed once, announced passes are the passes made, and what is missing is said."""

import pytest
import torch
from helpers import pictures, variant
from vitx import evaluate, glyphs, load, models
from vitx.evaluate import Settings, Study, Unavailable

SMALL = Settings(pictures=6, few=2, cheap=-1, steps=5, masking="drop")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Counter:
    """Pictures that pass the first block of a model, and those that ``explain`` is asked about."""

    def __init__(self, model):
        self.passes, self.explained = 0, 0
        model.blocks[0].register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.passes += len(args[0])

    def explain(self, model, images, target):
        self.explained += len(images)
        return images.mean(1).unflatten(1, (14, -1)).unflatten(3, (14, -1)).mean((2, 4)) + target[:, None, None]


def test_one_computation_for_all_criteria():
    known = evaluate.given(SMALL, 0, 2)
    known["model"] = models.load("glyph").model
    counter = Counter(known["model"])
    study = Study(explain=counter.explain, **known)
    for _ in range(2):
        for name in evaluate.criteria():
            study.apply(evaluate.function_of(name))
    per_picture = 1 + evaluate.COPIES + 5 + 4  # itself, noise, stages of random weights, other class, mosaics, pair
    twin_and_cost = 2 + 1  # by the twin; one picture whose operations are counted
    assert counter.explained == 2 * per_picture + twin_and_cost
    announced = sum(evaluate.shared_passes(evaluate.criteria(), SMALL).values()) / SMALL.pictures * 2
    announced += 2 * (2 * (SMALL.steps - 1) + evaluate.BANDS + 9 + 1 + len(glyphs.PARTS) + evaluate.COPIES)
    assert counter.passes == announced + 1  # the one whose operations are counted


def test_the_plan_is_what_happens(monkeypatch):
    """A baseline explains for nothing, so all its passes are those of removal."""
    model = models.load("glyph").model
    counter = Counter(model)
    loaded = models.load("glyph")._replace(model=model)
    monkeypatch.setattr(evaluate, "_model", lambda name, device="cpu": loaded if name == "glyph" else models.load(name))
    evaluate.opened_data.cache_clear()
    for job in evaluate.shared_jobs(evaluate.criteria(), SMALL):
        evaluate.share(job, SMALL)
    assert counter.passes == sum(evaluate.shared_passes(evaluate.criteria(), SMALL).values())
    assert evaluate.shared_jobs(evaluate.criteria(), SMALL) == []
    counter.passes = 0
    wanted = [*evaluate.criteria(), *evaluate.SERIES]
    found = dict(evaluate.rows("random", wanted, SMALL))
    again = evaluate.counts("random", SMALL)[1]
    counting = len(list(evaluate.chunks(SMALL.pictures, again)))  # one pass for the cost, in each chunk
    assert counter.passes == sum(evaluate.plan("random", wanted, SMALL).values()) + counting
    evaluate.opened_data.cache_clear()
    assert len(found["deletion"]) == 6
    assert len(found["mprt"]) == 2
    assert len(found["curve_most_first"][0]) == SMALL.steps + 1


def test_rows_do_not_depend_on_what_else_is_asked():
    together = dict(evaluate.rows("raw-attention", ["deletion", "pointing-game", "mprt"], SMALL))
    alone = dict(evaluate.rows("raw-attention", ["mprt"], SMALL))
    assert together["mprt"] == alone["mprt"]
    assert together == dict(evaluate.rows("raw-attention", ["deletion", "pointing-game", "mprt"], SMALL))


def test_the_true_mask_is_the_ceiling_and_says_what_it_cannot():
    found = dict(evaluate.rows("object-mask", ["pointing-game", "attribution-localisation", "mprt"], SMALL))
    assert found["pointing-game"] == [[1.0]] * 6
    shares = torch.tensor(found["attribution-localisation"])
    assert shares.min() > 0.6  # patches at its border are shared
    assert found["mprt"] == "the true mask explains no model"


def test_random_maps():
    loaded = models.load("glyph")
    x = glyphs.normalise(glyphs.scenes(2, 3).images)
    target = torch.tensor([1, 2])
    explain = evaluate.explainer("random")
    both = explain(loaded.model, x, target)
    assert torch.equal(both, explain(loaded.model, x, target))
    assert torch.equal(both[1:], explain(loaded.model, x[1:], target[1:]))
    assert not torch.equal(both, explain(loaded.model, x, target + 1))
    assert not torch.equal(both, explain(models.load("random-labels-glyph").model, x, target))


def test_a_method_that_refuses_is_skipped_with_its_sentence(monkeypatch):
    def refuse(model, images, target):
        raise ValueError("this method wants larger pictures.")

    monkeypatch.setattr(evaluate, "explainer", lambda method: refuse)
    monkeypatch.setattr(evaluate, "explanation_passes", lambda method: 1.0)
    found = dict(evaluate.rows("raw-attention", ["deletion", "explanation-cost"], SMALL))
    assert found == dict.fromkeys(("deletion", "explanation-cost"), "this method wants larger pictures")


@pytest.mark.parametrize(
    ("passes", "expected"), [(0, (128, 128)), (20, (128, 128)), (21, (128, 16)), (200, (128, 16)), (201, (32, 8))]
)
def test_costly_methods_see_fewer_pictures(passes, expected, monkeypatch):
    monkeypatch.setattr(evaluate, "explanation_passes", lambda method: passes)
    assert evaluate.counts("rise", Settings()) == expected


def test_chunks():
    assert list(evaluate.chunks(40, 20)) == [(0, 16), (16, 20), (20, 32), (32, 40)]
    assert list(evaluate.chunks(16, 16)) == [(0, 16)]
    assert list(evaluate.chunks(4, 4)) == [(0, 4)]


def test_keys_change_with_what_they_depend_on():
    key = evaluate.identity("raw-attention", "deletion", SMALL)
    assert key == evaluate.identity("raw-attention", "deletion", SMALL)
    others = {
        evaluate.identity("raw-attention", "insertion", SMALL),
        evaluate.identity("grad-cam", "deletion", SMALL),
        evaluate.identity("raw-attention", "deletion", SMALL._replace(steps=6)),
        evaluate.identity("raw-attention", "deletion", SMALL._replace(masking="mean")),
        evaluate.identity("raw-attention", "deletion", SMALL._replace(pictures=7)),
        evaluate.identity("raw-attention", "curve_most_first", SMALL),
    }
    assert len(others | {key}) == 7


def test_measure_for_a_reader():
    model = variant("vit_tiny_patch16_224")
    x = pictures(model, 2)
    by_method = evaluate.measure("deletion", model, x, explain=load("raw-attention"), masking="drop", steps=4)
    by_map = evaluate.measure("deletion", model, x, relevance=load("raw-attention")(model, x), masking="drop", steps=4)
    assert torch.equal(by_method, by_map)
    with torch.no_grad():
        predicted = model(x).argmax(1)
    given = evaluate.measure("deletion", model, x, predicted, explain=load("raw-attention"), masking="drop", steps=4)
    assert torch.equal(given, by_map)
    with pytest.raises(Unavailable, match="pointing-game cannot be measured: the place of the object is not known"):
        evaluate.measure("pointing-game", model, x, explain=load("raw-attention"))
    with pytest.raises(Unavailable, match="mprt cannot be measured: it explains again, and a finished map cannot"):
        evaluate.measure("mprt", model, x, relevance=by_map.new_zeros(2, 4, 4))


def test_a_method_that_computes_long_after_its_pass_is_counted_by_its_time(monkeypatch):
    settings = evaluate.Settings()
    monkeypatch.setattr(evaluate, "explanation_passes", lambda method: 1.0)
    monkeypatch.setattr(evaluate, "_time_in_passes", lambda: {"slow": 50.0, "endless": 500.0, "plain": 3.0})
    assert evaluate.counts("plain", settings) == (settings.pictures, settings.pictures)
    assert evaluate.counts("slow", settings) == (settings.pictures, settings.few)
    assert evaluate.counts("endless", settings) == (settings.pictures // 4, settings.few // 2)


def test_few_criteria_ask_for_little():
    """No series and no shared quantity that a criterion does not read."""
    assert evaluate.series(["deletion"]) == ["curve_most_first", "maps"]
    assert evaluate.series(["pointing-game"]) == ["maps"]
    assert evaluate.series(evaluate.criteria()) == [*evaluate.SERIES]
    assert "shapley" not in evaluate.shared_passes(["deletion"], SMALL)
    assert "shapley" in evaluate.shared_passes(["shapley-agreement"], SMALL)

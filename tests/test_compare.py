"""Comparing models: the statistics against SciPy and closed forms, and what a comparison refuses."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.analysis.compare import (
    AgreementTask,
    Drop,
    Task,
    compare_models,
    latency,
    mcnemar,
    paired_bootstrap,
    plot_comparison,
    run_model,
    verdict,
)
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.similarity import similarity
from calib_nb.graph.build import network
from calib_nb.graph.contract import open_session, session_threads

fixed = settings(derandomize=True)
finite = st.floats(-1e3, 1e3, allow_subnormal=False)


def linear(path, weight, bias=0.0):
    """output = flatten(input) @ weight + bias, for an input of 1x3x4x4, as a file."""
    text, constants = "f = Flatten (input); output = Gemm (f, w, b)", {"w": weight, "b": np.full(weight.shape[1], bias)}
    return network(text, inputs={"input": (1, 3, 4, 4)}, **constants).save(path)


def scale(bgr):
    return (bgr.astype(np.float32) / 255).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    weight = rng.normal(size=(48, 6))
    return {
        "float": linear(folder / "float.onnx", weight),
        "near": linear(folder / "near.onnx", weight + rng.normal(0, 0.01, weight.shape)),
        "far": linear(folder / "far.onnx", weight + rng.normal(0, 1, weight.shape)),
    }


@pytest.fixture(scope="module")
def task():
    return AgreementTask(list(np.random.default_rng(1).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)), scale)


class Score:
    """A task of given numbers: metric "score" is a function of the column "score"."""

    name, primary, samples = "score", "score", ()

    def __init__(self, statistic=np.mean, higher_is_better=True):
        self.statistic, self.higher_is_better = statistic, higher_is_better

    def metrics(self, units):
        return {"score": float(self.statistic(units["score"]))}


def frames(seed, n=120, gap=0.1):
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    return pd.DataFrame({"score": shared}), pd.DataFrame({"score": shared - gap + rng.normal(0, 0.3, n)})


@fixed
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_similarity_is_bounded_and_full_for_equal_tensors(pairs):
    x, y = np.array(pairs).T
    cosine, sqnr_db = similarity(x, y)
    assert -1 <= cosine <= 1 and -120 <= sqnr_db <= 120 and similarity(x, x) == (1.0, 120.0)


@fixed
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(0.01, 0.9))
def test_sqnr_of_a_scaled_tensor_is_known(values, error):
    cosine, sqnr_db = similarity(np.array(values), np.array(values) * (1 + error))
    assert np.isclose(cosine, 1) and np.isclose(sqnr_db, -20 * np.log10(error))


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_is_scipys(statistic, sign):
    a, b = frames(0)
    ours = paired_bootstrap(Score(statistic, sign > 0), a, b, resamples=2000)
    theirs = scipy.stats.bootstrap(
        (a.score, b.score),
        lambda x, y: sign * (statistic(x) - statistic(y)),
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert np.isclose(ours.value, sign * (statistic(a.score) - statistic(b.score)))
    assert np.allclose([ours.low, ours.high], [theirs.low, theirs.high], atol=0.15 * width)


def test_the_interval_of_a_mean_is_the_normal_one():
    a, b = frames(3, n=2000)
    difference = a.score - b.score
    half = 1.96 * difference.std() / np.sqrt(len(difference))
    drop = paired_bootstrap(Score(), a, b, resamples=4000)
    assert np.isclose(drop.value, difference.mean()) and np.isclose(drop.high - drop.low, 2 * half, rtol=0.06)


def test_pairing_makes_the_interval_short():
    a, b = frames(4)
    shuffled = b.sample(frac=1, random_state=0).reset_index(drop=True)
    paired, unpaired = (paired_bootstrap(Score(), a, x) for x in (b, shuffled))
    assert np.isclose(paired.value, unpaired.value) and paired.high - paired.low < 0.4 * (unpaired.high - unpaired.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = [
        (d := paired_bootstrap(Score(), *frames(seed, n=80, gap=0.1), resamples=300, seed=seed)).low <= 0.1 <= d.high
        for seed in range(200)
    ]
    assert 0.89 <= np.mean(covered) <= 0.99


def test_a_column_of_the_metrics_name_that_is_not_its_mean_does_not_mislead():
    a, b = frames(5)
    biased = Score(lambda x: np.mean(x) + np.max(x))
    assert np.isclose(
        paired_bootstrap(biased, a, b).value, (a.score.mean() + a.score.max()) - (b.score.mean() + b.score.max())
    )


def test_seed_decides_the_interval():
    a, b = frames(6)
    assert (
        paired_bootstrap(Score(), a, b, seed=1)
        == paired_bootstrap(Score(), a, b, seed=1)
        != paired_bootstrap(Score(), a, b, seed=2)
    )
    with pytest.raises(InputError, match="0 scoring units"):
        paired_bootstrap(Score(), a[:0], b[:0])


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial(pairs):
    before, after = np.array(pairs).T
    lost, gained, p = mcnemar(before, after)
    n, k = lost + gained, min(lost, gained)
    assert lost - gained == before.sum() - after.sum()
    assert np.isclose(p, min(1, 2 * scipy.stats.binom.cdf(k, n, 0.5)) if n else 1)


@fixed
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1))
def test_the_verdict_follows_the_interval(value, below, above, budget):
    drop = Drop(value, value - below, value + above)
    assert (
        verdict(drop, budget)
        == ("within budget" if drop.high <= budget else "over budget" if drop.low > budget else "undecided")
        and verdict(drop, None) == "measured"
    )


def test_a_comparison_has_its_columns(models, task):
    int8 = {name: models[name] for name in ("near", "far")}
    comparison = compare_models(models["float"], int8, task, budget=0.01, latency_runs=3, progress=False)
    assert isinstance(task, Task)
    assert list(comparison.table.columns) == [
        "model",
        "cosine",
        "cosine_min",
        "sqnr_db",
        "top1_agreement",
        "drop",
        "drop_low",
        "drop_high",
        "verdict",
        "worst_slice",
        "worst_slice_drop",
        "int8_share",
        "size_mb",
        "latency_ms",
        "latency_iqr_ms",
        "threads",
    ]
    assert list(comparison.table.model) == ["float", "near", "far"] and list(comparison.table.verdict) == [
        "reference",
        "within budget",
        "unusable",
    ]
    assert not comparison.passed
    assert (
        comparison.table.threads.eq(session_threads(2)).all()
        and (comparison.table.latency_ms.isna() | comparison.table.latency_ms.gt(0)).all()
        and {k: len(u) for k, u in comparison.units.items()} == {"float": 40, "near": 40, "far": 40}
    )
    timing = ["latency_ms", "latency_iqr_ms"]
    again = compare_models(models["float"], int8, task, budget=0.01, latency_runs=3, progress=False)
    pd.testing.assert_frame_equal(comparison.table.drop(columns=timing), again.table.drop(columns=timing))
    ax = plot_comparison(comparison)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["far", "near"]


def test_agreement_takes_the_worst_output():
    good, bad = np.array([[1.0, 2.0]]), np.array([[2.0, -1.0]])
    units = AgreementTask([], scale).units([{"a": good, "b": bad}], [{"a": good, "b": good}])
    assert np.isclose(units.cosine[0], 0) and units.top1_agreement[0] == 0
    maps = AgreementTask([], scale).units([{"a": np.ones((1, 2, 3, 3))}], [{"a": np.ones((1, 2, 3, 3))}])
    assert list(maps.columns) == ["cosine", "sqnr_db"]  # no top-1 for feature maps


def test_nan_is_an_error_that_names_the_image(models, tmp_path, task):
    import cv2

    cv2.imwrite(str(tmp_path / "image.png"), task.samples[0])
    broken = linear(tmp_path / "nan.onnx", np.ones((48, 6)), bias=np.nan)
    with pytest.raises(ModelError, match="sample image.png: output 'output' holds NaN"):
        run_model(open_session(broken), AgreementTask([tmp_path / "image.png"], scale), progress=False)
    with pytest.raises(ModelError, match="sample number 0"):
        compare_models(models["float"], {"broken": broken}, task, progress=False)


def test_what_does_not_fit_is_refused(models, tmp_path, task):
    with pytest.raises(InputError, match="at least one of each"):
        compare_models(models["float"], {}, task)
    with pytest.raises(InputError, match="0 samples"):
        compare_models(models["float"], {"near": models["near"]}, AgreementTask([], scale))
    with pytest.raises(ModelError, match="no such model"):
        compare_models(models["float"], {"gone": tmp_path / "gone.onnx"}, task)
    with pytest.raises(ModelError, match="does the preprocessing fit"):
        compare_models(
            models["float"],
            {"near": models["near"]},
            AgreementTask([np.zeros((8, 8, 3), np.uint8)], scale),
            progress=False,
        )


def test_an_int8_model_of_another_shape_is_an_error(models, tmp_path, task):
    other = linear(tmp_path / "other.onnx", np.ones((48, 3)))
    with pytest.raises(ModelError, match=r"output 'output' has shape \[1, 3\]; expected \[1, 6\]"):
        compare_models(models["float"], {"other": other}, task, progress=False)


def test_latency_is_measured_in_turns():
    calls = []

    class Session:
        def __init__(self, name):
            self.name = name

        def get_inputs(self):
            return [type("I", (), {"name": "x"})]

        def run(self, names, feed):
            calls.append(self.name)

    table = latency({"a": Session("a"), "b": Session("b")}, np.zeros(1), runs=12, warmup=2)
    assert calls == ["a"] * 12 + ["b"] * 12 + ["a"] * 4 + ["b"] * 4 and list(table.index) == ["a", "b"]


def test_a_difference_within_the_spread_is_not_measurable(monkeypatch):
    """Medians of 10, 11 and 20 ms with a spread of 4 ms: the second says nothing, the third does."""
    clock = [0.0]
    monkeypatch.setattr("calib_nb.analysis.compare.time.perf_counter", lambda: clock[0])

    class Session:
        def __init__(self, ms):
            self.ms, self.turn = ms, 0

        def get_inputs(self):
            return [type("I", (), {"name": "x"})]

        def run(self, names, feed):
            self.turn += 1
            clock[0] += (self.ms + (-2, 0, 2)[self.turn % 3]) / 1000

    sessions = {"float": Session(10), "alike": Session(11), "slow": Session(20)}
    table = latency(sessions, np.zeros(1), runs=9, warmup=0)
    assert np.allclose(table.latency_iqr_ms, 4) and np.allclose(table.latency_ms[["float", "slow"]], [10, 20])
    assert np.isnan(table.latency_ms["alike"])


@pytest.mark.parametrize(
    "name, shape", [("embedding", (1, 512)), ("y", (1, 128)), ("features", (1, 10)), ("y", (1, 4, 4))]
)
def test_the_largest_number_of_an_embedding_is_no_answer(name, shape):
    task, rng = AgreementTask([], scale), np.random.default_rng(0)
    reference = [{name: rng.normal(size=shape)} for _ in range(3)]
    assert list(task.units(reference, reference).columns) == ["cosine", "sqnr_db"]
    scores = [{"class_scores": rng.normal(size=(1, 128))} for _ in range(3)]
    assert list(task.units(scores, scores).top1_agreement) == [1, 1, 1]

"""Ranges: each method against its definition and ONNX Runtime's calibrators, subsets, bootstrap, choice of images."""

import contextlib
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.core.errors import InputError
from calib_nb.data.images import find_images
from calib_nb.data.preprocess import preset
from calib_nb.graph.fixed import fix_batch
from calib_nb.quant.coverage import CoverOptions, choose_cover
from calib_nb.quant.kernels import entropy_threshold
from calib_nb.quant.observe import network_input, observe
from calib_nb.quant.ranges import (
    RANGE_METHODS,
    ema,
    iqr,
    kl,
    magnitudes,
    minmax,
    mse,
    mse_range,
    order_sensitivity,
    percentile,
    ranges,
    weighted_counts,
)
from calib_nb.quant.stability import (
    activation_coverage,
    advise_by_metric,
    advise_images,
    recommended_images,
    resampled_ranges,
    stability_table,
    tensor_stability,
)
from calib_nb.quant.stats import collect

# float32 cannot scale subnormal numbers exactly
floats = st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-60)
pools = st.lists(hnp.arrays(np.float32, st.integers(1, 60), elements=floats), min_size=1, max_size=8)


def pool(pieces, **more):
    """Statistics of images with tensor x from `pieces`, and further tensors."""
    images = [
        {"x": np.asarray(piece, np.float32)} | {k: v[i] for k, v in more.items()} for i, piece in enumerate(pieces)
    ]
    return collect((f"p{i:03}", tensors) for i, tensors in enumerate(images))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)

    def image(i):
        bell = rng.normal(0, rng.uniform(0.7, 1.4), 3000)
        return {
            "bell": bell,
            "relu": np.maximum(bell, 0),
            "tail": rng.standard_t(3, 3000),
            "shifted": rng.uniform(5, 6, 500),
            "zero": np.zeros(9),
            "constant": np.full(9, -2.5),
            "one": np.array([rng.normal()]),
        }

    return [(f"p{i:03}", {k: v.astype(np.float32) for k, v in image(i).items()}) for i in range(50)]


@pytest.fixture(scope="module")
def stats(images):
    return collect(images)


@given(pools)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_method_gives_a_range_within_what_was_seen(pieces):
    stats = pool(pieces)
    every = np.concatenate(pieces).astype(np.float64)
    for method in RANGE_METHODS:
        low, high = ranges(stats, method).loc["x"]
        assert np.isfinite([low, high]).all() and low <= high
        slack = 1e-6 * np.abs(every).max()  # some roundings of float32
        least, greatest = (min(every.min(), 0), max(every.max(), 0)) if method == "mse" else (every.min(), every.max())
        assert least - slack <= low and high <= greatest + slack
    assert (
        minmax(stats).loc["x"].tolist()
        == [every.min(), every.max()]
        == percentile(stats, percentile=100).loc["x"].tolist()
    )


@given(pools, st.sampled_from([60.0, 99.0, 99.9, 99.99]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_percentile_never_cuts_more_than_asked(pieces, share):
    low, high = percentile(pool(pieces), percentile=share).loc["x"]
    every = np.concatenate(pieces)
    for cut in ((every < low).sum(), (every > high).sum()):
        assert cut <= (100 - share) / 200 * every.size * (1 + 1e-9)


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_edge_cases(stats, method):
    table = ranges(stats, method)
    assert list(table.columns) == ["low", "high"] and (table.dtypes == np.float64).all()
    assert table.index.name == "tensor" and list(table.index) == list(stats.tensors)
    assert table.loc["zero"].tolist() == [0, 0] and table.loc["relu", "low"] == 0
    assert table.loc["constant"].tolist() == ([-2.5, 0] if method == "mse" else pytest.approx([-2.5, -2.5], abs=0))
    low, high = table.loc["shifted"]
    assert 5 <= high <= 6 and (low == 0 if method == "mse" else low >= 5)
    single, value = ranges(stats, method, images=["p007"]), stats.max[6, 7]
    assert (single.low <= single.high).all()
    wanted = pytest.approx(max(0, value), rel=0.01) if method == "mse" else pytest.approx(value)
    assert single.loc["one", "high"] == wanted


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_all_images_named_are_all_images(stats, method):
    assert ranges(stats, method, images=list(stats.images)).equals(ranges(stats, method))
    twice = ranges(stats, method, images=list(stats.images) * 2)
    assert np.allclose(twice, ranges(stats, method), rtol=0.02 if method == "ema" else 1e-6)


@pytest.mark.parametrize("method", ["minmax", "ema", "iqr"])
def test_extremes_of_some_images_are_exact(images, stats, method):
    some = ["p031", "p002", "p040", "p003", "p017"]
    kept = dict(images)
    alone = collect([(f"{k}", kept[name]) for k, name in enumerate(some)])
    assert np.array_equal(ranges(alone, method), ranges(stats, method, images=some))


@pytest.mark.parametrize("method", ["kl", "percentile", "mse"])
def test_histogram_methods_of_some_images_are_near(images, stats, method):
    kept = dict(images)
    for seed in range(3):
        some = list(np.random.default_rng(seed).choice(stats.images, 20, replace=False))
        true = ranges(collect([(name, kept[name]) for name in some]), method)
        estimate = ranges(stats, method, images=some)
        width = (minmax(stats, some).high - minmax(stats, some).low).clip(lower=1e-9)
        off = ((true - estimate).abs().max(axis=1) / width).drop(["one"])
        assert off.max() < 0.25 and off.median() < 0.03, off


def test_a_subset_estimate_keeps_total_and_extremes(stats):
    weights = np.zeros(50)
    weights[[3, 8, 21]] = 1, 2, 1
    for name in stats.tensors:
        counts, edges, low, high = weighted_counts(stats, name, weights)
        t = stats.index(name)
        assert (low, high) == (stats.min[t, [3, 8, 21]].min(), stats.max[t, [3, 8, 21]].max())
        assert counts.sum() == pytest.approx(stats.histogram(name)[0].sum() * 4 / 50) and (counts >= 0).all()
        assert not counts[edges[:-1] > high].any() and not counts[edges[1:] <= low].any()


def test_ema_is_a_true_moving_average(stats):
    for constant in (0.01, 0.3):
        for order in (list(stats.images), list(stats.images)[::-1]):
            rows = [stats.images.index(name) for name in order]
            expected = pd.DataFrame(stats.min.T[rows].astype(float)).ewm(alpha=constant, adjust=True).mean().iloc[-1]
            assert np.allclose(ema(stats, order, constant=constant).low, expected, rtol=1e-12)
    assert not np.allclose(ema(stats), ema(stats, list(stats.images)[::-1]), rtol=1e-6), "the order matters"
    spread = order_sensitivity(stats, constant=0.05)
    assert (spread.spread >= 0).all() and spread.loc["zero", "spread"] == 0
    assert order_sensitivity(stats, constant=0.05).equals(spread)


def test_iqr_leaves_out_the_wild_image_and_nothing_when_all_are_alike():
    rng = np.random.default_rng(0)
    alike = [rng.uniform(-1, 1, 2000) for _ in range(40)]
    assert np.allclose(iqr(pool(alike)), minmax(pool(alike)), rtol=0.01)
    assert iqr(pool([*alike, np.append(alike[0], [70, -80])])).abs().to_numpy().max() < 1.001
    assert iqr(pool(alike[:1])).equals(minmax(pool(alike[:1])))


def definition_of_kl(counts, levels):
    """pytorch-quantization's search, bin by bin: the threshold index with the least divergence."""
    from scipy.stats import entropy

    counts = counts.astype(float)
    counts[0] = counts[1]
    divergences = {}
    for keep in range(levels, len(counts) + 1):
        p = counts[:keep].copy()
        p[-1] += counts[keep:].sum()
        group = np.searchsorted(np.arange(1, levels + 1) * keep // levels, np.arange(keep), side="right")
        occupied = p > 0
        q = np.bincount(group, counts[:keep], levels) / np.maximum(np.bincount(group, occupied, levels), 1)
        divergences[keep] = entropy(p, np.where(occupied, q[group], 0))
    return divergences


@pytest.mark.parametrize("shape", ["bell", "relu", "tail"])
def test_kl_is_the_minimum_of_its_definition(stats, shape):
    folded, _ = magnitudes(*stats.histogram(shape), most=512)
    slow = definition_of_kl(folded, 128)
    folded[0] = folded[1]
    assert slow[entropy_threshold(folded, 128, 1, 1.0)] == pytest.approx(min(slow.values()), rel=1e-9)


def test_kl_does_not_drop_what_lies_away_from_zero():
    rng = np.random.default_rng(0)
    far = pool([np.append(rng.uniform(0.5, 1, 3000), 0.1) for _ in range(5)])
    assert kl(far).loc["x", "high"] > 0.98 and kl(far, most_clipped=1.0).loc["x", "high"] < 0.2


def test_mse_is_near_the_best_of_a_fine_search(images, stats):
    for name, bits, symmetric in (("tail", 4, False), ("tail", 8, True), ("relu", 4, False), ("bell", 6, True)):
        x = np.concatenate([arrays[name] for _, arrays in images]).astype(np.float64)
        steps = 2**bits - (2 if symmetric else 1)

        def error(low, high, steps=steps, x=x):
            step = (high - low) / steps
            return np.mean((x - np.rint(np.clip(x, low, high) / step) * step) ** 2)

        low, high = mse(stats, bits=bits, symmetric=symmetric).loc[name]
        top = np.abs(x).max()
        best = min(
            error(-part * top if symmetric else part * min(x.min(), 0), part * (top if symmetric else x.max()))
            for part in np.linspace(0.02, 1, 99)
        )
        assert error(low, high) <= 1.03 * best
    assert mse_range(np.array([0.0, 4]), np.array([0, 1, 2.0]), 1.0, 2.0)[0] == 0


REFUSED = [
    ("minmx", {}, "did you mean 'minmax'"),
    ("ema", {"constant": 0}, "constant 0"),
    ("ema", {"constant": 1.5}, "constant 1.5"),
    ("percentile", {"percentile": 40}, "percentile 40"),
    ("percentile", {"percentle": 99}, "did you mean 'percentile'"),
    ("mse", {"bits": 1}, "1 bits"),
    ("kl", {"levels": 1}, "1 levels"),
    ("minmax", {"constant": 1}, "unknown option of minmax"),
    ("kl", {"images": ["px"]}, "'px' was not observed"),
    ("iqr", {"images": []}, "no images"),
]


@pytest.mark.parametrize(("method", "options", "match"), REFUSED)
def test_what_is_not_known_is_refused(stats, method, options, match):
    with pytest.raises(InputError, match=match):
        ranges(stats, method, **options)


# --- the number of images


def test_resampling_agrees_with_ranges(stats):
    draws = np.array([[3, 3, 9, 20], [0, 1, 2, 2]])
    for method in RANGE_METHODS:
        options = {"stride": 8} if method == "kl" else {}
        for rows, table in zip(draws, resampled_ranges(stats, method, draws)):
            names = [stats.images[r] for r in rows]
            assert np.allclose(table, ranges(stats, method, images=names, **options))


def test_the_curve_falls_and_recommends(stats):
    curve = stability_table(stats, ("minmax", "ema", "percentile"), replicates=15)
    assert curve.equals(stability_table(stats, ("minmax", "ema", "percentile"), replicates=15)), "same seed, same curve"
    assert (curve.worst_low <= curve.worst).all() and (curve.worst <= curve.worst_high).all()
    assert sorted(set(curve.images)) == [1, 2, 5, 10, 20, 50]
    for _, part in curve.groupby("method"):
        assert part.worst.iloc[-1] < part.worst.iloc[0]
    assert recommended_images(curve, 10.0).eq(1).all() and recommended_images(curve, 0.0).isna().all()
    with pytest.raises(InputError, match="0 replicates|1 replicates"):
        stability_table(stats, replicates=1)


def test_stability_finds_the_tensor_that_hangs_on_few_images():
    rng = np.random.default_rng(0)
    stats = pool(
        [rng.normal(0, 1, 500) for _ in range(60)],
        seldom=[np.float32(rng.normal(0, 30 if i < 2 else 1, 500)) for i in range(60)],
        flat=[np.float32([-1, 0, 1])] * 60,
    )
    table = tensor_stability(stats)
    assert table.index[0] == "seldom" and table.unstable["seldom"]
    assert not table.unstable["flat"] and table.spread["flat"] == 0
    assert (table.width_low <= table.width_high).all()


def test_the_number_of_images_that_is_enough():
    """Alike images: one. A tenth that matters: as many as it takes to meet one of them, or too small a pool to tell."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 200)
    alike, rare = pool([values] * 20), pool([values * (20 if i % 10 == 0 else 1) for i in range(100)])
    assert advise_images(alike, "ema").images == advise_images(alike).images == 1
    advice = advise_images(rare)
    assert 10 <= advice.typical <= advice.images and advice.table.loss_db.iloc[0] > 6
    assert advise_images(rare, seed=3).images == advise_images(rare, seed=3).images
    few = pool([rng.normal(0, 4.0**i, 200) for i in range(8)])
    assert advise_images(few).images is None
    with pytest.raises(InputError, match="3 images, 20 draws"):
        advise_images(pool([np.ones(3)] * 3))


def test_a_metric_that_scatters_gets_no_number_but_its_interval():
    """The number is read from the interval of one further draw; draws of two values have it by hand."""
    names = [f"p{k}" for k in range(100)]
    seen = []

    def score(chosen):
        seen.append(len(chosen))
        return 90 + (0.2 if len(chosen) < 100 and seen.count(len(chosen)) % 2 else 0)

    advice = advise_by_metric(score, names, draws=4)
    row = advice.table.iloc[0]
    scatter = np.std([0.2, 0, 0.2, 0], ddof=1)
    half = 3.182446 * scatter * np.sqrt(1.25)  # Student's 97.5 % at three degrees of freedom
    assert seen == [100, 50, 50, 50, 50] and advice.images is None and advice.every == 90
    assert (row.low, row.high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert f"scatter by {scatter:.2g}, more than that" in str(advice) and "no number up to 50" in str(advice)
    steady = advise_by_metric(lambda chosen: 90 + (len(chosen) < 20), names, draws=3)
    assert steady.images == 20 and list(steady.table.images) == [50, 20, 10]
    with pytest.raises(InputError, match="100 images, 2 draws"):
        advise_by_metric(score, names, draws=2)


# --- a real model


@pytest.fixture(scope="module")
def edgeface(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edgeface")
    model = fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", folder / "edgeface.onnx")
    paths = [real_data / "lfw" / "images" / p for p in find_images(real_data / "lfw" / "images")[::129]][:12]
    return model, paths, preset("edgeface"), observe(model, paths, preset("edgeface"), progress=False)


def calibrate(edgeface, tmp_path, method, **options):
    """({tensor: (low, high)}, calibrator) by ONNX Runtime, on the tensors that we observe as well."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    model, paths, prepare, stats = edgeface

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.queue = iter(paths)

        def get_next(self):
            path = next(self.queue, None)
            return None if path is None else {"input": network_input(path, prepare)}

    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            str(model), None, str(tmp_path / "augmented.onnx"), CalibrationMethod[method], extra_options=options
        )
        calibrator.collect_data(Reader())
        found = calibrator.compute_data()
    both = [name for name in found.keys() if name in stats.tensors]  # noqa: SIM118 (TensorsData has no iteration over names)
    assert len(both) > 150
    return {name: tuple(float(np.ravel(v)[0]) for v in found[name].range_value) for name in both}, calibrator


def test_minmax_is_onnx_runtimes_to_float32_precision(edgeface, tmp_path):
    theirs, _ = calibrate(edgeface, tmp_path, "MinMax")
    ours = minmax(edgeface[3])
    for name, ends in theirs.items():
        assert np.allclose(ours.loc[name], ends, rtol=0, atol=4e-6 * np.abs(ends).max()), name


def test_percentile_is_onnx_runtimes_to_one_bin(edgeface, tmp_path):
    theirs, calibrator = calibrate(edgeface, tmp_path, "Percentile", percentile=99.99, symmetric=False)
    stats = edgeface[3]
    ours = percentile(stats)
    for name, ends in theirs.items():
        edges = calibrator.collector.histogram_dict[name][1]
        one_bin = edges[1] - edges[0] + np.ldexp(1.0, stats.exponents[stats.index(name)])
        assert np.abs(ours.loc[name].to_numpy() - ends).max() <= one_bin * 1.01, name


def test_onnx_runtimes_entropy_is_the_full_range_where_ours_searches(edgeface, tmp_path):
    """Its 128 levels over both signs and its 128 bins leave a single candidate.

    Even on the same fine histogram its threshold has no smaller divergence, by the definition, than ours.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    theirs, _ = calibrate(edgeface, tmp_path, "Entropy")
    stats, full = edgeface[3], minmax(edgeface[3])
    assert np.mean([np.abs(ends).max() >= 0.97 * full.loc[name].abs().max() for name, ends in theirs.items()]) > 0.5
    searcher, checked = HistogramCollector("entropy", False, 512, 128, 99.99, "same"), 0
    for name in list(theirs)[::10]:
        folded, width = magnitudes(*stats.histogram(name), most=256)
        folded[0] = folded[min(1, len(folded) - 1)]
        if len(folded) < 129 or (folded > 0).mean() < 0.5:
            continue
        mirrored = np.concatenate([folded[::-1], folded]).astype(np.int64)
        edges = np.arange(-len(folded), len(folded) + 1, dtype=np.float32) * np.float32(width)
        limit = searcher.get_entropy_threshold((mirrored, edges, edges[0], edges[-1], edges[-1]), 128)[1]
        slow, theirs_keep = definition_of_kl(folded, 64), min(round(float(limit / width)), len(folded))
        assert slow[entropy_threshold(folded, 64, 1, 1.0)] <= slow[theirs_keep] + 1e-9, name
        checked += 1
    assert checked > 8


def test_chosen_images_beat_random_ones_on_a_real_model(edgeface):
    stats, order = edgeface[3], choose_cover(edgeface[3], 8, options=CoverOptions(noise=False, likeness=0, fence=1e9))
    for size in (1, 2, 4, 8):
        greedy = activation_coverage(stats, order[:size])
        draws = [np.random.default_rng(seed).choice(stats.images, size, replace=False) for seed in range(20)]
        chance = [activation_coverage(stats, names) for names in draws]
        assert greedy > np.median(chance) and greedy >= max(chance) - 0.005

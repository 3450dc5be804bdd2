"""Choice by coverage: the greedy bound against brute force, quotas, order, broken images, resumption, the command."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner

from calib_nb.api import coverage
from calib_nb.commands.npu import app
from calib_nb.core.errors import CalibError, InputError
from calib_nb.data.dataset import OBSERVED, prepare
from calib_nb.data.demo_images import graded_images
from calib_nb.data.preprocess import Preprocess
from calib_nb.graph.build import conv, linear, network, sequential
from calib_nb.quant.cover_set import CoverageStrategy
from calib_nb.quant.coverage import (
    CoverOptions,
    RangeNoise,
    choose_cover,
    clipped_share,
    cover_value,
    greedy_cover,
    range_reach,
    range_recall,
    selectq,
)
from calib_nb.quant.ranges import ema, minmax
from calib_nb.quant.stability import range_noise
from calib_nb.quant.stats import QUANTILES, collect

tables = hnp.arrays(
    np.float64, st.tuples(st.integers(4, 8), st.integers(1, 6)), elements=st.sampled_from(np.arange(5) / 4)
)
CHAIN = Preprocess().convert_color("BGR2RGB").resize(8, 8).div(255).transpose([2, 0, 1]).expand_dim(0)


@given(tables, st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_greedy_reaches_its_bound(table, k, weight):
    covers = [(weight, table), (1 - weight, table[:, ::-1] ** 2)]
    best = max(cover_value(covers, rows) for rows in combinations(range(len(table)), k))
    rows = greedy_cover(covers, k)
    assert len(rows) == len(set(rows)) == k
    assert cover_value(covers, rows) >= (1 - (1 - 1 / k) ** k) * best - 1e-7


@given(tables, st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_greedy_under_quotas_reaches_half_of_the_best(table, a, b):
    strata = np.where(np.arange(len(table)) % 2, "a", "b")
    rows = greedy_cover([(1.0, table)], 4, strata, {"a": a, "b": b})
    counts = [int((strata[rows] == s).sum()) if rows else 0 for s in "ab"]
    assert counts == [a, b]
    allowed = [c for c in combinations(range(len(table)), a + b) if (strata[list(c)] == "a").sum() == a]
    best = max(cover_value([(1.0, table)], c) for c in allowed)
    assert cover_value([(1.0, table)], rows) >= best / 2 - 1e-7


@given(tables)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_value_is_monotone_and_submodular(table):
    covers = [(1.0, table)]
    small, large, extra = [0], [0, 1, 2], 3
    gain = [cover_value(covers, [*rows, extra]) - cover_value(covers, rows) for rows in (small, large)]
    assert gain[0] >= gain[1] - 1e-12 >= -2e-12


@pytest.mark.parametrize("wrong", [{"count": 0}, {"covers": [(1.0, np.ones((2, 1))), (1.0, np.ones((3, 1)))]}])
def test_greedy_refuses(wrong):
    with pytest.raises(InputError, match="rows"):
        greedy_cover(**{"covers": [(1.0, np.ones((2, 1)))], "count": 1} | wrong)


def observation(i, seed=0):
    rng = np.random.default_rng((seed, i))
    scale = rng.uniform(0.5, 2)
    return f"p{i:03}", {"x": rng.normal(0, scale, 200), "relu": np.maximum(rng.normal(-1, scale, 200), 0)}


@pytest.fixture(scope="module")
def stats():
    return collect(observation(i) for i in range(120))


def test_choice_is_the_same_in_any_order_and_grows(stats):
    order = choose_cover(stats, 20)
    assert order[:7] == choose_cover(stats, 7) == choose_cover(stats, 7, images=sorted(stats.images, reverse=True))
    rows = np.random.default_rng(1).permutation(120)
    mixed = dataclasses.replace(stats, images=tuple(np.array(stats.images)[rows]), values=stats.values[rows])
    assert choose_cover(mixed, 20) == order
    assert sorted(choose_cover(stats, 500)) == sorted(stats.images)


def test_more_images_reach_further_than_as_many_random_ones():
    large = collect(observation(i) for i in range(700))
    order = choose_cover(large, 300)
    assert order[:128] == choose_cover(large, 128) and order[:256] == choose_cover(large, 256)
    used = range_reach(large, like=256)
    chosen = used[[large.images.index(name) for name in order[:256]]].max(0)
    first = used[[large.images.index(name) for name in order[:128]]].max(0)
    assert (chosen == 1).all() and first.min() < 1


def test_few_chosen_images_clip_less_than_many_random_ones(stats):
    held = collect(observation(i, seed=1) for i in range(100))
    lost = [clipped_share(held, minmax(stats, choose_cover(stats, 8))).mean()]
    for seed in range(20):
        names = np.random.default_rng(seed).choice(stats.images, 8, replace=False).tolist()
        lost.append(clipped_share(held, minmax(stats, names)).mean())
    assert lost[0] < np.median(lost[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_looked_up_noise_is_that_of_the_values(stats, bits):
    rows = np.random.default_rng(bits).choice(120, 9, replace=False)
    names = [stats.images[row] for row in rows]
    told = RangeNoise(stats, bits=bits, fence=1e9).shares(rows[:-1])[rows[-1]]
    for value, table in zip(told, (minmax(stats, names), ema(stats, names, constant=1e-6))):
        noise = 0
        for tensor, (low, high) in zip(table.index, table.to_numpy()):
            x = np.stack([observation(i)[1][tensor] for i in range(120)])
            lost = np.mean((np.clip(x, low, high) - x) ** 2) + ((high - low) / (2**bits - 1)) ** 2 / 12
            noise += lost / x.var()
        assert value == pytest.approx(noise, rel=0.2)


def test_fewer_bits_choose_narrower_ranges_with_less_noise(stats):
    held = collect(observation(i, seed=1) for i in range(100))
    tables = {
        bits: minmax(stats, choose_cover(stats, 8, options=CoverOptions(bits=bits))).to_numpy() for bits in (4, 8)
    }
    noise = {bits: [range_noise(held, tables[b], np.arange(100), bits) for b in (4, 8)] for bits in (4, 8)}
    assert noise[4][0] < noise[4][1] and noise[8][1] < noise[8][0]
    assert np.ptp(tables[4], axis=1).sum() < np.ptp(tables[8], axis=1).sum()


def test_one_broken_image_is_never_among_the_first(stats):
    broken = {name: 1e4 * values for name, values in observation(500)[1].items()}
    spoiled = stats + collect([("broken", broken)])
    assert "broken" not in choose_cover(spoiled, 20)
    clean = range_reach(stats)
    row = spoiled.images.index("broken")
    assert np.allclose(np.delete(range_reach(spoiled), row, 0), clean, rtol=0.05, atol=0.05)


def test_what_one_image_in_a_hundred_holds_counts_in_full():
    def partly(i):
        values = dict(zip("abcdefghijkl", np.random.default_rng(i).normal(size=(12, 40))))
        return f"p{i:04}", values | ({"f": 20 * values["f"]} if i % 100 == 7 else {})

    large = collect(partly(i) for i in range(1200))
    rows = np.random.default_rng(0).choice(1200, 9, replace=False)
    table = minmax(large, [large.images[row] for row in rows]).to_numpy()
    told = RangeNoise(large).shares(rows[:-1])[rows[-1], 0]
    assert told == pytest.approx(range_noise(large, table, np.arange(1200)), rel=0.1)
    first = choose_cover(large, 4)
    assert any(int(name[1:]) % 100 == 7 for name in first)
    lonely = collect([*(partly(i) for i in range(99)), ("alone", {**partly(7)[1], "f": 1e3 * partly(7)[1]["f"]})])
    assert "alone" not in choose_cover(lonely, 20)


@pytest.mark.parametrize("kind, method", [("minmax", minmax), ("ema", ema)])
def test_known_ranges_make_less_noise(stats, kind, method):
    noise = {}
    for ranges in ("minmax", "ema"):
        names = choose_cover(stats, 8, options=CoverOptions(ranges=ranges, reach=0, likeness=0))
        noise[ranges] = range_noise(stats, method(stats, names).to_numpy(), np.arange(120))
    assert noise[kind] <= min(noise.values())


def test_constants_and_a_single_image():
    flat = collect((f"p{i}", {"zero": np.zeros(8), "one": np.ones(8)}) for i in range(5))
    assert range_reach(flat).shape == (5, 0) and choose_cover(flat, 3) == ["p0", "p1", "p2"]
    single = collect([("p", {"x": np.arange(8.0)})])
    assert choose_cover(single, 4) == ["p"] and selectq(single, 1) == ["p"]


@pytest.mark.parametrize("more", [{"reach": -0.1}, {"likeness": -1}, {"clients": 0}, {"bits": 1}])
def test_options_are_checked(more):
    with pytest.raises(InputError, match="weight"):
        CoverOptions(**more)


def test_kinds_of_ranges_are_checked():
    with pytest.raises(InputError, match="'minmaxx'"):
        CoverOptions(ranges="minmaxx")


def test_clipped_share_is_exact_at_the_quantiles():
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    one = collect([("p", {"x": values})])
    for p, q in zip(QUANTILES, one.values[0, 0, 4:]):
        share = clipped_share(one, minmax(one).assign(high=float(q)))[0, 0]
        assert share == pytest.approx((values > q).mean(), abs=2e-4) and share == pytest.approx(1 - p, abs=2e-4)
    assert clipped_share(one, minmax(one))[0, 0] == 0 and range_recall(one, minmax(one)) == 1
    assert clipped_share(one, minmax(one).assign(low=50.0, high=60.0))[0, 0] == pytest.approx(1)


def test_selectq_takes_one_image_of_each_clear_cluster():
    near = {0: -5.0, 1: 0.0, 2: 5.0}
    stats = collect((f"p{i:02}", {"x": np.random.default_rng(i).normal(near[i % 3], 0.1, 50)}) for i in range(30))
    hits = [{int(name[1:]) % 3 for name in selectq(stats, 3, seed=seed)} for seed in range(20)]
    assert {0, 1, 2} in hits and all(len(set(selectq(stats, k))) == k for k in (1, 5, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("coverage")
    graded_images(out / "images", n=24)
    sequential(conv(4, 3), "Relu", linear(2), shape=(1, 3, 8, 8)).save(out / "net.onnx")
    return out


def test_gates_and_quotas_hold(folder):
    strategy = CoverageStrategy(folder / "net.onnx", CHAIN, quotas={"dark": 0.5, "light": 0.5}, column="luma_mean")
    strategy = dataclasses.replace(strategy, bins={"dark": (0, 100), "light": (100, 255)})
    chosen = prepare(
        folder / "images", folder / "set", num_samples=6, strategy=strategy, quality_threshold=20, progress=False
    )
    assert (chosen.images["quality"] >= 20).all()
    assert chosen.plan.set_index("bin").loc["dark", "taken"] == (chosen.images["luma_mean"] < 100).sum()
    with pytest.raises(InputError, match="no option 'bins'|unknown"):
        prepare(folder / "images", folder / "y", strategy=strategy, bins={}, progress=False)


def test_a_journal_of_another_model_is_not_used(folder):
    class Stop(Exception):
        pass

    calls = []

    def dies(image):
        calls.append(1)
        if len(calls) > 12:
            raise Stop
        return CHAIN(image)

    with pytest.raises(Stop):
        prepare(
            folder / "images", folder / "again", strategy=CoverageStrategy(folder / "net.onnx", dies), progress=False
        )
    (old,) = (folder / ".again.partial").glob(OBSERVED)
    sequential(conv(2, 3), "Relu", linear(2), shape=(1, 3, 8, 8)).save(folder / "other.onnx")
    calls.clear()
    with pytest.raises(Stop):
        prepare(
            folder / "images", folder / "again", strategy=CoverageStrategy(folder / "other.onnx", dies), progress=False
        )
    (new,) = (folder / ".again.partial").glob(OBSERVED)
    assert new.name != old.name


def test_the_front_door_refuses_before_images_are_scored(folder):
    with pytest.raises(CalibError, match="no such model"):
        coverage(folder / "nowhere.onnx")
    with pytest.raises(InputError, match="cannot be told from it.*a config"):
        coverage(folder / "net.onnx")


def test_the_front_door_takes_bits_or_all_options(folder):
    network("s = Div (x, m); y = Relu (s)", inputs={"x": (1, 3, 8, 8)}, m=[0.226]).save(folder / "told.onnx")
    assert coverage(folder / "told.onnx").options == CoverOptions()
    assert coverage(folder / "told.onnx", bits=4).settings["bits"] == 4
    assert coverage(folder / "told.onnx", ranges="minmax").settings["ranges"] == "minmax"
    assert coverage(folder / "told.onnx", options=CoverOptions(bits=6, reach=1)).settings["reach"] == 1
    with pytest.raises(InputError, match="1 bits"):
        coverage(folder / "told.onnx", bits=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--strategy coverage", "without a model"),
        ("--strategy random --quotas good=1", "with strategy random"),
        ("--strategy quality_mix --bits 4", "with strategy quality_mix"),
        ("--strategy random --ranges ema", "with strategy random"),
        ("--strategy covrage", "coverage"),
        ("--strategy coverage --model net.onnx --quotas good", "shares"),
    ],
)
def test_the_command_refuses_in_one_line(folder, monkeypatch, line, message):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, f"prepare --source-dir images --output-dir never {line}".split())
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not list(folder.glob("*never*"))

"""Selection from a table: exact counts, no row twice, the same choice in any order of rows."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError
from calib_nb.data.bins import apportion, assign_bins, fill_bins, shuffled
from calib_nb.data.sample import SELECTION_STRATEGIES, candidates, select_images

exact = settings(derandomize=True, deadline=None)
RANGES = {"near": (0, 3), "mid": (3, 8), "far": (8, 15), "very_far": (15, 100)}
RATIOS = {"near": 0.25, "mid": 0.40, "far": 0.25, "very_far": 0.10}


def scores(size: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"path": [f"{i % 7}/photo {i}.jpg" for i in range(size)], "quality": rng.uniform(0, 100, size).round(1)}
    )
    return table.assign(
        luma_mean=rng.uniform(0, 255, size),
        luma_std=rng.uniform(0, 80, size),
        error=np.where(rng.random(size) < 0.1, "truncated", ""),
    )


def depths(very_far: int = 85) -> pd.DataFrame:
    counts = {"near": 1823, "mid": 2456, "far": 492, "very_far": very_far}
    depth = np.concatenate([np.linspace(*RANGES[name], count, endpoint=False) for name, count in counts.items()])
    return pd.DataFrame({"path": [f"{i}.png" for i in range(len(depth))], "mean_depth": depth})


# --- rounding and filling


@exact
@given(st.integers(0, 5000), st.lists(st.floats(0, 1000), min_size=1, max_size=12).filter(lambda s: sum(s) > 1e-3))
def test_apportion_is_exact_and_within_one(total, shares):
    counts = apportion(total, shares)
    assert sum(counts) == total and min(counts) >= 0
    exact = total * np.array(shares) / sum(shares)
    assert (np.abs(counts - exact) < 1 + 1e-6).all()


@exact
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 200)), min_size=1, max_size=8).filter(
        lambda b: sum(s for s, _ in b) > 1e-3
    ),
)
def test_fill_takes_all_it_can_and_no_more(total, bins):
    shares, available = [s for s, _ in bins], [a for _, a in bins]
    wanted, taken = fill_bins(total, shares, available)
    assert sum(wanted) == total
    assert all(0 <= t <= a for t, a in zip(taken, available))
    assert sum(taken) == min(total, sum(a for s, a in bins if s > 0))
    assert all(t == 0 for t, s in zip(taken, shares) if s == 0)
    assert all(t >= min(w, a) for w, t, a in zip(wanted, taken, available))


def test_depth_numbers_of_the_specification():
    chosen = select_images(depths(), "stratified", 300, column="mean_depth", bins=RANGES, ratios=RATIOS)
    assert chosen.plan["available"].tolist() == [1823, 2456, 492, 85]
    assert chosen.plan["taken"].tolist() == [75, 120, 75, 30] and not chosen.warnings


def test_a_shortfall_goes_to_the_others_in_their_ratios_and_is_said():
    chosen = select_images(depths(very_far=10), "stratified", 300, column="mean_depth", bins=RANGES, ratios=RATIOS)
    plan = chosen.plan.set_index("bin")
    assert (
        len(chosen.rows) == 300 and plan.loc["very_far", "taken"] == 10 and plan.loc["very_far", "note"] == "20 too few"
    )
    assert plan.loc["mid", "taken"] - 120 == 9 == max(plan["taken"] - plan["wanted"])
    assert all("in place of very_far" in plan.loc[name, "note"] for name in ("near", "mid", "far"))


# --- every strategy


@settings(exact, max_examples=40)
@given(st.sampled_from(sorted(SELECTION_STRATEGIES)), st.integers(1, 260), st.integers(0, 2**32), st.integers(1, 250))
def test_no_row_twice_exact_count_every_row_accounted_for(strategy, num_samples, seed, size):
    table = scores(size, seed % 5)
    if not (table["error"] == "").any() or (
        strategy == "quality_mix" and not ((table["error"] == "") & (table["quality"] >= 40)).any()
    ):
        return
    chosen = select_images(table, strategy, num_samples, seed=seed)
    usable = table[(table["error"] == "") & ((table["quality"] >= 40) | (strategy != "quality_mix"))]
    assert chosen.rows["path"].is_unique and chosen.rows["path"].isin(usable["path"]).all()
    assert chosen.rows["path"].is_monotonic_increasing
    assert chosen.plan["available"].sum() == len(table)
    assert chosen.plan["taken"].sum() == len(chosen.rows) and chosen.plan["wanted"].sum() == num_samples
    assert len(chosen.rows) == min(num_samples, len(usable))
    assert bool(chosen.warnings) >= (len(chosen.rows) < num_samples)


@settings(exact, max_examples=30)
@given(st.sampled_from(sorted(SELECTION_STRATEGIES)), st.integers(1, 100), st.integers(0, 1000), st.randoms())
def test_row_order_does_not_matter(strategy, num_samples, seed, rnd):
    table = scores(200)
    order = list(range(len(table)))
    rnd.shuffle(order)
    one, other = (
        select_images(table, strategy, num_samples, seed=seed),
        select_images(table.iloc[order], strategy, num_samples, seed=seed),
    )
    pd.testing.assert_frame_equal(one.rows, other.rows)
    pd.testing.assert_frame_equal(one.plan, other.plan)


def test_ties_in_quality_do_not_depend_on_the_order_of_rows():
    table = scores(100).assign(quality=50.0, error="")
    assert select_images(table, num_samples=10).rows.equals(select_images(table[::-1], num_samples=10).rows)


def test_the_seed_decides_and_is_frozen():
    table = scores(100)
    assert not select_images(table, "random", 10, seed=1).rows.equals(select_images(table, "random", 10, seed=2).rows)
    # frozen: the order of the hash, worked out here without the package
    by_hand = sorted("abcdef", key=lambda p: hashlib.blake2b(p.encode(), digest_size=8, key=b"42").digest())
    assert shuffled(pd.DataFrame({"path": list("abcdef")}))["path"].tolist() == by_hand == list("afebcd")


def test_random_is_fair():
    table = pd.DataFrame({"path": [str(i) for i in range(40)]})
    first = {seed: shuffled(table, seed)["path"].head(10) for seed in range(800)}
    for seed in range(0, 800, 40):
        assert select_images(table, "random", 10, seed=seed).rows["path"].tolist() == sorted(first[seed])
    counts = pd.concat(first.values()).value_counts()
    # chi-square with 39 degrees of freedom, p = 0.0005; the hash makes the counts the same on every machine
    assert len(counts) == 40 and ((counts - 200) ** 2 / 200).sum() < 75


def test_quality_mix_takes_the_top_and_spreads_the_rest():
    table = scores(2000).assign(error="")
    above = table.loc[table["quality"] >= 40, "quality"].sort_values(ascending=False, ignore_index=True)
    chosen = select_images(table, num_samples=101).rows["quality"].sort_values(ascending=False, ignore_index=True)
    assert chosen[:51].tolist() == above[:51].tolist()
    ranks = (len(above) - above[::-1].searchsorted(chosen[51:], side="right") - 51) / (len(above) - 51)
    assert np.abs(ranks - np.linspace(0.01, 0.99, 50)).max() < 0.03


def test_quotas_keep_poor_pictures_and_balanced_keeps_weights():
    table = scores(3000)
    chosen = select_images(table, "quotas", 100).rows["quality"]
    assert ((chosen < 40).sum(), ((chosen >= 40) & (chosen < 60)).sum(), (chosen >= 60).sum()) == (10, 20, 70)
    mine = select_images(
        table, "quotas", 50, quotas={"low": 0.5, "high": 0.5}, bins={"low": (0, 50), "high": (50, 100)}
    ).rows["quality"]
    assert (mine < 50).sum() == 25
    table["light"] = np.where(table["luma_mean"] < 100, "night", "day")
    weights = {"night": {"few": 3, "many": 1}, "day": {"few": 0, "many": 4}}
    both = select_images(
        table,
        "balanced",
        80,
        columns=("light", "luma_std"),
        bins={"luma_std": {"few": (0, 40), "many": (40, 80)}},
        weights=weights,
    )
    assert both.plan.set_index("bin")["taken"].drop("(unusable)").to_dict() == {
        "day / few": 0,
        "day / many": 40,
        "night / few": 30,
        "night / many": 10,
    }


# --- nothing is lost in silence


def test_values_outside_every_bin_are_clamped_and_named_nan_is_counted():
    table = depths().assign(mean_depth=lambda t: t["mean_depth"].where(t.index > 3, np.nan))
    table.loc[10:12, "mean_depth"] = [-1.0, 100.0, np.inf]
    chosen = select_images(table, "stratified", 300, column="mean_depth", bins=RANGES, ratios=RATIOS)
    plan = chosen.plan.set_index("bin")
    assert (
        plan.loc["(no bin)", "available"] == 4
        and plan.loc["very_far", "available"] == 87
        and plan["available"].sum() == len(table)
    )
    assert any("1 below 0 count as near" in w and "1 above 100 count as very_far" in w for w in chosen.warnings)
    assert any("4 of 4,856 rows have no bin" in w for w in chosen.warnings)


@exact
@given(st.lists(st.floats(-10, 120), min_size=1, max_size=60))
def test_bins_agree_with_numpy_inside_their_range(values):
    series = pd.Series(values, name="x")
    bin_of, labels, _ = assign_bins(series, RANGES)
    inside = series[(series >= 0) & (series <= 100)]
    assert np.histogram(inside, [0, 3, 8, 15, 100])[0].tolist() == [
        int((bin_of[inside.index] == label).sum()) for label in labels
    ]
    assert bin_of.notna().all()


def test_a_constant_column_and_a_csv_without_errors_work(tmp_path):
    table = scores(50).assign(luma_mean=7.0)
    assert len(select_images(table, "stratified", 10).rows) == 10
    table.to_csv(tmp_path / "t.csv", index=False)  # "" comes back as NaN
    assert (
        select_images(pd.read_csv(tmp_path / "t.csv"), num_samples=5).rows["path"].tolist()
        == select_images(table, num_samples=5).rows["path"].tolist()
    )


def test_groups_leave_the_best_of_each():
    table = scores(30).assign(error="")
    groups = pd.Series(np.arange(30) // 3, index=table["path"])
    chosen = select_images(table, "random", 30, groups=groups)
    best = table.loc[table.groupby(groups.to_numpy())["quality"].idxmax(), "path"]
    assert sorted(chosen.rows["path"]) == sorted(best) and "20 near-duplicate" in chosen.warnings[0]


# --- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "quality_mx"}, "unknown strategy 'quality_mx'.*did you mean 'quality_mix'"),
        ({"strategy": "random", "column": "quality"}, "strategy 'random' has no option 'column'; expected no option"),
        ({"strategy": "stratified", "ratio": None, "bin": {}}, "no option 'bin'.*did you mean 'bins'"),
        ({"strategy": "stratified", "column": "luma_man"}, "did you mean 'luma_mean'"),
        ({"strategy": "stratified", "ratios": {"a": 1}}, "unknown bin 'a'"),
        ({"strategy": "stratified", "column": "quality", "bins": {"a": (0, 3), "b": (4, 5)}}, "do not touch"),
        ({"strategy": "stratified", "column": "path", "bins": {"a": (0, 3)}}, "holds words"),
        ({"strategy": "quotas", "quotas": {"good": 0.7}}, "sum to 0.7"),
        ({"strategy": "quotas", "quotas": {"good": 1.5, "poor": -0.5}}, "ratios from 0"),
        ({"strategy": "balanced", "columns": ["quality"]}, "expected two"),
        ({"strategy": "balanced", "bins": {"quality": None}}, "unknown column to bin 'quality'"),
        ({"num_samples": 0}, "whole number from 1"),
        ({"num_samples": 2.5}, "whole number from 1"),
        ({"num_samples": 1000, "strict": True}, "images chosen, not 1,000"),
    ],
)
def test_refusals_name_the_fault(arguments, message):
    with pytest.raises(InputError, match=message):
        select_images(scores(60), **arguments)


def test_an_unreachable_threshold_says_what_would_do():
    table = scores(500).assign(error="")
    table["quality"] *= 71.3 / table["quality"].max()
    with pytest.raises(
        InputError, match=r"all 500 images score below 90, the best is 71\.3: try --quality-threshold 50"
    ):
        select_images(table, num_samples=100, quality_threshold=90)


def test_a_table_without_a_usable_row():
    with pytest.raises(InputError, match="none of 3 images can be used"):
        select_images(scores(3).assign(error="empty"))
    with pytest.raises(InputError, match="no column 'path'"):
        select_images(pd.DataFrame({"quality": [1.0]}))
    with pytest.raises(InputError, match="stands in 2 rows"):
        candidates(pd.concat([scores(3), scores(3)]))

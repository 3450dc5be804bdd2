"""From a split to a table of INT8 models: frames, noise in log depth, three sets that never meet, and the commands."""

import os
import sys

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.analysis.compare import Comparison
from calib_nb.core.errors import InputError
from calib_nb.data.images import decode
from calib_nb.data.preprocess import Preprocess, preset
from calib_nb.depth.ablation import (
    AblationOptions,
    AblationTrial,
    Limits,
    ablation_table,
    calibration_trials,
    check_held_out,
    fine_tuned_trials,
    repair_trials,
    run_ablation,
)
from calib_nb.depth.demo import demo_depth
from calib_nb.depth.frames import Frames, depth_noise, depth_task, read_frames
from calib_nb.depth.metrics import Scoring, depth_metrics
from calib_nb.depth.ncdb import read_depth

SHELL = [sys.executable, "-c", "import sys; from calib_nb.cli import main; sys.exit(main())"]


def calib_nb(*arguments, cwd=None):
    plain = {"TQDM_DISABLE": "1", "COLUMNS": "200", "NO_COLOR": "1", "FORCE_COLOR": "", "OMP_NUM_THREADS": "1"}
    return forked.calib_nb(*arguments, cwd=cwd, env=os.environ | plain)


@pytest.fixture(scope="module")
def demo():
    return demo_depth()


@pytest.fixture(scope="module")
def pool(demo):
    return read_frames(demo.root)


@pytest.fixture(scope="module")
def held_out(demo):
    return read_frames(demo.root, "val_split.json")


def test_frames_are_the_files(pool):
    row = pool.table.iloc[7]
    rgb, depth_m = pool[7]
    assert np.array_equal(
        rgb, decode(pool.root / row.image_path)[..., ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    )
    assert np.array_equal(depth_m, read_depth(pool.root / row.depth_path)) and np.array_equal(
        depth_m, pool.depth_map(7)
    )
    assert (
        pool.names[7] == f"{row.dataset_root.split('/')[-1]}/{row.filename}"
        and pool.images[7] == pool.root / row.image_path
    )
    small = Frames(pool.root, pool.table, size=(64, 32))
    assert small[7][0].shape == (3, 32, 64) and set(np.unique(small[7][1])) <= set(np.unique(depth_m))
    assert len(list(pool.take([3, 1]))) == 2, "iteration ends"


def test_splits_of_the_demo_share_no_scene(pool, held_out):
    assert not set(pool.scenes) & set(held_out.scenes) and len(pool) >= 100 and len(held_out) >= 20


@pytest.mark.parametrize(
    ("arguments", "message"), [({"scenes": ["nowhere"]}, "nowhere"), ({"split_file": "never.json"}, "never.json")]
)
def test_bad_frames_are_refused(demo, arguments, message):
    with pytest.raises(InputError, match=message):
        read_frames(demo.root, **arguments)


@given(st.floats(0.5, 2), st.integers(0, 1000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_noise_is_the_log_error_that_metrics_know(factor, seed):
    """Of one map against another, its root is rmse_log; a common factor is noise unless scoring scales it away."""
    rng = np.random.default_rng(seed)
    x, y = (rng.uniform(1, 20, (1, 1, 6, 8)).astype(np.float32) for _ in range(2))
    assert np.isclose(np.sqrt(depth_noise()([[x]], [[y]])[0]), depth_metrics(y[0, 0], x[0, 0])["rmse_log"], rtol=1e-5)
    assert np.isclose(depth_noise()([[x]], [[factor * x]])[0], np.log(factor) ** 2, rtol=1e-3, atol=1e-9)
    scaled = depth_noise(Scoring(median_scaling=True))
    assert np.isclose(scaled([[x]], [[factor * y]]), scaled([[x]], [[y]]), rtol=1e-4)
    disparity = depth_noise(Scoring(output="disparity"))
    assert np.isclose(disparity([[1 / x]], [[1 / y]]), depth_noise()([[x]], [[y]]), rtol=1e-3)


def test_noise_keeps_to_the_crop():
    x = np.full((1, 1, 100, 100), 5, np.float32)
    y = x.copy()
    y[..., :30, :] = 9  # above what garg scores
    assert depth_noise(Scoring(crop="garg"))([[x]], [[y]])[0] == 0 < depth_noise()([[x]], [[y]])[0]


def comparison(**rows):
    units = {name: pd.DataFrame({"abs_rel": np.asarray(values, float)}) for name, values in rows.items()}
    return Comparison(pd.DataFrame({"model": list(units), "a1": 0.9}), units, "abs_rel", None)


@given(st.lists(st.floats(0.01, 0.2), min_size=2, max_size=20), st.floats(0.01, 1), st.floats(0, 1.2))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_share_of_the_gap_is_that_share(reference, gap, share):
    reference = np.array(reference)
    table = ablation_table(
        comparison(float=reference, naive=reference + gap, other=reference + gap * (1 - share)), resamples=50
    )
    assert np.allclose(table.gap_closed_pct, [100, 0, 100 * share], atol=1e-6) and np.allclose(
        table.gap_closed_low[2], 100 * share, atol=1e-6
    )
    assert (
        (table.abs_rel_low <= table.abs_rel + 1e-12).all()
        and (table.abs_rel <= table.abs_rel_high + 1e-12).all()
        or len(reference) < 6
    )
    assert np.isclose(table.improvement_pct[2], 100 * (1 - table.abs_rel[2] / table.abs_rel[1]))


def test_no_gap_is_no_number_and_the_guide_gets_its_verdicts():
    assert ablation_table(comparison(float=[0.2, 0.3], naive=[0.1, 0.3])).gap_closed_pct.isna().all()
    assert (
        ablation_table(comparison(float=[0.2, 0.2, 0.2], naive=[0.3, 0.15, 0.18], other=[0.2, 0.3, 0.4]))
        .gap_closed_pct.isna()
        .all()
    ), "a gap that the frames cannot tell from none"
    assert [Limits().verdict(x) for x in (0.0899, 0.09, 0.1, 0.1001)] == ["good", "borderline", "borderline", "bad"]
    for wrong in ((0, 1), (0.2, 0.1)):
        with pytest.raises(InputError):
            Limits(*wrong)


def test_sets_that_meet_are_refused(demo, pool, held_out, tmp_path):
    task = depth_task(held_out, preset("depth", size=(96, 64)))
    copied = tmp_path / "renamed.png"
    copied.write_bytes(held_out.images[0].read_bytes())
    with pytest.raises(InputError, match="1 of the"):
        check_held_out([AblationTrial("x", demo.model, (*pool.images[:3], copied))], task)
    with pytest.raises(InputError, match="twice"):
        check_held_out([AblationTrial("x", demo.model, (pool.images[0], pool.images[0]))], task)


def test_repairs_close_the_gap_that_unequal_channels_open(demo, pool, held_out, tmp_path):
    """Synthetic: the gap was made of what equalization removes, so nearly all of it must be closed."""
    chain = preset("depth", size=(96, 64))
    trials = [
        *calibration_trials(demo.model, pool, counts=(30,)),
        *repair_trials(demo.model, pool.images[:40])[:2],
        *fine_tuned_trials({"the same again": demo.model}, pool.images[:40]),
    ]
    ablation = run_ablation(
        demo.model,
        trials,
        depth_task(held_out, chain),
        tmp_path,
        noise=depth_noise(),
        options=AblationOptions(latency_runs=2),
        progress=False,
    )
    table = ablation_table(ablation.comparison).set_index("trial")
    assert (
        table.abs_rel["naive: 30 random"] > 1.15 * table.abs_rel["FP32"]
        and table.gap_closed_pct["+ bias correction"] >= 90
    )
    assert table.gap_closed_pct["+ bias correction"] > table.gap_closed_pct["the same again"] + 30
    assert {p.name for p in tmp_path.glob("*.onnx")} == {p.name for p in ablation.models.values()}


def test_train_evaluate_compare_from_the_shell(demo, pool, tmp_path):
    args = ["--dataset-root", demo.root, "--size", 96, 64]
    begun = calib_nb("depth", "train", *args, "--output-dir", "run", "--width", 0.125, "--epochs", 1, cwd=tmp_path)
    assert (
        begun.returncode == 0
        and (tmp_path / "run/depth.onnx").is_file()
        and (tmp_path / "run/checkpoint.pt").is_file()
        and list((tmp_path / "run/tensorboard").iterdir())
    ), begun.stderr
    again = calib_nb("depth", "train", *args, "--output-dir", "run", "--width", 0.125, "--epochs", 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr  # the same command goes on, and nothing is left to do
    other = calib_nb("depth", "train", *args, "--output-dir", "run", "--width", 0.125, "--epochs", 2, cwd=tmp_path)
    assert other.returncode == 2 and "is of another training" in other.stderr
    scored = calib_nb("depth", "evaluate", "--model", demo.model, "--dataset-root", demo.root)
    assert scored.returncode == 0 and "abs_rel" in scored.stdout and "near" in scored.stdout, scored.stderr
    same = calib_nb(
        "depth",
        "compare",
        "--float",
        demo.model,
        "--int8",
        tmp_path / "run/depth.onnx",
        "--dataset-root",
        demo.root,
        "--good",
        9,
        "--borderline",
        9,
        "--budget",
        0.001,
        "--output",
        tmp_path / "t.csv",
    )
    assert same.returncode == 1 and "depth is " in same.stderr, same.stderr  # one epoch is far from fourteen
    table = pd.read_csv(tmp_path / "t.csv")
    assert (
        list(table.model) == ["float", "depth"]
        and table["drop"][1] > 0
        and table.worst_slice[1].startswith(("depth_range: ", "scene: "))
    )


WRONG = {
    "no model": (["evaluate", "--model", "never.onnx", "--dataset-root", "ROOT"], "never.onnx"),
    "not a checkpoint": (["evaluate", "--model", "text.pt", "--dataset-root", "ROOT"], "text.pt"),
    "no data set": (["train", "--dataset-root", "never", "--output-dir", "x", "--size", "64", "32"], "never"),
    "an odd size": (["train", "--dataset-root", ".", "--output-dir", "x", "--size", "65", "32"], "divisible by 32"),
    "both beginnings": (
        ["train", "--dataset-root", ".", "--output-dir", "x", "--start-from", "a", "--imagenet", "b"],
        "one of them",
    ),
    "limits upside down": (
        ["compare", "--float", "a", "--int8", "b", "--dataset-root", ".", "--good", "2", "--borderline", "1"],
        "good",
    ),
    "an unknown output": (["evaluate", "--model", "a", "--dataset-root", ".", "--output-is", "metres"], "disparity"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(case, demo, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    arguments, message = WRONG[case]
    arguments = [str(demo.root) if a == "ROOT" else a for a in arguments]
    done = calib_nb("depth", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_teaches_and_loads_nothing_heavy():
    for status, text, loaded in forked.helps("depth train", "depth evaluate", "depth compare").values():
        assert (status, loaded) == (0, []) and "Example" in text, text[-300:]


@pytest.mark.slow
def test_a_real_network_on_kitti(real_data, tmp_path):
    """Ten frames calibrate and tune, ten others are scored: too few for a verdict to the percent."""
    root, model = real_data / "ncdb_real", real_data / "models/rtmonodepth_s_m_640x192.onnx"
    chain = Preprocess().convert_color("BGR2RGB").resize(640, 192).div(255).transpose([2, 0, 1]).expand_dim(0)
    scoring = Scoring(output="sigmoid", median_scaling=True, crop="garg")
    whole, pool, held_out = (
        read_frames(root, f"{part}_split.json", scenes=scenes)
        for part, scenes in (("train", ()), ("train", ["scene_kitti"]), ("val", ["scene_kitti"]))
    )
    trials = [
        *calibration_trials(model, whole, counts=(100,)),
        calibration_trials(model, pool, counts=(1, 300))[1],
        repair_trials(model, pool.images)[2],
    ]
    ablation = run_ablation(
        model,
        trials,
        depth_task(held_out, chain, scoring),
        tmp_path,
        noise=depth_noise(scoring),
        options=AblationOptions(latency_runs=2),
        progress=False,
    )
    table, shown = ablation.comparison.table, ablation_table(ablation.comparison)
    assert 0.15 < table.abs_rel[0] < 0.25 and (table["drop"][1:] < 0.05 * table.abs_rel[0]).all()
    assert (
        list(shown.trial) == ["FP32", "naive: 100 random", "10 stratified", "+ auto"]
        and (shown.abs_rel_low < shown.abs_rel).all()
        and (shown.abs_rel < shown.abs_rel_high).all()
    )
    assert (table.drop_low[1:] <= table["drop"][1:]).all() and (table.drop_high[1:] >= table["drop"][1:]).all()

"""The tagging task and the compact tagger: the metric, training that repeats, a shipped file, a cache that two fill."""

import os
import subprocess
import sys

import forked
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.analysis.compare import Task, compare_models, paired_bootstrap, run_model
from calib_nb.core.errors import InputError, ModelError
from calib_nb.data.preprocess import preset
from calib_nb.graph.contract import open_session, read_contract
from calib_nb.graph.export import export_onnx
from calib_nb.quant.quantize import quantize_static
from calib_nb.tags.demo import compact_tagger, demo_tagger, make_demo_tagger, train_compact
from calib_nb.tags.demo_drawings import tagged_images, tagged_splits
from calib_nb.tags.metrics import average_precision, resampled_map, tag_map
from calib_nb.tags.task import TaggingTask

CHAIN = preset("resnet-tags", size=(32, 32))
SCORES = hnp.arrays(np.float64, (20, 4), elements=st.integers(-5, 5).map(float))
TARGETS = hnp.arrays(np.int8, (20, 4), elements=st.integers(0, 1))


@settings(deadline=None, derandomize=True)
@given(SCORES, TARGETS, st.integers(1, 20))
def test_average_precision_is_scikit_learns(scores, targets, n):
    scores, targets = scores[:n], targets[:n]
    got = average_precision(scores, targets)
    for c in range(4):
        if targets[:, c].any():
            assert np.isclose(got[c], sklearn.metrics.average_precision_score(targets[:, c], scores[:, c]))
        else:
            assert np.isnan(got[c])
    if targets.any(axis=0).all():
        wanted = sklearn.metrics.average_precision_score(targets, scores, average="macro")
        assert np.isclose(tag_map(scores, targets), wanted)


def test_map_of_nothing_is_nan_and_of_other_shapes_an_error():
    assert np.isnan(tag_map(np.ones((3, 2)), np.zeros((3, 2))))
    for scores, targets in (((3, 2), (3, 1)), ((3,), (3,)), ((0, 2), (0, 2))):
        with pytest.raises(InputError, match="expected two arrays"):
            tag_map(np.ones(scores), np.ones(targets))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tagged_images(tmp_path_factory.mktemp("images") / "set", 64, size=32)


@pytest.fixture(scope="module")
def trained(images):
    return train_compact(images, CHAIN, epochs=2, width=8, progress=False)


def test_import_and_reading_need_no_torch():
    heavy = {"torch", "onnxruntime", "onnx", "matplotlib", "scipy"}
    modules = "calib_nb.tags.task, calib_nb.tags.demo, calib_nb.analysis.compare"
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shipped_tagger_needs_no_torch(tmp_path):
    code = (
        "import sys; from calib_nb.tags.demo import demo_tagger; model = demo_tagger().model; "
        "assert 'torch' not in sys.modules; print(model)"
    )
    environment = {**os.environ, "CALIB_NB_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    contract = read_contract(ran.stdout.strip())
    assert contract.inputs[0].shape == (1, 3, 96, 96) and contract.outputs[0].shape == (1, 8)
    assert os.path.getsize(ran.stdout.strip()) < 250_000


def test_training_repeats_and_leaves_torch_as_it_was(images, trained):
    import torch

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    again, other = (train_compact(images, CHAIN, epochs=2, width=8, seed=seed, progress=False) for seed in (0, 1))
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (trained, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(SCORES, TARGETS, hnp.arrays(np.int64, (5, 20), elements=st.integers(0, 19)))
def test_resamples_at_once_are_those_one_by_one(scores, targets, rows):
    one_by_one = [tag_map(scores[r], targets[r]) for r in rows]
    assert np.allclose(resampled_map(scores, targets, rows), one_by_one, rtol=1e-12, atol=0, equal_nan=True)


def test_the_interval_of_map_is_that_of_resamples_one_by_one(images):
    class Slow(TaggingTask):
        resampled = None

    rng, fast, slow = np.random.default_rng(0), TaggingTask(images, CHAIN), Slow(images, CHAIN)
    first, second = (fast.units([{"y": row} for row in rng.normal(0, 1, fast.targets.shape)], []) for _ in range(2))
    drops = [paired_bootstrap(task, first, second, resamples=150) for task in (fast, slow)]
    assert np.allclose([drops[0].low, drops[0].high], [drops[1].low, drops[1].high], rtol=1e-9)


def test_the_export_equals_torch(tmp_path, trained):
    import torch

    path = export_onnx(trained, tmp_path / "sub" / "m.onnx", (32, 32), outputs=("logits",))
    contract = read_contract(path)
    assert contract.opset == 17 and contract.inputs[0].shape == (1, 3, 32, 32) and contract.outputs[0].shape == (1, 8)
    x = torch.randn(5, 3, 32, 32)
    session = open_session(path)
    got = np.concatenate([session.run(None, {"input": row[None].numpy()})[0] for row in x])
    assert np.abs(got - trained(x).detach().numpy()).max() < 1e-4
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["m.onnx"]


def test_the_task_fits_compare(tmp_path, images, trained):
    model = export_onnx(trained, tmp_path / "m.onnx", (32, 32), outputs=("logits",))
    task = TaggingTask(images, CHAIN)
    int8 = quantize_static(model, task.samples[:20], CHAIN, tmp_path / "q.onnx", progress=False)
    comparison = compare_models(model, {"int8": int8.path}, task, bootstrap=50, latency_runs=2, progress=False)
    assert isinstance(task, Task) and comparison.primary == "map"
    assert list(comparison.table.columns[:5]) == ["model", "map", "precision", "recall", "f1"]
    units = comparison.units["float"]
    wanted = sklearn.metrics.average_precision_score(units.iloc[:, 8:], units.iloc[:, :8])
    assert units.shape == (64, 16) and np.isclose(comparison.table["map"][0], wanted)
    with pytest.raises(ModelError, match="expected 8 scores"):
        task.units([{"logits": np.zeros((1, 3))}] * 64, [])


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    code = (
        "from calib_nb.tags.demo import demo_tagger; "
        "print(demo_tagger(train=32, calibration=2, val=2, size=32, epochs=1, progress=False).model)"
    )
    environment = {**os.environ, "CALIB_NB_CACHE": str(tmp_path)}
    outputs = [tmp_path / "0", tmp_path / "1"]
    for output in outputs:
        output.mkdir()
    both = [forked.start_script(code, env=environment, output=output) for output in outputs]
    for process in both:
        process.join()
    paths = {(output / "1").read_text().strip() for output in outputs}
    assert all(p.exitcode == 0 for p in both) and len(paths) == 1 and os.path.isfile(paths.pop())
    assert len(list((tmp_path / "demo_tagger").iterdir())) == 1  # nothing half made beside it


def score(model, task):
    outputs = run_model(open_session(model), task, progress=False)
    return task.metrics(task.units(outputs, outputs))["map"]


def test_the_shipped_tagger_is_far_above_chance_and_survives_int8(tmp_path):
    demo = demo_tagger(progress=False)
    task = TaggingTask(demo.val, demo.preprocess)
    assert score(demo.model, task) > 2.4 * task.targets.mean()
    calibration = TaggingTask(demo.calibration, demo.preprocess).samples[:50]
    int8 = quantize_static(demo.model, calibration, demo.preprocess, tmp_path / "q.onnx", progress=False)
    compared = compare_models(demo.model, {"int8": int8.path}, task, bootstrap=100, latency_runs=2, progress=False)
    assert abs(compared.table["drop"][1]) < 0.03


@pytest.mark.slow
def test_the_shipped_tagger_can_be_made_again(tmp_path):
    """Bytes differ between processors, score and structure do not."""
    import onnx

    demo = demo_tagger(progress=False)
    task = TaggingTask(demo.val, demo.preprocess)
    drawn = tagged_splits(tmp_path / "drawn", calibration=1, val=1)["train"]
    again = make_demo_tagger(tmp_path / "again.onnx", drawn, progress=False)
    made_again = score(again, task)  # over five seeds 0.67 with a standard deviation of 0.034
    assert made_again > 2 * task.targets.mean() and abs(made_again - score(demo.model, task)) < 0.2
    shipped, new = (onnx.load(str(path)).graph for path in (demo.model, again))
    assert [n.op_type for n in shipped.node] == [n.op_type for n in new.node]
    assert {i.name: tuple(i.dims) for i in shipped.initializer} == {i.name: tuple(i.dims) for i in new.initializer}
    weights = sum(p.numel() for p in compact_tagger(8).parameters())
    assert weights == pytest.approx(50_000, rel=0.02)

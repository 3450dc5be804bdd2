"""The compact tagger: its metric against scikit-learn, training that repeats, an export that equals torch, a cache that two may fill."""

import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.analysis.compare import Task, compare_models, run_model
from calib_nb.core.errors import InputError, ModelError
from calib_nb.data.preprocess import preset
from calib_nb.graph.contract import open_session, read_contract
from calib_nb.graph.export import export_onnx
from calib_nb.quant.quantize import quantize_static
from calib_nb.tags.demo_drawings import tagged_photos
from calib_nb.tags.metrics import average_precision, tag_map
from calib_nb.tags.task import TaggingTask, compact_tagger, demo_tagger, train_compact

CHAIN = preset("resnet-tags", size=(32, 32))


@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float64, (n, 4), elements=st.integers(-5, 5).map(float)),
            hnp.arrays(np.int8, (n, 4), elements=st.integers(0, 1)),
        )
    )
)
def test_average_precision_is_scikit_learns(case):
    scores, targets = case
    got = average_precision(scores, targets)
    for c in range(4):
        assert (
            np.isnan(got[c])
            if not targets[:, c].any()
            else np.isclose(got[c], sklearn.metrics.average_precision_score(targets[:, c], scores[:, c]))
        )
    if targets.any(axis=0).all():
        assert np.isclose(
            tag_map(scores, targets), sklearn.metrics.average_precision_score(targets, scores, average="macro")
        )


def test_map_of_nothing_is_nan_and_of_other_shapes_an_error():
    assert np.isnan(tag_map(np.ones((3, 2)), np.zeros((3, 2))))
    for scores, targets in (
        (np.ones((3, 2)), np.ones((3, 1))),
        (np.ones(3), np.ones(3)),
        (np.ones((0, 2)), np.ones((0, 2))),
    ):
        with pytest.raises(InputError, match="expected two arrays"):
            tag_map(scores, targets)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tagged_photos(tmp_path_factory.mktemp("photos") / "set", 64, size=32)


@pytest.fixture(scope="module")
def trained(photos):
    return train_compact(photos, CHAIN, epochs=2, width=8, progress=False)


def test_import_and_reading_need_no_torch():
    code = "import sys, calib_nb.tags.task, calib_nb.analysis.compare; assert not {'torch', 'onnxruntime', 'onnx', 'matplotlib', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_repeats_and_leaves_torch_as_it_was(photos, trained):
    import torch

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    again, other = (train_compact(photos, CHAIN, epochs=2, width=8, seed=seed, progress=False) for seed in (0, 1))
    assert (
        torch.get_num_threads() == threads
        and torch.equal(torch.random.get_rng_state(), state)
        and not torch.are_deterministic_algorithms_enabled()
    )
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (trained, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_export_equals_torch(tmp_path, trained):
    import torch

    path = export_onnx(trained, tmp_path / "sub" / "m.onnx", (32, 32), outputs=("logits",))
    contract = read_contract(path)
    assert contract.opset == 17 and contract.inputs[0].shape == (1, 3, 32, 32) and contract.outputs[0].shape == (1, 8)
    x = torch.randn(5, 3, 32, 32)
    got = np.concatenate([open_session(path).run(None, {"input": row[None].numpy()})[0] for row in x])
    assert np.abs(got - trained(x).detach().numpy()).max() < 1e-4
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["m.onnx"]


def test_a_module_of_another_size_has_about_as_many_weights_as_said():
    assert sum(p.numel() for p in compact_tagger(8).parameters()) == pytest.approx(50_000, rel=0.02)


def test_the_task_fits_compare(tmp_path, photos, trained):
    model = export_onnx(trained, tmp_path / "m.onnx", (32, 32), outputs=("logits",))
    task = TaggingTask(photos, CHAIN)
    int8 = quantize_static(model, task.samples[:20], CHAIN, tmp_path / "q.onnx", progress=False)
    comparison = compare_models(model, {"int8": int8.path}, task, bootstrap=50, latency_runs=2, progress=False)
    assert (
        isinstance(task, Task)
        and list(comparison.table.columns[:5]) == ["model", "map", "precision", "recall", "f1"]
        and comparison.primary == "map"
    )
    units = comparison.units["float"]
    assert units.shape == (64, 16) and np.isclose(
        comparison.table["map"][0], sklearn.metrics.average_precision_score(units.iloc[:, 8:], units.iloc[:, :8])
    )
    with pytest.raises(ModelError, match="expected 8 scores"):
        task.units([{"logits": np.zeros((1, 3))}] * 64, [])


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    code = "from calib_nb.tags.task import demo_tagger; print(demo_tagger(train=32, calibration=2, val=2, size=32, epochs=1, progress=False).model)"
    environment = {**os.environ, "CALIB_NB_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    paths = {p.communicate()[0].strip() for p in both}
    assert all(p.returncode == 0 for p in both) and len(paths) == 1 and os.path.isfile(paths.pop())
    assert len(list((tmp_path / "demo_tagger").iterdir())) == 1  # nothing half made beside it


@pytest.mark.slow
def test_the_demo_tagger_is_far_above_chance_and_survives_int8(tmp_path):
    demo = demo_tagger(progress=False)
    task = TaggingTask(demo.val, demo.preprocess)
    session = open_session(demo.model)
    outputs = run_model(session, task, progress=False)
    assert task.metrics(task.units(outputs, outputs))["map"] > 2.4 * task.targets.mean()
    int8 = quantize_static(
        demo.model,
        TaggingTask(demo.calibration, demo.preprocess).samples[:50],
        demo.preprocess,
        tmp_path / "q.onnx",
        progress=False,
    )
    assert (
        abs(
            compare_models(demo.model, {"int8": int8.path}, task, bootstrap=100, latency_runs=2, progress=False).table[
                "drop"
            ][1]
        )
        < 0.03
    )

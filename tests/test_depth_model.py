"""The depth network: metrics against numpy, names against torchvision, training that resumes, penalties, export."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.analysis.compare import Task, compare_models, run_model, slices_table
from calib_nb.core.errors import InputError, ModelError
from calib_nb.data.preprocess import PRESETS, Preprocess, preset
from calib_nb.depth.losses import (
    PENALTIES,
    channel_logs,
    folded_weights,
    log_l1_loss,
    mean_penalty,
    penalty_table,
    range_penalty,
    silog_loss,
    smoothness_loss,
)
from calib_nb.depth.metrics import CROPS, DEPTH_METRICS, DepthTask, Scoring, depth_metrics, output_depth, scored_pixels
from calib_nb.depth.network import DepthNet, sigmoid_to_depth
from calib_nb.depth.train import (
    PENALTY_WEIGHTS,
    DepthTraining,
    evaluate_network,
    learning_rate_at,
    load_depth_checkpoint,
    load_network,
    normalise,
    read_pair,
    train_depth,
)
from calib_nb.depth.unequal import streams, unequalize
from calib_nb.graph.contract import open_session, read_contract
from calib_nb.graph.export import export_onnx
from calib_nb.nets.checkpoint import load_imagenet
from calib_nb.quant.quantize import quantize_static

pytestmark = pytest.mark.usefixtures("one_thread")


class Ramps:
    """Frames whose depth is a ramp, shown by their brightness; exact, and the same for every call."""

    def __init__(self, n=12, size=(64, 32)):
        self.n, self.size, self.names = n, size, [f"ramp_{k}" for k in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        rng, (w, h) = np.random.default_rng(k), self.size
        near, far = np.sort(rng.uniform(1, 15, 2))
        depth = np.linspace(far, near, h, dtype=np.float32)[:, None] * np.ones((1, w), np.float32)
        rgb = np.exp(-depth / 8)[None] * np.float32([[[0.9]], [[0.7]], [[0.5]]]) + rng.normal(0, 0.01, (3, h, w))
        depth[:, :3] = 0
        return np.float32(rgb), depth


# --- metrics ---------------------------------------------------------------------------------------------------------


def by_the_book(predicted, truth, scoring):
    """The same numbers pixel by pixel, in plain Python."""
    h, w = truth.shape
    top, bottom, left, right = CROPS[scoring.crop]
    pairs = [
        (float(predicted[y, x]), float(truth[y, x]))
        for y in range(int(top * h), int(bottom * h))
        for x in range(int(left * w), int(right * w))
        if scoring.min_m < truth[y, x] < scoring.max_m
    ]
    if not pairs:
        return None
    scale = np.median([t for _, t in pairs]) / np.median([p for p, _ in pairs]) if scoring.median_scaling else 1.0
    pairs = [(min(max(p * scale, scoring.min_m), scoring.max_m), t) for p, t in pairs]
    n, d = len(pairs), [math.log(p) - math.log(t) for p, t in pairs]
    book = {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
    }
    book |= {
        "rmse_log": math.sqrt(sum(x * x for x in d) / n),
        "silog": 100 * math.sqrt(max(0.0, sum(x * x for x in d) / n - (sum(d) / n) ** 2)),
    }
    return book | {f"a{k}": sum(max(p / t, t / p) < 1.25**k for p, t in pairs) / n for k in (1, 2, 3)} | {"pixels": n}


depths = st.floats(0.0625, 120, width=32)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
        lambda s: st.tuples(
            hnp.arrays(np.float32, s, elements=depths),
            hnp.arrays(np.float32, s, elements=st.one_of(st.just(0.0), depths)),
        )
    ),
    st.sampled_from(list(CROPS)),
    st.booleans(),
    st.sampled_from([(1e-3, 80.0), (0.5, 10.0)]),
)
def test_metrics_are_those_of_the_book(maps, crop, scaling, caps):
    predicted, truth = maps
    scoring = Scoring(*caps, crop=crop, median_scaling=scaling)
    got, book = depth_metrics(predicted, truth, scoring), by_the_book(predicted, truth, scoring)
    if book is None:
        assert got["pixels"] == 0 and all(np.isnan(got[name]) for name in DEPTH_METRICS)
        return
    assert got["pixels"] == book["pixels"] == scored_pixels(truth, scoring).sum()
    for name in ("abs_rel", "sq_rel", "rmse", "rmse_log"):
        assert np.isclose(got[name], book[name], rtol=1e-6, atol=1e-9)
    assert np.isclose(got["silog"], book["silog"], atol=1e-4)
    assert all(
        abs(got[name] - book[name]) * book["pixels"] < 1.5 for name in ("a1", "a2", "a3")
    )  # one pixel may lie on the edge itself


@settings(max_examples=40, deadline=None, derandomize=True)
@given(hnp.arrays(np.float64, (4, 5), elements=st.floats(0.1, 70)), st.floats(0.01, 100))
def test_scale_costs_nothing_where_it_should_not(truth, scale):
    perfect = depth_metrics(truth, truth)
    assert perfect["abs_rel"] == perfect["rmse"] == 0 and perfect["a1"] == 1
    scaled = depth_metrics(truth * scale, truth, Scoring(median_scaling=True))
    assert scaled["abs_rel"] < 1e-9 and scaled["silog"] < 1e-6


def test_metrics_match_a_second_numpy_version():
    rng = np.random.default_rng(0)
    t = rng.uniform(0.5, 90, (60, 80))
    t[rng.random(t.shape) < 0.5] = 0
    p = t * np.exp(rng.normal(0, 0.3, t.shape)) + 0.2
    m = (t > 1e-3) & (t < 80)
    g, q = t[m], np.clip(p[m], 1e-3, 80)
    got = depth_metrics(p, t)
    threshold = np.maximum(g / q, q / g)
    wanted = [
        np.mean(np.abs(g - q) / g),
        np.mean((g - q) ** 2 / g),
        np.sqrt(np.mean((g - q) ** 2)),
        np.sqrt(np.mean((np.log(g) - np.log(q)) ** 2)),
        100 * np.std(np.log(q) - np.log(g)),
    ]
    assert np.allclose([got[k] for k in DEPTH_METRICS], wanted + [np.mean(threshold < 1.25**k) for k in (1, 2, 3)])


@pytest.mark.parametrize(
    "predicted, truth, message",
    [
        (np.ones((2, 3)), np.ones((3, 2)), "one shape"),
        (np.full((2, 2), np.inf), np.ones((2, 2)), "NaN or infinity"),
        (np.ones((1, 2, 2)), np.ones((1, 2, 2)), r"\[H,W\]"),
    ],
)
def test_maps_that_cannot_be_scored_are_refused(predicted, truth, message):
    with pytest.raises(InputError, match=message):
        depth_metrics(predicted, truth)
    with pytest.raises(InputError, match="positive one, to scale by"):
        depth_metrics(np.zeros((2, 2)), np.ones((2, 2)), Scoring(median_scaling=True))


def test_unusable_true_depth_is_no_truth():
    truth = np.array([[np.nan, np.inf, -3.0, 0.0, 2.0]])
    assert depth_metrics(np.full((1, 5), 3.0), truth) == depth_metrics(np.array([[3.0]]), np.array([[2.0]]))


def test_disparity_is_resized_before_it_is_inverted():
    x = np.random.default_rng(0).uniform(0.01, 1, (1, 1, 4, 6)).astype(np.float32)
    wanted = 1 / cv2.resize(x[0, 0], (12, 8), interpolation=cv2.INTER_LINEAR)
    assert np.allclose(output_depth({"disp": x}, (8, 12), Scoring(output="disparity")), wanted)
    assert np.allclose(
        output_depth({"disp": x}, (4, 6), Scoring(output="sigmoid")),
        sigmoid_to_depth(torch.from_numpy(x), 0.1, 100.0)[0, 0],
        rtol=1e-5,
    )
    assert np.isfinite(output_depth({"disp": x * 0}, (4, 6), Scoring(output="disparity"))).all()


# --- the task --------------------------------------------------------------------------------------------------------


def images_of(pairs):
    return [np.uint8(np.clip(pairs[k][0], 0, 1)[::-1].transpose(1, 2, 0) * 255) for k in range(len(pairs))]


def test_the_task_fits_compare_and_names_the_worst_slice(tmp_path):
    data = Ramps(9)
    model = export_onnx(DepthNet(0.125, min_m=0.5, max_m=20), tmp_path / "m.onnx", (64, 32), outputs=("depth",))
    chain = preset("depth", size=(64, 32))
    task = DepthTask(
        images_of(data), [data[k][1] for k in range(9)], chain, scenes=[f"scene_{k % 3}" for k in range(9)]
    )
    int8 = quantize_static(
        model, images_of(data)[:4], chain, tmp_path / "q.onnx", profile="per-tensor-npu", progress=False
    )
    found = compare_models(model, {"int8": int8.path}, task, bootstrap=50, latency_runs=2, progress=False)
    assert (
        isinstance(task, Task) and list(found.table.columns[1:9]) == list(DEPTH_METRICS) and found.primary == "abs_rel"
    )
    assert (
        found.table["drop"][1] == pytest.approx(found.table.abs_rel[1] - found.table.abs_rel[0])
        and found.table.drop_low[1] <= found.table["drop"][1] <= found.table.drop_high[1]
    )
    slices = slices_table(task, task.slices(), found.units["float"], found.units["int8"], least=3)
    top = slices_table(task, task.slices(), found.units["float"], found.units["int8"]).iloc[
        :1
    ]  # slices of eight images or more
    assert found.table.worst_slice.tolist() == ["", *(top["slice"] + ": " + top["value"] if len(top) else [""])]
    assert set(slices.value) >= {"scene_0", "scene_1", "scene_2"} and (np.diff(slices["drop"]) <= 0).all()
    assert set(found.units["float"].depth_range) <= {"near", "mid", "far", "very_far"}


def test_paths_name_their_scene_and_depths_may_be_lazy(tmp_path, caplog):
    paths = []
    for scene in ("a", "b"):
        (tmp_path / scene).mkdir()
        paths.append(tmp_path / scene / "frame_0001.png")
        cv2.imwrite(str(paths[-1]), np.zeros((32, 64, 3), np.uint8))

    class Lazy:
        def __len__(self):
            return 2

        def __getitem__(self, k):
            return np.full((32, 64), [4.0, 0.0][k], np.float32)

    task = DepthTask(paths, Lazy(), preset("depth", size=(64, 32)))
    assert (
        task.unscored == [1]
        and task.facts.scene.tolist() == ["a"]
        and task.facts.depth_range.tolist() == ["mid"]
        and "1 of 2 images have no depth" in caplog.text
    )
    assert task.load(task.samples[0]).shape == (1, 3, 32, 64)


def test_a_published_network_on_real_frames(real_data):
    """Depth up to scale, from a network trained on KITTI, on twenty frames of one busy street."""
    frames = sorted((real_data / "ncdb_real/synced_data/scene_kitti/image_a6").glob("*.png"))
    depths = [
        cv2.imread(str(p.parents[1] / "newest_depth_maps" / p.name), cv2.IMREAD_UNCHANGED).astype(np.float32) / 256
        for p in frames
    ]
    chain = Preprocess().convert_color("BGR2RGB").resize(640, 192).div(255).transpose([2, 0, 1]).expand_dim(0)
    session = open_session(real_data / "models/rtmonodepth_s_m_640x192.onnx")
    found, tasks = (
        {},
        {
            crop: DepthTask(frames, depths, chain, scoring=Scoring(crop=crop, median_scaling=True, output="sigmoid"))
            for crop in ("garg", "")
        },
    )
    outputs = run_model(session, tasks[""], progress=False)
    for crop, task in tasks.items():
        units = task.units(outputs, outputs)
        found[crop] = task.metrics(units)
        assert len(units) == 20 and set(units.scene) == {"image_a6"}
    assert (
        0.15 < found["garg"]["abs_rel"] < 0.25 and found["garg"]["abs_rel"] < found[""]["abs_rel"] < 0.4
    )  # above the crop stands a bridge, far nearer than the network thinks
    blind = DepthTask(frames, depths, chain, scoring=Scoring(crop="garg", median_scaling=True))
    constant = blind.units([{"depth": np.ones((1, 1, 192, 640), np.float32)}] * 20, [])
    assert constant.abs_rel.mean() > 1.5 * found["garg"]["abs_rel"]


# --- the network -----------------------------------------------------------------------------------------------------

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The names and shapes of torchvision's resnet18, as its documentation and published checkpoint give them.
RESNET18 = {"conv1.weight": (64, 3, 7, 7), **{f"bn1.{n}": (64,) for n in NORM}}
for stage, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
    for block in (0, 1):
        at = f"layer{stage}.{block}"
        RESNET18[f"{at}.conv1.weight"] = (outputs, inputs if block == 0 else outputs, 3, 3)
        RESNET18[f"{at}.conv2.weight"] = (outputs, outputs, 3, 3)
        RESNET18 |= {f"{at}.bn{k}.{n}": (outputs,) for k in (1, 2) for n in NORM}
        if block == 0 and stage > 1:
            RESNET18 |= {
                f"{at}.downsample.0.weight": (outputs, inputs, 1, 1),
                **{f"{at}.downsample.1.{n}": (outputs,) for n in NORM},
            }
CLASSIFIER = {"fc.weight": (1000, 512), "fc.bias": (1000,)}


def test_the_encoder_has_torchvisions_names_and_shapes():
    mine = {k: tuple(v.shape) for k, v in DepthNet().encoder.state_dict().items()}
    wanted = {k: v if not k.endswith("num_batches_tracked") else () for k, v in RESNET18.items()}
    assert mine == wanted and len(wanted) == 120
    assert sum(math.prod(v) for k, v in (wanted | CLASSIFIER).items() if k.endswith(("weight", "bias"))) == 11_689_512


@pytest.mark.parametrize("old", [False, True], ids=["with counters", "of before 2018"])
def test_imagenet_weights_load(tmp_path, old):
    shapes = {k: v for k, v in (RESNET18 | CLASSIFIER).items() if not (old and k.endswith("num_batches_tracked"))}
    generator = torch.Generator().manual_seed(0)
    published = {
        k: torch.tensor(7) if k.endswith("num_batches_tracked") else torch.rand(v, generator=generator)
        for k, v in shapes.items()
    }
    torch.save(published, tmp_path / "resnet18.pth")
    network = DepthNet()
    assert load_imagenet(network.encoder, tmp_path / "resnet18.pth") == list(CLASSIFIER)
    state = network.encoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in published.items() if k not in CLASSIFIER)
    torch.save(published | {"conv9.weight": torch.zeros(1)}, tmp_path / "long.pth")
    with pytest.raises(ModelError, match="conv9"):
        load_imagenet(DepthNet().encoder, tmp_path / "long.pth")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"conv1.weight": Evil(), "format": 1}, tmp_path / "evil.pth")
    for load in (lambda p: load_imagenet(DepthNet(0.125).encoder, p), load_depth_checkpoint):
        with pytest.raises(ModelError, match="cannot be read as a checkpoint: it wants to run '.*mkdir'"):
            load(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_taggers_checkpoint_is_none_of_a_depth_network(tmp_path):
    from calib_nb.tags.network import TaggerSpec, build_tagger, save_tagger

    spec = TaggerSpec("resnet18", ("a", "b"), width=8)
    with pytest.raises(ModelError, match="not a checkpoint of a depth network"):
        load_network(save_tagger(tmp_path / "tagger.pth", spec, build_tagger(spec)))


@pytest.mark.parametrize("width", [0.125, 0.25, 0.4, 1.0])
def test_no_parameter_is_dead(width):
    """Every tensor of the state is used: the head of a ResNet is not among them, and each gets a gradient."""
    network = DepthNet(width)
    network(torch.randn(2, 3, 32, 64)).log().mean().backward()
    assert all(p.grad is not None for p in network.parameters()) and not [k for k in network.state_dict() if "fc" in k]
    assert all(m.num_features % 8 == 0 for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(0.1, 100.0), (0.5, 10.0)]))
def test_any_size_divisible_by_32(rows, columns, limits):
    network = DepthNet(0.125, min_m=limits[0], max_m=limits[1]).eval()
    with torch.no_grad():
        depth = network(torch.randn(2, 3, 32 * rows, 32 * columns) * 5)
    assert (
        depth.shape == (2, 1, 32 * rows, 32 * columns)
        and limits[0] * 0.999 <= depth.min() <= depth.max() <= limits[1] * 1.001
    )
    with pytest.raises(InputError, match="divisible by 32"):
        network(torch.zeros(1, 3, 32 * rows + 16, 32 * columns))


@pytest.mark.parametrize("width, size", [(0.25, (64, 96)), (0.125, (160, 32))])
def test_the_file_equals_torch_and_is_static(tmp_path, width, size):
    network = DepthNet(width, min_m=0.5, max_m=20, seed=3)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(2, 3, size[1], size[0]))
    path = export_onnx(network, tmp_path / "m.onnx", size, outputs=("depth",))
    contract = read_contract(path)
    assert contract.inputs[0].shape == (1, 3, size[1], size[0]) and contract.outputs[0].shape == (
        1,
        1,
        size[1],
        size[0],
    )
    x = torch.randn(1, 3, size[1], size[0])
    assert np.abs(open_session(path).run(None, {"input": x.numpy()})[0] / network(x).detach().numpy() - 1).max() < 1e-4
    import onnx

    assert {n.op_type for n in onnx.load(path).graph.node} <= {
        "Conv",
        "Relu",
        "Add",
        "MaxPool",
        "Resize",
        "Sigmoid",
        "Mul",
        "Reciprocal",
        "Div",
        "Constant",
        "Identity",
    }


def test_an_export_that_fails_leaves_the_old_file(tmp_path):
    class Forgetful(torch.nn.Module):
        def forward(self, x):
            return x + torch.from_numpy(np.random.default_rng().normal(size=(1,)).astype(np.float32))

    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(ModelError, match="differs from the torch module"):
        export_onnx(Forgetful(), tmp_path / "m.onnx", (32, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"] and (tmp_path / "m.onnx").read_text() == "old"


def test_scoring_needs_no_torch():
    code = "import sys, calib_nb.depth.metrics; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- losses ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_losses_are_those_of_numpy_and_their_slopes_those_of_finite_differences(seed):
    rng = np.random.default_rng(seed)
    p, t = rng.uniform(0.5, 20, (2, 1, 3, 4)), rng.uniform(0.5, 20, (2, 3, 4)) * (rng.random((2, 3, 4)) < 0.7)
    t[0, 0, 0] = 3.0
    d = (np.log(p[:, 0]) - np.log(np.where(t > 0, t, 1)))[t > 0]
    x, truth = torch.from_numpy(p).requires_grad_(), torch.from_numpy(t)
    assert silog_loss(x, truth).item() == pytest.approx(
        math.sqrt(max(0, (d**2).mean() - 0.85 * d.mean() ** 2) + 1e-9)
    ) and log_l1_loss(x, truth).item() == pytest.approx(np.abs(d).mean())
    rgb = torch.from_numpy(rng.random((2, 3, 3, 4)))
    for loss in (lambda x: silog_loss(x, truth), lambda x: log_l1_loss(x, truth), lambda x: smoothness_loss(x, rgb)):
        assert torch.autograd.gradcheck(loss, x)


def test_penalties_against_numpy_and_finite_differences():
    network = DepthNet(0.125, seed=2).double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.01, 2)
            torch.nn.init.uniform_(module.running_var, 0.1, 3)
    means = [p.detach().numpy().reshape(len(p), -1).mean(1).var() for p in network.parameters() if p.ndim > 1]
    assert mean_penalty(network).item() == pytest.approx(sum(means))
    logs = [
        np.log(np.abs(w.detach().numpy()).reshape(len(w), -1).max(1)).var() for w in folded_weights(network).values()
    ]
    assert range_penalty(network).item() == pytest.approx(sum(logs), rel=1e-6) and len(logs) == 35
    table = penalty_table(network)
    assert table.range_variance.sum() == pytest.approx(
        sum(logs), rel=1e-6
    ) and table.mean_variance.sum() == pytest.approx(sum(means), rel=1e-6)
    for penalty in PENALTIES.values():
        for parameter in (network.encoder.conv1.weight, network.encoder.bn1.weight, network.decoder[1].lateral.weight):
            network.zero_grad()
            penalty(network).backward()
            direction = torch.randn_like(parameter)
            slope = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
            values = []
            for step in (1e-7, -1e-7):
                parameter.data += step * direction
                values.append(penalty(network).item())
                parameter.data -= step * direction
            assert slope == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-3, abs=1e-6)


def test_folded_weights_are_those_of_the_exported_file(tmp_path):
    import onnx

    network = DepthNet(0.125, seed=1)
    with torch.no_grad():
        network.train()(torch.randn(2, 3, 64, 64))
    path = export_onnx(network, tmp_path / "m.onnx", (64, 64))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    written = [stored[n.input[1]] for n in onnx.load(path).graph.node if n.op_type == "Conv"]
    for name, weight in folded_weights(network).items():
        assert any(w.shape == tuple(weight.shape) and np.allclose(w, weight.detach(), atol=1e-6) for w in written), name


def test_dead_channels_are_left_alone():
    weight = torch.tensor([[1.0], [0.0], [1e-9]], requires_grad=True)
    channel_logs(weight).var(unbiased=False).backward()
    assert (
        torch.isfinite(weight.grad).all()
        and weight.grad[1:].abs().sum() == 0
        and torch.isfinite(channel_logs(torch.zeros(3, 2))).all()
    )


# --- training --------------------------------------------------------------------------------------------------------

PLAN = DepthTraining(epochs=3, batch=4, learning_rate=5e-3)


def weights(network):
    return torch.cat([v.flatten().double() for v in network.state_dict().values()])


def test_training_repeats_and_learns():
    runs = []
    for seed in (0, 0, 1):
        network = DepthNet(0.125, min_m=0.5, max_m=20)
        runs.append(
            (
                train_depth(
                    network, Ramps(), DepthTraining(epochs=6, batch=4, learning_rate=1e-2, seed=seed), progress=False
                ),
                network,
            )
        )
    assert (
        runs[0][0].equals(runs[1][0])
        and torch.equal(weights(runs[0][1]), weights(runs[1][1]))
        and not torch.equal(weights(runs[0][1]), weights(runs[2][1]))
    )
    assert runs[0][0].loss.iloc[-1] < 0.7 * runs[0][0].loss[0] and not runs[0][1].training


@pytest.mark.parametrize("after", [1, 2])
def test_resuming_is_exact(tmp_path, after):
    class Stopped(Ramps):
        left = 12 * after + 5

        def __getitem__(self, k):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__getitem__(k)

    whole, resumed = DepthNet(0.125), DepthNet(0.125, seed=5)
    plan = DepthTraining(**{**PLAN.__dict__, "penalty": "range"})
    through = train_depth(whole, Ramps(), plan, validation=Ramps(3), folder=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_depth(DepthNet(0.125), Stopped(), plan, validation=Ramps(3), folder=tmp_path / "stopped", progress=False)
    again = train_depth(
        resumed, Ramps(), plan, validation=Ramps(3), folder=tmp_path / "stopped", resume=True, progress=False
    )
    assert again.equals(through) and torch.equal(weights(resumed), weights(whole))
    done = train_depth(DepthNet(0.125), Ramps(), plan, folder=tmp_path / "whole", resume=True, progress=False)
    assert done.equals(through)  # nothing left to do
    with pytest.raises(InputError, match="of another training: .*batch 4 there, 3 here"):
        train_depth(
            resumed, Ramps(), DepthTraining(**{**plan.__dict__, "batch": 3}), folder=tmp_path / "whole", resume=True
        )
    with pytest.raises(InputError, match="width 0.125 there, 0.25 here"):
        train_depth(DepthNet(0.25), Ramps(), plan, folder=tmp_path / "whole", resume=True)
    with pytest.raises(InputError, match="frames 12 there, 11 here"):
        train_depth(resumed, Ramps(11), plan, folder=tmp_path / "whole", resume=True)


def test_a_killed_training_goes_on(tmp_path):
    code = "\n".join((
        "import sys, torch; torch.set_num_threads(1)",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "from test_depth_model import Ramps, DepthTraining, DepthNet, train_depth",
        "plan = DepthTraining(epochs=6000, batch=4)",
        "train_depth(DepthNet(0.125), Ramps(), plan, folder=sys.argv[1], progress=False)",
    ))  # fmt: skip
    run = forked.start_script(code, tmp_path / "run")
    checkpoint, stop = tmp_path / "run" / "checkpoint.pt", time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < stop:
        time.sleep(0.05)
    time.sleep(0.3)
    forked.kill(run)
    content = load_depth_checkpoint(checkpoint)  # whole, whenever the kill came
    assert 1 <= len(content["history"]) < 6000 and load_network(checkpoint)(torch.zeros(1, 3, 32, 32)).shape == (
        1,
        1,
        32,
        32,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_names_the_batch_and_touches_nothing(value):
    class Broken(Ramps):
        def __getitem__(self, k):
            rgb, depth = super().__getitem__(k)
            return (rgb * np.float32(value) if k == 7 else rgb), depth

    network = DepthNet(0.125)
    with pytest.raises(InputError, match=r"epoch 0, batch \d: the loss or its gradient is not finite; frames .*ramp_7"):
        train_depth(network, Broken(), PLAN, progress=False)
    assert all(torch.isfinite(p).all() for p in network.parameters()) and not network.training
    unnamed = [Broken()[k] for k in range(12)]
    with pytest.raises(InputError, match="frames .*number 7"):
        train_depth(DepthNet(0.125), unnamed, PLAN, progress=False)


def test_frames_without_depth_do_no_harm():
    class Bare(Ramps):
        def __getitem__(self, k):
            rgb, depth = super().__getitem__(k)
            return rgb, depth * (k % 4 == 0)

    plan = DepthTraining(epochs=1, batch=4, smoothness=0)
    history = train_depth(DepthNet(0.125), Bare(), plan, validation=Bare(2), progress=False)
    assert np.isfinite(history.loss[0]) and np.isfinite(history.abs_rel).all()


def test_the_schedule_and_the_settings():
    rates = [learning_rate_at(k, 100, DepthTraining(learning_rate=2.0, warmup=0.1)) for k in range(100)]
    assert (
        np.allclose(rates[:10], 0.2 * np.arange(1, 11))
        and np.isclose(rates[54], 1)
        and np.isclose(rates[99], 0)
        and max(rates) == rates[9] == 2
    )
    assert [DepthTraining(penalty=p).penalty_weight for p in ("", "mean", "range")] == list(
        PENALTY_WEIGHTS.values()
    ) and DepthTraining(penalty="range", penalty_weight=2.0).penalty_weight == 2
    assert DepthTraining(warmup=0).warmup == 0 and learning_rate_at(0, 1, DepthTraining(warmup=0)) < 1e-12
    for wrong in (
        dict(clip=0),
        dict(learning_rate=math.nan),
        dict(penalty="rang"),
        dict(warmup=1),
        dict(penalty_weight=-1),
    ):
        with pytest.raises(InputError):
            DepthTraining(**wrong)


def test_normalising_is_the_presets():
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    wanted = preset("depth", size=(64, 32))(image)
    got = normalise(torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())[None] / 255)
    assert np.allclose(got, wanted, atol=1e-5) and PRESETS["depth"].color == "RGB"


def test_workers_and_tensors_change_nothing():
    tensors = [tuple(torch.from_numpy(x) for x in Ramps()[k]) for k in range(12)]
    one, two, three = (
        train_depth(DepthNet(0.125), data, DepthTraining(epochs=1, batch=4, workers=workers), progress=False)
        for data, workers in ((Ramps(), 0), (Ramps(), 2), (tensors, 0))
    )
    assert one.equals(two) and one.equals(three) and read_pair(tensors, 0)[0].dtype == torch.float32
    frames = evaluate_network(DepthNet(0.125), Ramps(5), batch=2)
    assert len(frames) == 5 and frames.abs_rel.tolist() == pytest.approx(
        evaluate_network(DepthNet(0.125), Ramps(5), batch=5).abs_rel.tolist(), rel=1e-4
    )


def test_tensorboard_logs_are_there(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train_depth(DepthNet(0.125), Ramps(), PLAN, validation=Ramps(2), folder=tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("step/loss")] == list(range(9))
    for column in history.columns[1:]:
        assert np.allclose([e.value for e in events.Scalars(f"epoch/{column}")], history[column])


def test_without_tensorboard_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="TensorBoard is not installed; pip install"):
        train_depth(DepthNet(0.125), Ramps(), PLAN, folder=tmp_path, progress=False)
    assert len(train_depth(DepthNet(0.125), Ramps(), DepthTraining(epochs=1, batch=4), progress=False)) == 1


def test_fine_tuning_with_the_range_penalty_evens_the_ranges(tmp_path):
    network = DepthNet(0.125, min_m=0.5, max_m=20)
    train_depth(network, Ramps(), PLAN, folder=tmp_path, progress=False)
    uneven = unequalize(network, 1)
    plain, evened = unequalize(network, 1), unequalize(network, 1)
    train_depth(plain, Ramps(), DepthTraining(epochs=4, batch=4, learning_rate=1e-2), progress=False)
    train_depth(
        evened,
        Ramps(),
        DepthTraining(epochs=4, batch=4, learning_rate=1e-2, penalty="range", penalty_weight=0.1),
        progress=False,
    )
    before, without, with_penalty = (range_penalty(n).item() for n in (uneven, plain, evened))
    assert with_penalty < 0.8 * min(before, without)
    assert torch.equal(weights(load_network(tmp_path / "checkpoint.pt")), weights(network))


# --- unequal channels ------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.floats(0, 4), st.integers(0, 1000), st.sampled_from([0.125, 0.25]))
def test_unequal_channels_compute_the_same(decades, seed, width):
    network = DepthNet(width, min_m=0.5, max_m=20, seed=seed)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for _ in range(5):
            network.train()(x)
        network.eval()
        other = unequalize(network, decades, seed=seed)
        assert ((other(x) - network(x)).abs() / network(x)).max() < 1e-4 and not other.training
    spread = penalty_table(other).spread
    assert decades < 2 or spread.median() > 3 * penalty_table(network).spread.median()


def test_every_stream_is_found_in_the_file_too(tmp_path):
    from calib_nb.graph.model import load_graph
    from calib_nb.graph.simplify import simplify
    from calib_nb.quant.equalize import channel_groups

    network = DepthNet(0.125)
    groups = channel_groups(simplify(load_graph(export_onnx(network, tmp_path / "m.onnx", (64, 64)))))
    mine = sorted((s.channels, len(s.makers), len(s.readers)) for s in streams(network))
    assert sorted((g.channels, len(g.producers), len(g.consumers)) for g in groups) == mine

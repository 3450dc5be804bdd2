"""The diagnosis of INT8 files, ours and ONNX Runtime's: an oracle, a planted fault, two models, the command."""

import os
import re
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calib_nb.analysis.diagnose import Thresholds, diagnose_model, plot_diagnosis
from calib_nb.analysis.diagnosis_page import diagnosis_page
from calib_nb.analysis.match import match_models
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.similarity import similarity
from calib_nb.data.images import decode
from calib_nb.data.preprocess import preset
from calib_nb.graph import build
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.layers import get_bias, layers, set_bias
from calib_nb.graph.model import load_graph
from calib_nb.graph.simplify import simplify
from calib_nb.quant.blocks import quantize_weights_only
from calib_nb.quant.equalize import equalize, mirror_channels
from calib_nb.quant.quantize import quantize_static
from calib_nb.quant.recipe import auto
from calib_nb.quant.target import PROFILES

quantization = pytest.importorskip("onnxruntime.quantization")


TEXT = """c1 = Conv <pads = [1, 1, 1, 1]> (input, w1)
    n1 = BatchNormalization (c1, gamma, beta, mean, var)
    r1 = Relu (n1)
    c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2, b2)
    r2 = Relu (c2)
    c3 = Conv (r2, w3, b3)
    sum = Add (r1, c3)
    p = GlobalAveragePool (sum)
    f = Flatten (p)
    output = Gemm <transB = 1> (f, w4, b4)"""


def network(path, seed=0, names=str):
    """A depthwise convolution in a residual, as a file; input 1x3x16x16, output 1x6. `names` renames tensors."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "gamma": rng.uniform(0.5, 2, 8),
        "beta": rng.normal(0, 0.1, 8),
        "mean": rng.normal(0, 0.1, 8),
        "var": rng.uniform(0.5, 2, 8),
        "w2": rng.normal(0, 0.4, (8, 1, 3, 3)),
        "b2": rng.normal(0, 0.1, 8),
        "w3": rng.normal(0, 0.3, (8, 8, 1, 1)),
        "b3": rng.normal(0, 0.1, 8),
        "w4": rng.normal(0, 0.3, (6, 8)),
        "b4": rng.normal(0, 0.1, 6),
    }
    tensors = ("c1", "n1", "r1", "c2", "r2", "c3", "sum", "p", "f")
    text = re.sub(rf"\b({'|'.join(tensors)})\b", lambda m: names(m[0]), TEXT)
    graph = build.network(text, inputs={"input": (1, 3, 16, 16)}, **weights)
    for node in graph.nodes:
        node.name = f"{node.op_type}_{node.output[0]}"
    return graph.save(path)


def chain(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


IMAGES = list(np.random.default_rng(7).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8))


def static(model, output, images, preprocess, per_channel, prepare=False):
    """An INT8 file as ONNX Runtime's users make it."""
    source = Path(model)
    if prepare:
        source = output.with_name("prepared.onnx")
        quantization.quant_pre_process(str(model), str(source), skip_symbolic_shape=True)
    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = iter(
                [{name: preprocess(p if isinstance(p, np.ndarray) else decode(p)).astype(np.float32)} for p in images]
            )

        def get_next(self):
            return next(self.feeds, None)

    quantization.quantize_static(str(source), str(output), Reader(), per_channel=per_channel)
    return output


WRITERS = {
    "ort per tensor": lambda m, o, p, c: static(m, o, p, c, False),
    "ort per channel": lambda m, o, p, c: static(m, o, p, c, True),
    "ort prepared": lambda m, o, p, c: static(m, o, p, c, True, prepare=True),
    "ort-cpu": lambda m, o, p, c: quantize_static(m, p, c, o, profile="ort-cpu", progress=False).path,
    "per-tensor-npu": lambda m, o, p, c: quantize_static(m, p, c, o, profile="per-tensor-npu", progress=False).path,
}


def tensors(path, names):
    """Values of inner tensors on all images, straight from ONNX Runtime without its optimizations."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.stack(a).astype(np.float64) for a in zip(*(session.run(names, {"input": chain(p)}) for p in IMAGES))]


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_read(writer, tmp_path):
    model = network(tmp_path / "m.onnx")
    int8 = WRITERS[writer](model, tmp_path / "q.onnx", IMAGES, chain)
    diagnosis = diagnose_model(model, int8, IMAGES, chain, progress=False)
    table = diagnosis.table.set_index("output")
    assert not diagnosis.unmatched and diagnosis.table.macs_share.sum() == pytest.approx(1)
    assert (table.sqnr_alone_db > 25).all() and set(table.grade) == {"OK"} and not table.rescaled.any()
    linear = table[table.op.isin(["Conv", "Gemm"])]
    assert (
        len(linear) == 4
        and linear.int8.all()
        and (linear.weight_sqnr_db > 25).all()
        and (linear.weight_per_channel[:3] == (writer not in ("ort per tensor", "per-tensor-npu"))).all()
    )
    ours, theirs = tensors(model, ["output"])[0], tensors(int8, ["output"])[0]
    cosine, sqnr_db = similarity(ours, theirs)
    assert table.cosine["output"] == pytest.approx(cosine, abs=1e-5) and table.sqnr_db["output"] == pytest.approx(
        sqnr_db, abs=0.02
    )


def test_numbers_against_an_oracle(tmp_path):
    """The residual of ONNX Runtime's file by hand: alone it is the float sum, rounded by its own Q."""
    model = network(tmp_path / "m.onnx")
    int8 = static(model, tmp_path / "q.onnx", IMAGES[:5], chain, False)
    table = diagnose_model(model, int8, IMAGES, chain, progress=False).table.set_index("output")
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(int8).graph.initializer}
    scale, zero = float(constants["sum_scale"]), int(constants["sum_zero_point"])
    x, y = tensors(model, ["sum"])[0], tensors(int8, ["sum_DequantizeLinear_Output"])[0]
    low, high = (
        (np.iinfo(constants["sum_zero_point"].dtype).min - zero) * scale,
        (np.iinfo(constants["sum_zero_point"].dtype).max - zero) * scale,
    )
    alone = np.clip(np.rint(x / scale) * scale, low, high)
    row = table.loc["sum"]
    assert (row.cosine, row.sqnr_db) == pytest.approx(similarity(x, y), abs=1e-3)
    assert (row.cosine_alone, row.sqnr_alone_db) == pytest.approx(similarity(x, alone), abs=1e-2)
    assert row.clipped_share == pytest.approx(np.mean((x > high + scale / 2) | (x < low - scale / 2)), abs=1e-3)
    assert row.range_use == pytest.approx((min(x.max(), high) - max(x.min(), low)) / (high - low), abs=2 / 255)
    outside = (x > high) | (x < low)
    assert row.scale == pytest.approx(scale) and row.cause == (
        "clipping" if np.square(x - alone)[outside].sum() > np.square(x - alone)[~outside].sum() else "rounding"
    )
    per_channel = [similarity(x[:, :, c], alone[:, :, c])[1] for c in range(8)]
    assert row.channel_sqnr_db == pytest.approx(np.median(per_channel), abs=0.05)
    reach = np.abs(x).max((0, 1, 3, 4))
    assert row.uneven >= 0.95 * reach.max() / np.median(reach)


@pytest.mark.parametrize("writer", ["ort per tensor", "per-tensor-npu"])
def test_a_planted_fault_is_found(writer, tmp_path):
    model = network(tmp_path / "m.onnx")
    broken = onnx.load(WRITERS[writer](model, tmp_path / "q.onnx", IMAGES, chain))
    scale = next(t for t in broken.graph.initializer if t.name == "r1_scale")
    readers = [n.name for n in broken.graph.node if scale.name in n.input]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(20), scale.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    assert readers
    diagnosis = diagnose_model(model, tmp_path / "broken.onnx", IMAGES, chain, progress=False)
    table = diagnosis.table.set_index("output")
    worst = diagnosis.worst().iloc[0]
    assert (worst.output, worst.grade, worst.cause) == ("r1", "Critical", "clipping") and worst.clipped_share > 0.3
    assert (table.sqnr_alone_db.drop("r1") > 25).all()
    assert (
        table.sqnr_db["r2"] < 10
        and table.grade["r2"] == "Warning"
        and f"see {worst.node} first" in table.next_step["r2"]
    )
    assert "cut off" in worst.next_step and worst.node in diagnosis.worst().node.iloc[0]


def test_a_wrong_weight_scale_is_not_taken_for_intent(tmp_path):
    model = network(tmp_path / "m.onnx")
    broken = onnx.load(
        quantize_static(model, IMAGES, chain, tmp_path / "q.onnx", profile="per-tensor-npu", progress=False).path
    )
    scale = next(t for t in broken.graph.initializer if t.name == "w3_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(3), scale.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    table = diagnose_model(model, tmp_path / "broken.onnx", IMAGES, chain, progress=False).table.set_index("output")
    assert (
        not table.rescaled.any()
        and table.own_db.idxmin() == "c3"
        and table.grade["c3"] == "Critical"
        and table.weight_sqnr_db["c3"] < 0
        and table.cause["c3"] in ("weights", "clipping")
    )


def test_equalized_networks_are_compared_without_their_factors(tmp_path):
    model = network(tmp_path / "m.onnx")
    even = equalize(simplify(load_graph(model)), [chain(p) for p in IMAGES]).save(tmp_path / "even.onnx")
    table = diagnose_model(
        model,
        quantize_static(even, IMAGES, chain, tmp_path / "q.onnx", progress=False).path,
        IMAGES,
        chain,
        progress=False,
    ).table.set_index("output")
    assert table.rescaled.sum() >= 1 and (table.own_db > 20).all() and table.weight_sqnr_db[["r2", "c3"]].isna().all()
    recipe = auto(model, IMAGES, chain, tmp_path / "auto.onnx", profile="per-tensor-npu", progress=False)
    diagnosis = diagnose_model(model, recipe.model.path, IMAGES, chain, progress=False)
    assert not diagnosis.unmatched and (diagnosis.table.own_db > 20).all()


def test_channels_turned_around_are_compared_as_they_were(tmp_path):
    rng = np.random.default_rng(4)
    push = np.where(np.arange(8) % 2, 2.0, -2.0)
    body = build.sequential(
        build.conv(8, 1),
        build.depthwise(),
        "Relu",
        build.conv(8, 1),
        build.depthwise(),
        "Relu",
        build.conv(4, 1),
        shape=(1, 3, 16, 16),
    )
    graph = simplify(body)
    for layer in layers(graph)[::2][:2]:
        set_bias(graph, layer, push * rng.uniform(0.5, 1, 8))
    model = graph.save(tmp_path / "m.onnx")
    turned = mirror_channels(graph, [chain(p) for p in IMAGES])
    biases = [[get_bias(g, layer) for layer in layers(g)[::2][:2]] for g in (graph, turned)]
    assert all((one != other).any() and np.array_equal(abs(one), abs(other)) for one, other in zip(*biases))
    file = quantize_static(turned.save(tmp_path / "t.onnx"), IMAGES, chain, tmp_path / "q.onnx", progress=False).path
    table = diagnose_model(model, file, IMAGES, chain, progress=False).table
    assert table.rescaled.sum() == 2 and (table.own_db > 20).all() and set(table.grade) == {"OK"}


def test_files_that_do_not_belong_together(tmp_path):
    model = network(tmp_path / "m.onnx")
    int8 = quantize_static(model, IMAGES, chain, tmp_path / "q.onnx", progress=False).path
    with pytest.raises(ModelError, match="weights of q.onnx are not those of other.onnx"):
        diagnose_model(network(tmp_path / "other.onnx", seed=5), int8, IMAGES, chain, progress=False)
    with pytest.raises(ModelError, match="of the layers of renamed.onnx are in q.onnx"):
        diagnose_model(
            network(tmp_path / "renamed.onnx", names=lambda n: f"t_{n}"), int8, IMAGES, chain, progress=False
        )
    with pytest.raises(ModelError, match="is a float model"):
        diagnose_model(model, model, IMAGES, chain, progress=False)
    with pytest.raises(ModelError, match="already quantized"):
        diagnose_model(int8, int8, IMAGES, chain, progress=False)
    with pytest.raises(ModelError, match="no such model"):
        diagnose_model(model, tmp_path / "missing.onnx", IMAGES, chain, progress=False)
    with pytest.raises(InputError, match="preprocessing gives"):
        diagnose_model(model, int8, IMAGES, lambda bgr: chain(bgr)[:, :, :8], progress=False)
    quantization.quantize_dynamic(str(model), str(tmp_path / "dynamic.onnx"))
    with pytest.raises(ModelError, match="integer operators"):
        diagnose_model(model, tmp_path / "dynamic.onnx", IMAGES, chain, progress=False)


def test_a_layer_without_counterpart_is_listed_never_guessed(tmp_path):
    model = network(tmp_path / "m.onnx")
    written = onnx.load(
        quantize_static(model, IMAGES, chain, tmp_path / "q.onnx", profile="per-tensor-npu", progress=False).path
    )
    for n in written.graph.node:
        for names in (n.input, n.output):
            for k, name in enumerate(names):
                names[k] = "hidden" if name == "r2" else name
    onnx.save(written, tmp_path / "hidden.onnx")
    diagnosis = diagnose_model(model, tmp_path / "hidden.onnx", IMAGES, chain, progress=False)
    assert (
        "Conv_c2" in diagnosis.unmatched
        and "r2" not in set(diagnosis.table.output)
        and "no counterpart" in diagnosis.summary
    )
    assert not match_models(model, tmp_path / "hidden.onnx").factors


def test_page_and_figure(tmp_path):
    import matplotlib.pyplot as plt

    model = network(tmp_path / "m.onnx")
    diagnosis = diagnose_model(
        model,
        quantize_static(model, IMAGES, chain, tmp_path / "q.onnx", progress=False).path,
        IMAGES,
        chain,
        thresholds=Thresholds(warning_db=60),
        progress=False,
    )
    page = diagnosis_page(diagnosis, tmp_path / "sub" / "page.html")
    first = page.read_bytes()
    assert (
        b"Begin here" in first and b'src="http' not in first and diagnosis_page(diagnosis, page).read_bytes() == first
    )
    ax = plot_diagnosis(diagnosis, plt.subplots()[1])
    assert ax.get_ylabel() == "SQNR against float (dB)" and [p.name for p in page.parent.iterdir()] == ["page.html"]
    plt.close("all")


def test_command(tmp_path):
    """The command as a process: files written, exit codes."""
    import json

    import cv2

    model = network(tmp_path / "m.onnx")
    int8 = quantize_static(model, IMAGES, chain, tmp_path / "q.onnx", progress=False).path
    (tmp_path / "images").mkdir()
    for k, image in enumerate(IMAGES):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), image)
    steps = [
        {"div": {"x": 127.5}},
        {"subtract": {"x": 1}},
        {"transpose": {"axis": [2, 0, 1]}},
        {"expandDim": {"axis": 0}},
    ]
    config = {
        "inputs": {"input": [1, 3, 16, 16]},
        "calibration_num": 5,
        "calibration_method": "ema",
        "default_loader": {
            "dataset_path": str(tmp_path / "images"),
            "file_extensions": ["png"],
            "preprocessings": steps,
        },
    }
    (tmp_path / "c.json").write_text(json.dumps(config))

    def command(*arguments):
        plain = {"MPLBACKEND": "agg", "TQDM_DISABLE": "1"}
        return forked.calib_nb("diagnose", *arguments, cwd=tmp_path, env=os.environ | plain)

    done = command("--float", model, "--int8", int8, "--config", "c.json", "--output", "diagnosis")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "diagnosis").iterdir()} == {
        "diagnosis.csv",
        "diagnosis.html",
        "diagnosis.png",
    } and "0 Critical" in done.stdout
    wrong = command("--float", model, "--int8", model, "--config", "c.json")
    assert wrong.returncode == 2 and "is a float model" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1
    assert command("--float", model, "--int8", int8, "--config", "none.json").returncode == 2
    assert command("--int8", int8).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_edgeface(writer, real_data, tmp_path):
    """Whoever wrote the file: all layers are diagnosis, and the residuals with uneven channels are named."""
    model = fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "edge.onnx")
    images = sorted((real_data / "lfw" / "images").rglob("*.jpg"))
    int8 = WRITERS[writer](model, tmp_path / "q.onnx", images[::80], preset("edgeface"))
    diagnosis = diagnose_model(model, int8, images[7::200], preset("edgeface"), progress=False)
    assert not diagnosis.unmatched and not diagnosis.table.rescaled.any()
    assert diagnosis.table.weight_sqnr_db.notna().sum() >= 50
    if writer != "ort-cpu":  # which leaves everything but products in float
        worst = diagnosis.worst()
        assert (
            list(worst.op[worst.grade == "Critical"])
            and set(worst.op[worst.grade == "Critical"]) <= {"Mul", "Add"}
            and (worst.uneven[:3] > 50).all()
            and "LayerNormalization" in set(worst.op)
        )
    assert diagnosis.table.sqnr_db.iloc[-1] < 12


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_yunet(writer, real_data, tmp_path):
    model = real_data / "models" / "face_detection_yunet_2023mar.onnx"
    images, see = sorted((real_data / "faces_multi" / "ub").rglob("*.jpg")), preset("yunet", size=(640, 640))
    source = model
    if writer in (
        "ort per channel",
        "ort prepared",
    ):  # below opset 13 quantize_static writes scales per channel that nothing can read
        source = tmp_path / "opset13.onnx"
        onnx.save(onnx.version_converter.convert_version(onnx.load(model), 13), source)
        with pytest.raises(ModelError, match="unreadable.onnx"):
            diagnose_model(
                model,
                static(model, tmp_path / "unreadable.onnx", images[:1], see, True),
                images[8:9],
                see,
                progress=False,
            )
    diagnosis = diagnose_model(
        model, WRITERS[writer](source, tmp_path / "q.onnx", images[:8], see), images[8:11], see, progress=False
    )
    assert (
        not diagnosis.unmatched and len(diagnosis.table) >= 60 and (diagnosis.table.weight_sqnr_db.dropna() > 25).all()
    )
    assert (diagnosis.table.own_db[diagnosis.table.op == "Conv"] > 20).all()


def test_weights_of_four_bits_are_called_so(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"k": rng.normal(0, 0.2, (4, 3, 3, 3)), "w": rng.normal(0, 0.1, (36, 5))}
    text = "c = Conv (input, k); f = Flatten (c); output = MatMul (f, w)"
    weights["w"] *= np.exp(rng.normal(0, 2, weights["w"].shape))
    model = build.network(text, inputs={"input": (1, 3, 5, 5)}, outputs=("output",), **weights).save(
        tmp_path / "m.onnx"
    )
    images = list(rng.integers(0, 256, (6, 5, 5, 3)).astype(np.uint8))

    def small_chain(bgr):
        return (bgr.transpose(2, 0, 1)[None] / 128 - 1).astype(np.float32)

    settings = {"profile": replace(PROFILES["ort-cpu"], weight_bits=4), "progress": False}
    four = quantize_static(model, images, small_chain, tmp_path / "4.onnx", **settings).path
    alone = quantize_weights_only(model, tmp_path / "w.onnx").path
    strict = Thresholds(warning_db=40, critical_db=30)
    for file, step in ((four, "8 bits instead of 4 (--weight-bits 8)"), (alone, "(quantize-weights --config)")):
        table = diagnose_model(model, file, images, small_chain, progress=False, thresholds=strict).table
        coarse = table[table.weight_bits == 4]
        assert len(coarse) == 1 and table.weight_bits[table.op == "Conv"].tolist() == [8]
        assert step in coarse.next_step.iloc[0] and "per channel already" not in coarse.next_step.iloc[0]
    packed = quantize_weights_only(model, tmp_path / "p.onnx", format="matmulnbits").path
    with pytest.raises(ModelError, match="in MatMulNBits.*--format qdq"):
        diagnose_model(model, packed, images, small_chain, progress=False)

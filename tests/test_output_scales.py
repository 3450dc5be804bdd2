"""A scale for each channel of the last layers: the same float outputs, less noise, no product in float."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from calib_nb.graph.build import network
from calib_nb.graph.simplify import simplify
from calib_nb.quant.mixed import scale_outputs
from calib_nb.quant.quantize import read_history
from calib_nb.quant.recipe import auto
from calib_nb.quant.sensitivity import outputs_of
from calib_nb.quant.target import PROFILES

IMAGES = list(np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
QUIET = {"progress": False, "threads": 1}


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


MAP = {"w": np.random.default_rng(0).normal(0, 1, (6, 3, 1, 1)) * np.geomspace(20, 0.02, 6)[:, None, None, None]}


@pytest.mark.parametrize(
    "text", ["y = Conv (x, w)", "c = Conv (x, w); t = Transpose <perm = [0, 2, 3, 1]> (c); y = Sigmoid (t)"]
)
def test_channels_of_the_last_layer_have_a_scale_each_and_every_product_is_in_int8(tmp_path, text):
    def by_channel(reference, outputs):
        "Noise over signal, channel by channel: the smallest counts as the largest does."
        axis = 1 if "Sigmoid" not in text else 3
        x, y = (np.moveaxis(part[0][0], axis, 0).reshape(6, -1) for part in (reference, outputs))
        return np.square(y - x).mean(1) / x.var(1)

    model = network(text, inputs={"x": (1, 3, 8, 8)}, **MAP).save(tmp_path / "float.onnx")
    how = {"profile": "int8-only", "noise": by_channel, "steps": ("ends",), **QUIET}
    recipe = auto(model, IMAGES, scale, tmp_path / "int8.onnx", **how)
    assert recipe.steps.kept.all() and recipe.steps.noise.iloc[-1] < 0.1 * recipe.steps.noise.iloc[0]
    assert recipe.model.int8_share == 1 and recipe.model.float_nodes == ()
    host = set(json.loads(read_history(recipe.model.path)["host_nodes"]))
    nodes = onnx.load(str(recipe.model.path)).graph.node
    assert {n.op_type for n in nodes if n.name in host} >= {"Mul", "Add"}
    assert host | {"Conv_0"} >= {n.name for n in nodes if n.op_type not in ("QuantizeLinear", "DequantizeLinear")}
    target = replace(PROFILES["int8-only"], host_ends=False)
    alone = auto(model, IMAGES, scale, tmp_path / "device.onnx", **how | {"profile": target})
    assert alone.steps.step.tolist() == ["minmax"] and "host_nodes" not in read_history(alone.model.path)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul with a bias"])
def test_scaled_outputs_are_those_of_the_float_network(op):
    rng = np.random.default_rng(1)
    spatial = op.startswith("Conv")
    w = rng.normal(0, 1, (4, 4, 2, 2) if spatial else (4, 4)) * np.geomspace(0.1, 10, 4).reshape(
        -1, *[1] * (3 * spatial)
    )
    text = f"y = {op} (x, w)" if op != "MatMul with a bias" else "p = MatMul (x, w); y = Add (p, b)"
    more = {"b": rng.normal(0, 5, 4)} if op == "MatMul with a bias" else {}
    shape = (1, 4, 6, 6) if spatial else (1, 4) if op == "Gemm" else (1, 1, 6, 4)
    graph = simplify(network(text, inputs={"x": shape}, w=w, **more))
    inputs = [rng.normal(0, 1, shape).astype(np.float32) for _ in range(4)]
    scaled, host = scale_outputs(graph, inputs)
    assert len(host) == 2 and scaled.outputs == graph.outputs
    for a, b in zip(outputs_of(graph, inputs, threads=1), outputs_of(scaled, inputs, threads=1)):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5 * np.abs(a[0]).max())

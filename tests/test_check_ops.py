"""Nodes that break a target's table of operators are named, and nothing else is."""

import numpy as np
import pytest

from calib_nb.core.errors import ConfigError, ModelError
from calib_nb.graph.build import conv, depthwise, network, sequential
from calib_nb.graph.operators import check_ops

SIX = np.float32(6)
W = {n: np.zeros((8, 3, n, n), np.float32) for n in (1, 3, 15, 16)}
DEEP = {n: np.zeros((3, 1, n, n), np.float32) for n in (3, 5, 7)}
UP = {n: np.zeros((3, 4, n, n), np.float32) for n in (2, 4)}
DEPTH = "y = Conv <group = 3, pads = [{p}, {p}, {p}, {p}]> (x, w)"
# text of a network, its constants, and the reason that DX-COM's table gives, "" for none
CASES = {
    "conv 15x15": ("y = Conv <pads = [7, 7, 7, 7]> (x, w)", {"w": W[15]}, ""),
    "conv 16x16": ("y = Conv <pads = [8, 8, 8, 8]> (x, w)", {"w": W[16]}, "kernel of 16"),
    "stride 16": ("y = Conv <strides = [16, 16]> (x, w)", {"w": W[1]}, "stride of 16"),
    "dilation 64": ("y = Conv <dilations = [64, 64], pads = [64, 64, 64, 64]> (x, w)", {"w": W[3]}, "dilation of 64"),
    "depthwise 5x5": (DEPTH.format(p=2), {"w": DEEP[5]}, ""),
    "depthwise 7x7": (DEPTH.format(p=3), {"w": DEEP[7]}, "depthwise 7x7"),
    "transposed, stride 2": ("y = ConvTranspose <strides = [2, 2]> (x, w)", {"w": UP[2]}, ""),
    "transposed, stride 1": ("y = ConvTranspose <strides = [1, 1]> (x, w)", {"w": UP[2]}, "stride 1; at least 2"),
    "transposed, unequal": ("y = ConvTranspose <strides = [2, 4]> (x, w)", {"w": UP[4]}, "unequal strides"),
    "ReLU6": ("y = Clip (x, a, b)", {"a": np.float32(0), "b": SIX}, ""),
    "another Clip": ("y = Clip (x, a, b)", {"a": np.float32(-1), "b": SIX}, "bounds -1.0 and 6.0"),
    "a scalar": ("y = Mul (x, b)", {"b": SIX}, ""),
    "one for each channel": ("y = Mul (x, b)", {"b": np.ones((1, 3, 1, 1), np.float32)}, ""),
    "broadcast along channels": ("y = Mul (x, b)", {"b": np.ones((1, 1, 32, 32), np.float32)}, "broadcast along"),
    "mean over channels": ("y = ReduceMean <axes = [1]> (x)", {}, ""),
    "mean over the image": ("y = ReduceMean <axes = [-1, -2]> (x)", {}, ""),
    "mean over rows": ("y = ReduceMean <axes = [2]> (x)", {}, "along axes [2]"),
    "ArgMax last": ("y = ArgMax <axis = 1> (x)", {}, ""),
    "reflected padding": ('p = Pad <mode = "reflect"> (x, n); y = Conv (p, w)', {"w": W[1]}, "mode reflect"),
    "padding before a convolution": ("p = Pad (x, n); y = Conv (p, w)", {"w": W[1]}, ""),
    "padding before nothing": ("y = Pad (x, n)", {}, "not before Conv"),
    "unknown": ("y = Acos (x)", {}, "not in the table"),
    "large pool": ("y = MaxPool <kernel_shape = [16, 16]> (x)", {}, "kernel of 16"),
    "large average": ("y = AveragePool <kernel_shape = [31, 31]> (x)", {}, ""),
    "a resize that counts from the corner": (
        'y = Resize <coordinate_transformation_mode = "asymmetric", mode = "nearest"> (x, , s)',
        {"s": np.float32([1, 1, 2, 2])},
        "asymmetric; only pytorch_half_pixel",
    ),
    "a resize as torch writes it": (
        'y = Resize <coordinate_transformation_mode = "pytorch_half_pixel", mode = "linear"> (x, , s)',
        {"s": np.float32([1, 1, 2, 2])},
        "",
    ),
    "a resize by 1.5": (
        'y = Resize <coordinate_transformation_mode = "pytorch_half_pixel", mode = "linear"> (x, , s)',
        {"s": np.float32([1, 1, 1.5, 1.5])},
        "scale 48/32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_condition_of_the_table(name, tmp_path):
    text, constants, reason = CASES[name]
    pads = {"n": np.int64([0, 0, 1, 1, 0, 0, 1, 1])} if " n)" in text else {}
    network(text, inputs={"x": (1, 3, 32, 32)}, **constants, **pads).save(tmp_path / "m.onnx")
    check = check_ops(tmp_path / "m.onnx", "dx-com")
    assert len(check.table) == bool(reason), str(check)
    assert not reason or (reason in check.table.why[0] and check.table["do"][0])


def test_an_open_batch_is_one_row_and_the_rest_is_checked(tmp_path):
    graph = sequential(conv(4, 3), depthwise(9), "Relu", shape=(1, 3, 16, 16))
    graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    graph.save(tmp_path / "m.onnx")
    check = check_ops(tmp_path / "m.onnx")
    assert [w.split(",")[0] for w in check.table.why] == ["an open size", "depthwise 9x9; only 3x3 or 5x5"]
    assert "fix-batch" in check.table["do"][0] and "CPU" in check.table["do"][1]


def test_what_cannot_be_read_is_one_line(tmp_path):
    sequential(conv(1), shape=(1, 3, 8, 8)).save(tmp_path / "m.onnx")
    (tmp_path / "t.yaml").write_text("name: t\n")
    for target, words in (("dxcom", "did you mean 'dx-com'"), (tmp_path / "t.yaml", "source"), ("no.yaml", "no such")):
        with pytest.raises(ConfigError, match=words):
            check_ops(tmp_path / "m.onnx", target)
    (tmp_path / "bad.onnx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError):
        check_ops(tmp_path / "bad.onnx")


def test_what_real_models_hold(real_data):
    def reasons(name):
        table = check_ops(real_data / "models" / name).table
        return {why.partition(";")[0] for why in table.why}

    assert {"depthwise 7x7", "depthwise 9x9"} <= reasons("edgeface_xxs_q_dequant.onnx")
    assert reasons("vww_mobilenet_v1_0.25_96.onnx") == set() == reasons("person_mobilenet_v2_0.35_128.onnx")
    assert reasons("face_detection_yunet_2023mar.onnx") == {"asymmetric"}
    assert "mode reflect" in reasons("rtmonodepth_s_m_640x192.onnx")

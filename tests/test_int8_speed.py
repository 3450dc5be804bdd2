"""What INT8 slows down on a CPU: a rule of shapes alone, which leaves small networks and other targets as they are."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calib_nb.graph.build import conv, depthwise, linear, op, sequential
from calib_nb.graph.layers import activations, macs
from calib_nb.graph.simplify import simplify
from calib_nb.quant.quantize import device_graph
from calib_nb.quant.target import PROFILES, profile
from calib_nb.quant.units import faster_in_float
from calib_nb.quant.write import int8_nodes, write_qdq

POOL = op("MaxPool", "kernel_shape = [2, 2], strides = [2, 2]")
NARROW = (conv(16, stride=2), "Relu", depthwise(), "Relu", conv(16, 1), depthwise(stride=2), "Relu")
WIDE = (conv(128), "Relu", conv(128, stride=2), "Relu", conv(256), "GlobalAveragePool", linear(10))
CPU = profile("ort-cpu")


def built(*layers, size):
    return simplify(sequential(*layers, shape=(1, 3, size, size)))


def test_narrow_layers_of_a_large_image_stay_in_float_and_wide_ones_go_to_int8():
    graph = built(*NARROW, *WIDE, size=320)
    slow = faster_in_float(graph, CPU)
    ranges = pd.DataFrame({"low": -4.0, "high": 4.0}, index=activations(graph))
    names = [n.name for n in graph.nodes if n.op_type in ("Conv", "Gemm")]
    assert slow == faster_in_float(graph, CPU) and set(names[:2]) <= slow and slow.isdisjoint(names[4:])
    assert set(int8_nodes(write_qdq(graph, ranges, CPU))) == set(names) - slow
    everything = replace(CPU, float_where_faster=False)
    assert int8_nodes(write_qdq(graph, ranges, everything)) == names


@pytest.mark.parametrize(
    ("layers", "size", "target"),
    [
        ((*NARROW, *WIDE), 48, CPU),  # less than a tenth of a millisecond
        ((conv(64, 7, stride=2), "Relu", POOL, *(conv(64), "Relu") * 4), 224, CPU),
        ((*NARROW, *WIDE), 320, profile("per-tensor-npu")),
        ((*NARROW, *WIDE), 320, profile("xnnpack")),
        ((*NARROW, *WIDE), 320, CPU.wide),
        ((conv(8, stride=2), depthwise(), conv(4)), 640, CPU),  # nothing would be left in INT8
        ((*NARROW, "Erf", *WIDE), 320, CPU),  # only products go to INT8 there
    ],
)
def test_nothing_else_stays_in_float(layers, size, target):
    assert faster_in_float(built(*layers, size=size), target) == set()


@pytest.mark.parametrize(("channels", "slow"), [(16, 0), (32, 0), (64, 0), (20, 3), (28, 3), (60, 3)])
def test_depthwise_channels_beyond_blocks_of_a_vector_stay_in_float(channels, slow):
    layers = (conv(channels, 1), depthwise(), depthwise(), conv(128, 1), conv(128, 1))
    graph = simplify(sequential(*layers, shape=(1, 64, 56, 56)))
    assert len(faster_in_float(graph, CPU)) == slow


def test_an_average_pool_stays_in_float_between_layers_in_int8():
    pools = [
        op(kind, "kernel_shape = [3, 3], strides = [1, 1], pads = [1, 1, 1, 1]") for kind in ("AveragePool", "MaxPool")
    ]
    graphs = [simplify(sequential(conv(64), pool, conv(64), shape=(1, 64, 56, 56))) for pool in pools]
    slow = [[n.op_type for n in g.nodes if n.name in faster_in_float(g, CPU)] for g in graphs]
    assert slow == [["AveragePool"], []]


def test_only_the_profile_for_cpus_keeps_nodes_in_float_for_their_time():
    assert [name for name, target in PROFILES.items() if target.float_where_faster] == ["ort-cpu"]


def test_real_networks(real_data):
    shares = {}
    for name in ("face_detection_yunet_2023mar", "person_mobilenet_v2_0.35_128"):
        graph = device_graph(real_data / "models" / f"{name}.onnx", CPU)
        table, slow = macs(graph), faster_in_float(graph, CPU)
        shares[name] = 1 - table.macs[table.node.isin(slow)].sum() / table.macs.sum()
    assert np.allclose(list(shares.values()), [0.71, 0.85], atol=0.005)

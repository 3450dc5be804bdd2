"""Channels that hold ranges: no output moves, every end is reached on any image, and none is passed."""

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passing import passing_network

from calib_nb.core.errors import InputError
from calib_nb.graph.build import conv, depthwise, linear, op, residual, sequential
from calib_nb.graph.layers import macs
from calib_nb.graph.model import load_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.channel_copies import copy_channels
from calib_nb.quant.harden import harden_model
from calib_nb.quant.observe import observe
from calib_nb.quant.quantize import plain_graph
from calib_nb.quant.range_channels import hold_ranges, input_reach
from calib_nb.quant.ranges import ranges
from calib_nb.quant.target import profile

TARGET = profile("int8-only")
PICTURES = [
    np.random.default_rng(k).normal(128, size, (16, 16, 3)).clip(0, 255).astype(np.uint8)
    for k, size in enumerate(np.geomspace(2, 60, 12))
]


def preprocess(bgr):
    return ((bgr.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]


def seen(graph, method="minmax"):
    return ranges(observe(graph, PICTURES, preprocess, progress=False), method)


POOL = op("MaxPool", "kernel_shape = [2, 2], strides = [2, 2]")
BODIES = {
    "convolutions": (conv(8), "Relu", conv(8, 1), conv(4)),
    "depthwise": (conv(8), "Relu", depthwise(), "Relu", conv(8, 1), depthwise(), conv(4, 1)),
    "pooled": (conv(8), "Relu", POOL, conv(8), "Relu", "GlobalAveragePool", "Flatten", linear(5)),
    "residual": (conv(8), "Relu", residual(conv(8), "Relu", conv(8, 1)), "Relu", conv(4, 1)),
    "two residuals": (conv(8), residual(conv(8), "Relu", conv(8)), residual(conv(8), "Relu", conv(8)), conv(4)),
    "flattened": (conv(6, stride=4), "Relu", "Flatten", linear(12), "Relu", linear(3)),
    "leaky": (conv(8), op("LeakyRelu", "alpha = 0.1"), conv(8), conv(4, 1)),
}


@given(st.sampled_from(sorted(BODIES)), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_outputs_stay_and_ranges_are_held_on_any_image(name, seed):
    graph = simplify(sequential(*BODIES[name], shape=(1, 3, 16, 16), seed=seed))
    table = seen(graph)
    held = hold_ranges(graph, table, share=9)
    onnx.checker.check_model(held.graph.model)
    assert held.tensors and macs(held.graph).macs.sum() == pytest.approx(macs(graph).macs.sum() * (1 + held.added))
    rng, inner = np.random.default_rng(seed), list(held.tensors)
    for x in (np.zeros((1, 3, 16, 16), np.float32), rng.normal(0, 0.2, (1, 3, 16, 16)).astype(np.float32)):
        wanted, got = run(graph, x), run(held.graph, x)
        for output, value in wanted.items():
            assert got[output].shape == value.shape and np.allclose(got[output], value, rtol=1e-4, atol=1e-4)
    same = seen(held.graph)
    width = table.high - table.low
    assert np.allclose(same.loc[table.index, "high"], table.high, atol=1e-4 * width.max())
    assert np.allclose(same.loc[table.index, "low"], table.low, atol=1e-4 * width.max())
    dull = run(held.graph, np.zeros((1, 3, 16, 16), np.float32), inner)
    for tensor in inner:  # an image of zeros shows at least one end in full
        high, low = dull[tensor].max() / table.high[tensor], dull[tensor].min() / (table.low[tensor] or 1)
        assert max(high, low) > 0.999


def test_averages_of_all_images_are_those_of_the_largest():
    graph = simplify(sequential(*BODIES["depthwise"], shape=(1, 3, 16, 16)))
    table, before = seen(graph), seen(graph, "ema")
    held = hold_ranges(graph, table, share=9)
    after, inner = seen(held.graph, "ema"), list(held.tensors)
    assert len(inner) == 4 and (before.high[inner] < 0.9 * table.high[inner]).all()
    assert np.allclose(after.high[inner], table.high[inner], rtol=1e-4)
    assert np.allclose(after.low[inner], table.low[inner], rtol=1e-4)
    assert np.allclose(after.high["y"], before.high["y"], rtol=1e-4)  # an output has no channel to spare


def test_what_cuts_and_bends_is_passed_as_it_is():
    rng = np.random.default_rng(0)
    graph = passing_network(rng)
    ends = {"c": (-4.0, 2.5), "n": (-0.5, 2.5), "d": (-6.0, 9.0), "k": (-1.0, 2.0)}
    table = pd.DataFrame(ends, index=["low", "high"]).T
    held = hold_ranges(graph, table, share=9)
    assert set(held.tensors) <= set(ends) and {"n", "k"} <= set(held.tensors)
    x = rng.normal(0, 1e-3, (1, 3, 4, 4)).astype(np.float32)
    wanted, got = run(graph, x, ["y", *ends]), run(held.graph, x, ["y", *ends])
    assert np.allclose(got["y"], wanted["y"], atol=1e-4)
    for name, (low, high) in ends.items():
        more = got[name][:, 6:]
        assert more.size and more.min() >= low - 1e-4 and more.max() <= high + 1e-4
    assert np.isclose(got["k"].max(), 2.0) and np.isclose(got["k"].min(), -1.0) and np.isclose(got["n"].max(), 2.5)


@given(st.floats(0, 1), st.sampled_from(sorted(BODIES)))
@settings(max_examples=25, deadline=None)
def test_no_more_work_comes_in_than_is_allowed(share, name):
    graph = simplify(sequential(*BODIES[name], shape=(1, 3, 16, 16)))
    held = hold_ranges(graph, seen(graph), share=share)
    assert 0 <= held.added <= share + 1e-9 and (held.added == 0) == (not held.tensors)


def test_copies_and_clips_go_before(tmp_path):
    body = conv(8, stride=2), "Relu", depthwise(), "Relu", conv(16, 1), "Relu", conv(4, 1)
    model = sequential(*body, shape=(1, 3, 16, 16)).save(tmp_path / "m.onnx")
    graph = plain_graph(load_graph(model), TARGET)
    copied = copy_channels(graph, seen(graph), TARGET, share=9).graph
    held = hold_ranges(copied, seen(copied), share=9)
    x = preprocess(PICTURES[-1])
    assert np.allclose(run(held.graph, x)["y"], run(copied, x)["y"], atol=1e-4) and held.tensors
    hard = harden_model(model, PICTURES, preprocess, tmp_path / "h.onnx", extra_macs=2.0, runs=200, progress=False)
    kept = hard.steps[hard.steps.kept]
    assert "hold" in set(hard.steps.step) and 0 <= hard.added_macs <= 2
    assert hard.clips.empty == ("clips" not in set(kept.step))  # what comes later does not forget them


def test_a_real_network(real_data):
    graph = plain_graph(load_graph(real_data / "models" / "face_detection_yunet_2023mar.onnx"), TARGET)
    rng = np.random.default_rng(0)
    pictures = [rng.normal(128, size, (640, 640, 3)).clip(0, 255).astype(np.uint8) for size in (3, 20, 60)]

    def chain(bgr):
        return bgr.astype(np.float32).transpose(2, 0, 1)[None]

    table = ranges(observe(graph, pictures, chain, progress=False), "minmax")
    held = hold_ranges(graph, table, share=0.25)
    assert len(held.tensors) > 20 and 0 < held.added <= 0.25
    wanted, got = run(graph, chain(pictures[0])), run(held.graph, chain(pictures[0]))
    for output, value in wanted.items():
        assert np.allclose(got[output], value, atol=1e-3)
    ema = ranges(observe(held.graph, pictures, chain, progress=False), "ema")
    assert np.mean([ema.high[name] / table.high[name] > 0.999 for name in held.tensors]) > 0.8


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(215, 255)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_images_that_reach_both_ends_keep_the_range_of_a_compiler_that_averages(ends):
    inputs = [np.array([low, 128, high], np.float32) for low, high in ends]
    reach = input_reach(inputs)
    wanted = [k for k, (low, high) in enumerate(ends) if (low, high) == reach.ends]  # whole numbers: no step between
    assert reach.reaching.tolist() == wanted and bool(reach.advice) == (len(wanted) < len(ends))
    if wanted:  # and no other choice of images has a wider average
        kept = np.array([ends[k] for k in wanted])
        assert tuple(kept.mean(0)) == reach.ends


def test_no_images_to_reach_anything_is_one_error():
    with pytest.raises(InputError, match="no inputs"):
        input_reach([])

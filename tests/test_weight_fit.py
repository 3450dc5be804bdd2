"""Weights rounded in turn: on their grid, nearer to float than nearest rounding, and the mean of no output moves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.graph.build import conv, depthwise, linear, network, sequential
from calib_nb.graph.layers import get_bias, get_weight, layers
from calib_nb.graph.model import run
from calib_nb.quant.weight_fit import fit_weights, round_in_turn, round_weights
from calib_nb.quant.weights import quantize_weights, weight_scale

SHAPE = (1, 3, 12, 12)


def smooth_images(rng, count):
    """Images whose neighbours are alike."""
    return [np.cumsum(np.cumsum(rng.normal(0, 0.1, SHAPE), 2), 3).astype(np.float32) for _ in range(count)]


def outputs(graph, images, name="y"):
    return np.concatenate([run(graph, x, [name])[name].reshape(1, -1) for x in images])


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 5), st.sampled_from([4, 8]))
@settings(max_examples=40, deadline=None)
def test_codes_are_whole_within_their_ends_and_no_worse_than_nearest_on_average(seed, k, n, bits):
    rng, top = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    mix = rng.normal(size=(k, k)) + np.eye(k)
    x = rng.normal(size=(20 * k, k)) @ mix
    moments, weight = x.T @ x + 1e-3 * len(x) * np.eye(k), rng.uniform(-top, top, (k, n))
    codes = round_in_turn(weight, np.ones(n), moments, -top, top)
    assert np.array_equal(codes, np.rint(codes)) and np.abs(codes).max() <= top

    def lost(c):
        return np.einsum("kn,kl,ln->", c - weight, moments, c - weight)

    assert lost(codes) <= 4 * lost(np.rint(weight)) + 1e-9  # single draws may lose; below they win on average


def test_errors_are_made_up_for_on_average():
    gains = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(400, 1)) + 0.3 * rng.normal(size=(400, 24))
        weight, moments = rng.uniform(-7, 7, (24, 6)), x.T @ x
        lost = [np.square(x @ (c - weight)).sum() for c in (round_in_turn(weight, np.ones(6), moments, -8, 7),
                                                            np.rint(weight))]  # fmt: skip
        gains.append(np.log(lost[0] / lost[1]))
    assert np.mean(gains) < np.log(0.5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_all_layers(per_channel):
    rng = np.random.default_rng(3)
    images = smooth_images(rng, 48)
    seen, others = images[:24], images[24:]
    blocks = (conv(16, stride=2), "Relu", depthwise(bias=False), "Relu", conv(24, 1), "Relu", "GlobalAveragePool")
    graph = sequential(*blocks, linear(6), shape=SHAPE)
    rounded = round_weights(graph, seen, per_channel=per_channel, bits=4)
    axis = 0 if per_channel else None
    for before, after in zip(layers(graph), layers(rounded)):
        old, new = get_weight(graph, before), get_weight(rounded, after)
        levels = new / weight_scale(old, axis, bits=4)[0]
        assert np.allclose(levels, np.rint(levels), atol=1e-3) and np.abs(levels).max() < 7.01
        assert np.isfinite(get_bias(rounded, after)).all()
    wanted = outputs(graph, others)
    near, turned = (np.square(outputs(g, others) - wanted).sum() for g in (
        quantize_weights(graph, per_channel=per_channel, bits=4), rounded))  # fmt: skip
    assert turned < 0.5 * near


def test_the_mean_of_no_output_moves():
    rng = np.random.default_rng(5)
    images = smooth_images(rng, 12)
    w = rng.normal(0, 1, (8, 3, 1, 1))
    graph = network("y = Conv (x, w)", inputs={"x": SHAPE}, w=w)
    rounded = round_weights(graph, images, bits=3)
    means = [np.mean([run(g, x, ["y"])["y"].mean((0, 2, 3)) for x in images], 0) for g in (graph, rounded)]
    assert np.allclose(*means, atol=1e-4) and not np.allclose(get_weight(rounded, layers(rounded)[0]), w)


def test_what_cannot_be_cut_into_rows_or_is_skipped_stays():
    rng = np.random.default_rng(0)
    images = smooth_images(rng, 8)
    text = "h = Conv (x, w); r = Relu (h); y = ConvTranspose (r, v)"
    weights = {"w": rng.normal(0, 1, (4, 3, 1, 1)), "v": rng.normal(0, 1, (4, 2, 2, 2))}
    graph = network(text, inputs={"x": SHAPE}, **weights)
    before = graph.model.SerializeToString(deterministic=True)
    rounded = round_weights(graph, images, bits=4)
    assert graph.model.SerializeToString(deterministic=True) == before
    assert np.array_equal(get_weight(rounded, layers(rounded)[-1]), get_weight(graph, layers(graph)[-1]))
    first = layers(graph)[0]
    kept = round_weights(graph, images, bits=4, skip=[first.node.name])
    assert np.array_equal(get_weight(kept, layers(kept)[0]), get_weight(graph, first))


def test_a_fit_with_one_zero_channel_is_finite():
    rng = np.random.default_rng(0)
    images = [x * np.array([1, 0, 1], np.float32).reshape(1, 3, 1, 1) for x in smooth_images(rng, 8)]
    graph = sequential(conv(4), "Relu", conv(4, 1), shape=SHAPE)
    for changed in (round_weights(graph, images), fit_weights(graph, lambda g: quantize_weights(g), images)):
        assert np.isfinite(outputs(changed, images)).all()

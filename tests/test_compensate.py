"""4-bit weights that images round: against plain rounding, brute force and ONNX Runtime."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import NETWORKS

from calib_nb.core.errors import InputError
from calib_nb.graph.build import network
from calib_nb.graph.model import Graph, run
from calib_nb.quant.blocks import WEIGHT_FORMATS, quantize_weights_only
from calib_nb.quant.compensate import InputMoments, compensated_grid, grid_weights, quantize_weights_by_images
from calib_nb.quant.grid import block_grid

THREE = (
    "f = Flatten (x); g = Gemm <transB = 1> (f, w, b); r = Relu (g); h = MatMul (r, v); s = Relu (h); y = MatMul (s, u)"
)


def sizes_of_channels(rng, rows, columns):
    """Rows that rise and fall together, of sizes far apart."""
    return rng.normal(0, 1, (rows, 3)) @ rng.normal(0, 1, (3, columns)) * np.exp(rng.normal(0, 1, columns))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 40), st.integers(1, 4), st.sampled_from([4, 16, 32]))
def test_never_worse_than_plain_rounding_on_what_a_product_sees(seed, rows, inputs, outputs, block):
    rng = np.random.default_rng(seed)
    given_rows = sizes_of_channels(rng, rows, inputs)
    noisy = given_rows + rng.choice([0, 0.1]) * rng.normal(0, 1, given_rows.shape)
    weight = (rng.normal(0, 1, (inputs, outputs)) * (rng.random((inputs, outputs)) > 0.2)).astype(np.float32)
    moments = InputMoments.of(noisy, given_rows)
    codes, scales = compensated_grid(weight, moments, block)
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7 and codes.shape == weight.shape
    assert scales.dtype == np.float32 and (scales > 0).all() and scales.shape == (-(-inputs // block), outputs)
    wanted = given_rows @ weight
    error, nearest = (
        np.square(noisy @ grid_weights(*grid, block) - wanted).sum()
        for grid in ((codes, scales), block_grid(weight, block))
    )
    assert error <= nearest * (1 + 1e-6) + 1e-9


def test_close_to_the_best_of_all_codes():
    every, ratios = np.array(list(itertools.product(range(-8, 8), repeat=3)), float), []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        rows, weight = rng.normal(0, 1, (30, 3)) @ rng.normal(0, 1, (3, 3)), rng.normal(0, 1, (3, 1))
        out = rows @ every.T  # the best scale of each row of codes is known in closed form, and above 0
        along, length = (out * (rows @ weight)).sum(0), np.square(out).sum(0)
        good = (along > 0) & (length > 0)
        least = np.square(rows @ weight).sum() - np.max(along[good] ** 2 / length[good])
        moments = InputMoments.of(rows, rows)
        grids = block_grid(weight, 3), compensated_grid(weight, moments, 3)
        ratios.append([moments.error(weight, grid_weights(*grid, 3)) / least for grid in grids])
    nearest, compensated = np.sqrt(np.array(ratios)).T
    assert (compensated > 0.999).all() and np.median(compensated) < 1.4 < np.median(nearest)


QUICK = ("weights first", "Gemm, transB", "weights of two nodes")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_wherever_a_product_has_its_weights(name, tmp_path):
    text, weights, shape, _ = NETWORKS[name]
    graph, rng = network(text, inputs={"x": shape}, **weights), np.random.default_rng(2)
    model, low = graph.save(tmp_path / "m.onnx"), np.prod(shape) // 3
    mixing = rng.normal(0, 40, (low, *shape[2:], shape[1]))
    images = [np.uint8(np.clip(128 + np.tensordot(rng.normal(0, 1, low), mixing, 1), 0, 255)) for _ in range(20)]

    def preprocess(image):
        return np.float32(image.transpose(2, 0, 1)[None]) / 128 - 1

    made = quantize_weights_by_images(model, images, preprocess, tmp_path / "c.onnx", progress=False)
    onnx.checker.check_model(onnx.load(made.file.path), full_check=True)
    assert made.file.noise <= made.nearest_noise and (made.layers.compensated_db >= made.layers.nearest_db - 1e-6).all()
    assert len(made.layers) == 1 and made.file.nodes == (2 if name == "weights of two nodes" else 1)


def test_both_forms_hold_the_same_weights_and_the_gain_is_real(tmp_path):
    rng = np.random.default_rng(0)
    weights = {k: rng.normal(0, 0.1, s) for k, s in {"w": (64, 192), "b": (64,), "v": (64, 48), "u": (48, 9)}.items()}
    graph = network(THREE, inputs={"x": (1, 3, 8, 8)}, **weights)
    model, mixing = graph.save(tmp_path / "m.onnx"), rng.normal(0, 30, (10, 8, 8, 3))
    images = [np.uint8(np.clip(128 + np.tensordot(rng.normal(0, 1, 10), mixing, 1), 0, 255)) for _ in range(60)]

    def preprocess(image):
        return np.float32(image.transpose(2, 0, 1)[None]) / 128 - 1

    nearest = quantize_weights_only(model, tmp_path / "n.onnx").path
    others = [preprocess(image) for image in images[40:]]
    expected = np.array([run(graph, x)["y"] for x in others])
    error = [np.square(np.array([run(Graph(onnx.load(nearest)).infer(), x)["y"] for x in others]) - expected).sum()]
    for form in WEIGHT_FORMATS:
        out = tmp_path / f"{form}.onnx"
        made = quantize_weights_by_images(model, images[:40], preprocess, out, format=form, progress=False)
        written = Graph(onnx.load(made.file.path)).infer()
        error.append(np.square(np.array([run(written, x)["y"] for x in others]) - expected).sum())
    assert max(error[1:]) < 0.7 * error[0]  # images that neither rounded nor judged
    with pytest.raises(InputError, match="1 images"):
        quantize_weights_by_images(model, images[:1], preprocess, tmp_path / "e.onnx")
    assert not (tmp_path / "e.onnx").exists()

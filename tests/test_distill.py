"""Networks that the float one taught: better on other images, on the same grids, in the file that is written."""

import numpy as np
import pytest

from calib_nb.core.errors import InputError, ModelError
from calib_nb.graph.build import network
from calib_nb.graph.model import load_graph
from calib_nb.graph.simplify import simplify
from calib_nb.quant.distill import DistillOptions, distill
from calib_nb.quant.quantize import observe_graph, range_table
from calib_nb.quant.range_search import activation_grids
from calib_nb.quant.ranges import ranges
from calib_nb.quant.recipe import auto
from calib_nb.quant.sensitivity import noise_ratio, outputs_of
from calib_nb.quant.target import PROFILES
from calib_nb.quant.write import write_qdq

IMAGES = list(np.random.default_rng(7).integers(0, 256, (48, 8, 8, 3), dtype=np.uint8))
QUIET = {"steps": 60, "progress": False}


def scale(bgr):
    """BGR uint8 -> float32 [1,3,8,8] in -1 to 1."""
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def drawn(seed=0):
    """A residual block with channels of very different size, depthwise and dense, a MaxPool, a Gemm and a MatMul."""
    rng = np.random.default_rng(seed)
    uneven = np.exp(rng.normal(0, 1, (16, 1, 1, 1)))
    arrays = {
        "a": rng.normal(0, 0.6, (16, 3, 1, 1)) * uneven,
        "a0": rng.normal(0, 0.3, 16),
        "d": rng.normal(0, 0.4, (16, 1, 3, 3)) / uneven,
        "e": rng.normal(0, 0.25, (16, 16, 1, 1)) * uneven,
        "e0": rng.normal(0, 0.1, 16),
        "g": rng.normal(0, 0.3, (12, 16)),
        "g0": rng.normal(0, 0.1, 12),
        "m": rng.normal(0, 0.3, (12, 8)),
        "m0": rng.normal(0, 0.1, 8),
    }
    text = """
    u = Conv (x, a, a0); s = Sigmoid (u); v = Mul (u, s); w = Conv <pads = [1, 1, 1, 1], group = 16> (v, d)
    h = Conv (w, e, e0); r = Add (h, v); k = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    p = GlobalAveragePool (k); f = Flatten (p); q = Gemm <transB = 1> (f, g, g0); t = MatMul (q, m); y = Add (t, m0)
    """
    return simplify(network(text, inputs={"x": (1, 3, 8, 8)}, **arrays))


def uneven():
    """A first layer whose channels differ by three decades and more."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(0, 2.5, (24, 1, 1, 1)))
    arrays = {
        "a": rng.normal(0, 1, (24, 3, 1, 1)) * sizes,
        "b": rng.normal(0, 0.2, (8, 24, 1, 1)) / sizes.reshape(1, -1, 1, 1),
    }
    return network(
        "u = Conv (x, a); s = Tanh (u); v = Mul (u, s); y = Conv (v, b)", inputs={"x": (1, 3, 8, 8)}, **arrays
    )


@pytest.fixture(scope="module")
def graph():
    return drawn()


def with_ranges(graph, images=IMAGES[:34]):
    return range_table(graph, ranges(observe_graph(graph, images, scale, progress=False), "minmax"))


def inputs(images):
    return [scale(image) for image in images]


def noise(reference, graph, table, target, **nodes):
    judging = inputs(IMAGES[34:])
    return noise_ratio(outputs_of(reference, judging), outputs_of(write_qdq(graph, table, target, **nodes), judging))


@pytest.mark.parametrize("profile", ["int8-only", "xnnpack"])
def test_a_taught_network_is_better_on_images_that_it_never_saw(graph, profile):
    target, table = PROFILES[profile], with_ranges(graph)
    taught = distill(graph, table, target, inputs(IMAGES[:34]), graph, DistillOptions(**QUIET))
    assert noise(graph, taught.graph, taught.table, target) < noise(graph, graph, table, target)
    assert len(taught.losses) == 60 and np.isfinite(taught.losses).all()


def test_scales_stay_shared_and_weights_lie_on_the_grid_that_is_written(graph):
    target, table = PROFILES["int8-only"], with_ranges(graph)
    taught = distill(graph, table, target, inputs(IMAGES[:34]), graph, DistillOptions(**QUIET))
    before, after = (write_qdq(g, t, target) for g, t in ((graph, table), (taught.graph, taught.table)))
    grids = activation_grids(after)
    assert after.constant(grids["k"][0]) == after.constant(grids["r"][0])  # a MaxPool passes codes on
    assert all(
        after.constant(zero) == before.constant(activation_grids(before)[name][1]) for name, (_, zero) in grids.items()
    )
    stored = {n.input[0]: n for n in after.nodes if n.op_type == "DequantizeLinear" and n.input[0] in after.constants}
    for name in ("a", "d", "e", "g", "m"):
        codes, step = (after.constant(i) for i in stored[f"{name}_codes"].input[:2])
        assert np.allclose(codes * step, taught.graph.constant(name), atol=1e-3 * step)  # nothing is rounded again
        assert step == pytest.approx(np.abs(graph.constant(name)).max() / 127, rel=1e-5)


def test_the_same_images_and_seed_give_the_same_network(graph):
    target, table = PROFILES["int8-only"], with_ranges(graph)
    first, again, other = (
        distill(graph, table, target, inputs(IMAGES[:12]), graph, DistillOptions(steps=9, seed=seed, progress=False))
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first.losses, again.losses) and first.table.equals(again.table)
    assert not np.array_equal(first.losses, other.losses)
    assert np.array_equal(graph.constant("a"), drawn().constant("a"))  # what was given is as it was


def test_nodes_in_float_learn_nothing(graph):
    target, table = PROFILES["int8-only"], with_ranges(graph)
    node = graph.producer("h").name
    options = DistillOptions(float_nodes=[node], **QUIET)
    taught = distill(graph, table, target, inputs(IMAGES[:34]), graph, options)
    assert np.array_equal(taught.graph.constant("e"), graph.constant("e"))
    assert not np.array_equal(taught.graph.constant("a"), graph.constant("a"))


def test_what_cannot_be_taught_is_refused(graph):
    target, table = PROFILES["int8-only"], with_ranges(graph)
    with pytest.raises(InputError, match="1 images and 0 steps"):
        distill(graph, table, target, inputs(IMAGES[:1]), graph, DistillOptions(steps=0))
    odd = simplify(network("u = Conv (x, w); y = Celu (u)", inputs={"x": (1, 3, 8, 8)}, w=np.ones((4, 3, 1, 1))))
    with pytest.raises(ModelError, match="Celu"):
        distill(odd, with_ranges(odd), target, inputs(IMAGES[:9]), odd, DistillOptions(**QUIET))


@pytest.mark.parametrize("count, noisy", [(48, True), (44, True), (48, False)])
def test_only_a_noisy_network_with_enough_images_is_taught(tmp_path, count, noisy):
    """At least 32 images teach; three in ten judge."""
    path, settings = (uneven() if noisy else drawn()).save(tmp_path / "model.onnx"), {"steps": ("distill",)}
    options = {"profile": "int8-only", "progress": False, **settings}
    steps = auto(path, IMAGES[:count], scale, tmp_path / "int8.onnx", **options).steps
    assert ("distill" in set(steps.step)) == (noisy and count == 48)


def test_the_recipe_keeps_what_was_taught_and_its_file_has_it(tmp_path):
    """Three bits' worth of noise in the first layer alone: nothing but learning makes up for it."""
    path, steps = uneven().save(tmp_path / "model.onnx"), ("distill",)
    recipe = auto(path, IMAGES, scale, tmp_path / "int8.onnx", profile="int8-only", steps=steps, progress=False)
    assert recipe.steps.step.tolist() == ["minmax", "distill"] and recipe.steps.kept.all()
    written = outputs_of(load_graph(path), inputs(IMAGES)), outputs_of(_opened(recipe.model.path), inputs(IMAGES))
    assert noise_ratio(*written) < recipe.steps.noise[0]


def _opened(path):
    import onnx

    from calib_nb.graph.model import Graph

    return Graph(onnx.load(path))


@pytest.mark.slow
def test_a_face_embedder_is_better_on_other_people(real_data, tmp_path):
    from calib_nb.data.images import decode
    from calib_nb.data.preprocess import preset
    from calib_nb.graph.fixed import fix_batch
    from calib_nb.quant.quantize import device_graph

    model = fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "e.onnx")
    chain, target = preset("edgeface"), PROFILES["int8-only"]
    people = sorted((real_data / "lfw" / "images").rglob("*.jpg"))[::25][:60]
    faces = [decode(path)[69:181, 69:181] for path in people]  # the middle of LFW's pictures
    graph = device_graph(model, target)
    table = range_table(graph, ranges(observe_graph(graph, faces[:40], chain, progress=False), "percentile"))
    teaching, judging = ([chain(face) for face in part] for part in (faces[:40], faces[40:]))
    taught = distill(graph, table, target, teaching, graph, DistillOptions(steps=150, progress=False))
    reference = outputs_of(graph, judging)
    before, after = (
        noise_ratio(reference, outputs_of(write_qdq(g, t, target), judging))
        for g, t in ((graph, table), (taught.graph, taught.table))
    )
    assert after < before

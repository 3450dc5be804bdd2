"""The beam of plans, and ranges chosen tensor by tensor: never worse, repeatable, within what was observed."""

import numpy as np
import onnxruntime as ort
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError
from calib_nb.core.run import sha256_file
from calib_nb.graph.build import conv, depthwise, network, residual, sequential
from calib_nb.graph.model import load_graph, open_graph
from calib_nb.graph.simplify import simplify
from calib_nb.quant.bias_clip import bound_ranges
from calib_nb.quant.black_boxes import ort_static
from calib_nb.quant.harden import harden_model
from calib_nb.quant.plans import REPAIRS
from calib_nb.quant.quantize import device_graph, observe_graph, range_table
from calib_nb.quant.range_search import (
    SearchOptions,
    TunableNetwork,
    activation_grids,
    affordable_runs,
    range_variants,
    search_ranges,
)
from calib_nb.quant.ranges import RANGE_METHODS, ranges
from calib_nb.quant.recipe import STEPS, auto
from calib_nb.quant.sensitivity import noise_ratio, outputs_of
from calib_nb.quant.target import PROFILES
from calib_nb.quant.write import write_qdq

IMAGES = list(np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
QUIET = {"progress": False, "threads": 1}


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


def uneven(seed, *layers, spread=30):
    """A network whose channels differ `spread` times, with layers in between."""
    rng, size = np.random.default_rng(seed), np.geomspace(1 / spread, 1, 8)[:, None, None, None]
    first = conv(8, weight=rng.normal(0, 1, (8, 3, 3, 3)) * size)
    second = depthwise(weight=rng.normal(0, 0.3, (8, 1, 3, 3)) / size)
    tail = layers or ("Relu",)
    return sequential(first, "Relu", second, *tail, conv(4, 1), shape=(1, 3, 8, 8), seed=seed)


NETWORKS = {
    "residual": lambda: uneven(1, "Relu", residual(conv(8), "Relu"), "Relu"),
    "squashed": lambda: uneven(2, "Tanh", conv(8, 1), "Sigmoid"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return NETWORKS[request.param]().save(folder / "float.onnx"), folder


def measured(graph):
    """The tables of all methods, inputs, and what the float graph computes of them."""
    inputs = [scale(image) for image in IMAGES]
    stats = observe_graph(graph, IMAGES, scale, **QUIET)
    return {m: ranges(stats, m) for m in RANGE_METHODS}, inputs, outputs_of(graph, inputs, threads=1)


# ------------------------------------------------------------------ the beam


@pytest.mark.parametrize("target", ["int8-only", "ort-cpu"])
def test_nothing_that_was_tried_is_surely_less_noisy_than_the_result(files, target):
    model, folder = files
    recipe = auto(model, IMAGES, scale, folder / f"{target}.onnx", profile=target, **QUIET)
    table = recipe.steps
    result = table[table.kept].iloc[-1]
    assert result.noise == recipe.model.noise <= table.noise[0]
    assert ((table.gain_db - result.gain_db) <= table.error_db + result.error_db + 1e-9).all()
    assert list(dict.fromkeys(table.step[1:])) == [s for s in STEPS if s in set(table.step)]
    # the kept rows are a path: each was tried on those before it
    kept = table[table.kept]
    names = [detail if step == "methods" else step for step, detail in zip(kept.step, kept.detail)]
    assert kept.on.tolist() == [" + ".join(names[:k]) for k in range(len(names))]


def test_equal_inputs_give_equal_bytes(tmp_path):
    model = NETWORKS["squashed"]().save(tmp_path / "float.onnx")
    first, second = (auto(model, IMAGES, scale, tmp_path / f"{k}.onnx", profile="int8-only", **QUIET) for k in "ab")
    assert sha256_file(first.model.path) == sha256_file(second.model.path)
    pd.testing.assert_frame_equal(first.steps, second.steps)


def test_a_beam_of_one_plan_judges_one_step_after_the_other(files):
    """Each repair was tried on the least noisy row before its step, the older one where they are equal."""
    model, folder = files
    options = {"width": 1, "steps": ("equalize", "smooth", "absorb", "bias", "methods", "clip"), **QUIET}
    table = auto(model, IMAGES, scale, folder / "one.onnx", profile="int8-only", **options).steps
    assert (table.noise[table.kept].diff().dropna() < 0).all()
    table, best, name, step = table[table.step.isin(["minmax", *REPAIRS])], np.inf, "", None
    for row in table.itertuples():
        if row.step != step:
            step, on = row.step, name
        assert row.on == on
        if row.noise < best:
            best = row.noise
            name = f"{on} + {row.step}" if on else row.step


def test_a_wider_beam_finds_steps_that_pay_together(tmp_path):
    """Weights on their grid: equalization takes them off it, and moves the means; bias correction moves them back."""
    rng, sizes = np.random.default_rng(0), np.geomspace(1, 3, 16)
    w = np.rint(rng.uniform(0.5, 1, (16, 3)) * 127 * sizes[:, None] / 3)
    v = np.rint(rng.normal(0, 0.35, (8, 16)).clip(-1, 1) * 127 / sizes)
    w[-1, 0] = v[0, 0] = 127
    w, v = w / 127, v / 127
    weights = {"w": w[:, :, None, None], "v": v[:, :, None, None], "b": -v @ w @ np.full(3, 0.96)}
    text = "c = Conv (x, w); r = Relu (c); y = Conv (r, v, b)"
    model = network(text, inputs={"x": (1, 3, 8, 8)}, **weights).save(tmp_path / "float.onnx")
    bright = list(rng.integers(235, 256, (12, 8, 8, 3), dtype=np.uint8))

    def noise(width):
        settings = {"profile": "int8-only", "steps": ("equalize", "bias"), "width": width, **QUIET}
        path = tmp_path / f"{width}.onnx"
        return auto(model, bright, lambda x: (x / np.float32(255)).transpose(2, 0, 1)[None], path, **settings).steps

    one, three = noise(1), noise(3)
    assert one.noise[1] > one.noise[0] and one.kept.sum() == 1  # equalization alone hurts
    assert three.noise.min() < 0.5 * one.noise.min() and three.step[three.kept].tolist()[1:] == ["equalize", "bias"]


def test_a_beam_without_plans_is_refused(files):
    model, folder = files
    with pytest.raises(InputError, match="width 0; expected at least 1"):
        auto(model, IMAGES, scale, folder / "none.onnx", width=0, **QUIET)
    assert not (folder / "none.onnx").exists()


# ------------------------------------------------------------------ ranges, tensor by tensor


@pytest.mark.parametrize("target", ["int8-only", "ort-cpu"])
def test_searched_ranges_lie_within_minmax_and_lower_the_noise(files, target):
    graph = device_graph(files[0], PROFILES[target])
    tables, inputs, reference = measured(graph)
    profile, options = PROFILES[target], SearchOptions(runs=200, progress=False, threads=1)
    searched = search_ranges(graph, tables, "kl", profile, inputs, reference, options)
    widest = range_table(graph, tables["minmax"])
    assert (searched.table.low >= widest.low.clip(upper=0)).all()
    assert (searched.table.high <= widest.high.clip(lower=0)).all()
    noises = [noise for _, noise in searched.history]
    assert (np.diff(noises) < 0).all() and searched.history[-1][0] <= 200 + len(inputs)
    # what the session with grids as inputs says is what the written network computes
    written = write_qdq(graph, searched.table, profile)
    assert noise_ratio(reference, outputs_of(written, inputs, threads=1)) == pytest.approx(noises[-1], rel=0.5)


def test_tensors_that_pass_codes_on_keep_the_grid_of_their_source():
    graph = simplify(
        network(
            """a = Conv (x, w); r = Relu (a); p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r);
            t = Transpose <perm = [0, 2, 3, 1]> (p); q = Transpose <perm = [0, 3, 1, 2]> (t); h = Tanh (q);
            y = Conv (h, v)""",
            inputs={"x": (1, 3, 8, 8)},
            w=np.random.default_rng(0).normal(0, 1, (4, 3, 3, 3)),
            v=np.ones((2, 4, 1, 1)),
        )
    )
    tables, inputs, reference = measured(graph)
    options = SearchOptions(progress=False, threads=1)
    searched = search_ranges(graph, tables, "minmax", PROFILES["int8-only"], inputs, reference, options)
    int8 = write_qdq(graph, searched.table, PROFILES["int8-only"])
    grids = {t: tuple(int8.constant(c).item() for c in pair) for t, pair in activation_grids(int8).items()}
    assert len({grids[t] for t in ("r", "p", "t", "q")}) == 1


def test_bounded_tensors_stay_bounded():
    """A ReLU6 and a Softmax: whatever is searched, the file's ranges are those that its own function lets be."""
    graph = simplify(
        network(
            "a = Conv (x, w); c = Clip (a, zero, six); b = Conv (c, v); s = Softmax <axis = 1> (b); y = Conv (s, u)",
            inputs={"x": (1, 3, 4, 4)},
            w=np.full((4, 3, 1, 1), 9.0),
            v=np.random.default_rng(0).normal(0, 1, (4, 4, 1, 1)),
            u=np.ones((2, 4, 1, 1)),
            zero=np.float32(0),
            six=np.float32(6),
        )
    )
    inputs = [np.random.default_rng(k).normal(0, 1, (1, 3, 4, 4)).astype(np.float32) for k in range(8)]
    stats = observe_graph(graph, [IMAGES[0]] * 8, lambda _: inputs[0], **QUIET)
    tables = {m: ranges(stats, m) for m in RANGE_METHODS}
    reference = outputs_of(graph, inputs, threads=1)
    options = SearchOptions(progress=False, threads=1)
    table = search_ranges(graph, tables, "mse", PROFILES["int8-only"], inputs, reference, options).table
    assert table.low["c"] >= 0 and table.high["c"] <= 6
    pd.testing.assert_frame_equal(range_table(graph, table), table)
    int8 = write_qdq(graph, table, PROFILES["int8-only"])
    top = int8.constant(activation_grids(int8)["s"][0]) * 255
    assert 2 / 4 - 1e-3 <= top < 1


@settings(derandomize=True, max_examples=15)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0, 9)), min_size=1, max_size=5), st.integers(0, 3))
def test_no_variant_leaves_minmax_or_loses_zero(rows, seed):
    rng = np.random.default_rng(seed)
    full = pd.DataFrame({"low": [a for a, _ in rows], "high": [a + b for a, b in rows]})
    inside = pd.DataFrame({"low": full.low + 0.3 * (full.high - full.low) * rng.random(len(full)), "high": full.high})
    for table in range_variants({"minmax": full, "kl": inside}, "kl").values():
        assert (full.low.clip(upper=0) <= table.low).all() and (table.low <= 0).all()
        assert (table.high <= full.high.clip(lower=0)).all() and (table.high >= 0).all()


def test_one_session_serves_all_ranges(files):
    graph = device_graph(files[0], PROFILES["int8-only"])
    tables, inputs, _ = measured(graph)
    one, other = (write_qdq(graph, range_table(graph, tables[m]), PROFILES["int8-only"]) for m in ("minmax", "mse"))
    tunable, mine, its = TunableNetwork(one, threads=1), activation_grids(one), activation_grids(other)
    values = {a: other.constant(b) for t in mine for a, b in zip(mine[t], its[t])}
    for x, outputs in zip(inputs, tunable.run(inputs, values)):
        expected = open_graph(other, threads=1, optimize=False).run(None, {other.inputs[0]: x})
        assert noise_ratio([expected], [outputs]) < 5e-3  # biases stay on the grid of the first, which may move a code


def test_a_slow_network_is_run_less():
    small, large = (network("y = Conv (x, w)", inputs={"x": (1, 8, n, n)}, w=np.ones((8, 8, 3, 3))) for n in (8, 2048))
    assert affordable_runs(small, 900) == 900 and affordable_runs(large, 900) < 450


# ------------------------------------------------------------------ ranges cut to what a reader lets through


def cell_by_cell(graph, table):
    """What `bound_ranges` does, one cell of the table after the other."""
    from calib_nb.quant.bias_clip import _BOUNDED, _lets_through

    cut = table.copy()
    for name in cut.index:
        current, low, high = name, -np.inf, np.inf
        while (reader := graph.only_consumer(current)) is not None and reader.op_type in _BOUNDED:
            least, most = _lets_through(graph, reader)
            low, high, current = max(low, least), min(high, most), reader.output[0]
        cut.loc[name, ["low", "high"]] = np.clip(cut.loc[name, ["low", "high"]].to_numpy(np.float64), low, high)
    return cut


@settings(derandomize=True, max_examples=10)
@given(st.integers(0, 10_000))
def test_bounds_are_those_of_a_table_cut_cell_by_cell(seed):
    rng = np.random.default_rng(seed)
    graph = network(
        "a = Conv (x, w); r = Relu (a); m = Min (r, six); b = Conv (m, v); c = Clip (b, low, high); y = Conv (c, v)",
        inputs={"x": (1, 3, 4, 4)},
        w=np.ones((4, 3, 1, 1)),
        v=np.ones((4, 4, 1, 1)),
        six=np.float32(6),
        low=np.float32(-1),
        high=np.float32(2),
    )
    ends = np.sort(rng.normal(0, 5, (6, 2)), axis=1)
    ends[rng.integers(6)] = -np.inf, np.inf
    table = pd.DataFrame(ends, columns=["low", "high"], index=pd.Index(list("xarmbc"), name="tensor"))
    pd.testing.assert_frame_equal(bound_ranges(graph, table), cell_by_cell(graph, table))


# ------------------------------------------------------------------ huge channels


def with_a_huge_channel():
    """A stream with a channel thirty times as large as the others, in front of a LayerNormalization."""
    rng, sizes = np.random.default_rng(0), np.where(np.arange(32) == 5, 30.0, 1.0)
    text = """c = Conv (x, w)
    t = Transpose <perm = [0, 2, 3, 1]> (c)
    r = Relu (t)
    m = MatMul (r, u)
    s = Add (t, m)
    l = LayerNormalization (s, g, h)
    y = MatMul (l, q)"""
    weights = {
        "w": rng.normal(0, 1, (32, 3)) * sizes[:, None],
        "u": rng.normal(0, 0.1, (32, 32)) * sizes / sizes[:, None],
    }
    weights |= {"q": rng.normal(0, 0.3, (32, 4)), "g": rng.uniform(0.5, 1.5, 32) / sizes, "h": rng.normal(0, 0.1, 32)}
    weights["w"] = weights["w"][:, :, None, None]
    return network(text, inputs={"x": (1, 3, 8, 8)}, **weights)


@pytest.mark.parametrize("target", ["int8-only", "ort-cpu"])
def test_a_channel_that_fills_its_tensor_is_spread(tmp_path, target):
    model = with_a_huge_channel().save(tmp_path / "block.onnx")
    options = {"profile": target, "steps": ("spread",), **QUIET}
    table = auto(model, IMAGES, scale, tmp_path / f"{target}.onnx", **options).steps
    assert table.step[table.kept].tolist() == ["minmax", "spread"] and table.noise.iloc[-1] < 0.3 * table.noise[0]


def test_a_hardened_file_has_it_spread_and_onnx_runtimes_quantizer_does_well(tmp_path):
    graph = with_a_huge_channel()
    model, inputs = graph.save(tmp_path / "block.onnx"), [scale(image) for image in IMAGES]
    hard = harden_model(model, IMAGES, scale, tmp_path / "hard.onnx", steps=("spread",), progress=False)
    reference, noise = outputs_of(graph, inputs, threads=1), []
    assert noise_ratio(reference, outputs_of(load_graph(hard.path), inputs, threads=1)) < 1e-6
    for path in (model, hard.path):
        session = ort.InferenceSession(str(ort_static(path, tmp_path / "q.onnx", inputs)))
        noise.append(noise_ratio(reference, [session.run(None, {"x": x}) for x in inputs]))
    assert noise[1] < 0.3 * noise[0]


def test_weights_are_fitted_to_the_activations_that_arrive(tmp_path):
    """Ranges that cut a channel: what is cut off shows in another channel, from which a layer can take it back."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(0, 0.3, (8, 3, 1, 1)), rng.normal(0, 0.3, (4, 8, 1, 1))
    w[1], w[2] = 8 * w[0], 4 * w[0]
    model = network("c = Conv (x, w); y = Conv (c, v)", inputs={"x": (1, 3, 8, 8)}, w=w, v=v).save(tmp_path / "m.onnx")
    options = {"profile": "int8-only", "steps": ("weights",), **QUIET}
    table = auto(model, IMAGES, scale, tmp_path / "fitted.onnx", **options).steps
    assert table.step.tolist() == ["minmax", "weights"] and table.noise[table.kept].iloc[-1] <= table.noise[0]

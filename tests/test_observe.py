"""Observing: kernels against numpy, one pass against all activations kept, any order and division, files, kills."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import forked
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.core import rows
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.graph.build import network
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.layers import activations
from calib_nb.graph.model import load_graph, run
from calib_nb.quant import kernels
from calib_nb.quant.observe import MAX_WORKERS, ObserveOptions, labelled, network_input, observe
from calib_nb.quant.stats import (
    QUANTILES,
    ActivationStats,
    Collector,
    channel_values,
    collect,
    merge,
    read_stats,
)

floats = st.floats(-(2.0**100), 2.0**100, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 300), elements=floats)
plain = hnp.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-60),
)
VALUES = 4 + len(QUANTILES)
EPS = float(np.finfo(np.float32).eps)


def measured(x, bins=32):
    """What is measured on one tensor: (bad, values, counts of the bins in use, exponent, first)."""
    collector = Collector(["x"], bins=bins, images=1)
    bad = collector.measure(0, "image", x, np.array([0]), np.array([x.size]))
    values, (counts, (k,), (first,), *_) = collector.values[0, 0], collector.total
    used = math.floor(math.ldexp(float(values[1]), -int(k))) - int(first) + 1 if bad < 0 else 0
    return bad, values, counts[0, :used], int(k), int(first)


def test_narrow_counts_say_what_wide_ones_do():
    rng, found = np.random.default_rng(0), []
    images = [rng.normal(0, 4.0**k, 3000).astype(np.float32) for k in (0, 2, 1, 3)]  # the grid moves
    for most in (12_000, 2**31):
        part, whole = (Collector(["x"], bins=64, images=4, most=m) for m in (most, 2**40))
        for row, x in enumerate(images):
            assert part.measure(row, str(row), x, np.array([0]), np.array([x.size])) < 0
        whole.join(part, range(4))
        assert part.total[0].dtype == (np.int32 if most < 2**31 else np.int64) and part.stats() == whole.stats()
        assert part.stats().counts.dtype == whole.stats().counts.dtype == np.int64
        found.append(whole.stats())
    assert found[0] == found[1] and found[0].counts.sum() == 12_000


@given(floats, floats, st.integers(16, 5000))
@example(0.0, 0.0, 4096)
@example(3.0, 3.0, 4096)
@example(-1e-45, 0.0, 16)
@example(-3e38, 3e38, 16)
@settings(deadline=None, derandomize=True)
def test_grid_is_the_finest_that_fits(a, b, capacity):
    low, high = min(a, b), max(a, b)
    k, first = kernels.grid(low, high, capacity)

    def bins(k):
        return math.floor(math.ldexp(high, -k)) - math.floor(math.ldexp(low, -k)) + 1

    assert bins(k) <= capacity and first == math.floor(math.ldexp(low, -k))
    finest = max(kernels.FINEST, math.frexp(max(abs(low), abs(high)))[1] - 21 if low or high else kernels.FINEST)
    assert k == finest or bins(k - 1) > capacity
    wider = kernels.grid(low * 2, high * 2 + 1e-3, capacity)[0]
    assert wider >= k or low > 0, "a range that holds another one never gets finer bins"


@given(arrays)
@example(np.zeros(5, np.float32))
@example(np.full(7, 3.14159, np.float32))
@example(np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32))
@example(np.array([-0.0, 0.0], np.float32))
@example(np.array([1e-44, -1e-44, 1e-38], np.float32))
@settings(deadline=None, derandomize=True)
def test_measuring_is_what_numpy_says(x):
    bad, values, counts, k, first = measured(x)
    assert bad == -1 and values[0] == x.min() and values[1] == x.max()
    assert not np.signbit(values[:2][values[:2] == 0]).any()
    wide = x.astype(np.float64)
    scaled = np.abs(np.ldexp(wide, -k))
    # stored in float32; the variance is a difference of float64 sums, whose root may be off by 1e-8 of the largest
    slack = 4 * EPS * np.abs(wide).max() + 1e-37
    assert np.allclose(values[2:4], [wide.mean(), wide.std()], rtol=0, atol=slack)
    numbers = np.floor(np.ldexp(wide, -k)).astype(np.int64) - first
    assert counts.sum() == x.size
    if not (
        (scaled > 0) & (scaled < 2.0**-126)
    ).any():  # else float32 cannot scale it, and it may be counted on the other side of zero
        assert np.array_equal(counts, np.bincount(numbers, minlength=len(counts)))
    for p, q in zip(QUANTILES, values[4:]):
        slack = 2.0**k * 1.0001 + 1e-6 * abs(q) + 1e-36
        assert x.min() <= q <= x.max()
        assert (wide < q - slack).sum() <= p * x.size + 1e-9 and (wide <= q + slack).sum() >= p * x.size - 1e-9
    assert (np.diff(values[4:]) >= 0).all()


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf, np.frombuffer(b"\x01\x00\x80\x7f", np.float32)[0]])
@pytest.mark.parametrize("place", [0, 1, 511, 512, 999])
def test_nan_and_infinity_are_found_anywhere(wrong, place):
    x = np.ones(1000, np.float32)
    x[place] = wrong
    assert measured(x)[0] == 0


@given(st.lists(plain, min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(16, 80))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_order_and_any_division_give_the_same_histogram(pieces, random, capacity):
    labels = [f"p{i}" for i in range(len(pieces))]
    images = [(label, {"x": piece}) for label, piece in zip(labels, pieces)]
    whole = collect(images, bins=capacity)
    shuffled = random.sample(images, len(images))
    cut = random.randint(1, len(images))
    parts = [collect(part, bins=capacity) for part in (shuffled[:cut], shuffled[cut:]) if part]
    assert collect(shuffled, bins=capacity) == whole
    assert parts[0] == whole if len(parts) == 1 else parts[0] + parts[1] == whole == parts[1] + parts[0]
    counts, edges = whole.histogram("x")
    every = np.concatenate(pieces).astype(np.float64)
    assert counts.sum() == every.size and edges[0] <= every.min() and every.max() < edges[-1]
    numbers = np.floor(every / (edges[1] - edges[0])).astype(np.int64)
    assert np.array_equal(counts, np.bincount(numbers - numbers.min()))


wide = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(hnp.arrays(np.float32, (3, 5), elements=wide), min_size=2, max_size=9), st.randoms(use_true_random=False)
)
@example([np.full((3, 5), v, np.float32) for v in (3e38, 1e-45, -3e38, 0.1, -1e-45)], None)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_sums_per_channel_are_exact_in_any_order_and_division(pieces, random):
    images = [(f"p{i}", {"x": piece}) for i, piece in enumerate(pieces)]
    by_channel = {"channels": {"x": 0}, "bins": 16}
    whole = collect(images, **by_channel)
    shuffled = random.sample(images, len(images)) if random else images[::-1]
    shards = [collect([image], **by_channel) for image in shuffled]
    assert collect(shuffled, **by_channel) == merge(*shards) == merge(shards[0], merge(*shards[1:])) == whole
    each = np.array([channel_values(piece, 0) for piece in pieces])
    right = [[math.fsum(each[:, c, k]) for k in (2, 3)] for c in range(3)]
    assert whole.channels["x"][:, 2:].tolist() == right


def test_bins_fold_as_the_range_grows_without_losing_a_count():
    rng = np.random.default_rng(0)
    images = [(f"p{i:02}", {"x": (rng.normal(0, 1, 1000) * 2.0**i).astype(np.float32)}) for i in range(30)]
    stats = collect(images)
    counts, edges = stats.histogram("x")
    assert counts.sum() == 30_000 and 2048 <= len(counts) <= 4096
    assert np.array_equal(counts, np.histogram(np.concatenate([a["x"] for _, a in images]).astype(float), edges)[0])


def test_merging_neighbours_loses_no_bin():
    """First bins even and odd, on either side of zero, one bin or several, up to 16 times as wide."""
    rng = np.random.default_rng(0)
    for first, used, shift in itertools.product(range(-3, 4), range(1, 9), range(5)):
        narrow, wider = rng.integers(1, 9, used).astype(np.int32), np.zeros(24, np.int64)
        kernels.fold(narrow, 0, first, used, wider, shift, -8)
        assert np.array_equal(wider, np.bincount(((first + np.arange(used)) >> shift) + 8, narrow, 24))


def saved_network(path, *, batch=1):
    """Conv, ReLU, Conv, Sigmoid, Mul, pooling, Reshape, Gemm; input [batch,3,16,16], which may be open ("N")."""
    rng = np.random.default_rng(0)
    text = """
    c1 = Conv <pads = [1, 1, 1, 1]> (input, w1); r1 = Relu (c1); c2 = Conv (r1, w2)
    s = Sigmoid (c2); m = Mul (c2, s); p = GlobalAveragePool (m); f = Reshape (p, to); output = Gemm (f, w3)
    """
    weights = {"w1": rng.normal(0, 0.3, (8, 3, 3, 3)), "w2": rng.normal(0, 0.2, (8, 8, 3, 3))}
    weights |= {"w3": rng.normal(0, 0.3, (8, 5)), "to": np.array([1, 8])}
    return network(text, inputs={"input": (batch, 3, 16, 16)}, **weights).save(path)


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_network(tmp_path_factory.mktemp("model") / "float.onnx")


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(1).integers(0, 256, (13, 16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def oracle(model, images):
    """Every activation of every picture, by label: what `observe` must agree with, and may not keep."""
    graph = load_graph(model)
    names = activations(graph)
    return {label: {"input": scale(p)} | run(graph, scale(p), names[1:], threads=1) for label, p in labelled(images)}


@pytest.fixture(scope="module")
def stats(model, images):
    return observe(model, images, scale, progress=False)


def test_one_pass_agrees_with_all_activations_kept(stats, oracle):
    assert stats.tensors == ("input", "r1", "c2", "s", "m", "p", "output") and list(stats.images) == sorted(oracle)
    for t, name in enumerate(stats.tensors):
        kept = np.array([oracle[label][name].ravel() for label in stats.images])
        assert np.array_equal(stats.min[t], kept.min(1)) and np.array_equal(stats.max[t], kept.max(1))
        slack = 4 * EPS * np.abs(kept).max()  # stored in float32
        assert np.allclose(stats.mean[t], kept.mean(1, dtype=float), rtol=0, atol=slack)
        assert np.allclose(stats.std[t], kept.std(1, dtype=float), rtol=0, atol=slack)
        counts, edges = stats.histogram(name)
        assert np.array_equal(counts, np.histogram(kept.astype(float), edges)[0])
        width = edges[1] - edges[0]
        for p in (0.01, 0.5, 0.99):
            assert np.abs(stats.quantile(p)[t] - np.quantile(kept, p, axis=1, method="inverted_cdf")).max() <= max(
                width, np.ptp(kept) / 30
            )
    assert stats == collect((label, oracle[label]) for label in oracle) or stats.model_sha256, (
        "the same object from arrays in memory"
    )
    assert np.array_equal(collect((label, oracle[label]) for label in oracle).counts, stats.counts)


def test_order_threads_and_division_change_nothing(model, images, stats):
    for seed, threads in itertools.product(range(3), (1, 2, 3, MAX_WORKERS + 4)):
        order = np.random.default_rng(seed).permutation(len(images))
        assert observe(model, [images[i] for i in order], scale, threads=threads, progress=False) == stats
    for parts in ((images[:1], images[1:]), (images[9:], images[:4], images[4:9]), [[p] for p in images]):
        shards = [observe(model, part, scale, progress=False) for part in parts]
        merged = shards[0]
        for shard in shards[1:]:
            merged = shard + merged
        assert merged == stats
    assert observe(model, (p for p in images), scale, progress=False) == stats
    assert observe(load_graph(model), images, scale, progress=False).counts.sum() == stats.counts.sum()


def test_fewer_tensors_and_channels(model, images, oracle, stats):
    by_channel = ObserveOptions(per_channel={"c1": 1, "m": -1})
    few = observe(model, images, scale, tensors=["c1", "m"], options=by_channel, progress=False)
    assert few.tensors == ("c1", "m") and np.array_equal(few.max[1], stats.max[stats.index("m")])
    kept = np.concatenate([oracle[label]["m"] for label in stats.images])
    low, high, total, squares = few.channels["m"].T
    assert np.array_equal(low, kept.min((0, 1, 2))) and np.array_equal(high, kept.max((0, 1, 2)))
    assert np.allclose(total, kept.sum((0, 1, 2), dtype=float), rtol=1e-9) and np.allclose(
        squares, np.square(kept, dtype=float).sum((0, 1, 2)), rtol=1e-9
    )
    halves = [
        observe(model, part, scale, tensors=["c1", "m"], options=by_channel, progress=False)
        for part in (images[:5], images[5:])
    ]
    assert halves[0] + halves[1] == halves[1] + halves[0] == few
    one = observe(model, images[::-1], scale, tensors=["c1", "m"], threads=1, options=by_channel, progress=False)
    assert one == few


def test_the_model_file_is_only_read_and_one_picture_is_enough(model, images):
    before = sha256_file(model)
    one = observe(model, images[:1], scale, options=ObserveOptions(bins=16), progress=False)
    assert one.images == (next(labelled(images))[0],) and one.counts.shape[1] == 32 and sha256_file(model) == before


def nan_at(n):
    seen = itertools.count()
    return lambda bgr: np.full((1, 3, 16, 16), 3e38 if next(seen) == n else 0, np.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_infinity_names_tensor_and_image(model, images, threads):
    with pytest.raises(ModelError, match=r"tensor 'r1' holds NaN or infinity on array-[0-9a-f]{16}"):
        observe(model, images, nan_at(7), threads=threads, progress=False)


REFUSED = [
    ({"images": []}, "no calibration images"),
    ({"images": iter([])}, "no calibration images"),
    ({"tensors": []}, "0 tensors"),
    ({"tensors": ["r1", "r1"]}, "no tensor twice"),
    ({"tensors": ["c3"]}, "the model has no tensor 'c3'"),
    ({"options": ObserveOptions(per_channel=["c1"])}, "'c1' is not among those observed"),
    ({"threads": 0}, "0 threads"),
    ({"options": ObserveOptions(bins=2)}, "at least 16 bins"),
    ({"options": ObserveOptions(save_every=0)}, "saving every 0"),
    ({"model": "none.onnx"}, "no such model"),
    ({"images": ["none.jpg"]}, "none.jpg"),
    ({"preprocess": lambda bgr: scale(bgr)[:, :, :8]}, r"gives float32 \[1, 3, 8, 16\]"),
    ({"preprocess": lambda bgr: scale(bgr) * np.nan}, "gives float32|gives NaN"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED)
def test_what_cannot_be_observed_is_refused_in_one_line(model, images, change, match):
    with pytest.raises(InputError, match=match) as refused:
        observe(**{"model": model, "images": images, "preprocess": scale, "progress": False} | change)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_open_batch_is_refused_with_what_to_do(tmp_path, images):
    with pytest.raises(ModelError, match="fix-batch"):
        observe(saved_network(tmp_path / "open.onnx", batch="N"), images, scale, progress=False)


def test_labels_name_content():
    a, b = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    names = [label for label, _ in labelled([a, b, a.copy(), "x/y.jpg", "x/y.jpg"])]
    assert names[0] != names[1] and names[2] == names[0] + "#2" and names[3:] == ["x/y.jpg", "x/y.jpg#2"]
    with pytest.raises(InputError, match="an image array: preprocessing gives float64"):
        network_input(a, lambda bgr: bgr.astype(float))


# --- files


def test_file_round_trip_and_equal_bytes(tmp_path, stats):
    first, second = stats.save(tmp_path / "a.npz"), ActivationStats.load(stats.save(tmp_path / "b.npz"))
    assert second == stats and first.read_bytes() == second.save(tmp_path / "c.npz").read_bytes()
    assert not list(tmp_path.glob(".*"))
    with np.load(first, allow_pickle=False) as plain:
        assert plain["tensors"].tolist() == list(stats.tensors)


def test_channels_are_kept_in_files_and_those_of_an_older_file_are_read(model, images, tmp_path):
    options = ObserveOptions(per_channel=["c1"])
    whole, few = (
        observe(model, p, scale, tensors=["c1"], options=options, progress=False) for p in (images, images[:3])
    )
    assert read_stats(whole.save(tmp_path / "w.npz")) == whole
    with np.load(tmp_path / "w.npz") as arrays:
        np.savez(tmp_path / "old.npz", **{name: arrays[name] for name in arrays.files if not name.startswith("sums/")})
        wrong = dict(arrays) | {"sums/c1": arrays["sums/c1"] + 1}
    assert np.array_equal(read_stats(tmp_path / "old.npz").channels["c1"], whole.channels["c1"])
    few.save(tmp_path / "few.npz")
    assert (
        observe(model, images, scale, tensors=["c1"], options=options, journal=tmp_path / "few.npz", progress=False)
        == whole
    )
    np.savez(tmp_path / "wrong.npz", **wrong)
    with pytest.raises(InputError, match="sums contradict"):
        read_stats(tmp_path / "wrong.npz")


def test_values_beyond_a_size_lie_in_a_file_and_are_the_same(model, images, stats, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "IN_MEMORY", 2000)
    shards = [observe(model, part, scale, progress=False) for part in (images[8:], images[:3], images[3:8])]
    whole = merge(*shards)
    assert whole == stats == observe(model, iter(images), scale, progress=False) and rows.is_mapped(whole.values)
    assert whole.save(tmp_path / "a.npz").read_bytes() == stats.save(tmp_path / "b.npz").read_bytes()
    read = read_stats(tmp_path / "a.npz")
    assert rows.is_mapped(read.values) and read == stats and read.table().equals(stats.table())
    assert read.select(["m", "r1"]) == stats.select(["m", "r1"])
    assert np.array_equal(read.quantile(0.5), stats.quantile(0.5))
    assert observe(model, images, scale, journal=shards[0].save(tmp_path / "c.npz"), progress=False) == stats


def test_merging_what_does_not_belong_together_is_refused(model, images, stats, tmp_path):
    other = observe(model, images[:2], scale, options=ObserveOptions(bins=32), progress=False)
    assert stats != other and stats != 3
    for a, match in (
        (other, "do not fit together"),
        (stats, "13 images are in two"),
        (stats.select(["r1"]), "do not fit together"),
    ):
        with pytest.raises(InputError, match=match):
            stats + a


@pytest.fixture(scope="module")
def content(stats, tmp_path_factory):
    return stats.select(["r1", "p"]).save(tmp_path_factory.mktemp("content") / "s.npz").read_bytes()


def damaged(tmp_path, content):
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    try:
        return read_stats(path)
    except InputError as e:
        assert "\n" not in str(e)
        return None


def test_a_file_cut_anywhere_is_refused(tmp_path, content):
    for end in range(0, len(content), max(1, len(content) // 120)):
        assert damaged(tmp_path, content[:end]) is None


def test_a_flipped_byte_is_refused_or_harmless(tmp_path, content, stats):
    whole = stats.select(["r1", "p"])
    rng = np.random.default_rng(0)
    places = [*range(120), *rng.integers(0, len(content), 150), *range(len(content) - 700, len(content), 5)]
    for place in places:
        found = damaged(
            tmp_path, content[:place] + bytes([content[place] ^ (1 << rng.integers(8))]) + content[place + 1 :]
        )
        assert found is None or np.array_equal(found.counts, whole.counts)


def test_foreign_and_hostile_files_are_refused(tmp_path, stats):
    arrays = stats._arrays()
    later = str(arrays["header"]).replace('"version": 1', '"version": 2')
    changes = [
        {"header": np.array("{}")},
        {"header": np.array(later)},
        {"header": np.array("x")},
        {"header": np.array("[1]")},
        {"values": arrays["values"][:3]},
        {"values": arrays["values"] * np.nan},
        {"counts": -arrays["counts"]},
        {"counts": arrays["counts"].astype(float)},
        {"images": np.array([{}], object)},
        {"images": np.repeat(arrays["images"][:1], 13)},
    ]
    for change in changes:
        np.savez(tmp_path / "x.npz", **arrays | change)
        with pytest.raises(InputError, match="holds no activation statistics"):
            read_stats(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr(
            "header.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(128)
            + b"\n",
        )
    for wrong in (tmp_path / "x.npy", tmp_path / "bomb.npz", tmp_path, tmp_path / "none"):
        with pytest.raises(InputError):
            read_stats(wrong)


# --- stopping


WORKER = """
import os, sys, time
import numpy as np
from calib_nb.quant.observe import ObserveOptions, observe
model, journal, calls, hold = sys.argv[1:]
images = list(np.random.default_rng(5).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
def slow(bgr):
    with open(calls, "a") as f:
        f.write("x")
    while os.path.getsize(calls) >= 40 and os.path.exists(hold):
        time.sleep(0.01)
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
stats = observe(model, images, slow, journal=journal, options=ObserveOptions(save_every=5), progress=False)
stats.save(journal + ".done")
print(len(stats.images))
"""


def start(model, tmp_path):
    files = [str(tmp_path / name) for name in ("journal.npz", "calls", "hold")]
    return forked.start_script(WORKER, model, *files, output=tmp_path)


def wait_until(ready):
    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_pass_goes_on_where_it_was(model, tmp_path, how):
    journal, calls, hold = (tmp_path / name for name in ("journal.npz", "calls", "hold"))
    hold.touch()  # the fortieth image waits, so that the signal comes in the middle however slow the machine is
    process = start(model, tmp_path)
    wait_until(lambda: calls.exists() and calls.stat().st_size >= 40)
    os.kill(process.pid, how)
    if how == signal.SIGINT:
        wait_until(lambda: len(read_stats(journal).images) > 35)  # what was not yet saved is saved on the way out
    hold.unlink()
    process.join(60)
    kept = len(read_stats(journal).images)
    assert 20 <= kept < 60
    calls.unlink()
    again = start(model, tmp_path)
    again.join(60)
    assert ((tmp_path / "1").read_text(), (tmp_path / "2").read_text(), again.exitcode) == ("60\n", "", 0)
    assert calls.stat().st_size == 60 - kept + 1, "the rest, and one to see that nothing has changed"
    images = list(np.random.default_rng(5).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    assert (
        read_stats(tmp_path / "journal.npz.done")
        == read_stats(tmp_path / "journal.npz")
        == observe(model, images, scale, progress=False)
    )


def test_a_journal_of_something_else_is_left_alone(model, images, stats, tmp_path):
    journal = observe(model, images[:4], scale, progress=False).save(tmp_path / "j.npz")
    before = journal.read_bytes()
    for change, match in (
        ({"tensors": ["r1"]}, "another model, of other tensors"),
        ({"images": images[2:]}, "of other tensors or images"),
        ({"preprocess": lambda b: scale(b) * 0.9}, "another preprocessing"),
        ({"options": ObserveOptions(bins=64)}, "another model"),
    ):
        with pytest.raises(InputError, match=match):
            observe(
                **{"model": model, "images": images, "preprocess": scale, "journal": journal, "progress": False}
                | change
            )
        assert journal.read_bytes() == before
    journal.write_bytes(before[:1000])
    with pytest.raises(InputError, match="holds no activation statistics"):
        observe(model, images, scale, journal=journal, progress=False)
    journal.write_bytes(before)
    assert observe(model, images, scale, journal=journal, progress=False) == stats == read_stats(journal)


def test_an_error_in_the_middle_keeps_what_was_done(model, images, tmp_path):
    with pytest.raises(ModelError):
        observe(model, images, nan_at(10), journal=tmp_path / "j.npz", threads=1, progress=False)
    kept = read_stats(tmp_path / "j.npz")
    assert len(kept.images) == 10, "those before the bad one in full, although a part of it was counted"
    zeros = [image for label, image in labelled(images) if label in kept.images]
    assert kept == replace(observe(model, zeros, nan_at(-1), progress=False), model_sha256=kept.model_sha256)


def test_a_cache_that_cannot_be_written_breaks_nothing(tmp_path):
    code = """
import numba.core.caching as caching
for locator in [c for name, c in vars(caching).items() if name.endswith("CacheLocator")]:
    locator.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError("read-only file system"))
import numpy as np
from calib_nb.quant.kernels import extremes
print(extremes(np.array([1, 2], np.float32)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("(1.0, 2.0, 3.0, 5.0)"), done.stderr[-500:]


def test_importing_stays_quick():
    code = """
import sys, calib_nb.quant.observe, calib_nb.quant.ranges, calib_nb.quant.stability
print(sorted({'numba', 'onnx', 'onnxruntime', 'scipy', 'torch'} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_memory_does_not_grow_with_the_images():
    few, many = (Collector(["a"] * 1, images=n) for n in (10, 1000))
    assert many.values.nbytes - few.values.nbytes == 990 * VALUES * 4, "a few numbers per tensor and image"
    assert few.total[0].nbytes == many.total[0].nbytes


MEMORY = """
import sys
import numpy as np
from calib_nb.quant.observe import observe
model, n = sys.argv[1], int(sys.argv[2])
noise = np.random.default_rng(0).normal(0, 1, (16, 1, 3, 112, 112)).astype(np.float32)
images = [np.array([[[i % 256, i // 256, 0]]], np.uint8) for i in range(n)]
observe(model, images, lambda bgr: noise[int(bgr[0, 0, 0]) % 16], progress=False)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_peak_memory_at_1000_images_is_that_at_100(real_data, tmp_path):
    model = fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "edgeface.onnx")
    peaks = {
        n: min(
            int(
                subprocess.run(
                    [sys.executable, "-c", MEMORY, str(model), str(n)], capture_output=True, text=True, check=True
                ).stdout
            )
            for _ in range(2)
        )
        for n in (100, 1000)
    }
    assert peaks[1000] <= 1.05 * peaks[100]


@pytest.mark.parametrize("name", ["face_detection_yunet_2023mar.onnx", "edgeface_xxs_q_dequant.onnx"])
def test_real_models(real_data, tmp_path, name):
    model = fix_batch(real_data / "models" / name, tmp_path / name)
    graph = load_graph(model)
    shape = graph.shape(graph.inputs[0])
    images = list(np.random.default_rng(0).integers(0, 256, (3, *shape[2:], 3), dtype=np.uint8))

    def prepare(bgr):
        return bgr.astype(np.float32).transpose(2, 0, 1)[None] / (255 if "edgeface" in name else 1)

    stats = observe(model, images, prepare, progress=False)
    kept = [run(graph, prepare(p), stats.tensors[1:], threads=1) for p in images]
    for tensor in stats.tensors[1:]:
        low, high = min(k[tensor].min() for k in kept), max(k[tensor].max() for k in kept)
        assert np.allclose(
            [stats.min[stats.index(tensor)].min(), stats.max[stats.index(tensor)].max()],
            [low, high],
            rtol=1e-5,
            atol=1e-6 * max(abs(low), abs(high)),
        )
        assert stats.histogram(tensor)[0].sum() == 3 * kept[0][tensor].size


@pytest.mark.slow  # it compiles every kernel again; the values of the same kernels are those of NumPy in quick tests
def test_no_kernel_writes_beyond_its_arrays(tmp_path):
    """Ranges that grow to either side, one tensor or several, with every index checked."""
    code = """
import numpy as np
from calib_nb.quant.stats import collect
rng = np.random.default_rng(0)
for reach in ((1, 2), (-1, 1), (-3, -2), (0, 1e-30), (-1e30, 1)):
    images = []
    for k, g in enumerate((1, 1.5, 0.1, 4, 4.0001, 900)):
        a, b = np.array([reach[0] * g, reach[1] * g], np.float32), rng.normal(g, g, 40).astype(np.float32)
        images.append((f"{k:02}", {"a": a, "b": b}))
    stats = collect(images, bins=16)
    assert stats.counts.sum() == 6 * 42
"""
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | checked, check=True, timeout=300)

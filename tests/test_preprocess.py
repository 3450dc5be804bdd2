"""The preprocessing chain against numpy, OpenCV and PIL written by hand, and its JSON both ways."""

import json
import pickle

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calib_nb.core.errors import ConfigError, InputError
from calib_nb.data.operations import COLOR_FORMS, CV_INTERPOLATION, PIL_INTERPOLATION
from calib_nb.data.preprocess import PRESETS, VENDOR_ONLY, Preprocess, preset

exact = settings(derandomize=True, deadline=None)
sides = st.integers(1, 64)
numbers = st.one_of(st.integers(-1000, 1000), st.floats(-1000, 1000, allow_nan=False))
nonzero = numbers.filter(lambda x: abs(x) > 1e-3)


def steps(draw_resize=True):
    boxes = st.tuples(sides, sides)
    resizes = st.one_of(
        st.builds(
            lambda b, i: {"resize": {"width": b[0], "height": b[1], "interpolation": i}},
            boxes,
            st.sampled_from(sorted(CV_INTERPOLATION)),
        ),
        st.builds(
            lambda b, i: {"resize": {"width": b[0], "height": b[1], "mode": "torchvision", "interpolation": i}},
            boxes,
            st.sampled_from(PIL_INTERPOLATION),
        ),
        st.builds(lambda s: {"resize": {"size": s, "mode": "torchvision"}}, sides),
        st.builds(
            lambda s, v: {"resize": {"size": s, "mode": "pad", "pad_value": [v] * 3, "pad_location": "edge"}},
            sides,
            st.integers(0, 255),
        ),
    )
    return st.one_of(
        resizes,
        st.builds(lambda f: {"convertColor": {"form": f}}, st.sampled_from(COLOR_FORMS)),
        st.builds(lambda b: {"centercrop": {"width": b[0], "height": b[1]}}, boxes),
        st.builds(
            lambda m, s: {"normalize": {"mean": m, "std": s}},
            st.lists(numbers, min_size=3, max_size=3),
            st.lists(nonzero, min_size=3, max_size=3),
        ),
        st.builds(lambda k, x: {k: {"x": x}}, st.sampled_from(["mul", "div"]), nonzero),
        st.builds(lambda k, x: {k: {"x": x}}, st.sampled_from(["add", "subtract"]), numbers),
        st.builds(lambda a: {"transpose": {"axis": a}}, st.permutations([0, 1, 2])),
        st.builds(lambda a: {"expandDim": {"axis": a}}, st.integers(0, 3)),
        st.builds(
            lambda k, a: {k: a},
            st.sampled_from(VENDOR_ONLY),
            st.one_of(st.none(), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)),
        ),
    )


@exact
@given(st.lists(steps(), max_size=7))
def test_list_and_chain_are_the_same_thing(entries):
    chain = Preprocess.from_list(entries)
    written = json.loads(json.dumps(chain.to_list()))
    assert Preprocess.from_list(written) == chain and Preprocess.from_list(written).to_list() == written
    assert pickle.loads(pickle.dumps(chain)) == chain and [next(iter(e)) for e in written] == [
        next(iter(e)) for e in entries
    ]
    if not chain.not_emulated:
        assert eval(repr(chain)) == chain


@given(st.lists(steps(), max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(exact, max_examples=150)
def test_any_chain_runs_or_says_which_step_cannot(entries, height, width, seed):
    chain = Preprocess.from_list(entries)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    try:
        out = chain(image)
    except ConfigError as e:
        assert e.what.startswith("step ") or chain.not_emulated
        return
    assert np.array_equal(image, before) and out.flags.c_contiguous and out.dtype in (np.uint8, np.float32)
    assert np.array_equal(chain.stages(image)[-1][1], out, equal_nan=True)
    low, high = chain.value_range()
    if out.dtype == np.float32 and not any("convertColor" in e or "resize" in e for e in entries):
        assert low - 1e-3 * abs(low) <= out.min() and out.max() <= high + 1e-3 * abs(high)


@pytest.fixture
def photo():
    return cv2.resize(
        np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8),
        (161, 120),
        interpolation=cv2.INTER_CUBIC,
    )


ARITHMETIC = {
    "yunet": lambda x: x,
    "edgeface": lambda x: (x / 255 - 0.5) / 0.5,
    "scrfd": lambda x: (x - 127.5) / 128,
    "retinaface": lambda x: x - [104, 117, 123],
    "yolov5-face": lambda x: x / 255,
    "yolov8-face": lambda x: x / 255,
    "fastestdet": lambda x: x / 255,
    "mtcnn": lambda x: (x - 127.5) / 128,
    "mediapipe": lambda x: x / 127.5 - 1,
    "rtmpose": lambda x: (x - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375],
    "unit": lambda x: x / 255,
    "signed": lambda x: x / 127.5 - 1,
}


def boxed(image, side, border):
    """A centred letterbox in plain numpy around OpenCV's resize."""
    height, width = image.shape[:2]
    size = side * width // max(height, width), side * height // max(height, width)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if side < max(height, width) else cv2.INTER_LINEAR)
    out = np.full((side, side, 3), border, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = small
    return out


@pytest.mark.parametrize("name", PRESETS)
def test_presets_against_plain_numpy(photo, name):
    width, height = PRESETS[name].size
    border = PRESETS[name].border
    scaled = cv2.resize(photo, (width, height)) if border is None else boxed(photo, width, border)
    image = scaled if name in ("yunet", "retinaface", "fastestdet") else scaled[..., ::-1]
    imagenet = lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # noqa: E731
    expected = ARITHMETIC.get(name, imagenet)(image.astype(np.float64))
    out = preset(name)(photo)
    assert out.shape == (1, 3, height, width) and np.abs(out - expected.transpose(2, 0, 1)[None]).max() < 1e-6
    assert np.array_equal(preset(name).denormalize(out), scaled)


@pytest.mark.parametrize("interpolation", sorted(CV_INTERPOLATION))
def test_default_resize_is_opencv(photo, interpolation):
    out = Preprocess().resize(33, 47, interpolation=interpolation)(photo)
    assert np.array_equal(out, cv2.resize(photo, (33, 47), interpolation=getattr(cv2, f"INTER_{interpolation}")))


@pytest.mark.parametrize("interpolation", PIL_INTERPOLATION)
def test_torchvision_resize_is_pil(photo, interpolation):
    how = getattr(Image.Resampling, interpolation)
    out = Preprocess().resize(33, 47, mode="torchvision", interpolation=interpolation)(photo)
    assert np.array_equal(out, np.asarray(Image.fromarray(photo).resize((33, 47), how)))
    short = Preprocess().resize(size=60, mode="torchvision", interpolation=interpolation)(photo)
    assert np.array_equal(short, np.asarray(Image.fromarray(photo).resize((int(60 * 161 / 120), 60), how)))


@exact
@given(sides, sides, st.integers(8, 64))
def test_pad_keeps_the_aspect_and_centres(width, height, size):
    image = np.full((height, width, 3), 200, np.uint8)
    out = Preprocess().pad_resize(size, pad_value=[7, 8, 9])(image)
    assert out.shape == (size, size, 3)
    inside = (out == 200).all(axis=2)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert max(len(rows), len(columns)) == size and (out[~inside] == [7, 8, 9]).all()
    for found in (rows, columns):
        assert abs(found[0] - (size - 1 - found[-1])) <= 1
    assert (
        abs(len(columns) / len(rows) - width / height) <= width / height * 1.01 / min(len(rows), len(columns)) + 1e-9
        or min(len(rows), len(columns)) == 1
    )


def test_centercrop_is_the_middle(photo):
    out = Preprocess().centercrop(100, 20)(photo)
    assert np.array_equal(out, photo[50:70, 30:130])  # (161 - 100) / 2 = 30.5, half to even
    with pytest.raises(ConfigError, match="resize before centercrop"):
        Preprocess().centercrop(500, 20)(photo)


@pytest.mark.parametrize("form", COLOR_FORMS)
def test_colors_are_opencv_and_can_be_undone(photo, form):
    chain = Preprocess().convert_color(form)
    expected = cv2.cvtColor(photo, getattr(cv2, f"COLOR_{form.replace('LAB', 'Lab')}"))
    assert np.array_equal(np.squeeze(chain(photo)), expected)
    if form.startswith("BGR") and "GRAY" not in form:
        assert np.abs(chain.denormalize(chain(photo)).astype(int) - photo).mean() < 3  # 8-bit colour spaces round


def test_normalize_follows_the_channels(photo):
    mean, std = [10, 20, 30], [2, 4, 8]
    expected = ((photo.astype(np.float64) - mean) / std).transpose(2, 0, 1)
    for chain in (
        Preprocess().normalize(mean, std).transpose([2, 0, 1]),
        Preprocess().transpose([2, 0, 1]).normalize(mean, std),
        Preprocess().transpose([2, 0, 1]).expand_dim(0).normalize(mean, std),
        Preprocess().subtract(0).transpose([2, 0, 1]).normalize(mean, std),
        Preprocess().transpose([1, 2, 0]).normalize(mean, std).transpose([1, 2, 0]).transpose([0, 1, 2]),
    ):
        out = chain(photo).reshape(-1)
        assert np.allclose(np.sort(out), np.sort(expected.reshape(-1)), atol=1e-5)
    assert np.allclose(Preprocess().transpose([2, 0, 1]).normalize(mean, std)(photo), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="3 values of mean for 1 channels"):
        Preprocess().convert_color("BGR2GRAY").normalize(mean, std)(photo)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["mul", "div"]), st.floats(0.01, 100)),
            st.tuples(st.sampled_from(["add", "subtract"]), st.floats(-100, 100)),
        ),
        min_size=1,
        max_size=6,
    )
)
@exact
def test_fused_arithmetic_is_equal_to_steps_and_can_be_undone(chosen):
    chain = Preprocess.from_list([{key: {"x": x}} for key, x in chosen])
    image = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, 2)
    assert np.array_equal(chain(image), chain.stages(image)[-1][1])
    exact = image.astype(np.float64)
    for key, x in chosen:
        exact = {"mul": np.multiply, "div": np.divide, "add": np.add, "subtract": np.subtract}[key](exact, x)
    assert np.allclose(chain(image), exact, rtol=1e-5, atol=1e-4 * (1 + np.abs(exact).max()))
    if np.ptp(exact) > 1:
        assert np.abs(chain.denormalize(chain(image)).astype(int) - image).max() <= 1 + 255 * np.abs(
            exact
        ).max() * 1e-6 / np.ptp(exact)


def test_letterboxed_picture_of_what_the_network_sees(photo):
    chain = Preprocess().pad_resize(96).convert_color("BGR2RGB").div(255).transpose([2, 0, 1]).expand_dim(0)
    seen = chain.denormalize(chain(photo))
    assert np.array_equal(seen, Preprocess().pad_resize(96)(photo)) and (seen[0] == 114).all()


@pytest.mark.parametrize(
    "image",
    [
        None,
        [[1]],
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3)),
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ConfigError, match="uint8 .H, W, 3. BGR"):
        preset("yunet")(image)


BAD = [
    ({"resize": {"width": "3", "height": 3}}, "should be a valid integer"),
    ({"resize": {"width": True, "height": 3}}, "should be a valid integer"),
    ({"resize": {"width": 10**9, "height": 3}}, "16384"),
    ({"resize": {"width": 8, "height": 8, "interpolation": "linear"}}, "did you mean 'LINEAR'"),
    ({"resize": {"size": 8}}, "give width and height"),
    ({"resize": {"size": 8, "mode": "padd"}}, "did you mean 'pad'"),
    ({"div": {"x": 0}}, "0 is not allowed"),
    ({"div": {"x": float("inf")}}, "finite"),
    ({"div": {"x": float("nan")}}, "finite"),
    ({"div": {"x": True}}, "finite"),
    ({"normalize": {"mean": [0.5] * 3, "std": [0, 1, 1]}}, "0 is not allowed"),
    ({"normalize": {"mean": [], "std": 1}}, "one per channel"),
    ({"normalize": {"maen": 1, "mean": 1, "std": 1}}, "did you mean 'mean'"),
    ({"transpose": {"axis": [2, 0]}}, "order of axes"),
    ({"transpose": {"axis": "201"}}, "tuple"),
    ({"expandDim": {"axis": -7}}, "greater than or equal"),
    ({"convertColour": {"form": "BGR2RGB"}}, "did you mean 'convertColor'"),
    ({"div": {"x": 1}, "mul": {"x": 1}}, "not a step"),
    ({"div": 255}, "object with keys"),
    ([], "not a step"),
]


@pytest.mark.parametrize("entry, message", BAD, ids=[str(e)[:40] for e, _ in BAD])
def test_a_bad_step_is_named_with_its_number(entry, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Preprocess.from_list([{"div": {"x": 255}}, entry])
    assert str(caught.value).startswith("step 1: ") and "\n" not in str(caught.value)


def test_what_is_no_list_is_refused():
    for value in ({"div": {"x": 1}}, "div", None):
        with pytest.raises(ConfigError, match="not a list"):
            Preprocess.from_list(value)
    with pytest.raises(InputError, match="did you mean 'edgeface'"):
        preset("edge-face")


def test_fifty_levels_of_nesting_in_a_vendor_step_survive():
    deep = 1
    for _ in range(50):
        deep = {"a": [deep]}
    assert Preprocess.from_list([{"slice": deep}]).to_list() == [{"slice": deep}]

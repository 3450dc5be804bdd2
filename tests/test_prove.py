"""Every usual slip of a deployment is found and named; equal transforms, written otherwise, raise no alarm."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from calib_nb.core.errors import InputError
from calib_nb.data.demo_images import paint_scene
from calib_nb.data.images import decode
from calib_nb.data.preprocess import Preprocess
from calib_nb.npu.config import generate_config
from calib_nb.npu.deployed import DeployedTransform
from calib_nb.npu.price import task_price
from calib_nb.npu.prove import prove

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
W, H = 64, 48


def read(path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def chw(x, dtype=np.float32) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None].astype(dtype))


def scale(rgb, flag=cv2.INTER_LINEAR) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(rgb), (W, H), interpolation=flag)


def values(x) -> np.ndarray:
    return (np.asarray(x, np.float32) / 255 - MEAN) / STD


def whole(change=None, resize=scale, finish=values, load=read):
    """The config's own steps with one of them replaced."""

    def transform(path):
        x = load(path)
        return chw(finish(resize(change(x) if change else x)))

    return transform


def pil(method):
    return lambda x: np.asarray(Image.fromarray(np.ascontiguousarray(x)).resize((W, H), method))


def torch_resize(**options):
    def resize(x):
        import torch

        planes = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)[None])).float()
        return torch.nn.functional.interpolate(planes, (H, W), **options)[0].permute(1, 2, 0).numpy()

    return resize


def letterbox(x, value=114, corner=False):
    ratio = min(W / x.shape[1], H / x.shape[0])
    w, h = int(x.shape[1] * ratio + 1e-9), int(x.shape[0] * ratio + 1e-9)
    out = np.full((H, W, 3), value, np.uint8)
    top, left = (0, 0) if corner else ((H - h) // 2, (W - w) // 2)
    out[top : top + h, left : left + w] = cv2.resize(np.ascontiguousarray(x), (w, h))
    return out


def short_side(x):
    ratio = max(W / x.shape[1], H / x.shape[0])
    w, h = max(W, int(x.shape[1] * ratio + 1e-6)), max(H, int(x.shape[0] * ratio + 1e-6))
    y = cv2.resize(np.ascontiguousarray(x), (w, h))
    top, left = round((h - H) / 2), round((w - W) / 2)
    return y[top : top + H, left : left + W]


def ycc(rgb, video):
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y, cb, cr = (
        0.299 * r + 0.587 * g + 0.114 * b,
        -0.168736 * r - 0.331264 * g + 0.5 * b,
        0.5 * r - 0.418688 * g - 0.081312 * b,
    )
    return (y * 219 / 255 + 16, cb * 224 / 255 + 128, cr * 224 / 255 + 128) if video else (y, cb + 128, cr + 128)


def from_ycc(y, cb, cr, video):
    y, cb, cr = (
        ((y - 16) * 255 / 219, (cb - 128) * 255 / 224, (cr - 128) * 255 / 224) if video else (y, cb - 128, cr - 128)
    )
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return np.uint8(np.clip(np.rint(rgb), 0, 255))


def yuv_mixed(x):
    return from_ycc(*ycc(x, False), True)


def yuv_washed(x):
    return from_ycc(*ycc(x, True), False)


def nv12(x, swap=False):
    h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    y, cb, cr = ycc(x, False)
    half = [cv2.resize(np.float32(p[:h, :w]), (w // 2, h // 2), interpolation=cv2.INTER_AREA) for p in (cb, cr)]
    for p, small in zip((cb, cr), half):
        p[:h, :w] = np.rint(small).repeat(2, 0).repeat(2, 1)
    return from_ycc(np.rint(y), *((cr, cb) if swap else (cb, cr)), False)


def fast_jpeg(path):
    import simplejpeg

    if Path(path).suffix != ".jpg":
        return read(path)
    return simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB", fastdct=True, fastupsample=True)


def unturned(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]


def again(path):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(read(path))).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def linear_light(x):
    v = x / 255
    return np.uint8(np.rint(255 * np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)))


def bfloat(x):
    return (np.float32(values(x)).view(np.uint32) & 0xFFFF0000).view(np.float32)


# name: (transform, the step, words that name it)
MUTATIONS = {
    "channels swapped": (whole(lambda x: x[..., ::-1]), "channels", "swapped"),
    "/255 missing": (whole(finish=lambda x: (np.float32(x) - MEAN) / STD), "values", "division by 255 is missing"),
    "/255 twice": (whole(finish=lambda x: values(x / 255)), "values", "done twice"),
    "/256": (whole(finish=lambda x: values(x * (255 / 256))), "values", "256 instead of 255"),
    "only /255": (whole(finish=lambda x: np.float32(x) / 255), "values", "normalisation.*missing|0..1"),
    "-1..1": (whole(finish=lambda x: np.float32(x) / 127.5 - 1), "values", "-1..1"),
    "no arithmetic": (whole(finish=np.float32), "values", "0..255"),
    "mean in 0..255 units": (
        whole(finish=lambda x: (x / 255 - 255 * MEAN) / STD),
        "values",
        "the mean is that of values 0..255",
    ),
    "std in 0..255 units": (
        whole(finish=lambda x: (x / 255 - MEAN) / (255 * STD)),
        "values",
        "the std is that of values 0..255",
    ),
    "mean and std in 0..255 units": (
        whole(finish=lambda x: (x / 255 - 255 * MEAN) / (255 * STD)),
        "values",
        "mean and std are those of values 0..255",
    ),
    "mean-std in BGR order": (
        whole(finish=lambda x: (x / 255 - MEAN[::-1]) / STD[::-1]),
        "values",
        "opposite order|BGR order",
    ),
    "std missing": (whole(finish=lambda x: x / 255 - MEAN), "values", "std is not divided"),
    "mean missing": (whole(finish=lambda x: x / 255 / STD), "values", "mean is not subtracted"),
    "normalised before /255": (whole(finish=lambda x: (x - MEAN) / STD / 255), "values", "comes before"),
    "standardised per image": (
        whole(finish=lambda x: (x - x.mean()) / x.std()),
        "values",
        "its own standard deviation",
    ),
    "PIL bilinear": (whole(resize=pil(Image.Resampling.BILINEAR)), "resize", "PIL bilinear"),
    "PIL bicubic": (whole(resize=pil(Image.Resampling.BICUBIC)), "resize", "PIL bicubic"),
    "PIL nearest": (whole(resize=pil(Image.Resampling.NEAREST)), "resize", "nearest"),
    "torch antialias": (whole(resize=torch_resize(mode="bilinear", antialias=True)), "resize", "with antialias"),
    "torch without antialias": (whole(resize=torch_resize(mode="bilinear")), "resize", "not rounded"),
    "aligned corners": (whole(resize=torch_resize(mode="bilinear", align_corners=True)), "resize", "aligned corners"),
    "area": (whole(resize=lambda x: scale(x, cv2.INTER_AREA)), "resize", "area"),
    "nearest": (whole(resize=lambda x: scale(x, cv2.INTER_NEAREST)), "resize", "nearest"),
    "cubic": (whole(resize=lambda x: scale(x, cv2.INTER_CUBIC)), "resize", "bicubic"),
    "letterbox": (whole(resize=letterbox), "resize", "letterboxed.*centred.*border 114"),
    "letterbox in the corner": (
        whole(resize=lambda x: letterbox(x, 0, True)),
        "resize",
        "letterboxed.*upper left.*border 0",
    ),
    "short side and centre crop": (whole(resize=short_side), "resize", "short side.*cropped"),
    "first row and column lost": (whole(lambda x: x[1:, 1:]), "resize", "without the first row"),
    "truncated, not rounded": (
        whole(resize=lambda x: np.floor(scale(np.float32(x)))),
        "resize",
        "truncated, not rounded",
    ),
    "channels last": (lambda path: values(scale(read(path)))[None], "layout", "channels last"),
    "reshaped, not transposed": (
        lambda path: values(scale(read(path))).reshape(1, 3, H, W),
        "layout",
        "reshaped, not transposed",
    ),
    "rows and columns exchanged": (
        lambda path: np.ascontiguousarray(values(scale(read(path))).transpose(2, 1, 0)[None]),
        "layout",
        "rows and columns",
    ),
    "EXIF ignored": (whole(load=unturned), "read", "EXIF"),
    "fast JPEG decoder": (whole(load=fast_jpeg), "read", "fast DCT"),
    "compressed again": (whole(load=again), "read", "compressed again.*75"),
    "full range read as video range": (whole(yuv_mixed), "colours", "full range YUV read as video"),
    "video range read as full range": (whole(yuv_washed), "colours", "video range YUV read as full"),
    "NV12 chroma": (whole(nv12), "colours", "NV12: chroma at half"),
    "NV21 for NV12": (whole(lambda x: nv12(x, True)), "colours", "U and V exchanged"),
    "gray": (
        whole(lambda x: cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)),
        "colours",
        "gray",
    ),
    "gamma 2.2": (whole(lambda x: np.uint8(np.rint(255 * (x / 255) ** 2.2))), "colours", "gamma 2.2"),
    "gamma 0.8": (whole(lambda x: np.uint8(np.rint(255 * (x / 255) ** 0.8))), "colours", "gamma 0.8"),
    "linear light": (whole(linear_light), "colours", "linear light"),
    "mirrored": (whole(lambda x: x[:, ::-1]), "colours", "mirrored"),
    "upside down": (whole(lambda x: x[::-1]), "colours", "upside down"),
    "float16": (whole(finish=lambda x: np.float16(values(x))), "type", "float16"),
    "bfloat16": (whole(finish=bfloat), "type", "bfloat16"),
    "whole numbers": (whole(finish=lambda x: np.trunc(values(x))), "values", "towards 0"),
    "negative values lost": (whole(finish=lambda x: np.maximum(values(x), 0)), "values", "cut off at 0"),
    "cut off at -1 and 1": (whole(finish=lambda x: np.clip(values(x), -1, 1)), "values", "cut off at -1 and 1"),
}


def config_of(folder: Path):
    return generate_config("resnet-tags", folder, input_size=(W, H))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(((90, 140), (120, 96), (101, 163))):
        cv2.imwrite(
            str(folder / f"{i}.jpg"), paint_scene(i, height=height, width=width), [cv2.IMWRITE_JPEG_QUALITY, 90]
        )
    return folder


def check(name: str, folder: Path, samples: int = 3) -> None:
    transform, step, words = MUTATIONS[name]
    proof = prove(config_of(folder), transform, folder, num_samples=samples, progress=False)
    assert not proof.equal, name
    found = [d for d in proof.differences if d.step == step]
    assert found and re.search(words, found[0].words), f"{name}: {proof}"
    assert len(proof.differences) == 1, f"{name}: {proof}"
    assert proof.views is not None


QUICK = ("channels swapped", "/255 twice", "PIL bilinear", "EXIF ignored", "float16")
QUICK_EQUAL = ("OpenCV's blob", "Pillow decodes", "float64", "a table", "a chain of the package", "an rgb array")


def some(names, quick):
    """Parameters of which only the quick ones run in `make test`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(MUTATIONS, QUICK))
def test_a_mutation_is_found_and_named(name, photos):
    check(name, photos)


def lut(x):
    table = ((np.arange(256, dtype=np.float64)[:, None] / 255 - MEAN.astype(np.float64)) / STD).astype(np.float32)
    return np.stack([table[x[..., c], c] for c in range(3)], -1)


def torch_values(x):
    import torch

    y = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1).float().div_(255)
    return ((y - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).permute(1, 2, 0).numpy()


def blob(path):
    x = cv2.resize(cv2.imread(str(path)), (W, H))
    y = cv2.dnn.blobFromImage(x, 1 / 255, (W, H), swapRB=True)
    return (y - MEAN.reshape(1, 3, 1, 1)) / STD.reshape(1, 3, 1, 1)


def pillow(path, turn=ImageOps.exif_transpose):
    return np.asarray(turn(Image.open(path)).convert("RGB"))


def in_place(x):
    y = x.astype(np.float32)
    y /= 255
    y -= MEAN
    y /= STD
    return y


def by_channel(x):
    return np.dstack([(np.float32(x[..., c]) / np.float32(255) - MEAN[c]) / STD[c] for c in range(3)])


def merged(x):
    return np.float32(
        cv2.merge([cv2.subtract(np.float32(p) / 255, float(m)) / s for p, m, s in zip(cv2.split(x), MEAN, STD)])
    )


# The same as the config, each written by somebody else.
EQUAL = {
    "plain numpy": whole(),
    "scale and bias in one": whole(finish=lambda x: np.float32(x) * (1 / (255 * STD)) - MEAN / STD),
    "mean and std times 255": whole(finish=lambda x: (np.float32(x) - 255 * MEAN) / (255 * STD)),
    "float64": lambda path: chw((scale(read(path)) / 255.0 - MEAN.astype(float)) / STD.astype(float), np.float64),
    "times 1/255": whole(finish=lambda x: (np.float32(x) * np.float32(1 / 255) - MEAN) / STD),
    "times 1/std": whole(finish=lambda x: (np.float32(x) / 255 - MEAN) * (1 / STD)),
    "a table": whole(finish=lut),
    "torch": whole(finish=torch_values),
    "OpenCV's blob": blob,
    "Pillow decodes": whole(load=pillow),
    "swapped after the resize": lambda path: chw(values(cv2.resize(cv2.imread(str(path)), (W, H))[..., ::-1])),
    "swapped by cvtColor": whole(load=lambda path: cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)),
    "swapped after the arithmetic": lambda path: chw(
        ((np.float32(cv2.resize(cv2.imread(str(path)), (W, H))) / 255 - MEAN[::-1]) / STD[::-1])[..., ::-1]
    ),
    "moveaxis": lambda path: np.moveaxis(values(scale(read(path))), -1, 0)[None],
    "einsum": lambda path: np.einsum("hwc->chw", values(scale(read(path))))[None],
    "stacked channels": lambda path: np.stack([*np.moveaxis(values(scale(read(path))), -1, 0)])[None],
    "no batch": lambda path: chw(values(scale(read(path))))[0],
    "imdecode": whole(load=lambda path: cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]),
    "the package's decode": whole(load=lambda path: decode(path)[..., ::-1]),
    "in place": whole(finish=in_place),
    "channel by channel": whole(finish=by_channel),
    "OpenCV's arithmetic": whole(finish=merged),
    "each channel resized": whole(resize=lambda x: np.dstack([scale(x[..., c]) for c in range(3)])),
    "resized by factors": whole(
        resize=lambda x: cv2.resize(np.ascontiguousarray(x), None, fx=W / x.shape[1], fy=H / x.shape[0])[:H, :W]
    ),
    "a chain of the package": Preprocess()
    .resize(W, H)
    .convert_color("BGR2RGB")
    .mul(1 / 255)
    .normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    .transpose([2, 0, 1])
    .expand_dim(0),
    "transposed before the arithmetic": lambda path: (
        (chw(scale(read(path))) / np.float32(255) - MEAN.reshape(1, 3, 1, 1)) / STD.reshape(1, 3, 1, 1)
    ),
    "a subtraction first": whole(finish=lambda x: ((np.float32(x) - 127.5) / 255 + 0.5 - MEAN) / STD),
    "-1..1, then ImageNet": whole(finish=lambda x: ((np.float32(x) / 127.5 - 1) * 0.5 + 0.5 - MEAN) / STD),
    "a list": lambda path: [chw(values(scale(read(path))))],
    "a bgr array": lambda bgr: chw(values(scale(bgr[..., ::-1]))),
    "an rgb array": lambda rgb: chw(values(scale(rgb))),
    "a Pillow image": lambda pil_image: chw(values(scale(np.asarray(pil_image)))),
    "swapped twice": whole(load=lambda path: read(path)[..., ::-1][..., ::-1]),
    "Fortran order": lambda path: np.asfortranarray(chw(values(scale(read(path))))),
}


@pytest.mark.parametrize("name", some(EQUAL, QUICK_EQUAL))
def test_an_equal_transform_raises_no_alarm(name, photos):
    proof = prove(config_of(photos), EQUAL[name], photos, progress=False)
    assert proof.equal and not proof.differences, f"{name}: {proof}"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["channels swapped", "/255 twice", "float16"])
@pytest.mark.parametrize("name", ["PIL bilinear", "letterbox", "EXIF ignored", "gamma 2.2", "area"])
def test_two_mutations_are_both_named(first, name, photos):
    change, finish = (lambda x: x[..., ::-1], values) if first == "channels swapped" else (None, values)
    finish = {"/255 twice": lambda x: values(x / 255), "float16": lambda x: np.float16(values(x))}.get(first, finish)
    parts = {
        "PIL bilinear": {"resize": pil(Image.Resampling.BILINEAR)},
        "letterbox": {"resize": letterbox},
        "EXIF ignored": {"load": unturned},
        "gamma 2.2": {"change": lambda x: np.uint8(np.rint(255 * (x / 255) ** 2.2))},
        "area": {"resize": lambda x: scale(x, cv2.INTER_AREA)},
    }[name]
    if change and "change" in parts:
        parts = {"change": lambda x, f=parts["change"]: f(x)[..., ::-1]}
    transform = whole(**{"change": change, "finish": finish, **parts})
    proof = prove(config_of(photos), transform, photos, progress=False)
    for wanted in (first, name):
        _, step, words = MUTATIONS[wanted]
        assert any(d.step == step and re.search(words, d.words) for d in proof.differences), f"{wanted}: {proof}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda x: cv2.GaussianBlur(x, (5, 5), 0), lambda x: cv2.equalizeHist(x[..., 0])[..., None].repeat(3, 2)],
    ids=["blur", "equalized"],
)
def test_what_no_suspect_does_is_still_found_and_not_named_for_certain(change, photos):
    proof = prove(config_of(photos), whole(change), photos, num_samples=1, probes=False, progress=False)
    assert not proof.equal and not proof.certain and proof.left > 0.5 and "not explained" in str(proof)


def test_a_quantized_dump_is_equal_within_half_a_step_and_a_wrong_one_is_named(photos, tmp_path):
    files = sorted(photos.glob("*.jpg"))
    wanted = np.concatenate([whole()(path) for path in files])
    quantized = np.int8(np.clip(np.rint(wanted / 0.021) + 3, -128, 127))
    np.save(tmp_path / "good.npy", quantized)
    np.save(tmp_path / "bad.npy", quantized[:, ::-1])
    options = {"scale": 0.021, "zero_point": 3, "progress": False}
    assert prove(config_of(photos), None, photos, tensors=tmp_path / "good.npy", **options).equal
    proof = prove(config_of(photos), None, photos, tensors=tmp_path / "bad.npy", **options)
    assert [d.step for d in proof.differences] == ["channels"] or "channels" in {d.step for d in proof.differences}
    unknown = prove(config_of(photos), None, photos, tensors=tmp_path / "good.npy", progress=False)
    assert "zero point 3" in str(unknown)


def test_other_sizes_constant_tensors_and_failing_images_are_named(photos):
    def fails_on_one(path):
        if Path(path).stem == "1":
            raise ValueError("no such orientation")
        return whole()(path)

    def reason(transform):
        return str(prove(config_of(photos), transform, photos, progress=False, probes=False).differences[0])

    assert reason(lambda path: np.zeros((1, 3, 32, 32))).startswith("size of the tensor: [1, 3, 32, 32]")
    assert "every value of 0.jpg is 7" in reason(lambda path: np.full((1, 3, H, W), 7))
    assert "on 1.jpg: ValueError: no such orientation" in reason(fails_on_one)


def test_whatever_a_child_does_is_one_line(tmp_path):
    code = "import sys\ndef exits(path): sys.exit('bye')\ndef loud(path):\n    print('x' * 10**6)\n    return [1.0]\n"
    (tmp_path / "t.py").write_text(code)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    with DeployedTransform(f"{tmp_path}/t.py:loud") as transform:  # what it prints is no answer
        assert transform.from_file(tmp_path / "a.png").tolist() == 1.0
    with pytest.raises(InputError, match="exits: SystemExit: bye"), DeployedTransform(f"{tmp_path}/t.py:exits") as t:
        t.from_file(tmp_path / "a.png")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(InputError, match="SyntaxError"), DeployedTransform(f"{tmp_path}/broken.py:f"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_named_on_real_images(name, real_data):
    check(name, real_data / "coco" / "val", samples=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_an_equal_transform_raises_no_alarm_on_real_images(name, real_data):
    folder = real_data / "coco" / "val"
    assert prove(config_of(folder), EQUAL[name], folder, num_samples=12, progress=False).equal


@pytest.mark.slow
def test_the_price_in_face_verification_is_its_own_metric(real_data, tmp_path):
    from calib_nb.faces.detectors import FaceDetector
    from calib_nb.faces.task import make_pairs_task

    lines = (real_data / "lfw" / "pairsDevTest.txt").read_text().splitlines()
    (tmp_path / "pairs.txt").write_text("\n".join(["20", *lines[1:21], *lines[501:521]]) + "\n")
    (tmp_path / "images").symlink_to(real_data / "lfw" / "images")
    chain = Preprocess().convert_color("BGR2RGB").resize(112, 112).div(255).normalize([0.5] * 3, [0.5] * 3)
    chain = chain.transpose([2, 0, 1]).expand_dim(0)
    detector = FaceDetector("yunet", model=real_data / "models" / "face_detection_yunet_2023mar.onnx")
    model = real_data / "models" / "edgeface_xxs_q_dequant.onnx"
    cost = task_price(
        model,
        lambda preprocess: make_pairs_task(tmp_path / "pairs.txt", preprocess, detector),
        chain,
        lambda bgr: (chain(bgr) + 1) / 2 / 255 * 2 - 1,  # divided by 255 twice
        progress=False,
    )
    assert cost.config[0] > 0.9 and cost.deployment[0] < cost.config[0]

"""Checkpoints from anywhere: what is damaged, foreign or too large is refused in one line before it costs memory."""

import copy
import io
import resource
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CalibError, ModelError
from calib_nb.core.run import write_json
from calib_nb.depth.network import DepthNet
from calib_nb.depth.train import DepthTraining, load_network, train_depth
from calib_nb.nets.checkpoint import load_imagenet, read_checkpoint, restore_module, restore_training
from calib_nb.nets.resnet import resnet
from calib_nb.tags.config import TrainConfig
from calib_nb.tags.network import load_tagger
from calib_nb.tags.train import train_tagger

FEW, MANY, WHOLE = 50, 1000, 250  # the last for whole networks, which take half a second each


def coco_set(folder: Path, images: int = 4) -> Path:
    """Images of 32 pixels with one of two tags each, as COCO JSON."""
    (folder / "images").mkdir(parents=True)
    for k in range(images):
        cv2.imwrite(str(folder / f"images/{k}.png"), np.full((32, 32, 3), 60 * k, np.uint8))
    data = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(images)],
        "annotations": [{"id": k, "image_id": k, "category_id": k % 2} for k in range(images)],
        "categories": [{"id": 0, "name": "dark"}, {"id": 1, "name": "bright"}],
    }
    return write_json(folder / "instances.json", data)


class Pairs:
    """Two frames of 32 pixels, as depth training wants them."""

    def __len__(self):
        return 2

    def __getitem__(self, k):
        return np.full((3, 32, 32), 0.5, np.float32), np.full((32, 32), 2.0 + k, np.float32)


@pytest.fixture(scope="module")
def tagging(tmp_path_factory):
    """A finished training of one epoch, and its settings."""
    folder = tmp_path_factory.mktemp("tagging")
    config = TrainConfig(
        train=coco_set(folder), val=folder / "instances.json", output=folder / "run", width=1, size=32, epochs=1
    )
    config = config.model_copy(update={"batch": 4, "workers": 0, "tensorboard": False})
    return config, train_tagger(config, progress=False).last


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    """A folder with the checkpoint of a depth training of one epoch."""
    folder = tmp_path_factory.mktemp("depth")
    train_depth(DepthNet(0.01), Pairs(), DepthTraining(epochs=1, batch=2), folder=folder, progress=False)
    return folder / "checkpoint.pt"


def resume_tagging(config, path: Path) -> None:
    train_tagger(config.model_copy(update={"epochs": 1}), resume=path, progress=False)


def resume_depth(path: Path) -> None:
    train_depth(
        DepthNet(0.01), Pairs(), DepthTraining(epochs=1, batch=2), folder=path.parent, resume=True, progress=False
    )


def places(content, at=()):
    """Every place in a nested dict or list."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(content: dict, place: tuple, value: object) -> dict:
    """A copy with another value at a place; "gone" takes it away."""
    part = new = copy.deepcopy(content)
    for key in place[:-1]:
        part = part[key]
    if isinstance(value, str) and value == "gone":
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return new


JUNK = ["gone", None, "one", -1, 10**30, float("nan"), [], {}, [None], {"a": {"b": 1}}, b"x", True, (1, 2), {3}]
JUNK += [torch.zeros(3), torch.zeros(()), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2).to_sparse()]


def one_line(error: CalibError) -> None:
    assert len(str(error)) < 2000 and "\n" not in str(error) and str(error)


def junk_never_escapes(content: dict, resume, path: Path, examples: int) -> None:
    """Any junk at any place of a checkpoint is loaded or refused with an error of ours."""
    every = list(places(content))

    @settings(max_examples=examples)
    @given(place=st.sampled_from(every), value=st.integers(0, len(JUNK) - 1))
    def check(place, value):
        torch.save(changed(content, place, JUNK[value]), path)
        try:
            resume(path)
        except CalibError as e:
            one_line(e)

    check()


def small_training() -> tuple:
    """A module of two weights, its optimizer after one step, and a scaler."""
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer, torch.amp.GradScaler("cpu", enabled=True)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_junk_in_a_small_checkpoint_is_one_line(tmp_path, examples):
    module, optimizer, scaler = small_training()
    states = {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "history": [{"epoch": 0, "loss": 1.0}],
    }
    content = {"weights": module.state_dict(), **states}

    def resume(path):
        found = read_checkpoint(path)
        restore_module(lambda: torch.nn.Linear(2, 1), found.get("weights"), path)
        new, optimizer, scaler = small_training()
        restore_training(found, path, optimizer, scaler, columns=("epoch", "loss"))
        optimizer.step()  # what was loaded serves a step

    junk_never_escapes(content, resume, tmp_path / "last.pth", examples)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None},
        {"state": []},
        {"history": [{"epoch": "x"}]},
        {"optimizer": {}},
        {"config": 3},
        {"lsq": {"bits": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tagging_training_does_not_resume_from_another_kind(tagging, tmp_path, change):
    config, last = tagging
    torch.save(read_checkpoint(last) | change, tmp_path / "last.pth")
    with pytest.raises(ModelError) as refused:
        resume_tagging(config, tmp_path / "last.pth")
        load_tagger(tmp_path / "last.pth")
    one_line(refused.value)


@pytest.mark.parametrize(
    "change",
    [{"network": None}, {"weights": []}, {"history": 5}, {"optimizer": {}}, {"training": 3}, {"scaler": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_depth_training_does_not_resume_from_another_kind(depth, tmp_path, change):
    torch.save(read_checkpoint(depth) | change, tmp_path / "checkpoint.pt")
    with pytest.raises(ModelError) as refused:
        resume_depth(tmp_path / "checkpoint.pt")
    one_line(refused.value)


def test_a_whole_checkpoint_still_resumes(tagging, depth, tmp_path):
    config, last = tagging
    resume_tagging(config.model_copy(update={"output": tmp_path / "run"}), last)
    resume_depth(depth)
    assert load_network(depth).settings["width"] == 0.01


@pytest.mark.slow
def test_junk_in_a_tagging_checkpoint_is_one_line(tagging, tmp_path):
    config, last = tagging
    junk_never_escapes(read_checkpoint(last), lambda path: resume_tagging(config, path), tmp_path / "last.pth", WHOLE)


@pytest.mark.slow
def test_junk_in_a_depth_checkpoint_is_one_line(depth, tmp_path):
    junk_never_escapes(read_checkpoint(depth), resume_depth, tmp_path / "checkpoint.pt", WHOLE)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "2019"])
@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damaged_bytes_are_one_line(tmp_path, examples, old):
    stream = io.BytesIO()
    content = {"weight": torch.arange(6.0), "more": [1, "two", {"three": (3.0, None)}]}
    torch.save(content, stream, _use_new_zipfile_serialization=not old)
    whole = stream.getvalue()

    @settings(max_examples=examples)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
    def check(edits, data):
        damaged = bytearray(whole)
        for at, byte in edits:
            damaged[at] = byte
        (tmp_path / "x.pth").write_bytes(damaged[: data.draw(st.integers(0, len(whole)))])
        try:
            read_checkpoint(tmp_path / "x.pth")
        except ModelError as e:
            one_line(e)

    check()


def zip_of_zeros(path: Path, megabytes: int) -> Path:
    """A torch file whose storage is zeros, packed a thousand times."""
    torch.save({"w": torch.zeros(4)}, stream := io.BytesIO())
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as record:
                if entry.filename.endswith("data/0"):
                    for _ in range(megabytes):
                        record.write(bytes(2**20))
                else:
                    record.write(old.read(entry))
    return path


def test_memory_is_bounded_before_anything_is_loaded(tmp_path):
    path = zip_of_zeros(tmp_path / "zeros.pth", 120)
    assert path.stat().st_size < 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="asks for more memory"):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kilobytes


def test_a_settings_width_allocates_nothing(tagging, depth, tmp_path):
    content = read_checkpoint(tagging[1])
    torch.save(content | {"spec": content["spec"] | {"width": 10**7}}, tmp_path / "wide.pth")
    with pytest.raises(ModelError, match="differ: conv1.weight is .* and should be .10000000, 3"):
        load_tagger(tmp_path / "wide.pth")
    content = read_checkpoint(depth)
    torch.save(content | {"network": content["network"] | {"width": 4.0}}, tmp_path / "wide.pt")
    with pytest.raises(ModelError, match="differ: encoder.conv1.weight"):
        load_network(tmp_path / "wide.pt")


def bomb(levels: int):
    """Two references to two references and so on."""
    value = "x"
    for _ in range(levels):
        value = [value, value]
    return value


class Call:
    """A call in a pickle."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        {"a": bomb(60)},
        {"a": Call(bytearray, 10**9)},
        {"a": Call(torch.Tensor, 10**9)},
        {"a": Call(torch._tensor._rebuild_from_type_v2, bytearray, bytearray, (10**9,), {})},
    ],
    ids=["nested", "bytearray", "tensor", "rebuilt"],
)
def test_a_small_pickle_cannot_ask_for_much(tmp_path, content):
    torch.save(content, tmp_path / "bomb.pth")
    with pytest.raises(ModelError, match="asks for more memory or time"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_a_key_of_nested_tuples_is_not_hashed(tmp_path):
    key = b"(" + b"".join([b"K\x01\x85q\x00"] + [b"h\x00h\x00\x86q\x00" for _ in range(60)])
    data = b"\x80\x02}q\x01" + key[1:] + b"K\x01s."
    with zipfile.ZipFile(tmp_path / "key.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ModelError, match="asks for more memory or time"):
        read_checkpoint(tmp_path / "key.pth")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "2019"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_torch_saves_is_still_read(tmp_path, old):
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    base = torch.arange(12.0).reshape(3, 4)
    content = {str(kind): torch.ones(3).to(kind) for kind in kinds}
    content |= {"view": base.t(), "part": base[1:2], "sparse": base.to_sparse(), "parameter": torch.nn.Parameter(base)}
    content |= {"bytes": b"abc", "array": bytearray(b"abc"), "set": {1, 2}, "size": base.shape, "empty": torch.zeros(0)}
    content |= {"quantized": torch.quantize_per_tensor(base, 0.1, 0, torch.qint8)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    found = read_checkpoint(tmp_path / "x.pth")
    assert list(found) == list(content) and torch.equal(found["view"], base.t()) and found["array"] == b"abc"
    assert torch.equal(found["quantized"].dequantize(), content["quantized"].dequantize())


def test_imagenet_weights_of_another_layout_are_one_line(tmp_path):
    module = resnet("resnet18", 3, width=1)
    torch.save(module.state_dict() | {"conv1.weight": torch.zeros(1, 3, 7, 7).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(ModelError) as refused:
        load_imagenet(module, tmp_path / "x.pth")
    one_line(refused.value)

"""Depth maps in another unit, networks that give no depth, and trainings without any: said, or one line."""

import logging

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from calib_nb.commands.depth_model import app
from calib_nb.core.errors import CheckFailed, InputError, ModelError
from calib_nb.core.run import write_json
from calib_nb.depth.frames import depth_task, read_frames
from calib_nb.depth.metadata import metadata, unit_note
from calib_nb.depth.metrics import require_depth_network, unit_doubt
from calib_nb.depth.network import DepthNet
from calib_nb.depth.predict import score_maps
from calib_nb.depth.train import DepthTraining, evaluate_network, train_depth
from calib_nb.graph.build import conv, linear, op, sequential

SIDE = 32


def ncdb(root, scale, *, frames=4, dtype=np.uint16, near=1.0, far=20.0):
    """Frames of a slope whose depth maps count `scale` per metre."""
    entries = []
    for k in range(frames):
        scene = root / f"synced_data/scene_{k}"
        for part in ("image_a6", "newest_depth_maps"):
            (scene / part).mkdir(parents=True, exist_ok=True)
        depth = slope(k, near, far)
        cv2.imwrite(str(scene / "image_a6/a.png"), np.full((SIDE, SIDE, 3), 40 * k, np.uint8))
        cv2.imwrite(str(scene / "newest_depth_maps/a.png"), np.round(depth * scale).astype(dtype))
        entries.append({"dataset_root": f"synced_data/scene_{k}", "new_filename": "a"})
    write_json(root / "val_split.json", entries)
    write_json(root / "train_split.json", entries)
    return root


def slope(k, near=1.0, far=20.0):
    return np.linspace(near, far * (k + 1) / 4, SIDE * SIDE).reshape(SIDE, SIDE)


def right_predictions(folder, frames=4, **depths):
    """Maps in metres, as another machine wrote them."""
    for k in range(frames):
        (folder / f"synced_data/scene_{k}").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"synced_data/scene_{k}/a.npy", slope(k, **depths).astype(np.float32))
    return folder


CASES = {  # name: numbers per metre, type, nearest and farthest depth, the option that the message proposes
    "millimetres": (1000, np.uint16, 1, 20, "try --depth-scale 1000 (millimetres)"),
    "centimetres": (100, np.uint16, 3, 20, "try --depth-scale 100 (centimetres)"),
    "8-bit": (10, np.uint8, 1, 20, "try --depth-scale 10"),
    "all below 256": (256, np.uint16, 0.1, 0.99, "try --depth-scale 256"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_right_network_on_maps_of_another_unit_is_said_and_stated(tmp_path, caplog, name):
    scale, dtype, near, far, advice = CASES[name]
    root = ncdb(tmp_path / "ncdb", scale, dtype=dtype, near=near, far=far)
    maps = right_predictions(tmp_path / "maps", near=near, far=far)
    with caplog.at_level(logging.WARNING):
        guessed = score_maps(maps, read_frames(root, "val_split.json"))
    assert guessed.metrics["abs_rel"] > 0.5 and advice in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        stated = score_maps(maps, read_frames(root, "val_split.json", scale=scale))
    assert stated.metrics["abs_rel"] < 0.05 and not caplog.text  # numbers are rounded: 5 cm at 10 per metre


def test_the_usual_unit_is_no_doubt(tmp_path, caplog):
    root = ncdb(tmp_path / "ncdb", 256)
    with caplog.at_level(logging.INFO):
        scores = score_maps(right_predictions(tmp_path / "maps"), read_frames(root, "val_split.json"))
    assert scores.metrics["abs_rel"] < 0.003
    assert [r.levelname for r in caplog.records if "numbers per metre" in r.message] == ["INFO"]


def test_a_wrong_network_is_not_taken_for_a_wrong_unit():
    import pandas as pd

    rng = np.random.default_rng(0)
    poor = {"abs_rel": np.full(20, 0.9), "abs_rel_scaled": np.full(20, 0.7), "ratio": np.full(20, 3.9)}
    mixed = {"abs_rel": np.full(20, 0.9), "abs_rel_scaled": np.full(20, 0.1), "ratio": rng.uniform(1, 9, 20)}
    good = {"abs_rel": np.full(20, 0.1), "abs_rel_scaled": np.full(20, 0.02), "ratio": np.full(20, 1.1)}
    assert not any(unit_doubt(pd.DataFrame(case), 256) for case in (poor, mixed, good))


def test_metadata_says_what_it_guessed(tmp_path):
    few = metadata(ncdb(tmp_path / "a", 10, dtype=np.uint8), progress=False)
    assert few.guesses == {1.0: 4} and unit_note(few)[1] and "no number above 255" in unit_note(few)[0]
    far = metadata(ncdb(tmp_path / "b", 1000, far=60), progress=False)
    assert far.guesses == {256.0: 4} and unit_note(far)[1] and "millimetres" in unit_note(far)[0]
    assert unit_note(metadata(tmp_path / "b", scale=1000, progress=False)) == ("", False)


def networks(folder):
    """A depth network that gives 5 m everywhere, and three that give none."""
    kinds = {
        "depth": sequential(conv(1, 1, weight=np.zeros((1, 3, 1, 1)), bias=False), op("Exp"), shape=(1, 3, SIDE, SIDE)),
        "classes": sequential(linear(10), shape=(1, 3, SIDE, SIDE)),
        "boxes": sequential(conv(16, 1), op("Transpose", "perm = [0, 2, 3, 1]"), shape=(1, 3, SIDE, SIDE)),
        "row": sequential(conv(1, 1), op("AveragePool", f"kernel_shape = [{SIDE}, 1]"), shape=(1, 3, SIDE, SIDE)),
    }
    for name, graph in kinds.items():
        graph.save(folder / f"{name}.onnx")
    return [folder / f"{name}.onnx" for name in kinds]


def shell(line):
    return CliRunner().invoke(app, line.split())


def test_what_gives_no_depth_is_refused_in_every_command(tmp_path):
    root, (depth, *others) = ncdb(tmp_path / "ncdb", 256), networks(tmp_path)
    require_depth_network(depth)
    for model in others:
        lines = (
            f"evaluate --model {model} --dataset-root {root}",
            f"compare --float {model} --int8 {model} --dataset-root {root}",
            f"infer --model {model} --images {root} --split-file val_split.json --output-dir {tmp_path / 'maps'}",
        )
        for line in lines:
            error = shell(line).exception
            assert isinstance(error, ModelError) and "is this a depth network?" in str(error), line
    assert not (tmp_path / "maps").exists()


def test_real_detectors_are_no_depth_networks(real_data):
    model = next((real_data / "models").glob("*yunet*.onnx"))
    with pytest.raises(ModelError, match="is this a depth network"):
        require_depth_network(model)


def test_a_float_network_that_is_bad_is_no_success(tmp_path):
    root, (depth, *_) = ncdb(tmp_path / "ncdb", 256), networks(tmp_path)
    line = f"compare --float {depth} --int8 {depth} --dataset-root {root}"
    result = shell(line)
    assert isinstance(result.exception, CheckFailed) and result.exception.exit_code == 1
    assert "the float network itself is bad" in str(result.exception) and "float" in result.output
    assert shell(f"{line} --good 90 --borderline 99").exit_code == 0


def test_compare_and_evaluate_take_the_scale(tmp_path):
    depth, *_ = networks(tmp_path)
    ncdb(tmp_path / "a", 256), ncdb(tmp_path / "b", 1000)
    results = [shell(f"evaluate --model {depth} --dataset-root {tmp_path / x}").stdout.splitlines()[1] for x in "ab"]
    stated = shell(f"evaluate --model {depth} --dataset-root {tmp_path / 'b'} --depth-scale 1000").stdout.splitlines()
    assert results[0] != results[1] and stated[1].split()[:3] == results[0].split()[:3]
    line = f"compare --float {depth} --int8 {depth} --dataset-root {tmp_path / 'b'} --depth-scale 1000"
    compared = shell(f"{line} --good 9 --borderline 9")
    assert compared.exit_code == 0 and stated[1].split()[2][:5] in compared.output


@pytest.mark.parametrize("scale", ["0", "-3", "nan", "inf"])
def test_a_scale_that_is_none_is_one_line(tmp_path, scale):
    root = ncdb(tmp_path / "ncdb", 256, frames=1)
    for command in ("evaluate --pred-dir x", "compare --float x --int8 x", "train --output-dir x --size 32 32"):
        error = shell(f"{command} --dataset-root {root} --depth-scale {scale}").exception
        assert isinstance(error, InputError) and "the depth scale is" in str(error), command


class Nothing:
    """Frames whose depth is 0 everywhere, but for a first of them that can be chosen."""

    def __init__(self, depth=0.0):
        self.depth = depth

    def __len__(self):
        return 2

    def __getitem__(self, k):
        return np.zeros((3, SIDE, SIDE), np.float32), np.full((SIDE, SIDE), self.depth, np.float32)


def test_frames_without_depth_train_and_score_nothing():
    plan = DepthTraining(epochs=1, batch=2)
    with pytest.raises(InputError, match="none of 2 frames has a depth to learn from"):
        train_depth(DepthNet(0.01), Nothing(), plan, progress=False)
    with pytest.raises(InputError, match="none of 2 frames has depth between"):
        train_depth(DepthNet(0.01), Nothing(3.0), plan, validation=Nothing(), progress=False)
    with pytest.raises(InputError, match="none of 0 frames"):
        evaluate_network(DepthNet(0.01), [])


def test_the_same_command_continues_its_run(tmp_path):
    root = ncdb(tmp_path / "ncdb", 256)
    line = f"train --dataset-root {root} --size 32 32 --width 0.01 --epochs 2 --batch 2 --output-dir"
    whole = shell(f"{line} {tmp_path / 'whole'}")
    assert whole.exit_code == 0, whole.exception

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        from calib_nb.depth import train

        epoch = train._epoch
        patch.setattr(train, "_epoch", lambda *a: stop() if a[2] == 1 else epoch(*a))
        assert shell(f"{line} {tmp_path / 'halved'}").exit_code != 0
    assert (tmp_path / "halved/checkpoint.pt").is_file() and not (tmp_path / "halved/history.csv").exists()
    again = shell(f"{line} {tmp_path / 'halved'}")
    assert again.exit_code == 0, again.exception
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("whole", "halved")]
    assert histories[0] == histories[1]
    other = shell(f"{line} {tmp_path / 'halved'} --learning-rate 0.5")
    assert isinstance(other.exception, InputError) and "is of another training" in str(other.exception)


def test_the_task_knows_how_its_maps_are_read(tmp_path):
    frames = read_frames(ncdb(tmp_path, 256), "val_split.json")
    assert depth_task(frames, None).depths.numbers_per_metre == 256

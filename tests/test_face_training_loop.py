"""The loop of face training: any number of processes, stopped at any moment, and refusals in one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import multiprocessing, nn

from calib_nb.core.errors import CalibError, InputError, ModelError
from calib_nb.nets.checkpoint import read_checkpoint
from calib_nb.nets.processes import Ranks, warmed
from calib_nb.training.loop import FaceTrainer, train_faces
from calib_nb.training.sets import load_faces
from calib_nb.training.settings import FaceTrainConfig

PEOPLE, PHOTOS = 9, 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of nine people of noise with four photos each, 32 pixels wide."""
    root, random = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for person in range(PEOPLE):
        (root / str(person)).mkdir()
        face = random.integers(0, 256, (8, 8, 3))
        for k in range(PHOTOS):
            photo = np.clip(face + random.normal(0, 20, face.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / str(person) / f"{k}.png"), cv2.resize(photo, (32, 32)))
    return root


def config(photos: Path, output: Path, **more) -> FaceTrainConfig:
    recipe = {"size": 32, "batch": 12, "epochs": 3, "workers": 0, "tensorboard": False, "scale": 16.0, "amp": "off"}
    return FaceTrainConfig(**{"train": photos, "output": output, "save_every": 1, "device": "cpu"} | recipe | more)


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 16))


class Stops(nn.Sequential):
    """A network that ends the process, or raises, at one of its batches."""

    def __init__(self, at: int, action):
        super().__init__(*tiny())
        self.at, self.action, self.calls = at, action, -1  # the first call asks for the length of an embedding

    def forward(self, x):
        self.calls += 1
        if self.calls > self.at:
            self.action()
        return super().forward(x)


def stop():
    raise KeyboardInterrupt


def one_rank(rank: int, world: int, port: int, settings: FaceTrainConfig, at: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train_faces(settings, module=Stops(at, lambda: os._exit(0)) if at else tiny(), progress=False)


def run_ranks(world: int, settings: FaceTrainConfig, at: int = 0) -> None:
    """Train in several processes of gloo; `at` is the batch at which all of them end without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(one_rank, (world, port, settings, at), world, start_method="fork")


def weights(folder: Path) -> dict:
    return {**torch.load(folder / "model.pt"), "head": read_checkpoint(folder / "last.pth")["head"]["weight"]}


def same(one: dict, two: dict, tolerance: float) -> bool:
    return all(torch.allclose(one[key], two[key], rtol=tolerance, atol=tolerance) for key in one)


HARD = {"loss": "magface", "rate": 0.5, "ema": 0.9, "accumulate": 1, "low_resolution": 0.3, "light": 0.3, "clip": 1.0}


def test_two_processes_that_are_stopped_go_on_as_one(photos, tmp_path, one_thread):
    whole = config(photos, tmp_path / "whole", **HARD)
    train_faces(whole, module=tiny(), progress=False)
    parts = config(photos, tmp_path / "parts", **HARD)
    run_ranks(2, parts, at=4)
    assert read_checkpoint(tmp_path / "parts/last.pth")["step"] == 4  # in the middle of the second epoch
    train_faces(parts, module=tiny(1), progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), 1e-5)
    assert not same(
        weights(tmp_path / "whole"),
        {"2.weight": tiny().state_dict()["2.weight"]}
        | {key: value + 1 for key, value in weights(tmp_path / "whole").items() if key != "2.weight"},
        1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_four_processes_go_on_as_three(photos, tmp_path, one_thread, optimizer):
    settings = HARD | {"optimizer": optimizer, "learning_rate": 0.01, "loss": "adaface"}
    train_faces(config(photos, tmp_path / "whole", **settings), module=tiny(), progress=False)
    run_ranks(4, config(photos, tmp_path / "parts", **settings), at=5)
    run_ranks(3, config(photos, tmp_path / "parts", **settings))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), 2e-5)


def test_a_stop_in_the_middle_changes_no_bit(photos, tmp_path, one_thread):
    more = HARD | {"optimizer": "sgd", "learning_rate": 0.05, "accumulate": 2}
    train_faces(config(photos, tmp_path / "whole", **more), module=tiny(), progress=False)
    for at in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            train_faces(config(photos, tmp_path / "parts", **more), module=Stops(at, stop), progress=False)
    train_faces(config(photos, tmp_path / "parts", **more), module=tiny(2), progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), 0)
    columns = ["epoch", "loss", "learning_rate"]
    one, two = (pd.read_csv(tmp_path / name / "history.csv")[columns] for name in ("whole", "parts"))
    assert one.equals(two)


@pytest.mark.slow
def test_kill_9_changes_no_bit(photos, tmp_path):
    command = [sys.executable, "-m", "calib_nb", "faces", "train", f"train={photos}", "size=32", "batch=12"]
    command += ["epochs=4", "workers=1", "tensorboard=false", "save_every=1", "ema=0.9", "rate=0.5", "loss=adaface"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"output={tmp_path}/whole"], check=True, env=environment, capture_output=True)
    for _ in range(2):
        run = subprocess.Popen([*command, f"output={tmp_path}/parts"], env=environment, stderr=subprocess.DEVNULL)
        last, before = tmp_path / "parts/last.pth", time.time()
        old = last.stat().st_mtime_ns if last.exists() else 0
        while time.time() < before + 120 and (not last.exists() or last.stat().st_mtime_ns == old):
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
    step = read_checkpoint(tmp_path / "parts/last.pth")["step"]
    assert 0 < step < 12
    subprocess.run([*command, f"output={tmp_path}/parts"], check=True, env=environment, capture_output=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"), 0)


def test_a_batch_in_pieces_is_the_batch(photos, tmp_path, one_thread):
    results = []
    for accumulate in (1, 2, 3):
        settings = config(photos, tmp_path, rate=0.5, accumulate=accumulate, optimizer="sgd", clip=0.5)
        trainer = FaceTrainer(settings, tiny(), load_faces(photos), Ranks(0, 1, "cpu"))
        pieces = iter(trainer.loader)
        losses = [trainer.take_step(pieces) for _ in range(3)]
        results.append((losses, trainer.weights()["2.weight"], trainer.head.weight.detach()))
    for losses, *tensors in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors, results[0][1:]))


def test_bad_gradients_name_step_and_photos(photos, tmp_path, one_thread):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, slope):
            return slope * float("inf")

    class Network(nn.Sequential):
        def forward(self, x):
            return Steep.apply(super().forward(x))

    trainer = FaceTrainer(config(photos, tmp_path), Network(*tiny()), load_faces(photos), Ranks(0, 1, "cpu"))
    with pytest.raises(CalibError, match=r"the gradient is not finite, .* step 0, photos \d.png") as fault:
        trainer.take_step(iter(trainer.loader))
    assert fault.value.exit_code == 1 and "\n" not in str(fault.value)


def test_what_does_not_fit_is_one_line(photos, tmp_path, one_thread):
    folder = tmp_path / "run"
    train_faces(config(photos, folder, epochs=1), module=tiny(), progress=False)
    with pytest.raises(InputError, match="was trained with epochs=1; expected epochs=2"):
        train_faces(config(photos, folder, epochs=2), module=tiny(), progress=False)
    torch.save({"state": {}}, folder / "last.pth")
    with pytest.raises(ModelError, match="holds no face training"):
        train_faces(config(photos, folder, epochs=1), module=tiny(), progress=False)
    with pytest.raises(InputError, match="a batch of 12 for 1 processes and 5 pieces"):
        train_faces(config(photos, tmp_path / "x", accumulate=5), module=tiny(), progress=False)
    with pytest.raises(CalibError, match="aligned faces of 64 x 64"):
        train_faces(
            config(photos, tmp_path / "y", size=64),
            module=nn.Sequential(nn.AvgPool2d(8), *list(tiny())[1:]),
            progress=False,
        )


@pytest.mark.parametrize("place", ["step", "total", "head", "mean", "state", "config", "people", "random", "optimizer"])
@pytest.mark.parametrize(
    "junk",
    [None, "one"] + [pytest.param(j, marks=pytest.mark.slow) for j in (-1.5, -2, [], {"a": 1}, torch.zeros(2))],
)
def test_junk_in_a_checkpoint_is_one_line(photos, tmp_path_factory, one_thread, place, junk):
    folder = tmp_path_factory.getbasetemp() / "junk"
    settings = config(photos, folder, epochs=1, ema=0.9)
    if not (folder / "good.pth").exists():
        train_faces(settings, module=tiny(), progress=False)
        (folder / "last.pth").rename(folder / "good.pth")
    torch.save(read_checkpoint(folder / "good.pth") | {place: junk}, folder / "last.pth")
    try:
        train_faces(settings, module=tiny(), progress=False)
    except CalibError as fault:
        assert "\n" not in str(fault)


def test_the_learning_rate_counts_steps_of_the_optimizer(photos, tmp_path, one_thread):
    settings = config(photos, tmp_path, accumulate=2, warmup=2, course="cosine", learning_rate=0.1)
    trainer = FaceTrainer(settings, tiny(), load_faces(photos), Ranks(0, 1, "cpu"))
    pieces, rates = iter(trainer.loader), []
    for _ in range(3):
        trainer.take_step(pieces)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates == [warmed("cosine", 0.1, k, 9, 2) for k in range(3)] and rates[2] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"gradient_checkpointing": True}, {"optimizer": "sgd"}])
def test_options_of_a_real_network(photos, tmp_path, one_thread, options):
    settings = config(photos, tmp_path, batch=4, **options)
    from calib_nb.faces.edgeface import edgeface

    faces, ranks = load_faces(photos), Ranks(0, 1, "cpu")
    plain = FaceTrainer(config(photos, tmp_path, batch=4), edgeface("xxs"), faces, ranks)
    other = FaceTrainer(settings, edgeface("xxs"), faces, ranks)
    losses = [trainer.take_step(iter(trainer.loader)) for trainer in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if "amp" in options else 1e-6)
    key = "model.head.fc.weight"
    slopes = [dict(t.module.named_parameters())[key].grad for t in (plain, other)]
    assert torch.cosine_similarity(slopes[0].flatten(), slopes[1].flatten(), dim=0) > 0.98

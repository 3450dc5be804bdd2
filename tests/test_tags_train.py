"""Training as a process: killed and resumed, in two processes, in mixed precision; its commands; a broken download."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch

from calib_nb.core.errors import CheckFailed, InputError
from calib_nb.nets.checkpoint import read_checkpoint
from calib_nb.tags.config import load_train_config
from calib_nb.tags.demo_drawings import tagged_images
from calib_nb.tags.download import Archive, download_coco
from calib_nb.tags.network import TaggerSpec, build_tagger, load_tagger
from calib_nb.tags.train import checkpoint_config, resumable, train_tagger

SCRIPT = "import sys; from calib_nb.cli import main; sys.exit(main())"
ENV = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tagged_images(tmp_path_factory.mktemp("photos") / "set", 72, size=40, classes=3, seed=9)


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(photos, output, **more):
    recipe = (
        dict(train=photos, output=output, width=8, size=32, batch=16, epochs=3, workers=0, tensorboard=False) | more
    )
    return [f"{k}={v}" for k, v in recipe.items()]


def run(photos, output, module=None, **more):
    return train_tagger(load_train_config(None, settings(photos, output, **more)), module=module, progress=False)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    torch.set_num_threads(1)
    return run(photos, tmp_path_factory.mktemp("whole") / "run")


def losses(history):
    return history[["epoch", "train_loss", "val_map"]].to_numpy()


def test_a_killed_training_ends_as_if_nothing_had_been(photos, whole, tmp_path):
    (tmp_path / "c.yaml").write_text("\n".join(s.replace("=", ": ", 1) for s in settings(photos, tmp_path / "run")))
    words = ["tags", "train", "--config", tmp_path / "c.yaml"]
    process = forked.start_script(SCRIPT, *words, env=ENV)
    until = time.monotonic() + 120
    while not (tmp_path / "run/history.csv").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    forked.kill(process)
    done = read_checkpoint(tmp_path / "run/last.pth")["epoch"]  # whole, whenever the kill came
    assert 1 <= done <= 3
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    again = forked.calib_nb(*words, env=ENV)
    assert again.returncode == 0 and "best: " in again.stdout, again.stderr
    assert np.array_equal(
        losses(pd.read_csv(tmp_path / "run/history.csv")), losses(pd.read_csv(whole.folder / "history.csv"))
    )
    elsewhere = train_tagger(
        load_train_config(None, settings(photos, tmp_path / "elsewhere")),
        resume=tmp_path / "moved/last.pth",
        progress=False,
    )
    on = train_tagger(
        checkpoint_config(tmp_path / "moved/last.pth"), progress=False
    )  # in its own folder, wherever that is now
    one, *others = (
        load_tagger(p)[0].state_dict() for p in (whole.last, tmp_path / "run/last.pth", elsewhere.last, on.last)
    )
    assert all(torch.equal(one[k], other[k]) for other in others for k in one)
    assert (
        on.folder == tmp_path / "moved"
        and read_checkpoint(elsewhere.best)["epoch"] == read_checkpoint(whole.best)["epoch"]
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.endswith(".tmp")) == [
        "best.pth",
        "config.yaml",
        "history.csv",
        "last.pth",
    ]


def by_torchrun(words: list, folder: Path) -> str:
    (folder / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "script.py", *words]
    done = subprocess.run([sys.executable, *map(str, command)], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def by_its_variables(words: list, folder: Path) -> str:
    """Two processes with the environment that torchrun gives; starting it takes longer than they do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outputs, processes = [folder / "0", folder / "1"], []
    for rank, output in enumerate(outputs):
        output.mkdir()
        environment = ENV | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(forked.start_script(SCRIPT, *words, env=environment, output=output))
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0], (outputs[0] / "2").read_text()[-2000:]
    return "".join((output / "1").read_text() for output in outputs)


@pytest.mark.parametrize("started_together", [by_its_variables, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does_in_two_pieces(started_together, photos, tmp_path):
    one = run(photos, tmp_path / "one", accumulate=2, epochs=2)
    (tmp_path / "c.yaml").write_text("")  # everything else stands on the command line
    words = ["tags", "train", "--config", tmp_path / "c.yaml"]
    words += settings(photos, tmp_path / "two", epochs=2, device="cpu")
    said = started_together(words, tmp_path)
    two = pd.read_csv(tmp_path / "two/history.csv")
    assert np.allclose(two.train_loss, one.history.train_loss, rtol=1e-4) and said.count("best: ") == 1
    halves, whole = (load_tagger(tmp_path / f"{n}/last.pth")[0].conv1.weight for n in ("two", "one"))
    assert torch.allclose(halves, whole, atol=1e-3)


def test_mixed_precision_is_near_full_precision(photos, tmp_path):
    full, half = (run(photos, tmp_path / amp, amp=amp, epochs=1) for amp in ("off", "bf16"))
    assert (
        full.history.train_loss[0] != half.history.train_loss[0] == pytest.approx(full.history.train_loss[0], rel=0.1)
    )
    assert load_tagger(half.last)[0].conv1.weight.dtype == torch.float32


def test_workers_change_nothing(photos, whole, tmp_path):
    assert np.array_equal(losses(run(photos, tmp_path / "run", workers=2).history), losses(whole.history))


def test_a_checkpoint_from_before_a_setting_goes_on(photos, whole, tmp_path):
    older = torch.load(whole.last, weights_only=True)
    del older["config"]["decode"], older["config"]["cache_gb"]
    torch.save(older, tmp_path / "last.pth")
    config = checkpoint_config(tmp_path / "last.pth")
    assert config.decode == "auto" and resumable(tmp_path / "last.pth", config)["epoch"] == 3
    with pytest.raises(InputError, match="decode"):
        resumable(tmp_path / "last.pth", config.model_copy(update={"decode": "reduced"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_is_a_wish_and_with_a_mark_a_condition(photos, whole, tmp_path):
    wished = run(photos, tmp_path / "wished", device="cuda")
    assert np.array_equal(losses(wished.history), losses(whole.history))
    with pytest.raises(InputError, match="device 'cuda!' cannot be used: torch finds no CUDA"):
        run(photos, tmp_path / "held", device="cuda!")


def test_tensorboard_holds_the_losses(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(photos, tmp_path / "run", tensorboard="true", epochs=2)
    events = EventAccumulator(str(done.folder / "tensorboard"))
    events.Reload()
    steps, epochs = (events.Scalars(name) for name in ("train/loss", "epoch/val_map"))
    assert [e.step for e in steps] == list(range(8)) and np.allclose([e.value for e in epochs], done.history.val_map)
    assert np.isclose(np.mean([e.value for e in steps[:4]]), done.history.train_loss[0])


@pytest.mark.parametrize("loss", ["focal", "asymmetric"])
def test_the_other_losses_learn(photos, tmp_path, loss):
    history = run(photos, tmp_path / loss, loss=loss, epochs=4, jitter=0).history
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]


def test_pretrained_weights_are_where_it_starts(photos, tmp_path):
    torch.manual_seed(5)
    published = build_tagger(TaggerSpec("resnet18", tuple(map(str, range(1000))), width=8))
    torch.save(published.state_dict(), tmp_path / "imagenet.pth")
    done = run(
        photos, tmp_path / "run", weights=tmp_path / "imagenet.pth", learning_rate=1e-12, weight_decay=0, epochs=1
    )
    assert torch.allclose(load_tagger(done.last)[0].layer3[0].conv1.weight, published.layer3[0].conv1.weight, atol=1e-6)


def test_a_given_module_is_trained(photos, tmp_path):
    own = build_tagger(TaggerSpec("resnet18", ("a", "b", "c"), width=8))
    before = own.conv1.weight.clone()
    run(photos, tmp_path / "run", module=own, epochs=1)
    assert not torch.equal(own.conv1.weight, before)


def test_a_loss_that_is_no_number_names_the_batch(photos, whole, tmp_path):
    class Broken(torch.nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.inside = build_tagger(TaggerSpec("resnet18", ("a", "b", "c"), width=8))

        def forward(self, x):
            if self.training:
                self.calls += 1
            return self.inside(x) * (float("nan") if self.calls == 6 else 1)

    with pytest.raises(CheckFailed, match=r"the loss is nan in epoch 2, batch 2 of 4, images \d+\.jpg, .* and 8 more"):
        run(photos, tmp_path / "run", module=Broken())
    assert read_checkpoint(tmp_path / "run/last.pth")["epoch"] == 1


def test_the_best_epoch_is_kept(photos, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr("calib_nb.tags.train.tag_map", lambda *_: next(scores))
    done = run(photos, tmp_path / "run")
    assert (
        read_checkpoint(done.best)["epoch"] == 2
        and read_checkpoint(done.last)["epoch"] == 3
        and list(done.history.val_map) == [0.2, 0.9, 0.5]
    )
    assert "optimizer" not in read_checkpoint(done.best) and done.best.stat().st_size < 0.7 * done.last.stat().st_size


def test_impossible_batches_are_refused(photos, tmp_path):
    for more in ({"batch": 100}, {"accumulate": 3}):
        with pytest.raises(InputError, match="expected at least one whole batch"):
            run(photos, tmp_path / "run", **more)


# The command line.


def shell(*arguments, cwd=None):
    return forked.calib_nb(*arguments, cwd=cwd, env=ENV)


def test_help_teaches_and_loads_nothing_heavy():
    commands = [f"tags {command}".strip() for command in ("", "train", "evaluate", "predict", "download")]
    for command, (status, text, loaded) in forked.helps(*commands).items():
        assert (status, loaded) == (0, []), f"{command}: {text[-300:]}"
        assert "Usage:" in text and ("Example" in text or command == "tags")


def test_bad_input_is_one_line(photos, whole, tmp_path):
    for arguments, named in (
        (["train", "--modle", "resnet18"], "calib-nb tags train --help"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["train", "--resume", "none.pth"], "none.pth"),
        (["evaluate", "--checkpoint", whole.best, "--coco", "none.json"], "none.json"),
        (["predict", "none.jpg", "--onnx", "none.onnx"], "none.onnx"),
    ):
        done = shell("tags", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_scored_and_asked(photos, whole):
    done = shell("tags", "evaluate", "--checkpoint", whole.best, "--coco", photos)
    assert done.returncode == 0 and "mAP" in done.stdout and "best threshold" in done.stdout, done.stderr
    done = shell("tags", "predict", photos.parent / "images/000001.jpg", "--checkpoint", whole.best, "--threshold", "0")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4


# The download.


class Breaking(SimpleHTTPRequestHandler):
    """Sends at most 150,000 bytes per request."""

    def do_GET(self):
        with open(f"{self.directory}{self.path}", "rb") as f:
            data = f.read()
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first:][:150_000])

    def log_message(self, *_):
        pass


def test_a_download_is_resumed_and_a_damaged_part_does_not_last(tmp_path):
    source = tmp_path / "server"
    source.mkdir()
    with zipfile.ZipFile(source / "val2017.zip", "w") as z:
        for k in range(4):
            z.writestr(f"val2017/{k}.jpg", np.random.default_rng(k).bytes(90_000))
    data = (source / "val2017.zip").read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Breaking, directory=str(source))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        archive = Archive(
            f"http://127.0.0.1:{server.server_port}/val2017.zip",
            len(data),
            "sha256:" + sha256(data).hexdigest(),
            "val2017",
        )
        dest = tmp_path / "coco"
        dest.mkdir()
        (dest / "val2017.zip.part").write_bytes(b"x" * 100_000)  # what arrived once was not right
        with pytest.raises(InputError, match="not the file that was published"):
            download_coco(dest, archives=[archive], progress=False)
        assert not list(dest.iterdir())
        assert download_coco(dest, archives=[archive], progress=False) == [dest / "val2017"]
        server.shutdown()
    assert (
        sorted(p.name for p in dest.rglob("*.jpg")) == [f"{k}.jpg" for k in range(4)]
        and sum(p.stat().st_size for p in dest.rglob("*.jpg")) == 360_000
    )

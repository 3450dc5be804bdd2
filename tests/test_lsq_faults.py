"""LSQ where it is fragile: a step of exactly 0, integer targets, and one YAML for the float run and for LSQ."""

import copy

import numpy as np
import pytest
import torch
from test_checkpoints import coco_set
from torch import nn

from calib_nb.graph.contract import open_session
from calib_nb.nets.checkpoint import read_checkpoint
from calib_nb.nets.convert import convert_onnx, round_biases
from calib_nb.nets.lsq import lsq, prepare_lsq, quantizers, step_size
from calib_nb.tags.config import TrainConfig
from calib_nb.tags.export import export_checkpoint
from calib_nb.tags.losses import TAG_LOSSES
from calib_nb.tags.qat import QatConfig, train_qat
from calib_nb.tags.train import train_tagger

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-30, 5e-324])
def test_a_step_of_nothing_gives_numbers_and_a_way_out(dtype, value):
    step = torch.tensor(value, dtype=dtype, requires_grad=True)
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    y = lsq(x, step, -128, 127, count=3)
    (y - x.detach()).pow(2).sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and step.grad.isfinite() and step.grad != 0


def test_other_steps_are_rounded_as_before():
    x, steps = torch.randn(64), torch.tensor([0.5, -0.25, 1e-3, 7.0])
    for step in steps:
        ratio = torch.clamp(x / step.abs(), -128, 127)
        assert torch.equal(lsq(x, step, -128, 127, 1), torch.round(ratio) * step.abs())
    assert torch.equal(step_size(steps), steps.abs())


@pytest.mark.parametrize("weights", [False, True], ids=["activation", "weight"])
def test_a_network_with_a_step_of_zero_trains_and_exports(tmp_path, weights):
    torch.manual_seed(0)
    images, (conv, relu) = torch.randn(2, 3, 8, 8), (nn.Conv2d, nn.ReLU)
    layers = [conv(3, 4, 3), relu(), conv(4, 4, 3), relu(), conv(4, 4, 3), relu(), nn.Flatten(), nn.Linear(16, 3)]
    module = prepare_lsq(nn.Sequential(*layers).eval(), images)
    list(quantizers(module, weights=weights))[1][1].step.data.zero_()
    trained = copy.deepcopy(module).train()
    torch.nn.functional.mse_loss(trained(images), torch.ones(2, 3)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())
    rounded = round_biases(module)
    with torch.no_grad():
        wanted = rounded(images).numpy()
    convert_onnx(rounded, tmp_path / "net.onnx", 8)
    session = open_session(tmp_path / "net.onnx")
    outputs = np.concatenate([session.run(None, {"input": x[None].numpy()})[0] for x in images])
    assert np.isfinite(wanted).all() and np.allclose(outputs, wanted, atol=1e-4)


@pytest.mark.parametrize("loss", TAG_LOSSES.values(), ids=TAG_LOSSES)
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64])
def test_targets_of_any_kind_give_one_loss(loss, kind):
    logits, targets = torch.tensor([[1.5, -0.5], [0.2, -3.0]]), torch.tensor([[1, 0], [0, 1]])
    assert loss(logits, targets.to(kind)).item() == pytest.approx(loss(logits, targets.float()).item(), rel=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A float training and an LSQ training by the same settings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    common = dict(train=coco_set(folder), val=folder / "instances.json", output=folder / "run", width=2, size=32)
    common |= dict(epochs=1, batch=4, workers=0, tensorboard=False)
    real = train_tagger(TrainConfig(**common), progress=False)
    before = {p.name: p.read_bytes() for p in real.folder.iterdir()}
    return common, before, real, train_qat(QatConfig(checkpoint=real.best, **common), progress=False)


def test_one_yaml_serves_both_trainings(runs):
    common, before, real, rounded = runs
    assert rounded.folder == real.folder / "qat" and "lsq" in read_checkpoint(rounded.last)
    assert all((real.folder / name).read_bytes() == content for name, content in before.items())
    again = train_qat(QatConfig(checkpoint=real.best, **common), progress=False)
    assert again.folder == rounded.folder and again.history.equals(rounded.history)


@pytest.mark.slow
def test_what_train_qat_wrote_is_exported(runs, tmp_path):
    pytest.importorskip("executorch")
    for checkpoint in (runs[3].best, runs[3].last):
        done = export_checkpoint(checkpoint, tmp_path, mode="qat")
        assert 0 <= done.difference <= done.tolerance

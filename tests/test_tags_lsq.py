"""LSQ: the paper's gradient, the order of bits, and files of integers that compute what the training computed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from calib_nb.core.errors import InputError, ModelError
from calib_nb.graph.contract import open_session
from calib_nb.nets.convert import convert_onnx, output_steps, plain_network, round_biases
from calib_nb.nets.lsq import LsqQuantizer, initial_step, levels, lsq, prepare_lsq, quantizers
from calib_nb.nets.resnet import fold_batchnorm, resnet
from calib_nb.tags.config import load_train_config
from calib_nb.tags.demo_drawings import tagged_images
from calib_nb.tags.network import load_tagger
from calib_nb.tags.qat import QatConfig, train_qat
from calib_nb.tags.train import Trainer, train_tagger

pytestmark = pytest.mark.usefixtures("one_thread")


def network(name="resnet18", width=8):
    torch.manual_seed(0)
    made = resnet(name, 3, width=width).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.2, 0.4)
            module.bias.data.normal_(0, 0.1)
    return made


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(0.05, 4),
    st.integers(2, 8),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_gradients_are_the_papers(values, step, bits, signed):
    lowest, highest = levels(bits, signed)
    v, s = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True),
        torch.tensor(step, dtype=torch.float64, requires_grad=True),
    )
    out = lsq(v, s, lowest, highest, count=len(values))
    out.sum().backward()
    wanted = 0.0
    for k, value in enumerate(values):
        ratio = value / step
        assume(abs(ratio % 1 - 0.5) > 1e-9)  # halfway, the last bit of the division decides
        inside = lowest <= ratio <= highest
        wanted += np.rint(ratio) - ratio if inside else (lowest if ratio < lowest else highest)
        assert math.isclose(out[k].item(), float(np.clip(np.rint(ratio), lowest, highest)) * step, abs_tol=1e-9)
        assert v.grad[k] == (1 if inside else 0)
    assert math.isclose(s.grad.item(), wanted / math.sqrt(len(values) * highest), rel_tol=1e-6, abs_tol=1e-9)


def test_where_nothing_is_rounded_finite_differences_agree():
    v = torch.tensor([-30.0, 40.0, 55.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: lsq(v, s, -1, 1, 1) * torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor(0.9, dtype=torch.float64, requires_grad=True),
    )


def test_first_steps():
    w = torch.randn(5, 3, 3, 3)
    assert torch.allclose(initial_step(w, 7, per_channel=True)[2, 0, 0, 0], 2 * w[2].abs().mean() / math.sqrt(7))
    assert initial_step(torch.zeros(4), 7) == 1
    with pytest.raises(InputError, match="1 bits"):
        LsqQuantizer(1, True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_first_and_last_layer_stay_float_and_eight_bits_change_little(name):
    net, x = network(name), torch.randn(4, 3, 48, 48)
    ready = prepare_lsq(net, x)
    total = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    assert len(list(quantizers(ready, weights=True))) == total - 2
    assert torch.equal(ready.conv1.weight, fold_batchnorm(net).conv1.weight) and torch.equal(
        ready.fc.weight, net.fc.weight
    )
    assert all(q.step > 0 for _, q in quantizers(ready))
    with torch.no_grad():
        noise = [
            float((prepare_lsq(net, x, weight_bits=b, activation_bits=b)(x) - net(x)).norm() / net(x).norm())
            for b in (8, 4, 2)
        ]
    assert noise[0] < noise[1] < noise[2]


def test_a_layer_keeps_accuracy_in_the_order_of_its_bits():
    """Copies of a float network learn its outputs with a middle layer of 8, 4 and 2 bits: fewer bits, more error.

    Over six seeds the logarithms of the two ratios are nine and seven standard errors above zero.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(1000, 16)
    with torch.no_grad():
        y = net(x)

    def fit(student):
        optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9)
        for _ in range(150):
            loss = (student(x) - y).pow(2).mean() / y.var()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    errors = [fit(prepare_lsq(net, x[:100], weight_bits=b, activation_bits=b)) for b in (8, 4, 2)]
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.15**2


@pytest.mark.parametrize(
    ("steps", "profile"),
    [
        ({}, "ort-cpu"),
        ({"weight_bits": 4}, "ort-cpu"),
        ({"per_channel": False}, "ort-cpu"),
        ({"per_channel": False, "ends": True}, "per-tensor-npu"),
    ],
)
def test_the_onnx_file_computes_what_the_training_computed(steps, profile, tmp_path):
    net, x = network(), torch.randn(12, 3, 48, 48)
    module = round_biases(prepare_lsq(net, x, **steps))
    made = convert_onnx(module, tmp_path / "a.onnx", 48, profile=profile, notes={"about": "shapes"})
    session = open_session(made.path)
    outputs = np.concatenate([session.run(None, {"input": one[None].numpy()})[0] for one in x])
    assert output_steps(module, x, outputs).max() <= 1
    assert session.get_modelmeta().custom_metadata_map["about"] == "shapes"
    assert made.int8_share == 1 if steps.get("ends") else 0.6 < made.int8_share < 1


def test_a_copy_without_quantizers_leaves_the_original_alone():
    module = round_biases(prepare_lsq(network(), torch.randn(2, 3, 32, 32)))
    before = module(torch.ones(1, 3, 32, 32))
    plain_network(module)
    assert torch.equal(module(torch.ones(1, 3, 32, 32)), before)


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qat")
    photos = tagged_images(folder / "photos", 80, size=40, classes=3, graded=False)
    recipe = [
        f"{k}={v}"
        for k, v in dict(train=photos, width=8, size=32, batch=16, workers=0, tensorboard=False, val_share=0.3).items()
    ]
    return recipe, train_tagger(
        load_train_config(None, [*recipe, f"output={folder / 'float'}", "epochs=1"]), progress=False
    ).best


def qat(floating, output, **more):
    recipe, checkpoint = floating
    return train_qat(
        load_train_config(
            None,
            [*recipe, f"output={output}", f"checkpoint={checkpoint}", *(f"{k}={v}" for k, v in more.items())],
            model=QatConfig,
        ),
        progress=False,
    )


def test_an_interrupted_qat_ends_with_the_same_weights(floating, tmp_path, monkeypatch):
    whole = qat(floating, tmp_path / "whole", epochs=2)
    finish = Trainer._finish_epoch

    def broken(self, *rest):
        finish(self, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_finish_epoch", broken)
    with pytest.raises(KeyboardInterrupt):
        qat(floating, tmp_path / "part", epochs=2)
    monkeypatch.undo()
    again = qat(floating, tmp_path / "part", epochs=2)
    one, other = (load_tagger(t.last)[0].state_dict() for t in (whole, again))
    assert len(again.history) == 2 and all(torch.equal(one[key], other[key]) for key in one)
    assert one.keys() >= {"code_maxpool.step", "layer1.0.conv1.parametrizations.weight.0.step"}


def test_qat_refuses_what_does_not_fit(floating, tmp_path):
    with pytest.raises(InputError, match="width is 16"):
        qat(floating, tmp_path / "a", width=16)
    done = qat(floating, tmp_path / "b", epochs=1)
    with pytest.raises(ModelError, match="LSQ steps already"):
        qat((floating[0], done.best), tmp_path / "c", epochs=1)
    assert not (tmp_path / "c").exists()

"""Files for phones: run in ExecuTorch right after export, equal to torch, refused with what is missing."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.nets.lsq import prepare_lsq
from calib_nb.nets.resnet import LAYOUTS, resnet
from calib_nb.tags.coco import load_coco
from calib_nb.tags.config import TrainConfig, load_train_config
from calib_nb.tags.demo_drawings import tagged_images
from calib_nb.tags.evaluate import evaluate_tagger, open_tagger
from calib_nb.tags.network import TaggerSpec, save_tagger
from calib_nb.tags.qat import QatConfig, train_qat
from calib_nb.tags.train import train_tagger

pytest.importorskip("executorch", reason="the extra executorch is not installed: pip install 'calib-nb[executorch]'")

from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

from calib_nb.nets.convert import integer_program, output_steps, plain_network, round_biases
from calib_nb.nets.pte import PTE_BACKENDS, PteSession, check_pte, partitioner, write_pte
from calib_nb.tags.export import choose_calibration, export_checkpoint, rounding_tolerance

SPEC = TaggerSpec("resnet18", ("disc", "square", "triangle"), 8, 32, 0.8)


def network():
    torch.manual_seed(0)
    made = resnet("resnet18", 3, width=8).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.2, 0.4)
            module.bias.data.normal_(0, 0.1)
    return made


pytestmark = pytest.mark.usefixtures("one_thread", "no_patterns")


@pytest.fixture
def no_patterns(request, monkeypatch):
    """Quick tests leave out what ExecuTorch traces for seconds, once: attention and resizing, which are not in here."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(sdpa, "get_graphs", list)
        monkeypatch.setattr(bilinear_2d, "get_graphs", list)
        monkeypatch.setattr(bilinear_2d, "get_graphs_dict", dict)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export")
    tagged_images(folder / "photos", 24, size=40, classes=3)
    save_tagger(folder / "float.pth", SPEC, network())
    save_tagger(folder / "lsq.pth", SPEC, prepare_lsq(network(), torch.randn(4, 3, 32, 32)))
    return folder


def steps_apart(net, tmp_path, **steps):
    x = torch.randn(12, 3, 48, 48)
    module = round_biases(prepare_lsq(net, x, **steps))
    session = PteSession(write_pte(integer_program(module, 48), tmp_path / "a.pte"))
    outputs = np.concatenate([session.run(None, {"input": one[None].numpy()})[0] for one in x])
    return output_steps(module, x, outputs).max()


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"per_channel": False},
        {"weight_bits": 4},
    ],
)
def test_a_pte_with_lsq_is_within_one_step_of_torch_on_every_image(steps, tmp_path):
    assert steps_apart(three_layers(), tmp_path, **steps) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [{}, {"per_channel": False}, {"weight_bits": 4}, {"per_channel": False, "ends": True}]
)
def test_a_resnet_with_lsq_is_within_one_step_too(steps, tmp_path):
    assert steps_apart(network(), tmp_path, **steps) <= 1


def check_export(mode, checkpoint, photos, tmp_path):
    """Program and ONNX file carry their settings, and score as the checkpoint does."""
    done = export_checkpoint(checkpoint, tmp_path, mode=mode, photos=photos / "images", calibration_samples=6)
    assert done.pte.name == f"resnet18_multilabel_{mode}_xnnpack.pte" and done.onnx.suffix == ".onnx"
    tags = load_coco(photos / "instances.json", progress=False)
    opened = [open_tagger(path) for path in (checkpoint, done.pte, done.onnx)]
    assert all(t.classes == SPEC.classes and t.preprocess == SPEC.preprocess() for t in opened)
    scores = [evaluate_tagger(t, tags, latency_runs=1, progress=False).map for t in opened]
    assert np.ptp(scores) < (1e-6 if mode == "fp32" else 0.1)
    if mode != "fp32":
        assert done.pte.stat().st_size < 0.5 * checkpoint.stat().st_size


def test_export_of_a_short_network_writes_both_files_and_they_agree(files, tmp_path, monkeypatch):
    """One block in each stage instead of two, since ExecuTorch takes seconds for each; a slow test has all of them."""
    monkeypatch.setitem(LAYOUTS, "resnet18", (LAYOUTS["resnet18"][0], (1, 1, 1, 1)))
    save_tagger(tmp_path / "short.pth", SPEC, network())
    check_export("fp32", tmp_path / "short.pth", files / "photos", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "int8", "qat"])
def test_export_writes_both_files_and_they_agree(mode, files, tmp_path):
    check_export(mode, files / ("lsq.pth" if mode == "qat" else "float.pth"), files / "photos", tmp_path)


def test_the_file_that_differs_is_not_kept(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    written = write_pte(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), tmp_path / "a.pte")
    with pytest.raises(ModelError, match="differs from the torch module"):
        check_pte(written, [(np.zeros((1, 3, 8, 8), np.float32), np.full((1, 3), 9.0))], tolerance=0.01)
    assert not written.exists()


@pytest.mark.slow
def test_a_checkpoint_of_one_epoch_of_qat_is_exported(tmp_path):
    """What rounding does to a hardly trained network is large, and so is what its integer kernels may differ by."""
    images = tagged_images(tmp_path / "images", 48, size=72, classes=3, graded=False)
    common = {"train": images, "batch": 16, "epochs": 1, "workers": 0, "tensorboard": False}

    def config(model=TrainConfig, **more):
        return load_train_config(None, [f"{k}={v}" for k, v in (common | more).items()], model=model)

    first = train_tagger(config(output=tmp_path / "float", width=16, size=64), progress=False)
    qat = train_qat(config(QatConfig, output=tmp_path / "qat", checkpoint=first.best), progress=False)
    done = export_checkpoint(qat.best, tmp_path / "out", mode="qat")
    assert 0 <= done.difference <= done.tolerance < np.inf


def test_the_program_of_another_checkpoint_is_refused(files, tmp_path):
    module, other = (round_biases(prepare_lsq(three_layers(), torch.randn(4, 3, 32, 32))) for _ in range(2))
    with torch.no_grad():
        next(p for p in other.parameters() if p.shape == (3, 16)).neg_()
    x = [np.random.default_rng(k).standard_normal((1, 3, 32, 32)).astype(np.float32) for k in range(2)]
    plain = plain_network(module)[0]
    with torch.no_grad():
        rounded, unrounded = ([f(torch.from_numpy(v)).numpy() for v in x] for f in (module, lambda v: plain(v)[0]))
    file = write_pte(integer_program(other, 32), tmp_path / "other.pte")
    with pytest.raises(ModelError, match="differs from the torch module"):
        check_pte(file, list(zip(x, rounded)), tolerance=rounding_tolerance(rounded, unrounded))
    assert not file.exists()


def test_nnapi_is_answered_with_the_file_that_serves_it(files, tmp_path):
    with pytest.raises(InputError, match="ONNX Runtime Mobile's NNAPI execution provider.*calib-nb tags export"):
        export_checkpoint(files / "float.pth", tmp_path / "out", backend="nnapi")


@pytest.mark.parametrize("backend", ["samsung", "mediatek"])
def test_a_backend_without_its_tools_says_what_to_install(backend, files, tmp_path):
    with pytest.raises(InputError, match="SDK") as told:
        export_checkpoint(files / "float.pth", tmp_path / "out", backend=backend)
    assert "NNAPI" in str(told.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_portable_needs_no_backend(files, tmp_path):
    assert partitioner("portable") == []
    assert set(PTE_BACKENDS) == {"xnnpack", "portable", "vulkan", "samsung", "qualcomm", "mediatek"}
    assert export_checkpoint(files / "float.pth", tmp_path, backend="portable").difference < 1e-3


def test_bad_input(files, tmp_path):
    (tmp_path / "damaged.pte").write_bytes((b"\0" * 8) + b"nonsense")
    for path, message in ((tmp_path / "damaged.pte", "cannot be run"), (tmp_path / "none.pte", "no such file")):
        with pytest.raises(ModelError, match=message):
            open_tagger(path)
    with pytest.raises(InputError, match="no calibration images"):
        export_checkpoint(files / "float.pth", tmp_path, mode="int8")
    with pytest.raises(ModelError, match="LSQ steps"):
        export_checkpoint(files / "lsq.pth", tmp_path, mode="int8", photos=files)


def test_calibration_images_are_the_products_choice(files):
    first, second = (choose_calibration(files / "photos/images", 5, progress=False) for _ in range(2))
    assert first == second and len({sha256_file(p) for p in first}) == 5


@pytest.mark.slow
def test_the_command_line(files, tmp_path):
    from calib_nb.commands.tags import app

    done = CliRunner().invoke(
        app,
        [
            "export",
            "--checkpoint",
            str(files / "lsq.pth"),
            "--qat",
            "--model",
            "resnet18",
            "--output",
            str(tmp_path),
        ],
    )
    assert (
        done.exit_code == 0
        and "off from torch by" in done.output
        and "NNAPI through ONNX Runtime Mobile" in done.output
    ), done.exception
    pte = tmp_path / "resnet18_multilabel_qat_xnnpack.pte"
    assert json.loads(PteSession(pte).notes["tagger"])["classes"] == list(SPEC.classes)
    said = CliRunner().invoke(
        app, ["predict", str(files / "photos/images/000001.jpg"), "--pte", str(pte), "--threshold", "0"]
    )
    assert said.exit_code == 0 and "disc" in said.output
    words = [
        "--calibration-images",
        str(files / "photos/images"),
        "--calibration-samples",
        "6",
        "--output",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, ["export", "--checkpoint", str(files / "float.pth"), "--int8", *words])
    assert done.exit_code == 0 and (tmp_path / "resnet18_multilabel_int8_xnnpack.pte").exists(), done.exception
    wrong = CliRunner().invoke(app, ["export", "--checkpoint", str(files / "float.pth"), "--int8", "--qat"])
    assert wrong.exception.exit_code == 2

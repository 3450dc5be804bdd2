"""INT8-aware training: the torch network, the file that it came from and the file that it writes are one."""

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from calib_nb.core.errors import ModelError
from calib_nb.data.preprocess import Preprocess
from calib_nb.faces.edgeface import edgeface, export_edgeface
from calib_nb.graph.build import conv, linear, sequential
from calib_nb.quant.quantize import quantize_static
from calib_nb.training.int8_aware import QdqNetwork, fake_quantize
from calib_nb.training.int8_files import int8_settings, tune_int8
from calib_nb.training.loop import FaceTrainer

CHAIN = Preprocess().convert_color("BGR2RGB").normalize([0.5] * 3, [0.5] * 3).transpose([2, 0, 1]).expand_dim(0)


def by_file(path, inputs: torch.Tensor) -> torch.Tensor:
    """What the file says, node by node: kernels that a processor makes faster may saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    name = session.get_inputs()[0].name
    return torch.from_numpy(np.concatenate([session.run(None, {name: x[None].numpy()})[0] for x in inputs]))


def photos(count: int, size: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]


def agree(network, path, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.cosine_similarity(network(inputs), by_file(path, inputs)).min() > 0.9999


@pytest.mark.parametrize("profile", ["int8-only", "ort-cpu", "xnnpack"])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_network_is_the_file_before_and_after_training(tmp_path, one_thread, profile, bits):
    float_file = sequential(
        conv(8, 3), "Relu", conv(8, 3), "GlobalAveragePool", "Flatten", linear(6), shape=(1, 3, 8, 8)
    )
    float_file.save(tmp_path / "float.onnx")
    images = photos(8, 8)
    quantize_static(tmp_path / "float.onnx", images, CHAIN, tmp_path / "int8.onnx", profile=profile, progress=False)
    inputs = torch.from_numpy(np.concatenate([CHAIN(image) for image in images])).float()
    network = QdqNetwork(tmp_path / "int8.onnx", weight_bits=bits)
    if bits is None:
        agree(network, tmp_path / "int8.onnx", inputs)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        network(inputs).square().sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    agree(network, network.write(tmp_path / "new.onnx"), inputs)
    agree(QdqNetwork(tmp_path / "new.onnx"), tmp_path / "new.onnx", inputs)


def test_scales_of_any_sign_and_size_round(one_thread):
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for scale in (1e-9, 0.1, 5.0):
        rounded = fake_quantize(x, torch.tensor(scale, dtype=torch.float64), -128, 127)
        wanted = np.clip(np.round(x.numpy() / scale), -128, 127) * scale
        np.testing.assert_allclose(rounded, wanted, rtol=1e-12)


def test_a_file_that_rounds_nothing_is_refused(tmp_path):
    sequential(conv(2, 3), "Relu", shape=(1, 3, 8, 8)).save(tmp_path / "float.onnx")
    with pytest.raises(ModelError, match="rounds nothing"):
        QdqNetwork(tmp_path / "float.onnx")


@pytest.mark.slow
def test_a_whole_edgeface_is_the_file(tmp_path):
    module = edgeface("xxs")
    for name, value in module.named_parameters():
        if "gamma" in name:
            value.data.fill_(0.5)  # so that the attention between channels is seen
    export_edgeface(module, tmp_path / "float.onnx")
    images = photos(8, 112)
    quantize_static(tmp_path / "float.onnx", images, CHAIN, tmp_path / "int8.onnx", profile="int8-only", progress=False)
    inputs = torch.from_numpy(np.concatenate([CHAIN(image) for image in images[:4]])).float()
    network = QdqNetwork(tmp_path / "int8.onnx")
    with torch.no_grad():
        one_by_one = torch.cat([network(x[None]) for x in inputs])
    assert torch.cosine_similarity(network(inputs), one_by_one).min() > 0.999
    assert torch.cosine_similarity(one_by_one, by_file(tmp_path / "int8.onnx", inputs)).min() > 0.9999
    agree(network, network.write(tmp_path / "new.onnx"), inputs)


def face_folder(root, people: int = 3, each: int = 4, size: int = 16):
    """Photos of noise, a folder for each person."""
    random = np.random.default_rng(0)
    for person in range(people):
        (root / str(person)).mkdir(parents=True)
        for k in range(each):
            cv2.imwrite(str(root / str(person) / f"{k}.png"), random.integers(0, 256, (size, size, 3), np.uint8))
    return root


def test_a_stopped_int8_training_goes_on_to_the_same_file(tmp_path, one_thread, monkeypatch):
    faces = face_folder(tmp_path / "faces")
    network = sequential(conv(4, 3), "Relu", "GlobalAveragePool", "Flatten", linear(6), shape=(1, 3, 16, 16))
    network.save(tmp_path / "float.onnx")

    def tune(name: str):
        settings = int8_settings(faces, tmp_path / f"{name}.onnx", ["batch=4", "epochs=2", "save_every=1"])
        return tune_int8(tmp_path / "float.onnx", settings, weight_bits=4, calibration=6, progress=False)

    whole = tune("whole")
    step = FaceTrainer.take_step

    def stops(trainer, pieces):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return step(trainer, pieces)

    monkeypatch.setattr(FaceTrainer, "take_step", stops)
    with pytest.raises(KeyboardInterrupt):
        tune("parts")
    assert not (tmp_path / "parts.onnx").exists()
    monkeypatch.setattr(FaceTrainer, "take_step", step)
    assert tune("parts").model.read_bytes() == whole.model.read_bytes() != whole.quantized.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_is_quantized_and_trained(tmp_path, one_thread):
    faces = face_folder(tmp_path / "faces", each=2, size=112)
    torch.save(edgeface("xxs").state_dict(), tmp_path / "xxs.pt")
    settings = int8_settings(faces, tmp_path / "int8.onnx", ["batch=3", "epochs=1", f"val={faces}"])
    result = tune_int8(tmp_path / "xxs.pt", settings, progress=False)
    assert len(result.table) == 3 and result.table.cosine.between(-1, 1).all()
    agree(QdqNetwork(result.model), result.model, torch.rand(2, 3, 112, 112) * 2 - 1)

"""Real images through the config, and the checks that fail."""

import cv2
import numpy as np
import pandas as pd
import pytest

from calib_nb.core.errors import ConfigError, InputError, ModelError
from calib_nb.data.preprocess import preset
from calib_nb.graph.build import network
from calib_nb.graph.fixed import fix_batch
from calib_nb.npu.config import CompilerConfig, generate_config, save_config
from calib_nb.npu.verify import verify


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(
            str(tmp_path / "images" / f"{i}.png"),
            cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC),
        )
    return tmp_path / "images"


def one_node(path, operator, size=112):
    return network(f"out = {operator} (input)", inputs={"input": (1, 3, size, size)}).save(path)


def test_numbers_are_those_of_numpy(images):
    result = verify(generate_config("resnet-tags", images, calibration_num=8), num_samples=8, progress=False)
    assert result.passed and len(result.table) == 8 and result.pictures == [] and result.samples == []
    for _, row in result.table.iterrows():
        image = cv2.resize(cv2.imread(str(images / row["image"])), (224, 224))[..., ::-1] / 255
        for i, name in enumerate("RGB"):
            plane = (image[..., i] - [0.485, 0.456, 0.406][i]) / [0.229, 0.224, 0.225][i]
            assert np.allclose(
                [row[f"{s}_{name}"] for s in ("min", "max", "mean", "std")],
                [plane.min(), plane.max(), plane.mean(), plane.std()],
                atol=1e-5,
            )
        assert row["shape"] == "[1, 3, 224, 224]" and row["dtype"] == "float32" and row["time_ms"] > 0


def test_the_seed_chooses(images):
    config = generate_config("yunet", images, calibration_num=8)
    chosen = [verify(config, num_samples=3, seed=seed, progress=False).table["image"].tolist() for seed in (1, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len({tuple(c) for c in chosen}) > 1
    assert len(verify(config, num_samples=100, progress=False).table) == 8


def test_pictures_and_tables_are_written(images, tmp_path):
    path = save_config(generate_config("edgeface", images, calibration_num=8), tmp_path / "c.json")
    result = verify(
        path,
        num_samples=2,
        visualize=True,
        output_dir=tmp_path / "out",
        progress=False,
        model=one_node(tmp_path / "m.onnx", "Relu"),
    )
    assert result.passed and len(result.pictures) == len(result.samples) == 2
    for picture, sample in zip(result.pictures, result.samples):
        assert cv2.imread(str(picture)).shape[1] > 500 and np.array_equal(
            sample.seen, cv2.resize(sample.original, (112, 112))
        )
    assert pd.read_csv(tmp_path / "out" / "samples.csv")["image"].tolist() == result.table["image"].tolist()
    assert pd.read_csv(tmp_path / "out" / "checks.csv")["passed"].all() and (tmp_path / "out" / "findings.csv").exists()


def test_another_folder_can_stand_in(images, tmp_path):
    config = generate_config("edgeface", "on/the/other/machine", calibration_num=500)
    with pytest.raises(ConfigError, match="no such folder"):
        verify(config, progress=False)
    assert verify(config, dataset_path=images, progress=False).passed


def test_failures_are_named(images, tmp_path):
    config = generate_config("edgeface", images, calibration_num=8)
    raw = config.to_dict()
    steps = raw["default_loader"]["preprocessings"]

    def changed(preprocessings):
        return CompilerConfig.model_validate(
            raw | {"default_loader": raw["default_loader"] | {"preprocessings": preprocessings}}
        )

    nan = verify(config, model=one_node(tmp_path / "sqrt.onnx", "Sqrt"), progress=False)
    assert not nan.passed and nan.table["model_problem"].tolist() == ["output 'out' is not finite"] * 5
    early = verify(changed([steps[i] for i in (0, 1, 3, 2, 4, 5)]), progress=False)
    assert not early.passed and "0..1" in early.findings[0].what
    twice = verify(changed([*steps[:3], *steps[2:]]), progress=False)
    assert not twice.passed and twice.table["range_problem"].str.contains("no customary model").all()
    for kind, other in (("edgeface", "yunet"), ("edgeface", "resnet-tags")):
        assert (
            not verify(config, model_type=other, progress=False).passed
            and verify(config, model_type=kind, progress=False).passed
        )
    vendor = verify(changed([*steps, {"squeeze": {"axis": 0}}]), progress=False)
    assert not vendor.passed and vendor.table["problem"].str.contains("not emulated").all()
    flat = verify(
        changed([s for s in steps if "transpose" not in s]),
        model=tmp_path / "sqrt.onnx",
        visualize=True,
        progress=False,
    )
    assert not flat.passed and flat.table["model_problem"].str.contains("does not run").all() and len(flat.samples) == 5


def test_an_unreadable_image_is_a_row(images):
    for path in images.iterdir():
        path.write_bytes(path.read_bytes()[:300])
    (images / "ok.png").write_bytes(cv2.imencode(".png", np.full((40, 40, 3), 9, np.uint8))[1].tobytes())
    result = verify(generate_config("yunet", images, calibration_num=9), num_samples=9, progress=False, visualize=True)
    assert (
        not result.passed
        and (result.table["problem"] != "").sum() == 8
        and result.checks["detail"][1].startswith("1 of 9")
        and len(result.samples) == 1
    )


def test_bad_options(images, tmp_path):
    config = generate_config("yunet", images, calibration_num=8)
    for wrong in (
        {"num_samples": 0},
        {"model_type": "yolo"},
        {"model": tmp_path / "none.onnx"},
        {"dataset_path": tmp_path / "none"},
        {"data_root": tmp_path / "other"},
        {"sed": 1},
    ):
        with pytest.raises((InputError, ModelError)):
            verify(config, progress=False, **wrong)


def test_real_models_and_faces(real_data, tmp_path):
    models, faces = real_data / "models", real_data / "lfw" / "images"
    edgeface = fix_batch(models / "edgeface_xxs_q_dequant.onnx", tmp_path / "edgeface_b1.onnx")
    for kind, model in (("yunet", models / "face_detection_yunet_2023mar.onnx"), ("edgeface", edgeface)):
        config = generate_config(kind, faces, model=model)
        result = verify(config, model=model, visualize=True, num_samples=3, progress=False)
        assert result.passed and result.findings == [] and result.checks["passed"].tolist() == [True] * 5
    forgot = config.to_dict()
    forgot["default_loader"]["preprocessings"] = forgot["default_loader"]["preprocessings"][1:]
    swapped = verify(
        CompilerConfig.model_validate(forgot), model=edgeface, visualize=True, num_samples=3, progress=False
    )
    assert (
        not swapped.passed
        and "edgeface takes RGB and is fed BGR" in swapped.checks.set_index("check")["detail"]["colours fit the model"]
    )
    seen = swapped.samples[0]
    right = preset("edgeface").denormalize(preset("edgeface")(seen.original))
    assert np.array_equal(seen.seen, right[..., ::-1])  # the network takes red for blue

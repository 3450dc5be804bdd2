"""The compiler's config: generated, read, written, and every planted fault found and explained."""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CheckFailed, ConfigError, InputError, ModelError
from calib_nb.data.preprocess import PRESETS
from calib_nb.graph.build import network
from calib_nb.npu.config import (
    CompilerConfig,
    config_images,
    generate_config,
    load_config,
    save_config,
)
from calib_nb.npu.findings import findings_table, refuse_errors
from calib_nb.npu.validate import validate


def face_model(path, batch=1, size=112, name="input", features=512):
    text = f"y = Conv ({name}, w); z = GlobalAveragePool (y); embedding = Flatten (z)"
    weight = np.full((features, 3, 1, 1), 1e-3)
    return network(text, inputs={name: (batch, 3, size, size)}, w=weight).save(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with images/ (12 images), face.onnx and the raw config of the edgeface preset."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("images/sub")
    for i in range(12):
        cv2.imwrite(f"images/{'sub/' * (i % 2)}{i}.jpg", np.full((90, 70, 3), 20 * i, np.uint8))
    face_model("face.onnx")
    return generate_config("edgeface", "images", model="face.onnx", calibration_num=12).to_dict()


def with_loader(raw, **changes):
    return raw | {"default_loader": raw["default_loader"] | changes}


def errors(raw, *arguments, **options):
    return [f for f in validate(raw, *arguments, **options) if f.level == "error"]


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("target", ["npu", "dx-com"])
def test_generated_configs_are_sound_and_come_back_the_same(place, kind, target):
    config = generate_config(kind, "images", calibration_num=12, calibration_method="minmax", target=target)
    assert validate(config, target=target) == []
    save_config(config, "c.json")
    assert load_config("c.json") == config == load_config(config) and validate("c.json", target=target) == []
    raw = json.loads(Path("c.json").read_text())
    assert (
        list(raw) == ["inputs", "calibration_method", "calibration_num", "default_loader"]
        and raw["inputs"]["input"][0] == 1
    )
    assert config.preprocess(np.zeros((50, 60, 3), np.uint8)).shape == tuple(raw["inputs"]["input"])


def test_everything_of_the_manual_is_read_and_written_as_it_was(place):
    raw = place | {
        "quantization_device": "cuda:1",
        "enhanced_scheme": {
            "DXQ-P0": {"alpha": 0.5},
            "DXQ-P1": True,
            "DXQ-P2": {"alpha": 0.1, "beta": 1.0, "cosim_num": 2},
            "DXQ-P3": {"num_samples": 1024},
            "DXQ-P4": False,
        },
        "qmaster": {
            "batch_size": 16,
            "epochs": 30,
            "lr": 1e-5,
            "optimizer": "adamw",
            "criterion": "mse",
            "scheduler": "cosine",
            "use_kd": True,
            "kd_alpha": 1.0,
            "kd_temperature": 4.0,
        },
        "ppu": {
            "type": 1,
            "num_classes": 80,
            "layer": [{"bbox": "Mul_441", "cls_conf": "Sigmoid_442"}],
            "conf_thres": 0.25,
        },
    }
    (config := CompilerConfig.model_validate(raw))
    assert config.to_dict() == raw and validate(raw) == []
    raw["ppu"] = {
        "type": 0,
        "num_classes": 80,
        "layer": {"Conv_1": {"num_anchors": 3}},
        "conf_thres": 0.25,
        "activation": "Sigmoid",
    }
    assert CompilerConfig.model_validate(raw).to_dict()["ppu"] == raw["ppu"]


PLANTED = {
    "wrong input name": (
        lambda r: r | {"inputs": {"images": r["inputs"]["input"]}},
        "inputs",
        '"input": [1, 3, 112, 112]',
    ),
    "batch 2": (lambda r: r | {"inputs": {"input": [2, 3, 112, 112]}}, "inputs.input[0]", "[1, 3, 112, 112]"),
    "missing transpose": (
        lambda r: with_loader(
            r, preprocessings=[s for s in r["default_loader"]["preprocessings"] if "transpose" not in s]
        ),
        "preprocessings",
        '"transpose": {"axis": [2, 0, 1]}',
    ),
    "normalise before div": (
        lambda r: with_loader(r, preprocessings=[r["default_loader"]["preprocessings"][i] for i in (0, 1, 3, 2, 4, 5)]),
        "preprocessings[2]",
        "move step 3 before step 2",
    ),
    "swapped colours": (
        lambda r: with_loader(
            r, preprocessings=[{"convertColor": {"form": "RGB2BGR"}}, *r["default_loader"]["preprocessings"][1:]]
        ),
        "preprocessings[0]",
        "BGR2RGB",
    ),
    "no such folder": (lambda r: with_loader(r, dataset_path="pictures"), "dataset_path", "correct dataset_path"),
    "misspelt key": (
        lambda r: {**{k: v for k, v in r.items() if k != "calibration_num"}, "calibration_nums": 12},
        "calibration_nums",
        "did you mean 'calibration_num'",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_refused_with_the_fix(place, fault):
    plant, where, fix = PLANTED[fault]
    raw = plant(copy.deepcopy(place))
    with open("bad.json", "w") as f:
        json.dump(raw, f)
    for form in (raw, "bad.json"):
        found = errors(form, "face.onnx")
        assert any(where in f.where and fix in f.fix for f in found), findings_table(found)
    with pytest.raises(CheckFailed, match="1 error|2 errors") as caught:
        refuse_errors(found)
    assert caught.value.exit_code == 1


def test_all_faults_of_one_file_are_found_at_once(place):
    raw = place
    for plant in (
        PLANTED[k][0] for k in ("wrong input name", "normalise before div", "no such folder", "misspelt key")
    ):
        raw = plant(copy.deepcopy(raw))
    found = [f.where for f in errors(raw, "face.onnx")]
    for where in (
        "calibration_nums",
        "calibration_num",
        "inputs",
        "default_loader.dataset_path",
        "default_loader.preprocessings[2]",
    ):
        assert where in found
    with open("bad.json", "w") as f:
        json.dump(raw | {"calibration_method": "emma", "ppu": {"type": 3}}, f)
    with pytest.raises(ConfigError) as caught:
        load_config("bad.json")
    assert all(
        part in str(caught.value) for part in ("calibration_nums", "'ema'?", "ppu.type", "ppu.layer", "6 faults")
    ) and "\n" not in str(caught.value)


def test_more_faults_each_named(place):
    cases = [
        (place | {"calibration_method": "kl"}, {"target": "dx-com"}, "calibration_method", "ema"),
        (place | {"calibration_num": 13}, {}, "calibration_num", "write 12"),
        (with_loader(place, file_extensions=[".jpg"]), {}, "file_extensions[0]", "'jpg'"),
        (with_loader(place, file_extensions=["JPG"]), {}, "file_extensions", "'jpg'"),
        (with_loader(place, file_extensions=["webp"]), {}, "file_extensions", "12 .jpg"),
        (with_loader(place, dataset_path="../"), {"data_root": "images"}, "dataset_path", "--data-root"),
        (with_loader(place, dataset_path=""), {}, "dataset_path", ""),
        (with_loader(place, preprocessings=[]), {}, "preprocessings", "resize to 112x112"),
        (
            with_loader(
                place,
                preprocessings=[
                    {"resize": {"width": 112, "height": 112}},
                    {"convertColor": {"form": "BGR2GRAY"}},
                    {"transpose": {"axis": [2, 0, 1]}},
                    {"expandDim": {"axis": 0}},
                ],
            ),
            {},
            "preprocessings",
            "GRAY",
        ),
        (place | {"inputs": {}}, {}, "inputs", ""),
        (place | {"inputs": {"input": [1, 3, 112]}}, {}, "inputs.input", ""),
        (place | {"inputs": {"input": [1, 3, 0, 112]}}, {}, "inputs.input[2]", ""),
        (place | {"calibration_num": True}, {}, "calibration_num", ""),
        (place | {"quantization_device": "gpu"}, {}, "quantization_device", ""),
        (place | {"enhanced_scheme": {"DXQ-P2": {"alpha": 2, "beta": 1}}}, {}, "enhanced_scheme.DXQ-P2", ""),
    ]
    for raw, options, where, fix in cases:
        found = errors(raw, **options)
        assert any(where in f.where and fix in f.fix for f in found), (where, fix, [str(f) for f in found])


def test_habits_that_are_broken_are_warnings(place):
    steps = place["default_loader"]["preprocessings"]
    forgot = validate(with_loader(place, preprocessings=steps[1:]), "face.onnx")
    assert [f.level for f in forgot] == ["warning", "warning"] and "an RGB model is fed BGR" in forgot[1].what
    vendor = validate(with_loader(place, preprocessings=[*steps, {"squeeze": {"axis": 0}}]))
    assert [f.level for f in vendor] == ["warning"] and "not emulated" in vendor[0].what
    kl = validate(place | {"calibration_method": "kl"})
    assert [f.level for f in kl] == ["warning"] and "ema and minmax" in kl[0].what
    (extra,) = validate(place | {"qmaster": {"epoch": 3}})
    assert extra.level == "warning" and "'epochs'" in extra.fix
    os.symlink("images", "link")
    (link,) = validate(with_loader(place, dataset_path="link"))
    assert link.level == "warning" and "--data-root" in link.fix


def test_findings_about_the_model(place):
    assert "fix-batch" in errors(place, face_model("open.onnx", batch="n"))[0].fix
    Path("bad.onnx").write_text("no")
    assert errors(place, "bad.onnx")[0].where == "model"
    assert any("the model takes [1, 3, 64, 64]" in f.what for f in errors(place, face_model("small.onnx", size=64)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "nul",
        '{"inputs": NaN}',
        '{"inputs": {"a": [1, 3, Infinity, 2]}}',
        "[" * 50_000,
        '{"a":' * 50_000,
        "\x00\x01",
        '{"calibration_num": ' + "9" * 5000 + "}",
    ],
    ids=range(10),
)
def test_malformed_files_are_one_clear_error(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert validate(path)[0].level == "error"


def test_numbers_too_large_for_a_float_are_refused(place):
    text = json.dumps(place).replace('"x": 255', '"x": 1e999')
    Path("c.json").write_text(text)
    with pytest.raises(ConfigError, match="finite number"):
        load_config("c.json")
    nested = deep = {}
    for _ in range(200):
        deep["a"] = deep = {}
    assert [f.level for f in validate(place | {"qmaster": {"x": nested}})] == ["warning"]
    assert errors(place | {"inputs": nested, "ppu": nested, "default_loader": nested})


def test_a_gigabyte_is_refused_at_once(tmp_path):
    with open(tmp_path / "huge.json", "wb") as f:
        f.truncate(10**9)
    with pytest.raises(ConfigError, match="1,000 MB"):
        load_config(tmp_path / "huge.json")
    assert validate(tmp_path / "huge.json")[0].where == "file"


def test_configs_cannot_leave_the_data_root(place, tmp_path):
    os.makedirs("root/inside")
    os.makedirs("outside")
    cv2.imwrite("outside/a.jpg", np.zeros((4, 4, 3), np.uint8))
    cv2.imwrite("root/inside/a.jpg", np.zeros((4, 4, 3), np.uint8))
    os.symlink(tmp_path / "outside", "root/link")
    os.symlink(tmp_path / "outside" / "a.jpg", "root/inside/b.jpg")
    for hostile in ("root/link", "outside", "root/../outside", str(tmp_path / "outside"), "/"):
        config = CompilerConfig.model_validate(with_loader(place, dataset_path=hostile))
        with pytest.raises(ConfigError, match="leads out of root"):
            config_images(config, data_root="root")
        assert errors(config, data_root="root")[0].where == "default_loader.dataset_path"
    inside = CompilerConfig.model_validate(with_loader(place, dataset_path="root/inside"))
    assert [p.name for p in config_images(inside, data_root="root")] == ["a.jpg"]  # the linked image is left out


def test_dataset_path_starts_from_the_folder_of_the_compiler(place, tmp_path):
    os.makedirs("configs")
    save_config(CompilerConfig.model_validate(place), "configs/c.json")
    assert len(load_config("configs/c.json").images) == 12
    (finding,) = errors("configs/c.json", base=tmp_path / "configs")
    assert f"looked for in {tmp_path / 'configs'}" in finding.what
    assert len(config_images(load_config("configs/c.json"), base=tmp_path)) == 12


def test_a_config_knows_its_images_and_its_preprocessing(place):
    """The same for a config that was never saved, one from a file, and one of what prepare returned."""
    saved = load_config(save_config(CompilerConfig.model_validate(place), "c.json"))
    prepared = generate_config("edgeface", SimpleNamespace(path=Path("images")), model="face.onnx", calibration_num=12)
    image = cv2.imread(str(saved.images[0]))
    assert saved == prepared and len(prepared.images) == prepared.calibration_num == 12
    assert prepared.images == saved.images == config_images(saved)
    assert np.array_equal(prepared.preprocess(image), saved.preprocess(image))


def test_generate_reads_the_model_and_refuses_what_differs(place):
    assert generate_config("edgeface", "x", model=face_model("m.onnx", size=96, name="data")).inputs == {
        "data": (1, 3, 96, 96)
    }
    for error, options in (
        (ConfigError, {"model": "m.onnx", "input_name": "input"}),
        (ConfigError, {"model": "m.onnx", "input_size": (112, 112)}),
        (ModelError, {"model": face_model("n.onnx", batch="n")}),
        (ModelError, {"model": "none.onnx"}),
        (ConfigError, {"calibration_method": "kl", "target": "dx-com"}),
        (ConfigError, {"calibration_method": "percentile", "target": "dx-com:2.4"}),
        (InputError, {"calibration_method": "emma"}),
        (InputError, {"target": "dxcom"}),
        (ConfigError, {"calibration_num": 0}),
        (ConfigError, {"input_size": (0, 5)}),
    ):
        with pytest.raises(error):
            generate_config("edgeface", "x", **options)
    assert generate_config("yunet", "x", input_size=(64, 32), input_name="data").inputs == {"data": (1, 3, 32, 64)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=8,
)
PATHS = [
    ("inputs",),
    ("calibration_method",),
    ("calibration_num",),
    ("default_loader",),
    ("default_loader", "dataset_path"),
    ("default_loader", "file_extensions"),
    ("default_loader", "preprocessings"),
    ("ppu",),
    ("qmaster",),
    ("enhanced_scheme",),
    ("quantization_device",),
]


@given(st.sampled_from(PATHS), json_values)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_anything_in_any_place_is_findings_never_a_traceback(where, value):
    raw = generate_config("edgeface", "images").to_dict()
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    found = validate(raw)
    assert all(f.level in ("error", "warning") and f.where and f.what for f in found)
    assert findings_table(found).shape[1] == 4


@given(st.dictionaries(st.text(max_size=12), json_values, max_size=4))
@settings(deadline=None, derandomize=True)
def test_any_object_is_findings(raw):
    assert any(f.level == "error" for f in validate(raw))


def test_real_models_make_sound_configs(real_data):
    model = real_data / "models" / "face_detection_yunet_2023mar.onnx"
    config = generate_config("yunet", real_data / "lfw" / "images", model=model, target="dx-com")
    assert config.inputs == {"input": (1, 3, 640, 640)} and validate(config, model, target="dx-com") == []
    with pytest.raises(ModelError, match="fix-batch"):
        generate_config("edgeface", "x", model=real_data / "models" / "edgeface_xs_q_dequant.onnx")
    swapped = config.to_dict()
    swapped["default_loader"]["preprocessings"].insert(0, {"convertColor": {"form": "BGR2RGB"}})
    (finding,) = validate(swapped, model)
    assert finding.level == "warning" and "a BGR model is fed RGB" in finding.what

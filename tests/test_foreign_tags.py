"""COCO files and settings of other people's tools: read as they are meant, or refused in one line."""

import json
import math

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.run import write_json
from calib_nb.tags.coco import image_folder, load_coco, sound_entries, tag_table
from calib_nb.tags.config import TrainConfig, load_train_config
from calib_nb.tags.task import TaggingTask
from calib_nb.tags.train import training_sets

FEW, MANY = 50, 1000
CAT, DOG = {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}


def one_line(error: CalibError) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 5000


def coco(folder, *, images=None, annotations=None, categories=(CAT, DOG), count=4, name="instances.json"):
    """Images of 8 pixels and a COCO JSON beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        cv2.imwrite(str(folder / f"images/{k}.png"), np.full((8, 8, 3), 50 * k, np.uint8))
    images = [{"id": k, "file_name": f"{k}.png"} for k in range(count)] if images is None else images
    found = [{"image_id": k, "category_id": 1 + k % 2} for k in range(count)]
    annotations = found if annotations is None else annotations
    return write_json(folder / name, {"images": images, "annotations": annotations, "categories": list(categories)})


def read(path):
    return load_coco(path, progress=False)


def test_ids_as_pandas_writes_them_are_the_same_ids(tmp_path):
    plain = coco(tmp_path)
    data = json.loads(plain.read_text())
    gap = pd.DataFrame([*data["annotations"], {"category_id": 1}])  # a gap makes the column one of floats
    rows = json.loads(gap.to_json(orient="records"))[:-1]
    assert rows[1]["image_id"] == 1.0 and isinstance(gap.image_id[1], float)
    wanted = read(plain)
    for changed in (rows, [{k: float(v) for k, v in row.items()} for row in rows]):
        text = json.dumps(data | {"annotations": [{k: float(v) for k, v in row.items()} for row in changed]})
        assert "1.0" in text
        (tmp_path / "floats.json").write_text(text)
        assert read(tmp_path / "floats.json").table.equals(wanted.table)
    texts = [{"image_id": str(r["image_id"]), "category_id": str(r["category_id"])} for r in data["annotations"]]
    assert read(write_json(tmp_path / "texts.json", data | {"annotations": texts})).table.equals(wanted.table)


def test_a_half_is_no_id(tmp_path):
    found = read(coco(tmp_path, annotations=[{"image_id": 1.5, "category_id": 1}, {"image_id": 1, "category_id": 1}]))
    assert found.counts()["count"].to_dict() == {"damaged annotation": 1}


def test_nothing_to_learn_or_score_is_an_error(tmp_path):
    for annotations in ([], [{"image_id": 77, "category_id": 1}], [{"image_id": 1, "category_id": 77}]):
        with pytest.raises(InputError, match="no image that can be used has an annotation") as refused:
            read(coco(tmp_path, annotations=annotations))
        one_line(refused.value)
    table = pd.DataFrame({"path": ["a", "b"], "cat": [0, 0]})
    with pytest.raises(InputError, match="none of 2 images shows one of 1 categories"):
        TaggingTask(table, None)


def test_a_part_without_tags_is_an_error(tmp_path):
    path = coco(tmp_path, annotations=[{"image_id": 0, "category_id": 1}])
    config = TrainConfig(train=path, output=tmp_path / "run", val_share=0.25)
    with pytest.raises(InputError, match="show none of 2 categories; expected images with tags in both parts"):
        training_sets(config, progress=False)


def test_backslashes_are_folders(tmp_path):
    path = coco(tmp_path, images=[{"id": k, "file_name": f"images\\{k}.png"} for k in range(4)])
    assert [p.split("/")[-1] for p in read(path).table.path] == ["0.png", "1.png", "2.png", "3.png"]
    odd = tmp_path / "images" / "a\\b.png"  # a name on Linux
    odd.write_bytes((tmp_path / "images/0.png").read_bytes())
    path = coco(tmp_path, images=[{"id": 0, "file_name": "a\\b.png"}])
    assert read(path).table.path[0] == str(odd)


def test_backslashes_do_not_lead_out_of_the_folder(tmp_path):
    coco(tmp_path / "set")
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 8, 3), np.uint8))
    images = [{"id": 0, "file_name": "..\\..\\secret.png"}, {"id": 1, "file_name": "1.png"}]
    found = read(coco(tmp_path / "set", images=images))
    assert found.report.problem[0] == "outside the folder" and len(found.table) == 1


def test_roboflows_root_is_no_class_and_its_folder_is_found(tmp_path):
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}]
    categories += [{**c, "supercategory": "pets"} for c in (CAT, DOG)]
    path = coco(tmp_path, categories=categories)
    assert read(path).classes == ("cat", "dog")
    used = coco(tmp_path, categories=categories, annotations=[{"image_id": 0, "category_id": 0}])
    assert read(used).classes == ("pets", "cat", "dog")
    flat = tmp_path / "flat"
    flat.mkdir()
    coco(tmp_path)
    for k in range(4):
        (tmp_path / f"images/{k}.png").rename(flat / f"{k}.png")
    path.rename(flat / "_annotations.coco.json")
    assert image_folder(flat / "_annotations.coco.json") == flat
    assert len(load_coco(flat / "_annotations.coco.json", progress=False).table) == 4


@pytest.mark.parametrize("name", ["path", ""])
def test_a_category_that_is_no_column_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="used once; path is the name of") as refused:
        read(coco(tmp_path, categories=[CAT, DOG | {"name": name}]))
    one_line(refused.value)


def test_many_categories_take_no_time():
    data = {"images": [], "annotations": [], "categories": [{"id": k, "name": f"c{k}"} for k in range(50_000)]}
    sound, faults = sound_entries(data, ".")
    assert tag_table(sound, ".").shape == (0, 50_001) and not faults


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
IDS = st.integers(0, 4) | st.sampled_from([1.0, 2.5, "1", [1], {}, None, True, 1e300, 10**30]) | JSON
NAMES = (
    st.sampled_from(["0.png", "1.png", "2.png", "cat", "path", "", "\x00", "..", "\ud800", "a" * 300, "/etc/x"]) | JSON
)


def entries(**fields):
    return st.lists(st.fixed_dictionaries({}, optional=fields) | JSON, max_size=6)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_coco_file_is_read_or_refused(tmp_path, examples):
    coco(tmp_path)

    @settings(max_examples=examples)
    @given(
        images=entries(id=IDS, file_name=NAMES) | JSON,
        annotations=entries(id=IDS, image_id=IDS, category_id=IDS) | JSON,
        categories=entries(id=IDS, name=NAMES, supercategory=NAMES) | st.just([CAT, DOG]) | JSON,
    )
    def check(images, annotations, categories):
        data = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "any.json").write_text(json.dumps(data, allow_nan=True))
        try:
            found = read(tmp_path / "any.json")
        except CalibError as e:
            one_line(e)
        else:
            assert found.targets.any() and len(found.table) and set(np.unique(found.targets)) <= {0, 1}

    check()


def saved(tmp_path, text):
    (tmp_path / "train.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return tmp_path / "train.yaml"


@pytest.mark.parametrize(
    "line",
    [
        "seed: 2024-01-01",
        "epochs: 1e400",
        f"epochs: {'9' * 5000}",
        "crop: .nan",
        "learning_rate: .inf",
        "val_share: 2024-01-01",
        "output: 3",
        "2024-01-01: 3",
        "? [a, b]\n: 3",
        "train: !!python/object/apply:os.system [ls]",
        "train: !!binary aGk=",
        "model: !!set {a, b}",
        "epochs: " + "[" * 500,
        "seed: 99999999999999999999999",
        "size: 100000000",
        "batch: 0x" + "f" * 400,
        "width: 1000000000000",
    ],
    ids=lambda line: line[:18],
)
def test_an_odd_setting_is_one_line(tmp_path, line):
    with pytest.raises(InputError) as refused:
        load_train_config(saved(tmp_path, f"train: a.json\noutput: b\n{line}\n"))
    one_line(refused.value)
    with pytest.raises(InputError) as refused:
        load_train_config(saved(tmp_path, line.replace("train: ", "val: ") + "\n"))
    one_line(refused.value)


@pytest.mark.parametrize(
    "override", ["epochs=2024-01-01", f"epochs={'9' * 5000}", "seed=[[[", "train=\x00", "a" * 9999]
)
def test_an_odd_override_is_one_line(override):
    with pytest.raises(InputError) as refused:
        load_train_config({"train": "a.json", "output": "b"}, [override])
    one_line(refused.value)


def test_an_alias_bomb_ends_at_once(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
    with pytest.raises(InputError) as refused:
        load_train_config(saved(tmp_path, bomb + "epochs: *a39\n"))
    one_line(refused.value)


SETTING = st.sampled_from([*TrainConfig.model_fields, "epoch", "", "1"])
SCALAR = st.sampled_from(["1", "1.5", "2024-01-01", "yes", "off", "~", ".nan", "&a b", "*a", "!!int x", "1_000", "0o7"])


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_settings_are_read_or_refused(tmp_path, examples):
    @settings(max_examples=examples)
    @given(st.lists(st.tuples(SETTING, SCALAR | st.text(max_size=8) | JSON.map(str)), max_size=5), st.text(max_size=9))
    def check(lines, tail):
        text = "train: a.json\noutput: b\n" + "".join(f"{key}: {value}\n" for key, value in lines) + tail
        try:
            config = load_train_config(saved(tmp_path, text))
        except CalibError as e:
            one_line(e)
        else:
            assert math.isfinite(config.learning_rate) and config.train.is_absolute()

    check()

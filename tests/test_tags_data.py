"""COCO's images and tags: one reader for both layouts, what damage does to a set, batches that repeat, real images."""

import json
import logging
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calib_nb.core.errors import InputError
from calib_nb.data.images import decode
from calib_nb.data.preprocess import PRESETS
from calib_nb.tags.coco import (
    COCO_CATEGORIES,
    EpochBatches,
    TagDataset,
    evaluation_chain,
    image_folder,
    jitter,
    load_coco,
    load_tagged,
    random_crop,
    sound_entries,
    tag_table,
)
from calib_nb.tags.config import load_train_config
from calib_nb.tags.demo_drawings import tagged_images
from calib_nb.tags.evaluate import evaluate_tagger, open_tagger, predict_tags
from calib_nb.tags.task import KINDS, TaggingTask
from calib_nb.tags.train import training_sets

TRUTH = {
    "images": [{"id": k, "file_name": f"{k}.jpg"} for k in range(4)],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
    "annotations": [{"id": k, "image_id": k % 4, "category_id": (3, 9)[k % 2], "iscrowd": k % 2} for k in range(6)],
}
JUNK = st.one_of(
    st.none(),
    st.integers(-5, 20),
    st.text(max_size=4),
    st.floats(allow_nan=False),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["id", "image_id", "category_id", "file_name"]), st.integers(), max_size=3),
)


@settings(deadline=None, derandomize=True)
@given(st.lists(JUNK, max_size=4), st.lists(JUNK, max_size=4))
def test_junk_among_the_entries_is_counted_and_the_rest_is_kept(images, annotations):
    spoiled = TRUTH | {"images": TRUTH["images"] + images, "annotations": TRUTH["annotations"] + annotations}
    sound, faults = sound_entries(spoiled, ".")
    assert len(sound["images"]) + sum(f["where"].startswith("image") for f in faults) == 4 + len(images)
    assert tag_table(sound, ".").iloc[:4, 1:].equals(tag_table(TRUTH, ".").iloc[:, 1:]) or len(sound["annotations"]) > 6
    assert len(sound["annotations"]) + sum(f["where"].startswith("annotation") for f in faults) == 6 + len(annotations)


def test_a_crowd_is_a_tag_and_an_image_without_any_is_a_row_of_zeros():
    table = tag_table(sound_entries(TRUTH | {"annotations": TRUTH["annotations"][1:2]}, ".")[0], ".")
    assert table[["cat", "dog"]].to_numpy().tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tagged_images(tmp_path_factory.mktemp("photos") / "set", 24, size=48, seed=5)


def test_a_sound_set_loads_whole_and_the_short_form_is_the_same(photos):
    tags = load_coco(photos, progress=False)
    assert (
        tags.table.equals(load_tagged(photos))
        and not len(tags.report)
        and np.array_equal(tags.targets, load_tagged(photos).iloc[:, 1:])
    )


def test_every_kind_of_damage_is_named_and_counted(tmp_path, caplog):
    file = tagged_images(tmp_path / "set", 10, size=48)
    truth, folder = json.loads(file.read_text()), file.parent / "images"
    (folder / "000001.jpg").unlink()
    (folder / "000002.jpg").write_bytes(b"")
    (folder / "000003.jpg").write_bytes((folder / "000003.jpg").read_bytes()[:500])
    (folder / "000004.jpg").write_text("not a picture")
    truth["annotations"] += [
        {"id": 77, "image_id": 5, "category_id": 1000},
        {"id": 78, "image_id": 1000, "category_id": 1},
        "junk",
    ]
    truth["images"].append({"id": 99, "file_name": "../secret.jpg"})
    file.write_text(json.dumps(truth))
    with caplog.at_level(logging.WARNING):
        tags = load_coco(file, progress=False)
    assert tags.counts()["count"].to_dict() == {
        "damaged annotation": 1,
        "damaged image": 3,
        "missing image": 1,
        "outside the folder": 1,
        "unknown category id": 1,
        "unknown image id": 1,
    }
    assert len(tags.table) == 6 and {
        "000001.jpg",
        "000002.jpg",
        "000003.jpg",
        "000004.jpg",
        "annotation 77",
        "annotation 78",
        "image 99",
    } <= set(tags.report["where"])
    assert "3 x damaged image" in caplog.text and caplog.text.count("\n") == 1
    for p in folder.glob("*.jpg"):
        p.unlink()
    with pytest.raises(InputError, match="leaves no image to use"):
        load_coco(file, progress=False)
    file.write_text(file.read_text()[:-200])
    with pytest.raises(InputError, match="not valid JSON") as caught:
        load_coco(file, progress=False)
    assert "\n" not in str(caught.value)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_the_parts_of_an_epoch_are_its_batches(photos, per_piece, world, accumulate, epoch):
    parts = world * accumulate
    batch = per_piece * parts
    if photos < batch:
        return
    ranks = [EpochBatches(photos, batch, seed=3, part=r, parts=parts, step=world) for r in range(world)]
    whole = EpochBatches(photos, batch, seed=3)
    for b in (*ranks, whole):
        b.epoch = epoch
    given, wanted = [list(r) for r in ranks], list(whole)
    assert all(len(pieces) == len(r) == len(wanted) * accumulate for pieces, r in zip(given, ranks))
    for k, keys in enumerate(wanted):
        assert sorted(keys) == sorted(
            key for pieces in given for piece in pieces[k * accumulate : (k + 1) * accumulate] for key in piece
        )
    numbers = [n for keys in wanted for _, n in keys]
    assert len(set(numbers)) == len(numbers) == photos // batch * batch


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(8, 90), st.integers(8, 90), st.integers(8, 40), st.floats(0.3, 1), st.floats(0, 0.9), st.integers(0, 99)
)
def test_pieces_have_their_size_whatever_the_photo(height, width, size, crop, strength, seed):
    photo = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    made = [
        jitter(random_crop(photo, size, round(size / crop), rng), strength, rng)
        for rng in (np.random.default_rng(seed) for _ in range(2))
    ]
    assert made[0].shape == (size, size, 3) and made[0].dtype == np.uint8 and np.array_equal(*made)


def test_batches_do_not_depend_on_the_workers(photos):
    from torch.utils.data import DataLoader

    tags = load_coco(photos, progress=False)
    passes = []
    for workers in (0, 2):
        batches = EpochBatches(24, 8, seed=1)
        batches.epoch = 3
        passes.append(list(DataLoader(TagDataset(tags, size=32, seed=1), batch_sampler=batches, num_workers=workers)))
    for one, other in zip(*passes, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other))


def test_the_evaluation_geometry_is_torchvisions(photos):
    bgr = cv2.copyMakeBorder(decode(load_tagged(photos).path[0]), 0, 0, 13, 8, cv2.BORDER_REFLECT)  # 48 x 69
    image = Image.fromarray(bgr[..., ::-1])
    side = 64
    image = image.resize((side * image.width // image.height, side), Image.Resampling.BILINEAR)
    left, top = round((image.width - 56) / 2), round((image.height - 56) / 2)
    wanted = np.asarray(image.crop((left, top, left + 56, top + 56)), np.float32) / 255
    wanted = (wanted - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(evaluation_chain(56)(bgr)[0].transpose(1, 2, 0), wanted, atol=1e-5)
    assert evaluation_chain(56).value_range() == pytest.approx(
        (PRESETS["resnet-tags"].low, PRESETS["resnet-tags"].high)
    )


def coco_layout(instances, folder):
    """The same set as COCO lays it out: annotations/instances_val2017.json and val2017/."""
    (folder / "annotations").mkdir(parents=True)
    shutil.copytree(image_folder(instances), folder / "val2017")
    return Path(shutil.copy(instances, folder / "annotations/instances_val2017.json"))


def test_one_reader_takes_both_layouts_wherever_a_set_is_read(photos, tmp_path):
    truth = json.loads(photos.read_text())
    theirs = coco_layout(photos, tmp_path / "coco")
    stranger = {"id": 900, "image_id": 555, "category_id": 1}
    theirs.write_text(json.dumps(truth | {"annotations": [*truth["annotations"], stranger]}))
    plain, tags = load_coco(photos, progress=False), load_coco(theirs, progress=False)
    assert tags.counts()["count"].to_dict() == {"unknown image id": 1} and np.array_equal(tags.targets, plain.targets)
    assert {Path(p).parent for p in tags.table.path} == {tmp_path / "coco/val2017"}
    chain = evaluation_chain(32)
    for task in (TaggingTask(theirs, chain), TaggingTask(tags.table, chain), KINDS[0].make(theirs, chain)):
        assert task.samples == tags.table.path.tolist() and np.array_equal(task.targets, tags.targets)
    config = load_train_config(None, [f"train={theirs}", f"output={tmp_path}", "val_share=0.5"])
    learn, held = training_sets(config, progress=False)
    assert sorted([*learn.table.path, *held.table.path]) == sorted(tags.table.path)


def test_real_coco_is_read_in_its_own_layout_by_the_task_and_by_training(real_data, tmp_path):
    theirs = coco_layout(real_data / "coco/instances_val.json", tmp_path / "coco")
    tags = load_coco(real_data / "coco/instances_val.json", progress=False)
    task = TaggingTask(theirs, evaluation_chain())
    assert np.array_equal(task.targets, tags.targets) and len(task.samples) == 61
    config = load_train_config(None, [f"train={theirs}", f"output={tmp_path}"])
    assert sum(len(part.table) for part in training_sets(config, progress=False)) == 61


def test_real_coco_loads_whole(real_data):
    for name, photos in (("train", 178), ("val", 61)):
        tags = load_coco(real_data / f"coco/instances_{name}.json", progress=False)
        assert len(tags.table) == photos and not len(tags.report) and tags.classes == tuple(COCO_CATEGORIES.values())
        assert (tags.targets.sum(1) == 0).any() and 2 < tags.targets.sum(1).mean() < 4
    truth = json.loads((real_data / "coco/instances_val.json").read_text())
    assert {c["id"]: c["name"] for c in truth["categories"]} == COCO_CATEGORIES
    wanted = {(a["image_id"], COCO_CATEGORIES[a["category_id"]]) for a in truth["annotations"]}
    ids = [image["id"] for image in truth["images"]]
    assert {(ids[r], tags.classes[c]) for r, c in zip(*tags.targets.nonzero())} == wanted


def test_a_real_detector_is_a_tagger(real_data):
    tags = load_coco(real_data / "coco/instances_val.json", progress=False)
    tagger = open_tagger(real_data / "models/FastestDet_opset13.onnx")
    result = evaluate_tagger(tagger, tags, latency_runs=1, progress=False)
    assert result.map == pytest.approx(0.706, abs=0.002) and result.photos == 61
    said = predict_tags(tagger, tags.table.path[0])
    assert tags.table.loc[0, said.tag[0]] == 1 and said.probability[0] > 0.5


@pytest.mark.slow
def test_a_real_detector_in_int8_goes_through_the_same_comparison(real_data, tmp_path):
    from calib_nb.analysis.compare import compare_models
    from calib_nb.quant.recipe import quantize_by

    model, val = (
        real_data / "models/FastestDet_opset13.onnx",
        load_coco(real_data / "coco/instances_val.json", progress=False),
    )
    tagger = open_tagger(model)
    calibration = load_coco(real_data / "coco/instances_train.json", progress=False).table.path.tolist()[:100]
    int8 = quantize_by(
        "minmax", model, calibration, tagger.preprocess, tmp_path / "int8.onnx", progress=False
    ).model.path
    done = compare_models(
        model, {"int8": int8}, tagger.task(val.table, tagger.preprocess), bootstrap=200, latency_runs=2, progress=False
    )
    assert (
        done.table["map"][0] == pytest.approx(0.706, abs=0.002)
        and done.primary == "map"
        and done.table["drop"][1] < 0.1
    )
    assert evaluate_tagger(open_tagger(int8), val, latency_runs=1, progress=False).map == pytest.approx(
        done.table["map"][1], abs=1e-9
    )

"""Functions that are mapped may run twice, on any machine: they write nothing, and the same table comes back."""

import ast
import importlib
import os
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

import calib_nb
from calib_nb.api import face_vectors
from calib_nb.core import parallel
from calib_nb.core.parallel import parallel_map
from calib_nb.data.audit import audit_folder
from calib_nb.data.copies import shared_pictures
from calib_nb.data.duplicates import hash_images
from calib_nb.data.images import decode
from calib_nb.data.score import score_folder
from calib_nb.depth.demo_drawings import cached_ncdb, demo_ncdb
from calib_nb.depth.metadata import metadata
from calib_nb.explore.pictures import thumbnails
from calib_nb.faces.demo import demo_detector, demo_embedder
from calib_nb.faces.detect import detect_opencv
from calib_nb.faces.detectors import FaceDetector
from calib_nb.faces.embed import Embedder, centre_crop, embed_images
from calib_nb.faces.vectors import embed_crops
from calib_nb.graph.build import conv, linear, sequential
from calib_nb.quant.observe import observe
from calib_nb.tags.coco import load_coco
from calib_nb.tags.demo_drawings import tagged_images


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for k in range(6):
        cv2.imwrite(str(folder / f"{k}.jpg"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return folder


def paths_in(folder) -> list:
    return sorted(folder.glob("*.jpg"))


def opened_detector() -> FaceDetector:
    return FaceDetector("yunet", model=demo_detector())


def look_for_vectors(folder):
    return face_vectors(folder, [p.name for p in paths_in(folder)], Embedder(demo_embedder()), progress=False)


def look_for_copies(folder):
    names = [p.name for p in paths_in(folder)]
    return shared_pictures((folder, names), (folder, names[:2]), progress=False)


def check_tags(folder):
    tags = folder.parent / "tags"
    if not tags.exists():
        tagged_images(tags, 12, size=64)
    return load_coco(tags / "instances.json", check="decode", progress=False)


def embed_loaded(folder):
    network = Embedder(demo_embedder())
    return embed_crops(network, paths_in(folder), lambda p: centre_crop(decode(p), network.size), progress=False)


MAPPED = {  # every place of the package that maps a function, and a call that leads there, on a folder of images
    "api.face_vectors": look_for_vectors,
    "core.machine._probe_cluster": lambda folder: list(parallel_map((1).__add__, [1], progress=False)),
    "data.audit._read_folder": lambda folder: audit_folder(folder, progress=False),
    "data.copies._views_of": look_for_copies,
    "data.duplicates.hash_images": lambda folder: hash_images(folder, [p.name for p in paths_in(folder)]),
    "data.score.score_folder": lambda folder: score_folder(folder, progress=False),
    "depth.metadata.metadata": lambda folder: metadata(cached_ncdb().root, "val_split.json", progress=False),
    "explore.pictures.thumbnails": lambda folder: thumbnails(paths_in(folder), progress=False),
    "faces.detect.detect_opencv": lambda folder: detect_opencv(demo_detector(), paths_in(folder), progress=False),
    "faces.detectors.FaceDetector": lambda folder: opened_detector().detect_batch(paths_in(folder), progress=False),
    "faces.embed._batches": lambda folder: embed_images(
        opened_detector(),
        folder,
        [p.name for p in paths_in(folder)],
        {"demo": Embedder(demo_embedder())},
        progress=False,
    ),
    "faces.vectors.embed_crops": embed_loaded,
    "quant.observe._Pass": None,  # see test_observing_on_a_worker_writes_nothing
    "tags.coco.load_coco": check_tags,
}
WRITERS = {  # what their functions write is a folder of each item's own, which is whole or absent
    "batch.run_all",
    "depth.demo_drawings.demo_ncdb",
}


def test_every_mapped_function_is_among_those_that_are_watched():
    package, places = Path(calib_nb.__file__).parent, set()
    for path in package.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        for top in ast.parse(code).body if "parallel_map(" in code or "map_and_merge(" in code else ():
            calls = [getattr(node.func, "id", "") for node in ast.walk(top) if isinstance(node, ast.Call)]
            if {"parallel_map", "map_and_merge"} & set(calls):
                places.add(".".join([*path.relative_to(package).with_suffix("").parts, getattr(top, "name", "")]))
    assert places == set(MAPPED) | WRITERS


def watch_writes(*modules) -> None:
    """Note in `sys.calib_nb_written` what `run_batch` of these modules writes, until `watch_writes()`."""
    at_work, written = threading.local(), []
    sys.calib_nb_written = written

    def noted(event, arguments):
        if not getattr(at_work, "now", False) or sys.calib_nb_written is not written:
            return
        if event == "open" and isinstance(arguments[1], str):
            if set(arguments[1]) & set("wax+") and arguments[0] != os.devnull:
                written.append(str(arguments[0]))
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate"):
            written.append(str(arguments[0]))

    def watched(*arguments):
        at_work.now = True
        try:
            return run_batch(*arguments)
        finally:
            at_work.now = False

    from calib_nb.core.parallel import run_batch

    for name in modules:
        importlib.import_module(name).run_batch = watched
    if modules:
        sys.addaudithook(noted)  # stays, and is silent outside of a batch


def what_was_written() -> list[str]:
    return sys.calib_nb_written


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(parallel, "run_batch", parallel.run_batch)  # put back afterwards
    yield lambda: watch_writes("calib_nb.core.parallel")
    watch_writes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, call in MAPPED.items() if call])
def test_mapped_functions_write_nothing(name, photos, watched):
    MAPPED[name](photos)  # what is opened or compiled once
    before = {p: p.read_bytes() for p in photos.rglob("*")}
    watched()
    MAPPED[name](photos)
    assert what_was_written() == [] and {p: p.read_bytes() for p in photos.rglob("*")} == before


def test_the_watch_sees_what_is_written(watched, tmp_path):
    watched()
    list(parallel_map(lambda x: (tmp_path / str(x)).write_text("x"), range(2), progress=False))
    assert sorted(what_was_written()) == [str(tmp_path / "0"), str(tmp_path / "1")]


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    from calib_nb.core.cluster import cluster

    with cluster("local:2") as client:
        yield client


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.mark.slow
def test_observing_on_a_worker_writes_nothing(client, photos):
    from calib_nb.core.cluster import cluster

    network = sequential(conv(4), "Relu", "GlobalAveragePool", linear(3), shape=(1, 3, 48, 64), seed=0)
    with cluster(client):
        observe(network, paths_in(photos), scale, progress=False)  # what is sent, opened or compiled once
        client.run(watch_writes, "calib_nb.core.merge")
        observe(network, paths_in(photos), scale, progress=False)
        written = client.run(what_was_written)
    client.run(watch_writes)
    assert written and all(names == [] for names in written.values())


@pytest.mark.slow
def test_metadata_of_a_depth_set_equals_the_local_one(client, tmp_path):
    from test_cluster import Killer

    from calib_nb.core.cluster import cluster

    demo_ncdb(tmp_path / "set", frames=60, size=(48, 64), broken=True, progress=False)
    near = metadata(tmp_path / "set", progress=False)
    assert len(near.rejected) > 5 and len(near.table) > 30
    with cluster(client):
        far = metadata(tmp_path / "set", progress=False, journal=tmp_path / "journal")
        killer = Killer(client, 5, seed=4, pause=(0.2, 1.5))
        while killer.is_alive():
            again = metadata(tmp_path / "set", progress=False)
    for name in ("table", "rejected", "doubtful"):
        assert getattr(far, name).equals(getattr(near, name)) and getattr(again, name).equals(getattr(near, name))
    assert far.guesses == near.guesses

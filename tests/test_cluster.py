"""The map on a cluster of processes: equal to the local one, whatever dies on the way."""

import functools
import os
import signal
import threading
import time

import cv2
import numpy as np
import pytest

distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")

from calib_nb.core import cluster as module  # noqa: E402
from calib_nb.core.cluster import cluster  # noqa: E402
from calib_nb.core.errors import InputError  # noqa: E402
from calib_nb.core.parallel import parallel_map  # noqa: E402
from calib_nb.data import score  # noqa: E402
from calib_nb.data.duplicates import hash_images  # noqa: E402


@pytest.fixture(scope="module")
def client():
    with cluster("local:2") as client:
        yield client


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("cluster") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for k in range(40):
        cv2.imwrite(str(folder / f"{k:02d}.jpg"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    (folder / "torn.jpg").write_bytes((folder / "00.jpg").read_bytes()[:300])
    return folder


def pids(client) -> list[int]:
    return list(client.run(os.getpid).values())


def slowly(seconds: float, x: int) -> int:
    time.sleep(seconds)
    return -x


def test_tables_equal_the_local_ones(client, photos):
    table, paths = score.score_folder(photos, progress=False), sorted(p.name for p in photos.iterdir())
    hashes = hash_images(photos, paths, progress=False)
    with cluster(client):
        assert score.score_folder(photos, progress=False).equals(table)
        assert hash_images(photos, paths, progress=False).equals(hashes)


def test_a_killed_worker_loses_nothing(client):
    with cluster(client):
        results = parallel_map(functools.partial(slowly, 0.005), range(200), progress=False)
        first = next(results)
        os.kill(pids(client)[0], signal.SIGKILL)
        assert [first, *results] == [-x for x in range(200)]


def test_an_image_that_kills_its_process_is_named_and_the_others_are_measured(client, photos, monkeypatch):
    measure = score.measure_file

    def deadly(root, side, path):
        if path == "17.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(root, side, path)

    deadly.lost = measure.lost
    expected = score.score_folder(photos, progress=False)
    monkeypatch.setattr(score, "measure_file", deadly)
    with cluster(client):
        table = score.score_folder(photos, progress=False)
    assert table.error[17] == "ends the process that reads it" and np.isnan(table.quality[17])
    assert table.drop(index=17).equals(expected.drop(index=17))


def test_an_error_names_its_item_and_what_was_done_is_kept(client, tmp_path):
    def careful(x):
        if x == 30:
            raise InputError("no thirty")
        return x

    with cluster(client):
        with pytest.raises(InputError, match="no thirty") as error:
            list(parallel_map(careful, range(60), progress=False, journal=tmp_path / "j"))
        assert "item 30" in error.value.__notes__[0]
    kept = list(parallel_map(lambda x: x, range(30), progress=False, journal=tmp_path / "j"))  # and here it goes on
    assert kept == list(range(30)) and (tmp_path / "j").read_bytes().count(b"\n") >= 31


def test_a_scheduler_that_is_gone_is_one_line(tmp_path):
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as here:
        client = distributed.Client(here)
        with cluster(client), pytest.raises(InputError, match="scheduler cannot be reached"):
            results = parallel_map(functools.partial(slowly, 0.01), range(300), progress=False, journal=tmp_path / "j")
            next(results)
            threading.Thread(target=here.close).start()
            list(results)
        client.close()
    assert (tmp_path / "j").read_bytes().count(b"\n") >= 2


def test_workers_with_other_libraries_are_refused(client, monkeypatch):
    monkeypatch.setattr(module, "versions", lambda: {"python": str(os.getpid())})  # each process has its own
    with pytest.raises(InputError, match=f"expected python {os.getpid()}, as here"), cluster(client):
        pass


@pytest.mark.slow
def test_workers_killed_at_twenty_moments(client, photos):
    expected, rng, ended = score.score_folder(photos, progress=False), np.random.default_rng(1), threading.Event()
    kills = []

    def killer():
        while not ended.is_set() and len(kills) < 20:
            time.sleep(rng.uniform(0.2, 1.5))
            kills.append(os.kill(rng.choice(pids(client)), signal.SIGKILL))

    thread = threading.Thread(target=killer)
    thread.start()
    with cluster(client):
        while len(kills) < 20:
            assert score.score_folder(photos, progress=False).equals(expected)
    ended.set()
    thread.join()

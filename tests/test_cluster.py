"""The map on a cluster of processes: equal to the local one, whatever dies on the way."""

import contextlib
import contextvars
import functools
import os
import pickle
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import nbformat
import numpy as np
import pytest

distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")

from calib_nb.batch import run_all  # noqa: E402
from calib_nb.core import cluster as module  # noqa: E402
from calib_nb.core.cluster import cluster, file_of, joining, named_file  # noqa: E402
from calib_nb.core.errors import CalibError, InputError  # noqa: E402
from calib_nb.core.merge import map_and_merge  # noqa: E402
from calib_nb.core.parallel import parallel_map, processor, processors  # noqa: E402
from calib_nb.data import score  # noqa: E402
from calib_nb.data.duplicates import hash_images  # noqa: E402
from calib_nb.faces.demo import demo_detector, demo_embedder, demo_lfw  # noqa: E402
from calib_nb.faces.detectors import FaceDetector  # noqa: E402
from calib_nb.faces.embed import Embedder, embed_images  # noqa: E402
from calib_nb.graph.build import conv, linear, sequential  # noqa: E402
from calib_nb.quant.observe import ObserveOptions, observe  # noqa: E402
from calib_nb.quant.stats import read_stats  # noqa: E402
from calib_nb.report import run_report  # noqa: E402


@pytest.fixture(scope="module")
def workers():
    with cluster("local:2") as client:
        yield client


@pytest.fixture
def client(workers):
    """Two workers that answer: those that the test before killed may need seconds to start again."""
    end = time.monotonic() + 120
    while len(workers.run(os.getpid, on_error="ignore")) < 2:
        assert time.monotonic() < end, "a killed worker was not started again"
        time.sleep(0.1)
    return workers


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


def test_an_image_that_kills_its_process_is_named_and_the_others_are_measured(client, photos, monkeypatch, tmp_path):
    measure = score.measure_file

    def deadly(root, side, path):
        if path == "17.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(root, side, path)

    deadly.lost = measure.lost
    few = tmp_path / "few"
    few.mkdir()
    for path in [*sorted(photos.glob("1[3-8].jpg")), photos / "torn.jpg"]:
        (few / path.name).write_bytes(path.read_bytes())
    expected = score.score_folder(few, progress=False)
    monkeypatch.setattr(score, "measure_file", deadly)
    with cluster(client):
        table = score.score_folder(few, progress=False)
    assert table.error[4] == "ends the process that reads it" and np.isnan(table.quality[4])
    assert table.drop(index=4).equals(expected.drop(index=4))


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


@pytest.mark.slow  # a cluster for this test alone
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
    with pytest.raises(InputError, match=f"expected python {os.getpid()}, as the caller has"), cluster(client):
        pass


def test_a_worker_with_other_libraries_that_joins_late_is_refused(client, monkeypatch):
    with cluster(client):
        assert processors()[processor()] == 3, "this process, and two workers"
        here = module.versions()
        monkeypatch.setattr(module, "versions", lambda: here | {"python": "2.7"})  # sent so, now
        with pytest.raises(InputError, match="joined late, has python 3.*; expected python 2.7, as the"):
            list(parallel_map(abs, range(9), progress=False))


class Killer(threading.Thread):
    """Kills workers of a cluster at drawn moments, until there were `count` of them."""

    def __init__(self, client, count: int, seed: int, pause: tuple[float, float]):
        super().__init__(daemon=True)
        self.client, self.count, self.rng, self.pause, self.kills = client, count, np.random.default_rng(seed), pause, 0
        self.start()

    def run(self):
        while self.kills < self.count:
            time.sleep(self.rng.uniform(*self.pause))
            with contextlib.suppress(Exception):  # a worker is starting again, or has just ended
                os.kill(self.rng.choice(list(self.client.run(os.getpid, on_error="ignore").values())), signal.SIGKILL)
                self.kills += 1


@pytest.mark.slow
def test_workers_killed_at_twenty_moments(client, photos):
    expected = score.score_folder(photos, progress=False)
    with cluster(client):
        killer = Killer(client, 20, seed=1, pause=(0.2, 1.5))
        while killer.is_alive():
            assert score.score_folder(photos, progress=False).equals(expected)


# --- observing


CHANNELS = {"options": ObserveOptions(per_channel=["relu0"]), "tensors": ["relu0", "y"], "progress": False}


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def network():
    return sequential(conv(4), "Relu", "GlobalAveragePool", linear(3), shape=(1, 3, 48, 64), seed=0)


@pytest.fixture(scope="module")
def observed(network, photos):
    return observe(network, sorted(photos.glob("[0-3]*.jpg")), scale, **CHANNELS)


@pytest.mark.slow  # the workers load the compiled kernels
def test_an_observation_equals_the_local_one(client, network, photos, observed):
    paths = sorted(photos.glob("[0-3]*.jpg"))
    arrays = [cv2.imread(str(path)) for path in paths]
    with cluster(client):
        assert observe(network, paths, scale, **CHANNELS) == observed
        far = observe(network, iter(arrays), scale, **CHANNELS)
    assert far == observe(network, arrays, scale, **CHANNELS)


@pytest.mark.slow
def test_workers_killed_while_observing(client, network, photos, observed):
    paths = sorted(photos.glob("[0-3]*.jpg"))

    def slow(bgr):
        time.sleep(0.02)
        return scale(bgr)

    with cluster(client):
        killer = Killer(client, 20, seed=2, pause=(1, 6))
        while killer.is_alive():
            assert observe(network, paths, slow, **CHANNELS) == observed


@pytest.mark.slow
def test_an_image_that_kills_while_it_is_observed_is_named_and_the_others_are_kept(client, network, photos, tmp_path):
    paths = sorted(photos.glob("[0-3]*.jpg"))
    deadly = cv2.imread(str(paths[17]))

    def kills(bgr):
        if np.array_equal(bgr, deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        return scale(bgr)

    with cluster(client), pytest.raises(InputError, match="each process that worked on it was killed") as error:
        observe(network, paths, kills, journal=tmp_path / "j.npz", **CHANNELS)
    assert "17.jpg" in error.value.__notes__[0]
    assert len(read_stats(tmp_path / "j.npz").images) >= 8


CALLER = """
import sys
import numpy as np
from calib_nb.core.cluster import cluster
from calib_nb.quant.observe import ObserveOptions, observe
sys.path.insert(0, {tests!r})
from test_cluster import CHANNELS, scale, sequential, conv, linear
if __name__ == "__main__":
    network = sequential(conv(4), "Relu", "GlobalAveragePool", linear(3), shape=(1, 3, 48, 64), seed=0)
    def slow(bgr):
        import time
        time.sleep(0.05)
        return scale(bgr)
    options = ObserveOptions(per_channel=["relu0"], save_every=2)
    with cluster("local:2"):
        observe(network, sys.argv[2:], slow, journal=sys.argv[1], **(CHANNELS | {{"options": options}}))
"""


@pytest.mark.slow
def test_a_killed_caller_goes_on_from_its_journal(network, photos, observed, tmp_path):
    paths, journal, code = sorted(photos.glob("[0-3]*.jpg")), tmp_path / "j.npz", tmp_path / "caller.py"
    code.write_text(CALLER.format(tests=os.path.dirname(__file__)))
    caller = subprocess.Popen([sys.executable, str(code), str(journal), *map(str, paths)], start_new_session=True)
    until = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    kept = len(read_stats(journal).images)
    assert 0 < kept < 40
    assert observe(network, paths, scale, journal=journal, **CHANNELS) == observed


class Named:
    """Something that is made of a file."""

    def __init__(self, path):
        self.path = path

    def __getstate__(self):
        return named_file(self.path)

    def __setstate__(self, state):
        self.path = file_of(*state)

    def __call__(self, x):
        return x, str(self.path), self.path.read_bytes()


def see_only_what_was_sent():
    module._digest_of = lambda path, size, time_ns: module.sha256_file(path) if "/sent/" in path else ""


@pytest.mark.slow  # the workers are started again
def test_a_file_is_sent_to_workers_that_lack_it(client, tmp_path):
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    for path in (one, two):
        path.write_bytes(b"weights" + os.urandom(8))
    with cluster(client):
        here = list(parallel_map(Named(one), range(3), progress=False))
        assert here == [(x, str(one), one.read_bytes()) for x in range(3)]
        client.run(see_only_what_was_sent)
        sent = list(parallel_map(Named(two), range(3), progress=False))
    assert [(x, data) for x, _, data in sent] == [(x, two.read_bytes()) for x in range(3)]
    assert all("/sent/" in path for _, path, _ in sent)
    client.restart()


def test_results_are_merged_on_the_workers(client):
    def halved(numbers):
        return [x for x in numbers if x % 2]

    def joined(*parts):
        return sorted(x for part in parts for x in part)

    shards = [list(range(k, k + 10)) for k in range(0, 200, 10)]
    with cluster(client):
        answers = list(map_and_merge(halved, iter(shards), joined))
    assert len(answers) == 3 and all(error is None and len(values) == 1 for values, error in answers)
    assert sorted(x for values, _ in answers for x in values[0]) == list(range(1, 200, 2))


# --- what does not travel


def test_a_network_and_a_detector_are_packed_as_their_files(tmp_path, monkeypatch):
    embedder, detector = Embedder(demo_embedder()), FaceDetector("yunet", model=demo_detector(), score_threshold=0.4)
    packed = pickle.dumps((embedder, detector))
    assert len(packed) < 2000
    (one, found), (other, _) = pickle.loads(packed), pickle.loads(packed)
    assert one is other and one.name == embedder.name, "opened once, and kept"
    crops = list(np.random.default_rng(0).integers(0, 256, (2, embedder.size, embedder.size, 3), dtype=np.uint8))
    assert np.array_equal(one(crops), embedder(crops))
    photo = cv2.imread(str(next(demo_lfw().rglob("*.jpg"))))
    assert np.array_equal(found.find(photo, "bgr").boxes, detector.find(photo, "bgr").boxes)
    assert found.thresholds == detector.thresholds


@pytest.mark.slow
def test_faces_are_embedded_as_locally_while_workers_are_killed(client, tmp_path):
    folder = demo_lfw()
    photos = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))[:200]
    networks = {"demo": Embedder(demo_embedder())}
    detector = FaceDetector("yunet", model=demo_detector())
    how = {"batch_size": 16, "progress": False}
    near = embed_images(detector, folder, photos, networks, **how)
    seen = ["state", "reason", "score"]
    with cluster(client):
        far = embed_images(detector, folder, photos, networks, journal=tmp_path / "journal", **how)
        assert np.array_equal(far.embeddings["demo"], near.embeddings["demo"], equal_nan=True)
        assert far.photos[seen].equals(near.photos[seen])
        killer = Killer(client, 4, seed=3, pause=(2, 6))
        while killer.is_alive():
            far = embed_images(detector, folder, photos, networks, **how)
            assert np.array_equal(far.embeddings["demo"], near.embeddings["demo"], equal_nan=True)


@pytest.mark.slow
def test_a_worker_that_joins_late_gets_work():
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as here:
        client = distributed.Client(here)
        with cluster(client):
            results = parallel_map(where_it_ran, range(400), progress=False)
            first = next(results)
            here.scale(2)
            places = {first, *results}
        client.close()
    assert len(places) == 2


def where_it_ran(x: int) -> int:
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.slow
def test_quantize_on_a_cluster_writes_the_same_bytes(photos, tmp_path):
    from calib_nb.cli import main
    from calib_nb.graph.fixed import fix_batch

    model = fix_batch(demo_embedder(), tmp_path / "model.onnx")
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(photos.glob("[0-3]*.jpg"))[:16]:
        (images / path.name).write_bytes(path.read_bytes())
    config = ["--model-type", "edgeface", "--dataset-path", str(images), "--model", str(model)]
    assert main(["config", *config, "--output-path", str(tmp_path / "c.json"), "--calibration-num", "16"]) == 0
    line = ["quantize", "--model", str(model), "--config", str(tmp_path / "c.json"), "--method", "minmax", "--output"]
    assert main([*line, str(tmp_path / "near.onnx")]) == 0
    assert main([*line, str(tmp_path / "far.onnx"), "--cluster", "local:2"]) == 0
    assert (tmp_path / "far.onnx").read_bytes() == (tmp_path / "near.onnx").read_bytes()


def where_notebook(path):
    """A notebook that writes where its work was done."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    parameters = nbformat.v4.new_code_cell('run_dir = ""', metadata={"tags": ["parameters"]})
    source = (
        "import os\nfrom pathlib import Path\nfrom calib_nb.core.parallel import parallel_map\n"
        "found = set(parallel_map(lambda _: os.getpid(), range(4), progress=False))\n"
        "Path(run_dir, 'where.txt').write_text(' '.join(map(str, found)))"
    )
    notebook.cells = [parameters, nbformat.v4.new_code_cell(source)]
    nbformat.write(notebook, path)


@pytest.mark.slow  # a kernel and what it imports
def test_a_report_uses_the_cluster_that_is_in_use(client, tmp_path):
    where_notebook(tmp_path / "where.ipynb")
    with cluster(client):
        far = run_report(str(tmp_path / "where.ipynb"), folder=tmp_path / "far", progress=False)
    notebook, alone = str(tmp_path / "where.ipynb"), contextvars.Context()  # the module's client is not in use there
    near = alone.run(run_report, notebook, folder=tmp_path / "near", progress=False)
    assert set(map(int, (far.folder / "where.txt").read_text().split())) <= set(pids(client))
    assert not set(map(int, (near.folder / "where.txt").read_text().split())) & set(pids(client))


TLS_WORK = """
import os, sys
from pathlib import Path
from calib_nb.core.cluster import cluster
from calib_nb.core.errors import InputError
from calib_nb.report import run_report
address, notebook, folder = sys.argv[1:]
try:
    with cluster(address):
        done = run_report(notebook, folder=Path(folder), progress=False)
    print((done.folder / "where.txt").read_text())
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_reports_use_a_cluster_whose_certificates_are_in_memory(tmp_path):
    from distributed import Client, LocalCluster, Security

    where_notebook(tmp_path / "where.ipynb")
    (tmp_path / "all.yaml").write_text(f"- report: {tmp_path / 'where.ipynb'}\n")
    security = Security.temporary()
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, security=security, dashboard_address=None) as local,
        Client(local.scheduler_address, security=security) as client,
        cluster(client),
    ):
        far = run_report(str(tmp_path / "where.ipynb"), folder=tmp_path / "far", progress=False)
        assert list(map(int, (far.folder / "where.txt").read_text().split())) == pids(client)
        _, runs = run_all(tmp_path / "all.yaml", root=tmp_path / "all", progress=False)
        assert list(runs.state) == ["run"] and list(runs.error) == [""]
        client.security = Security.temporary()  # of another authority: the kernel is not let in
        with pytest.raises(CalibError, match="failed: no scheduler answers at tls://") as refused:
            run_report(str(tmp_path / "where.ipynb"), folder=tmp_path / "not", progress=False)
        assert "\n" not in str(refused.value) and not (tmp_path / "not").exists()


def test_a_kernel_gets_certificates_in_a_file_of_this_user_or_the_reason_why_not():
    from distributed import Security

    security = Security(tls_ca_file="CA\n", tls_client_cert="CERT\n", tls_client_key="KEY\n")
    context = Security(extra_conn_args={"ssl_context": ssl.create_default_context()})

    def join(address, security):
        client = SimpleNamespace(scheduler=SimpleNamespace(address=address), security=security)
        module.current_engine.set(functools.partial(module._Cluster, client))
        with joining() as first:
            assert address in first and "KEY" not in first
            folder = Path(first.split("'")[-2])
            assert os.name != "posix" or folder.stat().st_mode & 0o077 == 0
            assert pickle.loads((folder / "security").read_bytes()).tls_client_key == "KEY\n"
        assert not folder.exists()
        with pytest.raises(InputError, match="^not let in$"), joining() as first:
            Path(first.split("'")[-2], "refused").write_text("not let in")
            raise RuntimeError("the kernel died")

    contextvars.copy_context().run(join, "tls://127.0.0.1:9", security)
    for address, given, said in (("tls://h:1", context, "certificates"), ("inproc://h/1", security, "--cluster local")):
        with pytest.raises(InputError, match=said):
            contextvars.copy_context().run(join, address, given)


@pytest.mark.slow
def test_a_report_uses_a_cluster_with_tls_by_the_certificates_of_dasks_configuration(tmp_path):
    from distributed import LocalCluster, Security

    where_notebook(tmp_path / "where.ipynb")
    security, certificates = Security.temporary(), {}
    for role, name, text in [
        ("CA_FILE", "ca.pem", security.tls_ca_file),
        *((f"{role}__CERT", "cert.pem", security.tls_client_cert) for role in ("CLIENT", "WORKER", "SCHEDULER")),
        *((f"{role}__KEY", "key.pem", security.tls_client_key) for role in ("CLIENT", "WORKER", "SCHEDULER")),
    ]:
        (tmp_path / name).write_text(text)
        certificates[f"DASK_DISTRIBUTED__COMM__TLS__{role}"] = str(tmp_path / name)
    with LocalCluster(n_workers=1, threads_per_worker=1, security=security, dashboard_address=None) as local:
        ids = [str(worker.pid) for worker in local.workers.values()]
        words = [sys.executable, "-c", TLS_WORK, local.scheduler_address, str(tmp_path / "where.ipynb")]
        said = [
            subprocess.run([*words, str(tmp_path / f"run{k}")], env=os.environ | extra, capture_output=True, text=True)
            for k, extra in enumerate((certificates, {}))
        ]
    assert local.scheduler_address.startswith("tls://") and said[0].stdout.split() == ids, said[0].stderr[-500:]
    assert "no certificates for tls://" in said[1].stdout and "Traceback" not in said[1].stderr

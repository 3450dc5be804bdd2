"""Images on a web server and in an object store, both on 127.0.0.1: the rows are those of the folder."""

import base64
import functools
import hashlib
import http.server
import io
import os
import re
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

fsspec = pytest.importorskip("fsspec", reason="the extra remote is not installed")

from calib_nb.core import remote  # noqa: E402
from calib_nb.core.errors import ImageError, InputError, for_user  # noqa: E402
from calib_nb.core.remote import file_key, join, read_ahead, read_far, sha256_far  # noqa: E402
from calib_nb.core.run import sha256_file  # noqa: E402
from calib_nb.data.audit import audit_folder  # noqa: E402
from calib_nb.data.dataset import prepare  # noqa: E402
from calib_nb.data.duplicates import hash_images  # noqa: E402
from calib_nb.data.images import find_images, passed_over, read_image_bytes  # noqa: E402
from calib_nb.data.score import score_folder  # noqa: E402


class Slow(http.server.ThreadingHTTPServer):
    """A web server that answers after a while, and counts what it was asked for, and how much of it at once."""

    def __init__(self, folder, latency=0.0):
        pytest.importorskip("aiohttp", reason="the extra remote is not installed")
        server, self.latency, self.asked = self, latency, []
        self.busy, self.most, self.lock = 0, 0, threading.Lock()

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def send_head(self):
                with server.lock:
                    server.asked.append(self.path)
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                time.sleep(server.latency)
                with server.lock:
                    server.busy -= 1
                return super().send_head()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def write_photos(folder, count, size=(48, 64)):
    rng = np.random.default_rng(0)
    for k in range(count):
        cv2.imwrite(
            str(folder / f"{k:03d}.jpg"), cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), size[::-1])
        )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "photos"
    (folder / "day 1" / ".hidden").mkdir(parents=True)
    write_photos(folder, 20)
    write_photos(folder / "day 1", 3)
    large = np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "large.png"), large)  # does not arrive in one piece
    (folder / "day 1" / "ä+&#.jpg").write_bytes((folder / "001.jpg").read_bytes())
    (folder / "day 1" / ".hidden" / "no.jpg").write_bytes(b"x")
    (folder / "torn.jpg").write_bytes((folder / "000.jpg").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "film.mov").write_bytes(b"film")
    return folder


@pytest.fixture(scope="module")
def web(photos):
    server = Slow(photos)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def bucket(photos):
    pytest.importorskip("s3fs", reason="the extra remote is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    import s3fs

    kept = {k: os.environ.get(k) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")}
    store = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    os.environ.update(dict(zip(kept, ("test", "test", f"http://{host}:{port}"))), AWS_DEFAULT_REGION="us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    remote._system.cache_clear()
    system = fsspec.filesystem("s3")
    system.mkdir("photos")
    for path in photos.rglob("*"):
        if path.is_file():
            system.pipe_file(f"photos/all/{path.relative_to(photos).as_posix()}", path.read_bytes())
    yield "s3://photos/all"
    store.stop()
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


class LikeGoogle(fsspec.AbstractFileSystem):
    """A folder that answers as gcsfs does: sizes, ETags and generations, FileNotFoundError, ranges."""

    protocol, cachable = ("gs", "gcs"), False

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def info(self, path, **_):
        path = self._strip_protocol(path)
        file = self.folder / path.removeprefix("photos/all").strip("/")
        if not file.exists():
            raise FileNotFoundError(path)
        if file.is_dir():
            return {"name": path, "size": 0, "type": "directory", "storageClass": "DIRECTORY"}
        etag = hashlib.md5(file.read_bytes()).hexdigest()
        return {"name": path, "size": file.stat().st_size, "type": "file", "etag": etag, "generation": "1"}

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        folder = self.folder / path.removeprefix("photos/all").strip("/")
        if not folder.is_dir():
            raise FileNotFoundError(path)
        return [self.info(f"{path}/{file.name}") for file in folder.iterdir()]

    def _open(self, path, mode="rb", **_):
        return io.BytesIO((self.folder / path.removeprefix("photos/all/")).read_bytes())

    def cat_file(self, path, start=None, end=None, **_):
        self.info(path)
        return self._open(self._strip_protocol(path)).read()[start:end]


@pytest.fixture(scope="module")
def google(photos):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks by gRPC, which the emulator does not speak
        pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
        store = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="photos")
        store.start()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{store._api._httpd.server_port}")
        remote._system.cache_clear()
        system = fsspec.filesystem("gs")
        for path in photos.rglob("*"):
            if path.is_file():
                system.pipe_file(f"photos/all/{path.relative_to(photos).as_posix()}", path.read_bytes())
        yield "gs://photos/all"
        remote._system.cache_clear()
    store.stop()


SLOW_STORES = [pytest.param(name, marks=pytest.mark.slow) for name in ("s3", "gcs")]  # their servers take a while


@pytest.fixture(params=["file", "http", "gs", *SLOW_STORES])
def root(request, photos, monkeypatch):
    if request.param in ("s3", "gcs"):
        return request.getfixturevalue({"s3": "bucket", "gcs": "google"}[request.param])
    if request.param == "gs":
        system = LikeGoogle(photos)
        monkeypatch.setattr(remote, "_system", lambda scheme: system)
        return "gs://photos/all"
    return photos.as_uri() if request.param == "file" else request.getfixturevalue("web").url


def test_rows_are_those_of_the_folder(root, photos, tmp_path):
    near = score_folder(photos, progress=False)
    assert find_images(root) == find_images(photos) and passed_over(root) == passed_over(photos) == {".mov": 1}
    assert score_folder(root, workers=2, progress=False).equals(near)
    assert score_folder(root, progress=False, journal=tmp_path / "journal").equals(near)
    paths = list(near.path)
    assert hash_images(root, paths, progress=False).equals(hash_images(photos, paths, progress=False))
    assert sha256_far(join(root, "day 1/002.jpg")) == sha256_file(photos / "day 1" / "002.jpg")


def test_the_journal_notices_a_file_that_has_changed(tmp_path):
    write_photos(tmp_path, 3)
    server = Slow(tmp_path)
    score_folder(server.url, progress=False, journal=tmp_path / "journal")
    server.asked.clear()
    score_folder(server.url, progress=False, journal=tmp_path / "journal")
    reads = [path for path in server.asked if path.endswith("jpg")]
    assert len(reads) == len(set(reads)) == 3, "asked for size and time only"
    before = file_key(server.url, "000.jpg")
    remote._content.clear()
    cv2.imwrite(str(tmp_path / "000.jpg"), np.zeros((9, 9, 3), np.uint8))
    assert file_key(server.url, "000.jpg") != before
    server.shutdown()


def test_what_cannot_be_read_is_one_line(root, photos):
    for url, limit, reason in ((join(root, "none.jpg"), 1e6, "missing"), (join(root, "000.jpg"), 100, "too_large")):
        with pytest.raises(ImageError) as refused:
            read_far(url, limit)
        assert refused.value.reason == reason and "\n" not in str(refused.value)
    with pytest.raises(ImageError) as refused:
        read_image_bytes(join(root, "empty.jpg"))
    assert refused.value.reason == "empty"
    with pytest.raises(InputError, match="points outside"):
        join(root, "../000.jpg")


@pytest.mark.slow
def test_commands_read_a_url_that_has_become_a_path(web, photos):
    root = Path(web.url)
    assert str(root).startswith("http:/1") and find_images(root) == find_images(photos)
    assert score_folder(root, progress=False).equals(score_folder(photos, progress=False))
    far, near = audit_folder(root, progress=False), audit_folder(photos, progress=False)
    assert far.files.drop(columns="folder", errors="ignore").equals(near.files.drop(columns="folder", errors="ignore"))
    assert read_image_bytes(root / "day 1" / "ä+&#.jpg") == (photos / "001.jpg").read_bytes()


def test_what_names_the_content_in_a_store_is_size_and_etag(root, photos):
    listed = dict(remote.far_files(root))
    if root.startswith(("gs", "s3")):
        data = (photos / "000.jpg").read_bytes()
        size, etag = listed["000.jpg"].split("|")
        assert int(size) == len(data) and etag
        google = root.startswith("gs") and not re.fullmatch("[0-9a-f]{32}", etag)
        digest = hashlib.md5(data)
        assert etag.strip('"') == (base64.b64encode(digest.digest()).decode() if google else digest.hexdigest())
    remote._content.clear()  # what a listing says and what a question for one file says
    assert file_key(root, "day 1/ä+&#.jpg") == f"day 1/ä+&#.jpg|{remote.far_key(join(root, 'day 1/ä+&#.jpg'))}"
    if not root.startswith("http"):  # a page of links has neither
        assert file_key(root, "000.jpg") == f"000.jpg|{listed['000.jpg']}"


@pytest.mark.parametrize("url, module, extra", [("gs://x/y", "gcsfs", "gcs"), ("s3://x/y", "s3fs", "remote")])
def test_a_client_that_is_not_installed_is_one_line_with_its_extra(url, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    remote._system.cache_clear()
    with pytest.raises(ModuleNotFoundError) as missing:
        score_folder(url, progress=False)
    told = str(for_user(missing.value))
    assert told.startswith(f"{module} is not installed") and f"pip install 'calib-nb[{extra}]'" in told
    assert "\n" not in told
    remote._system.cache_clear()


def test_a_root_that_is_not_there_is_one_line(web):
    for url in (f"{web.url}/none", "http://127.0.0.1:9/photos", "ftp://127.0.0.1/photos"):
        with pytest.raises(InputError) as refused:
            find_images(url)
        assert "\n" not in str(refused.value)


def test_a_page_that_links_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    write_photos(tmp_path / "photos", 1)
    links = ["000.jpg", "../secret.jpg", "/secret.jpg", "http://127.0.0.1:9/a.jpg", "..%2Fsecret.jpg", "?sort=name"]
    (tmp_path / "photos" / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    server = Slow(tmp_path)
    assert find_images(f"{server.url}/photos") == ["000.jpg"]
    server.shutdown()


@pytest.mark.slow
def test_a_set_is_prepared_from_a_url(web, photos, tmp_path):
    far = prepare(web.url, tmp_path / "far", num_samples=4, strategy="random", progress=False)
    near = prepare(photos, tmp_path / "near", num_samples=4, strategy="random", progress=False)
    assert list(far.images.path) == list(near.images.path)
    for name in far.images.name:
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    with pytest.raises(InputError, match="copy"):
        prepare(web.url, tmp_path / "links", num_samples=4, link="symlink", progress=False)


def test_reads_are_begun_before_their_turn(web, photos):
    urls = [join(web.url, f"{k:03d}.jpg") for k in range(12)]
    web.latency, web.most = 0.1, 0
    read_ahead(urls)
    assert [read_far(url) for url in urls] == [(photos / f"{k:03d}.jpg").read_bytes() for k in range(12)]
    web.latency = 0.0
    assert web.most > 1, "one after the other"

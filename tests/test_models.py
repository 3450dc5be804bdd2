"""The model registry against a server that truncates, corrupts, stalls, refuses and never ends, and against kill -9."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import calib_nb
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.models import MODELS, ModelFile, fetch_model, find_models, models_root, verify_models

CONTENT = os.urandom(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        trouble = self.path.strip("/")
        if trouble.startswith("once-") and len(self.server.asked) > 1:
            trouble = ""
        if "error" in trouble:
            return self.send_error(503)
        self.send_response(200)
        if trouble != "endless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if "truncated" in trouble:
                self.wfile.write(CONTENT[:150_000])
            elif "stalled" in trouble or trouble == "slow":
                self.wfile.write(CONTENT[:150_000])
                self.wfile.flush()
                self.server.wake.wait(30)
            elif trouble == "endless":
                while not self.server.wake.is_set():
                    self.wfile.write(CONTENT)
            else:
                self.wfile.write(CONTENT if "corrupt" not in trouble else CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.wake = [], threading.Event()
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.wake.set()
    httpd.shutdown()
    httpd.server_close()


def offered(server, path) -> ModelFile:
    address = f"http://127.0.0.1:{server.server_port}/{path}"
    return ModelFile(
        "tiny", "part/tiny.onnx", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "CC0", "nowhere", address, "none"
    )


def get(server, path, folder, **options):
    # short only where the server is silent on purpose: a busy machine may need a second for a good answer
    timeout = 1.5 if "stalled" in path else 30
    return fetch_model(offered(server, path), folder, progress=False, timeout=timeout, **{"retries": 0} | options)


@pytest.mark.parametrize("trouble", ["truncated", "corrupt", "stalled", "error", "endless"])
def test_a_bad_download_leaves_nothing_and_says_what_to_do(server, tmp_path, trouble):
    with pytest.raises(ModelError) as caught:
        get(server, trouble, tmp_path)
    text = str(caught.value)
    assert (
        "\n" not in text
        and "tiny.onnx" in text
        and offered(server, "").sha256 in text
        and str(tmp_path / "part" / "tiny.onnx") in text
    )
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("trouble", ["truncated", "corrupt", "error"])
def test_a_file_that_was_there_survives_a_bad_download(server, tmp_path, trouble):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "tiny.onnx").write_bytes(b"an older version")
    with pytest.raises(ModelError):
        get(server, trouble, tmp_path)
    assert (tmp_path / "part" / "tiny.onnx").read_bytes() == b"an older version"
    assert get(server, "good", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("trouble", ["once-truncated", "once-corrupt", "once-error", "once-stalled"])
def test_a_second_attempt_repairs_what_passes(server, tmp_path, trouble):
    assert get(server, trouble, tmp_path, retries=1).read_bytes() == CONTENT and len(server.asked) == 2


def test_a_good_file_is_not_asked_for_again(server, tmp_path):
    path = get(server, "good", tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644 and [p.name for p in path.parent.iterdir()] == ["tiny.onnx"]
    os.chmod(path.parent, 0o555)  # a shared folder may be read-only
    assert get(server, "good", tmp_path) == path and len(server.asked) == 1
    os.chmod(path.parent, 0o755)


def test_offline_names_file_hash_and_place(tmp_path):
    unreachable = replace(MODELS["yunet"], url="http://127.0.0.1:9/yunet.onnx")
    with pytest.raises(ModelError) as caught:
        fetch_model(unreachable, tmp_path, retries=0, timeout=1, progress=False)
    text = str(caught.value)
    assert "face_detection_yunet_2023mar.onnx" in text and MODELS["yunet"].sha256 in text and str(tmp_path) in text
    with pytest.raises(ModelError, match="no public address of 'scrfd' is known .*by hand"):
        fetch_model("scrfd", tmp_path)


def test_a_killed_download_leaves_no_file_under_the_name(server, tmp_path):
    code = f"""
import sys
from calib_nb.core.models import ModelFile, fetch_model
address = "http://127.0.0.1:{server.server_port}/slow"
model = ModelFile("tiny", "tiny.onnx", "0" * 64, {len(CONTENT)}, "", "", address, "")
fetch_model(model, sys.argv[1], timeout=120, progress=False)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 120

    def begun() -> bool:
        with contextlib.suppress(FileNotFoundError):  # the partial file is moved about
            return any(p.stat().st_size for p in tmp_path.iterdir())
        return False

    while not begun():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "tiny.onnx").exists()


def test_the_registry_is_sound():
    assert len({m.file for m in MODELS.values()}) == len(MODELS) and all(name == m.name for name, m in MODELS.items())
    for m in MODELS.values():
        assert (
            len(m.sha256) == 64
            and set(m.sha256) <= set("0123456789abcdef")
            and m.size > 0
            and m.licence
            and m.source
            and m.input
        )
        assert ".." not in m.file and not m.file.startswith("/") and (m.url == "" or m.url.startswith("https://"))
    assert [m.name for m in find_models(["mtcnn"])] == ["mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet"]
    with pytest.raises(InputError, match="did you mean 'retinaface'"):
        find_models(["retina_face"])


def test_the_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIB_NB_MODELS", str(tmp_path / "a"))
    assert models_root() == tmp_path / "a" and models_root(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("CALIB_NB_MODELS")
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path / "c"))
    assert models_root() == tmp_path / "c" / "models"


def test_the_published_files_are_those_of_the_registry(real_data):
    assert set(verify_models(folder=real_data / "models").state) == {"ok"}


def test_the_command(tmp_path, capsys):
    from calib_nb.cli import main

    assert main(["models", "list", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") >= len(MODELS)
    assert main(["models", "verify", "--folder", str(tmp_path)]) == 0  # nothing there is nothing wrong
    assert main(["models", "verify", "yunet", "--folder", str(tmp_path)]) == 1
    (tmp_path / MODELS["yunet"].file).write_bytes(b"x")
    assert main(["models", "verify", "--folder", str(tmp_path)]) == 1
    assert main(["models", "fetch", "scrfd", "--folder", str(tmp_path)]) == 1
    assert main(["models", "fetch", "scrdf", "--folder", str(tmp_path)]) == 2
    assert "did you mean 'scrfd'" in capsys.readouterr().err
    assert main(["models", "--folder", str(tmp_path)]) == 2 and "calib-nb models --help" in capsys.readouterr().err


def test_measured_rows_as_people_read_them():
    from calib_nb.commands.models import _measurements, _numerics

    table = _measurements()
    assert list(_numerics(["yunet"])["in INT8"]) == [f"{s:.1f} %" for s in table.int8_share[table.model == "YuNet"]]
    older = table.drop(columns="int8_share")
    older.loc[older.model == "YuNet", "latency_ratio"] = float("nan")  # its spread hid the difference
    (row,) = _numerics(["yunet"], older).to_dict("records")
    assert (row["in INT8"], row["ms"]) == ("", "not measurable")
    (depth,) = _numerics(["rtmonodepth"]).to_dict("records")
    assert float(depth["drop"].split()[0]) == pytest.approx(float(depth["INT8"]) - float(depth["float"]), abs=0.02)
    assert depth["ms"] == "" and depth["target"] == "per-tensor-npu"  # a processor's time says nothing about an NPU


def test_the_benchmark_writes_the_columns_that_are_read():
    notebook = json.loads((Path(calib_nb.__file__).parents[1] / "nbs" / "benchmarks" / "real_models.ipynb").read_text())
    rows = next("".join(c["source"]) for c in notebook["cells"] if "rows.append(" in "".join(c["source"]))
    from calib_nb.commands.models import _measurements

    assert [name for name in re.findall(r'^            "(\w+)":', rows, re.M)] == list(_measurements().columns)

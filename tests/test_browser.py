"""The explorers in JupyterLab and in Voila, used by a mouse and a keyboard in a real browser: `make test-browser`.

Screenshots and times are left in outputs/browser/.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'calib-nb[dev]' brings playwright")

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs" / "browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")
IMAGES = 1000
SECONDS = 180
# The windows of notebooks hold all cells, also those that are out of sight.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "kernelShutdown": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ECHO = """from ipywidgets import HTML, IntSlider, VBox

echo_from, echo_to = IntSlider(), HTML("0")
echo_to.add_class("echo")
echo_from.add_class("echo-slider")
echo_from.observe(lambda change: setattr(echo_to, "value", str(change.new)), "value")
VBox([echo_from, echo_to])"""
# Generated numbers (synthetic), as many as the images of the image explorer.
PAIRS = f"""import numpy as np
import pandas as pd

import calib_nb.explore.faces as module

module_pairs = module.demo_pairs


def generated_pairs():
    crops, rng, same = module_pairs()[1], np.random.default_rng(0), np.arange({IMAGES}) % 2 == 0
    names = rng.choice(sorted(crops), (2, {IMAGES}))
    similarity = np.where(same, rng.normal(0.6, 0.2, {IMAGES}), rng.normal(0.1, 0.2, {IMAGES}))
    table = {{"first": names[0], "second": names[1], "same": same, "similarity": similarity.clip(-0.39, 0.99)}}
    return pd.DataFrame(table), crops


module.demo_pairs = generated_pairs"""
STUDY = f"""import numpy as np

import calib_nb.explore.tags as module

module_tags = module.demo_tags


def generated_tags():
    rng, classes = np.random.default_rng(0), tuple(f"category {{k:02d}}" for k in range(80))
    targets = rng.random(({IMAGES}, 80)) < 0.05
    logits = np.where(targets, 1.0, -3.0) + rng.normal(0, 1.5, targets.shape)
    p = {{"float": logits, "INT8": logits + rng.normal(0, 0.3, targets.shape)}}
    thumbs = module_tags(40).thumbs * ({IMAGES} // 40)
    names = [f"{{k:04d}}.jpg" for k in range({IMAGES})]
    return module.TagStudy(names, classes, targets, {{k: 1 / (1 + np.exp(-v)) for k, v in p.items()}}, thumbs)


module.demo_tags = generated_tags"""
WATCH = """selector => {
  window.elapsed = null;
  let start = null;
  const begin = () => { start ??= performance.now(); };
  for (const kind of ["keydown", "pointerdown"]) document.addEventListener(kind, begin, { capture: true, once: true });
  const observer = new MutationObserver(() => {
    if (start === null) return;
    observer.disconnect(); window.elapsed = performance.now() - start;
  });
  for (const node of document.querySelectorAll(selector)) {
    observer.observe(node, { childList: true, subtree: true, attributes: true, characterData: true });
  }
}"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, the one that the machine has."""
    path = os.environ.get("CALIB_NB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("no chromium: .ci/browser installs Debian's, or name one in CALIB_NB_CHROMIUM")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def thousand(tmp_path_factory) -> Path:
    """A folder of 1,000 synthetic images: cuts of twelve scenes, each brighter or darker and more or less sharp."""
    import cv2
    import numpy as np

    from calib_nb.data.demo_images import degrade, paint_scene

    folder, rng = tmp_path_factory.mktemp("thousand"), np.random.default_rng(0)
    scenes = [paint_scene(k) for k in range(12)]
    for k in range(IMAGES):
        x, y = rng.integers(0, 140), rng.integers(0, 100)
        image = degrade(scenes[k % 12][y : y + 200, x : x + 260], "dark", rng.uniform(-3, 0.5))
        image = degrade(image, "blur", rng.uniform(0.5, 4)) if rng.random() < 0.5 else image
        cv2.imwrite(str(folder / f"{k:04d}.jpg"), image)
    return folder


def environment(home: Path) -> dict[str, str]:
    from calib_nb.core.run import cache_root

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"HOME": str(home), "PATH": path, "CALIB_NB_CACHE": str(cache_root()), "OMP_NUM_THREADS": "1"}
    return kept | own


@contextlib.contextmanager
def server(command: list[str], home: Path, url: str):
    """A server of this environment on loopback, with a separate home folder; it ends with all its children."""
    log = open(home / f"{command[0]}.log", "wb")  # noqa: SIM115 (closed below, when the server has ended)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment(home), cwd=home / "work", stdout=log, stderr=log
    )
    try:
        for _ in range(SECONDS * 4):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(0.25)
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(30)
        for child in psutil.wait_procs(children, timeout=15)[1]:
            child.kill()
        log.close()


def place_notebook(name: str, home: Path, parameters: dict[str, str], before: str = "") -> Path:
    """A copy of an explorer with other parameters, and a cell whose slider only changes a text.

    With `before`, which is run in front of the cell that opens the explorer, the cells below that one are left out.
    """
    notebook = json.loads((ROOT / "nbs" / "explore" / name).read_text(encoding="utf-8"))
    for key, value in parameters.items():
        hits = 0
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            changed, count = re.subn(rf'^{key} = "[^"]*"', f"{key} = {json.dumps(value)}", text, flags=re.M)
            hits += count
            cell["source"] = changed.splitlines(keepends=True)
        assert hits == 1, f"{name} has {hits} cells with the parameter {key}"
    blank = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    notebook["cells"].append({**blank, "id": "echo", "source": ECHO.splitlines(keepends=True)})
    if before:
        first = next(k for k, c in enumerate(notebook["cells"]) if "\nexplorer = explore_" in "".join(c["source"]))
        new = {**blank, "id": "before", "source": before.splitlines(keepends=True)}
        notebook["cells"] = [*notebook["cells"][:first], new, notebook["cells"][first], notebook["cells"][-1]]
    for cell in notebook["cells"]:
        cell["outputs"] = [] if cell["cell_type"] == "code" else cell.pop("outputs", None)
        if cell["cell_type"] != "code":
            cell.pop("outputs")
    path = home / "work" / name
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "work").mkdir()
    for name, values in SETTINGS.items():
        file = home / ".jupyter" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return home


@pytest.fixture(scope="session")
def lab(home):
    """(address, token) of a JupyterLab on loopback."""
    port, token = free_port(), secrets.token_hex(16)
    command = ["jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}"]
    command += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    url = f"http://127.0.0.1:{port}"
    with server(command, home, f"{url}/api?token={token}"):
        yield url, token


class Lab:
    """One notebook in JupyterLab, run from top to bottom."""

    def __init__(self, browser, lab, name: str, *, width: int = 1280, height: int = 1500):
        self.url, self.token = lab
        self.page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.goto(f"{self.url}/lab/tree/{name}?token={self.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady")
        self.page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }")
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_selector(".echo")
        self.kernel = self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
        self.page.set_default_timeout(20_000)
        errors = self.page.locator(
            '[data-mime-type="application/vnd.jupyter.stderr"], .jp-RenderedText:has(.ansi-red-fg)'
        )
        assert errors.all_inner_texts() == []

    def median(self, press, watched: str, times: int = 7) -> float:
        """Milliseconds from an interaction to the first change of what is watched, the median."""
        taken = []
        for k in range(times):
            self.page.evaluate(WATCH, watched)
            press(k)
            self.page.wait_for_function("window.elapsed !== null")
            taken.append(self.page.evaluate("window.elapsed"))
            self.page.wait_for_timeout(150)
        return statistics.median(taken)

    def slider(self, label: str):
        """The handle of a slider by its description."""
        box = self.page.locator(".widget-hslider", has=self.page.get_by_text(label, exact=True)).first
        return box.locator(".noUi-handle").first

    def key(self, label: str, keys=("ArrowRight", "ArrowRight", "ArrowLeft")):
        """A function that presses one of `keys` on a slider."""

        def press(k: int) -> None:
            self.slider(label).press(keys[k % len(keys)])

        return press

    def echo(self) -> float:
        """Milliseconds that a slider takes whose answer is one number."""

        def press(k: int) -> None:
            self.page.locator(".echo-slider .noUi-handle").press("ArrowRight")

        return self.median(press, ".echo")

    def show(self, selector: str, name: str) -> None:
        """Keep a screenshot of a part of the page."""
        OUT.mkdir(parents=True, exist_ok=True)
        self.page.locator(selector).first.screenshot(path=OUT / f"{name}.png")

    def close(self) -> None:
        """Close the notebook, and see that its kernel has ended."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save'); }")
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:close-and-shutdown'); }")
        with contextlib.suppress(playwright.TimeoutError):
            self.page.locator(".jp-Dialog .jp-mod-accept").click(timeout=3000)
        deadline = time.time() + 30
        while self.kernel in self.kernels() and time.time() < deadline:
            time.sleep(0.25)
        self.page.close()
        assert self.kernel not in self.kernels()

    def kernels(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/api/kernels?token={self.token}") as answer:
            return [kernel["id"] for kernel in json.load(answer)]


@contextlib.contextmanager
def opened(browser, lab, home: Path, name: str, parameters: dict[str, str], before: str = ""):
    """An explorer that is run in JupyterLab, with its page; closed when all went well."""
    notebook = Lab(browser, lab, place_notebook(name, home, parameters, before).name)
    yield notebook, notebook.page
    notebook.close()


def record(name: str, **milliseconds: float) -> None:
    """Print times, and keep them for the page of benchmarks."""
    path = OUT / "times.json"
    times = json.loads(path.read_text()) if path.is_file() else {}
    times[name] = {key: round(value, 1) for key, value in milliseconds.items()}
    path.write_text(json.dumps(times, indent=1, sort_keys=True))
    print(name, times[name])
    echo = milliseconds.pop("echo")
    # Not a time: a slow machine is slow in both. What an explorer adds to a bare slider is asserted with much room.
    assert max(milliseconds.values()) < 40 * max(echo, 5)


def test_images(chromium, lab, home, thousand):
    with opened(chromium, lab, home, "03_images.ipynb", {"images": str(thousand)}) as (lab, page):
        assert page.locator(".calib-gallery").first.get_attribute("data-chosen") == "24"
        lab.show(".jp-OutputArea-output:has(.calib-gallery)", "images")
        times = {"echo": lab.echo(), "threshold": lab.median(lab.key("threshold"), ".calib-picture, .calib-gallery")}
        times["weight"] = lab.median(lab.key("brightness"), ".calib-gallery")
        lab.slider("images").press("ArrowRight")
        page.wait_for_selector('.calib-gallery[data-chosen="25"]')
        lasso = page.locator(".calib-draws").first
        lasso.scroll_into_view_if_needed()
        box = lasso.bounding_box()
        corners = [(0.6, 0.2), (0.9, 0.2), (0.9, 0.6), (0.6, 0.6), (0.6, 0.22)]
        for k, (x, y) in enumerate(corners):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
            if k == 0:
                page.mouse.down()
        page.mouse.up()
        page.wait_for_selector(".widget-toggle-button.mod-active:has-text('lasso')")
        page.locator(".calib-gallery figure").first.click()
        page.wait_for_selector(".calib-detail")
        lab.show(".jp-OutputArea-output:has(.calib-gallery)", "images-lasso")
        record("images", **times)


def test_layers(chromium, lab, home):
    with opened(chromium, lab, home, "05_layers.ipynb", {"model": ""}) as (lab, page):
        before = page.locator(".calib-figure path").nth(1).get_attribute("d")
        page.locator(".calib-table tbody tr").nth(8).click()
        page.wait_for_function(
            "d => document.querySelectorAll('.calib-figure path')[1].getAttribute('d') !== d", arg=before
        )
        head = page.locator(".calib-table th", has_text="SQNR")
        head.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending" and "SQNR" in page.evaluate(
            "document.activeElement.textContent"
        )
        numbers = [float(t) for t in page.locator(".calib-table tbody td:nth-child(5)").all_inner_texts()]
        assert numbers == sorted(numbers)
        times = {"echo": lab.echo()}
        handle = page.locator(".calib-handle").nth(1)
        keys = ("ArrowLeft", "ArrowLeft", "ArrowRight")
        times["drag"] = lab.median(lambda k: handle.press(keys[k % 3]), ".calib-picture")
        # a mouse drags the upper end to the middle
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] - 200, box["y"] + 20, steps=12)
        page.mouse.up()
        page.wait_for_selector(".calib-table td:text-is('hand')")
        assert page.locator(".calib-table td:text-is('hand')").count() == 1  # the layer that was dragged, and no other
        page.get_by_role("button", name="quantize again").first.click()
        page.wait_for_selector(".widget-html td:has-text('1 by hand')")
        page.get_by_role("button", name="quantize again").first.wait_for()
        lab.show(".jp-OutputArea-output:has(.calib-table)", "layers")
        record("layers", **times)


def test_preprocessing(chromium, lab, home):
    with opened(chromium, lab, home, "04_preprocessing.ipynb", {"config": ""}) as (lab, page):
        times = {"echo": lab.echo(), "step": lab.median(lab.key("step", ("ArrowLeft",)), ".calib-picture", 5)}
        assert page.locator(".calib-selected").first.get_attribute("data-row") == "1"
        page.get_by_role("button", name="red and blue swapped").first.click()
        page.wait_for_selector(".calib-verdict:has-text('an RGB model is fed BGR')")
        lab.slider("step").press("End")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="upload").first.click()
        chooser.value.set_files([{"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"text"}])
        page.wait_for_selector(".calib-error:has-text('x.jpg')")
        lab.show(".jp-OutputArea-output:has(.calib-table)", "preprocessing")
        record("preprocessing", **times)


@pytest.mark.parametrize("rows", ["", "-1000"])
def test_faces(chromium, lab, home, rows):
    before = PAIRS if rows else ""
    with opened(chromium, lab, home, "06_faces.ipynb", {"images": ""}, before) as (lab, page):
        if rows:
            assert "1,000 pairs" in page.locator(".calib-rates").first.inner_text()
        times = {"echo": lab.echo(), "threshold": lab.median(lab.key("threshold"), ".calib-rates, .calib-picture")}
        lab.slider("least score").press("End")
        page.wait_for_selector(".calib-figure:has-text(': 0 faces')")
        lab.slider("least score").press("Home")
        page.wait_for_selector(".calib-figure:not(:has-text(': 0 faces'))")
        lab.slider("threshold").press("End")
        page.wait_for_selector(".calib-rates:has-text('FRR 100.0%')")
        lab.slider("threshold").press("Home")
        page.wait_for_selector(".calib-rates:has-text('FAR 100.0%')")
        for _ in range(6):
            lab.slider("threshold").press("PageUp")
        lab.show(".jp-OutputArea-output:has(.calib-rates)", f"faces{rows}")
        record(f"faces{rows}", **times)


@pytest.mark.parametrize("rows", ["", "-1000"])
def test_tags(chromium, lab, home, rows):
    with opened(chromium, lab, home, "07_tags.ipynb", {"coco": ""}, STUDY if rows else "") as (lab, page):
        if rows:
            assert "of 1,000 images" in page.locator(".calib-changes").first.inner_text()
        page.get_by_role("button", name="best F1 for each").first.click()
        page.get_by_role("button", name="against the threshold 0.5").first.click()
        page.wait_for_selector(".calib-changes:has-text('against the threshold 0.5')")
        before = page.locator(".calib-gallery").first.get_attribute("data-shown")
        times = {"echo": lab.echo(), "threshold": lab.median(lab.key("threshold"), ".calib-picture, .calib-gallery")}
        lab.slider("threshold").press("End")
        page.wait_for_function("d => document.querySelector('.calib-gallery').dataset.shown !== d", arg=before)
        page.locator(".calib-table tbody tr").nth(2).click()
        page.wait_for_selector(".calib-table tr.calib-selected[data-row='2']")
        lab.show(".jp-OutputArea-output:has(.calib-changes)", f"tags{rows}")
        record(f"tags{rows}", **times)


def test_depth(chromium, lab, home):
    with opened(chromium, lab, home, "08_depth.ipynb", {"root": ""}) as (lab, page):
        times = {"echo": lab.echo(), "scale": lab.median(lab.key("error scale"), ".calib-picture")}
        before = page.locator(".calib-figure path").last.get_attribute("d")
        page.get_by_role("button", name="20 frames").first.click()
        page.wait_for_selector(".calib-rates:has-text('over 20 frames')")
        assert page.locator(".calib-figure path").last.get_attribute("d") != before
        lab.show(".jp-OutputArea-output:has(.calib-rates)", "depth")
        record("depth", **times)


def test_a_table_of_a_page_sorts_by_keyboard(chromium, tmp_path):
    """Tab, Enter and Space alone; a screen reader reads the order, and an eye sees where the focus is."""
    import pandas as pd

    from calib_nb.core.page import html_page, html_table, save_page

    layers = pd.DataFrame({"layer": ["b", "c", "a"], "SQNR (dB)": [7.5, 141.25, 41.0]})
    path = save_page(tmp_path / "page.html", html_page("Layers", html_table(layers), sortable=True))
    page = chromium.new_page()
    page.goto(path.as_uri())
    order = page.locator("td:first-child")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    head = page.locator("th:focus")
    assert head.inner_text().startswith("SQNR") and head.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert order.all_inner_texts() == ["b", "a", "c"] and head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert order.all_inner_texts() == ["c", "a", "b"] and head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert order.all_inner_texts() == ["a", "b", "c"]
    assert [h.get_attribute("aria-sort") for h in page.locator("th").all()] == ["ascending", "none"]
    page.close()


def test_a_path_that_is_wrong_is_one_line(chromium, lab, home):
    """Run as a reader would who mistypes the folder: no traceback, and the cells below are not run."""
    path = place_notebook("03_images.ipynb", home, {"images": "no/such/folder"})
    notebook = json.loads(path.read_text())
    first = next(k for k, c in enumerate(notebook["cells"]) if "explore_images(images)" in "".join(c["source"]))
    notebook["cells"] = [*notebook["cells"][: first + 1], notebook["cells"][-1]]
    path.write_text(json.dumps(notebook))
    lab = Lab(chromium, lab, path.name)
    assert "no/such/folder" in lab.page.locator(".calib-error").inner_text()
    lab.show(".jp-OutputArea-output:has(.calib-error)", "wrong-path")
    lab.close()


def test_images_under_voila(chromium, home, thousand):
    pytest.importorskip("voila", reason="pip install 'calib-nb[lab]' brings voila")
    name, port = place_notebook("03_images.ipynb", home, {"images": str(thousand)}).name, free_port()
    command = ["voila", name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--strip_sources=True"]
    with server(command, home, f"http://127.0.0.1:{port}/voila/static/voila.js"):
        page = chromium.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(SECONDS * 1000)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector('.calib-gallery[data-chosen="24"]')
        slider = page.locator(".widget-hslider", has=page.get_by_text("images", exact=True)).first
        slider.locator(".noUi-handle").first.press("ArrowRight")
        page.wait_for_selector('.calib-gallery[data-chosen="25"]')
        page.locator(".calib-gallery").first.scroll_into_view_if_needed()
        page.screenshot(path=OUT / "voila.png")
        page.close()

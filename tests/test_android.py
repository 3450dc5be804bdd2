"""The Android app: sources that hold together, a build without Gradle, and its engine run on this machine."""

import os
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from calib_nb.android.build import (
    build_app,
    kotlinc,
    libraries,
    missing_tools,
)
from calib_nb.android.compare import output_step
from calib_nb.android.fetch import android_sources, fetch_all, fetch_package, read_lock
from calib_nb.android.stubs import parse_api
from calib_nb.core.cache import cached
from calib_nb.core.errors import CalibError
from calib_nb.core.run import cache_root, sha256_file, write_json

MAIN = android_sources() / "app/src/main"
TEST = android_sources() / "app/src/test"
KOTLIN = MAIN / "kotlin/nb/calib/tagger"
NAME = "{http://schemas.android.com/apk/res/android}"
# What Android's phones have and a JVM lacks stands in these files alone.
THIN = {"MainActivity.kt", "ModelBenchmark.kt", "ChartView.kt"}


def resources(folder: str, kind: str) -> dict[str, str]:
    """Text by name of a values file; a plural by name and quantity."""
    root = ElementTree.parse(MAIN / "res" / folder / f"{kind}.xml").getroot()
    texts = {e.get("name"): "".join(e.itertext()) for e in root if e.tag != "plurals"}
    return texts | {f"{e.get('name')}/{i.get('quantity')}": i.text for e in root.iter("plurals") for i in e}


def test_every_sentence_is_there_in_both_languages():
    english, korean = (resources(folder, "strings") for folder in ("values", "values-ko"))
    assert set(korean) == set(english) - {"photos_count/one"}  # Korean has no plural of its own
    for name, text in korean.items():
        form = r"%\d\$[.\d]*[a-z]"
        assert sorted(re.findall(form, text)) == sorted(re.findall(form, english[name])), name
        assert re.search("[가-힣]", text) or text == english[name], name
    used = {r for p in KOTLIN.glob("*.kt") for r in re.findall(r"R\.string\.(\w+)", p.read_text())}
    used |= {r for p in MAIN.rglob("*.xml") for r in re.findall(r"@string/(\w+)", p.read_text())}
    faults = re.search(r"enum class Fault \{(.*?);", (KOTLIN / "Refusal.kt").read_text(), re.S)[1]
    used |= {f"fault_{fault.strip().lower()}" for fault in faults.split(",")}
    assert used == {name.split("/")[0] for name in english} - {"photos_count"}


def test_text_can_be_read_on_its_background_in_light_and_dark():
    def luminance(color):
        channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    light, dark = (resources(folder, "colors") for folder in ("values", "values-night"))
    assert set(light) == set(dark)
    for colors in (light, dark):
        for text, ground in (
            *((name, "card") for name in ("text", "faint", "accent", "second", "warning")),
            ("text", "page"),
            ("faint", "page"),
            ("on_accent", "accent"),
        ):
            high, low = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"  # WCAG 2.1, AA


def test_the_manifest_asks_for_nothing():
    root = ElementTree.parse(MAIN / "AndroidManifest.xml").getroot()
    sdk = root.find("uses-sdk")
    assert (sdk.get(f"{NAME}minSdkVersion"), sdk.get(f"{NAME}targetSdkVersion")) == ("26", "34")
    assert not [e.tag for e in root.iter() if "permission" in e.tag]


def test_the_layers_below_the_screen_know_no_android():
    for path in KOTLIN.glob("*.kt"):
        named = re.findall(r"\bandroid\.\w+", path.read_text().replace("nb.calib", ""))
        assert bool(named) == (path.name in THIN), f"{path.name}: {named}"


def test_sources_name_no_address():
    for path in android_sources().rglob("*"):
        if path.is_file():
            found = re.findall(r"https?://[^\s\"'<>]+", path.read_text(encoding="utf-8"))
            assert set(found) <= {"http://schemas.android.com/apk/res/android"}, path


def test_the_lock_pins_by_hash():
    for package in read_lock().values():
        assert (
            re.fullmatch("[0-9a-f]{64}", package.sha256)
            and package.version in package.file.replace("%3a", ":")
            or (package.client == "apt")
        )
    assert {p.client for p in read_lock().values()} == {"npm", "pip", "apt"}


def test_stubs_follow_the_signatures():
    text = "// Signature format: 2.0\npackage a {\n\n  public class B {\n    method public <T> T c(int...);\n  }\n\n}\n"
    (b,) = parse_api(text)
    assert b.binary == "a/B" and b.members[0].parameters == ("int[]",) and b.members[0].generics == "T"


@pytest.mark.parametrize("seed", range(5))
def test_the_step_of_an_integer_output_is_found(seed):
    rng = np.random.default_rng(seed)
    scale = np.float32(rng.uniform(0.001, 0.2))
    scores = scale * (rng.integers(-128, 128, 800) - rng.integers(-20, 20)).astype(np.float32)
    assert output_step(scores) == pytest.approx(float(scale), rel=1e-3)


def test_a_broken_list_of_packages_or_a_cut_archive_is_one_line(tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    package = replace(read_lock()["kotlin"], sha256="0" * 64)
    with pytest.raises(CalibError, match="npm is not installed; as root: apt-get install npm; or put kotlin-compiler"):
        fetch_package(package)
    assert not list(tmp_path.glob("android/kotlin/*"))


# ---------------------------------------------------------------------------------------------------------------------
# From here on: downloads of 290 MB, Debian's tools, and minutes. `make test-android` runs it.


@pytest.fixture(scope="session")
def packages():
    if missing := missing_tools():
        pytest.skip(f"apt-get install --no-install-recommends {' '.join(missing)}")
    return fetch_all(progress=False)


@pytest.fixture(scope="session")
def programs() -> Path:
    """int8.pte is the demo tagger; random.pte (INT8) and fp32.pte have COCO's categories and random weights."""
    import torch

    from calib_nb.tags.coco import COCO_CATEGORIES
    from calib_nb.tags.demo import demo_checkpoints
    from calib_nb.tags.demo_drawings import tagged_photos
    from calib_nb.tags.export import export_checkpoint
    from calib_nb.tags.network import TaggerSpec, build_tagger, load_tagger, save_tagger

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        spec = TaggerSpec("resnet18", tuple(COCO_CATEGORIES.values()), width=16, size=64)
        checkpoint = save_tagger(folder / "tagger.pth", spec, build_tagger(spec).eval())
        photos = tagged_photos(folder / "drawn", 24, size=80, seed=1).parent / "images"
        demo = demo_checkpoints()
        trained, seen = load_tagger(demo.checkpoint)[1], demo.coco.parent / "images"
        for name, source, mode, about, scored in (
            ("int8", demo.checkpoint, "int8", trained, seen),
            ("random", checkpoint, "int8", spec, photos),
            ("fp32", checkpoint, "fp32", spec, photos),
        ):
            calibration = demo.calibration_images if source == demo.checkpoint else photos
            settings = {"mode": mode, "photos": calibration, "calibration_samples": 16}
            export_checkpoint(source, folder / "out", **settings).pte.rename(folder / f"{name}.pte")
            describe(folder / f"{name}.pte", about, scored)
        (folder / "other").mkdir()
        from calib_nb.nets.pte import write_pte

        write_pte(torch.export.export(torch.nn.ReLU(), (torch.zeros(1, 3, 8, 8),)), folder / "other/bare.pte")

    return cached(
        "android/test-programs", {"version": 2}, make, probe="other/bare.pte", depends=("torch", "executorch")
    )


def describe(pte: Path, spec, photos: Path) -> None:
    """What ExecuTorch's own reader finds in a program, and what its Python runtime computes with it."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    from calib_nb.nets.pte import PteSession
    from calib_nb.quant.observe import network_input

    program = deserialize_pte_binary(pte.read_bytes())
    program = getattr(program, "program", program)
    plan = next(p for p in program.execution_plan if p.name == "forward")
    shape = list(plan.values[plan.inputs[0]].val.sizes)
    inputs = [network_input(p, spec.preprocess()) for p in sorted(photos.iterdir())[:24]]
    session = PteSession(pte)
    scores = np.concatenate([session.run(None, {"input": x})[0] for x in inputs])
    pte.with_suffix(".inputs").write_bytes(np.concatenate(inputs).astype("<f4").tobytes())
    pte.with_suffix(".scores").write_bytes(scores.astype("<f4").tobytes())
    said = {"delegates": list(dict.fromkeys(d.id for d in plan.delegates)), "input": shape}
    said |= {"methods": [p.name for p in program.execution_plan], "classes": list(spec.classes)}
    write_json(f"{pte}.json", said | {"size": spec.size, "crop": spec.crop, "step": output_step(scores)})


@pytest.fixture(scope="session")
def app(packages, programs, tmp_path_factory):
    """The built app, with two programs and some images."""
    folder = tmp_path_factory.mktemp("app")
    photos = next((programs / "drawn").rglob("images"))
    return build_app([programs / "int8.pte", programs / "fp32.pte"], folder / "app.apk", photos=photos, progress=False)


def folder_of(app, step: str) -> Path:
    return Path(app.steps.set_index("step").folder[step])


@pytest.fixture(scope="session")
def jvm(app, packages):
    """Class path of the app's plain classes with their tests, compiled."""
    lib, java = packages["kotlin"] / "package/lib", Path("/usr/share/java")
    jars = [lib / f"{name}.jar" for name in ("kotlin-stdlib", "kotlin-test", "kotlin-test-junit")]
    jars += [java / "junit4.jar", java / "hamcrest-all.jar"]
    jars = [p for p in jars if p.exists()] + [p for p in (java / "hamcrest-core.jar",) if p.exists()]
    if not (java / "junit4.jar").exists():
        pytest.skip("apt-get install --no-install-recommends junit4")
    built = [folder_of(app, "kotlin") / "classes", folder_of(app, "java") / "classes"]
    torch_jar = packages["executorch"] / "package/android/libs/classes.jar"

    def make(folder: Path) -> None:
        subprocess.run(["javac", "-d", folder / "log", *(TEST / "java").rglob("*.java")], check=True)
        command = kotlinc(lib, [*built, torch_jar, *jars], folder / "classes", TEST / "kotlin")
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()

    sources = {p.name: sha256_file(p) for p in sorted(TEST.rglob("*")) if p.is_file()}
    folder = cached("android/test-classes", {"sources": sources, "app": str(built)}, make, probe="complete")
    return [folder / "classes", folder / "log", *built, torch_jar, *jars]


def junit(jvm, *tests: str, native: Path | None = None, **properties) -> str:
    """What JUnit says of test classes that pass."""
    command = ["java", "-Xmx1g", *(f"-D{key}={value}" for key, value in properties.items())]
    command += [f"-Djava.library.path={native}"] if native else []
    names = [f"nb.calib.tagger.{test}" for test in tests]
    line = [*command, "-cp", os.pathsep.join(map(str, jvm)), "org.junit.runner.JUnitCore", *names]
    environment = os.environ | ({"LD_LIBRARY_PATH": str(native)} if native else {})
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=jvm[0])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout)
    return done.stdout


@pytest.mark.slow
def test_engine_results_device_and_json_in_a_jvm(jvm):
    assert "OK (" in junit(jvm, "EngineTest", "ResultsTest", "DeviceTest", "JsonTest")


@pytest.mark.slow
def test_programs_are_read_as_python_reads_them(jvm, programs):
    assert "OK (" in junit(jvm, "ProgramTest", programs=programs)


@pytest.fixture(scope="session")
def vectors(tmp_path_factory) -> Path:
    """Pixels as they are stored, and the input that the Python chain makes of them."""
    import cv2
    from PIL import Image

    from calib_nb.data.images import decode
    from calib_nb.tags.coco import evaluation_chain

    folder, rng, cases = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0), []

    def add(name, stored, upright, size, crop, **more):
        files = {"pixels": f"{name}.rgb", "expected": f"{name}-{size}-{crop}.f32"}
        (folder / files["pixels"]).write_bytes(np.ascontiguousarray(stored[..., ::-1]).tobytes())
        tensor = evaluation_chain(size, crop)(upright)
        (folder / files["expected"]).write_bytes(tensor.astype("<f4").tobytes())
        height, width = stored.shape[:2]
        cases.append(files | {"width": width, "height": height, "size": size, "crop": crop, "jpeg": None} | more)

    shapes = [(1, 1), (2, 3), (5, 7), (63, 65), (64, 64), (427, 640), (400, 31), (33, 500), (8, 1001), (257, 256)]
    for height, width in shapes:
        image = cv2.resize(
            rng.integers(0, 256, (max(2, height // 3), max(2, width // 3), 3), np.uint8), (width, height)
        )
        gray = np.repeat(image[..., :1], 3, axis=2)
        for size, crop in ((56, 0.875), (64, 1.0), (33, 0.77)):
            add(f"color{height}x{width}", image, image, size, crop)
            add(f"gray{height}x{width}", gray, gray, size, crop)
    add("big", *[rng.integers(0, 256, (1080, 1920, 3), np.uint8)] * 2, 224, 0.875)
    picture = cv2.resize(rng.integers(0, 256, (6, 9, 3), np.uint8), (37, 23), interpolation=cv2.INTER_CUBIC)
    for orientation in range(1, 9):
        path, exif = folder / f"exif{orientation}.jpg", Image.Exif()
        exif[0x0112] = orientation
        exif[0x010E] = "drawn"
        Image.fromarray(picture[..., ::-1]).save(path, exif=exif.tobytes(), quality=95)
        stored = cv2.imdecode(
            np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
        more = {"jpeg": path.name, "orientation": orientation}
        add(f"exif{orientation}", stored, decode(path), 24, 0.875, **more)
    write_json(folder / "index.json", cases)
    return folder


@pytest.mark.slow
def test_preprocessing_equals_the_python_chain(jvm, vectors):
    said = junit(jvm, "PreprocessTest", vectors=vectors)
    assert "parity: 69 cases" in said


def loadable(source: Path, target: Path) -> None:
    """Copy a 64-bit ELF library without the tags about symbol versions, which are those of Android's C library."""
    data = bytearray(source.read_bytes())
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    for k in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, start + k * size)
        if kind == 2:  # PT_DYNAMIC
            for at in range(offset, offset + length, 16):
                if struct.unpack_from("<Q", data, at)[0] in (
                    0x6FFFFFF0,
                    0x6FFFFFFC,
                    0x6FFFFFFD,
                    0x6FFFFFFE,
                    0x6FFFFFFF,
                ):
                    struct.pack_into("<Q", data, at, 0x6FFFF000)  # a tag that no loader knows
    for name in (b"sysconf", b"fflush"):  # shim.c has them under names that no other library has
        data = data.replace(b"\0%s\0" % name, b"\0%s\0" % name.replace(b"o", b"0").replace(b"u", b"0"))
    target.write_bytes(data)


@pytest.fixture(scope="session")
def native(packages, tmp_path_factory) -> Path:
    """Folder of the x86_64 libraries, made loadable on a PC, with stand-ins for Android's C libraries."""
    if shutil.which("gcc") is None or os.uname().machine != "x86_64":
        pytest.skip("the stand-ins for Android's C libraries need gcc and an x86_64 processor")
    folder = tmp_path_factory.mktemp("native")
    for path in libraries(packages, cache_root() / "android" / "aar", ["x86_64"]).native.values():
        loadable(path, folder / path.name)
    for name in ("c", "m", "dl", "log", "android"):
        source = TEST / "native/shim.c" if name == "c" else "/dev/null"
        line = [
            "gcc",
            "-shared",
            "-fPIC",
            "-w",
            "-x",
            "c",
            source,
            "-o",
            folder / f"lib{name}.so",
            "-Wl,--no-as-needed",
        ]
        done = subprocess.run(
            [*line, "-lm", "-ldl", "-lpthread", f"-Wl,-soname,lib{name}.so"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"the stand-in for lib{name}.so cannot be built: {done.stderr[-300:]}")
    return folder


@pytest.mark.slow
def test_the_apps_engine_gives_the_scores_of_pythons_runtime(jvm, native, programs):
    said = junit(jvm, "NativeTest", native=native, programs=programs)
    assert all(f"{name}: 24 inputs" in said for name in ("int8", "random", "fp32"))

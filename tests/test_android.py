"""The Android app: sources that hold together, a build without Gradle, and its engine run on this machine."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest

from calib_nb.android.build import (
    PASSWORD,
    AppOptions,
    build_app,
    kotlinc,
    libraries,
    missing_tools,
)
from calib_nb.android.compare import compare_phone, output_step
from calib_nb.android.fetch import android_sources, fetch_all, fetch_package, read_lock
from calib_nb.android.stubs import _Types, parse_api
from calib_nb.core.cache import cached
from calib_nb.core.errors import CalibError
from calib_nb.core.run import cache_root, sha256_file, write_json
from calib_nb.data.images import decode, encode_png
from calib_nb.tags.coco import load_coco
from calib_nb.tags.demo import demo_checkpoints

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
    from calib_nb.tags.demo_drawings import tagged_images
    from calib_nb.tags.export import export_checkpoint
    from calib_nb.tags.network import TaggerSpec, build_tagger, load_tagger, save_tagger

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        spec = TaggerSpec("resnet18", tuple(COCO_CATEGORIES.values()), width=16, size=64)
        checkpoint = save_tagger(folder / "tagger.pth", spec, build_tagger(spec).eval())
        photos = tagged_images(folder / "drawn", 24, size=80, seed=1).parent / "images"
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
    built = [folder_of(app, "kotlin-classes") / "classes", folder_of(app, "java-classes") / "classes"]
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


@pytest.mark.slow
def test_the_app_says_what_it_is(app):
    said = subprocess.run(["aapt", "dump", "badging", app.apk], capture_output=True, text=True, check=True).stdout
    assert "package: name='nb.calib.tagger'" in said and "uses-permission" not in said
    assert "sdkVersion:'26'" in said and "targetSdkVersion:'34'" in said
    assert "launchable-activity: name='nb.calib.tagger.MainActivity'" in said
    assert "native-code: 'arm64-v8a'" in said and "application-label-ko:'태거 벤치마크'" in said


@pytest.mark.slow
def test_the_signature_and_the_alignment_are_right(app):
    line = ["apksigner", "verify", "--verbose", "--min-sdk-version", "26", app.apk]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "v2 scheme (APK Signature Scheme v2): true" in said and "v3 scheme (APK Signature Scheme v3): true" in said
    subprocess.run(["zipalign", "-c", "-p", "4", app.apk], check=True, capture_output=True)
    with zipfile.ZipFile(app.apk) as z:
        assert z.getinfo("resources.arsc").compress_type == zipfile.ZIP_STORED


@pytest.mark.slow
def test_the_app_carries_programs_images_and_libraries(app, programs):
    with zipfile.ZipFile(app.apk) as z:
        names = z.namelist()
        for name in ("int8.pte", "fp32.pte"):
            assert z.read(f"assets/programs/{name}") == (programs / name).read_bytes()
        libraries_there = {n.split("/")[2] for n in names if n.startswith("lib/")}
        assert libraries_there == {"libexecutorch.so", "libfbjni.so", "libc++_shared.so"}
        for name in names:
            if name.startswith("lib/"):
                assert struct.unpack_from("<4s14xH", z.read(name)) == (b"\x7fELF", 183)  # AArch64
    assert sum(n.startswith("assets/photos/") for n in names) == 24 and app.apk.stat().st_size < 20e6


@pytest.fixture(scope="session")
def androguard():
    """Puts androguard on the path, from a folder of its own: it brings 160 MB that nothing else needs."""

    def make(folder: Path) -> None:
        line = [sys.executable, "-m", "pip", "install", "-q", "--target", folder / "site", "androguard==4.1.4"]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"androguard cannot be installed: {done.stderr.strip()[-200:]}")

    site = str(cached("android/androguard", {"version": "4.1.4"}, make, probe="site/androguard/__init__.py") / "site")
    code = (
        "import json, sys, zipfile; sys.path.insert(0, sys.argv[2]); import loguru; loguru.logger.remove();"
        "from androguard.core.dex import DEX; d = DEX(zipfile.ZipFile(sys.argv[1]).read('classes.dex'));"
        "ours = [c for c in d.get_classes() if c.get_name().startswith(('Lnb/calib/', 'Lcom/facebook/'))];"
        "json.dump({c.get_name(): sorted({i.get_output().split(', ')[-1] for m in c.get_methods() if m.get_code()"
        " for i in m.get_instructions() if i.get_name().startswith(('invoke', 'sget', 'iget', 'sput', 'iput'))})"
        " for c in ours}, sys.stdout)"
    )

    def uses(apk: Path) -> dict[str, list[str]]:
        """By class of the app, the methods and fields that its code names."""
        done = subprocess.run([sys.executable, "-c", code, apk, site], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        closed = re.compile(r"\(.*?\)")  # androguard puts spaces between parameters
        named = json.loads(done.stdout)
        return {c: [closed.sub(lambda m: m[0].replace(" ", ""), use) for use in found] for c, found in named.items()}

    return uses


def in_api(classes) -> set[str]:
    """Every method and field of the API as bytecode names it, also where a class inherits it."""
    types = _Types(classes)
    generics = {(c.package, c.name): types.parameters(c.generics) for c in classes}
    own, above = {}, {}
    for c in classes:
        scope = types.parameters(c.generics)
        for k in range(1, c.name.count(".") + 1):
            outer = ".".join(c.name.split(".")[:k])
            scope |= generics.get((c.package, outer), {})
        own[c.binary] = set()
        for m in c.members:
            inner = scope | types.parameters(m.generics)
            parameters = "".join(types.erased(p, inner) for p in m.parameters)
            form = f"({parameters})" if m.kind in ("method", "ctor") else " "
            own[c.binary].add(f"{m.name}{form}{types.erased(m.type, inner)}")
        above[c.binary] = [types.erased(t, scope)[1:-1] for t in (c.extends or "java.lang.Object", *c.implements)]

    def members(binary, seen=()):
        if binary in seen or binary not in own:
            return set()
        return own[binary].union(*(members(parent, (*seen, binary)) for parent in above[binary]))

    return {f"L{binary};->{member}" for binary in own for member in members(binary)}


@pytest.mark.slow
def test_every_call_of_the_platform_stands_in_the_api(app, packages, androguard):
    uses = androguard(app.apk)
    assert {"Lnb/calib/tagger/MainActivity;", "Lnb/calib/tagger/Engine;", "Lcom/facebook/jni/HybridData;"} <= set(uses)
    known = in_api(parse_api((packages["android-api"] / "api/current.txt").read_text(encoding="utf-8")))
    named = {use for found in uses.values() for use in found if use.startswith(("Landroid/", "Ljava/"))}
    assert len(named) > 100
    assert sorted(named - known) == []
    plain = {c for c, found in uses.items() if any(use.startswith("Landroid/") for use in found)}
    thin = {f"Lnb/calib/tagger/{name.removesuffix('.kt')}" for name in THIN}
    assert all(any(c.startswith(t) for t in thin) for c in plain), plain


@pytest.mark.slow
def test_two_builds_are_equal_but_for_the_signature(app, programs, packages, tmp_path, monkeypatch):
    (tmp_path / "android").mkdir()
    for name in read_lock():
        (tmp_path / "android" / name).symlink_to(cache_root() / "android" / name)
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path))
    photos = next((programs / "drawn").rglob("images"))
    again = build_app([programs / "int8.pte", programs / "fp32.pte"], tmp_path / "b.apk", photos=photos, progress=False)
    assert (again.steps.result == "made").all()
    assert again.unsigned.read_bytes() == app.unsigned.read_bytes()
    assert again.apk.read_bytes() != app.apk.read_bytes()  # another debug key


@pytest.mark.slow
def test_ones_own_keystore_signs(programs, packages, tmp_path, monkeypatch):
    words = [
        "-alias",
        "own",
        "-keyalg",
        "RSA",
        "-dname",
        "CN=Own",
        "-storepass",
        "a secret",
        "-keystore",
        tmp_path / "own.p12",
    ]
    subprocess.run(["keytool", "-genkeypair", *words], check=True, capture_output=True)
    monkeypatch.setenv(PASSWORD, "a secret")
    options = AppOptions(keystore=tmp_path / "own.p12")
    build = build_app([programs / "int8.pte"], tmp_path / "own.apk", options=options, progress=False)
    line = ["apksigner", "verify", "--print-certs", "--min-sdk-version", "26", build.apk]
    assert "CN=Own" in subprocess.run(line, capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(CalibError, match="step sign failed"):
        build_app([programs / "fp32.pte"], tmp_path / "own.apk", options=options, progress=False)
    assert "secret" not in Path(build.steps.set_index("step").folder["sign"], "log.txt").read_text()


@pytest.mark.slow
def test_a_mistake_in_a_source_is_one_line_with_its_log(packages, programs, tmp_path, monkeypatch):
    copy = tmp_path / "android"
    shutil.copytree(android_sources(), copy)
    values = copy / "app/src/main/res/values/strings.xml"
    values.write_text(values.read_text().replace('name="start"', 'name="begin"'))
    monkeypatch.setattr("calib_nb.android.build.android_sources", lambda: copy)
    with pytest.raises(CalibError, match=r"step resources failed: .*string/start.*; its log: .*resources\.txt"):
        build_app([programs / "int8.pte"], tmp_path / "app.apk", progress=False)


@pytest.mark.slow
def test_the_jvms_result_is_laid_beside_the_pcs(jvm, native, programs, tmp_path):
    """The app's engine writes result.json in the JVM; the comparison reads it as it would read a phone's."""
    photos = load_coco(demo_checkpoints().coco).table.path[:12]
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos:
        image = decode(path)
        (folder / f"{Path(path).stem}.png").write_bytes(encode_png(image))
    junit(jvm, "JvmRun", native=native, programs=programs, photos=folder, result=tmp_path / "result.json")
    comparison = compare_phone(tmp_path / "result.json", programs / "int8.pte", folder)
    assert comparison.within_step and len(comparison.table) == 12
    assert comparison.table.same_tags.mean() >= 0.9  # a score on the threshold itself may fall to either side
    assert comparison.phone["backends"] == ["XnnpackBackend"] and comparison.times.run.phone > 0

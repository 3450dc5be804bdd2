"""The structure that keeps the house livable: floors, budgets, notebooks and modules in step."""

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
# From the ground up: a module imports what stands below it; in a folder, what has a lower number.
FLOORS = (
    "core",
    "data graph",
    "quant npu",
    "analysis nets",
    "faces depth tags",
    "training",
    "android",
    "api report",
    "batch",
    "commands explore",
    "demo",
    "cli",
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts.split()}
# Wholly about torch modules, and imported by nothing on the way to `calib-nb --help`.
TORCH_MODULES = {
    "nets.resnet",
    "depth.losses",
    "depth.network",
    "depth.train",
    "depth.unequal",
    "faces.edgenext",
    "nets.lsq",
    "training.margins",
    "training.partial_fc",
}
# Wholly about widgets, and imported by explorers alone when they are shown.
WIDGET_MODULES = {"explore.widgets"}
SOURCES = sorted(p for p in NBS.rglob("*.ipynb") if re.match(r"\d\d_", p.name) and ".ipynb_checkpoints" not in p.parts)
RUNNABLE = sorted(p for folder in ("reports", "benchmarks") for p in (NBS / folder).glob("*.ipynb"))
EVERY = [*SOURCES, *RUNNABLE, NBS / "index.ipynb"]


def name(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


@cache  # a dozen tests read each notebook
def cells(path: Path) -> list[dict]:
    loaded = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in loaded]


def exported(path: Path) -> list[str]:
    return [c["source"] for c in cells(path) if c["cell_type"] == "code" and c["source"].startswith("#| export")]


def module_of(path: Path) -> str:
    found = [m[1] for c in cells(path) if (m := re.search(r"^#\| default_exp ([\w.]+)$", c["source"], re.M))]
    assert len(found) == 1, f"{name(path)} has {len(found)} default_exp lines"
    return found[0]


def imports(source: str) -> set[str]:
    tree = ast.parse(source)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


MODULES = {module_of(path): path for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_downward_only(path):
    module = module_of(path)
    used = {found for source in exported(path) for found in imports(source)}
    for other, where in MODULES.items():
        if other != module and f"calib_nb.{other}" in used:
            mine, theirs = (m.split(".")[0] for m in (module, other))
            below = where.name < path.name if mine == theirs else FLOOR_OF[theirs] < FLOOR_OF[mine]
            assert below, f"{module} imports {other}, which does not stand below it"
    makers = {u.split(".")[0] for u in used} & {"nbdev", "fastcore", "execnb"}
    assert not makers, f"{module} imports what only makes the package"


@pytest.mark.parametrize("folder", sorted({p.parent for p in SOURCES}), ids=lambda p: p.name)
def test_numbers_are_the_order_of_reading(folder):
    numbers = sorted(int(p.name[:2]) for p in SOURCES if p.parent == folder)
    first = 0 if folder == NBS else 1
    assert numbers == list(range(first, first + len(numbers)))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    module = ROOT / "calib_nb" / (module_of(path).replace(".", "/") + ".py")
    top = [
        node
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    named = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names} | {
        (n.module or "").split(".")[0] for n in top if isinstance(n, ast.ImportFrom)
    }
    heavy = {
        "torch",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "seaborn",
        "scipy",
        "PIL",
        "imagehash",
        "joblib",
        "papermill",
        "nbconvert",
        "mediapipe",
        "executorch",
        "ipywidgets",
        "anywidget",
    }
    allowed = {"torch"} if module_of(path) in TORCH_MODULES else set()
    allowed |= {"ipywidgets", "anywidget"} if module_of(path) in WIDGET_MODULES else set()
    assert not named & (heavy - allowed)


def test_the_command_line_answers_without_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, calib_nb.cli; assert 'torch' not in sys.modules"], cwd=ROOT, check=True
    )


def code_lines(source: str) -> int:
    """Lines of an exported cell that are code: docstrings, comments and blank lines cost nothing."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            for k in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[k] = ""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_notebooks_keep_their_budget(path):
    assert len(cells(path)) <= 60
    assert sum(map(code_lines, exported(path))) <= 300
    assert path.stat().st_size <= 100_000


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_exported_name_is_told_used_and_asserted(path):
    public, prose, code = [], [], []
    for cell in cells(path):
        if cell["source"].startswith("#| export"):
            tree = ast.parse(cell["source"])
            found = [
                n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
            ]
            public += [n.name for n in found]
            assert all(ast.get_docstring(n) for n in found), (
                f"no docstring: {[n.name for n in found if not ast.get_docstring(n)]}"
            )
        elif cell["cell_type"] == "markdown":
            prose.append(cell["source"])
        else:
            code.append(cell["source"])
    unused = [n for n in public if not re.search(rf"\b{n}\b", "\n".join(code))]
    assert not unused, f"exported but never used in the notebook: {unused}"
    assert "assert" in "\n".join(code) and len("\n".join(prose).split(".")) >= len(public)
    first = next(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n\n> .+", first), "the first text cell is a title and a one-line summary as a quote"


def test_one_notebook_per_module_and_one_module_per_notebook():
    modules = [module_of(path) for path in SOURCES]
    assert len(modules) == len(set(modules))
    written = {
        p.relative_to(ROOT / "calib_nb").with_suffix("").as_posix().replace("/", ".")
        for p in (ROOT / "calib_nb").rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py", "_modidx.py")
    }
    assert written == set(modules)
    assert not [w for w in written if w.split(".")[-1] in ("utils", "helpers", "misc")]


def public_names(path: Path) -> set[str]:
    """What an exported module offers to `import *`, without the names by which commands and tasks are found."""
    tree = ast.parse((ROOT / "calib_nb" / (module_of(path).replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    return set(ast.literal_eval(lists[0])) - {"app", "KINDS"} if lists else set()


def test_no_public_name_has_two_homes():
    homes = {}
    for path in SOURCES:
        for public in public_names(path):
            homes.setdefault(public, []).append(module_of(path))
    assert {n: where for n, where in homes.items() if len(where) > 1} == {}


def test_the_front_door_names_what_exists():
    import calib_nb

    assert set(calib_nb.__all__) == set(calib_nb._HOMES)
    door = ast.parse((ROOT / "calib_nb" / "__init__.py").read_text(encoding="utf-8"))
    seen = {a.name: n.module for n in ast.walk(door) if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
    assert seen == calib_nb._HOMES, "what type checkers see differs from what is imported"
    assert all(callable(getattr(calib_nb, public)) for public in calib_nb.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        calib_nb.quantise  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import calib_nb; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    allowed = {"calib_nb", *sys.stdlib_module_names}
    assert [m for m in ast.literal_eval(done.stdout) if m.split(".")[0] not in allowed] == []


def next_of(path: Path) -> Path | None:
    """The notebook that the last "Next:" of a notebook leads to."""
    text = "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
    links = re.findall(r"Next: [^\n]*?\]\(([^)#\s]+)", text)
    return (path.parent / links[-1]).resolve() if links else None


def test_the_chain_of_next_reaches_every_notebook():
    reached, path = [], NBS / "00_tour.ipynb"
    while path and path not in reached:
        reached.append(path)
        path = next_of(path)
    assert [name(p) for p in SOURCES if p not in reached] == []


@pytest.mark.parametrize("path", EVERY, ids=name)
def test_code_in_notebooks_fits_120_columns(path):
    long = [
        line for c in cells(path) if c["cell_type"] == "code" for line in c["source"].splitlines() if len(line) > 120
    ]
    assert not long, long[0]


@pytest.mark.parametrize("path", sorted((NBS / "reports").glob("*.ipynb")), ids=name)
def test_a_report_has_one_cell_of_literal_parameters(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(tagged[0]["source"]).body
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in body)
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    assert {"name", "run_dir"} <= set(values) and values["run_dir"] == ""
    assert all("#" in line for line in tagged[0]["source"].splitlines() if line.strip()), (
        "each parameter says beside it what it is"
    )
    assert not exported(path)


def test_readme_is_in_step():
    done = subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "README.md", *ROOT.glob("outputs/*.md"), *EVERY)), ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(path):
    text = (
        path.read_text(encoding="utf-8")
        if path.suffix == ".md"
        else "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
    )
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"https?:|attachment:|mailto:", target):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_export_and_clean_change_nothing(tmp_path):
    """Run on a copy, so that a stale export is found rather than mended."""
    copy = tmp_path / "house"
    copy.mkdir()
    for part in ("nbs", "calib_nb"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    after = {
        p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert sorted(str(p) for p in after if before.get(p) != after[p]) == []
    assert set(before) <= set(after)


def test_the_parameters_tag_survives_cleaning():
    settings = (ROOT / "settings.ini").read_text()
    assert (
        "allowed_cell_metadata_keys = tags papermill" in settings
        and "clear_all = False" in settings
        and "update_pyproject = False" in settings
    )


def test_nothing_names_the_machine_it_was_written_on():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    texts = [
        ROOT / f
        for f in listed
        if f and (ROOT / f).is_file() and (ROOT / f).suffix in (".py", ".ipynb", ".md", ".ini", ".txt", ".yaml")
    ] or EVERY
    pattern = re.compile(r"/(?:home|root|Users)/[\w.]+/|" + re.escape(f"{ROOT}/"))
    assert [p.name for p in texts if pattern.search(p.read_text(encoding="utf-8"))] == []


def test_the_code_is_tidy():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "calib_nb",
            "tests",
            ".ci",
            "setup.py",
            "hubconf.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_every_bar_can_be_switched_off_from_outside():
    """`--quiet` sets TQDM_DISABLE, which any value of `disable` would overrule."""
    overruled = [p.name for p in (ROOT / "calib_nb").rglob("*.py") if re.search(r"disable=(not|False)", p.read_text())]
    assert not overruled, "use core.parallel.bar_switch"

"""Every source notebook runs from top to bottom, with its assertions, as a reader would run it."""

import re
from pathlib import Path

import forked
import notebook_run
import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
SOURCES = sorted(p for p in NBS.rglob("*.ipynb") if re.match(r"\d\d_", p.name) and ".ipynb_checkpoints" not in p.parts)
SECONDS = 600
# Notebooks whose every text is the same on any processor: selection, tables, configs, names, counts.
EXACT = (
    "core/01_errors.ipynb",
    "core/02_run.ipynb",
    "core/03_parallel.ipynb",
    "core/05_cache.ipynb",
    "core/06_seeds.ipynb",
    "core/07_figures.ipynb",
    "core/08_page.ipynb",
    "core/09_similarity.ipynb",
    "core/10_margins.ipynb",
    "core/11_settings.ipynb",
    "data/01_images.ipynb",
    "data/02_operations.ipynb",
    "data/03_preprocess.ipynb",
    "data/04_demo_images.ipynb",
    "data/05_score.ipynb",
    "data/06_duplicates.ipynb",
    "data/07_bins.ipynb",
    "data/08_sample.ipynb",
    "data/09_set_files.ipynb",
    "data/11_dataset.ipynb",
    "npu/01_config.ipynb",
    "npu/02_findings.ipynb",
    "npu/03_validate.ipynb",
    "npu/05_compile.ipynb",
    "npu/06_vendor_hints.ipynb",
    "depth/03_metadata.ipynb",
    "depth/04_split.ipynb",
    "tags/07_config.ipynb",
    "index.ipynb",
)
# Notebooks of six seconds and more run among the slow tests; the tests beside them hold the same steps in quick ones.
LONG = {
    "01_front_door.ipynb": "test_front_door.py",
    "02_report.ipynb": "test_reports.py",
    "03_cli.ipynb": "test_cli.py",
    "04_batch.ipynb": "test_batch.py",
    "commands/02_npu.ipynb": "test_config.py",
    "commands/03_quant.ipynb": "test_cli.py",
    "commands/04_faces.ipynb": "test_bench.py",
    "commands/05_depth.ipynb": "test_depth_data.py",
    "commands/06_depth_model.ipynb": "test_depth_model.py",
    "commands/07_tags.ipynb": "test_tags_train.py",
    "core/12_cluster.ipynb": "test_cluster.py",
    "core/17_merge.ipynb": "test_cluster.py",
    "data/11_dataset.ipynb": "test_dataset.py",
    "depth/01_demo_drawings.ipynb": "test_depth_data.py",
    "depth/06_analyze.ipynb": "test_depth_data.py",
    "depth/10_train.ipynb": "test_depth_model.py",
    "depth/11_unequal.ipynb": "test_depth_ablation.py",
    "depth/14_ablation.ipynb": "test_depth_ablation.py",
    "faces/10_demo.ipynb": "test_demo_faces.py",
    "faces/13_edgeface.ipynb": "test_edgeface.py",
    "faces/15_charts.ipynb": "test_bench.py",
    "faces/18_bench.ipynb": "test_bench.py",
    "explore/03_images.ipynb": "test_explore.py",
    "nets/04_convert.ipynb": "test_tags_export.py",
    "nets/05_pte.ipynb": "test_tags_export.py",
    "quant/09_adaround.ipynb": "test_equalize.py",
    "quant/11_bias_clip.ipynb": "test_equalize.py",
    "quant/21_recipe.ipynb": "test_recipe.py",
    "quant/22_stability.ipynb": "test_coverage.py",
    "quant/26_harden.ipynb": "test_harden.py",
    "quant/19_distill.ipynb": "test_distill.py",
    "tags/08_train.ipynb": "test_tags_train.py",
    "tags/09_qat.ipynb": "test_tags_lsq.py",
    "tags/10_evaluate.ipynb": "test_tags_train.py",
    "tags/12_export.ipynb": "test_tags_export.py",
    "tags/13_demo.ipynb": "test_tags_task.py",
}


def name(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


def running(path: Path):
    return pytest.param(path, marks=pytest.mark.slow) if name(path) in LONG else path


def execute(path: Path) -> list[list[str]]:
    """What each code cell shows; the test fails with the cell that raised."""
    ours, theirs = forked.server().Pipe(duplex=False)
    process = forked.start(notebook_run.run, str(path), theirs)
    theirs.close()
    try:
        error, texts = ours.recv() if ours.poll(SECONDS) else (f"no end within {SECONDS} s", [])
    except EOFError:
        error, texts = f"its process ended without a word: python tests/notebook_run.py {path}", []
    process.join(5)
    if process.is_alive():
        process.kill()
    assert not error, error[-6000:]
    return texts


def test_long_notebooks_and_the_quick_tests_of_their_steps_are_there():
    assert all((NBS / notebook).is_file() for notebook in LONG)
    assert all(Path(__file__).with_name(test).is_file() for test in LONG.values())


@pytest.mark.parametrize("path", map(running, [*SOURCES, NBS / "index.ipynb"]), ids=name)
def test_notebook_runs(path):
    texts = execute(path)
    if name(path) in EXACT:
        cells = notebook_run.code_cells(path)
        stored = [notebook_run.shown(cell["outputs"]) for cell in cells]
        different = [k for k in range(len(cells)) if stored[k] != texts[k]]
        assert not different, f"cell {different[0]}: stored {stored[different[0]]}, now {texts[different[0]]}"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((NBS / "reports").glob("*.ipynb"))], ids=name)
def test_examples_are_stored_with_what_they_show(path):
    bare = [
        c["source"] for c in notebook_run.code_cells(path) if notebook_run.is_example(c["source"]) and not c["outputs"]
    ]
    assert not bare, f"run it with `make notebooks`; no output below:\n{bare[0]}"

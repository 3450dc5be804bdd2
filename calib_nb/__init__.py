"""From a float vision model to INT8 on an edge NPU, and what it cost: `import calib_nb as cn`."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .analysis.label_judge import Labels
    from .api import CompareOptions, audit, compare, coverage, diagnose, export_ranges, harden, judge, quantize
    from .data.dataset import prepare
    from .data.preprocess import preset
    from .data.score import score_folder
    from .demo import demo_steps
    from .faces.detectors import FaceDetector
    from .graph.contract import read_contract
    from .graph.fixed import fix_batch
    from .npu.compile import compile_model
    from .npu.config import generate_config, load_config, save_config
    from .npu.prove import prove
    from .npu.verify import verify
    from .report import run_report

# Each name and the module that it comes from: imported when it is first used.
_HOMES = {
    "prepare": "data.dataset",
    "score_folder": "data.score",
    "preset": "data.preprocess",
    "generate_config": "npu.config",
    "load_config": "npu.config",
    "save_config": "npu.config",
    "verify": "npu.verify",
    "prove": "npu.prove",
    "read_contract": "graph.contract",
    "fix_batch": "graph.fixed",
    "audit": "api",
    "quantize": "api",
    "CompareOptions": "api",
    "Labels": "analysis.label_judge",
    "compare": "api",
    "coverage": "api",
    "diagnose": "api",
    "harden": "api",
    "export_ranges": "api",
    "judge": "api",
    "compile_model": "npu.compile",
    "run_report": "report",
    "demo_steps": "demo",
    "FaceDetector": "faces.detectors",
}
__all__ = [
    "CompareOptions",
    "FaceDetector",
    "Labels",
    "audit",
    "compare",
    "compile_model",
    "coverage",
    "demo_steps",
    "diagnose",
    "export_ranges",
    "fix_batch",
    "generate_config",
    "harden",
    "judge",
    "load_config",
    "prepare",
    "preset",
    "prove",
    "quantize",
    "read_contract",
    "run_report",
    "save_config",
    "score_folder",
    "verify",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'calib_nb' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(f"calib_nb.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

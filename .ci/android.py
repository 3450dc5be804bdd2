"""Build the Android app of the demo tagger in INT8: `make android`."""

from pathlib import Path

from calib_nb.android.build import build_app, require_tools
from calib_nb.core.errors import CalibError
from calib_nb.core.run import output_root
from calib_nb.tags.demo import demo_checkpoints
from calib_nb.tags.export import export_checkpoint


def main() -> Path:
    """Train and export the demo tagger unless the cache has it, and build the app around it."""
    require_tools()  # before minutes of training
    folder, demo = output_root() / "android", demo_checkpoints()
    files = export_checkpoint(demo.checkpoint, folder, mode="int8", photos=demo.calibration_images, progress=True)
    return build_app([files.pte], folder / "tagger.apk", photos=demo.coco.parent / "images").apk


if __name__ == "__main__":
    try:
        app = main()
    except CalibError as e:
        raise SystemExit(f"{e}") from None
    print(f"== signed: {app}, {app.stat().st_size / 1e6:.1f} MB")

"""Packaging: names and versions live in settings.ini, the known-good set in constraints.txt."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
EXTRAS = ("torch", "executorch", "mediapipe", "cluster", "remote", "gcs", "lab", "docs", "dev", "toolchains")
extras = {name: settings[f"{name}_requirements"].split() for name in EXTRAS}
# Other people's quantizers serve as judges only, and Google's client is large.
extras["all"] = sorted({package for name in EXTRAS if name not in ("toolchains", "gcs") for package in extras[name]})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author=settings["author"],
    packages=[
        *find_packages(include=["calib_nb", "calib_nb.*"]),
        "calib_nb.reports",
        "calib_nb.android_app",
        "calib_nb.benchmarks",
    ],
    # Report notebooks, measured tables and the Android app's sources are part of the product: an installed package
    # carries them as data.
    package_dir={
        "calib_nb.reports": "nbs/reports",
        "calib_nb.android_app": "android",
        "calib_nb.benchmarks": "nbs/benchmarks",
    },
    # py.typed says that the package carries its types; the rest is a small demo model and what describes it.
    package_data={
        "calib_nb": ["py.typed", "**/*.json", "**/*.onnx"],
        "calib_nb.reports": ["*.ipynb"],
        "calib_nb.benchmarks": ["*.csv"],
        "calib_nb.android_app": ["**/*"],
    },
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": ["calib-nb = calib_nb.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Typing :: Typed",
    ],
    zip_safe=False,
)

"""The site of the documentation, without network: `python .ci/docs.py [FOLDER]`, into outputs/docs by default.

Every notebook is a page, with the outputs that it stores; every module has an API page. A warning fails the build, and
so does a link between pages that leads nowhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PAGES = ("README.ko.md", "CONTRIBUTING.md", "CHANGELOG.md")
ASSETS = (".svg", ".png", ".csv", ".jpg", ".md")
FOLDERS = ("core", "data", "graph", "quant", "npu", "analysis", "nets", "faces", "depth", "tags", "training", "android")
LAST = ("explore", "commands", "reports", "benchmarks")


def notebooks(folder: Path) -> list[Path]:
    """Notebooks of one folder in the order of reading, without what editors and runs leave."""
    return sorted(p for p in folder.glob("*.ipynb") if p.name != "index.ipynb")


def title(path: Path) -> str:
    """The first heading of a notebook."""
    texts = ("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    return next(m[1].strip() for text in texts if (m := re.search(r"^# (.+)$", text, re.M)))


def page_of(path: Path) -> dict:
    """A notebook for readers: without nbdev's directives and hidden cells, with a link to the API of its module."""
    book = json.loads(path.read_text(encoding="utf-8"))
    cells, module = [], ""
    for cell in book["cells"]:
        source = "".join(cell["source"])
        module = module or (m[1] if (m := re.match(r"#\| default_exp ([\w.]+)", source)) else "")
        if re.match(r"#\| (default_exp|hide)\b", source) or not source.strip():
            continue
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
            if "hide-input" in cell["metadata"].get("tags", []):
                cell["metadata"]["tags"] = ["remove-input"]
            for output in cell["outputs"]:  # pandas names its tables twice; the plain one is for terminals
                output.get("metadata", {}).clear()
                for kind in {"text/markdown", "text/html"} & set(output.get("data", {})):
                    output["data"][kind] = pictured("".join(output["data"][kind]), path)
        else:
            source = re.sub(r"\]\(((?:\.\./)*)index\.ipynb", r"](\1../index.md", linked(source, path))
        cells.append(cell | {"source": source})
    if module:
        up = "../" * len(path.relative_to(ROOT).parent.parts)
        text = f"Module `calib_nb.{module}`: [every name of it]({up}api/{module}.md)"
        cells.insert(1, {"cell_type": "markdown", "id": "module", "metadata": {}, "source": text})
    return book | {"cells": cells}


def linked(text: str, path: Path) -> str:
    """Markdown whose links to files of the checkout that are no page of the site are plain text."""

    def link(found: re.Match) -> str:
        target = (path.parent / found[2].partition("#")[0]).resolve()
        inside = (
            target.is_relative_to(NBS)
            and target.exists()
            or target.name in (*PAGES, "LICENSE", "README.md")
            and target.parent == ROOT
        )
        return found[0] if re.match(r"\w+:|#", found[2]) or inside else found[1]

    return re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^()\s]+)\)", link, text)


def pictured(text: str, path: Path) -> str:
    """An output without pictures and files that lay beside it when the notebook ran, and lie there no more."""

    def there(target: str) -> bool:
        return bool(re.match(r"\w+:|#", target)) or (path.parent / target).exists()

    def picture(found: re.Match) -> str:
        return found[0] if there(found[2]) else f"({found[1] or found[2]})"

    def words(found: re.Match) -> str:
        return found[0] if there(found[1]) else found[2]

    text = re.sub(r"!?\[([^\]]*)\]\(([^()\s]+)\)", picture, text)
    text = re.sub(r"<a\b[^>]*\bhref=\"([^\"]+)\"[^>]*>(.*?)</a>", words, text, flags=re.S)
    return re.sub(r"<img()[^>]*\bsrc=\"([^\"]+)\"[^>]*>", picture, text)


def toctree(caption: str, entries: list[str], depth: int = 1, hidden: bool = True) -> str:
    """A table of contents in MyST's form."""
    options = [f":caption: {caption}"] * bool(caption) + [f":maxdepth: {depth}"] + [":hidden:"] * hidden
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def write_sources(source: Path) -> None:
    """All pages below `source`, under the paths that they have in the checkout, so that their links hold."""
    for page in PAGES:
        text = linked((ROOT / page).read_text(encoding="utf-8"), ROOT / page)
        (source / page).write_text(text.replace("](README.md)", "](index.md)"), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", source)
    for path in sorted(NBS.rglob("*")):
        parts = path.relative_to(NBS).parts
        if path.suffix in ASSETS and not {"outputs", ".ipynb_checkpoints"} & set(parts):
            (source / "nbs").joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, (source / "nbs").joinpath(*parts))
    folders = [f for f in (*FOLDERS, *LAST, "tutorials") if (NBS / f).is_dir()]
    books = [*notebooks(NBS), *(p for folder in folders for p in notebooks(NBS / folder))]
    for path in books:
        place = source / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(page_of(path)), encoding="utf-8")
    for folder in folders:
        entries = [p.stem for p in notebooks(NBS / folder)]
        listed = toctree("", entries, hidden=False)
        (source / "nbs" / folder / "index.md").write_text(f"# {folder}\n\n{listed}", encoding="utf-8")
    write_api(source / "api", [p for p in books if p.parent.name in (*FOLDERS, "commands", "nbs", "explore")])
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    guides = [f"nbs/guides/{p.stem}" for p in sorted((NBS / "guides").glob("*.md"))]
    begin = [*(f"nbs/{p.stem}" for p in notebooks(NBS)), "nbs/tutorials/index", *guides]
    trees = [
        toctree("Begin", [b for b in begin if not b.startswith("nbs/tutorials") or "tutorials" in folders]),
        toctree("Use", [f"nbs/{f}/index" for f in LAST if f in folders]),
        toctree("How it works", [f"nbs/{f}/index" for f in FOLDERS]),
        toctree("Reference", ["api/index", "CONTRIBUTING", "CHANGELOG"]),
        toctree("한국어", ["README.ko", "nbs/glossary.ko"]),
    ]
    (source / "index.md").write_text(english + "\n" + "\n".join(trees), encoding="utf-8")


def write_api(folder: Path, books: list[Path]) -> None:
    """A page per module, which links the notebook that it is written in."""
    folder.mkdir()
    modules = {}
    for path in books:
        text = path.read_text(encoding="utf-8")
        if found := re.search(r"#\| default_exp ([\w.]+)", text):
            modules[found[1]] = path
    for module, path in modules.items():
        back = f"Written in [{title(path)}](../{path.relative_to(ROOT).as_posix()})."
        page = [
            "---",
            "orphan: true",
            "---",
            "",
            f"# calib_nb.{module}",
            "",
            back,
            "",
            "```{eval-rst}",
            f".. automodule:: calib_nb.{module}",
            "```",
            "",
        ]
        (folder / f"{module}.md").write_text("\n".join(page), encoding="utf-8")
    rows = [f"- [calib_nb.{m}]({m}.md): {title(modules[m])}" for m in sorted(modules)]
    (folder / "index.md").write_text("# API\n\nOne page per module.\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


class _Page(HTMLParser):
    """The anchors and links of one page."""

    def __init__(self):
        super().__init__()
        self.ids, self.links = set(), []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.ids |= {known[name] for name in ("id", "name") if known.get(name)}
        self.links += [known[name] for name in ("href", "src") if known.get(name)]


def dead_links(site: Path) -> list[str]:
    """Links and anchors between pages that lead nowhere, and addresses that are none."""
    pages = {}
    for path in site.rglob("*.html"):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    faults = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                good = bool(re.fullmatch(r"[\w.-]+(:\d+)?", parts.netloc)) and " " not in link
            elif parts.scheme:
                good = parts.scheme in ("data", "mailto")
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                good = target.exists() and (
                    not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids
                )
            if not good:
                faults.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(set(faults))


def build(site: Path) -> int:
    """Build the site; returns the exit code."""
    start = time.perf_counter()
    if site.exists():
        shutil.rmtree(site)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(ROOT / ".ci" / "docs", source)
        write_sources(source)
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-d",
            f"{scratch}/doctrees",
        ]
        done = subprocess.run([*command, source, site], cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"})
    if done.returncode:
        return done.returncode
    faults = dead_links(site)
    print("\n".join(faults) or f"{site / 'index.html'}: {time.perf_counter() - start:.0f} s, no warning, no dead link")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "outputs" / "docs").resolve()))

"""The pages that people read first: both READMEs say the same, their links lead somewhere, the site builds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
KOREAN = (ROOT / "README.ko.md").read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """Fenced and indented code, in order."""
    return re.findall(r"^```\w+\n[^`]*```$|(?:^ {4}\S.*\n)+", text, re.M)


def table_rows(text: str) -> list[list[str]]:
    """Cells of all table rows that are neither header nor rule."""
    lines = text.splitlines()
    rows = [k for k, line in enumerate(lines) if line.startswith("|") and k and lines[k - 1].startswith("|")]
    return [lines[k].strip("|").split("|") for k in rows if not set(lines[k]) <= set("|- ")]


def test_both_readmes_have_the_same_code():
    assert code_blocks(ENGLISH) == code_blocks(KOREAN) and len(code_blocks(ENGLISH)) == 3


def test_both_readmes_have_the_same_numbers_and_links_in_their_tables():
    english, korean = table_rows(ENGLISH), table_rows(KOREAN)
    assert len(english) == len(korean) > 30
    for theirs, ours in zip(english, korean):
        for pattern in (r"-?\d+\.\d+", r"\]\(([^)]+)\)", r"`[^`]+`"):
            assert re.findall(pattern, "|".join(theirs)) == re.findall(pattern, "|".join(ours))


def test_the_readmes_link_to_each_other_at_the_top():
    assert "(README.ko.md)" in ENGLISH[:100] and "(README.md)" in KOREAN[:100]


def test_the_korean_readme_is_korean():
    prose = [
        line
        for line in KOREAN.splitlines()
        if line and not re.match(r"[|<#`!]| {4}|calib-nb|\w+ = |import|print", line)
    ]
    english_only = [
        line
        for line in prose
        if not re.search("[가-힣]", line) and not line.startswith(("chosen", "assert", "config", "model"))
    ]
    assert english_only == []


@pytest.mark.parametrize("page", ["README.ko.md", "nbs/glossary.ko.md", "CONTRIBUTING.md"])
def test_links_of_other_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match(r"https?:", target) or (ROOT / page).parent.joinpath(target).exists(), target


def test_the_glossary_explains_the_words_of_the_field():
    rows = table_rows((ROOT / "nbs" / "glossary.ko.md").read_text(encoding="utf-8"))
    terms = {row[0].strip() for row in rows}
    assert {"calibration set", "range", "scale", "zero point", "per tensor", "per channel", "SQNR"} <= terms
    assert {"clipping", "rounding", "bias correction", "cross-layer equalization", "mixed precision"} <= terms
    for row in rows:
        assert len(row) == 3 and re.search("[가-힣]", row[1]) and row[2].strip().endswith("다."), row


def guide_rows() -> list[tuple[list[str], str, str]]:
    """Rows of the guide: the commands of its section, the spelling that people know, and ours."""
    commands, rows = [], []
    for line in (ROOT / "nbs" / "guides" / "options.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("The command"):
            commands = re.findall(r"`calib-nb ([^`]+)`", line)
        elif line.startswith("| `--"):
            known, ours = (cell.strip().strip("`") for cell in line.strip("|").split("|")[:2])
            rows.append((commands, known, ours))
    return rows


def test_every_option_of_the_guide_exists_and_may_be_spelled_as_people_know_it():
    import typer.main

    from calib_nb import cli

    root = typer.main.get_command(cli.app)

    def options(words: str) -> set[str]:
        command = root
        for word in words.split():
            command = command.commands[word]
        return {name for parameter in command.params for name in parameter.opts}

    assert len(guide_rows()) > 35
    for commands, known, ours in guide_rows():
        assert any(ours in options(command) for command in commands), (commands, ours)
        assert cli._hyphens(known) == ours


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_dead_link(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, ".ci/docs.py", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    pages = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")}
    books = [p for p in (ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert {p.relative_to(ROOT).with_suffix(".html").as_posix() for p in books} <= pages
    assert {"index.html", "README.ko.html", "api/quant.quantize.html", "nbs/guides/options.html"} <= pages
    assert "calib_nb.quant.quantize" in (tmp_path / "site" / "api" / "index.html").read_text()

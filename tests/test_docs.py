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

"""README.md from nbs/index.ipynb, and what README.ko.md has in common with it.

`python .ci/readme.py` writes both, `--check` only says whether they are in step. The Korean page is written by hand;
its code blocks, and the rows of its tables but for Korean words, are taken over from the English page: commands,
links and numbers cannot differ.
"""

import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^```\w+\n(?:[^\n]*\n)*?```$|(?:^ {4}\S[^\n]*\n)+", re.M)
TABLE = re.compile(r"(?:^\|[^\n]*\|\n)+", re.M)
HANGUL = re.compile("[가-힣]")
METRICS = {
    "accuracy, LFW": "정확도, LFW",
    "(lower is better)": "(낮을수록 좋음)",
    "not measurable": "측정 불가",
}
FOLDERS = {
    "nbs": "여기서 시작: 둘러보기, Python API, 보고서, 명령줄",
    "core": "오류, 실행 폴더, 병렬 처리, 모델 목록, 캐시, 시드",
    "data": "이미지, 전처리, 점수, 선택, 중복, 보정 세트",
    "graph": "ONNX 자체: 읽기, 만들기, 단순화, 융합, 내보내기",
    "quant": "관측, 범위, 정수 격자, 타깃, 복원, 레시피, 파일 쓰기",
    "npu": "컴파일러 설정: 프리셋, 검사, 네트워크가 실제로 보는 입력",
    "analysis": "하락폭과 신뢰 구간, 문제가 되는 층, 과제",
    "nets": "torch 네트워크와 학습: 체크포인트, ResNet, LSQ, ExecuTorch",
    "faces": "얼굴 검출기 9종, 정렬, 인증, EdgeFace, LFW 벤치마크",
    "depth": "NCDB 데이터 세트, 층화 보정 분할, 네트워크와 학습",
    "tags": "이미지마다 태그가 여럿인 COCO, 학습, 점수, 스마트폰용 프로그램",
    "training": "얼굴 네트워크 학습: 마진, 전체 인물 헤드, 한 파일로 묶은 사진, INT8 인식 학습",
    "android": "Gradle 없이 빌드하는 스마트폰 벤치마크 앱, PC와의 비교",
    "commands": "셸 명령 하나하나",
    "explore": "직접 만져 보는 노트북: 슬라이더, 갤러리, 층별 히스토그램",
    "tutorials": "한 가지 일을 첫 명령부터 핵심 그림까지",
    "reports": "넘겨줄 수 있는 보고서(예제는 합성 데이터)",
    "benchmarks": "정확도와 속도(따로 밝힌 것은 실제 데이터)",
}


def readme() -> str:
    """The index notebook as Markdown whose links start at the top of the checkout."""
    from traitlets.config import Config

    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide-input"]}})
    text, _ = MarkdownExporter(config=config).from_filename(str(root / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def cells(row: str) -> list[str]:
    """The cells of one row of a Markdown table."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def translated(cell: str) -> str:
    """A cell of the English page in Korean where the translation is known."""
    folder = re.match(r"\*\*(\w+)\*\*: ", cell)
    if folder and folder[1] in FOLDERS:
        return folder[0] + FOLDERS[folder[1]]
    for english, korean in METRICS.items():
        cell = cell.replace(english, korean)
    return re.sub(r"(?<=\d) to (?=-?\d)", " ~ ", cell)


def merged(korean: str, english: str) -> str:
    """A cell of a table that is written by hand: Korean words stay, of a Korean link its address is taken over."""
    link = re.fullmatch(r"\[(.*)\]\(.*\)", korean)
    if link and HANGUL.search(link[1]):
        return f"[{link[1]}]({re.fullmatch(r'.*[(](.*)[)]', english)[1]})"
    return korean if HANGUL.search(korean) else english


def table_in_step(korean: str, english: str) -> str:
    """The Korean table with the rows of the English one; it is written by hand where every row begins in Korean."""
    ours, theirs = korean.splitlines(), english.splitlines()
    old, new = ([cells(row) for row in table[2:]] for table in (ours, theirs))
    if all(row[0] and HANGUL.search(row[0]) and not row[0].startswith("**") for row in old):
        if len(old) != len(new):
            raise SystemExit(f"README.ko.md: '{ours[0]}' has {len(old)} rows, README.md has {len(new)}")
        rows = [[merged(*both) for both in zip(mine, other)] for mine, other in zip(old, new)]
    else:
        rows = [[translated(cell) for cell in row] for row in new]
    return "\n".join([*ours[:2], *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def korean_readme(english: str, korean: str) -> str:
    """README.ko.md with the code blocks and the rows of the tables of README.md."""
    for pattern, taken in ((CODE, lambda ours, theirs: theirs), (TABLE, table_in_step)):
        blocks = pattern.findall(english)
        if len(blocks) != len(pattern.findall(korean)):
            raise SystemExit(f"README.ko.md has another number of code blocks or tables than README.md ({len(blocks)})")
        rest = iter(blocks)
        korean = pattern.sub(lambda ours, rest=rest, taken=taken: taken(ours[0], next(rest)), korean)
    return korean


if __name__ == "__main__":
    target, korean = root / "README.md", root / "README.ko.md"
    english = readme()
    pages = {target: english, korean: korean_readme(english, korean.read_text(encoding="utf-8"))}
    if "--check" in sys.argv:
        stale = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
        sys.exit(f"{', '.join(stale)}: not in step with nbs/index.ipynb: run `make export`" if stale else 0)
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")

"""Run one notebook from top to bottom in this process, and say what its cells showed."""

import ast
import json
import os
import re
import sys
from pathlib import Path

NUMBER_OF_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
TEMPORARY = re.compile(r"(/private)?(/tmp|/var/folders|/dev/shm)/[^\s'\",:)]*?(?=[/\s'\",:)]|$)")


def code_cells(path: Path) -> list[dict]:
    """Code cells with their source as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


def is_example(source: str) -> bool:
    """Whether a cell ends with a value to show: an expression without a semicolon, or a call of print or display."""
    if re.match(r"#\|\s*(export|exporti|exports|hide|default_exp)\b", source) or not source.strip():
        return False
    try:
        last = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body[-1]
    except (SyntaxError, IndexError):
        return False
    closes = isinstance(last, ast.Expr) and getattr(getattr(last.value, "func", None), "attr", "") == "close"
    return isinstance(last, ast.Expr) and not closes and not source.rstrip().endswith(";")


def shown(outputs: list[dict]) -> list[str]:
    """The texts among a cell's outputs, without addresses and temporary paths; pictures are left out."""
    texts, printing = [], False
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            text = "".join(output["text"])
            # A busy machine hands over what one cell prints in several pieces.
            texts = [*texts[:-1], texts[-1] + text] if printing else [*texts, text]
            printing = True
            continue
        printing = False
        if output["output_type"] in ("execute_result", "display_data") and "image/png" not in output["data"]:
            texts.append("".join(output["data"].get("text/plain", "")))
    return [TEMPORARY.sub("TMP", NUMBER_OF_ADDRESS.sub("0x", text)).strip() for text in texts if text.strip()]


def run(path: str, pipe) -> None:
    """Execute a notebook in its folder and send (error or "", what each cell showed); meant for a separate process.

    What libraries write past the cells, as warnings of a log, goes nowhere; `notebook_run.py NOTEBOOK` shows it.
    """
    if not isinstance(pipe, _Ending):
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    os.environ |= {"TQDM_DISABLE": "1", "MPLBACKEND": "agg", "IN_TEST": "1"}
    import pandas as pd
    from execnb.shell import CaptureShell

    pd.set_option("display.max_columns", 20)  # as in JupyterLab; a table in a terminal leaves columns out by its width
    path = Path(path)
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format="png")
    shell._run("set_matplotlib_formats('png', bbox_inches=None)")  # cropping draws every figure twice
    texts = []
    for number, cell in enumerate(code_cells(path)):
        if re.search(r"^#\|\s*eval:\s*false", cell["source"], re.M):
            texts.append([])
            continue
        shell._cell_idx = number  # named by its traceback
        try:
            outputs = shell.run(cell["source"])
        except Exception as e:  # the shell itself
            outputs, shell.exc = [], e
        if shell.exc:
            pipe.send((f"{path.name}, code cell {number}:\n{cell['source']}\n{shell.prettytb(fname=path)}", texts))
            return
        texts.append(shown(outputs))
    pipe.send(("", texts))


class _Ending:
    """Where `run` sends its result when no pipe is there: the end of this process."""

    def send(self, result: tuple[str, list]) -> None:
        sys.exit(result[0] or 0)


if __name__ == "__main__":
    run(sys.argv[1], _Ending())

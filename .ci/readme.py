"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` only says whether it is in step."""

import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def readme() -> str:
    """The index notebook as Markdown whose links start at the top of the checkout."""
    from traitlets.config import Config

    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide-input"]}})
    text, _ = MarkdownExporter(config=config).from_filename(str(root / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    target = root / "README.md"
    if "--check" in sys.argv:
        sys.exit(
            0
            if target.read_text(encoding="utf-8") == readme()
            else "README.md is not in step with nbs/index.ipynb: run `make export`"
        )
    target.write_text(readme(), encoding="utf-8")

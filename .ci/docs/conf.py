"""Sphinx: notebooks as they are stored, an API page per module, nothing from the network."""

import re
from importlib.util import find_spec

project = "calib_nb"
copyright = "2026, the calib_nb authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "calib_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
language = "en"
nitpicky = True

# Notebooks: what is stored is shown; `make notebooks` keeps it true.
nb_execution_mode = "off"
nb_merge_streams = True
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = True

# API: docstrings in Google's form, values in single backticks; extras that are not installed are stood in for.
_OPTIONAL = ("torch", "torchao", "executorch", "mediapipe", "distributed", "dask", "tensorboard", "ipywidgets")
autodoc_mock_imports = [name for name in _OPTIONAL if find_spec(name) is None]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # they stand in the signature's own text; types of other packages would be dead references
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_display_short_literal_types = True
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False


def plain_words(text: str) -> str:
    """A docstring, which is written for people: what reStructuredText would read is escaped outside `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\\)([*|`])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", parts[i])
    for i in range(1, len(parts), 2):  # `code` that touches a word
        parts[i] = (
            "\\ " * bool(re.search(r"\w$", parts[i - 1])) + parts[i] + "\\ " * bool(re.match(r"\w", parts[i + 1]))
        )
    return "".join(parts)


def for_sphinx(app, what, name, obj, options, lines):
    """Docstrings before napoleon reads them: "Returns:" is prose here, and never names a type before its colon."""
    if (
        name.startswith(("calib_nb.cli.", "calib_nb.commands."))
        and "Args:" not in map(str.strip, lines)
        and "" in lines
    ):
        del lines[lines.index("") :]  # the rest is Markdown for a terminal: --help shows it
    returns = False
    for k, line in enumerate(plain_words("\n".join(lines)).split("\n")):
        if line.strip() in ("Returns:", "Yields:"):
            returns, line = True, ""
        elif returns and line.strip():
            line, returns = f":returns: {line.strip()}", False
        lines[k] = line
    if what in ("property", "attribute"):  # napoleon would read the words before their first colon as a type
        _PROSE[name], lines[:] = list(lines), []


_PROSE = {}


def restore_prose(app, what, name, obj, options, lines):
    """What napoleon was not to read."""
    lines[:] = _PROSE.pop(name, lines)


def setup(app):
    app.connect("autodoc-process-docstring", for_sphinx, priority=400)
    app.connect("autodoc-process-docstring", restore_prose, priority=600)

"""How Sphinx builds the documentation: `make docs`."""

import re
import shutil
from pathlib import Path

import hbll

HERE = Path(__file__).parent

project = "hbll"
author = "The hbll developers"
project_copyright = author
release = hbll.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hbll {release}"
templates_path: list[str] = []

default_role = "code"  # `name` in docstrings, as in the pages
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
nitpick_ignore_regex = [("py:(class|data|obj)", ".*")]  # annotations: names of torch and of typing, aliases

# The tables of the benchmarks lie beside these pages; the site has them too.
shutil.copytree(HERE.parent / "benchmarks" / "results", HERE / "results", dirs_exist_ok=True)


def _link_results(app, page, source):
    source[0] = re.sub(r"\]\((\.\./)+benchmarks/results/", "](/results/", source[0])


COLON = "\N{RATIO}"


def _hide_colons(app, what, name, obj, options, lines):
    """What stands before a colon in a sentence about an attribute is no type, as napoleon would have it."""
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", COLON) for line in lines]


def _as_written(app, what, name, obj, options, lines):
    """Norms are written |x| in docstrings, which is a substitution in reStructuredText; in those of modules what is
    indented is code."""
    text = "\n".join(lines).replace(COLON, ":").replace("|", r"\|")
    lines[:] = (text.replace("\n\n    ", "\n\n::\n\n    ") if what == "module" else text).split("\n")


def setup(app):
    app.connect("source-read", _link_results)
    app.connect("autodoc-process-docstring", _hide_colons, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _as_written, priority=600)  # after it

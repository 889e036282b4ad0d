"""Configuration of the documentation, which `make docs` builds with warnings as errors."""

from __future__ import annotations

import re
from importlib.metadata import version as _version

from sphinx.application import Sphinx

project = "sttp-manifold"
author = "The sttp-manifold developers"
release = version = _version("sttp-manifold")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"sttp-manifold {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _shapes_are_literal(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Set ``Shape:`` blocks as they stand: the ``*`` of a batch is no emphasis."""
    out: list[str] = []
    inside = False
    for line in lines:
        if re.fullmatch(r"Shapes?:", line):
            inside = True
            out += [".. rubric:: Shape", "", "::", ""]
        elif inside and line and not line.startswith(" "):
            inside = False
            out += ["", line]
        else:
            out.append(line)
    lines[:] = out


def setup(app: Sphinx) -> None:
    """Register the docstring filter ahead of napoleon."""
    app.connect("autodoc-process-docstring", _shapes_are_literal, priority=100)

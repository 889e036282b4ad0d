"""Configuration of the documentation, which `make docs` builds with warnings as errors.

Nothing here needs a network. With one, names of torch, geoopt and Python link to their pages.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as _version
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
BUILD = HERE / "_build"

project = "sttp-manifold"
author = "The sttp-manifold developers"
project_copyright = author
release = version = _version("sttp-manifold")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "results"]

# -- notebooks ------------------------------------------------------------------------------------
# They live outside of docs/, without outputs; what is built from are executed copies.
sys.path.insert(0, str(HERE))
from _notebooks import prepare_notebooks  # noqa: E402

prepare_notebooks(HERE / "notebooks")
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables among the outputs
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

# -- pages ----------------------------------------------------------------------------------------
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = f"sttp-manifold {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "sttp-manifold"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# -- reference ------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
toc_object_entries_show_parents = "hide"

# -- names of others ------------------------------------------------------------------------------
_INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "geoopt": "https://geoopt.readthedocs.io/en/latest/",
}


def _inventory(name: str) -> tuple[str, tuple[str, str]] | None:
    """Address and inventory of a documentation: fresh, or kept from a build before, or none.

    Sphinx warns about an address that does not answer, and a warning ends the build.
    """
    address, kept = _INVENTORIES[name], BUILD / "inventories" / f"{name}.inv"
    try:
        with urllib.request.urlopen(address + "objects.inv", timeout=5) as answer:
            content = answer.read()
        if not content.startswith(b"# Sphinx inventory"):
            raise ValueError("no inventory")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(content)
    except (OSError, ValueError):
        if not kept.exists():
            return None
    return address, str(kept)


with ThreadPoolExecutor() as _pool:
    _found = dict(zip(_INVENTORIES, _pool.map(_inventory, _INVENTORIES), strict=True))
intersphinx_mapping = {
    name: (found[0], (found[1],)) for name, found in _found.items() if found is not None
}


def _shapes_are_literal(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Set ``Shape:`` blocks as they stand: the ``*`` of a batch is no emphasis."""
    out: list[str] = []
    inside = False
    for line in lines:
        if re.fullmatch(r"Shapes?:", line):
            inside = True
            out += [".. rubric:: Shape", "   :heading-level: 4", "", "::", ""]
        elif inside and line and not line.startswith(" "):
            inside = False
            out += ["", line]
        else:
            out.append(line)
    lines[:] = out


def setup(app: Sphinx) -> None:
    """Register the docstring filter ahead of napoleon."""
    app.connect("autodoc-process-docstring", _shapes_are_literal, priority=100)

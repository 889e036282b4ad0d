"""The templates of pages."""

from __future__ import annotations

from pathlib import Path

import jinja2

__all__ = ["template"]

_TEMPLATES = Path(__file__).with_name("templates")


def template(name: str) -> jinja2.Template:
    """A template by its file's name; a name that it uses and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)

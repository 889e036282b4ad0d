"""The pages promise code; this runs it, each block of a page after the ones before it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.tasks import TASKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOKS = DOCS.parent / "notebooks"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages_with_code() -> list[str]:
    built = {"_build", "notebooks"}
    return [
        str(page.relative_to(DOCS))
        for page in sorted(DOCS.rglob("*.md"))
        if not built & set(page.relative_to(DOCS).parts) and BLOCK.search(page.read_text("utf-8"))
    ]


@pytest.mark.parametrize("page", pages_with_code())
def test_every_python_block_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in (METHODS, TASKS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(BLOCK.findall((DOCS / page).read_text("utf-8")), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    plt.close("all")
    for promised, printed in promises((DOCS / page).read_text("utf-8"), capsys.readouterr().out):
        assert promised in printed


def promises(text: str, out: str) -> list[tuple[str, str]]:
    """What ``print(...)  # number`` says will be printed: plain numbers are held to it."""
    comments = re.findall(r"^ *print\(.*\)  # ([\d,]+)$", text, flags=re.MULTILINE)
    return [(comment, out) for comment in comments]


def test_the_first_page_and_the_how_tos_are_among_them() -> None:
    pages = pages_with_code()
    assert {"index.md", "compress.md", "math/spectra.md"} <= set(pages)
    assert sum(page.startswith("howto/own-") for page in pages) == 4


def test_every_term_is_defined_once_and_linked_to() -> None:
    """That links lead to a term is the documentation's own build to say, warnings being errors."""
    glossary = (DOCS / "glossary.md").read_text("utf-8")
    blocks = re.findall(r"^:::\{glossary\}\n(.*?)^:::", glossary, flags=re.MULTILINE | re.DOTALL)
    terms = [
        line for block in blocks for line in block.splitlines() if line and not line.startswith(" ")
    ]
    assert len(terms) == len(set(terms)) > 30
    pages = "".join(
        page.read_text("utf-8")
        for page in DOCS.rglob("*.md")
        if page.name != "glossary.md" and "_build" not in page.parts
    )
    linked = re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", pages)
    assert not set(terms) - {" ".join(name.split()) for name in linked}


@pytest.mark.parametrize(
    "name", sorted(p.name for p in (DOCS.parent / "notebooks").glob("*.ipynb"))
)
def test_notebooks_carry_no_outputs_and_link_to_what_is_there(name: str) -> None:
    path = DOCS.parent / "notebooks" / name
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [x for x in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in x]
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]
    assert f"notebooks/{path.stem}\n" in (DOCS / "notebooks.md").read_text("utf-8")

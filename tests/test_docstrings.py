"""Every public name says what it takes, gives and raises, and where its formulas come from.

Public is what the reference (docs/api) shows: all that the packages export, and whole modules
beside them. The rules, for each such name and each public method of such a class:

- it has a docstring;
- a function that takes tensors has a ``Shape:`` block, one that only gives a tensor has one or
  writes the shape in its sentence, as in ``(*b, r)``; methods may leave that to their class where
  it speaks of all of them, as for points and vectors of a manifold;
- each error of ours that its body raises, itself or through private helpers beside it, is named
  under ``Raises:``;
- an argument ``dtype`` is described under ``Args:`` of the function or its class;
- where there is a formula there is a source, in the docstring or in that of its class or module: a
  year, a section or proposition, or a page of these docs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from sttp_manifold import SpectralTT, errors, spectrum
from sttp_manifold.chart import HouseholderChart

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api"

SHAPE = re.compile(r"^ *Shapes?:", re.MULTILINE)
INLINE_SHAPE = re.compile(r"``\((\*|r\b|d_|n_|\)|c_)|scalar|stock layer's shape")
SOURCE = re.compile(r"\b(19|20)\d\d\b|\[STTP\]|docs/math|Prop\.|Sec\.")
FORMULA = re.compile(r":math:|^ *\.\. math", re.MULTILINE)
OURS = set(errors.__all__)

PACKAGES = ("", ".tt", ".frames", ".manifolds", ".checks", ".optim", ".nn")
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))


def own(thing: Any) -> Any:
    """What a descriptor wraps."""
    if isinstance(thing, property):
        return thing.fget
    if isinstance(thing, (classmethod, staticmethod)):
        return thing.__func__
    thing = thing.func if isinstance(thing, cached_property) else thing
    return inspect.unwrap(thing) if callable(thing) else thing


def shown() -> dict[str, Any]:
    """Qualified name to object, for each name that has an entry in the reference."""
    found = {}
    for name in re.findall(r"automodule:: (\S+)\n   :members:", PAGES):
        module = importlib.import_module(name)
        found |= {f"{name}.{member}": getattr(module, member) for member in module.__all__}
    for name in re.findall(r"auto(?:class|function|data|exception):: (\S+)", PAGES):
        module, _, member = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), member)
    return found


def entries() -> dict[str, tuple[Any, type | None]]:
    """Functions, classes and their methods in the reference, and the class of a method."""
    found: dict[str, tuple[Any, type | None]] = {}
    for name, thing in shown().items():
        if not (inspect.isclass(thing) or inspect.isfunction(own(thing))):
            continue
        found[name] = (thing, None)
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and inspect.isfunction(own(value)):
                    found[f"{name}.{member}"] = (value, thing)
    return found


ENTRIES = entries()


def docstring(thing: Any) -> str:
    return inspect.getdoc(own(thing)) or ""


def annotations(function: Callable[..., Any]) -> tuple[list[str], str]:
    """Annotations of the arguments and of the result, as they were written."""
    signature = inspect.signature(function)
    arguments = [
        str(p.annotation)
        for p in signature.parameters.values()
        if p.annotation is not inspect.Parameter.empty
    ]
    return arguments, str(signature.return_annotation)


def is_tensor(annotation: str) -> bool:
    # SpectralTT has its shapes in its own docstring, optimizers take parameters of any shape.
    return bool(re.search(r"(?<!\w)Tensor\b", annotation)) and "Callable" not in annotation


def raised(function: Callable[..., Any], cls: type | None) -> set[str]:
    """Our errors that a body raises, itself or through private helpers of its class or module."""
    module = inspect.getmodule(own(function))
    seen: set[Any] = set()
    names: set[str] = set()

    def visit(body: Any) -> None:
        body = own(body)
        if body in seen or not inspect.isfunction(body) or inspect.getmodule(body) is not module:
            return
        if body.__code__.co_filename.startswith("<"):
            return  # made by dataclass or NamedTuple
        seen.add(body)
        tree = ast.parse(textwrap.dedent(inspect.getsource(body)))
        caught = {
            node.type.id
            for node in ast.walk(tree)
            if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                called = node.exc.func
                if isinstance(called, ast.Name) and called.id in OURS - caught:
                    names.add(called.id)
            if isinstance(node, ast.Call):
                target = node.func
                if isinstance(target, ast.Name) and target.id.startswith("_"):
                    visit(getattr(module, target.id, None))
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    private = target.attr.startswith("_") and not target.attr.startswith("__")
                    if cls is not None and target.value.id in ("self", "cls") and private:
                        visit(vars(cls).get(target.attr))

    visit(function)
    return names


def constructor(cls: type) -> list[Any]:
    return [vars(cls)[name] for name in ("__init__", "__post_init__") if name in vars(cls)]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_public_name_is_documented(name: str) -> None:
    thing, cls = ENTRIES[name]
    text = docstring(thing)
    assert text, "no docstring"
    bases = [c for c in (cls.__mro__ if cls else ()) if c.__module__.startswith("sttp_manifold")]
    if cls is not None and any(own(thing).__name__ in vars(c) for c in bases[1:]):
        # The base class has the contract; what overrides it says what is different.
        text += "\n" + "\n".join(
            docstring(vars(c)[own(thing).__name__])
            for c in bases[1:]
            if own(thing).__name__ in vars(c)
        )
    around = [text, *map(docstring, bases), getattr(inspect.getmodule(own(thing)), "__doc__", "")]
    missing: set[str] = set()
    if inspect.isclass(thing):
        for constructor in ("__init__", "__post_init__"):
            if constructor in vars(thing):
                missing |= raised(vars(thing)[constructor], thing)
    else:
        function = own(thing)
        missing = raised(function, cls)
        taken, given = annotations(function)
        in_class = any("points and vectors" in docstring(c) for c in bases)
        if any(map(is_tensor, taken)):
            assert SHAPE.search(text) or in_class, f"takes tensors, but has no Shape: block\n{text}"
        elif is_tensor(given):
            said = SHAPE.search(text) or INLINE_SHAPE.search(text) or in_class
            assert said, f"gives a tensor of a shape that it does not say\n{text}"
        if "dtype" in inspect.signature(function).parameters:
            assert re.search(r"^ *dtype:", "\n".join(around), re.MULTILINE), "dtype in no Args:"
    block = text.partition("Raises:")[2]
    unnamed = {error for error in missing if not is_named(error, block)}
    assert not unnamed, f"raises {unnamed}, which Raises: does not name"
    if FORMULA.search(text):
        assert any(SOURCE.search(part) for part in around), f"a formula without a source\n{text}"


def is_named(error: str, block: str) -> bool:
    """Whether an error or one of its bases is named: a RankError is a ShapeError."""
    bases = getattr(errors, error).__mro__
    return any(re.search(rf"\b{c.__name__}:", block) for c in bases if c.__name__ in OURS)


def test_what_the_packages_export_is_in_the_reference() -> None:
    known = set(map(id, shown().values()))
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(f"sttp_manifold{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.ismodule(thing) or isinstance(thing, str) or id(thing) in known):
                missing.append(f"{module.__name__}.{name}")
    assert not missing, f"add to a page of docs/api: {missing}"


def test_the_rules_see_what_is_missing() -> None:
    """A check that nothing could fail would be none."""
    assert len(ENTRIES) > 150
    assert is_tensor("torch.Tensor")
    assert is_tensor("Float[Tensor, '*b d r']")
    assert not is_tensor("SpectralTT")
    found = raised(HouseholderChart.pack, HouseholderChart)
    assert "ShapeError" in found, "through a private method"
    assert raised(spectrum.SpectrumMap.inverse, spectrum.SpectrumMap) == {"SpectrumError"}
    assert not raised(SpectralTT.norm, SpectralTT)
    assert is_named("RankError", "    ShapeError: yes.")
    assert not is_named("ShapeError", "    RankError: no.")
    assert not SHAPE.search("Its Shape: (n,).")
    assert not INLINE_SHAPE.search("The same value (of the graph).")


# -- pages ----------------------------------------------------------------------------------------


def test_modules_and_tests_that_pages_name_are_there() -> None:
    """The table from paper to test, and the tests that the mathematics names."""
    named, missing = 0, []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if "_build" in page.parts:
            continue
        text = page.read_text(encoding="utf-8")
        for path, test in re.findall(r"`((?:tests|sttp_manifold)/[\w/]+\.py)(?:::(\w+))?`", text):
            named += 1
            source = ROOT / path
            if not source.exists() or (test and f"def {test}(" not in source.read_text()):
                missing.append(f"{page.relative_to(ROOT)}: {path} {test}")
    assert named > 60
    assert not missing

"""Print every distribution of the running environment as a pin, for ``make constraints``.

A pin whose release no longer supports the oldest Python of this package carries a marker, so
that the same file serves there too: what has no pin for that Python is resolved freely.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST = "3.10"
HEADER = """\
# What the demo, the tests, the linters and the notebooks ran with. Made by `make constraints`;
# use it as `pip install -c constraints.txt ...`. It pins, and installs nothing by itself.
"""


def pin(name: str, version: str, requires_python: str | None) -> str:
    """One line of the file; local version suffixes (``+cpu``) name a build, not a release."""
    line = f"{canonicalize_name(name)}=={Version(version).public}"
    if requires_python and not SpecifierSet(requires_python).contains(f"{OLDEST}.99"):
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        first = next(
            f"3.{minor}"
            for minor in range(11, sys.version_info.minor + 1)
            if SpecifierSet(requires_python).contains(f"3.{minor}.99") or f"3.{minor}" == here
        )
        line += f" ; python_version >= '{first}'"
    return line


def main() -> None:
    """Write the pins of this environment to standard output."""
    own = {"sttp-manifold", "pip", "wheel"}
    pins = {
        pin(d.metadata["Name"], d.version, d.metadata["Requires-Python"])
        for d in distributions()
        if canonicalize_name(d.metadata["Name"]) not in own
    }
    sys.stdout.write(HEADER + "\n".join(sorted(pins)) + "\n")


if __name__ == "__main__":
    main()

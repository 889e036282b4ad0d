"""``python -m sttp_manifold`` is ``sttp``."""

from __future__ import annotations

from sttp_manifold.cli import main

if __name__ == "__main__":
    main()

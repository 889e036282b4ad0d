"""States that have been written and read again."""

from __future__ import annotations

import io
from typing import Any

import torch


def through_file(state: Any) -> Any:
    """A state as a file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)

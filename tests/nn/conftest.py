"""What tests of weights formed together look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sttp_manifold.nn import formed
from sttp_manifold.nn.formed import Entry


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each weight that was formed at once and asked for could be handed out."""
    log: list[bool] = []
    take = Entry.take

    def spy(self: Entry, tensors: object) -> object:
        found = take(self, tensors)
        log.append(found is not None)
        return found

    monkeypatch.setattr(Entry, "take", spy)
    yield log
    assert not formed._stack.scopes

"""What tests of weights computed together look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sttp_manifold.nn import batch, layout, scope
from sttp_manifold.nn.scope import Entry


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each weight of a batch that was asked for could be given out.

    Whatever has a partner is batched: which batches are worth it is another matter.
    """
    monkeypatch.setattr(batch, "_gain", lambda some, _: [n >= 2 for n in layout.partners(some)])
    log: list[bool] = []
    take = Entry.take

    def spy(self: Entry, weight: object) -> object:
        found = take(self, weight)
        log.append(found is not None)
        return found

    monkeypatch.setattr(Entry, "take", spy)
    yield log
    assert not scope._scopes.stack

"""What a run is: everything that decides its numbers, and a hash of it.

Two runs with one hash give the same numbers on one machine and one set of versions; the hash is
what a stopped comparison goes by when it is started again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.json_values import check_numbers, check_words

__all__ = ["RunSpec", "derived_seed"]


def derived_seed(*parts: object) -> int:
    """A seed in ``[0, 2^63)`` from names and numbers, the same on every machine.

    >>> derived_seed("order", "digits", 0) == derived_seed("order", "digits", 0)
    True
    >>> derived_seed("order", "digits", 0) == derived_seed("order", "digits", 1)
    False
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_BUDGET = ("target", "max_iterations", "max_evaluations", "max_seconds")
_WORDS = ("task", "method", "kind", "parameterization", "optimizer", "dtype", "device", "purpose")
_NULLABLE_WORDS = ("spectrum", "schedule")
_WHOLE = (
    *("data", "rank", "seed", "epochs", "batch_size", "repeats"),
    *("max_iterations", "max_evaluations"),
)


def _check_options(values: Any) -> None:
    if not isinstance(values, dict):
        raise ConfigError("specification field 'options': expected an object")
    for name, value in values.items():
        check_words("specification options", [name])
        if isinstance(value, str):
            check_words(f"specification option {name!r}", [value])
        elif not isinstance(value, bool):
            check_numbers(f"specification option {name!r}", [value], null=True)


@dataclass(frozen=True)
class RunSpec:
    """Full specification of one run.

    Attributes:
        task: name of the task.
        data: version of the task's data, splits and model; raised when they change.
        method: name of the method.
        kind: ``dense``, ``svdp`` or ``sttp``: the set of weights.
        parameterization: how a weight is held: ``dense``, ``householder`` or ``riemannian`` when
            trained; ``householder``, ``product``, ``fixed-rank`` or ``factors`` when solved for.
        optimizer: ``adam`` or ``sgd``; of solvers also ``cg``, ``tr``, ``lbfgs``.
        momentum: of SGD and Muon; None for all others.
        spectrum: how the singular values are held; None where they are not.
        rank: rank of the initial weight, and of every weight the method can reach unless dense.
        seed: draws the initial weight, and the order of the data or, of a problem, the problem.
        epochs: passes as the task counts them; None for solvers, like all that follows from it.
        batch_size: examples in one step; None takes the whole training split.
        repeats: passes over the training split in one epoch.
        lr: learning rate at the first step; None where there is none.
        schedule: ``cosine`` (down to zero over the run) or ``constant``.
        dtype: ``float32`` or ``float64``.
        device: ``cpu`` or ``cuda``.
        purpose: ``compare``, or ``tune``, which never sees the test split.
        target: relative residual on the observed entries at which a solver stops.
        max_iterations: of a solver.
        max_evaluations: of a solver: calls of the cost function.
        max_seconds: of a solver. Where it is what ends a run, the numbers depend on the machine.
        options: fields of other kinds of runs, by name.
    """

    task: str
    data: int
    method: str
    kind: str
    parameterization: str
    optimizer: str
    momentum: float | None
    spectrum: str | None
    rank: int
    seed: int
    epochs: int | None
    batch_size: int | None
    repeats: int | None
    lr: float | None
    schedule: str | None
    dtype: str
    device: str
    purpose: str = "compare"
    target: float | None = None
    max_iterations: int | None = None
    max_evaluations: int | None = None
    max_seconds: float | None = None
    options: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, without those of a solver's budget that are None."""
        values = {
            name: value
            for name, value in asdict(self).items()
            # They are younger than the others: left out, the hashes of training runs stay.
            if value is not None or name not in _BUDGET
        }
        options = values.pop("options")
        return {**values, "options": options} if options else values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a field is missing, unknown, or of another type.
        """
        names = {field.name for field in fields(cls)}
        odd = sorted(names.symmetric_difference({*values, *_BUDGET, "options"}))
        if odd:
            raise ConfigError(f"a specification with missing or unknown fields: {', '.join(odd)}")
        for name, value in values.items():
            if name in _WORDS:
                check_words(f"specification field {name!r}", [value])
            elif name == "options":
                _check_options(value)
            elif name in _NULLABLE_WORDS:
                check_words(f"specification field {name!r}", [] if value is None else [value])
            else:
                check_numbers(
                    f"specification field {name!r}",
                    [value],
                    null=name not in ("data", "rank", "seed"),
                    whole=name in _WHOLE,
                    least=0,
                )
        return cls(**values)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that stand for the specification."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def label(self) -> str:
        """A short name for people."""
        return f"{self.method} rank {self.rank} seed {self.seed}"

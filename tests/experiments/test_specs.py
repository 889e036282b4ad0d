from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.specs import RunSpec, derived_seed

SPEC = RunSpec(
    task="digits",
    data=1,
    method="sttp-chart-sgd",
    kind="sttp",
    parameterization="householder",
    optimizer="sgd",
    momentum=0.9,
    spectrum="free",
    rank=4,
    seed=0,
    epochs=20,
    batch_size=64,
    repeats=1,
    lr=0.1,
    schedule="cosine",
    dtype="float32",
    device="cpu",
)

OTHER = {str: "other", int: 1234, float: 0.123}


def test_the_hash_is_the_same_in_every_version():
    # A change here makes every record on people's disks a stranger: raise a version instead.
    assert SPEC.hash == "2a10250520b2c9fa"


@pytest.mark.parametrize("name", [field.name for field in fields(RunSpec)])
def test_every_field_counts(name):
    budget = {"target": 1e-3, "max_iterations": 7, "max_evaluations": 9, "max_seconds": 1.5}
    budget["options"] = {"discriminator_steps": 5}
    value = budget[name] if name in budget else OTHER[type(getattr(SPEC, name))]
    changed = replace(SPEC, **{name: value})
    assert changed.hash != SPEC.hash
    assert RunSpec.from_dict(changed.to_dict()) == changed


def test_missing_and_unknown_fields_are_named():
    values = SPEC.to_dict()
    del values["lr"]
    with pytest.raises(ConfigError, match="unknown fields: lr, speed"):
        RunSpec.from_dict({**values, "speed": 1})


def test_a_budget_that_is_not_there_leaves_the_hash_alone():
    # Records of training runs are older than solvers.
    assert "target" not in SPEC.to_dict()
    assert RunSpec.from_dict(SPEC.to_dict()).max_evaluations is None


def test_derived_seeds_tell_their_parts_apart():
    assert derived_seed("a", "bc") != derived_seed("ab", "c")
    assert 0 <= derived_seed("order", "digits", 0) < 2**63


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", "4", "'rank' holds '4'; expected a whole number, 0 or more"),
        ("rank", 4.5, "'rank' holds 4.5"),
        ("rank", None, "'rank' holds None"),
        ("seed", -1, "'seed' holds -1"),
        ("seed", True, "'seed' holds True"),
        ("lr", float("nan"), "'lr' holds nan"),
        ("method", None, "'method' holds None; expected a text of one line"),
        ("optimizer", "adam\x1b[31m", "'optimizer' holds"),
        ("task", "x" * 999, "'task' holds 'xxx"),
        ("spectrum", 3, "'spectrum' holds 3"),
    ],
)
def test_fields_of_another_type_are_named(name, value, message):
    with pytest.raises(ConfigError, match=message):
        RunSpec.from_dict({**SPEC.to_dict(), name: value})

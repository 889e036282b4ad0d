"""Every public call ends in a right answer, or in an error that names its culprit.

Arguments of right and wrong types, sizes, dtypes, scales and devices, drawn from seeds that stay
the same; ``HYPOTHESIS_PROFILE=thorough`` draws many more.
"""

from __future__ import annotations

import os

import pytest
import torch
from fuzzing import LEFT_OUT, Setting, Target, attempt, fault, refuted, targets

from sttp_manifold.errors import ShapeError

TARGETS = targets()
NAMES = [target.name for target in TARGETS]
ROUNDS = 60 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 3

# Operations of geoopt's interface that have no closed form here, and say so.
NO_RESULT = {"FixedTTRankManifold.expmap"}


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_right_arguments_give_right_answers(target: Target) -> None:
    for seed in range(min(ROUNDS, 5) - 1):
        outcome = attempt(target, seed, plain=True)
        assert outcome.wrong is None, outcome.call
        if target.name in NO_RESULT:
            assert isinstance(outcome.error, NotImplementedError), outcome.call
        else:
            assert outcome.error is None, f"{outcome.call} raised {outcome.error!r}"


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_any_arguments_give_an_answer_or_a_named_error(target: Target) -> None:
    for seed in range(ROUNDS):
        outcome = attempt(target, seed)
        assert outcome.wrong is None, f"{outcome.call}, spoilt {outcome.spoilt}: {outcome.wrong}"


def test_all_that_is_public_is_called() -> None:
    assert len(TARGETS) > 180
    assert not LEFT_OUT & set(NAMES)
    assert {"minimize", "SpectralTT.entries", "compress", "RiemannianAdam"} <= set(NAMES)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ShapeError("a mode is a positive integer, got 0"), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), True),
        (TypeError("linear(): argument 'input' (position 1) must be Tensor, not int"), True),
        (ShapeError(""), False),
        (NotImplementedError(), False),
        (AttributeError("'int' object has no attribute 'shape'"), False),
        (IndexError("tuple index out of range"), False),
        (
            IndexError("Dimension out of range (expected to be in range of [-1, 0], but got -2)"),
            False,
        ),
        (TypeError("'<=' not supported between instances of 'int' and 'str'"), False),
        (ValueError("not enough values to unpack (expected 2, got 1)"), False),
        (KeyError("weight"), False),
        (ZeroDivisionError("division by zero"), False),
        (RecursionError("maximum recursion depth exceeded"), False),
    ],
)
def test_errors_that_do_not_name_their_culprit_are_faults(error: Exception, named: bool) -> None:
    assert (fault(error) is None) == named


def test_wrong_answers_are_seen() -> None:
    s = Setting(0, plain=True)
    target = next(t for t in TARGETS if t.name == "SpectralTT.to_matrix")
    right = s.tt.to_matrix()
    assert refuted(target, s, s.tt, [], {}, right) is None
    assert "oracle" in str(refuted(target, s, s.tt, [], {}, right + 1e-6))
    assert "finite" in str(refuted(target, s, s.tt, [], {}, right * torch.nan))

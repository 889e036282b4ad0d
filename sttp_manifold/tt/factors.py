"""Positive integers and their prime factors, which are the modes of a plan."""

from __future__ import annotations

import math
import operator

from sttp_manifold.errors import ShapeError

__all__ = ["positive_integer", "prime_factors"]

# The first thirteen primes: as bases of the Miller-Rabin test they decide primality of every
# number below the bound (Sorenson & Webster, 2015).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
_DECIDED = 3_317_044_064_679_887_385_961_981
_TRIED = 2_000
_TOGETHER = 128


def positive_integer(value: object, what: str) -> int:
    """``value`` as an ``int``, if it is a positive integer of any kind but ``bool``.

    Args:
        value: what a user gave.
        what: what it stands for, with which the message begins.

    Raises:
        ShapeError: anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers, or without any
        raise ShapeError(f"{what} must be a positive integer, got {value!r}") from None
    if number < 1:
        raise ShapeError(f"{what} must be a positive integer, got {number}")
    return number


def prime_factors(n: int) -> tuple[int, ...]:
    """Prime factors of ``n`` in ascending order; ``(1,)`` for ``n = 1``.

    Small factors are divided out; what is left is split by Pollard's rho method in Brent's form
    (Brent, 1980), a fraction of a second where ``n`` has 64 bits.

    Raises:
        ShapeError: if ``n`` is not a positive integer, or has two prime factors above 2,000 whose
            product is over 3e24, the most that is factored here.

    Example:
        >>> prime_factors(72)
        (2, 2, 2, 3, 3)
        >>> prime_factors(2**61 - 1)
        (2305843009213693951,)
    """
    rest = n = positive_integer(n, "a size to be factored")
    factors = []
    divisor = 2
    while divisor <= _TRIED and divisor * divisor <= rest:
        while rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        divisor += 1 if divisor == 2 else 2
    if rest >= _DECIDED:
        raise ShapeError(
            f"{n} has a factor {rest} without small primes that is too large to be factored; give "
            "modes instead, as in TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)"
        )
    pending = [rest] if rest > 1 or not factors else []
    while pending:
        number = pending.pop()
        if number < divisor * divisor or _is_prime(number):
            factors.append(number)
        else:
            part = _divisor(number)
            pending += [part, number // part]
    return tuple(sorted(factors))


def _is_prime(n: int) -> bool:
    """Miller-Rabin test of an odd number between the largest base and ``_DECIDED``."""
    twos = (n - 1 & 1 - n).bit_length() - 1
    odd = n - 1 >> twos
    for base in _BASES:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def _divisor(n: int) -> int:
    """A proper divisor of an odd composite number."""
    root = math.isqrt(n)
    if root * root == n:
        return root
    shift = 1
    while True:
        found = _rho(n, shift)
        if found != n:
            return found
        shift += 1


def _rho(n: int, shift: int) -> int:
    """Pollard's rho method with ``x^2 + shift``: a divisor of ``n``, which may be ``n`` itself."""
    x = 2
    length = 1
    while True:
        anchor = x
        for _ in range(length):
            x = (x * x + shift) % n
        for done in range(0, length, _TOGETHER):
            start, product = x, 1
            for _ in range(min(_TOGETHER, length - done)):
                x = (x * x + shift) % n
                product = product * (anchor - x) % n
            if math.gcd(product, n) == 1:
                continue
            # One of this batch of differences shares a divisor with n: which one?
            while True:
                start = (start * start + shift) % n
                common = math.gcd(anchor - start, n)
                if common > 1:
                    return common
        length *= 2

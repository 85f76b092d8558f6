"""How many keys a setting means: a count, or a share of the sequence."""

from __future__ import annotations

import math


def check_amount(name: str, value: int | float) -> None:
    """Refuse what is neither a count nor a share.

    Args:
        name: The setting, for the message.
        value: An int of at least 1, or a float in (0, 1].

    Raises:
        ValueError: It is something else.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_share = isinstance(value, float) and 0 < value <= 1
    if not is_count and not is_share:
        raise ValueError(
            f"{name}={value!r} must be a count (an int of at least 1) or a share of all keys "
            "(a float above 0 and at most 1.0)"
        )


def amount_of(value: int | float, keys: int) -> int:
    """Return how many of ``keys`` a setting means; a share is rounded up.

    Args:
        value: As `check_amount` allows it.
        keys: Keys of the sequence, at least 1.

    Returns:
        At least 1 and at most ``keys``.
    """
    # What rounding adds to a product (0.07 * 100 > 7) must not become one more key.
    count = value if isinstance(value, int) else math.ceil(value * keys - 1e-9)
    return min(max(count, 1), keys)

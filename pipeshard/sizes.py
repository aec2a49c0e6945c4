"""Sizes as people write them: bytes, or "512MiB", "4GiB", "4GB" (powers of ten).

Not here: what a size is for; callers name the argument so that the error can.
Threads: pure functions.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction

from .errors import RequestError

__all__ = ["format_bytes", "parse_size"]

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_PATTERN = re.compile(r"\s*([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*([A-Za-z]{0,3})\s*", re.ASCII)
_LIMIT = 1 << 63  # the core counts bytes in 64 bits; half of that range is beyond any machine


def parse_size(value: int | str, *, argument: str = "size") -> int:
    """Bytes as an int; "0.3GiB" is rounded down to whole bytes."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        n_bytes = _as_index(value, argument)
    elif isinstance(value, int):
        n_bytes = value
    else:
        n_bytes = _parse_text(value, argument)
    if n_bytes < 0:
        raise RequestError(f"{argument} must not be negative, got {value!r}", argument=argument)
    if n_bytes >= _LIMIT:
        raise RequestError(f"{argument} is larger than any memory: {value!r}", argument=argument)
    return n_bytes


def _as_index(value: object, argument: str) -> int:
    """NumPy integers and the like; bool and float are mistakes more often than sizes."""
    if not isinstance(value, (bool, float)):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(
        f'{argument} must be a number of bytes (int) or text such as "4GiB", not {type(value).__name__}'
    )


def _parse_text(text: str, argument: str) -> int:
    match = _PATTERN.fullmatch(text)
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise RequestError(
            f'{argument}: cannot read {text!r}; write bytes or a size such as "512MiB", "1.5GiB" or "4GB"',
            argument=argument,
        )
    fraction = match[2] or ""
    if fraction and unit == 1:
        raise RequestError(
            f"{argument}: {text!r} is not a whole number of bytes", argument=argument
        )
    return int(Fraction(int(match[1] + fraction), 10 ** len(fraction)) * unit)


def format_bytes(n_bytes: int) -> str:
    """Text for people: "3.50 GiB"; exact below 1 KiB. Negative differences keep their sign."""
    sign = "-" if n_bytes < 0 else ""
    size = abs(n_bytes)
    if size < 1024:
        return f"{sign}{size} B"
    for unit, step in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        # 1023.995 and up would print as 1024.00 of this unit
        if size * 200 < step * 1024 * 200 - step:
            return f"{sign}{size / step:.2f} {unit}"
    return f"{sign}{size / (1 << 40):.2f} TiB"

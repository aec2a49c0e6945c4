"""Progress bars for what takes longer than a second, on terminals and in notebooks only.

Not here: what makes progress. Threads: a bar belongs to one thread.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

__all__ = ["Bar"]

_DELAY_S = 1.0


class Bar:
    """A bar that shows up after a second and leaves no trace. Until then nothing exists of it: making one starts a
    thread of tqdm's."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._bar: Any = None
        self._show_at = time.monotonic() + _DELAY_S if _is_watched() else float("inf")

    def to(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() < self._show_at:
                return
            self._bar = tqdm(
                total=total,
                desc=self._what,
                unit=self._unit,
                unit_scale=True,
                unit_divisor=1024 if self._unit == "B" else 1000,
                leave=False,
            )
        if total != self._bar.total:  # the next part begins
            self._bar.reset(total)
        self._bar.update(max(0, done - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _is_watched() -> bool:
    in_notebook = "notebook" in tqdm.__module__ or any(
        "notebook" in base.__module__ for base in tqdm.__mro__
    )
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())

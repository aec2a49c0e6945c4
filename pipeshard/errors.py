"""The exceptions of pipeshard: one class for each kind of thing that a caller can act on.

Every error is a `PipeshardError`, most are also the built-in exception that Python programmers would catch (`OSError`,
`ValueError`, `MemoryError`). What a program may want to know stands in attributes, so nobody parses a message.
All of them survive pickling, because sweeps run in other processes.

Not here: when they are raised. Threads: immutable once built.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BudgetError",
    "BusyError",
    "ClosedError",
    "DeviceError",
    "FileError",
    "FormatError",
    "HostMemoryError",
    "PipeshardError",
    "PlanError",
    "RequestError",
    "UnsupportedError",
]


class PipeshardError(Exception):
    """The base of all of them; by itself only for our own bugs."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""


class FileError(PipeshardError, OSError):
    """The file is missing, a directory, not readable, or a read failed. `.errno` is None where the system gave none."""

    def __init__(
        self, message: str = "", *, path: str | None = None, errno: int | None = None
    ) -> None:
        OSError.__init__(self, errno, message)
        self.path = path
        self.filename = path

    @property
    def message(self) -> str:
        return str(self.strerror)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_file_error, (type(self), self.message, self.path, self.errno)


def _rebuild_file_error(
    cls: type[FileError], message: str, path: str | None, errno: int | None
) -> FileError:
    return cls(message, path=path, errno=errno)


class FormatError(PipeshardError, ValueError):
    """The content of a file is wrong: `.field` names what, `.offset` where (None where it is not one place)."""

    def __init__(
        self,
        message: str = "",
        *,
        path: str | None = None,
        field: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.field = field
        self.offset = offset


class UnsupportedError(PipeshardError):
    """Well-formed, but not something that pipeshard runs: `.what` it met, `.supported` what it knows instead."""

    def __init__(
        self, message: str = "", *, what: str | None = None, supported: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.what = what
        self.supported = tuple(supported)


class RequestError(PipeshardError, ValueError):
    """A caller's value is out of bounds: `.argument` names it."""

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class BudgetError(PipeshardError):
    """The placement does not fit: bytes it needs, bytes of the budget, and the smallest budget that would work."""

    def __init__(
        self, message: str = "", *, needed: int = 0, budget: int = 0, smallest: int = 0
    ) -> None:
        super().__init__(message)
        self.needed = needed
        self.budget = budget
        self.smallest = smallest


class PlanError(PipeshardError, ValueError):
    """A placement or plan breaks a rule, at `.unit` in `.tier`."""

    def __init__(
        self, message: str = "", *, unit: str | None = None, tier: str | None = None
    ) -> None:
        super().__init__(message)
        self.unit = unit
        self.tier = tier


class DeviceError(PipeshardError):
    """The device refused. `.fatal` False: the engine goes on; True: the engine is closed, the process lives."""

    def __init__(self, message: str = "", *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class HostMemoryError(PipeshardError, MemoryError):
    """Host memory ran out."""


class BusyError(PipeshardError):
    """A second thread entered an engine that is at work."""


class ClosedError(PipeshardError):
    """Used after close."""

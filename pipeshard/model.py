"""A GGUF model on disk: what it says about itself, and its units. Weights are read when an engine needs them.

Not here: running it (engine.py). Threads: a Model is shared by any number of engines and threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from . import _core
from ._metadata import Metadata
from .errors import FileError
from .placement import Unit
from .tokenizer import Tokenizer

__all__ = ["Model"]


class Model:
    """Opened once and shared: engines over one Model hold its weights in host memory only once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = check_path("path", path)
        self._core = _core.Model(self._path)
        self._units = tuple(Unit(*fields) for fields in self._core.units)
        self._lock = threading.Lock()  # guards the making of the tokenizer

    def __repr__(self) -> str:
        return f"<Model {self.name}, {self.arch}, {self.n_bytes} bytes in {len(self.units)} units>"

    def __reduce__(self) -> tuple[type[Model], tuple[str]]:
        """Another process opens the file again."""
        return type(self), (self._path,)

    @property
    def path(self) -> str:
        return self._path

    @property
    def name(self) -> str:
        """As the file calls itself, else the file's name."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else os.path.basename(self._path)

    @property
    def arch(self) -> str:
        return self._core.arch

    @property
    def digest(self) -> str:
        """SHA-256 of metadata and tensor directory: what a plan is bound to."""
        return self._core.digest

    @property
    def units(self) -> tuple[Unit, ...]:
        return self._units

    @cached_property
    def unit_index(self) -> Mapping[str, int]:
        """A unit's number by its name."""
        return {unit.name: i for i, unit in enumerate(self._units)}

    @cached_property
    def bytes_by_use(self) -> Mapping[tuple[str, float], int]:
        """Of units of a kind that as large a share of tokens needs."""
        found: dict[tuple[str, float], int] = {}
        for unit in self._units:
            found[unit.kind, unit.use] = found.get((unit.kind, unit.use), 0) + unit.n_bytes
        return found

    @property
    def n_bytes(self) -> int:
        """Of all units."""
        return self._core.n_bytes

    @property
    def n_vocab(self) -> int:
        return self._core.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """The context that the model was made for."""
        return self._core.n_ctx_train

    @cached_property
    def hparams(self) -> dict[str, Any]:
        return self._core.hparams

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The file's key-value pairs; values are made when asked for."""
        return Metadata(self._core.metadata)

    @property
    def tokenizer(self) -> Tokenizer:
        with self._lock:
            return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_metadata(self.metadata, self._path)


def check_path(argument: str, path: object) -> str:
    """A file's name as str. TypeError for what names no file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be a str or a path, not {type(path).__name__}")
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be text, not bytes")
    if "\0" in name:
        raise FileError(f"{name!r} names no file: it has a null character", path=name)
    return name

"""The metadata of a GGUF file as a mapping, for what needs no tensors: tokenizer, chat templates, `info`.

Strings arrive as str, string arrays as list[str], numeric arrays as read-only NumPy arrays, the rest as bool, int or
float; each is made when it is asked for. Not here: reading and checking (the core), the meaning of any key.
Threads: immutable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from . import _core

__all__ = ["Metadata", "read_metadata"]


class Metadata(Mapping[str, Any]):
    def __init__(self, core: _core.Metadata) -> None:
        self._core = core

    def __getitem__(self, key: str) -> Any:
        return self._core[key]

    def __contains__(self, key: object) -> bool:
        return key in self._core

    def __iter__(self) -> Iterator[str]:
        return iter(self._core.keys())

    def __len__(self) -> int:
        return len(self._core)

    def __repr__(self) -> str:
        return f"<Metadata of {len(self)} keys>"


def read_metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The key-value pairs of a file. FileError where it cannot be read, FormatError where it is wrong."""
    return Metadata(_core.Metadata(os.fspath(path)))

"""Finds special tokens in text: longest first, over the whole text, as llama.cpp does.

"Longest first" is not the same as leftmost: of two that overlap, the longer one wins even where the other begins
earlier; of equally long ones the leftmost.

Not here: which tokens are special (the vocabulary's types say). Threads: immutable after creation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["SpecialMatcher"]

_ASCII_SPACE = " \t\n\v\f\r"
_Raw = tuple[
    int, int, list[int]
]  # a stretch of plain text: start, end, where tokens may begin in it


class SpecialMatcher:
    """Cuts text at the given tokens. Those in `strips_right` take the ASCII white space behind them along."""

    def __init__(self, tokens: Iterable[tuple[str, int]], strips_right: frozenset[int]) -> None:
        by_size: dict[tuple[int, int], dict[str, int]] = {}
        for text, token in tokens:
            by_size.setdefault((len(text.encode()), len(text)), {})[text] = token
        # Longest in bytes first; tokens of one size can be looked up by a slice of the text.
        self._levels = [(by_size[size], size[1]) for size in sorted(by_size, reverse=True)]
        self._strips_right = strips_right
        texts = [text for table in by_size.values() for text in table]
        self._prefixes = {text[:2] for text in texts}
        firsts = "".join(re.escape(c) for c in sorted({text[0] for text in texts}))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str) -> list[str | int]:
        """Plain text and token ids, in the order of the text; never an empty string."""
        parts: list[_Raw | int] = [(0, len(text), self._candidates(text))] if text else []
        for table, width in self._levels:
            if any(isinstance(part, tuple) and part[2] for part in parts):
                parts = [new for part in parts for new in self._cut(text, part, table, width)]
        return [part if isinstance(part, int) else text[part[0] : part[1]] for part in parts]

    def _candidates(self, text: str) -> list[int]:
        if self._first is None:
            return []
        prefixes = self._prefixes
        starts = (match.start() for match in self._first.finditer(text))
        return [p for p in starts if text[p : p + 2] in prefixes or text[p] in prefixes]

    def _cut(
        self, text: str, part: _Raw | int, table: dict[str, int], width: int
    ) -> list[_Raw | int]:
        if isinstance(part, int):
            return [part]
        start, end, places = part
        new: list[_Raw | int] = []
        kept: list[int] = []  # candidates of the plain text that is being gathered
        for place in places:
            if place < start:
                continue  # inside the token just taken
            token = table.get(text[place : place + width]) if place + width <= end else None
            if token is None:
                kept.append(place)
                continue
            if place > start:
                new.append((start, place, kept))
            new.append(token)
            start, kept = place + width, []
            if token in self._strips_right:
                while start < end and text[start] in _ASCII_SPACE:
                    start += 1
        if start < end:
            new.append((start, end, kept))
        return new

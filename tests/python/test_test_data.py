"""Committed test files are what their committed generators write, so neither can change alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("generator", "folder"),
    [("make_hostile_gguf", "data/hostile"), ("make_fuzz_gguf_corpus", "fuzz/corpus/gguf")],
)
def test_generated_files_are_the_committed_ones(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: str,
    folder: str,
) -> None:
    monkeypatch.syspath_prepend(str(root / "tests/data"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = __import__(generator)
    module.main(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {
        path.name: path.read_bytes()
        for path in (root / "tests" / folder).iterdir()
        if not path.name.startswith("found_")
    }
    assert len(written) > 10
    assert written == committed

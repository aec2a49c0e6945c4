"""Sizes as people write them, and the error classes that carry more than a message."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pipeshard import errors
from pipeshard.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (0, 0),
        (17, 17),
        (np.int64(4096), 4096),
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4GB", 4 * 10**9),
        ("2TB", 2 * 10**12),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 10**8),
        ("  4 gib ", 4 << 30),
        ("4gb", 4 * 10**9),
        ("1.0000000001KiB", 1024),
    ],
)
def test_parse(text: int | str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "bad",
    [
        "",
        " ",
        "GiB",
        "4G",
        "4 XB",
        "-4GiB",
        "+4GiB",
        "4GiB!",
        "1e9",
        "0x10",
        "1,5GiB",
        "1.GiB",
        ".5GiB",
    ]
    + ["4GiB 4GiB", "nan", "inf", "٣GiB", "1.5", "1.5B", "9" * 30, "9999999999TiB", -1, 1 << 63],
)
def test_malformed(bad: int | str) -> None:
    with pytest.raises(errors.RequestError) as caught:
        parse_size(bad, argument="vram")
    assert caught.value.argument == "vram"
    assert "vram" in str(caught.value)


@pytest.mark.parametrize("bad", [True, False, 4.0, None, b"4GiB", [4], object()])
def test_wrong_type(bad: object) -> None:
    with pytest.raises(TypeError, match="vram"):
        parse_size(bad, argument="vram")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1 << 20, "1.00 MiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (7 << 29, "3.50 GiB"),
        (5 << 40, "5.00 TiB"),
        (-(3 << 20), "-3.00 MiB"),
    ],
)
def test_format(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


def test_error_classes() -> None:
    hierarchy = {
        errors.FileError: OSError,
        errors.FormatError: ValueError,
        errors.RequestError: ValueError,
        errors.PlanError: ValueError,
        errors.HostMemoryError: MemoryError,
        errors.UnsupportedError: Exception,
        errors.BudgetError: Exception,
        errors.DeviceError: Exception,
        errors.BusyError: Exception,
        errors.ClosedError: Exception,
    }
    for cls, builtin in hierarchy.items():
        assert issubclass(cls, errors.PipeshardError)
        assert issubclass(cls, builtin)
        assert str(cls("words")) == "words"


@pytest.mark.parametrize(
    "error",
    [
        errors.FileError("no such file", path="/x.gguf", errno=2),
        errors.FormatError("bad", path="p", field="tensor_count", offset=8),
        errors.UnsupportedError("no", what="rwkv", supported=("llama", "qwen2")),
        errors.RequestError("no", argument="stop"),
        errors.BudgetError("no", needed=3, budget=2, smallest=1),
        errors.PlanError("no", unit="blk.0.attn", tier="decode"),
        errors.DeviceError("no", fatal=True),
    ],
)
def test_pickle_keeps_the_fields(error: errors.PipeshardError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.message == error.message
    assert vars(copy) == vars(error)
    if isinstance(error, errors.FileError):
        assert (copy.errno, copy.filename) == (error.errno, error.filename)

"""The scalar block formats of csrc/format/ps_quant.c against `gguf.quants`, bit by bit.

The C file is compiled on its own here, without the extension, so that the comparison reaches every bit pattern by
pointer. NaNs are compared as NaNs: their payload is the processor's choice of operand, not the format's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = gguf.GGMLQuantizationType
FORMATS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K"]
FORMATS += ["Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
QUANTISABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# Byte offsets of the f16 scales in a block.
SCALES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
# Signed zero, subnormals (least, greatest), normals, infinities, NaN.
ODD_SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]
ODD_SCALES += [0x7C00, 0xFC00, 0x7E00]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("quant") / "quant.so"
    source = CSRC / "format" / "ps_quant.c"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run([*compiler.split(), *flags, str(source), "-o", str(path), "-lm"], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.ps_quant_row.restype = ctypes.c_bool
    loaded.ps_fmt_get.restype = ctypes.c_void_p
    return loaded


def block_of(name: str) -> tuple[int, int]:
    elems, n_bytes = gguf.GGML_QUANT_SIZES[TYPES[name]]
    return int(elems), int(n_bytes)


def dequant(lib: ctypes.CDLL, name: str, blocks: Bytes) -> Floats:
    elems, n_bytes = block_of(name)
    out = np.empty(blocks.size // n_bytes * elems, np.float32)
    lib.ps_dequant_row(
        ctypes.c_int(TYPES[name]),
        blocks.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint64(out.size),
    )
    return out


def assert_same_bits(ours: Floats, theirs: Floats) -> None:
    a, b = ours.view(np.uint32).ravel(), theirs.view(np.uint32).ravel()
    both_nan = np.isnan(ours.ravel()) & np.isnan(theirs.ravel())
    wrong = np.flatnonzero((a != b) & ~both_nan)
    assert wrong.size == 0, (wrong[:4], ours.ravel()[wrong[:4]], theirs.ravel()[wrong[:4]])


def check_dequant(lib: ctypes.CDLL, name: str, blocks: Bytes) -> None:
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(blocks, TYPES[name])
    assert_same_bits(dequant(lib, name, blocks), np.ascontiguousarray(theirs))


def random_blocks(name: str, n_blocks: int) -> Bytes:
    n_bytes = block_of(name)[1]
    return np.random.default_rng(7).integers(0, 256, (n_blocks, n_bytes), dtype=np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_dequant_of_random_blocks(lib: ctypes.CDLL, name: str) -> None:
    check_dequant(lib, name, random_blocks(name, 2000 if block_of(name)[0] > 1 else 1 << 16))


@pytest.mark.parametrize("name", FORMATS)
def test_dequant_of_each_bit_alone(lib: ctypes.CDLL, name: str) -> None:
    """One bit set, and one bit clear: shows a swapped or dropped bit wherever it is."""
    n_bytes = block_of(name)[1]
    single = np.packbits(np.eye(n_bytes * 8, dtype=np.uint8), axis=1)
    blocks = np.concatenate([single, ~single])
    for scale in (0x3C00, 0x0001):
        with_scale = blocks.copy()
        for at in SCALES.get(name, []):
            with_scale[:, at : at + 2] ^= np.array([scale & 255, scale >> 8], np.uint8)
        check_dequant(lib, name, with_scale)


@pytest.mark.parametrize("name", sorted(SCALES))
def test_dequant_of_every_scale(lib: ctypes.CDLL, name: str) -> None:
    """Every one of the 65,536 bit patterns in each scale field, or the odd ones where a block is long."""
    every = list(range(1 << 16)) if block_of(name)[0] <= 32 else list(range(0, 1 << 16, 37))
    patterns = np.array(every + ODD_SCALES, np.uint16)
    for at in SCALES[name]:
        blocks = np.resize(random_blocks(name, 64), (patterns.size, block_of(name)[1])).copy()
        for other in SCALES[name]:
            blocks[:, other : other + 2] = np.array([0x00, 0x2C], np.uint8)
        blocks[:, at : at + 2] = patterns.view(np.uint8).reshape(-1, 2)
        check_dequant(lib, name, blocks)


def test_dequant_of_every_mxfp4_exponent_and_value(lib: ctypes.CDLL) -> None:
    nibbles = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    blocks = np.concatenate([np.arange(256, dtype=np.uint8)[:, None], nibbles], axis=1)
    check_dequant(lib, "MXFP4", blocks)
    # The same from the definition of the format: 2^(e - 127) times an E2M1 value.
    value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    exact = 2.0 ** (np.arange(256.0)[:, None] - 127) * np.tile(value, 2)
    with np.errstate(over="ignore"):
        assert_same_bits(dequant(lib, "MXFP4", blocks), exact.astype(np.float32))


def rows(kind: str) -> Floats:
    rng = np.random.default_rng(11)
    normal = rng.standard_normal((512, 256)).astype(np.float32)
    if kind == "normal":
        return normal
    if kind == "flat":  # no spread, or none but one weight
        normal[:] = np.repeat(normal[:, :1], 256, axis=1)
        normal[::2, 5] *= 3
        normal[::4] = 0
        return normal
    if kind == "ties":  # exact halves of a level
        return (rng.integers(-16, 17, (512, 256)) / 2).astype(np.float32)
    if kind == "tiny":  # scales that are f16 subnormals or round to zero
        return normal * np.float32(1e-6)
    assert kind == "wide"
    return normal * np.exp2(rng.integers(-20, 15, (512, 256))).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "tiny", "wide"])
@pytest.mark.parametrize("name", QUANTISABLE)
def test_quant(lib: ctypes.CDLL, name: str, kind: str) -> None:
    data = rows(kind)
    elems, n_bytes = block_of(name)
    ours = np.zeros((data.shape[0], data.shape[1] // elems * n_bytes), np.uint8)
    for row, out in zip(data, ours, strict=True):
        assert lib.ps_quant_row(
            ctypes.c_int(TYPES[name]),
            row.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(row.size),
        )
    with np.errstate(all="ignore"):
        theirs = np.ascontiguousarray(quants.quantize(data, TYPES[name])).view(np.uint8)
    assert np.array_equal(ours, theirs.reshape(ours.shape))


def test_quant_refuses_the_rest(lib: ctypes.CDLL) -> None:
    row = np.zeros(256, np.float32)
    out = np.zeros(1024, np.uint8)
    for name in set(FORMATS) - set(QUANTISABLE):
        args: list[Callable[..., object] | object] = [ctypes.c_int(TYPES[name])]
        args += [row.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)]
        assert not lib.ps_quant_row(*args, ctypes.c_uint64(256))


def test_table_is_ggufs(lib: ctypes.CDLL) -> None:
    for kind in range(64):
        info = lib.ps_fmt_get(ctypes.c_uint32(kind))
        name = next((n for n in FORMATS if kind == TYPES[n]), None)
        if name is None:
            assert info is None
            continue
        text = ctypes.cast(info, ctypes.POINTER(ctypes.c_char_p))[0]
        sizes = ctypes.cast(info + 8, ctypes.POINTER(ctypes.c_uint16))
        assert text == name.lower().encode()
        assert (sizes[0], sizes[1]) == block_of(name)

"""Writes quant_vectors.bin: blocks of every quantised format and the floats that `gguf.quants` makes of them, and rows
of floats and the blocks that it makes of those. tests/c/test_quant.c holds the C code against it, so that machines
without Python check bit for bit too; tests/python/test_quant.py compares far more patterns directly.

    python tests/data/make_quant_vectors.py        needs numpy and gguf

The file: "PSQV", then records of five little-endian u32 (direction 0 = blocks to floats or 1 = floats to blocks, format
id, number of blocks, bytes and weights a block), the input and the output. NaNs are written as 0x7fc00000.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

# Format -> byte offsets of its f16 scales.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "MXFP4": [],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0],
}  # fmt: skip
QUANTISABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
# Signed zero, subnormals (least, greatest), normals, the largest, infinities, NaN.
ODD_SCALES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00]


def blocks_of(name: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    elems, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (64 if elems == 32 else 14, n_bytes), dtype=np.uint8)
    for column, at in enumerate(SCALES[name]):
        scales = rng.uniform(-2, 2, len(blocks)).astype(np.float16).view(np.uint16)
        first = column * len(ODD_SCALES) // 2  # so that two scales are odd together only in part
        odd = ODD_SCALES[: len(blocks) - first]
        scales[first : first + len(odd)] = odd
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def rows_of(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    rows = rng.standard_normal((16, 32)).astype(np.float32)
    rows[1] = 0
    rows[2] = rows[2, 0]  # all equal
    rows[3] = np.arange(-16, 16) / 2  # exact halves of a level
    rows[4] *= np.float32(1e-6)  # the scale becomes a subnormal
    rows[5] = -np.abs(rows[5])
    rows[6, 31] = 1000
    rows[7, [4, 9]] = [
        -9,
        9,
    ]  # two of the largest magnitude: the first decides the sign of the scale
    return rows


def record(direction: int, name: str, given: bytes, made: bytes, n_blocks: int) -> bytes:
    kind = gguf.GGMLQuantizationType[name]
    elems, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return struct.pack("<5I", direction, int(kind), n_blocks, n_bytes, elems) + given + made


def main() -> None:
    rng = np.random.default_rng(20)
    out = b"PSQV"
    with np.errstate(all="ignore"):
        for name in SCALES:
            blocks = blocks_of(name, rng)
            floats = quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
            floats = np.where(np.isnan(floats), np.float32(np.nan), floats).astype("<f4")
            out += record(0, name, blocks.tobytes(), floats.tobytes(), len(blocks))
        for name in QUANTISABLE:
            rows = rows_of(rng)
            made = quants.quantize(rows, gguf.GGMLQuantizationType[name])
            out += record(1, name, rows.astype("<f4").tobytes(), made.tobytes(), len(rows))
    (Path(__file__).parent / "quant_vectors.bin").write_bytes(out)


if __name__ == "__main__":
    main()

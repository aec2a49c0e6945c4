"""Writes the seeds of tests/fuzz/corpus/gguf/: small good files that between them reach every kind of value, tensor and
layout, and the hostile files of make_hostile_gguf.py. Inputs that a fuzzing run found and that lie
beside them (found_*) are kept as they are.

    python tests/data/make_fuzz_gguf_corpus.py        standard library only
"""

from __future__ import annotations

import struct
from pathlib import Path

import make_hostile_gguf as hostile
from make_hostile_gguf import (
    ARCH,
    ARR,
    STR,
    U32,
    header,
    kv_array,
    kv_str,
    kv_u32,
    padded,
    tensor,
    text,
)

SCALARS = "<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d"


def every_type() -> bytes:
    out = b""
    kinds = [kind for kind in range(13) if SCALARS[kind]]
    for kind in kinds:
        value = struct.pack(SCALARS[kind], 1)
        out += text(b"s%d" % kind) + struct.pack("<I", kind) + value
        out += kv_array(b"a%d" % kind, kind, 3, value * 3)
    out += kv_array(b"t", STR, 3, text(b"a") + text(b"") + text("\u2581\U0001f30d".encode()))
    out += kv_array(b"empty", STR, 0, b"")
    return header(0, 2 * len(kinds) + 2) + out


def tensors() -> bytes:
    entries = tensor(b"token_embd.weight", [256, 2], 12, 0)  # q4_k
    entries += tensor(b"blk.0.ffn_gate_exps.weight", [32, 1, 2], 2, 320)  # q4_0
    entries += tensor(b"blk.0.attn_norm.weight", [4], 0, 384)
    entries += tensor(b"four", [2, 1, 2, 1], 1, 416)
    meta = header(4, 2) + ARCH + kv_u32(b"general.alignment", 32) + entries
    return padded(meta, bytes(range(256)) + bytes(168))


def aligned() -> bytes:
    meta = header(2, 1) + kv_u32(b"general.alignment", 8)
    return padded(meta + tensor(b"b", [2], 0, 8) + tensor(b"a", [2], 0, 0), bytes(48))


def version_two() -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 2, 0, 1) + kv_str(b"general.name", b"old")


def part() -> bytes:
    keys = text(b"split.no") + struct.pack("<IH", 2, 0) + text(b"split.count")
    keys += struct.pack("<IH", 2, 1) + text(b"split.tensors.count") + struct.pack("<Ii", 5, 0)
    return header(0, 3) + keys


def nested() -> bytes:
    inner = struct.pack("<IQ", ARR, 1) * 8 + struct.pack("<IQI", U32, 1, 7)
    return header(0, 1) + text(b"n") + struct.pack("<I", ARR) + inner


def main(folder: Path = Path(__file__).parent.parent / "fuzz" / "corpus" / "gguf") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for make in (every_type, tensors, aligned, version_two, part, nested):
        (folder / f"seed_{make.__name__}").write_bytes(make())
    for name, (_, _, data) in hostile.FILES.items():
        (folder / f"seed_{name}").write_bytes(data)


if __name__ == "__main__":
    main()

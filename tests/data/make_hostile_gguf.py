"""Writes hostile/*.gguf and hostile/index.txt: one small GGUF file for each known vulnerability of other readers, with
what ours has to say of it. tests/c/test_gguf.c opens them all (also under the sanitizers) and so do the fuzzer's
corpus runs.

    python tests/data/make_hostile_gguf.py        standard library only

What is written here of each CVE is its public description in our words. Three are not about reading GGUF at all; their
files hold the same kind of lie where a GGUF file could tell it, and the comment says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

U8, U32, STR, ARR, U64 = 0, 4, 8, 9, 10
F16, Q4_0, I8 = 1, 2, 24


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(n_tensors: int, n_kv: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_kv)


def kv_u32(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def kv_str(key: bytes, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", STR) + text(value)


def kv_array(key: bytes, kind: int, count: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", ARR, kind, count) + data


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def padded(meta: bytes, data: bytes) -> bytes:
    return meta + bytes(-len(meta) % 32) + data


ARCH = kv_str(b"general.architecture", b"llama")
# Name -> (what opening it must give, the field of the error, the bytes).
FILES: dict[str, tuple[str, str, bytes]] = {}


def hostile(name: str, status: str, field: str) -> Callable[[Callable[[], bytes]], None]:
    def add(make: Callable[[], bytes]) -> None:
        FILES[name] = (status, field, make())

    return add


@hostile("cve_2024_21802", "PS_EFORMAT", "tensor[0].n_dims (w)")
def _() -> bytes:
    """More dimensions than the reader's fixed array of four: sizes written past its end."""
    return padded(header(1, 1) + ARCH + tensor(b"w", [32] + [1] * 15, F16, 0), bytes(64))


@hostile("cve_2024_21825", "PS_EFORMAT", "kv[0].value (tokenizer.ggml.tokens)")
def _() -> bytes:
    """An array of strings whose count times the size of a string record (16) wraps around to 16."""
    strings = text(b"a") * 8
    return header(0, 1) + kv_array(b"tokenizer.ggml.tokens", STR, (1 << 60) + 1, strings)


@hostile("cve_2024_23496", "PS_EFORMAT", "kv[0].key")
def _() -> bytes:
    """A string of 2^64 - 1 bytes: with its terminator the allocation wraps around to 0."""
    return header(0, 1) + text(b"general.architecture", (1 << 64) - 1) + bytes(64)


@hostile("cve_2024_21836", "PS_EFORMAT", "n_tensors")
def _() -> bytes:
    """A tensor count whose product with the size of a directory record wraps around."""
    return padded(header((1 << 61) + 1, 1) + ARCH + tensor(b"w", [32], F16, 0), bytes(64))


@hostile("cve_2024_23605", "PS_EFORMAT", "n_kv")
def _() -> bytes:
    """The same with the count of key-value entries."""
    return header(0, (1 << 60) + 1) + ARCH * 3


@hostile("cve_2024_32878", "PS_EFORMAT", "kv[1].value (tokenizer.ggml.tokens)")
def _() -> bytes:
    """The file ends inside an array of strings: clean-up freed the pointers that had not been set yet."""
    strings = text(b"first") + text(b"second") + text(b"cut short", 40)
    return header(0, 2) + ARCH + kv_array(b"tokenizer.ggml.tokens", STR, 4, strings)


@hostile("cve_2024_41130", "PS_EFORMAT", "kv[1].key")
def _() -> bytes:
    """Reading the second key fails; a lookup then compared against the key that never arrived."""
    return header(0, 2) + ARCH + struct.pack("<Q", 17) + b"general."


@hostile("cve_2024_39720", "PS_EFORMAT", "version")
def _() -> bytes:
    """Nothing but the four letters of the magic: the reader went on past the end."""
    return b"GGUF"


@hostile("cve_2025_0317", "PS_EFORMAT", "general.alignment")
def _() -> bytes:
    """An alignment of 0, by which the padding was then divided."""
    meta = header(1, 2) + ARCH + kv_u32(b"general.alignment", 0) + tensor(b"w", [32], F16, 0)
    return padded(meta, bytes(64))


@hostile("cve_2025_49847", "PS_EFORMAT", "kv[1].value (tokenizer.ggml.tokens)")
def _() -> bytes:
    """A vocabulary token whose length is negative as a 32-bit number, which passed a signed size check. The flaw was in
    copying tokens out of the vocabulary, so a file must hold 2 GiB of text to reach it; here the length alone lies.
    test_gguf.c also opens a sparse file that really has the 2 GiB."""
    token = text(b"abc", (1 << 31) + 16)
    return header(0, 2) + ARCH + kv_array(b"tokenizer.ggml.tokens", STR, 1, token)


@hostile("cve_2025_52566", "PS_EFORMAT", "kv[1].value (tokenizer.ggml.token_type)")
def _() -> bytes:
    """Not a reader's flaw: a count of tokens of a prompt was compared as signed with a buffer's size. Same lie in a
    file: an array whose count is negative as a 32-bit number."""
    return header(0, 2) + ARCH + kv_array(b"tokenizer.ggml.token_type", U8, 1 << 31, bytes(64))


@hostile("cve_2025_53630", "PS_EFORMAT", "tensor[0].dims (a)")
def _() -> bytes:
    """Tensors that are each of a possible size and whose sum wraps around: too small a buffer for the data."""
    size = (1 << 63) + 32
    tensors = tensor(b"a", [size], I8, 0) + tensor(b"b", [size], I8, size)
    return padded(header(2, 1) + ARCH + tensors, bytes(64))


@hostile("cve_2026_27940", "PS_EFORMAT", "tensor[0].dims (a)")
def _() -> bytes:
    """As before, past its first fix: the sum just fits, and the records' size added to it wraps around."""
    return padded(header(1, 1) + ARCH + tensor(b"a", [(1 << 64) - 64], I8, 0), bytes(64))


@hostile("cve_2026_33298", "PS_EFORMAT", "tensor[0].dims (w)")
def _() -> bytes:
    """Dimensions whose product wraps around to 32 weights, of which the file holds every byte."""
    return padded(header(1, 1) + ARCH + tensor(b"w", [32, (1 << 59) + 1], Q4_0, 0), bytes(32))


@hostile("cve_2026_7482", "PS_EFORMAT", "tensor[1].offset (b)")
def _() -> bytes:
    """A tensor that begins inside the file and ends behind it: quantising it read other memory."""
    tensors = tensor(b"a", [512], F16, 0) + tensor(b"b", [512], F16, 1024)
    return padded(header(2, 1) + ARCH + tensors, bytes(2048 - 32))


@hostile("cve_2026_43629", "PS_EFORMAT", "kv[1].value (llama.cells)")
def _() -> bytes:
    """Not a reader's flaw: restoring a saved KV cache multiplied a cell count unchecked. Same lie in a file: an array
    whose count times 8 wraps around to 8 bytes, which are there."""
    return header(0, 2) + ARCH + kv_array(b"llama.cells", U64, (1 << 61) + 1, bytes(8))


def main(folder: Path = Path(__file__).parent / "hostile") -> None:
    folder.mkdir(exist_ok=True)
    lines = ["# file, what ps_gguf_open must give, the field; written by ../make_hostile_gguf.py\n"]
    for name, (status, field, data) in FILES.items():
        (folder / f"{name}.gguf").write_bytes(data)
        lines.append(f"{name}.gguf\t{status}\t{field}\n")
    (folder / "index.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()

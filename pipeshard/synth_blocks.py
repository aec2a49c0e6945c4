"""Random weight blocks in every format: what `synth` fills its tensors with.

A block dequantises to values with mean zero and a given standard deviation. The mean matters: with
nibbles spread evenly over 0..15, say, Q4_0 has a mean of -0.5 steps, every matrix then adds a common
direction to the residual stream, and all tokens go to the same experts. So codes are drawn from bell
curves whose mean is zero exactly (not just nearly), and where a format has an offset it cancels the
centre exactly in the stored 16-bit numbers. Scales vary from block to block, and where files have
signs on them, so do these.

Not here: which tensor gets which format, files. Threads: pure functions; `start_pool` fills from an executor's.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["FORMATS", "Format", "gaussian", "make_blocks", "rng_for", "start_pool"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CHUNK_BYTES = (
    4 << 20
)  # of a pool, made by one task from one seed: the result hangs on no thread count


@dataclass(frozen=True)
class Format:
    """GGUF's spelling in lower case, its type id, and the geometry of a block."""

    name: str
    type_id: int
    block_elems: int
    block_bytes: int

    def n_bytes(self, n_elems: int) -> int:
        return n_elems // self.block_elems * self.block_bytes


FORMATS = {
    name: Format(name, *numbers)
    for name, numbers in {
        "f32": (0, 1, 4),
        "f16": (1, 1, 2),
        "bf16": (30, 1, 2),
        "q4_0": (2, 32, 18),
        "q4_1": (3, 32, 20),
        "q5_0": (6, 32, 22),
        "q5_1": (7, 32, 24),
        "q8_0": (8, 32, 34),
        "q2_k": (10, 256, 84),
        "q3_k": (11, 256, 110),
        "q4_k": (12, 256, 144),
        "q5_k": (13, 256, 176),
        "q6_k": (14, 256, 210),
        "iq4_nl": (20, 32, 18),
        "iq4_xs": (23, 256, 136),
        "mxfp4": (39, 32, 17),
    }.items()
}

# The values of IQ4_NL's and IQ4_XS's codes, and of MXFP4's (in halves: E2M1 times two).
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def rng_for(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class _Codes:
    """256 codes to draw from evenly: bell-shaped, every code of the format in it, values adding up to zero."""

    table: Bytes  # [256]
    rms: float  # of the values


def _balance(count: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> None:
    """Moves draws between neighbouring codes until the values add up to zero. IQ4's steps are uneven
    and all larger than one, so two moves are made at a time (the second may be from a code to itself),
    of those that leave least the ones between the most frequent codes."""
    order = np.argsort(values, kind="stable")
    source = np.concatenate([order[:-1], order[1:], order[:1]])
    target = np.concatenate([order[1:], order[:-1], order[:1]])
    change = values[target] - values[source]
    while (total := int(count @ values)) != 0:
        common = np.minimum(count[source], count[target]).astype(np.float64)
        common[-1] = 256  # the move that is none
        left = np.abs(total + change[:, None] + change[None, :]) - 1e-4 * (common[:, None] + common)
        left[common < 3, :] = np.inf
        left[:, common < 3] = np.inf
        for move in np.unravel_index(int(left.argmin()), left.shape):
            count[source[move]] -= 1
            count[target[move]] += 1


@cache
def _bell(values: tuple[int, ...], sigma: float) -> _Codes:
    """Codes for `values`, where the value of code i is `values[i]`."""
    v = np.array(values, np.float64)
    order = np.sort(v)
    # an uneven code book gets each value's share of the line, an even one the same for all
    width = np.interp(v, order, np.gradient(order)) if len(set(values)) == len(values) else 1.0
    weight = np.exp(-0.5 * (v / sigma) ** 2) * width
    count = np.maximum(1, np.round(weight / weight.sum() * 256)).astype(np.int64)
    while (excess := int(count.sum()) - 256) != 0:
        count[np.argmax(count)] -= int(np.sign(excess))
    ints = np.array(values, np.int64)
    _balance(count, ints)
    table = np.repeat(np.arange(len(values), dtype=np.uint8), count)
    return _Codes(table, math.sqrt(float(count @ np.square(ints)) / 256))


@cache
def _pairs(values: tuple[int, ...], sigma: float) -> Bytes:
    """[65536] bytes of two independent 4-bit codes: one draw of 16 bits makes two weights."""
    table = _bell(values, sigma).table
    return np.asarray((table[None, :] | (table[:, None] << 4)).reshape(-1), np.uint8)


@cache
def _normal() -> npt.NDArray[np.float64]:
    """[65536] values of a normal distribution with mean zero and variance one, both exactly."""
    half = np.sort(np.abs(rng_for("normal").standard_normal(32768)))
    half /= math.sqrt(float(np.square(half).mean()))
    return np.concatenate([-half[::-1], half])


def gaussian(shape: tuple[int, ...], std: float, rng: np.random.Generator) -> Floats:
    """For the small F32 tensors."""
    return (rng.standard_normal(shape) * std).astype(np.float32)


def _draw16(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint16]:
    # raw words are several times faster than bounded integers
    raw = rng.bit_generator.random_raw((n + 3) // 4)
    return np.asarray(raw, np.uint64).view(np.uint16)[:n]


def _draw8(rng: np.random.Generator, n: int) -> Bytes:
    raw = rng.bit_generator.random_raw((n + 7) // 8)
    return np.asarray(raw, np.uint64).view(np.uint8)[:n]


_SPREAD = 0.3  # a block's scale lies within 1 -+ this
_SPREAD_RMS = math.sqrt(1 + _SPREAD**2 / 3)


def _scales(rng: np.random.Generator, n: int, mean: float, *, signed: bool) -> Floats:
    out = rng.random(n, np.float32)
    out *= np.float32(2 * _SPREAD * mean)
    out += np.float32((1 - _SPREAD) * mean)
    if signed:
        out *= 1 - 2 * (_draw8(rng, n) & 1).astype(np.float32)
    return out


def _put_f16(out: Bytes, offset: int, values: Floats) -> None:
    out[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _get_f16(out: Bytes, offset: int) -> Floats:
    pair = np.ascontiguousarray(out[:, offset : offset + 2])
    return np.asarray(pair.view("<f2").reshape(-1), np.float32)


def _signed_range(bits: int) -> tuple[int, ...]:
    return tuple(range(-(1 << (bits - 1)), 1 << (bits - 1)))


def _fill_float(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    values = (_normal() * std).astype("<f4")
    if name == "f16":
        table = values.astype("<f2").view(np.uint16)
    elif name == "bf16":
        # to nearest; the carry may run into the exponent, as it should
        table = ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    else:
        out[:] = values[_draw16(rng, len(out))].view(np.uint8).reshape(-1, 4)
        return
    out[:] = table[_draw16(rng, len(out))].view(np.uint8).reshape(-1, 2)


def _fill_4bit(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """Q4_0, Q4_1, IQ4_NL: 16 bytes of nibbles at the end of the block."""
    values, sigma = (_IQ4_VALUES, 45.0) if name == "iq4_nl" else (_signed_range(4), 2.7)
    mean = std / (_bell(values, sigma).rms * _SPREAD_RMS)
    _put_f16(out, 0, _scales(rng, len(out), mean, signed=name != "q4_1"))
    if name == "q4_1":
        _put_f16(out, 2, -8 * _get_f16(out, 0))  # times a power of two: exact
    out[:, -16:] = _pairs(values, sigma)[_draw16(rng, 16 * len(out))].reshape(-1, 16)


def _fill_5bit(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """Q5_0, Q5_1: a 32-bit word of fifth bits before the nibbles."""
    codes = _bell(_signed_range(5), 5.5)
    _put_f16(out, 0, _scales(rng, len(out), std / (codes.rms * _SPREAD_RMS), signed=name == "q5_0"))
    if name == "q5_1":
        _put_f16(out, 2, -16 * _get_f16(out, 0))
    drawn = codes.table[_draw8(rng, 32 * len(out))].reshape(-1, 32)
    out[:, -20:-16] = np.packbits(drawn >> 4, axis=1, bitorder="little")
    out[:, -16:] = (drawn[:, :16] & 15) | (drawn[:, 16:] << 4)


def _fill_q8_0(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    table = np.clip(np.round(_normal() * 36.0), -127, 127).astype(np.int8)  # symmetric: mean zero
    rms = math.sqrt(float(np.square(table.astype(np.float64)).mean()))
    _put_f16(out, 0, _scales(rng, len(out), std / (rms * _SPREAD_RMS), signed=False))
    out[:, 2:] = table[_draw16(rng, 32 * len(out))].view(np.uint8).reshape(-1, 32)


def _fill_mxfp4(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """Scales are powers of two: the two around the wanted one, mixed so that the variance is right."""
    scale = std / (_bell(_MXFP4_VALUES, 4.4).rms / 2)
    low = math.floor(math.log2(scale))
    upper_share = ((scale / 2.0**low) ** 2 - 1) / 3
    out[:, 0] = low + 127 + (rng.random(len(out), np.float32) < upper_share)
    out[:, 1:] = _pairs(_MXFP4_VALUES, 4.4)[_draw16(rng, 16 * len(out))].reshape(-1, 16)


def _inner(rng: np.random.Generator, n: int, k: int, low: int, high: int) -> npt.NDArray[np.int32]:
    """[n, k] scales inside a super-block, evenly in low..high (a power of two many)."""
    return low + (_draw8(rng, n * k).reshape(n, k) & (high - low)).astype(np.int32)


def _inner_rms(low: int, high: int) -> float:
    return math.sqrt(sum(i * i for i in range(low, high + 1)) / (high - low + 1))


def _signs(rng: np.random.Generator, scales: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return scales * (1 - 2 * (_draw8(rng, scales.size) & 1).astype(np.int32)).reshape(scales.shape)


def _fill_q2_k(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """scales[16] (scale and minimum, 4 bits each), qs[64], d, dmin. Zero is code 2: minimum = 2 x scale."""
    codes = _bell((-2, -1, 0, 1), 1.1)
    inner = _inner(rng, len(out), 16, 6, 13).astype(np.uint8)
    out[:, :16] = inner | (inner << 4)
    drawn = codes.table[_draw8(rng, 256 * len(out))].reshape(-1, 4, 64)
    out[:, 16:80] = (
        drawn[:, 0] | (drawn[:, 1] << 2) | (drawn[:, 2] << 4) | (drawn[:, 3] << 6)
    )  # independent draws: which weight gets which does not matter
    mean = std / (codes.rms * _SPREAD_RMS * _inner_rms(6, 13))
    _put_f16(out, 80, _scales(rng, len(out), mean, signed=False))
    _put_f16(out, 82, 2 * _get_f16(out, 80))


def _fill_q3_k(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """hmask[32], qs[64], scales[12] (16 of 6 bits, offset 32), d."""
    codes, n = _bell(_signed_range(3), 1.5), len(out)
    drawn = codes.table[_draw8(rng, 256 * n)].reshape(n, 2, 4, 32)  # half, 2-bit field, byte
    for half in range(2):
        low = drawn[:, half] & 3
        packed = low[:, 0] | (low[:, 1] << 2) | (low[:, 2] << 4) | (low[:, 3] << 6)
        out[:, 32 + 32 * half : 64 + 32 * half] = packed
    high = (drawn >> 2).reshape(n, 8, 32)
    out[:, :32] = np.packbits(high, axis=1, bitorder="little")[:, 0]
    inner = _signs(rng, _inner(rng, n, 16, 8, 23)) + 32
    sub = inner.astype(np.uint8)
    out[:, 96:104] = (sub[:, :8] & 15) | ((sub[:, 8:] & 15) << 4)
    top = (sub >> 4).reshape(n, 4, 4)
    out[:, 104:108] = top[:, 0] | (top[:, 1] << 2) | (top[:, 2] << 4) | (top[:, 3] << 6)
    mean = std / (codes.rms * _SPREAD_RMS * _inner_rms(8, 23))
    _put_f16(out, 108, _scales(rng, n, mean, signed=True))


def _pack_scales_and_minima(out: Bytes, sub: Bytes) -> None:
    """Q4_K's and Q5_K's 12 bytes for 8 scales and 8 minima of 6 bits, where each minimum equals its scale."""
    out[:, :4] = sub[:, :4] | ((sub[:, 4:] >> 4) << 6)
    out[:, 4:8] = out[:, :4]
    out[:, 8:12] = (sub[:, 4:] & 15) | ((sub[:, 4:] & 15) << 4)


def _fill_q45_k(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """d, dmin, 12 bytes of scales, for Q5_K qh[32], qs[128]. Zero is the middle code."""
    bits, n = (4, len(out)) if name == "q4_k" else (5, len(out))
    values, sigma = _signed_range(bits), 2.7 if bits == 4 else 5.5
    codes = _bell(values, sigma)
    _pack_scales_and_minima(out[:, 4:16], _inner(rng, n, 8, 16, 47).astype(np.uint8))
    mean = std / (codes.rms * _SPREAD_RMS * _inner_rms(16, 47))
    _put_f16(out, 0, _scales(rng, n, mean, signed=False))
    _put_f16(out, 2, (1 << (bits - 1)) * _get_f16(out, 0))
    if bits == 4:
        out[:, 16:] = _pairs(values, sigma)[_draw16(rng, 128 * n)].reshape(-1, 128)
        return
    drawn = codes.table[_draw8(rng, 256 * n)].reshape(n, 8, 32)
    out[:, 16:48] = np.packbits(drawn >> 4, axis=1, bitorder="little")[:, 0]
    nibbles = (drawn[:, 0::2] & 15) | ((drawn[:, 1::2] & 15) << 4)
    out[:, 48:] = nibbles.reshape(n, 128)


def _fill_q6_k(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """ql[128], qh[64], 16 signed scales, d."""
    codes, n = _bell(_signed_range(6), 11.0), len(out)
    drawn = codes.table[_draw8(rng, 256 * n)].reshape(n, 2, 4, 32)  # half, quarter of it, byte
    low, high = drawn & 15, drawn >> 4
    # a half's bytes hold the quarters 0 and 1 in their low nibbles and 2 and 3 in their high ones
    out[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(n, 128)
    top = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    out[:, 128:192] = top.reshape(n, 64)
    inner = _signs(rng, _inner(rng, n, 16, 16, 47))
    out[:, 192:208] = inner.astype(np.int8).view(np.uint8)
    mean = std / (codes.rms * _SPREAD_RMS * _inner_rms(16, 47))
    _put_f16(out, 208, _scales(rng, n, mean, signed=True))


def _fill_iq4_xs(name: str, out: Bytes, std: float, rng: np.random.Generator) -> None:
    """d, scales_h (16 bits), scales_l[4] (8 of 6 bits, offset 32), qs[128]."""
    codes, n = _bell(_IQ4_VALUES, 45.0), len(out)
    sub = (_signs(rng, _inner(rng, n, 8, 8, 23)) + 32).astype(np.uint16)
    high = ((sub >> 4) << (2 * np.arange(8, dtype=np.uint16))).sum(axis=1, dtype=np.uint16)
    out[:, 2:4] = high.astype("<u2").view(np.uint8).reshape(-1, 2)
    low = (sub & 15).astype(np.uint8)
    out[:, 4:8] = low[:, 0::2] | (low[:, 1::2] << 4)
    mean = std / (codes.rms * _SPREAD_RMS * _inner_rms(8, 23))
    _put_f16(out, 0, _scales(rng, n, mean, signed=True))
    out[:, 8:] = _pairs(_IQ4_VALUES, 45.0)[_draw16(rng, 128 * n)].reshape(-1, 128)


_FILL: dict[str, Callable[[str, Bytes, float, np.random.Generator], None]] = {
    "f32": _fill_float, "f16": _fill_float, "bf16": _fill_float,
    "q4_0": _fill_4bit, "q4_1": _fill_4bit, "iq4_nl": _fill_4bit,
    "q5_0": _fill_5bit, "q5_1": _fill_5bit, "q8_0": _fill_q8_0, "mxfp4": _fill_mxfp4,
    "q2_k": _fill_q2_k, "q3_k": _fill_q3_k, "q4_k": _fill_q45_k, "q5_k": _fill_q45_k,
    "q6_k": _fill_q6_k, "iq4_xs": _fill_iq4_xs,
}  # fmt: skip


def make_blocks(fmt: Format, n_blocks: int, std: float, rng: np.random.Generator) -> Bytes:
    """[n_blocks, block_bytes] of weights with mean zero and this standard deviation."""
    out = np.empty((n_blocks, fmt.block_bytes), np.uint8)
    _FILL[fmt.name](fmt.name, out, std, rng)
    return out


def start_pool(
    fmt: Format, n_blocks: int, std: float, key: Sequence[int | str], executor: Executor
) -> tuple[Bytes, list[Future[None]]]:
    """As `make_blocks`, in chunks by several threads: valid once the futures are done. The content
    follows from the key alone."""
    step = max(1, _CHUNK_BYTES // fmt.block_bytes)
    pool = np.empty((n_blocks, fmt.block_bytes), np.uint8)

    def fill(first: int) -> None:
        rng = rng_for(*key, fmt.name, str(std), first)
        _FILL[fmt.name](fmt.name, pool[first : first + step], std, rng)

    return pool, [executor.submit(fill, first) for first in range(0, n_blocks, step)]

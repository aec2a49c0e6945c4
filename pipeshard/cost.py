"""How long ops, copies and hand-offs take: a model fitted from a profile's samples.

Every side has a roof: the bytes and the FLOPs a second that its best samples reached. What an op takes is what the roof
says times how far the samples of that op and format stayed below it, interpolated over the number of tokens; so a shape
that was measured is predicted as measured, and one beyond all of them keeps the last one's distance from the roof.
Copies are interpolated over their size.

Another model is anything with `seconds` and `error` (`CostModel`), made by a function of the samples and the number of
CPU threads, as `fit` is.

Not here: measuring (profiling.py), what follows from durations (_simulator.py). Threads: a fitted model is immutable
but for a memo, which any thread may fill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ._profile import ANY_OP, Sample

__all__ = ["CostModel", "Fit", "Roofline", "Shape", "Where", "fit"]

Where = Literal["vram", "stream", "cpu", "h2d", "d2h", "fixed"]
F64 = npt.NDArray[np.float64]

_SIDE = {"vram": "gpu", "stream": "gpu", "cpu": "cpu", "h2d": "h2d", "d2h": "d2h", "fixed": "fixed"}
_FEW_TOK = 8  # an op of so many tokens reads weights, of many it computes
# Attention reads keys that lie in host memory at this part of the rate of gathers, which do nothing else: at 48 of 51
# GB/s on an H200 (traces of decoding there). For profiles that did not time it.
_KV_ON_BUS = 0.95
_EXPERTS = ("moe_up", "moe_down")  # ops that read whole matrices wherever they lie
_SAME = 1e-6  # squared distance, in powers of e, of work that is the same


class Shape(NamedTuple):
    """What an op has to do; of a copy only `bytes` is looked at."""

    fmt: str | None = None
    n_tok: int = 0
    flops: int = 0
    bytes: int = 0


class CostModel(Protocol):
    """What a simulation asks. `error`: of a prediction, relative, as far as the model knows itself. It may also have
    `roof(place)`, the bytes and FLOPs a second that nothing beats there; else large ops are asked for."""

    @property
    def error(self) -> float: ...

    def seconds(self, op: str, shape: Shape, place: Where, load: str = "idle") -> float:
        """Of one op where a unit of this `place` computes; of "copy" over "h2d" or "d2h"; of "gather" over "h2d",
        which is the GPU reading host memory itself, start and end of that op included, and of an op's name there, so
        far as it reads like that; of what is "fixed": "launch", "graph_node", "flag", "pass", "copy". `load`: what
        else runs, as samples have it."""
        ...


Fit = Callable[[Sequence[Sample], int], CostModel]


@dataclass(frozen=True, slots=True)
class _Roof:
    """The best of a side: `start` seconds, then the longer of bytes and FLOPs at these rates."""

    start: float
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, flops: float, n_bytes: float) -> float:
        return self.start + max(n_bytes / self.bytes_per_s, flops / self.flops_per_s)


class _Curve:
    """Samples of one op and format. Those of as many tokens tell, the more alike their work is the more, how far below
    the roof such ops stay; between two numbers of tokens the time itself is interpolated, for it has no kinks."""

    def __init__(self, roof: _Roof, samples: Sequence[Sample]) -> None:
        self._roof = roof
        self._shapes = [Shape(s.fmt, max(s.n_tok, 1), s.flops, s.bytes) for s in samples]
        self._seconds = np.log([s.seconds for s in samples])
        self._roofs = np.log([roof.seconds(s.flops, s.bytes) for s in samples])
        self._n_tok = np.array([shape.n_tok for shape in self._shapes])

    def seconds(self, shape: Shape, skip: int = -1) -> float:
        n_tok = max(shape.n_tok, 1)
        counts, times = [], []
        for count in np.unique(self._n_tok):
            on = self._n_tok == count
            if skip >= 0:
                on[skip] = False
            if not on.any():
                continue
            # This work with that many tokens: as many weights, and FLOPs in proportion.
            nearest = min(max(n_tok, self._n_tok.min()), self._n_tok.max()) == n_tok
            scale = count / n_tok if nearest else 1.0
            roof = math.log(self._roof.seconds(shape.flops * scale, shape.bytes))
            weight = ((self._roofs[on] - roof) ** 2 + _SAME) ** -2.0
            below = weight @ (self._seconds[on] - self._roofs[on]) / weight.sum()
            counts.append(math.log(count))
            times.append(roof + below)
        return math.exp(np.interp(math.log(n_tok), counts, times))

    @property
    def error(self) -> float:
        """The median miss when each sample is predicted by the others: an upper bound, for what is asked about was
        usually measured."""
        if len(self._shapes) < 3:
            return 0.0
        misses = [
            math.log(self.seconds(shape, skip=i)) - self._seconds[i]
            for i, shape in enumerate(self._shapes)
        ]
        return float(np.median(np.abs(misses)))


class _Side:
    """The GPU, or the CPU with one number of threads."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.roof = _roof(samples)
        keyed: dict[tuple[str, str | None], list[Sample]] = {}
        for sample in samples:
            if sample.op != ANY_OP and sample.seconds > 0:
                for key in ((sample.op, sample.fmt), (sample.op, None), (ANY_OP, None)):
                    keyed.setdefault(key, []).append(sample)
        # Sets, because a sample without a format is filed twice under its op.
        self._curves = {
            key: _Curve(self.roof, list(dict.fromkeys(group))) for key, group in keyed.items()
        }

    def seconds(self, op: str, shape: Shape) -> float:
        for key in ((op, shape.fmt), (op, None), (ANY_OP, None)):
            curve = self._curves.get(key)
            if curve is not None:
                return curve.seconds(shape)
        return self.roof.seconds(shape.flops, shape.bytes)

    @property
    def errors(self) -> list[float]:
        return [curve.error for key, curve in self._curves.items() if key[0] != ANY_OP]


def _roof(samples: Sequence[Sample]) -> _Roof:
    stated = [s for s in samples if s.op == ANY_OP]
    start = min((s.seconds for s in stated if s.flops == 0 and s.bytes == 0), default=0.0)
    known = stated or samples

    def rate(what: str) -> float:
        rates = [
            getattr(s, what) / max(s.seconds - start, 1e-12) for s in known if getattr(s, what) > 0
        ]
        return max(rates, default=1e12)

    shortest = min((s.seconds for s in samples if s.seconds > 0), default=1e-9)
    return _Roof(start or min(1e-6, shortest / 4), rate("bytes"), rate("flops"))


class _Bus:
    """Copies in one direction: seconds over bytes, straight lines between the sizes that were timed."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        best: dict[int, float] = {}
        for sample in samples:
            best[sample.bytes] = min(sample.seconds, best.get(sample.bytes, math.inf))
        sizes = sorted(best)
        self._bytes = np.array(sizes, np.float64)
        self._seconds = np.array([best[size] for size in sizes])

    @property
    def least(self) -> tuple[float, float]:
        """Bytes and seconds of the smallest that was timed."""
        return float(self._bytes[0]), float(self._seconds[0])

    @property
    def rate(self) -> float:
        """Bytes a second of large copies."""
        if len(self._bytes) < 2:
            return float(self._bytes[-1] / self._seconds[-1])
        more = (self._bytes[1:] - self._bytes[:-1]) / np.maximum(
            self._seconds[1:] - self._seconds[:-1], 1e-12
        )
        return float(more[-1])

    def seconds(self, n_bytes: int) -> float:
        if len(self._bytes) < 2:
            return float(n_bytes * self._seconds[0] / self._bytes[0])
        if n_bytes <= self._bytes[-1] and n_bytes >= self._bytes[0]:
            return float(np.interp(n_bytes, self._bytes, self._seconds))
        i = len(self._bytes) - 2 if n_bytes > self._bytes[-1] else 0
        per_byte = (self._seconds[i + 1] - self._seconds[i]) / (self._bytes[i + 1] - self._bytes[i])
        return float(max(self._seconds[i] + (n_bytes - self._bytes[i]) * per_byte, 0.0))


class Roofline:
    """The model that `fit` makes."""

    def __init__(self, samples: Sequence[Sample], threads: int = 0) -> None:
        idle = [s for s in samples if s.load == "idle"]
        gpu = [s for s in idle if s.side == "gpu"]
        self._gpu = _Side(gpu) if gpu else None
        self._cpu = _by_threads([s for s in idle if s.side == "cpu"], threads)
        self._bus = {
            side: _Bus(copies)
            for side in ("h2d", "d2h")
            if (copies := [s for s in idle if s.side == side and s.op == "copy" and s.bytes > 0])
        }
        reads: dict[str, list[Sample]] = {}
        for s in idle:
            if s.side == "h2d" and s.op != "copy" and s.bytes > 0:
                reads.setdefault(s.op, []).append(s)
        self._reads = {op: _Bus(samples) for op, samples in reads.items()}
        self._fixed = {s.op: s.seconds for s in samples if s.side == "fixed"}
        self._fixed_under = {
            (s.op, s.load): s.seconds for s in samples if s.side == "fixed" and s.load != "idle"
        }
        self._memo: dict[tuple[str, Shape, Where], float] = {}
        self._slower = self._contention(samples, threads)
        sides = [side for side, _ in self._cpu] + ([self._gpu] if self._gpu else [])
        errors = [error for side in sides for error in side.errors if error > 0]
        self.error = float(np.median(errors)) if errors else 0.0

    def __repr__(self) -> str:
        return f"<Roofline, error {self.error:.0%}>"

    def seconds(self, op: str, shape: Shape, place: Where, load: str = "idle") -> float:
        if place == "fixed":
            return self._fixed_under.get((op, load), self._fixed.get(op, 0.0))
        key = (op, shape, place)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._idle_seconds(op, shape, place)
        return found if load == "idle" else found * self.slowdown(place, load, op)

    def slowdown(self, place: Where, load: str, op: str = ANY_OP) -> float:
        """How many times as long things take there while `load` runs."""
        side = _SIDE[place]
        known = self._slower.get((side, op, load), self._slower.get((side, ANY_OP, load)))
        if known is None and load == "gather":  # which carries as much as copies do
            return self.slowdown(place, "h2d", op)
        return 1.0 if known is None else known

    def roof(self, place: Where) -> tuple[float, float]:
        """Bytes and FLOPs a second of the best samples."""
        if place == "h2d" or place == "d2h":
            bus = self._bus.get(place)
            return (bus.rate if bus else 1e12), 0.0
        sides = [side for side, _ in self._cpu] if place == "cpu" else [self._gpu]
        roofs = [side.roof for side in sides if side is not None]
        if not roofs:
            return 1e12, 1e15
        return max(r.bytes_per_s for r in roofs), max(r.flops_per_s for r in roofs)

    def _idle_seconds(self, op: str, shape: Shape, place: Where) -> float:
        if (place == "h2d" or place == "d2h") and op == "copy":
            bus = self._bus.get(place)
            return bus.seconds(shape.bytes) if bus is not None else 0.0
        if place == "h2d":
            return self._read_seconds(op, shape.bytes)
        if place == "d2h":
            return 0.0
        if place != "cpu":
            return self._gpu.seconds(op, shape) if self._gpu else 0.0
        # Between two numbers of threads: between their times, in powers.
        if not self._cpu:
            return 0.0
        parts = [(weight, side.seconds(op, shape)) for side, weight in self._cpu]
        return math.exp(sum(weight * math.log(max(t, 1e-12)) for weight, t in parts))

    def _read_seconds(self, op: str, n_bytes: int) -> float:
        """Of an op of the GPU that reads host memory."""
        own, gather, bus = self._reads.get(op), self._reads.get("gather"), self._bus.get("h2d")
        if own is not None and (op != "gather" or n_bytes >= own.least[0]):
            return own.seconds(n_bytes)
        if op == "attn":
            return self._read_seconds("gather", n_bytes) / _KV_ON_BUS
        start = self._gpu.roof.start if self._gpu else 0.0
        if gather is None:  # as an op that starts like others and reads at the bus's rate
            return start + n_bytes / bus.rate if bus is not None else 0.0
        if op in _EXPERTS:  # as far-flung as what gathers read
            return max(start, gather.seconds(n_bytes))
        least, seconds = gather.least
        if n_bytes >= least:
            return gather.seconds(n_bytes)
        # Smaller than any that was timed: an op that reads what others hand over.
        start = min(start, seconds)
        return start + (seconds - start) * n_bytes / least

    def _contention(
        self, samples: Sequence[Sample], threads: int
    ) -> dict[tuple[str, str, str], float]:
        ratios: dict[tuple[str, str, str], list[float]] = {}
        places: dict[str, Where] = {"gpu": "vram", "cpu": "cpu", "h2d": "h2d", "d2h": "d2h"}
        for s in _telling(samples, threads):
            if s.load == "idle" or s.side not in places:
                continue
            idle = self._as_idle(s, samples) or self.seconds(
                s.op, Shape(s.fmt, s.n_tok, s.flops, s.bytes), places[s.side]
            )
            if idle > 0:
                # Reads of the GPU say nothing of copies, which another engine makes.
                for op in (s.op,) if s.side == "h2d" and s.op != "copy" else (s.op, ANY_OP):
                    ratios.setdefault((s.side, op, s.load), []).append(s.seconds / idle)
        return {key: max(1.0, float(np.median(values))) for key, values in ratios.items()}

    @staticmethod
    def _as_idle(s: Sample, samples: Iterable[Sample]) -> float:
        """The same thing with nothing beside it, if that was timed: threads and all. The last time before `s`, for what
        others do on a machine changes."""
        same = (s.side, s.op, s.fmt, s.n_tok, s.flops, s.bytes, s.threads)
        found = 0.0
        for o in samples:
            if o is s and found > 0:
                break
            if o.load == "idle" and same == (
                o.side, o.op, o.fmt, o.n_tok, o.flops, o.bytes, o.threads
            ):  # fmt: skip
                found = o.seconds
        return found


def _telling(samples: Sequence[Sample], threads: int) -> list[Sample]:
    """Without those that say little of how CPU and bus slow each other down: where the CPU computed rather than read,
    or had other threads, if there are better ones."""
    found = list(samples)
    counts = {s.threads or math.inf for s in found if s.side == "cpu" and s.load != "idle"}
    if not counts:
        return found
    nearest = min(counts, key=lambda n: abs(math.log(min(n, 1e9) / (threads or 1e9))))
    mine = [s for s in found if s.side != "cpu" or (s.threads or math.inf) == nearest]
    reading = [s for s in mine if s.side != "cpu" or s.n_tok <= _FEW_TOK]
    return reading if any(s.side == "cpu" and s.load != "idle" for s in reading) else mine


def _by_threads(samples: Sequence[Sample], threads: int) -> list[tuple[_Side, float]]:
    """The numbers of threads around the one that is wanted, and their weights. 0, as many as there are, is the most."""
    counts = sorted({s.threads for s in samples}, key=lambda n: n or math.inf)
    if not counts:
        return []
    wanted = threads or math.inf
    above = next((n for n in counts if (n or math.inf) >= wanted), counts[-1])
    below = next((n for n in reversed(counts) if (n or math.inf) <= wanted), counts[0])

    def side(n: int) -> _Side:
        return _Side([s for s in samples if s.threads == n])

    if above == below or not (above and below):
        return [(side(below if below else above), 1.0)]
    share = math.log(wanted / below) / math.log(above / below)
    return [(side(below), 1.0 - share), (side(above), share)]


def fit(samples: Sequence[Sample], threads: int = 0) -> Roofline:
    """The built-in model. threads: of the CPU; 0: as many as were measured."""
    return Roofline(samples, threads)

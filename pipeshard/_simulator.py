"""How long passes of a plan take, from metadata alone: lowered to ticks, each tick priced by a cost model, and the
longest way through them. Weights are never read, and no device is opened.

Not here: durations of single ops (cost.py), which placement (sched_policies). Threads: a Simulator belongs to one.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from ._profile import ANY_OP, Profile, default_profile
from .cost import CostModel, Fit, Shape, Where, fit
from .emu import EmuDevice
from .model import Model
from .sched_policies.base import Prediction

__all__ = ["GRAPH_TOK", "PassTime", "Simulator", "Sources", "as_profile", "machine_profile"]

GRAPH_TOK = 16  # passes of at most as many tokens run as graphs
# What a prediction may be off by, at least, whatever the samples say of themselves.
_LEAST_ERROR = {"measured": 0.08, "datasheet": 0.35, "default": 0.5}
_EMU_ERROR = 0.02
_MOST_KNOWN = 1 << 14  # ops whose seconds are remembered; a search for a plan asks for thousands
_LARGE = 1 << 28  # bytes and FLOPs by which a model without a roof is asked for its rates
_DISK_BYTES_PER_S = 3e9  # of a disk that nobody measured: an NVMe drive's
# Filling a slot by the CPU moves each byte three times: read, and written after its line was fetched.
_FILL_MOVES = 3.0
_BOUNCED, _ON_DISK = 1, 2  # as the core has them
# By how much longer the bus takes beside a CPU that reads memory, at least: 7 to 19 % in passes on a machine with an
# H200. Only for profiles whose CPU read other memory than the bus did, which shows next to nothing of that.
_BUS_BESIDE_CPU = 0.12
_READERS = ("matmul", "moe_up", "moe_down")  # ops that read weights
_PROBE = Shape(None, 1, 1 << 26, 1 << 25)  # by which it is asked how things slow each other down


@dataclass(frozen=True, slots=True)
class PassTime:
    """Of one pass. `held`: seconds of it in which each of h2d, d2h, compute, cpu and hand_off held everything up; they
    sum to `seconds`. `busy`: seconds in which each stream worked. `flops`: of all ops."""

    seconds: float
    held: Mapping[str, float]
    busy: Mapping[str, float]
    flops: int


@dataclass(frozen=True, slots=True)
class _Priced:
    """Ticks of a pass, and what each takes."""

    ticks: npt.NDArray[np.void]
    seconds: npt.NDArray[np.float64]


def _added(parts: Sequence[PassTime]) -> PassTime:
    """Passes behind each other."""
    if len(parts) == 1:
        return parts[0]
    return PassTime(
        sum(part.seconds for part in parts),
        {name: sum(part.held[name] for part in parts) for name in parts[0].held},
        {name: sum(part.busy[name] for part in parts) for name in parts[0].busy},
        sum(part.flops for part in parts),
    )


def _weighed(parts: Sequence[PassTime], weights: Sequence[int]) -> PassTime:
    """The mean of so many passes of each kind, which do the same work."""
    shares = [weight / sum(weights) for weight in weights]
    pairs = list(zip(parts, shares, strict=True))
    return PassTime(
        sum(part.seconds * share for part, share in pairs),
        {name: sum(part.held[name] * share for part, share in pairs) for name in parts[0].held},
        {name: sum(part.busy[name] * share for part, share in pairs) for name in parts[0].busy},
        parts[0].flops,
    )


class _Busy:
    """When one stream was at work, tick by tick."""

    def __init__(self, end: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> None:
        self.start, self.end, self.seconds = end - seconds, end, np.maximum(seconds, 1e-12)
        self.total = float(seconds.sum())

    def during(self, other: _Busy) -> npt.NDArray[np.float64]:
        """Of each tick of the other, the seconds in which this one worked too."""
        if not len(self.end):
            return np.zeros(len(other.end))
        at = np.stack((self.start, self.end), axis=1).ravel()
        done = np.concatenate(((0.0,), np.cumsum(self.end - self.start)))
        worked = np.repeat(done, 2)[1:-1]  # until then
        both: npt.NDArray[np.float64] = np.interp(other.end, at, worked)
        both -= np.interp(other.start, at, worked)
        return both

    def share(self, seconds: float) -> float:
        return min(1.0, seconds / self.total) if self.total > 0 else 0.0


def _as_ns(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    return (seconds * 1e9 + 0.5).astype(np.uint64)


@cache
def _names() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str | None, ...]]:
    return _core.Plan.tick_names()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where an engine's copies come from: `units`, of each one page-locked memory (0), other memory (1) or disk (2).
    The latter two go through a ring of locked slots, at most `piece_bytes` at a time."""

    units: bytes
    piece_bytes: int


class Simulator:
    """Prices passes of any plan on one machine. sources: of an open engine; None: all page-locked."""

    def __init__(
        self,
        profile: Profile,
        *,
        threads: int = 0,
        cost: Fit = fit,
        sources: Sources | None = None,
    ) -> None:
        self.profile = profile
        self.sources = sources
        self.cost: CostModel = cost(profile.samples, threads)
        self.is_virtual = self.device == "emu"
        # Of ops and copies, by all that their seconds depend on: plans have most of them in common.
        self._known: dict[tuple[object, ...], float] = {}

    def beside(self, sources: Sources | None) -> Simulator:
        """The same of copies from there."""
        other = copy.copy(self)
        other.sources = sources
        return other

    @property
    def device(self) -> str:
        """The kind of device that the profile is of."""
        return str(self.profile.machine.get("device", "cuda"))

    @property
    def error(self) -> float:
        """Half of the interval around predictions, relative."""
        if self.is_virtual and self.profile.source == "default":
            return _EMU_ERROR  # these are the clock's own rates
        return max(self.cost.error, _LEAST_ERROR.get(self.profile.source, 0.5))

    # ---- one pass ----

    def run_pass(
        self,
        core: _core.Plan,
        n_tok: int,
        *,
        n_out: int = 1,
        first: int = 0,
        n_kv: int = 0,
        held: int = -1,
    ) -> PassTime:
        """n_tok tokens behind `first` others; n_kv: keys in all where they are of several sequences; held: the
        residency that VRAM holds before the pass, -1: the pass's own."""
        max_kv = n_kv or first + n_tok
        # Filling slots is no part of a graph, nor is bringing residents in.
        graph = n_tok <= GRAPH_TOK and self.sources is None
        graph = graph and (held < 0 or core.held_after(held, n_tok) == held)
        fill = 1.0 if self.is_virtual else self._fill(core, n_tok, max_kv)
        priced: list[_Priced] = []

        def price(ticks: npt.NDArray[np.void], span: Any) -> npt.NDArray[np.uint64] | None:
            if span is None:
                priced.append(self._price(ticks, graph, fill))
                return _as_ns(priced[0].seconds)
            slower = self._contended(priced[0], span) if len(priced) == 1 else None
            if slower is None:
                return None
            priced.append(replace(priced[0], seconds=slower))
            return _as_ns(slower)

        known = {} if self.sources is None else {"sources": self.sources.units}
        span = core.walk(n_tok, n_out, max_kv, first, price, held, **known)
        return self._finish(priced[0].ticks, span, graph)

    @staticmethod
    def _fill(core: _core.Plan, n_tok: int, max_kv: int) -> float:
        """Of the keys that a small pass is lowered for, so that it serves others too, the share that is there."""
        return 1.0 if n_tok > GRAPH_TOK else max_kv / max(max_kv, core.kv_bucket(n_tok, max_kv))

    def _price(self, ticks: npt.NDArray[np.void], graph: bool, fill: float) -> _Priced:
        """Seconds of each tick with nothing beside it. Most ticks of a pass are alike, so few are asked about."""
        alike = np.zeros(len(ticks), np.uint64)
        for name in (
            "kind",
            "stream",
            "op",
            "fmt",
            "n_tok",
            "flops",
            "bytes",
            "bus_bytes",
            "n_bytes",
        ):
            # a hash; what is equal stays equal, and 64 bits keep a few thousand others apart
            alike = alike * np.uint64(0x9E3779B97F4A7C15) + ticks[name].astype(np.uint64)
            alike ^= alike >> np.uint64(29)
        alike ^= (ticks["bus_odds"] * 2.0**53).astype(np.uint64)
        _, where, which = np.unique(alike, return_index=True, return_inverse=True)
        prices = np.array([self._known_seconds(ticks[i].item(), graph, fill) for i in where])
        seconds = prices[which]
        if self.sources is not None:
            self._bounce(ticks, seconds, self.sources)
        return _Priced(ticks, seconds)

    def _bounce(
        self, ticks: npt.NDArray[np.void], seconds: npt.NDArray[np.float64], sources: Sources
    ) -> None:
        """Copies through the ring take as long as filling it where that is longer. Both go piece by piece, and each
        piece is handed over by a flag."""
        source = np.frombuffer(sources.units, np.uint8)[ticks["unit"]]
        source[ticks["weights"] == 0] = 0
        flag = self.cost.seconds("flag", Shape(), "fixed")
        start = self.cost.seconds(ANY_OP, Shape(None, 1, 0, 1), "cpu")
        fill_rate = self.rates("cpu")[0] / (1.0 if self.is_virtual else _FILL_MOVES)
        for kind, rate in ((_BOUNCED, fill_rate), (_ON_DISK, min(fill_rate, self.disk_rate))):
            (on,) = np.nonzero(source == kind)
            for n_bytes in np.unique(ticks["n_bytes"][on]):
                n = -(-int(n_bytes) // sources.piece_bytes)
                cross = self.cost.seconds("copy", Shape(bytes=int(n_bytes) // n), "h2d")
                fill = start + n_bytes / n / rate
                here = on[ticks["n_bytes"][on] == n_bytes]
                seconds[here] = n * (flag + max(cross, fill))

    def _known_seconds(self, tick: tuple[Any, ...], graph: bool, fill: float) -> float:
        key = (*tick[:3], *tick[5:], graph, fill)  # all but whose weights it is about
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._seconds(tick, graph, fill)
        return self._known[key]

    def _seconds(self, tick: tuple[Any, ...], graph: bool, fill: float) -> float:
        kind, stream, op, _, _, fmt, n_tok, flops, n_bytes, bus_bytes, n_copied, odds = tick
        kinds, streams, ops, formats = _names()
        what = kinds[kind]
        if what == "copy_in" or what == "copy_out":
            place: Where = "h2d" if what == "copy_in" else "d2h"
            return self.cost.seconds("copy", Shape(bytes=n_copied), place)
        if what == "flag_wait":
            return self.cost.seconds("flag", Shape(), "fixed")
        if what != "run":
            return 0.0
        name = ops[op]
        if name == "attn" and fill < 1.0:
            flops, n_bytes, bus_bytes = (int(n * fill) for n in (flops, n_bytes, bus_bytes))
        shape = Shape(formats[fmt] if fmt >= 0 else None, n_tok, flops, n_bytes)
        if streams[stream] == "cpu":
            return self.cost.seconds(name, shape, "cpu")
        node = self.cost.seconds("graph_node", Shape(), "fixed") if graph else 0.0
        if not bus_bytes:
            return self.cost.seconds(name, shape, "vram") + node
        if odds < 1.0 and not self.is_virtual:  # a mean over tokens, most of which need none of it
            some = self._reading(name, shape, min(n_bytes, int(bus_bytes / odds)))
            none = self.cost.seconds(name, shape, "vram")
            return float(odds * some + (1.0 - odds) * none + node)
        return self._reading(name, shape, bus_bytes) + node

    def _reading(self, name: str, shape: Shape, bus_bytes: int) -> float:
        """Of an op of the GPU that reads so many of its bytes from host memory itself, while it reads the others."""
        near = self.cost.seconds(name, shape._replace(bytes=shape.bytes - bus_bytes), "vram")
        how = "gather" if self.is_virtual or name == "gather_experts" else name
        return max(near, self.cost.seconds(how, Shape(bytes=bus_bytes), "h2d"))

    def _contended(
        self, priced: _Priced, span: Mapping[str, Any]
    ) -> npt.NDArray[np.float64] | None:
        """Seconds of each tick beside what else ran in that first walk: bus and CPU share the host's memory, copies and
        the GPU's own reads of it share the bus, and a hand-off takes longer over a busy one. None: nothing changes.
        """
        ticks, seconds = priced.ticks, priced.seconds
        kinds, streams = _names()[:2]
        runs, on_cpu = ticks["kind"] == kinds.index("run"), ticks["stream"] == streams.index("cpu")
        copying = ticks["kind"] == kinds.index("copy_in")
        reading = runs & ~on_cpu & (ticks["bus_bytes"] > 0)
        if self.is_virtual or not (copying.any() or reading.any()):
            return None  # streams of the virtual clock know nothing of each other
        end = span["end_ns"] * 1e-9
        cpu, copies = (_Busy(end[on], seconds[on]) for on in (runs & on_cpu, copying))
        reads = _Busy(end[reading], seconds[reading])
        # Of the bus, which copies fill, what these reads would take if they had it for themselves.
        part = np.minimum(1.0, ticks["bus_bytes"][reading] / self._bus_rate / reads.seconds)
        beside_copies, beside_cpu = copies.during(reads), cpu.during(reads)
        slower: npt.NDArray[np.float64] = seconds.copy()
        computed = runs & on_cpu
        for load, on_bus in (("h2d", copies.during(cpu).sum()), ("gather", part @ beside_cpu)):
            held_up = self._held_up(ticks[computed], seconds[computed], load)
            slower[computed] += seconds[computed] * cpu.share(on_bus) * held_up
        # Both halves of the bus, where both want it; one that wants less than half is not kept waiting.
        lost = beside_copies @ np.minimum(1.0, part / np.maximum(1.0 - part, 1e-9))
        both = copies.share(cpu.during(copies).sum()) * self._beside_cpu("copy")
        slower[copying] *= 1.0 + both + copies.share(lost)
        slower[reading] += beside_copies * np.maximum(0.0, 2.0 * part - 1.0)
        slower[reading] += beside_cpu * self._beside_cpu("gather")
        used = min(1.0, (copies.total + part @ reads.seconds) * 1e9 / max(1, span["total_ns"]))
        waits = ticks["kind"] == kinds.index("flag_wait")
        slower[waits] *= 1.0 + used * self._more("flag", "fixed", "h2d")
        return slower if bool((slower != seconds).any()) else None

    def _held_up(
        self, ticks: npt.NDArray[np.void], seconds: npt.NDArray[np.float64], load: str
    ) -> npt.NDArray[np.float64]:
        """How much longer ops of the CPU take beside a busy bus, as shares of what they take alone. The bus leaves so
        much of the memory's rate; an op that reads at less than that, because it is small or computes, is not slowed.
        """
        work, ops = Shape(None, 1, 2 * _LARGE, _LARGE), _names()[2]
        left = np.ones(len(ticks))
        for op in np.unique(ticks["op"]):
            name = ops[op] if ops[op] in _READERS else "matmul"
            beside = self.cost.seconds(name, work, "cpu", load)
            left[ticks["op"] == op] = _LARGE / max(1e-12, beside)
        held_up: npt.NDArray[np.float64] = ticks["bytes"] / (left * np.maximum(seconds, 1e-12)) - 1
        return np.maximum(held_up, 0.0)

    def _beside_cpu(self, op: str) -> float:
        """How much longer copies or gathers take beside a CPU that reads memory."""
        return max(0.0 if self._same_memory else _BUS_BESIDE_CPU, self._more(op, "h2d", "cpu"))

    @cached_property
    def _same_memory(self) -> bool:
        """Was it the memory that the CPU read meanwhile that the bus carried? Since there are samples of the CPU beside
        gathers, it is."""
        return any(s.side == "cpu" and s.load == "gather" for s in self.profile.samples)

    def _more(self, op: str, place: Where, load: str) -> float:
        """How much longer something takes beside a load, as a share of what it takes alone."""
        alone, beside = (self.cost.seconds(op, _PROBE, place, how) for how in ("idle", load))
        return beside / alone - 1.0 if beside > alone > 0 else 0.0

    @cached_property
    def _bus_rate(self) -> float:
        return self.rates("h2d")[0]

    def _finish(
        self, ticks: npt.NDArray[np.void], span: Mapping[str, Any], graph: bool
    ) -> PassTime:
        """Adds what the host takes to issue a pass: behind which everything waits where that is longer."""
        held = {name: ns * 1e-9 for name, ns in span["critical_ns"].items() if name != "sync"}
        held["hand_off"] = span["critical_ns"]["sync"] * 1e-9 + self.cost.seconds(
            "pass", Shape(), "fixed"
        )
        kinds, streams = _names()[:2]
        on_cpu = ticks["stream"] == streams.index("cpu")
        if not graph:
            n_runs = int(((ticks["kind"] == kinds.index("run")) & ~on_cpu).sum())
            n_copies = int((ticks["kind"] <= kinds.index("copy_out")).sum())
            issue = n_runs * self.cost.seconds("launch", Shape(), "fixed")
            issue += n_copies * self.cost.seconds("copy", Shape(), "fixed")
            held["hand_off"] += max(0.0, issue - span["total_ns"] * 1e-9)
        busy = {name: ns * 1e-9 for name, ns in span["busy_ns"].items()}
        return PassTime(sum(held.values()), held, busy, int(ticks["flops"].sum()))

    # ---- a prompt and an answer ----

    def run(
        self,
        core: _core.Plan,
        *,
        n_ctx: int,
        n_prompt: int,
        n_gen: int,
        n_seq: int = 1,
        first: int = 0,
    ) -> tuple[PassTime, PassTime]:
        """The prompt's passes in one, and a decode pass at the depth of the middle of the answer. first: tokens of the
        prompt that are cached. Where tiers have residents of their own, the prompt's include bringing in what the last
        answer's did not have, and decode a share of the way back, which is part of the first token behind a prompt."""
        n_rest = max(1, min(n_prompt, n_ctx) - first)
        steps = self._steps(core, n_rest)
        held = 0
        for n_tok in (*steps, n_seq):  # what a run like this leaves to the next
            held = core.held_after(held, n_tok)
        parts = []
        for i, n_tok in enumerate(steps):
            parts.append(self.run_pass(core, n_tok, first=first + i * steps[0], held=held))
            held = core.held_after(held, n_tok)
        depth = min(n_ctx, n_prompt + max(1, n_gen // 2))

        def decode(held: int) -> PassTime:
            at = max(0, depth - n_seq)
            return self.run_pass(core, n_seq, n_out=n_seq, first=at, n_kv=depth, held=held)

        token = decode(-1)
        if core.held_after(held, n_seq) != held:
            others = n_gen - 2  # the first token is the prompt's, the second brings the residents
            token = _weighed((decode(held), token), (1, max(0, others)))
        return _added(parts), token

    @staticmethod
    def _steps(core: _core.Plan, n_rest: int) -> list[int]:
        """As the engine cuts a prompt: passes of one size."""
        pass_tok = core.sizes[1]
        step = -(-n_rest // -(-n_rest // pass_tok))
        return [min(step, n_rest - done) for done in range(0, n_rest, step)]

    # ---- rates ----

    @cached_property
    def disk_rate(self) -> float:
        """Bytes a second of the model's file, past the page cache."""
        reads = [s for s in self.profile.samples if s.side == "disk" and s.seconds > 0]
        return max((s.bytes / s.seconds for s in reads), default=_DISK_BYTES_PER_S)

    def rates(self, place: Where) -> tuple[float, float]:
        """Bytes and FLOPs a second that nothing on that side beats; of a bus bytes only."""
        roof = getattr(self.cost, "roof", None)
        if roof is not None:
            found: tuple[float, float] = roof(place)
            return found
        if place in ("h2d", "d2h"):
            return _LARGE / max(1e-12, self.cost.seconds("copy", Shape(bytes=_LARGE), place)), 0.0
        move = self.cost.seconds(ANY_OP, Shape(None, 1, 0, _LARGE), place)
        math_s = self.cost.seconds(ANY_OP, Shape(None, 1024, _LARGE, 0), place)
        return _LARGE / max(1e-12, move), _LARGE / max(1e-12, math_s)

    def bounds(
        self,
        model: Model,
        budget_bytes: int,
        prompt: tuple[int, PassTime],
        decode: tuple[int, PassTime],
    ) -> tuple[float, float]:
        """(TTFT, TPS) that no placement under the budget beats: what is needed and does not fit crosses the bus or is
        read by the CPU, both at once at their measured rates; what fits is read by the GPU; FLOPs are done by both."""
        h2d, (vram, gpu), (dram, cpu) = self.rates("h2d")[0], self.rates("vram"), self.rates("cpu")
        if self.device == "host":  # everything is the CPU's
            budget_bytes, h2d, gpu = 0, 0.0, 0.0
        fixed = self.cost.seconds("pass", Shape(), "fixed")

        def bound(n_tok: int, flops: int, unasked: tuple[str, ...]) -> float:
            near, far = _touched(model, budget_bytes, n_tok, unasked)
            # The CPU's share of a prompt is limited by what it can compute.
            slow = min(dram, cpu * (near + far) / max(1, flops))
            return fixed + max(far / (h2d + slow), near / vram, flops / (gpu + cpu))

        # A prompt wants one row of the head, at which the CPU is as quick as its memory; so it is left out there.
        prompt_s = bound(prompt[0], prompt[1].flops, ("embed", "head"))
        return prompt_s, decode[0] / bound(decode[0], decode[1].flops, ("embed",))

    def predict(
        self,
        model: Model,
        core: _core.Plan,
        *,
        n_ctx: int,
        n_seq: int = 1,
        budget_bytes: int | None = None,
        n_prompt: int = 1024,
        n_gen: int = 128,
        plan: Any = None,
    ) -> Prediction:
        n_prompt = min(n_prompt, n_ctx)
        prompt, decode = self.run(core, n_ctx=n_ctx, n_prompt=n_prompt, n_gen=n_gen, n_seq=n_seq)
        ttft, tps, error = prompt.seconds, n_seq / decode.seconds, self.error
        bound_ttft, bound_tps = 0.0, math.inf
        if budget_bytes is not None:
            bound_ttft, bound_tps = self.bounds(
                model, budget_bytes, (n_prompt, prompt), (n_seq, decode)
            )
        return Prediction(
            ttft_s=ttft,
            ttft_lo=ttft / (1 + error),
            ttft_hi=ttft * (1 + error),
            tps=tps,
            tps_lo=tps / (1 + error),
            tps_hi=tps * (1 + error),
            bound_ttft_s=bound_ttft,
            bound_tps=bound_tps,
            plan=plan,
            prefill=prompt.held,
            decode=decode.held,
            n_prompt=n_prompt,
            n_gen=n_gen,
            source=self.profile.source,
            profile=self.profile.title,
        )


def _touched(
    model: Model, budget_bytes: int, n_tok: int, unasked: tuple[str, ...]
) -> tuple[float, float]:
    """Bytes of weights that a pass of n_tok needs: those that could lie in VRAM, and the others. unasked: kinds of
    units of which it needs rows at most."""
    groups: dict[float, int] = {}
    for (kind, use), n_bytes in model.bytes_by_use.items():
        if kind not in unasked:
            groups[use] = groups.get(use, 0) + n_bytes
    near = far = 0.0
    room = float(budget_bytes)
    for use, n_bytes in sorted(groups.items(), reverse=True):
        share = min(1.0, room / n_bytes) if n_bytes else 0.0
        touched = (1.0 - (1.0 - use) ** n_tok) * n_bytes
        near += share * touched
        far += (1.0 - share) * touched
        room -= share * n_bytes
    return near, far


# ---- which profile ----


def as_profile(profile: object) -> Profile | None:
    """What a caller gave: a Profile, its file, the name of one that comes with pipeshard, or None."""
    if profile is None or isinstance(profile, Profile):
        return profile
    if isinstance(profile, (str, os.PathLike)):
        return Profile.load(Path(profile))
    raise TypeError(f"profile must be a Profile or its file, not {type(profile).__name__}")


def machine_profile(device: str, emu: EmuDevice | None = None) -> Profile:
    """What is known of the machine that plans are made for when nobody says: of an emulated GPU, its clock's rates; of
    others modest ones, until they are measured."""
    if device == "emu":
        return default_profile("emu", emu.profile if emu is not None else None)
    return default_profile(device)

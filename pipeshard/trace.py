"""Traces: what an engine's passes did and when, and what held them up.

    eng = ps.Engine("model.gguf", vram="4GiB", trace=True)
    eng.generate("Once upon a time", max_tokens=32)
    trace = eng.trace("run.json")   # open it at ui.perfetto.dev
    print(trace.summary())          # decode: 31 tokens ...: held up by 61% CPU (DRAM), 22% PCIe, 9% hand-off ...

A pass is made of ticks (copies, ops, waits), each on one of four streams. What held a pass up is found by walking back
from its end: an op began when the one before it on its stream was done, or when a wait before it was, and that wait was
for something on another stream. Along this longest chain every moment belongs to one of six categories: the ones of
Prediction (a stream that worked, or a hand-off), and "host", where nothing of the chain ran: launching, and whatever
the engine's thread does between. For people, ops on the GPU that only waited for the bus are told apart from the rest.

Not here: recording (_recorder.py and the core's ps_trace), the file's format (_trace_file.py).
Threads: what is here is immutable data.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _trace_file
from .errors import FileError
from .model import check_path

__all__ = [
    "CATEGORIES",
    "Attribution",
    "Names",
    "Step",
    "Trace",
    "compare",
    "explain_difference",
]

Rows = npt.NDArray[np.void]

CATEGORIES = ("compute", "cpu", "h2d", "d2h", "hand_off", "host")
_LABELS = {
    "compute": "GPU",
    "cpu": "CPU (DRAM)",
    "h2d": "PCIe",
    "d2h": "PCIe back",
    "hand_off": "hand-off",
    "host": "launching",
}
_WAITS = ("wait", "flag_wait")
# An op that reads a tenth of its bytes from host memory waits for the bus: a GPU's own memory is faster than that by
# more than ten.
_BUS_BOUND = 10
# Ops on the GPU whose time is not the GPU's: reading what lies in host memory, and carrying hidden states across. Each
# with the category that it is told under; in `chain` they are "compute", as their stream is.
_TOLD_AS = {"gather": "h2d", "carry": "hand_off"}
_CARRIES = "move"
_OF_THE_SAME = 0.05  # by how much a time and the sum of its parts may differ


@dataclass(frozen=True, slots=True)
class Names:
    """What the numbers in ticks and passes stand for."""

    kinds: tuple[str, ...]
    streams: tuple[str, ...]
    ops: tuple[str, ...]
    units: tuple[str, ...]
    tiers: tuple[str, ...]
    memory: tuple[str, ...]

    def tier(self, i: int) -> str:
        """A plan that the engine has since gone over to may have others."""
        return self.tiers[i] if i < len(self.tiers) else str(i)


@dataclass(frozen=True, slots=True)
class Attribution:
    """Where the time of some steps went. `chain`: seconds of the longest chain by category, as Prediction has them;
    `held_up_by`: the same, with ops on the GPU that waited for the bus under "h2d", and those that carry hidden states
    between GPU and CPU under "hand_off". Both sum to `seconds`. `busy`: seconds in which each stream copied or
    computed; `covered_s`: in which the GPU or a copy engine did."""

    kind: Literal["prefill", "decode"]
    n_tok: int
    n_passes: int
    seconds: float
    chain: Mapping[str, float]
    held_up_by: Mapping[str, float]
    busy: Mapping[str, float]
    covered_s: float
    h2d_bytes: int = 0
    d2h_bytes: int = 0

    @property
    def shares(self) -> dict[str, float]:
        """Of the time, by what held it up; they sum to 1."""
        return {name: _share(s, self.seconds) for name, s in self.held_up_by.items()}

    @property
    def busy_shares(self) -> dict[str, float]:
        """Of the time, by stream."""
        return {name: _share(s, self.seconds) for name, s in self.busy.items()}

    @property
    def idle(self) -> dict[str, float]:
        """Bubbles: seconds in which each stream neither copied nor computed."""
        return {name: max(0.0, self.seconds - s) for name, s in self.busy.items()}

    @property
    def bottleneck(self) -> tuple[str, float]:
        """The copy engine or the GPU, whichever was busier, and the share of the time in which it was. (On a device
        without a GPU: the CPU.)"""
        shares = self.busy_shares
        name = max(("compute", "h2d", "d2h"), key=lambda stream: shares.get(stream, 0.0))
        if not shares.get(name):
            name = "cpu"
        return name, shares.get(name, 0.0)

    @property
    def covered(self) -> float:
        """Share of the time in which the GPU or a copy engine was busy."""
        return _share(self.covered_s, self.seconds)

    def per_token(self) -> dict[str, float]:
        """Seconds a token, by what held it up."""
        return {name: s / max(1, self.n_tok) for name, s in self.held_up_by.items()}

    def __str__(self) -> str:
        shares = sorted(self.shares.items(), key=lambda item: -item[1])
        parts = [f"{share:.0%} {_LABELS[name]}" for name, share in shares if share >= 0.005]
        what = "tokens read" if self.kind == "prefill" else "tokens decoded"
        busy = sorted(self.busy_shares.items(), key=lambda item: -item[1])
        streams = [f"{name} {share:.1%}" for name, share in busy if share >= 0.0005]
        return (
            f"{self.kind}: {self.n_tok} {what} in {_time(self.seconds)}: held up by "
            f"{', '.join(parts)}; busy: {', '.join(streams)}"
        )


@dataclass(frozen=True)
class Step:
    """A prompt, or one decoded token a sequence: consecutive passes of a trace. Prompts longer than a pass take
    several; a prompt of a single token is a decode step."""

    trace: Trace = field(repr=False)
    kind: Literal["prefill", "decode"]
    first: int  # of the trace's passes
    n_passes: int

    @property
    def passes(self) -> Rows:
        return self.trace.passes[self.first : self.first + self.n_passes]

    @property
    def n_tok(self) -> int:
        return int(self.passes["n_tok"].sum())

    @property
    def seconds(self) -> float:
        """From its first pass's begin to its last one's end, on the device's clock."""
        return int(self.passes["end_ns"][-1] - self.passes["begin_ns"][0]) * 1e-9

    @property
    def marked(self) -> bool:
        """Whether its ticks are known: one in 16 tokens is not marked, to tell what the marks cost."""
        return bool(self.passes["marked"].all())

    @cached_property
    def attribution(self) -> Attribution:
        return _sum_up(self.kind, [self])


@dataclass(frozen=True, eq=False)
class Trace:
    """The latest passes of an engine that fit its ring. `passes` and `ticks` are structured arrays; ticks
    first_tick to first_tick + n_ticks are a pass's. Times are nanoseconds on the device's clock."""

    passes: Rows = field(repr=False)
    ticks: Rows = field(repr=False)
    names: Names = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)  # model, device, clock and such, for the file
    _sums: dict[int, _Sums] = field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        return f"<Trace of {len(self.passes)} passes, {len(self.ticks)} ticks>"

    # ---- steps ----

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Prompts and decoded tokens, oldest first."""
        return tuple(self._find_steps())

    def _find_steps(self) -> Iterator[Step]:
        first, last = 0, None
        for i, row in enumerate(self.passes):
            goes_on = (
                last is not None
                and not _is_decode(row)
                and not _is_decode(last)
                and row["number"] == last["number"] + 1
                and row["seq"] == last["seq"]
                and row["pos"] == last["pos"] + last["n_tok"]
            )
            if last is not None and not goes_on:
                yield Step(self, _kind(last), first, i - first)
                first = i
            last = row
        if last is not None:
            yield Step(self, _kind(last), first, len(self.passes) - first)

    @property
    def prefills(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.kind == "prefill")

    @property
    def tokens(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.kind == "decode")

    def since(self, number: int) -> Trace:
        """Passes from this number on."""
        passes = self.passes[self.passes["number"] >= number].copy()
        first = int(passes["first_tick"][0]) if len(passes) else len(self.ticks)
        passes["first_tick"] -= first
        return Trace(passes, self.ticks[first:], self.names, self.about)

    def last_run(self) -> tuple[Step, ...]:
        """The last prompt and the tokens behind it."""
        steps = self.steps
        prompts = [i for i, step in enumerate(steps) if step.kind == "prefill"]
        return steps[prompts[-1] :] if prompts else steps

    def attribute(self, steps: Sequence[Step] | None = None) -> dict[str, Attribution]:
        """Of these steps (default: all), "prefill" and "decode" where there are any that were marked."""
        found: dict[str, Attribution] = {}
        for kind in ("prefill", "decode"):
            of_kind = [s for s in (self.steps if steps is None else steps) if s.kind == kind]
            marked = [step for step in of_kind if step.marked]
            if marked:
                found[kind] = _sum_up(marked[0].kind, marked)
        return found

    def ops(self, steps: Sequence[Step] | None = None) -> list[dict[str, Any]]:
        """What ran, longest first: for each stream and op how often, for how many seconds in all, the bytes and flops
        a second meanwhile, and the bytes that came over the bus. Copies are ops, too."""
        rows = [row for s in (self.steps if steps is None else steps) for row in s.passes]
        chosen = np.zeros(len(self.ticks), bool)
        for row in rows:
            chosen[int(row["first_tick"]) :][: int(row["n_ticks"])] = True
        chosen &= ~np.isin(self.ticks["kind"], [self.names.kinds.index(name) for name in _WAITS])
        ticks = self.ticks[chosen]
        keys = np.stack([ticks[name] for name in ("stream", "kind", "op")], axis=1)
        found = []
        for key in np.unique(keys, axis=0):
            some = ticks[(keys == key).all(axis=1)]
            seconds = int((some["end_ns"] - some["begin_ns"]).sum()) * 1e-9
            stream, kind, op = key.tolist()
            is_run = self.names.kinds[kind] == "run"
            found.append(
                {
                    "stream": self.names.streams[stream],
                    "op": self.names.ops[op] if is_run else "copy",
                    "n": len(some),
                    "seconds": seconds,
                    "bytes_per_s": _share(int(some["bytes"].sum()), seconds),
                    "flops_per_s": _share(int(some["flops"].sum()), seconds),
                    "bus_bytes": int(some["bytes" if not is_run else "bus_bytes"].sum()),
                }
            )
        return sorted(found, key=lambda row: -row["seconds"])

    # ---- tracing itself ----

    def cost(self) -> dict[str, Any]:
        """What tracing took: microseconds of real time a decoded token with marks and without (medians; None where no
        token went without), and of collecting the marks' times after each."""
        rows = self.passes[[_is_decode(row) for row in self.passes]] if len(self.passes) else None
        result: dict[str, Any] = dict.fromkeys(("marked_us", "unmarked_us", "collecting_us"))
        result |= {"n_marked": 0, "n_unmarked": 0}
        if rows is None or not len(rows):
            return result
        # like with like: of one width, and by graphs or not
        widths = rows["n_tok"].tolist()
        graph = statistics.mode(rows["graph"].tolist())
        rows = rows[(rows["n_tok"] == statistics.mode(widths)) & (rows["graph"] == graph)]
        for name, some in (("marked", rows[rows["marked"]]), ("unmarked", rows[~rows["marked"]])):
            result[f"n_{name}"] = len(some)
            if len(some):
                result[f"{name}_us"] = float(np.median(some["wall_ns"])) * 1e-3
        marked = rows[rows["marked"]]
        if len(marked):
            result["collecting_us"] = float(np.median(marked["read_ns"])) * 1e-3
        return result

    # ---- for people ----

    def summary(self) -> str:
        """A line for all prompts and one for all tokens: what held them up."""
        lines = [str(attribution) for attribution in self.attribute().values()]
        return "\n".join(lines) if lines else "nothing was traced"

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON for ui.perfetto.dev and chrome://tracing; compressed where the name ends with .gz."""
        name = check_path("path", path)
        try:
            _trace_file.write(name, self)
        except OSError as error:
            reason = error.strerror or error
            raise FileError(
                f"cannot write {name}: {reason}", path=name, errno=error.errno
            ) from error


# ---- the longest chain ----


def _chain(trace: Trace, row: np.void) -> dict[str, int]:
    """Nanoseconds of a pass by category, those of _TOLD_AS apart, walking back from its end."""
    begin, now = int(row["begin_ns"]), int(row["end_ns"])
    ticks = trace.ticks[int(row["first_tick"]) : int(row["first_tick"] + row["n_ticks"])]
    begins, ends = ticks["begin_ns"].tolist(), ticks["end_ns"].tolist()
    categories = _categories(trace.names, ticks)
    previous = _previous(ticks)
    at_tick = {tick: i for i, tick in enumerate(ticks["tick"].tolist())}
    causes = [at_tick.get(cause, -1) for cause in ticks["cause"].tolist()]
    spent = dict.fromkeys((*CATEGORIES, *_TOLD_AS), 0)
    at = max(range(len(ends)), key=ends.__getitem__, default=-1)
    while at >= 0:
        # `now` never rises, whatever the clocks of two sides make of the order
        now = _spend(spent, "host", now, ends[at])
        cause = causes[at]
        if categories[at] == "hand_off" and cause >= 0 and ends[cause] > begins[at]:
            now = _spend(spent, "hand_off", now, ends[cause])
            at = cause
        else:
            now = _spend(spent, categories[at], now, begins[at])
            at = previous[at]
    _spend(spent, "host", now, begin)
    return spent


def _spend(spent: dict[str, int], category: str, now: int, until: int) -> int:
    if until < now:
        spent[category] += now - until
    return min(now, until)


def _categories(names: Names, ticks: Rows) -> list[str]:
    waits = [name in _WAITS for name in names.kinds]
    on_bus = (ticks["bus_bytes"] * _BUS_BOUND >= ticks["bytes"]) & (ticks["bus_bytes"] > 0)
    on_bus &= ticks["stream"] == names.streams.index("compute")
    found = []
    for kind, stream, op, bus in zip(
        ticks["kind"].tolist(),
        ticks["stream"].tolist(),
        ticks["op"].tolist(),
        on_bus.tolist(),
        strict=True,
    ):
        if waits[kind]:
            found.append("hand_off")
        elif bus:
            found.append("carry" if names.ops[op] == _CARRIES else "gather")
        else:
            found.append(names.streams[stream])
    return found


def _previous(ticks: Rows) -> list[int]:
    """Of each tick the one before it on its stream; -1: none."""
    last: dict[int, int] = {}
    previous = []
    for i, stream in enumerate(ticks["stream"].tolist()):
        previous.append(last.get(stream, -1))
        last[stream] = i
    return previous


# ---- sums ----


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one pass, in nanoseconds and bytes."""

    chain: Mapping[str, int]
    busy: Mapping[str, int]
    covered: int
    h2d_bytes: int
    d2h_bytes: int


def _sums(trace: Trace, row: np.void) -> _Sums:
    number = int(row["number"])
    if number in trace._sums:
        return trace._sums[number]
    names = trace.names
    ticks = trace.ticks[int(row["first_tick"]) : int(row["first_tick"] + row["n_ticks"])]
    work = ticks[~np.isin(ticks["kind"], [names.kinds.index(name) for name in _WAITS])]
    took = work["end_ns"] - work["begin_ns"]
    copied = {
        kind: int(work["bytes"][work["kind"] == names.kinds.index(kind)].sum())
        for kind in ("copy_in", "copy_out")
    }
    trace._sums[number] = sums = _Sums(
        chain=_chain(trace, row),
        busy={s: int(took[work["stream"] == i].sum()) for i, s in enumerate(names.streams)},
        covered=_covered(work[work["stream"] != names.streams.index("cpu")]),
        h2d_bytes=copied["copy_in"] + int(work["bus_bytes"].sum()),
        d2h_bytes=copied["copy_out"],
    )
    return sums


def _sum_up(kind: Literal["prefill", "decode"], steps: Sequence[Step]) -> Attribution:
    trace = steps[0].trace
    rows = [row for step in steps for row in step.passes]
    sums = [_sums(trace, row) for row in rows]
    told = {name: sum(one.chain[name] for one in sums) for name in (*CATEGORIES, *_TOLD_AS)}
    total = sum(int(step.passes["end_ns"][-1] - step.passes["begin_ns"][0]) for step in steps)
    # between the passes of a prompt
    told["host"] += total - sum(int(row["end_ns"] - row["begin_ns"]) for row in rows)
    chain = {name: told[name] for name in CATEGORIES}
    held_up_by = dict(chain)
    for name, category in _TOLD_AS.items():
        chain["compute"] += told[name]
        held_up_by[category] += told[name]
    return Attribution(
        kind=kind,
        n_tok=sum(step.n_tok for step in steps),
        n_passes=len(rows),
        seconds=total * 1e-9,
        chain={name: ns * 1e-9 for name, ns in chain.items()},
        held_up_by={name: ns * 1e-9 for name, ns in held_up_by.items()},
        busy={s: sum(one.busy[s] for one in sums) * 1e-9 for s in trace.names.streams},
        covered_s=sum(one.covered for one in sums) * 1e-9,
        h2d_bytes=sum(one.h2d_bytes for one in sums),
        d2h_bytes=sum(one.d2h_bytes for one in sums),
    )


def _covered(work: Rows) -> int:
    """Nanoseconds in which at least one of these ran."""
    total = reached = 0
    order = np.argsort(work["begin_ns"], kind="stable")
    for begin, end in zip(
        work["begin_ns"][order].tolist(), work["end_ns"][order].tolist(), strict=True
    ):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def _is_decode(row: np.void) -> bool:
    return bool(row["n_tok"] == 1 or not row["one_sequence"])


def _kind(row: np.void) -> Literal["prefill", "decode"]:
    return "decode" if _is_decode(row) else "prefill"


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.3f} s"


# ---- predicted and measured ----


def explain_difference(
    what: str,
    measured_s: float,
    predicted_s: float,
    predicted: Mapping[str, float] | None = None,
    attribution: Attribution | None = None,
) -> str:
    """A line that says by how much a time differs from its prediction, and in which categories: "TTFT 120.0 ms,
    predicted 100.0 ms (+20 %): PCIe +15.0 ms, GPU +5.00 ms". `attribution` is of the same time; for TPS give seconds a
    pass of decoding. Without the two breakdowns only the first half can be said."""
    line = (
        f"{what} {_time(measured_s)}, predicted {_time(predicted_s)} "
        f"({_share(measured_s - predicted_s, predicted_s):+.0%})"
    )
    if not predicted or attribution is None:
        return line
    n = attribution.n_passes if attribution.kind == "decode" else 1
    parts = {name: s / n - predicted.get(name, 0.0) for name, s in attribution.chain.items()}
    # Predictions count launching as handing off. With it goes what neither side names: between the passes, and what a
    # prediction could not place.
    parts["hand_off"] += parts.pop("host") + measured_s - attribution.seconds / n
    parts["hand_off"] -= predicted_s - sum(predicted.values())
    ranked = sorted(parts.items(), key=lambda item: -abs(item[1]))
    labels = _LABELS | {"hand_off": "hand-off and launching"}
    told = [
        f"{labels[name]} {'+' if s > 0 else '-'}{_time(abs(s))}"
        for name, s in ranked
        if abs(s) >= 0.01 * predicted_s
    ]
    return f"{line}: {', '.join(told)}" if told else line


def compare(
    stats: Mapping[str, Any], prediction: Any, attributions: Mapping[str, Attribution]
) -> list[str]:
    """A line for TTFT and one for a token's time, as far as both a measured and a predicted time are there. `stats` are
    an engine's; `prediction`: a Prediction, what a plan keeps of one, or None; `attributions` of the same run."""
    lines = []
    for what, kind, measured, predicted in (
        ("TTFT", "prefill", stats["ttft_s"], stats["predicted_ttft_s"]),
        ("a token", "decode", _inverse(stats["tps"]), _inverse(stats["predicted_tps"])),
    ):
        if measured and predicted:
            parts = _part(prediction, kind)
            if abs(sum(parts.values()) - predicted) > _OF_THE_SAME * predicted:
                parts = {}  # a plan's prediction is of a prompt of another length
            lines.append(
                explain_difference(what, measured, predicted, parts, attributions.get(kind))
            )
    return lines


def _inverse(rate: float | None) -> float | None:
    return 1 / rate if rate else None


def _part(prediction: Any, name: str) -> Mapping[str, float]:
    found = prediction.get(name) if isinstance(prediction, Mapping) else None
    found = found or getattr(prediction, name, None)
    return found if isinstance(found, Mapping) else {}

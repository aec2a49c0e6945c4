"""A trace as the JSON that ui.perfetto.dev and chrome://tracing read: a track a stream and one of passes, counters of
memory and of the bus, arrows from what was waited for to what waited.

The format: an object with a list "traceEvents" and anything beside it. M events name tracks, X are slices, C counters,
s and f the two ends of an arrow, which bind to the slice that encloses them. Times are microseconds, here from the
first pass's begin.

Not here: what a trace means (trace.py). Threads: none.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .trace import Trace

__all__ = ["write"]

_PID = 1
_PASSES = 0  # track of passes; streams follow
_WAITS = ("wait", "flag_wait")
_COLUMNS = (
    *("tick", "kind", "stream", "op", "unit", "cause", "begin_ns", "end_ns"),
    *("bytes", "bus_bytes", "flops"),
)


def write(path: str, trace: Trace) -> None:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        _write(file, trace)


def _write(file: IO[str], trace: Trace) -> None:
    """One event a line, written as they are made: a trace may have a million."""
    other = {**trace.about, "tracing_cost": trace.cost(), "summary": trace.summary().split("\n")}
    if len(trace.passes):
        other["clock_error_us"] = int(trace.passes["clock_error_ns"].max()) * 1e-3
        other["passes"] = [int(trace.passes["number"][0]), int(trace.passes["number"][-1])]
        other["graphs"] = (
            "decoded by graphs, with marks inside"
            if trace.passes["graph"].any()
            else "without graphs"
        )
    file.write(f'{{"displayTimeUnit": "ns",\n"otherData": {json.dumps(other)},\n"traceEvents": [')
    separator = "\n"
    for event in _events(trace):
        file.write(separator + json.dumps(event, separators=(",", ":")))
        separator = ",\n"
    file.write("\n]}\n")


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    yield from _track_names(trace)
    if not len(trace.passes):
        return
    writer = _Writer(trace)
    yield from writer.pass_slices()
    yield from writer.bus_counter()
    for row in trace.passes:
        yield from writer.ticks(row)


def _track_names(trace: Trace) -> Iterator[dict[str, Any]]:
    labels = {
        "compute": "GPU: ops",
        "h2d": "bus: host to device",
        "d2h": "bus: device to host",
        "cpu": "CPU: ops",
    }
    process = f"pipeshard: {trace.about['model']} on {trace.about['device']['name']}"
    names = ["passes", *(labels[name] for name in trace.names.streams)]
    yield {"ph": "M", "name": "process_name", "pid": _PID, "args": {"name": process}}
    for tid, name in enumerate(names):
        yield _meta("thread_name", tid, {"name": name})
        yield _meta("thread_sort_index", tid, {"sort_index": tid})


def _meta(name: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": _PID, "tid": tid, "args": args}


class _Writer:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._zero = int(trace.passes["begin_ns"][0])
        self._n_arrows = 0
        # Slices of a track may not overlap; two clocks may make it look as if they did.
        self._reached = dict.fromkeys(range(len(trace.names.streams) + 1), 0)

    def _us(self, ns: int) -> float:
        return max(0, ns - self._zero) / 1000

    def _slice(self, tid: int, begin: int, end: int) -> dict[str, Any]:
        begin = max(begin, self._reached[tid])
        self._reached[tid] = end = max(begin, end)
        ts = self._us(begin)
        return {"ph": "X", "pid": _PID, "tid": tid, "ts": ts, "dur": round(self._us(end) - ts, 3)}

    # ---- passes and their memory ----

    def pass_slices(self) -> Iterator[dict[str, Any]]:
        trace, held = self._trace, None
        for step in trace.steps:
            held_up = step.attribution.shares if step.marked else None
            for row in step.passes:
                n, pos = int(row["n_tok"]), int(row["pos"])
                event = self._slice(_PASSES, int(row["begin_ns"]), int(row["end_ns"]))
                event["name"] = f"prefill {n} tokens" if step.kind == "prefill" else f"token {pos}"
                event["cat"] = step.kind
                event["args"] = {
                    "pass": int(row["number"]),
                    "tier": trace.names.tier(int(row["tier"])),
                    "first_token": pos,
                    "n_tok": n,
                    "graph": bool(row["graph"]),
                    "marked": bool(row["marked"]),
                    "wall_us": int(row["wall_ns"]) / 1000,
                }
                if held_up is not None:
                    event["args"]["held_up_by"] = {k: round(v, 4) for k, v in held_up.items() if v}
                yield event
                memory = dict(zip(trace.names.memory, row["vram_bytes"].tolist(), strict=True))
                if memory != held:
                    yield self._counter("VRAM bytes", event["ts"], memory)
                    held = memory
        if held is not None:
            yield self._counter("VRAM bytes", self._us(int(trace.passes["end_ns"][-1])), held)

    def _counter(self, name: str, ts: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "C", "name": name, "pid": _PID, "tid": _PASSES, "ts": ts, "args": values}

    # ---- the bus ----

    def bus_counter(self) -> Iterator[dict[str, Any]]:
        """GB/s each way: a copy's rate from its begin to its end; an op's, where it reads host memory itself."""
        trace = self._trace
        ticks, kinds = trace.ticks, trace.names.kinds
        inbound = ticks["kind"] == kinds.index("copy_in")
        outbound = ticks["kind"] == kinds.index("copy_out")
        moved = np.where(inbound | outbound, ticks["bytes"], ticks["bus_bytes"])
        took = (ticks["end_ns"] - ticks["begin_ns"]).astype(np.int64)
        chosen = np.flatnonzero((moved > 0) & (took > 0))
        changes: list[tuple[int, int, float]] = []
        for i in chosen.tolist():
            rate = float(moved[i]) / float(took[i])
            way = int(outbound[i])
            changes.append((int(ticks["begin_ns"][i]), way, rate))
            changes.append((int(ticks["end_ns"][i]), way, -rate))
        changes.sort(key=lambda change: change[0])
        now, active = [0.0, 0.0], [0, 0]
        for j, (ns, way, rate) in enumerate(changes):
            active[way] += 1 if rate > 0 else -1
            now[way] = now[way] + rate if active[way] else 0.0
            if j + 1 == len(changes) or changes[j + 1][0] != ns:
                values = {"h2d": round(now[0], 3), "d2h": round(now[1], 3)}
                yield self._counter("bus GB/s", self._us(ns), values)

    # ---- streams ----

    def ticks(self, row: np.void) -> Iterator[dict[str, Any]]:
        names = self._trace.names
        first, n = int(row["first_tick"]), int(row["n_ticks"])
        ticks = self._trace.ticks[first : first + n]
        slices: dict[int, dict[str, Any]] = {}  # of this pass, by tick
        waited_for: dict[int, list[int]] = {}  # by stream: ticks that its last waits were for
        for tick in zip(*(ticks[name].tolist() for name in _COLUMNS), strict=True):
            number, kind, stream, op, unit, cause, begin, end = tick[:8]
            event = self._slice(stream + 1, begin, end)
            if names.kinds[kind] in _WAITS:
                waited_for.setdefault(stream, []).append(cause)
                if event["dur"] > 0:
                    yield event | {"name": "wait", "cat": names.kinds[kind]}
                continue
            what = names.ops[op] if names.kinds[kind] == "run" else "copy"
            event["name"] = f"{what} {names.units[unit]}" if unit >= 0 else what
            event["cat"] = what
            event["args"] = _args(number, end - begin, *tick[8:])
            slices[number] = event
            yield event
            for source in waited_for.pop(stream, ()):
                if source in slices:
                    yield from self._arrow(slices[source], event)

    def _arrow(self, source: dict[str, Any], target: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not source["dur"] or not target["dur"] or source["ts"] > target["ts"]:
            return
        self._n_arrows += 1
        both = {"name": source["cat"], "cat": "flow", "id": self._n_arrows, "pid": _PID}
        yield both | {"ph": "s", "tid": source["tid"], "ts": source["ts"]}
        yield both | {"ph": "f", "bp": "e", "tid": target["tid"], "ts": target["ts"]}


def _args(number: int, took_ns: int, n_bytes: int, bus_bytes: int, flops: int) -> dict[str, Any]:
    args: dict[str, Any] = {"tick": number, "bytes": n_bytes}
    if bus_bytes:
        args["bus_bytes"] = bus_bytes
    if flops:
        args["flops"] = flops
    if n_bytes and took_ns > 0:
        args["GB/s"] = round(n_bytes / took_ns, 3)
    return args

"""Traces: what is recorded when, what the file holds, and where the time is said to have gone. On the emulated GPU
every time is known, so the answers are exact."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import Placement, _core
from pipeshard.synth import synth
from pipeshard.trace import CATEGORIES, Attribution, Trace, compare, explain_difference

N_CTX = 128
PROMPT = list(range(3, 51))
_SLOT_BYTES = 128 << 10
SLOW_BUS = {"h2d_bytes_per_s": 2e8, "d2h_bytes_per_s": 2e8, "copy_ns": 100, "launch_ns": 100}


def open_engine(path: str, where: str | None = "stream", **options: Any) -> ps.Engine:
    """Every unit in one place; None: as the planner likes."""
    options = {
        "device": ps.EmuDevice(profile=SLOW_BUS),
        "n_ctx": N_CTX,
        "threads": 1,
        "trace": True,
    } | options
    if where is None:
        return ps.Engine(path, **options)
    return ps.Engine(path, plan=make_plan(path, where), **options)


def make_plan(path: str, where: str) -> ps.Plan:
    with ps.Engine(path, device="emu", n_ctx=N_CTX, threads=1) as engine:
        plan, units = engine.plan, engine.model.units
    # "mixed": each third unit elsewhere, so that all four streams have work
    mixed = ("vram", "stream", "cpu")
    places: dict[str, Any] = {
        unit.name: mixed[i % 3] if where == "mixed" else where for i, unit in enumerate(units)
    }
    placement = replace(Placement.everywhere(places), n_slots=3, slot_bytes=_SLOT_BYTES)
    return replace(plan, placement=placement, budget_bytes=1 << 30)


# ---- what is recorded ----


def test_off_unless_asked_for(llama: str, tmp_path: Path) -> None:
    with open_engine(llama, None, trace=False) as engine:
        with pytest.raises(ps.RequestError, match="nothing has run") as error:
            engine.trace(tmp_path / "t.json")
        assert error.value.argument == "trace"
        assert not list(tmp_path.iterdir())
        engine.generate(PROMPT, max_tokens=2)
        with pytest.raises(ps.RequestError, match="trace=True"):
            engine.last_attribution()
        assert len(engine._core.trace_read(False)[0]) == 0
    with pytest.raises(TypeError, match="trace"):
        open_engine(llama, None, trace="run.json")
    with pytest.raises(ps.ClosedError):
        engine.trace()


def test_the_last_call_runs_again_where_nothing_was_recorded(llama: str, tmp_path: Path) -> None:
    with open_engine(llama, None, trace=False) as engine:
        text = engine.generate(PROMPT, max_tokens=6, temperature=0)
        trace = engine.trace(tmp_path / "t.json")
        assert [step.kind for step in trace.steps] == ["prefill"] + ["decode"] * 5
        assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        assert engine.generate(PROMPT, max_tokens=6, temperature=0) == text
        assert len(engine._core.trace_read(False)[0]) == 0
        pieces = engine.stream(PROMPT, max_tokens=6, temperature=0)
        first = next(pieces)
        with pytest.raises(ps.RequestError, match="a stream is under way"):
            engine.trace()
        assert first + "".join(pieces) == text
        engine.logits(list(range(20)))
        assert [step.n_tok for step in engine.trace().steps] == [20]


def test_taken_once(llama: str, heap: None) -> None:
    with open_engine(llama) as engine:
        engine.generate(PROMPT, max_tokens=5, temperature=0)
        trace = engine.trace()
        assert [step.kind for step in trace.steps] == ["prefill"] + ["decode"] * 4
        assert trace.passes["number"].tolist() == [0, 1, 2, 3, 4]
        assert trace.prefills[0].n_tok == len(PROMPT)
        assert [int(step.passes["pos"][0]) for step in trace.tokens] == [48, 49, 50, 51]
        again = engine.trace()
        assert len(again.passes) == len(again.ticks) == len(again.steps) == 0
        assert again.summary() == "nothing was traced"
        with pytest.raises(ValueError, match="read-only"):
            trace.ticks["unit"] = 0


def test_a_part(llama: str, tmp_path: Path) -> None:
    with open_engine(llama, trace=False) as engine:
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        with engine.tracing(tmp_path / "part.json") as recording:
            assert recording.trace is None
            engine.generate(PROMPT[::-1], max_tokens=3, temperature=0)
        assert recording.trace is not None
        assert recording.trace.passes["number"].tolist() == [2, 3, 4]
        assert json.loads((tmp_path / "part.json").read_text())["otherData"]["passes"] == [2, 4]
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        assert len(engine._core.trace_read(False)[0]) == 0
    # inside a longer recording, which goes on; and in spite of an error
    with open_engine(llama) as engine:
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        with contextlib.suppress(ZeroDivisionError), engine.tracing() as part:
            engine.generate(PROMPT[::-1], max_tokens=2, temperature=0)
            raise ZeroDivisionError
        assert part.trace is not None
        assert part.trace.passes["number"].tolist() == [2, 3]
        assert part.trace.attribute().keys() == {"prefill", "decode"}
        assert engine.trace().passes["number"].tolist() == [0, 1, 2, 3]


def test_a_stream_under_way_is_not_disturbed(llama: str) -> None:
    with open_engine(llama) as engine:
        whole = engine.generate(PROMPT, max_tokens=8, temperature=0)
        engine.reset()
        engine.trace()
        pieces = engine.stream(PROMPT, max_tokens=8, temperature=0)
        text = next(pieces)
        assert len(engine.trace().passes) >= 1
        assert engine.last_attribution() == {}
        text += "".join(pieces)
        assert text == whole


def test_recording_outlives_a_budget(llama: str) -> None:
    with open_engine(llama, None, vram="4MiB") as engine:
        engine.generate(PROMPT, max_tokens=3, temperature=0)
        held = engine.plan.needed_bytes
        engine.set_budget(held - (64 << 10))
        engine.generate(PROMPT[::-1], max_tokens=3, temperature=0)
        trace = engine.trace()
    assert trace.passes["number"].tolist() == list(range(6))
    assert trace.passes["vram_bytes"][0].sum() > trace.passes["vram_bytes"][-1].sum()
    assert [step.kind for step in trace.last_run()] == ["prefill", "decode", "decode"]


def test_memory_is_bounded(llama: str) -> None:
    """A thousand passes and more leave no more than the ring holds, and those are the latest."""
    with open_engine(llama, None) as engine:
        core = engine._core
        assert core is not None
        core.append(0, np.array(PROMPT, np.int32))
        token = np.array([5], np.int32)
        for _ in range(20):
            core.truncate(0, len(PROMPT))
            core.append(0, token)
        before = _core._heap_stats()[:2]
        for _ in range(1000):
            core.truncate(0, len(PROMPT))
            core.append(0, token)
        assert _core._heap_stats()[:2] == before
        trace = engine.trace()
        assert trace.passes["number"][-1] == 1020
        assert trace.ticks.nbytes <= 32 << 20
        cost = trace.cost()
        assert cost["n_unmarked"] == pytest.approx(cost["n_marked"] / 15, abs=2)
        assert cost["marked_us"] > 0
        assert cost["unmarked_us"] > 0
        assert cost["collecting_us"] > 0


def test_files_that_cannot_be_written(llama: str, tmp_path: Path) -> None:
    with open_engine(llama) as engine:
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        with pytest.raises(ps.FileError, match="cannot write"):
            engine.trace(tmp_path / "no" / "such" / "folder.json")
        with pytest.raises(TypeError, match="path"):
            engine.trace(3)  # type: ignore[arg-type]
        assert len(engine.trace(tmp_path / "t.json").passes) == 2  # and nothing was lost


def test_results_are_the_same(moe: str) -> None:
    with open_engine(moe, "mixed") as traced, open_engine(moe, "mixed", trace=False) as plain:
        assert np.array_equal(traced.logits(PROMPT), plain.logits(PROMPT))
        for engine in (traced, plain):
            engine.generate(PROMPT, max_tokens=20, temperature=0)
        assert traced.stats["ttft_s"] == plain.stats["ttft_s"]
        assert traced.stats["tps"] == plain.stats["tps"]


def test_on_every_device(device: str, moe: str, tmp_path: Path) -> None:
    """Where the clock is real, times are what they are; they still add up."""
    where = None if device == "host" else "mixed"
    with open_engine(moe, where, device=device) as engine:
        engine.generate(PROMPT, max_tokens=24, temperature=0)
        found = engine.last_attribution()
        trace = engine.trace(tmp_path / "t.json")
        assert found["prefill"].seconds <= engine.stats["ttft_s"] * 1.001
    for one in found.values():
        assert sum(one.shares.values()) == pytest.approx(1)
        assert all(0 <= share <= 1.001 for share in one.busy_shares.values())
        assert 0 < one.bottleneck[1] <= 1.001
        assert one.n_passes > 0
    assert found["decode"].n_tok == 22  # of 23 passes one has no marks
    assert all(step.seconds > 0 for step in trace.steps)
    reached: dict[int, float] = {}
    for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= reached.get(event["tid"], 0) - 1e-3
            reached[event["tid"]] = event["ts"] + event["dur"]


def test_a_deep_model(device: str, tmp_path: Path) -> None:
    """With its marks the graph of such a pass is more than a driver takes at once, and half of the layers wait for the
    CPU: whatever is enqueued last has to find the rest under way."""
    path = str(tmp_path / "deep.gguf")
    synth("tiny-qwen3moe", path, layers=96, progress=False)
    where = None if device == "host" else "mixed"
    with open_engine(path, where, device=device) as engine:
        engine.generate(PROMPT, max_tokens=8, temperature=0)
        assert engine.last_attribution()["decode"].n_tok > 4
        assert engine.stats["n_graph_launches"] > 0 or device == "host"


# ---- the file ----


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, dict[str, Any]]:
    golden = Path(__file__).resolve().parents[1] / "data/golden/qwen3moe.q4_k_m.gguf"
    path = tmp_path_factory.mktemp("trace") / "run.json"
    with open_engine(str(golden), "mixed") as engine:
        engine.generate(PROMPT, max_tokens=20, temperature=0)
        trace = engine.trace(path)
    return trace, json.loads(path.read_text())


def test_slices(file: tuple[Trace, dict[str, Any]]) -> None:
    trace, data = file
    assert data["displayTimeUnit"] == "ns"
    events = data["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "s", "f"}
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(tracks) == 5
    assert tracks[0] == "passes"
    reached = dict.fromkeys(tracks, 0.0)
    n_slices: Counter[int] = Counter()
    for event in events:
        assert event["pid"] == 1
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        assert event["tid"] in tracks
        if event["ph"] == "X":
            # each track's slices come in order and do not overlap
            assert event["dur"] >= 0
            assert event["ts"] >= reached[event["tid"]] - 1e-3
            reached[event["tid"]] = event["ts"] + event["dur"]
            n_slices[event["tid"]] += 1
    assert n_slices[0] == len(trace.passes) == 20
    assert all(n_slices[tid] >= 20 for tid in tracks)
    passes = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert passes[0]["name"] == "prefill 48 tokens"
    assert [e["name"] for e in passes[1:3]] == ["token 48", "token 49"]
    assert sum(passes[0]["args"]["held_up_by"].values()) == pytest.approx(1, abs=1e-3)
    copies = [e for e in events if e["ph"] == "X" and e["cat"] == "copy" and e["tid"] == 2]
    assert copies
    assert all(copy["args"]["bytes"] > 0 for copy in copies)
    assert any(copy["name"].startswith("copy blk.") for copy in copies)


def test_arrows_pair_up(file: tuple[Trace, dict[str, Any]]) -> None:
    events = file[1]["traceEvents"]
    slices: dict[int, list[tuple[float, float, str]]] = {}
    for e in events:
        if e["ph"] == "X":
            slices.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"], e["cat"]))
    begins = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert len(begins) == sum(e["ph"] == "s" for e in events)
    from_copies = 0
    for i, begin in begins.items():
        end = ends[i]
        assert begin["tid"] != end["tid"]
        assert begin["ts"] <= end["ts"]
        assert end["bp"] == "e"
        source = [s for s in slices[begin["tid"]] if s[0] == begin["ts"]]
        target = [s for s in slices[end["tid"]] if s[0] == end["ts"]]
        assert source
        assert target
        assert source[0][1] <= target[0][0] + 1e-3  # what was waited for was done
        from_copies += source[0][2] == "copy" and begin["tid"] == 2
    assert from_copies > 20  # each piece that travels is waited for


def test_counters(file: tuple[Trace, dict[str, Any]]) -> None:
    trace, data = file
    counters = [e for e in data["traceEvents"] if e["ph"] == "C"]
    memory = [e for e in counters if e["name"] == "VRAM bytes"]
    assert memory[0]["args"].keys() == set(trace.names.memory)
    assert memory[0]["args"]["ring"] == 3 * _SLOT_BYTES
    bus = [e for e in counters if e["name"] == "bus GB/s"]
    assert [e["ts"] for e in bus] == sorted(e["ts"] for e in bus)
    assert all(e["args"].keys() == {"h2d", "d2h"} for e in bus)
    # bytes are the area below the curve, and the bus is never faster than it is
    area = sum((b["ts"] - a["ts"]) * a["args"]["h2d"] for a, b in itertools.pairwise(bus))
    moved = sum(a.h2d_bytes for a in trace.attribute().values())
    assert area * 1e3 == pytest.approx(moved, rel=0.01)
    assert bus[-1]["args"] == {"h2d": 0, "d2h": 0}


def test_metadata(file: tuple[Trace, dict[str, Any]]) -> None:
    other = file[1]["otherData"]
    assert other["model"] == "golden qwen3moe"
    assert other["device"]["virtual_clock"] is True
    assert other["clock_error_us"] == 0
    assert other["graphs"].startswith(("decoded by graphs", "without graphs"))
    cost = other["tracing_cost"]
    assert cost["n_marked"] + cost["n_unmarked"] <= 19
    assert cost["n_unmarked"] == 1
    assert cost["marked_us"] > 0
    assert len(other["summary"]) == 2


def test_compressed(file: tuple[Trace, dict[str, Any]], tmp_path: Path) -> None:
    trace, data = file
    trace.save(tmp_path / "run.json.gz")
    with gzip.open(tmp_path / "run.json.gz", "rt") as packed:
        assert json.load(packed) == data


# ---- where the time went ----


def test_a_streamed_prompt_keeps_the_copy_engine_busy(llama: str) -> None:
    with open_engine(llama) as engine:
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        found = engine.last_attribution()["prefill"]
        assert found.seconds == pytest.approx(engine.stats["ttft_s"])
    assert found.bottleneck[0] == "h2d"
    assert found.bottleneck[1] >= 0.95
    assert found.busy_shares["h2d"] == found.bottleneck[1] <= found.covered <= 1
    assert found.shares["h2d"] >= 0.95
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.idle["h2d"] == pytest.approx(found.seconds - found.busy["h2d"])
    assert found.idle["cpu"] >= 0.99 * found.seconds  # it looks up the tokens' embeddings
    assert "PCIe" in str(found)
    assert "48 tokens read" in str(found)


def test_a_resident_prompt_keeps_the_gpu_busy(llama: str) -> None:
    with open_engine(llama, "vram", device="emu") as engine:
        engine.generate(PROMPT, max_tokens=2, temperature=0)
        found = engine.last_attribution()
        for kind, n in (("prefill", len(PROMPT)), ("decode", 1)):
            assert found[kind].n_tok == n
            assert found[kind].bottleneck[0] == "compute"
            assert found[kind].h2d_bytes < 64 << 10  # tokens and tables
        assert sum(found["decode"].per_token().values()) == pytest.approx(found["decode"].seconds)
        assert 1 / found["decode"].seconds == pytest.approx(engine.stats["tps"], rel=1e-6)


@pytest.mark.parametrize("where", ["stream", "mixed", "cpu"])
@pytest.mark.parametrize("model", ["llama", "moe"])
def test_the_chain_is_the_simulators(
    model: str, where: str, request: pytest.FixtureRequest
) -> None:
    """Two who know nothing of each other, one forwards from durations, one backwards from times."""
    path = request.getfixturevalue(model)
    with open_engine(path, where) as engine:
        core = engine._core
        assert core is not None
        core.append(0, np.array(PROMPT, np.int32))
        core.append(0, np.array([9], np.int32))
        trace = engine.trace()
        bound = engine.plan.bind(engine.model)
        kinds = trace.names.kinds
        for step in trace.steps:
            row = step.passes[0]
            shape = int(row["n_tok"]), int(row["n_out"]), int(row["pos"] + row["n_tok"])
            ticks = trace.ticks[row["first_tick"] :][: row["n_ticks"]]
            planned = bound.ticks(*shape)
            timed = [
                i for i, k in enumerate(planned["kind"]) if kinds[k] not in ("record", "flag_set")
            ]
            assert timed == ticks["tick"].tolist()
            ns = np.zeros(len(planned), np.uint64)
            ns[timed] = ticks["end_ns"] - ticks["begin_ns"]
            ns[[i for i, k in enumerate(planned["kind"]) if kinds[k] == "wait"]] = 0
            ns[[i for i, k in enumerate(planned["kind"]) if kinds[k] == "flag_wait"]] = (
                _core.emu_profile()[8]
            )
            span = bound.walk(*shape, 0, lambda _, span, ns=ns: None if span else ns)
            assert span["total_ns"] == round(step.seconds * 1e9)
            assert span["busy_ns"] == {
                name: round(s * 1e9) for name, s in step.attribution.busy.items()
            }
            chain = {name: round(s * 1e9) for name, s in step.attribution.chain.items()}
            assert chain["hand_off"] == span["critical_ns"]["sync"]
            assert chain["host"] == 0
            for stream in trace.names.streams:
                assert chain[stream] == span["critical_ns"][stream]
            told = step.attribution.held_up_by
            assert sum(told.values()) == pytest.approx(step.seconds)
            assert told["compute"] <= step.attribution.chain["compute"]
            assert told["h2d"] >= step.attribution.chain["h2d"]
            if where == "mixed" and model == "moe" and step.kind == "decode":
                assert told["h2d"] > step.attribution.chain["h2d"]  # experts read where they lie


def test_ops_add_up(file: tuple[Trace, dict[str, Any]]) -> None:
    trace = file[0]
    rows = trace.ops()
    assert [row["seconds"] for row in rows] == sorted((r["seconds"] for r in rows), reverse=True)
    found = trace.attribute()
    for stream in trace.names.streams:
        busy = sum(one.busy[stream] for one in found.values())
        assert sum(r["seconds"] for r in rows if r["stream"] == stream) == pytest.approx(busy)
    copies = next(row for row in rows if (row["stream"], row["op"]) == ("h2d", "copy"))
    assert copies["bytes_per_s"] < SLOW_BUS["h2d_bytes_per_s"]
    assert copies["bytes_per_s"] > 0.9 * SLOW_BUS["h2d_bytes_per_s"]
    inbound = sum(row["bus_bytes"] for row in rows if row["stream"] != "d2h")
    assert inbound == sum(one.h2d_bytes for one in found.values())
    assert {row["op"] for row in rows} >= {"copy", "matmul", "attn", "moe_up", "moe_down"}
    prefill = trace.ops(trace.prefills)
    assert sum(row["n"] for row in prefill) < sum(row["n"] for row in rows)
    assert trace.ops([]) == []


def attribution(kind: Any, n_tok: int, **chain: float) -> Attribution:
    whole = dict.fromkeys(CATEGORIES, 0.0) | chain
    return Attribution(kind, n_tok, 1, sum(whole.values()), whole, whole, {}, 0.0)


def test_differences_are_explained() -> None:
    measured = attribution("prefill", 100, h2d=0.8, compute=0.2, host=0.05)
    predicted = {"h2d": 0.7, "compute": 0.2, "hand_off": 0.1}
    line = explain_difference("TTFT", 1.1, 1.0, predicted, measured)
    assert line.startswith("TTFT 1.100 s, predicted 1.000 s (+10%): ")
    # 0.05 of launching and 0.05 outside of the passes make up for hand-offs that took no time
    assert line.endswith("PCIe +100.00 ms")
    line = explain_difference("TTFT", 1.2, 1.0, predicted, measured)
    assert line.endswith(": PCIe +100.00 ms, hand-off and launching +100.00 ms")
    assert explain_difference("TTFT", 1.1, 1.0) == "TTFT 1.100 s, predicted 1.000 s (+10%)"
    tokens = replace(attribution("decode", 10, cpu=1.0), n_passes=10)
    line = explain_difference("a token", 0.1, 0.08, {"cpu": 0.08}, tokens)
    assert line == "a token 100.00 ms, predicted 80.00 ms (+25%): CPU (DRAM) +20.00 ms"


def test_a_run_is_set_beside_its_prediction(llama: str) -> None:
    with open_engine(llama, None, device="emu", vram="1MiB") as engine:
        assert engine.explain_run() == ""
        engine.generate(PROMPT, max_tokens=5, temperature=0)
        stats, lines = engine.stats, engine.explain_run().split("\n")
        assert lines[0].startswith(f"TTFT {stats['ttft_s'] * 1e6:.1f} us, predicted ")
        assert lines[1].startswith(f"a token {1e6 / stats['tps']:.1f} us, predicted ")
        # the emulator's own rates were given: what is left are per cents
        assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.2)
        parts = sum(engine.last_attribution()["prefill"].chain.values())
        assert parts == pytest.approx(stats["ttft_s"])


def test_runs_are_compared_with_predictions() -> None:
    stats = {"ttft_s": 1.1, "tps": 10.0, "predicted_ttft_s": 1.0, "predicted_tps": 12.5}
    found = {"decode": replace(attribution("decode", 10, cpu=1.0), n_passes=10)}
    for prediction in ({"decode": {"cpu": 0.08}}, None):
        lines = compare(stats, prediction, found)
        assert lines[0] == "TTFT 1.100 s, predicted 1.000 s (+10%)"
        assert lines[1].startswith("a token 100.00 ms, predicted 80.00 ms (+25%)")
        assert ("CPU" in lines[1]) == (prediction is not None)
    # parts of another time say nothing about this one
    assert "CPU" not in compare(stats, {"decode": {"cpu": 0.2}}, found)[1]
    assert compare(stats | {"predicted_ttft_s": None, "tps": None}, None, {}) == []

"""Less page-locked memory, and less host memory, than there are weights: the same bits, within the limits, with fills,
copies and compute at once; and what is refused or cannot be read ends in a typed error."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import _core
from pipeshard.placement import Placement

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
PROMPT = np.arange(5, 45, dtype=np.int32)
GREEDY: dict[str, Any] = {"max_tokens": 5, "temperature": 0}


def streaming_plan(model: ps.Model) -> ps.Plan:
    """Everything crosses the bus in every pass."""
    with ps.Engine(model, device="emu", n_ctx=128, threads=1, vram=1 << 30) as engine:
        plan = engine.plan
    placement = Placement.everywhere({unit.name: "stream" for unit in model.units})
    placement = replace(placement, n_slots=4, slot_bytes=256 << 10)
    return replace(plan, placement=placement, budget_bytes=1 << 40)


class Case:
    """A model that streams, and what it does without limits."""

    def __init__(self, name: str) -> None:
        self.path = GOLDEN / f"{name}.gguf"
        self.plan = streaming_plan(ps.Model(self.path))
        with self.open() as engine:
            self.n_bytes = engine.model.n_bytes
            self.opened = engine.stats
            self.logits = engine.logits(PROMPT)
            self.text = engine.generate(PROMPT.tolist(), **GREEDY)

    def open(self, model: ps.Model | None = None, device: Any = "emu", **limits: Any) -> ps.Engine:
        model = model or ps.Model(self.path)
        return ps.Engine(model, device=device, plan=self.plan, threads=1, **limits)

    def check(self, engine: ps.Engine) -> None:
        assert np.array_equal(engine.logits(PROMPT), self.logits)
        assert engine.generate(PROMPT.tolist(), **GREEDY) == self.text


@pytest.fixture(scope="module", params=["llama.q4_k_m", "qwen3moe.q4_k_m"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def smallest(case: Case, name: str) -> int:
    """As the error says."""
    with pytest.raises(ps.HostMemoryError, match=f"and {name} is 1 bytes") as info:
        case.open(**{name: 1})
    found = re.search(r"needs (\d+) bytes", str(info.value))
    assert found is not None
    return int(found[1])


# ---- within the limits ----


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_little_locked_memory(case: Case, share: float, heap: None) -> None:
    least = smallest(case, "locked_limit")
    limit = least + int((case.opened["locked_bytes"] - least) * share)
    with case.open(locked_limit=limit) as engine:
        before = engine.stats
        assert before["locked_bytes"] <= limit < case.opened["locked_bytes"]
        assert before["bounce_bytes"] == 0
        case.check(engine)
        stats = engine.stats
        assert stats["locked_bytes"] <= limit
        assert 0 < stats["bounce_bytes"] <= stats["h2d_bytes"]
        assert stats["disk_bytes"] == before["disk_bytes"] == case.n_bytes
        assert stats["n_graph_launches"] == 0  # filling is no part of a graph
    with pytest.raises(ps.HostMemoryError):
        case.open(locked_limit=least - 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_little_host_memory(case: Case, share: float, heap: None) -> None:
    least = smallest(case, "ram_limit")
    limit = least + int((case.opened["ram_bytes"] - least) * share)
    model = ps.Model(case.path)
    with case.open(model, ram_limit=limit) as engine:
        before = engine.stats
        assert before["ram_bytes"] <= limit < case.opened["ram_bytes"]
        padding = 256 * len(model.units)
        assert before["disk_bytes"] <= model._core.image_bytes <= before["disk_bytes"] + padding
        assert before["disk_bytes"] < case.n_bytes
        case.check(engine)
        stats = engine.stats
        assert stats["ram_bytes"] <= limit
        read = stats["disk_bytes"] - before["disk_bytes"]
        assert 0 < read <= stats["bounce_bytes"]
    with pytest.raises(ps.HostMemoryError):
        case.open(ram_limit=least - 1)


def reads_past_the_cache(path: Path) -> bool:
    """Does this file system?"""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    try:
        with mmap.mmap(-1, 4096) as page:
            return os.preadv(file, [page], 0) > 0
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    finally:
        os.close(file)


def cached_bytes(path: Path) -> int:
    """Of the file, in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def drop_cached(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_stats_say_how_the_disk_is_read(case: Case) -> None:
    assert case.opened["disk_direct"] is None
    model = ps.Model(case.path)
    with case.open(model, ram_limit=smallest(case, "ram_limit")) as engine:
        assert engine.stats["disk_direct"] is reads_past_the_cache(case.path)
        case.check(engine)
        assert engine.stats["disk_direct"] is reads_past_the_cache(case.path)
        engine.set_budget(1 << 29)  # the same places, another executor
        assert engine.stats["disk_direct"] is reads_past_the_cache(case.path)


@pytest.mark.skipif(shutil.which("fincore") is None, reason="fincore says what is in the cache")
def test_prompts_leave_nothing_in_the_page_cache(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(case.path, path)
    if not reads_past_the_cache(path):
        pytest.skip("no reads past the page cache here")
    with case.open(ps.Model(path), ram_limit=smallest(case, "ram_limit")) as engine:
        drop_cached(path)
        before = engine.stats["disk_bytes"]
        if cached_bytes(path) > 0:
            pytest.skip("the cache keeps what it has")
        case.check(engine)
        assert engine.stats["disk_bytes"] > before
        assert cached_bytes(path) <= mmap.PAGESIZE  # the end of the file


def test_both_limits_and_a_slow_device(case: Case) -> None:
    locked, ram = smallest(case, "locked_limit"), smallest(case, "ram_limit")
    device = ps.EmuDevice(seed=7, delays=True)
    with case.open(device=device, locked_limit=locked, ram_limit=ram + 100_000) as engine:
        case.check(engine)
        assert engine.stats["locked_bytes"] <= locked
        assert engine.stats["bounce_bytes"] > 0


def test_limits_that_do_not_bind_change_nothing(case: Case) -> None:
    with case.open(locked_limit="1GiB", ram_limit="1GiB") as engine:
        case.check(engine)
        assert engine.stats["bounce_bytes"] == 0
        assert engine.stats["disk_bytes"] == case.n_bytes
        assert engine.stats["n_graph_launches"] > 0


def test_what_fewest_tokens_need_goes_to_disk_first(heap: None) -> None:
    """Experts, before what every token needs: a prompt reads them, and nothing else, from the file."""
    case = Case("qwen3moe.q4_k_m")
    model = ps.Model(case.path)
    experts = sum(unit.n_bytes for unit in model.units if unit.kind == "expert")
    rest = case.n_bytes - experts
    # A ring takes a quarter of what the limit leaves at most.
    with case.open(model, ram_limit=case.opened["ram_bytes"] - experts // 2):
        assert rest < model._core.image_bytes < rest + experts // 2


def test_images_that_nobody_uses_make_room(llama: str) -> None:
    case = Case("llama.q4_k_m")
    model = ps.Model(case.path)
    case.open(model).close()
    assert model._core.image_bytes >= case.n_bytes  # for the next engine
    with case.open(model, ram_limit=smallest(case, "ram_limit")) as engine:
        assert model._core.image_bytes < case.n_bytes / 2
        with case.open(model) as other:
            case.check(other)
            case.check(engine)
        assert engine.stats["ram_bytes"] < case.n_bytes


def test_what_the_cpu_computes_with_is_never_on_disk(case: Case) -> None:
    model = ps.Model(case.path)
    with ps.Engine(model, device="host", n_ctx=64, threads=1) as engine:
        needed = engine.stats["ram_bytes"]
    with pytest.raises(ps.HostMemoryError, match="what the CPU computes with does not"):
        ps.Engine(model, device="host", n_ctx=64, threads=1, ram_limit=needed - 1)
    with ps.Engine(model, device="host", n_ctx=64, threads=1, ram_limit=needed) as engine:
        assert engine.stats["ram_bytes"] == needed


def test_memory_is_counted_exactly(case: Case) -> None:
    """What is page-locked besides images is part of the host's memory; resident units take none of it."""
    stats = case.opened
    assert 0 <= stats["ram_bytes"] - stats["locked_bytes"] < 4096  # constants
    with ps.Engine(case.path, device="emu", vram=1 << 30, n_ctx=128, threads=1) as engine:
        table = sum(unit.n_bytes for unit in engine.model.units if unit.kind == "embed")
        stats = engine.stats
        assert stats["ram_bytes"] - stats["locked_bytes"] < table + 4096


def test_another_budget_within_the_limits(case: Case) -> None:
    model = ps.Model(case.path)
    options: dict[str, Any] = {"device": "emu", "n_ctx": 128, "threads": 1}
    with ps.Engine(model, vram="300KiB", **options) as engine:
        limit = engine.stats["ram_bytes"] + (96 << 10)  # room for hand-offs and the smallest ring
        text = engine.generate(PROMPT.tolist(), **GREEDY)
    with ps.Engine(model, vram=1 << 30, ram_limit=limit, **options) as engine:
        assert model._core.image_bytes < case.n_bytes
        engine.set_budget("300KiB")
        assert engine.generate(PROMPT.tolist(), **GREEDY) == text
        assert engine.stats["ram_bytes"] <= limit


# ---- at once ----


def test_filling_copying_and_computing_overlap() -> None:
    """With a bus and a memory of one speed, bouncing costs the first slot and not a second time the whole."""
    rate = {
        "h2d_bytes_per_s": 1e8,
        "dram_bytes_per_s": 1e8,
        "copy_ns": 1,
        "flag_ns": 1,
        "launch_ns": 1,
    }
    times = []
    case = Case("qwen3moe.q4_k_m")
    for limits in ({}, {"ram_limit": case.opened["ram_bytes"] - case.n_bytes * 3 // 4}):
        with case.open(device=ps.EmuDevice(profile=rate), **limits) as engine:
            core = engine._core
            assert core is not None
            start = core.clock_ns()
            core.append(0, PROMPT)
            times.append(core.clock_ns() - start)
    assert times[1] < 1.3 * times[0]


RATES = [{}, {"disk_bytes_per_s": 2e8}, {"dram_bytes_per_s": 3e8}]


@pytest.mark.parametrize("rates", RATES, ids=lambda rates: "-".join(rates) or "usual")
@pytest.mark.parametrize("name", ["locked_limit", "ram_limit"])
def test_predictions_know_of_limits(case: Case, name: str, rates: dict[str, float]) -> None:
    device = ps.EmuDevice(profile=rates)
    with case.open(device=device, **{name: smallest(case, name)}) as engine:
        before = engine.stats["predicted_ttft_s"]
        assert before is None or before > 0
        engine.generate(PROMPT.tolist(), **GREEDY)
        stats = engine.stats
        assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.05)
        assert stats["predicted_tps"] == pytest.approx(stats["tps"], rel=0.05)
        slow = stats["predicted_ttft_s"]
        engine.set_budget(1 << 39)  # another executor
        engine.generate(PROMPT.tolist(), **GREEDY)
        assert engine.stats["predicted_ttft_s"] == pytest.approx(slow, rel=0.05)
    with case.open(device=device) as engine:
        engine.generate(PROMPT.tolist(), **GREEDY)
        stats = engine.stats
        assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.05)
        assert stats["predicted_ttft_s"] < 0.5 * slow


def test_predictions_know_of_some_page_locked_memory(case: Case) -> None:
    least = smallest(case, "locked_limit")
    limit = least + (case.opened["locked_bytes"] - least) // 2
    with case.open(locked_limit=limit) as engine:
        units, piece_bytes = engine._core.sources()  # type: ignore[union-attr]
        assert {0, 1} == set(units)
        assert 0 < piece_bytes <= limit
        engine.generate(PROMPT.tolist(), **GREEDY)
        stats = engine.stats
        assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.05)
        assert stats["predicted_tps"] == pytest.approx(stats["tps"], rel=0.05)


# ---- failures ----


def test_a_file_cut_short_after_opening(case: Case, tmp_path: Path, heap: None) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(case.path, path)
    whole = path.read_bytes()
    with case.open() as engine:
        core = engine._core
        assert core is not None
        core.append(0, PROMPT[:20])
        core.append(0, PROMPT[20:])
        assert core.logits is not None
        expected = core.logits.copy()
    with case.open(ps.Model(path), ram_limit=smallest(case, "ram_limit")) as engine:
        case.check(engine)
        core = engine._core
        assert core is not None
        core.truncate(0, 0)
        core.append(0, PROMPT[:20])
        with path.open("r+b") as file:
            file.truncate(len(whole) // 3)
        for _ in range(2):
            with pytest.raises(ps.FileError, match="became shorter") as info:
                core.append(0, PROMPT[20:])
            assert info.value.path == str(path)
            assert core.length(0) == 20
        path.write_bytes(whole)
        core.append(0, PROMPT[20:])
        assert core.logits is not None
        assert np.array_equal(core.logits, expected)
        case.check(engine)
        del info


@pytest.mark.parametrize("kind", ["locked_alloc", "copy", "launch", "flag", "sync"])
def test_each_device_call_refused_once(kind: str) -> None:
    case = Case("llama.q4_k_m")
    ram = smallest(case, "ram_limit") + 100_000
    model, n_failed = ps.Model(case.path), 0
    case.open(model, ram_limit=ram).close()  # its images wait for the next engine
    live = _live()
    for after in itertools.chain(range(12), range(12, 4000, 23)):
        device = ps.EmuDevice(faults=((kind, after),))
        try:
            engine = case.open(model, device=device, ram_limit=ram)
        except ps.DeviceError as error:
            assert not error.fatal
            n_failed += 1
            continue
        with engine:
            core = engine._core
            assert core is not None
            try:
                core.append(0, PROMPT)
                core.append(0, PROMPT[:1])
                failed = False
            except ps.DeviceError as error:
                assert not error.fatal
                n_failed, failed = n_failed + 1, True
                assert core.length(0) in (0, len(PROMPT))
            if failed:
                assert np.array_equal(engine.logits(PROMPT), case.logits)
        del engine, core
        if not failed and after > 12:
            break
    assert n_failed > 0 or kind == "locked_alloc"
    assert _live() == live


def test_a_refused_registration_is_made_up_for(case: Case) -> None:
    """Locking that fails halves what is tried, and then bounces: never an error."""
    n_bounced = 0
    for after in range(100):
        try:
            engine = case.open(device=ps.EmuDevice(faults=(("locked_alloc", after),)))
        except ps.DeviceError:
            continue  # of what must be locked
        with engine:
            core = engine._core
            assert core is not None
            try:
                core.append(0, PROMPT)
            except ps.DeviceError:
                continue
            assert core.logits is not None
            assert np.array_equal(core.logits, case.logits[-1])
            if engine.stats["bounce_bytes"] == 0:
                break  # nothing was refused
            n_bounced += 1
    assert n_bounced == 1


@pytest.fixture
def no_fault_left() -> Iterator[None]:
    yield
    _core._heap_fail_after(-1)


def test_each_host_allocation_of_opening_refused_once(no_fault_left: None) -> None:
    case = Case("llama.q4_k_m")
    model = ps.Model(case.path)
    ram = smallest(case, "ram_limit") + 100_000
    case.open(model, ram_limit=ram).close()
    live, n_refused = _live(), 0
    for after in itertools.count():
        _core._heap_fail_after(after)
        try:
            case.open(model, ram_limit=ram).close()
        except ps.HostMemoryError:
            n_refused += 1
        if not _core._heap_fail_after(-1):
            break
    assert n_refused > 40
    case.open(model, ram_limit=ram).close()
    assert _live() == live


def _live() -> tuple[int, int]:
    gc.collect()
    return _core._heap_stats()[:2]

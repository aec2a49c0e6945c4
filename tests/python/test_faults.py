"""Every device call, allocation and read of opening and of passes refused once, on the emulated GPU: a typed error, an
engine that goes on as if nothing had happened, nothing left behind. And devices that are lost."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import _core
from pipeshard.emu import FAULT_KINDS

N_CTX = 64
PROMPT = np.arange(3, 23, dtype=np.int32)


def open_engine(model: ps.Model, budget: int, faults: tuple[Any, ...] = ()) -> ps.Engine:
    return ps.Engine(model, device=ps.EmuDevice(faults=faults), n_ctx=N_CTX, vram=budget, threads=1)


@pytest.fixture(scope="module", params=["llama.q4_k_m", "qwen3moe.q4_k_m"])
def case(request: pytest.FixtureRequest) -> tuple[ps.Model, int, Any, Any]:
    """A model, a budget that puts units on both sides, and what a prompt and a token behind it give."""
    golden = Path(__file__).resolve().parents[1] / "data/golden"
    model = ps.Model(golden / f"{request.param}.gguf")
    with pytest.raises(ps.BudgetError) as info:
        open_engine(model, 0)
    with ps.Engine(model, device="emu", n_ctx=N_CTX) as engine:
        budget = (info.value.smallest + engine.plan.needed_bytes) // 2
    with open_engine(model, budget) as engine:
        assert {"vram", "cpu"} == set(engine.plan.places["decode"].values())
        prompt, token = run(engine)
    return model, budget, prompt, token


def open_or_fail(kind: type[Any], *args: Any) -> Any:
    """The engine, or the error without its trace: frames would keep what they hold."""
    try:
        return open_engine(*args)
    except kind as error:
        return error.with_traceback(None)


def run(engine: ps.Engine) -> tuple[Any, Any]:
    core = engine._core
    assert core is not None
    core.truncate(0, 0)
    prompt = core.append_all(0, PROMPT)
    core.append(0, PROMPT[:1])
    assert core.logits is not None
    return prompt, core.logits.copy()


def live() -> tuple[int, int]:
    """Bytes and blocks that the core holds. Nothing here makes cycles; what other tests left is collected first."""
    return _core._heap_stats()[:2]


@pytest.fixture(autouse=True)
def nothing_left_by_others() -> None:
    gc.collect()


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_each_device_call_refused_once(case: tuple[ps.Model, int, Any, Any], kind: str) -> None:
    model, budget, expected, expected_token = case
    before, n_refused = live(), 0
    for after in itertools.count():
        engine = open_or_fail(ps.DeviceError, model, budget, ((kind, after),))
        if isinstance(engine, ps.DeviceError):
            assert not engine.fatal
            assert str(engine)
            n_refused += 1
            assert live() == before
            continue
        core = engine._core
        assert core is not None
        refused_in = []
        try:
            prompt = core.append_all(0, PROMPT)
        except ps.DeviceError as error:
            assert not error.fatal
            assert core.length(0) == 0
            refused_in.append("prompt")
            prompt = core.append_all(0, PROMPT)
        try:
            core.append(0, PROMPT[:1])
        except ps.DeviceError as error:
            assert not error.fatal
            assert core.length(0) == len(PROMPT)
            refused_in.append("token")
            core.append(0, PROMPT[:1])
        assert np.array_equal(prompt, expected)
        assert np.array_equal(core.logits, expected_token)
        assert engine.stats["peak_bytes"] <= budget
        engine.close()
        assert live() == before
        if not refused_in:
            break
        n_refused += 1
    # the last round met no fault, all before it did
    assert n_refused == after
    assert n_refused >= {"alloc": 1, "locked_alloc": 4, "sync": 4}.get(kind, 4)


@pytest.mark.parametrize("kind", ["launch", "copy", "flag", "sync", "alloc", "locked_alloc"])
def test_a_lost_device_closes_the_engine_not_the_process(
    case: tuple[ps.Model, int, Any, Any], kind: str
) -> None:
    model, budget, expected, _ = case
    before, met = live(), set()
    for after in (0, 1, 3, 7, 20, 60):
        engine = open_or_fail(ps.DeviceError, model, budget, ((kind, after, True),))
        if isinstance(engine, ps.DeviceError):
            assert engine.fatal
            met.add("open")
            assert live() == before
            continue
        try:
            for _ in range(3):
                engine.generate(PROMPT.tolist(), max_tokens=3)
            engine.close()
        except ps.DeviceError as error:
            assert error.fatal
            met.add("pass")
            assert engine.closed
            with pytest.raises(ps.ClosedError):
                engine.generate("x")
            with pytest.raises(ps.ClosedError):
                engine.stats  # noqa: B018
            engine.close()
        del engine
        assert live() == before
    assert met
    with open_engine(model, budget) as engine:
        assert np.array_equal(engine.logits(PROMPT), expected)


def test_a_fault_in_generate_is_over_with_the_call(case: tuple[ps.Model, int, Any, Any]) -> None:
    model, budget, _, _ = case
    prompt = PROMPT.tolist()
    with open_engine(model, budget) as engine:
        expected = engine.generate(prompt, max_tokens=6, seed=2)
    n_failed = 0
    for after in range(0, 400, 13):
        with open_engine(model, budget, (("launch", after),)) as engine:
            for _ in range(2):
                try:
                    text = engine.generate(prompt, max_tokens=6, seed=2)
                except ps.DeviceError:
                    n_failed += 1
                    text = engine.generate(prompt, max_tokens=6, seed=2)
                assert text == expected
    assert n_failed > 5


# ---- host memory ----


@pytest.fixture
def no_fault_left() -> Iterator[None]:
    yield
    _core._heap_fail_after(-1)


def test_each_host_allocation_of_opening_refused_once(llama: str, no_fault_left: None) -> None:
    ps.Model(llama)  # what Python itself sets up once
    before = live()
    for after in itertools.count():
        _core._heap_fail_after(after)
        try:
            engine: Any = ps.Engine(
                llama, device="emu", n_ctx=N_CTX, vram="600KiB", threads=1, policy="static_attn"
            )
        except ps.HostMemoryError as error:
            engine = error.with_traceback(None)
        fired = _core._heap_fail_after(-1)
        if isinstance(engine, ps.HostMemoryError):
            assert isinstance(engine, MemoryError)
            assert str(engine)
            assert live() == before, after
            continue
        engine.close()
        assert live() == before
        if not fired:  # else what was refused could be done without
            break
    assert after > 100


def test_each_host_allocation_of_a_pass_refused_once(
    case: tuple[ps.Model, int, Any, Any], no_fault_left: None
) -> None:
    model, budget, expected, expected_token = case
    n_refused = 0
    for after in itertools.count():
        with open_engine(model, budget) as engine:
            core = engine._core
            assert core is not None
            _core._heap_fail_after(after)
            try:
                run(engine)
            except ps.HostMemoryError:
                n_refused += 1
                assert core.length(0) in (0, len(PROMPT), len(PROMPT) + 1)
            fired = _core._heap_fail_after(-1)
            prompt, token = run(engine)
            assert np.array_equal(prompt, expected)
            assert np.array_equal(token, expected_token)
        if not fired:
            break
    assert n_refused > 10


# ---- reads ----


@pytest.mark.parametrize("kind", ["host", "emu"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
def test_a_file_cut_short_under_an_open_model(
    llama: str, tmp_path: Path, kind: str, share: float
) -> None:
    before = live()
    path = tmp_path / "model.gguf"
    shutil.copy(llama, path)
    model = ps.Model(path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ps.FileError) as info:
        ps.Engine(model, device=kind, n_ctx=N_CTX)
    assert info.value.path == str(path)
    shutil.copyfile(llama, path)
    with (
        ps.Engine(model, device=kind, n_ctx=N_CTX) as engine,
        ps.Engine(llama, device=kind, n_ctx=N_CTX) as other,
    ):
        assert np.array_equal(engine.logits(PROMPT), other.logits(PROMPT))
    del model, info
    assert live() == before

"""Another budget between tokens: what an engine opened with it would say, sequences kept, both budgets obeyed; and the
old engine wherever the change fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import _core
from pipeshard.emu import FAULT_KINDS
from pipeshard.placement import Place, Placement, Split

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
N_CTX = 256
PROMPT = list(range(5, 95))
REST = list(range(100, 130))
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


def open_engine(model: ps.Model | str, vram: int | None, **options: Any) -> ps.Engine:
    return ps.Engine(model, vram=vram, n_ctx=N_CTX, **({"device": "emu", "threads": 1} | options))


@pytest.fixture(scope="module", params=["llama.q4_k_m", "qwen3moe.q4_k_m"])
def model(request: pytest.FixtureRequest) -> ps.Model:
    return ps.Model(GOLDEN / f"{request.param}.gguf")


@pytest.fixture(scope="module")
def budgets(model: ps.Model) -> tuple[int, int, int]:
    """The least, some, and as much as there is use for."""
    with pytest.raises(ps.BudgetError) as info:
        open_engine(model, 0)
    with open_engine(model, 1 << 30) as engine:
        most = engine.plan.needed_bytes
    return info.value.smallest, model.n_bytes * 2 // 3, most


def test_text_is_that_of_a_fresh_engine(model: ps.Model, budgets: tuple[int, ...]) -> None:
    expected = {}
    for budget in budgets:
        with open_engine(model, budget) as fresh:
            expected[budget] = fresh.generate(PROMPT, **GREEDY), fresh.logits(REST)
    with open_engine(model, budgets[0]) as engine:
        for budget in (*budgets, *reversed(budgets)):
            engine.set_budget(budget)
            stats = engine.stats
            assert stats["budget_bytes"] == budget
            assert stats["vram_bytes"] <= stats["peak_bytes"] <= budget
            assert sum(stats["peak_bytes_by_kind"].values()) == stats["peak_bytes"]
            text, logits = expected[budget]
            assert engine.generate(PROMPT, **GREEDY) == text
            assert np.array_equal(engine.logits(REST), logits)


def test_no_more_than_the_larger_budget_is_ever_held(
    model: ps.Model, budgets: tuple[int, ...]
) -> None:
    """The device has just that much memory: old and new together would not fit."""
    device = ps.EmuDevice(vram_capacity=-(-budgets[2] // 65536) * 65536)
    with open_engine(model, budgets[2], device=device) as engine:
        for budget in (budgets[1], budgets[2], budgets[0], budgets[2]):
            engine.set_budget(budget)
            assert engine.stats["budget_bytes"] == budget
            engine.generate(PROMPT, **GREEDY)


def test_a_stream_goes_on(model: ps.Model, budgets: tuple[int, ...]) -> None:
    options = GREEDY | {"max_tokens": 12}
    with open_engine(model, budgets[2]) as engine:
        expected = list(engine.stream(PROMPT, **options))
        n_prompt_passes = engine.stats["n_passes"] - len(expected) + 1
    with open_engine(model, budgets[2]) as engine:
        pieces = []
        for i, piece in enumerate(engine.stream(PROMPT, **options)):
            pieces.append(piece)
            if i in (2, 5, 6):
                engine.set_budget(budgets[i % 2])
        assert "".join(pieces) == "".join(expected)
        # Nothing was computed again: the cache moved.
        assert engine.stats["n_passes"] <= n_prompt_passes + len(expected)
        assert engine.stats["n_gen"] == 12


def test_a_conversation_goes_on_from_the_cache(model: ps.Model, budgets: tuple[int, ...]) -> None:
    with open_engine(model, budgets[2]) as engine:
        core = engine._core
        assert core is not None
        core.append(0, np.array(PROMPT, np.int32))
        engine.set_budget(budgets[1])
        assert core.match(0, np.array(PROMPT, np.int32)) == len(PROMPT)
        assert engine.last_logits is None
        core.append(0, np.array(REST, np.int32))
        assert engine.last_logits is not None
        last = engine.last_logits.copy()
        assert np.array_equal(last, engine.logits(PROMPT + REST)[-1])


def test_a_trace_goes_on(model: ps.Model, budgets: tuple[int, ...]) -> None:
    with open_engine(model, budgets[2], trace=True) as engine:
        engine.generate(PROMPT, **GREEDY)
        n = engine.stats["n_passes"]
        engine.set_budget(budgets[1])
        engine.generate(PROMPT, **GREEDY)
        n_both = engine.stats["n_passes"]
        assert n_both >= 2 * n
        assert [p["number"] for p in engine.trace().passes] == list(range(n_both))


def test_on_the_host_there_is_nothing_to_change(llama: str) -> None:
    with open_engine(llama, None, device="host") as engine:
        text = engine.generate(PROMPT, **GREEDY)
        engine.set_budget("1GiB")
        assert engine.generate(PROMPT, **GREEDY) == text
        assert engine.stats["peak_bytes"] == 0


def test_host_weights_are_not_read_again(model: ps.Model, budgets: tuple[int, ...]) -> None:
    fresh = ps.Model(model.path)
    with open_engine(fresh, budgets[0]) as engine:
        read = engine.stats["disk_bytes"]
        assert read >= fresh.n_bytes * 0.9
        engine.set_budget(budgets[1])
        engine.set_budget(budgets[0])
        assert engine.stats["disk_bytes"] == read


# ---- what is carried ----


def places(model: ps.Model, choose: Any) -> Placement:
    chosen: dict[str, Place] = {unit.name: choose(unit) for unit in model.units}
    return replace(Placement.everywhere(chosen), n_slots=3, slot_bytes=256 << 10)


def splits(shares: Split) -> Any:
    return lambda unit: shares if unit.kind in ("attn", "ffn") else "vram"


def by_layer(unit: ps.Unit) -> Place:
    kinds: tuple[Place, ...] = ("vram", "cpu", "stream")
    return kinds[(unit.layer or 0) % 3]


CHOICES = {
    "vram": lambda unit: "vram",
    "cpu": lambda unit: "cpu",
    "layers": by_layer,
    "halves": splits(Split(vram=0.5)),
    "quarters": splits(Split(vram=0.25, stream=0.5)),
}


@pytest.mark.parametrize("name", ["qwen2.q8_0", "gpt-oss.mxfp4"])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_sequences_cross_between_any_two_caches(name: str, kv: str, heap: None) -> None:
    """Whole, cut by heads, in VRAM, in host memory, in both; two sequences, of pages that are not in order."""
    model = ps.Model(GOLDEN / f"{name}.gguf")
    with open_engine(model, 1 << 30, n_seq=2, kv=kv) as engine:
        base = replace(engine.plan, budget_bytes=1 << 40)
    drafts = {key: replace(base, placement=places(model, c)) for key, c in CHOICES.items()}
    plans = {key: draft.bind(model) for key, draft in drafts.items()}
    token = np.array([7], np.int32)
    with ps.Engine(model, device="emu", plan=drafts["vram"], threads=1) as engine:
        core = engine._core
        assert core is not None
        core.append(0, np.array(PROMPT[:70], np.int32))
        core.append(1, np.array(REST, np.int32))
        core.append(0, np.array(PROMPT[70:], np.int32))
        core.append(1, np.array(PROMPT, np.int32))
        core.append(0, token)
        assert core.logits is not None
        expected = core.logits.copy()
        for key in ("halves", "cpu", "quarters", "layers", "vram", "quarters", "vram"):
            core.replan(plans[key])
            assert (core.length(0), core.length(1)) == (len(PROMPT) + 1, len(REST) + len(PROMPT))
            assert core.logits is None
        core.truncate(0, len(PROMPT))
        core.append(0, token)
        assert np.array_equal(core.logits, expected)
    del plans


# ---- refusals ----


def test_a_budget_that_is_too_small_changes_nothing(
    model: ps.Model, budgets: tuple[int, ...]
) -> None:
    with open_engine(model, budgets[1]) as engine:
        text, plan = engine.generate(PROMPT, **GREEDY), engine.plan
        for budget in (0, 1000, budgets[0] - 1):
            with pytest.raises(ps.BudgetError) as info:
                engine.set_budget(budget)
            assert (info.value.budget, info.value.smallest) == (budget, budgets[0])
            assert engine.plan is plan
            assert engine.stats["budget_bytes"] == budgets[1]
        assert engine.generate(PROMPT, **GREEDY) == text
        engine.set_budget(info.value.smallest)
        with pytest.raises(ps.RequestError):
            engine.set_budget("many")
        with pytest.raises(TypeError):
            engine.set_budget(None)  # type: ignore[arg-type]
    with pytest.raises(ps.ClosedError):
        engine.set_budget(budgets[1])


def test_a_given_plan_keeps_its_places(model: ps.Model, budgets: tuple[int, ...]) -> None:
    with open_engine(model, budgets[1]) as engine:
        plan = engine.plan
    with ps.Engine(model, device="emu", plan=plan, threads=1) as engine:
        engine.set_budget(budgets[2])
        assert engine.plan.places == plan.places
        with pytest.raises(ps.BudgetError):
            engine.set_budget(budgets[0])
        engine.generate(PROMPT, **GREEDY)


def test_only_the_thread_of_a_stream_may_change_it(
    model: ps.Model, budgets: tuple[int, ...]
) -> None:
    with open_engine(model, budgets[1]) as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        next(stream)
        met: list[BaseException] = []

        def change() -> None:
            try:
                engine.set_budget(budgets[2])
            except ps.BusyError as error:
                met.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
        assert len(met) == 1
        assert list(stream)


@pytest.mark.parametrize("kind", [k for k in FAULT_KINDS if k not in ("launch", "flag")])
def test_each_device_call_of_the_change_refused_once(kind: str, heap: None) -> None:
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf")
    few, many = 700 << 10, 1 << 20
    with open_engine(model, few) as engine:
        expected = engine.generate(PROMPT, **GREEDY)
    n_refused = n_fine = 0
    for after in range(100):
        try:
            engine = open_engine(model, many, device=ps.EmuDevice(faults=((kind, after),)))
        except ps.DeviceError:
            continue
        with engine:
            core = engine._core
            assert core is not None
            try:
                core.append(0, np.array(PROMPT, np.int32))
            except ps.DeviceError:
                continue
            try:
                engine.set_budget(few)
            except ps.DeviceError as error:
                assert not error.fatal
                n_refused += 1
                assert engine.stats["budget_bytes"] == many
                assert core.length(0) == len(PROMPT)
                engine.set_budget(few)
            else:
                assert core.length(0) == len(PROMPT)
                n_fine += 1
                if n_fine == 6:  # some refusals are made up for, and some come later
                    break
            try:
                text = engine.generate(PROMPT, **GREEDY)
            except ps.DeviceError:
                text = engine.generate(PROMPT, **GREEDY)
            assert text == expected
    assert n_refused > 0


def test_a_device_lost_during_the_change_closes_the_engine(
    model: ps.Model, budgets: tuple[int, ...]
) -> None:
    met = 0
    for after in itertools.count():
        try:
            engine = open_engine(
                model, budgets[2], device=ps.EmuDevice(faults=(("copy", after, True),))
            )
        except ps.DeviceError:
            continue
        try:
            engine.set_budget(budgets[2])
        except ps.DeviceError as error:
            assert error.fatal
            assert engine.closed
            met += 1
        else:
            engine.close()
            break
    assert met > 0


@pytest.fixture
def no_fault_left() -> Iterator[None]:
    yield
    _core._heap_fail_after(-1)


@pytest.mark.parametrize("policy", ["layer_split", "auto"])
def test_each_host_allocation_of_the_change_refused_once(
    policy: str, no_fault_left: None, heap: None
) -> None:
    """Of `auto`, which asks for memory thousands of times alike while it decides, some."""
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf")
    few, many = 700 << 10, 1 << 20
    with open_engine(model, many, policy=policy) as engine:
        expected = engine.generate(PROMPT, **GREEDY)
        n_refused = after = 0
        while True:
            _core._heap_fail_after(after)
            try:
                engine.set_budget(few)
                changed = True
            except ps.HostMemoryError:
                n_refused += 1
                changed = False
            fired = _core._heap_fail_after(-1)
            if changed:
                engine.set_budget(many)
            if not fired:
                break
            assert engine.stats["budget_bytes"] == many
            assert engine.generate(PROMPT, **GREEDY) == expected
            after += 1 + after // 20 if policy == "auto" else 2
        assert n_refused > 20

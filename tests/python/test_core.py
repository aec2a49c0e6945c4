"""The extension by itself: what its types give back, refuse, and free. The package's own names have other tests."""

from __future__ import annotations

import gc
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from pipeshard import _core, errors

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = DATA / "golden"
LLAMA = str(GOLDEN / "llama.q4_k_m.gguf")
MOE = str(GOLDEN / "qwen3moe.q4_k_m.gguf")

import reference

CPU, VRAM = 0, 1
N_CTX = 128


def make_plan(model: _core.Model, kind: int = VRAM, **changes: Any) -> _core.Plan:
    spec: dict[str, Any] = {
        "tiers": [("decode", 1), ("prefill", None)],
        "kinds": np.full((2, len(model.units)), kind, np.uint8),
        "shares": None,
        "kv_vram_tok": None,
        "accelerator": True,
        "sm": 90,
        "budget_bytes": 1 << 30,
        "n_ctx": N_CTX,
        "n_seq": 2,
        "kv": "f16",
        "n_slots": 0,
        "slot_bytes": 0,
        "chunk_tok": 64,
        "pass_tok": 64,
        "logit_rows": 8,
        "graph_reserve_bytes": 0,
        "map_bytes_per_gib": 0,
        "per_tier_residency": False,
        "kv_far_on_cpu": False,
    }
    return _core.Plan(model, **(spec | changes))


def make_engine(path: str = LLAMA, kind: int = VRAM, **device: Any) -> _core.Engine:
    model = _core.Model(path)
    return _core.Engine(
        make_plan(model, kind),
        _core.Device("emu", model, N_CTX, 64, threads=1, **device),
        check=True,
    )


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def golden(path: str) -> Any:
    return np.load(Path(path).with_suffix(".npz"))


# ---- metadata ----


def test_metadata_has_every_type_as_python_has_it() -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(MOE)
    metadata = _core.Metadata(MOE)
    expected = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert metadata.keys() == expected
    assert len(metadata) == len(expected)
    for key in expected:
        value, wanted = metadata[key], reader.fields[key].contents()
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable
            value = value.tolist()
        assert value == wanted, key
        assert key in metadata
    assert isinstance(metadata["tokenizer.ggml.tokens"], list)
    assert metadata.version == 3
    assert metadata.files == ((MOE, Path(MOE).stat().st_size),)


def test_metadata_lists_tensors() -> None:
    gguf = pytest.importorskip("gguf")
    found = {
        name: (kind, dims, size) for name, kind, dims, size, _, _ in _core.Metadata(MOE).tensors()
    }
    for tensor in gguf.GGUFReader(MOE).tensors:
        kind, dims, size = found.pop(tensor.name)
        assert kind == tensor.tensor_type.name.lower()
        assert dims == tuple(tensor.shape.tolist())
        assert size == tensor.n_bytes
    assert found == {}


@pytest.mark.parametrize(
    "key", ["no.such.key", "general.architecture\0", "\ud800", 3, None, b"general.architecture"]
)
def test_metadata_knows_no_other_key(key: Any) -> None:
    metadata = _core.Metadata(LLAMA)
    assert key not in metadata
    with pytest.raises(KeyError):
        metadata[key]


def test_metadata_of_a_model_keeps_it_open() -> None:
    metadata = _core.Model(LLAMA).metadata
    gc.collect()
    assert metadata["general.architecture"] == "llama"


# ---- models and plans ----


def test_model_says_what_it_is() -> None:
    model = _core.Model(MOE)
    assert model.arch == "qwen3moe"
    assert len(model.digest) == 64
    assert model.digest == _core.Model(MOE).digest != _core.Model(LLAMA).digest
    hp = model.hparams
    names = [unit[0] for unit in model.units]
    assert len(set(names)) == len(names)
    assert sum(unit[1] == "expert" for unit in model.units) == hp["n_layer"] * hp["n_expert"]
    assert sum(unit[4] for unit in model.units) == model.n_bytes
    expert = next(unit for unit in model.units if unit[0] == "blk.0.expert.1")
    assert expert[2:4] == (0, 1)
    assert expert[8] == hp["n_expert_used"] / hp["n_expert"]


def test_plan_counts_to_the_byte() -> None:
    model = _core.Model(LLAMA)
    plan = make_plan(model)
    assert sum(plan.bytes_by_kind.values()) == plan.needed_bytes
    assert make_plan(model, budget_bytes=plan.needed_bytes).needed_bytes == plan.needed_bytes
    with pytest.raises(errors.BudgetError) as info:
        make_plan(model, budget_bytes=plan.needed_bytes - 1)
    assert info.value.needed == plan.needed_bytes
    assert info.value.budget == plan.needed_bytes - 1


def test_plan_lowers_and_checks() -> None:
    plan = make_plan(_core.Model(LLAMA))
    text = plan.lower(3, 1)
    assert text.splitlines()[0].startswith("pass tier=prefill n_tok=3")
    assert plan.check(3, 1) == len(text.splitlines()) - 1
    with pytest.raises(ValueError, match="no such pass"):
        plan.lower(65)


def test_plan_names_the_unit_at_fault() -> None:
    model = _core.Model(LLAMA)
    kinds = np.full((2, len(model.units)), VRAM, np.uint8)
    kinds[1, 1] = 9
    with pytest.raises(errors.PlanError) as info:
        make_plan(model, kinds=kinds)
    assert (info.value.unit, info.value.tier) == (model.units[1][0], "prefill")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kinds": np.zeros(3, np.uint8)}, ValueError),
        ({"kinds": np.zeros((2, 6), np.int64)}, TypeError),
        ({"kinds": [0] * 12}, TypeError),
        ({"tiers": [("a", None)] * 99}, ValueError),
        ({"tiers": ["decode"]}, TypeError),
        ({"tiers": 3}, TypeError),
        ({"kv": "f64"}, errors.RequestError),
        ({"n_ctx": 0}, errors.RequestError),
        ({"n_ctx": -1}, OverflowError),
        ({"n_ctx": 1 << 32}, OverflowError),
        ({"n_ctx": 1.5}, TypeError),
        ({"tiers": [("a", 5), ("b", 9)]}, errors.PlanError),
    ],
)
def test_plan_refuses(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make_plan(_core.Model(LLAMA), **change)


# ---- engines ----


@pytest.mark.parametrize("path", [LLAMA, MOE])
def test_logits(path: str) -> None:
    engine, expected = make_engine(path, cpu_variant="ref"), golden(path)
    logits = engine.append_all(0, expected["tokens"].astype(np.int32))
    assert reference.nmse(logits, expected["reference"]) < 2e-5
    assert np.array_equal(engine.logits, logits[-1])


def test_logits_view_never_dangles() -> None:
    engine = make_engine()
    assert engine.logits is None
    engine.append(0, ids(1, 2, 3))
    view = engine.logits
    assert view is not None
    assert np.shares_memory(view, engine.logits)
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1.0
    before = view.copy()
    engine.append_all(0, np.arange(20, dtype=np.int32))
    assert np.array_equal(view, before)
    engine.close()
    del engine
    gc.collect()
    assert np.array_equal(view, before)


def test_step_runs_several_sequences() -> None:
    engine = make_engine()
    engine.append(0, ids(5, 6))
    alone = engine.logits
    assert alone is not None
    alone = alone.copy()
    engine.append(1, ids(9))
    engine.truncate(0, 1)
    engine.step(ids(0, 1), ids(6, 7))
    assert engine.logits is not None
    assert engine.logits.shape == (2, len(alone))
    assert np.allclose(engine.logits[0], alone, rtol=1e-4, atol=1e-4)
    assert (engine.length(0), engine.length(1)) == (2, 2)
    assert engine.match(0, ids(5, 6, 7)) == 2
    with pytest.raises(errors.RequestError) as info:
        engine.step(ids(0, -1), ids(1, 1))
    assert info.value.argument == "seq"
    assert engine.length(0) == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda e: e.append(0, [1, 2]), TypeError),
        (lambda e: e.append(0, np.array([1, 2])), TypeError),
        (lambda e: e.append(0, np.arange(8, dtype=np.int32)[::2]), TypeError),
        (lambda e: e.append(0, ids()), errors.RequestError),
        (lambda e: e.append(0, ids(-1)), errors.RequestError),
        (lambda e: e.append(0, ids(1 << 30)), errors.RequestError),
        (lambda e: e.append(2, ids(1)), errors.RequestError),
        (lambda e: e.append(0, np.ones(N_CTX + 1, np.int32)), errors.RequestError),
        (lambda e: e.step(ids(0, 0), ids(1, 1)), errors.RequestError),
        (lambda e: e.step(ids(0), ids(1, 1)), ValueError),
        (lambda e: e.truncate(9, 0), errors.RequestError),
    ],
)
def test_engine_refuses_and_goes_on(call: Any, error: type[Exception]) -> None:
    engine = make_engine()
    with pytest.raises(error):
        call(engine)
    assert engine.length(0) == 0
    engine.append(0, ids(1))
    assert engine.length(0) == 1


def test_close_frees_everything_and_says_so() -> None:
    gc.collect()
    before = _core._heap_stats()[:2]
    engine = make_engine(MOE)
    engine.append(0, ids(1))
    engine.close()
    engine.close()
    assert engine.closed
    for call in (
        engine.stats,
        engine.clock_ns,
        lambda: engine.append(0, ids(1)),
        lambda: engine.logits,
    ):
        with pytest.raises(errors.ClosedError):
            call()
    assert _core._heap_stats()[:2] == before


def test_stats() -> None:
    engine = make_engine()
    engine.append(0, ids(1, 2))
    stats = engine.stats()
    assert stats["peak_bytes"] == sum(stats["peak_bytes_by_kind"].values()) > 0
    assert stats["n_passes"] == 1
    assert stats["h2d_bytes"] > 0
    clock = engine.clock_ns()
    engine.append(0, ids(1))
    assert engine.clock_ns() > clock


def test_an_exception_in_progress_cancels_the_load() -> None:
    model = _core.Model(LLAMA)
    before = _core._heap_stats()[:2]
    plan, device = make_plan(model), _core.Device("emu", model, N_CTX, 64, threads=1)

    def stop(done: int, total: int) -> None:
        raise LookupError(f"{done} of {total}")

    with pytest.raises(LookupError):
        _core.Engine(plan, device, progress=stop)
    engine = _core.Engine(plan, device)
    engine.append(0, ids(1))
    del engine, plan, device
    assert _core._heap_stats()[:2] == before


# ---- sampler ----


def test_sampler_reads_engines_and_arrays() -> None:
    engine = make_engine()
    n_vocab = engine.append_all(0, ids(1, 2, 3)).shape[1]
    assert engine.logits is not None
    best = int(engine.logits.argmax())
    greedy = _core.Sampler(n_vocab, temperature=0.0)
    assert greedy.next(engine) == greedy.next(engine.logits) == best
    token, logprob, top = _core.Sampler(n_vocab, temperature=0.0, logprobs=True, n_top=3).next(
        engine
    )  # type: ignore[misc]
    x = engine.logits.astype(np.float64)
    expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
    assert token == best
    assert logprob == pytest.approx(expected[best], abs=1e-4)
    assert [i for i, _ in top] == np.argsort(-x)[:3].tolist()


def test_sampler_seed_bias_and_penalties() -> None:
    logits = np.zeros(50, np.float32)
    draws = [
        [s.next(logits) for _ in range(20)] for s in (_core.Sampler(50, seed=s) for s in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    only = _core.Sampler(
        50, temperature=0.0, bias_ids=ids(7), bias_values=np.array([5], np.float32)
    )
    assert only.next(logits) == 7
    tired = _core.Sampler(50, temperature=0.0, presence_penalty=1.0)
    tired.accept(ids(0, 1))
    tired.accept(2)
    assert tired.next(logits) == 3
    tired.reset()
    assert tired.next(logits) == 0


def test_sampler_refuses() -> None:
    sampler = _core.Sampler(50)
    with pytest.raises(ValueError, match="vocabulary"):
        sampler.next(np.zeros(49, np.float32))
    with pytest.raises(TypeError):
        sampler.next(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        sampler.next(np.zeros(50))  # type: ignore[arg-type]
    with pytest.raises(errors.RequestError) as info:
        _core.Sampler(50, temperature=-1.0)
    assert info.value.argument == "temperature"
    with pytest.raises(errors.RequestError):
        sampler.next(make_engine())  # no pass yet


# ---- types ----


@pytest.mark.parametrize(
    "name", ["Metadata", "Model", "Plan", "Device", "Engine", "Rows", "Sampler"]
)
def test_types_are_closed(name: str) -> None:
    cls = getattr(_core, name)
    assert cls.__module__ == "pipeshard._core"
    with pytest.raises(TypeError):
        cls.attribute = 1
    with pytest.raises(TypeError):
        type("Sub", (cls,), {})
    with pytest.raises(TypeError):
        cls()


def test_distinct_objects_of_a_mapping() -> None:
    """By identity, in the order in which they are found."""
    one, other, third = object(), object(), object()
    things = MappingProxyType({"a": one, "b": third, "c": other, "d": one})
    found, numbers = _core.Plan.distinct(things, ("d", "b", "c", "a", "b"))
    assert found == [one, third, other]
    assert numbers.tolist() == [0, 1, 2, 0, 1]
    assert _core.Plan.distinct({}, ())[0] == []
    with pytest.raises(KeyError, match="e"):
        _core.Plan.distinct(things, ("a", "e"))
    with pytest.raises(TypeError):
        _core.Plan.distinct(7, ("a",))  # type: ignore[arg-type]

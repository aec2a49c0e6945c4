"""What holds whatever a plan says. On the emulated GPU, 12-layer models with and without experts, under random plans,
give the logits of the CPU, within the budget to the byte; a streamed prompt takes no longer than the slower of bus and
GPU. A few hundred plans in every run, 10,000 of them under `make test-long`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import random_plans

import pipeshard as ps
from pipeshard import _core
from pipeshard.synth import synth

N_LAYER = 12
SHAPES = {"dense": "tiny-llama", "moe": "tiny-qwen3moe"}

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ps.Model]:
    return make_models(tmp_path_factory.mktemp("models"), N_LAYER)


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ps.Model]:
    """Of as many layers as real ones have, so that the first copy and the last op, which nothing can hide, are few."""
    return make_models(tmp_path_factory.mktemp("models"), 3 * N_LAYER)


def make_models(folder: Path, n_layer: int) -> dict[str, ps.Model]:
    for name, shape in SHAPES.items():
        synth(shape, folder / f"{name}.gguf", layers=n_layer, progress=False)
    return {name: ps.Model(folder / f"{name}.gguf") for name in SHAPES}


# ---- plans at random ----

# Passes of a prompt, small ones, and single tokens.
PASSES = (20, 6, 1, 1)
TOKENS = np.random.default_rng(7).integers(0, 512, sum(PASSES)).astype(np.int32)
# Ops on few rows sum in another order than ops on many, but for the reference's.
REFERENCE = "ref"


def run_passes(model: ps.Model, spec: dict[str, Any], **device: Any) -> tuple[Logits, int]:
    """Logits of every token, and the peak of VRAM."""
    opened = _core.Device(
        "emu",
        model._core,
        spec["n_ctx"],
        spec["chunk_tok"],
        threads=1,
        cpu_variant=REFERENCE,
        **device,
    )
    engine = _core.Engine(_core.Plan(model._core, **spec), opened, check=True)
    rows, at = [], 0
    for n in PASSES:
        rows.append(engine.append_all(0, TOKENS[at : at + n]))
        at += n
    peak = engine.stats()["peak_bytes"]
    engine.close()
    return np.concatenate(rows), peak


def check_plan(model: ps.Model, seed: int) -> str:
    """Makes the seed's plan, or sees it refused by an error that says what is wrong; then lowers passes of it and has
    the checker prove them. Returns what became of it."""
    rng = np.random.default_rng(seed)
    spec, what = random_plans.random_spec(model, rng)
    try:
        plan = _core.Plan(model._core, **spec)
    except (ps.PipeshardError, ValueError, OverflowError) as error:
        assert what != "sound", f"seed {seed}: {error}"
        assert str(error)
        return "refused"
    assert sum(plan.bytes_by_kind.values()) == plan.needed_bytes, seed
    longest = min(spec["pass_tok"], spec["n_ctx"])
    for n_tok in {1, int(rng.integers(1, longest + 1)), longest}:
        try:
            plan.check(n_tok, int(rng.integers(1, n_tok + 1)))
        except ps.PipeshardError as error:
            raise AssertionError(f"seed {seed}, a pass of {n_tok} tokens: {error}") from error
    if not spec["accelerator"]:
        return what
    with pytest.raises(ps.BudgetError) as info:
        _core.Plan(model._core, **spec | {"budget_bytes": plan.needed_bytes - 1})
    assert info.value.needed == plan.needed_bytes, seed
    return what


def run_plan(model: ps.Model, seed: int, expected: dict[str, Logits]) -> None:
    """The seed's plan under a budget of exactly what it needs, with and without random delays."""
    rng = np.random.default_rng(seed)
    spec = random_plans.sound_spec(model, rng)
    plan = _core.Plan(model._core, **spec)
    spec["budget_bytes"] = plan.needed_bytes
    logits, peak = run_passes(model, spec, seed=seed, delays=seed % 4 == 0)
    wanted = expected[spec["kv"]]
    if spec["shares"] is None:
        assert np.array_equal(logits, wanted), seed
    else:  # a split unit's two parts are summed in another order than the whole
        assert np.sum((logits - wanted) ** 2) < 1e-8 * np.sum(wanted**2), seed
    # the emulated GPU has graphs of no size, so their reserve goes unused
    assert peak == plan.needed_bytes - plan.bytes_by_kind["graph"], seed


def many(in_ci: int, in_all: int) -> Any:
    """The first seeds in every run, the rest under `make test-long`."""
    return pytest.mark.parametrize(
        "seeds",
        [
            pytest.param(range(in_ci), id=f"{in_ci}"),
            pytest.param(range(in_ci, in_all), id=f"{in_all}", marks=pytest.mark.long),
        ],
    )


@many(250, 5000)
@pytest.mark.parametrize("name", SHAPES)
def test_random_plans_are_refused_or_sound(
    models: dict[str, ps.Model], name: str, seeds: range, heap: None
) -> None:
    became = Counter(check_plan(models[name], seed) for seed in seeds)
    assert became["sound"] > 0.6 * len(seeds)
    assert became["refused"] > 0.1 * len(seeds)


@many(7, 150)
@pytest.mark.parametrize("name", SHAPES)
def test_random_plans_run(models: dict[str, ps.Model], name: str, seeds: range) -> None:
    """To the bit as everything on the CPU, which has the same kernels; nothing stays behind."""
    model = models[name]
    all_cpu = random_plans.base_spec(model)
    expected = {kv: run_passes(model, all_cpu | {"kv": kv})[0] for kv in ("f16", "q8_0")}
    before = _core._heap_stats()[:2]
    for seed in seeds:
        run_plan(model, seed, expected)
        assert _core._heap_stats()[:2] == before, seed


def test_every_tier_has_room(models: dict[str, ps.Model]) -> None:
    """Also those that hold no power of two, and those for passes of several chunks alone; rows of logits may be more
    than an op of a prompt has."""
    model = models["moe"]
    spec = random_plans.base_spec(model) | {"chunk_tok": 4, "pass_tok": 24, "logit_rows": 16}
    spec["tiers"] = [("a", 4), ("b", 5), ("c", 7), ("d", 15), ("e", None)]
    spec["n_slots"], spec["slot_bytes"] = 2, random_plans.needed_slot(model, 2)
    for tier in range(5):
        spec["kinds"] = np.zeros((5, len(model.units)), np.uint8)
        spec["kinds"][tier] = random_plans.STREAM
        plan = _core.Plan(model._core, **spec)
        for n_tok in range(1, 25):
            for n_out in {1, 2, n_tok}:
                assert plan.check(n_tok, min(n_out, n_tok)) > 0


# ---- how well it overlaps ----

BUS = 5e9  # bytes a second
FIXED_NS = 500  # of a launch, a copy, a flag
N_PROMPT = 256


def streaming_spec(model: ps.Model, n_slots: int, slot_bytes: int) -> dict[str, Any]:
    """Every layer streams; what is outside of them stays with the CPU."""
    spec = random_plans.base_spec(model) | {
        "tiers": [("all", None)],
        "n_ctx": N_PROMPT,
        "chunk_tok": N_PROMPT,
        "pass_tok": N_PROMPT,
        "n_slots": n_slots,
        "slot_bytes": slot_bytes,
    }
    spec["kinds"] = np.array(
        [[random_plans.CPU if u.layer is None else random_plans.STREAM for u in model.units]],
        np.uint8,
    )
    return spec


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("n_slots", "slot_kib"), [(16, 64), (16, 256), (64, 64)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_streamed_prompt_takes_what_the_slower_of_bus_and_gpu_takes(
    deep_models: dict[str, ps.Model], name: str, n_slots: int, slot_kib: int, ratio: float
) -> None:
    """By the virtual clock, on a GPU that computes for `ratio` times as long as the copies take: within 5 % of the
    longer of the two and one slot."""
    model, slot_bytes = deep_models[name], slot_kib << 10
    plan = _core.Plan(model._core, **streaming_spec(model, n_slots, slot_bytes))
    ticks = plan.ticks(N_PROMPT)
    kinds, streams, *_ = plan.tick_names()
    copies = ticks[ticks["kind"] == kinds.index("copy_in")]
    runs = ticks[
        (ticks["kind"] == kinds.index("run")) & (ticks["stream"] == streams.index("compute"))
    ]
    copy_s = len(copies) * FIXED_NS * 1e-9 + copies["n_bytes"].sum() / BUS
    rates = {"h2d_bytes_per_s": BUS, "d2h_bytes_per_s": BUS, "vram_bytes_per_s": 400e9}
    rates |= {
        "dram_bytes_per_s": 50e9,
        "cpu_flops": 1e12,
        "gpu_flops": runs["flops"].sum() / (ratio * copy_s),
    }
    rates |= dict.fromkeys(("launch_ns", "copy_ns", "flag_ns"), FIXED_NS)
    work_s = np.maximum(
        runs["flops"] / rates["gpu_flops"], runs["bytes"] / rates["vram_bytes_per_s"]
    )
    compute_s = len(runs) * FIXED_NS * 1e-9 + work_s.sum()

    device = ps.EmuDevice(profile=rates)
    opened = _core.Device(
        "emu", model._core, N_PROMPT, N_PROMPT, threads=2, profile=device._rates()
    )
    engine = _core.Engine(plan, opened)
    tokens = np.random.default_rng(1).integers(0, 512, N_PROMPT).astype(np.int32)
    start = engine.clock_ns()
    engine.append(0, tokens)
    seconds = (engine.clock_ns() - start) * 1e-9
    longer = max(copy_s, compute_s)
    assert 0.999 * longer < seconds < 1.05 * longer + slot_bytes / BUS

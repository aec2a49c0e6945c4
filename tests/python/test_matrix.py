"""What holds whatever a plan says. On the emulated GPU, 12-layer models with and without experts, under every policy,
budget, context and ring, and under random plans, give the logits that they give where all is resident, within the
budget to the byte; and a streamed prompt takes no longer than the slower of bus and GPU. Pairs of settings and a few
hundred plans in every run; all settings and 10,000 plans under `make test-long`."""

from __future__ import annotations

import gc
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import random_plans

import pipeshard as ps
from pipeshard import Placement, PolicyContext, Split, _core, sched_policies
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
        n_out = int(rng.integers(1, n_tok + 1))
        try:
            for held in range(-1, plan.n_residencies + 1 if plan.n_residencies > 1 else 0):
                plan.check(n_tok, n_out, held=held)
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


def test_passes_of_one_chunk_have_room(models: dict[str, ps.Model]) -> None:
    """A layer's experts that fit the ring are cut into groups where a pass is one chunk, and only there."""
    model = models["moe"]
    spec = random_plans.base_spec(model) | {"chunk_tok": 3, "pass_tok": 4, "logit_rows": 1}
    spec |= {"tiers": [("all", None)], "n_slots": 2, "slot_bytes": 1 << 20}
    spec["kinds"] = np.full((1, len(model.units)), random_plans.STREAM, np.uint8)
    plan = _core.Plan(model._core, **spec)
    assert all(plan.check(n_tok) > 0 for n_tok in range(1, 5))


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
        "emu", model._core, N_PROMPT, N_PROMPT, threads=1, profile=device._rates()
    )
    engine = _core.Engine(plan, opened)
    tokens = np.random.default_rng(1).integers(0, 512, N_PROMPT).astype(np.int32)
    start = engine.clock_ns()
    engine.append(0, tokens)
    seconds = (engine.clock_ns() - start) * 1e-9
    longer = max(copy_s, compute_s)
    assert 0.999 * longer < seconds < 1.05 * longer + slot_bytes / BUS


@pytest.mark.parametrize("slowest", ["disk", "bus", "gpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_from_disk_takes_what_the_slowest_of_disk_bus_and_gpu_takes(
    deep_models: dict[str, ps.Model], name: str, slowest: str
) -> None:
    """The same of layers that `ram_limit` leaves on disk: read, copied and computed with at once."""
    model, slot_bytes = deep_models[name], 64 << 10
    plan = _core.Plan(model._core, **streaming_spec(model, 16, slot_bytes))
    ticks = plan.ticks(N_PROMPT)
    kinds, streams, *_ = plan.tick_names()
    n_copied = int(ticks["n_bytes"][ticks["kind"] == kinds.index("copy_in")].sum())
    flops = int(ticks["flops"][ticks["stream"] == streams.index("compute")].sum())
    share = {key: 1.0 if key == slowest else 0.8 for key in ("disk", "bus", "gpu")}
    rates = dict.fromkeys(("d2h_bytes_per_s", "vram_bytes_per_s", "dram_bytes_per_s"), 1e15)
    rates |= dict.fromkeys(("launch_ns", "copy_ns", "flag_ns"), 1) | {"cpu_flops": 1e18}
    rates |= {
        "disk_bytes_per_s": BUS / share["disk"],
        "h2d_bytes_per_s": BUS / share["bus"],
        "gpu_flops": flops / (share["gpu"] * n_copied / BUS),
    }
    device = ps.EmuDevice(profile=rates)
    opened = _core.Device(
        "emu", model._core, N_PROMPT, N_PROMPT, threads=1, profile=device._rates()
    )
    with pytest.raises(ps.HostMemoryError) as info:
        _core.Engine(plan, opened, ram_limit=1)
    least = re.search(r"needs (\d+) bytes", str(info.value))
    assert least is not None
    engine = _core.Engine(plan, opened, ram_limit=int(least[1]) + (1280 << 10))
    before = engine.stats()["disk_bytes"]
    tokens = np.random.default_rng(1).integers(0, 512, N_PROMPT).astype(np.int32)
    start = engine.clock_ns()
    engine.append(0, tokens)
    seconds = (engine.clock_ns() - start) * 1e-9
    read = engine.stats()["disk_bytes"] - before
    assert read > 0.9 * n_copied
    bus, gpu = n_copied / rates["h2d_bytes_per_s"], flops / rates["gpu_flops"]
    disk = read / rates["disk_bytes_per_s"]
    assert 0.999 * max(disk, bus, gpu) < seconds
    # While what did find room in memory crosses the bus, the disk may stand before a full ring.
    disk += (1 - read / n_copied) * bus
    assert seconds < 1.05 * max(disk, bus, gpu) + slot_bytes / BUS


# ---- every policy ----

CONTEXTS = (48, 256, 1024)
SHARES = (0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0)  # from the smallest budget to all resident
RINGS = ("own", "narrow", "wide")
POLICIES = (
    "auto",
    "even_split",
    "experts_cpu",
    "full_gpu",
    "full_gpu_no_output",
    "full_shard",
    "layer_split",
    "paper",
    "shard_attn",
    "static_attn",
)


class WithRing:
    """A policy whose streamed units go through another ring, which it is told of when it asks what fits."""

    def __init__(self, policy: str, ring: str, model: ps.Model) -> None:
        self._inner = sched_policies.get(policy)
        self._n_slots, share = (2, 16) if ring == "narrow" else (6, 2)  # of the largest unit a slot
        largest = max(unit.n_bytes for unit in model.units)
        needed = random_plans.needed_slot(model, self._n_slots)
        self._slot_bytes = max(needed, largest // share // 256 * 256)
        self.name = f"{policy}_{ring}"
        if hasattr(self._inner, "tiers"):
            self.tiers = self._inner.tiers

    def place(self, ctx: PolicyContext) -> Placement:
        def needs(placement: Placement) -> int:
            return ctx.needs(self._ringed(placement))

        def simulate(placement: Placement, n_prompt: int) -> Any:
            return ctx.simulate(self._ringed(placement), n_prompt)

        asked = replace(ctx, ask_needs=needs, ask_simulate=simulate)
        return self._ringed(self._inner.place(asked))

    def _ringed(self, placement: Placement) -> Placement:
        if placement.n_slots == 0:
            return placement
        return replace(placement, n_slots=self._n_slots, slot_bytes=self._slot_bytes)


Case = tuple[str, str, float, int, str]  # model, policy, share of the budget, context, ring
CASES: tuple[Case, ...] = tuple(itertools.product(SHAPES, POLICIES, SHARES, CONTEXTS, RINGS))


def pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(case), 2)}


def covering_pairs() -> list[Case]:
    """A few of the cases in which any two settings meet."""
    rng = np.random.default_rng(0)
    missing = set().union(*(pairs_of(case) for case in CASES))
    chosen = []
    while missing:
        some = [CASES[i] for i in rng.choice(len(CASES), 150, replace=False)]
        best = max(some, key=lambda case: len(pairs_of(case) & missing))
        if gained := pairs_of(best) & missing:
            missing -= gained
            chosen.append(best)
    return chosen


def cases() -> Iterator[Any]:
    """All of them, those that cover all pairs without the mark `long`."""
    short = set(covering_pairs())
    for case in CASES:
        model, policy, share, n_ctx, ring = case
        yield pytest.param(
            *case,
            id=f"{model}-{policy}-{share:.0%}-{n_ctx}-{ring}",
            marks=() if case in short else pytest.mark.long,
        )


class Matrix:
    """What cells are compared with: budgets of a model and context, and the logits where all of it is resident."""

    def __init__(self, models: dict[str, ps.Model]) -> None:
        self.models = models
        self._resident: dict[tuple[str, int], tuple[Logits, int, int]] = {}
        self.became: Counter[str] = Counter()

    def resident(self, name: str, n_ctx: int) -> tuple[Logits, int, int]:
        """Logits, what it needs, and the smallest budget."""
        key = (name, n_ctx)
        if key not in self._resident:
            with open_engine(self.models[name], n_ctx) as engine:
                assert set(engine.plan.places["decode"].values()) == {"vram"}
                logits, most = pass_by_pass(engine), engine.plan.needed_bytes
            with pytest.raises(ps.BudgetError) as info:
                open_engine(self.models[name], n_ctx, vram=0)
            least = info.value.smallest
            # has the weights read into host memory, where they stay as long as the model
            open_engine(self.models[name], n_ctx, vram=least).close()
            self._resident[key] = logits, most, least
        return self._resident[key]


@pytest.fixture(scope="module")
def matrix(models: dict[str, ps.Model]) -> Matrix:
    return Matrix(models)


def open_engine(model: ps.Model, n_ctx: int, **options: Any) -> ps.Engine:
    return ps.Engine(model, device="emu", n_ctx=n_ctx, threads=1, **options)


def pass_by_pass(engine: ps.Engine) -> Logits:
    """A prompt that fills most of the context, then passes of every smaller tier."""
    core = engine._core
    assert core is not None
    tokens = np.random.default_rng(11).integers(0, engine.n_vocab, engine.n_ctx).astype(np.int32)
    rows, at = [], 0
    for n in (engine.n_ctx - 24, 12, 5, 1, 1):
        rows.append(core.append_all(0, tokens[at : at + n]))
        at += n
    return np.concatenate(rows)


@pytest.mark.parametrize(("name", "policy", "share", "n_ctx", "ring"), list(cases()))
def test_matrix(
    matrix: Matrix, name: str, policy: str, share: float, n_ctx: int, ring: str
) -> None:
    """Logits as if all were resident, to the bit unless units are split: both sides have the same kernels here. VRAM
    within the budget, and as much of it as the plan said. Nothing stays behind."""
    expected, most, least = matrix.resident(name, n_ctx)
    held = held_memory()
    model, budget = matrix.models[name], int(least + share * (most - least))
    chosen = policy if ring == "own" else WithRing(policy, ring, model)
    try:
        engine = open_engine(model, n_ctx, vram=budget, policy=chosen)
    except ps.BudgetError as error:
        matrix.became["refused"] += 1
        assert error.budget == budget < error.needed
        assert error.smallest <= budget  # another policy would do
        assert policy != "auto"
        return
    with engine:
        matrix.became["ran"] += 1
        logits, stats = pass_by_pass(engine), engine.stats
        if any(
            isinstance(p, Split) for units in engine.plan.places.values() for p in units.values()
        ):
            # summed in another order, and then rounded to the 8 bits that kernels take inputs in
            assert np.sum((logits - expected) ** 2) < 1e-4 * np.sum(expected**2)
        else:
            assert np.array_equal(logits, expected)
        assert stats["peak_bytes"] == engine.plan.needed_bytes <= budget
        assert sum(stats["peak_bytes_by_kind"].values()) == stats["peak_bytes"]
    assert held_memory() == held


def held_memory() -> tuple[int, int]:
    gc.collect()  # errors and what they hold
    n_bytes, n_blocks, _ = _core._heap_stats()
    return n_bytes, n_blocks


def test_the_matrix_ran(matrix: Matrix) -> None:
    """Most of the cells before this test, that is; where some were picked by hand there is nothing to say."""
    if sum(matrix.became.values()) > 50:
        assert matrix.became["ran"] > 1.5 * matrix.became["refused"]


def test_all_pairs_are_covered() -> None:
    assert set(sched_policies._BUILT_IN) == set(POLICIES)
    chosen = covering_pairs()
    assert len(chosen) < 0.15 * len(CASES)
    for i, j in itertools.combinations(range(5), 2):
        met = {(case[i], case[j]) for case in chosen}
        assert met == {(case[i], case[j]) for case in CASES}

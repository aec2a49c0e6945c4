"""What page-locked host memory costs of the GPU's: an emulated one that takes memory for page tables, as a driver does,
never holds more than the budget, whatever the placement; and plans say how much that will be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_plans

import pipeshard as ps
from pipeshard import _core
from pipeshard.placement import Placement
from pipeshard.planner import Machine, Wishes, smallest_budget
from pipeshard.simulate import machine_of
from pipeshard.synth import synth
from pipeshard.synth_models import find_model

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
GIB = 1 << 30
RATE = GIB // 4  # much more than a driver takes, for models are small here
GRAIN, STREAMS = 2 << 20, 4 << 20  # which plans add: see ps_locked.h
PROMPT = list(range(5, 95))
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0}


def tables(locked_bytes: int, rate: int) -> int:
    """Bytes that an emulated GPU takes to reach so much locked memory."""
    return -(-(-(-locked_bytes // 4096) * rate) // (GIB // 4096))


def used(device: _core.Device) -> int:
    free, total = device.mem_info()
    return total - free


class Rig:
    """An engine of the core under a budget of just what its plan needs, or of `more`. `most`: of the device's memory
    that was seen in use, while loading and between passes."""

    def __init__(self, model: ps.Model, spec: dict[str, Any], more: int = 0, **device: Any) -> None:
        budget = _core.Plan(model._core, **spec).needed_bytes + more
        self.plan = _core.Plan(model._core, **(spec | {"budget_bytes": budget}))
        self.device = _core.Device(
            "emu",
            model._core,
            spec["n_ctx"],
            spec["chunk_tok"],
            threads=1,
            map_bytes_per_gib=spec["map_bytes_per_gib"],
            **device,
        )
        self.most = 0
        self.rate = spec["map_bytes_per_gib"]
        kinds = self.plan.bytes_by_kind
        self.carved = self.plan.needed_bytes - kinds["map"] - kinds["graph"]
        self.engine = _core.Engine(self.plan, self.device, check=True, progress=self.progress)
        self.look()

    def progress(self, *_: int) -> bool:
        self.look()
        return True

    def look(self) -> None:
        self.most = max(self.most, used(self.device))

    def run(self, tokens: list[int]) -> Any:
        found = self.engine.append_all(0, np.array(tokens, np.int32))
        self.look()
        return found

    def check(self) -> None:
        stats = self.engine.stats()
        assert stats["locked_bytes"] <= self.plan.locked_bytes
        # To the byte: no more tables than the plan reckons with, before it rounds up.
        assert self.most <= self.carved + tables(self.plan.locked_bytes, self.rate)
        assert self.most <= stats["peak_bytes"] <= self.plan.budget_bytes
        assert stats["peak_bytes_by_kind"]["map"] == self.plan.bytes_by_kind["map"]


@pytest.fixture(scope="module", params=["llama.q4_k_m", "qwen3moe.q4_k_m"])
def model(request: pytest.FixtureRequest) -> ps.Model:
    return ps.Model(GOLDEN / f"{request.param}.gguf")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    """A vocabulary that makes rows of logits heavy."""
    path = tmp_path_factory.mktemp("locked") / "wide.gguf"
    synth(find_model("tiny-llama"), path, fmt="q8_0", vocab=8192, progress=False)
    return ps.Model(path)


# ---- the bound ----


@pytest.mark.parametrize("seed", range(24))
def test_no_placement_takes_more_than_its_plan_says(model: ps.Model, seed: int) -> None:
    spec = random_plans.sound_spec(model, np.random.default_rng(seed))
    rig = Rig(model, spec | {"map_bytes_per_gib": GIB if seed % 2 else RATE})
    for n in (1, 40, 1, 1, 1, 7):
        rig.run(PROMPT[:n])
    rig.check()
    rig.engine.close()
    assert used(rig.device) == 0


def test_the_bound_is_near(model: ps.Model) -> None:
    """All that streams is locked, and so is a cache that the GPU reads; little else can be."""
    spec = random_plans.base_spec(model) | {
        "map_bytes_per_gib": GIB,
        "n_ctx": 1 << 16,
        "n_slots": 4,
        "slot_bytes": random_plans.needed_slot(model, 4) * 8,
        "kv_vram_tok": np.zeros(model.hparams["n_layer"], np.uint32),
    }
    spec["kinds"][:] = random_plans.STREAM
    rig = Rig(model, spec)
    stats, spaces = rig.engine.stats(), rig.plan.space_bytes
    assert stats["locked_bytes"] > spaces["host.kv"] + model.n_bytes > (32 << 20)
    never = 33 << 20  # a bounce ring, since all is locked
    assert rig.plan.locked_bytes - never < stats["locked_bytes"] * 1.05
    assert rig.most > tables(stats["locked_bytes"], GIB)
    rig.run(PROMPT)
    rig.check()


def test_the_device_needs_no_more_room_than_that(model: ps.Model) -> None:
    """One of just the plan's size refuses nothing, so nothing bounces."""
    spec = random_plans.base_spec(model) | {
        "map_bytes_per_gib": GIB,
        "n_slots": 4,
        "slot_bytes": random_plans.needed_slot(model, 4) * 8,
    }
    spec["kinds"][:] = random_plans.STREAM
    needed = _core.Plan(model._core, **spec).needed_bytes
    rig = Rig(model, spec, vram_capacity=needed)
    rig.run(PROMPT)
    rig.check()
    assert rig.engine.stats()["bounce_bytes"] == 0


def test_images_of_other_engines_cost_nothing(model: ps.Model) -> None:
    """One engine has all of the model in host memory, packed into few chunks; another streams one unit. It must not
    lock the chunk for that, of which its plan knows nothing."""
    opened = ps.Model(model.path)
    first = ps.Engine(opened, device="host", n_ctx=256, threads=1)
    spec = random_plans.base_spec(opened) | {
        "map_bytes_per_gib": GIB,
        "n_slots": 4,
        "slot_bytes": random_plans.needed_slot(opened, 4) * 8,
    }
    spec["kinds"][:] = random_plans.VRAM
    unit = next(u for u in opened.units if u.kind == "attn")
    spec["kinds"][:, opened.unit_index[unit.name]] = random_plans.STREAM
    rig = Rig(opened, spec)
    logits = rig.run(PROMPT)
    rig.check()
    images = rig.engine.stats()["locked_bytes"] - rig.plan.space_bytes["host.batch"]
    assert unit.n_bytes <= images < opened.n_bytes // 2
    assert rig.engine.stats()["bounce_bytes"] == 0
    assert np.allclose(logits, first.logits(PROMPT), atol=1e-3)
    first.close()


def test_more_rows_of_logits_are_charged_or_done_without(wide: ps.Model) -> None:
    """All logits of a prompt want more room for rows than a plan has, in as large steps as are to be had."""
    spec = random_plans.base_spec(wide) | {
        "map_bytes_per_gib": GIB,
        "n_ctx": 1024,
        "chunk_tok": 512,
        "pass_tok": 512,
    }
    tokens = [i % 200 for i in range(512)]
    rows = 512 * wide.hparams["n_vocab"] * 4
    assert rows > 2 * (GRAIN + STREAMS)
    rig = Rig(wide, spec)
    tight = rig.run(tokens)
    stats = rig.engine.stats()
    assert stats["n_passes"] > 1
    assert rig.most <= stats["peak_bytes"] <= rig.plan.budget_bytes
    rig.engine.close()
    free = Rig(wide, spec, more=2 * rows)
    assert np.allclose(free.run(tokens), tight, atol=1e-3)
    stats = free.engine.stats()
    assert stats["n_passes"] == 1
    assert stats["peak_bytes_by_kind"]["map"] > free.plan.bytes_by_kind["map"]
    assert free.most <= stats["peak_bytes"] <= free.plan.budget_bytes


def test_many_sequences_have_their_rows(wide: ps.Model) -> None:
    """More than there are rows of logits at once: a step must not fail for want of them."""
    n_seq = 300
    spec = random_plans.base_spec(wide) | {
        "map_bytes_per_gib": GIB,
        "n_ctx": 64,
        "n_seq": n_seq,
        "chunk_tok": n_seq,
        "pass_tok": n_seq,
        "logit_rows": 256,
    }
    rig = Rig(wide, spec)
    rig.engine.step(np.arange(n_seq, dtype=np.int32), np.full(n_seq, 7, np.int32))
    rig.look()
    rig.check()


# ---- in the plan ----


def test_plans_say_it_and_keep_it(model: ps.Model, tmp_path: Path) -> None:
    device = ps.EmuDevice(map_bytes_per_gib=RATE)
    with ps.Engine(model, device=device, vram=model.n_bytes // 2 + (40 << 20), n_ctx=256) as engine:
        plan = engine.plan
    assert plan.map_bytes_per_gib == RATE
    assert plan.bytes["map"] % GRAIN == 0
    assert plan.bytes["map"] >= STREAMS + GRAIN
    assert f"  {'map':<8}" in plan.explain()
    path = tmp_path / "plan.json"
    plan.save(path)
    assert ps.Plan.load(path) == plan
    data = json.loads(path.read_text())
    del data["map_bytes_per_gib"]  # as plans were before
    path.write_text(json.dumps(data))
    assert ps.Plan.load(path).map_bytes_per_gib == 0
    # The device at hand says what it takes, not the file.
    with ps.Engine(model, device=device, vram="1GiB", plan=path) as engine:
        assert engine.plan.bytes["map"] == plan.bytes["map"]
    with pytest.raises(ps.BudgetError):
        ps.Engine(model, device=device, plan=path, vram=plan.needed_bytes - plan.bytes["map"])
    with ps.Engine(model, device="emu", plan=path, vram="1GiB") as engine:
        assert engine.plan.bytes["map"] == 0
    data["map_bytes_per_gib"] = GIB + 1
    path.write_text(json.dumps(data))
    with pytest.raises(ps.FormatError) as info:
        ps.Plan.load(path)
    assert info.value.field == "map_bytes_per_gib"


def test_rates_that_cannot_be_are_refused(model: ps.Model) -> None:
    spec = random_plans.base_spec(model)
    with pytest.raises(ps.PlanError, match="map_bytes_per_gib"):
        _core.Plan(model._core, **(spec | {"map_bytes_per_gib": GIB + 1}))
    with pytest.raises(ps.RequestError):
        _core.Device("emu", model._core, 64, 64, map_bytes_per_gib=GIB + 1)
    host = spec | {"map_bytes_per_gib": GIB, "accelerator": False}
    assert _core.Plan(model._core, **host).bytes_by_kind["map"] == 0


def test_what_a_machine_takes() -> None:
    assert Machine.of("host") == Machine(accelerator=False)
    assert Machine.of("emu") == Machine(accelerator=True)
    assert Machine.of("emu", emu=ps.EmuDevice(map_bytes_per_gib=7)).map_bytes_per_gib == 7
    cuda = Machine.of("cuda", 89)
    assert (cuda.sm, cuda.graph_reserve_bytes, cuda.map_bytes_per_gib) == (89, 32 << 20, 2 << 20)
    sheet = ps.Profile.load("rtx4060-laptop-datasheet.json")
    assert machine_of(sheet).map_bytes_per_gib == 2 << 20


def test_locked_gigabytes_cost_what_was_measured() -> None:
    """8 bytes a page of 4 KiB, beside 4 MiB for streams: 16.77 GB of weights took 35 MiB of an H200."""
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf")
    spec = random_plans.base_spec(model) | {
        "map_bytes_per_gib": 2 << 20,
        "n_ctx": 1 << 20,
        "n_seq": 8,
        "n_slots": 4,
        "slot_bytes": random_plans.needed_slot(model, 4) * 8,
        "kv_vram_tok": np.zeros(model.hparams["n_layer"], np.uint32),
    }
    spec["kinds"][:] = random_plans.STREAM
    plan = _core.Plan(model._core, **spec)
    locked = plan.locked_bytes
    assert locked > plan.space_bytes["host.kv"] >= 2 * GIB
    exact = locked * (2 << 20) / GIB + STREAMS
    assert exact <= plan.bytes_by_kind["map"] <= exact + GRAIN


# ---- engines ----


@pytest.mark.parametrize("policy", ["auto", "paper", "even_split", "shard_attn"])
def test_policies_find_room_for_it(model: ps.Model, policy: str) -> None:
    """Putting a unit into VRAM takes less for page tables: whatever they reckon, the budget holds."""
    device = ps.EmuDevice(map_bytes_per_gib=RATE)
    options: dict[str, Any] = {"device": device, "policy": policy, "n_ctx": 256, "threads": 1}
    with pytest.raises(ps.BudgetError) as info:
        ps.Engine(model, vram=0, **options)
    least = info.value.smallest
    budgets = [n << 20 for n in (16, 20, 32)]
    if policy == "auto":
        wishes = Wishes(0, 256, 1, "f16")
        assert least == smallest_budget(model, Machine.of("emu", emu=device), wishes)
        with pytest.raises(ps.BudgetError):
            ps.Engine(model, vram=least - 1, **options)
        budgets += [least, least + model.n_bytes // 3, least + model.n_bytes]
    for budget in budgets:
        with ps.Engine(model, vram=budget, **options) as engine:
            engine.generate(PROMPT, **GREEDY)
            stats = engine.stats
            assert used(engine._open_device) <= stats["peak_bytes"] <= budget
            assert stats["peak_bytes_by_kind"]["map"] == engine.plan.bytes["map"] > STREAMS


def test_budgets_change_with_it(model: ps.Model) -> None:
    budgets = [n << 20 for n in (16, 12, 20, 11)]
    device = ps.EmuDevice(map_bytes_per_gib=RATE, vram_capacity=max(budgets))
    expected = None
    with ps.Engine(model, device=device, vram=budgets[0], n_ctx=256, threads=1) as engine:
        for budget in budgets:
            engine.set_budget(budget)
            text = engine.generate(PROMPT, **GREEDY)
            expected = expected or text
            assert text == expected
            assert used(engine._open_device) <= engine.stats["peak_bytes"] <= budget


def test_limits_leave_the_charge(model: ps.Model) -> None:
    """What an executor may not lock was charged nevertheless: plans know no limits."""
    device = ps.EmuDevice(map_bytes_per_gib=GIB)
    placement = Placement.everywhere({u.name: "stream" for u in model.units})
    options: dict[str, Any] = {"device": device, "vram": "256MiB", "n_ctx": 256}
    found = []
    for limit in (None, 700_000):
        with ps.Engine(
            model, policy=lambda ctx: streamed(ctx, placement), locked_limit=limit, **options
        ) as engine:
            engine.generate(PROMPT, **GREEDY)
            found.append((engine.stats["peak_bytes_by_kind"]["map"], used(engine._open_device)))
    assert found[0][0] == found[1][0]
    assert found[0][1] > found[1][1]


def streamed(ctx: Any, placement: Placement) -> Placement:
    slot = max(-(-unit.n_bytes // 256) * 256 for unit in ctx.units)
    return Placement(placement.places, n_slots=4, slot_bytes=slot)

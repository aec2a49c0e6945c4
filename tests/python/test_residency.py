"""Tiers with residents of their own: passes of another tier first bring in what they lack, as copies that are counted,
checked, traced and predicted; and neither a failure on the way nor another budget leaves a wrong weight behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import Placement, PolicyContext, Split, _core
from pipeshard.measure import Meter
from pipeshard.placement import TIERS, Place
from pipeshard.synth import synth

N_LAYER = 12
N_CTX = 256
SHAPES = {"dense": "tiny-llama", "moe": "tiny-qwen3moe"}
SMALL = ("decode", "verify")  # tiers that keep the first layers; the others keep the last
PROMPT = np.random.default_rng(3).integers(0, 512, 70).astype(np.int32)
TOKEN = PROMPT[:1]
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}

Choice = Callable[[ps.Unit, bool], Place]


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    synth(SHAPES[request.param], path, layers=N_LAYER, progress=False)
    return ps.Model(path)


def halves(unit: ps.Unit, small: bool) -> Place:
    """Attention always; of the rest the first layers where few tokens pass, the last where many do."""
    if unit.kind == "attn" or unit.layer is None:
        return "vram"
    return "vram" if (unit.layer < N_LAYER // 2) == small else "cpu" if small else "stream"


def parts(unit: ps.Unit, small: bool) -> Place:
    """Of what can be split, other shares; of experts, others, some of them in both; one tier has the head."""
    if unit.kind in ("attn", "ffn"):
        return Split(vram=0.25 if small else 0.75, stream=0.0 if small else 0.25)
    if unit.expert is not None:
        return "vram" if unit.expert % 3 != int(small) else "stream"
    return "vram" if small or unit.kind == "router" else "cpu"


def nested(unit: ps.Unit, small: bool) -> Place:
    """Few tokens find all that they want among what many want."""
    if unit.kind == "attn" or unit.layer is None:
        return "vram"
    return "vram" if unit.layer < (3 if small else 9) else "cpu"


def placement(units: tuple[ps.Unit, ...], choose: Choice) -> Placement:
    tables = {small: {unit.name: choose(unit, small) for unit in units} for small in (True, False)}
    return Placement(
        places={tier.name: tables[tier.name in SMALL] for tier in TIERS},
        n_slots=6,
        slot_bytes=128 << 10,
        per_tier_residency=True,
    )


def policy_of(choose: Choice) -> Callable[[PolicyContext], Placement]:
    return lambda ctx: placement(ctx.units, choose)


def make_plan(model: ps.Model, choose: Choice, **options: Any) -> ps.Plan:
    """Under a budget of just what it needs."""
    options = {"device": "emu", "n_ctx": N_CTX, "threads": 1} | options
    with ps.Engine(model, vram=1 << 30, policy=policy_of(choose), **options) as engine:
        return replace(engine.plan, budget_bytes=engine.plan.needed_bytes)


def open_engine(model: ps.Model, plan: ps.Plan, device: Any = "emu", **options: Any) -> ps.Engine:
    return ps.Engine(model, device=device, plan=plan, threads=1, **options)


def everywhere(unit: ps.Unit, small: bool) -> Place:
    return "vram"


def brought(model: ps.Model, plan: ps.Plan, small: bool) -> int:
    """Bytes of whole units that are resident for one class of passes and not for the other."""
    mine, others = (
        plan.places["decode" if small else "batch"],
        plan.places["batch" if small else "decode"],
    )
    return sum(
        unit.n_bytes for unit in model.units if mine[unit.name] == "vram" != others[unit.name]
    )


def copied(core: _core.Plan, n_tok: int, held: int = -1) -> int:
    """Bytes that such a pass copies in."""
    ticks = core.ticks(n_tok, held=held)
    return int(ticks["n_bytes"][ticks["kind"] == core.tick_names()[0].index("copy_in")].sum())


def core_of(engine: ps.Engine) -> _core.Engine:
    assert engine._core is not None
    return engine._core


def checked_engine(model: ps.Model, plan: ps.Plan, variant: str, **device: Any) -> _core.Engine:
    """Every list is proved before it runs."""
    if variant:
        device["cpu_variant"] = variant
    opened = _core.Device("emu", model._core, N_CTX, plan.chunk_tok, threads=1, **device)
    return _core.Engine(plan.bind(model), opened, check=True)


def talk(core: _core.Engine, n_tok: int = 40) -> list[Any]:
    """Prompts and single tokens by turns; what each gave."""
    core.truncate(0, 0)
    found = []
    for tokens in (
        PROMPT[:n_tok],
        TOKEN,
        TOKEN,
        PROMPT[:20],
        TOKEN,
        PROMPT[:9],
        PROMPT[:10],
        TOKEN,
    ):
        core.append(0, tokens)
        assert core.logits is not None
        found.append(core.logits.copy())
    return found


@pytest.mark.parametrize(("choose", "kv"), [(halves, "f16"), (parts, "f16"), (nested, "q8_0")])
def test_logits_are_those_of_one_residency(model: ps.Model, choose: Choice, kv: str) -> None:
    n_tok = 12 if choose is parts else 70
    variant = "ref" if choose is parts else ""  # others round what each share of a unit reads
    expected = talk(checked_engine(model, make_plan(model, everywhere, kv=kv), variant), n_tok)
    plan = make_plan(model, choose, kv=kv)
    engine = checked_engine(model, plan, variant, seed=5, delays=choose is nested)
    for _ in range(1 if choose is parts else 2):
        for got, want in zip(talk(engine, n_tok), expected, strict=True):
            if choose is parts:  # the shares of a unit are summed one after the other
                assert np.sum((got - want) ** 2) < 1e-8 * np.sum(want**2)
            else:
                assert np.array_equal(got, want)
    stats = engine.stats()
    assert stats["peak_bytes"] <= plan.budget_bytes
    assert stats["peak_bytes_by_kind"]["weights"] == plan.bytes["weights"]


def test_every_byte_of_a_switch_is_counted(model: ps.Model) -> None:
    plan = make_plan(model, halves)
    bound = plan.bind(model)
    assert bound.n_residencies == 2
    to_many, to_few = brought(model, plan, False), brought(model, plan, True)
    assert copied(bound, 70, 0) - copied(bound, 70) == to_many > 0
    assert copied(bound, 1, 1) - copied(bound, 1) == to_few > 0
    # after a failure all that is not in both
    assert copied(bound, 70, 2) == copied(bound, 70, 0)
    attn = sum(u.n_bytes for u in model.units if u.kind == "attn" or u.layer is None)
    assert 0 <= plan.bytes["weights"] - attn - max(to_many, to_few) < 256 * len(model.units)
    with open_engine(model, plan) as engine:
        core, held = core_of(engine), 0
        assert core.stats()["h2d_bytes"] == 0  # what is there from the start came at open
        for n_tok in (1, 70, 70, 1, 1, 5, 30, 1):
            before = core.stats()["h2d_bytes"]
            core.append(0, PROMPT[:n_tok])
            assert core.stats()["h2d_bytes"] - before == copied(bound, n_tok, held)
            assert (held == (n_tok > 8)) == (copied(bound, n_tok, held) == copied(bound, n_tok))
            held = bound.held_after(held, n_tok)


def test_what_is_there_is_not_brought_again(model: ps.Model) -> None:
    """Single tokens find theirs among a prompt's, at the same addresses; so the next prompt finds its own, too."""
    plan = make_plan(model, nested)
    bound = plan.bind(model)
    with open_engine(model, plan) as engine:
        core = core_of(engine)
        for n_tok, switch in ((1, 0), (70, brought(model, plan, False)), (1, 0), (70, 0), (1, 0)):
            before = core.stats()["h2d_bytes"]
            core.append(0, PROMPT[:n_tok])
            assert core.stats()["h2d_bytes"] - before - copied(bound, n_tok) == switch
    run = [bound.held_after(held, n_tok) for held, n_tok in ((0, 70), (1, 1), (2, 1), (2, 70))]
    assert run == [1, 1, 2, 1]


def test_ticks_of_a_switch(model: ps.Model) -> None:
    """In the order in which layers need them, and in no pass that finds its own."""
    plan = make_plan(model, halves)
    bound = plan.bind(model)
    assert "found" not in bound.lower(1)
    assert bound.lower(1) == bound.lower(1, held=0)
    text = bound.lower(1, held=1)
    assert text.splitlines()[0].endswith(" found=1")
    names = [
        line.rsplit("[", 1)[1].rstrip("]")
        for line in text.splitlines()
        if "copy_in" in line and " weights+" in line.split("<-")[0]
    ]
    layers = [int(name.split(".")[1]) for name in names]
    assert layers == sorted(layers)
    assert set(layers) == set(range(N_LAYER // 2))
    with pytest.raises(ValueError, match="residencies"):
        bound.lower(1, held=3)


@pytest.mark.parametrize("kind", ["copy", "launch", "sync"])
def test_a_switch_that_fails_is_made_up_for(model: ps.Model, kind: str, heap: None) -> None:
    """Wherever it fails: the sequence is as before, and both tiers find what they want afterwards."""
    plan = make_plan(model, halves)
    steps = (PROMPT, TOKEN, PROMPT[:30], TOKEN)
    with open_engine(model, plan) as engine:
        core, expected = core_of(engine), []
        for tokens in steps:
            core.append(0, tokens)
            assert core.logits is not None
            expected.append(core.logits.copy())
    met = 0
    few = len(model.units) // 4  # of the calls, some in every part of every pass
    for after in itertools.count(0, {"copy": few + 1, "launch": 3 * few + 1}.get(kind, 1)):
        try:
            engine = open_engine(model, plan, ps.EmuDevice(faults=((kind, after),)))
        except ps.DeviceError:
            continue
        with engine:
            core, failed = core_of(engine), False
            for tokens, want in zip(steps, expected, strict=True):
                before = core.length(0)
                try:
                    core.append(0, tokens)
                except ps.DeviceError as error:
                    assert not error.fatal
                    assert core.length(0) == before
                    failed = True
                    if after % 2:  # the other tier goes first
                        core.append(0, TOKEN if len(tokens) > 1 else PROMPT[:30])
                        core.truncate(0, before)
                    core.append(0, tokens)
                assert np.array_equal(core.logits, want)
            assert engine.stats["peak_bytes"] <= plan.budget_bytes
        met += failed
        if not failed:
            break
    assert met >= (1 if kind == "sync" else 3)


def test_another_budget_on_the_way(model: ps.Model) -> None:
    """With the same policy: its residents are others, and the text is what it would have been."""

    def by_budget(ctx: PolicyContext) -> Placement:
        rich = placement(ctx.units, halves)
        return rich if ctx.fits(rich) else placement(ctx.units, poor)

    def poor(unit: ps.Unit, small: bool) -> Place:
        return halves(unit, small) if (unit.layer or 0) % 2 == 0 else "cpu"

    options: dict[str, Any] = {"device": "emu", "n_ctx": N_CTX, "threads": 1, "policy": by_budget}
    prompt, many = PROMPT.tolist(), make_plan(model, halves).needed_bytes
    few = make_plan(model, poor).needed_bytes
    with ps.Engine(model, vram=many, **options) as engine:
        text = engine.generate(prompt, **GREEDY)
    assert few < many
    with ps.Engine(model, vram=many, **options) as engine:
        got = []
        for i, piece in enumerate(engine.stream(prompt, **GREEDY)):
            got.append(piece)
            if i in (1, 3):
                engine.set_budget(few if i == 1 else many)
        assert "".join(got) == text
        for budget in (few, many, few):
            engine.set_budget(budget)
            assert engine.generate(prompt, **GREEDY) == text
            assert engine.stats["vram_bytes"] <= budget
            assert engine.plan.placement.per_tier_residency


def test_a_trace_shows_it(model: ps.Model) -> None:
    plan = make_plan(model, halves)
    with open_engine(model, plan, trace=True) as engine:
        core = core_of(engine)
        for tokens in (PROMPT, TOKEN, TOKEN):
            core.append(0, tokens)
        trace = engine.trace()
        bound = plan.bind(model)
        copy_in = bound.tick_names()[0].index("copy_in")
        for row, n_tok, held in zip(trace.passes, (70, 1, 1), (0, 1, 0), strict=True):
            ticks = trace.ticks[row["first_tick"] :][: row["n_ticks"]]
            ticks = ticks[ticks["kind"] == copy_in]
            assert ticks["bytes"].sum() == copied(bound, n_tok, held)
            there, before = (
                plan.places["decode" if n == 1 else "batch"] for n in (n_tok, 71 - n_tok)
            )
            came = {model.units[i].name for i in ticks["unit"] if i >= 0}
            came = {name for name in came if there[name] == "vram"}  # the others are streamed
            assert bool(came) == (bound.held_after(held, n_tok) != held)
            assert all(before[name] != "vram" for name in came)


@pytest.mark.parametrize("limit", ["locked_limit", "ram_limit"])
def test_less_host_memory(model: ps.Model, limit: str) -> None:
    """What comes and goes needs a host copy; where there is no room for it, it comes from disk."""
    plan = make_plan(model, halves)
    with open_engine(model, plan) as engine:
        expected, all_of_it = talk(core_of(engine)), engine.stats
    images = sum(
        u.n_bytes
        for u in model.units
        if {plan.places[tier][u.name] for tier in ("decode", "batch")} != {"vram"}
    )
    assert all_of_it["ram_bytes"] >= images
    assert all_of_it["locked_bytes"] >= images  # streamed in one tier, or brought in
    assert all_of_it["bounce_bytes"] == 0
    at_most = all_of_it["locked_bytes" if limit == "locked_limit" else "ram_bytes"] - images // 4
    with open_engine(model, plan, **{limit: at_most}) as engine:
        for got, want in zip(talk(core_of(engine)), expected, strict=True):
            assert np.array_equal(got, want)
        stats = engine.stats
        assert stats["bounce_bytes"] > 0
        assert stats["locked_bytes" if limit == "locked_limit" else "ram_bytes"] <= at_most
        assert stats["h2d_bytes"] == all_of_it["h2d_bytes"]


# ---- predicted as it is measured ----


@pytest.mark.parametrize(("choose", "n_gen"), [(halves, 2), (halves, 12), (nested, 12)])
def test_predicted_times_have_the_switches(model: ps.Model, choose: Choice, n_gen: int) -> None:
    rates = {"h2d_bytes_per_s": 2e9}  # so that switches are most of it
    device = ps.EmuDevice(profile=rates)
    options: dict[str, Any] = {"n_ctx": N_CTX, "threads": 1, "policy": policy_of(choose)}
    with ps.Engine(model, device=device, vram=1 << 30, **options) as engine:
        meter = Meter(engine)
        for _ in range(2):
            meter.run(len(PROMPT), n_gen)
        stats = engine.stats
    assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.03)
    assert stats["predicted_tps"] == pytest.approx(stats["tps"], rel=0.03)
    run = ps.simulate(
        model, vram=1 << 30, profile=device, n_prompt=len(PROMPT), n_gen=n_gen, **options
    )
    assert run.ttft_s == pytest.approx(stats["ttft_s"], rel=0.03)
    if choose is halves:
        bus_s = brought(model, run.plan, True) / 2e9
        assert 1 / run.tps > bus_s / (n_gen - 1)
        assert run.decode["h2d"] > 0.5 * bus_s / (n_gen - 1)
        longer = ps.simulate(model, vram=1 << 30, profile=device, n_prompt=70, n_gen=150, **options)
        assert longer.tps > run.tps  # the more tokens share the way back


@pytest.mark.parametrize("share", [0.25, 0.3])
def test_paper_gives_tiers_their_own(model: ps.Model, share: float) -> None:
    """On a machine where prompts and single tokens want different things; and it runs as it says."""
    rates = {"h2d_bytes_per_s": 4e9, "d2h_bytes_per_s": 4e9, "vram_bytes_per_s": 400e9}
    rates |= {"dram_bytes_per_s": 20e9, "gpu_flops": 1e13, "cpu_flops": 1e10}
    rates |= dict.fromkeys(("launch_ns", "copy_ns", "flag_ns"), 100.0)
    device = ps.EmuDevice(profile=rates)
    budget = int(share * make_plan(model, everywhere).needed_bytes)
    options: dict[str, Any] = {"n_ctx": N_CTX, "threads": 1, "vram": budget, "device": device}
    with ps.Engine(model, policy="paper", **options) as engine:
        assert engine.plan.placement.per_tier_residency
        assert engine.plan.bind(model).n_residencies > 1
        meter = Meter(engine)
        for _ in range(2):
            meter.run(len(PROMPT), 8)
        stats, expected = engine.stats, engine.logits(PROMPT)
    assert stats["peak_bytes"] <= budget
    assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.03)
    assert stats["predicted_tps"] == pytest.approx(stats["tps"], rel=0.03)
    with open_engine(model, make_plan(model, everywhere)) as engine:
        assert np.array_equal(engine.logits(PROMPT), expected)


# ---- as data ----


def test_a_plan_says_so(model: ps.Model, tmp_path: Path) -> None:
    plan = make_plan(model, halves)
    assert "residents of their own" in plan.explain()
    plan.save(tmp_path / "plan.json")
    again = ps.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.placement.per_tier_residency
    assert plan.diff(again) == ""
    without = replace(plan, placement=replace(plan.placement, per_tier_residency=False))
    assert "per_tier_residency: false" in plan.diff(without)
    assert "residents of their own" not in without.explain()
    with pytest.raises(ps.PlanError, match="same in all tiers") as info:
        without.bind(model)
    assert info.value.unit
    assert info.value.tier == "small"


def test_the_flag_alone_changes_nothing(model: ps.Model) -> None:
    """Tiers that want the same share one residency."""
    plan = make_plan(model, lambda unit, small: halves(unit, True))
    alone = replace(plan, placement=replace(plan.placement, per_tier_residency=False))
    flagged, plain = plan.bind(model), alone.bind(model)
    assert flagged.n_residencies == 1
    assert flagged.needed_bytes == plain.needed_bytes
    assert flagged.homes == plain.homes
    for n_tok in (1, 20, 100):
        assert flagged.lower(n_tok) == plain.lower(n_tok) == flagged.lower(n_tok, held=0)

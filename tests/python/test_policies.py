"""Policies on contexts made by hand: what each is defined to do, within any budget, without touching its context; and
the ways to bring one's own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import sched_policies
from pipeshard.placement import TIERS, NumberedPlaces, Place, Placement, Split, Unit
from pipeshard.sched_policies.base import PolicyContext, Prediction, same_in_all, vram_share

MIB = 1 << 20
N_CTX = 1024
SCRATCH = 5 * MIB
H2D, CPU, GPU = 20e9, 40e9, 400e9  # bytes a second of the machine that these contexts are about

BUILT_IN = (
    "full_gpu",
    "full_gpu_no_output",
    "static_attn",
    "shard_attn",
    "full_shard",
    "paper",
    "layer_split",
    "experts_cpu",
    "even_split",
)


# ---- models and a machine ----


def unit(name: str, kind: str, layer: int | None, n_bytes: int, **other: Any) -> Unit:
    values = {"expert": None, "n_rows": 64, "row_step": 1, "kv_bytes_per_tok": 0, "use": 1.0}
    return Unit(name=name, kind=kind, layer=layer, n_bytes=n_bytes, **(values | other))


def dense(n_layer: int = 6) -> tuple[Unit, ...]:
    units = [unit("embed", "embed", None, 20 * MIB)]
    for i in range(n_layer):
        units.append(unit(f"blk.{i}.attn", "attn", i, 4 * MIB + 40, kv_bytes_per_tok=1024))
        units.append(unit(f"blk.{i}.ffn", "ffn", i, 12 * MIB + 8))
    return (*units, unit("head", "head", None, 21 * MIB))


def mixture(n_layer: int = 5, n_expert: int = 8) -> tuple[Unit, ...]:
    units = [unit("embed", "embed", None, 20 * MIB)]
    for i in range(n_layer):
        units.append(unit(f"blk.{i}.attn", "attn", i, 4 * MIB, kv_bytes_per_tok=1024))
        units.append(unit(f"blk.{i}.router", "router", i, MIB // 4))
        units += [
            unit(f"blk.{i}.expert.{e}", "expert", i, 3 * MIB, expert=e, n_rows=1, use=2 / n_expert)
            for e in range(n_expert)
        ]
    return (*units, unit("head", "head", None, 21 * MIB))


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // 256) * 256


def needs(units: tuple[Unit, ...], placement: Placement) -> int:
    """As the core would count: the residents of the tier with most, KV where attention is on the GPU, ring, scratch."""
    total, streams = SCRATCH, False
    tiers = placement.places.values()
    total += max(
        sum(aligned(int(vram_share(places[one.name]) * one.n_bytes)) for one in units)
        for places in tiers
    )
    for one in units:
        places = [places[one.name] for places in tiers]
        streams = streams or any(
            place == "stream" or (isinstance(place, Split) and place.stream > 0) for place in places
        )
        if all(place != "cpu" for place in places):
            total += one.kv_bytes_per_tok * N_CTX
    return total + (placement.n_slots * placement.slot_bytes if streams else 0)


def seconds(units: tuple[Unit, ...], places: Mapping[str, Place], n_tok: int) -> float:
    copy = compute = 0.0
    for one in units:
        place = places[one.name]
        touched = 1 - (1 - one.use) ** n_tok
        shares = (place.vram, place.stream) if isinstance(place, Split) else (0.0, 0.0)
        streams = 1.0 if place == "stream" else shares[1]
        on_cpu = 1.0 - sum(shares) if isinstance(place, Split) else float(place == "cpu")
        copy += streams * one.n_bytes / H2D
        compute += on_cpu * touched * one.n_bytes * max(1.0, n_tok / 10) / CPU
        compute += (1 - on_cpu) * touched * one.n_bytes * max(1.0, n_tok / 1000) / GPU
    return max(copy, compute) + 1e-6


def context(units: tuple[Unit, ...], budget: int, **other: Any) -> PolicyContext:
    def simulate(placement: Placement, n_prompt: int) -> Prediction:
        places = list(placement.places.values())
        ttft = seconds(units, places[-1 if n_prompt > 64 else 0], n_prompt)
        tps = 1 / seconds(units, places[0], 1)
        return Prediction(ttft, ttft, ttft, tps, tps, tps, 0.0, 1e9)

    values: dict[str, Any] = {
        "tiers": TIERS,
        "n_ctx": N_CTX,
        "ask_needs": lambda placement: needs(units, placement),
        "ask_simulate": simulate,
    }
    return PolicyContext(units=units, budget_bytes=budget, **(values | other))


MODELS: dict[str, tuple[Unit, ...]] = {"dense": dense(), "mixture": mixture()}
ALL = {
    name: needs(units, Placement.everywhere({u.name: "vram" for u in units}))
    for name, units in MODELS.items()
}
BUDGETS = (0.0, 0.08, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99, 1.0, 2.0)


def place(name: str, ctx: PolicyContext) -> Placement:
    return sched_policies.decide(sched_policies.get(name), ctx)


def cells() -> Iterator[tuple[str, str, float]]:
    for policy in BUILT_IN:
        for model in MODELS:
            for share in BUDGETS:
                yield policy, model, share


def residents(placement: Placement) -> set[str]:
    places = next(iter(placement.places.values()))
    return {name for name, where in places.items() if where == "vram"}


def where(placement: Placement, tier: str, *words: str) -> set[str]:
    """Places of the units whose names have all the words."""
    return {
        str(where)
        for name, where in placement.places[tier].items()
        if all(w in name for w in words)
    }


# ---- what holds for all ----


@pytest.mark.parametrize(("policy", "model", "share"), list(cells()))
def test_any_budget(policy: str, model: str, share: float) -> None:
    """Never over budget, every unit placed once a tier, the context as before, the same answer twice."""
    units = MODELS[model]
    ctx = context(units, int(share * ALL[model]))
    if policy == "paper":
        ctx = replace(ctx, tiers=sched_policies.get("paper").tiers(N_CTX, 1))  # type: ignore[attr-defined]
    before = repr(ctx)
    try:
        placement = place(policy, ctx)
    except ps.BudgetError as error:
        no_room = error
    else:
        no_room = None
    if no_room is not None:
        assert no_room.needed > no_room.budget == ctx.budget_bytes
        assert share < 1
        return
    assert needs(units, placement) <= ctx.budget_bytes
    assert set(placement.places) == {tier.name for tier in ctx.tiers}
    for places in placement.places.values():
        assert set(places) == {one.name for one in units}
    assert repr(ctx) == before
    assert place(policy, ctx) == placement
    if not placement.per_tier_residency:
        assert (
            len(
                {
                    frozenset(n for n, w in p.items() if w == "vram")
                    for p in placement.places.values()
                }
            )
            == 1
        )


@pytest.mark.parametrize(
    ("policy", "model"),
    [
        (policy, model)
        for policy in ("static_attn", "shard_attn", "full_shard", "layer_split", "experts_cpu")
        for model in MODELS
        if (policy, model) != ("experts_cpu", "dense")
    ],
)
def test_n_is_maximal(policy: str, model: str) -> None:
    """One byte less than a placement needs makes for a smaller one; never does more budget make for fewer residents."""
    units = MODELS[model]
    sizes: dict[int, int] = {}
    for budget in range(0, ALL[model] + MIB, 3 * MIB):
        try:
            placement = place(policy, context(units, budget))
        except ps.BudgetError:
            continue
        resident = sum(one.n_bytes for one in units if one.name in residents(placement))
        needed = needs(units, placement)
        sizes[needed] = resident
        assert place(policy, context(units, needed)) == placement
        with contextlib.suppress(ps.BudgetError):
            assert place(policy, context(units, needed - 1)) != placement
    assert len(sizes) > 3
    # within one kind of placement; where all attention fits, shard_attn changes its slot
    if policy != "shard_attn":
        assert [sizes[n] for n in sorted(sizes)] == sorted(sizes.values())


def test_most_finds_the_edge() -> None:
    units = tuple(unit(f"u{i}", "ffn", i, 256 * (1 + (i * 7) % 13)) for i in range(200))
    questions = 0

    def ask(placement: Placement) -> int:
        nonlocal questions
        questions += 1
        return needs(units, placement)

    from pipeshard.sched_policies.base import most, place_units, same_in_all

    worst = 0
    for budget in range(SCRATCH, SCRATCH + 400_000, 1771):
        questions = 0
        ctx = context(units, budget, ask_needs=ask)

        def first(n: int, ctx: PolicyContext = ctx) -> Placement:
            return same_in_all(ctx, place_units(ctx, vram=units[:n]))

        n = most(ctx, len(units), first)
        worst = max(worst, questions)
        assert needs(units, first(n)) <= budget
        assert n == len(units) or needs(units, first(n + 1)) > budget
    assert worst <= 12
    with pytest.raises(ps.BudgetError):
        most(context(units, SCRATCH - 1), 3, lambda n: first(n))


# ---- what each is ----


def test_full_gpu() -> None:
    for model, units in MODELS.items():
        placement = place("full_gpu", context(units, ALL[model]))
        assert where(placement, "decode") == {"vram"}
        with pytest.raises(ps.BudgetError):
            place("full_gpu", context(units, ALL[model] - 1))


def test_full_gpu_no_output() -> None:
    for model, units in MODELS.items():
        placement = place("full_gpu_no_output", context(units, ALL[model] - 41 * MIB))
        assert where(placement, "prefill", "blk.") == {"vram"}
        assert where(placement, "prefill", "e") >= {"cpu"}
        assert {placement.places["decode"][name] for name in ("embed", "head")} == {"cpu"}


def test_static_attn_dense() -> None:
    units = MODELS["dense"]
    some = place("static_attn", context(units, SCRATCH + 3 * (5 * MIB + 256)))
    assert residents(some) == {f"blk.{i}.attn" for i in range(3)}
    more = place("static_attn", context(units, SCRATCH + 6 * (5 * MIB + 256) + 25 * MIB))
    assert residents(more) == {f"blk.{i}.attn" for i in range(6)} | {"blk.0.ffn", "blk.1.ffn"}
    everything = place("static_attn", context(units, 2 * ALL["dense"]))
    assert {everything.places["decode"][name] for name in ("embed", "head")} == {"cpu"}
    for placement in (some, more, everything):
        assert where(placement, "prefill") <= {"vram", "cpu"}
        assert placement.n_slots == 0


def test_static_attn_with_experts_takes_the_head_before_experts() -> None:
    units = MODELS["mixture"]
    attn = SCRATCH + 5 * (5 * MIB + MIB // 4)
    placement = place("static_attn", context(units, attn + 21 * MIB + 24 * MIB))
    assert "head" in residents(placement)
    assert {name for name in residents(placement) if "expert" in name} == {
        f"blk.0.expert.{e}" for e in range(8)
    }
    tight = place("static_attn", context(units, attn + 20 * MIB))
    assert residents(tight) == {f"blk.{i}.{part}" for i in range(5) for part in ("attn", "router")}


def test_shard_attn() -> None:
    units = MODELS["dense"]
    slot = 4 * MIB + 256
    some = place("shard_attn", context(units, SCRATCH + 6 * MIB + slot + 2 * slot))
    assert residents(some) == {"blk.0.attn", "blk.1.attn"}
    assert where(some, "decode", ".attn") == {"vram", "stream"}
    assert where(some, "decode", ".ffn") == {"cpu"}
    assert (some.n_slots, some.slot_bytes) == (1, slot)
    ffn = 12 * MIB + 256
    all_attn = SCRATCH + 6 * (MIB + slot)
    more = place("shard_attn", context(units, all_attn + 3 * ffn))
    assert where(more, "decode", ".attn") == {"vram"}
    assert where(more, "decode", ".ffn") == {"vram", "stream"}
    assert {f"blk.{i}.ffn" for i in range(2)} < residents(more)
    assert (more.n_slots, more.slot_bytes) == (1, ffn)
    # experts are one lump
    lump = place("shard_attn", context(MODELS["mixture"], SCRATCH + 27 * MIB + 24 * MIB))
    assert where(lump, "decode", ".expert") == {"stream"}
    assert lump.slot_bytes == 24 * MIB


def test_full_shard() -> None:
    units = MODELS["dense"]
    layer = 4 * MIB + 12 * MIB + 512
    slots = 2 * (12 * MIB + 256)
    placement = place("full_shard", context(units, SCRATCH + 6 * MIB + slots + 2 * layer))
    assert residents(placement) == {f"blk.{i}.{part}" for i in range(2) for part in ("attn", "ffn")}
    assert where(placement, "decode", "blk.5") == {"stream"}
    assert {placement.places["decode"][name] for name in ("embed", "head")} == {"cpu"}
    assert placement.n_slots == 2
    everything = place("full_shard", context(units, 2 * ALL["dense"]))
    assert where(everything, "decode", "blk.") == {"vram"}
    assert everything.n_slots == 0


def test_layer_split() -> None:
    units = MODELS["dense"]
    slot, layer = 12 * MIB + 256, 17 * MIB + 512
    placement = place("layer_split", context(units, SCRATCH + slot + 2 * layer))
    assert residents(placement) == {f"blk.{i}.{part}" for i in (4, 5) for part in ("attn", "ffn")}
    for tier, elsewhere in (
        ("decode", "cpu"),
        ("verify", "cpu"),
        ("small", "stream"),
        ("batch", "stream"),
        ("prefill", "stream"),
    ):
        assert where(placement, tier, "blk.0") == {elsewhere}
        assert placement.places[tier]["head"] == "cpu"
    assert placement.n_slots == 1
    no_head = place("layer_split", context(units, SCRATCH + 6 * layer + 20 * MIB))
    assert where(no_head, "decode", "blk.") == {"vram"}
    assert no_head.places["decode"]["head"] == "cpu"
    with_head = place("layer_split", context(units, SCRATCH + 6 * layer + 21 * MIB))
    assert with_head.places["decode"]["head"] == "vram"


def test_even_split() -> None:
    """All layers alike, and as much of each in VRAM as there is room for."""
    units = MODELS["dense"]
    shares = []
    for part in (0.4, 0.6, 0.8):
        placement = place("even_split", context(units, int(part * ALL["dense"])))
        for tier in TIERS:
            assert len(where(placement, tier.name, "ffn")) == 1
            assert where(placement, tier.name, "attn") == {"vram"}
            assert where(placement, tier.name, "embed") == {"cpu"}
        shares.append(vram_share(placement.places["decode"]["blk.0.ffn"]))
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    with pytest.raises(ps.BudgetError):  # without room for attention there is nothing even about it
        place("even_split", context(units, SCRATCH + 5 * 4 * MIB))


def test_even_split_divides_experts_by_number() -> None:
    placement = place("even_split", context(MODELS["mixture"], int(0.6 * ALL["mixture"])))
    for i in range(5):
        here = [placement.places["decode"][f"blk.{i}.expert.{e}"] for e in range(8)]
        assert here == [placement.places["decode"][f"blk.0.expert.{e}"] for e in range(8)]
        assert here.count("vram") == here.index(next(p for p in here if p != "vram")) > 0


def test_even_split_divides_experts_as_they_are_routed() -> None:
    """Where few tokens pass; else, and where one side has all of them, each expert has a place of its own."""
    units, n_split = MODELS["mixture"], 0
    for part in (0.4, 0.6, 0.8):
        placement = place("even_split", context(units, int(part * ALL["mixture"])))
        for tier in TIERS:
            places = placement.places[tier.name]
            far = {places[u.name] for u in units if u.expert is not None} - {"vram"}
            splits = [place for place in far if isinstance(place, Split)]
            assert not splits or (tier.name == "decode" and len(far) == 1)
            assert all(place.vram == 0 and 0 < place.stream < 1 for place in splits)
            n_split += len(splits)
    assert n_split > 0


def test_experts_cpu() -> None:
    units = MODELS["mixture"]
    base = SCRATCH + 41 * MIB + 5 * (5 * MIB + MIB // 4)
    placement = place("experts_cpu", context(units, base + 24 * MIB + 2 * 24 * MIB))
    for tier, elsewhere in (
        ("decode", "cpu"),
        ("verify", "cpu"),
        ("small", "stream"),
        ("prefill", "stream"),
    ):
        for i in range(5):
            assert where(placement, tier, f"blk.{i}.expert") == {"vram" if i >= 3 else elsewhere}
        assert where(placement, tier, "attn") == {"vram"}
    assert (placement.n_slots, placement.slot_bytes) == (1, 24 * MIB)
    with pytest.raises(ps.BudgetError):
        place("experts_cpu", context(units, base - 1))
    with pytest.raises(ps.BudgetError):
        place("experts_cpu", context(MODELS["dense"], ALL["dense"] - 1))


@pytest.mark.parametrize("n_seq", [1, 16])
def test_paper_tiers(n_seq: int) -> None:
    tiers = sched_policies.get("paper").tiers(4096, n_seq)  # type: ignore[attr-defined]
    sizes = [tier.max_tok for tier in tiers]
    assert sizes == ([1] if n_seq == 1 else [1, 4, 16, 64]) + [512, 1024, 2048, None]
    assert len(sched_policies.get("paper").tiers(1 << 20, 64)) <= 16  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_paper_takes_the_best_of_five_for_each_tier(model: str, share: float) -> None:
    paper: Any = sched_policies.get("paper")
    ctx = replace(context(MODELS[model], int(share * ALL[model])), tiers=paper.tiers(N_CTX, 1))
    five = []
    for name in BUILT_IN[:5]:
        try:
            five.append(place(name, ctx))
        except ps.BudgetError:
            continue
    placement = place("paper", ctx)
    assert ctx.fits(placement)
    decode, prefill = ctx.tiers[0].name, ctx.tiers[-1].name
    by_tps = max(five, key=lambda p: ctx.simulate(p, 1).tps)
    by_ttft = min(five, key=lambda p: ctx.simulate(p, N_CTX).ttft_s)
    assert placement.per_tier_residency == (by_tps != by_ttft)
    for best, tier in ((by_tps, decode), (by_ttft, prefill)):
        # The tier's best, or that with fewer residents, to leave room for the other's ring.
        mine, its = placement.places[tier], best.places[tier]
        elsewhere = {where for where in its.values() if where != "vram"}
        fewer = {name for name in its if mine[name] != its[name]}
        assert all(its[name] == "vram" and mine[name] in elsewhere for name in fewer)
        assert placement.per_tier_residency or not fewer


def test_paper_where_tiers_share_their_residents() -> None:
    """Where nothing fits beside another: one strategy, the best over a prompt and an answer."""
    units = MODELS["dense"]

    def ask(placement: Placement) -> int:
        return needs(units, placement) + (1 << 40) * placement.per_tier_residency

    ctx = context(units, ALL["dense"] // 2, ask_needs=ask)
    placement = place("paper", ctx)
    assert not placement.per_tier_residency
    five = [place(name, ctx) for name in ("static_attn", "shard_attn", "full_shard")]

    def total(p: Placement) -> float:
        run = ctx.simulate(p, 1024)
        return run.ttft_s + 128 / run.tps

    assert total(placement) == min(map(total, five))


def test_paper_fidelity() -> None:
    from pipeshard.sched_policies.paper import Paper

    placement = Paper("paper").place(context(MODELS["dense"], ALL["dense"] // 2))
    assert (placement.chunk_tok, placement.pass_tok) == (512, 512)
    with pytest.raises(ps.RequestError):
        Paper("exact")  # type: ignore[arg-type]


# ---- bringing one's own ----


def all_cpu(ctx: PolicyContext) -> Placement:
    return Placement(places={tier.name: {u.name: "cpu" for u in ctx.units} for tier in ctx.tiers})


class AllCpu:
    def place(self, ctx: PolicyContext) -> Placement:
        return all_cpu(ctx)


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    before = dict(sched_policies._registry)
    yield sched_policies._registry
    sched_policies._registry.clear()
    sched_policies._registry.update(before)


def test_names() -> None:
    assert ps.policies() == sorted(ps.policies())
    assert set(BUILT_IN) <= set(ps.policies())


@pytest.mark.parametrize(
    "policy", [all_cpu, AllCpu, AllCpu(), "test_policies:all_cpu", "test_policies.AllCpu"]
)
def test_ways_to_give_a_policy(policy: Any) -> None:
    ctx = context(MODELS["dense"], 0)
    assert sched_policies.decide(sched_policies.get(policy), ctx) == all_cpu(ctx)


def test_register(registry: dict[str, Any]) -> None:
    sched_policies.register(AllCpu)
    assert "all_cpu" in ps.policies()
    assert isinstance(sched_policies.get("all_cpu"), AllCpu)
    sched_policies.register(
        AllCpu
    )  # again, as a notebook does when a cell runs twice, is no other policy
    with pytest.raises(ps.RequestError, match="already"):
        sched_policies.register(all_cpu)
    with pytest.raises(ps.RequestError, match="already"):
        sched_policies.register(all_cpu, name="full_gpu")
    with pytest.raises(ps.RequestError, match="lower-case"):
        sched_policies.register(all_cpu, name="All CPU")
    sched_policies.register(all_cpu, name="mine")
    assert sched_policies.name_of(AllCpu) == "all_cpu"


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ps.RequestError, match=r"full_shard.*module:name") as info:
        sched_policies.get("fastest")
    assert info.value.argument == "policy"
    for path in ("no_such_module:Policy", "test_policies:NoSuch", "no/such/file.py:Policy"):
        with pytest.raises(ps.RequestError, match="cannot import"):
            sched_policies.get(path)
    with pytest.raises(TypeError):
        sched_policies.get(17)  # type: ignore[arg-type]


OUTSIDE = """
from pipeshard import Placement

class Half:
    def place(self, ctx):
        names = [unit.name for unit in ctx.units]
        for n in range(len(names), -1, -1):
            places = {name: "vram" if i < n else "cpu" for i, name in enumerate(names)}
            placement = Placement({tier.name: places for tier in ctx.tiers}, n_slots=0)
            if ctx.fits(placement):
                return placement
"""


def test_a_file_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(OUTSIDE)
    ctx = context(MODELS["dense"], ALL["dense"] // 2)
    by_file = sched_policies.decide(sched_policies.get(f"{tmp_path}/my_policies.py:Half"), ctx)
    assert residents(by_file)
    monkeypatch.syspath_prepend(tmp_path)
    assert sched_policies.decide(sched_policies.get("my_policies:Half"), ctx) == by_file


def test_entry_points(tmp_path: Path) -> None:
    """An installed package's policies are found by name, and may not take a name that is taken."""
    (tmp_path / "plugin.py").write_text(OUTSIDE)
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pipeshard.policies]\nhalf = plugin:Half\nfull_gpu = plugin:Half\n"
    )
    code = """
        import pipeshard as ps
        from pipeshard import sched_policies
        assert "half" in ps.policies()
        assert type(sched_policies.get("half")).__name__ == "Half"
        assert sched_policies.get("static_attn")
        try:
            sched_policies.get("full_gpu")
        except ps.RequestError as error:
            assert "already taken" in str(error)
        else:
            raise SystemExit("two policies of one name")
    """
    env = {"PYTHONPATH": f"{tmp_path}:{Path(ps.__file__).parents[1]}", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env, cwd=tmp_path)


# ---- bad policies ----


def broken(
    change: Callable[[dict[str, dict[str, Any]]], None], **other: Any
) -> Callable[[PolicyContext], Placement]:
    def policy(ctx: PolicyContext) -> Placement:
        places: dict[str, dict[str, Any]] = {
            tier.name: {u.name: "cpu" for u in ctx.units} for tier in ctx.tiers
        }
        change(places)
        return Placement(**({"places": places, "n_slots": 0} | other))

    return policy


def at(tier: str, name: str, where: Any) -> Callable[[dict[str, dict[str, Any]]], None]:
    return lambda places: places[tier].update({name: where})


BAD = {
    "a tier missing": (lambda places: places.pop("small"), None, "small"),
    "a tier too many": (lambda places: places.update(other=places["small"]), None, "other"),
    "a unit missing": (lambda places: places["verify"].pop("head"), "head", "verify"),
    "a unit too many": (at("decode", "blk.99.attn", "cpu"), "blk.99.attn", "decode"),
    "no place": (at("batch", "head", "disk"), "head", "batch"),
    "nothing": (at("batch", "head", None), "head", "batch"),
    "no ring": (at("decode", "blk.0.ffn", "stream"), "blk.0.ffn", "decode"),
    "no ring for a part": (at("decode", "head", Split(stream=0.5)), "head", "decode"),
    "shares above one": (at("decode", "head", Split(vram=0.8, stream=0.5)), "head", "decode"),
    "a share below zero": (at("decode", "head", Split(vram=-0.1)), "head", "decode"),
    "no number": (at("decode", "head", Split(vram=float("nan"))), "head", "decode"),
    "resident in one tier": (at("prefill", "head", "vram"), "head", "prefill"),
    "another share": (at("prefill", "head", Split(vram=0.25)), "head", "prefill"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_placements(what: str) -> None:
    change, name, tier = BAD[what]
    policy = sched_policies.get(broken(change))
    with pytest.raises(ps.PlanError) as info:
        sched_policies.decide(policy, context(MODELS["dense"], ALL["dense"]))
    assert (info.value.unit, info.value.tier) == (name, tier)


def test_per_tier_residency_may_differ() -> None:
    policy = broken(at("prefill", "head", "vram"), per_tier_residency=True)
    sched_policies.decide(sched_policies.get(policy), context(MODELS["dense"], ALL["dense"]))


def test_exceptions_in_a_policy() -> None:
    def fails(ctx: PolicyContext) -> Placement:
        raise ZeroDivisionError("1/0")

    def returns_nothing(ctx: PolicyContext) -> Placement:
        return None  # type: ignore[return-value]

    def meddles(ctx: PolicyContext) -> Placement:
        ctx.budget_bytes = 1 << 60  # type: ignore[misc]
        return all_cpu(ctx)

    def has_no_room(ctx: PolicyContext) -> Placement:
        raise ps.BudgetError("no", needed=2, budget=1)

    ctx = context(MODELS["dense"], 0)
    for policy, cause in (
        (fails, ZeroDivisionError),
        (meddles, FrozenInstanceError),
        (returns_nothing, None),
    ):
        with pytest.raises(ps.PlanError) as info:
            sched_policies.decide(sched_policies.get(policy), ctx)
        assert cause is None or isinstance(info.value.__cause__, cause)
    with pytest.raises(ps.BudgetError):
        sched_policies.decide(sched_policies.get(has_no_room), ctx)
    placement = all_cpu(ctx)
    with pytest.raises(TypeError):
        placement.places["decode"]["head"] = "vram"  # type: ignore[index]
    with pytest.raises(ps.PlanError):
        PolicyContext(units=(), tiers=(), budget_bytes=0, n_ctx=1).needs(placement)


@pytest.mark.parametrize("model", ["llama", "moe"])
def test_the_example_of_the_readme_runs(
    root: Path, tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    """As it stands there, in a file of its own, through all the doors that it names."""
    text = (root / "README.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```python\n") if part.startswith("# my_policy.py"))
    path = tmp_path / "my_policy.py"
    path.write_text(block.split("```")[0], encoding="utf-8")
    policy, gguf = f"{path}:HeadFirst", request.getfixturevalue(model)
    with ps.Engine(gguf, device="emu", n_ctx=128) as engine:
        ids = list(range(3, 103))
        expected = engine.logits(ids)
        budget = engine.plan.needed_bytes * 9 // 10
    run = ps.simulate(gguf, vram=budget, n_ctx=128, n_prompt=100, policy=policy)
    with ps.Engine(gguf, device="emu", n_ctx=128, vram=budget, policy=policy) as engine:
        assert dict(engine.plan.places) == dict(run.plan.places)
        assert engine.plan.places["decode"]["head"] == "vram"
        assert "stream" in engine.plan.places["prefill"].values()
        assert abs(engine.logits(ids) - expected).max() < 0.5
        assert engine.stats["peak_bytes"] <= budget
    rows = ps.sweep(gguf, [budget], [32], [policy], device="emu", n_gen=2, repeats=1)
    assert rows[0]["error"] is None
    assert rows[0]["ttft_s"] > 0
    with pytest.raises(ps.BudgetError):
        ps.Engine(gguf, device="emu", n_ctx=128, vram="1KiB", policy=policy)


def test_numbered_places_are_places(moe: str) -> None:
    """A mapping like any other, and a plan of it the same to the byte, whoever made the list of units."""
    model = ps.Model(moe)
    numbers = np.arange(len(model.units), dtype=np.uint8) % 3
    few: list[Place] = ["cpu", "vram", "stream"]
    places = NumberedPlaces(model.units, model.unit_index, few, numbers)
    same = {unit.name: few[i % 3] for i, unit in enumerate(model.units)}
    assert places == same == places.as_dict()
    assert places.keys() == same.keys()
    assert len(places) == len(same)
    with pytest.raises(KeyError):
        places["blk.0.nothing"]
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1
    other = NumberedPlaces((*model.units,), model.unit_index, few, numbers)
    plans = [
        ps.simulate(
            model,
            vram="1GiB",
            n_ctx=256,
            n_prompt=8,
            policy=lambda ctx, p=p: same_in_all(ctx, p, n_slots=4, slot_bytes=1 << 20),
        ).plan
        for p in (same, places, other)
    ]
    assert plans[0].diff(plans[1]) == plans[0].diff(plans[2]) == ""


def test_engines_ask_policies(llama: str) -> None:
    """What goes wrong in a policy reaches the caller of Engine as it should."""

    def fails(ctx: PolicyContext) -> Placement:
        raise KeyError("nothing")

    def too_much(ctx: PolicyContext) -> Placement:
        return Placement.everywhere({one.name: "vram" for one in ctx.units})

    def forgets(ctx: PolicyContext) -> Placement:
        return Placement.everywhere({one.name: "cpu" for one in ctx.units[1:]})

    with pytest.raises(ps.PlanError) as failed:
        ps.Engine(llama, device="emu", n_ctx=64, policy=fails)
    assert isinstance(failed.value.__cause__, KeyError)
    with pytest.raises(ps.PlanError):
        ps.Engine(llama, device="emu", n_ctx=64, policy=forgets)
    with pytest.raises(ps.BudgetError) as small:
        ps.Engine(llama, device="emu", n_ctx=64, vram="300KiB", policy=too_much)
    error = small.value
    assert error.needed > error.budget == 300 << 10
    assert error.smallest < error.budget
    ps.Engine(llama, device="emu", n_ctx=64, vram=error.smallest).close()
    with pytest.raises(ps.RequestError):
        ps.Engine(llama, policy="none_such")
    with ps.Engine(llama, device="host", n_ctx=64, policy="full_gpu") as engine:
        assert set(engine.plan.places["decode"].values()) == {"cpu"}


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_ops_of_more_tokens_than_usual(name: str, request: pytest.FixtureRequest) -> None:
    """A policy may ask for them, and gets the same bits in fewer ops."""
    model = ps.Model(request.getfixturevalue(name))
    prompt, found = [3 + i * 7 % 200 for i in range(4200)], []

    def ask(ctx: PolicyContext, size: int) -> Placement:
        assert (ctx.sizes[0], ctx.size) == (4096, 2048)
        placement = same_in_all(
            ctx, dict.fromkeys(ctx.names, "stream"), n_slots=4, slot_bytes=1 << 20
        )
        return replace(placement, chunk_tok=size)

    for size in (0, 4096):
        with ps.Engine(
            model,
            device="emu",
            n_ctx=4352,
            vram="1GiB",
            policy=lambda ctx, size=size: ask(ctx, size),
        ) as engine:
            engine.generate(prompt, max_tokens=1, temperature=0)
            n_ticks = len(engine.plan.bind(model).ticks(len(prompt)))
            found.append((engine.plan.chunk_tok, n_ticks, engine.last_logits.copy()))
    (usual, many, logits), (large, few, others) = found
    assert (usual, large) == (2048, 4096)
    assert few < many
    assert (logits == others).all()

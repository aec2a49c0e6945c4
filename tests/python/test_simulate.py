"""Predictions from metadata: exact where the machine is an emulated one, and never below the bounds; `auto` never worse
than the policies that it is compared with."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import _core, profiling
from pipeshard._profile import Profile, Sample, default_profile, rates_profile
from pipeshard._simulator import Simulator, _Priced
from pipeshard.cost import Shape
from pipeshard.sched_policies.base import prompt_lengths, same_in_all, vram_share
from pipeshard.synth import synth

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
# A fast GPU behind a bus half as fast as the CPU's memory: rates near those of a server of 2025.
SERVER = {
    "h2d_bytes_per_s": 54e9,
    "d2h_bytes_per_s": 54e9,
    "vram_bytes_per_s": 3.5e12,
    "gpu_flops": 500e12,
    "dram_bytes_per_s": 110e9,
    "cpu_flops": 4e12,
    "launch_ns": 2500,
    "copy_ns": 5000,
    "flag_ns": 3300,
}


@pytest.fixture(scope="module")
def server() -> Profile:
    return rates_profile(SERVER, source="datasheet", machine={"gpu": "a server's", "sm": 90})


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes files with the header of a known model and holes for weights."""
    folder = tmp_path_factory.mktemp("hollow")

    def make(name: str, fmt: str | None = None, layers: int | None = None) -> ps.Model:
        path = folder / f"{name}-{fmt}-{layers}.gguf"
        if not path.exists():
            synth(name, path, fmt=fmt, layers=layers, weights=False, progress=False)
        return ps.Model(path)

    return make


@pytest.mark.parametrize("name", ["llama.q4_k_m", "qwen3moe.q4_k_m"])
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_exact_on_the_emulator(name: str, share: float) -> None:
    model = ps.Model(GOLDEN / f"{name}.gguf")
    with ps.Engine(model, device="emu", n_ctx=256) as engine:
        budget = int(engine.plan.needed_bytes * share)
    for policy in ("auto", "static_attn", "shard_attn", "full_shard", "layer_split"):
        try:
            engine = ps.Engine(model, device="emu", n_ctx=256, vram=budget, policy=policy)
        except ps.BudgetError:
            continue
        with engine:
            for _ in range(2):  # the first run also brings tables to the device
                engine.reset()
                engine.generate([3 + i * 7 % 200 for i in range(150)], max_tokens=20, temperature=0)
            stats = engine.stats
        assert stats["predicted_ttft_s"] == pytest.approx(stats["ttft_s"], rel=0.02)
        assert stats["predicted_tps"] == pytest.approx(stats["tps"], rel=0.02)


def test_another_clock_is_followed() -> None:
    device = ps.EmuDevice(profile={"h2d_bytes_per_s": 1e9, "gpu_flops": 1e11, "flag_ns": 20_000})
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf")
    with ps.Engine(model, device=device, n_ctx=256, vram="1MiB", policy="layer_split") as engine:
        engine.generate(list(range(3, 153)), max_tokens=8, temperature=0)
        stats = engine.stats
    run = ps.simulate(
        model, vram="1MiB", profile=device, policy="layer_split", n_ctx=256, n_prompt=150, n_gen=8
    )
    assert run.ttft_s == pytest.approx(stats["ttft_s"], rel=0.02)
    assert run.tps == pytest.approx(stats["tps"], rel=0.02)


def test_more_budget_is_no_slower(hollow: Any, server: Profile) -> None:
    for model in (hollow("Minitron-4B", "f16"), hollow("Qwen3-30B-A3B", layers=12)):
        runs = ps.simulate(model, vram=["1GiB", "2GiB", "3GiB", "20GiB"], profile=server)
        assert [run.plan.budget_bytes >> 30 for run in runs] == [1, 2, 3, 20]
        for less, more in itertools.pairwise(runs):
            assert more.ttft_s / more.tps <= less.ttft_s / less.tps * 1.02
        for run in runs:
            assert run.ttft_lo < run.ttft_s < run.ttft_hi
            assert run.tps_lo < run.tps < run.tps_hi
            assert run.bound_ttft_s <= run.ttft_s
            assert run.bound_tps >= run.tps
            assert run.source == "datasheet"
            assert run.plan.needed_bytes <= run.plan.budget_bytes
            assert sum(run.prefill.values()) == pytest.approx(run.ttft_s)
            assert sum(run.decode.values()) == pytest.approx(1 / run.tps)
        # What does not fit crosses the bus once for the whole prompt, and little else is waited for.
        assert runs[1].ttft_s < 2 * runs[1].bound_ttft_s
        gain = runs[0].plan.predicted["more"]
        assert gain["ttft_s"] <= runs[0].ttft_s
        assert gain["tps"] >= runs[0].tps


@pytest.mark.parametrize(("vram", "n_ctx"), [("1GiB", 1152), ("1GiB", 4096), ("3GiB", 4096)])
@pytest.mark.parametrize("name", ["Minitron-4B", "Qwen3-30B-A3B"])
def test_auto_is_never_worse(
    hollow: Any, server: Profile, name: str, vram: str, n_ctx: int
) -> None:
    """By the objective: prompts of 1,024 tokens count twice, those that fill the context once."""
    model = hollow(name, "f16") if name == "Minitron-4B" else hollow(name, layers=12)
    simulator = Simulator(server)

    def score(policy: str) -> float:
        core = ps.simulate(model, vram=vram, profile=server, policy=policy, n_ctx=n_ctx).plan.bind(
            model
        )
        runs = (
            simulator.run(core, n_ctx=n_ctx, n_prompt=n_prompt, n_gen=128)
            for n_prompt in (1024, 1024, n_ctx - 128)
        )
        return math.prod(prompt.seconds * token.seconds for prompt, token in runs)

    best = score("auto")
    for policy in ps.policies():
        try:
            other = score(policy)
        except ps.BudgetError:
            continue
        assert best <= other * 1.03, policy


def test_auto_is_nowhere_far_behind(hollow: Any) -> None:
    """By the objective the best one here has 6 % fewer tokens a second behind 4,096 than another policy's, for a first
    token that comes 6 % earlier behind 1,024. What is hardly behind in anything is taken instead."""
    model, n_ctx = hollow("Minitron-8B", "f16"), 4108
    profile = Profile.load(Path(ps.__file__).parent / "profiles/h200-16-cpus.json")
    for n_prompt in (1024, n_ctx - 12):
        mine, its = (
            ps.simulate(
                model, vram="8GiB", profile=profile, policy=policy, n_ctx=n_ctx, n_prompt=n_prompt, n_gen=12
            )
            for policy in ("auto", "even_split")
        )  # fmt: skip
        assert mine.ttft_s <= its.ttft_s * 1.031
        assert mine.tps >= its.tps / 1.031


def test_prompts_that_count() -> None:
    assert prompt_lengths(700) == {700: 1}
    assert prompt_lengths(2048) == {1024: 1}
    assert prompt_lengths(4096) == {1024: 2, 3968: 1}
    assert prompt_lengths(1 << 20) == {1024: 2, 16384: 1}


@pytest.mark.parametrize("n_ctx", [4096, 8192])
@pytest.mark.parametrize("name", ["Minitron-4B", "Qwen3-30B-A3B"])
def test_long_prompts_stream_once(hollow: Any, server: Profile, name: str, n_ctx: int) -> None:
    """Where the context is for long prompts, what is not resident crosses the bus once for one of them, though it is
    several ops; and short prompts lose less than that gains."""
    model = hollow(name, "f16") if name == "Minitron-4B" else hollow(name, layers=12)
    long, short = (
        ps.simulate(model, vram="2GiB", profile=server, n_ctx=n, n_prompt=1000)
        for n in (n_ctx, 1152)
    )
    ticks = long.plan.bind(model).ticks(n_ctx - 128)
    copies = ticks["kind"] == _core.Plan.tick_names()[0].index("copy_in")
    places = long.plan.places["prefill"]
    away = sum(
        unit.n_bytes * (1.0 - vram_share(places[unit.name]))
        for unit in model.units
        if unit.kind != "embed"
    )
    assert 0 < ticks["n_bytes"][copies].sum() < 1.1 * away
    assert long.ttft_s < 1.3 * short.ttft_s
    assert long.tps > 0.8 * short.tps


def test_streams_where_that_pays(hollow: Any) -> None:
    """With a slow CPU prompts stream and so do tokens; with a slow bus nothing does."""
    model = hollow("Minitron-4B", "f16")
    slow_cpu = SERVER | {"dram_bytes_per_s": 2e9, "cpu_flops": 1e10}
    slow_bus = SERVER | {"h2d_bytes_per_s": 0.5e9}
    for rates, tier, expected in (
        (slow_cpu, "prefill", True),
        (slow_cpu, "decode", True),
        (slow_bus, "decode", False),
    ):
        profile = rates_profile(rates, source="measured", machine={"gpu": "x"})
        places = ps.simulate(model, vram="2GiB", profile=profile).plan.places[tier]
        assert ("stream" in places.values()) == expected, (rates, tier)


@pytest.mark.parametrize(
    ("name", "vram", "other"),
    [("tiny-llama", "6MiB", "full_gpu_no_output"), ("tiny-qwen3moe", "24MiB", "even_split")],
)
def test_auto_looks_at_others_with_ops_of_their_own_size(
    hollow: Any, name: str, vram: str, other: str
) -> None:
    """Some fit only with smaller ops than its own first candidates have room for."""
    model = hollow(name, layers=12)
    rates = {"h2d_bytes_per_s": 30e6, "d2h_bytes_per_s": 30e6, "vram_bytes_per_s": 625e6}
    rates |= {"dram_bytes_per_s": 100e6, "gpu_flops": 37.5e9, "cpu_flops": 1e9}
    mine, its = (
        ps.simulate(
            model, vram=vram, policy=policy, n_ctx=528, n_prompt=512, n_gen=16, threads=1,
            profile=ps.EmuDevice(profile=rates),
        )
        for policy in ("auto", other)
    )  # fmt: skip
    assert mine.ttft_s / mine.tps < 1.02 * its.ttft_s / its.tps


@pytest.mark.parametrize("policy", ["auto", "paper"])
def test_deciding_is_quick(hollow: Any, server: Profile, policy: str) -> None:
    """94 layers of 128 experts, explained. The goal is a second; the limit is for slow machines, and in CPU seconds,
    for other tests run beside this one."""
    model = hollow("Qwen3-235B-A22B")
    assert len(model.units) > 12_000
    start = time.process_time()
    run = ps.simulate(model, vram="16GiB", profile=server, policy=policy)
    text = run.plan.explain()
    assert run.plan.placement.per_tier_residency == (policy == "paper")
    assert time.process_time() - start < 2.5
    assert len(text.splitlines()) < 150


def test_auto_knows_who_attends_quicker_to_what_is_far(hollow: Any) -> None:
    """Where a window leaves most of a long context in host memory: a CPU four times as quick at attention as one that
    was measured beats the bus, and one twenty times as slow does not."""
    measured = Profile.load(Path(ps.__file__).parent / "profiles/h200-16-cpus.json")
    model, chosen = hollow("Qwen3-30B-A3B", layers=4), []
    for factor in (0.25, 20.0):
        samples = tuple(
            replace(s, seconds=s.seconds * factor) if (s.side, s.op) == ("cpu", "attn") else s
            for s in measured.samples
        )
        profile = replace(measured, samples=samples)
        plan = ps.simulate(model, vram="256MiB", profile=profile, n_ctx=16640, threads=14).plan
        assert plan.placement.kv_vram_tok is not None
        token = {}
        for far in ("gpu", "cpu"):
            other = replace(plan, placement=replace(plan.placement, kv_far_on=far))
            run = Simulator(profile, threads=14).run_pass(other.bind(model), 1, first=16383)
            token[far] = run.seconds
        chosen.append(plan.placement.kv_far_on)
        assert chosen[-1] == min(token, key=token.__getitem__)
    assert chosen == ["cpu", "gpu"]


def test_auto_keeps_what_is_missing_in_few_layers(hollow: Any) -> None:
    """Where nearly all experts fit, a few layers miss some, apart from each other: most need no hand-off, and what
    streams travels while they compute. Every layer alike is as quick to the first token and slower behind it."""
    model, runs = hollow("Qwen3-30B-A3B"), {}
    for policy in ("auto", "even_split"):
        runs[policy] = ps.simulate(
            model, vram="16GiB", profile="h200-16-cpus.json", policy=policy, threads=14
        )
    places = runs["auto"].plan.places["decode"]
    missing = {u.layer for u in model.units if u.kind == "expert" and places[u.name] != "vram"}
    assert 1 < len(missing) < 16
    apart = [b - a for a, b in itertools.pairwise(sorted(missing))]
    assert max(apart) - min(apart) <= 1 < min(apart)
    assert runs["auto"].ttft_s < 1.02 * runs["even_split"].ttft_s
    assert runs["auto"].tps > 1.03 * runs["even_split"].tps


def test_opening_a_tiny_model_stays_quick(llama: str) -> None:
    model = ps.Model(llama)
    ps.Engine(model, device="emu", n_ctx=256, vram="700KiB").close()
    start = time.process_time()
    ps.Engine(model, device="emu", n_ctx=256, vram="700KiB").close()
    assert time.process_time() - start < 0.3


def test_bus_and_cpu_divide_what_is_routed(hollow: Any, server: Profile) -> None:
    """`auto` and `even_split`, in passes of so few tokens that routed experts are gathered; prompts copy them whole."""
    model = hollow("Qwen3-30B-A3B", layers=4)
    ops, streams = _core.Plan.tick_names()[2], _core.Plan.tick_names()[1]
    for policy in ("auto", "even_split"):
        plan = ps.simulate(model, vram="1GiB", profile=server, n_ctx=2048, policy=policy).plan
        places = {
            tier: {units[u.name] for u in model.units if u.expert is not None} - {"vram"}
            for tier, units in plan.places.items()
        }
        assert isinstance(min(places["decode"], key=str), ps.Split)
        assert len(places["decode"]) == len(places["verify"]) == 1
        assert not any(isinstance(place, ps.Split) for place in places["prefill"] | places["batch"])
        assert policy != "auto" or "share those that are routed" in plan.explain()
        ticks = plan.bind(model).ticks(1)
        gathers = [t for t in ticks if t["op"] >= 0 and ops[t["op"]] == "gather_experts"]
        both = ["cpu", "compute"] * model.hparams["n_layer"]
        assert [streams[t["stream"]] for t in gathers] == both


def test_many_sequences(hollow: Any, server: Profile) -> None:
    model = hollow("Qwen3-30B-A3B", layers=12)
    one, many = (
        ps.simulate(model, vram="2GiB", profile=server, n_ctx=1024, n_prompt=512, n_seq=n)
        for n in (1, 16)
    )
    assert many.tps > one.tps  # of all of them


def test_fewer_threads_are_slower(hollow: Any, server: Profile) -> None:
    samples = [s for s in server.samples if s.side != "cpu"]
    for n in (1, 4, 16):
        rates = SERVER | {"dram_bytes_per_s": 10e9 * n, "cpu_flops": 2e11 * n}
        cpu = rates_profile(rates, source="measured", machine={}).samples
        samples += [replace(s, threads=n) for s in cpu if s.side == "cpu"]
    profile = Profile("measured", {"gpu": "x"}, None, tuple(samples))
    model = hollow("Minitron-4B", "f16")
    tps = [
        ps.simulate(model, vram="2GiB", profile=profile, threads=n, policy="static_attn").tps
        for n in (1, 4, 8, 16, None)
    ]
    assert tps == sorted(tps)
    assert tps[0] < tps[1] < tps[2] < tps[3] == tps[4]


def test_a_machine_without_a_gpu(hollow: Any) -> None:
    """Its CPU reads what a token needs, whatever the budget."""
    model = hollow("Qwen3-4B", layers=4)
    cpu = [
        s for s in rates_profile(SERVER, source="measured", machine={}).samples if s.side == "cpu"
    ]
    profile = Profile("measured", {"device": "host", "cpu": "x"}, None, tuple(cpu))
    found = ps.simulate(model, vram=[0, "1GiB"], profile=profile, n_ctx=512, n_prompt=256)
    needed = sum(unit.n_bytes for unit in model.units if unit.kind != "embed")
    for run in found:
        assert not run.plan.accelerator
        assert run.tps == pytest.approx(SERVER["dram_bytes_per_s"] / needed, rel=0.1)
        assert run.tps <= run.bound_tps * 1.01
        assert "TPS" in run.plan.explain()


def test_measured_profiles_that_come_along(hollow: Any) -> None:
    """By the H200's, more budget is no slower and what fits is read at a few TB/s; the other has no GPU."""
    model = hollow("Llama-3.1-8B", fmt="q4_0")
    runs = ps.simulate(model, vram=["2GiB", "16GiB"], profile="h200-16-cpus.json", n_ctx=2048)
    assert runs[0].ttft_s >= runs[1].ttft_s
    assert runs[0].tps < runs[1].tps
    assert 0.15 < runs[1].tps * model.n_bytes / 4.3e12 < 1
    alone = ps.simulate(model, vram=0, profile="ci-2-cpus.json", n_ctx=2048)
    assert not alone.plan.accelerator
    assert 2 < alone.tps < 10
    assert {run.source for run in (*runs, alone)} == {"measured"}


# ---- what slows each other down ----


def samples_with(server: Profile, *more: Sample) -> Profile:
    return Profile("measured", {"gpu": "x"}, None, (*server.samples, *more))


def gather_sample(n_bytes: int, seconds: float, load: str = "idle") -> Sample:
    return Sample("h2d", "gather", None, 1, 0, n_bytes, seconds, load=load)


def test_a_context_ends_before_its_bucket(llama: str) -> None:
    """A token is lowered for up to twice its keys, so that the list serves others; for no more than there can be."""
    plan = ps.simulate(llama, vram="1GiB", profile=False, n_ctx=300, n_prompt=100).plan
    core = plan.bind(ps.Model(llama))
    assert Simulator._fill(core, 1, 128) == 0.5
    assert Simulator._fill(core, 1, 290) > 0.9


def test_a_gather_starts_once(hollow: Any, server: Profile) -> None:
    """Measured gathers are whole ops: nothing is added for their start."""
    model = hollow("Qwen3-30B-A3B", layers=4)
    profile = samples_with(server, gather_sample(10**7, 2e-3), gather_sample(2 * 10**7, 4e-3))
    simulator = Simulator(profile)
    stream = {u.name: "stream" if u.kind == "expert" else "vram" for u in model.units}
    plan = ps.simulate(
        model, vram="30GiB", profile=profile, n_ctx=256, n_prompt=100,
        policy=lambda ctx: replace(same_in_all(ctx, stream), n_slots=8, slot_bytes=32 << 20),
    ).plan  # fmt: skip
    ticks = plan.bind(model).ticks(1)
    ops = _core.Plan.tick_names()[2]
    gathers = [t for t in ticks if ops[t["op"]] == "gather_experts" and t["bus_bytes"]]
    assert gathers
    for tick in gathers:
        assert simulator._seconds(tick, False, 1.0) == pytest.approx(tick["bus_bytes"] * 2e-10)


def test_few_experts_on_the_bus_cost_much_now_and_then(hollow: Any, server: Profile) -> None:
    """One of 128 experts in host memory: most tokens don't want it, and the op takes what it takes without; those that
    do wait for all of it. The mean of both is more than what the mean of the bytes would take, which hides behind what
    the op reads anyway. The emulated clock charges the mean."""
    model = hollow("Qwen3-30B-A3B", layers=4)
    reads = (Sample("h2d", "moe_up", "q4_0", 1, 0, n, n / 20e9) for n in (10**6, 10**7))
    places = {u.name: "stream" if u.name.endswith("expert.7") else "vram" for u in model.units}
    plan = ps.simulate(
        model, vram="30GiB", profile=server, n_ctx=256, n_prompt=100,
        policy=lambda ctx: replace(same_in_all(ctx, places), n_slots=4, slot_bytes=2 << 20),
    ).plan  # fmt: skip
    ops, ticks = _core.Plan.tick_names()[2], plan.bind(model).ticks(1)
    (up, *_) = [t for t in ticks if ops[t["op"]] == "moe_up"]
    assert up["bus_odds"] == pytest.approx(8 / 128)
    assert up["bus_bytes"] == pytest.approx(up["bytes"] / 128, rel=1e-3)
    simulator = Simulator(samples_with(server, *reads))
    shape = Shape("q4_0", 1, int(up["flops"]), int(up["bytes"]))
    alone = simulator.cost.seconds("moe_up", shape, "vram")
    expert_s = up["bytes"] / 8 / 20e9
    assert up["bus_bytes"] / 20e9 < alone < expert_s
    mean = (120 * alone + 8 * expert_s) / 128
    assert simulator._seconds(up, False, 1.0) == pytest.approx(mean, rel=1e-3)
    clock = Simulator(default_profile("emu"))
    assert clock._seconds(up, False, 1.0) == pytest.approx(
        clock.cost.seconds(
            "moe_up", shape._replace(bytes=int(up["bytes"] - up["bus_bytes"])), "vram"
        )
    )


def contended(profile: Profile, *rows: tuple[str, str, int, float]) -> list[float]:
    """Seconds of ticks that all begin at once, each (stream, kind, bytes of host memory, seconds alone)."""
    simulator = Simulator(profile)
    kinds, streams = _core.Plan.tick_names()[:2]
    fields = {"kind": "u1", "stream": "u1", "op": "u1", "bytes": "u8", "bus_bytes": "u8"}
    ticks = np.zeros(len(rows), list(fields.items()))
    for tick, (stream, kind, n_bytes, _) in zip(ticks, rows, strict=True):
        tick["kind"], tick["stream"] = kinds.index(kind), streams.index(stream)
        tick["bytes" if stream == "cpu" else "bus_bytes"] = n_bytes
    alone = np.array([seconds for *_, seconds in rows])
    span = {"end_ns": (alone * 1e9).astype(np.uint64), "total_ns": int(alone.max() * 1e9)}
    slower = simulator._contended(_Priced(ticks, alone), span)
    return (alone if slower is None else slower).tolist()


def test_copies_and_gathers_share_the_bus(server: Profile) -> None:
    """54 GB/s: 540 MB take 10 ms. A read by the GPU that wants a fifth of the bus leaves four to copies and is not
    slowed itself; one that wants all of it gets half, while there are copies."""
    copy = ("h2d", "copy_in", 0, 0.010)

    def gather(n_bytes: int) -> tuple[str, str, int, float]:
        return ("compute", "run", n_bytes, 0.010)

    assert contended(server, copy) == [0.010]
    assert contended(server, copy, gather(0)) == [0.010, 0.010]
    assert contended(server, copy, gather(540 * 10**6)) == pytest.approx([0.020, 0.020], rel=1e-3)
    assert contended(server, copy, gather(108 * 10**6)) == pytest.approx([0.0125, 0.010], rel=1e-3)
    short = ("h2d", "copy_in", 0, 0.001)
    assert contended(server, short, gather(540 * 10**6)) == pytest.approx([0.002, 0.011], rel=1e-3)


def test_gathers_slow_the_cpu_as_copies_do(server: Profile) -> None:
    """Half as fast beside a busy bus; the gather by what it was measured to take beside the CPU."""
    n_bytes = 54 * 10**7
    both = samples_with(
        server,
        Sample("cpu", "matmul", None, 1, 0, 11 * 10**8, 0.020, load="h2d"),
        gather_sample(n_bytes // 2, 0.005),
        gather_sample(n_bytes, 0.010),
        gather_sample(n_bytes, 0.013, load="cpu"),
    )
    copy = ("h2d", "copy_in", 0, 0.010)
    cpu = ("cpu", "run", 11 * 10**8, 0.010)
    assert contended(both, cpu, copy)[0] == pytest.approx(0.020, rel=0.01)
    # What reads at less than the rate that is left is not slowed, or only down to it.
    assert contended(both, ("cpu", "run", 5 * 10**8, 0.010), copy)[0] == 0.010
    slow = contended(both, ("cpu", "run", 8 * 10**8, 0.010), copy)[0]
    assert slow == pytest.approx(0.010 * 80 / 55, rel=0.01)
    slower = contended(both, cpu, ("compute", "run", n_bytes, 0.010))
    assert slower == pytest.approx([0.020, 0.013], rel=0.01)
    half = contended(both, cpu, ("compute", "run", n_bytes // 2, 0.005))
    assert half == pytest.approx([0.015, 0.0065], rel=0.01)
    # Where the CPU was timed beside gathers, it takes what it took; and then all read the same memory, so that what
    # was measured of copies is all that there is to say.
    same = samples_with(
        both,
        Sample("cpu", "matmul", None, 1, 0, 11 * 10**8, 0.015, load="gather"),
    )
    assert contended(same, cpu, ("compute", "run", n_bytes, 0.010))[0] == pytest.approx(0.015, 0.01)
    assert contended(same, cpu, copy)[1] == 0.010
    assert contended(both, cpu, copy)[1] == pytest.approx(0.0112)


def test_without_a_profile_this_machines_own(
    llama: str, server: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine finds it: that of the GPU, measured or kept; nobody's where PIPESHARD_PROFILE or False say so; the
    emulated one's where there is no GPU."""
    own = replace(server, source="measured")
    monkeypatch.setattr(profiling, "profile", lambda model, threads=None: own)

    def source(has_gpu: bool, wish: str | None, **options: Any) -> str:
        monkeypatch.setattr(_core, "cuda_status", lambda: (has_gpu, ""))
        monkeypatch.delenv("PIPESHARD_PROFILE", raising=False)
        if wish is not None:
            monkeypatch.setenv("PIPESHARD_PROFILE", wish)
        return str(ps.simulate(llama, vram="1GiB", policy="full_gpu", **options).profile)

    assert source(True, None) == own.title
    assert source(True, "default") == source(True, None, profile=False) == "cuda (default)"
    assert "4060" in source(True, "rtx4060-laptop-datasheet.json")
    assert source(False, None) == "emu (default)"


@pytest.mark.parametrize("kind", ["emu", "cuda"])
def test_policies_are_told_the_threads_that_engines_use(
    llama: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """All but one or two that feed a GPU."""
    told = []

    def policy(ctx: Any) -> Any:
        told.append(ctx.threads)
        return same_in_all(ctx, dict.fromkeys((unit.name for unit in ctx.units), "cpu"))

    monkeypatch.setattr(_core, "default_threads", {"emu": 16, "cuda": 14}.__getitem__)
    for threads in (None, 3):
        profile = rates_profile(SERVER, source="measured", machine={"device": kind})
        ps.simulate(llama, vram="1GiB", profile=profile, policy=policy, threads=threads)
    assert told == [{"emu": 16, "cuda": 14}[kind], 3]


class Fixed:
    """A cost model of somebody's own: every op a microsecond, every copied byte a nanosecond."""

    error = 0.25

    def seconds(self, op: str, shape: Shape, place: str, load: str = "idle") -> float:
        return shape.bytes * 1e-9 if op in ("copy", "gather") else 1e-6


def test_cost_models_are_pluggable(llama: str) -> None:
    asked = []

    def fit(samples: Any, threads: int) -> Fixed:
        asked.append((len(samples), threads))
        return Fixed()

    profile = "rtx4060-laptop-datasheet.json"
    run = ps.simulate(
        llama, vram="1GiB", n_ctx=256, n_prompt=100, threads=3, cost=fit, profile=profile
    )
    assert [threads for _, threads in asked] == [3]
    assert asked[0][0] > 10
    assert run.ttft_s > 1e-5
    assert run.ttft_hi > run.ttft_s * 1.3


def test_requests_are_checked(llama: str, tmp_path: Path) -> None:
    for options, argument in (
        ({"vram": []}, "vram"),
        ({"vram": "lots"}, "vram"),
        ({"n_prompt": 4096}, "n_prompt"),
        ({"n_prompt": 0}, "n_prompt"),
        ({"n_gen": -1}, "n_gen"),
        ({"threads": 0}, "threads"),
        ({"policy": "none_such"}, "policy"),
    ):
        with pytest.raises(ps.RequestError) as info:
            ps.simulate(llama, **({"vram": "1GiB"} | options))
        assert info.value.argument == argument
    with pytest.raises(ps.BudgetError) as budget:
        ps.simulate(llama, vram=10)
    assert ps.simulate(llama, vram=budget.value.smallest).ttft_s > 0
    with pytest.raises(TypeError):
        ps.simulate(llama, vram="1GiB", profile=3)
    with pytest.raises(ps.FileError):
        ps.simulate(llama, vram="1GiB", profile=tmp_path / "none.json")


def test_a_profile_by_name(llama: str) -> None:
    run = ps.simulate(llama, vram="1GiB", profile="rtx4060-laptop-datasheet.json")
    assert run.source == "datasheet"
    assert "4060" in run.profile
    assert (run.ttft_hi / run.ttft_s) > 1.3


def test_hollow_files_have_no_weights(hollow: Any) -> None:
    model = hollow("Qwen3-235B-A22B")
    assert os.stat(model.path).st_blocks * 512 < 64 << 20 < model.n_bytes

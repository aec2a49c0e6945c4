"""Units split between GPU and CPU: the logits of whole ones, within every budget, and faster than either side alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

import pipeshard as ps
from pipeshard import _core
from pipeshard.placement import TIERS, Place, Placement, Split
from pipeshard.synth import synth
from pipeshard.synth_models import find_model

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
BARS = json.loads((GOLDEN / "bars.json").read_text())
MODELS = (
    "llama.q4_k_m",
    "nemotron.bf16",
    "qwen2.q8_0",
    "qwen3.q6_k",
    "gemma3.q4_0",
    "phi3.q4_1",
    "gpt-oss.mxfp4",
)
VARIANTS = _core.build_info()["cpu_variants_here"]
N_CTX = 128
ROOMY = 1 << 40
SPLIT_KINDS = ("attn", "ffn", "head")
RING = {"n_slots": 3, "slot_bytes": 256 << 10}


def open_plan(
    model: ps.Model, placement: Placement, device: Any = "emu", **options: Any
) -> ps.Engine:
    """With no more VRAM than the placement needs."""
    with ps.Engine(model, device="emu", n_ctx=N_CTX, threads=2, vram=1 << 30) as engine:
        plan = replace(engine.plan, placement=placement, budget_bytes=ROOMY)
    needed = sum(plan.bind(model).bytes_by_kind.values())
    plan = replace(plan, budget_bytes=needed)
    return ps.Engine(model, device=device, plan=plan, **({"threads": 2} | options))


def random_shares(model: ps.Model, seed: int) -> Placement:
    """Every unit that can be split is; the others lie anywhere. The GPU's share grows with the tier."""
    rng = random.Random(seed)
    places: dict[str, dict[str, Place]] = {tier.name: {} for tier in TIERS}
    for unit in model.units:
        if unit.kind not in SPLIT_KINDS:
            place: Place = rng.choice(("vram", "stream", "cpu"))
            for tier in TIERS:
                places[tier.name][unit.name] = place
            continue
        vram = rng.choice((0.0, 1e-3, 0.3, 0.5, 0.5, 1.0))
        streams = sorted(rng.choice((0.0, 1e-3, 0.25, 0.6, 1.0)) * (1 - vram) for _ in TIERS)
        for tier, stream in zip(TIERS, streams, strict=True):
            places[tier.name][unit.name] = Split(vram, stream)
    return Placement(places, **RING)


def everywhere(model: ps.Model, split: Mapping[str, Place], rest: Place) -> Placement:
    """By kind of unit."""
    places = {unit.name: split.get(unit.kind, rest) for unit in model.units}
    return replace(Placement.everywhere(places), **RING)


def golden(name: str) -> Any:
    return np.load(GOLDEN / f"{name}.npz")


# ---- parity ----


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_under_random_shares(name: str, heap: None) -> None:
    model, expected = ps.Model(GOLDEN / f"{name}.gguf"), golden(name)
    for seed in range(3):
        device = ps.EmuDevice(seed=seed, delays=True)
        with open_plan(model, random_shares(model, seed), device) as engine:
            logits = engine.logits(expected["tokens"])
            assert reference.nmse(logits, expected["reference"]) <= BARS[name]["bar"]
            assert reference.top1_disagreements(logits, expected["reference"]) == []
            stats = engine.stats
            assert stats["peak_bytes"] == engine.plan.budget_bytes
            assert sum(stats["peak_bytes_by_kind"].values()) == stats["peak_bytes"]
            engine.reset()
            assert np.array_equal(engine.logits(expected["tokens"]), logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["qwen2.q8_0", "phi3.q4_1"])
def test_every_cpu_variant(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESHARD_CPU_VARIANT", variant)
    model, expected = ps.Model(GOLDEN / f"{name}.gguf"), golden(name)
    placement = everywhere(model, dict.fromkeys(SPLIT_KINDS, Split(0.5, 0.25)), "vram")
    with open_plan(model, placement) as engine:
        logits = engine.logits(expected["tokens"])
        assert reference.nmse(logits, expected["reference"]) <= BARS[name]["bar"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    """Feed-forward of several K-quant blocks, four groups of heads."""
    shape = replace(find_model("tiny-llama"), n_ff=1024, n_head_kv=4, n_head=8, head_dim=128)
    path = tmp_path_factory.mktemp("split") / "wide.gguf"
    synth(shape, path, fmt="q4_k_m", progress=False)
    return ps.Model(path)


def test_boundaries_keep_blocks_whole(wide: ps.Model) -> None:
    """K-quants are cut at multiples of 256 neurons, and the parts give what the whole gives."""
    tokens = list(range(3, 40))
    steps = {unit.kind: unit.row_step for unit in wide.units}
    assert steps["ffn"] == 256
    with open_plan(wide, everywhere(wide, {}, "cpu")) as engine:
        whole = engine.logits(tokens)
    for vram, stream in ((0.5, 0.0), (0.25, 0.5), (0.0, 0.75), (0.3, 0.7), (0.75, 0.0)):
        with open_plan(
            wide, everywhere(wide, dict.fromkeys(SPLIT_KINDS, Split(vram, stream)), "cpu")
        ) as engine:
            assert reference.nmse(engine.logits(tokens), whole) < 1e-4
            ticks = engine.plan.bind(wide).lower(1)
        cuts = {int(n) for n in re.findall(r"blk\.0\.ffn\[(\d+):", ticks)}
        assert len(cuts) == (3 if vram and 0 < stream < 1 - vram else 2)
        assert all(n % 256 == 0 for n in cuts)


# ---- time ----


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    """One layer whose feed-forward outweighs everything else."""
    shape = replace(find_model("tiny-llama"), n_layer=1, n_embd=1024, n_ff=7168)
    path = tmp_path_factory.mktemp("split") / "heavy.gguf"
    synth(shape, path, fmt="f16", progress=False)
    return ps.Model(path)


def decode_seconds(model: ps.Model, ffn: Place) -> float:
    """Virtual seconds a token with everything but the feed-forward in VRAM."""
    with open_plan(
        model, replace(everywhere(model, {"ffn": ffn}, "vram"), slot_bytes=8 << 20)
    ) as engine:
        engine.generate([1, 2, 3], max_tokens=6, temperature=0, logit_bias={2: -1e9})
        return 1 / float(engine.stats["tps"])


def test_both_sides_work_at_once(heavy: ps.Model) -> None:
    """On the emulated machine the bus brings 25 GB/s and the CPU reads 60: 5 parts in 17 are the bus's."""
    rates = dict(zip(("h2d", "d2h", "vram", "flops", "dram"), _core.emu_profile(), strict=False))
    stream, cpu = decode_seconds(heavy, "stream"), decode_seconds(heavy, "cpu")
    share = rates["h2d"] / (rates["h2d"] + rates["dram"])
    both = decode_seconds(heavy, Split(stream=share))
    assert both < 0.85 * cpu < 0.85 * stream
    half = decode_seconds(heavy, Split(vram=0.5))
    assert half < 0.65 * cpu


def test_dividing_every_layer_alike_beats_taking_whole_units(heavy: ps.Model) -> None:
    """Where VRAM holds half of a feed-forward, bus, CPU and GPU work on it at once; `auto` knows."""

    def predicted(policy: str) -> Any:
        return ps.simulate(
            heavy, vram="48MiB", policy=policy, n_prompt=256, n_ctx=512, profile=ps.EmuDevice()
        )

    even = predicted("even_split")
    for policy in ("static_attn", "shard_attn"):
        assert even.tps > 1.2 * predicted(policy).tps
    auto = predicted("auto")
    assert auto.ttft_s / auto.tps <= 1.02 * even.ttft_s / even.tps


# ---- experts: split by placing each of them ----


def share_experts(model: ps.Model, n_stream: int, rest: Place = "vram") -> Placement:
    """The first experts of each layer stream, the others are the CPU's."""
    places: dict[str, Place] = {}
    for unit in model.units:
        streams = unit.expert is not None and unit.expert < n_stream
        places[unit.name] = rest if unit.expert is None else "stream" if streams else "cpu"
    return replace(Placement.everywhere(places), n_slots=4, slot_bytes=8 << 20)


def test_a_layers_experts_on_the_bus_and_on_the_cpu() -> None:
    """Token by token and as a prompt, the bits of the CPU alone: contributions add in the order of their ranks."""
    model, tokens = ps.Model(GOLDEN / "qwen3moe.q4_k_m.gguf"), list(range(3, 40))
    answers = []
    for n_stream in (0, 5, 16):
        with open_plan(model, share_experts(model, n_stream)) as engine:
            engine.generate(tokens[:30], max_tokens=4, temperature=0)
            answers.append((engine.last_logits.copy(), engine.logits(tokens)))
            ticks = engine.plan.bind(model).ticks(1)
        streams, ops = _core.Plan.tick_names()[1:3]
        ran = {streams[t["stream"]] for t in ticks if ops[t["op"]] == "moe_up" and t["flops"]}
        assert len(ran) == (1 if n_stream in (0, 16) else 2)
    for last, logits in answers[1:]:
        assert np.array_equal(last, answers[0][0])
        assert np.array_equal(logits, answers[0][1])


def test_tokens_of_a_pass_share_what_is_gathered(tmp_path: Path) -> None:
    """Passes of few tokens, most of which want the same experts, whether a ring of that size holds all or not."""
    shape = replace(find_model("tiny-qwen3moe"), n_layer=2, n_expert=32, n_expert_used=4)
    synth(shape, tmp_path / "moe.gguf", fmt="q4_0", progress=False)
    model, prompts = ps.Model(tmp_path / "moe.gguf"), ([7], [7, 7, 7], [7, 8, 7, 9])
    image = max(unit.n_bytes for unit in model.units if unit.expert is not None)
    placements = [share_experts(model, n_stream) for n_stream in (0, 20, 32)]
    placements.append(replace(placements[-1], n_slots=2, slot_bytes=(image // 256 + 1) * 512))
    answers, gathers = [], []
    for placement in placements:
        with open_plan(model, placement) as engine:
            answers.append([engine.logits(prompt) for prompt in prompts])
            ticks = [engine.plan.bind(model).ticks(len(prompt)) for prompt in prompts]
        ops = _core.Plan.tick_names()[2]
        gathers.append([sum(ops[i] == "gather_experts" for i in t["op"] if i >= 0) for t in ticks])
    assert gathers == [[0, 0, 0], [2, 2, 2], [2, 2, 2], [2, 0, 0]]
    for logits in answers[1:]:
        assert all(np.array_equal(*pair) for pair in zip(logits, answers[0], strict=True))


def test_bus_and_cpu_share_experts_at_once(tmp_path: Path) -> None:
    shape = replace(find_model("tiny-qwen3moe"), n_layer=1, n_embd=512, n_ff=2048, n_ff_dense=2048)
    synth(shape, tmp_path / "moe.gguf", fmt="f16", progress=False)
    model = ps.Model(tmp_path / "moe.gguf")

    def seconds(n_stream: int) -> float:
        with open_plan(model, share_experts(model, n_stream)) as engine:
            engine.generate([1, 2, 3], max_tokens=6, temperature=0, logit_bias={2: -1e9})
            return 1 / float(engine.stats["tps"])

    cpu, both, stream = seconds(0), seconds(5), seconds(16)  # of 16: the bus takes 5 parts in 17
    assert both < 0.9 * cpu < 0.9 * stream


# ---- experts divided as they are routed ----


def divided(model: ps.Model, share: float, n_vram: int = 0, rest: Place = "vram") -> Placement:
    """The first experts of each layer in VRAM, the others shared by bus and CPU; in the ring, what 8 tokens want."""
    places: dict[str, Place] = {}
    for unit in model.units:
        near = unit.expert is not None and unit.expert < n_vram
        places[unit.name] = rest if unit.expert is None else "vram" if near else Split(stream=share)
    return replace(Placement.everywhere(places), n_slots=8, slot_bytes=8 << 20)


def gathers_of(engine: ps.Engine, model: ps.Model, n_tok: int) -> list[tuple[str, int]]:
    """(stream, bytes over the bus) of each op that finds routed experts."""
    streams, ops = _core.Plan.tick_names()[1:3]
    ticks = engine.plan.bind(model).ticks(n_tok)
    found = [t for t in ticks if t["op"] >= 0 and ops[t["op"]] == "gather_experts"]
    return [(streams[t["stream"]], int(t["bus_bytes"])) for t in found]


@pytest.mark.parametrize("rest", ["vram", "cpu"])
@pytest.mark.parametrize("name", ["qwen3moe.q4_k_m", "mixtral.q4_0", "gpt-oss.mxfp4"])
def test_golden_logits_of_divided_experts(name: str, rest: Place, heap: None) -> None:
    """Token by token and as a prompt, whichever side has the router; the bits of the CPU alone."""
    model, expected = ps.Model(GOLDEN / f"{name}.gguf"), golden(name)
    tokens, answers = expected["tokens"], []
    for share, n_vram in ((0.0, 0), (0.1, 0), (0.5, 0), (0.8, 3), (0.5, 1), (1.0, 0)):
        device = ps.EmuDevice(seed=3, delays=True)
        with open_plan(model, divided(model, share, n_vram, rest), device) as engine:
            prompt = engine.logits(tokens)
            assert reference.nmse(prompt, expected["reference"]) <= BARS[name]["bar"]
            engine.generate(tokens[:5].tolist(), max_tokens=4, temperature=0)
            answers.append((prompt, engine.last_logits.copy()))
            found = [stream for stream, _ in gathers_of(engine, model, 1)]
            n = model.hparams["n_expert"] - n_vram
            on_bus = min(n, int((n + 1) * share))
            both = ["cpu", "compute"] if rest == "vram" else ["compute", "cpu"]
            layer = [] if on_bus == 0 else ["compute"] if on_bus == n else both
            assert found == layer * model.hparams["n_layer"]
    if rest == "cpu":  # attention has the bits of one side then
        for answer in answers[1:]:
            assert all(np.array_equal(*pair) for pair in zip(answer, answers[0], strict=True))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    """64 experts, 4 for each token: passes of 8 tokens gather."""
    shape = replace(find_model("tiny-qwen3moe"), n_layer=2, n_expert=64, n_expert_used=4)
    path = tmp_path_factory.mktemp("split") / "many.gguf"
    synth(shape, path, fmt="q4_0", progress=False)
    return ps.Model(path)


def test_passes_of_few_tokens_divide_what_is_routed(many: ps.Model) -> None:
    """Also where tokens of a pass want the same experts, and other shares in other tiers."""
    prompts = [[7], [7, 7], [7, 8, 7, 9, 11], list(range(20, 28)), list(range(20, 29))]
    answers = []
    for share, n_vram in ((0.0, 0), (0.3, 0), (0.5, 20), (0.9, 0), (0.02, 0)):
        placement = divided(many, share, n_vram)
        other = divided(many, 0.7, n_vram) if share else placement
        places = {**placement.places, "verify": other.places["verify"]}
        with open_plan(many, replace(placement, places=places)) as engine:
            answers.append([engine.logits(prompt) for prompt in prompts])
            found = [len(gathers_of(engine, many, len(prompt))) for prompt in prompts]
            assert found == ([4, 4, 4, 4, 0] if share else [0] * 5)
    for answer in answers[1:]:
        assert all(np.array_equal(*pair) for pair in zip(answer, answers[0], strict=True))


def test_a_division_costs_the_expected_share(many: ps.Model) -> None:
    """Of the routed experts outside VRAM; its static one, where nothing is gathered, what is placed there."""
    image = max(unit.n_bytes for unit in many.units if unit.expert is not None)
    for share, n_vram in ((0.25, 0), (0.5, 32), (0.75, 16)):
        with open_plan(many, divided(many, share, n_vram)) as engine:
            bus = [n for stream, n in gathers_of(engine, many, 1) if stream == "compute"]
        n = 64 - n_vram  # that are shared; a token takes 4 of 64, m of these
        ways = [comb(n, m) * comb(n_vram, 4 - m) / comb(64, 4) for m in range(5)]
        mean = sum(way * min(m, int((m + 1) * share)) for m, way in enumerate(ways))
        assert bus == pytest.approx([mean * image] * 2, rel=0.01)


def test_experts_that_cannot_be_locked_keep_their_places(many: ps.Model) -> None:
    """Under a limit of locked memory that holds what streams, or not even that, layers are divided by their places."""
    tokens = [3, 4, 5]
    cpu_divides = ("cpu", "gather_experts")

    def ran(engine: ps.Engine) -> set[tuple[str, str]]:
        return {(row["stream"], row["op"]) for row in engine.trace().ops()}

    with open_plan(many, divided(many, 0.4), trace=True) as engine:
        expected, locked = engine.logits(tokens), int(engine.stats["locked_bytes"])
        assert cpu_divides in ran(engine)
    experts = sum(unit.n_bytes for unit in many.units if unit.expert is not None)
    for less, bounces in ((experts // 4, False), (experts * 3 // 4, True)):
        limits = {"locked_limit": locked - less, "trace": True}
        with open_plan(many, divided(many, 0.4), **limits) as engine:
            assert np.array_equal(engine.logits(tokens), expected)
            found = ran(engine)
            assert cpu_divides not in found
            assert (("compute", "gather_experts") in found) != bounces
            assert engine.stats["locked_bytes"] <= locked - less
            assert (engine.stats["bounce_bytes"] > 0) == bounces


def test_bus_and_cpu_divide_what_is_routed_at_once(tmp_path: Path) -> None:
    shape = replace(find_model("tiny-qwen3moe"), n_layer=1, n_embd=512, n_ff=2048, n_ff_dense=2048)
    synth(shape, tmp_path / "moe.gguf", fmt="f16", progress=False)
    model = ps.Model(tmp_path / "moe.gguf")
    with open_plan(model, divided(model, 5 / 17)) as engine:
        engine.generate([1, 2, 3], max_tokens=6, temperature=0, logit_bias={2: -1e9})
        both = 1 / float(engine.stats["tps"])
    with open_plan(model, share_experts(model, 0)) as engine:
        engine.generate([1, 2, 3], max_tokens=6, temperature=0, logit_bias={2: -1e9})
        assert both < 0.9 / float(engine.stats["tps"])


# ---- refusals, and the way there ----


def test_an_expert_is_not_cut() -> None:
    model = ps.Model(GOLDEN / "qwen3moe.q4_k_m.gguf")
    with pytest.raises(ps.PlanError, match="an expert is not cut") as info:
        open_plan(model, everywhere(model, {"expert": Split(vram=0.5)}, "cpu"))
    assert info.value.unit == "blk.0.expert.0"
    assert info.value.tier == "decode"


def test_a_layers_experts_have_one_share() -> None:
    model = ps.Model(GOLDEN / "qwen3moe.q4_k_m.gguf")
    placement = divided(model, 0.5)
    odd = {**placement.places["small"], "blk.1.expert.7": Split(stream=0.25)}
    with pytest.raises(ps.PlanError, match="the same share") as info:
        open_plan(model, replace(placement, places={**placement.places, "small": odd}))
    assert (info.value.unit, info.value.tier) == ("blk.1.expert.7", "small")
    with pytest.raises(ps.PlanError, match="between 0 and 1"):
        open_plan(model, divided(model, 1.5))


def test_divided_experts_survive_their_file(tmp_path: Path) -> None:
    model = ps.Model(GOLDEN / "qwen3moe.q4_k_m.gguf")
    with open_plan(model, divided(model, 0.4, 5)) as engine:
        engine.plan.save(tmp_path / "plan.json")
        logits, text, places = engine.logits([3, 4]), engine.plan.explain(), engine.plan.places
    plan = ps.Plan.load(tmp_path / "plan.json")
    assert plan.places == places
    assert places["decode"]["blk.0.expert.5"] == Split(stream=0.4)
    assert "split: vram 0%, stream 40%, cpu 60%" in text
    with ps.Engine(model, device="emu", plan=plan, threads=2) as engine:
        assert np.array_equal(engine.logits([3, 4]), logits)


def test_a_split_plan_survives_its_file(tmp_path: Path) -> None:
    model = ps.Model(GOLDEN / "qwen2.q8_0.gguf")
    tokens = golden("qwen2.q8_0")["tokens"]
    with open_plan(model, random_shares(model, 5)) as engine:
        engine.plan.save(tmp_path / "plan.json")
        logits, text = engine.logits(tokens), engine.plan.explain()
        diff = engine.plan.diff(ps.Plan.load(tmp_path / "plan.json"))
    assert "split: vram" in text
    assert diff == ""
    with ps.Engine(model, device="emu", plan=tmp_path / "plan.json", threads=2) as engine:
        assert np.array_equal(engine.logits(tokens), logits)


def test_parts_take_no_more_host_memory_than_the_units() -> None:
    """Only what is not in VRAM is read into host memory, and it is the engine's own: gone when it is closed."""
    model = ps.Model(GOLDEN / "qwen2.q8_0.gguf")
    with open_plan(model, everywhere(model, {"ffn": Split(vram=0.5)}, "vram")) as engine:
        ffn = sum(unit.n_bytes for unit in model.units if unit.kind == "ffn")
        kept = engine.stats["ram_bytes"] - engine.stats["locked_bytes"]  # no image is locked
        assert 0.48 * ffn < kept < 0.55 * ffn
    assert model._core.image_bytes == 0

"""Layers of which only the newest tokens' KV is in VRAM: plans say so, and answers do not show it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from test_engine import BARS, GOLDEN, check_bar, golden

import pipeshard as ps

N_CTX = 320
PAGE = 64
NAMES = ["llama.q4_k_m", "gemma3.q4_0", "gpt-oss.mxfp4", "qwen3moe.q4_k_m"]


def open_engine(
    name: str,
    kv_vram_tok: dict[int, int] | None,
    *,
    kv_far_on: Any = "gpu",
    changed: Any = lambda placement: placement,
    **options: Any,
) -> ps.Engine:
    """All units resident, and so much of the layers' KV. changed: what else the placement is to be."""
    path = GOLDEN / f"{name}.gguf"
    given = {"device": "emu", "n_ctx": N_CTX, "threads": 2} | options
    with ps.Engine(path, **given, vram="1GiB") as engine:
        plan = engine.plan
    everywhere = ps.Placement.everywhere(dict.fromkeys(plan.places["decode"], "vram"))
    placement = replace(
        plan.placement,
        places=everywhere.places,
        kv_vram_tok=kv_vram_tok,
        kv_far_on=kv_far_on,
    )
    return ps.Engine(path, **given, plan=replace(plan, placement=changed(placement)))


def random_windows(name: str, seed: int) -> dict[int, int]:
    rng = np.random.default_rng(seed)
    n_layer = ps.Model(GOLDEN / f"{name}.gguf").hparams["n_layer"]
    return {i: int(rng.choice([0, 1, PAGE, 100, 2 * PAGE, N_CTX])) for i in range(n_layer)}


@pytest.mark.parametrize("far", ["gpu", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_whatever_stays_in_vram(name: str, far: str) -> None:
    with open_engine(name, random_windows(name, 1), kv_far_on=far) as engine:
        check_bar(name, engine.logits(golden(name)["tokens"]))


def answers(engine: ps.Engine, prompts: list[list[int]], fresh: bool) -> list[Any]:
    """The last logits of 30 tokens behind each prompt; the same tokens whatever rounding does."""
    rows = []
    for prompt in prompts:
        if fresh:
            engine.reset()
        engine.generate(prompt, max_tokens=30, logit_bias={7: 1e6}, temperature=0.0)
        rows.append(np.array(engine.last_logits))
    return rows


@pytest.mark.parametrize("name", ["llama.q4_k_m", "gpt-oss.mxfp4"])
def test_long_answers_agree_and_repeat(name: str) -> None:
    """Prompts of more pages than windows have, with parts in common; the bits do not show what ran before."""
    ids = np.random.default_rng(3).integers(3, 250, 180).tolist()
    prompts = [ids, ids[:90] + ids[:20], ids[:70] + ids[20:130]]
    delays = ps.EmuDevice(seed=5, delays=True)
    with open_engine(name, None) as engine:
        expected = answers(engine, prompts, fresh=False)
    windows = random_windows(name, 2) | {0: PAGE}
    with open_engine(name, windows) as engine:
        logits = answers(engine, prompts, fresh=False)
        assert engine.stats["n_cached"] >= 64  # and yet: as if nothing had been
    by_cpu = windows | {layer: 1 for layer, n_tok in windows.items() if n_tok == 0}
    with open_engine(name, by_cpu, kv_far_on="cpu") as engine:
        others = answers(engine, prompts, fresh=False)
    with open_engine(name, by_cpu, kv_far_on="gpu", device=delays) as engine:
        for got, wanted in zip(answers(engine, prompts, fresh=True), others, strict=True):
            assert np.array_equal(got, wanted)  # the same kernels and merge, wherever keys are read
    with open_engine(name, windows, device=delays) as engine:
        again = answers(engine, prompts, fresh=True)
    for got, repeated, wanted in zip(logits, again, expected, strict=True):
        assert reference.nmse(got, wanted) <= BARS[name]["bar"]
        assert np.array_equal(got, repeated)


def test_plans_keep_windows_in_files(tmp_path: Path) -> None:
    windows = {0: 64, 1: 128}
    with open_engine("llama.q4_k_m", windows) as engine:
        plan = engine.plan
        ids = list(range(3, 203))
        logits = engine.logits(ids)
    assert plan.to_dict()["kv_vram_tok"] == {"0": 64, "1": 128}
    assert plan.to_dict()["kv_far_on"] == "gpu"
    assert "layers 0: the newest 64 tokens in VRAM" in plan.explain()
    assert "the GPU reads over the bus" in plan.explain()
    plan.save(tmp_path / "plan.json")
    loaded = ps.Plan.load(tmp_path / "plan.json")
    assert loaded.diff(plan) == ""
    assert loaded.placement.kv_vram_tok == windows
    model = GOLDEN / "llama.q4_k_m.gguf"
    with ps.Engine(model, plan=loaded, device="emu", n_ctx=N_CTX, threads=2) as engine:
        assert np.array_equal(engine.logits(ids), logits)


def test_who_attends_to_what_is_far_is_part_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with open_engine("llama.q4_k_m", {0: 64, 1: N_CTX}, kv_far_on="cpu") as engine:
        plan = engine.plan
    other = replace(plan, placement=replace(plan.placement, kv_far_on="gpu"))
    assert plan.diff(other) == '--- this\n+++ other\n-kv_far_on: "cpu"\n+kv_far_on: "gpu"'
    assert "layers 0: the newest 64 tokens in VRAM, older ones in host memory" in plan.explain()
    assert "which the CPU attends to" in plan.explain()
    plan.save(path)
    assert ps.Plan.load(path).diff(plan) == ""
    data = plan.to_dict()
    del data["kv_far_on"]  # as plans of older versions
    path.write_text(json.dumps(data))
    assert ps.Plan.load(path).placement.kv_far_on == "gpu"
    path.write_text(json.dumps(data | {"kv_far_on": "bus"}))
    with pytest.raises(ps.FormatError) as error:
        ps.Plan.load(path)
    assert error.value.field == "kv_far_on"
    with pytest.raises(ps.PlanError, match="kv_far_on is 'bus'"):
        open_engine("llama.q4_k_m", {0: 64}, kv_far_on="bus")


def by_tier(placement: ps.Placement) -> ps.Placement:
    """Half of the units are resident in passes of few tokens only, the other half in long ones."""
    names = list(placement.places["decode"])
    places = {
        tier: {
            name: "vram" if (i % 2 == 0) == (tier in ("decode", "verify")) else "stream"
            for i, name in enumerate(names)
        }
        for tier in placement.places
    }
    return replace(placement, places=places, per_tier_residency=True, n_slots=4, slot_bytes=1 << 20)


def test_residents_come_and_go_beside_windows() -> None:
    prompts = [np.random.default_rng(6).integers(3, 250, n).tolist() for n in (150, 70)]
    rows = []
    for far in ("gpu", "cpu"):
        with open_engine("llama.q4_k_m", {0: 64, 1: 1}, kv_far_on=far, changed=by_tier) as engine:
            rows.append(answers(engine, prompts, fresh=False))
    for over_bus, by_cpu in zip(*rows, strict=True):
        assert np.array_equal(over_bus, by_cpu)


@pytest.mark.parametrize("far", ["gpu", "cpu"])
def test_what_the_cpu_attends_to_does_not_cross_the_bus(far: str) -> None:
    """A token at the end of a context: of two layers all keys but those of the newest page."""
    with open_engine("llama.q4_k_m", {0: 1, 1: 1}, kv_far_on=far) as engine:
        core = engine.plan.bind(engine.model)
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf").hparams
    row = 2 * model["n_kv_head"] * model["head_dim"] * 2
    _, streams, ops, _ = core.tick_names()
    ticks = core.ticks(1, max_kv=N_CTX)
    attn = ticks[ticks["op"] == ops.index("attn")]
    on_cpu = attn["stream"] == streams.index("cpu")
    assert list(on_cpu) == [True, False] * 2 if far == "cpu" else not on_cpu.any()
    read = attn["bytes"][on_cpu] if far == "cpu" else attn["bus_bytes"][1::2]
    assert ((N_CTX - PAGE) * row <= read).all()
    assert (read < (N_CTX - PAGE + 8) * row).all()
    assert far == "gpu" or not attn["bus_bytes"].any()


def test_kv_bytes_are_those_of_the_pages() -> None:
    """Of two layers a page more than 64 tokens fill, and stages for two layers of the whole context."""
    model = ps.Model(GOLDEN / "llama.q4_k_m.gguf")
    page = 2 * PAGE * model.hparams["n_kv_head"] * model.hparams["head_dim"] * 2
    with open_engine("llama.q4_k_m", {0: PAGE, 1: PAGE}) as engine:
        assert engine.plan.bytes["kv"] == 2 * 2 * page + 2 * (N_CTX // PAGE) * page
        engine.generate(list(range(3, 203)), max_tokens=20)
        assert engine.stats["peak_bytes"] <= engine.plan.needed_bytes


def test_windows_survive_another_budget() -> None:
    """What set_budget carries over is in host memory; windows fill again behind it."""
    ids = np.random.default_rng(4).integers(3, 250, 150).tolist()

    def run(change: bool) -> Any:
        with open_engine("llama.q4_k_m", {0: PAGE, 1: 1}) as engine:
            engine.generate(ids, max_tokens=4, temperature=0.0, logit_bias={7: 1e6})
            if change:
                engine.set_budget("512MiB")
            engine.generate(ids, max_tokens=90, temperature=0.0, logit_bias={7: 1e6})
            return engine.last_logits.copy()

    assert reference.nmse(run(True), run(False)) <= BARS["llama.q4_k_m"]["bar"]

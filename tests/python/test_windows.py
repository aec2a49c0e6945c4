"""Layers of which only the newest tokens' KV is in VRAM: plans say so, and answers do not show it."""

from __future__ import annotations

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


def open_engine(name: str, kv_vram_tok: dict[int, int] | None, **options: Any) -> ps.Engine:
    """All units resident, and so much of the layers' KV."""
    path = GOLDEN / f"{name}.gguf"
    given = {"device": "emu", "n_ctx": N_CTX, "threads": 2} | options
    with ps.Engine(path, **given, vram="1GiB") as engine:
        plan = engine.plan
    everywhere = ps.Placement.everywhere(dict.fromkeys(plan.places["decode"], "vram"))
    placement = replace(plan.placement, places=everywhere.places, kv_vram_tok=kv_vram_tok)
    return ps.Engine(path, **given, plan=replace(plan, placement=placement))


def random_windows(name: str, seed: int) -> dict[int, int]:
    rng = np.random.default_rng(seed)
    n_layer = ps.Model(GOLDEN / f"{name}.gguf").hparams["n_layer"]
    return {i: int(rng.choice([0, 1, PAGE, 100, 2 * PAGE, N_CTX])) for i in range(n_layer)}


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_whatever_stays_in_vram(name: str) -> None:
    with open_engine(name, random_windows(name, 1)) as engine:
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
    plan.save(tmp_path / "plan.json")
    loaded = ps.Plan.load(tmp_path / "plan.json")
    assert loaded.diff(plan) == ""
    assert loaded.placement.kv_vram_tok == windows
    model = GOLDEN / "llama.q4_k_m.gguf"
    with ps.Engine(model, plan=loaded, device="emu", n_ctx=N_CTX, threads=2) as engine:
        assert np.array_equal(engine.logits(ids), logits)


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

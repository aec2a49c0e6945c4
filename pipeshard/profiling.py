"""Measured profiles: what this machine does with a model's ops, timed once and kept.

Kept as JSON in `profiles/` of the cache folder, under a name that follows from the machine, this build and the model's
geometry: another model with the same shapes finds it, another driver or another number of threads does not. A file that
cannot be read is measured again.

Not here: the measuring (the core), profiles as data (_profile.py), what follows from them (cost.py).
Threads and processes: any number may measure at once, though they disturb each other; files appear whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

from . import _core
from ._devices import check_device, open_device
from ._disk import time_reads
from ._profile import Profile, Sample
from ._progress import Bar
from ._simulator import machine_profile
from ._version import __version__
from .demo import cache_folder
from .emu import PROFILE_KEYS, EmuDevice
from .errors import (
    DeviceError,
    FileError,
    FormatError,
    HostMemoryError,
    PipeshardError,
    RequestError,
)
from .generate import check_int
from .model import Model, check_path

__all__ = ["machine_of", "profile", "profile_for_engine", "profile_path", "stored_or_measured"]

# Of what is timed; the device must be opened for as much.
MAX_TOK, MAX_KV = 2048, 16384
_DEVICE_BYTES = (
    1 << 30
)  # many times what a GPU's cache holds, or weights seem to come faster than they do
_EMU_BYTES = 256 << 20  # where the clock knows no caches
_LEAST_BYTES = 16 << 20  # with less, hardly an op runs whole


def profile(
    model: str | os.PathLike[str] | Model,
    *,
    device: str | EmuDevice = "auto",
    threads: int | None = None,
    force: bool = False,
) -> Profile:
    """How fast this machine is at what the model does: measured in a quarter of a minute at most, by its shapes alone,
    and kept. device: as in Engine; "auto" without a GPU is the CPU. threads: of the CPU. force: measures again what is
    known already."""
    opened = model if isinstance(model, Model) else Model(check_path("model", model))
    kind, emu = check_device(device)
    n_threads = 0 if threads is None else check_int("threads", threads, 1, 4096)
    core = open_device(kind, emu, False, opened._core, MAX_KV, MAX_TOK, n_threads)
    return stored_or_measured(
        opened, core, threads=n_threads or _core.default_threads(core.kind), emu=emu, force=force
    )


def stored_or_measured(
    model: Model,
    device: _core.Device,
    *,
    threads: int,
    emu: EmuDevice | None = None,
    force: bool = False,
    device_bytes: int = _DEVICE_BYTES,
) -> Profile:
    """The profile of an open device that nothing else uses."""
    machine = machine_of(device, threads, emu)
    path = profile_path(model, machine)
    found = None if force or path is None else _read(path, model, machine)
    if found is not None:
        return found
    with Bar("measuring this machine", "step") as bar:
        rows = _core.profile(
            model._core,
            device,
            threads=threads,
            max_tok=MAX_TOK,
            max_kv=MAX_KV,
            device_bytes=min(device_bytes, _EMU_BYTES if device.kind == "emu" else _DEVICE_BYTES),
            progress=bar.to,
        )
    samples = [Sample(*row) for row in rows]
    reads = _emulated_reads(emu) if device.kind == "emu" else time_reads(model.path)
    samples += [] if reads is None else [Sample("disk", "read", None, 0, 0, *reads)]
    measured = Profile("measured", machine, geometry_of(model), tuple(samples))
    if path is not None:
        _keep(measured, path)
    return measured


def _emulated_reads(emu: EmuDevice | None) -> tuple[int, float]:
    """As its clock would charge them."""
    rate = dict(zip(PROFILE_KEYS, (emu or EmuDevice())._rates(), strict=True))["disk_bytes_per_s"]
    n_bytes = max(1, round(rate))
    return n_bytes, n_bytes / rate


# ---- which one ----


def machine_of(
    device: _core.Device, threads: int, emu: EmuDevice | None = None
) -> dict[str, str | int]:
    """What a profile's times depend on, beside the model."""
    machine: dict[str, str | int] = {
        "device": device.kind,
        "cpu": _cpu_name(),
        "cpu_variant": device.cpu_variant,
        "threads": threads,
        "pipeshard": __version__,
        "build": _build_digest(),
    }
    if device.kind != "host":
        machine |= {"gpu": device.name, "sm": device.sm, "vram_bytes": device.vram_total}
    if device.kind == "emu":
        machine["rates"] = json.dumps((emu or EmuDevice())._rates())
    return machine


def geometry_of(model: Model) -> str:
    """The same for models whose ops have the same shapes and formats, however many layers they have."""
    shapes = {
        (re.sub(r"\d+", "N", name), kind, dims)
        for name, kind, dims, *_ in model._core.metadata.tensors()
    }
    facts = {k: v for k, v in model.hparams.items() if k not in ("n_layer", "n_ctx_train")}
    return f"{model.arch}-{_digest(sorted(map(str, shapes)), facts)[:16]}"


def profile_path(model: Model, machine: dict[str, str | int]) -> Path | None:
    """Where a machine's profile for a model is kept; None where there is no place for files."""
    try:
        folder = cache_folder() / "profiles"
    except FileError:
        return None
    return folder / f"{_digest(machine, geometry_of(model))[:24]}.json"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _build_digest() -> str:
    """Which core: by what it says of itself and by its file's size and time, since reading tens of megabytes at every
    open would be felt."""
    stat = os.stat(_core.__file__)
    return _digest(dict(_core.build_info()), stat.st_size, stat.st_mtime_ns)[:12]


# ---- keeping ----


def _read(path: Path, model: Model, machine: dict[str, str | int]) -> Profile | None:
    try:
        found = Profile.load(path)
    except (FormatError, FileError):  # not there, or damaged: to be measured
        return None
    is_ours = dict(found.machine) == machine and found.model == geometry_of(model)
    return found if is_ours else None


def _keep(measured: Profile, path: Path) -> None:
    """Not being able to is no reason to fail: the next open measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        measured.save(path)
    except (OSError, PipeshardError) as error:
        warnings.warn(
            f"the measured profile could not be kept for the next time: {error}. "
            "Set PIPESHARD_CACHE to a folder for such files",
            RuntimeWarning,
            stacklevel=4,
        )


# ---- what an engine plans with ----


def profile_for_engine(
    model: Model,
    device: _core.Device,
    threads: int,
    emu: EmuDevice | None,
    budget_bytes: int,
    may_measure: bool,
) -> Profile | None:
    """Of a device on which nothing runs yet. A GPU is measured once, within the engine's budget; of an emulated one all
    is known; the CPU alone leaves nothing to decide."""
    if device.kind == "host":
        return None
    wish = automatic() if may_measure and device.kind == "cuda" else False
    if isinstance(wish, Profile):
        return wish
    if not wish or budget_bytes < _LEAST_BYTES:
        return machine_profile(device.kind, emu)
    try:
        return stored_or_measured(
            model,
            device,
            threads=threads or _core.default_threads(device.kind),
            device_bytes=budget_bytes,
        )
    except (DeviceError, HostMemoryError) as error:
        if isinstance(error, DeviceError) and error.fatal:
            raise
        warnings.warn(
            f"this machine could not be measured ({error}); plans are made for a modest one",
            RuntimeWarning,
            stacklevel=4,
        )
        return machine_profile(device.kind, emu)


def automatic() -> Profile | bool:
    """PIPESHARD_PROFILE: what engines on a GPU do that are told nothing. "default": nothing is measured (False here);
    a profile's file or name: that one; unset: measured once (True here)."""
    wish = os.environ.get("PIPESHARD_PROFILE", "")
    if wish in ("", "default"):
        return wish == ""
    try:
        return Profile.load(wish)
    except (FileError, FormatError) as error:
        raise RequestError(
            f"PIPESHARD_PROFILE is neither default nor a profile: {error}", argument="profile"
        ) from error

"""Opening devices: which one is meant, what it has to give, and what is left of that to others.

Not here: what runs on them (engine.py), how fast they are (profiling.py).
Threads: pure functions, but for the devices that they open.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from . import _core
from .emu import EmuDevice
from .errors import DeviceError
from .planner import Machine

__all__ = ["check_device", "describe", "free_budget", "open_device"]

_SPARE_BYTES = 256 << 20  # of VRAM, for everybody else: at least this or 5 %
_SPARE_SHARE = 20


def check_device(device: object) -> tuple[str, EmuDevice | None]:
    if isinstance(device, EmuDevice):
        return "emu", device
    if not isinstance(device, str):
        raise TypeError(f"device must be a name or an EmuDevice, not {type(device).__name__}")
    return device, None


def open_device(
    kind: str,
    emu: EmuDevice | None,
    has_budget: bool,
    model: _core.Model,
    n_ctx: int,
    chunk_tok: int,
    threads: int,
) -> _core.Device:
    def open_one(name: str) -> _core.Device:
        options: dict[str, Any] = {"threads": threads, "cpu_variant": _cpu_variant()}
        if name == "emu":
            described = emu or EmuDevice()
            options |= {
                "profile": described._rates(),
                "vram_capacity": described.vram_capacity or 0,
                "map_bytes_per_gib": described.map_bytes_per_gib,
                "seed": described.seed,
                "delays": described.delays,
                "faults": described.faults,
            }
        return _core.Device(name, model, n_ctx, chunk_tok, **options)

    if kind != "auto":
        return open_one(kind)
    fallback = "emu" if has_budget else "host"
    available, why = _core.cuda_status()
    if not available:
        if Path("/proc/driver/nvidia/version").exists():
            _warn_no_cuda(why, fallback)
        return open_one(fallback)
    try:
        return open_one("cuda")
    except DeviceError as error:
        _warn_no_cuda(str(error), fallback)
        return open_one(fallback)


def _warn_no_cuda(why: str, fallback: str) -> None:
    warnings.warn(
        f"not using the GPU: {why}; using {fallback} instead", RuntimeWarning, stacklevel=4
    )


def describe(device: _core.Device, emu: EmuDevice | None = None) -> tuple[Machine, int | None]:
    """What a plan must know of a device, and the bytes that it has to give."""
    machine = Machine.of(device.kind, device.sm, emu)
    return machine, device.mem_info()[0] if machine.accelerator else None


def free_budget(device: _core.Device) -> int:
    """Of what is free, after the baseline: a little is left to others, of a small device half of it at most."""
    if device.kind == "host":
        return 0
    free = device.mem_info()[0]
    return free - min(max(_SPARE_BYTES, free // _SPARE_SHARE), free // 2)


def _cpu_variant() -> str | None:
    """PIPESHARD_CPU_VARIANT: the CPU kernels to use instead of the best ones, for tests and comparisons."""
    return os.environ.get("PIPESHARD_CPU_VARIANT") or None

"""The emulated GPU: what it is to be like. Every engine opens one of its own from the same description.

It runs the plans of a real GPU with the CPU's kernels in memory of its own, on a virtual clock, with faults on demand.

Not here: the emulation (the core). Threads: immutable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from . import _core
from .errors import RequestError
from .sizes import parse_size

__all__ = ["EmuDevice", "Fault"]

FAULT_KINDS = ("alloc", "locked_alloc", "copy", "launch", "flag", "sync")
PROFILE_KEYS = (
    "h2d_bytes_per_s",
    "d2h_bytes_per_s",
    "vram_bytes_per_s",
    "gpu_flops",
    "dram_bytes_per_s",
    "cpu_flops",
    "launch_ns",
    "copy_ns",
    "flag_ns",
    "disk_bytes_per_s",
)


class Fault(NamedTuple):
    """The call behind `after` successful ones of this kind is refused, once; `sticky`: the device is then lost."""

    kind: str
    after: int = 0
    sticky: bool = False


@dataclass(frozen=True, init=False)
class EmuDevice:
    """An emulated GPU.

    profile: rates of the virtual clock by name (`PROFILE_KEYS`; what is not named keeps its default). disk_bytes_per_s
    is of units that `ram_limit` leaves on disk.
    vram_capacity: bytes or a size; None: 64 GiB of address space. delays: random pauses, from the seed.
    faults: `Fault`s or tuples like them, at most eight.
    map_bytes_per_gib: of its memory, that each GiB of page-locked host memory takes for page tables, as on a real GPU;
    at most 1 GiB."""

    profile: Mapping[str, float] | None
    vram_capacity: int | None
    seed: int
    delays: bool
    faults: tuple[Fault, ...]
    map_bytes_per_gib: int

    def __init__(
        self,
        profile: Mapping[str, float] | None = None,
        vram_capacity: int | str | None = None,
        seed: int = 0,
        delays: bool = False,
        faults: Iterable[Fault | tuple[str, int] | tuple[str, int, bool]] = (),
        map_bytes_per_gib: int = 0,
    ) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("profile", None if profile is None else _check_profile(profile))
        put("vram_capacity", _check_capacity(vram_capacity))
        put("seed", _check_count("seed", seed, (1 << 64) - 1))
        if not isinstance(delays, bool):
            raise TypeError(f"delays must be a bool, not {type(delays).__name__}")
        put("delays", delays)
        put("faults", _check_faults(faults))
        put(
            "map_bytes_per_gib",
            _check_count("map_bytes_per_gib", map_bytes_per_gib, 1 << 30),
        )

    def __reduce__(self) -> tuple[type[EmuDevice], tuple[object, ...]]:
        """For sweeps in other processes: a read-only mapping has no other way there."""
        profile = None if self.profile is None else dict(self.profile)
        values = profile, self.vram_capacity, self.seed, self.delays, self.faults
        return type(self), (*values, self.map_bytes_per_gib)

    def _rates(self) -> tuple[float, float, float, float, float, float, int, int, int, float]:
        """For the core."""
        rates = dict(zip(PROFILE_KEYS, _core.emu_profile(), strict=True)) | dict(self.profile or {})
        a, b, c, d, e, f, x, y, z, disk = (rates[key] for key in PROFILE_KEYS)
        return a, b, c, d, e, f, int(x), int(y), int(z), disk


def _check_count(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= most:
        raise RequestError(f"{name} must be between 0 and {most}, not {value}", argument=name)
    return value


def _check_capacity(value: int | str | None) -> int | None:
    if value is None:
        return None
    capacity = parse_size(value, argument="vram_capacity")
    if capacity == 0:
        raise RequestError("vram_capacity must be above 0", argument="vram_capacity")
    return capacity


def _check_profile(profile: Mapping[str, float]) -> Mapping[str, float]:
    if not isinstance(profile, Mapping):
        raise TypeError(f"profile must be a dict of rates, not {type(profile).__name__}")
    for key, value in profile.items():
        if key not in PROFILE_KEYS:
            raise RequestError(
                f"profile has no rate {key!r}; known are {', '.join(PROFILE_KEYS)}",
                argument="profile",
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"profile[{key!r}] must be a number, not {type(value).__name__}")
        low = 0.0 if key.endswith("_ns") else 1e-9
        if not low <= value <= 1e18:
            raise RequestError(f"profile[{key!r}] is out of bounds: {value}", argument="profile")
    return MappingProxyType({key: profile[key] for key in PROFILE_KEYS if key in profile})


def _check_faults(faults: Iterable[object]) -> tuple[Fault, ...]:
    if isinstance(faults, (str, bytes)) or not isinstance(faults, Iterable):
        raise TypeError(f"faults must be a list of Faults, not {type(faults).__name__}")
    checked = []
    for item in faults:
        if not isinstance(item, tuple) or not 1 <= len(item) <= 3:
            raise TypeError(f"a fault is a tuple (kind, after, sticky), not {item!r}")
        fault = Fault(*item)
        if fault.kind not in FAULT_KINDS:
            raise RequestError(
                f"there is no fault {fault.kind!r}; known are {', '.join(FAULT_KINDS)}",
                argument="faults",
            )
        if isinstance(fault.after, bool) or not isinstance(fault.after, int):
            raise TypeError(f"a fault's `after` must be an int, not {type(fault.after).__name__}")
        if not 0 <= fault.after < 1 << 62:
            raise RequestError(f"a fault's `after` must not be {fault.after}", argument="faults")
        checked.append(Fault(fault.kind, fault.after, bool(fault.sticky)))
    if len(checked) > 8:
        raise RequestError(f"at most 8 faults, not {len(checked)}", argument="faults")
    return tuple(checked)

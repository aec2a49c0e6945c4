"""What is known of a machine's speed: timed samples of its ops, copies and hand-offs, as data that can be stored, read
and taken to another machine.

The function `pipeshard.profile` measures one (profiling.py), a cost model is fitted from one (cost.py).
Not here: either of these. Threads: immutable.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .emu import PROFILE_KEYS
from .errors import FileError, FormatError, RequestError
from .model import check_path

__all__ = ["ANY_OP", "SIDES", "Profile", "Sample", "default_profile", "rates_profile", "shipped"]

FORMAT, VERSION = "pipeshard-profile", 1
ANY_OP = "*"  # of samples that give a rate of a side, not of one op
SIDES = ("gpu", "cpu", "h2d", "d2h", "fixed", "disk")
LOADS = ("idle", "h2d", "d2h", "cpu", "copy_both", "gather")
SOURCES = ("measured", "datasheet", "default")
_SHIPPED = Path(__file__).parent / "profiles"
_COPY_BYTES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 32 << 20)

# A GPU and a CPU that most people's are faster than: what is planned with until somebody measures.
_MODEST_RATES = {
    "h2d_bytes_per_s": 12e9,
    "d2h_bytes_per_s": 12e9,
    "vram_bytes_per_s": 200e9,
    "gpu_flops": 20e12,
    "dram_bytes_per_s": 20e9,
    "cpu_flops": 200e9,
    "launch_ns": 4000.0,
    "copy_ns": 8000.0,
    "flag_ns": 5000.0,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing that was timed.

    side: who worked: "gpu", "cpu", "h2d", "d2h", "disk"; "fixed": what takes time whatever its size. op: of gpu and cpu
    an op as tick lists name it, or "*" for any; of h2d and d2h "copy", or "gather" (the GPU reads scattered locked
    memory itself), or an op that reads its weights or keys from there; of disk "read", of large parts of the model's
    file past the page cache, which is there only where the file system allows such reads; of fixed "launch",
    "graph_node", "flag" (half of a round trip between GPU and CPU), "pass" (its start and last wait) or "copy" (to
    issue one). fmt: of weights or cache. n_tok: rows that the op works on. bytes: moved through that side's memory, or
    over the bus. seconds: the median. threads: of the CPU; 0: as many as there are. load: what else ran. extrapolated:
    the run was cut short and scaled."""

    side: str
    op: str
    fmt: str | None
    n_tok: int
    flops: int
    bytes: int
    seconds: float
    threads: int = 0
    load: str = "idle"
    extrapolated: bool = False


_Reader = Callable[[object], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_time(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 <= value <= 1e9


_SAMPLE_FIELDS: dict[str, tuple[_Reader, str]] = {
    "side": (lambda v: v in SIDES, "one of " + ", ".join(SIDES)),
    "op": (_is_text, "text"),
    "fmt": (lambda v: v is None or _is_text(v), "text or null"),
    "n_tok": (_is_count, "a count"),
    "flops": (_is_count, "a count"),
    "bytes": (_is_count, "a count"),
    "seconds": (_is_time, "seconds"),
    "threads": (_is_count, "a count"),
    "load": (lambda v: v in LOADS, "one of " + ", ".join(LOADS)),
    "extrapolated": (lambda v: isinstance(v, bool), "true or false"),
}
_OPTIONAL = ("threads", "load", "extrapolated")


@dataclass(frozen=True)
class Profile:
    """Samples of one machine. source: "measured", "datasheet" (figures that somebody published) or "default" (rates
    that are nobody's). machine: what it is, by name. model: the geometry whose op shapes were timed, or several; None:
    none's."""

    source: str
    machine: Mapping[str, str | int]
    model: str | None
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "machine", MappingProxyType(dict(self.machine)))
        object.__setattr__(self, "samples", tuple(self.samples))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, dict(self.machine), self.model, self.samples)

    def __hash__(self) -> int:
        return hash((self.source, self.model, self.samples))

    def __repr__(self) -> str:
        return f"<Profile of {self.title}, {len(self.samples)} samples>"

    @property
    def title(self) -> str:
        """For people: which machine, and how it is known."""
        name = str(self.machine.get("gpu") or self.machine.get("device") or "a machine")
        return f"{name} ({self.source})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `save` writes it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "machine": dict(self.machine),
            "model": self.model,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, a sample a line. The file appears whole or not at all."""
        head = {key: value for key, value in self.to_dict().items() if key != "samples"}
        lines = (json.dumps(asdict(sample)) for sample in self.samples)
        text = json.dumps(head, indent=1)[:-2] + ',\n "samples": [\n  '
        text += ",\n  ".join(lines) + "\n ]\n}\n"
        target = check_path("path", path)
        part = f"{target}.{os.getpid()}.part"
        try:
            Path(part).write_text(text, encoding="utf-8")
            os.replace(part, target)
        except OSError as error:
            Path(part).unlink(missing_ok=True)
            raise FileError(
                f"cannot write {target}: {error.strerror}", path=target, errno=error.errno
            ) from error

    @classmethod
    def joined(cls, profiles: Sequence[Profile]) -> Profile:
        """What several models' profiles say of one machine, for models like any of them."""
        if len(profiles) == 1:
            return profiles[0]
        if not profiles or any(p.machine != profiles[0].machine for p in profiles):
            raise RequestError(
                "only profiles of one machine can be joined, and one at least", argument="profiles"
            )
        models = " ".join(dict.fromkeys(p.model for p in profiles if p.model is not None))
        samples = dict.fromkeys(sample for p in profiles for sample in p.samples)
        return cls(profiles[0].source, profiles[0].machine, models or None, tuple(samples))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """A file that `save` wrote, or the name of one that comes with pipeshard."""
        name = check_path("path", path)
        try:
            text = _find(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{name} is not a profile: it is not text", path=name) from error
        except OSError as error:
            raise FileError(
                f"cannot read the profile {name}: {error.strerror}; with pipeshard come {', '.join(shipped())}",
                path=name,
                errno=error.errno,
            ) from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{name} is not a profile: {error}", path=name) from error
        return cls.from_dict(data, path=name)

    @classmethod
    def from_dict(cls, data: object, *, path: str | None = None) -> Profile:
        """What `to_dict` made. FormatError names the field that is wrong."""
        reader = _Fields(data, path)
        reader.expect("format", lambda v: v == FORMAT, repr(FORMAT))
        reader.expect("version", lambda v: v == VERSION, f"{VERSION}, all that this release reads")
        source = reader.expect("source", lambda v: v in SOURCES, "one of " + ", ".join(SOURCES))
        machine = reader.expect(
            "machine",
            lambda v: isinstance(v, dict) and all(_is_text(x) or _is_count(x) for x in v.values()),
            "an object of texts and counts",
        )
        model = reader.expect("model", lambda v: v is None or _is_text(v), "text or null")
        rows = reader.expect(
            "samples", lambda v: isinstance(v, list) and len(v) > 0, "a list of samples"
        )
        samples = tuple(_sample(row, f"samples[{i}]", path) for i, row in enumerate(rows))
        return cls(source, machine, model, samples)


class _Fields:
    """An object of a JSON file, read field by field."""

    def __init__(self, data: object, path: str | None, prefix: str = "") -> None:
        self._path = path
        self._prefix = prefix
        if not isinstance(data, dict):
            raise self.error(prefix.rstrip(".") or "profile", "an object")
        self._data = data

    def error(self, field: str, what: str) -> FormatError:
        where = self._path or "the profile"
        return FormatError(f"{where}: {field} must be {what}", path=self._path, field=field)

    def expect(self, key: str, is_good: _Reader, what: str) -> Any:
        value = self._data.get(key)
        try:
            good = key in self._data and is_good(value)
        except TypeError:  # a list where a name belongs cannot be looked up
            good = False
        if not good:
            raise self.error(self._prefix + key, what)
        return value

    @property
    def names(self) -> list[object]:
        return list(self._data)


def _sample(row: object, where: str, path: str | None) -> Sample:
    reader = _Fields(row, path, prefix=where + ".")
    unknown = [key for key in reader.names if key not in _SAMPLE_FIELDS]
    if unknown:
        raise reader.error(f"{where}.{unknown[0]}", "left out: samples have no such field")
    values = {
        item.name: reader.expect(item.name, *_SAMPLE_FIELDS[item.name])
        for item in fields(Sample)
        if item.name not in _OPTIONAL or item.name in reader.names
    }
    return Sample(**(values | {"seconds": float(values["seconds"])}))


# ---- profiles that nobody measured here ----


def shipped() -> list[str]:
    """Names of the profiles that come with pipeshard."""
    return sorted(path.name for path in _SHIPPED.glob("*.json"))


def _find(name: str) -> Path:
    path = Path(name)
    here = _SHIPPED / path.name
    return here if not path.exists() and path.name == name and here.is_file() else path


def default_profile(
    device: str = "cuda",
    rates: Mapping[str, float] | None = None,
    *,
    machine: Mapping[str, str | int] | None = None,
) -> Profile:
    """What is planned with where nothing was measured. On "emu" the rates of its virtual clock (`EmuDevice.profile`'s
    over the usual ones), so that what follows is what the clock will say; elsewhere modest ones."""
    if device == "emu":
        from . import _core

        usual = dict(zip(PROFILE_KEYS, _core.emu_profile(), strict=True))
    else:
        usual = _MODEST_RATES
    return rates_profile(
        {**usual, **(rates or {})}, source="default", machine={"device": device, **(machine or {})}
    )


def rates_profile(
    rates: Mapping[str, float], *, source: str, machine: Mapping[str, str | int]
) -> Profile:
    """A profile of a machine whose ops take `launch_ns` and the longer of bytes and FLOPs over their rates, and whose
    copies take `copy_ns` and bytes over the bus's rate; keys as in `EmuDevice.profile`, of which disk_bytes_per_s may
    be left out where it is not known."""
    launch, copy = rates["launch_ns"] * 1e-9, rates["copy_ns"] * 1e-9
    samples = []
    for side, memory, math_rate in (
        ("gpu", "vram_bytes_per_s", "gpu_flops"),
        ("cpu", "dram_bytes_per_s", "cpu_flops"),
    ):
        # As much as takes about a second, so that rounding to whole bytes loses nothing.
        n_bytes, n_flops = _whole(rates[memory]), _whole(rates[math_rate])
        samples += [
            Sample(side, ANY_OP, None, 0, 0, 0, launch),
            Sample(side, ANY_OP, None, 1, 0, n_bytes, launch + n_bytes / rates[memory]),
            Sample(side, ANY_OP, None, 1024, n_flops, 0, launch + n_flops / rates[math_rate]),
        ]
    for side in ("h2d", "d2h"):
        rate = rates[f"{side}_bytes_per_s"]
        samples += [Sample(side, "copy", None, 0, 0, n, copy + n / rate) for n in _COPY_BYTES]
    disk = rates.get("disk_bytes_per_s")
    if disk is not None:
        samples.append(Sample("disk", "read", None, 0, 0, _whole(disk), _whole(disk) / disk))
    samples += [
        Sample("fixed", "flag", None, 0, 0, 0, rates["flag_ns"] * 1e-9),
        *(Sample("fixed", op, None, 0, 0, 0, 0.0) for op in ("launch", "graph_node", "pass")),
    ]
    return Profile(source, machine, None, tuple(samples))


def _whole(rate: float) -> int:
    return min(max(1, round(rate)), 1 << 62)

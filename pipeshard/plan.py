"""A plan: the places of all units for every tier, the memory layout's sizes, and the bytes that follow. Immutable data
that can be printed, compared, stored as JSON, edited by hand and run again.

A loaded plan is checked for its form here and for everything else by the core, when it meets a model.

Not here: deciding (planner.py), laying out and lowering (the core).
Threads: immutable.
"""

from __future__ import annotations

import difflib
import html
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .errors import FileError, FormatError, PlanError
from .model import Model, check_path
from .placement import FAR_SIDES, FarSide, Place, Placement, Split, Tier, numbered
from .sizes import format_bytes

__all__ = ["Plan"]

VERSION = 1
_KINDS = {"cpu": 0, "vram": 1, "stream": 2}
_SPLIT = 3
_MAX_TOK = 1 << 27  # as the core has it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an engine runs by. `bytes`: VRAM by kind, which sum to `needed_bytes`."""

    arch: str
    digest: str
    accelerator: bool
    sm: int
    n_ctx: int
    n_seq: int
    kv: str
    budget_bytes: int
    tiers: tuple[Tier, ...]
    placement: Placement
    chunk_tok: int
    pass_tok: int
    logit_rows: int
    graph_reserve_bytes: int
    map_bytes_per_gib: int = 0
    bytes: Mapping[str, int] = field(default_factory=dict)
    predicted: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", MappingProxyType(dict(self.bytes)))

    @property
    def places(self) -> Mapping[str, Mapping[str, Place]]:
        """Tier to unit to place."""
        return self.placement.places

    @property
    def needed_bytes(self) -> int:
        """Of VRAM, above the baseline."""
        return sum(self.bytes.values())

    # ---- meeting the core ----

    def bind(self, model: Model) -> _core.Plan:
        """The plan as the core knows it: checked against this model, laid out, found to fit. PlanError, BudgetError."""
        if self.digest != model.digest:
            raise PlanError(
                f"the plan is for another model ({self.arch}, {self.digest[:12]}) than {model.path} "
                f"({model.arch}, {model.digest[:12]})"
            )
        kinds, shares = _arrays(self.placement, self.tiers, model)
        if self.placement.kv_far_on not in FAR_SIDES:
            raise PlanError(f"kv_far_on is {self.placement.kv_far_on!r}; use gpu or cpu")
        return _core.Plan(
            model._core,
            [(tier.name, tier.max_tok) for tier in self.tiers],
            kinds,
            shares=shares,
            kv_vram_tok=_kv_array(self.placement.kv_vram_tok, model),
            accelerator=self.accelerator,
            sm=self.sm,
            budget_bytes=self.budget_bytes,
            n_ctx=self.n_ctx,
            n_seq=self.n_seq,
            kv=self.kv,
            n_slots=self.placement.n_slots,
            slot_bytes=self.placement.slot_bytes,
            chunk_tok=self.chunk_tok,
            pass_tok=self.pass_tok,
            logit_rows=self.logit_rows,
            graph_reserve_bytes=self.graph_reserve_bytes,
            map_bytes_per_gib=self.map_bytes_per_gib,
            per_tier_residency=self.placement.per_tier_residency,
            kv_far_on_cpu=self.placement.kv_far_on == "cpu",
        )

    # ---- as data ----

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `save` writes it."""
        placement = self.placement
        kv_vram_tok = placement.kv_vram_tok
        return {
            "version": VERSION,
            "model": {"sha256": self.digest, "arch": self.arch},
            "accelerator": self.accelerator,
            "sm": self.sm,
            "n_ctx": self.n_ctx,
            "n_seq": self.n_seq,
            "kv": self.kv,
            "budget_bytes": self.budget_bytes,
            "tiers": [{"name": tier.name, "max_tok": tier.max_tok} for tier in self.tiers],
            "places": {
                tier: {unit: _place_data(place) for unit, place in units.items()}
                for tier, units in placement.places.items()
            },
            "kv_vram_tok": None
            if kv_vram_tok is None
            else {str(layer): n for layer, n in kv_vram_tok.items()},
            "kv_far_on": placement.kv_far_on,
            "n_slots": placement.n_slots,
            "slot_bytes": placement.slot_bytes,
            "per_tier_residency": placement.per_tier_residency,
            "chunk_tok": self.chunk_tok,
            "pass_tok": self.pass_tok,
            "logit_rows": self.logit_rows,
            "graph_reserve_bytes": self.graph_reserve_bytes,
            "map_bytes_per_gib": self.map_bytes_per_gib,
            "bytes": dict(self.bytes),
            "why": dict(placement.why),
            "predicted": self.predicted,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        name = check_path("path", path)
        try:
            with open(name, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=1)
                file.write("\n")
        except OSError as error:
            raise _file_error("write", name, error) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """FileError, or FormatError that names the field."""
        name = check_path("path", path)
        try:
            with open(name, encoding="utf-8") as file:
                data = json.load(file)
        except OSError as error:
            raise _file_error("read", name, error) from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
            raise FormatError(f"{name} is no plan: {error}", path=name, field="json") from error
        return _Reader(name).plan(data)

    # ---- for people ----

    def diff(self, other: Plan) -> str:
        """What differs, line by line; "" if the two are equal."""
        if not isinstance(other, Plan):
            raise TypeError(f"other must be a Plan, not {type(other).__name__}")
        lines = difflib.unified_diff(_lines(self), _lines(other), "this", "other", lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith("@@"))

    def explain(self) -> str:
        """A table that a person reads: how fast it will be and by which figures, what it takes, what more budget would
        buy, what is where and why."""
        head = [
            f"plan for {self.arch}, n_ctx {self.n_ctx}, n_seq {self.n_seq}, KV {self.kv}",
            f"passes of at most {self.pass_tok} tokens, ops of at most {self.chunk_tok}",
        ]
        if self.accelerator:
            head.append(
                f"VRAM: {format_bytes(self.needed_bytes)} of a budget of {format_bytes(self.budget_bytes)}"
            )
            head += [
                f"  {kind:<8} {format_bytes(n):>12}" for kind, n in self.bytes.items() if n > 0
            ]
            if self.placement.per_tier_residency:
                head.append("tiers have residents of their own: a pass first uploads what it lacks")
            head += self._kv_lines()
        else:
            head.append("no accelerator: everything is computed by the CPU")
        head += _predicted_lines(self.predicted)
        return "\n".join([*head, *self._place_table()])

    def _kv_lines(self) -> list[str]:
        """Which layers' older KV is in host memory, and who reads it there."""
        layers: dict[int, list[int]] = {}
        for layer, n_tok in (self.placement.kv_vram_tok or {}).items():
            if n_tok < self.n_ctx:
                layers.setdefault(n_tok, []).append(layer)
        by_cpu = self.placement.kv_far_on == "cpu"
        return [
            f"KV of layers {_ranges(where)}: the newest {n_tok} tokens in VRAM, older ones in host memory, which the "
            + ("CPU attends to" if by_cpu else "GPU reads over the bus")
            + " in passes of few tokens"
            for n_tok, where in layers.items()
        ]

    def _place_table(self) -> list[str]:
        lines = []
        names = [_Name.of(name) for name in next(iter(self.places.values()))]
        for tiers, units in _same_tiers(self.places):
            lines.append(f"places for {', '.join(tiers)}:")
            groups = _groups(names, units, self.placement.why)
            width = max((len(names) for names, _, _ in groups), default=0)
            lines += [
                f"  {names:<{width}}  {place}{'  ' + why if why else ''}"
                for names, place, why in groups
            ]
        return lines

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for place in self.places[self.tiers[0].name].values():
            kind = "split" if isinstance(place, Split) else place
            counts[kind] = counts.get(kind, 0) + 1
        where = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        return f"<Plan for {self.arch}: {where}; {self.needed_bytes} of {self.budget_bytes} bytes of VRAM>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


# ---- places as arrays ----


def _arrays(placement: Placement, tiers: Sequence[Tier], model: Model) -> tuple[Any, Any]:
    """uint8 kinds [tiers][units] and float32 shares, None where nothing is split. PlanError for what is missing,
    unknown or no place."""
    index = model.unit_index
    kinds = np.zeros((len(tiers), len(index)), np.uint8)
    shares = np.zeros((len(tiers), len(index), 2), np.float32)
    any_split = False
    known = {tier.name for tier in tiers}
    for name in placement.places:
        if name not in known:
            raise PlanError(f"there is no tier {name!r}", tier=str(name))
    for i, tier in enumerate(tiers):
        units = placement.places.get(tier.name)
        if units is None:
            raise PlanError(f"tier {tier.name} has no places", tier=tier.name)
        if i > 0 and units is placement.places[tiers[i - 1].name]:
            kinds[i], shares[i] = kinds[i - 1], shares[i - 1]
            continue
        # In one go where names are known and places are places; else they are looked at one by one.
        try:
            any_split |= _look_up_known(units, model, kinds[i], shares[i])
        except (KeyError, TypeError):
            any_split |= _look_up(units, index, tier, kinds[i], shares[i])
        if len(units) != len(index):
            _look_up(units, index, tier, kinds[i], shares[i])  # names what is too many
            missing = next(name for name in index if name not in units)
            raise PlanError(
                f"tier {tier.name} has no place for unit {missing}", unit=missing, tier=tier.name
            )
    return kinds, shares if any_split else None


def _look_up_known(units: Mapping[str, Place], model: Model, kinds: Any, shares: Any) -> bool:
    """As _look_up(), but KeyError or TypeError for what is missing or no place. Thousands of units have few places."""
    places, which = numbered(units, model.units, tuple(model.unit_index))
    rows = [
        (_SPLIT, p.vram, p.stream) if isinstance(p, Split) else (_KINDS[p], 0.0, 0.0)
        for p in places
    ]
    np.take(np.array([row[0] for row in rows], np.uint8), which, out=kinds)
    any_split = any(kind == _SPLIT for kind, _, _ in rows)
    if any_split:
        np.take(np.array([row[1:] for row in rows], np.float32), which, axis=0, out=shares)
    return any_split


def _look_up(
    units: Mapping[str, Place], index: Mapping[str, int], tier: Tier, kinds: Any, shares: Any
) -> bool:
    """Fills one tier's rows; whether anything is split."""
    any_split = False
    for unit, place in units.items():
        at = index.get(unit)
        if at is None:
            raise PlanError(
                f"tier {tier.name}: the model has no unit {unit!r}", unit=str(unit), tier=tier.name
            )
        if isinstance(place, Split):
            kinds[at] = _SPLIT
            shares[at] = place.vram, place.stream
            any_split = True
        elif place in _KINDS:
            kinds[at] = _KINDS[place]
        else:
            raise PlanError(
                f"unit {unit}, tier {tier.name}: {place!r} is no place; use vram, stream, cpu or a Split",
                unit=unit,
                tier=tier.name,
            )
    return any_split


def _kv_array(kv_vram_tok: Mapping[int, int] | None, model: Model) -> Any:
    if kv_vram_tok is None:
        return None
    n_layer = model.hparams["n_layer"]
    array = np.full(n_layer, np.iinfo(np.uint32).max, np.uint32)
    for layer, n_tok in kv_vram_tok.items():
        if not 0 <= layer < n_layer or not 0 <= n_tok <= array[layer]:
            raise PlanError(f"kv_vram_tok: layer {layer} with {n_tok} tokens")
        array[layer] = n_tok
    return array


# ---- JSON ----


def _place_data(place: Place) -> Any:
    return {"vram": place.vram, "stream": place.stream} if isinstance(place, Split) else place


def _file_error(verb: str, name: str, error: OSError) -> FileError:
    reason = error.strerror or str(error)
    return FileError(f"cannot {verb} {name}: {reason}", path=name, errno=error.errno)


class _Reader:
    """JSON data into a Plan; every wrong field is a FormatError with its name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def wrong(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self.path}: {name}: {what}", path=self.path, field=name)

    def get(self, data: Any, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        leaf = name.rsplit(".", 1)[-1]
        if not isinstance(data, dict):
            raise self.wrong(name.rpartition(".")[0] or "json", "expected an object")
        value = data.get(leaf, default)
        if value is ...:
            raise self.wrong(name, "missing")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # bool is an int to Python, never to us
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(name, f"{value!r} is of the wrong type")
        return value

    def count(
        self, data: Any, name: str, low: int = 0, default: Any = ..., high: int = (1 << 63) - 1
    ) -> int:
        value = self.get(data, name, int, default)
        if not low <= value <= high:
            raise self.wrong(name, f"{value} is out of bounds")
        return operator.index(value)

    def tokens(self, data: Any, name: str, default: Any = ...) -> int:
        return self.count(data, name, 1, default, _MAX_TOK)

    def plan(self, data: Any) -> Plan:
        version = self.get(data, "version", int)
        if version != VERSION:
            raise self.wrong(
                "version", f"this version of pipeshard reads plans of version {VERSION}"
            )
        model = self.get(data, "model", dict)
        return Plan(
            arch=self.get(model, "model.arch", str),
            digest=self.get(model, "model.sha256", str),
            accelerator=self.get(data, "accelerator", bool, True),
            sm=self.count(data, "sm", default=90),
            n_ctx=self.tokens(data, "n_ctx"),
            n_seq=self.tokens(data, "n_seq"),
            kv=self.get(data, "kv", str, "f16"),
            budget_bytes=self.count(data, "budget_bytes"),
            tiers=tuple(self.tier(i, tier) for i, tier in enumerate(self.get(data, "tiers", list))),
            placement=self.placement(data),
            chunk_tok=self.tokens(data, "chunk_tok"),
            pass_tok=self.tokens(data, "pass_tok", data.get("chunk_tok")),
            logit_rows=self.tokens(data, "logit_rows", 8),
            graph_reserve_bytes=self.count(data, "graph_reserve_bytes", default=0),
            map_bytes_per_gib=self.count(data, "map_bytes_per_gib", default=0, high=1 << 30),
            bytes={
                str(k): self.count({k: n}, k) for k, n in self.get(data, "bytes", dict, {}).items()
            },
            predicted=data.get("predicted"),
        )

    def tier(self, i: int, data: Any) -> Tier:
        name = f"tiers[{i}]"
        max_tok = self.get(data, f"{name}.max_tok", (int, type(None)))
        if max_tok is not None and not 0 < max_tok < 1 << 32:
            raise self.wrong(f"{name}.max_tok", f"{max_tok} is out of bounds")
        return Tier(self.get(data, f"{name}.name", str), max_tok)

    def placement(self, data: Any) -> Placement:
        places = {
            tier: {
                unit: self.place(f"places.{tier}.{unit}", place) for unit, place in units.items()
            }
            for tier, units in self.get(data, "places", dict).items()
            if self.get({tier: units}, tier, dict) is not None
        }
        kv = self.get(data, "kv_vram_tok", (dict, type(None)), None)
        return Placement(
            places=places,
            kv_vram_tok=None
            if kv is None
            else {self.layer(layer): self.count({layer: n}, layer) for layer, n in kv.items()},
            n_slots=self.count(data, "n_slots", default=0),
            slot_bytes=self.count(data, "slot_bytes", default=0),
            why={str(k): str(v) for k, v in self.get(data, "why", dict, {}).items()},
            per_tier_residency=self.get(data, "per_tier_residency", bool, False),
            kv_far_on=self.far_side(self.get(data, "kv_far_on", str, "gpu")),
        )

    def far_side(self, text: str) -> FarSide:
        for side in FAR_SIDES:
            if text == side:
                return side
        raise self.wrong("kv_far_on", f"{text!r} attends to nothing; use gpu or cpu")

    def layer(self, text: str) -> int:
        if not text.isascii() or not text.isdigit():
            raise self.wrong("kv_vram_tok", f"{text!r} is no layer")
        return int(text)

    def place(self, name: str, data: Any) -> Place:
        if isinstance(data, dict):
            shares = {key: self.get(data, key, (int, float), 0.0) for key in ("vram", "stream")}
            if set(data) - set(shares):
                raise self.wrong(name, "a split has the shares vram and stream")
            return Split(**shares)
        if data not in ("vram", "stream", "cpu"):
            raise self.wrong(name, f"{data!r} is no place; use vram, stream, cpu or a split")
        place: Place = data
        return place


# ---- text ----

_MOST_RANGES = 2  # lines of experts in one place
_WHAT_FIGURES = {
    "datasheet": "figures from data sheets: nobody measured them",
    "default": "assumed figures: nobody measured them",
    "measured": "measured",
}


def _predicted_lines(predicted: Any) -> list[str]:
    """Nothing where the plan has no prediction, or one that somebody wrote otherwise."""
    try:
        return _prediction_lines(predicted) if predicted else []
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def _prediction_lines(predicted: Mapping[str, Any]) -> list[str]:
    def interval(name: str, scale: float) -> str:
        low, high = predicted[f"{name}_lo"], predicted[f"{name}_hi"]
        return f"{_figure(low * scale)} to {_figure(high * scale)}"

    ttft, tps = predicted["ttft_s"], predicted["tps"]
    lines = [
        f"predicted for a prompt of {predicted['n_prompt']} tokens and {predicted['n_gen']} behind it"
        + (f", policy {predicted['policy']}" if predicted.get("policy") else ""),
        f"  TTFT {_figure(ttft * 1e3)} ms ({interval('ttft', 1e3)}), at best {_figure(predicted['bound_ttft_s'] * 1e3)}"
        + _waits(predicted["prefill"]),
        f"  TPS  {_figure(tps)} tokens/s ({interval('tps', 1.0)}), at best {_figure(predicted['bound_tps'])}"
        + _waits(predicted["decode"]),
        f"  by the profile of {predicted['profile']}; "
        + _WHAT_FIGURES.get(predicted["source"], predicted["source"]),
    ]
    more = predicted.get("more")
    if more:
        lines.append(
            f"  another {format_bytes(more['bytes'])} would make it TTFT {_figure(more['ttft_s'] * 1e3)} ms "
            f"and {_figure(more['tps'])} tokens/s"
        )
    return lines


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _waits(held: Mapping[str, float]) -> str:
    """What most of the time is spent waiting for."""
    total = sum(held.values())
    names = {
        "h2d": "bus",
        "d2h": "bus back",
        "compute": "GPU",
        "cpu": "CPU",
        "hand_off": "hand-offs",
    }
    shares = sorted(((s / total, name) for name, s in held.items() if total), reverse=True)
    parts = [f"{names.get(name, name)} {share:.0%}" for share, name in shares if share >= 0.05]
    return f"; held up by {', '.join(parts)}" if parts else ""


def _lines(plan: Plan) -> list[str]:
    """A line a fact, so that a difference names what it is about."""
    data = plan.to_dict()
    lines = []
    for key, value in data.items():
        if key == "places":
            lines += [
                f"{tier} {unit}: {json.dumps(place)}"
                for tier, units in value.items()
                for unit, place in units.items()
            ]
        elif isinstance(value, dict):
            lines += [f"{key}.{name}: {json.dumps(item)}" for name, item in value.items()]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines


def _same_tiers(
    places: Mapping[str, Mapping[str, Place]],
) -> list[tuple[list[str], Mapping[str, Place]]]:
    found: list[tuple[list[str], Mapping[str, Place]]] = []
    for tier, units in places.items():
        for names, others in found:
            if others is units or others == units:
                names.append(tier)
                break
        else:
            found.append(([tier], units))
    return found


def _place_text(place: Place) -> str:
    if not isinstance(place, Split):
        return place
    rest = 1.0 - place.vram - place.stream
    return f"split: vram {place.vram:.0%}, stream {place.stream:.0%}, cpu {rest:.0%}"


class _Name(NamedTuple):
    """A unit's name, taken apart: "blk.3.expert.17"."""

    whole: str
    layer: int = -1
    part: str = ""
    expert: int = -1

    @classmethod
    def of(cls, name: str) -> _Name:
        parts = name.split(".")
        if len(parts) in (3, 4) and parts[1].isdigit() and (len(parts) == 3 or parts[3].isdigit()):
            return cls(name, int(parts[1]), parts[2], int(parts[3]) if len(parts) == 4 else -1)
        return cls(name)


def _groups(
    names: Sequence[_Name], units: Mapping[str, Place], why: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """(names, place, reason): units of one part and place share a line, in the order of the model. Where every layer
    has other experts in a place, the line says how many."""
    lines: dict[tuple[str, str, str], list[int]] = {}  # part, place and reason to its layers
    experts: dict[tuple[str, str], dict[int, list[int]]] = {}  # place and reason to layers' experts
    # Thousands of units have few places and reasons, of which each is one object mostly.
    places = {id(place): place for place in units.values()}
    texts = {key: _place_text(place) for key, place in places.items()}
    last, some = None, list[int]()  # experts like the one before, as most are
    for name in names:
        text, reason = texts[id(units[name.whole])], why.get(name.whole, "")
        if name.expert >= 0:
            if (text, reason, name.layer) != last:
                last = text, reason, name.layer
                some = experts.setdefault((text, reason), {}).setdefault(name.layer, [])
            some.append(name.expert)
        elif name.layer >= 0:
            lines.setdefault((name.part, text, reason), []).append(name.layer)
        else:
            lines[name.whole, text, reason] = []
    for (text, reason), layers in experts.items():
        ranges = {layer: _ranges(numbers) for layer, numbers in layers.items()}
        if len(set(ranges.values())) <= _MOST_RANGES:
            for layer, numbers in ranges.items():
                lines.setdefault((f"expert.{numbers}", text, reason), []).append(layer)
            continue
        counts = [len(numbers) for numbers in layers.values()]
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines[f"expert ({each} of each layer)", text, reason] = list(layers)
    order = {"embed": 0, "attn": 1, "ffn": 2, "router": 3, "expert": 4, "head": 5}
    return [
        (f"blk.{_ranges(layers)}.{part}" if layers else part, text, reason)
        for (part, text, reason), layers in sorted(
            lines.items(),
            key=lambda item: (order.get(re.split(r"[. ]", item[0][0])[0], 6), item[1][:1]),
        )
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)

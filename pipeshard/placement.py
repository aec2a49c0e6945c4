"""The words that decisions are made in: units of a model, tiers of passes, and where each unit's weights live.

Not here: who decides (planner.py), whether it fits (the core). Threads: immutable, all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy.typing as npt

from . import _core

__all__ = [
    "FAR_SIDES",
    "TIERS",
    "FarSide",
    "NumberedPlaces",
    "Place",
    "Placement",
    "Split",
    "Tier",
    "Unit",
    "numbered",
]


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of a model that is placed: `blk.3.attn`, `blk.3.expert.17`, `head`.

    `n_rows` is what a Split divides, in multiples of `row_step`; `use` is the share of tokens that need the unit."""

    name: str
    kind: str
    layer: int | None
    expert: int | None
    n_bytes: int
    n_rows: int
    row_step: int
    kv_bytes_per_tok: int
    use: float


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of passes by their number of tokens; a pass belongs to the first tier that holds it. None: any number."""

    name: str
    max_tok: int | None


TIERS = (
    Tier("decode", 1),
    Tier("verify", 8),
    Tier("small", 64),
    Tier("batch", 512),
    Tier("prefill", None),
)


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of a unit that are resident in VRAM and streamed to it; the CPU computes the rest, at the same time.

    For units of kind `ffn` (by neuron), `attn` (by group of heads, with their KV) and `head` (by output row). Shares
    are rounded to the nearest multiple of the unit's `row_step`. Each boundary that a tier puts elsewhere than the
    others cuts the unit once more, into smaller ops.

    An expert is not cut. `Split(stream=s)`, with the same s for all such experts of a layer in a tier, lets bus and CPU
    divide them as they are wanted: of n that a pass's tokens are routed to, the first (n + 1) * s, rounded down (in the
    order of tokens and, of a token, of rank), come over the bus and the others are the CPU's. Of all numbers of whole
    experts that is the one with which both are done first, if s of them and the rest take equally long. Placed one by
    one, chance would put more of them on one side, and the layer would wait for it. Passes of so many tokens that
    streamed experts are copied whole divide them by their number instead."""

    vram: float = 0.0
    stream: float = 0.0


Place = Literal["vram", "stream", "cpu"] | Split
FarSide = Literal["gpu", "cpu"]
FAR_SIDES: tuple[FarSide, ...] = ("gpu", "cpu")


class NumberedPlaces(Mapping[str, Place]):
    """Places of a model's units, as the number of each unit's in a list of the few that there are. Of 12,000 units a
    dict takes longer to make and to read than the core takes to check it. Immutable, like what it is made from."""

    __slots__ = ("_index", "numbers", "places", "units")

    def __init__(
        self,
        units: tuple[Unit, ...],
        index: Mapping[str, int],
        places: Sequence[Place],
        numbers: npt.NDArray[Any],
    ) -> None:
        """index: of the units, by name, in their order."""
        self.units = units
        self.places = tuple(places)
        self.numbers = numbers
        self.numbers.flags.writeable = False
        self._index = index

    def __getitem__(self, name: str) -> Place:
        return self.places[int(self.numbers[self._index[name]])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def as_dict(self) -> dict[str, Place]:
        return dict(
            zip(self._index, map(self.places.__getitem__, self.numbers.tolist()), strict=True)
        )


def numbered(
    places: Mapping[str, Place], units: tuple[Unit, ...], names: tuple[str, ...]
) -> tuple[Sequence[Any], npt.NDArray[Any]]:
    """The objects that stand for places, each once, and of each unit the number of its own there. KeyError where one
    has none."""
    if isinstance(places, NumberedPlaces) and places.units is units:
        return places.places, places.numbers
    return _core.Plan.distinct(places, names)


def _frozen_places(
    places: Mapping[str, Mapping[str, Place]],
) -> Mapping[str, Mapping[str, Place]]:
    # Tiers often share one mapping: keep it one. What another Placement has frozen needs no copy: of 12,000 units that
    # would be felt.
    seen: dict[int, Mapping[str, Place]] = {}
    for units in places.values():
        if id(units) not in seen:
            frozen = isinstance(units, (MappingProxyType, NumberedPlaces))
            seen[id(units)] = units if frozen else MappingProxyType(dict(units))
    return MappingProxyType({tier: seen[id(units)] for tier, units in places.items()})


@dataclass(frozen=True)
class Placement:
    """What a policy decides: for every tier the place of every unit, and how streaming is to go.

    `kv_vram_tok`: of each layer, the newest tokens of a sequence whose KV stays in VRAM, in whole pages of 64 and
    one page more; older ones are in host memory. None: all, where attention is on the GPU. Where attention is on
    the CPU in some tier, none. `kv_far_on`: who attends to the older ones in passes of few tokens: "gpu", which reads
    them over the bus, or "cpu", which does so while the GPU attends to the newest; prompts bring them to VRAM.
    `per_tier_residency`: units may be resident in some tiers and not in others (or be
    split elsewhere); all tiers' residents share one stretch of VRAM, as large as the largest set, and a pass first
    uploads what of its tier's the last pass has not left there. `why`: for people, by unit. `chunk_tok`,
    `pass_tok`: most tokens of one op and of one pass; 0: as many as the planner finds room for."""

    places: Mapping[str, Mapping[str, Place]]
    kv_vram_tok: Mapping[int, int] | None = None
    n_slots: int = 4
    slot_bytes: int = 32 << 20
    why: Mapping[str, str] = field(default_factory=dict)
    per_tier_residency: bool = False
    chunk_tok: int = 0
    pass_tok: int = 0
    kv_far_on: FarSide = "gpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", _frozen_places(self.places))
        object.__setattr__(self, "why", MappingProxyType(dict(self.why)))
        if self.kv_vram_tok is not None:
            object.__setattr__(self, "kv_vram_tok", MappingProxyType(dict(self.kv_vram_tok)))

    @classmethod
    def everywhere(
        cls, units: Mapping[str, Place], why: Mapping[str, str] | None = None
    ) -> Placement:
        """The same places in every tier."""
        return cls(places={tier.name: units for tier in TIERS}, why=why or {})

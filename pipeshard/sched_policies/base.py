"""What a policy works with: the context that it is given, questions to the core about a placement, and the few moves
that most policies are made of.

A policy is a pure function of its context: no device, no clock, no files. It returns a Placement or raises
BudgetError.

Not here: which policies there are (__init__.py), the answers to the questions (planner.py).
Threads: immutable, all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from ..errors import BudgetError, PlanError
from ..placement import Place, Placement, Split, Tier, Unit
from ..sizes import format_bytes

__all__ = [
    "GPU_TOK",
    "N_GEN",
    "N_PROMPT",
    "Layer",
    "Place",
    "Placement",
    "PolicyContext",
    "Prediction",
    "Split",
    "Tier",
    "Unit",
    "check",
    "fitting",
    "latency",
    "lump_bytes",
    "most",
    "place_units",
    "prompt_lengths",
    "same_in_all",
]

N_PROMPT, N_GEN = 1024, 128  # a usual prompt and answer
_MOST_PROMPT = 16384  # longer ones go in passes of so many
GPU_TOK = 32  # passes of at least as many tokens are worth bringing weights to the GPU, say llama.cpp's policies
_ALIGN = 256  # of memory that the core lays out
_PLACES = ("vram", "stream", "cpu")
_NAME, _N_BYTES = attrgetter("name"), attrgetter("n_bytes")  # of thousands of units, without a call


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds to the first token and tokens a second, with the interval that the cost model's own error gives, and
    what no placement under this budget could beat. `prefill`, `decode`: seconds of that time in which each of h2d,
    d2h, compute, cpu and hand_off held everything up. For a prompt of `n_prompt` tokens and `n_gen` behind it (where
    there are several sequences, of all of them), by a `profile` whose `source` is "measured", "datasheet" or
    "default"."""

    ttft_s: float
    ttft_lo: float
    ttft_hi: float
    tps: float
    tps_lo: float
    tps_hi: float
    bound_ttft_s: float
    bound_tps: float
    plan: Any = None
    prefill: Mapping[str, float] = field(default_factory=dict)
    decode: Mapping[str, float] = field(default_factory=dict)
    n_prompt: int = 0
    n_gen: int = 0
    source: str = ""
    profile: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's units in two parts: attention with its norms and router; and feed-forward, with experts all of them."""

    index: int
    attn: tuple[Unit, ...]
    ffn: tuple[Unit, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.attn + self.ffn


@dataclass(frozen=True)
class PolicyContext:
    """All that a policy may look at. `profile` and `cost` describe the machine; `sizes`: tokens of one op that a
    placement may ask for, largest first; `size`: those that it gets if it does not ask, which may be fewer than the
    most. The questions are answered by whoever makes the context."""

    units: tuple[Unit, ...]
    tiers: tuple[Tier, ...]
    budget_bytes: int
    n_ctx: int
    n_seq: int = 1
    threads: int = 1
    profile: Any = None
    cost: Any = None
    sizes: tuple[int, ...] = (2048, 512, 128, 64)
    size: int = 2048
    ask_needs: Callable[[Placement], int] | None = field(default=None, repr=False, compare=False)
    ask_simulate: Callable[[Placement, int], Prediction] | None = field(
        default=None, repr=False, compare=False
    )
    ask_pass: Callable[[Placement, int], float] | None = field(
        default=None, repr=False, compare=False
    )

    def needs(self, placement: Placement) -> int:
        """Bytes of VRAM that a placement takes, everything counted, whatever the budget is."""
        if self.ask_needs is None:
            raise PlanError("this context was made without anyone who knows what placements need")
        return self.ask_needs(placement)

    def fits(self, placement: Placement) -> bool:
        return self.needs(placement) <= self.budget_bytes

    def simulate(self, placement: Placement, n_prompt: int = 1024) -> Prediction:
        """How fast it would be: a prompt of this many tokens, and tokens behind it."""
        if self.ask_simulate is None:
            raise PlanError(
                "this context was made without anyone who knows how fast placements are"
            )
        return self.ask_simulate(placement, n_prompt)

    def pass_seconds(self, placement: Placement, n_tok: int) -> float:
        """How long one pass of a fresh sequence would take."""
        if self.ask_pass is None:
            return self.simulate(placement, n_tok).ttft_s
        return self.ask_pass(placement, n_tok)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the units, in their order."""
        return tuple(map(_NAME, self.units))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        parts: dict[int, tuple[list[Unit], list[Unit]]] = {}
        for unit in self.units:
            if unit.layer is not None:
                part = parts.setdefault(unit.layer, ([], []))
                part[0 if unit.kind in ("attn", "router") else 1].append(unit)
        return tuple(Layer(i, tuple(a), tuple(f)) for i, (a, f) in sorted(parts.items()))

    @cached_property
    def outer(self) -> tuple[Unit, ...]:
        """What is in no layer: the token table and the head."""
        return tuple(unit for unit in self.units if unit.layer is None)

    @property
    def head(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.outer if unit.kind == "head")

    @cached_property
    def has_experts(self) -> bool:
        return any(unit.kind == "expert" for unit in self.units)

    @cached_property
    def _expert_use(self) -> float:
        return max((unit.use for unit in self.units if unit.kind == "expert"), default=1.0)

    def moves_routed(self, tier: Tier) -> bool:
        """Whether in all passes of a tier only those experts move that tokens are routed to, because they use at most
        half of a layer's. There a Split divides them as they are routed."""
        return tier.max_tok is not None and 2 * tier.max_tok * self._expert_use <= 1.0


# ---- moves ----


def place_units(
    ctx: PolicyContext,
    default: Place = "cpu",
    *,
    vram: Iterable[Unit] = (),
    stream: Iterable[Unit] = (),
    cpu: Iterable[Unit] = (),
) -> dict[str, Place]:
    """A place for every unit: `default` where nothing else is said."""
    places: dict[str, Place] = dict.fromkeys(ctx.names, default)
    for place, units in (("vram", vram), ("stream", stream), ("cpu", cpu)):
        places.update(dict.fromkeys(map(_NAME, units), place))
    return places


def same_in_all(
    ctx: PolicyContext, places: Mapping[str, Place], *, n_slots: int = 0, slot_bytes: int = 0
) -> Placement:
    """The same places in every tier."""
    return Placement(
        places={tier.name: places for tier in ctx.tiers}, n_slots=n_slots, slot_bytes=slot_bytes
    )


def lump_bytes(*groups: Iterable[Unit]) -> int:
    """A slot that holds each of the groups of units whole, a group one after the other; 0 where there is none."""
    sizes = (sum(map(_aligned, map(_N_BYTES, group))) for group in groups)
    return max(sizes, default=0)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN


def fitting(ctx: PolicyContext, placement: Placement) -> Placement:
    """The placement, or BudgetError where it does not fit."""
    needed = ctx.needs(placement)
    if needed > ctx.budget_bytes:
        raise BudgetError(
            f"this placement needs {format_bytes(needed)} of VRAM, and the budget is {format_bytes(ctx.budget_bytes)}",
            needed=needed,
            budget=ctx.budget_bytes,
        )
    return placement


def most(ctx: PolicyContext, high: int, make: Callable[[int], Placement]) -> int:
    """The largest n of 0 to `high` whose placement fits, where more needs more. BudgetError where not even 0 does.

    Bytes grow almost evenly, so looking where a straight line meets the budget takes a few questions."""
    fitting(ctx, low_end := make(0))
    need_high = ctx.needs(make(high)) if high > 0 else 0
    if need_high <= ctx.budget_bytes:
        return high
    low, need_low = 0, ctx.needs(low_end)
    tries = 0
    while high - low > 1:
        middle = (low + high) // 2
        if tries < 6:  # then halving is sure to end soon
            share = (ctx.budget_bytes - need_low) / max(1, need_high - need_low)
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tries += 1
        needed = ctx.needs(make(middle))
        if needed <= ctx.budget_bytes:
            low, need_low = middle, needed
        else:
            high, need_high = middle, needed
    return low


# ---- what is better ----


def prompt_lengths(n_ctx: int) -> dict[int, int]:
    """Of prompts that contexts of n_ctx are for, their weights: a usual one, and where there is room for more than two
    of it, also the longest with an answer behind it, which counts half as much, for most prompts are not."""
    usual = min(N_PROMPT, n_ctx)
    return {usual: 1} if n_ctx <= 2 * N_PROMPT else {usual: 2, min(n_ctx - N_GEN, _MOST_PROMPT): 1}


def latency(
    ctx: PolicyContext, placement: Placement, more_s: float = 0.0, limit: float = math.inf
) -> float:
    """The product of the time to the first token and that of one behind it, a hundredth of the one being worth a
    hundredth of the other; the geometric mean over prompt_lengths(). more_s: is added to the time of a token. limit:
    what is above it need not be exact."""
    weights = prompt_lengths(ctx.n_ctx)
    total = left = sum(weights.values())
    product, mean = 1.0, math.inf
    for n_prompt, weight in sorted(weights.items()):
        run = ctx.simulate(placement, n_prompt)
        one = run.ttft_s * (ctx.n_seq / run.tps + more_s)
        mean = math.pow(
            product * one**left, 1.0 / total
        )  # were longer prompts as quick, which they are not
        if mean > limit:
            break
        product *= one**weight
        left -= weight
    return mean


# ---- is it a placement at all ----


def check(ctx: PolicyContext, placement: Placement) -> Placement:
    """The placement, or PlanError that names unit and tier. What the core knows better (sizes) is left to it."""
    if not isinstance(placement, Placement):
        raise PlanError(f"a policy returns a Placement, not {type(placement).__name__}")
    names = {unit.name for unit in ctx.units}
    for tier_name in placement.places:
        if tier_name not in {tier.name for tier in ctx.tiers}:
            raise PlanError(f"there is no tier {tier_name!r}", tier=str(tier_name))
    seen: Mapping[str, Place] | None = None
    first: Mapping[str, Place] | None = None
    for tier in ctx.tiers:
        places = placement.places.get(tier.name)
        if places is None:
            raise PlanError(f"tier {tier.name} has no places", tier=tier.name)
        if places is seen:
            continue
        _check_coverage(names, places, tier)
        _check_places(placement, places, tier)
        if first is not None and not placement.per_tier_residency:
            _check_residency(first, places, tier)
        first = first or places
        seen = places
    return placement


def _check_coverage(names: set[str], places: Mapping[str, Place], tier: Tier) -> None:
    if names == places.keys():
        return
    for name in places:
        if name not in names:
            raise PlanError(
                f"tier {tier.name}: the model has no unit {name!r}", unit=str(name), tier=tier.name
            )
    missing = next(name for name in names if name not in places)
    raise PlanError(
        f"tier {tier.name} has no place for unit {missing}", unit=missing, tier=tier.name
    )


def _check_places(placement: Placement, places: Mapping[str, Place], tier: Tier) -> None:
    ring = placement.n_slots > 0 and placement.slot_bytes > 0
    few = {id(place): place for place in places.values()}  # thousands of units have few places
    wrong = {key: what for key, place in few.items() if (what := _wrong_with(place, ring))}
    if not wrong:
        return
    name, what = next((n, wrong[id(p)]) for n, p in places.items() if id(p) in wrong)
    raise PlanError(f"unit {name}, tier {tier.name}: {what}", unit=name, tier=tier.name)


def _wrong_with(place: Place, ring: bool) -> str:
    """In words; "" if it is a place. ring: there is one to stream through."""
    no_ring = "streams, but the placement has no ring; give n_slots and slot_bytes"
    if isinstance(place, Split):
        shares = (place.vram, place.stream)
        if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-6):
            return f"shares of a split lie between 0 and 1 and sum to 1 at most, not {place}"
        return no_ring if place.stream > 0 and not ring else ""
    if place not in _PLACES:
        return f"{place!r} is no place; use vram, stream, cpu or a Split"
    return no_ring if place == "stream" and not ring else ""


def vram_share(place: Place) -> float:
    """What of a unit is resident."""
    return place.vram if isinstance(place, Split) else 1.0 if place == "vram" else 0.0


def _check_residency(first: Mapping[str, Place], places: Mapping[str, Place], tier: Tier) -> None:
    theirs = map(first.__getitem__, places)
    few = {(id(a), id(b)): (a, b) for a, b in zip(places.values(), theirs, strict=True)}
    if all(a is b or vram_share(a) == vram_share(b) for a, b in few.values()):
        return
    name = next(n for n, place in places.items() if vram_share(place) != vram_share(first[n]))
    raise PlanError(
        f"unit {name}, tier {tier.name}: its share of VRAM differs from another tier's; say "
        f"per_tier_residency=True where that is meant",
        unit=name,
        tier=tier.name,
    )

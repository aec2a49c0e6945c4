"""`auto`: what is predicted to be best at first and later tokens alike. It makes the product of the time to the first
token and the time of a token behind it least: a hundredth of the one is worth a hundredth of the other. (The time of
prompt and answer together would trade a first token that comes twice as late for 3 % of the rest.) It goes by a prompt
of 1,024; where the context is for more, also by the longest that fits, which counts half as much.

What fits is resident. Else the units that save most seconds a byte are: attention with its KV, which every token needs,
then feed-forward and head, then experts, of which a token needs few; the token table last, for only rows of it are
read. The rest is shared by the bus and the CPU, which both work at once: of each class of passes a share of the
remaining units streams, spread evenly over the layers, and the CPU computes the others meanwhile; of experts that is so
within each layer, where few tokens pass by what is routed, and without experts feed-forwards and head may be split by
rows instead. Which share follows from how long both sides take for a byte at that many tokens; that share, parts of it,
none and all are simulated for every class, so where streaming begins to pay is the cost model's to say.

Then comes what takes VRAM from weights: the ring, larger ops and KV. They are tried together, for one by one they get
stuck: a prompt of several ops streams once only through a ring that holds a layer, one op that is large enough makes
that needless, and a window of KV finds the room for either. Who attends to the keys beyond a window, the GPU over the
bus or the CPU, is tried of the first one and kept. Then experts spread over all layers, or where most of them fit, over
a few, evenly spaced: the layers between have no hand-offs, and their compute hides what travels. Without experts, whole
layers instead of all layers' attention. Last come the placements of the policies to compare with, so that by prediction
`auto` is never worse than any of them. By the objective, that is: somebody who looks at first or at later tokens alone
would still find one that is quicker there. So of all that was tried the best is taken that is nowhere far behind any of
theirs, if there is one. The CPU gets everything only where no other placement fits.

Threads: pure.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..cost import Shape
from ..errors import BudgetError
from ..placement import FAR_SIDES, FarSide, NumberedPlaces, numbered
from . import register
from .base import (
    N_GEN,
    N_PROMPT,
    Place,
    Placement,
    PolicyContext,
    Prediction,
    Split,
    Tier,
    Unit,
    latency,
    prompt_lengths,
    same_in_all,
    vram_share,
)
from .even_split import EvenSplit
from .experts_cpu import ExpertsCpu
from .full_gpu_no_output import FullGpuNoOutput
from .full_shard import FullShard
from .layer_split import LayerSplit
from .shard_attn import ShardAttn
from .static_attn import StaticAttn

_OTHERS = (FullGpuNoOutput, StaticAttn, ShardAttn, FullShard, LayerSplit, ExpertsCpu)
# So many are not also divided evenly, and where long prompts are one op no smaller ones are tried: that would take half
# of a second each.
_MANY_UNITS = 8192
_ALIGN = 256
_SLOT_BYTES = 32 << 20
_LEAST_SLOT = 256 << 10
_UNUSED_SECONDS = 200e-6  # a token, that an empty VRAM counts as
_RINGS = (0.5, 1.25, 2.25, 3.25)  # a part of a layer; one, two and three whole, and something more
_AWAY = (
    0.125,
    0.25,
    0.5,
)  # of a layer's experts, the parts tried that are not resident where other layers' all are
_PARTS = (1.0, 0.85, 0.7, 0.5, 0.25)  # of the share that streams by the balance of both sides alone
_FEW_TOK = 8  # passes of at most so many have one share of what is split
_WINDOW_TOK = N_PROMPT + 2 * N_GEN  # of KV: a usual prompt, its answer and some more
_PAGE_TOK = 64  # of KV, of which a window has one more
_BEHIND = 1.03  # times as long as another policy's placement takes for one thing: as far as the best may be behind
_RIVAL = (
    1.5  # times the best score: a placement beyond that is nobody's choice, whatever it is quick at
)
_SNAP = 0.06  # a share this near to none or all of it is that


@dataclass(frozen=True)
class _Settings:
    """What a candidate is made from. share: of what is not resident, what streams, by tier; ring: in units of the
    largest part of a layer that streams; kv_tok: newest tokens of a sequence whose KV is in VRAM (None: all); far: who
    attends to the others; spread: of a layer's experts, the part that is away before other layers' are as well, evenly
    spaced, 0.0 being those of all layers alike (None: of the last layers all); whole: the last layers wholly
    rather than attention of all, which saves hand-offs; split: the share is of each feed-forward's rows rather than of
    the feed-forwards."""

    share: Mapping[str, float]
    ring: float = 0.5
    size: int = 0
    kv_tok: int | None = None
    far: FarSide = "gpu"
    spread: float | None = None
    whole: bool = False
    split: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        other = (self.ring, self.size, self.kv_tok, self.far, self.spread, self.whole, self.split)
        return (tuple(sorted(self.share.items())), *other)


@dataclass(frozen=True, eq=False)
class _Group:
    """Units that are placed alike: a layer's attention with its router, its feed-forward, its experts, of which the
    first so many can be resident; or one that is in no layer. A model of 12,000 units has 200 of them."""

    kind: str
    at: npt.NDArray[np.intp]  # numbers of the units
    n_bytes: int  # of each experts; of the others of all
    kv_bytes: int
    value: float
    largest: int  # unit
    layer: int  # -1: none

    @property
    def n(self) -> int:
        return len(self.at) if self.kind == "expert" else 1

    def split(self, n_resident: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Numbers of what is resident, and of what is not."""
        n = n_resident if self.kind == "expert" or n_resident == 0 else len(self.at)
        return self.at[:n], self.at[n:]

    def far_bytes(self, n_resident: int) -> int:
        return (self.n - n_resident) * self.n_bytes


@dataclass
class _Search:
    """The candidates of one context, and the best so far."""

    ctx: PolicyContext
    best: Placement | None = None
    best_score: float = float("inf")
    settings: _Settings = field(default_factory=lambda: _Settings({}))
    offered: list[tuple[float, Placement]] = field(default_factory=list)  # with what offer() said
    # By size of ops and KV: bytes beside residents and ring, of the last candidate that was alike in these.
    _beside: dict[tuple[int, int | None, FarSide], int] = field(default_factory=dict)
    _tried: dict[tuple[object, ...], float] = field(default_factory=dict)
    _built: dict[tuple[object, ...], tuple[Placement | None, list[int]]] = field(
        default_factory=dict
    )
    _places: dict[tuple[object, ...], tuple[Mapping[str, Place], int, int]] = field(
        default_factory=dict
    )

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.ctx.names)}

    @cached_property
    def groups(self) -> list[_Group]:
        """In the order of the model."""
        ctx = self.ctx
        found = [self._group("layer", layer.attn) for layer in ctx.layers]
        found += [self._group(layer.ffn[0].kind, layer.ffn) for layer in ctx.layers if layer.ffn]
        return found + [self._group(unit.kind, (unit,)) for unit in ctx.outer]

    def _group(self, kind: str, units: tuple[Unit, ...]) -> _Group:
        kv = sum(unit.kv_bytes_per_tok for unit in units) * self.ctx.n_ctx * self.ctx.n_seq
        total = sum(_aligned(unit.n_bytes) for unit in units)
        largest = max((_aligned(unit.n_bytes) for unit in units), default=0)
        return _Group(
            kind=kind,
            at=np.array([self._index[unit.name] for unit in units], np.intp),
            n_bytes=largest if kind == "expert" else total,
            kv_bytes=_aligned(kv),
            value=self._value(kind, units[0]) if units else 0.0,
            largest=largest,
            layer=-1 if not units or units[0].layer is None else units[0].layer,
        )

    def _value(self, kind: str, unit: Unit) -> float:
        """Seconds that a byte saves over prompt and answer, roughly: enough for an order."""
        if kind == "embed":
            return 0.0
        cpu, bus = _seconds_a_byte(self.ctx, unit, 1), _bus_seconds_a_byte(self.ctx)
        if kind == "head":  # a prompt asks for one row of it
            return (N_GEN + 1) * cpu
        saved = N_GEN * cpu + min(bus, _seconds_a_byte(self.ctx, unit, N_PROMPT))
        return saved * 1.5 if kind == "layer" else saved  # a hand-off less, and KV where it is used

    # ---- what is resident ----

    def fill(self, room: int, settings: _Settings) -> list[int]:
        """How many units of each group, the most valuable bytes first, as far as the room goes."""
        counts = [0] * len(self.groups)
        by_value = sorted(range(len(self.groups)), key=lambda i: -self.groups[i].value)
        if settings.whole:
            by_value.sort(key=lambda i: (self.groups[i].value == 0.0, -self.groups[i].layer))
        experts = [i for i in by_value if self.groups[i].kind == "expert"]
        for i in by_value:
            group = self.groups[i]
            each = self.resident_bytes(group, settings)
            if group.kind == "expert" and settings.spread is not None:
                if i == experts[0]:
                    room -= self._spread(room, counts, sorted(experts), settings.spread)
                continue
            counts[i] = min(group.n, room // each if each else group.n)
            room -= counts[i] * each
        return counts

    def _spread(self, room: int, counts: list[int], experts: list[int], part: float) -> int:
        """Those of some layers level by level, those of the others all; returns the bytes that this took."""
        groups = [self.groups[i] for i in experts]
        short = sum(group.n * group.n_bytes for group in groups) - room
        each = part * max(group.n * group.n_bytes for group in groups)
        n_short = min(len(experts), math.ceil(short / each)) if each > 0 else len(experts)
        some = [experts[(i + 1) * len(experts) // n_short - 1] for i in range(max(0, n_short))]
        used = 0
        for i in set(experts).difference(some):
            counts[i] = self.groups[i].n
            used += counts[i] * self.groups[i].n_bytes
        for level in range(max(group.n for group in groups)):
            for i in some:
                group = self.groups[i]
                if counts[i] <= level < group.n and used + group.n_bytes <= room:
                    counts[i] += 1
                    used += group.n_bytes
        return used

    def resident_bytes(self, group: _Group, settings: _Settings) -> int:
        if settings.kv_tok is None:
            return group.n_bytes + group.kv_bytes
        n_tok = settings.kv_tok + _PAGE_TOK if settings.kv_tok or settings.far == "cpu" else 0
        return group.n_bytes + group.kv_bytes * n_tok // self.ctx.n_ctx

    # ---- a candidate ----

    def placement(self, counts: list[int], settings: _Settings) -> Placement:
        """counts: of each group, what is resident; the rest in turn on bus and CPU, as the share says."""
        ctx = self.ctx
        decode = settings.share.get(ctx.tiers[0].name, 0.0)
        shares = {tier.name: settings.share.get(tier.name, 0.0) for tier in ctx.tiers}
        routed = {tier.name: ctx.moves_routed(tier) for tier in ctx.tiers}
        made = {
            (s, routed[name]): self._made(tuple(counts), s, decode, settings.split, routed[name])
            for name, s in shares.items()
        }
        lump = max((lump for _, lump, _ in made.values()), default=0)
        largest = max((largest for _, _, largest in made.values()), default=0)
        n_slots, slot_bytes = _ring(lump, largest, settings.ring)
        return Placement(
            places={name: made[s, routed[name]][0] for name, s in shares.items()},
            kv_vram_tok=None
            if settings.kv_tok is None
            else dict.fromkeys((layer.index for layer in ctx.layers), settings.kv_tok),
            kv_far_on=settings.far,
            n_slots=n_slots,
            slot_bytes=slot_bytes,
            chunk_tok=settings.size,
        )

    def _made(
        self, counts: tuple[int, ...], share: float, decode: float, split: bool, routed: bool
    ) -> tuple[Mapping[str, Place], int, int]:
        """Places for one class of passes, with what _share_out() says. Candidates have most of these in common."""
        key = (counts, share, decode, split, routed)
        if key not in self._places:
            drawn = _Drawing(len(self.ctx.units))
            far: list[tuple[_Group, npt.NDArray[np.intp], int]] = []
            for group, n in zip(self.groups, counts, strict=True):
                resident, rest = group.split(n)
                drawn.put("vram", resident)
                if len(rest):
                    far.append((group, rest, group.far_bytes(n)))
            lump, largest = _share_out(drawn, far, share, decode, split, routed)
            made = NumberedPlaces(self.ctx.units, self._index, drawn.places, drawn.numbers)
            self._places[key] = made, lump, largest
        return self._places[key]

    def build(self, settings: _Settings) -> Placement | None:
        """The placement with as many residents as fit; None where not even none do."""
        return self.build_counts(settings)[0]

    def build_counts(self, settings: _Settings) -> tuple[Placement | None, list[int]]:
        """The same with how many units of each group are resident."""
        key = settings.key
        if key not in self._built:
            self._built[key] = self._build(settings)
        return self._built[key]

    def _build(self, settings: _Settings) -> tuple[Placement | None, list[int]]:
        budget = self.ctx.budget_bytes
        nothing = [0] * len(self.groups)
        empty = self.placement(nothing, settings)
        ring = empty.n_slots * empty.slot_bytes
        key = (settings.size, settings.kv_tok, settings.far)
        if key not in self._beside:
            self._beside[key] = self.ctx.needs(empty) - ring
        other = self._beside[key] + ring
        best: tuple[Placement | None, list[int]] = (None, nothing)
        most = -1
        # Ring and scratch depend a little on what is resident, so what is beside residents is looked at again.
        for _ in range(4):
            counts = self.fill(max(0, budget - other), settings)
            placement = self.placement(counts, settings)
            resident = sum(
                n * self.resident_bytes(group, settings)
                for group, n in zip(self.groups, counts, strict=True)
            )
            needed = self.ctx.needs(placement)
            if needed <= budget and resident > most:
                best, most = (placement, counts), resident
            settled = needed - resident == other
            other = needed - resident
            self._beside[key] = other - placement.n_slots * placement.slot_bytes
            if settled or (needed <= budget and budget - needed < budget // 64):
                break
        return best

    # ---- choosing ----

    def score(self, placement: Placement, limit: float = math.inf) -> float:
        """The objective; above the limit something less."""
        return latency(self.ctx, placement, self._unused_seconds(placement), limit)

    def _unused_seconds(self, placement: Placement) -> float:
        """A placement that leaves VRAM unused is worth it only if that gains something: latencies of so little are not
        known any better, and the budget was given to be used."""
        return _UNUSED_SECONDS * (1.0 - self._near_bytes(placement) / max(1, self.total))

    def _near_bytes(self, placement: Placement) -> float:
        table = placement.places[self.ctx.tiers[0].name]
        places, numbers = numbered(table, self.ctx.units, self.ctx.names)
        shares = np.array([vram_share(place) for place in places])
        return float((shares[numbers] * self._sizes).sum())

    @cached_property
    def _sizes(self) -> npt.NDArray[np.float64]:
        return np.array([unit.n_bytes for unit in self.ctx.units], np.float64)

    @cached_property
    def total(self) -> float:
        return float(self._sizes.sum())

    def offer(self, placement: Placement | None, settings: _Settings | None = None) -> float:
        """Its score, or something less where that is not the best; infinite where there is none. The best so far is
        kept."""
        if placement is None:
            return math.inf
        score = self.score(placement, self.best_score)
        self.offered.append((score, placement))
        if score < self.best_score:
            self.best, self.best_score = placement, score
            if settings is not None:
                self.settings = settings
        return score

    def settle(self, best: Placement, others: Sequence[tuple[float, Placement]]) -> Placement:
        """The best that is nowhere far behind any of the others, by the objective not behind them at all, and has about
        as much in VRAM; simply the best where there is none. The others come with what offer() said."""
        limit = _RIVAL * self.best_score
        rivals = [p for least, p in others if least < limit and self.score(p) < limit]
        if not rivals:
            return best
        bar = min(map(self.score, rivals))
        theirs = zip(*map(self._times, rivals), strict=True)
        most = [max(_BEHIND * t, t + _UNUSED_SECONDS) for t in map(min, theirs)]
        near = 0.9 * self._near_bytes(best)
        for least, placement in sorted(self.offered, key=operator.itemgetter(0)):
            if least > bar:
                break
            if (
                self._near_bytes(placement) >= near
                and all(map(operator.le, self._times(placement), most))
                and self.score(placement) <= bar
            ):
                return placement
        return best

    def _times(self, placement: Placement) -> list[float]:
        """To the first token and for one behind it, of each length of prompt that counts."""
        runs = (self.ctx.simulate(placement, n) for n in prompt_lengths(self.ctx.n_ctx))
        more = self._unused_seconds(placement)
        return [time for run in runs for time in (run.ttft_s, self.ctx.n_seq / run.tps + more)]

    def try_settings(self, settings: _Settings) -> float:
        key = settings.key
        if key not in self._tried:
            self._tried[key] = self.offer(self.build(settings), settings)
        return self._tried[key]

    def choose_shares(self, base: _Settings, tiers: Sequence[Tier] = ()) -> None:
        """For each class of passes the share that makes its own passes shortest, everything else being equal, from all
        down to nothing: as far as it gains."""
        start, counts = self.build_counts(base)
        if start is None:
            return
        found = {name: [(math.inf, share)] for name, share in self.settings.share.items()}
        for part in (None, *_PARTS, 0.0):
            shares = {t: 1.0 if part is None else part * s for t, s in base.share.items()}
            made = self._in_ring_of(start, counts, replace(base, share=shares))
            left = [t for t in tiers or self.ctx.tiers if _gains(found[t.name])]
            for tier in left:
                found[tier.name].append((self._pass_seconds(made, tier), shares[tier.name]))
        self.try_settings(
            replace(base, share={name: min(tried)[1] for name, tried in found.items()})
        )

    def choose_split(self, base: _Settings) -> None:
        """Likewise of feed-forwards that are split by rows; but one share for all passes of few tokens and one for all
        others, for each boundary more cuts a feed-forward into smaller ops."""
        start, counts = self.build_counts(base)
        if start is None:
            return
        few = [tier for tier in self.ctx.tiers if tier.max_tok and tier.max_tok <= _FEW_TOK]
        many = [tier for tier in self.ctx.tiers if tier not in few]
        shares = dict(base.share)
        for group, typical in ((few, few[:1]), (many, many[-1:])):
            for tier in typical:
                tried: dict[float, float] = {}
                for share in {1.0, 0.0, *(part * base.share[tier.name] for part in _PARTS)}:
                    shares |= {one.name: share for one in group}
                    made = self._in_ring_of(start, counts, replace(base, share=shares))
                    tried[share] = self._pass_seconds(made, tier)
                shares |= {one.name: min(tried, key=tried.__getitem__) for one in group}
        self.try_settings(replace(base, share=shares))

    def _in_ring_of(self, start: Placement, counts: list[int], settings: _Settings) -> Placement:
        """A placement to compare with others by its shares: where its own ring would be smaller, with that of start."""
        made = self.placement(counts, settings)
        if made.n_slots * made.slot_bytes >= start.n_slots * start.slot_bytes:
            return made
        return replace(made, n_slots=start.n_slots, slot_bytes=start.slot_bytes)

    def _pass_seconds(self, placement: Placement, tier: Tier) -> float:
        return self.ctx.pass_seconds(placement, _typical(self.ctx, tier))

    def choose_memory(self) -> None:
        """What takes VRAM from weights so that long prompts are quick, together: a prompt that is one op streams once
        through any ring, one of several ops once through a ring that holds a layer, and either finds room where old KV
        is in host memory."""
        ctx, found = self.ctx, self.settings
        at, longest = ctx.sizes.index(ctx.size), max(prompt_lengths(ctx.n_ctx))
        has_kv = any(unit.kv_bytes_per_tok for unit in ctx.units)
        wide = has_kv and ctx.n_ctx > 2 * _WINDOW_TOK
        # Shares were chosen for the usual size; what streams once is worth it more.
        streams = replace(
            found, share=dict(found.share) | {ctx.tiers[-1].name: 1.0}, ring=_RINGS[1]
        )
        if self.try_settings(streams) < self.try_settings(replace(found, ring=_RINGS[1])):
            found = streams
        kinds = [found, self._window(found, longest)] if wide else [found]
        for kind in kinds:
            for size in ctx.sizes[: at + 1]:
                score = self._widen(replace(kind, size=size), longest)
                if longest <= size and score < math.inf and len(ctx.units) > _MANY_UNITS:
                    break
        for size in ctx.sizes[at + 1 : at + 2]:
            self.try_settings(replace(self.settings, size=size))
        if has_kv and (not wide or self.settings.kv_tok is not None or self.best is None):
            self.try_settings(replace(self.settings, kv_tok=0))
            if self.settings.kv_tok == 0:
                self.try_settings(replace(self.settings, far=_other(self.settings.far)))

    def _window(self, settings: _Settings, longest: int) -> _Settings:
        """With a window, and with whoever makes tokens behind the longest prompt quicker beyond it."""

        def token_seconds(settings: _Settings) -> float:
            placement = self.build(settings)
            return 1.0 / self.ctx.simulate(placement, longest).tps if placement else math.inf

        window = replace(settings, kv_tok=_WINDOW_TOK)
        return min((replace(window, far=far) for far in FAR_SIDES), key=token_seconds)

    def _widen(self, settings: _Settings, longest: int) -> float:
        """Larger rings, until that makes it worse; the last score that did not. Where long prompts are several ops, in
        any case one that holds a layer; where they are one op, no larger one."""
        in_chunks, last = settings.size < longest, math.inf
        for ring in _RINGS if in_chunks or longest <= N_PROMPT else _RINGS[:1]:
            score = self.try_settings(replace(settings, ring=ring))
            if score > last and not (in_chunks and ring < 1.0):
                break
            last = score
        return last

    def choose_where(self) -> None:
        """Units of all layers alike, or those of some layers first."""
        if self.ctx.has_experts:
            self.try_settings(replace(self.settings, spread=0.0))
            # With a ring for all of what is away in a layer: it fills while the layers between are computed.
            for part in _AWAY:
                if part > self._away():
                    self.try_settings(replace(self.settings, spread=part, ring=_RINGS[1]))
        else:
            self.try_settings(replace(self.settings, whole=True))

    def _away(self) -> float:
        """The part of all experts that is not resident in the best so far."""
        counts = self.build_counts(self.settings)[1]
        experts = [
            (group.n, n)
            for group, n in zip(self.groups, counts, strict=True)
            if group.kind == "expert"
        ]
        return 1.0 - sum(n for _, n in experts) / sum(n for n, _ in experts)


@register
class Auto:
    name = "auto"

    def place(self, ctx: PolicyContext) -> Placement:
        everything = same_in_all(ctx, dict.fromkeys((u.name for u in ctx.units), "vram"))
        if ctx.fits(everything):
            return replace(
                everything, why=dict.fromkeys((u.name for u in ctx.units), "everything fits")
            )
        ctx = _remembering(ctx)
        search = _Search(ctx)
        share = {tier.name: _balance(ctx, _typical(ctx, tier)) for tier in ctx.tiers}
        balanced = _Settings(share, size=ctx.size)
        search.try_settings(balanced)
        search.try_settings(replace(balanced, share=dict.fromkeys(share, 0.0)))
        search.choose_shares(balanced)
        if not ctx.has_experts:
            search.choose_split(replace(balanced, split=True))
        search.choose_memory()
        search.choose_where()
        if search.settings.split:
            search.choose_split(replace(search.settings, share=share))
        else:
            search.choose_shares(replace(search.settings, share=share), ctx.tiers[:1])
        others = [(search.offer(placement), placement) for placement in self._others(ctx)]
        if search.best is None:
            search.offer(_all_cpu(ctx))
        if search.best is None:
            raise BudgetError("no placement fits")
        best = search.settle(search.best, others)
        return replace(_plain(best), why=_reasons(ctx, best))

    def _others(self, ctx: PolicyContext) -> Iterator[Placement]:
        """Each as it would be by itself: with the largest ops that it finds room for."""
        divides = len(ctx.units) <= _MANY_UNITS
        for policy in (*_OTHERS, EvenSplit) if divides else _OTHERS:
            for size in ctx.sizes[ctx.sizes.index(ctx.size) :]:
                try:
                    placement = policy().place(_with_size(ctx, size))
                except BudgetError:
                    continue
                yield placement if size == ctx.size else _sized(placement, size)
                break


def _remembering(ctx: PolicyContext) -> PolicyContext:
    """The same, which simulates no run twice: of thousands of units that would be felt."""
    known: dict[tuple[int, int], tuple[Placement, Prediction]] = {}

    def simulate(placement: Placement, n_prompt: int) -> Prediction:
        key = (id(placement), n_prompt)  # which is nobody else's while the placement is kept
        if key not in known:
            known[key] = placement, ctx.simulate(placement, n_prompt)
        return known[key][1]

    return replace(ctx, ask_simulate=simulate)


def _plain(placement: Placement) -> Placement:
    """The same in dicts; tiers that have one mapping in common keep that in common."""
    dicts = {
        id(units): units.as_dict()
        for units in placement.places.values()
        if isinstance(units, NumberedPlaces)
    }
    places = {tier: dicts.get(id(units), units) for tier, units in placement.places.items()}
    return replace(placement, places=places)


def _sized(placement: Placement, size: int) -> Placement:
    return placement if placement.chunk_tok else replace(placement, chunk_tok=size)


def _with_size(ctx: PolicyContext, size: int) -> PolicyContext:
    """The context as another policy is given it, whose ops have so many tokens if it does not ask."""
    if size == ctx.size:
        return ctx
    return replace(
        ctx,
        size=size,
        ask_needs=lambda placement: ctx.needs(_sized(placement, size)),
        ask_simulate=lambda placement, n_prompt: ctx.simulate(_sized(placement, size), n_prompt),
    )


# ---- parts of a candidate ----


class _Drawing:
    """Places of units by their numbers, of which all are the CPU's at first."""

    def __init__(self, n_units: int) -> None:
        self.places: list[Place] = ["cpu"]
        self.numbers = np.zeros(n_units, np.uint8)

    def put(self, place: Place, units: npt.NDArray[np.intp]) -> None:
        if len(units) and place not in self.places:
            self.places.append(place)
        if len(units):
            self.numbers[units] = self.places.index(place)


def _share_out(
    drawn: _Drawing,
    far: list[tuple[_Group, npt.NDArray[np.intp], int]],
    share: float,
    head_share: float,
    split: bool,
    routed: bool,
) -> tuple[int, int]:
    """Puts what is not resident on bus and CPU; returns the bytes of the largest part of a layer that streams, and of
    its largest unit where that is an expert, which travels whole. Of the head one row is asked for, whatever the pass.
    routed: experts are divided as tokens are routed to them. One by one, chance puts more of a token's on one side, and
    the layer waits for that."""
    owed, lump, largest = 0.0, 0, 0
    for group, units, n_bytes in far:
        mine = head_share if group.kind == "head" else share
        n = 0  # of the units, that stream
        if group.kind == "embed":  # its rows are looked up where they lie
            pass
        elif group.kind == "expert":  # both sides of a layer work at once
            owed += mine * len(units)
            n = min(len(units), int(owed + 0.5))
            owed -= n
            n_bytes = n * group.n_bytes
            largest = max(largest, group.largest if n else 0)
            if routed and 0.0 < mine < 1.0:
                drawn.put(Split(stream=mine), units)
                lump, largest = max(lump, n_bytes, group.n_bytes), max(largest, group.largest)
                continue
        elif split and group.kind in ("ffn", "head") and 0.0 < mine < 1.0:
            drawn.put(Split(stream=mine), units)
            lump = max(lump, int(mine * n_bytes))
            continue
        elif group.kind == "head":
            n = len(units) if mine >= 1.0 else 0
        else:
            owed += mine
            n = len(units) if owed >= 0.5 else 0
            owed -= 1.0 if n else 0.0
        drawn.put("stream", units[:n])
        if n:
            lump = max(lump, n_bytes)
    return lump, largest


def _ring(lump: int, expert: int, factor: float) -> tuple[int, int]:
    """Slots and their size."""
    if lump == 0:
        return 0, 0
    wanted = max(int(factor * lump), 4 * expert)
    n_slots = max(4, -(-wanted // _SLOT_BYTES))
    return n_slots, max(_aligned(-(-wanted // n_slots)), _LEAST_SLOT, expert)


# ---- estimates ----


def _gains(tried: list[tuple[float, float]]) -> bool:
    """Whether one of the last two is the best so far."""
    return min(tried) in tried[-2:]


def _other(far: FarSide) -> FarSide:
    return "cpu" if far == "gpu" else "gpu"


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN


def _typical(ctx: PolicyContext, tier: Tier) -> int:
    """Tokens of a pass that stands for the tier: its largest; of the last one a prompt between usual and longest."""
    lengths = prompt_lengths(ctx.n_ctx)
    prompt = int(math.sqrt(min(lengths) * max(lengths)))
    return max(ctx.n_seq if tier is ctx.tiers[0] else 1, min(tier.max_tok or prompt, ctx.n_ctx))


def _seconds_a_byte(ctx: PolicyContext, unit: Unit, n_tok: int) -> float:
    """Of the CPU, for a pass of n_tok, over all bytes of such units whether they are needed or not."""
    touched = 1.0 - (1.0 - unit.use) ** n_tok
    rows = max(1.0, n_tok * unit.use)
    # Of a large piece, for a layer's units are one op. Four bits and more a weight: two FLOPs each a row. Formats are
    # not told apart here; the simulation does.
    shape = Shape(None, max(1, int(rows)), int(3 * rows * _SLOT_BYTES), _SLOT_BYTES)
    seconds = float(ctx.cost.seconds("matmul", shape, "cpu", "h2d"))
    return touched * seconds / _SLOT_BYTES


def _bus_seconds_a_byte(ctx: PolicyContext) -> float:
    return float(ctx.cost.seconds("copy", Shape(bytes=_SLOT_BYTES), "h2d", "cpu")) / _SLOT_BYTES


def _balance(ctx: PolicyContext, n_tok: int) -> float:
    """The share that streams while the CPU computes the rest, so that both end at once."""
    largest = max(
        (u for u in ctx.units if u.kind in ("ffn", "expert")),
        key=lambda unit: unit.n_bytes,
        default=None,
    )
    if largest is None:
        return 0.0
    cpu, bus = _seconds_a_byte(ctx, largest, n_tok), _bus_seconds_a_byte(ctx)
    if 2 * n_tok * largest.use <= 1.0:  # then the GPU reads only what was routed, where it lies
        bus *= 1.0 - (1.0 - largest.use) ** n_tok
    share = cpu / (cpu + bus) if cpu + bus > 0 else 0.0
    return 0.0 if share < _SNAP else 1.0 if share > 1.0 - _SNAP else round(share, 3)


def _all_cpu(ctx: PolicyContext) -> Placement | None:
    """The least demanding placement, with the largest ops that fit."""
    for size in ctx.sizes[ctx.sizes.index(ctx.size) :]:
        places: dict[str, Place] = dict.fromkeys((unit.name for unit in ctx.units), "cpu")
        placement = replace(same_in_all(ctx, places), chunk_tok=size, pass_tok=size)
        if ctx.fits(placement):
            return placement
    return None


def _reasons(ctx: PolicyContext, placement: Placement) -> dict[str, str]:
    """Of each unit, where the others of its kind went and why."""
    kinds = list(dict.fromkeys(unit.kind for unit in ctx.units))
    alike = np.array([kinds.index(unit.kind) for unit in ctx.units])
    tables = [placement.places[tier.name] for tier in ctx.tiers]
    for table in tables:  # numbers for what is alike in kind and in all places
        places, numbers = numbered(table, ctx.units, ctx.names)
        alike = np.unique(alike * len(places) + numbers, return_inverse=True)[1]
    _, where, which = np.unique(alike, return_index=True, return_inverse=True)
    reasons = [
        _reason(ctx, unit, tuple(str(table[unit.name]) for table in tables))
        for unit in map(ctx.units.__getitem__, where)
    ]
    return dict(zip(ctx.names, map(reasons.__getitem__, which.tolist()), strict=True))


def _reason(ctx: PolicyContext, unit: Unit, places: tuple[str, ...]) -> str:
    if unit.kind == "expert" and any(place.startswith("Split") for place in places):
        return "no room; bus and CPU share those that are routed"
    if places[0].startswith("Split"):
        return "no room for all of it; GPU and CPU compute their shares at once"
    if places[0] == "vram":
        return "every token needs it" if unit.use >= 1.0 else "saves most of what is left"
    if unit.kind == "embed":
        return "only rows of it are read"
    if any(place.startswith("Split") for place in places):
        return "no room; bus and CPU share its rows"
    if unit.kind == "expert" and "stream" in places:
        return "no room; bus and CPU share these"
    first = next((i for i, place in enumerate(places) if place == "stream"), None)
    if first is None:
        return "no room"
    if first == 0:
        return "no room; the bus brings it while the CPU computes others"
    below = ctx.tiers[first - 1].max_tok
    return f"no room; streams in passes of more than {below} tokens"

"""`even_split`: every layer divided alike. Attention and its KV in VRAM, and of each layer's feed-forward (of the head
too, where it does not fit beside) the same share, as large as the budget allows. Of the rest a share streams while the
CPU computes what is left, all three at once: in passes of few tokens the share that makes those shortest, in larger
ones likewise, which mostly is all of it. Experts are divided by their number and, where few tokens pass, as these are
routed.

Threads: pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import register
from .base import N_PROMPT, Place, Placement, PolicyContext, Split, fitting, latency, most

_STEPS = 64  # of the share in VRAM
_FEW_TOK = (
    8  # tiers of at most so many tokens are alike: each boundary more cuts a unit into smaller ops
)
_SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 1.0)  # of what is not in VRAM, that streams
_N_SLOTS = 4
_LEAST_SLOT = 256 << 10
_ALIGN = 256


@dataclass(frozen=True)
class _Settings:
    """few, many: what streams of the rest, by passes of few and of more tokens. ring: in layers' worth of the rest.
    split_head: it is divided as well, rather than resident."""

    few: float = 0.0
    many: float = 1.0
    ring: float = 0.5
    size: int = 0
    split_head: bool = False


@register
class EvenSplit:
    name = "even_split"

    def place(self, ctx: PolicyContext) -> Placement:
        settings = _settle(ctx, _Settings())
        best, best_score = None, float("inf")
        for change in _changes(ctx):
            changed = replace(settings, **change)  # type: ignore[arg-type]
            share = _largest(ctx, changed)
            if share is None:
                continue
            placement = _placement(ctx, share, changed)
            score = latency(ctx, placement, limit=best_score)
            if score < best_score:
                best, best_score, settings = placement, score, changed
        if best is None:  # BudgetError, with what the least of these placements needs
            least = _Settings(0.0, 0.0, split_head=True, size=ctx.sizes[-1])
            return fitting(ctx, _placement(ctx, 0.0, least))
        return replace(best, why=_reasons(ctx, best))


def _changes(ctx: PolicyContext) -> Iterator[dict[str, object]]:
    """One after another, each on top of what was best before."""
    yield {}
    yield {"split_head": True}
    for size in ctx.sizes[ctx.sizes.index(ctx.size) + 1 :][:2]:
        yield {"size": size}
    for ring in (1.25, 2.25):
        yield {"ring": ring}
    yield {"many": 0.0, "few": 0.0}
    yield {"many": 0.0, "few": 0.0, "split_head": True, "size": ctx.sizes[-1]}


def _settle(ctx: PolicyContext, settings: _Settings) -> _Settings:
    """The shares that make passes shortest, each kind of pass by itself."""
    share = _largest(ctx, settings)
    if share is None:
        settings = replace(settings, split_head=True)
        share = _largest(ctx, settings)
    if share is None:
        return settings
    vram: float = share

    def seconds(changed: _Settings, n_tok: int) -> float:
        return ctx.pass_seconds(_placement(ctx, vram, changed), n_tok)

    few_tok, many_tok = max(1, ctx.n_seq), min(N_PROMPT, ctx.n_ctx)
    few = min(_SHARES, key=lambda s: seconds(replace(settings, few=s), few_tok))
    many = min((1.0, few), key=lambda s: seconds(replace(settings, few=few, many=s), many_tok))
    return replace(settings, few=few, many=many)


# ---- placements ----


def _largest(ctx: PolicyContext, settings: _Settings) -> float | None:
    """The largest share in VRAM that fits; None where not even none does."""

    def make(n: int) -> Placement:
        return _placement(ctx, n / _STEPS, settings)

    return most(ctx, _STEPS, make) / _STEPS if ctx.fits(make(0)) else None


def _placement(ctx: PolicyContext, share: float, settings: _Settings) -> Placement:
    made: dict[tuple[bool, bool], dict[str, Place]] = {}
    places: dict[str, dict[str, Place]] = {}
    for tier in ctx.tiers:
        few, routed = (tier.max_tok or N_PROMPT) <= _FEW_TOK, ctx.moves_routed(tier)
        if (few, routed) not in made:
            streams = settings.few if few else settings.many
            made[few, routed] = _places(ctx, share, streams, settings.split_head, routed)
        places[tier.name] = made[few, routed]
    slot = _slot_bytes(ctx, share, settings)
    return Placement(
        places=places,
        n_slots=_N_SLOTS if slot else 0,
        slot_bytes=slot,
        chunk_tok=settings.size,
    )


def _places(
    ctx: PolicyContext, share: float, streams: float, split_head: bool, routed: bool
) -> dict[str, Place]:
    divided: Place = Split(vram=share, stream=(1.0 - share) * streams)
    places: dict[str, Place] = {}
    for unit in ctx.outer:
        places[unit.name] = "cpu" if unit.kind == "embed" else divided if split_head else "vram"
    for layer in ctx.layers:
        places.update(dict.fromkeys((unit.name for unit in layer.attn), "vram"))
        n = len(layer.ffn)
        resident = int(share * n + 1e-9)
        streamed = resident + int((n - resident) * streams + 0.5)
        far = Split(stream=streams) if routed and 0.0 < streams < 1.0 else None
        for i, unit in enumerate(layer.ffn):
            one: Place = "vram" if i < resident else far or ("stream" if i < streamed else "cpu")
            places[unit.name] = one if unit.kind == "expert" else divided
    return places


def _slot_bytes(ctx: PolicyContext, share: float, settings: _Settings) -> int:
    """A layer's worth of what streams, times what the settings say; an expert travels whole."""
    rest = (1.0 - share) * max(settings.few, settings.many)
    if rest <= 0:
        return 0
    lump = max((sum(unit.n_bytes for unit in layer.ffn) for layer in ctx.layers), default=0)
    expert = max((u.n_bytes for u in ctx.units if u.kind == "expert"), default=0)
    wanted = max(int(settings.ring * rest * lump / _N_SLOTS), _LEAST_SLOT, expert)
    return -(-wanted // _ALIGN) * _ALIGN


def _reasons(ctx: PolicyContext, placement: Placement) -> dict[str, str]:
    places = placement.places[ctx.tiers[0].name]
    return {
        unit.name: "every layer alike: GPU and CPU at once"
        for unit in ctx.units
        if isinstance(places[unit.name], Split) or unit.kind == "expert"
    }

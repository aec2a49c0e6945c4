"""`static_attn`: attention, norms, router and KV of the first layers in VRAM, of as many as fit. Where all fit: with
experts the head too if there is room, then the first layers wholly. The CPU computes the rest; nothing streams.

Threads: pure.
"""

from __future__ import annotations

from . import register
from .base import Placement, PolicyContext, Unit, most, place_units, same_in_all


def attn_of(ctx: PolicyContext, n: int) -> list[Unit]:
    return [unit for layer in ctx.layers[:n] for unit in layer.attn]


def ffn_of(ctx: PolicyContext, n: int) -> list[Unit]:
    return [unit for layer in ctx.layers[:n] for unit in layer.ffn]


@register
class StaticAttn:
    name = "static_attn"

    def place(self, ctx: PolicyContext) -> Placement:
        def resident(units: list[Unit]) -> Placement:
            return same_in_all(ctx, place_units(ctx, vram=units))

        n_layer = len(ctx.layers)
        n = most(ctx, n_layer, lambda n: resident(attn_of(ctx, n)))
        taken = attn_of(ctx, n)
        if n < n_layer:
            return resident(taken)
        if ctx.has_experts and ctx.fits(resident([*taken, *ctx.head])):
            taken += ctx.head
        m = most(ctx, n_layer, lambda m: resident(taken + ffn_of(ctx, m)))
        return resident(taken + ffn_of(ctx, m))

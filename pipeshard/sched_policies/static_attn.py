"""`static_attn`: attention, norms, router and KV of the first layers in VRAM, of as many as fit. Where all fit: with
experts the head too if there is room, then the first layers wholly. The CPU computes the rest; nothing streams.

Threads: pure.
"""

from __future__ import annotations

from functools import cache

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
        @cache
        def resident(n: int, m: int = 0, with_head: bool = False) -> Placement:
            head = ctx.head if with_head else ()
            units = [*attn_of(ctx, n), *ffn_of(ctx, m), *head]
            return same_in_all(ctx, place_units(ctx, vram=units))

        n_layer = len(ctx.layers)
        n = most(ctx, n_layer, resident)
        if n < n_layer:
            return resident(n)
        with_head = ctx.has_experts and ctx.fits(resident(n, 0, True))
        m = most(ctx, n_layer, lambda m: resident(n, m, with_head))
        return resident(n, m, with_head)

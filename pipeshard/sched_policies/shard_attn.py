"""`shard_attn`: attention, norms, router and KV of the first layers in VRAM, of as many as fit beside one slot.

Where not all fit: the other layers' attention streams through the slot and the CPU computes every feed-forward. Where
all fit: with experts the head too if there is room, then the first layers wholly, and the other feed-forwards stream.
The slot is as large as what streams through it; a layer's experts are one lump.

Threads: pure.
"""

from __future__ import annotations

from functools import cache

from . import register
from .base import Placement, PolicyContext, lump_bytes, most, place_units, same_in_all
from .static_attn import attn_of, ffn_of


@register
class ShardAttn:
    name = "shard_attn"

    def place(self, ctx: PolicyContext) -> Placement:
        layers = ctx.layers
        n_layer = len(layers)
        ffn_slots = [lump_bytes(layer.ffn) for layer in layers]

        @cache
        def attn_streams(n: int) -> Placement:
            rest = [unit for layer in layers[n:] for unit in layer.attn]
            slot = lump_bytes(*((unit,) for unit in rest))
            places = place_units(ctx, vram=attn_of(ctx, n), stream=rest)
            return same_in_all(ctx, places, n_slots=1 if slot else 0, slot_bytes=slot)

        @cache
        def ffn_streams(m: int, with_head: bool) -> Placement:
            rest = layers[m:]
            slot = max(ffn_slots[m:], default=0)
            head = ctx.head if with_head else ()
            places = place_units(
                ctx,
                vram=[*attn_of(ctx, n_layer), *ffn_of(ctx, m), *head],
                stream=(unit for layer in rest for unit in layer.ffn),
            )
            return same_in_all(ctx, places, n_slots=1 if slot else 0, slot_bytes=slot)

        if not ctx.fits(ffn_streams(0, False)):
            return attn_streams(most(ctx, n_layer, attn_streams))
        with_head = ctx.has_experts and ctx.fits(ffn_streams(0, True))
        m = most(ctx, n_layer, lambda m: ffn_streams(m, with_head))
        return ffn_streams(m, with_head)

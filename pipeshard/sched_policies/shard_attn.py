"""`shard_attn`: attention, norms, router and KV of the first layers in VRAM, of as many as fit beside one slot.

Where not all fit: the other layers' attention streams through the slot and the CPU computes every feed-forward. Where
all fit: with experts the head too if there is room, then the first layers wholly, and the other feed-forwards stream.
The slot is as large as what streams through it; a layer's experts are one lump.

Threads: pure.
"""

from __future__ import annotations

from . import register
from .base import Placement, PolicyContext, Unit, lump_bytes, most, place_units, same_in_all
from .static_attn import attn_of, ffn_of


@register
class ShardAttn:
    name = "shard_attn"

    def place(self, ctx: PolicyContext) -> Placement:
        layers = ctx.layers
        n_layer = len(layers)

        def attn_streams(n: int) -> Placement:
            rest = [unit for layer in layers[n:] for unit in layer.attn]
            slot = lump_bytes(*((unit,) for unit in rest))
            places = place_units(ctx, vram=attn_of(ctx, n), stream=rest)
            return same_in_all(ctx, places, n_slots=1 if slot else 0, slot_bytes=slot)

        def ffn_streams(m: int, resident: list[Unit]) -> Placement:
            rest = layers[m:]
            slot = lump_bytes(*(layer.ffn for layer in rest))
            places = place_units(
                ctx,
                vram=resident + ffn_of(ctx, m),
                stream=(unit for layer in rest for unit in layer.ffn),
            )
            return same_in_all(ctx, places, n_slots=1 if slot else 0, slot_bytes=slot)

        taken = attn_of(ctx, n_layer)
        if not ctx.fits(ffn_streams(0, taken)):
            return attn_streams(most(ctx, n_layer, attn_streams))
        if ctx.has_experts and ctx.fits(ffn_streams(0, [*taken, *ctx.head])):
            taken += ctx.head
        m = most(ctx, n_layer, lambda m: ffn_streams(m, taken))
        return ffn_streams(m, taken)

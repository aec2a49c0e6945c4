"""`full_shard`: the first layers in VRAM, as many as fit; the others stream wholly through two slots, so that one part
of a layer travels while the one before computes. The token table and the head stay with the CPU.

A slot is as large as the largest part of a layer (its attention, its feed-forward, all its experts).

Threads: pure.
"""

from __future__ import annotations

from functools import cache

from . import register
from .base import Placement, PolicyContext, lump_bytes, most, place_units, same_in_all


@register
class FullShard:
    name = "full_shard"

    def place(self, ctx: PolicyContext) -> Placement:
        layers = ctx.layers
        slots = [lump_bytes(layer.attn, layer.ffn) for layer in layers]

        @cache
        def sharded(n: int) -> Placement:
            slot = max(slots[n:], default=0)
            places = place_units(
                ctx,
                vram=(unit for layer in layers[:n] for unit in layer.units),
                stream=(unit for layer in layers[n:] for unit in layer.units),
            )
            return same_in_all(ctx, places, n_slots=2 if slot else 0, slot_bytes=slot)

        return sharded(most(ctx, len(layers), sharded))

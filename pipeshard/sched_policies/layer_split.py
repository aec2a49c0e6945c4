"""`layer_split`: what llama.cpp's `-ngl` does. The last layers and their KV in VRAM, as many as fit, and the head once
all layers are. The CPU computes the rest in small passes; from 32 tokens on, the layers stream through one slot.

The head is asked for one row a pass, so it never streams; the token table is only read.

Threads: pure.
"""

from __future__ import annotations

from functools import cache

from . import register
from .base import (
    GPU_TOK,
    Placement,
    PolicyContext,
    Tier,
    lump_bytes,
    most,
    place_units,
)


def is_large(tier: Tier) -> bool:
    """Whether its passes can have as many tokens as are worth the copies."""
    return tier.max_tok is None or tier.max_tok >= GPU_TOK


@register
class LayerSplit:
    name = "layer_split"

    def place(self, ctx: PolicyContext) -> Placement:
        layers, n_layer = ctx.layers, len(ctx.layers)
        slots = [lump_bytes(layer.attn, layer.ffn) for layer in layers]

        @cache
        def split(n: int, with_head: bool = False) -> Placement:
            far, near = layers[: n_layer - n], layers[n_layer - n :]
            resident = [unit for layer in near for unit in layer.units]
            if with_head:
                resident += ctx.head
            small = place_units(ctx, vram=resident)
            large = place_units(
                ctx, vram=resident, stream=(unit for layer in far for unit in layer.units)
            )
            slot = max(slots[: n_layer - n], default=0)
            return Placement(
                places={tier.name: large if is_large(tier) else small for tier in ctx.tiers},
                n_slots=1 if slot else 0,
                slot_bytes=slot,
            )

        n = most(ctx, n_layer, split)
        if n == n_layer and ctx.fits(split(n, with_head=True)):
            return split(n, with_head=True)
        return split(n)

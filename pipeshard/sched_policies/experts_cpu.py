"""`experts_cpu`: what llama.cpp's `--n-cpu-moe` does. Everything but experts in VRAM; the experts of the first layers,
of as few as need be, stay with the CPU, and stream through one slot from 32 tokens on.

Without experts in the model: everything in VRAM, or not at all.

Threads: pure.
"""

from __future__ import annotations

from functools import cache

from . import register
from .base import Placement, PolicyContext, lump_bytes, most, place_units
from .layer_split import is_large


@register
class ExpertsCpu:
    name = "experts_cpu"

    def place(self, ctx: PolicyContext) -> Placement:
        experts = [[unit for unit in layer.ffn if unit.kind == "expert"] for layer in ctx.layers]
        slots = list(map(lump_bytes, experts))

        @cache
        def with_resident(n: int) -> Placement:
            """The experts of the last n layers in VRAM."""
            n_away = len(experts) - n
            away = [unit for layer in experts[:n_away] for unit in layer]
            small = place_units(ctx, "vram", cpu=away)
            large = place_units(ctx, "vram", stream=away)
            slot = max(slots[:n_away], default=0)
            return Placement(
                places={tier.name: large if is_large(tier) else small for tier in ctx.tiers},
                n_slots=1 if slot else 0,
                slot_bytes=slot,
            )

        return with_resident(most(ctx, len(experts), with_resident))

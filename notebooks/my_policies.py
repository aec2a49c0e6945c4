"""A policy of one's own, outside the package: policy="my_policies:TakingTurns", from this folder."""

from pipeshard import Placement, PolicyContext
from pipeshard.sched_policies.base import lump_bytes, most


class TakingTurns:
    """As many layers resident as fit, spread evenly between the others, so that each resident layer's compute hides a
    copy. The others stream where a pass has many tokens, and stay on the CPU where it has few."""

    def place(self, ctx: PolicyContext) -> Placement:
        layers = ctx.layers
        slot = lump_bytes(*(part for layer in layers for part in (layer.attn, layer.ffn)))

        def with_residents(n: int) -> Placement:
            resident = {i * len(layers) // n for i in range(n)} if n else set()
            places = {}
            for tier in ctx.tiers:
                many = tier.max_tok is None or tier.max_tok > 32
                elsewhere = "stream" if many and n < len(layers) else "cpu"
                places[tier.name] = {unit.name: "cpu" for unit in ctx.outer} | {
                    unit.name: "vram" if i in resident else elsewhere
                    for i, layer in enumerate(layers)
                    for unit in layer.units
                }
            return Placement(places, n_slots=2 if n < len(layers) else 0, slot_bytes=slot)

        return with_residents(most(ctx, len(layers), with_residents))

"""`full_gpu_no_output`: all layers in VRAM; the token table and the head stay with the CPU.

Threads: pure.
"""

from __future__ import annotations

from . import register
from .base import Placement, PolicyContext, fitting, place_units, same_in_all


@register
class FullGpuNoOutput:
    name = "full_gpu_no_output"

    def place(self, ctx: PolicyContext) -> Placement:
        return fitting(ctx, same_in_all(ctx, place_units(ctx, "vram", cpu=ctx.outer)))

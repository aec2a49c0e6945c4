"""`full_gpu`: everything in VRAM, or not at all.

Threads: pure.
"""

from __future__ import annotations

from . import register
from .base import Placement, PolicyContext, fitting, place_units, same_in_all


@register
class FullGpu:
    name = "full_gpu"

    def place(self, ctx: PolicyContext) -> Placement:
        return fitting(ctx, same_in_all(ctx, place_units(ctx, "vram")))

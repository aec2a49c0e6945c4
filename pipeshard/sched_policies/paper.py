"""`paper`: the planner of the pipelined-sharding paper. For each class of passes it takes the one of five strategies
with the best predicted throughput, each class with its own residents; what changes between classes is uploaded again.

`fidelity="paper"` also sends a prompt through in chunks of 512 tokens, each of which brings all weights again, and
looks ahead by one; the default leaves both to our executor. Where the core keeps one residency for all classes, the
strategy with the best throughput over a prompt and an answer is taken for all of them.

Threads: pure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..errors import BudgetError, PlanError, RequestError
from . import register
from .base import Placement, PolicyContext, Tier
from .full_gpu import FullGpu
from .full_gpu_no_output import FullGpuNoOutput
from .full_shard import FullShard
from .shard_attn import ShardAttn
from .static_attn import StaticAttn

_STRATEGIES = (FullGpu, FullGpuNoOutput, StaticAttn, ShardAttn, FullShard)
_CHUNK_TOK = 512
_MOST_TOK = 16384  # larger passes are all of one class
_N_PROMPT, _N_GEN = 1024, 128  # the throughput that decides where one strategy has to do


@register
class Paper:
    name = "paper"

    def __init__(self, fidelity: Literal["engine", "paper"] = "engine") -> None:
        if fidelity not in ("engine", "paper"):
            raise RequestError(
                f'fidelity must be "engine" or "paper", not {fidelity!r}', argument="fidelity"
            )
        self.fidelity = fidelity

    def tiers(self, n_ctx: int, n_seq: int) -> tuple[Tier, ...]:
        """1, 512, 1024, ...; with many sequences 1, 4, 16, 64, 512, ..."""
        sizes = [1] if n_seq == 1 else [1, 4, 16, 64]
        size = _CHUNK_TOK
        while size < min(n_ctx, _MOST_TOK):
            sizes.append(size)
            size *= 2
        return (*(Tier(str(size), size) for size in sizes), Tier("more", None))

    def place(self, ctx: PolicyContext) -> Placement:
        candidates: list[Placement] = []
        failure: BudgetError | None = None
        for strategy in _STRATEGIES:
            try:
                candidates.append(self._with_fidelity(ctx, strategy().place(ctx)))
            except BudgetError as error:
                failure = error
        if not candidates:
            assert failure is not None
            raise failure
        best = [
            min(candidates, key=lambda placement, tier=tier: _pass_seconds(ctx, placement, tier))  # type: ignore[misc]
            for tier in ctx.tiers
        ]
        joined = replace(
            max(best, key=lambda placement: placement.n_slots * placement.slot_bytes),
            places={
                tier.name: placement.places[tier.name]
                for tier, placement in zip(ctx.tiers, best, strict=True)
            },
            per_tier_residency=True,
        )
        try:
            return joined if ctx.fits(joined) else _best_of_one(ctx, candidates)
        except PlanError:  # one residency for all tiers is what this core knows
            return _best_of_one(ctx, candidates)

    def _with_fidelity(self, ctx: PolicyContext, placement: Placement) -> Placement:
        if self.fidelity == "engine":
            return placement
        size = min(_CHUNK_TOK, max(ctx.sizes))
        return replace(placement, chunk_tok=size, pass_tok=size)


def _pass_seconds(ctx: PolicyContext, placement: Placement, tier: Tier) -> float:
    """Of the tier's largest pass: the one with the best throughput takes least."""
    n_tok = min(tier.max_tok or ctx.n_ctx, ctx.n_ctx)
    if n_tok <= 1:
        return 1.0 / ctx.simulate(placement, 1).tps
    return ctx.simulate(placement, n_tok).ttft_s


def _best_of_one(ctx: PolicyContext, candidates: list[Placement]) -> Placement:
    def seconds(placement: Placement) -> float:
        run = ctx.simulate(placement, min(_N_PROMPT, ctx.n_ctx))
        return run.ttft_s + _N_GEN / run.tps

    return min(candidates, key=seconds)

"""`paper`: the planner of the pipelined-sharding paper. For each class of passes it takes the one of five strategies
with the best predicted throughput, each class with its own residents; a pass of another class than the last one first
uploads what its own residents lack, which its predicted and its measured time include.

`fidelity="paper"` also sends a prompt through in chunks of 512 tokens, each of which brings all weights again, and
looks ahead by one; the default leaves both to our executor. Where the strategies cannot be made to fit beside each
other, the one with the best throughput over a prompt and an answer is taken for all classes.

Threads: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..errors import BudgetError, RequestError
from . import register
from .base import Placement, PolicyContext, Tier, lump_bytes
from .full_gpu import FullGpu
from .full_gpu_no_output import FullGpuNoOutput
from .full_shard import FullShard
from .shard_attn import ShardAttn
from .static_attn import StaticAttn

_STRATEGIES = {
    strategy.name: strategy
    for strategy in (FullGpu, FullGpuNoOutput, StaticAttn, ShardAttn, FullShard)
}
_ROUNDS = 4  # of making strategies smaller until they fit beside each other; one or two do
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
        rooms = dict.fromkeys(_STRATEGIES, ctx.budget_bytes)
        candidates = found = self._candidates(ctx, rooms)
        ranks = [
            sorted(found, key=lambda name, tier=tier: _pass_seconds(ctx, found[name], tier))  # type: ignore[misc]
            for tier in ctx.tiers
        ]
        for _ in range(_ROUNDS):
            chosen = [next(name for name in rank if name in found) for rank in ranks]
            if len(set(chosen)) == 1:
                return candidates[chosen[0]]
            joined = _join(ctx, [found[name] for name in chosen])
            if ctx.fits(joined):
                return joined
            # Residents of one beside the ring of another: what each has room for beside all but the residents.
            room = ctx.budget_bytes - ctx.needs(joined)
            room += max(_resident_bytes(ctx, found[name]) for name in chosen)
            try:
                found = self._candidates(
                    ctx,
                    {
                        name: room + ctx.needs(placement) - _resident_bytes(ctx, placement)
                        for name, placement in found.items()
                    },
                )
            except BudgetError:
                break
        return _best_of_one(ctx, list(candidates.values()))

    def _candidates(self, ctx: PolicyContext, rooms: Mapping[str, int]) -> dict[str, Placement]:
        """What each strategy does with so many bytes, where it can do anything; BudgetError where none can."""
        found: dict[str, Placement] = {}
        failure: BudgetError | None = None
        for name, n_bytes in rooms.items():
            its = replace(ctx, budget_bytes=max(0, n_bytes))
            try:
                found[name] = self._with_fidelity(ctx, _STRATEGIES[name]().place(its))
            except BudgetError as error:
                failure = error
        if not found:
            assert failure is not None
            raise failure
        return found

    def _with_fidelity(self, ctx: PolicyContext, placement: Placement) -> Placement:
        if self.fidelity == "engine":
            return placement
        size = min(_CHUNK_TOK, max(ctx.sizes))
        return replace(placement, chunk_tok=size, pass_tok=size)


def _join(ctx: PolicyContext, best: list[Placement]) -> Placement:
    """Each tier's places from its own, with the largest of their rings."""
    return replace(
        max(best, key=lambda placement: placement.n_slots * placement.slot_bytes),
        places={
            tier.name: placement.places[tier.name]
            for tier, placement in zip(ctx.tiers, best, strict=True)
        },
        per_tier_residency=True,
    )


def _resident_bytes(ctx: PolicyContext, placement: Placement) -> int:
    places = placement.places[ctx.tiers[0].name]  # the strategies' are the same in all
    return lump_bytes(unit for unit in ctx.units if places[unit.name] == "vram")


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

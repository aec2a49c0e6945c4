"""From a budget to a plan: sizes of passes, places of units, and the smallest budget that would do.

The core says what a placement needs, to the byte; everything here asks it and computes no sizes of its own.

Not here: whether a plan is right (the core), how it is written down (plan.py).
Threads: pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from . import _core
from .errors import BudgetError
from .model import Model
from .placement import TIERS, Place, Placement, Unit
from .plan import Plan
from .sizes import format_bytes

__all__ = ["MAX_CHUNK_TOK", "Machine", "Wishes", "make_plan", "smallest_budget"]

MAX_CHUNK_TOK = 2048
_SIZES = (MAX_CHUNK_TOK, 512, 128, 64)  # tokens of one op; smaller ones need less scratch
_LOGIT_ROWS = 8
_SCRATCH_SHARE = 4  # passes shrink until scratch takes at most this part of the budget


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan must know of the device: nothing that needs it open."""

    accelerator: bool
    sm: int = 90
    graph_reserve_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller asked for."""

    budget_bytes: int
    n_ctx: int
    n_seq: int
    kv: str


def make_plan(model: Model, machine: Machine, wishes: Wishes) -> tuple[Plan, _core.Plan]:
    """The plan of policy "auto", and the same bound to the model. BudgetError where no placement fits."""
    task = _Task(model, machine, wishes)
    if not machine.accelerator:
        return task.fix(
            task.draft(_all(model, "cpu", "the device has no memory of its own"), task.sizes[0])
        )
    for place in (task.all_resident, task.greedy, task.all_cpu):
        draft = place()
        if draft is not None:
            return task.fix(draft)
    needed, smallest = (
        task.needs(_all(model, "cpu"), task.sizes[-1]),
        smallest_budget(model, machine, wishes),
    )
    raise BudgetError(
        f"a budget of {format_bytes(wishes.budget_bytes)} of VRAM is too small for {model.name} with n_ctx "
        f"{wishes.n_ctx} and n_seq {wishes.n_seq}; the smallest that works is {smallest} bytes "
        f"({format_bytes(smallest)})",
        needed=needed,
        budget=wishes.budget_bytes,
        smallest=smallest,
    )


def smallest_budget(model: Model, machine: Machine, wishes: Wishes) -> int:
    """Bytes of VRAM that the least demanding placement needs: make_plan() succeeds with exactly as many."""
    task = _Task(model, machine, wishes)
    return task.needs(_all(model, "cpu"), task.sizes[-1])


class _Task:
    """One question to the core after another, about one model, machine and wish."""

    def __init__(self, model: Model, machine: Machine, wishes: Wishes) -> None:
        self.model = model
        self.machine = machine
        self.wishes = wishes
        # Every sequence can be part of one pass, and no op takes more tokens than a context has.
        most = max(wishes.n_ctx, wishes.n_seq)
        self.sizes = sorted({max(wishes.n_seq, min(size, most)) for size in _SIZES}, reverse=True)

    # ---- asking ----

    def draft(self, placement: Placement, size: int) -> Plan:
        return Plan(
            arch=self.model.arch,
            digest=self.model.digest,
            accelerator=self.machine.accelerator,
            sm=self.machine.sm,
            n_ctx=self.wishes.n_ctx,
            n_seq=self.wishes.n_seq,
            kv=self.wishes.kv,
            budget_bytes=self.wishes.budget_bytes,
            tiers=TIERS,
            placement=placement,
            chunk_tok=size,
            pass_tok=size,
            logit_rows=max(_LOGIT_ROWS, min(self.wishes.n_seq, 256)),
            graph_reserve_bytes=self.machine.graph_reserve_bytes,
        )

    def needs(self, placement: Placement, size: int) -> int:
        return self.ask(placement, size).needed_bytes

    def ask(self, placement: Placement, size: int) -> _core.Plan:
        """As if there were no budget."""
        return replace(self.draft(placement, size), budget_bytes=(1 << 63) - 1).bind(self.model)

    def fits(self, placement: Placement, size: int) -> bool:
        return self.needs(placement, size) <= self.wishes.budget_bytes

    def fix(self, draft: Plan) -> tuple[Plan, _core.Plan]:
        """The finished plan: with its bytes, and checked against the budget."""
        core = draft.bind(self.model)
        return replace(draft, bytes=core.bytes_by_kind), core

    # ---- the placements of policy "auto" ----

    def all_resident(self) -> Plan | None:
        placement = _all(self.model, "vram", "everything fits")
        if self.model.n_bytes > self.wishes.budget_bytes:
            return None  # spares the questions
        size = next((size for size in self.sizes if self.fits(placement, size)), None)
        return None if size is None else self.draft(placement, size)

    def greedy(self) -> Plan | None:
        """As many units as fit, the most valuable first, with the largest passes that leave room for them."""
        order = _by_value(self.model.units)
        for size in self.sizes:
            if (
                size != self.sizes[-1]
                and self.scratch(order[:1], size) * _SCRATCH_SHARE > self.wishes.budget_bytes
            ):
                continue
            taken = self.fill(order, size)
            if taken:
                return self.draft(_resident(self.model, taken), size)
        return None

    def all_cpu(self) -> Plan | None:
        placement = _all(self.model, "cpu", "the budget holds no unit")
        size = next((size for size in self.sizes if self.fits(placement, size)), None)
        return None if size is None else self.draft(placement, size)

    def scratch(self, units: Sequence[Unit], size: int) -> int:
        """What computing on the device takes beside weights and KV."""
        plan = self.ask(_resident(self.model, units), size)
        return plan.needed_bytes - plan.bytes_by_kind["weights"] - plan.bytes_by_kind["kv"]

    def fill(self, order: Sequence[Unit], size: int) -> list[Unit]:
        """The longest beginning of `order` that fits, then whatever else finds room behind it."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(_resident(self.model, order[:middle]), size):
                low = middle
            else:
                high = middle - 1
        taken = list(order[:low])
        if not taken:
            return []
        room = self.wishes.budget_bytes - self.needs(_resident(self.model, taken), size)
        more = [*taken]
        for unit in order[low:]:
            n_bytes = unit.n_bytes + unit.kv_bytes_per_tok * self.wishes.n_ctx * self.wishes.n_seq
            if n_bytes <= room:
                more.append(unit)
                room -= n_bytes
        # Rounding, or an op that only a later unit brings, can upset the sum: then the sure part has to do.
        return more if self.fits(_resident(self.model, more), size) else taken


def _all(model: Model, place: Place, why: str = "") -> Placement:
    units = dict.fromkeys((unit.name for unit in model.units), place)
    return _without_ring(Placement.everywhere(units, dict.fromkeys(units, why) if why else None))


def _resident(model: Model, resident: Iterable[Unit]) -> Placement:
    names = {unit.name for unit in resident}
    units: dict[str, Place] = {
        unit.name: "vram" if unit.name in names else "cpu" for unit in model.units
    }
    return _without_ring(Placement.everywhere(units))


def _without_ring(placement: Placement) -> Placement:
    return replace(placement, n_slots=0, slot_bytes=0)


def _by_value(units: Iterable[Unit]) -> list[Unit]:
    """Attention and routers first, for they bring the KV cache's traffic along and are needed by every token; then
    feed-forward layer by layer; the head; and last the token table, of which a pass reads a few rows."""
    rank = {"attn": 0, "router": 0, "ffn": 1, "expert": 1, "head": 2, "embed": 3}
    return sorted(
        units, key=lambda unit: (rank.get(unit.kind, 2), -1 if unit.layer is None else unit.layer)
    )

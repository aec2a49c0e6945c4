"""From a budget and a policy to a plan: sizes of passes, what the policy is told, how fast it will be, and the smallest
budget that would do.

The core says what a placement needs, to the byte; everything here asks it and computes no sizes of its own.

Not here: whether a plan is right (the core), where units go (sched_policies), how a plan is written down (plan.py).
Threads: pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import _core, sched_policies
from ._profile import default_profile
from ._simulator import Simulator
from .emu import EmuDevice
from .errors import BudgetError
from .model import Model
from .placement import TIERS, Place, Placement, Tier
from .plan import Plan
from .sched_policies.base import PolicyContext, Prediction, vram_share
from .sizes import format_bytes

__all__ = [
    "MAX_CHUNK_TOK",
    "N_GEN",
    "N_PROMPT",
    "Machine",
    "Wishes",
    "make_plan",
    "smallest_budget",
]

MAX_CHUNK_TOK = 4096
MAX_PASS_TOK = 16384
N_PROMPT, N_GEN = 1024, 128  # what a plan's own prediction is about
_USUAL_CHUNK_TOK = 2048  # that policies get unless they ask for more
# Tokens of one op: smaller ones need less scratch, larger ones bring what streams fewer times.
_SIZES = (MAX_CHUNK_TOK, _USUAL_CHUNK_TOK, 512, 128, 64)
_LOGIT_ROWS = 8
_SCRATCH_SHARE = 4  # ops shrink until scratch takes at most this part of the budget
_PASS_SHARE = 16  # passes grow until their hidden states take at most this part
_NO_LIMIT = (1 << 63) - 1
_CUDA_GRAPH_RESERVE_BYTES = 32 << 20
_CUDA_MAP_BYTES_PER_GIB = 2 << 20  # 8 bytes a page of 4 KiB, measured on an H200
_MORE_BYTES = 1 << 30  # what more budget would buy is said of so much


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan must know of the device: nothing that needs it open.

    graph_reserve_bytes: for what the driver keeps of recorded graphs. map_bytes_per_gib: of VRAM, for the driver's
    tables of each GiB of page-locked host memory; the core knows how much a plan locks."""

    accelerator: bool
    sm: int = 90
    graph_reserve_bytes: int = 0
    map_bytes_per_gib: int = 0

    @classmethod
    def of(cls, kind: str, sm: int = 0, emu: EmuDevice | None = None) -> Machine:
        """A device of this kind: "host", "cuda", or an emulated one, as described."""
        if kind == "host":
            return cls(accelerator=False)
        if kind == "emu":
            described = emu or EmuDevice()
            return cls(True, sm or 90, map_bytes_per_gib=described.map_bytes_per_gib)
        return cls(True, sm or 90, _CUDA_GRAPH_RESERVE_BYTES, _CUDA_MAP_BYTES_PER_GIB)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller asked for."""

    budget_bytes: int
    n_ctx: int
    n_seq: int
    kv: str


def make_plan(
    model: Model,
    machine: Machine,
    wishes: Wishes,
    *,
    policy: Any = "auto",
    simulator: Simulator | None = None,
    threads: int = 0,
    n_prompt: int = N_PROMPT,
    n_gen: int = N_GEN,
) -> tuple[Plan, _core.Plan]:
    """The policy's plan, and the same bound to the model. BudgetError where its placement does not fit, PlanError where
    it breaks a rule or the policy itself fails. On a device without memory of its own nobody is asked, and nothing is
    predicted without a simulator."""
    if not machine.accelerator:
        task = _Task(model, machine, wishes, simulator, threads)
        draft, core = task.host_plan()
        if simulator is None:
            return draft, core
        return replace(draft, predicted=task.predict(draft, core, n_prompt, n_gen)), core
    if simulator is None:
        kind = "cuda" if _core.cuda_status()[0] else "emu"
        simulator = Simulator(default_profile(kind), threads=threads)
    task = _Task(model, machine, wishes, simulator, threads)
    draft = task.ask_policy(policy)
    core = draft.bind(model)
    predicted = {"policy": sched_policies.name_of(policy)}
    predicted |= task.predict(draft, core, n_prompt, n_gen)
    return replace(draft, bytes=core.bytes_by_kind, predicted=predicted), core


def smallest_budget(model: Model, machine: Machine, wishes: Wishes) -> int:
    """Bytes of VRAM that the least demanding placement needs: policy "auto" succeeds with exactly as many."""
    return _Task(model, machine, wishes).smallest()


class _Task:
    """One question to the core after another, about one model, machine and wish."""

    def __init__(
        self,
        model: Model,
        machine: Machine,
        wishes: Wishes,
        simulator: Simulator | None = None,
        threads: int = 0,
    ) -> None:
        self.model = model
        self.machine = machine
        self.wishes = wishes
        self.simulator = simulator
        self.threads = threads
        # Every sequence can be part of one pass, and no op takes more tokens than a context has.
        self.most = max(wishes.n_ctx, wishes.n_seq)
        self.sizes = sorted(
            {max(wishes.n_seq, min(size, self.most)) for size in _SIZES}, reverse=True
        )
        self.usual = [size for size in self.sizes if size <= max(_USUAL_CHUNK_TOK, wishes.n_seq)]
        # Policies ask about the same placement again and again; it is kept, so that its id is not another's.
        self._bound: dict[tuple[int, int], tuple[Placement, _core.Plan]] = {}

    # ---- asking the core ----

    def draft(
        self, placement: Placement, size: int, tiers: Sequence[Tier] = TIERS, pass_tok: int = 0
    ) -> Plan:
        """A plan without its bytes. What the placement says of sizes goes first."""
        chunk = max(self.wishes.n_seq, min(placement.chunk_tok or size, self.most))
        whole = placement.pass_tok or pass_tok or self.pass_tok(chunk)
        return Plan(
            arch=self.model.arch,
            digest=self.model.digest,
            accelerator=self.machine.accelerator,
            sm=self.machine.sm,
            n_ctx=self.wishes.n_ctx,
            n_seq=self.wishes.n_seq,
            kv=self.wishes.kv,
            budget_bytes=self.wishes.budget_bytes,
            tiers=tuple(tiers),
            placement=replace(placement, chunk_tok=0, pass_tok=0),  # from here on the plan says it
            chunk_tok=chunk,
            pass_tok=max(chunk, min(whole, self.most)),
            logit_rows=max(_LOGIT_ROWS, min(self.wishes.n_seq, 256)),
            graph_reserve_bytes=self.machine.graph_reserve_bytes,
            map_bytes_per_gib=self.machine.map_bytes_per_gib,
        )

    def pass_tok(self, chunk: int) -> int:
        """The longer a pass, the fewer times streamed weights cross the bus for one prompt."""
        per_tok = 4 * int(self.model.hparams["n_embd"])
        room = self.wishes.budget_bytes // _PASS_SHARE
        n = chunk
        while n < min(self.most, MAX_PASS_TOK) and 2 * n * per_tok <= room:
            n *= 2
        return n

    def ask(self, draft: Plan) -> _core.Plan:
        """As if there were no budget."""
        return replace(draft, budget_bytes=_NO_LIMIT).bind(self.model)

    def bound(self, placement: Placement, size: int, tiers: Sequence[Tier]) -> _core.Plan:
        key = (id(placement), size)
        found = self._bound.get(key)
        if found is None:
            while len(self._bound) >= 8:
                self._bound.pop(next(iter(self._bound)))
            found = (placement, self.ask(self.draft(placement, size, tiers)))
            self._bound[key] = found
        return found[1]

    def smallest(self) -> int:
        size = self.sizes[-1]
        return self.ask(self.draft(self._all_cpu(), size, pass_tok=size)).needed_bytes

    def _all_cpu(self, why: str = "") -> Placement:
        names = [unit.name for unit in self.model.units]
        placement = Placement.everywhere(
            dict.fromkeys(names, "cpu"), dict.fromkeys(names, why) if why else None
        )
        return replace(placement, n_slots=0, slot_bytes=0)

    # ---- asking the policy ----

    def host_plan(self) -> tuple[Plan, _core.Plan]:
        size = self.usual[0]
        placement = self._all_cpu("the device has no memory of its own")
        draft = self.draft(placement, size, pass_tok=size)
        core = draft.bind(self.model)
        return replace(draft, bytes=core.bytes_by_kind), core

    def context(self, size: int, tiers: Sequence[Tier]) -> PolicyContext:
        wishes, simulator = self.wishes, self.simulator
        assert simulator is not None

        def simulate(placement: Placement, n_prompt: int) -> Prediction:
            return simulator.predict(
                self.model,
                self.bound(placement, size, tiers),
                n_ctx=wishes.n_ctx,
                n_seq=wishes.n_seq,
                n_prompt=n_prompt,
                n_gen=N_GEN,
            )

        def ask_pass(placement: Placement, n_tok: int) -> float:
            core = self.bound(placement, size, tiers)
            return simulator.run_pass(core, min(n_tok, core.sizes[1])).seconds

        return PolicyContext(
            units=self.model.units,
            tiers=tuple(tiers),
            budget_bytes=wishes.budget_bytes,
            n_ctx=wishes.n_ctx,
            n_seq=wishes.n_seq,
            threads=self.threads or _core.default_threads(simulator.device),
            profile=simulator.profile,
            cost=simulator.cost,
            sizes=tuple(self.sizes),
            size=size,
            ask_needs=lambda placement: self.bound(placement, size, tiers).needed_bytes,
            ask_simulate=simulate,
            ask_pass=ask_pass,
        )

    def ask_policy(self, policy: Any) -> Plan:
        """The policy's placement with the largest ops that it finds room for."""
        chosen = sched_policies.get(policy)
        own_tiers: Callable[[int, int], Sequence[Tier]] | None = getattr(chosen, "tiers", None)
        tiers = own_tiers(self.wishes.n_ctx, self.wishes.n_seq) if own_tiers else TIERS
        failure: BudgetError | None = None
        for size in self.useful_sizes():
            try:
                placement = sched_policies.decide(chosen, self.context(size, tiers))
            except BudgetError as error:
                failure = error
                continue
            draft = self.draft(placement, size, tiers)
            needed = self.bound(placement, size, tiers).needed_bytes
            if needed <= self.wishes.budget_bytes:
                return draft
            failure = BudgetError("", needed=needed)
        raise self.too_small(sched_policies.name_of(policy), failure)

    def useful_sizes(self) -> list[int]:
        """Of ops: those whose scratch leaves most of the budget to weights; the least always."""
        everything = Placement.everywhere(dict.fromkeys((u.name for u in self.model.units), "vram"))
        found = []
        for size in self.usual[:-1]:
            core = self.bound(everything, size, TIERS)
            kinds = core.bytes_by_kind
            scratch = core.needed_bytes - kinds["weights"] - kinds["kv"]
            fits = core.needed_bytes <= self.wishes.budget_bytes
            if fits or scratch * _SCRATCH_SHARE <= self.wishes.budget_bytes:
                found.append(size)
        return [*found, self.sizes[-1]]

    def too_small(self, policy: str, failure: BudgetError | None) -> BudgetError:
        wishes, smallest = self.wishes, self.smallest()
        needed = failure.needed if failure is not None and failure.needed else smallest
        what = (
            f"a budget of {format_bytes(wishes.budget_bytes)} of VRAM is too small for {self.model.name} with n_ctx "
            f"{wishes.n_ctx} and n_seq {wishes.n_seq}"
        )
        least = f"the smallest that works is {smallest} bytes ({format_bytes(smallest)})"
        if policy != "auto":
            what += f" under policy {policy}, which needs {format_bytes(needed)}"
            least = f'with policy "auto" {least}'
        return BudgetError(
            f"{what}; {least}", needed=needed, budget=wishes.budget_bytes, smallest=smallest
        )

    # ---- how fast it will be ----

    def predict(self, draft: Plan, core: _core.Plan, n_prompt: int, n_gen: int) -> dict[str, Any]:
        """As plain data, with what more budget would buy."""
        found = self._predict(draft, core, n_prompt, n_gen)
        data = {key: value for key, value in asdict(found).items() if key != "plan"}
        more = self._with_more(draft)
        if more is not None:
            richer = self._predict(more, self.ask(more), n_prompt, n_gen)
            data["more"] = {
                "bytes": _MORE_BYTES,
                "ttft_s": min(richer.ttft_s, found.ttft_s),
                "tps": max(richer.tps, found.tps),
            }
        return data

    def _predict(self, draft: Plan, core: _core.Plan, n_prompt: int, n_gen: int) -> Prediction:
        assert self.simulator is not None
        return self.simulator.predict(
            self.model,
            core,
            n_ctx=draft.n_ctx,
            n_seq=draft.n_seq,
            budget_bytes=draft.budget_bytes,
            n_prompt=n_prompt,
            n_gen=n_gen,
        )

    def _with_more(self, draft: Plan) -> Plan | None:
        """The same with the most valuable of what is not resident, as much as so many more bytes hold."""
        tables = list({id(units): units for units in draft.places.values()}.values())
        if not self.machine.accelerator:
            return None
        away = [
            unit
            for unit in self.model.units
            if all(vram_share(units[unit.name]) == 0.0 for units in tables)
        ]
        room, names = _MORE_BYTES, dict[str, Place]()
        for unit in sorted(away, key=lambda unit: (unit.kind == "embed", -unit.use)):
            n_bytes = unit.n_bytes + unit.kv_bytes_per_tok * draft.n_ctx * draft.n_seq
            if n_bytes <= room:
                names[unit.name] = "vram"
                room -= n_bytes
        if not names:
            return None
        changed = {id(units): {**units, **names} for units in tables}
        places = {tier: changed[id(units)] for tier, units in draft.places.items()}
        return replace(draft, placement=replace(draft.placement, places=places))

"""`simulate`: TTFT and TPS of a model on a machine that need not be there, under one budget or a list of them.

    for run in ps.simulate("model.gguf", vram=["4GiB", "6GiB"], profile="rtx4060-laptop-datasheet.json"):
        print(run.ttft_s, run.tps, run.source)

Weights are never read, so a file's header is enough; a device is opened only to measure this machine's GPU, once. A
figure is worth what its profile is: `source` says whether that was measured, comes from data sheets, or is nobody's.

Not here: durations (_simulator.py), placements (sched_policies). Threads: pure functions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal, cast

from . import _core, profiling
from ._profile import Profile
from ._simulator import Simulator, as_profile, machine_profile
from .cost import Fit, fit
from .emu import EmuDevice
from .errors import RequestError
from .generate import check_int
from .model import Model
from .plan import Plan
from .planner import Machine, Wishes, make_plan
from .sched_policies import Prediction
from .sizes import parse_size

__all__ = ["machine_of", "simulate"]

_MAX_CTX = 1 << 27

Size = int | str


def simulate(
    model: str | os.PathLike[str] | Model,
    *,
    vram: Size | Sequence[Size],
    profile: Profile | EmuDevice | str | os.PathLike[str] | Literal[False] | None = None,
    policy: Any = "auto",
    n_ctx: int = 4096,
    n_prompt: int = 1024,
    n_gen: int = 128,
    threads: int | None = None,
    n_seq: int = 1,
    kv: Literal["f16", "q8_0"] = "f16",
    cost: Fit = fit,
) -> Any:
    """What an engine with these arguments is predicted to take for a prompt of n_prompt tokens and n_gen behind it: a
    Prediction, or of a list of budgets a list of them.

    vram: of no account where the profile is of a machine without a GPU. profile: one, its file, or the name of one that
    comes with pipeshard; an EmuDevice stands for its clock; None: that of this machine's GPU, measured once, or
    where there is none of the emulated one; False: without measuring. cost: makes the cost model from the profile's
    samples and the number of threads."""
    budgets = _budgets(vram)
    opened = model if isinstance(model, Model) else Model(model)
    n_threads = 0 if threads is None else check_int("threads", threads, 1, 4096)
    known = _profile_of(profile, opened, threads)
    sizes = {
        "n_prompt": check_int("n_prompt", n_prompt, 1, _MAX_CTX),
        "n_gen": check_int("n_gen", n_gen, 1, _MAX_CTX),
    }
    n_ctx = check_int("n_ctx", n_ctx, 0, _MAX_CTX) or min(opened.n_ctx_train, _MAX_CTX)
    if n_prompt >= n_ctx:
        raise RequestError(
            f"a prompt of {n_prompt} tokens does not fit a context of {n_ctx}; give a larger n_ctx",
            argument="n_prompt",
        )
    simulator = Simulator(known, threads=n_threads, cost=cost)
    found = []
    for budget in budgets:
        wishes = Wishes(budget, n_ctx, check_int("n_seq", n_seq, 1, 4096), kv)
        plan, _ = make_plan(
            opened,
            machine_of(known, profile if isinstance(profile, EmuDevice) else None),
            wishes,
            policy=policy,
            simulator=simulator,
            threads=n_threads,
            **sizes,
        )
        found.append(_prediction(plan))
    return found[0] if isinstance(vram, (int, str)) else found


def machine_of(profile: Profile, emu: EmuDevice | None = None) -> Machine:
    """What plans must know of the machine that a profile is of."""
    kind, sm = profile.machine.get("device"), profile.machine.get("sm")
    return Machine.of(str(kind), sm if isinstance(sm, int) and sm > 0 else 0, emu)


def _profile_of(
    profile: Profile | EmuDevice | str | os.PathLike[str] | Literal[False] | None,
    model: Model,
    threads: int | None,
) -> Profile:
    """As an engine would find it on this machine."""
    if isinstance(profile, EmuDevice):
        return machine_profile("emu", profile)
    known = None if profile is False else as_profile(profile)
    if known is not None:
        return known
    if not _core.cuda_status()[0]:
        return machine_profile("emu")
    wish = profiling.automatic() if profile is None else False
    if isinstance(wish, Profile):
        return wish
    return profiling.profile(model, threads=threads) if wish else machine_profile("cuda")


def _budgets(vram: Size | Sequence[Size]) -> list[int]:
    many = [vram] if isinstance(vram, (int, str)) else list(vram)
    if not many:
        raise RequestError("vram: the list of budgets is empty", argument="vram")
    return [parse_size(size, argument="vram") for size in many]


def _prediction(plan: Plan) -> Prediction:
    """The plan's own, which was made for these sizes, with the plan."""
    values = cast(dict[str, Any], plan.predicted)
    known = {item.name for item in fields(Prediction)}
    return replace(Prediction(**{k: v for k, v in values.items() if k in known}), plan=plan)

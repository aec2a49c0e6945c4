"""`pipeshard plan`: what would be where under a budget, and how fast that would be. Needs no GPU and reads no weights;
by another machine's profile it says so of that machine.

Threads: none.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from ..errors import BudgetError
from ..generate import check_int
from ..model import Model
from ..plan import Plan
from ..planner import N_GEN, N_PROMPT, Machine, Wishes, smallest_budget
from ..sched_policies import Prediction
from ..simulate import simulate
from ..sizes import format_bytes, parse_size
from .common import DEFAULT_CTX, note, open_model, table

__all__ = ["add_parser"]

_MOST_ROWS = 7  # of a curve that nobody gave the budgets of


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="what would be where under a budget, and how fast",
        description="Predicts time to first token and tokens per second, with no GPU and no weights: a file's header "
        "is enough. Several budgets make a table.",
    )
    parser.add_argument("file", nargs="?", metavar="MODEL.gguf", help="default: the demo model")
    parser.add_argument("-m", "--model", metavar="FILE", help="the same")
    parser.add_argument(
        "--vram",
        action="append",
        default=[],
        metavar="SIZE",
        help="budget; may be repeated or a list (default: some up to all of the model)",
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="of the machine: a file, or a name such as rtx4060-laptop-datasheet.json (default: this machine's)",
    )
    parser.add_argument(
        "--no-profile", action="store_true", help="assume rates instead of measuring this machine"
    )
    parser.add_argument("--policy", default="auto", metavar="NAME", help='or "module:name"')
    parser.add_argument(
        "-c", "--ctx", type=int, default=DEFAULT_CTX, metavar="N", help="0: the model's own"
    )
    parser.add_argument("-p", "--prompt", type=int, metavar="N", help=f"default: {N_PROMPT}")
    parser.add_argument("-n", "--gen", type=int, default=N_GEN, metavar="N")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="of the CPU")
    parser.add_argument("--kv", default="f16", choices=("f16", "q8_0"))
    parser.add_argument("--explain", action="store_true", help="what is where and why, of each")
    parser.add_argument("--json", action="store_true", help="one object a budget, one a line")
    parser.add_argument("-o", "--out", metavar="FILE", help="save the plan, for Engine(plan=FILE)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    path = options.file if options.file is not None else options.model
    asked = [parse_size(text, argument="vram") for part in options.vram for text in part.split(",")]
    model = open_model(None) if path is None else Model(path)
    n_ctx = check_int("ctx", options.ctx, 0, 1 << 27) or model.n_ctx_train
    n_prompt = min(N_PROMPT, n_ctx - 1) if options.prompt is None else options.prompt
    rows: list[tuple[int, Prediction | BudgetError]] = []
    for budget in asked or _curve(model, n_ctx, options.kv):
        try:
            found = simulate(
                model,
                vram=budget,
                profile=False if options.no_profile else options.profile,
                policy=options.policy,
                n_ctx=n_ctx,
                n_prompt=n_prompt,
                n_gen=options.gen,
                threads=options.threads,
                kv=options.kv,
            )
        except BudgetError as error:
            if len(asked) == 1:
                raise
            found = error
        rows.append((budget, found))
        if isinstance(found, Prediction) and not found.plan.accelerator:
            break  # without a GPU budgets make no difference
    if options.out is not None:
        _save(rows, options.out)
    for line in _json(rows) if options.json else _text(model, rows, options.explain):
        print(line)
    return 0


def _curve(model: Model, n_ctx: int, kv: str) -> list[int]:
    """From what is next to nothing to all of the model, each twice the last."""
    wishes = Wishes(budget_bytes=0, n_ctx=n_ctx, n_seq=1, kv=kv)
    least = max(smallest_budget(model, Machine(accelerator=True), wishes), model.n_bytes // 32)
    last = math.ceil(math.log2(model.n_bytes * 1.1))
    first = max(last - _MOST_ROWS + 1, math.ceil(math.log2(least)))
    return [1 << i for i in range(first, last + 1)]


def _save(rows: list[tuple[int, Prediction | BudgetError]], path: str) -> None:
    plans = [found.plan for _, found in rows if isinstance(found, Prediction)]
    if len(plans) > 1:
        note(f"several budgets; {path} is the plan of the last")
    if plans:
        plan: Plan = plans[-1]
        plan.save(path)


# ---- output ----


def _json(rows: list[tuple[int, Prediction | BudgetError]]) -> list[str]:
    lines = []
    for budget, found in rows:
        data: dict[str, Any] = {"vram_bytes": budget}
        if isinstance(found, Prediction):
            data |= dict(found.plan.predicted) | {
                "bytes": dict(found.plan.bytes),
                "needed_bytes": found.plan.needed_bytes,
            }
        else:
            data |= {"error": str(found), "smallest": found.smallest}
        lines.append(json.dumps(data))
    return lines


def _text(
    model: Model, rows: list[tuple[int, Prediction | BudgetError]], explain: bool
) -> list[str]:
    found = [run for _, run in rows if isinstance(run, Prediction)]
    if explain or len(rows) == 1:
        return "\n\n".join(run.plan.explain() for run in found).splitlines()
    cells = [("budget", "in VRAM", "TTFT ms", "from-to", "at best", "TPS", "from-to", "at best")]
    for budget, run in rows:
        if isinstance(run, BudgetError):
            least = f"needs {format_bytes(run.needed)}"
            cells.append((format_bytes(budget), least, "-", "-", "-", "-", "-", "-"))
            continue
        weights = run.plan.bytes["weights"]
        cells.append(
            (
                format_bytes(budget),
                f"{weights / model.n_bytes:.0%} of weights",
                f"{run.ttft_s * 1e3:.1f}",
                f"{run.ttft_lo * 1e3:.1f}-{run.ttft_hi * 1e3:.1f}",
                f"{run.bound_ttft_s * 1e3:.1f}",
                f"{run.tps:.1f}",
                f"{run.tps_lo:.1f}-{run.tps_hi:.1f}",
                f"{run.bound_tps:.1f}",
            )
        )
    head = [f"{model.name}: {model.arch}, {format_bytes(model.n_bytes)}"]
    if found:
        run = found[0]
        head.append(
            f"predicted for a prompt of {run.n_prompt} tokens and {run.n_gen} behind it, by the profile of "
            f"{run.profile}"
        )
        if run.source != "measured":
            what = "come from data sheets" if run.source == "datasheet" else "are assumed"
            head.append(f"its figures {what}; nobody measured them")
    return [*head, *table(cells, right=range(8))]

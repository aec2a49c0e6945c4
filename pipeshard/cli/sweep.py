"""`pipeshard sweep`: TTFT and TPS of models over budgets, prompt lengths and policies.

Not here: measuring and keeping rows (sweep.py). Threads: none.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys

from .. import sched_policies
from .._sweep_rows import COLUMNS, Sweep
from ..demo import NOTICE, demo_model_path
from ..errors import RequestError
from ..sweep import sweep
from .common import note, read_numbers

__all__ = ["add_parser"]

_NOTES = {"emulated": "device: an emulated GPU, computed by the CPU; its times are simulated"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="TTFT and TPS over budgets and policies",
        description="Times every combination of models, budgets, prompt lengths, policies and threads: medians of time "
        "to first token and of tokens per second, with random tokens. On an emulated GPU the seconds are simulated. "
        "A combination that fails is a row that says why.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL.gguf", help="GGUF files (default: the demo model)"
    )
    parser.add_argument(
        "--vram", metavar="SIZE,...", help="budgets, such as 2GiB,4GiB (default: what is free)"
    )
    parser.add_argument(
        "-p",
        "--prompt",
        "--ctx",
        default="1024",
        metavar="N,...",
        help="prompt lengths in tokens (default: 1024)",
    )
    parser.add_argument(
        "--policy",
        default="auto",
        metavar="NAME,...",
        help="names, module:name or file.py:name; all: every one there is (default: auto)",
    )
    parser.add_argument("-t", "--threads", metavar="N,...", help="of the CPU (default: all)")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="KIND",
        help="auto, host, emu, cuda or cuda:N; simulate: predict only",
    )
    parser.add_argument(
        "--profile", metavar="FILE", help="of the machine that is predicted (default: this one)"
    )
    parser.add_argument(
        "-n",
        "--gen",
        type=int,
        default=128,
        metavar="N",
        help="tokens behind a prompt (default: 128)",
    )
    parser.add_argument(
        "-r", "--repeats", type=int, default=5, metavar="N", help="of each cell (default: 5)"
    )
    parser.add_argument(
        "--cell-s",
        type=float,
        default=60.0,
        metavar="S",
        help="most seconds that a cell's runs may take (default: 60)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tokens")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that emulated cells are shared among"
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="rows as they come, .csv or .jsonl; resumes from it"
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture, such as sweep.png")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, not a table")
    form.add_argument("--csv", action="store_true", help="print CSV, not a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    rows = sweep(
        options.models or [_demo()],
        [None] if options.vram is None else _budgets(options.vram),
        read_numbers("prompt", options.prompt),
        _policies(options.policy),
        [None] if options.threads is None else read_numbers("threads", options.threads),
        device=options.device,
        profile=options.profile,
        n_gen=options.gen,
        repeats=options.repeats,
        out=options.out,
        executor=options.jobs,
        cell_s=options.cell_s,
        seed=options.seed,
    )
    _print(rows, options)
    n_failed = sum(row["error"] is not None for row in rows)
    if options.plot is not None and n_failed < len(rows):
        rows.plot(options.plot)
    for source in sorted({row["source"] for row in rows} - {"measured"}):
        note(_NOTES.get(source, f"nothing ran: all times are {source}"))
    return 1 if n_failed == len(rows) else 0


def _demo() -> str:
    found = demo_model_path()
    note(f"model: {found.name}; {NOTICE}")
    return str(found)


def _budgets(text: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in text.split(",")]


def _policies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RequestError(f"policy: expected names, not {text!r}", argument="policy")
    return sched_policies.names() if names == ["all"] else names


def _print(rows: Sweep, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(list(rows), indent=1))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(rows)

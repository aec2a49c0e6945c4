"""`pipeshard profile`: measures this machine for a model, keeps the profile and prints what it says.

Threads: none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence

from .._profile import Profile, Sample
from ..profiling import profile, profile_path
from ..sizes import format_bytes
from .common import note, open_model, table

__all__ = ["add_parser"]

_BUS = (("h2d", "copy", "to the GPU"), ("d2h", "copy", "from the GPU"))
_READS = ("gather", "attn", "moe_up", "moe_down")  # what the GPU reads host memory with
_BESIDE = {
    "h2d": "copies to the GPU",
    "d2h": "copies from the GPU",
    "cpu": "the CPU",
    "gather": "gathers",
}
_MANY_TOK = 32  # from so many tokens on, ops are bound by arithmetic


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="measure this machine for a model",
        description="Times a model's ops, copies and hand-offs on this machine, in a quarter of a minute at most, and "
        "keeps the result, which plans are then made with. Reads no weights.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="MODEL.gguf",
        help="default: the demo model; of several, one profile for models like any of them",
    )
    parser.add_argument("-m", "--model", metavar="FILE", help="the same")
    parser.add_argument(
        "--device", default="auto", metavar="KIND", help="auto, host, emu, cuda or cuda:N"
    )
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="of the CPU (default: all)")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="also write it there, to take to another machine"
    )
    parser.add_argument("--force", action="store_true", help="measure again what is known already")
    parser.add_argument("--json", action="store_true", help="the profile itself, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    models = [open_model(file) for file in options.files or [options.model]]
    found = Profile.joined(
        [
            profile(model, device=options.device, threads=options.threads, force=options.force)
            for model in models
        ]
    )
    if options.out is not None:
        found.save(options.out)
    if options.json:
        print(json.dumps(found.to_dict()))
        return 0
    for line in _text(found):
        print(line)
    kept = [str(profile_path(model, dict(found.machine))) for model in models]
    note(f"kept in {', '.join(kept) if options.out is None else options.out}")
    return 0


# ---- text ----


def _text(found: Profile) -> list[str]:
    machine, samples = found.machine, found.samples
    cpu = f"{machine['cpu']} ({machine['cpu_variant']}, {machine['threads']} threads)"
    lines = [f"{machine['gpu']}; {cpu}" if "gpu" in machine else cpu]
    lines += [f"shapes of {found.model}, {len(samples)} samples", ""]
    bus = _bus_rows(samples)
    if len(bus) > 1:
        lines += [*table(bus, right=range(1, len(bus[0]))), ""]
    lines += [*table(_op_rows(samples), right=range(2, 9)), ""]
    beside = _beside_rows(samples)
    if len(beside) > 1:
        lines += [*table(beside, right=(3, 4, 5)), ""]
    fixed = [s for s in samples if s.side == "fixed" and s.load == "idle"]
    lines.append("  ".join(f"{s.op} {_time(s.seconds)}" for s in fixed))
    reads = [_gb_s(s) for s in samples if s.side == "disk"]
    disk = f"{_number(max(reads))} GB/s" if reads else "not known"
    lines.append(f"reads of the model's file, past the page cache: {disk}")
    if any(s.extrapolated for s in samples):
        lines.append("~: parts of these ops ran, and the rest was extrapolated")
    return lines


def _bus_rows(samples: Sequence[Sample]) -> list[list[str]]:
    copies = [s for s in samples if s.side in ("h2d", "d2h") and s.load == "idle"]
    sizes = sorted({s.bytes for s in copies if s.op == "copy"})
    rows = [["GB/s", *map(format_bytes, sizes)]]
    for side, op, name in _BUS:
        mine = [s for s in copies if (s.side, s.op) == (side, op)]
        if mine:
            by_size = {s.bytes: _number(_gb_s(s)) for s in mine}
            rows.append([name, *(by_size.get(size, "") for size in sizes)])
    for op in _READS:
        rates = [_gb_s(s) for s in copies if (s.side, s.op) == ("h2d", op)]
        if rates:
            rows.append([op, *[""] * (len(sizes) - 1), _number(max(rates))])
    return rows


def _op_rows(samples: Sequence[Sample]) -> list[list[str]]:
    """Ops by format and tokens; of several shapes together, what they move or compute a second."""
    ops = [s for s in samples if s.side in ("gpu", "cpu") and s.load == "idle"]
    columns = [("gpu", 0)] if any(s.side == "gpu" for s in ops) else []
    columns += [
        ("cpu", n) for n in sorted({s.threads for s in ops if s.side == "cpu"}, reverse=True)
    ]
    heads = ["GPU" if side == "gpu" else f"CPU x {n}" for side, n in columns]
    rows = [["op", "format", "tokens", *heads, "of"]]
    keys = {(s.op, s.fmt or "-", s.n_tok) for s in ops if s.fmt is not None}
    for op, fmt, n_tok in sorted(keys):
        unit = "GFLOP/s" if n_tok >= _MANY_TOK and op != "embed" else "GB/s"
        cells = [
            _rate(
                [
                    s
                    for s in ops
                    if (s.op, s.fmt, s.n_tok, s.side, s.threads) == (op, fmt, n_tok, *column)
                ],
                unit,
            )
            for column in columns
        ]
        rows.append([op, fmt, str(n_tok), *cells, unit])
    return rows


def _beside_rows(samples: Sequence[Sample]) -> list[list[str]]:
    rows = [["", "op", "while busy", "alone", "beside", "slower"]]
    for i, s in enumerate(samples):
        alone = [o for o in samples[:i] if o.load == "idle" and _same_work(o, s)][-1:]
        if s.load == "idle" or not alone or s.seconds == 0 or alone[0].seconds == 0:
            continue
        who = f"CPU x {s.threads}" if s.side == "cpu" else {"gpu": "GPU"}.get(s.side, s.side)
        with_ = f"{_BESIDE[s.load]} x {s.threads}" if s.load == "cpu" else _BESIDE[s.load]
        what = f"{s.op} {s.n_tok} tok" if s.n_tok else s.op
        times = (_time(alone[0].seconds), _time(s.seconds))
        rows.append([who, what, with_, *times, f"{s.seconds / alone[0].seconds:.2f}x"])
    return rows


def _same_work(idle: Sample, other: Sample) -> bool:
    threads = other.threads if other.side == "cpu" else 0
    key = (idle.side, idle.op, idle.fmt, idle.n_tok, idle.flops, idle.bytes, idle.threads)
    return key == (other.side, other.op, other.fmt, other.n_tok, other.flops, other.bytes, threads)


def _rate(samples: Iterable[Sample], unit: str) -> str:
    mine = list(samples)
    seconds = sum(s.seconds for s in mine)
    if not mine or seconds <= 0:
        return "-"
    work = sum(s.flops if unit == "GFLOP/s" else s.bytes for s in mine)
    mark = "~" if any(s.extrapolated for s in mine) else ""
    return mark + _number(work / seconds / 1e9)


def _gb_s(sample: Sample) -> float:
    return sample.bytes / sample.seconds / 1e9 if sample.seconds > 0 else 0.0


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"

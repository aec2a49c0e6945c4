"""What commands share: options of engines, the model that is meant, sizes and times for people, tables.

Not here: what any command does. Threads: none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..demo import NOTICE, demo_model_path
from ..engine import Engine
from ..errors import RequestError
from ..model import Model
from ..placement import Place, Split
from ..sizes import format_bytes

__all__ = [
    "DEMO_VRAM",
    "add_engine_options",
    "add_sampling_options",
    "add_trace_option",
    "note",
    "open_engine",
    "open_model",
    "plan_lines",
    "save_trace",
    "take_file",
]

# Less than the demo model's 241 MiB: part of it stays on the CPU, which is what this program is about.
DEMO_VRAM = "128MiB"
DEMO_CTX = 2048
DEFAULT_CTX = 4096
_MOST_OPS = 8  # of those that took longest, after --trace


def note(text: str) -> None:
    """For the person at the terminal, never part of the output."""
    print(text, file=sys.stderr, flush=True)


# ---- options ----


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "-m", "--model", metavar="FILE", help="a GGUF file (default: the demo model)"
    )
    group.add_argument(
        "--device", default="auto", metavar="KIND", help="auto, host, emu, cuda or cuda:N"
    )
    group.add_argument(
        "--vram",
        metavar="SIZE",
        help=f"budget of VRAM, such as 4GiB (default: what is free; {DEMO_VRAM} for the demo model)",
    )
    group.add_argument(
        "-c",
        "--ctx",
        type=int,
        metavar="N",
        help=f"context in tokens, 0: the model's own (default: {DEFAULT_CTX})",
    )
    group.add_argument("-t", "--threads", type=int, metavar="N", help="of the CPU (default: all)")
    group.add_argument("--kv", default="f16", help="format of the KV cache: f16 or q8_0")
    group.add_argument(
        "--profile", metavar="FILE", help="of this machine (default: measured once, on a GPU)"
    )
    group.add_argument(
        "--no-profile",
        dest="profile",
        action="store_const",
        const=False,
        help="plan without measuring",
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling")
    until = "until the model ends or the context is full" if max_tokens is None else max_tokens
    group.add_argument(
        "-n", "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {until}"
    )
    group.add_argument("--temp", type=float, default=0.8, metavar="T", help="0: greedy")
    group.add_argument("--top-k", type=int, default=40, metavar="N")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P")
    group.add_argument("--min-p", type=float, default=0.05, metavar="P")
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="default: another one each time")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="may be repeated"
    )


def add_trace_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what ran when, for ui.perfetto.dev, and say what held it up; costs a little time",
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """As Engine.generate takes them."""
    return {
        "max_tokens": options.max_tokens,
        "temperature": options.temp,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repeat_penalty": options.repeat_penalty,
        "seed": options.seed,
        "stop": options.stop,
    }


# ---- engines ----


def open_model(path: str | None) -> Model:
    """The named model, or the demo model with what its licence asks us to say."""
    if path is not None:
        return Model(path)
    found = demo_model_path()
    note(f"model: {found.name}; {NOTICE}")
    return Model(found)


def take_file(options: argparse.Namespace) -> None:
    """A file given by place means the same as --model."""
    if options.file is None:
        return
    if options.model is not None:
        raise RequestError("the model is given twice", argument="MODEL")
    options.model = options.file


def open_engine(options: argparse.Namespace) -> Engine:
    is_demo = options.model is None
    model = open_model(options.model)
    vram, n_ctx = options.vram, options.ctx
    if is_demo and vram is None and options.device != "host":
        vram = DEMO_VRAM
    if n_ctx is None:
        n_ctx = DEMO_CTX if is_demo else DEFAULT_CTX
    if vram is not None and vram.isdigit():
        vram = int(vram)
    engine = Engine(
        model,
        device=options.device,
        vram=vram,
        n_ctx=n_ctx,
        threads=options.threads,
        kv=options.kv,
        profile=options.profile,
        trace=getattr(options, "trace", None) is not None,
    )
    if engine.device == "emu":
        note("device: an emulated GPU, computed by the CPU; its times are simulated")
    return engine


def save_trace(engine: Engine, path: str | None) -> None:
    """Where --trace asked for it: the file, and for the person what held the passes up."""
    if path is None:
        return
    beside = engine.explain_run()
    trace = engine.trace(path)
    note(f"trace: {len(trace.passes)} passes in {path}; open it at https://ui.perfetto.dev")
    last_run = trace.last_run()
    for attribution in trace.attribute(last_run).values():
        note(str(attribution))
    lines = [("stream", "op", "times", "ms", "GB/s", "GFLOP/s")]
    for row in trace.ops(last_run)[:_MOST_OPS]:
        rates = row["bytes_per_s"] * 1e-9, row["flops_per_s"] * 1e-9
        numbers = f"{row['n']} {row['seconds'] * 1e3:.3f} {rates[0]:.1f} {rates[1]:.1f}"
        lines.append((row["stream"], row["op"], *numbers.split()))
    for text in table(lines, right=(2, 3, 4, 5)):
        note(f"  {text}")
    if beside:
        note(beside)


def plan_lines(engine: Engine) -> list[str]:
    """The plan in a few lines, where a device has memory of its own and not all of the model is in it."""
    plan, units = engine.plan, engine.model.units
    if engine.device == "host":
        return []
    lines: dict[str, list[str]] = {}  # what is where, to the tiers that it holds for
    for tier in plan.tiers:
        n_bytes: dict[str, float] = {}
        for unit in units:
            for place, share in _shares(plan.places[tier.name][unit.name]):
                n_bytes[place] = n_bytes.get(place, 0.0) + share * unit.n_bytes
        total = sum(n_bytes.values())
        if n_bytes.get("vram") == total:
            continue
        text = ", ".join(
            f"{format_bytes(int(n_bytes[place]))} {words}"
            for place, words in _PLACE_WORDS.items()
            if n_bytes.get(place, 0.0) >= 1
        )
        lines.setdefault(text, []).append(tier.name)
    kinds = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in plan.bytes.items() if n >> 20)
    shown = [f"plan for {', '.join(tiers)}: {text}" for text, tiers in lines.items()]
    return [*shown, f"VRAM: {kinds} (all of it: pipeshard plan --explain)"] if shown else []


_PLACE_WORDS = {"vram": "in VRAM", "stream": "stream to the GPU", "cpu": "on the CPU"}


def _shares(place: Place) -> list[tuple[str, float]]:
    if not isinstance(place, Split):
        return [(place, 1.0)]
    rest = max(0.0, 1.0 - place.vram - place.stream)
    return [("vram", place.vram), ("stream", place.stream), ("cpu", rest)]


def summary(engine: Engine) -> str:
    """One line about the last run."""
    stats = engine.stats
    parts = []
    if stats["ttft_s"] is not None:
        predicted = _beside(stats["ttft_s"], stats["predicted_ttft_s"], "{:.3f} s")
        parts.append(f"TTFT {stats['ttft_s']:.3f} s{predicted}")
    if stats["tps"] is None:
        parts.append("TPS -")
    else:
        predicted = _beside(stats["tps"], stats["predicted_tps"], "{:.1f}")
        parts.append(f"TPS {stats['tps']:.1f} tokens/s{predicted}")
    if engine.device == "host":
        parts.append(f"host memory {format_bytes(stats['ram_bytes'])}, no VRAM used")
    else:
        parts.append(f"peak VRAM {stats['peak_bytes']} bytes ({format_bytes(stats['peak_bytes'])})")
        parts.append(
            f"budget {stats['budget_bytes']} bytes ({format_bytes(stats['budget_bytes'])})"
        )
    if engine.device == "emu":
        parts.append(f"emulated GPU: times are simulated, {stats['wall_s'] or 0:.2f} s passed")
    return "; ".join(parts)


def _beside(measured: float, predicted: float | None, form: str) -> str:
    if not predicted:
        return ""
    return f" (predicted {form.format(predicted)}, {measured / predicted - 1:+.0%})"


# ---- text ----


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns; those in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def read_numbers(argument: str, text: str) -> list[int]:
    """ "512,1024" -> [512, 1024]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if any(n < 0 for n in numbers):
        raise RequestError(
            f"{argument}: expected numbers such as 512 or 512,1024, not {text!r}", argument=argument
        )
    return numbers

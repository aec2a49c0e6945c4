"""`pipeshard bench`: tokens per second of prompts (ppN) and of decoding (tgN), with random tokens in both, so that
experts are used as evenly as the model allows.

Not here: comparing programs. Threads: none.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from typing import Any

from .._progress import Bar
from .._version import __version__
from ..engine import Engine
from ..errors import RequestError
from ..generate import check_int
from ..measure import Meter
from ..sizes import format_bytes
from .common import (
    add_engine_options,
    add_trace_option,
    open_engine,
    read_numbers,
    save_trace,
    table,
    take_file,
)

__all__ = ["add_parser"]

_COLUMNS = (
    "model",
    "arch",
    "model_bytes",
    "device",
    "vram_bytes",
    "threads",
    "cpu_variant",
    "kv",
    "test",
    "repeats",
    "tps",
    "tps_min",
    "tps_max",
    "seconds",
    "peak_bytes",
    "version",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="tokens per second of prompts and of decoding",
        description="Medians of tokens per second: ppN reads a prompt of N tokens, tgN generates N. "
        "On an emulated GPU the seconds are simulated.",
    )
    parser.add_argument("file", nargs="?", metavar="MODEL.gguf", help="the same as --model")
    add_engine_options(parser)
    parser.add_argument(
        "-p", "--prompt", default="512", metavar="N,N,...", help="prompt lengths (default: 512)"
    )
    parser.add_argument(
        "-n", "--gen", default="128", metavar="N,N,...", help="tokens to generate (default: 128)"
    )
    parser.add_argument(
        "-d",
        "--depth",
        type=int,
        default=0,
        metavar="N",
        help="tokens before, for tgN (default: 0)",
    )
    parser.add_argument(
        "-r", "--repeats", type=int, default=5, metavar="N", help="of each test (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tokens")
    add_trace_option(parser)
    parser.add_argument("-o", "--output", default="table", choices=("table", "csv", "json"))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    take_file(options)
    check_int("repeats", options.repeats, 1)
    check_int("depth", options.depth, 0)
    tests = [("pp", n) for n in read_numbers("prompt", options.prompt) if n]
    tests += [("tg", n) for n in read_numbers("gen", options.gen) if n]
    if not tests:
        raise RequestError("nothing to measure", argument="prompt")
    if options.ctx is None:
        options.ctx = max(n + (options.depth if kind == "tg" else 0) for kind, n in tests)
        options.ctx = max(64, options.ctx)
    with open_engine(options) as engine:
        bench = _Bench(engine, options)
        rows = [bench.row(kind, n) for kind, n in tests]
        save_trace(engine, options.trace)
    _print(rows, options.output, engine)
    return 0


class _Bench:
    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self._engine = engine
        self._meter = Meter(engine, options.seed)
        self._depth: int = options.depth
        self._repeats: int = options.repeats
        self._threads: int | None = options.threads

    def row(self, kind: str, n: int) -> dict[str, Any]:
        engine = self._engine
        need = n + (self._depth if kind == "tg" else 0)
        if need > engine.n_ctx:
            raise RequestError(
                f"{kind}{n} needs a context of {need} tokens, not {engine.n_ctx}", argument="ctx"
            )
        seconds = []
        with Bar(f"{kind}{n}", "run") as bar:
            for i in range(self._repeats + 1):  # the first warms up
                seconds.append(
                    self._meter.prompt(n) if kind == "pp" else self._meter.decode(n, self._depth)
                )
                bar.to(i + 1, self._repeats + 1)
        rates = [n / s for s in seconds[1:]]
        stats = engine.stats
        return {
            "model": engine.model.name,
            "arch": engine.model.arch,
            "model_bytes": engine.model.n_bytes,
            "device": engine.device_info["name"],
            "vram_bytes": stats["budget_bytes"],
            "threads": self._threads,
            "cpu_variant": engine.device_info["cpu_variant"],
            "kv": engine.plan.kv,
            "test": f"{kind}{n}" + (f" @ {self._depth}" if kind == "tg" and self._depth else ""),
            "repeats": self._repeats,
            "tps": statistics.median(rates),
            "tps_min": min(rates),
            "tps_max": max(rates),
            "seconds": statistics.median(seconds[1:]),
            "peak_bytes": stats["peak_bytes"],
            "version": __version__,
        }


def _print(rows: list[dict[str, Any]], form: str, engine: Engine) -> None:
    if form == "json":
        print(json.dumps(rows, indent=1))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        lines = [("model", "size", "device", "CPU kernels", "test", "tokens/s", "min", "max")]
        lines += [
            (
                row["model"],
                format_bytes(row["model_bytes"]),
                row["device"],
                row["cpu_variant"],
                row["test"],
                f"{row['tps']:.2f}",
                f"{row['tps_min']:.2f}",
                f"{row['tps_max']:.2f}",
            )
            for row in rows
        ]
        print("\n".join(table(lines, right=(1, 5, 6, 7))))

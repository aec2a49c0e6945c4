"""CPU speed beside llama.cpp's and beside what memory gives, in one run: decoding and a 512-token prompt of one file.

    pipeshard synth Llama-3.2-1B l1.gguf --type q4_0
    python benchmarks/cpu_compare.py l1.gguf --llama-python OTHER_VENV/bin/python --threads 2

OTHER_VENV is an environment with llama-cpp-python (`pip install llama-cpp-python` compiles llama.cpp for this CPU). The
two programs take turns, each in a process of its own, on random tokens; medians over all rounds, with the extremes.
Memory: the best of a few ways in which NumPy reads 1 GiB with the same number of threads, before every round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOK, DECODE_TOK, REPEATS = 512, 32, 3


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU decode and prefill, pipeshard and llama.cpp")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--no-repack", action="store_true", help="llama.cpp without its repacked weights"
    )
    parser.add_argument("--side", choices=("pipeshard", "llama"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        measure = measure_pipeshard if options.side == "pipeshard" else measure_llama
        print(json.dumps(measure(options)))
        return 0
    compare(options)
    return 0


def compare(options: argparse.Namespace) -> None:
    pythons = {"pipeshard": sys.executable}
    if options.llama_python is not None:
        pythons["llama"] = options.llama_python
    memory: list[float] = []
    results: dict[str, dict[str, list[float]]] = {side: {} for side in pythons}
    for _ in range(options.rounds):
        memory.append(read_bandwidth(options.threads))
        for side, python in pythons.items():
            for name, seconds in run_side(side, python, options).items():
                results[side].setdefault(name, []).extend(seconds)
    n_bytes = os.path.getsize(options.model)
    print(
        f"{platform.processor() or cpu_name()}, {options.threads} threads, {options.model}, {n_bytes} bytes"
    )
    print(f"memory read: {statistics.median(memory) / 1e9:.1f} GB/s ({spread(memory, 1e-9)})")
    for side, tests in results.items():
        for name, seconds in tests.items():
            n_tok = PROMPT_TOK if name == "prefill" else 1
            rates = [n_tok / s for s in seconds]
            line = f"{side:<10} {name:<8} {statistics.median(rates):8.2f} tok/s ({spread(rates)})"
            if name == "decode":
                share = statistics.median(rates) * n_bytes / statistics.median(memory)
                line += f"  {share:.0%} of memory"
            print(line)
    if "llama" in results:
        for name in ("decode", "prefill"):
            ours, theirs = (statistics.median(results[side][name]) for side in pythons)
            print(f"{name}: {theirs / ours:.2f}x llama.cpp")


def run_side(side: str, python: str, options: argparse.Namespace) -> dict[str, list[float]]:
    command = [python, __file__, options.model, "--side", side, "--threads", str(options.threads)]
    if options.no_repack:
        command.append("--no-repack")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{side} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def time_both(
    n_vocab: int, begin: Callable[[], None], feed: Callable[[list[int]], None]
) -> dict[str, list[float]]:
    """Seconds of a prompt, and of single tokens behind it; the first round warms up."""
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    for repeat in range(REPEATS + 1):
        begin()
        prompt = random.integers(0, n_vocab, PROMPT_TOK).tolist()
        start = time.perf_counter()
        feed(prompt)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for token in random.integers(0, n_vocab, DECODE_TOK).tolist():
            feed([token])
        if repeat > 0:
            seconds["prefill"].append(prefill)
            seconds["decode"].append((time.perf_counter() - start) / DECODE_TOK)
    return seconds


def measure_pipeshard(options: argparse.Namespace) -> dict[str, list[float]]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import pipeshard as ps

    with (
        ps.Engine(options.model, device="host", n_ctx=1024, threads=options.threads) as engine,
        engine._calling() as core,
    ):
        return time_both(
            engine.n_vocab,
            lambda: core.truncate(0, 0),
            lambda tokens: core.append(0, np.array(tokens, np.int32)),
        )


def measure_llama(options: argparse.Namespace) -> dict[str, list[float]]:
    import llama_cpp

    if options.no_repack:
        defaults = llama_cpp.llama_model_default_params

        def without_repack() -> Any:
            params = defaults()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_cpp.llama_model_default_params = without_repack
        llama_cpp.llama_model_default_params = without_repack
    llm = llama_cpp.Llama(
        options.model, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=options.threads,
        n_threads_batch=options.threads, verbose=False,
    )  # fmt: skip
    return time_both(llm.n_vocab(), llm.reset, llm.eval)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this many threads read; every way of reading gets three tries."""
    part = (1 << 30) // threads // 8
    arrays = [np.ones(part, np.float64) for _ in range(threads)]
    best = 0.0
    ways: list[Callable[[Any], Any]] = [
        np.sum,
        np.max,
        lambda a: np.dot(a[: part // 2], a[part // 2 : part // 2 * 2]),
    ]
    for way in ways * 3:
        workers = [threading.Thread(target=way, args=(array,)) for array in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, part * 8 * threads / (time.perf_counter() - start))
    return best


def spread(values: list[float], scale: float = 1.0) -> str:
    return f"{min(values) * scale:.1f} to {max(values) * scale:.1f}, {len(values)} runs"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU"
    )


if __name__ == "__main__":
    raise SystemExit(main())

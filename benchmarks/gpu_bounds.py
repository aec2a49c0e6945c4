"""How near prompts come to what the bus and the GPU allow, and whether the GPU's memory stays within the budget, as the
driver counts it.

    python benchmarks/gpu_bounds.py [--budget 2GiB] [--prompts 1024,4096,16384] MODEL.gguf

Of every prompt length: seconds with all weights resident (the compute time), seconds under the budget, and the bound,
max(bytes of the weights outside VRAM / 55.5 GB/s, compute time). By a trace of one more run: how busy the copy engine
and the GPU were. Meanwhile NVML is asked every few milliseconds how much of the GPU's memory is in use by anybody;
the table has the most of it, less what was in use before and the engine's baseline, less the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pipeshard as ps
from pipeshard.measure import Meter
from pipeshard.sizes import parse_size

BUS_BYTES_PER_S = 55.5e9  # page-locked memory to an H200, measured in large copies
SAMPLE_S = 0.004


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class DeviceMemory:
    """What is in use on the first GPU, by all processes."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByIndex_v2(
            0, ctypes.byref(self._handle)
        ):
            raise SystemExit("gpu_bounds: NVML does not answer")
        self.peak = 0

    def used(self) -> int:
        memory = _Memory()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)):
            raise SystemExit("gpu_bounds: NVML gave no memory figures")
        return int(memory.used)

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """`peak` is the most that was seen within."""
        self.peak = 0
        done = threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                self.peak = max(self.peak, self.used())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="prompts against their bounds, memory against its budget"
    )
    parser.add_argument("--budget", default="2GiB")
    parser.add_argument("--prompts", default="1024,4096,16384")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-resident", action="store_true", help="without the all-resident runs")
    parser.add_argument(
        "--quick", action="store_true", help="one run each, no trace (long prompts)"
    )
    parser.add_argument("--trace", help="folder for the traces")
    parser.add_argument("model")
    options = parser.parse_args()
    memory = DeviceMemory()
    idle = memory.used()
    baseline = 0  # the first engine finds all of it: the driver keeps some for the next
    budget = parse_size(options.budget, argument="--budget")
    model = ps.Model(options.model)
    sizes = [int(n) for n in options.prompts.split(",")]
    print(f"{model.name}, {options.budget}, policy {options.policy}", flush=True)
    found = []
    for n_prompt in sizes:
        started = time.perf_counter()
        with (
            memory.sampled(),
            ps.Engine(
                model, device="cuda", vram=budget, policy=options.policy, n_ctx=n_prompt + 16
            ) as engine,
        ):
            opened_s = time.perf_counter() - started
            baseline = max(baseline, engine.stats["baseline_bytes"])
            found.append(measure(engine, n_prompt, options))
        over = memory.peak - idle - baseline - budget
        print(
            f"  {n_prompt:6} tokens: {found[-1].text}; the GPU's memory {over / 2**20:+.1f} MiB against baseline and "
            f"budget; open took {opened_s:.1f} s",
            flush=True,
        )
    if not options.no_resident:
        compare(model, found, options.repeats)


@dataclass(frozen=True)
class Found:
    n_prompt: int
    ttft_s: float
    outside: int  # bytes of weights that are not in VRAM
    text: str


def compare(model: ps.Model, found: list[Found], repeats: int) -> None:
    """With the bound, for which all weights have to be resident once."""
    longest = max(row.n_prompt for row in found)
    with ps.Engine(model, device="cuda", policy="full_gpu", n_ctx=longest + 16) as engine:
        meter = Meter(engine)
        for row in found:
            meter.prompt(row.n_prompt)
            compute_s = statistics.median(meter.prompt(row.n_prompt) for _ in range(repeats))
            copy_s = row.outside / BUS_BYTES_PER_S
            bound = max(copy_s, compute_s)
            print(
                f"  {row.n_prompt:6} tokens: {row.ttft_s * 1e3:.0f} ms are {row.ttft_s / bound:.2f}x of the bound "
                f"(copies {copy_s * 1e3:.0f} ms, all resident {compute_s * 1e3:.0f} ms)",
                flush=True,
            )


def measure(engine: ps.Engine, n_prompt: int, options: argparse.Namespace) -> Found:
    meter = Meter(engine)
    outside = bytes_outside(engine)
    if options.quick:
        run = meter.run(n_prompt, 8)
        text = (
            f"TTFT {run.ttft_s:.2f} s, {run.tps or 0:.1f} tokens/s; predicted {predicted(engine)}"
        )
        return Found(n_prompt, run.ttft_s, outside, text)
    summary = meter.median_run(n_prompt, 8, options.repeats, 60.0)
    as_predicted = predicted(engine)
    bytes_before = engine.stats["h2d_bytes"]
    meter.prompt(n_prompt)
    crossed = engine.stats["h2d_bytes"] - bytes_before
    with engine.tracing() as recording:
        meter.run(n_prompt, 4)
    if options.trace:
        recording.trace.save(f"{options.trace}/{options.budget}_{n_prompt}.json")
    prefill = recording.trace.attribute()["prefill"]
    name, share = prefill.bottleneck
    text = (
        f"TTFT {summary.ttft_s * 1e3:.0f} ms ({summary.ttft_lo * 1e3:.0f} to {summary.ttft_hi * 1e3:.0f}), "
        f"{summary.tps or 0:.1f} tokens/s; predicted {as_predicted}; of {outside / 1e9:.2f} GB outside VRAM "
        f"{crossed / 1e9:.2f} GB crossed; {name} busy {share:.1%}, it or the GPU {prefill.covered:.1%}"
    )
    return Found(n_prompt, summary.ttft_s, outside, text)


def predicted(engine: ps.Engine) -> str:
    stats = engine.stats
    ttft, tps = stats["predicted_ttft_s"], stats["predicted_tps"]
    return "-" if ttft is None else f"{ttft * 1e3:.0f} ms, {tps:.1f} tokens/s"


def bytes_outside(engine: ps.Engine) -> int:
    """Of the weights that a prompt needs whole (all but the embedding, of which it needs single rows)."""
    places = next(reversed(engine.plan.places.values()))
    total = 0.0
    for unit in engine.model.units:
        if unit.kind == "embed":
            continue
        place = places[unit.name]
        share = place.vram if isinstance(place, ps.Split) else float(place == "vram")
        total += (1.0 - share) * unit.n_bytes
    return int(total)


if __name__ == "__main__":
    main()

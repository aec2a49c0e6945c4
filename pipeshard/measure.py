"""Timing engines: the one place that says what a time to first token and a token a second are.

TTFT is from the call with token ids to the first token on the host, model and plan warm, nothing of the prompt reused.
TPS is (n_gen - 1) / (t_last - t_first). Tokens are random ones, in prompts and in decoding alike: text that a model
writes itself soon repeats, and then uses few of its experts.

Not here: which engines are measured (sweep.py, cli/bench.py). Threads: as Engine, whose caller a Meter is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _core
from .engine import Engine, Ids
from .errors import RequestError

__all__ = ["Meter", "Run", "Summary"]

_SEQ = 0  # the sequence that everything runs in
_FEWEST_GEN = 4  # tokens of a run that is cut for time: three steps of decoding
_WARM_GEN = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A prompt and the tokens behind it. `tps` is None where only one token was asked for. Seconds are the device's;
    `wall_*`: what passed meanwhile, which on an emulated GPU is something else."""

    ttft_s: float
    tps: float | None
    n_gen: int
    wall_prompt_s: float
    wall_decode_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians of several runs, with the least and the most."""

    ttft_s: float
    ttft_lo: float
    ttft_hi: float
    tps: float | None
    tps_lo: float | None
    tps_hi: float | None
    n_gen: int
    repeats: int

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Summary:
        ttft = [run.ttft_s for run in runs]
        tps = [run.tps for run in runs if run.tps is not None]
        return cls(
            ttft_s=statistics.median(ttft),
            ttft_lo=min(ttft),
            ttft_hi=max(ttft),
            tps=statistics.median(tps) if tps else None,
            tps_lo=min(tps, default=None),
            tps_hi=max(tps, default=None),
            n_gen=runs[-1].n_gen,
            repeats=len(runs),
        )


class Meter:
    """Times prompts and decoding on an engine. The tokens follow from the seed."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine = engine
        self._random = np.random.default_rng(seed)

    def prompt(self, n_tok: int) -> float:
        """Seconds to read a prompt."""
        tokens = self._tokens(n_tok)
        with self._engine._calling() as core:
            self._forget(core)
            start = core.clock_ns()
            self._engine._read_prompt(core, tokens, keep_answers=False)
            return _seconds(core, start)

    def decode(self, n_tok: int, depth: int = 0) -> float:
        """Seconds of `n_tok` passes of one token each, behind `depth` others."""
        before, tokens = self._tokens(depth), self._tokens(n_tok)
        with self._engine._calling() as core:
            self._forget(core)
            if depth:
                self._engine._read_prompt(core, before, keep_answers=False)
            start = core.clock_ns()
            for i in range(n_tok):
                core.append(_SEQ, tokens[i : i + 1])
            return _seconds(core, start)

    def run(self, n_prompt: int, n_gen: int) -> Run:
        """What a call takes that reads a prompt and gives `n_gen` tokens, each of them on the host."""
        tokens = self._tokens(n_prompt + n_gen - 1)
        sampler = _core.Sampler(self._engine.n_vocab, temperature=0.0)
        with self._engine._calling() as core:
            self._forget(core)
            wall_start, start = time.perf_counter(), core.clock_ns()
            self._engine._read_prompt(core, tokens[:n_prompt], keep_answers=False)
            sampler.next(core)
            wall_first, first = time.perf_counter(), core.clock_ns()
            for i in range(n_prompt, len(tokens)):
                core.append(_SEQ, tokens[i : i + 1])
                sampler.next(core)
            last, wall_last = core.clock_ns(), time.perf_counter()
        run = Run(
            ttft_s=(first - start) * 1e-9,
            tps=(n_gen - 1) / ((last - first) * 1e-9) if last > first else None,
            n_gen=n_gen,
            wall_prompt_s=wall_first - wall_start,
            wall_decode_s=wall_last - wall_first,
        )
        self._engine._run_stats |= {  # as of any other run
            "n_prompt": n_prompt,
            "n_cached": 0,
            "n_gen": n_gen,
            "ttft_s": run.ttft_s,
            "tps": run.tps,
            "e2e_s": (last - start) * 1e-9,
            "wall_s": wall_last - wall_start,
        }
        return run

    def median_run(self, n_prompt: int, n_gen: int, repeats: int, limit_s: float) -> Summary:
        """Several runs behind one that warms up. Of wall time they take about `limit_s` at most: where tokens are slow
        fewer are generated, and where that is not enough there are fewer runs, though always one."""
        if n_prompt + n_gen > self._engine.n_ctx:
            raise RequestError(
                f"{n_prompt} tokens and {n_gen} behind them need a context of {n_prompt + n_gen}, not "
                f"{self._engine.n_ctx}",
                argument="n_ctx",
            )
        end = time.perf_counter() + limit_s
        n_warm = min(n_gen, _WARM_GEN)
        warm = self.run(n_prompt, n_warm)
        token_s = warm.wall_decode_s / max(1, n_warm - 1)
        for_decode_s = (end - time.perf_counter()) / repeats - warm.wall_prompt_s
        if token_s * n_gen > for_decode_s:
            n_gen = min(n_gen, max(_FEWEST_GEN, int(for_decode_s / token_s)))
        run_s = warm.wall_prompt_s + token_s * n_gen
        runs: list[Run] = []
        while len(runs) < repeats and (not runs or time.perf_counter() + run_s < end):
            runs.append(self.run(n_prompt, n_gen))
        return Summary.of(runs)

    def _tokens(self, n_tok: int) -> Ids:
        return self._random.integers(0, self._engine.n_vocab, n_tok, np.int32)

    def _forget(self, core: _core.Engine) -> None:
        core.truncate(_SEQ, 0)
        self._engine._n_as_prompt = 0


def _seconds(core: _core.Engine, start_ns: int) -> float:
    return (core.clock_ns() - start_ns) * 1e-9

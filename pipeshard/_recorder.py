"""The side of tracing that an engine has: recording on and off, reading, and the methods that users call.

Not here: what a trace tells (trace.py), the recording itself (the core's ps_trace).
Threads: as Engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from . import _core
from ._simulator import PassTime
from ._version import __version__
from .errors import RequestError
from .model import Model
from .plan import Plan
from .trace import Attribution, Names, Trace, compare

__all__ = ["Recorder", "Recording", "TracedEngine"]

_MOST_DECODED = 32  # tokens that run again for a trace: enough to see what one of them takes


class Recording:
    """What `with eng.tracing() as recording` gives: `trace` is there when the block has ended."""

    trace: Trace | None = None


class Recorder:
    """An engine's tracing: starts, reads, writes. Called with the engine's core, by whoever holds its lock."""

    def __init__(
        self, core: _core.Engine, model: Model, plan: Plan, device: Mapping[str, Any]
    ) -> None:
        kinds, streams, ops, _ = _core.Plan.tick_names()
        self._units = tuple(unit.name for unit in model.units)
        self._tiers = tuple(tier.name for tier in plan.tiers)
        self._words = (kinds, streams, ops)
        self._memory = tuple(core.stats()["peak_bytes_by_kind"])
        self._about = {
            "version": __version__,
            "model": model.name,
            "arch": model.arch,
            "device": dict(device),
        }
        self.recording = False

    def start(self, core: _core.Engine) -> None:
        core.trace_start(0)
        self.recording = True

    def stop(self, core: _core.Engine) -> None:
        core.trace_stop()
        self.recording = False

    def check(self) -> None:
        if not self.recording:
            raise RequestError(
                "this engine records no trace: open it with trace=True, or put what should be traced into "
                "`with engine.tracing(path):`",
                argument="trace",
            )

    def read(self, core: _core.Engine) -> Trace:
        passes, ticks = core.trace_read(False)
        passes.flags.writeable = ticks.flags.writeable = False
        names = Names(*self._words, units=self._units, tiers=self._tiers, memory=self._memory)
        return Trace(passes, ticks, names, self._about)

    def clear(self, core: _core.Engine) -> None:
        core.trace_read(True)


class TracedEngine:
    """What Engine has of this."""

    _recorder: Recorder
    _prediction: tuple[Any, PassTime, PassTime] | None

    @property
    def stats(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        raise NotImplementedError

    def _looking(self) -> AbstractContextManager[_core.Engine]:
        raise NotImplementedError

    def _run_again(self, most_decoded: int) -> None:
        """The last call's prompt and the first of its tokens, as a fresh sequence."""
        raise NotImplementedError

    def trace(self, path: str | os.PathLike[str] | None = None) -> Trace:
        """What passes did since the engine was opened with trace=True, or since the last trace(): the latest that fit a
        ring of 32 MiB, hundreds of tokens. Written to `path` for ui.perfetto.dev, returned and forgotten.

        An engine opened without trace=True has recorded nothing: then the last call's prompt and up to 32 of its
        tokens run again, recorded. To trace a part, on any engine: `with eng.tracing("run.json"): ...`."""
        with self._looking():
            recorded = self._recorder.recording
        if not recorded:
            with self.tracing() as again:
                self._run_again(_MOST_DECODED)
            assert again.trace is not None
            if path is not None:
                again.trace.save(path)
            return again.trace
        with self._looking() as core:
            trace = self._recorder.read(core)
            if path is not None:
                trace.save(path)
            self._recorder.clear(core)
        return trace

    @contextlib.contextmanager
    def tracing(self, path: str | os.PathLike[str] | None = None) -> Iterator[Recording]:
        """Records what the block does, on engines with and without trace=True, and writes it to `path` in the end.
        Yields an object whose `trace` is there afterwards."""
        recording, was_on = Recording(), self._recorder.recording
        with self._looking() as core:
            first = core.stats()["n_passes"]
            self._recorder.start(core)
        try:
            yield recording
        finally:
            if not self.closed:
                with self._looking() as core:
                    recording.trace = self._recorder.read(core).since(first)
                    if not was_on:
                        self._recorder.stop(core)
                        self._recorder.clear(core)
                if path is not None:
                    recording.trace.save(path)

    def last_attribution(self) -> dict[str, Attribution]:
        """What held up the last prompt ("prefill") and the tokens behind it ("decode"), of what is recorded."""
        with self._looking() as core:
            self._recorder.check()
            trace = self._recorder.read(core)
        return trace.attribute(trace.last_run())

    def explain_run(self) -> str:
        """The last run beside what was predicted for it: TTFT and the time of a token, and, where it is recorded, in
        which categories they differ. Empty where nothing ran or was predicted."""
        stats = self.stats
        parts: dict[str, Mapping[str, float]] = {}
        if self._prediction is not None:
            parts = {"prefill": self._prediction[1].held, "decode": self._prediction[2].held}
        found = self.last_attribution() if self._recorder.recording else {}
        return "\n".join(compare(stats, parts, found))

"""The engine: a model under a plan on a device, from a prompt to text.

Not here: the answers' form (generate.py, openai.py), which plan (planner.py), how passes run (the core).
Threads: one call at a time; a second thread gets a BusyError at once. A stream that a thread has begun belongs to it
until it is read to its end, closed or dropped; a new call of the same thread ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from . import _core, openai, sched_policies
from ._devices import check_device, describe, free_budget, open_device
from ._profile import Profile
from ._progress import Bar
from ._recorder import Recorder, TracedEngine
from ._simulator import PassTime, Simulator, Sources, as_profile
from .emu import EmuDevice
from .errors import (
    BusyError,
    ClosedError,
    DeviceError,
    PipeshardError,
    RequestError,
)
from .generate import Sampled, SamplingParams, Source, check_bool, check_int
from .model import Model, check_path
from .plan import Plan
from .planner import MAX_CHUNK_TOK, N_GEN, N_PROMPT, Wishes, make_plan
from .profiling import profile_for_engine
from .sizes import parse_size
from .tokenizer import Tokenizer

__all__ = ["Engine"]

Json = dict[str, Any]
Ids = npt.NDArray[np.int32]

_SEQ = 0  # the sequence of generate and logits
_DEFAULT_CTX = 4096
_MAX_CTX = 1 << 27  # as the core has it
_MAX_SEQ = 4096
# Up to so many tokens run through other kernels than prompts do, with slightly other rounding, on every device.
_FEW_TOK = 8

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(TracedEngine):
    """Runs one model. Also a context manager.

    model: path of a GGUF file, or a Model that several engines share. device: "auto", "host", "emu", "cuda", "cuda:N"
    or an EmuDevice. vram: bytes or a size such as "4GiB", everything above the driver's own share counted; None: what
    is free. policy: a name (`pipeshard.policies()`), "module:name", or a policy itself. plan: a Plan or its file, which
    then decides instead of policy, n_ctx, n_seq and kv. profile: of the machine, or its file; None: measured on a GPU,
    once, and kept; False: without measuring. n_ctx 0: the model's own. threads: of the CPU; None: all, but for one or
    two beside a GPU. locked_limit, ram_limit: of page-locked and of all host memory. trace: record what passes do, for
    trace(), from the start."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        device: str | EmuDevice = "auto",
        vram: int | str | None = None,
        policy: Any = "auto",
        plan: Plan | str | Path | None = None,
        profile: Profile | str | Path | Literal[False] | None = None,
        n_ctx: int = _DEFAULT_CTX,
        n_seq: int = 1,
        kv: Literal["f16", "q8_0"] = "f16",
        threads: int | None = None,
        locked_limit: int | str | None = None,
        ram_limit: int | str | None = None,
        trace: bool = False,
    ) -> None:
        self._core: _core.Engine | None = (
            None  # first, so that an engine that never opened can be closed
        )
        kind, emu = check_device(device)
        self._emu = emu
        budget = None if vram is None else parse_size(vram, argument="vram")
        limits = (
            _check_limit("locked_limit", locked_limit),
            _check_limit("ram_limit", ram_limit),
        )
        n_threads = 0 if threads is None else check_int("threads", threads, 1, 4096)
        self._threads = n_threads
        self._policy = sched_policies.get(policy)  # before anything is opened
        known = None if profile is False else as_profile(profile)
        self._traced = check_bool("trace", trace)
        wishes = _check_wishes(n_ctx, n_seq, kv)
        given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        if given is not None and not isinstance(given, Plan):
            raise TypeError(f"plan must be a Plan or its file, not {type(given).__name__}")

        self._model: Model | None = (
            model if isinstance(model, Model) else Model(check_path("model", model))
        )
        self._label = f"{self._model.name} ({self._model.arch})"
        if wishes.n_ctx == 0:
            wishes = replace(wishes, n_ctx=min(self._model.n_ctx_train, _MAX_CTX))
        if given is not None:
            wishes = _follow(given, wishes)
        self._lock = threading.Lock()  # held by whoever uses the core
        self._owner: tuple[object, int] | None = None  # the stream under way and its thread
        self._n_as_prompt = 0  # tokens at the sequence's beginning that ran as part of a prompt
        self._last_run: tuple[Ids, list[int]] | None = None  # the prompt, and what was decoded
        self._run_stats: Json = _no_run()
        self._simulator: Simulator | None = None  # that plans are made with
        self._predictor: Simulator | None = None  # the same, for where the weights came to lie
        self._prediction: tuple[tuple[int, int, int], PassTime, PassTime] | None = None
        self._last_core_stats: Json = {}
        chunk_tok = max(wishes.n_seq, min(MAX_CHUNK_TOK, wishes.n_ctx))
        if given is not None:
            chunk_tok = given.chunk_tok
            budget = budget if budget is not None else given.budget_bytes
        self._device: _core.Device | None = None
        try:
            self._device = open_device(
                kind, emu, budget is not None, self._model._core, wishes.n_ctx, chunk_tok, n_threads
            )
            self._budget = budget if budget is not None else free_budget(self._device)
            self._given, self._wishes, self._limits = given, wishes, limits
            if known is None:
                known = profile_for_engine(
                    self._model, self._device, n_threads, emu, self._budget, profile is not False
                )
            self._simulator = None if known is None else Simulator(known, threads=n_threads)
            self._open(self._make_plan(given, wishes))
        except BaseException:
            # Whoever keeps the exception keeps this frame, but not the device's memory.
            self._forget()
            raise

    def _make_plan(self, given: Plan | None, wishes: Wishes, held_bytes: int = 0) -> _core.Plan:
        machine, free = describe(self._open_device, self._emu)
        budget = self._budget if free is None else min(self._budget, free + held_bytes)
        if given is None:
            self._plan, core = make_plan(
                self.model,
                machine,
                replace(wishes, budget_bytes=budget),
                policy=self._policy,
                simulator=self._simulator,
                threads=self._threads,
            )
            return core
        bound = replace(
            given,
            budget_bytes=budget,
            accelerator=machine.accelerator,
            sm=machine.sm,
            map_bytes_per_gib=machine.map_bytes_per_gib,
        )
        core = bound.bind(self.model)
        self._plan = replace(bound, bytes=core.bytes_by_kind)
        return core

    def _open(self, core_plan: _core.Plan) -> None:
        try:
            with Bar(f"loading {self.model.name}", "B") as bar:
                self._core = _core.Engine(
                    core_plan,
                    self._open_device,
                    locked_limit=self._limits[0],
                    ram_limit=self._limits[1],
                    progress=bar.to,
                )
        finally:
            del core_plan
        self._note_sources(self._core)
        self._recorder = Recorder(self._core, self.model, self._plan, self.device_info)
        if self._traced:
            self._recorder.start(self._core)
        _open_engines.add(self)

    def _note_sources(self, core: _core.Engine) -> None:
        """Which weights are not page-locked follows from the limits and from what the system refuses: plans are made
        without, but predictions know."""
        units, piece_bytes = core.sources()
        self._prediction = None
        self._predictor = self._simulator
        if self._simulator is not None and any(units):
            self._predictor = self._simulator.beside(Sources(units, piece_bytes))

    def set_budget(self, vram: int | str) -> None:
        """Goes over to another budget of VRAM, between tokens: a stream under way goes on from there, and what follows
        is what an engine opened with this budget would say. Host weights are not read again.

        The policy places every unit anew. An engine that was given a plan keeps the plan's places. Old memory is given
        back before new memory is taken, so no more than the larger of the two budgets is ever held; `peak_bytes` counts
        from here. After an error, such as a BudgetError, everything is as it was."""
        budget = parse_size(vram, argument="vram")
        mine = self._owner is not None and self._owner[1] == threading.get_ident()
        with self._calling(self._owner[0] if mine and self._owner else None) as core:
            before = self._plan, self._budget
            try:
                self._budget = budget
                plan = self._make_plan(self._given, self._wishes, core.stats()["vram_bytes"])
                with Bar(f"loading {self.model.name}", "B") as bar:
                    core.replan(plan, bar.to)
            except BaseException:
                self._plan, self._budget = before
                raise
            self._note_sources(core)
            self._n_as_prompt = (
                0  # it ran elsewhere: another engine's answers need not be the same bits
            )

    # ---- life ----

    def close(self) -> None:
        """Frees everything. Closing twice is allowed; streams under way end with a ClosedError."""
        if self._core is None:
            return
        self._core.close()  # BusyError while another thread is in a call
        self._forget()

    def _forget(self) -> None:
        self._core = self._device = self._model = self._owner = None
        _open_engines.discard(self)

    @property
    def closed(self) -> bool:
        return self._core is None

    def __enter__(self) -> Engine:
        self._usable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._core is None:
            return f"<Engine {self._label}, closed>"
        return f"<Engine {self._label} on {self._open_device.name}, n_ctx {self.n_ctx}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Engine can be neither copied nor pickled; open another on the same Model"
        )

    def _usable(self) -> _core.Engine:
        if self._core is None:
            raise ClosedError("the engine is closed")
        return self._core

    @property
    def _open_device(self) -> _core.Device:
        if self._device is None:
            raise ClosedError("the engine is closed")
        return self._device

    # ---- what it is ----

    @property
    def model(self) -> Model:
        if self._model is None:
            raise ClosedError("the engine is closed")
        return self._model

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def n_ctx(self) -> int:
        return self._plan.n_ctx

    @property
    def n_vocab(self) -> int:
        return self.model.n_vocab

    @property
    def device(self) -> str:
        """ "host", "emu" or "cuda"."""
        return self._open_device.kind

    @property
    def device_info(self) -> Json:
        """Kind, name, compute capability, VRAM in all, baseline, and the CPU kernels in force."""
        device = self._open_device
        return {
            "kind": device.kind,
            "name": device.name,
            "sm": device.sm,
            "vram_total_bytes": device.vram_total,
            "baseline_bytes": device.baseline,
            "cpu_variant": device.cpu_variant,
            "virtual_clock": device.virtual_clock,
        }

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Ids, with the begin token where the model wants one."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    # ---- the core, one call at a time ----

    @contextlib.contextmanager
    def _calling(self, run: object | None = None) -> Iterator[_core.Engine]:
        """`run`: the stream on whose behalf; a call without one ends the stream under way."""
        core = self._usable()
        if not self._lock.acquire(blocking=False):
            raise _busy()
        try:
            self._check_owner(run)
            yield core
        except DeviceError as error:
            if error.fatal:
                with contextlib.suppress(PipeshardError):
                    core.close()
                self._forget()
            raise
        finally:
            self._lock.release()

    def _check_owner(self, run: object | None) -> None:
        if self._owner is None or self._owner[0] is run:
            return
        if self._owner[1] != threading.get_ident():
            raise _busy()
        self._owner = None

    def logits(
        self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float32]:
        """Logits of every position, [len(tokens), n_vocab]: a copy. The tokens are a fresh sequence."""
        ids = _to_ids("tokens", tokens)
        if len(ids) == 0:
            raise RequestError("tokens is empty", argument="tokens")
        if len(ids) > self.n_ctx:
            raise RequestError(
                f"{len(ids)} tokens are more than the context of {self.n_ctx}; open the engine with a larger n_ctx",
                argument="tokens",
            )
        with self._calling() as core:
            self._n_as_prompt = 0
            core.truncate(_SEQ, 0)
            self._last_run = (ids, [])
            logits = core.append_all(_SEQ, ids)
            self._n_as_prompt = len(ids) if len(ids) > _FEW_TOK else 0
            return logits

    def _read_prompt(self, core: _core.Engine, tokens: Ids, keep_answers: bool) -> int:
        """Runs what the cache does not hold; returns how many tokens it held.

        What is reused shows nowhere: it ran as part of a prompt, and so does what is run now, so the logits are those
        of a fresh sequence to the bit wherever a token's result does not depend on its neighbours. `keep_answers`:
        also tokens that were generated, which ran one by one."""
        n_cached = core.match(_SEQ, tokens)
        if not keep_answers:
            n_cached = min(n_cached, self._n_as_prompt)
        n_cached = max(0, min(n_cached, len(tokens) - _FEW_TOK - 1))
        self._n_as_prompt = min(self._n_as_prompt, n_cached)
        core.truncate(_SEQ, n_cached)
        n_rest = len(tokens) - n_cached
        # Passes of one size, so that no last one is small.
        step = -(-n_rest // -(-n_rest // self._plan.pass_tok))
        with Bar("reading the prompt", "tok") as bar:
            for done in range(n_cached, len(tokens), step):
                core.append(_SEQ, tokens[done : done + step])
                bar.to(min(done + step, len(tokens)) - n_cached, n_rest)
        if self._n_as_prompt == n_cached and len(tokens) > _FEW_TOK:
            self._n_as_prompt = len(tokens)
        return n_cached

    def _run_again(self, most_decoded: int) -> None:
        if self._last_run is None:
            raise RequestError("nothing has run yet that could be traced", argument="trace")
        if self._owner is not None:
            raise RequestError("a stream is under way: end it, then trace", argument="trace")
        prompt, decoded = self._last_run
        with self._calling() as core:
            core.truncate(_SEQ, 0)
            self._n_as_prompt = 0
            self._read_prompt(core, prompt, keep_answers=False)
            for token in decoded[:most_decoded]:
                core.append(_SEQ, np.array([token], np.int32))

    @property
    def last_logits(self) -> npt.NDArray[np.float32] | None:
        """Of the last token that ran: a read-only view that holds until the next pass. None before the first."""
        return self._usable().logits

    def reset(self) -> None:
        """Forgets every sequence and what of them could be reused."""
        with self._calling() as core:
            for seq in range(self._plan.n_seq):
                core.truncate(seq, 0)

    # ---- text ----

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The new text behind a prompt, which is text or ids. temperature 0: greedy; seed None: another each time;
        max_tokens None: until the context is full."""
        return "".join(
            self.stream(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                seed=seed,
                stop=stop,
            )
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The same in pieces, as they become final. Arguments are checked now, the model runs as pieces are read."""
        run = self._new_run()
        return run.guard(
            openai.stream(
                run.source(),
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                seed=seed,
                stop=stop,
            )
        )

    def create_completion(
        self, prompt: str | Sequence[int] = "", *, stream: bool = False, **options: Any
    ) -> Json | Iterator[Json]:
        """OpenAI's text completion; options as generate() takes them, and `echo`, `logprobs` and `model`."""
        run = self._new_run()
        with run.ending_on_error():
            answer = openai.create_completion(run.source(), prompt, stream=stream, **options)
        return run.finish(answer)

    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> Json | Iterator[Json]:
        """OpenAI's chat completion; options as generate() takes them, and `logprobs`, `top_logprobs`, `tools`,
        `chat_template`, `chat_template_kwargs` and `model`."""
        run = self._new_run(keep_answers=True)  # a conversation goes on from its last answer
        with run.ending_on_error():
            answer = openai.create_chat_completion(run.source(), messages, stream=stream, **options)
        return run.finish(answer)

    def _new_run(self, keep_answers: bool = False) -> _Run:
        self._usable()
        if self._lock.locked() or (
            self._owner is not None and self._owner[1] != threading.get_ident()
        ):
            raise _busy()
        return _Run(self, keep_answers)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[_core.Engine]:
        """For calls that disturb no stream under way."""
        with self._calling(None if self._owner is None else self._owner[0]) as core:
            yield core

    # ---- numbers ----

    @property
    def stats(self) -> Json:
        """Counts and times of the last run, memory and traffic since open. Seconds are those of the device: virtual
        on emu, with the run's `wall_s` beside. disk_direct: whether units on disk are read past the page cache; False
        where the file system allows it not; None: none is there."""
        core = self._usable()
        with contextlib.suppress(BusyError):  # then those of the last look have to do
            self._last_core_stats = core.stats()
        memory = dict(self._last_core_stats)
        kinds = memory.pop("peak_bytes_by_kind", {})
        memory.pop("busy_ns", None)
        return {
            **self._run_stats,
            **self._predicted(),
            "budget_bytes": self._budget,
            "baseline_bytes": self._open_device.baseline,
            "peak_bytes_by_kind": dict(kinds),
            **memory,
        }

    def _predicted(self) -> Json:
        """For the sizes of the last run; before the first, for those that the plan speaks of."""
        n_prompt, n_gen = self._run_stats["n_prompt"], self._run_stats["n_gen"]
        if self._predictor is None:
            return {"predicted_ttft_s": None, "predicted_tps": None}
        if n_prompt == 0 and self._plan.predicted is not None and self._predictor.sources is None:
            found = self._plan.predicted
            return {"predicted_ttft_s": found["ttft_s"], "predicted_tps": found["tps"]}
        sizes = (n_prompt or N_PROMPT, n_gen or N_GEN, self._run_stats["n_cached"])
        if self._prediction is None or self._prediction[0] != sizes:
            prompt, decode = self._predictor.run(
                self._plan.bind(self.model),
                n_ctx=self.n_ctx,
                n_prompt=sizes[0],
                n_gen=sizes[1],
                first=sizes[2],
            )
            self._prediction = (sizes, prompt, decode)
        _, prompt, decode = self._prediction
        return {"predicted_ttft_s": prompt.seconds, "predicted_tps": 1.0 / decode.seconds}


class _Run:
    """One generation: what generate.py calls a Decoder. Holds its engine; the engine knows only its name."""

    def __init__(self, engine: Engine, keep_answers: bool) -> None:
        self._engine = engine
        self._keep_answers = keep_answers
        self._name = object()
        self._sampler: _core.Sampler | None = None
        self._logprobs = False
        self._stats = _no_run()
        self._start = self._first = self._wall_start = 0.0

    def source(self) -> Source:
        return Source(self, self._engine.tokenizer, self._engine.model.name)

    # ---- the Decoder ----

    @property
    def n_ctx(self) -> int:
        return self._engine.n_ctx

    def prefill(self, ids: Sequence[int], params: SamplingParams) -> Sampled:
        engine = self._engine
        tokens = np.asarray(ids, np.int32)
        with engine._calling() as core:
            engine._owner = (self._name, threading.get_ident())
            self._sampler = self._make_sampler(params)
            self._sampler.accept(tokens)
            self._wall_start = time.perf_counter()
            self._start = _clock(core)
            engine._last_run = (tokens, [])
            n_cached = engine._read_prompt(core, tokens, self._keep_answers)
            sampled = self._sample(core)
            self._first = _clock(core)
            self._stats |= {
                "n_prompt": len(tokens),
                "n_cached": n_cached,
                "ttft_s": self._first - self._start,
            }
            self._count(core, sampled)
        return sampled

    def decode(self, token: int) -> Sampled:
        engine = self._engine
        if engine._owner is None or engine._owner[0] is not self._name:
            raise ClosedError("this stream has ended: its engine began another call or was closed")
        with engine._calling(self._name) as core:
            core.append(_SEQ, np.array([token], np.int32))
            if engine._last_run is not None:
                engine._last_run[1].append(token)
            sampled = self._sample(core)
            self._count(core, sampled)
        return sampled

    # ---- its parts ----

    def _make_sampler(self, params: SamplingParams) -> _core.Sampler:
        bias = params.logit_bias
        self._logprobs = params.n_logprobs is not None
        n_vocab = min(self._engine.n_vocab, self._engine.tokenizer.n_vocab)
        return _core.Sampler(
            n_vocab,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repeat_penalty=params.repeat_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            penalty_last_n=params.penalty_last_n,
            bias_ids=np.fromiter(bias.keys(), np.int32, len(bias)),
            bias_values=np.fromiter(bias.values(), np.float32, len(bias)),
            seed=params.seed,
            logprobs=self._logprobs,
            n_top=params.n_logprobs or 0,
        )

    def _sample(self, core: _core.Engine) -> Sampled:
        assert self._sampler is not None
        token = self._sampler.next(core)
        sampled = (
            Sampled(token[0], token[1], tuple(token[2]))
            if isinstance(token, tuple)
            else Sampled(token)
        )
        self._sampler.accept(sampled.id)
        return sampled

    def _count(self, core: _core.Engine, sampled: Sampled) -> None:
        """A token that only ends the answer is not counted."""
        now = _clock(core)
        stats = self._stats
        stats["e2e_s"] = now - self._start
        stats["wall_s"] = time.perf_counter() - self._wall_start
        if not self._engine.tokenizer.is_eog(sampled.id):
            stats["n_gen"] += 1
            if stats["n_gen"] > 1 and now > self._first:
                stats["tps"] = (stats["n_gen"] - 1) / (now - self._first)
        self._engine._run_stats = dict(stats)

    # ---- its end ----

    def _end(self) -> None:
        engine = self._engine
        if engine._owner is not None and engine._owner[0] is self._name:
            engine._owner = None

    def guard(self, pieces: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from pieces
        finally:
            self._end()

    def finish(self, answer: Json | Iterator[Json]) -> Json | Iterator[Json]:
        if not isinstance(answer, dict):
            return self.guard(answer)
        self._end()
        return answer

    @contextlib.contextmanager
    def ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._end()
            raise


def _no_run() -> Json:
    counts = dict.fromkeys(("n_prompt", "n_cached", "n_gen"), 0)
    return counts | dict.fromkeys(("ttft_s", "tps", "e2e_s", "wall_s"))


def _clock(core: _core.Engine) -> float:
    return core.clock_ns() * 1e-9


def _busy() -> BusyError:
    return BusyError("the engine is working for another thread; use one engine a thread, or wait")


# ---- arguments ----


def _check_limit(name: str, limit: int | str | None) -> int:
    """As the core has it: 0 is no limit."""
    return 0 if limit is None else max(1, parse_size(limit, argument=name))


def _check_wishes(n_ctx: int, n_seq: int, kv: str) -> Wishes:
    if not isinstance(kv, str):
        raise TypeError(f"kv must be a str, not {type(kv).__name__}")
    if kv not in ("f16", "q8_0"):
        raise RequestError(f"kv must be f16 or q8_0, not {kv!r}", argument="kv")
    return Wishes(
        budget_bytes=0,
        n_ctx=check_int("n_ctx", n_ctx, 0, _MAX_CTX),
        n_seq=check_int("n_seq", n_seq, 1, _MAX_SEQ),
        kv=kv,
    )


def _follow(plan: Plan, wishes: Wishes) -> Wishes:
    """A plan decides; a caller who asks for something else should hear of it."""
    asked: tuple[tuple[str, object, object, object], ...] = (
        ("n_ctx", wishes.n_ctx, _DEFAULT_CTX, plan.n_ctx),
        ("n_seq", wishes.n_seq, 1, plan.n_seq),
        ("kv", wishes.kv, "f16", plan.kv),
    )
    for name, value, default, planned in asked:
        if value not in (default, planned):
            raise RequestError(
                f"{name} is {value}, but the plan was made for {planned}", argument=name
            )
    return replace(wishes, n_ctx=plan.n_ctx, n_seq=plan.n_seq, kv=plan.kv)


def _to_ids(argument: str, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Ids:
    if isinstance(tokens, (str, bytes, Mapping)):
        raise TypeError(f"{argument} must be token ids, not {type(tokens).__name__}")
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise TypeError(f"{argument} must be a list or a one-dimensional array of token ids")
    if array.size == 0:
        return np.zeros(0, np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{argument} must be integers, not {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 1 << 31:
        raise RequestError(
            f"token {low if low < 0 else high} is in no vocabulary", argument=argument
        )
    return np.ascontiguousarray(array, np.int32)


def _close_all() -> None:
    for engine in list(_open_engines):
        with contextlib.suppress(PipeshardError):
            engine.close()


atexit.register(_close_all)

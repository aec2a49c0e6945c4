"""Many engines, one after another or at once: TTFT and TPS of every model under every budget, prompt length, policy and
number of threads.

What is measured on a clock of this machine (a GPU, the CPU) runs here, a cell at a time, over one Model. What is only
computed (emulated and simulated cells) may go to any executor of the kind that `concurrent.futures` defines.
Simulated cells, device "simulate", open no device and read no weights: their seconds follow from a profile.

Not here: how a cell is timed (measure.py), what is done with rows (_sweep_rows.py, _sweep_plot.py).
Threads: a sweep belongs to the thread that calls it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import _core, sched_policies
from ._profile import Profile
from ._progress import Bar
from ._simulator import as_profile
from ._sweep_rows import COLUMNS, Row, Store, Sweep, key_of
from ._version import __version__
from .emu import EmuDevice
from .engine import Engine
from .errors import PipeshardError, RequestError
from .generate import check_int
from .measure import Meter, Summary
from .model import Model, check_path
from .plan import Plan
from .sched_policies import Prediction
from .simulate import simulate
from .sizes import parse_size

__all__ = ["Sweep", "sweep"]

_SIMULATE = "simulate"
_TIMES = ("ttft_s", "ttft_lo", "ttft_hi", "tps", "tps_lo", "tps_hi")
_BOUNDS = ("bound_ttft_s", "bound_tps")
_DEVICES = "auto, host, emu, cuda, cuda:N or simulate"


@dataclass(frozen=True)
class _Cell:
    """What a worker is sent. `vram` None: what is free. `device` is never "auto" here."""

    model: str | Model
    vram: int | None
    n_prompt: int
    policy: Any
    threads: int | None
    device: str | EmuDevice
    label: str  # of the device, in rows
    profile: Profile | None
    n_ctx: int
    n_gen: int
    repeats: int
    limit_s: float
    seed: int

    @property
    def path(self) -> str:
        return self.model.path if isinstance(self.model, Model) else self.model

    @property
    def is_computed(self) -> bool:
        """Its seconds are the same whatever else the machine does meanwhile."""
        return isinstance(self.device, EmuDevice) or self.device in ("emu", _SIMULATE)

    def row(self) -> Row:
        """With everything that is known beforehand."""
        row: Row = dict.fromkeys(COLUMNS)
        row |= {
            "model": " ".join(os.path.basename(self.path).split()),
            "vram_bytes": self.vram,
            "n_prompt": self.n_prompt,
            "policy": sched_policies.name_of(self.policy),
            "threads": self.threads,
            "device": self.label,
            "source": "simulated"
            if self.device == _SIMULATE
            else "emulated"
            if self.is_computed
            else "measured",
            "n_ctx": self.n_ctx,
            "commit": _commit(),
            "version": __version__,
        }
        return row


def sweep(
    models: str | Path | Model | Sequence[str | Path | Model],
    budgets: int | str | Sequence[int | str | None] | None,
    contexts: int | Sequence[int] = (1024,),
    policies: Any = ("auto",),
    threads: int | Sequence[int | None] | None = (None,),
    *,
    device: str | EmuDevice = "auto",
    n_gen: int = 128,
    repeats: int = 5,
    out: str | os.PathLike[str] | None = None,
    executor: Executor | int | None = None,
    one_worker_a_device: bool = False,
    profile: Profile | str | Path | None = None,
    n_ctx: int | None = None,
    cell_s: float = 60.0,
    seed: int = 0,
) -> Sweep:
    """Times every combination of models, budgets, prompt lengths (`contexts`), policies and threads. A cell that fails
    is a row with its `error`, and the sweep goes on.

    budgets: bytes or sizes such as "4GiB"; None: what is free. policies: as Engine takes them. device: as Engine takes
    it, or "simulate": no device at all, but what `simulate` predicts. profile: what predictions go by. n_gen: tokens
    generated behind each prompt. repeats: runs behind one that warms up; the row has their medians. n_ctx: of the
    engines; None: what prompt and answer take. cell_s: wall seconds that a cell's runs may take; then fewer tokens are
    generated.

    out: a .csv or .jsonl file that each row is added to once it is there; cells that the file has without an error are
    not run again. executor: runs emulated cells; an int: as many new processes. Cells on a GPU or on the CPU alone are
    measured here, one at a time, unless `one_worker_a_device` promises that no two workers share a device. Policies
    that go to other processes must be importable there: give them as "module:name"."""
    repeats, n_gen = check_int("repeats", repeats, 1), check_int("n_gen", n_gen, 1)
    if cell_s <= 0:
        raise RequestError(f"cell_s must be above 0, not {cell_s}", argument="cell_s")
    known = as_profile(profile)
    cells = [
        _Cell(
            model=model,
            vram=vram,
            n_prompt=n_prompt,
            policy=policy,
            threads=n_threads,
            device=(found := _find_device(device, vram is not None)),
            label=_device_label(found, profile),
            profile=known,
            n_ctx=n_prompt + n_gen if n_ctx is None else check_int("n_ctx", n_ctx, 1),
            n_gen=n_gen,
            repeats=repeats,
            limit_s=cell_s,
            seed=seed,
        )
        for model, n_prompt, n_threads, vram, policy in itertools.product(
            _check_models(models),
            [check_int("contexts", n, 1) for n in _listed(contexts)],
            [None if n is None else check_int("threads", n, 1, 4096) for n in _listed(threads)],
            [None if n is None else parse_size(n, argument="budgets") for n in _listed(budgets)],
            _check_policies(policies),
        )
    ]
    if not cells:
        raise RequestError(
            "there is nothing to sweep: one of the lists is empty", argument="models"
        )
    with Store(out) as store, _opened(executor) as opened:
        return _Sweeping(cells, store, opened, one_worker_a_device).run()


# ---- running cells ----


class _Sweeping:
    """One sweep under way."""

    def __init__(
        self,
        cells: Sequence[_Cell],
        store: Store,
        executor: Executor | None,
        one_worker_a_device: bool,
    ) -> None:
        self._cells = cells
        self._store = store
        self._executor = executor
        self._sends_all = one_worker_a_device
        self._rows: dict[int, Row] = {}
        self._bar = Bar("sweep", "cell")

    def run(self) -> Sweep:
        todo = [i for i in range(len(self._cells)) if not self._find_done(i)]
        sent: dict[Future[Row], int] = {}
        try:
            with self._bar:
                for i in todo:
                    if self._is_sent(self._cells[i]):
                        sent[self._send(self._cells[i])] = i
                for i in todo:
                    if not self._is_sent(self._cells[i]):
                        self._add(i, _run_cell(self._cells[i]))
                for future in as_completed(sent):
                    self._add(sent[future], self._received(sent[future], future))
        finally:
            for future in sent:
                future.cancel()
            _model.cache_clear()  # the last one's weights
        return Sweep(self._rows[i] for i in range(len(self._cells)))

    def _find_done(self, i: int) -> bool:
        """In the file, and of the model that the path names today."""
        if not self._store.done:
            return False
        cell = self._cells[i]
        row = cell.row()
        with contextlib.suppress(PipeshardError):
            row["model_sha"] = _opened_model(cell)[1]
        found = self._store.done.get(key_of(row))
        if found is not None:
            self._rows[i] = found
        return found is not None

    def _is_sent(self, cell: _Cell) -> bool:
        return self._executor is not None and (cell.is_computed or self._sends_all)

    def _send(self, cell: _Cell) -> Future[Row]:
        assert self._executor is not None
        try:
            # Each worker opens a model once: a Model in the cell would be another one for each cell.
            return self._executor.submit(_run_cell, replace(cell, model=cell.path))
        except Exception as error:  # a pool whose workers are dead, say
            failed: Future[Row] = Future()
            failed.set_exception(error)
            return failed

    def _received(self, i: int, future: Future[Row]) -> Row:
        error = future.exception()
        if error is None:
            return future.result()
        row = self._cells[i].row()
        row["error"] = _error_text(error)
        return row

    def _add(self, i: int, row: Row) -> None:
        self._store.add(row)
        self._rows[i] = row
        self._bar.to(len(self._rows), len(self._cells))


@contextlib.contextmanager
def _opened(executor: Executor | int | None) -> Iterator[Executor | None]:
    """Processes are started afresh: a fork would copy the locks of this one's threads, and what CUDA holds."""
    if executor is None or isinstance(executor, Executor):
        if isinstance(executor, ProcessPoolExecutor) and _forks(executor):
            raise RequestError(
                "executor forks its processes, which breaks threads and CUDA in them; make it with "
                'mp_context=multiprocessing.get_context("spawn")',
                argument="executor",
            )
        yield executor
        return
    n_workers = check_int("executor", executor, 1, 1024)
    pool = ProcessPoolExecutor(n_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _forks(pool: ProcessPoolExecutor) -> bool:
    context: Any = getattr(pool, "_mp_context", None)
    return context is not None and context.get_start_method() == "fork"


def _run_cell(cell: _Cell) -> Row:
    """The row of one cell, whatever happens in it. Workers are given this function."""
    start, row = time.perf_counter(), cell.row()
    try:
        model, row["model_sha"] = _opened_model(cell)
        if cell.device == _SIMULATE:
            _predict_engine(cell, model, row)
        else:
            _time_engine(cell, model, row)
    except Exception as error:
        row["error"] = _error_text(error)
    row["wall_s"] = time.perf_counter() - start
    return row


def _time_engine(cell: _Cell, model: Model, row: Row) -> None:
    with Engine(
        model,
        device=cell.device,
        vram=cell.vram,
        policy=cell.policy,
        profile=cell.profile,
        n_ctx=cell.n_ctx,
        threads=cell.threads,
    ) as engine:
        row["plan_sha"] = plan_sha(engine.plan)
        meter = Meter(engine, cell.seed)
        times = meter.median_run(cell.n_prompt, cell.n_gen, cell.repeats, cell.limit_s)
        _put(row, times, *_TIMES)
        row["n_gen"], row["repeats"] = times.n_gen, times.repeats
        row["peak_bytes"] = engine.stats["peak_bytes"]
        if engine.device != "host":
            found = _predicted(engine, cell.n_prompt, times.n_gen)
            row["predicted_ttft_s"], row["predicted_tps"] = found.ttft_s, found.tps
            _put(row, found, *_BOUNDS)


def _predicted(engine: Engine, n_prompt: int, n_gen: int) -> Prediction:
    """What the engine's plan is predicted to take for these sizes."""
    assert engine._simulator is not None
    return engine._simulator.predict(
        engine.model,
        engine.plan.bind(engine.model),
        n_ctx=engine.n_ctx,
        budget_bytes=engine.plan.budget_bytes,
        n_prompt=n_prompt,
        n_gen=n_gen,
    )


def _predict_engine(cell: _Cell, model: Model, row: Row) -> None:
    if cell.vram is None:
        raise RequestError("a simulated engine needs a budget", argument="budgets")
    found = simulate(
        model,
        vram=cell.vram,
        policy=cell.policy,
        profile=cell.profile,
        n_ctx=cell.n_ctx,
        n_prompt=cell.n_prompt,
        n_gen=cell.n_gen,
        threads=cell.threads,
    )
    _put(row, found, *_TIMES, *_BOUNDS)
    row["n_gen"] = cell.n_gen
    row["plan_sha"] = plan_sha(found.plan)
    row["peak_bytes"] = found.plan.needed_bytes
    row["predicted_ttft_s"], row["predicted_tps"] = found.ttft_s, found.tps
    row["source"] = f"simulated ({found.source} profile)"


def _put(row: Row, found: Summary | Prediction, *names: str) -> None:
    for name in names:
        row[name] = getattr(found, name)


def _error_text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- models ----


def _opened_model(cell: _Cell) -> tuple[Model, str]:
    """With the beginning of its digest."""
    if isinstance(cell.model, Model):
        model = cell.model
    else:
        try:
            stat = os.stat(cell.model)
            version = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            version = (0, 0)  # Model() says what is wrong
        model = _model(cell.model, version)
    return model, model.digest[:12]


@functools.lru_cache(maxsize=1)
def _model(path: str, version: tuple[int, int]) -> Model:
    """One a process: its weights stay in host memory from cell to cell."""
    return Model(path)


def plan_sha(plan: Plan) -> str:
    """The same for plans that do the same."""
    data = plan.to_dict()
    for name in ("why", "predicted"):
        del data[name]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _commit() -> str | None:
    """Of the checkout that the package was imported from, "+" where it has changes; None outside of one. What
    PIPESHARD_COMMIT says goes first: a copy of a checkout does not know."""
    folder = Path(__file__).parent
    if given := os.environ.get("PIPESHARD_COMMIT"):
        return given

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", folder, *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not merely inside another's
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


# ---- arguments ----


def _listed(values: Any) -> list[Any]:
    """One thing is a list of it."""
    one = isinstance(values, (str, bytes, os.PathLike)) or not isinstance(values, Sequence)
    return [values] if one else list(values)


def _check_models(models: Any) -> list[str | Model]:
    return [m if isinstance(m, Model) else check_path("models", m) for m in _listed(models)]


def _check_policies(policies: Any) -> list[str | Callable[..., Any]]:
    """What names no policy is a mistake of the call, not of a cell."""
    listed = _listed(policies)
    for policy in listed:
        if policy != "auto":
            sched_policies.get(policy)
    names = [sched_policies.name_of(policy) for policy in listed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(
            f"two policies are called {twice!r}; rows could not tell them apart",
            argument="policies",
        )
    return listed


def _find_device(device: str | EmuDevice, has_budget: bool) -> str | EmuDevice:
    """As Engine understands "auto", but settled before the first cell runs."""
    if isinstance(device, EmuDevice):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device must be a name or an EmuDevice, not {type(device).__name__}")
    if device == "auto":
        return "cuda" if _core.cuda_status()[0] else "emu" if has_budget else "host"
    if device not in ("host", "emu", "cuda", _SIMULATE) and not device.startswith("cuda:"):
        raise RequestError(f"device must be {_DEVICES}, not {device!r}", argument="device")
    return device


def _device_label(device: str | EmuDevice, profile: Any) -> str:
    """Emulated GPUs that differ, and simulated ones, have labels that differ."""
    if device == _SIMULATE:
        return f"{_SIMULATE}:{_profile_label(profile)}"
    if isinstance(device, str) or device == EmuDevice():
        return "emu" if isinstance(device, EmuDevice) else device
    return f"emu:{_short_hash(repr(device))}"


def _profile_label(profile: Any) -> str:
    if profile is None:
        return "here"
    if isinstance(profile, Profile):
        return _short_hash(json.dumps(profile.to_dict(), sort_keys=True))
    return Path(profile).stem


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]

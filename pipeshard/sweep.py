"""Many engines, one after another or at once: TTFT and TPS of every model under every budget, prompt length, policy and
number of threads.

What is measured on a clock of this machine (a GPU, the CPU) runs here, a cell at a time, over one Model. What is only
computed (emulated and simulated cells) may go to any executor of the kind that `concurrent.futures` defines.

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
from ._progress import Bar
from ._sweep_rows import COLUMNS, Row, Store, Sweep, key_of
from ._version import __version__
from .emu import EmuDevice
from .engine import Engine
from .errors import PipeshardError, RequestError
from .generate import check_int
from .measure import Meter, Summary
from .model import Model, check_path
from .plan import Plan
from .sizes import parse_size

__all__ = ["Sweep", "sweep"]

_DEVICES = "auto, host, emu, cuda or cuda:N"


@dataclass(frozen=True)
class _Cell:
    """What a worker is sent. `vram` None: what is free. `device` is never "auto" here."""

    model: str | Model
    vram: int | None
    n_prompt: int
    policy: Any
    threads: int | None
    device: str | EmuDevice
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
        """Its seconds are those of a virtual clock, whatever else the machine does meanwhile."""
        return isinstance(self.device, EmuDevice) or self.device == "emu"

    def row(self) -> Row:
        """With everything that is known beforehand."""
        row: Row = dict.fromkeys(COLUMNS)
        row |= {
            "model": " ".join(os.path.basename(self.path).split()),
            "vram_bytes": self.vram,
            "n_prompt": self.n_prompt,
            "policy": sched_policies.name_of(self.policy),
            "threads": self.threads,
            "device": _device_label(self.device),
            "source": "emulated" if self.is_computed else "measured",
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
    n_ctx: int | None = None,
    cell_s: float = 60.0,
    seed: int = 0,
) -> Sweep:
    """Times every combination of models, budgets, prompt lengths (`contexts`), policies and threads. A cell that fails
    is a row with its `error`, and the sweep goes on.

    budgets: bytes or sizes such as "4GiB"; None: what is free. policies: as Engine takes them. n_gen: tokens generated
    behind each prompt. repeats: runs behind one that warms up; the row has their medians. n_ctx: of the engines; None:
    what prompt and answer take. cell_s: wall seconds that a cell's runs may take; then fewer tokens are generated.

    out: a .csv or .jsonl file that each row is added to once it is there; cells that the file has without an error are
    not run again. executor: runs emulated cells; an int: as many new processes. Cells on a GPU or on the CPU alone are
    measured here, one at a time, unless `one_worker_a_device` promises that no two workers share a device. Policies
    that go to other processes must be importable there: give them as "module:name"."""
    repeats, n_gen = check_int("repeats", repeats, 1), check_int("n_gen", n_gen, 1)
    if cell_s <= 0:
        raise RequestError(f"cell_s must be above 0, not {cell_s}", argument="cell_s")
    cells = [
        _Cell(
            model=model,
            vram=vram,
            n_prompt=n_prompt,
            policy=policy,
            threads=n_threads,
            device=_find_device(device, vram is not None),
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
        n_ctx=cell.n_ctx,
        threads=cell.threads,
    ) as engine:
        row["plan_sha"] = plan_sha(engine.plan)
        meter = Meter(engine, cell.seed)
        _put_times(row, meter.median_run(cell.n_prompt, cell.n_gen, cell.repeats, cell.limit_s))
        stats = engine.stats
        for name in ("peak_bytes", "predicted_ttft_s", "predicted_tps"):
            row[name] = stats[name]


def _put_times(row: Row, times: Summary) -> None:
    for name in ("ttft_s", "ttft_lo", "ttft_hi", "tps", "tps_lo", "tps_hi", "n_gen", "repeats"):
        row[name] = getattr(times, name)


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
    """Of the checkout that the package was imported from, "+" where it has changes; None outside of one."""
    folder = Path(__file__).parent

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
    if device not in ("host", "emu", "cuda") and not device.startswith("cuda:"):
        raise RequestError(f"device must be {_DEVICES}, not {device!r}", argument="device")
    return device


def _device_label(device: str | EmuDevice) -> str:
    """Emulated GPUs that differ have labels that differ."""
    if isinstance(device, str) or device == EmuDevice():
        return "emu" if isinstance(device, EmuDevice) else device
    return f"emu:{hashlib.sha256(repr(device).encode()).hexdigest()[:6]}"

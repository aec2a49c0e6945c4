"""The Python face: every kind of bad input with its typed error, threads, Ctrl-C, leaks, plans as files."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeshard as ps
from pipeshard import _core

N_CTX = 128
PROMPT = list(range(3, 23))


@pytest.fixture
def engine(llama: str, heap: None) -> Iterator[ps.Engine]:
    with ps.Engine(llama, device="emu", n_ctx=N_CTX, threads=1) as engine:
        yield engine


@pytest.fixture
def slow_engine(llama: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ps.Engine]:
    """One whose prompt of 2,000 tokens takes seconds."""
    monkeypatch.setenv("PIPESHARD_CPU_VARIANT", "ref")
    with ps.Engine(llama, device="host", n_ctx=2048, threads=1) as engine:
        yield engine


LONG_PROMPT = [5] * 2000


# ---- the names ----


def test_signatures_are_those_that_users_rely_on() -> None:
    def keywords(function: Any) -> dict[str, Any]:
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    assert keywords(ps.Engine.__init__) == {
        "device": "auto",
        "vram": None,
        "policy": "auto",
        "plan": None,
        "profile": None,
        "n_ctx": 4096,
        "n_seq": 1,
        "kv": "f16",
        "threads": None,
        "locked_limit": None,
        "ram_limit": None,
        "trace": False,
    }
    generate = {
        "max_tokens": 128,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "seed": None,
        "stop": (),
    }
    assert keywords(ps.Engine.generate) == keywords(ps.Engine.stream) == generate
    assert list(inspect.signature(ps.EmuDevice).parameters) == [
        "profile",
        "vram_capacity",
        "seed",
        "delays",
        "faults",
        "map_bytes_per_gib",
    ]


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in ps.__all__:
        value = getattr(ps, name)
        if inspect.isclass(value):
            assert value.__doc__, name
    for name, member in inspect.getmembers(ps.Engine, inspect.isfunction):
        if not name.startswith("_"):
            assert member.__doc__ or name in ("detokenize",), name


# ---- files that are no models ----


def write_gguf(
    path: Path, arch: str = "llama", pre: str | None = None, fmt: int | None = None
) -> str:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), arch)
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b"])
        writer.add_token_types([1, 1])
        writer.add_token_merges([])
    if fmt is not None:
        writer.add_tensor("x", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if fmt is not None:
        data = bytearray(path.read_bytes())
        at = data.index(b"x" + (1).to_bytes(4, "little")) + 1 + 4 + 8
        data[at : at + 4] = fmt.to_bytes(4, "little")
        path.write_bytes(data)
    return str(path)


def test_missing_file_directory_and_permission(tmp_path: Path) -> None:
    for target in (tmp_path / "none.gguf", tmp_path):
        for opener in (ps.Model, ps.Engine, ps.Tokenizer):
            with pytest.raises(ps.FileError) as info:
                opener(target)
            assert isinstance(info.value, OSError)
            assert info.value.path == str(target)
            assert target.name in str(info.value)
    with pytest.raises(ps.FileError):
        ps.Model("bad\0name")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\3\4" + b"x" * 5000, b"not a model at all" * 100]
)
def test_empty_truncated_and_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for opener in (ps.Model, ps.Engine, ps.Tokenizer):
        with pytest.raises(ps.FormatError) as info:
            opener(path)
        assert isinstance(info.value, ValueError)
        assert info.value.path == str(path)
        assert info.value.field is not None
        assert info.value.offset is not None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_model(tmp_path: Path, llama: str, share: float) -> None:
    data = Path(llama).read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ps.FormatError):
        ps.Engine(path, n_ctx=N_CTX)


def test_unknown_architecture_type_and_pre_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ps.UnsupportedError) as info:
        ps.Model(write_gguf(tmp_path / "a.gguf", arch="falcon"))
    assert info.value.what == "falcon"
    assert "llama" in info.value.supported
    assert info.value.supported == _core.architectures()
    with pytest.raises(ps.UnsupportedError) as info:
        ps.Model(write_gguf(tmp_path / "b.gguf", fmt=9999))
    assert info.value.supported
    with pytest.raises(ps.UnsupportedError) as info:
        ps.Tokenizer(write_gguf(tmp_path / "c.gguf", pre="klingon"))
    assert "klingon" in str(info.value)
    assert info.value.supported


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"vram": "4 potatoes"}, "vram"),
        ({"vram": -1}, "vram"),
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_ctx": 1 << 40}, "n_ctx"),
        ({"n_seq": 0}, "n_seq"),
        ({"kv": "q4_0"}, "kv"),
        ({"threads": 0}, "threads"),
        ({"threads": -2}, "threads"),
        ({"ram_limit": "1XB"}, "ram_limit"),
        ({"locked_limit": -5}, "locked_limit"),
    ],
)
def test_engine_refuses_values(llama: str, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ps.RequestError) as info:
        ps.Engine(llama, **options)
    assert isinstance(info.value, ValueError)
    assert info.value.argument == argument


@pytest.mark.parametrize(
    "options",
    [
        {"device": 3},
        {"vram": 1.5},
        {"vram": True},
        {"n_ctx": "128"},
        {"n_ctx": 1.0},
        {"n_ctx": None},
        {"n_seq": True},
        {"kv": 16},
        {"threads": "2"},
        {"plan": 3},
        {"policy": 3},
        {"trace": "yes"},
        {"nonsense": 1},
    ],
)
def test_engine_refuses_types(llama: str, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        ps.Engine(llama, **options)


@pytest.mark.parametrize("model", [None, 3, b"x.gguf", ["x.gguf"]])
def test_a_model_is_a_path_or_a_model(model: Any) -> None:
    for opener in (ps.Model, ps.Engine):
        with pytest.raises(TypeError):
            opener(model)


def test_a_device_that_is_not_there(llama: str) -> None:
    name = "cuda:99" if _core.cuda_status()[0] else "cuda"
    with pytest.raises(ps.DeviceError) as info:
        ps.Engine(llama, device=name)
    assert not info.value.fatal
    assert "install" in str(info.value) or "GPU" in str(info.value)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1.0}, "min_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {1 << 20: 1.0}}, "logit_bias"),
    ],
)
def test_generate_refuses_values(engine: ps.Engine, options: dict[str, Any], argument: str) -> None:
    for call in (engine.generate, engine.stream, engine.create_completion):
        with pytest.raises(ps.RequestError) as info:
            call(PROMPT, **options)  # type: ignore[operator]
        assert info.value.argument == argument
    assert isinstance(engine.generate(PROMPT, max_tokens=2), str)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 1.5}, {"stop": 3}, {"logit_bias": [1]}, {"max_length": 3}]
)
def test_generate_refuses_types(engine: ps.Engine, options: dict[str, Any]) -> None:
    for call in (engine.generate, engine.stream, engine.create_completion):
        with pytest.raises(TypeError):
            call(PROMPT, **options)  # type: ignore[operator]


@pytest.mark.parametrize("prompt", [[5] * N_CTX, [5] * 1000, []])
def test_prompts_that_do_not_fit(engine: ps.Engine, prompt: list[int]) -> None:
    for call in (engine.generate, engine.stream, engine.create_completion):
        with pytest.raises(ps.RequestError) as info:
            call(prompt)  # type: ignore[operator]
        assert info.value.argument == "prompt"
    engine.generate([5] * (N_CTX - 1))


@pytest.mark.parametrize("prompt", [[-1], [1 << 31], [10**6]])
def test_prompts_of_unknown_tokens(engine: ps.Engine, prompt: list[int]) -> None:
    with pytest.raises(ps.RequestError):
        engine.generate(prompt)
    with pytest.raises(ps.RequestError) as info:
        engine.logits(prompt)
    assert info.value.argument == "tokens"


@pytest.mark.parametrize("prompt", [None, 3, b"text", [1.5], [None], {1: 2}])
def test_prompts_of_the_wrong_type(engine: ps.Engine, prompt: Any) -> None:
    with pytest.raises(TypeError):
        engine.generate(prompt)
    with pytest.raises(TypeError):
        engine.logits(prompt)


def test_logits_takes_lists_and_arrays_and_gives_a_copy(engine: ps.Engine) -> None:
    first = engine.logits(PROMPT)
    assert first.flags.writeable
    assert first.flags.owndata
    for tokens in (
        tuple(PROMPT),
        np.array(PROMPT),
        np.array(PROMPT, np.uint16),
        np.array(PROMPT * 2)[: len(PROMPT)],
    ):
        assert np.array_equal(engine.logits(tokens), first)
    for bad in ([], [1] * (N_CTX + 1)):
        with pytest.raises(ps.RequestError):
            engine.logits(bad)
    for wrong in ([[1, 2]], "text", [True, False]):
        with pytest.raises(TypeError):
            engine.logits(wrong)  # type: ignore[arg-type]


def test_last_logits_is_a_read_only_view(engine: ps.Engine) -> None:
    assert engine.last_logits is None
    engine.generate(PROMPT, max_tokens=1, temperature=0)
    view = engine.last_logits
    assert view is not None
    assert not view.flags.writeable
    assert not view.flags.owndata
    assert view.shape == (engine.n_vocab,)
    assert np.array_equal(view, engine.logits(PROMPT)[-1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"vram_capacity": "lots"}, ps.RequestError),
        ({"vram_capacity": 0}, ps.RequestError),
        ({"vram_capacity": 1.5}, TypeError),
        ({"seed": -1}, ps.RequestError),
        ({"seed": "x"}, TypeError),
        ({"map_bytes_per_gib": -1}, ps.RequestError),
        ({"map_bytes_per_gib": (1 << 30) + 1}, ps.RequestError),
        ({"map_bytes_per_gib": 0.5}, TypeError),
        ({"delays": 1}, TypeError),
        ({"profile": {"warp": 9}}, ps.RequestError),
        ({"profile": {"gpu_flops": 0}}, ps.RequestError),
        ({"profile": {"gpu_flops": "fast"}}, TypeError),
        ({"profile": 3}, TypeError),
        ({"faults": [("meteor", 0)]}, ps.RequestError),
        ({"faults": [("alloc", -1)]}, ps.RequestError),
        ({"faults": ["alloc"]}, TypeError),
        ({"faults": [("alloc", 0)] * 9}, ps.RequestError),
    ],
)
def test_emulated_devices_refuse(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ps.EmuDevice(**options)


# ---- life ----


def test_use_after_close(llama: str, heap: None) -> None:
    engine = ps.Engine(llama, device="emu", n_ctx=N_CTX)
    stream = engine.stream(PROMPT, max_tokens=50, logit_bias={2: -1e9})
    next(stream)
    view = engine.last_logits
    engine.close()
    engine.close()
    assert engine.closed
    assert view is not None
    assert np.isfinite(view).all()
    with pytest.raises(ps.ClosedError):
        next(stream)
    for use in (
        lambda: engine.logits(PROMPT),
        lambda: engine.generate("x"),
        lambda: engine.stream("x"),
        lambda: engine.create_completion("x"),
        lambda: engine.create_chat_completion([]),
        lambda: engine.stats,
        lambda: engine.last_logits,
        lambda: engine.reset(),
        lambda: engine.device,
        engine.__enter__,
    ):
        with pytest.raises(ps.ClosedError):
            use()
    assert "closed" in repr(engine)
    assert engine.plan.explain()


def test_del_frees_everything(llama: str, heap: None) -> None:
    engine = ps.Engine(llama, device="emu", n_ctx=N_CTX)
    stream = engine.stream(PROMPT, max_tokens=9)
    next(stream)
    del engine, stream


def test_an_abandoned_stream_is_in_nobodys_way(engine: ps.Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=8, temperature=0)
    bias = {engine.tokenizer.eos_id or 0: -1e9}
    kept = engine.stream(PROMPT, max_tokens=50, logit_bias=bias)
    next(kept)
    assert engine.generate(PROMPT, max_tokens=8, temperature=0) == expected
    with pytest.raises(ps.ClosedError):
        next(kept)
    for _ in engine.stream(PROMPT, max_tokens=50, logit_bias=bias):
        break
    assert engine.generate(PROMPT, max_tokens=8, temperature=0) == expected


def test_stream_is_generate_in_pieces(engine: ps.Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "seed": 4}
    pieces = list(engine.stream(PROMPT, **options))
    assert len(pieces) > 1
    assert "".join(pieces) == engine.generate(PROMPT, **options)
    assert engine.generate(PROMPT, max_tokens=30, seed=5) != "".join(pieces)


def test_copies_and_pickles_of_engines_are_refused(engine: ps.Engine) -> None:
    import pickle

    with pytest.raises(TypeError):
        copy.copy(engine)
    with pytest.raises(TypeError):
        pickle.dumps(engine)
    model = pickle.loads(pickle.dumps(engine.model))
    assert model.digest == engine.model.digest


# ---- threads ----


def test_a_second_thread_is_told_at_once(slow_engine: ps.Engine) -> None:
    errors: list[BaseException] = []
    worker = threading.Thread(target=lambda: slow_engine.generate(LONG_PROMPT, max_tokens=4))
    worker.start()
    time.sleep(0.2)
    for call in (
        lambda: slow_engine.generate(PROMPT),
        lambda: slow_engine.logits(PROMPT),
        lambda: slow_engine.stream(PROMPT),
        slow_engine.reset,
        slow_engine.close,
    ):
        start = time.perf_counter()
        try:
            call()
        except ps.BusyError as error:
            errors.append(error)
        assert time.perf_counter() - start < 0.1
    assert slow_engine.stats["budget_bytes"] == 0  # looking is allowed
    assert worker.is_alive()
    worker.join()
    assert len(errors) == 5
    slow_engine.generate(PROMPT, max_tokens=1)


def test_other_threads_run_meanwhile(slow_engine: ps.Engine) -> None:
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    counter = threading.Thread(target=count)
    counter.start()
    start = time.perf_counter()
    slow_engine.logits(LONG_PROMPT[:1000])
    elapsed = time.perf_counter() - start
    done.set()
    counter.join()
    assert ticks > elapsed / 0.005 / 10


def test_engines_of_one_model_in_threads(moe: str, heap: None) -> None:
    model = ps.Model(moe)
    with ps.Engine(model, device="host", n_ctx=N_CTX, threads=1) as engine:
        expected = engine.logits(PROMPT)
    results: list[bool] = []

    def work() -> None:
        with ps.Engine(model, device="emu", n_ctx=N_CTX, threads=1) as engine:
            for _ in range(3):
                results.append(np.array_equal(engine.logits(PROMPT), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 12


# ---- Ctrl-C ----


def run_script(script: str, *args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PIPESHARD_CPU_VARIANT": "ref"},
        check=False,
    )


def test_ctrl_c_is_answered_and_the_engine_goes_on(llama: str) -> None:
    script = """
        import os, signal, sys, threading, time
        import pipeshard as ps
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
        engine = ps.Engine(sys.argv[1], device="host", n_ctx=2048, threads=1)
        expected = engine.generate([5] * 20, max_tokens=8, temperature=0)
        for call in (lambda: engine.logits([5] * 2000),
                     lambda: engine.generate([6] * 2000, max_tokens=4),
                     lambda: list(engine.stream([5] * 20, max_tokens=100000, seed=1,
                                                logit_bias={engine.tokenizer.eos_id or 0: -1e9}))):
            sent = []
            def interrupt():
                sent.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGINT)
            timer = threading.Timer(0.3, interrupt)
            timer.start()
            try:
                call()
                print("finished")
            except KeyboardInterrupt:
                print("late" if time.perf_counter() - sent[0] > 0.2 else "interrupted")
            assert engine.generate([5] * 20, max_tokens=8, temperature=0) == expected
        print("same")
    """
    done = run_script(script, llama)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted"] * 3 + ["same"]


def test_a_signal_handlers_own_exception_comes_out(slow_engine: ps.Engine) -> None:
    def handler(*_: object) -> None:
        raise LookupError("from the handler")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(LookupError):
            slow_engine.logits(LONG_PROMPT)
    finally:
        signal.signal(signal.SIGUSR1, before)
    slow_engine.generate(PROMPT, max_tokens=1)


def test_engines_left_open_end_with_the_process(llama: str) -> None:
    script = """
        import sys, threading
        import pipeshard as ps
        engine = ps.Engine(sys.argv[1], device="emu", n_ctx=64)
        other = ps.Engine(sys.argv[1], device="host", n_ctx=64)
        stream = engine.stream([1, 2, 3], max_tokens=50)
        next(stream)
        view = engine.last_logits
        print("end")
    """
    done = run_script(script, llama)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_daemon_thread_at_work_does_not_hang_the_exit(llama: str) -> None:
    script = """
        import sys, threading, time
        import pipeshard as ps
        engine = ps.Engine(sys.argv[1], device="host", n_ctx=2048, threads=1)
        threading.Thread(target=lambda: engine.logits([5] * 2000), daemon=True).start()
        time.sleep(0.3)
        print("end", flush=True)
    """
    start = time.perf_counter()
    done = run_script(script, llama)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end\n"
    assert time.perf_counter() - start < 30


# ---- leaks ----


def resident_bytes() -> int:
    """But for huge pages, of which the kernel makes more behind our back wherever it was told that it may."""
    text = Path("/proc/self/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if ":  " in line}
    return (kib["Rss"] - kib["AnonHugePages"]) << 10


def test_a_thousand_calls_grow_nothing(llama: str) -> None:
    with ps.Engine(llama, device="emu", n_ctx=64, threads=1) as engine:

        def calls(n: int) -> tuple[tuple[int, int], int, int]:
            for i in range(n):
                engine.generate(PROMPT[: 1 + i % 20], max_tokens=2, seed=i, stop=["zz"])
            gc.collect()
            return _core._heap_stats()[:2], sys.getallocatedblocks(), resident_bytes()

        heap, blocks, resident = calls(200)  # lists of passes are kept for the shapes seen
        after = calls(1000)
    assert after[0] == heap
    assert after[1] - blocks < 500
    # what was allocated before is touched little by little: rings of jobs in their first round
    assert after[2] - resident < 12 << 20


@pytest.mark.parametrize("fresh_model", [True, False])
def test_a_hundred_engines_give_everything_back(moe: str, heap: None, fresh_model: bool) -> None:
    shared = ps.Model(moe)
    n_fds = len(os.listdir("/proc/self/fd"))
    n_threads = threading.active_count()

    def open_and_close(i: int) -> None:
        device = ("host", "emu")[i % 2]
        with ps.Engine(
            moe if fresh_model else shared, device=device, n_ctx=64, threads=1
        ) as engine:
            engine.logits([1, 2, 3])

    for i in range(10):
        open_and_close(i)
    gc.collect()
    rss = resident_bytes()
    for i in range(100):
        open_and_close(i)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == n_fds
    assert threading.active_count() == n_threads
    assert resident_bytes() - rss < 8 << 20


# ---- plans as data ----


def test_plan_survives_a_file(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with ps.Engine(llama, device="emu", n_ctx=N_CTX, vram="600KiB", n_seq=2) as engine:
        plan, expected = engine.plan, engine.logits(PROMPT)
        plan.save(path)
        peak = engine.stats["peak_bytes"]
    loaded = ps.Plan.load(path)
    assert loaded.to_dict() == plan.to_dict()
    assert loaded == plan
    assert loaded.diff(plan) == ""
    for given in (loaded, path, str(path)):
        with ps.Engine(llama, device="emu", plan=given) as engine:
            assert engine.n_ctx == N_CTX
            assert engine.plan.diff(plan) == ""
            assert engine.stats["peak_bytes"] == peak
            assert np.array_equal(engine.logits(PROMPT), expected)


def test_plan_can_be_edited_by_hand(llama: str, tmp_path: Path) -> None:
    with ps.Engine(llama, device="emu", n_ctx=N_CTX, vram="1GiB") as engine:
        plan, expected = engine.plan, engine.logits(PROMPT)
    data = plan.to_dict()
    for units in data["places"].values():
        units["blk.1.ffn"] = "cpu"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    edited = ps.Plan.load(path)
    assert "blk.1.ffn" in plan.diff(edited)
    assert len(plan.diff(edited).splitlines()) == 2 + 2 * len(plan.tiers)
    with ps.Engine(llama, device="emu", plan=edited) as engine:
        assert engine.plan.places["decode"]["blk.1.ffn"] == "cpu"
        assert engine.stats["peak_bytes"] < plan.needed_bytes
        assert np.array_equal(engine.logits(PROMPT), expected)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d["places"]["decode"].pop("head"), ps.PlanError),
        (lambda d: d["places"].pop("small"), ps.PlanError),
        (lambda d: d["places"]["decode"].update({"blk.9.attn": "cpu"}), ps.PlanError),
        (lambda d: d["places"].update({"lunch": {}}), ps.PlanError),
        (lambda d: d["places"]["decode"].update(head="cpu"), ps.PlanError),
        (lambda d: d["places"]["decode"].update(head={"vram": 0.5}), ps.PlanError),
        (lambda d: d["model"].update(sha256="0" * 64), ps.PlanError),
        (lambda d: d["tiers"].pop(), ps.PlanError),
        (lambda d: d.update(chunk_tok=1 << 20), ps.PlanError),
        (lambda d: d.update(budget_bytes=1000), ps.BudgetError),
    ],
)
def test_a_wrong_plan_is_refused(
    llama: str, change: Any, error: type[Exception], heap: None
) -> None:
    with ps.Engine(llama, device="emu", n_ctx=N_CTX, vram="1GiB") as engine:
        data = engine.plan.to_dict()
    change(data)
    path = Path(os.devnull)
    plan = ps.plan._Reader(str(path)).plan(data)  # type: ignore[attr-defined]
    with pytest.raises(error):
        ps.Engine(llama, device="emu", plan=plan)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "json"),
        ("[]", "json"),
        ("{}", "version"),
        ('{"version": 99}', "version"),
        ('{"version": true}', "version"),
        ('{"version": 1}', "model"),
        ('{"version": 1, "model": {}}', "model.arch"),
        ("[" * 100000, "json"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ps.FormatError) as info:
        ps.Plan.load(path)
    assert info.value.field == field
    assert info.value.path == str(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", 0),
        ("n_ctx", "128"),
        ("n_seq", 1.0),
        ("budget_bytes", -1),
        ("chunk_tok", None),
        ("tiers", {}),
        ("places", []),
        ("kv", 3),
        ("kv_vram_tok", {"x": 1}),
        ("slot_bytes", 1 << 70),
        ("bytes", {"weights": "many"}),
    ],
)
def test_a_wrong_field_is_named(engine: ps.Engine, name: str, value: Any) -> None:
    data = engine.plan.to_dict() | {name: value}
    with pytest.raises(ps.FormatError) as info:
        ps.plan._Reader("x").plan(data)  # type: ignore[attr-defined]
    assert info.value.field is not None


def test_plan_files_that_cannot_be_read_or_written(engine: ps.Engine, tmp_path: Path) -> None:
    with pytest.raises(ps.FileError):
        ps.Plan.load(tmp_path / "none.json")
    with pytest.raises(ps.FileError):
        engine.plan.save(tmp_path / "no" / "folder.json")
    with pytest.raises(TypeError):
        engine.plan.diff("plan")  # type: ignore[arg-type]


def test_a_plan_and_wishes_that_contradict_it(llama: str) -> None:
    with ps.Engine(llama, device="emu", n_ctx=N_CTX) as engine:
        plan = engine.plan
    for options in ({"n_ctx": 64}, {"n_seq": 2}, {"kv": "q8_0"}):
        with pytest.raises(ps.RequestError) as info:
            ps.Engine(llama, device="emu", plan=plan, **options)  # type: ignore[arg-type]
        assert info.value.argument == next(iter(options))
    with pytest.raises(ps.PlanError):  # units in VRAM where there is none
        ps.Engine(llama, device="host", plan=plan)


def test_explain_says_what_is_where(moe: str) -> None:
    with ps.Engine(moe, device="emu", n_ctx=N_CTX, vram="2MiB") as engine:
        plan = engine.plan
    text = plan.explain()
    assert "blk.0-1.attn" in text
    assert "expert" in text
    assert "weights" in text
    assert text in str(plan)
    assert plan._repr_html_().startswith("<pre>")
    with pytest.raises(AttributeError):
        plan.n_ctx = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.places["decode"]["head"] = "cpu"  # type: ignore[index]

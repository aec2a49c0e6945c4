"""Engines against the golden models: logits within the bars on every device and CPU variant, generation, reuse of
prefixes, budgets, plans."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

import pipeshard as ps
from pipeshard import _core

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
BARS = json.loads((GOLDEN / "bars.json").read_text())
MODELS = sorted(path.stem for path in GOLDEN.glob("*.gguf"))
VARIANTS = _core.build_info()["cpu_variants_here"]
N_CTX = 128


def golden(name: str) -> Any:
    return np.load(GOLDEN / f"{name}.npz")


def check_bar(name: str, logits: Any) -> None:
    expected = golden(name)["reference"]
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    assert reference.nmse(logits, expected) <= BARS[name]["bar"]
    assert reference.top1_disagreements(logits, expected) == []


def open_engine(name: str, device: str = "emu", **options: Any) -> ps.Engine:
    return ps.Engine(
        GOLDEN / f"{name}.gguf", **({"device": device, "n_ctx": N_CTX, "threads": 2} | options)
    )


# ---- parity ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_golden_logits(
    name: str, device: str, variant: str, monkeypatch: pytest.MonkeyPatch, heap: None
) -> None:
    monkeypatch.setenv("PIPESHARD_CPU_VARIANT", variant)
    with open_engine(name, device) as engine:
        assert engine.device_info["cpu_variant"] == variant
        logits = engine.logits(golden(name)["tokens"])
        check_bar(name, logits)
        assert np.array_equal(engine.last_logits, logits[-1])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    "name", ["llama.q4_k_m", "qwen3moe.q4_k_m", "gpt-oss.mxfp4", "gemma3.q4_0"]
)
def test_golden_logits_under_a_budget(name: str, share: float) -> None:
    """Some units in VRAM, the others on the CPU."""
    with open_engine(name) as engine:
        most = engine.plan.needed_bytes
        resident = engine.logits(golden(name)["tokens"])
    with pytest.raises(ps.BudgetError) as info:
        open_engine(name, vram=0)
    least = info.value.smallest
    with open_engine(name, vram=int(least + share * (most - least))) as engine:
        logits = engine.logits(golden(name)["tokens"])
        check_bar(name, logits)
        # the same kernels on both sides
        assert np.array_equal(logits, resident)
        stats = engine.stats
        assert 0 < stats["peak_bytes"] <= stats["budget_bytes"]
        assert (
            sum(stats["peak_bytes_by_kind"].values())
            == stats["peak_bytes"]
            == engine.plan.needed_bytes
        )


@pytest.mark.parametrize("name", ["llama-small.f16", "llama-small.q8_0"])
def test_models_kept_outside_the_checkout(name: str, device: str, shared_folder: Path) -> None:
    path = shared_folder / "golden" / f"{name}.gguf"
    if not path.exists():
        pytest.skip("no such file")
    expected = np.load(path.with_suffix(".npz"))
    with ps.Engine(path, device=device, n_ctx=N_CTX) as engine:
        logits = engine.logits(expected["tokens"])
        assert reference.nmse(logits, expected["reference"]) <= BARS[name]["bar"]
        text_ids = expected["greedy"].tolist()
        if name.endswith("f16"):
            assert greedy_ids(engine, expected["tokens"].tolist(), len(text_ids)) == text_ids


def greedy_ids(engine: ps.Engine, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["nemotron.bf16", "qwen2vl.f16"])
def test_greedy_continuation(name: str, device: str) -> None:
    """Dense models with 16-bit weights part from the recorded continuation nowhere."""
    expected = golden(name)
    with open_engine(name, device) as engine:
        assert greedy_ids(engine, expected["tokens"].tolist(), 16) == expected["greedy"].tolist()


def test_q8_0_cache_stays_close(device: str) -> None:
    name = "llama.q4_k_m"
    with open_engine(name, device, kv="q8_0") as engine:
        assert (
            reference.nmse(engine.logits(golden(name)["tokens"]), golden(name)["reference"]) < 2e-3
        )


# ---- generation ----


def test_decode_equals_one_long_prompt(
    llama: str, device: str, monkeypatch: pytest.MonkeyPatch, heap: None
) -> None:
    """What generate computes token by token is what logits computes at once; with the reference's kernels, since
    faster ones round inputs differently for few and for many tokens, and random weights are full of near ties."""
    monkeypatch.setenv("PIPESHARD_CPU_VARIANT", "ref")
    prompt = golden("llama.q4_k_m")["tokens"].tolist()
    with ps.Engine(llama, device=device, n_ctx=N_CTX, threads=2) as engine:
        answer = engine.create_completion(prompt, max_tokens=8, temperature=0, logprobs=1)
        text = engine.generate(prompt, max_tokens=8, temperature=0)
        ids = greedy_ids(engine, prompt, 8)
        expected = engine.tokenizer.decode(prompt + ids)[len(engine.tokenizer.decode(prompt)) :]
    assert text == expected == answer["choices"][0]["text"]  # type: ignore[index,call-overload]


def test_reused_prefixes_show_nowhere(device: str, llama: str) -> None:
    """Whatever ran before, a call gives what it gives in a fresh engine, to the bit on kernels of the CPU."""
    prompt = golden("llama.q4_k_m")["tokens"].tolist()
    prompts = [
        prompt,
        prompt[:30] + [7] * 3,
        prompt[:30] + [9] * 20,
        prompt,
        prompt[:5],
        prompt + [4],
        prompt,
    ]

    def run(engine: ps.Engine, ids: list[int]) -> tuple[str, Any]:
        text = engine.generate(ids, max_tokens=6, seed=5)
        n_cached = engine.stats["n_cached"]
        engine.generate(ids, max_tokens=1, temperature=0)
        return text, engine.last_logits.copy(), n_cached  # type: ignore[return-value,union-attr]

    options: Any = {"device": device, "n_ctx": N_CTX, "threads": 2}
    with ps.Engine(llama, **options) as engine, ps.Engine(llama, **options) as fresh:
        cached = []
        for ids in prompts:
            text, logits, n_cached = run(engine, ids)  # type: ignore[misc]
            fresh.reset()
            fresh_text, fresh_logits, _ = run(fresh, ids)  # type: ignore[misc]
            if device != "cuda":  # its library chooses kernels by the number of tokens
                assert text == fresh_text
                assert np.array_equal(logits, fresh_logits)
            else:
                assert np.allclose(logits, fresh_logits, atol=0.05 * np.abs(fresh_logits).max())
            cached.append(n_cached)
    assert cached == [0, 24, 30, 30, 0, 0, 31]


def test_a_conversation_goes_on_from_its_answers(device: str, llama: str) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with ps.Engine(llama, device=device, n_ctx=N_CTX, threads=2) as engine:
        word = engine.tokenizer.token_id("<0x41>")
        assert word is not None

        def ask(messages: list[Any]) -> str:
            answer: Any = engine.create_chat_completion(
                messages, max_tokens=6, logit_bias={word: 1e9}, chat_template=template
            )
            return str(answer["choices"][0]["message"]["content"])

        messages: list[Any] = [{"role": "user", "content": "abcdefghijklmnop"}]
        messages.append({"role": "assistant", "content": ask(messages)})
        assert messages[1]["content"] == "A" * 6
        n_first = engine.stats["n_prompt"]
        messages.append({"role": "user", "content": " qrstuvwxyzabcdefghi"})
        ask(messages)
        # the last token of an answer never ran
        assert engine.stats["n_cached"] == n_first + 5
        text = "".join(m["content"] for m in messages)
        engine.generate(engine.tokenizer.encode_chat(text), max_tokens=1)
        assert engine.stats["n_cached"] == n_first


def test_calls_repeat_bit_by_bit(moe: str, device: str) -> None:
    prompt = golden("qwen3moe.q4_k_m")["tokens"].tolist()

    def run(engine: ps.Engine) -> list[Any]:
        return [
            engine.logits(prompt),
            engine.generate(prompt[:30], max_tokens=6, seed=3),
            engine.logits(prompt[:17]),
            engine.last_logits,
        ]

    with ps.Engine(moe, device=device, n_ctx=N_CTX, threads=2) as engine:
        first = run(engine)
        engine.reset()
        again = run(engine)
    with ps.Engine(moe, device=device, n_ctx=N_CTX, threads=1) as engine:
        other_threads = run(engine)
    for results in (again, other_threads):
        for a, b in zip(first, results, strict=True):
            assert np.array_equal(a, b)


def test_a_full_context_ends_with_length(llama: str, device: str) -> None:
    with ps.Engine(llama, device=device, n_ctx=48) as engine:
        answer: Any = engine.create_completion(
            golden("llama.q4_k_m")["tokens"].tolist(),
            max_tokens=100,
            temperature=0,
            logit_bias={engine.tokenizer.eos_id or 0: -float("inf")},
        )
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 48
        assert len(engine.logits(list(range(48)))) == 48


def test_stats_add_up(llama: str, device: str) -> None:
    with ps.Engine(llama, device=device, n_ctx=N_CTX, threads=2) as engine:
        before, n_bytes = engine.stats, engine.model.n_bytes
        assert (before["n_prompt"], before["n_gen"], before["ttft_s"], before["tps"]) == (
            0,
            0,
            None,
            None,
        )
        engine.generate(list(range(3, 33)), max_tokens=10, temperature=0)
        stats = engine.stats
    wanted = (
        "n_prompt n_gen ttft_s tps e2e_s predicted_ttft_s predicted_tps budget_bytes baseline_bytes peak_bytes "
        "peak_bytes_by_kind locked_bytes ram_bytes h2d_bytes d2h_bytes bounce_bytes disk_bytes wall_s"
    )
    assert set(wanted.split()) <= set(stats)
    assert stats["n_prompt"] == 30
    assert 1 < stats["n_gen"] <= 10
    assert 0 < stats["ttft_s"] < stats["e2e_s"]
    assert stats["tps"] == pytest.approx(
        (stats["n_gen"] - 1) / (stats["e2e_s"] - stats["ttft_s"]), rel=0.2
    )
    assert stats["wall_s"] > 0
    if device == "host":
        assert stats["peak_bytes"] == stats["h2d_bytes"] == 0
        assert stats["ram_bytes"] >= n_bytes
    else:
        assert stats["peak_bytes"] <= stats["budget_bytes"]
        assert stats["h2d_bytes"] > before["h2d_bytes"]


def test_emulated_time_is_virtual_and_repeats(llama: str) -> None:
    def run(**options: Any) -> tuple[float, float]:
        device = ps.EmuDevice(**options)
        with ps.Engine(llama, device=device, n_ctx=N_CTX, threads=2) as engine:
            engine.generate(list(range(3, 33)), max_tokens=6, temperature=0)
            return engine.stats["ttft_s"], engine.stats["tps"]

    first = run()
    assert run() == first
    slow = run(profile={"launch_ns": 3_000_000})
    assert slow[0] > 10 * first[0]
    assert slow[1] < first[1] / 10


def test_delays_change_no_bit(moe: str) -> None:
    tokens = golden("qwen3moe.q4_k_m")["tokens"]
    with ps.Engine(moe, device="emu", n_ctx=N_CTX, threads=2) as engine:
        expected, most = engine.logits(tokens), engine.plan.needed_bytes
    for seed in (1, 2):
        device = ps.EmuDevice(seed=seed, delays=True)
        with ps.Engine(moe, device=device, n_ctx=N_CTX, vram=most // 2, threads=2) as engine:
            assert np.array_equal(engine.logits(tokens), expected)


# ---- budgets ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama.q4_k_m", {}),
        ("llama.q4_k_m", {"n_ctx": 4096, "n_seq": 3}),
        ("qwen3moe.q4_k_m", {"n_ctx": 100}),
        ("gemma3.q4_0", {"n_seq": 100}),
    ],
)
def test_the_smallest_budget_works_and_one_byte_less_does_not(
    name: str, options: dict[str, Any], heap: None
) -> None:
    with pytest.raises(ps.BudgetError) as info:
        open_engine(name, vram=0, **options)
    error = info.value
    assert error.budget == 0
    assert error.needed >= error.smallest > 0
    assert str(error.smallest) in str(error)
    with open_engine(name, vram=error.smallest, **options) as engine:
        assert engine.stats["peak_bytes"] == error.smallest
        engine.generate([1, 2, 3], max_tokens=2)
    with pytest.raises(ps.BudgetError) as info:
        open_engine(name, vram=error.smallest - 1, **options)
    assert info.value.smallest == error.smallest


def test_more_budget_keeps_more_in_vram(moe: str) -> None:
    model = ps.Model(moe)
    with ps.Engine(model, device="emu", n_ctx=N_CTX) as engine:
        most = engine.plan.needed_bytes
        assert set(engine.plan.places["decode"].values()) == {"vram"}
    resident = []
    for share in (0.25, 0.5, 0.75, 1.0):
        with ps.Engine(model, device="emu", n_ctx=N_CTX, vram=int(share * most)) as engine:
            resident.append(engine.plan.bytes["weights"])
    assert resident == sorted(resident)
    assert len(set(resident)) == len(resident)
    assert resident[-1] >= model.n_bytes


def test_a_small_device_bounds_the_plan(llama: str) -> None:
    device = ps.EmuDevice(vram_capacity="1MiB")
    for vram in (None, "1GiB"):
        with ps.Engine(llama, device=device, n_ctx=N_CTX, vram=vram) as engine:
            assert engine.stats["peak_bytes"] <= 1 << 20
    with ps.Engine(llama, device=ps.EmuDevice(vram_capacity="8GiB"), n_ctx=N_CTX) as engine:
        assert engine.stats["budget_bytes"] == (8 << 30) - (8 << 30) // 20
    with ps.Engine(llama, device=ps.EmuDevice(vram_capacity="1GiB"), n_ctx=N_CTX) as engine:
        assert engine.stats["budget_bytes"] == (1 << 30) - (256 << 20)


def test_auto_takes_emu_for_a_budget_and_host_without(llama: str) -> None:
    if _core.cuda_status()[0]:
        pytest.skip("there is a GPU")
    with ps.Engine(llama, n_ctx=N_CTX) as engine:
        assert engine.device == "host"
    with ps.Engine(llama, n_ctx=N_CTX, vram="1MiB") as engine:
        assert engine.device == "emu"


def test_a_budget_of_a_quarter_generates(llama: str) -> None:
    model = ps.Model(llama)
    with ps.Engine(model, n_ctx=N_CTX, vram=model.n_bytes // 4, device="emu") as engine:
        assert engine.stats["peak_bytes"] <= model.n_bytes // 4
        assert isinstance(engine.generate("pad", max_tokens=4), str)


def test_host_memory_limits(llama: str, heap: None) -> None:
    for name in ("ram_limit", "locked_limit"):
        with pytest.raises(ps.HostMemoryError, match=name):
            ps.Engine(llama, device="host", n_ctx=N_CTX, **{name: "1KiB"})  # type: ignore[arg-type]
        ps.Engine(llama, device="host", n_ctx=N_CTX, **{name: "1GiB"}).close()  # type: ignore[arg-type]


# ---- one model, many engines ----


def test_engines_share_a_models_weights(llama: str, heap: None) -> None:
    model = ps.Model(llama)
    first = ps.Engine(model, device="host", n_ctx=64)
    engines = [ps.Engine(model, device="host", n_ctx=64) for _ in range(3)]
    tokens = golden("llama.q4_k_m")["tokens"]
    assert all(np.array_equal(e.logits(tokens), first.logits(tokens)) for e in engines)
    assert first.stats["disk_bytes"] > 0
    assert [e.stats["disk_bytes"] for e in engines] == [0, 0, 0]
    assert model.n_bytes <= model._core.image_bytes < 1.1 * model.n_bytes
    del model
    gc.collect()
    for engine in [first, *engines]:
        engine.close()


def test_a_context_of_zero_is_the_models_own(llama: str) -> None:
    with ps.Engine(llama, device="host", n_ctx=0) as engine:
        assert engine.n_ctx == engine.model.n_ctx_train == 512

"""Synthetic models: their files against the golden ones, their weights, their routing, their vocabularies."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import reference
from gguf.quants import dequantize

import pipeshard as ps
from pipeshard import synth as synth_module
from pipeshard import synth_blocks, synth_models, synth_vocab
from pipeshard.errors import FileError, RequestError
from pipeshard.synth import MODELS, Shape, synth
from pipeshard.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"

TINY = [name for name in MODELS if name.startswith("tiny-")]
FORMATS = list(synth_blocks.FORMATS)


def type_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def write(path: Path, shape: str | Shape, **options: object) -> gguf.GGUFReader:
    synth(shape, path, progress=False, **options)  # type: ignore[arg-type]
    return gguf.GGUFReader(path)


# -- blocks ---------------------------------------------------------------------------------------


def values_of(name: str, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    raw = blocks.reshape(-1).view({"f32": np.float32, "f16": np.float16}.get(name, np.uint8))
    if raw.dtype == np.uint8 and name != "bf16":
        raw = raw.reshape(len(blocks), -1)
    return np.asarray(dequantize(raw, type_of(name)), np.float64).reshape(-1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("std", [1.0, 8e-4])
def test_blocks_have_mean_zero_and_the_wanted_deviation(name: str, std: float) -> None:
    fmt = synth_blocks.FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[type_of(name)] == (fmt.block_elems, fmt.block_bytes)
    assert type_of(name) == fmt.type_id
    n = 1 << 19
    blocks = synth_blocks.make_blocks(fmt, n // fmt.block_elems, std, synth_blocks.rng_for(7))
    x = values_of(name, blocks)
    assert np.isfinite(x).all()
    assert x.std() == pytest.approx(std, rel=0.01)
    assert abs(x.mean()) < 4 * std / math.sqrt(n)  # four standard errors
    # each weight of a block, and each block: no position and no scale is off-centre
    if fmt.block_elems > 1:
        table = x.reshape(-1, fmt.block_elems)
        assert np.abs(table.mean(axis=0)).max() < 6 * std / math.sqrt(len(table))
        assert table.std(axis=0).min() > 0.9 * std
        assert np.abs(table).max(axis=1).min() > 0.1 * std


@pytest.mark.parametrize(
    ("values", "sigma"),
    [
        (synth_blocks._IQ4_VALUES, 45.0),
        (synth_blocks._MXFP4_VALUES, 4.4),
        ((-2, -1, 0, 1), 1.1),
        *((synth_blocks._signed_range(bits), sigma) for bits, sigma in ((3, 1.5), (4, 2.7), (6, 11.0))),
    ],
)  # fmt: skip
def test_codes_add_up_to_zero_and_all_occur(values: tuple[int, ...], sigma: float) -> None:
    codes = synth_blocks._bell(values, sigma)
    assert codes.table.shape == (256,)
    assert set(codes.table.tolist()) == set(range(len(values)))
    assert sum(values[code] for code in codes.table) == 0


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "q2_k", "q4_k", "q5_k"])
def test_offsets_cancel_the_centre_exactly(name: str) -> None:
    """Zero must be among a block's values: so it is not the draw that has mean zero, but the block."""
    fmt = synth_blocks.FORMATS[name]
    x = values_of(name, synth_blocks.make_blocks(fmt, 64, 3e-3, synth_blocks.rng_for(1)))
    assert (x == 0.0).mean() > 0.02


# -- files ----------------------------------------------------------------------------------------

# How each golden model differs from the tiny model of its architecture.
GOLDEN: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama.q4_k_m": ("tiny-llama", "q4_k_m", {}),
    "llama3-rope.q8_0": ("tiny-llama3", "q8_0", {"tied": False}),
    "mixtral.q4_0": ("tiny-mixtral", "q4_0", {"n_expert": 4}),
    "nemotron.bf16": ("tiny-nemotron", "bf16", {}),
    "qwen2.q8_0": ("tiny-qwen2", "q8_0", {}),
    "qwen2vl.f16": ("tiny-qwen2vl", "f16", {}),
    "qwen3.q6_k": ("tiny-qwen3", "q6_k", {}),
    "qwen3moe.q4_k_m": ("tiny-qwen3moe", "q4_k_m", {"n_expert": 8, "n_expert_used": 3}),
    "gemma3.q4_0": ("tiny-gemma3", "q4_0", {}),
    "phi3.q4_1": ("tiny-phi3", "q4_1", {}),
    "gpt-oss.mxfp4": ("tiny-gpt-oss", "mxfp4", {"n_expert": 4}),
}


@pytest.mark.parametrize("golden", GOLDEN)
def test_tensors_and_keys_are_those_of_the_golden_file(golden: str) -> None:
    """Names, dimensions, formats and metadata keys of files that llama.cpp's tools made and read."""
    name, fmt, other = GOLDEN[golden]
    reader = gguf.GGUFReader(DATA / "golden" / f"{golden}.gguf")
    shape = replace(MODELS[name], n_ff=256, n_vocab=320, **other)  # type: ignore[arg-type]
    plan = synth_models.tensors(shape, fmt)
    ours = {t.name: (t.dims, t.fmt.name.upper()) for t in plan}
    theirs = {t.name: (tuple(t.shape.tolist()), t.tensor_type.name) for t in reader.tensors}
    assert ours == theirs
    keys = synth_models.metadata(shape)
    wanted = {
        key: value.contents()
        for key, value in reader.fields.items()
        if key.startswith(f"{shape.arch}.")
    }
    # the converter of real nemotron models states that rope is not scaled
    assert set(keys) - {"nemotron.rope.scaling.type"} == set(wanted)
    # these the golden models chose otherwise than the tiny ones
    free = ("rope.freq_base", "epsilon", "feed_forward_length")
    for key, value in wanted.items():
        if not key.endswith(free):
            assert keys[key] == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("golden", ["q2_k", "q3_k", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "q4_0"])
def test_pure_puts_everything_into_one_format(golden: str) -> None:
    reader = gguf.GGUFReader(DATA / "golden" / f"llama-small.{golden}.gguf")
    shape = replace(MODELS["tiny-llama"], n_layer=1, n_ff=256, n_vocab=320)
    plan = synth_models.tensors(shape, golden, pure=True)
    assert {t.name: t.fmt.name.upper() for t in plan} == {
        t.name: t.tensor_type.name for t in reader.tensors
    }


# Tensors in published files, and parameters in billions as their cards state them.
@pytest.mark.parametrize(
    ("name", "n_tensors", "billions"),
    [
        ("Llama-3.2-1B", 147, 1.236), ("Llama-3.1-8B", 292, 8.030), ("Minitron-4B", 324, 4.191),
        ("Minitron-8B", 363, 8.414), ("Mixtral-8x7B", 323, 46.703), ("Qwen2-1.5B", 338, 1.544),
        ("Qwen2-VL-2B", 338, 1.544), ("Qwen3-4B", 398, 4.022), ("Qwen3-30B-A3B", 579, 30.532),
        ("Qwen3-235B-A22B", 1131, 235.094), ("Gemma-3-270M", 236, 0.268), ("Gemma-3-1B", 340, 1.000),
        ("Gemma-3-4B", 444, 3.880), ("Phi-3-mini", 195, 3.821), ("gpt-oss-20b", 459, 20.915),
    ],
)  # fmt: skip
def test_real_shapes(name: str, n_tensors: int, billions: float) -> None:
    plan = synth_models.tensors(MODELS[name], MODELS[name].file_type)
    assert len(plan) == n_tensors
    assert sum(t.n_elems for t in plan) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_names_are_found_whatever_their_punctuation() -> None:
    assert synth_models.find_model("qwen3 30b_a3b").name == "Qwen3-30B-A3B"
    assert synth_models.find_model("QWEN2VL-2B").name == "Qwen2-VL-2B"
    assert synth_models.find_file_type("Q4_K").name == "q4_k_m"


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    reader = write(path, name, seed=3)
    n_bytes = sum(int(t.n_bytes) for t in reader.tensors)
    assert path.stat().st_size >= reader.data_offset + n_bytes
    assert not path.with_name("m.gguf.part").exists()
    model = reference.load(path)
    tokens = np.random.default_rng(1).integers(0, MODELS[name].n_vocab, 32)
    trace: reference.Trace = {}
    logits = reference.logits(model, tokens, trace=trace)
    assert logits.std() == pytest.approx(2.0, rel=0.1)
    # the answers differ, and are not the question
    assert len(set(logits.argmax(axis=1))) > 20
    assert (logits.argmax(axis=1) == tokens).mean() < 0.1
    # embeddings dominate, and each block still counts
    last = MODELS[name].n_layer - 1
    added = trace[f"blk.{last}.x"] - trace["embd"]
    assert 0.1 < added.std() / trace["embd"].std() < 0.6
    for layer in range(last + 1):
        for part in ("attn_out", "ffn_out"):
            ratio = trace[f"blk.{layer}.{part}"].std() / trace["embd"].std()
            assert 0.3 < ratio * math.sqrt(2 * (last + 1) / synth_models.LAYERS_VARIANCE) < 1.5


def test_layers_and_vocabulary_can_be_chosen(tmp_path: Path) -> None:
    reader = write(tmp_path / "m.gguf", "tiny-qwen3", layers=12, vocab=700)
    assert reader.fields["qwen3.block_count"].contents() == 12
    assert reader.fields["qwen3.vocab_size"].contents() == 700
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert "blk.11.attn_q.weight" in shapes
    assert "blk.12.attn_q.weight" not in shapes
    assert shapes["token_embd.weight"] == [256, 700]
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 700


def test_the_content_follows_from_the_arguments_alone(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(3)]
    synth("tiny-mixtral", files[0], threads=1, progress=False)
    synth("tiny-mixtral", files[1], threads=5, progress=False)
    synth("tiny-mixtral", files[2], seed=1, progress=False)
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    same = np.frombuffer(first, np.uint8) == np.frombuffer(other, np.uint8)[: len(first)]
    assert same.mean() < 0.3


def test_no_two_experts_or_rows_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks have to be used more than once: pools of 1 MiB, pieces of 16 KiB."""
    monkeypatch.setattr(synth_module, "POOL_BYTES", 1 << 20)
    monkeypatch.setattr(synth_module, "_PIECE_BYTES", 16 << 10)
    monkeypatch.setattr(synth_module, "_JOB_BYTES", 64 << 10)
    shape = replace(MODELS["tiny-qwen3moe"], n_expert=32)
    reader = write(tmp_path / "m.gguf", shape)
    rows = set()
    n_rows = 0
    for tensor in reader.tensors:
        if "_exps" in tensor.name:
            data = np.asarray(tensor.data).reshape(32, 256, -1)
            assert len({expert.tobytes() for expert in data}) == 32
            rows |= {row.tobytes() for expert in data for row in expert}
            n_rows += 32 * 256
    # 7 MB out of two pools of 1 MiB: a piece begins at any block, so most rows are cut differently
    assert len(rows) > 0.7 * n_rows
    experts = next(t for t in reader.tensors if t.name == "blk.0.ffn_up_exps.weight")
    x = dequantize(experts.data, experts.tensor_type).reshape(32, -1).astype(np.float64)
    close = np.corrcoef(x) - np.eye(32)
    assert np.abs(close).max() < 0.1


# -- routing --------------------------------------------------------------------------------------

MIXTURE = replace(
    MODELS["tiny-qwen3moe"], n_layer=3, n_expert=128, n_expert_used=8, n_ff=64, n_vocab=4096
)


def chosen(path: Path, shape: Shape) -> list[npt.NDArray[np.int64]]:
    """How often each expert of each layer is chosen by 512 random tokens."""
    tokens = np.random.default_rng(11).integers(0, shape.n_vocab, 512)
    trace: reference.Trace = {}
    reference.logits(path, tokens, trace=trace)
    counts = []
    for layer in range(shape.n_layer):
        best = np.argsort(-trace[f"blk.{layer}.router"], axis=1)[:, : shape.n_expert_used]
        counts.append(np.bincount(best.reshape(-1), minlength=shape.n_expert))
    return counts


def test_routing_is_near_uniform(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, MIXTURE)
    for count in chosen(path, MIXTURE):
        assert count.min() > 0, "an expert that no token chose"
        assert (
            count.max() <= 1.65 * count.mean()
        )  # sampling alone makes the busiest of 128 1.4 to 1.6


def test_a_mean_other_than_zero_would_collapse_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above sees what it is there to see: all 16 nibbles of Q4_0 drawn evenly."""

    def even(name: str, out: npt.NDArray[np.uint8], std: float, rng: np.random.Generator) -> None:
        synth_blocks._put_f16(out, 0, np.full(len(out), std / 4.6, np.float32))
        out[:, 2:] = rng.integers(0, 256, (len(out), 16), np.uint8)

    monkeypatch.setitem(synth_blocks._FILL, "q4_0", even)
    path = tmp_path / "m.gguf"
    write(path, MIXTURE)
    assert max(count.max() / count.mean() for count in chosen(path, MIXTURE)) > 2.0


@pytest.mark.parametrize(("skew", "fmt"), [(0.7, "q4_0"), (1.2, "q4_k_m")])
def test_skewed_routing_follows_zipf(tmp_path: Path, skew: float, fmt: str) -> None:
    path = tmp_path / "m.gguf"
    write(path, MIXTURE, router_skew=skew, fmt=fmt)
    wanted = synth_module.popularity(128, 8, skew)
    counts = chosen(path, MIXTURE)
    for count in counts:
        share = np.sort(count)[::-1] / 512
        assert np.corrcoef(share, wanted)[0, 1] > 0.95
        assert share[:16].sum() == pytest.approx(wanted[:16].sum(), rel=0.15)
    # each layer has favourites of its own
    assert len({int(count.argmax()) for count in counts}) > 1


@pytest.mark.parametrize(
    ("n", "k", "skew"), [(128, 8, 0.0), (128, 8, 1.0), (8, 2, 2.0), (4, 4, 1.0)]
)
def test_popularity_adds_up(n: int, k: int, skew: float) -> None:
    share = synth_module.popularity(n, k, skew)
    assert share.sum() == pytest.approx(k)
    assert (np.diff(share) <= 1e-12).all()
    assert share[0] <= 1.0
    assert share[-1] > 0
    free = share[share < share.max() - 1e-9]
    if skew == 1.0 and free.size > 1:
        rank = np.arange(n - free.size + 1, n + 1)
        assert np.allclose(free * rank, free[0] * rank[0])


# -- vocabularies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma", "nemotron"])
def test_spm_words_can_be_reached_by_merges(kind: str) -> None:
    vocab = synth_vocab.make_vocab(kind, 21_000)
    known = set(vocab.tokens)
    assert len(known) == len(vocab.tokens) == len(vocab.types) == len(vocab.scores) == 21_000
    assert sum(kind == synth_vocab.BYTE for kind in vocab.types) == 256
    plain = [
        t for t, kind in zip(vocab.tokens, vocab.types, strict=True) if kind == synth_vocab.NORMAL
    ]
    assert all(
        len(t) == 1 or any(t[:i] in known and t[i:] in known for i in range(1, len(t)))
        for t in plain
    )
    assert all(0 <= i < 21_000 for i in vocab.ids.values())


@pytest.mark.parametrize("kind", ["llama3", "qwen", "gpt-oss", "tekken"])
def test_bpe_vocabularies_tokenise(kind: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = synth_vocab.make_vocab(kind, 30_000)
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    assert len(ids) == len(vocab.types) == 30_000
    merges = [tuple(merge.split(" ")) for merge in vocab.merges]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    text = "the cat sat on the mat: \u00e4\u00f6\u00fc \u4e2d\u6587 123"
    encoded = bpe.encode(text).ids
    assert bpe.decode(encoded, skip_special_tokens=False) == text
    assert len(encoded) < 0.8 * len(text.encode())


@pytest.mark.parametrize("name", TINY)
def test_special_tokens_and_template(name: str, tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    shape = MODELS[name]
    vocab = synth_vocab.make_vocab(shape.vocab, shape.n_vocab)
    assert vocab.types[vocab.ids["eos"]] == synth_vocab.CONTROL
    if vocab.chat_template:
        text = jinja2.Environment().from_string(vocab.chat_template).render(
            messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True, bos_token="<B>"
        )  # fmt: skip
        question, rest = text.split("hi")
        assert "user" in question
        assert "assistant" in rest
        assert text.startswith("<B>") == vocab.flags["add_bos_token"]


@pytest.mark.parametrize("name", TINY)
def test_our_tokenizer_takes_them(name: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", name)
    tokenizer = Tokenizer(tmp_path / "m.gguf")
    text = "the cat sat on the mat, \u00dcn\u00efcode \u4e2d\u6587 123\n\n  x"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())


# -- errors and the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"name": "llama-9"}, "name"),
        ({"fmt": "q9_9"}, "fmt"),
        ({"layers": 0}, "layers"),
        ({"vocab": 100}, "vocab"),
        ({"vocab": -1}, "vocab"),
        ({"threads": 0}, "threads"),
        ({"router_skew": 1.0}, "router_skew"),
        ({"router_skew": math.nan}, "router_skew"),
    ],
)
def test_bad_arguments(options: dict[str, object], argument: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as info:
        write(tmp_path / "m.gguf", **{"shape": options.pop("name", "tiny-llama"), **options})  # type: ignore[arg-type]
    assert info.value.argument == argument
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match="directory"):
        synth("tiny-llama", tmp_path, progress=False)
    with pytest.raises(FileError, match="No such file"):
        synth("tiny-llama", tmp_path / "none" / "m.gguf", progress=False)

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth_module.os, "posix_fallocate", full)
    old = tmp_path / "m.gguf"
    old.write_bytes(b"old")
    with pytest.raises(FileError, match="No space left"):
        synth("tiny-llama", old, progress=False)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    synth_module.add_parser(parser.add_subparsers())
    out = tmp_path / "m.gguf"
    args = ["synth", "tiny-phi3", str(out), "--type", "q8_0", "--layers", "3", "--quiet"]
    options = parser.parse_args(args)
    assert options.run(options) == 0
    assert "GB/s" in capsys.readouterr().out
    assert gguf.GGUFReader(out).fields["general.file_type"].contents() == 7
    options = parser.parse_args(["synth", "--list"])
    assert options.run(options) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*MODELS, "iq4_xs"])
    assert synth_module.main(["nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "tiny-llama3", "tiny-phi3", "Qwen3-4B"])
def test_headers_without_weights_are_models(name: str, tmp_path: Path) -> None:
    """Plans are made from them: what opening a file looks at is there, and nothing else takes room on the disk."""
    path = tmp_path / "m.gguf"
    synth(name, path, weights=False, progress=False)
    found = ps.simulate(
        path, vram="4GiB", profile=False, n_ctx=256, n_prompt=100, policy="full_shard"
    )
    assert found.tps > 0
    assert path.stat().st_blocks * 512 < 32 << 20

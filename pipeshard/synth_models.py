"""The shapes of known models, and what a GGUF converter makes of them: metadata keys, tensor names and
dimensions, and the weight format of each tensor under a file type such as `q4_k_m`.

Not here: weights, vocabularies, files. Threads: immutable data, pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .errors import RequestError
from .synth_blocks import FORMATS, Format

__all__ = ["FILE_TYPES", "MODELS", "Shape", "Tensor", "find_model", "metadata", "tensors"]

VocabKind = Literal[
    "llama", "gemma", "nemotron", "phi3", "llama3", "qwen", "gpt-oss", "tekken"
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One model. Sizes are in elements; `n_ff` is of one expert where there are experts."""

    name: str
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    vocab: VocabKind
    n_ctx: int
    rope_base: float
    eps: float
    tied: bool = False
    n_rot: int = 0  # rotated elements of a head; 0: all of them
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_dense: int = 0  # what the file states beside `n_ff` where experts have their own width
    window: int = 0
    rope_freqs: float = 0.0  # factor of the frequency table that llama 3.1 and later carry
    rope_scaling: tuple[str, float] | None = None  # kind and factor
    n_ctx_orig: int = 0
    rope_sections: tuple[int, ...] = ()
    long_rope: float = 0.0  # phi3: magnitude that goes with its short and long factors
    file_type: str = "q4_0"  # when none is asked for

    @property
    def n_q(self) -> int:
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        return self.n_head_kv * self.head_dim


# Layers, embedding, heads, heads of keys and values, head size, feed-forward.
_Sizes = tuple[int, int, int, int, int, int]


def _llama3(name: str, factor: float, tied: bool, sizes: _Sizes) -> Shape:
    return Shape(
        name, "llama", *sizes, n_vocab=128256, vocab="llama3", n_ctx=131072, rope_base=5e5, eps=1e-5,
        tied=tied, rope_freqs=factor, n_ctx_orig=8192,
    )  # fmt: skip


def _qwen(name: str, arch: str, n_ctx: int, tied: bool, sizes: _Sizes) -> Shape:
    return Shape(
        name, arch, *sizes, n_vocab=151936, vocab="qwen", n_ctx=n_ctx, rope_base=1e6, eps=1e-6, tied=tied
    )  # fmt: skip


def _gemma3(name: str, n_ctx: int, window: int, sizes: _Sizes) -> Shape:
    return Shape(
        name, "gemma3", *sizes, n_vocab=262144, vocab="gemma", n_ctx=n_ctx, rope_base=1e6, eps=1e-6,
        tied=True, window=window,
    )  # fmt: skip


_QWEN2_2B = (28, 1536, 12, 2, 128, 8960)
_PHI3_MINI = Shape(
    "Phi-3-mini", "phi3", 32, 3072, 32, 32, 96, 8192, n_vocab=32064, vocab="phi3", n_ctx=4096,
    rope_base=1e4, eps=1e-5, window=2047, n_ctx_orig=4096,
)  # fmt: skip

_REAL = (
    _llama3("Llama-3.2-1B", 32.0, True, (16, 2048, 32, 8, 64, 8192)),
    _llama3("Llama-3.1-8B", 8.0, False, (32, 4096, 32, 8, 128, 14336)),
    Shape(
        "Minitron-4B", "nemotron", 32, 3072, 24, 8, 128, 9216, n_vocab=256000, vocab="nemotron",
        n_ctx=4096, rope_base=1e4, eps=1e-5, n_rot=64,
    ),
    Shape(
        "Minitron-8B", "llama", 40, 4096, 32, 8, 128, 11520, n_vocab=131072, vocab="tekken",
        n_ctx=8192, rope_base=1e6, eps=1e-5,
    ),
    Shape(
        "Mixtral-8x7B", "llama", 32, 4096, 32, 8, 128, 14336, n_vocab=32000, vocab="llama",
        n_ctx=32768, rope_base=1e6, eps=1e-5, n_expert=8, n_expert_used=2,
    ),
    _qwen("Qwen2-1.5B", "qwen2", 131072, True, _QWEN2_2B),
    replace(
        _qwen("Qwen2-VL-2B", "qwen2vl", 32768, True, _QWEN2_2B), rope_sections=(16, 24, 24, 0)
    ),
    _qwen("Qwen3-4B", "qwen3", 40960, True, (36, 2560, 32, 8, 128, 9728)),
    replace(
        _qwen("Qwen3-30B-A3B", "qwen3moe", 40960, False, (48, 2048, 32, 4, 128, 768)),
        n_ff_dense=6144, n_expert=128, n_expert_used=8,
    ),
    replace(
        _qwen("Qwen3-235B-A22B", "qwen3moe", 40960, False, (94, 4096, 64, 4, 128, 1536)),
        n_ff_dense=12288, n_expert=128, n_expert_used=8,
    ),
    _gemma3("Gemma-3-270M", 32768, 512, (18, 640, 4, 1, 256, 2048)),
    _gemma3("Gemma-3-1B", 32768, 512, (26, 1152, 4, 1, 256, 6912)),
    replace(
        _gemma3("Gemma-3-4B", 131072, 1024, (34, 2560, 8, 4, 256, 10240)),
        rope_scaling=("linear", 8.0),
    ),
    _PHI3_MINI,
    replace(
        _PHI3_MINI, name="Phi-3-mini-128k", n_ctx=131072, window=262144,
        long_rope=math.sqrt(1 + math.log(131072 / 4096) / math.log(4096)),
    ),
    Shape(
        "gpt-oss-20b", "gpt-oss", 24, 2880, 64, 8, 64, 2880, n_vocab=201088, vocab="gpt-oss",
        n_ctx=131072, rope_base=1.5e5, eps=1e-5, n_expert=32, n_expert_used=4, n_ff_dense=2880,
        window=128, rope_scaling=("yarn", 32.0), n_ctx_orig=4096, file_type="mxfp4",
    ),
)  # fmt: skip


def _tiny(arch: str, name: str | None = None, **other: object) -> Shape:
    """One layer or two of everything that makes an architecture its own, rows of 256 for the K-quants."""
    base = Shape(
        f"tiny-{name or arch}", arch, 2, 256, 8, 2, 32, 512, n_vocab=512, vocab="llama", n_ctx=512,
        rope_base=1e4, eps=1e-6,
    )  # fmt: skip
    return replace(base, **other)  # type: ignore[arg-type]


_TINY = (
    _tiny("llama"),
    _tiny("llama", "llama3", vocab="llama3", tied=True, rope_base=5e5, rope_freqs=8.0, n_ctx_orig=128),
    _tiny("llama", "mixtral", n_ff=256, n_expert=8, n_expert_used=2),
    _tiny("nemotron", vocab="nemotron", n_rot=16, eps=1e-5),
    _tiny("qwen2", vocab="qwen", rope_base=1e6),
    _tiny("qwen2vl", vocab="qwen", rope_base=1e6, rope_sections=(4, 6, 6, 0)),
    _tiny("qwen3", vocab="qwen", n_head=6, head_dim=64, rope_base=1e6, tied=True),
    _tiny("qwen3moe", vocab="qwen", head_dim=64, rope_base=1e6, n_ff=256, n_ff_dense=768, n_expert=16, n_expert_used=4),
    # seven layers: the sixth is the one that sees everything
    _tiny("gemma3", vocab="gemma", n_layer=7, n_head=4, n_head_kv=1, head_dim=64, rope_base=1e6, tied=True, window=16),
    _tiny("phi3", vocab="phi3", n_ctx_orig=512, long_rope=1.1),
    _tiny(
        "gpt-oss", vocab="gpt-oss", head_dim=64, n_ff=256, n_ff_dense=256, rope_base=1.5e5, n_expert=8, n_expert_used=2,
        window=16, rope_scaling=("yarn", 4.0), n_ctx_orig=128, file_type="mxfp4",
    ),
)  # fmt: skip

MODELS = {shape.name: shape for shape in _REAL + _TINY}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


_BY_PLAIN_NAME = {_plain(name): shape for name, shape in MODELS.items()}


def find_model(name: str) -> Shape:
    """By name, whatever its case and punctuation."""
    try:
        return _BY_PLAIN_NAME[_plain(name)]
    except KeyError:
        raise RequestError(
            f"no shape is known for {name!r}; known: {', '.join(MODELS)}", argument="name"
        ) from None


# -- formats of tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FileType:
    """A mixture of formats as llama.cpp names them; `number` is what `general.file_type` says."""

    name: str
    number: int
    base: Format


FILE_TYPES = {
    name: FileType(name, number, FORMATS[base])
    for name, number, base in (
        ("f32", 0, "f32"), ("f16", 1, "f16"), ("bf16", 32, "bf16"),
        ("q4_0", 2, "q4_0"), ("q4_1", 3, "q4_1"), ("q5_0", 8, "q5_0"), ("q5_1", 9, "q5_1"), ("q8_0", 7, "q8_0"),
        ("q2_k", 10, "q2_k"), ("q3_k_s", 11, "q3_k"), ("q3_k_m", 12, "q3_k"), ("q3_k_l", 13, "q3_k"),
        ("q4_k_s", 14, "q4_k"), ("q4_k_m", 15, "q4_k"), ("q5_k_s", 16, "q5_k"), ("q5_k_m", 17, "q5_k"),
        ("q6_k", 18, "q6_k"), ("iq4_nl", 25, "iq4_nl"), ("iq4_xs", 30, "iq4_xs"), ("mxfp4", 38, "mxfp4"),
    )
}  # fmt: skip
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# Where a row is no multiple of 256, the format of 32 that takes its place.
_SMALL_BLOCKS = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}


def find_file_type(name: str) -> FileType:
    plain = name.lower()
    try:
        return FILE_TYPES[_ALIASES.get(plain, plain)]
    except KeyError:
        raise RequestError(
            f"no weight type {name!r}; known: {', '.join(FILE_TYPES)}", argument="fmt"
        ) from None


def _more_bits(layer: int, n_layer: int) -> bool:
    """The layers that `_m` mixtures spend more bits on: the first and last eighth and every third between."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


def _mixed(kind: str, layer: int, shape: Shape, ft: str) -> str | None:
    """llama.cpp's exceptions from the base format for one kind of tensor; None: there is none."""
    n_layer, eight = shape.n_layer, shape.n_expert == 8
    shared = shape.n_head // shape.n_head_kv >= 4
    first_eighth = layer < n_layer // 8
    if kind == "attn_v":
        if eight:
            return "q8_0"
        if ft == "q3_k_m":
            return "q5_k" if layer < 2 else "q4_k"
        if ft in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _more_bits(layer, n_layer) else None
        if ft == "q4_k_s":
            return "q5_k" if layer < 4 else None
        if ft in ("iq4_nl", "iq4_xs"):
            return "q5_k" if shared else None
        return {"q2_k": "q4_k" if shared else "q3_k", "q3_k_l": "q5_k"}.get(ft)
    if kind == "attn_k":
        return "q8_0" if eight else None
    if kind == "attn_output":
        if eight:
            few = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
            return "q5_k" if ft in few else None
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(ft)
    if kind == "attn_qkv":
        return {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}.get(ft)
    if kind == "ffn_down":
        if ft == "q3_k_m":
            return "q5_k" if layer < n_layer // 16 else "q4_k"
        if ft in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _more_bits(layer, n_layer) else None
        if ft in ("q4_k_s", "iq4_nl", "iq4_xs"):
            return "q5_k" if first_eighth else None
        return {"q2_k": "q3_k", "q3_k_l": "q5_k"}.get(ft)
    return None


def _format_of(
    name: str, dims: tuple[int, ...], shape: Shape, file_type: FileType, pure: bool
) -> Format:
    """The format of a tensor; dims as GGUF lists them, row length first."""
    keep = name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or not name.endswith(".weight")
    if keep or len(dims) < 2:
        return FORMATS["f32"]
    ft, chosen = file_type.name, file_type.base.name
    if ft not in ("f32", "f16", "bf16") and not pure:
        is_head = name == "output.weight" or (shape.tied and name == "token_embd.weight")
        kind = name.split(".")[-2].removesuffix("_exps")
        if ft == "mxfp4":
            chosen = "mxfp4" if len(dims) == 3 else "q8_0"
        elif is_head:
            whole = dims[0] % FORMATS[chosen].block_elems == 0
            chosen = "q6_k" if whole and chosen != "q8_0" else "q8_0"
        elif name.startswith("blk."):
            chosen = _mixed(kind, int(name.split(".")[1]), shape, ft) or chosen
    if dims[0] % FORMATS[chosen].block_elems:
        chosen = _SMALL_BLOCKS.get(chosen, "f16")
    if dims[0] % FORMATS[chosen].block_elems:
        chosen = "f16"
    return FORMATS[chosen]


# -- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """`role` says what to fill it with: "weight" (random blocks of standard deviation `std`), or one
    of the small F32 kinds "norm" (near `mean`), "signed_norm" (near `mean` or its negative), "bias"
    (around 0), "router", "rope_freqs", "rope_short", "rope_long"."""

    name: str
    dims: tuple[int, ...]  # as GGUF lists them: row length first
    fmt: Format
    role: str
    std: float = 0.0
    mean: float = 0.0

    @property
    def n_elems(self) -> int:
        return math.prod(self.dims)

    @property
    def n_bytes(self) -> int:
        return self.fmt.n_bytes(self.n_elems)

    @property
    def row_bytes(self) -> int:
        return self.fmt.n_bytes(self.dims[0])

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else -1


# The variance that all layers together add to a residual stream of variance one: enough for every layer
# to count in the logits, little enough that the token's own embedding decides its routing.
LAYERS_VARIANCE = 0.25
_SCORE_STD = 2.0  # of attention scores before the softmax, and of logits
# Root mean square of what goes into `down` for standard normal inputs; 0.6 with a gate through SiLU.
_HIDDEN_RMS = {"gemma3": 0.65, "nemotron": 1.22, "gpt-oss": 0.85}
_QK_GAIN = math.sqrt(_SCORE_STD)


class _Builder:
    def __init__(self, shape: Shape, file_type: FileType, pure: bool) -> None:
        self.shape, self.file_type, self.pure = shape, file_type, pure

    def weight(self, name: str, dims: tuple[int, ...], std: float) -> Tensor:
        fmt = _format_of(name, dims, self.shape, self.file_type, self.pure)
        return Tensor(name, dims, fmt, "weight", std)

    def small(
        self, name: str, dims: tuple[int, ...], role: str, std: float = 0.0, mean: float = 0.0
    ) -> Tensor:
        return Tensor(name, dims, FORMATS["f32"], role, std, mean)

    def norm(self, name: str, n: int, mean: float = 1.0) -> Iterator[Tensor]:
        yield self.small(name + ".weight", (n,), "norm", 0.1 * mean, mean)
        if self.shape.arch == "nemotron":
            yield self.small(name + ".bias", (n,), "bias", 0.05)

    def attention(self, blk: str, step: float) -> Iterator[Tensor]:
        s, fan = self.shape, 1 / math.sqrt(self.shape.n_embd)
        has_qk_norm = s.arch in ("qwen3", "qwen3moe", "gemma3")
        qk = fan if has_qk_norm else _QK_GAIN * fan
        if s.arch == "phi3":
            yield self.weight(blk + "attn_qkv.weight", (s.n_embd, s.n_q + 2 * s.n_kv), 1.2 * fan)
        else:
            yield self.weight(blk + "attn_q.weight", (s.n_embd, s.n_q), qk)
            yield self.weight(blk + "attn_k.weight", (s.n_embd, s.n_kv), qk)
            yield self.weight(blk + "attn_v.weight", (s.n_embd, s.n_kv), fan)
        if has_qk_norm:
            yield from self.norm(blk + "attn_q_norm", s.head_dim, _QK_GAIN)
            yield from self.norm(blk + "attn_k_norm", s.head_dim, _QK_GAIN)
        yield self.weight(blk + "attn_output.weight", (s.n_q, s.n_embd), step / math.sqrt(s.n_q))
        if s.arch in ("qwen2", "qwen2vl", "gpt-oss"):
            for part, n in (("q", s.n_q), ("k", s.n_kv), ("v", s.n_kv)):
                yield self.small(f"{blk}attn_{part}.bias", (n,), "bias", 0.1)
        if s.arch == "gpt-oss":
            yield self.small(blk + "attn_output.bias", (s.n_embd,), "bias", 0.1 * step)
            yield self.small(blk + "attn_sinks.weight", (s.n_head,), "bias", 1.0)

    def ffn(self, blk: str, step: float) -> Iterator[Tensor]:
        s, fan = self.shape, 1 / math.sqrt(self.shape.n_embd)
        out = step / (_HIDDEN_RMS.get(s.arch, 0.6) * math.sqrt(s.n_ff))
        if not s.n_expert:
            if s.arch not in ("nemotron", "phi3"):
                yield self.weight(blk + "ffn_gate.weight", (s.n_embd, s.n_ff), fan)
            n_up = 2 * s.n_ff if s.arch == "phi3" else s.n_ff
            yield self.weight(blk + "ffn_up.weight", (s.n_embd, n_up), fan)
            yield self.weight(blk + "ffn_down.weight", (s.n_ff, s.n_embd), out)
            return
        # the mean of k outputs with somewhat uneven shares
        out *= math.sqrt(s.n_expert_used / 1.5)
        yield self.small(blk + "ffn_gate_inp.weight", (s.n_embd, s.n_expert), "router")
        yield self.weight(blk + "ffn_gate_exps.weight", (s.n_embd, s.n_ff, s.n_expert), fan)
        yield self.weight(blk + "ffn_up_exps.weight", (s.n_embd, s.n_ff, s.n_expert), fan)
        yield self.weight(blk + "ffn_down_exps.weight", (s.n_ff, s.n_embd, s.n_expert), out)
        if s.arch == "gpt-oss":
            yield self.small(blk + "ffn_gate_inp.bias", (s.n_expert,), "bias", 0.02)
            for part, n, std in (
                ("gate", s.n_ff, 0.1),
                ("up", s.n_ff, 0.1),
                ("down", s.n_embd, 0.1 * step),
            ):
                yield self.small(f"{blk}ffn_{part}_exps.bias", (n, s.n_expert), "bias", std)

    def layer(self, layer: int) -> Iterator[Tensor]:
        s, blk = self.shape, f"blk.{layer}."
        step = math.sqrt(LAYERS_VARIANCE / (2 * s.n_layer))
        # gemma3 norms what a block adds, so there the norm's weight is what keeps it small
        add = 1.0 if s.arch == "gemma3" else step
        yield from self.norm(blk + "attn_norm", s.n_embd)
        yield from self.attention(blk, add)
        if s.arch == "gemma3":
            yield from self.norm(blk + "post_attention_norm", s.n_embd, step)
        before = "post_attention_norm" if s.arch == "gpt-oss" else "ffn_norm"
        yield from self.norm(blk + before, s.n_embd)
        yield from self.ffn(blk, add)
        if s.arch == "gemma3":
            yield from self.norm(blk + "post_ffw_norm", s.n_embd, step)

    def model(self) -> Iterator[Tensor]:
        s, fan = self.shape, 1 / math.sqrt(self.shape.n_embd)
        embd_std = fan if s.arch == "gemma3" else 1.0  # gemma3 multiplies by sqrt(n_embd)
        yield self.weight("token_embd.weight", (s.n_embd, s.n_vocab), embd_std)
        n_freq = (s.n_rot or s.head_dim) // 2
        if s.rope_freqs:
            yield self.small("rope_freqs.weight", (n_freq,), "rope_freqs")
        if s.long_rope:
            yield self.small("rope_factors_long.weight", (n_freq,), "rope_long")
            yield self.small("rope_factors_short.weight", (n_freq,), "rope_short")
        for layer in range(s.n_layer):
            yield from self.layer(layer)
        if s.tied:
            # The stream is mostly the token's own embedding, so a head equal to the embedding would answer
            # every token with itself; random signs before the head take that away.
            mean = _SCORE_STD * fan / embd_std
            yield self.small("output_norm.weight", (s.n_embd,), "signed_norm", 0.1 * mean, mean)
        else:
            yield from self.norm("output_norm", s.n_embd)
            yield self.weight("output.weight", (s.n_embd, s.n_vocab), _SCORE_STD * fan)


def tensors(shape: Shape, file_type: str, *, pure: bool = False) -> list[Tensor]:
    """All tensors of a model. `pure`: every matrix in the file type's base format, the head too."""
    return list(_Builder(shape, find_file_type(file_type), pure).model())


# -- metadata -------------------------------------------------------------------------------------


def metadata(shape: Shape) -> dict[str, int | float | str | list[int]]:
    """The architecture's keys, without the vocabulary. ints are u32 in the file, floats f32, lists i32."""
    s = shape
    eps = (
        "attention.layer_norm_epsilon"
        if s.arch == "nemotron"
        else "attention.layer_norm_rms_epsilon"
    )
    keys: dict[str, int | float | str | list[int]] = {
        "block_count": s.n_layer,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff_dense or s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        eps: s.eps,
        "rope.freq_base": s.rope_base,
        "rope.dimension_count": s.n_rot or s.head_dim,
        "vocab_size": s.n_vocab,
    }
    if s.n_expert:
        keys |= {
            "expert_count": s.n_expert,
            "expert_used_count": s.n_expert_used,
            "expert_feed_forward_length": s.n_ff,
        }
    if s.window:
        keys["attention.sliding_window"] = s.window
    if s.arch == "nemotron":
        keys["rope.scaling.type"] = "none"
    if s.rope_scaling:
        keys |= {"rope.scaling.type": s.rope_scaling[0], "rope.scaling.factor": s.rope_scaling[1]}
    if s.arch in ("gpt-oss", "phi3"):
        keys["rope.scaling.original_context_length"] = s.n_ctx_orig
    if s.long_rope:
        keys["rope.scaling.attn_factor"] = s.long_rope
    if s.rope_sections:
        keys["rope.dimension_sections"] = list(s.rope_sections)
    return {f"{s.arch}.{key}": value for key, value in keys.items()}

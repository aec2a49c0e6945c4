"""Logits of a GGUF model in float64, term by term: what every engine result and every synthetic model is judged by.

Weights are dequantised to float64, nothing is fused, cached or rounded. Covers the text side of llama (dense and with
experts), nemotron, qwen2, qwen2vl, qwen3, qwen3moe, gemma3, phi3 and gpt-oss. `trace`, a dict, receives every step
(`embd`, `blk.0.q`, `blk.0.router`, ..., `result_norm`), so that a wrong logit can be followed to the step that made it.

Not here: speed, batching, KV. A whole model must fit into memory at eight bytes a weight.
Threads: pure functions; a `Weights` is read-only once loaded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

F64 = npt.NDArray[np.float64]
Trace = dict[str, F64]

ARCHITECTURES = (
    "llama", "nemotron", "qwen2", "qwen2vl", "qwen3", "qwen3moe", "gemma3", "phi3", "gpt-oss",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A file's metadata (without the vocabulary) and its tensors, shaped [..., rows, columns]."""

    meta: Mapping[str, Any]
    tensors: Mapping[str, F64]

    @property
    def arch(self) -> str:
        return str(self.meta["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value of this architecture: `get("block_count")`."""
        return self.meta.get(f"{self.arch}.{key}", default)


def load(path: str | os.PathLike[str]) -> Weights:
    reader = GGUFReader(os.fspath(path))
    meta = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "tokenizer."))
    }
    if meta["general.architecture"] not in ARCHITECTURES:
        raise ValueError(f"no formulas for architecture {meta['general.architecture']!r}")
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in tensor.shape)[::-1]
        values = dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = np.asarray(values, np.float64).reshape(shape)
    return Weights(meta, tensors)


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def silu(x: F64) -> F64:
    return np.asarray(x / (1.0 + np.exp(-x)))


def gelu_tanh(x: F64) -> F64:
    inner = np.sqrt(2.0 / np.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight)


def layer_norm(x: F64, weight: F64, bias: F64, eps: float) -> F64:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps) + bias


@dataclass(frozen=True)
class Rope:
    """How a layer rotates: one frequency a pair, a magnitude, and which elements make a pair."""

    freq: F64  # [n_rot / 2]
    magnitude: float
    interleaved: bool  # pairs (2i, 2i+1); else (i, i + n_rot/2)

    def angles(self, positions: npt.NDArray[np.int64], sections: list[int] | None) -> F64:
        """[tokens, n_rot / 2]. With sections, positions are [axes, tokens] and each section of pairs has its axis."""
        if sections is None or positions.ndim == 1:
            return np.asarray(positions.reshape(-1)[:, None] * self.freq)
        axis = np.repeat(np.arange(len(sections)), sections)[: self.freq.size]
        return np.asarray(positions[axis].T * self.freq)

    def apply(self, x: F64, angles: F64) -> F64:
        """x [tokens, heads, head_dim]; what lies behind the first n_rot elements stays."""
        n_rot = 2 * self.freq.size
        cos = np.cos(angles)[:, None, :] * self.magnitude
        sin = np.sin(angles)[:, None, :] * self.magnitude
        if self.interleaved:
            first, second = slice(0, n_rot, 2), slice(1, n_rot, 2)
        else:
            first, second = slice(0, n_rot // 2), slice(n_rot // 2, n_rot)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


def _yarn(
    freq: F64, base: float, factor: float, n_orig: int, fast: float, slow: float
) -> tuple[F64, float]:
    """Frequencies that turn fewer than `slow` times within the original context are divided by the factor, those that
    turn more than `fast` times are kept, and a ramp over the pair index joins them."""
    n_rot = 2 * freq.size

    def pair_with(turns: float) -> float:
        return float(n_rot * np.log(n_orig / (turns * 2.0 * np.pi)) / (2.0 * np.log(base)))

    low = max(0.0, np.floor(pair_with(fast)))
    high = min(n_rot - 1.0, np.ceil(pair_with(slow)))
    ramp = np.clip((np.arange(freq.size) - low) / max(0.001, high - low), 0.0, 1.0)
    return freq / factor * ramp + freq * (1.0 - ramp), 1.0 + 0.1 * float(np.log(factor))


def layer_rope(w: Weights, layer: int, n_ctx: int | None = None) -> Rope:
    local = window_of(w, layer) is not None and w.arch == "gemma3"
    head_dim = w.get(
        "attention.key_length",
        w.get("embedding_length") // w.get("attention.head_count"),
    )
    n_rot = w.get("rope.dimension_count", head_dim)
    base = w.get("rope.freq_base_swa" if local else "rope.freq_base", 10000.0)
    freq = base ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
    magnitude = 1.0
    kind, factor = w.get("rope.scaling.type", "none"), w.get("rope.scaling.factor", 1.0)
    n_orig = w.get("rope.scaling.original_context_length", w.get("context_length"))
    if kind == "yarn":
        fast, slow = (
            w.get("rope.scaling.beta_fast", 32.0),
            w.get("rope.scaling.beta_slow", 1.0),
        )
        freq, magnitude = _yarn(freq, base, factor, n_orig, fast, slow)
    elif kind == "linear" and not local:
        freq = freq / factor
    if "rope_freqs.weight" in w.tensors:
        freq = freq / w.tensors["rope_freqs.weight"]
    if "rope_factors_short.weight" in w.tensors:
        which = "long" if n_ctx is not None and n_ctx > n_orig else "short"
        freq = freq / w.tensors[f"rope_factors_{which}.weight"]
        magnitude = w.get("rope.scaling.attn_factor", 1.0)
    return Rope(np.asarray(freq), magnitude, interleaved=w.arch == "llama")


def window_of(w: Weights, layer: int) -> int | None:
    """Width of the sliding window of a layer: a token sees itself and width - 1 before it."""
    if (w.arch == "gemma3" and layer % 6 != 5) or (w.arch == "gpt-oss" and layer % 2 == 0):
        return int(w.get("attention.sliding_window"))
    return None


class _Forward:
    """One pass over one sequence."""

    def __init__(
        self,
        w: Weights,
        positions: npt.NDArray[np.int64],
        n_ctx: int | None,
        trace: Trace | None,
    ) -> None:
        self.w, self.positions, self.n_ctx, self.trace = w, positions, n_ctx, trace
        eps = w.get("attention.layer_norm_rms_epsilon") or w.get("attention.layer_norm_epsilon")
        self.eps = float(eps)
        self.n_embd, self.n_head = (
            w.get("embedding_length"),
            w.get("attention.head_count"),
        )
        self.n_head_kv = w.get("attention.head_count_kv", self.n_head)
        self.head_dim = w.get("attention.key_length", self.n_embd // self.n_head)

    def note(self, name: str, value: F64) -> F64:
        if self.trace is not None:
            self.trace[name] = value.copy()
        return value

    def has(self, name: str) -> bool:
        return name in self.w.tensors

    def linear(self, name: str, x: F64) -> F64:
        y = x @ self.w.tensors[name + ".weight"].T
        return np.asarray(y + self.w.tensors[name + ".bias"] if self.has(name + ".bias") else y)

    def norm(self, name: str, x: F64) -> F64:
        weight = self.w.tensors[name + ".weight"]
        if self.has(name + ".bias"):
            return layer_norm(x, weight, self.w.tensors[name + ".bias"], self.eps)
        return rms_norm(x, weight, self.eps)

    def attention(self, layer: int, y: F64) -> F64:
        blk, n_tok = f"blk.{layer}.", len(y)
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        if self.has(blk + "attn_qkv.weight"):
            q, k, v = np.split(self.linear(blk + "attn_qkv", y), [n_q, n_q + n_kv], axis=-1)
        else:
            q, k, v = (self.linear(blk + "attn_" + part, y) for part in "qkv")
        q = q.reshape(n_tok, self.n_head, self.head_dim)
        k = k.reshape(n_tok, self.n_head_kv, self.head_dim)
        v = v.reshape(n_tok, self.n_head_kv, self.head_dim)
        if self.has(blk + "attn_q_norm.weight"):
            q, k = self.norm(blk + "attn_q_norm", q), self.norm(blk + "attn_k_norm", k)
        rope = layer_rope(self.w, layer, self.n_ctx)
        angles = rope.angles(self.positions, self.w.get("rope.dimension_sections"))
        q, k = rope.apply(q, angles), rope.apply(k, angles)
        for part, value in (("q", q), ("k", k), ("v", v)):
            self.note(blk + part, value)
        age = np.arange(n_tok)[:, None] - np.arange(n_tok)[None, :]
        window = window_of(self.w, layer)
        seen = (age >= 0) & (age < (window or n_tok))
        out = np.empty((n_tok, self.n_head, self.head_dim))
        for head in range(self.n_head):
            kv_head = head // (self.n_head // self.n_head_kv)
            scores = q[:, head] @ k[:, kv_head].T / np.sqrt(self.head_dim)
            scores = np.where(seen, scores, -np.inf)
            if self.has(blk + "attn_sinks.weight"):
                sink = np.full((n_tok, 1), self.w.tensors[blk + "attn_sinks.weight"][head])
                probs = softmax(np.concatenate([scores, sink], axis=1))[:, :-1]
            else:
                probs = softmax(scores)
            out[:, head] = probs @ v[:, kv_head]
        return self.linear(blk + "attn_output", out.reshape(n_tok, n_q))

    def dense(self, blk: str, y: F64) -> F64:
        up = self.linear(blk + "ffn_up", y)
        if self.w.arch == "nemotron":
            return self.linear(blk + "ffn_down", np.square(np.maximum(up, 0.0)))
        if self.w.arch == "phi3":
            gate, up = np.split(up, 2, axis=-1)
        else:
            gate = self.linear(blk + "ffn_gate", y)
        act = gelu_tanh if self.w.arch == "gemma3" else silu
        return self.linear(blk + "ffn_down", act(gate) * up)

    def expert(self, blk: str, index: int, y: F64) -> F64:
        def part(name: str, x: F64) -> F64:
            name = f"{blk}ffn_{name}_exps"
            z = x @ self.w.tensors[name + ".weight"][index].T
            bias = self.w.tensors.get(name + ".bias")
            return np.asarray(z if bias is None else z + bias[index])

        gate, up = part("gate", y), part("up", y)
        if self.w.arch == "gpt-oss":
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            return part("down", gate / (1.0 + np.exp(-1.702 * gate)) * (up + 1.0))
        return part("down", silu(gate) * up)

    def mixture(self, blk: str, y: F64) -> F64:
        """The k best experts a token, weighted by the softmax over those k: for architectures that take the softmax
        over all experts first and renormalise, that is the same number."""
        scores = self.note(blk + "router", self.linear(blk + "ffn_gate_inp", y))
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : self.w.get("expert_used_count")]
        share = softmax(np.take_along_axis(scores, chosen, axis=-1))
        out = np.zeros_like(y)
        for index in np.unique(chosen):
            tokens, rank = np.nonzero(chosen == index)
            out[tokens] += share[tokens, rank][:, None] * self.expert(blk, int(index), y[tokens])
        return out

    def layer(self, layer: int, x: F64) -> F64:
        blk, gemma = f"blk.{layer}.", self.w.arch == "gemma3"
        y = self.note(blk + "attn_norm", self.norm(blk + "attn_norm", x))
        out = self.attention(layer, y)
        if gemma:
            out = self.norm(blk + "post_attention_norm", out)
        x = x + self.note(blk + "attn_out", out)
        # gpt-oss files call the norm before its experts by this name
        before = "post_attention_norm" if self.w.arch == "gpt-oss" else "ffn_norm"
        y = self.note(blk + "ffn_norm", self.norm(blk + before, x))
        experts = self.has(blk + "ffn_gate_inp.weight")
        out = self.mixture(blk, y) if experts else self.dense(blk, y)
        if gemma:
            out = self.norm(blk + "post_ffw_norm", out)
        return self.note(blk + "x", x + self.note(blk + "ffn_out", out))


def logits(
    model: Weights | str | os.PathLike[str],
    tokens: npt.ArrayLike,
    *,
    positions: npt.ArrayLike | None = None,
    n_ctx: int | None = None,
    trace: Trace | None = None,
) -> F64:
    """[tokens, vocabulary]. Positions are 0, 1, ... unless given: [tokens], or [axes, tokens] for qwen2vl.
    `n_ctx` only matters where a file has rope factors for short and for long contexts."""
    w = model if isinstance(model, Weights) else load(model)
    ids = np.asarray(tokens, np.int64)
    where = np.arange(len(ids)) if positions is None else np.asarray(positions, np.int64)
    forward = _Forward(w, where, n_ctx, trace)
    x = w.tensors["token_embd.weight"][ids]
    if w.arch == "gemma3":
        x = x * np.sqrt(w.get("embedding_length"))
    forward.note("embd", x)
    for layer in range(w.get("block_count")):
        x = forward.layer(layer, x)
    x = forward.note("result_norm", forward.norm("output_norm", x))
    head = w.tensors.get("output.weight", w.tensors["token_embd.weight"])
    return np.asarray(x @ head.T)


def nmse(x: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Sum of squared errors over the sum of squares of the reference."""
    r = np.asarray(reference, np.float64)
    return float(np.square(np.asarray(x, np.float64) - r).sum() / np.square(r).sum())


def top1_disagreements(x: npt.ArrayLike, reference: npt.ArrayLike) -> list[int]:
    """Positions whose best token differs though the reference's two best logits are further apart than six times the
    root mean square error: where it says more than rounding."""
    a, r = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    best = np.sort(r, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 6.0 * np.sqrt(np.square(a - r).mean())
    return [int(i) for i in np.nonzero(clear & (a.argmax(-1) != r.argmax(-1)))[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Float64 logits of a GGUF model.")
    parser.add_argument("model")
    parser.add_argument("tokens", help="a .npy file of token ids, or an .npz file with `tokens`")
    parser.add_argument("out", help="an .npz file for the logits and every step")
    args = parser.parse_args()
    loaded = np.load(args.tokens)
    trace: Trace = {}
    ids = loaded["tokens"] if args.tokens.endswith(".npz") else loaded
    trace["logits"] = logits(args.model, ids, trace=trace)
    np.savez(args.out, allow_pickle=False, **trace)


if __name__ == "__main__":
    main()

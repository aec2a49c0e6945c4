"""A vocabulary as the file describes it: checked, typed, with what each token means and which bytes it stands for.

Metadata is hostile input: every value is checked for type, length and range, and FormatError names the key. The rules
that are nowhere in the file (which tokens end a generation, which names are control tokens whatever their type says)
are llama.cpp's, which files are tested with.

Not here: turning text into tokens (tokenizer.py). Threads: immutable after creation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._pretokenizers import PRETOKENIZERS, Pretokenizer
from .errors import FormatError, UnsupportedError

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "SPACE",
    "UNDEFINED",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "Vocab",
    "byte_alphabet",
]

UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)
SPACE = "\u2581"  # how SentencePiece writes a space

_MODELS = {"llama": "spm", "gpt2": "bpe"}
_NONE_ID = 0xFFFFFFFF  # -1 in 32 bits: converters write it for "no such token"
_BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the format's own spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
# A role that the file doesn't fill falls to the first of these names in the vocabulary, which then is a control token.
_ROLE_NAMES = {
    "eot": (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<end_of_utterance>",
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "\u2581<PRE>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "\u2581<SUF>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "\u2581<MID>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_ENDS_GENERATION = (
    *(name for name in _ROLE_NAMES["eot"] if not name.startswith("<\uff5c")),
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "[EOS]",
)
# Harmony's (gpt-oss) structure stays visible in the text, or nobody could take its channels apart.
_ALWAYS_VISIBLE = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Keys:
    """Typed access to metadata; what is not of the wanted type is a FormatError with the key as field."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self.metadata = metadata
        self.path = path

    def wrong(self, key: str, what: str) -> FormatError:
        return FormatError(f"{self.path}: {key} {what}", path=self.path, field=key)

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                raise self.wrong(key, "is not UTF-8") from None
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, f"must be a string, not {_kind(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, (bool, np.bool_)):
            raise self.wrong(key, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def token_id(self, key: str, n_vocab: int) -> int | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise self.wrong(key, f"must be a token id, not {_kind(value)}")
        if value in (_NONE_ID, -1):
            return None
        if not 0 <= value < n_vocab:
            raise self.wrong(key, f"is {value}, but the vocabulary has {n_vocab} tokens")
        return int(value)

    def strings(self, key: str) -> list[str] | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not set(map(type, value)) <= {str, bytes}:
            raise self.wrong(key, f"must be an array of strings, not {_kind(value)}")
        try:
            texts = [text.decode() if isinstance(text, bytes) else text for text in value]
            "".join(texts).encode()  # a lone surrogate is not text either
        except UnicodeError:
            raise self.wrong(key, "holds a string that is not UTF-8") from None
        return texts

    def numbers(self, key: str, length: int, kinds: str, what: str) -> np.ndarray | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, (list, tuple)) else value
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.wrong(key, f"must be an array of {what}, not {_kind(value)}")
        if len(array) != length:
            raise self.wrong(key, f"has {len(array)} entries for {length} tokens")
        return array


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    if isinstance(value, (list, tuple)):
        return (
            f"an array of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
        )
    return type(value).__name__


class Vocab:
    """Tokens, types and scores by id, and the roles of the special ones."""

    kind: str  # "spm" or "bpe"
    pre: Pretokenizer | None  # bpe only
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]
    scores: np.ndarray  # float64, spm only
    merges: list[str]  # bpe only
    roles: dict[str, int]  # "bos" -> id and so on, where there is one
    eog: frozenset[int]
    strips_right: frozenset[int]  # special tokens that swallow the white space behind them
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        keys = Keys(metadata, path)
        self.path = path
        self.kind = self._read_kind(keys)
        self.pre = self._read_pre(keys) if self.kind == "bpe" else None
        self._read_tokens(keys)
        self._read_flags(keys)
        self._read_roles(keys)
        self.eog = self._find_ends()
        self.strips_right = self._find_strips(keys)
        self._bytes: list[bytes | None] = [None] * len(self.tokens)

    def _read_kind(self, keys: Keys) -> str:
        model = keys.text("tokenizer.ggml.model")
        if model is None:
            raise keys.wrong("tokenizer.ggml.model", "is missing: the file has no tokenizer")
        if model not in _MODELS:
            raise UnsupportedError(
                f"{self.path}: tokenizer.ggml.model is {model!r}; supported are {', '.join(_MODELS)}",
                what=model,
                supported=tuple(_MODELS),
            )
        return _MODELS[model]

    def _read_pre(self, keys: Keys) -> Pretokenizer:
        # Files from before the key existed were made for 'default', which is also what llama.cpp takes.
        name = keys.text("tokenizer.ggml.pre") or "default"
        if name not in PRETOKENIZERS:
            raise UnsupportedError(
                f"{self.path}: tokenizer.ggml.pre is {name!r}, a pre-tokenizer that pipeshard does not know; "
                f"supported are {', '.join(sorted(PRETOKENIZERS))}",
                what=name,
                supported=tuple(sorted(PRETOKENIZERS)),
            )
        return PRETOKENIZERS[name]

    def _read_tokens(self, keys: Keys) -> None:
        key = "tokenizer.ggml.tokens"
        tokens = keys.strings(key)
        if not tokens:
            raise keys.wrong(key, "is missing" if tokens is None else "is empty")
        n_vocab = len(tokens)
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        if len(self.ids) != n_vocab:
            first = next(i for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise keys.wrong(
                key, f"names {self.tokens[first]!r} twice: {first}, {self.ids[self.tokens[first]]}"
            )
        types = keys.numbers("tokenizer.ggml.token_type", n_vocab, "iu", "integers")
        self.types = [NORMAL] * n_vocab if types is None else types.tolist()
        scores = keys.numbers("tokenizer.ggml.scores", n_vocab, "fiu", "numbers")
        self.scores = np.zeros(n_vocab) if scores is None else scores.astype(np.float64)
        self.merges = []
        if self.kind == "spm" and not np.isfinite(self.scores).all():
            raise keys.wrong("tokenizer.ggml.scores", "holds a number that is not finite")
        if self.kind == "bpe":
            merges = keys.strings("tokenizer.ggml.merges")
            if merges is None:
                raise keys.wrong("tokenizer.ggml.merges", "is missing")
            self.merges = merges

    def _read_flags(self, keys: Keys) -> None:
        adds_bos = self.pre.adds_bos if self.pre else True
        self.add_bos = keys.flag("tokenizer.ggml.add_bos_token", adds_bos)
        self.add_eos = keys.flag("tokenizer.ggml.add_eos_token", False)
        self.add_space_prefix = (
            keys.flag("tokenizer.ggml.add_space_prefix", True) and self.kind == "spm"
        )

    def _read_roles(self, keys: Keys) -> None:
        n_vocab = len(self.tokens)
        defaults = {"unk": 0, "bos": 1, "eos": 2} if self.kind == "spm" else {}
        self.roles = {role: i for role, i in defaults.items() if i < n_vocab}
        for role, name in _ROLES.items():
            found = keys.token_id(f"tokenizer.ggml.{name}", n_vocab)
            if found is not None:
                self.roles[role] = found
        for role, names in _ROLE_NAMES.items():
            named = next((self.ids[name] for name in names if name in self.ids), None)
            if role not in self.roles and named is not None:
                self.roles[role] = named
                self.types[named] = CONTROL
        for flag, role in (("add_bos", "bos"), ("add_eos", "eos")):
            if getattr(self, flag) and role not in self.roles:
                if f"tokenizer.ggml.{flag}_token" in keys.metadata:
                    raise keys.wrong(
                        f"tokenizer.ggml.{role}_token_id",
                        f"is missing, but tokenizer.ggml.{flag}_token is true",
                    )
                setattr(self, flag, False)

    def _find_ends(self) -> frozenset[int]:
        """The tokens that end a generation; names decide, because files say too little."""
        ends = {self.roles[r] for r in ("fim_pad", "fim_rep", "fim_sep") if r in self.roles}
        for name in _ENDS_GENERATION:
            if name in self.ids:
                ends.add(self.ids[name])
                self.types[self.ids[name]] = CONTROL
        for name in _ALWAYS_VISIBLE:
            if name in self.ids:
                self.types[self.ids[name]] = USER_DEFINED
        ends |= {self.roles[r] for r in ("eos", "eot", "eom") if r in self.roles}
        names = {self.tokens[i] for i in ends}
        tool_calls = {"<|return|>", "<|call|>"} <= names or {"<|flush|>", "<|calls|>"} <= names
        if tool_calls and "<|end|>" in names:  # there <|end|> closes a message, not the answer
            ends.discard(self.ids["<|end|>"])
            self.types[self.ids["<|end|>"]] = USER_DEFINED
        return frozenset(ends)

    def _find_strips(self, keys: Keys) -> frozenset[int]:
        """Phi-3's special tokens swallow the white space behind them; no key says so, only the model's name."""
        name = (keys.text("general.name") or "").lower()
        if "phi-3" not in name and "phi3" not in name:
            return frozenset()
        keep = {self.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
        return frozenset(i for i in self.special_ids() if i not in keep)

    def special_ids(self) -> list[int]:
        """Ids that are matched in text as a whole: control, unknown and user-defined tokens."""
        return [i for i, t in enumerate(self.types) if t in (CONTROL, UNKNOWN, USER_DEFINED)]

    def token_bytes(self, i: int) -> bytes:
        """What token `i` adds to a text, special tokens as their names."""
        known = self._bytes[i]
        if known is None:
            known = self._bytes[i] = self._spell(self.tokens[i], self.types[i])
        return known

    def _spell(self, text: str, kind: int) -> bytes:
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode()
        if kind == BYTE and (match := _BYTE_TEXT.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if kind not in (NORMAL, BYTE):
            return b""  # unused: no text of its own
        if self.kind == "spm":
            return text.replace(SPACE, " ").encode()
        return b"".join(_FROM_ALPHABET.get(c) or c.encode() for c in text)


def byte_alphabet() -> Sequence[str]:
    """The printable character for each byte in byte-level BPE: itself, or one from 256 on where it doesn't print."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    shifted = {b: 256 + n for n, b in enumerate(rest)}
    return [chr(shifted.get(b, b)) for b in range(256)]


_FROM_ALPHABET = {c: bytes([b]) for b, c in enumerate(byte_alphabet())}

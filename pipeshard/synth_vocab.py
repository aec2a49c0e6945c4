"""Synthetic vocabularies of any size that tokenise: SentencePiece-style with byte tokens and scores, and byte-level BPE
with merges.

Words are made systematically: two letters, then three, then four, each longer word being a shorter one and a letter, so
every word can be reached by merges. A marker for the space before a word counts as a first letter.

Not here: tokenising. Threads: pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from .errors import RequestError

__all__ = ["Vocab", "make_vocab"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_PRINTABLE = "".join(chr(c) for c in range(33, 127))


@dataclass(frozen=True)
class Vocab:
    """What goes under `tokenizer.` into a file."""

    model: str  # "llama" (SentencePiece) or "gpt2" (byte-level BPE)
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # "bos", "eos", "unknown", "padding"
    flags: dict[str, bool] = field(default_factory=dict)  # "add_bos_token", ...
    chat_template: str = ""


@dataclass(frozen=True)
class _Kind:
    model: str
    pre: str
    first: tuple[str, ...]  # special tokens with the lowest ids
    last: tuple[str, ...]  # with the highest
    ids: dict[str, str]
    add_bos: bool
    filler: tuple[int, str] = (
        0,
        "",
    )  # a full-size vocabulary has this many reserved special tokens
    chat: tuple[str, str, str] | None = None  # before a role, after it, after its text


_KINDS = {
    "llama": _Kind(
        "llama", "default", ("<unk>", "<s>", "</s>"), (),
        {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}, True,
    ),
    "phi3": _Kind(
        "llama", "default", ("<unk>", "<s>", "</s>"),
        ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        {"bos": "<s>", "eos": "<|endoftext|>", "unknown": "<unk>", "padding": "<|endoftext|>"}, True,
        chat=("<|", "|>\n", "<|end|>\n"),
    ),
    "gemma": _Kind(
        "llama", "default", ("<pad>", "<eos>", "<bos>", "<unk>"), ("<start_of_turn>", "<end_of_turn>"),
        {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}, True,
        chat=("<start_of_turn>", "\n", "<end_of_turn>\n"),
    ),
    "nemotron": _Kind(
        "llama", "default", ("<pad>", "<unk>", "<s>", "</s>"), (),
        {"bos": "<s>", "eos": "</s>", "unknown": "<unk>", "padding": "<pad>"}, True,
    ),
    "llama3": _Kind(
        "gpt2", "llama-bpe", (),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, True, (251, "<|reserved_special_token_{}|>"),
        ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    "qwen": _Kind(
        "gpt2", "qwen2", (), ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|endoftext|>"}, False, (290, "[PAD{}]"),
        ("<|im_start|>", "\n", "<|im_end|>\n"),
    ),
    "gpt-oss": _Kind(
        "gpt2", "gpt-4o", (),
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
        {"bos": "<|startoftext|>", "eos": "<|return|>", "padding": "<|endoftext|>"}, False,
        (1083, "<|reserved_{}|>"), ("<|start|>", "<|message|>", "<|end|>"),
    ),
    "tekken": _Kind(
        "gpt2", "tekken", ("<unk>", "<s>", "</s>"), (),
        {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}, True, (997, "<SPECIAL_{}>"),
    ),
}  # fmt: skip


def _words(marker: str) -> Iterator[tuple[str, str]]:
    """(shorter word, letter) in the order of their merges: all of two letters, of three, ..."""
    level = [marker, *_LETTERS]
    while True:
        longer = []
        for word in level:
            for letter in _LETTERS:
                yield word, letter
                longer.append(word + letter)
        level = longer


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte value: itself where it prints, else the next free letter from U+0100 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = iter(range(256, 512))
    return [chr(b) if b in printing else chr(next(unseen)) for b in range(256)]


def _template(chat: tuple[str, str, str], add_bos: bool) -> str:
    before, after, end = (part.replace("\n", "\\n") for part in chat)
    bos = "{{ bos_token }}" if add_bos else ""
    return (
        bos + "{% for message in messages %}{{ '" + before + "' + message['role'] + '" + after
        + "' + message['content'] + '" + end + "' }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + before + "assistant" + after + "' }}{% endif %}"
    )  # fmt: skip


def make_vocab(kind: str, n_vocab: int, *, chat_template: bool = True) -> Vocab:
    """`n_vocab` tokens in the manner of one family of models."""
    k = _KINDS[kind]
    spm = k.model == "llama"
    base = [f"<0x{b:02X}>" for b in range(256)] if spm else _byte_letters()
    single = ["\u2581", *_PRINTABLE] if spm else []
    n_fill = k.filler[0] if n_vocab >= 16 * k.filler[0] else 0
    fill = [k.filler[1].format(i) for i in range(n_fill)]
    first = [*k.first, *(fill if k.first else ())]
    last = [*k.last, *(() if k.first else fill)]
    smallest = len(first) + len(base) + len(single) + len(last)
    if n_vocab < smallest:
        raise RequestError(
            f"a vocabulary of this kind has at least {smallest} tokens, not {n_vocab}",
            argument="vocab",
        )
    pairs = list(islice(_words("\u2581" if spm else "\u0120"), n_vocab - smallest))
    words = [a + b for a, b in pairs]
    tokens = [*first, *base, *words, *single, *last]
    types = [CONTROL] * len(first) + [BYTE if spm else NORMAL] * len(base)
    types += [NORMAL] * (len(words) + len(single)) + [CONTROL] * len(last)
    for i, token in enumerate(tokens[: len(first)]):
        types[i] = UNKNOWN if token == "<unk>" and spm else types[i]
    if kind == "qwen":
        types[len(types) - n_fill :] = [UNUSED] * n_fill
    n_plain = len(first) + len(base)
    scores = [0.0] * n_plain + [-float(i) for i in range(n_vocab - n_plain)] if spm else []
    where = {token: i for i, token in enumerate([*first, *base])}
    where |= {token: n_vocab - len(last) + i for i, token in enumerate(last)}
    flags = {"add_bos_token": k.add_bos, "add_eos_token": False}
    if kind == "gemma":
        flags["add_space_prefix"] = False
    return Vocab(
        model=k.model,
        pre=k.pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=[] if spm else [f"{a} {b}" for a, b in pairs],
        ids={name: where[token] for name, token in k.ids.items()},
        flags=flags,
        chat_template=_template(k.chat, k.add_bos) if k.chat and chat_template else "",
    )

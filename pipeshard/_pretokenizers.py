"""How byte-level BPE vocabularies cut text into words before merging, by the name in `tokenizer.ggml.pre`.

Each scheme is a list of regular expressions (Oniguruma syntax, as the `tokenizers` library takes them), applied one
after the other: what one leaves between and inside its matches, the next cuts further. They follow what llama.cpp does
for the same name, because that is what files are converted and tested with; where it departs from a model's original
tokenizer.json (combining marks in `gpt-4o` and `tekken`, for one), so do they.

Not here: merging, special tokens. Unknown names have no entry: guessing would give wrong text without an error.
Threads: constant data.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRETOKENIZERS", "Pretokenizer"]


@dataclass(frozen=True)
class Pretokenizer:
    """`whole_words`: a word that is a token skips the merges. `adds_bos`: default where the file has no flag."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


# English contractions in ASCII only: under (?i:) the long s would also count as an s.
_CONTRACTION = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# Letters that may stand before, and after, the change from capitals to small letters; only ASCII has a case here.
_UPPER = r"[\p{L}&&[^a-z]]"
_LOWER = r"[\p{L}&&[^A-Z]]"
_CAMEL_1 = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAMEL_2 = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_HAN_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+"
_HAN_WIDE = r"[\x{0800}-\x{9fa5}\x{ac00}-\x{d7ff}]+"
# Letters with case, without the blocks that DeepSeek's list leaves out.
_CASED = (
    r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2f}"
    r"\x{a790}-\x{a7ff}\x{ab30}-\x{ab6f}\x{10570}-\x{105bf}\x{10d50}-\x{10d8f}\x{16e40}-\x{16e7f}"
    r"\x{1d400}-\x{1d7ff}\x{1df00}-\x{1dfff}]]"
)

# Everything up to a full stop or comma of any script.
_NO_STOPS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{0964}\x{06d4}\x{060c})]+"

_GPT2 = (rf"'(?:[stmd]|re|ve|ll)| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|{_SPACES}",)
_DIGITS_GPT2 = (r"\p{N}", *_GPT2)


def _modern(digits: str, words: str = f"{_CONTRACTION}|{_WORD}") -> tuple[str, ...]:
    """The shape that Llama 3, Qwen 2 and their kin share; they differ in how many digits make a word."""
    return (rf"{words}|{digits}|{_SYMBOLS}[\r\n]*|{_LINES}|{_SPACES}",)


_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_GPT4O = (
    rf"{_CAMEL_1}(?:{_CONTRACTION})?|{_CAMEL_2}(?:{_CONTRACTION})?|\p{{N}}{{1,3}}"
    rf"|{_SYMBOLS}[\r\n/]*|{_LINES}|{_SPACES}"
)
_DEEPSEEK3_WORDS = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}"
)
_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")

_SCHEMES: tuple[tuple[Pretokenizer, str], ...] = (
    (
        Pretokenizer(_LLAMA3, whole_words=True, adds_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (Pretokenizer(_LLAMA3), "smaug-bpe dbrx chatglm-bpe glm4"),
    (
        Pretokenizer(_QWEN2),
        "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open kormo f2llmv2",
    ),
    (
        Pretokenizer((_QWEN35,)),
        "qwen35",
    ),
    (Pretokenizer((r"\p{N}{1,3}", *_modern(r"\p{N}+")), whole_words=True), "minicpm5"),
    (
        Pretokenizer(
            (rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_SPACES}",)
        ),
        "seed-coder",
    ),
    (
        Pretokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}",)),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        Pretokenizer((_GPT4O,)),
        "gpt-4o llama4 kanana2 minimax-m2",
    ),
    (
        Pretokenizer(
            (rf"{_CAMEL_1}|{_CAMEL_2}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}|{_SPACES}",),
            whole_words=True,
            adds_bos=True,
        ),
        "tekken",
    ),
    (
        Pretokenizer(_GPT2),
        "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling",
    ),
    (
        Pretokenizer(_DIGITS_GPT2),
        "smollm refact starcoder command-r codeshell exaone minerva-7b mellum2",
    ),
    (Pretokenizer((r"[\p{P}$+<=>^~|`]+", *_GPT2, r"[0-9]{3}")), "falcon"),
    (Pretokenizer((r"[\p{P}$+<=>^~|]+", *_GPT2, r"\p{N}+", r"[0-9]{3}")), "default"),
    (
        Pretokenizer(
            (
                r"[\r\n]",
                rf"\s?{_CASED}+",
                r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
                r"\s+\z",
                _HAN_WIDE,
                r"\p{N}+",
            )
        ),
        "deepseek-llm",
    ),
    (
        Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_WIDE, r"\p{N}")),
        "deepseek-coder",
    ),
    (
        Pretokenizer(
            (
                r"\p{N}{1,3}",
                _HAN_KANA,
                _DEEPSEEK3_WORDS,
            )
        ),
        "deepseek-v3 hunyuan-dense joyai-llm",
    ),
    (Pretokenizer((_NO_STOPS,)), "poro-chat bloom gpt3-finnish"),
    (Pretokenizer((_NO_STOPS, r"\p{N}")), "viking"),
)

PRETOKENIZERS: dict[str, Pretokenizer] = {
    name: scheme for scheme, names in _SCHEMES for name in names.split()
}

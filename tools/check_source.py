"""Checks what STYLE.md forbids and no compiler knows.

In csrc/: no call that prints, ends the process, reads the environment or takes memory past ps_alloc; every kernel
launch names its stream; no mutable statics (read from the objects of the built library, whose name is the argument,
so declarations cannot fool it); every file opens by saying what it is. Long files and functions are warnings.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 800, 80

# name of a called function -> why not; base/ps_base.c is where memory comes from
FORBIDDEN_CALLS = {
    **dict.fromkeys(
        ("abort", "exit", "_exit", "_Exit", "quick_exit", "assert"), "ends the process"
    ),
    **dict.fromkeys(
        ("printf", "fprintf", "vprintf", "puts", "fputs", "putchar", "perror"), "prints"
    ),
    **dict.fromkeys(("getenv", "secure_getenv", "setenv"), "touches the environment"),
}
MEMORY_CALLS = (
    "malloc", "calloc", "realloc", "free", "aligned_alloc", "posix_memalign", "strdup", "strndup",
    "asprintf", "vasprintf", "getline",
)  # fmt: skip
# The allocator's counters and the count of page-locked ranges: the exceptions of STYLE.md rule 12.
MAY_HOLD_STATE = {"ps_base.c.o", "ps_host_locks.c.o"}

COMMENT_OR_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
WORDS = re.compile(r"\b(pinned|backend|buffer id)\b", re.I)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def blank(match: re.Match[str]) -> str:
    """Spaces of the same shape, so that line numbers stay; quotes stay to keep arguments apart."""
    text = match[0]
    return re.sub(r"[^\n]", " ", text) if text[0] == "/" else '""' + " " * (len(text) - 2)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def launch_arguments(code: str, start: int) -> int:
    """How many arguments stand between the <<< that ends at `start` and its >>>."""
    end = code.find(">>>", start)
    depth, n = 0, 1
    for character in code[start:end]:
        depth += (character in "([{") - (character in ")]}")
        n += character == "," and depth == 0
    return n


def problems_of(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    code = COMMENT_OR_TEXT.sub(blank, text)
    if not text.startswith("/* "):
        yield 1, "does not open with a comment that says what the file is"
    for match in re.finditer(r"(?<![\w.>])(\w+)\s*\(", code):
        name = match[1]
        if name in FORBIDDEN_CALLS:
            yield line_of(code, match.start()), f"{name}() {FORBIDDEN_CALLS[name]}: report an error"
        if name in MEMORY_CALLS and path.name != "ps_base.c":
            yield line_of(code, match.start()), f"{name}(): host memory comes from ps_alloc"
    if path.suffix in (".cu", ".cuh"):
        for match in re.finditer("<<<", code):
            if (n := launch_arguments(code, match.end())) != 4:
                where = line_of(code, match.start())
                yield (
                    where,
                    f"a launch with {n} arguments: name grid, block, shared bytes and stream",
                )


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := UNFINISHED.search(line):
            yield number, f"{match[0]}: finish it or file it"
        if match := WORDS.search(line):
            yield number, f"the word {match[0]!r} means two things (STYLE.md, names, 5)"


def warnings_of(path: Path) -> Iterator[tuple[int, str]]:
    lines = path.read_text().splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield len(lines), f"{len(lines)} lines: is there a seam?"
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start is not None:
            if number - start > MAX_FUNCTION_LINES:
                yield start, f"a function of {number - start} lines: is there a seam?"
            start = None


def mutable_symbols(library: Path) -> Iterator[tuple[str, str]]:
    """(object, symbol) of all that lies in a writable section of the library's objects."""
    table = subprocess.run(["objdump", "-t", library], capture_output=True, text=True, check=True)
    member = ""
    for line in table.stdout.splitlines():
        if match := re.match(r"(\S+):\s+file format", line):
            member = match[1]
        # 0000000000000000 l     O .bss	0000000000000008 heap_live_bytes
        match = re.match(
            r"[0-9a-f]+ (?![^\t]*[dFf] ).{7} (\S+)\t[0-9a-f]+ (?:\.hidden )?(\S+)$", line
        )
        writable = match and re.match(r"(\.(data|bss|tdata|tbss)|\*COM\*)(?!\.rel\.ro)", match[1])
        if match and writable and member not in MAY_HOLD_STATE:
            yield member, match[2]


def main() -> int:
    csrc = ROOT / "csrc"
    sources = sorted(p for p in csrc.rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh"))
    python = sorted((ROOT / "pipeshard").rglob("*.py"))
    problems = [(path, *found) for path in sources for found in problems_of(path)]
    problems += [(path, *found) for path in [*sources, *python] for found in words_of(path)]
    for path in sources:
        for line, text in warnings_of(path):
            print(f"{path.relative_to(ROOT)}:{line}: warning: {text}")
    for path, line, text in problems:
        print(f"{path.relative_to(ROOT)}:{line}: {text}")
    n_problems = len(problems)
    for library in sys.argv[1:]:
        for member, symbol in mutable_symbols(Path(library)):
            print(f"{library}: {member}: {symbol} is mutable static state (STYLE.md rule 12)")
            n_problems += 1
    print(
        f"source rules: {len(sources)} C and CUDA files, {len(python)} Python files, {n_problems} problems"
    )
    return 1 if n_problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds and runs the C tests: every tests/c/test_*.c is one program that ends with 'N passed, N failed'.

    python3 tools/ctest.py [--cuda] [--sanitize address|thread] [--only CASE] [MODULE ...]

MODULE picks tests/c/test_MODULE.c; --only passes part of a test's name to each program. With --planted it runs
tests/c/planted_*.c of that sanitizer instead: programs with one deliberate bug each, which must die by it. With --fuzz
N it runs tests/fuzz/fuzz_MODULE.c over tests/fuzz/corpus/MODULE/ and N mutations of each file there; with --sanitize
fuzzer (clang) libFuzzer does the mutating, for N seconds.
A program that crashes, hangs or prints no total counts as one failed test.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psbuild
from psbuild import ROOT, BuildError, Config

TOTAL = re.compile(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$", re.M)
# The bug that each planted program holds, the sanitizer build that must catch it and what that prints.
PLANTED = {
    "planted_asan": ("address", "AddressSanitizer: "),
    "planted_ubsan": ("address", "runtime error: "),
    "planted_tsan": ("thread", "ThreadSanitizer: data race"),
}


def summary(counts: list[int]) -> str:
    passed, failed, skipped = counts
    return f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")


def run_program(
    program: Path, args: list[str], timeout_s: float, wrap: Sequence[str] = ()
) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [*wrap, str(ROOT / program), *args],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode(errors="replace")
        return -1, f"{output}no end after {timeout_s:.0f} s\n"
    return done.returncode, done.stdout.decode(errors="replace")


def run_tests(
    programs: list[Path], only: list[str], timeout_s: float, wrap: Sequence[str]
) -> list[int]:
    """Totals [passed, failed, skipped]; prints what failed or was skipped, and one line a program."""
    totals = [0, 0, 0]
    for program in programs:
        start = time.monotonic()
        status, output = run_program(program, only, timeout_s, wrap)
        lines = TOTAL.findall(output)
        counts = [int(n or 0) for n in lines[-1]] if lines else [0, 1, 0]
        if status != 0 and counts[1] == 0:
            counts[1] = 1  # died after its last line: a leak report, say
        if status != 0 or not lines:
            print(output, end="")
            print(f"{program.name}: exit status {status}")
        else:
            for line in output.splitlines():
                if line.startswith("skip "):
                    print(line)
        seconds = time.monotonic() - start
        print(f"{program.name}: {summary(counts)} in {seconds:.1f} s")
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    return totals


def run_fuzz(config: Config, names: list[str], effort: int, timeout_s: float) -> list[int]:
    """Every fuzz target over its corpus: with libFuzzer `effort` seconds, else `effort` mutations a file."""
    found = sorted(p.relative_to(ROOT) for p in (ROOT / "tests/fuzz").glob("fuzz_*.c"))
    driver = Path("tests/fuzz/fuzz_main.c")
    targets = [p for p in found if p != driver and (not names or p.stem[5:] in names)]
    with_libfuzzer = config.sanitize == "fuzzer"
    totals = [0, 0, 0]
    programs = psbuild.build_programs(config, targets, () if with_libfuzzer else [driver])
    for target, program in zip(targets, programs, strict=True):
        corpus = Path("tests/fuzz/corpus", target.stem[5:])
        args = [str(corpus), str(effort), f"build/crash_{target.stem}.bin"]
        if with_libfuzzer:
            found_here = (
                ROOT / "build/fuzz" / target.stem
            )  # the corpus in the tree grows by hand only
            found_here.mkdir(parents=True, exist_ok=True)
            args = [
                str(found_here),
                str(corpus),
                f"-max_total_time={effort}",
                "-artifact_prefix=build/",
            ]
        status, output = run_program(program, args, timeout_s)
        print(f"{target.stem}: {'clean' if status == 0 else f'exit status {status}'}")
        print("\n".join(output.splitlines()[-1 if status == 0 else -60 :]))
        totals[0 if status == 0 else 1] += 1
    return totals


def run_planted(config: Config, timeout_s: float) -> list[int]:
    names = [name for name, (sanitize, _) in PLANTED.items() if sanitize == config.sanitize]
    programs = psbuild.build_programs(config, [Path("tests/c", f"{name}.c") for name in names])
    totals = [0, 0, 0]
    for name, program in zip(names, programs, strict=True):
        status, output = run_program(program, [], timeout_s)
        fired = status != 0 and PLANTED[name][1] in output
        print(
            f"{name}: {'caught, as it must be' if fired else f'NOT caught (exit status {status}):'}"
        )
        if not fired:
            print(output)
        totals[0 if fired else 1] += 1
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--sanitize", choices=list(psbuild.SANITIZERS), default="")
    parser.add_argument(
        "--planted", action="store_true", help="the deliberate bugs of --sanitize instead"
    )
    parser.add_argument("--fuzz", type=int, metavar="EFFORT", help="the fuzz targets instead")
    parser.add_argument("--only", action="append", default=[], metavar="CASE")
    parser.add_argument("--wrap", default="", metavar="COMMAND", help="run programs under it")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="for each program")
    args = parser.parse_args()
    config = Config(cuda=args.cuda, sanitize=args.sanitize)
    # A leak is a failure; so is the first race.
    os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=1:detect_stack_use_after_return=1")
    os.environ.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    os.environ.setdefault("TSAN_OPTIONS", "halt_on_error=1:second_deadlock_stack=1")
    try:
        if args.planted:
            totals = run_planted(config, args.timeout)
        elif args.fuzz is not None:
            totals = run_fuzz(config, args.modules, args.fuzz, args.timeout)
        else:
            found = sorted((ROOT / "tests/c").glob("test_*.c"))
            wanted = [
                p for p in found if not args.modules or p.stem.removeprefix("test_") in args.modules
            ]
            missing = set(args.modules) - {p.stem.removeprefix("test_") for p in wanted}
            if missing:
                raise BuildError(f"no tests/c/test_{sorted(missing)[0]}.c")
            programs = psbuild.build_programs(config, [p.relative_to(ROOT) for p in wanted])
            totals = run_tests(programs, args.only, args.timeout, shlex.split(args.wrap))
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        totals = [0, 1, 0]
    print(
        f"{totals[0]} passed, {totals[1]} failed" + (f", {totals[2]} skipped" if totals[2] else "")
    )
    return 1 if totals[1] or totals[0] + totals[2] == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

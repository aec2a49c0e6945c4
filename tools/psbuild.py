"""The one builder of the C and CUDA sources: the Makefile, setup.py and the C test runner all call it.

It reads csrc/sources.txt, compiles what is out of date, in parallel, and makes libraries, programs and the
extension from the objects. Standard library only, so that a machine with nothing but compilers can use it.

An object lives in a folder named after its group and a hash of its command line and compiler, so builds with other
flags (sanitizers, CUDA, another Python) never mix and what they have in common is compiled once. It is out of date
when its source or a header that the compiler named (-MMD) is newer.

Environment: CC, CXX (nvcc's host compiler), CFLAGS, CUDA_HOME, PIPESHARD_CUDA=0 (leave CUDA out),
PIPESHARD_CUDA_ARCHS ("75 80 90a 120+PTX"), PIPESHARD_WERROR=1, PIPESHARD_JOBS.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Paths are relative to ROOT from here on: objects and messages do not depend on where it lies.
BUILD = Path("build")

# The oldest CPU that the core runs on; faster groups are entered only after asking the CPU. Contraction is off
# everywhere: where a fused multiply-add happens must follow from the source, not from the compiler.
CORE = "-O2 -march=x86-64-v2"
AVX2 = "-O3 -march=x86-64-v2 -mavx2 -mfma -mf16c -mbmi2"
AVX512 = AVX2 + " -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
AMX = AVX512 + " -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16"
GROUP_FLAGS = {
    "core": CORE,
    "avx2": AVX2,
    "avx512": AVX512,
    "amx": AMX,
    "binding": CORE,
    "test": CORE,
}
SIMD_GROUPS = ("avx2", "avx512", "amx")
GROUPS = ("core", *SIMD_GROUPS, "cuda", "binding")

C_FLAGS = "-std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -pthread -Icsrc"
C_WARNINGS = "-Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes"
# The file that we parse is hostile: libc's checks cost nothing measurable there. Sanitizers bring their own.
C_HARDENING = "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fstack-protector-strong"
# "fuzzer" is libFuzzer, which only clang has. -g1: reports name lines, and variables take a third longer to compile.
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -g1 -O1",
    "fuzzer": "-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -g1 -O1",
}
NVCC_FLAGS = "-O3 -std=c++17 -lineinfo -Icsrc"
# No C++ runtime: the extension must load with whatever libstdc++ the process has, or none.
NVCC_HOST_FLAGS = (
    "-fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-threadsafe-statics"
    " -march=x86-64-v2 -Wall -Wextra"
)


class BuildError(Exception):
    """The build cannot go on; the text is for the person who started it."""


@dataclasses.dataclass(frozen=True)
class Config:
    cuda: bool = False
    sanitize: str = ""  # "" or one of SANITIZERS
    werror: bool = os.environ.get("PIPESHARD_WERROR", "0") == "1"
    jobs: int = int(os.environ.get("PIPESHARD_JOBS") or len(os.sched_getaffinity(0)))

    @property
    def name(self) -> str:
        return "-".join(filter(None, ["cuda" if self.cuda else "cpu", self.sanitize]))


def sources() -> list[tuple[str, Path]]:
    """csrc/sources.txt as (group, path) in its order, checked."""
    found: list[tuple[str, Path]] = []
    for number, line in enumerate((ROOT / "csrc/sources.txt").read_text().splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        if len(fields) != 2 or fields[0] not in GROUPS:
            raise BuildError(
                f"csrc/sources.txt:{number}: expected 'GROUP PATH', group one of {', '.join(GROUPS)}"
            )
        path = Path("csrc", fields[1])
        if not (ROOT / path).is_file():
            raise BuildError(f"csrc/sources.txt:{number}: {path} does not exist")
        if path in (p for _, p in found):
            raise BuildError(f"csrc/sources.txt:{number}: {path} is listed twice")
        found.append((fields[0], path))
    return found


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "pipeshard/_version.py").read_text(), re.M)
    if match is None:
        raise BuildError("pipeshard/_version.py has no __version__")
    return match[1]


# ---- compilers ----


@functools.cache
def cc() -> tuple[str, ...]:
    named = os.environ.get("CC")
    for candidate in [named] if named else ["gcc", "clang", "cc"]:
        words = shlex.split(candidate)
        if shutil.which(words[0]):
            return tuple(words)
    raise BuildError(f"no C compiler: {named or 'gcc, clang, cc'} not found; install gcc or set CC")


@functools.cache
def nvcc() -> str | None:
    """Path of nvcc, or None where there is none or PIPESHARD_CUDA=0."""
    if os.environ.get("PIPESHARD_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, places) if path), None)


@functools.cache
def compiler_identity(*command: str) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} --version failed:\n{done.stderr}")
    return done.stdout


@functools.cache
def group_is_supported(group: str) -> bool:
    """Whether the C compiler knows the instruction set of `group`."""
    flags = shlex.split(GROUP_FLAGS[group])
    done = subprocess.run(
        [*cc(), *flags, "-xc", "-", "-fsyntax-only"], input="", text=True, capture_output=True
    )
    return done.returncode == 0


@functools.cache
def cuda_archs() -> tuple[str, ...]:
    """PIPESHARD_CUDA_ARCHS, else the GPUs of this machine, else sm_80 and its PTX, which newer GPUs compile."""
    given = re.split(r"[\s,;]+", os.environ.get("PIPESHARD_CUDA_ARCHS", "").strip())
    if given != [""] and given != ["native"]:
        for arch in given:
            if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
                raise BuildError(
                    f"PIPESHARD_CUDA_ARCHS: {arch!r} is not of the form 80, 90a or 120+PTX"
                )
        return tuple(given)
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        caps = sorted(set(re.findall(r"^(\d+)\.(\d)$", done.stdout, re.M)))
        if done.returncode == 0 and caps:
            # From Hopper on, 'a' opens the instructions of exactly that GPU (wgmma and its successors).
            return tuple(
                f"{major}{minor}" + ("a" if int(major) >= 9 else "") for major, minor in caps
            )
    return ("80+PTX",)


def cuda_lib_dir() -> Path:
    home = Path(os.path.realpath(nvcc() or "")).parent.parent
    for sub in ("lib64", "targets/x86_64-linux/lib", "lib"):
        if (home / sub / "libcudart_static.a").is_file():
            return home / sub
    raise BuildError(
        f"no libcudart_static.a under {home}: install the CUDA runtime's development files, or set PIPESHARD_CUDA=0"
    )


# ---- compiling ----


def present_groups(config: Config) -> list[str]:
    """The groups of a library: what the compilers at hand can build."""
    simd = [group for group in SIMD_GROUPS if group_is_supported(group)]
    return ["core", *simd, *(["cuda"] if config.cuda else [])]


def compile_command(config: Config, group: str) -> list[str]:
    """Everything but input and output."""
    if group == "cuda":
        command = [str(nvcc()), *shlex.split(NVCC_FLAGS)]
        if os.environ.get("CXX"):
            command += ["-ccbin", os.environ["CXX"]]
        for arch in cuda_archs():
            real = arch.removesuffix("+PTX")
            code = f"[sm_{real},compute_{real}]" if arch.endswith("+PTX") else f"sm_{real}"
            command += ["-gencode", f"arch=compute_{real},code={code}"]
        host = shlex.split(NVCC_HOST_FLAGS) + (["-Werror"] if config.werror else [])
        command += [f"-Xcompiler={','.join(host)}"]
        return command + (["-Werror=all-warnings"] if config.werror else [])

    command = [*cc(), *shlex.split(f"{C_FLAGS} {C_WARNINGS} {GROUP_FLAGS[group]}")]
    command += shlex.split(SANITIZERS[config.sanitize] if config.sanitize else C_HARDENING)
    if config.werror:
        command.append("-Werror")
    if group not in SIMD_GROUPS:
        # What a table of variants or devices may name; the SIMD files themselves do not depend on it.
        command += [f"-DPS_HAVE_{g.upper()}=1" for g in present_groups(config) if g != "core"]
    if group == "test":
        command.append("-Itests/c")
    if group == "binding":
        import numpy  # build requirement of the extension only

        command += ["-isystem", sysconfig.get_path("include"), "-isystem", numpy.get_include()]
        command += [
            f'-DPS_VERSION="{version()}"',
            f'-DPS_CUDA_ARCHS="{" ".join(cuda_archs()) if config.cuda else ""}"',
        ]
    return command + shlex.split(os.environ.get("CFLAGS", ""))


def object_path(command: Sequence[str], group: str, source: Path) -> Path:
    driver = command[: len(cc())] if group != "cuda" else command[:1]
    key = hashlib.sha256("\0".join([*command, compiler_identity(*driver)]).encode()).hexdigest()[
        :12
    ]
    return BUILD / "obj" / f"{group}-{key}" / source.with_suffix(source.suffix + ".o")


def is_current(obj: Path) -> bool:
    """Newer than everything that the compiler read for it."""
    try:
        made = (ROOT / obj).stat().st_mtime_ns
        rule = (ROOT / f"{obj}.d").read_text().replace("\\\n", " ").split(":", 1)[1]
        return all((ROOT / name).stat().st_mtime_ns < made for name in rule.split())
    except (OSError, IndexError):
        return False


def run_step(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{what} failed:\n{shlex.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stdout + done.stderr)


def compile_one(command: Sequence[str], source: Path, obj: Path) -> None:
    # Made under another name, so that a killed compiler leaves nothing behind, and dated by its start, so that a
    # header saved while the compiler ran counts as newer.
    start = time.time_ns()
    temporary = f"{obj}.{os.getpid()}.tmp"
    (ROOT / obj).parent.mkdir(parents=True, exist_ok=True)
    files = ["-c", str(source), "-o", temporary, "-MMD", "-MF", f"{obj}.d"]
    run_step([*command, *files], f"compiling {source}")
    os.utime(ROOT / temporary, ns=(start, start))
    os.replace(ROOT / temporary, ROOT / obj)


def compile_all(config: Config, wanted: Iterable[tuple[str, Path]]) -> list[Path]:
    """Objects of `wanted` (group, source), in that order."""
    commands = {
        group: compile_command(config, group) for group in dict.fromkeys(g for g, _ in wanted)
    }
    jobs = [(commands[g], source, object_path(commands[g], g, source)) for g, source in wanted]
    stale = [job for job in jobs if not is_current(job[2])]
    # nvcc files first, then big ones: the longest must not start last.
    stale.sort(
        key=lambda job: (job[1].suffix == ".cu", (ROOT / job[1]).stat().st_size), reverse=True
    )
    failed = threading.Event()

    def work(job: tuple[list[str], Path, Path]) -> None:
        if failed.is_set():
            return
        start = time.monotonic()
        try:
            compile_one(*job)
        except BuildError:
            failed.set()
            raise
        print(
            f"{job[0][0].rsplit('/')[-1]:<6} {job[1]} ({time.monotonic() - start:.1f} s)",
            flush=True,
        )

    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        for future in [pool.submit(work, job) for job in stale]:
            future.result()
    return [obj for _, _, obj in jobs]


# ---- linking ----


def link_step(output: Path, inputs: Sequence[Path], command: Sequence[str]) -> None:
    """Run `command`, which makes `output` from `inputs`, unless the same command already did from these."""
    note, text = ROOT / f"{output}.cmd", shlex.join(command)
    try:
        made = (ROOT / output).stat().st_mtime_ns
        if note.read_text() == text and all((ROOT / p).stat().st_mtime_ns < made for p in inputs):
            return
    except OSError:
        pass
    (ROOT / output).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / output).unlink(missing_ok=True)
    run_step(command, f"making {output}")
    note.write_text(text)


def link_libraries(config: Config) -> list[str]:
    flags = ["-pthread", "-lm", "-ldl", "-lrt"]
    if config.sanitize:
        flags += shlex.split(SANITIZERS[config.sanitize].replace("fuzzer-no-link", "fuzzer"))
    if config.cuda:
        # Its symbols stay ours: the process may hold another CUDA runtime (torch).
        flags = [str(cuda_lib_dir() / "libcudart_static.a"), *flags]
    return flags


def library_objects(config: Config) -> list[Path]:
    groups = present_groups(config)
    return compile_all(config, [(group, path) for group, path in sources() if group in groups])


def build_library(config: Config) -> Path:
    """build/libps.a, with suffixes for what it holds beside the plain core."""
    suffix = ("_cuda" if config.cuda else "") + (f"_{config.sanitize}" if config.sanitize else "")
    output, objects = BUILD / f"libps{suffix}.a", library_objects(config)
    link_step(output, objects, ["ar", "rcs", str(output), *map(str, objects)])
    return output


def build_programs(
    config: Config, programs: Sequence[Path], shared: Sequence[Path] = ()
) -> list[Path]:
    """One program for each source file, under build/bin/<config>/, linked with the sources `shared`
    and the library."""
    library = build_library(config)
    objects = compile_all(config, [("test", source) for source in (*programs, *shared)])
    outputs = []
    for source, obj in zip(programs, objects, strict=False):
        output = BUILD / "bin" / config.name / source.stem
        inputs = [obj, *objects[len(programs) :], library]
        command = [*cc(), *map(str, inputs), "-o", str(output), *link_libraries(config)]
        link_step(output, inputs, command)
        outputs.append(output)
    return outputs


def build_extension(config: Config, output: Path) -> None:
    """The CPython extension at `output` (absolute): every object in one file, nothing exported but PyInit__core."""
    objects = library_objects(config)
    objects += compile_all(
        config, [(group, path) for group, path in sources() if group == "binding"]
    )
    command = [
        *cc(),
        "-shared",
        f"-Wl,--version-script={ROOT}/tools/core.map",
        *map(str, objects),
        "-o",
        str(output),
        "-Wl,--exclude-libs,ALL",
        "-Wl,-z,relro,-z,now",
    ]
    (ROOT / BUILD).mkdir(exist_ok=True)
    run_step([*command, *link_libraries(config)], f"linking {output.name}")
    # A shared object may lack symbols until it is loaded; ours may lack only what Python and libc bring.
    done = subprocess.run(["nm", "-D", "--undefined-only", output], capture_output=True, text=True)
    lacks = re.findall(r"\b(ps_\w+|_Z\w+|__gxx\w+)", done.stdout)
    if lacks:
        output.unlink()
        raise BuildError(
            f"{output.name} lacks {', '.join(lacks)}: is a file missing in csrc/sources.txt?"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", choices=["lib", "sources", "archs"])
    parser.add_argument("--cuda", action="store_true", help="with the CUDA sources (needs nvcc)")
    parser.add_argument("--sanitize", choices=list(SANITIZERS), default="")
    args = parser.parse_args()
    try:
        if args.cuda and nvcc() is None:
            raise BuildError(
                "no nvcc: install the CUDA toolkit or set CUDA_HOME (and not PIPESHARD_CUDA=0)"
            )
        if args.action == "lib":
            print(build_library(Config(cuda=args.cuda, sanitize=args.sanitize)))
        elif args.action == "sources":
            print("\n".join(f"{group} {path}" for group, path in sources()))
        else:
            print(" ".join(cuda_archs()))
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

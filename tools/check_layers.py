"""Checks the direction of includes in csrc/: a folder may include itself and the folders before it.

base < format < device < kernels < engine < binding. Only binding/ includes Python.h and NumPy, only .cu and .cuh files
include CUDA's headers, and those lie in device/ and kernels/ alone; engine/ does not even name a CUDA function. Quoted
includes are paths from csrc/ on (tests may include their own harness).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = ("base", "format", "device", "kernels", "engine", "binding")
CUDA_FOLDERS = ("device", "kernels")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')
PYTHON_HEADER = re.compile(r"^(Python\.h|structmember\.h|numpy/.*|datetime\.h|frameobject\.h)$")
CUDA_HEADER = re.compile(
    r"^(cuda\w*\.h|cublas\w*\.h|cooperative_groups\.h|mma\.h|nv\w*\.h|(cub|cuda|thrust)/.*)$"
)
CUDA_NAME = re.compile(r"\b(cuda|cublas|cu)[A-Z]\w*")


def problems_of(path: Path, csrc: Path) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for one file."""
    relative = path.relative_to(csrc)
    folder = relative.parts[0]
    is_cuda = path.suffix in (".cu", ".cuh")
    if folder not in LAYERS or len(relative.parts) != 2:
        yield 0, f"lies outside the folders {', '.join(LAYERS)}"
        return
    if is_cuda and folder not in CUDA_FOLDERS:
        yield 0, f"CUDA sources belong in {' and '.join(CUDA_FOLDERS)}"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if folder == "engine" and (name := CUDA_NAME.search(line)):
            yield number, f"engine/ names {name[0]}: it sees devices only through the vtable"
        match = INCLUDE.match(line)
        if match is None:
            continue
        own, system = match.groups()
        if own is not None:
            target = own.split("/")[0]
            if not (csrc / own).is_file() or target not in LAYERS:
                yield number, f'"{own}" is not a file of csrc/ (write the path from csrc/ on)'
            elif LAYERS.index(target) > LAYERS.index(folder):
                yield number, f'{folder}/ includes "{own}" from a layer above it'
            elif own.endswith(".cuh") and not is_cuda:
                yield number, f'C includes the CUDA header "{own}"'
        elif PYTHON_HEADER.match(system) and folder != "binding":
            yield number, f"<{system}> outside binding/"
        elif CUDA_HEADER.match(system) and not is_cuda:
            yield number, f"<{system}> outside .cu and .cuh files"


def main() -> int:
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    files = sorted(p for p in csrc.rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh"))
    n_problems = 0
    for path in files:
        for line, text in problems_of(path, csrc):
            print(f"csrc/{path.relative_to(csrc)}:{line}: {text}")
            n_problems += 1
    print(f"layers: {len(files)} files, {n_problems} problems")
    return 1 if n_problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The checks of tools/: each rule fires on the smallest violation of it and is silent on its neighbour."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def tool(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAYERS = [
    ("engine/a.c", '#include "base/b.h"', None),
    ("engine/a.c", '#include "engine/b.h"', None),
    ("base/a.c", '#include "format/b.h"', "from a layer above"),
    ("format/a.c", '#include "kernels/b.h"', "from a layer above"),
    ("device/a.c", '  #  include "engine/b.h"', "from a layer above"),
    ("kernels/a.c", '#include "binding/b.h"', "from a layer above"),
    ("engine/a.c", '#include "b.h"', "is not a file of csrc"),
    ("engine/a.c", '#include "base/missing.h"', "is not a file of csrc"),
    ("engine/a.c", "#include <Python.h>", "outside binding"),
    ("base/a.h", "#include <numpy/arrayobject.h>", "outside binding"),
    ("binding/a.c", "#include <Python.h>", None),
    ("kernels/a.c", "#include <cuda_runtime.h>", r"outside \.cu"),
    ("kernels/a.h", "#include <cublas_v2.h>", r"outside \.cu"),
    ("kernels/a.cu", "#include <cuda_fp16.h>", None),
    ("engine/a.cu", "int x;", "CUDA sources belong in"),
    ("engine/a.c", "int r = cudaMalloc(&p, 1);", "names cudaMalloc"),
    ("engine/a.c", 'const char *name = "cuda";', None),
    ("lab/a.c", "int x;", "outside the folders"),
]


@pytest.mark.parametrize(("path", "line", "expected"), LAYERS)
def test_layers(root: Path, tmp_path: Path, path: str, line: str, expected: str | None) -> None:
    check = tool(root, "check_layers")
    for folder in check.LAYERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.h").write_text("")
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(line + "\n")
    found = [text for _, text in check.problems_of(file, tmp_path)]
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        with pytest.raises(AssertionError, match=expected):
            raise AssertionError(found[0])


SOURCE = [
    ("a.c", "void f(void) { abort(); }", "abort"),
    ("a.c", "void f(void) { exit (1); }", "exit"),
    ("a.c", 'void f(void) { printf("x"); }', "printf"),
    ("a.c", 'void f(void) { getenv("X"); }', "getenv"),
    ("a.c", "void f(void) { p = malloc(3); }", "ps_alloc"),
    ("ps_base.c", "void f(void) { p = malloc(3); }", None),
    ("a.c", "void f(void) { d->free(p); ps_free(p); }", None),
    ("a.c", "/* abort() would be wrong */ const char *s = \"exit()\"; // printf()", None),
    ("a.cu", "void f(void) { k<<<g, b>>>(p); }", "2 arguments"),
    ("a.cu", "void f(void) { k<<<dim3(x, y), b, 0>>>(p); }", "3 arguments"),
    ("a.cu", "void f(void) { k<T, 4><<<dim3(x, y), b, smem(a, b), stream>>>(p); }", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "expected"), SOURCE)
def test_source_rules(
    root: Path, tmp_path: Path, name: str, code: str, expected: str | None
) -> None:
    check = tool(root, "check_source")
    file = tmp_path / name
    file.write_text(f"/* a - a file. */\n{code}\n")
    found = list(check.problems_of(file))
    assert [line for line, _ in found] == ([] if expected is None else [2])
    assert expected is None or expected in found[0][1]


def test_files_open_with_a_comment(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.c"
    file.write_text("int x;\n")
    assert "does not open" in next(tool(root, "check_source").problems_of(file))[1]


@pytest.mark.parametrize("word", ["TODO: later", "the pinned buffer", "this backend"])
def test_words(root: Path, tmp_path: Path, word: str) -> None:
    check = tool(root, "check_source")
    file = tmp_path / "a.c"
    file.write_text(f"/* {word} */\n")
    assert len(list(check.words_of(file))) == 1
    file.write_text("/* spinned, TODOS */\n")
    assert list(check.words_of(file)) == []


def test_mutable_statics_are_seen_in_objects(root: Path, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    (tmp_path / "a.c").write_text(
        "static int zeroed; static int counted = 3; _Thread_local int threaded;\n"
        "static const int table[2] = {1, 2};\n"
        'static const char *const names[] = {"a"}; static const char *renamed[] = {"b"};\n'
        "const void *f(int i) { static int inner; inner++; zeroed++; counted++; threaded++;\n"
        "renamed[0]++; return i ? (const void *)&table[i] : names[0]; }\n"
    )
    subprocess.run(["gcc", "-fPIC", "-c", "a.c", "-o", "a.c.o"], cwd=tmp_path, check=True)
    subprocess.run(["ar", "rcs", "liba.a", "a.c.o"], cwd=tmp_path, check=True)
    found = {name for _, name in tool(root, "check_source").mutable_symbols(tmp_path / "liba.a")}
    assert {name.split(".")[0] for name in found} == {
        "zeroed", "counted", "threaded", "renamed", "inner",
    }  # fmt: skip


def build(root: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "tools/psbuild.py", *args],
        cwd=root, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_archs(root: Path) -> None:
    assert build(root, "archs", PIPESHARD_CUDA_ARCHS="75, 90a;120+PTX").stdout == "75 90a 120+PTX\n"
    wrong = build(root, "archs", PIPESHARD_CUDA_ARCHS="sm_90")
    assert wrong.returncode == 1
    assert "'sm_90' is not of the form" in wrong.stderr


def test_refusals_are_sentences(root: Path) -> None:
    no_cuda = build(root, "lib", "--cuda", PIPESHARD_CUDA="0")
    assert no_cuda.returncode == 1
    assert "no nvcc" in no_cuda.stderr
    no_compiler = build(root, "lib", CC="no-such-compiler")
    assert no_compiler.returncode == 1
    assert "no-such-compiler not found" in no_compiler.stderr


def test_setup_refuses_other_platforms(root: Path) -> None:
    code = (
        "import platform, runpy; platform.machine = lambda: 'aarch64';"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("no setuptools here")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("pipeshard runs on 64-bit Linux")

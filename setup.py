"""Builds the extension pipeshard._core; everything that is not compiled is in pyproject.toml.

The sources, flags and environment variables are those of tools/psbuild.py, so that `make` and pip build the same. With
nvcc on PATH or under CUDA_HOME the CUDA sources are built too; PIPESHARD_CUDA=0 leaves them out.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import psbuild


class BuildCore(build_ext):
    """Hands the one extension to psbuild, which compiles in parallel and only what is out of date."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        with_cuda = psbuild.nvcc() is not None
        print(f"pipeshard: {'with' if with_cuda else 'without'} CUDA", flush=True)
        try:
            psbuild.build_extension(psbuild.Config(cuda=with_cuda), output)
        except psbuild.BuildError as error:
            sys.exit(f"pipeshard: {error}")


if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
    sys.exit(f"pipeshard runs on 64-bit Linux on x86-64 only; this is {sysconfig.get_platform()}.")

setup(
    ext_modules=[Extension("pipeshard._core", sources=[])],
    cmdclass={"build_ext": BuildCore},
)

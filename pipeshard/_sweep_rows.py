"""What a sweep gives: rows, as a sequence, a table, a data frame and a picture; and the file that they are kept in, so
that a sweep that was interrupted goes on where it ended.

Not here: making rows (sweep.py). Threads: a Sweep is immutable; a Store belongs to one thread.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, overload

from .errors import FileError, FormatError, RequestError, UnsupportedError
from .sizes import format_bytes

__all__ = ["COLUMNS", "Row", "Store", "Sweep", "key_of"]

Row = dict[str, Any]

_TEXT, _COUNT, _NUMBER = str, int, float
COLUMNS: Mapping[str, type] = {
    "model": _TEXT,
    "vram_bytes": _COUNT,  # the budget that was asked for; None: whatever was free
    "n_prompt": _COUNT,
    "policy": _TEXT,
    "threads": _COUNT,  # None: all
    "device": _TEXT,
    "ttft_s": _NUMBER,  # the median; _lo and _hi: the least and the most, or a prediction's interval
    "ttft_lo": _NUMBER,
    "ttft_hi": _NUMBER,
    "tps": _NUMBER,
    "tps_lo": _NUMBER,
    "tps_hi": _NUMBER,
    "peak_bytes": _COUNT,
    "predicted_ttft_s": _NUMBER,
    "predicted_tps": _NUMBER,
    "bound_ttft_s": _NUMBER,  # no placement under this budget could beat these, says the cost model
    "bound_tps": _NUMBER,
    "error": _TEXT,  # None where all went well
    "source": _TEXT,  # measured, emulated, or simulated from which kind of profile
    "n_ctx": _COUNT,
    "n_gen": _COUNT,  # generated in each run: fewer than asked for where tokens are slow
    "repeats": _COUNT,
    "wall_s": _NUMBER,  # that the cell took, loading and all
    "plan_sha": _TEXT,
    "model_sha": _TEXT,
    "commit": _TEXT,
    "version": _TEXT,
}
# What makes two rows the same cell.
_KEY = ("model", "model_sha", "vram_bytes", "n_prompt", "n_ctx", "policy", "threads", "device")


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


class Sweep(Sequence[Row]):
    """Rows of a sweep, a dict each. `rows.plot()`, `rows.to_pandas()`, `rows.save("x.csv")`, `Sweep.load("x.csv")`."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sweep: ...
    def __getitem__(self, index: int | slice) -> Row | Sweep:
        return Sweep(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        n_failed = sum(row["error"] is not None for row in self)
        return f"<Sweep of {len(self)} cells{f', {n_failed} failed' if n_failed else ''}>"

    # ---- elsewhere ----

    def to_pandas(self) -> Any:
        """A DataFrame, a row a cell. What is not known is NaN, or <NA> where a column has whole numbers."""
        try:
            import pandas  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise UnsupportedError(
                "data frames need pandas: pip install pandas", what="to_pandas"
            ) from error
        kinds = {_TEXT: "object", _COUNT: "Int64", _NUMBER: "float64"}
        frame = pandas.DataFrame(list(self), columns=list(COLUMNS))
        return frame.astype({name: kinds[kind] for name, kind in COLUMNS.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """As .csv or .jsonl. An existing file is replaced."""
        form = _form_of(path)
        text = form.head() + "".join(form.line(row) for row in self)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise _file_error("write", path, error) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sweep:
        """What `save` or a sweep's `out=` wrote; of a cell that was run again, the last row. FileError, FormatError."""
        rows, _ = _read(path)
        return cls({key_of(row): row for row in rows}.values())

    # ---- for people ----

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib Figure: TTFT and TPS over the budget, a line a policy, the bound dashed; a row of panels for
        each model, prompt length, number of threads and device. With `path`, also a file of it."""
        from ._sweep_plot import plot

        figure = plot(self)
        if path is not None:
            try:
                figure.savefig(path)
            except OSError as error:
                raise _file_error("write", path, error) from error
            except ValueError as error:  # a format that matplotlib does not know
                raise RequestError(f"cannot draw {path}: {error}", argument="path") from error
        return figure

    def table(self) -> list[list[str]]:
        """Cells of text under a row of titles. Columns that say the same in every row, or nothing, are left out."""
        titles = [name for name in _TABLE if name in _ALWAYS or self._varies(name)]
        has_error = any(row["error"] for row in self)
        lines = [[_TABLE[name][0] for name in titles] + (["error"] if has_error else [])]
        for row in self:
            cells = [_TABLE[name][1](row) for name in titles]
            lines.append(cells + ([_shorten(row["error"] or "")] if has_error else []))
        return lines

    def _varies(self, name: str) -> bool:
        values = {row[name] for row in self}
        return values != {None} and (len(values) > 1 or name.startswith("predicted"))

    def __str__(self) -> str:
        lines = self.table()
        n_left = {"model", "policy", "device", "error"}
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = [
                cell.ljust(width) if title in n_left else cell.rjust(width)
                for title, cell, width in zip(lines[0], line, widths, strict=True)
            ]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    def _repr_html_(self) -> str:
        head, *body = self.table()

        def row(cells: list[str], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        lines = [f"<tr>{row(cells, 'td')}</tr>" for cells in body]
        return f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


# ---- the table ----


def _seconds(row: Row, name: str, *, spread: bool = False) -> str:
    value = row[name]
    if value is None:
        return "-"
    text = _short_seconds(value)
    low, high = row["ttft_lo"], row["ttft_hi"]
    if spread and low is not None and high - low > 0.005 * value:
        text += f" ({_short_seconds(low)} - {_short_seconds(high)})"
    return text


def _short_seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e6:.3g} us"


def _rate(row: Row, name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(row: Row, name: str) -> str:
    return "-" if row[name] is None else format_bytes(row[name])


_TABLE: Mapping[str, tuple[str, Any]] = {
    "model": ("model", lambda row: row["model"]),
    "device": ("device", lambda row: row["device"]),
    "n_prompt": ("prompt", lambda row: str(row["n_prompt"])),
    "threads": ("threads", lambda row: str(row["threads"] or "all")),
    "vram_bytes": (
        "budget",
        lambda row: _bytes(row, "vram_bytes") if row["vram_bytes"] is not None else "free",
    ),
    "policy": ("policy", lambda row: row["policy"]),
    "ttft_s": ("TTFT", lambda row: _seconds(row, "ttft_s", spread=True)),
    "predicted_ttft_s": ("predicted TTFT", lambda row: _seconds(row, "predicted_ttft_s")),
    "tps": ("TPS", lambda row: _rate(row, "tps")),
    "predicted_tps": ("predicted TPS", lambda row: _rate(row, "predicted_tps")),
    "peak_bytes": ("peak VRAM", lambda row: _bytes(row, "peak_bytes")),
}
_ALWAYS = ("vram_bytes", "policy", "ttft_s", "tps", "peak_bytes")


def _shorten(text: str, most: int = 72) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


# ---- files ----


class _Jsonl:
    def head(self) -> str:
        return ""

    def line(self, row: Row) -> str:
        return json.dumps({name: row[name] for name in COLUMNS}, allow_nan=False) + "\n"

    def rows(self, lines: list[str], path: str) -> Iterator[Row]:
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _wrong(path, number, "is no JSON") from error
            if not isinstance(data, dict):
                raise _wrong(path, number, "is no JSON object")
            yield _row(data, path, number)


class _Csv:
    def head(self) -> str:
        return self._text(list(COLUMNS))

    def line(self, row: Row) -> str:
        return self._text(["" if row[name] is None else row[name] for name in COLUMNS])

    def _text(self, cells: list[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def rows(self, lines: list[str], path: str) -> Iterator[Row]:
        reader = csv.reader(lines)
        head = next(reader, None)
        if head is None:
            return
        if head != list(COLUMNS):
            raise FormatError(
                f"{path} has other columns than a sweep's; give another file",
                path=path,
                field="header",
            )
        for number, cells in enumerate(reader, 2):
            if len(cells) != len(head):
                raise _wrong(path, number, f"has {len(cells)} cells, not {len(head)}")
            yield _row({n: cell or None for n, cell in zip(head, cells, strict=True)}, path, number)


def _row(data: Mapping[str, Any], path: str, number: int) -> Row:
    row: Row = {}
    for name, kind in COLUMNS.items():
        value = data.get(name)
        try:
            row[name] = None if value is None else kind(value)
        except (TypeError, ValueError) as error:
            raise _wrong(path, number, f"has {value!r} for {name}") from error
    return row


def _wrong(path: str, number: int, what: str) -> FormatError:
    return FormatError(f"{path}: line {number} {what}", path=path, field=f"line {number}")


def _form_of(path: str | os.PathLike[str]) -> _Jsonl | _Csv:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"out must be a str or a path, not {type(path).__name__}")
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".jsonl", ".ndjson"):
        raise RequestError(f"out must end in .csv or .jsonl, not {str(path)!r}", argument="out")
    return _Csv() if suffix == ".csv" else _Jsonl()


def _read(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """The rows of a file's whole lines, and how many bytes those take: the last line may be half a row, for a sweep can
    be ended at any moment."""
    form = _form_of(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _file_error("read", path, error) from error
    n_bytes = data.rfind(b"\n") + 1
    try:
        lines = data[:n_bytes].decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no text", path=str(path), offset=error.start) from error
    return list(form.rows(lines, str(path))), n_bytes


class Store:
    """The file of a sweep under way; without a path, none. A row is in the file once `add` returns."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.done: dict[tuple[Any, ...], Row] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        self._form = _form_of(path)
        n_bytes = 0
        if os.path.exists(path):
            rows, n_bytes = _read(path)
            # What failed may have been bad luck: it is tried again.
            self.done = {key_of(row): row for row in rows if row["error"] is None}
        try:
            self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
            self._file.truncate(n_bytes)
            if n_bytes == 0:
                self._write(self._form.head())
        except OSError as error:
            raise _file_error("write", path, error) from error

    def add(self, row: Row) -> None:
        if self._file is not None:
            self._write(self._form.line(row))

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text.encode("utf-8"))
        self._file.flush()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _file_error(verb: str, path: str | os.PathLike[str], error: OSError) -> FileError:
    reason = error.strerror or str(error)
    return FileError(f"cannot {verb} {path}: {reason}", path=str(path), errno=error.errno)

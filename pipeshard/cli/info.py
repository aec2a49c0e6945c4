"""`pipeshard info`: what a file says, its units by kind, and what of it fits which budget. Needs no GPU and reads no
weights.

Threads: none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _core
from .._metadata import Metadata
from ..errors import BudgetError, FormatError, UnsupportedError
from ..generate import check_int
from ..model import Model
from ..planner import Machine, Wishes, make_plan, smallest_budget
from ..sizes import format_bytes, parse_size
from .common import DEFAULT_CTX, note, open_model, table

__all__ = ["add_parser"]

_MAX_VALUE_CHARS = 70
_KINDS = ("embed", "attn", "ffn", "router", "expert", "head")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what is in a model, and what of it fits which budget",
        description="Metadata, units and bytes by kind, and what fits which budget of VRAM.",
    )
    parser.add_argument("file", nargs="?", metavar="MODEL.gguf", help="default: the demo model")
    parser.add_argument("-m", "--model", metavar="FILE", help="the same")
    parser.add_argument(
        "-c", "--ctx", type=int, default=DEFAULT_CTX, metavar="N", help="0: the model's own"
    )
    parser.add_argument(
        "--kv", default="f16", choices=("f16", "q8_0"), help="format of the KV cache"
    )
    parser.add_argument(
        "--vram",
        action="append",
        default=[],
        metavar="SIZE",
        help="a budget to ask about; may be repeated",
    )
    parser.add_argument("--metadata", action="store_true", help="every key, whole")
    parser.add_argument("--tensors", action="store_true", help="every tensor")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    path = options.file if options.file is not None else options.model
    n_ctx = check_int("ctx", options.ctx, 0, 1 << 27)
    asked = [parse_size(text, argument="vram") for text in options.vram]
    if path is None:
        path = open_model(None).path
    core = _core.Metadata(str(path))
    try:
        model: Model | None = Model(path)
    except (FormatError, UnsupportedError) as error:
        note(f"not a model that pipeshard runs: {error}")
        model = None
    facts = _facts(core, model, n_ctx, options.kv, asked)
    if options.json:
        print(json.dumps(facts | {"metadata": {k: _plain(v) for k, v in Metadata(core).items()}}))
        return 0
    for line in _text(core, facts, options.metadata, options.tensors):
        print(line)
    return 0


# ---- facts ----


def _facts(
    core: _core.Metadata, model: Model | None, n_ctx: int, kv: str, asked: list[int]
) -> dict[str, Any]:
    tensors = core.tensors()
    facts: dict[str, Any] = {
        "files": [{"path": path, "bytes": n_bytes} for path, n_bytes in core.files],
        "gguf_version": core.version,
        "n_tensors": len(tensors),
        "n_params": sum(math.prod(dims) for _, _, dims, _, _, _ in tensors),
        "tensor_bytes": sum(n_bytes for _, _, _, n_bytes, _, _ in tensors),
        "types": _types(tensors),
    }
    if model is None:
        return facts
    units: dict[str, dict[str, int]] = {}
    for unit in model.units:
        kind = units.setdefault(unit.kind, {"count": 0, "bytes": 0})
        kind["count"] += 1
        kind["bytes"] += unit.n_bytes
    wishes = Wishes(budget_bytes=0, n_ctx=n_ctx or model.n_ctx_train, n_seq=1, kv=kv)
    return facts | {
        "name": model.name,
        "arch": model.arch,
        "sha256": model.digest,
        "hparams": model.hparams,
        "units": {kind: units[kind] for kind in _KINDS if kind in units},
        "unit_bytes": model.n_bytes,
        "n_ctx": wishes.n_ctx,
        "kv": kv,
        "kv_bytes_per_tok": sum(unit.kv_bytes_per_tok for unit in model.units),
        "budgets": _budgets(model, wishes, asked),
    }


def _types(tensors: list[tuple[str, str, tuple[int, ...], int, int, int]]) -> dict[str, int]:
    types: dict[str, int] = {}
    for _, kind, _, n_bytes, _, _ in tensors:
        types[kind] = types.get(kind, 0) + n_bytes
    return dict(sorted(types.items(), key=lambda item: -item[1]))


def _budgets(model: Model, wishes: Wishes, asked: list[int]) -> list[dict[str, Any]]:
    """What lies in an NVIDIA GPU's memory under each budget: those asked for, or powers of two until everything
    does."""
    machine = Machine.of("cuda")
    rows = []
    smallest = smallest_budget(model, machine, wishes)
    first = max(smallest, model.n_bytes // 16).bit_length()
    for budget in sorted(asked) or [smallest, *(1 << i for i in range(first, 63))]:
        row: dict[str, Any] = {"budget": budget, "smallest": smallest}
        try:
            plan, _ = make_plan(
                model, machine, Wishes(budget, wishes.n_ctx, wishes.n_seq, wishes.kv)
            )
        except BudgetError:
            rows.append(row | {"fits": False})
            continue
        resident = {name for name, place in plan.places["decode"].items() if place == "vram"}
        n_bytes = dict.fromkeys(_KINDS, 0)
        for unit in model.units:
            if unit.name in resident:
                n_bytes[unit.kind] += unit.n_bytes
        rows.append(
            row
            | {
                "fits": True,
                "needed": plan.needed_bytes,
                "resident_bytes": sum(n_bytes.values()),
                "resident_by_kind": {kind: n for kind, n in n_bytes.items() if n},
                "bytes": dict(plan.bytes),
                "pass_tok": plan.pass_tok,
            }
        )
        if len(resident) == len(model.units) and not asked:
            break
    return rows


# ---- text ----


def _text(core: _core.Metadata, facts: Mapping[str, Any], whole: bool, tensors: bool) -> list[str]:
    lines = [f"{file['path']}: {format_bytes(file['bytes'])}" for file in facts["files"][:1]]
    if len(facts["files"]) > 1:
        total = format_bytes(sum(file["bytes"] for file in facts["files"]))
        lines = [f"{facts['files'][0]['path']} and {len(facts['files']) - 1} more parts: {total}"]
    lines.append(
        f"GGUF {facts['gguf_version']}, {facts['n_tensors']} tensors, "
        f"{facts['n_params'] / 1e6:.1f} million parameters: "
        + ", ".join(f"{kind} {format_bytes(n)}" for kind, n in facts["types"].items())
    )
    if "arch" in facts:
        lines += _model_lines(facts)
    lines += ["", "metadata"]
    width = 0 if whole else _MAX_VALUE_CHARS
    lines += [f"  {key} = {_value_text(value, width)}" for key, value in Metadata(core).items()]
    if tensors:
        rows = [("tensor", "type", "shape", "bytes")]
        rows += [
            (name, kind, "x".join(map(str, dims)), str(n_bytes))
            for name, kind, dims, n_bytes, _, _ in core.tensors()
        ]
        lines += ["", *table(rows, right=(3,))]
    return lines


def _model_lines(facts: Mapping[str, Any]) -> list[str]:
    hp = facts["hparams"]
    experts = (
        f", {hp['n_expert']} experts of which {hp['n_expert_used']} are used"
        if hp["n_expert"]
        else ""
    )
    lines = [
        f"{facts['name']}: {facts['arch']}, {hp['n_layer']} layers of {hp['n_embd']}{experts}, "
        f"vocabulary of {hp['n_vocab']}, made for {hp['n_ctx_train']} tokens",
        "",
    ]
    rows = [("units", "count", "bytes", "")]
    rows += [
        (kind, str(row["count"]), str(row["bytes"]), format_bytes(row["bytes"]))
        for kind, row in facts["units"].items()
    ]
    rows.append(("all", "", str(facts["unit_bytes"]), format_bytes(facts["unit_bytes"])))
    lines += table(rows, right=(1, 2, 3))
    per_tok = facts["kv_bytes_per_tok"]
    lines += [
        "",
        f"what fits, with a context of {facts['n_ctx']} tokens in {facts['kv']} ({per_tok} bytes a token in f16):",
    ]
    budgets = [("budget", "in VRAM", "share", "of what", "passes")]
    for row in facts["budgets"]:
        if not row["fits"]:
            least = f"nothing; at least {format_bytes(row['smallest'])} is needed"
            budgets.append((format_bytes(row["budget"]), "-", "-", least, "-"))
            continue
        by_kind = row["resident_by_kind"]
        parts = [
            kind
            if n == facts["units"][kind]["bytes"]
            else f"{n / facts['units'][kind]['bytes']:.0%} of {kind}"
            for kind, n in by_kind.items()
        ]
        budgets.append(
            (
                format_bytes(row["budget"]),
                format_bytes(row["resident_bytes"]),
                f"{row['resident_bytes'] / facts['unit_bytes']:.0%}",
                ", ".join(parts) or "no weights",
                f"{row['pass_tok']} tok",
            )
        )
    return lines + table(budgets, right=(0, 1, 2, 4))


def _value_text(value: Any, width: int) -> str:
    if isinstance(value, (list, np.ndarray)):
        items = value if width == 0 else value[:4]
        text = ", ".join(repr(_plain(item)) for item in items)
        kind = "str" if isinstance(value, list) else value.dtype.name
        more = ", ..." if len(items) < len(value) else ""
        return _cut(f"[{text}{more}]", width and width - 12) + f" ({len(value)} {kind})"
    return _cut(repr(value) if isinstance(value, str) else str(value), width)


def _cut(text: str, width: int) -> str:
    return text if not width or len(text) <= width else text[: width - 3] + "..."


def _plain(value: Any) -> Any:
    """For JSON and repr."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value

"""The picture of a sweep: TTFT and TPS over the budget.

Not here: rows (_sweep_rows.py). Threads: as matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import RequestError, UnsupportedError
from .sizes import format_bytes

if TYPE_CHECKING:
    from ._sweep_rows import Row

__all__ = ["plot"]

_PANEL = ("model", "device", "n_prompt", "threads")  # what gets a row of panels of its own
_MARKERS = "osD^vP*X<>hp"
_MAX_TICKS = 7  # of budgets, side by side
_LOG_FROM = 6.0  # largest value over smallest, from which a scale is logarithmic
_SCALES = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))


def plot(rows: Iterable[Row]) -> Any:
    """A matplotlib Figure. RequestError where there is nothing to draw, UnsupportedError without matplotlib."""
    rows = list(rows)
    order = dict.fromkeys(row["policy"] for row in rows)
    drawn = [row for row in rows if row["error"] is None and row["vram_bytes"] is not None]
    if not drawn:
        raise RequestError("the sweep has no row with a budget and a result", argument="rows")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UnsupportedError(
            'plots need matplotlib: pip install "pipeshard[plot]"', what="plot"
        ) from error
    panels = list(dict.fromkeys(tuple(row[name] for name in _PANEL) for row in drawn))
    policies = [name for name in order if any(row["policy"] == name for row in drawn)]
    styles = {policy: _style(i, plt) for i, policy in enumerate(policies)}
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(10, 0.7 + 3.3 * len(panels)), squeeze=False, layout="constrained"
    )
    plt.close(figure)  # it is the caller's, not pyplot's: a notebook would show it twice
    for pair, panel in zip(axes, panels, strict=True):
        mine = [row for row in drawn if tuple(row[name] for name in _PANEL) == panel]
        pair[0].set_title(_title(panel), loc="left", fontsize="medium", pad=12)
        _draw_ttft(pair[0], mine, styles)
        _draw(pair[1], mine, styles, "tps", 1.0)
        pair[1].set_ylabel("TPS (tokens/s)")
        for ax in pair:
            _set_budgets(ax, sorted({row["vram_bytes"] for row in mine}))
            ax.grid(alpha=0.25, which="major")
            ax.spines[["top", "right"]].set_visible(False)
    _set_legend(figure, axes)
    return figure


def _style(i: int, plt: Any) -> dict[str, Any]:
    """The first lines are the broadest, so that one shows where another runs along it."""
    colors = plt.get_cmap("tab10").colors
    return {
        "color": colors[i % len(colors)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": "-" if i < len(colors) else "--",
        "linewidth": max(1.2, 3.0 - 0.5 * i),
        "markersize": max(4.0, 8.0 - i),
    }


def _title(panel: tuple[Any, ...]) -> str:
    """Model and prompt, and where it ran if not on a GPU with all threads."""
    model, device, n_prompt, threads = panel
    parts = [model, f"prompt of {n_prompt} tokens"]
    if threads is not None:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if device.startswith("emu"):
        parts.append("emulated GPU")
    elif device != "cuda":
        parts.append(device)
    return ", ".join(parts)


def _draw_ttft(ax: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    most = max(row["ttft_s"] for row in rows)
    factor, unit = next((scale for scale in _SCALES if most * scale[0] >= 1), _SCALES[-1])
    _draw(ax, rows, styles, "ttft", factor)
    ax.set_ylabel(f"TTFT ({unit})")


def _draw(
    ax: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]], name: str, factor: float
) -> None:
    value = "ttft_s" if name == "ttft" else "tps"
    shown: list[float] = []
    for policy, style in styles.items():
        points = _points(rows, policy, value)
        if not points:
            continue
        y = [row[value] * factor for row in points]
        spread = [
            [at - row[f"{name}_lo"] * factor for at, row in zip(y, points, strict=True)],
            [row[f"{name}_hi"] * factor - at for at, row in zip(y, points, strict=True)],
        ]
        x = [row["vram_bytes"] for row in points]
        ax.errorbar(x, y, spread, label=policy, capsize=2, **style)
        shown += y
    bound = {row["vram_bytes"]: row[f"bound_{value}"] for row in rows if row[f"bound_{value}"]}
    if bound:
        x = sorted(bound)
        y = [bound[n] * factor for n in x]
        ax.plot(x, y, color="black", linestyle=":", linewidth=1.5, label="bound")
        shown += y
    if shown and max(shown) > _LOG_FROM * min(shown):
        ax.set_yscale("log")
        _set_log_ticks(ax)
    else:
        ax.set_ylim(bottom=0, top=1.08 * max(shown, default=1.0))


def _points(rows: Sequence[Row], policy: str, value: str) -> list[Row]:
    found = [row for row in rows if row["policy"] == policy and row[value] is not None]
    return sorted(found, key=lambda row: row["vram_bytes"])


def _set_log_ticks(ax: Any) -> None:
    """1, 2, 5, 10, 20 ... as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def _set_budgets(ax: Any, budgets: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    is_log = len(budgets) > 1 and budgets[0] > 0 and budgets[-1] >= 4 * budgets[0]
    if is_log:
        ax.set_xscale("log", base=2)
    ticks = _apart([math.log(n) for n in budgets] if is_log else budgets, budgets)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _budget_text(int(value))))
    ax.set_xlabel("VRAM budget")


def _apart(places: Sequence[float], budgets: Sequence[int]) -> list[int]:
    """Those of the budgets whose labels do not run into each other, the largest among them."""
    gap = (places[-1] - places[0]) / _MAX_TICKS
    kept = [len(budgets) - 1]
    for i in range(len(budgets) - 2, -1, -1):
        if places[kept[-1]] - places[i] >= gap:
            kept.append(i)
    return [budgets[i] for i in sorted(kept)]


def _budget_text(n_bytes: int) -> str:
    number, unit = format_bytes(n_bytes).split()
    return f"{float(number):.4g} {unit}"


def _set_legend(figure: Any, axes: Any) -> None:
    """One for all panels, beside them."""
    found: dict[str, Any] = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        found |= {
            label: handle
            for handle, label in zip(handles, labels, strict=True)
            if label not in found
        }
    bound = found.pop("bound", None)
    if bound is not None:
        found["bound"] = bound
    figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False)

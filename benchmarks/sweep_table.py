"""A sweep's rows as a table: of each cell policy auto with its least and most, the best of the other policies, what was
predicted, and the best that other programs reached on the same machine, tuned by hand.

    python benchmarks/sweep_table.py [--commit ID] sweep.csv ...
"""

from __future__ import annotations

import argparse
import csv
import statistics
from typing import Any

# H200 machine, October 2026: llama.cpp (LC), FreeToken 0.2.1 (FT) and the artifact of arXiv 2604.26334 (AE), the best
# setting of each whether or not it kept to the budget: milliseconds to the first token, tokens per second.
PEERS = {
    ("Qwen3-30B-A3B", 1024, 2): ("305 FT", "55.0 LC"),
    ("Qwen3-30B-A3B", 1024, 8): ("194 FT", "77.1 LC"),
    ("Qwen3-30B-A3B", 1024, 16): ("122 LC", "196 LC"),
    ("Qwen3-30B-A3B", 4096, 2): ("510 FT", "44.0 LC"),
    ("Minitron-8B", 1024, 2): ("277 AE", "8.2 AE"),
    ("Minitron-8B", 1024, 8): ("172 AE", "12.0 LC"),
    ("Minitron-8B", 4096, 2): ("591 AE", "6.1 LC"),
}
HEADER = (
    "model", "prompt", "budget", "auto ms", "best other", "peer ms", "predicted",
    "auto tok/s", "best other", "peer tok/s", "predicted", "peak/budget",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="sweep rows as a table")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    for name in options.files:
        with open(name, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    print(f"tools/gpu_sweep.sh at commit {options.commit}; medians; budgets in GiB of 2^30 bytes\n")
    lines = [HEADER]
    errors: list[float] = []
    behind: list[float] = []
    cells: dict[tuple[str, int, int], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["model"], int(row["n_prompt"]), int(row["vram_bytes"] or 0))
        cells.setdefault(key, []).append(row)
    for key in sorted(cells):
        lines.append(describe(key, merged(cells[key]), errors, behind))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    for line in lines:
        print(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
    failed = {
        f"{row['model']} {row['n_prompt']} {row['vram_bytes']} {row['policy']}: {row['error'][:60]}"
        for row in rows
        if row["error"]
    }
    for text in sorted(failed):
        print(text)
    if behind:
        print(
            f"\nauto against the best other, worst of TTFT and TPS a cell: {max(behind):.3f}x at worst"
        )
    if errors:
        near = sum(error <= 0.15 for error in errors)
        print(
            f"predictions within 15 %: {near} of {len(errors)}; median error {statistics.median(errors):.1%}"
        )


def number(row: dict[str, str], name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def merged(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row a policy: medians of several rounds, least and most of all of them."""
    found = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        same = [row for row in rows if row["policy"] == policy and not row["error"]]
        if not same:
            continue
        one = dict(same[0])
        for name, pick in (
            ("ttft_s", statistics.median), ("ttft_lo", min), ("ttft_hi", max), ("predicted_ttft_s", statistics.median),
            ("tps", statistics.median), ("tps_lo", min), ("tps_hi", max), ("predicted_tps", statistics.median),
        ):  # fmt: skip
            values = [v for row in same if (v := number(row, name)) is not None]
            one[name] = str(pick(values)) if values else ""
        found.append(one)
    return found


def describe(
    key: tuple[str, int, int],
    rows: list[dict[str, str]],
    errors: list[float],
    behind: list[float],
) -> tuple[str, ...]:
    model, n_prompt, budget = key
    good = [row for row in rows if not row["error"]]
    auto = next((row for row in good if row["policy"] == "auto"), None)
    others = [row for row in good if row["policy"] != "auto"]
    for row in good:
        for name in ("ttft_s", "tps"):
            got, said = number(row, name), number(row, f"predicted_{name}")
            if got and said:
                errors.append(abs(said - got) / got)
    peer = next(
        (p for (m, n, b), p in PEERS.items() if m in model and n == n_prompt and b << 30 == budget),
        ("", ""),
    )

    def columns(name: str, scale: float, lower_is_better: bool) -> tuple[str, str, str]:
        mine = number(auto, name) if auto else None
        said = number(auto, f"predicted_{name}") if auto else None
        pick: Any = min if lower_is_better else max
        best = pick(((v, r["policy"]) for r in others if (v := number(r, name))), default=None)
        if mine and best:
            behind.append(mine / best[0] if lower_is_better else best[0] / mine)
        low, high = (
            number(auto, name.removesuffix("_s") + end) if auto else None for end in ("_lo", "_hi")
        )
        spread = f" ({low * scale:.1f}-{high * scale:.1f})" if low and high else ""
        return (
            f"{mine * scale:.1f}{spread}" if mine else "-",
            f"{best[0] * scale:.1f} {best[1]}" if best else "-",
            f"{said * scale:.1f}" if said else "-",
        )

    ttft, tps = columns("ttft_s", 1e3, True), columns("tps", 1.0, False)
    peak = number(auto, "peak_bytes") if auto else None
    return (
        model, str(n_prompt), f"{budget / (1 << 30):g}", ttft[0], ttft[1], peer[0], ttft[2],
        tps[0], tps[1], peer[1], tps[2], f"{peak / budget:.2f}" if peak and budget else "-",
    )  # fmt: skip


if __name__ == "__main__":
    main()

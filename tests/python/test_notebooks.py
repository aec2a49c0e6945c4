"""The notebooks: every code cell runs, in order, by itself; and what they show is what a run left there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NAMES = ("01_sweep_budgets", "02_write_a_policy")
_RUN = """
import json, sys
import pipeshard
space = {"__name__": "__main__"}
for i, source in enumerate(json.load(sys.stdin)):
    try:
        exec(compile(source, f"code cell {i}", "exec"), space)
    except pipeshard.UnsupportedError as error:
        if error.what != "plot":  # matplotlib may be missing
            raise
"""


def read(root: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    notebook = json.loads((root / f"notebooks/{name}.ipynb").read_text())
    return notebook, [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_cells_run(root: Path, tmp_path: Path, name: str) -> None:
    _, cells = read(root, name)
    sources = ["".join(cell["source"]) for cell in cells]
    shutil.copy(root / "notebooks/my_policies.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(sources),
        cwd=tmp_path,
        env={"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), **_environment()},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if name.startswith("02"):
        assert "the same plan: True" in done.stdout
        assert "has no place for unit embed" in done.stdout


def _environment() -> dict[str, str]:
    import os

    return {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME") if key in os.environ}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_a_whole_run(root: Path, name: str) -> None:
    notebook, cells = read(root, name)
    assert notebook["nbformat"] == 4
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in kinds if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in kinds)
    assert any("text/html" in output.get("data", {}) for output in kinds) or name.startswith("02")
    assert (root / f"notebooks/{name}.ipynb").stat().st_size < 300_000


def test_the_notebook_shows_the_policy_of_the_file(root: Path) -> None:
    source = (root / "notebooks/my_policies.py").read_text()
    _, cells = read(root, "02_write_a_policy")
    policy = source[source.index("class TakingTurns") :].strip()
    assert len(policy.splitlines()) <= 32
    assert any(policy in "".join(cell["source"]) for cell in cells)

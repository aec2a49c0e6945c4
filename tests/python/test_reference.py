"""tests/data/reference.py against the golden logits that were computed independently of it, and the table of bars."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import reference

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
MODELS = sorted(path.stem for path in GOLDEN.glob("*.gguf"))
BARS = json.loads((GOLDEN / "bars.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_golden_logits(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    x = reference.logits(GOLDEN / f"{name}.gguf", golden["tokens"])
    # the golden array is rounded to float32: relative 2^-24, squared and averaged
    assert reference.nmse(x, golden["reference"]) < 2e-15


@pytest.mark.parametrize("name", MODELS)
def test_bars_follow_from_the_golden_logits(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    error = reference.nmse(golden["llamacpp"], golden["reference"])
    assert BARS[name]["llamacpp_nmse"] == pytest.approx(error, rel=1e-5)
    wide = name.endswith((".f32", ".f16", ".bf16"))
    assert BARS[name]["bar"] == pytest.approx(max(1.5 * error, 2e-6 if wide else 0.0), rel=1e-5)
    assert reference.top1_disagreements(golden["llamacpp"], golden["reference"]) == []


def test_every_architecture_and_format_is_kept() -> None:
    architectures, formats = set(), set()
    for name in MODELS:
        reader = gguf.GGUFReader(GOLDEN / f"{name}.gguf")
        architectures.add(reader.fields["general.architecture"].contents())
        formats |= {tensor.tensor_type.name for tensor in reader.tensors}
    assert architectures == set(reference.ARCHITECTURES)
    wanted = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
    assert formats == set(wanted.split())


def test_a_disagreement_beyond_rounding_is_seen() -> None:
    golden = np.load(GOLDEN / "llama-small.q4_0.npz")
    x = golden["reference"].copy()
    gaps = np.sort(x, axis=1)
    row = int((gaps[:, -1] - gaps[:, -2]).argmax())
    best, second = np.argsort(x[row])[::-1][:2]
    x[row, [best, second]] = x[row, [second, best]]
    assert reference.top1_disagreements(x, golden["reference"]) == [row]


def test_trace_holds_every_step_and_sections_follow_their_axis() -> None:
    model = reference.load(GOLDEN / "qwen2vl.f16.gguf")
    tokens = np.load(GOLDEN / "qwen2vl.f16.npz")["tokens"][:8]
    trace: reference.Trace = {}
    text = reference.logits(model, tokens, trace=trace)
    assert {"embd", "blk.1.q", "blk.1.x", "result_norm"} <= set(trace)
    same = np.tile(np.arange(8), (4, 1))
    assert np.array_equal(reference.logits(model, tokens, positions=same), text)
    image = same.copy()
    image[1] = 3  # a row of patches: the height axis stands still
    assert reference.nmse(reference.logits(model, tokens, positions=image), text) > 1e-4

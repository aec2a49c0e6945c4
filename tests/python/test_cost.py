"""The cost model: exact where a machine is as simple as its rates, as measured where something was measured."""

from __future__ import annotations

import math

import pytest

from pipeshard._profile import ANY_OP, Sample, default_profile
from pipeshard.cost import Shape, fit

RATES = {
    "h2d_bytes_per_s": 20e9,
    "d2h_bytes_per_s": 10e9,
    "vram_bytes_per_s": 400e9,
    "gpu_flops": 50e12,
    "dram_bytes_per_s": 40e9,
    "cpu_flops": 500e9,
    "launch_ns": 3000,
    "copy_ns": 7000,
    "flag_ns": 5000,
}


def matmul(n_tok: int, seconds: float, **other: object) -> Sample:
    values = {"side": "cpu", "op": "matmul", "fmt": "q4_0", "flops": n_tok << 26, "bytes": 18 << 20}
    return Sample(n_tok=n_tok, seconds=seconds, **(values | other))  # type: ignore[arg-type]


@pytest.mark.parametrize(("flops", "n_bytes"), [(0, 10**9), (10**13, 10**6), (10**9, 10**7)])
def test_rates_are_met_exactly(flops: int, n_bytes: int) -> None:
    model = fit(default_profile("emu", RATES).samples)
    shape = Shape("q4_0", 7, flops, n_bytes)
    gpu = 3e-6 + max(n_bytes / 400e9, flops / 50e12)
    cpu = 3e-6 + max(n_bytes / 40e9, flops / 500e9)
    assert model.seconds("matmul", shape, "vram") == pytest.approx(gpu)
    assert model.seconds("attn", shape, "stream") == pytest.approx(gpu)
    assert model.seconds("norm", shape, "cpu") == pytest.approx(cpu)
    for place, rate in (("h2d", 20e9), ("d2h", 10e9)):
        copy = model.seconds("copy", Shape(bytes=n_bytes), place)  # type: ignore[arg-type]
        assert copy == pytest.approx(7e-6 + n_bytes / rate)
    gather = model.seconds("gather", Shape(bytes=n_bytes), "h2d")
    assert gather == pytest.approx(3e-6 + n_bytes / 20e9)
    assert model.seconds("flag", Shape(), "fixed") == pytest.approx(5e-6)
    assert model.roof("cpu") == pytest.approx((40e9, 500e9))
    assert model.error == 0


def test_what_was_measured_is_predicted_as_measured() -> None:
    samples = [matmul(n, 0.001 * math.sqrt(n)) for n in (1, 4, 16, 64, 256)]
    model = fit(samples)
    for s in samples:
        shape = Shape("q4_0", s.n_tok, s.flops, s.bytes)
        assert model.seconds("matmul", shape, "cpu") == pytest.approx(s.seconds, rel=1e-3)
    between = model.seconds("matmul", Shape("q4_0", 8, 8 << 26, 18 << 20), "cpu")
    assert 0.002 < between < 0.004
    # Twice the work in the same form takes twice as long.
    double = model.seconds("matmul", Shape("q4_0", 64, 128 << 26, 36 << 20), "cpu")
    assert double == pytest.approx(0.016, rel=0.1)
    assert model.error < 1e-3  # samples on a power law predict each other


def test_the_model_knows_how_far_it_is_off() -> None:
    noise = (1.0, 1.3, 0.8, 1.2, 0.7)
    samples = [matmul(4**i, 0.001 * 2**i * x) for i, x in enumerate(noise)]
    assert 0.1 < fit(samples).error < 0.6


def test_formats_and_ops_have_their_own_samples() -> None:
    model = fit([matmul(1, 0.001), matmul(1, 0.004, fmt="f16"), matmul(1, 0.1, op="attn")])
    shape = Shape("q4_0", 1, 1 << 26, 18 << 20)
    assert model.seconds("matmul", shape, "cpu") == pytest.approx(0.001)
    assert model.seconds("matmul", shape._replace(fmt="f16"), "cpu") == pytest.approx(0.004)
    # What nobody timed lies between what is most like it.
    unknown = model.seconds("matmul", shape._replace(fmt="q8_0"), "cpu")
    assert 0.001 <= unknown <= 0.004


def test_threads_are_interpolated() -> None:
    samples = [matmul(1, 0.016 / n, threads=n) for n in (1, 4, 16)]
    shape = Shape("q4_0", 1, 1 << 26, 18 << 20)
    for threads, seconds in (
        (1, 0.016),
        (2, 0.008),
        (4, 0.004),
        (8, 0.002),
        (16, 0.001),
        (0, 0.001),
    ):
        assert fit(samples, threads).seconds("matmul", shape, "cpu") == pytest.approx(seconds)
    assert fit(samples, 64).seconds("matmul", shape, "cpu") == pytest.approx(0.001)


def test_load_slows_down() -> None:
    copies = [Sample("h2d", "copy", None, 0, 0, 1 << n, 2.0**n / 1e10) for n in (16, 20, 24)]
    busy = Sample("h2d", "copy", None, 0, 0, 1 << 24, 2.0**24 / 0.8e10, load="cpu")
    model = fit([matmul(1, 0.001), matmul(1, 0.0015, load="h2d"), *copies, busy])
    shape = Shape("q4_0", 1, 1 << 26, 18 << 20)
    assert model.seconds("matmul", shape, "cpu", "h2d") == pytest.approx(0.0015)
    assert model.seconds("copy", Shape(bytes=1 << 20), "h2d", "cpu") == pytest.approx(
        1.25 * model.seconds("copy", Shape(bytes=1 << 20), "h2d")
    )
    assert model.seconds("matmul", shape, "cpu", "d2h") == pytest.approx(0.001)
    # Gathers weigh as much as copies, until they were seen to weigh something else.
    assert model.seconds("matmul", shape, "cpu", "gather") == pytest.approx(0.0015)
    model = fit([matmul(1, 0.001), matmul(1, 0.0015, load="h2d"), matmul(1, 0.002, load="gather")])
    assert model.seconds("matmul", shape, "cpu", "gather") == pytest.approx(0.002)


def test_gathers_smaller_than_any_that_was_timed() -> None:
    """What 2 MB take says nothing of how long a hand-over of 8 KB is: that it takes as long as starting an op does."""
    timed = ((2_000_000, 53e-6), (20_000_000, 410e-6))
    gathers = [Sample("h2d", "gather", None, 1, 0, n, s) for n, s in timed]
    start = Sample("gpu", ANY_OP, None, 0, 0, 0, 3e-6)
    model = fit([*gathers, start])
    assert model.seconds("gather", Shape(bytes=2_000_000), "h2d") == pytest.approx(53e-6)
    assert model.seconds("gather", Shape(bytes=8192), "h2d") == pytest.approx(3e-6, rel=0.1)
    assert model.seconds("gather", Shape(bytes=1_000_000), "h2d") == pytest.approx(28e-6, rel=0.01)


def test_ops_that_read_host_memory() -> None:
    """As they were timed there; else as gathers, of which attention reaches a part of the rate and ops on experts all,
    however little they read."""
    gathers = [
        Sample("h2d", "gather", None, 1, 0, n, s) for n, s in ((2 << 20, 6e-5), (4 << 20, 1e-4))
    ]
    keys = [Sample("h2d", "attn", "f16", 1, 0, n, s) for n, s in ((1 << 20, 1e-4), (3 << 20, 2e-4))]
    assert fit(gathers).seconds("attn", Shape(bytes=2 << 20), "h2d") == pytest.approx(6e-5 / 0.95)
    assert fit(gathers).seconds("moe_up", Shape(bytes=1 << 20), "h2d") == pytest.approx(4e-5)
    assert fit(gathers).seconds("move", Shape(bytes=1 << 20), "h2d") == pytest.approx(3e-5, rel=0.1)
    model = fit([*gathers, *keys])
    for n_bytes, seconds in ((1 << 20, 1e-4), (2 << 20, 1.5e-4), (5 << 20, 3e-4)):
        assert model.seconds("attn", Shape(bytes=n_bytes), "h2d") == pytest.approx(seconds)
    assert model.seconds("gather", Shape(bytes=2 << 20), "h2d") == pytest.approx(6e-5)


def test_copies_between_sizes_and_beyond() -> None:
    model = fit([Sample("h2d", "copy", None, 0, 0, n, s) for n, s in ((1000, 1.0), (3000, 2.0))])

    def seconds(n: int) -> float:
        return model.seconds("copy", Shape(bytes=n), "h2d")

    assert [seconds(n) for n in (1000, 2000, 3000)] == pytest.approx([1.0, 1.5, 2.0])
    assert seconds(5000) == pytest.approx(3.0)
    assert seconds(0) == pytest.approx(0.5)


def test_no_samples_of_a_side() -> None:
    model = fit([])
    for place in ("vram", "cpu", "h2d", "fixed"):
        assert model.seconds("matmul", Shape("q4_0", 1, 1, 1), place) == 0  # type: ignore[arg-type]

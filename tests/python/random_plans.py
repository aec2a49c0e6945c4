"""Plans at random, sound and unsound, for test_matrix: what a policy could ask for, and what none should.

Not here: what must hold for them. Threads: pure functions of their generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeshard import Model, _core

Spec = dict[str, Any]
Rng = np.random.Generator

CPU, VRAM, STREAM, SPLIT = range(4)
N_CTX = 192
NO_BUDGET = (1 << 63) - 1


def needed_slot(model: Model, n_slots: int) -> int:
    """The smallest power of two that makes so many slots a ring which every unit of the model can pass through."""
    key = (model.digest, n_slots)
    if key not in _slots:
        spec = base_spec(model) | {"n_slots": n_slots}
        spec["kinds"][:] = STREAM
        size = 256
        while not _is_accepted(model, spec | {"slot_bytes": size}):
            size *= 2
        _slots[key] = size
    return _slots[key]


_slots: dict[tuple[str, int], int] = {}


def _is_accepted(model: Model, spec: Spec) -> bool:
    try:
        _core.Plan(model._core, **spec)
    except ValueError:
        return False
    return True


def base_spec(model: Model) -> Spec:
    """Everything on the CPU."""
    return {
        "tiers": [("decode", 1), ("small", 16), ("prefill", None)],
        "kinds": np.zeros((3, len(model.units)), np.uint8),
        "shares": None,
        "kv_vram_tok": None,
        "accelerator": True,
        "sm": 90,
        "budget_bytes": NO_BUDGET,
        "n_ctx": N_CTX,
        "n_seq": 1,
        "kv": "f16",
        "n_slots": 0,
        "slot_bytes": 0,
        "chunk_tok": 64,
        "pass_tok": 64,
        "logit_rows": 8,
        "graph_reserve_bytes": 0,
        "map_bytes_per_gib": 0,
        "per_tier_residency": False,
        "kv_far_on_cpu": False,
    }


# ---- sound plans ----


def sound_spec(model: Model, rng: Rng) -> Spec:
    """One that the core has no reason to refuse."""
    spec = base_spec(model)
    n_tiers = int(rng.integers(1, 6))
    bounds = sorted(rng.choice(np.arange(1, 60), n_tiers - 1, replace=False).tolist())
    spec["tiers"] = [(f"t{n}", n) for n in bounds] + [("rest", None)]
    spec["kinds"] = _kinds(model, rng, n_tiers)
    own = bool(rng.random() < 0.3)
    if own:
        spec["per_tier_residency"] = True
        spec["kinds"] = np.concatenate([_kinds(model, rng, 1) for _ in range(n_tiers)])
    if rng.random() < 0.3:
        spec["shares"] = _add_splits(model, rng, spec["kinds"], own)
    chunk = int(rng.choice([1, 3, 8, 17, 64, 100, 192]))
    spec["chunk_tok"] = chunk
    spec["pass_tok"] = int(rng.choice([chunk, chunk + int(rng.integers(0, 80)), 2 * chunk, 192]))
    spec["pass_tok"] = max(chunk, spec["pass_tok"])
    spec["logit_rows"] = int(rng.choice([1, 2, 8, 33]))
    spec["n_seq"] = int(rng.choice([1, 1, 2, 5]))
    spec["kv"] = str(rng.choice(["f16", "f16", "f16", "q8_0"]))
    spec["graph_reserve_bytes"] = int(rng.choice([0, 0, 4096, 1 << 20]))
    n_slots = int(rng.choice([1, 2, 3, 4, 7, 16, 64]))
    factor = int(rng.choice([2, 8, 16, 32, 64, 128, 256, 512]))  # tiny rings make for long lists
    spec["n_slots"] = n_slots
    spec["slot_bytes"] = needed_slot(model, n_slots) * factor + 256 * int(rng.integers(0, 3))
    n_layer = model.hparams["n_layer"]
    kv = int(rng.integers(0, 3))
    if kv > 0:
        chance = float(rng.choice([0.0, 0.3, 1.0]))
        spec["kv_vram_tok"] = np.where(rng.random(n_layer) < chance, 0, 1 << 30).astype(np.uint32)
        if rng.random() < 0.5:
            spec["kv_vram_tok"] = rng.choice([0, 1, 64, 100, 1 << 30], n_layer).astype(np.uint32)
            # without a draw, which would make other plans of all seeds
            spec["kv_far_on_cpu"] = int(spec["kv_vram_tok"].sum()) % 2 == 1
    return spec


def _kinds(model: Model, rng: Rng, n_tiers: int) -> Any:
    """Residents at random; the others stream or stay in each tier by one of several habits."""
    n = len(model.units)
    layers = np.array([-1 if u.layer is None else u.layer for u in model.units])
    kinds_of = ("embed", "attn", "ffn", "router", "expert", "head")
    parts = np.array([kinds_of.index(u.kind) for u in model.units])
    habit = int(rng.integers(0, 5))
    if habit == 0:  # every unit for itself
        resident = rng.random(n) < rng.random()
        streams = rng.random((n_tiers, n)) < rng.random((n_tiers, 1))
    elif habit == 1:  # layers alternate
        period = int(rng.integers(2, 5))
        resident = layers % period == 0
        streams = np.tile(layers % period == 1, (n_tiers, 1))
    elif habit == 2:  # parts of layers: attention here, experts there
        pick = rng.integers(0, 3, (n_tiers + 1, 8))
        resident = pick[0][parts] == 0
        streams = pick[1:][:, parts] == 1
    elif habit == 3:  # nothing resident, tiers all of one kind
        resident = np.zeros(n, bool)
        streams = np.tile(rng.random((n_tiers, 1)) < 0.7, (1, n))
    else:  # one unit differs from all others
        resident = np.full(n, bool(rng.random() < 0.5))
        resident[rng.integers(0, n)] ^= True
        streams = np.full((n_tiers, n), bool(rng.random() < 0.5))
        streams[rng.integers(0, n_tiers), rng.integers(0, n)] ^= True
    kinds = np.ascontiguousarray(np.where(streams, STREAM, CPU), np.uint8)
    kinds[:, resident] = VRAM
    return kinds


def _add_splits(model: Model, rng: Rng, kinds: Any, own: bool) -> Any:
    """Some units shared by both sides; the resident part is the same in all tiers, unless they have their own. Returns
    the shares."""
    n_tiers, n = kinds.shape
    can = np.array([unit.kind in ("attn", "ffn", "head") for unit in model.units])
    split = can & (rng.random(n) < rng.choice([0.1, 0.5, 1.0]))
    size = (n_tiers, n) if own else (n,)
    vram = np.where(rng.random(size) < 0.3, 0.0, rng.random(size))
    stream = (1 - vram) * np.where(rng.random((n_tiers, n)) < 0.3, 0.0, rng.random((n_tiers, n)))
    kinds[:, split] = SPLIT
    shares = np.stack([np.broadcast_to(vram, stream.shape), stream], axis=-1)
    shares[:, ~split] = 0.0
    _divide_experts(model, rng, kinds, shares)
    return np.ascontiguousarray(shares, np.float32)


def _divide_experts(model: Model, rng: Rng, kinds: Any, shares: Any) -> None:
    """In some layers and tiers bus and CPU share what is not resident, or some of it, at one ratio."""
    layers = np.array([-1 if u.expert is None else u.layer for u in model.units])
    chance = rng.choice([0.3, 1.0, 1.0])
    for tier in range(len(kinds)):
        for layer in range(model.hparams["n_layer"]):
            far = (layers == layer) & (kinds[tier] != VRAM) & (rng.random(layers.size) < chance)
            if rng.random() < 0.7:
                kinds[tier, far] = SPLIT
                shares[tier, far] = 0.0, rng.choice([0.0, 0.05, rng.random(), rng.random(), 1.0])


# ---- unsound ones ----


def _one(rng: Rng, array: Any) -> tuple[int, ...]:
    return tuple(int(rng.integers(0, n)) for n in array.shape)


def _residency(spec: Spec, rng: Rng) -> None:
    kinds = spec["kinds"]
    at = _one(rng, kinds)
    kinds[at] = CPU if kinds[at] == VRAM else VRAM


def _kind(spec: Spec, rng: Rng) -> None:
    spec["kinds"][_one(rng, spec["kinds"])] = int(rng.choice([4, 5, 100, 255]))


def _split(spec: Spec, rng: Rng) -> None:
    kinds = spec["kinds"]
    spec["shares"] = rng.choice(
        np.array([0.0, 0.5, 1.0, -0.25, 3.0, np.nan, np.inf, 1e-30], np.float32), (*kinds.shape, 2)
    )
    kinds[_one(rng, kinds)] = SPLIT


def _numbers(spec: Spec, rng: Rng) -> None:
    name = str(
        rng.choice(
            ["chunk_tok", "pass_tok", "logit_rows", "n_seq", "n_ctx", "n_slots", "slot_bytes"]
        )
    )
    spec[name] = int(
        rng.choice([0, 1, 255, 257, 1 << 20, (1 << 20) + 1, (1 << 27) + 1, (1 << 32) - 1])
    )


def _huge(spec: Spec, rng: Rng) -> None:
    """Products that leave 64 bits."""
    spec["kinds"][:] = STREAM
    spec["n_slots"], spec["slot_bytes"] = 1 << 20, 1 << 40
    spec["n_ctx"], spec["n_seq"] = 1 << 27, 4096
    spec["graph_reserve_bytes"] = int(rng.choice([0, 1 << 62, (1 << 64) - 1]))
    spec["map_bytes_per_gib"] = int(rng.choice([0, 1 << 30, (1 << 30) + 1, (1 << 64) - 1]))


def _ring(spec: Spec, rng: Rng) -> None:
    """Nearly large enough."""
    spec["kinds"][:, rng.integers(0, spec["kinds"].shape[1])] = STREAM
    spec["slot_bytes"] = max(0, spec["slot_bytes"] // int(rng.choice([2, 4, 64])) // 256 * 256)


def _tiers(spec: Spec, rng: Rng) -> None:
    tiers = spec["tiers"]
    choice = int(rng.integers(0, 4))
    if choice == 0:
        tiers[-1] = ("rest", 100)
    elif choice == 1:
        spec["tiers"] = [(name, 7) for name, _ in tiers[:-1]] + [("rest", None)]
    elif choice == 2:
        spec["tiers"] = [("none", 0), *tiers][: len(tiers)]
    else:
        spec["tiers"] = tiers[:-1]


def _kv(spec: Spec, rng: Rng) -> None:
    n_layer = 12
    spec["kv_vram_tok"] = rng.integers(0, 2 * N_CTX, n_layer).astype(np.uint32)


def _host(spec: Spec, rng: Rng) -> None:
    spec["accelerator"] = False


MUTATIONS: tuple[Callable[[Spec, Rng], None], ...] = (
    _residency, _kind, _split, _numbers, _huge, _ring, _tiers, _kv, _host,
)  # fmt: skip


def random_spec(model: Model, rng: Rng) -> tuple[Spec, str]:
    """Three of four are sound; the others have one thing wrong, or nearly so."""
    spec = sound_spec(model, rng)
    if rng.random() < 0.75:
        return spec, "sound"
    change = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))]
    change(spec, rng)
    return spec, change.__name__.strip("_")

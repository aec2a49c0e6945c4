"""Models of known shapes with random weights, tens of gigabytes in seconds: `synth` and the command of that name.

For measuring speed and testing exactness without a download. Values neither explode nor vanish: a
weight's standard deviation goes by its fan-in, and what layers add to the residual stream is kept below
the token's own embedding. That and weights with mean zero make the routing of mixtures near uniform over
random tokens; `router_skew` makes it Zipf-like instead (see `_Router`).

A large model's blocks are slices, each from a random place, of pools of 64 MiB a format and scale, copied
by several threads into a mapping of the preallocated file. (Writes to one file wait for each other in the
kernel; on two cores the mapping took 1.5-2.2 GB/s, `pwritev` 1.2-1.8.)

Not here: shapes and formats of tensors (synth_models), block contents (synth_blocks), vocabularies
(synth_vocab). Threads: `synth` joins its own before it returns; calls share nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import FileError, PipeshardError, RequestError
from .sizes import format_bytes
from .synth_blocks import FORMATS, Bytes, Floats, gaussian, make_blocks, rng_for, start_pool
from .synth_models import (
    FILE_TYPES,
    LAYERS_VARIANCE,
    MODELS,
    Shape,
    Tensor,
    find_file_type,
    find_model,
    metadata,
    tensors,
)
from .synth_vocab import make_vocab

__all__ = ["MODELS", "Shape", "Synthetic", "add_parser", "synth"]

F64 = npt.NDArray[np.float64]

ALIGNMENT = 32  # of tensors in the file; GGUF's default
POOL_BYTES = 64 << 20
_PIECE_BYTES = 256 << 10  # copied from one place of a pool
_JOB_BYTES = 32 << 20  # of one tensor, copied by one task

ROUTER_STD = (
    1.5  # of router scores: shares of the chosen experts are uneven, no expert drowns the others
)
_COMMON_DIMS = 32  # where all tokens agree, for formats without blocks
_MOST_POPULAR = 0.95  # no expert is chosen by more than this share of tokens


@dataclass(frozen=True)
class Synthetic:
    """What was written."""

    path: Path
    shape: Shape
    n_bytes: int
    n_weights: int
    seconds: float


def synth(
    name: str | Shape,
    out: str | os.PathLike[str],
    *,
    fmt: str | None = None,
    pure: bool = False,
    layers: int | None = None,
    vocab: int | None = None,
    seed: int = 0,
    router_skew: float = 0.0,
    chat_template: bool = True,
    weights: bool = True,
    threads: int | None = None,
    progress: bool = True,
) -> Synthetic:
    """Writes a GGUF file with the shape of a known model (`MODELS`) or of a `Shape`.

    `fmt` is a file type as llama.cpp names them (`q4_0`, `q4_k_m`, `mxfp4`, ...; by default the model's
    usual one); `pure` puts every matrix into its base format. Without `weights` the file is a header and a
    hole, enough to plan and simulate with and no disk. The content follows from the arguments
    other than `threads` and `progress`. An existing file is replaced once the new one is whole.
    """
    start = time.monotonic()
    shape = find_model(name) if isinstance(name, str) else name
    shape = _resized(shape, layers, vocab)
    if not (math.isfinite(router_skew) and router_skew >= 0):
        raise RequestError(
            f"router_skew must be 0 or more, not {router_skew}", argument="router_skew"
        )
    if router_skew and not shape.n_expert:
        raise RequestError(
            f"{shape.name} has no experts, so no router to skew", argument="router_skew"
        )
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be 1 or more, not {threads}", argument="threads")
    file_type = find_file_type(fmt if fmt is not None else shape.file_type)
    plan = tensors(shape, file_type.name, pure=pure)
    router = _Router(shape, plan, seed, router_skew) if shape.n_expert else None
    if router is not None:
        plan = [router.embedding if t.name == router.embedding.name else t for t in plan]
    n_threads = threads or min(16, len(os.sched_getaffinity(0)))
    path = Path(out)
    part = path.with_name(path.name + ".part")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory")
        with ThreadPoolExecutor(n_threads, "synth") as executor:
            work = _Work(executor, shape, plan, seed)
            try:
                data_start = _write_metadata(
                    part, shape, file_type.number, plan, seed, chat_template
                )
                if weights:
                    work.fill(part, data_start, router, progress)
                else:
                    _leave_hole(part, shape, plan, data_start, seed)
            finally:
                executor.shutdown(cancel_futures=True)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        text = error.strerror or str(error)
        raise FileError(f"cannot write {path}: {text}", path=str(path), errno=error.errno) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    n_weights = sum(t.n_elems for t in plan)
    return Synthetic(path, shape, path.stat().st_size, n_weights, time.monotonic() - start)


def _resized(shape: Shape, layers: int | None, vocab: int | None) -> Shape:
    for argument, value in (("layers", layers), ("vocab", vocab)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{argument} must be an int, not {type(value).__name__}")
    if layers is not None and not 1 <= layers <= 10_000:
        raise RequestError(f"layers must be 1 to 10000, not {layers}", argument="layers")
    if vocab is not None and not 1 <= vocab <= 400_000:
        raise RequestError(f"vocab must be 1 to 400000, not {vocab}", argument="vocab")
    return replace(
        shape,
        n_layer=shape.n_layer if layers is None else layers,
        n_vocab=shape.n_vocab if vocab is None else vocab,
    )


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _write_metadata(
    path: Path, shape: Shape, file_type: int, plan: Sequence[Tensor], seed: int, chat_template: bool
) -> int:
    """Everything before the tensors' data; returns where that begins."""
    import gguf  # here: it takes a while to import and only this command needs it

    # before the file is made: an unusable size must not leave one
    vocab = make_vocab(shape.vocab, shape.n_vocab, chat_template=chat_template)
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_type("model")
    writer.add_name(f"{shape.name} (synthetic, seed {seed})")
    for key, value in metadata(shape).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    for kind, token in vocab.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    for flag, on in vocab.flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", on)
    if vocab.chat_template:
        writer.add_chat_template(vocab.chat_template)
    writer.add_quantization_version(2)
    writer.add_file_type(file_type)
    for tensor in plan:
        type_id = gguf.GGMLQuantizationType(tensor.fmt.type_id)
        dims = tensor.dims[::-1]
        writer.add_tensor_info(tensor.name, dims, np.dtype(np.float32), tensor.n_bytes, type_id)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return _padded(path.stat().st_size)


def _leave_hole(
    path: Path, shape: Shape, plan: Sequence[Tensor], data_start: int, seed: int
) -> None:
    """Only the tables of rope factors, which opening a file looks at."""
    os.truncate(path, data_start + sum(_padded(t.n_bytes) for t in plan))
    at = data_start
    with path.open("r+b") as file:
        for tensor in plan:
            if tensor.role.startswith("rope_"):
                file.seek(at)
                file.write(_small(tensor, shape, seed).tobytes())
            at += _padded(tensor.n_bytes)


# -- the small tensors ----------------------------------------------------------------------------


def _small(tensor: Tensor, shape: Shape, seed: int) -> Floats:
    """A norm, bias or table of rope factors; with a router's norm, `_Router` asks for it again."""
    rng = rng_for(seed, tensor.name)
    if tensor.role in ("norm", "signed_norm"):
        # never near zero: a router divides by it
        spread = np.clip(rng.standard_normal(tensor.dims[::-1]), -4, 4)
        values = tensor.mean + tensor.std * spread
        if tensor.role == "signed_norm":
            values *= rng.choice((-1.0, 1.0), values.shape)
        return values.astype(np.float32)
    if tensor.role == "bias":
        return gaussian(tensor.dims[::-1], tensor.std, rng)
    n = tensor.dims[0]
    if tensor.role == "rope_freqs":
        return _llama3_factors(n, shape.rope_base, shape.rope_freqs, shape.n_ctx_orig)
    # phi3: rising with the wavelength, as the trained ones do
    top = {"rope_short": 1.5, "rope_long": 64.0}[tensor.role]
    return (top ** np.linspace(0.0, 1.0, n)).astype(np.float32)


def _llama3_factors(n: int, base: float, factor: float, n_orig: int) -> Floats:
    """1 for wavelengths of at most a quarter of the original context, `factor` for those longer than it,
    between them the inverse goes linearly from one to the other in turns per context."""
    wavelength = 2 * math.pi * base ** (np.arange(n) / n)
    kept = np.clip((n_orig / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / factor)).astype(np.float32)


# -- routing --------------------------------------------------------------------------------------


def popularity(n_expert: int, n_used: int, skew: float) -> F64:
    """The share of tokens that choose each expert, most popular first: proportional to rank^-skew as far
    as no share exceeds the limit. Sums to the number of experts a token uses."""
    wanted = np.arange(1, n_expert + 1, dtype=np.float64) ** -skew
    limit = max(_MOST_POPULAR, n_used / n_expert)
    shares = np.zeros(n_expert)
    n_full = 0
    while True:  # the first n_full are at the limit; the others share the rest
        rest = wanted[n_full:]
        shares[:n_full] = limit
        shares[n_full:] = rest * ((n_used - n_full * limit) / rest.sum())
        if n_full == n_expert or shares[n_full] <= limit:
            return shares
        n_full += 1


def _offsets(n_expert: int, n_used: int, skew: float) -> F64:
    """What to add to independent standard normal scores so that the best `n_used` follow `popularity`.
    The threshold that the best pass depends on all scores, so the first guess is corrected on a sample."""
    normal = NormalDist()
    target = popularity(n_expert, n_used, skew)
    goal = np.array([normal.inv_cdf(min(max(p, 1e-6), 1 - 1e-6)) for p in target])
    scores = rng_for("popularity").standard_normal((4096, n_expert))
    offsets = goal.copy()
    for _ in range(12):
        best = np.argpartition(scores + offsets, -n_used, axis=1)[:, -n_used:]
        seen = np.bincount(best.reshape(-1), minlength=n_expert) / len(scores)
        seen = np.clip(seen, 0.5 / len(scores), 1 - 0.5 / len(scores))
        offsets += 0.7 * (goal - np.array([normal.inv_cdf(p) for p in seen]))
    return np.asarray(offsets - offsets.mean())


class _Router:
    """The router matrices of a model.

    Uniform routing takes rows of equal length in the space that they see: behind the norm, whose weights
    are divided out. Scores of random tokens then are independent normal variables of one variance.

    Skew needs some experts to score higher for every token, without a bias in the file. So in the first
    block of every embedding row all tokens are made equal, which puts a constant direction into the
    residual stream; each router row has a component along it, and that component times the constant is
    the expert's bias. The popularity of a layer's experts is a permutation of its own of `popularity`.
    """

    def __init__(self, shape: Shape, plan: Sequence[Tensor], seed: int, skew: float) -> None:
        self.shape, self.seed = shape, seed
        self.plan = {tensor.name: tensor for tensor in plan}
        self.embedding = self.plan["token_embd.weight"]
        self.common: Bytes | None = None
        self.constant: F64 = np.zeros(0)
        self.offsets: F64 = np.zeros(shape.n_expert)
        if skew:
            self._make_common()
            self.offsets = _offsets(shape.n_expert, shape.n_expert_used, skew)

    def _make_common(self) -> None:
        import gguf
        from gguf.quants import dequantize

        if self.embedding.fmt.block_elems * 4 > self.shape.n_embd:
            # most of a row would be the same for all tokens: smaller blocks
            self.embedding = replace(self.embedding, fmt=FORMATS["q8_0"])
        fmt = self.embedding.fmt
        n_blocks = _COMMON_DIMS if fmt.block_elems == 1 else 1
        rng = rng_for(self.seed, "common direction")
        blocks = make_blocks(fmt, n_blocks, self.embedding.std, rng)
        self.common = blocks.reshape(-1)
        kind = gguf.GGMLQuantizationType(fmt.type_id)
        values = self.common.view({"f16": np.float16, "f32": np.float32}.get(fmt.name, np.uint8))
        self.constant = np.asarray(dequantize(values, kind), np.float64).reshape(-1)

    def matrix(self, tensor: Tensor) -> Floats:
        """[n_expert, n_embd]."""
        shape, n_common = self.shape, self.constant.size
        before = "post_attention_norm" if shape.arch == "gpt-oss" else "ffn_norm"
        norm = self.plan[f"blk.{tensor.layer}.{before}.weight"]
        rng = rng_for(self.seed, tensor.name)
        rows = rng.standard_normal((shape.n_expert, shape.n_embd))
        rows[:, :n_common] = 0.0
        rows *= ROUTER_STD / np.linalg.norm(rows, axis=1, keepdims=True)
        if n_common:
            # the norm divides the constant by the stream's size, which grows with the layers before
            added = LAYERS_VARIANCE * (2 * tensor.layer + 1) / (2 * shape.n_layer)
            size = math.sqrt(1.0 + added) * self.embedding.std
            along = self.constant * (size / float(self.constant @ self.constant))
            rows[:, :n_common] = (
                ROUTER_STD * rng.permutation(self.offsets)[:, None] * along[None, :]
            )
        return (rows / _small(norm, shape, self.seed)).astype(np.float32)


# -- the data -------------------------------------------------------------------------------------


@dataclass
class _Pool:
    """Blocks of one format and scale. Where they are as many as their tensors need, each is used once."""

    blocks: Bytes
    made: list[Future[None]]
    whole: bool


class _Work:
    """Fills a file's tensors. The pools are begun at once, so that they are made while the metadata is."""

    def __init__(self, executor: Executor, shape: Shape, plan: Sequence[Tensor], seed: int) -> None:
        self.executor, self.shape, self.plan, self.seed = executor, shape, plan, seed
        needed: dict[tuple[str, float], int] = defaultdict(int)
        self.first: dict[str, int] = {}  # of a tensor's blocks, where its pool is whole
        for tensor in plan:
            if tensor.role == "weight":
                key = (tensor.fmt.name, tensor.std)
                self.first[tensor.name] = needed[key]
                needed[key] += tensor.n_elems // tensor.fmt.block_elems
        self.pools: dict[tuple[str, float], _Pool] = {}
        for (name, std), n_blocks in needed.items():
            fmt = FORMATS[name]
            n_pool = min(n_blocks, POOL_BYTES // fmt.block_bytes)
            blocks, made = start_pool(fmt, n_pool, std, (seed,), executor)
            self.pools[name, std] = _Pool(blocks, made, whole=n_pool == n_blocks)

    def fill(self, path: Path, data_start: int, router: _Router | None, progress: bool) -> None:
        where, end = {}, data_start
        for tensor in self.plan:
            where[tensor.name] = end
            end += _padded(tensor.n_bytes)
        with open(path, "r+b") as file:
            # a full disk must show here: behind a mapping it would be a signal
            os.posix_fallocate(file.fileno(), 0, end)
        data = np.memmap(path, np.uint8, "r+", shape=(end,))
        with _progress_bar(end - data_start, progress) as bar:
            copies: list[Future[int]] = []
            for tensor in self.plan:
                start = where[tensor.name]
                place = data[start : start + tensor.n_bytes]
                if tensor.role == "weight":
                    copies += self._copies(tensor, place)
                    continue
                if tensor.role == "router" and router is not None:
                    values = router.matrix(tensor)
                else:
                    values = _small(tensor, self.shape, self.seed)
                place[:] = values.astype("<f4").reshape(-1).view(np.uint8)
            for copy in as_completed(copies):
                bar.update(copy.result())
        if router is not None and router.common is not None:
            tensor = router.embedding
            start = where[tensor.name]
            rows = data[start : start + tensor.n_bytes].reshape(-1, tensor.row_bytes)
            rows[:, : router.common.size] = router.common

    def _copies(self, tensor: Tensor, place: Bytes) -> Iterator[Future[int]]:
        """One task for each job's worth of a tensor; its result is the bytes that it copied."""
        pool = self.pools[tensor.fmt.name, tensor.std]
        for made in pool.made:
            made.result()
        size = tensor.fmt.block_bytes
        for first in range(0, len(place), _JOB_BYTES // size * size):
            part = place[first : first + _JOB_BYTES // size * size]
            if pool.whole:
                block = self.first[tensor.name] + first // size
                source = pool.blocks[block : block + len(part) // size]
                yield self.executor.submit(_copy_whole, part, source)
            else:
                rng = rng_for(self.seed, tensor.name, first)
                yield self.executor.submit(_copy_pieces, part, pool.blocks, rng)


def _copy_whole(place: Bytes, source: Bytes) -> int:
    place[:] = source.reshape(-1)
    return len(place)


def _copy_pieces(place: Bytes, pool: Bytes, rng: np.random.Generator) -> int:
    """Pieces from random blocks on, so that no two rows or experts are the same or shifted by much."""
    size = pool.shape[1]
    piece = _PIECE_BYTES // size * size
    flat = pool.reshape(-1)
    n_pieces = -(-len(place) // piece)
    starts = rng.integers(0, len(pool) - piece // size + 1, n_pieces) * size
    for i, start in enumerate(starts.tolist()):
        part = place[i * piece : (i + 1) * piece]
        part[:] = flat[start : start + len(part)]
    return len(place)


class _Bar(Protocol):
    def update(self, n: int) -> object: ...


@contextmanager
def _progress_bar(n_bytes: int, progress: bool) -> Iterator[_Bar]:
    """Shows itself after a second."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(
        total=n_bytes, unit="B", unit_scale=True, desc="synth", delay=1.0, disable=not progress
    ) as bar:
        yield bar


# -- the command ----------------------------------------------------------------------------------


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Adds `synth` to a command line; `run` in the parsed arguments takes those and returns the
    exit status."""
    parser = subparsers.add_parser(
        "synth",
        help="write a model of known shape with random weights",
        description="Writes a GGUF file with the shape of a known model and random weights.",
    )
    parser.add_argument("name", nargs="?", help="a model, see --list")
    parser.add_argument("out", nargs="?", help="file to write; by default NAME.TYPE.gguf here")
    parser.add_argument("--list", action="store_true", help="the models, their sizes and the types")
    parser.add_argument("--type", dest="fmt", metavar="TYPE", help="q4_0, q4_k_m, f16, mxfp4, ...")
    parser.add_argument(
        "--pure", action="store_true", help="every matrix in the type's base format"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the model's own number")
    parser.add_argument("--vocab", type=int, metavar="N", help="tokens instead of the model's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--router-skew", type=float, default=0.0, metavar="S",
        help="popularity of experts as rank^-S (default 0: uniform)",
    )  # fmt: skip
    parser.add_argument(
        "--no-weights", action="store_true", help="a header and a hole, for `pipeshard plan`"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.list or args.name is None:
        print(_listing())
        return 0 if args.list else 2
    shape = find_model(args.name)
    fmt = find_file_type(args.fmt or shape.file_type).name
    done = synth(
        shape, args.out or f"{shape.name}.{fmt}.gguf", fmt=fmt, pure=args.pure, layers=args.layers,
        vocab=args.vocab, seed=args.seed, router_skew=args.router_skew, threads=args.threads,
        progress=not args.quiet, weights=not args.no_weights,
    )  # fmt: skip
    rate = done.n_bytes / done.seconds / 1e9
    print(
        f"{done.path}: {done.n_weights / 1e9:.2f} billion weights, {done.n_bytes / 1e9:.2f} GB "
        f"in {done.seconds:.1f} s ({rate:.1f} GB/s)"
    )
    return 0


def _listing() -> str:
    lines = [f"{'model':<18}{'architecture':<14}{'weights':>9}  {'type':<8}{'size':>10}"]
    for shape in MODELS.values():
        plan = tensors(shape, shape.file_type)
        weights, size = sum(t.n_elems for t in plan), sum(t.n_bytes for t in plan)
        lines.append(
            f"{shape.name:<18}{shape.arch:<14}{weights / 1e9:>8.2f}B  {shape.file_type:<8}"
            f"{format_bytes(size):>10}"
        )
    return "\n".join([*lines, f"types: {', '.join(FILE_TYPES)}"])


def main(args: Sequence[str] | None = None) -> int:
    """`python -m pipeshard.synth`: the command without the rest of the package."""
    subparsers = argparse.ArgumentParser(prog="python -m pipeshard.synth").add_subparsers()
    parser = add_parser(subparsers)
    try:
        return run(parser.parse_args(args))
    except PipeshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

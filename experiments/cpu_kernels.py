"""How near to the machine's limit does the CPU compute MLPs and experts, and is any path of torch nearer?

    python -m experiments.cpu_kernels            4 minutes on 2 cores; writes experiments/results/cpu_kernels/
    python -m experiments.cpu_kernels --isa AVX512    the same as a CPU without bfloat16 and AMX would; -AVX512 is added
    python -m experiments.cpu_kernels --smoke    seconds on tiny shapes; writes nowhere unless --out is given

One gated MLP or a layer's experts, the same weights by every path: the native kernel, torch's F.linear and mv, oneDNN
and MKL with weights packed beforehand, inductor with constant weights and max-autotune (--inductor, minutes more).
Paths take turns within each round, each after a rest and a call that is not timed, beside a loop that reads memory and
does nothing else. A path's bandwidth is weight bytes over time; its share divides by the read loop's median over the
same rounds. The spread is half of the distance between quartiles over the median.

With --isa neither the kernel nor oneDNN, which torch computes by, uses more than that instruction set: what is asked of
eight tokens (three times F.linear) was asked on a CPU of that kind, and where F.linear has AMX it is beyond what memory
gives.

One should see the native kernel near the read loop at one token in every dtype, torch's bfloat16 at half to three
quarters of it, and for prompts a bfloat16 rate far above what float32 reaches by any path.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from tqdm import tqdm

from experiments.record import RESULTS, record
from hwmodels.errors import KernelError
from runtime import native
from runtime.native import Kernel
from runtime.ops import Piece, piece_views, torch_routed_mlp
from runtime.pages import large_pages

Path_ = Callable[[int], object]
"""Compute with the i-th of several equal sets of weights."""
_READ_BYTES, _POOL_BYTES = 256 << 20, 320 << 20  # many times the cache
_REST_S = 0.05  # torch's threads spin for a while after they worked, on a core that the next path needs
_DTYPES = ("bfloat16", "float32", "float16")
_ONEDNN = {"AVX2": "AVX2", "AVX512": "AVX512_CORE_VNNI", "AVX512_BF16": "AVX512_CORE_BF16"}
"""What oneDNN calls the instruction sets that it can be held to."""


@dataclass(frozen=True)
class Shape:
    """n_experts MLPs of one layer, each computing the same n_tokens rows."""

    name: str
    d_model: int
    columns: int
    n_experts: int
    n_tokens: tuple[int, ...]
    n_rounds: tuple[int, ...]

    @property
    def size(self) -> int:
        """Weights of one expert."""
        return 3 * self.d_model * self.columns


SHAPES = (
    Shape("dense", 4096, 14336, 1, (1, 8), (11, 9)),
    Shape("experts", 2048, 768, 8, (1, 8, 64), (31, 21, 9)),
    Shape("dense-prompt", 4096, 4096, 1, (32, 128, 512), (9, 5, 3)),
)
TINY = (Shape("dense", 64, 128, 1, (1, 8), (3, 3)), Shape("experts", 64, 32, 4, (1, 64), (3, 3)))


class Weights:
    """Several sets of a shape's weights, so that each use finds none in the caches."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        per_set = shape.size * shape.n_experts
        self.n_sets = max(2, _POOL_BYTES // (per_set * dtype.itemsize)) if shape.size > 1 << 20 else 2
        block = (torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) / shape.d_model**0.5).to(dtype)
        n_blocks = -(-self.n_sets * per_set // block.numel())
        self.flat = large_pages(torch.empty(n_blocks * block.numel(), dtype=dtype))  # as the runtime keeps them
        self.flat.view(n_blocks, -1).copy_(block)

    def pieces(self, i: int) -> list[Piece]:
        """A piece per expert of the i-th set."""
        shape, first = self.shape, (i % self.n_sets) * self.shape.size * self.shape.n_experts
        starts = range(first, first + shape.size * shape.n_experts, shape.size)
        return [piece_views(self.flat[s : s + shape.size], shape.d_model, shape.columns) for s in starts]

    @property
    def n_bytes(self) -> int:
        """Bytes of one set."""
        return self.shape.size * self.shape.n_experts * self.dtype.itemsize


# -- paths --------------------------------------------------------------------------------------------


def paths(kernel: Kernel, isa: str, weights: Weights, x: Tensor, inductor: bool) -> Iterator[tuple[str, Path_]]:
    """Every way to compute a set of experts for all rows of x that this build of torch has; the kernel's by an ISA."""
    rows, ones = torch.arange(x.shape[0]), torch.ones(x.shape[0])
    one_set = [(rows, ones)] * weights.shape.n_experts

    pieces = [weights.pieces(i) for i in range(weights.n_sets)]
    sets = [[(r, w, [p]) for (r, w), p in zip(one_set, own, strict=True)] for own in pieces]

    def experts(i: int) -> list[tuple[Tensor, Tensor, list[Piece]]]:
        return sets[i % weights.n_sets]

    yield f"native {isa}", lambda i: kernel.mlp(x, experts(i), 0, isa)
    yield "F.linear", lambda i: torch_routed_mlp(x, experts(i), silu)
    if x.shape[0] == 1:
        yield "mv", lambda i: [_by_mv(x[0], piece) for piece in pieces[i % weights.n_sets]]
    if weights.dtype != torch.float16:
        yield "oneDNN packed", _packed(x, [_onednn(piece, x.shape[0]) for piece in weights.pieces(0)])
    if weights.dtype == torch.float32 and torch._C.has_mkl:
        yield "MKL packed", _packed(x, [_mkl(piece, x) for piece in weights.pieces(0)])
    if inductor and weights.dtype != torch.float16:
        yield "inductor", _compiled(x, weights.pieces(0))


def _by_mv(x_D: Tensor, piece: Piece) -> Tensor:
    gate, up = torch.mv(piece[0], x_D).chunk(2)
    return torch.mv(piece[1], silu(gate) * up)


Product = Callable[[Tensor], Tensor]


def _packed(x: Tensor, experts: Sequence[tuple[Product, Product]]) -> Path_:
    def compute(_: int) -> None:
        for gate_up_of, down_of in experts:
            gate, up = gate_up_of(x).chunk(2, dim=-1)
            down_of(silu(gate) * up)

    return compute


def _onednn(piece: Piece, n_rows: int) -> tuple[Product, Product]:
    def product(w: Tensor) -> Product:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, n_rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return product(piece[0]), product(piece[1])


def _mkl(piece: Piece, like: Tensor) -> tuple[Product, Product]:
    def product(w: Tensor) -> Product:
        n_rows, own = like.shape[0], w.contiguous()
        packed = torch.ops.mkl._mkl_reorder_linear_weight(own, n_rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, own, None, n_rows)

    return product(piece[0]), product(piece[1])


class _Mlp(torch.nn.Module):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(w, requires_grad=False) for p in pieces for w in p[:2])

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all experts."""
        out = torch.zeros_like(x)
        for gate_up, down in zip(self.weights[::2], self.weights[1::2], strict=True):
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            out = out + linear(silu(gate) * up, down)
        return out


def _compiled(x: Tensor, pieces: Sequence[Piece]) -> Path_:
    torch._dynamo.reset()
    options: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": True, "max_autotune": True}
    compiled = torch.compile(_Mlp(pieces).eval(), options=options)
    compiled(x)
    return lambda _: compiled(x)


# -- measuring ----------------------------------------------------------------------------------------


def measure(
    kernel: Kernel, isa: str, shape: Shape, n_tokens: int, n_rounds: int, inductor: bool
) -> list[dict[str, Any]]:
    """A row per dtype and path, all of them and the read loop taking turns in every round."""
    read = large_pages(torch.empty(_READ_BYTES if shape.size > 1 << 20 else 1 << 20, dtype=torch.uint8)).fill_(1)
    rest_s = _REST_S if shape.size > 1 << 20 else 0.0
    cases: list[tuple[str, str, int, Path_]] = []
    for name in _DTYPES:
        weights = Weights(shape, getattr(torch, name))
        x = torch.randn(n_tokens, shape.d_model, generator=torch.Generator().manual_seed(1)).to(weights.dtype)
        cases += [(name, path, weights.n_bytes, f) for path, f in paths(kernel, isa, weights, x, inductor)]
    seconds: list[list[float]] = [[] for _ in cases]
    read_s: list[float] = []
    for i in range(-1, n_rounds):  # the first round warms up
        for found, (_, _, _, compute) in zip(seconds, cases, strict=True):
            found.append(_seconds(compute, i, rest_s))
        read_s.append(_seconds(lambda _: kernel.read(read), i, rest_s))
    bandwidth = read.nbytes / median(read_s[1:])
    flops = 2.0 * n_tokens * shape.size * shape.n_experts
    return [
        {
            "shape": shape.name,
            "d_model": shape.d_model,
            "columns": shape.columns,
            "n_experts": shape.n_experts,
            "n_tokens": n_tokens,
            "dtype": dtype,
            "path": path,
            "seconds": median(found[1:]),
            "spread": _spread(found[1:]),
            "GBps": n_bytes / median(found[1:]) / 1e9,
            "read_GBps": bandwidth / 1e9,
            "read_share": n_bytes / median(found[1:]) / bandwidth,
            "GFLOPps": flops / median(found[1:]) / 1e9,
            "n_rounds": n_rounds,
        }
        for found, (dtype, path, n_bytes, _) in zip(seconds, cases, strict=True)
    ]


def _seconds(compute: Path_, i: int, rest_s: float) -> float:
    time.sleep(rest_s)
    compute(2 * i)  # wakes its own threads
    start_s = time.perf_counter()
    compute(2 * i + 1)
    return time.perf_counter() - start_s


def _spread(seconds: Sequence[float]) -> float:
    low, middle, high = quantiles(seconds, n=4)
    return (high - low) / 2 / middle


def bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is asked of a CPU path, and what the native kernel reaches of it."""
    found: dict[str, Any] = {}
    cells = {(r["shape"], r["n_tokens"]) for r in rows}
    for shape, n in sorted(cells):
        here = [r for r in rows if (r["shape"], r["n_tokens"]) == (shape, n)]
        own = {r["dtype"]: r for r in here if r["path"].startswith("native")}
        bf16 = {r["path"]: r["GFLOPps"] for r in here if r["dtype"] == "bfloat16"}
        if n == 1:
            found[f"{shape}, 1 token: share of the read loop"] = {d: round(r["read_share"], 3) for d, r in own.items()}
        found[f"{shape}, {n} tokens: bfloat16 over F.linear"] = round(own["bfloat16"]["GFLOPps"] / bf16["F.linear"], 3)
        if n >= 128:
            best = max(r["GFLOPps"] for r in here if r["dtype"] == "float32" and not r["path"].startswith("native"))
            found[f"{shape}, {n} tokens: over torch's best float32"] = {
                d: round(r["GFLOPps"] / best, 3) for d, r in own.items()
            }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: torch's)")
    parser.add_argument("--inductor", action="store_true", help="compile the paths of inductor, too")
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], help="one shape only")
    parser.add_argument("--isa", choices=_ONEDNN, help="hold the kernel and oneDNN to it (default: the best of each)")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default {RESULTS.name}/cpu_kernels)")
    flags = parser.parse_args(argv)
    if flags.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = _ONEDNN[flags.isa]  # read at its first product
    before = torch.get_num_threads()
    torch.set_num_threads(flags.threads)
    kernel = native.installed()
    rows: list[dict[str, Any]] = []
    try:
        if isinstance(kernel, KernelError):
            print(f"nothing to compare: {kernel}")
            record(None, {}, rows, {"kernel": native.describe()})
            return
        shapes = [s for s in (TINY if flags.smoke else SHAPES) if flags.shape in (None, s.name)]
        cells = [(s, n, k) for s in shapes for n, k in zip(s.n_tokens, s.n_rounds, strict=True)]
        with torch.inference_mode():
            for shape, n_tokens, n_rounds in tqdm(cells, unit="cell", leave=False):
                rows += measure(kernel, flags.isa or kernel.isa, shape, n_tokens, n_rounds, flags.inductor)
        kernel.end_workers()
    finally:
        torch.set_num_threads(before)
    _report(flags, rows)


def _report(flags: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = ["shape", "n_tokens", "dtype", "path", "GBps", "read_share", "GFLOPps", "spread"]
    print(pd.DataFrame(rows)[shown].to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    usual = RESULTS / ("cpu_kernels" + (f"-{flags.isa}" if flags.isa else ""))
    out = flags.out or (None if flags.smoke else usual)
    settings = {"threads": flags.threads, "kernel": native.describe(), "isa": flags.isa, "inductor": flags.inductor}
    record(out, settings, rows, bars(rows))


if __name__ == "__main__":
    main()

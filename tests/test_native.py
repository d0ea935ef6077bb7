"""The native CPU kernel: as exact as float32 sums can be on every instruction set, the same bits every time."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from transformers.activations import ACT2FN

import hatch_build
from hwmodels.errors import KernelError
from runtime import native
from runtime.native import ISAS, Kernel, Piece
from runtime.ops import gated_mlp, piece_views, routed_mlp, torch_gated_mlp, torch_routed_mlp

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = 96  # rows from which on every dtype may be summed in another order, see panel.h
ENOUGH = 9  # from which on AMX multiplies them
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler"
)
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / hatch_build.LIBRARY
    hatch_build.build(ROOT / hatch_build.SOURCES, path)
    return path


@pytest.fixture(autouse=True)
def kernel(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel of these sources, in place of what is installed, on one thread."""
    n_threads = torch.get_num_threads()
    native.end_workers()  # the installed one's that an earlier test left: tests here count
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.delenv("SCHEINFER_KERNEL", raising=False)
    native.installed.cache_clear()
    torch.set_num_threads(1)
    found = native.kernel()
    assert found is not None
    yield found
    found.end_workers()
    torch.set_num_threads(n_threads)
    native.installed.cache_clear()


def random_piece(d_model: int, columns: int, dtype: torch.dtype, seed: int) -> Piece:
    values = torch.randn(3 * d_model * columns, generator=torch.Generator().manual_seed(seed))
    split = 2 * d_model * columns
    values[:split] /= d_model**0.5
    values[split:] /= columns**0.5
    return piece_views(values.to(dtype), d_model, columns)


def random_x(n_rows: int, d_model: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(seed)).to(dtype)


def doubled(pieces: Sequence[Piece]) -> list[Piece]:
    return [Piece(*(None if part is None else part.double() for part in piece)) for piece in pieces]


def assert_near(y: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    # Two roundings to the dtype, of h and of y, where torch has four and more; a float32 sum has its own.
    own, others = (y.double() - exact).abs().max(), (by_torch.double() - exact).abs().max()
    floor = 2 * torch.finfo(y.dtype).eps * max(1.0, float(exact.abs().max()))
    assert own <= max(3 * float(others), floor), f"off by {own:.2e}, torch by {others:.2e}"


# -- exactness ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    n_rows=st.sampled_from((0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 33, 64, 121, 250, 513)),
    d_model=st.integers(1, 150),
    columns=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_dense_part_is_as_near_to_float64_as_torch(isa, dtype, n_rows, d_model, columns, seed):
    kernel = native.kernel()
    if isa not in kernel.isas:
        return
    x = random_x(n_rows, d_model, dtype, seed)
    pieces = [random_piece(d_model, c, dtype, seed + i) for i, c in enumerate(columns)]
    y = kernel.mlp(x, [(None, None, pieces)], 0, isa)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    if n_rows:
        assert_near(y, torch_gated_mlp(x, pieces, silu), torch_gated_mlp(x.double(), doubled(pieces), silu))


@settings(max_examples=60)
@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    counts=st.lists(st.sampled_from((0, 1, 2, 5, 8, 9, 12, 15, 16, 17, 33, 49)), min_size=1, max_size=6),
    d_model=st.integers(1, 100),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_experts_add_up_whatever_rows_they_have(isa, dtype, counts, d_model, columns, seed):
    kernel = native.kernel()
    if isa not in kernel.isas:
        return
    x, order = random_x(49, d_model, dtype, seed), torch.Generator().manual_seed(seed)
    experts = []
    for i, n in enumerate(counts):  # rows in any order, an expert may have none
        rows = torch.randperm(49, generator=order)[:n]
        cut = min(columns, i * 13)
        pieces = [random_piece(d_model, c, dtype, seed + i + c) for c in (cut, columns - cut) if c]
        experts.append((rows, torch.rand(n, generator=order), pieces))
    y = kernel.mlp(x, experts, 0, isa)
    exact = torch_routed_mlp(x.double(), [(r, w.double(), doubled(p)) for r, w, p in experts], silu)
    assert_near(y, torch_routed_mlp(x, experts, silu), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 3, 150])
def test_long_sums_are_taken_in_blocks(kernel, isa, dtype, n_rows):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    x, pieces = random_x(n_rows, 4133, dtype), [random_piece(4133, 21, dtype, 1)]
    exact = torch_gated_mlp(x.double(), doubled(pieces), silu)
    assert_near(kernel.mlp(x, [(None, None, pieces)], 0, isa), torch_gated_mlp(x, pieces, silu), exact)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_those_of_the_families(kernel, name, isa):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    code = native.activation_code(ACT2FN[name])
    x, pieces = 8 * random_x(9, 48, torch.float32), [random_piece(48, 50, torch.float32, 2)]
    exact = torch_gated_mlp(x.double(), doubled(pieces), ACT2FN[name])
    assert_near(kernel.mlp(x, [(None, None, pieces)], code, isa), torch_gated_mlp(x, pieces, ACT2FN[name]), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [0.0, 65504.0, 2.0**-24, 2.0**-14 - 2.0**-24, float("inf"), -1.0])
def test_every_kind_of_half_precision_number_is_read_and_written(kernel, isa, value):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    gate_up, down = torch.ones(2, 1).half(), torch.full((1, 1), value).half()
    y = kernel.mlp(torch.full((1, 1), 30.0).half(), [(None, torch.tensor([1 / 900]), [Piece(gate_up, down)])], 0, isa)
    assert y.item() == torch.tensor(value).half().item()  # silu(30) * 30 = 900


def at_the_end(values: Tensor) -> Tensor:
    """The same where memory ends: a read beyond is a fault, which tile loads cannot hide from as from sanitizers."""
    n_pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (n_pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + n_pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    first = n_pages * mmap.PAGESIZE - values.nbytes
    there = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=first)
    return there.copy_(values.flatten()).view(values.shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n_rows", "d_model", "columns"), [(1, 70, 33), (17, 96, 64), (33, 333, 40), (100, 256, 77)])
def test_nothing_is_read_beyond_weights_and_rows(kernel, isa, n_rows, d_model, columns):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    x = at_the_end(random_x(n_rows, d_model, torch.bfloat16))
    gate_up, down = map(at_the_end, random_piece(d_model, columns, torch.bfloat16, 1)[:2])
    y = kernel.mlp(x, [(None, None, [Piece(gate_up, down)])], 0, isa)
    assert torch.equal(y, kernel.mlp(x.clone(), [(None, None, [Piece(gate_up.clone(), down.clone())])], 0, isa))
    projected = kernel.linear(x, gate_up, None, isa)
    assert torch.equal(projected, kernel.linear(x.clone(), gate_up.clone(), None, isa))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_an_expert_may_name_a_row_many_times(kernel, isa, dtype):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    x, piece = random_x(1, 200, dtype), random_piece(200, 24, dtype, 4)
    rows, weights = torch.zeros(300, dtype=torch.int64), torch.full((300,), 1 / 256)
    y = kernel.mlp(x, [(rows, weights, [piece])], 0, isa)
    once = kernel.mlp(x, [(None, None, [piece])], 0, isa)
    torch.testing.assert_close(y.double(), once.double() * 300 / 256, atol=1e-2, rtol=1e-2)


# -- the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_the_rest_of_the_batch(kernel, isa, dtype):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    x, pieces = random_x(31, 130, dtype), [random_piece(130, c, dtype, c) for c in (61, 8)]
    results = []
    for n_threads in (1, 2, 3, 2):
        torch.set_num_threads(n_threads)
        results.append(kernel.mlp(x, [(None, None, pieces)], 0, isa))
    assert all(torch.equal(results[0], other) for other in results[1:])
    by_tiles = isa == "AMX_BF16" and dtype == torch.bfloat16  # 31 rows are, fewer than ENOUGH are not
    more = [3, 14, 15, 9, 26, 5, 28, 8, 20] if by_tiles else []
    for rows in ([7, *more], [30, 0, 7, *more], [*range(10, 30)]):
        assert torch.equal(kernel.mlp(x[rows], [(None, None, pieces)], 0, isa), results[0][rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_the_same_bits_among_any_number_of_many_and_near_to_few(kernel, isa, dtype):
    if isa not in kernel.isas:
        pytest.skip(f"this CPU has no {isa}")
    x, pieces = random_x(600, 130, dtype), [random_piece(130, c, dtype, c) for c in (111, 8)]
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(kernel.mlp(x, [(None, None, pieces)], 0, isa))
    assert all(torch.equal(results[0], other) for other in results[1:])
    backwards = torch.arange(599, 599 - MANY, -1)
    assert torch.equal(kernel.mlp(x[backwards], [(None, None, pieces)], 0, isa), results[0][backwards])
    for n_rows in (MANY - 1, ENOUGH - 1):
        few = kernel.mlp(x[:n_rows], [(None, None, pieces)], 0, isa)
        exact = torch_gated_mlp(x[:n_rows].double(), doubled(pieces), silu)
        assert_near(results[0][:n_rows], few, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_many_rows_and_of_few_add_up(kernel, dtype):
    x, order = random_x(300, 70, dtype), torch.Generator().manual_seed(1)
    experts = []
    for i, n in enumerate((300, 5, MANY, 0, MANY - 1, ENOUGH, ENOUGH - 1, 1)):
        rows = torch.randperm(300, generator=order)[:n]
        experts.append((rows, torch.rand(n, generator=order), [random_piece(70, 100, dtype, i)]))
    exact = torch_routed_mlp(x.double(), [(r, w.double(), doubled(p)) for r, w, p in experts], silu)
    assert_near(kernel.mlp(x, experts, 0), torch_routed_mlp(x, experts, silu), exact)


# -- who computes -------------------------------------------------------------------------------------


@pytest.fixture
def taken(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of experts of every call that reaches the native kernel."""
    calls: list[int] = []
    compute = Kernel.mlp

    def counted(self: Kernel, x: Tensor, experts: Sequence[native.Expert], act: int) -> Tensor:
        calls.append(len(list(experts)))
        return compute(self, x, experts, act)

    monkeypatch.setattr(Kernel, "mlp", counted)
    return calls


def test_small_experts_of_a_layer_are_one_native_call(taken):
    x, rows, weights = random_x(3, 16, torch.bfloat16), torch.tensor([2, 0]), torch.tensor([0.5, 2.0])
    experts = [(rows, weights, [random_piece(16, 8, torch.bfloat16, i)]) for i in range(5)]
    near = torch_routed_mlp(x, experts, silu)
    torch.testing.assert_close(routed_mlp(x, experts, silu), near, atol=0.05, rtol=0.05)
    assert taken == [5]
    gated_mlp(x, experts[0][2], nn.SiLU())
    assert taken == [5, 1]


def test_what_the_kernel_does_not_know_torch_computes(taken):
    x, (gate_up, down, _) = random_x(2, 16, torch.float32), random_piece(16, 8, torch.float32, 0)
    gaps = Piece(gate_up, torch.cat([down, down], dim=1)[:, :8])
    for act, pieces, own in (
        (relu, [Piece(gate_up, down)], x),
        (gelu, [gaps], x),
        (silu, doubled([Piece(gate_up, down)]), x.double()),
        (silu, [Piece(gate_up, down)], x.clone().requires_grad_()),
    ):
        assert torch.equal(gated_mlp(own, pieces, act), torch_gated_mlp(own, pieces, act))
    assert taken == []


def test_long_prompts_in_bfloat16_are_left_to_torch_where_it_has_amx_and_the_kernel_has_not(taken, monkeypatch):
    monkeypatch.setattr(native, "_has_amx", lambda: True)
    monkeypatch.setattr(Kernel, "isa", property(lambda _: "AVX512_BF16" if "AVX512_BF16" in _.isas else "portable"))
    for n_rows in (1, 31, 32, 500):
        gated_mlp(random_x(n_rows, 16, torch.bfloat16), [random_piece(16, 8, torch.bfloat16, 0)], silu)
    assert taken == [1, 1]
    gated_mlp(random_x(500, 16, torch.float32), [random_piece(16, 8, torch.float32, 0)], silu)
    monkeypatch.setenv("SCHEINFER_KERNEL", "native")
    gated_mlp(random_x(500, 16, torch.bfloat16), [random_piece(16, 8, torch.bfloat16, 0)], silu)
    assert taken == [1, 1, 1, 1]


def test_rows_of_x_may_lie_apart(taken):
    x, pieces = random_x(16, 4, torch.float32).T, [random_piece(16, 8, torch.float32, 0)]
    torch.testing.assert_close(gated_mlp(x, pieces, silu), torch_gated_mlp(x, pieces, silu))
    assert taken == [1]


def test_the_environment_chooses_torch(taken, monkeypatch):
    monkeypatch.setenv("SCHEINFER_KERNEL", "torch")
    x, pieces = random_x(2, 16, torch.bfloat16), [random_piece(16, 8, torch.bfloat16, 0)]
    assert torch.equal(gated_mlp(x, pieces, silu), torch_gated_mlp(x, pieces, silu))
    assert taken == []
    assert native.describe().startswith("torch linear")
    assert native.kernel_findings() == []


def test_an_unknown_choice_is_an_error_that_lists_them(monkeypatch):
    monkeypatch.setenv("SCHEINFER_KERNEL", "fast")
    with pytest.raises(KernelError, match="choose one of auto, native, torch"):
        native.kernel()


def test_without_a_library_torch_computes_and_the_doctor_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    native.installed.cache_clear()
    assert native.kernel() is None
    assert "reinstall" in native.kernel_findings()[0].limit
    monkeypatch.setenv("SCHEINFER_KERNEL", "native")
    with pytest.raises(KernelError, match="not there"):
        native.kernel()


def test_a_file_that_is_no_library_is_an_error_a_person_can_act_on(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(KernelError, match="reinstall"):
        native.load(broken)


def test_the_fingerprint_names_the_kernel(kernel):
    assert native.describe() == f"native 17, {kernel.isa}"


# -- threads ------------------------------------------------------------------------------------------


def n_workers() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return names.count("scheinfer-mlp")


def comes_to(n: int) -> bool:
    for _ in range(500):
        if n_workers() == n:
            return True
        time.sleep(0.01)
    return False


def big_call(kernel: Kernel) -> Tensor:
    return kernel.mlp(random_x(64, 256, torch.float32), [(None, None, [random_piece(256, 512, torch.float32, 3)])], 0)


def test_workers_stay_for_the_next_call_and_end_when_told(kernel):
    torch.set_num_threads(3)
    first = big_call(kernel)
    assert comes_to(2)
    assert torch.equal(big_call(kernel), first)
    assert n_workers() == 2
    kernel.end_workers()
    assert comes_to(0)
    kernel.end_workers()
    assert torch.equal(big_call(kernel), first)


def test_workers_end_with_the_thread_that_they_computed_for(kernel):
    def compute() -> None:
        torch.set_num_threads(2)
        big_call(kernel)

    caller = threading.Thread(target=compute)
    caller.start()
    caller.join()
    assert comes_to(0)


def test_two_threads_compute_at_once(kernel):
    torch.set_num_threads(2)
    expected, found = big_call(kernel), []

    def compute() -> None:
        found.extend(big_call(kernel) for _ in range(20))

    callers = [threading.Thread(target=compute) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 60
    assert all(torch.equal(y, expected) for y in found)


def test_other_python_threads_go_on_during_a_call(kernel):
    count, stop = 0, threading.Event()

    def counting() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    other = threading.Thread(target=counting)
    other.start()
    try:
        assert any(_advances(lambda: count, kernel) for _ in range(200))
    finally:
        stop.set()
        other.join()


def _advances(count, kernel: Kernel) -> bool:
    x, pieces = random_x(256, 256, torch.float32), [random_piece(256, 1024, torch.float32, 3)]
    before = count()
    kernel.mlp(x, [(None, None, pieces)], 0, "portable")
    return count() > before + 1000


_FORK = """
import os, sys, torch
from pathlib import Path
from runtime import native
kernel = native.load(Path(sys.argv[1]))
torch.set_num_threads(2)
x = torch.ones(8, 64)
piece = native.Piece(torch.ones(2 * 96, 64), torch.ones(64, 96))
y = kernel.mlp(x, [(None, None, [piece])], 0)
child = os.fork()
if child == 0:
    same = torch.equal(kernel.mlp(x.clone(), [(None, None, [piece])], 0), y)
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_forked_child_computes_with_threads_of_its_own(library):
    done = subprocess.run([sys.executable, "-c", _FORK, library], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- building -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cxx", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_a_note_and_no_library(cxx, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", cxx)
    folder = tmp_path / hatch_build.SOURCES
    shutil.copytree(ROOT / hatch_build.SOURCES, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    stale = folder / hatch_build.LIBRARY
    stale.write_bytes(b"of older sources")
    note = hatch_build.build_in(tmp_path)
    assert "torch computes on the CPU" in note
    assert cxx in note
    assert not stale.exists()
    assert {p.suffix for p in folder.iterdir()} == {".cpp", ".h", ".py"}


def test_flags_of_the_environment_reach_compiler_and_linker(monkeypatch, tmp_path):
    said, cxx = tmp_path / "said", tmp_path / "cxx"
    cxx.write_text(f'#!/bin/sh\necho "$@" >> {said}\nfor last; do :; done\n: > "$last"\n')
    cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("CXXFLAGS", "-O1 -fsanitize='address'")
    hatch_build.build(ROOT / hatch_build.SOURCES, tmp_path / hatch_build.LIBRARY)
    lines = said.read_text().splitlines()
    assert "-shared" in lines[-1]
    assert all(" -O1 -fsanitize=address " in line for line in lines)


def test_flags_that_only_the_compiler_knows_and_not_its_assembler_are_left_out(tmp_path):
    cxx = tmp_path / "cxx"
    cxx.write_text('#!/bin/sh\ncase "$*" in *-mamx*" -c "*) exit 1;; esac\nexit 0\n')
    cxx.chmod(0o755)
    assert hatch_build._knows(str(cxx), ("-mavx2",), (), tmp_path / "flags.cpp")
    assert not hatch_build._knows(str(cxx), ("-mamx-tile",), (), tmp_path / "flags.cpp")


def test_the_kernel_is_compiled_when_the_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    assert "[tool.hatch.build.hooks.custom]" in text
    assert "hatch_build.py" in text


# -- the emulated link ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 63, 64, 65, 1000, 70_000, 300_000]), min_size=1, max_size=4),
    skipped=st.integers(0, 33),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([64, 1000, 1 << 20]),
)
def test_a_paced_copy_moves_every_element_and_nothing_else(library, sizes, skipped, dtype, chunk):
    chunk = chunk if sum(sizes) < 10_000 else 1 << 20
    sources = [torch.randn(n).to(dtype) for n in sizes]
    targets = [torch.zeros(skipped + n + 40, dtype=dtype) for n in sizes]
    pairs = [(t[skipped : skipped + n], s) for t, s, n in zip(targets, sources, sizes, strict=True)]
    native.load(library).copy(pairs, 1e12, chunk)
    for target, source, n in zip(targets, sources, sizes, strict=True):
        assert torch.equal(target[skipped : skipped + n], source)
        assert not target[:skipped].any()
        assert not target[skipped + n :].any()


def test_a_paced_copy_is_not_ahead_of_its_rate(kernel):
    source, target = torch.zeros(1 << 18), torch.zeros(1 << 18)
    begun = time.perf_counter()
    kernel.copy([(target, source)], 50e6, 1 << 16)
    assert time.perf_counter() - begun >= source.nbytes / 50e6 - 2e-5


def test_what_is_not_laid_out_alike_is_left_to_torch():
    assert native.copies(torch.zeros(4), torch.zeros(4))
    assert not native.copies(torch.zeros(4), torch.zeros(4, dtype=torch.float16))
    assert not native.copies(torch.zeros(4), torch.zeros(5))
    assert not native.copies(torch.zeros(4), torch.zeros(4, 2)[:, 0])

"""Tokens that tiles multiply lie packed by blocks of K: sums are right whatever K and the number of tokens are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from hwmodels.errors import KernelError
from runtime import native
from runtime.native import Kernel, Piece
from runtime.ops import torch_gated_mlp, torch_routed_mlp
from tests.test_native import ENOUGH, assert_near, at_the_end, doubled, random_piece, random_x

INSTALLED = native.installed()
ISAS = [] if isinstance(INSTALLED, KernelError) else [isa for isa in INSTALLED.isas if isa.endswith("BF16")]
pytestmark = pytest.mark.skipif(not ISAS, reason="no native kernel that multiplies bfloat16")
BF16 = torch.bfloat16
LENGTHS = (1, 31, 32, 33, 100, 480, 511, 512, 513, 543, 544, 545, 1000, 1023, 1024, 1025, 1504, 1535, 1536, 1537, 2051)
N_TOKENS = (9, 10, 15, 16, 17, 31, 32, 33, 37, 100, 255, 256, 257, 272, 273, 300)


@pytest.fixture
def kernel() -> Kernel:
    assert isinstance(INSTALLED, Kernel)
    return INSTALLED


def weight_of(n_rows: int, length: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(n_rows, length, generator=draw) / length**0.5).to(BF16)


def projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


@settings(max_examples=120)
@given(
    isa=st.sampled_from(ISAS or [""]),
    n_tokens=st.sampled_from(N_TOKENS),
    length=st.sampled_from(LENGTHS) | st.integers(1, 1700),
    n_rows=st.lists(st.sampled_from((1, 16, 31, 32, 33, 257, 300)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_projection_is_as_near_to_float64_as_torch_whatever_its_length(
    isa: str, n_tokens: int, length: int, n_rows: list[int], seed: int
) -> None:
    assert isinstance(INSTALLED, Kernel)
    x = random_x(n_tokens, length, BF16, seed)
    layers = [(weight_of(n, length, i), weight_of(n, 1, i)[:, 0] if i else None) for i, n in enumerate(n_rows)]
    for y, (weight, bias) in zip(INSTALLED.linears(x, layers, isa), layers, strict=True):
        exact = projected(x.double(), weight.double(), None if bias is None else bias.double())
        assert_near(y, projected(x, weight, bias), exact)


@settings(max_examples=80)
@given(
    isa=st.sampled_from(ISAS or [""]),
    n_tokens=st.sampled_from(N_TOKENS),
    sizes=st.tuples(st.sampled_from(LENGTHS), st.integers(1, 200)).flatmap(st.permutations),
    n_pieces=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_an_mlp_is_as_near_to_float64_as_torch_however_wide_it_and_its_pieces_are(
    isa: str, n_tokens: int, sizes: list[int], n_pieces: int, seed: int
) -> None:
    assert isinstance(INSTALLED, Kernel)
    d_model, columns = sizes
    x = random_x(n_tokens, d_model, BF16, seed)
    pieces = [random_piece(d_model, columns + 13 * i, BF16, seed + i) for i in range(n_pieces)]
    exact = torch_gated_mlp(x.double(), doubled(pieces), silu)
    assert_near(INSTALLED.mlp(x, [(None, None, pieces)], 0, isa), torch_gated_mlp(x, pieces, silu), exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("d_model", "columns"), [(513, 40), (40, 1025), (545, 700)])
def test_experts_of_as_many_tokens_as_they_have_add_up(kernel: Kernel, isa: str, d_model: int, columns: int) -> None:
    x, order, experts = random_x(300, d_model, BF16), torch.Generator().manual_seed(1), []
    for i, n in enumerate((300, 8, 9, 0, 17, 257, 1, 33)):
        rows, weights = torch.randperm(300, generator=order)[:n], torch.rand(n, generator=order)
        experts.append((rows, weights, [random_piece(d_model, columns, BF16, i)]))
    exact = torch_routed_mlp(x.double(), [(r, w.double(), doubled(p)) for r, w, p in experts], silu)
    assert_near(kernel.mlp(x, experts, 0, isa), torch_routed_mlp(x, experts, silu), exact)


@pytest.mark.skipif("AMX_BF16" not in ISAS, reason="no tiles")
@pytest.mark.parametrize("length", [33, 511, 512, 513, 1025, 1537, 2051])
def test_a_row_has_the_same_bits_among_any_number_of_tokens(kernel: Kernel, length: int) -> None:
    x, weight = random_x(530, length, BF16), weight_of(70, length, 1)
    pieces = [random_piece(length, c, BF16, c) for c in (61, 530)]
    both = kernel.linear(x, weight, None), kernel.mlp(x, [(None, None, pieces)], 0)
    for rows in (range(ENOUGH), range(529, 502, -1), range(3, 260), [*range(100, 117), 0], range(7, 520)):
        some = x[list(rows)]
        found = kernel.linear(some, weight, None), kernel.mlp(some, [(None, None, pieces)], 0)
        assert all(torch.equal(few, many[list(rows)]) for few, many in zip(found, both, strict=True))
    for n_threads in (1, 2, 3):
        native.set_threads(n_threads)
        try:
            assert torch.equal(kernel.linear(x, weight, None), both[0])
            assert torch.equal(kernel.mlp(x, [(None, None, pieces)], 0), both[1])
        finally:
            native.set_threads(0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n_tokens", "d_model", "columns"), [(9, 513, 33), (37, 1055, 64), (300, 545, 545)])
def test_nothing_is_read_beyond_long_rows(kernel: Kernel, isa: str, n_tokens: int, d_model: int, columns: int) -> None:
    x = at_the_end(random_x(n_tokens, d_model, BF16))
    gate_up, down = map(at_the_end, random_piece(d_model, columns, BF16, 1)[:2])
    found = kernel.mlp(x, [(None, None, [Piece(gate_up, down)])], 0, isa), kernel.linear(x, gate_up, None, isa)
    x, gate_up, down = x.clone(), gate_up.clone(), down.clone()
    again = kernel.mlp(x, [(None, None, [Piece(gate_up, down)])], 0, isa), kernel.linear(x, gate_up, None, isa)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [70, 513, 1025])
def test_what_is_not_a_number_stays_in_its_row(kernel: Kernel, isa: str, length: int) -> None:
    x = random_x(300, length, BF16)
    x[17, length - 1] = x[255, 0] = torch.nan
    pieces = [random_piece(length, 530, BF16, 1)]
    wrong = [
        y.isnan().all(-1)
        for y in (kernel.mlp(x, [(None, None, pieces)], 0, isa), kernel.linear(x, pieces[0][0], None, isa))
    ]
    assert all(rows.nonzero().flatten().tolist() == [17, 255] for rows in wrong)


# -- few tokens, by pairs and by halves --------------------------------------------------------------------------------


def errors_of_sums(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [8, 2 * length] and weights [40, 2 * length] whose products cancel: what is left is how sums round."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    x, weight = random_x(8, length, BF16, seed), weight_of(40, length, seed)
    return torch.cat([x, x[:, order]], 1), torch.cat([weight, -weight[:, order]], 1)


def bits_of(y: Tensor) -> Tensor:
    return y.view(torch.int16)


@pytest.mark.skipif("AMX_BF16" not in ISAS, reason="no tiles")
@pytest.mark.parametrize("length", [40, 700, 1024, 3000])
@pytest.mark.parametrize("exponent", [0, 30, -58, -63, -66])
def test_few_tokens_have_the_bits_of_products_of_pairs_however_small_numbers_are(
    kernel: Kernel, length: int, exponent: int
) -> None:
    x, weight = errors_of_sums(length, length)
    x, weight = x * 2.0**exponent, weight * 2.0**exponent
    native.set_threads(1)
    torch.set_flush_denormal(True)  # pairs do in any case, but not what adds their sums
    try:
        for n in range(1, ENOUGH):
            by_pairs = kernel.linear(x[:n], weight, None, "AVX512_BF16")
            assert torch.equal(bits_of(kernel.linear(x[:n], weight, None, "AMX_BF16")), bits_of(by_pairs))
            assert exponent < -58 or by_pairs.any()
    finally:
        torch.set_flush_denormal(False)
        native.set_threads(0)


@pytest.mark.skipif("AMX_BF16" not in ISAS, reason="no tiles")
def test_a_row_has_the_same_bits_in_any_small_step(kernel: Kernel) -> None:
    x, weight = errors_of_sums(1500, 7)
    tiny = torch.tensor([1e-40, -3e-39, 2e-38, 1e-20, 3e38, 1.0], dtype=BF16)
    x = torch.cat([x, tiny[torch.randint(6, (8, 90), generator=torch.Generator().manual_seed(1))]], 1)
    weight = torch.cat([weight, tiny[torch.randint(5, (40, 90), generator=torch.Generator().manual_seed(2))]], 1)
    pieces = [Piece(torch.cat([weight, weight.flip(0)]), weight_of(x.shape[1], 40, 3))]
    alone = [(kernel.linear(r[None], weight, None), kernel.mlp(r[None], [(None, None, pieces)], 0)) for r in x]
    for n in range(2, ENOUGH):
        together = kernel.linear(x[-n:], weight, None), kernel.mlp(x[-n:], [(None, None, pieces)], 0)
        for row, (one, other) in enumerate(alone[-n:]):
            assert torch.equal(bits_of(together[0][row]), bits_of(one[0]))
            assert torch.equal(bits_of(together[1][row]), bits_of(other[0]))


@pytest.mark.skipif("AMX_BF16" not in ISAS, reason="no tiles")
@pytest.mark.parametrize("n_tokens", range(1, ENOUGH))
def test_infinities_and_what_is_not_a_number_come_out_as_of_floats(kernel: Kernel, n_tokens: int) -> None:
    x, weight = random_x(n_tokens, 70, BF16), weight_of(20, 70, 1)
    x[0, 3], x[-1, 69], weight[4, 5], weight[7, 0], weight[7, 1] = (
        torch.inf,
        torch.nan,
        -torch.inf,
        torch.inf,
        -torch.inf,
    )
    by_floats = x.float() @ weight.float().T
    found = kernel.linear(x, weight, None).float()
    assert torch.equal(found.isnan(), by_floats.isnan())
    assert torch.equal(found.isinf(), by_floats.isinf())
    assert torch.equal(found[found.isinf()], by_floats[by_floats.isinf()])


@pytest.mark.skipif("AMX_BF16" not in ISAS, reason="no tiles")
def test_small_numbers_of_the_caller_are_what_they_were(kernel: Kernel) -> None:
    kernel.linear(random_x(8, 64, BF16), weight_of(20, 64, 1), None)
    assert torch.tensor(1e-40).mul(0.5).item() > 0

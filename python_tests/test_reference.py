"""The oracle itself: against the formulas written out, finite differences, and published random numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reft_kernels import reference
from reft_kernels.philox import keep_mask, keep_threshold, philox_words
from reft_kernels.testing import (
    METHODS,
    EditCase,
    assert_bitwise_equal,
    assert_close,
    edit_cases,
    gradients,
    lay_out,
    pairwise,
    poison_empty,
    random_edit,
)

FUNCTIONS = {"linear": lambda s: s, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_edit_is_the_formula_row_by_row(method: str, activation: str) -> None:
    case = EditCase(method, activation, "float64", positions="padded", groups=2, scale="rows", shape=(3, 5), d=7, r=3)
    o = random_edit(case, seed=1)
    y = o.reference()
    expected = o.h.clone()
    for i, j in (o.positions >= 0).nonzero().tolist():
        p, g, a = int(o.positions[i, j]), int(o.group[i, j]), float(o.scale[i, j])
        if g < 0:
            continue
        h = o.h[i, p]
        s = o.b[g] if o.W is None else o.W[g] @ h + o.b[g]
        delta = FUNCTIONS[activation](s)
        if o.subtract:
            delta = delta - o.R[g] @ h - (0 if o.c is None else o.c[g])
        expected[i, p] = h + a * o.R[g].T @ delta
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert not torch.equal(y.nan_to_num(), o.h.nan_to_num())


def test_paper_equations_with_orthonormal_rows() -> None:
    """LoReFT moves h inside the row space of R alone, to where R y = W h + b."""
    d, r = 12, 4
    R = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q.T
    h, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, d), (r, d), (r,)))
    y = reference.edit(h, R, W, b)
    torch.testing.assert_close(y @ R.T, h @ W.T + b, rtol=0, atol=1e-12)
    outside = torch.eye(d, dtype=torch.float64) - R.T @ R
    torch.testing.assert_close(y @ outside, h @ outside, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_and_slope(activation: str) -> None:
    s = torch.cat((torch.linspace(-30, 30, 601, dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)))
    s.requires_grad_()
    value = reference.activate(s, activation)
    torch.testing.assert_close(value, FUNCTIONS[activation](s))
    (slope,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(reference.activation_slope(s.detach(), activation), slope, rtol=1e-12, atol=1e-14)


def test_unknown_activation_is_named() -> None:
    for function in (reference.activate, reference.activation_slope):
        with pytest.raises(ValueError, match=r"activation: expected one of linear, .* got 'swish'"):
            function(torch.zeros(1), "swish")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str, activation: str) -> None:
    case = EditCase(
        method, activation, "float64", "expanded", "padded", 2, "rows", dropout=0.25, shape=(2, 4), d=5, r=2
    )
    o = random_edit(case, seed=3)
    names = list(o.differentiable)
    inputs = tuple(t.clone().requires_grad_() for t in o.differentiable.values())
    assert torch.autograd.gradcheck(
        lambda *t: o.reference(**dict(zip(names, t, strict=True))), inputs, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("case", [c for c in edit_cases() if c.dtype == "float64"] + edit_cases(5)[:20], ids=str)
def test_hand_derived_backward_is_autograds(case: EditCase) -> None:
    o = random_edit(case, seed=4).to(torch.float64)
    grad = torch.randn(o.h.shape, dtype=torch.float64)
    expected = gradients(lambda **t: o.reference(**t), o, grad).grads
    keywords = o.keywords()
    R, W, b = (keywords.pop(n) for n in "RWb")
    slots = o.h.shape[:-1] if o.positions is None else o.positions.shape
    if isinstance(keywords["scale"], float):
        keywords["scale"] = torch.full(slots, keywords["scale"], dtype=torch.float64)
    keywords["seed"] = torch.tensor([o.seed])
    got = reference.edit_backward(grad, o.h, R, W, b, **keywords)._asdict()
    for name in ("h", "R", "W", "b", "c"):
        assert (got[name] is None) == (name not in expected)
        if name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


# Philox4x32-10: an implementation of its own, in Python's integers, and the known answers of Random123
# (Salmon et al., 2011; tests/kat_vectors of the distribution).


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    x, k, word = list(counter), list(key), 1 << 32
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
        high0, low0 = divmod(0xD2511F53 * x[0], word)
        high1, low1 = divmod(0xCD9E8D57 * x[2], word)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
    return tuple(x)


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_tests_own_philox_gives_the_published_words(counter, key, expected) -> None:
    assert philox4x32_10(counter, key) == expected


def test_philox_words_known_answer() -> None:
    words = philox_words(torch.tensor([0]), torch.tensor([0]), 4)
    assert words.tolist() == [list(KNOWN_ANSWERS[0][2])]


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567, -1, -(2**63), 2**63 - 1, 0xFFFFFFFF, 0x100000000])
def test_philox_words_by_python_integers(seed: int) -> None:
    rows = [0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3]
    columns = 11
    words = philox_words(torch.tensor([seed]), torch.tensor(rows), columns)
    assert words.shape == (len(rows), columns)
    key = (seed & ONES, (seed >> 32) & ONES)
    for n, row in enumerate(rows):
        for j in range(columns):
            block = philox4x32_10((j // 4, row & ONES, row >> 32, 0), key)
            assert int(words[n, j]) == block[j % 4], (seed, row, j)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_mask_statistics(dropout: float) -> None:
    rows, columns = 400, 512
    keep = keep_mask(torch.tensor([987654321]), torch.arange(rows), columns, dropout).double()
    p, n = 1 - dropout, rows * columns
    deviation = (p * dropout / n) ** 0.5
    assert abs(float(keep.mean()) - p) < 5 * deviation
    # Rows and columns are independent of one another: their means scatter as a binomial's.
    for dim, count in ((0, rows), (1, columns)):
        scatter = float(keep.mean(dim).var() / (p * dropout / count))
        assert 0.75 < scatter < 1.25, (dim, scatter)
    # Neighbours, in a row, in a column and in a Philox block, are uncorrelated.
    centred = keep - p
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[:, 4:] * centred[:, :-4]):
        assert abs(float(shifted.mean())) < 5 * p * dropout / n**0.5


def test_masks_of_other_seeds_and_rows_differ() -> None:
    rows = torch.arange(4)
    masks = [keep_mask(torch.tensor([seed]), rows, 256, 0.5) for seed in (1, 2, 1 + 2**32)]
    assert_bitwise_equal(masks[0], keep_mask(torch.tensor([1]), rows, 256, 0.5))
    for one in range(3):
        for other in range(one):
            assert 0.4 < float((masks[one] == masks[other]).double().mean()) < 0.6
    assert 0.4 < float((masks[0][0] == masks[0][1]).double().mean()) < 0.6


def test_mask_depends_on_the_place_alone() -> None:
    seed = torch.tensor([5])
    whole = keep_mask(seed, torch.arange(10), 37, 0.3)
    assert_bitwise_equal(keep_mask(seed, torch.tensor([7, 2]), 37, 0.3), whole[[7, 2]])
    assert_bitwise_equal(keep_mask(seed, torch.arange(10), 5, 0.3), whole[:, :5])


def test_keep_threshold_at_the_ends() -> None:
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**30
    assert keep_threshold(1 - 2**-40) == 2**31 - 1  # fits an int32, and something is kept
    nearly_all = keep_mask(torch.tensor([3]), torch.arange(100), 100, 1e-9)
    assert bool(nearly_all.all())


# The helpers of reft_kernels.testing: each must be able to fail.


def test_assert_close_accepts_what_is_as_good_as_the_baseline() -> None:
    oracle = torch.randn(50, 40, dtype=torch.float64)
    assert_close(oracle.half(), oracle, oracle.half())
    noisy = (oracle + 1e-3 * torch.randn_like(oracle)).half()
    assert_close((oracle + 1e-3 * torch.randn_like(oracle)).half(), oracle, noisy)
    assert_close(torch.empty(0), torch.empty(0, dtype=torch.float64), torch.empty(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_assert_close_catches_one_bad_element(dtype: torch.dtype) -> None:
    oracle = torch.randn(30, 20, dtype=torch.float64)
    good = oracle.to(dtype)
    bad = good.clone()
    bad[17, 3] += 100 * torch.finfo(dtype).eps * float(oracle.abs().max())
    with pytest.raises(AssertionError, match=r"dh: largest error .*\(17, 3\): got"):
        assert_close(bad, oracle, good, name="dh")


def test_assert_close_catches_many_small_errors() -> None:
    oracle = torch.randn(100, 100, dtype=torch.float64)
    baseline = oracle.clone()
    baseline[0, 0] += 1e-2  # the largest error alone would allow the same everywhere
    with pytest.raises(AssertionError, match="rms error"):
        assert_close((oracle + 1e-2).float(), oracle, baseline.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_assert_close_compares_nan_and_infinity_by_place(value: float) -> None:
    oracle = torch.randn(6, dtype=torch.float64)
    odd = oracle.clone()
    odd[2] = value
    assert_close(odd.float(), odd, odd.float())
    with pytest.raises(AssertionError, match=r"wrong place .*\(2,\)"):
        assert_close(odd.float(), oracle, oracle.float())
    with pytest.raises(AssertionError, match=r"wrong place .*\(2,\)"):
        assert_close(oracle.float(), odd, oracle.float())
    if value == value:
        negated = odd.where(torch.arange(6) != 2, -odd)
        with pytest.raises(AssertionError, match="wrong place"):
            assert_close(negated.float(), odd, odd.float())


def test_assert_close_checks_shape_and_dtype() -> None:
    oracle = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(torch.zeros(3, 1), oracle, torch.zeros(3))
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        assert_close(torch.zeros(3, dtype=torch.float64), oracle, torch.zeros(3))
    with pytest.raises(TypeError, match="oracle: expected float64"):
        assert_close(torch.zeros(3), torch.zeros(3), torch.zeros(3))


def test_assert_bitwise_equal() -> None:
    zeros = torch.zeros(2, 3)
    assert_bitwise_equal(zeros, zeros.T.contiguous().T)
    nan = torch.tensor([float("nan")])
    assert_bitwise_equal(nan, nan.clone())
    changed = zeros.clone()
    changed[1, 2] = -0.0
    with pytest.raises(AssertionError, match=r"first at \(1, 2\): got -0\.0 \(0x80000000\)"):
        assert_bitwise_equal(changed, zeros)
    with pytest.raises(AssertionError, match=r"0x7fc00001"):
        assert_bitwise_equal(torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32), nan)
    with pytest.raises(AssertionError, match="expected"):
        assert_bitwise_equal(zeros, zeros.double())
    with pytest.raises(AssertionError, match="elements differ"):
        assert_bitwise_equal(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert_bitwise_equal(torch.tensor(1.5), torch.tensor(1.5))


def test_poison_empty_poisons_the_packages_memory_alone() -> None:
    with poison_empty() as poison:
        assert poison.count == 0
        torch.empty(3)
        assert poison.count == 0
        from reft_kernels.backends import eager

        scope = dict(vars(eager))
        exec("def make():\n    return [torch.empty(2), torch.zeros(3).new_empty(2, dtype=torch.int32)]", scope)
        floats, integers = scope["make"]()
    assert poison.count == 2
    assert bool(floats.isnan().all())
    assert integers.tolist() == [-(2**31)] * 2


@pytest.mark.parametrize("layout", ["contiguous", "slice", "rows", "transposed", "columns"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 2, 4), (0, 4), ()])
def test_lay_out_keeps_the_values(layout: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert_bitwise_equal(lay_out(tensor, layout), tensor)
    if layout != "contiguous" and tensor.dim() == 3:
        assert not lay_out(tensor, layout).is_contiguous()


def test_expanded_layouts_share_memory() -> None:
    tensor = torch.randn(3, 4, 5)
    assert lay_out(tensor, "expanded").stride() == (0, 5, 1)
    assert lay_out(tensor, "scalar").stride() == (0, 0, 0)


def test_pairwise_meets_every_pair_in_few_rows() -> None:
    factors = {"a": range(5), "b": range(4), "c": range(3), "d": range(3), "e": range(2)}
    rows = pairwise(factors)
    for one in factors:
        for other in factors:
            if one < other:
                assert len({(row[one], row[other]) for row in rows}) == len(factors[one]) * len(factors[other])
    assert len(rows) <= 28
    assert pairwise(factors) == rows


def test_random_edit_is_reproducible_and_hostile() -> None:
    case = EditCase(positions="padded", groups=2, scale="rows", shape=(3, 6))
    one, other = random_edit(case, 7), random_edit(case, 7)
    assert_bitwise_equal(one.h, other.h)
    assert_bitwise_equal(one.R, other.R)
    assert not torch.equal(random_edit(case, 8).R, one.R)
    assert bool(one.h[one.named].isfinite().all())
    untouched = one.h[~one.named]
    assert bool(((untouched == 0) | ~untouched.isfinite()).all())
    assert bool((~untouched.isfinite()).any())

"""The CPU kernel, on every instruction set of this machine, against the operators in PyTorch at double precision."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import (
    EXTREME_NORMALS,
    EXTREME_RHO,
    EXTREME_WORDS,
    PRIORS,
    Problem,
    assert_close,
    assert_kl_close,
    make_problem,
)
from torch import Tensor

from fusedbayes import noise, reference
from fusedbayes.kernels import cpu
from fusedbayes.kernels.cpu import native
from fusedbayes.noise import Address
from fusedbayes.reference import Estimator

ops = torch.ops.fusedbayes

LIBRARY = native.load()
pytestmark = [
    pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernel: {LIBRARY}"),
    pytest.mark.usefixtures("fresh_workspace"),
]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# A row longer than the C++ works on at a time, and rows of which it takes many together; rows that end within a vector,
# in a group and with one; single elements.
SHAPES = [(33, 37, 44), (1, 21, 64), (5, 3, 1091), (9, 300, 27), (33, 5, 7), (3, 1, 1), (0, 5, 3), (2, 3, 0), (2, 0, 3)]


def available() -> Sequence[str]:
    """The instruction sets that this machine has, the portable one among them."""
    best = "portable" if isinstance(LIBRARY, str) else LIBRARY.instruction_set
    return native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(best) + 1]


@pytest.fixture(params=available())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "load", lambda: replace(LIBRARY, instruction_set=request.param))
    return request.param


def check_forward(problem: Problem) -> None:
    y, kl, slope = ops.bayes_linear(*problem.forward)
    expected, expected_kl, expected_slope = ops.bayes_linear(*problem.exact().forward)
    assert y.dtype == slope.dtype == problem.x.dtype
    assert slope.shape == expected_slope.shape
    assert_close(y, expected, terms=problem.x.shape[1] + 1, operands=y.dtype)
    if problem.with_kl:
        assert_kl_close(kl, expected_kl, weights=expected.shape[1] * (problem.x.shape[1] + 1))
    else:
        assert kl.shape == (0,)


def check_backward(problem: Problem, needs_x: bool = True, needs_weight: bool = True) -> None:
    M, N = problem.grad_y.shape
    needs = needs_x, needs_weight
    grad_x, *grads = ops.bayes_linear_backward(*problem.backward_of(*needs))
    expected_x, *expected = ops.bayes_linear_backward(*problem.exact().backward_of(*needs))
    assert grad_x.dtype == problem.x.dtype
    assert grad_x.shape == expected_x.shape
    assert_close(grad_x, expected_x, terms=N, operands=problem.x.dtype)
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == problem.weight[0].dtype
        assert grad.shape == exact.shape
        # dY^T X is rounded to x's dtype, as it is for nn.Linear: one more rounding of a sum of M products.
        assert_close(grad, exact, terms=max(M, 1), operands=problem.x.dtype)


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
@pytest.mark.parametrize("column", [0, 2**33 - 2, 2**34 - 70])
@pytest.mark.parametrize("row", [0, 2**31 - 1, 2**32 - 3])
def test_words_equal_pytorch_words(instruction_set: str, row: int, column: int, seed: int) -> None:
    where = {"sample": torch.tensor(2**32 - 1), "address": Address(2**31 + 7, row, column)}
    given = torch.tensor([2, 0, 2])
    words = cpu.words(given, 70, torch.tensor(seed), **where)
    first, last = column // 4, (column + 69) // 4
    quads, rows = torch.arange(first, last + 1)[None, :], (row + given)[:, None]
    expected = torch.stack(noise.philox_words(torch.tensor(seed), quads, rows, 2**32 - 1, 2**31 + 7), -1)
    shift = column - 4 * first
    assert torch.equal(words.long() & 0xFFFFFFFF, expected.flatten(1)[:, shift : shift + 70])


@pytest.mark.parametrize("columns", [1, 15, 64, 1091])
@pytest.mark.parametrize("column_offset", range(4))
def test_normals_equal_pytorch_normals(instruction_set: str, column_offset: int, columns: int) -> None:
    where = {"stream": 3, "row_offset": 5, "column_offset": column_offset}
    rows = torch.tensor([3, 0, 2**32 - 6, 3, 2**31])
    key = torch.tensor(7), torch.tensor(2), tuple(where.values())
    eps = cpu.normal(rows, columns, *key, torch.float32)
    expected = noise.normal(7, rows, columns, sample=2, **where)
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-5)  # the contract's bound
    assert torch.equal(cpu.normal(rows, columns, *key, torch.bfloat16), eps.bfloat16())


@pytest.mark.parametrize("columns", [0, 1, 129, 1091])
@pytest.mark.parametrize("column_offset", [0, 3, 2**33 - 126])
def test_signs_equal_pytorch_signs(instruction_set: str, column_offset: int, columns: int) -> None:
    where = {"stream": 3, "row_offset": 5, "column_offset": column_offset}
    rows = torch.tensor([3, 0, 2**32 - 6, 3, 2**31])
    signs = cpu.signs(rows, columns, torch.tensor(7), torch.tensor(2), tuple(where.values()), torch.bfloat16)
    assert torch.equal(signs, noise.signs(7, rows, columns, sample=2, **where, dtype=torch.bfloat16))


def test_normals_at_the_ends_of_the_words(instruction_set: str) -> None:
    for (quad, row, sample, stream), expected in zip(EXTREME_WORDS, EXTREME_NORMALS, strict=True):
        key = torch.tensor(0), torch.tensor(sample), Address(stream, row, 4 * quad)
        eps = cpu.normal(torch.zeros(1, dtype=torch.int64), 4, *key, torch.float32)
        torch.testing.assert_close(eps, torch.tensor([expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bayes_linear(instruction_set: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    problem = make_problem(shape, dtype=dtype)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("prior", PRIORS)
def test_priors_and_bias(instruction_set: str, small_blocks: None, prior: str, bias: bool) -> None:
    addresses = {"weight_address": Address(8, 2**31, 3), "bias_address": Address(9, 1, 2)}
    problem = make_problem((5, 18, 70), prior=prior, bias=bias, **addresses)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("options", [{"with_kl": False}, {"sample": None}, {"sample": 2**32 - 1}], ids=str)
def test_options(options: dict[str, Any]) -> None:
    problem = make_problem((5, 18, 20), **options)
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_weight", [True, False])
def test_gradients_that_are_needed(small_blocks: None, needs_x: bool, needs_weight: bool) -> None:
    check_backward(make_problem((5, 18, 20)), needs_x, needs_weight)


def test_the_cotangent_of_the_kl_may_have_16_bits() -> None:
    problem = make_problem((5, 18, 20))
    check_backward(problem._replace(grad_kl=torch.tensor(0.5, dtype=torch.bfloat16)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_parameters(instruction_set: str, small_blocks: None, dtype: torch.dtype) -> None:
    problem = make_problem((5, 18, 37), dtype=dtype, parameter_dtype=torch.bfloat16, prior="per-weight")
    check_forward(problem)
    check_backward(problem)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, no two of them adjacent."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide.transpose(0, -2).contiguous().transpose(0, -2)[..., 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(small_blocks: None, products: None, dtype: torch.dtype) -> None:
    problem = make_problem((5, 18, 20), prior="per-weight", dtype=dtype, parameter_dtype=dtype).map(strided)
    assert not problem.weight[0].is_contiguous()
    check_forward(problem)
    check_backward(problem)


def test_the_user_can_switch_onednn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedbayes.kernels.cpu.product._onednn", lambda: pytest.fail)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    check_forward(make_problem((16, 2048, 1024)))


@pytest.mark.parametrize("shape", [(1, 20), (18, 1)], ids=["row", "column"])
def test_broadcast_priors(instruction_set: str, small_blocks: None, shape: tuple[int, int]) -> None:
    problem = make_problem((5, 18, 20), prior="per-weight", bias=False)
    mu, rho, *priors = problem.weight
    priors = [prior[: shape[0], : shape[1]].expand(18, 20) for prior in priors]
    problem = problem._replace(weight=(mu, rho, *priors))
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", PRIORS[1:])
def test_sample_weight(instruction_set: str, prior: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    problem = make_problem((1, 17, 81), prior=prior, parameter_dtype=parameter_dtype)
    exact = problem.exact()
    weight, kl = ops.sample_weight(*problem.sample_weight(dtype))
    expected, expected_kl = ops.sample_weight(*exact.sample_weight(torch.float64))
    assert weight.dtype == dtype
    assert_close(weight, expected, terms=1, operands=torch.float32)
    assert_kl_close(kl, expected_kl, weights=17 * 81)
    assert_kl_close(ops.weight_kl(*problem.weight), expected_kl, weights=17 * 81)
    cotangents = torch.randn(17, 81, dtype=dtype), problem.grad_kl
    for used in (cotangents, (cotangents[0], None), (None, cotangents[1])):
        seed = None if used[0] is None else problem.seed
        grads = ops.sample_weight_backward(*used, *problem.weight, seed, problem.sample, problem.weight_address)
        doubled = (None if cotangent is None else cotangent.double() for cotangent in used)
        exact_grads = ops.sample_weight_backward(*doubled, *exact.weight, seed, *exact.noise[1:])
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert grad.dtype == parameter_dtype
            assert_close(grad, exact_grad, terms=1, operands=torch.float32)


def test_16_bit_weights_are_rounded_to_nearest(instruction_set: str) -> None:
    problem = make_problem((1, 17, 1091))
    wide, _ = ops.sample_weight(*problem.sample_weight(torch.float32))
    narrow, _ = ops.sample_weight(*problem.sample_weight(torch.bfloat16))
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.usefixtures("small_blocks", "products")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("estimator", "num_samples"), [("shared", 3), ("local", 1), ("local", 3), ("flipout", 3)])
def test_estimators_and_samples(
    instruction_set: str, estimator: Estimator, num_samples: int, dtype: torch.dtype, bias: bool
) -> None:
    problem = make_problem(
        (3, 18, 37),
        dtype=dtype,
        bias=bias,
        estimator=estimator,
        num_samples=num_samples,
        weight_address=Address(8, 5, 70),
    )
    problem.x[1] = 0.0
    check_forward(problem)
    check_backward(problem)


@pytest.mark.parametrize("grad_kl", [0.3, 65536.0], ids=["ordinary", "scaled"])
def test_extreme_rho(instruction_set: str, grad_kl: float) -> None:
    rho = torch.tensor([EXTREME_RHO])
    parameter = torch.full_like(rho, 0.5), rho, torch.tensor(0.0), torch.tensor(0.1)
    exact = [tensor.double() for tensor in parameter]
    sigma = reference.sigma_from_rho(exact[1])
    key = torch.tensor(1), None, Address()
    weight, _ = ops.sample_weight(*parameter, *key, torch.float32, True)
    expected, _ = ops.sample_weight(*exact, *key, torch.float64, True)
    # The noise is right to 1e-5; mu + sigma eps is rounded once.
    assert ((weight.double() - expected).abs() <= 1e-5 * sigma + 2.0**-23 * expected.abs()).all()
    for i in range(rho.shape[1]):
        kl = ops.weight_kl(parameter[0][:, i : i + 1], rho[:, i : i + 1], *parameter[2:])
        expected_kl = ops.weight_kl(exact[0][:, i : i + 1], exact[1][:, i : i + 1], *exact[2:])
        # Terms of order 100: four roundings, and sigma's own.
        torch.testing.assert_close(kl.double(), expected_kl, rtol=2.0**-21, atol=100 * 2.0**-23)
    cotangents = torch.ones_like(rho), torch.tensor(grad_kl)
    grads = ops.sample_weight_backward(*cotangents, *parameter, *key)
    exact_grads = ops.sample_weight_backward(*(c.double() for c in cotangents), *exact, *key)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        # The noise is right to 1e-5 times a cotangent of 1; sigma is off by 2^-21, its square in the KL's part by twice
        # that.
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2.0**-19, atol=1e-5)


@pytest.mark.parametrize("prior", ["scalar", "per-weight"])
@pytest.mark.parametrize("columns", [512, 509])
def test_the_kl_of_a_posterior_that_is_the_prior(instruction_set: str, columns: int, prior: str) -> None:
    rho = torch.full((16, columns), -2.0)
    sigma = reference.sigma_from_rho(rho.double()).float()
    parameter = torch.full_like(rho, 0.3), rho, torch.tensor(0.3), sigma if prior == "per-weight" else sigma[0, 0]
    # sigma is off by 2^-21, relatively; the KL's logarithm and its square by as much.
    assert abs(ops.weight_kl(*parameter).item()) < 2 * 2.0**-21 * rho.numel()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(instruction_set: str, value: float) -> None:
    rho = torch.full((3, 70), -2.0)
    rho[1, 67] = value
    parameter = torch.zeros_like(rho), rho, torch.tensor(0.0), torch.tensor(1.0)
    weight, kl = ops.sample_weight(*parameter, torch.tensor(1), None, Address(), torch.bfloat16, True)
    assert torch.equal(weight[1, 67].isnan(), torch.tensor(math.isnan(value)))
    assert weight.isfinite().sum() == rho.numel() - 1
    assert not kl.isfinite()


def test_the_gradient_of_a_huge_rho_is_finite(instruction_set: str) -> None:
    parameter = torch.zeros(1, 8), torch.full((1, 8), 1e37), None, None
    key = torch.tensor(1), None, Address()
    grad_weight = torch.full((1, 8), 1e3)
    _, grad_rho = ops.sample_weight_backward(grad_weight, None, *parameter, *key)
    # sigma grows as rho does there, so that drho is the cotangent times eps, which is right to 1e-5.
    eps = noise.normal(1, 1, 8)
    torch.testing.assert_close(grad_rho, grad_weight * eps, rtol=0.0, atol=1e3 * 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 70])
@pytest.mark.parametrize("rows", [0, 900, 1 << 15], ids=["no rows", "rows", "many rows"])
def test_the_gradient_of_a_bias_is_the_sum_over_the_batch(
    instruction_set: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    problem = make_problem((1, columns, 3), prior="none")
    grad_y = torch.full((rows + 1, columns), 0.1, dtype=dtype)[:rows]  # its memory is not empty
    problem = problem._replace(x=torch.zeros(rows, 3, dtype=dtype), grad_y=grad_y, grad_kl=None)
    *_, grad_mu, grad_rho = ops.bayes_linear_backward(*problem.backward)
    *_, exact_rho = ops.bayes_linear_backward(*problem.exact().backward)
    # 64 are added up in single precision, each sum rounded by 2^-24.
    torch.testing.assert_close(grad_mu.double(), grad_y.double().sum(0), rtol=32 * 2.0**-24, atol=0.0)
    # The noise is right to 1e-5.
    torch.testing.assert_close(grad_rho.double(), exact_rho, rtol=1e-6, atol=1e-5 * 0.1 * rows)


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("form", ["scalar", "tensor"])
def test_a_prior_sigma_that_is_none_is_not_hidden(instruction_set: str, form: str, value: float) -> None:
    mu = torch.zeros(3, 70)
    prior_sigma = torch.ones(3, 70) if form == "tensor" else torch.tensor(1.0)
    prior_sigma.view(-1)[-1] = value
    assert not ops.weight_kl(mu, mu - 2, torch.tensor(0.0), prior_sigma).isfinite()

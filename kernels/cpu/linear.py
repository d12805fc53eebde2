"""y = x W^T + b and its gradients on the CPU: W is drawn in blocks, each multiplied while it is in the cache."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import Output, library
from fusedbayes.kernels.cpu.pair import RowNoise, combine, input_gradient, second_operands
from fusedbayes.kernels.cpu.product import multiply
from fusedbayes.kernels.cpu.sample import Parameter, kl_tensor, make_problem
from fusedbayes.kernels.streams import sample_after

# Weights of a block: 16 MiB in fp32. A quarter as many fit a smaller cache, but make products of fewer columns: on an
# Intel with 36 MiB of L3 cache three 2048 wide layers took a tenth longer, forward and backward, 32 samples a third.
BLOCK = 1 << 22
_MOST_VIEWS = 256  # of a thread's block: more shapes than a network has


class _Workspace(threading.local):
    """Each thread's memory for a block of W, kept: fresh memory costs as much time as drawing the block.

    Within a ``with`` the memory is taken. Who comes then is a signal handler or a finalizer that runs a layer while
    another one computes, and gets memory of its own.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self._views: dict[tuple[int, int, torch.dtype, int], Tensor] = {}  # of it, by shape: to make one takes longer
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def block(self, rows: int, columns: int, dtype: torch.dtype, number: int = 0) -> Tensor:
        """Memory until the thread asks for the next block of this number; more than BLOCK weights' is not kept."""
        if self._depth > 1 or rows * columns > BLOCK:
            return torch.empty(rows, columns, dtype=dtype, device="cpu")
        view = self._views.get((rows, columns, dtype, number))
        if view is None:
            with torch.inference_mode(False):  # where it is made must not decide who may write to it later
                if (dtype, number) not in self._memory:
                    self._memory[dtype, number] = torch.empty(BLOCK, dtype=dtype, device="cpu")
                view = self._memory[dtype, number].as_strided((rows, columns), (columns, 1))
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            self._views[rows, columns, dtype, number] = view
        return view


_workspace = _Workspace()


def _blocks(rows: int, columns: int) -> list[slice]:
    """Cuts the rows of a weight into blocks of at most BLOCK weights, if a row has no more; one block at least."""
    if rows * columns <= BLOCK:
        return [slice(0, rows)]
    step = max(1, BLOCK // columns)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _part(tensor: Tensor, dim: int, rows: slice) -> Tensor:
    """What belongs to a block of W's rows; for the only block the tensor itself, since views cost time too."""
    size = rows.stop - rows.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, rows.start, size)


_SAMPLED = {"shared": Output.WEIGHT, "local": Output.VARIANCE, "flipout": Output.PERTURBATION}


class _Batch(NamedTuple):
    """The rows of one Monte Carlo sample; under "local", which samples no weight, of all."""

    rows: slice
    sample: Tensor | None


class _Layer(NamedTuple):
    """The operators' arguments beside activations and cotangents."""

    weight: Parameter
    bias: Parameter | None
    seed: Tensor
    sample: Tensor | None
    weight_address: Sequence[int]
    bias_address: Sequence[int]
    num_samples: int
    estimator: str

    def row_noise(self, rows: int) -> RowNoise:
        """What `pair` needs, for so many rows of a sample."""
        return RowNoise((self.seed, self.sample), self.weight_address, self.num_samples, rows)

    @property
    def output(self) -> Output:
        """What is sampled of the weight."""
        return _SAMPLED[self.estimator]

    def batches(self, rows: int) -> list[_Batch]:
        """How `rows` rows are divided among draws of the weight."""
        if self.num_samples == 1 or self.estimator == "local":
            return [_Batch(slice(0, rows), self.sample)]
        M, key = rows // self.num_samples, (self.seed, self.sample)
        return [_Batch(slice(i * M, (i + 1) * M), sample_after(key, i)) for i in range(self.num_samples)]


def bayes_linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    weight_prior_mu: Tensor | None,
    weight_prior_sigma: Tensor | None,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    bias_prior_mu: Tensor | None,
    bias_prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    weight_address: Sequence[int],
    bias_address: Sequence[int],
    num_samples: int,
    same_input: bool,
    estimator: str,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the KL of weight and bias, and the slope."""
    weight, bias = Parameter(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma), None
    if bias_mu is not None and bias_rho is not None:
        bias = Parameter(bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    layer = _Layer(weight, bias, seed, sample, weight_address, bias_address, num_samples, estimator)
    M, (N, K) = x.shape[0] if same_input else x.shape[0] // num_samples, weight_mu.shape
    if same_input and estimator == "flipout":  # which gives each sample's rows other signs
        x = x.repeat(num_samples, 1)
    total = x.shape[0] if estimator == "local" else num_samples * M
    batches = layer.batches(total)
    keys = [(seed, batch.sample, weight_address) for batch in batches]
    problems = [make_problem(weight, key, with_kl=with_kl and not index) for index, key in enumerate(keys)]
    kl, drawn = _draw_bias(layer, batches, x.dtype, with_kl)
    second_x = x if estimator == "shared" else second_operands(x, None, None, layer.row_noise(M), estimator)[0]
    product = x.new_empty(total, N)
    with _workspace:
        for columns in _blocks(N, K):
            sampled = _workspace.block(columns.stop - columns.start, K, x.dtype)
            for (rows, _), problem, b in zip(batches, problems, drawn, strict=True):
                kl += library().forward(problem, layer.output, sampled, columns)
                operand = second_x if second_x.shape[0] == rows.stop - rows.start else second_x[rows]
                b = None if b is None or estimator == "flipout" else _part(b, 0, columns)
                multiply(operand, sampled, b, _part(_part(product, 0, rows), 1, columns))
    charge = kl_tensor(kl, weight_mu, with_kl)
    if estimator == "shared":
        return product, charge, x.new_empty(0, num_samples)
    mean = x.new_empty(x.shape[0], N)
    multiply(x, weight_mu.to(x.dtype), None, mean)
    for (rows, _), b in zip(batches, drawn, strict=True):
        if b is not None and bias_mu is not None:
            _part(mean, 0, rows).add_(b if estimator == "flipout" else bias_mu)
    y, slope = combine(mean, product, layer.row_noise(M), estimator)
    return y, charge, slope


def _draw_bias(
    layer: _Layer, batches: list[_Batch], dtype: torch.dtype, with_kl: bool
) -> tuple[float, list[Tensor | None]]:
    """The bias's KL, and what is added to the product with what is sampled: b, or sigma^2."""
    drawn: list[Tensor | None] = []
    kl, output = 0.0, layer.output if layer.estimator == "local" else Output.WEIGHT
    for index, batch in enumerate(batches):
        if layer.bias is None:
            drawn.append(None)
            continue
        drawn.append(torch.empty_like(layer.bias.mu, dtype=dtype))
        key = (layer.seed, batch.sample, layer.bias_address)
        kl += library().forward(make_problem(layer.bias, key, with_kl=with_kl and not index), output, drawn[-1])
    return kl, drawn


def bayes_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    slope: Tensor,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    weight_prior_mu: Tensor | None,
    weight_prior_sigma: Tensor | None,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    bias_prior_mu: Tensor | None,
    bias_prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    weight_address: Sequence[int],
    bias_address: Sequence[int],
    num_samples: int,
    estimator: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, and dmu and drho of weight and bias; what is sampled is drawn once for all of them."""
    weight, bias = Parameter(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma), None
    if bias_mu is not None and bias_rho is not None:
        bias = Parameter(bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    layer = _Layer(weight, bias, seed, sample, weight_address, bias_address, num_samples, estimator)
    batches, pair = layer.batches(x.shape[0]), estimator != "shared"
    activations = _Activations(x, grad_y, x, grad_y)
    if pair:
        noise = layer.row_noise(x.shape[0] // num_samples)
        second_x, second_grad = second_operands(x, grad_y, slope, noise, estimator)
        assert second_grad is not None
        activations = _Activations(x, grad_y, second_x, second_grad)
    grad_x = library().new_result(x) if needs_x else None
    grads = _accumulators(weight, len(batches)) if needs_weight else None
    _pass(layer, batches, activations, grad_kl, grad_x, grads)
    if grad_x is not None and pair:
        grad_x = input_gradient(grad_y, grad_x, x, weight_mu, noise, estimator)
    bias_grads = None
    if needs_weight and bias is not None:
        bias_grads = _bias_gradients(layer, bias, batches, activations, grad_kl)
    return (
        grad_y.new_empty(0) if grad_x is None else grad_x,
        *_rounded(grads, weight_mu),
        *_rounded(bias_grads, weight_mu),
    )


def _rounded(grads: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the parameters; those that are not there have no element."""
    if grads is None:
        return like.new_empty(0), like.new_empty(0)
    return grads if grads[0].dtype == like.dtype else (grads[0].to(like.dtype), grads[1].to(like.dtype))


class _Activations(NamedTuple):
    """The operands of the products: x (rows, K) and dY (rows, N), and those of what is sampled."""

    x: Tensor
    grad_y: Tensor
    second_x: Tensor
    second_grad: Tensor


def _accumulators(parameter: Parameter, batches: int) -> tuple[Tensor, Tensor]:
    """Where dmu and drho are written; in fp32 if several batches add to them."""
    dtype = torch.float32 if batches > 1 else None
    return library().new_result(parameter.mu, dtype), library().new_result(parameter.rho, dtype)


def _pass(
    layer: _Layer,
    batches: list[_Batch],
    activations: _Activations,
    grad_kl: Tensor | None,
    grad_x: Tensor | None,
    grads: tuple[Tensor, Tensor] | None,
) -> None:
    """Fills dmu and drho, and grad_x with the gradient by `second_x`, as far as they are given."""
    x, grad_y, second_x, second_grad = activations
    (N, K), weight, pair = layer.weight.mu.shape, layer.weight, layer.estimator != "shared"
    grad_mu, grad_rho = (None, None) if grads is None else grads
    product = grad_mu
    if product is None:
        grad_kl = None
    elif product.dtype != x.dtype:
        # Else dmu takes the place of dY^T X: the C++ reads an element before it writes it.
        product = x.new_empty(N, K)
    problems = [
        make_problem(
            weight,
            (layer.seed, batch.sample, layer.weight_address),
            grad_kl=None if index else grad_kl,
            grad_product=None if index else product,
            grad_mu=grad_mu,
            grad_rho=grad_rho,
            accumulate=index > 0,
        )
        for index, batch in enumerate(batches)
    ]
    charged = slice(0, x.shape[0]) if pair else batches[0].rows
    with _workspace:
        # Sums of many blocks' products must not be rounded to 16 bits in between: one block then.
        for columns in _blocks(N, K) if grad_y.dtype == torch.float32 else (slice(0, N),):
            size = columns.stop - columns.start
            sampled = None if grad_x is None else _workspace.block(size, K, x.dtype)
            if product is not None:
                grad_columns = _part(_part(grad_y, 0, charged), 1, columns)
                torch.mm(grad_columns.t(), _part(x, 0, charged), out=_part(product, 0, columns))
            for index, ((rows, _), problem) in enumerate(zip(batches, problems, strict=True)):
                grad_columns, grad_sampled = _part(_part(second_grad, 0, rows), 1, columns), None
                if grads is not None and (pair or index > 0):
                    grad_sampled = _workspace.block(size, K, x.dtype, 1)
                    torch.mm(grad_columns.t(), _part(second_x, 0, rows), out=grad_sampled)
                if grads is not None:
                    library().backward(problem, layer.output, sampled, grad_sampled, columns)
                elif sampled is not None:
                    library().forward(problem, layer.output, sampled, columns)
                if grad_x is not None and sampled is not None:
                    out = _part(grad_x, 0, rows)
                    if columns.start == 0:
                        torch.mm(grad_columns, sampled, out=out)
                    else:
                        out.addmm_(grad_columns, sampled)


# Elements of dY that the pass over a bias adds up itself, on one thread: PyTorch is slower to begin, with all threads.
_ADDED_UP = 1 << 16


def _bias_gradients(
    layer: _Layer, bias: Parameter, batches: list[_Batch], activations: _Activations, grad_kl: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dmu and drho of the bias."""
    grads, second = _accumulators(bias, len(batches)), None
    for index, (rows, sample) in enumerate(batches):
        first = _part(activations.grad_y, 0, rows)
        if layer.estimator == "local":
            second = activations.second_grad
        if first.numel() > _ADDED_UP:
            first = first.sum(0, dtype=torch.float32)
            second = None if second is None else second.sum(0, dtype=torch.float32)
        problem = make_problem(
            bias,
            (layer.seed, sample, layer.bias_address),
            grad_kl=None if index else grad_kl,
            grad_product=first,
            grad_mu=grads[0],
            grad_rho=grads[1],
            accumulate=index > 0,
        )
        library().backward(problem, Output.WEIGHT if second is None else Output.VARIANCE, grad_sampled=second)
    return grads

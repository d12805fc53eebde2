"""What to_bayesian and to_deterministic refuse: an error that says why, and a model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from fusedbayes import BayesLinear, frozen_sample, to_bayesian, to_deterministic


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False)))


def fingerprint(model: nn.Module) -> Any:
    """Whatever a conversion may change: modules and parameters by identity, classes, attributes, values, hooks."""
    modules = [(name, id(m), type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()]
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    tensors = [(name, id(t), t.requires_grad) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return modules, hooks, tensors, str(model)


def own_forward() -> nn.Linear:
    linear = nn.Linear(4, 3)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "odd",
    [
        lambda: nn.LazyLinear(3),
        lambda: weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
        own_forward,
        lambda: nn.Linear(4, 3, dtype=torch.complex64),
    ],
    ids=["lazy", "old_weight_norm", "weight_norm", "pruned", "own_forward", "complex"],
)
def test_layers_that_cannot_be_converted(odd: Callable[[], nn.Module]) -> None:
    """A layer whose weight or forward is computed elsewhere is left alone and named; asked for, it is an error."""
    model = nn.Sequential(nn.Linear(5, 4), odd())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'1'"):
        to_bayesian(model, where=["0", "1"])
    assert fingerprint(model) == before
    _, report = to_bayesian(model, return_report=True)  # the others are converted, and back
    assert report[0] == ("0", "Linear", "BayesLinear")
    assert report[1].name == "1"
    assert report[1].outcome.startswith("left alone: ")
    to_deterministic(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "where", ["encoder.*", nn.Conv2d, [], lambda name, module: False], ids=["glob", "class", "none", "callable"]
)
def test_where_without_a_match_lists_the_names(where: Any) -> None:
    model = network()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"picks no layer to convert; .*'0', '2\.0', '2\.1'"):
        to_bayesian(model, where=where)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"init": "median"}, ValueError, "init must be 'mean' or 'moped', got 'median'"),
        ({"init": "moped", "delta": 0.0}, ValueError, "delta must be finite and positive, got 0.0"),
        ({"init": "moped", "delta": "0.1"}, TypeError, "delta must be a number, got .*str"),
        ({"delta": 0.2}, ValueError, "delta is for init='moped', got delta=0.2"),
        ({"init": "moped", "sigma_init": 0.1}, ValueError, "'moped'.*sigma_init"),
        ({"init": "moped", "prior_mu": 0.1}, ValueError, "'moped'.*prior_mu"),
        ({"prior_sigma": -1.0}, ValueError, "prior_sigma must be finite and positive, got -1.0"),
        ({"sigma_init": 0.0}, ValueError, "sigma_init must be finite and positive, got 0.0"),
        ({"prior_mu": "0"}, TypeError, "prior_mu must be a number, got .*str"),
        ({"estimator": "magic"}, ValueError, "estimator must be one of 'shared'.*, got 'magic'"),
        ({"where": 3}, TypeError, "where must be .*, got .*int"),
        ({"where": [3]}, TypeError, "where must hold .*, got .*int"),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        to_bayesian(model, **arguments)
    assert fingerprint(model) == before


def test_moped_without_values() -> None:
    with pytest.raises(ValueError, match=r"moped.*meta|meta.*moped"):
        to_bayesian(nn.Linear(5, 4, device="meta"), init="moped")


@pytest.mark.parametrize("convert", [to_bayesian, to_deterministic])
def test_nothing_to_convert(convert: Callable[[Any], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        convert({})
    with pytest.raises(ValueError, match=r"picks no .*layer to convert"):
        convert(nn.ReLU())


def test_layers_that_cannot_go_back() -> None:
    """What nn.Linear has no place for is an error: tensors of one's own, the noise of an open context."""
    model = to_bayesian(network())
    model[0].register_buffer("calls", torch.zeros(()))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'0' must hold .* 'calls'"):
        to_deterministic(model)
    assert fingerprint(model) == before
    held = nn.Sequential(BayesLinear(5, 4))
    with frozen_sample(held, 0), pytest.raises(ValueError, match="'0' cannot be converted inside frozen_sample"):
        to_deterministic(held)


def test_a_distributed_wrapper_is_refused() -> None:
    """It has collected the parameters already: rho would never be synchronised."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = network()
    for convert in (to_bayesian, to_deterministic):
        with pytest.raises(ValueError, match="before distributing it: DistributedDataParallel"):
            convert(wrapper)


def test_a_counterpart_of_another_class() -> None:
    with pytest.raises(TypeError, match="deterministic must be of the class that BayesLinear replaces, got a Conv1d"):
        BayesLinear.of(nn.Conv1d(3, 2, 1))

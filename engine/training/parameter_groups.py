"""Which parameters of a transformer are matrices of its layers: those that Muon updates and weight decay is for."""

from typing import Any, NamedTuple

from torch import nn

from engine.models.transformer import KoDalle


class ParameterKinds(NamedTuple):
    """All parameters of a transformer that require a gradient."""

    matrices: list[nn.Parameter]  # of the linear layers
    others: list[nn.Parameter]  # tables, the head, biases, norms, scales, scalars


def parameter_kinds(model: KoDalle) -> ParameterKinds:
    """Splits a transformer's parameters, each kind in the model's order.

    The head counts as a table: a row of it belongs to one token, as a row of the token tables does.
    """
    kinds = ParameterKinds([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = name.startswith("layers.") and parameter.dim() == 2
            (kinds.matrices if is_matrix else kinds.others).append(parameter)
    return kinds


def decayed_groups(kinds: ParameterKinds) -> list[dict[str, Any]]:
    """Parameter groups with the optimizer's own weight decay for matrices and none for the others."""
    return [{"params": kinds.matrices}, {"params": kinds.others, "weight_decay": 0.0}]

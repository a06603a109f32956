"""Names in an exported graph that mean something and stay the same from export to export.

The exporter folds transposed and reshaped weights into constants called `val_231`, and writes source paths of this
machine into every node. Refit in TensorRT finds weights by name, so each gets the name of its parameter.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_SCOPES = "pkg.torch.onnx.name_scopes"
_PREFIX = "unet."
_DIMENSIONS = {0: "batch", 2: "height", 3: "width"}


def tidy(model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Rename the weights of `model` (an onnx_ir Model) after `parameters`, name the dynamic dimensions, and drop what
    the exporter noted about this machine.

    A weight that is a parameter keeps its name; one that is a parameter transposed or reshaped becomes
    `<parameter>.transposed` or `<parameter>.reshaped`. Other constants keep the exporter's names.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.name not in parameters and value.const_value is not None:
            name = _folded_name(value, parameters)
            if name is not None and name not in graph.initializers:
                value.name = name
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix(_PREFIX)
    _name_dimensions(graph)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()


def _folded_name(value: Any, parameters: Mapping[str, Tensor]) -> str | None:
    """Find the parameter of the consuming module that `value` is a folded form of."""
    if value.const_value.size < 2:
        return None
    folded = torch.from_numpy(value.const_value.numpy().copy())
    for use in value.uses():
        for scope in _scopes(use.node):
            for leaf in ("weight", "bias", "u", "vh"):
                name = f"{scope}.{leaf}"
                parameter = parameters.get(name)
                if parameter is None or parameter.numel() != folded.numel() or parameter.dtype != folded.dtype:
                    continue
                own = parameter.detach().cpu()
                if own.dim() == 2 and folded.shape == own.T.shape and torch.equal(folded, own.T):
                    return f"{name}.transposed"
                if torch.equal(folded.flatten(), own.flatten()):
                    return f"{name}.reshaped"
    return None


def _scopes(node: Any) -> Iterator[str]:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    yield from reversed([scope for scope in scopes if scope])


def _name_dimensions(graph: Any) -> None:
    for value in graph.inputs:
        value.shape[0] = "slots" if value.name.endswith("_slab") else "batch"
    for value in (*(v for v in graph.inputs if v.name == "sample"), *graph.outputs):
        for axis, name in _DIMENSIONS.items():
            value.shape[axis] = name

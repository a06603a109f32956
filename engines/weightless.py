"""A base model and its factors as shapes without memory: what a network is made from that shares another's weights.

A network that was made from the weights themselves held its own copy of them for a moment: of Stable Diffusion 1.5's
factors 2.2 GB on the device, of SDXL's 7 GB, though all but the first network read what another one has.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from hueshift.engines.adapted_unet import copy_modules
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors

_META = torch.device("meta")


def without_weights(base: BaseModel, factors: SpectralFactors) -> tuple[BaseModel, SpectralFactors]:
    """The same with a UNet and factors on the meta device: modules, shapes and dtypes alone."""
    unet = copy_modules(base.unet, lambda parameter: nn.Parameter(_empty(parameter), requires_grad=False))
    # As if laid out: whoever takes them would move them to the device of the weights otherwise.
    shapes = SpectralFactors(_all_empty(factors.u), {}, _all_empty(factors.vh), laid_out=True)
    return replace(base, unet=unet), shapes


def is_weightless(network: nn.Module) -> bool:
    """True for a network that was made from such a base."""
    return any(parameter.is_meta for parameter in network.parameters())


def share_parameters(network: nn.Module, source: nn.Module) -> None:
    """Let `network` use the memory of `source` for every parameter of the same name and size."""
    given = dict(source.named_parameters())
    for name, parameter in list(network.named_parameters()):
        other = given.get(name)
        if other is not None and other.numel() == parameter.numel() and other.dtype == parameter.dtype:
            shared = other.detach() if other.shape == parameter.shape else other.detach().view(parameter.shape)
            parent, _, key = name.rpartition(".")
            setattr(network.get_submodule(parent), key, nn.Parameter(shared, requires_grad=False))


def check_shared(network: nn.Module, device: torch.device) -> None:
    """Raise RuntimeError, naming what is missing, unless all of `network` lies on `device`."""
    parts = chain(network.named_parameters(), network.named_buffers())
    left = sorted(name for name, part in parts if part.device != device)
    if left:
        raise RuntimeError(f"no other network has what this one reads: {', '.join(left)}")


def _all_empty(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _empty(tensor) for name, tensor in tensors.items()}


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=_META)

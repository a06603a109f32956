"""LoKr (LyCORIS, Yeh et al. 2024): the Kronecker product of two matrices, each whole or itself a low-rank product."""

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.layout import MatrixLayer

ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")


def change(module: ForeignModule, layer: MatrixLayer) -> tuple[Tensor, int | None]:
    """Return the unscaled change [rows, cols] in fp64, and the rank that alpha counts by.

    The rank is None where both factors are whole: alpha does not count then. A convolution's kernel belongs to the
    second factor, so flattening it leaves the plain Kronecker product of matrices.
    """
    first, rank_1 = _factor(module, layer, "1")
    second, rank_2 = _factor(module, layer, "2")
    role = "lokr_w2" if "lokr_w2" in module.keys else "lokr_w2_a"
    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    if shape != (layer.rows, layer.cols):
        raise module.wrong(role, second, f"a factor that makes {layer.rows} x {layer.cols} with {list(first.shape)}")
    return torch.kron(first, second), rank_1 or rank_2


def _factor(module: ForeignModule, layer: MatrixLayer, number: str) -> tuple[Tensor, int | None]:
    whole = f"lokr_w{number}"
    if whole in module.keys:
        return _matrix(module, whole), None
    a, b = _matrix(module, f"{whole}_a"), _matrix(module, f"{whole}_b")
    rank = module.check_rank(f"{whole}_b", b.shape[0])
    core = f"lokr_t{number}"
    if core in module.keys:
        # Tucker form of convolutions: a [rank, outputs], b [rank, inputs], core [rank, rank, k, k].
        t = module.read(core).double()
        module.check_rank(core, a.shape[0])
        if tuple(t.shape) != (a.shape[0], rank, *layer.weight_shape[2:]) or not layer.is_conv:
            raise module.wrong(core, t, f"[{a.shape[0]}, {rank}, {', '.join(map(str, layer.weight_shape[2:]))}]")
        _check_divides(module, layer, f"{whole}_a", a.shape[1], b.shape[1] * t[0, 0].numel())
        return torch.einsum("ijkl,ip,jc->pckl", t, a, b).flatten(1), rank
    if a.shape[1] != rank:
        raise module.wrong(f"{whole}_a", a, f"[outputs, {rank}]")
    _check_divides(module, layer, f"{whole}_a", a.shape[0], b.shape[1])
    return a @ b, rank


def _check_divides(module: ForeignModule, layer: MatrixLayer, role: str, outputs: int, inputs: int) -> None:
    # Before the product is made: two thin factors of a small file could make one that no memory holds.
    if layer.rows % outputs or layer.cols % inputs:
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: tensor {module.keys[role]!r} is of a factor of {outputs} x {inputs}, which does "
            f"not divide the {layer.rows} x {layer.cols} of layer {layer.name!r}",
        )


def _matrix(module: ForeignModule, role: str) -> Tensor:
    tensor = module.read(role).double()
    if tensor.dim() < 2:
        raise module.wrong(role, tensor, "a matrix")
    return tensor.flatten(1)

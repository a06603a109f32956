"""LoHa (Hyeon-Woo et al. 2022, FedPara, as in LyCORIS): the elementwise product of two low-rank products."""

import torch
from torch import Tensor

from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.layout import MatrixLayer

ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def change(module: ForeignModule, layer: MatrixLayer) -> tuple[Tensor, int]:
    """Return the unscaled change [rows, cols] in fp64, and the rank that alpha counts by."""
    first, rank = _half(module, layer, "1")
    second, _ = _half(module, layer, "2")
    return first * second, rank


def _half(module: ForeignModule, layer: MatrixLayer, number: str) -> tuple[Tensor, int]:
    roles = (f"hada_w{number}_a", f"hada_w{number}_b")
    a, b = (module.read(role).double() for role in roles)
    if a.dim() < 2 or b.dim() < 2:
        raise module.wrong(roles[0] if a.dim() < 2 else roles[1], a if a.dim() < 2 else b, "a matrix")
    rank = module.check_rank(roles[1], b.shape[0])
    core = f"hada_t{number}"
    if core not in module.keys:
        if tuple(a.shape) != (layer.rows, rank):
            raise module.wrong(roles[0], a, f"[{layer.rows}, {rank}]")
        if b.flatten(1).shape[1] != layer.cols:
            raise module.wrong(roles[1], b, f"[{rank}, {layer.cols}]")
        return a @ b.flatten(1), rank
    # Tucker form of convolutions: a [rank, rows], b [rank, c_in], core [rank, rank, k, k].
    t, inputs = module.read(core).double(), layer.weight_shape[1]
    module.check_rank(core, a.shape[0])
    if not layer.is_conv or tuple(t.shape) != (a.shape[0], rank, *layer.weight_shape[2:]):
        raise module.wrong(core, t, f"[{a.shape[0]}, {rank}, {', '.join(map(str, layer.weight_shape[2:]))}]")
    if a.dim() != 2 or a.shape[1] != layer.rows:
        raise module.wrong(roles[0], a, f"[{a.shape[0]}, {layer.rows}]")
    if tuple(b.shape) != (rank, inputs):
        raise module.wrong(roles[1], b, f"[{rank}, {inputs}]")
    return torch.einsum("ijkl,jc,ip->pckl", t, b, a).reshape(layer.rows, layer.cols), rank

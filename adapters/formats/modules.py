"""One changed module of a file, whatever the file calls it: its tensors by role, and what they mean for the layer.

Roles are the endings of LyCORIS, with `down`, `up` and `mid` for LoRA's factors, `magnitude` for DoRA's vector as PEFT
keeps it and `dora_scale` for the same as LyCORIS and kohya do.
"""

from collections.abc import Callable

from torch import Tensor

from hueshift.adapters.formats import loha, lokr, lora
from hueshift.adapters.formats.draft import BIAS, Draft
from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.layout import MatrixLayer

BIAS_ROLES = ("diff_b", "b_norm", "bias")
ROLES = (
    "down",
    "up",
    "mid",
    "alpha",
    "dora_scale",
    "magnitude",
    "diff",
    "w_norm",
    *loha.ROLES,
    *lokr.ROLES,
    *BIAS_ROLES,
)

ScaleOf = Callable[[int | None], float]
"""The scale of a product of that rank; None where there is no rank because both Kronecker factors are whole."""


def alpha_scale(module: ForeignModule) -> ScaleOf:
    """The scale alpha / rank of kohya and LyCORIS; an absent alpha, or one of 0, means the rank itself."""
    alpha = module.source.number(module.keys["alpha"]) if "alpha" in module.keys else 0.0

    def scale_of(rank: int | None) -> float:
        return alpha / rank if alpha and rank else 1.0

    return scale_of


def add_module(draft: Draft, module: ForeignModule, scale_of: ScaleOf) -> None:
    """Add a module to the draft. Roles that its kind does not have stay unread, and so are reported as leftover."""
    for role in BIAS_ROLES:
        if role in module.keys and bool(module.read(role).any()):
            draft.leave_out([module.keys[role]], BIAS)
    if module.layer in draft.norm_sizes:
        _add_norm(draft, module)
        return
    layer = draft.matrices[module.layer]
    if "down" in module.keys or "up" in module.keys:
        a, b = lora.factors(module, layer)
        scale = scale_of(a.shape[0])
        if not _has_magnitude(module):
            draft.add_product(layer, a, b, scale, "lora")
            return
        _add_delta(draft, module, layer, scale * (b.double() @ a.double()), "dora")
    elif any(role in module.keys for role in loha.ROLES):
        delta, rank = loha.change(module, layer)
        _add_delta(draft, module, layer, delta * scale_of(rank), "loha")
    elif any(role in module.keys for role in lokr.ROLES):
        change, known_rank = lokr.change(module, layer)
        _add_delta(draft, module, layer, change * scale_of(known_rank), "lokr")
    elif "diff" in module.keys:
        diff = module.read("diff")
        if tuple(diff.shape) not in (layer.weight_shape, (layer.rows, layer.cols)):
            raise module.wrong("diff", diff, str(list(layer.weight_shape)))
        draft.add_delta(layer, diff.reshape(layer.rows, layer.cols), "dense")


def _add_norm(draft: Draft, module: ForeignModule) -> None:
    role = "w_norm" if "w_norm" in module.keys else "diff"
    if role not in module.keys:
        return
    shift, size = module.read(role), draft.norm_sizes[module.layer]
    if tuple(shift.shape) != (size,):
        raise module.wrong(role, shift, f"[{size}]")
    draft.add_norm(module.layer, shift)


def _has_magnitude(module: ForeignModule) -> bool:
    return "dora_scale" in module.keys or "magnitude" in module.keys


def _add_delta(draft: Draft, module: ForeignModule, layer: MatrixLayer, delta: Tensor, form: str) -> None:
    if _has_magnitude(module):
        delta = lora.with_magnitude(module, layer, draft.base.matrix(layer), delta)
    draft.add_delta(layer, delta, form)

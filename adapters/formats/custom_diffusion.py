"""Custom Diffusion (Kumari et al. 2023) as diffusers saves it: whole K and V matrices of the cross-attentions.

Keys read `<attention>.processor.to_k_custom_diffusion.weight`; files of the crossattn variant also hold q and out. They
replace the base's matrices, so the change is their difference to it. Learned words may lie beside them.
"""

import re

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import BIAS, Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import take_words

_KEY = re.compile(r"(.+)\.processor\.to_(k|v|q|out)_custom_diffusion(\.0)?\.(weight|bias)")


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the difference of every matrix to the base's own."""
    for key in source.entries:
        found = _KEY.fullmatch(key)
        layer = draft.locate(f"{found[1]}.to_{found[2]}{found[3] or ''}") if found else None
        if found is None or layer is None:
            continue
        tensor = source.read(key)
        base = draft.base.parameter(f"{layer}.{found[4]}")
        if tensor.shape != base.shape:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(tensor.shape)}, but the base model's {layer!r} "
                f"has {list(base.shape)}; it was made for another base model",
            )
        difference = tensor.double() - base.double()
        if found[4] == "weight":
            draft.add_delta(draft.matrices[layer], difference, "dense")
        elif bool(difference.any()):
            draft.leave_out([key], BIAS)
    take_words(draft, source)

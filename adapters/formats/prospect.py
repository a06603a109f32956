"""ProSpect (Zhang et al. 2023): a word with an embedding for every stage of sampling.

Tensors are `prospect.<word>` [stages, width].

The authors' program (zyxElsa/ProSpect) saves whole Python modules in a pickle, which is never opened here. What its
modules give out, [10, 768], is what this format holds, in that program's order: the first for the smallest timesteps,
where noise is low. Ours begins at high noise.
"""

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import word_of

_PREFIX = "prospect."


def read(draft: Draft, source: ForeignFile) -> None:
    """Add every word with its embeddings [stages, 1, 1, width]."""
    keys = [key for key in source.entries if key.startswith(_PREFIX)]
    width, most = draft.base.layout.token_width, draft.limits.max_stages
    for key in keys:
        shape = source.entries[key].shape
        if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= most:
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(shape)}; allowed: [stages, {width}] with 1 to "
                f"{most} stages",
            )
        stored = key.removeprefix(_PREFIX)
        word = word_of(stored, draft, source) if len(keys) == 1 else stored
        draft.add_grid(word, source.read(key).flip(0)[:, None, None], key)

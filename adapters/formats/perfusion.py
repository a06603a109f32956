"""Perfusion (Tewel et al. 2023) by the names of the port by ChenDarYen, in a safetensors file.

The port saves a pickle; docs/adapters.md has the lines that make a safetensors file of it: `target_input` [width] (the
paper's i*), `C_inv` [width, width] or, enough and smaller, `dual` = C^-1 i* [width], `<layer>.target_output` (o*) and
the word's embedding, with beta and tau in the metadata. The port trains an o* for each of the 77 places of a prompt;
the paper and this format have one, [rows], for wherever the word stands, so one place must be chosen.
"""

from torch import Tensor

from hueshift.adapters.adapter import GatedEdit
from hueshift.adapters.container import invalid, wrong_shape
from hueshift.adapters.formats.draft import Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.words import take_words

_END = ".target_output"
# The port's own, in training and drawing.
_BETA, _TAU = 0.75, 0.1


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the gated edit and its word. Raises InvalidArgument (ADAPTER_FILE_INVALID, ADAPTER_SHAPE_MISMATCH)."""
    width = _width(source)
    target = source.read_shaped("target_input", width)
    outputs: dict[str, Tensor] = {}
    for key in source.entries:
        layer = draft.locate(key.removesuffix(_END)) if key.endswith(_END) else None
        if layer is None:
            continue
        if layer in outputs:
            raise invalid(f"layer {layer!r} has two target outputs, under two spellings")
        outputs[layer] = _output(source, key, draft.matrices[layer].rows if layer in draft.matrices else 0)
    words = take_words(draft, source)
    if not outputs:
        # What is left over is refused by name afterwards.
        return
    if len(words) != 1:
        raise invalid(
            f"it teaches {len(words)} words beside its gated edit; allowed: one, as `<word>` or string_to_param"
        )
    edit = GatedEdit(target, _dual(source, target), outputs, *_numbers(draft, source))
    draft.add_gated(words[0], edit)


def _width(source: ForeignFile) -> int:
    entry = source.entries.get("target_input")
    if entry is None:
        raise invalid("it has no tensor 'target_input', which Perfusion needs; docs/adapters.md tells how to save it")
    if len(entry.shape) != 1:
        raise wrong_shape(entry, "[width]")
    return entry.shape[0]


def _dual(source: ForeignFile, target: Tensor) -> Tensor:
    width = target.shape[0]
    if "dual" in source.entries:
        if "C_inv" in source.entries:
            source.skip("C_inv")
        return source.read_shaped("dual", width)
    return (source.read_shaped("C_inv", width, width).double() @ target.double()).float()


def _output(source: ForeignFile, key: str, rows: int) -> Tensor:
    entry = source.entries[key]
    if entry.shape[-1:] != (rows,) or len(entry.shape) > 2:
        raise wrong_shape(entry, f"[{rows}]")
    places = source.read(key).reshape(-1, rows)
    if not bool((places == places[0]).all()):
        raise invalid(
            f"tensor {key!r} has different outputs for {places.shape[0]} places of the prompt; allowed: one, [{rows}]. "
            "Keep that of the place where the word stood in the training prompts"
        )
    return places[0].clone()


def _numbers(draft: Draft, source: ForeignFile) -> tuple[float, float]:
    beta, tau = source.stated_number("beta"), source.stated_number("tau")
    if beta is None or tau is None:
        draft.notes.append(
            f"the file does not say beta and tau of its gate; {_BETA} and {_TAU} are taken where missing"
        )
    return (_BETA if beta is None else beta), (_TAU if tau is None else tau)

"""Which program wrote a file, told by the names of its tensors. Names of files do not count; torch is not needed."""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum

from hueshift.adapters.container import ContainerHeader
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.validate import METADATA_KEY


class Format(StrEnum):
    """Formats of adapter files."""

    HUESHIFT = "hueshift"
    """Our own."""

    CLONEOFSIMO = "cloneofsimo"
    """LoRA of the `lora` program by cloneofsimo: `unet:<n>:up`, learned words beside them."""

    CUSTOM_DIFFUSION = "custom-diffusion"
    """Custom Diffusion of diffusers: whole cross-attention matrices, learned words beside them."""

    MKSHING = "mkshing"
    """SVDiff of svdiff-pytorch by mkshing: `<layer>.delta`."""

    KOHYA = "kohya"
    """Flat layer names, as the kohya programs and LyCORIS write: LoRA, LoCon, LoHa, LoKr, full and norm differences."""

    PEFT = "peft"
    """Dotted layer names, as diffusers and PEFT write them: LoRA, DoRA, LoHa, LoKr."""

    DENSE = "dense"
    """Whole weights of a UNet, as DreamBooth leaves them: a diffusers folder's file or a checkpoint."""

    TEXTUAL_INVERSION = "textual-inversion"
    """Learned words of diffusers or of the A1111 web interface."""


_PEFT_KEY = re.compile(
    r"\.lora_(A|B|magnitude_vector|embedding_A|embedding_B)\b|_lora\.(down|up)\.|\.lora\.(down|up)\.|"
    r"\.lora_linear_layer\.(down|up)\.|\.(lora_(down|up|mid)\.weight|hada_[wt][12]\w*|lokr_[wt][12]\w*)$"
)
_DENSE_KEY = re.compile(
    r"^(unet\.|model\.diffusion_model\.|diffusion_model\.)?"
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|"
    r"input_blocks|middle_block|output_blocks|time_embed|out)\.(.*\.)?(weight|bias)$"
)
_WORD_KEY = re.compile(r"^(emb_params|clip_[lg]|<[^<>]*>|bundle_emb\..*)$")

# The first that fits counts: files of the later ones may hold what the earlier ones hold, never the other way round.
_RULES: tuple[tuple[Format, Callable[[str], object]], ...] = (
    (Format.CLONEOFSIMO, re.compile(r"^(unet|text_encoder):\d+:(up|down)$").match),
    (Format.CUSTOM_DIFFUSION, re.compile(r"\.to_(k|v|q|out)_custom_diffusion\.").search),
    (Format.MKSHING, re.compile(r"\.delta$").search),
    (Format.KOHYA, re.compile(r"^(lora|lycoris)_\w+\.").match),
    (Format.PEFT, _PEFT_KEY.search),
    (Format.DENSE, _DENSE_KEY.match),
    (Format.TEXTUAL_INVERSION, _WORD_KEY.match),
)


def detect(header: ContainerHeader) -> Format:
    """Return the format of a file.

    Raises InvalidArgument (ADAPTER_FILE_INVALID) naming some of its tensors if no format fits.
    """
    if METADATA_KEY in header.metadata:
        return Format.HUESHIFT
    for found, fits in _RULES:
        if any(fits(name) for name in header.tensors):
            return found
    if _looks_like_words(header):
        return Format.TEXTUAL_INVERSION
    names = ", ".join(repr(name[:80]) for name in list(header.tensors)[:4]) or "none"
    raise InvalidArgument(
        Reason.ADAPTER_FILE_INVALID,
        f"adapter file refused: no known format has tensors of such names: {names}; allowed: files of Hueshift, of "
        f"{', '.join(OTHERS.values())}",
    )


def _looks_like_words(header: ContainerHeader) -> bool:
    # {word: tensor}, as diffusers writes a single learned word, which may be any word.
    shapes = [entry.shape for entry in header.tensors.values()]
    return len(shapes) == 1 and len(shapes[0]) in (1, 2) and "." not in next(iter(header.tensors))


OTHERS: Mapping[Format, str] = {
    Format.KOHYA: "kohya and LyCORIS (LoRA, LoCon, LoHa, LoKr, full and norm differences)",
    Format.PEFT: "diffusers and PEFT (LoRA, DoRA, LoHa, LoKr)",
    Format.CLONEOFSIMO: "cloneofsimo (LoRA with learned words)",
    Format.TEXTUAL_INVERSION: "Textual Inversion (diffusers, A1111)",
    Format.CUSTOM_DIFFUSION: "Custom Diffusion",
    Format.MKSHING: "SVDiff by mkshing",
    Format.DENSE: "DreamBooth (UNet weights)",
}

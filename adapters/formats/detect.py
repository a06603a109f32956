"""Which program wrote a file, told by the names of its tensors. Names of files do not count; torch is not needed."""

import re
from collections.abc import Callable, Collection, Mapping
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

    P_PLUS = "p-plus"
    """Words with an embedding per block or layer, as prompt-plus-pytorch by mkshing names them: `<word>-0` and on."""

    PROSPECT = "prospect"
    """Words with an embedding per stage of sampling: `prospect.<word>`."""

    NETI = "neti"
    """The mapper of NeTI: its state dict, and the encoder's frequencies beside it."""

    PERFUSION = "perfusion"
    """Perfusion as the port by ChenDarYen names its parts: `target_input`, `<layer>.target_output`."""


_PEFT_KEY = re.compile(
    r"\.lora_(A|B|magnitude_vector|embedding_A|embedding_B)\b|_lora\.(down|up)\.|\.lora\.(down|up)\.|"
    r"\.lora_linear_layer\.(down|up)\.|\.(lora_(down|up|mid)\.weight|hada_[wt][12]\w*|lokr_[wt][12]\w*)$"
)
_DENSE_KEY = re.compile(
    r"^(unet\.|model\.diffusion_model\.|diffusion_model\.)?"
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|"
    r"input_blocks|middle_block|output_blocks|time_embed|out)\.(.*\.)?(weight|bias)$"
)
_WORD_KEY = re.compile(r"^(emb_params|clip_[lg]|<[^<>]*>|bundle_emb\..*|string_to_param\..*)$")
_NUMBERED = re.compile(r"(.+)-(\d{1,2})")

# The first that fits counts: files of the later ones may hold what the earlier ones hold, never the other way round.
_RULES: tuple[tuple[Format, Callable[[str], object]], ...] = (
    (Format.NETI, re.compile(r"^(mapper\.)?output_layer\.0\.weight$").match),
    (Format.PERFUSION, re.compile(r"^target_input$|\.target_output$").search),
    (Format.PROSPECT, re.compile(r"^prospect\.").match),
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
    if _looks_like_layers(header):
        return Format.P_PLUS
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


def numbered_words(names: Collection[str]) -> dict[str, list[str]]:
    """Return the names `<word>-0`, `<word>-1` and on by their words, in order; empty unless all names are such."""
    words: dict[str, dict[int, str]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found is None:
            return {}
        words.setdefault(found[1], {})[int(found[2])] = name
    complete = all(set(numbers) == set(range(len(numbers))) for numbers in words.values())
    return {word: [numbers[n] for n in range(len(numbers))] for word, numbers in words.items()} if complete else {}


def joined_words(names: Collection[str]) -> dict[str, list[str]]:
    """Return names by the word they are vectors of: `<word>`, `<word>_1`, `<word>_2`, as diffusers names its tokens."""
    words: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        word, _, number = name.rpartition("_")
        if number.isdecimal() and word in words and int(number) == len(words[word]):
            words[word].append(name)
        else:
            words[name] = [name]
    return words


def _looks_like_layers(header: ContainerHeader) -> bool:
    words = numbered_words(header.tensors)
    vectors = all(len(entry.shape) in (1, 2) for entry in header.tensors.values())
    return bool(words) and vectors and all(len(numbered) > 1 and "." not in word for word, numbered in words.items())


def _looks_like_words(header: ContainerHeader) -> bool:
    # {word: tensor}, as diffusers writes a single learned word, which may be any word; the vectors of one word as
    # diffusers numbers them; or a word and its negative.
    shapes = [entry.shape for entry in header.tensors.values()]
    words = list(joined_words(header.tensors))
    one = len(words) == 1 or (len(words) == 2 and words[1] == f"{words[0]}-neg")
    return one and all(len(shape) in (1, 2) for shape in shapes) and not any("." in word for word in words)


OTHERS: Mapping[Format, str] = {
    Format.KOHYA: "kohya and LyCORIS (LoRA, LoCon, LoHa, LoKr, full and norm differences)",
    Format.PEFT: "diffusers and PEFT (LoRA, DoRA, LoHa, LoKr)",
    Format.CLONEOFSIMO: "cloneofsimo (LoRA with learned words)",
    Format.TEXTUAL_INVERSION: "Textual Inversion (diffusers, A1111)",
    Format.P_PLUS: "P+ (mkshing)",
    Format.PROSPECT: "ProSpect",
    Format.NETI: "NeTI",
    Format.PERFUSION: "Perfusion",
    Format.CUSTOM_DIFFUSION: "Custom Diffusion",
    Format.MKSHING: "SVDiff by mkshing",
    Format.DENSE: "DreamBooth (UNet weights)",
}

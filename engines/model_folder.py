"""Which folders are base models that Hueshift serves, and what is wrong with one that is not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hueshift.adapters.errors import InvalidArgument, Reason

# Numbers in SDXL's time ids: original size, crop and target size.
TIME_IDS = 6
_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
_XL_PARTS = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}


def read_index(path: Path) -> dict[str, Any]:
    """Return model_index.json. Raises InvalidArgument (MODEL_UNSUPPORTED, MODEL_FILE_INVALID)."""
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise InvalidArgument(
            Reason.MODEL_UNSUPPORTED,
            f"{path} is not a diffusers model folder: it has no model_index.json. Give the folder of a Stable "
            "Diffusion 1.x, 2.x or XL model as diffusers saves it.",
        )
    return read_config(index_file)


def check_parts(path: Path, index: Mapping[str, Any], *, is_xl: bool) -> None:
    """Refuse a folder with other or missing parts. Raises InvalidArgument (MODEL_UNSUPPORTED, MODEL_FILE_INVALID)."""
    if is_xl and _class_of(index, "text_encoder") is None and _class_of(index, "text_encoder_2") is not None:
        raise InvalidArgument(
            Reason.MODEL_UNSUPPORTED,
            f"{path} is SDXL's refiner, which has the second text encoder alone; give the folder of an SDXL base model",
        )
    kind = "an SDXL" if is_xl else "a Stable Diffusion 1.x or 2.x"
    for part, expected in {**_PARTS, **(_XL_PARTS if is_xl else {})}.items():
        given = _class_of(index, part)
        if given != expected and not (part.startswith("tokenizer") and given == "CLIPTokenizerFast"):
            raise InvalidArgument(
                Reason.MODEL_UNSUPPORTED, f"{path}: {part} is {given or 'absent'}, but {kind} model has {expected}"
            )
        if not (path / part).is_dir():
            raise InvalidArgument(Reason.MODEL_FILE_INVALID, f"{path}: the folder {part}/ is missing")


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    found = index.get(part)
    return found[1] if isinstance(found, list) and len(found) == 2 else None


def check_xl(
    path: Path, config: Any, widths: Sequence[int], tokenizers: tuple[Any, Any], projection_width: int
) -> None:
    """Refuse an SDXL model whose parts do not belong together. Raises InvalidArgument (MODEL_UNSUPPORTED)."""
    problems = []
    if config.cross_attention_dim != sum(widths):
        problems.append(
            f"the UNet reads contexts of width {config.cross_attention_dim}, the text encoders give "
            f"{' + '.join(map(str, widths))}"
        )
    added = projection_width + TIME_IDS * int(config.addition_time_embed_dim)
    if config.projection_class_embeddings_input_dim != added:
        problems.append(
            f"add_embedding reads {config.projection_class_embeddings_input_dim} values, but pooled text and "
            f"{TIME_IDS} sizes are {added} (the refiner, which has an aesthetic score instead, is not supported)"
        )
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        problems.append("the two tokenizers have different vocabularies")
    if problems:
        raise InvalidArgument(Reason.MODEL_UNSUPPORTED, f"{path}: {'; '.join(problems)}")


def check_unet(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a UNet of another kind. Raises InvalidArgument (MODEL_UNSUPPORTED)."""
    allowed = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    problems = []
    if not blocks or blocks - allowed:
        problems.append(f"block types {sorted(blocks - allowed) or 'absent'} (supported: {sorted(allowed)})")
    if config.get("addition_embed_type") not in (None, "text_time"):
        problems.append(f"addition_embed_type {config['addition_embed_type']} (supported: none, and SDXL's text_time)")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        problems.append("class embeddings (supported: none)")
    if config.get("in_channels") != config.get("out_channels"):
        problems.append(
            f"{config.get('in_channels')} input and {config.get('out_channels')} output channels (they must be equal; "
            "inpainting models differ)"
        )
    if problems:
        raise InvalidArgument(Reason.MODEL_UNSUPPORTED, f"{path}: the UNet has {'; '.join(problems)}")


def read_config(file: Path) -> dict[str, Any]:
    """Return a JSON object. Raises InvalidArgument (MODEL_FILE_INVALID)."""
    try:
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidArgument(Reason.MODEL_FILE_INVALID, f"{file} cannot be read: {error}") from error

"""The settings of a job as options of `hueshift finetune`, named as in the contract's FineTuneSettings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hueshift.client.jobs import LearnedSubject

_STEPS = "Training; what is absent takes the method's default, see `hueshift model`"
_DATA = "Pictures and captions"
_LOSS = "Objectives"
_METHOD = "Method"
_RUN = "Running"


def _option(panel: str, text: str = "") -> Any:
    return typer.Option(rich_help_panel=panel, help=text or None)


def settings_options(
    steps: Annotated[int | None, _option(_STEPS)] = None,
    batch_size: Annotated[int | None, _option(_STEPS)] = None,
    gradient_accumulation: Annotated[int | None, _option(_STEPS, "Batches per step.")] = None,
    learning_rate: Annotated[float | None, _option(_STEPS)] = None,
    norm_learning_rate: Annotated[float | None, _option(_STEPS, "Of norm weights (svdiff).")] = None,
    identifier_learning_rate: Annotated[float | None, _option(_STEPS, "Of the learned words.")] = None,
    text_encoder_learning_rate: Annotated[float | None, _option(_STEPS, "Of the text encoder's shifts.")] = None,
    rate_schedule: Annotated[str | None, _option(_STEPS, "linear, constant or cosine.")] = None,
    warmup_steps: Annotated[int | None, _option(_STEPS)] = None,
    seed: Annotated[int | None, _option(_STEPS)] = None,
    ema_decay: Annotated[float | None, _option(_STEPS, "Of the moving average that is published; 0: none.")] = None,
    early_stop: Annotated[int | None, _option(_STEPS, "Checks without a gain that end the job; 0: never.")] = None,
    mirror: Annotated[bool | None, _option(_DATA, "Also train on mirrored pictures.")] = None,
    random_crops: Annotated[int | None, _option(_DATA, "Random squares of each picture; 0: its centre.")] = None,
    caption_dropout: Annotated[float | None, _option(_DATA, "Share of captions left empty.")] = None,
    anchor_below: Annotated[int | None, _option(_LOSS, "Timestep below which the base is the target.")] = None,
    prior_weight: Annotated[float | None, _option(_LOSS, "Weight of class pictures; 0: none.")] = None,
    prior_images: Annotated[int | None, _option(_LOSS, "Class pictures of each noun.")] = None,
    min_snr_gamma: Annotated[float | None, _option(_LOSS, "Min-SNR weighting; 0: off.")] = None,
    offset_noise: Annotated[float | None, _option(_LOSS, "Strength of offset noise; 0: off.")] = None,
    background_weight: Annotated[float | None, _option(_LOSS, "Weight outside of masks, 0 to 1.")] = None,
    cut_mix_probability: Annotated[float | None, _option(_LOSS, "Rows that join two subjects.")] = None,
    unmix_weight: Annotated[float | None, _option(_LOSS, "Weight of keeping their words apart.")] = None,
    unmix_layers: Annotated[list[str] | None, _option(_LOSS, "Part of a cross-attention's name; repeat.")] = None,
    rank: Annotated[int | None, _option(_METHOD, "Of LoRA, or that changes are compressed to; 0: whole.")] = None,
    alpha: Annotated[float | None, _option(_METHOD, "LoRA's scale times its rank.")] = None,
    targets: Annotated[list[str] | None, _option(_METHOD, "Ending of layer names; repeat.")] = None,
    lora_init: Annotated[str | None, _option(_METHOD, "gaussian or pissa.")] = None,
    train_text_encoder: Annotated[bool | None, _option(_METHOD, "Shift the text encoder too (svdiff).")] = None,
    token_vectors: Annotated[int | None, _option(_METHOD, "Embeddings of a learned word.")] = None,
    per_layer: Annotated[bool | None, _option(_METHOD, "A word for each cross-attention.")] = None,
    sample_interval: Annotated[int | None, _option(_RUN)] = None,
    checkpoint_interval: Annotated[int | None, _option(_RUN)] = None,
    checkpoint_limit: Annotated[int | None, _option(_RUN, "Checkpoints kept at a time.")] = None,
    precision: Annotated[str | None, _option(_RUN, "auto, fp32 or bf16.")] = None,
    gradient_checkpointing: Annotated[bool | None, _option(_RUN, "Slower, for less memory.")] = None,
) -> None:
    """Declare the settings of a job."""


def chosen_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was not given."""
    return {name: value for name, value in settings.items() if value is not None and value != []}


def parse_also(
    texts: Sequence[str], pictures: Sequence[Path], hint: str = "--also"
) -> tuple[list["LearnedSubject"], list[int]]:
    """Return further subjects, and which subject each picture shows, of `WORD:NOUN:PICTURE[,PICTURE...]`."""
    from hueshift.client.jobs import LearnedSubject

    subjects: list[LearnedSubject] = []
    shown = [0] * len(pictures)
    for number, text in enumerate(texts, 1):
        word, _, rest = text.partition(":")
        noun, _, names = rest.partition(":")
        if not word or not names:
            raise typer.BadParameter(f"{text!r}; write WORD:NOUN:PICTURE[,PICTURE]", param_hint=hint)
        subjects.append(LearnedSubject(word, noun))
        for name in names.split(","):
            shown[find_picture(name, pictures, hint)] = number
    return subjects, shown if subjects else []


def parse_masks(texts: Sequence[str], pictures: Sequence[Path], hint: str = "--mask") -> dict[int, Path]:
    """Return the mask files of `PICTURE=MASK` by the index of the picture."""
    masks: dict[int, Path] = {}
    for text in texts:
        name, sign, mask = text.partition("=")
        if not sign or not Path(mask).is_file():
            raise typer.BadParameter(f"{text!r}; write PICTURE=MASK, MASK being a file", param_hint=hint)
        masks[find_picture(name, pictures, hint)] = Path(mask)
    return masks


def find_picture(name: str, pictures: Sequence[Path], hint: str) -> int:
    """Return the index of the picture of that path or bare name. Raises BadParameter unless there is exactly one."""
    found = [index for index, picture in enumerate(pictures) if name in (str(picture), picture.name)]
    if len(found) != 1:
        raise typer.BadParameter(f"{name!r} is {len(found)} of the pictures given; name one", param_hint=hint)
    return found[0]

"""What a job does unless it says otherwise, and the check that turns a request into a complete spec.

The numbers were chosen on emoji-128, whose pictures are 128x128, on a CPU: docs/training.md has the trials.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.training.checks import (
    CHOICES,
    LISTS,
    check_edit,
    check_learning,
    check_pictures,
    check_prompts,
    check_settings,
    check_subjects,
    check_together,
    subject_path,
)
from hueshift.training.spec import LoraInit, Method, Precision, RateSchedule, Subject, SubjectKind, TrainingSpec

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "batch_size": 4,
        "gradient_accumulation": 1,
        "norm_learning_rate": 0.0,
        "rate_schedule": RateSchedule.LINEAR,
        "warmup_steps": 5,
        "seed": 0,
        "prior_weight": 0.0,
        "prior_images": 24,
        "sample_interval": 0,
        "checkpoint_interval": 25,
        "checkpoint_limit": 1,
        "caption_dropout": 0.1,
        "mirror": False,
        "random_crops": 0,
        "anchor_below": 250,
        "ema_decay": 0.0,
        "min_snr_gamma": 0.0,
        "offset_noise": 0.0,
        "background_weight": 0.0,
        "cut_mix_probability": 0.0,
        "unmix_weight": 0.0,
        "unmix_layers": (),
        "rank": 0,
        "alpha": 0.0,
        "targets": (),
        "lora_init": LoraInit.GAUSSIAN,
        "token_vectors": 1,
        "per_layer": False,
        "precision": Precision.AUTO,
        "gradient_checkpointing": False,
        "early_stop": 0,
        "train_text_encoder": False,
        "text_encoder_learning_rate": 0.0,
    }
)
# diffusers' LoRA script trains these too.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# On a few layers; with every weight, the default of `targets`, this rate left nothing of the base (docs/training.md).
DREAMBOOTH_FEW_RATE = 5e-4
# What the one public trainer with a text encoder takes (svdiff-pytorch by mkshing: 1e-3 for all shifts).
TEXT_ENCODER_RATE = 1e-3
_METHODS: Mapping[Method, Mapping[str, Any]] = MappingProxyType(
    {
        Method.SVDIFF: {"ema_decay": 0.9, "text_encoder_learning_rate": TEXT_ENCODER_RATE},
        Method.RESIDUALS: {"learning_rate": 3e-3},
        Method.LORA: {"learning_rate": 3e-3, "rank": 8, "alpha": 8.0, "targets": LORA_TARGETS},
        # The learning rate is the words': identifier_learning_rate; the other one has nothing to move.
        Method.TEXTUAL_INVERSION: {"learning_rate": 1e-2, "token_vectors": 4, "anchor_below": 0},
        Method.CUSTOM_DIFFUSION: {"learning_rate": 1e-3},
        # Not 0, the whole change, even where it is served: docs/training.md, whole or of a rank.
        Method.DREAMBOOTH: {"learning_rate": 1e-4, "rank": 16},
    }
)
_CHOSEN: Mapping[tuple[Method, SubjectKind], Mapping[str, Any]] = MappingProxyType(
    {
        (Method.SVDIFF, SubjectKind.SUBJECT): {
            "learning_rate": 1.5e-2,
            "norm_learning_rate": 1e-3,
            "identifier_learning_rate": 2e-2,
            "anchor_below": 150,
        },
        (Method.SVDIFF, SubjectKind.STYLE): {
            "learning_rate": 2e-2,
            "norm_learning_rate": 3e-3,
            "identifier_learning_rate": 1e-2,
            "anchor_below": 100,
        },
        (Method.SVDIFF, SubjectKind.EDIT): {
            "learning_rate": 5e-3,
            "norm_learning_rate": 3e-4,
            "ema_decay": 0.0,
        },
        # One word for all layers; by layer it learns as other methods' words do (docs/training.md).
        (Method.TEXTUAL_INVERSION, SubjectKind.SUBJECT): {"steps": 240, "identifier_learning_rate": 1e-3},
    }
)
_KINDS: Mapping[SubjectKind, Mapping[str, Any]] = MappingProxyType(
    {
        SubjectKind.SUBJECT: {"steps": 120, "identifier_learning_rate": 1e-2},
        SubjectKind.STYLE: {"steps": 150, "identifier_learning_rate": 3e-3},
        # One picture, which is wanted as it is: an anchor would keep the base's own detail.
        SubjectKind.EDIT: {
            "steps": 60,
            "batch_size": 2,
            "identifier_learning_rate": 0.0,
            "caption_dropout": 0.0,
            "anchor_below": 0,
        },
    }
)
# Half the paper's probability, whose 0.6 leaves too few whole pictures: on emoji-128 it halves what is learned of each
# subject. Weight and layers the paper does not give where we could read it; 20 keeps both from being learned
# (docs/training.md, two subjects in one job).
_SEVERAL: Mapping[str, Any] = MappingProxyType({"cut_mix_probability": 0.3, "unmix_weight": 1.0})


def check_identifier(identifier: str, tokenizer: Any, field: str = "identifier") -> int:
    """Return the token id of a word that can be learned.

    `tokenizer` is the base's. Raises InvalidArgument naming `field` unless the word is exactly one ordinary token.
    """
    ids: list[int] = tokenizer(identifier, add_special_tokens=False, verbose=False).input_ids
    if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
        raise InvalidArgument.for_field(
            field,
            f"{identifier[:80]!r} is {len(ids)} tokens of the base model's vocabulary; a learned word must be exactly "
            "one ordinary token, for example 'sks'",
        )
    return ids[0]


def method_defaults(
    method: Method, subject_kind: SubjectKind, subjects: int = 1, targets: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the settings of a job of this method, kind and number of subjects that gives none, or `targets` alone.

    Several subjects take as many times the steps, each as many as alone; SVDiff cuts and mixes them, other methods do
    when asked. DreamBooth's rate depends on its targets.
    """
    chosen = {**_COMMON, **_KINDS[subject_kind], **_METHODS[method], **_CHOSEN.get((method, subject_kind), {})}
    if targets is not None:
        chosen["targets"] = tuple(targets)
    if method is Method.DREAMBOOTH and chosen["targets"]:
        chosen["learning_rate"] = DREAMBOOTH_FEW_RATE
    chosen["steps"] *= max(1, subjects)
    if subjects > 1 and method is Method.SVDIFF:
        chosen |= _SEVERAL
    return chosen


def complete_spec(
    *,
    method: Method,
    subject_kind: SubjectKind,
    captions: Sequence[str],
    identifier: str,
    class_noun: str = "",
    learn_identifier: bool | None = None,
    identifier_init: Sequence[str] = (),
    sample_prompts: Sequence[str] = (),
    more_subjects: Sequence[Subject] = (),
    picture_subjects: Sequence[int] = (),
    picture_repeats: Sequence[int] = (),
    masked_pictures: Sequence[int] = (),
    **given: Any,
) -> TrainingSpec:
    """Check a request and fill in what it leaves open.

    `captions` has one entry per picture; an empty one becomes `a {identifier} {class_noun}` of the picture's subject.
    `learn_identifier` None means True; an edit learns none, and its one picture has a caption. `given` holds settings
    of TrainingSpec by name, None for those to be filled in. No sample prompt means the first caption. Raises
    InvalidArgument with every wrong field (`settings.steps`, `pictures[2].caption`, ...), what was given and what is
    allowed. Whether an identifier is one token needs the tokenizer: `check_identifier`.
    """
    edit = subject_kind is SubjectKind.EDIT
    learn = learn_identifier is not False and not edit
    first = Subject(identifier=identifier, class_noun=class_noun, identifier_init=tuple(identifier_init))
    subjects = (first, *more_subjects)
    shown = tuple(picture_subjects) or (0,) * len(captions)
    settings = {name: value for name, value in given.items() if value is not None}
    problems = check_settings(settings)
    chosen = _complete_settings(method, subject_kind, len(subjects), settings)
    if edit:
        problems += check_edit(method, captions, first, learn_identifier, bool(more_subjects) or any(shown))
    else:
        problems += check_subjects(subjects, shown)
        problems += check_pictures(captions, shown, subjects, picture_repeats)
    problems += check_prompts(sample_prompts)
    _refuse(problems)
    problems += check_together(method, chosen, subjects)
    problems += check_learning(method, learn, chosen["identifier_learning_rate"])
    filled = _fill_captions(captions, shown, subjects)
    _refuse(problems + (_check_words_stand(subjects, filled, shown) if learn else []))
    return TrainingSpec(
        method=method,
        subject_kind=subject_kind,
        captions=filled,
        identifier=identifier,
        class_noun=class_noun,
        learn_identifier=learn,
        identifier_init=first.identifier_init,
        sample_prompts=tuple(sample_prompts) or filled[:1],
        more_subjects=tuple(more_subjects),
        # What is the same for all is left out, so that such specs are equal.
        picture_subjects=shown if any(shown) else (),
        picture_repeats=tuple(picture_repeats) if any(times != 1 for times in picture_repeats) else (),
        masked_pictures=tuple(masked_pictures),
        **chosen,
    )


def with_targets(spec: TrainingSpec, targets: Sequence[str], given: Collection[str]) -> TrainingSpec:
    """Return a spec that trains `targets`, with the rate that belongs to them unless `given` names it as asked for."""
    chosen = method_defaults(spec.method, spec.subject_kind, len(spec.subjects), targets)
    rate = spec.learning_rate if "learning_rate" in given else chosen["learning_rate"]
    return replace(spec, targets=chosen["targets"], learning_rate=rate)


def _fill_captions(captions: Sequence[str], shown: Sequence[int], subjects: Sequence[Subject]) -> tuple[str, ...]:
    return tuple(
        caption if caption.strip() else f"a {subjects[of].identifier} {subjects[of].class_noun}"
        for caption, of in zip(captions, shown, strict=True)
    )


def _refuse(problems: list[FieldViolation]) -> None:
    if problems:
        text = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
        raise InvalidArgument(Reason.INVALID_FIELD, text, violations=problems)


def _complete_settings(
    method: Method, subject_kind: SubjectKind, subjects: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = {**method_defaults(method, subject_kind, subjects, given.get("targets")), **given}
    chosen |= {name: tuple(chosen[name]) for name in LISTS}
    known = {name: kind for name, kind in CHOICES.items() if chosen[name] in list(kind)}
    chosen |= {name: kind(chosen[name]) for name, kind in known.items()}
    if method is Method.TEXTUAL_INVERSION and chosen["per_layer"]:
        chosen |= {name: value for name, value in _KINDS[subject_kind].items() if name not in given}
    if method is Method.LORA and "alpha" not in given:
        chosen["alpha"] = float(chosen["rank"])
    if chosen["cut_mix_probability"] == 0 and "unmix_weight" not in given:
        chosen["unmix_weight"] = 0.0
    return chosen


def _check_words_stand(
    subjects: Sequence[Subject], captions: Sequence[str], shown: Sequence[int]
) -> list[FieldViolation]:
    problems: list[FieldViolation] = []
    for number, subject in enumerate(subjects):
        own = [caption.lower() for caption, of in zip(captions, shown, strict=True) if of == number]
        if not any(subject.identifier.lower() in caption for caption in own):
            problems.append(
                FieldViolation(
                    f"{subject_path(number)}identifier",
                    f"{subject.identifier!r} stands in no caption, so it cannot be learned; write it into the "
                    "captions, leave them empty, or set learn_identifier to false",
                )
            )
    return problems

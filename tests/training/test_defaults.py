"""Defaults are complete, requests are checked field by field."""

import json
from typing import Any

import pytest

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.training.checks import RANGES
from hueshift.training.defaults import (
    DREAMBOOTH_FEW_RATE,
    LORA_TARGETS,
    check_identifier,
    complete_spec,
    method_defaults,
    with_targets,
)
from hueshift.training.spec import LoraInit, Method, Precision, RateSchedule, Subject, SubjectKind, TrainingSpec

BALL = Subject(identifier="idk", class_noun="ball")
PAIR: dict[str, Any] = {"captions": ("", ""), "more_subjects": (BALL,), "picture_subjects": (0, 1)}


def complete(**changes: Any) -> TrainingSpec:
    request: dict[str, Any] = {
        "method": Method.SVDIFF,
        "subject_kind": SubjectKind.SUBJECT,
        "captions": ("a sks animal",),
        "identifier": "sks",
        "class_noun": "animal",
    }
    return complete_spec(**{**request, **changes})


@pytest.mark.parametrize("kind", SubjectKind)
@pytest.mark.parametrize("method", Method)
def test_defaults_are_complete_and_allowed(method: Method, kind: SubjectKind) -> None:
    edit = {"identifier": "", "captions": ("a fox",)} if kind is SubjectKind.EDIT else {}
    if edit and method is Method.TEXTUAL_INVERSION:
        pytest.skip("an edit learns no word")
    spec = complete(method=method, subject_kind=kind, **edit)
    assert spec.to_json().items() >= method_defaults(method, kind).items()
    for name, numbers in RANGES.items():
        assert numbers.problem(getattr(spec, name)) is None, name


def test_a_spec_survives_the_job_table() -> None:
    spec = complete(identifier_init=("noto",), sample_prompts=("a sks animal on a hill",), seed=2**64 - 1)
    assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_of_two_subjects_survives_too_and_so_does_one_of_before() -> None:
    spec = complete(**PAIR, rate_schedule="cosine", unmix_layers=["up_blocks"], picture_repeats=[2, 1])
    assert spec.captions == ("a sks animal", "a idk ball")
    assert (spec.rate_schedule, spec.subject_of(1), spec.subjects[1]) == (RateSchedule.COSINE, 1, BALL)
    data = json.loads(json.dumps(spec.to_json()))
    assert TrainingSpec.from_json(data) == spec
    old = complete(method=Method.RESIDUALS)
    known = ("caption_dropout", "mirror", "anchor_below", "ema_decay", "min_snr_gamma", "sample_prompts")
    required = [*list(old.to_json())[: list(old.to_json()).index("sample_prompts")], *known]
    assert TrainingSpec.from_json({name: json.loads(json.dumps(old.to_json()))[name] for name in required}) == old


def test_settings_that_belong_together_are_filled_in_together() -> None:
    whole, few = (complete(method=Method.DREAMBOOTH, targets=targets) for targets in (None, ["proj_out"]))
    assert (whole.learning_rate, few.learning_rate) == (1e-4, DREAMBOOTH_FEW_RATE)
    # Also when they become known later.
    asked = complete(method=Method.DREAMBOOTH, learning_rate=1e-5)
    filled = [with_targets(whole, ["proj_out"], ()), with_targets(asked, ["proj_out"], {"learning_rate"})]
    assert [(spec.targets, spec.learning_rate) for spec in filled] == [
        (("proj_out",), DREAMBOOTH_FEW_RATE),
        (("proj_out",), 1e-5),
    ]
    assert with_targets(few, [], ()) == whole
    assert with_targets(complete(method=Method.LORA), ["to_q"], ()).learning_rate == 3e-3
    words = [complete(method=Method.TEXTUAL_INVERSION, per_layer=by_layer) for by_layer in (False, True)]
    assert [(spec.steps, spec.identifier_learning_rate) for spec in words] == [(240, 1e-3), (120, 1e-2)]
    slower = complete(method=Method.TEXTUAL_INVERSION, per_layer=True, steps=70, identifier_learning_rate=2e-3)
    assert (slower.steps, slower.identifier_learning_rate) == (70, 2e-3)
    lora = complete(method=Method.LORA, rank=16)
    assert (lora.rank, lora.alpha, lora.targets) == (16, 16.0, LORA_TARGETS)
    assert complete(method=Method.LORA, alpha=4.0).alpha == 4.0
    # Whole changes of every layer are learned at the rate of every layer, and never by default.
    dense = complete(method=Method.DREAMBOOTH, rank=0)
    assert (dense.rank, dense.targets, dense.learning_rate) == (0, (), 1e-4)
    assert complete(method=Method.DREAMBOOTH).rank == 16
    pissa = complete(method=Method.LORA, lora_init="pissa", precision=Precision.FP32)
    assert (pissa.lora_init, pissa.precision) == (LoraInit.PISSA, Precision.FP32)
    pair = complete(**PAIR)
    assert (pair.cut_mix_probability, pair.unmix_weight, pair.steps) == (0.3, 1.0, 240)
    apart = complete(**PAIR, cut_mix_probability=0.0)
    assert (apart.cut_mix_probability, apart.unmix_weight) == (0.0, 0.0)
    assert complete(**PAIR, method=Method.LORA).cut_mix_probability == 0


def test_what_is_the_same_for_all_pictures_is_not_written_down() -> None:
    plain = complete(captions=("", ""))
    assert complete(captions=("", ""), picture_subjects=(0, 0), picture_repeats=(1, 1)) == plain
    assert (plain.picture_subjects, plain.picture_repeats) == ((), ())


def test_what_is_left_open_is_filled_in() -> None:
    spec = complete(captions=("", "a flat emoji of a sks animal"), steps=None, learning_rate=0.5)
    assert spec.captions == ("a sks animal", "a flat emoji of a sks animal")
    assert spec.sample_prompts == ("a sks animal",)
    assert spec.learn_identifier
    assert spec.learning_rate == 0.5
    assert spec.steps == method_defaults(Method.SVDIFF, SubjectKind.SUBJECT)["steps"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "settings.steps"),
        ({"steps": 5001}, "settings.steps"),
        ({"steps": 2.5}, "settings.steps"),
        ({"steps": True}, "settings.steps"),
        ({"batch_size": 17}, "settings.batch_size"),
        ({"learning_rate": 0.0}, "settings.learning_rate"),
        ({"learning_rate": float("nan")}, "settings.learning_rate"),
        ({"learning_rate": float("inf")}, "settings.learning_rate"),
        ({"identifier_learning_rate": -1e-9}, "settings.identifier_learning_rate"),
        ({"seed": 2**64}, "settings.seed"),
        ({"seed": -1}, "settings.seed"),
        ({"prior_weight": 101.0}, "settings.prior_weight"),
        ({"prior_images": 201}, "settings.prior_images"),
        ({"checkpoint_interval": 0}, "settings.checkpoint_interval"),
        ({"sample_interval": -1}, "settings.sample_interval"),
        ({"typo": 1}, "settings.typo"),
        ({"identifier": ""}, "identifier"),
        ({"identifier": "two words"}, "identifier"),
        ({"captions": ("a cat",)}, "identifier"),
        ({"captions": ()}, "pictures"),
        ({"captions": ("a sks cat",) * 65}, "pictures"),
        ({"captions": ("a sks animal", ""), "class_noun": ""}, "pictures[1].caption"),
        ({"captions": ("a sks animal", "x" * 401)}, "pictures[1].caption"),
        ({"class_noun": "", "prior_weight": 1.0}, "class_noun"),
        ({"class_noun": "n" * 65}, "class_noun"),
        # What adapter files refuse, so that no job ends with one that nobody can read.
        ({"class_noun": "animal "}, "class_noun"),
        ({"class_noun": "ani\x00mal"}, "class_noun"),
        ({"identifier": "s\x00ks", "learn_identifier": False}, "identifier"),
        ({"identifier": "\u202esks", "learn_identifier": False}, "identifier"),
        ({"identifier_init": ("a", " ")}, "identifier_init[1]"),
        ({"sample_prompts": ("a",) * 5}, "sample_prompts"),
        ({"rate_schedule": "wild"}, "settings.rate_schedule"),
        ({"precision": "fp16"}, "settings.precision"),
        ({"mirror": 1}, "settings.mirror"),
        ({"gradient_accumulation": 0}, "settings.gradient_accumulation"),
        ({"cut_mix_probability": 1.0}, "settings.cut_mix_probability"),
        ({"cut_mix_probability": 0.6}, "settings.cut_mix_probability"),
        ({"unmix_weight": 1.0}, "settings.unmix_weight"),
        ({"targets": ("to_q",)}, "settings.targets"),
        ({"method": Method.LORA, "targets": ("",)}, "settings.targets"),
        ({"method": Method.LORA, "targets": ()}, "settings.targets"),
        ({"method": Method.LORA, "rank": 0, "alpha": 1.0}, "settings.rank"),
        ({"method": Method.LORA, "alpha": 0.0}, "settings.alpha"),
        ({"method": Method.DREAMBOOTH, "rank": -1}, "settings.rank"),
        ({"method": Method.DREAMBOOTH, "rank": 129}, "settings.rank"),
        ({"method": Method.TEXTUAL_INVERSION, "learn_identifier": False}, "learn_identifier"),
        (
            {"method": Method.TEXTUAL_INVERSION, "identifier_learning_rate": 0.0},
            "settings.identifier_learning_rate",
        ),
        ({"picture_repeats": (101,)}, "pictures[0].repeats"),
        ({"picture_subjects": (1,)}, "pictures[0].subject"),
        ({"more_subjects": (BALL,)}, "pictures"),
        ({**PAIR, "more_subjects": (Subject(identifier="SKS", class_noun="x"),)}, "more_subjects[0].identifier"),
        ({**PAIR, "more_subjects": (Subject(identifier="a b", class_noun="x"),)}, "more_subjects[0].identifier"),
        ({**PAIR, "more_subjects": (Subject(identifier="idk", class_noun=""),)}, "pictures[1].caption"),
        ({**PAIR, "captions": ("", "a sks ball")}, "more_subjects[0].identifier"),
        (
            {**PAIR, "more_subjects": (Subject(identifier="idk", class_noun="x", identifier_init=(" ",)),)},
            "more_subjects[0].identifier_init[0]",
        ),
        (
            {
                **PAIR,
                "captions": ("", "a idk"),
                "more_subjects": (Subject(identifier="idk", class_noun=""),),
                "prior_weight": 1.0,
            },
            "more_subjects[0].class_noun",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_was_given(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        complete(**changes)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument, match="allowed: whole numbers 1 to 16") as caught:
        complete(steps=0, batch_size=99, identifier="")
    assert {v.field for v in caught.value.violations} == {"settings.steps", "settings.batch_size", "identifier"}


def test_a_caption_without_the_word_is_fine_when_nothing_is_learned_for_it() -> None:
    assert not complete(captions=("a cat",), learn_identifier=False).learn_identifier


def test_an_identifier_is_one_ordinary_token(base_model: BaseModel) -> None:
    token = check_identifier("sks", base_model.tokenizer)
    assert base_model.tokenizer.decode([token]).strip() == "sks"
    for word in ("zzyzxqwv", "", "<|endoftext|>"):
        with pytest.raises(InvalidArgument, match="exactly one") as caught:
            check_identifier(word, base_model.tokenizer, "spec.identifier")
        assert caught.value.violations[0].field == "spec.identifier"

"""Jobs of one picture and its prompt: what they refuse, what they make, and the errors they end with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Recorder, make_pictures

from hueshift.adapters.errors import Cancelled, InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.picture_start import inversion_error
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.defaults import complete_spec
from hueshift.training.editing import INVERSION_STEPS, measure_inversion
from hueshift.training.methods.make import make_learnable
from hueshift.training.pictures import picture_tensor
from hueshift.training.run import run_training
from hueshift.training.samples import RowsEngine, Sampler
from hueshift.training.spec import Method, Subject, SubjectKind, TrainingSpec
from hueshift.training.unet import make_unet

Tiny = tuple[BaseModel, SpectralFactors]
PROMPT = "a red fox"


def edit(**given: Any) -> TrainingSpec:
    request: dict[str, Any] = {
        "method": Method.SVDIFF,
        "subject_kind": SubjectKind.EDIT,
        "captions": (PROMPT,),
        "identifier": "",
    }
    return complete_spec(**{**request, **given})


def test_an_edit_learns_no_word_and_nothing_but_its_picture() -> None:
    spec = edit()
    assert (spec.identifier, spec.learn_identifier, spec.captions) == ("", False, (PROMPT,))
    assert (spec.prior_weight, spec.anchor_below, spec.sample_prompts) == (0.0, 0, (PROMPT,))
    assert TrainingSpec.from_json(spec.to_json()) == spec
    assert edit(learn_identifier=False, picture_subjects=[0], class_noun="fox", prior_weight=1.0).class_noun == "fox"


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"captions": (PROMPT, PROMPT)}, {"pictures"}),
        ({"captions": ()}, {"pictures"}),
        ({"captions": ("",), "class_noun": "fox"}, {"pictures[0].caption"}),
        ({"captions": ("x" * 401,)}, {"pictures[0].caption"}),
        (
            {"identifier": "sks", "learn_identifier": True, "identifier_init": ["fox"]},
            {
                "identifier",
                "learn_identifier",
                "identifier_init",
            },
        ),
        ({"more_subjects": [Subject(identifier="idk", class_noun="ball")]}, {"more_subjects"}),
        ({"picture_subjects": [1]}, {"more_subjects"}),
        ({"class_noun": "x" * 65}, {"class_noun"}),
        ({"method": Method.TEXTUAL_INVERSION}, {"method"}),
        ({"steps": 0, "captions": ("",)}, {"settings.steps", "pictures[0].caption"}),
        ({"prior_weight": 1.0}, {"class_noun"}),
    ],
)
def test_wrong_fields_are_named(given: dict[str, Any], wrong: set[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        edit(**given)
    assert {violation.field for violation in caught.value.violations} == wrong


def test_a_run_ends_with_the_errors_before_and_after(tiny: Tiny, tmp_path: Path) -> None:
    base, factors = tiny
    spec = edit(steps=4, batch_size=2, checkpoint_interval=4)
    pictures = make_pictures(1)
    result = run_training(spec, pictures, base=base, factors=factors, clip=None, workdir=tmp_path, hooks=Recorder())
    assert result.adapter.identifier == ""
    assert result.adapter.tokens == {}
    assert result.adapter.spectral
    assert result.inversion is not None
    learnable = make_learnable(spec, base, factors)
    unet = make_unet(base, factors, learnable, spec)
    # Encoded alone, as the base sees it: the same number by the engine's own function.
    clean = VaeStage(base).moments(picture_tensor(pictures[0], base.pixels)[None])[0][0]
    text = TextStage(base)
    context = text.encode([PROMPT], {}).context
    expected = inversion_error(
        RowsEngine(unet, learnable.base_rows()),
        [clean],
        base.schedule,
        cross=CrossInputs((context,)),
        steps=INVERSION_STEPS,
        needs_factored=True,
    )
    assert result.inversion.base == pytest.approx(expected, rel=1e-3)
    assert result.inversion.tuned != result.inversion.base
    subject = complete_spec(
        method=Method.SVDIFF, subject_kind=SubjectKind.SUBJECT, captions=["a sks fox"], identifier="sks", steps=1
    )
    plain = run_training(
        subject, pictures, base=base, factors=factors, clip=None, workdir=tmp_path / "b", hooks=Recorder()
    )
    assert plain.inversion is None


def test_measuring_can_be_stopped(tiny: Tiny) -> None:
    base, factors = tiny
    learnable = make_learnable(edit(), base, factors)
    unet = make_unet(base, factors, learnable, edit())

    def stop() -> None:
        raise Cancelled(Reason.CANCELLED, "asked to stop")

    sampler = Sampler(base, unet, VaeStage(base), TextStage(base).empty, stop)
    nothing = (torch.zeros(77, 4), learnable.base_rows())
    with pytest.raises(Cancelled):
        measure_inversion(sampler, torch.zeros(4, 8, 8), nothing, nothing)

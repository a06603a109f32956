"""One copy of the factors for all jobs of a worker: the same bits, the same memory, and given back when needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import CAPTIONS, Recorder, make_pictures, make_spec
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.held_factors import HeldFactors
from hueshift.training.methods.make import make_learnable
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.unet import TrainingUNet, make_unet

Tiny = tuple[BaseModel, SpectralFactors]


def run_held(
    tiny: Tiny, spec: TrainingSpec, folder: Path, held: HeldFactors | None, hooks: Recorder | None = None
) -> TrainingResult:
    """A whole job on the tiny base."""
    folder.mkdir()
    return run_training(
        spec,
        make_pictures(len(CAPTIONS)),
        base=tiny[0],
        factors=tiny[1],
        clip=None,
        workdir=folder,
        hooks=hooks or Recorder(),
        held=held,
    )


def new_unet(tiny: Tiny, held: HeldFactors | None, **given: Any) -> TrainingUNet:
    """The UNet of a job."""
    spec = make_spec(**given)
    return make_unet(*tiny, make_learnable(spec, *tiny), spec, held)


def factors_of(unet: TrainingUNet) -> dict[str, Tensor]:
    """The weights that are parts of factors."""
    return {name: part for name, part in unet._unet.named_parameters() if name.endswith((".u", ".vh"))}


def run_out(times: int) -> tuple[Recorder, list[int]]:
    """Hooks of a job that finds no memory in its fourth step, so many times; and the steps at which it was so."""
    failed: list[int] = []

    def fail(name: str, done: int) -> None:
        if name == "mid-step" and done == 3 and len(failed) < times:
            failed.append(done)
            raise torch.OutOfMemoryError("no room")

    return Recorder(on_point=fail), failed


def test_unets_have_their_weights_in_common_and_the_bits_of_one_without(tiny: Tiny) -> None:
    held = HeldFactors(*tiny)
    plain, first, second = (factors_of(new_unet(tiny, kept)) for kept in (None, held, held))
    assert plain.keys() == first.keys()
    assert any(part.dim() == 4 and part.shape[-1] == 3 for part in first.values())
    for name, part in plain.items():
        assert first[name].data_ptr() == second[name].data_ptr()
        assert torch.equal(first[name], part)
        assert first[name].stride() == part.stride()
    assert new_unet(tiny, held, method=Method.LORA).held is None


def test_a_job_on_held_factors_has_the_bits_of_one_without(tiny: Tiny, tmp_path: Path) -> None:
    spec, held = make_spec(steps=3), HeldFactors(*tiny)
    plain = run_held(tiny, spec, tmp_path / "plain", None)
    for name in ("first", "second"):
        assert run_held(tiny, spec, tmp_path / name, held).losses == plain.losses
    assert held.release()


def test_what_a_unet_works_with_is_not_given_back(tiny: Tiny) -> None:
    held = HeldFactors(*tiny)
    assert not held.release()
    unet = new_unet(tiny, held)
    copy = held.take(torch.float32)
    other = held.take(torch.bfloat16)
    # Of the two it keeps the last, and finds the first with its UNet.
    assert held.take(torch.float32) is copy
    assert held.take(torch.bfloat16) is other
    del other
    assert held.release()
    assert held.take(torch.float32) is copy
    del copy
    assert not held.release()
    del unet
    assert held.release()
    assert not held.release()


def lora_after_svdiff(held: HeldFactors) -> Method:
    held.take(torch.float32)
    return Method.LORA


def svdiff_itself(held: HeldFactors) -> Method:
    return Method.SVDIFF


@pytest.mark.parametrize(
    ("before", "times", "ends"),
    [(lora_after_svdiff, 1, True), (lora_after_svdiff, 2, False), (svdiff_itself, 1, False)],
    ids=["goes on", "once only", "in use"],
)
def test_a_job_without_memory_goes_on_when_there_is_some_to_give_back(
    tiny: Tiny, tmp_path: Path, before: Callable[[HeldFactors], Method], times: int, ends: bool
) -> None:
    held = HeldFactors(*tiny)
    spec = make_spec(before(held))
    hooks, failed = run_out(times)
    if not ends:
        with pytest.raises(torch.OutOfMemoryError):
            run_held(tiny, spec, tmp_path / "job", held, hooks)
        assert len(failed) == times
        return
    result = run_held(tiny, spec, tmp_path / "job", held, hooks)
    assert result.losses == run_held(tiny, spec, tmp_path / "undisturbed", None).losses
    # From the checkpoint of step 2.
    assert hooks.steps == [1, 2, 3, 3, 4, 5, 6]
    assert not held.release()

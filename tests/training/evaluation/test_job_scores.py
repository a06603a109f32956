"""What a job's record says of the prior and of diversity, from training to the client."""

from pathlib import Path
from typing import Any

import pytest
from tiny_training import Recorder, make_pictures, make_spec

from hueshift.client.jobs import read_job
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.evaluation.protocol import Judges
from hueshift.training.run import run_training
from hueshift.training.scores import Scores
from hueshift.v1 import finetune_pb2 as pb


def train(tiny: tuple[BaseModel, SpectralFactors], judges: Judges, folder: Path, **given: Any) -> Scores:
    base, factors = tiny
    result = run_training(
        make_spec(**given),
        make_pictures(),
        base=base,
        factors=factors,
        clip=judges.clip,
        workdir=folder,
        hooks=Recorder(),
    )
    assert result.scores is not None
    return result.scores


def test_a_job_that_learns_nothing_keeps_the_prior_and_one_that_learns_wildly_does_not(
    tiny: tuple[BaseModel, SpectralFactors], judges: Judges, tmp_path: Path
) -> None:
    still = train(tiny, judges, tmp_path / "still", steps=1, learning_rate=1e-12, norm_learning_rate=0.0)
    wild = train(tiny, judges, tmp_path / "wild", steps=3, learning_rate=1.0)
    assert still.prior_kept == pytest.approx(1, abs=1e-3)
    assert wild.prior_kept is not None
    assert wild.prior_kept < 0.99
    assert still.diversity is not None
    assert 0 < still.diversity < 1


def test_prompts_drawn_once_have_no_diversity(
    tiny: tuple[BaseModel, SpectralFactors], judges: Judges, tmp_path: Path
) -> None:
    prompts = [f"a {colour} sks animal" for colour in ("red", "blue", "green", "black")]
    assert train(tiny, judges, tmp_path, steps=1, sample_prompts=prompts).diversity is None


def test_the_client_reads_what_was_measured_and_nothing_else() -> None:
    scores = pb.FineTuneScores(clip_i=0.5, clip_t=0.25, clip_i_base=0.125, prior_kept=0.75)
    job = read_job(pb.FineTune(name="tenants/t/fineTunes/j", scores=scores))
    assert job.scores is not None
    assert (job.scores.prior_kept, job.scores.diversity) == (0.75, None)

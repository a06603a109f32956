"""What a worker keeps between its jobs."""

from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_training import Recorder, make_pictures, make_spec, make_tiny_base

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.server.base_trainer import BaseTrainer
from hueshift.server.job_run import JobRun
from hueshift.training.cost import open_speeds
from hueshift.training.held_factors import HeldFactors
from hueshift.training.sharing.shared_training import SharedTraining


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "sharing"])
def test_jobs_one_after_another_have_one_copy_of_the_factors(
    base_model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    uploads: list[torch.dtype] = []
    upload = HeldFactors._upload

    def counted(self: HeldFactors, dtype: torch.dtype) -> SpectralFactors:
        uploads.append(dtype)
        return upload(self, dtype)

    monkeypatch.setattr(HeldFactors, "_upload", counted)
    base, factors = make_tiny_base(base_model)
    held = HeldFactors(base, factors)
    sharing = SharedTraining(base, factors, held=held) if shares else None
    trainer = BaseTrainer(base, factors, None, tmp_path, open_speeds(tmp_path), sharing, held)
    for number in range(2):
        work = tmp_path / str(number)
        work.mkdir()
        # The hooks of training are all that it asks of a run.
        trainer.train(make_spec(steps=1, seed=number), make_pictures(), {}, work, cast(JobRun, Recorder()))
    assert uploads == [torch.float32]
    assert held.release()

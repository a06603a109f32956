"""Jobs that ask for nothing new train to the same bits as the plain loop that the trainer began as."""

from pathlib import Path

import pytest
import torch
from plain_training import PlainTraining
from tiny_training import Recorder, make_pictures, make_spec

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.run import run_training
from hueshift.training.spec import Method


@pytest.mark.parametrize("method", [Method.SVDIFF, Method.RESIDUALS])
def test_default_jobs_keep_their_bits(tiny: tuple[BaseModel, SpectralFactors], method: Method, tmp_path: Path) -> None:
    base, factors = tiny
    spec = make_spec(method)
    plain = PlainTraining(base, factors, spec, make_pictures())
    values = plain.run()
    result = run_training(
        spec, make_pictures(), base=base, factors=factors, clip=None, workdir=tmp_path, hooks=Recorder()
    )
    assert result.losses == tuple(plain.losses)
    assert torch.equal(result.adapter.tokens["sks"][0], values["identifier"])
    if method is Method.SVDIFF:
        shifts = [*result.adapter.spectral.values(), *result.adapter.norm.values()]
        assert torch.equal(torch.cat(shifts), torch.cat([values["sigma"], values["norm"]]))
    for name, parts in result.adapter.lowrank.items():
        assert parts.scale == 1
        assert torch.equal(parts.a, values[f"a/{name}"])
        assert torch.equal(parts.b, values[f"b/{name}"])

"""Whole jobs in threads that take their steps together: the same results as alone, whatever the neighbours do."""

import gc
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Recorder, make_spec, run_job
from torch import Tensor

from hueshift.adapters.errors import Cancelled, HueshiftError, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.make import make_learnable
from hueshift.training.run import TrainingResult
from hueshift.training.sharing.family import family_of
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import Method, TrainingSpec

Tiny = tuple[BaseModel, SpectralFactors]
FP32: dict[str, Any] = {"precision": "fp32", "steps": 20, "checkpoint_interval": 8}
PATIENCE = 20.0
LIMIT = 120.0


def run_together(
    tiny: Tiny,
    jobs: Mapping[str, TrainingSpec],
    folder: Path,
    sharing: SharedTraining,
    hooks: Mapping[str, Recorder] | None = None,
) -> dict[str, TrainingResult | BaseException]:
    """Run every job in a thread of its own; return results and what was raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures: dict[str, Future[TrainingResult]] = {
            name: pool.submit(run_job, tiny, spec, folder / name, (hooks or {}).get(name), sharing)
            for name, spec in jobs.items()
        }
        ended = {name: future.exception(LIMIT) for name, future in futures.items()}
    return {name: ended[name] or futures[name].result() for name in jobs}


def learned(result: TrainingResult | BaseException) -> Tensor:
    """Everything that was learned, flat."""
    assert isinstance(result, TrainingResult), result
    adapter = result.adapter
    parts: list[Tensor] = [*adapter.spectral.values(), *adapter.norm.values(), *adapter.kv.values()]
    # Products, because A and B of a layer are not unique.
    parts += [factors.b @ factors.a for factors in adapter.lowrank.values()]
    return torch.cat([part.flatten() for part in parts] + [token.flatten() for token in adapter.tokens.values()])


def assert_same(shared: TrainingResult | BaseException, own: TrainingResult) -> None:
    """Every loss and everything learned, but for the rounding of sums in another order."""
    assert isinstance(shared, TrainingResult), shared
    # 2.3e-7 and 2.2e-5 were the most seen over 20 steps: Adam makes full steps of gradients that are rounding alone.
    assert shared.losses == pytest.approx(own.losses, rel=1e-5)
    values = learned(own)
    assert float((learned(shared) - values).norm() / values.norm()) < 1e-3


def test_jobs_learn_the_same_together_as_alone(tiny: Tiny, tmp_path: Path) -> None:
    jobs = {
        "two-batches": make_spec(**FP32, seed=8, batch_size=1, gradient_accumulation=2),
        "with-pictures": make_spec(**FP32, seed=9, batch_size=3, sample_interval=9),
    }
    sharing = SharedTraining(*tiny, patience=PATIENCE)
    together = run_together(tiny, jobs, tmp_path, sharing)
    # 40 of one and 20 of the other, less those taken alone before, after, and while the other draws its pictures.
    assert sharing.rounds[2] >= 8
    for name, spec in jobs.items():
        assert_same(together[name], run_job(tiny, spec, tmp_path / f"{name}-alone"))


class _Killed(BaseException):
    """Stands for the end of a job's thread."""


def test_what_happens_to_a_neighbour_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    short = {**FP32, "steps": 8, "checkpoint_interval": 3}

    def die(name: str, done: int) -> None:
        if done == 2:
            raise _Killed

    jobs = {
        "well": make_spec(Method.LORA, **short),
        "cancelled": make_spec(Method.LORA, **short, seed=8),
        "killed": make_spec(Method.LORA, **short, seed=9),
        "diverging": replace(make_spec(Method.LORA, **short, seed=10), learning_rate=1e30, warmup_steps=0),
    }
    hooks = {"cancelled": Recorder(stop_at=4), "killed": Recorder(on_point=die)}
    ended = run_together(tiny, jobs, tmp_path, SharedTraining(*tiny, patience=PATIENCE), hooks)
    assert isinstance(ended["cancelled"], Cancelled)
    assert isinstance(ended["killed"], _Killed)
    diverged = ended["diverging"]
    assert isinstance(diverged, HueshiftError)
    assert diverged.reason is Reason.TRAINING_DIVERGED
    assert_same(ended["well"], run_job(tiny, jobs["well"], tmp_path / "own"))
    # Both go on from their checkpoints, now with each other: from the one made when asked to stop, and from step 0.
    again = {name: Recorder() for name in ("cancelled", "killed")}
    left = {name: jobs[name] for name in again}
    resumed = run_together(tiny, left, tmp_path, SharedTraining(*tiny, patience=PATIENCE), again)
    assert (again["cancelled"].steps[0], again["killed"].steps[0]) == (5, 1)
    for name, spec in left.items():
        assert_same(resumed[name], run_job(tiny, spec, tmp_path / f"{name}-own"))


@pytest.mark.parametrize("method", [Method.SVDIFF, Method.CUSTOM_DIFFUSION])
def test_without_company_and_in_methods_that_do_not_share_the_bits_stay(
    tiny: Tiny, method: Method, tmp_path: Path
) -> None:
    spec = make_spec(method, steps=3)
    sharing = SharedTraining(*tiny)
    shared, own = run_job(tiny, spec, tmp_path / "a", sharing=sharing), run_job(tiny, spec, tmp_path / "b")
    assert shared.losses == own.losses
    assert torch.equal(learned(shared), learned(own))
    assert sharing.rounds == ({1: 3} if family_of(spec) else {})


def test_a_family_has_what_rows_and_contexts_must_have_in_common() -> None:
    base = make_spec()
    assert family_of(base) == family_of(make_spec(seed=9, batch_size=1, steps=3, learning_rate=0.5))
    assert family_of(base) != family_of(make_spec(gradient_checkpointing=True))
    assert family_of(base) != family_of(make_spec(precision="fp32"))
    lora = [make_spec(Method.LORA, rank=rank) for rank in (2, 4)]
    assert family_of(lora[0]) != family_of(lora[1])
    assert family_of(lora[0]) == family_of(make_spec(Method.LORA, rank=2, alpha=3.0))
    assert family_of(make_spec(Method.DREAMBOOTH)) is None


def test_a_familys_unet_goes_with_its_last_job(tiny: Tiny) -> None:
    sharing = SharedTraining(*tiny)
    spec = make_spec()
    learnable = make_learnable(spec, *tiny)
    first, second = sharing.join(spec, learnable), sharing.join(spec, learnable)
    assert first[0] is second[0]
    alive = weakref.ref(first[1]._company)  # type: ignore[attr-defined]  # what both steppers hold
    del first, second
    gc.collect()
    assert alive() is None

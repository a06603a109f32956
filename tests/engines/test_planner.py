"""What the cost model is told of samples, and what the planner does with its answers."""

import pytest
import torch
from fake_clock import FakeClock
from merging_engine import MergingFakeEngine
from structlog.testing import capture_logs

from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.cost_model import CostTable, Member
from hueshift.engines.denoise import Region, Sample, start_sample
from hueshift.engines.interface import BASE_SLOT, EngineRow, Plan
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.planner import Planner, members_of
from hueshift.engines.samplers import SamplerKind, make_table

SCHEDULE = NoiseSchedule.from_config({"steps_offset": 1, "set_alpha_to_one": False})
SIZE = (8, 8)
TABLE = CostTable(
    {(Plan.DENSE, 2, SIZE): 10.0, (Plan.FACTORED, 2, SIZE): 13.0, (Plan.MERGED, 2, SIZE): 10.0}, merge_ms=5.0
)
CROSS = CrossInputs((torch.zeros(2, 3, 4),))


def make_sample(slot: int, *, factored: bool = True, **given: object) -> Sample:
    """A guided sample of ten steps."""
    table = make_table(SCHEDULE, SamplerKind.DDIM, 10)
    return start_sample(
        slot, (4, *SIZE), cross=CROSS, guidance=5.0, table=table, slot=slot, needs_factored=factored, **given,  # type: ignore[arg-type]
    )  # fmt: skip


def make_planner(weight_slots: int = 2) -> tuple[Planner, MergingFakeEngine]:
    """A planner and its engine, whose slots hold spectral rows."""
    engine = MergingFakeEngine(TABLE, FakeClock(), weight_slots=weight_slots)
    for slot in range(1, 6):
        engine.load_row(slot, EngineRow(spectral=torch.ones(3)))
    return Planner(engine, TABLE), engine


def test_members_tell_what_a_sample_needs() -> None:
    _, engine = make_planner()
    leader = make_sample(1, factored=False)
    follower = make_sample(2, factored=False, reference=leader)
    confined = make_sample(3, lag=torch.ones(3))
    parted = make_sample(4, regions=(Region(torch.ones(SIZE), CROSS, slot=5),))
    plain = make_sample(BASE_SLOT, factored=False)
    plain.step = 4
    assert members_of(engine, [leader, follower, confined, parted, plain]) == [
        # Both must be in the same call, which only the full plan makes.
        Member(1, 2, Plan.FULL, 10, mergeable=False),
        Member(2, 2, Plan.FULL, 10, mergeable=False),
        Member(3, 2, Plan.FULL, 10, mergeable=False),
        # Its region reads another slot, and merged weights have one.
        Member(4, 4, Plan.FACTORED, 10, mergeable=False),
        Member(BASE_SLOT, 2, Plan.DENSE, 6),
    ]


def test_a_merge_begins_beside_the_steps_and_is_used_once_it_is_there() -> None:
    planner, engine = make_planner()
    sample = make_sample(1)
    index = torch.full((2,), 1)
    for expected in (Plan.FACTORED, Plan.FACTORED, Plan.MERGED):
        decision = planner.decide([sample], {})
        assert [run.plan for run in decision.runs] == [expected]
        engine.denoise(expected, torch.zeros(2, 4, *SIZE), torch.zeros(2), torch.zeros(2, 3, 4), index)
    assert engine.merges == [1]


def test_a_merge_that_fails_is_the_last_and_ends_no_picture() -> None:
    planner, engine = make_planner()

    def fail(slot: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    engine.merge = fail  # type: ignore[method-assign]
    with capture_logs() as logs:
        plans = [planner.decide([make_sample(1)], {}).runs[0].plan for _ in range(3)]
    assert plans == [Plan.FACTORED] * 3
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["merging_given_up"]


def test_a_device_lost_in_a_merge_is_told() -> None:
    planner, engine = make_planner()

    def lose(slot: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    engine.merge = lose  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="launch failure"):
        planner.decide([make_sample(1)], {})


def test_weights_that_a_step_reads_never_make_room() -> None:
    planner, engine = make_planner()
    for slot in (1, 2):
        engine.merge(slot)
        engine._pending.clear()
        engine._ready.append(slot)
    # Slot 1 was merged first, but it is what this step reads: slot 2 must make room for slot 3.
    decision = planner.decide([make_sample(1), make_sample(3)], {})
    assert {run.plan for run in decision.runs} == {Plan.MERGED, Plan.FACTORED}
    assert (set(decision.style.merged), decision.merge) == ({1}, 3)
    assert 1 in engine.merged
    assert 2 not in engine.merged
    assert engine.merging == {3}

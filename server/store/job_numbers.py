"""How the job table stands as a whole, for the metrics."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from hueshift.server.store.job_quotas import OPEN_STATES
from hueshift.server.store.job_records import JobState
from hueshift.server.store.tables import jobs


@dataclass(frozen=True, slots=True)
class JobNumbers:
    """Jobs in each state, leases lost since the table was made, training steps still to do of jobs that wait or run."""

    states: Mapping[JobState, int]
    leases_lost: int
    steps_left: int


def read_numbers(connection: Connection) -> JobNumbers:
    """Count all tenants' jobs."""
    found = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
    known = {str(state): int(count) for state, count in found}
    lost = select(func.sum(jobs.c.leases_lost)).where(jobs.c.leases_lost > 0)
    left = select(func.sum(jobs.c.steps - jobs.c.step)).where(jobs.c.state.in_(OPEN_STATES))
    return JobNumbers(
        states={state: known.get(state.value, 0) for state in JobState},
        leases_lost=int(connection.scalar(lost) or 0),
        steps_left=int(connection.scalar(left) or 0),
    )

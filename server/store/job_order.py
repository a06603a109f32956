"""Whose job is next: fair between tenants, by priority within one.

A tenant's waiting jobs stand in a line of their own, larger priority first, then older. Of the tenants at the heads of
these lines, the one with the fewest running jobs goes first, then the one that has used the fewest device seconds
today, both divided by its weight, then the one whose job is oldest. So no tenant gains by marking everything urgent,
and a burst of one tenant delays the others by one job at most.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Float, Select, case, cast, func, select

from hueshift.server.store.job_quotas import JobQuotas, day_of
from hueshift.server.store.job_records import JobState
from hueshift.server.store.tables import jobs, usage


def next_job(now: float, quotas: JobQuotas) -> Select[tuple[str]]:
    """Return the query for the id of the next job, if any: queued, due, and of a tenant within its quotas."""
    place = func.row_number().over(
        partition_by=jobs.c.tenant, order_by=(jobs.c.priority.desc(), jobs.c.created, jobs.c.job_id)
    )
    waiting = (
        select(jobs.c.job_id, jobs.c.tenant, jobs.c.created, place.label("place"))
        .where(jobs.c.state == JobState.QUEUED.value, jobs.c.not_before <= now)
        .subquery("waiting")
    )
    busy = (
        select(jobs.c.tenant, func.count().label("count"))
        .where(jobs.c.state == JobState.RUNNING.value)
        .group_by(jobs.c.tenant)
        .subquery("busy")
    )
    today = select(usage.c.tenant, usage.c.device_seconds).where(usage.c.day == day_of(now)).subquery("today")
    running = func.coalesce(busy.c.count, 0)
    used = func.coalesce(today.c.device_seconds, 0.0)
    query = (
        select(waiting.c.job_id)
        .outerjoin(busy, busy.c.tenant == waiting.c.tenant)
        .outerjoin(today, today.c.tenant == waiting.c.tenant)
        .where(waiting.c.place == 1)
        .order_by(
            _shared(running, waiting.c.tenant, quotas.weights),
            _shared(used, waiting.c.tenant, quotas.weights),
            waiting.c.created,
            waiting.c.job_id,
        )
        .limit(1)
    )
    if quotas.running:
        query = query.where(running < quotas.running)
    if quotas.seconds:
        query = query.where(used < quotas.seconds)
    return query


def _shared(amount: ColumnElement[Any], tenant: ColumnElement[str], weights: Mapping[str, float]) -> ColumnElement[Any]:
    """An amount divided by the tenant's weight."""
    return cast(amount, Float) / case(dict(weights), value=tenant, else_=1.0) if weights else amount

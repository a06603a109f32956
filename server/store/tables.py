"""The tables that hold the truth: adapters, jobs, keys. SQLAlchemy Core, so that SQLite and Postgres share every query.

Times are seconds since the epoch as floats, given by the clock that is passed in, so that tests move it at will. With
Postgres it is a `SharedClock`, which tells the database server's time on every host.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# What changed between versions is in `migrations.py`.
SCHEMA_VERSION = 5

metadata = MetaData()

schema = Table("schema", metadata, Column("version", Integer, primary_key=True))

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(32), primary_key=True),
    # SHA-256 of the secret: keys are 256 random bits, so a slow hash would add nothing.
    Column("secret_hash", String(64), nullable=False, unique=True),
    Column("tenant", String(63), nullable=False),
    Column("label", String(120), nullable=False, default=""),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

adapters = Table(
    "adapters",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("adapter_id", String(63), primary_key=True),
    Column("display_name", String(120), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("pinned", Boolean, nullable=False, default=False),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Index("adapters_by_age", "tenant", "created", "adapter_id"),
)

# Read every two seconds by each server, among adapters of which few are pinned.
pinned_adapters = Index(
    "pinned_adapters",
    adapters.c.created,
    adapters.c.adapter_id,
    sqlite_where=adapters.c.pinned.is_(True),
    postgresql_where=adapters.c.pinned.is_(True),
)

revisions = Table(
    "revisions",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("adapter_id", String(63), primary_key=True),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("content_hash", String(64), nullable=False),
    Column("base_hash", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("method", String(32), nullable=False),
    Column("identifier", String(64), nullable=False, default=""),
    Column("size_bytes", BigInteger, nullable=False),
    # The job that published it; unique, so that a job publishes at most once whoever tries.
    Column("job_id", String(32), unique=True),
    Column("created", Float, nullable=False),
    # When a request last named this revision although a newer one was there, to within minutes: such are not removed.
    Column("used", Float),
    ForeignKeyConstraint(["tenant", "adapter_id"], ["adapters.tenant", "adapters.adapter_id"], ondelete="CASCADE"),
    Index("revisions_by_content", "content_hash"),
    # All that a tenant's stored bytes are counted from, at every import and new job.
    Index("revisions_by_size", "tenant", "content_hash", "size_bytes"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("method", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    # SHA-256 of the request, so that a reused key with another request is refused.
    Column("request_hash", String(64), nullable=False),
    Column("result", JSON, nullable=False),
    Column("created", Float, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(32), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False, default=0),
    # The validated spec, as plain data (training.spec.TrainingSpec).
    Column("spec", JSON, nullable=False),
    Column("adapter_id", String(63), nullable=False),
    Column("display_name", String(120), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False),
    Column("loss", Float),
    Column("attempt", Integer, nullable=False, default=0),
    Column("lease_owner", String(64)),
    Column("lease_expires", Float),
    # Leases that ended without a word from their worker; the sum over jobs is a metric.
    Column("leases_lost", Integer, nullable=False, default=0),
    # A queued job is not taken before this time: the pause before another try.
    Column("not_before", Float, nullable=False, default=0.0),
    # Rises at every claim; writes of an older holder are refused.
    Column("fencing_token", BigInteger, nullable=False, default=0),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("checkpoint", String(200)),
    Column("revision", BigInteger, nullable=False, default=0),
    Column("scores", JSON),
    Column("error_reason", String(64)),
    Column("error_message", Text),
    Column("sequence", BigInteger, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    # Seconds on a device, all attempts together, counted up to `charged`.
    Column("device_seconds", Float, nullable=False, default=0.0),
    Column("charged", Float),
    # Why attempts ended early, for the operator: [{attempt, time, owner, cause}].
    Column("failures", JSON),
    # Of its pictures and masks as they are stored; counted for as long as they are.
    Column("picture_bytes", BigInteger, nullable=False, default=0),
    Index("jobs_to_claim", "state", "priority", "created"),
    Index("jobs_by_tenant", "tenant", "created", "job_id"),
    # Counted at every new job: few are open, while those that ended may be many.
    Index("jobs_by_tenant_and_state", "tenant", "state"),
    # Summed every second, while the rows with their specs may be many.
    Index("jobs_by_losses", "leases_lost"),
    # Found by age to be removed.
    Index("jobs_by_end", "ended"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(32), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    # state, progress or sample
    Column("kind", String(16), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("data", LargeBinary),
    ForeignKeyConstraint(["job_id"], ["jobs.job_id"], ondelete="CASCADE"),
    UniqueConstraint("job_id", "sequence"),
)

# Found by age to be forgotten, among a thousand times as many events without a picture.
samples_by_age = Index(
    "samples_by_age",
    job_events.c.time,
    sqlite_where=job_events.c.data.is_not(None),
    postgresql_where=job_events.c.data.is_not(None),
)

# The same for events of training, which go before their jobs do.
loose_events_by_age = Index(
    "loose_events_by_age",
    job_events.c.time,
    sqlite_where=job_events.c.kind != "state",
    postgresql_where=job_events.c.kind != "state",
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", String(63), primary_key=True),
    # Days since the epoch, in UTC.
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("device_seconds", Float, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("replica_id", String(64), primary_key=True),
    # A gRPC target that front ends can reach.
    Column("address", String(300), nullable=False),
    Column("started", Float, nullable=False),
    # A replica that does not renew its row by then counts as dead.
    Column("expires", Float, nullable=False),
)

# Work that one server does for all that share the database.
turns = Table(
    "turns",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    # Another may take over then: the owner has died, or hangs.
    Column("expires", Float, nullable=False),
    # When a round was last ended.
    Column("done", Float),
)

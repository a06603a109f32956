"""Every setting of the server, validated in one place. Nothing else reads the environment.

Values come from, strongest first: command-line options, environment variables (`HUESHIFT_SERVER__PORT=50051`), a TOML
file (`--config`), and the defaults below, which make the embedded default work with no settings at all.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.models.embedded import EMBEDDED_CLIP, EMBEDDED_MODEL
from hueshift.server.devices import check_devices
from hueshift.server.environment import check_environment

MIB = 1024 * 1024
GIB = 1024 * MIB
DAY = 86_400
_TENANT = r"^[a-z][a-z0-9-]{0,62}$"
TenantName = Annotated[str, StringConstraints(pattern=_TENANT)]
TenantWeight = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object, info: ValidationInfo) -> object:
        # Neither the environment nor TOML has a null, and a path of "" would be the working directory.
        if value == "" and info.field_name and type(None) in get_args(cls.model_fields[info.field_name].annotation):
            return None
        return value


class ServerSettings(_Section):
    """Network side."""

    host: str = Field(
        "127.0.0.1", description="Address to bind, or unix:/path. Anything but these and loopback needs API keys."
    )
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one.")
    metrics_host: str = Field("127.0.0.1", description="Address of the Prometheus endpoint.")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Prometheus port; 0 picks a free one.")
    tls_certificate: Path | None = Field(
        None,
        description="PEM certificate chain; with tls_key the port speaks TLS. Both are read again when they change.",
    )
    tls_key: Path | None = Field(None, description="PEM private key.")
    allow_plaintext: bool = Field(False, description="Serve a non-loopback address without TLS (behind a TLS proxy).")
    reflection: bool = Field(True, description="Offer gRPC reflection, for grpcurl.")
    max_message_bytes: int = Field(16 * MIB, ge=MIB, le=256 * MIB, description="Largest gRPC message either way.")
    max_calls: int = Field(
        2000, ge=0, description="Calls inside at a time, watches included; more are refused, health never; 0: no limit."
    )
    tenant_calls: int = Field(500, ge=0, description="The same for the calls of one tenant; 0: no limit.")
    drain_seconds: float = Field(60.0, ge=0, le=3600, description="Time accepted calls get to finish after SIGTERM.")
    default_deadline_seconds: float = Field(
        120.0, gt=0, description="Deadline of a unary or Generate call without one."
    )
    max_deadline_seconds: float = Field(600.0, gt=0, description="Longest deadline of a unary or Generate call.")
    max_connection_age_seconds: float = Field(
        0,
        ge=0,
        le=86_400,
        description="Connections end after about this long, their calls done, so that clients spread anew; 0: never.",
    )
    upload_idle_seconds: float = Field(60.0, gt=0, description="An upload that sends nothing for this long ends.")


class ModelSettings(_Section):
    """The base model."""

    path: Path = Field(EMBEDDED_MODEL, description="A diffusers Stable Diffusion 1.x, 2.x or XL folder.")
    clip_path: Path | None = Field(
        EMBEDDED_CLIP, description="CLIP folder for the scores of fine-tuning jobs; empty: none."
    )
    default_identifier: str = Field("sks", description="Word learned when a job names none.")


class EngineSettings(_Section):
    """The UNet engine."""

    kind: Literal["auto", "onnxruntime", "torch", "tensorrt"] = Field(
        "auto", description="auto: onnxruntime on a CPU, torch on CUDA; tensorrt only when asked for."
    )
    device: str = Field("auto", description="auto, cpu or cuda[:N], for torch and tensorrt.")
    threads: int = Field(0, ge=0, description="CPU threads; 0 means one per core.")
    slots: int = Field(64, ge=2, le=65536, description="Adapter mixes resident in the engine, the base included.")
    max_batch: int = Field(16, ge=2, le=256, description="UNet rows per step; a guided picture is two rows.")
    lowrank_rank: int = Field(16, ge=1, le=128, description="Largest rank of a mix on one layer.")
    lowrank_targets: tuple[str, ...] = Field(
        ("proj_out",), description="Endings of layer names that may carry a low-rank branch."
    )
    parity_bound: float = Field(1e-3, gt=0, description="Largest error of the exported graph against torch at start.")
    fp16_parity_bound: float = Field(
        1e-2, gt=0, description="The same for tensorrt, which runs in fp16, against torch in fp32."
    )
    fallback: bool = Field(True, description="Serve with torch where tensorrt cannot; false refuses to start instead.")
    cuda_graphs: bool = Field(True, description="Capture the calls of tensorrt in CUDA graphs.")
    merge_after: int = Field(
        0, ge=0, description="Calls in a row for one adapter alone before tensorrt merges it into a plan; 0: never."
    )
    compile: Literal["none", "graph", "inductor"] = Field(
        "graph",
        description="torch on CUDA: eager calls, CUDA graphs of them, or graphs of torch.compile's (slow first start).",
    )
    autotune: bool = Field(False, description="Let torch.compile try many kernels for each product; minutes more.")
    search_convolutions: bool = Field(
        True,
        description="At start, let cuDNN try its algorithms for each convolution that torch on CUDA captures: faster "
        "steps, a longer start.",
    )
    attention: str = Field(
        "sdpa",
        pattern=r"^(sdpa|cudnn|xformers)(,\d+:(sdpa|cudnn|xformers))*$",
        description="Attention of torch on CUDA: sdpa, cudnn or xformers; `,80:cudnn` says it for heads of 80 values.",
    )
    kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Adapted layers on our Triton kernels; auto: where they are faster, on: refused where wrong.",
    )
    merged_slots: int = Field(
        2,
        ge=0,
        le=64,
        description="Adapter mixes whose merged weights torch on CUDA holds; each is a copy of the UNet.",
    )
    slot_weights_bytes: int | None = Field(
        None,
        ge=0,
        description="Memory for every slot's own weights of the layers on large pictures, which makes mixed batches "
        "cheaper with torch on CUDA; none: a tenth of the device's, 0: never.",
    )
    vae_tiling_above: int = Field(
        1024, ge=0, description="Pictures with a longer side in pixels are decoded in tiles, to save memory; 0: never."
    )
    warm_sizes: tuple[tuple[int, int], ...] = Field(
        (), description="Heights and widths captured at start on CUDA, in pixels; none: the model's own size."
    )
    most_graphs: int = Field(
        64, ge=1, le=4096, description="CUDA graphs of other sizes, least recently used out first."
    )
    weights_validation: bool = Field(
        True, description="Let tensorrt check the weights of every refit; false is faster."
    )


class LimitSettings(_Section):
    """What one request may ask for."""

    default_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of a request that names none.")
    max_steps: int = Field(150, ge=1, le=1000, description="Most denoising steps.")
    default_guidance_scale: float = Field(5.0, ge=1, le=30, description="Guidance scale of a request that names none.")
    max_count: int = Field(16, ge=1, le=256, description="Most pictures of one request.")
    max_size: int = Field(1024, ge=64, description="Largest width or height in pixels.")
    max_adapters: int = Field(4, ge=1, le=4, description="Most adapters of one request.")
    queue_size: int = Field(256, ge=1, description="Pictures that may wait; more are refused with RESOURCE_EXHAUSTED.")
    tenant_queue_size: int = Field(128, ge=1, description="Pictures of one tenant that may wait.")
    max_adapter_bytes: int = Field(256 * MIB, ge=1, description="Largest adapter file.")
    row_cache_bytes: int = Field(
        GIB, ge=0, description="Composed rows kept in host memory (page-locked on CUDA), least recently used out first."
    )
    host_cache_bytes: int = Field(GIB, ge=0, description="Adapters kept in host memory, least recently used out first.")
    max_picture_bytes: int = Field(16 * MIB, ge=1, description="Largest training picture in bytes.")
    max_picture_pixels: int = Field(40_000_000, ge=1, description="Largest training picture in pixels.")
    max_pictures: int = Field(64, ge=1, description="Most training pictures of one job.")
    max_pictures_bytes: int = Field(256 * MIB, ge=1, description="All pictures of one fine-tuning job together.")
    tenant_queued_jobs: int = Field(16, ge=1, description="Fine-tuning jobs of one tenant that may wait or run.")
    tenant_running_jobs: int = Field(
        0, ge=0, description="Fine-tuning jobs of one tenant that run at a time, the others wait; 0: no limit."
    )
    tenant_training_seconds: float = Field(
        0, ge=0, description="Device seconds one tenant's jobs may use in a day (UTC); 0: no limit."
    )
    tenant_stored_bytes: int = Field(
        16 * GIB, ge=0, description="Adapter files and pictures that one tenant may store; 0: no limit."
    )
    tenant_stored_bytes_of: dict[TenantName, Annotated[int, Field(ge=0)]] = Field(
        {}, max_length=1000, description="The same for some tenants by name, in the place of that."
    )
    tenant_weights: dict[TenantName, TenantWeight] = Field(
        {},
        max_length=1000,
        description="Shares of tenants in generation and training, relative to one another; 1 where not named.",
    )


class TrainingSettings(_Section):
    """The fine-tuning workers."""

    workers: int = Field(
        1, ge=0, le=64, description="Worker processes this server starts; 0: they are started elsewhere."
    )
    devices: tuple[str, ...] = Field(
        (), description="CUDA devices that train and never serve (cuda:1), one worker each; none: on the CPU."
    )
    jobs_per_worker: int = Field(
        1, ge=1, le=64, description="Jobs of one method that a worker trains at a time, their steps in one batch."
    )
    shared_rows: int = Field(
        0, ge=0, description="Most UNet rows of such a batch; 0: as many as memory holds, found by trying."
    )
    shared_wait_seconds: float = Field(
        2.0, gt=0, description="How long one job may keep the others of its batch waiting at a step."
    )
    compile: Literal["none", "graph", "inductor"] = Field(
        "none",
        description="On a GPU: a step's UNet, loss and way back as one CUDA graph; of torch.compile's with inductor.",
    )
    threads: int = Field(0, ge=0, description="CPU threads per worker; 0 means one per core.")
    nice: int = Field(5, ge=0, le=19, description="How far workers step back for serving on a shared CPU.")
    lease_seconds: float = Field(30.0, gt=0, description="A worker silent for this long loses its job.")
    poll_seconds: float = Field(0.25, gt=0, description="How often idle workers look for jobs.")
    max_attempts: int = Field(5, ge=1, description="Times a job is taken before it fails for good.")
    max_job_seconds: float = Field(
        0, ge=0, description="Device seconds after which a job fails, all its attempts together; 0: no limit."
    )
    max_job_memory: int = Field(
        0, ge=0, description="Resident bytes of a worker, base model included, at which its job fails; 0: no limit."
    )
    memory_fraction: float = Field(1.0, gt=0, le=1, description="Share of a CUDA device's memory a worker may take.")
    keep_pictures: bool = Field(False, description="Keep training pictures after the job has ended.")
    keep_samples_seconds: float = Field(
        30 * DAY, ge=0, description="How long sample pictures of ended jobs stay in the database; 0: for ever."
    )
    keep_failed_seconds: float = Field(
        86_400, ge=0, description="How long a job that was given up keeps its files, to be retried; 0: not at all."
    )


class RetentionSettings(_Section):
    """What is removed when nobody needs it any more; samples and files of jobs have their settings in `training`."""

    events_seconds: float = Field(
        30 * DAY, ge=0, description="How long progress and samples of ended jobs can be watched again; 0: for ever."
    )
    jobs_seconds: float = Field(
        180 * DAY, ge=0, description="How long ended jobs are listed, with their scores and errors; 0: for ever."
    )
    revisions: int = Field(20, ge=0, description="Newest revisions that an adapter keeps; 0: all.")
    revisions_seconds: float = Field(
        0, ge=0, description="How long a revision is kept that is not the newest one; 0: for ever."
    )


class StoreSettings(_Section):
    """What outlives the process."""

    path: Path = Field(Path("~/.local/share/hueshift"), description="Folder of the database and the adapter files.")
    cache_path: Path = Field(Path("~/.cache/hueshift"), description="Folder of exported graphs and decompositions.")
    database_url: SecretStr = Field(
        SecretStr(""),
        description="postgresql+psycopg://USER:PASSWORD@HOST/NAME when several hosts share; empty: SQLite in `path`.",
    )
    objects_url: str = Field(
        "",
        pattern=r"^(|s3://[^/]+.*|file:///.+)$",
        description="s3://BUCKET/PREFIX for the files of adapters and jobs; empty: folders in `path`.",
    )
    objects_endpoint: str = Field("", description="Address of an S3-compatible store; empty: AWS.")

    @property
    def database(self) -> str | Path:
        """Where the database is: a URL, or the file of the embedded one."""
        return self.database_url.get_secret_value() or self.path.expanduser() / "hueshift.db"

    @field_serializer("database_url", when_used="json")
    def _tell_workers(self, value: SecretStr) -> str:
        # Settings go as JSON to our own processes, over a pipe. Printing them shows stars.
        return value.get_secret_value()


class ClusterSettings(_Section):
    """Several hosts: what this process does among them, and what Ray places where."""

    role: Literal["single", "replica", "frontend"] = Field(
        "single",
        description="single: all in one; replica: also answers front ends; frontend: no engine, passes calls on.",
    )
    advertise: str = Field(
        "", description="HOST:PORT at which front ends reach this replica; empty: the host's name and the bound port."
    )
    replica_ca: Path | None = Field(
        None, description="PEM certificates a front end trusts; empty: replicas without TLS."
    )
    heartbeat_seconds: float = Field(2.0, gt=0, description="How often a replica tells that it lives.")
    load_bound: float = Field(
        1.25, ge=1, description="Times the mean load a replica may have before a front end passes it by."
    )
    ray_address: str = Field("auto", description="Ray cluster of `hueshift cluster`.")
    namespace: str = Field("hueshift", pattern=r"^[a-z][a-z0-9-]{0,62}$", description="Ray namespace of the actors.")
    replicas: int = Field(0, ge=0, le=1024, description="Engine replicas that Ray places on nodes of pool serve.")
    workers: int = Field(0, ge=0, le=1024, description="Training workers that Ray places on nodes of pool finetune.")
    replica_gpus: float = Field(0, ge=0, description="GPUs of one replica.")
    worker_gpus: float = Field(0, ge=0, description="GPUs of one worker.")
    actor_cpus: float = Field(1, ge=0, description="CPUs Ray reserves for one replica or worker.")
    pool_label: str = Field("hueshift-pool", description="Node label whose value is serve or finetune.")


class AuthSettings(_Section):
    """Who may call."""

    required: bool = Field(
        False,
        description="Refuse calls without an API key. Implied once a key exists or the address is not loopback.",
    )
    default_tenant: str = Field("local", pattern=_TENANT, description="Tenant of keyless loopback calls.")


class LogSettings(_Section):
    """Logging."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is written.")
    json_lines: bool = Field(True, description="JSON lines; false prints for people.")


class Settings(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(env_prefix="HUESHIFT_", env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()
    training: TrainingSettings = TrainingSettings()
    retention: RetentionSettings = RetentionSettings()
    store: StoreSettings = StoreSettings()
    cluster: ClusterSettings = ClusterSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _devices_apart(self) -> Self:
        check_devices(self.training.devices, serving_device(self.engine, self.cluster))
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, then the TOML file named by the caller."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=settings_cls.model_config.get("toml_file"))
        return init_settings, env_settings, toml


def serving_device(engine: EngineSettings, cluster: ClusterSettings) -> str:
    """Return the device that serving takes by the settings: cpu or cuda:N. `auto` may take the first GPU."""
    if cluster.role == "frontend" or engine.kind == "onnxruntime" or engine.device == "cpu":
        return "cpu"
    return "cuda:0" if engine.device in ("auto", "cuda") else engine.device


def load_settings(config: Path | None = None, **overrides: object) -> Settings:
    """Read the settings, `overrides` (sections as dicts) over the environment over the file.

    Raises InvalidArgument (SETTINGS_INVALID) naming every wrong setting, what was given and what is allowed.
    """
    if config is not None and not config.is_file():
        raise InvalidArgument.for_field("--config", f"{config} is not a file", Reason.SETTINGS_INVALID)

    check_environment(os.environ, Settings.model_fields)

    class _Loaded(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        return _Loaded(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        violations = [
            # A check of several settings together names them itself; its input would be all settings, secrets too.
            FieldViolation(
                ".".join(map(str, e["loc"])), f"{e['msg']}, given {e.get('input')!r}" if e["loc"] else e["msg"]
            )
            for e in error.errors()
        ]
        text = "; ".join(f"{v.field}: {v.description}".removeprefix(": ") for v in violations)
        raise InvalidArgument(Reason.SETTINGS_INVALID, f"settings refused: {text}", violations=violations) from error

"""The words callers choose from and answers are made of. Imports nothing, so that a command line starts fast."""

from enum import StrEnum


class Sampler(StrEnum):
    """How the denoising equation is solved."""

    DDIM = "ddim"
    EULER = "euler"
    DPMPP_2M = "dpmpp_2m"
    LCM = "lcm"


class ImageFormat(StrEnum):
    """File format of pictures."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


class Priority(StrEnum):
    """Order within one tenant's own queue, of requests or of fine-tuning jobs."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class AdapterKind(StrEnum):
    """How an adapter changes the model. UNKNOWN stands for kinds newer than this client."""

    SPECTRAL = "spectral"
    LOWRANK = "lowrank"
    TOKENS = "tokens"
    KV = "kv"
    DENSE = "dense"
    UNKNOWN = "unknown"


class AdapterFormat(StrEnum):
    """Form of an exported adapter file. HUESHIFT is the service's own, the only one that holds every adapter."""

    HUESHIFT = "hueshift"
    KOHYA = "kohya"
    PEFT = "peft"
    MKSHING = "mkshing"
    TEXTUAL_INVERSION = "textual_inversion"
    CUSTOM_DIFFUSION = "custom_diffusion"


class Method(StrEnum):
    """How an adapter is learned. UNKNOWN stands for methods newer than this client."""

    SVDIFF = "svdiff"
    RESIDUALS = "residuals"
    LORA = "lora"
    TEXTUAL_INVERSION = "textual_inversion"
    CUSTOM_DIFFUSION = "custom_diffusion"
    DREAMBOOTH = "dreambooth"
    UNKNOWN = "unknown"


class Subject(StrEnum):
    """What training pictures have in common; EDIT: there is one, and its prompt, to be edited.

    UNKNOWN stands for values newer than this client.
    """

    SUBJECT = "subject"
    STYLE = "style"
    EDIT = "edit"
    UNKNOWN = "unknown"


class JobState(StrEnum):
    """Where a fine-tuning job stands. UNKNOWN stands for states newer than this client."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def ended(self) -> bool:
        """True once nothing more will happen to the job."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

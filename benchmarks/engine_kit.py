"""What the engine's benchmarks are run with: a model with random weights, engines over it, adapters, and the clock.

Random weights take as long as trained ones. The full scales are SD1.5's and SDXL's architectures on a CUDA device; the
tiny ones run the same code in seconds on a CPU, for the tests, and their figures mean nothing.

By its weights, SDXL takes 44 GB of a device: in fp32 the base with its decoder and encoders 14, in fp16 diffusers' UNet
5.1, the dense and the merged one 4.5 each, the factors 6.3, and packed for merging 9.7; 13 more while a call is checked
in fp32, and what graphs and activations take. On the host the factors take 15 GB.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.base_model import BaseModel, XlParts, read_layout
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import CudaLane, GraphLane, HostLane
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.cuda_setup import build_cuda
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.torch_engine import example_added
from hueshift.models.embedded import EMBEDDED_MODEL

LOWRANK_TARGETS = ("to_q", "to_out.0", "proj_out")
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large and how long: networks' configurations, UNet rows, repeats, and the serving load. `text_2` is SDXL's
    second text encoder, and says that it is SDXL.
    """

    name: str
    unet: Mapping[str, Any]
    text: Mapping[str, Any]
    vae: Mapping[str, Any]
    rows: tuple[int, ...]
    compiles: tuple[CompileKind, ...]
    repeats: int
    steps: int
    requests: int
    tenants: tuple[int, ...]
    adapters: tuple[int, ...]
    rank: int = 4
    tokens: int = 77
    text_2: Mapping[str, Any] | None = None


FULL = Scale(
    name="sd15",
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    },
    rows=(2, 4, 8, 16, 32),
    compiles=(CompileKind.GRAPH, CompileKind.INDUCTOR),
    repeats=50,
    steps=25,
    requests=96,
    tenants=(1, 2, 4, 8, 16),
    adapters=(10, 1000, 10_000),
)
FULL_XL = replace(
    FULL,
    name="sdxl",
    unet={
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    # Its config forces fp32 for decoding.
    vae={**FULL.vae, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    rows=(2, 8),
    # Buckets by torch.compile would take longer than all the rest.
    compiles=(CompileKind.GRAPH,),
    repeats=20,
)
TINY = Scale(
    name="tiny",
    unet={
        "sample_size": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    text={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    vae={
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    },
    rows=(2, 4),
    compiles=(CompileKind.GRAPH,),
    repeats=3,
    steps=2,
    requests=4,
    tenants=(1, 2),
    adapters=(3,),
    tokens=8,
)
TINY_XL = replace(
    TINY,
    name="tinyxl",
    unet={
        **FULL_XL.unet,
        "sample_size": 8,
        "cross_attention_dim": 40,
        "attention_head_dim": (1, 2, 4),
        "block_out_channels": (16, 16, 32),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    text_2={**TINY.text, "hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"},
    vae={**TINY.vae, "scaling_factor": 0.13025, "force_upcast": True},
)
SCALES = {scale.name: scale for scale in (FULL, FULL_XL, TINY, TINY_XL)}


@dataclass
class EngineKit:
    """Everything at one scale on one device; `cache` is a folder for measured costs, `about` goes into every row."""

    scale: Scale
    device: torch.device
    cache: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def base(self) -> BaseModel:
        """The model, in fp32, as a server loads it."""
        torch.manual_seed(0)
        scale = self.scale
        tokenizer: Any = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
        tokenizer.model_max_length = scale.tokens
        unet: Any = UNet2DConditionModel(**scale.unet)
        vae: Any = AutoencoderKL(**scale.vae)
        encoders: list[Any] = [CLIPTextModel(self._text_config(tokenizer, scale.text))]
        if scale.text_2 is not None:
            encoders.append(CLIPTextModelWithProjection(self._text_config(tokenizer, scale.text_2)))
        for module in (unet, vae, *encoders):
            module.to(self.device).eval().requires_grad_(False)
        widths = tuple(encoder.config.hidden_size for encoder in encoders)
        name = f"{scale.name}-random"
        identity = hashlib.sha256(name.encode()).hexdigest()
        levels = len(unet.config.block_out_channels)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return BaseModel(
            name=name,
            path=Path(name),
            base_hash=identity,
            unet=unet,
            vae=vae,
            text_encoder=encoders[0],
            tokenizer=tokenizer,
            schedule=NoiseSchedule.from_config(SCHEDULER),
            layout=read_layout(unet, identity, sum(widths), widths if scale.text_2 is not None else ()),
            latent_channels=4,
            latent_factor=factor,
            sample_size=unet.config.sample_size,
            size_multiple=factor * 2 ** (levels - 1),
            xl=None if scale.text_2 is None else XlParts(encoders[1], tokenizer),
        )

    def _text_config(self, tokenizer: Any, given: Mapping[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=self.scale.tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **given,
        )

    @cached_property
    def factors(self) -> SpectralFactors:
        """Its decomposition, on the device."""
        factors = SpectralFactors({}, {}, {})
        for layer in self.base.layout.matrices:
            matrix = self.base.unet.get_parameter(f"{layer.name}.weight").detach().reshape(layer.rows, layer.cols)
            u, sigma, vh = _decompose(matrix)
            factors.u[layer.name], factors.vh[layer.name] = u.cpu().contiguous(), vh.cpu().contiguous()
            factors.sigma[layer.name] = sigma.cpu()
        return factors

    @cached_property
    def rows(self) -> RowLayout:
        """Spectral rows, and branches of the scale's rank on attention and its output."""
        return RowLayout(self.base.layout, LOWRANK_TARGETS, self.scale.rank, text_side=False)

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        """Weights of its norms."""
        return read_norms(self.base.layout, lambda name: self.base.unet.get_parameter(f"{name}.weight"))

    @property
    def dtype(self) -> torch.dtype:
        """What engines and baselines run in."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def own_unet(self) -> Any:
        """The model's UNet as diffusers runs it, in the dtype of the baselines."""
        unet: Any = copy.deepcopy(self.base.unet)
        return unet.to(self.dtype).to(memory_format=torch.channels_last)

    def call_diffusers(self, count: int) -> bool:
        """One eager call of that UNet, from a context of its own width."""
        unet, side, width = self.own_unet, self.base.sample_size, self.own_unet.config.cross_attention_dim
        latents = torch.zeros(count, 4, side, side, device=self.device, dtype=self.dtype)
        latents = latents.contiguous(memory_format=torch.channels_last)
        context = torch.zeros(count, self.base.max_tokens, width, device=self.device, dtype=self.dtype)
        added: dict[str, Tensor] = {}
        if self.base.xl is not None:
            pooled = self.base.xl.text_encoder.config.projection_dim
            added["text_embeds"] = torch.zeros(count, pooled, device=self.device, dtype=self.dtype)
            added["time_ids"] = torch.zeros(count, 6, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            unet(latents, 500, encoder_hidden_states=context, added_cond_kwargs=added)
        return True

    def added(self, count: int) -> Tensor | None:
        """What rows of SDXL take beside example inputs."""
        return example_added(self.base, count)

    def lane(self) -> GraphLane:
        """A lane of the device."""
        return CudaLane(self.device) if self.device.type == "cuda" else HostLane()

    def engine(
        self, *, compile: CompileKind, slots: int = 24, max_batch: int | None = None, **options: Any
    ) -> CudaEngine:
        """A warm engine that measured itself."""
        native = (self.base.sample_size, self.base.sample_size)
        defaults = CudaOptions(
            warm_sizes=(native,),
            max_area=native[0] * native[1],
            compile=compile,
            weight_slots=1,
            slot_weight_bytes=None,
        )
        if self.device.type != "cuda":
            defaults = replace(defaults, kernels=KernelUse.OFF)
        return build_cuda(
            self.base,
            self.factors,
            self.rows,
            self.norms,
            slots=slots,
            max_batch=max_batch or max(self.scale.rows),
            options=replace(defaults, **options),
            lane=self.lane(),
            cache_dir=self.cache,
            progress=lambda stage, done, total: None,
        )

    def adapter(self, seed: int, kind: AdapterKind) -> Adapter:
        """A random adapter, as a store would hold it."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.02

        layout = self.base.layout
        if kind is AdapterKind.SPECTRAL:
            shifts = {layer.name: normal(layer.rank) for layer in layout.matrices}
            return Adapter(kind, layout.base_hash, "svdiff", spectral=shifts)
        rank = self.scale.rank
        parts = {t.name: LowRankFactors(normal(rank, t.cols), normal(t.rows, rank)) for t in self.rows.targets}
        return Adapter(kind, layout.base_hash, "lora", lowrank=parts)

    def times(self, work: Callable[[], Any], repeats: int | None = None) -> dict[str, float]:
        """Milliseconds of one run on the engine's device: median, 20th and 80th percentile."""
        count = repeats or self.scale.repeats
        work()
        found = self.lane().times_ms(lambda: work() and None, count)
        return {"ms": found[count // 2], "p20": found[count // 5], "p80": found[count * 4 // 5]}

    def row(self, bench: str, case: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """One line of results."""
        rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()}
        made = {"bench": bench, "case": f"{self.scale.name}-{case}", **rounded, **self.about}
        json.dumps(made)
        return made


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma and V^T in fp32, by the eigenvectors of the smaller product of the matrix with itself in fp64.

    On a GPU that takes seconds for a whole UNet, where its SVD takes minutes. Squared singular values of random weights
    span less than 1e10, of fp64's 1e16.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().t()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    sigma, left = squares.flip(0).clamp_min(1e-30).sqrt(), vectors.flip(1)
    right = (left.t() @ wide) / sigma[:, None]
    u, vh = (left, right) if wide.shape == matrix.shape else (right.t(), left.t())
    return u.float().contiguous(), sigma.float(), vh.float().contiguous()


def full_kit(device: torch.device, cache: Path, about: Mapping[str, Any], model: str = FULL.name) -> EngineKit:
    """The kit that measures a model."""
    return EngineKit(SCALES[model], device, cache, about)


def tiny_kit(cache: Path, about: Mapping[str, Any], scale: str = TINY.name) -> EngineKit:
    """The kit that shows that everything runs."""
    return EngineKit(SCALES[scale], torch.device("cpu"), cache, about)

"""Choose and build the engine of a deployment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_attention import parse_attention
from hueshift.engines.cuda_lane import CudaLane
from hueshift.engines.cuda_options import CompileKind, CudaOptions, EngineObserver, KernelUse
from hueshift.engines.cuda_setup import build_cuda
from hueshift.engines.interface import Plan, UNetEngine
from hueshift.engines.parity import OnParity, check_parity
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.engines.torch_engine import TorchEngine

EngineKind = Literal["auto", "onnxruntime", "torch", "tensorrt"]
_ONNX_MODULES = ("onnxruntime", "onnx")
_log = structlog.get_logger()
Word = TypeVar("Word", bound=StrEnum)

BuildProgress = Callable[[str, int, int], None]
"""progress(stage, done, total); stages are `decompose`, `export <plan>`, `build <plan>` (tensorrt), `capture`,
`calibrate` (CUDA) and `check`."""

OnFallback = Callable[[str], None]
"""Hears why torch serves in TensorRT's place: a value of engines.tensorrt_loader.Fallback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the operator sets; the defaults are those of server/settings.py, where each is described.

    `threads` are ONNX Runtime's: torch's own belong to the whole process, so whoever starts it sets them.
    """

    cache_dir: Path
    kind: EngineKind = "auto"
    device: str = "auto"
    threads: int = 0
    slots: int = 64
    max_batch: int = 16
    lowrank_rank: int = 16
    lowrank_targets: tuple[str, ...] = ("proj_out",)
    parity_bound: float = 1e-3
    fp16_parity_bound: float = 1e-2
    fallback: bool = True
    cuda_graphs: bool = True
    merge_after: int = 0
    weights_validation: bool = True
    max_size: int = 1024
    compile: str = "graph"
    autotune: bool = False
    search_convolutions: bool = True
    attention: str = "sdpa"
    kernels: str = "auto"
    merged_slots: int = 2
    slot_weights_bytes: int | None = None
    warm_sizes: tuple[tuple[int, int], ...] = ()
    most_graphs: int = 64
    vae_tiling_above: int = 1024


class AdapterEngine(UNetEngine, Protocol):
    """A UNet engine together with what composing rows for it needs."""

    rows: RowLayout
    factors: SpectralFactors
    norms: Mapping[str, Tensor]


def build_engine(
    base: BaseModel,
    options: EngineOptions,
    *,
    progress: BuildProgress | None = None,
    on_parity: OnParity | None = None,
    on_fallback: OnFallback | None = None,
    observer: EngineObserver | None = None,
) -> AdapterEngine:
    """Build the engine for `base`: decompose its weights, export its graphs, and check them, all cached on disk.

    `on_parity` receives the error of each exported graph, `on_fallback` why torch serves in TensorRT's place;
    `observer` hears of captures, merges and capacity on CUDA, where torch's engine is captured and measured here too.
    Raises FailedPrecondition (ENGINE_UNAVAILABLE, ENGINE_PARITY) or InvalidArgument (SETTINGS_INVALID,
    MODEL_UNSUPPORTED).
    """
    device = choose_device(options.device, base)
    kind = choose_kind(options.kind, device, _is_installed)
    report = progress or (lambda stage, done, total: None)
    rows = RowLayout(base.layout, options.lowrank_targets, options.lowrank_rank, text_side=False)
    factors = load_factors(base, options.cache_dir, lambda done, total: report("decompose", done, total))
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    _log.info("engine_chosen", engine=kind, device=str(device), spectral=rows.spectral_size, lowrank=rows.lowrank_size)
    if kind == "torch" and device.type == "cuda":
        return _build_cuda(base, options, device, rows, factors, norms, report, observer)
    if kind == "torch":
        return TorchEngine(base, factors, rows, norms, slots=options.slots, max_batch=options.max_batch, device=device)
    if kind == "tensorrt":
        return _build_tensorrt(base, options, device, rows, factors, norms, report, on_parity, on_fallback, observer)
    return _build_onnx(base, options, rows, factors, norms, report, on_parity)


def choose_device(wanted: str, base: BaseModel) -> torch.device:
    """The device of the UNet: where the base model lies for `auto`, else the one named.

    Raises FailedPrecondition (ENGINE_UNAVAILABLE) if there is no such device.
    """
    if wanted == "auto":
        return next(base.unet.parameters()).device
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FailedPrecondition(
            Reason.ENGINE_UNAVAILABLE,
            f"engine.device {wanted!r} cannot be used here ({str(error).splitlines()[0]}); give auto, cpu or cuda[:N]",
        ) from error
    return device


def choose_kind(kind: str, device: torch.device, is_installed: Callable[[str], bool]) -> str:
    """`torch`, `onnxruntime` or `tensorrt`. `auto` is onnxruntime on a CPU if it is installed, else torch.

    Raises FailedPrecondition (ENGINE_UNAVAILABLE) if onnxruntime was asked for and its packages are missing, or
    InvalidArgument (SETTINGS_INVALID) if it was asked for on another device than the CPU.
    """
    missing = [module for module in _ONNX_MODULES if not is_installed(module)]
    if kind == "torch" or (kind == "auto" and device.type != "cpu"):
        return "torch"
    if kind == "tensorrt":
        # What it lacks is found out while it is built, and answered by torch.
        return kind
    if kind == "auto":
        if missing:
            _log.warning("engine_slow", engine="torch", missing=missing, install="hueshift[onnx]")
            return "torch"
        return "onnxruntime"
    if kind != "onnxruntime":
        raise InvalidArgument.for_field(
            "engine.kind", f"{kind!r} is no engine; give auto, onnxruntime, torch or tensorrt", Reason.SETTINGS_INVALID
        )
    if device.type != "cpu":
        raise InvalidArgument.for_field(
            "engine.kind", f"onnxruntime runs on the CPU only, not on {device}; give torch", Reason.SETTINGS_INVALID
        )
    if missing:
        raise FailedPrecondition(
            Reason.ENGINE_UNAVAILABLE,
            f"engine.kind is onnxruntime, but {', '.join(missing)} is not installed; install the extra "
            "`hueshift[onnx]`, or set engine.kind to torch",
        )
    return "onnxruntime"


def cuda_options(base: BaseModel, options: EngineOptions) -> CudaOptions:
    """The CUDA engine's options in latents, of what the operator set in pixels.

    Raises InvalidArgument (SETTINGS_INVALID) on a word that is none, or a size that pictures cannot have.
    """
    native = (base.pixels, base.pixels)
    sizes = []
    for height, width in options.warm_sizes or (native,):
        odd = height % base.size_multiple or width % base.size_multiple
        if odd or min(height, width) <= 0 or max(height, width) > options.max_size:
            raise InvalidArgument.for_field(
                "engine.warm_sizes",
                f"{height}x{width}; sides must be multiples of {base.size_multiple} up to {options.max_size} "
                "(limits.max_size)",
                Reason.SETTINGS_INVALID,
            )
        sizes.append((height // base.latent_factor, width // base.latent_factor))
    largest = max(options.max_size, base.pixels) // base.latent_factor
    return CudaOptions(
        warm_sizes=tuple(sizes),
        max_area=largest * largest,
        compile=_word("engine.compile", CompileKind, options.compile),
        autotune=options.autotune,
        search_convolutions=options.search_convolutions,
        attention=parse_attention(options.attention),
        kernels=_word("engine.kernels", KernelUse, options.kernels),
        weight_slots=options.merged_slots,
        slot_weight_bytes=options.slot_weights_bytes,
        graphs=options.most_graphs,
        tile_above=options.vae_tiling_above,
    )


def _word(setting: str, kind: type[Word], text: str) -> Word:
    if text not in set(kind):
        raise InvalidArgument.for_field(
            setting, f"{text!r} is not understood; give {', '.join(kind)}", Reason.SETTINGS_INVALID
        )
    return kind(text)


def _build_cuda(
    base: BaseModel,
    options: EngineOptions,
    device: torch.device,
    rows: RowLayout,
    factors: SpectralFactors,
    norms: Mapping[str, Tensor],
    report: BuildProgress,
    observer: EngineObserver | None,
    *,
    live: bool = False,
) -> AdapterEngine:
    return build_cuda(
        base,
        factors,
        rows,
        norms,
        slots=options.slots,
        max_batch=options.max_batch,
        options=cuda_options(base, options),
        lane=CudaLane(device),
        cache_dir=options.cache_dir,
        progress=report,
        observer=observer,
        live=live,
    )


def _build_onnx(
    base: BaseModel,
    options: EngineOptions,
    rows: RowLayout,
    factors: SpectralFactors,
    norms: Mapping[str, Tensor],
    report: BuildProgress,
    on_parity: OnParity | None,
) -> AdapterEngine:
    # The packages of the onnx extra may be absent; choose_kind has looked.
    from hueshift.engines.onnx_engine import OnnxEngine
    from hueshift.engines.onnx_export import export_graph

    graphs: dict[Plan, Path] = {}
    for plan in OnnxEngine.plans:

        def exporting(done: int, total: int, stage: str = f"export {plan}") -> None:
            report(stage, done, total)

        graphs[plan] = export_graph(base, factors, rows, plan, options.cache_dir, exporting)
    engine = OnnxEngine(
        base,
        factors,
        rows,
        norms,
        graphs,
        slots=options.slots,
        max_batch=options.max_batch,
        threads=options.threads,
    )
    report("check", 0, 1)
    check_parity(
        engine.run_graph,
        engine.plans,
        base=base,
        factors=factors,
        rows=rows,
        norms=norms,
        bound=options.parity_bound,
        on_parity=on_parity,
    )
    report("check", 1, 1)
    return engine


def _build_tensorrt(
    base: BaseModel,
    options: EngineOptions,
    device: torch.device,
    rows: RowLayout,
    factors: SpectralFactors,
    norms: Mapping[str, Tensor],
    report: BuildProgress,
    on_parity: OnParity | None,
    on_fallback: OnFallback | None,
    observer: EngineObserver | None,
) -> AdapterEngine:
    # The graph writer needs onnx, which may be absent.
    if not _is_installed("onnx"):
        raise FailedPrecondition(
            Reason.ENGINE_UNAVAILABLE, "engine.kind is tensorrt, but onnx is not installed; install `hueshift[onnx]`"
        )
    from hueshift.engines.tensorrt_setup import Model, build_tensorrt

    model = Model(base, factors, rows, norms)

    def second(live: bool) -> AdapterEngine:
        return _build_cuda(base, options, device, rows, factors, norms, report, observer, live=live)

    on_cuda = second if device.type == "cuda" else None
    return build_tensorrt(model, options, device, report, on_parity, on_fallback, second=on_cuda)


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None

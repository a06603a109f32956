"""The UNet in training: rows, changed weights, contexts by layer, attention to look at, activation checkpoints."""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hueshift.engines.adapted_layers import RowGroupNorm, RowLayerNorm
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.transfer import to_device
from hueshift.training.conditions import make_reader
from hueshift.training.held_factors import DeviceCopy, HeldFactors
from hueshift.training.methods.learnable import Learnable, Rows
from hueshift.training.precision import holds_lowered
from hueshift.training.spec import TrainingSpec

Maps = dict[str, dict[int, Tensor]]
"""Attention [heads, positions, tokens] by cross-attention and row."""


class TrainingUNet:
    """Runs an AdaptedUNet that was made for training alone, and whose modules this may hook.

    `attentions` are its cross-attentions in the order it runs them. With `checkpointing` activations within blocks are
    computed again in the backward pass: about a third more time, for a fraction of the memory.

    Jobs that share one take turns: calls hold `lock`, and who looks at attention or runs backward with `checkpointing`
    holds it for as long.

    With `lowered` the weights of linear and convolution layers are held in bfloat16, and all calls have their products
    in it; the base keeps its own. `held` are factors that its layers are aliases of: they live as long as this.
    """

    def __init__(
        self,
        unet: AdaptedUNet,
        attentions: tuple[str, ...],
        width: int,
        *,
        checkpointing: bool = False,
        lowered: bool = False,
        held: DeviceCopy | None = None,
    ) -> None:
        self.plan = unet.plan
        self.checkpointing = checkpointing
        self.held = held
        self.lock = threading.RLock()
        self._unet = unet
        self._called = _Called(unet)
        self._width = width
        self._reader = make_reader(unet.unet, width)
        self._maps: Maps = {}
        self._watched: tuple[frozenset[str], tuple[int, ...]] = (frozenset(), ())
        self._lowered = lowered
        if lowered:
            _lower_weights(unet)
        for number, name in enumerate(attentions):
            module = unet.unet.get_submodule(name)
            module.register_forward_pre_hook(self._before(number, name), with_kwargs=True)
        if checkpointing:
            model: Any = unet.unet
            model.enable_gradient_checkpointing(gradient_checkpointing_func=self._checkpointed)

    def __call__(self, sample: Tensor, timesteps: Tensor, context: Tensor, rows: Rows) -> Tensor:
        """Run on sample [n, 4, h, w], timesteps [n] and context [n, tokens, width or layers * width].

        Rows are one for all, or one for each sample; changed weights are for all. Differentiable with respect to the
        rows and the context, which is packed conditions for SDXL (training/conditions.py).
        """
        if not rows.weights:
            with self.lock:
                return self.run_rows(sample, timesteps, context, rows.spectral, rows.lowrank)
        context, added = self._split(context)
        inputs = (sample, timesteps, context, rows.spectral, rows.lowrank, added)
        with self.lock, self._products(sample.device):
            weights = {f"unet.unet.{name}.weight": self._laid_out(weight) for name, weight in rows.weights.items()}
            out: Tensor = functional_call(self._called, weights, inputs)
            return out

    def run_rows(
        self, sample: Tensor, timesteps: Tensor, context: Tensor, spectral: Tensor | None, lowrank: Tensor | None
    ) -> Tensor:
        """The same for rows alone, by who holds `lock`; this is what torch.compile can read."""
        context, added = self._split(context)
        with self._products(sample.device):
            return self._unet.forward_rows(sample, timesteps, context, spectral, lowrank, added)

    def repeat_pixels(self) -> None:
        """From now on upsample by repeating pixels, for a compiler: the same values, and a way back that adds in order.

        Torch's nearest neighbours add by index on their way back, when compiled. On a CUDA device that is in no certain
        order, and on a CPU inductor of torch 2.13 ran it after what reads the sums.
        """
        for module in self._unet.unet.modules():
            if isinstance(module, Upsample2D) and module.interpolate:
                module.interpolate = False
                module.register_forward_pre_hook(_repeat_input)

    def _split(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        return (context, None) if self._reader is None else self._reader.split(context)

    def _products(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if self._lowered else nullcontext()

    @contextmanager
    def watching(self, names: Collection[str], rows: Collection[int]) -> Iterator[Maps]:
        """Collect the attention of `rows` in the cross-attentions of these names, while the context lasts."""
        self._maps = {}
        self._watched = (frozenset(names), tuple(sorted(rows)))
        try:
            yield self._maps
        finally:
            self._watched = (frozenset(), ())

    def _before(self, number: int, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            context: Tensor = named["encoder_hidden_states"]
            if context.shape[-1] != self._width:
                begin = number * self._width
                context = context[..., begin : begin + self._width]
            names, rows = self._watched
            if rows and name in names:
                self._maps[name] = _attention(module, args[0], context, rows, shared=self._rows_shared())
            return args, {**named, "encoder_hidden_states": context}

        return hook

    def _rows_shared(self) -> bool:
        scope = self._unet.call_rows
        return scope.shared or not (scope.values or scope.branches)

    def _laid_out(self, weight: Tensor) -> Tensor:
        if weight.dim() == 4 and self._unet.call_rows.channels_last:
            return weight.contiguous(memory_format=torch.channels_last)
        return weight

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint a block: what the call's scope holds, and weights that stand in, must be there again later."""
        scope = self._unet.call_rows
        values, branches, shared = scope.values, scope.branches, scope.shared
        # Also what is looked at: a block computed again must save the same tensors as the first time.
        watched, maps = self._watched, self._maps
        parameters: dict[str, Tensor] = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}

        def again(*inputs: Any) -> Any:
            kept = scope.values, scope.branches, scope.shared, self._watched, self._maps
            scope.values, scope.branches, scope.shared = values, branches, shared
            self._watched, self._maps = watched, maps
            try:
                if parameters and isinstance(function, nn.Module):
                    return functional_call(function, parameters, inputs)
                return function(*inputs)
            finally:
                scope.values, scope.branches, scope.shared, self._watched, self._maps = kept

        # Nothing in a block is drawn at random.
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)


def make_unet(
    base: BaseModel,
    factors: SpectralFactors,
    learnable: Learnable,
    spec: TrainingSpec,
    held: HeldFactors | None = None,
) -> TrainingUNet:
    """The UNet that jobs of this kind train with, on the base's weights and, with `held`, on its factors."""
    weight = next(base.unet.parameters())
    lowered = holds_lowered(weight.device, spec.precision)
    copy = None
    if held is not None and learnable.plan is not Plan.DENSE:
        copy = held.take(torch.bfloat16 if lowered else weight.dtype)
    adapted = AdaptedUNet(base, factors if copy is None else copy.factors, learnable.layout, learnable.plan)
    layout = base.layout
    return TrainingUNet(
        adapted,
        layout.cross_attentions,
        layout.token_width,
        checkpointing=spec.gradient_checkpointing,
        lowered=lowered,
        held=copy,
    )


def _lower_weights(unet: nn.Module) -> None:
    """Of layers whose products autocast lowers; norms stay as they are. Parameters here are aliases of the base's."""
    for module in unet.modules():
        if not isinstance(module, nn.GroupNorm | nn.LayerNorm | RowGroupNorm | RowLayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)


def _repeat_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Upsample what an Upsample2D is given: to twice the size, or to the size that it is given too."""
    pixels: Tensor = args[0]
    size = args[1] if len(args) > 1 else None
    if size is not None:
        return functional.interpolate(pixels, size=size, mode="nearest"), *args[1:]
    count, channels, height, width = pixels.shape
    # Channels last, as convolutions have it here: so it is one copy.
    spread = pixels.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return spread.reshape(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2), *args[1:]


class _Called(nn.Module):
    """What functional_call can call: it runs a module's `forward`, and rows go another way."""

    def __init__(self, unet: AdaptedUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *inputs: Any) -> Tensor:
        """Run the UNet with rows."""
        return self.unet.forward_rows(*inputs)


def _attention(
    module: Any, hidden: Tensor, context: Tensor, rows: tuple[int, ...], *, shared: bool
) -> dict[int, Tensor]:
    """Attention of some rows of a diffusers Attention, computed beside it: fused kernels do not give theirs."""
    # A list as index would be copied to the device, and waited for.
    chosen = to_device(torch.tensor(rows), hidden.device)
    if shared:
        query, key = module.to_q(hidden[chosen]), module.to_k(context[chosen])
    else:
        # Every sample has a row of its own: the layers know them by their places in the whole batch.
        query, key = module.to_q(hidden)[chosen], module.to_k(context)[chosen]
    heads = module.heads
    query, key = (part.unflatten(-1, (heads, -1)).transpose(1, 2).float() for part in (query, key))
    scores = (query @ key.transpose(-1, -2)) * module.scale
    return dict(zip(rows, scores.softmax(dim=-1), strict=True))

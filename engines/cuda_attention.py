"""Which kernel computes attention: torch's choice, cuDNN or xformers, by head size where that was found to matter.

Stable Diffusion 1.5 has heads of 40, 80 and 160 values, 2.x and XL of 64: no backend is the best at all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.engines.guided_attention import split_heads

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps query [N, heads, positions, width], key and value [N, heads, tokens, width] to what query is like."""


class AttentionKind(StrEnum):
    """A backend of scaled dot-product attention (Vaswani et al. 2017)."""

    SDPA = "sdpa"
    """torch chooses: flash attention, the memory-efficient kernel or plain products."""

    CUDNN = "cudnn"
    """cuDNN's, torch's choice where it cannot."""

    XFORMERS = "xformers"
    """xformers' memory-efficient attention, which must be installed."""


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """The backend of each head size; `default` for those not named."""

    default: AttentionKind = AttentionKind.SDPA
    by_width: Mapping[int, AttentionKind] = field(default_factory=dict)

    def kind(self, width: int) -> AttentionKind:
        """The backend of heads of `width` values."""
        return self.by_width.get(width, self.default)


class ChosenAttention:
    """An attention processor of diffusers that computes with one of the backends."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Map [N, positions, width], with the keys and values [N, tokens, ...] of cross-attention, to the same."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (split_heads(layer(source), attn.heads) for layer in (attn.to_k, attn.to_v))
        mixed = self._attend(query, key, value)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


def parse_attention(text: str) -> AttentionTable:
    """Read `engine.attention`: a backend, and after commas `WIDTH:BACKEND` for single head sizes.

    Raises InvalidArgument (SETTINGS_INVALID).
    """
    default, by_width = AttentionKind.SDPA, {}
    for number, part in enumerate(text.replace(" ", "").split(",")):
        width, colon, name = part.rpartition(":")
        if name not in set(AttentionKind) or (colon and not width.isdecimal()) or (number > 0 and not colon):
            raise InvalidArgument.for_field(
                "engine.attention",
                f"{text!r} is not understood at {part!r}; give {', '.join(AttentionKind)}, and for single head sizes "
                "WIDTH:BACKEND after commas, as in sdpa,80:cudnn",
                Reason.SETTINGS_INVALID,
            )
        if colon:
            by_width[int(width)] = AttentionKind(name)
        else:
            default = AttentionKind(name)
    return AttentionTable(default, by_width)


def set_attention(network: nn.Module, table: AttentionTable) -> None:
    """Give every attention of a diffusers UNet the backend of its head size.

    Raises FailedPrecondition (ENGINE_UNAVAILABLE) where xformers is wanted and not installed.
    """
    backends: dict[AttentionKind, ChosenAttention] = {}
    for name, module in network.named_modules():
        if name.endswith((".attn1", ".attn2")):
            attention: Any = module
            kind = table.kind(attention.inner_dim // attention.heads)
            if kind not in backends:
                backends[kind] = ChosenAttention(attend_with(kind))
            attention.set_processor(backends[kind])


def attend_with(kind: AttentionKind) -> Attend:
    """The function of a backend. Raises FailedPrecondition (ENGINE_UNAVAILABLE)."""
    if kind is AttentionKind.CUDNN:
        return _attend_cudnn
    return _load_xformers() if kind is AttentionKind.XFORMERS else _attend_sdpa


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value)


def _attend_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return functional.scaled_dot_product_attention(query, key, value)


def _load_xformers() -> Attend:
    try:
        operators: Any = import_module("xformers.ops")
    except ImportError as error:
        raise FailedPrecondition(
            Reason.ENGINE_UNAVAILABLE,
            "engine.attention names xformers, which is not installed or does not fit this torch; install xformers, or "
            "give sdpa or cudnn",
        ) from error

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # xformers takes [N, positions, heads, width].
        swapped = (part.transpose(1, 2) for part in (query, key, value))
        mixed: Tensor = operators.memory_efficient_attention(*swapped)
        return mixed.transpose(1, 2)

    return attend

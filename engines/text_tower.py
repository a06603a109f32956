"""One text encoder, run on the base's weights, with learned embeddings in the place of tokens."""

import copy
from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Weights = Mapping[str, Tensor]
"""Parameters that stand in for an encoder's own, by name."""

_OWN: Weights = MappingProxyType({})
Learned = tuple[Tensor, Tensor, Tensor]
"""Rows and positions [places], and the embeddings [places, width] that stand there."""


class TextTower:
    """A CLIP text encoder. It runs its own tree of modules over the base's weights, so its hooks are never seen by
    others who use the same encoder, and transformers' own signatures do not matter. One call at a time.

    A `penultimate` one gives the hidden states before its last layer, without the final norm, and pooled text if it
    has a projection, as SDXL reads them (Podell et al. 2023, section 2.1); else the last hidden states, normed.
    """

    def __init__(self, encoder: Any, *, penultimate: bool) -> None:
        shared = {id(t): t for t in chain(encoder.parameters(), encoder.buffers())}
        self._encoder: Any = copy.deepcopy(encoder, shared)
        self._penultimate = penultimate
        self._learned: Learned | None = None
        self._hidden: Tensor | None = None
        self.embeddings.register_forward_hook(self._replace)
        modules = dict(self._encoder.named_modules())
        norm = next(name for name in modules if name.endswith("final_layer_norm"))
        self._norm_prefix = f"{norm}."
        self.last_norm: Any = modules[norm]
        layers = next(m for name, m in modules.items() if name.endswith("encoder.layers"))
        # transformers passes hidden states by position or by name, as it likes.
        watched = layers[-1] if penultimate else self.last_norm
        watched.register_forward_pre_hook(self._keep, with_kwargs=True)

    @property
    def embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        module: nn.Module = self._encoder.get_input_embeddings()
        return module

    @property
    def width(self) -> int:
        """Width of embeddings and of hidden states."""
        return int(self._encoder.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(self._encoder.parameters()).device
        return device

    def run(self, ids: Tensor, learned: Learned | None, weights: Weights = _OWN) -> tuple[Tensor, Tensor | None]:
        """Encode ids [n, tokens]: contexts [n, tokens, width] and pooled text [n, projection width] or None, fp32.

        `weights` stand in for parameters by name; gradients reach them.
        """
        out, hidden = self._run(ids, learned, weights)
        if not self._penultimate:
            return out[0].float(), None
        pooled: Tensor | None = getattr(out, "text_embeds", None)
        return hidden.float(), None if pooled is None else pooled.float()

    def run_hidden(self, ids: Tensor, learned: Learned | None, weights: Weights = _OWN) -> tuple[Tensor, Tensor]:
        """Encode as `run` does; also return what the final norm was given. Not of a `penultimate` one."""
        out, hidden = self._run(ids, learned, weights)
        return out[0].float(), hidden

    def norm_last(self, hidden: Tensor, weights: Weights = _OWN) -> Tensor:
        """Put hidden states through the final norm, fp32."""
        own = {name.removeprefix(self._norm_prefix): t for name, t in weights.items() if self._is_of_norm(name)}
        normed: Tensor = functional_call(self.last_norm, own, (hidden,)) if own else self.last_norm(hidden)
        return normed.float()

    def _is_of_norm(self, parameter: str) -> bool:
        return parameter.startswith(self._norm_prefix)

    def _run(self, ids: Tensor, learned: Learned | None, weights: Weights) -> tuple[Any, Tensor]:
        self._learned = learned
        try:
            if weights:
                out = functional_call(self._encoder, dict(weights), (), {"input_ids": ids})
            else:
                out = self._encoder(input_ids=ids)
            hidden = self._hidden
        finally:
            self._learned = self._hidden = None
        if hidden is None:
            raise RuntimeError("the text encoder ran without its last layer")
        return out, hidden

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden = args[0] if args else kwargs["hidden_states"]

    def _replace(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._learned is None:
            return None
        rows, positions, vectors = self._learned
        return output.index_put((rows, positions), vectors.to(output))

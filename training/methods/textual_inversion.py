"""Textual Inversion (Gal et al. 2022) and its per-layer form P+ (Voynov et al. 2023): words alone.

The words themselves are every method's (training/words.py); this one learns nothing beside them.
"""

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.layout import BaseLayout
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.training.methods.learnable import Learned, Rows, Values
from hueshift.training.spec import Method


class WordsAlone:
    """No tensors of its own."""

    plan = Plan.DENSE

    def __init__(self, layout: BaseLayout, learning_rate: float) -> None:
        self.layout = RowLayout(layout, (), 1)
        self._learning_rate = learning_rate

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def learning_rate(self, name: str) -> float:
        """The job's; nothing asks for it."""
        return self._learning_rate

    def rows(self, values: Values) -> Rows:
        """The base's."""
        return Rows()

    def base_rows(self) -> Rows:
        """The base's."""
        return Rows()

    def adapter(self, values: Values) -> Learned:
        """An adapter for words to be put into."""
        adapter = Adapter(
            kind=AdapterKind.TOKENS, base_hash=self.layout.layout.base_hash, method=Method.TEXTUAL_INVERSION
        )
        return Learned(adapter)

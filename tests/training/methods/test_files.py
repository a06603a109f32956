"""What every method makes can be written as a file, read back, and put into an engine's row or its text side."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import make_spec

from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import compose_text_side
from hueshift.training.methods.make import make_learnable
from hueshift.training.spec import Method
from hueshift.training.words import Captions

Tiny = tuple[BaseModel, SpectralFactors]
# As a server with the default settings has them.
TARGETS = ("attn2.to_k", "attn2.to_v", "proj_out")
CASES: list[tuple[Method, dict[str, Any]]] = [
    (Method.SVDIFF, {}),
    (Method.RESIDUALS, {}),
    (Method.LORA, {"targets": TARGETS, "lora_init": "pissa"}),
    (Method.TEXTUAL_INVERSION, {}),
    (Method.TEXTUAL_INVERSION, {"per_layer": True}),
    (Method.CUSTOM_DIFFUSION, {}),
    (Method.CUSTOM_DIFFUSION, {"rank": 4}),
    (Method.DREAMBOOTH, {"targets": TARGETS}),
    (Method.DREAMBOOTH, {"rank": 0}),
]


@pytest.mark.parametrize(("method", "given"), CASES, ids=lambda value: str(value))
def test_an_adapter_survives_its_file_and_is_served(tiny: Tiny, method: Method, given: dict[str, Any]) -> None:
    base, factors = tiny
    spec = make_spec(method, **given)
    learnable = make_learnable(spec, base, factors)
    generator = torch.Generator().manual_seed(1)
    values = {
        name: start + 0.1 * torch.randn(start.shape, generator=generator)
        for name, start in learnable.initial(generator).items()
    }
    captions = Captions(base, TextStage(base), spec)
    tokens, grids = captions.tokens(captions.initial())
    adapter = replace(
        learnable.adapter(values).adapter, tokens=tokens, token_grids=grids, identifier="sks", class_noun="animal"
    )
    read = read_adapter(write_adapter(adapter), base.layout, FileLimits())
    assert (read.kind, read.method, read.identifier) == (adapter.kind, adapter.method, "sks")
    written, again = list(adapter.tensors()), list(read.tensors())
    assert len(written) == len(again) > 0
    assert sum(float(t.double().sum()) for t in again) == pytest.approx(sum(float(t.double().sum()) for t in written))
    served = RowLayout(base.layout, ("proj_out",), 16, text_side=False)
    norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
    row = served.compose([(read, 1.0)], factors, norms)
    side = compose_text_side([(read, 1.0)], factors)
    assert "sks" in side.words
    assert (row.spectral is not None) == (method is Method.SVDIFF)
    whole = method is Method.DREAMBOOTH and spec.rank == 0
    assert row.needs_weights == whole
    assert (row.lowrank is not None) == (method in (Method.RESIDUALS, Method.LORA, Method.DREAMBOOTH) and not whole)
    # What changes keys and values is on the text side; words are there in any case.
    assert bool(side.edits.nbytes) == (method not in (Method.RESIDUALS, Method.TEXTUAL_INVERSION))

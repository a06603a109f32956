"""Imported adapters on the engine: mixed parts of one file, alone and composed, against rebuilt weights.

Outputs agree within 3e-6 of the largest output (measured: 4e-7 to 8e-7, 2-core x86 CPU, 2026-11-20).
"""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from foreign_unet import error
from tiny_unet import SD1_LIKE, TinyParts, run, tiny_parts, tiny_unet
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.importing import import_adapter
from hueshift.engines.cross_attention import CrossStage
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.text_side import compose_text_side
from hueshift.engines.torch_engine import TorchEngine

BOUND = 3e-6
ENDINGS = ("proj_out", "to_q", "to_out.0")


@pytest.fixture(scope="module")
def parts() -> TinyParts:
    return tiny_parts(SD1_LIKE, targets=ENDINGS, rank=6)


def kohya_file(parts: TinyParts, *, norms: bool) -> bytes:
    """LoRA on every layer with a branch and on one without, and shifts of all norms."""
    draw = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer in parts.base.layout.matrices:
        if layer.name.endswith((*ENDINGS, "conv_in")):
            name = f"lora_unet_{layer.name.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = 0.1 * torch.randn(2, *layer.weight_shape[1:], generator=draw)
            tensors[f"{name}.lora_up.weight"] = torch.randn(layer.rows, 2, generator=draw)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    for norm in parts.base.layout.norms if norms else ():
        tensors[f"lora_unet_{norm.name.replace('.', '_')}.w_norm"] = 0.2 * torch.randn(norm.size, generator=draw)
    return safetensors.torch.save(tensors)


def imported(parts: TinyParts, *, norms: bool) -> Adapter:
    base = ImportBase(parts.base.layout, dict(parts.base.unet.named_parameters()))
    served = set(parts.rows.served_ranks)
    adapter, report = import_adapter(kohya_file(parts, norms=norms), base, ImportOptions(served=served))
    assert report is not None
    assert [left.keys for left in report.left_out] == [("conv_in",)]
    return adapter


@pytest.mark.parametrize("norms", [False, True])
def test_the_engine_draws_what_the_file_defines(parts: TinyParts, norms: bool) -> None:
    adapter = imported(parts, norms=norms)
    assert (adapter.kind, bool(adapter.norm)) == (AdapterKind.LOWRANK, norms)
    row = parts.row((adapter, 1.0))
    assert row.needs_factored is norms
    plan = Plan.FACTORED if norms else Plan.DENSE
    engine = TorchEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=4, max_batch=4, device=torch.device("cpu")
    )
    engine.load_row(1, row)
    # The truth has every layer merged, keys and values too; the engine reads those as an input.
    whole = replace(parts, rows=RowLayout(parts.base.layout, ENDINGS, 4))
    sample, timestep, context = whole.inputs(2)
    stage = CrossStage(parts.base, parts.factors)
    edits = [compose_text_side(mix, parts.factors).edits for mix in ([(adapter, 1.0)], [])]
    cross = torch.cat([stage.project(context[i : i + 1], context[i : i + 1], edits[i]) for i in (0, 1)])
    ours = engine.denoise(plan, sample, timestep, cross, torch.tensor([1, 0]))
    truth = whole.merged_output(whole.row((adapter, 1.0)), sample, timestep, context)
    assert error(ours[:1], truth[:1]) < BOUND
    unet = tiny_unet(parts.base.unet.config)
    unet.load_state_dict(parts.base.unet.state_dict())
    assert error(ours[1:], run(unet, sample, timestep, context)[1:]) < BOUND


def test_an_imported_adapter_mixes_with_a_spectral_one(parts: TinyParts) -> None:
    foreign, own = imported(parts, norms=True), parts.random_adapter(1)
    row = parts.row((foreign, 0.5), (own, 0.5))
    assert row.spectral is not None
    assert row.lowrank is not None
    alone = parts.row((replace(own, norm={}), 0.5), (foreign, 0.5), (replace(own, spectral={}), 0.5))
    assert alone.spectral is not None
    assert torch.allclose(row.spectral, alone.spectral, atol=1e-6)
    sample, timestep, context = parts.inputs(1)
    assert torch.isfinite(parts.merged_output(row, sample, timestep, context)).all()

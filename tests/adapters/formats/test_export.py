"""Files that we write in other programs' forms: those programs draw what we draw, and we read back what we wrote.

Outputs agree within 3e-6 of the largest output (measured: 6e-7 to 9e-7, 2-core x86 CPU, 2026-11-20).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from foreign_unet import adapted, base_of, error, foreign_unet, run
from lycoris import create_lycoris_from_weights
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter

BASE = base_of(foreign_unet())
LAYOUT = BASE.layout
BOUND = 3e-6


def lowrank(dtype: torch.dtype = torch.float32, *, norms: bool = False, words: bool = False) -> Adapter:
    """Products of several ranks and scales on linear layers and convolutions."""
    draw = torch.Generator().manual_seed(8)

    def noise(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape, generator=draw)).to(dtype)

    ends = ("to_k", "to_out.0", "conv1", "proj_in", "downsamplers.0.conv")
    layers = [layer for layer in LAYOUT.matrices if layer.name.endswith(ends)]
    factors = {
        layer.name: LowRankFactors(
            noise(1 + n % 3, layer.cols), noise(layer.rows, 1 + n % 3), (2.0, 0.75, -1.25)[n % 3]
        )
        for n, layer in enumerate(layers)
    }
    return Adapter(
        AdapterKind.LOWRANK,
        LAYOUT.base_hash,
        "residuals",
        lowrank=factors,
        norm={layer.name: noise(layer.size) for layer in LAYOUT.norms} if norms else {},
        tokens={"sks": noise(2, 24)} if words else {},
        identifier="sks" if words else "",
    )


def spectral(dtype: torch.dtype = torch.float32) -> Adapter:
    draw = torch.Generator().manual_seed(8)
    shifts = {layer.name: torch.randn(layer.rank, generator=draw).to(dtype) for layer in LAYOUT.matrices}
    return Adapter(AdapterKind.SPECTRAL, LAYOUT.base_hash, "svdiff", spectral=shifts)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [ExportForm.KOHYA, ExportForm.PEFT, ExportForm.HUESHIFT])
def test_low_rank_parts_come_back_as_they_were(form: ExportForm, dtype: torch.dtype) -> None:
    whole = form is not ExportForm.PEFT
    adapter = lowrank(dtype, norms=whole, words=whole)
    again, report = import_adapter(export_adapter(adapter, form, BASE).data, BASE)
    assert (again.kind, again.identifier) == (adapter.kind, adapter.identifier)
    assert again.lowrank.keys() == adapter.lowrank.keys()
    for layer, part in adapter.lowrank.items():
        other = again.lowrank[layer]
        assert other.a.dtype is other.b.dtype is dtype
        assert torch.equal(other.a, part.a)
        assert torch.equal(other.b, part.b)
        assert other.scale == pytest.approx(part.scale, rel=1e-7)
    for shifts, others in ((adapter.norm, again.norm), (adapter.tokens, again.tokens)):
        assert shifts.keys() == others.keys()
        assert all(torch.equal(shift, others[name]) and others[name].dtype is dtype for name, shift in shifts.items())
    # The file names the base it was written for, so nothing is assumed.
    assert report is None or report.notes == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_parts_come_back_as_they_were(dtype: torch.dtype) -> None:
    adapter = spectral(dtype)
    again, _ = import_adapter(export_adapter(adapter, ExportForm.MKSHING, BASE).data, BASE)
    assert again.spectral.keys() == adapter.spectral.keys()
    assert all(
        torch.equal(again.spectral[n], t) and again.spectral[n].dtype is dtype for n, t in adapter.spectral.items()
    )


def test_diffusers_draws_the_same_from_our_peft_file(tmp_path: Path) -> None:
    adapter = lowrank()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(export_adapter(adapter, ExportForm.PEFT, BASE).data)
    unet: Any = foreign_unet()
    unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=file.name)
    theirs = run(unet)
    assert error(run(foreign_unet()), theirs) > 0.05
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND


def test_diffusers_draws_the_same_from_our_kohya_file() -> None:
    # One rank and scale: diffusers 0.42.1 loses alphas that differ between layers of such a file.
    mixed = lowrank()
    chosen = {layer: part for layer, part in mixed.lowrank.items() if part.rank == 2}
    assert {part.scale for part in chosen.values()} == {0.75}
    adapter = replace(mixed, lowrank=chosen)
    tensors = safetensors.torch.load(export_adapter(adapter, ExportForm.KOHYA, BASE).data)
    state, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    unet: Any = foreign_unet()
    unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert error(run(adapted(foreign_unet(), adapter)), run(unet)) < BOUND


def test_lycoris_draws_the_same_from_our_kohya_file() -> None:
    adapter = lowrank()
    tensors = safetensors.torch.load(export_adapter(adapter, ExportForm.KOHYA, BASE).data)
    ours = run(adapted(foreign_unet(), adapter))
    renamed = {name.replace("lora_unet", "lycoris"): tensor for name, tensor in tensors.items()}
    plain = foreign_unet()
    network, _ = create_lycoris_from_weights(1.0, "", plain, weights_sd=renamed)
    network.apply_to()
    assert error(ours, run(plain)) < BOUND


@pytest.mark.parametrize(
    ("adapter", "form", "named"),
    [
        (spectral(), ExportForm.KOHYA, "spectral shifts"),
        (spectral(), ExportForm.PEFT, "spectral shifts"),
        (lowrank(norms=True), ExportForm.PEFT, "shifts of norms"),
        (lowrank(words=True), ExportForm.PEFT, "learned words"),
        (lowrank(), ExportForm.MKSHING, "low-rank parts"),
        (lowrank(), ExportForm.TEXTUAL_INVERSION, "low-rank parts"),
        (replace(spectral(), norm=lowrank(norms=True).norm), ExportForm.MKSHING, "not one multiple"),
    ],
)
def test_what_a_form_cannot_hold_is_refused_or_left_out_on_demand(
    adapter: Adapter, form: ExportForm, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        export_adapter(adapter, form, BASE)
    assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED
    partial = export_adapter(adapter, form, BASE, partial=True)
    assert any(named in note for note in partial.left_out)
    safetensors.torch.load(partial.data)


def test_another_base_model_is_refused_both_ways() -> None:
    with pytest.raises(FailedPrecondition):
        export_adapter(replace(lowrank(), base_hash="ee" * 32), ExportForm.KOHYA, BASE)
    other = replace(LAYOUT, base_hash="ee" * 32)
    data = export_adapter(replace(lowrank(), base_hash="ee" * 32), ExportForm.KOHYA, replace(BASE, layout=other)).data
    with pytest.raises(FailedPrecondition, match="ee" * 32):
        import_adapter(data, BASE)

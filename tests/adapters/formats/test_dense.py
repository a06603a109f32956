"""Whole weights and differences kept as full deltas: our UNet draws what theirs draws, and a rank can be had later.

Outputs agree within 1e-3 of the largest output, what half precision leaves of deltas (measured: 2.4e-4 at most, 2-core
x86 CPU, 2026-11-20).
"""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from dense_adapters import dense_adapter
from foreign_unet import adapted, base_of, error, foreign_unet, run
from torch import nn

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.difference import compare
from hueshift.adapters.formats.draft import DEFAULT_RANK, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.formats.inspect import inspect
from hueshift.adapters.layout import is_text_side
from hueshift.adapters.validate import FileLimits

BOUND = 1e-3
BASE = base_of(foreign_unet())
WHOLE = ImportOptions(dense=True)
NAMES = {layer.name for layer in BASE.layout.matrices}


def shaken(size: float = 0.02) -> nn.Module:
    """The UNet with noise on every weight, norms too, but on no bias."""
    unet = foreign_unet()
    draw = torch.Generator().manual_seed(8)
    for name, parameter in unet.named_parameters():
        if name.endswith("weight"):
            parameter.data.add_(size * torch.randn(parameter.shape, generator=draw))
    return unet


def whole_weights() -> bytes:
    return safetensors.torch.save(dict(shaken().state_dict()))


def differences(prefix: str = "lora_unet") -> bytes:
    """The same changes as LyCORIS's full differences."""
    base, tensors = foreign_unet().state_dict(), {}
    for name, weight in shaken().state_dict().items():
        layer, _, ending = name.rpartition(".")
        if ending == "weight":
            role = "diff" if layer in NAMES else "w_norm"
            tensors[f"{prefix}_{layer.replace('.', '_')}.{role}"] = weight - base[name]
    return safetensors.torch.save(tensors)


@pytest.mark.parametrize("data", [whole_weights(), differences(), differences("lycoris")], ids=["unet", "diff", "own"])
def test_whole_weights_and_differences_become_full_deltas(data: bytes) -> None:
    adapter, report = import_adapter(data, BASE, WHOLE)
    assert adapter.kind is AdapterKind.DENSE
    assert adapter.dense.keys() == {name for name in NAMES if not is_text_side(name)}
    assert adapter.kv.keys() == {name for name in NAMES if is_text_side(name)}
    assert {delta.dtype for delta in (*adapter.dense.values(), *adapter.kv.values())} == {torch.float16}
    assert (adapter.lowrank, len(adapter.norm)) == ({}, len(BASE.layout.norms))
    theirs = run(shaken())
    assert error(run(foreign_unet()), theirs) > 0.1
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert report is not None
    assert {(part.form, part.rank) for part in report.layers} == {("dense", 0), ("norm", 0)}
    # Half precision keeps 2^-11 of a value at the worst.
    assert 0 < report.error < 2.0**-11
    read_adapter(write_adapter(adapter), BASE.layout, FileLimits())


def test_the_low_rank_stays_what_is_made_unasked() -> None:
    adapter, _ = import_adapter(whole_weights(), BASE)
    assert (adapter.kind, adapter.dense) == (AdapterKind.LOWRANK, {})
    assert max(part.rank for part in adapter.lowrank.values()) == DEFAULT_RANK


def test_only_changed_layers_are_kept_and_low_rank_parts_stay_low_rank() -> None:
    tensors = {
        "lora_unet_conv_in.diff": torch.ones(BASE.parameter("conv_in.weight").shape),
        "lora_unet_conv_out.diff": torch.zeros(BASE.parameter("conv_out.weight").shape),
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.ones(2, 16),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.ones(64, 2),
    }
    adapter, report = import_adapter(safetensors.torch.save(tensors), BASE, WHOLE)
    assert (list(adapter.dense), list(adapter.lowrank)) == (["conv_in"], ["time_embedding.linear_1"])
    assert adapter.kind is AdapterKind.DENSE
    assert report is not None
    assert {part.layer for part in report.layers} == {"conv_in", "conv_out", "time_embedding.linear_1"}


def test_a_rank_and_full_deltas_exclude_each_other() -> None:
    with pytest.raises(InvalidArgument, match="given with rank 4") as caught:
        import_adapter(whole_weights(), BASE, ImportOptions(rank=4, dense=True))
    assert [violation.field for violation in caught.value.violations] == ["dense"]


def test_the_kohya_form_brings_full_deltas_back_to_the_bit() -> None:
    adapter, _ = import_adapter(whole_weights(), BASE, WHOLE)
    data = export_adapter(adapter, ExportForm.KOHYA, BASE).data
    again, report = import_adapter(data, BASE, WHOLE)
    assert report is not None
    assert report.error == 0
    for ours, theirs in ((again.dense, adapter.dense), (again.kv, adapter.kv)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], delta) for name, delta in theirs.items())
    assert export_adapter(again, ExportForm.KOHYA, BASE).data == data


def test_the_kohya_form_adds_a_low_rank_part_to_the_delta_of_its_layer() -> None:
    adapter = beside_low_rank(dense_adapter(BASE.layout, layers=["conv_in"]))
    again, _ = import_adapter(export_adapter(adapter, ExportForm.KOHYA, BASE).data, BASE, WHOLE)
    assert again.lowrank.keys() == {"conv_out"}
    assert error(run(adapted(foreign_unet(), again)), run(adapted(foreign_unet(), adapter))) < BOUND


@pytest.mark.parametrize(
    "form", [ExportForm.PEFT, ExportForm.MKSHING, ExportForm.TEXTUAL_INVERSION, ExportForm.CUSTOM_DIFFUSION]
)
def test_other_forms_refuse_full_deltas(form: ExportForm) -> None:
    adapter = dense_adapter(BASE.layout, layers=["conv_in"])
    with pytest.raises(InvalidArgument, match=r"cannot hold full deltas \('conv_in'\)") as caught:
        export_adapter(adapter, form, BASE)
    assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED


def beside_low_rank(adapter: Adapter) -> Adapter:
    """Low-rank parts of a layer that has a delta and of one that has none."""
    draw = torch.Generator().manual_seed(1)

    def part(name: str, rank: int) -> LowRankFactors:
        layer = BASE.layout.matrix(name)
        assert layer is not None
        a, b = torch.randn(rank, layer.cols, generator=draw), torch.randn(layer.rows, rank, generator=draw)
        return LowRankFactors(0.1 * a, b, 0.5)

    return replace(adapter, lowrank={"conv_in": part("conv_in", 2), "conv_out": part("conv_out", 3)})


def test_an_own_file_comes_down_to_a_rank() -> None:
    adapter = replace(
        beside_low_rank(dense_adapter(BASE.layout)), norm={"conv_norm_out": torch.ones(16)}, class_noun="dog"
    )
    data, change = write_adapter(adapter), run(adapted(foreign_unet(), adapter))
    exact, report = import_adapter(data, BASE, ImportOptions(rank=128))
    assert (exact.kind, exact.dense, exact.class_noun) == (AdapterKind.LOWRANK, {}, "dog")
    assert all(torch.equal(exact.kv[name], delta) for name, delta in adapter.kv.items())
    assert error(run(adapted(foreign_unet(), exact)), change) < 1e-5
    assert report is not None
    assert (report.format, report.error < 1e-6, report.notes) == ("hueshift", True, ())
    less, report = import_adapter(data, BASE, ImportOptions(rank=2))
    assert {part.rank for part in less.lowrank.values()} == {2}
    assert report is not None
    assert 0.2 < report.error < 1
    read_adapter(write_adapter(less), BASE.layout, FileLimits())
    same, nothing = import_adapter(data, BASE)
    assert (same.dense.keys(), nothing) == (adapter.dense.keys(), None)


def test_spectral_shifts_beside_deltas_cannot_come_down_to_a_rank() -> None:
    shift = {"conv_out": torch.ones(4)}
    data = write_adapter(replace(dense_adapter(BASE.layout, layers=["conv_in"]), spectral=shift))
    with pytest.raises(HueshiftError, match="spectral shifts beside its full deltas") as caught:
        import_adapter(data, BASE, ImportOptions(rank=4))
    assert caught.value.reason is Reason.ADAPTERS_INCOMPATIBLE


def test_inspect_and_diff_know_full_deltas() -> None:
    first, second = dense_adapter(BASE.layout, layers=["conv_in"]), dense_adapter(BASE.layout, 1, layers=["conv_in"])
    facts = inspect(write_adapter(first))
    assert (facts.kind, facts.parts, list(facts.norms)) == ("dense", {"full deltas": 1}, ["dense/conv_in"])
    assert facts.norms["dense/conv_in"] == pytest.approx(float(torch.linalg.norm(first.dense["conv_in"].double())))
    found = compare(write_adapter(first), write_adapter(second))
    assert [part.name for part in found.compared] == ["dense/conv_in"]
    assert not found.equal

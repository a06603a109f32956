"""Files that hold weights instead of changes: Custom Diffusion and DreamBooth as diffusers saves them.

Outputs agree within 3e-6 of the largest output (measured: 5e-7 to 7e-7, 2-core x86 CPU, 2026-11-20).
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from foreign_unet import BASE_HASH, WIDTH, adapted, base_of, error, foreign_unet, only_file, run
from text_side_adapters import gated, kv_deltas, layer_tokens, mapper
from torch import Tensor, nn

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import FailedPrecondition, HueshiftError, InvalidArgument, Reason
from hueshift.adapters.formats.draft import BIAS, ImportBase, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.folder import bundle
from hueshift.adapters.formats.importing import import_adapter
from hueshift.engines.base_model import read_layout

BOUND = 3e-6
BASE = base_of(foreign_unet())


def shaken(names: tuple[str, ...], size: float = 0.05, **changes: Any) -> nn.Module:
    """The UNet with noise on the parameters whose names end so."""
    unet = foreign_unet(**changes)
    draw = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():
        if name.endswith(names):
            parameter.data.add_(size * torch.randn(parameter.shape, generator=draw))
    return unet


def custom_diffusion(*, train_q_out: bool) -> Any:
    """The UNet with the processors of Custom Diffusion, trained a little."""
    unet: Any = foreign_unet()
    state = unet.state_dict()
    draw = torch.Generator().manual_seed(6)
    processors = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        if ".attn2" not in name:
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        hidden = state[f"{layer}.to_q.weight"].shape[0]
        made = CustomDiffusionAttnProcessor(True, train_q_out, hidden, WIDTH)
        for role in ("k", "v", *(("q", "out") if train_q_out else ())):
            ending = ".0" if role == "out" else ""
            weight = state[f"{layer}.to_{role}{ending}.weight"]
            target = made.get_submodule(f"to_{role}_custom_diffusion{ending}")
            target.weight.data.copy_(weight + 0.05 * torch.randn(weight.shape, generator=draw))
            if role == "out":
                target.bias.data.copy_(state[f"{layer}.to_out.0.bias"])
        processors[name] = made
    unet.set_attn_processor(processors)
    return unet


@pytest.mark.parametrize("train_q_out", [False, True])
def test_custom_diffusion_draws_the_same(train_q_out: bool, tmp_path: Path) -> None:
    unet = custom_diffusion(train_q_out=train_q_out)
    unet.save_attn_procs(tmp_path, safe_serialization=True)
    word = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"<new1>": word}, tmp_path / "new1.safetensors")
    adapter, report = import_adapter(bundle(tmp_path).data, BASE, ImportOptions(rank=64))
    theirs = run(unet)
    assert error(run(foreign_unet()), theirs) > 0.005
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert report is not None
    assert (report.format, report.words, report.left_out) == ("custom-diffusion", ("<new1>",), ())
    assert (adapter.identifier, torch.equal(adapter.tokens["<new1>"], word[None])) == ("<new1>", True)
    assert {name.rsplit(".attn2.", 1)[1] for name in adapter.lowrank} == (
        {"to_k", "to_v", "to_q", "to_out.0"} if train_q_out else {"to_k", "to_v"}
    )


@pytest.mark.parametrize("train_q_out", [False, True])
def test_custom_diffusion_becomes_deltas_of_keys_and_values(train_q_out: bool, tmp_path: Path) -> None:
    unet = custom_diffusion(train_q_out=train_q_out)
    unet.save_attn_procs(tmp_path, safe_serialization=True)
    adapter, report = import_adapter(only_file(tmp_path), BASE)
    names = {f"{name}.{side}" for name in BASE.layout.cross_attentions for side in ("to_k", "to_v")}
    assert adapter.kind is (AdapterKind.LOWRANK if train_q_out else AdapterKind.KV)
    assert adapter.kv.keys() == names
    assert {name.rsplit(".attn2.", 1)[1] for name in adapter.lowrank} == (
        {"to_q", "to_out.0"} if train_q_out else set()
    )
    state = foreign_unet().state_dict()
    for name in names:
        role = name.rsplit("_", 1)[1]
        theirs = (
            unet.get_submodule(name.rpartition(".")[0]).processor.get_submodule(f"to_{role}_custom_diffusion").weight
        )
        assert torch.allclose(adapter.kv[name], theirs.detach() - state[f"{name}.weight"], rtol=0, atol=1e-8)
    assert report is not None
    assert {part.form for part in report.layers if part.layer in names} == {"kv"}
    if not train_q_out:
        assert report.error == 0
        assert error(run(adapted(foreign_unet(), adapter)), run(unet)) < BOUND


def test_diffusers_draws_the_same_from_our_custom_diffusion_file(tmp_path: Path) -> None:
    # One attention keeps its weights, another only its keys: diffusers wants all of them named.
    whole = kv_deltas(BASE.layout, word="")
    first, second = BASE.layout.cross_attentions[:2]
    missing = {f"{first}.to_k", f"{first}.to_v", f"{second}.to_v"}
    adapter = replace(whole, kv={name: delta for name, delta in whole.kv.items() if name not in missing})
    data = export_adapter(adapter, ExportForm.CUSTOM_DIFFUSION, BASE).data
    (tmp_path / "weights.safetensors").write_bytes(data)
    unet: Any = foreign_unet()
    # diffusers 0.42.1 puts the processors in only where it is told of a pipeline.
    pipeline = SimpleNamespace(components={}, hf_device_map=None)
    unet.load_attn_procs(tmp_path, weight_name="weights.safetensors", _pipeline=pipeline)
    theirs = run(unet)
    assert error(run(foreign_unet()), theirs) > 0.005
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    again, report = import_adapter(data, BASE)
    # The value side of the second attention is the base's own: no delta.
    assert again.kv.keys() == adapter.kv.keys()
    for name, delta in adapter.kv.items():
        # What the form stores is W + delta in fp32.
        step = 2.0**-24 * BASE.parameter(f"{name}.weight").abs().max()
        assert float((again.kv[name] - delta).abs().max()) <= 2 * step
    assert report is not None
    assert not any("bound to this base" in note for note in report.notes)
    # From what the form holds, nothing more is lost.
    assert export_adapter(again, ExportForm.CUSTOM_DIFFUSION, BASE).data == data


def test_exports_name_the_text_side_parts_they_cannot_hold() -> None:
    layout = BASE.layout
    for adapter, form, named in (
        (kv_deltas(layout), ExportForm.CUSTOM_DIFFUSION, "learned words"),
        (kv_deltas(layout), ExportForm.TEXTUAL_INVERSION, "deltas of keys and values"),
        (layer_tokens(layout), ExportForm.TEXTUAL_INVERSION, "by layer or stage"),
        (mapper(layout), ExportForm.KOHYA, "made by a mapper"),
        (gated(layout), ExportForm.PEFT, "gated edits"),
    ):
        with pytest.raises(InvalidArgument, match=named) as caught:
            export_adapter(adapter, form, BASE)
        assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED
        assert any(named in note for note in export_adapter(adapter, form, BASE, partial=True).left_out)
        again, _ = import_adapter(export_adapter(adapter, ExportForm.HUESHIFT, BASE).data, BASE)
        assert again.words == adapter.words


def test_a_changed_output_bias_is_reported(tmp_path: Path) -> None:
    unet = custom_diffusion(train_q_out=True)
    processor = next(p for name, p in unet.attn_processors.items() if ".attn2" in name)
    processor.to_out_custom_diffusion[0].bias.data.add_(1)
    unet.save_attn_procs(tmp_path, safe_serialization=True)
    _, report = import_adapter(only_file(tmp_path), BASE)
    assert report is not None
    assert [(left.count, left.reason) for left in report.left_out] == [(1, BIAS)]


WEIGHTS = ("to_k.weight", "conv1.weight", "norm1.weight", "conv_in.weight")


def test_a_dreambooth_folder_draws_the_same(tmp_path: Path) -> None:
    unet: Any = shaken(WEIGHTS)
    unet.save_pretrained(tmp_path / "model" / "unet")
    (tmp_path / "model" / "vae").mkdir()
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model" / "vae" / "v.safetensors")
    bundled = bundle(tmp_path / "model")
    assert "not vae/" in bundled.note
    adapter, report = import_adapter(bundled.data, BASE, ImportOptions(rank=128))
    theirs = run(unet)
    assert error(run(foreign_unet()), theirs) > 0.1
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert report is not None
    assert (report.format, report.left_out, report.error < 1e-6) == ("dense", (), True)
    assert all(name.endswith(("to_k", "conv1", "conv_in")) for name in adapter.lowrank)
    assert all(name.endswith("norm1") for name in adapter.norm)


def test_compression_states_the_energy_it_keeps() -> None:
    data = safetensors.torch.save(shaken(WEIGHTS).state_dict())
    kept = []
    for rank in (2, 8, 16):
        adapter, report = import_adapter(data, BASE, ImportOptions(rank=rank))
        assert report is not None
        assert max(part.rank for part in adapter.lowrank.values()) == rank
        kept.append(report.kept_energy)
    assert 0.1 < kept[0] < kept[1] < kept[2] < 1 + 1e-9


def test_rounding_is_not_learning() -> None:
    state = {name: tensor.half() for name, tensor in foreign_unet().state_dict().items()}
    with pytest.raises(InvalidArgument, match="it changes nothing"):
        import_adapter(safetensors.torch.save(state), BASE)
    state["conv_in.weight"] = state["conv_in.weight"] + 0.5
    adapter, _ = import_adapter(safetensors.torch.save(state), BASE)
    assert (list(adapter.lowrank), list(adapter.norm)) == (["conv_in"], [])


def test_a_checkpoint_reports_what_is_not_the_unet() -> None:
    tensors: dict[str, Tensor] = {
        "model.diffusion_model.input_blocks.0.0.weight": BASE.parameters["conv_in.weight"] + 1,
        "model.diffusion_model.out.2.bias": BASE.parameters["conv_out.bias"] + 1,
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.decoder.conv_in.weight": torch.ones(2, 2),
        "alphas_cumprod": torch.ones(1000),
    }
    adapter, report = import_adapter(safetensors.torch.save(tensors), BASE)
    assert list(adapter.lowrank) == ["conv_in"]
    assert report is not None
    assert sorted((left.count, left.reason.split(";")[0][:22]) for left in report.left_out) == [
        (1, "it changes a bias"),
        (1, "it changes the text en"),
        (2, "it belongs to neither "),
    ]


def test_weights_of_another_model_are_refused() -> None:
    other = safetensors.torch.save(foreign_unet(block_out_channels=[32, 64]).state_dict())
    with pytest.raises(HueshiftError) as caught:
        import_adapter(other, BASE)
    assert (caught.value.reason, "another base model" in caught.value.message) == (Reason.ADAPTER_SHAPE_MISMATCH, True)


def test_without_the_base_weights_such_files_are_refused() -> None:
    bare = ImportBase(read_layout(foreign_unet(), BASE_HASH, WIDTH))
    with pytest.raises(FailedPrecondition, match="not at hand"):
        import_adapter(safetensors.torch.save(shaken(WEIGHTS).state_dict()), bare)

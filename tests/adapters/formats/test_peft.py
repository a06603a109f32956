"""Files that PEFT and diffusers write: our UNet with the imported adapter draws what theirs draws.

Outputs agree within 3e-6 of the largest output (measured: 5e-7 to 1.3e-6, 2-core x86 CPU, 2026-11-20).
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from foreign_unet import adapted, base_of, error, foreign_unet, only_file, randomize, run
from torch import Tensor, nn

from hueshift.adapters.errors import FailedPrecondition, HueshiftError, InvalidArgument, Reason
from hueshift.adapters.formats.draft import ImportOptions
from hueshift.adapters.formats.folder import bundle
from hueshift.adapters.formats.importing import import_adapter

BOUND = 3e-6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj", "downsamplers.0.conv"]
BASE = base_of(foreign_unet())


def trained(seed: int = 0, **config: Any) -> nn.Module:
    """The UNet with a PEFT LoRA that changes something."""
    unet: Any = foreign_unet()
    unet.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}))
    randomize([p for name, p in unet.named_parameters() if "lora_A" in name or "lora_B" in name], seed)
    result: nn.Module = unet
    return result


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {
            "rank_pattern": {"attn2.to_k": 2, "^down_blocks.0.attentions.0.proj_in": 6},
            "alpha_pattern": {"attn2.to_k": 3, ".*conv1": 1},
        },
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"to_v": 2}},
    ],
    ids=["plain", "alpha", "rslora", "patterns", "dora", "dora-rslora"],
)
def test_a_file_of_diffusers_draws_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    unet: Any = trained(**config)
    unet.save_lora_adapter(tmp_path)
    adapter, report = import_adapter(only_file(tmp_path), BASE, ImportOptions(rank=64))
    theirs = run(unet)
    assert error(run(foreign_unet()), theirs) > 0.1
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert report is not None
    assert (report.format, report.error < 1e-6, report.left_out) == ("peft", True, ())
    assert {layer.form for layer in report.layers} == {"dora" if config.get("use_dora") else "lora"}
    assert len(report.notes) == 1
    assert "bound to this base model" in report.notes[0]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 1}}),
        (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}),
        (peft.LoHaConfig, {"r": 3, "alpha": 2}),
        (peft.LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True}),
        (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_factor": 4}),
        (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True}),
    ],
    ids=["lora", "dora", "loha", "loha-conv", "lokr", "lokr-conv"],
)
def test_a_folder_of_peft_draws_the_same(kind: Any, config: dict[str, Any], tmp_path: Path) -> None:
    model: Any = peft.get_peft_model(foreign_unet(), kind(target_modules=TARGETS, **config))
    mine = ("lora_A", "lora_B", "hada_", "lokr_")
    randomize([p for name, p in model.named_parameters() if any(part in name for part in mine)], size=0.2)
    model.save_pretrained(tmp_path)
    adapter, report = import_adapter(bundle(tmp_path).data, BASE, ImportOptions(rank=128))
    theirs = run(model)
    assert error(run(foreign_unet()), theirs) > 0.01
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert report is not None
    assert len(report.notes) == 1


def test_low_rank_parts_keep_their_values_and_dtypes(tmp_path: Path) -> None:
    unet: Any = trained().half()
    unet.save_lora_adapter(tmp_path)
    stored = safetensors.torch.load(only_file(tmp_path))
    adapter, _ = import_adapter(only_file(tmp_path), BASE)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    part = adapter.lowrank[name]
    assert part.a.dtype is torch.float16
    assert torch.equal(part.a, stored[f"{name}.lora_A.weight"])
    assert torch.equal(part.b, stored[f"{name}.lora_B.weight"])
    assert part.scale == 2.0


NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
GENERATIONS = {
    "processor": (f"{NAME}.processor.to_out_lora.{{}}.weight", "down", "up"),
    "lora": (f"unet.{NAME}.to_out.0.lora.{{}}.weight", "down", "up"),
    "lora-old-out": (f"unet.{NAME}.to_out.lora.{{}}.weight", "down", "up"),
    "linear-layer": (f"unet.{NAME}.to_out.0.lora_linear_layer.{{}}.weight", "down", "up"),
    "peft": (f"base_model.model.{NAME}.to_out.0.{{}}.weight", "lora_A", "lora_B"),
    "peft-named": (f"base_model.model.unet.{NAME}.to_out.0.{{}}.default.weight", "lora_A", "lora_B"),
    "dotted-kohya": (f"unet.{NAME}.to_out.0.{{}}.weight", "lora_down", "lora_up"),
}


def pair(rank: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rank, 16, generator=draw), torch.randn(16, rank, generator=draw)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_names_is_understood(generation: str) -> None:
    pattern, down, up = GENERATIONS[generation]
    a, b = pair()
    adapter, report = import_adapter(safetensors.torch.save({pattern.format(down): a, pattern.format(up): b}), BASE)
    assert list(adapter.lowrank) == [f"{NAME}.to_out.0"]
    part = adapter.lowrank[f"{NAME}.to_out.0"]
    assert torch.equal(part.scale * part.b @ part.a, b @ a)
    assert report is not None
    assert any("no configuration" in note for note in report.notes)


def test_an_alpha_beside_the_factors_counts() -> None:
    a, b = pair()
    names = {
        f"{NAME}.to_q.lora.down.weight": a,
        f"{NAME}.to_q.lora.up.weight": b,
        f"{NAME}.to_q.alpha": torch.tensor(1),
    }
    adapter, report = import_adapter(safetensors.torch.save(names), BASE)
    assert adapter.lowrank[f"{NAME}.to_q"].scale == 0.5
    assert report is not None
    assert len(report.notes) == 1


def test_text_encoder_layers_are_reported_and_can_be_forbidden() -> None:
    a, b = pair()
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"unet.{NAME}.to_q.lora_A.weight": a, f"unet.{NAME}.to_q.lora_B.weight": b}
    tensors |= {f"{text}.lora_A.weight": a, f"{text}.lora_B.weight": b}
    data = safetensors.torch.save({name: t.clone() for name, t in tensors.items()})
    _, report = import_adapter(data, BASE)
    assert report is not None
    (left,) = report.left_out
    assert (left.count, "text encoder" in left.reason, left.keys[0].startswith(text)) == (2, True, True)
    with pytest.raises(InvalidArgument, match="text encoder") as caught:
        import_adapter(data, BASE, ImportOptions(complete=True))
    assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED


def refusal(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **options: Any) -> HueshiftError:
    data = safetensors.torch.save({name: t.clone() for name, t in tensors.items()}, metadata)
    with pytest.raises(HueshiftError) as caught:
        import_adapter(data, BASE, ImportOptions(**options))
    return caught.value


def test_what_does_not_fit_is_refused_by_name() -> None:
    a, b = pair()
    key = f"unet.{NAME}.to_q.lora_{{}}.weight"
    alone = refusal({key.format("A"): a})
    assert (alone.reason, "no partner" in alone.message) == (Reason.ADAPTER_FILE_INVALID, True)
    wide = refusal({key.format("A"): a[:, :7], key.format("B"): b})
    assert (wide.reason, key.format("A") in wide.message) == (Reason.ADAPTER_SHAPE_MISMATCH, True)
    other = refusal({"unet.no.such.layer.lora_A.weight": a, key.format("A"): a, key.format("B"): b})
    assert (other.reason, "no.such.layer" in other.message) == (Reason.ADAPTER_TENSOR_UNKNOWN, True)
    foreign = refusal({"unet.no.such.layer.lora_A.weight": a, "unet.no.such.layer.lora_B.weight": b})
    assert isinstance(foreign, FailedPrecondition)
    assert foreign.reason is Reason.ADAPTER_BASE_MISMATCH
    nan = a.clone()
    nan[1, 3] = float("nan")
    broken = refusal({key.format("A"): nan, key.format("B"): b})
    assert (broken.reason, "[1, 3]" in broken.message) == (Reason.ADAPTER_NOT_FINITE, True)
    absurd = refusal({key.format("A"): torch.ones(3000, 16), key.format("B"): torch.ones(16, 3000)})
    assert (absurd.reason, "rank 3000" in absurd.message) == (Reason.ADAPTER_RANK_TOO_LARGE, True)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"r": 0, "lora_alpha": 1}, "r is 0"),
        ({"r": 2, "lora_alpha": "x"}, "lora_alpha"),
        ({"r": 2, "lora_alpha": 1, "peft_type": "OFT"}, "OFT"),
        ({"r": 2, "lora_alpha": 1, "alpha_pattern": {"(a+)+$": 1}}, "'(a+)+$'"),
        ({"r": 2, "lora_alpha": 1, "alpha_pattern": {"x" * 300: 1}}, "allowed: layer names"),
        ({"r": 2, "lora_alpha": 1, "rank_pattern": {"to_q": 0}}, "rank below 1"),
        ([1], "not a JSON object"),
    ],
)
def test_a_wrong_configuration_is_refused_by_field(config: Any, named: str) -> None:
    a, b = pair()
    tensors = {f"{NAME}.to_q.lora_A.weight": a, f"{NAME}.to_q.lora_B.weight": b}
    error_found = refusal(tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert (error_found.reason, named in error_found.message) == (Reason.ADAPTER_FILE_INVALID, True)

"""Files that LyCORIS writes, under kohya's names and its own: our UNet draws what theirs draws.

Outputs agree within 3e-6 of the largest output (measured: 5e-7 to 1.2e-6, 2-core x86 CPU, 2026-11-20).
"""

import logging
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_unet import adapted, base_of, error, foreign_unet, randomize, run
from lycoris import LycorisNetwork, create_lycoris
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.adapters.formats.draft import BIAS, DEFAULT_RANK, ImportOptions
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.formats.report import ImportReport

BOUND = 3e-6
BASE = base_of(foreign_unet())
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"linear_dim": 4, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 1}),
    "locon-tucker": ("lora", {"linear_dim": 4, "linear_alpha": 2, "use_tucker": True}),
    "dora": ("lora", {"linear_dim": 4, "linear_alpha": 2, "dora_wd": True}),
    "dora-inputs": ("lora", {"linear_dim": 4, "linear_alpha": 2, "dora_wd": True, "wd_on_output": False}),
    "loha": ("loha", {"linear_dim": 3, "linear_alpha": 2}),
    "loha-tucker": ("loha", {"linear_dim": 3, "linear_alpha": 2, "use_tucker": True}),
    "loha-dora": ("loha", {"linear_dim": 3, "linear_alpha": 2, "dora_wd": True}),
    "lokr": ("lokr", {"linear_dim": 2, "linear_alpha": 1, "factor": 4}),
    "lokr-both": ("lokr", {"linear_dim": 1, "linear_alpha": 3, "factor": 4, "decompose_both": True}),
    "lokr-tucker": ("lokr", {"linear_dim": 2, "linear_alpha": 1, "use_tucker": True, "decompose_both": True}),
    "lokr-whole": ("lokr", {"linear_dim": 100, "linear_alpha": 1, "factor": 4}),
    "full": ("full", {}),
    "norms": ("lora", {"linear_dim": 2, "train_norm": True}),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def trained(algorithm: str, options: dict[str, Any], prefix: str) -> tuple[bytes, Tensor]:
    """The file of a LyCORIS network over the tiny UNet, and what that UNet draws with it. Biases are left alone."""
    preset = {"target_module": ["Linear", "Conv2d", "GroupNorm", "LayerNorm"], "target_name": [], "lora_prefix": prefix}
    LycorisNetwork.apply_preset(preset)
    unet = foreign_unet()
    network: Any = create_lycoris(unet, 1.0, algo=algorithm, **options)
    network.apply_to()
    network.eval()
    named = [(name, p) for name, p in network.named_parameters() if "org_" not in name]
    if algorithm == "full":
        draw = torch.Generator().manual_seed(2)
        for name, parameter in named:
            if name.endswith("weight"):
                parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    else:
        size = 0.05 if algorithm == "lora" else 0.3
        randomize([p for name, p in named if "dora_scale" not in name and "b_norm" not in name], size=size)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return safetensors.torch.save(state), run(unet)


def imported(data: bytes, **options: Any) -> tuple[Adapter, ImportReport]:
    adapter, report = import_adapter(data, BASE, ImportOptions(**options))
    assert report is not None
    return adapter, report


@pytest.mark.parametrize(
    ("name", "prefix"), [*((name, "lora_unet") for name in ALGORITHMS), ("lora", "lycoris"), ("lokr", "lycoris")]
)
def test_a_file_draws_the_same(name: str, prefix: str) -> None:
    algorithm, options = ALGORITHMS[name]
    data, theirs = trained(algorithm, options, prefix)
    adapter, report = imported(data, rank=128)
    assert error(run(foreign_unet()), theirs) > 0.02
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert (report.format, report.left_out) == ("kohya", ())
    assert report.error < 1e-6
    if name == "norms":
        assert set(adapter.norm) == {layer.name for layer in BASE.layout.norms}


@pytest.mark.parametrize("name", ["loha", "lokr", "full"])
def test_a_lower_rank_loses_what_the_report_says(name: str) -> None:
    data, _ = trained(*ALGORITHMS[name], "lora_unet")
    exact, _ = imported(data, rank=128)
    rough, report = imported(data)
    # Three times three is the largest rank of an elementwise product of two products of rank three.
    assert max(part.rank for part in rough.lowrank.values()) == (9 if name == "loha" else DEFAULT_RANK)
    lost = total = 0.0
    stated = {layer.layer: layer for layer in report.layers}
    for layer, part in exact.lowrank.items():
        whole = part.b.double() @ part.a.double()
        other = rough.lowrank[layer]
        gap = float(torch.linalg.norm(whole - other.b.double() @ other.a.double()))
        norm = float(torch.linalg.norm(whole))
        assert stated[layer].error == pytest.approx(gap / norm, abs=1e-6)
        # Eckart and Young: no product of that rank is closer.
        best = float(torch.linalg.svdvals(whole)[DEFAULT_RANK:].square().sum().sqrt())
        assert name != "loha" or gap < 1e-6 * norm
        assert gap == pytest.approx(best, rel=1e-4, abs=1e-6 * norm)
        lost, total = lost + gap**2, total + norm**2
    assert report.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert report.kept_energy == pytest.approx(1 - lost / total, abs=1e-6)


def tensors_of(data: bytes) -> dict[str, Tensor]:
    return dict(safetensors.torch.load(data))


def refusal(tensors: dict[str, Tensor], **options: Any) -> HueshiftError:
    with pytest.raises(HueshiftError) as caught:
        import_adapter(safetensors.torch.save(tensors), BASE, ImportOptions(**options))
    return caught.value


def test_changed_biases_are_reported_and_can_be_forbidden() -> None:
    tensors = tensors_of(trained(*ALGORITHMS["norms"], "lora_unet")[0])
    key = next(name for name in tensors if name.endswith("b_norm"))
    tensors[key] = torch.ones_like(tensors[key])
    _, report = imported(safetensors.torch.save(tensors))
    assert [(left.count, left.keys, left.reason) for left in report.left_out] == [(1, (key,), BIAS)]
    assert key in refusal(tensors, complete=True).message


def test_leftover_and_unsupported_tensors_are_named() -> None:
    tensors = tensors_of(trained(*ALGORITHMS["lora"], "lora_unet")[0])
    strange = refusal({**tensors, "lora_unet_conv_in.surprise": torch.ones(1)})
    assert (strange.reason, "lora_unet_conv_in.surprise" in strange.message) == (Reason.ADAPTER_TENSOR_UNKNOWN, True)
    rotation = refusal({**tensors, "lora_unet_conv_in.oft_blocks": torch.ones(2, 2, 2)})
    assert (rotation.reason, "OFT" in rotation.message) == (Reason.ADAPTER_TARGET_UNSUPPORTED, True)
    twice = refusal({**tensors, "lora_unet_input_blocks_0_0.diff": torch.ones(16, 4, 3, 3)})
    assert "'conv_in' is changed twice" in twice.message


def test_products_that_no_memory_holds_are_refused_before_they_are_made() -> None:
    name = "lora_unet_conv_in"
    kron = refusal(
        {
            f"{name}.lokr_w1": torch.ones(1, 1),
            f"{name}.lokr_w2_a": torch.ones(1 << 20, 1),
            f"{name}.lokr_w2_b": torch.ones(1, 1 << 20),
        }
    )
    assert kron.reason is Reason.ADAPTER_SHAPE_MISMATCH
    hada = {f"{name}.hada_w{n}_{side}": torch.ones(shape) for n in (1, 2) for side, shape in _WIDE.items()}
    assert refusal(hada).reason is Reason.ADAPTER_SHAPE_MISMATCH


_WIDE = {"a": (1 << 20, 1), "b": (1, 1 << 20)}


def test_parts_without_low_rank_branch_can_be_left_out() -> None:
    data, _ = trained(*ALGORITHMS["lora"], "lora_unet")
    served = {layer.name for layer in BASE.layout.matrices if layer.name.endswith("to_q")}
    adapter, report = imported(data, served=served)
    assert set(adapter.lowrank) == served
    assert report.left_out[0].count == len(BASE.layout.matrices) - len(served)
    assert 0 < report.error < 1
    with pytest.raises(InvalidArgument):
        imported(data, served=set())


def test_a_rank_brings_large_files_down_and_too_large_ones_are_refused() -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    draw = torch.Generator().manual_seed(0)
    name = f"lora_unet_{layer.replace('.', '_')}"
    down = torch.randn(20, 64, generator=draw)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.randn(16, 20, generator=draw)}
    # Rank 20 of a layer that has 16: brought to 16 without a loss.
    adapter, report = imported(safetensors.torch.save(tensors))
    assert (adapter.lowrank[layer].rank, report.error < 1e-6) == (16, True)
    adapter, report = imported(safetensors.torch.save(tensors), rank=3)
    assert (adapter.lowrank[layer].rank, report.error > 0.1) == (3, True)
    assert "allowed: 0 to 128" in refusal(tensors, rank=129).message

"""SVDiff files of mkshing's program. It cannot be installed here, so its forward is written out: for every layer
W' = U diag(relu(S + delta)) V^T, where a norm's weight is a matrix of one row.

Outputs agree within 3e-6 of the largest output (measured: no difference, 2-core x86 CPU, 2026-11-20).
"""

import pytest
import safetensors.torch
import torch
from foreign_unet import adapted, base_of, error, foreign_unet, run
from torch import Tensor, nn

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter

BASE = base_of(foreign_unet())
BOUND = 3e-6


def shifts(dtype: torch.dtype = torch.float32, size: float = 0.3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(9)
    layout = BASE.layout
    lengths = {layer.name: layer.rank for layer in layout.matrices} | {layer.name: 1 for layer in layout.norms}
    return {f"{name}.delta": (size * torch.randn(count, generator=draw)).to(dtype) for name, count in lengths.items()}


def reference(deltas: dict[str, Tensor]) -> nn.Module:
    unet = foreign_unet()
    for key, delta in deltas.items():
        weight = unet.get_parameter(key.replace(".delta", ".weight"))
        matrix = weight.unsqueeze(0) if weight.dim() == 1 else weight.flatten(1)
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        weight.data.copy_((u @ torch.diag(torch.relu(s + delta.double())) @ vh).reshape(weight.shape))
    return unet


def test_a_file_draws_the_same() -> None:
    deltas = shifts()
    # One norm is switched off: its only singular value is clamped at zero.
    deltas["conv_norm_out.delta"] = torch.tensor([-1e3])
    data = safetensors.torch.save({**deltas, "text_model.encoder.layers.0.mlp.fc1.delta": torch.ones(3)})
    adapter, report = import_adapter(data, BASE)
    theirs = run(reference(deltas))
    assert error(run(foreign_unet()), theirs) > 0.1
    assert error(run(adapted(foreign_unet(), adapter)), theirs) < BOUND
    assert not adapter.norm["conv_norm_out"].add(BASE.parameters["conv_norm_out.weight"]).any()
    assert report is not None
    assert (adapter.kind, report.format, report.error) == (AdapterKind.SPECTRAL, "mkshing", 0.0)
    assert [(left.count, "text encoder" in left.reason) for left in report.left_out] == [(1, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_comes_back_as_it_was(dtype: torch.dtype) -> None:
    deltas = shifts(dtype)
    adapter, _ = import_adapter(safetensors.torch.save(deltas), BASE)
    stored = safetensors.torch.load(export_adapter(adapter, ExportForm.MKSHING, BASE).data)
    assert stored.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert stored[name].dtype is dtype
        if name.removesuffix(".delta") in adapter.norm:
            # Through a full-length fp32 shift and back: exact in half precision, to rounding in single.
            assert torch.allclose(stored[name].float(), delta.float(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(stored[name], delta)


def test_shapes_of_another_program_are_refused() -> None:
    with pytest.raises(HueshiftError) as caught:
        import_adapter(safetensors.torch.save({"conv_norm_out.delta": torch.ones(16)}), BASE)
    assert (caught.value.reason, "another SVDiff program" in caught.value.message) == (
        Reason.ADAPTER_SHAPE_MISMATCH,
        True,
    )
    with pytest.raises(HueshiftError) as caught:
        import_adapter(safetensors.torch.save({"conv_in.delta": torch.ones(16), "x.y.delta": torch.ones(2)}), BASE)
    assert (caught.value.reason, "x.y.delta" in caught.value.message) == (Reason.ADAPTER_TENSOR_UNKNOWN, True)

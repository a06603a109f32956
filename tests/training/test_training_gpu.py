"""Training on a GPU: the CPU's losses, resumed bit for bit, alone as in company, eagerly as in a graph."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from tiny_training import Recorder, make_spec, make_tiny_base, run_job

from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.cuda_lane import CudaLane
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.models.embedded import EMBEDDED_MODEL
from hueshift.training.devices import prepare_device, release_memory
from hueshift.training.held_factors import HeldFactors
from hueshift.training.methods.make import make_learnable
from hueshift.training.sharing.compiled import inductor
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.spec import Method
from hueshift.training.unet import TrainingUNet, make_unet

pytestmark = pytest.mark.gpu

Tiny = tuple[BaseModel, SpectralFactors]
FP32: dict[str, Any] = {"precision": "fp32", "steps": 12, "checkpoint_interval": 4}
LIMIT = 600.0


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The GPU, made ready as a worker does, or a reason to skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = torch.device("cuda", 0)
    prepare_device(found)
    yield found
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def far(device: torch.device) -> Tiny:
    """The tiny base with everything on the GPU."""
    tiny, factors = make_tiny_base(load_base_model(EMBEDDED_MODEL, device=str(device)))
    tiny.unet.to(device)
    return tiny, factors


@pytest.mark.parametrize("method", Method)
def test_a_gpu_has_the_losses_of_a_cpu(far: Tiny, tiny: Tiny, tmp_path: Path, method: Method) -> None:
    spec = make_spec(method, **FP32)
    there, here = run_job(far, spec, tmp_path / "gpu"), run_job(tiny, spec, tmp_path / "cpu")
    # Later losses differ more: Adam makes full steps of gradients that are rounding alone.
    assert there.losses[:3] == pytest.approx(here.losses[:3], rel=1e-3)
    assert there.losses == pytest.approx(here.losses, rel=5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [Method.SVDIFF, Method.LORA, Method.DREAMBOOTH])
def test_a_stopped_job_goes_on_bit_for_bit(far: Tiny, tmp_path: Path, method: Method, precision: str) -> None:
    spec = make_spec(method, **{**FP32, "precision": precision})
    whole = run_job(far, spec, tmp_path / "whole")

    def stop(name: str, step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(far, spec, tmp_path / "stopped", Recorder(on_point=stop))
    assert run_job(far, spec, tmp_path / "stopped").losses == whole.losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_a_whole_picture_repeats_its_gradients(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 8, 4096, 40, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(2, 8, 4096, 40, generator=generator).to(device, dtype)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return torch.autograd.grad([out], parts, [gradient])

    first = gradients()
    for _ in range(8):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["none", "graph", "inductor"])
@pytest.mark.parametrize("method", [Method.SVDIFF, Method.LORA])
def test_company_graphs_and_compiling_change_nothing_but_rounding(
    far: Tiny, device: torch.device, tmp_path: Path, method: Method, way: str
) -> None:
    specs = [make_spec(method, **FP32, seed=seed) for seed in (8, 9, 10)]
    compiler = inductor if way == "inductor" else None
    lane = None if way == "none" else CudaLane(device)
    sharing = SharedTraining(*far, patience=20.0, lane=lane, compiler=compiler)
    with capture_logs() as logs, ThreadPoolExecutor(len(specs)) as pool:
        jobs = [
            pool.submit(run_job, far, spec, tmp_path / f"shared {number}", None, sharing)
            for number, spec in enumerate(specs)
        ]
        together = [job.result(LIMIT) for job in jobs]
    assert not [line for line in logs if line["event"] == "training.compile_failed"]
    assert sharing.rounds[3] > 0
    for number, (spec, shared) in enumerate(zip(specs, together, strict=True)):
        alone = run_job(far, spec, tmp_path / f"alone {number}")
        assert shared.losses[:3] == pytest.approx(alone.losses[:3], rel=1e-4)
        assert shared.losses == pytest.approx(alone.losses, rel=5e-2)


def test_held_factors_take_memory_once(far: Tiny, device: torch.device) -> None:
    spec, held = make_spec(**FP32), HeldFactors(*far)
    learnable = make_learnable(spec, *far)

    def taken() -> tuple[TrainingUNet, int]:
        before = torch.cuda.memory_allocated(device)
        return make_unet(*far, learnable, spec, held), torch.cuda.memory_allocated(device) - before

    (first, most), (second, least) = taken(), taken()
    # The second has the norms and copies of convolutions that are not factored.
    assert least < most / 4
    assert not held.release()
    del first, second
    assert held.release()


def test_jobs_leave_no_memory_behind(far: Tiny, device: torch.device, tmp_path: Path) -> None:
    def held(number: int) -> int:
        run_job(far, make_spec(Method.DREAMBOOTH, **FP32, seed=number), tmp_path / str(number))
        release_memory(device)
        return torch.cuda.memory_allocated(device)

    first = held(0)
    assert [held(number) for number in (1, 2)] == [first, first]

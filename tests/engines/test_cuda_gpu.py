"""The CUDA engine on a GPU: parity with torch, swaps under load, the base bit for bit, no growth of memory."""

import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_unet import SD1_LIKE, SD2_LIKE, TinyParts, tiny_parts, whole_adapter
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.cuda_attention import AttentionKind, AttentionTable
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import CudaLane, make_beside
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.cuda_setup import build_cuda
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, Guides, Plan
from hueshift.engines.planner import Planner
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.gpu

# Widths that the kernels' tiles and 16-byte rows take; two blocks keep it small.
WIDE = {"block_out_channels": [64, 128], "norm_num_groups": 8, "cross_attention_dim": 24}
TOLERANCE = 3e-2


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The GPU, or a reason to skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="module", params=[SD1_LIKE, SD2_LIKE], ids=["sd1", "sd2"])
def parts(request: pytest.FixtureRequest) -> TinyParts:
    """A base of each kind."""
    return tiny_parts({**request.param, **WIDE})


def make_engine(parts: TinyParts, device: torch.device, cache: Path, **options: object) -> CudaEngine:
    """A warm engine of five slots and two weight slots."""
    given: dict[str, object] = {"warm_sizes": ((8, 8),), "max_area": 256, "weight_slots": 2}
    given |= {"slot_weight_bytes": 1 << 24, **options}
    return build_cuda(
        parts.base,
        parts.factors,
        parts.rows,
        parts.norms,
        slots=5,
        max_batch=8,
        options=CudaOptions(**given),  # type: ignore[arg-type]  # a test's options by name
        lane=CudaLane(device),
        cache_dir=cache,
        progress=lambda stage, done, total: None,
    )


def adapter_rows(parts: TinyParts) -> list[EngineRow]:
    """Spectral and low-rank rows, and the base's."""
    kinds = (AdapterKind.SPECTRAL, AdapterKind.LOWRANK, AdapterKind.SPECTRAL)
    return [parts.row((parts.random_adapter(seed, kind), 0.3)) for seed, kind in enumerate(kinds)] + [EngineRow()]


def reference(parts: TinyParts) -> TorchEngine:
    """torch in fp32 on the CPU."""
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    return TorchEngine(*given, slots=5, max_batch=8, device=torch.device("cpu"))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("kernels", "most"), [(KernelUse.OFF, 0), (KernelUse.ON, 0), (KernelUse.ON, 1 << 24)])
@pytest.mark.parametrize("compile", [CompileKind.NONE, CompileKind.GRAPH, CompileKind.INDUCTOR])
def test_every_plan_equals_torch(
    parts: TinyParts, device: torch.device, tmp_path: Path, compile: CompileKind, kernels: KernelUse, most: int
) -> None:
    engine = make_engine(parts, device, tmp_path, compile=compile, kernels=kernels, slot_weight_bytes=most)
    assert bool(engine.networks.slot_weights.weights) is bool(most)
    expected = reference(parts)
    for slot, row in enumerate(adapter_rows(parts), 1):
        engine.load_row(slot, row)
        expected.load_row(slot, row)
    inputs = parts.inputs(5)
    for plan in SLAB_PLANS:
        index = torch.tensor([0, 2, 4, 2, 0]) if plan is Plan.DENSE else torch.tensor([0, 1, 2, 3, 4])
        for _ in range(3):
            found = engine.denoise(plan, *inputs, index)
            assert relative(found, expected.denoise(plan, *inputs, index)) < TOLERANCE
    for slot in (1, 2, BASE_SLOT):
        engine.merge(slot)
        engine.finish_merges()
        torch.cuda.synchronize()
        assert slot in engine.merged
        index = torch.full((5,), slot)
        found = engine.denoise(Plan.MERGED, *inputs, index)
        assert relative(found, expected.denoise(Plan.FACTORED, *inputs, index)) < TOLERANCE


@pytest.mark.parametrize("warm", [(8, 8), (16, 16)], ids=["warmed", "met"])
def test_guided_calls_are_replayed_and_equal_the_eager_form(
    parts: TinyParts, device: torch.device, tmp_path: Path, warm: tuple[int, int]
) -> None:
    def engine(compile: CompileKind) -> CudaEngine:
        made = make_engine(parts, device, tmp_path, compile=compile, weight_slots=0, warm_sizes=(warm,))
        for slot, row in enumerate(adapter_rows(parts), 1):
            made.load_row(slot, row)
        return made

    captured, eager = engine(CompileKind.GRAPH), engine(CompileKind.NONE)
    before = captured.graphs.captures
    for turn, rows in enumerate((8, 5, 5, 8, 5)):
        inputs, own = [part.to(device) for part in parts.inputs(rows, turn)], torch.arange(rows)
        lag = torch.zeros(rows, inputs[2].shape[1], device=device)
        lag[::2, 1 + turn % 2] = 1
        guides = Guides(lag, own // 2 * 2, own if turn % 2 else own // 4 * 4)
        index = torch.tensor([1, 2, 0, 2, 4, 3, 2, 1][:rows])
        given = (inputs[0], inputs[1], inputs[2], index, guides)
        (found, mask), (expected, wanted) = captured.denoise_guided(*given), eager.denoise_guided(*given)
        # A share of attention that rounds to the other side of the median changes one position of a mask.
        assert float((mask != wanted).float().mean()) < 0.02, turn
        assert relative(found, expected.cpu()) < TOLERANCE, turn
    assert captured.graphs.captures - before == (0 if warm == (8, 8) else 2)


@pytest.mark.parametrize("kind", [AttentionKind.SDPA, AttentionKind.CUDNN])
def test_attention_backends_equal_torch(
    parts: TinyParts, device: torch.device, tmp_path: Path, kind: AttentionKind
) -> None:
    engine = make_engine(parts, device, tmp_path, attention=AttentionTable(kind), weight_slots=0)
    inputs, index = parts.inputs(2), torch.tensor([0, 0])
    found = engine.denoise(Plan.DENSE, *inputs, index)
    assert relative(found, reference(parts).denoise(Plan.DENSE, *inputs, index)) < TOLERANCE


def test_a_thousand_swaps_under_load_leave_nothing_behind(
    parts: TinyParts, device: torch.device, tmp_path: Path
) -> None:
    engine, rows = make_engine(parts, device, tmp_path, kernels=KernelUse.ON), adapter_rows(parts)
    own = {name: part[BASE_SLOT].clone() for name, part in engine.networks.slot_weights.weights.items()}
    assert own
    inputs, base = [part.to(device) for part in parts.inputs(2)], torch.full((2,), BASE_SLOT)
    plans = (Plan.DENSE, Plan.FACTORED, Plan.MERGED)

    def run(plan: Plan, index: Tensor) -> Tensor:
        return engine.denoise(plan, inputs[0], inputs[1], inputs[2], index)

    before = [run(plan, base).clone() for plan in plans]
    alone = {}
    for number, row in enumerate(rows):
        engine.load_row(1, row)
        alone[number] = run(Plan.FACTORED, torch.full((2,), 1)).clone()
    torch.cuda.synchronize()
    captures, addresses = engine.graphs.captures, engine.buffers.addresses
    memory: list[int] = []
    stop = threading.Event()

    def load() -> None:
        """Keep the GPU busy beside the engine, as decoding does."""
        other = torch.randn(512, 512, device=device)
        while not stop.is_set():
            other = (other @ other).tanh()
            torch.cuda.synchronize()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        generator = torch.Generator().manual_seed(3)
        for turn in range(1000):
            slot = 1 + int(torch.randint(4, (), generator=generator))
            number = int(torch.randint(len(rows), (), generator=generator))
            engine.load_row(slot, rows[number])
            merges = int(torch.randint(4, (), generator=generator)) == 0
            if merges:
                engine.merge(slot)
            index = torch.full((2,), slot)
            found = run(Plan.MERGED if merges else Plan.FACTORED, index)
            assert relative(found, alone[number].cpu()) < TOLERANCE, turn
            if turn % 100 == 99:
                torch.cuda.synchronize()
                memory.append(torch.cuda.memory_allocated(device))
    finally:
        stop.set()
        thread.join()
    after = [run(plan, base) for plan in plans]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(engine.networks.slot_weights.weights[name][BASE_SLOT], part) for name, part in own.items())
    assert engine.graphs.captures == captures
    assert engine.buffers.addresses == addresses
    # The other thread's two products may or may not be held when it is looked at.
    assert max(memory) - min(memory) <= 8 * 2**20


def test_whole_deltas_are_drawn_from_weights_of_their_own_without_a_capture(
    parts: TinyParts, device: torch.device, tmp_path: Path
) -> None:
    engine, expected = make_engine(parts, device, tmp_path), reference(parts)
    inputs, index = parts.inputs(2), torch.tensor([2, 2])
    captures, memory = engine.graphs.captures, []
    for turn in range(20):
        row = parts.row((whole_adapter(parts, turn, share=0.5 + 0.5 * (turn % 2)), 1.0)).each(Tensor.pin_memory)
        for other in (engine, expected):
            other.load_row(2, row)
        # At once: the call waits for the weights, which are written beside the steps.
        found = engine.denoise(Plan.MERGED, *inputs, index)
        assert relative(found, expected.denoise(Plan.MERGED, *inputs, index)) < TOLERANCE
        torch.cuda.synchronize()
        memory.append(torch.cuda.memory_allocated(device))
    engine.load_row(2, EngineRow())
    engine.merge(2)
    engine.finish_merges()
    torch.cuda.synchronize()
    found = engine.denoise(Plan.MERGED, *inputs, index)
    assert relative(found, reference(parts).denoise(Plan.FACTORED, *inputs, index)) < TOLERANCE
    assert engine.graphs.captures == captures
    assert max(memory[1:]) - min(memory[1:]) <= 8 * 2**20


def test_a_refused_capture_leaves_the_callers_stream_alone(device: torch.device) -> None:
    lane, before = CudaLane(device), torch.cuda.current_stream(device)
    one = torch.ones(1, device=device)
    before_bytes = torch.cuda.memory_stats(device)["active_bytes.all.current"]

    def read_back() -> None:
        one.item()

    with pytest.raises(RuntimeError):
        lane.capture(read_back)
    assert torch.cuda.current_stream(device) == before
    assert float(one + 1) == 2
    # Nor does it go on for ever for the allocator: its cache can be emptied, what was lent comes back, and the lane's
    # next capture is made.
    torch.cuda.empty_cache()
    for _ in range(8):
        make_beside(lane, partial(torch.zeros, 1 << 20, device=device), lambda made: (made,))
        torch.cuda.synchronize()
    torch.empty(1, device=device)
    assert torch.cuda.memory_stats(device)["active_bytes.all.current"] - before_bytes < 4 << 22

    def add() -> None:
        one.add_(1)

    lane.capture(add)()
    torch.cuda.synchronize()
    assert float(one) == 2


def test_memory_is_measured_held_and_given_back(device: torch.device) -> None:
    lane, size = CudaLane(device), 1 << 28
    torch.cuda.empty_cache()
    before = lane.free_bytes()
    with lane.holding(size):
        assert lane.free_bytes() <= before - size
        with pytest.raises(torch.cuda.OutOfMemoryError), lane.holding(before):
            pytest.fail("more than there is was given")
    assert lane.free_bytes() > before - size // 2

    def work() -> None:
        torch.empty(size, dtype=torch.uint8, device=device).fill_(1)

    assert size <= lane.peak_bytes(work) < 2 * size
    assert lane.free_bytes() > before - size // 2


def test_what_was_lent_is_not_written_again_while_it_is_read(device: torch.device) -> None:
    lane, copies = CudaLane(device), list[Tensor]()
    for turn in range(50):
        made = make_beside(lane, partial(torch.full, (1 << 20,), float(turn), device=device), lambda made: (made,))
        # The reader is late, and by then nobody holds what it reads.
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
        copies.append(made.clone())
        del made
    torch.cuda.synchronize()
    assert [float(copy.min()) for copy in copies] == [float(copy.max()) for copy in copies] == list(range(50))


def test_planned_steps_give_the_pictures_of_steps_alone(parts: TinyParts, device: torch.device, tmp_path: Path) -> None:
    engine, rows = make_engine(parts, device, tmp_path), adapter_rows(parts)
    assert engine.costs is not None
    for slot, row in enumerate(rows, 1):
        engine.load_row(slot, row)
    table = make_table(parts.base.schedule, SamplerKind.DPMPP_2M, 8)

    def sample(slot: int) -> Sample:
        cross = CrossInputs((parts.inputs(2, seed=slot)[2].to(device),))
        needs = rows[slot - 1].needs_factored
        return start_sample(slot, (4, 8, 8), cross=cross, guidance=4.0, table=table, slot=slot, needs_factored=needs)

    alone = [sample(slot) for slot in range(1, 5)]
    for one in alone:
        while not one.done:
            advance(engine, [one], Plan.FACTORED)
    planner = Planner(engine, engine.costs)
    together = [sample(slot) for slot in range(1, 5)]
    while not together[0].done:
        for run in planner.decide(together, {}).runs:
            advance(engine, [together[number] for number in run.members], run.plan)
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents.cpu()) < 2 * TOLERANCE

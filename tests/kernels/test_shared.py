"""What the kernels share: launch tables, tiles, packed factors, the adapter index, and life without Triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hueshift.kernels import launch_table
from hueshift.kernels.adapter_index import NO_ADAPTER, make_index
from hueshift.kernels.checks import check_apart, check_index
from hueshift.kernels.compare import relative_error
from hueshift.kernels.errors import KernelArgumentError, KernelUnavailableError
from hueshift.kernels.launch import Launch
from hueshift.kernels.launch_table import SHARED_MEMORY_LIMITS, architecture, candidates, choose
from hueshift.kernels.memory_format import channels_last, columns_in_memory_order
from hueshift.kernels.tiles import MatrixShape, order_tiles, pack, packed_rows

STEMS = [
    "spectral_reassemble",
    "lowrank_merge",
    "lowrank_residual",
    "lowrank_linear",
    "factored_linear",
    "factored_conv",
    "slot_linear",
    "group_norm",
    "layer_norm",
    "gated_gelu",
    "residual_add",
    "sampler_step",
    "lag_mask",
]


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMITS)
def test_every_kernel_has_configurations_and_each_says_what_it_rests_on(arch: str) -> None:
    table = launch_table.load(arch)
    assert table["architecture"] == arch
    assert sorted(table["kernels"]) == sorted(STEMS)
    for kernel, classes in table["kernels"].items():
        for shape_class in classes:
            configs = candidates(arch, kernel, shape_class)
            assert len(
                {json.dumps([c.constants, c.num_warps, c.num_stages, c.programs_per_sm]) for c in configs}
            ) == len(configs)
            for config in configs:
                assert config.measured
                assert config.programs_per_sm >= 1


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="sm_70"):
        candidates("sm_70", "sampler_step")
    with pytest.raises(KernelArgumentError, match="no launch configuration for nothing/any"):
        candidates("sm_90", "nothing")
    with pytest.raises(KernelArgumentError, match="sampler_step/odd"):
        choose(torch.device("cpu"), "sampler_step", "odd")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_89"),
    ],
)
def test_architecture_follows_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda")) == arch


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelUnavailableError, match=r"7\.5"):
        architecture(torch.device("cuda"))


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (31, 33), (64, 32), (65, 100), (4, 7)])
def test_packed_blocks_hold_the_factor_and_zeros(rows: int, depth: int) -> None:
    factor = torch.randn(rows, depth)
    into = torch.zeros(packed_rows(rows, depth, 32, 16), 16)
    pack(factor, into, 32, 16)
    down, deep = -(-rows // 32), -(-depth // 16)
    back = into.view(down, deep, 32, 16).permute(0, 2, 1, 3).reshape(down * 32, deep * 16)
    assert torch.equal(back[:rows, :depth], factor)
    assert int((into != 0).sum()) == factor.numel()


def test_tiles_cover_every_matrix_once_longest_sums_first() -> None:
    shapes = [MatrixShape(65, 200, 8), MatrixShape(10, 10, 64), MatrixShape(128, 40, 32)]
    tiles = order_tiles(shapes, 64, 64)
    assert len(set(tiles)) == len(tiles) == 2 * 4 + 1 + 2
    depths = [shapes[tile.matrix].depth for tile in tiles]
    assert depths == sorted(depths, reverse=True)
    first = [tile for tile in tiles if tile.matrix == 0]
    # The shorter side, two rows, runs fastest.
    assert [(tile.row, tile.col) for tile in first[:3]] == [(0, 0), (1, 0), (0, 1)]


def test_columns_follow_the_memory_of_the_weight() -> None:
    weight = torch.randn(3, 2, 3, 3)
    factor = torch.randn(5, 18)
    assert torch.equal(columns_in_memory_order(factor, weight), factor)
    last = weight.to(memory_format=torch.channels_last)
    assert channels_last(last)
    assert not channels_last(torch.randn(3, 2, 1, 1).to(memory_format=torch.channels_last))
    permuted = columns_in_memory_order(weight.reshape(3, 18), last)
    assert torch.equal(permuted.reshape(-1), torch.as_strided(last, (54,), (1,)))


def test_indices_are_checked_before_the_upload() -> None:
    index = make_index([0, NO_ADAPTER, 2], slots=3, device=torch.device("cpu"))
    assert index.tolist() == [0, -1, 2]
    assert index.dtype == torch.int32
    assert make_index([], slots=1, device=torch.device("cpu")).shape == (0,)
    for values, allowed in (([3], True), ([-2], True), ([-1], False)):
        with pytest.raises(KernelArgumentError, match=r"index\[0\]"):
            make_index(values, slots=3, device=torch.device("cpu"), none_allowed=allowed)
    with pytest.raises(KernelArgumentError, match="index has shape"):
        check_index("index", torch.zeros(1, 1, dtype=torch.int32), 0, 1)


def test_overlap_is_seen_through_views() -> None:
    buffer = torch.zeros(10)
    check_apart("a", buffer[:5], "b", buffer[5:])
    check_apart("a", buffer[:0], "b", buffer)
    with pytest.raises(KernelArgumentError, match="overlap"):
        check_apart("a", buffer[:6], "b", buffer[5:])


def test_nan_never_passes_for_close() -> None:
    assert not relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) <= 1e9
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_without_triton_everything_imports_and_the_cpu_path_works() -> None:
    script = """
import importlib, sys, torch
sys.modules["triton"] = None
for stem in sys.argv[1:]:
    importlib.import_module("hueshift.kernels." + stem)
from hueshift.kernels.errors import KernelUnavailableError
from hueshift.kernels.launch import Launch, block_descriptor
from hueshift.kernels.lowrank_residual import lowrank_residual
y = lowrank_residual(torch.zeros(1, 2, 3), torch.ones(1, 2, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 1),
                     torch.tensor([0]), torch.ones(1))
assert torch.equal(y, torch.full((1, 2, 3), 4.0)), y
for action in (Launch(None, (1,), {}, {}, 4, 1).run, lambda: block_descriptor(y, (1, 1))):
    try:
        action()
    except KernelUnavailableError as error:
        assert "hueshift[gpu]" in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-P", "-c", script, *STEMS], check=True, timeout=120)


def test_an_empty_grid_launches_nothing() -> None:
    pytest.importorskip("triton")
    Launch(None, (0, 3), {}, {}, 4, 1).run()


def test_each_kernel_has_its_test_and_its_benchmark() -> None:
    project = Path(__file__).resolve().parents[2]
    for stem in STEMS:
        for path in (f"kernels/{stem}.py", f"tests/kernels/test_{stem}.py", f"benchmarks/{stem}.py"):
            assert (project / path).is_file(), path

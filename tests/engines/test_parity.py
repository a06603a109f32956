"""A graph that differs from torch never serves."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.engines.graph_writer import WEIGHTS_FILE
from hueshift.engines.interface import SLAB_PLANS, Guides, Plan
from hueshift.engines.onnx_export import entry_folder, write_manifest
from hueshift.engines.parity import check_parity
from hueshift.engines.rows import RowLayout

pytestmark = pytest.mark.usefixtures("one_thread")


def options(folder: Path, bound: float = 1e-4) -> EngineOptions:
    return EngineOptions(cache_dir=folder, kind="onnxruntime", threads=1, parity_bound=bound, lowrank_rank=4)


def test_error_of_each_plan_is_small_logged_and_handed_over(tiny: TinyParts, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    with capture_logs() as logs:
        build_engine(tiny.base, options(tmp_path), on_parity=seen.__setitem__)
    assert set(seen) == set(SLAB_PLANS)
    # Exactly zero would mean that the graph was compared with itself.
    assert all(0 < error < 1e-5 for error in seen.values())
    assert {log["plan"]: log["error"] for log in logs if log["event"] == "engine_parity"} == seen


@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_tampered_graph_is_refused(tiny: TinyParts, tmp_path: Path, plan: Plan) -> None:
    """One changed weight, and a manifest that fits it: the digests agree, only the comparison can tell."""
    build_engine(tiny.base, options(tmp_path))
    folder = entry_folder(tiny.base, RowLayout(tiny.base.layout, ("proj_out",), 4, text_side=False), plan, tmp_path)
    weights = np.fromfile(folder / WEIGHTS_FILE, dtype=np.float32)
    weights[np.argmax(np.abs(weights))] += 3.0
    weights.tofile(folder / WEIGHTS_FILE)
    write_manifest(folder)
    with pytest.raises(FailedPrecondition, match=f"the {plan} graph differs from torch") as caught:
        build_engine(tiny.base, options(tmp_path))
    assert caught.value.reason is Reason.ENGINE_PARITY
    assert json.loads(json.dumps(caught.value.metadata))["plan"] == plan


def test_bound_is_kept(tiny: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        build_engine(tiny.base, options(tmp_path, bound=1e-12))
    assert caught.value.reason is Reason.ENGINE_PARITY


@pytest.mark.parametrize("wrong", ["ignores spectral", "ignores lowrank", "mixes samples", "nan"])
def test_what_the_comparison_must_notice(tiny: TinyParts, wrong: str) -> None:
    """Engines that are right for the base alone, or for a batch of one, or that give nothing at all."""
    unet = AdaptedUNet(tiny.base, tiny.factors, tiny.rows, Plan.FACTORED)

    def run_graph(
        plan: Plan,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        index: Tensor,
        spectral: Tensor,
        lowrank: Tensor,
        guides: Guides | None,
        added: Tensor | None,
    ) -> tuple[Tensor]:
        if wrong == "ignores spectral":
            spectral = spectral[:1].repeat(len(spectral), 1)
        elif wrong == "ignores lowrank":
            lowrank = torch.zeros_like(lowrank)
        elif wrong == "mixes samples":
            index = index.flip(0)
        with torch.no_grad():
            out: Tensor = unet(sample, timestep, cross, index, spectral, lowrank)
        return (out * (math.nan if wrong == "nan" else 1),)

    with pytest.raises(FailedPrecondition):
        check_parity(
            run_graph,
            (Plan.FACTORED,),
            base=tiny.base,
            factors=tiny.factors,
            rows=tiny.rows,
            norms=tiny.norms,
            bound=1e-3,
        )

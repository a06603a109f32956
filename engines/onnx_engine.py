"""The ONNX Runtime engine: the exported graphs on a CPU, 1.6 to 1.8 times as fast as torch there."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.graph_guides import MASK
from hueshift.engines.graph_unet import OUTPUT
from hueshift.engines.interface import EngineRow, Guides, Plan, no_guides
from hueshift.engines.rows import RowLayout
from hueshift.engines.slabs import Slabs
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.torch_engine import example_added, example_inputs

Array = npt.NDArray[np.generic]


class OnnxEngine:
    """Runs one exported graph for each plan. Implements UNetEngine.

    Inputs are read where torch holds them: every array given to the runtime is a view, and the slabs are the same
    memory in every call.
    """

    name = "onnxruntime"
    plans = (Plan.DENSE, Plan.FACTORED, Plan.FULL)

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        norms: Mapping[str, Tensor],
        graphs: Mapping[Plan, Path],
        *,
        slots: int,
        max_batch: int,
        threads: int = 0,
    ) -> None:
        self.rows = rows
        self.factors = factors
        self.norms = norms
        self.max_batch = max_batch
        self._base = base
        self._slabs = Slabs(rows, factors, norms, slots)
        self._sessions = {plan: open_session(graph, threads) for plan, graph in graphs.items()}
        self._inputs = {plan: {i.name for i in session.get_inputs()} for plan, session in self._sessions.items()}

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._slabs.slots

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine."""
        self._slabs.load(slot, row)

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet once; see UNetEngine."""
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        slabs = self._slabs
        inputs = (latents, timesteps, cross, adapter_index, slabs.spectral, slabs.lowrank)
        return self.run_graph(plan, *inputs, added=added)[0]

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the full plan once; see UNetEngine."""
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        inputs = (latents, timesteps, cross, adapter_index, self._slabs.spectral, self._slabs.lowrank)
        out, mask = self.run_graph(Plan.FULL, *inputs, guides, added)
        return out, mask

    def run_graph(
        self,
        plan: Plan,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        spectral_slab: Tensor,
        lowrank_slab: Tensor,
        guides: Guides | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the graph of `plan` on any slabs; shapes and dtypes as in onnx_export. The dense one ignores spectral.

        Returns the output, and under Plan.FULL the masks.
        """
        given = {
            "sample": sample,
            "timestep": timestep,
            "cross": cross,
            "adapter_index": adapter_index,
            "spectral_slab": spectral_slab,
            "lowrank_slab": lowrank_slab,
        }
        if added is not None:
            given["added"] = added
        if plan is Plan.FULL:
            guides = guides or no_guides(cross)
            given |= {"lag": guides.lag, "lag_source": guides.lag_source, "reference": guides.reference}
        feeds = {name: _view(tensor) for name, tensor in given.items() if name in self._inputs[plan]}
        outputs = [OUTPUT, MASK] if plan is Plan.FULL else [OUTPUT]
        return tuple(torch.from_numpy(array) for array in self._sessions[plan].run(outputs, feeds))

    def warm(self) -> None:
        """Run every plan once."""
        inputs, added = example_inputs(self._base, 2), example_added(self._base, 2)
        for plan in self.plans:
            self.denoise(plan, *inputs, added)


def open_session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load a graph on the CPU with `threads` threads; 0 means one per core.

    Loading optimises the graph in 0.3 to 0.8 s for emoji-128 (CPU time of a 2-core x86 CPU, 2026-11-20), too little
    to keep a second, machine-specific copy on disk.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while they wait take the cores from decoding, training workers and torch: with ten processes on
    # two cores a call at batch 2 took 524 ms spinning and 369 ms not, and 187 against 110 ms of CPU time
    # (emoji-128, dense, 2-core x86 CPU, 2026-11-20).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _view(tensor: Tensor) -> Array:
    """The tensor's own memory as an array; a copy only if it is not contiguous."""
    array: Array = tensor.detach().contiguous().numpy()
    return array

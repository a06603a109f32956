"""The memory that adapter rows live in while an engine serves them: one slab per kind of row, one slot per mix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.interface import BASE_SLOT, EngineRow
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors


class Slabs:
    """`spectral` [slots, spectral_size] fp32 and `lowrank` [slots, lowrank_size], filled with the base's own values.

    `lowrank` is held in `lowrank_dtype`: fp16 where the layers convert it for their products anyway.
    They are allocated once and never move: graphs read them by address, and loading a row is a copy into them.
    """

    def __init__(
        self,
        rows: RowLayout,
        factors: SpectralFactors,
        norms: Mapping[str, Tensor],
        slots: int,
        device: torch.device | None = None,
        *,
        lowrank_dtype: torch.dtype = torch.float32,
    ) -> None:
        if slots < 2:
            raise InvalidArgument.for_field(
                "engine.slots", f"{slots} is too few; one is the base's own, give 2 or more"
            )
        base = rows.base_spectral(factors, norms)
        self.spectral = base.to(device).repeat(slots, 1)
        self.lowrank = torch.zeros(slots, rows.lowrank_size, device=device, dtype=lowrank_dtype)

    @property
    def slots(self) -> int:
        """Slots in all."""
        return self.spectral.shape[0]

    def load(self, slot: int, row: EngineRow) -> None:
        """Overwrite the whole slot with `row`; nothing of what was there remains.

        Raises InvalidArgument on the base's slot, a slot that does not exist, or a row of another size or dtype.
        """
        if not BASE_SLOT < slot < self.slots:
            raise InvalidArgument.for_field("slot", f"{slot} cannot be loaded; allowed are 1 to {self.slots - 1}")
        for name, values, slab in (("spectral", row.spectral, self.spectral), ("lowrank", row.lowrank, self.lowrank)):
            if values is not None and (values.dtype != torch.float32 or values.shape != slab.shape[1:]):
                raise InvalidArgument.for_field(
                    f"row.{name}",
                    f"{values.dtype} {tuple(values.shape)} does not fit; it must be torch.float32 "
                    f"{tuple(slab.shape[1:])}",
                )
        self.spectral[slot].copy_(self.spectral[BASE_SLOT] if row.spectral is None else row.spectral, non_blocking=True)
        if row.lowrank is None:
            self.lowrank[slot].zero_()
        else:
            self.lowrank[slot].copy_(row.lowrank, non_blocking=True)

    def check_call(self, rows: int, max_batch: int, adapter_index: Tensor) -> None:
        """Raise InvalidArgument if a call's batch is too large or names a slot that does not exist."""
        if not 1 <= rows <= max_batch:
            raise InvalidArgument.for_field("latents", f"{rows} rows; a call takes 1 to {max_batch}")
        # Reading an index that lives on a GPU would stall the stream; there the caller's own slots are trusted.
        on_host = adapter_index.device.type == "cpu"
        if on_host and (int(adapter_index.min()) < 0 or int(adapter_index.max()) >= self.slots):
            raise InvalidArgument.for_field(
                "adapter_index", f"{adapter_index.tolist()} names a slot outside 0 to {self.slots - 1}"
            )

"""Latents to picture files on a thread of its own, so that the step loop never waits for the VAE or an encoder."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Internal, InvalidArgument, Reason
from hueshift.engines.interface import UNetEngine
from hueshift.engines.pictures import encode_mask, encode_picture
from hueshift.engines.side_stream import SideStream
from hueshift.engines.vae import Pixels, VaeStage
from hueshift.server.clock import Clock
from hueshift.server.generation import GenerationRequest, ImageEvent, PreviewEvent, Timings
from hueshift.server.metrics import Metrics
from hueshift.server.provenance import provenance
from hueshift.server.ticket import Running, as_ours

# Pixels decoded in one VAE call: 4 pictures of 512 x 512. The last VAE block's activations take about 1 kB a pixel.
_BATCH_PIXELS = 1 << 20
_BATCH_PICTURES = 8
_ENCODERS = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    running: Running
    latents: Tensor
    preview_step: int = 0
    mask: Tensor | None = None


class DecodeStage:
    """Decodes in batches of one size: finished pictures first, then previews, of which only the newest counts.

    `put` and `put_preview` come from the step loop and return at once. `on_batch` is called from the stage's thread
    after each batch.
    """

    def __init__(
        self,
        vae: VaeStage,
        *,
        engine: UNetEngine,
        base_hash: str,
        metrics: Metrics,
        clock: Clock,
        on_batch: Callable[[], None],
        on_error: Callable[[BaseException], object] = lambda error: None,
    ) -> None:
        self._vae, self._engine, self._base_hash = vae, engine, base_hash
        self._metrics, self._clock, self._on_batch = metrics, clock, on_batch
        self._on_error = on_error
        self._log = structlog.get_logger()
        self._wake = threading.Condition()
        self._finished: deque[_Work] = deque()
        self._previews: dict[Running, _Work] = {}
        self._busy = 0
        self._closing = False
        self._beside = SideStream()
        self._encoders = ThreadPoolExecutor(_ENCODERS, "hueshift-encode")
        self._thread = threading.Thread(target=self._run, name="hueshift-decode", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish the current batch, drop the rest, stop the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._encoders.shutdown()

    def put(self, running: Running) -> None:
        """Take a finished picture."""
        with self._wake:
            self._previews.pop(running, None)
            self._finished.append(_Work(running, running.sample.latents, mask=_mean_mask(running)))
            self._wake.notify()

    def put_preview(self, running: Running) -> None:
        """Take the current data estimate of a running picture, in place of an older one still waiting."""
        with self._wake:
            self._previews[running] = _Work(running, running.sample.prev, running.sample.step)
            self._wake.notify()

    @property
    def backlog(self) -> int:
        """Finished pictures that wait or are being decoded."""
        with self._wake:
            return len(self._finished) + self._busy

    def run_once(self) -> bool:
        """Decode one batch; return False if there was nothing to do."""
        with self._wake:
            works = self._take()
            self._busy = sum(1 for work in works if not work.preview_step)
        if not works:
            return False
        try:
            with self._beside.running(works[0].latents.device):
                self._decode([work for work in works if not work.running.ticket.ended])
        except Exception as error:  # Whatever it was, it belongs to these requests, and the stage goes on.
            self._on_error(error)
            self._log.error("decoding failed", pictures=len(works), exc_info=error)
            for work in works:
                work.running.ticket.end(as_ours(error, "decoding the picture"))
        finally:
            with self._wake:
                self._busy = 0
            self._on_batch()
        return True

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._finished or self._previews)
                if self._closing:
                    return
            self.run_once()

    def _take(self) -> list[_Work]:
        if not self._finished:
            return [self._previews.pop(next(iter(self._previews)))] if self._previews else []
        size = self._finished[0].running.size
        request = self._finished[0].running.ticket.request
        room = min(_BATCH_PICTURES, max(1, _BATCH_PIXELS // (request.width * request.height)))
        taken = [work for work in self._finished if work.running.size == size][:room]
        for work in taken:
            self._finished.remove(work)
        return taken

    def _decode(self, works: list[_Work]) -> None:
        sound = []
        for work in works:
            if bool(torch.isfinite(work.latents).all()):
                sound.append(work)
            elif not work.preview_step:
                work.running.ticket.end(_not_finite(work.running.ticket.request))
        if sound:
            pixels = self._vae.decode(torch.stack([work.latents for work in sound]))
            for work, (data, media_type, mask) in zip(
                sound, self._encoders.map(self._encode, sound, pixels), strict=True
            ):
                self._send(work, data, media_type, mask)

    def _encode(self, work: _Work, pixels: Pixels) -> tuple[bytes, str, bytes]:
        request = work.running.ticket.request
        mask = b""
        if work.mask is not None:
            mask = encode_mask(work.mask.float().cpu().numpy(), request.height // work.mask.shape[0])
        written = provenance(request, work.running.index, self._base_hash)
        return *encode_picture(pixels, request.format, written), mask

    def _send(self, work: _Work, data: bytes, media_type: str, mask: bytes) -> None:
        running = work.running
        if work.preview_step:
            event = PreviewEvent(running.index, work.preview_step, data, media_type)
            running.ticket.stream.send(event, slot=("preview", running.index))
            return
        now = self._clock.monotonic()
        self._metrics.stage_seconds.labels("decode").observe(now - running.finished)
        self._metrics.images.inc()
        running.ticket.send_image(self._image(running, data, media_type, mask, now), now)

    def _image(self, running: Running, data: bytes, media_type: str, mask: bytes, now: float) -> ImageEvent:
        ticket = running.ticket
        request, prepared = ticket.request, running.prepared
        return ImageEvent(
            index=running.index,
            data=data,
            media_type=media_type,
            seed=request.seeds[running.index],
            width=request.width,
            height=request.height,
            adapters=request.adapters,
            plans=tuple(running.plans),
            # Another may have taken over since the start.
            engine=self._engine.name,
            base_hash=self._base_hash,
            timings=Timings(
                queue=running.started - ticket.accepted,
                adapter_load=prepared.adapter_seconds,
                text=prepared.text_seconds,
                denoise=running.finished - running.sampling,
                decode=now - running.finished,
                picture=prepared.picture_seconds,
                inversion=running.sampling - running.started,
            ),
            mask=mask,
            regions=tuple(region.adapters for region in request.regions),
        )


def _mean_mask(running: Running) -> Tensor | None:
    """Share of blocks and steps at which the branches acted, [h, w], if the caller wants it."""
    lag, sample = running.ticket.request.lag, running.sample
    if lag is None or not lag.return_masks or sample.lag_mask is None:
        return None
    return sample.lag_mask / sample.step


def _not_finite(request: GenerationRequest) -> HueshiftError:
    """Say whose fault a picture of NaN is: the base model draws none, so with adapters it is theirs."""
    mixes = (request.adapters, *(region.adapters for region in request.regions))
    names = sorted({adapter.name for mix in mixes for adapter in mix if adapter.weight})
    if not names:
        return Internal(Reason.INTERNAL, "the model's output was not finite, without any adapter")
    return InvalidArgument(
        Reason.ADAPTER_NOT_FINITE,
        f"the picture held NaN or infinity with the adapters {', '.join(names)} and these settings; allowed: what "
        "keeps it finite. Give smaller weights or guidance_scale, or another adapter where that does not help",
    )

"""Captured calls by role and shape: warmed ones stay, others come with use and go with disuse.

Only a shape that was never seen costs a capture; adapters come and go through memory that the graphs read, so no swap
ever does. `captures` counts them, and a server's count stands still once its sizes are known.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from hueshift.engines.convolution_search import convolution_search
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_lane import GraphLane, Work
from hueshift.engines.device_errors import Fault, classify

# A shape pays for its capture when it is called again; one picture calls it once a step.
_CAPTURE_AT_CALL = 2
# Calls after which a capture that had no memory is tried again, for each try stops the whole device: whoever took the
# memory may have left by then.
_RETRY_AFTER = 512
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What is captured: `role` names the network (`dense`, `factored`, `merged 0`), `shape` what it is called with."""

    role: str
    shape: CallShape


class GraphStore:
    """Runs calls, by replaying their graph where there is one. For the thread that runs the engine.

    At most `limit` graphs beside the warmed ones, least recently used out first. With `enabled` False every call is
    eager. `on_capture` hears the role of every capture.
    """

    def __init__(
        self, lane: GraphLane, *, limit: int, enabled: bool = True, on_capture: Callable[[str], None] | None = None
    ) -> None:
        self._lane, self._limit = lane, limit
        self._enabled = enabled
        self._on_capture = on_capture or (lambda role: None)
        self._warmed: dict[GraphKey, Work] = {}
        self._others: OrderedDict[GraphKey, Work] = OrderedDict()
        self._calls: Counter[GraphKey] = Counter()
        self._refused: set[GraphKey] = set()
        self.captures = 0

    def run(self, key: GraphKey, call: Work) -> None:
        """Queue a call on the lane, which the caller has entered. `call` is what the graph was or will be made of."""
        replay = self._find(key)
        if replay is not None:
            replay()
            return
        call()
        self._calls[key] += 1
        if not self._enabled or self._calls[key] < _CAPTURE_AT_CALL or key in self._refused:
            return
        try:
            self._keep(key, self._capture(key, call))
        except RuntimeError as error:
            if classify(error) is not Fault.MEMORY:
                raise
            # The call itself has run.
            self._calls[key] = _CAPTURE_AT_CALL - _RETRY_AFTER
            _log.warning("cuda_graph_without_memory", role=key.role, rows=key.shape.rows)

    def warm(self, key: GraphKey, call: Work) -> Work:
        """Capture a call for good and return what queues it: the graph's replay, or the call where there is none.

        Raises what the call raises, and RuntimeError where a graph of it does not fit in memory.
        """
        if key in self._warmed:
            return self._warmed[key]
        # Twice before the capture: the first sets up cuBLAS, cuDNN and Triton, the second settles the allocator.
        for _ in range(2):
            # After what the caller has queued: its weights may have been made a moment ago, on another stream.
            with self._lane.running():
                call()
        replay = self._capture(key, call) if self._enabled else None
        if replay is None:
            return call
        self._warmed[key] = replay
        return replay

    def forget(self, role: str) -> None:
        """Drop every graph of a role, and what is known of its calls: it stands for another network from now on."""
        self._lane.mark().wait()
        for known in (self._warmed, self._others, self._calls):
            for key in [key for key in known if key.role == role]:
                del known[key]
        self._refused = {key for key in self._refused if key.role != role}

    def __len__(self) -> int:
        """Graphs held."""
        return len(self._warmed) + len(self._others)

    def __contains__(self, key: GraphKey) -> bool:
        """True if a call of this key would be a replay."""
        return key in self._warmed or key in self._others

    def _find(self, key: GraphKey) -> Work | None:
        if key in self._others:
            self._others.move_to_end(key)
            return self._others[key]
        return self._warmed.get(key)

    def _capture(self, key: GraphKey, call: Work) -> Work | None:
        """Return the replay, None where the call cannot be captured. Raises RuntimeError: no memory, device lost."""
        try:
            # Trying algorithms would wait for the device, which a capture cannot; those of this call are known by now.
            with convolution_search(False):
                replay = self._lane.capture(call)
        except RuntimeError as error:
            if classify(error) is not Fault.OTHER:
                raise
            _log.warning("cuda_graph_refused", role=key.role, error=str(error).splitlines()[0])
            self._refused.add(key)
            return None
        self.captures += 1
        self._on_capture(key.role)
        return replay

    def _keep(self, key: GraphKey, replay: Work | None) -> None:
        if replay is None:
            return
        while len(self._others) >= self._limit:
            # Its memory must not go while its last replay runs.
            self._lane.mark().wait()
            old, _ = self._others.popitem(last=False)
            del self._calls[old]
        self._others[key] = replay

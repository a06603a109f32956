"""A GPU that is not there: tensors on `cuda:0` with shapes, dtypes and strides but no memory, and a lane that captures.

Built on torch's fake tensors. Tensors on the CPU stay real, so the host's own checks run as they do beside a GPU; what
touches the device is fake, and whatever would stop a CUDA graph's capture or make the host wait raises or is counted.
Numbers cannot be tested so; that no line mixes devices, reads back or allocates where it must not, can.
"""

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hueshift.engines.cuda_lane import HostLane, Work
from hueshift.kernels import factored_conv, factored_linear, lowrank_linear, lowrank_residual, slot_linear
from hueshift.kernels.launch import Launch

GPU = torch.device("cuda:0")
# Places of CUDA and META in c10::DeviceType.
_CUDA, _META, _DEVICE_TYPES = 1, 14, 22
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
# Operators whose result's size depends on values, so that the host must wait for them.
_READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")
LAUNCHERS: dict[str, Callable[..., Any]] = {
    "factored_linear": factored_linear.factored_linear,
    "scale_and_expand": factored_conv.scale_and_expand,
    "lowrank_residual": lowrank_residual.lowrank_residual,
    "lowrank_linear": lowrank_linear.lowrank_linear,
    "slot_linear": slot_linear.slot_linear,
}


class CaptureError(RuntimeError):
    """Something that CUDA refuses while a stream is being captured."""


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class
    """While it is active, everything on `cuda:0` is fake.

    `waits` names the operators that make the host wait for the device; `products` counts matrix products and
    convolutions by dtype; `launched` counts the kernels' operators, `masked` those that were given a mask; `allocated`
    are the bytes of all storages that operators made on it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.products: Counter[torch.dtype] = Counter()
        self.launched: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.allocated = 0
        self.capturing = False
        # Kept, or another storage could come to lie at its address.
        self._pinned: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator for real if it is the host's alone."""
        kwargs = kwargs or {}
        if func in (torch.ops.aten._pin_memory.default, torch.ops.aten.pin_memory.default):
            # Page-locked memory is known by this alone: there is no driver to ask.
            with unset_fake_temporarily():
                pinned: Tensor = args[0].clone()
            storage = pinned.untyped_storage()
            self._pinned[storage._cdata] = storage
            return pinned
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        named = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not named and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            # There operators that are made of others come whole.
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        name = func.name().partition("::")[2].partition(".")[0]
        self._look(name, tensors, args, kwargs)
        found = self._launch(name, func, args) if func.namespace == "hueshift" else func(*args, **kwargs)
        self._count(tensors, tree_leaves(found))
        return found

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Be strict: a graph of what is queued here would have to be possible."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        """Flash attention's result. A build for the CPU would compute it step by step, and partly in fp32."""
        assert {(part.device, part.dtype) for part in (query, key, value)} == {(GPU, query.dtype)}
        self.products[query.dtype] += 1
        samples, heads, positions, width = query.shape
        return query.new_empty(samples, positions, heads, width).transpose(1, 2)

    def _count(self, given: list[Tensor], found: list[Any]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in found:
            if isinstance(tensor, Tensor) and tensor.device == GPU:
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    known.add(storage._cdata)
                    self.allocated += storage.nbytes()

    def _look(self, name: str, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_gpu = [tensor for tensor in tensors if tensor.device == GPU]
        # A single number on the host is passed by value.
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
        to_host = isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "cpu"
        copied_out = name == "copy_" and tensors[0].device.type == "cpu" and tensors[1].device == GPU
        by_mask = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        if on_gpu and (name in _READ_BACK or to_host or copied_out or by_mask):
            self.waits.append(name)
            if self.capturing:
                raise CaptureError(f"{name} waits for the device inside of a capture")
        # From ordinary memory CUDA may wait however the copy was asked for.
        asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
        copied = name in ("_to_copy", "copy_")
        if (
            copied
            and not (asked and self._is_pinned(tensors[-1]))
            and self._comes_in(tensors, kwargs)
            and not self.capturing
        ):
            self.waits.append(f"{name} from the host")
        if self.capturing and on_host:
            raise CaptureError(f"{name} reads {[tuple(tensor.shape) for tensor in on_host]} of the host in a capture")
        if name.startswith(_PRODUCTS) and on_gpu:
            self.products[on_gpu[0].dtype] += 1

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self._pinned

    def _comes_in(self, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """True for a copy from the host to the device."""
        target = tensors[0].device if len(tensors) > 1 else kwargs.get("device")
        return isinstance(target, torch.device) and target.type == "cuda" and tensors[-1].device.type == "cpu"

    def _launch(self, name: str, func: Any, args: tuple[Any, ...]) -> Any:
        """Let the launcher check its arguments as on a GPU, and hold the operator's fake result against its own."""
        self.launched[name] += 1
        self.masked[name] += name.startswith("lowrank") and args[-1] is not None
        real, fake = LAUNCHERS[name](*args), func(*args)
        if name == "lowrank_residual":
            assert real is args[0]
            assert fake is None
        else:
            assert _looks(real) == _looks(fake), (name, _looks(real), _looks(fake))
        return fake


class FakeLane(HostLane):
    """The fake GPU's stream: a replay runs its work again, strictly. `lent` has what others were let read."""

    device = GPU

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.captures = 0
        self.lent: list[Tensor] = []

    def capture(self, work: Work) -> Work:
        """Run it strictly once, as a capture would."""

        def replay() -> None:
            with self.gpu.capture():
                work()

        self.captures += 1
        replay()
        return replay

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Remember what others may read."""
        self.lent += tensors

    def beside(self) -> "FakeLane":
        """Another one like it."""
        return FakeLane(self.gpu)


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Pretend that there is an H200, for all that runs inside."""
    gpu = FakeGpu()
    with pytest.MonkeyPatch.context() as patch, _device_guard():
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "fake H200")
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132)
        )
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(functional, "scaled_dot_product_attention", gpu.attend)
        patch.setattr(FakeTensor, "data_ptr", _Addresses(), raising=False)
        patch.setattr(Launch, "run", _check_launch)
        # Below ours, where torch looks for it before it would start CUDA; ours takes the host's operators from it.
        with FakeTensorMode(allow_non_fake_inputs=True), gpu:
            yield gpu


class _Addresses:
    """Addresses of fake tensors: memory of its own for each storage, on 256-byte boundaries as CUDA's allocator has."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}
        self._next = 1 << 30

    def __get__(self, tensor: Tensor | None, owner: type) -> Callable[[], int]:
        if tensor is None:
            raise AttributeError("data_ptr of a class")
        return functools.partial(self._of, tensor)

    def _of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            # The storage is kept, or another could come to lie at its address.
            self._known[storage._cdata] = (self._next, storage)
            self._next += (storage.nbytes() // 256 + 2) * 256
        return self._known[storage._cdata][0] + int(tensor.storage_offset()) * tensor.element_size()


def _check_launch(launch: Launch) -> None:
    """What the GPU would see of a launch: every tensor on it."""
    for name, value in launch.arguments.items():
        base = getattr(value, "base", value)
        assert not isinstance(base, Tensor) or base.device == GPU, f"{name} lies on {base.device}"


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device


@contextmanager
def _device_guard() -> Iterator[None]:
    """Give torch's table of device guards an entry for CUDA, which a build for the CPU lacks: that of `meta`.

    It does nothing, which is what is needed. Skips where the table cannot be found; leaves a build for CUDA alone.
    """
    if torch.version.cuda is not None:
        with nullcontext():
            yield
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        table = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as error:
        pytest.skip(f"this build of torch hides its table of device guards ({error})")
    before, table[_CUDA] = table[_CUDA], table[_META]
    try:
        yield
    finally:
        table[_CUDA] = before

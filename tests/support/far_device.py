"""A device that is not there: fake tensors on it, and a record of what would have waited for it.

Torch's autograd refuses CUDA tensors in a build without CUDA, fake ones too, so another device type stands for it,
which no machine has and torch knows all about. For this the process needs a device guard that torch offers to backends
in Python; it cannot be taken away again, so a process of its own is right: tests/support/far_training.py.
"""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyDeviceGuard

DEVICE = torch.device("maia", 0)
# Numbers of c10::DeviceType.
_MAIA, _PRIVATE = 8, 20
_KINDS = 22
_LOWER = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention, torch.bmm, Tensor.matmul)


def open_device() -> None:
    """Make this process accept tensors of the device in autograd and autocast."""
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _KINDS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_MAIA], guards[_PRIVATE] = guards[_PRIVATE], None
    torch._register_device_module("maia", SimpleNamespace())  # type: ignore[no-untyped-call]


class LowProducts(TorchFunctionMode):  # torch's base has an untyped hook
    """Does what autocast does on CUDA, where it is on for the device: torch's own leaves fake tensors on it alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lower one product."""
        named = kwargs or {}
        if func in _LOWER and torch.is_autocast_enabled(DEVICE.type):
            args = tuple(_low(arg) for arg in args)
            named = {word: _low(arg) for word, arg in named.items()}
        return func(*args, **named)


def _low(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype is torch.float32 else value


class Stops(TorchDispatchMode):
    """Notes copies for which the host would wait for the device, and counts what is queued on it by name.

    Whoever looks at a number of the device gets an exception from its fake tensors. `low` are names of operations with
    results in bfloat16, `crossed` the bytes that came from the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.counts: dict[str, int] = {}
        self.low: set[str] = set()
        self.crossed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation."""
        named = kwargs or {}
        out = func(*args, **named)
        ends = [value.device.type for value in (*args[:2], out) if isinstance(value, Tensor)]
        name = str(func.name())
        if name in ("aten::_to_copy", "aten::copy_") and len(set(ends)) > 1:
            # From the host it may be queued; to the host it is waited for, but for what `send` does.
            waits = not named.get("non_blocking", False) and not (len(args) > 2 and args[2])
            if waits or ends[-1] == "cpu":
                self.found.append(f"{name} {ends}")
        if name == "aten::_to_copy" and isinstance(out, Tensor) and ends == ["cpu", DEVICE.type]:
            self.crossed += args[0].nbytes
        if DEVICE.type in ends:
            self.counts[name] = self.counts.get(name, 0) + 1
            if isinstance(out, Tensor) and out.dtype is torch.bfloat16:
                self.low.add(name)
        return out


@contextmanager
def far_away(mode: FakeTensorMode) -> Iterator[Stops]:
    """Everything inside happens to fake tensors, and is looked at."""
    with mode, LowProducts(), Stops() as stops:
        yield stops


def send_module(mode: FakeTensorMode, module: Any) -> Any:
    """A copy of a module with fake weights on the device."""
    memo: dict[int, object] = {}
    with mode:
        for tensor in chain(module.parameters(), module.buffers()):
            moved = mode.from_tensor(tensor.detach()).to(DEVICE)
            is_weight = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_weight else moved
    return copy.deepcopy(module, memo)

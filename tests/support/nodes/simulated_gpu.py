"""A GPU that is not there: tensors of the host that say they are on `cuda:0`, and that behave as those would.

An operation over tensors of both places is refused, as a real device does. What makes the host wait without a look at
a marker is written down (`hidden_waits`): it has no deadline. Copies that need not be waited for happen as late as they
may: when the device does something else, or is waited for. So code that reads a staging buffer too early, or fills it
anew too early, gives wrong numbers here too.

What cannot be seen here: the rounding of a GPU's own products and functions, its memory, its speed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.compute.device import Marker, StagedDevice

PLACE = torch.device("cuda", 0)
WAITING_CALLS = {
    *("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__"),
    *("nonzero", "masked_select", "unique", "equal", "allclose"),
}
"""They need values, or shapes that depend on values."""


class GpuTensor(Tensor):
    """A tensor of the simulated GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Late:
    """Copies that were asked for and have not happened."""

    def __init__(self) -> None:
        self.copies: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()
        self.num_waits = 0
        self.hidden_waits: list[str] = []

    def happen(self) -> None:
        # A node's loader has a thread of its own; what was asked in inference mode may happen outside of it.
        with self._lock, torch.inference_mode():
            while self.copies:
                self.copies.popleft()()


LATE = _Late()


class LateMarker(Marker):
    """Reached once it is looked at a second time: the host is always too early at first."""

    def __init__(self) -> None:
        self._is_recorded = False

    def record(self) -> None:
        self._is_recorded = True

    def is_reached(self) -> bool:
        if self._is_recorded:
            LATE.num_waits += 1
            self._is_recorded = False
            LATE.happen()
            return False
        return True


class NeverReached(Marker):
    """Of a device that waits for another one: what a kernel of NCCL is to its GPU when the other rank is gone."""

    def record(self) -> None:
        return None

    def is_reached(self) -> bool:
        return False


class SimulatedDevice(StagedDevice):
    """What a node is given in place of a CudaDevice."""

    def __init__(self) -> None:
        super().__init__(PLACE, LateMarker, is_pinned=True)


class _Factories(TorchFunctionMode):
    """Tensors that are made on the device, and pinned memory that is plain."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def simulated_gpu() -> Iterator[SimulatedDevice]:
    """Within it, `cuda:0` exists."""
    LATE.happen()
    LATE.num_waits = 0
    LATE.hidden_waits.clear()
    with _Factories():
        yield SimulatedDevice()


def within_simulation(function: Callable[..., None]) -> Callable[..., None]:
    """The same where the GPU is: for what another thread runs, a node's loader above all."""

    def inside(*args: Any) -> None:
        with _Factories():
            function(*args)

    return inside


def num_waits() -> int:
    """How often the host has waited for a marker since the simulation began."""
    return LATE.num_waits


def hidden_waits() -> list[str]:
    """Calls that made the host wait otherwise."""
    return LATE.hidden_waits


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, GpuTensor)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_each(item, change) for item in value])
    return value


def _plain(value: Any) -> Any:
    return _each(value, lambda tensor: tensor.as_subclass(Tensor) if _is_on_gpu(tensor) else tensor)


def _on_gpu(value: Any) -> Any:
    return _each(value, lambda tensor: tensor if _is_on_gpu(tensor) else tensor.as_subclass(GpuTensor))


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return _dispatch(func, args, kwargs)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    kwargs = dict(kwargs)
    kwargs.pop("pin_memory", None)
    given = _tensors((args, kwargs))
    if not any(map(_is_on_gpu, given)):
        if name == "to" and PLACE in args:
            return args[0].clone().as_subclass(GpuTensor)
        if kwargs.get("device") == PLACE:
            kwargs["device"] = "cpu"
            return _on_gpu(func(*args, **kwargs))
        return func(*args, **kwargs)
    if func == Tensor.device.__get__:
        return PLACE
    if name == "copy_":
        return _copy(args[0], args[1], is_late=bool(kwargs.get("non_blocking")))
    assert name != "numpy", "a device's tensor has no bytes of the host"
    is_mask = name in ("__getitem__", "__setitem__") and any(t.dtype == torch.bool for t in _tensors(args[1:2]))
    if is_mask or name in WAITING_CALLS:
        LATE.hidden_waits.append(name)
    if name == "cpu":
        LATE.happen()
        return _plain(args[0]).clone()
    strangers = [tensor for tensor in given if not _is_on_gpu(tensor) and tensor.dim() > 0]
    assert not strangers, f"{name} takes tensors of the host and of the device"
    LATE.happen()
    if kwargs.get("device") == PLACE:
        kwargs.pop("device")
    return _on_gpu(func(*_plain(args), **_plain(kwargs)))


def _copy(target: Tensor, source: Tensor, *, is_late: bool) -> Tensor:
    plain_target, plain_source = _plain((target, source))
    if is_late and _is_on_gpu(target) != _is_on_gpu(source):
        LATE.copies.append(lambda: plain_target.copy_(plain_source))
        return target
    LATE.happen()
    plain_target.copy_(plain_source)
    return target

"""A CUDA device that is none: tensors that say `cuda:0` and hold their values on the CPU.

Inside `simulated_gpu` every operation computes real values, refuses tensors of different devices as CUDA's kernels do,
and writes down when the host would wait for the GPU. It says nothing about speed, memory or the rounding of kernels.

PyTorch's `FakeTensorMode` has no values, and on a build without CUDA it cannot move anything to `cuda`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu_simulation.torch_cuda import patched_torch_cuda

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
COMPOUND = torch._C.DispatchKey.CompositeImplicitAutograd
ROOT = Path(__file__).parents[2]
ROOMS = (f"{ROOT}/pipeline/", f"{ROOT}/data_prep/")
# A copy of so many bytes or fewer from pageable memory does not make the host wait (CUDA C++ Programming Guide,
# "Asynchronous Concurrent Execution"); a larger one is first staged, for which the driver may wait.
STAGED_BYTES = 64 * 1024
MAY_MIX = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip
# Their result's size, or what they return, is known to the host only after the kernels before them.
HOST_READS = {
    aten._local_scalar_dense.default: "scalar", aten.equal.default: "equal", aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select", aten._unique2.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}  # fmt: skip


@dataclass(frozen=True)
class Wait:
    """One wait of the host for the GPU."""

    kind: str
    """`scalar`, `nonzero`, `mask index`, `upload`, `download` and others."""
    place: str
    """The project's innermost line that led to it, such as `pipeline/trainer.py:12`."""


class CudaTensor(torch.Tensor):
    """A tensor on `cuda:0`, whose values are those of the CPU tensor `host`; to C++ it is a CPU tensor."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> CudaTensor:
        """Put a CPU tensor on the simulated device, without a copy."""
        assert not isinstance(host, CudaTensor)
        with torch.inference_mode(False):  # a view of a parameter is no inference tensor, nor is its wrapper
            made = torch.Tensor._make_wrapper_subclass(
                cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
                layout=host.layout, device="cpu",
            )  # fmt: skip
        made.host = host
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what happens outside of the simulation."""
        raise RuntimeError(f"{func} on a tensor of a simulated GPU that is gone")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def record_stream(self, stream: object) -> None:
        """Do nothing: no memory is used anew."""

    def numpy(self, *args: object, **kwargs: object) -> Any:
        """Refuse, as on CUDA."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")


class SimulatedGpu:
    """What was copied to the device, the waits of the host, and the host memory that is pinned."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.uploads: list[int] = []
        """Bytes of each copy from the host to the device."""
        # By address; kept, so that no other memory gets the same address.
        self._pinned: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def watch(self) -> Iterator[list[Wait]]:
        """The waits inside, in a list of their own."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before

    def wait(self, kind: str) -> None:
        """Write down a wait of the code that is running."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_filename.startswith(ROOMS):
                path = Path(frame.f_code.co_filename).relative_to(ROOT)
                self.waits.append(Wait(kind, f"{path}:{frame.f_lineno}"))
                return
            frame = frame.f_back
        self.waits.append(Wait(kind, "outside of the project"))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a CPU tensor's memory as pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is pinned."""
        return not isinstance(tensor, CudaTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def copy_between(self, host: torch.Tensor, upload: bool, non_blocking: bool) -> None:
        """Write down a copy between host and device, and its wait, if there is one."""
        if upload:
            self.uploads.append(host.nbytes)
        small = upload and host.nbytes <= STAGED_BYTES
        if not non_blocking:
            self.wait("upload" if upload else "download")
        elif not (small or self.is_pinned(host)):
            self.wait("upload from pageable memory" if upload else "download to pageable memory")


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """A machine with one GPU, as far as the project asks; everything is restored at the end."""
    gpu = SimulatedGpu()
    dispatch = _Dispatch(gpu)
    with patched_torch_cuda(), _Functions(gpu, dispatch), dispatch:
        yield gpu


def on_cuda(device: object) -> bool:
    """Whether a device, or its name, is the GPU."""
    return device is not None and torch.device(device).type == "cuda"  # type: ignore[arg-type]


def tensors_of(*values: Any) -> Iterator[torch.Tensor]:
    """All tensors in arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_of(*value)
        elif isinstance(value, dict):
            yield from tensors_of(*value.values())


def replaced(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments or results with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(replaced(part, change) for part in value)
    return {name: replaced(part, change) for name, part in value.items()} if isinstance(value, dict) else value


class _Dispatch(TorchDispatchMode):
    """What a kernel sees: checks the devices, computes on the values, and puts results on the right device."""

    def __init__(self, gpu: SimulatedGpu):
        super().__init__()
        self.gpu = gpu
        # Whether tensors that C++ makes of nothing are on CUDA: for each Python function that is running.
        self.fresh: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Outside of inference mode autograd has taken compound operations apart.
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOUND):
            with self:
                return func._op_dk(COMPOUND, *args, **kwargs)
        given = list(tensors_of(args, kwargs))
        cuda = [tensor for tensor in given if isinstance(tensor, CudaTensor)]
        if func is aten.copy_.default:
            on_device = isinstance(args[0], CudaTensor)
            if on_device != isinstance(args[1], CudaTensor):
                non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                self.gpu.copy_between(args[1] if on_device else args[0], on_device, non_blocking)
        else:
            backward = torch._C._current_graph_task_id() != -1
            on_device = bool(cuda) or (not given and (backward or (bool(self.fresh) and self.fresh[-1])))
            if cuda:
                self._check(func, args, given)
        bare, options = replaced((args, kwargs), lambda value: getattr(value, "host", value))
        result = func(*bare, **options)
        same = {id(tensor.host): tensor for tensor in cuda}  # of operations in place
        untouched = {id(tensor) for tensor in given}

        def wrap(value: torch.Tensor) -> torch.Tensor:
            if id(value) in untouched:
                return value
            if id(value) in same:
                return same[id(value)]
            return CudaTensor(value) if on_device else value

        return replaced(result, wrap)

    def _check(self, func: Any, args: Any, given: list[torch.Tensor]) -> None:
        """Refuse what CUDA refuses, and write down what makes the host wait."""
        indices: Iterable[Any] = ()
        if func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            given = [args[0], *args[2:3]]
            if not isinstance(args[0], CudaTensor):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        elif func in HOST_READS:
            self.gpu.wait(HOST_READS[func])
        fills = len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].dim() == 0
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8) and not fills:  # a mask that sets one value is a masked_fill
                self.gpu.wait("mask index")
            elif not isinstance(index, CudaTensor):
                self.gpu.wait("index on the host")
        for tensor in given:
            if not isinstance(tensor, CudaTensor) and tensor.dim() > 0 and func not in MAY_MIX:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {func} got one of {tuple(tensor.shape)} on "
                    "cpu beside others on cuda:0"
                )


class _Move(torch.autograd.Function):
    """A copy to the other device, through which gradients go back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, CudaTensor):
            return tensor.host.detach().clone()
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Move.apply(gradient)


class _Functions(TorchFunctionMode):
    """What Python calls: devices that C++ does not have are taken out of the arguments."""

    def __init__(self, gpu: SimulatedGpu, dispatch: _Dispatch):
        super().__init__()
        self.gpu, self.dispatch = gpu, dispatch
        self.special: dict[Any, Callable[..., Any]] = {
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: lambda tensor, **options: self._to(tensor, "cpu", **options),
            torch.Tensor.cuda: lambda tensor, device=CUDA, **options: self._to(tensor, device, **options),
            torch.Tensor.tolist: self._tolist,
            torch.Tensor.pin_memory: lambda tensor, device=None: self.gpu.pin(tensor.clone()),
            torch.Tensor.is_pinned: lambda tensor, device=None: self.gpu.is_pinned(tensor),
            torch.Tensor.data.__set__: self._set_data,  # type: ignore[attr-defined]
            torch.as_tensor: self._tensor, torch.tensor: self._tensor,
        }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        cuda = any(isinstance(tensor, CudaTensor) for tensor in tensors_of(args, kwargs))
        self.dispatch.fresh.append(cuda)
        try:
            if kwargs.get("device") in ("meta", torch.device("meta")):  # as transformers builds a model to load
                return func(*args, **kwargs)
            if func in self.special:
                return self.special[func](*args, **kwargs)
            if "device" in kwargs or "pin_memory" in kwargs:
                return self._fresh(func, args, kwargs, cuda)
            return func(*args, **kwargs)
        finally:
            self.dispatch.fresh.pop()

    def _fresh(self, func: Any, args: Any, kwargs: dict[str, Any], cuda: bool) -> Any:
        """A function that makes a tensor on the device that it is given."""
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        cuda = cuda if device is None else on_cuda(device)
        if device is not None:
            kwargs["device"] = "cpu"
        if kwargs.get("generator") is not None and getattr(kwargs["generator"], "on_cuda", False) != cuda:
            raise RuntimeError("the generator is on another device than the tensor")
        self.dispatch.fresh[-1] = cuda
        made = func(*args, **kwargs)
        if isinstance(made, CudaTensor) != cuda:
            made = CudaTensor(made) if cuda else made.host
        return self.gpu.pin(made) if pinned else made

    def _to(self, tensor: torch.Tensor, *args: Any, non_blocking: bool = False, **options: Any) -> torch.Tensor:
        dtype, device = options.pop("dtype", None), options.pop("device", None)
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                dtype, device = value.dtype, value.device
            elif isinstance(value, bool):
                non_blocking = value
            elif value is not None:
                device = value
        if device is not None and on_cuda(device) != isinstance(tensor, CudaTensor):
            upload = not isinstance(tensor, CudaTensor)
            moved = _Move.apply(tensor)
            if not upload and non_blocking:
                self.gpu.pin(moved)  # as PyTorch does for a download that does not block
            self.gpu.copy_between(tensor if upload else moved, upload, non_blocking)
            tensor = moved
        return torch.Tensor.to(tensor, dtype or tensor.dtype, **options)

    def _tolist(self, tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, CudaTensor):
            return tensor.tolist()
        self.gpu.wait("download")
        return tensor.host.tolist()

    def _tensor(self, data: Any, *, device: object = None, **options: Any) -> torch.Tensor:
        """`torch.tensor` and `torch.as_tensor`, which block where they upload."""
        if isinstance(data, torch.Tensor):
            return self._to(data, device, dtype=options.get("dtype"))
        pinned = options.pop("pin_memory", False)
        made = torch.tensor(data, **options)
        return self._to(self.gpu.pin(made) if pinned else made, device)

    def _set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """`tensor.data = value`, by which modules move their parameters; here the two trade places."""
        value = value.detach()
        kind = torch.nn.Parameter if isinstance(tensor, torch.nn.Parameter) else torch.Tensor
        fresh = torch.nn.Parameter(value, tensor.requires_grad) if kind is torch.nn.Parameter else value
        torch.utils.swap_tensors(tensor, fresh)

"""A device that is not there: its tensors compute on the CPU, but are as far from the CPU's as a GPU's are.

A tensor on `FAKE` is a wrapper around one of the CPU (a subclass with `__torch_dispatch__`), and claims to lie on torch's
device "lazy", which every build knows and none has kernels for; what makes tensors there is registered here. Nothing is
switched on: `lm.to(FAKE)` or `torch.zeros(3, device=FAKE)` is enough. A program is refused what CUDA would refuse it: an
operation on tensors of both devices (but CPU tensors of no dimension among elementwise ones, and CPU indices), a generator
of the CPU, NumPy. Its numbers are those of the CPU, random ones too. `synchronisations()` counts what a GPU's host waits for.

Not checked: kernels, memory, speed, what is done for CUDA alone, the device of a gradient that a backward function gives.
Tried with torch 2.6, 2.13 and 2.15."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

FAKE = torch.device("lazy", 0)
CPU = torch.device("cpu")
MAKERS = [  # of new tensors; torch makes all others from empty ones
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m"),
    *("rand", "rand.generator", "randn", "randn.generator", "randperm", "randperm.generator"),
    *("randint", "randint.generator", "randint.low", "randint.low_generator"),
]
WAITS = {  # operations whose answer, or its size, the host has to know
    "item": {"_local_scalar_dense", "equal"},
    "size": {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"},
}
counters: list[Counter[str]] = []


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Counts those inside the block, by why the host waits: for a number ("item"), for the size of a result ("size"), for a
    tensor that comes to the host ("down"), or goes to the device ("up") from memory that is not pinned."""
    counters.append(seen := Counter())
    try:
        yield seen
    finally:
        counters.remove(seen)


def _waits(why: str) -> None:
    for seen in counters:
        seen[why] += 1


class OnFake(Tensor):
    """Of its own methods it has those that torch does beneath the dispatcher, or refuses wrappers."""

    cpu_: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, cpu.shape, strides=cpu.stride(), storage_offset=cpu.storage_offset(), dtype=cpu.dtype, device=FAKE
        )
        made.cpu_ = cpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def __tensor_flatten__(self):  # by which `Module.to` keeps parameters that are one, one
        return ["cpu_"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OnFake(inner["cpu_"])

    def __repr__(self, *, tensor_contents=None):
        return f"OnFake({self.cpu_})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def tolist(self):
        _waits("down")
        return self.cpu_.tolist()

    def numpy(self, *, force=False):
        raise TypeError(
            "can't convert fake device type tensor to numpy. Use Tensor.cpu() to copy it to the host first."
        )

    def untyped_storage(self):
        return self.cpu_.untyped_storage()

    def data_ptr(self):
        return self.cpu_.data_ptr()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.cpu_ = value.cpu_

    def as_subclass(self, cls):  # by which Pyro marks where a value comes from
        return OnFake.__new__(_also(cls), self.cpu_)


@cache
def _also(cls: type[Tensor]) -> type[Tensor]:
    return type(cls.__name__, (cls, OnFake), {})


@dataclass(frozen=True)
class Operation:
    """What is to be known of one of torch's operations."""

    name: str
    changes: bool
    elementwise: bool
    random: bool

    @staticmethod
    @cache
    def of(func: Any) -> "Operation":
        schema = func._schema
        random = any("Generator" in str(argument.type) for argument in schema.arguments)
        pointwise = torch.Tag.pointwise in func.tags or func._schema.name.startswith("aten::masked_fill")
        return Operation(schema.name.removeprefix("aten::"), schema.is_mutable, pointwise, random)

    @property
    def copies(self) -> bool:
        return self.name in ("_to_copy", "copy_")

    @property
    def indexes(self) -> bool:
        return self.name in ("index", "index_put", "index_put_", "_index_put_impl_")


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with at least one tensor of the device: refused, counted, done on the CPU."""
    operation, fakes, others = Operation.of(func), [], []
    given = [_on_cpu(arg, fakes, others) for arg in args]
    named = {name: _on_cpu(arg, fakes, others) for name, arg in kwargs.items()}
    if others and not operation.copies:
        _require_one_device(operation, args, others)
    there = FAKE.type == (args[0] if operation.copies else fakes[0]).device.type  # where the answer lies
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == FAKE.type
    if there and operation.random:
        _require_no_generator([*args, *kwargs.values()])
    if counters:
        _count(operation, args, kwargs, there)
    if "pin_memory" in named:
        named["pin_memory"] = False
    answer = func(*given, **named)
    if operation.changes and any(fake.shape != fake.cpu_.shape for fake in fakes):
        raise NotImplementedError(f"{func} changes a tensor's shape in place, of which its wrapper hears nothing")
    return _wrapped(answer, fakes) if there else answer


def _on_cpu(value: Any, fakes: list[OnFake], others: list[Tensor]) -> Any:
    if isinstance(value, OnFake):
        fakes.append(value)
        return value.cpu_
    if isinstance(value, Tensor):
        others.append(value)
    elif isinstance(value, (list, tuple)):
        return [_on_cpu(item, fakes, others) for item in value]
    return CPU if type(value) is torch.device and value.type == FAKE.type else value


def _wrapped(answer: Any, fakes: list[OnFake]) -> Any:
    if isinstance(answer, (list, tuple)):
        return type(answer)(_wrapped(item, fakes) for item in answer)
    if not isinstance(answer, Tensor):
        return answer
    for fake in fakes:
        if fake.cpu_ is answer:  # changed in place
            return fake
    return OnFake(answer)


def _require_one_device(operation: Operation, args: tuple[Any, ...], others: list[Tensor]) -> None:
    target = isinstance(args[0], OnFake)  # or a list, which changes nothing
    indices = [id(index) for index in args[1]] if operation.indexes and target else []
    scalars = (operation.elementwise and (target or not operation.changes)) or (operation.indexes and target)
    if any(id(one) not in indices and not (scalars and one.dim() == 0) for one in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, fake:0 and cpu! "
            f"(in {operation.name})"
        )


def _require_no_generator(args: list[Any]) -> None:
    if any(isinstance(arg, torch.Generator) for arg in args):
        raise RuntimeError("Expected a 'fake' device type for generator but found 'cpu'")


def _count(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], there: bool) -> None:
    if operation.copies:
        source = args[1] if operation.name == "copy_" else args[0]
        if isinstance(source, OnFake) != there:
            _waits("up" if there else "down")
    elif operation.indexes:
        indices = [index for index in args[1] if index is not None]
        filled = len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], OnFake)  # as `masked_fill` does it
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not filled:
            _waits("size")
        if not all(isinstance(index, OnFake) for index in indices):
            _waits("up")
    elif kwargs.get("output_size") is None:
        for why, names in WAITS.items():
            if operation.name in names:
                _waits(why)


def _maker(func: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> OnFake:
        _require_no_generator([*args, *kwargs.values()])
        return OnFake(func(*args, **{**kwargs, "device": CPU, "pin_memory": False}))

    return make


def _copy_from(
    source: Tensor, target: OnFake, non_blocking: bool = False
) -> OnFake:  # of `torch.tensor(..., device=FAKE)`
    _waits("up")
    target.cpu_.copy_(source)
    return target


library = torch.library.Library("aten", "IMPL", "Lazy")
for each in MAKERS:
    packet, _, overload = each.partition(".")
    library.impl(each, _maker(getattr(getattr(torch.ops.aten, packet), overload or "default")))
library.impl("_copy_from", _copy_from)

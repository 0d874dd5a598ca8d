"""A device that is not there: its tensors compute on the CPU, but are as far from the CPU's as a GPU's are.

A tensor on `FAKE` is a wrapper around one of the CPU (a subclass with `__torch_dispatch__`), and claims to lie on torch's device
"lazy", which every build knows and none has a kernel for; what makes tensors there is registered here. So nothing is
switched on: `lm.to(FAKE)` or `torch.zeros(3, device=FAKE)` is enough, and a program is refused what CUDA would refuse it:
an operation on tensors of both devices (but CPU tensors of no dimension among elementwise ones, and CPU indices), a generator of
the CPU, NumPy. Its numbers are those of the CPU, random ones too. `synchronisations()` counts what a GPU's host would wait for.

Not checked: kernels, memory, speed, what is done for CUDA alone."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
FAKE = torch.device("lazy", 0)
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {
    "item": ["_local_scalar_dense"],
    "size": ["nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"],
}
WAITED = {name: why for why, names in WAITS.items() for name in names} | {"equal": "item", "repeat_interleave": "size"}
MAKE = [
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "rand",
    "rand.generator",
    "randn",
    "randn.generator",
    "randint",
    "randint.generator",
    "randint.low",
    "randint.low_generator",
    "randperm",
    "randperm.generator",
]
counting: list[Counter] = []


@contextmanager
def synchronisations() -> Iterator[Counter]:
    """Counts those inside the block, by why the host waits: for a number ("item"), for the size of a result ("size"), for a
    tensor that comes to the host ("down") or goes to the device ("up", from memory that is not pinned)."""
    seen = Counter()
    counting.append(seen)
    try:
        yield seen
    finally:
        counting.remove(seen)


def _waits(why: str) -> None:
    for seen in counting:
        seen[why] += 1


class OnFake(torch.Tensor):
    cpu_: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu):
        return _wrapper(cls, cpu)

    def __init__(self, cpu):
        self.cpu_ = cpu

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def __tensor_flatten__(
        self,
    ):  # by which torch knows that modules have to move it as a whole: what is tied stays tied
        return ["cpu_"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OnFake(inner["cpu_"])

    # What torch does beneath the dispatcher, or not at all with wrappers.

    def __repr__(self, *, tensor_contents=None):
        return f"OnFake({self.cpu_})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def tolist(self):
        _waits("down")
        return self.cpu_.tolist()

    def numpy(self, *, force=False):
        raise TypeError(
            "can't convert fake device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
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
        torch.Tensor.data.__set__(self, value)
        self.cpu_ = value.cpu_

    def as_subclass(self, cls):  # Pyro's provenance
        made = _wrapper(_joined(cls), self.cpu_)
        made.cpu_ = self.cpu_
        return made


def _wrapper(cls, cpu):
    return torch.Tensor._make_wrapper_subclass(
        cls, cpu.shape, strides=cpu.stride(), storage_offset=cpu.storage_offset(), dtype=cpu.dtype, device=FAKE
    )


@cache
def _joined(cls):
    return type(cls.__name__, (cls, OnFake), {})


def _cpu(value):
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == FAKE.type else value
    return value.cpu_ if isinstance(value, OnFake) else value


def _dispatch(func, args, kwargs):
    """An operation with at least one tensor of the device."""
    leaves = tree_flatten((args, kwargs))[0]
    fakes = [leaf for leaf in leaves if isinstance(leaf, OnFake)]
    strangers = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnFake)]
    if strangers and func not in COPIES:
        _require_one_device(func, args, strangers)
    device = _device(func, args, kwargs)
    if device == FAKE.type:
        _require_generator(leaves)
    _count(func, args, kwargs, device)
    given, named = tree_map(_cpu, (args, kwargs))
    if "pin_memory" in named:
        named["pin_memory"] = False
    out = func(*given, **named)
    same = {id(fake.cpu_): fake for fake in fakes}  # what is changed in place is answered as it was given
    if func._schema.is_mutable and any(fake.shape != fake.cpu_.shape for fake in fakes):
        raise NotImplementedError(f"{func} changes a tensor's shape in place, of which its wrapper hears nothing")

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or device != FAKE.type:
            return value
        return same[id(value)] if id(value) in same else OnFake(value)

    return tree_map(wrapped, out)


def _device(func, args, kwargs) -> str:
    """Where the result lies."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    return args[0].device.type if func in COPIES else FAKE.type


def _require_one_device(func, args, strangers):
    indexed = func in INDEXED and isinstance(args[0], OnFake)
    allowed = [index for index in args[1] if index is not None] if indexed else []
    changed = func._schema.is_mutable and not isinstance(args[0], OnFake)
    scalars = not changed and (torch.Tag.pointwise in func.tags or indexed)
    allowed += [one for one in strangers if one.dim() == 0] if scalars else []
    if any(not any(one is other for other in allowed) for one in strangers):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, fake:0 and cpu! (in {func})"
        )


def _require_generator(leaves):
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError("Expected a 'fake' device type for generator but found 'cpu'")


def _count(func, args, kwargs, device):
    name = func._schema.name.removeprefix("aten::")
    if func in COPIES:
        source = args[1] if func is aten.copy_.default else args[0]
        if source.device.type != device:
            _waits("up" if device == FAKE.type else "down")
    elif func in INDEXED:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], OnFake)  # as `masked_fill` does it
        if masks and not filled:
            _waits("size")
        if any(index is not None and not isinstance(index, OnFake) for index in args[1]):
            _waits("up")
    elif name in WAITED and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
        _waits(WAITED[name])


def _maker(name):
    packet, _, overload = name.partition(".")
    make = getattr(getattr(aten, packet), overload or "default")

    def made(*args, **kwargs):
        _require_generator([*args, *kwargs.values()])
        return OnFake(make(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

    return made


def _copy_from(source, target, non_blocking=False):  # of `torch.tensor(..., device=FAKE)`
    _waits("up")
    target.cpu_.copy_(source)
    return target


library = torch.library.Library("aten", "IMPL", "Lazy")
with warnings.catch_warnings():
    warnings.simplefilter("error")  # a build that has kernels for this device would say so
    for each in MAKE:
        library.impl(each, _maker(each))
    library.impl("_copy_from", _copy_from)

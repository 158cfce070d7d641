"""Gluon kernels on a CPU, since Gluon has no interpreter: their own source is executed, on Python threads and torch.

    with interpreted():            # a launch of a Gluon kernel then runs here, on CPU tensors
        attention_hopper(q, k, v, ...)

What a kernel uses is replaced by stand-ins; what has none raises AttributeError. Each partition of ``warp_specialize``
is a thread, one of which runs at a time, until it waits or arrives. The machine is as unkind as its rules allow:

    shared memory     begins as NaN, and a TMA load makes its destination NaN when issued; the bytes come when somebody
                      waits for its barrier: what is read or overwritten too early is NaN in the result
    TMA               zeros where a coordinate is outside its dimension; addresses are added modulo 2^64
    warpgroup_mma     reads its operands in shared memory when it is waited for; before, it has no result. The sum is
                      float64, rounded once to float32
    mbarrier          phases, arrivals and bytes are counted; where all partitions wait, DeadlockError

That proves indices, masks, formulas, roundings, and that partitions wait for one another. It proves nothing of layouts
(a tensor here has none), of proxies and fences, of registers that an asynchronous product still reads, or of speed.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper

from ..kernels import launch


class DeadlockError(RuntimeError):
    """Every partition waits for a barrier that none will complete."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Within, Gluon kernels are executed on CPU tensors; triton must have been imported with TRITON_INTERPRET=1."""
    run, runnable = GluonJITFunction.run, launch.require_runnable
    GluonJITFunction.run, launch.require_runnable = execute, lambda op, x: None
    try:
        yield
    finally:
        GluonJITFunction.run, launch.require_runnable = run, runnable


def execute(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
    """A launch: one program after the other."""
    known = {name: options[name] for name in kernel.arg_names if name in options}
    for ids in itertools.product(*(range(size) for size in grid)):
        Program(ids).translate(kernel)(*(from_host(x) for x in args), **known)


def from_host(x: Any) -> Any:
    """What a kernel gets for an argument of its launch."""
    if isinstance(x, Tensor):
        return Pointer(x, torch.tensor(0))
    return Descriptor(x) if hasattr(x, "block_shape") else x


class Value(Tensor):
    """A tensor in registers: ``x += y`` makes a new one, as in Triton."""


for _name in ("add", "sub", "mul", "truediv", "floordiv"):
    setattr(Value, f"__i{_name}__", getattr(Tensor, f"__{_name}__"))


class Pointer:
    """Where elements of a contiguous tensor are: offsets [...] from its first."""

    def __init__(self, base: Tensor, offset: Tensor) -> None:
        self.base, self.offset = base.view(-1), offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.base, self.offset + offset)

    def load(self) -> Tensor:
        return self.base[self.inside(self.offset)].as_subclass(Value)

    def store(self, value: Tensor, mask: Tensor) -> None:
        offset, value, mask = torch.broadcast_tensors(self.offset, value, mask)
        self.base[self.inside(offset[mask])] = value[mask].to(self.base.dtype)

    def inside(self, offset: Tensor) -> Tensor:
        if ((offset < 0) | (offset >= len(self.base))).any():
            raise IndexError(f"{offset.min()} to {offset.max()} of {len(self.base)} elements")
        return offset


class Descriptor:
    """A tensor as TMA sees it: dimensions, strides, the block that a load brings."""

    def __init__(self, host: Any) -> None:
        self.host, self.dtype, self.layout = host, host.base.dtype, host.layout
        size = torch.Size(host.block_shape).numel() * host.base.element_size()
        self.block_type = SimpleNamespace(shape=list(host.block_shape), nbytes=size)

    def read(self, coordinates: Sequence[Any]) -> Tensor:
        """The block there, zeros where a coordinate is outside of its dimension."""
        block = self.host.block_shape
        address, inside = torch.tensor(self.host.base.storage_offset()), torch.tensor(True)
        for axis, (first, size, stride) in enumerate(zip(coordinates, self.host.shape, self.host.strides, strict=True)):
            at = (int(first) + torch.arange(block[axis])).view([-1 if i == axis else 1 for i in range(len(block))])
            inside = inside & (at >= 0) & (at < size)
            address = address + at * stride  # int64 wraps as addresses do
        base = self.host.base
        everything = base.as_strided((base.untyped_storage().nbytes() // base.element_size(),), (1,), 0)
        return torch.where(inside, everything[torch.where(inside, address, 0)], 0)


class Memory:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: Any) -> "Memory":
        return Memory(self.data[int(i)])

    def reshape(self, shape: list[int]) -> "Memory":
        return Memory(self.data.view(shape))

    def permute(self, order: Sequence[int]) -> "Memory":
        return Memory(self.data.permute(*order))


class Barrier:
    """An mbarrier: its phase is complete once ``count`` have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.phase = self.count = self.pending = self.bytes = 0
        self.loads: list[Callable[[], None]] = []

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, number: int) -> None:
        self.pending -= number
        if self.pending < 0:
            raise RuntimeError(f"more than {self.count} arrivals in one phase of a barrier")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: Any) -> bool:
        """Whether the phase of this parity is complete, for which as few loads come as it takes."""
        while self.loads and self.phase % 2 == int(parity):
            self.loads.pop(0)()
        return self.phase % 2 != int(parity)


class Barriers:
    """What ``allocate_shared_memory`` gives for barriers."""

    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Product:
    """A product on its way: ``result`` is there once it was waited for."""

    def __init__(self, a: Any, b: Memory, acc: Tensor, use_acc: bool) -> None:
        self.operands, self.acc = (a, b), acc if use_acc else torch.zeros_like(acc)
        self.result: Tensor | None = None

    def finish(self) -> None:
        a, b = ((x.data if isinstance(x, Memory) else x).double() for x in self.operands)
        self.result = (self.acc.double() + a @ b).float()


class Program:
    """One program of a grid: the stand-ins, and the turns of its partitions."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.turn = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.polite: set[int] = set()
        self.running = 0
        self.error: BaseException | None = None
        self.products: dict[int, list[Product]] = {}  # of each thread, in order
        self.functions: dict[Any, FunctionType] = {}
        language = self.language(ids)
        self.stand_ins = {gl: language, tl: language, hopper.mbarrier: self.mbarriers()}
        self.stand_ins |= {
            getattr(hopper.tma, "async_load", hopper.tma.async_copy_global_to_shared): self.async_load,
            hopper.warpgroup_mma: self.warpgroup_mma,
            hopper.warpgroup_mma_wait: self.warpgroup_mma_wait,
            hopper.fence_async_shared: lambda: None,
        }

    def translate(self, jitted: Any) -> FunctionType:
        """A jitted function as a Python function whose globals are stand-ins, and so on with those that it calls."""
        raw = jitted.fn
        if raw not in self.functions:
            found: dict[str, Any] = {}
            self.functions[raw] = FunctionType(raw.__code__, found, raw.__name__, raw.__defaults__, raw.__closure__)
            names = [name for name in raw.__code__.co_names if name in raw.__globals__]
            found |= {name: self.stand_in(raw.__globals__[name]) for name in names}
        return self.functions[raw]

    def stand_in(self, value: Any) -> Any:
        if isinstance(value, tl.constexpr):
            return value.value
        if hasattr(value, "fn"):
            return self.translate(value)
        return self.stand_ins.get(value, value)

    def language(self, ids: tuple[int, ...]) -> SimpleNamespace:
        """gl and tl, as far as needed."""
        return SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "exp2", "log2", "where")},
            **{name: getattr(gl, name) for name in ("NVMMADistributedLayout", "SliceLayout", "BlockedLayout")},
            DotOperandLayout=gl.DotOperandLayout,
            program_id=lambda axis: ids[axis],
            allocate_shared_memory=allocate,
            static_range=range,
            arange=lambda start, end, layout=None: torch.arange(start, end).as_subclass(Value),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype).as_subclass(Value),
            load=Pointer.load,
            store=Pointer.store,
            convert_layout=lambda value, layout: value,
            cdiv=lambda a, b: -(-a // b),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            warp_specialize=self.warp_specialize,
        )

    def mbarriers(self) -> SimpleNamespace:
        return SimpleNamespace(
            MBarrierLayout=hopper.mbarrier.MBarrierLayout,
            init=Barrier.init,
            expect=self.expect,
            arrive=self.arrive,
            wait=lambda barrier, phase: self.wait(lambda: barrier.passed(phase)),
        )

    def arrive(self, barrier: Barrier) -> None:
        """Arrive, and let all others go on as far as they can."""
        barrier.arrive(1)
        me = threading.get_ident()
        self.polite.add(me)
        self.turn.notify_all()
        self.turn.wait_for(lambda: self.error or self.running == len(self.polite) + self.stuck())
        self.polite.remove(me)

    def stuck(self) -> int:
        return sum(not passed() for passed in self.waiting.values())

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive(1)

    def async_load(self, descriptor: Descriptor, coordinates: Sequence[Any], barrier: Barrier, memory: Memory) -> None:
        block = descriptor.read(coordinates)
        memory.data.fill_(torch.nan)

        def come() -> None:
            memory.data.copy_(block)
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.arrive(0)

        barrier.loads.append(come)

    def warpgroup_mma(self, a: Any, b: Memory, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
        if a.dtype != b.dtype:
            raise TypeError(f"warpgroup_mma: expected operands of one dtype, found {a.dtype} and {b.dtype}")
        product = Product(a, b, acc, use_acc)
        self.products.setdefault(threading.get_ident(), []).append(product)
        return product if is_async else self.warpgroup_mma_wait(0, (product,))

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        products = self.products[threading.get_ident()]
        while len(products) > outstanding:
            products.pop(0).finish()
        results = [x.result if isinstance(x, Product) else x for x in deps]
        return results[0] if len(results) == 1 else results

    def warp_specialize(self, partitions: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        """Run the partitions, each in a thread of its own, to their end. Raises what one of them raises."""
        threads = [threading.Thread(target=self.partition, args=(function, args)) for function, args in partitions]
        self.running = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def partition(self, function: Callable[..., None], args: Sequence[Any]) -> None:
        with self.turn:
            try:
                function(*args)
            except BaseException as error:
                self.error = self.error or error
            self.running -= 1
            self.pass_turn()

    def wait(self, passed: Callable[[], bool]) -> None:
        """Let others run until ``passed``."""
        me = threading.get_ident()
        self.waiting[me] = passed
        self.pass_turn()
        self.turn.wait_for(lambda: self.error or passed())
        del self.waiting[me]
        if self.error:
            raise self.error

    def pass_turn(self) -> None:
        if 0 < self.running == self.stuck():
            self.error = self.error or DeadlockError(f"{self.running} partitions wait, and none will arrive")
        self.turn.notify_all()


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Memory | Barriers:
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return Barriers(shape[0])
    return Memory(torch.full(shape, torch.nan, dtype=dtype))

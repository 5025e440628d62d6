"""Gluon kernels on a CPU: the functions under `@gluon.jit`, run with stand-ins for the language.

Values are torch tensors. The partitions of a `warp_specialize` are threads of which one runs at a
time; at every barrier, copy and product a seed decides who goes on, and when a copy lands. As on
the hardware:

- Shared memory is NaN until it is written, and so is the target of a copy until that lands.
- An mbarrier counts arrivals and bytes, and a wait passes if the phase of its parity is not the
  one that is under way, whichever round that was.
- An asynchronous product has no value before it is waited for, and NaN where its operands in
  shared memory were not the same from its begin to then.
- What threads stored to shared memory is not there for products without fence and barrier, and
  not for other threads without barrier.

If nobody can go on, that is a deadlock, and raises.
"""

from __future__ import annotations

import inspect
import operator
import random
import textwrap
import threading
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch

REGISTERS = (torch.float16, torch.bfloat16, torch.float32)


class DeadlockError(AssertionError):
    """Every partition waits and no copy is under way."""


class FaultError(AssertionError):
    """Something that the hardware or the compiler does not allow."""


def _data(value):
    return value.data if isinstance(value, Value) else value


def _operator(function):
    def apply(self, other):
        return Value(function(self.data, _data(other)))

    def reflected(self, other):
        return Value(function(torch.as_tensor(other, dtype=self.data.dtype), self.data))

    return apply, reflected


def _quotient(a, b):
    return torch.div(a, b, rounding_mode="trunc")


class Value:
    """A tensor or scalar in registers."""

    def __init__(self, data):
        self.data = torch.as_tensor(data)

    dtype = property(lambda self: self.data.dtype)
    type = SimpleNamespace(layout=None)

    def reshape(self, shape):
        return Value(self.data.reshape(shape))

    def to(self, dtype):
        return Value(self.data.to(dtype))

    def __getitem__(self, index):
        return Value(self.data[index])

    def __neg__(self):
        return Value(-self.data)

    def __invert__(self):
        return Value(~self.data)

    def __index__(self):
        return int(self.data)

    def __bool__(self):
        return bool(self.data)

    __add__, __radd__ = _operator(operator.add)
    __sub__, __rsub__ = _operator(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(_quotient)
    __mod__, __rmod__ = _operator(torch.fmod)
    __and__, __rand__ = _operator(operator.and_)
    __or__, __ror__ = _operator(operator.or_)
    __xor__, __rxor__ = _operator(operator.xor)
    __rshift__, __rrshift__ = _operator(operator.rshift)
    __lt__, __le__ = _operator(operator.lt)[0], _operator(operator.le)[0]
    __gt__, __ge__ = _operator(operator.gt)[0], _operator(operator.ge)[0]
    __eq__, __ne__ = _operator(operator.eq)[0], _operator(operator.ne)[0]
    __hash__ = None


class Pointer:
    """Into the whole storage of a tensor; out of it is a fault."""

    def __init__(self, storage, offset):
        self.storage, self.offset = storage, offset

    @classmethod
    def to(cls, tensor):
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(storage, torch.tensor(tensor.storage_offset()))

    dtype = property(lambda self: SimpleNamespace(element_ty=self.storage.dtype))

    def __add__(self, other):
        return Pointer(self.storage, self.offset + _data(other))

    def places(self, mask):
        """Indices that `mask` lets through, as long as they exist; and the mask, as wide."""
        mask = torch.ones_like(self.offset, dtype=torch.bool) if mask is None else _data(mask)
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        wrong = mask & ((offset < 0) | (offset >= len(self.storage)))
        if wrong.any():
            raise FaultError("access beyond a tensor's memory")
        return offset, mask


class Shared:
    """A buffer in shared memory; views share `data` and `state`."""

    def __init__(self, data, state):
        self.data, self.state = data, state

    dtype = property(lambda self: self.data.dtype)

    def index(self, place):
        return Shared(self.data[int(place)], self.state[int(place)])

    def permute(self, order):
        return Shared(self.data.permute(order), self.state)

    def shaped(self, shape):
        return Shared(self.data.view(shape), self.state)

    def store(self, value):
        if value.dtype != self.dtype or value.data.shape != self.data.shape:
            raise FaultError("a store of another type or shape")
        self.data.copy_(value.data)
        self.state.stored, self.state.fenced = True, False
        current().stored.append(self.state)

    def load(self, layout):
        if self.state.stored:
            raise FaultError("shared memory is read before a barrier makes stores visible")
        return Value(self.data.clone())


@dataclass
class State:
    """Of a buffer: stores that no barrier, or no fence, has followed yet."""

    stored: bool = False
    fenced: bool = True


@dataclass(eq=False)
class Barrier:
    """An mbarrier: phases by number, the first is 0."""

    count: int | None = None
    phase: int = 0
    pending: int = 0
    bytes: int = 0

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, count, transactions=0):
        self.pending -= count
        self.bytes += transactions
        if self.pending < 0:
            raise FaultError("more arrivals than a barrier counts")
        self._complete()

    def land(self, transactions):
        self.bytes -= transactions
        self._complete()

    def passes(self, parity):
        return self.phase & 1 != parity

    def _complete(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Barriers:
    """An array of them in shared memory."""

    def __init__(self, number):
        self.all = [Barrier() for _ in range(number)]

    def index(self, place):
        return self.all[int(place)]


@dataclass(eq=False)
class Copy:
    """From global to shared memory, under way."""

    source: torch.Tensor
    target: torch.Tensor
    barrier: Barrier

    def land(self):
        self.target.copy_(self.source)
        self.barrier.land(self.source.numel() * self.source.element_size())


@dataclass(eq=False)
class Product:
    """An asynchronous a @ b + acc; `value` is None until it is waited for."""

    a: Value | Shared
    b: Shared
    acc: Value | Product
    use_acc: bool
    at_begin: torch.Tensor | None = None
    value: Value | None = None

    dtype = torch.float32

    def compute(self):
        for operand in (self.a, self.b):
            if isinstance(operand, Shared) and (operand.state.stored or not operand.state.fenced):
                raise FaultError("a product reads what no fence and barrier made visible")
        product = self.a.data.float() @ self.b.data.float()
        return product + self.acc.data if self.use_acc else product

    def begin(self):
        if not isinstance(self.acc, Value):
            raise FaultError("a product on an accumulator that is not there yet")
        self.at_begin = self.compute()

    def registers(self):
        """What its registers hold: anything while it is under way."""
        if self.value is None:
            return Value(torch.full_like(self.at_begin, torch.nan))
        return self.value

    def finish(self):
        at_end = self.compute()
        same = at_end == self.at_begin
        self.value = Value(torch.where(same, at_end, torch.nan))


@dataclass(eq=False)
class Partition:
    """A thread of the emulation, for some warps."""

    program: Program
    run: object
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: object = None
    done: bool = False
    products: list = field(default_factory=list)
    stored: list = field(default_factory=list)


_running = threading.local()


def current() -> Partition:
    """The partition whose thread this is."""
    return _running.partition


class Program:
    """What one program's partitions share, and who of them goes on."""

    def __init__(self, rng):
        self.rng, self.copies, self.partitions, self.error = rng, [], [], None
        self.finished = threading.Event()

    def run(self, bodies):
        self.partitions = [Partition(self, body) for body in bodies]
        threads = [threading.Thread(target=self._thread, args=(p,)) for p in self.partitions]
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.error is None and self.copies:
            self.error = FaultError("a program ends while copies are under way")
        if self.error is not None:
            raise self.error

    def pause(self, waits_for=None):
        """Let a partition, or a copy, chosen by chance go on; return when this one may."""
        partition = current()
        partition.waits_for = waits_for
        self._next()
        partition.wake.acquire()
        if self.error is not None:
            raise self.error

    def _thread(self, partition):
        _running.partition = partition
        partition.wake.acquire()
        try:
            if self.error is None:
                partition.run()
        except BaseException as error:
            self.error = self.error or error
        partition.done = True
        self._next()

    def _next(self):
        while True:
            left = [p for p in self.partitions if not p.done]
            if self.error is not None:
                for partition in left:
                    partition.wake.release()
                return
            able = [p for p in left if p.waits_for is None or p.waits_for()]
            choices = able + self.copies
            if not choices:
                if left:
                    self.error = DeadlockError(f"{len(left)} partitions wait for ever")
                    continue
                return
            chosen = self.rng.choice(choices)
            if isinstance(chosen, Partition):
                chosen.waits_for = None
                chosen.wake.release()
                return
            self.copies.remove(chosen)
            chosen.land()


class Language:
    """`gluon.language` and what of `nvidia.hopper` the kernels use, for one program."""

    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    static_range = staticmethod(range)

    def __init__(self, program_id, rng):
        self.program, self._id = Program(rng), program_id

    def __getattr__(self, name):
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        raise AttributeError(f"the emulator has no gl.{name}")

    def program_id(self, axis):
        return Value(torch.tensor(self._id, dtype=torch.int32))

    def arange(self, start, end, layout):
        return Value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape, value, dtype, layout):
        return Value(torch.full(shape, value, dtype=dtype))

    def zeros(self, shape, dtype, layout):
        return self.full(shape, 0, dtype, layout)

    def where(self, condition, x, y):
        return Value(torch.where(condition.data, _data(x), _data(y)))

    def minimum(self, x, y):
        return Value(torch.minimum(x.data, torch.as_tensor(_data(y), dtype=x.dtype)))

    def maximum(self, x, y):
        return Value(torch.maximum(x.data, torch.as_tensor(_data(y), dtype=x.dtype)))

    def max(self, x, axis):
        return Value(x.data.amax(axis))

    def sum(self, x, axis):
        return Value(x.data.sum(axis))

    def exp2(self, x):
        return Value(x.data.exp2())

    def log2(self, x):
        return Value(x.data.log2())

    def convert_layout(self, x, layout):
        return x

    def load(self, pointer, mask=None, other=None):
        offset, mask = pointer.places(mask)
        values = pointer.storage[offset.where(mask, 0)]
        return Value(values if other is None else values.where(mask, other))

    def store(self, pointer, value, mask=None):
        offset, mask = pointer.places(mask)
        pointer.storage[offset[mask]] = value.data.to(pointer.storage.dtype)[mask]

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == torch.int64:
            return Barriers(shape[0])
        data = torch.full(shape, torch.nan, dtype=dtype)
        return Shared(data, [State() for _ in range(shape[0])])

    def warp_specialize(self, functions, warps, registers):
        if len(warps) != len(functions) - 1 or len(registers) != len(warps):
            raise FaultError("one number of warps and registers for each partition but the first")
        self.program.run([
            lambda function=function, args=args: function(*args) for function, args in functions
        ])  # fmt: skip

    # Of nvidia.hopper, and of shim.py.

    def fence_async_shared(self):
        if hasattr(_running, "partition"):
            for state in current().stored:
                state.fenced = True

    def partition_barrier(self):
        for state in current().stored:
            state.stored = False
        current().stored.clear()

    def view(self, buffer, descriptor):
        return buffer.shaped(descriptor.block_shape)

    def load_tile(self, descriptor, at, barrier, result):
        at = [int(place) for place in at]
        base, index = descriptor.base, []
        inside = torch.ones((), dtype=torch.bool)
        for axis, (start, block) in enumerate(zip(at, descriptor.block_shape, strict=True)):
            length, shape = base.shape[axis], [1] * base.ndim
            shape[axis] = block
            places = torch.arange(start, start + block).view(shape)
            inside = inside & (places >= 0) & (places < length)
            index.append(places.clamp(0, length - 1))
        result.data.fill_(torch.nan)
        source = base[tuple(index)].where(inside, 0)
        self.program.copies.append(Copy(source, result.data, barrier))
        self.program.pause()

    def warpgroup_mma(self, a, b, acc, *, use_acc=True, is_async=False):
        if not is_async:
            raise FaultError("only asynchronous products are emulated")
        product = Product(a, b, acc, use_acc)
        product.begin()
        current().products.append(product)
        self.program.pause()
        return product

    def warpgroup_mma_wait(self, num_outstanding, deps):
        self.program.pause()
        under_way = current().products
        while len(under_way) > num_outstanding:
            under_way.pop(0).finish()
        values = [dep.registers() if isinstance(dep, Product) else dep for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def mbarrier(self):
        def expect(barrier, transactions):
            barrier.arrive(1, transactions)
            self.program.pause()

        def arrive(barrier, *, count=1):
            barrier.arrive(count)
            self.program.pause()

        def wait(barrier, parity):
            parity = int(parity)
            self.program.pause(lambda: barrier.passes(parity))

        def init(barrier, count):
            barrier.init(count)

        return SimpleNamespace(
            expect=expect, arrive=arrive, wait=wait, init=init, MBarrierLayout=lambda: None
        )


HOPPER = ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait", "mbarrier")
SHIM = ("partition_barrier", "view", "load_tile")


class Kernel:
    """A kernel of a module, launched as `kernel[grid](...)`.

    seed: of the order of events. faults: replacements of the source.
    """

    def __init__(self, module: ModuleType, name: str, seed: int = 0, faults: tuple = ()):
        self.module, self.name, self.seed = module, name, seed
        self.constants, sources = {}, []
        for key, item in vars(module).items():
            if hasattr(item, "fn") and item.fn.__module__ == module.__name__:
                source = textwrap.dedent(inspect.getsource(item.fn))
                sources.append(source[source.index("def ") :])
            elif type(item).__name__ == "constexpr":
                self.constants[key] = item.value
        self.source = "from __future__ import annotations\n" + "\n\n".join(sources)
        for old, new in faults:
            if old not in self.source:
                raise ValueError(f"the kernel's source has no {old!r}")
            self.source = self.source.replace(old, new)
        self.code = compile(self.source, f"<{name}>", "exec")

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, programs, args, options):
        rng = random.Random(self.seed)
        # Outputs must not depend on the order of programs.
        for program_id in rng.sample(range(programs), programs):
            language = Language(program_id, rng)
            names = {name: getattr(language, name) for name in (*HOPPER, *SHIM)}
            namespace = {"gl": language, "range": counted, **names, **self.constants}
            exec(self.code, namespace)
            function = namespace[self.name]
            parameters = inspect.signature(function).parameters
            constants = {k: v for k, v in options.items() if k in parameters}
            function(*map(argument, args), **constants)


def counted(*bounds):
    """`range`, of scalars."""
    return (Value(torch.tensor(i, dtype=torch.int32)) for i in range(*map(operator.index, bounds)))


def argument(value):
    """What the kernel sees of an argument."""
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    if isinstance(value, float):
        return Value(torch.tensor(value, dtype=torch.float32))
    if isinstance(value, int):
        return Value(torch.tensor(value, dtype=torch.int32))
    return value

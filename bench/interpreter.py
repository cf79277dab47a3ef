"""Triton's interpreter, in which kernels run without a GPU: made quick, and made to watch over memory."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
from unittest import mock

import torch

from stn_triton import backend


class _Nothing:
    def restore(self):
        pass


@contextlib.contextmanager
def quick_interpreter(overflow_checks=True):
    """Triton's interpreter, quicker and to the same results; nothing where it is not in use.

    It searches ``triton.language`` for functions to replace at each call of a device function: here once a
    launch. It makes many objects, to no good of a frequent garbage collector. And where Python's stack
    happens to cross the end of a 16 KiB chunk in an inner loop, as it does under pytest and hypothesis,
    every call maps and unmaps a chunk: a launch here has a thread, and with it a stack, of its own. What it
    asks of a type at each operation is asked once (``_remember_types``), and operands that need no conversion
    go to NumPy at once (``_Operators``). Its checks of integer overflow can be left out. Inside another one,
    this one's checks count.
    """
    if not backend.interpreting():
        yield
        return
    from triton.runtime import interpreter

    language = interpreter.tl, interpreter.tl.core
    operators = _Operators(interpreter)
    find, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    @functools.cache
    def modules(globals_id, entries, fn):
        return frozenset(id(value) for value in fn.__globals__.values() if any(value is m for m in language))

    def find_once(fn):
        if fn in done:
            return _Nothing()
        done.add(fn)
        key = modules(id(fn.__globals__), len(fn.__globals__), fn)
        if key in done:
            return _Nothing()
        done.add(key)
        scope = find(fn)
        operators.install(scope)
        return scope

    def launch(self, *args, **kwargs):
        done.clear()
        try:
            return thread.submit(call, self, *args, **kwargs).result()
        finally:
            done.clear()

    find_once.quick = True
    with contextlib.ExitStack() as stack:

        def patch(owner, name, value, **options):
            stack.enter_context(mock.patch.object(owner, name, value, **options))

        options = interpreter.interpreter_builder.options
        if hasattr(options, "sanitize_overflow"):
            options = dataclasses.replace(options, sanitize_overflow=overflow_checks)
            patch(interpreter.interpreter_builder, "options", options)
        if not hasattr(find, "quick"):
            thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            threshold = gc.get_threshold()
            stack.callback(gc.set_threshold, *threshold)
            gc.set_threshold(100_000, *threshold[1:])
            patch(interpreter, "_patch_lang", find_once)
            patch(interpreter.GridExecutor, "__call__", launch)
            patch(
                interpreter.interpreter_semantic,
                "cast",
                operators.cast(interpreter.interpreter_semantic.cast),
            )
            _remember_types(interpreter, patch)
        yield


def _remember_types(interpreter, patch):
    """What Triton's frontend works out of a type again at each operation is worked out once for each type.

    A type's name says all of it. Results are the same objects' attributes, or equal ones.
    """
    core = interpreter.tl.core
    tensor, block_type, constexpr = core.tensor, core.block_type, core.constexpr
    as_numpy, unwrap = interpreter._get_np_dtype, core._unwrap_if_constexpr
    make_tensor, make_block_type, make_tuple = tensor.__init__, block_type.__init__, core.tuple.__init__
    numpy_types, tensors, blocks = {}, {}, {}
    convert = interpreter.interpreter_semantic.binary_op_type_checking_impl
    containers = {}

    def numpy_type(tt_dtype):
        found = numpy_types.get(tt_dtype.name)
        if found is None:
            found = numpy_types[tt_dtype.name] = as_numpy(tt_dtype)
        return found

    def tensor_init(self, handle, type):
        known = tensors.get(type.name)
        if known is None:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            self.__dict__ = dict(known, handle=handle)

    def block_type_init(self, element_ty, shape):
        key = element_ty.name, *[n.value if type(n) is constexpr else n for n in shape]
        known = blocks.get(key)
        if known is None:
            make_block_type(self, element_ty, shape)
            blocks[key] = vars(self)
        else:
            self.__dict__ = known

    def tuple_init(self, args, type=None):
        if type is None:
            self.values = list(args)
        else:
            make_tuple(self, args, type)

    def operands(lhs, rhs, *options, **more):
        if type(lhs) is type(rhs) is tensor and lhs.dtype.name in _NUMBERS and lhs.type.name == rhs.type.name:
            return lhs, rhs  # nothing to convert or to broadcast
        return convert(lhs, rhs, *options, **more)

    class Type:
        """A tuple's type, made when it is asked for."""

        def __get__(self, value, owner):
            value.type = core._type_for_tuple_values(value.values)
            return value.type

    def unwrapped(value):
        kind = type(value)
        if kind is constexpr:
            return value.value
        if kind not in containers:
            containers[kind] = issubclass(kind, (list, tuple, core.tuple, constexpr))
        return unwrap(value) if containers[kind] else value

    def constexpr_function(self, *args, _semantic=None, **kwargs):
        """As there are no constexprs in the interpreter, the result is as it comes."""
        return self.fn(*map(unwrapped, args), **{name: unwrapped(value) for name, value in kwargs.items()})

    def quick_equality(kind):
        equal = kind.__eq__
        patch(kind, "__eq__", lambda self, other: self is other or equal(self, other))

    for module in (core, interpreter.tl.semantic, interpreter.tl.math):
        if getattr(module, "_unwrap_if_constexpr", None) is unwrap:
            patch(module, "_unwrap_if_constexpr", unwrapped)
    for kind in (core.dtype, core.pointer_type, block_type):
        quick_equality(kind)
    patch(interpreter, "_get_np_dtype", numpy_type)
    patch(interpreter.interpreter_semantic, "binary_op_type_checking_impl", operands)
    patch(interpreter.triton.runtime.jit.ConstexprFunction, "__call__", constexpr_function)
    patch(tensor, "__init__", tensor_init)
    patch(block_type, "__init__", block_type_init)
    patch(core.tuple, "__init__", tuple_init)
    patch(core.tuple, "type", Type(), create=True)


# Operators of Triton's tensors: NumPy's function, and the scalar types that it takes as they are.
_NUMBERS, _FLOATS, _BITS = {"int32", "int64", "fp32", "fp64"}, {"fp32", "fp64"}, {"int1", "int32", "int64"}
_ARITHMETIC = {
    "add": ("add", _NUMBERS),
    "sub": ("subtract", _NUMBERS),
    "mul": ("multiply", _NUMBERS),
    "truediv": ("divide", _FLOATS),
    "and": ("bitwise_and", _BITS),
    "or": ("bitwise_or", _BITS),
    "xor": ("bitwise_xor", _BITS),
}
_COMPARISONS = {
    "lt": ("less", _NUMBERS),
    "le": ("less_equal", _NUMBERS),
    "gt": ("greater", _NUMBERS),
    "ge": ("greater_equal", _NUMBERS),
    "eq": ("equal", _NUMBERS),
    "ne": ("not_equal", _NUMBERS),
}


class _Operators:
    """What goes to NumPy at once, as Triton's frontend has nothing to convert.

    That is: operands of one type, a pointer and an offset, or a tensor and a Python number that takes the
    tensor's type. NumPy broadcasts them as Triton would. All else, and integers watched for overflow,
    goes Triton's way.
    """

    def __init__(self, interpreter):
        self.interpreter, self.core, self.np = interpreter, interpreter.tl.core, interpreter.np
        self.joint_types, self.types = {}, {}

    def install(self, scope):
        """Replace operators until ``scope`` ends."""
        tensor = self.core.tensor
        if getattr(tensor.__add__, "__name__", None) == "quick":
            return
        for operators, compares in ((_ARITHMETIC, False), (_COMPARISONS, True)):
            for name, (function, types) in operators.items():
                for prefix in ("",) if compares else ("", "r"):
                    slow = getattr(tensor, f"__{prefix}{name}__")
                    quick = self.operator(slow, getattr(self.np, function), types, compares, bool(prefix))
                    scope.set_attr(tensor, f"__{prefix}{name}__", quick)
        for module in (self.interpreter.tl, self.core):
            scope.set_attr(module, "where", self.where(module.where))

    def joint_type(self, a, b):
        """The type of an operation on two, None if they have to be converted."""
        key = a.name, b.name
        if key not in self.joint_types:
            self.joint_types[key] = self._joint_type(a, b) if a.scalar.name == b.scalar.name else None
        return self.joint_types[key]

    def _joint_type(self, a, b):
        if not (a.is_block() and b.is_block()):
            return a if a.is_block() else b
        try:
            shape = self.np.broadcast_shapes(*[[int(n) for n in kind.get_block_shapes()] for kind in (a, b)])
        except ValueError:
            return None  # Triton's error
        return self.core.block_type(a.scalar, list(shape))

    def type_of(self, scalar, shape):
        """A scalar type in the shape of another type."""
        key = scalar.name, shape.name
        if key not in self.types:
            self.types[key] = shape.with_element_ty(scalar) if shape.is_block() else scalar
        return self.types[key]

    def number(self, value, scalar):
        """A Python number in a scalar type, None if it does not take that type whatever its value."""
        what, name = type(value), scalar.name
        if not (
            (what is int and name != "int1" and -(2**31) <= value < 2**31)
            or (what is float and name in _FLOATS)
            or (what is bool and name == "int1")
        ):
            return None
        return self.np.array([value], self.interpreter._get_np_dtype(scalar))

    def tensor(self, data, dtype, kind):
        handle = object.__new__(self.interpreter.TensorHandle)
        handle.__dict__ = {"data": data, "dtype": dtype, "attr": {}}
        return self.core.tensor(handle, kind)

    def operator(self, slow, function, types, compares, reflected):
        np, tensor, constexpr = self.np, self.core.tensor, self.core.constexpr
        builder = self.interpreter.interpreter_builder
        adds = function is np.add
        overflows = function in (np.add, np.subtract, np.multiply)

        def quick(one, other, **options):
            kind, scalar = one.type, one.type.scalar
            if type(other) is constexpr:
                other = other.value
            if scalar.name not in types:
                moved = (
                    self.offset(one, other) if adds and scalar.is_ptr() and type(other) is tensor else None
                )
                return slow(one, other, **options) if moved is None else moved
            if overflows and scalar.name == "int32" and getattr(builder.options, "sanitize_overflow", True):
                return slow(one, other, **options)
            if type(other) is tensor:
                kind = kind if other.type.name == kind.name else self.joint_type(kind, other.type)
                operand, its_dtype = other.handle.data, other.handle.dtype.scalar
            else:  # (older Tritons round a number to float32 before they compare it)
                rounded = compares and type(other) is float and scalar.name == "fp64"
                operand, its_dtype = None if rounded else self.number(other, scalar), scalar
            if kind is None or operand is None:
                return slow(one, other, **options)
            if reflected:
                data, dtype = function(operand, one.handle.data), its_dtype
            else:
                data, dtype = function(one.handle.data, operand), one.handle.dtype.scalar
            return self.tensor(data, dtype, self.type_of(self.core.int1, kind) if compares else kind)

        return quick

    def offset(self, pointer, whole):
        """A pointer plus whole numbers, None if they have to be converted."""
        if whole.type.scalar.name not in ("int32", "int64"):
            return None
        kind = self.joint_type(pointer.type, self.type_of(pointer.type.scalar, whole.type))
        if kind is None:
            return None
        return self.core.tensor(
            self.interpreter.interpreter_builder.create_addptr(pointer.handle, whole.handle), kind
        )

    def cast(self, slow):
        def quick(value, kind, rounding=None):
            source, scalar = value.type.scalar, kind.scalar
            if source.name == scalar.name:
                return value
            if rounding is not None or source.name not in _NUMBERS or scalar.name not in _NUMBERS:
                return slow(value, kind, rounding)
            data = value.handle.data.astype(self.interpreter._get_np_dtype(scalar))
            return self.tensor(data, scalar, self.type_of(scalar, value.type))

        return quick

    def where(self, slow):
        np, tensor, constexpr = self.np, self.core.tensor, self.core.constexpr

        def quick(condition, x, y, **options):
            x, y = (value.value if type(value) is constexpr else value for value in (x, y))
            known = x if type(x) is tensor else y
            if type(condition) is tensor is type(known) and condition.type.scalar.name == "int1":
                scalar = known.type.scalar
                kind, operands = self.type_of(scalar, condition.type), []
                for value in (x, y):
                    if type(value) is tensor:
                        kind = None if kind is None else self.joint_type(kind, value.type)
                        operands.append(value.handle.data)
                    else:
                        operands.append(self.number(value, scalar))
                if kind is not None and operands[0] is not None and operands[1] is not None:
                    dtype = y.handle.dtype.scalar if type(y) is tensor else scalar
                    return self.tensor(np.where(condition.handle.data, *operands), dtype, kind)
            return slow(condition, x, y, **options)

        return quick


def _addresses(tensor):
    """The address of every element, in order."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten().unique() * tensor.element_size() + tensor.data_ptr()


class _CheckedMemory:
    """The interpreter's access to memory, for the elements of a launch's tensors alone."""

    def __init__(self, memory):
        self.memory, self.allowed = memory, None

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def check(self, what, pointers, mask):
        touched = torch.from_numpy(pointers[mask].astype("int64"))
        strangers = ~torch.isin(touched, self.allowed)
        assert not strangers.any(), f"{what} of {int(strangers.sum())} addresses outside every tensor"

    def load(self, pointers, mask, *rest):
        self.check("load", pointers, mask)
        return self.memory.load(pointers, mask, *rest)

    def store(self, pointers, value, mask):
        self.check("store", pointers, mask)
        return self.memory.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, *rest):
        self.check("atomic", pointers, mask)
        return self.memory.atomic_rmw(operation, pointers, value, mask, *rest)


@contextlib.contextmanager
def checked_addresses():
    """Every address that a kernel touches is that of an element of an argument; in the interpreter alone."""
    if not backend.interpreting():
        yield
        return
    from triton.runtime import interpreter

    call, memory = interpreter.GridExecutor.__call__, _CheckedMemory(interpreter._interpreter)

    def launch(self, *args, **kwargs):
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        memory.allowed = torch.cat([_addresses(tensor) for tensor in tensors])
        return call(self, *args, **kwargs)

    interpreter._interpreter, interpreter.GridExecutor.__call__ = memory, launch
    try:
        yield
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = memory.memory, call

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
    asks of a type at each operation is asked once (``_remember_types``). Its checks of integer overflow can
    be left out. Inside another one, this one's checks count.
    """
    if not backend.interpreting():
        yield
        return
    from triton.runtime import interpreter

    language = interpreter.tl, interpreter.tl.core
    find, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    @functools.cache
    def modules(globals_id, entries, fn):
        return frozenset(id(value) for value in fn.__globals__.values() if any(value is m for m in language))

    def find_once(fn):
        key = modules(id(fn.__globals__), len(fn.__globals__), fn)
        if key in done:
            return _Nothing()
        done.add(key)
        return find(fn)

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
    computed = {"int32", "int64", "fp32", "fp64"}
    plain = {int, float, bool, str, type(None), tensor, core.dtype, core.pointer_type, block_type}

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
        if type(lhs) is type(rhs) is tensor and lhs.dtype.name in computed and lhs.type.name == rhs.type.name:
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
        return value if kind in plain else unwrap(value)

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
    patch(tensor, "__init__", tensor_init)
    patch(block_type, "__init__", block_type_init)
    patch(core.tuple, "__init__", tuple_init)
    patch(core.tuple, "type", Type(), create=True)


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

"""Blocks as decorators: the whole body runs inside, that of coroutine and generator functions too."""

import asyncio
import contextlib
import functools
import inspect
import types

import pytest
import torch
from test_interrupts import KINDS

import stn_triton as stn


@pytest.fixture(params=KINDS)
def kind(request, device):
    if device.type != "cpu":
        pytest.skip("the states outside are those of a machine without a GPU")
    block, state, outside, inside = KINDS[request.param]
    assert state() == outside
    yield block, state, outside, inside
    assert state() == outside


def test_function(kind):
    block, state, outside, inside = kind

    @block()
    def function(factor, *, offset):
        """Docs."""
        return factor * state() + offset if isinstance(inside, int) else state()

    for _ in range(2):
        assert function(1, offset=0) == inside
        assert state() == outside
    assert function.__doc__ == "Docs."
    assert function.__name__ == "function"


def test_recursion_and_exceptions(kind):
    block, state, outside, inside = kind

    @block()
    def fall(depth):
        assert state() == inside
        if depth == 0:
            raise KeyError
        fall(depth - 1)

    with pytest.raises(KeyError):
        fall(3)
    assert state() == outside


def test_coroutine(kind):
    block, state, outside, inside = kind

    @block()
    async def function():
        found = [state()]
        await asyncio.sleep(0)
        found.append(state())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(10), 0.001)
        return [*found, state()]

    assert inspect.iscoroutinefunction(function)
    assert asyncio.run(function()) == [inside] * 3
    assert state() == outside

    async def cancelled():
        @block()
        async def forever():
            await asyncio.sleep(100)

        task = asyncio.ensure_future(forever())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return state()

    assert asyncio.run(cancelled()) == outside


def test_generator(kind):
    block, state, outside, inside = kind

    @block()
    def generate(count):
        caught = []
        for index in range(count):
            try:
                caught.append((yield index, state()))
            except ValueError as error:
                caught.append(error)
        return caught

    assert inspect.isgeneratorfunction(generate)
    assert list(generate(3)) == [(0, inside), (1, inside), (2, inside)]
    assert state() == outside
    generator, error = generate(3), ValueError()
    assert state() == outside, "it has not begun"
    assert [next(generator), generator.send("a"), generator.throw(error)] == [(k, inside) for k in range(3)]
    with pytest.raises(StopIteration) as end:
        next(generator)
    assert end.value.value == ["a", error, None]
    generator = generate(3)
    next(generator)
    generator.close()
    assert state() == outside


def test_coroutine_that_is_a_generator(kind):
    block, state, outside, inside = kind

    @block()
    @types.coroutine
    def function():
        yield from asyncio.sleep(0).__await__()
        return state()

    async def call():
        return await function()

    assert asyncio.run(call()) == inside
    assert state() == outside


def test_async_generator(kind):
    block, state, outside, inside = kind
    closed = []

    @block()
    async def generate():
        try:
            for index in range(3):
                await asyncio.sleep(0)
                try:
                    received = yield index, state()
                    closed.append(received)
                except ValueError as error:
                    closed.append(error)
        finally:
            closed.append(state())

    async def use():
        found = [item async for item in generate()]
        assert found == [(0, inside), (1, inside), (2, inside)]
        assert closed == [None, None, None, inside]
        assert state() == outside
        closed.clear()
        generator, error = generate(), ValueError()
        await generator.__anext__()
        assert await generator.asend("a") == (1, inside)
        assert await generator.athrow(error) == (2, inside)
        await generator.aclose()
        assert closed == ["a", error, inside]
        return state()

    assert inspect.isasyncgenfunction(generate)
    assert asyncio.run(use()) == outside


def test_methods_partials_and_callables(kind):
    block, state, _, inside = kind

    class Thing:
        @block()
        def method(self):
            return type(self), state()

        @block()
        @staticmethod
        def static():
            return state()

        @classmethod
        @block()
        def of_class(cls):
            return cls, state()

        @block()
        @classmethod
        def below(cls):
            return cls, state()

        @block()
        async def coroutine(self):
            return state()

        async def __call__(self):
            return state()

    thing = Thing()
    assert thing.method() == thing.of_class() == thing.below() == (Thing, inside)
    assert Thing.static() == thing.static() == inside
    assert asyncio.run(thing.coroutine()) == inside
    assert asyncio.run(block()(functools.partial(thing.coroutine.__func__, thing))()) == inside

    async def call():
        return await block()(thing)()

    assert asyncio.run(call()) == inside


def passed_on(function):
    """A decorator of another package: a plain function, which returns what the decorated one does."""

    @functools.wraps(function)
    def passed(*args, **kwargs):
        return function(*args, **kwargs)

    return passed


@pytest.mark.parametrize(
    "other",
    [passed_on, torch.no_grad(), lambda function: functools.partial(passed_on(function))],
    ids=["function", "no_grad", "partial"],
)
def test_bodies_that_other_functions_return(kind, other):
    """They run when they are driven, inside too."""
    block, state, outside, inside = kind

    @block()
    @other
    async def coroutine():
        await asyncio.sleep(0)
        return state()

    @block()
    @passed_on
    def generate():
        received = yield state()
        return received, state()

    @block()
    @passed_on
    async def generate_async():
        yield state()
        await asyncio.sleep(0)
        yield state()

    async def all_of(generator):
        return [item async for item in generator]

    assert asyncio.run(coroutine()) == inside
    generator = generate()
    assert state() == outside, "it has not begun"
    assert next(generator) == inside
    with pytest.raises(StopIteration) as end:
        generator.send("a")
    assert end.value.value == ("a", inside)
    assert asyncio.run(all_of(generate_async())) == [inside, inside]
    assert state() == outside


@pytest.mark.parametrize("manager", [contextlib.contextmanager, contextlib.asynccontextmanager])
@pytest.mark.parametrize("wrap", [passed_on, functools.partial], ids=["function", "partial"])
def test_context_managers_of_contextlib(kind, manager, wrap):
    """Above, the body would run outside, silently; below, it is covered."""
    block, state, _, inside = kind

    def body():
        yield state()

    async def async_body():
        yield state()

    body = body if manager is contextlib.contextmanager else async_body
    with pytest.raises(TypeError, match=r"body would run outside the block: put the decorator .* below"):
        block()(wrap(manager(body)))()
    below = manager(block()(body))()

    async def enter():
        async with below as found:
            return found

    if manager is contextlib.contextmanager:
        with below as found:
            assert found == inside
    else:
        assert asyncio.run(enter()) == inside


def test_several_on_one_function():
    @stn.patch_torch()
    @stn.autotune()
    def generate():
        yield [KINDS[name][1]() for name in ("patch_torch", "autotune")]

    assert list(generate()) == [[True, True]]


@pytest.mark.parametrize("what", [type("Net", (), {}), 3, None, "name"], ids=repr)
def test_what_has_no_body_is_refused(kind, what):
    block, *_ = kind
    with pytest.raises(TypeError, match="decorates functions and methods, got"):
        block()(what)

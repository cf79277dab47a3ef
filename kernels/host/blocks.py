"""``with`` blocks inside which something holds: which are open. No interrupt leaves one open.

An interrupt (the handler of a signal that raises, such as Ctrl-C's) comes between any two instructions, even
between the end of a block and the first thing that its ``__exit__`` does. So nothing is counted up that would
have to be counted down again: a block is open while its token lives, and the ``with`` statement's own object
holds the one reference to it. What cuts a block short takes that object away, and the token with it.
"""

from __future__ import annotations

import _thread
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Token:
    """Of a block that has ended."""

    __slots__ = ("__weakref__", "kind")
    kind: Blocks[Any] | LocalBlocks[Any]


class _Open(_Token):
    """Of a block that has not: it ends with the token."""

    __slots__ = ()

    def __del__(self) -> None:
        kind = getattr(self, "kind", None)
        if kind is not None:
            kind.remove(self)
            kind.changed()


class Blocks(Generic[T]):
    """The open blocks of one kind, in all threads, with what each of them says.

    ``changed`` is called after a block was opened or closed, and whenever that may have happened.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.open: dict[weakref.ref[_Token], T] = {}  # in the order in which they were opened
        self.changed = changed

    def add(self, token: _Token, says: T) -> None:
        # ``dict.pop``, no function of ours, in which an interrupt would be swallowed
        self.open[weakref.ref(token, self.open.pop)] = says

    def remove(self, token: _Token) -> None:
        self.open.pop(weakref.ref(token), None)

    def values(self) -> tuple[T, ...]:
        return tuple(self.open.values()) if self.open else ()

    def __bool__(self) -> bool:
        return bool(self.open)


class LocalBlocks(Generic[T]):
    """The same for blocks that concern their own thread or task alone. Some in ``open`` may have ended."""

    def __init__(self, name: str) -> None:
        self.open: ContextVar[dict[weakref.ref[_Token], T] | None] = ContextVar(name, default=None)

    def changed(self) -> None: ...

    def add(self, token: _Token, says: T) -> None:
        self.open.set({**self._living(), weakref.ref(token): says})

    def remove(self, token: _Token) -> None:
        self.open.set({ref: says for ref, says in self._living().items() if ref() is not token})

    def _living(self) -> dict[weakref.ref[_Token], T]:
        return {ref: says for ref, says in (self.open.get() or {}).items() if ref() is not None}

    def values(self) -> tuple[T, ...]:
        if not self.open.get():
            return ()
        living = self._living()
        self.open.set(living)
        return tuple(living.values())


class Block(Generic[T]):
    """A context manager and decorator. It may be entered again, inside itself and in other threads.

    ``with`` blocks are entered and left whole or not at all: an interrupt leaves what was before the block.
    (If the object is kept elsewhere, an interrupt just before ``__exit__`` begins leaves the block open until
    the object goes.)
    """

    def __init__(self, kind: Blocks[T] | LocalBlocks[T], says: T) -> None:
        self._kind, self._says = kind, says
        self._entered: dict[_Token, int] = {}  # and the thread that entered each

    def _given(self) -> Any:
        """What ``as`` gets. Not this object: who keeps it keeps a block open whose end was interrupted."""
        return self._says

    def _another(self) -> Block[T]:
        """For one call of a decorated function; likewise not this object."""
        return Block(self._kind, self._says)

    def __enter__(self) -> Any:
        given = self._given()
        token: _Token = _Open()
        token.kind = self._kind
        me = _thread.get_ident()
        try:
            self._kind.add(token, self._says)
            self._kind.changed()
            self._entered[token] = me  # no call, after which an interrupt could come
        except BaseException:
            self._entered.pop(token, None)
            self._kind.remove(token)
            self._kind.changed()
            raise
        return given

    def __exit__(self, *exception: object) -> None:
        if not self._entered:
            raise RuntimeError("a block was left that had not been entered")
        token = next(reversed(self._entered))
        me = _thread.get_ident()
        if self._entered[token] != me:  # another thread has entered the same object since
            token = next((own for own, thread in reversed(self._entered.items()) if thread == me), token)
        del self._entered[token]
        try:
            self._kind.remove(token)
            self._kind.changed()
        except BaseException:
            self._kind.remove(token)
            self._kind.changed()
            raise
        token.__class__ = _Token  # no __del__ any more, in which an interrupt would be swallowed

    def __call__(self, function: Any) -> Any:
        """Decorates: the function's body runs as if it stood in a block.

        That of a coroutine or generator function does from its first step to its end.

        Raises:
            TypeError: what is decorated is no function or method, or is a class.
        """
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"{type(self).__name__} decorates functions and methods, got {function!r}"
                + (": decorate its methods" if isinstance(function, type) else "")
            )
        another = self._another

        def covered(*args: Any, **kwargs: Any) -> Any:
            with another():
                return function(*args, **kwargs)

        def covered_generator(*args: Any, **kwargs: Any) -> Any:
            with another():
                return (yield from function(*args, **kwargs))

        async def covered_coroutine(*args: Any, **kwargs: Any) -> Any:
            with another():
                return await function(*args, **kwargs)

        async def covered_async_generator(*args: Any, **kwargs: Any) -> Any:
            with another():
                body = function(*args, **kwargs)
                try:
                    step = body.asend(None)
                    while True:
                        try:
                            value = await step
                        except StopAsyncIteration:
                            return
                        try:
                            step = body.asend((yield value))
                        except GeneratorExit:
                            raise
                        except BaseException as error:  # a task that is cancelled ends by one
                            step = body.athrow(error)
                finally:
                    await body.aclose()

        for kind, wrapper in (
            (inspect.isgeneratorfunction, covered_generator),
            (inspect.iscoroutinefunction, covered_coroutine),
            (inspect.isasyncgenfunction, covered_async_generator),
        ):
            if kind(function) or kind(type(function).__call__):  # type: ignore[operator]
                return functools.wraps(function)(wrapper)
        return functools.wraps(function)(covered)


def whole(change: Callable[[], None]) -> None:
    """Runs what no interrupt may cut short in a thread of its own: signals are handled in the main thread.

    An interrupt while it runs is raised here, and it goes on.
    """
    failures: list[BaseException] = []
    done: SimpleQueue[Any] = SimpleQueue()
    token = _Token()
    ended = weakref.ref(token, done.put)  # the thread holds it until it ends, even if it never gets to run

    def run(token: _Token) -> None:
        del token  # or the traceback of a failure would hold it
        try:
            change()
        except BaseException as error:
            failures.append(error)

    try:
        if sys.is_finalizing():  # a thread would not get to run
            raise RuntimeError
        _thread.start_new_thread(run, (token,))
    except RuntimeError:  # none to be had
        run(token)
    del token
    done.get()
    del ended
    if failures:
        raise failures[0]

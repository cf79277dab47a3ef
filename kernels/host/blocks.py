"""``with`` blocks inside which something holds: which are open. No interrupt leaves one open.

An interrupt (the handler of a signal that raises, such as Ctrl-C's) comes between any two instructions, even
between the end of a block and the first thing that its ``__exit__`` does. So nothing is counted up that would
have to be counted down again: a block is open while its token lives. A ``with`` statement gets an
``__exit__`` of its own, which holds the one reference to the token. What cuts the statement short takes that
away, and the token with it, whoever keeps the block's object or the exception. So no frame of ``__exit__``
holds a token: an exception that is kept keeps the frames that it passed.

A forked process has one thread, the one that forked. The blocks of others end there, and locks are free.
"""

from __future__ import annotations

import _thread
import functools
import inspect
import os
import sys
import types
import weakref
from collections.abc import Callable
from contextlib import _GeneratorContextManagerBase  # type: ignore[attr-defined]
from contextvars import ContextVar
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T = TypeVar("T")


class _Token:
    """Of a block that has ended."""

    __slots__ = ("__weakref__", "kept", "kind", "thread")

    def __init__(self, kind: Blocks[Any] | LocalBlocks[Any] | None = None) -> None:
        self.kind = kind
        self.thread = _thread.get_ident()  # that entered the block
        self.kept = True  # by an object that may outlive the block; False: by a ``with`` statement


class _Open(_Token):
    """Of a block that has not: it ends with the token."""

    __slots__ = ()

    def __del__(self) -> None:
        kind = getattr(self, "kind", None)
        if kind is not None:
            kind.remove(weakref.ref(self))
            kind.changed()


_Ref = weakref.ref[_Token]
_processwide: weakref.WeakSet[Blocks[Any]] = weakref.WeakSet()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class Blocks(Generic[T]):
    """The open blocks of one kind, in all threads, with what each of them says.

    ``changed`` is called after a block was opened or closed, and whenever that may have happened.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.open: dict[_Ref, T] = {}  # in the order in which they were opened
        self.changed = changed
        _processwide.add(self)

    def add(self, token: _Token, says: T) -> None:
        # ``dict.pop``, no function of ours, in which an interrupt would be swallowed
        self.open[weakref.ref(token, self.open.pop)] = says

    def remove(self, token: _Ref) -> None:
        self.open.pop(token, None)

    def end(self, which: Callable[[_Ref], bool]) -> None:
        """Ends blocks before they are left, which then changes nothing. Does not call ``changed``."""
        # Other references than those in ``open``, which call back. Without a step in Python, in which tokens
        # would be held, or end.
        for token in set(map(weakref.ref, filter(None, map(weakref.ref.__call__, tuple(self.open))))):
            if which(token):
                self.remove(token)
                _disarm(token())

    def values(self) -> tuple[T, ...]:
        return tuple(self.open.values()) if self.open else ()

    def __bool__(self) -> bool:
        return bool(self.open)


class LocalBlocks(Generic[T]):
    """The same for blocks that concern their own thread or task alone. Some in ``open`` may have ended."""

    def __init__(self, name: str) -> None:
        self.open: ContextVar[dict[_Ref, T] | None] = ContextVar(name, default=None)

    def changed(self) -> None: ...

    def add(self, token: _Token, says: T) -> None:
        self.open.set({**self._living(), weakref.ref(token): says})

    def remove(self, token: _Ref) -> None:
        self.open.set({ref: says for ref, says in self._living().items() if ref != token})

    def _living(self) -> dict[_Ref, T]:
        return {ref: says for ref, says in (self.open.get() or {}).items() if ref() is not None}

    def values(self) -> tuple[T, ...]:
        if not self.open.get():
            return ()
        living = self._living()
        self.open.set(living)
        return tuple(living.values())


def is_kept(token: _Ref) -> bool:
    """Whether a block is held open by an object, not by a ``with`` statement."""
    return getattr(token(), "kept", False)


# ------------------------------------------------------------------------------------------- forks
def lock() -> Any:
    """A lock that a forked process finds free, whoever held it."""
    made = _thread.allocate_lock()
    _locks.add(made)
    return made


def _forked() -> None:
    me = _thread.get_ident()
    for held in _locks:
        held._at_fork_reinit()
    for kind in _processwide:
        kind.end(lambda token: getattr(token(), "thread", me) != me)
        kind.changed()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


# ------------------------------------------------------------------------------------------ blocks
class _Leave(functools.partial[None]):
    """The ``__exit__`` of one ``with`` statement. Calling it makes no frame that would hold it."""

    token: _Token


class _Exit:
    """``Block.__exit__``, which Python asks for before it calls ``__enter__``."""

    def __get__(self, block: Block[Any] | None, owner: type) -> Any:
        if block is None:  # contextlib's stacks: they hold the block
            return owner._leave_kept  # type: ignore[attr-defined]
        leave = _Leave(block._leave, [])
        block._asked[_thread.get_ident()] = weakref.ref(leave)
        return leave


class Block(Generic[T]):
    """A context manager and decorator. It may be entered again, inside itself and in other threads.

    ``with`` blocks are entered and left whole or not at all: an interrupt leaves what was before the block.
    What is entered by hand (``__enter__``, ``contextlib.ExitStack``) is so too, but for an interrupt just
    before ``__exit__`` begins. That leaves the block open until its object goes, which an exception that is
    kept may hold; a patch's ``disable`` ends it.
    """

    def __init__(self, kind: Blocks[T] | LocalBlocks[T], says: T) -> None:
        self._kind, self._says = kind, says
        self._asked: dict[int, weakref.ref[_Leave]] = {}  # by threads: for ``__exit__``, and not entered yet
        self._entered: list[_Token] = []  # by hand

    def _given(self) -> Any:
        """What ``as`` gets."""
        return self._says

    def _another(self) -> Block[T]:
        """For one call of a decorated function."""
        return Block(self._kind, self._says)

    def __enter__(self) -> Any:
        asked = self._asked.pop(_thread.get_ident(), None)
        leave = None if asked is None else asked()
        given = self._given()
        token: _Token = _Open(self._kind)
        own = weakref.ref(token)
        try:
            self._kind.add(token, self._says)
            self._kind.changed()
            if leave is None:
                self._entered.append(token)
            else:
                leave.token = token
                leave.args[0].append(own)
                token.kept = False
            del token, leave  # an exception that is kept keeps this frame
            return given
        except BaseException:
            self._kind.remove(own)
            self._kind.changed()
            self._entered[:] = [other for other in self._entered if other is not own()]
            raise

    if TYPE_CHECKING:

        def __exit__(self, *exception: object) -> None: ...

    else:
        __exit__ = _Exit()

    def _leave(self, own: list[_Ref], *exception: object) -> None:
        """Of a ``with`` statement. ``own``: its token, unless nothing was entered since it was asked for."""
        if not own:
            self._leave_kept()
            return
        try:
            self._kind.remove(own[0])
            self._kind.changed()
        except BaseException:
            self._kind.remove(own[0])
            self._kind.changed()
            raise
        _disarm(own.pop()())

    def _leave_kept(self, *exception: object) -> None:
        """Of what was entered by hand."""
        if not self._entered:
            raise RuntimeError("a block was left that had not been entered")
        me = _thread.get_ident()
        # another thread may have entered the same object since, and some may have been ended
        ranks = [(token.thread == me, type(token) is _Open) for token in self._entered]
        token = self._entered.pop(max(range(len(ranks)), key=lambda index: (*ranks[index], index)))
        own = weakref.ref(token)
        try:
            self._kind.remove(own)
            self._kind.changed()
        except BaseException:
            self._kind.remove(own)
            self._kind.changed()
            raise
        _disarm(token)

    def __call__(self, function: Any) -> Any:
        """Decorates: the function's body runs as if it stood in a block.

        That of a coroutine or generator function does from its first step to its end, and so does a coroutine
        or generator that another function returns.

        Raises:
            TypeError: what is decorated is no function or method, or is a class. When called: it returns what
                ``contextlib.contextmanager`` made, whose body would run outside.
        """
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"{type(self).__name__} decorates functions and methods, got {function!r}"
                + (": decorate its methods" if isinstance(function, type) else "")
            )
        another = self._another
        for is_function, _, covering in _BODIES:
            if is_function(function) or is_function(type(function).__call__):
                return functools.wraps(function)(covering(another, function))

        @functools.wraps(function)
        def covered(*args: Any, **kwargs: Any) -> Any:
            with another():
                result = function(*args, **kwargs)
            for _, is_body, covering in _BODIES:
                if is_body(result):  # and has yet to run
                    return covering(another, lambda: result)()
            if isinstance(result, _GeneratorContextManagerBase):
                raise TypeError(
                    f"{function!r} returned a context manager of contextlib's, whose body would run outside "
                    f"the block: put the decorator {type(self).__name__} below contextlib's"
                )
            return result

        return covered


def _disarm(token: _Token | None) -> None:
    """No ``__del__`` any more, in which an interrupt would be swallowed."""
    if token is not None:
        token.__class__ = _Token


# -------------------------------------------------------------------------------------- decorators
_Makes = Callable[[], Block[Any]]


def _generator(another: _Makes, function: Callable[..., Any]) -> Callable[..., Any]:
    def covered(*args: Any, **kwargs: Any) -> Any:
        with another():
            return (yield from function(*args, **kwargs))

    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return types.coroutine(covered) if flags & inspect.CO_ITERABLE_COROUTINE else covered


def _coroutine(another: _Makes, function: Callable[..., Any]) -> Callable[..., Any]:
    async def covered(*args: Any, **kwargs: Any) -> Any:
        with another():
            return await function(*args, **kwargs)

    return covered


def _async_generator(another: _Makes, function: Callable[..., Any]) -> Callable[..., Any]:
    async def covered(*args: Any, **kwargs: Any) -> Any:
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

    return covered


# (a function whose body runs later, such a body, how it is covered)
_BODIES: tuple[tuple[Callable[[Any], bool], Callable[[Any], bool], Callable[..., Any]], ...] = (
    (inspect.isgeneratorfunction, inspect.isgenerator, _generator),
    (inspect.iscoroutinefunction, inspect.iscoroutine, _coroutine),
    (inspect.isasyncgenfunction, inspect.isasyncgen, _async_generator),
)


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

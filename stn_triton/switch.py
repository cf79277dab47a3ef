"""Patches of other packages: for a block, for a function, or until they are turned off."""

from __future__ import annotations

import _thread
from typing import Any, ClassVar

from .kernels.host.blocks import Block, Blocks, is_kept, lock, whole

__all__ = ["Patch", "Switch"]


class Switch:
    """Whether a patch is in force.

    Whether it is wanted follows from ``_enabled`` and the open blocks, each set by one assignment; what is
    put in place follows that, by ``turn_on`` and ``turn_off`` of a subclass. Each either happens, or raises
    and has done nothing. No two of them run at a time, and no interrupt reaches them.
    """

    def __init__(self) -> None:
        self.blocks: Blocks[None] = Blocks(self.settle)
        self._enabled = False
        self._in_force = False
        self._lock = lock()
        self._settling: int | None = None  # the thread that does

    def prepare(self) -> None:
        """What may fail or be interrupted, before the patch is wanted."""

    def turn_on(self) -> None:
        raise NotImplementedError

    def turn_off(self) -> None:
        """Also what was turned on or off by half, where a process was forked meanwhile."""
        raise NotImplementedError

    def _wanted(self) -> bool:
        return self._enabled or bool(self.blocks)

    def switch(self, enabled: bool) -> None:
        before = self._enabled
        try:
            self._enabled = enabled
            if not enabled:
                self.blocks.end(is_kept)
            self.settle()
        except BaseException:
            self._enabled = before
            self.settle()
            raise

    def settle(self) -> None:
        """Turns the patch on or off, as is wanted; returns when that is done, whoever does it."""
        if self._settling == _thread.get_ident():  # from within: _settle looks again
            return
        while self._settling is not None or self._in_force != self._wanted():
            whole(self._settle)

    def _settle(self) -> None:
        with self._lock:
            if self._settling is not None:  # a thread that the process from which this was forked has
                self.turn_off()
                self._in_force = False
            self._settling = _thread.get_ident()
            try:
                while True:
                    wanted = self._wanted()
                    if wanted and not self._in_force:
                        self.turn_on()
                        self._in_force = True
                    elif not wanted and self._in_force:
                        # Told first: who opens a block from here on waits, who did before is seen now.
                        self._in_force = False
                        if self._wanted():
                            self._in_force = True
                        else:
                            self.turn_off()
                    else:
                        return
            finally:
                self._settling = None


class Patch(Block[None]):
    """A context manager and decorator that turns a switch on, or class methods that do."""

    _switch: ClassVar[Switch]

    def __init__(self, *function: Any) -> None:
        if function:
            name = type(self).__name__
            raise TypeError(f"{name} takes no arguments, got {function[0]!r}; a decorator is @stn.{name}()")
        self._switch.prepare()
        super().__init__(self._switch.blocks, None)

    def _given(self) -> Any:
        return type(self)()

    _another = _given

    @classmethod
    def enable(cls) -> None:
        """From here on, in all threads. A second call changes nothing."""
        cls._switch.prepare()
        cls._switch.switch(True)

    @classmethod
    def disable(cls) -> None:
        """Undoes ``enable``, whoever called it. ``with`` blocks that are open stay in force until they end.

        What was entered by hand (``__enter__``, ``contextlib.ExitStack``) ends here: an interrupt may have
        left it open for good. Leaving it afterwards changes nothing.
        """
        cls._switch.switch(False)

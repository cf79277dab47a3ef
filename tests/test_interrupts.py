"""Interrupts at any moment leave what was: blocks are entered and left whole or not at all."""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_patch import in_force
from test_tuning import GPU, PROBLEM

import stn_triton as stn
from stn_triton import backend
from stn_triton.kernels.host import blocks, configs, tables

PACKAGE = str(Path(stn.__file__).resolve().parent)


class Interrupt(BaseException):
    pass


def on_the_cpu():
    return backend.select("cpu").name


def warps():
    return configs.choose(GPU, PROBLEM).warps


# name: (a block of the kind, what holds, its value outside, its value inside)
KINDS = {
    "patch_torch": (stn.patch_torch, in_force, False, True),
    "backend.use": (lambda: backend.use("torch"), on_the_cpu, "interpreter", "torch"),
    "autotune": (stn.autotune, lambda: bool(tables.live), False, True),
    "ignore_shipped": (tables.ignore_shipped, lambda: bool(tables.ignoring), False, True),
    "override": (lambda: configs.override(warps=16), warps, 4, 16),
}


@pytest.fixture(autouse=True)
def _on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("the states outside are those of a machine without a GPU")


@pytest.fixture(params=KINDS)
def kind(request):
    block, state, outside, inside = KINDS[request.param]
    assert state() == outside
    yield block, state, outside, inside
    assert state() == outside


@pytest.fixture
def alarm():
    """``alarm(seconds)``: a signal whose handler raises, once; with 0 none."""

    def handler(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def seconds_of(function):
    start = time.perf_counter()
    for _ in range(5):
        function()
    return (time.perf_counter() - start) / 5


def strike_by_signals(function, check, alarm, count, seed):
    """Runs the function with a signal at a random moment each time, until so many have interrupted it."""
    chance, longest, struck, tries = random.Random(seed), 1.1 * seconds_of(function), 0, 0
    while struck < count:
        tries += 1
        assert tries < 100 * count, "signals come too late"
        try:
            alarm(chance.uniform(1e-6, longest))
            for _ in range(50):  # a signal comes later than it was asked for, by as much as short calls take
                function()
            alarm(0)
        except Interrupt:
            struck += 1
        check()


def strike_at(number, function, of, kept=None):
    """Raises before the given bytecode instruction of the package or of the function ``of``, counted from 0;
    whether there was one. ``kept``: a list of which the last entry becomes the exception."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        code = frame.f_code
        if code is not getattr(of, "__code__", None) and not code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event in ("opcode", "call"):
            if left == 0:
                left = -1
                raise Interrupt
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except Interrupt as error:
        if kept is not None:
            kept[:] = [error]
        return True
    finally:
        sys.settrace(before)
    return left < 0


# ------------------------------------------------------------------------------------------- blocks
def test_signals_at_random_moments(kind, alarm):
    block, state, outside, inside = kind

    def work():
        with block():
            if state() != inside:
                raise AssertionError("a block takes no effect")

    def check():
        assert state() == outside

    strike_by_signals(work, check, alarm, 1000, seed=1)
    work()


def test_an_interrupt_before_any_instruction(kind):
    block, state, outside, inside = kind

    def work():
        with block():
            pass

    number = 0
    while strike_at(number, work, work):
        assert state() == outside, f"instruction {number}"
        with block():
            assert state() == inside, f"instruction {number}"
        number += 1
    assert number > 50


def test_an_interrupt_in_what_is_open(kind):
    """Inner and overlapping blocks that are interrupted end no others."""
    block, state, _, inside = kind

    def work():
        with block():
            pass

    with block():
        for number in range(0, 10**6, 7):
            if not strike_at(number, work, work):
                break
            assert state() == inside, f"instruction {number}"


def test_decorated_functions_are_left_too(kind):
    block, state, outside, _ = kind
    work = block()(lambda: None)
    number = 0
    while strike_at(number, work, work):
        assert state() == outside, f"instruction {number}"
        number += 1
    assert number > 50


def test_a_block_that_is_kept_and_entered_again(kind):
    """What interrupts its beginning leaves it closed though somebody holds it."""
    block, state, outside, inside = kind
    kept = block()
    with kept, kept:
        assert state() == inside
    number = 0
    while strike_at(number, kept.__enter__, kept.__enter__):
        if kept._entered:  # at the very end, of which no signal's handler is called
            assert state() == inside
            kept.__exit__(None, None, None)
        assert state() == outside, f"instruction {number}"
        number += 1
    assert state() == inside
    kept.__exit__(None, None, None)


def test_nobody_who_keeps_the_block_or_the_exception_keeps_it_open(kind):
    """As a session does that shows the last exception."""
    block, state, outside, inside = kind
    kept, exceptions = block(), []

    def work():
        with kept:
            pass

    number = 0
    while strike_at(number, work, work, exceptions):
        assert state() == outside, f"instruction {number}"
        number += 1
    assert number > 50
    assert exceptions
    with kept:
        assert state() == inside


def test_left_more_often_than_entered(kind):
    block, state, _, inside = kind
    kept = block()
    with pytest.raises(RuntimeError, match="had not been entered"):
        kept.__exit__(None, None, None)
    with kept:
        assert state() == inside


def test_exit_stacks_hold_their_blocks(kind):
    block, state, outside, inside = kind
    with contextlib.ExitStack() as stack:
        stack.enter_context(block())
        assert state() == inside
    assert state() == outside


# ------------------------------------------------------------------------------- enable and disable
def test_on_and_off_heal(alarm):
    """Whatever was interrupted, ``enable`` and ``disable`` do afterwards as they say."""
    patch = stn.patch_torch

    def work():
        patch.enable()
        with patch():
            patch.disable()

    def check():
        for change, expected in ((patch.disable, False), (patch.enable, True), (patch.disable, False)):
            change()
            assert in_force() == expected

    strike_by_signals(work, check, alarm, 500, seed=3)


@pytest.mark.parametrize("heal", [("disable", "enable", "disable"), ("enable", "disable")], ids=" ".join)
def test_on_and_off_heal_what_an_exit_stack_left(heal):
    """With the block and the exception kept, it may stay open: until it is disabled."""
    exceptions = []

    def work():
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept)

    number, stuck, struck = 0, 0, True
    while struck:
        kept = stn.patch_torch()
        struck = strike_at(number, work, contextlib.ExitStack.__exit__, exceptions)
        stuck += in_force()
        for change in heal:
            getattr(stn.patch_torch, change)()
            assert in_force() == (change == "enable"), f"instruction {number}"
        number += 5
    assert stuck > 0
    with stn.patch_torch(), kept:
        stn.patch_torch.disable()
        assert in_force(), "with statements outlive it"
    assert not in_force()


def test_leaving_what_disable_has_ended_changes_nothing():
    with contextlib.ExitStack() as stack:
        stack.enter_context(stn.patch_torch())
        stn.patch_torch.disable()
        assert not in_force()
        with stn.patch_torch():
            stack.close()
            assert in_force()
    assert not in_force()


@pytest.mark.parametrize("first", [True, False], ids=["enable", "disable"])
def test_an_interrupt_before_any_instruction_of_on_and_off(first):
    """It leaves the old state or the new one, and what PyTorch runs is as the state says."""
    enable, disable = stn.patch_torch.enable, stn.patch_torch.disable
    change, back = (enable, disable) if first else (disable, enable)
    number, found = 0, set()
    back()
    try:
        while strike_at(number, change, change):
            assert in_force() == stn.patch._patch._enabled
            found.add(in_force())
            back()
            number += 1
    finally:
        disable()
    assert number > 30
    assert not in_force()
    assert found == {True, False}


def test_two_interrupts(alarm):
    """Ctrl-C, and once more: what is in force follows at the next call at the latest."""
    chance = random.Random(4)

    def work():
        with stn.patch_torch():
            pass

    longest = 1.1 * seconds_of(work)
    for _ in range(400):
        try:
            try:
                alarm(chance.uniform(1e-6, longest))
                work()
            finally:
                alarm(chance.uniform(1e-6, longest / 4))
                time.sleep(longest / 3)
                alarm(0)  # on a busy machine the second one is late
        except Interrupt:
            with contextlib.suppress(Interrupt):
                time.sleep(longest / 3)
                alarm(0)
        assert not stn.patch._patch.blocks
        stn.patch_torch.disable()
        assert not in_force()
        with stn.patch_torch():
            assert in_force()


# ------------------------------------------------------------------------------------------- threads
def test_threads_while_one_is_interrupted(alarm):
    """Other threads' blocks stay in force until they end."""
    wrong, done = [], threading.Event()

    def work():
        with stn.patch_torch():
            time.sleep(1e-4)

    def others():
        while not done.is_set():
            with stn.patch_torch():
                if not in_force():
                    wrong.append("not in force")

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        strike_by_signals(work, lambda: None, alarm, 100, seed=5)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not in_force()


def test_a_block_left_suspended_ends_with_its_generator():
    def suspended():
        with stn.patch_torch():
            yield

    generator = suspended()
    next(generator)
    assert in_force()
    del generator
    assert not in_force()


def test_what_is_whole_goes_on(alarm):
    done = []

    def change():
        time.sleep(0.05)
        done.append(threading.current_thread())

    alarm(0.01)
    with pytest.raises(Interrupt):
        blocks.whole(change)
    blocks.whole(lambda: time.sleep(0.1))
    assert done
    assert done[0] is not threading.main_thread()
    with pytest.raises(KeyError):
        blocks.whole(lambda: {}["absent"])


def test_without_threads_it_is_done_here(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(blocks._thread, "start_new_thread", refuse)
    with stn.patch_torch():
        assert in_force()
        assert torch.ones(1) == 1
    assert not in_force()


# --------------------------------------------------------------------------------------------- forks
def forked(check):
    """Whether ``check()`` is so in a process that is forked now; None if it hangs."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os._exit(0 if check() else 1)
        os._exit(2)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {0: True, 1: False}.get(os.waitstatus_to_exitcode(status), status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@contextlib.contextmanager
def in_another_thread(work):
    """Inside, another thread is in ``work(wait)``, in its ``wait()``."""
    there, go_on = threading.Event(), threading.Event()

    def wait():
        there.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=work, args=(wait,))
    thread.start()
    assert there.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


@needs_fork
def test_a_forked_process_has_the_blocks_of_its_thread_alone(kind):
    block, state, outside, inside = kind

    def work(wait):
        with block():
            wait()

    def works():
        with block():
            now = state()
        return (now, state()) == (inside, outside)

    with in_another_thread(work):
        assert forked(lambda: state() == outside and works())
        with block():
            assert forked(lambda: state() == inside)
    assert state() == outside


@needs_fork
@pytest.mark.parametrize("when", ["before", "half-way", "after"])
@pytest.mark.parametrize("change", ["turn_on", "turn_off"])
def test_a_fork_while_another_thread_turns_the_patch(monkeypatch, change, when):
    """It finds neither a lock that nobody opens nor half a patch."""
    patch, turning = stn.patch._patch, []
    real, impl, destroy = getattr(patch, change), torch.library.Library.impl, torch.library.Library._destroy

    def slowly():
        if threading.current_thread() in turning:  # once
            return real()
        turning.append(threading.current_thread())
        if when == "before":
            pause()
        real()
        if when == "after":
            pause()

    def half(self, *args, **kwargs):
        (impl if change == "turn_on" else destroy)(self, *args, **kwargs)
        pause()

    def pause():
        if not paused:
            paused.append(True)
            waits[0]()

    paused, waits = [], []

    def work(wait):
        waits.append(wait)
        with stn.patch_torch():
            pass

    monkeypatch.setattr(patch, change, slowly)
    if when == "half-way":
        monkeypatch.setattr(torch.library.Library, "impl" if change == "turn_on" else "_destroy", half)
    from test_patch import tables as kernels

    before = kernels()

    def works():
        if kernels() != before:
            return False
        with stn.patch_torch():
            if not in_force():
                return False
        return kernels() == before and not in_force()

    with in_another_thread(work):
        assert forked(works) is True
    assert kernels() == before


@needs_fork
def test_locks_of_a_forked_process_are_free():
    held = blocks.lock()

    def work(wait):
        with held:
            wait()

    with in_another_thread(work):
        assert not held.acquire(timeout=0)
        assert forked(lambda: held.acquire(timeout=0))
    assert held.acquire(timeout=0)

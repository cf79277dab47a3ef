"""Everything that wants a GPU, in one command: ``python -m bench.gpu --out DIR`` (``make gpu``).

1. At once: the tests marked gpu and the large ones; the tests that run on device tensors, the most telling
   files first, over many processes; compute-sanitizer's memcheck over a few of them, where it is installed;
   and all that the sweep will run, to fill the compilers' caches and check every result.
2. Alone on the GPU: ``bench.sweep``.
3. ``bench.plot``.

All within ``--seconds`` (530 by default: nine minutes with the start of the process), which does not
suffice for all tests, nor for all cases: in two calls, ``--only sweep`` and ``--only tests``, each part
has all of it. A stage whose slice is over is stopped with all its children, and keeps what it has. DIR
gets results.json, the pictures and gpu.log; as long as it runs a log for each stage. The last lines are
the sweep's table and one line for each stage; the exit status is 1 if one failed, or was stopped before
its end.

Needs no network, no installation and no git: PyTorch, Triton and pytest, matplotlib for the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import machine

# By what a wrong kernel would show in first. Nine in ten of the suite's tests take the device that is there.
DEVICE_TESTS = (
    "test_sample",
    "test_gather_backward",
    "test_sources",
    "test_sorted_backward",
    "test_repeatable",
    "test_ops",
    "test_opinfo",
    "test_bad_coordinates",
    "test_guard_bands",
    "test_derivatives",
    "test_accuracy",
    "test_patch",
    "test_amp",
    "test_nn",
    "test_kornia",
    "test_transforms",
    "test_functional_transforms",
    "test_fuzz",
    "test_derivatives_kernels",
    "test_torch_compile",
    "test_export",
)
# All paddings and both alignments of bilinear samples, planar and in vectors, with coordinates of all kinds.
MEMCHECK = "(stays_inside or stay_inside) and (bilinear or float32) and not 3d"
# Processes, of the cores that such machines have 16 or more of; and where the others are not there.
WARMING, TESTING, TESTING_MARKED = 4, 7, 2
WARMING_ALONE, TESTING_ALONE = 12, 11
# Shares of the seconds: until when the checks may run, and what the pictures and the table are left.
CHECKS, REST = 0.52, 0.06
GRACE = 5.0  # seconds between asking to stop and killing


@dataclasses.dataclass
class Stage:
    """A child process, or why there is none (``absent``).

    ``ok``: exit codes that are no failure. ``may_stop``: nothing is wrong if its time is up, unless pytest
    has said by then that tests failed. ``refusal``: what it prints where the machine does not let it run.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: str = ""
    ok: tuple[int, ...] = (0,)
    may_stop: bool = False
    refusal: str = ""
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    stopped: bool = False
    outcome: str = "not started"

    @property
    def failed(self) -> bool:
        if self.stopped and self.may_stop:
            return re.search(r"^(FAILED|ERROR) ", self._said(), re.MULTILINE) is not None
        return self.outcome not in ("ok", "absent")

    def _said(self) -> str:
        return self.log.read_text(errors="replace") if self.log is not None and self.log.exists() else ""

    def start(self, log: Path) -> None:
        if self.absent:
            self.outcome = "absent"
            return
        self.started, self.log = time.monotonic(), log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=machine.ROOT,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_own_group,
            )
        self.outcome = "running"

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.process is None or self.outcome != "running":
            return True
        code = self.process.poll()
        if code is None:
            return False
        self.seconds = time.monotonic() - self.started
        self.outcome = "ok" if code in self.ok else f"failed, exit status {code}"
        if code not in self.ok and self.refusal and self.refusal in self._said():
            self.outcome, self.absent = "absent", f"not on this machine: {self.refusal}"
        if self.stopped:
            self.outcome = f"stopped after {self.seconds:.0f} s"
        self._signal(signal.SIGKILL)  # whatever it left behind
        return True

    def ask(self) -> None:
        """Asks it to stop: pytest and the sweep then write what they have. Its children are left to it."""
        if not self.poll():
            assert self.process is not None
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends it and its children."""
        if self.process is not None and self.outcome == "running":
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.seconds, self.stopped = time.monotonic() - self.started, True
            self.outcome = f"stopped after {self.seconds:.0f} s"

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def _own_group() -> None:
    """In a child: a process group, so that its children end with it, and not a session, which could outlive
    whoever stops this one. It hears SIGINT, which a shell's background jobs do not."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait(stages: Sequence[Stage], deadline: float) -> bool:
    """Until all have ended or it is so late on ``time.monotonic``'s clock; whether they have."""
    while [stage for stage in stages if not stage.poll()]:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def run(stages: Sequence[Stage], out: Path, deadline: float) -> None:
    """Runs the stages at the same time, until the deadline; none of them is left after."""
    try:
        for stage in stages:
            stage.start(out / f"{stage.name}.log")
        if not wait(stages, deadline):
            late = [stage for stage in stages if not stage.poll()]
            for stage in late:
                stage.ask()
            for stage in late:  # it has been stopped, whatever its exit status will be
                stage.stopped = True
            wait(late, time.monotonic() + GRACE)
    finally:
        for stage in stages:
            stage.kill()


# ---------------------------------------------------------------------------------------------- the stages
def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]


def processes(most: int) -> list[str]:
    """pytest's options for that many workers, of which there are no more than cores."""
    count = min(most, os.cpu_count() or 1)
    return (
        ["-n", str(count), "--dist", "loadgroup"] if count > 1 and importlib.util.find_spec("xdist") else []
    )


def checks(options: argparse.Namespace) -> list[Stage]:
    """What runs at once: the tests, and what fills the compilers' caches for the sweep."""
    if options.only == "tests":
        return tests(options)
    return warming(options) if options.only == "sweep" else tests(options) + warming(options)


def tests(options: argparse.Namespace) -> list[Stage]:
    if options.cpu:
        return [
            Stage("tests-gpu", pytest("-m", "gpu", "tests/test_backend.py"), ok=(0, 5)),
            Stage("tests", pytest("tests/test_backend.py::test_use_is_undone")),
        ]
    files = [f"tests/{name}.py" for name in DEVICE_TESTS]
    workers = processes(TESTING_ALONE if options.only else TESTING)
    return [
        Stage("tests-gpu", pytest("-m", "gpu", *processes(TESTING_MARKED), "tests")),
        Stage("tests-large", pytest("tests/test_large.py")),
        Stage("tests", pytest("-m", "not gpu", *workers, *files), may_stop=True),
        memcheck(),
    ]


def warming(options: argparse.Namespace) -> list[Stage]:
    if options.cpu:
        return [Stage("warm", sweep("--cpu", "--warm", "0/1", *chosen(options)), may_stop=True)]
    parts = min(WARMING_ALONE, os.cpu_count() or 1) if options.only else WARMING
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    commands = [sweep("--warm", f"{part}/{parts}", *chosen(options)) for part in range(parts)]
    return [Stage(f"warm-{part}", command, threads, may_stop=True) for part, command in enumerate(commands)]


def memcheck() -> Stage:
    """Without PyTorch's cache of memory, in which an access beside a tensor is one within an allocation."""
    tool = machine.cuda_tool("compute-sanitizer")
    command = [tool or "", "--tool", "memcheck", "--error-exitcode", "66", *pytest("-x")]
    command += ["tests/test_guard_bands.py", "-k", MEMCHECK]
    absent = "" if tool else "compute-sanitizer is not installed"
    without_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage("memcheck", command, without_cache, absent, refusal="Device not supported")


def sweep(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", "bench.sweep", *arguments]


def chosen(options: argparse.Namespace) -> list[str]:
    found = ["--quick"] if options.quick else []
    for name in ("select", "rival"):
        for value in getattr(options, name) or ():
            found += [f"--{name}", value]
    return found


# ------------------------------------------------------------------------------------------- the command
def collect(out: Path, stages: Sequence[Stage]) -> None:
    """The stages' logs, one after the other in gpu.log: those who carry the folder count files."""
    with (out / "gpu.log").open("ab") as whole:
        for stage in stages:
            log = out / f"{stage.name}.log"
            if log.exists():
                whole.write(f"\n===== {stage.name}: {stage.outcome}\n".encode() + log.read_bytes())
                log.unlink()


def last_words(out: Path, stage: Stage) -> str:
    """The end of a stage's log: pytest's count, a failure's message."""
    log = out / f"{stage.name}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip("= ")[:120] if lines else ""


def lines_of(out: Path, stages: Sequence[Stage]) -> list[str]:
    found = []
    for stage in stages:
        said = stage.absent or ("" if stage.name == "sweep" else last_words(out, stage))
        found.append(f"{stage.name:12} {stage.outcome:24} {stage.seconds:5.0f} s  {said}".rstrip())
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="the folder for what is written")
    parser.add_argument("--seconds", type=float, default=530, help="for all of it")
    parser.add_argument("--quick", action="store_true", help="of each row of the sweep the first case alone")
    parser.add_argument("--select", action="append", help="as bench.sweep's")
    parser.add_argument("--rival", action="append", help="as bench.sweep's")
    parser.add_argument("--only", choices=("tests", "sweep"), help="one of the two, in all the time")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--cpu", action="store_true", help="a few tests, few pixels: to see that it works")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    options = parse(arguments)
    if not options.cpu and machine.accelerator() is None:
        print("no GPU: --cpu shows that the command works", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stages: list[Stage] = []
    try:
        work(options, out, begun, stages)
    except KeyboardInterrupt:
        print("interrupted: what there is follows", flush=True)
    said, failed = lines_of(out, stages), any(stage.failed for stage in stages)
    collect(out, stages)
    print(table_of(out))
    print("\n".join(said))
    return 1 if failed else 0


def work(options: argparse.Namespace, out: Path, begun: float, stages: list[Stage]) -> None:
    """Runs everything, and adds to ``stages`` what it begins."""
    end, rest = begun + options.seconds, REST * options.seconds
    stages += checks(options)
    run(stages, out, end - rest if options.only == "tests" else begun + CHECKS * options.seconds)
    if options.only == "tests":
        return
    print("\n".join(lines_of(out, stages)), flush=True)
    budget = max(end - rest - time.monotonic(), 1.0)
    command = sweep("--out", str(out), "--anew", "--budget-seconds", f"{0.9 * budget:.0f}", *chosen(options))
    command += ["--cpu"] if options.cpu else []
    command += ["--commit", options.commit] if options.commit else []
    stages.append(Stage("sweep", command))
    run(stages[-1:], out, end - rest)
    command = [sys.executable, "-m", "bench.plot", str(out / "results.json")]
    absent = "" if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"
    stages.append(Stage("plot", command, absent=absent))
    run(stages[-1:], out, max(end, time.monotonic() + 10))


def table_of(out: Path) -> str:
    """Of the results as they are, those of a sweep that was stopped too."""
    from .results import load, table

    path = out / "results.json"
    return table(load(path)) if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())

"""Runs a program that a model wrote, which can do no more than compute and print.

On Linux with x86-64, a program is confined by a seccomp filter of allowed system calls: it can
write no files, open no network connections, and start no processes or threads. Time, memory and
output are limited; the folder and the environment are empty, and the interpreter has no packages.

Not prevented: it can read every file that this user can read, though it can send the contents
nowhere but to us; and a vulnerability of the kernel is one of the sandbox. Run programs of
strangers in a virtual machine.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

from paceline.errors import MethodError

# Allowed system calls of x86-64 by number: those to read, print, compute and exit.
_ALLOWED = {
    0: "read", 1: "write", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 9: "mmap",
    10: "mprotect", 11: "munmap", 12: "brk", 13: "rt_sigaction", 14: "rt_sigprocmask",
    15: "rt_sigreturn", 17: "pread64", 19: "readv", 20: "writev", 21: "access", 24: "sched_yield",
    25: "mremap", 28: "madvise", 32: "dup", 35: "nanosleep", 39: "getpid", 60: "exit", 63: "uname",
    79: "getcwd", 89: "readlink", 96: "gettimeofday", 98: "getrusage", 100: "times", 102: "getuid",
    104: "getgid", 107: "geteuid", 108: "getegid", 131: "sigaltstack", 186: "gettid", 202: "futex",
    217: "getdents64", 228: "clock_gettime", 229: "clock_getres", 230: "clock_nanosleep",
    231: "exit_group", 262: "newfstatat", 267: "readlinkat", 269: "faccessat", 318: "getrandom",
    332: "statx", 439: "faccessat2",
}  # fmt: skip

# Runs in the child process: sets its own limits, then executes the program.
_LAUNCHER = r"""
import sys
def main(path, cpu, memory, output, *allowed):
    import ctypes, resource, struct
    with open(path) as file:
        program = file.read()
    libc = ctypes.CDLL(None, use_errno=True)
    def code(op, jt, jf, k):
        return struct.pack("HBBI", op, jt, jf, k)
    def call(*words):
        if libc.prctl(*map(ctypes.c_ulong, words)):
            raise SystemExit("no seccomp here")
    load, equal, most, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7fff0000, 0x00050001, 0x80000000
    filter = [
        code(load, 0, 0, 4), code(equal, 1, 0, 0xC000003E), code(give, 0, 0, kill),
        code(load, 0, 0, 0), code(most, 0, 1, 0x40000000), code(give, 0, 0, kill),
    ]
    for number, flags in ((2, 24), (257, 32)):  # open, openat: to read only
        filter += [
            code(equal, 0, 4, number), code(load, 0, 0, flags), code(bits, 0, 1, 0o1103),
            code(give, 0, 0, refuse), code(give, 0, 0, allow),
        ]
    for number in allowed:
        filter += [code(equal, 0, 1, int(number)), code(give, 0, 0, allow)]
    filter.append(code(give, 0, 0, refuse))
    held = ctypes.create_string_buffer(b"".join(filter))
    rules = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(filter), ctypes.addressof(held))
    )
    for name, limit in (
        ("CPU", cpu), ("AS", memory), ("FSIZE", output), ("CORE", 0), ("NOFILE", 32), ("NPROC", 0)
    ):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(limit), int(limit)))
    call(1, 9, 0, 0, 0)  # die with the parent
    call(38, 1, 0, 0, 0)  # no new privileges
    call(22, 2, ctypes.addressof(rules), 0, 0)
    return program
program = main(*sys.argv[1:])
sys.argv[:] = ["program"]
del main
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
"""

_PROBE = """
import os, socket
def refused(act):
    try:
        act()
    except PermissionError:
        return
    raise SystemExit("allowed")
refused(socket.socket)
refused(os.fork)
refused(lambda: open("file", "w"))
refused(lambda: os.unlink("file"))
refused(lambda: os.kill(os.getppid(), 0))
print("held")
"""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of one run of a program.

    Attributes:
        seconds: processor time, rounded up; the limit of wall time is twice as much.
        megabytes: address space, including about 30 for the interpreter.
        output: bytes of output.
    """

    seconds: float = 2.0
    megabytes: int = 256
    output: int = 1 << 16


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        ended: `exit`, `error` (it raised, or was killed by a limit) or `timeout`.
        output: what it printed, up to the limit.
        seconds: wall time.
    """

    ended: str
    output: str
    seconds: float


@cache
def check_sandbox() -> None:
    """Check that programs can be confined on this machine.

    Raises:
        MethodError: they cannot; no program is run then.
    """
    where = f"{platform.system()} on {platform.machine()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise MethodError(f"programs are run on Linux with x86-64 only, and this is {where}")
    result = run_program(_PROBE, "", SandboxLimits(10.0))
    if (result.ended, result.output) != ("exit", "held\n"):
        raise MethodError("this system cannot confine programs with seccomp, so none is run")


def run_program(program: str, given: str, limits: SandboxLimits | None = None) -> ProgramResult:
    """Run Python `program` with `given` as its input. Call `check_sandbox` first, once."""
    held = limits or SandboxLimits()
    begun = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "empty").mkdir()
        (place / "program").write_text(program, encoding="utf-8", errors="replace")
        (place / "input").write_text(given, encoding="utf-8", errors="replace")
        words = [
            str(place / "program"),
            str(max(1, -int(-held.seconds // 1))),
            str(held.megabytes << 20),
            str(held.output),
            *map(str, _ALLOWED),
        ]
        with (place / "input").open("rb") as source, (place / "output").open("wb") as target:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _LAUNCHER, *words],
                stdin=source,
                stdout=target,
                stderr=subprocess.DEVNULL,
                cwd=place / "empty",
                env={},
                start_new_session=True,
            )
            try:
                ended = "exit" if process.wait(2 * held.seconds) == 0 else "error"
            except subprocess.TimeoutExpired:
                ended = "timeout"
            finally:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        output = (place / "output").read_bytes()[: held.output]
    return ProgramResult(ended, output.decode("utf-8", "replace"), perf_counter() - begun)

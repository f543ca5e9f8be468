"""Hostile programs; every test would do harm, or hang, if the sandbox did not hold."""

import platform
from pathlib import Path

import pytest

from paceline import sandbox
from paceline.errors import MethodError
from paceline.sandbox import SandboxLimits, check_sandbox, run_program

if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    pytest.skip("programs are run on Linux with x86-64 only", allow_module_level=True)

SHORT = SandboxLimits(0.5, 128, 1000)


@pytest.fixture(scope="module", autouse=True)
def held():
    check_sandbox()


def test_a_program_reads_computes_and_prints():
    program = "import json, math, re, heapq\nprint(math.gcd(*map(int, input().split())))"
    ran = run_program(program, "12 18\n")
    assert (ran.ended, ran.output) == ("exit", "6\n")
    assert run_program("print('ä€')", "").output == "ä€\n"
    assert run_program("raise ValueError", "").ended == "error"
    assert run_program("this is no program", "").ended == "error"
    assert run_program("\ud800", "").ended == "error"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(99)"])
def test_a_program_that_does_not_end_is_ended(program):
    assert run_program(program, "", SHORT).ended in ("error", "timeout")


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import mmap; mmap.mmap(-1, 1 << 30)",
    ],
)
def test_memory_is_limited(program):
    assert run_program(program, "", SHORT).ended == "error"
    assert run_program("x = bytearray(1 << 26)", "", SHORT).ended == "exit"


def test_output_is_limited():
    ran = run_program("while True: print('x' * 99)", "", SHORT)
    assert (ran.ended, len(ran.output)) == ("error", 1000)


ESCAPES = {
    "fork": "os.fork()",
    "fork bomb": "[os.fork() for _ in range(9**9)]",
    "vfork": "assert libc.syscall(58) >= 0",
    "clone": "threading.Thread(target=print).start()",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "subprocess.run(['/bin/true'])",
    "system": "assert os.system('true') == 0",
    "socket": "socket.create_connection(('127.0.0.1', 9))",
    "unix socket": "socket.socketpair()",
    "raw socket": "assert libc.syscall(41, 2, 1, 0) >= 0",
    "write": "open('file', 'w')",
    "write elsewhere": "open(given, 'a')",
    "truncate": "os.truncate(given, 0)",
    "creat": "assert libc.syscall(85, given.encode(), 0o600) >= 0",
    "openat2": "assert libc.syscall(437, -100, given.encode(), bytes(24), 24) >= 0",
    "remove": "os.unlink(given)",
    "rename": "os.rename(given, given + 'x')",
    "mkdir": "os.mkdir('folder')",
    "chmod": "os.chmod(given, 0)",
    "kill": "os.kill(os.getppid(), 0)",
    "limits": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "trace": "assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
    "ring": "assert libc.syscall(425, 8, bytes(120)) >= 0",
    "namespace": "assert libc.unshare(0x10000000) == 0",
    "number beyond": "assert libc.syscall(0x40000000 + 41, 2, 1, 0) >= 0",
    "packages": "import numpy",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_else_is_allowed(name, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    imports = "import ctypes, os, resource, socket, subprocess, threading\n"
    program = f"{imports}libc = ctypes.CDLL(None)\ngiven = input()\n"
    assert run_program(program + "print(given)", str(file)).output == f"{file}\n"
    ran = run_program(f"{program}{ESCAPES[name]}\nprint('escaped')", str(file))
    assert (ran.ended, ran.output) == ("error", "")
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_starts_in_an_empty_folder_without_our_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "mine")
    program = "import os, sys; print(os.listdir('.'), os.environ.get('SECRET'), sys.argv, sys.path)"
    output = run_program(program, "").output
    assert output.startswith("[] None ['program']")
    assert str(Path.cwd()) not in output


def test_a_system_that_cannot_hold_programs_is_refused(monkeypatch):
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(MethodError, match="Linux with x86-64 only, and this is Darwin"):
        check_sandbox()
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_ALLOWED", {**sandbox._ALLOWED, 41: "socket"})
    with pytest.raises(MethodError, match="none is run"):
        check_sandbox()
    monkeypatch.undo()
    check_sandbox()

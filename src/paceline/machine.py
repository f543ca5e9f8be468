"""Where a number was measured: every report carries it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paceline
from paceline import _native

_PACKAGES = ("numpy", "torch", "tokenizers", "safetensors", "huggingface_hub")


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory and system."""
    isas = getattr(_native, "isas", None)
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "largest_cache_bytes": largest_cache(),
        "memory_bytes": _memory(),
        "instruction_sets": list(isas()) if isas else [],
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str | None]:
    """Versions of Paceline, its commit when it runs from a checkout, Python and packages.

    Nothing is imported for it; None means not installed, or no checkout.
    """
    found: dict[str, str | None] = {
        "paceline": paceline.__version__,
        "commit": commit(),
        "python": sys.version.split()[0],
    }
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that holds this file, with `+` when files were changed."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return run.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, where git ignores it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes() -> int | None:
    """Return the memory that processes can have now, in bytes; None where nothing tells."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError, IndexError):
        return None


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def largest_cache() -> int:
    """Bytes of the first core's largest cache; 0 where the system does not tell."""
    return max(_caches(), default=0)


def _caches() -> Iterator[int]:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in units:
            yield int(text[:-1]) * units[text[-1]]

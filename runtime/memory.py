"""How much memory this process has used and may still use, in bytes."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

_KIB = 1024


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far.

    Read from `VmHWM`, because `ru_maxrss` starts with the parent's peak after a fork.
    """
    peak = _field(Path("/proc/self/status"), "VmHWM")
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def available_host_bytes() -> int | None:
    """What may still be allocated: free memory, or less where a control group limits it."""
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    group = _control_group_room(Path("/sys/fs/cgroup"))
    known = [value for value in (free, group) if value is not None]
    return min(known, default=None)


def available_cuda_bytes() -> int | None:
    """Free memory of the first NVIDIA GPU; None where `nvidia-smi` cannot say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(answer.stdout.split()[0]) * _KIB * _KIB
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _field(path: Path, name: str) -> int | None:
    """A `name:  <n> kB` line of a /proc file, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * _KIB
    return None


def _control_group_room(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
        return max(0, int(limit) - int(used))  # "max" is no number: no limit
    except (OSError, ValueError):
        return None

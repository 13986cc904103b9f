"""The hardware and the software that a number was measured with.

`python -m bench.measuring.environment PATH` writes all of it that is known before the extension is built.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

# What benchmarks compare with or train.
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def output_of(*command: str) -> str | None:
    """What a command prints in the folder of this file; None where it is missing or fails."""
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def cpu_model() -> str:
    """The name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Fields of the first device that torch sees, from nvidia-smi where it is there."""
    if not torch.cuda.is_available():
        return None
    # nvidia-smi knows nothing of CUDA_VISIBLE_DEVICES, so name the device.
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    line = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", device)
    return line and dict(zip(fields, map(str.strip, line.split(",")), strict=True))


def clocks() -> dict[str, str] | None:
    """Clocks, temperature and power of the GPU now."""
    return nvidia_smi("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw")


def gpu() -> dict[str, object] | None:
    """The GPU and its software; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
        "driver": (nvidia_smi("driver_version") or {}).get("driver_version"),
        "CUDA": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit, and `-dirty` with uncommitted changes other than the results that benchmarks write themselves."""
    found = output_of("git", "describe", "--always", "--abbrev=12")
    files = ":(top)", ":(top,exclude)bench/results"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *files)
    return f"{found}-dirty" if found and changed else found


def machine() -> dict[str, object]:
    """Hardware, torch and commit."""
    return {
        "torch": torch.__version__,
        "commit": commit(),
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu(),
    }


def version(distribution: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """The machine, what rgd_ext was built with, the versions of packages that are compared with it, and the day."""
    import rgd_ext

    names = re.findall(r"^[A-Za-z][\w-]*", REQUIREMENTS.read_text(), re.MULTILINE)
    versions = {name: found for name in ("rgd_ext", *names) if (found := version(name))}
    about = {"build": rgd_ext.build_info(), "python": platform.python_version(), "packages": versions}
    return machine() | about | {"date": datetime.now(timezone.utc).date().isoformat()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(machine() | {"clocks": clocks()}, indent=1) + "\n")

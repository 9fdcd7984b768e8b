"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform


def processor() -> str:
    """The processor, as the system names it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def machine() -> str:
    """System, processor and cores."""
    return f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores"

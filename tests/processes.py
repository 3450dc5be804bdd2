"""What tests ask about processes that a program started and has to end."""

import time
from pathlib import Path


def ends(pid: int) -> bool:
    """Whether a process is gone within a minute: a busy machine ends what is killed after the signal has returned."""
    until, stat = time.monotonic() + 60, Path(f"/proc/{pid}/stat")
    while time.monotonic() < until:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False

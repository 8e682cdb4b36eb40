"""Does anybody else use this machine? How much of its cores other programs took while something was timed.

    watch = Watch()
    ...                     # what is timed
    watch.share()           # 0.5: others took half of the cores that this process may use; None: nobody can tell

On Linux /proc/stat counts what every program, the kernel and the hypervisor ("steal") took of each core; less what this
process used itself, the rest was somebody else's. In a container /proc/stat shows the whole host, so

- only the cores of this process's affinity mask are looked at;
- with a CPU limit (a control group's quota) fewer cores' worth of time can be used than are seen. Others then disturb by
  what they take beyond the cores that stay free anyway, or by what programs in the same control group take of the limit.

Elsewhere psutil is asked, where it is installed. Counters are in ticks of 10 ms: what they cannot resolve counts as nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from labkit.measure.machine import cores
from labkit.progress import tell

BUSY = 0.1  # when others take more of the cores than this, a time is spoiled
RESOLUTION = 0.02  # seconds of CPU: two ticks
WINDOW = 0.25  # seconds to look at a machine that should be quiet

_now, _sleep = time.perf_counter, time.sleep
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def is_busy(share: float | None) -> bool:
    """Whether a share of the cores is more than a timing stands. What is unknown is taken for quiet."""
    return share is not None and share > BUSY


class Watch:
    """Counts what others use from now on."""

    def __init__(self):
        self._start, self._machine, self._own = _now(), machine_seconds(), time.process_time()
        self._group = _group_seconds()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return _now() - self._start

    def share(self, own: bool = False, children: float = 0.0) -> float | None:
        """The share of the cores that others took since, from 0 to 1; None where the system does not say.

        ``own``: this process counts as well, for one who waits in it. ``children``: CPU seconds of other processes that
        worked for this one.
        """
        seconds, machine = self.seconds, machine_seconds()
        if self._machine is None or machine is None or seconds <= 0:
            return None
        used, mine = machine - self._machine, time.process_time() - self._own
        if used < mine / 2 - RESOLUTION:  # counters that stand still, as in some sandboxes
            return None
        mine = 0.0 if own else mine + children
        room = available()
        taken = used - mine - (cores() - room) * seconds
        group = _group_seconds()
        if group is not None and self._group is not None:
            taken = max(taken, group - self._group - mine)
        return min(max(taken - RESOLUTION, 0.0) / (room * seconds), 1.0)


def quiet(patience: float = 3.0) -> bool:
    """Wait until nobody works here, other threads of this process included; False where that takes too long."""
    end = _now() + patience
    while True:
        watch = Watch()
        _sleep(WINDOW)
        if not is_busy(watch.share(own=True)):
            return True
        if _now() >= end:
            return False
        tell("waiting for a quiet machine")


def others_seconds() -> float | None:
    """CPU seconds that others have used so far on the cores this process may use; None where the system does not say."""
    machine = machine_seconds()
    return None if machine is None else machine - time.process_time()


def machine_seconds() -> float | None:
    """CPU seconds that the cores this process may use have worked so far, for whomever; None where the system does not say."""
    try:
        mine = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = [line.split() for line in (_PROC / "stat").read_text(encoding="ascii").splitlines()]
        ticks = [[int(t) for t in line[1:9]] for line in lines if line and line[0] in mine]
        if ticks:  # user, nice, system, idle, iowait, irq, softirq, steal
            return sum(sum(t) - t[3] - t[4] for t in ticks) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):
        pass
    try:
        import psutil

        times = psutil.cpu_times()
        return float(times.user + times.system + getattr(times, "nice", 0.0))
    except (ImportError, OSError, RuntimeError):
        return None


def available() -> float:
    """Cores' worth of time that this process may use: its affinity mask's, or a container's limit where that is less."""
    limit = _limit()
    return float(cores()) if limit is None else min(float(cores()), limit[0])


def _limit() -> tuple[float, Path] | None:
    """(cores' worth of time, the control group that allows no more) of the tightest limit over this process."""
    found = []
    for folder in _groups("cpu"):
        try:
            if (folder / "cpu.max").is_file():  # version 2
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="ascii") for n in ("quota", "period"))
            if float(quota) > 0 and float(period) > 0:
                found.append((float(quota) / float(period), folder))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found, default=None, key=lambda pair: pair[0])


def _group_seconds() -> float | None:
    """CPU seconds used so far in the control group whose limit this process has; None without a limit."""
    limit = _limit()
    if limit is None:
        return None
    folder = limit[1]
    try:
        if (folder / "cpu.max").is_file():
            lines = dict(line.split() for line in (folder / "cpu.stat").read_text(encoding="ascii").splitlines())
            return int(lines["usage_usec"]) / 1e6
        usage = _CGROUP / "cpuacct" / folder.relative_to(_CGROUP / "cpu") / "cpuacct.usage"
        return int(usage.read_text(encoding="ascii")) / 1e9
    except (OSError, ValueError, KeyError):
        return None


def _groups(controller: str) -> list[Path]:
    """The folders of this process's control group and of those above it, version 2 and version 1."""
    found = [_CGROUP, _CGROUP / controller]
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return found
    for line in lines:
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        top = _CGROUP if number == "0" and not controllers else _CGROUP / controller
        if top == _CGROUP or controller in controllers.split(","):
            parts = [p for p in path.split("/") if p not in ("", "..")]
            found += [top.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    return found

"""How many processors and how much memory this process may use, and how to share them out.

A node's core count says nothing inside a container or a cluster job: limits are read from the
control groups (version 1 and 2), the processor affinity and what SLURM put into the environment.
"""

import ctypes
import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from pathlib import Path

GIB = 1024**3
# What one session needs at its peak (network and scans of 1 mm), and babyseg itself.
SESSION_GB = 3.0
# It holds for a reference of this size; each voxel more takes so many bytes (the scan, its labels
# and their uncertainty, which are on its grid).
SESSION_VOXELS = 64e6
EXTRA_VOXEL_BYTES = 16
# What the steps before and after the network need.
LIGHT_GB = 1.0
# More threads than this hardly shorten one session's segmentation.
MAX_THREADS = 8
# Sessions side by side use processors better than many threads in one session: alignment, reading
# and writing are serial. With fewer threads than this each, memory pays for too little.
THREADS_A_SESSION = 4
# The rest is left to the system and to what estimates miss.
MEMORY_SHARE = 0.9
_ROOT = Path('/')


# Numbers of glibc's mallopt, and their defaults.
_TRIM_THRESHOLD, _TRIM_DEFAULT = -1, 128 * 1024
_MMAP_MAX, _MMAP_DEFAULT = -4, 65536
_NEVER = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Reuse freed memory within the block instead of giving it back, which happens at its end.

    Otherwise glibc returns every large tensor to the system and gets zeroed pages for the next
    one, which took a quarter of the time of a segmentation. Other C libraries stay as they are.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.malloc_trim(0)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        library.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Return what `freed_memory_kept` has kept so far, where what follows needs less."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, 'mallopt') and hasattr(library, 'malloc_trim') else None


@dataclass(frozen=True)
class Limit:
    """An amount (processors or GiB) and, in words, what sets it."""

    amount: float
    source: str


@dataclass(frozen=True)
class Plan:
    """How a run shares out the machine.

    Attributes
    ----------
    threads : int
        Threads of one session's segmentation.
    at_once : int
        Sessions segmented side by side.
    processors : int
        Processors that the scheduler may hand out.
    workers : int
        Processes; each keeps about half a GiB of libraries even when it waits. One more than
        `at_once` aligns the next scans or writes reports beside the network, if memory allows.
    """

    threads: int
    at_once: int
    processors: int
    workers: int


def parse_memory(text: str, /, *, unit: str = 'M') -> float:
    """Memory in GiB from text such as `8G`, `1.5g`, `500MB` or `8000` (in `unit`)."""
    match = re.fullmatch(r'\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(?:i?b)?\s*', text, re.IGNORECASE)
    if not match:
        raise ValueError(f'{text!r} is not an amount of memory, such as 8G, 1.5g or 8000 (MB)')
    number, letter = match.groups()
    return float(number) * 1024.0 ** ('KMGT'.index((letter or unit).upper()) - 2)


def cpu_limit(root: Path = _ROOT, environ: Mapping[str, str] = os.environ) -> Limit:
    """Processors that this process may use.

    Parameters
    ----------
    root : Path
        Where `/proc` and `/sys` are; tests give a folder of their own.
    environ : mapping
        Environment variables.
    """
    limits = [Limit(_affinity(), 'processor affinity')]
    limits += [Limit(n, 'control group') for n in _cgroup_cpus(root)]
    limits += _slurm_cpus(environ)
    best = min(limits, key=lambda limit: limit.amount)
    # A quota below one processor still runs one.
    return Limit(max(1, floor(best.amount + 1e-6)), best.source)


def memory_limit(root: Path = _ROOT, environ: Mapping[str, str] = os.environ) -> Limit:
    """Memory in GiB that this process may use before the system ends it or refuses more."""
    limits = [Limit(n / GIB, 'control group') for n in _cgroup_memory(root)]
    limits += [Limit(n / GIB, 'ulimit -v') for n in _address_space()]
    limits += _slurm_memory(environ)
    info = _key_values(root / 'proc/meminfo')
    for key, source in (('MemTotal:', 'size of the machine'), ('MemAvailable:', 'free memory')):
        if key in info:
            limits.append(Limit(info[key] * 1024 / GIB, source))
    if not limits:
        raise OSError(f'No file under {root} tells how much memory there is. Give it with --mem.')
    return min(limits, key=lambda limit: limit.amount)


def session_gb(voxels: int, /) -> float:
    """Memory in GiB that a session needs whose reference has so many voxels."""
    return SESSION_GB + max(0.0, voxels - SESSION_VOXELS) * EXTRA_VOXEL_BYTES / GIB


def plan(
    nprocs: int, mem_gb: float, sessions: int, *, threads: int = 0, low_mem: bool = False
) -> Plan:
    """Share `nprocs` processors and `mem_gb` GiB out over `sessions` sessions.

    As many sessions run side by side as memory allows (`SESSION_GB` each), while each has about
    `THREADS_A_SESSION` threads; with few sessions each gets more, up to `MAX_THREADS`. For many
    sessions and enough memory: 2 processors run 1 session with 2 threads, 4 run 1 with 4, 8 run 2
    with 4, 16 run 4 with 4, 64 run 16 with 4 (48 GB), or 10 with 6 when there are 30 GB.

    Parameters
    ----------
    threads : int
        Threads of a session when the user gave them, else 0.
    low_mem : bool
        One session at a time.

    Returns
    -------
    Plan
    """
    fits = 1 if low_mem else max(1, floor(mem_gb / SESSION_GB))
    if threads:
        threads = min(threads, nprocs)
        at_once = min(fits, max(1, nprocs // threads), max(1, sessions))
    else:
        at_once = min(fits, max(1, round(nprocs / THREADS_A_SESSION)), max(1, sessions))
        threads = min(MAX_THREADS, max(1, nprocs // at_once))
    # The scheduler counts processors: with low_mem it must not find room for a second session.
    processors = threads if low_mem else nprocs
    spare = not low_mem and mem_gb - at_once * SESSION_GB >= LIGHT_GB
    return Plan(threads, at_once, processors, workers=min(nprocs, at_once + spare))


def _affinity() -> int:
    """Processors that the scheduler of the system lets this process run on."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _address_space() -> Iterator[int]:
    """Bytes of addresses that this process may have; grid engines set it for their jobs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft


def _read(path: Path) -> str | None:
    """Content of a small system file; None where the file does not exist or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _key_values(path: Path) -> dict[str, int]:
    """First number of each line by the line's first word."""
    rows = [line.split() for line in (_read(path) or '').splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process' control groups and all their parents; '' means version 2.

    Inside a container the path of /proc/self/cgroup may be the host's: parents are tried too.
    """
    tops = {'': ('sys/fs/cgroup', 'sys/fs/cgroup/unified')}
    for line in (_read(root / 'proc/self/cgroup') or '').splitlines():
        _, names, path = line.split(':', 2)
        if controller not in names.split(','):
            continue
        # cpu and cpuacct are often one mount, with a link for each name.
        for top in tops.get(controller, (f'sys/fs/cgroup/{controller}', f'sys/fs/cgroup/{names}')):
            folder = root / top / path.strip('/')
            while folder != root / 'sys/fs/cgroup' and (root / 'sys/fs/cgroup') in folder.parents:
                yield folder
                folder = folder.parent
            yield root / top


def _cgroup_cpus(root: Path) -> Iterator[float]:
    """Processors allowed by each control group that sets a quota."""
    for folder in _cgroup_folders(root, ''):
        quota, _, period = (_read(folder / 'cpu.max') or 'max 1').partition(' ')
        if quota.isdigit():
            yield int(quota) / int(period)
    for folder in _cgroup_folders(root, 'cpu'):
        quota = _read(folder / 'cpu.cfs_quota_us') or '-1'
        period = _read(folder / 'cpu.cfs_period_us') or '0'
        if int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)


def _cgroup_memory(root: Path) -> Iterator[int]:
    """Bytes allowed by each control group that sets a limit."""
    for folder in _cgroup_folders(root, ''):
        for name in ('memory.max', 'memory.high'):
            text = _read(folder / name) or 'max'
            if text.isdigit():
                yield int(text)
    for folder in _cgroup_folders(root, 'memory'):
        text = _read(folder / 'memory.limit_in_bytes') or ''
        stat = _key_values(folder / 'memory.stat')
        for value in (int(text) if text.isdigit() else 0, stat.get('hierarchical_memory_limit')):
            # "No limit" is a number near 2**63.
            if value and value < 2**60:
                yield value


def _slurm_cpus(environ: Mapping[str, str]) -> list[Limit]:
    """Processors of this SLURM task, or of the job on this node when tasks have no share."""
    for name in ('SLURM_CPUS_PER_TASK', 'SLURM_CPUS_ON_NODE', 'SLURM_JOB_CPUS_PER_NODE'):
        # The last has the form 16(x2),8: one entry for each group of equal nodes.
        match = re.match(r'\d+', environ.get(name, ''))
        if match and int(match.group()) > 0:
            return [Limit(int(match.group()), name)]
    return []


def _slurm_memory(environ: Mapping[str, str]) -> list[Limit]:
    """Memory of this SLURM job on this node, MB in the variables; 0 means all of the node."""
    limits = []
    per_node = environ.get('SLURM_MEM_PER_NODE', '')
    if per_node.isdigit() and int(per_node) > 0:
        limits.append(Limit(int(per_node) / 1024, 'SLURM_MEM_PER_NODE'))
    per_cpu = environ.get('SLURM_MEM_PER_CPU', '')
    if per_cpu.isdigit() and int(per_cpu) > 0:
        cpus = _slurm_cpus({k: v for k, v in environ.items() if k != 'SLURM_CPUS_PER_TASK'})
        cpus = cpus or _slurm_cpus(environ)
        amount = int(per_cpu) * (cpus[0].amount if cpus else 1) / 1024
        limits.append(Limit(amount, 'SLURM_MEM_PER_CPU'))
    return limits

"""Training samples a second, beside MONAI and TorchIO doing the same kind of work.

All engines make one scan of the same size and field of view a sample, and run in the same number
of processes with one thread each. MONAI and TorchIO get one map, and each of their steps runs
for every sample, so that their work is defined. babyseg runs with its defaults, rare artefacts now
and then, and gets the same map with a few others, to mix it with and to borrow heads from.
"""

import argparse
import importlib.util
import multiprocessing
import os
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
from synthesis_engines import ENGINES, FIELD_OF_VIEW, REFERENCE

# A process has one thread: these tell torch, the linear algebra of NumPy, and ITK below TorchIO.
THREAD_VARIABLES = (
    'OMP_NUM_THREADS',
    'MKL_NUM_THREADS',
    'OPENBLAS_NUM_THREADS',
    'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS',
)
# A process that has not warmed up after so many seconds will not.
PATIENCE = 900
# Further maps of brains, and of heads, that babyseg gets.
COMPANIONS = 4
# What the processes meet at; each gets it when it starts, since it cannot be sent with a task.
start: Any = None


@dataclass(frozen=True)
class Run:
    """One process: when it began and ended (s), CPU time of its samples (s), peak memory (MiB)."""

    began: float
    ended: float
    cpu: float
    peak: float


def peak_memory() -> float:
    """Most memory (MiB) that this process has had resident."""
    # Linux counts the memory of the parent into the child's `ru_maxrss`, but not into VmHWM.
    status = Path('/proc/self/status')
    if status.exists():
        line = next(s for s in status.read_text().splitlines() if s.startswith('VmHWM'))
        return int(line.split()[1]) / 1024
    unit = 1 if platform.system() == 'Darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def set_barrier(barrier: Any) -> None:
    """Keep the barrier in this process."""
    global start
    start = barrier


def work(name: str, source: Any, size: int, seed: int, samples: int) -> Run:
    """Draw a sample to warm up, wait for the other processes, and draw the samples that count."""
    torch.set_num_threads(1)
    try:
        draw = ENGINES[name].build(source, size)
        image, labels = draw(seed)
        if image.shape != (size,) * 3 or labels.shape != image.shape or image.std() == 0:
            raise RuntimeError(f'{name} drew {tuple(image.shape)}, not a scan of {size}^3.')
    except BaseException:
        start.abort()
        raise
    start.wait(PATIENCE)
    began, cpu = time.monotonic(), time.process_time()
    for i in range(samples):
        draw(seed + 1 + i)
    return Run(began, time.monotonic(), time.process_time() - cpu, peak_memory())


def measure(name: str, source: Any, size: int, processes: int, samples: int) -> list[Run]:
    """Run one engine in fresh processes, all at the same time."""
    context = multiprocessing.get_context('spawn')
    barrier = context.Barrier(processes)
    # Only babyseg needs its own type, and reading that type imports babyseg.
    material = source if name == 'babyseg' else source[0].classes
    with ProcessPoolExecutor(processes, context, set_barrier, (barrier,)) as pool:
        tasks = [
            pool.submit(work, name, material, size, p * (samples + 1), samples)
            for p in range(processes)
        ]
        wait(tasks)
    errors = [e for e in (t.exception() for t in tasks) if e]
    # One process that fails breaks the barrier for all others.
    for e in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
        raise e
    return [t.result() for t in tasks]


def machine() -> str:
    """Processor, load and versions."""
    info = Path('/proc/cpuinfo')
    models = info.read_text().splitlines() if info.exists() else []
    model = next((s.split(': ')[1] for s in models if s.startswith('model name')), None)
    versions = [f'Python {platform.python_version()}']
    for package in ('torch', 'monai', 'torchio', 'babyseg'):
        try:
            versions.append(f'{package} {version(package)}')
        except PackageNotFoundError:
            pass
    load = ' '.join(f'{v:.1f}' for v in os.getloadavg())
    cpu = model or platform.processor()
    return f'{cpu}, {os.cpu_count()} cores, load {load}; {", ".join(versions)}'


def report(names: list[str], source: Any, args: argparse.Namespace, size: int) -> None:
    """Measure the engines at one size and print a row for each.

    Samples a second of wall time over all processes, CPU seconds a sample, and the largest peak
    memory of a process, imports included. A ratio above 1 is better than the reference; that of
    the CPU time holds on a busy machine too.
    """
    print(
        f'\n{size}^3 voxels of {FIELD_OF_VIEW / size:.2f} mm, map {source[0].name}, '
        f'{args.processes} processes with one thread, {args.samples} samples each'
    )
    print(f'{"engine":32s}{"samples/s":>10s}{"ratio":>8s}{"CPU s":>10s}{"ratio":>8s}{"MiB":>7s}')
    reference: tuple[float, float] | None = None
    for name in names:
        runs = measure(name, source, size, args.processes, args.samples)
        count = args.processes * args.samples
        rate = count / (max(r.ended for r in runs) - min(r.began for r in runs))
        cpu, peak = sum(r.cpu for r in runs) / count, max(r.peak for r in runs)
        if name == REFERENCE:
            reference = rate, cpu
        faster = f'{rate / reference[0]:.2f}' if reference else '-'
        cheaper = f'{reference[1] / cpu:.2f}' if reference else '-'
        title = ENGINES[name].title
        print(
            f'{title:32s}{rate:10.3f}{faster:>8s}{cpu:10.2f}{cheaper:>8s}{peak:7.0f}', flush=True
        )


def main() -> None:
    """Print a table of samples a second for each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('maps', type=Path, help='file of `babyseg-train prepare`')
    parser.add_argument('--map', help='name of the map to use; default: the first')
    parser.add_argument('--size', type=int, action='append', help='voxels along each axis')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--samples', type=int, default=8, help='of each process')
    parser.add_argument(
        '--engine', choices=ENGINES, action='append', help='only this one; may be repeated'
    )
    args = parser.parse_args()
    from babyseg_bids.synthesis.maps import load_maps

    maps = {m.name: m for m in load_maps(args.maps)}
    brains = [m for m in maps.values() if not m.has_head and m.name != args.map]
    heads = [m for m in maps.values() if m.has_head and m.name != args.map]
    name = args.map or next(iter(maps))
    if name not in maps:
        parser.error(f'{args.maps} has no map {name}; it has {", ".join(maps)}')
    # The processes read these when they start.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, '1'))
    chosen = [n for n, e in ENGINES.items() if (n in args.engine if args.engine else e.usual)]
    present = [n for n in chosen if importlib.util.find_spec(ENGINES[n].module)]
    print(machine())
    for n in chosen:
        if n not in present:
            print(f'{n} is left out; `pip install -r requirements/bench.txt` installs it.')
    for size in args.size or (128, 192):
        others = [m for m in (*brains[:COMPANIONS], *heads[:COMPANIONS]) if m.name != name]
        report(present, [maps[name], *others], args, size)


if __name__ == '__main__':
    main()

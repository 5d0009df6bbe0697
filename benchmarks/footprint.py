"""What babyseg asks of a machine and of a file system: for a session, and for a start.

    python benchmarks/footprint.py [BIDS_DIR] [--nprocs 2] [--json FILE]

The participant level runs twice on the dataset, by default the example of `babyseg-example`: once
in full, and once more when everything is there, which is what each task of an array costs before
its first session. What is between them is divided by the sessions. Two more runs under strace
count the calls that name a file, by the place of that file; they are left out where strace is
missing. Seconds are those of the processor; those by the clock depend on what else the machine
does.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

BABYSEG = Path(sys.executable).with_name('babyseg')
CALL = re.compile(r'^\d+ +(?P<name>\w+)\((?P<words>.*)$')
OPENING = ('open', 'openat', 'creat')
POLL_SECONDS = 0.2


class Watch(threading.Thread):
    """Looks at a folder and at a process with its children, again and again."""

    def __init__(self, process: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = psutil.Process(process), folder
        self.files = self.bytes = self.memory = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            files, size = content(self.folder)
            self.files, self.bytes = max(self.files, files), max(self.bytes, size)
            self.memory = max(self.memory, sum(self._memory()))

    def _memory(self) -> Iterator[int]:
        """Memory of each process; pages that they share are divided among them."""
        try:
            for process in (self.process, *self.process.children(recursive=True)):
                yield process.memory_full_info().pss
        except psutil.Error:
            return


def content(folder: Path) -> tuple[int, int]:
    """Number and size of the files below a folder."""
    files = size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += (Path(parent) / name).lstat().st_size
                files += 1
            except OSError:
                continue
    return files, size


def participant(bids: Path, out: Path, work: Path, nprocs: int) -> list[str]:
    return [
        str(BABYSEG), str(bids), str(out), 'participant', '-w', str(work),
        '--nprocs', str(nprocs),
    ]  # fmt: skip


def measure(command: list[str], work: Path) -> dict[str, float]:
    """One run: seconds, peak memory, and the most that lay in the work folder."""
    before, began = os.times(), time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    watch = Watch(process.pid, work)
    watch.start()
    if process.wait():
        raise SystemExit(f'babyseg ended with {process.returncode}: {" ".join(command)}')
    watch.over.set()
    after = os.times()
    cpu = after.children_user + after.children_system
    return {
        'cpu_seconds': cpu - before.children_user - before.children_system,
        'clock_seconds': time.monotonic() - began,
        'memory_gb': watch.memory / 1024**3,
        'work_files': watch.files,
        'work_mb': watch.bytes / 1e6,
    }


def trace(command: list[str], places: dict[str, Path], log: Path) -> dict[str, int]:
    """Calls that name a file, by place, and how many of them open one."""
    words = ['strace', '-f', '--seccomp-bpf', '-qq', '-y', '-s', '4096']
    words += ['-e', 'trace=%file', '-e', 'signal=none', '-o', str(log)]
    subprocess.run([*words, *command], check=True, stderr=subprocess.DEVNULL)
    counts: Counter[str] = Counter()
    with log.open(errors='replace') as lines:
        for line in lines:
            call = CALL.match(line)
            if call is None:
                continue
            kind = 'opened' if call['name'] in OPENING and ' = -1 ' not in line else 'other'
            counts[f'{place_of(call["words"], places)}_{kind}'] += 1
    return dict(counts)


def place_of(words: str, places: dict[str, Path]) -> str:
    """The place that the first of these paths in a call belongs to."""
    for name, folder in places.items():
        if f'{folder}/' in words or f'{folder}"' in words or f'{folder}>' in words:
            return name
    return 'system'


def footprint(bids: Path, scratch: Path, nprocs: int) -> dict[str, dict[str, float]]:
    """Figures of a session and of a start."""
    out, work = scratch / 'out', scratch / 'work'
    command = participant(bids, out, work, nprocs)
    full = measure(command, work)
    sessions = len(list(out.rglob('*_desc-inputs_ledger.json')))
    files, size = content(out)
    small = sum(p.stat().st_size < 64 * 1024 for p in out.rglob('*') if p.is_file())
    start = measure(command, work)
    read = content(bids)
    session = {
        'sessions': sessions,
        'cpu_seconds': (full['cpu_seconds'] - start['cpu_seconds']) / sessions,
        'clock_seconds': (full['clock_seconds'] - start['clock_seconds']) / sessions,
        'memory_gb': full['memory_gb'],
        'read_mb': read[1] / 1e6 / sessions,
        'written_files': files / sessions,
        'written_small_files': small / sessions,
        'written_mb': size / 1e6 / sessions,
        'work_files': full['work_files'] / sessions,
        'work_mb': full['work_mb'] / sessions,
    }
    if shutil.which('strace'):
        places = {
            'dataset': bids, 'results': out, 'work': work,
            'program': Path(sysconfig.get_path('purelib')),
            'interpreter': Path(sysconfig.get_path('stdlib')),
        }  # fmt: skip
        idle = trace(command, places, scratch / 'log')
        shutil.rmtree(out)
        shutil.rmtree(work, ignore_errors=True)
        busy = trace(command, places, scratch / 'log')
        start |= {f'calls_{k}': v for k, v in idle.items()}
        extra = Counter(busy)
        extra.subtract(idle)
        session |= {f'calls_{k}': v / sessions for k, v in extra.items()}
    return {'session': session, 'start': start}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('bids_dir', nargs='?', type=Path)
    parser.add_argument('--nprocs', type=int, default=2)
    parser.add_argument('--json', type=Path, help='where the figures are stored, too')
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        bids = args.bids_dir and args.bids_dir.resolve()
        if bids is None:
            bids = scratch / 'example'
            example = BABYSEG.with_name('babyseg-example')
            subprocess.run([example, bids], check=True, stdout=subprocess.DEVNULL)
        found = footprint(bids, scratch, args.nprocs)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + '\n')
    for name, figures in found.items():
        print(f'\n| of a {name} | |\n|---|---|')
        for key, value in sorted(figures.items()):
            print(f'| {key} | {value:.3g} |' if value < 1000 else f'| {key} | {value:.0f} |')


if __name__ == '__main__':
    main()

"""What a step of the training costs: seconds a sample and peak memory.

Each row is measured in a process of its own. Rows differ from the first, the reference, in one
thing: two samples at once, the activations computed twice instead of kept (`--checkpointing`),
bfloat16, or three scans. Images are random numbers; drawing synthetic ones is
measured in `synthesis.py`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from babyseg_bids.resources import freed_memory_kept
from babyseg_bids.synthesis.train import Stage, Trainer, TrainingPlan

SIZE = (64, 80, 64)
ROWS = {
    'one sample of one scan': {},
    'two samples': {'batch': 2},
    'checkpointing': {'checkpointing': True},
    'two samples, checkpointing': {'batch': 2, 'checkpointing': True},
    'bfloat16': {'bfloat16': True},
    'three scans': {'scans': 3},
    'three scans, checkpointing': {'scans': 3, 'checkpointing': True},
}


def measure(
    threads: int,
    *,
    batch: int = 1,
    scans: int = 1,
    checkpointing: bool = False,
    bfloat16: bool = False,
) -> dict[str, float]:
    """Best seconds a sample of three steps, and what they added to the process's memory, GiB."""
    torch.set_num_threads(threads)
    stages = (Stage(2.0, SIZE, 10, batch),)
    plan = TrainingPlan(stages, checkpointing=checkpointing, bfloat16=bfloat16)
    images = torch.rand(batch, scans, *SIZE)
    target = torch.randint(0, plan.network.labels, (batch, *SIZE))
    with tempfile.TemporaryDirectory() as folder, freed_memory_kept():
        trainer = Trainer(plan, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = []
        for _ in range(3):
            began = time.process_time()
            trainer.train_step(images, target)
            seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {'seconds': min(seconds) / batch, 'peak': peak / 2**20}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--row', choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.threads, **ROWS[args.row])))
        return
    print(f'{"x".join(map(str, SIZE))} voxels at 2 mm, {args.threads} threads')
    reference = None
    for row in ROWS:
        command = [sys.executable, __file__, '--row', row, '--threads', str(args.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(out.stdout.splitlines()[-1])
        reference = reference or found
        slower, larger = (found[k] / reference[k] for k in ('seconds', 'peak'))
        print(
            f'{row:35s} {found["seconds"]:6.2f} CPU s a sample  x{slower:.2f}'
            f'   {found["peak"]:5.2f} GiB  x{larger:.2f}',
            flush=True,
        )


if __name__ == '__main__':
    main()

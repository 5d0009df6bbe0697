"""How long an array of tasks takes on n nodes: a simulation with measured times of sessions.

    python benchmarks/scaling.py [--sessions 10000] [--nodes 1 10 50 200] [--seed 0]

A task takes its sessions one after the other, as `--array-task` deals them out. What ends a task
(a failed node, a more urgent job) costs the session that it was in: Slurm queues it again after
`REQUEUE` seconds, a start is paid again, and only what is missing is done. The group level follows
when no task is left. Waiting for a place among other users' jobs is not part of it.
"""

import argparse
import heapq
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np

from babyseg_bids.shares import deal
from babyseg_bids.slurm import GROUP_SECONDS, MAX_TASKS, SESSION_SECONDS

# Seconds of a session (median) on two processors, as measured, the spread of their logarithm, and
# the seconds of a start: see docs/scaling.md.
SESSION, SPREAD, START = SESSION_SECONDS, 0.3, 15.0
# Processors of a node, and of a task.
NODE_CPUS, TASK_CPUS = 32, 2
# Slurm's own pause before it starts a task again; between two tasks it starts.
REQUEUE, PACE = 120.0, 0.1
# Network file systems and neighbours on a node.
SLOWNESS = 1.5
HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """What the tasks meet.

    Attributes
    ----------
    nodes : int
        Nodes that are ours alone.
    failures : float
        Times an hour that a task which runs is ended and queued again.
    slow : float
        Share of nodes on which everything takes three times as long.
    """

    nodes: int
    failures: float = 0.0
    slow: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Hours to the end of the group level, and what they were used for."""

    hours: float
    busy: float
    lost: float
    restarts: int


@cache
def shares_of(sessions: int, tasks: int) -> tuple[int, ...]:
    """Sessions of each task for children of one to three sessions."""
    counts, left = {}, sessions
    for number in range(sessions):
        if left <= 0:
            break
        counts[str(number)] = min(left, 1 + number % 3)
        left -= counts[str(number)]
    numbers: Counter[int] = Counter()
    for subject, number in deal(counts, tasks).items():
        numbers[number] += counts[subject]
    return tuple(numbers[n] for n in range(1, tasks + 1) if numbers[n])


def simulate(
    sessions: int, per_task: int, cluster: Cluster, generator: np.random.Generator
) -> Outcome:
    """One run of the whole array.

    Parameters
    ----------
    per_task : int
        Sessions that a task is meant to have; no more tasks than `MAX_TASKS`.
    """
    shares = shares_of(sessions, min(MAX_TASKS, ceil(sessions / per_task)))
    slots = cluster.nodes * (NODE_CPUS // TASK_CPUS)
    slow = generator.random(cluster.nodes) < cluster.slow
    # Places become free at a time; tasks may start from a time on.
    places = [(0.0, slot) for slot in range(slots)]
    queue = [(number * PACE, number, share) for number, share in enumerate(shares)]
    heapq.heapify(queue)
    busy = lost = end = 0.0
    restarts = 0
    while queue:
        ready, number, left = heapq.heappop(queue)
        free, slot = heapq.heappop(places)
        begin = max(ready, free)
        factor = SLOWNESS * (3.0 if slow[slot % cluster.nodes] else 1.0)
        median = SESSION * factor
        done = START * factor + np.cumsum(median * generator.lognormal(0, SPREAD, left))
        rate = cluster.failures / HOUR
        limit = generator.exponential(1 / rate) if rate else np.inf
        took = min(limit, done[-1])
        kept = int((done <= limit).sum())
        if kept < left:
            restarts += 1
            lost += took - (done[kept - 1] if kept else 0.0)
            heapq.heappush(queue, (begin + took + REQUEUE, number, left - kept))
        busy += took
        end = max(end, begin + took)
        heapq.heappush(places, (begin + took, slot))
    total = end + sessions * GROUP_SECONDS
    return Outcome(total / HOUR, busy / (end * slots), lost / HOUR, restarts)


def average(
    sessions: int, per_task: int, cluster: Cluster, seed: int, repeats: int
) -> tuple[Outcome, float]:
    """Means of several runs, and the hours of the longest."""
    runs = [
        simulate(sessions, per_task, cluster, np.random.default_rng((seed, n)))
        for n in range(repeats)
    ]
    means = [float(np.mean([getattr(r, k) for r in runs])) for k in ('hours', 'busy', 'lost')]
    restarts = round(float(np.mean([r.restarts for r in runs])))
    return Outcome(means[0], means[1], means[2], restarts), max(r.hours for r in runs)


def row(words: list[str], result: tuple[Outcome, float]) -> None:
    mean, longest = result
    words += [f'{mean.hours:.2f}', f'{longest:.2f}', f'{mean.busy:.0%}']
    print('|', ' | '.join([*words, str(mean.restarts), f'{mean.lost:.1f}']), '|')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--sessions', type=int, default=10000)
    parser.add_argument('--nodes', type=int, nargs='+', default=[1, 5, 20, 50])
    parser.add_argument('--per-task', type=int, nargs='+', default=[10, 40])
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    heads = ['hours', 'longest', 'busy', 'restarts', 'hours lost']
    cases = {
        'none': Cluster(1),
        'each task ended once an hour': Cluster(1, failures=1.0),
        'every tenth node slow': Cluster(1, slow=0.1),
    }
    print('|', ' | '.join(['nodes', 'sessions a task', 'trouble', *heads]), '|')
    print('|' + '---|' * (3 + len(heads)))
    for nodes in args.nodes:
        for per_task in args.per_task:
            for name, case in cases.items():
                cluster = Cluster(nodes, case.failures, case.slow)
                words = [str(nodes), str(per_task), name]
                row(words, average(args.sessions, per_task, cluster, args.seed, args.repeats))


if __name__ == '__main__':
    main()

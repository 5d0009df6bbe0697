"""Limits of containers, jobs and machines, on made-up system files."""

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from babyseg_bids import resources
from babyseg_bids.resources import (
    GIB,
    SESSION_GB,
    cpu_limit,
    freed_memory_kept,
    memory_limit,
    parse_memory,
    plan,
    session_gb,
)

MEMINFO = 'MemTotal: 67108864 kB\nMemFree: 1024 kB\nMemAvailable: 50331648 kB\n'


def system(root: Path, files: dict[str, str]) -> Path:
    """A machine of 64 GiB (48 free) with these files in addition."""
    for name, content in {'proc/meminfo': MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture(autouse=True)
def thirty_two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(32)), raising=False)


@pytest.mark.parametrize(
    ('text', 'gib'),
    [
        ('8G', 8),
        ('8g', 8),
        ('1.5g', 1.5),
        ('8GB', 8),
        ('8 GiB', 8),
        ('8192', 8),
        ('512M', 0.5),
        ('1T', 1024),
        ('.5g', 0.5),
    ],
)
def test_memory_is_read_with_its_unit_and_megabytes_otherwise(text: str, gib: float) -> None:
    assert parse_memory(text) == pytest.approx(gib)


def test_the_unit_of_a_plain_number_can_be_gigabytes() -> None:
    assert parse_memory('6', unit='G') == 6


@pytest.mark.parametrize('text', ['', 'G', '8X', '-8G', '8 G B', 'a lot'])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='not an amount of memory'):
        parse_memory(text)


def test_without_any_limit_affinity_and_free_memory_count(tmp_path: Path) -> None:
    root = system(tmp_path, {})
    assert cpu_limit(root, {}) == resources.Limit(32, 'processor affinity')
    limit = memory_limit(root, {})
    assert (limit.amount, limit.source) == (48, 'free memory')


def test_a_version_2_control_group_of_a_container_limits_both(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            'proc/self/cgroup': '0::/\n',
            'sys/fs/cgroup/cpu.max': '250000 100000\n',
            'sys/fs/cgroup/memory.max': str(6 * GIB),
        },
    )
    assert cpu_limit(root, {}).amount == 2
    assert memory_limit(root, {}) == resources.Limit(6, 'control group')


def test_the_limit_of_a_parent_group_counts(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            'proc/self/cgroup': '0::/system.slice/job.scope/step\n',
            'sys/fs/cgroup/system.slice/job.scope/step/memory.max': 'max\n',
            'sys/fs/cgroup/system.slice/job.scope/step/cpu.max': 'max 100000\n',
            'sys/fs/cgroup/system.slice/job.scope/memory.max': str(4 * GIB),
            'sys/fs/cgroup/system.slice/job.scope/cpu.max': '400000 100000\n',
        },
    )
    assert cpu_limit(root, {}).amount == 4
    assert memory_limit(root, {}).amount == 4


def test_version_1_control_groups_limit_both(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            'proc/self/cgroup': '5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n',
            'sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes': str(5 * GIB),
            'sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us': '300000',
            'sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us': '100000',
        },
    )
    assert cpu_limit(root, {}).amount == 3
    assert memory_limit(root, {}).amount == 5


def test_inside_a_container_the_path_of_the_host_may_not_exist(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            'proc/self/cgroup': '5:memory:/docker/abc\n4:cpu:/docker/abc\n',
            'sys/fs/cgroup/memory/memory.limit_in_bytes': str(5 * GIB),
            'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '50000',
            'sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
        },
    )
    assert cpu_limit(root, {}).amount == 1
    assert memory_limit(root, {}).amount == 5


def test_the_large_number_that_means_no_limit_is_none(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            'proc/self/cgroup': '5:memory:/\n4:cpu:/\n',
            'sys/fs/cgroup/memory/memory.limit_in_bytes': '9223372036854771712',
            'sys/fs/cgroup/cpu/cpu.cfs_quota_us': '-1',
            'sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
        },
    )
    assert cpu_limit(root, {}).amount == 32
    assert memory_limit(root, {}).amount == 48


@pytest.mark.parametrize(
    ('environ', 'cpus'),
    [
        ({'SLURM_CPUS_PER_TASK': '4', 'SLURM_CPUS_ON_NODE': '16'}, 4),
        ({'SLURM_CPUS_ON_NODE': '16'}, 16),
        ({'SLURM_JOB_CPUS_PER_NODE': '12(x2),8'}, 12),
        ({'SLURM_CPUS_PER_TASK': ''}, 32),
    ],
)
def test_a_slurm_job_uses_the_processors_of_its_task(
    tmp_path: Path, environ: dict[str, str], cpus: int
) -> None:
    assert cpu_limit(system(tmp_path, {}), environ).amount == cpus


@pytest.mark.parametrize(
    ('environ', 'gib'),
    [
        ({'SLURM_MEM_PER_NODE': '8192'}, 8),
        ({'SLURM_MEM_PER_CPU': '2048', 'SLURM_CPUS_ON_NODE': '4'}, 8),
        ({'SLURM_MEM_PER_CPU': '2048', 'SLURM_CPUS_PER_TASK': '4'}, 8),
        ({'SLURM_MEM_PER_NODE': '0'}, 48),
    ],
)
def test_a_slurm_job_uses_the_memory_it_was_given(
    tmp_path: Path, environ: dict[str, str], gib: float
) -> None:
    assert memory_limit(system(tmp_path, {}), environ).amount == gib


def test_a_machine_that_tells_nothing_asks_for_the_option(tmp_path: Path) -> None:
    with pytest.raises(OSError, match='--mem'):
        memory_limit(tmp_path, {})


@pytest.mark.parametrize('nprocs', [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64])
@pytest.mark.parametrize('mem_gb', [2.0, 4.0, 16.0, 60.0, 250.0])
@pytest.mark.parametrize('sessions', [1, 2, 9, 500])
def test_a_plan_never_exceeds_processors_memory_or_sessions(
    nprocs: int, mem_gb: float, sessions: int
) -> None:
    shares = plan(nprocs, mem_gb, sessions)
    assert 1 <= shares.threads * shares.at_once <= nprocs
    assert shares.at_once == 1 or shares.at_once * SESSION_GB <= mem_gb
    assert shares.at_once <= sessions
    assert shares.threads <= resources.MAX_THREADS
    assert shares.at_once <= shares.workers <= nprocs


def test_many_processors_run_sessions_side_by_side() -> None:
    assert plan(16, 60, 100).at_once == 4
    assert plan(2, 60, 100) == resources.Plan(threads=2, at_once=1, processors=2, workers=2)


def test_little_memory_gives_each_session_more_threads_instead() -> None:
    assert plan(16, 7, 100) == resources.Plan(threads=8, at_once=2, processors=16, workers=3)


def test_a_reference_of_a_gigabyte_needs_more_than_a_usual_one() -> None:
    assert session_gb(300**3) == SESSION_GB
    assert 8 < session_gb(800**3) < 12


def test_low_memory_mode_leaves_no_room_for_a_second_session() -> None:
    shares = plan(16, 60, 100, low_mem=True)
    assert (shares.at_once, shares.workers) == (1, 1)
    assert shares.processors == shares.threads


def test_threads_that_the_user_gives_are_kept_within_the_processors() -> None:
    assert plan(16, 60, 100, threads=2).threads == 2
    assert plan(4, 60, 100, threads=32).threads == 4


@pytest.mark.skipif(sys.platform != 'linux', reason='only glibc keeps memory')
def test_memory_that_was_freed_stays_until_the_end_of_the_block() -> None:
    page = resource.getpagesize()

    def resident() -> float:
        return int(Path('/proc/self/statm').read_text().split()[1]) * page / 2**20

    before = resident()
    with freed_memory_kept():
        blocks = [np.ones(2**23, np.uint8) for _ in range(25)]
        del blocks
        assert resident() - before > 150
    assert resident() - before < 50

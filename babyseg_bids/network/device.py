"""Which processor runs the network."""

from functools import cache
from pathlib import Path

import torch

from babyseg_bids.errors import UsageError


def choose_device(text: str = 'auto', /) -> str:
    """Device to use: `auto` takes a GPU when there is one.

    Parameters
    ----------
    text : `auto`, `cpu`, `cuda`, `cuda:N` or `mps`

    Raises
    ------
    UsageError
        If the device is unknown or absent.
    """
    if text == 'auto':
        if torch.cuda.is_available():
            return 'cuda:0'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    if text == 'cpu':
        return text
    if text == 'mps' and torch.backends.mps.is_available():
        return text
    kind, _, number = text.partition(':')
    if kind == 'cuda' and (number.isdigit() or not number):
        count = torch.cuda.device_count()
        if int(number or 0) < count:
            return f'cuda:{number or 0}'
        raise UsageError(
            f'--device {text} was asked for, but torch sees {count} CUDA devices here; use '
            '--device cpu, or start the container with its GPU option (--nv or --gpus all).'
        )
    raise UsageError(f'--device {text} is not available here; use auto, cpu, cuda[:N] or mps.')


@cache
def cpu_prefers_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32 (AMX, or AVX-512's BF16)."""
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    return 'amx_bf16' in text or 'avx512_bf16' in text

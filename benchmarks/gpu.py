"""The networks on a GPU: seconds a case, peak memory, and agreement with the CPU's labels.

Rows as in `inference.py`, for one scan and several of a 1 mm head. `agrees` is the share of the
brain's voxels, those that either has labelled, that have the CPU's label. The last rows let the
process have less and less of the GPU's memory, so that blocks and then the CPU take over.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from inference import OFFICIAL, Plain, head, official_weights

from babyseg_bids.network import load_model, prediction, segment
from babyseg_bids.network.unet import official_network, rescale
from babyseg_bids.resources import GIB

DEVICE = 'cuda:0'
RUNS = 3


def measure(run: Callable[[], object]) -> tuple[object, float, float]:
    """Result, best seconds of some runs after one to warm up, and peak memory in GiB."""
    result = run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    best = float('inf')
    for _ in range(RUNS):
        began = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return result, best, torch.cuda.max_memory_allocated() / GIB


def networks(scans: int, size: tuple[int, int, int]) -> float:
    """Print the published network's rows; returns the reference's seconds."""
    x = torch.rand(1, scans, *size, device=DEVICE)
    weights = official_weights()
    plain = Plain(weights).to(DEVICE)
    ours = official_network(OFFICIAL, weights)
    ours = ours.to(DEVICE, memory_format=torch.channels_last_3d)
    half = torch.autocast('cuda', torch.bfloat16)
    with torch.inference_mode():
        _, reference, memory = measure(lambda: plain(x))
        # Ours brings scans to their scale itself.
        expected = plain(rescale(x))
        print(f'{scans} reference, float32           {reference:7.3f} s {memory:6.2f} GiB')
        for name, context in (('float32', nullcontext()), ('bfloat16', half)):
            with context:
                found, seconds, memory = measure(lambda: ours(x))
            apart = float((found.float() - expected).abs().max())  # type: ignore[attr-defined]
            print(
                f'{scans} our engine, {name:9}         {seconds:7.3f} s {memory:6.2f} GiB '
                f'{reference / seconds:5.1f}x, posteriors apart by {apart:.0e}'
            )
    torch.cuda.empty_cache()
    return reference


def shipped(scans: int, reference: float) -> None:
    """Print the shipped model's rows."""
    model = load_model()
    inputs = head(scans)
    on_cpu = segment(inputs, model, device='cpu').labels

    def row(name: str) -> None:
        result, seconds, memory = measure(lambda: segment(inputs, model, device=DEVICE))
        labels = result.labels  # type: ignore[attr-defined]
        brain = (labels > 0) | (on_cpu > 0)
        agrees = float((labels == on_cpu)[brain].mean())
        print(
            f'{scans} shipped model, {name:15} {seconds:7.3f} s {memory:6.2f} GiB '
            f'{reference / seconds:5.1f}x, agrees {agrees:.2%}, on {result.device}'  # type: ignore[attr-defined]
        )

    row('as shipped')
    tf32 = partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=True)
    half = partial(torch.autocast, 'cuda', torch.bfloat16)
    for name, context in (('TF32', tf32), ('bfloat16', half)):
        with patch.object(prediction, 'exact', context):
            row(name)
    free = torch.cuda.mem_get_info()[1] / GIB
    for room in (1.0, 0.4, 0.1):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(room / free)
        row(f'in {room:g} GiB')
    torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', type=int, nargs=3, default=(192, 192, 256), help='voxels')
    parser.add_argument('--scans', type=int, nargs='+', default=[1, 3])
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    for scans in args.scans:
        shipped(scans, networks(scans, tuple(args.size)))


if __name__ == '__main__':
    main()

"""Forward pass of one scan: the published network as written down, ours, and the shipped model.

The reference runs both convolutions of each group layer in float32 with contiguous tensors, as a
plain reading of the paper does. `ours` is the same architecture with the two convolutions folded
into one and the channels-last layout; both must give the same numbers.
"""

import argparse
import time
from collections.abc import Callable

import torch

from babyseg_bids.network import load_model
from babyseg_bids.network.layers import GroupConv
from babyseg_bids.network.unet import GroupUNet, official_config

OFFICIAL = {'dim': 3, 'out': 22, 'enc': [1] + [64] * 5, 'dec': [64] * 6, 'add': [], 'rep': 2}


class PlainGroupConv(GroupConv):
    """The definition of the group convolution, without any shortcut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, C, *size) to (B, G, outputs, *size)."""
        groups = x.shape[1]
        each = self.conv_b(x.flatten(0, 1)).unflatten(0, (-1, groups))
        common = self.conv_m(x.mean(1))
        return (each + common[:, None]) / 2


def measure(run: Callable[[], torch.Tensor], repeats: int = 3) -> tuple[float, float]:
    """Best wall time and CPU time of some runs, in seconds."""
    run()
    best = (float('inf'), float('inf'))
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return best


def main() -> None:
    """Print a table of times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', type=int, default=128, help='voxels along each axis')
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    official = GroupUNet(official_config(OFFICIAL)).eval()
    plain = GroupUNet(official_config(OFFICIAL)).eval()
    for module in plain.modules():
        if isinstance(module, GroupConv):
            module.__class__ = PlainGroupConv
    plain.load_state_dict(official.state_dict())
    official = official.to(memory_format=torch.channels_last_3d)
    shipped = load_model()
    network = shipped.network.to(memory_format=torch.channels_last_3d)
    x = torch.rand(1, 1, *[args.size] * 3)
    with torch.inference_mode():
        difference = float((plain(x).softmax(1) - official(x).softmax(1)).abs().max())
        rows = {
            'published network, plain float32 (reference)': measure(lambda: plain(x)),
            'published network, our engine': measure(lambda: official(x)),
            f'shipped model {shipped.name}, same voxels': measure(lambda: network(x)),
        }
    reference = rows['published network, plain float32 (reference)']
    print(f'{args.size}^3 voxels, {args.threads} threads, torch {torch.__version__}')
    print(f'largest difference of the posteriors, reference to our engine: {difference:.1e}')
    for name, (wall, cpu) in rows.items():
        print(f'{name:48s} {wall:7.2f} s wall {cpu:7.2f} s CPU   x{reference[1] / cpu:.1f}')


if __name__ == '__main__':
    main()

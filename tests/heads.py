"""Heads that stand upright or lie turned."""

from dataclasses import replace

import numpy as np
from network_phantoms import CHANNEL
from scipy.spatial.transform import Rotation

from babyseg_bids.network import layout
from babyseg_bids.synthesis.finetune import drawn_brains
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.settings import load_settings, update


def rotation(*degrees):
    return Rotation.from_euler('xyz', degrees, degrees=True).as_matrix()


def balls(turn, spacing, size=96):
    """Posteriors (C, *size): balls where the structures of a turned average head are."""
    index = np.indices((size,) * 3, np.float32)
    channels = np.zeros((size,) * 3, np.int64)
    for number, row in layout._layout().iterrows():
        # Twice as far apart, so that no ball touches another.
        centre = turn @ (2 * row[['x', 'y', 'z']].to_numpy(float)) / spacing + size / 2
        channels[np.square(index - centre.reshape(3, 1, 1, 1)).sum(0) < 6] = CHANNEL[number]
    return np.moveaxis(np.eye(len(CHANNEL), dtype=np.float32)[channels], -1, 0)


def drawn_head():
    """A drawn child's head (160^3, 1 mm, RAS), upright, and its map of channels."""
    settings = update(
        load_settings(), {'size': (160, 160, 160), 'spacing': 1.0, 'group_shares': (1.0,)}
    )
    anatomy = replace(settings.anatomy, rotation_deg=0.0, mirror_probability=0.0)
    sample = draw_sample(
        drawn_brains([(9, 5)]), seed=5, settings=replace(settings, anatomy=anatomy)
    )
    return sample.images[0].numpy(), sample.target.numpy()

"""Small label maps and settings that the tests of the synthesis share."""

from dataclasses import fields, replace

import numpy as np

from babyseg_bids.synthesis import maps
from babyseg_bids.synthesis.settings import SECTIONS, SynthesisSettings

TABLE = maps.class_table()
SETTINGS_2D = SynthesisSettings(size=(48, 56))
SETTINGS_3D = SynthesisSettings(size=(24, 24, 24), spacing=4.0)


def as_classes(numbers):
    """Classes uint8 of source labels."""
    lut = np.zeros(10_000, np.uint8)
    lut[TABLE.numbers] = np.arange(len(TABLE))
    return lut[numbers]


def phantom(dim=2, side=90):
    """White matter inside cortex on both sides, with a ventricle on the left."""
    axes = np.meshgrid(*[np.arange(side) - (side - 1) / 2] * dim, indexing='ij')
    radius = np.sqrt(sum(a**2 for a in axes))
    left = axes[0] < 0
    numbers = np.where(radius < 32, np.where(left, 3, 42), 0)
    numbers = np.where(radius < 24, np.where(left, 2, 41), numbers)
    numbers = np.where((radius < 8) & left, 4, numbers)
    distance = np.clip(np.rint((radius - 32) / maps.DISTANCE_STEP), -127, 127)
    return maps.TrainingMap('phantom', as_classes(numbers), distance.astype(np.int8), False)


def quiet(settings, **on):
    """Settings in which nothing happens by chance but what is named, `section__name=value`."""
    sections = {}
    for section, kind in SECTIONS.items():
        chances = [f.name for f in fields(kind) if f.name.endswith('_probability')]
        off = dict.fromkeys(chances, 0.0)
        sections[section] = replace(getattr(settings, section), **off)
    still = {'rotation_deg': 0.0, 'stretch': 0.0, 'shear': 0.0, 'translation': 0.0, 'warp_sd': 0.0}
    sections['anatomy'] = replace(
        sections['anatomy'], scale_infant=(1.0, 1.0), scale_adult=(1.0, 1.0), **still
    )
    sections['surroundings'] = replace(sections['surroundings'], head_probability=1.0)
    sections['acquisition'] = replace(
        sections['acquisition'],
        bias=(0.0, 0.0),
        noise=(0.0, 0.0),
        gamma_sd=0.0,
        blur_fwhm=(0.0, 0.0),
    )
    for key, value in on.items():
        section, name = key.split('__')
        sections[section] = replace(sections[section], **{name: value})
    return replace(settings, group_shares=(1.0,), **sections)

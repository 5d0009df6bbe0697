"""Settings of the synthesis: what is drawn, how often, and how strongly."""

from dataclasses import dataclass, fields

from babyseg_bids.errors import UsageError


@dataclass(frozen=True)
class SynthesisSettings:
    """Ranges and probabilities of `draw_sample`. Lengths are mm unless said otherwise.

    Probabilities are between 0 and 1. `*_max` bound a uniform draw from zero.
    """

    size: tuple[int, ...] = (64, 80, 64)
    spacing: float = 2.0
    group_shares: tuple[float, ...] = (0.7, 0.2, 0.07, 0.03)
    adult_share: float = 0.25

    rotation_deg: float = 20.0
    scale_infant: tuple[float, float] = (0.85, 1.2)
    scale_adult: tuple[float, float] = (0.6, 1.0)
    stretch: float = 0.1
    shear: float = 0.08
    translation: float = 12.0
    warp_sd: float = 3.5
    warp_points: tuple[int, ...] = (4, 8, 16)

    head_probability: float = 0.5
    hindbrain_missing_probability: float = 0.3
    crop_probability: float = 0.1
    masked_probability: float = 0.7

    random_contrast_probability: float = 0.2
    tissue_contrast_probability: float = 0.25
    noise_in_class: float = 0.08
    texture: float = 0.06

    blur_max: float = 1.2
    slices_probability: float = 0.25
    slices_max: float = 6.0
    bias_max: float = 0.35
    motion_probability: float = 0.1
    motion_moves: int = 4
    motion_shift: float = 5.0
    noise_max: float = 0.08
    gamma_log_sd: float = 0.2
    misalign_probability: float = 0.3
    misalign: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith(('_probability', '_share')) and not 0 <= value <= 1:
                raise UsageError(f'{f.name} is {value}; give a number from 0 to 1.')
            if f.name.startswith('scale_') and not 0.3 <= value[0] <= value[1] <= 3:
                raise UsageError(f'{f.name} is {value}; give two rising numbers from 0.3 to 3.')
        if not 0.3 <= self.spacing <= 10:
            raise UsageError(f'spacing is {self.spacing}; give millimetres from 0.3 to 10.')
        if abs(sum(self.group_shares) - 1) > 1e-6:
            raise UsageError(f'group_shares sum to {sum(self.group_shares)}; they must sum to 1.')

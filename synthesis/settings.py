"""Settings of the synthesis: what is drawn, how often, and how strongly.

Every setting has a range and a sentence about itself, which errors, the TOML files and the
documentation share. Lengths are mm; a probability is from 0 to 1.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from babyseg_bids.errors import InputError, UsageError

PRESETS = 'data/synthesis'


def _setting(default: Any, low: float, high: float, text: str) -> Any:
    return field(default=default, metadata={'low': low, 'high': high, 'text': text})


def _chance(default: float, text: str) -> Any:
    return _setting(default, 0, 1, f'probability {text}')


class _Section:
    """Checks that every number is in its range."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            if 'low' in f.metadata:
                _check(f.name, getattr(self, f.name), f.default, f.metadata)


def _check(name: str, value: Any, default: Any, limits: Mapping[str, Any], /) -> None:
    low, high = limits['low'], limits['high']
    several = isinstance(default, tuple)
    parts = value if several and isinstance(value, (tuple, list)) else [value]
    numbers = all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in parts)
    fits = numbers and all(low <= p <= high for p in parts)
    what = 'a number'
    if several:
        rising = limits.get('rising', True)
        length = 2 if rising else limits.get('length')
        what = 'two rising numbers' if rising else f'{length or "some"} numbers'
        fits = fits and isinstance(value, (tuple, list)) and len(value) == (length or len(value))
        fits = fits and len(value) > 0 and not (rising and value[0] > value[1])
    elif isinstance(default, int) and fits:
        what, fits = 'a whole number', isinstance(value, int)
    if not fits:
        raise UsageError(f'{name} is {value!r}; give {what} from {low:g} to {high:g}.')


@dataclass(frozen=True)
class AnatomySettings(_Section):
    """Whose brain it is, and how it is deformed."""

    adult_share: float = _chance(0.25, 'that the brain is a shrunken adult one')
    morph_probability: float = _chance(0.5, 'that an infant is a mixture of several children')
    morph_children: int = _setting(3, 2, 8, 'children that are mixed at most')
    mirror_probability: float = _chance(0.5, 'of a mirror image, with the labels swapped')
    rotation_deg: float = _setting(20.0, 0, 180, 'largest rotation about each axis, degrees')
    scale_infant: tuple[float, float] = _setting((0.85, 1.2), 0.3, 3, 'size of an infant map')
    scale_adult: tuple[float, float] = _setting((0.6, 1.0), 0.3, 3, 'size of an adult map')
    volume_probability: float = _chance(0.0, 'that the volume gives the size; set by training')
    volume: tuple[float, float] = _setting((750, 1500), 10, 5000, 'of the brain then, mL')
    stretch: float = _setting(0.1, 0, 0.5, 'largest change of a single axis')
    shear: float = _setting(0.08, 0, 0.5, 'largest shear')
    translation: float = _setting(12.0, 0, 200, 'largest shift along each axis, mm')
    warp_sd: float = _setting(3.5, 0, 10, 'deviation of the velocity at its coarsest scale, mm')
    warp_points: tuple[float, ...] = field(
        default=(4, 8, 16),
        metadata={'low': 2, 'high': 64, 'rising': False, 'text': 'control points of each scale'},
    )
    ventricles_probability: float = _chance(0.3, 'that the ventricles are widened or narrowed')
    ventricles: tuple[float, float] = _setting((-1.5, 4.0), -4, 10, 'by how much, mm a side')
    sulci_probability: float = _chance(0.3, 'that sulci are deepened or flattened')
    sulci: tuple[float, float] = _setting((-2.0, 2.0), -4, 4, 'by how much, mm')
    cortex_probability: float = _chance(0.0, 'that white matter reaches further into the cortex')
    cortex: tuple[float, float] = _setting((-0.5, 1.2), -3, 3, 'by how much, mm')

    def of_one_child(self) -> 'AnatomySettings':
        """The same for measuring on a map as it is: not mixed, with its own size and cortex."""
        return replace(
            self,
            adult_share=0.0,
            morph_probability=0.0,
            volume_probability=0.0,
            cortex_probability=0.0,
        )


@dataclass(frozen=True)
class SurroundingsSettings(_Section):
    """What lies around the brain, and what of it the scans show."""

    head_probability: float = _chance(0.5, 'that the scans show the head')
    donor_probability: float = _chance(0.5, 'that an infant gets the head of an adult donor')
    csf: tuple[float, float] = _setting((1.0, 5.0), 0, 20, 'width of the CSF rim, mm')
    skull: tuple[float, float] = _setting((1.5, 6.0), 0, 20, 'thickness of the skull, mm')
    scalp: tuple[float, float] = _setting((2.0, 8.0), 0, 30, 'thickness of the scalp, mm')
    dura_probability: float = _chance(0.3, 'of a thin dark line between CSF and skull')
    body_probability: float = _chance(0.5, 'of soft tissue of face, neck and shoulders')
    deface_probability: float = _chance(0.15, 'that the face was cut off')
    exact_strip_share: float = _chance(0.4, 'that a stripped scan shows just the labels')
    strip_margin: tuple[float, float] = _setting(
        (-2.0, 6.0), -20, 40, 'where a brain extraction cuts otherwise, mm outside the hull'
    )
    strip_wobble: float = _setting(1.5, 0, 10, 'deviation of that border, mm')
    hindbrain_missing_probability: float = _chance(
        0.3, 'that cerebellum and brainstem were cut away from stripped scans'
    )
    occlusion_probability: float = _chance(0.05, 'that boxes or planes are blanked')
    occlusions: int = _setting(3, 1, 20, 'boxes or planes at most')
    crop_probability: float = _chance(0.1, 'that the field of view ends inside the head')
    crop_share: tuple[float, float] = _setting((0.55, 0.9), 0.2, 1, 'of the grid that is kept')


@dataclass(frozen=True)
class ContrastSettings(_Section):
    """Intensities of the tissues."""

    shares: tuple[float, ...] = field(
        default=(0.2, 0.25, 0.25, 0.3),
        metadata={
            'low': 0,
            'high': 1,
            'rising': False,
            'length': 4,
            'text': 'of contrasts that are random by class, random by tissue, typical, physical',
        },
    )
    any_age_probability: float = _chance(0.5, 'that a physical contrast ignores the map age')
    field_tesla: tuple[float, float] = _setting((1.0, 3.0), 0.03, 12, 'field strength, tesla')
    relaxation_jitter: float = _setting(0.1, 0, 0.5, 'deviation of the log relaxation times')
    maturity_spread: float = _setting(1.0, 0, 4, 'how unequally white matter matures at most')
    noise_in_class: float = _setting(0.08, 0, 0.5, 'largest deviation inside a class')
    texture: float = _setting(0.06, 0, 0.5, 'largest smooth variation inside a class')
    split_probability: float = _chance(0.2, 'that structures consist of two parts')
    split_sd: float = _setting(0.08, 0, 0.5, 'deviation of the difference of the parts')


@dataclass(frozen=True)
class AcquisitionSettings(_Section):
    """What the scanner and the child's movements do."""

    blur_fwhm: tuple[float, float] = _setting((0.3, 2.5), 0, 10, 'width of the blur, mm')
    slices_probability: float = _chance(0.25, 'of slices thicker than the voxels')
    slices: tuple[float, float] = _setting((2.0, 6.0), 0.3, 12, 'their distance, mm')
    gap: tuple[float, float] = _setting((0.0, 0.3), 0, 0.9, 'share of it that is a gap')
    resolution_probability: float = _chance(0.2, 'of larger voxels in all directions')
    resolution: tuple[float, float] = _setting((1.0, 3.0), 0.3, 8, 'their size, mm')
    bias: tuple[float, float] = _setting((0.0, 0.35), 0, 2, 'deviation of the log bias field')
    noise: tuple[float, float] = _setting((0.0, 0.08), 0, 1, 'deviation of the Rician noise')
    motion_probability: float = _chance(0.1, 'that the child moves during the acquisition')
    motion_moves: int = _setting(4, 1, 20, 'moves at most')
    motion_shift: float = _setting(5.0, 0, 30, 'largest shift, mm')
    motion_rotation: float = _setting(5.0, 0, 45, 'largest rotation, degrees')
    ghost_probability: float = _chance(0.05, 'of ghosts')
    ghost: tuple[float, float] = _setting((0.02, 0.15), 0, 1, 'their strength')
    gibbs_probability: float = _chance(0.1, 'that k-space is cut off, with ringing')
    gibbs: tuple[float, float] = _setting((0.5, 0.9), 0.1, 1, 'share of it that is kept')
    spike_probability: float = _chance(0.03, 'of spikes in k-space')
    spike: tuple[float, float] = _setting((0.02, 0.15), 0, 1, 'amplitude of their waves')
    zipper_probability: float = _chance(0.03, 'of lines of noise')
    zipper: tuple[float, float] = _setting((0.1, 0.5), 0, 2, 'their strength')
    wrap_probability: float = _chance(0.03, 'that the field of view is too small and wraps')
    wrap: tuple[float, float] = _setting((0.7, 0.95), 0.3, 1, 'share that is left of it')
    gamma_sd: float = _setting(0.2, 0, 1, 'deviation of the log of the exponent')
    remap_probability: float = _chance(0.1, 'of a random smooth curve of intensities')
    remap: float = _setting(0.15, 0, 0.5, 'its deviation from the diagonal')
    clip_probability: float = _chance(0.1, 'that bright voxels are saturated')
    clip: tuple[float, float] = _setting((0.6, 0.95), 0.1, 1, 'share of the range that is left')
    quantise_probability: float = _chance(0.1, 'of few grey levels')
    quantise: tuple[float, float] = _setting((24, 256), 4, 65536, 'their number')
    masked_probability: float = _chance(0.7, 'that what is stripped away is exactly zero')


@dataclass(frozen=True)
class GroupSettings(_Section):
    """How the scans of one child differ from each other."""

    misalign_probability: float = _chance(0.3, 'that a further scan is not quite aligned')
    misalign: float = _setting(1.0, 0, 20, 'largest shift, mm')
    misalign_rotation: float = _setting(1.5, 0, 30, 'largest rotation, degrees')
    own_view_probability: float = _chance(0.15, 'that one scan shows less than the others')
    ruined_probability: float = _chance(0.0, 'that motion has ruined one of several scans')


SECTIONS = {
    'anatomy': AnatomySettings,
    'surroundings': SurroundingsSettings,
    'contrast': ContrastSettings,
    'acquisition': AcquisitionSettings,
    'group': GroupSettings,
}


@dataclass(frozen=True)
class SynthesisSettings:
    """All settings of `draw_sample`.

    Parameters
    ----------
    size : voxels of the output, two or three axes
    spacing : voxel size of the output, mm
    group_shares : of samples with one, two, ... scans; they sum to 1
    """

    size: tuple[int, ...] = (64, 80, 64)
    spacing: float = 2.0
    group_shares: tuple[float, ...] = (0.7, 0.2, 0.07, 0.03)
    anatomy: AnatomySettings = field(default_factory=AnatomySettings)
    surroundings: SurroundingsSettings = field(default_factory=SurroundingsSettings)
    contrast: ContrastSettings = field(default_factory=ContrastSettings)
    acquisition: AcquisitionSettings = field(default_factory=AcquisitionSettings)
    group: GroupSettings = field(default_factory=GroupSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.spacing, (int, float)) or not 0.3 <= self.spacing <= 10:
            raise UsageError(f'spacing is {self.spacing!r}; give a number from 0.3 to 10.')
        if len(self.size) not in (2, 3) or not all(8 <= n <= 512 for n in self.size):
            raise UsageError(f'size is {self.size!r}; give two or three numbers from 8 to 512.')
        if abs(sum(self.group_shares) - 1) > 1e-6:
            raise UsageError(
                f'group_shares is {self.group_shares!r}; give numbers from 0 to 1 that sum to 1.'
            )


def preset_names() -> list[str]:
    """Names of the presets that ship with babyseg."""
    folder = files('babyseg_bids').joinpath(PRESETS)
    return sorted(f.name.removesuffix('.toml') for f in folder.iterdir())


@lru_cache
def load_settings(name: str | Path = 'default', /) -> SynthesisSettings:
    """Settings of a preset, or of a TOML file.

    A file names only what differs from the preset in its key `base` (`default` if it has none).

    Raises
    ------
    InputError
        If there is no such preset or file, or it is no TOML.
    UsageError
        If a key is unknown or a value out of its range; the message names both.
    """
    path = Path(name)
    if path.suffix != '.toml' and str(name) in preset_names():
        path = Path(str(files('babyseg_bids').joinpath(PRESETS, f'{name}.toml')))
    try:
        content = tomllib.loads(path.read_text('utf-8'))
    except OSError as e:
        raise InputError(
            f'{name} is no settings file ({e.strerror}); give a TOML file or one of '
            f'{", ".join(preset_names())}.'
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f'{name} is not a TOML file: {e}') from e
    base = content.pop('base', None if str(name) == 'default' else 'default')
    start = load_settings(base) if base else SynthesisSettings()
    try:
        return update(start, content)
    except UsageError as e:
        raise UsageError(f'{name}: {e}') from e


def update(settings: SynthesisSettings, changes: Mapping[str, Any], /) -> SynthesisSettings:
    """Settings with some values changed; `changes` is nested as the TOML files are."""
    values: dict[str, Any] = {}
    for key, value in changes.items():
        _known(key, settings, '')
        current = getattr(settings, key)
        if not is_dataclass(current):
            values[key] = _tuple(value)
            continue
        if not isinstance(value, Mapping):
            raise UsageError(f'{key} is {value!r}; it is a section and holds settings.')
        for inner in value:
            _known(inner, current, f'{key}.')
        try:
            inside = {k: _tuple(v) for k, v in value.items()}
            values[key] = replace(current, **inside)  # type: ignore[type-var]
        except UsageError as e:
            raise UsageError(f'{key}.{e}') from e
    return replace(settings, **values)


def _known(key: str, section: Any, prefix: str) -> None:
    names = [f.name for f in fields(section)]
    if key not in names:
        near = difflib.get_close_matches(key, names, 1)
        hint = f'did you mean {prefix}{near[0]}?' if near else f'known are {", ".join(names)}.'
        raise UsageError(f'{prefix}{key} is no setting; {hint}')


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def to_toml(settings: SynthesisSettings, /) -> str:
    """A settings file with every setting, its range and its meaning."""
    lines = ["# Voxels and voxel size (mm) are the training stage's; these are for looking."]
    lines += [f'size = {_format(settings.size)}', f'spacing = {_format(settings.spacing)}']
    lines += ['# Shares of samples with one, two, ... scans of the child.']
    lines += [f'group_shares = {_format(settings.group_shares)}']
    for name, kind in SECTIONS.items():
        section = getattr(settings, name)
        lines += ['', f'# {kind.__doc__}', f'[{name}]']
        for f in fields(section):
            m = f.metadata
            lines.append(f'# {m["text"]} ({m["low"]:g} to {m["high"]:g})')
            lines.append(f'{f.name} = {_format(getattr(section, f.name))}')
    return '\n'.join(lines) + '\n'


def _format(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f'[{", ".join(_format(v) for v in value)}]'
    return repr(value)

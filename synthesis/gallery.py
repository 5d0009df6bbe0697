"""A page of samples with their parameters, to see what the network is trained on."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
from jinja2 import Environment
from matplotlib.image import imread, imsave
from torch import Tensor

from babyseg_bids.labels import label_table
from babyseg_bids.synthesis.generator import Sample, draw_sample
from babyseg_bids.synthesis.maps import TrainingMap
from babyseg_bids.synthesis.settings import SECTIONS, SynthesisSettings

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; }
img { width: 100%; image-rendering: pixelated; background: #000; }
pre { overflow: auto; font-size: .8rem; }
</style>
<h1>{{ title }}</h1>
<p>{{ text }}</p>
<main>
{% for item in items %}
<figure>
<img alt="{{ item.alt }}" src="data:image/png;base64,{{ item.picture }}">
<figcaption><b>{{ item.name }}</b>
<details><summary>{{ item.alt }}</summary><pre>{{ item.record }}</pre></details></figcaption>
</figure>
{% endfor %}
</main>
</html>
"""


def gallery_page(
    maps: Sequence[TrainingMap],
    settings: SynthesisSettings,
    /,
    *,
    count: int,
    seed: int,
    by_setting: bool = False,
    title: str = 'Synthetic training samples',
) -> str:
    """HTML of a page of samples; it needs no other file.

    Parameters
    ----------
    count : number of samples
    seed : of the first sample
    by_setting : show what each probability in the settings does, alone and on one anatomy,
        instead of `count` samples
    """
    if by_setting:
        text = 'Each picture has one thing switched on that the first one lacks.'
        samples = [
            (name, draw_sample(maps, seed=seed, settings=s)) for name, s in one_by_one(settings)
        ]
    else:
        text = 'Left to right: the scans of one child, and the label map. Open a line to see why.'
        samples = [
            (f'seed {seed + i}', draw_sample(maps, seed=seed + i, settings=settings))
            for i in range(count)
        ]
    items = [
        {
            'name': name,
            'alt': f'{len(s.images)} scan{"s" * (len(s.images) > 1)}',
            'picture': base64.b64encode(picture(s)).decode(),
            'record': json.dumps(s.record, indent=1),
        }
        for name, s in samples
    ]
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(title=title, text=text, items=items)


def one_by_one(settings: SynthesisSettings, /) -> Iterator[tuple[str, SynthesisSettings]]:
    """Settings with everything that may happen off, then with each of it on, by name."""
    off: dict[str, object] = {}
    names = []
    for section, kind in SECTIONS.items():
        chances = [f.name for f in fields(kind) if f.name.endswith('_probability')]
        off[section] = replace(getattr(settings, section), **dict.fromkeys(chances, 0.0))
        names += [(section, name) for name in chances]
    # Nothing else may hide what is shown: a clean scan of a child in a typical contrast.
    off['anatomy'] = replace(off['anatomy'], adult_share=0.0, rotation_deg=0.0)  # type: ignore
    off['contrast'] = replace(off['contrast'], shares=(0.0, 0.0, 1.0, 0.0))  # type: ignore
    quiet = {'bias': (0.0, 0.0), 'noise': (0.0, 0.01), 'gamma_sd': 0.0, 'blur_fwhm': (1.0, 1.0)}
    off['acquisition'] = replace(off['acquisition'], **quiet)  # type: ignore
    off['surroundings'] = replace(off['surroundings'], head_probability=1.0)  # type: ignore
    start = replace(settings, group_shares=(1.0,), **off)  # type: ignore
    yield 'nothing', start
    for section, name in names:
        changes: dict[str, object] = {name: 1.0}
        if name in ('hindbrain_missing_probability', 'exact_strip_share', 'head_probability'):
            changes |= {'head_probability': 0.0, 'exact_strip_share': 1.0}
        if section == 'group' or name == 'any_age_probability':
            # Neither shows in a single scan or without physics.
            continue
        if name == 'masked_probability':
            stripped = replace(start.surroundings, head_probability=0.0, exact_strip_share=1.0)
            masked = replace(start.acquisition, masked_probability=1.0)
            yield (
                label_of(section, name),
                replace(start, surroundings=stripped, acquisition=masked),
            )
            continue
        changed = replace(getattr(start, section), **changes)
        yield label_of(section, name), replace(start, **{section: changed})  # type: ignore[arg-type]
    strip = replace(
        start.surroundings,
        head_probability=0.0,
        exact_strip_share=0.0,
    )
    yield 'surroundings: sloppy strip', replace(start, surroundings=strip)
    physics = replace(start.contrast, shares=(0.0, 0.0, 0.0, 1.0), any_age_probability=1.0)
    yield 'contrast: physics', replace(start, contrast=physics)
    noisy = replace(start.acquisition, noise=settings.acquisition.noise)
    yield 'acquisition: noise', replace(start, acquisition=noisy)
    uneven = replace(start.acquisition, bias=settings.acquisition.bias)
    yield 'acquisition: bias', replace(start, acquisition=uneven)


def label_of(section: str, name: str, /) -> str:
    """What a gallery calls a probability."""
    if name == 'head_probability':
        return 'surroundings: skull stripped'
    return f'{section}: {name.removesuffix("_probability")}'


def picture(sample: Sample, /, *more: Tensor) -> bytes:
    """PNG of the middle planes of a sample: one row a plane; its scans, then its labels.

    Parameters
    ----------
    more : (*size) label maps to show beside the sample's own
    """
    colours = np.array([r.rgb for r in label_table().rows], np.uint8)
    maps = [x.cpu().numpy() for x in (sample.target, *more)]
    rows = []
    dim = sample.target.ndim
    for axis in range(dim if dim == 3 else 1):
        middle = sample.target.shape[axis] // 2
        row = []
        for image in sample.images.cpu().numpy():
            plane = np.take(image, middle, axis) if dim == 3 else image
            row.append(np.repeat((255 * plane).astype(np.uint8)[..., None], 3, -1))
        row += [colours[np.take(m, middle, axis) if dim == 3 else m] for m in maps]
        # Up is superior or anterior.
        rows.append(np.concatenate([r.swapaxes(0, 1)[::-1] for r in row], 1))
    width = max(r.shape[1] for r in rows)
    padded = [np.pad(r, [(0, 0), (0, width - r.shape[1]), (0, 0)]) for r in rows]
    out = io.BytesIO()
    imsave(out, np.concatenate(padded), format='png')
    return out.getvalue()


def side_by_side(pictures: Sequence[bytes], /) -> bytes:
    """One PNG of several of the same height."""
    out = io.BytesIO()
    imsave(out, np.concatenate([imread(io.BytesIO(p)) for p in pictures], 1), format='png')
    return out.getvalue()


def affine_of(settings: SynthesisSettings, /) -> np.ndarray:
    """Affine (4, 4) of samples: RAS axes, the grid's middle at the origin."""
    affine = np.diag([settings.spacing] * 3 + [1.0])
    affine[:3, 3] = [-settings.spacing * (n - 1) / 2 for n in settings.size]
    return affine

"""The methods text and the references, ready to paste into a paper.

They are put together from what a run does: a study without a second scan in any session is not
told of an alignment.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from babyseg_bids import __version__
from babyseg_bids.labels import is_official
from babyseg_bids.records import SessionInputs
from babyseg_bids.settings import Settings
from babyseg_bids.spaces import standard_spaces

BIBLIOGRAPHY = """@article{hoffmann2025babyseg,
  title = {Deep infant brain segmentation from multi-contrast MRI},
  author = {Hoffmann, Malte and Z{\\"o}llei, Lilla and Dalca, Adrian V.},
  journal = {arXiv preprint arXiv:2512.05114},
  year = {2025}
}
@article{gorgolewski2011nipype,
  title = {Nipype: a flexible, lightweight and extensible neuroimaging data processing framework
    in Python},
  author = {Gorgolewski, Krzysztof and Burns, Christopher D. and Madison, Cindee and Clark, Dav and
    Halchenko, Yaroslav O. and Waskom, Michael L. and Ghosh, Satrajit S.},
  journal = {Frontiers in Neuroinformatics},
  volume = {5},
  pages = {13},
  year = {2011},
  doi = {10.3389/fninf.2011.00013}
}
@article{avants2008syn,
  title = {Symmetric diffeomorphic image registration with cross-correlation: evaluating automated
    labeling of elderly and neurodegenerative brain},
  author = {Avants, Brian B. and Epstein, Charles L. and Grossman, Murray and Gee, James C.},
  journal = {Medical Image Analysis},
  volume = {12},
  number = {1},
  pages = {26--41},
  year = {2008},
  doi = {10.1016/j.media.2007.06.004}
}
@article{studholme1999nmi,
  title = {An overlap invariant entropy measure of {3D} medical image alignment},
  author = {Studholme, Colin and Hill, Derek L. G. and Hawkes, David J.},
  journal = {Pattern Recognition},
  volume = {32},
  number = {1},
  pages = {71--86},
  year = {1999},
  doi = {10.1016/S0031-3203(98)00091-0}
}
@article{tustison2010n4,
  title = {{N4ITK}: improved {N3} bias correction},
  author = {Tustison, Nicholas J. and Avants, Brian B. and Cook, Philip A. and others},
  journal = {IEEE Transactions on Medical Imaging},
  volume = {29},
  number = {6},
  pages = {1310--1320},
  year = {2010},
  doi = {10.1109/TMI.2010.2046908}
}
@article{manjon2010denoising,
  title = {Adaptive non-local means denoising of {MR} images with spatially varying noise levels},
  author = {Manj{\\'o}n, Jos{\\'e} V. and Coup{\\'e}, Pierrick and others},
  journal = {Journal of Magnetic Resonance Imaging},
  volume = {31},
  number = {1},
  pages = {192--203},
  year = {2010},
  doi = {10.1002/jmri.22003}
}
@article{gorgolewski2016bids,
  title = {The brain imaging data structure, a format for organizing and describing outputs of
    neuroimaging experiments},
  author = {Gorgolewski, Krzysztof J. and others},
  journal = {Scientific Data},
  volume = {3},
  pages = {160044},
  year = {2016},
  doi = {10.1038/sdata.2016.44}
}
"""

INTRODUCTION = (
    '# Methods\n\n'
    'Brain structures were segmented with babyseg {version}, a BIDS App (Gorgolewski et al., '
    '2016) built on Nipype (Gorgolewski et al., 2011). '
)
ALIGNMENT = (
    'Within each session, the other scans were rigidly aligned to the reference scan by the '
    'greatest normalised mutual information (Studholme et al., 1999), searched from several '
    'starting positions; scans that the headers already aligned were left in place, and '
    'implausible alignments were refused. '
)
DENOISING = (
    'Rician noise was reduced with adaptive non-local means (Manjón et al., 2010) as implemented '
    'in ANTs. '
)
BIAS_CORRECTION = 'Bias fields were corrected with N4 (Tustison et al., 2010). '
SEGMENTATION = (
    'All scans of a session were segmented jointly with a group-convolution U-Net (BabySeg; '
    'Hoffmann et al., 2025) that was trained on synthetic images only and takes any number of '
    'scans of any contrast{weights}. Posterior probabilities were interpolated to the grid of the '
    'reference scan, where each voxel received the most probable structure; its uncertainty is '
    'one minus that probability. '
)
MEASURES = (
    "A structure's volume is the sum of its posterior probabilities times the volume of a voxel. "
    'The sum over structures is the segmented brain volume. '
)
NORMALISATION = (
    "The label maps were brought into standard spaces of TemplateFlow with ANTs' symmetric "
    'diffeomorphic registration (Avants et al., 2008), driven by the image of the brain and by '
    'tissue maps from segmentations of the scan and of the template by the same network. '
)
# By key of the bibliography: the words with which the text cites the work, and the work.
REFERENCES = {
    'avants2008syn': (
        'Avants et al., 2008',
        (
            'Avants et al. (2008). Symmetric diffeomorphic image registration with cross-'
            'correlation. Medical Image Analysis 12(1), 26-41.'
        ),
    ),
    'gorgolewski2011nipype': (
        'Gorgolewski et al., 2011',
        (
            'Gorgolewski et al. (2011). Nipype: a flexible, lightweight and extensible '
            'neuroimaging data processing framework in Python. Frontiers in Neuroinformatics '
            '5, 13.'
        ),
    ),
    'gorgolewski2016bids': (
        'Gorgolewski et al., 2016',
        (
            'Gorgolewski et al. (2016). The brain imaging data structure, a format for '
            'organizing and describing outputs of neuroimaging experiments. Scientific Data '
            '3, 160044.'
        ),
    ),
    'hoffmann2025babyseg': (
        'Hoffmann et al., 2025',
        (
            'Hoffmann, Zöllei and Dalca (2025). Deep infant brain segmentation from multi-'
            'contrast MRI. arXiv:2512.05114.'
        ),
    ),
    'manjon2010denoising': (
        'Manjón et al., 2010',
        (
            'Manjón et al. (2010). Adaptive non-local means denoising of MR images with '
            'spatially varying noise levels. Journal of Magnetic Resonance Imaging 31(1), '
            '192-203.'
        ),
    ),
    'studholme1999nmi': (
        'Studholme et al., 1999',
        (
            'Studholme et al. (1999). An overlap invariant entropy measure of 3D medical image '
            'alignment. Pattern Recognition 32(1), 71-86.'
        ),
    ),
    'tustison2010n4': (
        'Tustison et al., 2010',
        (
            'Tustison et al. (2010). N4ITK: improved N3 bias correction. IEEE Transactions on'
            ' Medical Imaging 29(6), 1310-1320.'
        ),
    ),
}


def methods(sessions: Sequence[SessionInputs], settings: Settings, /) -> str:
    """What was done to sessions, with the references.

    Many runs and batches write into one output folder: what its text already says of an alignment
    stays, since the results that it speaks of do.
    """
    try:
        before = (settings.output_dir / 'logs' / 'CITATION.md').read_text('utf-8')
    except OSError:
        before = ''
    aligned = any(len(s.scans) > 1 for s in sessions) or ALIGNMENT in before
    weights = ''
    if is_official(settings.model):
        weights = ', with the weights that its authors published'
    elif settings.model != 'default':
        weights = f', with the weights of the file {Path(settings.model).name}'
    text = INTRODUCTION.format(version=__version__) + ALIGNMENT * aligned
    text += DENOISING * bool(settings.denoise)
    text += BIAS_CORRECTION * (settings.bias_correction == 'n4')
    text += SEGMENTATION.format(weights=weights) + MEASURES
    text += NORMALISATION * bool(standard_spaces(settings.output_spaces))
    cited = [line for words, line in REFERENCES.values() if words in text]
    return f'{text.rstrip()}\n\n## References\n\n' + ''.join(f'- {c}\n' for c in cited)


def bibliography(text: str, /) -> str:
    """The BibTeX entries of the references in a methods text."""
    entries = re.split(r'(?=^@)', BIBLIOGRAPHY, flags=re.MULTILINE)
    keys = [key for key, (_, line) in REFERENCES.items() if line in text]
    return ''.join(e for e in entries if any(f'{{{key},' in e for key in keys))

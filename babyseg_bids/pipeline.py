"""Align and segment the scans of one session: the steps as functions, and the Python API."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids.agreement import OwnSegmentations
from babyseg_bids.alignment import Alignment, align, used_scans
from babyseg_bids.errors import InputError
from babyseg_bids.morphometry import morphometry_table
from babyseg_bids.network import Model, Segmentation, load_model, segment
from babyseg_bids.outputs import coarse_uncertainty, like_reference
from babyseg_bids.preflight import load_image
from babyseg_bids.preprocessing import BiasCorrection, preprocess
from babyseg_bids.qc import session_qc
from babyseg_bids.qc_image import scan_agreement
from babyseg_bids.records import Age, Flag

ScanLike = str | Path | nib.Nifti1Image | np.ndarray


@dataclass(frozen=True)
class Result:
    """What `BabySegPipeline.predict` gives, on the grid of the first scan.

    Parameters
    ----------
    segmentation : label map, int16, FreeSurfer numbers
    brain_mask : uint8
    uncertainty : float32, 0..1
    review_mask : uint8, where the uncertainty is above the threshold: look there first
    probabilities : float32 (X, Y, Z, C) in the order of the model's labels, or None
    volumes : one row a structure (see `morphometry.morphometry_table`)
    qc : quality measures (see `qc.session_metrics`)
    flags : what a person should know
    scan_weights : share of each scan given: 0 for one that was left out, the same for all others
    alignments : of the scans after the first
    """

    segmentation: nib.Nifti1Image
    brain_mask: nib.Nifti1Image
    uncertainty: nib.Nifti1Image
    review_mask: nib.Nifti1Image
    probabilities: nib.Nifti1Image | None
    volumes: pd.DataFrame
    qc: dict
    flags: tuple[Flag, ...]
    scan_weights: tuple[float, ...]
    alignments: tuple[Alignment, ...]


def align_scans(
    images: Sequence[nib.Nifti1Image],
    model: Callable[[], Model] | None = None,
    /,
    *,
    seed: int = 0,
    device: str = 'auto',
    threads: int = 1,
) -> list[Alignment]:
    """Alignment of each image after the first to the first.

    Parameters
    ----------
    model : gives the network that segments each scan alone where the images leave open whether
        they are of one brain; None to judge by the images only
    threads : scans that are aligned side by side; the result does not depend on it
    """
    if len(images) < 2:
        return []
    own = OwnSegmentations(images[0], model, device=device, threads=threads) if model else None

    def aligned(image: nib.Nifti1Image) -> Alignment:
        overlap = own and partial(own.agreement, image)
        return align(images[0], image, seed=seed, own_overlap=overlap)

    with ThreadPoolExecutor(max(1, min(threads, len(images) - 1))) as pool:
        return list(pool.map(aligned, images[1:]))


def segment_aligned(
    images: Sequence[nib.Nifti1Image],
    alignments: Sequence[Alignment],
    model: Model,
    /,
    *,
    device: str = 'auto',
    threads: int | None = None,
    keep_probabilities: bool = False,
    bias_correction: BiasCorrection = 'none',
    denoise: bool = False,
) -> Segmentation:
    """Segment the images that could be aligned, after `preprocess`."""
    matrices = [np.eye(4), *(a.matrix for a in alignments)]
    kept = used_scans(alignments)
    treat = partial(preprocess, bias_correction=bias_correction, denoise=denoise)
    scans = [
        (np.asanyarray(treat(image).dataobj), matrix @ image.affine)
        for image, matrix, keep in zip(images, matrices, kept, strict=True)
        if keep
    ]
    return segment(
        scans, model, device=device, threads=threads, keep_probabilities=keep_probabilities
    )


def alignment_flags(name: str, alignment: Alignment, /) -> list[Flag]:
    """The flag for a scan that could not be aligned, or only with doubt."""
    if alignment.mirrored:
        return [Flag('scans-mirrored', 'severe', f'{name} was not used. {alignment.reason}')]
    if alignment.status == 'refused':
        return [Flag('alignment-refused', 'warning', f'{name} was not used. {alignment.reason}')]
    if alignment.doubt:
        return [Flag('alignment-doubtful', 'warning', f'{name} was used. {alignment.doubt}')]
    return []


def scans_agreement(
    images: Sequence[nib.Nifti1Image],
    alignments: Sequence[Alignment],
    model: Model,
    /,
    *,
    device: str = 'auto',
    threads: int | None = None,
) -> dict[str, float]:
    """How well each scan's own segmentation agrees with the others' (see `qc_image`).

    Each scan is segmented once more, alone, which costs as much time again as there are scans.
    Those that could not be aligned take no part.

    Returns
    -------
    Mean Dice with the other scans by the scan's place in the list, from 1; empty with fewer than
    two scans.
    """
    matrices = [np.eye(4), *(a.matrix for a in alignments)]
    kept = used_scans(alignments)
    if sum(kept) < 2:
        return {}
    maps = {}
    for i, (image, matrix) in enumerate(zip(images, matrices, strict=True)):
        if not kept[i]:
            continue
        scan = [(np.asanyarray(image.dataobj), image.affine)]
        labels = segment(scan, model, device=device, threads=threads).labels
        to_voxel = np.linalg.inv(matrix @ image.affine) @ images[0].affine
        maps[str(i + 1)] = ndimage.affine_transform(
            labels, to_voxel, output_shape=images[0].shape, order=0, cval=-1
        )
    return scan_agreement(maps, model.labels)


class BabySegPipeline:
    """Segment scans from a script, without BIDS.

    Parameters
    ----------
    model : name of a shipped model, or path of a model file, the official checkpoint among them
    device : `auto`, `cpu`, `cuda[:N]` or `mps`
    uncertainty_threshold : voxels above it count as uncertain, 0..1
    threads : of the CPU; None for torch's own choice
    random_seed : fixes the alignment
    bias_correction, denoise : see `preprocessing.preprocess`

    Examples
    --------
    >>> pipeline = BabySegPipeline()                                    # doctest: +SKIP
    >>> result = pipeline.predict(['t1.nii.gz', 't2.nii.gz'])           # doctest: +SKIP
    >>> result.segmentation.to_filename('dseg.nii.gz')                  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path = 'default',
        device: str = 'auto',
        uncertainty_threshold: float = 0.3,
        *,
        threads: int | None = None,
        random_seed: int = 0,
        bias_correction: BiasCorrection = 'none',
        denoise: bool = False,
    ) -> None:
        self.model = load_model(model)
        self.device = device
        self.uncertainty_threshold = uncertainty_threshold
        self.threads = threads
        self.random_seed = random_seed
        self.bias_correction: BiasCorrection = bias_correction
        self.denoise = denoise

    def predict(
        self,
        scans: Sequence[ScanLike],
        *,
        affine: np.ndarray | None = None,
        keep_probabilities: bool = False,
        compare_scans: bool = False,
    ) -> Result:
        """Segment the scans of one child and session jointly.

        Parameters
        ----------
        scans : paths, nibabel images or arrays (X, Y, Z); the first is the reference
        affine : (4, 4), voxel to world in RAS mm; required for arrays, and shared by them
        compare_scans : also segment each scan alone, and flag a session whose scans disagree

        Raises
        ------
        InputError
            If a scan cannot be used.
        """
        if isinstance(scans, (str, Path, nib.Nifti1Image, np.ndarray)):
            scans = [scans]
        if not len(scans):
            raise InputError('There is no scan to segment; give at least one.')
        images = [_as_image(scan, affine) for scan in scans]
        headers = _header_of(scans[0], images[0])
        alignments = align_scans(
            images,
            lambda: self.model,
            seed=self.random_seed,
            device=self.device,
            threads=self.threads or 1,
        )
        result = segment_aligned(
            images,
            alignments,
            self.model,
            device=self.device,
            threads=self.threads,
            keep_probabilities=keep_probabilities,
            bias_correction=self.bias_correction,
            denoise=self.denoise,
        )
        volumes = morphometry_table(
            result.labels,
            images[0].affine,
            result.soft_volumes,
            result.confidence,
            self.model.labels,
        )
        agreement = None
        if compare_scans:
            agreement = scans_agreement(
                images, alignments, self.model, device=self.device, threads=self.threads
            )
        qc, flags = session_qc(
            result.labels,
            result.uncertainty,
            np.asanyarray(images[0].dataobj),
            images[0].affine,
            volumes,
            Age(),
            self.uncertainty_threshold,
            self.model.labels,
            agreement=agreement,
        )
        used = used_scans(alignments)
        doubts = [
            flag
            for i, a in enumerate(alignments, start=2)
            for flag in alignment_flags(f'Scan {i}', a)
        ]
        probabilities = None
        if result.probabilities is not None:
            probabilities = like_reference(result.probabilities, headers, dtype=np.float32)
        return Result(
            segmentation=like_reference(result.labels, headers, dtype=np.int16),
            brain_mask=like_reference(result.labels > 0, headers, dtype=np.uint8),
            uncertainty=like_reference(
                coarse_uncertainty(result.uncertainty), headers, dtype=np.float32
            ),
            review_mask=like_reference(
                result.uncertainty > self.uncertainty_threshold, headers, dtype=np.uint8
            ),
            probabilities=probabilities,
            volumes=volumes,
            qc=qc,
            flags=(*doubts, *flags),
            scan_weights=tuple(float(use) / sum(used) for use in used),
            alignments=tuple(alignments),
        )


def _as_image(scan: ScanLike, affine: np.ndarray | None) -> nib.Nifti1Image:
    if isinstance(scan, (str, Path)):
        return load_image(scan)
    if isinstance(scan, np.ndarray):
        if affine is None:
            raise InputError('An array has no position in space; give its affine, too.')
        scan = nib.Nifti1Image(scan.astype(np.float32), affine)
    data = np.nan_to_num(scan.get_fdata(dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(f'A scan has the shape {data.shape}; give 3-D images.')
    return nib.Nifti1Image(data, scan.affine)


def _header_of(scan: ScanLike, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The image whose header the results get: the file's own where there is one."""
    if isinstance(scan, (str, Path)):
        return nib.load(scan)
    return scan if isinstance(scan, nib.Nifti1Image) else image

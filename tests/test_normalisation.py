"""Standard spaces: the words for them, the cohort of an age, templates on disk, and the warp."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids import templates
from babyseg_bids.errors import AlignmentError, InputError
from babyseg_bids.labels import label_table
from babyseg_bids.normalisation import (
    Head,
    first_pose,
    mean_overlap,
    normalise,
    similarity_transform,
)
from babyseg_bids.records import Age
from babyseg_bids.rigid import rotation_matrix
from babyseg_bids.spaces import Space, choose_space, parse_space

SHAPE = (46, 52, 42)
AFFINE = np.array([[2.0, 0, 0, -46], [0, 2.0, 0, -52], [0, 0, 2.0, -42], [0, 0, 0, 1]])
# Label, centre and radii in mm on the left side of the template; `mirror` gives the other side.
STRUCTURES = (
    (3, (-14, 0, 3), (16, 35, 27)),
    (2, (-14, 0, 4), (12, 29, 22)),
    (8, (-11, -20, -20), (11, 10, 8)),
    (4, (-8, 0, 8), (4, 14, 5)),
    (10, (-7, -6, -3), (5, 8, 5)),
    (12, (-15, 4, -2), (5, 9, 6)),
)
GREY = {2: 0.8, 3: 0.5, 8: 0.6, 4: 0.2, 10: 0.65, 12: 0.55}
CHILD = rotation_matrix([10, -14, 20], np.zeros(3)) @ np.diag([0.85, 0.85, 0.85, 1])
CHILD[:3, 3] = [6, -8, 5]


def into_template(points: np.ndarray) -> np.ndarray:
    """Where points of the child (N, 3) lie in the template: a known, smooth map."""
    q = nib.affines.apply_affine(np.linalg.inv(CHILD), points)
    return q + 2 * np.sin(q[:, [1, 2, 0]] / 12)


def head(points: np.ndarray) -> Head:
    """A head whose voxels lie at `points` (N, 3) of the template."""
    labels, image = np.zeros(len(points), np.int16), np.zeros(len(points), np.float32)
    for number, centre, radii in STRUCTURES:
        for side in (1, -1):
            where = np.array(centre) * [side, 1, 1]
            inside = (((points - where) / radii) ** 2).sum(1) < 1
            inside &= (points[:, 0] * side < 0) if number in (2, 3) else True
            labels[inside] = number if side > 0 else label_table_mirror(number)
            image[inside] = GREY[number]
    noise = np.random.default_rng(0).normal(0, 0.02, len(points))
    image = np.where(labels > 0, image + noise, 0).astype(np.float32)
    return Head(image.reshape(SHAPE), labels.reshape(SHAPE), AFFINE)


def label_table_mirror(number: int) -> int:
    return next(row.mirror for row in label_table().rows if row.index == number)


GRID = nib.affines.apply_affine(AFFINE, np.indices(SHAPE).reshape(3, -1).T)


@pytest.fixture(scope='module')
def warped(tmp_path_factory: pytest.TempPathFactory):
    """A child, a template, and the former in the space of the latter."""
    child, template = head(into_template(GRID)), head(GRID)
    folder = tmp_path_factory.mktemp('space')
    return child, template, normalise(child, template, label_table(), folder)


def test_the_label_map_lies_on_the_template(warped) -> None:
    child, template, found = warped
    assert mean_overlap(child.labels, template.labels) < 0.5
    assert found.labels.shape == template.labels.shape
    assert set(np.unique(found.labels)) <= set(np.unique(child.labels))
    assert found.overlap == pytest.approx(mean_overlap(found.labels, template.labels))
    assert found.overlap > 0.85


@pytest.mark.parametrize('number', [4, 43, 10, 49, 12, 51])
def test_the_transforms_take_landmarks_both_ways(warped, number: int) -> None:
    import ants

    child, template, found = warped
    landmarks = {
        h: nib.affines.apply_affine(AFFINE, np.argwhere(labels == number).mean(0))
        for h, labels in (('child', child.labels), ('template', template.labels))
    }
    flip = np.array([-1, -1, 1])
    # ITK maps points of the image that is resampled onto to points of the one that is resampled.
    for file, source, target in (
        (found.forward, 'template', 'child'),
        (found.inverse, 'child', 'template'),
    ):
        transform = ants.read_transform(str(file))
        mapped = flip * ants.apply_ants_transform_to_point(transform, flip * landmarks[source])
        assert np.linalg.norm(mapped - landmarks[target]) < 2.0


def test_points_of_a_similarity_give_it_back() -> None:
    points = np.random.default_rng(0).normal(0, 40, (9, 3))
    found = similarity_transform(points, nib.affines.apply_affine(CHILD, points))
    np.testing.assert_allclose(found, CHILD, atol=1e-9)


def test_too_few_structures_in_common_are_refused() -> None:
    template = head(GRID)
    child = Head(template.image, np.where(template.labels == 3, 3, 0), AFFINE)
    with pytest.raises(AlignmentError):
        first_pose(child, template)


@pytest.mark.parametrize(
    ('text', 'months', 'expected'),
    [
        ('MNIInfant:cohort-auto', 0, 'MNIInfant+1'),
        ('MNIInfant:cohort-auto', 6, 'MNIInfant+3'),
        ('MNIInfant', 59, 'MNIInfant+11'),
        ('MNIInfant:cohort-3', None, 'MNIInfant+3'),
        ('MNIInfant:cohort-auto', 62, 'MNIInfant+11'),
        ('UNCInfant:cohort-auto', 0.5, 'UNCInfant+1'),
        ('UNCInfant', 12, 'UNCInfant+2'),
        ('UNCInfant', 8, 'UNCInfant+2'),
        ('MNI152NLin2009cAsym', None, 'MNI152NLin2009cAsym'),
        ('MNIInfant', None, None),
        ('MNIInfant', 90, None),
    ],
)
def test_the_cohort_follows_from_the_age(text, months, expected) -> None:
    space, note = choose_space(text, Age(months=months))
    assert (space and space.name) == expected
    outside = expected is None or (text, months) in (
        ('MNIInfant:cohort-auto', 62),
        ('UNCInfant', 8),
    )
    assert bool(note) == outside


@pytest.mark.parametrize(
    'text', ['MNI152', 'MNIInfant:cohort-12', 'MNIInfant:3', 'MNI152NLin2009cAsym:cohort-auto', '']
)
def test_what_is_no_space_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='--output-spaces'):
        parse_space(text)


def test_a_template_in_the_folder_is_found_and_the_finest_one_taken(tmp_path: Path) -> None:
    folder = tmp_path / 'tpl-MNIInfant' / 'cohort-3'
    folder.mkdir(parents=True)
    for name in ('res-1_T1w', 'res-2_T1w', 'res-1_desc-brain_T1w', 'res-1_T2w'):
        (folder / f'tpl-MNIInfant_cohort-3_{name}.nii.gz').write_bytes(b'x')
    space = Space('MNIInfant', 3)
    for contrast, expected in (('T2w', 'res-1_T2w'), ('T1w', 'res-1_T1w'), ('PDw', 'res-1_T1w')):
        found = templates.find_template(space, contrast, tmp_path)
        assert found.name == f'tpl-MNIInfant_cohort-3_{expected}.nii.gz'
    assert templates.is_on_disk(space, tmp_path)
    assert not templates.is_on_disk(Space('MNIInfant', 4), tmp_path)
    with pytest.raises(InputError, match='TEMPLATEFLOW_HOME'):
        templates.find_template(Space('MNIInfant', 4), 'T1w', tmp_path)

import json

import nibabel as nib
import numpy as np
import pytest
from report_phantoms import brain, morphometry, ras_affine, scan

from babyseg_bids.labels import label_table
from babyseg_bids.qc import (
    body_axes,
    bounding_box,
    check_sides,
    edge_areas,
    largest_component_shares,
    session_qc,
)
from babyseg_bids.qc_flags import LIMITS
from babyseg_bids.qc_image import contrast_to_noise, signal_to_noise
from babyseg_bids.records import Age
from babyseg_bids.surfaces import cortex_measures

AFFINE = ras_affine()


def examine(labels, affine=AFFINE, months=6.0, uncertainty=None, image=None, confidence=0.9):
    """Metrics and {code: flag} of a label map."""
    uncertainty = np.zeros(labels.shape, np.float32) if uncertainty is None else uncertainty
    image = scan(labels) if image is None else image
    morph = morphometry(labels, affine, confidence)
    metrics, flags = session_qc(labels, uncertainty, image, affine, morph, Age(months), 0.3)
    return metrics, {f.code: f for f in flags}


def swapped(labels, where):
    """The map with left and right exchanged at some voxels."""
    table = label_table()
    mirror = np.zeros(256, np.int16)
    for row in table.structures:
        mirror[row.index] = row.mirror
    return np.where(where, mirror[labels], labels).astype(np.int16)


def turned(labels, codes):
    """The same brain with its axes stored in another order and direction."""
    image = nib.Nifti1Image(labels, AFFINE)
    want = nib.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), want))
    return np.asarray(image.dataobj), image.affine


def test_a_sound_brain_raises_no_flag():
    metrics, flags = examine(brain())
    assert flags == {}
    assert metrics['left_right_axis'] > 0.99
    assert metrics['left_right_misplaced_share'] == 0
    assert metrics['edge_area_mm2'] == 0
    assert metrics['missing_structures'] == []


def test_metrics_are_json_without_nan():
    for labels in (brain(), np.zeros((5, 5, 5), np.int16)):
        metrics, _ = examine(labels)
        json.dumps(metrics, allow_nan=False)


def test_an_empty_map_is_a_severe_flag_and_nothing_else():
    _, flags = examine(np.zeros((6, 7, 8), np.int16))
    assert list(flags) == ['empty-segmentation']
    assert flags['empty-segmentation'].severity == 'severe'


@pytest.mark.parametrize('codes', ['LAS', 'RPI', 'SAR', 'PIL', 'ILA'])
def test_sides_are_told_in_the_world_however_the_file_stores_its_axes(codes):
    labels, affine = turned(brain(), codes)
    _, flags = examine(labels, affine)
    assert 'left-right-swapped' not in flags
    assert 'left-right-confused' not in flags


@pytest.mark.parametrize('codes', ['RAS', 'LAS', 'SPR'])
def test_a_brain_with_all_sides_exchanged_is_called_swapped(codes):
    labels, affine = turned(swapped(brain(), True), codes)
    metrics, flags = examine(labels, affine)
    assert metrics['left_right_axis'] < -0.99
    assert flags['left-right-swapped'].severity == 'severe'


def test_a_turned_head_is_not_a_swapped_one():
    angle = np.deg2rad(35)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    _, flags = examine(brain(), turn @ AFFINE)
    assert flags == {}


def test_a_brain_that_faces_backwards_is_told_from_a_mirrored_one():
    back = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE
    metrics, flags = examine(brain(), back)
    assert metrics['anterior_axis'] < -0.9
    assert metrics['handedness'] > 0.9
    assert 'backwards' in flags['unexpected-orientation'].message
    assert 'mirrored' not in flags
    # A network that sees the front but takes the sides from the header.
    metrics, flags = examine(swapped(brain(), True), back)
    assert metrics['left_right_axis'] > 0.9
    assert metrics['handedness'] < -0.9
    assert flags['mirrored'].severity == 'severe'


def test_a_brain_upside_down_is_flagged():
    metrics, flags = examine(brain(), np.diag([-1.0, 1.0, -1.0, 1.0]) @ AFFINE)
    assert metrics['superior_axis'] < -0.9
    assert 'upside down' in flags['unexpected-orientation'].message


def test_exchanged_sides_in_the_front_are_called_confused():
    labels = brain()
    front = np.arange(labels.shape[1]) > 40
    metrics, flags = examine(swapped(labels, front[None, :, None]))
    assert metrics['left_right_misplaced_share'] > 0.05
    assert flags['left-right-confused'].severity == 'severe'


def test_a_single_structure_on_the_wrong_side_is_named():
    labels = brain()
    metrics, flags = examine(swapped(labels, np.isin(labels, (12, 51))))
    assert set(metrics['left_right_misplaced_structures']) == {'Left-Putamen', 'Right-Putamen'}
    assert 'left putamen' in flags['left-right-confused'].message


def test_without_one_side_nothing_is_said_about_sides():
    labels = brain()
    right = [row.index for row in label_table().structures if row.hemisphere == 'R']
    check = check_sides(np.where(np.isin(labels, right), 0, labels), AFFINE, label_table())
    assert np.isnan(check.axis)
    assert np.isnan(check.misplaced)


def load_map(path):
    """A real label map in the numbers of the table, every second voxel to save time."""
    image = nib.load(path).slicer[::2, ::2, ::2]
    table = label_table()
    return table.indices[table.channels(np.asarray(image.dataobj))], image.affine


@pytest.mark.needs_shared('data/label-maps/infant')
def test_real_maps_with_sound_sides_pass(shared):
    paths = sorted((shared / 'data/label-maps/infant').glob('*.nii.gz'))
    assert paths
    for path in paths:
        labels, affine = load_map(path)
        check = check_sides(labels, affine, label_table())
        assert check.axis > 0.95, path.name
        assert check.misplaced < LIMITS['left_right_misplaced_share'].warning, path.name
        assert check.structures == (), path.name
        axes = body_axes(labels, affine, label_table())
        assert min(axes.values()) > 0.9, path.name


@pytest.mark.needs_shared('data/label-maps/faulty')
def test_a_real_map_with_confused_sides_is_a_severe_flag(shared):
    (path,) = (shared / 'data/label-maps/faulty').glob('*.nii.gz')
    labels, affine = load_map(path)
    metrics, flags = examine(labels, affine, months=1.0)
    assert metrics['left_right_misplaced_share'] > 0.1
    assert flags['left-right-confused'].severity == 'severe'


def test_a_brain_at_the_edge_of_the_image_is_called_cut_off_at_that_side():
    labels, affine = turned(brain()[:, :, 12:], 'ILA')
    metrics, flags = examine(labels, affine)
    assert metrics['edge_area_mm2_by_face']['inferior'] > 1000
    assert flags['brain-cut-off'].severity == 'severe'
    assert 'inferior' in flags['brain-cut-off'].message
    assert 'superior' not in flags['brain-cut-off'].message


def test_the_area_in_a_face_is_in_square_millimetres():
    labels = np.zeros((5, 6, 7), np.int16)
    labels[0, 1:3, 1:4] = 3
    areas = edge_areas(labels, np.diag([-1.0, 2.0, 3.0, 1.0]))
    assert areas['right'] == pytest.approx(6 * 2 * 3)
    assert sum(areas.values()) == areas['right']


def test_a_structure_in_pieces_is_named():
    labels = brain()
    labels[2:8, 2:8, 2:8] = 49
    _, flags = examine(labels)
    assert 'right thalamus' in flags['fragmented'].message


def test_the_largest_piece_counts_diagonal_neighbours_as_one():
    labels = np.zeros((8, 8, 8), np.int16)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = labels[6, 6, 6] = 10
    assert largest_component_shares(labels, label_table()) == {'L-THA': 0.75}


def test_a_cerebrum_alone_gets_a_remark_and_no_warning():
    labels = brain()
    labels[np.isin(labels, (8, 47, 15, 16))] = 0
    _, flags = examine(labels)
    assert list(flags) == ['structures-not-in-scan']
    assert flags['structures-not-in-scan'].severity == 'info'


def test_a_missing_thalamus_or_half_a_cerebellum_is_a_warning():
    labels = brain()
    labels[np.isin(labels, (10, 8))] = 0
    metrics, flags = examine(labels)
    assert metrics['missing_structures'] == ['Left-Cerebellum', 'Left-Thalamus']
    assert flags['structures-missing'].severity == 'warning'
    assert 'left cerebellum and left thalamus' in flags['structures-missing'].message


def test_a_volume_that_no_child_has_points_at_the_voxel_size():
    _, flags = examine(brain(), ras_affine(0.5))
    assert flags['implausible-volume'].severity == 'severe'


def test_the_plausible_volume_depends_on_age():
    affine = ras_affine(2.0)
    volume = examine(brain(), affine)[0]['segmented_brain_volume_mm3'] / 1000
    assert 180 < volume < 400
    assert 'implausible-volume' not in examine(brain(), affine, months=1.0)[1]
    assert 'implausible-volume' in examine(brain(), affine, months=30.0)[1]


def test_an_unequal_pair_is_flagged_with_the_larger_side():
    labels = brain()
    labels[labels == 51] = 41
    labels[35, 30, 22] = 51
    metrics, flags = examine(labels, ras_affine(2.5))
    assert metrics['most_asymmetric_structure'] == 'Putamen'
    assert metrics['structure_asymmetry_percent'] > 100
    assert 'left putamen' in flags['structure-asymmetric'].message


def test_noise_lowers_signal_to_noise_as_the_formula_says():
    rng = np.random.default_rng(3)
    values = rng.normal(100, 5, 20_000)
    assert signal_to_noise(values) == pytest.approx(20, rel=0.03)
    assert contrast_to_noise(values, values + 5 * np.sqrt(2)) == pytest.approx(1, rel=0.03)
    assert np.isnan(signal_to_noise(values[:5]))
    assert np.isnan(signal_to_noise(np.ones(100)))


def test_a_noisy_scan_is_flagged():
    _, flags = examine(brain(), image=scan(brain(), noise=80))
    assert flags['low-signal-to-noise'].severity == 'severe'


@pytest.mark.parametrize(('months', 'severity'), [(6.0, 'info'), (24.0, 'warning')])
def test_missing_contrast_is_normal_at_the_isointense_age_only(months, severity):
    labels = brain()
    image = np.where(labels > 0, 100, 0) + scan(labels) / 40
    _, flags = examine(labels, ras_affine(2.6), months=months, image=image)
    image = image + np.random.default_rng(0).normal(0, 8, image.shape)
    _, flags = examine(labels, ras_affine(2.6), months=months, image=image)
    assert flags['low-contrast'].severity == severity


def test_the_share_of_uncertain_voxels_is_counted_inside_the_brain():
    labels = brain()
    uncertainty = np.where(labels == 3, 0.6, 0.1).astype(np.float32)
    uncertainty[labels == 0] = 0.9
    metrics, flags = examine(labels, uncertainty=uncertainty)
    expected = (labels == 3).sum() / (labels > 0).sum()
    assert metrics['uncertain_share'] == pytest.approx(expected)
    assert metrics['uncertain_share_by_structure']['L-CTX'] == 1
    assert metrics['uncertain_share_by_structure']['R-CTX'] == 0
    assert ('uncertain' in flags) == (expected > LIMITS['uncertain_share'].warning)


def rounded(metrics):
    return json.loads(json.dumps(metrics), parse_float=lambda text: f'{float(text):.6g}')


def test_a_grid_far_finer_than_the_scan_is_measured_as_the_scan_it_came_from():
    labels = brain()[::2, ::2, ::2]
    image = scan(labels)
    zooms = np.diag([0.6, 0.6, 0.6, 1.0])
    morph = morphometry(labels, zooms, 0.9)

    def measured(factor):
        def fine(x):
            return np.kron(x, np.ones((factor,) * 3, x.dtype))

        affine = np.diag([0.6 / factor] * 3 + [1.0])
        doubt = np.zeros(labels.shape, np.float32)
        arrays = [fine(x) for x in (labels, doubt, image)]
        return session_qc(*arrays, affine, morph, Age(6.0))[0], cortex_measures(arrays[0], affine)

    (coarse, surfaces), (fine, fine_surfaces) = measured(1), measured(3)
    sizes = {'voxel_volume_mm3': 0.2**3, 'voxel_min_mm': 0.2, 'voxel_max_mm': 0.2}
    assert rounded(fine) == rounded({**coarse, **sizes})
    assert fine_surfaces == surfaces


def test_low_confidence_is_flagged():
    metrics, flags = examine(brain(), confidence=0.5)
    assert metrics['mean_confidence'] == pytest.approx(0.5)
    assert flags['low-confidence'].severity == 'severe'


def test_a_box_with_a_margin_stays_in_the_image():
    mask = np.zeros((5, 6), bool)
    mask[1, 4:] = True
    assert bounding_box(mask) == (slice(1, 2), slice(4, 6))
    assert bounding_box(mask, margin=2) == (slice(0, 4), slice(2, 6))

import numpy as np
import pytest
from report_phantoms import brain, morphometry, ras_affine

from babyseg_bids.labels import label_table
from babyseg_bids.morphometry import (
    COLUMNS,
    asymmetry_index,
    asymmetry_table,
    brain_volume,
    morph_sidecar,
    morphometry_table,
    read_morph_tsv,
    tissue_totals,
    voxel_volume,
    write_morph_tsv,
)


def cube():
    """A map with 8 voxels of left and 4 of right thalamus."""
    labels = np.zeros((6, 6, 6), np.int16)
    labels[:2, :2, :2] = 10
    labels[4:, :2, :1] = 49
    return labels


def measure(labels, affine=None, soft=None):
    affine = np.diag([2.0, 1.0, 0.5, 1.0]) if affine is None else affine
    return morphometry_table(labels, affine, soft or {10: 9.0, 49: 3.0}, {10: 0.8, 49: 0.6})


def test_all_structures_come_in_the_order_of_the_label_table():
    morph = measure(cube())
    assert list(morph.columns) == list(COLUMNS)
    assert list(morph['index']) == [row.index for row in label_table().structures]
    assert len(morph) == 27


def test_volumes_are_the_soft_sum_and_the_voxels_times_their_size():
    morph = measure(cube()).set_index('index')
    assert morph.loc[10, 'volume-mm3'] == 9
    assert morph.loc[10, 'voxel-volume-mm3'] == 8
    assert morph.loc[49, 'voxel-volume-mm3'] == 4
    assert morph.loc[10, 'mean-confidence'] == 0.8
    soft, hard = morph.loc[10, ['volume-mm3', 'voxel-volume-mm3']]
    assert morph.loc[10, 'predicted-dice'] == pytest.approx(2 * 0.8 * hard / (hard + soft))
    assert morph.loc[10, 'fraction-of-brain'] == pytest.approx(0.75)


def test_a_structure_without_a_voxel_is_absent_even_with_stray_probability():
    morph = measure(cube(), soft={10: 9.0, 49: 3.0, 17: 0.02}).set_index('index')
    assert morph.loc[17, ['volume-mm3', 'voxel-volume-mm3', 'mean-confidence']].isna().all()
    assert morph['fraction-of-brain'].sum() == pytest.approx(1)


def test_an_empty_map_gives_a_table_without_values():
    morph = measure(np.zeros((4, 4, 4), np.int16))
    assert len(morph) == 27
    assert morph[['volume-mm3', 'fraction-of-brain']].isna().all(axis=None)
    assert np.isnan(brain_volume(morph))


def test_numbers_that_the_table_lacks_are_ignored():
    labels = cube()
    labels[5, 5, 5] = 2035
    labels[5, 5, 4] = -1
    labels[5, 5, 3] = 24
    assert measure(labels).equals(measure(cube()))


def test_the_voxel_volume_does_not_depend_on_orientation():
    turned = np.array([[0, -2.0, 0, 5], [1.0, 0, 0, 6], [0, 0, 0.5, 7], [0, 0, 0, 1]])
    assert voxel_volume(turned) == pytest.approx(1)


def test_a_file_is_read_back_with_missing_values_as_n_a(tmp_path):
    path = tmp_path / 'morph.tsv'
    write_morph_tsv(measure(cube()), path)
    lines = path.read_text().splitlines()
    assert lines[0] == '\t'.join(COLUMNS)
    assert lines[1].startswith('2\tLeft-Cerebral-White-Matter\tL-WM\tL\tn/a\tn/a')
    assert 'nan' not in path.read_text().lower()
    again = read_morph_tsv(path).set_index('index')
    assert again.loc[10, 'volume-mm3'] == 9
    assert np.isnan(again.loc[2, 'volume-mm3'])
    assert again.loc[14, 'hemisphere'] == 'midline'


def test_the_sidecar_explains_every_column_and_calls_nothing_intracranial_but_to_deny_it():
    sidecar = morph_sidecar()
    assert list(sidecar) == list(COLUMNS)
    assert all(column['Description'] for column in sidecar.values())
    assert sidecar['volume-mm3']['Units'] == 'mm^3'
    assert 'eTIV' not in str(sidecar)


def test_tissue_totals_add_up_to_the_brain():
    morph = morphometry(brain(), ras_affine())
    totals = tissue_totals(morph)
    assert totals['volume-mm3'].sum() == pytest.approx(brain_volume(morph))
    assert totals['fraction-of-brain'].sum() == pytest.approx(1)
    assert set(totals['tissue']) == {row.tissue for row in label_table().structures}


def test_a_tissue_that_is_absent_has_no_total():
    totals = tissue_totals(measure(cube())).set_index('tissue')
    assert np.isnan(totals.loc['cortex', 'volume-mm3'])
    assert totals.loc['deep-grey', 'volume-mm3'] == 12


@pytest.mark.parametrize(
    ('left', 'right', 'percent'), [(110, 90, 20), (90, 110, -20), (5, 5, 0), (3, 1, 100)]
)
def test_asymmetry_is_the_difference_over_the_mean_in_percent(left, right, percent):
    assert asymmetry_index(left, right) == pytest.approx(percent)


def test_asymmetry_of_a_missing_side_is_unknown():
    pairs = asymmetry_table(measure(cube())).set_index('structure')
    assert pairs.loc['Thalamus', 'asymmetry-percent'] == pytest.approx(100)
    assert np.isnan(pairs.loc['Caudate', 'asymmetry-percent'])
    assert len(pairs) == 12

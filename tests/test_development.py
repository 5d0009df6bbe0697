import base64
import io
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from report_phantoms import brain, ras_affine
from scipy.spatial.transform import Rotation

from babyseg_bids import calculate_developmental_metrics, generate_development_report
from babyseg_bids.errors import InputError, OutputError
from babyseg_bids.longitudinal import CURVE_SESSIONS, fit_growth_curve
from babyseg_bids.reports.published import beside_published, published_growth
from babyseg_bids.reports.side_by_side import aligned_pictures, rigid_between, upright


@pytest.fixture(scope='module')
def metrics():
    """A child whose brain is 10 % longer each way in the second session."""
    maps = {
        'ses-B': nib.Nifti1Image(brain(), ras_affine(2.75)),
        'ses-A': nib.Nifti1Image(brain(), ras_affine(2.5)),
    }
    return calculate_developmental_metrics(maps, {'ses-A': 3.0, 'ses-B': 9.0})


def test_sessions_are_ordered_by_age_and_every_column_has_a_unit(metrics):
    assert list(metrics.sessions.index) == ['ses-A', 'ses-B']
    assert set(metrics.units) == {*metrics.sessions.columns, *metrics.growth.columns}
    assert metrics.units['Mean cortical thickness'] == 'mm'
    assert metrics.units['change-percent-per-month'] == 'percent/month'


def test_a_larger_brain_grows_in_volume_area_and_thickness_but_not_in_ratios(metrics):
    ratio = metrics.sessions.loc['ses-B'] / metrics.sessions.loc['ses-A']
    assert ratio['Segmented brain'] == pytest.approx(1.1**3)
    assert ratio['Cortical surface area'] == pytest.approx(1.1**2)
    assert ratio['Mean cortical thickness'] == pytest.approx(1.1)
    assert ratio['White/grey ratio'] == pytest.approx(1)
    assert ratio['Ventricle ratio'] == pytest.approx(1)
    brain_growth = metrics.growth.set_index('structure').loc['Segmented brain']
    assert brain_growth['change-percent-per-month'] == pytest.approx(100 * (1.1**3 - 1) / 6)
    assert metrics.flags == ()


def test_a_brain_that_shrinks_is_flagged():
    maps = {'ses-A': nib.Nifti1Image(brain(), ras_affine(2.5))}
    maps['ses-B'] = nib.Nifti1Image(brain(), ras_affine(2.3))
    found = calculate_developmental_metrics(maps, {'ses-A': 3, 'ses-B': 9}, surfaces=False)
    assert {f.code for f in found.flags} == {'shrinks-with-age'}
    assert 'Mean cortical thickness' not in found.sessions


@pytest.mark.parametrize(
    ('maps', 'message'),
    [({}, 'no label map'), ({'ses-A': 'nowhere.nii.gz'}, 'nowhere.nii.gz of ses-A')],
    ids=['none', 'unreadable'],
)
def test_maps_that_cannot_be_used_are_named(maps, message):
    with pytest.raises(InputError, match=message):
        calculate_developmental_metrics(maps, {})


def test_the_report_shows_both_sessions_side_by_side_and_hostile_titles_as_text(metrics, tmp_path):
    page = generate_development_report(metrics, tmp_path / 'x.html', title='<b>').read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert '&lt;b&gt;' in page
    assert 'Gyrification index' in page
    assert 'class="curve"' not in page
    assert 'No reference is drawn' in page
    with pytest.raises(OutputError, match='no page'):
        generate_development_report(metrics, tmp_path / 'x.txt')


def test_the_cohort_curve_is_drawn_and_named_as_such(metrics, tmp_path):
    months = np.linspace(1, 24, 12)
    curve = fit_growth_curve(months, 200_000 + 90_000 * np.log1p(months))
    path = tmp_path / 'x.html'
    curves = {'Segmented brain': curve}
    page = generate_development_report(metrics, path, curves=curves).read_text()
    assert page.count('class="curve"') == 1
    assert "cohort's own fitted curve (12 sessions)" in ' '.join(page.split()).replace(
        '&#39;', "'"
    )


def test_outliers_do_not_bend_the_curve_and_it_does_not_reach_beyond_its_ages():
    rng = np.random.default_rng(2)
    months = rng.uniform(0, 36, 200)
    truth = 300 + 150 * np.log1p(months)
    values = truth + rng.normal(0, 10, 200)
    values[:20] = 50
    curve = fit_growth_curve([*months, 5, np.nan], [*values, np.nan, 400])
    assert curve.sessions == 200
    assert np.abs(curve.at(months) - truth).max() < 12
    assert curve.spread == pytest.approx(10, rel=0.35)
    assert np.isnan(curve.at([40.0])).all()


def test_too_few_sessions_or_ages_give_no_curve():
    assert fit_growth_curve(range(CURVE_SESSIONS - 1), range(CURVE_SESSIONS - 1)) is None
    assert fit_growth_curve([1, 2, 3] * 5, range(15)) is None


def test_points_are_turned_back_onto_each_other_without_mirroring():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(8, 3)) * 30
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    found = rigid_between(points, points @ turn.T + [1, 2, 3])
    assert found[:3, :3] == pytest.approx(turn)
    assert found[:3, 3] == pytest.approx([1, 2, 3])
    mirrored = rigid_between(points, points * [-1, 1, 1])
    assert np.linalg.det(mirrored[:3, :3]) == pytest.approx(1)


def test_a_head_stands_upright_whatever_its_header_says():
    rng = np.random.default_rng(0)
    # Thalamus, caudate, accumbens, amygdala, hippocampus, ventricle and ventral DC of both sides.
    left = {10: (8, -10, 5), 11: (10, 12, 8), 26: (8, 12, -5), 18: (20, 0, -15)}
    left |= {17: (22, -15, -12), 4: (10, 0, 18), 28: (8, -8, -5)}
    right = {10: 49, 11: 50, 26: 58, 18: 54, 17: 53, 4: 43, 28: 60}
    centres = {n: np.array(p, float) * (-1, 1, 1) for n, p in left.items()}
    centres |= {right[n]: np.array(p, float) for n, p in left.items()}
    assert np.array_equal(upright(centres), np.eye(3))
    oblique = Rotation.from_rotvec(rng.normal(0, 0.1, 3)).as_matrix()
    backwards = np.diag([-1.0, -1.0, 1.0])
    turned = {n: backwards @ oblique @ p for n, p in centres.items()}
    assert np.array_equal(upright(turned), backwards)
    assert np.array_equal(upright({}), np.eye(3))


def test_a_small_and_a_large_head_are_shown_whole_and_at_one_scale():
    maps = [(brain(), ras_affine(2.5)), (brain(), ras_affine(3.0))]
    widths = []
    for address in aligned_pictures(maps):
        picture = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(address.split(',')[1]))).convert('L')
        )
        assert not picture[0].any()
        assert not picture[:, 0].any()
        assert not picture[:, -1].any()
        widths.append(np.ptp(np.flatnonzero(picture.any(1))))
    assert widths[1] / widths[0] == pytest.approx(1.2, abs=0.03)


def test_a_thickness_that_no_cortex_has_is_said_to_be_unusable(metrics, tmp_path):
    thick = replace(metrics, sessions=metrics.sessions.copy())
    thick.sessions.loc['ses-A', 'Mean cortical thickness'] = 8.0
    thick.sessions.loc['ses-B', 'Mean cortical thickness'] = 3.0
    page = generate_development_report(thick, tmp_path / 'x.html').read_text()
    assert 'Do not use area, thickness and gyrification of ses-A:' in page


def test_published_growth_stands_beside_a_childs_own_over_the_same_ages_only():
    for growth in published_growth():
        assert growth.url.startswith('https://')
        assert growth.months[0] < growth.months[1]
    rows = [{'Segmented brain': 400.0}, {'Segmented brain': 800.0}, {'Segmented brain': 900.0}]
    found = {(r['measure'], r['span']): r for r in beside_published([1.0, 12.0, 18.0], rows)}
    first = found['Total brain', '0.7 to 12 months']
    assert (first['percent'], first['own'], first['children']) == ('+101', '+100', '98')
    assert found['Total brain', '12 to 24 months']['own'] == 'no sessions at both ages'
    assert found['Cerebellum', '0.7 to 12 months']['own'] == 'no sessions at both ages'
    assert beside_published([30.0, 40.0, None], rows) == []
    assert beside_published([6.0, 6.0, None], rows) == []

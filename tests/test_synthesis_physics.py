"""Artefacts, operators and contrasts: each does to an image what its name says."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from synthesis_phantoms import TABLE

from babyseg_bids.synthesis import acquisition, contrast, kspace, operators, relaxation
from babyseg_bids.synthesis.deformation import smooth_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.settings import AcquisitionSettings, ContrastSettings

PLAIN = ContrastSettings(split_probability=0.0, texture=0.0, noise_in_class=0.0)


def width(profile):
    """Standard deviation of a row of positive numbers, samples."""
    at = torch.arange(len(profile), dtype=profile.dtype)
    mean = (profile * at).sum() / profile.sum()
    return float(((profile * (at - mean) ** 2).sum() / profile.sum()).sqrt())


def disc(n=64):
    axes = torch.meshgrid(*[torch.arange(n) - (n - 1) / 2] * 2, indexing='ij')
    return ((axes[0] ** 2 + 2 * (axes[1] - 6) ** 2) < 300).float()


# Operators.


@pytest.mark.parametrize('sd', [0.3, 1.0, 2.5])
def test_a_blur_has_the_asked_for_width_and_keeps_the_sum(sd):
    row = operators.gaussian(61, sd)[:, 30]
    assert row.sum() == pytest.approx(1)
    assert width(row) == pytest.approx(sd, rel=0.01)


@pytest.mark.parametrize(
    'matrix',
    [
        operators.gaussian(20, 3.0),
        operators.slices(20, 6, share=0.6),
        operators.linear(9, torch.tensor([-1.0, 0.3, 8.7, 12.0])),
        operators.bspline(5, 33),
        operators.truncation(20, 0.5),
        operators.ghost(20, 0.2, 3),
    ],
    ids=['gaussian', 'slices', 'linear', 'bspline', 'truncation', 'ghost'],
)
def test_a_constant_stays_constant(matrix):
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=matrix.dtype))


def test_operators_act_on_their_own_axis_in_any_order():
    x = torch.rand(2, 9, 8, 7, dtype=torch.float64)
    a, b, c = torch.rand(4, 9).double(), torch.rand(20, 8).double(), torch.rand(7, 7).double()
    expected = torch.einsum('pi,qj,rk,bijk->bpqr', a, b, c, x)
    torch.testing.assert_close(operators.apply(x, [a, b, c]), expected)
    torch.testing.assert_close(operators.apply(x, [None, b, None]).shape, (2, 9, 20, 7))


def test_slices_average_what_they_excite():
    x = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(operators.slices(12, 4) @ x, torch.tensor([1.0, 4, 7, 10]).double())
    matrix = operators.slices(12, 3, share=0.5)
    assert (matrix[0] > 0).nonzero()[:, 0].tolist() == [1, 2]


def test_linear_interpolation_reads_between_samples_and_extends_edges():
    x = torch.tensor([0.0, 1, 4]).double()
    at = torch.tensor([-2.0, 0.5, 1.25, 5.0])
    torch.testing.assert_close(
        operators.linear(3, at) @ x, torch.tensor([0, 0.5, 1.75, 4]).double()
    )


def test_truncation_removes_what_is_above_its_frequency():
    at = torch.arange(64, dtype=torch.float64)
    slow, fast = (torch.cos(2 * torch.pi * f * at / 64) for f in (4, 28))
    matrix = operators.truncation(64, 0.5)
    torch.testing.assert_close(matrix @ slow, slow)
    assert (matrix @ fast).abs().max() < 1e-9
    edge = (at > 32).double()
    assert (matrix @ edge).max() > 1.05


def test_ghosts_lie_at_equal_parts_of_the_field_of_view():
    x = torch.zeros(40, dtype=torch.float64)
    x[5] = 1
    y = operators.ghost(40, 0.2, 2) @ x
    assert y[5] == pytest.approx(0.8) and y[25] == pytest.approx(0.2)


def test_what_lies_outside_the_field_of_view_wraps_into_it():
    x = torch.arange(10, dtype=torch.float64)
    y = operators.wrap(10, 8, 1) @ x
    assert y.tolist() == [0, 1 + 9, 2, 3, 4, 5, 6, 7, 8 + 0, 0]


def test_smooth_fields_have_unit_variance_and_their_own_scale():
    draws = Draws(0)
    coarse, fine = (
        torch.stack([smooth_field((40, 48), points=p, draws=draws)[0] for _ in range(200)])
        for p in (4, 20)
    )
    assert coarse.var() == pytest.approx(1, abs=0.15) and fine.var() == pytest.approx(1, abs=0.1)
    assert coarse.diff(dim=1).abs().mean() < 0.4 * fine.diff(dim=1).abs().mean()


# k-space.


def test_a_child_at_rest_has_no_motion_artefact():
    x = disc()
    y = kspace.motion(x, moves=3, shift=0, rotation_deg=0, draws=Draws(1))
    torch.testing.assert_close(y, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize('shape', [(48, 40), (20, 24, 22)])
def test_motion_is_that_of_the_whole_fourier_transform(shape):
    """Lines of k-space taken from moved images one by one give the same picture."""
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(ndimage.gaussian_filter(torch.rand(shape, generator=generator), 2.0))
    draws = Draws(4)
    y = kspace.motion(x, moves=2, shift=3, rotation_deg=8, draws=draws)
    axis, times = draws.log['motion axis'], draws.log['motion times']
    n = shape[axis]
    segment = np.fft.ifftshift(np.searchsorted(np.sort(times), np.arange(n), side='right'))
    rest = np.fft.fftshift(segment)[n // 2]
    total = torch.zeros(shape, dtype=torch.complex64)
    for s in range(3):
        pose = draws.log[f'position {s}']
        moved = x if s == rest else kspace.rigid(x, pose['rotation'], pose['shift'])
        lines = torch.from_numpy(segment == s).view(
            [-1 if a == axis else 1 for a in range(len(shape))]
        )
        total += torch.fft.fftn(moved) * lines
    torch.testing.assert_close(torch.fft.ifftn(total).abs(), y, atol=2e-3, rtol=0)
    assert (y - x).abs().max() > 0.01


@pytest.mark.parametrize('dim', [2, 3])
def test_rigid_moves_turn_and_shift_the_content_forwards(dim):
    x = torch.zeros((21,) * dim)
    x[(10, 16, *[10] * (dim - 2))] = 1
    moved = kspace.rigid(x, np.zeros(1 if dim == 2 else 3), np.array([3.0, -2.0, 0][:dim]))
    assert moved[(13, 14, *[10] * (dim - 2))] == pytest.approx(1, abs=1e-5)
    # The last of three angles turns in the plane of the first two axes.
    turned = kspace.rigid(x, np.array([90.0] if dim == 2 else [0, 0, 90.0]), np.zeros(dim))
    assert turned[(4, 10, *[10] * (dim - 2))] == pytest.approx(1, abs=1e-4)


def test_labels_and_masks_move_with_their_image():
    image = disc()
    angles, offset = np.array([12.0]), np.array([4.0, -3.0])
    moved = kspace.rigid(image, angles, offset)
    labels, mask = kspace.rigid_labels([image.int() * 7, image > 0], angles, offset)
    assert set(labels.unique().tolist()) == {0, 7}
    assert torch.equal(labels == 7, mask)
    inside = ndimage.binary_erosion(mask.numpy(), iterations=2)
    assert (moved.numpy()[inside] > 0.99).all()
    assert (moved[~torch.from_numpy(ndimage.binary_dilation(mask, iterations=2))] < 0.01).all()


def test_a_spike_adds_one_wave():
    draws = Draws(2)
    y = kspace.spikes(torch.ones(40, 40), amplitude=0.1, draws=draws)
    f = draws.log['spike']
    at = torch.arange(40.0)
    phase = 2 * torch.pi * (f[0] * at[:, None] + f[1] * at[None])
    torch.testing.assert_close(y, 1 + 0.1 * torch.cos(phase), atol=2e-3, rtol=0)


def test_a_zipper_touches_few_planes():
    x = torch.rand(30, 30)
    draws = Draws(3)
    changed = kspace.zipper(x, strength=0.3, draws=draws) != x
    lines = changed.all(1 - draws.log['zipper axis'])
    assert 1 <= int(lines.sum()) <= 3 and int(changed.sum()) == 30 * int(lines.sum())


# Acquisition.


def test_noise_has_the_asked_for_deviation():
    y = acquisition.rician(torch.zeros(300, 300), sd=0.1, draws=Draws(0))
    assert y.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.02)
    bright = acquisition.rician(torch.full((300, 300), 5.0), sd=0.1, draws=Draws(1))
    assert bright.std() == pytest.approx(0.1, rel=0.02)


def test_the_acquisition_has_the_asked_for_resolution():
    base = AcquisitionSettings(
        blur_fwhm=(5.0, 5.0), slices_probability=0.0, resolution_probability=0.0,
        gibbs_probability=0.0, ghost_probability=0.0, wrap_probability=0.0,
    )  # fmt: skip
    draws = Draws(0)
    there, back, view = acquisition.axis_operators(
        torch.Size((80, 80)), base, spacing=0.5, draws=draws
    )
    assert view is None and back == [None, None]
    for matrix, factor in zip(there, draws.log['blur by axis'], strict=True):
        expected = np.hypot(5.0 * factor / 2.3548 / 0.5, acquisition.VOXEL_SD)
        assert width(matrix[:, 40]) == pytest.approx(expected, rel=0.02)


def test_borders_are_mixed_even_without_a_blur():
    sharp = AcquisitionSettings(
        blur_fwhm=(0.0, 0.0), slices_probability=0.0, resolution_probability=0.0,
        gibbs_probability=0.0, ghost_probability=0.0, wrap_probability=0.0,
    )  # fmt: skip
    there, _, _ = acquisition.axis_operators(
        torch.Size((20, 20)), sharp, spacing=1.0, draws=Draws(0)
    )
    assert width(there[0][:, 10]) == pytest.approx(12**-0.5, rel=0.01)


def test_thick_slices_have_the_asked_for_distance():
    settings = AcquisitionSettings(
        slices_probability=1.0, slices=(4.0, 4.0), resolution_probability=0.0
    )
    draws = Draws(0)
    there, back, _ = acquisition.axis_operators(
        torch.Size((40, 40)), settings, spacing=1.0, draws=draws
    )
    axis = draws.log['slice axis']
    assert len(there[axis]) == 10 and back[axis].shape == (40, 10)
    assert len(there[1 - axis]) == 40 and back[1 - axis] is None


def test_the_curve_keeps_order_and_range_without_a_bend():
    plain = AcquisitionSettings(clip_probability=0, remap_probability=0, quantise_probability=0)
    x = torch.rand(50, 50) * 3 + 1
    y = acquisition.intensity_curve(x, plain, draws=Draws(5))
    order = x.flatten().argsort()
    assert (y.flatten()[order].diff() >= 0).all()
    assert y.min() == 0 and y.max() == 1
    few = AcquisitionSettings(quantise_probability=1.0, quantise=(8, 8), remap_probability=0)
    assert len(acquisition.intensity_curve(x, few, draws=Draws(5)).unique()) <= 8


def test_a_bias_field_is_positive_and_smooth():
    x = torch.ones(40, 40)
    y = acquisition.bias_field(x, sd=0.3, draws=Draws(0))
    assert (y > 0).all() and y.diff(dim=0).abs().max() < 0.15
    assert torch.equal(acquisition.bias_field(x, sd=0.0, draws=Draws(0)), x)


# Contrast.


def test_a_mixture_has_the_means_and_deviations_that_were_drawn():
    classes = torch.arange(3, dtype=torch.int32).repeat_interleave(40_000).view(3, 200, 200)
    means = np.array([0.1, 0.5, 0.9])
    settings = ContrastSettings(split_probability=0.0, texture=0.0, noise_in_class=0.05)
    draws = Draws(0)
    image = contrast.render(classes, contrast.Contrast(means), settings=settings, draws=draws)
    np.testing.assert_allclose(image.mean((1, 2)), means, atol=0.002)
    again = Draws(0)
    again.chance('split', 0.0)
    np.testing.assert_allclose(image.std((1, 2)), 0.05 * again.table(3), rtol=0.03)


def test_a_split_gives_a_structure_two_intensities():
    classes = torch.ones((60, 60), dtype=torch.int32)
    settings = ContrastSettings(
        split_probability=1.0, split_sd=0.3, texture=0.0, noise_in_class=0.0
    )
    counts = [
        len(
            contrast.render(
                classes, contrast.Contrast(np.full(2, 0.5)), settings=settings, draws=Draws(s)
            ).unique()
        )
        for s in range(12)
    ]
    assert set(counts) == {1, 2}


@pytest.mark.parametrize('weighting', contrast.WEIGHTINGS)
def test_weightings_order_the_tissues_as_named(weighting):
    draws = np.mean(
        [contrast.tissue_means(TABLE, weighting=weighting, draws=Draws(s)) for s in range(40)], 0
    )
    white, grey, fluid = (draws[TABLE.of(n)[0]] for n in (2, 3, 4))
    if weighting == 'adult T1':
        assert white > grey > fluid
    elif weighting.endswith('T2'):
        assert fluid > grey and fluid > white
        assert (white > grey) == (weighting == 'newborn T2')
    else:
        assert fluid < min(white, grey)


def test_sides_have_the_same_intensity_most_of_the_time():
    same = [
        m[TABLE.of(2)] == m[TABLE.of(41)]
        for m in (contrast.random_means(TABLE, draws=Draws(s)) for s in range(60))
    ]
    assert 45 <= sum(bool(s) for s in same) < 60


def tissue_signals(equation, age, **times):
    values = np.array(
        [relaxation.TISSUES[t].at(age) for t in ('white-matter', 'cortex', 'ventricle')]
    )
    white, grey, fluid = relaxation.signal(equation, *values.T, **times)
    return white, grey, fluid


def test_contrast_inverts_around_birth_and_vanishes_around_six_months():
    mprage = {'tr': 2200, 'te': 3, 'ti': 1000}
    ratio = {}
    for age in (0, 6, 24):
        white, grey, fluid = tissue_signals('inversion', age, **mprage)
        assert fluid < min(white, grey)
        ratio[age] = white / grey
    assert ratio[0] < 0.85 and 0.9 < ratio[6] < 1.1 and ratio[24] > 1.3
    t2 = {'tr': 8000, 'te': 120}
    ratio = {age: np.divide(*tissue_signals('spin echo', age, **t2)[:2]) for age in (0, 9, 30)}
    assert ratio[0] > 1.15 and 0.85 < ratio[9] < 1.15 and ratio[30] < 0.8


def test_signal_equations_have_their_known_limits():
    one = np.ones(1)
    full = relaxation.signal('spin echo', 1000 * one, 100 * one, one, tr=1e6, te=0)
    assert full == pytest.approx(1)
    half = relaxation.signal('spin echo', 1000 * one, 100 * one, one, tr=1000 * np.log(2), te=0)
    assert half == pytest.approx(0.5)
    # An inversion is nulled at T1 ln 2 when the repetition is long.
    null = relaxation.signal(
        'inversion', 1000 * one, 100 * one, one, tr=1e6, te=0, ti=1000 * np.log(2)
    )
    assert null == pytest.approx(0, abs=1e-6)
    ernst = np.rad2deg(np.arccos(np.exp(-20 / 1000)))
    angles = [
        float(relaxation.signal('gradient echo', 1000 * one, one, one, tr=20, te=0, angle=a)[0])
        for a in (ernst - 2, ernst, ernst + 2)
    ]
    assert angles[1] == max(angles)
    with pytest.raises(ValueError, match='not a signal equation'):
        relaxation.signal('magic', one, one, one, tr=1, te=1)


def test_physical_contrasts_are_alike_on_both_sides_and_mature_from_the_centre():
    settings = ContrastSettings(shares=(0.0, 0.0, 0.0, 1.0))
    for seed in range(10):
        drawn = contrast.draw_contrast(TABLE, settings, age=4.0, draws=Draws(seed))
        np.testing.assert_allclose(drawn.means, drawn.means[TABLE.mirror], rtol=1e-9)
        assert np.isfinite(drawn.means).all() and drawn.means.min() >= 0
        differs = drawn.means != drawn.mature
        assert differs[TABLE.of(2)].all() and not differs[TABLE.of(3)].any()
    distance = torch.linspace(10, -40, 50)[:, None].expand(50, 40)
    progress = contrast.maturity(distance, draws=Draws(1))
    assert progress[-1].mean() > progress[20].mean() + 0.3
    assert progress.min() >= 0 and progress.max() <= 1

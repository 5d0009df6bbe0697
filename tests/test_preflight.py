"""Each fault is really put into a file; the verdict must name it."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.errors import InputError
from babyseg_bids.preflight import check_image, load_image

SHAPE = (40, 42, 44)
SPACING = 3.0


def phantom(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """A noisy ball, int16."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:3]), indexing='ij')
    ball = sum(a**2 for a in axes) < 0.8
    noise = np.random.default_rng(seed).integers(100, 900, shape[:3])
    return (ball * noise).astype(np.int16)


def affine(spacing: float | tuple[float, ...] = SPACING) -> np.ndarray:
    return np.diag([*np.broadcast_to(spacing, 3), 1.0])


def save(path: Path, data: np.ndarray, matrix: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, affine() if matrix is None else matrix), path)
    return path


def codes(path: Path) -> set[str]:
    check = check_image(path)
    assert check.ok, check.reason
    return {f.code for f in check.flags}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path / 'good.nii.gz', phantom())


def test_a_sound_image_passes_without_flags_and_is_described(good: Path) -> None:
    check = check_image(good)
    assert check.ok
    assert check.flags == ()
    assert check.shape == SHAPE
    assert check.zooms == (3.0, 3.0, 3.0)
    assert check.orientation == 'RAS'
    assert check.dtype == 'int16'
    assert check.complete
    assert (check.minimum, check.maximum) == (0, phantom().max())


def test_a_dangling_annex_link_names_datalad(tmp_path: Path) -> None:
    link = tmp_path / 'sub-01_T1w.nii.gz'
    link.symlink_to('../.git/annex/objects/a/b/MD5E-s1--c.nii.gz/MD5E-s1--c.nii.gz')
    assert 'datalad get' in check_image(link).reason


def test_a_link_to_nothing_and_a_link_loop_are_told_apart(tmp_path: Path) -> None:
    nowhere = tmp_path / 'a.nii.gz'
    nowhere.symlink_to('gone.nii.gz')
    loop = tmp_path / 'b.nii.gz'
    loop.symlink_to('b.nii.gz')
    assert 'does not exist' in check_image(nowhere).reason
    assert 'leads back to itself' in check_image(loop).reason


@pytest.mark.parametrize(
    ('content', 'advice'),
    [
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n', 'git lfs pull'),
        (b'/annex/objects/MD5E-s100--0123.nii.gz\n', 'datalad get'),
        (b'', 'empty'),
        (b'this is a text\n' * 100, 'not compressed'),
        (gzip.compress(b'this is a text\n' * 100, mtime=0), 'not in NIfTI format'),
    ],
)
def test_a_file_that_is_no_image_is_rejected_with_advice(
    tmp_path: Path, content: bytes, advice: str
) -> None:
    path = tmp_path / 'x_T1w.nii.gz'
    path.write_bytes(content)
    check = check_image(path)
    assert not check.ok
    assert advice in check.reason
    with pytest.raises(InputError, match=r'x_T1w\.nii\.gz'):
        load_image(path)


@pytest.mark.parametrize('fraction', [0.3, 0.9, 0.999])
def test_a_truncated_gzip_is_rejected(good: Path, fraction: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(fraction * len(content))])
    assert 'truncated' in check_image(good).reason


def test_a_truncated_plain_file_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.nii', phantom())
    path.write_bytes(path.read_bytes()[:-1000])
    assert 'truncated' in check_image(path).reason


def test_a_flipped_bit_in_a_gzip_is_noticed(tmp_path: Path) -> None:
    raw = save(tmp_path / 'a.nii', phantom()).read_bytes()
    # Stored blocks: only the checksum can tell.
    packed = bytearray(gzip.compress(raw, compresslevel=0, mtime=0))
    packed[len(packed) // 2] ^= 1
    path = tmp_path / 'a.nii.gz'
    path.write_bytes(packed)
    assert 'damaged' in check_image(path).reason


def test_names_that_disagree_with_the_compression_are_explained(
    good: Path, tmp_path: Path
) -> None:
    plain = tmp_path / 'b.nii'
    plain.write_bytes(good.read_bytes())
    assert 'rename it to .nii.gz' in check_image(plain).reason


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    pipe = tmp_path / 'a.nii'
    os.mkfifo(pipe)
    assert 'regular file' in check_image(pipe).reason


def test_other_formats_of_nibabel_are_not_taken_for_nifti(tmp_path: Path) -> None:
    other = tmp_path / 'a.mgz'
    nib.save(nib.MGHImage(phantom().astype(np.float32), affine()), other)
    disguised = tmp_path / 'a.nii.gz'
    disguised.write_bytes(other.read_bytes())
    assert not check_image(disguised).ok


@pytest.mark.parametrize('shape', [(*SHAPE, 1), (*SHAPE, 1, 1)])
def test_trailing_axes_of_length_one_are_squeezed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / 'a.nii.gz', phantom().reshape(shape))
    assert check_image(path).shape == SHAPE
    assert load_image(path).shape == SHAPE


@pytest.mark.parametrize(
    ('shape', 'word'),
    [
        ((24, 26, 28, 2), 'series of volumes'),
        ((24, 26, 28, 1, 3), 'series of volumes'),
        ((24, 26), 'not a 3-D image'),
        ((24, 26, 1), 'single slice'),
        ((1, 26, 28), 'single slice'),
        ((24, 26, 2), 'too few slices'),
    ],
)
def test_what_is_no_volume_is_rejected(tmp_path: Path, shape: tuple[int, ...], word: str) -> None:
    data = np.random.default_rng(1).integers(0, 99, shape).astype(np.int16)
    path = save(tmp_path / 'a.nii.gz', data)
    assert word in check_image(path).reason
    with pytest.raises(InputError, match=r'3-D|slice'):
        load_image(path)


def test_nan_and_infinity_are_flagged_and_become_zero(tmp_path: Path) -> None:
    data = phantom().astype(np.float32)
    data[:2] = np.nan
    data[20, 20, 20] = np.inf
    data[20, 20, 21] = -np.inf
    path = save(tmp_path / 'a.nii.gz', data)
    check = check_image(path)
    assert {f.code for f in check.flags} == {'not-finite'}
    assert any('NaN' in f.message and '5 %' in f.message for f in check.flags)
    assert check.maximum == phantom()[2:].max()
    loaded = load_image(path).get_fdata()
    assert np.isfinite(loaded).all()
    assert loaded[20, 20, 20] == 0
    assert loaded[20, 20, 22] == phantom()[20, 20, 22]


@pytest.mark.parametrize(
    ('value', 'word'),
    [(0, 'zero'), (7, 'same value'), (np.nan, 'NaN'), (np.inf, 'NaN or infinite')],
)
def test_images_without_content_are_rejected(tmp_path: Path, value: float, word: str) -> None:
    path = save(tmp_path / 'a.nii.gz', np.full(SHAPE, value, np.float32))
    assert word in check_image(path).reason


@pytest.mark.parametrize(
    ('spacing', 'word'),
    [
        (0.003, 'metres'),
        ((3.0, 3.0, 0.4), 'too little'),
        (3000.0, 'micrometres'),
        ((3.0, 3.0, 16.0), 'voxel size'),
        ((3.0, 3.0, 14.0), None),
        ((3.0, 3.0, 0.01), 'voxel size'),
    ],
)
def test_unit_mistakes_are_rejected_with_the_sizes(
    tmp_path: Path, spacing: float | tuple[float, ...], word: str | None
) -> None:
    check = check_image(save(tmp_path / 'a.nii.gz', phantom(), affine(spacing)))
    assert check.ok == (word is None)
    assert (word or '') in check.reason
    assert word is None or 'mm' in check.reason


def test_thick_slices_are_used_with_a_note(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.nii.gz', phantom((120, 120, 10)), affine((1, 1, 12)))
    assert codes(path) == {'thick-slices'}


def test_a_slab_is_used_but_not_called_complete(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.nii.gz', phantom((40, 42, 20)), affine())
    assert codes(path) == {'small-field-of-view'}
    assert not check_image(path).complete


def test_a_wrong_unit_code_with_sensible_sizes_is_only_flagged(tmp_path: Path) -> None:
    image = nib.Nifti1Image(phantom(), affine())
    image.header.set_xyzt_units('meter')
    nib.save(image, tmp_path / 'a.nii.gz')
    assert codes(tmp_path / 'a.nii.gz') == {'voxel-unit'}


def forms(path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> Path:
    """Write the header forms exactly as given; None has code 0."""
    image = nib.Nifti1Image(phantom(), None)
    image.header.set_sform(sform, 1 if sform is not None else 0)
    image.header.set_qform(qform, 1 if qform is not None else 0)
    if qform is None:
        image.header['pixdim'][1:4] = SPACING
    image.to_filename(path)
    return path


def test_missing_orientation_is_a_severe_flag(tmp_path: Path) -> None:
    check = check_image(forms(tmp_path / 'a.nii.gz', None, None))
    assert check.ok
    assert [(f.code, f.severity) for f in check.flags] == [('no-orientation', 'severe')]


@pytest.mark.parametrize('which', ['sform', 'qform', 'both'])
def test_one_form_or_two_that_agree_raise_no_flag(tmp_path: Path, which: str) -> None:
    sform = affine() if which in ('sform', 'both') else None
    qform = affine() if which in ('qform', 'both') else None
    assert codes(forms(tmp_path / 'a.nii.gz', sform, qform)) == set()


def test_forms_that_contradict_each_other_are_flagged(tmp_path: Path) -> None:
    mirrored = affine((-SPACING, SPACING, SPACING))
    turned = affine()[[1, 2, 0, 3]]
    shifted = affine()
    shifted[0, 3] = 30
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    path = tmp_path / 'a.nii.gz'
    assert codes(forms(path, affine(), mirrored)) == {'left-right-contradiction'}
    assert codes(forms(path, turned, affine())) == {'orientation-contradiction'}
    assert codes(forms(path, shifted, affine())) == {'sform-qform-differ'}
    assert codes(forms(path, tilt @ affine(), affine())) == {'sform-qform-differ'}


def test_oblique_and_sheared_grids_are_flagged(tmp_path: Path) -> None:
    angle = np.radians(20)
    oblique = np.eye(4)
    oblique[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    sheared = affine()
    sheared[0, 1] = 1.0
    path = save(tmp_path / 'a.nii.gz', phantom(), oblique @ affine())
    assert codes(path) == {'oblique'}
    assert check_image(path).oblique == pytest.approx(20, abs=0.01)
    path = save(tmp_path / 'b.nii.gz', phantom(), sheared)
    assert 'sheared' in codes(path)
    np.testing.assert_allclose(load_image(path).affine, sheared, atol=1e-5)


def test_a_singular_matrix_is_rejected(tmp_path: Path) -> None:
    flat = affine()
    flat[2, 2] = 0
    path = forms(tmp_path / 'a.nii.gz', flat, affine())
    assert 'singular' in check_image(path).reason


def test_a_voxel_size_that_contradicts_the_matrix_is_flagged(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.nii', phantom())
    raw = bytearray(path.read_bytes())
    raw[80:84] = np.float32(2.0).tobytes()  # pixdim[1]
    path.write_bytes(raw)
    assert 'voxel-size-contradiction' in codes(path)


@pytest.mark.parametrize(
    'dtype', ['uint8', 'int8', 'uint16', 'int32', 'int64', 'uint64', 'float64', '>i2', '>f4']
)
@pytest.mark.parametrize('ending', ['nii', 'nii.gz'])
def test_every_number_type_is_read_as_it_is(tmp_path: Path, dtype: str, ending: str) -> None:
    data = (phantom() // 8).astype(dtype)
    path = tmp_path / f'a.{ending}'
    nib.Nifti1Image(data, affine(), dtype=np.dtype(dtype)).to_filename(path)
    check = check_image(path)
    assert check.ok, check.reason
    assert (check.minimum, check.maximum) == (0, (phantom() // 8).max())
    np.testing.assert_array_equal(load_image(path).get_fdata(), phantom() // 8)


def test_scaled_integers_have_scaled_values(tmp_path: Path) -> None:
    image = nib.Nifti1Image(phantom(), affine())
    image.header.set_slope_inter(0.5, -3)
    path = tmp_path / 'a.nii.gz'
    image.to_filename(path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[352:] = phantom().tobytes(order='F')
    path.write_bytes(gzip.compress(bytes(raw)))
    check = check_image(path)
    assert check.minimum == -3
    assert check.maximum == pytest.approx(0.5 * phantom().max() - 3)
    assert {f.code for f in check.flags} == {'negative-values'}
    np.testing.assert_allclose(load_image(path).get_fdata(), 0.5 * phantom() - 3.0)


@pytest.mark.parametrize(
    ('dtype', 'word'),
    [('complex64', 'complex'), ([('R', 'u1'), ('G', 'u1'), ('B', 'u1')], 'colours')],
)
def test_complex_and_colour_images_are_rejected(tmp_path: Path, dtype: object, word: str) -> None:
    path = save(tmp_path / 'a.nii.gz', np.zeros(SHAPE, np.dtype(dtype)))
    assert word in check_image(path).reason
    with pytest.raises(InputError, match=word):
        load_image(path)


def test_a_mask_is_recognised(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.nii.gz', (phantom() > 0).astype(np.uint8))
    assert codes(path) == {'few-values'}


def test_a_nearly_empty_image_is_flagged(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, np.int16)
    data[18:22, 18:22, 18:22] = phantom()[18:22, 18:22, 18:22]
    assert codes(save(tmp_path / 'a.nii.gz', data)) == {'nearly-empty'}


def test_the_same_voxels_have_the_same_digest_in_any_file(tmp_path: Path) -> None:
    a, b = (check_image(save(tmp_path / n, phantom())) for n in ('a.nii', 'b.nii.gz'))
    c = check_image(save(tmp_path / 'c.nii', phantom(seed=1)))
    assert a.digest == b.digest
    assert c.digest != a.digest
    # Another intensity in the same ball: the outline is what they share.
    assert c.outline == a.outline


@pytest.mark.parametrize('flips', [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, -1)])
@pytest.mark.parametrize('axes', [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_every_orientation_passes_and_keeps_its_affine(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = (np.diag(flips) * SPACING)[:, list(axes)]
    matrix[:3, 3] = [-7, 3, 11]
    path = save(tmp_path / 'a.nii.gz', phantom(), matrix)
    assert codes(path) == set()
    loaded = load_image(path)
    np.testing.assert_allclose(loaded.affine, matrix, atol=1e-5)
    assert loaded.get_data_dtype() == np.float32
    np.testing.assert_array_equal(loaded.get_fdata(), phantom())


def test_loading_keeps_the_codes_of_the_forms(tmp_path: Path) -> None:
    path = forms(tmp_path / 'a.nii.gz', None, affine())
    loaded = load_image(path)
    assert loaded.affine.tolist() == affine().tolist()
    assert int(loaded.header['qform_code']) == 1


def test_a_file_that_disappears_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    check = check_image(tmp_path / 'gone.nii.gz')
    assert not check.ok
    assert 'could not be found' in check.reason
    with pytest.raises(InputError, match=r'gone\.nii\.gz'):
        load_image(tmp_path / 'gone.nii.gz')


def test_random_damage_never_raises_and_what_passes_loads(tmp_path: Path) -> None:
    seed = 20240607
    print(f'seed {seed}')
    rng = np.random.default_rng(seed)
    raw = save(tmp_path / 'a.nii', phantom()).read_bytes()
    packed = gzip.compress(raw, mtime=0)
    verdicts = set()
    for number in range(150):
        zipped = number % 3 == 0
        damaged = bytearray(packed if zipped else raw)
        for place in rng.integers(0, len(damaged) if zipped else 352, rng.integers(1, 5)):
            damaged[place] = rng.integers(0, 256)
        if number % 5 == 0:
            damaged = damaged[: rng.integers(1, len(damaged))]
        path = tmp_path / ('x.nii.gz' if zipped else 'x.nii')
        path.write_bytes(damaged)
        check = check_image(path)
        assert check.ok != bool(check.reason)
        verdicts.add(check.ok)
        if check.ok:
            assert np.isfinite(load_image(path).get_fdata()).all()
    assert verdicts == {True, False}


def test_nibabel_prints_nothing_about_headers_that_it_repairs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / 'a.nii', phantom())
    raw = bytearray(path.read_bytes())
    raw[252:254] = np.int16(77).tobytes()  # qform_code
    path.write_bytes(raw)
    assert 'header-repaired' in codes(path)
    assert capfd.readouterr() == ('', '')


@pytest.mark.needs_shared('data/adult-heads')
def test_real_heads_pass(shared: Path) -> None:
    head = check_image(shared / 'data/adult-heads/head_T1w.nii.gz')
    thick = check_image(shared / 'data/adult-heads/thick-slices_T2w.nii.gz')
    assert head.ok
    assert head.orientation == 'RAS'
    assert thick.ok
    assert thick.zooms == pytest.approx((0.75, 0.75, 5.5), abs=1e-3)
    assert 'thick-slices' in {f.code for f in thick.flags}

import nibabel as nib
import numpy as np
import pytest
from test_workflow import AFFINE, head

from babyseg_bids import BabySegPipeline
from babyseg_bids import pipeline as pipeline_module
from babyseg_bids.alignment import Alignment
from babyseg_bids.errors import InputError

T1, T2 = (0.1, 0.5, 0.7), (1.0, 0.6, 0.4)


@pytest.fixture(scope='module')
def pipeline():
    return BabySegPipeline(device='cpu')


def test_paths_images_and_arrays_give_the_same_labels(pipeline, tmp_path):
    image = nib.Nifti1Image(head(T1), AFFINE)
    image.to_filename(tmp_path / 't1.nii.gz')
    results = [
        pipeline.predict([tmp_path / 't1.nii.gz']),
        pipeline.predict(image),
        pipeline.predict([head(T1)], affine=AFFINE),
    ]
    for result in results:
        assert result.segmentation.shape == image.shape
        np.testing.assert_array_equal(result.segmentation.affine, AFFINE)
        np.testing.assert_array_equal(
            result.segmentation.get_fdata(), results[0].segmentation.get_fdata()
        )
        assert len(result.volumes) == 27
        assert result.scan_weights == (1.0,)


def test_two_scans_are_segmented_jointly(pipeline):
    result = pipeline.predict([head(T1), head(T2)], affine=AFFINE, keep_probabilities=True)
    assert result.scan_weights == (0.5, 0.5)
    assert len(result.alignments) == 1
    assert result.probabilities.shape == (*head(T1).shape, 28)
    assert result.brain_mask.get_data_dtype() == np.uint8
    doubt = result.uncertainty.get_fdata() > 0.3
    assert (result.review_mask.get_fdata() != doubt).mean() < 0.01


def test_repeats_of_a_contrast_are_further_scans_and_not_averaged(monkeypatch):
    given = []

    def segment(scans, *_, **__):
        given.extend(scans)

    monkeypatch.setattr(pipeline_module, 'segment', segment)
    images = [nib.Nifti1Image(head(T1, seed), AFFINE) for seed in (0, 1)]
    move = nib.affines.from_matvec(np.eye(3), [3, -2, 5])
    alignment = Alignment(move, 'rigid', 1.3, 1.1, 0.0, 6.2, 'Moved.')
    pipeline_module.segment_aligned(images, [alignment], None)
    for (data, affine), image, matrix in zip(given, images, (np.eye(4), move), strict=True):
        np.testing.assert_array_equal(data, image.dataobj)
        np.testing.assert_array_equal(affine, matrix @ AFFINE)


def test_a_scan_that_was_left_out_has_no_share(pipeline, monkeypatch):
    left_out = Alignment(np.eye(4), 'refused', 1.0, 1.0, 0.0, 0.0, 'Left out.')
    monkeypatch.setattr(pipeline_module, 'align_scans', lambda *_, **__: [left_out])
    result = pipeline.predict([head(T1), head(T2)], affine=AFFINE)
    assert result.scan_weights == (1.0, 0.0)


def test_unusable_scans_are_refused_in_words(pipeline, tmp_path):
    with pytest.raises(InputError, match='at least one'):
        pipeline.predict([])
    with pytest.raises(InputError, match='affine'):
        pipeline.predict([head(T1)])
    with pytest.raises(InputError, match=r'missing\.nii'):
        pipeline.predict([tmp_path / 'missing.nii'])
    with pytest.raises(InputError, match='3-D'):
        pipeline.predict([np.zeros((4, 4, 4, 3))], affine=AFFINE)

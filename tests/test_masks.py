import numpy as np
import pytest
import torch
from scipy import ndimage

from babyseg_bids.labels import label_table, table_of
from babyseg_bids.network.masks import grown, islands, without_specks


@pytest.mark.parametrize('size', [(30, 21, 17), (9, 1, 3)])
@pytest.mark.parametrize('width', [0, 1, 2, 4, 8])
def test_a_mask_grows_by_a_cube(size, width):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.01
    cube = np.ones((2 * width + 1,) * 3)
    expected = ndimage.binary_dilation(mask.numpy(), cube)
    np.testing.assert_array_equal(grown(mask, width).numpy(), expected)


def test_a_speck_is_an_island_even_where_it_touches_a_corner():
    brain = torch.zeros(20, 20, 20, dtype=torch.bool)
    for low, high in ((2, 12), (12, 13), (17, 18)):
        brain[low:high, low:high, low:high] = True
    assert islands(brain, spacing=2.0).nonzero().tolist() == [[12] * 3, [17] * 3]


@pytest.mark.parametrize(('gap', 'width', 'kept'), [(3, 4, True), (8, 4, False), (8, 6, True)])
def test_a_detached_piece_stays_when_it_is_near_or_large(gap, width, kept):
    brain = torch.zeros(12, 12, 40, dtype=torch.bool)
    for low, high in ((1, 11), (11 + gap, 11 + gap + width)):
        brain[1:11, 1:11, low:high] = True
    gone = islands(brain, spacing=2.0)
    assert gone.sum() == 100 * width * (not kept)
    assert not gone[..., :11].any()


def test_a_structure_of_next_to_no_volume_becomes_what_surrounds_it():
    likely = torch.full((4, 6, 6, 6), 0.01)
    likely[1], likely[1, :, :, 4:] = 0.97, 0.01
    likely[0, :, :, 4:] = 0.97
    likely[:, 2, 2, 2] = torch.tensor([0.1, 0.2, 0.6, 0.1])
    likely[:, 3, 3, 5] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    likely[:, 4:, 4:, :3] = torch.tensor([0.1, 0.2, 0.6, 0.1]).view(4, 1, 1, 1)
    before = likely.clone()
    table = table_of(label_table().indices[:4])
    without_specks(likely, table, spacing=1.0)
    # Thirteen voxels of 1 mm3 are a speck, and so is the one that is sure of itself.
    assert likely.argmax(0).unique().tolist() == [0, 1]
    assert likely[0, 3, 3, 5] == 1 and not likely[2, 4:, 4:, :3].any()
    torch.testing.assert_close(likely.sum(0), before.sum(0))
    torch.testing.assert_close(likely[:, 2, 2, 2], torch.tensor([0.1, 0.2, 0.0, 0.1]) / 0.4)
    kept = before.clone()
    without_specks(kept, table, spacing=2.0)
    # At 2 mm the thirteen are a structure, and what was not a speck's is left alone.
    assert (kept.argmax(0) == 2).sum() == 13
    torch.testing.assert_close(kept[:, 2, 2, 2], before[:, 2, 2, 2])


@pytest.mark.parametrize(('label', 'most'), [(16, 399), (10, 19)])
def test_a_brainstem_has_to_be_larger_than_other_structures(label, most):
    table = label_table()
    channel = table.indices.tolist().index(label)
    for count in (most, most + 1):
        likely = torch.zeros(len(table), 10, 10, 10)
        likely[0] = 0.4
        flat = likely.flatten(1)
        flat[channel, :count] = 0.6
        without_specks(likely, table, spacing=1.0)
        assert (likely.argmax(0) == channel).sum() == (count if count > most else 0)

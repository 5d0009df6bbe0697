"""Which way a head lies, and that this never mirrors it."""

import numpy as np
import pytest
import torch
from heads import drawn_head, rotation

from babyseg_bids.labels import label_table
from babyseg_bids.network import head
from babyseg_bids.network.compass import COMPASS_NETWORK, SPACING, quarters, read_compass
from babyseg_bids.network.layout import angle_of, quarter_turned, quarter_turns

TABLE = label_table()


@pytest.fixture(scope='module')
def drawn():
    return drawn_head()


@pytest.fixture(scope='module')
def labelled(drawn):
    channels = torch.from_numpy(drawn[1])
    return channels, quarters(channels, TABLE, spacing=1.0)


def test_the_brain_is_quartered_along_the_axes_of_the_upright_head(labelled):
    channels, found = labelled
    assert torch.equal(found > 0, channels > 0)
    centres = np.array([np.argwhere(found.numpy() == n).mean(0) for n in (1, 2, 3, 4)])
    (below_behind, above_behind, below_front, above_front) = centres
    for low, high in ((below_behind, above_behind), (below_front, above_front)):
        assert high[2] - low[2] > 25 and abs(high[1] - low[1]) < 25
    for back, front in ((below_behind, below_front), (above_behind, above_front)):
        assert front[1] - back[1] > 35 and abs(front[2] - back[2]) < 25


@pytest.mark.parametrize('turn', quarter_turns()[1::5], ids=str)
def test_quarters_are_those_of_the_child_however_the_head_lies(labelled, turn):
    channels, straight = labelled
    turned = quarter_turned(channels[None], turn)[0]
    found = quarters(turned, TABLE, spacing=1.0)
    assert (found == quarter_turned(straight[None], turn)[0]).float().mean() > 0.9999


def test_too_little_of_a_brain_has_no_quarters(labelled):
    channels = labelled[0].clone()
    channels[:, 60:] = 0
    assert quarters(channels * (channels < 4), TABLE, spacing=1.0) is None


class Shown(torch.nn.Module):
    """A network that sees the quarters, whose number the intensity says."""

    config = COMPASS_NETWORK

    def forward(self, x):
        numbers = torch.arange(5).view(1, 5, 1, 1, 1)
        return -200 * (4 * x - numbers).square()


def quartered(turn):
    """An ellipsoid (1, 64, 64, 64) of four intensities, turned."""
    points = (np.moveaxis(np.indices((64, 64, 64)), 0, -1) - 31.5) @ turn
    x, y, z = np.moveaxis(points, -1, 0)
    inside = (x / 14) ** 2 + (y / 20) ** 2 + (z / 15) ** 2 < 1
    return torch.from_numpy(inside * (1 + 2 * (y > 0) + (z > 0)) / 4).float()[None]


@pytest.mark.parametrize(
    'turn',
    [*quarter_turns(), rotation(25, 35, -30), rotation(-60, 40, 120), rotation(10, 0, 170)],
    ids=str,
)
def test_the_rotation_is_that_which_puts_the_quarters_upright(turn):
    found = read_compass(quartered(turn), Shown(), spacing=SPACING)
    assert angle_of(found.rotation @ turn) < 2
    assert np.linalg.det(found.rotation) == pytest.approx(1)
    assert found.misfit < 0.02
    nearest = max(quarter_turns(), key=lambda t: np.trace(t.T @ turn.T))
    assert np.array_equal(found.quarter_turn, nearest)


def test_a_brain_is_found_at_its_place_in_narrower_voxels():
    wide = quartered(np.eye(3))
    narrow = wide[0].repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)[None]
    found = read_compass(narrow, Shown(), spacing=SPACING / 2)
    np.testing.assert_allclose(found.inside.mean(0), 63.5, atol=0.2)
    np.testing.assert_allclose(np.ptp(found.inside, 0), [54, 78, 58], atol=4)


def test_without_a_brain_there_is_no_direction():
    found = read_compass(torch.zeros(1, 20, 30, 40), Shown(), spacing=SPACING)
    assert np.array_equal(found.rotation, np.eye(3)) and found.misfit == 1
    assert not len(found.inside)


@pytest.mark.parametrize('turn', quarter_turns(), ids=str)
def test_the_shipped_compass_knows_a_head_in_every_direction(drawn, turn):
    scan = quarter_turned(torch.from_numpy(drawn[0])[None], turn).contiguous()
    found = read_compass(scan, spacing=1.0)
    assert angle_of(found.rotation @ turn) < head._FAR
    assert found.misfit < head._LOST
    assert np.array_equal(found.quarter_turn, turn.T)

"""How a head stands, told by where its structures lie."""

import numpy as np
import pytest
import torch
from heads import balls, rotation

from babyseg_bids.labels import label_table
from babyseg_bids.network import layout
from babyseg_bids.network.layout import (
    angle_of,
    quarter_turned,
    quarter_turns,
    upright,
    upright_labels,
)
from babyseg_bids.synthesis.atlas import layout as layout_of
from babyseg_bids.synthesis.atlas import load_atlas

TABLE = label_table()
SPACING = 2.0


def test_the_layout_is_that_of_the_shipped_atlas():
    expected = layout_of(load_atlas()).set_index('index')
    np.testing.assert_allclose(layout._layout().to_numpy(), expected.to_numpy(), atol=0.051)


@pytest.mark.parametrize(
    'degrees', [(0, 0, 0), (20, 0, 0), (0, -35, 0), (30, 30, -30), (0, 0, 170), (90, 0, 0)]
)
def test_the_rotation_is_that_of_the_structures(degrees):
    turn = rotation(*degrees)
    posteriors = balls(turn, SPACING)
    found, misfit = upright(posteriors, TABLE, SPACING)
    assert angle_of(found @ turn) < 0.5
    assert np.linalg.det(found) == pytest.approx(1)
    assert misfit < 0.001
    of_labels, same = upright_labels(posteriors.argmax(0), TABLE, SPACING)
    np.testing.assert_allclose(of_labels, found, atol=1e-6)
    assert same == pytest.approx(misfit, abs=1e-9)


def test_a_mirrored_head_is_never_reflected_back():
    found, misfit = upright(balls(np.eye(3), SPACING)[:, ::-1], TABLE, SPACING)
    assert np.linalg.det(found) == pytest.approx(1)
    assert misfit > 0.3


@pytest.mark.parametrize('kept', [1, 7])
def test_too_few_structures_tell_nothing(kept):
    posteriors = balls(rotation(40, 0, 0), SPACING)
    posteriors[kept:] = 0
    found, misfit = upright(posteriors, TABLE, SPACING)
    assert np.array_equal(found, np.eye(3)) and misfit == 1


def test_there_are_24_quarter_turns_and_none_is_the_first():
    turns = quarter_turns()
    assert len({t.tobytes() for t in turns}) == 24
    assert np.array_equal(turns[0], np.eye(3))
    assert all(np.linalg.det(t) == pytest.approx(1) for t in turns)
    assert all(angle_of(t) > 89 for t in turns[1:])


@pytest.mark.parametrize('turn', quarter_turns(), ids=str)
def test_a_quarter_turn_takes_every_voxel_where_the_matrix_does(turn):
    x = torch.arange(4.0 * 5 * 6).view(1, 4, 5, 6)
    found = quarter_turned(x, turn)[0]
    index = np.argwhere(np.ones((4, 5, 6), bool))
    along = index @ turn.T
    along = (along - along.min(0)).round().astype(int)
    assert torch.equal(found[tuple(along.T)], x[0][tuple(index.T)])

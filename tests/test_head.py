"""How a head stands in a volume, and that it is put upright without losing its sides."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from heads import drawn_head, rotation
from network_phantoms import SideNetwork
from orientations import CODES, reorient
from scipy import ndimage

from babyseg_bids.labels import label_table
from babyseg_bids.network import Model, head, load_model, segment
from babyseg_bids.network.compass import Reading
from babyseg_bids.network.grid import from_grid, onto_grid, reference_box, working_grid
from babyseg_bids.network.head import Head, Standing, Turn, enlarged, put_upright
from babyseg_bids.network.layout import angle_of, quarter_turned, quarter_turns
from babyseg_bids.synthesis.losses import hard_dice

TABLE = label_table()
SPACING = 2.0


@pytest.mark.parametrize('codes', CODES)
def test_a_turned_grid_shows_the_world_as_it_is(codes):
    """Against SciPy in world coordinates, there and back, from every order of axes."""
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((30, 34, 26)), 2.5).astype(np.float32)
    header = np.eye(4)
    header[:3, :3] = rotation(5, -8, 12) @ np.diag([2.0, 1.5, 3.0])
    scan, affine = reorient(image, header, codes)
    box = [slice(0, n) for n in scan.shape]
    straight = working_grid(affine, box, spacing=SPACING, multiple=8)
    turn = rotation(20, -35, 30)
    middle = turn @ (np.array(straight.size) - 1) / 2
    grid = straight.turned(turn, middle - 32, (65, 65, 65))
    found = onto_grid(torch.from_numpy(scan.copy()), affine, grid, antialias=False).numpy()
    points = nib.affines.apply_affine(
        np.linalg.inv(header) @ grid.affine, np.moveaxis(np.indices(grid.size), 0, -1)
    )
    expected = ndimage.map_coordinates(
        np.pad(image, 1), np.moveaxis(points + 1, -1, 0), order=1, mode='constant'
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # A part of the grid leads back to the same places.
    part = (slice(8, 60), slice(5, 61), slice(3, 62))
    inner = grid.part(part)
    target = reference_box([slice(0, n) for n in inner.size], inner, scan.shape)
    assert all(t == b for t, b in zip(target, box, strict=True))
    back = from_grid(torch.from_numpy(found[part]), inner, target).numpy()
    inside = tuple(slice(4, -4) for _ in range(3))
    np.testing.assert_allclose(back[inside], scan[inside], atol=0.02)


INSIDE = np.argwhere(np.ones((9, 9, 9), bool)) + 12.0
LOST = Reading(np.eye(3), 1.0, INSIDE)


class BrightSides(SideNetwork):
    """Takes the middle of what is bright for that of the head."""

    def middle(self, x):
        across = (x[0] > 0.5).nonzero()[:, 0].float()
        return (across.min() + across.max() + 1) / 2


@pytest.fixture
def sides():
    return Model('sides', '0', BrightSides(), TABLE, SPACING, 16, {})


def tilted(turn):
    """A bright head in RAS, flat towards its left, turned; its left half; the affine."""
    affine = np.diag([SPACING] * 3 + [1.0])
    affine[:3, 3] = -SPACING * 23.5
    points = SPACING * np.moveaxis(np.indices((48, 48, 48)) - 23.5, 0, -1) @ turn
    x, y, z = np.moveaxis(points, -1, 0)
    inside = (x / 30) ** 2 + (y / 36) ** 2 + (z / np.where(x < 0, 30, 18)) ** 2 < 1
    return 100 * inside.astype(np.float32), inside & (x < 0), inside & (x >= 0), affine


@pytest.mark.parametrize('codes', CODES)
def test_left_stays_left_when_a_head_is_put_upright(sides, codes, monkeypatch):
    turn = rotation(25, 35, -30)
    image, left, right, header = tilted(turn)
    image, affine = reorient(image, header, codes)
    real, seen = head.find_head, []

    def find(scans, model, **options):
        found = replace(real(scans, model, **options), misfit=0.0)
        seen.append(len(scans))
        if len(seen) > 1:
            return found
        # Of structures there are only two; this is what more of them would tell.
        inside = (scans[0] > 0.5).nonzero().double().numpy()
        askew = head._turn(turn.T, inside, model)
        return replace(found, turn=askew, misfit=0.2, certainty=0.8)

    monkeypatch.setattr(head, 'find_head', find)
    monkeypatch.setattr(head, 'read_compass', lambda *_, **__: LOST)
    result = segment([(image, affine)], sides, device='cpu')
    assert result.turn_degrees == pytest.approx(angle_of(turn), abs=0.01)
    for number, truth in ((2, left), (41, right)):
        wanted = reorient(truth.astype(np.uint8), header, codes)[0] > 0
        found = result.labels == number
        assert 2 * (wanted & found).sum() / (wanted.sum() + found.sum()) > 0.95
        volume = wanted.sum() * SPACING**3
        assert result.soft_volumes[number] == pytest.approx(volume, rel=0.06)


@pytest.mark.parametrize('turn', quarter_turns()[1:], ids=str)
def test_a_quarter_turn_of_a_grid_shows_the_same_voxels(turn):
    image, _, _, affine = tilted(rotation(20, 30, 40))
    grid = working_grid(affine, [slice(0, 44), slice(2, 48), slice(4, 30)], spacing=2, multiple=16)
    scans = onto_grid(torch.from_numpy(image), affine, grid)[None]
    again = onto_grid(torch.from_numpy(image), affine, head._same_voxels(grid, turn))[None]
    torch.testing.assert_close(quarter_turned(scans, turn), again, atol=1e-3, rtol=0)


def finder(*found):
    """Stands for `find_head`: the first looks find these, all later ones the last."""
    waiting = list(found)
    return lambda *_, **__: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def stand(sides, monkeypatch, *found, lies=LOST):
    """Where `put_upright` ends after such looks and a compass, and the grids that it asked for."""
    grids = []

    def prepare(target):
        grids.append(target)
        return torch.zeros(1, *target.size)

    monkeypatch.setattr(head, 'find_head', finder(*found))
    monkeypatch.setattr(head, 'read_compass', lambda *_, **__: lies)
    grid = working_grid(np.eye(4), [slice(0, 40)] * 3, spacing=SPACING, multiple=16)
    return put_upright(prepare, grid, sides, device='cpu'), grids


PART, NEAR = (slice(0, 32),) * 3, (slice(3, 28),) * 3
ASKEW = Turn(rotation(0, 0, 25), np.zeros(3), (32, 32, 32))


def seen(misfit, certainty, *, turn=None, brain=8e5):
    return Head(PART, NEAR if brain else None, turn, misfit, brain, certainty)


NOTHING = seen(1.0, 0.0, brain=0.0)


def test_a_head_that_surely_stands_upright_is_looked_at_once(sides, monkeypatch):
    standing, grids = stand(sides, monkeypatch, seen(0.01, 0.8), NOTHING)
    assert grids == [standing.grid] and standing.head.brain


def test_a_turn_after_which_the_head_is_no_better_is_taken_back(sides, monkeypatch):
    standing, grids = stand(sides, monkeypatch, seen(0.2, 0.8, turn=ASKEW))
    assert standing.grid is grids[0]
    assert len(grids) > head._TURNS


@pytest.mark.parametrize(
    ('misfit', 'certainty', 'counts'),
    [(0.2, 0.9, True), (0.04, 0.8, True), (0.04, 0.85, False), (0.01, 0.8, False)],
)
def test_a_turn_counts_after_which_the_score_is_better(
    sides, monkeypatch, misfit, certainty, counts
):
    given, then = seen(misfit, certainty, turn=ASKEW), seen(0.01, 0.78)
    standing, grids = stand(sides, monkeypatch, given, then, given)
    assert (standing.head is then) is counts
    assert standing.grid is grids[counts]


def test_of_several_turns_the_one_counts_after_which_the_score_is_best(sides, monkeypatch):
    best = seen(0.01, 0.85, turn=ASKEW)
    looks = seen(0.2, 0.7, turn=ASKEW), seen(0.03, 0.8, turn=ASKEW), best, seen(0.005, 0.82)
    standing, grids = stand(sides, monkeypatch, *looks)
    assert standing.head is best and standing.grid is grids[2]


BACKWARDS = np.diag([-1.0, -1.0, 1.0])


def pointing(turn, misfit=0.01):
    return Reading(turn, misfit, INSIDE)


def test_the_header_is_believed_where_the_compass_is_lost(sides, monkeypatch):
    lies = pointing(BACKWARDS, head._LOST)
    standing, grids = stand(sides, monkeypatch, seen(0.2, 0.5), NOTHING, lies=lies)
    assert grids == [standing.grid] and standing.head.brain


def test_a_head_that_the_compass_too_says_is_upright_stays_as_it_is(sides, monkeypatch):
    lies = pointing(rotation(10, 0, 15))
    standing, grids = stand(sides, monkeypatch, seen(0.01, 0.8), NOTHING, lies=lies)
    assert len(grids) == 1 and standing.grid is grids[0]


@pytest.mark.parametrize('turn', quarter_turns()[1:], ids=str)
def test_a_mistaken_header_costs_one_look(sides, monkeypatch, turn):
    """The same voxels in another order: nothing is interpolated, and no side is mirrored."""
    lies = pointing(rotation(8, -5, 10) @ turn)
    standing, grids = stand(sides, monkeypatch, seen(0.01, 0.8), NOTHING, lies=lies)
    assert len(grids) == 1 and standing.head.brain
    ratio = np.linalg.inv(grids[0].affine[:3, :3]) @ standing.grid.affine[:3, :3]
    np.testing.assert_allclose(ratio, turn.T, atol=1e-9)


@pytest.mark.parametrize(('certainty', 'stays'), [(0.7, True), (0.6, False)])
def test_where_the_head_is_not_surely_upright_the_compass_is_followed_exactly_if_that_is_better(
    sides, monkeypatch, certainty, stays
):
    there, exactly = seen(0.01, certainty), seen(0.01, 0.65)
    lies = pointing(rotation(10, 0, 15) @ BACKWARDS)
    standing, grids = stand(sides, monkeypatch, there, exactly, lies=lies)
    assert len(grids) == 2
    assert standing.head is (there if stays else exactly)
    axes = np.linalg.inv(grids[0].affine[:3, :3]) @ standing.grid.affine[:3, :3]
    np.testing.assert_allclose(axes, (BACKWARDS if stays else lies.rotation).T, atol=1e-9)


def test_far_from_upright_the_compass_is_followed_first(sides, monkeypatch):
    turn = rotation(30, -35, 30)
    standing, grids = stand(sides, monkeypatch, seen(0.01, 0.8), NOTHING, lies=pointing(turn))
    assert standing.grid is grids[1] and len(grids) == 2
    ratio = np.linalg.inv(grids[0].affine[:3, :3]) @ standing.grid.affine[:3, :3]
    np.testing.assert_allclose(ratio, turn.T, atol=1e-9)
    # The brain is in the middle of what is looked at.
    middle = standing.grid.affine @ [*(np.array(standing.grid.size) - 1) / 2, 1]
    np.testing.assert_allclose(middle, grids[0].affine @ [16, 16, 16, 1], atol=SPACING)


@pytest.mark.parametrize('codes', CODES)
def test_a_finer_grid_covers_the_same_part_of_the_world(codes):
    header = np.eye(4)
    header[:3] = np.c_[rotation(5, -8, 12) @ np.diag([2.0, 1.5, 3.0]), [9, -5, 3]]
    scan, affine = reorient(np.zeros((40, 44, 36)), header, codes)
    box = [slice(0, n) for n in scan.shape]
    grid = working_grid(affine, box, spacing=SPACING, multiple=8).part((slice(8, 40),) * 3)
    finer = grid.finer(0.7, (48, 64, 56))
    assert grid.spacing == 2 and finer.spacing == 1.4
    middle, finer_middle = (
        nib.affines.apply_affine(g.affine, (np.array(g.size) - 1) / 2) for g in (grid, finer)
    )
    np.testing.assert_allclose(finer_middle, middle, atol=1e-9)
    np.testing.assert_allclose(finer.affine[:3, :3], 0.7 * grid.affine[:3, :3], atol=1e-12)
    np.testing.assert_allclose(finer.affine @ finer.from_reference, affine, atol=1e-9)


@pytest.mark.parametrize(
    ('brain', 'ratio'), [(0.0, 1), (1e4, 0.5), (3.28e5, 0.7), (6.9e5, 0.94), (7e5, 1), (1.4e6, 1)]
)
def test_a_small_brain_is_enlarged(sides, brain, ratio):
    grid = working_grid(np.eye(4), [slice(0, 80)] * 3, spacing=SPACING, multiple=16)
    given = Standing(torch.zeros(1, *grid.size), grid, seen(0.0, 0.8, brain=brain))
    asked = []

    def prepare(target):
        asked.append(target)
        return torch.ones(1, *target.size)

    found = enlarged(given, prepare, sides)
    if ratio == 1:
        assert found is given and not asked
        return
    assert asked == [found.grid] and found.grid.spacing == pytest.approx(ratio * SPACING)
    assert found.scans.all() and found.head.part == tuple(slice(0, n) for n in found.grid.size)
    # What is near the brain, and no more than the network's multiples add.
    covered = np.array(found.grid.size) * ratio
    assert (covered >= 25).all() and (covered < 25 + 16 * ratio).all()
    middle = found.grid.affine @ [*(np.array(found.grid.size) - 1) / 2, 1]
    np.testing.assert_allclose(middle, grid.affine @ [15, 15, 15, 1], atol=1e-9)


@pytest.fixture(scope='module')
def drawn():
    """A drawn child's head, upright, its labels, and what the shipped model makes of it."""
    image, truth = drawn_head()
    return image, truth, segment([(image, np.eye(4))], load_model())


def mean_dice(result, truth):
    numbers = torch.from_numpy(TABLE.indices.astype(np.int64))
    channels = (torch.from_numpy(result.labels)[..., None] == numbers).int().argmax(-1)
    each = hard_dice(channels, torch.from_numpy(truth).long(), classes=len(TABLE))
    return float(each[1:].nanmean())


def test_the_shipped_model_labels_a_head_that_faces_backwards_as_any_other(drawn):
    image, _, straight = drawn
    back = segment([(image[::-1, ::-1], np.eye(4))], load_model())
    assert back.turned and not straight.turned and straight.turn_degrees == 0
    assert back.turn_degrees == pytest.approx(180)
    assert (back.labels[::-1, ::-1] == straight.labels).mean() > 0.9999


def test_how_a_head_stands_does_not_depend_on_the_calibration(drawn):
    scans = torch.from_numpy(drawn[0])[None]
    model = load_model()
    one, other = (
        head.find_head(scans, replace(model, temperature=t)) for t in (model.temperature, 1.5)
    )
    assert one.brain > 3e5
    assert one == other


@pytest.mark.parametrize('degrees', [(30, -35, 30), (0, 0, 90)])
def test_the_shipped_model_labels_a_head_that_lies_far_from_upright(drawn, degrees):
    image, truth, straight = drawn
    turn = rotation(*degrees)
    start = (np.eye(3) - turn) @ np.full(3, 79.5)
    image = ndimage.affine_transform(image, turn, start, order=1)
    result = segment([(image, np.eye(4))], load_model())
    assert result.turn_degrees == pytest.approx(angle_of(turn), abs=12)
    assert mean_dice(straight, truth) > 0.8
    turned_truth = ndimage.affine_transform(truth, turn, start, order=0)
    assert mean_dice(result, turned_truth) > mean_dice(straight, truth) - 0.03

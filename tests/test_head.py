"""How a head stands in a volume, and that it is put upright without losing its sides."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from network_phantoms import CHANNEL, SideNetwork
from orientations import CODES, reorient
from scipy import ndimage
from scipy.spatial.transform import Rotation

from babyseg_bids.labels import label_table
from babyseg_bids.network import Model, head, load_model, segment
from babyseg_bids.network.grid import from_grid, onto_grid, reference_box, working_grid
from babyseg_bids.network.head import (
    Head,
    Standing,
    Turn,
    angle_of,
    enlarged,
    put_upright,
    upright,
)
from babyseg_bids.synthesis.atlas import layout, load_atlas
from babyseg_bids.synthesis.finetune import drawn_brains
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.losses import hard_dice
from babyseg_bids.synthesis.settings import load_settings, update

TABLE = label_table()
SPACING = 2.0


def rotation(*degrees):
    return Rotation.from_euler('xyz', degrees, degrees=True).as_matrix()


def balls(turn, size=96):
    """Posteriors (C, *size): balls where the structures of a turned average head are."""
    index = np.indices((size,) * 3, np.float32)
    channels = np.zeros((size,) * 3, np.int64)
    for number, row in head._layout().iterrows():
        # Twice as far apart, so that no ball touches another.
        centre = turn @ (2 * row[['x', 'y', 'z']].to_numpy(float)) / SPACING + size / 2
        channels[np.square(index - centre.reshape(3, 1, 1, 1)).sum(0) < 6] = CHANNEL[number]
    return np.moveaxis(np.eye(len(TABLE), dtype=np.float32)[channels], -1, 0)


def test_the_layout_is_that_of_the_shipped_atlas():
    expected = layout(load_atlas()).set_index('index')
    np.testing.assert_allclose(head._layout().to_numpy(), expected.to_numpy(), atol=0.051)


@pytest.mark.parametrize(
    'degrees', [(0, 0, 0), (20, 0, 0), (0, -35, 0), (30, 30, -30), (0, 0, 170), (90, 0, 0)]
)
def test_the_rotation_is_that_of_the_structures(degrees):
    turn = rotation(*degrees)
    found, misfit = upright(balls(turn), TABLE, SPACING)
    assert angle_of(found @ turn) < 0.5
    assert np.linalg.det(found) == pytest.approx(1)
    assert misfit < 0.001


def test_a_mirrored_head_is_never_reflected_back():
    found, misfit = upright(balls(np.eye(3))[:, ::-1], TABLE, SPACING)
    assert np.linalg.det(found) == pytest.approx(1)
    assert misfit > 0.3


@pytest.mark.parametrize('kept', [1, 7])
def test_too_few_structures_tell_nothing(kept):
    posteriors = balls(rotation(40, 0, 0))
    posteriors[kept:] = 0
    found, misfit = upright(posteriors, TABLE, SPACING)
    assert np.array_equal(found, np.eye(3)) and misfit == 1


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
        askew = head._turn(turn.T, inside, 2, model)
        return replace(found, turn=askew, misfit=0.2, certainty=0.8)

    monkeypatch.setattr(head, 'find_head', find)
    result = segment([(image, affine)], sides, device='cpu')
    assert result.turn_degrees == pytest.approx(angle_of(turn), abs=0.01)
    for number, truth in ((2, left), (41, right)):
        wanted = reorient(truth.astype(np.uint8), header, codes)[0] > 0
        found = result.labels == number
        assert 2 * (wanted & found).sum() / (wanted.sum() + found.sum()) > 0.95
        volume = wanted.sum() * SPACING**3
        assert result.soft_volumes[number] == pytest.approx(volume, rel=0.06)


@pytest.mark.parametrize('turn', head._other_quarter_turns(), ids=str)
def test_a_quarter_turn_of_a_grid_shows_the_same_voxels(turn):
    image, _, _, affine = tilted(rotation(20, 30, 40))
    grid = working_grid(affine, [slice(0, 44), slice(2, 48), slice(4, 30)], spacing=2, multiple=16)
    scans = onto_grid(torch.from_numpy(image), affine, grid)[None]
    again = onto_grid(torch.from_numpy(image), affine, head._same_voxels(grid, turn))[None]
    torch.testing.assert_close(head._quarter_turned(scans, turn), again, atol=1e-3, rtol=0)


def test_there_are_23_other_quarter_turns_and_backwards_is_the_first():
    turns = head._other_quarter_turns()
    assert len({t.tobytes() for t in turns}) == 23
    assert np.array_equal(turns[0], np.diag([-1, -1, 1]))
    assert all(np.linalg.det(t) == pytest.approx(1) and angle_of(t) > 89 for t in turns)


def finder(*found):
    """Stands for `find_head`: the first looks find these, all later ones the last."""
    waiting = list(found)
    return lambda *_, **__: waiting.pop(0) if len(waiting) > 1 else waiting[0]


def stand(sides, monkeypatch, *found):
    """Where `put_upright` ends after such looks, and the grids that it asked for."""
    grids = []

    def prepare(target):
        grids.append(target)
        return torch.zeros(1, *target.size)

    monkeypatch.setattr(head, 'find_head', finder(*found))
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


def test_other_directions_are_tried_only_where_there_is_a_brain(sides, monkeypatch):
    better = seen(0.01, 0.9)
    standing, _ = stand(sides, monkeypatch, seen(0.2, 0.5, brain=1.4e5), better)
    assert standing.head is not better
    standing, _ = stand(sides, monkeypatch, seen(0.2, 0.5, brain=1.6e5), better)
    assert standing.head is better


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


@pytest.mark.parametrize(
    ('misfit', 'certainty', 'overruled'),
    [(0.01, 0.8, True), (0.04, 0.86, True), (0.06, 0.99, False), (0.01, 0.73, False)],
)
@pytest.mark.parametrize('direction', [0, 1, 22])
def test_the_header_is_overruled_where_the_score_is_clearly_better(
    sides, monkeypatch, misfit, certainty, overruled, direction
):
    ahead, other = seen(0.04, 0.8), seen(misfit, certainty)
    looks = [NOTHING] * 23
    looks[direction] = other
    # The best of the quarter turns other than backwards are looked at in full.
    again = [other] if direction else []
    standing, grids = stand(sides, monkeypatch, ahead, *looks, *again, NOTHING)
    assert standing.head is (other if overruled else ahead)
    assert len(grids) == 1
    assert (standing.grid is grids[0]) is not overruled


@pytest.mark.parametrize(('direction', 'overruled'), [(0, True), (1, False), (22, False)])
def test_a_direction_in_which_headers_are_hardly_ever_mistaken_has_to_be_much_better(
    sides, monkeypatch, direction, overruled
):
    """By 0.04: enough for a head that faces backwards."""
    ahead, other = seen(0.04, 0.8), seen(0.01, 0.78)
    looks = [NOTHING] * 23
    looks[direction] = other
    again = [other] if direction else []
    standing, _ = stand(sides, monkeypatch, ahead, *looks, *again, NOTHING)
    assert standing.head is (other if overruled else ahead)


@pytest.mark.parametrize(
    ('direction', 'certainty', 'taken'), [(0, 0.6, True), (1, 0.6, False), (1, 0.75, True)]
)
def test_in_an_unlikely_direction_the_score_has_to_be_good(
    sides, monkeypatch, direction, certainty, taken
):
    ahead, other = seen(0.04, 0.5), seen(0.01, certainty)
    looks = [NOTHING] * 23
    looks[direction] = other
    again = [other] if direction else []
    standing, _ = stand(sides, monkeypatch, ahead, *looks, *again, NOTHING)
    assert standing.head is (other if taken else ahead)


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
    settings = update(
        load_settings(), {'size': (160, 160, 160), 'spacing': 1.0, 'group_shares': (1.0,)}
    )
    settings = replace(
        settings, anatomy=replace(settings.anatomy, rotation_deg=0.0, mirror_probability=0.0)
    )
    sample = draw_sample(drawn_brains([(9, 5)]), seed=5, settings=settings)
    image, truth = sample.images[0].numpy(), sample.target.numpy()
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

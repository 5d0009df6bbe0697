import numpy as np
import pytest
import torch

from babyseg_bids.labels import OFFICIAL, label_table, table_of
from babyseg_bids.network import tissue
from babyseg_bids.network.tissue import MOST, redistribute

TABLE = label_table()
NUMBERS = TABLE.indices.tolist()
WHITE, CORTEX, THALAMUS = (NUMBERS.index(n) for n in (2, 3, 10))
CEREBELLUM, THIRD_VENTRICLE = (NUMBERS.index(n) for n in (8, 14))
RIGHT_WHITE, RIGHT_CORTEX = NUMBERS.index(41), NUMBERS.index(42)
SIZE = (48, 40, 44)


def blades():
    """Truth (*size): white matter with thin blades, cortex around it, thalamus inside."""
    truth = torch.full(SIZE, CORTEX)
    truth[14:34, 12:28, 12:32] = WHITE
    truth[18:20, 4:36, 12:32] = WHITE
    truth[28:30, 4:36, 12:32] = WHITE
    truth[22:26, 18:22, 20:24] = THALAMUS
    return truth


def blurred(truth):
    """Posteriors (C, *size) of a network that hardly sees the blades."""
    p = torch.nn.functional.one_hot(truth, len(TABLE)).movedim(-1, 0).float()
    p = torch.nn.functional.avg_pool3d(p[None], 9, 1, 4, count_include_pad=False)[0]
    return p.contiguous()


def scan(truth, *, white, cortex, noise=0.02, drift=0.0):
    values = torch.full((len(TABLE),), 0.3)
    values[WHITE], values[CORTEX] = white, cortex
    generator = torch.Generator().manual_seed(0)
    image = values[truth] + noise * torch.randn(SIZE, generator=generator)
    return image + drift * torch.linspace(-1, 1, SIZE[2])


def dice(p, truth, label=WHITE):
    found = p.argmax(0)
    a, b = found == label, truth == label
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize('drift', [0.0, 0.15])
@pytest.mark.parametrize(('white', 'cortex'), [(0.8, 0.6), (0.4, 0.6)])
def test_thin_white_matter_comes_back_in_either_contrast(white, cortex, drift):
    truth = blades()
    p = blurred(truth)
    before = dice(p, truth)
    scans = scan(truth, white=white, cortex=cortex, drift=drift)[None]
    redistribute(p, scans, TABLE, spacing=1.0)
    assert before < 0.93
    assert dice(p, truth) > 0.97


def test_without_contrast_nothing_changes():
    truth = blades()
    p = blurred(truth)
    before = p.clone()
    redistribute(p, scan(truth, white=0.6, cortex=0.6)[None], TABLE, spacing=1.0)
    assert (p.argmax(0) == before.argmax(0)).float().mean() > 0.99


@pytest.mark.parametrize(('white', 'cortex'), [(0.5, 0.7), (0.5, 0.9)])
def test_the_border_of_a_small_structure_follows_the_scan(white, cortex):
    truth = blades()
    truth[18:30, 14:26, 16:28] = THALAMUS
    # The network has it a voxel to the side, and too round.
    p = blurred(truth.roll(1, 1))
    before = p.clone()
    redistribute(p, scan(truth, white=white, cortex=cortex)[None], TABLE, spacing=1.0)
    assert dice(before, truth, THALAMUS) < 0.9
    assert dice(p, truth, THALAMUS) > 0.97


def test_of_what_is_darker_and_brighter_scans_tell_the_same():
    truth = blades()
    truth[18:30, 14:26, 16:28] = THALAMUS
    image = scan(truth, white=0.5, cortex=0.7)
    p, q = blurred(truth), blurred(truth)
    redistribute(p, image[None], TABLE, spacing=1.0)
    redistribute(q, 1 - image[None], TABLE, spacing=1.0)
    torch.testing.assert_close(p, q, atol=1e-4, rtol=0)


def test_outline_cerebellum_and_thin_ventricles_stay_as_they_are():
    truth = blades()
    truth[:, :, :10] = 0
    truth[:, 30:, 10:20] = CEREBELLUM
    truth[18:30, 14:26, 16:28] = THALAMUS
    truth[22:26, 18:22, 26:30] = THIRD_VENTRICLE
    p = blurred(truth)
    before = p.clone()
    redistribute(p, scan(truth, white=0.8, cortex=0.6)[None], TABLE, spacing=1.0)
    apart = [0, CEREBELLUM, THIRD_VENTRICLE]
    assert torch.equal(p[apart], before[apart])
    assert (p - before).abs().amax((1, 2, 3))[[WHITE, CORTEX, THALAMUS]].min() > 0.1
    torch.testing.assert_close(p.sum(0), before.sum(0), atol=1e-5, rtol=0)
    assert p.min() >= 0


def test_away_from_small_structures_no_probability_changes_sides():
    truth = blades()
    truth[truth == THALAMUS] = WHITE
    truth[24:] = torch.where(truth[24:] == WHITE, RIGHT_WHITE, truth[24:])
    truth[24:] = torch.where(truth[24:] == CORTEX, RIGHT_CORTEX, truth[24:])
    p = blurred(truth)
    before = p.clone()
    redistribute(p, scan(truth, white=0.8, cortex=0.6)[None], TABLE, spacing=1.0)
    assert not torch.equal(p, before)
    for a, b in ((WHITE, CORTEX), (RIGHT_WHITE, RIGHT_CORTEX)):
        torch.testing.assert_close(p[a] + p[b], before[a] + before[b])


def test_the_odds_change_within_bounds_however_many_scans_agree(monkeypatch):
    for name in ('SOFTENED', 'SOFTENED_SMALL'):
        monkeypatch.setattr(tissue, name, 0.0)
    truth = blades()
    p = blurred(truth)
    before = p.clone()
    scans = torch.stack([scan(truth, white=w, cortex=0.5, noise=0.005) for w in (0.9, 0.1, 0.8)])
    redistribute(p, scans, TABLE, spacing=1.0)
    both = (before[WHITE] > 0.01) & (before[CORTEX] > 0.01) & (before[THALAMUS] == 0)
    change = (p[WHITE] / p[CORTEX]) / (before[WHITE] / before[CORTEX])
    assert change[both].max() <= MOST * 1.001 and change[both].min() >= 0.999 / MOST
    changed = p / before
    likely = before > 0.01
    assert changed[likely].max() < MOST**2 and changed[likely].min() > MOST**-2


def test_a_mirrored_child_gets_the_mirrored_result():
    truth = blades()
    truth[24:] = torch.where(truth[24:] == WHITE, RIGHT_WHITE, truth[24:])
    truth[24:] = torch.where(truth[24:] == CORTEX, RIGHT_CORTEX, truth[24:])
    image = scan(truth, white=0.8, cortex=0.6)
    mirror = torch.from_numpy(TABLE.mirror_channels)
    p = blurred(truth)
    q = p.flip(1)[mirror].contiguous()
    redistribute(p, image[None], TABLE, spacing=1.0)
    redistribute(q, image.flip(0)[None], TABLE, spacing=1.0)
    torch.testing.assert_close(q.flip(1)[mirror], p, atol=1e-4, rtol=0)


@pytest.mark.parametrize('size', [(1, 7, 9), (9, 7, 5), (2, 2, 2)])
def test_odd_and_tiny_volumes_and_absent_tissues_are_no_trouble(size):
    p = torch.zeros(len(TABLE), *size)
    p[0] = 1
    redistribute(p, torch.rand(1, *size), TABLE, spacing=2.0)
    assert torch.equal(p[0], torch.ones(size)) and not p[1:].any()


def test_tables_without_the_tissues_are_left_alone():
    table = table_of(OFFICIAL[:2])
    p = torch.rand(len(table), 8, 8, 8)
    before = p.clone()
    redistribute(p, torch.rand(1, 8, 8, 8), table, spacing=1.0)
    assert np.array_equal(p, before)

"""Deformations, mixtures of children, and what lies around the brain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthesis_phantoms import SETTINGS_2D, SETTINGS_3D, TABLE, as_classes, phantom, quiet
from test_atlas import phantom as whole_brain

from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import anatomy, deformation, maps, morphing, proportions, surroundings
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.settings import AnatomySettings, SurroundingsSettings

AROUND = SurroundingsSettings()


def draw(source, settings, seed=0):
    return anatomy.draw_anatomy(source, settings=settings, table=TABLE, draws=Draws(seed))


def dice(a, b):
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


# Deformations.


@pytest.mark.parametrize('size', [(48, 40), (40, 48, 44)])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_warps_are_invertible_and_do_not_fold(size, seed):
    """At the amplitude of the default settings, on the grid that they are used on."""
    s = AnatomySettings()
    velocity = deformation.random_velocity(
        size,
        amplitude=s.warp_sd / morphing.SPACING,
        points=[int(n) for n in s.warp_points],
        draws=Draws(seed),
    )
    there, back = (deformation.integrate(v, steps=maps.FLOW_STEPS) for v in (velocity, -velocity))
    identity = deformation.grid(size)
    round_trip = there + deformation.sample_field(back, identity + there)
    inner = (slice(None), *[slice(6, -6)] * len(size))
    assert round_trip[inner].abs().max() < 0.1
    moved = (identity + there).numpy()
    jacobian = np.stack([np.stack(np.gradient(m), -1) for m in moved], -2)
    assert (np.linalg.det(jacobian) > 0).all()


def test_rotations_keep_lengths():
    for n in (1, 3):
        matrix = deformation.rotation(torch.rand(n))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)))
        assert matrix.det() > 0


# Anatomies.


@pytest.mark.parametrize('dim', [2, 3])
def test_an_undisturbed_anatomy_is_the_map_itself(dim):
    source = phantom(dim)
    settings = quiet(replace(SETTINGS_2D, size=(80,) * dim, spacing=1.0))
    drawn = draw([source], settings)
    cut = (slice(5, 85),) * dim
    assert np.array_equal(drawn.classes.numpy(), source.classes[cut])
    expected = source.distance[cut].astype(float) * maps.DISTANCE_STEP
    np.testing.assert_allclose(drawn.distance, expected, atol=1e-3)


@pytest.mark.parametrize('settings', [SETTINGS_2D, SETTINGS_3D])
def test_a_mirror_image_has_the_same_shape_and_swapped_sides(settings):
    source = phantom(len(settings.size))
    for seed in range(4):
        plain, mirrored = (
            draw(
                [source],
                replace(settings, anatomy=replace(settings.anatomy, mirror_probability=p)),
                seed,
            )
            for p in (0.0, 1.0)
        )
        expected = torch.from_numpy(TABLE.mirror)[plain.classes.long()].flip(0)
        assert torch.equal(mirrored.classes.long(), expected)
        assert torch.equal(mirrored.distance, plain.distance.flip(0))


def test_scales_are_sizes_of_the_output():
    settings = quiet(replace(SETTINGS_2D, size=(120, 120), spacing=1.0))
    areas = [
        (
            draw(
                [phantom()],
                replace(settings, anatomy=replace(settings.anatomy, scale_infant=(k, k))),
            ).classes
            > 0
        )
        .sum()
        .item()
        for k in (1.0, 1.5)
    ]
    assert areas[1] / areas[0] == pytest.approx(1.5**2, rel=0.03)


def test_a_brain_has_the_volume_that_is_asked():
    child = phantom(dim=3)
    settings = quiet(SETTINGS_3D, anatomy__volume_probability=1.0, anatomy__volume=(60.0, 60.0))
    settings = replace(settings, size=(40, 40, 40), spacing=2.0)
    found = draw([child], settings)
    assert child.brain == np.count_nonzero(child.classes)
    assert int((found.classes > 0).sum()) * 8 == pytest.approx(60_000, rel=0.02)


def test_distances_are_millimetres_of_the_output():
    settings = quiet(
        replace(SETTINGS_2D, size=(120, 120), spacing=1.0), anatomy__scale_infant=(1.5, 1.5)
    )
    drawn = draw([phantom()], settings)
    # The disc of 32 mm has become one of 48 mm, 59.5 mm lie between middle and border.
    assert float(drawn.distance[60, 0]) == pytest.approx(59.5 - 48, abs=1)
    assert float(drawn.distance[60, 60]) == pytest.approx(-48, abs=1.5)


# Mixtures.


@pytest.fixture(scope='module')
def family():
    """Two brains of one size and different shape, one larger brain, and a head."""
    out = []
    for name, scale, bulge in (('01mo', 1.0, 0.0), ('12mo', 1.0, 9.0), ('36mo', 1.3, 0.0)):
        numbers = whole_brain(scale)
        # A bulge: rows shift along x, most in the middle.
        rows = np.round(bulge * np.sin(np.linspace(0, np.pi, numbers.shape[1]))).astype(int)
        for y, shift in enumerate(rows):
            numbers[:, y] = np.roll(numbers[:, y], shift, 0)
        numbers = np.pad(numbers, 16)
        classes = as_classes(numbers)
        hull = maps.hull_distance(numbers > 0) / maps.DISTANCE_STEP
        distance = np.clip(np.rint(hull), -127, 127).astype(np.int8)
        sulci = maps.sulcal_directions(numbers > 0, hull * maps.DISTANCE_STEP)
        age = float(name.removesuffix('mo'))
        out.append(maps.TrainingMap(name, classes, distance, False, age=age, sulci=sulci))
    around = out[0].classes.copy()
    near = (out[0].distance * maps.DISTANCE_STEP <= 9) & (around == 0)
    around[near] = TABLE.of(maps.SCALP)[0]
    out.append(replace(out[0], name='head', classes=around, has_head=True, age=None, sulci=None))
    return morphing.estimate_shapes(out, held_out=['36mo'], rounds=(30, 30))


def mixed(family, weights, settings):
    """The mixture of the first two children, seen through the first one's labels."""
    mixture = anatomy.Mixture(family[0], family[:2], np.array(weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy, 'choose', lambda *_, **__: mixture)
        return draw(family, settings)


def test_registration_brings_shapes_together():
    """A ball and an egg, two labels each; the flow of the result turns one into the other."""
    axes = torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing='ij')

    def shares(x, y, z):
        radius = ((axes[0] / x) ** 2 + (axes[1] / y) ** 2 + (axes[2] / z) ** 2).sqrt()
        outer, inner = (torch.sigmoid(8 * (k - radius)) for k in (1.0, 0.5))
        return torch.stack([outer - inner, inner])

    ball, egg = shares(6, 6, 6), shares(4.5, 9, 6)
    velocity = morphing.register(ball, egg, start=torch.zeros(3, 24, 24, 24), steps=40)
    moved = morphing.warp(ball, velocity)
    assert morphing.overlap(ball, egg) < 0.8 and morphing.overlap(moved, egg) > 0.9
    back = morphing.warp(egg, -velocity)
    assert morphing.overlap(back, ball) > 0.88


def test_size_goes_into_the_matrix_and_shape_into_the_velocity(family):
    one, other, larger = (m.shape for m in family[:3])
    assert one.template is other.template is larger.template
    ratio = np.linalg.det(larger.matrix) / np.linalg.det(one.matrix)
    assert ratio == pytest.approx(1.3**3, rel=0.15)
    assert np.abs(one.velocity + other.velocity).max() < 1e-3  # They founded the template.


def test_a_mixture_lies_between_its_children(family):
    settings = quiet(replace(SETTINGS_3D, size=(48, 56, 48), spacing=1.5))
    first, half, second = (
        mixed(family, w, settings).classes > 0 for w in ([1, 0], [0.5, 0.5], [0, 1])
    )
    assert dice(half, first) > dice(second, first) and dice(half, second) > dice(second, first)
    alone = draw([family[0]], settings).classes > 0
    assert dice(first, alone) > 0.98


def test_the_age_of_a_mixture_is_the_weighted_mean(family):
    mixture = anatomy.Mixture(family[0], family[:3], np.array([0.5, 0.25, 0.25]))
    assert mixture.age == pytest.approx(0.5 + 3 + 9)
    assert anatomy.Mixture(family[3], [family[3]], np.ones(1)).age is None


def test_only_children_are_mixed_and_never_with_themselves(family):
    settings = AnatomySettings(morph_probability=1.0, morph_children=3)
    for seed in range(30):
        mixture = anatomy.choose(family, settings, draws=Draws(seed))
        names = [m.name for m in mixture.others]
        assert len(set(names)) == len(names)
        assert mixture.weights.sum() == pytest.approx(1)
        assert ('head' in names) == (names == ['head'])
        assert len(names) > 1 or mixture.source.has_head


def test_ventricles_widen_and_sulci_move_by_what_is_asked(family):
    settings = quiet(replace(SETTINGS_3D, size=(64, 72, 64), spacing=1.0))
    ventricles = torch.tensor(TABLE.of(4, 43))
    volumes = []
    for width in (-2.0, 0.0, 3.0):
        s = replace(settings.anatomy, ventricles_probability=1.0, ventricles=(width, width))
        drawn = draw([family[0]], replace(settings, anatomy=s))
        volumes.append(int(torch.isin(drawn.classes, ventricles).sum()))
    assert volumes[0] < volumes[1] < volumes[2]
    directions = family[0].sulci
    assert np.linalg.norm(directions, axis=0).max() <= 1.001


def ball():
    """White matter of 12 mm in a shell of cortex of 6 mm, the left half and the right half."""
    axes = np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing='ij')
    radius = np.sqrt(sum(a**2 for a in axes))
    numbers = np.where(radius < 12, 2, np.where(radius < 18, 3, 0))
    numbers[24:] = np.where(numbers, numbers + 39, 0)[24:]
    return numbers


def test_the_border_of_white_matter_and_cortex_moves_by_what_is_asked():
    numbers = ball()
    classes = as_classes(numbers)
    depth = maps.cortical_depth(classes)
    flat, around = (torch.from_numpy(x.astype(np.int32)).view(-1) for x in (classes, depth))
    for amount in (-1.5, -0.5, 0.5, 1.0, 1.5, 3.0):
        moved = anatomy.thin_cortex(flat, around, amount, TABLE).view(classes.shape).numpy()
        shown = TABLE.numbers[moved]
        white = np.isin(shown, (2, 41))
        # Half of the cortex stays.
        expected = min(12 + amount, 15)
        assert (white.sum() * 3 / (4 * np.pi)) ** (1 / 3) == pytest.approx(expected, abs=0.25)
        assert ((shown > 0) == (numbers > 0)).all() and ((shown > 40) == (numbers > 40)).all()


@pytest.mark.parametrize(('share', 'expected'), [(0.33, 0.33), (0.41, 0.41), (0.9, 0.58)])
def test_white_matter_grows_until_its_share_or_half_of_the_cortex_is_reached(share, expected):
    numbers = ball()
    drawn = maps.prepare_labels(numbers, name='ball')
    grown = proportions.with_white_matter(drawn, share)
    assert proportions.white_matter_share(drawn) == pytest.approx(0.30, abs=0.01)
    assert proportions.white_matter_share(grown) == pytest.approx(expected, abs=0.02)
    before, after = (TABLE.numbers[m.classes] for m in (drawn, grown))
    assert ((before > 0) == (after > 0)).all() and ((before > 40) == (after > 40)).all()
    assert (after[np.isin(before, (2, 41))] == before[np.isin(before, (2, 41))]).all()


def test_a_map_with_enough_white_matter_or_without_cortex_stays_as_it_is():
    drawn = maps.prepare_labels(ball(), name='ball')
    assert proportions.with_white_matter(drawn, 0.29) is drawn
    white = maps.prepare_labels(np.full((8, 8, 8), 2), name='white')
    assert proportions.with_white_matter(white, 0.5) is white


def test_published_shares_fall_from_birth_to_two_years():
    shares = [proportions.published_share(age) for age in (0, 1, 1.5, 6, 12, 24, 90)]
    assert shares == pytest.approx([0.50, 0.50, 0.485, 0.40, 0.36, 0.35, 0.355])


def test_without_cortex_no_border_moves():
    depth = maps.cortical_depth(as_classes(np.full((6, 6, 6), 2)))
    assert (depth == -128).all()


def test_sulci_point_outwards_where_the_surface_is_folded():
    """A ball with one deep groove: vectors are long in the groove and point out of it."""
    axes = np.meshgrid(*[np.arange(60) - 29.5] * 3, indexing='ij')
    ball = sum(a**2 for a in axes) < 22**2
    groove = (np.abs(axes[0]) < 2) & (axes[2] > 8)
    brain = ball & ~groove
    directions = maps.sulcal_directions(brain, maps.hull_distance(brain))
    length = np.linalg.norm(directions, axis=0)
    assert directions[2, 10, 10, 14] > 0.5
    assert length[10, 10, 14] > 3 * length[10, 10, 4]


def test_a_donor_gives_its_head_and_leaves_the_brain_alone(family):
    settings = quiet(
        replace(SETTINGS_3D, size=(64, 72, 64), spacing=1.5), anatomy__adult_share=0.0
    )
    plain = draw(family, settings)
    given = draw(family, replace(settings, surroundings=replace(AROUND, donor_probability=1.0)))
    assert given.has_head and not plain.has_head
    inside = plain.classes > 0
    assert torch.equal(given.classes[inside], plain.classes[inside])
    (scalp,) = TABLE.of(maps.SCALP)
    assert (given.classes == scalp).any() and not (plain.classes == scalp).any()
    brain = torch.from_numpy(TABLE.channel > 0)
    assert not brain[given.classes[~inside].long()].any()


# Surroundings.


def test_layers_surround_the_brain_from_inside_out():
    source = phantom()
    classes = torch.from_numpy(source.classes).int()
    distance = torch.from_numpy(source.distance).float() * maps.DISTANCE_STEP
    settings = SurroundingsSettings(dura_probability=1.0)
    out = surroundings.add_layers(classes, distance, settings, table=TABLE, draws=Draws(0))
    brain = classes > 0
    assert torch.equal(out[brain], classes[brain])
    order = (maps.CSF, maps.DURA, maps.SKULL, maps.SCALP)
    depth = [distance[out == c].mean() for c in TABLE.of(*order)]
    assert depth == sorted(depth)
    marrow = distance[out == TABLE.of(maps.MARROW)[0]]
    skull = distance[out == TABLE.of(maps.SKULL)[0]]
    assert skull.min() < marrow.mean() < skull.max()


@pytest.mark.parametrize(
    ('settings', 'loses', 'keeps_more'),
    [
        (SurroundingsSettings(exact_strip_share=1.0), False, False),
        (SurroundingsSettings(exact_strip_share=0.0, strip_margin=(5, 5)), False, True),
        (SurroundingsSettings(exact_strip_share=0.0, strip_margin=(-5, -5)), True, False),
    ],
    ids=['exact', 'loose', 'tight'],
)
def test_a_brain_extraction_may_be_exact_loose_or_tight(settings, loses, keeps_more):
    source = phantom()
    classes = torch.from_numpy(source.classes).int()
    distance = torch.from_numpy(source.distance).float() * maps.DISTANCE_STEP
    for seed in range(3):
        mask = surroundings.strip_skull(
            classes, distance, settings, table=TABLE, draws=Draws(seed)
        )
        assert bool((~mask[classes > 0]).any()) == loses
        assert bool(mask[classes == 0].any()) == keeps_more


def test_a_hindbrain_that_was_cut_away_is_missing_as_a_whole():
    cerebellum, stem, cortex = TABLE.of(8, 16, 3)
    classes = torch.full((10, 10), cortex, dtype=torch.int32)
    classes[:4, :4], classes[5:, :4] = cerebellum, stem
    left = [
        surroundings.without_hindbrain(classes, table=TABLE, draws=Draws(s)) for s in range(12)
    ]
    for mask in left:
        assert not mask[classes == cerebellum].any() and mask[classes == cortex].all()
    stems = [bool(mask[classes == stem].any()) for mask in left]
    assert any(stems) and not all(stems)


def test_a_face_is_cut_off_in_front_and_below():
    axes = torch.meshgrid(*[torch.arange(40.0) - 20] * 3, indexing='ij')
    distance = sum(a**2 for a in axes).sqrt() - 10
    mask = surroundings.deface(distance, spacing=1.0, draws=Draws(0))
    assert mask[distance <= 0].all()
    assert not mask[20, 38, 2] and mask[20, 2, 38]


def test_boxes_and_planes_are_blanked():
    for seed in range(6):
        left = surroundings.occlusions((30, 32, 34), most=3, draws=Draws(seed))
        assert 0 < int((~left).sum()) < left.numel() / 2


def test_every_number_of_the_table_has_one_mirror():
    assert TABLE.channel.max() == len(label_table()) - 1
    np.testing.assert_array_equal(TABLE.mirror[TABLE.mirror], np.arange(len(TABLE)))
    mirrored = label_table().mirror_channels[TABLE.channel]
    np.testing.assert_array_equal(TABLE.channel[TABLE.mirror], mirrored)

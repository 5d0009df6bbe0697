import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from synthesis_phantoms import phantom

from babyseg_bids.errors import InputError, ModelError, UsageError
from babyseg_bids.network import load_model
from babyseg_bids.network.compass import COMPASS_NETWORK, FORMAT
from babyseg_bids.network.layout import quarter_turned, quarter_turns
from babyseg_bids.network.unet import NetworkConfig
from babyseg_bids.network.weights import read_network
from babyseg_bids.synthesis.finetune import drawn_brains
from babyseg_bids.synthesis.losses import dice_cross_entropy, hard_dice
from babyseg_bids.synthesis.maps import save_maps
from babyseg_bids.synthesis.optimiser import Muon, orthogonalise
from babyseg_bids.synthesis.train import (
    Stage,
    SyntheticBatches,
    Trainer,
    TrainingPlan,
    compass_plan,
)
from babyseg_bids.synthesis.train_cli import DEFAULT_STAGES, main

NETWORK = NetworkConfig(labels=28, encoder=(4, 4), decoder=(4, 4))
PLAN = TrainingPlan(
    (Stage(5.0, (16, 16, 16), 4, 1), Stage(4.0, (16, 16, 16), 4, 1)), network=NETWORK, warmup=2
)


def reference_loss(logits, target):
    """The loss as automatic differentiation sees it."""
    p = logits.softmax(1).movedim(1, -1).reshape(-1, logits.shape[1])
    one_hot = torch.nn.functional.one_hot(target.reshape(-1), logits.shape[1])
    count = one_hot.sum(0)
    dice = (2 * (p * one_hot).sum(0) + 1) / (p.sum(0) + count + 1)
    cross_entropy = -(p * one_hot).sum(1).log().mean()
    return cross_entropy + (1 - dice)[count > 0].mean()


def test_loss_and_its_gradient_agree_with_automatic_differentiation():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 5, 7, requires_grad=True)
    target = torch.randint(0, 5, (2, 5, 7))  # Label 5 is absent.
    ours, theirs = dice_cross_entropy(logits, target), reference_loss(logits, target)
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_a_perfect_prediction_costs_next_to_nothing():
    target = torch.randint(0, 4, (1, 8, 8))
    logits = 30 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    assert dice_cross_entropy(logits, target) < 1e-3


def test_hard_dice_counts_overlap():
    a = torch.tensor([0, 1, 1, 2])
    b = torch.tensor([0, 1, 2, 2])
    dice = hard_dice(a, b, classes=4)
    np.testing.assert_allclose(dice[:3], [1, 2 / 3, 2 / 3], rtol=1e-6)
    assert dice[3].isnan()


def test_stages_are_read_and_wrong_ones_named():
    assert Stage.parse('2.0:64x80x64:10:2') == Stage(2.0, (64, 80, 64), 10, 2)
    with pytest.raises(UsageError, match='coarse'):
        Stage.parse('1.0:64x80x64:10:2:coarse')
    with pytest.raises(UsageError, match=r'2\.0:64:10'):
        Stage.parse('2.0:64:10')


def test_default_stages_fit_the_network_and_others_are_refused():
    stages = tuple(Stage.parse(s) for s in DEFAULT_STAGES)
    assert TrainingPlan(stages).steps == sum(s.steps for s in stages)
    with pytest.raises(UsageError, match='40x48x40; the network needs multiples of 32'):
        TrainingPlan((Stage(4.0, (40, 48, 40), 1, 1),))


def test_orthogonalised_matrices_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 40), (40, 6), (5, 5)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.min() > 0.3 and values.max() < 1.3


def test_the_optimiser_fits_kernels_and_vectors():
    torch.manual_seed(0)
    wanted = torch.nn.Conv2d(3, 4, 3)
    layer = torch.nn.Conv2d(3, 4, 3)
    optimiser = Muon(layer.parameters(), rate=0.03, weight_decay=0.0)
    x = torch.randn(8, 3, 8, 8)
    losses = []
    for step in range(150):
        optimiser.param_groups[0]['lr'] = 0.03 * (1 - step / 150)
        loss = (layer(x) - wanted(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


def test_weight_decay_spares_vectors():
    layer = torch.nn.Conv2d(3, 4, 3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    optimiser = Muon(layer.parameters(), rate=0.1, weight_decay=1.0)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    torch.testing.assert_close(layer.weight.detach(), 0.9 * before['weight'])
    assert torch.equal(layer.bias, before['bias'])


def test_a_training_may_start_from_a_model_that_lacks_layers(tmp_path):
    first = Trainer(PLAN, tmp_path / 'a')
    second = Trainer(replace(PLAN, seed=1), tmp_path / 'b')
    known = {k: v for k, v in first.network.state_dict().items() if not k.startswith('add')}
    second.start_from(known)
    for name, weight in known.items():
        assert torch.equal(second.averaged.state_dict()[name], weight)
    with pytest.raises(InputError, match='do not fit'):
        second.start_from({'enc.0.0.conv_b.weight': torch.zeros(1)})
    with pytest.raises(InputError, match='another network'):
        second.start_from({'other': torch.zeros(1)})


def test_the_rate_warms_up_and_ends_at_zero():
    rates = [PLAN.rate_at(s) for s in range(PLAN.steps + 1)]
    assert rates[0] == PLAN.rate / 2 and rates[2] == PLAN.rate
    assert rates[-1] == pytest.approx(0)
    assert [PLAN.stage_at(s) for s in (0, 3, 4, 7)] == [0, 0, 1, 1]


def test_the_same_step_draws_the_same_batch():
    maps = [phantom(3)]
    a = SyntheticBatches(maps, PLAN, 0, 8)[3]
    b = SyntheticBatches(maps, PLAN, 3, 8)[0]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_share_of_the_steps_sees_more_in_wider_voxels():
    source = [phantom(3)]
    size = PLAN.stages[0].size
    shares = {wide: replace(PLAN, wide=wide) for wide in (0.0, 1.0)}
    close, far = (SyntheticBatches(source, p, 0, 8)[0][1] for p in shares.values())
    assert close.shape[1:] == size
    assert far.shape[1:] == PLAN.network.fitting([0.75 * n for n in size])
    # The same brain, of an eighth of the voxels.
    assert 4 < (close > 0).sum() / (far > 0).sum() < 16


def test_brains_get_the_volume_that_they_have_at_inference_but_in_wide_voxels():
    source = phantom(3)
    half = source.brain / 2000
    anatomy = replace(PLAN.synthesis.anatomy, volume=(half, half))
    plan = replace(PLAN, synthesis=replace(PLAN.synthesis, anatomy=anatomy))
    means = []
    for enlarged, wide in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        batches = SyntheticBatches([source], replace(plan, enlarged=enlarged, wide=wide), 0, 8)
        spacing = PLAN.stages[0].spacing * (1 + wide)
        means.append(np.mean([int((batches[i][1] > 0).sum()) for i in range(8)]) * spacing**3)
    # Otherwise the phantom is drawn 0.85 to 1.2 times as large as it is.
    as_it_is, at_inference, wider = np.array(means) / source.brain
    assert at_inference < 0.8 and as_it_is > 1.2 and wider > 1.2


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path):
    maps = [phantom(3)]
    torch.use_deterministic_algorithms(True)
    try:
        whole = Trainer(PLAN, tmp_path / 'whole')
        whole.run(maps, workers=0)
        Trainer(PLAN, tmp_path / 'parts').run(maps, workers=0, stop=3)
        resumed = Trainer(PLAN, tmp_path / 'parts')
        assert resumed.step == 3
        resumed.run(maps, workers=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert resumed.step == whole.step == 8
    for a, b in zip(whole.averaged.parameters(), resumed.averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_validation_writes_a_figure_and_a_picture(tmp_path):
    trainer = Trainer(PLAN, tmp_path)
    trainer.run([phantom(3)], workers=0, stop=4, validation=[phantom(3)], validate_every=2)
    lines = (tmp_path / 'validation.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in lines] == ['step', '2', '4']
    height, width, _ = imread(tmp_path / 'validation-000004.png').shape
    assert (height, width) == (3 * 16, 3 * 16)


def _train_beside(rank, folder, port):
    """One of two processes of a training."""
    torch.set_num_threads(1)
    address = f'tcp://127.0.0.1:{port}'
    torch.distributed.init_process_group('gloo', address, rank=rank, world_size=2)
    trainer = Trainer(PLAN, folder / str(rank))
    trainer.run([phantom(3)], workers=0, stop=2)
    torch.save(trainer.network.state_dict(), folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def test_processes_of_one_training_see_other_samples_and_keep_the_same_weights(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_train_beside, (tmp_path, port), nprocs=2)
    a, b = (torch.load(tmp_path / f'{r}.pt', weights_only=True) for r in (0, 1))
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert (tmp_path / '0' / 'checkpoint.pt').exists()
    assert not (tmp_path / '1' / 'checkpoint.pt').exists()
    batches = [SyntheticBatches([phantom(3)], PLAN, 0, 2, rank=r)[0][1] for r in (0, 1)]
    assert not torch.equal(*batches)


def test_bfloat16_trains_float32_weights(tmp_path):
    trainer = Trainer(replace(PLAN, bfloat16=True), tmp_path)
    loss, _ = trainer.train_step(*SyntheticBatches([phantom(3)], PLAN, 0, 1)[0])
    plain = Trainer(PLAN, tmp_path / 'plain')
    expected, _ = plain.train_step(*SyntheticBatches([phantom(3)], PLAN, 0, 1)[0])
    assert loss == pytest.approx(expected, rel=0.02)
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    Trainer(PLAN, tmp_path).save()
    other = TrainingPlan(PLAN.stages, network=NetworkConfig(labels=28, encoder=(2,), decoder=(2,)))
    with pytest.raises(InputError, match='another network'):
        Trainer(other, tmp_path)


@pytest.fixture(scope='module')
def brains():
    return drawn_brains([(9, 5)])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    from babyseg_bids.network.unet import GroupUNet

    images, target = SyntheticBatches([phantom(3)], PLAN, 0, 8)[0]
    network = GroupUNet(NETWORK)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = dice_cross_entropy(network(images.float()), target.long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_checkpoint_of_another_version_is_named(tmp_path, capsys):
    trainer = Trainer(PLAN, tmp_path)
    trainer.save()
    state = torch.load(trainer.checkpoint, weights_only=True)
    state['network_config']['attention'] = 8
    torch.save(state, trainer.checkpoint)
    assert main(['export', str(tmp_path), '--out', str(tmp_path / 'm.safetensors')]) == 1
    assert 'another version of babyseg' in capsys.readouterr().err


def test_the_command_trains_and_exports_a_model_that_loads(tmp_path):
    maps = tmp_path / 'maps.npz'
    save_maps(maps, [phantom(3)])
    run = tmp_path / 'run'
    threads = str(torch.get_num_threads())
    assert (
        main(
            [
                'fit',
                str(maps),
                '--out',
                str(run),
                '--stage',
                '6.0:32x32x32:2:1',
                '--threads',
                threads,
                '--workers',
                '0',
            ]
        )
        == 0
    )
    out = tmp_path / 'model.safetensors'
    assert main(['export', str(run), '--out', str(out), '--name', 'x']) == 0
    assert load_model(out).training['steps'] == 2
    assert load_model(out).spacing == 6
    assert main(['export', str(tmp_path), '--out', str(out)]) == 1


def test_exported_weights_are_mixed_half_and_half_with_those_of_another_model(tmp_path, capsys):
    networks = []
    for seed, folder in enumerate(('a', 'b')):
        trainer = Trainer(replace(PLAN, seed=seed), tmp_path / folder)
        trainer.save()
        networks.append(trainer.averaged.state_dict())
        out = str(tmp_path / f'{folder}.safetensors')
        assert main(['export', str(tmp_path / folder), '--out', out]) == 0
    mixed = tmp_path / 'mixed.safetensors'
    export = ['export', str(tmp_path / 'b'), '--out', str(mixed), '--mix']
    assert main([*export, str(tmp_path / 'a.safetensors')]) == 0
    for name, x in load_model(mixed).network.state_dict().items():
        expected = (networks[0][name] + networks[1][name]) / 2
        # Weights are stored in half precision.
        torch.testing.assert_close(x, expected, atol=1e-3, rtol=2e-3)
    assert load_model(mixed).training['mixed_with'].endswith('a.safetensors')
    mixed.unlink()
    assert main([*export, 'default']) != 0 and not mixed.exists()
    assert 'another network' in capsys.readouterr().err


def test_the_compass_sees_samples_after_several_quarter_turns(brains):
    plan = compass_plan([Stage(8.0, (32, 32, 32), 4, 4)], seed=3)
    images, target = SyntheticBatches(brains, plan, 0, 4)[2]
    assert images.shape == (4, 1, 32, 32, 32) and target.shape == (4, 32, 32, 32)
    assert all(target[i].unique().tolist() == [0, 1, 2, 3, 4] for i in range(4))
    first, second = target[0], target[1]
    same = [torch.equal(quarter_turned(first[None], t)[0], second) for t in quarter_turns()]
    assert sum(same) == 1 and not same[0]
    again = SyntheticBatches(brains, plan, 2, 4)[0]
    assert torch.equal(images, again[0]) and torch.equal(target, again[1])


def test_a_compass_needs_brains_and_cubes():
    plan = compass_plan([Stage(6.0, (32, 32, 32), 2, 2)])
    with pytest.raises(InputError, match='0 of 64 samples show enough of a brain'):
        SyntheticBatches([phantom(3)], plan, 0, 2)[0]
    with pytest.raises(UsageError, match='as long along each axis'):
        compass_plan([Stage(6.0, (32, 48, 32), 2, 2)])


def test_the_command_trains_and_exports_a_compass(tmp_path, brains):
    maps, run, out = tmp_path / 'maps.npz', tmp_path / 'run', tmp_path / 'x.safetensors'
    save_maps(maps, brains)
    fit = ['fit', str(maps), '--compass', '--out', str(run), '--workers', '0']
    threads = ['--threads', str(torch.get_num_threads())]
    assert main([*fit, '--stage', '8.0:32x32x32:2:2', *threads]) == 0
    assert main(['export', str(run), '--out', str(out)]) == 0
    network, about = read_network(out, FORMAT)
    assert network.config == COMPASS_NETWORK and about['training']['steps'] == 2
    with pytest.raises(ModelError, match='not a babyseg model'):
        load_model(out)


def test_a_compass_segments_nothing(tmp_path, brains, capsys):
    maps = tmp_path / 'maps.npz'
    save_maps(maps, brains)
    for option in (['--validate-every', '2'], ['--start-from', 'default']):
        assert main(['fit', str(maps), '--compass', '--out', str(tmp_path / 'run'), *option]) == 2
        assert f'leave {option[0]} out' in capsys.readouterr().err

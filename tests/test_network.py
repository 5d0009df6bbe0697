from functools import partial
from pathlib import Path

import pytest
import torch

from babyseg_bids.errors import ModelError
from babyseg_bids.network.convolution import convolve, convolve_joined
from babyseg_bids.network.layers import (
    Activation,
    GroupConv,
    InstanceNorm,
    concatenate,
    flat,
    from_patches,
    max_pool,
    to_patches,
    upsample,
)
from babyseg_bids.network.unet import (
    GroupUNet,
    NetworkConfig,
    official_config,
    official_network,
    rescale,
)
from babyseg_bids.network.winograd import add_upsampled, convolve_tiles

VECTORS = Path(__file__).parents[2] / 'shared' / 'vectors'
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason='no official vectors here')


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def small(dim=2, **kwargs):
    config = NetworkConfig(labels=4, encoder=(4, 6), decoder=(6, 5), head=(4,), dim=dim, **kwargs)
    return GroupUNet(config).eval()


@pytest.mark.parametrize('learning', [True, False])
@pytest.mark.parametrize('scans', [1, 2, 3, 4])
@pytest.mark.parametrize('dim', [1, 2, 3])
def test_group_convolution_follows_its_definition(dim, scans, learning):
    layer = GroupConv(dim, 3, 5)
    x = torch.randn(2, scans, 3, *[7] * dim)
    mean = layer.conv_m(x.mean(1))
    expected = torch.stack([(layer.conv_b(scan) + mean) / 2 for scan in x.unbind(1)], 1)
    given = x.clone()
    with torch.set_grad_enabled(learning):
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, given)


@pytest.mark.parametrize('scans', [1, 2, 3])
@pytest.mark.parametrize('coarse', [0, 64])
def test_a_wide_group_convolution_follows_its_definition(scans, coarse, monkeypatch):
    monkeypatch.setattr('babyseg_bids.network.convolution._VALUES', 0)
    layer = GroupConv(3, 40 + coarse, 32)
    x = torch.randn(1, scans, 40, 6, 10, 8)
    below = torch.randn(1, scans, coarse, 3, 5, 4) if coarse else None
    expected = layer(x, below)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, below), expected, atol=2e-5, rtol=1e-5)


def test_one_scan_is_treated_as_two_copies_of_it():
    layer = GroupConv(3, 2, 3)
    x = torch.randn(1, 1, 2, 5, 6, 7)
    torch.testing.assert_close(layer(x), layer(x.expand(1, 2, -1, -1, -1, -1))[:, :1])


def test_instance_norm_gives_each_scan_and_channel_zero_mean_and_unit_deviation():
    x = 5 + 3 * torch.randn(2, 3, 4, 9, 8, 7)
    y = InstanceNorm(4)(x)
    torch.testing.assert_close(y.mean((3, 4, 5)), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        y.std((3, 4, 5), unbiased=False), torch.ones(2, 3, 4), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ('dtype', 'error'), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.02)]
)
def test_gradient_of_instance_norm_is_that_of_torch(layout, dtype, error):
    x, gradient = 3 + 2 * torch.randn(2, 2, 3, 4, 9, 8, 7, dtype=torch.float64)
    norm = InstanceNorm(4).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = x.requires_grad_()
    parameters = [norm.weight, norm.bias]
    y = torch.group_norm(x.flatten(0, 1), 4, norm.weight, norm.bias, norm.eps).view(x.shape)
    expected = torch.autograd.grad(y, [x, *parameters], gradient)
    z = x.detach().flatten(0, 1).to(dtype).to(memory_format=layout).requires_grad_()
    if dtype != torch.float64:
        norm.float()
    found = torch.autograd.grad(
        norm(z.unflatten(0, (2, 3))), [z, norm.weight, norm.bias], gradient.to(dtype)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a.double().view(b.shape) - b).norm() <= error * b.norm()


@pytest.mark.parametrize('dim', [2, 3])
def test_pooling_and_upsampling_keep_scans_and_channels(dim):
    x = torch.randn(2, 3, 4, *[8] * dim)
    assert max_pool(x).shape == (2, 3, 4, *[4] * dim)
    assert upsample(x).shape == (2, 3, 4, *[16] * dim)
    assert concatenate(x, x[:, :, :1]).shape == (2, 3, 5, *[8] * dim)


@pytest.mark.parametrize('dim', [2, 3])
@pytest.mark.parametrize('scans', [1, 2, 4])
def test_network_gives_logits_for_any_number_of_scans(dim, scans):
    y = small(dim)(torch.rand(2, scans, *[8] * dim))
    assert y.shape == (2, 4, *[8] * dim)
    assert y.isfinite().all()


def test_order_and_repetition_of_scans_do_not_matter():
    network = small(3)
    x = torch.rand(1, 3, 8, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), network(x[:, [2, 0, 1]]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(x), network(torch.cat([x, x], 1)), atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter():
    network = small(2).train()
    network(torch.rand(1, 2, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(('batch', 'scans'), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_gradients_do_not_depend_on_the_memory_layout(batch, scans):
    # Some of torch's layers go wrong here without a word, and training collapses.
    x = torch.rand(batch, scans, 16, 16, 16)
    target = torch.randint(0, 4, (batch, 16, 16, 16))
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(2)
        network = small(3).to(memory_format=layout)
        torch.nn.functional.cross_entropy(network(x), target).backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ('batch', 'scans', 'learning'),
    [(1, 1, False), (1, 2, False), (2, 1, False), (2, 1, True), (2, 2, True)],
)
def test_layers_keep_the_channels_last_layout(batch, scans, learning):
    config = NetworkConfig(28, (8, 16), (16, 8), (16,))
    network = GroupUNet(config).to(memory_format=torch.channels_last_3d)
    lost = []

    def look(name, _module, _arguments, result):
        if not flat(result).is_contiguous(memory_format=torch.channels_last_3d):
            lost.append(name)

    for name, module in network.named_modules():
        if isinstance(module, GroupConv | InstanceNorm | Activation):
            module.register_forward_hook(partial(look, name))
    with torch.set_grad_enabled(learning):
        network(torch.rand(batch, scans, 16, 16, 16))
    assert not lost


@pytest.mark.parametrize('dim', [1, 2, 3])
@pytest.mark.parametrize('patch', [1, 2, 3])
def test_patches_and_back_are_the_same_voxels(dim, patch):
    x = torch.rand(2, 1, *[2 * patch, 3 * patch, 4 * patch][:dim])
    y = to_patches(x, patch)
    assert y.shape == (2, 1, patch**dim, *[2, 3, 4][:dim])
    # The first channel is the first place of each patch, the last axis changing fastest.
    assert torch.equal(y[:, :, 0], x[(..., *[slice(None, None, patch)] * dim)])
    assert torch.equal(from_patches(y[:, 0], patch)[:, 0], x[:, 0])


def test_a_network_of_patches_gives_each_voxel_its_own_logits():
    network = small(dim=3, patch=2)
    assert network.config.multiple == 8 and network.config.fitting((1, 8, 8.5)) == (8, 8, 16)
    x = torch.rand(2, 3, 8, 16, 8)
    logits = network(x)
    assert logits.shape == (2, 4, 8, 16, 8)
    weight, bias = network.classifier()
    places = torch.nn.functional.linear(network.features(x).movedim(1, -1), weight, bias)
    torch.testing.assert_close(places[..., 4:8], logits[..., ::2, ::2, 1::2].movedim(1, -1))


def test_patches_without_a_head_are_refused():
    with pytest.raises(ModelError, match='needs a head'):
        NetworkConfig(labels=2, encoder=(2,), decoder=(2,), patch=2)


def test_a_size_that_does_not_fit_is_named():
    with pytest.raises(ModelError, match=r'multiples of 4, not \(6, 8\)'):
        small(2)(torch.rand(1, 1, 6, 8))


def test_unequal_encoder_and_decoder_are_refused():
    with pytest.raises(ModelError, match='2 encoder but 1 decoder'):
        NetworkConfig(labels=2, encoder=(1, 2), decoder=(1,))


def test_official_rescaling_maps_quantiles_to_zero_and_one():
    x = torch.arange(101.0).view(1, 1, 101)
    y = rescale(x)
    assert y[0, 0, 1] == 0 and y[0, 0, 99] == 1
    assert y.min() == 0 and y.max() == 1
    torch.testing.assert_close(y[0, 0, 50], torch.tensor(0.5))
    assert (rescale(torch.full((1, 1, 9), 7.0)) == 0).all()


def test_official_weights_of_another_shape_are_refused():
    config = {'dim': 2, 'out': 3, 'enc': [1, 4], 'dec': [4, 4], 'add': [], 'rep': 2}
    with pytest.raises(ModelError, match='do not fit'):
        official_network(config, {'enc.0.0.conv_b.weight': torch.zeros(1)})


@needs_vectors
@pytest.mark.parametrize(
    ('file', 'pairs'),
    [
        ('small_scaled_vector.pt', [('input_G1', 'output_G1'), ('input_G3', 'output_G3')]),
        ('small2d_vector.pt', [('input', 'output')]),
    ],
)
@pytest.mark.parametrize('plain', [False, True])
def test_official_weights_give_the_official_outputs(benchmark_module, file, pairs, plain):
    """In our engine, and in the plain reading of the paper that benchmarks compare it with."""
    vector = torch.load(VECTORS / file, weights_only=False)
    build = benchmark_module('inference').Plain if plain else official_network
    network = build(vector['config'], vector['state_dict'])
    with torch.inference_mode():
        for given, expected in pairs:
            difference = (network(vector[given]) - vector[expected]).abs().max()
            assert difference < 1e-5


def test_merging_scans_is_the_same_before_and_after_the_last_step_up():
    network = small(3).requires_grad_(False)
    x = torch.rand(1, 3, 8, 8, 8)
    skip, coarse = network.levels(x)
    late = concatenate(skip, upsample(coarse))
    expected = network.add(late.mean(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(network(x), expected)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        network = small(3)
        network.checkpointing = checkpointing
        network(torch.rand(1, 2, 16, 16, 16)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dim', [2, 3])
@pytest.mark.parametrize('add', [[], [6]])
def test_the_official_network_without_gradients_equals_the_one_with_them(dim, add, monkeypatch):
    config = {'dim': dim, 'out': 5, 'enc': [1, 4], 'dec': [4, 4], 'add': add, 'rep': 2}
    weights = GroupUNet(official_config(config)).state_dict()
    network = official_network(config, weights)
    x = torch.rand(1, 3, *[24] * dim)
    expected = network(x)
    monkeypatch.setattr('babyseg_bids.network.convolution._PAIRS', 0)
    monkeypatch.setattr('babyseg_bids.network.convolution._VALUES', 0)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize('size', [(1, 1, 1), (7, 1, 2), (2, 4, 1), (3, 6, 5), (5, 9, 21)])
def test_adding_the_convolution_of_what_is_upsampled_follows_its_definition(size):
    torch.manual_seed(4)
    coarse, weight = torch.randn(1, 20, *size), torch.randn(11, 20, 3, 3, 3) / 20
    out = torch.randn(1, *(2 * n for n in size), 11).movedim(-1, 1)
    fine = upsample(coarse[:, None])[:, 0]
    exact = out.double() + torch.conv3d(fine.double(), weight.double(), padding=1)
    with torch.no_grad():
        add_upsampled(out, coarse, weight)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize('scans', [1, 2])
@pytest.mark.parametrize('values', [0, 2**40])
def test_joining_with_what_is_upsampled_follows_its_definition(scans, values, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr('babyseg_bids.network.convolution._PAIRS', 0)
    monkeypatch.setattr('babyseg_bids.network.convolution._VALUES', values)
    x, coarse = torch.randn(scans, 3, 6, 14, 4), torch.randn(scans, 6, 3, 7, 2)
    weight, bias = torch.randn(4, 9, 3, 3, 3) / 15, torch.randn(4)
    fine = torch.cat([x, upsample(coarse[:, None])[:, 0]], dim=1)
    exact = torch.conv3d(fine.double(), weight.double(), bias.double(), padding=1)
    with torch.no_grad():
        found = convolve_joined(x, coarse, weight=weight, bias=bias)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'size', [(1, 1, 1), (4, 8, 4), (5, 1, 7), (6, 7, 3), (9, 12, 5), (13, 25, 2)]
)
@pytest.mark.parametrize('shifted', [True, False])
@pytest.mark.parametrize('within', [True, False])
def test_a_convolution_in_tiles_follows_its_definition(size, shifted, within):
    torch.manual_seed(3)
    x, weight = torch.randn(1, 32, *size), torch.randn(48, 32, 3, 3, 3) / 30
    bias = torch.randn(48) if shifted else None
    wider = torch.zeros(2, 48, *size).to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        found = convolve_tiles(x, weight, bias, out=wider[:1] if within else None)
    exact = torch.conv3d(
        x.double(), weight.double(), bias.double() if shifted else None, padding=1
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    if within:
        assert torch.equal(wider[:1], found)
        assert not wider[1].any()


def test_large_convolutions_are_done_in_tiles_where_no_gradients_are_asked_for(monkeypatch):
    taken = []

    def tiles(x, weight, bias, /, *, out=None):
        taken.append(tuple(x.shape))
        return convolve_tiles(x, weight, bias, out=out)

    monkeypatch.setattr('babyseg_bids.network.convolution.convolve_tiles', tiles)
    weight = torch.randn(48, 32, 3, 3, 3) / 30
    large, small = torch.randn(1, 32, 24, 28, 26), torch.randn(1, 32, 12, 14, 12)
    with torch.no_grad():
        for x in (large, small, large.bfloat16()):
            convolve(x, weight.to(x.dtype), None)
    convolve(large, weight, None)
    assert taken == [(1, 32, 24, 28, 26)]

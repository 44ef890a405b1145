"""The patch critic against the same network written with plain functions; its counts, patches, losses and weight by hand."""
import pytest, torch, torch.nn.functional as F

from audiorepro.core import count_params, make_generator
from audiorepro.gan import (GanConfig, PatchGan, VAEGame, adaptive_weight, feature_loss, generator_loss, grain, hinge_loss, perceptual_distance)
from audiorepro.training import TrainConfig, fit, tensor_batches
from audiorepro.vae import VAE, VAEConfig


def randomise(critic, seed=0):
    "Weights of size 1/sqrt(fan in), norms and running statistics away from 0 and 1"
    generator = make_generator(seed)
    with torch.no_grad():
        for k, p in critic.state_dict().items():
            if not p.is_floating_point(): continue
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise*p[0].numel()**-.5 if p.ndim == 4 else .5 + noise.abs() if k.endswith(('weight', 'var')) else noise)
    return critic


def plain(state, x, num_layers, training):
    "The critic in plain functions: kernels of 4, padding 1, slope 0.2, batch norm between"
    for i in range(num_layers + 1):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f'convs.{i}.weight'], state.get(f'convs.{i}.bias'), stride=2 if i < num_layers else 1)
        if i:
            n = f'norms.{i - 1}.'
            mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (state[n + 'running_mean'], state[n + 'running_var'])
            row = lambda v: v[None, :, None, None]
            x = (x - row(mean))/(row(var) + 1e-5).sqrt()*row(state[n + 'weight']) + row(state[n + 'bias'])
        x = torch.where(x > 0, x, .2*x)
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), state['score.weight'], state['score.bias'])


def error(a, b): return ((a - b).abs().max()/b.abs().max()).item()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('num_layers', [1, 2, 3])
def test_equals_plain_functions(num_layers, training):
    critic = randomise(PatchGan(GanConfig(4, num_layers))).double().train(training)
    x = torch.randn(3, 1, 48, 32, dtype=torch.float64, generator=make_generator(1)).requires_grad_()
    state = {k: v.clone() for k, v in critic.state_dict().items()}
    a, b = critic(x)[0], plain(state, x, num_layers, training).flatten(1)
    assert a.shape == b.shape and error(a, b) <= 1e-9
    weight = torch.randn(b.shape, dtype=torch.float64, generator=make_generator(2))
    grads = [torch.autograd.grad((y*weight).sum(), x, retain_graph=True)[0] for y in (a, b)]
    assert error(*grads) <= 1e-9
    state['convs.1.weight'] = state['convs.1.weight']*torch.linspace(.9, 1.1, state['convs.1.weight'].shape[1])[None, :, None, None]
    assert error(plain(state, x, num_layers, training).flatten(1), b) > 1e-4


def test_counts_and_patches():
    "In units of the first width w: 16 w + w, then 16 a b + 2 b for each step, 16 * 8 w + 1; a patch is 1 + 3 * (sum of strides below)"
    layers = [(64, 128), (128, 256), (256, 512)]
    assert count_params(lambda: PatchGan(GanConfig.audioldm())) == 17*64 + sum(16*a*b + 2*b for a, b in layers) + 16*512 + 1 == 2_763_585
    critic = randomise(PatchGan(GanConfig(4, 3))).eval()
    x = torch.randn(1, 1, 192, 192, generator=make_generator(0))
    score = critic(x)[0].unflatten(1, (22, 22))
    x_grad = x.clone().requires_grad_()
    seen = torch.autograd.grad(critic(x_grad)[0].unflatten(1, (22, 22))[0, 11, 11], x_grad)[0][0, 0].abs() > 0
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    assert len(rows) == len(columns) == 70 and rows[-1] - rows[0] == 69
    outside = torch.randn(x.shape, generator=make_generator(1))
    outside[..., rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = x[..., rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    other = critic(outside)[0].unflatten(1, (22, 22))
    assert torch.isclose(other[0, 11, 11], score[0, 11, 11], atol=1e-5) and (other - score).abs().max() > .01


def test_losses_by_hand():
    real, fake = torch.tensor([[2., .5]]), torch.tensor([[-2., -.5]])
    assert torch.isclose(hinge_loss(real, fake), torch.tensor(.25)) and hinge_loss(fake, real) == 2.25
    assert generator_loss(fake) == 1.25
    a, b = torch.full((2, 3, 4, 5), 2.), torch.full((2, 3, 4, 5), -1.)
    assert feature_loss([(None, [a, a])], [(None, [b, a])]) == 3
    assert torch.allclose(perceptual_distance([a], [b]), torch.full((2,), 4.)) and perceptual_distance([a], [9*a]).max() < 1e-10
    real_feature = a.clone().requires_grad_()
    feature_loss([(None, [real_feature])], [(None, [b.requires_grad_()])]).backward()
    assert real_feature.grad is None and b.grad is not None  # only the copy is moved


def test_adaptive_weight_balances():
    "With the weight, both terms pull equally at the last layer; on two parameters by hand"
    w = torch.tensor([3., 4.], requires_grad=True)
    assert torch.isclose(adaptive_weight(w.square().sum(), w.sum(), w), torch.tensor(10/(2**.5 + 1e-4)))
    assert torch.isclose(adaptive_weight(.1*w.sum(), 1e-5*w.sum(), w), torch.tensor(.1*2**.5/(1e-5*2**.5 + 1e-4)))
    assert adaptive_weight(1e6*w.sum(), 1e-9*w.sum(), w) == 1e4
    last = torch.nn.Conv2d(2, 1, 3)
    copy = last(torch.randn(1, 2, 9, 9, generator=make_generator(0)))
    rec, gan = copy.abs().mean(), (copy*torch.linspace(0, 9, 49).reshape(7, 7)).mean()
    factor = adaptive_weight(rec, gan, last.weight)
    pulls = [torch.autograd.grad(x, last.weight, retain_graph=True)[0].norm() for x in (rec, factor*gan)]
    assert torch.isclose(*pulls, rtol=1e-3)


def test_grain_counts_what_is_inside_squares():
    x = torch.randn(2, 1, 16, 16, generator=make_generator(0))
    by_hand = torch.stack([x[0, 0, t:t + 4, f:f + 4].std(correction=0) for t in range(0, 16, 4) for f in range(0, 16, 4)]).mean()
    assert torch.isclose(grain(x)[0], by_hand) and torch.allclose(grain(3*x + 5), 3*grain(x), rtol=1e-4)


def test_game_is_played_by_fit():
    "The critic joins at its start, learns to tell copies, and the VAE moves otherwise than without it"
    data = dict(mel=2*torch.randn(16, 32, 16, generator=make_generator(0)))
    def play(cfg, with_rival=True):
        torch.manual_seed(0)
        vae, critic, game = VAE(VAEConfig(channels=4, channel_mult=(1, 2), num_res_blocks=1, groups=2, kl_weight=.01)), PatchGan(cfg), VAEGame(cfg)
        rows = fit(vae, game, tensor_batches(data, 4), TrainConfig(12, lr=2e-3, log_every=4, clip_norm=None), progress=False,
                   rival=(critic, game.rival) if with_rival else None)
        return rows, vae.decoder.conv_out.weight.detach()
    (rows, late), (_, alone), (_, same) = play(GanConfig(4, 1, rival_start=4)), play(GanConfig(4, 1), False), play(GanConfig(4, 1, rival_start=99))
    assert 'loss_rival' not in rows[0] and rows[1]['loss_rival'] > rows[2]['loss_rival'] and rows[2]['adaptive'] > 0
    assert torch.equal(alone, same) and (late - alone).abs().max() > 1e-3

"""The vocoder equals transformers' `SpeechT5HifiGan` on the same weights, forward and backward, and reads every public layout."""
import json

import pytest, torch
from torch import nn

from audiorepro.core import count_params, make_generator
from audiorepro.mel import MelConfig, log_mel
from audiorepro.vocoder import Critics, CriticConfig, HifiGan, HifiGanConfig, PeriodCritic, ScaleCritic, add_weight_norm, fold_weight_norm, stft_distance
from audiorepro.vocoder_files import config_from, from_official

transformers = pytest.importorskip('transformers')
TINY = [HifiGanConfig(n_mels=6, upsample_rates=(5, 4, 2), upsample_kernels=(16, 16, 4), channels=16, normalize_before=True),
        HifiGanConfig(n_mels=5, upsample_rates=(3, 2), upsample_kernels=(7, 4), channels=12, resblock_kernels=(3, 5),
                      resblock_dilations=((1, 3), (1, 2)), leaky_slope=.2),
        HifiGanConfig(n_mels=8, upsample_rates=(4,), upsample_kernels=(8,), channels=8, resblock_kernels=(7,), resblock_dilations=((2,),))]


def reference(cfg):
    "transformers' class with the settings of `cfg`"
    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(
        model_in_dim=cfg.n_mels, sampling_rate=cfg.sample_rate, upsample_initial_channel=cfg.channels, upsample_rates=list(cfg.upsample_rates),
        upsample_kernel_sizes=list(cfg.upsample_kernels), resblock_kernel_sizes=list(cfg.resblock_kernels), leaky_relu_slope=cfg.leaky_slope,
        resblock_dilation_sizes=[list(d) for d in cfg.resblock_dilations], normalize_before=cfg.normalize_before)).eval()


def randomise(model, seed=0):
    "Weights of size sqrt(2 / fan in), so that signals neither fade nor saturate; buffers too, scales positive"
    generator = make_generator(seed)
    with torch.no_grad():
        for k, p in model.state_dict().items():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype)*(2/max(1, p[0].numel() if p.ndim > 1 else 100))**.5)
            if k == 'scale': p.abs_().add_(.5)
    return model


def error(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max()/b.abs().max()).item()


def both(cfg, dtype, seed=0):
    "Ours and the reference with equal weights, and a random mel"
    ours, peer = randomise(HifiGan(cfg), seed).to(dtype), reference(cfg).to(dtype)
    peer.load_state_dict(ours.state_dict())  # strict: the names are the same
    return ours, peer, torch.randn(2, 1, 11, cfg.n_mels, dtype=dtype, generator=make_generator(seed + 1))


@pytest.mark.parametrize('cfg', TINY, ids=range(len(TINY)))
@pytest.mark.parametrize('dtype, forward, backward', [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-9, 1e-9)], ids=['fp32', 'fp64'])
def test_equals_transformers(cfg, dtype, forward, backward):
    ours, peer, mel = both(cfg, dtype)
    a, b = ours(mel), peer(mel[:, 0])
    assert .05 < b.std() < .95 and error(a, b) <= forward
    target = torch.randn(b.shape, dtype=dtype, generator=make_generator(5))
    mel_a, mel_b = mel.clone().requires_grad_(), mel[:, 0].clone().requires_grad_()
    ((ours(mel_a) - target)**2).mean().backward(); ((peer(mel_b) - target)**2).mean().backward()
    assert error(mel_a.grad[:, 0], mel_b.grad) <= backward
    for (k, p), q in zip(ours.named_parameters(), dict(peer.named_parameters()).values()): assert error(p.grad, q.grad) <= backward, k
    with torch.no_grad():  # controls: another input frame, another weight
        moved = mel.clone(); moved[:, :, 5] += .1
        assert error(ours(moved), b) > 100*forward
        ours.resblocks[0].convs2[0].weight[0, 0, 0] += .1
        assert error(ours(mel), b) > 100*forward


def test_counts_and_lengths():
    for cfg, count in ((HifiGanConfig.audioldm2(), 55_264_897), (HifiGanConfig.v1(), 13_926_017), (HifiGanConfig.v2(), 925_985)):
        with torch.device('meta'): peer = reference(cfg)
        assert count_params(lambda: HifiGan(cfg)) == count_params(peer) == count
    with torch.device('meta'):
        model, mel = HifiGan(HifiGanConfig.audioldm2()), torch.empty(1, 1, 1024, 64)
        assert model(mel).shape == (1, 163_872) and model.to_wav(mel).shape == (1, 163_840)


def old_weight_norm(peer):
    "State of the reference under the old weight norm (`weight_g`, `weight_v`), with the names of the released code"
    state = {}
    for k, v in peer.state_dict().items():
        if k in ('mean', 'scale'): continue
        k = k.replace('upsampler', 'ups')
        if not k.endswith('weight'): state[k] = v; continue
        g = v.flatten(1).norm(dim=1).reshape(-1, *[1]*(v.ndim - 1))
        stretch = torch.linspace(.5, 2, len(g)).reshape(g.shape).to(v)
        state |= {k + '_g': g, k + '_v': v*stretch}  # the direction may have any length
    return state


def settings_json(cfg):
    return dict(resblock='1', num_mels=cfg.n_mels, sampling_rate=16_000, upsample_initial_channel=cfg.channels, upsample_rates=cfg.upsample_rates,
                upsample_kernel_sizes=cfg.upsample_kernels, resblock_kernel_sizes=cfg.resblock_kernels, resblock_dilation_sizes=cfg.resblock_dilations)


def test_reads_every_layout(tmp_path):
    cfg = HifiGanConfig(n_mels=6, upsample_rates=(5, 2), upsample_kernels=(16, 4), channels=8, resblock_kernels=(3,), resblock_dilations=((1, 3),))
    ours, peer, mel = both(cfg, torch.float32)
    peer.config.normalize_before, peer.mean[:], peer.scale[:] = False, 0, 1  # as the released vocoders are
    with torch.no_grad(): wanted = peer(mel[:, 0])
    ours.mean.zero_(); ours.scale.fill_(1)
    peer.save_pretrained(tmp_path/'hf')
    peer.save_pretrained(tmp_path/'pipeline'/'vocoder')  # as diffusers keeps it
    (tmp_path/'pipeline'/'model_index.json').write_text('{}')
    ours.save_pretrained(tmp_path/'own')
    normed = add_weight_norm(randomise(HifiGan(cfg)))
    normed.mean.zero_(); normed.scale.fill_(1)
    before = normed(mel)
    normed.save_pretrained(tmp_path/'normed')  # saved in training: folded in the file, not in memory
    assert 'conv_pre.parametrizations.weight.original0' in normed.state_dict() and torch.equal(normed(mel), before)
    assert error(fold_weight_norm(normed)(mel), before) <= 1e-5
    (tmp_path/'kit').mkdir(); (tmp_path/'whole').mkdir()
    torch.save(dict(generator=old_weight_norm(peer)), tmp_path/'kit'/'hifigan_16k_64bins.ckpt')
    (tmp_path/'kit'/'hifigan_16k_64bins.json').write_text(json.dumps(settings_json(cfg)))
    plain = {'first_stage_model.vocoder.' + k.replace('upsampler', 'ups'): v for k, v in peer.state_dict().items() if k not in ('mean', 'scale')}
    other = {'first_stage_model.encoder.conv_in.bias': torch.zeros(3), 'scale_factor': torch.ones(())}
    torch.save(dict(state_dict=plain | other), tmp_path/'whole'/'audioldm2.pth')
    (tmp_path/'whole'/'config.json').write_text(json.dumps(settings_json(cfg)))
    for name in ('hf', 'pipeline', 'own', 'normed', 'kit/hifigan_16k_64bins.ckpt', 'whole/audioldm2.pth'):
        model = HifiGan.from_pretrained(tmp_path/name)
        assert not model.training and model.cfg == cfg, name
        with torch.no_grad(): assert error(model(mel), wanted) <= 1e-5, name
    state = plain | other
    state['first_stage_model.vocoder.conv_pre.weight'] = state['first_stage_model.vocoder.conv_pre.weight']*1.1
    torch.save(dict(state_dict=state), tmp_path/'whole'/'audioldm2.pth')
    with torch.no_grad(): assert error(HifiGan.from_pretrained(tmp_path/'whole'/'audioldm2.pth')(mel), wanted) > 1e-3


def test_refuses_what_does_not_fit(tmp_path):
    cfg = TINY[1]
    state = old_weight_norm(reference(cfg))
    del state['conv_post.bias']
    torch.save(dict(generator=state | dict(extra=torch.ones(1))), tmp_path/'g')
    (tmp_path/'config.json').write_text(json.dumps(settings_json(cfg)))
    with pytest.raises(ValueError, match='missing conv_post.bias; surplus extra'): HifiGan.from_pretrained(tmp_path/'g')
    with pytest.raises(ValueError, match='resblock must be 1'): config_from(settings_json(cfg) | dict(resblock='2'))
    with pytest.raises(ValueError, match='holds no conv_pre.bias'): from_official({'conv_post.bias': torch.ones(1)})


def test_weight_norm_folds_exactly():
    model = add_weight_norm(randomise(HifiGan(TINY[0]))).double()
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k.endswith('original0'): p.mul_(1.3)
        mel = torch.randn(1, 1, 9, 6, dtype=torch.float64, generator=make_generator(1))
        before = model(mel)
        assert error(fold_weight_norm(model)(mel), before) <= 1e-9


def test_critics_by_other_means():
    "A period critic is a 1-d network on every p-th sample; a scale critic is the same network on averages of four"
    torch.manual_seed(0)
    wav = torch.randn(2, 2310, dtype=torch.float64, generator=make_generator(0))
    for p in (2, 3, 5, 7, 11):
        critic = PeriodCritic(p, 32).double()
        score, features = critic(wav)
        for phase in range(p):
            h = wav[:, None, phase::p]
            for conv, seen in zip(critic.convs, features):
                h = nn.functional.leaky_relu(nn.functional.conv1d(h, conv.weight[..., 0], conv.bias, conv.stride[0], 2), .1)
                assert error(seen[..., phase], h) <= 1e-9
    plain, halved = ScaleCritic(0, 32).double(), ScaleCritic(1, 32).double()
    halved.load_state_dict(plain.state_dict())
    means = nn.functional.pad(wav, (2, 2)).unfold(1, 4, 2).mean(-1)
    assert error(halved(wav)[0], plain(means)[0]) <= 1e-9 and halved(wav)[0].shape != plain(wav)[0].shape
    layers = lambda c: sum((a//g*k + 1)*b for a, b, k, g in c)
    period = layers([(1, 32, 5, 1), (32, 128, 5, 1), (128, 512, 5, 1), (512, 1024, 5, 1), (1024, 1024, 5, 1), (1024, 1, 3, 1)])
    scale = layers([(1, 128, 15, 1), (128, 128, 41, 4), (128, 256, 41, 16), (256, 512, 41, 16), (512, 1024, 41, 16), (1024, 1024, 41, 16),
                    (1024, 1024, 5, 1), (1024, 1, 3, 1)])
    with torch.device('meta'): assert (count_params(PeriodCritic(2)), count_params(ScaleCritic(0))) == (period, scale)


def test_spectral_norm_bounds_the_first_scale():
    torch.manual_seed(0)
    critics = Critics(CriticConfig(periods=(2,), num_scales=2, shrink=32))
    wav = torch.randn(1, 2000, generator=make_generator(0))
    for _ in range(20): critics(wav)  # power iterations
    largest = torch.linalg.matrix_norm(critics.scales[0].convs[0].weight.flatten(1), 2).item()
    assert abs(largest - 1) < .05
    assert [len(f) for _, f in critics(wav)] == [6, 8, 8]


def test_a_real_mel_goes_through():
    wav = .1*torch.randn(1, 16_000, generator=make_generator(0))
    mel = log_mel(wav, MelConfig.toy())
    with torch.no_grad(): made = HifiGan(HifiGanConfig.toy()).to_wav(mel)
    assert made.shape == wav.shape and made.abs().max() < 1 and stft_distance(wav, wav).item() == 0 < stft_distance(made, wav).item()

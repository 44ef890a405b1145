"""Tango and its files: the denoiser in its three kinds, the weights and the loss, guided walks, mixes, selection, both stages, the
pipeline, and folders in the published layout, each beside diffusers, transformers, librosa or a hand-made case.
"""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest, torch

from audiorepro import tango
from audiorepro.checkpoints import convert
from audiorepro.clap import CLAP
from audiorepro.core import load_strict, make_generator
from audiorepro.datasets import toy_set
from audiorepro.diffusion import Schedule, sample_ddpm
from audiorepro.mixing import a_weighting, augment_batch, loudness, mix_sounds
from audiorepro.sampling import Condition, sample_ddim
from audiorepro.t5 import T5
from audiorepro.tango import KeepBest, Tango, TangoConfig, TangoDenoiser, losses_at, snr_weights, tango_loss, text_condition, toy_recipe
from audiorepro.tango_files import load_tango, read_tango
from audiorepro.training import TrainConfig, fit, run_recipe, tensor_batches
from audiorepro.unet import UNetConfig
from audiorepro.vae import VAE

from layouts import below, error, official_vae, randn, randomise
from standins import make_tokenizers

FILMS = (None, 'concat', 'scale_shift')


# --- the denoiser ---------------------------------------------------------------------------------------------------

def pair(film=None, layers=1, channels=(32, 32, 64, 64), heads=(2, 2, 4, 4), dim=24):
    "Ours and diffusers' with the same random weights, float64"
    from diffusers import UNet2DConditionModel
    unet = UNetConfig(channels=channels, num_heads=heads, layers_per_block=layers, attention_levels=(0, 1, 2), groups=8,
                      contexts=(None,) if film else (dim,), linear_proj=True)
    told = dict(class_embed_type='simple_projection', projection_class_embeddings_input_dim=dim)
    told |= dict(class_embeddings_concat=True) if film == 'concat' else dict(resnet_time_scale_shift='scale_shift')
    theirs = randomise(UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=channels, norm_num_groups=8, layers_per_block=layers,
        cross_attention_dim=channels if film else dim, attention_head_dim=heads, use_linear_projection=True, upcast_attention=True,
        down_block_types=('CrossAttnDownBlock2D',)*3 + ('DownBlock2D',), up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',)*3,
        **(told if film else {}))).double()
    theirs.conv_out.weight.data *= .3
    ours = TangoDenoiser(replace(TangoConfig.medium(), unet=unet, film=film, clap_dim=dim)).double().eval()
    load_strict(ours.unet, theirs.state_dict())
    return ours, theirs


MASK = torch.tensor([[1]*5, [1, 1, 0, 0, 0]]).bool()
def condition(film, seed=2): return Condition((), randn(2, 24, seed=seed)) if film else Condition(((randn(2, 5, 24, seed=seed), MASK),))
def heard(film, cond):
    if film: return dict(encoder_hidden_states=None, class_labels=cond.pooled)
    return dict(encoder_hidden_states=cond.contexts[0][0], encoder_attention_mask=cond.contexts[0][1])


@pytest.mark.parametrize('film, layers', [(None, 2), ('concat', 1), ('scale_shift', 1)])
def test_denoiser_is_diffusers(film, layers):
    "Outputs and all gradients agree; another text and another step change them"
    ours, theirs = pair(film, layers)
    z, t, cond = randn(2, 8, 16, 8, seed=1), torch.tensor([3, 871]), condition(film)
    a, b = ours(z, t, cond), theirs(z, t, **heard(film, cond)).sample
    assert error(a, b) < 1e-6
    (a*z).sum().backward(); (b*z).sum().backward()
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    assert {k for k, g in grads.items() if g is None} == {k for k, p in ours.unet.named_parameters() if p.grad is None}
    for k, p in ours.unet.named_parameters(): assert p.grad is None or error(p.grad, grads[k]) < 1e-5, k
    with torch.no_grad():
        for other in (ours(z, t, condition(film, 9)), ours(z, t.flip(0), cond)): assert error(other, a) > 1e-3


def test_padding_is_not_heard():
    ours, _ = pair()
    z, t, cond = randn(2, 8, 16, 8, seed=1), torch.tensor([3, 871]), condition(None)
    states = cond.contexts[0][0].clone()
    states[1, 2:] += 5.
    with torch.no_grad(): assert error(ours(z, t, Condition(((states, MASK),))), ours(z, t, cond)) < 1e-12


@pytest.mark.parametrize('name, count', dict(small=222_995_688, medium=865_933_768, large=1_928_814_248).items())
def test_sizes(name, count):
    with torch.device('meta'): assert sum(p.numel() for p in TangoDenoiser(getattr(TangoConfig, name)()).parameters()) == count


def test_a_toy_text_gets_no_positions():
    "The cells are told where they lie; moving a token's states along with its mask changes nothing"
    torch.manual_seed(0)
    model = randomise(TangoDenoiser(TangoConfig.toy())).eval()
    z, t, s = randn(1, 8, 16, 16).float(), torch.tensor([700]), randn(1, 4, 128, seed=1).float()
    with torch.no_grad():
        a, b = (model(z, t, Condition(((x, None),))) for x in (s, s[:, [2, 0, 3, 1]]))
        assert error(a, b) < 1e-5
        assert error(model(z.roll(4, 2), t, Condition(((s, None),))).roll(-4, 2)[:, :, 4:12], a[:, :, 4:12]) > 1e-2


def test_configs_refuse():
    for change in (dict(film='concat'), dict(unet=UNetConfig.tango_small(), film='scale_shift'), dict(unet=UNetConfig(contexts=(None,)))):
        with pytest.raises(ValueError, match='unet.contexts'): replace(TangoConfig.medium(), **change)
    with pytest.raises(ValueError, match='film'): replace(TangoConfig.clap(), film='other')


# --- weights, loss, walks ---------------------------------------------------------------------------------------------

def scheduler(kind, **more):
    import diffusers
    return getattr(diffusers, kind)(1000, .00085, .012, 'scaled_linear', clip_sample=False, prediction_type='v_prediction', **more)


@pytest.mark.parametrize('gamma', [1., 5.])
def test_snr_weights(gamma):
    from diffusers.training_utils import compute_snr
    snr = compute_snr(scheduler('DDPMScheduler'), torch.arange(1000)).double()
    least = torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values
    for form, wanted in (('tango', least/snr), ('usual', least/(snr + 1))):
        torch.testing.assert_close(snr_weights(Schedule.tango(), form, gamma).double(), wanted, rtol=2e-5, atol=0)
    with pytest.raises(ValueError, match='form'): snr_weights(Schedule.tango(), 'other')


@pytest.mark.parametrize('film', FILMS)
def test_loss_is_the_public_formula(film):
    "Velocity and noise mixing by diffusers' scheduler, weights by its SNR, means in the public order"
    from diffusers.training_utils import compute_snr
    ours, theirs = pair(film)
    z_0, cond, g = randn(2, 8, 16, 8, seed=1).float().double(), condition(film), make_generator(4)
    batch = dict(z_0=z_0) | (dict(clap=cond.pooled) if film else dict(t5=cond.contexts[0][0], t5_mask=MASK))
    ours, theirs = ours.float(), theirs.float()
    found = tango_loss(ours, batch, SimpleNamespace(generator=make_generator(4)), None, snr_weights(Schedule.tango()))['loss']
    keep = torch.rand(2, generator=g) >= .1                          # the coins come first, then steps and noise
    assert keep.all()
    t = torch.randint(1000, (2,), generator=g)
    eps, noise = torch.randn(z_0.shape, generator=g), scheduler('DDPMScheduler')
    with torch.no_grad():
        pred = theirs(noise.add_noise(z_0.float(), eps, t), t, **heard(film, cond.to(dtype=torch.float32))).sample
        snr = compute_snr(noise, t)
        error_ = (pred - noise.get_velocity(z_0.float(), eps, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, (error_*snr.clamp(max=5)/snr).mean(), rtol=1e-5, atol=0)


def test_coins_are_tossed_per_item():
    class Stub:
        cfg, seen = TangoConfig.toy(), []
        def __call__(self, z, t, cond): self.seen.append(cond.contexts[0]); return torch.zeros_like(z)
    stub, ctx = Stub(), SimpleNamespace(generator=make_generator(0))
    batch = dict(z_0=torch.zeros(40, 8, 4, 4), t5=torch.ones(40, 3, 128), t5_mask=torch.ones(40, 3).bool())
    null = Condition(((torch.full((1, 1, 128), 7.), None),))
    for p, given in ((.5, null), (.5, None), (0., null), (1., null)): tango_loss(stub, batch, ctx, given, cond_drop_prob=p)
    (a, mask), (b, kept), (c, _), (d, last) = stub.seen
    emptied = a[:, 0, 0] == 7
    assert 5 < emptied.sum() < 35 and mask.sum(1).tolist() == [1 if e else 3 for e in emptied]
    assert 5 < (b == 0).all((1, 2)).sum() < 35 and kept.all()          # the public flag: zeros under the caption's mask
    assert (c == 1).all() and (d == 7).all() and last.shape == (40, 1)


@pytest.mark.parametrize('kind, eta, film, scale', [
    ('DDPMScheduler', None, None, 3.), ('DDIMScheduler', 0., None, 3.), ('DDIMScheduler', 1., 'concat', 3.), ('DDPMScheduler', None, 'scale_shift', 1.)])
def test_guided_walk_is_diffusers(kind, eta, film, scale):
    "Ten steps, both branches in one batch, the same starting and fresh noise; guidance matters"
    ours, theirs = (m.float() for m in pair(film))
    cond, empty = (condition(film, seed).to(dtype=torch.float32) for seed in (2, 5))
    theirs_told = {k: torch.cat([heard(film, empty)[k], v]) if v is not None else None for k, v in heard(film, cond).items()}
    made = scheduler(kind, **(dict(steps_offset=0) if eta is None else dict(steps_offset=1, set_alpha_to_one=False)))
    made.set_timesteps(10)
    start, noise = randn(2, 8, 16, 8, seed=3).float(), make_generator(6)
    z, more = start, {} if eta is None else dict(eta=eta)
    with torch.no_grad():
        for t in made.timesteps:
            u, c = theirs(torch.cat([z, z]), t, **theirs_told).sample.chunk(2)
            z = made.step(u + scale*(c - u), t, z, generator=noise, **more).prev_sample
    sampler = sample_ddpm if eta is None else sample_ddim
    def ours_at(scale): return sampler(ours, start.shape, Schedule.tango(), 10, cond=cond, uncond=empty, guidance_scale=scale, latents=start,
                                       generator=make_generator(6), **more)
    with torch.no_grad():
        assert error(ours_at(scale), z) < 1e-4
        assert error(ours_at(scale + 2), z) > 1e-2


# --- mixes --------------------------------------------------------------------------------------------------------------

def test_a_weighting_is_librosas():
    import librosa
    f = torch.linspace(0, 8000, 1025)
    wanted = torch.from_numpy(librosa.A_weighting(f.double().numpy()))
    torch.testing.assert_close(a_weighting(f), wanted, atol=1e-2, rtol=0)


@pytest.mark.parametrize('rate, n_fft', [(16_000, 2048), (44_100, 4096)])
def test_loudness_is_the_formula(rate, n_fft):
    "The loudest of the half-overlapping Hann windows, A-weighted power summed, in numpy"
    import librosa, numpy as np
    wav = randn(2, 3*n_fft).numpy()*np.linspace(.1, 1, 3*n_fft)
    window, weight = np.hanning(n_fft + 1)[:-1], 10**(librosa.A_weighting(np.linspace(0, rate/2, n_fft//2 + 1), min_db=-80)/10)
    best = [max(10*np.log10((np.abs(np.fft.rfft(x[i:i + n_fft]*window))**2*weight).sum()) for i in range(0, 2*n_fft + 1, n_fft//2)) for x in wav]
    torch.testing.assert_close(loudness(torch.from_numpy(wav), rate), torch.tensor(best), atol=2e-3, rtol=0)


@pytest.mark.parametrize('gain', [1e-3, 1., 50.])
@pytest.mark.parametrize('r', [.2, .5, .8])
def test_a_mix_is_balanced_whatever_the_levels(gain, r):
    "Tones of different pitch: in the mix their loudness differs by r/(1 - r); unrelated energies stay whole"
    n = torch.arange(8192, dtype=torch.float64)
    a, b = gain*torch.sin(2*torch.pi*440*n/16_000)[None], .3*torch.sin(2*torch.pi*3000*n/16_000)[None]
    mixed = mix_sounds(a, b, 16_000, r)
    parts = [(mixed*x).mean()/(x*x).mean()*x for x in (a, b)]
    heard = [loudness(x, 16_000).item() for x in parts]
    assert abs(heard[0] - heard[1] - 20*torch.tensor(r/(1 - r)).log10().item()) < .02
    torch.testing.assert_close(mix_sounds(b, a, 16_000, 1 - r), mixed)


def test_mixes_of_a_batch():
    wav, names = randn(5, 4096).float(), list('ABCDE')
    mixed, texts = augment_batch(wav, names, 16_000, make_generator(0))
    assert mixed.shape == (4, 4096) and len(set(texts)) == 4
    torch.testing.assert_close(mixed.abs().amax(1), torch.full((4,), .5))
    for x, text in zip(mixed, texts):  # each is the mix that its caption names
        i, j = 'ABCDE'.index(text[0]), 'abcde'.index(text[-1])
        y = mix_sounds(wav[[i]], wav[[j]], 16_000)[0]
        assert i < j and torch.nn.functional.cosine_similarity(x, y - y.mean(), 0) > .9999
    assert augment_batch(wav, names, 16_000, make_generator(1))[1] != texts
    for bad in (0, 1, float('nan')):
        with pytest.raises(ValueError, match='r must'): mix_sounds(wav, wav, 16_000, bad)
    with pytest.raises(ValueError, match='2048 samples'): loudness(wav[:, :100], 16_000)


# --- selection and recipes ----------------------------------------------------------------------------------------------

SMALL = UNetConfig(channels=(16, 16), layers_per_block=1, attention_levels=(1,), num_heads=2, groups=8, contexts=(128,), linear_proj=True,
                   positions=True)


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
    "Twenty-four clips and small networks behind every toy name, in an output folder of their own"
    mp = pytest.MonkeyPatch()
    mp.setenv('AUDIOREPRO_OUT', str(tmp_path_factory.mktemp('out')))
    mp.setattr(TangoConfig, 'toy', classmethod(lambda cls, film=None: cls(
        replace(SMALL, contexts=(None,) if film else (128,)), Schedule.tango(), tango.MelConfig.toy(), film, 128, 2.56)))
    mp.setattr(tango, '_STEPS', dict(pretrain=dict(short=4), finetune=dict(short=2)))
    yield
    mp.undo()


def test_losses_at_are_the_clips_own(frozen):
    "Independent of the batch, of the order of clips, and equal to the loss at that step computed by hand"
    torch.manual_seed(0)
    model = randomise(TangoDenoiser(TangoConfig.toy()))
    rows = dict(z_0=randn(5, 8, 16, 16).float(), t5=randn(5, 4, 128, seed=1).float(), t5_mask=torch.ones(5, 4).bool())
    found = losses_at(model, rows, 500)
    torch.testing.assert_close(losses_at(model, rows, 500, batch_size=2), found)
    assert not torch.equal(losses_at(model, rows, 500, seed=1), found) and not torch.equal(losses_at(model, rows, 100), found)
    eps, noise = torch.randn(1, 8, 16, 16, generator=make_generator(3)), scheduler('DDPMScheduler')
    t, z = torch.tensor([500]), rows['z_0'][3:4]
    with torch.no_grad(): pred = model(noise.add_noise(z, eps, t), t, Condition(((rows['t5'][3:4], None),)))
    torch.testing.assert_close(found[3], (pred - noise.get_velocity(z, eps, t)).square().mean(), rtol=1e-4, atol=0)
    turned = losses_at(model, rows, 500, order=torch.tensor([1, 0, 2, 3, 4]))
    assert torch.equal(turned[2:], found[2:]) and (turned[:2] != found[:2]).all()


@pytest.mark.parametrize('ema', [None, .5])
def test_the_best_weights_stay(ema):
    class Drift(tango.Model):
        def __init__(self): super().__init__(tango.Config()); self.x = torch.nn.Parameter(torch.zeros(()))
    seen = {}
    def validate(m):
        seen[len(seen)] = m.x.item()
        return abs(m.x.item() - .42)
    drift, best = Drift(), KeepBest(validate, 9)
    rows = fit(drift, lambda m, b, c: dict(loss=-m.x), tensor_batches(dict(x=torch.zeros(4)), 2),
               TrainConfig(9, lr=.1, weight_decay=0., log_every=1, eval_every=1, save_every=9, ema_decay=ema), on_eval=best, progress=False)
    nearest = min(seen.values(), key=lambda x: abs(x - .42))
    assert drift.x.item() == pytest.approx(nearest, abs=1e-6) and 0 < best.step < 9
    assert rows[-1]['best_step'] == best.step and min(r['val_loss'] for r in rows) == best.loss


def test_two_stages_of_one_recipe(frozen):
    "The second begins where the first ended, on the captions it is given; held-out clips are in neither"
    pairs = [(i % 24, f'a dog barks, then rain falls {i}') for i in range(48)]
    first = toy_recipe('short', 'pretrain', pairs, weights='toy', clips=24)
    held = 24//8
    with pytest.raises(ValueError, match=f'number of items, {2*(24 - held) - 30}'):
        next(toy_recipe('short', 'pretrain', pairs[:2*(24 - held) - 30], weights='toy', clips=24).batches(0))
    batch = next(first.batches(0))
    assert batch['z_0'].shape == (16, 8, 64, 16) and batch['t5'].shape[:2] == batch['t5_mask'].shape
    run_recipe(first, progress=False)
    second = toy_recipe('short', 'finetune', start='mine/tango_pretrained', weights='toy', clips=24)
    for k, x in second.model.state_dict().items():
        torch.testing.assert_close(x, first.model.state_dict()[k], atol=2e-3, rtol=2e-3)   # through half precision
    assert second.name == 'tango' and second.config.lr < first.config.lr and second.config.schedule == 'linear'
    done = run_recipe(second, progress=False)
    assert Tango(done, T5.from_pretrained('toy'), VAE.from_pretrained('toy'))('rain falls', num_inference_steps=1, seed=0).isfinite().all()
    assert first.key != toy_recipe('short', 'pretrain', pairs[1:], weights='toy', clips=24).key


def test_held_out_clips_are_not_trained_on(frozen):
    own = tango.toy_tensors(toy_set(24), weights='toy')
    recipe, seen = toy_recipe('short', 'finetune', [(i, 'rain falls') for i in range(24)]*2, weights='toy', clips=24), []
    batches = recipe.batches(0)
    for _ in range(4): seen += list(next(batches)['z_0'])
    for z in own['z_0'][:21]: assert any((z.float() - s).abs().mean() < .2 for s in seen)
    for z in own['z_0'][21:]: assert not any(torch.equal(z.float(), s) for s in seen)


@pytest.mark.parametrize('film', FILMS[1:])
def test_clap_instead_of_t5(film, frozen, tmp_path):
    "The whole way with a CLAP vector: recipe, saving, loading, sampling; the prompt matters"
    model = run_recipe(toy_recipe('short', 'finetune', film=film, weights='toy', clips=24, name=f'tango_{film}'), progress=False)
    randomise(model)
    Tango(model, CLAP.from_pretrained('toy'), VAE.from_pretrained('toy')).save_pretrained(tmp_path/'own')
    pipe = Tango.from_pretrained(tmp_path/'own')
    a, b = (pipe(p, seed=0, num_inference_steps=2, output='latents') for p in ('a dog barks', 'rain falls'))
    assert type(pipe.encoder) is CLAP and error(a, b) > 1e-3
    with pytest.raises(ValueError, match='film'): toy_recipe('short', 'finetune', start=str(tmp_path/'own'/'tango'), weights='toy', clips=24)


# --- the pipeline ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pipe(frozen):
    model = randomise(TangoDenoiser(TangoConfig.toy()))
    model.unet.conv_out.weight.data *= .3
    return Tango(model, T5.from_pretrained('toy'), VAE.from_pretrained('toy'))


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm'])
def test_pipeline_keeps_its_promises(pipe, sampler, tmp_path):
    fast = dict(num_inference_steps=3, output='latents', sampler=sampler)
    prompts = ['a siren wails', 'a bell rings while wind blows']
    both, alone = pipe(prompts, seed=[0, 1], **fast), torch.cat([pipe(p, seed=i, **fast) for i, p in enumerate(prompts)])
    assert error(both, alone) < 1e-5
    for change in (dict(prompt='a bell rings'), dict(guidance_scale=1.), dict(negative_prompt='wind blows'), dict(seed=1)):
        assert error(pipe(**dict(dict(prompt=prompts[0], seed=0), **change), **fast), alone[:1]) > 1e-3, change
    assert torch.equal(pipe(prompts[0], negative_prompt=None, seed=0, **fast), pipe(prompts[0], seed=0, **fast))
    pipe.save_pretrained(tmp_path/'own')
    assert torch.equal(Tango.from_pretrained(tmp_path/'own')(prompts, seed=[0, 1], **fast), both)
    assert pipe(prompts[0], seed=0, num_inference_steps=1, audio_length_in_s=.7, sampler=sampler).shape == (1, 11_200)


def test_pipeline_is_refused_by_name(pipe):
    for name, values in dict(sampler=('euler', None), num_waveforms_per_prompt=(0,), guidance_scale=(float('nan'),), seed=([1, 2], True),
                             eta=(2,), num_inference_steps=(0, 1001), output=('mel',), audio_length_in_s=(-1,),
                             negative_prompt=(['a', 'b'],), latents=(torch.zeros(1, 8, 3, 3),), generator=('x', [7])).items():
        for bad in values:
            with pytest.raises(ValueError, match=name): pipe('rain falls', **{name: bad})
    for change in (dict(eta=.5), dict(guidance_rescale=.5)):
        with pytest.raises(ValueError, match='takes no eta'): pipe('rain falls', sampler='ddpm', **change)


# --- published files ------------------------------------------------------------------------------------------------------

def libraries(channels=(64, 64, 128, 128), heads=(1, 1, 2, 2)):
    import diffusers, transformers
    parts = dict(
        unet=diffusers.UNet2DConditionModel(
            in_channels=8, out_channels=8, block_out_channels=channels, layers_per_block=1, cross_attention_dim=24, attention_head_dim=heads,
            down_block_types=('CrossAttnDownBlock2D',)*3 + ('DownBlock2D',), up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',)*3,
            use_linear_projection=True),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(vocab_size=200, d_model=24, d_kv=64, num_heads=2, d_ff=32, num_layers=2,
                                                                       feed_forward_proj='gated-gelu')),
        vae=diffusers.AutoencoderKL(1, 1, ('DownEncoderBlock2D',)*3, ('UpDecoderBlock2D',)*3, (32, 32, 64), latent_channels=8),
        vocoder=transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(
            model_in_dim=64, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2], upsample_kernel_sizes=[16, 16, 8, 4, 4],
            normalize_before=False)))
    for part in parts.values(): randomise(part)
    parts['unet'].conv_out.weight.data *= .3
    return parts


MAIN = dict(text_encoder_name='google/flan-t5-large', scheduler_name='stabilityai/stable-diffusion-2-1', unet_model_name=None,
            unet_model_config_path='configs/diffusion_model_config.json', snr_gamma=5.0)
STFT = dict(filter_length=1024, hop_length=160, win_length=1024, n_mel_channels=64, sampling_rate=16000, mel_fmin=0, mel_fmax=8000)
DDCONFIG = dict(ch=32, ch_mult=[1, 1, 2], z_channels=8, num_res_blocks=1)


def tango_folder(folder, parts, main={}, stft={}, vae={}):
    import librosa
    folder.mkdir()
    for name, values in dict(main=MAIN | main, stft=STFT | stft, vae=dict(ddconfig=DDCONFIG, scale_factor=.75) | vae).items():
        (folder/f'{name}_config.json').write_text(json.dumps(values))
    vocoder = {k.replace('upsampler', 'ups'): x for k, x in parts['vocoder'].state_dict().items() if k not in ('mean', 'scale')}
    torch.save(below('unet', parts['unet'].state_dict()) | below('text_encoder', parts['text_encoder'].state_dict()), folder/'pytorch_model_main.bin')
    torch.save(official_vae(parts['vae'].state_dict(), 3) | below('vocoder', vocoder), folder/'pytorch_model_vae.bin')
    torch.save(dict(mel_basis=torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=64, fmin=0, fmax=8000))),
               folder/'pytorch_model_stft.bin')
    make_tokenizers(512)[1].save_pretrained(folder/'tokenizer')
    return folder


@pytest.fixture(scope='module')
def parts(): return libraries()


@pytest.mark.parametrize('form', ['bin', 'safetensors'])
def test_published_folder_speaks_like_the_libraries(parts, form, tmp_path):
    "Prompt to waveform: T5, guided ancestral walk, scale, decoder, vocoder"
    folder = tango_folder(tmp_path/'tango', parts)
    if form == 'safetensors':
        convert(folder, tmp_path/'plain')
        folder = tmp_path/'plain'
        assert not list(folder.glob('*.bin'))
    words, prompts = make_tokenizers(512)[1], ['a dog barks, then rain falls', 'the old machine hums']
    with torch.no_grad():
        t = words(prompts, padding=True, return_tensors='pt')
        n = words([''], padding='max_length', max_length=t.input_ids.shape[1], return_tensors='pt')
        states, empty = (parts['text_encoder'](**x).last_hidden_state for x in (t, n))
        told = torch.cat([empty.expand(2, -1, -1), states]), torch.cat([n.attention_mask.expand(2, -1), t.attention_mask]).bool()
        made, start, noise = scheduler('DDPMScheduler', steps_offset=0), randn(2, 8, 16, 16, seed=1).float(), make_generator(2)
        made.set_timesteps(5)
        z = start
        for step in made.timesteps:
            u, c = parts['unet'](torch.cat([z, z]), step, told[0], encoder_attention_mask=told[1]).sample.chunk(2)
            z = made.step(u + 3*(c - u), step, z, generator=noise).prev_sample
        wav = parts['vocoder'](parts['vae'].decode(z/.75).sample[:, 0])[:, :10_240]
    pipe = load_tango(folder)
    own = dict(latents=start, num_inference_steps=5, sampler='ddpm', audio_length_in_s=.64)
    assert error(pipe(prompts, generator=make_generator(2), output='latents', **own), z) < 1e-4
    assert error(pipe(prompts, generator=make_generator(2), **own), wav) < 1e-3
    assert pipe.encoder.tokenizer.max_tokens == 512 and pipe.cfg.clip_seconds == 10.24 and pipe.vae.scale_factor.item() == .75
    with pytest.raises(ValueError, match='of a published system'): pipe.save_pretrained(tmp_path/'again')


def test_heads_are_a_choice(parts, tmp_path):
    folder = tango_folder(tmp_path/'tango', parts)
    usual, other = (read_tango(folder, heads)['unet'] for heads in (None, (2, 2, 4, 4)))
    assert [usual.cfg.heads(l) for l in range(4)] == [1, 1, 2, 2] and [other.cfg.heads(l) for l in range(4)] == [2, 2, 4, 4]
    z, t, cond = randn(1, 8, 16, 16).float(), torch.tensor([5]), Condition(((randn(1, 3, 24, seed=1).float(), None),))
    with torch.no_grad():
        told = dict(encoder_hidden_states=cond.contexts[0][0])
        assert error(usual(z, t, cond), parts['unet'](z, t, **told).sample) < 1e-5 < 1e-3 < error(other(z, t, cond), usual(z, t, cond))


REFUSED = dict(
    scheduler_name=dict(main=dict(scheduler_name='somebody/else')), channels=dict(main=dict(unet_model_name='stable-diffusion-2-1')),
    widths=dict(vae=dict(ddconfig=dict(ch=64, ch_mult=[1, 2, 4]))), mel_basis=dict(stft=dict(mel_fmax=7000)),
    mel_fmin=dict(stft=dict(mel_fmin=None)), sample_rate=dict(stft=dict(sampling_rate='fast')), scale_factor=dict(vae=dict(scale_factor=None)))


@pytest.mark.parametrize('word', REFUSED)
def test_folders_that_lie(word, parts, tmp_path):
    folder = tango_folder(tmp_path/'tango', parts, **REFUSED[word])
    for name in ('vae', 'stft'):   # None stands for a missing entry
        path = folder/f'{name}_config.json'
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v is not None}))
    with pytest.raises(ValueError, match=word): read_tango(folder)


@pytest.mark.parametrize('lost', ['pytorch_model_main.bin', 'pytorch_model_vae.bin', 'pytorch_model_stft.bin', 'vae_config.json'])
def test_missing_files_are_named(lost, parts, tmp_path):
    (tango_folder(tmp_path/'tango', parts)/lost).unlink()
    with pytest.raises(ValueError, match=lost.removesuffix('.bin').removesuffix('.json')): read_tango(tmp_path/'tango')


def test_pickles_do_not_run(parts, tmp_path):
    folder = tango_folder(tmp_path/'tango', parts)
    class Trap:
        def __reduce__(self): return (tmp_path/'ran').touch, ()
    torch.save(dict(x=Trap()), folder/'pytorch_model_vae.bin')
    with pytest.raises(ValueError, match='refused'): load_tango(folder)
    assert not (tmp_path/'ran').exists()
    with pytest.raises(ValueError, match='tango_files'): Tango.from_pretrained(folder)

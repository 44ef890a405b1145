"""Our modules against the libraries that a researcher would otherwise use, on random weights moved from there to here.

The error of a tensor is max|a - b| / max|b|. Networks: outputs and the gradients of every input and parameter, in
float64 to 1e-9 (a mistake stays, rounding does not) and in float32 to 1e-5 forward and 1e-4 backward. Everything that
starts at zero or one is randomised first. Each test ends with a control: a changed input must move the output by more
than a hundred times the tolerance.
"""
import math, warnings
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audiorepro.audiomae import AudioMAE, AudioMAEConfig, MAEEncoder, mae_target, masked_error, random_masking
from audiorepro.core import count_params, load_strict, make_generator
from audiorepro.diffusion import Schedule, min_snr_weight, sample_ddpm
from audiorepro.gpt2 import GPT2, GPT2Config
from audiorepro.gpt2_files import gpt2_state
from audiorepro.loa import LOAConfig, LOAModel
from audiorepro.loa_files import loa_state
from audiorepro.mel import FbankConfig, MelConfig, audiomae_input, kaldi_fbank, log_mel, mel_filters
from audiorepro.sampling import Condition, sample_ddim
from audiorepro.speech import PhonemeConfig, PhonemeEncoder
from audiorepro.speech_files import vits_state
from audiorepro.unet import UNet, UNetConfig
from audiorepro.vae import VAE, VAEConfig
from standins import random_parts

PRECISIONS = ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4))


# --- how two networks are compared ----------------------------------------------------------------------------------

def randn(*shape, seed=0): return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def error(a, b):
    "Largest difference in units of the largest value of the reference"
    assert a.shape == b.shape, f'{tuple(a.shape)} is not {tuple(b.shape)}'
    return float((a - b).detach().abs().max()/b.detach().abs().max())


def randomise(module, seed):
    "Every parameter: weights of unit gain, norms near one, biases and whatever started at zero away from it"
    g = make_generator(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=g).to(p)
        p.data = noise*p[0].numel()**-.5 if p.ndim > 1 else p.data.mean() + .1*noise
    return module.double().eval()


def gradients(module, outputs, inputs, seed):
    "Gradients of a random sum of the outputs: of the inputs and of the parameters, zeros where there is none"
    total = sum((y*randn(*y.shape, seed=seed + i).to(y)).sum() for i, y in enumerate(outputs))
    parts = dict(module.named_parameters())
    found = torch.autograd.grad(total, [*inputs.values(), *parts.values()], allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, (*inputs.values(), *parts.values()))]
    return dict(zip(inputs, found)), dict(zip(parts, found[len(inputs):]))


def prove(ours, theirs, convert, run_ours, run_theirs, inputs, fixed=None, change=None, seed=0):
    """Both networks on the same weights: `convert` turns the reference's tensors (and its gradients) into ours.

    `run_*(module, inputs, fixed)` give lists of outputs; `inputs` take gradients, `fixed` do not; `change` is the name of
    the input that the control changes (default: the first).
    """
    fixed, theirs = fixed or {}, randomise(theirs, seed)
    for dtype, forward, backward in PRECISIONS:
        a, b = deepcopy(ours).to(dtype).eval(), deepcopy(theirs).to(dtype)
        load_strict(a, convert(b.state_dict()))
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixed.items()}
        mine, peer = ({k: v.to(dtype).requires_grad_() for k, v in inputs.items()} for _ in range(2))
        out, ref = run_ours(a, mine, cast), run_theirs(b, peer, cast)
        assert len(out) == len(ref)
        for i, (x, y) in enumerate(zip(out, ref)):
            assert (gap := error(x, y)) <= forward, f'output {i}, {dtype}: {gap:.1e}'
        of_input, of_weights = gradients(a, out, mine, seed)
        peer_input, peer_weights = gradients(b, ref, peer, seed)
        peer_weights = convert(b.state_dict() | peer_weights)
        pairs = {k: (g, peer_input[k]) for k, g in of_input.items()} | {k: (g, peer_weights[k]) for k, g in of_weights.items()}
        largest = max(g.abs().max() for _, g in pairs.values())
        if dtype == torch.float64:  # gradients that vanish by symmetry (a bias of keys, a bias before a norm)
            vanish = {k for k, (_, g) in pairs.items() if g.abs().max() < 1e-12*largest}
            assert len(vanish) < len(pairs)/2
        for k, (g, h) in pairs.items():
            if k in vanish: assert g.abs().max() <= backward*largest, k
            else: assert (gap := error(g, h)) <= backward, f'gradient of {k}, {dtype}: {gap:.1e}'
        with torch.no_grad():
            mine[change or next(iter(mine))].data[-1].neg_()
            assert max(error(x, y) for x, y in zip(run_ours(a, mine, cast), ref)) > 100*forward
    return a


class our_noise:
    "A module of diffusers draws noise in the dtype of the sample, we draw float32 and convert: inside, it draws as we do"
    def __init__(self, module, generator, dtype): self.module, self.generator, self.dtype = module, generator, dtype
    def __enter__(self):
        self.own, g, dtype = self.module.randn_tensor, self.generator, self.dtype
        self.module.randn_tensor = lambda shape, **_: torch.randn(shape, generator=g).to(dtype)
    def __exit__(self, *_): self.module.randn_tensor = self.own


# --- front ends -----------------------------------------------------------------------------------------------------

def sounds(sample_rate=16_000, samples=32_000):
    "A few very different waveforms, (4, samples) float32"
    t = torch.arange(samples, dtype=torch.float64)/sample_rate
    noise, click = .2*randn(samples, seed=1), torch.zeros(samples, dtype=torch.float64)
    click[samples//3], click[-5:] = .9, -.4
    sweep = .5*torch.sin(2*math.pi*(50*t + 1500*t**2))
    tones = .3*torch.sin(2*math.pi*440*t) + .1*torch.sin(2*math.pi*3100*t) + 1e-3*noise
    return torch.stack([noise, click, sweep, tones]).float()


FRONT_ENDS = dict(hifigan=MelConfig.audioldm(), tacotron=MelConfig.tango(), hifigan_48k=MelConfig.audioldm_48k(),
                  odd=MelConfig(22_050, 512, 400, 128, 40, 60., 9_000., 'tacotron'))


@pytest.mark.parametrize('name', FRONT_ENDS)
def test_log_mel_is_librosas(name):
    import librosa
    cfg = FRONT_ENDS[name]
    bank = librosa.filters.mel(sr=cfg.sample_rate, n_fft=cfg.n_fft, n_mels=cfg.n_mels, fmin=cfg.fmin, fmax=cfg.fmax)
    assert error(mel_filters(cfg), torch.from_numpy(bank)) < 1e-6
    for wav in sounds(cfg.sample_rate):
        pad = (cfg.n_fft - cfg.hop_length)//2 if cfg.padding == 'hifigan' else cfg.n_fft//2
        spec = np.abs(librosa.stft(np.pad(wav.numpy(), pad, mode='reflect'), n_fft=cfg.n_fft, win_length=cfg.win_length,
                                   hop_length=cfg.hop_length, center=False))
        theirs, ours = torch.from_numpy(bank @ spec).T, log_mel(wav[None], cfg)[0, 0]
        assert error(ours.exp(), theirs.clamp(min=1e-5)) < 1e-5
        loud = theirs**2 > 1e-4*theirs.max()**2
        assert error(ours[loud], theirs.clamp(min=1e-5).log()[loud]) < 1e-5
        shifted = log_mel(wav[None].roll(1), cfg)[0, 0]
        assert error(shifted.exp(), theirs) > 1e-3


def fbank_by_definition(wav, cfg):
    "Kaldi's filter bank once more, written from its documentation: one frame, one band, one bin at a time, numpy float64"
    x, n_fft, rows = wav.double().numpy(), 512, []
    mel = lambda hz: 1127*math.log(1 + hz/700)
    low, high = mel(20), mel(cfg.sample_rate/2)
    bank = np.zeros((cfg.n_mels, n_fft//2 + 1))
    for m in range(cfg.n_mels):
        left, centre, right = (low + (m + i)*(high - low)/(cfg.n_mels + 1) for i in range(3))
        for k in range(n_fft//2):
            at = mel(k*cfg.sample_rate/n_fft)
            if left < at < right: bank[m, k] = (at - left)/(centre - left) if at <= centre else (right - at)/(right - centre)
    window = np.array([.5 - .5*math.cos(2*math.pi*i/(400 - 1)) for i in range(400)])
    for start in range(0, len(x) - 400 + 1, 160):
        frame = x[start:start + 400] - x[start:start + 400].mean()
        frame = np.concatenate([[frame[0] - .97*frame[0]], frame[1:] - .97*frame[:-1]])
        rows.append(bank @ np.abs(np.fft.rfft(frame*window, n_fft))**2)
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize('bands', [128, 64])
def test_kaldi_fbank_is_the_definition(bands):
    cfg, floor = replace(FbankConfig.audiomae(), n_mels=bands), 2**-23
    for wav in sounds(samples=8_000):
        power, ours = fbank_by_definition(wav, cfg), kaldi_fbank(wav[None], cfg)[0].double()
        assert error(ours.exp(), power.clamp(min=floor)) < 1e-5
        loud = power > 1e-4*power.max()
        assert error(ours[loud], power[loud].log()) < 1e-6
        assert error(kaldi_fbank(-.9*wav[None], cfg)[0].double().exp(), power) > 1e-3


def test_audiomae_input_is_transformers():
    from transformers import ASTFeatureExtractor
    cfg = FbankConfig.audiomae()
    for wav in (*sounds(), *sounds(samples=170_000)[2:3]):  # shorter and longer than 1024 frames
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # it says that some bands are empty
            theirs = ASTFeatureExtractor()(wav.numpy(), sampling_rate=16_000, return_tensors='pt').input_values[0]
        ours = audiomae_input(wav[None], cfg)[0, 0]
        power, peer = ((x*2*cfg.std + cfg.mean).double().exp() for x in (ours, theirs))
        assert error(power, peer) < 1e-5
        loud = peer > 1e-4*peer.max()
        assert error(ours[loud], theirs[loud]) < 1e-5
        assert error(audiomae_input(wav[None].roll(80), cfg)[0, 0], theirs) > 1e-3


# --- VAE ------------------------------------------------------------------------------------------------------------

VAES = [VAEConfig(channels=8, num_res_blocks=2, groups=4), VAEConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, groups=8),
        VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=3, groups=2)]


@pytest.mark.parametrize('cfg', VAES, ids=lambda c: f"mult{'-'.join(map(str, c.channel_mult))}")
def test_vae_is_diffusers(cfg):
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders import vae
    levels = len(cfg.channel_mult)
    theirs = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=cfg.z_channels, norm_num_groups=cfg.groups,
        layers_per_block=cfg.num_res_blocks, block_out_channels=cfg.widths,
        down_block_types=('DownEncoderBlock2D',)*levels, up_block_types=('UpDecoderBlock2D',)*levels)

    def ours_out(model, x, _):
        p = model.encode(x['mel'])
        return [p.mean, p.logvar, p.std, p.kl(), p.sample(make_generator(3)), model.decode(p.sample(make_generator(3))), model.decode(x['z'])]

    def theirs_out(model, x, _):
        p = model.encode(x['mel']).latent_dist
        with our_noise(vae, make_generator(3), p.mean.dtype): z = p.sample()
        return [p.mean, p.logvar, p.std, p.kl(), z, model.decode(z).sample, model.decode(x['z']).sample]

    convert = lambda state: state | dict(scale_factor=torch.ones(()))
    c = cfg.compression
    inputs = dict(mel=randn(2, 1, 6*c, 4*c, seed=1), z=randn(2, cfg.z_channels, 6, 4, seed=2))
    prove(VAE(cfg), theirs, convert, ours_out, theirs_out, inputs)


# --- T-UNet, Tango --------------------------------------------------------------------------------------------------

WIDTHS = (16, 32, 48, 80)
UNETS = dict(  # contexts, heads, depth, latent
    base_8_heads=((None, 24, 40), 8, 1, (8, 8)), base_own_heads=((None, 24, 40), (4, 8, 12, 20), 1, (8, 8)),
    large=((None, 24, 40, None), (4, 8, 12, 20), 2, (8, 8)), speech=((None, 24), (1, 2, 3, 5), 1, (16, 8)),
    odd_sizes=((None, 24), (4, 8, 12, 20), 1, (20, 12)))


@pytest.mark.parametrize('name', UNETS)
def test_t_unet_is_diffusers(name):
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
    contexts, heads, depth, size = UNETS[name]
    ours = UNet(UNetConfig(channels=WIDTHS, contexts=contexts, num_heads=heads, depth=depth, groups=8, layers_per_block=1))
    theirs = AudioLDM2UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=WIDTHS, norm_num_groups=8, layers_per_block=1,
        down_block_types=('DownBlock2D',) + ('CrossAttnDownBlock2D',)*3, up_block_types=('CrossAttnUpBlock2D',)*3 + ('UpBlock2D',),
        cross_attention_dim=[list(contexts)]*4, attention_head_dim=heads, transformer_layers_per_block=depth)
    has_t5 = 40 in contexts
    masks = dict(loa_mask=torch.ones(2, 8, dtype=torch.bool), t5_mask=torch.tensor([[1]*5, [1, 1, 1, 0, 0]]).bool())

    def ours_out(model, x, f):
        conds = [(x[k], f[f'{k}_mask']) for k in ('loa', 't5') if k in x]
        return [model(x['z'], f['t'], Condition(tuple(conds)))]

    def theirs_out(model, x, f):
        second = dict(encoder_hidden_states_1=x['t5'], encoder_attention_mask_1=f['t5_mask'].long()) if has_t5 else {}
        return [model(x['z'], f['t'], x['loa'], encoder_attention_mask=f['loa_mask'].long(), **second).sample]

    inputs = dict(z=randn(2, 8, *size, seed=1), loa=randn(2, 8, 24, seed=2), **(dict(t5=randn(2, 5, 40, seed=3)) if has_t5 else {}))
    fixed = dict(t=torch.tensor([3, 871]), **masks)
    for change in list(inputs): prove_once(ours, theirs, ours_out, theirs_out, inputs, fixed, change, only_control=change != 'z')
    if has_t5:  # a padded position must not matter, a real one must
        model = prove_once(ours, theirs, ours_out, theirs_out, inputs, fixed, 'z', only_control=True)
        for position, moves in ((4, False), (2, True)):
            x = {k: v.float().clone() for k, v in inputs.items()}
            before = ours_out(model, x, fixed)[0]
            x['t5'][1, position] += 1
            assert (error(ours_out(model, x, fixed)[0], before) > 1e-6) == moves


def prove_once(ours, theirs, ours_out, theirs_out, inputs, fixed, change, only_control=False):
    "The whole proof for one input; for the others only that the network listens to them"
    if not only_control: return prove(ours, theirs, dict, ours_out, theirs_out, inputs, fixed, change)
    model = deepcopy(ours).eval()
    load_strict(model, {k: v.float() for k, v in theirs.state_dict().items()})
    x = {k: v.float() for k, v in inputs.items()}
    with torch.no_grad():
        before, other = ours_out(model, x, fixed)[0], dict(x, **{change: -x[change]})
        assert error(ours_out(model, other, fixed)[0], before) > 1e-3
    return model


def test_same_file_other_heads():
    "Heads leave no trace in the weights: both layouts load one file without complaint, and answer differently"
    cfg = UNetConfig(channels=WIDTHS, contexts=(None, 24), groups=8, layers_per_block=1, num_heads=8)
    eight = randomise(UNet(cfg), 0)
    own = UNet(replace(cfg, num_heads=(4, 8, 12, 20))).double().eval()
    load_strict(own, eight.state_dict())
    z, t, cond = randn(1, 8, 8, 8), torch.tensor([500]), Condition(((randn(1, 8, 24, seed=1), None),))
    with torch.no_grad(): assert error(own(z, t, cond), eight(z, t, cond)) > 1e-2


TANGOS = dict(one_context=(1, None, (1, 2, 3, 4)), two_layers=(2, None, 2), film=(1, 20, (1, 2, 3, 4)))


@pytest.mark.parametrize('name', TANGOS)
def test_tango_unet_is_diffusers(name):
    from diffusers import UNet2DConditionModel
    layers, pooled, heads = TANGOS[name]
    channels = (16, 32, 48, 48) if heads != (1, 2, 3, 4) else (16, 32, 48, 64)
    ours = UNet(UNetConfig(channels=channels, layers_per_block=layers, attention_levels=(0, 1, 2), contexts=(24,),
                           num_heads=heads, groups=8, linear_proj=True, pooled_dim=pooled))
    film = dict(class_embed_type='simple_projection', projection_class_embeddings_input_dim=pooled, class_embeddings_concat=True)
    theirs = UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=channels, norm_num_groups=8, layers_per_block=layers,
        cross_attention_dim=24, attention_head_dim=heads, use_linear_projection=True, upcast_attention=True, sample_size=(32, 2),
        down_block_types=('CrossAttnDownBlock2D',)*3 + ('DownBlock2D',), up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',)*3,
        **(film if pooled else {}))
    inputs = dict(z=randn(2, 8, 16, 8, seed=1), t5=randn(2, 6, 24, seed=2)) | (dict(pooled=randn(2, pooled, seed=3)) if pooled else {})
    fixed = dict(t=torch.tensor([0, 999]), mask=torch.tensor([[1]*6, [1, 1, 0, 0, 0, 0]]).bool())
    ours_out = lambda m, x, f: [m(x['z'], f['t'], Condition(((x['t5'], f['mask']),), x.get('pooled')))]
    theirs_out = lambda m, x, f: [m(x['z'], f['t'], x['t5'], encoder_attention_mask=f['mask'], class_labels=x.get('pooled')).sample]
    for change in list(inputs): prove_once(ours, theirs, ours_out, theirs_out, inputs, fixed, change, only_control=change != 'z')


TANGO_WIDTHS = dict(small=(160, 320, 640, 640), medium=(320, 640, 1280, 1280), large=(480, 960, 1920, 1920))
TANGO_SIZES = dict(small=222_995_688, medium=865_933_768, large=1_928_814_248)


@pytest.mark.parametrize('name', TANGO_WIDTHS)
def test_tango_sizes(name):
    cfg = UNetConfig(channels=TANGO_WIDTHS[name], num_heads=(5, 10, 20, 20), attention_levels=(0, 1, 2), contexts=(1024,), linear_proj=True)
    assert count_params(lambda: UNet(cfg)) == TANGO_SIZES[name]
    preset = getattr(UNetConfig, f'tango_{name}', None)
    assert preset is None or preset() == cfg


PUBLISHED = [(UNet, UNetConfig.audioldm2, 346_943_496), (UNet, UNetConfig.audioldm2_large, 718_012_296), (UNet, UNetConfig.audioldm2_speech, 261_926_536),
             (UNet, UNetConfig.audioldm2_t5only, 265_531_016), (VAE, VAEConfig.audioldm, 55_376_873), (GPT2, GPT2Config.gpt2, 124_439_808),
             (LOAModel, LOAConfig.audioldm2, 124_439_808 + 1_184_256), (MAEEncoder, AudioMAEConfig.audiomae, 85_254_144),
             (PhonemeEncoder, PhonemeConfig.audioldm2_speech, 6_387_264)]


@pytest.mark.parametrize('model, preset, size', PUBLISHED, ids=lambda x: getattr(x, '__qualname__', ''))
def test_published_sizes(model, preset, size): assert count_params(lambda: model(preset())) == size


# --- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULES = dict(audioldm2=Schedule.audioldm2(), toy=Schedule.toy(), tango=Schedule.tango(), linear=Schedule(beta_schedule='linear', steps_offset=0))
TARGETS = dict(eps='epsilon', v='v_prediction')


def in_precision(schedule, dtype):
    "The same schedule with its products kept in another precision"
    found = replace(schedule)
    found.__dict__['alpha_bar'] = schedule.alpha_bar.to(dtype)
    return found


def reference_scheduler(cls, schedule, n, dtype, **options):
    "diffusers' scheduler with the same betas; in float64 with our cumulative products, which it keeps in float32"
    made = cls(beta_start=schedule.beta_start, beta_end=schedule.beta_end, clip_sample=False, prediction_type=TARGETS[schedule.prediction_type],
               beta_schedule=dict(sqrt_linear='scaled_linear', linear='linear')[schedule.beta_schedule], **options)
    assert error(schedule.alpha_bar.float(), made.alphas_cumprod) < 1e-5
    if dtype == torch.float64:
        made.alphas_cumprod = schedule.alpha_bar.double()
        if hasattr(made, 'final_alpha_cumprod'): made.final_alpha_cumprod = made.alphas_cumprod[0]
    made.set_timesteps(n)
    return made


def denoise(z, t, cond=None): return torch.sin(3*z) + t.view(-1, 1, 1, 1)/1000


def walk(sampler, schedule, n, dtype, **options):
    "Our sampler's steps and latents, from a known start with known noise"
    z, steps = randn(2, 3, 4, 4).to(dtype), []
    sampler(denoise, z.shape, schedule, n, latents=z, generator=make_generator(1), callback=lambda i, t, z_t: steps.append((t, z_t)), **options)
    return z, steps


@pytest.mark.parametrize('n', [10, 50, 200])
@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('eta', [0., 1.])
def test_ddim_is_diffusers(name, n, eta):
    from diffusers import DDIMScheduler
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        schedule = in_precision(SCHEDULES[name], dtype)
        reference = reference_scheduler(DDIMScheduler, schedule, n, dtype, steps_offset=schedule.steps_offset, set_alpha_to_one=False)
        z, steps = walk(sample_ddim, schedule, n, dtype, eta=eta)
        assert [t for t, _ in steps] == reference.timesteps.tolist()
        g, moved = make_generator(1), 0.
        for t, z_t in steps:  # float64: two loops on their own; float32: each step from the same latent
            noise = torch.randn(z.shape, generator=g).to(dtype) if eta else None
            pred = denoise(z, torch.full((2,), t))
            peer = reference.step(pred, t, z, eta=eta, variance_noise=noise).prev_sample
            assert (gap := error(z_t, peer)) < tolerance, f't = {t}, {dtype}: {gap:.1e}'
            other = reference.step(pred.neg(), t, z, eta=eta, variance_noise=noise).prev_sample
            moved, z = max(moved, error(z_t, other)), peer if dtype == torch.float64 else z_t
        assert moved > 100*tolerance


def test_last_step_of_ddim_ends_at_the_first_alpha():
    "Not at one: some noise is left; the choice shows in the last step alone"
    from diffusers import DDIMScheduler
    schedule, n = Schedule.audioldm2(), 50
    (_, before), (t, last) = walk(sample_ddim, schedule, n, torch.float64)[1][-2:]
    gaps = {}
    for is_one in (False, True):
        reference = reference_scheduler(DDIMScheduler, schedule, n, torch.float32, steps_offset=1, set_alpha_to_one=is_one)
        reference.alphas_cumprod = schedule.alpha_bar.double()
        if not is_one: reference.final_alpha_cumprod = schedule.alpha_bar[0].double()
        gaps[is_one] = error(last, reference.step(denoise(before, torch.full((2,), t)), t, before).prev_sample)
    assert gaps[False] < 1e-9 and gaps[True] > 1e-4, gaps


@pytest.mark.parametrize('n', [10, 50, 200])
@pytest.mark.parametrize('name', SCHEDULES)
def test_ddpm_is_diffusers(name, n):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        schedule = in_precision(SCHEDULES[name], dtype)
        reference = reference_scheduler(DDPMScheduler, schedule, n, dtype)
        z, steps = walk(sample_ddpm, schedule, n, dtype)
        assert [t for t, _ in steps] == reference.timesteps.tolist()
        g, moved = make_generator(1), 0.
        for t, z_t in steps:
            state, pred = g.get_state(), denoise(z, torch.full((2,), t))
            with our_noise(scheduling_ddpm, g, dtype): peer = reference.step(pred, t, z).prev_sample
            assert (gap := error(z_t, peer)) < tolerance, f't = {t}, {dtype}: {gap:.1e}'
            after = g.get_state(); g.set_state(state)
            with our_noise(scheduling_ddpm, g, dtype): other = reference.step(pred.neg(), t, z).prev_sample
            g.set_state(after)
            moved, z = max(moved, error(z_t, other)), peer if dtype == torch.float64 else z_t
        assert moved > 100*tolerance


@pytest.mark.parametrize('name', SCHEDULES)
def test_min_snr_weight(name):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    schedule, t = SCHEDULES[name], torch.arange(1000)
    snr = compute_snr(reference_scheduler(DDPMScheduler, schedule, 10, torch.float64), t)
    for gamma in (1., 5.):
        weight = min_snr_weight(schedule, gamma)
        assert error(weight.double(), snr.clamp(max=gamma)/snr) < 1e-6
        assert weight.dtype == torch.float32 and weight.max() == 1
    assert error(min_snr_weight(schedule, 5.), min_snr_weight(schedule, 1.)) > 1e-3
    by_hand = Schedule(2, .2, .75, 'linear')  # alpha_bar .8 and .2: SNR 4 and 1/4
    assert error(min_snr_weight(by_hand, 2.), torch.tensor([.5, 1.])) < 1e-6
    assert error(min_snr_weight(by_hand, 5.), torch.ones(2)) < 1e-6
    assert error(min_snr_weight(by_hand, .1), torch.tensor([.025, .4])) < 1e-6


# --- GPT-2, projection, LOA -----------------------------------------------------------------------------------------

GPT2S = [GPT2Config(32, 3, 4, 40, 11), GPT2Config(24, 1, 2, 16, 7), GPT2Config(48, 4, 12, 24, 3)]


def hf_gpt2(cfg, kind='GPT2Model'):
    import transformers
    sizes = dict(vocab_size=cfg.vocab_size or 5, n_embd=cfg.dim, n_layer=cfg.num_layers, n_head=cfg.heads, n_positions=cfg.num_positions)
    return getattr(transformers, kind)(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


@pytest.mark.parametrize('cfg', GPT2S, ids=lambda c: f'width{c.dim}')
def test_gpt2_is_transformers(cfg):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:6] = False
    fixed = dict(mask=mask, positions=torch.tensor([[*range(9)], [0, 1, 2, 3, 3, 3, 4, 5, 6]]))
    keep = lambda x, f: x[f['mask']]  # what is at padded positions is nobody's business

    def ours_out(model, x, f):
        whole = model(x['embeds'], f['mask'], positions=f['positions'])[0]
        first, past = model(x['embeds'][:, :5], f['mask'][:, :5])
        return [keep(whole, f), model(x['embeds'])[0], keep(first, dict(mask=f['mask'][:, :5])), model(x['embeds'][:, 5:], f['mask'], past)[0][:, 1:]]

    def theirs_out(model, x, f):
        whole = model(inputs_embeds=x['embeds'], attention_mask=f['mask'].long(), position_ids=f['positions']).last_hidden_state
        first = model(inputs_embeds=x['embeds'][:, :5], attention_mask=f['mask'][:, :5].long(), position_ids=torch.arange(5)[None], use_cache=True)
        rest = model(inputs_embeds=x['embeds'][:, 5:], attention_mask=f['mask'].long(), position_ids=torch.arange(5, 9)[None],
                     past_key_values=first.past_key_values).last_hidden_state
        return [keep(whole, f), model(inputs_embeds=x['embeds']).last_hidden_state, keep(first.last_hidden_state, dict(mask=f['mask'][:, :5])), rest[:, 1:]]

    prove(GPT2(cfg), hf_gpt2(cfg), gpt2_state, ours_out, theirs_out, dict(embeds=randn(2, 9, cfg.dim, seed=4)), fixed)


def test_gpt2_file_with_a_head():
    "`GPT2LMHeadModel` saves the prefix `transformer.` and a head tied to the words"
    theirs = randomise(hf_gpt2(GPT2S[0], 'GPT2LMHeadModel'), 5)
    ours = GPT2(GPT2S[0]).double().eval()
    load_strict(ours, gpt2_state(theirs.state_dict()))
    x = randn(1, 6, 32)
    with torch.no_grad():
        assert error(ours(x)[0], theirs.transformer(inputs_embeds=x).last_hidden_state) < 1e-9
        assert error(ours(-x)[0], ours(x)[0]) > 1e-3


@pytest.mark.parametrize('dims, count', [((8, 12), 8), ((5, 7), 3)])
def test_projection_and_loa_are_diffusers(dims, count):
    "Projections with SOS and EOS, then the pipeline's own generation loop, gradients through all of its steps"
    from diffusers import AudioLDM2Pipeline
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
    cfg = replace(GPT2S[0], vocab_size=5)
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection, self.language = AudioLDM2ProjectionModel(*dims, cfg.dim), hf_gpt2(cfg, 'GPT2LMHeadModel')

    def convert(state):
        part = lambda name: {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        return loa_state(part('projection.'), part('language.'))

    def theirs_out(model, x, f):
        joined = model.projection(x['clap'], x['t5'], f['clap_mask'].long(), f['t5_mask'].long())
        pipe = SimpleNamespace(language_model=model.language, device='cpu')
        loa = AudioLDM2Pipeline.generate_language_model(
            pipe, joined.hidden_states, attention_mask=joined.attention_mask, max_new_tokens=count)
        return [joined.hidden_states, loa]

    def ours_out(model, x, f):
        conds = [(x['clap'], f['clap_mask']), (x['t5'], f['t5_mask'])]
        return [model.conditions(conds)[0], model.generate(conds)]

    ours = LOAModel(LOAConfig(cfg, dims, count, text_padding='batch'))
    inputs = dict(clap=randn(3, 1, dims[0], seed=1), t5=randn(3, 6, dims[1], seed=2))
    fixed = dict(clap_mask=torch.ones(3, 1, dtype=torch.bool), t5_mask=torch.arange(6) < torch.tensor([[6], [2], [4]]))
    model = prove(ours, Both(), convert, ours_out, theirs_out, inputs, fixed)
    conds = [(inputs['clap'].float(), fixed['clap_mask']), (inputs['t5'].float(), fixed['t5_mask'])]
    compacted = LOAModel(replace(model.cfg, text_padding='compact')).eval()
    compacted.load_state_dict(model.state_dict())
    with torch.no_grad(): shift = (compacted.generate(conds) - model.generate(conds)).abs().amax((1, 2))
    assert shift[0] < 1e-5 and (shift[1:] > 1e-3).all()  # only where there is padding do the two layouts differ


# --- texts in bulk ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['clap', 't5'])
def test_many_texts_are_what_each_is_alone(kind):
    "Forty texts, sorted by length inside the encoders, against transformers one text at a time; the order is part of it"
    from audiorepro.clap_files import HFCLAP
    from audiorepro.t5 import T5, T5Config
    from audiorepro.t5_files import HFT5, encoder_state
    parts, words = random_parts('tiny'), 'a dog barks then rain falls while wind blows'.split()
    texts = [' '.join(words[i % 3:i % 3 + 1 + i % 7]) for i in range(40)]
    if kind == 'clap':
        tokenizer, model = parts['tokenizer'], parts['text_encoder'].eval()
        def alone(ids):
            out = model.get_text_features(input_ids=ids)
            return F.normalize(getattr(out, 'pooler_output', out), dim=-1)
        found = list(HFCLAP(model, tokenizer).embed_text(texts)[:, None])
    else:
        tokenizer, model = parts['tokenizer_2'], parts['text_encoder_2'].eval()
        t5 = T5(T5Config.from_transformers(model.config.to_dict()))
        load_strict(t5, encoder_state(model.state_dict()))
        def alone(ids): return model(ids).last_hidden_state[0]
        states, mask = HFT5(t5.eval(), tokenizer).encode(texts)
        found = [s[m] for s, m in zip(states, mask)]
    with torch.no_grad():
        wanted = [alone(tokenizer([text], return_tensors='pt')['input_ids']) for text in texts]
        assert max(error(a, b) for a, b in zip(found, wanted)) < 1e-5
        assert error(found[1], wanted[8]) > 1e-3  # two texts of two words


# --- AudioMAE -------------------------------------------------------------------------------------------------------

STARTS = (('patch_embed.proj', 'vit.embeddings.patch_embeddings.projection'), ('cls_token', 'vit.embeddings.cls_token'),
          ('decoder_blocks', 'decoder.decoder_layers'), ('decoder_', 'decoder.decoder_'),
          ('mask_token', 'decoder.mask_token'), ('blocks', 'vit.layers'), ('norm.', 'vit.layernorm.'))
INSIDE = (('.norm1', '.layernorm_before'), ('.norm2', '.layernorm_after'), ('attn.to_out.0', 'attention.o_proj'),
          ('attn.to_q', 'attention.q_proj'), ('attn.to_k', 'attention.k_proj'), ('attn.to_v', 'attention.v_proj'))


def to_vit(name):
    start, to = next((a, b) for a, b in STARTS if name.startswith(a))
    name = to + name.removeprefix(start)
    for a, b in INSIDE: name = name.replace(a, b)
    return name


def vit_mae(cfg):
    "transformers' class for our settings"
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    square = cfg.input_size[0] == cfg.input_size[1]
    return ViTMAEForPreTraining(ViTMAEConfig(
        image_size=cfg.input_size[0] if square else cfg.input_size, patch_size=cfg.patch_size[0], num_channels=1, hidden_size=cfg.dim,
        num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads, intermediate_size=4*cfg.dim, decoder_hidden_size=cfg.decoder_dim,
        decoder_num_hidden_layers=cfg.decoder_depth, decoder_num_attention_heads=cfg.decoder_heads,
        decoder_intermediate_size=4*cfg.decoder_dim, mask_ratio=cfg.mask_ratio, norm_pix_loss=cfg.norm_target,
        layer_norm_eps=1e-6, attn_implementation='sdpa'))


def vit_convert(ours, theirs):
    "Their names -> ours; besides the two fixed tables of positions nothing may be left over"
    tables = {'vit.embeddings.position_embeddings', 'decoder.decoder_pos_embed'}
    names = {k: to_vit(k) for k in ours.state_dict()}
    assert set(theirs.state_dict()) - set(names.values()) == tables
    return lambda state: {k: state[v] for k, v in names.items()}


def use_tables(ours, theirs):
    "Put our tables of positions into the reference, which must not learn or randomise them"
    for owner, name, table in ((theirs.vit.embeddings, 'position_embeddings', ours.pos_embed), (theirs.decoder, 'decoder_pos_embed', ours.decoder_pos_embed)):
        delattr(owner, name)
        owner.register_buffer(name, F.pad(table, (0, 0, 1, 0)))


SMALL = dict(dim=16, depth=3, heads=2, decoder_dim=8, decoder_depth=2, decoder_heads=2)
SQUARES = [AudioMAEConfig((32, 32), (4, 4), **SMALL, mask_ratio=.75), AudioMAEConfig((32, 32), (4, 4), **SMALL, mask_ratio=.75, norm_target=False),
           AudioMAEConfig((24, 24), (8, 8), 24, 2, 3, 16, 1, 4, mask_ratio=.5)]


@pytest.mark.parametrize('cfg', SQUARES, ids=('normed', 'plain', 'other'))
def test_audiomae_is_transformers(cfg):
    "Masking by given noise, encoder, decoder, prediction and loss, with and without standardised patches"
    ours, theirs = AudioMAE(cfg), vit_mae(cfg)
    for x in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed, theirs.vit.embeddings.patch_embeddings.projection):
        x._is_hf_initialized = False  # else the reference takes its empty tables for loaded ones
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(cfg.num_patches)
    for mine, name in ((ours.pos_embed, 'vit.embeddings.position_embeddings'), (ours.decoder_pos_embed, 'decoder.decoder_pos_embed')):
        assert error(F.pad(mine, (0, 0, 1, 0)), theirs.state_dict()[name]) < 1e-6  # the same table
    convert = vit_convert(ours, theirs)
    use_tables(ours, theirs)
    noise = torch.rand(2, cfg.num_patches, generator=make_generator(1))

    def ours_out(model, x, f):
        keep, restore, mask = random_masking(f['noise'], cfg.mask_ratio)
        latent = model.norm(model.forward_encoder(x['fbank'], keep)[-1])
        pred = model.forward_decoder(latent, restore)
        loss = masked_error(pred, mae_target(x['fbank'], cfg)[0], mask.to(pred))
        return [latent, pred, loss[None], restore.to(pred), mask.to(pred)]

    def theirs_out(model, x, f):
        hidden, out = model.vit(x['fbank'], noise=f['noise']).last_hidden_state, model(x['fbank'], noise=f['noise'])
        return [hidden, out.logits, out.loss[None], out.ids_restore.to(hidden), out.mask.to(hidden)]

    with_gradient = lambda run: lambda m, x, f: [y if y.requires_grad else y + 0*x['fbank'].sum() for y in run(m, x, f)]
    prove(ours, theirs, convert, with_gradient(ours_out), with_gradient(theirs_out), dict(fbank=randn(2, 1, *cfg.input_size)), dict(noise=noise))


GRIDS = dict(tall=AudioMAEConfig((64, 16), (4, 4), **SMALL), published_input=AudioMAEConfig((1024, 128), (16, 16), **SMALL))


@pytest.mark.parametrize('name', GRIDS)
def test_audiomae_on_long_pictures(name, monkeypatch):
    "Grids that are not square: encoder without masking, as for the LOA, and with it; then the decoder"
    from transformers.models.vit_mae import modeling_vit_mae as module
    cfg = GRIDS[name]
    for cls in (module.ViTMAEEmbeddings, module.ViTMAEDecoder): monkeypatch.setattr(cls, 'initialize_weights', lambda *_: None)
    ours, theirs = AudioMAE(cfg), vit_mae(cfg)
    convert = vit_convert(ours, theirs)
    use_tables(ours, theirs)
    noise = torch.rand(2, cfg.num_patches, generator=make_generator(1))
    ordered = torch.linspace(0, 1, cfg.num_patches).expand(2, -1)  # hides nothing out of order

    def ours_out(model, x, f):
        keep, restore, _ = random_masking(f['noise'], cfg.mask_ratio)
        latent = model.norm(model.forward_encoder(x['fbank'], keep)[-1])
        return [latent, model.forward_decoder(latent, restore), model.norm(model.forward_encoder(x['fbank'])[-1])]

    def theirs_out(model, x, f):
        out = model.vit(x['fbank'], noise=f['noise'])
        logits = model.decoder(out.last_hidden_state, out.ids_restore).logits
        ratio, model.vit.embeddings.config.mask_ratio = model.vit.embeddings.config.mask_ratio, 0.
        whole = model.vit(x['fbank'], noise=f['ordered']).last_hidden_state
        model.vit.embeddings.config.mask_ratio = ratio
        return [out.last_hidden_state, logits, whole]

    fixed = dict(noise=noise, ordered=ordered)
    prove(ours, theirs, convert, ours_out, theirs_out, dict(fbank=randn(2, 1, *cfg.input_size)), fixed)


# --- phoneme encoder ------------------------------------------------------------------------------------------------

PHONEMES = [(PhonemeConfig(vocab_size=13, dim=16, layers=2, heads=2, ffn_dim=24, window=4, max_length=20), 11),
            (PhonemeConfig(vocab_size=7, dim=24, layers=3, heads=3, ffn_dim=20, window=2, kernel_size=5, max_length=20), 9),
            (PhonemeConfig(vocab_size=7, dim=8, layers=1, heads=1, ffn_dim=12, window=4, max_length=20), 3)]


@pytest.mark.parametrize('cfg, length', PHONEMES, ids=('window4', 'window2', 'shorter_than_window'))
def test_phoneme_encoder_is_vits(cfg, length):
    from transformers import VitsConfig, VitsModel
    sizes = dict(flow_size=cfg.dim, upsample_initial_channel=16, upsample_rates=[2], upsample_kernel_sizes=[4], depth_separable_num_layers=1,
                 duration_predictor_num_flows=1, prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1)
    theirs = VitsModel(VitsConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, window_size=cfg.window,
        ffn_dim=cfg.ffn_dim, ffn_kernel_size=cfg.kernel_size, **sizes)).text_encoder
    ids = torch.randint(1, cfg.vocab_size, (2, length), generator=make_generator(0))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length//2 + 1:] = False

    def ours_out(model, x, f):
        hidden = model.encode_ids(f['ids'], f['mask'])
        return [hidden + x['nothing'], model.stats(hidden, f['mask'])]

    def theirs_out(model, x, f):
        padding = f['mask'][..., None].to(x['nothing'])
        out = model(f['ids'], attention_mask=f['mask'].long(), padding_mask=padding)
        return [out.last_hidden_state + x['nothing'], torch.cat([out.prior_means, out.prior_log_variances], -1)]

    convert = lambda state: vits_state(state) | dict(positions=torch.zeros(1, cfg.dim, cfg.max_length).to(state['project.bias']))
    inputs = dict(nothing=randn(2, length, cfg.dim))  # ids take no gradient; the parameters do
    model = prove(PhonemeEncoder(cfg), theirs, convert, ours_out, theirs_out, inputs, dict(ids=ids, mask=mask))
    with torch.no_grad():
        before, other = model.encode_ids(ids, mask), ids.clone()
        other[:, 0] = other[:, 0] % (cfg.vocab_size - 1) + 1
        assert error(model.encode_ids(other, mask), before) > 1e-3


def test_phoneme_folders(tmp_path):
    "A `VitsModel` alone, a speech pipeline of diffusers (positions in its projection model), the official checkpoint"
    import json
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
    from transformers import VitsConfig, VitsModel
    rest = dict(flow_size=16, upsample_initial_channel=16, upsample_rates=[2], upsample_kernel_sizes=[4], depth_separable_num_layers=1,
                duration_predictor_num_flows=1, prior_encoder_num_flows=1, posterior_encoder_num_wavenet_layers=1)
    vits = VitsModel(VitsConfig(vocab_size=13, hidden_size=16, num_hidden_layers=2, ffn_dim=24, window_size=3, **rest)).eval()
    projection = AudioLDM2ProjectionModel(8, 16, 12, use_learned_position_embedding=True, max_seq_length=20)
    projection.learnable_positional_embedding.data.normal_()
    vits.save_pretrained(tmp_path/'vits')
    vits.save_pretrained(tmp_path/'pipe'/'text_encoder_2')
    projection.save_pretrained(tmp_path/'pipe'/'projection_model')
    (tmp_path/'pipe'/'model_index.json').write_text(json.dumps({'_class_name': 'AudioLDM2Pipeline'}))
    alone, inside = (PhonemeEncoder.from_pretrained(tmp_path/n) for n in ('vits', 'pipe'))
    ids, mask = torch.randint(1, 13, (2, 9), generator=make_generator(0)), torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        states = vits.text_encoder(ids, attention_mask=mask.long(), padding_mask=mask[..., None].float()).last_hidden_state
        places = projection.learnable_positional_embedding[:, :, :9].transpose(1, 2)
        assert error(alone(ids, mask), states) < 1e-5 and error(inside(ids, mask), states + places) < 1e-5
        assert error(alone(ids, mask), states + places) > 1e-3
    ours = PhonemeEncoder(PhonemeConfig.audioldm2_speech()).eval()
    ours.positions.data.normal_()
    official = {}
    for name, x in ours.state_dict().items():
        if name.startswith('blocks.'):
            _, i, rest = name.split('.', 2)
            for a, b in (('attn.to_out', 'attn_layers.{}.conv_o'), ('attn.to_', 'attn_layers.{}.conv_'), ('attn.rel', 'attn_layers.{}.emb_rel'),
                         ('conv_', 'ffn_layers.{}.conv_'), ('norm1.weight', 'norm_layers_1.{}.gamma'), ('norm1.bias', 'norm_layers_1.{}.beta'),
                         ('norm2.weight', 'norm_layers_2.{}.gamma'), ('norm2.bias', 'norm_layers_2.{}.beta')):
                if rest.startswith(a): rest = b.format(i) + rest.removeprefix(a); break
            name = f'encoder.{rest}'
        name = name.replace('embed.', 'emb.').replace('project.', 'proj.')
        name = 'learnable_positional_embedding' if name == 'positions' else f'text_encoder.{name}'
        official[f'cond_stage_models.0.cond_stage_models.1.{name}'] = x[..., None] if x.shape == (192, 192) else x
    torch.save(dict(state_dict=official | dict(scale_factor=torch.ones(())), epoch=3), tmp_path/'speech.pth')
    again = PhonemeEncoder.from_pretrained(tmp_path/'speech.pth')
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in ours.state_dict().items())
    official.popitem()
    torch.save(dict(state_dict=official), tmp_path/'less.pth')
    with pytest.raises(ValueError, match='missing'): PhonemeEncoder.from_pretrained(tmp_path/'less.pth')

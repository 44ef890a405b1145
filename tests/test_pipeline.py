"""The whole system beside diffusers' `AudioLDM2Pipeline`: the same random weights, read from a folder that diffusers saved,
must give the same LOA and latents (to 1e-5) and waveforms (to 1e-4), in units of the largest value. Each input that is
changed must move the result by more than a hundred times as much, so that nothing agrees because it is ignored.
"""
import json, shutil

import pytest
import standins
import torch

from audiorepro import cli
from audiorepro.audioldm2 import AudioLDM2, encode_nothing, encode_prompts
from audiorepro.pipeline import latent_shape
from audiorepro.audio import load_audio
from audiorepro.checkpoints import read_foreign
from audiorepro.core import make_generator
from audiorepro.public import find_pipeline, read_schedule
from audiorepro.sampling import Condition, sample_ddim
from layouts import below, error, laion, official_t_unet, official_vae, save_pth
from standins import random_pipeline

PROMPTS = ['a dog barks, then rain falls', 'wind', 'the old machine hums softly while a dog barks', 'a house']
NEGATIVE = ['wind blows', 'a dog barks, then rain falls and wind blows', 'a', 'machine machine machine machine machine']
KINDS = dict(tiny=('epsilon', .02), deep=('v_prediction', 1.))  # kind of prediction; size of starting noise and prediction
DIFFUSERS = dict(null_loa='generated', text_padding='batch')
STEPS = 6


@pytest.fixture(scope='module', params=KINDS)
def both(request, tmp_path_factory):
    "diffusers' pipeline, ours with its habits, the folder, starting latents"
    folder, (prediction, gain) = tmp_path_factory.mktemp('pipe')/request.param, KINDS[request.param]
    theirs = random_pipeline(folder, request.param, seed=3, gain=gain, prediction_type=prediction)
    theirs.set_progress_bar_config(disable=True)
    ours = AudioLDM2.from_pretrained(folder, **DIFFUSERS)
    return theirs, ours, folder, gain*torch.randn(4, *latent_shape(ours.cfg), generator=make_generator(1))


@pytest.mark.parametrize('negative', [None, NEGATIVE], ids=['empty', 'negative'])
@pytest.mark.parametrize('guidance', [1., 3.5])
@pytest.mark.parametrize('n', [1, 4])
def test_equal(both, n, guidance, negative):
    theirs, ours, _, latents = both
    options = dict(latents=latents[:n], num_inference_steps=STEPS, guidance_scale=guidance, negative_prompt=negative and negative[:n])
    states, mask, loa = theirs.encode_prompt(PROMPTS[:n], 'cpu', 1, True, negative_prompt=negative and negative[:n])
    cond = encode_prompts(ours, PROMPTS[:n])
    assert .5 < loa.std() < 2 and error(cond.contexts[0][0], loa[n:]) < 1e-5
    real = mask[n:].bool()
    assert torch.equal(cond.contexts[1][1], real) and error(cond.contexts[1][0][real], states[n:][real]) < 1e-5
    if negative is None: assert error(encode_nothing(ours, cond).contexts[0][0], loa[:n]) < 1e-5
    z, wav = (torch.as_tensor(theirs(PROMPTS[:n], output_type=kind, **options).audios) for kind in ('latent', 'np'))
    assert .5 < z.std() < 3 and wav.abs().max() > .1
    assert error(ours(PROMPTS[:n], output='latents', **options), z) < 1e-5
    assert error(ours(PROMPTS[:n], **options), wav) < 1e-4


def test_every_input_matters(both):
    _, ours, _, latents = both
    options = dict(latents=latents[:1], num_inference_steps=STEPS, guidance_scale=3.5)
    def wav(prompt=PROMPTS[0], **more): return ours(prompt, **options | more)
    base = wav()
    for change in (dict(prompt=PROMPTS[2]), dict(guidance_scale=2.), dict(negative_prompt=NEGATIVE[0]), dict(num_inference_steps=STEPS + 1)):
        assert error(wav(**change)[:, :base.shape[1]], base) > 1e-2, change
    def from_condition(*contexts):
        cond = Condition(contexts)
        return sample_ddim(ours.halves.unet, latents[:1].shape, ours.cfg.schedule, STEPS, cond=cond, latents=latents[:1])
    a, b = encode_prompts(ours, PROMPTS[:1]).contexts
    c, d = encode_prompts(ours, PROMPTS[2:3]).contexts
    swapped = [(c, b), (a, d)] + ([(b, a)] if a[0].shape[-1] == b[0].shape[-1] else [])
    for contexts in swapped: assert error(from_condition(*contexts), from_condition(a, b)) > 1e-3


def test_candidates_are_ranked_as_transformers_would(both):
    theirs, ours, _, _ = both
    wavs = ours(PROMPTS[:2], num_waveforms_per_prompt=3, seed=0, num_inference_steps=2)
    import librosa
    sound = librosa.resample(wavs.numpy(), orig_sr=16_000, target_sr=48_000, res_type='soxr_hq')
    inputs = theirs.tokenizer(PROMPTS[:2], return_tensors='pt', padding=True)
    inputs['input_features'] = theirs.feature_extractor(list(sound), return_tensors='pt', sampling_rate=48_000).input_features
    with torch.no_grad(): scores = theirs.text_encoder(**inputs).logits_per_text  # (2, 6)
    for i in range(2):
        own = scores[i, 3*i:3*i + 3]
        assert (own[:-1] >= own[1:] - 1e-4*own.abs().max()).all() and own[0] > own[-1]


def test_options_choose_the_authors_or_diffusers(both):
    _, ours, folder, latents = both
    def z(prompts, **options):
        pipe = AudioLDM2.from_pretrained(folder, **DIFFUSERS | options)
        return pipe(prompts, latents=latents[:len(prompts)], num_inference_steps=STEPS, output='latents')
    base = ours(PROMPTS[:1], latents=latents[:1], num_inference_steps=STEPS, output='latents')
    for change in (dict(null_loa='zeros'), dict(head_layout='official')): assert error(z(PROMPTS[:1], **change), base) > 1e-3
    assert torch.equal(z(PROMPTS[:1], head_layout='diffusers'), base)  # the folder says 8 heads
    company = [PROMPTS[0], PROMPTS[2]]
    assert error(z(company)[:1], base) > 1e-3
    assert error(z(company, text_padding='compact')[:1], z(PROMPTS[:1], text_padding='compact')) < 1e-5
    for name in ('null_loa', 'head_layout', 'text_padding'):
        with pytest.raises(ValueError, match=name): AudioLDM2.from_pretrained(folder, **{name: 'best'})


def test_gpt2_without_its_head(both, tmp_path):
    theirs, ours, folder, latents = both
    shutil.copytree(folder, tmp_path/'plain')
    shutil.rmtree(tmp_path/'plain'/'language_model')
    theirs.language_model.transformer.save_pretrained(tmp_path/'plain'/'language_model')
    assert 'wpe.weight' in read_foreign(tmp_path/'plain'/'language_model')[1]  # no `transformer.` prefix
    a, b = (encode_prompts(p, PROMPTS).contexts[0][0] for p in (ours, AudioLDM2.from_pretrained(tmp_path/'plain', **DIFFUSERS)))
    assert torch.equal(a, b)


def test_half_precision_runs_and_stays_close(both):
    _, ours, folder, latents = both
    half = AudioLDM2.from_pretrained(folder, dtype=torch.bfloat16, **DIFFUSERS)
    options = dict(latents=latents[:1], num_inference_steps=2, guidance_scale=1.)
    a, b = half(PROMPTS[0], **options), ours(PROMPTS[0], **options)
    assert a.dtype == torch.float32 and a.shape == b.shape and error(a, b) < .5


def test_the_command_speaks_with_a_published_system(both, tmp_path, capsys):
    folder = both[2]
    assert cli.main(['say', 'a dog barks', '--model', str(folder), '--steps', '2', '--candidates', '2', '--out', str(tmp_path/'a.wav')]) == 0
    wav, rate = load_audio(tmp_path/'a.wav')
    assert rate == 16_000 and wav.abs().max() > 0 and '8, 8, 8, 8 heads' in capsys.readouterr().out
    assert cli.main(['say', 'a dog barks', '--model', str(folder/'unet'), '--out', str(tmp_path/'b.wav')]) == 2
    assert 'model_index.json' in capsys.readouterr().err and not (tmp_path/'b.wav').exists()


@pytest.mark.parametrize('piece', ['unet', 'vae', 'vocoder', 'text_encoder', 'text_encoder_2', 'language_model', 'projection_model'])
def test_a_missing_tensor_is_named(both, piece, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(both[2], tmp_path/'pipe')
    file = next((tmp_path/'pipe'/piece).glob('*.safetensors'))
    state = load_file(file)
    lost = sorted(k for k in state if k.endswith(('bias', 'norm.weight')) and 'lm_head' not in k)[0]
    save_file({k: x for k, x in state.items() if k != lost}, file)
    with pytest.raises((ValueError, KeyError)) as e: AudioLDM2.from_pretrained(tmp_path/'pipe')
    assert e.type is ValueError and 'missing' in str(e.value), str(e.value)


@pytest.mark.parametrize('key, value', dict(clip_sample=True, set_alpha_to_one=True, timestep_spacing='trailing', trained_betas=[.1],
                                            beta_schedule='squaredcos_cap_v2', prediction_type='sample').items())
def test_other_schedules_are_refused_by_name(both, key, value, tmp_path):
    shutil.copytree(both[2]/'scheduler', tmp_path/'scheduler')
    file = tmp_path/'scheduler'/'scheduler_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=value if isinstance(value, str) else key): read_schedule(tmp_path)


def test_ours_are_not_taken_for_published():
    assert find_pipeline('toy') is None and find_pipeline('mine') is None
    with pytest.raises(ValueError, match='head_layout'): AudioLDM2.from_pretrained('toy', head_layout='official')


def test_the_authors_file_is_a_whole_system(tmp_path, monkeypatch):
    "One `.pth` with every network under the released names equals the folder read with the authors' heads"
    import transformers
    sizes = standins.sizes((32, 32, 64, 64), [None, 64, 40], standins.small_clap(16, 64),
                          dict(vocab_size=200, d_model=40, d_kv=8, num_heads=4, d_ff=48, num_layers=2),
                          dict(vocab_size=11, n_embd=64, n_layer=2, n_head=1, n_positions=120),
                          dict(model_in_dim=64, upsample_initial_channel=1024), vae=(32, 32, 64), groups=32)
    monkeypatch.setitem(standins.SIZES, 'official', sizes)
    theirs = random_pipeline(tmp_path/'folder', 'official')
    state = lambda name: getattr(theirs, name).state_dict()
    p, ups = theirs.projection_model, {k.replace('upsampler.', 'ups.'): x for k, x in state('vocoder').items() if k not in ('mean', 'scale')}
    tables = {f'{word}_of_sequence_tokens.weight': torch.cat([torch.stack([getattr(p, f'{k}_embed'), getattr(p, f'{k}_embed_1')]).data,
                                                              torch.full((30, 64), 7.)]) for word, k in (('start', 'sos'), ('end', 'eos'))}
    lines = below('input_sequence_embed_linear.0', p.projection.state_dict()) | below('input_sequence_embed_linear.1', p.projection_1.state_dict())
    clap, t5 = laion(theirs.text_encoder), state('text_encoder_2')
    language = below('cond_stage_models.0', tables | lines | below('model', theirs.language_model.transformer.state_dict())
                     | below('cond_stage_models.0.model', clap) | below('cond_stage_models.1.model', t5))
    path = save_pth(tmp_path/'audioldm2-full.pth', below('model.diffusion_model', official_t_unet(state('unet'), 3)) | language
                    | below('first_stage_model', official_vae(state('vae'), 3) | below('vocoder', ups)) | below('clap.model', clap)
                    | below('cond_stage_models.1.model', t5) | {'scale_factor': torch.tensor(.9228), 'betas': torch.ones(9)})
    places = {'google/flan-t5-large': 'tokenizer_2', 'roberta-base': 'tokenizer'}
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', lambda name, **_: load(tmp_path/'folder'/places.get(str(name), name)))
    options = dict(seed=0, num_inference_steps=2, audio_length_in_s=.64)
    a = AudioLDM2.from_pretrained(path)(PROMPTS[0], **options)
    b = AudioLDM2.from_pretrained(tmp_path/'folder', head_layout='official')(PROMPTS[0], **options)
    assert a.abs().max() > .01 and error(a, b) < 1e-5
    assert error(a, AudioLDM2.from_pretrained(tmp_path/'folder')(PROMPTS[0], **options)) > 1e-3  # 8 heads are others

"""Adapters of low rank beside the attention of a published system: they start at nothing, only they learn, a file of their own brings them back bit
for bit, merged they say the same, `peft` says the same with them inside diffusers' and transformers' own networks, and what does not fit is refused.

The system is a tiny one with random weights that diffusers wrote; nothing in it is zero.
"""
import itertools, json, re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from audiorepro import lora
from audiorepro.audio import save_audio
from audiorepro.audioldm2 import AudioLDM2, AudioLDM2Config, TextToLatent, generator_condition, joint_loss, latent_shape
from audiorepro.audiomae import AudioMAE, AudioMAEConfig
from audiorepro.cli import main
from audiorepro.core import count_params, make_generator, save_json
from audiorepro.loa import all_true, loa_conditions
from audiorepro.lora import (LORA_LAYERS, add_lora, load_base, load_lora, lora_layers, lora_parameters, lora_state, merge_lora, remove_lora, save_lora, train_lora,
                             training_memory)
from audiorepro.own_data import cache_features, inspect_data
from audiorepro.systems import load_system as load_any
from standins import random_pipeline
from audiorepro.training import Recipe, TrainConfig
from layouts import error

RANK, ALPHA = 4, 8.


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "diffusers' pipeline, its folder, our two halves of it"
    folder = tmp_path_factory.mktemp('pipe')/'tiny'
    theirs = random_pipeline(folder, 'tiny', seed=3)
    return theirs, folder, AudioLDM2.from_pretrained(folder)


@pytest.fixture
def halves(published): return deepcopy(published[2].halves).requires_grad_(True)


def learnt(model, seed=1, size=.2, **options):
    "An adapter that says something"
    add_lora(model, RANK, ALPHA, **options)
    generator = make_generator(seed)
    for p in lora_parameters(model): p.data.add_(size*torch.randn(p.shape, generator=generator))
    return model


def some_batch(cfg, seed=0):
    generator, (clap, t5) = make_generator(seed), cfg.loa.cond_dims
    def draw(*shape): return torch.randn(shape, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    return dict(z_0=draw(2, *latent_shape(cfg)), loa=draw(2, 8, cfg.loa.gpt2.dim), clap=draw(2, 1, clap), t5=draw(2, 5, t5), t5_mask=mask)


@torch.no_grad()
def answers(model, seed=0):
    "What GPT-2 and the T-UNet say to a fixed question"
    batch = some_batch(model.cfg, seed)
    conds = loa_conditions(batch)
    loa = model.loa.generate(conds)
    cond = generator_condition(batch['loa'], conds[1], model.cfg.unet.contexts)
    return loa, model.unet(batch['z_0'], torch.tensor([10, 700]), cond)


def loss_of(model, batch, seed=5):
    "Joint loss with fixed coins and noise"
    null = torch.zeros(1, 1, model.cfg.loa.cond_dims[1])
    return joint_loss(model, batch, SimpleNamespace(generator=make_generator(seed)), (null, all_true(null)), cond_drop_prob=0.)


def copy_of(state): return {k: v.clone() for k, v in state.items()}


# --- what an adapter is ---------------------------------------------------------------------------------------------

def test_it_starts_at_nothing_and_everything_else_is_frozen(halves):
    before, said = copy_of(halves.state_dict()), answers(halves)
    add_lora(halves, RANK, ALPHA)
    for a, b in zip(answers(halves), said): assert torch.equal(a, b)
    assert {n for n, p in halves.named_parameters() if p.requires_grad} == {n for n, _ in halves.named_parameters() if '.lora_' in n}
    loss_of(halves, some_batch(halves.cfg))['loss'].backward()
    assert all((p.grad is not None) == ('.lora_' in n) for n, p in halves.named_parameters())
    remove_lora(halves)
    assert list(halves.state_dict()) == list(before) and all(torch.equal(v, before[k]) for k, v in halves.state_dict().items())
    assert all(p.requires_grad for p in halves.parameters())


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_one_alone(halves):
    torch.manual_seed(0); expected = torch.rand(1); torch.manual_seed(0)
    states = [lora_state(add_lora(deepcopy(halves), RANK, seed=s)) for s in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    same = [all(torch.equal(v, states[0][k]) for k, v in s.items()) for s in states[1:]]
    assert same == [True, False]


@pytest.mark.parametrize('parts, moved', [(('unet', 'gpt2'), (True, True)), (('unet',), (False, True)), (('gpt2',), (True, False))])
def test_merged_equals_adapted(halves, parts, moved):
    plain = answers(halves)
    adapted = answers(learnt(halves, parts=parts))
    merged = answers(merge_lora(halves))
    assert not any('lora' in k for k in halves.state_dict())
    for a, b, old, is_moved in zip(merged, adapted, plain, moved):
        assert error(a, b) < 1e-5
        assert (error(b, old) > 1e-2) == is_moved and torch.equal(b, old) != is_moved


def test_the_layers_are_those_of_the_attentions(halves):
    names = set(lora_layers(halves))
    wanted = {n for n, m in halves.named_modules() if isinstance(m, torch.nn.Linear) and ('.attn' in n) and '.mlp.' not in n}
    assert names == wanted and len(names) > 20


def test_in_the_networks_of_diffusers_and_transformers(published, halves):
    "peft puts our weights into their modules, which have the names that ours have: the same answers"
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    theirs, _, ours = published
    state, batch = lora_state(learnt(halves)), some_batch(halves.cfg)
    def injected(network, part, prefix):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA_LAYERS[part], fan_in_fan_out=part == 'gpt2')
        network = inject_adapter_in_model(config, deepcopy(network))
        assert own and not set_peft_model_state_dict(network, own).unexpected_keys
        return network.eval()
    unet = injected(theirs.unet, 'unet', 'unet.')
    t5, mask, t = batch['t5'], batch['t5_mask'], torch.tensor([10, 700])
    with torch.no_grad():
        options = dict(encoder_hidden_states=batch['loa'], encoder_hidden_states_1=t5, encoder_attention_mask_1=mask)
        found, plain = unet(batch['z_0'], t, **options).sample, theirs.unet(batch['z_0'], t, **options).sample
        cond = generator_condition(batch['loa'], (t5, mask), halves.cfg.unet.contexts)
        assert error(halves.unet(batch['z_0'], t, cond), found) < 1e-5 and error(plain, found) > 1e-2
        gpt2 = injected(theirs.language_model.transformer, 'gpt2', 'loa.gpt2.')
        said = gpt2(inputs_embeds=batch['loa']).last_hidden_state
        assert error(halves.loa.gpt2(batch['loa'])[0], said) < 1e-5 and error(ours.halves.loa.gpt2(batch['loa'])[0], said) > 1e-2


# --- training -------------------------------------------------------------------------------------------------------

def test_twenty_steps_on_a_published_layout(halves, tmp_path):
    "The loss falls, the base keeps its bits, and the file alone carries what was learnt"
    base, batch = copy_of(halves.state_dict()), some_batch(halves.cfg)
    untouched, first = deepcopy(halves), loss_of(halves.eval(), batch)['loss'].item()
    config = TrainConfig(20, lr=1e-2, warmup_steps=2, log_every=20)
    recipe = Recipe('lora', add_lora(halves, RANK, ALPHA), lambda model, batch, ctx: loss_of(model, batch, ctx.step), lambda start: itertools.repeat(batch),
                    config)
    history = train_lora(recipe, tmp_path/'own.safetensors', progress=False)
    last = loss_of(halves, batch)['loss'].item()
    assert history[-1]['step'] == 20 and last < .9*first, (first, last)
    load_lora(untouched, tmp_path/'own.safetensors')
    assert loss_of(untouched.eval(), batch)['loss'].item() == last
    remove_lora(halves)
    assert all(torch.equal(v, base[k]) for k, v in halves.state_dict().items())
    assert loss_of(halves.eval(), batch)['loss'].item() == first


def test_no_adapter_no_training(halves, tmp_path):
    recipe = Recipe('lora', halves, None, None, TrainConfig(1))
    with pytest.raises(ValueError, match='no adapter'): train_lora(recipe, tmp_path/'a.safetensors')
    add_lora(halves, RANK)
    with pytest.raises(ValueError, match='a.bin must end in .safetensors'): train_lora(recipe, tmp_path/'a.bin')


def lesson_cell(word):
    cells = json.loads((Path(__file__).parent.parent/'nbs'/'57a_lora.ipynb').read_text())['cells']
    return next(''.join(c['source']) for c in cells if c['cell_type'] == 'code' and ''.join(c['source']).startswith(word))


def test_the_cell_for_a_gpu_runs(tmp_path, monkeypatch):
    "As it stands in the lesson, with a tiny system where the hub's would be, on this device, two steps"
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out'))
    random_pipeline(tmp_path/'cvssp'/'audioldm2', 'tiny')
    AudioMAE(AudioMAEConfig((1024, 128), (64, 32), dim=24, depth=4, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)).save_pretrained(
        tmp_path/'data'/'checkpoints'/'audiomae')
    for i in range(4): save_audio(tmp_path/'data'/'audiocaps'/'audio'/f'{i}.wav', .3*torch.sin(torch.arange(20_000)*(.02 + .02*i)), 16_000)
    rows = '\n'.join(f'{i}.wav,a dog barks' for i in range(4))
    (tmp_path/'data'/'audiocaps'/'train.csv').write_text(f'file_name,caption\n{rows}\n')
    fit, configs = lora.fit, []
    def quick(model, loss_fn, batches, config, **options):
        configs.append(config)
        return fit(model, loss_fn, batches, replace(config, steps=2, warmup_steps=0), **options | dict(progress=False))
    monkeypatch.setattr(lora, 'fit', quick)
    names = vars(lora) | dict(AudioLDM2=AudioLDM2, save_json=save_json, at_scale=lambda *a, **k: True)
    exec(lesson_cell("if at_scale('gpu'").replace("'cuda'", "'cpu'").replace('.cuda()', '.cpu()'), names)
    kept = json.loads((tmp_path/'out'/'figures'/'57a_lora_gpu.json').read_text())
    assert configs[0].steps == 1000 and 0 < kept['loss'] < 1e3
    found = load_file(tmp_path/'own.safetensors')
    assert found and all(v.dtype == torch.float32 for v in found.values())
    assert any(v.abs().max() > 0 for k, v in found.items() if '.lora_B.' in k)
    assert next(names['pipe'].halves.parameters()).dtype == torch.bfloat16


def small_mae(folder, patch=(16, 16)):
    "An AudioMAE of random weights: with patches of 16 x 16 it makes 8 vectors at lambda 8, as the published one"
    AudioMAE(AudioMAEConfig((1024, 128), patch, dim=24, depth=4, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2)).save_pretrained(folder)


def test_a_command_trains_an_adapter_on_a_published_folder(tmp_path, monkeypatch, capsys):
    "From a folder of sounds to a file, and from the folder of the adapter to another sound; the base keeps its bytes"
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out'))
    random_pipeline(tmp_path/'base', 'tiny', seed=3)
    small_mae(tmp_path/'mae')
    for i in range(3):
        save_audio(tmp_path/'data'/f'{i}.wav', .3*torch.sin(torch.arange(20_000)*(.02 + .02*i)), 16_000)
        (tmp_path/'data'/f'{i}.txt').write_text('a dog barks')
    base = {p: p.read_bytes() for p in (tmp_path/'base').rglob('*') if p.is_file()}
    command = ['train', '--data', str(tmp_path/'data'), '--from', str(tmp_path/'base'), '--audiomae', str(tmp_path/'mae'), '--lora', '2']
    assert main(command + ['--dry-run']) == 0 and not (tmp_path/'out'/'own'/'data_adapter'/'adapter.json').exists()
    assert main(command + ['--steps', '6']) == 0
    folder = tmp_path/'out'/'own'/'data_adapter'
    assert sorted(p.name for p in folder.iterdir()) == ['adapter.json', 'adapter.safetensors', 'report.txt']
    kept = json.loads((folder/'adapter.json').read_text())
    assert (kept['base'], kept['rank'], kept['steps'], kept['lr'], kept['clips']) == (str(tmp_path/'base'), 2, 6, 1e-4, 3)
    assert {p: p.read_bytes() for p in base} == base
    pipe, plain = load_any(folder), AudioLDM2.from_pretrained(tmp_path/'base')
    said = [p('a dog barks', seed=0, num_inference_steps=2, output='latents') for p in (pipe, plain)]
    assert said[0].isfinite().all() and 1e-6 < error(*said) < .5
    load_lora(plain.halves, folder/'adapter.safetensors')
    assert error(plain('a dog barks', seed=0, num_inference_steps=2, output='latents'), said[0]) < 1e-4
    for more, words in ((['--steps', '7'], 'steps was 6 and is 7'), (['--lora', '0'], 'rank must be'), (['--minutes', '1'], 'takes steps')):
        assert main(command + more) == 2 and words in capsys.readouterr().err
    assert main(command[:5]) == 2 and 'is a published system: an adapter can be trained' in capsys.readouterr().err
    assert main(command[:5] + ['--lora', '2']) == 2 and 'published system without an AudioMAE' in capsys.readouterr().err


def test_an_audiomae_that_does_not_fit(tmp_path):
    "Two vectors of 24 where GPT-2 writes eight of 24: told before the data are read"
    random_pipeline(tmp_path/'base', 'tiny')
    small_mae(tmp_path/'mae', (64, 32))
    with pytest.raises(ValueError, match=r'audiomae makes 2 vectors of 24 at lambda 8, GPT-2 writes 8 of 24'):
        load_base(tmp_path/'base', audiomae=tmp_path/'mae')


def test_features_of_a_published_system_are_prepared_as_there(tmp_path, monkeypatch):
    "Mean removed and peak .5: a louder recording with an offset has the same features"
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out'))
    random_pipeline(tmp_path/'base', 'tiny', seed=3)
    small_mae(tmp_path/'mae')
    system, found = load_base(tmp_path/'base', audiomae=tmp_path/'mae'), []
    samples = round(system.pipe.cfg.clip_seconds*system.pipe.cfg.mel.sample_rate)
    wav = .3*torch.sin(torch.arange(samples)*.05)
    for name, change in (('a', wav), ('b', .5*wav + .2)):
        save_audio(tmp_path/name/'x.wav', change, 16_000)
        (tmp_path/name/'x.txt').write_text('a dog barks')
        found.append(cache_features(inspect_data(tmp_path/name, system), system))
    a, b = (f.parts[0]['loa'].float() for f in found)
    assert found[0].key != found[1].key and error(a, b) < .02


# --- memory ---------------------------------------------------------------------------------------------------------

def counted_by_hand(rank, depth=1, contexts=(None, 768, 1024)):
    "Sides of all attention projections, from the published widths: five sites on each of three levels, one in the middle"
    def site(c): return sum(depth*(4*2*c + 2*2*c + 2*(c + (d or c))) for d in contexts)
    unet = sum(5*site(c) for c in (256, 384, 640)) + site(640)
    return rank*(unet + 12*((768 + 3*768) + 2*768))


def test_memory_at_full_size_by_arithmetic():
    for name, options in (('audioldm2', {}), ('audioldm2_large', dict(depth=2, contexts=(None, 768, 1024, None)))):
        with torch.device('meta'): model = TextToLatent(getattr(AudioLDM2Config, name)())
        found, everything = training_memory(model, 8, base_bytes=2), training_memory(model)
        n = counted_by_hand(8, **options)
        assert found == dict(trained=n, weights=2*count_params(model) + 4*n, gradients=4*n, adam=8*n)
        assert sum(everything.values()) - everything['trained'] == 16*count_params(model)
        assert not any(p.device.type != 'meta' for p in model.parameters())


# --- files ----------------------------------------------------------------------------------------------------------

def test_saved_and_loaded_alone(halves, tmp_path):
    fresh, path = deepcopy(halves), tmp_path/'own.safetensors'
    said = answers(learnt(halves))
    assert save_lora(halves, path) == path
    state, found = lora_state(halves), load_file(path)
    assert found.keys() == state.keys() and all('.lora_' in k for k in found) and all(torch.equal(v, state[k]) for k, v in found.items())
    assert path.stat().st_size < sum(v.nbytes for v in found.values()) + 150_000  # names, and a mark for each matrix
    with safe_open(path, 'pt') as f: kept = json.loads(f.metadata()['lora'])
    assert (kept['rank'], kept['alpha'], kept['parts']) == (RANK, ALPHA, ['unet', 'gpt2'])
    load_lora(fresh, path)
    assert all(torch.equal(v, state[k]) for k, v in lora_state(fresh).items())
    for a, b in zip(answers(fresh), said): assert torch.equal(a, b)
    with pytest.raises(ValueError, match='has an adapter'): load_lora(fresh, path)
    with pytest.raises(ValueError, match='has an adapter'): add_lora(fresh)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_on_a_base_in_half_precision(halves, dtype, tmp_path):
    save_lora(learnt(halves), tmp_path/'own.safetensors')
    half = load_lora(remove_lora(deepcopy(halves)).to(dtype), tmp_path/'own.safetensors')
    assert {p.dtype for p in lora_parameters(half)} == {torch.float32} and half.unet.conv_in.weight.dtype == dtype
    if dtype == torch.bfloat16: assert error(answers(half)[1].float(), answers(halves)[1]) < .2


def test_other_weights_of_the_same_layout(published, halves, tmp_path):
    path = save_lora(learnt(halves), tmp_path/'own.safetensors')
    random_pipeline(tmp_path/'other', 'tiny', seed=4)
    other = AudioLDM2.from_pretrained(tmp_path/'other').halves
    with pytest.raises(ValueError, match='own.safetensors was made for other weights'): load_lora(other, path)
    assert lora_parameters(load_lora(other, path, any_base=True))
    trained_on = remove_lora(deepcopy(halves))                         # a little further trained: still its own
    for p in trained_on.parameters(): p.data.mul_(1 + .01*torch.randn(p.shape, generator=make_generator(0)))
    load_lora(trained_on, path)


def rewritten(path, change):
    "The file with other tensors or another header"
    state = load_file(path)
    with safe_open(path, 'pt') as f: header = json.loads(f.metadata()['lora'])
    found = change(state, header)
    save_file(state, path, None if found == 'bare' else dict(lora=found if isinstance(found, str) else json.dumps(header)))


def first(state): return sorted(state)[0]
def as_pickle(path): state = load_file(path); torch.save(state, path)
def cut(path): path.write_bytes(path.read_bytes()[:3000])
def too_large(path): path.write_bytes(path.read_bytes() + bytes(2**22))
def nan(state, header): state[first(state)][0, 0] = torch.nan
def whole_numbers(state, header): state[first(state)] = state[first(state)].long()
def lost(state, header): del state[first(state)]
def stranger(state, header): state['unet.conv_in.lora_A.weight'] = torch.ones(2, 2)
def other_rank(state, header): header['rank'] = 3
def broken(rank): return lambda state, header: header.update(rank=rank)

BAD = dict(
    pickle=(as_pickle, 'a pickle or zip archive'), cut=(cut, 'truncated or not safetensors'), large=(too_large, 'truncated or not safetensors'),
    nan=(nan, 'is not finite'), whole=(whole_numbers, 'is torch.int64'), lost=(lost, 'missing loa.gpt2.h.0.attn.c_attn.lora_A.weight'),
    stranger=(stranger, 'surplus unet.conv_in.lora_A.weight'), rank=(other_rank, r'has shape \(4, 24\), expected \(3, 24\)'),
    huge=(broken(10**9), 'rank must be a whole number'), text=(broken('4'), 'rank must be a whole number'), none=(broken(None), 'rank must be'),
    bare=(lambda state, header: 'bare', 'not written by `save_lora`'), empty=(lambda state, header: '{}', "not written by `save_lora`: 'rank' is missing"),
    words=(lambda state, header: 'no json', 'is no adapter for this model'), a_list=(lambda state, header: '[1]', 'is no adapter for this model'),
    parts=(lambda state, header: header.update(parts=['vae']), 'parts must be of unet, gpt2'),
    number=(lambda state, header: header.update(parts=7), 'is no adapter for this model'),
    alpha=(lambda state, header: header.update(alpha='much'), 'alpha must be a finite number'),
    marks=(lambda state, header: header.update(marks=header['marks'][1:]), 'made for other weights'),
    marked=(lambda state, header: header.update(marks=7), 'is no adapter for this model'))


@pytest.fixture(scope='module')
def good_file(published, tmp_path_factory):
    return save_lora(learnt(deepcopy(published[2].halves)), tmp_path_factory.mktemp('file')/'own.safetensors')


@pytest.mark.parametrize('fault', BAD)
def test_bad_files_are_refused_by_name(fault, published, good_file, tmp_path):
    (bend, words), model, path = BAD[fault], published[2].halves, tmp_path/'bad.safetensors'
    path.write_bytes(good_file.read_bytes())
    if bend in (as_pickle, cut, too_large): bend(path)
    else: rewritten(path, bend)
    keys = list(model.state_dict())
    with pytest.raises(ValueError) as e: load_lora(model, path)
    assert str(path) in str(e.value) and re.search(words, str(e.value)), str(e.value)
    assert '\n' not in str(e.value).partition(': ')[0] and list(model.state_dict()) == keys   # nothing was put in


def test_another_layout_and_no_file(published, good_file, tmp_path):
    toy = TextToLatent(AudioLDM2Config.toy())
    for model in (toy, toy.unet, toy.loa, published[2].halves.unet):
        with pytest.raises(ValueError, match='own.safetensors does not fit'): load_lora(model, good_file)
        assert not lora_parameters(model)
    for path, kind in ((tmp_path/'none.safetensors', FileNotFoundError), (tmp_path, ValueError)):
        with pytest.raises(kind, match=re.escape(str(path))): load_lora(toy, path)
    with pytest.raises(ValueError, match='Linear has no attention'): load_lora(torch.nn.Linear(2, 2), good_file)


def test_what_is_not_finite_is_never_written(halves, tmp_path):
    path = save_lora(learnt(halves), tmp_path/'own.safetensors')
    kept = path.read_bytes()
    lora_parameters(halves)[0].data[0, 0] = torch.inf
    for act in (lambda: save_lora(halves, path), lambda: merge_lora(halves)):
        with pytest.raises(ValueError, match='is not finite'): act()
    assert path.read_bytes() == kept and lora_parameters(halves) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('options, words', [(dict(rank=0), 'rank'), (dict(rank=1.5), 'rank'), (dict(rank=10**6), 'rank'), (dict(alpha=0), 'alpha'),
                                            (dict(alpha=float('nan')), 'alpha'), (dict(parts=('clap',)), 'parts'), (dict(parts=()), 'no attention')])
def test_nonsense_is_refused_and_nothing_is_frozen(halves, options, words):
    with pytest.raises(ValueError, match=words): add_lora(halves, **options)
    assert all(p.requires_grad for p in halves.parameters()) and not lora_parameters(halves)

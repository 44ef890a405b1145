"""The "At paper scale" cells run: each lesson's cell behind the `gpu` gate, as it stands in the notebook, with tiny presets, a made corpus
and two optimiser steps in place of the real ones.

Only the surroundings are replaced: the device, the sizes behind the published presets, the checkpoints behind hub ids, and the number of
steps. A cell that asks for anything else of the real world fails here, so none can rot unseen.
"""
import ast, importlib, json, re
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch

from audiorepro import audioldm2, audiomae, clap, clap_files, codec, codec_training, gpt2, ldm, loa, t5, t5_files, tango, text, tokenlm, training, unet, vae, vocoder
from audiorepro.audio import save_audio
from audiorepro.sounds import make_records

NBS = Path(__file__).resolve().parent.parent/'nbs'
WORDS = 'a dog barks then rain falls bell rings siren wails the and'.split()


def code_cells(path): return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def gated_cells(kind):
    "(lesson, index, source) of all cells that sit behind a gate of this kind"
    for path in sorted(NBS.glob('[0-9]*.ipynb')):
        for i, source in enumerate(code_cells(path)):
            if re.search(rf"^if at_scale\('{kind}'", source, re.M): yield path.stem, i, source


def params(*kinds): return [pytest.param(*c, id=f'{c[0]}-{c[1]}') for kind in kinds for c in gated_cells(kind)]


@pytest.mark.parametrize('stem, i, source', params('slow', 'gpu'))
def test_names_exist(stem, i, source):
    "Every name that a gated cell imports exists, and the cell compiles"
    compile(source, f'{stem} cell {i}', 'exec')
    for module, names in re.findall(r'from (audiorepro\.\w+) import ([\w, ]+)', source):
        found = __import__(module, fromlist=['x'])
        for name in names.replace(' ', '').split(','): assert hasattr(found, name), f'{stem}: {module} has no {name}'


def lesson_names(stem, before):
    "What the lesson's module, and the imports and definitions above a cell that it does not export, provide"
    cells = code_cells(NBS/f'{stem}.ipynb')[:before]
    module = re.search(r'^#\| default_exp (\w+)', '\n'.join(cells), re.M)[1]
    names = dict(vars(importlib.import_module(f'audiorepro.{module}')))
    for source in cells:
        if '#| export' in source: continue
        if all(isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for n in ast.parse(source).body):
            exec(source, names)
    return names


TINY = dict(  # (class, preset) -> what stands in for the published size
    vae=lambda: replace(vae.VAEConfig.toy(), channels=8, channel_mult=(1, 1, 1)),
    audiomae=lambda: audiomae.AudioMAEConfig((1024, 128), (64, 32), dim=32, depth=4, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2),
    unet=lambda contexts: unet.UNetConfig(channels=(8, 16), layers_per_block=1, attention_levels=(1,), contexts=contexts, groups=4, num_heads=2),
    gpt2=lambda: gpt2.GPT2Config(32, 1, 2, 64, vocab_size=20),
    loa=lambda: loa.LOAConfig(gpt2.GPT2Config(32, 1, 2, 64, vocab_size=0), (24, 16), 8),
)


class TinyText:
    "Stands in for a published CLAP or T5: fixed random vectors for words and sounds"
    def __init__(self, dim): self.dim, self.table, self.vectors = dim, text.Tokenizer(tuple(WORDS)), torch.randn(40, dim)
    def encode(self, texts):
        ids, mask = self.table.encode(list(texts))
        return self.vectors[ids], mask.bool()
    def embed_text(self, texts): return torch.nn.functional.normalize(self.encode(texts)[0].mean(1), dim=-1)
    def embed_audio(self, wav, sample_rate): return torch.nn.functional.normalize(wav[..., :self.dim].float() + .1, dim=-1)
    def to(self, device): return self


class TinyCodec:
    "Stands in for a published codec: four codes say how loud the quarters of a frame of 40 ms are"
    def encode(self, wav):
        loud = wav[:, 0, :wav.shape[2]//640*640].unflatten(1, (-1, 4, 160)).abs().amax(-1)  # (B, T, 4)
        return (loud.clamp(max=1)*15).round().long().transpose(1, 2)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    "A corpus of four clips in every layout, tiny checkpoints where the cells look for them, and two steps for every training"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out'))
    torch.manual_seed(0)
    names, rows = [f'clip{i}.wav' for i in range(4)], ['audiocap_id,youtube_id,start_time,file_name,caption']
    for folder in ('data/audiocaps/audio', 'data/audioset', 'data/audio', 'data/audiocaps/audio/train'): (tmp_path/folder).mkdir(parents=True)
    for i, record in enumerate(make_records(4, seed=3)):
        wav = record.wav.repeat(5)[:163_840]
        for folder in ('data/audiocaps/audio', 'data/audioset', 'data/audio'): save_audio(tmp_path/folder/names[i], wav, 16_000)
        save_audio(tmp_path/f'data/audiocaps/audio/train/clip{i}_0.wav', wav, 16_000)
        rows.append(f'{i},clip{i},0,{names[i]},"a dog barks, then rain falls"')
    for split in ('train', 'val'): (tmp_path/f'data/audiocaps/{split}.csv').write_text('\n'.join(rows) + '\n')
    for file in ('captions.csv', 'captions_0.45.csv'):
        (tmp_path/'data/audioset'/file).write_text('\n'.join(['audio,caption'] + [f'{n},a dog barks' for n in names]) + '\n')
    monkeypatch.setattr(vae.VAEConfig, 'audioldm', classmethod(lambda cls: TINY['vae']()))
    monkeypatch.setattr(audiomae.AudioMAEConfig, 'audiomae', classmethod(lambda cls: TINY['audiomae']()))
    monkeypatch.setattr(unet.UNetConfig, 'audioldm2', classmethod(lambda cls: TINY['unet']((None, 32, 16))))
    monkeypatch.setattr(unet.UNetConfig, 'audioldm2_speech', classmethod(lambda cls: TINY['unet']((None, 32))))
    own_medium = replace(tango.TangoConfig.medium(), unet=TINY['unet']((16,)))
    monkeypatch.setattr(tango.TangoConfig, 'medium', classmethod(lambda cls: own_medium))
    monkeypatch.setattr(loa.LOAConfig, 'audioldm2', classmethod(lambda cls: TINY['loa']()))
    thin = vocoder.HifiGanConfig(channels=32, resblock_kernels=(3,), resblock_dilations=((1,),))
    monkeypatch.setattr(vocoder.HifiGanConfig, 'audioldm2', classmethod(lambda cls: thin))
    monkeypatch.setattr(vocoder.CriticConfig, 'paper', classmethod(lambda cls: cls.toy()))
    monkeypatch.setattr(codec.CodecConfig, 'encodec_16khz', classmethod(lambda cls: replace(cls.toy(), filters=2, dim=4, codebook_size=8)))
    monkeypatch.setattr(codec_training.StftCritics.__init__, '__defaults__', ((256,), 2))
    monkeypatch.setattr(tokenlm.TokenLMConfig, 'small', classmethod(lambda cls: cls(4, 16, 32, 2, 1, 48)))
    monkeypatch.setattr(codec.Codec, 'from_pretrained', classmethod(lambda cls, name: TinyCodec()))
    parts = dict(vae=vae.VAE(TINY['vae']()), audiomae=audiomae.AudioMAE(TINY['audiomae']()), ldm=unet.UNet(TINY['unet']((None, 32))),
                 loa=loa.LOAModel(TINY['loa']()))
    for name, part in parts.items():
        for folder in (f'checkpoints/{name}', f'{name}_16k', name): part.save_pretrained(tmp_path/'data'/folder)
    vae.VAE(TINY['vae']()).save_pretrained(tmp_path/'cvssp/audioldm-s-full-v2')
    tango.TangoDenoiser(own_medium).save_pretrained(tmp_path/'out/weights/tango_paper_pretrain')
    small_steps(monkeypatch)
    return tmp_path


def small_steps(monkeypatch):
    "Two steps of two items in this process, whatever a cell asks for"
    fit, loader, run = training.fit, training.loader_batches, training.run_recipe
    def short(cfg): return replace(cfg, steps=2, warmup_steps=1, bf16=False, log_every=1, save_every=2)
    def quick_fit(model, loss, batches, config, **kw): return fit(model, loss, batches, short(config), **kw | dict(progress=False))
    def quick_loader(data, batch_size, seed=0, collate=None, num_workers=0): return loader(data, 2, seed, collate, 0)
    def quick_run(recipe, **kw): return run(replace(recipe, config=short(recipe.config)), progress=False)
    for module in (training, ldm, audioldm2, tango):
        for name, value in dict(fit=quick_fit, loader_batches=quick_loader, run_recipe=quick_run).items():
            if hasattr(module, name): monkeypatch.setattr(module, name, value)


def stand_in(names):
    "Replace what a cell would fetch or switch on"
    hidden = dict(at_scale=lambda *a, **k: True, fit=training.fit, loader_batches=training.loader_batches, run_recipe=training.run_recipe,
                  default_device=lambda: torch.device('cpu'), load_gpt2=lambda name='gpt2': gpt2.GPT2(TINY['loa']().gpt2))
    return names | {k: v for k, v in hidden.items() if k in names or k == 'at_scale'}


TRAINING = [c for c in gated_cells('gpu') if re.search(r'\bfit\(|run_recipe\(|DataLoader\(', c[2]) and 'TransformerBlock(' not in c[2]]


def test_every_training_lesson_has_its_cell():
    wanted = {'30_vae', '32_vocoder', '33_audiomae', '43_ldm', '52_loa', '53_audioldm2', '60b_codec_training', '71_tango', '72_threshold', '61_tokenlm'}
    assert wanted <= {stem for stem, *_ in TRAINING}, [c[0] for c in TRAINING]


@pytest.mark.parametrize('stem, i, source', [pytest.param(*c, id=c[0]) for c in TRAINING])
def test_cell_trains(stem, i, source, small_world, monkeypatch, capsys):
    "The cell runs to its end and every training in it makes a finite loss"
    losses = []
    fit = training.fit
    def watched(*args, **kw):
        rows = fit(*args, **kw)
        losses.extend(row['loss'] for row in rows)
        return rows
    monkeypatch.setattr(training, 'fit', watched)
    monkeypatch.setattr(clap_files.HFCLAP, 'from_pretrained', classmethod(lambda cls, *a, **k: TinyText(24)))
    monkeypatch.setattr(t5_files.HFT5, 'from_pretrained', classmethod(lambda cls, *a, **k: TinyText(16)))
    names = stand_in(lesson_names(stem, i))
    source = re.sub(r'f"cuda:\{[^}]*\}"', "'cpu'", source)
    source = source.replace("'cuda'", "'cpu'").replace('.cuda()', '.cpu()').replace('num_workers=os.cpu_count()', 'num_workers=0')
    exec(compile(source, f'{stem} cell {i}', 'exec'), names)
    if 'DataLoader(' in source: assert "'mel': (4, " in capsys.readouterr().out
    else: assert losses and all(abs(x) < 1e4 for x in losses), losses


def test_esc50_cell(small_world, monkeypatch, capsys):
    "Fig. 3 on a made ESC-50: the published folder layout, ten classes in five folds, published names for tiny networks"
    from audiorepro.audio import resample
    from audiorepro.corpora import ESC50_FIGURE3
    from audiorepro.sounds import EVENTS, SAMPLE_RATE, render_event
    i, source = next((i, s) for stem, i, s in gated_cells('slow') if stem == '35_latent_space')
    names = stand_in(lesson_names('35_latent_space', i))
    exec(compile(source, 'without the folder', 'exec'), names)
    assert 'is not there' in capsys.readouterr().out and 'found' not in names
    root, lines = small_world/'data/ESC-50-master', ['filename,fold,target,category,esc10,src_file,take']
    for k, (category, event) in enumerate(zip(ESC50_FIGURE3, EVENTS)):
        for fold in range(1, 6):
            file, wav = f'{fold}-{k}-A-{k}.wav', render_event(event, duration=1., rng=np.random.default_rng([k, fold]))
            wav = torch.from_numpy(wav/abs(wav).max()).float()[None]
            save_audio(root/'audio'/file, .5*resample(wav, SAMPLE_RATE, 44_100), 44_100)
            lines.append(f'{file},{fold},{k},{category},False,{k},A')
    (root/'meta').mkdir()
    (root/'meta/esc50.csv').write_text('\n'.join(lines) + '\n')
    exec(compile(source, '35_latent_space', 'exec'), names)
    found, kept = names['found'], json.loads((small_world/'out/figures/35_latent_space_esc50.json').read_text())
    assert len(found) == 5*4 and kept['clips'] == 50 and len(kept['rows']) == 20
    assert all(len(r['hits']) == len(r['silhouette']) == 50 for r in found.values())
    assert found['log-mel', 'mean over time']['hits'].mean() > .3  # chance .1: classes, folds and clips belong together
    assert (small_world/'out/figures/35_latent_space_esc50.png').exists()

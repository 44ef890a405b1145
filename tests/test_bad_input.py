"""Bad input is refused at the door: one table of faults, each with the error a user must read.

A row is `(name, make, error, words)`: `make(folder)` prepares the fault and returns a function that meets it; the error must be
of that class and hold all the words, the offending file or argument among them. A full disk is in `test_faults.py`.
"""
import json, math, pickle, shutil, warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest, soundfile, torch
from torch import nn

from audiorepro.audio import Record, check_wav, load_audio, resample, save_audio
from audiorepro.audiomae import AudioMAE
from audiorepro.clap import CLAP
from audiorepro.codec import Codec
from audiorepro.core import WEIGHTS as SHIPPED, Config, Model
from audiorepro.loa import LOAModel
from audiorepro.mel import FbankConfig, MelConfig, griffin_lim, kaldi_fbank, log_mel
from audiorepro.t5 import T5
from audiorepro.unet import UNet
from audiorepro.vae import VAE


# --- sounds ---------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).normal(0, .1, 16_000)

def write(name, data=NOISE, rate=16_000, **kw):
    "Row maker: read a sound file with this content"
    def make(folder):
        soundfile.write(folder/name, data, rate, **kw)
        return lambda: load_audio(folder/name)
    return make

def raw(name, content):
    "Row maker: read a file with these bytes"
    def make(folder):
        (folder/name).write_bytes(content)
        return lambda: load_audio(folder/name)
    return make

def cut(kind, share):
    "Row maker: read the first part of a good file"
    def make(folder):
        soundfile.write(folder/f'good.{kind}', NOISE, 16_000)
        data = (folder/f'good.{kind}').read_bytes()
        return raw(f'cut.{kind}', data[:int(share*len(data))])(folder)
    return make

def hole(folder):
    soundfile.write(folder/'good.flac', NOISE, 16_000)
    data = bytearray((folder/'good.flac').read_bytes())
    data[9_000:9_200] = bytes(200)
    return raw('hole.flac', bytes(data))(folder)

def lazy(folder):
    (folder/'late.wav').write_bytes(b'RIFF')
    record = Record('late', None, meta=dict(path=str(folder/'late.wav')))
    return lambda: record.wav

def call(f, *args, **kw): return lambda folder: lambda: f(*args, **kw)
def make_folder(folder):
    (folder/'folder.wav').mkdir()
    return lambda: load_audio(folder/'folder.wav')

ONE = torch.zeros(1, 16_000)

AUDIO = [
    ('missing file', lambda folder: lambda: load_audio(folder/'none.wav'), FileNotFoundError, ['none.wav', 'does not exist']),
    ('folder', make_folder, ValueError, ['folder.wav']),
    ('empty file', raw('empty.wav', b''), ValueError, ['empty.wav', 'cannot be read']),
    ('text', raw('text.wav', b'once upon a time '*50), ValueError, ['text.wav', 'another kind']),
    ('picture', raw('cover.mp3', b'\x89PNG\r\n\x1a\n' + bytes(500)), ValueError, ['cover.mp3', 'cannot be read']),
    ('only a header', raw('head.wav', b'RIFF\x24\x00\x00\x00WAVE'), ValueError, ['head.wav', 'cannot be read']),
    ('zero samples', write('zero.wav', np.zeros(0)), ValueError, ['zero.wav', 'empty']),
    ('NaN', write('nan.wav', np.array([0., math.nan]), subtype='FLOAT'), ValueError, ['nan.wav', '1 samples that are NaN']),
    ('infinite', write('inf.wav', np.array([0., math.inf]), subtype='FLOAT'), ValueError, ['inf.wav', 'infinite']),
    ('integers as floats', write('loud.wav', NOISE*32_768, subtype='FLOAT'), ValueError, ['loud.wav', 'divided by 32768']),
    *((f'{kind} cut at {share}', cut(kind, share), ValueError, [f'cut.{kind}'])
      for kind in ('wav', 'flac', 'ogg', 'mp3') for share in (.01, .1, .5, .9, .98)),
    ('hole in a FLAC', hole, ValueError, ['hole.flac']),
    ('lazy record', lazy, ValueError, ['late.wav', 'cannot be read']),
    ('no duration', call(load_audio, __file__, duration=-1), ValueError, ['duration', '-1']),
    ('rate of zero', call(resample, ONE, 16_000, 0), ValueError, ['positive', '0']),
    ('int16 tensor', call(check_wav, torch.zeros(9, dtype=torch.int16)), ValueError, ['wav', 'int16']),
    ('array instead of tensor', call(check_wav, NOISE, 'prompt_wav'), ValueError, ['prompt_wav', 'tensor']),
    ('three axes', call(check_wav, torch.zeros(1, 1, 9)), ValueError, ['wav', '(1, 1, 9)']),
    ('unknown ending', lambda folder: lambda: save_audio(folder/'a.txt', ONE, 16_000), ValueError, ['a.txt', '.flac']),
    ('mp3 at 192 kHz', lambda folder: lambda: save_audio(folder/'a.mp3', ONE, 192_000), ValueError, ['a.mp3', '192000']),
    ('save NaN', lambda folder: lambda: save_audio(folder/'a.wav', ONE*math.nan, 16_000), ValueError, ['NaN']),
    ('no batch axis', call(log_mel, ONE[0], MelConfig.toy()), ValueError, ['(B, samples)', '(16000,)']),
    ('too short to reflect', call(log_mel, ONE[:, :300], MelConfig.toy()), ValueError, ['300', '432']),
    ('too short for a frame', call(kaldi_fbank, ONE[:, :300], FbankConfig.toy()), ValueError, ['300', '400']),
    ('mel of another width', call(griffin_lim, torch.zeros(1, 1, 9, 80), MelConfig.toy()), ValueError, ['64', '80']),
    ('fmax above Nyquist', call(MelConfig, fmax=9_000.), ValueError, ['fmax', '9000', 'Nyquist']),
]


# --- weights and settings -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TinyConfig(Config):
    "Settings of a model for these tests"
    width:int
    depths:tuple[int, ...] = (1, 2)

class Tiny(Model):
    config_class, component = TinyConfig, 'tiny'
    def __init__(self, cfg):
        super().__init__(cfg)
        self.linear = nn.Linear(cfg.width, 2)

class Bomb:
    "A pickle that would leave a file behind if anybody ran it"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (Path(self.path),)

def spoilt(spoil):
    "Row maker: save a good model, spoil it, load it"
    def make(folder):
        Tiny(TinyConfig(3)).save_pretrained(folder/'tiny')
        spoil(folder/'tiny')
        return lambda: Tiny.from_pretrained(folder/'tiny')
    return make

def with_bytes(name, change):
    def spoil(folder): (folder/name).write_bytes(change((folder/name).read_bytes()))
    return spoilt(spoil)

def with_config(**values):
    def spoil(folder):
        old = json.loads((folder/'config.json').read_text())
        (folder/'config.json').write_text(json.dumps({k: v for k, v in (old | values).items() if v is not ...}))
    return spoilt(spoil)

def with_pickle(dump):
    def spoil(folder): dump(Bomb(folder/'exploded'), folder/'model.safetensors')
    return spoilt(spoil)

def old_pickle(obj, path): path.write_bytes(pickle.dumps(obj, protocol=0))
def new_pickle(obj, path): path.write_bytes(pickle.dumps(obj))

def foreign(folder): # another model under the same name
    from safetensors.torch import save_file
    save_file({'linear.weight': torch.zeros(2, 3), 'linear.bias': torch.zeros(5), 'head.scale': torch.zeros(1)}, folder/'model.safetensors')

def half_there(folder):
    from safetensors.torch import save_file
    save_file({'linear.weight': torch.zeros(2, 3)}, folder/'model.safetensors')

WEIGHTS = [
    ('no such folder', lambda folder: lambda: Tiny.from_pretrained(folder/'none'), FileNotFoundError, ['none']),
    ('no such shipped model', lambda folder: lambda: Tiny.from_pretrained('toy'), FileNotFoundError, ['tiny']),
    ('no config', spoilt(lambda f: (f/'config.json').unlink()), FileNotFoundError, ['tiny', 'config.json']),
    ('no tensors', spoilt(lambda f: (f/'model.safetensors').unlink()), FileNotFoundError, ['model.safetensors']),
    ('empty tensors file', with_bytes('model.safetensors', lambda b: b''), ValueError, ['model.safetensors']),
    ('tensors cut in the header', with_bytes('model.safetensors', lambda b: b[:20]), ValueError, ['model.safetensors', 'truncated']),
    ('tensors cut in the data', with_bytes('model.safetensors', lambda b: b[:-4]), ValueError, ['model.safetensors', 'truncated']),
    ('other tensors', spoilt(foreign), ValueError, ['tiny', 'Tiny', 'surplus head.scale', 'linear.bias has shape (5,), expected (2,)']),
    ('a tensor missing', spoilt(half_there), ValueError, ['tiny', 'missing linear.bias']),
    ('other width', with_config(width=4), ValueError, ['linear.weight has shape (2, 3), expected (2, 4)']),
    ('pickle', with_pickle(new_pickle), ValueError, ['model.safetensors', 'pickle']),
    ('pickle of protocol 0', with_pickle(old_pickle), ValueError, ['model.safetensors']),
    ('torch.save', with_pickle(lambda obj, path: torch.save(dict(a=obj), path)), ValueError, ['model.safetensors', 'pickle']),
    ('unknown field', with_config(widht=3), ValueError, ['config.json', 'widht', 'width']),
    ('missing field', with_config(width=...), ValueError, ['config.json', 'width']),
    ('config cut', with_bytes('config.json', lambda b: b[:-5]), ValueError, ['config.json']),
    ('config empty', with_bytes('config.json', lambda b: b''), ValueError, ['config.json']),
    ('config is a list', with_bytes('config.json', lambda b: b'[1, 2]'), ValueError, ['config.json']),
    ('config is not text', with_bytes('config.json', lambda b: b'\xff\xfe\x00'), ValueError, ['config.json']),
    ('width is a word', with_config(width='three'), ValueError, ['width', 'three']),
]


# --- prompts --------------------------------------------------------------------------------------------------------

@cache
def pipe():
    from audiorepro.audioldm2 import AudioLDM2
    return AudioLDM2.from_pretrained('toy')

def say(prompt, **options): return lambda folder: lambda: pipe()(prompt, **options)

def without(part, damage):
    "Row maker: load a saved pipeline one of whose files was damaged"
    def make(folder):
        from audiorepro.audioldm2 import AudioLDM2
        pipe().save_pretrained(folder/'saved')
        damage(folder/'saved'/part)
        return lambda: AudioLDM2.from_pretrained(folder/'saved')
    return make

def halve(folder): (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:1000])
def swap_in_judge(folder):
    from audiorepro.judge import Judge
    (folder/'model.safetensors').unlink()
    Judge.from_pretrained('toy').save_pretrained(folder.parent/'judge')
    (folder.parent/'judge'/'model.safetensors').rename(folder/'model.safetensors')

PROMPTS = [
    ('empty prompt', say(''), ValueError, ['prompt']),
    ('blank prompt', say('  \n'), ValueError, ['prompt']),
    ('number as prompt', say(3), ValueError, ['prompt', '3']),
    ('no prompts', say([]), ValueError, ['prompt']),
    ('one of two empty', say(['rain falls', '']), ValueError, ['prompt']),
    ('no length', say('rain falls', audio_length_in_s=0.), ValueError, ['audio_length_in_s', '0']),
    ('endless', say('rain falls', audio_length_in_s=1e4), ValueError, ['audio_length_in_s', '10000']),
    ('no steps', say('rain falls', num_inference_steps=0), ValueError, ['num_inference_steps', '0']),
    ('no candidates', say('rain falls', num_waveforms_per_prompt=0), ValueError, ['num_waveforms_per_prompt', '0']),
    ('seeds and prompts', say('rain falls', seed=[1, 2]), ValueError, ['seed', '2']),
    ('wrong latents', say('rain falls', latents=torch.zeros(1, 8, 3, 3)), ValueError, ['latents', '(1, 8, 3, 3)']),
    ('word as generator', say('rain falls', generator='x'), ValueError, ['generator', "'x'"]),
    ('numbers as generators', say('rain falls', generator=[7]), ValueError, ['generator', '7']),
    ('truncated part', without('vae', halve), ValueError, ['vae', 'truncated']),
    ('part of another model', without('audioldm2', swap_in_judge), ValueError, ['audioldm2', 'does not fit', 'missing']),
    ('no pipeline there', lambda folder: lambda: type(pipe()).from_pretrained(folder/'none'), FileNotFoundError, ['none']),
]

ROWS = AUDIO + WEIGHTS + PROMPTS


@pytest.mark.parametrize('make, error, words', [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_refused(make, error, words, tmp_path):
    meet = make(tmp_path)
    with pytest.raises(error) as caught: meet()
    for word in words: assert word in str(caught.value)
    assert not list(tmp_path.rglob('exploded')), 'a pickle was executed'
    assert not list(tmp_path.rglob('*.part')), 'half a file was left'


@pytest.mark.parametrize('part, change', [
    ('vae', dict(groups=0)), ('vae', dict(num_res_blocks=-1)), ('vae', dict(mel_std=0.)), ('vae', dict(channel_mult=[])),
    ('ldm', dict(num_heads=0)), ('ldm', dict(depth=-1)), ('codec', dict(ratios=[0, 5, 4, 2])), ('t5', dict(d_kv=0)),
    ('clap', dict(heads=0)), ('loa', dict(num_tokens=0)), ('audiomae', dict(patch_size=[0, 8]))], ids=str)
def test_settings_that_make_no_network(part, change, tmp_path):
    folder, (name, value) = tmp_path/part, next(iter(change.items()))
    shutil.copytree(SHIPPED/part, folder)
    settings = json.loads((folder/'config.json').read_text())
    assert name in settings
    (folder/'config.json').write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=f'config.json.*{name} must') as caught:
        {m.component: m for m in (VAE, UNet, Codec, T5, CLAP, LOAModel, AudioMAE)}[part].from_pretrained(folder)
    assert str((value or ['()'])[0] if isinstance(value, list) else value) in str(caught.value)


def test_long_prompt_is_cut_and_says_so():
    with pytest.warns(UserWarning, match='only the first'): wav = pipe()('rain falls and ' * 7000, num_inference_steps=1, seed=0)
    assert wav.shape == (1, 40_960) and torch.isfinite(wav).all()


def test_unknown_words_are_named():
    with pytest.warns(UserWarning, match='zeppelin'): pipe()('a zeppelin lands', num_inference_steps=1, seed=0)


def test_names_are_unique(): assert len({row[0] for row in ROWS}) == len(ROWS)


# --- odd, but converted or warned about -----------------------------------------------------------------------------

@pytest.mark.parametrize('kind, rate, channels', [('wav', 8_000, 1), ('mp3', 8_000, 1), ('ogg', 22_050, 2),
                                                  ('flac', 44_100, 6), ('wav', 96_000, 2), ('flac', 192_000, 1)])
def test_converted(kind, rate, channels, tmp_path):
    tone = .3*np.sin(2*np.pi*440*np.arange(rate)/rate)
    soundfile.write(tmp_path/f'odd.{kind}', np.stack([tone]*channels, 1), rate)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        wav, got = load_audio(tmp_path/f'odd.{kind}', 16_000)
    assert got == 16_000 and wav.shape == (1, 16_000) and wav.dtype == torch.float32
    peak = torch.fft.rfft(wav[0]).abs().argmax().item()
    lossy = kind in ('mp3', 'ogg')
    assert peak == 440 and abs(wav[0, 4_000:-4_000].abs().max() - .3) < (.06 if lossy else .02)


def test_cancelling_channels_are_warned_about(tmp_path):
    soundfile.write(tmp_path/'anti.wav', np.stack([NOISE, -NOISE], 1), 16_000)
    with pytest.warns(UserWarning, match='anti.wav.*cancel'): load_audio(tmp_path/'anti.wav')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_audio(tmp_path/'anti.wav', channel=0)[0].abs().max() > .1


def test_clipping_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match='clipped'): save_audio(tmp_path/'a.wav', ONE + 2, 16_000)


def test_failed_save_leaves_the_old_file(tmp_path):
    save_audio(tmp_path/'a.wav', ONE + .5, 16_000)
    old = (tmp_path/'a.wav').read_bytes()
    with pytest.raises(ValueError): save_audio(tmp_path/'a.wav', ONE*math.nan, 16_000)
    assert (tmp_path/'a.wav').read_bytes() == old and len(list(tmp_path.iterdir())) == 1

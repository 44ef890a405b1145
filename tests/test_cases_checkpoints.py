"""Hostile, damaged and odd weight files, made here: each is refused by a ValueError that names it, soon and without much memory, or
gives the right weights; and no code that lies beside weights ever runs. One table of faults, met by every loader they concern.
"""
import io, json, os, re, resource, struct, subprocess, sys, time, zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audiorepro.audiomae import AudioMAE, AudioMAEConfig
from audiorepro.checkpoints import pickled_names, read_weights
from audiorepro.clap_files import HFCLAP
from audiorepro.gpt2 import GPT2, GPT2Config
from audiorepro.loa import LOAModel
from audiorepro.public import read_schedule
from audiorepro.speech import PhonemeEncoder
from audiorepro.t5 import T5
from audiorepro.t5_files import HFT5
from audiorepro.text import HFTokenizer, Tokenizer, find_tokenizer
from audiorepro.unet import UNet
from audiorepro.vae import VAE, VAEConfig
from audiorepro.vocoder import HifiGan
from layouts import official_vae, randomise

SECONDS, MEMORY = 2, 2**30
MODELS = dict(vae=VAE(VAEConfig(channels=8, num_res_blocks=1, z_channels=2, groups=8)), gpt2=GPT2(GPT2Config(64, 2, 1, 16, 11)),
              audiomae=AudioMAE(AudioMAEConfig((32, 32), dim=64, depth=1, heads=1, decoder_depth=0)))
STATE = {k: x.contiguous() for k, x in MODELS['vae'].state_dict().items()}


# --- faults: `make(folder)` -> what to load ---------------------------------------------------------------------------

def own(folder, name='vae', **settings):
    "A folder as `save_pretrained` writes it, with other settings in its config"
    MODELS[name].save_pretrained(folder)
    config = json.loads((folder/'config.json').read_text()) | settings
    (folder/'config.json').write_text(json.dumps(config))
    return folder


def safetensors(folder, change):
    own(folder)
    file = folder/'model.safetensors'
    file.write_bytes(change(file.read_bytes()))
    return folder


def weights(folder, **more):
    "Our layout with other tensors"
    own(folder)
    save_file(STATE | {k.replace('__', '.'): x for k, x in more.items()}, folder/'model.safetensors')
    return folder


def pth(folder, content=None, change=lambda data: data, **options):
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(state_dict=STATE) if content is None else content, buffer, **options)
    (folder/'w.pth').write_bytes(change(buffer.getvalue()))
    return folder/'w.pth'


def index(folder, weight_map, name='model.safetensors.index.json'):
    folder.mkdir(exist_ok=True)
    text = weight_map if isinstance(weight_map, str) else json.dumps(dict(weight_map=weight_map))
    (folder/name).write_text(text)
    (folder/'config.json').write_text('{"_class_name": "AutoencoderKL"}')
    return folder


def looped(folder):
    content = {}
    content['state_dict'] = content
    return pth(folder, content)


def flip(data, at): return data[:at] + bytes([data[at] ^ 16]) + data[at + 1:]
def in_tensor(data): return flip(data, data.index(STATE['encoder.conv_in.weight'].numpy().tobytes()) + 5)
def in_pickle(data): return flip(data, data.index(b'state_dict') + 3)


def packed(data):
    "The same archive, its parts packed, and a part of zeros that unpacks to 256 MB"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as a, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as b:
        for part in a.infolist():
            if part.filename.endswith('data/0'):
                with b.open(part.filename, 'w', force_zip64=True) as f:
                    for _ in range(2**8): f.write(bytes(2**20))
            else: b.writestr(part.filename, a.read(part))
    return out.getvalue()


def fifo(folder, name):
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder/name)
    return folder/name


def sparse(folder, name):
    folder.mkdir(exist_ok=True)
    with open(folder/name, 'wb') as f: f.truncate(2**32)
    return folder/name


def linked(folder):
    index(folder, {'w': 'a.safetensors'})
    (folder/'a.safetensors').symlink_to(folder, target_is_directory=True)
    return folder


def with_folder(folder):
    own(folder)
    (folder/'model.safetensors').unlink()
    (folder/'model.safetensors').mkdir()
    return folder


def fifo_config(folder):
    own(folder)
    (folder/'config.json').unlink()
    return fifo(folder, 'config.json').parent


def sparse_config(folder):
    own(folder)
    return sparse(folder, 'config.json').parent


def foreign_config(folder, text):
    folder.mkdir(exist_ok=True)
    save_file(STATE, folder/'diffusion_pytorch_model.safetensors')
    (folder/'config.json').write_text(text)
    return folder


NAN = torch.full_like(STATE['quant_conv.bias'], float('nan'))
REFUSED = {
    'settings of 10^9 channels': lambda d: own(d, channels=10**9),
    'settings of 10^5 channels': lambda d: own(d, channels=10**5),
    'settings of 10^9 blocks': lambda d: own(d, num_res_blocks=10**9),
    'settings of no channel': lambda d: own(d, channels=0),
    'settings of 10^9 groups': lambda d: foreign_config(d, '{"_class_name": "AutoencoderKL", "norm_num_groups": 1000000000}'),
    'settings without end': lambda d: foreign_config(d, '['*100_000),
    'settings in a list': lambda d: foreign_config(d, '[1]'),
    'scaling factor null': lambda d: foreign_config(d, '{"_class_name": "AutoencoderKL", "scaling_factor": null}'),
    'settings through a pipe': fifo_config,
    'settings of 4 GB': sparse_config,
    'safetensors, empty': lambda d: safetensors(d, lambda b: b''),
    'safetensors, cut': lambda d: safetensors(d, lambda b: b[:-7]),
    'safetensors, cut in its header': lambda d: safetensors(d, lambda b: b[:100]),
    'safetensors, longer header than file': lambda d: safetensors(d, lambda b: struct.pack('<Q', 2**40) + b[8:]),
    'safetensors, bit of the header flipped': lambda d: safetensors(d, lambda b: flip(b, 9)),
    'safetensors, a folder': with_folder,
    'safetensors, sparse': lambda d: sparse(d, 'w.safetensors'),
    'safetensors, a pipe': lambda d: fifo(d, 'w.safetensors'),
    'integers': lambda d: weights(d, quant_conv__bias=torch.ones(4, dtype=torch.int64)),
    'complex numbers': lambda d: weights(d, quant_conv__bias=torch.ones(4, dtype=torch.complex64)),
    'not a number': lambda d: weights(d, quant_conv__bias=NAN),
    'infinite': lambda d: weights(d, quant_conv__bias=NAN.nan_to_num(float('inf'))),
    'pth, empty': lambda d: pth(d, change=lambda b: b''),
    'pth, cut': lambda d: pth(d, change=lambda b: b[:-2000]),
    'pth, cut early': lambda d: pth(d, change=lambda b: b[:300]),
    'pth, old and cut': lambda d: pth(d, change=lambda b: b[:-2000], _use_new_zipfile_serialization=False),
    'pth, bit of a tensor flipped': lambda d: pth(d, change=in_tensor),
    'pth, bit of a name flipped': lambda d: pth(d, change=in_pickle),
    'pth, bit of the list of parts flipped': lambda d: pth(d, change=lambda b: flip(b, b.rindex(b'PK\1\2') + 12)),
    'pth, bit of the end flipped': lambda d: pth(d, change=lambda b: flip(b, len(b) - 4)),
    'pth, packed': lambda d: pth(d, change=packed),
    'pth, sparse': lambda d: sparse(d, 'w.pth'),
    'pth, a pipe': lambda d: fifo(d, 'w.pth'),
    'pth, holds itself': looped,
    'pth, claims more than it has': lambda d: pth(d, dict(state_dict=STATE | {'encoder.conv_in.weight': torch.ones(1).expand(10**6, 10**6)})),
    'pth, no tensors': lambda d: pth(d, dict(epoch=3)),
    'pth, a list': lambda d: pth(d, [torch.ones(3)]),
    'pth, numbers for names': lambda d: pth(d, {3: torch.ones(3)}),
    'pth, other tensors': lambda d: pth(d, dict(w=torch.ones(3))),
    'pth, sparse tensor': lambda d: pth(d, official_vae(STATE, 3) | {'quant_conv.bias': torch.ones(4).to_sparse()}),
    'pth, tensor without numbers': lambda d: pth(d, official_vae(STATE, 3) | {'quant_conv.bias': torch.ones(4, device='meta')}),
    'index, itself': lambda d: index(d, {'w': 'model.safetensors.index.json'}),
    'index, above': lambda d: index(d, {'w': '../w.safetensors'}),
    'index, ..': lambda d: index(d, {'w': '..'}),
    'index, nothing': lambda d: index(d, {'w': ''}),
    'index, its folder': lambda d: index(d, {'w': '.'}),
    'index, elsewhere': lambda d: index(d, {'w': '/etc/passwd'}),
    'index, a number': lambda d: index(d, {'w': 3}),
    'index, a link to its folder': linked,
    'index, no map': lambda d: index(d, '{}'),
    'index, no JSON': lambda d: index(d, 'weight_map'),
    'index, without end': lambda d: index(d, '{"a":'*50_000),
}


@pytest.mark.parametrize('fault', REFUSED)
def test_refused_by_name(fault, tmp_path):
    "Soon, in little memory (a control: `test_right_weights` loads what is whole), in one line"
    path = REFUSED[fault](tmp_path/'bad')
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError) as e: VAE.from_pretrained(path)
    assert path.name in str(e.value) or 'bad' in str(e.value)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < MEMORY


LOADERS = dict(unet=UNet, audiomae=AudioMAE, gpt2=GPT2, t5=T5, vocoder=HifiGan, loa=LOAModel, phonemes=PhonemeEncoder, clap=HFCLAP, text=HFT5)
SHARED = [k for k in REFUSED if k.startswith(('pth', 'index')) or k in ('safetensors, sparse', 'safetensors, a pipe', 'settings without end')]


@pytest.mark.parametrize('name', LOADERS)
def test_every_loader_refuses_by_name(name, tmp_path):
    "The same files, met by the other loaders"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, fault in enumerate(SHARED):
        path, start = REFUSED[fault](tmp_path/f'bad{i}'), time.process_time()
        with pytest.raises(ValueError) as e: LOADERS[name].from_pretrained(path)
        assert path.name in str(e.value) or f'bad{i}' in str(e.value), (fault, e.value)
        assert time.process_time() - start < SECONDS, fault
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < MEMORY


@pytest.mark.parametrize('fault', ['sparse', 'pipe', 'deep', 'list', 'bytes'])
def test_a_tokenizer_that_is_none_is_refused_by_name(fault, tmp_path):
    "Ours, a JSON file of words (a control: a saved one loads)"
    path = tmp_path/'words.json'
    if fault == 'sparse': sparse(tmp_path, path.name)
    elif fault == 'pipe': fifo(tmp_path, path.name)
    else: path.write_bytes(dict(deep=b'['*100_000, list=b'[1]', bytes=b'\xff{}')[fault])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match='words.json is not a tokeniser'): Tokenizer.load(path)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < MEMORY/4
    path.unlink(); Tokenizer(['dog']).save(path)
    assert Tokenizer.load(path).words == ('dog',)


@pytest.mark.parametrize('sizes, words', [
    ('{}', 'lacks num_train_timesteps, beta_start, beta_end'), ('[1]', 'must hold a dictionary'), ('{', 'is no JSON'),
    ('{"num_train_timesteps": "many", "beta_start": 0.1, "beta_end": 0.2}', 'num_train_timesteps must be')])
def test_a_schedule_that_is_none_is_refused_by_name(sizes, words, tmp_path):
    (tmp_path/'scheduler').mkdir()
    (tmp_path/'scheduler'/'scheduler_config.json').write_text(sizes)
    with pytest.raises(ValueError, match=f'scheduler_config.json.*{words}'): read_schedule(tmp_path)


def test_pickled_names_reads_no_more_than_it_needs(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pickled_names(sparse(tmp_path/'a', 'w.pth')) == []
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < MEMORY/4
    with pytest.raises(ValueError, match='w.pth is no regular file'): pickled_names(fifo(tmp_path/'b', 'w.pth'))


def official(folder, **options):
    "As the authors save: 32 groups, so widths of 32"
    model = randomise(VAE(VAEConfig(channels=32, channel_mult=(1, 3), num_res_blocks=1, z_channels=2)))
    found = model.state_dict() | {'scale_factor': torch.tensor(1.)}
    return found, pth(folder, dict(state_dict=official_vae(found, 2)), **options)


@pytest.mark.parametrize('how', ['zip', 'old', 'no sums', 'half', 'tied', 'linked', 'own'])
def test_right_weights(how, tmp_path):
    "What looks like a fault and is none"
    if how == 'own': wanted, path = STATE, own(tmp_path/'good')
    elif how == 'no sums':
        torch.serialization.set_crc32_options(False)
        try: wanted, path = official(tmp_path/'good')
        finally: torch.serialization.set_crc32_options(True)
    else: wanted, path = official(tmp_path/'good', _use_new_zipfile_serialization=how != 'old')
    if how == 'linked':
        (tmp_path/'link.pth').symlink_to(path)
        path = tmp_path/'link.pth'
    if how == 'half':
        wanted = {k: x.half().float() for k, x in wanted.items()}
        path = pth(tmp_path/'good', {k: x.half() for k, x in official_vae(wanted, 2).items()})
    if how == 'tied':
        more = {f'other.{i}': x for i, x in enumerate(wanted.values())}
        path = pth(tmp_path/'good', official_vae(wanted, 2) | {f'loss.{k}': x for k, x in more.items()})
    found = VAE.from_pretrained(path).state_dict()
    assert set(found) == set(wanted) and all(torch.equal(found[k], x) for k, x in wanted.items())


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('setting', ['10^9', 'a list'])
def test_every_number_of_our_settings_is_bounded(name, setting, tmp_path):
    folder = own(tmp_path/'bad', name)
    config = json.loads((folder/'config.json').read_text())
    for k, v in config.items():
        if type(v) is not int: continue
        bad = {'10^9': 10**9, 'a list': [3]}[setting]
        (folder/'config.json').write_text(json.dumps(config | {k: bad}))
        start = time.process_time()
        if k in ('decoder_dim', 'decoder_heads'): continue  # unused without a decoder
        with pytest.raises(ValueError, match='bad'): type(MODELS[name]).from_pretrained(folder)
        assert time.process_time() - start < SECONDS, k


def toys():
    "Small networks of each kind: name -> class and its toy settings"
    from audiorepro.codec import Codec, CodecConfig
    from audiorepro.speech import PhonemeConfig
    from audiorepro.tokenlm import TokenLM, TokenLMConfig
    from audiorepro.unet import UNetConfig
    return dict(unet=(UNet, UNetConfig.toy()), codec=(Codec, CodecConfig.toy()), audiomae=(AudioMAE, AudioMAEConfig.toy()),
                tokenlm=(TokenLM, TokenLMConfig.toy()), phonemes=(PhonemeEncoder, PhonemeConfig(dim=32, layers=1, ffn_dim=32)))


# setting, value: each makes something large before a parameter of the network is counted
LARGE = [('unet', 'layers_per_block', 10**9),
         ('unet', 'layers_per_block', 10**12), ('codec', 'codebooks', 10**9), ('codec', 'codebooks', 5_000),
         ('codec', 'codebook_size', 10**8), ('audiomae', 'input_size', [10**6, 64]), ('audiomae', 'input_size', [256, 10**6]),
         ('audiomae', 'input_size', [2**40, 2**40]), ('tokenlm', 'codebooks', 10**9), ('phonemes', 'max_length', 10**7), ('phonemes', 'window', 10**7)]

@pytest.mark.parametrize('name, setting, value', LARGE, ids=[f'{n}-{s}-{v}' for n, s, v in LARGE])
def test_tables_beside_the_weights_are_bounded_too(name, setting, value, tmp_path):
    kind, cfg = toys()[name]
    own = kind(cfg)
    own.save_pretrained(tmp_path/'bad')
    assert type(kind.from_pretrained(tmp_path/'bad')) is kind                                        # control
    file = tmp_path/'bad'/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match='bad'): kind.from_pretrained(tmp_path/'bad')
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < MEMORY/4


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 10**400])
def test_settings_that_are_no_numbers_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match='bad.*mel_mean'): VAE.from_pretrained(own(tmp_path/'bad', mel_mean=value))


# --- code beside weights ----------------------------------------------------------------------------------------------

CODE = '''open({marker!r}, 'w').write('ran')
class Own:
    def __init__(self, *a, **k): pass
    @classmethod
    def from_pretrained(cls, *a, **k): return cls()
'''


def trap(folder, marker):
    "A folder whose own code would run if it were allowed"
    folder.mkdir()
    (folder/'own.py').write_text(CODE.format(marker=str(marker)))
    names = {k: 'own.Own' for k in ('AutoConfig', 'AutoModel', 'AutoFeatureExtractor', 'AutoProcessor')} | {'AutoTokenizer': ['own.Own']*2}
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='Own', auto_map=names)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='own', auto_map=names, architectures=['Own'])))
    save_file({'w': torch.ones(2)}, folder/'model.safetensors')
    return folder


ENTRIES = dict(find_tokenizer="t.find_tokenizer([folder], 'none/none')", HFTokenizer='t.HFTokenizer.from_pretrained(folder)',
               HFCLAP='c.HFCLAP.from_pretrained(folder)', HFT5='f.HFT5.from_pretrained(folder)', VAE='v.VAE.from_pretrained(folder)',
               AudioLDM2='a.AudioLDM2.from_pretrained(folder)')
CALL = '''import sys; from pathlib import Path; folder = Path(sys.argv[1])
import audiorepro.text as t, audiorepro.clap_files as c, audiorepro.t5_files as f, audiorepro.vae as v, audiorepro.audioldm2 as a
try: {call}
except Exception as e: print(type(e).__name__, str(e)[:300])
else: print('loaded')
'''


@pytest.mark.parametrize('entry', ENTRIES)
def test_no_code_runs_even_if_somebody_says_yes(entry, tmp_path):
    folder, marker = trap(tmp_path/'trap', tmp_path/'ran'), tmp_path/'ran'
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hf'))
    done = subprocess.run([sys.executable, '-c', CALL.format(call=ENTRIES[entry]), folder], input='y\n'*20, env=env, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and not marker.exists(), done.stdout + done.stderr[-2000:]
    assert 'ValueError' in done.stdout and 'trap' in done.stdout, done.stdout


def test_the_trap_works(tmp_path, monkeypatch):
    "Control: the same folder runs its code when it is allowed to"
    from transformers import AutoTokenizer
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path/'modules'))
    folder = trap(tmp_path/'trap', tmp_path/'ran')
    try: AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except Exception: pass
    assert (tmp_path/'ran').exists()


def test_settings_fetch_no_kernel():
    from audiorepro.clap_files import _settings
    from transformers import ClapConfig
    bad = dict(_attn_implementation='evil/kernel', attn_implementation='evil/kernel')
    theirs = ClapConfig.from_dict(bad | dict(text_config=bad, audio_config=bad))
    assert theirs._attn_implementation == 'evil/kernel'                # control
    ours = ClapConfig.from_dict(_settings(bad | dict(text_config=bad, audio_config=bad)))
    assert not any('evil' in str(c._attn_implementation) for c in (ours, ours.text_config, ours.audio_config))


def test_every_auto_class_of_the_package_refuses_code():
    calls = [c for p in Path(read_weights.__code__.co_filename).parent.glob('*.py')
             for c in re.findall(r'Auto\w+\.from_pretrained\(.*', p.read_text())]
    assert calls and all('trust_remote_code=False' in c for c in calls), calls
    assert HFTokenizer and HFCLAP and find_tokenizer

"""laion_clap and `ClapModel`, each in its own process, on the same random weights: the two back ends of a published CLAP.

Needs `.venv-clap`: `make clap-env` makes it and runs this file. Without it the tests are skipped and say so.
"""
import importlib.util, json, os, subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('clap_env', ROOT/'tests'/'clap_env.py')
clap_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clap_env)

pytestmark = pytest.mark.skipif(not clap_env.is_made(), reason=f'{clap_env.VENV} is missing: run `make clap-env`')
TEXTS = ['a dog barks, then rain falls', 'Birds sing', 'a low siren while people applaud', 'zebra crossing']


def sounds():
    """Tones inside the band of 50 to 14,000 Hz, noise, a short clip (repeated to 10 s), one that ends on the sample.

    All but `pure` have a floor of noise, 50 dB below. Between the lines of a pure tone there is nothing but rounding, where the
    logarithm shows that the package transforms in float32 and our extractor in float64.
    """
    t = np.arange(480_000)/48_000
    noise = np.random.default_rng(0).standard_normal(480_000)
    made = dict(pure=.3*np.sin(2*np.pi*440*t), tone=.3*np.sin(2*np.pi*440*t) + 1e-3*noise, high=.2*np.sin(2*np.pi*9_000*t) + 1e-3*noise, noise=.1*noise,
                short=(.2*np.sin(2*np.pi*(200 + 300*t)*t) + 1e-3*noise)[:100_003], two=.05*noise[:96_000] + .3*np.sin(2*np.pi*1_000*t)[:96_000])
    return {k: v.astype(np.float32) for k, v in made.items()}


def hf_state(state):
    "Names of laion_clap -> `ClapModel`; fused queries, keys and values are cut in three, the front end and heads are left out"
    drop = ('text_transform', 'audio_transform', 'spectrogram_extractor', 'logmel_extractor', 'tscam_conv', 'audio_branch.head', 'attn_mask',
            'relative_position_index', 'position_ids', 'num_batches')
    found = {}
    for name, x in state.items():
        name = name.removeprefix('module.')
        if any(d in name for d in drop): continue
        for a, b in (('text_branch', 'text_model'), ('audio_branch', 'audio_model.audio_encoder'), ('bn0', 'batch_norm'),
                     ('projection.0.', 'projection.linear1.'), ('projection.2.', 'projection.linear2.')): name = name.replace(a, b)
        if 'audio_encoder' in name:
            for a, b in (('attn.proj', 'attention.output.dense'), ('mlp.fc1', 'intermediate.dense'), ('mlp.fc2', 'output.dense'),
                         ('.norm1', '.layernorm_before'), ('.norm2', '.layernorm_after'), ('.attn.', '.attention.self.')): name = name.replace(a, b)
        if '.qkv.' in name: found |= {name.replace('qkv', n): part for n, part in zip(('query', 'key', 'value'), x.chunk(3))}
        else: found[name] = x
    return found


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "Folder with what laion_clap made, and our back end on its weights"
    from transformers import ClapConfig, ClapModel, RobertaTokenizerFast
    from audiorepro.clap_files import HFCLAP
    assert clap_env.is_made(), f'{clap_env.VENV} is missing: continuous integration must run `make clap-env` first'
    folder = tmp_path_factory.mktemp('clap')
    np.savez(folder/'sounds.npz', **sounds())
    (folder/'texts.json').write_text(json.dumps(TEXTS))
    made = subprocess.run([clap_env.PYTHON, ROOT/'tests'/'clap_env.py', 'embed', folder], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=''))
    assert made.returncode == 0, made.stderr[-2000:]
    roberta = next((folder/'hf'/'hub'/'models--roberta-base'/'snapshots').iterdir())
    text = json.loads((roberta/'config.json').read_text())
    keep = ('vocab_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'max_position_embeddings', 'layer_norm_eps')
    model = ClapModel(ClapConfig(text_config={k: text[k] for k in keep} | dict(hidden_size=768, projection_dim=512),
                                 audio_config=dict(projection_dim=512), projection_dim=512))
    state = hf_state(torch.load(folder/'clap.pt', weights_only=True)['state_dict'])
    missing, surplus = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith(('position_ids', 'token_type_ids', 'relative_position_index', 'num_batches_tracked'))]
    assert not missing and set(surplus) <= {'logit_scale_a', 'logit_scale_t'}, (missing[:9], surplus[:9])
    return np.load(folder/'embeddings.npz'), HFCLAP(model, RobertaTokenizerFast.from_pretrained(roberta)), folder


def error(a, b): return float((a - b).abs().max()/b.abs().max())


def test_audio_embeddings(both):
    theirs, ours, _ = both
    made = {k: ours.embed_audio(torch.from_numpy(x), 48_000)[0] for k, x in sounds().items()}
    for k, x in made.items():
        assert (gap := error(x, torch.from_numpy(theirs[k]))) < (1e-4 if k == 'pure' else 1e-5), f'{k}: {gap:.1e}'
        assert error(x, torch.from_numpy(theirs[f'{k}/int16'])) < .05  # by default it rounds samples to 16 bits
    for k in made:  # control: another sound is another embedding
        other = next(o for o in made if o != k)
        assert error(made[other], torch.from_numpy(theirs[k])) > 1e-3


def test_text_embeddings(both):
    theirs, ours, _ = both
    text = torch.from_numpy(theirs['text'])
    assert error(ours.embed_text(TEXTS), text) < 1e-5            # padded to the longest here, to 77 there
    assert error(ours.embed_text(TEXTS[:1]), text[:1]) < 1e-5
    assert error(ours.embed_text(TEXTS[::-1]), text) > 1e-3


def test_the_package_reads_the_file(both):
    "Our own reader of laion_clap's files gives the network of the map above, tensor by tensor"
    from audiorepro.clap_files import read_clap
    _, ours, folder = both
    found, expected = read_clap(folder/'clap.pt').state_dict(), ours.model.state_dict()
    assert set(found) == set(expected)
    for k in found: assert torch.equal(found[k], expected[k]), k


def test_lowest_frequency_matters(both):
    "The extractor's default of 0 Hz, instead of laion_clap's 50, is another front end"
    from transformers import ClapFeatureExtractor
    theirs, ours, _ = both
    extract = ClapFeatureExtractor(truncation='rand_trunc')
    features = extract(sounds()['tone'], sampling_rate=48_000, return_tensors='pt')['input_features']
    with torch.no_grad(): out = ours.model.get_audio_features(input_features=features)
    assert error(F.normalize(getattr(out, 'pooler_output', out), dim=-1)[0], torch.from_numpy(theirs['tone'])) > 1e-3


def test_cnn14_of_the_package(tmp_path):
    "The CNN14 that laion_clap contains writes its own file and hears sounds; our reader and network give the same, at both rates"
    from audiorepro.backbone_files import read_cnn14
    g = torch.Generator().manual_seed(0)
    heard = {}
    for rate in (16_000, 32_000):
        t = torch.arange(2*rate)/rate
        heard[rate] = torch.stack([.3*torch.sin(2*torch.pi*(f + 500*t)*t) for f in (300, 900)]) + .02*torch.randn(2, 2*rate, generator=g)
        heard[rate] *= torch.tensor([[1.], [.01]])  # 40 dB apart
    np.savez(tmp_path/'sounds.npz', **{str(k): v.numpy() for k, v in heard.items()})
    made = subprocess.run([clap_env.PYTHON, ROOT/'tests'/'clap_env.py', 'panns', tmp_path], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=''))
    assert made.returncode == 0, made.stderr[-2000:]
    for rate, wav in heard.items():
        net, theirs = read_cnn14(tmp_path/f'Cnn14_{rate}.pth'), np.load(tmp_path/f'panns_{rate}.npz')
        assert net.sample_rate == rate and net.cfg.widths[-1] == 2048 and net.cfg.classes == 527
        out = net.listen(wav)
        assert error(out['features'], torch.from_numpy(theirs['embedding'])) < 1e-5
        assert error(out['logits'].sigmoid(), torch.from_numpy(theirs['clipwise'])) < 1e-5
        assert error(net.features(wav.flip(0)), torch.from_numpy(theirs['embedding'])) > 1e-3

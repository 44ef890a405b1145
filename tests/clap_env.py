"""laion_clap in an environment of its own, for one comparison: it needs numpy below 2 and names of torchvision.

    python tests/clap_env.py make                            # .venv-clap, once (two minutes)
    .venv-clap/bin/python tests/clap_env.py embed FOLDER     # what tests/test_clap_env.py runs there
    .venv-clap/bin/python tests/clap_env.py panns FOLDER     # the same for the CNN14 inside the package

`embed` builds the package's CLAP with random weights, without any network: the three tokenizers that it wants at import
are trained on a few sentences and lie in a hub cache made in FOLDER. It reads FOLDER/sounds.npz and FOLDER/texts.json
and leaves FOLDER/clap.pt (the layout of the published files) and FOLDER/embeddings.npz.
"""
import hashlib, json, os, subprocess, sys, time, venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get('AUDIOREPRO_CLAP_VENV', ROOT/'.venv-clap'))
PYTHON = VENV/'bin'/'python'
PINS = ['laion-clap==1.1.7', 'torch==2.13.0', 'transformers==5.23.0', 'tokenizers==0.23.3', 'safetensors==0.8.0', 'numpy==1.26.4',
        'librosa==0.11.0', 'torchlibrosa==0.1.0', 'numba==0.68.1', 'scipy==1.17.1', 'pandas==3.0.6', 'h5py==3.16.0', 'pillow==13.0.0', 'setuptools<82']
SENTENCES = ['a dog barks, then rain falls', 'a low siren while people applaud', 'slow piano music in a minor key', 'Birds sing; wind.']


# --- making the environment -----------------------------------------------------------------------------------------

def stamp(): return hashlib.sha256(json.dumps([PINS, sys.version_info[:2]]).encode()).hexdigest()


def is_made(): return PYTHON.exists() and (VENV/'.stamp-clap').exists() and (VENV/'.stamp-clap').read_text() == stamp()


def make(tries=3):
    "Create the environment, or do nothing when it is there with these versions; an interrupted one is made anew"
    if is_made(): return print(f'{VENV} is up to date')
    start = time.time()
    venv.create(VENV, clear=True, with_pip=True)
    index = ['--extra-index-url', 'https://download.pytorch.org/whl/cpu'] if os.environ.get('CPU') else []
    command = [PYTHON, '-m', 'pip', 'install', '-qq', '--no-compile', '--disable-pip-version-check', *index, *PINS]
    for i in range(tries):
        if subprocess.run(list(map(str, command))).returncode == 0: break
        if i == tries - 1: raise SystemExit('pip could not install laion-clap; see the lines above')
        time.sleep(10)
    (VENV/'.stamp-clap').write_text(stamp())
    print(f'{VENV} made in {time.time() - start:.0f} s')


# --- inside the environment -----------------------------------------------------------------------------------------

def in_cache(cache, name):
    "Folder of a snapshot in a hub cache"
    commit = hashlib.sha1(name.encode()).hexdigest()
    top = cache/'hub'/f"models--{name.replace('/', '--')}"
    (top/'refs').mkdir(parents=True)
    (top/'refs'/'main').write_text(commit)
    folder = top/'snapshots'/commit
    folder.mkdir(parents=True)
    return folder


def make_cache(cache):
    "A hub cache with tiny tokenizers and a tiny RoBERTa under the names that laion_clap asks for"
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES*3, vocab_size=400, min_frequency=1, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'])
    torch.manual_seed(0)
    roberta = RobertaModel(RobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=256,
        max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5))
    for name, kind in (('roberta-base', 'roberta'), ('facebook/bart-base', 'bart'), ('bert-base-uncased', 'bert')):
        folder = in_cache(cache, name)
        if kind == 'bert': (folder/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'dog']))
        else: bpe.save_model(str(folder))
        if kind == 'roberta': roberta.save_pretrained(folder)
        else: (folder/'config.json').write_text(json.dumps(dict(model_type=kind)))


def stand_ins():
    "Empty modules for torchvision, whose names laion_clap imports and, without fusion and images, never uses"
    import types
    import transformers
    for name in ('RobertaModel', 'RobertaTokenizer', 'BertModel', 'BertTokenizer', 'BartModel', 'BartTokenizer'): getattr(transformers, name)
    def absent(name):
        if name.startswith('__'): raise AttributeError(name)
        return type(name, (), {})
    for name in ('torchvision', 'torchvision.transforms', 'torchvision.datasets', 'torchvision.ops', 'torchvision.ops.misc'):
        module = sys.modules[name] = types.ModuleType(name)
        module.__getattr__ = absent
        parent, _, child = name.rpartition('.')
        if parent: setattr(sys.modules[parent], child, module)


def randomise(model):
    "Also what starts at zero or one, and the statistics of batch norms"
    import torch
    g = torch.Generator().manual_seed(1)
    for name, x in model.state_dict().items():
        if not x.is_floating_point() or any(n in name for n in ('stft', 'logmel', 'attn_mask')): continue  # fixed, not learned
        if 'running_mean' in name: x.normal_(0, .3, generator=g)
        elif 'running_var' in name: x.uniform_(.5, 2, generator=g)
        elif x.ndim > 1: x.add_(torch.randn(x.shape, generator=g)*.3*x[0].numel()**-.5)
        else: x.add_(torch.randn(x.shape, generator=g)*.1)


def embed(folder):
    "What the package makes of sounds and texts"
    folder = Path(folder)
    os.environ.update(HF_HOME=str(folder/'hf'), HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    make_cache(folder/'hf')
    stand_ins()
    import numpy as np, torch
    import laion_clap
    argv, sys.argv = sys.argv, sys.argv[:1]
    clap = laion_clap.CLAP_Module(enable_fusion=False, device='cpu', amodel='HTSAT-tiny')
    sys.argv = argv
    clap.eval()
    with torch.no_grad(): randomise(clap.model)
    state = {f'module.{k}': v for k, v in clap.model.state_dict().items()}
    torch.save(dict(epoch=1, name='random', state_dict=state), folder/'clap.pt')
    sounds, texts = np.load(folder/'sounds.npz'), json.loads((folder/'texts.json').read_text())
    with torch.no_grad():
        audio = {k: clap.get_audio_embedding_from_data([torch.from_numpy(sounds[k])], use_tensor=True)[0].numpy() for k in sounds.files}
        rounded = {f'{k}/int16': clap.get_audio_embedding_from_data([sounds[k]])[0] for k in sounds.files}
        text = clap.get_text_embedding(texts, use_tensor=True).numpy()
    np.savez(folder/'embeddings.npz', text=text, **audio, **rounded)


def panns(folder):
    "What the package's CNN14 makes of sounds, at full size and both rates, with its own file of random weights"
    folder = Path(folder)
    os.environ.update(HF_HOME=str(folder/'hf'), HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    make_cache(folder/'hf')
    stand_ins()
    import numpy as np, torch
    from laion_clap.clap_module.pann_model import Cnn14
    for rate, front_end in ((16_000, (512, 160, 64, 50, 8_000)), (32_000, (1024, 320, 64, 50, 14_000))):
        net = Cnn14(rate, *front_end, 527).eval()
        with torch.no_grad():
            randomise(net)
            net.bn0.running_mean.normal_(-30, 3, generator=torch.Generator().manual_seed(2))  # it meets decibels
            net.bn0.running_var.uniform_(100, 300, generator=torch.Generator().manual_seed(3))
            wav = torch.from_numpy(np.load(folder/'sounds.npz')[str(rate)])
            out = net(dict(waveform=wav), device='cpu')
        torch.save(dict(iteration=1, model=net.state_dict()), folder/f'Cnn14_{rate}.pth')
        np.savez(folder/f'panns_{rate}.npz', embedding=out['embedding'].numpy(), clipwise=out['clipwise_output'].numpy())


if __name__ == '__main__':
    if sys.argv[1:] == ['make']: make()
    elif len(sys.argv) == 3 and sys.argv[1] == 'panns': panns(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] == 'embed': embed(sys.argv[2])
    else: raise SystemExit(__doc__)

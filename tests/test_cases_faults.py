"""Cases of faults outside the files that are read: writers, processes, numbers of a call, devices, half precision.

Tables: each row is a case that failed once, or a near relative, with the right value or the error a user must read.
"""
import ast, configparser, hashlib, json, math, os, re, shlex, signal, stat, subprocess, sys, warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest, soundfile, torch

from audiorepro import checkpoints, core, guard
from audiorepro.audioldm2 import AudioLDM2
from audiorepro.sampling import item_seeds, sample_ddim

ROOT = Path(__file__).resolve().parent.parent
NAN, INF = math.nan, math.inf


# --- writers ----------------------------------------------------------------------------------------------------------

def mode(path): return stat.S_IMODE(path.stat().st_mode)

def put(text): return lambda f: f.write(text.encode())


@pytest.mark.parametrize('mask, wanted', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_respects_the_umask(mask, wanted, tmp_path):
    old = os.umask(mask)
    try: core.write_atomic(tmp_path/'a', put('new'))
    finally: os.umask(old)
    assert mode(tmp_path/'a') == wanted


@pytest.mark.parametrize('kept', [0o600, 0o640, 0o644, 0o755])
def test_a_replaced_file_keeps_its_mode(kept, tmp_path):
    (tmp_path/'a').write_text('old'); (tmp_path/'a').chmod(kept)
    core.write_atomic(tmp_path/'a', put('new'))
    assert (tmp_path/'a').read_text() == 'new' and mode(tmp_path/'a') == kept


def test_a_link_is_followed(tmp_path):
    (tmp_path/'real').write_text('old'); (tmp_path/'link').symlink_to(tmp_path/'real')
    core.write_atomic(tmp_path/'link', put('new'))
    assert (tmp_path/'link').is_symlink() and (tmp_path/'real').read_text() == 'new'


def test_long_names_and_foreign_letters_are_written(tmp_path):
    for name in ('a'*250, 'ö'*120): core.write_atomic(tmp_path/name, put('x'))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('is_folder', [True, False])
def test_convert_spares_what_is_named_like_its_work(is_folder, tmp_path):
    torch.save(dict(w=torch.ones(2)), tmp_path/'w.pth')
    user = tmp_path/'x.part'
    if is_folder: user.mkdir(); user = user/'mine'
    user.write_text('mine')
    checkpoints.convert(tmp_path/'w.pth', tmp_path/'x')
    assert user.read_text() == 'mine' and (tmp_path/'x'/'w.safetensors').exists()
    with pytest.raises(ValueError): checkpoints.convert(tmp_path/'w.pth', tmp_path/'x')  # nor what is there already
    assert sorted(p.name for p in tmp_path.iterdir()) == ['w.pth', 'x', 'x.part']


@pytest.mark.parametrize('names, words', [
    (['a.wav'], 'a.wav holds no weights'), (['w.safetensors'], 'w.safetensors holds no weights'), (['config.json', 'w.safetensors'], 'given holds no weights'),
    (['model.bin', 'model.pth'], 'model.pth and another file would both become model.safetensors'),
    (['model.bin', 'pytorch_model.bin'], 'pytorch_model.bin and another file')])
def test_convert_refuses_what_it_cannot_do_as_asked(names, words, tmp_path):
    "Nothing to convert, or two files of one name afterwards: no folder is made (a control: two names that stay apart)"
    folder = tmp_path/'given'
    folder.mkdir()
    for name in names: torch.save(dict(w=torch.ones(2)), folder/name)
    with pytest.raises(ValueError, match=words): checkpoints.convert(folder if len(names) > 1 else folder/names[0], tmp_path/'x')
    assert not (tmp_path/'x').exists()
    torch.save(dict(w=torch.ones(2)), folder/'other.pt')
    for name in names[1:]: (folder/name).unlink()
    assert folder/'other.pt' in checkpoints.convert(folder, tmp_path/'x')


@pytest.mark.parametrize('index, words', [
    ('pipe', 'x.bin.index.json is no regular file'), ('sparse', 'x.bin.index.json is no JSON'), ('bytes', 'x.bin.index.json is no JSON')])
def test_convert_refuses_an_index_that_is_none(index, words, tmp_path):
    "By its name and at once: neither waited for nor read whole"
    folder = tmp_path/'given'
    folder.mkdir()
    torch.save(dict(w=torch.ones(2)), folder/'w.pth')
    if index == 'pipe': os.mkfifo(folder/'x.bin.index.json')
    else: (folder/'x.bin.index.json').write_bytes(b'\xff')
    if index == 'sparse': os.truncate(folder/'x.bin.index.json', 2**32)
    with pytest.raises(ValueError, match=words): checkpoints.convert(folder, tmp_path/'x')
    assert [p.name for p in tmp_path.iterdir()] == ['given']


PLACES = {'link to nothing': lambda p: p.symlink_to('gone'), 'link in a circle': lambda p: p.symlink_to(p.name),
          'below a file': lambda p: (p.parent.rmdir(), p.parent.touch())}

@pytest.mark.parametrize('place', PLACES)
def test_convert_looks_at_its_target_first(place, tmp_path, monkeypatch):
    target = tmp_path/'place'/'x'
    target.parent.mkdir()
    PLACES[place](target)
    torch.save(dict(w=torch.ones(2)), tmp_path/'w.pth')
    monkeypatch.setattr(checkpoints, 'read_weights', lambda *args: pytest.fail('the work had begun'))
    with pytest.raises((ValueError, OSError), match='place/x'): checkpoints.convert(tmp_path/'w.pth', target)


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(OSError, match='no file that may be replaced'): core.write_atomic(tmp_path, put('x'))
    assert not list(tmp_path.iterdir())


TARGETS = [  # name, what to prepare, endings, words of the error
    ('ending', None, ('.wav', '.flac'), ['a.m4a', '.wav or .flac']),
    ('folder', lambda p: p.mkdir(), (), ['a.m4a', 'is a folder']),
    ('read-only file', lambda p: (p.touch(), p.chmod(0o444)), (), ['a.m4a', 'may be replaced']),
    ('fifo', lambda p: os.mkfifo(p), (), ['a.m4a', 'may be replaced']),
    ('read-only place', lambda p: p.parent.chmod(0o555), (), ['a.m4a', 'cannot be written']),
    ('place is a file', lambda p: (p.parent.rmdir(), p.parent.touch()), (), ['a.m4a', 'cannot be written']),
    ('link in a circle', lambda p: p.symlink_to(p), (), ['a.m4a', 'cannot be written']),
    ('place in a circle', lambda p: (p.parent.rmdir(), p.parent.symlink_to(p.parent)), (), ['a.m4a', 'cannot be written']),
    ('link to a place where nobody may write', lambda p: p.symlink_to('/dev/null/b.m4a'), (), ['a.m4a', 'cannot be written']),
]

@pytest.mark.parametrize('prepare, endings, words', [t[1:] for t in TARGETS], ids=[t[0] for t in TARGETS])
def test_a_target_is_refused_before_the_work(prepare, endings, words, tmp_path):
    path = tmp_path/'place'/'a.m4a'
    path.parent.mkdir()
    if prepare: prepare(path)
    if os.geteuid() == 0 and words[-1] != 'is a folder' and prepare in (TARGETS[2][1], TARGETS[4][1]):
        pytest.skip('root may write everywhere')
    try:
        with pytest.raises((ValueError, OSError)) as caught: guard.check_target(path, endings)
    finally: path.parent.is_dir() and path.parent.chmod(0o755)
    assert all(w in str(caught.value) for w in words) and '\n' not in str(caught.value)


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='needs a place where not even root may write')
def test_a_place_where_nobody_may_write():
    with pytest.raises(OSError, match='/proc/a.wav cannot be written'): guard.check_target('/proc/a.wav')


def test_a_target_with_a_zero_byte_is_refused():
    with pytest.raises(ValueError, match='cannot be written'): guard.check_target('a\0b.wav')


def test_a_good_target_leaves_no_trace(tmp_path):
    assert guard.check_target(tmp_path/'new'/'A.WAV', ('.wav',)) == tmp_path/'new'/'A.WAV'
    assert not list(tmp_path.iterdir())
    (tmp_path/'link.wav').symlink_to(tmp_path/'new'/'b.wav')  # a link that leads nowhere yet
    assert guard.check_target(tmp_path/'link.wav') == tmp_path/'link.wav' and [p.name for p in tmp_path.iterdir()] == ['link.wav']


STARVED = '''
import resource, sys
from pathlib import Path
from unittest import mock
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from audiorepro import core, guard
root = Path(sys.argv[1])
fig, ax = plt.subplots(figsize=(2, 1)); ax.plot([0, 1])
with mock.patch.object(core, 'results_dir', lambda: root):
    old = core.save_fig(fig, 'a').read_bytes()
    ax.plot([1, 0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    for work in (lambda: core.save_fig(fig, 'a'), lambda: guard.check_target(root/'b.png')):
        try: work()
        except OSError as e: print(e)
        else: sys.exit('a full disk was not noticed')
    assert len(old) > 300 and (root/'a.png').read_bytes() == old and [p.name for p in root.iterdir()] == ['a.png']
'''

def test_a_full_disk_spares_the_old_picture_and_is_found_beforehand(tmp_path):
    done = subprocess.run([sys.executable, '-c', STARVED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- a clone stays clean ------------------------------------------------------------------------------------------------

def tracked():
    "State of the checkout: what git sees as changed, and how"
    git = lambda *args: subprocess.run(['git', *args], cwd=ROOT, capture_output=True, check=True).stdout
    return git('status', '--porcelain') + hashlib.sha256(git('diff', 'HEAD')).digest()


@pytest.mark.skipif(not (ROOT/'.git').exists(), reason='no checkout')
def test_running_a_lesson_changes_nothing_that_is_tracked(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path)); monkeypatch.delenv('AUDIOREPRO_KEEP', raising=False)
    before = tracked()
    nb = nbformat.read(ROOT/'nbs'/'01_core.ipynb', 4)
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(ROOT/'nbs')}}).execute()
    assert tracked() == before and (tmp_path/'figures'/'01_core_crash.png').exists()


def test_only_the_make_target_writes_over_the_stored_results(tmp_path, monkeypatch):
    monkeypatch.setattr(core, 'project_root', lambda: tmp_path); monkeypatch.delenv('AUDIOREPRO_OUT', raising=False)
    monkeypatch.delenv('AUDIOREPRO_KEEP', raising=False); monkeypatch.delenv('AUDIOREPRO_RUN', raising=False)
    monkeypatch.setenv('AUDIOREPRO_KEEP', '1'); core.save_json('09_a', value=1)
    monkeypatch.setenv('AUDIOREPRO_KEEP', ''); core.save_json('09_a', value=2)
    files = {str(p.relative_to(tmp_path)): json.loads(p.read_text())['value'] for p in tmp_path.rglob('*.json')}
    assert files == {'figures/09_a.json': 1, 'out/figures/09_a.json': 2}
    assert core.load_json('09_a')['value'] == 1                                  # the course's
    monkeypatch.setenv('AUDIOREPRO_RUN', 'slow'); assert core.load_json('09_a')['value'] == 2  # your own run
    assert "os.environ['AUDIOREPRO_KEEP'] = '1'" in (ROOT/'tests'/'lessons.py').read_text()


def writes_to_figures(code): return re.findall(r'(?:save\w*|write\w*|open)\([^\n]*figures_dir\(\)', code)


def test_no_lesson_writes_into_figures_by_itself():
    assert writes_to_figures("save_audio(figures_dir()/'a.mp3', wav, 16_000)") and not writes_to_figures("load_audio(figures_dir()/'a.mp3')")
    cells = {p.stem: [''.join(c['source']) for c in json.loads(p.read_text())['cells']] for p in ROOT.glob('nbs/*.ipynb')}
    assert not {k: found for k, texts in cells.items() if (found := [w for t in texts for w in writes_to_figures(t)])}


# --- processes ------------------------------------------------------------------------------------------------------------

def train(folder, steps=4):
    from audiorepro.training import TrainConfig, fit, tensor_batches
    model, data = torch.nn.Linear(2, 1), dict(x=torch.ones(8, 2))
    loss = lambda model, batch, ctx: dict(loss=model(batch['x']).square().mean())
    return fit(model, loss, tensor_batches(data, 4), TrainConfig(steps=steps, save_every=2), folder=folder, progress=False)


HOLD = "import sys\nfrom audiorepro.guard import lock_folder\nwith lock_folder(sys.argv[1]): print('held', flush=True); input()"

def test_one_training_for_each_folder_and_a_lock_that_dies(tmp_path, monkeypatch):
    from audiorepro import course
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path))
    run = tmp_path/'train'/'vae'/'0123456789ab'
    (run/'user.part').mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    for work in (lambda: train(run), lambda: course.train_part('vae', fresh=True), lambda: guard.delete_folder(run)):
        with pytest.raises(ValueError, match='0123456789ab is in use by another process'): work()
    assert run.is_dir()
    holder.send_signal(signal.SIGKILL); holder.communicate()
    assert train(run)[-1]['step'] == 4 and (run/'user.part').is_dir()
    assert train(run, 6)[-1]['step'] == 6                                         # free again, and continued
    guard.delete_folder(run.parent)
    assert not run.exists()


def test_a_folder_has_one_lock_under_all_its_names(tmp_path, monkeypatch):
    (tmp_path/'big').mkdir(); (tmp_path/'link').symlink_to(tmp_path/'big'); monkeypatch.chdir(tmp_path)
    with guard.lock_folder(tmp_path/'big'/'run'):
        for name in (tmp_path/'link'/'run', f'{tmp_path}/big/run/', 'big/run', 'link/../big/run'):
            with pytest.raises(ValueError, match='in use by another process'): guard.lock_folder(name)
    with guard.lock_folder('link/run'): pass                                      # free again


# --- numbers of a call ----------------------------------------------------------------------------------------------------

@cache
def pipe(): return AudioLDM2.from_pretrained('toy')

def say(prompt='rain falls', **options): return pipe()(prompt, **dict(dict(num_inference_steps=2, seed=0, output='latents'), **options))


NUMBERS = dict(
    guidance_scale=(NAN, INF, -INF, 1e38, 10**400, '3', None, True, 2j), guidance_rescale=(NAN, -.1, 1.1), eta=(NAN, -.1, 1.1, INF),
    num_inference_steps=(0, -1, 2.5, 1001, True, NAN, '2', None), num_waveforms_per_prompt=(0, -1, 1.5, True, NAN, 10**12),
    audio_length_in_s=(0, 0., -1., 1e-9, 3e-5, NAN, INF, 1e4, 10**400, '2', True),
    seed=(1.5, True, '1', NAN, 2**64, -2**63 - 1, [1, 2], [], [1.5], [True], np.float32(1)),
    latents=(torch.full((1, 8, 64, 16), NAN), torch.full((1, 8, 64, 16), INF), torch.zeros(1, 8, 64, 15), torch.zeros(8, 64, 16),
             torch.zeros(1, 8, 64, 16, dtype=torch.int64), torch.full((1, 8, 64, 16), 1e38), np.zeros((1, 8, 64, 16), 'float32'),
             torch.zeros(1, 8, 64, 16).to_sparse()),
    negative_prompt=(['a', 'b'], '', 3), output=('mp3', None))

@pytest.mark.parametrize('name, value', [(k, v) for k, values in NUMBERS.items() for v in values],
                         ids=[f'{k}-{i}' for k, values in NUMBERS.items() for i in range(len(values))])
def test_a_bad_argument_is_named_before_any_work(name, value, monkeypatch):
    import audiorepro.audioldm2 as module
    monkeypatch.setattr(module, 'encode_prompts', lambda *args: pytest.fail('the work had begun'))
    with pytest.raises(ValueError, match=name): say(**{name: value})


def test_samplers_refuse_the_same_by_themselves():
    schedule = pipe().cfg.schedule
    for name in ('guidance_scale', 'guidance_rescale', 'eta', 'num_inference_steps', 'latents'):
        for value in NUMBERS[name]:
            if name == 'latents' and value.shape != (1, 8, 64, 16): continue
            with pytest.raises(ValueError, match=name): sample_ddim(None, (1, 8, 64, 16), schedule, **{name: value})


@pytest.mark.parametrize('seed', [1, np.int64(1), np.uint8(1), [1], np.array([1]), torch.tensor(1), torch.tensor([1]), (np.int32(1),)],
                         ids=['int', 'int64', 'uint8', 'list', 'array', 'tensor', 'tensors', 'tuple'])
def test_whole_numbers_of_numpy_are_seeds(seed): assert item_seeds(seed, 1) == [1] and type(item_seeds(seed, 1)[0]) is int


def test_no_candidate_repeats():
    z = say(['a dog barks']*4, num_waveforms_per_prompt=3)
    assert len({x.numpy().tobytes() for x in z}) == 12
    one_each = say(['a dog barks']*4)
    assert (z[::3] - one_each).abs().max() <= 1e-5*one_each.abs().max()          # the first candidates are what they were
    assert item_seeds(0, 4) == [0, 1, 2, 3] and item_seeds(0, 2, 2) == [0, 0x9E3779B9, 1, 0x9E3779BA]


@pytest.mark.parametrize('seed', [0, 1, 2**32 - 5, 2**40, 2**63, -7])
def test_seeds_never_collide(seed): assert len(set(item_seeds(seed, 200, 100))) == 20_000


@pytest.mark.parametrize('seeds', [[0, 0x9E3779B9], [5, 5 + 2**32], [-7, 2**32 - 7], [0x9E3779B9, 0], [0, 0x9E3779B9, 0x9E3779BA]], ids=str)
def test_seeds_of_a_list_do_not_collide_either(seeds):
    "A step apart, or equal in their last 32 bits; equal seeds stay equal, and the first candidates are what was asked for"
    found = item_seeds(seeds, len(seeds), 3)
    assert len(set(found)) == 3*len(seeds) and found[::3] == seeds
    assert item_seeds([4, 4], 2, 3) == 2*item_seeds([4], 1, 3)


SYSTEMS = dict(tango=('toy-tango', 'num_waveforms_per_prompt', dict(num_inference_steps=1)), lm=('toy-lm', 'top_k', dict(seconds=.2)))

@pytest.mark.parametrize('system', SYSTEMS)
def test_the_other_systems_name_bad_arguments_too(system):
    from audiorepro.systems import load_system
    name, own, few = SYSTEMS[system]
    other, seconds = load_system(name), 'seconds' if system == 'lm' else 'audio_length_in_s'
    bad = {'guidance_scale': NUMBERS['guidance_scale'], seconds: (0, -1, NAN, INF, 1e9, 10**400, '2', True), 'seed': NUMBERS['seed'],
           own: (-1, 1.5, True, '2'), 'output': ('mp3', None)}
    if system == 'tango': bad |= {k: NUMBERS[k] for k in ('eta', 'guidance_rescale', 'num_inference_steps', 'latents', own)}
    else: bad['prefix'] = (torch.full((1, 8000), NAN), torch.zeros(1, 8000, dtype=torch.int64), torch.zeros(3, 8000), torch.zeros(1, 0), np.zeros((1, 8000)), 'x')
    for argument, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=argument): other('rain falls', **few | {argument: value})
    for value in (None, 3, b'rain', [], [3], ['rain', None], '   '):
        with pytest.raises(ValueError, match='prompt'): other(value, **few)
    for seed in (np.int64(3), -1, 2**64 - 1, torch.tensor(3)): assert other('rain falls', seed=seed, **few).isfinite().all()


def test_the_promises_of_a_seed():
    prompts = ['a dog barks', 'a bell rings while wind blows', 'rain falls']
    batch = say(prompts)
    assert torch.equal(say(prompts), batch)                                      # same machine, build and thread count
    for i, prompt in enumerate(prompts):
        alone = say(prompt, seed=np.int64(i))
        assert (batch[i:i + 1] - alone).abs().max() <= 1e-5*alone.abs().max()
    assert 'thread count' in AudioLDM2.__call__.__doc__


# --- devices, precision, parts ------------------------------------------------------------------------------------------------

def test_devices_are_parsed_in_one_place():
    assert core.as_device('cpu') == torch.device('cpu') and core.as_device(torch.device('cpu')) == torch.device('cpu')
    assert core.as_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')
    for name in ('cuda:99', 'cpu:9', 'mps:9') + ('cuda', 'cuda:0')*(not torch.cuda.is_available()) + ('mps',)*(not torch.backends.mps.is_available()):
        for ask in (core.as_device, lambda d: AudioLDM2.from_pretrained('toy', d), lambda d: core.make_generator(0, d)):
            with pytest.raises(ValueError, match=f'{name}.* is not on this machine'): ask(name)
    for name in ('gpu', 'cuda:', '', None, 1.5):
        with pytest.raises(ValueError, match='device must be'): core.as_device(name)


def test_the_toy_speaks_in_half_precision():
    half = AudioLDM2.from_pretrained('toy', 'auto', torch.bfloat16)
    options = dict(num_inference_steps=5, seed=0, negative_prompt='wind blows')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # too loud
        a, b = half('a dog barks', output='latents', **options).cpu().float(), say('a dog barks', **options)
        wavs = half('a dog barks', num_waveforms_per_prompt=2, **options | dict(num_inference_steps=2))
    assert (a - b).norm() < .1*b.norm() and wavs.dtype == torch.float32 and wavs.shape == (2, 40_960) and wavs.isfinite().all()
    assert 'bfloat16 on' in repr(half)


def test_the_pipeline_says_what_it_is():
    assert pipe().device == torch.device('cpu')
    assert re.fullmatch(r'AudioLDM2\(TextToLatent [\d.]+M, CLAP [\d.]+M, T5 [\d.]+M, VAE [\d.]+M; float32 on cpu; 2.56 s at 16000 Hz\)', repr(pipe()))


def test_features_may_be_in_half_precision():
    from audiorepro import metrics as m
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, 6, generator=rng).bfloat16() for _ in range(2))
    p, q = (x.float().softmax(-1) for x in (a, b))
    for f, args in ((m.frechet_from_features, (a, b)), (m.cosine_score, (a, b)), (m.kl_divergence, (p, q)), (m.inception_score, (p,)),
                    (m.bootstrap_interval, (a[:, 0],)), (m.seed_interval, (a[:, 0],)), (m.frechet_distance, (a[0], torch.eye(6).bfloat16(), b[0], torch.eye(6)))):
        exact = f(*(x.double().numpy() for x in args))
        np.testing.assert_allclose(f(*args), exact, rtol=1e-9)


@pytest.mark.parametrize('text, plain', [
    ('we’ll', "we'll"), ('it‘s', "it's"), ('“so”', '"so"'), ('5–6', '5-6'), ('well—no', 'well-no'), ('Straße', 'strasse'), ('STRAẞE', 'strasse'),
    ('Æsop’s œuvre', "aesop's oeuvre"), ('Łódź', 'lodz'), ('wait…', 'wait...'), ('naïve', 'naive'), ('don\'t', "don't"), ('a\u00a0b', 'a b')])
def test_english_keeps_its_marks(text, plain):
    from audiorepro.speech import clean_english
    assert clean_english(text) == plain


def test_a_missing_part_of_a_published_folder_is_named(tmp_path):
    from audiorepro.public import _PARTS
    for name in _PARTS[:-2]: (tmp_path/name).mkdir()
    (tmp_path/'model_index.json').write_text('{}')
    with pytest.raises(ValueError, match=f'{tmp_path.name} holds no whole system: language_model, projection_model missing'):
        AudioLDM2.from_pretrained(tmp_path)


# --- warnings -----------------------------------------------------------------------------------------------------------------

def test_a_warning_is_one_clean_line_and_can_be_filtered(tmp_path):
    "A sound with bytes behind its end, read in a process of its own: one sentence without a place in the code; filters are heard"
    path = tmp_path/'a.wav'
    soundfile.write(path, np.zeros(16_000, 'float32'), 16_000)
    with open(path, 'ab') as f: f.write(bytes(100_000))
    code = f"""
import sys, warnings
from audiorepro.containers import read_sound
for _ in range(2): read_sound({str(path)!r})
warnings.warn('of somebody else')
"""
    def told(*flags):
        done = subprocess.run([sys.executable, *flags, '-c', code], capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stderr
    ours, theirs = f'warning: {path}: 100000 bytes follow the end that its header gives; they are left out\n', '<string>:5: UserWarning: of somebody else\n'
    status, said = told()
    assert status == 0 and said.startswith(ours + theirs) and said.count('warning: ') == 1
    status, said = told('-W', 'ignore::UserWarning')
    assert (status, said) == (0, '')
    status, said = told('-W', 'error::UserWarning')
    assert status == 1 and f'UserNotice: {path}: 100000 bytes follow' in said and ours not in said


def test_warnings_of_the_package_come_from_one_place():
    called = lambda tree: {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert 'warnings.warn' in called(ast.parse("if odd: warnings.warn('odd')"))
    found = {p.stem for p in (ROOT/'audiorepro').glob('*.py') if {'warnings.warn', 'warn', 'warnings.warn_explicit'} & called(ast.parse(p.read_text()))}
    assert found == {'guard'}


# --- what is imported is declared ----------------------------------------------------------------------------------------------

def third_party():
    "Names of the foreign packages that the modules import, at the top or inside a function"
    found = set()
    for path in (ROOT/'audiorepro').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {n.split('.')[0] for n in names}
    return found - set(sys.stdlib_module_names) - {'audiorepro'}


def test_each_import_is_declared_and_pinned():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    plain = lambda name: re.split(r'[<>=!~]', name)[0].lower().replace('_', '-')
    declared = {plain(r) for k, v in parser['DEFAULT'].items() if k.endswith('requirements') for r in shlex.split(v)}
    pinned = {plain(line) for line in (ROOT/'constraints.txt').read_text().splitlines()} | {'torch'}
    used = {dict(PIL='pillow', sklearn='scikit-learn', yaml='pyyaml').get(n, plain(n)) for n in third_party()}
    assert {'filelock', 'joblib', 'pillow', 'ipython'} <= used <= declared
    assert used - {'phonemizer', 'espeakng-loader', 'laion-clap', 'hear21passt'} <= pinned

"""Own sounds: every layout gives the same clips, faults cost one clip each and are named, memory does not follow the number of rows, features are
made once, a killed training goes on to the same weights, and the command ends in a folder that speaks.

One system is loaded for all tests; trainings have two or three steps of two clips.
"""
import io, json, os, pickle, re, subprocess, sys, tarfile
from collections import Counter
from functools import partial

import numpy as np, pytest, soundfile, torch

from audiorepro import cli, inventory, own_data
from audiorepro.audioldm2 import AudioLDM2
from audiorepro.inventory import Place, Shelf, find_source, take_inventory
from audiorepro.own_data import cache_features, finetune, inspect_data, load_system, own_batches, shuffle_captions, split_clips
from audiorepro.text import Tokenizer

RATE = 16_000
SAID = {'a.wav': ('a dog barks', 'a bark'), 'b.wav': ('rain falls',), 'c.wav': ('a bell rings',)}


def tone(i, seconds=1., rate=RATE):
    t = np.arange(int(seconds*rate))/rate
    return .3*np.sin(2*np.pi*(200 + 50*i)*t)


def sound_bytes(i, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(i, **options), options.get('rate', RATE), format='WAV')
    return buffer.getvalue()


def put(folder, name, i, text=None, **options):
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_bytes(sound_bytes(i, **options))
    if text: (folder/name).with_suffix('.txt').write_text(text)


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def heard(report):
    "(sound, captions) of each usable clip, whatever its name is in that layout"
    found = []
    for place in report.places():
        with place.path() as path: found.append((open(path, 'rb').read(), tuple(sorted(place.captions))))
    return sorted(found)


# --- layouts --------------------------------------------------------------------------------------------------------

def sounds_in(folder):
    for i, name in enumerate(SAID): put(folder, name, i)
    return folder


def as_folder(folder):
    for name, texts in SAID.items(): (sounds_in(folder)/name).with_suffix('.txt').write_text('\n'.join(texts))
    return folder


def as_csv(folder):
    rows = [f'{name},"{t}"' for name, texts in SAID.items() for t in texts]
    (sounds_in(folder)/'any.csv').write_text('file_name,text\n' + '\n'.join(rows))
    return folder                                   # the only table in the folder


def as_tsv(folder):
    (sounds_in(folder)/'t.tsv').write_text('path\tcaption\n' + ''.join(f'{n}\t{t}\n' for n, texts in SAID.items() for t in texts))
    return folder/'t.tsv'


def as_json(folder):
    (sounds_in(folder)/'t.json').write_text(json.dumps([dict(location=n, captions=t) for n, t in SAID.items()], indent=1))
    return folder/'t.json'


def as_lines(folder):
    (sounds_in(folder)/'t.jsonl').write_text(''.join(json.dumps(dict(audio=n, caption=list(t))) + '\n' for n, t in SAID.items()))
    return folder/'t.jsonl'


def as_numbered(folder):
    rows = [','.join([n, *t, ''][:3]) for n, t in SAID.items()]
    (sounds_in(folder)/'clotho.csv').write_text('file_name,caption_1,caption_2\n' + '\n'.join(rows))
    return folder/'clotho.csv'


def as_tars(folder):
    members = [(m, content) for i, (n, t) in enumerate(SAID.items()) for m, content in
               ((n, sound_bytes(i)), (n[0] + ('.json' if i else '.txt'), json.dumps(dict(caption=t)).encode() if i else '\n'.join(t).encode()))]
    write_tar(folder/'s0.tar', members[:4]); write_tar(folder/'s1.tar', members[4:])
    return folder


def as_arrow(folder, kind='binary'):
    pa = pytest.importorskip('pyarrow', reason='pyarrow is optional; its absence has a test of its own')
    struct = pa.struct([('bytes', getattr(pa, kind)()), ('path', pa.string())])
    audio = pa.array([dict(bytes=sound_bytes(i), path=n) for i, n in enumerate(SAID)], struct)
    table = pa.table(dict(audio=audio, text=pa.array([list(t) for t in SAID.values()])))
    (folder/'train').mkdir()
    (folder/'dataset_dict.json').write_text(json.dumps(dict(splits=['test', 'train'])))
    for k, part in enumerate((table.slice(0, 2), table.slice(2))):
        with pa.OSFile(str(folder/'train'/f'data-0000{k}-of-00002.arrow'), 'wb') as f, pa.ipc.new_stream(f, table.schema) as w:
            w.write_table(part, max_chunksize=1 + k)
    (folder/'train'/'state.json').write_text(json.dumps(dict(_data_files=[dict(filename=f'data-0000{k}-of-00002.arrow') for k in (0, 1)])))
    return folder


LAYOUTS = (as_folder, as_csv, as_tsv, as_json, as_lines, as_numbered, as_tars, as_arrow)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_clips(layout, tmp_path):
    report = take_inventory(layout(tmp_path))
    assert heard(report) == sorted((sound_bytes(i), tuple(sorted(t))) for i, t in enumerate(SAID.values()))
    assert (report.rows, report.clips, report.captions) == (3, 3, Counter({1: 2, 2: 1})) and not report.skipped


@pytest.mark.parametrize('layout', [as_folder, as_csv, as_tars], ids=lambda f: f.__name__)
def test_what_a_mac_leaves_beside_each_file_is_passed_over(layout, tmp_path):
    "`._a.wav` beside `a.wav`, in folders and, in front of each member, in tars"
    noise = b'\0\5\x16\7' + bytes(60)
    layout(tmp_path)
    if layout is as_tars:
        members = [(m, c) for n, i in zip(SAID, range(3)) for m, c in ((n, sound_bytes(i)), (n[0] + '.txt', '\n'.join(SAID[n]).encode()))]
        (tmp_path/'s1.tar').unlink()
        write_tar(tmp_path/'s0.tar', [pair for m, c in members for pair in (('._' + m, noise), (m, c))])
        write_tar(tmp_path/'._s0.tar', [])
    else:
        for file in [*tmp_path.iterdir()]: (tmp_path/f'._{file.name}').write_bytes(noise)
    report = take_inventory(tmp_path)
    assert heard(report) == sorted((sound_bytes(i), tuple(sorted(t))) for i, t in enumerate(SAID.values()))
    assert (report.rows, report.clips) == (3, 3) and not report.skipped


def test_wide_offsets_of_arrow(tmp_path): assert len(heard(take_inventory(as_arrow(tmp_path, 'large_binary')))) == 3


def test_arrow_without_its_library_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path/'state.json').write_text('{"_data_files": []}')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ImportError, match='pyarrow is not installed'): take_inventory(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    "A member that would act when unpickled is passed over"
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'exploded'),)
    write_tar(tmp_path/'s.tar', [('x.pyd', pickle.dumps(Bomb())), ('x.pickle', pickle.dumps(Bomb())), ('x.wav', sound_bytes(0)), ('x.txt', b'a dog')])
    assert take_inventory(tmp_path/'s.tar').clips == 1 and not (tmp_path/'exploded').exists()
    assert not re.search(r'import[^\n]*pickle', open(inventory.__file__).read() + open(own_data.__file__).read())


@pytest.mark.parametrize('cut, clips', [(.3, 0), (.75, 1)])
def test_a_broken_shard_is_named_and_keeps_what_is_whole(tmp_path, cut, clips):
    write_tar(tmp_path/'s.tar', [(f'{k}.{e}', c) for k in 'ab' for e, c in (('txt', b'a dog'), ('wav', sound_bytes(0)))])
    raw = (tmp_path/'s.tar').read_bytes()
    size = 2*(512*3 + len(sound_bytes(0)))
    (tmp_path/'s.tar').write_bytes(raw[:int(cut*size)])
    report = take_inventory(tmp_path)
    assert report.clips == clips and report.skipped['damaged tar'] == 1


@pytest.mark.parametrize('path, words', [('none', 'does not exist'), ('empty', 'holds no sound'), ('notes.doc', 'must be a folder')])
def test_what_is_no_data_is_refused(tmp_path, path, words):
    (tmp_path/'empty').mkdir(); (tmp_path/'notes.doc').write_text('x')
    with pytest.raises(ValueError, match=words): find_source(tmp_path/path)


def test_columns_are_named_in_the_error(tmp_path):
    (tmp_path/'t.csv').write_text('sound,words\nx.wav,a dog\n'); put(tmp_path, 'x.wav', 0)
    with pytest.raises(ValueError, match='no column audio.*sound, words'): take_inventory(tmp_path/'t.csv')
    assert take_inventory(tmp_path/'t.csv', audio_column='sound', caption_columns=('words',)).clips == 1
    with pytest.raises(ValueError, match='no columns'): take_inventory(as_folder(tmp_path/'f'), audio_column='x')


# --- faults ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def forty(tmp_path_factory):
    "Forty sounds: 3 is cut off, 4 has no caption, 5 is at 44.1 kHz, 6 is silent, 7 is long, 8 has a word nobody knows"
    folder = tmp_path_factory.mktemp('forty')
    for i in range(40): put(folder, f'c{i:02}.wav', i, None if i == 4 else f'a dog barks {"quickly" if i % 2 else "slowly"}', seconds=5. if i == 7 else 1.,
                            rate=44_100 if i == 5 else RATE)
    raw = (folder/'c03.wav').read_bytes()
    (folder/'c03.wav').write_bytes(raw[:len(raw)//2])
    soundfile.write(folder/'c06.wav', np.zeros(RATE), RATE)
    (folder/'c08.txt').write_text('a walrus barks')
    return folder


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "Where caches go"
    folder, before = tmp_path_factory.mktemp('out'), os.environ.get('AUDIOREPRO_OUT')
    os.environ['AUDIOREPRO_OUT'] = str(folder)
    yield folder
    os.environ.pop('AUDIOREPRO_OUT') if before is None else os.environ.update(AUDIOREPRO_OUT=before)


@pytest.fixture(scope='module')
def system(out): return load_system('toy')


@pytest.fixture(scope='module')
def features(forty, system): return cache_features(inspect_data(forty, system), system)


def test_faults_among_forty_cost_one_clip_each(forty, system, features):
    report = inspect_data(forty, system)
    assert (report.rows, report.clips) == (40, 38) and report.rates == {RATE: 37, 44_100: 1}
    assert report.skipped == {'damaged or no sound': 1, 'no caption': 1}
    assert report.examples['damaged or no sound'][0][0] == 'c03.wav' and 'promises' in report.examples['damaged or no sound'][0][1]
    assert report.examples['no caption'] == [('c04.wav', '')]
    assert (report.cut, report.padded, round(report.unused_seconds, 2)) == (1, 37, 2.44) and report.unknown == {'walrus': 1}
    assert len(features) == 37 and features.left_out == [['c06.wav', 'is silent']]     # only decoding tells silence
    for words in ('40 sounds named, 38 usable, 2 left out', '1 x 44100 Hz', 'walrus 1 x', 'c03.wav', '1 are cut'): assert words in str(report)


def test_a_wrong_rate_is_resampled(forty, system, features):
    "Clip 5 was recorded at 44.1 kHz: its latents are those of the same tone at 16 kHz, within what a resampler may change"
    put(forty.parent/'same', 'c.wav', 5, 'a dog barks')
    other = cache_features(inspect_data(forty.parent/'same', system), system)
    mine, same = features.batch([features.names.index('c05.wav')], np.random.default_rng(0)), other.batch([0], np.random.default_rng(0))
    far = features.batch([features.names.index('c30.wav')], np.random.default_rng(0))
    assert (mine['loa'] - same['loa']).norm() < .2*(mine['loa'] - far['loa']).norm()


def test_words_that_merge_are_counted(tmp_path):
    for i, text in enumerate(('a dog zzz', 'a dog yyy', 'a dog barks')): put(tmp_path, f'{i}.wav', i, text)
    report = take_inventory(tmp_path, tokenizer=Tokenizer.toy())
    assert (report.wordings, report.heard) == (3, 2) and '3 wordings become 2' in str(report)


def test_a_bad_row_costs_one_clip(tmp_path):
    rows = [b'file,text', b'a.wav,a dog', b'a.wav,"open', b'b.wav,caf\xe9', b'b.wav,one,two', b'c.wav,a bell', b'lost.wav,a bird', b',nobody']
    (sounds_in(tmp_path)/'t.csv').write_bytes(b'\n'.join(rows))
    report = take_inventory(tmp_path/'t.csv')
    assert [p.name for p in report.places()] == ['a.wav', 'c.wav'] and report.skipped == {'bad row': 4, 'no such file': 1}
    assert [item for item, _ in report.examples['bad row']] == ['t.csv, line 3', 't.csv, line 4', 't.csv, line 5']


@pytest.mark.parametrize('size', [1, 2, 3, 1000])
def test_a_table_read_in_pieces_is_the_whole_table(tmp_path, size):
    "Line breaks in quotes at every place, blank lines, a byte order mark"
    (tmp_path/'t.csv').write_text('\n\ufefffile,text\n' + ''.join(f'{i}.wav,"one,\n{i}\n\n"\n\n' for i in range(7)), encoding='utf-8')
    rows = list(inventory._table_rows(tmp_path/'t.csv', size))
    assert [r for _, r in rows] == [dict(file=f'{i}.wav', text=f'one,\n{i}\n\n') for i in range(7)]
    assert [w for w, _ in rows] == [f'line {3 + 5*i}' for i in range(7)]


# --- size -----------------------------------------------------------------------------------------------------------

PEAK = '''
import os, resource, sys
from audiorepro.inventory import take_inventory
real = os.path.isfile
os.path.isfile = lambda path: str(path).endswith('.wav') or real(path)
for n in (2_000, 100_000):
    table = f'{sys.argv[1]}/{n}.jsonl'
    with open(table, 'w') as f:
        for i in range(n): f.write(f'{{"audio": "clip{i*7919 % n:06}.wav", "caption": "a dog barks {i % 97} times"}}\\n')
    report = take_inventory(table, measure=lambda path: (40_960, 16_000))
    assert (report.clips, report.rows, report.wordings) == (n, n, 97)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3)
'''


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    "Megabytes of a process at its worst moment, after 2,000 and after 100,000 made rows; the files themselves are not there"
    done = subprocess.run([sys.executable, '-c', PEAK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert large - small < 10, (small, large)


def test_a_thousand_reasons_are_counted_and_three_kept():
    report = inventory.Inventory('x', 'folder', RATE, 1.)
    for i in range(1000): report.skip(f'{i}.wav', 'no caption', str(i))
    assert report.skipped['no caption'] == 1000 and len(report.examples['no caption']) == 3


def test_the_shelf_may_change_while_it_is_read():
    shelf = Shelf()
    for i in range(7): shelf.add(Place(f'{i}', 'x'))
    for place in shelf.places(usable=False, size=2): shelf.measured(place.name, 1.)
    assert [p.name for p in shelf.places(size=3)] == list('0123456')


# --- features -------------------------------------------------------------------------------------------------------

def parts_on_disk(out): return {p.name: p.stat().st_mtime_ns for p in (out/'cache'/'own').glob('*.safetensors')}


def test_features_are_made_once_and_anew_when_anything_changes(out, system, tmp_path, monkeypatch):
    as_folder(tmp_path)
    def key(start=system): return cache_features(inspect_data(tmp_path, start), start).key
    first, made = key(), parts_on_disk(out)
    monkeypatch.setattr(own_data, '_make_part', lambda *args: pytest.fail('made twice'))
    assert key() == first and parts_on_disk(out) == made
    monkeypatch.undo()
    os.environ['AUDIOREPRO_OUT'] = str(out)
    (tmp_path/'b.txt').write_text('rain pours')
    assert (words := key()) != first
    put(tmp_path, 'b.wav', 9)
    assert key() not in (first, words)
    other = load_system('toy')
    other.pipe.vae.scale_factor.mul_(1.01)
    assert key(other) not in (first, words)


def test_features_are_those_of_the_frozen_parts(system, features, forty):
    from audiorepro.audio import fit_length, load_audio
    from audiorepro.mel import FbankConfig, audiomae_input
    i = features.names.index('c20.wav')
    wav = fit_length(load_audio(forty/'c20.wav')[0], 40_960)
    batch = features.batch([i], np.random.default_rng(0))
    with torch.no_grad():
        loa, clap = system.audiomae.loa(audiomae_input(wav, FbankConfig.toy()), 4), system.pipe.clap.encode_text(['a dog barks slowly'])
        t5, mask = system.pipe.t5.encode(['a dog barks slowly'])
    for ours, theirs in ((batch['loa'], loa), (batch['clap'][:, 0], clap), (batch['t5'][:, :t5.shape[1]], t5)):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert torch.equal(batch['t5_mask'][:, :mask.shape[1]], mask) and not batch['t5_mask'][:, mask.shape[1]:].any()


def test_each_caption_of_a_clip_is_drawn(system, tmp_path):
    found = cache_features(inspect_data(as_folder(tmp_path), system), system)
    seen = {b['t5_mask'][i].sum().item() for _, b in zip(range(12), own_batches(found, 3)()) for i in range(3)}
    lengths = {len(system.pipe.t5.tokenizer.ids(t)) for texts in SAID.values() for t in texts}
    assert seen == lengths


def test_parts_of_a_corpus_join(system, features, forty, monkeypatch):
    "Small files of features, also one without a usable clip, give the same batches as one file"
    monkeypatch.setattr(own_data, '_PART', 1)
    report = take_inventory(forty, tokenizer=system.pipe.t5.tokenizer)
    real = report.places
    monkeypatch.setattr(type(report), 'places', lambda self: (p for p in real() if p.name in ('c05.wav', 'c06.wav', 'c09.wav')))
    few = cache_features(report, system)
    assert few.names == ['c05.wav', 'c09.wav'] and len(few.parts) == 3 and few.left_out == [['c06.wav', 'is silent']]
    a, b = few.batch([1], np.random.default_rng(0)), features.batch([features.names.index('c09.wav')], np.random.default_rng(0))
    torch.testing.assert_close(a['loa'], b['loa'], atol=2e-3, rtol=2e-3)


def test_split_and_shuffle(features):
    train, held = split_clips(features, 5, seed=3)
    assert sorted([*train.clips, *held.clips]) == sorted(features.clips) and len(held) == 5
    swapped = shuffle_captions(train, 1)
    assert sorted(swapped.words_of[train.clips]) == sorted(train.clips) and (swapped.words_of[train.clips] != train.clips).all()
    assert (swapped.words_of[held.clips] == held.clips).all() and swapped.key != train.key
    a, b = (f.batch([int(train.clips[0])], np.random.default_rng(0)) for f in (train, swapped))
    assert torch.equal(a['z_0'], b['z_0'])


# --- training -------------------------------------------------------------------------------------------------------

QUICK = dict(batch_size=2, pictures=0, progress=False, held=2)


def test_a_killed_training_goes_on_to_the_same_weights(features, tmp_path):
    whole = finetune(features, tmp_path/'whole', steps=3, **QUICK)
    real, calls = own_data.joint_loss, []
    def dies(model, *args, **kwargs):
        calls.append(model.training)
        if sum(calls) > 2: raise KeyboardInterrupt
        return real(model, *args, **kwargs)
    own_data.joint_loss = dies
    try:
        with pytest.raises(KeyboardInterrupt): finetune(features, tmp_path/'cut', steps=3, **QUICK)
    finally: own_data.joint_loss = real
    assert list((tmp_path/'cut'/'training').glob('step-*')) and not (tmp_path/'cut'/'audioldm2').exists()
    again = finetune(features, tmp_path/'cut', steps=3, **QUICK)
    for (k, a), b in zip(whole.halves.state_dict().items(), again.halves.state_dict().values()): assert torch.equal(a, b), k
    with pytest.raises(ValueError, match='steps was 3 and is 4.*fresh'): finetune(features, tmp_path/'cut', steps=4, **QUICK)
    back = AudioLDM2.from_pretrained(tmp_path/'cut')
    assert back('a dog barks', seed=0, num_inference_steps=1).shape == (1, 40_960) and load_system(tmp_path/'cut').name


def test_only_the_two_halves_learn(features, tmp_path):
    before, system = load_system('toy'), load_system('toy')
    finetune(features, tmp_path/'x', system, steps=2, **QUICK)
    for old, new in zip(before.pipe.parts()[1:], system.pipe.parts()[1:]):
        assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))
    for half in ('loa', 'unet'):
        old, new = (getattr(s.pipe.halves, half).state_dict().values() for s in (before, system))
        assert any(not torch.equal(a, b) for a, b in zip(old, new)), half


def test_minutes_become_steps_once(features, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, 'steps_in', lambda minutes, recipe: 2)
    finetune(features, tmp_path/'x', minutes=.5, **QUICK)
    monkeypatch.setattr(own_data, 'steps_in', lambda minutes, recipe: pytest.fail('timed twice'))
    plan = json.loads((tmp_path/'x'/'plan.json').read_text())
    assert plan['steps'] == 2 and plan['asked']['minutes'] == .5 and set(plan['before']) == {'held_simple', 'held_loa'}
    (tmp_path/'x'/'plan.json').write_text(json.dumps({k: v for k, v in plan.items() if k != 'after'}))   # as if killed at the end
    finetune(features, tmp_path/'x', minutes=.5, **QUICK)


def test_fresh_spares_what_it_did_not_make(features, tmp_path):
    (tmp_path/'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='not made by this training'): finetune(features, tmp_path, fresh=True, steps=1, **QUICK)
    assert (tmp_path/'thesis.txt').exists()


@pytest.mark.parametrize('options, words', [(dict(steps=0), 'steps'), (dict(minutes=0), 'minutes'), (dict(budget='tiny'), 'budget'), (dict(held=36), 'held')])
def test_nonsense_is_refused_before_the_work(features, tmp_path, options, words):
    with pytest.raises(ValueError, match=words): finetune(features, tmp_path/'x', **QUICK | options)
    assert not (tmp_path/'x').exists()


# --- the command ----------------------------------------------------------------------------------------------------

def test_dry_run_trains_nothing(forty, out, capsys):
    assert cli.main(['train', '--data', str(forty), '--dry-run', '--out', str(out/'dry')]) == 0
    assert '38 usable' in capsys.readouterr().out and not (out/'dry').exists()


def test_the_command_makes_a_folder_that_speaks(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_data, 'draw_progress', partial(own_data.draw_progress, num_inference_steps=2))
    as_csv(tmp_path)
    (tmp_path/'any.csv').rename(tmp_path/'t.csv')
    text = (tmp_path/'t.csv').read_text().replace('file_name,text', 'sound,words')
    (tmp_path/'t.csv').write_text(text)
    command = ['train', '--data', str(tmp_path/'t.csv'), '--columns', 'sound,words', '--from', 'toy', '--steps', '2', '--out', str(out/'mine')]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert 'done before' in capsys.readouterr().out
    names = {p.name for p in (out/'mine'/'progress').iterdir()}
    assert {'step-000000.png', 'step-000000.wav', 'step-000002.png'} <= names and '3 usable' in (out/'mine'/'report.txt').read_text()
    assert cli.main(['say', 'a dog barks', '--model', str(out/'mine'), '--steps', '1', '--out', str(out/'say.wav')]) == 0
    assert soundfile.info(out/'say.wav').frames == 40_960


@pytest.mark.parametrize('args, words', [(['--steps', '3'], 'steps: only with data'), (['--dry-run'], 'dry_run'), (['--from', 'mine'], 'from'),
                                         (['--data', 'x', '--ship'], 'only and ship'), (['--data', '/none'], 'does not exist'),
                                         (['--data', '.', '--columns', 'file'], 'columns')])
def test_mixed_orders_are_refused(args, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(as_folder(tmp_path))
    monkeypatch.setattr(own_data, 'load_system', lambda *args: pytest.fail('the weights were read before the refusal'))
    assert cli.main(['train', *args]) == 2
    assert words in capsys.readouterr().err


def test_scratch_begins_anew_and_published_systems_are_refused(system, monkeypatch):
    a, b, c = load_system('scratch', 1), load_system('scratch', 1), load_system('scratch', 2)
    weights = [s.pipe.halves.unet.conv_in.weight for s in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    monkeypatch.setattr(own_data, 'find_pipeline', lambda name: 'somewhere')
    with pytest.raises(ValueError, match='an adapter can be trained on it'): load_system('cvssp/audioldm2')

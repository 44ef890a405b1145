"""Captions: sampling against transformers, reading against the truth, odd texts, ranking against a loop, and a stream that is killed.

The stream is run in forked processes that die by SIGKILL at moments chosen here: inside a chunk, between the counts and the table of a
finished shard, before the chunks are swept away.
"""
import io, json, os, signal, tarfile, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F

from audiorepro import caption_stream, captions, core
from audiorepro.audio import save_audio
from audiorepro.caption_reader import MISTAKES, SPOILS, auc, mistakes, read_caption, spoil_caption
from audiorepro.captions import (Captioner, CaptionerConfig, ToyCaptioner, above, caption_loss, check_clap, clean_captions, count_table,
                                 diversity, drop_tests, filter_logits, rank_captions, rank_clips, toy_recipe, video_id)
from audiorepro.caption_stream import FolderClips, TarClips, add_up, read_shard, stream_shards, write_shard
from audiorepro.core import make_generator
from audiorepro.pretext import list_events
from audiorepro.sounds import caption, make_records, named


# --- the captioner ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('k, p, heat', [(50, .95, 1.), (1, 1., 1.), (7, .3, .5), (1000, .95, 2.), (50, 1., 1.)])
def test_sampling_is_that_of_transformers(k, p, heat):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 4*torch.randn(200, 173, generator=make_generator(k))
    theirs = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(heat)(None, logits)))
    assert torch.equal(filter_logits(logits, k, p, heat), theirs)


@pytest.mark.parametrize('name, value', [('top_k', 0), ('top_k', 1.5), ('top_p', 0.), ('top_p', 1.1), ('temperature', 0.), ('temperature', float('nan'))])
def test_sampling_refuses(name, value):
    with pytest.raises(ValueError, match=name): filter_logits(torch.zeros(3), **{name: value})


@pytest.fixture(scope='module')
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyCaptioner(replace(CaptionerConfig.toy(), dim=32, heads=2)).eval()


def test_two_clips_change_what_is_said(tiny):
    "The clip decides: other keys give other logits, the clip's own keys the same ones whatever stands beside it"
    heard, ids = torch.randn(3, 32, 192, generator=make_generator(0)), torch.randint(3, 90, (3, 6), generator=make_generator(1))
    together = tiny(ids[:1].expand(3, -1), tiny.keys(heard))[0]
    assert (together[0] - together[1]).abs().max() > 1e-3
    for i in range(3): torch.testing.assert_close(tiny(ids[:1], tiny.keys(heard[i:i + 1]))[0][0], together[i], atol=1e-5, rtol=0)


def test_cached_drawing_is_that_of_whole_texts(tiny):
    "Greedy words with the cache = the likeliest next word of the whole text so far"
    heard = torch.randn(2, 32, 192, generator=make_generator(3))
    texts = tiny.describe(heard, 1, top_k=1)
    banned = [i for i in range(tiny.tokenizer.sentinel + tiny.tokenizer.num_sentinels) if i != tiny.tokenizer.eos]
    for row, (text,) in zip(heard, texts):
        ids = [0]
        while len(ids) <= tiny.cfg.max_words:
            logits = tiny(torch.tensor([ids]), tiny.keys(row[None]))[0][0, -1].detach()
            logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == tiny.tokenizer.eos: break
        assert tiny.tokenizer.decode(ids[1:]) == text


def test_a_captioner_learns_saves_and_draws_again(tiny, tmp_path):
    torch.manual_seed(0)
    model = ToyCaptioner(tiny.cfg).train()
    batch = dict(heard=torch.randn(4, 32, 192, generator=make_generator(0)), caption=['a dog barks', 'rain falls', 'a bell rings', 'wind blows'])
    optimizer, first = torch.optim.AdamW(model.parameters(), 5e-3), None
    for _ in range(60):
        loss = caption_loss(model, batch)['loss']
        first = first or loss.item()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    model.eval()
    assert loss.item() < first/4 and [t for t, in model.describe(batch['heard'], 1, top_k=1)] == batch['caption']
    model.save_pretrained(tmp_path/'c')
    again = ToyCaptioner.from_pretrained(tmp_path/'c')
    assert again.describe(batch['heard'], 5, generator=make_generator(1)) == model.describe(batch['heard'], 5, generator=make_generator(1))
    assert not any('ear' in k.split('.')[0].split('_') for k in model.state_dict()) and isinstance(again, Captioner)


# --- reading ----------------------------------------------------------------------------------------------------------

METAS = [r.meta for r in make_records(120, 'all', seed=5)]


def test_true_captions_are_read_as_true():
    said = [(caption(m, np.random.default_rng([i, s])), m) for i, m in enumerate(METAS) for s in range(6)] + [(list_events(m), m) for m in METAS]
    assert [(t, mistakes(t, m)) for t, m in said if mistakes(t, m)] == []


def test_each_spoilt_caption_has_its_mistake():
    wanted = dict(zip(SPOILS, ({'class'}, {'attribute'}, set(), {'order'})))
    for how in SPOILS:
        pairs = [(m, p) for i, m in enumerate(METAS) if (p := spoil_caption(m, how, i))]
        assert len(pairs) > 20
        for m, (right, wrong) in pairs: assert mistakes(right, m) == set() and mistakes(wrong, m) == wanted[how] and right != wrong


def test_another_clips_caption_is_wrong():
    "The reader is no yes-man: of captions of other clips, few say nothing wrong"
    found = [mistakes(caption(METAS[i - 1], np.random.default_rng(i)), m) for i, m in enumerate(METAS)]
    assert np.mean([not f for f in found]) < .05 and set().union(*found) <= set(MISTAKES)


@pytest.mark.parametrize('text', ['', ',', 'the', 'then then then', 'after', 'before , after', '🐕', 'x'*5000, 'while as and'])
def test_nonsense_is_unreadable(text): assert mistakes(text, METAS[0]) == {'unreadable'} and read_caption(text) is None


def test_auc_is_that_of_scikit():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (5, 50), (80, 40)):
        a, b = rng.integers(0, 6, n), rng.integers(1, 8, m)
        assert abs(auc(a, b) - roc_auc_score([1]*n + [0]*m, np.r_[a, b])) < 1e-12


# --- texts as they come -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, reason', [
    ('', 'no word'), (' \n\t', 'no word'), ('🐕🔊', 'no word'), ('...', 'no word'), ('x'*100_000, 'too long'), ('a \u202edog', 'turned direction'),
    ('a \u2067dog', 'turned direction'), ('a\0dog', 'control character'), ('\x1b[31mdog', 'control character'), ('\ud800 dog', 'broken Unicode'),
    (None, 'not a text'), (b'dog', 'not a text'), (float('nan'), 'not a text'), (['a dog'], 'not a text')])
def test_odd_texts_have_a_reason(text, reason): assert clean_captions([text]) == ([], [(text, reason)])


@pytest.mark.parametrize('text, kept', [
    ('a dog\nbarks\t twice ', 'a dog barks twice'), ('"a dog", he says; it\'s 3', '"a dog", he says; it\'s 3'), ('cafe\u0301', 'café'), ('狗叫', '狗叫'),
    ('x'*2000, 'x'*2000), ('a 🐕 barks', 'a 🐕 barks'), ('كلب', 'كلب'), ('NULL', 'NULL')])
def test_fair_texts_are_kept(text, kept): assert clean_captions([text]) == ([kept], [])


def test_nothing_is_lost_and_repetitions_are_one():
    texts = ['A dog', 'a  dog', 'a\ndog', 'cafe\u0301', 'caf\u00e9', 'CAFÉ', '', 'rain', None]
    kept, dropped = clean_captions(texts)
    assert kept == ['A dog', 'café', 'rain'] and Counter(r for _, r in dropped) == {'repeated': 4, 'no word': 1, 'not a text': 1}
    assert len(kept) + len(dropped) == len(texts)


# --- ranking ----------------------------------------------------------------------------------------------------------

def test_ranking_is_that_of_a_loop():
    rng = make_generator(0)
    audio, text, real = torch.randn(40, 8, generator=rng), torch.randn(40, 20, 8, generator=rng), torch.rand(40, 20, generator=rng) < .3
    text[:, 7], real[0] = text[:, 3], False                                                # ties, and a clip without any
    index, score = rank_captions(audio, text, real)
    for a, t, r, found, s in zip(audio, text, real, index.tolist(), score.tolist()):
        cos = [F.cosine_similarity(a, x, dim=0).item() for x in t]
        best = sorted([k for k in range(20) if r[k]], key=lambda k: (-round(cos[k], 5), k))[:3]
        assert found == best + [-1]*(3 - len(best)) and np.allclose(s[:len(best)], [cos[k] for k in best], atol=1e-6)
    scaled, _ = rank_captions(audio*7, text*torch.rand(40, 20, 1, generator=rng).add(.1), real)
    assert torch.equal(scaled, index)                                                      # being long is no merit


class Words:
    "A CLAP for tests: each text its own fixed direction, sounds by their samples; says how often it was asked"
    dim, sample_rate, max_seconds = 16, 16_000, 2.56
    def __init__(self, die_at=0): self.texts, self.clips, self.die_at = 0, 0, die_at
    def embed_text(self, texts):
        self.texts += len(texts)
        return F.normalize(torch.stack([torch.randn(16, generator=make_generator(sum((i + 1)*ord(c) for i, c in enumerate(t)))) for t in texts]), dim=-1)
    def embed_audio(self, wav, sample_rate):
        self.clips += len(wav); self.die_at -= 1
        if self.die_at == 0: os.kill(os.getpid(), signal.SIGKILL)
        return F.normalize(torch.stack([w[:8_000].reshape(16, -1).std(1) for w in wav]), dim=-1)


def test_counts_add_up_and_texts_are_embedded_once():
    wav, clap = torch.randn(3, 9_000, generator=make_generator(0)), Words()
    said = [['a dog', 'A DOG', 'rain', '', 'wind', 'bell'], ['a dog', 'rain'], ['a dog', '\0', None]]
    rows, counts = rank_clips(['x', 'y', 'z'], [wav[0], wav[1, :5_008], None], said, clap)
    assert counts == {'clips': 3, 'captions': 11, 'kept': 5, 'ranked_lower': 1, 'repeated': 1, 'no word': 1, 'no sound': 3}
    assert clap.texts == 4 and [(r['id'], r['rank']) for r in rows] == [('x', 1), ('x', 2), ('x', 3), ('y', 1), ('y', 2)]
    assert rank_clips(['x'], [None], [['a']], clap) == ([], Counter(clips=1, captions=1, **{'no sound': 1}))
    alone, _ = rank_clips(['y'], wav[1:2, :5_008], said[1:2], Words())
    assert [(r['caption'], round(r['score'], 5)) for r in alone] == [(r['caption'], round(r['score'], 5)) for r in rows[3:]]


def test_table_is_nested_and_falls():
    rows = [dict(id=f'{i//3}', caption='', score=s, rank=1) for i, s in enumerate(np.random.default_rng(0).uniform(0, 1, 300))]
    taus = tuple(np.linspace(0, 1, 21))
    table = count_table(rows, taus)
    for (a, b), (s, t) in zip(zip(table, table[1:]), zip(taus, taus[1:])):
        assert a['captions'] >= b['captions'] and a['clips'] >= b['clips'] and b['per_clip'] <= 3
        assert {id(r) for r in above(rows, t)} <= {id(r) for r in above(rows, s)}
    assert table[0] == dict(tau=0., captions=300, clips=100, per_clip=3.) and count_table([], (.5,))[0]['per_clip'] == 0
    with pytest.raises(ValueError, match='tau'): above(rows, float('nan'))


def test_collapsed_claps_are_refused():
    class Bad(Words):
        def __init__(self, text): self.text = text
        def embed_text(self, texts): return self.text(len(texts))
    for text in (lambda n: torch.ones(n, 4), lambda n: torch.ones(n, 4) + .01*torch.randn(n, 4), lambda n: torch.full((n, 4), torch.nan)):
        with pytest.raises(ValueError, match='at most 0.9, got'): check_clap(Bad(text))
    good = Words()
    assert check_clap(good) is good


def test_both_toy_claps_pass_and_the_filter_sees_classes_not_order():
    from audiorepro.clap import CLAP
    metas = [m for m in METAS if m['kind'] == 'then']
    from audiorepro.sounds import render
    wavs = torch.stack([render(m) for m in metas])
    for name in ('toy', 'toy/clap_score'):
        clap = check_clap(CLAP.from_pretrained(name))
        a, found = clap.embed_audio(wavs, 16_000), {}
        for how in ('class', 'order'):
            right, wrong = zip(*(spoil_caption(m, how, i) for i, m in enumerate(metas)))
            scores = [(a*clap.embed_text(list(t))).sum(-1) for t in (right, wrong)]
            found[how] = auc(*scores)
        assert found['class'] > .75 > .65 > found['order'], (name, found)


def test_test_ids_are_found_in_every_spelling():
    rows = [dict(id=i) for i in ('aaaaaaaaaaa', 'Yaaaaaaaaaaa_30.0', 'bbbbbbbbbbb_0_10.wav', 'Y----------_', 'ccccccccccc')]
    left, out = drop_tests(rows, ['Yaaaaaaaaaaa.flac', 'bbbbbbbbbbb_12', '----------_'])
    assert [r['id'] for r in left] == ['ccccccccccc'] and out == ['----------_', 'aaaaaaaaaaa', 'bbbbbbbbbbb']
    assert video_id('Yabcdefghij') == 'Yabcdefghij' and video_id('not an id') == 'not an id'


def test_diversity_by_hand():
    found = diversity([['a b c', 'a b c', 'a b d', 'x']])
    assert found == dict(distinct=.75, pairs=.5, captions=4)                                # ab bc ab bc ab bd: 3 of 6


# --- the stream -------------------------------------------------------------------------------------------------------

SIZE, CLIPS, SHARDS = 3, 8, 3                                                              # 3 + 3 + 2 clips: 9 chunks in all


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    root, shards = tmp_path_factory.mktemp('corpus'), []
    for s in range(SHARDS):
        records, name = make_records(CLIPS, 'all', seed=s), root/f'train-{s:05}-of-{SHARDS:05}'
        texts = [dict(id=f'{s}_{i}', captions=[r.captions[0], records[i - 1].captions[0], '', r.captions[0].upper(), 'a 🐕', 'x'*3000])
                 for i, r in enumerate(records)]
        write_shard(f'{name}.parquet', [texts[:5], texts[5:]], dict(id='string', captions='strings'))
        if s < 2:
            with tarfile.open(f'{name}.tar', 'w') as tar:
                for i, r in enumerate(records):
                    save_audio(root/'one.flac', r.wav, 16_000)
                    info = tarfile.TarInfo(f'{s}_{i}.flac'); data = (root/'one.flac').read_bytes()
                    info.size = len(data)
                    if (s, i) != (1, 4): tar.addfile(info, io.BytesIO(data))
        else:                                                                              # the last shard lies in a folder
            for i, r in enumerate(records): save_audio(name/f'{s}_{i}.wav', r.wav, 16_000)
        shards.append(Path(f'{name}.parquet'))
    stream_shards(shards, root/'whole', Words(), size=SIZE)
    return root, shards


def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.parquet', '.json')}


def forked(work):
    "Exit code of `work()` in a process of its own"
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def test_counts_of_the_stream(corpus):
    root, shards = corpus
    counts = add_up(root/'whole')
    assert counts['clips'] == 24 and counts['captions'] == 144 and counts['clips without sound'] == 1
    assert counts['no sound'] == 6 and counts['repeated'] == counts['no word'] == counts['too long'] == 23 and counts['kept'] == 3*23
    rows = [r for s in shards for c in read_shard_rows(root/'whole'/s.name) for r in c]
    assert len(rows) == counts['kept'] and len({(r['id'], r['rank']) for r in rows}) == len(rows)


def read_shard_rows(path):
    import pyarrow.parquet as pq
    yield pq.read_table(path).to_pylist()


def test_stream_is_the_pipeline_in_memory(corpus):
    root, shards = corpus
    rows = next(read_shard(shards[2], CLIPS))
    ids = [r['id'] for r in rows]
    wavs = [FolderClips(shards[2].with_suffix('')).wav(i, 16_000) for i in ids]
    direct, _ = rank_clips(ids, wavs, [r['captions'] for r in rows], Words())
    streamed = next(read_shard_rows(root/'whole'/shards[2].name))
    assert [(r['id'], r['caption'], r['rank']) for r in direct] == [(r['id'], r['caption'], r['rank']) for r in streamed]
    assert np.allclose([r['score'] for r in direct], [r['score'] for r in streamed], atol=1e-5)


@pytest.mark.parametrize('world', [2, 5])
def test_any_number_of_processes_gives_the_same_bytes(corpus, world, tmp_path):
    root, shards = corpus
    codes = [forked(lambda: stream_shards(shards, tmp_path, Words(), r, world, SIZE)) for r in reversed(range(world))]
    assert codes == [0]*world and files(tmp_path) == files(root/'whole')


@pytest.mark.parametrize('moment', [1, 2, 4, 6, 9])
def test_killed_in_a_chunk(corpus, moment, tmp_path):
    "Killed in the k-th chunk: k - 1 are kept, the rest is scored by the next call, once"
    root, shards = corpus
    assert forked(lambda: stream_shards(shards, tmp_path, Words(moment), size=SIZE)) == -signal.SIGKILL
    clap = Words()
    scored = stream_shards(shards, tmp_path, clap, size=SIZE)
    assert files(tmp_path) == files(root/'whole')
    before = sum((3, 3, 2)[k % 3] for k in range(moment - 1))
    assert scored == 24 - before                                                           # nothing twice, nothing never


@pytest.mark.parametrize('place', ['write_atomic', 'write_shard', 'rmtree'])
@pytest.mark.parametrize('call', [1, 2])
def test_killed_between_files(corpus, place, call, tmp_path, monkeypatch):
    "Killed before a file is renamed, between the counts and the table, before the chunks are swept away"
    root, shards = corpus
    owner = caption_stream.shutil if place == 'rmtree' else caption_stream
    real, left = getattr(owner, place), [call]
    def dying(*args, **kwargs):
        left[0] -= 1
        return die() if left[0] == 0 else real(*args, **kwargs)
    monkeypatch.setattr(owner, place, dying)
    assert forked(lambda: stream_shards(shards, tmp_path, Words(), size=SIZE)) == -signal.SIGKILL
    monkeypatch.undo()
    stream_shards(shards, tmp_path, Words(), size=SIZE)
    assert files(tmp_path) == files(root/'whole') and not list(tmp_path.glob('*.parts'))


def test_half_written_files_are_not_results(corpus, tmp_path, monkeypatch):
    "Killed while bytes are being written: the name does not appear"
    root, shards = corpus
    def half(path, write):
        with open(Path(path).with_name('half'), 'wb') as f: f.write(b'{"rows'); f.flush()
        die()
    monkeypatch.setattr(caption_stream, 'write_shard', lambda path, *a: half(path, None))
    assert forked(lambda: stream_shards(shards, tmp_path, Words(), size=SIZE)) == -signal.SIGKILL
    monkeypatch.undo()
    stream_shards(shards, tmp_path, Words(), size=SIZE)
    assert files(tmp_path) == files(root/'whole')


def test_a_changed_setting_or_a_second_process_is_refused(corpus, tmp_path):
    root, shards = corpus
    from audiorepro.guard import lock_folder
    for options in (dict(size=4), dict(size=SIZE, keep=2), dict(size=SIZE, name='other')):
        with pytest.raises(ValueError, match='was begun with'): stream_shards(shards, root/'whole', Words(), **options)
    with lock_folder(tmp_path/f'{shards[0].stem}.parts'):
        with pytest.raises(ValueError, match='in use'): stream_shards(shards, tmp_path, Words(), size=SIZE)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match='rank|world'): stream_shards(shards, tmp_path, Words(), rank, world)


def test_lost_rows_are_noticed(corpus, tmp_path):
    root, shards = corpus
    stream_shards(shards[:1], tmp_path, Words(), size=SIZE)
    table, note = tmp_path/shards[0].name, tmp_path/f'{shards[0].stem}.counts.json'
    counts = json.loads(note.read_text())
    note.write_text(json.dumps(counts | dict(captions=counts['captions'] + 1)))
    with pytest.raises(ValueError, match='accounted for'): add_up(tmp_path)
    note.write_text(json.dumps(counts))
    write_shard(table, [next(read_shard_rows(table))[1:]], caption_stream.ROWS)
    with pytest.raises(ValueError, match='the table has'): add_up(tmp_path)


def test_damaged_inputs_name_their_file(corpus, tmp_path):
    root, shards = corpus
    for data in (b'', b'PAR1', shards[0].read_bytes()[:-50]):
        (tmp_path/'x.parquet').write_bytes(data)
        with pytest.raises(ValueError, match='x.parquet'): next(read_shard(tmp_path/'x.parquet'))
    with pytest.raises(ValueError, match='does not exist'): stream_shards([tmp_path/'x.parquet'], tmp_path/'o', Words())
    whole = shards[0].with_suffix('.tar').read_bytes()
    full = TarClips(shards[0].with_suffix('.tar'))
    start, size, _ = full.place['0_3']
    ends = [start - 512, start - 300, start, start + 100, start + size, -(-(start + size)//512)*512]  # before, in and after a header, in data
    for end in ends:
        (tmp_path/'cut.tar').write_bytes(whole[:end])
        cut = TarClips(tmp_path/'cut.tar')
        assert not cut.is_whole and full.is_whole and len(cut) == 3 + (end >= start + size)
        for key in cut.place: assert torch.equal(cut.wav(key, 16_000), full.wav(key, 16_000))
    for key in ('../corpus', '/etc/passwd', 'a\0b', ''): assert FolderClips(root).wav(key, 16_000) is None


# --- published captioners and the cells at paper scale ----------------------------------------------------------------

NBS = Path(__file__).resolve().parent.parent/'nbs'


def cells(stem): return [''.join(c['source']) for c in json.loads((NBS/f'{stem}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']


@pytest.fixture(scope='module')
def lesson():
    "The lesson's own tiny models of the published classes"
    names = {}
    for source in cells('70b_captioners'):
        if source.startswith(('#| export', '#| hide')) or 'def tiny_captioner' in source: exec(source, names)
    return names


@pytest.mark.parametrize('kind', ['audioflamingo3', 'qwen2_audio'])
def test_published_captioners_hear_their_sound(lesson, kind, tmp_path):
    "Through a saved checkpoint: each clip's own features, in its place, change the next word; a batch equals its items"
    made = lesson['tiny_captioner'](kind)
    made.model.save_pretrained(tmp_path/'m'); made.processor.save_pretrained(tmp_path/'m')
    captioner = lesson['HFCaptioner'].from_pretrained(tmp_path/'m', dtype=torch.float32)
    captioner.max_new_tokens = 6
    wavs = torch.stack([r.wav[:32_000] for r in make_records(3, 'all', seed=4)])
    found = captioner.inputs(wavs)
    with torch.no_grad():
        together = captioner.model(**found).logits[:, -1]
        for i in range(3):
            alone = captioner.model(**captioner.inputs(wavs[i:i + 1])).logits[0, -1]
            torch.testing.assert_close(alone, together[i], atol=1e-3, rtol=1e-4)
    assert min((together[i] - together[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2
    said = captioner.caption(wavs, 4, generator=make_generator(1))
    assert said == captioner.caption(wavs, 4, generator=make_generator(1)) and [len(s) for s in said] == [4]*3
    state = torch.random.get_rng_state()
    captioner.caption(wavs, 1, generator=make_generator(1))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize('kind', ['audioflamingo3', 'qwen2_audio'])
def test_a_sound_lost_on_the_way_is_an_error(lesson, kind, monkeypatch):
    captioner = lesson['tiny_captioner'](kind)
    wavs, call = torch.randn(2, 16_000, generator=make_generator(0)), type(captioner.processor).__call__
    def deaf(self, text, audio=None, **kw): return {k: v for k, v in call(self, text=text, audio=audio, **kw).items() if 'feature' not in k}
    monkeypatch.setattr(type(captioner.processor), '__call__', deaf)
    with pytest.raises(ValueError, match='wavs must reach the model: of 2 sounds'): captioner.inputs(wavs)


@pytest.mark.parametrize('stem, wanted', [('70_captions', "'kept': 2"), ('70a_caption_stream', '24 clips scored'), ('70b_captioners', 'clip1\ta dog')])
def test_cell_at_paper_scale(stem, wanted, corpus, tmp_path, monkeypatch, capsys):
    from audiorepro import captioners, clap_files
    monkeypatch.chdir(tmp_path)
    for i, r in enumerate(make_records(2, seed=3)): save_audio(tmp_path/f'data/audioset/clip{i}.wav', r.wav, 16_000)
    for i in range(2): (tmp_path/f'data/audioset/clip{i}.txt').write_text('a dog barks\n')
    (tmp_path/'data/audioset_captions').symlink_to(corpus[0])
    monkeypatch.setattr(clap_files.HFCLAP, 'from_pretrained', classmethod(lambda cls, *a, **k: Words()))
    class Talker:
        def caption(self, wavs, n): return [['a dog']*n]
    monkeypatch.setattr(captioners.HFCaptioner, 'from_pretrained', classmethod(lambda cls, *a, **k: Talker()))
    module = __import__(f"audiorepro.{stem.partition('_')[2]}", fromlist=['x'])
    source, = [c for c in cells(stem) if c.startswith("if at_scale('gpu'")]
    exec(source.replace("'cuda'", "'cpu'"), dict(vars(module), at_scale=lambda *a, **k: True))
    assert wanted in capsys.readouterr().out


def test_recipes_are_pure_and_name_their_choices():
    with pytest.raises(ValueError, match="got 'instruct'"): toy_recipe(which='instruct')
    meta = METAS[0] | dict(asked=[dict(pitch='low', speed='fast')]*2)
    said = [captions._say_less(meta, np.random.default_rng(i))['asked'] for i in range(200)]
    assert meta['asked'] == [dict(pitch='low', speed='fast')]*2 and .6 < np.mean([len(a) for s in said for a in s])/2 < .8

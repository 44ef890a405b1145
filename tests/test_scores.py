"""Score cards refuse to be mixed up, claims are run once each whatever is killed, and verdicts follow their rule.

The runner's arms are a stub module in a temporary folder: each call notes that it began and that it ended.
"""
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from audiorepro.core import figures_dir
from audiorepro.metrics import seed_interval
from audiorepro.scores import (KIND, Arm, Claim, ScoreCard, chance_agreements, claims_table, compare, count_faults, distance_card,
                               ids_hash, load_claims, read_runs, run_claims, share_card, verdict, weights_hash, wilson_interval)

STUB = '''
import os, pathlib, time
def note(what, name, seed):
    with open(pathlib.Path(__file__).parent/'notes', 'a') as f: f.write(f'{what} {name} {seed}\\n')
def arm(name, seed, sleep=.05, value=None):
    note('begin', name, seed); time.sleep(sleep); note('end', name, seed)
    return dict(value=float(seed) if value is None else value, n=8)
'''
RUN = 'import sys; from audiorepro.scores import load_claims, run_claims; run_claims(load_claims(sys.argv[1]), sys.argv[2])'


def stub_arm(name, **kwargs): return Arm(name, 'stub:arm', dict(name=name) | kwargs)
def claim(**changes):
    return replace(Claim('X1', 'a is better', 'paper', 'Fig. 0', 'share', (stub_arm('a', value=1.), stub_arm('b', value=.5)), 1, 4, .1,
                         smallest_effect=.25), **changes)


def results(c, *arms):
    return [dict(claim=c.id, arm=a.name, seed=s, value=v, registered=c.key) for a, values in zip(c.arms, arms) for s, v in enumerate(values)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the stub module, on the path of this process and of children"
    (tmp_path/'stub.py').write_text(STUB)
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out')); monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path)); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    sys.modules.pop('stub', None)
    return tmp_path


def start(place, claims):
    (place/'claims.json').write_text(json.dumps([c.to_dict() for c in claims]))
    return subprocess.Popen([sys.executable, '-c', RUN, str(place/'claims.json'), str(place/'runs.jsonl')], stdout=subprocess.PIPE, text=True)


def notes(place, what): return [line.split(' ', 1)[1] for line in (place/'notes').read_text().splitlines() if line.startswith(what)] if (place/'notes').exists() else []


# --- the runner -----------------------------------------------------------------------------------------------------

def test_killed_at_many_moments(place):
    "No result is lost, none is made twice: what ended more often than it was stored was killed between the two"
    c, rng, kept = claim(seeds=6), random.Random(0), []
    for round_ in range(6):
        job = start(place, [c])
        while job.poll() is None and len(notes(place, 'begin')) <= len(kept) + round_: time.sleep(.005)  # imports take seconds
        time.sleep(rng.uniform(0, .12))
        job.send_signal(signal.SIGKILL); job.wait()
        now = read_runs(place/'runs.jsonl')
        assert now[:len(kept)] == kept  # what was stored stays as it was
        kept = now
    job = start(place, [c])
    assert job.wait(120) == 0
    rows = read_runs(place/'runs.jsonl')
    assert rows[:len(kept)] == kept and len(rows) == 12
    assert len({(r['arm'], r['seed']) for r in rows}) == 12
    assert len(notes(place, 'begin')) <= 12 + 6  # each kill costs at most the run that it hit
    assert verdict(c, rows)['verdict'] == 'agrees'
    assert run_claims([c], place/'runs.jsonl') == 0


def test_two_runners_share_the_work(place):
    c = claim(seeds=5)
    jobs = [start(place, [c]) for _ in range(2)]
    assert [j.wait(120) for j in jobs] == [0, 0]
    assert sorted(notes(place, 'begin')) == sorted(f'{a} {s}' for a in 'ab' for s in range(5))
    assert len(read_runs(place/'runs.jsonl')) == 10


def test_a_look_does_not_wait(place, capsys):
    "While a long run holds the file, another may ask what is missing"
    c = claim(arms=(stub_arm('a', sleep=60), stub_arm('b')))
    job = start(place, [c])
    while not notes(place, 'begin'): time.sleep(.02)
    began = time.time()
    assert run_claims([c], place/'runs.jsonl', minutes=0) == 0 and time.time() - began < 5
    assert 'goes on with X1, a, seed 0' in capsys.readouterr().out
    job.kill(); job.wait()


@pytest.mark.parametrize('cut', [1, 2, 40, 10_000])
def test_torn_last_line(place, capsys, cut):
    "Every length of the torn piece: the newline alone, a byte of text, most of the line"
    c, path = claim(seeds=2), place/'runs.jsonl'
    assert run_claims([c], path) == 4
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:-1]) + lines[-1][:max(1, len(lines[-1]) - cut)])
    lost = cut > 1  # without its newline alone the line is whole
    assert len(read_runs(path)) == 4 - lost
    more = replace(c, id='X2')
    assert run_claims([c, more], path) == 4 + lost
    assert ('torn' in capsys.readouterr().out) == lost
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8 and rows[:3] == [json.loads(x) for x in lines[:3]]
    assert len(notes(place, 'begin')) == 8 + lost


def test_damage_in_the_middle_is_named(place):
    path = place/'runs.jsonl'
    run_claims([claim(seeds=2)], path)
    lines = path.read_text().splitlines(keepends=True)
    for bad in ('{"claim"\n', '[1]\n', '{"claim": "X1"}\n'):
        path.write_text(''.join([lines[0], bad, *lines[1:]]))
        before = path.read_bytes()
        with pytest.raises(ValueError, match='line 2'): run_claims([claim(seeds=3)], path)
        assert path.read_bytes() == before


def test_changed_registration(place, capsys):
    c, path = claim(seeds=2), place/'runs.jsonl'
    run_claims([c], path)
    before = path.read_bytes()
    for field, value in dict(smallest_effect=.3, sentence='a is much better', seeds=3, direction=-1,
                             arms=(stub_arm('a', value=1.), stub_arm('b', value=.6))).items():
        changed = replace(c, **{field: value})
        assert verdict(changed, read_runs(path)) | dict(n=0) == dict(verdict='not run', mean=None, low=None, high=None, n=0)
        assert run_claims([changed], path, minutes=0) == 0
        assert 'X1: 4 results belong to an earlier text' in capsys.readouterr().out
    assert path.read_bytes() == before
    assert verdict(replace(c, minutes=9.), read_runs(path))['verdict'] == 'agrees'  # a guess of the cost is no part of the claim
    assert run_claims([replace(c, smallest_effect=.3)], path) == 4 and len(read_runs(path)) == 8
    assert run_claims([c], path) == 0  # the old text is back, and so are its results


def test_arms_that_fail_leave_no_row(place):
    path = place/'runs.jsonl'
    bad = claim(seeds=2, arms=(stub_arm('a', value=1.), stub_arm('b', value=float('nan'))))
    with pytest.raises(ValueError, match='stub:arm must return a finite value'): run_claims([bad], path)
    assert [r['arm'] for r in read_runs(path)] == ['a']
    with pytest.raises(AttributeError): run_claims([claim(arms=(Arm('a', 'stub:none'), Arm('b', 'stub:none')))], path)
    assert len(read_runs(path)) == 1


def test_row_says_where_it_comes_from(place):
    c = claim(seeds=2)
    run_claims([c], place/'runs.jsonl')
    row = read_runs(place/'runs.jsonl')[0]
    assert (row['claim'], row['arm'], row['seed'], row['value'], row['n'], row['registered']) == ('X1', 'a', 0, 1., 8, c.key)
    assert row['device'] and row['versions']['torch'] == torch.__version__ and row['seconds'] >= 0


# --- verdicts -------------------------------------------------------------------------------------------------------

EFFECTS = [  # effects that binary numbers hold exactly, smallest effect 1/4, margin 1/4
    ((.5, .5, .5), 'agrees', 'agrees'),
    ((.25, .25, .25), 'agrees', 'agrees'),              # a tie with the smallest effect counts for the claim
    ((.1875, .25, .3125), 'agrees', 'agrees'),          # mean equal to it, interval above 0
    ((.125, .125, .125), 'disagrees', 'agrees'),        # surely there, surely too small
    ((0., 0., 0.), 'disagrees', 'agrees'),
    ((0., .25, .5), 'inconclusive', 'inconclusive'),
    ((.125, .25, .5), 'inconclusive', 'agrees'),        # large enough on average, but perhaps nothing; surely not worse
    ((-.25, -.25, -.25), 'disagrees', 'inconclusive'),  # a tie with the margin is neither
    ((-.5, -.5, -.5), 'disagrees', 'disagrees'),
    ((-.5, -.25, .25), 'inconclusive', 'inconclusive')]


@pytest.mark.parametrize('direction', [1, -1])
@pytest.mark.parametrize('effects, greater, not_worse', EFFECTS)
def test_rule(effects, greater, not_worse, direction):
    c = claim(seeds=3, direction=direction)
    rows = results(c, *((effects, (0.,)*3) if direction > 0 else ((0.,)*3, effects)))
    found = verdict(c, rows)
    low, high = seed_interval(effects)
    assert (found['verdict'], found['n']) == (greater, 3)
    np.testing.assert_allclose((found['mean'], found['low'], found['high']), (np.mean(effects), low, high), atol=1e-12)
    even = replace(c, smallest_effect=0., margin=.25)
    assert verdict(even, [r | dict(registered=even.key) for r in rows])['verdict'] == not_worse


def test_pairs_are_by_seed():
    "Seeds may lie far apart: what counts is the difference within each, whatever the order of the rows"
    c = claim(seeds=3)
    rows = results(c, (10.5, .5, 5.5), (10., 0., 5.))
    assert verdict(c, rows)['verdict'] == verdict(c, rows[::-1])['verdict'] == 'agrees'


def test_not_run_until_all_seeds_are_there():
    c = claim(seeds=3)
    rows = results(c, (1., 1., 1.), (0., 0., 0.))
    for i in range(6): assert verdict(c, rows[:i] + rows[i + 1:]) == dict(verdict='not run', mean=None, low=None, high=None, n=2)
    extra = [dict(claim='X1', arm=a, seed=3, value=v, registered=c.key) for a, v in (('a', 0.), ('b', 9.))]
    assert verdict(c, rows + extra) == verdict(c, rows)  # seeds that were not registered do not count
    again = [rows[0] | dict(value=-9.)]
    assert verdict(c, rows + again) == verdict(c, rows)  # nor does a second try


def test_ladder():
    arms = tuple(stub_arm(str(k)) for k in (1, 2, 4, 8))
    c = claim(seeds=3, arms=arms, statistic='rise', smallest_effect=.1)
    up = [(1., 2., 1.), (1.25, 2.5, 1.25), (1.5, 3., 1.5), (2., 4., 2.)]  # steps 1.25, 1.2, 1.33
    assert verdict(c, results(c, *up))['verdict'] == 'agrees' and verdict(c, results(c, *up))['mean'] == pytest.approx(.2)
    flat = [up[0], up[1], up[1], up[3]]   # one step is missing: the others cannot make up for it
    assert verdict(c, results(c, *flat))['verdict'] == 'disagrees'
    down = replace(c, direction=-1)
    assert verdict(down, results(down, *up[::-1]))['verdict'] == 'agrees'
    assert verdict(down, results(down, *up))['verdict'] == 'disagrees'
    small = [(1., 1., 1.), (1.05, 1.05, 1.05), (1.2, 1.2, 1.2), (1.4, 1.4, 1.4)]   # rising, but not by 10%
    assert verdict(c, results(c, *small))['verdict'] == 'disagrees'


def test_chance():
    assert chance_agreements([claim()]*4) == pytest.approx(.1) and chance_agreements([]) == 0
    rng, c, n = np.random.default_rng(0), claim(seeds=3, smallest_effect=1e-6), 1000
    hits = sum(verdict(c, results(c, rng.normal(size=3), rng.normal(size=3)))['verdict'] == 'agrees' for _ in range(n))
    assert hits <= .025*n + 3*(.025*.975*n)**.5


# --- the registered claims ------------------------------------------------------------------------------------------

def registered(): return load_claims(figures_dir()/'claims.json'), read_runs(figures_dir()/'claims_runs.jsonl')


def test_registered_claims_can_be_called():
    "Each arm names a function that exists and takes its arguments"
    import importlib, inspect
    claims, _ = registered()
    assert {'C1', 'C2', 'C9a', 'C9b'} <= {c.id for c in claims}
    for c in claims:
        assert 'audiorepro' in c.arms[0].run and c.seeds >= 3
        for a in c.arms:
            module, name = a.run.split(':')
            inspect.signature(getattr(importlib.import_module(module), name)).bind(**a.kwargs, seed=0)
        assert len({json.dumps(a.kwargs, sort_keys=True) for a in c.arms}) == len(c.arms)


def test_stored_verdicts_are_recomputed():
    "Each line of the table that lesson 53c shows follows from the stored rows, computed here a second way"
    claims, rows = registered()
    shown = json.loads((figures_dir().parent/'nbs'/'53c_claims.ipynb').read_text())
    text = ''.join(''.join(o.get('text', '')) for cell in shown['cells'] for o in cell.get('outputs', []))
    for c, line in zip(claims, claims_table(claims, rows).splitlines()[1:]):
        assert line in text
        mine = {(r['arm'], r['seed']): r['value'] for r in rows if (r['claim'], r['registered']) == (c.id, c.key)}
        v = [[mine.get((a.name, s)) for s in range(c.seeds)] for a in c.arms]
        if any(x is None for row in v for x in row): assert verdict(c, rows)['verdict'] == 'not run'; continue
        v = np.array(v)
        effects = c.direction*(v[0] - v[1]) if c.statistic == 'difference' else (v[1:]/v[:-1])**c.direction
        effects = effects if c.statistic == 'difference' else effects.min(0) - 1
        half = 4.302653*effects.std(ddof=1)/3**.5 if c.seeds == 3 else None
        low, high = seed_interval(effects) if half is None else (effects.mean() - half, effects.mean() + half)
        if c.margin: word = 'agrees' if low > -c.margin else 'disagrees' if high < -c.margin else 'inconclusive'
        else: word = 'agrees' if low > 0 and effects.mean() >= c.smallest_effect else 'disagrees' if high < c.smallest_effect else 'inconclusive'
        assert verdict(c, rows)['verdict'] == word and line.startswith(c.id) and word in line


@pytest.mark.parametrize('change, words', [
    (dict(direction=2), 'Claim.direction must be 1 or -1'), (dict(seeds='3'), 'Claim.seeds must be int'), (dict(seeds=1), 'Claim.seeds'),
    (dict(smallest_effect=0.), 'Claim.smallest_effect'), (dict(margin=-.1), 'Claim.margin'), (dict(arms=[]), 'Claim.arms'),
    (dict(arms=[dict(name='a', run='stub', kwargs={})]*2), 'Arm.run'), (dict(arms=[dict(name='a')]*2), 'Arm needs run'),
    (dict(colour='red'), 'no field colour'), (dict(statistic='rise', margin=.1, smallest_effect=0.), 'Claim.margin')])
def test_bad_claims_name_file_claim_and_field(tmp_path, change, words):
    path = tmp_path/'claims.json'
    path.write_text(json.dumps([claim(id='OK').to_dict(), claim().to_dict() | change]))
    with pytest.raises(ValueError) as e: load_claims(path)
    assert str(path) in str(e.value) and 'claim X1' in str(e.value) and words in str(e.value)


def test_bad_files(tmp_path):
    path = tmp_path/'claims.json'
    with pytest.raises(ValueError, match='does not exist'): load_claims(path)
    for text, words in (('[', 'not JSON'), ('{}', 'list of claims'), ('[3]', 'claim 0')):
        path.write_text(text)
        with pytest.raises(ValueError, match=words): load_claims(path)
    path.write_text(json.dumps([claim().to_dict()]*2))
    with pytest.raises(ValueError, match='used once'): load_claims(path)
    path.write_text(json.dumps([claim().to_dict()]))
    assert load_claims(path) == [claim()] and load_claims(path)[0].key == claim().key


# --- cards ----------------------------------------------------------------------------------------------------------

class Ear(nn.Module):
    def __init__(self, dim=6): super().__init__(); self.weight = nn.Parameter(torch.randn(32, dim, generator=torch.Generator().manual_seed(0)))
    def features(self, wavs): return wavs.unflatten(1, (-1, 32)).square().mean(1).add(1e-4).log() @ self.weight


def wavs(n, seed, gain=1.): return .1*gain*torch.randn(n, 320, generator=torch.Generator().manual_seed(seed))
def names(kind, n=48): return [f'{kind}{i}' for i in range(n)]
def card(**kw): return distance_card(Ear(), wavs(48, 3, 1.3), wavs(48, 1), wavs(48, 2),
                                     **dict(made_ids=names('m'), real_ids=names('r'), other_ids=names('o'), resamples=20) | kw)


def test_cards_of_different_kind_name_the_field():
    a = card()
    assert compare(a, a) == 0 and compare(replace(a, value=a.value + 1, seeds=(7,), silent=3, made_ids='x'), a) == pytest.approx(1)
    for name in KIND:
        other = {'unit': 'training seed'}.get(name, 'x' if isinstance(getattr(a, name), str) else getattr(a, name) + 1)
        with pytest.raises(ValueError, match=f'^{name} differs'): compare(a, replace(a, **{name: other}))
    assert set(KIND) == {'measure', 'back_end', 'back_end_hash', 'sample_rate', 'real_ids', 'n', 'candidates', 'unit'}


def test_card_survives_json(tmp_path):
    a = card()
    a.save(tmp_path/'a.json')
    assert ScoreCard.load(tmp_path/'a.json') == a
    values = json.loads((tmp_path/'a.json').read_text())
    for change in (dict(unit='epoch'), dict(value=float('nan')), dict(low=9e9), dict(n=0), dict(colour=1)):
        (tmp_path/'b.json').write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match='b.json'): ScoreCard.load(tmp_path/'b.json')


def test_reference_of_the_same_captions_is_refused():
    with pytest.raises(ValueError, match='real_ids: 1 clips'): card(real_ids=['m0', *names('r', 47)])
    with pytest.raises(ValueError, match='other_ids'): card(other_ids=['r5', *names('o', 47)])
    with pytest.raises(ValueError, match='equally many'): distance_card(
        Ear(), wavs(40, 3), wavs(48, 1), wavs(48, 2), made_ids=names('m', 40), real_ids=names('r'), other_ids=names('o'))
    assert card(other_ids=names('m')).n == 48  # the captions' own clips may give the floor


def test_a_perfect_system_scores_the_floor():
    "Made clips from the real source: distance and floor agree within the interval; a changed system lies above"
    perfect = distance_card(
        Ear(), wavs(200, 3), wavs(200, 1), wavs(200, 2), made_ids=names('m', 200), real_ids=names('r', 200), other_ids=names('o', 200), resamples=60)
    assert perfect.low < perfect.floor < perfect.high and perfect.infinity < perfect.value
    assert card().low > card().floor


def test_hashes_and_faults():
    a, b = Ear(), Ear()
    assert weights_hash(a) == weights_hash(b) != weights_hash(Ear().double())
    with torch.no_grad(): b.weight[0, 0] += 1e-5
    assert weights_hash(a) != weights_hash(b)
    assert ids_hash('ab') == ids_hash('ba') != ids_hash(['ab'])
    x = torch.zeros(5, 64); x[1, 0] = .999; x[2] = 2.; x[3] = .00101; x[4] = -.5
    assert count_faults(x) == (1, 2)
    assert (card().silent, card().clipped) == (0, 0)


def test_shares():
    ones = share_card(np.ones((2, 64)), 'class', Ear(), names('m', 64), seeds=(0, 1))
    assert (ones.low, ones.high) == wilson_interval(64, 64) and ones.low < 1
    mixed = share_card(np.arange(64) % 4 > 0, 'class', Ear(), names('m', 64))
    low, high = wilson_interval(48, 64)
    assert mixed.value == .75 and abs(mixed.low - low) < .03 and abs(mixed.high - high) < .03
    for k, n, low, high in ((34, 40, .709, .929), (0, 10, 0., .278)):
        np.testing.assert_allclose(wilson_interval(k, n), (low, high), atol=1e-3)


# --- the arms of lesson 53c -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('out')


@pytest.fixture
def tiny(out, monkeypatch):
    "Real recipes on few clips, one step, in a folder of their own"
    import audiorepro.audioldm2, audiorepro.audiomae, audiorepro.claims as claims, audiorepro.ldm, audiorepro.vae
    from audiorepro.datasets import toy_set
    small = lambda n, *args, **kw: toy_set(min(n, 288), *args, **kw | dict(workers=1))
    for module in (audiorepro.audioldm2, audiorepro.audiomae, audiorepro.ldm, audiorepro.vae): monkeypatch.setattr(module, 'toy_set', small)
    monkeypatch.setenv('AUDIOREPRO_OUT', str(out))
    trained, run = [], claims.run_recipe
    monkeypatch.setattr(claims, 'run_recipe', lambda r, *args, **kw: (trained.append(r.name), run(r, *args, **kw))[1])
    monkeypatch.setattr(claims, 'trained', trained, raising=False)
    return claims


def test_arms_of_one_seed_share_their_training(tiny):
    options = dict(budget='short', clips=16, n=3, steps=1, num_inference_steps=2)
    errors = [tiny.lambda_error(lam, 0, **options) for lam in (1, 8)]
    assert tiny.trained == ['ldm'] and all(e['n'] == 3 and .1 < e['value'] < 20 for e in errors)
    assert errors[0] != errors[1] and tiny.lambda_error(8, 0, **options) == errors[1]
    tiny.lambda_error(8, 1, **options)
    assert tiny.trained == ['ldm', 'ldm']


def test_features_arms(tiny):
    found = [tiny.features_knn(which, 0, 'short', known=48, n=32, steps=1) for which in ('AudioMAE', 'VAE')]
    assert tiny.trained == ['audiomae', 'vae']
    for f in found: assert 0 < f['value'] <= 1 and f['n'] == 32 and f['pooling']


def test_loa_arms(tiny):
    options = dict(budget='short', clips=16, n=8, steps=1, num_inference_steps=2)
    found = {(w, m): tiny.loa_score(w, 0, m, **options) for w in ('true', 'predicted') for m in ('class', 'distance')}
    assert tiny.trained == ['audioldm2']
    assert all(f['n'] == 8 for f in found.values()) and 0 <= found['true', 'class']['value'] <= 1
    assert found['true', 'distance']['value'] > 0 and found['true', 'distance'] != found['predicted', 'distance']

"""Both directions: every solution passes its checks, every stub fails them; and the stubs are made from the solutions.

Student cells and their checks start with `#| exercise`; ordinary test runs skip them, these tests force them.
"""
import contextlib, importlib.util, io, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((ROOT/'nbs'/'solutions').glob('[!_]*.ipynb'))
by_name = pytest.mark.parametrize('path', SOLUTIONS, ids=lambda p: p.stem)

spec = importlib.util.spec_from_file_location('lessons', ROOT/'tests'/'lessons.py')
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)


def sections(text):
    "(heading, source, is_flagged) of each code cell; the heading is the last one that starts with '## Exercise'"
    heading = None
    for cell in json.loads(text)['cells']:
        source = ''.join(cell['source'])
        if found := re.search(r'^## (Exercise.*)$', source, re.M) if cell['cell_type'] == 'markdown' else None: heading = found[1]
        if cell['cell_type'] == 'code': yield heading, source, source.startswith('#| exercise')


def run(source, names, where):
    with contextlib.redirect_stdout(io.StringIO()): exec(compile(source, where, 'exec'), names)


def test_there_are_exercises(): assert SOLUTIONS


def test_stubs_are_in_step_with_the_solutions():
    late = lessons.exercises(check=True)
    assert not late, f'{late}: run `python tests/lessons.py exercises`'


@by_name
def test_solutions_pass(path):
    names = {'__name__': '__main__'}
    for i, (_, source, _) in enumerate(sections(path.read_text())): run(source, names, f'{path.stem}, code cell {i}')


@by_name
def test_stubs_fail(path):
    "In every exercise some forced cell raises because the answer is missing; all other cells run"
    names, unanswered, seen = {'__name__': '__main__'}, set(), set()
    for i, (heading, source, is_flagged) in enumerate(sections(lessons.exercise_text(path))):
        if not is_flagged: run(source, names, f'{path.stem}, code cell {i}')
        elif heading not in unanswered:
            seen.add(heading)
            try: run(source, names, f'{path.stem}, code cell {i}')
            except NotImplementedError: unanswered.add(heading)
    assert seen and seen == unanswered, f'pass without an answer: {seen - unanswered}'


# right answers that differ from the solution: (notebook, exercise, answer, what the hints must say)
OTHER_ANSWERS = [
    ('12_mel', 2, 'def centre(t, cfg): return t*cfg.hop_length + cfg.n_fft/2 - cfg.pad', ''),  # a float
    ('12_mel', 4, 'def raw_fbank(x, cfg): return x.squeeze(1)*2*cfg.std + cfg.mean\n'
                  'def sounding(x, cfg): return [int((r.abs() > 1e-4).any(-1).nonzero().max()) + 1 for r in raw_fbank(x, cfg)]', 'up to the last one'),  # a list
    ('12_mel', 5, 'def one_round(spec, mag, cfg): c = stft(istft(spec, cfg), cfg); return torch.polar(mag, c.angle())\n'
                  'def mismatch(spec, mag, cfg):\n    fit = stft(istft(spec, cfg), cfg).abs()\n'
                  '    return torch.linalg.vector_norm(fit - mag)/torch.linalg.vector_norm(mag)', 'torch.polar(mag, c.angle())'),  # a tensor, as in the formula
    ('13_text', 1, "def masked_max(states, mask): return states.masked_fill(~mask[..., None], -float('inf')).max(1).values", '`masked_fill` with minus infinity'),
    ('24_backbones', 1, 'def heard(samples):\n    P = len([k for k in range(1, 200) if (96*k - 1)*160 + 400 <= samples])\n'
                         '    return [P, samples - ((96*P - 1)*160 + 400)*(P > 0)]', '(96 P - 1)*160 + 400'),  # a list
    ('24_backbones', 2, 'def reorder(weight, channels): return weight.unflatten(1, (24, channels)).transpose(1, 2).flatten(1)', ''),
    ('34_clap', 1, 'predicted = dict(nothing=-torch.tensor(1/64).log(), half=-torch.tensor(1/32).log())', '(a) 1/64. (b) 1/32.'),
    ('34_clap', 2, 'def best(audio, text): return (F.normalize(audio, dim=-1)*text[:, None]).sum(-1).argmax(1)', '(F.normalize(audio, dim=-1)*text[:, None]).sum(-1)'),
    ('60_codec', 1, 'predicted = dict(codes=2200., samples=256e3, levels=12.)', '50 frames, 4 levels, 11 bits'),
    ('60_codec', 2, 'def frames(samples, cfg): return math.ceil(samples/cfg.hop_length)\ndef trim(wav, samples): return wav[:, :, :samples]', 'Round up'),
    ('60_codec', 3, 'def one_level(x, book):\n    k = (x[:, None] - book).square().sum(-1).argmin(1)\n    return k, x - book[k]\n'
                    'def quantise(x, books):\n    codes = torch.zeros(len(x), len(books), dtype=torch.int64)\n    for i, book in enumerate(books): codes[:, i], x = one_level(x, book)\n    return codes', '`x - book[k]`'),
    ('50_t5', 2, 'def confused(distance, buckets=32, max_distance=128):\n    row = relative_buckets(1, 201, buckets=buckets, max_distance=max_distance).flatten().tolist()\n'
                 '    return [d for d in range(201) if row[d] == row[distance]]', ''),
]


@pytest.mark.parametrize('stem, number, answer, hint', OTHER_ANSWERS, ids=[f'{s}-{n}' for s, n, _, _ in OTHER_ANSWERS])
def test_other_right_answers_pass(stem, number, answer, hint):
    "What the hints lead to passes the checks, whatever type it comes in"
    text = (ROOT/'nbs'/'solutions'/f'{stem}.ipynb').read_text()
    assert hint in ''.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    names, replaced = {'__name__': '__main__'}, 0
    for i, (heading, source, is_flagged) in enumerate(sections(text)):
        if heading and not heading.startswith(f'Exercise {number}'): continue
        if lessons.BEGIN in source: source, replaced = answer, replaced + 1
        run(source, names, f'{stem}, code cell {i}')
    assert replaced == 1


@by_name
def test_each_exercise_says_what_it_asks(path):
    cells = json.loads(path.read_text())['cells']
    asked = [s for c in cells if c['cell_type'] == 'markdown' for s in [''.join(c['source'])] if s.startswith('## Exercise')]
    assert 3 <= len(asked) <= 6
    for text in asked:
        for part in ('**Goal:**', '**Difficulty**', '**Time**', '**Needs**', '<details>'): assert part in text, (part, text[:60])
    levels = [int(re.search(r'\*\*Difficulty\*\* ([1-5])', text)[1]) for text in asked]
    assert levels == sorted(levels), 'in order of effort'


def test_stub_maker():
    cell = "#| exercise\ndef f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION\n\nf(1)"
    assert lessons.stub(cell) == "#| exercise\ndef f(x):\n    raise NotImplementedError('your turn')\n\nf(1)"
    assert lessons.stub('x = 1') == 'x = 1'
    for bad in (cell.replace('    ### END', '### END'), cell.replace('### END SOLUTION', ''), cell.replace('#| exercise\n', '')):
        with pytest.raises(ValueError): lessons.stub(bad)

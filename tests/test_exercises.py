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

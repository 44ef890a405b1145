"""The style of the lessons, as rules. Each rule is a small function that returns a list of complaints; each is shown to
complain about a bad example that was made for it, and to be silent about a good one.
"""
import ast, importlib.util, io, json, re, subprocess, sys, tokenize
from collections import Counter
from pathlib import Path

import export, nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE, FIGURES = ROOT/'nbs', ROOT/'audiorepro', ROOT/'figures'
LESSONS = sorted(NBS.glob('[!_]*.ipynb'))
SOLUTIONS = sorted((NBS/'solutions').glob('[!_]*.ipynb'))

DIRECTIVES = {'export', 'exporti', 'hide', 'exercise', 'default_exp', 'eval:'}
CELL_LINES, FUNCTION_LINES, MODULE_LINES, CELLS, WORDS, NAMES, LINE = 40, 60, 400, 70, 150, 20, 120  # where to stop
NOTEBOOK_KB, FIGURE_KB, IMPORT_SECONDS = 800, 200, .3

spec = importlib.util.spec_from_file_location('lessons', ROOT/'tests'/'lessons.py')
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)


# --- reading a notebook ---------------------------------------------------------------------------------------------

def source(cell): return ''.join(cell['source'])
def code(nb): return [source(c) for c in nb['cells'] if c['cell_type'] == 'code']
def prose(nb): return [source(c) for c in nb['cells'] if c['cell_type'] == 'markdown']
def directives(text): return re.findall(r'^#\| (\S+)', text, re.M)
def exported(nb): return [c for c in code(nb) if {'export', 'exporti'} & set(directives(c))]
def module(nb): return next(iter(re.findall(r'^#\| default_exp (\S+)', '\n'.join(code(nb)), re.M)), None)
def number(name): return (int(found[1]), found[2]) if (found := re.match(r'(\d+)([a-z]?)_', name)) else None
def first_line(text): return text.strip().split('\n')[0][:60]


def functions(text):
    "Public functions at the top level of a cell"
    return [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and not n.name.startswith('_')]


def names(text):
    "Public names that a cell defines"
    found = []
    for n in ast.parse(text).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.append(n.name)
        if isinstance(n, ast.Assign): found += [t.id for t in ast.walk(n.targets[0]) if isinstance(t, ast.Name)]
    return [n for n in found if not n.startswith('_')]


# --- rules about one notebook: `rule(nb, name)` ---------------------------------------------------------------------

def unknown_directive(nb, name):
    bad = [line for c in code(nb) for line in c.split('\n') if re.match(r'\s*#\s*\|', line)
           and not ((found := re.match(r'#\| (\S+)', line)) and found[1] in DIRECTIVES)]
    return [f'unknown or misspelt directive: {b}' for b in bad] + [
        f'only `#| eval: false` is known: {line}' for c in code(nb) for line in re.findall(r'^#\| eval:.*', c, re.M) if line != '#| eval: false']


def directive_below_content(nb, name):
    complaints = []
    for c in code(nb):
        lines = c.split('\n')
        top = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
        complaints += [f'directive below other content: {line}' for line in lines[top:] if re.match(r'\s*#\|', line)]
    return complaints


def export_with_skip(nb, name):
    return [f'exported and skipped: {first_line(c)}' for c in exported(nb) if {'exercise', 'eval:', 'notest'} & set(directives(c))]


def title_first(nb, name):
    first = [c for c in nb['cells'] if not source(c).startswith('#| default_exp')][:1]
    good = first and first[0]['cell_type'] == 'markdown' and re.match(r'# \S.*\n\n> \S', source(first[0]))
    return [] if good else ['the first cell is not `# Title`, an empty line and `> one sentence`']


def stem_is_module(nb, name):
    own = module(nb)
    return [f'default_exp {own} in {name}'] if own and re.sub(r'^\d+[a-z]?_', '', name) != own else []


def imports_mixed(nb, name):
    complaints = []
    for c in exported(nb):
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(c).body]
        if any(imports) and not all(imports): complaints.append(f'imports and other statements in one exported cell: {first_line(c)}')
    return complaints


def missing_docments(nb, name):
    complaints = []
    for c in exported(nb):
        comments = Counter(t.start[0] for t in tokenize.generate_tokens(io.StringIO(c).readline) if t.type == tokenize.COMMENT)
        for f in functions(c):
            args = [a for a in (*f.args.posonlyargs, *f.args.args, f.args.vararg, *f.args.kwonlyargs, f.args.kwarg) if a]
            lines = Counter(a.lineno for a in args)
            complaints += [f'{f.name}: no comment on the line of `{a.arg}` alone' for a in args if not comments[a.lineno] or lines[a.lineno] > 1]
            if not ast.get_docstring(f): complaints.append(f'{f.name}: no docstring')
    return complaints


def over_budget(nb, name):
    cells, complaints = nb['cells'], []
    if len(cells) > CELLS: complaints.append(f'{len(cells)} cells, stop at {CELLS}')
    for c in code(nb):
        lines = c.split('\n')
        if len(lines) > CELL_LINES: complaints.append(f'{len(lines)} lines in a cell, stop at {CELL_LINES}: {first_line(lines[min(1, len(lines) - 1)])}')
        complaints += [f'{len(line)} characters in a line, stop at {LINE}: {first_line(line)}' for line in lines if len(line) > LINE]
        complaints += [f'{n.name} has {n.end_lineno - n.lineno + 1} lines, stop at {FUNCTION_LINES}' for n in ast.walk(ast.parse(python(c)))
                       if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= FUNCTION_LINES]
    for text in prose(nb):
        if len(text.split()) > WORDS: complaints.append(f'{len(text.split())} words in a markdown cell, stop at {WORDS}: {first_line(text)}')
    public = [n for c in code(nb) if 'export' in directives(c) for n in names(c)]
    if len(public) > NAMES: complaints.append(f'{len(public)} exported public names, stop at {NAMES}')
    return complaints


def python(text): return re.sub(r'^\s*[%!].*$', '', text, flags=re.M)  # without notebook magics


def bad_cell_ids(nb, name):
    ids = [c.get('id') for c in nb['cells']]
    return ['a cell has no id']*(None in ids) + [f'cell id {i} is used twice' for i, n in Counter(ids).items() if i and n > 1]


def error_outputs(nb, name):
    return [f'error output {o["ename"]}: {first_line(source(c))}' for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']


UNTIDY = re.compile(r'\d+%\||PosixPath\(|(?<![\w.…])/(?:root|home|Users|tmp|work)/')


def untidy_outputs(nb, name):
    "Kept outputs hold no progress bar, no path that a figure left behind, and no place of the machine they were made on"
    texts = ((c, ''.join(t)) for c in nb['cells'] for o in c.get('outputs', []) for t in (o.get('text', ''), o.get('data', {}).get('text/plain', '')))
    return [f'{found[0]!r} in the output of: {first_line(source(c))}' for c, t in texts if (found := UNTIDY.search(t))]


def missing_figures(nb, name, figures=FIGURES):
    linked = [Path(link).name for text in prose(nb) for link in re.findall(r'!\[[^\]]*\]\(([^)\s]+)', text) if 'figures/' in link]
    saved = [n for c in code(nb) for n in re.findall(r"save_fig\([^)]*?'([\w.]+)'\)", c)]
    complaints = [f'figures/{n} is linked and does not exist' for n in linked if not (figures/n).exists()]
    complaints += [f'figures/{n}.png is saved by a cell and does not exist' for n in saved if not (figures/f'{n}.png').exists()]
    return complaints + [f'figure {n} should be named {name}_...' for n in saved if not n.startswith(name + '_')]


def upward_imports(nb, name, floors=None):
    own, floors = number(name), floors or floor_of_modules()
    if not module(nb) or own is None: return []  # tours and experiments may use everything
    used = {m for c in code(nb) for m in re.findall(r'^\s*(?:from|import) audiorepro\.(\w+)', c, re.M)}
    return [f'imports {m}, which is not of a lower number' for m in sorted(used) if m != module(nb) and not floors.get(m, (99, '')) < own]


def floor_of_modules():
    "Module -> number of its lesson"
    read = ((json.loads(p.read_text()), p.stem) for p in LESSONS)
    return {module(nb): number(stem) for nb, stem in read if module(nb)}


# --- rules about what a lesson shows and says -------------------------------------------------------------------------

COMPARISONS = {'allclose', 'isclose', 'equal', 'array_equal'}
NUMBER = r'(?:\d[\d,_]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?'
PROSE_NUMBER = re.compile(rf'(?<![\w.,/^-])({NUMBER})( ?%| kHz| ms| million| billion| thousand|(?![\w^]))')
UNITS = {'%': 100, 'kHz': 1e-3, 'ms': 1e3, 'million': 1e-6, 'billion': 1e-9, 'thousand': 1e-3}
NOT_MEASURED = re.compile(r'\d{4}\.\d{5}|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|(?:sec|eq|fig|table|app)s?\. [\w.]+|\b(?:section|version|exercise)s? [\d.]+', re.I)


def statements(tree):
    "Calls that stand alone, or in a `display`, and that run with the cell: not in a definition, nor behind `if at_scale`"
    for n in ast.iter_child_nodes(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) or isinstance(n, ast.If) and 'at_scale' in ast.unparse(n.test): continue
        if isinstance(n, ast.Expr): yield from map(called, ast.walk(n.value) if called(n.value) == 'display' else [n.value])
        else: yield from statements(n)


def called(n): return isinstance(n, ast.Call) and getattr(n.func, 'id', getattr(n.func, 'attr', ''))


def unshown(nb, name):
    "Each ungated cell that saves a figure shows one, and each call of `play` that runs gives a player"
    complaints = []
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        calls = Counter(statements(ast.parse(python(source(c)))))
        shown = [o.get('data', {}) for o in c.get('outputs', [])]
        for call, count in (('save_fig', sum('image/png' in d for d in shown)), ('play', sum('<audio' in ''.join(d.get('text/html', '')) for d in shown))):
            if count < calls[call]: complaints.append(f'{calls[call]} x {call}, {count} shown: {first_line(source(c))}')
    return complaints


def unexplained_figures(nb, name):
    "The words after a picture say what to see: they do not begin another section"
    complaints, cells = [], nb['cells']
    for i, c in enumerate(cells):
        if c['cell_type'] != 'code' or 'save_fig' not in [*statements(ast.parse(python(source(c))))]: continue
        words = next((source(d) for d in cells[i + 1:] if d['cell_type'] == 'markdown'), '#')
        if words.startswith('#'): complaints.append(f'nothing is said about the picture of: {first_line(source(c))}')
    return complaints


QUESTION = re.compile(r'(?:^|[.:;?!] |\*\*)Predict\b|\*\*predict\b|\b[Bb]efore you (?:read on|run)', re.M)


def unanswered(nb, name):
    "What the reader is asked to predict is answered, folded, in the same cell or in one of the next two"
    cells = nb['cells']
    asked = ((i, QUESTION.search(source(c))) for i, c in enumerate(cells) if c['cell_type'] == 'markdown')
    return [f'no folded answer: {source(cells[i])[at.start():][:60]}' for i, at in asked
            if at and not any('<details>' in text for text in prose(dict(cells=cells[i:i + 3])))]


SMALLEST_TEXT = 8  # points
TEXT_SIZE = re.compile(r'(\w+\.)?\w*(font|label|title)size|font\.size|prop|fontdict')  # also 'xtick.labelsize' of `rcParams`
WRITERS = {f'{a}{b}' for a in ('', 'set_', 'sup') for b in ('title', 'xlabel', 'ylabel', 'xticks', 'yticks')} | {'text', 'annotate'}  # take `size=`


def text_sizes(tree):
    "Values given as a size of text: by a keyword, in a dictionary, as an entry of `rcParams`"
    is_size = lambda key: isinstance(key, str) and TEXT_SIZE.fullmatch(key)
    for n in ast.walk(tree):
        if isinstance(n, ast.Call): yield from (k.value for k in n.keywords if is_size(k.arg) or k.arg == 'size' and getattr(n.func, 'attr', '') in WRITERS)
        if isinstance(n, ast.Dict): yield from (v for k, v in zip(n.keys, n.values) if is_size(getattr(k, 'value', None)))
        if isinstance(n, ast.Assign): yield from (n.value for t in n.targets if isinstance(t, ast.Subscript) and is_size(getattr(t.slice, 'value', None)))


def small_text(nb, name):
    "Words in pictures can be read: no size below 8 points is asked for"
    given = ((c, k.value) for c in code(nb) for size in text_sizes(ast.parse(python(c))) for k in ast.walk(size) if isinstance(k, ast.Constant))
    return [f'text of size {x}, at least {SMALLEST_TEXT}: {first_line(c)}' for c, x in given
            if x in ('x-small', 'xx-small') or type(x) in (int, float) and 0 < x < SMALLEST_TEXT]


def bare_comparisons(nb, name):
    "A comparison that is a statement of its own checks nothing"
    return [f'nothing checks `{ast.unparse(n)[:60]}`' for c in code(nb) for n in ast.walk(ast.parse(python(c)))
            if isinstance(n, ast.Expr) and (isinstance(n.value, ast.Compare) or called(n.value) in COMPARISONS)]


def missing_lessons(nb, name):
    "Prose refers only to lessons that exist"
    known = {re.match(r'\d+[a-z]?', p.stem)[0] for p in LESSONS if number(p.stem)}
    named = re.findall(r'\b[Ll]essons? (\d+[a-z]?(?:(?:, | and | to )\d+[a-z]?)*)', '\n'.join(prose(nb)))
    return [f'lesson {n} does not exist' for text in named for n in re.findall(r'\d+[a-z]?', text) if n not in known]


def numbers(text): return [float(re.sub('[,_]', '', n)) for n in re.findall(NUMBER, text)]


def shown_numbers(nb, name, figures=FIGURES):
    "Numbers in a lesson's code, its outputs and the JSON files that it keeps"
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    texts = [t for o in outputs for t in (o.get('text', ''), *(o.get('data', {}).get(f'text/{kind}', '') for kind in ('plain', 'markdown')))]
    return numbers('\n'.join(code(nb) + [''.join(t) for t in texts] + [p.read_text() for p in sorted(figures.glob(f'{name}_*.json'))]))


# numbers in prose that no cell of the lesson computes, and where they come from
FOUNDED_ELSEWHERE = {
    '*': {'10.24', '2.56'},    # seconds of a clip, of the paper and of the toy world
    '23_metrics': {'0.96'},    # seconds of a frame of VGGish
    '32_vocoder': {'0.999'},   # the decay of HiFi-GAN's learning rate
    '52a_public': {'1.1'},     # billion parameters, on the hub's page
    '53b_published': {'1.1'},  # the same, counted in lesson 52a
    '83_errata': {'0.25', '1.42', '1.67', '1.78', '1.86', '2.13'},  # quoted from the paper
    '83a_errata_captions': {'2.21', '2.71', '0.527', '0.539'},  # the same
    '83b_errata_rr': {'1.52', '1.56', '1.58'},  # quoted from the paper
    '30_vae': {'0.411'},         # scale of the published checkpoint
    '34_clap': {'0.01'},         # smallest temperature
    '43_ldm': {'0.16'},          # seconds of a moment
    '52_loa': {'0.64'},          # seconds, a quarter of a clip
    '53_audioldm2': {'0.75'},    # 1 - p_gt
}


def unfounded_numbers(nb, name, figures=FIGURES):
    "Decimals and percentages in prose after the first code cell, rounded as they stand there, are computed in the lesson"
    import numpy as np
    first = next((i for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code'), 0)
    found, complaints = np.unique(shown_numbers(nb, name, figures)), []
    for text in (source(c) for c in nb['cells'][first:] if c['cell_type'] == 'markdown'):
        for n, unit in PROSE_NUMBER.findall(NOT_MEASURED.sub(' ', text)):
            if '.' not in n and unit.strip() != '%' or n in FOUNDED_ELSEWHERE['*'] | FOUNDED_ELSEWHERE.get(name, set()): continue
            value, half = numbers(n)[0], .5000001*10.**-len(n.partition('.')[2])
            scales = {1, UNITS.get(unit.strip(), 1)}
            if not any((abs(found*s - value) <= half).any() for s in scales): complaints.append(f'{n}{unit} is in no output: {first_line(text)}')
    return complaints


# complaints about lengths that a lesson still has; the numbers may only fall
DEBT = json.loads((Path(__file__).parent/'style_debt.json').read_text())

RULES = [unknown_directive, directive_below_content, export_with_skip, title_first, stem_is_module, imports_mixed, missing_docments,
         over_budget, bad_cell_ids, error_outputs, untidy_outputs, missing_figures, upward_imports, unshown, unexplained_figures,
         unanswered, small_text, bare_comparisons, missing_lessons, unfounded_numbers]
RULES_FOR_ALL = [unknown_directive, directive_below_content, bad_cell_ids, error_outputs, untidy_outputs, unshown, unanswered, small_text, bare_comparisons]


# --- rules about the whole project ----------------------------------------------------------------------------------

def duplicate_default_exp(notebooks):
    "`notebooks`: name -> notebook"
    count = Counter(module(nb) for nb in notebooks.values() if module(nb))
    numbers = Counter(number(n) for n in notebooks if number(n))
    return [f'{n} notebooks export {m}' for m, n in count.items() if n > 1] + [f'number {k} is used {n} times' for k, n in numbers.items() if n > 1]


def modules_without_notebook(package, notebooks):
    made = {module(nb) for nb in notebooks.values()}
    return [f'{p.name} has no notebook' for p in sorted(package.glob('*.py')) if not p.stem.startswith('_') and p.stem not in made]


def long_modules(package):
    "Lines as nbdev exported them: what tests/export.py adds to the docstrings is not counted, it says the same words once more"
    sizes = {p.name: len(export.undress(p.read_text()).split('\n')) for p in sorted(package.glob('*.py')) if p.name != '_modidx.py'}
    return [f'{n} has {k} lines, stop at {MODULE_LINES}' for n, k in sizes.items() if k > MODULE_LINES]


def ruff(package, select='F'):
    made = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--select', select, '--ignore', 'F401,F403,F405,F541',
                           '--output-format', 'concise', str(package)], capture_output=True, text=True)
    assert made.returncode in (0, 1), made.stderr
    return [line for line in made.stdout.split('\n') if re.search(r': F\d+|: E\d+|invalid-syntax', line)]


def big_files(paths, limit_kb):
    return [f'{p.name} has {p.stat().st_size//1024} KB, stop at {limit_kb}' for p in paths if p.stat().st_size > limit_kb*1024]


def comparable(text):
    "A module without what depends on the folder it is exported into"
    return re.sub(r'from audiorepro\b\.?', 'from .', re.sub(r'\S*/(\w+\.ipynb)', r'\1', text))


def out_of_step(path, package, folder):
    "Export a notebook into `folder`, with docstrings as `make export` does, and compare with the module in `package`"
    from nbdev.export import nb_export
    own = module(json.loads(path.read_text()))
    (Path(folder)/'__init__.py').touch()
    nb_export(str(path), lib_path=str(folder))
    made, kept = Path(folder)/f'{own}.py', package/f'{own}.py'
    made.write_text(export.dress(made.read_text()))
    if not kept.exists(): return [f'{own}.py was never exported']
    return [] if comparable(made.read_text()) == comparable(kept.read_text()) else [f'{own}.py differs from its notebook: run `make export`']


def slow_import(statement):
    "CPU seconds of an import, least of three, and whether it brought torch along"
    program = f"import sys, time; t = time.process_time(); {statement}; print(time.process_time() - t, 'torch' in sys.modules)"
    runs = [subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() for _ in range(3)]
    seconds = min(float(s) for s, _ in runs)
    return [f'{seconds:.2f} s, stop at {IMPORT_SECONDS}']*(seconds > IMPORT_SECONDS) + ['it imports torch']*(runs[0][1] == 'True')


# --- the rules applied ----------------------------------------------------------------------------------------------

def check(complaints): assert not complaints, '\n' + '\n'.join(complaints)
def read(path): return json.loads(path.read_text())
def all_lessons(): return {p.stem: read(p) for p in LESSONS}


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_lesson(path, rule):
    found = rule(read(path), path.stem)
    if rule is over_budget and len(found) <= DEBT.get(path.stem, 0): return
    check(found)


def test_debt_only_falls():
    "A lesson that got better must not get worse again: its number in style_debt.json is the number of complaints it has"
    now = {p.stem: len(over_budget(read(p), p.stem)) for p in LESSONS}
    assert {k: v for k, v in now.items() if v} == DEBT, 'write the smaller numbers into tests/style_debt.json'


@pytest.mark.parametrize('path', SOLUTIONS, ids=lambda p: p.stem)
def test_solution(path): check([c for rule in RULES_FOR_ALL for c in rule(read(path), path.stem)])


def test_no_module_twice(): check(duplicate_default_exp(all_lessons()))
def test_each_module_has_a_notebook(): check(modules_without_notebook(PACKAGE, all_lessons()))
def test_modules_are_short(): check(long_modules(PACKAGE))
def test_no_undefined_names(): check(ruff(PACKAGE))
def test_no_undefined_names_in_lessons(): check(ruff(NBS, 'F821'))  # gated cells included
def test_notebooks_are_small(): check(big_files(LESSONS, NOTEBOOK_KB))
def test_figures_are_small(): check(big_files(sorted(FIGURES.glob('*.png')), FIGURE_KB))
def test_outputs_belong_to_the_code(): check([f'{s}: outputs are older than the code' for s in lessons.stale()])
def test_import_is_light(): check(slow_import('import audiorepro'))


@pytest.mark.parametrize('path', [p for p in LESSONS if module(read(p))], ids=lambda p: p.stem)
def test_module_in_step(path, tmp_path): check(out_of_step(path, PACKAGE, tmp_path))


# --- each rule fails on a bad example -------------------------------------------------------------------------------

def notebook(*cells):
    "A notebook of strings: markdown when it starts as a title, a quotation or a figure, else code"
    kind = lambda s: 'markdown' if re.match(r'# \w|!\[|> ', s) else 'code'
    return dict(cells=[dict(cell_type=kind(s), id=f'c{i}', source=s.splitlines(True), outputs=[]) for i, s in enumerate(cells)])


TITLE = '# Title\n\n> One sentence'
GOOD = notebook(TITLE, '#| default_exp good', '#| export\nimport math\nfrom audiorepro.core import Config',
                '#| export\ndef root(\n    x:float, # number, >= 0\n)->float: # its root\n    "Take the root"\n    return math.sqrt(x)', '#| hide\nassert root(4.) == 2.')


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_good_example_passes(rule): check(rule(GOOD, '05_good'))


def parameters(text): return f'#| export\ndef f({text}):\n    "Do"'


BAD = [
    (unknown_directive, notebook('#| exprot\nx = 1')), (unknown_directive, notebook('#|export\nx = 1')), (unknown_directive, notebook('# | hide\nx = 1')),
    (unknown_directive, notebook('#| gpu\nx = 1')), (unknown_directive, notebook('#| eval: true\nx = 1')),
    (directive_below_content, notebook('x = 1\n#| export')), (directive_below_content, notebook('#| hide\n\n#| export\nx = 1')),
    (export_with_skip, notebook('#| export\n#| exercise\nx = 1')), (export_with_skip, notebook('#| export\n#| eval: false\nx = 1')),
    (title_first, notebook('x = 1', TITLE)), (title_first, notebook('# Title without a sentence')), (title_first, notebook()),
    (stem_is_module, notebook('#| default_exp other')),
    (imports_mixed, notebook('#| export\nimport math\nx = math.pi')),
    (missing_docments, notebook(parameters('x'))), (missing_docments, notebook(parameters('\n    x, y # both\n'))),
    (missing_docments, notebook(parameters('\n    x, # one\n    *,\n    y=1,\n'))), (missing_docments, notebook('#| export\ndef f(): return 1')),
    (over_budget, notebook('\n'.join(['x = 1']*41))), (over_budget, notebook('x = 1' + ' + 1'*30)), (over_budget, notebook('# ' + 'word '*151)),
    (over_budget, notebook(*['x = 1']*71)), (over_budget, notebook('def f():\n' + '    pass\n'*60)),
    (over_budget, notebook('#| export\n' + '\n'.join(f'def f{i}(): pass' for i in range(21)))),
    (bad_cell_ids, dict(cells=[dict(cell_type='code', source=[])])), (bad_cell_ids, dict(cells=[dict(cell_type='code', id='a', source=[])]*2)),
    (error_outputs, dict(cells=[dict(cell_type='code', id='a', source=['1/0'], outputs=[dict(output_type='error', ename='ZeroDivisionError')])])),
    *((untidy_outputs, dict(cells=[dict(cell_type='code', id='a', source=['go()'], outputs=[dict(output_type='stream', name='stdout', text=bad)])]))
      for bad in ('  0%|          | 0/2 [00:00<?, ?it/s]', "PosixPath('figures/05_bad_what.png')", 'saved to /home/somebody/out')),
    (missing_figures, notebook('![a claim](../figures/05_bad_never_made.png)')), (missing_figures, notebook("save_fig(fig, '05_bad_never_made')")),
    (upward_imports, notebook('#| default_exp bad', 'from audiorepro.diffusion import Schedule')),
    (upward_imports, notebook('#| default_exp bad', 'def f():\n    from audiorepro.unet import UNet')),
    (upward_imports, notebook('#| default_exp bad', 'import audiorepro.no_such_lesson')),
    (unshown, notebook("save_fig(fig, '05_bad_what')")), (unshown, notebook("for s in scales: save_fig(draw(s), f'05_bad_{s}')")),
    (unshown, notebook('for wav in wavs: play(wav, 16_000)')), (unshown, notebook('play(wavs[0], 16_000)\nplay(wavs[1], 16_000)')),
    (unexplained_figures, notebook("save_fig(fig, '05_bad_what')", 'x = 1', '# The next section')),
    (unexplained_figures, notebook("save_fig(fig, '05_bad_what'); fig")),
    (unanswered, notebook('> **Predict:** which is larger?', 'x = 1', '> The first.')), (unanswered, notebook('> Before you read on: why?')),
    (unanswered, notebook('> Two arms. Predict both.', 'x = 1', 'y = 1', '> <details>The first.</details>')),
    *((small_text, notebook(bad)) for bad in ('ax.legend(fontsize=7)', "ax.tick_params(labelsize='x-small')", 'ax.set_title(name, size=7.5)',
      'fig.legend(prop=dict(size=6))', "plt.rcParams['xtick.labelsize'] = 7", "plt.rcParams.update({'font.size': 6})", 'ax.legend(fontsize=9 if wide else 6)')),
    (bare_comparisons, notebook('assert True\nabs(a - b).max() > .01')), (bare_comparisons, notebook('np.allclose(a, b)')),
    (bare_comparisons, notebook('for a, b in pairs:\n    torch.equal(a, b)')),
    (missing_lessons, notebook('# As lesson 91 measures')), (missing_lessons, notebook('# Made in lessons 40 and 74')),
    (unfounded_numbers, notebook('print(loss)', '> The loss falls to 0.80.')), (unfounded_numbers, notebook('print(loss)', '> 43% are right.')),
    (unfounded_numbers, notebook('print(2_540_000)', '> It has 3.4 million weights.')),
]


@pytest.mark.parametrize('rule, nb', BAD, ids=[f'{r.__name__}-{i}' for i, (r, _) in enumerate(BAD)])
def test_bad_example_fails(rule, nb): assert rule(nb, '05_bad')


def test_every_rule_has_a_bad_example(): assert {r for r, _ in BAD} == set(RULES)


def with_output(text, **data):
    "A notebook of one cell that has shown something"
    return dict(cells=[dict(cell_type='code', id='a', source=[text], outputs=[dict(output_type='display_data', data=data)])])


def test_a_shown_figure_and_a_closed_gate_pass():
    assert not unshown(with_output("save_fig(fig, '05_good_what'); fig", **{'image/png': '...'}), '05_good')
    assert not unshown(with_output('play(wav, 16_000)', **{'text/html': '<audio controls>'}), '05_good')
    assert unshown(with_output("save_fig(fig, '05_good_what')", **{'text/html': '<audio controls>'}), '05_good')
    for later in ("if at_scale('slow'):\n    save_fig(fig, '05_good_what')", 'def on_click(_): play(wav, 16_000)'):
        assert not unshown(notebook(later), '05_good')


def test_a_folded_answer_passes():
    answer = '<details><summary>Answer</summary>The first.</details>'
    for good in (('> **Predict:** which is larger? ' + answer,), ('> Predict it.', 'x = 1', '> ' + answer), ('> GPT-2 predicts tokens. What it may predict, before you know it.',)):
        assert not unanswered(notebook(*good), '05_good'), good


def test_large_text_and_other_sizes_pass():
    for good in ('ax.legend(fontsize=8)', "ax.tick_params(labelsize='small')", 'ax.set_title(name, size=9)', 'rng.normal(size=5)', 'dict(size=x.shape[1])'):
        assert not small_text(notebook(good), '05_good'), good


def test_numbers_are_compared_as_they_are_rounded(tmp_path):
    (tmp_path/'05_good_run.json').write_text('{"loss": 0.8049, "right": 0.434}')
    good = notebook(TITLE + ' without 9.9', 'n = 2_540_000\nprint(n)', '> The loss is 0.80, 43% are right, 2.54 million weights (arXiv 2308.05734, sec. 3.2, `lr=.7`).')
    assert not unfounded_numbers(good, '05_good', tmp_path)
    assert len(unfounded_numbers(good, '06_else', tmp_path)) == 2
    assert len(unfounded_numbers(notebook('print(.8049)', '> 0.81, 0.805, 0.8'), '05_good', tmp_path)) == 1


def test_a_figure_must_carry_the_name_of_its_lesson(tmp_path):
    (tmp_path/'06_else_what.png').touch()
    assert missing_figures(notebook("save_fig(fig, '06_else_what')"), '05_bad', tmp_path)
    assert not missing_figures(notebook("save_fig(fig, '06_else_what')"), '06_else', tmp_path)


def test_letters_sort_between_numbers():
    floors = {'synth': (10, 'a')}
    assert upward_imports(notebook('#| default_exp audio', 'from audiorepro.synth import EVENTS'), '10_audio', floors)
    assert not upward_imports(notebook('#| default_exp sounds', 'from audiorepro.synth import EVENTS'), '11_sounds', floors)


def test_duplicates_fail():
    assert duplicate_default_exp({'05_a': notebook('#| default_exp a'), '06_b': notebook('#| default_exp a')})
    assert duplicate_default_exp({'05_a': notebook(), '05_b': notebook()})
    assert not duplicate_default_exp({'05_a': notebook('#| default_exp a'), '05a_b': notebook('#| default_exp b')})


def test_module_without_notebook_fails(tmp_path):
    (tmp_path/'stray.py').write_text('x = 1\n'); (tmp_path/'__init__.py').touch()
    assert modules_without_notebook(tmp_path, {'05_a': notebook('#| default_exp a')}) == ['stray.py has no notebook']


def test_undefined_name_fails(tmp_path):
    (tmp_path/'bad.py').write_text('def collate(b): return b[:bs]\n')
    assert ruff(tmp_path)
    (tmp_path/'bad.py').write_text('def collate(b, bs): return b[:bs]\n')
    assert not ruff(tmp_path)
    gated = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('if 1 > 2: print(steps)')])
    nbformat.write(gated, tmp_path/'gated.ipynb')
    assert ruff(tmp_path, 'F821')


def test_long_module_and_big_file_fail(tmp_path):
    (tmp_path/'long.py').write_text('x = 1\n'*401)
    assert long_modules(tmp_path) and big_files([tmp_path/'long.py'], 1)
    (tmp_path/'long.py').write_text('def f(\n    x, # one\n):\n    "Do"\n' + '    x = 1\n'*395)
    assert not long_modules(tmp_path)
    (tmp_path/'long.py').write_text(export.dress((tmp_path/'long.py').read_text()))
    assert len((tmp_path/'long.py').read_text().split('\n')) > MODULE_LINES and not long_modules(tmp_path)  # not counted


def test_edited_module_fails(tmp_path):
    package, path = tmp_path/'package', tmp_path/'05_good.ipynb'
    package.mkdir(); path.write_text(json.dumps(GOOD | dict(metadata={}, nbformat=4, nbformat_minor=5)))
    assert out_of_step(path, package, tmp_path) == ['good.py was never exported']
    (package/'good.py').write_text((tmp_path/'good.py').read_text())
    assert not out_of_step(path, package, tmp_path)
    with open(package/'good.py', 'a') as f: f.write('# edited by hand\n')
    assert out_of_step(path, package, tmp_path)


def test_changed_code_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, 'NBS', tmp_path); monkeypatch.setattr(lessons, 'HASHES', tmp_path/'outputs.json')
    path = tmp_path/'05_good.ipynb'
    path.write_text(json.dumps(GOOD))
    assert lessons.stale() == ['05_good']
    lessons.record_hash(path)
    assert lessons.stale() == []
    path.write_text(json.dumps(notebook(TITLE, 'x = 2')))
    assert lessons.stale() == ['05_good']


def test_kept_outputs_do_not_depend_on_the_run(tmp_path, monkeypatch):
    "Bars go, one text stays one text in however many pieces it came, and places are named alike on every machine"
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'mine'))
    said = lambda text, name='stdout': nbformat.v4.new_output('stream', name=name, text=text)
    shown = lambda **data: nbformat.v4.new_output('display_data', data=data)
    outputs = [said('one\n'), said('a warning', 'stderr'), said(f'saved to {(tmp_path/"mine").resolve()}/a.wav\n'),
               shown(**{'text/plain': '  0%|          | 0/2 [00:00<?, ?it/s]'}), shown(**{'text/plain': '50%', 'image/png': 'x'}), said('two\n')]
    [cell] = lessons.tidy(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('go()', outputs=outputs)])).cells
    first, picture, last = cell.outputs
    assert (first.text, last.text) == ('one\nsaved to out/a.wav\n', 'two\n') and picture.data['image/png'] == 'x'


def test_heavy_import_fails(): assert slow_import('import torch')

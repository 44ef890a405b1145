"""Work on the lessons: execute them and keep their outputs, and tell which are out of step.

    python tests/lessons.py run            # every lesson and solution, each in a fresh kernel
    python tests/lessons.py run 12 33      # these numbers only
    python tests/lessons.py tidy           # drop from kept outputs what no run should keep, without running anything
    python tests/lessons.py stale          # those whose outputs are older than their code, modules exported without docstrings
    python tests/lessons.py exercises      # make nbs/exercises from nbs/solutions
    python tests/lessons.py exercises --check  # only tell whether they are in step
"""
import argparse, fcntl, hashlib, json, os, re, tempfile, time
from pathlib import Path

from export import undressed

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
HASHES = NBS/'outputs.json'
NOISE = re.compile(r'0x[0-9a-f]{6,}')
REST = re.compile(r'[^\n]*\d+%\|[^\n]*\[[^\n]*\]|PosixPath\([^\n]*\)')  # left of a progress bar without its widget, and what `save_fig` returns


def lessons(numbers=()):
    "Lessons and solutions in teaching order, or only those whose file name starts with one of `numbers`"
    paths = [p for folder in (NBS, NBS/'solutions') for p in sorted(folder.glob('*.ipynb')) if not p.name.startswith('_')]
    if not numbers: return paths
    chosen = [p for p in paths if any(p.name == f'{n}.ipynb' or p.stem == n or p.name.startswith(f'{n}_') for n in numbers)]
    if not chosen: raise SystemExit(f'no lesson starts with any of {list(numbers)}')
    return chosen


def key(path): return path.relative_to(NBS).with_suffix('').as_posix()  # '12_mel', 'solutions/12_mel'


def code_hash(path):
    "Hash of a notebook's own code cells: changes exactly when its outputs may be out of date"
    cells = json.loads(path.read_text())['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return hashlib.sha256('\n#---\n'.join(code).encode()).hexdigest()[:16]


def record_hash(path):
    "Note in nbs/outputs.json that the kept outputs of `path` belong to its present code"
    with open(Path(tempfile.gettempdir())/'audiorepro-outputs.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(HASHES.read_text()) if HASHES.exists() else {}
        known[key(path)] = code_hash(path)
        HASHES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + '\n')


def stale():
    "Lessons whose kept outputs do not belong to their present code"
    known = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    return [key(p) for p in lessons() if known.get(key(p)) != code_hash(p)]


def anonymous(text):
    "Without addresses in memory, without the places of the checkout, of `AUDIOREPRO_OUT` and of temporary folders"
    if place := os.environ.get('AUDIOREPRO_OUT'): text = text.replace(str(Path(place).resolve()) + os.sep, f'out{os.sep}')
    text = NOISE.sub('0x…', text).replace(str(ROOT) + os.sep, '')
    return re.sub(re.escape(tempfile.gettempdir() + os.sep) + r'tmp\w+', '…', text)


def tidy(nb):
    "Drop what changes from run to run: counts, timings, progress bars, widget state, machine paths"
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    for cell in nb.cells:
        cell.metadata = {}
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        kept = []
        for out in cell.outputs:
            if out.output_type == 'stream' and out.name == 'stderr': continue
            if out.output_type == 'execute_result': out.execution_count = None
            if 'metadata' in out: out.metadata = {}
            if 'data' in out:
                out.data.pop('application/vnd.jupyter.widget-view+json', None)
                if not out.data or set(out.data) == {'text/plain'} and REST.fullmatch(out.data['text/plain'].strip()): continue
                if 'text/plain' in out.data: out.data['text/plain'] = anonymous(out.data['text/plain'])
            if out.output_type == 'stream': out.text = anonymous(out.text)
            if kept and 'stream' == out.output_type == kept[-1].output_type: kept[-1].text += out.text  # one text, in however many pieces it came
            else: kept.append(out)
        cell.outputs = kept
    return nb


def execute(path, timeout=900):
    "Run one lesson in a fresh kernel, in order, and keep its outputs; nothing is written if a cell fails"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    start = time.time()
    NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(NBS)}}).execute()
    path.write_text(json.dumps(tidy(nb), indent=1, ensure_ascii=False, sort_keys=True) + '\n')
    record_hash(path)
    return time.time() - start


def tidy_kept(path):
    "Tidy a notebook's kept outputs without running it; whether anything changed"
    import nbformat
    before = path.read_text()
    after = json.dumps(tidy(nbformat.read(path, 4)), indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if changed := json.loads(before) != json.loads(after): path.write_text(after)
    return changed


BEGIN, END = '### BEGIN SOLUTION', '### END SOLUTION'
ANSWER = re.compile(rf'^( *){BEGIN}\n.*?^\1{END}$', re.M | re.S)

def stub(source):
    "A student's cell: each answer becomes a line that raises"
    out = ANSWER.sub(r"\1raise NotImplementedError('your turn')", source)
    if BEGIN in out or END in out: raise ValueError(f'unpaired or differently indented solution markers in:\n{source}')
    if out != source and not source.startswith('#| exercise'): raise ValueError(f"a cell with an answer must start with '#| exercise':\n{source}")
    return out


def exercise_text(path):
    "What the exercise notebook of one solution notebook must hold"
    nb = json.loads(path.read_text())
    for cell in nb['cells']:
        cell['metadata'] = {}
        if cell['cell_type'] != 'code': continue
        cell |= dict(source=stub(''.join(cell['source'])).splitlines(True), outputs=[], execution_count=None)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def exercises(check=False):
    "Make nbs/exercises from nbs/solutions; with `check` write nothing. Returns the names that were out of step"
    wanted = {p.name: exercise_text(p) for p in sorted((NBS/'solutions').glob('*.ipynb')) if not p.name.startswith('_')}
    folder = NBS/'exercises'
    late = [n for n, text in wanted.items() if not (folder/n).exists() or (folder/n).read_text() != text]
    surplus = [p.name for p in folder.glob('*.ipynb') if p.name not in wanted]
    if not check:
        folder.mkdir(exist_ok=True)
        for name in late: (folder/name).write_text(wanted[name])
        for name in surplus: (folder/name).unlink()
    return sorted(late + surplus)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['run', 'stale', 'tidy', 'exercises'])
    parser.add_argument('numbers', nargs='*', help='of lessons to run')
    parser.add_argument('--check', action='store_true', help='of exercises: write nothing, fail when they are out of step')
    args = parser.parse_args()
    if args.what == 'exercises':
        late = exercises(args.check)
        if late and args.check: raise SystemExit(f"not in step with nbs/solutions: {', '.join(late)}; run `python tests/lessons.py exercises`")
        return print(f"exercises: {', '.join(late) or 'nothing'} {'to make' if args.check else 'made anew'}")
    if args.what == 'stale':
        late = stale()
        if late: raise SystemExit(f"outputs older than code: {', '.join(late)}; run `make notebooks`")
        if bare := undressed(): raise SystemExit(f"exported by nbdev alone, without docstrings: {', '.join(bare)}; run `make export`")
        return print('all outputs belong to the present code, all docstrings to their signatures')
    if args.what == 'tidy': return print('tidied:', ', '.join(key(p) for p in lessons(args.numbers) if tidy_kept(p)) or 'nothing')
    os.environ['AUDIOREPRO_KEEP'] = '1'  # pictures and results go into figures/, not to out/
    for path in lessons(args.numbers):
        print(f'{key(path)}: {execute(path):.1f} s', flush=True)


if __name__ == '__main__': main()

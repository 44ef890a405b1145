"""Export the lessons into the package, then let `help(f)` say what the comments of a signature say.

    python tests/export.py          # nbdev_export, then a docstring with arguments for each public name (make export)
    python tests/export.py --check  # write nothing; tell what of the package differs from such an export

The notebooks stay the source: a docstring has one line there, and each parameter its comment (a "docment"). In the package
the same words follow once more in the docstring, in numpy's form, which `help`, editors and Sphinx read.
"""
import argparse, ast, io, os, re, shutil, subprocess, sys, tempfile, tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = re.compile(r'\s*^ *(Parameters|Returns)\n *-+$.*', re.M | re.S)  # the part of a docstring that is written here


# --- reading --------------------------------------------------------------------------------------------------------

def comments(text):
    "Line number -> what its comment says"
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip('#').strip() for t in found if t.type == tokenize.COMMENT}


def documented(tree):
    "Public functions and classes, and the public and special methods of the latter"
    is_kind = lambda n: isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    for node in tree.body:
        if not is_kind(node) or node.name.startswith('_'): continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from (n for n in node.body if is_kind(n) and n.name != '__init__' and not re.match('_(?!_)', n.name))


def arguments(node):
    "(name as in the call, `ast.arg`, default) of a function, without `self` and `cls`"
    a, positional = node.args, node.args.posonlyargs + node.args.args
    defaults = [None]*(len(positional) - len(a.defaults)) + a.defaults
    found = [(p.arg, p, d) for p, d in zip(positional, defaults)]
    if a.vararg: found.append(('*' + a.vararg.arg, a.vararg, None))
    found += [(p.arg, p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append(('**' + a.kwarg.arg, a.kwarg, None))
    return found[found[0][0] in ('self', 'cls'):] if found else []


def parameters(node, text, said):
    "(head, comment) of each parameter; a comment counts where the parameter has a line of its own"
    if isinstance(node, ast.ClassDef): return fields(node, text, said)
    found, last_line = arguments(node), end_of_signature(node, text)
    count = Counter(p.lineno for _, p, _ in found)
    own = lambda p: said.get(p.lineno, '') if count[p.lineno] == 1 and p.lineno != last_line else ''
    return [(head(name, p.annotation, default, text), own(p)) for name, p, default in found]


def fields(node, text, said):
    "What builds an object: the fields of a dataclass, or the parameters of `__init__`"
    if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
        return [(head(f.target.id, f.annotation, f.value, text), said.get(f.end_lineno, '')) for f in node.body
                if isinstance(f, ast.AnnAssign) and 'ClassVar' not in ast.unparse(f.annotation)]
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    return parameters(init, text, said) if init else []


def head(name, annotation, default, text):
    "`name : type, default=value`, as written in the signature"
    kind = [ast.get_source_segment(text, annotation)] if annotation else []
    if default: kind.append(f'default={ast.get_source_segment(text, default)}')
    return name + (f" : {', '.join(kind)}" if kind else '')


def end_of_signature(node, text):
    "Number of the line with the closing bracket"
    if node.returns: return node.returns.end_lineno
    lines, start = text.split('\n'), max([node.lineno, *(p.end_lineno for _, p, _ in arguments(node))])
    return next((i for i in range(start, node.body[0].lineno) if lines[i - 1].lstrip().startswith(')')), start)


def returned(node, text, said):
    "(type, comment) of what a function returns; none where nothing is said"
    if isinstance(node, ast.ClassDef): return []
    line = end_of_signature(node, text)
    if line not in said or not (node.returns or line > node.lineno): return []
    if node.returns: return [(ast.get_source_segment(text, node.returns), said[line])]
    return [(said[line], '')]


# --- writing --------------------------------------------------------------------------------------------------------

def section(title, rows):
    "Lines of one part of a docstring; none where no row is explained"
    if not rows: return []
    return ['', title, '-'*len(title), *(line for name, said in rows for line in (name, *([f'    {said}'] if said else [])))]


def sections(node, text, said):
    "Lines that follow the summary; none where the signature has no comments"
    rows = parameters(node, text, said)
    return section('Parameters', rows if any(c for _, c in rows) else []) + section('Returns', returned(node, text, said))


def replace(text, edits):
    "Put lines in place of others; `edits`: (first line, line behind the last, new lines)"
    lines = text.split('\n')
    for first, behind, new in sorted(edits, key=lambda e: e[0], reverse=True): lines[first - 1:behind - 1] = new
    return '\n'.join(lines)


def undress(text):
    "A module as nbdev wrote it: without the parts of docstrings that `dress` adds"
    edits = []
    for node in documented(ast.parse(text)):
        doc, place = ast.get_docstring(node, clean=False), node.body[0]
        if not doc or not MADE.search(doc): continue
        summary = MADE.sub('', doc)
        quote = '"""' if '\n' in summary else "'" if '"' in summary else '"'
        edits.append((place.lineno, place.end_lineno + 1, [' '*place.col_offset + quote + escape(summary) + quote]*bool(summary)))
    return replace(text, edits)


def escape(text): return text.replace('\\', '\\\\').replace('"""', r'\"\"\"')


def dress(text):
    "A module whose public names say in the docstring what the comments of their signature say; twice gives the same as once"
    text, edits = undress(text), []
    said = comments(text)
    for node in documented(ast.parse(text)):
        lines, place = sections(node, text, said), node.body[0]
        if not lines or text.split('\n')[place.lineno - 1][:place.col_offset].strip(): continue  # all on one line: no room
        summary, indent = (ast.get_docstring(node, clean=False) or '').rstrip(), ' '*place.col_offset
        below = [(indent + line).rstrip() for line in (lines if summary else lines[1:])]
        words = '\n'.join([summary, *below] if summary else below).lstrip()
        new = [*f'{indent}"""{escape(words)}'.split('\n'), f'{indent}"""']
        start = min([place.lineno, *(d.lineno for d in getattr(place, 'decorator_list', []))])
        edits.append((start, place.end_lineno + 1 if summary else start, new))
    return replace(text, edits)


# --- the package ----------------------------------------------------------------------------------------------------

def modules(package):
    "Modules that notebooks made"
    return sorted(p for p in package.glob('*.py') if not p.name.startswith('_'))


def export(root=ROOT):
    "What `make export` does in the checkout `root`"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # nbdev would do nothing
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=root, env=env, check=True)
    for path in modules(root/'audiorepro'): path.write_text(dress(path.read_text(encoding='utf-8')), encoding='utf-8')


def late(root=ROOT):
    "Names of the modules that a fresh export of the notebooks would change, make or not make"
    with tempfile.TemporaryDirectory() as folder:
        new, package = Path(folder)/root.name, root/'audiorepro'
        shutil.copytree(root/'nbs', new/'nbs')
        shutil.copy(root/'settings.ini', new)
        (new/'audiorepro').mkdir()
        for path in package.glob('__*.py'): shutil.copy(path, new/'audiorepro')
        export(new)
        read = lambda place: {p.name: p.read_bytes() for p in (place/'audiorepro').glob('*.py')}
        made, kept = read(new), read(root)
    return sorted(n for n in made.keys() | kept.keys() if made.get(n) != kept.get(n))


def undressed(root=ROOT):
    "Modules that were exported by nbdev alone"
    return [p.stem for p in modules(root/'audiorepro') if p.read_text(encoding='utf-8') != dress(p.read_text(encoding='utf-8'))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail when the package differs from its notebooks')
    if not parser.parse_args().check: return export()
    if found := late(): raise SystemExit(f"not in step with the notebooks: {', '.join(found)}; run `make export`")


if __name__ == '__main__': main()

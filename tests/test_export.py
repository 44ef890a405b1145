"The package is what `make export` makes of the notebooks; its docstrings say what the comments say; its first names come lazily"
import ast, importlib, inspect, json, pydoc, shutil, subprocess, sys
from pathlib import Path

import export, lessons, pytest
from fastcore.docments import docments
from fastcore.docscrape import NumpyDocString

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'audiorepro'
MODULES = [p.stem for p in export.modules(PACKAGE)]


def project(folder, *names):
    "A small checkout: settings, the package without its modules, and these lessons"
    for sub in ('nbs', 'audiorepro'): (folder/sub).mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', folder)
    shutil.copy(PACKAGE/'__init__.py', folder/'audiorepro')
    for name in names: shutil.copy(ROOT/'nbs'/f'{name}.ipynb', folder/'nbs')
    return folder


def public(module):
    "Functions and classes that a module of ours defines and offers"
    found = (getattr(module, n) for n in module.__all__)
    return [o for o in found if (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__ == module.__name__]


# --- the export -----------------------------------------------------------------------------------------------------

def test_package_is_the_export_of_the_notebooks():
    "Byte for byte, index and version included"
    assert export.late() == []


def test_a_module_edited_by_hand_or_left_over_is_found(tmp_path):
    root = project(tmp_path/'course', '20_layers', '50a_order')
    export.export(root)
    assert sorted(p.name for p in (root/'audiorepro').iterdir()) == ['__init__.py', '_modidx.py', 'layers.py', 'order.py']
    assert export.late(root) == [] and export.undressed(root) == []
    layers, order = (root/'audiorepro'/f'{n}.py' for n in ('layers', 'order'))
    kept = layers.read_text()
    layers.write_text(kept.replace('default=', 'default ', 1))
    (root/'audiorepro/stray.py').write_text('x = 1\n')
    order.unlink()
    assert export.late(root) == ['layers.py', 'order.py', 'stray.py']
    export.export(root)
    assert layers.read_text() == kept and export.late(root) == ['_modidx.py', 'stray.py']  # the index names the stray one


def test_plain_nbdev_export_is_told(tmp_path, monkeypatch, capsys):
    root = project(tmp_path/'course', '50a_order')
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=root, check=True)
    assert export.undressed(root) == ['order']
    monkeypatch.setattr(lessons, 'undressed', lambda: export.undressed(root))
    monkeypatch.setattr(lessons, 'stale', lambda: [])
    monkeypatch.setattr(sys, 'argv', ['lessons.py', 'stale'])
    with pytest.raises(SystemExit, match='order; run `make export`'): lessons.main()
    export.export(root)
    lessons.main()
    assert 'docstrings' in capsys.readouterr().out


@pytest.mark.parametrize('name', MODULES)
def test_only_docstrings_are_written(name):
    "Undressed, a module is nbdev's; dressed twice, it is dressed once; the code is the same code"
    kept = (PACKAGE/f'{name}.py').read_text(encoding='utf-8')
    bare = export.undress(kept)
    assert export.dress(bare) == kept == export.dress(kept) and export.undress(bare) == bare
    assert '    ----------\n' not in bare
    def code(text):
        tree = ast.parse(text)
        for n in ast.walk(tree):
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n) is not None: n.body = n.body[1:] or [ast.Pass()]
        return ast.dump(tree)
    assert code(bare) == code(kept)


# --- what is written ------------------------------------------------------------------------------------------------

LESSON = '''def mix(
    wav:Tensor, # `(B, samples)` in [-1, 1], "loud" or not
    *others, # more of them
    gain:float=.5, # factor, \\\\ 0 .. 1
    plain=None,
    **options, # see `play`
)->Tensor: # `(B, samples)`
    "Add sounds (sec. 2)"
    return wav

def plot(
    x, # what to draw
): # matplotlib figure
    "Draw"

def bare(x): return x  # a remark

def talk(
    x, # said
):
    """Say more

    In a second paragraph."""

def _private(
    x, # hidden
):
    "Stay as it is"

@dataclass
class Box(Config):
    "A box"
    width:float=1. # m, > 0
    kind:ClassVar=0 # not an argument

    @property
    def area(self)->float: # m**2
        return self.width**2

class Net:
    "A net"
    size = 3 # not an argument
    def __init__(self,
        cfg:Box, # its settings
    ):
        self.cfg = cfg
    def __call__(self,
        x:Tensor, # `(B, 3)`
    )->Tensor: # `(B, 1)`
        def inner(
            y, # not public
        ):
            "Not public"
        return x
'''


def test_example_word_by_word():
    tree = ast.parse(export.dress(LESSON))
    mix, plot, bare, talk, private, box, net = tree.body
    assert ast.get_docstring(mix) == '''Add sounds (sec. 2)

Parameters
----------
wav : Tensor
    `(B, samples)` in [-1, 1], "loud" or not
*others
    more of them
gain : float, default=.5
    factor, \\\\ 0 .. 1
plain : default=None
**options
    see `play`

Returns
-------
Tensor
    `(B, samples)`'''
    assert ast.get_docstring(plot) == 'Draw\n\nParameters\n----------\nx\n    what to draw\n\nReturns\n-------\nmatplotlib figure'
    assert ast.get_docstring(talk) == 'Say more\n\nIn a second paragraph.\n\nParameters\n----------\nx\n    said'
    assert ast.get_docstring(bare) is None and ast.get_docstring(private) == 'Stay as it is'
    assert ast.get_docstring(box) == 'A box\n\nParameters\n----------\nwidth : float, default=1.\n    m, > 0'
    assert ast.get_docstring(box.body[-1]) == 'Returns\n-------\nfloat\n    m**2'
    assert ast.get_docstring(net) == 'A net\n\nParameters\n----------\ncfg : Box\n    its settings'
    init, call = net.body[-2:]
    assert ast.get_docstring(init) is None
    assert ast.get_docstring(call) == 'Parameters\n----------\nx : Tensor\n    `(B, 3)`\n\nReturns\n-------\nTensor\n    `(B, 1)`'
    assert ast.get_docstring(call.body[1]) == 'Not public'
    assert export.undress(export.dress(LESSON)) == LESSON and export.dress(export.dress(LESSON)) == export.dress(LESSON)


def test_a_changed_comment_reaches_a_dressed_module():
    dressed = export.dress(LESSON)
    assert export.dress(dressed.replace('# what to draw', '# what to paint')) == export.dress(LESSON.replace('what to draw', 'what to paint'))
    assert 'matplotlib' not in ast.get_docstring(ast.parse(export.dress(dressed.replace('): # matplotlib figure', '):'))).body[1])


@pytest.mark.parametrize('name', MODULES)
def test_docstrings_say_what_fastcore_reads(name):
    "An independent reader of docments finds the same words, and the numpy reader the same arguments"
    for o in public(importlib.import_module(f'audiorepro.{name}')):
        if inspect.isclass(o): continue
        said = {k: v for k, v in docments(o, args_kwargs=True).items() if v}
        found = {p.name.lstrip('*'): '\n'.join(p.desc) for p in NumpyDocString(inspect.getdoc(o))['Parameters'].values()}
        assert [*found] == [*inspect.signature(o).parameters], o.__name__  # all of them, in order
        assert found == {k: v for k, v in said.items() if k != 'return'}, o.__name__
        if 'return' in said: assert inspect.getdoc(o).endswith(f"    {said['return']}"), o.__name__


@pytest.mark.parametrize('name, words', [
    ('audiorepro.mel.log_mel', ['Parameters', 'wav : Tensor', 'Returns', 'natural log']),
    ('audiorepro.mel.MelConfig', ['sample_rate : int, default=16_000', 'Hz']),
    ('audiorepro.audioldm2.AudioLDM2', ['halves : TextToLatent', 'what was trained for the task']),
    ('audiorepro.audioldm2.AudioLDM2.from_pretrained', ['`"toy"`, `"mine"`, a folder of ours']),
    ('audiorepro.audioldm2.AudioLDM2.__call__', ['negative_prompt : str|list|None, default=None', 'what to move away from', 'DDIM steps']),
])
def test_help_explains_the_arguments(name, words):
    text = pydoc.render_doc(pydoc.locate(name), renderer=pydoc.plaintext)
    assert not [w for w in words if w not in text], text


# --- the first names ------------------------------------------------------------------------------------------------

def test_first_names_are_lazy():
    "`import audiorepro` and `dir` load nothing; `from audiorepro import name` gives the lesson's own object"
    code = ('import sys, json, audiorepro; names = dir(audiorepro); heavy = {"torch", "numpy", "transformers"} & set(sys.modules); '
            'ours = [m for m in sys.modules if m.startswith("audiorepro.")]; print(json.dumps([names, sorted(heavy), ours]))')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    names, heavy, ours = json.loads(out)
    assert {'AudioLDM2', 'VAE', 'AudioMAE', 'CLAP', 'T5', 'GPT2', 'UNet', 'Judge', 'sample_ddim', 'toy_set', 'load_audio', 'log_mel'} <= set(names)
    assert not heavy and not ours


def test_first_names_are_those_of_the_lessons():
    import audiorepro
    for name, module in audiorepro._MODULE_OF.items():
        assert getattr(audiorepro, name) is getattr(importlib.import_module(f'audiorepro.{module}'), name)
    with pytest.raises(AttributeError, match="'Vae'.*it offers AudioLDM2, Tango"): audiorepro.Vae
    with pytest.raises(ImportError): from audiorepro import no_such_name


def test_package_is_typed(): assert (PACKAGE/'py.typed').is_file() and "'py.typed'" in (ROOT/'setup.py').read_text()

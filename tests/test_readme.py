"README says what is true: its commands parse, its targets and links exist, its Python runs, and the wheel carries what it needs"
import json, re, shlex, subprocess, sys
from pathlib import Path

import pytest, torch

from audiorepro.audio import save_audio
from audiorepro.audioldm2 import AudioLDM2

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT/'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.S)
SHELL = [line.split('  #')[0].strip() for kind, body in BLOCKS if kind == 'sh' for line in body.splitlines() if line.strip()]


def test_commands_parse():
    from audiorepro.cli import make_parser
    mine = [line for line in SHELL if re.match(r'(\.venv/bin/)?audiorepro ', line)]
    assert len(mine) >= 4
    for line in mine: make_parser().parse_args(shlex.split(line)[1:])


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT/'Makefile').read_text(), re.M))
    named = set(re.findall(r"(?<!\w)make ([\w-]+)", README))
    assert {'tour', 'test', 'train', 'lab', 'check', 'notebooks', 'weights'} <= targets
    assert named and named <= targets, named - targets


def test_links_exist():
    texts = [ROOT/'README.md', *ROOT.glob('nbs/*.ipynb')]
    for path in texts:
        text = path.read_text()
        if path.suffix == '.ipynb':
            text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\(([^)#\s]+)', text):
            if not re.match(r'https?:|mailto:|attachment:', link): assert (path.parent/link).exists(), f'{path.name}: {link}'


def test_python_snippet(tmp_path):
    code = next(body for kind, body in BLOCKS if kind == 'python').replace('num_inference_steps=50', 'num_inference_steps=2')
    names = {}
    exec(code, names)
    assert names['wav'].shape == (1, 40_960) and names['wavs'].shape == (2, 40_960)


def test_own_data_snippet(tmp_path, monkeypatch):
    "The second block of Python, on three tones, for two steps: the folder speaks afterwards"
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path/'out'))
    for i in range(3):
        save_audio(tmp_path/'my_sounds'/f'{i}.wav', .3*torch.sin(torch.arange(40_960)*(.02 + .02*i)), 16_000)
        (tmp_path/'my_sounds'/f'{i}.txt').write_text('a siren wails')
    code = [body for kind, body in BLOCKS if kind == 'python'][1]
    assert code.count('minutes=5') == 1
    names = {}
    exec(code.replace('minutes=5', 'steps=2').replace('seed=0', 'seed=0, num_inference_steps=2'), names)
    again = AudioLDM2.from_pretrained('out/own/my_sounds')('a siren wails', seed=0, num_inference_steps=2)
    assert names['wav'].shape == (1, 40_960) and (again - names['wav']).abs().max() < .1


def test_wheel_works_outside_the_checkout(tmp_path):
    "Build the wheel, install it elsewhere, and let it speak from there"
    run = lambda *args, **kw: subprocess.run([sys.executable, *map(str, args)], check=True, capture_output=True, text=True, **kw)
    run('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', tmp_path, ROOT)
    wheel, = tmp_path.glob('*.whl')
    assert wheel.stat().st_size < 45e6
    site = tmp_path/'site'
    run('-m', 'pip', 'install', '--no-deps', '-q', '--target', site, wheel)
    assert (site/'audiorepro/py.typed').exists()
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import audiorepro; assert audiorepro.__file__.startswith(sys.argv[1]), audiorepro.__file__; '
            'from audiorepro.cli import main; sys.exit(main(["say", "a dog barks", "--out", "dog.wav", "--steps", "2"]))')
    run('-c', code, site, cwd=tmp_path)
    assert (tmp_path/'dog.wav').stat().st_size > 40_960


def test_quality_table_is_what_was_measured():
    "Each number of the README's table stands in the stored examination, with its interval and n"
    found = json.loads((ROOT/'figures/53a_quality_scores.json').read_text())['results']['text']
    keys = ('single', 'single_strict', 'both_then', 'then_strict', 'both_while', 'while_strict', 'order', 'slot', 'pitch', 'speed',
            'loudness', 'instrument', 'tempo', 'mode', 'register')
    for split in ('train', 'heldout'):
        for key in keys:
            r = found[split][key]
            text = f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}] of {r['n']}"
            assert text in README, f'{key}, {split}: the README does not say {text}'

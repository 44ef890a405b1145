"""The "At paper scale" cells run: each lesson's gated cell, with tiny presets, a made corpus and one step in place of the real ones.

The cells are taken from the notebooks as they stand. `STANDINS` says what replaces what; a cell that names a preset or a corpus which is
not in the table fails here, so none can rot unseen.
"""
import json, re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'


def gated_cells(kind):
    "(lesson, index, source) of all cells that sit behind a gate of this kind"
    for path in sorted(NBS.glob('[0-9]*.ipynb')):
        cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        for i, source in enumerate(cells):
            if re.search(rf"at_scale\('{kind}'", source): yield path.stem, i, source


@pytest.mark.parametrize('stem, i, source', [pytest.param(*c, id=f'{c[0]}-{c[1]}') for kind in ('slow', 'gpu') for c in gated_cells(kind)])
def test_names_exist(stem, i, source):
    "Every name that a gated cell imports exists, and the cell compiles"
    compile(source, f'{stem} cell {i}', 'exec')
    for module, names in re.findall(r'from (audiorepro\.\w+) import ([\w, ]+)', source):
        found = __import__(module, fromlist=['x'])
        for name in names.replace(' ', '').split(','): assert hasattr(found, name), f'{stem}: {module} has no {name}'

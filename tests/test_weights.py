"What ships: small, whole, finite, and with a note of how it was made"
import json

import pytest, torch

from audiorepro.core import WEIGHTS, read_safetensors

FOLDERS = sorted(p.parent for p in WEIGHTS.glob('*/config.json'))
NEEDED = {'vae', 'audiomae', 'clap', 'clap_score', 't5', 'ldm', 'loa', 'audioldm2', 'judge', 'codec', 'tokenlm', 'tango'}


def test_complete_and_small():
    assert {f.name for f in FOLDERS} == NEEDED
    assert sum(f.stat().st_size for folder in FOLDERS for f in folder.iterdir()) < 45e6


@pytest.mark.parametrize('parts, limit', [(('codec', 'tokenlm'), 8e6), (('tango',), 12e6)])
def test_a_system_stays_small(parts, limit):
    assert sum(f.stat().st_size for part in parts for f in (WEIGHTS/part).iterdir()) < limit


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda f: f.name)
def test_note_and_tensors(folder):
    note = json.loads((folder/'training.json').read_text())
    assert {'recipe', 'steps', 'seed', 'dtype', 'device', 'threads', 'losses', 'seconds'} <= set(note), sorted(note)
    for name, value in read_safetensors(folder/'model.safetensors').items():
        assert torch.isfinite(value).all(), name
        assert not value.is_floating_point() or value.dtype == torch.float16, (name, value.dtype)

"""Checkpoints of strangers: no code that lies in a folder is run, whatever is answered at the keyboard."""
import json

import pytest

from audiorepro.text import HFTokenizer, find_tokenizer

EVIL = """from pathlib import Path
Path({canary!r}).write_text('ran')
from transformers import PreTrainedTokenizer
class Evil(PreTrainedTokenizer): pass
"""
ENTRIES = dict(HFTokenizer=HFTokenizer.from_pretrained, find_tokenizer=lambda folder: find_tokenizer([folder], 'no/such'))


@pytest.fixture
def evil(tmp_path):
    "A folder whose tokeniser is code: `(folder, the file that the code would write)`"
    folder, canary = tmp_path/'evil', tmp_path/'canary'
    folder.mkdir()
    (folder/'evil.py').write_text(EVIL.format(canary=str(canary)))
    mapped = dict(AutoTokenizer=['evil.Evil', None])
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='Evil', auto_map=mapped)))
    (folder/'config.json').write_text(json.dumps(dict(model_type='evil', auto_map=mapped | dict(AutoConfig='evil.Evil'))))
    return folder, canary


@pytest.mark.parametrize('entry', ENTRIES)
def test_no_code_of_a_folder_is_run(evil, entry, monkeypatch):
    folder, canary = evil
    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    with pytest.raises(ValueError, match='no code of a checkpoint is run'): ENTRIES[entry](folder)
    assert not canary.exists()


def test_the_canary_sings(evil, monkeypatch):
    "The same folder does run its code where somebody says yes: the test above can fail"
    folder, canary = evil
    from transformers import AutoTokenizer
    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    with pytest.raises(Exception): AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists()

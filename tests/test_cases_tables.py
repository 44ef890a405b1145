"""Tables that strangers write: one table of cases, each with the right value or with the words of its error.

A case is `(name, file, content, wanted, options)`. `content` is text or bytes of the table `file`, beside which lie `a.wav` (1 s) and
`b.wav` (0.5 s). `wanted` is a list of `(id, captions, columns)`, or a tuple of words that the ValueError must hold besides the file's name.
"""
import contextlib, json, resource, time

import numpy as np
import pytest, soundfile

from audiorepro.corpora import audiocaps, bbc_effects, clotho, esc50, fsd50k, musiccaps, vggsound
from audiorepro.datasets import CaptionedAudio, lazy_record, read_folder, read_table
from audiorepro.tables import as_number, read_rows

RATE = 16_000
TONE = .3*np.sin(.17*np.arange(RATE))
HEAD = 'audio,caption\n'
A = [('a', ('x',), {})]
APOSTROPHE = HEAD + 'a.wav,it\u2019s a dog\n'
SAID = [('a', ('it\u2019s a dog',), {})]


def lines(*rows): return ''.join(json.dumps(row) + '\n' for row in rows)
def one(**row): return dict(audio='a.wav', caption='x') | row
def with_column(name, value): return [('a', ('x',), {name: value})]


CASES = [
    # a user's columns and ours
    *((f'column {name}', 'own.csv', f'audio,caption,{name}\na.wav,x,0.25\n', with_column(name, '0.25'))
      for name in ('labels', 'label', 'duration', 'path', 'captions', 'meta', 'seconds', 'columns', 'id', 'wav', 'sample_rate', 'self')),
    ('column duration in JSON', 'own.jsonl', lines(one(duration=.25)), with_column('duration', .25)),
    ('columns of any kind', 'own.json', json.dumps([one(labels=['dog'], meta={'a': 1})]), [('a', ('x',), dict(labels=['dog'], meta={'a': 1}))]),
    # endings
    ('capitals', 'UP.CSV', HEAD + 'a.wav,x\n', A), ('tabs', 'a.tsv', 'audio\tcaption\na.wav\tx, y\n', [('a', ('x, y',), {})]),
    ('TSV in capitals', 'a.TSV', 'audio\tcaption\na.wav\tx\n', A), ('semicolons', 'a.csv', 'audio;caption\na.wav;x, y\n', [('a', ('x, y',), {})]),
    ('tabs in a CSV', 'a.csv', 'audio\tcaption\na.wav\tx\n', A), ('JSON in capitals', 'a.JSON', json.dumps([one()]), A),
    ('ndjson', 'a.ndjson', lines(one()), A), ('other ending', 'a.xlsx', HEAD, ('must end in', '.csv')), ('no ending', 'table', HEAD, ('must end in',)),
    # commas, quotes, short and long rows
    ('quoted comma', 'a.csv', HEAD + 'a.wav,"a dog, then rain"\n', [('a', ('a dog, then rain',), {})]),
    ('doubled quotes', 'a.csv', HEAD + 'a.wav,"he says ""sit"""\n', [('a', ('he says "sit"',), {})]),
    ('quotes inside', 'a.csv', HEAD + 'a.wav,a 5" shell\n', [('a', ('a 5" shell',), {})]),
    ('line break in quotes', 'a.csv', HEAD + 'a.wav,"a dog,\nthen rain"\nb.wav,x\n', [('a', ('a dog,\nthen rain',), {}), ('b', ('x',), {})]),
    ('blank behind commas', 'a.csv', 'audio, caption, by\na.wav, "x, y", me\n', [('a', ('x, y',), dict(by='me'))]),
    ('unquoted comma', 'a.csv', HEAD + 'b.wav,x\na.wav,a dog barks, then rain\n', ('row 2', 'line 3', '3 values for 2 columns')),
    ('unquoted comma, index in front', 'a.csv', ',audio,caption\n0,a.wav,a dog, then rain\n', ('row 1', '4 values for 3 columns')),
    ('unquoted comma below a trailing one', 'a.csv', 'audio,caption,\na.wav,a dog, then rain\n', ('row 1', '3 values for 2 columns')),
    ('index of pandas', 'a.csv', ',audio,caption\n0,a.wav,x\n', with_column('', '0')),
    ('trailing commas', 'a.csv', 'audio,caption,,\na.wav,x,,\n', A), ('short row', 'a.csv', HEAD + 'b.wav,x\na.wav\n', ('row 2', '1 values for 2 columns')),
    ('short row, a column of ours', 'a.csv', 'audio,caption,by\na.wav,x\n', ('row 1', '2 values for 3 columns')),
    ('open quote at the end', 'a.csv', HEAD + 'a.wav,"a dog\n', ('row 1', 'line 2', 'quotes')),
    ('open quote, rows behind it', 'a.csv', HEAD + 'a.wav,"a dog\nb.wav,"rain, wind"\n', ('row 1', 'line 2', 'quotes')),
    ('backslash quotes', 'a.csv', HEAD + r'a.wav,"he says \"sit\""' + '\n', ('row 1', 'quotes')),
    ('blank lines', 'a.csv', '\n' + HEAD + '\na.wav,x\n\n,\n', A), ('old Mac lines', 'a.csv', 'audio,caption\ra.wav,x\r', A),
    ('Windows lines', 'a.csv', 'audio,caption\r\na.wav,x\r\n', A), ('form feed in a caption', 'a.csv', HEAD + 'a.wav,x\x0cy\n', [('a', ('x\x0cy',), {})]),
    ('column twice', 'a.csv', 'audio,caption,caption\na.wav,x,y\n', ('line 1', "'caption' is there twice")),
    ('no such column', 'a.csv', 'file,caption\na.wav,x\n', ('line 1', "'audio' is missing", 'file, caption')),
    ('empty cell', 'a.csv', HEAD + 'a.wav,\n', ('row 1', "'caption' is empty")), ('blank cell', 'a.csv', HEAD + 'a.wav,  \n', ('row 1', "'caption' is empty")),
    ('only a header', 'a.csv', HEAD, ('no rows',)), ('empty file', 'a.csv', '', ('header',)), ('only commas', 'a.csv', ',,\n\n', ('header',)), ('empty JSON', 'a.json', '', ('not JSON',)),
    ('empty list', 'a.json', '[]', ('no rows',)), ('empty JSON lines', 'a.jsonl', '\n', ('no rows',)),
    # codes and byte order marks
    ('UTF-8', 'a.csv', APOSTROPHE, SAID), *((f'{code} with its mark', f'a.{code}.csv', APOSTROPHE.encode(code), SAID) for code in ('utf-8-sig', 'utf-16')),
    ('UTF-16, big end first', 'a.csv', b'\xfe\xff' + APOSTROPHE.encode('utf-16-be'), SAID), ('a mark before a quote', 'a.csv', '\ufeff"audio",caption\na.wav,x\n', A),
    *((f'mark in {name}', name, text.encode('utf-8-sig'), A) for name, text in (('a.json', json.dumps([one()])), ('a.jsonl', lines(one())), ('a.tsv', 'audio\tcaption\na.wav\tx\n'))),
    ('UTF-16 JSON lines', 'a.jsonl', json.dumps(one(caption='it\u2019s a dog'), ensure_ascii=False).encode('utf-16'), SAID),
    ('mark in the middle', 'a.csv', HEAD + 'a.wav,x\n\ufeffb.wav,y\n', [*A, ('b', ('y',), {})]), ('mark in the middle of lines', 'a.jsonl', lines(one()) + '\ufeff' + lines(one()), [('a', ('x', 'x'), {})]),
    ('cp1252', 'a.csv', (HEAD + 'b.wav,x\na.wav,it\u2019s a dog\n').encode('cp1252'), ('row 2', 'line 3', 'cp1252')),
    ('cp1252, said so', 'a.csv', APOSTROPHE.encode('cp1252'), SAID, dict(encoding='cp1252')),
    ('cp1252 in JSON', 'a.json', json.dumps([one(), one(caption='it\u2019s')], ensure_ascii=False).encode('cp1252'), ('row 2', 'cp1252')),
    ('cp1252 in JSON lines', 'a.jsonl', json.dumps(one(caption='it\u2019s'), ensure_ascii=False).encode('cp1252'), ('row 1', 'line 1', 'cp1252')),
    ('cp1252 in the header', 'a.csv', 'audio,caption,Gr\u00f6\u00dfe\na.wav,x,1\n'.encode('cp1252'), ('line 1', 'header')),
    ('zeros', 'a.csv', HEAD + 'a.wav,x\0\n', ('row 1', 'text')), ('UTF-16 without its mark', 'a.csv', APOSTROPHE.encode('utf-16-le'), ('line 1',)),
    ('half a character', 'a.csv', APOSTROPHE.encode('utf-16')[:-1], ('line 2', 'utf-16-le')), ('unknown code', 'a.csv', HEAD, ('encoding', 'utf-9'), dict(encoding='utf-9')),
    ('half a pair', 'a.jsonl', r'{"audio": "a.wav", "caption": "\ud83d"}', ('row 1', 'text')), ('a whole pair', 'a.jsonl', lines(one(caption='\U0001f436')), [('a', ('\U0001f436',), {})]),
    # the kinds of JSON
    ('list', 'a.json', json.dumps([one()]), A), ('list over lines', 'a.json', json.dumps([one()], indent=1), A), ('list in .jsonl', 'a.jsonl', json.dumps([one()], indent=1), A),
    ('lines in .json', 'a.json', lines(one(), one(caption='y')), [('a', ('x', 'y'), {})]), ('one line in .json', 'a.json', lines(one()), A),
    ('list under data', 'a.json', json.dumps(dict(num_captions_per_audio=1, data=[one()]), indent=1), A), ('a column data', 'a.jsonl', lines(one(data=[1])), with_column('data', [1])),
    ('line cut off', 'a.jsonl', lines(one()) + '{"audio": "b.w', ('row 2', 'line 2', 'not JSON')), ('first line broken', 'a.jsonl', '{"audio": }\n' + lines(one()), ('row 1', 'line 1', 'not JSON')),
    ('line cut off in .json', 'a.json', lines(one()) + '{"audio": "b.w', ('row 2', 'line 2', 'not JSON')), ('list cut off', 'a.json', json.dumps([one(), one()], indent=1)[:-20], ('not JSON', 'line')),
    ('row is a text', 'a.json', '["a.wav"]', ('row 1', 'object', 'a.wav')), ('row is null', 'a.json', json.dumps([one(), None]), ('row 2', 'object', 'None')),
    ('name twice', 'a.jsonl', '{"audio": "a.wav", "caption": "x", "caption": "y"}', ('row 1', 'twice')), ('too deep', 'a.json', '['*100_000, ('deep',)),
    # captions and file names
    ('list of captions', 'a.jsonl', lines(one(caption=['x', ' y '])), [('a', ('x', 'y'), {})]), ('blanks around a caption', 'a.csv', HEAD + 'a.wav, x \n', A),
    ('one file, two rows', 'a.csv', 'audio,caption,by\na.wav,x,me\nb.wav,z,you\n./a.wav,y,her\n', [('a', ('x', 'y'), dict(by='me')), ('b', ('z',), dict(by='you'))]),
    ('two columns', 'a.csv', 'audio,one,two\na.wav,x,y\n', [('a', ('x', 'y'), {})], dict(caption_columns=('one', 'two'))),
    *((f'caption {json.dumps(bad)}', 'a.jsonl', lines(one(), one(caption=bad)), ('row 2', "'caption'"))
      for bad in (None, 7, 1.5, True, '', [], ['x', None], ['x', 7], ['x', ''], [['x']], dict(text='x'))),
    ('caption NaN', 'a.jsonl', '{"audio": "a.wav", "caption": NaN}', ('row 1', "'caption'")), ('number in a CSV', 'a.csv', HEAD + 'a.wav,7\n', [('a', ('7',), {})]),
    ('no caption', 'a.jsonl', lines(one(), dict(audio='a.wav')), ('row 2', "'caption' is missing", 'audio')),
    *((f'audio {json.dumps(bad)[:30]}', 'a.jsonl', lines(one(), one(audio=bad)), ('row 2', "'audio'"))
      for bad in (None, 7, '', [], ['a.wav'], dict(path='a.wav'), 'none.wav', '.', 'a\0.wav', 'a dog barks '*50)),
    ('hidden file asked for', 'a.csv', HEAD + '._a.wav,x\n', ('row 1', '._a.wav', 'sound')), ('a table as a sound', 'a.csv', HEAD + 'b.wav,x\na.csv,x\n', ('row 2', 'sound')),
]


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path/'a.wav', TONE, RATE)
    soundfile.write(tmp_path/'b.wav', TONE[:RATE//2], RATE)
    (tmp_path/'._a.wav').write_bytes(b'\0\5\x16\7')
    return tmp_path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize('case', CASES, ids=[c[0] for c in CASES])
def test_table(folder, case):
    _, file, content, wanted, options = case if len(case) == 5 else (*case, {})
    table = write(folder/file, content)
    if isinstance(wanted, list):
        found = read_table(table, **options)
        assert [(r.id, r.captions, r.meta['columns']) for r in found] == wanted
        assert all(r.labels == () and len(r.wav) == dict(a=RATE, b=RATE//2)[r.id] and set(r.meta) == {'path', 'seconds', 'columns'} for r in found)
    else:
        with pytest.raises(ValueError) as error: read_table(table, **options)
        said = str(error.value)
        assert all(word in said for word in wanted) and (file in said or 'encoding' in options), said
        assert len(said) < 600


def test_a_bad_row_costs_itself_only(folder):
    rows = ['a.wav,one', 'a.wav,"open', 'a.wav,two', 'a.wav,three, or four', 'a.wav', 'a.wav,it\u2019s', 'a.wav,', 'a.wav,"five, and six"']
    table, told = write(folder/'a.csv', (HEAD + '\n'.join(rows)).encode('cp1252')), []
    assert [r['caption'] for r in read_rows(table, ('audio', 'caption'), skip=lambda *why: told.append(why))] == ['one', 'two', 'five, and six']
    assert [place for place, _ in told] == [f'row {n} (line {n + 1})' for n in (2, 4, 5, 6, 7)]
    assert all(word in reason for (_, reason), word in zip(told, ('quotes', '3 values', '1 values', 'text', 'empty')))


def test_many_open_quotes_take_little_time(folder):
    table, told = write(folder/'a.csv', HEAD + 'a.wav,"open\n'*5_000), []
    assert read_rows(table, skip=lambda *why: told.append(why)) == [] and len(told) == 5_000


@pytest.mark.parametrize('ending', ['csv', 'tsv', 'json', 'jsonl'])
def test_a_sparse_table_of_4_gb_is_refused_at_once(ending, folder):
    with open(folder/f'big.{ending}', 'wb') as f: f.truncate(2**32)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=f'big.{ending} has 4294967296 bytes'): read_table(folder/f'big.{ending}')
    assert time.process_time() - start < 2 and (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024 < 2**28


# --- folders and single files ---------------------------------------------------------------------------------------

def test_hidden_files_are_left_out(folder):
    for name in ('.trash', 'dogs', 'dogs/.ipynb_checkpoints', 'folder.wav'): (folder/name).mkdir()
    for name in ('.trash/c.wav', 'dogs/c.WAV', 'dogs/.ipynb_checkpoints/c.wav', 'folder.wav/d.wav'): soundfile.write(folder/name, TONE, RATE, format='WAV')
    (folder/'dogs'/'._c.WAV').write_bytes(b'\0\5\x16\7')
    assert [(r.id, r.labels) for r in read_folder(folder)] == [('a', ()), ('b', ()), ('c', ('dogs',)), ('d', ('folder.wav',))]


@pytest.mark.parametrize('code', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_captions_beside_a_sound(folder, code):
    (folder/'a.txt').write_text('it\u2019s a dog\n\n rain \n', encoding=code)
    assert [r.captions for r in read_folder(folder)] == [('it\u2019s a dog', 'rain'), ()]


def test_captions_in_another_code(folder):
    (folder/'a.txt').write_text('rain\nit\u2019s a dog\n', encoding='cp1252')
    with pytest.raises(ValueError, match=r'a\.txt, line 2'): read_folder(folder)
    for bad in (None, 7, ['x', None]):
        with pytest.raises(ValueError, match=r'captions of .*a\.wav'): read_folder(folder, {'a.wav': bad})


def test_words_given_by_hand(folder):
    record = lazy_record(folder/'a.wav', 'a dog', 'dog bark')
    assert record.captions == ('a dog',) and record.labels == ('dog bark',)
    for bad in (dict(captions=None), dict(captions=[1]), dict(labels=7), dict(labels=['dog', None])):
        with pytest.raises(ValueError, match=rf'{next(iter(bad))} of .*a\.wav'): lazy_record(folder/'a.wav', **bad)


def test_items_hold_the_whole_sound(folder):
    table = write(folder/'own.csv', 'audio,caption,duration,path\na.wav,x,0.25,b.wav\n')
    item = CaptionedAudio(read_table(table), RATE, 1.)[0]
    assert np.allclose(item['wav'], TONE, atol=1e-3) and item['caption'] == 'x'


# --- corpora --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('start, file', [('30', 'v_30'), ('30.0', 'v_30'), ('30.0', 'v_30.0'), ('30', 'Yv_30'), ('2.5', 'v_2.5'), ('30', 'v'), (' 30', 'v_30.0')])
def test_start_of_a_clip(folder, start, file):
    soundfile.write(folder/f'{file}.wav', TONE, RATE)
    write(folder/'val.csv', f'youtube_id,start_time,caption\nv,{start},x\nv,{float(start)},y\n')
    (record,), report = audiocaps(folder, 'val')
    assert record.id == file and record.captions == ('x', 'y') and record.meta['start'] == float(start) and not report.skipped


def test_audiocaps_reports_each_bad_row(folder):
    soundfile.write(folder/'v_30.wav', TONE, RATE); (folder/'w_0.wav').write_bytes(b'RIFF')
    rows = ['v,30,"x, y"', 'v,30.0,z', 'v,30,a dog, then rain', 'v,30', 'v,noon,x', 'v,nan,x', 'v,30,', ',30,x', 'v,30,it\u2019s', 'v,30,"open', 'gone,0,x', 'w,0,x',
            'x'*300 + ',0,x', 'v,,x']
    write(folder/'test.csv', ('youtube_id,start_time,caption\n' + '\n'.join(rows) + '\n').encode('cp1252'))
    (record,), report = audiocaps(folder, 'test')
    assert record.captions == ('x, y', 'z') and (report.rows, report.clips) == (14, 1)
    assert sorted(item for item, _ in report.skipped) == sorted([*(f'row {n} (line {n + 1})' for n in (3, 4, 7, 8, 9, 10, 14)), 'v', 'v', 'gone_0', 'w_0.wav', 'x'*300 + '_0'])
    assert '2 x no number in start_time' in str(report)


def test_esc50_reports_each_bad_row(tmp_path):
    (tmp_path/'meta').mkdir(); (tmp_path/'audio').mkdir()
    soundfile.write(tmp_path/'audio'/'a.wav', TONE, RATE)
    rows = ['a.wav,1.0,0.0,dog', 'a.wav,one,0,dog', 'a.wav,1,,dog', 'a.wav,7,0,dog', 'a.wav,1.5,0,dog', ',1,0,dog', 'b.wav,1,0,dog', '.,1,0,dog', 'a.wav,2,0,dog', 'a.wav,1,0,do"g,x']
    write(tmp_path/'meta'/'esc50.csv', ('\ufefffilename,fold,target,category\n' + '\n'.join(rows)).encode('utf-16-le'))
    (record,), report = esc50(tmp_path, folds=(1,))
    assert record.labels == ('dog',) and (record.meta['fold'], record.meta['target']) == (1, 0)
    assert (report.rows, report.clips, len(report.skipped)) == (9, 1, 8)


@pytest.mark.parametrize('header', ['file,text', '', 'youtube_id;caption'])
def test_another_table_stops_a_corpus(folder, header):
    write(folder/'val.csv', f'{header}\nv,30\n' if header else '')
    with pytest.raises(ValueError, match=r'val\.csv'): audiocaps(folder, 'val')


def test_numbers_of_cells():
    values = [as_number(v) for v in (30, 30., '30', '30.0', ' 30 ', '3e1', '-2.5')]
    assert values == [30]*6 + [-2.5] and [type(v) for v in values] == [int]*6 + [float]


# --- five more corpora ----------------------------------------------------------------------------------------------

CAPTIONS = ','.join(f'caption_{k}' for k in range(1, 6))
MUSIC = 'ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n'
# reader, part, table and its text, clips beside it, (file stem, captions, labels) of each record, what is skipped
CORPORA = {
    'clotho': (clotho, 'validation', 'clotho_captions_validation.csv', f'file_name,{CAPTIONS}\n a b (1).wav ,v,w,x,y,"z, z"\nc.wav,v,w,x,y,z\nd.wav,v,w,x,y, \ne.wav,v\n',
               ['audio/validation/a b (1).wav'], [('a b (1)', ('v', 'w', 'x', 'y', 'z, z'), ())], ['row 3 (line 4)', 'row 4 (line 5)', 'c']),
    'fsd50k': (fsd50k, 'val', 'FSD50K.ground_truth/dev.csv', 'fname,labels,mids,split\n7,"Rain,Water",/m/a,val\n8,Dog,/m/b,train\n9,Dog,/m/b,val\n10,Dog,/m/b\n',
               ['FSD50K.dev_audio/7.wav', 'FSD50K.dev_audio/8.wav', 'FSD50K.eval_audio/9.wav'], [('7', (), ('Rain', 'Water'))], ['row 4 (line 5)', '9']),
    'fsd50k eval': (fsd50k, 'eval', 'FSD50K.ground_truth/eval.csv', 'fname,labels,mids\n7,Rain,/m/a\n8,"Dog, Animal",/m/b\n',
                    ['FSD50K.eval_audio/8.wav', 'FSD50K.dev_audio/7.wav'], [('8', (), ('Dog', 'Animal'))], ['7']),
    'vggsound': (vggsound, 'test', 'vggsound.csv', 'aa,30,"car, train",test\nbb,0,dog,test\ncc,5,rain,test\ndd,7,rain,train\nee,soon,rain,test\nff,1,rain\ngg,8,rain,test\n',
                 ['test/aa_000030.wav', 'audio/bb_0.wav', 'cc.wav', 'dd_000007.wav'], [('aa_000030', (), ('car, train',)), ('bb_0', (), ('dog',)), ('cc', (), ('rain',))],
                 ['row 6 (line 6)', 'ee', 'gg_000008']),
    'bbc_effects': (bbc_effects, None, 'BBCSoundEffects.csv', 'location,description,secs,category,CDNumber,CDName,tracknum\n07.wav,"Dog, barking.",9,Nature: Dogs,E,D,3\n'
                    '../08.wav,Rain.,9,,E,D,4\n09.wav,Wind.,9,Nature,E,D,5\n10.wav,,9,N,E,D,6\n', ['audio/07.wav', '08.wav'],
                    [('07', ('Dog, barking.',), ('Nature: Dogs',)), ('08', ('Rain.',), ())], ['row 4 (line 5)', '09']),
    'musiccaps': (musiccaps, 'balanced', 'musiccaps-public.csv', MUSIC + 'aa,30,40,/m/a,"[\'a, b\', ""it\'s c""]","Soft, slow.",4,True,True\nbb,0,10,/m/a,[],Drums.,4,TRUE,False\n'
                  'cc,0,10,/m/a,"[\'x\']",No.,4,False,True\ndd,0,10,/m/a,"__import__(\'os\').getcwd()",No.,4,True,True\nee,x,10,/m/a,[],No.,4,True,True\n',
                  ['audio/[aa]-[30-40].wav', 'bb_0.wav', 'dd.wav'], [('[aa]-[30-40]', ('Soft, slow.',), ('a, b', "it's c")), ('bb_0', ('Drums.',), ())], ['ee', 'dd']),
}


@pytest.mark.parametrize('name', CORPORA)
def test_corpus_reads_what_is_there_and_reports_the_rest(tmp_path, name):
    read, part, table, text, files, wanted, left_out = CORPORA[name]
    for file in (*files, table): (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
    for file in files: soundfile.write(tmp_path/file, TONE, RATE)
    write(tmp_path/table, text)
    records, report = read(tmp_path, part)
    assert [(r.id, r.captions, r.labels) for r in records] == wanted
    assert [item for item, _ in report.skipped] == left_out and report.clips == len(records) and report.rows == len(wanted) + len(left_out)
    assert all(r.meta['licence'] and r.wav.shape == (RATE,) for r in records)
    (tmp_path/files[0]).write_bytes(b'RIFF')
    assert ('damaged or empty file' in str(read(tmp_path, part)[1])) and len(read(tmp_path, part)[0]) == len(wanted) - 1
    write(tmp_path/table, 'a;b\n1;2\n')
    with pytest.raises(ValueError, match=table.split('/')[-1]) if name != 'vggsound' else contextlib.nullcontext(): records, report = read(tmp_path, part)
    if part:
        with pytest.raises(ValueError, match="split must be one of .* got 'all of it'"): read(tmp_path, 'all of it')


def test_facts_of_the_corpora(tmp_path):
    "Licence of each FSD50K clip, start of a VGGSound clip, splits of MusicCaps, a BBC table from Windows"
    for folder in ('FSD50K.ground_truth', 'FSD50K.metadata', 'FSD50K.eval_audio'): (tmp_path/folder).mkdir()
    for file in ('FSD50K.eval_audio/8.wav', 'aa_000030.wav', '07.wav'): soundfile.write(tmp_path/file, TONE, RATE)
    write(tmp_path/'FSD50K.ground_truth/eval.csv', 'fname,labels,mids\n8,Dog,/m/b\n')
    write(tmp_path/'FSD50K.metadata/eval_clips_info_FSD50K.json', json.dumps({'8': dict(license='http://creativecommons.org/licenses/by/3.0/')}))
    assert fsd50k(tmp_path, 'eval')[0][0].meta['licence'].endswith('/by/3.0/')
    write(tmp_path/'vggsound.csv', 'aa,30,dog,train\n')
    assert vggsound(tmp_path)[0][0].meta['start'] == 30.
    write(tmp_path/'BBCSoundEffects.csv', 'location,description\n07.wav,Caf\u00e9\n'.encode('cp1252'))
    assert bbc_effects(tmp_path, 'cp1252')[0][0].captions == ('Caf\u00e9',) and len(bbc_effects(tmp_path)[1].skipped) == 1
    write(tmp_path/'musiccaps-public.csv', MUSIC + ''.join(f'{n},0,10,/m/a,[],x,4,{b},{e}\n' for n, b, e in (('a', True, True), ('b', False, True), ('c', False, False))))
    seen = {split: [item for item, _ in musiccaps(tmp_path, split)[1].skipped] for split in ('all', 'eval', 'train', 'balanced')}
    assert seen == dict(all=['a_0', 'b_0', 'c_0'], eval=['a_0', 'b_0'], train=['c_0'], balanced=['a_0'])


@pytest.mark.parametrize('file, text', [('t.csv', 'a.wav,"x, y"\nb.wav\n'), ('t.tsv', 'a.wav\tx, y\nb.wav\n')])
def test_a_table_without_a_header(tmp_path, file, text):
    bad = []
    write(tmp_path/file, text)
    assert read_rows(tmp_path/file, ('audio',), skip=lambda *why: bad.append(why), names=('audio', 'caption')) == [dict(audio='a.wav', caption='x, y')]
    assert bad == [('row 2 (line 2)', '1 values for 2 columns (a value with a comma needs quotes)')]

"The command: what README promises, help from the lesson's comments, targets tried before the work, one-line refusals, signals"
import inspect, os, re, resource, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, soundfile

import audiorepro
from audiorepro import cli, processes
from audiorepro.cli import main, make_parser

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored, and hand that on

COMMANDS = (cli.say, cli.reconstruct, cli.convert, cli.tour, cli.train, cli.score, cli.claims, cli.doctor)


def run(*args, **options):
    "The command in a process of its own, as a user starts it"
    return subprocess.run([sys.executable, '-m', 'audiorepro', *map(str, args)], capture_output=True, text=True, **options)


def one_line(text, *words):
    assert text.startswith('audiorepro') and text.count('\n') == 1 and text.endswith('\n'), text
    assert not [w for w in words if w not in text], text


@pytest.fixture
def no_model(monkeypatch):
    "Loading a model means that a refusal came too late"
    def load(*args, **kwargs): raise AssertionError('the model was loaded before the refusal')
    from audiorepro.audioldm2 import AudioLDM2
    from audiorepro.vae import VAE
    for kind in (AudioLDM2, VAE): monkeypatch.setattr(kind, 'from_pretrained', load)


@pytest.fixture
def quick_model(monkeypatch):
    "A pipeline that answers at once: a tone whose frequency is the length of the prompt times 10 Hz. Returns what it was asked"
    import torch
    from audiorepro.audioldm2 import AudioLDM2, AudioLDM2Config
    asked = []
    class Quick:
        cfg, sample_rate = AudioLDM2Config.toy(), 16_000
        def __call__(self, prompt, **options):
            asked.append((prompt, options))
            texts, t = [prompt] if isinstance(prompt, str) else prompt, torch.arange(16_000)/16_000
            return torch.stack([.5*torch.sin(2*torch.pi*10*len(text)*t) for text in texts])
    monkeypatch.setattr(AudioLDM2, 'from_pretrained', lambda *args, **kwargs: Quick())
    return asked


# --- sounds ---------------------------------------------------------------------------------------------------------

def test_same_seed_same_bytes(tmp_path):
    names = [str(tmp_path/n) for n in ('a.wav', 'b.wav', 'c.wav')]
    for name, seed in zip(names, ('1', '1', '2')):
        assert main(['say', 'a dog barks, then rain falls', '--out', name, '--seed', seed, '--steps', '2']) == 0
    a, b, c = (open(n, 'rb').read() for n in names)
    assert a == b and a != c
    wav, rate = soundfile.read(names[0])
    assert rate == 16_000 and len(wav) == 40_960 and .01 < abs(wav).max() <= 1


@pytest.mark.parametrize('rate, channels, ending', [(44_100, 2, 'wav'), (8_000, 1, 'flac'), (48_000, 6, 'wav'), (22_050, 1, 'ogg'), (32_000, 1, 'mp3')])
def test_reconstruct_any_file(tmp_path, rate, channels, ending):
    source, out = tmp_path/f'mine.{ending}', tmp_path/'back.wav'
    t = np.arange(int(1.3*rate))/rate
    soundfile.write(source, np.repeat(.3*np.sin(2*np.pi*440*t)[:, None], channels, 1), rate)
    assert main(['reconstruct', str(source), '--out', str(out)]) == 0
    wav, back_rate = soundfile.read(out)
    assert back_rate == 16_000 and abs(len(wav) - 1.3*16_000) < 1200
    spectrum = abs(np.fft.rfft(wav*np.hanning(len(wav))))
    assert abs(spectrum.argmax()*16_000/len(wav) - 440) < 40  # the tone is still there


def test_reconstruct_cuts_long_files(tmp_path, capsys):
    source, out = tmp_path/'long.wav', tmp_path/'back.wav'
    soundfile.write(source, .1*np.random.default_rng(0).standard_normal(12*16_000), 16_000)
    assert main(['reconstruct', str(source), '--out', str(out)]) == 0
    assert 'cut to 10.24 s' in capsys.readouterr().out
    assert len(soundfile.read(out)[0]) == 163_840


@pytest.mark.parametrize('args, word', [
    (['say', ''], 'prompt'), (['say', 'rain falls', '--model', '/nowhere'], '/nowhere'), (['say', 'rain falls', '--seconds', '0'], 'audio_length_in_s'),
    (['reconstruct', '/nowhere.wav'], '/nowhere.wav'), (['say', 'rain falls', '--steps', '0'], 'num_inference_steps')])
def test_refusals_take_one_line(args, word, capsys, tmp_path):
    assert main([*args, '--out', str(tmp_path/'x.wav')]) == 2
    one_line(capsys.readouterr().err, word)
    assert not (tmp_path/'x.wav').exists()


def test_doctor(capsys):
    assert main(['doctor']) == 0
    assert 'torch' in capsys.readouterr().out


def test_help_without_torch():
    code = 'import sys\nfrom audiorepro.cli import make_parser\nmake_parser().format_help()\nassert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

# --- several prompts, --play ----------------------------------------------------------------------------------------

def pitch(path):
    wav, rate = soundfile.read(path)
    return round(np.abs(np.fft.rfft(wav)).argmax()*rate/len(wav))


def test_prompts_and_file_make_one_file_each(tmp_path, quick_model, capsys):
    (tmp_path/'prompts.txt').write_bytes('\ufeffa dog barks\r\n\r\n  rain falls on leaves \r\n'.encode())
    assert main(['say', 'a bell', 'wind', '--file', str(tmp_path/'prompts.txt'), '--out', str(tmp_path/'new/s.wav'), '--seed', '7', '--steps', '3']) == 0
    assert [p for p, _ in quick_model] == ['a bell', 'wind', 'a dog barks', 'rain falls on leaves']
    assert {(o['seed'], o['num_inference_steps']) for _, o in quick_model} == {(7, 3)}  # each as if asked for alone
    assert sorted(p.name for p in (tmp_path/'new').iterdir()) == ['s_1.wav', 's_2.wav', 's_3.wav', 's_4.wav']
    assert [pitch(tmp_path/f'new/s_{i}.wav') for i in (1, 2, 3, 4)] == [60, 40, 110, 200]
    assert capsys.readouterr().out.count('wrote') == 4


def test_file_alone_and_single_line(tmp_path, quick_model):
    (tmp_path/'one.txt').write_text('rain falls')
    assert main(['say', '--file', str(tmp_path/'one.txt'), '--out', str(tmp_path/'s.flac')]) == 0
    assert [p.name for p in tmp_path.glob('s*')] == ['s.flac'] and quick_model[0][0] == 'rain falls'


def test_more_than_nine_files_sort(tmp_path, quick_model):
    assert main(['say', *['rain']*11, '--out', str(tmp_path/'s.wav')]) == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f's_{i:02}.wav' for i in range(1, 12)]


@pytest.mark.parametrize('content, word', [(b'', 'no prompt'), (b'\n \n', 'no prompt'), (b'rain\n...\n', 'line 2'), ('Türen schlagen'.encode('cp1252'), 'UTF-8'),
                                           ('rain'.encode('utf-16'), 'UTF-8'), (None, 'prompts.txt')])
def test_bad_files_of_prompts(tmp_path, content, word, no_model, capsys):
    if content is not None: (tmp_path/'prompts.txt').write_bytes(content)
    assert main(['say', '--file', str(tmp_path/'prompts.txt'), '--out', str(tmp_path/'s.wav')]) == 2
    one_line(capsys.readouterr().err, 'prompts.txt', word)
    assert not (tmp_path/'s.wav').exists()


def program(path, body):
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(0o755)


@pytest.mark.parametrize('name, ending, played', [('ffplay', 'mp3', True), ('afplay', 'flac', True), ('aplay', 'wav', True), ('aplay', 'mp3', False)])
def test_play(tmp_path, name, ending, played, quick_model, monkeypatch, capsys):
    "The player gets every file when all are written; aplay would play an MP3 as noise"
    (tmp_path/'bin').mkdir()
    program(tmp_path/'bin'/name, f'for last; do :; done; echo "$last" >> {tmp_path}/played')
    monkeypatch.setenv('PATH', str(tmp_path/'bin'))
    out = tmp_path/f's.{ending}'
    assert main(['say', 'rain', 'wind', '--out', str(out), '--play']) == (0 if played else 2)
    if played: assert (tmp_path/'played').read_text().split() == [str(tmp_path/f's_{i}.{ending}') for i in (1, 2)]
    else:
        one_line(capsys.readouterr().err, 'no player', 's_1.mp3')
        assert not quick_model  # found out before the sampling


def test_a_player_that_fails_loses_no_sound(tmp_path, quick_model, monkeypatch, capsys):
    (tmp_path/'bin').mkdir()
    program(tmp_path/'bin/mpv', 'echo no sound card >&2; exit 1')
    monkeypatch.setenv('PATH', str(tmp_path/'bin'))
    assert main(['say', 'rain', 'wind', '--out', str(tmp_path/'s.wav'), '--play']) == 2
    one_line(capsys.readouterr().err, 'mpv', 's_1.wav', 'no sound card')
    assert (tmp_path/'s_1.wav').exists() and (tmp_path/'s_2.wav').exists()


# --- targets and refusals -------------------------------------------------------------------------------------------

TARGETS = [  # target below the temporary folder, word in the refusal
    ('folder.wav', 'is a folder'), ('', 'must end in'), ('s', 'must end in'), ('s.aac', 'must end in .wav, .flac, .ogg or .mp3'), ('s.wav.part', 'must end in'),
    ('file.txt/s.wav', 'is a file, not a folder'), ('file.txt/deep/s.wav', 'is a file, not a folder'), ('pipe.wav', 'no file that may be replaced'),
    ('/dev/null/s.wav', '/dev/null is a file'), ('/proc/s.wav', '/proc/s.wav cannot be written'), ('x'*300 + '.wav', 'too long'), ('closed/s.wav', 'Permission denied')]


@pytest.mark.parametrize('target, word', TARGETS, ids=[t[:20] or 'empty' for t, _ in TARGETS])
@pytest.mark.parametrize('command', ['say', 'reconstruct'])
def test_targets_are_tried_before_the_work(tmp_path, command, target, word, no_model, capsys):
    if target.startswith('closed') and os.getuid() == 0: pytest.skip('root may write everywhere')
    (tmp_path/'folder.wav').mkdir(); (tmp_path/'file.txt').touch(); os.mkfifo(tmp_path/'pipe.wav')
    (tmp_path/'closed').mkdir(mode=0o555)
    soundfile.write(tmp_path/'mine.flac', np.zeros(16_000), 16_000)
    before = sorted(tmp_path.rglob('*'))
    assert main([command, 'rain' if command == 'say' else str(tmp_path/'mine.flac'), '--out', str(tmp_path/target)]) == 2
    one_line(capsys.readouterr().err, word)
    assert sorted(tmp_path.rglob('*')) == before  # no trace


def test_endings_are_those_that_can_be_written(tmp_path):
    import torch
    from audiorepro.audio import save_audio
    from audiorepro.guard import check_target
    for ending in ('.wav', '.flac', '.ogg', '.mp3', '.WAV', '.aiff', '.txt', ''):
        outcomes = []
        for action in (lambda p: check_target(p, cli._ENDINGS), lambda p: save_audio(p, torch.zeros(16_000), 16_000)):
            try: action(tmp_path/f's{ending}'); outcomes.append(True)
            except ValueError: outcomes.append(False)
        assert outcomes[0] == outcomes[1], ending


def test_full_disk_is_found_before_the_work(tmp_path):
    "A process that may write 100 kB per file is refused at once, and what was there stays"
    (tmp_path/'s.wav').write_text('old')
    done = run('say', 'rain', '--model', '/no/model', '--out', tmp_path/'s.wav',
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2
    one_line(done.stderr, 'cannot be written', 's.wav', 'File too large')
    assert (tmp_path/'s.wav').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['s.wav']


def test_tour_tries_its_targets_first(tmp_path, no_model, capsys):
    (tmp_path/'tour.png').mkdir()
    assert main(['tour', '--out', str(tmp_path)]) == 2
    one_line(capsys.readouterr().err, 'tour.png is a folder')
    (tmp_path/'out').touch()
    assert main(['tour', '--out', str(tmp_path/'out')]) == 2
    one_line(capsys.readouterr().err, 'is a file, not a folder')


def test_tour_keeps_the_old_picture_on_a_full_disk(tmp_path, quick_model, monkeypatch, capsys):
    from matplotlib.figure import Figure
    assert main(['tour', '--out', str(tmp_path)]) == 0
    old = (tmp_path/'tour.png').read_bytes()
    assert old.startswith(b'\x89PNG')
    def savefig(self, file, **options):
        Path(file).write_bytes(b'half') if isinstance(file, (str, Path)) else file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', savefig)
    capsys.readouterr()
    assert main(['tour', '--out', str(tmp_path)]) == 2
    one_line(capsys.readouterr().err, 'No space left on device')
    assert (tmp_path/'tour.png').read_bytes() == old and sorted(p.name for p in tmp_path.iterdir()) == ['tour.png', 'tour.wav']


ERRORS = [(ValueError('prompt must hold\na word'), 'audiorepro: prompt must hold a word\n', 2), (FileNotFoundError('no weights'), 'audiorepro: no weights\n', 2),
          (PermissionError(13, 'Permission denied', '/x'), "audiorepro: [Errno 13] Permission denied: '/x'\n", 2),
          (OSError(28, 'No space left on device'), 'audiorepro: [Errno 28] No space left on device\n', 2),
          (ModuleNotFoundError("No module named 'laion_clap'"), "audiorepro: No module named 'laion_clap'\n", 2),
          (MemoryError(), 'audiorepro: not enough memory: MemoryError()\n', 2),
          (RuntimeError('CUDA out of memory.\nTried'), "audiorepro: not enough memory: RuntimeError('CUDA out of memory.\\nTried')\n", 2),
          (KeyboardInterrupt(), 'audiorepro: stopped\n', 130)]


@pytest.mark.parametrize('error, line, status', ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_expected_errors_take_one_line(error, line, status, monkeypatch, capsys):
    def doctor(): "Raise"; raise error
    monkeypatch.setattr(cli, 'doctor', doctor)
    assert main(['doctor']) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize('error', [RuntimeError('shape mismatch'), RuntimeError('CUDA error: an illegal memory access'), TypeError('x'), KeyError('x'), AssertionError()])
def test_faults_of_ours_keep_their_traceback(error, monkeypatch):
    def doctor(): "Raise"; raise error
    monkeypatch.setattr(cli, 'doctor', doctor)
    with pytest.raises(type(error)): main(['doctor'])


@pytest.mark.parametrize('args, word', [([], 'COMMAND'), (['sing'], 'sing'), (['say', 'rain', '--steps', 'many'], 'many'), (['say', '--nothing'], '--nothing'),
                                        (['convert', 'x'], 'target'), (['say', '--out', 'x.wav'], '--file'), (['train', '--budget', 'tiny'], 'tiny'),
                                        (['train', '--only', 'vocoder'], 'audioldm2'),
                                        (['train', '--system', 'musiclm'], 'tokenlm'), (['say', 'rain', '--model', 'toy-lm', '--steps', '3'], 'no steps'),
                                        (['say', 'rain', '--model', 'toy-tango', '--candidates', '3'], 'no candidates')])
def test_wrong_arguments_take_one_line(args, word, capsys):
    try: status = main(args)
    except SystemExit as e: status = e.code
    assert status == 2
    one_line(capsys.readouterr().err, word)


@pytest.mark.parametrize('model, more', [('toy-tango', ['--steps', '3', '--negative-prompt', 'wind blows']), ('toy-lm', ['--guidance-scale', '2'])])
def test_the_other_systems_answer(model, more, tmp_path):
    "Same words, same seed, same bytes; another system, another sound"
    asked = ['say', 'a siren wails', '--seconds', '1', '--seed', '4', *more]
    for name, system in (('a', model), ('b', model), ('c', 'toy')):
        given = asked if system == model else [*asked[:6], '--steps', '3']
        assert main([*given, '--model', system, '--out', str(tmp_path/f'{name}.wav')]) == 0
    sounds = [(tmp_path/f'{name}.wav').read_bytes() for name in 'abc']
    assert sounds[0] == sounds[1] != sounds[2] and soundfile.info(tmp_path/'a.wav').frames == 16_000


def test_make_passes_the_system_on():
    makefile = (Path(__file__).parent.parent/'Makefile').read_text()
    assert 'train$(if $(SYSTEM), --system $(SYSTEM))' in makefile
    assert main(['train', '--system', 'tango', '--only', 'bells']) == 2


def test_nobody_listens():
    "A closed pipe or a full disk behind stdout: one line, status 2, no second complaint at exit"
    read, write = os.pipe(); os.close(read)
    for out in (write, os.open('/dev/full', os.O_WRONLY)):
        done = subprocess.run([sys.executable, '-m', 'audiorepro', 'claims', '--minutes', '0'], stdout=out, stderr=subprocess.PIPE, text=True)
        os.close(out)
        assert done.returncode == 2
        one_line(done.stderr, 'Errno')


def test_ctrl_c_in_the_middle():
    "SIGINT while a command works: one line and 130"
    job = subprocess.Popen([sys.executable, '-c', INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == 'working\n'
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 130
    assert err == 'audiorepro: stopped\n'


INTERRUPTED = '''
import sys, time
from audiorepro import cli, processes
def doctor():
    "Work"
    print('working', flush=True)
    time.sleep(60)
cli.doctor = doctor
sys.exit(cli.main(['doctor']))
'''


# --- help -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c.__name__)
def test_help_explains_every_option(command, capsys, monkeypatch):
    "With the words and defaults of the function, on the command's page and on the page of all"
    monkeypatch.setenv('COLUMNS', '100')
    pages = []
    for args in (['--help'], [command.__name__, '--help']):
        with pytest.raises(SystemExit) as done: main(args)
        assert done.value.code == 0
        pages.append(' '.join(capsys.readouterr().out.split()))
    source = inspect.getsource(command)
    for name, parameter in inspect.signature(command).parameters.items():
        said = re.search(rf'^ +{name}\b.*?# (.*)', source, re.M)[1]
        default = [f'(default: {parameter.default})'] if type(parameter.default) in (str, int, float) else []
        for page in pages:
            for word in [name.strip('_').replace('_', '-'), ' '.join(said.split()), *default]: assert word in page, (name, word)
    assert command.__doc__.split('\n')[0] in pages[1]


def test_every_command_and_default_is_the_functions():
    "What the parser hands over is what the function would have taken by itself"
    parser = make_parser()
    needed = dict(say=[], reconstruct=['a.wav'], convert=['a', 'b'], score=['a', 'b'])
    for command in COMMANDS:
        args = vars(parser.parse_args([command.__name__, *needed.get(command.__name__, [])]))
        assert args.pop('run') is command and args.pop('command') == command.__name__
        for name, parameter in inspect.signature(command).parameters.items():
            value = args.pop(name)
            if parameter.default is not parameter.empty and parameter.default != (): assert value == parameter.default and type(value) is type(parameter.default)
        assert not args


@pytest.mark.parametrize('args, values', [
    (['say', 'rain', 'wind', '--seconds', '2', '--seed', '3'], dict(prompt=['rain', 'wind'], seconds=2., seed=3)), (['say', 'x', '--play'], dict(play=True)),
    (['train', '--fresh', '--no-picture'], dict(fresh=True, picture=False)), (['claims', '--minutes', '0'], dict(minutes=0.)), (['say', 'x', '--seed', '-1'], dict(seed=-1))])
def test_options_have_the_types_of_the_function(args, values):
    found = vars(make_parser().parse_args(args))
    assert {k: found[k] for k in values} == values and [type(found[k]) for k in values] == [type(v) for v in values.values()]


def test_version_and_module():
    done = run('--version')
    assert done.returncode == 0 and done.stdout == f'audiorepro {audiorepro.__version__}\n'
    assert run('--help').stdout.startswith('usage: audiorepro [-h]')


def test_a_percent_sign_in_a_comment_is_no_format(capsys, monkeypatch):
    commands = cli._Parser('audiorepro').add_subparsers()
    monkeypatch.setattr(cli, '_comments', lambda run: dict(source='100 % of it', target='%s and %(prog)s'))
    assert '100 % of it' in ' '.join(cli._add_command(commands, cli.convert).split())
    assert '%s and %(prog)s' in commands.choices['convert'].format_help()


# --- processes of `train` -------------------------------------------------------------------------------------------

DRIVER = '''
import sys
from audiorepro import cli, processes
sys.executable = sys.argv[1]
grace = float(sys.argv[2])
end = processes._end
processes._end = lambda jobs, _: end(jobs, grace)
sys.exit(cli.main(['train']))
'''


def training(folder, child, grace=30.):
    "Start `audiorepro train` whose children run a shell script in place of Python; wait until both are there"
    program(folder/'python', f'for part; do :; done; echo $$ > {folder}/$part.tmp; {child}')
    job = subprocess.Popen([sys.executable, '-c', DRIVER, folder/'python', str(grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    deadline = time.time() + 300
    while len(list(folder.glob('*.pid'))) < 2 and job.poll() is None:
        assert time.time() < deadline
        time.sleep(.05)
    return job


def is_alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


READY = 'mv {folder}/$part.tmp {folder}/$part.pid; while :; do sleep .05; done'


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_to_train_reaches_its_children(tmp_path, number, status):
    "Each child gets SIGTERM, may still write, and is gone when the command is"
    note = f"trap 'echo told > {tmp_path}/$part.told; exit 0' TERM; "
    job = training(tmp_path, note + READY.format(folder=tmp_path))
    pids = [int(p.read_text()) for p in tmp_path.glob('*.pid')]
    if number == signal.SIGINT: os.killpg(job.pid, number)  # as a terminal does it: to the children too
    else: job.send_signal(number)
    out, err = job.communicate(timeout=300)
    assert job.returncode == status and 'Traceback' not in err
    if number == signal.SIGINT: assert err == 'audiorepro: stopped\n'
    assert sorted(p.stem for p in tmp_path.glob('*.told')) == ['audiomae', 'vae'] and not any(map(is_alive, pids))


def test_a_child_that_will_not_end_is_killed(tmp_path):
    job = training(tmp_path, "trap '' TERM; " + READY.format(folder=tmp_path), grace=1.)
    pids = [int(p.read_text()) for p in tmp_path.glob('*.pid')]
    job.terminate()
    job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGTERM and not any(map(is_alive, pids))


def test_a_child_that_fails_is_named(tmp_path):
    job = training(tmp_path, 'mv {0}/$part.tmp {0}/$part.pid; [ $part = vae ]'.format(tmp_path))
    out, err = job.communicate(timeout=300)
    assert job.returncode == 2
    one_line(err, 'training of audiomae failed')


def test_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    assert processes.run_all([[sys.executable, '-c', 'raise SystemExit(1)']], [os.environ]) == [0]
    assert signal.getsignal(signal.SIGTERM) is before and signal.getsignal(signal.SIGINT) is signal.default_int_handler

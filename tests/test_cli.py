"The command: what README promises, and one-line refusals"
import subprocess, sys

import numpy as np, pytest, soundfile

from audiorepro.cli import main


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
    error = capsys.readouterr().err
    assert error.startswith('audiorepro: ') and word in error and error.count('\n') == 1
    assert not (tmp_path/'x.wav').exists()


def test_doctor(capsys):
    assert main(['doctor']) == 0
    assert 'torch' in capsys.readouterr().out


def test_help_without_torch():
    code = 'import sys\nfrom audiorepro.cli import make_parser\nmake_parser().format_help()\nassert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

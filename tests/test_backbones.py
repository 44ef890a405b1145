"""VGGish and CNN14 against second implementations on the same random weights, the published layouts, and a test for each trap of the field.

The references here are made of plain library parts, written apart from ours: layers of torch in the published order and under the published
names, front ends of transformers and librosa. The CNN14 that a public package contains is compared in `tests/test_clap_env.py`.
"""
import json
from dataclasses import replace

import librosa, numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from transformers.audio_utils import mel_filter_bank, spectrogram

from audiorepro.audio import resample, save_audio
from audiorepro.backbone_files import SOURCES, front_end, read_cnn14, read_vggish, read_vggish_pca
from audiorepro.backbones import Cnn14, Cnn14Config, VGGish, VGGishConfig, cnn14_mel, pca_quantise, vggish_patches
from audiorepro.cli import main
from audiorepro.core import count_params, make_generator
from audiorepro.folders import FolderCard, as_back_end, check_clap, class_cards, distance_cards, listen_to, score_folders, split_ids
from audiorepro.judge import Judge
from audiorepro.metrics import (frechet_distance, frechet_from_features, frechet_infinity, inception_score, kernel_distance, kernel_width,
                                kl_divergence, kl_sigmoid)
from audiorepro.scores import compare
from audiorepro.sounds import make_records


def noise(*shape, seed=0): return torch.randn(*shape, generator=make_generator(seed))
def sounds(n, samples=40_000, rate=16_000, seed=0):
    "Chirps in noise, no two alike, with energy in all bands"
    t, start = torch.arange(samples)/rate, 200 + 300*torch.rand(n, 1, generator=make_generator(seed))
    return .3*torch.sin(2*torch.pi*(start + 700*t)*t) + .03*noise(n, samples, seed=seed)


def randomise(net, seed=0):
    "Also biases, norms and running statistics: what starts at zero or one hides mistakes"
    g = make_generator(seed)
    for name, x in net.state_dict().items():
        if not x.is_floating_point() or 'extractor' in name: continue
        first = name.startswith(('norm.', 'bn0.'))
        if 'running_var' in name: x.uniform_(*((100., 300.) if first else (.5, 2.)), generator=g)
        elif 'running_mean' in name: x.normal_(-30. if first else 0., .3, generator=g)
        elif x.ndim > 1: x.normal_(0, (2/x[0].numel())**.5, generator=g)
        else: x.normal_(1. if name.endswith('weight') else 0., .1, generator=g)
    return net.eval()


def error(a, b):
    assert a.shape == b.shape, f'{tuple(a.shape)} is not {tuple(b.shape)}'
    return float((a - b).abs().max()/b.abs().max())


# --- VGGish ---------------------------------------------------------------------------------------------------------

class PublishedVGGish(nn.Module):
    "The published layers in their order and under their names, at any width"
    def __init__(self, widths=(4, 6, 8, 10), hidden=20, dim=12):
        super().__init__()
        layers, before = [], 1
        for width, count in zip(widths, (1, 1, 2, 2)):
            for _ in range(count): layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]; before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(nn.Linear(24*before, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.ReLU())

    def forward(self, patches):
        maps = self.features(patches[:, None])                                     # (N, C, 6, 4)
        return self.embeddings(torch.stack([maps[:, :, t, f] for t in range(6) for f in range(4)], 1).flatten(1))  # channels run fastest


def transformers_patches(wav):
    "Log-mel patches of VGGish by the library's own filters and transform"
    bank = mel_filter_bank(257, 64, 125., 7_500., 16_000, norm=None, mel_scale='kaldi', triangularize_in_mel_space=True)
    window = np.hanning(401)[:400]
    mel = spectrogram(wav.double().numpy(), window, 400, 160, 512, power=1., center=False, mel_filters=bank, mel_floor=0., dtype=np.float64).T
    return torch.from_numpy(np.log(mel[:len(mel)//96*96] + .01)).float().reshape(-1, 96, 64)


@pytest.mark.parametrize('samples', [15_600, 16_000, 30_959, 30_960, 40_960])
def test_vggish_front_end(samples):
    wav = sounds(2, samples, seed=samples)
    ours = vggish_patches(wav)
    for k in range(2): assert error(ours[k], transformers_patches(wav[k])) < 1e-6
    assert error(ours[0], transformers_patches(wav[1])) > 1e-2


def test_vggish_network(tmp_path):
    public = randomise(PublishedVGGish())
    torch.save(public.state_dict(), tmp_path/'vggish.pth')
    net, wav = read_vggish(tmp_path/'vggish.pth'), sounds(3)
    assert (net.cfg.widths, net.cfg.hidden, net.cfg.dim) == ((4, 6, 8, 10), 20, 12)
    patches = vggish_patches(wav).flatten(0, 1)
    with torch.no_grad(): theirs = public(patches)
    assert error(net.embed(wav, last_relu=True).flatten(0, 1), theirs) < 1e-5
    assert error(net.features(wav).relu(), theirs) < 1e-5 and net.features(wav).min() < 0  # FAD: before the last ReLU
    assert error(net.features(wav.flip(0)).relu(), theirs) > 1e-2


def test_sizes_are_the_published_ones():
    "Counted without memory: torchvggish's checkpoint has 72,141,184 values, tab. I of PANNs says 80.8 million"
    assert count_params(lambda: VGGish(VGGishConfig.vggish())) == count_params(lambda: PublishedVGGish((64, 128, 256, 512), 4096, 128)) == 72_141_184
    assert count_params(lambda: Cnn14(Cnn14Config.cnn14_16k())) == count_params(lambda: Cnn14(Cnn14Config.cnn14_32k())) == 80_753_615


# --- CNN14 ----------------------------------------------------------------------------------------------------------

WIDTHS = 8, 10, 12, 14, 16, 24

class PublishedCnn14(nn.Module):
    "The published names; the front end is librosa's"
    def __init__(self, cfg, widths=WIDTHS, classes=5):
        super().__init__()
        self.cfg, self.bn0 = cfg, nn.BatchNorm2d(64)
        for i, (a, b) in enumerate(zip((1, *widths), widths), 1):
            block = nn.Module()
            block.conv1, block.conv2 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.Conv2d(b, b, 3, padding=1, bias=False)
            block.bn1, block.bn2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
            setattr(self, f'conv_block{i}', block)
        self.fc1, self.fc_audioset = nn.Linear(widths[-1], widths[-1]), nn.Linear(widths[-1], classes)
        self.logmel_extractor = nn.Module()
        bank = librosa.filters.mel(sr=cfg.sample_rate, n_fft=cfg.n_fft, n_mels=64, fmin=cfg.fmin, fmax=cfg.fmax)
        self.logmel_extractor.melW = nn.Parameter(torch.from_numpy(bank.T.copy()), requires_grad=False)

    def mel(self, wav):
        power = np.abs(librosa.stft(wav.double().numpy(), n_fft=self.cfg.n_fft, hop_length=self.cfg.hop_length, pad_mode='reflect'))**2
        return torch.from_numpy(librosa.power_to_db(self.logmel_extractor.melW.double().numpy().T @ power, amin=1e-10, top_db=None)).float().transpose(-1, -2)

    @torch.no_grad()
    def forward(self, wav):
        x = self.bn0(self.mel(wav)[:, None].transpose(1, 3)).transpose(1, 3)
        for i in range(1, 7):
            b = getattr(self, f'conv_block{i}')
            x = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))))
            if i < 6: x = F.avg_pool2d(x, 2)
        x = x.mean(3)
        h = F.relu(self.fc1(x.max(2).values + x.mean(2)))
        return h, self.fc_audioset(h)


RATES = {16_000: Cnn14Config.cnn14_16k(), 32_000: Cnn14Config.cnn14_32k()}


def write_cnn14(path, rate, seed=0):
    public = randomise(PublishedCnn14(RATES[rate]), seed)
    torch.save(dict(iteration=1, model=public.state_dict()), path)
    return public


@pytest.mark.parametrize('rate', RATES)
def test_cnn14(rate, tmp_path):
    public = write_cnn14(tmp_path/'Cnn14.pth', rate)
    net, wav = read_cnn14(tmp_path/'Cnn14.pth'), sounds(3, 2*rate, rate)*torch.tensor([[1.], [.1], [.01]])
    assert net.cfg == replace(RATES[rate], widths=WIDTHS, classes=5)
    assert (cnn14_mel(wav, net.cfg) - public.mel(wav)).abs().max() < 1e-3  # dB
    features, logits = public(wav)
    out = net.listen(wav, batch_size=2)
    assert error(out['features'], features) < 1e-5 and error(out['logits'], logits) < 1e-5
    assert error(net.class_probs(wav), logits.softmax(-1)) < 1e-5 and error(net.tag_probs(wav), logits.sigmoid()) < 1e-5
    assert error(net.features(wav.flip(0)), features) > .01 and error(net.class_probs(wav.flip(0)), logits.softmax(-1)) > .01


def test_short_clips_are_refused_with_the_length_that_is_needed():
    nets = VGGish(VGGishConfig.toy()), Cnn14(Cnn14Config.toy())
    for net, need in zip(nets, (15_600, 4_960)):
        assert net.features(torch.zeros(1, need)).isfinite().all()
        with pytest.raises(ValueError, match=f'{need - 1} samples.*needs {need}'): net.features(torch.zeros(1, need - 1))
    for bad in (torch.full((1, 16_000), torch.nan), torch.zeros(16_000), torch.zeros(1, 16_000, dtype=torch.int16), torch.zeros(1, 0)):
        for net in nets:
            with pytest.raises(ValueError, match='wav'): net.features(bad)


# --- files ----------------------------------------------------------------------------------------------------------

def test_a_file_says_at_which_rate_it_listens(tmp_path):
    "8 kHz, and a matrix that only looks like the one for 16 kHz"
    public = write_cnn14(tmp_path/'a.pth', 16_000)
    state = public.state_dict()
    narrow = torch.from_numpy(librosa.filters.mel(sr=8_000, n_fft=256, n_mels=64, fmin=50, fmax=4_000).T.copy())
    other = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=512, n_mels=64, fmin=0, fmax=8_000).T.copy())
    for matrix in (narrow, other):
        torch.save(dict(model=state | {'logmel_extractor.melW': matrix}), tmp_path/'b.pth')
        with pytest.raises(ValueError, match='another front end'): read_cnn14(tmp_path/'b.pth')
    for rate, cfg in RATES.items(): assert front_end(PublishedCnn14(cfg).logmel_extractor.melW).sample_rate == rate


@pytest.mark.parametrize('read, name', [(read_vggish, 'VGGish'), (read_vggish_pca, 'VGGish PCA'), (read_cnn14, 'CNN14 16 kHz')])
def test_unfit_files_are_refused_whole(read, name, tmp_path):
    with pytest.raises(FileNotFoundError) as e: read(tmp_path/'none.pth')
    assert all(word in str(e.value) for word in SOURCES[name])
    with pytest.raises(FileNotFoundError, match='is no file'): read(tmp_path)
    (tmp_path/'page.pth').write_text('<html>not found</html>')
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path/'linear.pth')
    for file in ('page', 'linear'):
        with pytest.raises(ValueError, match=f'{file}.pth'): read(tmp_path/f'{file}.pth')


class Harmful:
    def __reduce__(self): return exec, ('raise SystemExit("ran")',)


@pytest.mark.parametrize('read', [read_vggish, read_vggish_pca, read_cnn14])
def test_no_code_of_a_file_is_run(read, tmp_path):
    torch.save(dict(model=dict(PublishedVGGish().state_dict()), note=Harmful()), tmp_path/'bad.pth')
    with pytest.raises(ValueError, match='refused, not run'): read(tmp_path/'bad.pth')


def test_pca_of_either_kind(tmp_path):
    "Arrays of numpy or tensors; the rows of the matrix are the components"
    vectors, means = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0], np.arange(6.)[:, None]
    for kind in (np.asarray, torch.from_numpy):
        torch.save(dict(pca_eigen_vectors=kind(vectors), pca_means=kind(means)), tmp_path/'pca.pth')
        V, m = read_vggish_pca(tmp_path/'pca.pth')
        e = noise(9, 6) + m
        by_hand = [[round(float((min(max(v @ (row - means[:, 0]), -2), 2) + 2)*63.75)) for v in vectors] for row in e.double().numpy()]
        assert torch.equal(pca_quantise(e, V, m), torch.tensor(by_hand).float())


# --- folders, and the command ---------------------------------------------------------------------------------------

def write(folder, n, seed, change=lambda w: w, rate=16_000, captions=False):
    for i, r in enumerate(make_records(n, seed=seed, family='event', kind='single')):
        save_audio(folder/f'{i:03d}.wav', change(torch.as_tensor(r.wav)), rate)
        if captions: (folder/f'{i:03d}.txt').write_text(r.captions[0])
    return folder


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Real clips, clips of the same names with hiss, and files of both published kinds"
    top, g = tmp_path_factory.mktemp('folders'), make_generator(0)
    torch.save(randomise(PublishedVGGish()).state_dict(), top/'vggish.pth')
    write_cnn14(top/'cnn14.pth', 16_000)
    return dict(top=top, real=write(top/'real', 20, 1), hiss=write(
        top/'hiss', 20, 2, lambda w: (w + .02*torch.randn(w.shape, generator=g)).clamp(-.99, .99), captions=True), spare=write(top/'spare', 20, 3))


@pytest.fixture(scope='module')
def ears(world): return [as_back_end(net) for net in (Judge.from_pretrained('toy'), read_vggish(world['top']/'vggish.pth'), read_cnn14(world['top']/'cnn14.pth'))]


@pytest.fixture(scope='module')
def heard(world, ears): return {k: listen_to(world[k], ears) for k in ('real', 'hiss', 'spare')}


def test_the_command(world, capsys):
    "With files: every number; without: what is missing and where it is published"
    top, out = world['top'], world['top']/'cards.json'
    assert main(['score', str(world['real']), str(world['hiss']), '--vggish', str(top/'vggish.pth'), '--cnn14', str(top/'cnn14.pth'), '--out', str(out)]) == 0
    text = capsys.readouterr().out
    cards = [FolderCard.from_dict(c) for c in json.loads(out.read_text())]
    measures = {(c.back_end, c.measure.split(' (')[0].split(',')[0].replace(' distance', '')) for c in cards}
    assert measures >= {('VGGish 16 kHz', 'Frechet'), ('CNN14 16 kHz', 'Frechet'), ('toy judge', 'KAD'), ('CNN14 16 kHz', 'KL(real || made)'),
                        ('CNN14 16 kHz', 'KL(made || real)'), ('CNN14 16 kHz', 'inception score'), ('CLAP', 'CLAP score')}
    assert all(str(c) in text for c in cards) and 'no FAD' not in text and 'no KL' not in text
    assert all((c.floor is not None and c.n == 10 and c.whole is not None) for c in cards if 'distance' in c.measure or 'KAD' in c.measure)
    assert main(['score', str(world['real']), str(world['spare']), '--seed', '1']) == 0
    text = capsys.readouterr().out
    for words in (SOURCES['VGGish'], SOURCES['CNN14 16 kHz'], ['no CLAP score: 20 of 20', 'toy judge']): assert all(w in text for w in words)


@pytest.mark.parametrize('args, words', [
    (['none', 'hiss'], ['none', 'no folder']), (['real', 'few'], ['few holds 3 usable sounds', 'at least 8']), (['few', 'real'], ['at least 16']),
    (['real', 'hiss', '--vggish', 'none.pth'], ['none.pth is no file', 'torchvggish']), (['real', 'hiss', '--cnn14', 'vggish.pth'], ['is no CNN14', 'zenodo']),
    (['real', 'hiss', '--out', 'cards.txt'], ['must end in .json']), (['real', 'hiss', '--seed', '-1'], ['seed'])])
def test_refusals(world, capsys, args, words):
    top = world['top']
    if not (top/'few').exists(): write(top/'few', 3, 5)
    assert main(['score', *[str(top/a) if not a.startswith('-') else a for a in args]]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and all(w in said for w in words), said


def test_broken_files_are_all_named(tmp_path, ears):
    write(tmp_path/'a', 12, 6)
    (tmp_path/'a'/'001.wav').write_bytes(b'RIFF'); (tmp_path/'a'/'005.wav').write_bytes((tmp_path/'a'/'005.wav').read_bytes()[:5_000])
    save_audio(tmp_path/'a'/'007.wav', torch.zeros(8_000), 16_000)                 # VGGish needs 0.975 s
    with pytest.raises(ValueError, match='3 of 12 files') as e: listen_to(tmp_path/'a', ears)
    assert all(f'{k}.wav' in str(e.value) for k in ('001', '005', '007'))
    found = listen_to(tmp_path/'a', ears, skip_broken=True)
    assert found.skipped == 3 and found.ids == [f'{i:03d}' for i in range(12) if i not in (1, 5, 7)]  # no neighbour fills the gap
    assert len(listen_to(tmp_path/'a', [ears[2]], skip_broken=True).ids) == 10     # CNN14 can hear half a second


def test_interval_draws_clips_not_rows(heard, ears):
    "Rows of a clip that are repeated carry nothing new: value and interval stay the same"
    many = {k: replace(h, outputs={ears[2].name: [dict(o, rows=np.repeat(o['rows'], 2, 0)) for o in h.outputs[ears[2].name]]}) for k, h in heard.items()}
    a, b = (distance_cards(x['real'], x['hiss'], ears[2])[0] for x in (heard, many))
    assert (b.high - b.low)/(a.high - a.low) == pytest.approx(1, abs=.15) and b.value == pytest.approx(a.value, rel=.2)


# --- the traps of the field, each with its right value ----------------------------------------------------------------

def test_trap_1_and_2_no_root_of_a_matrix_no_swallowed_error():
    "Covariances that commute have a distance by hand: squares of differences of roots; never -1, never complex"
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    s, t = np.linspace(0, 3, 40), np.linspace(2, 1, 40)  # the first root is 0: singular
    for a, b in ((s, t), (t, s)):
        found = frechet_distance(np.zeros(40), turn @ np.diag(a**2) @ turn.T, np.ones(40), turn @ np.diag(b**2) @ turn.T)
        assert found == pytest.approx(40 + ((s - t)**2).sum(), rel=1e-6)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='cov2 holds'): frechet_distance([0.], [[1.]], [0.], [[bad]])


def test_trap_3_and_4_direction_and_kind_are_in_the_name(heard, ears):
    p, q = np.array([[.8, .2]]), np.array([[.5, .5]])
    forward, back = .8*np.log(.8/.5) + .2*np.log(.2/.5), .5*np.log(.5/.8) + .5*np.log(.5/.2)
    assert kl_divergence(p, q) == pytest.approx(forward, abs=1e-5) and kl_divergence(q, p) == pytest.approx(back, abs=1e-5) and abs(forward - back) > .02
    assert kl_sigmoid([[.5, .5]], [[.9, .9]]) == pytest.approx(np.log(.5/.9), abs=1e-5) and kl_sigmoid([[.5, .5]], [[.9, .9]]) < 0  # no divergence
    cards = {c.measure.split(' (lower')[0]: c for c in class_cards(heard['real'], heard['hiss'], ears[2])}
    assert {'KL(real || made), softmax', 'KL(made || real), softmax', 'KL(real || made), sigmoid', 'KL(made || real), sigmoid'} <= set(cards)
    x, y = (np.stack([o['sigmoid'] for o in heard[k].outputs[ears[2].name]]) for k in ('real', 'hiss'))
    assert cards['KL(made || real), sigmoid'].value == pytest.approx(kl_sigmoid(y, x))
    with pytest.raises(ValueError, match='measure differs'): compare(cards['KL(real || made), softmax'], cards['KL(made || real), softmax'])


def test_trap_5_the_window_is_in_the_name(heard, ears):
    assert 'first 2.56 s' in distance_cards(heard['real'], heard['spare'], ears[0])[0].measure


def test_trap_6_both_sets_pass_through_one_reader(tmp_path, world, ears, heard, capsys):
    "The same sounds stored at 48 kHz are the same sounds; lost treble is announced"
    write(tmp_path/'a', 20, 1, lambda w: resample(w[None], 16_000, 48_000)[0].clamp(-1, 1), 48_000)
    high = listen_to(tmp_path/'a', [ears[0]])
    features = [np.concatenate([o['rows'] for o in h.outputs['toy judge']]) for h in (heard['real'], high, heard['spare'])]
    assert frechet_from_features(*features[:2]) < .02*frechet_from_features(features[0], features[2])
    score_folders(tmp_path/'a', world['spare'])
    assert 'sample rates differ, real {48000: 20}, made {16000: 20}' in capsys.readouterr().out


def test_trap_7_silence_is_counted(tmp_path, world, ears, capsys):
    write(tmp_path/'a', 10, 4, torch.zeros_like)
    cards = score_folders(world['real'], tmp_path/'a')
    assert all(c.silent == 10 for c in cards) and '10 made clips are silent' in capsys.readouterr().out


def test_trap_8_rates_of_cnn14_are_two_backbones(tmp_path, world, ears, heard):
    write_cnn14(tmp_path/'32.pth', 32_000)
    high = as_back_end(read_cnn14(tmp_path/'32.pth'))
    assert (ears[2].name, high.name) == ('CNN14 16 kHz', 'CNN14 32 kHz')
    cards = [distance_cards(*(listen_to(world[k], [b]) for k in ('real', 'spare')), b)[0] for b in (ears[2], high)]
    with pytest.raises(ValueError, match='back_end differs'): compare(*cards)


def test_trap_9_nothing_stale(tmp_path, world, ears):
    "The same folder with other sounds, same names: other numbers"
    write(tmp_path/'a', 10, 7)
    before = listen_to(tmp_path/'a', [ears[0]])
    write(tmp_path/'a', 10, 8)
    after = listen_to(tmp_path/'a', [ears[0]])
    assert before.ids == after.ids and not before.prints & after.prints
    assert error(*(torch.from_numpy(np.concatenate([o['rows'] for o in h.outputs['toy judge']])) for h in (before, after))) > .1


def test_trap_10_and_15_ids_are_on_the_card(heard, ears):
    a = distance_cards(heard['real'], heard['hiss'], ears[0])[0]
    renamed = replace(heard['real'], ids=['x' + i for i in heard['real'].ids])
    b = distance_cards(renamed, heard['hiss'], ears[0])[0]
    assert a.real_ids != b.real_ids
    with pytest.raises(ValueError, match='real_ids differs'): compare(a, b)


def test_trap_11_stereo_is_mixed_and_nothing_is_subtracted(tmp_path):
    import soundfile
    from audiorepro.audio import load_audio
    soundfile.write(tmp_path/'a.wav', np.tile([[.5, .1]], (1_000, 1)), 16_000, 'FLOAT')
    assert load_audio(tmp_path/'a.wav')[0].unique().tolist() == pytest.approx([.3])


def test_trap_12_rows_are_patches_of_clips():
    net, wav = randomise(VGGish(VGGishConfig.toy())), sounds(3, 48_000)
    one_by_one = torch.cat([net.features(w[None]) for w in wav])
    assert net.features(wav).shape == (9, 16) and error(net.features(wav), one_by_one) < 1e-5
    assert error(net.features(wav), net.embed(wav).transpose(0, 1).flatten(0, 1)) > .1


def test_trap_13_post_processing_is_off():
    raw = randomise(VGGish(VGGishConfig.toy())).features(sounds(8))
    assert raw.min() < 0 and not torch.equal(raw, raw.round())
    q = pca_quantise(raw.relu(), torch.eye(16), torch.zeros(16))
    assert torch.equal(q, q.round()) and 0 <= q.min() and q.max() <= 255


def test_trap_14_extrapolation_is_seeded_and_n_is_on_the_card(heard, ears):
    a, b = noise(60, 5).numpy(), noise(60, 5, seed=1).numpy()
    assert frechet_infinity(a, b, seed=3) == frechet_infinity(a, b, seed=3) != frechet_infinity(a, b, seed=4)
    cards = [distance_cards(heard['real'], heard['hiss'], ears[0], seed)[0] for seed in (0, 0, 1)]
    assert cards[0] == cards[1] != cards[2] and (cards[0].n, cards[0].n_real, cards[0].n_made, cards[2].seeds) == (10, 20, 20, (1,))


def test_trap_16_the_state_of_torch_is_left_alone(heard):
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    state = torch.get_rng_state()
    net = randomise(Cnn14(Cnn14Config.toy()))
    mel = cnn14_mel(sounds(1), net.cfg).requires_grad_()
    net(mel)['features'].sum().backward()
    assert mel.grad.abs().max() > 0
    net.features(sounds(1))
    assert torch.is_grad_enabled() and state.shape == torch.get_rng_state().shape
    assert all(o['rows'].dtype == np.float64 for o in heard['real'].outputs['toy judge'])  # no 16-bit store between


def test_trap_17_width_of_the_kernel_comes_from_the_real_clips(heard, ears):
    kad = [distance_cards(heard['real'], heard[k], ears[0])[1] for k in ('hiss', 'spare')]
    rows = np.concatenate([o['rows'] for o in heard['real'].outputs['toy judge']])
    pairs = [np.linalg.norm(rows[i] - rows[j]) for i in range(20) for j in range(i)]
    assert kad[0].width == kad[1].width == pytest.approx(np.median(pairs)) == kernel_width(rows)


def test_kernel_distance_pair_by_pair():
    "Two loops, unbiased; zero on average for one source; the largest value for crowds that share nothing"
    a, b, w = noise(7, 3).double().numpy(), noise(5, 3, seed=1).double().numpy() + 1, 1.3
    k = lambda x, y: np.exp(-((x - y)**2).sum()/(2*w*w))
    mean = lambda x: np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j])
    by_hand = 100*(mean(a) + mean(b) - 2*np.mean([k(p, q) for p in a for q in b]))
    assert kernel_distance(a, b, w) == pytest.approx(by_hand, rel=1e-9)
    assert kernel_distance(torch.tensor(a), torch.tensor(b), w, scale=1.) == pytest.approx(by_hand/100, rel=1e-9)
    rng = np.random.default_rng(0)
    found = [kernel_distance(rng.normal(size=(20, 4)), rng.normal(size=(30, 4))) for _ in range(300)]
    assert abs(np.mean(found)) < 4*np.std(found)/300**.5 and min(found) < 0
    for bad in (dict(width=0.), dict(width=-1.), dict(width=np.inf)):
        with pytest.raises(ValueError, match='width'): kernel_distance(a, b, **bad)
    for x, y, words in ((a, b[:, :2], 'a has 3 features'), (a[:1], b, 'N >= 2'), (a, b*np.nan, 'b holds NaN'), (np.ones((4, 2)), np.ones((4, 2)), 'no width')):
        with pytest.raises(ValueError, match=words): kernel_distance(x, y)


def test_trap_18_hidden_states_are_no_probabilities():
    net = randomise(Cnn14(Cnn14Config.toy()))
    hidden, right = net.features(sounds(6)), net.class_probs(sounds(6))
    for f in (lambda: inception_score(hidden, 2), lambda: kl_divergence(right, hidden[:, :10]), lambda: inception_score(net.tag_probs(sounds(6)), 2)):
        with pytest.raises(ValueError, match='probabilities'): f()
    assert 1 <= inception_score(right, 2) <= 10


def test_trap_19_pairs_need_the_same_names(heard, ears):
    renamed = replace(heard['hiss'], ids=heard['hiss'].ids[:-1] + ['else'])
    assert not [c for c in class_cards(heard['real'], renamed, ears[2]) if 'KL' in c.measure]
    order = np.random.default_rng(0).permutation(20)
    mixed = replace(heard['hiss'], ids=[heard['hiss'].ids[i] for i in order], outputs={k: [v[i] for i in order] for k, v in heard['hiss'].outputs.items()})
    a, b = (class_cards(heard['real'], x, ears[2])[0] for x in (heard['hiss'], mixed))
    assert b.value == pytest.approx(a.value)


def test_trap_20_no_reference_holds_the_captions_own_clips():
    for n, m, shared in ((20, 20, 20), (31, 40, 9), (16, 8, 8), (40, 10, 10), (16, 200, 16)):
        real, made = [f'x{i}' for i in range(n)], [f'x{i}' if i < shared else f'y{i}' for i in range(m)]
        a, b, c = split_ids(real, made, seed=n)
        assert len(a) == len(b) == len(c) >= 4 and not set(a) & set(b)
        assert not {real[i] for i in a} & {made[i] for i in c}


def test_trap_21_and_23_the_ear_is_named_and_a_deaf_one_refused(world, capsys):
    class Ear(nn.Module):
        sample_rate, max_seconds = 16_000, 2.56
        def __init__(self, collapse): super().__init__(); self.collapse = collapse; self.register_buffer('seen', torch.zeros(1))
        def embed_text(self, texts): return torch.tensor([[1., 0. if self.collapse else len(t) - 13.] for t in texts])
        def embed_audio(self, wav, rate): return wav[:, :2] + .5
    good, other = Ear(0), Ear(0)
    other.seen += 1e-9
    with pytest.raises(ValueError, match='text tower is broken'): check_clap(Ear(1))
    with pytest.raises(ValueError, match='text tower is broken'): score_folders(world['real'], world['hiss'], Ear(1))
    assert check_clap(good) is good
    cards = [next(c for c in score_folders(world['real'], world['hiss'], e) if 'CLAP' in c.measure) for e in (good, other)]
    with pytest.raises(ValueError, match='back_end_hash differs'): compare(*cards)


def test_trap_22_a_fused_clap_is_refused():
    from types import SimpleNamespace
    from audiorepro.clap_files import HFCLAP
    fused = SimpleNamespace(eval=lambda: None, config=SimpleNamespace(audio_config=SimpleNamespace(enable_fusion=True)))
    with pytest.raises(ValueError, match='enable_fusion=False'): HFCLAP(fused, None)


def test_copies_are_announced(world, capsys):
    score_folders(world['real'], world['real'])
    assert '20 made files are copies of real ones' in capsys.readouterr().out

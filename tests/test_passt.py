"""The adapter for PaSST with a stand-in in the place of the package `hear21passt` (0.0.26): its public interface, none of its weights.

Like the package's network, the stand-in listens at 32 kHz, has positions for 10 s, prints, answers classes and then features under
`mode='all'`, comes in training mode and is not to be trusted in it. Its 527 classes are the levels of 527 bands up to 16 kHz.
"""
import sys, types

import numpy as np, pytest, torch
from torch import nn

from audiorepro.audio import resample
from audiorepro.backbone_files import Passt, load_passt
from audiorepro.folders import BackEnd
from audiorepro.metrics import inception_score, kl_divergence, kl_sigmoid
from audiorepro.scores import weights_hash

RATE, BANDS = 32_000, 527


class Wrapper(nn.Module):
    "The interface of `hear21passt.wrapper.PasstBasicWrapper`"
    def __init__(self, mode='all'):
        super().__init__()
        self.mode, self.device_proxy, self.batches = mode, nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        print('x', tuple(x.shape))
        if x.shape[1] > 10*RATE: raise RuntimeError('no positions for more than 10 s')
        self.batches.append(len(x))
        level = torch.fft.rfft(x.double(), n=640*BANDS).abs()[:, :-1].unflatten(1, (BANDS, -1)).amax(2).float()
        logits = 8*level/level.amax(1, keepdim=True) - 4
        if self.training: logits = logits + 9*torch.rand_like(logits)
        features = torch.cat([logits, logits[:, :768 - BANDS]], 1)
        return {'all': torch.cat([logits, features], 1), 'embed_only': features, 'logits': logits}[self.mode]


@pytest.fixture
def package(monkeypatch):
    base = types.ModuleType('hear21passt.base')
    base.get_basic_model = lambda **kwargs: Wrapper(**kwargs)
    top = types.ModuleType('hear21passt'); top.base = base
    monkeypatch.setitem(sys.modules, 'hear21passt', top); monkeypatch.setitem(sys.modules, 'hear21passt.base', base)


def tones(rate, *hz, seconds=2.): return torch.stack([.3*torch.sin(2*torch.pi*f*torch.arange(round(seconds*rate))/rate) for f in hz])
def band(hz): return int(hz/16_000*BANDS)


def test_rate(package):
    "The class of a tone is the same for clips at 8, 16 and 32 kHz; told a wrong rate, another"
    hz = (300., 1_000., 3_000.)
    for rate in (8_000, 16_000, RATE):
        assert load_passt(rate).listen(tones(rate, *hz))['logits'].argmax(1).tolist() == [band(f) for f in hz]
    assert load_passt(RATE).listen(tones(16_000, *hz))['logits'].argmax(1).tolist() == [band(2*f) for f in hz]
    heard = load_passt(16_000).listen(tones(16_000, *hz))
    net = Wrapper().eval()
    assert torch.equal(heard['logits'], net(resample(tones(16_000, *hz), 16_000, RATE))[:, :BANDS])


def test_columns(package):
    heard = load_passt().listen(tones(RATE, 440., 990.))
    assert {k: tuple(x.shape) for k, x in heard.items()} == dict(features=(2, 768), logits=(2, BANDS))
    assert torch.equal(heard['features'][:, :BANDS], heard['logits'])  # as the stand-in makes them
    for mode in ('logits', 'embed_only'):
        ears = Passt(Wrapper(mode), classes=BANDS if mode == 'logits' else 768)
        with pytest.raises(ValueError, match="mode='all'"): ears.listen(tones(RATE, 440.))


def test_batches(package):
    clips = tones(RATE, *range(200, 1200, 200))
    ears = load_passt()
    whole = ears.listen(clips, batch_size=2)
    assert ears.net.batches == [2, 2, 1]
    one_by_one = torch.cat([ears.listen(x[None])['logits'] for x in clips])
    torch.testing.assert_close(whole['logits'], one_by_one, atol=1e-5, rtol=0)


def test_training_mode_is_off(package):
    "Also after somebody switched it on; without the adapter the same clip is heard differently twice"
    ears, clip = load_passt(), tones(RATE, 440.)
    loose = Wrapper()
    assert not torch.equal(loose(clip), loose(clip))
    ears.train()
    assert torch.equal(ears.listen(clip)['logits'], ears.listen(clip)['logits']) and not ears.net.training
    assert not ears.listen(clip)['logits'].requires_grad and torch.is_grad_enabled()


def test_probabilities(package):
    "Softmax for KL and inception score, sigmoid as it was trained: both from the same logits"
    ears, clips = load_passt(), tones(RATE, 440., 880., 3_000.)
    logits = ears.listen(clips)['logits'].double()
    torch.testing.assert_close(ears.class_probs(clips).double(), logits.exp()/logits.exp().sum(1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(ears.tag_probs(clips).double(), 1/(1 + (-logits).exp()), atol=1e-5, rtol=0)
    soft, tags = ears.class_probs(clips).double().numpy(), ears.tag_probs(clips).double().numpy()
    assert kl_divergence(soft, soft) < 1e-3 < kl_divergence(soft, soft[[1, 2, 0]])
    by_hand = (soft*(np.log(soft) - np.log(soft[[1, 2, 0]] + 1e-6))).sum(1).mean()
    assert abs(kl_divergence(soft, soft[[1, 2, 0]]) - by_hand) < 1e-9
    assert kl_sigmoid(tags, tags) < 1e-3 < kl_sigmoid(tags, tags[[1, 2, 0]])
    assert inception_score(soft, splits=1) > 1


def test_back_end_of_folders(package):
    "A back end of lesson 25a: files of any rate, cut or filled to 10 s"
    ears = load_passt()
    back = BackEnd('PaSST 32 kHz', ears, RATE, .15, 10.)
    for rate, seconds in ((16_000, 10.24), (44_100, 3.)):
        found = back.hear(tones(rate, 1_000., seconds=seconds), rate)
        assert found['softmax'].argmax() == band(1_000.) and found['rows'].shape == (1, 768)
        assert found['softmax'].sum() == pytest.approx(1, abs=1e-5) and found['sigmoid'].shape == (BANDS,)
    assert len(weights_hash(ears)) == 12


@pytest.mark.parametrize('seconds, message', [(10.24, 'got 10.24 s'), (.15, 'got 0.15 s'), (0., 'sample')])
def test_lengths(package, seconds, message):
    with pytest.raises(ValueError, match=message): load_passt().listen(tones(RATE, 440., seconds=seconds))


def test_longest_clip_is_heard(package): assert load_passt(16_000).features(tones(16_000, 440., seconds=10.)).shape == (1, 768)


def test_shape_is_checked(package):
    with pytest.raises(ValueError, match=r'\(B, samples\)'): load_passt().listen(torch.zeros(1, 1, RATE))


def test_nothing_is_printed(package, capsys):
    load_passt().listen(tones(RATE, 440.))
    assert capsys.readouterr().out == ''


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'hear21passt', None)
    with pytest.raises(ImportError, match='pip install hear21passt'): load_passt()


def test_missing_torchaudio_is_named(monkeypatch):
    "The package is there, what it needs is not"
    class Broken(types.ModuleType):
        def __getattr__(self, name): raise ModuleNotFoundError("No module named 'torchaudio'")
    top = types.ModuleType('hear21passt')
    monkeypatch.setitem(sys.modules, 'hear21passt', top)
    monkeypatch.setitem(sys.modules, 'hear21passt.base', Broken('hear21passt.base'))
    with pytest.raises(ImportError, match="torchaudio"): load_passt()

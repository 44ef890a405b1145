"""L_rr: its equation against loops, its training step on a model that is not the lesson's, its rows gathered over two processes, the sampler,
and the text that each option looks at.
"""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn

from audiorepro.regularization import (ContrastHead, KeywordEncoder, RRConfig, gather_rows, is_dropped, l_rr, overlap_batches, pair_correlation,
                                       pool, pooled_pair, rr_loss, shared_labels, similarity_matrix)
from audiorepro.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parent.parent


def draw(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Recurrent(nn.Module):
    "Another model of the interface: a GRU that adds the mean of the text states; it notes what it was shown"
    def __init__(self, codebooks=3, card=5, dim=6, text_dim=4):
        super().__init__()
        self.embed, self.read = nn.Embedding(card + 1, dim), nn.Linear(text_dim, dim, bias=False)
        self.gru, self.head, self.norm = nn.GRU(dim, dim, batch_first=True), nn.Linear(dim, codebooks*card), nn.LayerNorm(dim)
        self.sizes, self.shown = (codebooks, card), []

    def hidden(self, codes, states, mask):
        self.shown.append((states.detach().clone(), mask.clone()))
        text = (states*mask[..., None]).sum(1)/mask.sum(1, keepdim=True).clamp(min=1)
        return self.norm(self.gru(self.embed(codes).sum(1) + self.read(text)[:, None])[0])

    def logits(self, hidden): return self.head(hidden).unflatten(-1, self.sizes).transpose(1, 2)


def cross_entropy(logits, batch): return F.cross_entropy(logits[:, :, :-1].flatten(0, 2), batch['codes'][:, :, 1:].flatten())


def make_batch(n=6, steps=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (n,), generator=rng); lengths[0] = 5
    return dict(codes=torch.randint(5, (n, 3, steps), generator=rng), text_states=torch.randn(n, 5, 4, generator=rng),
                text_mask=torch.arange(5) < lengths[:, None])


class At:
    def __init__(self, step): self.step = step


DROPPED = next(s for s in range(99) if is_dropped(s, .1))
KEPT = next(s for s in range(99) if not is_dropped(s, .1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Recurrent()


# --- the equations --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, wide, narrow', [(2, 3, 3), (3, 1, 9), (7, 8, 2), (12, 768, 64)])
def test_equation_5(n, wide, narrow):
    text, audio = draw(n, wide), draw(n, narrow, seed=1)
    loops = [(text[b] @ text[c]/text[b].norm()/text[c].norm() - audio[b] @ audio[c]/audio[b].norm()/audio[c].norm())**2
             for b in range(n) for c in range(n) if b != c]
    assert len(loops) == n*(n - 1) and torch.allclose(l_rr(text, audio), sum(loops)/(n*(n - 1)), rtol=1e-12)


def test_properties():
    text, audio, order, lengths = draw(9, 5), draw(9, 7, seed=1), torch.randperm(9, generator=torch.Generator().manual_seed(2)), torch.arange(1., 10)[:, None]
    value = l_rr(text, audio)
    assert torch.allclose(l_rr(text[order], audio[order]), value) and torch.allclose(l_rr(text*lengths, audio/lengths), value)
    turn = torch.linalg.qr(draw(7, 7, seed=3))[0]
    assert torch.allclose(l_rr(text, audio @ turn), value) and torch.allclose(l_rr(audio, text), value)
    assert l_rr(audio, audio @ turn) < 1e-20 and abs(l_rr(text, audio[order]) - value) > 1e-3
    assert abs(l_rr(text, audio*lengths.sub(5).sign()) - value) > 1e-3  # a negative factor is no scaling
    text[0], audio[0] = 0, 0
    assert torch.isfinite(l_rr(text, audio)) and similarity_matrix(text)[0].abs().max() == 0


@pytest.mark.parametrize('kind', ['max', 'mean'])
def test_gradients(kind):
    hidden, mask = draw(4, 6, 3).requires_grad_(), torch.arange(6) < torch.tensor([6, 2, 1, 4])[:, None]
    text = draw(4, 5, seed=1).requires_grad_()
    loss = lambda x: l_rr(text, pool(x, mask, kind))
    assert torch.autograd.gradcheck(loss, hidden)
    loss(hidden).backward()
    assert text.grad is None and not hidden.grad[~mask].any()
    touched = (hidden.grad != 0).flatten(1).sum(1)
    assert touched.tolist() == ([3]*4 if kind == 'max' else (3*mask.sum(1)).tolist())


def test_one_item_has_no_pair():
    audio = draw(1, 3).requires_grad_()
    (audio.sum() + l_rr(draw(1, 2), audio)).backward()
    assert l_rr(draw(1, 2), audio) == 0 and audio.grad.eq(1).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_left(dtype):
    x = 3 + .4*draw(30, 64, dtype=torch.float32)  # maxima of LayerNorm outputs: all cosines near one
    exact = similarity_matrix(x.to(dtype).double())
    assert (similarity_matrix(x.to(dtype)).double() - exact).abs().max() < 1e-6
    with torch.autocast('cpu', torch.bfloat16): assert (similarity_matrix(x.to(dtype)).double() - exact).abs().max() < 1e-6
    rough = F.normalize(x.to(dtype), dim=-1)
    assert ((rough @ rough.T).double() - exact).abs().max() > 1e-4


@pytest.mark.parametrize('call, words', [
    (lambda: pool(draw(2, 3, 4), torch.tensor([[True]*3, [False]*3])), 'item 1 has no real position'), (lambda: pool(draw(2, 3, 4), kind='sum'), "got 'sum'"),
    (lambda: l_rr(draw(3, 2), draw(2, 2)), 'text has 3 items, audio has 2'), (lambda: RRConfig(lam=-1.), 'lam'), (lambda: RRConfig(pool='average'), "got 'average'"),
    (lambda: overlap_batches([('a',)], 2), 'batch_size'), (lambda: overlap_batches([('a',)]*3, 2, candidates=0), 'candidates'),
    (lambda: pair_correlation(np.eye(3), np.eye(4)), r'\(4, 4\)'), (lambda: KeywordEncoder([]), 'at least one keyword')])
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call()


# --- the training step ----------------------------------------------------------------------------------------------

def test_dropped_batches_see_no_text_and_aim_at_the_real_one(model):
    batch, cfg = make_batch(), RRConfig()
    found = rr_loss(model, batch, At(DROPPED), cross_entropy, cfg)
    states, mask = model.shown[-1]
    assert not states.any() and not mask.any() and found['dropped'] == 1
    hidden = model.hidden(batch['codes'], states, mask)
    wanted = l_rr(pool(batch['text_states'], batch['text_mask']), pool(hidden[:, 1:]))
    assert torch.equal(found['loss_rr'], wanted) and torch.allclose(found['loss'], found['loss_ce'] + 3*wanted)
    other = batch | dict(text_states=batch['text_states'].flip(0), text_mask=batch['text_mask'].flip(0))
    again = rr_loss(model, other, At(DROPPED), cross_entropy, cfg)
    assert torch.equal(again['loss_ce'], found['loss_ce']) and not torch.equal(again['loss_rr'], found['loss_rr'])


@pytest.mark.parametrize('where, at', [('dropped', {DROPPED}), ('kept', {KEPT}), ('all', {DROPPED, KEPT})])
def test_where(model, where, at):
    for step in (DROPPED, KEPT):
        found = rr_loss(model, make_batch(), At(step), cross_entropy, RRConfig(where=where))
        assert bool(found['loss_rr'] > 0) == (step in at)
        assert torch.equal(model.shown[-1][1], make_batch()['text_mask']) == (step == KEPT)
        assert torch.allclose(found['loss'], found['loss_ce'] + 3*found['loss_rr'])


def test_options_look_at_what_they_say(model):
    batch = make_batch()
    hidden, both = model.hidden(batch['codes'], batch['text_states'], batch['text_mask']), (batch['text_states'], batch['text_mask'])
    pair = partial(pooled_pair, model, hidden, batch)
    text, audio = pair(RRConfig())
    assert torch.equal(text, pool(*both)) and torch.equal(audio, hidden[:, 1:].amax(1))
    assert torch.equal(pair(RRConfig(skip_start=False))[1], hidden.amax(1))
    assert torch.equal(pair(RRConfig(audio='logits', pool='mean'))[1], model.logits(hidden)[:, :, 1:].mean(2).flatten(1))
    projected = pair(RRConfig(text='projected'), project=model.read)[0]
    assert torch.equal(projected, pool(model.read(both[0]), both[1])) and not projected.requires_grad and audio.requires_grad
    steps = torch.arange(8) < torch.tensor([8, 5, 2, 8, 3, 4])[:, None]
    assert torch.equal(pooled_pair(model, hidden, batch | dict(step_mask=steps.long()))[1], pool(hidden[:, 1:], steps[:, 1:]))
    target = draw(6, 1, 9, seed=4)
    assert torch.equal(pooled_pair(model, hidden, batch | dict(target_states=target, target_mask=torch.ones(6, 1, dtype=torch.bool)))[0], target[:, 0])
    with pytest.raises(ValueError, match='needs project'): pair(RRConfig(text='projected'))


def test_nothing_flows_into_text_nor_projection(model):
    batch = make_batch()
    batch['text_states'].requires_grad_()
    cfg = RRConfig(text='projected', where='dropped')
    rr_loss(model, batch, At(DROPPED), cross_entropy, cfg, project=model.read)['loss_rr'].backward()
    assert batch['text_states'].grad is None and (model.read.weight.grad is None or not model.read.weight.grad.any())
    assert model.gru.weight_hh_l0.grad.abs().sum() > 0


def test_fit_lowers_it_and_coins_do_not_depend_on_the_start(model):
    batch = make_batch(12)
    def batches(start_step):
        while True: yield batch
    cfg = RRConfig(drop_prob=.5)
    rows = fit(model, partial(rr_loss, cross_entropy=cross_entropy, cfg=cfg), batches, TrainConfig(120, 1e-2, log_every=20), progress=False)
    assert [r['dropped'] for r in rows] == [np.mean([is_dropped(s, .5) for s in range(a, a + 20)]) for a in range(0, 120, 20)]
    assert rows[-1]['loss_rr']/rows[-1]['dropped'] < .5*rows[0]['loss_rr']/rows[0]['dropped']


def test_contrastive_rival(model):
    torch.manual_seed(1)
    model.contrast, batch = ContrastHead(4, 6, dim=3), make_batch()
    found = rr_loss(model, batch, At(DROPPED), cross_entropy, RRConfig(lam=1.), regularizer=model.contrast)
    text, audio = pooled_pair(model, model.hidden(batch['codes'], *(torch.zeros_like(batch[f'text_{k}']) for k in ('states', 'mask'))), batch)
    a, t = (F.normalize(f(x), dim=-1) for f, x in ((model.contrast.audio, audio), (model.contrast.text, text)))
    p = (a @ t.T/.07)
    by_hand = -(p.log_softmax(1).diagonal().mean() + p.log_softmax(0).diagonal().mean())/2
    assert torch.allclose(found['loss_rr'], by_hand, atol=1e-6)


# --- several processes ----------------------------------------------------------------------------------------------

def _worker(rank, world, address, folder):
    torch.distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, whole = Recurrent().double(), make_batch(6)
    part = {k: (v.double() if v.is_floating_point() else v).chunk(world)[rank] for k, v in whole.items()}
    found = rr_loss(model, part, At(DROPPED), cross_entropy, RRConfig(gather=True))
    found['loss_rr'].backward()
    for p in model.parameters():  # as `fit`: gradients are averaged
        if p.grad is None: p.grad = torch.zeros_like(p)
        torch.distributed.all_reduce(p.grad); p.grad /= world
    torch.save(dict(rr=found['loss_rr'].detach(), grads=[p.grad for p in model.parameters()], coins=[is_dropped(s, .3) for s in range(50)]), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    "L_rr over gathered rows and its averaged gradients are those of one process with the whole batch"
    torch.multiprocessing.spawn(_worker, (2, f'file://{tmp_path}/meet', str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = Recurrent().double()
    whole = {k: v.double() if v.is_floating_point() else v for k, v in make_batch(6).items()}
    alone = rr_loss(model, whole, At(DROPPED), cross_entropy)
    alone['loss_rr'].backward()
    first, second = (torch.load(tmp_path/f'{r}.pt', weights_only=True) for r in (0, 1))
    assert first['coins'] == second['coins']
    for found in (first, second):
        assert torch.allclose(found['rr'], alone['loss_rr'], rtol=1e-12)
        for mine, p in zip(found['grads'], model.parameters()):
            assert torch.allclose(mine, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-9, atol=1e-15)
    halves = [rr_loss(model, {k: v.chunk(2)[r] for k, v in whole.items()}, At(DROPPED), cross_entropy)['loss_rr'] for r in (0, 1)]
    assert abs(sum(halves)/2 - alone['loss_rr']) > 1e-4  # without gathering: fewer pairs, another number
    assert gather_rows(whole['text_states']) is whole['text_states']


# --- the sampler and the look at the target -------------------------------------------------------------------------

def toy_labels(n, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.choice(16, rng.integers(2, 4), replace=False).tolist()) for _ in range(n)]


@pytest.mark.parametrize('share', [.3, .5, .7])
def test_sampler_meets_its_share(share):
    labels = toy_labels(300)
    overlaps = shared_labels(labels) > 0
    assert .2 < overlaps[~torch.eye(300, dtype=torch.bool)].double().mean() < .4
    draws = overlap_batches(labels, 24, share, seed=3)
    rows = [r for r, _ in zip(draws(), range(40))]
    for r in rows:
        assert len(set(r.tolist())) == 24
        assert abs((overlaps[r][:, r].sum() - 24).item()/(24*23) - share) < .03
    assert all(torch.equal(a, b) for a, b in zip(draws(11), rows[11:])) and not torch.equal(rows[0], rows[1])
    assert len({i for r in rows for i in r.tolist()}) > 240  # it does not live on a few clips
    other = next(overlap_batches(labels, 24, share, seed=4)())
    assert not torch.equal(other, rows[0])


def test_plain_batches_are_uniform():
    draws = overlap_batches(toy_labels(50), 10, candidates=1, seed=1)
    counts = np.bincount(np.concatenate([r.numpy() for r, _ in zip(draws(), range(500))]), minlength=50)
    assert abs(counts/100 - 1).max() < .4 and counts.sum() == 5000


def test_correlation_is_that_of_the_pairs():
    a = draw(30, 30).numpy(); a = a + a.T
    b = .6*a + draw(30, 30, seed=1).numpy(); b = b + b.T
    i, j = np.triu_indices(30, 1)
    found = pair_correlation(a, torch.from_numpy(b), n_resamples=300)
    assert abs(found['r'] - np.corrcoef(a[i, j], b[i, j])[0, 1]) < 1e-12 and (found['clips'], found['pairs']) == (30, 435)
    assert found['low'] < found['r'] < found['high']
    np.fill_diagonal(a, 1e3)  # a clip is no pair
    assert pair_correlation(a, b, 0)['r'] == found['r']


def test_interval_covers_as_often_as_it_says():
    "Similarities made of clips' own vectors: pairs depend on each other, and the interval knows"
    hits = 0
    big, noise = draw(1500, 6, seed=9), draw(1500, 6, seed=10)
    truth = pair_correlation(big @ big.T, (big + noise) @ (big + noise).T, 0)['r']
    for k in range(60):
        x, y = draw(60, 6, seed=100 + k), draw(60, 6, seed=900 + k)
        found = pair_correlation(x @ x.T, (x + y) @ (x + y).T, n_resamples=100, seed=k)
        hits += found['low'] <= truth <= found['high']
    assert 49 <= hits <= 60, hits


def test_keywords():
    encoder = KeywordEncoder(['A dog barks, then rain falls.', 'the dogs were barking at 3 people'])
    assert list(encoder.words) == ['bark', 'dog', 'fall', 'people', 'rain']
    states, mask = encoder.encode(['barked', 'rain, rain and a cat', ''])
    assert states[:, 0].tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0]*5] and mask.shape == (3, 1) and mask.all()
    assert shared_labels([('dog', 'dog'), ('dog', 'rain'), ()]).tolist() == [[1, .5, 0], [.5, 1, 0], [0, 0, 0]]


# --- what the lesson keeps ------------------------------------------------------------------------------------------

def test_stored_runs_are_whole():
    "Every arm has every seed once, and the arms of a seed saw the same clips"
    kept = json.loads((ROOT/'figures'/'62_regularization_arms.json').read_text())
    assert sorted((r['arm'], r['seed']) for r in kept['runs']) == sorted((a, s) for a in ('none', 'L_rr', 'shuffled') for s in range(5))
    assert all(-1 <= r[part][k] <= 1 for r in kept['runs'] for part in ('train', 'heldout') for k in ('captions', 'events'))


def test_paper_scale_cell(tmp_path, monkeypatch, capsys):
    "The cell about a real corpus runs on four clips and a made text encoder"
    from audiorepro import t5_files
    from audiorepro.audio import save_audio
    source = next(s for c in json.loads((ROOT/'nbs'/'62_regularization.ipynb').read_text())['cells'] for s in [''.join(c['source'])] if "at_scale('gpu'" in s)
    monkeypatch.chdir(tmp_path)
    said = ['a dog barks', 'a dog barks, then rain falls', 'rain falls', 'a bell rings']
    for k in range(4): save_audio(tmp_path/f'data/audiocaps/audio/v{k}_0.wav', .1*torch.sin(torch.arange(1600)/5)[None], 16_000)
    (tmp_path/'data/audiocaps/val.csv').write_text('youtube_id,start_time,caption\n' + ''.join(f'v{k},0,"{s}"\n' for k, s in enumerate(said)))
    monkeypatch.setattr(t5_files.HFT5, 'from_pretrained', classmethod(lambda cls, *a, **k: KeywordEncoder(said)))
    names = dict(at_scale=lambda *a, **k: True, KeywordEncoder=KeywordEncoder, similarity_matrix=similarity_matrix, pool=pool, pair_correlation=pair_correlation, torch=torch)
    exec(source, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all('AudioCaps val 4' in line and "'r': 1.0" in line.replace('0.9999999', '1.0') for line in lines), lines

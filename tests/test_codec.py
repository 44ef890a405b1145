"""The codec equals transformers' `EncodecModel` on the same weights and codebooks, at the edges too; every slip of public quantisers
is refused by a check; published layouts are read; two processes keep one codebook.
"""
import json, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import pytest, torch, torch.nn.functional as F

from audiorepro import codec_files, codec_training
from audiorepro.codec import Codebook, Codec, CodecConfig, ResidualQuantizer, count_codes, kmeans, pad_ends
from audiorepro.codec_training import CodecGame, StftCritics, balance, spectral_loss, toy_recipe
from audiorepro.core import count_params, make_generator
from audiorepro.sounds import make_records
from audiorepro.training import TrainConfig, fit, run_recipe, tensor_batches

transformers = pytest.importorskip('transformers')
SMALL = CodecConfig(filters=8, dim=16, codebook_size=64, init_gain=2.4, kmeans_rounds=3)
CASES = dict(
    reflect=SMALL, constant=replace(SMALL, pad_mode='constant'), conv_shortcut=replace(SMALL, shortcut='conv'),
    other=CodecConfig(24_000, filters=4, ratios=(5, 3, 2), dim=10, codebooks=3, codebook_size=32, lstm_layers=1, residual_layers=2,
                      dilation_growth=3, kernel=5, last_kernel=3, residual_kernel=5, init_gain=2.4))


def reference(cfg):
    "transformers' class with the settings of `cfg`; it derives the number of levels from a bandwidth"
    frame = -(-cfg.sample_rate//cfg.hop_length)
    return transformers.EncodecModel(transformers.EncodecConfig(
        sampling_rate=cfg.sample_rate, audio_channels=cfg.channels, num_filters=cfg.filters, hidden_size=cfg.dim, upsampling_ratios=list(cfg.ratios),
        codebook_size=cfg.codebook_size, num_lstm_layers=cfg.lstm_layers, num_residual_layers=cfg.residual_layers, kernel_size=cfg.kernel,
        last_kernel_size=cfg.last_kernel, residual_kernel_size=cfg.residual_kernel, dilation_growth_rate=cfg.dilation_growth, compress=cfg.compress,
        use_conv_shortcut=cfg.shortcut == 'conv', pad_mode=cfg.pad_mode, use_causal_conv=False,
        target_bandwidths=[cfg.codebooks*frame*(cfg.codebook_size.bit_length() - 1)/1000])).eval()


def pair(cfg, seed=0):
    "Ours and the reference with one set of weights and random codebooks"
    torch.manual_seed(seed)
    ours, peer = Codec(cfg).eval(), reference(cfg)
    for k, p in ours.state_dict().items():
        if 'codebook.embed' in k: p.copy_(.3*torch.randn(p.shape))
        if 'inited' in k: p.fill_(1)
    peer.load_state_dict(ours.state_dict())  # strict: the names are the same
    return ours, peer


def theirs(peer, wav):
    with torch.no_grad():
        codes = peer.encode(wav, bandwidth=peer.config.target_bandwidths[-1]).audio_codes[0]
        return codes, peer.decode(codes[None], [None])[0]


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('samples', [8001, 640, 7])
def test_equals_transformers(name, samples):
    cfg = CASES[name]
    ours, peer = pair(cfg)
    wav = .3*torch.randn(2, 1, samples, generator=make_generator(1))
    codes, sound = theirs(peer, wav)
    assert torch.equal(ours.encode(wav), codes) and codes.shape == (2, cfg.codebooks, -(-samples//cfg.hop_length))
    if samples > 8000: assert all(level.unique().numel() > 4 for level in codes.unbind(1))  # not a test on one code
    with torch.no_grad(): made = ours.decode(codes)
    assert made.shape == sound.shape and (made - sound).abs().max() <= 1e-5*sound.abs().max()
    if samples < 8000: return
    with torch.no_grad():  # controls: another code, another list, another padding
        changed = codes.clone(); changed[0, 0, 3] = (changed[0, 0, 3] + 1) % cfg.codebook_size
        assert (ours.decode(changed) - sound).abs().max() > 1e-3*sound.abs().max()
        ours.quantizer.books[-1].embed.add_(.3*torch.randn(ours.quantizer.books[-1].embed.shape))
        assert (ours.decode(codes) - sound).abs().max() > 1e-3*sound.abs().max()
        other = Codec(replace(cfg, pad_mode='constant' if cfg.pad_mode == 'reflect' else 'reflect')).eval()
        other.load_state_dict(peer.state_dict())
        assert not torch.equal(other.encode(wav), codes)


def test_published_counts():
    for cfg, count in ((CodecConfig.encodec_16khz(), 56_819_138), (CodecConfig.encodec_32khz(), 56_884_674)):
        with torch.device('meta'): peer = reference(cfg)
        assert count_params(lambda: Codec(cfg)) == count_params(peer) == count and len(peer.quantizer.layers) == 4
    toy = Codec(CodecConfig.toy())
    assert 2*sum(v.numel() for v in toy.state_dict().values()) < 2_000_000  # bytes in half precision
    assert toy.frame_rate == 50 and toy.cfg.hop_length == 320


def test_padding():
    for length in (1, 2, 3, 9):
        for left, right in ((0, 0), (3, 2), (1, 5)):
            x = torch.randn(1, 2, length, generator=make_generator(length))
            for mode in ('reflect', 'constant'): assert pad_ends(x, left, right, mode).shape[-1] == left + length + right
            if length > 5: assert torch.equal(pad_ends(x, left, right, 'reflect'), F.pad(x, (left, right), mode='reflect'))


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    codec = Codec(replace(SMALL, filters=4))
    codec(.3*torch.randn(2, 1, 9000, generator=make_generator(0)), make_generator(0))
    return codec.eval()


def test_wrong_input_is_refused(trained):
    wav = torch.zeros(1, 1, 1000)
    codes = trained.encode(wav)
    bad = {'got 44100': lambda: trained.encode(wav, 44_100), '(1, 1000)': lambda: trained.encode(wav[0]), '(1, 2, 1000)': lambda: trained.encode(wav.expand(1, 2, -1)),
           'torch.int64': lambda: trained.encode(wav.long()), '(1, 1, 0)': lambda: trained.encode(wav[..., :0]), '(1, 3, 4)': lambda: trained.decode(codes[:, :3]),
           '(1, 4, 0)': lambda: trained.decode(codes[..., :0]), 'torch.float32': lambda: trained.decode(codes.float()),
           'must be in 0..63, got 64..': lambda: trained.decode(codes*0 + 64), 'got -1..': lambda: trained.decode(codes*0 - 1),
           'length must be a whole number in 1..1280, got 1281': lambda: trained.decode(codes, 1281), 'levels must be': lambda: trained.decode(codes, levels=0),
           'must be trained or loaded first': lambda: Codec(SMALL).encode(wav), "pad_mode must be 'reflect' or 'constant'": lambda: CodecConfig(pad_mode='zeros')}
    for words, call in bad.items():
        with pytest.raises(ValueError) as e: call()
        assert words in str(e.value), (words, str(e.value))
    with pytest.raises(ValueError, match='first'): Codec(SMALL).decode(codes)


def test_saved_and_restored(trained, tmp_path):
    trained.save_pretrained(tmp_path/'codec', dtype=torch.float16)
    again = Codec.from_pretrained(tmp_path/'codec')
    codes = torch.randint(64, (1, 4, 9), generator=make_generator(0))
    with torch.no_grad(): a, b = again.decode(codes), trained.decode(codes)
    assert again.cfg == trained.cfg and (a - b).abs().max() < .02*b.abs().max()


# --- what goes wrong in public quantisers ------------------------------------------------------------------------------

def test_every_level_commits_and_nothing_else_moves_the_encoder():
    quantizer = ResidualQuantizer(SMALL)
    z = torch.randn(2, 16, 90, generator=make_generator(0), requires_grad=True)
    quantizer(z, make_generator(0)); quantizer.eval()
    straight, codes, commit = quantizer(z)
    for level in commit: assert torch.autograd.grad(level, z, retain_graph=True)[0].norm() > 1e-4
    g = torch.randn(z.shape, generator=make_generator(1))
    assert torch.allclose(torch.autograd.grad(straight, z, g)[0], g)
    assert torch.allclose(straight, quantizer.decode(codes), atol=1e-6) and torch.equal(codes, quantizer.encode(z))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(quantizer(z)[1], codes)
    assert torch.isfinite(quantizer((1e4*z).detach().half())[2]).all()  # squares beyond half precision
    assert not list(quantizer.parameters())


def test_restart_reaches_the_next_step():
    cfg = replace(SMALL, dim=8, dead_below=1.)
    for fresh in (True, False):
        book, draw = Codebook(cfg), make_generator(0)
        book.embed.copy_(.1*torch.randn(64, 8, generator=draw) + 30); book.embed_avg.copy_(book.embed); book.cluster_size.fill_(.5)
        x = torch.randn(256, 8, generator=draw)
        tally = book.tally(x, book.encode(x))
        if fresh: book.restart(x, draw)
        book.absorb(*tally)
        used = book.encode(torch.randn(1000, 8, generator=draw)).unique().numel()
        assert used > 40 if fresh else used < 5
        assert torch.allclose(book.embed, book.embed_avg/book.cluster_size[:, None], rtol=1e-3)
    untouched = Codebook(replace(cfg, dead_below=0.)); untouched.restart(x)
    assert not untouched.embed.any()


def test_kmeans_finds_clusters():
    centres = 10*torch.randn(6, 4, generator=make_generator(0))
    x = centres.repeat_interleave(50, 0) + .1*torch.randn(300, 4, generator=make_generator(1))
    book, counts = kmeans(x, 30, 20, make_generator(2))
    assert counts.sum() == 300 and torch.cdist(centres, book).min(1).values.max() < .2
    assert len(kmeans(x[:3], 8, 2, make_generator(0))[0]) == 8  # fewer vectors than entries


PROCESS = """
    import sys, torch, torch.distributed as dist
    from dataclasses import replace
    from audiorepro.codec import CodecConfig, ResidualQuantizer
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(rank)  # each its own random numbers
    q = ResidualQuantizer(replace(CodecConfig.toy(), dim=4, codebook_size=16, codebooks=2))
    for step in range(6): q(torch.randn(2, 4, 20))
    torch.save(q.state_dict(), f'{store}.{rank}')
"""


def test_two_processes_keep_one_codebook(tmp_path):
    store = tmp_path/'store'
    jobs = [subprocess.Popen([sys.executable, '-c', textwrap.dedent(PROCESS), str(r), str(store)], stderr=subprocess.PIPE) for r in (0, 1)]
    for job in jobs:
        error = job.communicate(timeout=120)[1]
        assert job.returncode == 0, error.decode()[-500:]
    a, b = (torch.load(f'{store}.{r}', weights_only=True) for r in (0, 1))
    for k in a: assert torch.equal(a[k], b[k]), k
    assert a['layers.1.codebook.embed'].abs().sum() > 0


def test_usage_is_counted_over_batches():
    codes = torch.randint(8, (4, 3, 50), generator=make_generator(0))
    assert torch.equal(count_codes(codes[:2], 8) + count_codes(codes[2:], 8), count_codes(codes, 8)) and count_codes(codes, 8).sum() == codes.numel()


# --- training ----------------------------------------------------------------------------------------------------------

def test_losses_by_hand():
    loud = torch.randn(2, 1, 4000, generator=make_generator(0))
    assert spectral_loss(-loud, loud, 16_000) == 0 and spectral_loss(.5*loud, loud, 16_000) < spectral_loss(.1*loud, loud, 16_000)
    out = torch.randn(3, 1, 5, generator=make_generator(1), requires_grad=True)
    pulls = {}
    for w in (1., 3.):  # the other loss has no pull left over: shares are lengths
        g = torch.autograd.grad(balance(dict(a=1e4*out.sum(), b=1e-4*out[:, :, 0].sum()), dict(a=w, b=1.), out), out)[0]
        pulls[w] = g[:, 0, 1:].norm(dim=1).mean()/(w/(w + 1))
    assert torch.isclose(pulls[1.], pulls[3.])


def test_fit_trains_both_players_and_goes_on_where_it_stopped(tmp_path):
    wav = .3*torch.randn(6, 3000, generator=make_generator(0))
    def run(steps, folder):
        torch.manual_seed(0)
        model, critics = Codec(replace(SMALL, filters=2, dim=4, codebook_size=8)), StftCritics((128,), 2)
        game = CodecGame(2560, quantize_from=2, rival_start=3)
        rows = fit(model, game, tensor_batches(dict(wav=wav), 3), TrainConfig(steps, lr=1e-3, weight_decay=0., log_every=1, save_every=4),
                   rival=(critics, game.rival), folder=folder, progress=False)
        return model, critics, rows
    whole, critics, rows = run(6, tmp_path/'whole')
    run(4, tmp_path/'parts'); parts, *_ = run(6, tmp_path/'parts')
    for (k, a), b in zip(whole.state_dict().items(), parts.state_dict().values()): assert torch.equal(a, b), k
    assert 'loss_rival' not in rows[2] and 'loss_rival' in rows[3] and rows[1]['loss_commit'] == 0 < rows[2]['loss_commit']
    assert all(p.isfinite().all() for p in critics.parameters())


def test_toy_recipe_runs_and_its_weights_are_found(tmp_path, monkeypatch):
    "Three steps of the recipe: one plain, two quantised after the latent was evened out; then the weights by the name 'mine'"
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path))
    few = make_records(8)
    monkeypatch.setattr(codec_training, 'make_records', lambda n: (few*260)[:n])
    recipe = toy_recipe()
    assert recipe.key == toy_recipe().key != toy_recipe('full').key
    recipe.loss_fn.quantize_from = 1
    assert recipe.loss_fn.even and not recipe.loss_fn.balanced
    recipe.config = replace(recipe.config, steps=3, eval_every=3, log_every=1)
    run_recipe(recipe, progress=False)
    losses = json.loads((tmp_path/'weights'/'codec'/'training.json').read_text())['losses']
    assert {'val_mel', 'used_0', 'used_3', 'loss_l1', 'loss_spectra', 'loss_commit'} <= set(losses) and losses['val_mel'] > 0
    assert (tmp_path/'weights'/'codec'/'model.safetensors').stat().st_size < 2_000_000
    model = Codec.from_pretrained('mine')
    assert model.cfg == CodecConfig.toy() and model.encode(few[0].wav[None, None]).shape == (1, 4, 128)


def test_one_coin_for_all():
    games = [CodecGame(rival_start=5, rival_share=.5) for _ in range(2)]
    turns = [[g.is_turn(step) for step in range(400)] for g in games]
    assert turns[0] == turns[1] and not any(turns[0][:5]) and 150 < sum(turns[0]) < 250


# --- published files -----------------------------------------------------------------------------------------------------

def audiocraft_file(path, peer, cfg):
    "The reference's weights in audiocraft's layout, by the published table of names"
    import re
    ups, state = {k for k, m in peer.named_modules() if isinstance(m, torch.nn.ConvTranspose1d)}, {}
    for k, x in peer.state_dict().items():
        part = 'convtr' if any(k.startswith(up + '.') for up in ups) else 'conv'
        k = re.sub(r'\.conv\.', f'.{part}.{part}.', re.sub(r'^(encoder|decoder)\.layers', r'\1.model', k))
        k = re.sub(r'^quantizer\.layers\.(\d+)\.codebook', r'quantizer.vq.layers.\1._codebook', k)
        state[k.replace('parametrizations.weight.original0', 'weight_g').replace('parametrizations.weight.original1', 'weight_v')] = x
    settings = dict(
        sample_rate=cfg.sample_rate, channels=cfg.channels, encodec=dict(causal=False, renormalize=False, sample_rate='${sample_rate}'),
        seanet=dict(dimension=cfg.dim, channels='${channels}', causal='${encodec.causal}', n_filters=cfg.filters, n_residual_layers=cfg.residual_layers,
                    ratios=list(cfg.ratios), activation='ELU', norm='weight_norm', kernel_size=cfg.kernel, residual_kernel_size=cfg.residual_kernel,
                    last_kernel_size=cfg.last_kernel, dilation_base=cfg.dilation_growth, pad_mode=cfg.pad_mode, true_skip=cfg.shortcut == 'identity',
                    compress=cfg.compress, lstm=cfg.lstm_layers, disable_norm_outer_blocks=0, decoder=dict(final_activation=None)),
        rvq=dict(n_q=cfg.codebooks, bins=cfg.codebook_size))
    torch.save({'best_state': state, 'xp.cfg': json.dumps(settings), 'version': '1', 'exported': True}, path)  # JSON is YAML
    return settings


@pytest.mark.parametrize('name', ['reflect', 'constant', 'conv_shortcut', 'other'])
def test_reads_published_layouts(name, tmp_path):
    cfg = CASES[name]
    ours, peer = pair(cfg, seed=3)
    wav = .3*torch.randn(1, 1, 3001, generator=make_generator(0))
    codes, sound = theirs(peer, wav)
    peer.save_pretrained(tmp_path/'hf')
    (tmp_path/'old').mkdir()
    torch.save({k.replace('parametrizations.weight.original0', 'weight_g').replace('parametrizations.weight.original1', 'weight_v'): x
                for k, x in peer.state_dict().items()}, tmp_path/'old'/'pytorch_model.bin')  # as files from before 2023 name them
    (tmp_path/'old'/'config.json').write_text((tmp_path/'hf'/'config.json').read_text())
    (tmp_path/'whole').mkdir()
    torch.save({f'audio_encoder.{k}': x for k, x in peer.state_dict().items()} | {'decoder.x': torch.zeros(1)}, tmp_path/'whole'/'pytorch_model.bin')
    inner = json.loads((tmp_path/'hf'/'config.json').read_text())
    (tmp_path/'whole'/'config.json').write_text(json.dumps(dict(model_type='musicgen', audio_encoder=inner)))
    (tmp_path/'craft').mkdir()
    audiocraft_file(tmp_path/'craft'/'compression_state_dict.bin', peer, cfg)
    for place in ('hf', 'old', 'whole', 'craft', 'craft/compression_state_dict.bin'):
        model = Codec.from_pretrained(tmp_path/place)
        assert model.cfg == replace(cfg, init_gain=1., kmeans_rounds=50), place
        with torch.no_grad(): made = model.decode(codes)
        assert torch.equal(model.encode(wav), codes) and (made - sound).abs().max() <= 1e-5*sound.abs().max(), place


def test_what_this_codec_is_not_is_refused(tmp_path):
    _, peer = pair(SMALL)
    craft = tmp_path/'compression_state_dict.bin'
    settings = audiocraft_file(craft, peer, SMALL)
    content = torch.load(craft, weights_only=True)
    def changed(**seanet): return json.dumps(settings | dict(seanet=settings['seanet'] | seanet))
    bad = [(content | {'xp.cfg': changed(causal=True)}, "'causal': True"), (content | {'xp.cfg': changed(pad_mode=None)}, 'lacks seanet.pad_mode'),
           (content | {'xp.cfg': changed(norm='time_group_norm')}, 'time_group_norm'), (content | {'xp.cfg': changed(dimension='${rvq.none}')}, 'has no rvq.none'),
           (content | {'xp.cfg': changed(dimension='${seanet.dimension}')}, 'in a circle'), (content | {'xp.cfg': ': : :'}, 'is no YAML'),
           (dict(pretrained='facebook/encodec_32khz'), "read 'facebook/encodec_32khz'"), (dict(best_state=content['best_state']), 'has no settings'),
           (content | {'best_state': {k: x for k, x in content['best_state'].items() if 'lstm' not in k}}, 'missing encoder.layers.13.lstm')]
    for data, words in bad:
        torch.save(data, craft)
        with pytest.raises(ValueError) as e: Codec.from_pretrained(craft)
        assert words in str(e.value), (words, str(e.value))
    torch.save(dict(content, extra=Path), craft)  # code in the pickle: refused by the restricted reader
    with pytest.raises(ValueError, match='refused, not run'): codec_files.read_codec(craft)
    for setting in (dict(use_causal_conv=True), dict(normalize=True), dict(chunk_length_s=1.), dict(norm_type='time_group_norm'), dict(codebook_dim=7)):
        with pytest.raises(ValueError, match=next(iter(setting))): codec_files.config_from_transformers(peer.config.to_dict() | setting)

"""The token language model against transformers' MusicGen, against audiocraft's arithmetic written out, and against itself."""
import math, sys, types, warnings
from dataclasses import replace

import pytest, torch, torch.nn.functional as F
from torch.testing import assert_close
from transformers import (MusicgenDecoderConfig, MusicgenForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper,
                          TopPLogitsWarper)

from audiorepro.core import count_params, load_strict, make_generator
from audiorepro.t5 import T5
from audiorepro.t5_files import HFT5
from audiorepro.tokenlm import (KVCache, TokenAudio, TokenLM, TokenLMConfig, cfg_coin, code_losses, delay, draw_codes,
                                generate, lm_loss, next_probs, toy_recipe, undelay, valid_steps, wave_positions)
from audiorepro.tokenlm_files import PublishedLM, musicgen_config, musicgen_state
from audiorepro.training import TrainConfig, fit, tensor_batches

from standins import random_musicgen, shake

TINY = TokenLMConfig(4, 31, 32, 4, 2, 48, text_dim=24, max_frames=60)


def make(cfg=TINY, seed=0):
    "A model in which no tensor is zero or one"
    torch.manual_seed(seed)
    return shake(TokenLM(cfg))


def request(cfg=TINY, lengths=(7, 3), seed=1):
    "Text states of unequal length and their mask"
    g = make_generator(seed)
    states = torch.randn(len(lengths), max(lengths), cfg.text_dim, generator=g)
    return states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def some_codes(B, T, cfg=TINY, seed=2): return torch.randint(0, cfg.card, (B, cfg.codebooks, T), generator=make_generator(seed))


# --- sizes and layout ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, count', [('small', 419_584_000), ('medium', 1_837_556_736), ('large', 3_255_382_016)])
def test_published_sizes(name, count):
    cfg = getattr(TokenLMConfig, name)()
    assert count_params(lambda: TokenLM(cfg)) - (cfg.text_dim + 1)*cfg.dim == count


def test_the_toy_is_a_toy():
    cfg = TokenLMConfig.toy()
    assert 1.5e6 < count_params(TokenLM(cfg)) < 2.5e6 and (cfg.codebooks, cfg.card, cfg.text_dim) == (4, 256, 128)


def test_delay_by_hand():
    codes = torch.arange(1, 5).expand(1, 3, 4)
    assert delay(codes, 0)[0].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]
    assert delay(codes, 0, full=True)[0].tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 0, 1, 2, 3, 4, 0], [0, 0, 0, 1, 2, 3, 4]]


def test_delay_and_back_on_1000_shapes():
    g = make_generator(0)
    for _ in range(1000):
        B, K, T = torch.randint(1, 10, (3,), generator=g).tolist()
        codes = torch.randint(0, 40, (B, K, T), generator=g)
        full, short = delay(codes, 40, True), delay(codes, 40)
        assert full.shape == (B, K, T + K) and torch.equal(short, full[..., :T + 1])
        assert torch.equal(undelay(full, 40, True), codes)
        kept = torch.arange(T) < T - torch.arange(K)[:, None]  # codebook k keeps T - k frames
        assert torch.equal(undelay(short, 40), torch.where(kept, codes, 40))
        for layout, is_full in ((short, False), (full, True)): assert torch.equal(valid_steps(K, T, is_full), (layout != 40)[0])


def test_each_code_sees_the_coarser_codes_of_its_frame():
    "Code k of frame t is drawn from a past that holds codes 0 .. k - 1 of frame t, and not code k + 1"
    step = {(k, t): t + k + 1 for k in range(4) for t in range(6)}
    full = delay(torch.arange(24).view(1, 6, 4).transpose(1, 2), 99, True)[0]
    for (k, t), s in step.items():
        assert full[k, s] == 4*t + k
        past = full[:, :s].flatten().tolist()
        assert all((4*t + j in past) == (j < k) for j in range(4) if j != k)


# --- equality -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('K, card, dim, heads, layers, ffn', [(4, 31, 32, 4, 2, 48), (2, 17, 24, 3, 3, 20), (1, 9, 16, 1, 1, 64)])
def test_equal_to_transformers(K, card, dim, heads, layers, ffn):
    torch.manual_seed(K)
    theirs = shake(MusicgenForCausalLM(MusicgenDecoderConfig(
        vocab_size=card, hidden_size=dim, num_hidden_layers=layers, ffn_dim=ffn, num_attention_heads=heads, num_codebooks=K,
        dropout=0., pad_token_id=card, bos_token_id=card)))
    cfg = TokenLMConfig(K, card, dim, heads, layers, ffn, dim)
    ours = TokenLM(cfg).eval()
    load_strict(ours, musicgen_state(theirs.state_dict()))
    states, mask = request(cfg, (9, 4, 1))
    text = dict(encoder_hidden_states=states*mask[..., None], encoder_attention_mask=mask.long())
    delayed = delay(some_codes(3, 200, cfg), card)
    with torch.no_grad():
        expected = theirs(delayed.flatten(0, 1), **text).logits.unflatten(0, (3, K))
        logits = ours(delayed, states, mask)
        loss = theirs(delayed[..., :-1].flatten(0, 1), labels=delayed[..., 1:].transpose(1, 2), **text).loss
    assert (logits - expected).abs().max() < 5e-5 and expected.std() > .3
    assert_close(code_losses(logits, delayed, card).mean(), loss, atol=1e-5, rtol=0)


def audiocraft_logits(state, codes, states, mask, heads):
    "audiocraft's forward, spelled out on its own names: padded text is zero and is read"
    def norm(x, name): return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])
    def attend(q, kv, name, future=None):
        w = state[f'{name}.in_proj_weight'].chunk(3)
        q, k, v = ((x @ m.T).unflatten(-1, (heads, -1)).transpose(1, 2) for x, m in zip((q, kv, kv), w))
        scores = q @ k.transpose(-1, -2)/math.sqrt(q.shape[-1])
        if future is not None: scores = scores.masked_fill(future, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ state[f'{name}.out_proj.weight'].T
    proj = 'condition_provider.conditioners.description.output_proj'
    text = (states @ state[f'{proj}.weight'].T + state[f'{proj}.bias'])*mask[..., None]
    x = sum(state[f'emb.{k}.weight'][codes[:, k]] for k in range(codes.shape[1]))
    half, S = x.shape[-1]//2, x.shape[1]
    phase = torch.arange(S)[:, None]/10_000**(torch.arange(half)/(half - 1))
    x = x + torch.cat([phase.cos(), phase.sin()], -1)
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    for i in range(sum(k.endswith('linear1.weight') for k in state)):
        at = f'transformer.layers.{i}'
        h = norm(x, f'{at}.norm1')
        x = x + attend(h, h, f'{at}.self_attn', future)
        x = x + attend(norm(x, f'{at}.norm_cross'), text, f'{at}.cross_attention')
        x = x + F.gelu(norm(x, f'{at}.norm2') @ state[f'{at}.linear1.weight'].T) @ state[f'{at}.linear2.weight'].T
    return torch.stack([norm(x, 'out_norm') @ state[f'linears.{k}.weight'].T for k in range(codes.shape[1])], 1)


def audiocraft_state(K=4, card=31, dim=32, layers=2, ffn=48, text=24, seed=0):
    "Random tensors under the names of audiocraft (models/lm.py, modules/transformer.py, commit 896ec7c)"
    shapes = {f'emb.{k}.weight': (card + 1, dim) for k in range(K)} | {f'linears.{k}.weight': (card, dim) for k in range(K)}
    for i in range(layers):
        at = f'transformer.layers.{i}'
        shapes |= {f'{at}.{a}.{n}': s for a in ('self_attn', 'cross_attention')
                   for n, s in (('in_proj_weight', (3*dim, dim)), ('out_proj.weight', (dim, dim)))}
        shapes |= {f'{at}.{n}.{p}': (dim,) for n in ('norm1', 'norm_cross', 'norm2') for p in ('weight', 'bias')}
        shapes |= {f'{at}.linear1.weight': (ffn, dim), f'{at}.linear2.weight': (dim, ffn)}
    proj = 'condition_provider.conditioners.description.output_proj'
    shapes |= {'out_norm.weight': (dim,), 'out_norm.bias': (dim,), f'{proj}.weight': (dim, text), f'{proj}.bias': (dim,)}
    g = make_generator(seed)
    return {k: torch.randn(s, generator=g)*(s[-1]**-.5 if len(s) > 1 else 1.) for k, s in shapes.items()}


SETTINGS = '''
transformer_lm: {n_q: 4, card: 31, dim: 32, num_heads: 4, num_layers: 2, norm_first: true, positional_embedding: sin}
codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0}}
fuser: {cross: [description], prepend: [], sum: []}
dataset: {segment_duration: 10}
'''


def save_audiocraft(path, settings=SETTINGS, **changes):
    torch.save({'best_state': audiocraft_state(), 'xp.cfg': settings, 'version': '1.4.0', 'exported': True} | changes, path)
    return path


@pytest.mark.parametrize('mha', [False, True])  # both names that audiocraft gives to the same attention
def test_equal_to_audiocraft(tmp_path, mha):
    state = audiocraft_state()
    names = {k.replace('self_attn.', 'self_attn.mha.').replace('cross_attention.', 'cross_attention.mha.') if mha else k: x
             for k, x in state.items()}
    ours = PublishedLM.from_pretrained(save_audiocraft(tmp_path/'state_dict.bin', best_state=names).parent)
    assert ours.cfg == TokenLMConfig(4, 31, 32, 4, 2, 48, 24, 'zeroed', 500)
    states, mask = request(lengths=(7, 3, 1))
    codes = delay(some_codes(3, 100), 31)
    with torch.no_grad():
        expected = audiocraft_logits(state, codes, states, mask, 4)
        other = TokenLM(replace(ours.cfg, text_padding='masked')).eval()
        other.load_state_dict(ours.state_dict())
        found, masked = ours(codes, states, mask), other(codes, states, mask)
    assert (found - expected).abs().max() < 1e-4 and expected.std() > .3
    assert (masked - expected)[0].abs().max() < 1e-4 < 1e-2 < (masked - expected)[1:].abs().amax((1, 2, 3)).min()


@pytest.fixture(scope='module')
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp('musicgen')/'whole'
    theirs = random_musicgen(folder, seed=3)
    caught, decode = [], theirs.audio_encoder.decode
    def catch(codes, *args, **kw):
        caught.append(codes[0])
        return decode(codes, *args, **kw)
    theirs.audio_encoder.decode = catch
    return theirs, folder, caught


def their_codes(system, frames, **kw):
    system[0].generate(max_length=frames + 4, do_sample=False, **kw)
    return system[2][-1]


def test_a_whole_musicgen(system):
    "Same text in, same states, logits and greedy codes out"
    theirs, folder, _ = system
    t5, lm = HFT5.from_pretrained(folder), PublishedLM.from_pretrained(folder)
    prompts = ['a dog barks, then rain falls in every house again', 'wind']
    states, mask = t5.encode(prompts)
    ids = t5.tokenizer.encode(prompts)[0]
    with torch.no_grad():
        expected = theirs.text_encoder(ids, attention_mask=mask.long()).last_hidden_state
        assert ((states - expected)*mask[..., None]).abs().max() < 1e-5
        codes = delay(some_codes(2, 40, lm.cfg), 64)
        logits = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=codes.flatten(0, 1)).logits
        assert (lm(codes, states, mask).flatten(0, 1) - logits).abs().max() < 5e-5
    for scale in (1., 3., 7.):
        found = generate(lm, 30, states, mask, temperature=0, guidance_scale=scale)
        assert torch.equal(found, their_codes(system, 30, input_ids=ids, attention_mask=mask.long(), guidance_scale=scale))
    begun = some_codes(2, 9, lm.cfg, seed=8)
    found = generate(lm, 25, states, mask, prefix=begun, temperature=0)
    assert torch.equal(found[..., :9], begun)
    assert torch.equal(found, their_codes(system, 25, input_ids=ids, attention_mask=mask.long(), guidance_scale=3.,
                                          decoder_input_ids=begun.flatten(0, 1)))


def test_without_text_as_theirs(system):
    theirs, folder, _ = system
    lm = PublishedLM.from_pretrained(folder)
    nothing = theirs.get_unconditional_inputs(num_samples=2)
    expected = their_codes(system, 20, encoder_outputs=nothing.encoder_outputs, attention_mask=nothing.attention_mask, guidance_scale=1.)
    assert torch.equal(generate(lm, 20, batch_size=2, temperature=0), expected)


def test_files_of_transformers_that_differ(system, tmp_path):
    "T5 as wide as the LM has no projection; a decoder saved alone; a table of positions as older files have it"
    theirs = random_musicgen(tmp_path/'same', seed=1, text_dim=32)
    assert not hasattr(theirs, 'enc_to_dec_proj')
    states, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    codes = delay(some_codes(2, 8, TokenLMConfig(4, 64)), 64)
    theirs.decoder.save_pretrained(tmp_path/'alone')
    with torch.no_grad():
        expected = theirs.decoder(codes.flatten(0, 1), encoder_hidden_states=states).logits.unflatten(0, (2, 4))
        for name in ('same', 'alone'):
            assert (PublishedLM.from_pretrained(tmp_path/name)(codes, states, mask) - expected).abs().max() < 5e-5
    state = system[0].state_dict()
    old = state | {'decoder.model.decoder.embed_positions.weights': torch.zeros(2048, 32)}
    assert musicgen_state(old).keys() == musicgen_state(state).keys()


# --- the model by itself --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('padding', ['masked', 'zeroed'])
def test_cache_in_pieces_equals_the_whole(padding):
    lm = make(replace(TINY, text_padding=padding)).double()
    states, mask = request(lengths=(7, 3, 0))
    codes, cache, parts = delay(some_codes(3, 11), 31), KVCache(lm, 3, 12), []
    with torch.no_grad():
        whole = lm.hidden(codes, states, mask)
        for piece in codes.split((1, 5, 1, 4, 1), -1): parts.append(lm.hidden(piece, states, mask, cache))
    assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
    assert cache.length == 12


def test_it_is_causal_to_the_bit():
    lm, (states, mask) = make().double(), request()
    codes = delay(some_codes(2, 12), 31)
    for k, s in ((0, 1), (3, 7), (1, 12)):
        other = codes.clone()
        other[:, k, s] = (other[:, k, s] + 1) % 31
        with torch.no_grad(): moved = (lm.hidden(other, states, mask) - lm.hidden(codes, states, mask)).abs().amax((0, 2))
        assert (moved > 0).tolist() == [i >= s for i in range(13)]


@pytest.mark.parametrize('padding', ['masked', 'zeroed'])
def test_no_text_is_no_text(padding):
    "A masked row, zeros, and no states at all: the same numbers"
    lm, (states, mask) = make(replace(TINY, text_padding=padding)), request(lengths=(6, 0))
    codes = delay(some_codes(2, 9), 31)
    with torch.no_grad(): some, none = lm(codes, states, mask), lm(codes)
    assert_close(some[1], none[1], atol=1e-6, rtol=0)
    assert (some[0] - none[0]).abs().max() > .05


def test_5000_words_of_text():
    "There is no limit: attention to the text has no positions; padding up to there changes nothing"
    lm, (states, mask) = make(), request(lengths=(5, 3))
    codes = delay(some_codes(2, 6), 31)
    long, long_mask = F.pad(states, (0, 0, 0, 4995)), F.pad(mask, (0, 4995))
    with torch.no_grad():
        assert_close(lm(codes, long, long_mask), lm(codes, states, mask), atol=1e-5, rtol=0)
        assert lm(codes, torch.randn(2, 5000, 24)).isfinite().all()


def test_positions():
    p = wave_positions(0, 1500, 64).float()
    half = 32
    angle = torch.arange(1500.)[:, None]*torch.exp(torch.arange(float(half))*-(math.log(10_000)/(half - 1)))
    assert_close(p, torch.cat([angle.cos(), angle.sin()], 1), atol=5e-4, rtol=0)  # 32-bit angles are not better
    assert torch.equal(wave_positions(700, 3, 64).float(), p[700:703])


def test_save_and_load(tmp_path):
    lm = make()
    lm.save_pretrained(tmp_path)
    again = TokenLM.from_pretrained(tmp_path)
    assert again.cfg == lm.cfg and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lm.state_dict().values()))


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    lm, g = TokenLM(TokenLMConfig.toy()), make_generator(0)
    codes = delay(torch.randint(0, 256, (4, 4, 64), generator=g), 256)
    with torch.no_grad(): each = code_losses(lm(codes, torch.randn(4, 9, 128, generator=g)), codes, 256)
    assert (each > math.log(256)).all() and (each < math.log(256) + 1).all()
    for i, block in enumerate(lm.blocks):  # deeper blocks start smaller
        assert abs(block.fc1.weight.std().item()*(160*2*(i + 1))**.5 - .987) < .01  # .987: normal numbers cut at three deviations


# --- the loss -------------------------------------------------------------------------------------------------------------

def context(step=0): return types.SimpleNamespace(step=step)


def test_padding_is_not_counted():
    "Each code is predicted one step before it stands; frames that are padding, and those the layout cuts off, count for nothing"
    lm, (states, mask) = make(), request()
    codes = some_codes(2, 9)
    codes[1, :, 5:] = 31
    found = lm_loss(lm, dict(codes=codes.short(), t5=states, t5_mask=mask), context(), cond_drop_prob=0)
    with torch.no_grad(): log_p = lm(delay(codes, 31), states, mask).log_softmax(-1)
    for k in range(4):
        terms = [-log_p[b, k, t + k, codes[b, k, t]] for b, frames in ((0, 9), (1, 5)) for t in range(frames) if t + k + 1 <= 9]
        assert_close(found[f'ce_{k + 1}'], torch.stack(terms).mean(), atol=1e-5, rtol=0)
    assert_close(found['loss'], sum(found[f'ce_{k + 1}'] for k in range(4))/4)


def test_one_coin_for_all():
    "The coin depends on the step alone: every process tosses the same, and p of them fall"
    for p in (0., .1, .3, 1.):
        n = sum(cfg_coin(step, p) for step in range(2000))
        assert abs(n - 2000*p) <= 4*(2000*p*(1 - p))**.5
    pairs = [cfg_coin(s, .5) == cfg_coin(s + 1, .5) for s in range(2000)]
    assert abs(sum(pairs) - 1000) < 4*500**.5  # neighbours are independent
    lm, (states, mask) = make(), request()
    batch = dict(codes=some_codes(2, 9), t5=states, t5_mask=mask)
    step = next(s for s in range(99) if cfg_coin(s, .1))
    dropped = lm_loss(lm, batch, context(step))['loss']
    assert_close(dropped, lm_loss(lm, batch | dict(t5_mask=torch.zeros_like(mask)), context(step + 1), 0.)['loss'])
    assert dropped != lm_loss(lm, batch, context(step), 0.)['loss']


def test_everything_learns():
    "With text every parameter has a gradient; without, only what reads the text has none"
    states, mask = request()
    for p in (0., 1.):
        lm = make()
        lm_loss(lm, dict(codes=some_codes(2, 9), t5=states, t5_mask=mask), context(), p)['loss'].backward()
        still = {n for n, x in lm.named_parameters() if x.grad is None or not x.grad.any()}
        unread = {n for n, _ in lm.named_parameters() if 'text' in n}
        assert still == (unread if p else set())
        assert all(x.grad is not None for x in lm.parameters())  # none is left out: processes may toss as they like


def test_it_obeys_the_text():
    "Two texts, two sequences: after seconds each text gives its own, and guidance does not spoil it"
    torch.manual_seed(0)
    cfg = replace(TINY, card=16, dim=48, ffn=96)
    lm, (states, mask) = TokenLM(cfg), request(cfg, (5, 2))
    codes = some_codes(2, 16, cfg)
    history = fit(lm, lm_loss, tensor_batches(dict(codes=codes, t5=states, t5_mask=mask), 2), TrainConfig(
        80, lr=5e-3, betas=(.9, .95), warmup_steps=5, ema_decay=.9, log_every=10), progress=False)
    assert history[-1]['loss'] < history[0]['loss']/2
    for scale in (1., 3.): assert (generate(lm, 16, states, mask, temperature=0, guidance_scale=scale) == codes).float().mean() > .9


# --- sampling -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('temperature, k, p', [(1., 250, 1.), (.7, 5, 1.), (1.3, 0, .8), (1., 9, .5), (.5, 3, .01)])
def test_filters_equal_those_of_transformers(temperature, k, p):
    logits = 3*torch.randn(50, 40, generator=make_generator(0))
    x = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if k: x = TopKLogitsWarper(min(k, 40))(None, x)
    if p < 1: x = TopPLogitsWarper(p)(None, x)
    assert_close(next_probs(logits, temperature, k, p), x.softmax(-1), atol=1e-6, rtol=0)


def test_top_p_by_hand():
    x = torch.tensor([.1, .5, .15, .25]).log()
    for p, kept in ((.01, [1]), (.5, [1]), (.51, [1, 3]), (.76, [1, 2, 3]), (.95, [0, 1, 2, 3]), (1., [0, 1, 2, 3])):
        assert next_probs(x, top_p=p).nonzero().flatten().tolist() == kept


def test_draws_follow_the_distribution():
    probs = next_probs(torch.randn(1, 3, 20, generator=make_generator(5)), top_k=12)
    drawn = draw_codes(probs.expand(30_000, 3, 20), make_generator(1))
    for k in range(3):
        count = drawn[:, k].bincount(minlength=20).double()
        assert (count[probs[0, k] == 0] == 0).all()
        expected = 30_000*probs[0, k].double()
        chi = ((count - expected)**2/expected.clamp(min=1e-9))[expected > 0].sum()
        assert chi < 40  # 11 degrees of freedom: one in 30,000 exceeds this
    assert abs((drawn[:, 0] == drawn[:, 1]).double().mean() - (probs[0, 0]*probs[0, 1]).sum()) < .01  # codebooks are independent


def test_a_batch_equals_its_items():
    "Also with the cache off, in another order, and beside other neighbours"
    lm, seeds, lengths = make(), (3, 1, 4, 1), (7, 3, 5, 3)
    states, mask = request(lengths=lengths)
    states[3], mask[3] = states[1], mask[1]
    def run(rows, **kw): return generate(lm, 20, states[rows], mask[rows], top_k=20, generator=[make_generator(seeds[i]) for i in rows], **kw)
    batch = run([0, 1, 2, 3])
    assert torch.equal(run([0, 1, 2, 3], use_cache=False), batch)
    assert torch.equal(batch[1], batch[3]) and not torch.equal(batch[0], batch[1])
    assert torch.equal(run([2, 0]), batch[[2, 0]])
    for i, n in enumerate(lengths):
        alone = generate(lm, 20, states[i:i + 1, :n], top_k=20, generator=[make_generator(seeds[i])])
        assert torch.equal(alone, batch[i:i + 1])


def test_a_beginning_is_continued():
    "Continuing a clip with its own first frames and greedy choice gives the clip again; other beginnings stay as they are"
    lm, (states, mask) = make(), request()
    whole = generate(lm, 20, states, mask, temperature=0)
    for n in (1, 3, 4, 19):
        assert torch.equal(generate(lm, 20, states, mask, temperature=0, prefix=whole[..., :n]), whole)
    begun = some_codes(2, 6)
    for cached in (True, False):
        assert torch.equal(generate(lm, 12, states, mask, prefix=begun, use_cache=cached, generator=make_generator(0))[..., :6], begun)


def test_guidance_is_a_line_between_two_models():
    lm, (states, mask) = make(), request()
    free = generate(lm, 12, batch_size=2, temperature=0)
    assert torch.equal(generate(lm, 12, states, mask, temperature=0, guidance_scale=0.), free)
    assert torch.equal(generate(lm, 12, temperature=0), free[:1])  # nothing says how many: one
    assert torch.equal(generate(lm, 12, states, torch.zeros_like(mask), temperature=0), free)
    assert not torch.equal(generate(lm, 12, states, mask, temperature=0), free)


BAD = dict(
    temperature=(dict(temperature=-.1), dict(temperature=float('nan'))), top_k=(dict(top_k=-1), dict(top_k=2.5)),
    top_p=(dict(top_p=0.), dict(top_p=1.01)), guidance_scale=(dict(guidance_scale=float('inf')),),
    num_frames=(dict(num_frames=0), dict(num_frames=61), dict(num_frames=True), dict(prefix=some_codes(2, 12)), dict(prefix=some_codes(2, 99))),
    generator=(dict(generator='x'), dict(generator=[7, 8])),
    codes=(dict(prefix=some_codes(2, 5)[:, :3]), dict(prefix=some_codes(2, 5) + 31), dict(prefix=some_codes(2, 5) - 31), dict(prefix=some_codes(2, 5).float())),
    items=(dict(prefix=some_codes(3, 5)), dict(generator=[make_generator(0)]), dict(batch_size=3)), batch_size=(dict(states=None, mask=None, batch_size=-1), dict(states=None, mask=None, batch_size=0)))


@pytest.mark.parametrize('name, change', [(k, c) for k, rows in BAD.items() for c in rows])
def test_bad_requests_are_refused_before_any_work(name, change, monkeypatch):
    lm, (states, mask) = make(), request()
    monkeypatch.setattr(lm, 'hidden', None)
    with pytest.raises(ValueError, match=name): generate(lm, **dict(num_frames=12, states=states, mask=mask) | change)


@pytest.mark.parametrize('bad, words', [(dict(codes=some_codes(2, 9) + 2), '0..31'), (dict(codes=some_codes(2, 9) - 31), '0..31'), (dict(codes=some_codes(2, 9)[:, 1:]), r'\(B, 4, T\)'),
                                        (dict(codes=some_codes(2, 3)), 'one frame for each'), (dict(t5=torch.zeros(2, 7, 23)), r'\(B, L, 24\)')])
def test_bad_batches_are_refused(bad, words):
    states, mask = request()
    with pytest.raises(ValueError, match=words): lm_loss(make(), dict(codes=some_codes(2, 9), t5=states, t5_mask=mask) | bad, context())


@pytest.mark.parametrize('change', [dict(dim=34), dict(dim=2, heads=1), dict(heads=0), dict(codebooks=0), dict(text_padding='pad'), dict(card=0)])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))): replace(TINY, **change)


# --- pipeline and recipe ----------------------------------------------------------------------------------------------------

class TinyCodec(torch.nn.Module):
    "Stands in for the codec: 25 frames a second, a code says how loud a part of the frame is"
    sample_rate, frame_rate = 16_000, 25
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    @classmethod
    def from_pretrained(cls, name): return cls()
    def encode(self, wav):
        parts = wav[:, 0, :wav.shape[2]//640*640].unflatten(1, (-1, 4, 160)).abs().amax(-1)  # (B, T, 4)
        return (parts.clamp(max=1)*255).round().long().transpose(1, 2)
    def decode(self, codes): return (codes.transpose(1, 2).float()/255).flatten(1).repeat_interleave(160, 1)[:, None]


@pytest.fixture(scope='module')
def pipe():
    torch.manual_seed(0)
    return TokenAudio(T5.from_pretrained('toy'), TokenLM(replace(TokenLMConfig.toy(), dim=32, heads=2, layers=2, ffn=48)), TinyCodec())


def test_pipeline_seeds_and_lengths(pipe):
    wav = pipe(['a dog barks', 'rain falls'], seconds=.5, seed=7)
    assert wav.shape == (2, 8000) and wav.abs().max() <= 1
    assert torch.equal(pipe('rain falls', seconds=.5, seed=8), wav[1:]) and torch.equal(pipe(['a dog barks', 'rain falls'], seconds=.5, seed=[7, 8]), wav)
    assert pipe('a dog barks', seconds=.5, seed=0, output='codes').shape == (1, 4, 13)  # 12.5 frames, rounded up
    assert pipe('a dog barks', seconds=.48, seed=0, output='codes').shape == (1, 4, 12)
    assert not torch.equal(pipe('a dog barks', seconds=.5, seed=0), pipe('a dog barks', seconds=.5, seed=1))


def test_pipeline_without_text_and_beside_text(pipe):
    free = pipe('', seconds=.4, seed=5, output='codes')
    assert torch.equal(pipe(['a dog barks', ''], seconds=.4, seed=4, output='codes')[1:], free)
    assert torch.equal(free, generate(pipe.lm, 10, generator=[make_generator(5)]))


def test_pipeline_continues_a_sound(pipe):
    begin = torch.rand(1, 3200, generator=make_generator(0))
    codes = pipe(['a dog barks', 'rain falls'], seconds=.4, prefix=begin, seed=0, output='codes')
    assert torch.equal(codes[..., :5], pipe.codec.encode(begin[None]).expand(2, -1, -1)) and codes.shape[2] == 10
    with pytest.raises(ValueError, match='prefix has 5 frames'): pipe('rain falls', seconds=.2, prefix=begin)


def test_pipeline_reads_what_it_can_of_5000_words(pipe):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        wav = pipe('a dog barks ' + 'and rain falls '*1666, seconds=.2, seed=0)
    assert wav.isfinite().all() and any('only the first' in str(w.message) for w in seen)


@pytest.mark.parametrize('change, name', [(dict(prompt=[]), 'prompt'), (dict(prompt=3), 'prompt'), (dict(prompt='?!'), 'prompt'), (dict(seconds=0), 'seconds'),
                                          (dict(seconds=21), 'seconds'), (dict(output='mp3'), 'output'), (dict(seed=[1, 2]), 'seed'), (dict(seed=1.5), 'seed'),
                                          (dict(temperature=-1), 'temperature'), (dict(top_k=-3), 'top_k')])
def test_pipeline_refuses(pipe, change, name):
    with pytest.raises(ValueError, match=name): pipe(**dict(prompt='rain falls', seconds=.2) | change)


@pytest.mark.parametrize('budget', ['short', 'full'])
def test_the_recipe_trains(budget, tmp_path, monkeypatch):
    "With a stand-in for the codec's module: two steps, a finite loss, the average of the weights at 0.99"
    monkeypatch.setenv('AUDIOREPRO_OUT', str(tmp_path))
    monkeypatch.setattr('audiorepro.tokenlm.Codec', TinyCodec)
    recipe = toy_recipe(budget, weights='toy', clips=10, wordings=2)
    assert recipe.config.ema_decay == .99 and recipe.config.betas == (.9, .95) and recipe.name == 'tokenlm'
    batch = next(recipe.batches(0))
    assert batch['codes'].shape == (16, 4, 64) and batch['t5'].shape[2] == 128 and batch['t5'].dtype == torch.float32
    config = replace(recipe.config, steps=2, log_every=1, bf16=False)
    assert all(0 < row['loss'] < 8 for row in fit(recipe.model, recipe.loss_fn, recipe.batches, config, progress=False))


# --- files ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('old, new, words', [
    ('[0, 1, 2, 3]', '[0, 0, 1, 1]', 'delays'), ('modeling: delay', 'modeling: parallel', 'modeling'), ('positional_embedding: sin', 'positional_embedding: rope', 'rope'),
    ('prepend: []', 'prepend: [self_wav]', 'self_wav'), ('norm_first: true', 'norm_first: false', 'norm_first'), (SETTINGS, 'a: [', 'no YAML'), (SETTINGS, '&a [*a', 'no YAML')])
def test_other_settings_of_audiocraft_are_refused(tmp_path, old, new, words):
    file = save_audiocraft(tmp_path/'state_dict.bin', SETTINGS.replace(old, new))
    with pytest.raises(ValueError, match=words) as e: PublishedLM.from_pretrained(file)
    assert 'state_dict.bin' in str(e.value)


@pytest.mark.parametrize('values, words', [(dict(model_type='musicgen_melody'), 'musicgen_melody'), (dict(model_type='musicgen', decoder=dict(audio_channels=2)), 'audio_channels'),
                                           (dict(model_type='musicgen', decoder=dict(activation_function='relu')), 'relu'), (dict(), 'model_type None')])
def test_other_models_of_transformers_are_refused(values, words):
    with pytest.raises(ValueError, match=words): musicgen_config(values, {}, 'x')


def test_lost_and_surplus_tensors_are_named(tmp_path):
    for change, words in ((dict(drop='transformer.layers.1.norm_cross.bias'), 'missing blocks.1.norm_text.bias'),
                          (dict(add='transformer.layers.0.linear1.bias'), 'surplus blocks.0.fc1.bias'), (dict(drop='emb.0.weight'), 'missing emb.0.weight')):
        state = audiocraft_state()
        if 'drop' in change: del state[change['drop']]
        else: state[change['add']] = torch.zeros(48)
        with pytest.raises(ValueError, match=words): PublishedLM.from_pretrained(save_audiocraft(tmp_path/'state_dict.bin', best_state=state))
    with pytest.raises(ValueError, match='no settings'): PublishedLM.from_pretrained(save_audiocraft(tmp_path/'state_dict.bin', None))


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return exec, (f"open({str(tmp_path/'ran')!r}, 'w')",)
    save_audiocraft(tmp_path/'state_dict.bin', extra=Evil())
    with pytest.raises(ValueError, match='exec'): PublishedLM.from_pretrained(tmp_path/'state_dict.bin')
    assert not (tmp_path/'ran').exists()

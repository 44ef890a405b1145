"""Both directions: every solution passes its checks, every stub fails them; and the stubs are made from the solutions.

Student cells and their checks start with `#| exercise`; ordinary test runs skip them, these tests force them.
"""
import contextlib, importlib.util, io, json, re, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((ROOT/'nbs'/'solutions').glob('[!_]*.ipynb'))
by_name = pytest.mark.parametrize('path', SOLUTIONS, ids=lambda p: p.stem)

spec = importlib.util.spec_from_file_location('lessons', ROOT/'tests'/'lessons.py')
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)


def sections(text):
    "(heading, source, is_flagged) of each code cell; the heading is the last one that starts with '## Exercise'"
    heading = None
    for cell in json.loads(text)['cells']:
        source = ''.join(cell['source'])
        if found := re.search(r'^## (Exercise.*)$', source, re.M) if cell['cell_type'] == 'markdown' else None: heading = found[1]
        if cell['cell_type'] == 'code': yield heading, source, source.startswith('#| exercise')


def run(source, names, where):
    with contextlib.redirect_stdout(io.StringIO()): exec(compile(source, where, 'exec'), names)


def test_there_are_exercises(): assert SOLUTIONS


def test_stubs_are_in_step_with_the_solutions():
    late = lessons.exercises(check=True)
    assert not late, f'{late}: run `python tests/lessons.py exercises`'


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if pyplot := sys.modules.get('matplotlib.pyplot'): pyplot.close('all')


@by_name
def test_solutions_pass(path):
    names = {'__name__': '__main__'}
    for i, (_, source, _) in enumerate(sections(path.read_text())): run(source, names, f'{path.stem}, code cell {i}')


@by_name
def test_stubs_fail(path):
    "In every exercise some forced cell raises because the answer is missing; all other cells run"
    names, unanswered, seen = {'__name__': '__main__'}, set(), set()
    for i, (heading, source, is_flagged) in enumerate(sections(lessons.exercise_text(path))):
        if not is_flagged: run(source, names, f'{path.stem}, code cell {i}')
        elif heading not in unanswered:
            seen.add(heading)
            try: run(source, names, f'{path.stem}, code cell {i}')
            except NotImplementedError: unanswered.add(heading)
    assert seen and seen == unanswered, f'pass without an answer: {seen - unanswered}'


# right answers that differ from the solution: (notebook, exercise, answer, what the hints must say)
OTHER_ANSWERS = [
    ('12_mel', 2, 'def centre(t, cfg): return t*cfg.hop_length + cfg.n_fft/2 - cfg.pad', ''),  # a float
    ('12_mel', 4, 'def raw_fbank(x, cfg): return x.squeeze(1)*2*cfg.std + cfg.mean\n'
                  'def sounding(x, cfg): return [int((r.abs() > 1e-4).any(-1).nonzero().max()) + 1 for r in raw_fbank(x, cfg)]', 'up to the last one'),  # a list
    ('12_mel', 5, 'def one_round(spec, mag, cfg): c = stft(istft(spec, cfg), cfg); return torch.polar(mag, c.angle())\n'
                  'def mismatch(spec, mag, cfg):\n    fit = stft(istft(spec, cfg), cfg).abs()\n'
                  '    return torch.linalg.vector_norm(fit - mag)/torch.linalg.vector_norm(mag)', 'torch.polar(mag, c.angle())'),  # a tensor, as in the formula
    ('13_text', 1, "def masked_max(states, mask): return states.masked_fill(~mask[..., None], -float('inf')).max(1).values", '`masked_fill` with minus infinity'),
    ('24_backbones', 1, 'def heard(samples):\n    P = len([k for k in range(1, 200) if (96*k - 1)*160 + 400 <= samples])\n'
                         '    return [P, samples - ((96*P - 1)*160 + 400)*(P > 0)]', '(96 P - 1)*160 + 400'),  # a list
    ('24_backbones', 2, 'def reorder(weight, channels): return weight.unflatten(1, (24, channels)).transpose(1, 2).flatten(1)', ''),
    ('34_clap', 1, 'predicted = dict(nothing=-torch.tensor(1/64).log(), half=-torch.tensor(1/32).log())', '(a) 1/64. (b) 1/32.'),
    ('34_clap', 2, 'def best(audio, text): return (F.normalize(audio, dim=-1)*text[:, None]).sum(-1).argmax(1)', '(F.normalize(audio, dim=-1)*text[:, None]).sum(-1)'),
    ('60_codec', 1, 'predicted = dict(codes=2200., samples=256e3, levels=12.)', '50 frames, 4 levels, 11 bits'),
    ('60_codec', 2, 'def frames(samples, cfg): return math.ceil(samples/cfg.hop_length)\ndef trim(wav, samples): return wav[:, :, :samples]', 'Round up'),
    ('60_codec', 3, 'def one_level(x, book):\n    k = (x[:, None] - book).square().sum(-1).argmin(1)\n    return k, x - book[k]\n'
                    'def quantise(x, books):\n    codes = torch.zeros(len(x), len(books), dtype=torch.int64)\n    for i, book in enumerate(books): codes[:, i], x = one_level(x, book)\n    return codes', '`x - book[k]`'),
    ('20_layers', 1, "predicted = dict(plain=torch.tensor(7.), sharper='7.6', twice=7, masked=4., idle=6)", 'as 3 to 1'),
    ('20_layers', 2, 'def sees(layers):\n    size, step = 1, 1\n    for k, s in layers[::-1]: size, step = (size - 1)*s + k, step*s\n'
                 '    return [size, step]\nblocks = 8.', ''),
    ('20_layers', 4, 'def likeness(distance, dim): return sum((distance*10_000**(-2*i/dim)).cos() for i in range(dim//2))', 'cos(distance * rate)'),
    ('21_training', 1, 'predicted = dict(zip((0, 49, 99, 100, 500, 700, 900), torch.tensor([8e-6, 4e-4, 8e-4, 8e-4, 6e-4, 4e-4, 2e-4])))', '(1 + cos 60°)/2'),
    ('21_training', 2, 'def stay_and_fall(step, peak, warmup, steps, fall):\n    if step < warmup: return peak*(step + 1)/warmup\n'
                 '    if step < steps - fall: return peak\n    return peak*(steps - step)/fall', 'Three cases'),
    ('21_training', 3, 'def shares(n, decay):\n    d = [ema_decay_at(i, decay) for i in range(1, n + 1)]\n'
                 '    return torch.tensor([math.prod(d[k:])*(1 - d[k - 1] if k else 1) for k in range(n + 1)])', ''),
    ('21_training', 4, 'def in_pieces(model, loss_fn, x, y, size):\n    for p in model.parameters(): p.grad = None\n    for i in range(0, len(x), size):\n'
                 '        a, b = x[i:i + size], y[i:i + size]\n        (loss_fn(model(a), b)*(len(a)/len(x))).backward()', 'clear before the first'),
    ('21_training', 5, 'def adamw(w, g, m, v, n, lr, betas, eps, decay):\n    m, v = torch.lerp(g, m, betas[0]), torch.lerp(g**2, v, betas[1])\n'
                 '    w = w - lr*decay*w\n    return w - lr*m/(1 - betas[0]**n)/((v/(1 - betas[1]**n))**.5 + eps), m, v', 'w (1 - lr decay)'),
    ('23_metrics', 1, 'predicted = dict(one=25., two=25, louder=np.float32(2500), swapped=8, turned=8.)', 'Independent features add up'),
    ('23_metrics', 2, 'predicted = dict(pair=2., torn=np.exp(np.log(2)), unsure=np.exp(.5*np.log(2) + .5*np.log(2/3)), alone=1.)', '1/2 ln 2 + 1/2 ln(2/3)'),
    ('23_metrics', 3, 'def twins(n, seed):\n    rng = np.random.default_rng(seed)\n    x, y = rng.normal(size=(2, n, 2)) @ [[1, .95], [0, .1**.5]]\n'
                 '    y[:, 1] *= -1\n    return (x/x.std(0)).tolist(), (y/y.std(0)).tolist()', ''),
    ('23_metrics', 3, 'def twins(n, seed):\n    x = np.random.default_rng(seed).uniform(-3**.5, 3**.5, n)\n'
                 '    return np.stack([x, x], 1), np.stack([x, np.roll(x, 1)], 1)', ''),
    ('23_metrics', 4, 'def seeds_needed(spread, half, level=.95): return min(S for S in range(2, 999) if stats.t.ppf(.5 + level/2, S - 1)*spread <= half*S**.5)', 'count upwards'),
    ('23_metrics', 5, 'def disguise(real, seed):\n    x = np.random.default_rng(seed).normal(size=real.shape)**7\n    def root(c, power):\n'
                 '        values, vectors = np.linalg.eigh(np.cov(c.T))\n        return vectors*values**power @ vectors.T\n'
                 '    return (x - x.mean(0)) @ root(x, -.5) @ root(real, .5) + real.mean(0)', ''),
    ('30_vae', 1, 'predicted = dict(shifted=9/2, narrow=torch.tensor(2.5), both=7., halved=2.5 + math.log(2), asleep=0., numbers=32768.)', 'mean² + deviation² - 1'),
    ('30_vae', 2, 'def kl(mean_q, logvar_q, mean_p, logvar_p):\n    a, b = (mean_q - mean_p)/(logvar_p/2).exp(), logvar_q - logvar_p\n'
                 '    return (a**2 + b.exp() - 1 - b)/2', "p's ruler"),
    ('30_vae', 3, 'def draw(mean, logvar, eps): return mean + logvar.exp().sqrt()*eps', ''),
    ('30_vae', 4, 'def bill(posterior):\n'
                 '    rows = [Posterior(m[:, None], v[:, None]).kl().mean() for m, v in zip(posterior.mean.unbind(1), posterior.logvar.unbind(1))]\n'
                 '    return torch.stack(rows)', ''),
    ('30_vae', 5, 'def between(a, b, share):\n    omega = torch.acos(((a/a.norm())*(b/b.norm())).sum().clamp(-1, 1))\n'
                 '    if omega.sin() < 1e-6: return a + share*(b - a)\n'
                 '    return (torch.sin((1 - share)*omega)*a + torch.sin(share*omega)*b)/omega.sin()', '`torch.acos`'),
    ('31_gan', 1, 'predicted = dict(critic=torch.tensor(.70833), generator=1/6, resting=2., pull=-.25, shifted=-5/6)', '(0 + 1 + 2.5)/3'),
    ('31_gan', 2, 'def best_guess(values, power):\n    ordered = sorted(values.tolist())\n'
                 '    return ordered[len(ordered)//2] if power == 1 else sum(ordered)/len(ordered)', ''),
    ('31_gan', 3, 'def verdicts(frames, bands, num_layers):\n    sizes = [frames, bands]\n'
                 '    for stride in [2]*num_layers + [1, 1]: sizes = [(n + 2 - 4)//stride + 1 for n in sizes]\n    return math.prod(sizes)', '(n + 2*padding - kernel)//stride + 1'),
    ('31_gan', 4, 'def play_game(g, d, lr, steps, alternate):\n    path = [(g, d)]\n    for _ in range(steps):\n'
                 '        if alternate: d = d + lr*g; g = g - lr*d\n        else: g, d = g - lr*d, d + lr*g\n        path.append([g, d])\n'
                 '    return path', '`g, d = g - lr*d, d + lr*g`'),
    ('31_gan', 5, 'def roughen(copy, wanted, generator):\n    noise = torch.randn(copy.shape, generator=generator)\n'
                 '    return min((copy + s*noise for s in torch.arange(0, 2, .002)), key=lambda x: abs(grain(x).mean() - wanted))', ''),
    ('22_judge', 1, 'predicted = dict(both=2/(16*15), three=6/(16*15*14), coin=2**-16, order=torch.tensor(.5), majority=.5, five=1/32)', '16*15/2'),
    ('22_judge', 2, 'def wilson(right, count, z=1.96):\n    a, b, c = 1 + z*z/count, -(2*right/count + z*z/count), (right/count)**2\n'
                 '    root = max(0, b*b - 4*a*c)**.5\n    return [(-b - root)/(2*a), (-b + root)/(2*a)]', '(1 + z²/n) p²'),
    ('22_judge', 3, "def ways(saying, cells):\n    def read(path): return ''.join(b for a, b in zip(('.', *path), path) if a != b).replace('.', '')\n"
                 "    return len([p for p in itertools.product('.' + ''.join(set(saying)), repeat=cells) if read(p) == saying])", 'keep a symbol where it differs'),
    ('22_judge', 4, 'def fool():\n    wav = np.zeros(CLIP_SAMPLES)\n    wav[1000::5120] = -.1\n    return wav', 'A clock'),
    ('32_vocoder', 1, 'predicted = dict(equal=.5, mostly_real=torch.tensor(.75), only_real=1., one=.5, four=2., generator=.25)', 's = a/(a + b)'),
    ('32_vocoder', 2, 'def lengths(frames, cfg):\n    out = [frames]\n'
                 '    for r, k in zip(cfg.upsample_rates, cfg.upsample_kernels): out.append(out[-1]*r + (k - r) % 2)\n    return tuple(out[1:])', ''),
    ('32_vocoder', 3, 'def worst_delay(freq, sample_rate): return torch.tensor(sample_rate/(2*freq)).round()', 'Half a period'),
    ('32_vocoder', 4, 'def fold(wav, period): return wav.unfold(0, period, period)\ndef period_of(wav, candidates):\n    rows = sorted(candidates)\n'
                 '    still = torch.stack([fold(wav, p).var(0).mean() for p in rows])\n'
                 '    return torch.tensor(rows)[still <= still.min() + .01*wav.var()][0]', ''),
    ('32_vocoder', 5, 'def frames_behind(sample, frames, cfg):\n    low, high = sample - 3, sample + 3\n'
                 '    for rate, kernel in list(zip(cfg.upsample_rates, cfg.upsample_kernels))[::-1]:\n'
                 '        wide = max(sum((k - 1)*(d + 1)//2 for d in ds) for k, ds in zip(cfg.resblock_kernels, cfg.resblock_dilations))\n'
                 '        p = (kernel - rate)//2\n'
                 '        low, high = math.ceil((low - wide + p - kernel + 1)/rate), math.floor((high + wide + p)/rate)\n'
                 '    return [max(low - 3, 0), min(high + 3, frames - 1)]', ''),
    # OTHER
    ('50_t5', 2, 'def confused(distance, buckets=32, max_distance=128):\n    row = relative_buckets(1, 201, buckets=buckets, max_distance=max_distance).flatten().tolist()\n'
                 '    return [d for d in range(201) if row[d] == row[distance]]', ''),
    ('40_diffusion', 1, 'predicted = dict(equal=torch.tensor(1/2), minus_20=.0099, half=-4.77)', 'Half the amplitude is a quarter of the variance'),
    ('40_diffusion', 2, 'def jump(z_0, t, alpha_bar, eps):\n    return torch.stack([alpha_bar[i].sqrt()*z + (1 - alpha_bar[i]).sqrt()*e for z, i, e in zip(z_0, t, eps)])\n'
                        'def snr_db(t, alpha_bar): return 20*(alpha_bar[t].sqrt()/(1 - alpha_bar[t]).sqrt()).log10()', ''),
    ('40_diffusion', 4, 'def best_eps(z_t, alpha_bar_t, spread):\n    a, s = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)\n    return z_t*s/(a**2*spread**2 + s**2)', 'a^2 spread^2 + s^2'),
    ('41_sampling', 2, 'def ddim_step(z_t, eps_pred, bar, bar_prev, eta=0., noise=0.):\n    sigma = eta*math.sqrt((1 - bar_prev)/(1 - bar)*(1 - bar/bar_prev))\n'
                       '    by_z = math.sqrt(bar_prev/bar)\n    return by_z*z_t + (math.sqrt(1 - bar_prev - sigma**2) - by_z*math.sqrt(1 - bar))*eps_pred + sigma*noise', ''),
    ('41_sampling', 3, 'def guide(u, c, scale, rescale=0.):\n    pred = (1 - scale)*u + scale*c\n    size = lambda x: x.flatten(1).std(1).view(-1, *[1]*(x.ndim - 1))\n'
                       '    return rescale*pred*size(c)/size(pred) + (1 - rescale)*pred', ''),
    ('41_sampling', 4, 'def drop(states, mask, null, coin):\n    rows = [null if k else s[m] for s, m, k in zip(states, mask, coin)]\n    n = max(len(r) for r in rows)\n'
                       '    pad = lambda r: torch.cat([r, torch.full((n - len(r), r.shape[1]), 9.)])\n'
                       '    return torch.stack([pad(r) for r in rows]), torch.stack([torch.arange(n) < len(r) for r in rows])', 'What must the mask say'),  # no longer than needed
    ('33_audiomae', 1, 'predicted = dict(patches=512., visible=102, tokens=torch.tensor(32), moment=.64)', ''),
    ('33_audiomae', 2, 'def hide(noise, num_keep):\n    keep = noise.topk(num_keep, largest=False).indices\n    hidden = torch.ones(noise.shape, dtype=torch.bool)\n'
                       '    for row, places in zip(hidden, keep): row[places] = False\n    return keep, hidden\n'
                       'def put_back(visible, keep, blank, n):\n    out = blank.repeat(len(visible), n, 1)\n    for row, places, x in zip(out, keep, visible): row[places] = x\n    return out', 'in any order'),
    ('33_audiomae', 3, 'def goal(patches): return torch.nn.functional.layer_norm(patches, patches.shape[-1:], eps=1e-6)*(1 - 1/patches.shape[-1])**.5\n'
                       'def hidden_error(pred, target, hidden): return (((pred - target)**2).mean(-1)*hidden).sum()/hidden.sum()', ''),
    ('33_audiomae', 4, 'def pool(features, grid, lam):\n    (t, f), side = grid, min(lam, grid[1])\n    x = features.reshape(len(features), t, f, -1)\n'
                       '    parts = [p for row in x.split(lam, 1) for p in row.split(side, 2)]\n    return torch.stack([(p.mean((1, 2)) + p.amax((1, 2)))/2 for p in parts], 1)', ''),
    ('42_unet', 1, 'predicted = dict(coarse=[16, 4], sites=4., transformers=torch.tensor(8), with_words=12)', ''),
    ('42_unet', 2, 'def waves(t, dim):\n    rates = [10_000**(-2*i/dim) for i in range(dim//2)]\n'
                   '    return torch.stack([torch.cos(t*r) for r in rates] + [torch.sin(t*r) for r in rates], 1)', 'first `dim/2` cosines'),
    ('42_unet', 3, 'def reach(layers):\n    seen = 1\n    for kernel, stride in layers[::-1]: seen = (seen - 1)*stride + kernel\n    return seen\nseconds = 37*.04', ''),  # from the output back
    ('42_unet', 4, 'def widths_in(channels, n):\n    kept = [channels[0]] + [c for i, c in enumerate(channels) for _ in range(n + (i < len(channels) - 1))]\n'
                   '    below = [channels[-1], *channels[:0:-1]]\n    rows = []\n    for c, b in zip(reversed(channels), below):\n'
                   '        rows.append(tuple((c if i else b) + kept.pop() for i in range(n + 1)))\n    return rows', ''),
    ('51_gpt2', 1, 'predicted = dict(moved=torch.arange(6, 10), pairs=55., cached=8, again=26)', ''),
    ('51_gpt2', 2, 'def may_read(real, N):\n    B, L = real.shape\n    return real[:, None].expand(B, N, L).tril(L - N)', ''),
    ('51_gpt2', 3, 'def read(x, weights, past=None):\n    q, k, v = (x @ w for w in weights)\n    if past: k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)\n    M = k.shape[1] - q.shape[1]\n'
                   '    out = [((q[:, i:i + 1]/math.sqrt(q.shape[-1])) @ k[:, :M + i + 1].transpose(1, 2)).softmax(-1) @ v[:, :M + i + 1] for i in range(q.shape[1])]\n    return torch.cat(out, 1), [k, v]', ''),
    ('51_gpt2', 4, 'def free_run(model, given, steps):\n    made, past = [], None\n    for _ in range(steps):\n        out, past = model(made[-1] if made else given, past)\n        made.append(out[:, -1:])\n    return torch.cat(made, dim=1)', ''),
    ('52_loa', 1, 'predicted = dict(squared=torch.tensor(1.9), absolute=3, length=21., first=13)', ''),
    ('52_loa', 2, 'def pack(x, mask):\n    rows, M = [v[m] for v, m in zip(x, mask)], max(mask.sum(1).tolist())\n    return (torch.stack([torch.cat([torch.zeros(M - len(r), x.shape[2]), r]) for r in rows]),\n'
                  '            torch.stack([torch.arange(M) >= M - len(r) for r in rows]))', 'A loop over the rows will do'),
    ('52_loa', 3, 'def forced(gpt, prompt, loa):\n    seen = torch.cat([prompt, loa], 1)\n    return gpt(seen)[:, prompt.shape[1] - 1:-1]', ''),  # reads the last one in vain
    ('52_loa', 4, 'def order_score(ab, ba):\n    halves = [torch.stack(x.chunk(2, 1), 1).mean(2) for x in (ab, ba)]\n    c = (halves[0] + halves[1]).mean(0)/2\n    a, b = (F.normalize(h - c, dim=-1) for h in halves)\n'
                  '    return ((a[:, 0]*b[:, 1]).sum(1) + (a[:, 1]*b[:, 0]).sum(1) - (a*b).sum((1, 2)))/2', ''),
    ('53_audioldm2', 1, 'predicted = dict(frames=52., samples=32e3, cut=torch.tensor(1280))', ''),
    ('53_audioldm2', 2, 'def choose(truth, say, p_gt, generator):\n    if torch.rand(1, generator=generator).item() >= p_gt: return say()\n    return truth', ''),
    ('53_audioldm2', 4, 'def cross(a, b):\n    (loa, mask), _ = a.contexts\n    return Condition([(loa, mask), b.contexts[-1]], a.pooled)', ''),
    ('43_ldm', 1, 'predicted = dict(mean_tokens=170, informed_8=torch.tensor(.225), silent=1)', ''),
    ('43_ldm', 2, 'def between(a, b, share): return (1 - share)**.5*a + share**.5*b', 'whose squares add up to one'),
    ('43_ldm', 3, 'def told_loss(net, z_0, loa, t, eps, schedule):\n    return torch.stack([(net(q_sample(z_0[i:i + 1], t[i:i + 1], schedule.alpha_bar, eps[i:i + 1]), t[i:i + 1], Condition(((loa[i:i + 1], None),)))\n'
                  '                         - target(z_0[i:i + 1], eps[i:i + 1], t[i:i + 1], schedule)).square().mean() for i in range(len(z_0))])', ''),
    ('55_speech', 1, 'predicted = dict(ids=PhonemeTokenizer("toy").ids(["sh", "i", "m", "a"]), longest=309., filling=torch.tensor(16))', ''),
    ('55_speech', 2, 'def durations(seconds, hop=.01):\n    out, end, at = [], 0., 0\n    for s in seconds.tolist():\n        end += s\n        out.append(round(end/hop) - at)\n        at += out[-1]\n    return torch.tensor(out)', ''),
    ('55_speech', 3, 'def stretch(states, frames): return torch.stack([s for s, n in zip(states, frames.tolist()) for _ in range(n)])\ndef slower(mel, is_vowel): return stretch(mel, is_vowel.int() + 1)', ''),
    ('55_speech', 4, 'def scores(q, k, rel, window):\n    rel_at = lambda o: rel[o + window] if abs(o) <= window else torch.zeros(q.shape[1])\n'
                     '    return torch.stack([torch.stack([q[i] @ (k[j] + rel_at(j - i)) for j in range(len(k))]) for i in range(len(q))])/q.shape[1]**.5', 'A loop is allowed'),
    ('25_scores', 1, 'def in_a_row(share): return next(n for n in range(1, 999) if wilson_interval(n, n)[0] > share)', 'count upwards with `wilson_interval(n, n)`'),
    ('25_scores', 1, 'def in_a_row(share): return np.ceil(1.96**2*share/(1 - share))', 'n/(n + z²)'),  # a float
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = sorted(set(ids))\n    if len(ids) < 3*n: raise ValueError(len(ids))\n'
                     '    np.random.default_rng(seed).shuffle(ids)\n    return tuple(ids[k*n:(k + 1)*n] for k in range(3))', 'cut the result into three'),
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    return np.random.default_rng(seed).choice(sorted(set(ids)), 3*n, replace=False).reshape(3, n).tolist()', ''),
    ('25_scores', 3, 'def repaired(value, draws, level=.95):\n    draws = np.asarray(draws) - np.mean(draws) + value\n'
                     '    return np.quantile(draws, ((1 - level)/2, (1 + level)/2)).clip(min=0)', 'Cut at zero last'),  # moved first
    ('57a_lora', 1, 'predicted = dict(square=12_288., fused=24_576, apart=36_864, even=torch.tensor(384), optimiser=98_304)', 'r (768 + 768) = 768²'),
    ('57a_lora', 2, 'def thin(delta, rank):\n    u, s, v = torch.linalg.svd(delta, full_matrices=False)\n    root = s[:rank].sqrt()\n    return root[:, None]*v[:rank], u[:, :rank]*root', 'or their roots to both'),
    ('57a_lora', 3, 'def widen(A, B, alpha, extra, generator):\n    return (torch.cat([A, torch.zeros(extra, A.shape[1])]), torch.cat([B, torch.randn(len(B), extra, generator=generator)], 1),\n'
                    '            alpha*(1 + extra/len(A)))', ''),  # A zero and B random learns as well
]


# answers with a plausible slip, which the checks must notice: (notebook, exercise, answer)
WRONG_ANSWERS = [
    ('40_diffusion', 1, 'predicted = dict(equal=.5, minus_20=.01/1.01, half=10*math.log10(.5))'),  # an amplitude taken for a variance
    ('40_diffusion', 2, 'def jump(z_0, t, alpha_bar, eps):\n    a = alpha_bar[t].view(-1, *[1]*(z_0.ndim - 1))\n    return a*z_0 + (1 - a)*eps\n'
                        'def snr_db(t, alpha_bar): return 10*(alpha_bar[t]/(1 - alpha_bar[t])).log10()'),  # no roots
    ('40_diffusion', 2, 'def jump(z_0, t, alpha_bar, eps):\n    a = alpha_bar[t].view(-1, *[1]*(z_0.ndim - 1))\n    return a.sqrt()*z_0 + (1 - a).sqrt()*eps\n'
                        'def snr_db(t, alpha_bar): return 20*(alpha_bar[t]/(1 - alpha_bar[t])).log10()'),  # decibels of an amplitude
    ('40_diffusion', 3, 'def v_of(z_0, eps, a, s): return s*z_0 - a*eps\ndef back(z_t, v, a, s): return a*z_t + s*v, s*z_t - a*v'),  # sign: there and back it fits
    ('40_diffusion', 4, 'def best_eps(z_t, alpha_bar_t, spread): return (1 - alpha_bar_t)**.5*z_t'),  # right for a spread of 1 only
    ('41_sampling', 1, 'predicted = dict(z_0=1., z_prev=1.1, guided=5., printed=5.)'),
    ('41_sampling', 2, 'def ddim_step(z_t, eps_pred, bar, bar_prev, eta=0., noise=0.):\n    z_0 = (z_t - (1 - bar)**.5*eps_pred)/bar**.5\n    sigma = eta*((1 - bar_prev)/(1 - bar)*(1 - bar/bar_prev))**.5\n'
                       '    return bar_prev**.5*z_0 + (1 - bar_prev)**.5*eps_pred + sigma*noise'),  # fresh noise on top of all the predicted noise
    ('41_sampling', 3, 'def guide(u, c, scale, rescale=0.):\n    pred = u + scale*(c - u)\n    return pred*(1 - rescale + rescale*c.std()/pred.std())'),  # one factor for the batch
    ('41_sampling', 3, 'def guide(u, c, scale, rescale=0.):\n    pred, axes = scale*u + (1 - scale)*c, tuple(range(1, u.ndim))\n    return pred*(1 - rescale + rescale*c.std(axes, keepdim=True)/pred.std(axes, keepdim=True))'),  # as printed
    ('41_sampling', 4, 'def drop(states, mask, null, coin):\n    n = max(states.shape[1], len(null))\n    fit = lambda x: torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[-2]))\n'
                       '    return torch.where(coin[:, None, None], fit(null), fit(states)), fit(mask[..., None])[..., 0]'),  # the old mask
    ('33_audiomae', 1, 'predicted = dict(patches=512, visible=103, tokens=32, moment=.64)'),  # with CLS
    ('33_audiomae', 1, 'predicted = dict(patches=512, visible=102, tokens=32, moment=10.24/32)'),  # the bands taken for moments
    ('33_audiomae', 2, 'def hide(noise, num_keep):\n    keep = noise.argsort(1)[:, -num_keep:]\n    return keep, torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)\n'
                       'def put_back(visible, keep, blank, n): return blank.expand(len(visible), n, -1).scatter(1, keep[..., None].expand_as(visible), visible)'),  # the largest noise
    ('33_audiomae', 2, 'def hide(noise, num_keep):\n    keep = noise.argsort(1)[:, :num_keep]\n    return keep, torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)\n'
                       'def put_back(visible, keep, blank, n):\n    return blank.expand(len(visible), n, -1).scatter(1, keep.sort(1).values[..., None].expand_as(visible), visible)'),  # sorted places
    ('33_audiomae', 3, 'def goal(patches): return (patches - patches.mean(-1, keepdim=True))/(patches.var(-1, keepdim=True) + 1e-6).sqrt()\n'
                       'def hidden_error(pred, target, hidden): return (((pred - target)**2).mean(-1)*hidden).mean()'),  # divided by all patches
    ('33_audiomae', 3, 'def goal(patches): return (patches - patches.mean())/(patches.var() + 1e-6).sqrt()\ndef hidden_error(pred, target, hidden): return ((pred - target)**2)[hidden].mean()'),  # not each patch
    ('33_audiomae', 4, 'def pool(features, grid, lam):\n    (t, f), side = grid, min(lam, grid[1])\n    x = features.reshape(len(features), f//side, side, t//lam, lam, -1)\n'
                       '    return ((x.mean((2, 4)) + x.amax((2, 4)))/2).flatten(1, 2)'),  # frequency-major
    ('42_unet', 1, 'predicted = dict(coarse=(8, 2), sites=4, transformers=8, with_words=12)'),
    ('42_unet', 1, 'predicted = dict(coarse=(16, 4), sites=3, transformers=6, with_words=9)'),  # one block going up, too
    ('42_unet', 2, 'def waves(t, dim):\n    angle = t[:, None]*10_000**(-2*torch.arange(dim//2)/dim)\n    return torch.cat([angle.sin(), angle.cos()], 1)'),  # sines first
    ('42_unet', 2, 'def waves(t, dim):\n    angle = t[:, None]*10_000**(-torch.arange(dim//2)/dim)\n    return torch.cat([angle.cos(), angle.sin()], 1)'),  # rates of half the exponent
    ('42_unet', 3, 'def reach(layers):\n    seen = apart = 1\n    for kernel, stride in layers:\n        apart *= stride\n        seen += (kernel - 1)*apart\n    return seen\nseconds = 1.48'),  # a stride ahead
    ('42_unet', 4, 'def widths_in(channels, n):\n    rows, below = [], channels[-1]\n    for c in channels[::-1]:\n        rows.append([below + c] + [2*c]*n)\n        below = c\n    return rows'),  # no map of another level
    ('51_gpt2', 1, 'predicted = dict(moved=[7, 8, 9], pairs=55, cached=8, again=26)'),
    ('51_gpt2', 1, 'predicted = dict(moved=[6, 7, 8, 9], pairs=55, cached=9, again=30)'),  # the last new vector is never read
    ('51_gpt2', 2, 'def may_read(real, N):\n    places = torch.arange(real.shape[1])\n    return (places[None] <= torch.arange(N)[:, None]) & real[:, None]'),  # the memory forgotten
    ('51_gpt2', 3, 'def read(x, weights, past=None):\n    q, k, v = (x @ w for w in weights)\n    if past is not None: k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)\n'
                   '    scores = (q @ k.transpose(1, 2)/math.sqrt(x.shape[-1])).softmax(-1)\n    return (scores*causal_mask(q.shape[1], k.shape[1])) @ v, (k, v)'),  # masked after the softmax
    ('51_gpt2', 3, 'def read(x, weights, past=None):\n    q, k, v = (x @ w for w in weights)\n    if past is not None: k, v = torch.cat([k, past[0]], 1), torch.cat([v, past[1]], 1)\n'
                   '    scores = q @ k.transpose(1, 2)/math.sqrt(x.shape[-1])\n    return scores.masked_fill(~causal_mask(q.shape[1], k.shape[1]), -torch.inf).softmax(-1) @ v, (k, v)'),  # the past behind
    ('51_gpt2', 4, 'def free_run(model, given, steps):\n    seen = given\n    for _ in range(steps): seen = torch.cat([seen, model(seen, None)[0][:, -1:]], 1)\n    return seen[:, given.shape[1]:]'),  # right, but all again
    ('51_gpt2', 4, 'def free_run(model, given, steps):\n    out, past = model(given, None)\n    made = []\n    for _ in range(steps):\n        out, past = model(out[:, -1:], past)\n        made.append(out)\n    return torch.cat(made, 1)'),  # a step ahead
    ('52_loa', 1, 'predicted = dict(squared=1.9, absolute=1., length=21, first=13)'),
    ('52_loa', 1, 'predicted = dict(squared=1.9, absolute=3., length=22, first=14)'),  # the last vector read, the first place behind EOS
    ('52_loa', 2, 'def pack(x, mask):\n    order = (~mask).long().argsort(dim=1, stable=True)[:, :int(mask.sum(1).max())]\n    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])), mask.gather(1, order)'),  # to the left end
    ('52_loa', 3, 'def forced(gpt, prompt, loa): return gpt(torch.cat([prompt, loa], 1))[:, prompt.shape[1]:]'),  # the answer is shown
    ('52_loa', 3, 'def forced(gpt, prompt, loa): return gpt(torch.cat([prompt[:, :-1], loa], 1))[:, prompt.shape[1] - 1:]'),
    ('52_loa', 4, 'def order_score(ab, ba):\n    ab, ba = (x.unflatten(1, (2, -1)).mean(2) for x in (ab, ba))\n'
                  '    return (F.cosine_similarity(ab, ba.flip(1), dim=-1) - F.cosine_similarity(ab, ba, dim=-1)).mean(1)'),  # the clock left in
    ('52_loa', 4, 'def order_score(ab, ba):\n    ab, ba = (x.unflatten(1, (2, -1)).mean(2) for x in (ab, ba))\n    ab, ba = ab - ab.mean(0), ba - ba.mean(0)\n'
                  '    return F.cosine_similarity(ab, ba.flip(1), dim=-1).mean(1)'),  # no straight ones
    ('53_audioldm2', 1, 'predicted = dict(frames=50, samples=32_000, cut=0)'),  # rounded to what the VAE can do
    ('53_audioldm2', 2, 'def choose(truth, say, p_gt, generator):\n    said = say()\n    return truth if torch.rand((), generator=generator) < p_gt else said'),  # GPT-2 always runs
    ('53_audioldm2', 2, 'def choose(truth, say, p_gt, generator): return truth if torch.rand((), generator=generator) < p_gt else say().detach()'),  # GPT-2 learns nothing
    ('53_audioldm2', 2, 'def choose(truth, say, p_gt, generator):\n    coin = torch.rand(len(truth), 1, 1, generator=generator) < p_gt\n    return torch.where(coin, truth, say())'),  # a coin an item
    ('53_audioldm2', 3, 'def by_hand(pipe, prompt, against, seed, steps, scale):\n    cond = encode_prompts(pipe, [prompt])\n'
                        '    z_0 = sample_ddim(pipe.halves.unet, (1, *latent_shape(pipe.cfg)), pipe.cfg.schedule, steps, cond=cond, uncond=encode_nothing(pipe, cond), guidance_scale=scale, generator=[make_generator(seed)])\n'
                        '    return latents_to_wav(pipe, z_0, 40_960)'),  # the negative prompt left out
    ('53_audioldm2', 4, 'def cross(a, b): return Condition((b.contexts[0], a.contexts[1]))'),
    ('54_ablations', 1, 'read = dict(fad_b=.33, kl_d=.29, mixed=2, trainings=6)'),  # relative to the row
    ('54_ablations', 1, 'read = dict(fad_b=.49, kl_d=.29, mixed=1, trainings=6)'),  # row c has the higher score
    ('54_ablations', 2, 'def best_of_k(own, heard, k): return heard[max(range(k), key=lambda i: own[i])]'),  # the first k only
    ('54_ablations', 2, 'def best_of_k(own, heard, k):\n    draws = [max(d, key=lambda i: heard[i]) for d in combinations(range(len(own)), k)]\n'
                        '    return sum(heard[i] for i in draws)/len(draws)'),  # chosen by the mark
    ('54_ablations', 3, 'def errors(a, b): return ((np.var(a, ddof=1) + np.var(b, ddof=1))/len(a))**.5, (np.asarray(a) - b).std(ddof=1)'),  # no root of n
    ('54_ablations', 3, 'def errors(a, b): return (np.std(a, ddof=1) + np.std(b, ddof=1))/len(a)**.5, (np.asarray(a) - b).std(ddof=1)/len(a)**.5'),  # deviations added
    ('72_threshold', 1, 'def steps_for(captions, rounds, batch=128): return max(1, int(captions*rounds/batch))'),  # rounded down
    ('72_threshold', 2, 'def same_amount(rows, tau, rng):\n    count = sum(r["score"] >= tau for r in rows if r["rank"] <= 3)\n'
                        '    return [rows[i] for i in rng.choice(len(rows), count, replace=False)]'),  # from all ranks
    ('72_threshold', 2, 'def same_amount(rows, tau, rng):\n    best = [r for r in rows if r["rank"] <= 3]\n'
                        '    return [best[i] for i in rng.integers(len(best), size=sum(r["score"] >= tau for r in best))]'),  # some twice
    ('72_threshold', 3, 'def hill(errors):\n    inner = 1 + int(errors[1:-1].mean(1).argmin())\n'
                        '    return inner if all(seed_interval(errors[e] - errors[inner])[0] > 0 for e in (0, -1)) else None'),  # chosen and tested on the same seeds
    ('72_threshold', 3, 'def hill(errors):\n    inner = 1 + int(errors[1:-1, ::2].mean(1).argmin())\n'
                        '    a, b = seed_interval(errors[inner, 1::2]), [seed_interval(errors[e, 1::2]) for e in (0, -1)]\n'
                        '    return inner if all(a[1] < x[0] for x in b) else None'),  # not paired
    ('43_ldm', 1, 'predicted = dict(mean_tokens=170, informed_8=.25, silent=1.)'),
    ('43_ldm', 2, 'def between(a, b, share): return (1 - share)*a + share*b'),  # the straight line
    ('43_ldm', 2, 'def between(a, b, share):\n    z = (1 - share)*a + share*b\n    return z/z.std()'),  # one factor for the batch
    ('43_ldm', 3, 'def told_loss(net, z_0, loa, t, eps, schedule):\n    pred = net(q_sample(z_0, t, schedule.alpha_bar, eps), t, Condition(((loa, None),)))\n    return ((pred - eps)**2).flatten(1).mean(1)'),  # always the noise
    ('43_ldm', 3, 'def told_loss(net, z_0, loa, t, eps, schedule):\n    pred = net(q_sample(z_0, t, schedule.alpha_bar, eps), t, Condition(((loa, None),)))\n    return ((pred - target(z_0, eps, t, schedule))**2).mean().expand(len(z_0))'),
    ('55_speech', 1, 'predicted = dict(ids=[9, 3, 6, 1, 14], longest=310, filling=16)'),  # the stop symbol counts
    ('55_speech', 2, 'def durations(seconds, hop=.01): return (seconds/hop).round().long()'),  # each by itself
    ('55_speech', 2, 'def durations(seconds, hop=.01): return (torch.cat([torch.zeros(1), seconds.cumsum(0)])/hop).long().diff()'),  # cut instead of rounded
    ('55_speech', 3, 'def stretch(states, frames): return states.repeat_interleave(frames.clamp(min=1), 0)\ndef slower(mel, is_vowel): return stretch(mel, 1 + is_vowel.long())'),  # nothing may vanish
    ('55_speech', 3, 'def stretch(states, frames): return states.repeat_interleave(frames, 0)\ndef slower(mel, is_vowel): return torch.cat([mel, mel[is_vowel]])'),  # the doubles at the end
    ('55_speech', 4, 'def scores(q, k, rel, window):\n    places = torch.arange(len(q))\n    offset = places[:, None] - places[None]\n'
                     '    near = (q @ rel.T).gather(1, (offset + window).clamp(0, 2*window))*(offset.abs() <= window)\n    return (q @ k.T + near)/q.shape[1]**.5'),  # query minus key
    ('55_speech', 4, 'def scores(q, k, rel, window):\n    places = torch.arange(len(q))\n    offset = places[None] - places[:, None]\n'
                     '    return (q @ k.T + (q @ rel.T).gather(1, (offset + window).clamp(0, 2*window)))/q.shape[1]**.5'),  # the last vector serves all farther ones
    ('20_layers', 1, 'predicted = dict(plain=7.6, sharper=(81*8 + 4)/82, twice=7.6, masked=4, idle=6)'),
    ('20_layers', 1, 'predicted = dict(plain=7, sharper=7.6, twice=7, masked=4, idle=0)'),
    ('20_layers', 2, 'def sees(layers): return 1 + sum(k - 1 for k, s in layers), 1\nblocks = 8'),
    ('20_layers', 2, 'def sees(layers):\n    size, step = 1, 1\n    for k, s in layers: step *= s; size += (k - 1)*step\n    return size, step\nblocks = 8'),
    ('20_layers', 2, 'def sees(layers):\n    size, step = 1, 1\n    for k, s in layers: size, step = size + (k - 1)*step, step*s\n    return size, step\n'
                 'blocks = 16'),
    ('20_layers', 3, 'split, merge = almost_split, almost_merge'),
    ('20_layers', 3, 'def split(x, heads): return x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)\ndef merge(h): return h.permute(0, 2, 3, 1).flatten(2)'),
    ('20_layers', 4, 'def likeness(distance, dim): return (distance[:, None]*10_000.**(-torch.arange(dim//2)/dim)).cos().sum(-1)'),
    ('20_layers', 5, 'def streamed(q, pieces):\n    total, below = 0., 0.\n    for k, v in pieces:\n'
                 '        w = (q*q.shape[-1]**-.5 @ k.transpose(-1, -2)).exp()\n'
                 '        total, below = total + w @ v, below + w.sum(-1, keepdim=True)\n    return total/below'),
    ('20_layers', 5, 'def streamed(q, pieces):\n    total, below = 0., 0.\n    for k, v in pieces:\n        s = q*q.shape[-1]**-.5 @ k.transpose(-1, -2)\n'
                 '        w = (s - s.amax(-1, keepdim=True)).exp()\n        total, below = total + w @ v, below + w.sum(-1, keepdim=True)\n'
                 '    return total/below'),
    ('20_layers', 5, 'def streamed(q, pieces):\n    largest, total, below = torch.zeros_like(q[..., :1]), 0., 0.\n    for k, v in pieces:\n'
                 '        s = q*q.shape[-1]**-.5 @ k.transpose(-1, -2)\n        top = torch.maximum(largest, s.amax(-1, keepdim=True))\n'
                 '        old, new = (largest - top).exp(), (s - top).exp()\n'
                 '        total, below, largest = total*old + new @ v, below*old + new.sum(-1, keepdim=True), top\n    return total/below'),
    ('21_training', 1, 'predicted = {0: 0., 49: 4e-4, 99: 8e-4, 100: 8e-4, 500: 6e-4, 700: 4e-4, 900: 2e-4}'),
    ('21_training', 1, 'predicted = {0: 8e-6, 49: 4e-4, 99: 8e-4, 100: 8e-4, 500: 8e-4*2/3, 700: 4e-4, 900: 8e-4/3}'),
    ('21_training', 2, 'def stay_and_fall(step, peak, warmup, steps, fall): return peak*min(step/max(1, warmup), 1., (steps - step)/fall)'),
    ('21_training', 2, 'def stay_and_fall(step, peak, warmup, steps, fall): return peak*min((step + 1)/max(1, warmup), 1., (steps - 1 - step)/fall)'),
    ('21_training', 3, 'def shares(n, decay): return [decay**n] + [(1 - decay)*decay**(n - i) for i in range(1, n + 1)]'),
    ('21_training', 3, 'def shares(n, decay):\n    found = [1.]\n'
                 '    for i in range(1, n + 1): d = ema_decay_at(i, decay); found = [1 - d] + [s*d for s in found]\n    return found'),
    ('21_training', 4, 'def in_pieces(model, loss_fn, x, y, size):\n    model.zero_grad()\n    n = len(x.split(size))\n'
                 '    for a, b in zip(x.split(size), y.split(size)): (loss_fn(model(a), b)/n).backward()'),
    ('21_training', 4, 'def in_pieces(model, loss_fn, x, y, size):\n'
                 '    for a, b in zip(x.split(size), y.split(size)): (loss_fn(model(a), b)*len(a)/len(x)).backward()'),
    ('21_training', 4, 'def in_pieces(model, loss_fn, x, y, size): model.zero_grad(); loss_fn(model(x), y).backward()'),
    ('21_training', 5, 'def adamw(w, g, m, v, n, lr, betas, eps, decay):\n    m, v = betas[0]*m + (1 - betas[0])*g, betas[1]*v + (1 - betas[1])*g*g\n'
                 '    return w*(1 - lr*decay) - lr*m/(v.sqrt() + eps), m, v'),
    ('21_training', 5, 'def adamw(w, g, m, v, n, lr, betas, eps, decay):\n    g = g + decay*w\n'
                 '    m, v = betas[0]*m + (1 - betas[0])*g, betas[1]*v + (1 - betas[1])*g*g\n'
                 '    return w - lr*m/(1 - betas[0]**n)/((v/(1 - betas[1]**n)).sqrt() + eps), m, v'),
    ('21_training', 5, 'def adamw(w, g, m, v, n, lr, betas, eps, decay):\n'
                 '    m, v = (betas[0]*m + (1 - betas[0])*g)/(1 - betas[0]**n), (betas[1]*v + (1 - betas[1])*g*g)/(1 - betas[1]**n)\n'
                 '    return w*(1 - lr*decay) - lr*m/(v.sqrt() + eps), m, v'),
    ('23_metrics', 1, 'predicted = dict(one=3**2 + (36 - 4)**2, two=25, louder=2500, swapped=8, turned=8)'),
    ('23_metrics', 1, 'predicted = dict(one=25, two=25, louder=250, swapped=8, turned=8)'),
    ('23_metrics', 1, 'predicted = dict(one=5, two=5, louder=50, swapped=8**.5, turned=8**.5)'),
    ('23_metrics', 2, 'predicted = dict(pair=2, torn=4, unsure=math.sqrt(4/3), alone=1)'),
    ('23_metrics', 2, 'predicted = dict(pair=2, torn=2, unsure=math.log(4/3)/2, alone=1)'),
    ('23_metrics', 2, 'predicted = dict(pair=2, torn=2, unsure=math.sqrt(4/3), alone=2)'),
    ('23_metrics', 3, 'def twins(n, seed):\n    rng = np.random.default_rng(seed)\n    return rng.normal(size=(n, 2)), rng.normal(size=(n, 2))'),
    ('23_metrics', 3, 'def twins(n, seed):\n    x = np.random.default_rng(seed).normal(size=(n, 2))\n    return x, x + 1'),
    ('23_metrics', 3, 'def twins(n, seed):\n    x = np.random.default_rng(0).normal(size=n)\n    return np.stack([x, x], 1), np.stack([x, -x], 1)'),
    ('23_metrics', 4, 'def seeds_needed(spread, half, level=.95): return max(2, math.ceil((stats.norm.ppf((1 + level)/2)*spread/half)**2))'),
    ('23_metrics', 4, 'def seeds_needed(spread, half, level=.95):\n    S = 2\n    while stats.t.ppf(level, S - 1)*spread/math.sqrt(S) > half: S += 1\n'
                 '    return S'),
    ('23_metrics', 4, 'def seeds_needed(spread, half, level=.95):\n    S = 2\n    while stats.t.ppf((1 + level)/2, S)*spread/math.sqrt(S) > half: S += 1\n'
                 '    return S'),
    ('23_metrics', 5, 'def disguise(real, seed): return np.random.default_rng(seed).permutation(real)'),
    ('23_metrics', 5, 'def disguise(real, seed):\n    rng = np.random.default_rng(seed)\n'
                 '    x = rng.normal(size=real.shape)*(rng.random((len(real), 1)) < .1)*10**.5\n    return x*real.std(0) + real.mean(0)'),
    ('23_metrics', 5, 'def disguise(real, seed):\n    x = np.random.default_rng(seed).normal(size=real.shape)\n'
                 '    root = lambda cloud: np.linalg.cholesky(np.cov(cloud, rowvar=False))\n'
                 '    return (x - x.mean(0)) @ np.linalg.inv(root(x)).T @ root(real).T + real.mean(0)'),
    ('30_vae', 1, 'predicted = dict(shifted=9, narrow=5, both=14, halved=5.69, asleep=0, numbers=8*256*16)'),
    ('30_vae', 1, 'predicted = dict(shifted=4.5, narrow=2.5, both=7, halved=3.19, asleep=1000, numbers=8*256*16)'),
    ('30_vae', 1, 'predicted = dict(shifted=4.5, narrow=2.5, both=7, halved=3.19, asleep=0, numbers=8*1024*64//4)'),
    ('30_vae', 2, 'def kl(mean_q, logvar_q, mean_p, logvar_p): return .5*((mean_q - mean_p)**2 + (logvar_q - logvar_p).exp() - 1 - logvar_q + logvar_p)'),
    ('30_vae', 2, 'def kl(mean_q, logvar_q, mean_p, logvar_p): return .5*((mean_q - mean_p)**2*(-logvar_q).exp() + (logvar_p - logvar_q).exp() - 1 - logvar_p + logvar_q)'),
    ('30_vae', 2, 'def kl(mean_q, logvar_q, mean_p, logvar_p): return .5*(mean_q**2 + logvar_q.exp() - 1 - logvar_q)'),
    ('30_vae', 3, 'draw = almost_draw'),
    ('30_vae', 3, 'def draw(mean, logvar, eps): return mean + (logvar/2).exp().detach()*eps'),
    ('30_vae', 3, 'def draw(mean, logvar, eps): return mean + logvar.exp()*eps'),
    ('30_vae', 4, 'def bill(posterior): return .5*(posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean((0, 2, 3))'),
    ('30_vae', 4, 'def bill(posterior): return .5*(posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum((0, 2, 3))'),
    ('30_vae', 5, 'def between(a, b, share): return (1 - share)*a + share*b'),
    ('30_vae', 5, 'def between(a, b, share): return (1 - share)**.5*a + share**.5*b'),
    ('30_vae', 5, 'def between(a, b, share):\n    angle = torch.acos((a*b).sum()/(a.norm()*b.norm()))\n'
                 '    return ((1 - share)*angle).sin()/angle.sin()*a + (share*angle).sin()/angle.sin()*b'),
    ('31_gan', 1, 'predicted = dict(critic=.5/2 + 3.5/3, generator=.5/3, resting=2, pull=-1/2, shifted=.5/3 - 1)'),
    ('31_gan', 1, 'predicted = dict(critic=.70833, generator=-.5/3, resting=2, pull=-.25, shifted=-.5/3 - 1)'),
    ('31_gan', 1, 'predicted = dict(critic=.70833, generator=.5/3, resting=0, pull=-.25, shifted=.5/3 - 1)'),
    ('31_gan', 2, 'def best_guess(values, power): return values.mean()'),
    ('31_gan', 2, 'def best_guess(values, power): return values.median()'),
    ('31_gan', 2, 'def best_guess(values, power): return (values.min() + values.max())/2'),
    ('31_gan', 3, 'def verdicts(frames, bands, num_layers): return (frames >> num_layers)*(bands >> num_layers)'),
    ('31_gan', 3, 'def verdicts(frames, bands, num_layers): return (math.ceil(frames/2**num_layers) - 2)*(math.ceil(bands/2**num_layers) - 2)'),
    ('31_gan', 4, 'def play_game(g, d, lr, steps, alternate):\n    path = [(g, d)]\n'
                 '    for _ in range(steps): g, d = g - lr*d, d + lr*g; path.append((g, d))\n    return path'),
    ('31_gan', 4, 'def play_game(g, d, lr, steps, alternate):\n    path = [(g, d)]\n'
                 '    for _ in range(steps): d = d + lr*g; g = g - lr*d; path.append((g, d))\n    return path'),
    ('31_gan', 4, 'def play_game(g, d, lr, steps, alternate):\n    path = [(g, d)]\n    for _ in range(steps):\n'
                 '        if alternate: g = g - lr*d; d = d + lr*g\n        else: g, d = g - lr*d, d + lr*g\n        path.append((g, d))\n'
                 '    return path'),
    ('31_gan', 5, 'def roughen(copy, wanted, generator): return copy + wanted*torch.randn(copy.shape, generator=generator)'),
    ('31_gan', 5, 'def roughen(copy, wanted, generator): return copy*wanted/grain(copy).mean().clamp(min=1e-6)'),
    ('31_gan', 5, 'def roughen(copy, wanted, generator):\n    noise = torch.sign(torch.randn(copy.shape, generator=generator))\n'
                 '    return copy + wanted/grain(noise).mean()*noise'),
    ('22_judge', 1, 'predicted = dict(both=1/240, three=1/3360, coin=.5**16, order=.5, majority=.5, five=.5**5)'),
    ('22_judge', 1, 'predicted = dict(both=1/120, three=1/560, coin=.5**2, order=.5, majority=.5, five=.5**5)'),
    ('22_judge', 1, 'predicted = dict(both=1/120, three=1/560, coin=.5**16, order=.5, majority=1/3, five=.5**5)'),
    ('22_judge', 2, 'def wilson(right, count, z=1.96):\n    share = right/count\n    half = z*math.sqrt(share*(1 - share)/count)\n'
                 '    return share - half, share + half'),
    ('22_judge', 2, 'def wilson(right, count, z=1.96):\n    share = (right + z*z/2)/(count + z*z)\n'
                 '    half = z*math.sqrt(share*(1 - share)/(count + z*z))\n    return max(0, share - half), min(1, share + half)'),
    ('22_judge', 2, 'def wilson(right, count, z=1.96):\n    share, extra = right/count, z*z/count\n'
                 '    half = z*math.sqrt(share*(1 - share)/count + extra/4)\n'
                 '    return (share + extra/2 - half)/(1 + extra), (share + extra/2 + half)/(1 + extra)'),
    ('22_judge', 3, 'def ways(saying, cells): return math.comb(cells, len(saying))'),
    ('22_judge', 3, "def ways(saying, cells):\n    def read(path): return ''.join(s for s, _ in itertools.groupby(s for s in path if s != '.'))\n"
                 "    return sum(read(p) == saying for p in itertools.product('.' + ''.join(set(saying)), repeat=cells))"),
    ('22_judge', 3, 'def ways(saying, cells):\n'
                 "    return sum(''.join(p).replace('.', '') == saying for p in itertools.product('.' + ''.join(set(saying)), repeat=cells))"),
    ('22_judge', 4, 'def fool(): return torch.zeros(CLIP_SAMPLES)'),
    ('22_judge', 4, 'def fool():\n    wav = torch.zeros(CLIP_SAMPLES)\n    wav[20_000] = 1.\n    return wav'),
    ('22_judge', 4, 'def fool(): return .1*torch.randn(CLIP_SAMPLES, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)'),
    ('32_vocoder', 1, 'predicted = dict(equal=.5, mostly_real=.25, only_real=1, one=.5, four=2, generator=.25)'),
    ('32_vocoder', 1, 'predicted = dict(equal=.5, mostly_real=.75, only_real=1, one=.25, four=1, generator=.25)'),
    ('32_vocoder', 2, 'def lengths(frames, cfg):\n    out = [frames]\n    for r in cfg.upsample_rates: out.append(out[-1]*r)\n    return out[1:]'),
    ('32_vocoder', 2, 'def lengths(frames, cfg):\n    out = [frames]\n'
                 '    for r, k in zip(cfg.upsample_rates, cfg.upsample_kernels): out.append((out[-1] - 1)*r + k - (k - r)//2)\n    return out[1:]'),
    ('32_vocoder', 3, 'def worst_delay(freq, sample_rate): return round(sample_rate/freq)'),
    ('32_vocoder', 3, 'def worst_delay(freq, sample_rate): return round(sample_rate/freq/4)'),
    ('32_vocoder', 3, 'def worst_delay(freq, sample_rate): return int(sample_rate/freq/2)'),
    ('32_vocoder', 4, 'def fold(wav, period): return wav[:len(wav)//period*period].reshape(period, -1).T\n'
                 'def period_of(wav, candidates): return min(candidates, key=lambda p: fold(wav, p).var(0).mean())'),
    ('32_vocoder', 4, 'def fold(wav, period): return wav[:len(wav)//period*period].reshape(-1, period)\n'
                 'def period_of(wav, candidates): return min(candidates, key=lambda p: fold(wav, p).var(0, correction=0).mean())'),
    ('32_vocoder', 4, 'def fold(wav, period): return wav[:len(wav)//period*period].reshape(-1, period)\n'
                 'def period_of(wav, candidates): return min(candidates, key=lambda p: fold(wav, p).var(1).mean())'),
    ('32_vocoder', 5, 'def frames_behind(sample, frames, cfg):\n    t = sample//cfg.hop_length\n    return max(0, t - 3), min(frames - 1, t + 3)'),
    ('32_vocoder', 5, 'def frames_behind(sample, frames, cfg):\n'
                 '    wide = sum((k - 1)//2*sum(d + 1 for d in ds) for k, ds in zip(cfg.resblock_kernels, cfg.resblock_dilations))\n'
                 '    low, high = sample - 3, sample + 3\n    for rate, kernel in reversed(list(zip(cfg.upsample_rates, cfg.upsample_kernels))):\n'
                 '        p = (kernel - rate)//2\n        low, high = -(-(low - wide + p - kernel + 1)//rate), (high + wide + p)//rate\n'
                 '    return max(0, low - 3), min(frames - 1, high + 3)'),
    ('32_vocoder', 5, 'def frames_behind(sample, frames, cfg):\n'
                 '    wide = max((k - 1)//2*sum(ds) for k, ds in zip(cfg.resblock_kernels, cfg.resblock_dilations))\n'
                 '    low, high = sample - 3, sample + 3\n    for rate, kernel in reversed(list(zip(cfg.upsample_rates, cfg.upsample_kernels))):\n'
                 '        p = (kernel - rate)//2\n        low, high = -(-(low - wide + p - kernel + 1)//rate), (high + wide + p)//rate\n'
                 '    return max(0, low - 3), min(frames - 1, high + 3)'),
    ('32_vocoder', 5, 'def frames_behind(sample, frames, cfg):\n'
                 '    wide = max((k - 1)//2*sum(d + 1 for d in ds) for k, ds in zip(cfg.resblock_kernels, cfg.resblock_dilations))\n'
                 '    low, high = sample - 3, sample + 3\n    for rate, kernel in reversed(list(zip(cfg.upsample_rates, cfg.upsample_kernels))):\n'
                 '        low, high = (low - wide)//rate, (high + wide)//rate\n    return max(0, low - 3), min(frames - 1, high + 3)'),
    ('25_scores', 1, 'def in_a_row(share): return math.ceil(3/(1 - share))'),  # the rule of three
    ('25_scores', 1, 'def in_a_row(share): return math.ceil(math.log(.025)/math.log(share))'),  # another interval
    ('25_scores', 1, 'def in_a_row(share): return math.ceil(1.96**2*share/(1 - share)) + 1'),  # one too many
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    if len(set(ids)) < 3*n: raise ValueError\n    rng, ids = np.random.default_rng(seed), sorted(set(ids))\n'
                     '    return [list(rng.choice(ids, n, replace=False)) for _ in range(3)]'),  # three draws that overlap
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = list(dict.fromkeys(ids))\n    if len(ids) < 3*n: raise ValueError\n'
                     '    np.random.default_rng(seed).shuffle(ids)\n    return ids[:n], ids[n:2*n], ids[2*n:3*n]'),  # the folder's order counts
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = sorted(set(ids))\n    if len(ids) < 3*n: raise ValueError\n'
                     '    np.random.seed(seed); np.random.shuffle(ids)\n    return ids[:n], ids[n:2*n], ids[2*n:3*n]'),  # the global state
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = sorted(ids)\n    if len(ids) < 3*n: raise ValueError\n'
                     '    np.random.default_rng(seed).shuffle(ids)\n    return ids[:n], ids[n:2*n], ids[2*n:3*n]'),  # doubles
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = sorted(set(ids))\n    np.random.default_rng(seed).shuffle(ids)\n    return ids[:n], ids[n:2*n], ids[2*n:3*n]'),  # too few are cut short
    ('25_scores', 2, 'def three_sets(ids, n, seed):\n    ids = sorted(set(ids))\n    if len(ids) < 3*n: raise ValueError\n'
                     '    ids = ids[seed:] + ids[:seed]\n    return ids[:n], ids[n:2*n], ids[2*n:3*n]'),  # moved, not drawn: 400 seeds are not 100 places
    ('25_scores', 3, 'def repaired(value, draws, level=.95): return np.quantile(draws, ((1 - level)/2, (1 + level)/2))'),  # as they are
    ('25_scores', 3, 'def repaired(value, draws, level=.95):\n    z = {.95: 1.96, .5: .6745}[level]*np.std(draws)\n    return max(0., value - z), max(0., value + z)'),  # the tails evened out
    ('25_scores', 3, 'def repaired(value, draws, level=.95):\n    low, high = np.quantile(draws, ((1 - level)/2, (1 + level)/2)) - np.mean(draws)\n'
                     '    return max(0., value - high), max(0., value - low)'),  # turned round
    ('25_scores', 3, 'def repaired(value, draws, level=.95): return np.quantile(draws, ((1 - level)/2, (1 + level)/2)) + value - np.mean(draws)'),  # below zero
    ('25_scores', 3, 'def repaired(value, draws, level=.95): return np.quantile(draws, (1 - level, level)) + value - np.mean(draws)'),  # one tail
    ('57a_lora', 1, 'predicted = dict(square=8*768, fused=8*(768 + 2304), apart=3*8*(768 + 768), even=384, optimiser=98_304)'),
    ('57a_lora', 1, 'predicted = dict(square=12_288, fused=36_864, apart=36_864, even=384, optimiser=98_304)'),
    ('57a_lora', 1, 'predicted = dict(square=12_288, fused=24_576, apart=36_864, even=768, optimiser=49_152)'),
    ('57a_lora', 2, 'def thin(delta, rank):\n    u, s, v = torch.linalg.svd(delta, full_matrices=False)\n    return s[:rank, None]*v[:rank], u[:, :rank]*s[:rank]'),  # twice
    ('57a_lora', 2, 'def thin(delta, rank):\n    u, s, v = torch.linalg.svd(delta, full_matrices=False)\n    return v[-rank:], u[:, -rank:]*s[-rank:]'),  # the smallest
    ('57a_lora', 2, 'def thin(delta, rank):\n    A = delta[:rank]\n    return A, delta @ torch.linalg.pinv(A)'),  # the first rows
    ('57a_lora', 3, 'def widen(A, B, alpha, extra, generator):\n    return (torch.cat([A, torch.randn(extra, A.shape[1], generator=generator)]), torch.cat([B, torch.zeros(len(B), extra)], 1), alpha)'),
    ('57a_lora', 3, 'def widen(A, B, alpha, extra, generator):\n    return (torch.cat([A, torch.zeros(extra, A.shape[1])]), torch.cat([B, torch.zeros(len(B), extra)], 1), alpha*(1 + extra/len(A)))'),  # dead for ever
    ('57a_lora', 3, 'def widen(A, B, alpha, extra, generator):\n    rank = len(A)\n    return (torch.cat([A, torch.randn(extra, A.shape[1], generator=generator)])*((rank + extra)/rank), torch.cat([B, torch.zeros(len(B), extra)], 1), alpha)'),  # moved into A
    ('57a_lora', 3, 'def widen(A, B, alpha, extra, generator):\n    row = torch.randn(1, A.shape[1], generator=generator)\n    return (torch.cat([A, row.expand(extra, -1)]), torch.cat([B, torch.zeros(len(B), extra)], 1), alpha*(1 + extra/len(A)))'),  # one direction, many times
]


def answer_with(stem, number, answer):
    "Run one exercise of a solution notebook with another answer in the place of the solution"
    names, replaced = {'__name__': '__main__'}, 0
    for i, (heading, source, _) in enumerate(sections((ROOT/'nbs'/'solutions'/f'{stem}.ipynb').read_text())):
        if heading and not heading.startswith(f'Exercise {number}'): continue
        if lessons.BEGIN in source: source, replaced = answer, replaced + 1
        run(source, names, f'{stem}, code cell {i}')
    if replaced != 1: raise ValueError(f'{stem}, exercise {number}: {replaced} cells hold an answer')


@pytest.mark.parametrize('stem, number, answer, hint', OTHER_ANSWERS, ids=[f'{s}-{n}' for s, n, _, _ in OTHER_ANSWERS])
def test_other_right_answers_pass(stem, number, answer, hint):
    "What the hints lead to passes the checks, whatever type it comes in"
    text = (ROOT/'nbs'/'solutions'/f'{stem}.ipynb').read_text()
    assert hint in ''.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    answer_with(stem, number, answer)


@pytest.mark.parametrize('stem, number, answer', WRONG_ANSWERS, ids=[f'{s}-{n}' for s, n, _ in WRONG_ANSWERS])
def test_wrong_answers_fail(stem, number, answer):
    "A slip is told by an assert of the check, not by a crash"
    with pytest.raises(AssertionError): answer_with(stem, number, answer)


@by_name
def test_each_exercise_says_what_it_asks(path):
    cells = json.loads(path.read_text())['cells']
    asked = [s for c in cells if c['cell_type'] == 'markdown' for s in [''.join(c['source'])] if s.startswith('## Exercise')]
    assert 3 <= len(asked) <= 6
    for text in asked:
        for part in ('**Goal:**', '**Difficulty**', '**Time**', '**Needs**', '<details>'): assert part in text, (part, text[:60])
    levels = [int(re.search(r'\*\*Difficulty\*\* ([1-5])', text)[1]) for text in asked]
    assert levels == sorted(levels), 'in order of effort'


def test_stub_maker():
    cell = "#| exercise\ndef f(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION\n\nf(1)"
    assert lessons.stub(cell) == "#| exercise\ndef f(x):\n    raise NotImplementedError('your turn')\n\nf(1)"
    assert lessons.stub('x = 1') == 'x = 1'
    for bad in (cell.replace('    ### END', '### END'), cell.replace('### END SOLUTION', ''), cell.replace('#| exercise\n', '')):
        with pytest.raises(ValueError): lessons.stub(bad)

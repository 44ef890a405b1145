"""Engines of training: many processes give what one gives, survive being killed, and hand over to another number of them.

The processes are forks of one that has imported torch once; they talk through gloo on the CPU. A test that needs several of
them reads what one such run wrote.
"""
import contextlib, json, os, signal, socket, subprocess, sys, traceback
from pathlib import Path

import pytest

STEPS, DIE_AT, BATCH, ITEMS = 12, 9, 12, 44  # three batches an epoch: step 8, the last save before the kill, is inside one


# --- what the processes do --------------------------------------------------------------------------------------------

def make_game(noise, share):
    "A model whose loss calls its methods, a rival that rests at first and looks at what the model made, and their data"
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        def forward(self, x): return x + self.down(self.up(self.norm(x)).tanh())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(2)])
            self.out, self.gain, self.idle = nn.Linear(8, 8), nn.Parameter(torch.ones(1)), nn.Linear(8, 1)
            self.register_buffer('table', torch.randn(8))
        def encode(self, x):
            for block in self.blocks: x = block(x + self.table)
            return x
        def decode(self, x): return self.gain*self.out(x)

    def guess(model, x): return model.decode(model.encode(x))

    def loss_fn(model, batch, ctx):
        x = batch['x'] + .1*torch.randn(batch['x'].shape, generator=ctx.generator) if noise else batch['x']
        made = ctx.shared.get('made') if share and ctx.step % 2 else None
        made = guess(model, x) if made is None else made        # in odd steps the rival has made it
        return dict(loss=(made - batch['x']).square().mean() - .01*ctx.rival(made).mean(), size=made.abs().mean())

    def rival_loss_fn(rival, batch, ctx):
        if ctx.step < 2: return None
        made = guess(ctx.model, batch['x'])
        if share: ctx.shared['made'] = made
        return dict(loss=(rival(batch['x']) - 1).square().mean() + rival(made.detach()).square().mean())

    torch.manual_seed(10 + int(os.environ.get('RANK', 0)))      # other processes start elsewhere: the first must win
    data = dict(x=torch.randn(ITEMS, 3, 8, generator=torch.Generator().manual_seed(1)))
    return Net(), loss_fn, (nn.Linear(8, 1), rival_loss_fn), data


def play(folder, engine, noise=False, share=True, die_at=None, stop_at=None, bf16=False):
    "A short run with everything that has a state; returns the history and the final weights"
    from audiorepro.training import TrainConfig, fit, tensor_batches
    model, loss_fn, rival, data = make_game(noise, share)
    cfg = TrainConfig(steps=STEPS, lr=1e-2, warmup_steps=3, clip_norm=.5, ema_decay=.9, decay_vectors=False, rival_lr=2e-2, bf16=bf16,
                      log_every=5, save_every=4, eval_every=6)
    def watched(model, batch, ctx):
        if ctx.step == die_at and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
        if ctx.step == stop_at: raise Stop
        return loss_fn(model, batch, ctx)
    def on_eval(model, step): return dict(at=model.decode(model.encode(data['x'][:4])).square().mean().item())
    with emulated() if bf16 else contextlib.nullcontext():
        rows = fit(model, watched, tensor_batches(data, BATCH), cfg, rival=rival, on_eval=on_eval, folder=folder, progress=False, engine=engine)
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows], model, rival[0]


@contextlib.contextmanager
def emulated():
    "bfloat16 also where the processor only emulates it"
    from audiorepro import engine, training
    kept = training.has_bf16
    training.has_bf16 = engine.has_bf16 = lambda device='cpu': True
    yield
    training.has_bf16 = engine.has_bf16 = kept


class Stop(Exception): pass

def rank(): return int(os.environ.get('RANK', 0))


def run(root, name, engine, folder=None, **how):
    "Play, and have the first process keep history and weights under `name`"
    from safetensors.torch import save_file
    try: rows, model, rival = play(root/'runs'/(folder or name), engine, **how)
    except Stop: return
    if rank(): return
    (root/f'{name}.json').write_text(json.dumps(rows))
    parts = (('model', model), ('rival', rival))
    save_file({f'{part}.{k}': v.clone() for part, m in parts for k, v in m.state_dict().items()}, root/f'{name}.safetensors')


def engine(kind, **options):
    from audiorepro.engine import DataParallel, Sharded
    return DataParallel(**options) if kind == 'data' else Sharded(**dict(blocks=('Block',)) | options)


def die_data(root): run(root, 'none', engine('data'), 'killed_data', noise=True, die_at=DIE_AT)
def die_sharded(root): run(root, 'none', engine('sharded'), 'killed_sharded', noise=True, share=False, die_at=DIE_AT)


def two(root):
    for kind in ('data', 'sharded'):
        share = kind == 'data'                                                   # a sharded model allows no graph in ctx.shared
        run(root, kind, engine(kind), share=share)
        run(root, f'{kind}_whole', engine(kind), noise=True, share=share)
        run(root, f'{kind}_resumed', engine(kind), f'killed_{kind}', noise=True, share=share)
        run(root, f'{kind}_options', engine(kind, accumulate=2, blocks=('Block',), recompute=True, compile='aot_eager'), share=share)
        run(root, f'{kind}_from_one', engine(kind), f'one_began_{kind}', share=share)
        run(root, f'{kind}_bf16', engine(kind), share=share, bf16=True)
        run(root, f'{kind}_began', engine(kind), f'two_began_{kind}', share=share, stop_at=DIE_AT)
    refusals(root)
    shares(root)
    order(root)


def three(root): run(root, 'three_ended', engine('sharded'), 'two_began_sharded_3', share=False)


def refusals(root):
    "What a sharded model cannot do is said before it happens, in every process"
    import torch
    from audiorepro.training import TrainConfig, fit, tensor_batches
    said, (model, loss_fn, rival, data) = [], make_game(False, True)
    for case in ('graph', 'scalar', 'block', 'bare'):
        if case == 'scalar': model.gain = torch.nn.Parameter(torch.tensor(1.))
        chosen = dict(bare=None, block=engine('data', blocks=('Bolck',))).get(case, engine('sharded'))
        try: fit(model, loss_fn, tensor_batches(data, BATCH), TrainConfig(steps=4), rival=rival, progress=False, engine=chosen)
        except ValueError as e: said.append(str(e))
    (root/f'refusals_{rank()}.json').write_text(json.dumps(said))


def shares(root):
    "Bytes that this process holds of a sharded model, its optimiser and average, and which files a checkpoint has"
    import torch
    from audiorepro.training import TrainConfig, _adamw, EMA
    model, loss_fn, _, data = make_game(False, False)
    one = engine('sharded').start(torch.device('cpu'), False)
    cfg = TrainConfig(steps=1, decay_vectors=False)
    share = one.prepare('model', model, lambda model, batch, ctx: dict(loss=model.decode(model.encode(batch)).square().mean()), lambda m: _adamw(cfg, m))
    ctx = type('Context', (), dict(shared={}, step=0))()
    one.gradients('model', data['x'], ctx); one.optimizers['model'].step()
    local = lambda tensors: sum(t.to_local().numel()*4 for t in tensors)
    params = list(share.parameters())
    found = dict(weights=local(params), gradients=local(p.grad for p in params if p.grad is not None), average=local(EMA(share, .9).average.values()),
                 adamw=local(v for s in one.optimizers['model'].state.values() for k, v in s.items() if k != 'step'),
                 all=sum(p.numel() for p in model.parameters())*4, idle=9*4, params=len(params),
                 files=sorted(p.name for p in (root/'runs'/'two_began_sharded'/'step-00000008').iterdir()))
    one.close()
    (root/f'shares_{rank()}.json').write_text(json.dumps(found))


def order(root):
    "Which items this process sees from the middle of an epoch on"
    from audiorepro.training import loader_batches
    batches = loader_batches(Crops(), BATCH)(2)
    (root/f'order_{rank()}.json').write_text(json.dumps([[v.tolist() for v in next(batches)] for _ in range(4)]))


class Crops:
    "Items that are cut at random"
    def __len__(self): return ITEMS
    def __getitem__(self, i):
        import torch
        return i, torch.randint(10**6, ())


# --- how they are started ---------------------------------------------------------------------------------------------

def spawn(world, what, root):
    "Fork `world` processes that do `what(root)` together; returns how each ended: 0, or minus the signal that killed it"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    pids, together = [], dict(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    for r in range(world):
        sys.stdout.flush(); sys.stderr.flush()
        if not (pid := os.fork()):
            os.environ |= {k: str(v) for k, v in (together | dict(RANK=r, LOCAL_RANK=r)).items()}
            try: what(root)
            except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
            os._exit(0)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(root):
    import shutil, torch, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp
    import accelerate, audiorepro.engine
    torch.set_num_threads(1)
    ends = dict(die_data=spawn(2, die_data, root), die_sharded=spawn(2, die_sharded, root))
    run(root, 'one', None)
    run(root, 'one_bf16', None, bf16=True)
    for kind in ('data', 'sharded'): run(root, 'none', None, f'one_began_{kind}', stop_at=DIE_AT, share=kind == 'data')
    ends['two'] = spawn(2, two, root)
    shutil.copytree(root/'runs'/'two_began_sharded', root/'runs'/'two_began_sharded_3')
    ends['three'] = spawn(3, three, root)
    for kind in ('data', 'sharded'): run(root, f'one_ended_{kind}', engine(kind), f'two_began_{kind}', share=kind == 'data')
    run(root, 'one_options', engine('sharded', accumulate=3, recompute=True))
    (root/'ends.json').write_text(json.dumps(ends))


# --- what is asked of them --------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "Folder with the results of all runs"
    import torch
    if not torch.distributed.is_available(): pytest.skip('this torch has no torch.distributed')
    root = tmp_path_factory.mktemp('engine')
    done = subprocess.run([sys.executable, __file__, str(root)], env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert [json.loads((root/'ends.json').read_text())[k] for k in ('two', 'three')] == [[0]*2, [0]*3], done.stderr[-6000:]
    return root


def rows(root, name): return json.loads((root/f'{name}.json').read_text())

def losses(root, name): return [row['loss'] for row in rows(root, name) if 'loss' in row]

def weights(root, name):
    from safetensors.torch import load_file
    return load_file(root/f'{name}.safetensors')

def assert_same(root, a, b, tolerance):
    "Two runs have the same history and end in the same weights"
    one, other = rows(root, a), rows(root, b)
    assert [row.keys() for row in one] == [row.keys() for row in other]
    worst = max(abs(x[k] - y[k]) for x, y in zip(one, other) for k in x)
    one, other = weights(root, a), weights(root, b)
    assert one.keys() == other.keys()
    worst = max([worst] + [(one[k] - other[k]).abs().max().item() for k in one])
    assert worst <= tolerance, f'{a} and {b} differ by {worst}'


@pytest.mark.parametrize('name', ['data', 'sharded', 'data_options', 'sharded_options', 'one_options'])
def test_many_processes_equal_one(ran, name):
    "Losses, gradient norms, evaluations and averaged weights, with a rival, unused weights and another start in each process"
    assert losses(ran, 'one')[0] > losses(ran, 'one')[-1] and [row['step'] for row in rows(ran, 'one')] == [5, 6, 10, 12]
    assert_same(ran, 'one', name, 1e-5)


@pytest.mark.parametrize('kind', ['data', 'sharded'])
def test_killed_and_resumed_equals_whole(ran, kind):
    "To the last bit, with noise from the generator of each process; the kill came after step 8, inside an epoch"
    ended = rows(ran, 'ends')[f'die_{kind}']
    assert ended[1] == -signal.SIGKILL and ended[0] != 0
    assert_same(ran, f'{kind}_whole', f'{kind}_resumed', 0)
    assert max(abs(a - b) for a, b in zip(losses(ran, f'{kind}_whole'), losses(ran, 'one'))) > 1e-4   # the noise is there


@pytest.mark.parametrize('name', ['data_from_one', 'sharded_from_one', 'one_ended_data', 'one_ended_sharded', 'three_ended'])
def test_another_number_of_processes_goes_on(ran, name): assert_same(ran, 'one', name, 1e-5)


@pytest.mark.parametrize('kind', ['data', 'sharded'])
def test_bfloat16_is_autocast(ran, kind):
    "Mixed precision changes the numbers as it does in one process: a little"
    one, exact, many = (losses(ran, name) for name in ('one_bf16', 'one', f'{kind}_bf16'))
    assert 1e-5 < max(abs(a - b) for a, b in zip(one, exact)) < .05
    assert max(abs(a - b) for a, b in zip(one, many)) < .01


def test_shares_add_up_and_checkpoints_come_in_parts(ran):
    "Two processes hold each number once; no file of a checkpoint can be executed"
    found = [json.loads((ran/f'shares_{r}.json').read_text()) for r in range(2)]
    total = {k: sum(f[k] for f in found) for k in ('weights', 'gradients', 'average', 'adamw')}
    whole, idle = found[0]['all'], found[0]['idle']                              # an unused layer gets no gradient
    assert total == dict(weights=whole, gradients=whole - idle, average=whole, adamw=2*(whole - idle))
    assert all(f['weights'] < .6*whole for f in found)
    assert len(found[0]['files']) == 3 and {Path(f).suffix for f in found[0]['files']} == {'.safetensors', '.json'}


def test_refusals(ran):
    for r in range(2):
        said = json.loads((ran/f'refusals_{r}.json').read_text())
        for text, part in zip(said, ("ctx.shared['made'] carries a graph", 'weights without axes, got gain', "got 'Bolck'", 'this is one of 2 processes'), strict=True):
            assert part in text


def test_order_of_the_data(ran):
    "From inside an epoch on: processes share each batch without overlap, workers change nothing, and together it is one process's batch"
    from audiorepro.training import loader_batches
    shares = [json.loads((ran/f'order_{r}.json').read_text()) for r in range(2)]
    for workers in (0, 2):
        batches = loader_batches(Crops(), BATCH, num_workers=workers)(2)
        whole = [[v.tolist() for v in next(batches)] for _ in range(4)]
        for step, (items, cuts) in enumerate(whole):
            assert len(set(items)) == BATCH
            for r in range(2): assert shares[r][step] == [items[r::2], cuts[r::2]]
    epoch = [i for items, _ in whole[1:] for i in items]
    assert len(set(epoch)) == 3*BATCH, 'an epoch shows an item twice'


def test_cell_at_paper_scale(tmp_path, monkeypatch, capsys):
    "The cell behind the gate `gpu` runs to its end, with a tiny stack of blocks and in this process"
    import io, runpy
    from types import SimpleNamespace
    import torch
    from audiorepro import engine
    cells = json.loads((Path(__file__).parent.parent/'nbs'/'21a_engine.ipynb').read_text())['cells']
    [source] = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and "if at_scale('gpu'" in ''.join(c['source'])]
    tiny = source.replace('[768, 12, 512, 16*processes, 60]', '[16, 2, 4, 2, 3]')
    assert tiny != source
    def here(command, **options):
        assert command[:2] == ['accelerate', 'launch'] and options['check']
        monkeypatch.setattr(sys, 'argv', command[-2:])
        with contextlib.redirect_stdout(io.StringIO()) as out: runpy.run_path(command[-2], run_name='__main__')
        return SimpleNamespace(stdout=out.getvalue())
    exec(tiny, vars(engine) | dict(at_scale=lambda *a, **k: True, torch=torch, folder=tmp_path, subprocess=SimpleNamespace(run=here)))
    lines = capsys.readouterr().out.split('\n')
    assert [line.split(':')[0] for line in lines if 'steps/s' in line] == ['DataParallel', 'DataParallel', 'Sharded']


if __name__ == '__main__': main(Path(sys.argv[1]))

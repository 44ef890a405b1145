"""Training and saving survive what happens to computers: processes killed at any moment, disks that are full.

The tests start this file as one fresh process, which imports torch once and forks a child for each fault: a child can
be killed or starved without harm, and a fork costs milliseconds.
"""
import json, os, random, signal, subprocess, sys, tempfile, threading, traceback
from pathlib import Path

import pytest

STEPS, SAVE_EVERY = 48, 8


# --- what the children do -------------------------------------------------------------------------------------------

def train(folder):
    "A short run with everything that has a state: average, rival, dropout, noise, shuffled data, schedule"
    import torch
    from torch import nn
    from audiorepro.training import TrainConfig, fit, tensor_batches
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Dropout(.1), nn.GELU(), nn.Linear(32, 8))
        rival, data = nn.Linear(8, 1), torch.randn(80, 8)

    def loss_fn(model, batch, ctx):
        on_step(ctx.step)
        ctx.shared['guess'] = guess = model(batch['x'] + torch.randn(batch['x'].shape, generator=ctx.generator))
        return dict(loss=(guess - batch['x']).square().mean() - .01*ctx.rival(guess).mean())

    def rival_loss_fn(rival, batch, ctx):
        real = torch.randn(batch['x'].shape, generator=ctx.generator)
        return None if ctx.step < 5 else dict(loss=rival(real).square().mean())

    cfg = TrainConfig(steps=STEPS, lr=1e-2, warmup_steps=4, schedule='cosine', ema_decay=.95,
                      log_every=7, save_every=SAVE_EVERY)
    batches = tensor_batches(dict(x=data), 16)
    fit(model, loss_fn, batches, cfg, rival=(rival, rival_loss_fn), folder=folder, progress=False)


def on_step(step): pass
def die(): os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(kill_at, delay):
    "Die some time after the step `kill_at` began, wherever the loop is then"
    global on_step
    def on_step(step):
        if step == kill_at: threading.Timer(delay, die).start() if delay else die()


def kill_in_save(where, nth):
    "Die at one point of the `nth` save: `where` names it"
    import shutil
    import safetensors.torch
    import audiorepro.core as core
    count, save_file, rename, rmtree, sync = [0], safetensors.torch.save_file, Path.rename, shutil.rmtree, core._sync

    def is_now(): return count[0] == nth
    def new_save_file(tensors, path, *args):
        count[0] += 1
        if is_now() and where == 'before the tensors': die()
        save_file(tensors, path, *args)
        if is_now() and where == 'half of the tensors': os.truncate(path, os.path.getsize(path)//2); die()
        if is_now() and where == 'after the tensors': die()
    def new_sync(path):
        if is_now() and where == 'before the flush' and str(path).endswith('.json'): die()
        sync(path)
        if is_now() and where == 'after the flush' and str(path).endswith('.part'): die()
    def new_rename(self, target):
        old = str(target).endswith('.part')
        if is_now() and where == 'before the rename' and not old: die()
        out = rename(self, target)
        if is_now() and where == ('before the old one is deleted' if old else 'after the rename'): die()
        return out
    def new_rmtree(path, *args, **kwargs):
        if is_now() and where == 'half of the old one is deleted' and Path(path).name.startswith('step'):
            (Path(path)/'state.json').unlink(); die()
        return rmtree(path, *args, **kwargs)
    safetensors.torch.save_file, core._sync = new_save_file, new_sync
    Path.rename, shutil.rmtree = new_rename, new_rmtree


IN_SAVE = ('before the tensors', 'half of the tensors', 'after the tensors', 'before the flush', 'after the flush',
           'before the rename', 'after the rename', 'before the old one is deleted', 'half of the old one is deleted')


def in_child(work, *args):
    "Fork, do `work`, and return how the child ended: 0, or minus the signal that killed it"
    sys.stdout.flush()
    if not (pid := os.fork()):
        try: work(*args)
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def checkpoints(folder):
    "Read every checkpoint in full, as a resumed run would"
    from safetensors.torch import load_file
    found = sorted(folder.glob('step-*[0-9]'))
    for path in found:
        values, tensors = json.loads((path/'state.json').read_text()), load_file(path/'state.safetensors')
        assert values['step'] == int(path.name[5:]) and any(k.startswith('ema/') for k in tensors)
    return found


def history(folder):
    "Rows of a run without the times"
    lines = (folder/'history.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in lines]


def kills(root):
    "Twenty-three deaths, nine of them inside a save; each run is then continued to its end"
    assert in_child(train, root/'whole') == 0
    whole = (root/'whole'/f'step-{STEPS:08d}'/'state.safetensors').read_bytes()
    rows = history(root/'whole')
    rng = random.Random(0)
    moments = [(kill_in_step, STEPS*i//14 + rng.randrange(3), rng.choice([0, rng.random()*.004])) for i in range(14)]
    moments += [(kill_in_save, where, rng.randint(2, STEPS//SAVE_EVERY)) for where in IN_SAVE]
    for i, (plan, *how) in enumerate(moments):
        folder = root/str(i)
        code = in_child(lambda: (plan(*how), train(folder)))
        assert code == -signal.SIGKILL, f'{how}: the child ended with {code} instead of being killed'
        left = [p.name for p in checkpoints(folder)]
        expected = how[0]//SAVE_EVERY if plan is kill_in_step else how[1] - 1
        assert left or expected == 0, f'{how}: no whole checkpoint is left'
        if left: assert int(left[-1][5:]) >= expected*SAVE_EVERY, f'{how}: went back to {left}'
        assert in_child(train, folder) == 0
        final = folder/f'step-{STEPS:08d}'
        assert sorted(p.name for p in folder.iterdir()) == ['history.jsonl', final.name], f'{how}: litter is left'
        assert (final/'state.safetensors').read_bytes() == whole, f'{how}: other bits than the whole run'
        assert history(folder) == rows, f'{how}: another history than the whole run'
    print(f'{len(moments)} kills, {len(IN_SAVE)} inside a save')


def starve(limit):
    "From now on no file of this process can grow beyond `limit` bytes, as on a full disk"
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def tiny_model(value):
    from dataclasses import dataclass
    import torch
    from torch import nn
    from audiorepro.core import Config, Model

    @dataclass(frozen=True)
    class TinyConfig(Config): width:int = 200
    class Tiny(Model):
        config_class = TinyConfig
        def __init__(self, cfg):
            super().__init__(cfg)
            self.weight = nn.Parameter(torch.full((cfg.width, cfg.width), float(value)))
    return Tiny(TinyConfig())


def full_disk(root):
    "A save that does not fit fails with an error and leaves the older weights, and nothing else, behind"
    def save_starved(limit):
        starve(limit)
        try: tiny_model(2).save_pretrained(root/'weights')
        except OSError as e: return print(f'refused: {e}')
        raise AssertionError('a full disk was not noticed')
    for limit in (0, 10, 100_000):
        tiny_model(1).save_pretrained(root/'weights')
        assert in_child(save_starved, limit) == 0
        assert sorted(p.name for p in (root/'weights').iterdir()) == ['config.json', 'model.safetensors']
        assert (type(tiny_model(0)).from_pretrained(root/'weights').weight == 1).all()


def full_disk_training(root):
    "Training stops with an error; the last checkpoint is whole, and the run continues when there is room again"
    def train_starved():
        global on_step
        def on_step(step):
            if step == 20: starve(2000)
        try: train(root/'run')
        except Exception as e: return print(f'stopped: {type(e).__name__}: {e}')
        raise AssertionError('a full disk was not noticed')
    assert in_child(train, root/'whole') == 0
    assert in_child(train_starved) == 0
    assert [p.name for p in checkpoints(root/'run')] == ['step-00000016']
    assert in_child(train, root/'run') == 0
    end = f'step-{STEPS:08d}/state.safetensors'
    assert (root/'run'/end).read_bytes() == (root/'whole'/end).read_bytes()


# --- the tests -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the faults are made in forked processes')
@pytest.mark.parametrize('what', ['kills', 'full_disk', 'full_disk_training'])
def test_fault(what, tmp_path):
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', AUDIOREPRO_OUT=str(tmp_path/'out'))
    command = [sys.executable, __file__, what, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


if __name__ == '__main__':
    import torch, accelerate, safetensors.torch, tqdm.auto, torch._dynamo  # noqa: E401,F401 - once, before the forks
    import audiorepro.training  # noqa: F401
    torch.set_num_threads(1)
    what, root = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory(dir=root) as folder: globals()[what](Path(folder))

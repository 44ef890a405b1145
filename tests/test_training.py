"""The loop of lesson 21 and its engine: what it asks for, and what it leaves to it. Many processes are tested in test_engine.py."""
import json

import pytest, torch
from torch import nn

from audiorepro.training import OneProcess, TrainConfig, fit, run_recipe, tensor_batches


class Watched(OneProcess):
    "Notes what it is asked for; `rank` is that of a process beside the first"
    def __init__(self, rank=0): self.rank, self.asked = rank, []
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name in ('start', 'prepare', 'gradients', 'norm', 'save', 'load', 'finish', 'close', 'opened', 'wait'): self.asked.append(name)
        return found


def train(folder, engine=None, steps=6, fails_at=None, **settings):
    torch.manual_seed(0)
    model, data = nn.Linear(4, 4), dict(x=torch.randn(24, 4))
    def loss_fn(model, batch, ctx):
        if ctx.step == fails_at: raise KeyboardInterrupt
        return dict(loss=(model(batch['x']) - batch['x']).square().mean())
    cfg = TrainConfig(**dict(steps=steps, lr=1e-2, ema_decay=.9, log_every=4, save_every=3) | settings)
    rows = fit(model, loss_fn, tensor_batches(data, 8), cfg, folder=folder, progress=False, engine=engine, on_eval=lambda model, step: None)
    return rows, model


def bits(model): return [p.tolist() for p in model.parameters()]


def test_all_that_touches_the_machine_goes_through_the_engine(tmp_path):
    one = Watched()
    rows, model = train(tmp_path/'a', one)
    order = [name for i, name in enumerate(one.asked) if name != 'wait' and (not i or one.asked[i - 1] != name)]
    step = ['gradients', 'norm']
    assert order == ['start', 'prepare', *step*3, 'opened', 'save', *step*3, 'opened', 'save', 'finish', 'close'], order
    assert bits(model) == bits(train(None)[1])


def test_checkpoint_inside_a_row_of_the_log(tmp_path):
    "Sums of an unfinished row are saved: steps 1 to 4 are averaged, although the run was broken at step 3"
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'a', fails_at=3)
    one = Watched()
    rows, model = train(tmp_path/'a', one)
    whole, same = train(tmp_path/'b')
    without_time = lambda rows: [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]
    assert 'load' in one.asked and without_time(rows) == without_time(whole) and bits(model) == bits(same)


def test_only_the_first_process_writes(tmp_path):
    other = Watched(rank=1)
    other.save = lambda *args: None
    rows, _ = train(tmp_path/'a', other)
    assert rows[-1]['step'] == 6 and not (tmp_path/'a').exists()


def test_an_error_closes_the_engine(tmp_path):
    one = Watched()
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'a', one, fails_at=4)
    assert one.asked[-1] == 'close' and 'finish' not in one.asked
    assert train(tmp_path/'a')[0][-1]['step'] == 6                       # the folder is free again


def test_several_processes_need_an_engine(tmp_path, monkeypatch):
    "Without one, each would train for itself and overwrite the others' files"
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='this is one of 2 processes.*engine=DataParallel'): train(tmp_path/'a')
    assert not list(tmp_path.iterdir())


def test_plain_engine_names_a_sharded_checkpoint(tmp_path):
    train(tmp_path/'a')
    [path] = (tmp_path/'a').glob('step-*')
    (path/'state.safetensors').rename(path/'shard-00001-model-00001-of-00001.safetensors')
    with pytest.raises(ValueError, match='holds no state.safetensors: go on with the engine that wrote it'): train(tmp_path/'a', steps=9)


def test_recipe_hands_its_engine_on(tmp_path):
    from audiorepro.core import Config, Model
    from audiorepro.training import Recipe
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class LineConfig(Config): inputs:int = 4

    class Line(Model):
        config_class, component = LineConfig, 'line'
        def __init__(self, cfg): super().__init__(cfg); self.linear = nn.Linear(cfg.inputs, 1)

    def loss_fn(model, batch, ctx): return dict(loss=model.linear(batch['x']).square().mean())
    def recipe(): return Recipe('line', Line(LineConfig()), loss_fn, tensor_batches(dict(x=torch.ones(4, 4)), 2), TrainConfig(2))
    for rank in (1, 0):
        engine = Watched(rank)
        if rank: engine.save = lambda *args: None
        run_recipe(recipe(), tmp_path/f'run{rank}', progress=False, target=tmp_path/'weights', engine=engine)
        assert 'gradients' in engine.asked and (tmp_path/'weights').exists() == (rank == 0)
    assert json.loads((tmp_path/'weights'/'training.json').read_text())['steps'] == 2

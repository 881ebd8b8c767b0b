"""What goes through an engine's tensors on a GPU: Sophia's estimates, the weight average, the copy for a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoints.background import HostCopy
from pipeline.config import Config
from pipeline.distributed.engine_tensors import (
    EngineAverage,
    create_optimizer_state,
    gather_tensors,
    whole_moments,
    whole_weights,
)
from pipeline.model.config import LossConfig
from pipeline.model.losses import Targets, count_targets
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.build import build_optimizer, set_lr
from pipeline.optim.config import MOMENTS, OptimConfig
from pipeline.optim.hessian import rademacher
from pipeline.trainer import Trainer
from pipeline.training.hessian_step import HessianStep
from pipeline.training.telemetry import Meter
from tests.gpu_simulation.device import CUDA, simulated_gpu
from tests.gpu_simulation.examples import (
    LAYERS,
    Accelerator,
    Engine,
    assert_waits,
    cached,
    photos,
    small_config,
)


def engine_of(name, device=CUDA, dtype=torch.bfloat16):
    """An engine around a new model, and the configuration that it follows."""
    config = Config(model=small_config(), optim=OptimConfig(name=name), loss=LossConfig())
    torch.manual_seed(0)
    model = RoadworkModel.build(config.model, config.loss, device=device).to(dtype).train()
    engine = Engine(model, build_optimizer(model, config.optim))
    create_optimizer_state(engine)
    return config, engine


def batch_of(model):
    """A batch from the feature cache, the same one for every device."""
    torch.manual_seed(1)
    return {**cached(photos(model.config.sizes), model), "row": torch.arange(4)}


def counts_of(batch, device):
    return count_targets(Targets.from_batch(batch)).to(device, non_blocking=True)


def test_signs_are_drawn_on_the_gpu_without_a_wait(gpu):
    shapes = {"a.weight": (3, 5), "b.bias": (7,)}
    with gpu.watch() as waits:
        first, again, later = (rademacher(shapes, 0, step, CUDA) for step in (4, 4, 5))
    assert waits == []
    for name, signs in first.items():
        assert (signs.device, signs.dtype, tuple(signs.shape)) == (CUDA, torch.float32, shapes[name])
        assert signs.abs().eq(1).all()
        assert torch.equal(signs, again[name])
    assert not torch.equal(first["a.weight"], later["a.weight"])


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_an_estimate_of_the_curvature_waits_for_experts_alone(gpu, name):
    config, engine = engine_of(name)
    batch = batch_of(engine.module)
    step = HessianStep(config, Accelerator(engine, CUDA), engine)
    before = {key: weight.detach().clone() for key, weight in engine.module.named_parameters()}
    with gpu.watch() as waits:
        step.take(0, [batch], counts_of(batch, CUDA), keep_all=True)
    assert_waits(waits, {})
    known = 0
    for key, weight in engine.module.named_parameters():
        assert torch.equal(weight, before[key])
        curvature = engine.optimizer.state[weight]["hessian"]
        assert curvature.device == CUDA
        assert curvature.isfinite().all()
        known += bool(curvature.any())
    assert known > 0.8 * len(before)
    assert engine.module.training


def estimate(name, device):
    """The mean diagonal after one estimate in fp32, by parameter."""
    config, engine = engine_of(name, device, torch.float32)
    batch = batch_of(engine.module)
    HessianStep(config, Accelerator(engine, device), engine).take(0, [batch], counts_of(batch, device), True)
    state = engine.optimizer.state
    return {key: state[weight]["hessian"].cpu() for key, weight in engine.module.named_parameters()}


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_an_estimate_is_that_of_a_cpu(name):
    theirs = estimate(name, torch.device("cpu"))
    with simulated_gpu():
        ours = estimate(name, CUDA)
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest > 0
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("name", ["adamw", "sophia_g", "sophia_h"])
def test_a_trainers_step_waits_for_experts_alone(gpu, monkeypatch, name):
    """With its estimate, its two micro-batches, its average, and what the log will say."""
    monkeypatch.setattr("pipeline.training.telemetry.matmul_rate", lambda device: 1e12)
    config, engine = engine_of(name)
    accelerator, average = Accelerator(engine, CUDA), EngineAverage(engine.module)
    trainer = SimpleNamespace(
        config=config, accelerator=accelerator, engine=engine, optimizer=engine.optimizer, average=average,
        hessian=HessianStep(config, accelerator, engine), meter=Meter(CUDA, 4, SimpleNamespace()),
        state=SimpleNamespace(step=0), schedule=SimpleNamespace(steps=9), rank=0, world_size=1,
    )  # fmt: skip
    batches = [batch_of(engine.module) for _ in range(2)]
    counts = sum(count_targets(Targets.from_batch(batch)) for batch in batches)
    with gpu.watch() as waits:
        losses, outputs = Trainer._take_step(trainer, batches, counts)
        trainer.meter.add_step(losses, taken=True)
        trainer.meter.add_load(outputs[-1], config.model.experts_per_token)
    passes = 2 if name == "adamw" else 4
    assert_waits(waits, {}, passes * LAYERS)
    assert (losses.device, losses.dtype) == (CUDA, torch.float32)
    assert losses.isfinite().all()
    assert losses[0] > 0
    assert trainer.meter.flops > 0


@pytest.mark.parametrize("name", ["adamw", "sophia_g"])
def test_a_checkpoint_is_copied_into_pinned_memory_with_one_wait(gpu, name):
    config, engine = engine_of(name)
    average = EngineAverage(engine.module)
    set_lr(engine.optimizer, config.optim.lr)
    batch, held, places = batch_of(engine.module), HostCopy(), []
    for step in range(2):
        loss = engine(batch, with_loss=True, target_counts=counts_of(batch, CUDA)).loss
        with gpu.watch() as waits:
            Accelerator(engine, CUDA).backward(loss)
            average.update(step)
            held.fill("weights", whole_weights(engine))
            held.fill("moments", whole_moments(engine))
            held.fill("average", average.whole())
        assert waits == []
        held.finish()
        tensors = {file: dict(of) for file, of in held.files.items()}
        places.append([tensor.data_ptr() for of in tensors.values() for tensor in of.values()])
        weights, moments = gather_tensors(engine)
        for ours, theirs in ((tensors["weights"], weights), (tensors["moments"], moments),
                             (tensors["average"], average.gathered())):  # fmt: skip
            assert ours.keys() == theirs.keys()
            assert all(gpu.is_pinned(tensor) and torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert places[0] == places[1]
    assert len(moments) == len(weights) * len(MOMENTS[config.optim.name])
    assert all(tensor.isfinite().all() for of in tensors.values() for tensor in of.values())
    assert all(tensor.dtype == torch.float32 for tensor in tensors["average"].values())

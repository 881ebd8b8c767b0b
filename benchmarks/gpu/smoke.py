"""A quick first check that every path of the model runs on the GPU, and of how near its results are to the CPU's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.parts import Bench, cosine_distance
from pipeline.data.batch import Batch, collate
from pipeline.data.stand_in import StandIn
from pipeline.distributed.experts import second_derivatives
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import HEADS, PRUNING, LossConfig, ModelConfig
from pipeline.model.encoder import all_tokens
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.hessian import hutchinson, rademacher

PHOTOS = 4
MARGINS = [9.0, 9.0] + 7 * [0.05]  # an untrained head is sure of nothing: two rounds at least, then any answer will do
STOPPING = {"cut": 0.0, "margins_none": MARGINS, "margins_roadwork": MARGINS}
SIZES: dict[str, Any] = {"backbone": "scenes-tiny", "view_side": 64, "width": 64, "layers": 2, "heads": 4,
                         "fusion_heads": 4, "expert_width": 64}  # fmt: skip


def smoke(bench: Bench) -> None:
    """Run all heads, ways of choosing views, mixup and early stopping; compare with the CPU."""
    for head in HEADS:
        for where in ("online", "cached"):
            bench.attempt(f"head {head}, {where}", steps, bench, ModelConfig(**SIZES, head=head), where == "cached")
    for mode in PRUNING:
        fixed = [5, 4, 6, 10, 11, 8, 7] if mode == "fixed" else []
        bench.attempt(f"pruning {mode}", steps, bench, ModelConfig(**SIZES, pruning=mode, fixed_views=fixed), False)
    bench.attempt("mixup", steps, bench, ModelConfig(**SIZES), False, LossConfig(mixup_alpha=0.4))
    bench.attempt("beside the CPU", agreement, bench)
    bench.attempt("second derivatives beside the CPU", second_order, bench)


def steps(bench: Bench, config: ModelConfig, cached: bool, loss: LossConfig | None = None) -> dict[str, Any]:
    """Forward and backward in training's precision, pruned and not, and answers in evaluation mode."""
    torch.manual_seed(0)  # the same weights in every run
    model = RoadworkModel.build(config, loss or LossConfig(), device=bench.device)
    model.to(torch.float32 if bench.dry else torch.bfloat16).train()
    batch = photos(config)
    if cached:
        batch = tokens_of(batch, model.backbone, config)
    losses = [step(model, batch, keep_all) for keep_all in (False, True)]
    model.config.stopping = STOPPING  # only the mode `dynamic` reads it
    with torch.inference_mode():
        answer = model.eval()(batch, null_metadata=True)
    assert answer.logits.isfinite().all(), "logits that are not finite"
    return {"loss": losses[0], "loss_all_views": losses[1], "kept_views": answer.view_mask.sum(1).tolist()}


def step(model: RoadworkModel, batch: Batch, keep_all: bool) -> float:
    """The loss of one forward and backward pass; checks that loss and gradients are finite."""
    model.zero_grad()
    loss = model(batch, with_loss=True, keep_all=keep_all).loss
    loss.backward()
    spoilt = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert loss.isfinite(), "a loss that is not finite"
    assert not spoilt, f"gradients that are not finite: {spoilt[:3]}"
    return round(loss.item(), 4)


def photos(config: ModelConfig) -> Batch:
    """Noise with targets for every term."""
    noise = StandIn(PHOTOS, config.input_spec("full"), config.text_dim)
    batch = collate([noise[row] for row in range(PHOTOS)])
    generator = torch.Generator().manual_seed(0)
    return batch | {"mask_targets": torch.rand(batch["mask_targets"].shape, generator=generator)}


def tokens_of(batch: Batch, backbone: FrozenBackbone, config: ModelConfig) -> Batch:
    """The same batch as a feature cache would give it."""
    tokens = all_tokens(backbone, batch["views"], batch["boxes"], batch["view_mask"], config.pool_grid)
    stored = {name: part.bfloat16().cpu() for name, part in tokens._asdict().items()}
    return {name: part for name, part in batch.items() if name != "views"} | stored


def agreement(bench: Bench) -> dict[str, Any]:
    """How far a head on the GPU is from one on the CPU that reads the same tokens, and their backbones' tokens."""
    config = ModelConfig(**SIZES)
    torch.manual_seed(0)
    here = RoadworkModel.build(config, None).eval()
    there = RoadworkModel.build(config, None, device=bench.device).eval()
    there.load_state_dict(here.state_dict())
    batch = photos(config)
    tokens, theirs = (tokens_of(batch, model.backbone, config) for model in (here, there))
    with torch.inference_mode():
        logits, on_gpu = (model(tokens, null_metadata=True).logits.cpu() for model in (here, there))
        halved = copy.deepcopy(there).bfloat16()(tokens, null_metadata=True).logits.float().cpu()
    return {
        "logits_fp32": (on_gpu - logits).abs().max().item(),
        "logits_bf16": (halved - logits).abs().max().item(),
        "cosine_distance_of_cls": cosine_distance(theirs["cls"], tokens["cls"]),
    }


def second_order(bench: Bench) -> dict[str, Any]:
    """How far one estimate of `sophia_h` is from the CPU's, as a share of each parameter's largest value."""
    config = ModelConfig(**SIZES)
    torch.manual_seed(0)
    model = RoadworkModel.build(config, LossConfig()).eval()
    batch = tokens_of(photos(config), model.backbone, config)
    signs = rademacher({name: tuple(p.shape) for name, p in model.named_parameters()}, 0, 0)
    found = []
    for device in (torch.device("cpu"), bench.device):
        model.to(device)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        with second_derivatives(model), sdpa_kernel(SDPBackend.MATH):
            loss = functional_call(model, leaves, (batch,), {"with_loss": True}).loss
            products = hutchinson(loss, leaves, {name: sign.to(device) for name, sign in signs.items()})
        found.append({name: product.cpu().double() for name, product in products.items()})
    cpu, gpu = found
    apart = {name: ((cpu[name] - gpu[name]).abs().max() / cpu[name].abs().max().clamp(min=1e-12)).item()
             for name in cpu}  # fmt: skip
    worst = max(apart, key=apart.__getitem__)
    return {"median": sorted(apart.values())[len(apart) // 2], "most": apart[worst], "of": worst}

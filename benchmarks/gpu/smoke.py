"""A quick first check that every path of the model runs on the GPU, and of how near its results are to the CPU's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.parts import Bench, cosine_distance
from pipeline.data.batch import Batch, collate
from pipeline.data.stand_in import StandIn
from pipeline.distributed.experts import second_derivatives
from pipeline.distributed.startup import choose_kernels
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
    bench.attempt("without cell evidence", steps, bench, ModelConfig(**SIZES, evidence=False), False)
    for heads in (2, 3):
        bench.attempt(f"{heads} heads", steps, bench, ModelConfig(**SIZES), True, None, heads)
    bench.attempt("beside the CPU", agreement, bench, 1)
    bench.attempt("3 heads beside the CPU", agreement, bench, 3)
    bench.attempt("second derivatives beside the CPU", second_order, bench)
    bench.attempt("not deterministic, by torch's own list", not_deterministic, bench)


def steps(
    bench: Bench, config: ModelConfig, cached: bool, loss: LossConfig | None = None, heads: int = 1
) -> dict[str, Any]:
    """Forward and backward in training's precision, pruned and not, and answers in evaluation mode."""
    torch.manual_seed(0)  # the same weights in every run
    model = RoadworkModel.build(config, loss or LossConfig(), device=bench.device, heads=heads)
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


def agreement(bench: Bench, heads: int) -> dict[str, Any]:
    """How far heads on the GPU are from the same ones on the CPU that read the same tokens, and the backbones' tokens.

    The map of cell evidence is compared where both sides keep the same views.
    """
    config = ModelConfig(**SIZES)
    torch.manual_seed(0)
    here = RoadworkModel.build(config, None, heads=heads).eval()
    there = RoadworkModel.build(config, None, device=bench.device, heads=heads).eval()
    there.load_state_dict(here.state_dict())
    batch = photos(config)
    tokens, theirs = (tokens_of(batch, model.backbone, config) for model in (here, there))
    with torch.inference_mode():
        ours, on_gpu = (model(tokens, null_metadata=True) for model in (here, there))
        halved = copy.deepcopy(there).bfloat16()(tokens, null_metadata=True)
    same = (on_gpu.view_indices.cpu() == ours.view_indices).all(dim=1)
    return {
        "logits_fp32": apart(on_gpu.logits, ours.logits),
        "logits_bf16": apart(halved.logits, ours.logits),
        "evidence_fp32": apart(on_gpu.evidence_map.cpu()[same], ours.evidence_map[same]),
        "photos_with_the_same_views": int(same.sum()),
        "cosine_distance_of_cls": cosine_distance(theirs["cls"], tokens["cls"]),
    }


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two tensors' elements; 0 if there are none."""
    difference = (ours.cpu().double() - theirs.double()).abs()
    return difference.max().item() if difference.numel() else 0.0


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
    shares = {name: apart(gpu[name], cpu[name]) / cpu[name].abs().max().clamp(min=1e-12).item() for name in cpu}
    worst = max(shares, key=shares.__getitem__)
    return {"median": sorted(shares.values())[len(shares) // 2], "most": shares[worst], "of": worst}


def not_deterministic(bench: Bench) -> dict[str, Any]:
    """Which operations of a step torch warns of under `train.deterministic`."""
    choose_kernels(deterministic=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(bench, ModelConfig(**SIZES), cached=True)
            steps(bench, ModelConfig(**SIZES), cached=False)
    finally:
        torch.use_deterministic_algorithms(False)
    said = {str(warning.message).partition(".")[0][:200] for warning in caught}
    return {"named": sorted(text for text in said if "determinis" in text)}

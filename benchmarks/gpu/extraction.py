"""From photos to tokens: the GPU's ceilings, attention, the backbone eager, compiled and in FP8, and the whole way."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

from benchmarks.gpu.parts import Bench, cosine_distance
from data_prep.features.extraction import KERNELS, Extractor, Item
from data_prep.features.options import Options, Precision
from data_prep.shards.command import shard
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.data.stand_in import StandIn
from pipeline.devices import spare_cores
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.compiled import compile_layers
from pipeline.model.float8 import Float8Linear, to_float8
from pipeline.names import NUM_VIEWS
from pipeline.training.throughput import flops_per_view, matmul_rate

COPY_ELEMENTS = 2_000_000_000
PASSES = {"a quarter pass": 4, "half a pass": 2, "a pass": 1}
"""By name, into how many parts the views of a pass are cut."""


class Rates:
    """Views per second as a share of what the GPU can do."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.view_flops = flops_per_view(bench.backbone_config, bench.sizes.view_side)
        self.peak_flops = 0.0 if bench.dry else matmul_rate(bench.device)

    def of(self, views: int, wall_s: float) -> dict[str, Any]:
        """The rates of some views in some time; `mfu` is the share of the GPU's rate of bf16 matrix products."""
        flops = views * self.view_flops / wall_s
        found = {"ms": 1e3 * wall_s, "views_per_s": views / wall_s, "photos_per_s": views / wall_s / NUM_VIEWS}
        return found | {"tflops": flops / 1e12, **({"mfu": flops / self.peak_flops} if self.peak_flops else {})}

    def passes(self, backbone: FrozenBackbone, count: int) -> dict[str, Any]:
        """Passes of the backbone alone, on views that are on the GPU already."""
        work = partial(backbone, random_views(self.bench, count).to(self.bench.device))
        rates = self.of(count, self.bench.seconds(work))
        return {"views": count, **rates, "peak_gb": self.bench.peak_gb(work)}

    def from_memory(self, backbone: FrozenBackbone, precision: Precision = "auto") -> dict[str, Any]:
        """Passes from pinned memory to stored tokens; in FP8 the extractor changes the backbone, and compiles it."""
        bench, number = self.bench, 3
        extractor = make_extractor(bench, backbone, precision)
        rows = pinned_rows(bench)
        took = bench.seconds(lambda: list(extractor.batches(rows * number)))
        return {**self.of(number * bench.sizes.pass_views, took), **(extractor.start or {})}


def extraction(bench: Bench) -> None:
    """Measure extraction, the most needed numbers first."""
    rates, views = Rates(bench), bench.sizes.pass_views
    bench.attempt("ceilings", ceilings, bench, rates)
    attention(bench)
    backbone = FrozenBackbone(bench.backbone, bench.device)
    for name, parts in PASSES.items():
        bench.attempt(f"eager, {name}", rates.passes, backbone, views // parts)
    bench.attempt("eager, from pinned memory to tokens", rates.from_memory, backbone)
    bench.attempt("compiling layer by layer", compile_by_layer, bench, backbone)
    bench.attempt("compiled by layer, a pass", rates.passes, backbone, views)
    bench.attempt("compiled by layer, from pinned memory to tokens", rates.from_memory, backbone)
    bench.attempt("compiled by layer, from photos to tokens", from_photos, bench, rates, backbone)
    del backbone
    for name, convert in (("the MLPs", mlps_to_float8), ("all products", to_float8)):
        bench.attempt(f"FP8 in {name}, compiled by layer, a pass", float8, bench, rates, convert)
    bench.attempt("FP8 in all products, from pinned memory to tokens", from_memory_in_float8, bench, rates)


def whole(bench: Bench) -> None:
    """Compile all layers at once: measure how long that takes and how fast it is, also for another memory layout."""
    rates = Rates(bench)
    backbone = FrozenBackbone(bench.backbone, bench.device)
    compile_model(bench, backbone.model)
    views = random_views(bench, bench.sizes.pass_views).to(bench.device)
    bench.attempt("compiling all layers at once", lambda: {"compile_s": bench.once(lambda: backbone(views))})
    bench.attempt("compiled as a whole, a pass", rates.passes, backbone, len(views))
    bench.attempt("compiled as a whole, from pinned memory to tokens", rates.from_memory, backbone)
    channels_first = views.contiguous()
    again = partial(backbone, channels_first)
    bench.attempt("first pass of another memory layout", lambda: {"compile_s": bench.once(again)})


def ceilings(bench: Bench, rates: Rates) -> dict[str, Any]:
    """Rates of the products that the backbone is made of, of large square ones, and of a copy."""
    config, views = bench.backbone_config, bench.sizes.pass_views
    found: dict[str, Any] = {"matmul_tflops": rates.peak_flops / 1e12}
    rows, width, inner = views * tokens_per_view(bench), config.hidden_size, config.intermediate_size
    for n, k in ((width, width), (inner, width), (width, inner)):
        x, weight = (torch.randn(size, k, device=bench.device, dtype=torch.bfloat16) for size in (rows, n))
        found[f"product_{k}_{n}_tflops"] = 2 * rows * n * k / bench.seconds(partial(F.linear, x, weight)) / 1e12
    source = torch.zeros(1000 if bench.dry else COPY_ELEMENTS, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {**found, "copy_tb_per_s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / 1e12}


def attention(bench: Bench) -> None:
    """One layer's attention for a pass of views: time and error of each kernel, and which one torch chooses."""
    config = bench.backbone_config
    heads = config.num_attention_heads
    shape = bench.sizes.pass_views, heads, tokens_per_view(bench), config.hidden_size // heads
    q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q[:2].double(), k[:2].double(), v[:2].double())
    flops = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]

    def kernel(backends: list[SDPBackend]) -> dict[str, Any]:
        with sdpa_kernel(backends):
            work = partial(F.scaled_dot_product_attention, q, k, v)
            took = bench.seconds(work)
            chosen = SDPBackend(torch._fused_sdp_choice(q, k, v)).name
            error = ((work()[:2].double() - exact).norm() / exact.norm()).item()
        return {"ms": 1e3 * took, "tflops": flops / took / 1e12, "error": error, "kernel": chosen}

    for name, backends in {"auto": list(KERNELS.values()), **{name: [one] for name, one in KERNELS.items()}}.items():
        bench.attempt(f"attention {name}", kernel, backends)


def from_photos(bench: Bench, rates: Rates, backbone: FrozenBackbone) -> dict[str, Any]:
    """From shards of photos to tokens, decoded on all cores but one, once the workers have started."""
    out = bench.place / "photo-shards"
    shard(bench.photos, out, splits="random", val_share=0.0, test_share=0.0, workers=1 if bench.dry else 0)
    data = ShardDataset(str(out), read_index(str(out)), "train", bench.model_config().input_spec("full"))
    extractor = make_extractor(bench, backbone)
    rows = extractor.run({"train": data}, [Item("train", row, 1) for row in range(len(data))] * bench.sizes.repeats)
    for _ in range(len(data)):
        next(rows)
    start = time.perf_counter()
    done = sum(1 for _ in rows)
    wall_s = time.perf_counter() - start
    found = {"decode_ms": 1e3 * bench.seconds(lambda: data[0]), "workers": extractor.workers}
    return {**rates.of(done * NUM_VIEWS, wall_s), **found}


def float8(bench: Bench, rates: Rates, convert: Callable[[nn.Module], None]) -> dict[str, Any]:
    """Speed of a backbone with some products in FP8, and how near its tokens are; with random weights."""
    backbone, views = FrozenBackbone(bench.backbone, bench.device), random_views(bench, NUM_VIEWS)
    exact = backbone(views)
    convert(backbone.model)
    pairs = zip(("cls", "patches"), backbone(views), exact, strict=True)
    found = {f"cosine_distance_of_{name}": cosine_distance(ours, theirs) for name, ours, theirs in pairs}
    return {**found, **compile_by_layer(bench, backbone), **rates.passes(backbone, bench.sizes.pass_views)}


def mlps_to_float8(model: nn.Module) -> None:
    """As `to_float8`, for the MLPs alone: two thirds of a layer's products, and none that attention depends on."""
    for layer in layers_of(model):
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                layer.mlp.set_submodule(name, Float8Linear(linear))


def from_memory_in_float8(bench: Bench, rates: Rates) -> dict[str, Any]:
    """As `prep features --precision fp8` does it: by the extractor, on a backbone of its own."""
    return rates.from_memory(FrozenBackbone(bench.backbone, bench.device), "fp8")


def compile_by_layer(bench: Bench, backbone: FrozenBackbone) -> dict[str, Any]:
    """Compile each layer by itself in the first pass; all layers share one compilation."""
    views = random_views(bench, bench.sizes.pass_views).to(bench.device)
    first_pass = partial(backbone, views)
    if bench.dry:
        for layer in layers_of(backbone.model):
            compile_model(bench, layer)
        return {"compile_s": bench.once(first_pass)}
    start = time.perf_counter()
    if not compile_layers(backbone.model, first_pass, spare_cores(bench.device)):
        raise RuntimeError("the layers cannot be compiled here; the log says why")
    bench.wait()
    return {"compile_s": time.perf_counter() - start}


def layers_of(model: nn.Module) -> list[DINOv3ViTLayer]:
    """The transformer's layers."""
    return [module for module in model.modules() if isinstance(module, DINOv3ViTLayer)]


def compile_model(bench: Bench, module: nn.Module) -> None:
    """Have a module compiled at its next pass; a rehearsal traces it, and generates no code."""
    module.compile(dynamic=False, backend="eager" if bench.dry else "inductor")


def make_extractor(bench: Bench, backbone: FrozenBackbone, precision: Precision = "auto") -> Extractor:
    """An extractor that takes the backbone as it is, compiled or not; in FP8 it compiles."""
    options = Options(
        str(bench.device), None, bench.sizes.pass_views, compile=precision == "fp8", attention="auto", shard_mb=16.0,
        precision=precision,
    )  # fmt: skip
    return Extractor(backbone, bench.model_config().pool_grid, options, spare_cores(bench.device))


def random_views(bench: Bench, count: int, pinned: bool = False) -> torch.Tensor:
    """Views of noise, uint8 [count, 3, S, S], channels last in memory as the data side gives them.

    In another layout, a compiled backbone would be compiled once more when the photos come.
    """
    shape = count, bench.sizes.view_side, bench.sizes.view_side, 3
    views = torch.randint(0, 256, shape, dtype=torch.uint8, pin_memory=pinned and not bench.dry)
    return views.permute(0, 3, 1, 2)


def pinned_rows(bench: Bench) -> list[dict[str, Any]]:
    """The photos of one pass, as the loader gives them."""
    about = StandIn(1, bench.model_config().input_spec("full"), 1)[0] | {"photo": 0, "sha256": "", "record": b"{}"}
    views = random_views(bench, bench.sizes.pass_views, pinned=True).split(NUM_VIEWS)
    return [{**about, "views": part} for part in views]


def tokens_per_view(bench: Bench) -> int:
    """The number of tokens of a view: CLS, registers and patches."""
    config: Any = bench.backbone_config
    return 1 + config.num_register_tokens + (bench.sizes.view_side // config.patch_size) ** 2

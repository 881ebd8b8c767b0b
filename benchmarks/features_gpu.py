"""The feature cache on a GPU: DINOv3 ViT-H/16+ from its configuration, with random weights, which change no speed."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.utils.data import DataLoader
from transformers import AutoModel, DINOv3ViTConfig

from benchmarks.form import Goal, Row, compare, interleave
from data_prep.features.command import features as make_cache
from data_prep.features.extraction import KERNELS, Extractor, Item
from data_prep.features.job import spare_cores
from data_prep.features.options import MOST_VIEWS, Attention, ModelChoice, Options
from data_prep.scenes.data_set import KIND, scenes
from data_prep.shards.command import shard
from pipeline.config import Config, DataConfig, TrainConfig, to_yaml
from pipeline.data.batch import collate, model_inputs
from pipeline.data.dataset import ShardDataset, mask_targets
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache
from pipeline.data.index import Index, read_index
from pipeline.model.backbone import FrozenBackbone, vith16plus_config
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkModel
from pipeline.training.throughput import flops_per_view, matmul_rate

MISSION_IMAGES, MISSION_EPOCHS = 8549, 30
SEED_HOURS, GOAL_MINUTES = 12.0, 10.0
MFU_GOAL = Goal(0.6)
TRAIN_BATCH = 64
MASK_SIDE = 64
PATCH = 16
NAME = "ViT-H/16+, 512 px"
NOTES = {
    "kernel": f"forward, bf16, one layer's attention for {MOST_VIEWS} views; theirs is softmax(QK')V written out",
    "backbone": f"forward of the whole backbone for {MOST_VIEWS} views, bf16; theirs is attn_implementation='eager' of "
    "transformers",
    "mfu": f"passes of {MOST_VIEWS} views from pinned memory to stored tokens, operations counted; theirs is the rate "
    "of bf16 products of 8192x8192 matrices on this GPU",
    "end": f"{KIND} of 4032x3024 from shards, decoded on all cores but one; theirs is the passes alone",
    "mission": f"{MISSION_IMAGES} photos of 12 megapixels, features once and {MISSION_EPOCHS} epochs of the full head "
    f"from the cache; theirs is the {SEED_HOURS:g} hours that were named for the same without a cache",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    images: int
    """Photos that are drawn; extraction goes over them `repeats` times."""
    repeats: int
    epochs: int
    rounds: int


FULL = Plan(images=96, repeats=3, epochs=MISSION_EPOCHS, rounds=3)
QUICK = Plan(images=32, repeats=2, epochs=10, rounds=2)


class Setting:
    """The backbone with its configuration, and where all of it runs."""

    def __init__(self, config: DINOv3ViTConfig, side: int, device: torch.device, folder: Path):
        """Make random weights and load them as a user's would be."""
        self.config, self.side, self.device, self.folder = config, side, device, folder
        torch.manual_seed(0)
        with torch.device(device):
            AutoModel.from_config(config).to(torch.bfloat16).save_pretrained(folder / "backbone")
        self.name = str(folder / "backbone")
        self.views = torch.randint(0, 256, (MOST_VIEWS, 3, side, side), dtype=torch.uint8)

    @cached_property
    def fast(self) -> Extractor:
        """As the command `features` makes one; compiled once, which takes a minute."""
        return self.extractor(compiled=True, attention="auto")

    def extractor(self, compiled: bool, attention: Attention) -> Extractor:
        """On a backbone of its own, since compilation changes it."""
        options = Options(str(self.device), None, MOST_VIEWS, compiled, attention, 16.0)
        return Extractor(FrozenBackbone(self.name, self.device), 4, options, spare_cores(self.device))

    def milliseconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Of one run of `work`, over several queued one after the other."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return 1e3 * (time.perf_counter() - start) / repeats

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gb(self, work: Callable[[], object]) -> float:
        """Most memory that `work` has beyond what was there before it."""
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


def gpu_rows(quick: bool, seed: int) -> tuple[Row, ...]:
    """All rows that need a GPU."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="roadwork-features-") as place:
        setting = Setting(vith16plus_config(), 512, torch.device("cuda", 0), Path(place))
        parts = (kernels, whole_backbones, mfu, mission)
        return tuple(row for part in parts for row in part(setting, plan, seed))


def kernels(setting: Setting, plan: Plan, seed: int) -> Iterator[Row]:
    """One layer's attention: time and memory of every kernel, beside softmax written out."""
    config = setting.config
    tokens = 1 + config.num_register_tokens + (setting.side // PATCH) ** 2
    heads = config.num_attention_heads
    shape = MOST_VIEWS, heads, tokens, config.hidden_size // heads
    query, key, value = (torch.randn(shape, device=setting.device, dtype=torch.bfloat16) for _ in range(3))

    arms = kernel_arms(query, key, value)
    works = {name: work for name, work in arms.items() if runs(work)}
    yield from side_by_side(setting, works, plan.rounds, seed, f"attention, {NAME}", "kernel")


def kernel_arms(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Softmax written out, every kernel of PyTorch, its own choice, and FlashAttention-3 where it is installed."""
    inputs = query, key, value
    arms: dict[str, Callable[[], object]] = {
        "eager": partial(written_out, *inputs),
        "eager, compiled": partial(torch.compile(written_out), *inputs),
        "SDPA auto": partial(F.scaled_dot_product_attention, *inputs),
        **{f"SDPA {name}": partial(chosen_kernel, name, *inputs) for name in KERNELS},
    }
    if importlib.util.find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_func

        # It wants [batch, tokens, heads, width].
        arms["FlashAttention-3"] = partial(flash_attn_func, *(part.transpose(1, 2).contiguous() for part in inputs))
    return arms


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention as its formula says: [B, heads, tokens, width] each."""
    return ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1) @ value


def chosen_kernel(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by one of `KERNELS` and no other."""
    with sdpa_kernel(KERNELS[name]):
        return F.scaled_dot_product_attention(query, key, value)


def whole_backbones(setting: Setting, plan: Plan, seed: int) -> Iterator[Row]:
    """A pass of the whole backbone: eager, SDPA, compiled."""
    views = setting.views.to(setting.device)
    eager, plain = FrozenBackbone(setting.name, setting.device), FrozenBackbone(setting.name, setting.device)
    eager.model.set_attn_implementation("eager")
    ways = {"eager": eager, "SDPA auto": plain, "SDPA auto, compiled": setting.fast.backbone}
    works = {name: partial(backbone, views) for name, backbone in ways.items()}
    for work in works.values():
        work()
    yield from side_by_side(setting, works, plan.rounds, seed, f"backbone, {NAME}", "backbone")


def side_by_side(
    setting: Setting, works: Mapping[str, Callable[[], object]], rounds: int, seed: int, what: str, note: str
) -> Iterator[Row]:
    """Time and memory of each way, beside `eager`."""
    found = interleave({name: partial(setting.milliseconds, work) for name, work in works.items()}, rounds, seed)
    memory = {name: [setting.peak_gb(work) for _ in range(2)] for name, work in works.items()}
    for name in (name for name in works if name != "eager"):
        yield compare(f"{what}, {name}: time", "eager", found[name], found["eager"], "ms", None, NOTES[note])
        yield compare(f"{what}, {name}: memory", "eager", memory[name], memory["eager"], "GB", None, NOTES[note])


def mfu(setting: Setting, plan: Plan, seed: int) -> Iterator[Row]:
    """Operations per second of full passes, beside matrix products; the first way is the default of `features`."""
    per_view = flops_per_view(setting.config, setting.side) / 1e12
    ways = {"compiled": setting.fast}
    kernels: tuple[Attention, ...] = ("auto", "flash", "cudnn")
    ways |= {f"not compiled, SDPA {kernel}": setting.extractor(False, kernel) for kernel in kernels}
    arms: dict[str, Callable[[], float]] = {
        name: partial(tera_flops, extractor, setting, per_view)
        for name, extractor in ways.items()
        if runs(partial(passes, extractor, setting, 1))
    }
    arms["matmul"] = partial(tera_matmul, setting)
    found = interleave(arms, plan.rounds, seed)
    for name in (name for name in arms if name != "matmul"):
        both = found[name], found["matmul"]
        goal = MFU_GOAL if name == "compiled" else None
        yield compare(f"extraction, {NAME}, {name}", "bf16 matmul", *both, "TFLOP/s", goal, NOTES["mfu"])


def tera_flops(extractor: Extractor, setting: Setting, per_view: float) -> float:
    """TFLOP/s of a few passes, at `per_view` TFLOP."""
    return passes(extractor, setting, 3) * per_view


def tera_matmul(setting: Setting) -> float:
    """TFLOP/s of matrix products."""
    return matmul_rate(setting.device) / 1e12


def passes(extractor: Extractor, setting: Setting, number: int) -> float:
    """Views per second of full passes, from pinned memory to stored tokens."""
    pinned = setting.views.pin_memory() if setting.device.type == "cuda" else setting.views
    photo = {
        "photo": 0,
        "sha256": "",
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(12, 4).contiguous(),
        "view_mask": torch.ones(12, dtype=torch.bool),
        "mask_targets": mask_targets(None, MASK_SIDE),
    }
    rows = [{**photo, "views": views} for views in pinned.split(12)] * number
    start = time.perf_counter()
    done = sum(1 for _ in extractor.batches(rows))
    return done * 12 / (time.perf_counter() - start)


def mission(setting: Setting, plan: Plan, seed: int) -> Iterator[Row]:
    """From 12-megapixel photos to a trained head: rates, and what they mean for the whole data set."""
    config = mission_config(setting)
    draw(setting.folder, plan.images, seed)
    index = read_index(config.data.shards)
    recipe = setting.folder / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    make_cache(
        out=Path(config.data.features),
        recipe=str(recipe),
        model=ModelChoice(),
        device=str(setting.device),
        compile=False,
    )
    data = shards_of(config, index, "")
    items = [Item("train", row, 1) for row in range(len(data))] * plan.repeats

    def extraction() -> float:
        start = time.perf_counter()
        done = sum(1 for _ in setting.fast.run({"train": data}, items))
        return done / (time.perf_counter() - start)

    with training(setting, config, index) as epoch:
        epoch(1)
        arms = {
            "features": extraction,
            "backbone": lambda: passes(setting.fast, setting, 3) / 12,
            "training": lambda: epoch(plan.epochs),
        }
        found = interleave(arms, plan.rounds, seed)
    yield compare(
        "features of 12 MP photos, end to end", "the backbone alone", found["features"], found["backbone"], "images/s",
        None, NOTES["end"],
    )  # fmt: skip
    minutes = [
        MISSION_IMAGES / 60 * (1 / features + MISSION_EPOCHS / trained)
        for features, trained in zip(found["features"], found["training"], strict=True)
    ]
    limit = Goal(GOAL_MINUTES / 60 / SEED_HOURS, at_most=True)
    note = NOTES["mission"] + f"; measured on {len(items)} photos and {plan.epochs} epochs of {len(data)}, and scaled"
    yield compare(
        "30 epochs, features included", "uncached", minutes, [SEED_HOURS * 60] * plan.rounds, "minutes", limit, note
    )


def mission_config(setting: Setting) -> Config:
    """The full-size run, in the setting's folder."""
    folder = setting.folder
    return Config(
        data=DataConfig(shards=str(folder / "shards"), features=str(folder / "features")),
        train=TrainConfig(micro_batch_size=TRAIN_BATCH),
        model=ModelConfig(backbone=setting.name, view_side=setting.side),
    )


def draw(folder: Path, images: int, seed: int) -> None:
    """Shards of procedural photos of 12 megapixels, all for training."""
    scenes(folder / "photos", images, "4032x3024", seed=seed)
    shard(folder / "photos", folder / "shards", splits="random", val_share=0.0, test_share=0.0)


def shards_of(config: Config, index: Index, cache: str) -> ShardDataset:
    """The training split, from a cache where there is one."""
    found = open_cache(cache, index)
    return open_split(config.data.shards, index, "train", config.model, config.data.decode_scale, found)


@contextmanager
def training(setting: Setting, config: Config, index: Index) -> Iterator[Callable[[int], float]]:
    """Trains the full head from the cache; called with a number of epochs, it gives photos per second."""
    model = RoadworkModel.build(config.model, setting.device)
    model.to(torch.bfloat16 if setting.device.type == "cuda" else torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    data = shards_of(config, index, config.data.features)

    def epoch(number: int) -> float:
        rows = [row for _ in range(number) for row in range(len(data))]
        loader = DataLoader(
            data, TRAIN_BATCH, sampler=rows, num_workers=spare_cores(setting.device), collate_fn=collate,
            pin_memory=setting.device.type == "cuda", drop_last=len(rows) >= TRAIN_BATCH,
        )  # fmt: skip
        start, done = time.perf_counter(), 0
        for batch in loader:
            output = model(**model_inputs(batch), labels=batch["labels"], mask_targets=batch["mask_targets"])
            assert output.loss is not None
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += len(batch["labels"])
        setting.wait()
        return done / (time.perf_counter() - start)

    yield epoch


def runs(work: Callable[[], object]) -> bool:
    """Whether a way works on this card with this build; a kernel that does not says so by an exception."""
    try:
        work()
    except RuntimeError:
        return False
    return True

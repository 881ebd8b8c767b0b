"""Make the small shards, feature cache, run and exported model that `test_disk_formats.py` reads.

    git worktree add /tmp/before 14eef39 && (cd /tmp/before && ./launch.sh setup)
    /tmp/before/.venv/bin/python tests/compatibility/make.py /tmp/before tests/compatibility/made_by_14eef39

Everything here is run by the checkout that is named first, so that the files are what that revision wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = """\
train: {run: run, epochs: 2, batch_size: 1, log_every: 1, wandb: false, seed: 3}
data: {shards: shards, features: features, workers: 0, epoch_share: 1.0}
model:
  {backbone: backbone, view_side: 32, keep_views: 4, pool_grid: 2, width: 16, layers: 1, heads: 2, fusion_heads: 2,
   experts: 2, experts_per_token: 1, expert_width: 16, mask_side: 4, metadata: [daytime, scene]}
loss: {roadwork: 2.0, weather: 0.02, consistency: 0.0}
optim: {lr: 0.003}
checkpoint: {every_minutes: 0, keep: 1}
"""
BACKBONE = """
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=2)).save_pretrained("backbone")
"""
# Half of the run, up to its first validation.
HALF = """
import sys
from pipeline import train, trainer
run = trainer.Trainer.run
trainer.Trainer.run = lambda self: run(self, self.schedule.steps // 2)
sys.argv = ["pipeline/train.py", "--config", "recipe.yaml"]
train.main()
"""


def main(checkout: Path, out: Path) -> None:
    """Write everything to `out`, by the programs of `checkout`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(RECIPE)
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(checkout / "ds_configs" / "zero1.json"),
    }  # fmt: skip

    def run(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=out, env=environment, check=False, stdout=sys.stderr)
        assert done.returncode == 0, words

    run("-c", BACKBONE)
    scenes = ["--images=14", "--size=320x240", "--difficulty=0.2", "--seed=5", "--workers=1"]
    run("-m", "data_prep", "scenes", "--out=photos", *scenes)
    run("-m", "data_prep", "shard", "--source=photos", "--out=shards", "--val_share=0.25", "--test_share=0.25")
    run("-m", "data_prep", "features", "--recipe=recipe.yaml", "--out=features", "--device=cpu")
    run("-c", HALF)
    (out / "run" / "summary.json").unlink()
    shutil.copytree(out / "run", out / "stopped_run")
    run(str(checkout / "pipeline" / "train.py"), "--config", "recipe.yaml")
    run("-m", "pipeline.evaluate", "--run=run", "--workers=0")
    run("-m", "pipeline.export", "--run=run", "--out=exported")
    photos = sorted((out / "photos" / "images").iterdir())[:3]
    (out / "inputs").mkdir()
    for photo in photos:
        shutil.copy(photo, out / "inputs")
    run("-m", "pipeline.predict", "--model=exported", "--input=inputs", "--output=answers.csv", "--workers=0")
    for name in ("photos", "run/report.html", "answers.summary.json", "shards/map.png"):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(out / "run" / "checkpoints")
    shutil.rmtree(out / "stopped_run" / "model")  # the checkpoint holds the best weights too
    for name in ("run/provenance.json", "stopped_run/provenance.json", "exported/summary.json"):
        path = out / name
        path.write_text(path.read_text().replace(f"{checkout}/", "").replace(f"{out}/", ""))
    revision = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    (out / "made_by.json").write_text(json.dumps({"revision": revision}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())

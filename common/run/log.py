"""The log of a run: metrics.jsonl, rollouts/, TensorBoard, and with --track Weights & Biases."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path

from common.run.errors import check
from common.run.folder import write_jsonl
from common.run.inputs import ROOT


class Log:
    """The writer of a run's log. Steps after `step`, which are done again, leave the log first."""

    def __init__(self, folder: Path, step: int, config: dict, track: bool):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", None
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            write_jsonl(self.path, [row for row in map(json.loads, lines) if row["step"] <= step])
        if track:
            import wandb

            name = hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()[:16]
            run = {"project": ROOT.name, "id": name, "config": config, "resume": "allow"}
            self.wandb = wandb.init(**run, sync_tensorboard=True)  # the same run, found again
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], rollouts: list[dict]) -> None:
        write_jsonl(self.folder / "rollouts" / f"step_{step}.jsonl", rollouts)
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no nan
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def check_track(track: bool) -> None:
    installed = importlib.util.find_spec("wandb") is not None
    check(installed or not track, "--track needs Weights & Biases: pip install wandb")

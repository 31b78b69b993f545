"""What FROG is compared with on CIFAR-10, and in which settings: a research note's, and one for a CPU."""

import dataclasses
from typing import Any, NamedTuple

from experiments import train_images
from experiments.images import Images
from experiments.images_config import Config
from experiments.options import option

PLAIN = "sgd_large"  # SGD with the others' batch: what a step costs without their curvature
RATES = {
    "sgd": (1e-2, 3e-2, 1e-1),
    PLAIN: (3e-2, 1e-1, 3e-1),
    "muon": (3e-3, 1e-2, 3e-2),
    "kfac": (3e-3, 1e-2, 3e-2),
    "kfrog": (3e-4, 1e-3, 3e-3),
    "frog": (3e-3, 1e-2, 3e-2),
}


@dataclasses.dataclass(frozen=True)
class Setting(Config):
    """Of all runs."""

    sgd_batch: int = option(128, "batch of sgd")

    def of(self, method: str) -> "Setting":
        optimizer, batch = "sgd" if method == PLAIN else method, self.sgd_batch if method == "sgd" else self.batch
        return dataclasses.replace(self, optimizer=optimizer, batch=batch)


class Preset(NamedTuple):
    """A setting, accuracies to reach, and how many seeds."""

    setting: Setting
    targets: tuple[float, ...]  # per cent of the test images
    seeds: int


CPU = Setting(model="resnet18", width=8, batch=128, sgd_batch=32, samples=16, epochs=4)
PRESETS = {
    "cpu": Preset(CPU, (35, 40, 45, 50), 2),
    # K-FAC's decompositions of 4608 x 4608 take seconds each.
    "full": Preset(Setting(model="resnet18", batch=512, epochs=30, refresh=100), (88, 90, 92, 94), 3),
}


def train(setting: Setting, data: Images) -> list[dict[str, Any]]:
    """Entries of `train_images.train`, and the share of test images that are not recognised."""
    config = dataclasses.replace(setting.of(setting.optimizer), seed=setting.seed, lr=setting.lr)
    return [{**row, "test_error": 1 - row["test_accuracy"]} for row in train_images.train(config, data)]

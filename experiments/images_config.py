"""The options of `train_images.py`: what they are and what they may be."""

import dataclasses
import math

from experiments.optimizers import IMAGE_METHODS, find_method
from experiments.options import option, require

MODELS = ("cnn", "resnet18")
AUGMENT = ("auto", "on", "off")
COUNTS = ("width", "samples", "epochs", "batch", "refresh", "eval_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines a run. Each field is a command-line option."""

    data: str = option("digits", "digits (scikit-learn's), or a folder with MNIST or CIFAR-10")
    model: str = option("cnn", f"one of {', '.join(MODELS)}")
    width: int = option(64, "channels of the first stage of resnet18; 64 is the paper's")
    optimizer: str = option("soap", f"one of {', '.join(IMAGE_METHODS)}")
    lr: float = option(None, "peak learning rate; by default the optimizer's own", float)
    warmup: float = option(None, "epochs of warm-up before the cosine; by default a tenth of all, 5 at most", float)
    weight_decay: float = option(None, "weight decay; by default the optimizer's own", float)
    refresh: int = option(10, "steps between two renewals of a preconditioner")
    damping: float = option(None, "of an optimizer that inverts curvature; by default its own", float)
    samples: int = option(64, "images of a batch from which FROG and K-FROG take each layer's Fisher")
    epochs: int = option(20, "passes over the training images")
    batch: int = option(64, "images a step; those of an epoch that fill no batch wait for another epoch")
    augment: str = option("auto", "random crops and flips: on, off, or auto: of colour images only")
    seed: int = option(0, "of the initial parameters, the order of the images and their augmentation")
    eval_every: int = option(1, "epochs between two evaluations, each with a checkpoint")

    def resolve(self) -> "Config":
        """Fills in what is None and checks everything. Raises `ValueError`, which names the option."""
        method = find_method(self.optimizer, IMAGE_METHODS)
        config = dataclasses.replace(
            self,
            lr=method.learning_rate if self.lr is None else self.lr,
            damping=method.damping if self.damping is None else self.damping,
            weight_decay=method.weight_decay if self.weight_decay is None else self.weight_decay,
            warmup=min(5.0, self.epochs / 10) if self.warmup is None else self.warmup,
        )
        check(config)
        return config


def check(config: Config) -> None:
    for name in COUNTS:
        require(config, getattr(config, name) >= 1, name, "at least 1")
    require(config, config.model in MODELS, "model", " or ".join(MODELS))
    require(config, config.augment in AUGMENT, "augment", ", ".join(AUGMENT))
    require(config, 0 <= config.warmup < config.epochs, "warmup", f"at least 0 and less than --epochs {config.epochs}")
    require(config, 0 < config.lr < math.inf, "lr", "a positive number")
    if find_method(config.optimizer, IMAGE_METHODS).damping is None:
        require(config, config.damping is None, "damping", f"left out: {config.optimizer} has none")
    else:
        require(config, 0 < config.damping < math.inf, "damping", "a positive number")
    require(config, 0 <= config.weight_decay < math.inf, "weight_decay", "zero or a positive number")
    require(config, 0 <= config.seed < 2**31, "seed", "at least 0 and less than 2^31")

"""What methods with statistics of layers are compared on: a CNN on digits, and a GPT with a head of its own."""

from experiments import gpt_config, images, images_config, text, train_gpt, train_images
from experiments.comparison import Task


def digits() -> Task:
    base = images_config.Config(epochs=10)
    rates = {
        "sgd": (0.03, 0.1, 0.3),
        "adamw": (3e-3, 9e-3, 2e-2),
        "kfrog": (1e-4, 3e-4, 1e-3),
        **dict.fromkeys(("soap", "kfac_soap", "frog"), (1e-3, 3e-3, 9e-3)),
        **dict.fromkeys(("muon", "kfac", "ekfac"), (3e-3, 1e-2, 3e-2)),
    }
    return Task(base, images.load_images(base.data), train_images.train, "test_loss", rates)


def gpt_head() -> Task:
    base = gpt_config.Config(steps=300, eval_every=50, eval_batches=10, head="own")
    rates = dict.fromkeys(("kfac", "kfac_true_head", "kfac_empirical_head"), (6e-3, 1e-2)) | {"adamw": (3e-3,)}
    corpus = text.load_corpus(base.data, base.vocab, base.context)
    return Task(base, corpus, train_gpt.train, "val_loss", rates)

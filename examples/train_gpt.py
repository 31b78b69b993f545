"""Trains a character GPT on the sources of Python's standard library, with SOAP or another optimizer.

    pip install -e '.[examples]' && python examples/train_gpt.py --optimizer soap

OUTPUT
"""

import argparse
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from gpt import GPT, generate, read_text
from matplotlib.figure import Figure
from tqdm import tqdm

import fisher_optax as fo

OPTIMIZERS = {  # name: (how to make it, its best peak rate for this model, what else it takes)
    "adamw": (optax.adamw, 3e-3, {"b2": 0.99}),
    "muon": (fo.muon, 1e-2, {}),
    "soap": (fo.soap, 6e-3, {}),
    "shampoo": (fo.shampoo, 3e-3, {"exponent": -0.5}),
    "kfac_soap": (fo.kfac_soap, 1e-2, {}),
    # K-FAC's momentum adds up about ten gradients, so a tenth of the rate, and ten times the decay, are as much.
    "kfac": (fo.kfac, 6e-4, {"damping": 1e-3, "exponent": -0.5, "grafting": "adam", "weight_decay": 1.0}),
}
CURVATURE = ("kfac", "kfac_soap")  # these take statistics of the layers besides gradients
BATCH, EVERY = 16, 100  # windows of text a step; steps from one evaluation, with a checkpoint, to the next


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the optimizer's best)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    parser.add_argument("--text", help="a text file (default: the standard library's sources)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/OPTIMIZER)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options = vars(parser.parse_args())
    out, resume = options.pop("out") or Path("runs", options["optimizer"]), options.pop("resume")
    if options["steps"] < EVERY:
        parser.error(f"--steps must be at least {EVERY}, not {options['steps']}")
    file = out / "options.json"  # says which run the folder is of
    if not resume and out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty. Go on with its run by --resume, or give another folder by --out.")
    if resume and not file.exists():
        sys.exit(f"{out} holds no run. Leave out --resume to begin one.")
    if resume and (begun := json.loads(file.read_text())) != options:
        sys.exit(f"the run in {out} was begun with {begun}, not with {options}. Give the same options.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options))
    return argparse.Namespace(**options), out


def make_optimizer(name, peak, steps):
    make, best, options = OPTIMIZERS[name]
    peak = peak or best
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps, end_value=peak / 10)
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # norms do not decay
    return make(schedule, **{"weight_decay": 0.1, "mask": matrices, **options})


def train(args, model, training, validation, checkpoints):
    """Parameters, and a row an evaluation: step, mean training loss since the last one, validation loss."""
    tx = make_optimizer(args.optimizer, args.lr, args.steps)

    def loss_fn(params, text, first):
        windows = text[first[:, None] + jnp.arange(model.context + 1)]  # of the last character there is no input
        return fo.losses.softmax_cross_entropy(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    grad_fn = fo.value_and_grad(loss_fn) if args.optimizer in CURVATURE else jax.value_and_grad(loss_fn)

    @jax.jit
    def update(params, opt_state, key):
        first = jax.random.randint(key, (BATCH,), 0, len(training) - model.context)
        loss, grads, *statistics = grad_fn(params, training, first)
        extra = {"statistics": statistics[0]} if statistics else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    key, evaluate = jax.random.key(0), jax.jit(loss_fn)
    spread = jnp.linspace(0, len(validation) - model.context - 1, 320).astype(int)  # where 320 windows begin
    params = jax.jit(model.init)(key, jnp.zeros((1, model.context), int))["params"]
    # All that a run needs to go on. Rows to come are there as nan, for a checkpoint of one shape.
    state = params, tx.init(params), np.full((args.steps // EVERY, 3), np.nan)
    if (done := checkpoints.latest_step()):
        state = checkpoints.restore(done, args=ocp.args.StandardRestore(jax.tree.map(np.asarray, state)))
    (params, opt_state, rows), losses = state, []
    for step in (bar := tqdm(range(done or 0, args.steps), initial=done or 0, total=args.steps, unit="step")):
        params, opt_state, loss = update(params, opt_state, jax.random.fold_in(key, step))
        losses.append(float(loss))
        if (step + 1) % EVERY == 0:
            rows[step // EVERY] = step + 1, np.mean(losses), evaluate(params, validation, spread)
            checkpoints.save(step + 1, args=ocp.args.StandardSave((params, opt_state, rows)))
            bar.set_description(f"validation loss {rows[step // EVERY, 2]:.3f}")
            losses = []
    return params, rows


def main():
    args, out = parse_options()
    tokens, characters = read_text(args.text)
    training, validation = np.split(tokens, [len(tokens) * 9 // 10])
    model = GPT(len(characters))
    print(f"{args.optimizer} on {len(tokens):,} characters; into {out}")
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(out.absolute() / "checkpoints", options=options) as checkpoints:
        params, rows = train(args, model, jnp.asarray(training), jnp.asarray(validation), checkpoints)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows[:, 0], rows[:, 1:], ".-", label=("training, mean since the last point", "validation"))
    axes.set(xlabel="step", ylabel="loss, nats per character", title=args.optimizer)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    written = generate(model, params, validation[: model.context], 400, jax.random.key(1))
    text = "".join(characters[token] for token in written)
    (out / "sample.txt").write_text(text)
    print(text, f"validation loss {rows[-1, 2]:.3f}; loss curve and text in {out}", sep="\n")


if __name__ == "__main__":
    main()

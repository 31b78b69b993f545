"""Trains a character GPT on the sources of Python's standard library, with SOAP or another optimizer.

    pip install -e '.[examples]' && python examples/train_gpt.py --optimizer soap

takes some minutes on two CPU cores, and prints text that the model has written, and

    validation loss 1.441; loss curve in runs/soap/loss.png

A run that was stopped goes on by the same command with ``--resume``, and ends in bitwise the same parameters.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from gpt import GPT, generate, loss_of, read_text
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
KEEP_ONE = ocp.CheckpointManagerOptions(max_to_keep=1)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the optimizer's best)")
    parser.add_argument("--steps", type=int, default=1000, help=f"a multiple of {EVERY} (default: 1000)")
    parser.add_argument("--text", help="a text file (default: the standard library's sources)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/OPTIMIZER)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options = vars(parser.parse_args())
    out, resume = options.pop("out") or Path("runs", options["optimizer"]), options.pop("resume")
    if options["steps"] < EVERY or options["steps"] % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}, not {options['steps']}")
    if not resume and out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty. Go on with its run by --resume, or give another folder by --out.")
    file = out / "options.json"  # says which run the folder is of
    begun = json.loads(file.read_text()) if file.exists() else "no run"
    if resume and begun != options:
        sys.exit(f"Cannot go on with {out}: it holds {begun}, not {options}. Give the options it was begun with.")
    return argparse.Namespace(**options), out


def train(args, model, training, validation, checkpoints):
    """Parameters, and a row an evaluation: step, mean training loss since the last one, validation loss."""
    make, best, options = OPTIMIZERS[args.optimizer]
    peak, warmup = args.lr or best, min(100, args.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps, end_value=peak / 10)
    matrices = {"mask": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)}  # norms do not decay
    tx = make(rate, **{"weight_decay": 0.1, **matrices, **options})
    loss_fn = loss_of(model)
    grad_fn = fo.value_and_grad(loss_fn) if args.optimizer in CURVATURE else jax.value_and_grad(loss_fn)

    @jax.jit
    def update(params, opt_state, key):
        first = jax.random.randint(key, (BATCH,), 0, len(training) - model.context)
        value, grads, *statistics = grad_fn(params, training, first)
        extra = {"statistics": statistics[0]} if statistics else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, value

    key, evaluate = jax.random.key(0), jax.jit(loss_fn)
    spread = jnp.linspace(0, len(validation) - model.context - 1, 320).astype(int)  # where 320 windows begin
    params = jax.jit(model.init)(key, jnp.zeros((1, model.context), int))["params"]
    state = params, tx.init(params), np.zeros((args.steps // EVERY, 3))  # all that a run needs to go on
    if done := checkpoints.latest_step() or 0:
        state = checkpoints.restore(done, args=ocp.args.StandardRestore(jax.tree.map(np.asarray, state)))
    (params, opt_state, rows), losses = state, []
    for step in (bar := tqdm(range(done, args.steps), initial=done, total=args.steps, unit="step")):
        params, opt_state, value = update(params, opt_state, jax.random.fold_in(key, step))
        losses.append(float(value))
        if (step + 1) % EVERY == 0:
            rows[step // EVERY] = step + 1, np.mean(losses), evaluate(params, validation, spread)
            bar.set_description(f"validation loss {rows[step // EVERY, 2]:.3f}")
            checkpoints.save(step + 1, args=ocp.args.StandardSave((params, opt_state, rows)))
            losses = []
    return params, rows


def main():
    args, out = parse_options()
    tokens, characters = read_text(args.text)
    training, validation = jnp.split(jnp.asarray(tokens), [len(tokens) * 9 // 10])
    out.mkdir(parents=True, exist_ok=True)
    (out / "options.json").write_text(json.dumps(vars(args)))
    model = GPT(len(characters))
    print(f"{args.optimizer} on {len(tokens):,} characters, {len(characters)} symbols; into {out}")
    with ocp.CheckpointManager(out.absolute() / "checkpoints", options=KEEP_ONE) as checkpoints:
        params, rows = train(args, model, training, validation, checkpoints)
    axes = (figure := Figure(layout="constrained")).subplots()
    axes.plot(rows[:, 0], rows[:, 1:], ".-", label=("training, mean since the last point", "validation"))
    axes.set(xlabel="step", ylabel="loss, nats per character", title=args.optimizer)
    axes.legend()
    figure.savefig(out / "loss.png")
    written = generate(model, params, tokens[: model.context], 300, jax.random.key(1))
    print("".join(characters[token] for token in written))
    print(f"validation loss {rows[-1, 2]:.3f}; loss curve in {out / 'loss.png'}")


if __name__ == "__main__":
    main()

"""What the GPT example is made of: the model and the text."""

import argparse
import doctest
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text
from experiments.models import gpt


def small_gpt(**changes: Any) -> tuple[gpt.GPT, Any, jax.Array]:
    model = gpt.GPT(**{"vocabulary": 11, "context": 8, "layers": 2, "width": 16, "heads": 2, **changes})
    tokens = jnp.arange(8)[None] % 11
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], tokens


def test_a_position_sees_itself_and_the_past_only() -> None:
    model, params, tokens = small_gpt()
    logits = jax.jit(model.apply)({"params": params}, jnp.concatenate([tokens, tokens.at[0, 5].set(10)]))
    changed = np.any(np.asarray(logits[0]) != np.asarray(logits[1]), axis=-1)
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_every_parameter_is_trained_and_the_head_is_the_embedding() -> None:
    model, params, tokens = small_gpt()
    grads = jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, tokens)).sum()))(params)
    assert all(np.any(np.asarray(grad)) for grad in jax.tree.leaves(grads))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert shapes == {(11, 16), (8, 16), (16,), (16, 48), (16, 16), (16, 64), (64, 16)}


def test_bfloat16_changes_the_computation_but_not_the_parameters() -> None:
    (model, params, tokens), (half, half_params, _) = small_gpt(), small_gpt(dtype=jnp.dtype("bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, params, half_params)
    logits, half_logits = (jax.jit(m.apply)({"params": params}, tokens) for m in (model, half))
    assert half_logits.dtype == jnp.float32
    difference = np.linalg.norm(logits - half_logits) / np.linalg.norm(logits)
    assert 1e-4 < difference < 2e-2


def test_dropout_acts_in_training_only() -> None:
    model, params, tokens = small_gpt(dropout=0.5)
    apply = jax.jit(model.apply, static_argnames="train")
    outputs = [apply({"params": params}, tokens, train=True, rngs={"dropout": jax.random.key(i)}) for i in range(2)]
    assert not np.allclose(*outputs)
    without = jax.jit(small_gpt()[0].apply)({"params": params}, tokens)
    np.testing.assert_array_equal(apply({"params": params}, tokens), without)


# --- the text


def test_rare_characters_share_one_symbol() -> None:
    characters = text.symbols_of("bbbaaaccd\n", vocabulary=3)
    assert characters == "abc" + text.UNKNOWN
    tokens, unknown = text.tokens_of("bbbaaaccd\n", characters)
    assert (tokens.tolist(), unknown) == ([1, 1, 1, 0, 0, 0, 2, 2, 3, 3], 2)
    assert text.symbols_of("ba\n", vocabulary=3) == "\nab"


def test_a_text_is_read_in_the_symbols_of_another(tmp_path: Path) -> None:
    """What has none shares the last or, where there is no such, is dropped, and then counts for no length."""
    data = tmp_path / "text.txt"
    data.write_text("ab~" * 100)
    shared = text.load_corpus(str(data), 96, 16, "\nab" + text.UNKNOWN)
    assert (shared.characters, shared.unknown) == ("\nab" + text.UNKNOWN, 100)
    assert np.concatenate([shared.train, shared.validation]).tolist() == [1, 2, 3] * 100
    dropped = text.load_corpus(str(data), 96, 16, "\nab")
    assert (len(dropped.train), len(dropped.validation), dropped.unknown) == (180, 20, 100)
    with pytest.raises(ValueError, match=r"has 100 characters of the given symbols, but .* 170 are needed"):
        text.load_corpus(str(data), 96, 16, "a")


def test_a_corpus_is_the_whole_text_in_order(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    corpus = text.load_corpus(str(data), vocabulary=96, context=16)
    assert corpus.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (len(corpus.train), len(corpus.validation)) == (27_000, 3_000)
    assert corpus.decode(np.concatenate([corpus.train, corpus.validation])) == data.read_text(encoding="utf-8")


def test_the_default_text_is_the_standard_library() -> None:
    corpus = text.load_corpus("stdlib", vocabulary=96, context=64)
    assert len(corpus.train) + len(corpus.validation) == text.STDLIB_CHARACTERS
    assert len(corpus.characters) == 97
    assert Path(argparse.__file__).read_text(encoding="utf-8") in corpus.decode(corpus.train)


def test_a_folder_is_its_text_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, content in {"b.txt": "2", "a.md": "1", "inner/c.py": "3", "picture.png": "\0"}.items():
        (tmp_path / name).write_text(content * 300)
    assert text.read_text(str(tmp_path)) == "1" * 300 + "2" * 300 + "3" * 300


@pytest.fixture
def shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the file at its public home, with its checksum, and an empty home and data folder."""
    path = tmp_path / "public" / "input.txt"
    path.parent.mkdir()
    path.write_text("To be, or not to be\n" * 50)
    monkeypatch.setattr(text, "SHAKESPEARE_URL", path.as_uri())
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FISHER_OPTAX_DATA", str(tmp_path / "data"))
    return path


def test_shakespeare_is_downloaded_once_then_found(shakespeare: Path, tmp_path: Path) -> None:
    wanted = shakespeare.read_text()
    assert text.read_text("shakespeare") == wanted
    shakespeare.unlink()
    assert text.read_text("shakespeare") == wanted
    assert text.read_text(str(tmp_path / "data")) == wanted  # a folder that holds it stands for it
    assert os.listdir(tmp_path / "data") == [text.SHAKESPEARE_FILE]


def test_a_wrong_download_is_refused_and_not_kept(shakespeare: Path, tmp_path: Path) -> None:
    shakespeare.write_text("404")
    with pytest.raises(ValueError, match=r"not the known text.*SHA-256"):
        text.read_text("shakespeare")
    assert os.listdir(tmp_path / "data") == []


def test_offline_says_where_to_put_the_text(shakespeare: Path) -> None:
    shakespeare.unlink()
    advice = r"could not be downloaded .* name the file with --data, or its folder with \$FISHER_OPTAX_DATA"
    with pytest.raises(OSError, match=advice):
        text.read_text("shakespeare")


def test_the_docstring_experiment_runs() -> None:
    result = doctest.testmod(gpt)
    assert result.attempted > 0
    assert result.failed == 0

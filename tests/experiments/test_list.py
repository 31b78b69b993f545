"""`python -m experiments` lists every program among the experiments, in a line each."""

import pytest

from experiments import __main__ as listing


def test_every_program_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split()[0] for line in lines]
    assert names == [*listing.summaries()]
    assert {"train_gpt", "train_images", "compare_optimizers", "lm_head", "fisher_gallery"} < set(names)
    assert not {"loop", "options", "__main__"} & set(names)
    assert all(len(line.split()) > 5 and line.endswith(".") for line in lines)

"""How workers share the tests: what shares compiled programs goes to one of them, and what takes long comes first."""

from fnmatch import fnmatchcase

from xdist.scheduler import LoadScopeScheduling

# Longest first, so that the workers end together.
LONGEST = (
    "test_default_compilation.py",
    "experiments/test_*.py",
    "test_examples.py",
    "laws/*.py",
    "fisher/test_estimators_agree.py",
    "preconditioner/test_rounding.py",
    "optimizers/test_sharding.py",
    "matrices/test_axes_*.py",
    "matrices/test_statistics_axes.py",
    "optimizers/test_shampoo.py",
    "documents/test_docstrings.py",
)


def rank(path: str) -> int:
    """The place of a file below `tests` in the order."""
    return next((i for i, pattern in enumerate(LONGEST) if fnmatchcase(path, pattern)), len(LONGEST))


def share(nodeid: str) -> str:
    """A test's group: its file. Of the laws, all of one optimizer, whose programs and run they share."""
    path, _, name = nodeid.partition("::")
    case = name.partition("[")[2].rstrip("]")
    return f"laws of {case.partition('-')[0]}" if "/laws/" in path and case else path


class Shares(LoadScopeScheduling):
    """A group at a time, as they come."""

    def _split_scope(self, nodeid: str) -> str:
        return share(nodeid)

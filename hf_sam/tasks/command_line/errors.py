"""Report user errors as one readable line instead of a traceback."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Packages whose import name differs from the name they are installed by.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
USUAL_EXTRA = "recipes"  # contains everything that any subcommand needs


class UserError(Exception):
    """An error the user can fix; the message names the field, the allowed values and the fix."""


class FolderInUseError(UserError):
    """Another run is using `output_dir`."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says how far the run got and how to resume it."""


def instead_of(path: Path, names: Sequence[str]) -> str:
    """
    Return a sentence that suggests one of `names`, the files next to `path`: the most similar one, ignoring suffixes,
    otherwise the first ones. Empty if there are none.
    """
    by_stem = {Path(name).stem: name for name in names}
    if near := difflib.get_close_matches(path.stem, by_stem, n=1):
        return f" Did you mean {by_stem[near[0]]!r}?"
    where = "The current folder" if path.parent.resolve() == Path.cwd() else str(path.parent)
    return f" {where} contains: {', '.join(names[:10])}." if names else ""


@contextmanager
def as_user_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn exceptions of these types, raised by other code about the user's values, into a `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(prefix + one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line; for an error in a DataLoader worker, only the original message."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(text.split()) or type(error).__name__


def run(main: Callable[[], object]) -> None:
    """
    Run a recipe's `main` as a program.

    The first process prints these as one line:

    - a `UserError`, or a `ValueError` raised by hf_sam about its configuration (exit code 2);
    - a missing package of an extra (exit code 2);
    - Ctrl-C (exit code 130).

    A run that has already finished is not an error. Anything else is a bug and keeps its traceback.
    """
    is_first = int(os.environ.get("LOCAL_RANK", "0")) <= 0
    try:
        main()
    except KeyboardInterrupt as error:
        if is_first:
            print(f"\n{one_line(error) if str(error) else 'Interrupted.'}", file=sys.stderr)
        sys.exit(130)
    except (UserError, ValueError) as error:
        if not isinstance(error, UserError) and not _raised_by_hf_sam(error):
            raise
        if is_first:
            print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `hf-sam ... | head`; discard the rest, or Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        remedy = how_to_install(error.name or "")
        if not remedy:
            raise
        if is_first:
            print(f"error: {error.name.split('.')[0]} is not installed: {remedy}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "RunFinishedError":  # by name: its module takes seconds to import
            raise
        if is_first:
            print(one_line(error))


def how_to_install(module: str) -> str:
    """Return the command that installs a missing module, or an empty string if it is not in the package's metadata."""
    from importlib.metadata import PackageNotFoundError, requires

    name = module.split(".")[0]
    name = DISTRIBUTIONS.get(name, name).replace("_", "-").lower()
    try:
        requirements = requires("hf-sam") or []
    except PackageNotFoundError:  # run from a folder, never installed
        return ""
    extras = [
        extra[1] if (extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)) else None
        for requirement in requirements
        if re.match(r"[\w.-]+", requirement)[0].replace("_", "-").lower() == name
    ]
    if not extras:
        return ""
    if None in extras:
        return f"pip install {name}"
    return f"pip install 'hf-sam[{USUAL_EXTRA if USUAL_EXTRA in extras else extras[0]}]'"


def _raised_by_hf_sam(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(sys.modules["hf_sam"].__file__).parent if "hf_sam" in sys.modules else None
    if trace is None or package is None:
        return False
    where = Path(trace.tb_frame.f_code.co_filename).parents
    return package in where and package / "tasks" not in where  # tasks raise a `UserError` for user errors

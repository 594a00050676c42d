"""The command ``python -m dynamics.analyze`` in the process of the tests, which has imported everything already."""

from __future__ import annotations

from subprocess import CompletedProcess
from typing import Any

from typer.testing import CliRunner

from dynamics.analyze import app


def analyze(*arguments: Any) -> CompletedProcess[str]:
    """Return the exit status and what was written; an exception other than ``SystemExit`` is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def assert_refused(result: CompletedProcess[str], status: int, *words: str) -> None:
    """A line on stderr has the words; there is no traceback."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert any(all(word in line for word in words) for line in result.stderr.splitlines()), result.stderr

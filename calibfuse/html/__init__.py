"""What every HTML page is made of: templates with one look, tables, charts."""

from __future__ import annotations

import importlib
from typing import Any

from calibfuse.errors import MissingDependencyError


def require(package: str) -> Any:  # noqa: ANN401
    """Import a package of the extra `eval`; commands call this first, so that no work is lost for want of one.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"Pages and charts need the package {package}: pip install 'calibfuse[eval]'."
        ) from error

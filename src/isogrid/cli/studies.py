"""Options that some studies take and others don't."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from isogrid.errors import IsogridError


def study_options(name: str, study: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options that were given those to pass on.

    Args:
        name: the study's name.
        study: the function that runs it.
        given: all options; empty ones were not given.

    Raises:
        IsogridError: the study takes no such option.
    """
    wanted = {key: value for key, value in given.items() if value is not None and value is not False}
    known = inspect.signature(study).parameters
    for key in wanted:
        if key not in known:
            option = "--" + {"methods": "method", "ranks": "rank"}.get(key, key)
            raise IsogridError(f"study {name!r} has no {option}; leave it out")
    return wanted

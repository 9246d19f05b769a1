"""From words to formats: the registry by name, descriptions in JSON, and labels such as ``monarch(blocks=8)``."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from isogrid.errors import IsogridError
from isogrid.formats.aliases import ALIASES, from_alias
from isogrid.formats.base import REGISTRY, Format


def registered() -> dict[str, type[Format]]:
    """All known formats by name, in order of registration."""
    return dict(REGISTRY)


def format_class(name: str) -> type[Format]:
    """The format registered under a name.

    Raises:
        IsogridError: unknown name; the message suggests near ones.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if name == "auto":
        raise IsogridError("'auto' is every layer's choice of formats: give it alone, or name the formats")
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*REGISTRY, *ALIASES], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(REGISTRY)}"
    raise IsogridError(f"unknown format {name!r}; {hint}")


def format_from_dict(description: Mapping[str, Any]) -> Format:
    """The format that `Format.to_dict` described, or that an alias names (`aliases.ALIASES`).

    Raises:
        IsogridError: unknown name or hyper-parameter.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("name"), str):
        raise IsogridError(f"a format is described by a JSON object with a name, got {description!r}")
    given = {key: _from_json(value) for key, value in description.items() if key != "name"}
    if description["name"] in ALIASES:
        return from_alias(description["name"], given)
    cls = format_class(description["name"])
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise IsogridError(
            f"format {cls.name!r} has no {unknown[0]!r}; it has: {', '.join(sorted(known)) or 'nothing'}"
        )
    try:
        return cls(**given)
    except TypeError as error:
        raise IsogridError(f"format {cls.name!r}: a hyper-parameter has a value of the wrong kind ({error})") from None


def as_format(value: Format | str | Mapping[str, Any]) -> Format:
    """A format from itself, from its description, or from its name or label.

    Labels nest as Python calls do: ``"monarch"``, ``"monarch(blocks=8)"``, ``"capped(inner=low_rank(rank=4))"``,
    ``"block_tensor_train(out_factors=[4, 7])"``. They are read, never run. Names of the literature are read too:
    ``"block_shuffle(blocks=4)"`` is ``Monarch(4)``.

    Raises:
        IsogridError: not a format; the message says what is wrong.
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, Mapping):
        return format_from_dict(value)
    if isinstance(value, type) and issubclass(value, Format):
        raise IsogridError(f"{value.__name__} is the class of a format; pass {value.__name__}()")
    if not isinstance(value, str):
        raise IsogridError(f"a format is a Format, a name or a description, got {type(value).__name__}")
    text = value.strip()
    if "(" not in text:
        return format_from_dict({"name": text})
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        raise IsogridError(f"format {value!r}: not of the form name(key=value, …); check its brackets") from None
    if not isinstance(call, ast.Call):
        raise IsogridError(f"format {value!r}: not of the form name(key=value, …)")
    return format_from_dict(_described(call, value))


def _described(call: ast.Call, text: str) -> dict[str, Any]:
    """The description that a label's call spells."""
    if not isinstance(call.func, ast.Name):
        raise IsogridError(f"format {text!r}: {ast.unparse(call.func)!r} is not the name of a format")
    if call.args:
        raise IsogridError(f"format {text!r}: {ast.unparse(call.args[0])!r} is not key=value")
    return {"name": call.func.id} | {str(word.arg): _spelled(word.value, text) for word in call.keywords}


def _spelled(node: ast.expr, text: str) -> Any:
    """A hyper-parameter's value: a number, true, false, null, a word, a list of these, or a format."""
    if isinstance(node, ast.Call):
        return _described(node, text)
    if isinstance(node, ast.List | ast.Tuple):
        return [_spelled(item, text) for item in node.elts]
    if isinstance(node, ast.Name):
        if node.id in REGISTRY or node.id in ALIASES:
            return {"name": node.id}
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise IsogridError(f"format {text!r}: {ast.unparse(node)!r} is not a value") from None


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return format_from_dict(value)
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return value

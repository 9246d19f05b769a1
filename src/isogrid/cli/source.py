"""Models and calibration data as the command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isogrid.errors import IsogridError


def open_model(name: str, *, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer or None) of a folder, an embedded name or a hub name; in eval mode.

    Raises:
        IsogridError: none of the three; the message says what was tried.
    """
    import torch

    from isogrid.data import PRETRAINED, load_pretrained
    from isogrid.data.pretrained import quiet_transformers

    wanted = None if dtype is None else _dtype(dtype)
    if name in PRETRAINED:
        return load_pretrained(name, dtype=wanted or torch.float32)
    folder = Path(name)
    options: dict[str, Any] = {} if wanted is None else {"dtype": wanted}
    with quiet_transformers():
        if folder.is_dir():
            import isogrid.data.saliency  # noqa: F401  its checkpoints carry an architecture of their own
            from isogrid.checkpoint import load

            model: Any = load(folder, **options)
            return model.eval(), _tokenizer(str(folder))
        if folder.exists() or name.startswith((".", "/")):
            raise IsogridError(f"{name} is no checkpoint folder")
        return _from_hub(name, options)


def _from_hub(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    from isogrid.data import PRETRAINED

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise IsogridError(
            f"model {name!r} is no folder, none of the embedded models ({', '.join(PRETRAINED)}), and the hub did not "
            f"give it: {str(error).splitlines()[0]}"
        ) from None
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return cls.from_pretrained(name, **options).eval(), _tokenizer(name)


def _tokenizer(name: str) -> Any:
    import transformers

    if Path(name).is_dir() and not any(
        (Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def _dtype(name: str) -> Any:
    import torch

    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if name not in known:
        raise IsogridError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def widest_dtype(model: Any) -> Any:
    """The widest dtype of a model's numbers: what bytes of new factors are counted in."""
    return max({value.dtype for value in model.parameters()}, key=lambda dtype: dtype.itemsize)

"""The verbs of the command line; each is a thin layer over the library."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from isogrid.errors import IsogridError, IsogridWarning

app = typer.Typer(
    name="isogrid",
    help="Structured matrices for efficient deep learning: compress, evaluate and inspect models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
notes = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a hub name, or smollm2-135m, minilm, vit-s-saliency.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]
Quick = Annotated[bool, typer.Option(help="Less data, for a first look.")]
Data = Annotated[Path | None, typer.Option("--data", help="Where data sets are looked up first.")]


def main() -> None:
    """Run the command; bad input ends with one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except IsogridError as error:
        notes.print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk: the system's words are clear
        notes.print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        notes.print("interrupted; nothing was written")
        sys.exit(130)


def _plain(value: object) -> str:
    from rich.markup import escape

    return escape(str(value))


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, IsogridWarning):
        notes.print(f"[bold yellow]warning:[/] {_plain(message)}", soft_wrap=True, highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from isogrid import __version__

        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured matrices for efficient deep learning: compress, evaluate and inspect models."""


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the compressed model; an earlier one there is replaced.")],
    format: Annotated[str, typer.Option(help="A format: low_rank_light, monarch, 'monarch(blocks=8)', …")] = (
        "low_rank_light"
    ),
    keep: Annotated[float, typer.Option(help="Fraction of the selected parameters to keep, in (0, 1).")] = 0.6,
    calibrate: Annotated[
        str | None, typer.Option(help="Calibration: wikitext2:calibration, pydoc, sts:train, photographs, a text file.")
    ] = None,
    anchor: Annotated[
        float,
        typer.Option(
            help="0: each layer keeps its matrix; 1: it aims at the original model's outputs. With --calibrate."
        ),
    ] = 0.0,
    allocate: Annotated[
        str, typer.Option(help="uniform: every layer the same share; global: one budget, spent by sensitivity.")
    ] = "uniform",
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows of --length tokens; an encoder takes 8 paragraphs for each.")
    ] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    select: Annotated[list[str] | None, typer.Option(help="Layers to rewrite: q_proj, '*.mlp.*'; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    export: Annotated[str, typer.Option(help="structured, or dense: multiply the factors out again.")] = "structured",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model's matrices in a format and save it in Hugging Face form."""
    from isogrid import compress as compress_model
    from isogrid.checkpoint import check_place, save
    from isogrid.cli.source import calibration_data, open_model
    from isogrid.compress import allocate_uniform, as_batches, estimate_seconds, select_layers
    from isogrid.evaluation import peak_memory_bytes
    from isogrid.formats import as_format
    from isogrid.report import format_bytes, format_duration, progress, write_json

    if export not in ("structured", "dense"):
        raise IsogridError(f"--export is structured or dense, got {export!r}")
    fmt = as_format(format)
    check_place(out)  # before the work, not after it
    if Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise IsogridError(f"--out {out} is the model itself; give another folder")
    loaded, tokenizer = open_model(model, dtype=dtype)
    layers = select_layers(loaded, select, skip or ())
    sized = allocate_uniform(layers, fmt, keep)
    calibration: Any = None
    tokens = 0
    if calibrate is not None and calibrate.endswith(":evaluation"):
        warnings.warn(
            f"{calibrate} is what evaluate measures on; its figures will flatter", IsogridWarning, stacklevel=1
        )
    if calibrate is not None:
        windows = min(windows, 4) if quick else windows
        found = calibration_data(calibrate, loaded, tokenizer, windows=windows, length=length, data_dir=data)
        calibration = as_batches(found, tokenizer, length)
        # A sentence or an image patch row counts for about 32 tokens: good enough for an estimate.
        tokens = 32 * len(found) if isinstance(found, list) or found.ndim != 2 else found.numel()
    estimate = estimate_seconds(layers, sized, calibration_tokens=tokens)
    notes.print(f"{len(layers)} layers as {fmt.label()}; about {format_duration(estimate)}", highlight=False)
    begun = time.perf_counter()
    with progress("Compressing", len(layers)) as step:
        report = compress_model(
            loaded,
            fmt,
            keep=keep,
            calibration=calibration,
            select=select,
            skip=skip or (),
            anchor=anchor,
            allocate=allocate,
            seed=seed,
            on_layer=lambda layer: step(layer.name),
        )
    if calibrate is not None:
        report.calibration = f"{calibrate}, {report.calibration}"
    save(loaded, out, tokenizer=tokenizer, dense=export == "dense")
    if export == "dense":  # the factors are multiplied out again: the file is as large as the dense model's
        report.model_bytes, report.model_parameters = report.dense_model_bytes, report.dense_model_parameters
    seconds, peak = time.perf_counter() - begun, peak_memory_bytes()
    described = report.to_dict() | {"model": model, "command": _command(), "peak_memory": peak, "estimate": estimate}
    write_json(described, out / "compression.json")
    if as_json:
        console.print_json(json.dumps(described, default=str))
        return
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(
        f"requested keep {report.requested_keep:g}, achieved {report.achieved_keep:.4f}; tensors on disk "
        f"{format_bytes(report.model_bytes)} ({report.model_bytes} bytes); with saving {format_duration(seconds)}; "
        f"peak memory {format_bytes(peak)}",
        highlight=False,
        soft_wrap=True,
    )
    if calibrate is None:
        console.print("plain fits; --calibrate pydoc usually gives a much better model", soft_wrap=True)
    console.print(f"written to {out}; next: isogrid evaluate {out}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    metric: Annotated[str, typer.Option(help="auto, perplexity, sts or heatmap.")] = "auto",
    text: Annotated[str, typer.Option(help="Text for the perplexity.")] = "wikitext2:evaluation",
    windows: Annotated[int, typer.Option(min=0, help="Windows of --length tokens; 0: all.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    data: Data = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, Spearman correlation on STS-B dev, or fidelity of heat maps to the dense model's."""
    from isogrid.cli.source import is_language_model, is_saliency_model, open_model
    from isogrid.data import DatasetNotFoundError, load_photographs, load_pretrained, load_sts, load_text, token_windows
    from isogrid.evaluation import heatmap_fidelity, perplexity, sts_spearman
    from isogrid.report import progress

    loaded, tokenizer = open_model(model)
    if metric == "auto":
        metric = "heatmap" if is_saliency_model(loaded) else "perplexity" if is_language_model(loaded) else "sts"
    if metric in ("perplexity", "sts") and tokenizer is None:
        raise IsogridError(f"{model} has no tokenizer beside it, which {metric} needs; save one there")
    if metric == "perplexity" and not is_language_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} predicts no tokens; --metric perplexity takes a language model")
    if metric == "heatmap" and not is_saliency_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} draws no heat maps; --metric heatmap takes vit-s-saliency")
    begun = time.perf_counter()
    result: dict[str, Any]
    if metric == "perplexity":
        limit = 4 if quick else windows or None
        ids = token_windows(tokenizer, load_text(text, data), length, limit)
        with progress("Evaluating", -(-len(ids) // 4)) as step:
            found = perplexity(loaded, ids, progress=step)
        result = {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens, "text": text}
    elif metric == "sts":
        pairs = load_sts("dev", data)
        result = {"spearman": sts_spearman(loaded, tokenizer, pairs), "pairs": len(pairs.scores)}
    elif metric == "heatmap":
        reference, _ = load_pretrained("vit-s-saliency")
        try:  # other pictures than `--calibrate photographs` takes
            name, images = "Kodak", load_photographs("kodak", data_dir=data)
        except DatasetNotFoundError:
            name, images = "scikit-image, the calibration photographs", load_photographs()
        fidelity = heatmap_fidelity(loaded, reference, images)
        result = {"heatmap_fidelity": fidelity, "images": f"{len(images)} {name}"}
    else:
        raise IsogridError(f"metric {metric!r} is not one of auto, perplexity, sts, heatmap")
    result = {"model": model, "metric": metric, **result, "seconds": time.perf_counter() - begun}
    if as_json:
        console.print_json(json.dumps(result))
    else:
        console.print(
            ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
            ),
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """List a model's linear layers: sizes, format, parameters, and what compress would take."""
    from isogrid.cli.source import open_model
    from isogrid.compress import count_parameters, select_layers, stored_bytes, structured_layers
    from isogrid.linear import is_linear
    from isogrid.report import format_bytes, format_count

    loaded, _ = open_model(model)
    structured = structured_layers(loaded)
    try:
        selected = set(select_layers(loaded))
    except IsogridError:
        selected = set()
    rows = []
    for name, module in loaded.named_modules():
        if name in structured:
            layer = structured[name]
            dense = layer.in_features * layer.out_features
            rows.append(
                (name, layer.out_features, layer.in_features, layer.format.label(), layer.cost().parameters, dense)
            )
        elif is_linear(module):
            out_features, in_features = _shape(module)
            label = "dense" if name in selected else "dense (left alone)"
            rows.append(
                (name, out_features, in_features, label, out_features * in_features, out_features * in_features)
            )
    if as_json:
        keys = ("name", "out", "in", "format", "parameters", "dense_parameters")
        console.print_json(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    table = Table(title=f"{type(loaded).__name__}: {model}", title_justify="left")
    for heading in ("layer", "out", "in", "format"):
        table.add_column(heading, justify="right" if heading in ("out", "in") else "left", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("kept", justify="right")
    for name, out_features, in_features, label, parameters, dense in rows:
        table.add_row(
            name,
            str(out_features),
            str(in_features),
            _plain(label),
            format_count(parameters),
            f"{parameters / dense:.3f}",
        )
    console.print(table)
    console.print(
        f"{format_count(count_parameters(loaded))} parameters, {format_bytes(stored_bytes(loaded))}; "
        f"{len(structured)} structured layers, {len(selected)} dense layers that compress would take"
    )


def _shape(module: Any) -> tuple[int, int]:
    from isogrid.linear import linear_matrix

    rows, columns = linear_matrix(module).shape
    return rows, columns


@app.command()
def formats(
    name: Annotated[
        str | None, typer.Argument(help="Show one in detail: a name, or a label such as 'monarch(blocks=8)'.")
    ] = None,
    out_features: Annotated[int, typer.Option("--out-features", min=1)] = 768,
    in_features: Annotated[int, typer.Option("--in-features", min=1)] = 768,
    keep: Annotated[float, typer.Option(help="Budget of the shown members.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures of the blocks, NAME.png each.")] = None,
    as_json: Json = False,
) -> None:
    """List the formats, or show one: what it is, what its fit guarantees, its largest member within a budget."""
    from isogrid.cli.formats import describe, detail_page, draw, try_small_anatomy
    from isogrid.formats import as_format, registered

    shown = [as_format(name)] if name is not None else [cls() for cls in registered().values()]
    listed = [describe(fmt, out_features, in_features, keep) for fmt in shown]
    if name is not None:
        listed[0]["anatomy"] = try_small_anatomy(shown[0], out_features, in_features, keep, 16)
    if out is not None:
        for fmt, entry in zip(shown, listed, strict=True):
            small = try_small_anatomy(fmt, out_features, in_features, keep, 24)
            entry["picture"] = None if small is None else str(draw(small, out))
    if as_json:
        console.print_json(json.dumps(listed if name is None else listed[0]))
        return
    if name is not None:
        console.print(_plain(detail_page(listed[0], console.width)), highlight=False, soft_wrap=True)
    elif out is None:
        console.print(_format_table(listed, out_features, in_features, keep))
    if out is not None:
        for entry in listed:
            drawn = "not drawn" if entry["picture"] is None else entry["picture"]
            console.print(f"{entry['name']}: {drawn}", highlight=False, soft_wrap=True)


def _format_table(listed: list[dict[str, Any]], out_features: int, in_features: int, keep: float) -> Table:
    table = Table(title=f"Formats; members within {keep:g} of {out_features} x {in_features}", title_justify="left")
    for heading in ("format", "what it is", "member", "kept"):
        table.add_column(heading, no_wrap=heading in ("format", "kept"), overflow="fold")
    for entry in listed:
        share = "-" if entry["kept"] is None else f"{entry['kept']:.3f}"
        table.add_row(
            str(entry["name"]), _plain(str(entry["summary"]).replace("``", "")), _plain(entry["member"]), share
        )
    return table


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("demo"),
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows, and evaluation windows, of 512 tokens.")
    ] = 16,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Compress the embedded language model in every format and write a report: the main job, end to end."""
    from isogrid.report import console_table
    from isogrid.studies.demo import run_demo

    def say(message: str) -> None:
        notes.print(_plain(message), highlight=False, soft_wrap=True)

    result = run_demo(out, windows=windows, quick=quick, seed=seed, data_dir=data, command=_command(), say=say)
    if as_json:
        from isogrid.report import read_json

        console.print_json(json.dumps(read_json(out / "data.json"), default=str))
        return
    console.print(console_table(result))
    console.print(f"report: {out / 'report.html'}; models: {out / 'models'}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with data.json, or a model that compress wrote.")],
) -> None:
    """Draw the report page and pictures of a table, or of one compressed model, from its stored numbers."""
    from isogrid.report import read_json, write_report

    if (folder / "data.json").is_file():
        written = write_report(read_json(folder / "data.json"), folder)
    elif (folder / "compression.json").is_file():
        from isogrid.studies.rows import page_of_compression

        page = folder.with_name(folder.name + "-report")  # beside the model: a checkpoint folder holds nothing else

        written = write_report(page_of_compression(read_json(folder / "compression.json")), page)
    else:
        raise IsogridError(f"{folder} has neither data.json nor compression.json; give a folder that a command wrote")
    console.print(f"report: {written['report.html']}", highlight=False, soft_wrap=True)


@app.command()
def study(
    name: Annotated[
        str, typer.Argument(help="image_compression, random_projection, sentence_encoder or solver_quality.")
    ],
    out: Annotated[Path | None, typer.Option(help="Default: results/study/NAME.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Run one reproducible experiment and write its table."""
    from isogrid.report import console_table
    from isogrid.studies import STUDIES

    if name not in STUDIES:
        raise IsogridError(f"study {name!r} is unknown; there are: {', '.join(STUDIES)}")

    def say(message: str) -> None:
        notes.print(_plain(message), highlight=False, soft_wrap=True)

    target = out or Path("results/study") / name
    result = STUDIES[name](target, quick=quick, seed=seed, data_dir=data, command=_command(), say=say)
    for table in [result] if "rows" in result else result.values():  # one table, or several by name
        if "dense" in table:
            console.print(console_table(table))
        else:
            console.print((target / "table.md").read_text(), highlight=False, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this installation has: versions, threads, embedded models, data sets."""
    import importlib.metadata

    from isogrid import __version__
    from isogrid.data import DATASETS, PRETRAINED, find_dataset
    from isogrid.report import describe_machine

    found: dict[str, Any] = describe_machine(__version__)
    for package in ("transformers", "safetensors", "accelerate", "matplotlib", "jinja2", "gguf", "datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    for name, source in PRETRAINED.items():
        try:
            found[f"model {name}"] = f"{source.package} {importlib.metadata.version(source.package)}"
        except importlib.metadata.PackageNotFoundError:
            found[f"model {name}"] = f"not installed: {source.install}"
    for name in DATASETS:
        try:
            found[f"data {name}"] = str(find_dataset(name))
        except IsogridError:
            found[f"data {name}"] = "not found"
    if as_json:
        console.print_json(json.dumps(found))
        return
    table = Table(show_header=False, title="isogrid doctor", title_justify="left")
    for key, value in found.items():
        table.add_row(key, str(value))
    console.print(table)


def _command() -> str:
    """The command line as the user would type it again."""
    import shlex

    return shlex.join(["isogrid", *sys.argv[1:]])

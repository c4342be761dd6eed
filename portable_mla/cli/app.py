"""The commands, as typer sees them: options in, a report and an exit code out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from portable_mla.cli import estimate as estimating
from portable_mla.cli import explain as explaining
from portable_mla.cli.demo import Demo, DemoOptions
from portable_mla.cli.doctor import diagnose
from portable_mla.cli.figures import Figures
from portable_mla.cli.hf_demo import run_hf
from portable_mla.cli.report import FAILED, clear_refusals, show, show_json
from portable_mla.core.arch import ARCHS
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase
from portable_mla.dispatch.registry import BACKENDS
from portable_mla.dispatch.select import Explanation
from portable_mla.models import MODELS
from portable_mla.settings import Settings

app = typer.Typer(
    help="Multi-head Latent Attention on every GPU that serves it: what this machine has, what serves a request and "
    "why, and a replay of real traffic.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def at_least(least: int) -> Callable[[int | None], int | None]:
    """An option's callback that refuses smaller values."""

    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise typer.BadParameter(f"expected at least {least}, got {value}")
        return value

    return check


POSITIVE = at_least(1)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SPARSE = ", ".join(name for name, model in MODELS.items() if model.why_not_served)
ModelName = Annotated[
    str, typer.Option("--model", help=f"One of {', '.join(MODELS)}. With --dense alone, as sparse: {SPARSE}.")
]
Dense = Annotated[
    bool,
    typer.Option("--dense", help="Dense attention of a sparse model: exact while its top keys are the whole context."),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tp",
        callback=POSITIVE,
        help="Ranks that share the heads.  "
        f"[default: the most, up to {explaining.MAX_DEFAULT_RANKS}, that divide the model's]",
    ),
]
PageSize = Annotated[int, typer.Option(callback=POSITIVE, help="Tokens of a cache page.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(explaining.DTYPES)}.")]
BackendName = Annotated[
    str | None, typer.Option("--backend", help=f"Ask only this one: {', '.join(BACKENDS)}; never falls back.")
]


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Versions, packages, devices, backends, settings, and what serves here. Exits 1 if no device is served."""
    diagnosis = diagnose()
    if as_json:
        show_json(diagnosis.as_json())
    else:
        show(*diagnosis.sections())
    if not diagnosis.served:
        raise typer.Exit(FAILED)


@app.command()
def explain(  # noqa: PLR0913 (one parameter an option)
    *,
    arch: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(ARCHS)}.  [default: this machine's best device]")
    ] = None,
    model: ModelName = explaining.DEFAULT_MODEL,
    dense: Dense = False,
    tensor_parallel: TensorParallel = None,
    heads: Annotated[
        int | None, typer.Option(callback=POSITIVE, help="Heads of one rank, in place of the model's divided by --tp.")
    ] = None,
    page_size: PageSize = 64,
    query_len: Annotated[int, typer.Option(callback=POSITIVE, help="Most query tokens of a request in a step.")] = 1,
    ragged: Annotated[bool, typer.Option("--ragged", help="Query lengths differ between requests.")] = False,
    dtype: Dtype = "bf16",
    cache_format: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(f.name for f in CacheFormat)}.  [default: that of --dtype]")
    ] = None,
    batch: Annotated[int, typer.Option(callback=POSITIVE, help="Most requests in a step.")] = 128,
    context: Annotated[int, typer.Option(callback=POSITIVE, help="Most tokens of a request.")] = 4096,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="A row's bits must not depend on the rest of the batch.")
    ] = False,
    backend: BackendName = None,
    estimated: Annotated[
        bool, typer.Option("--estimate", help="Model the decode's time; a model, not a measurement.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Which backend serves the decode and the prefill of a model on any architecture, and why not the others. A prefill
    has --batch prompts of up to --context tokens. Exits 1 if nothing serves the decode, or the model is sparse."""
    question = explaining.Question(
        arch=arch,
        model=model,
        tensor_parallel=tensor_parallel,
        heads=heads,
        page_size=page_size,
        dtype=dtype,
        cache_format=cache_format,
        query_len=query_len,
        ragged=ragged,
        batch=batch,
        context=context,
        deterministic=deterministic,
        dense=dense,
    )
    with clear_refusals(as_json=as_json):
        explanation, prefill = (
            explaining.answer(replace(question, phase=phase).request(), Settings.from_env(), backend) for phase in Phase
        )
        chosen = explanation.chosen if estimated else None
        time = None if chosen is None else estimating.estimate(explanation.request, chosen)
    _show_answer(question.note(), explanation, prefill, time, as_json=as_json)
    if explanation.chosen is None:
        if not as_json:
            print("NoBackend: no backend can serve this request", file=sys.stderr)
        raise typer.Exit(FAILED)


@app.command()
def demo(  # noqa: PLR0913 (one parameter an option)
    *,
    model: ModelName = explaining.DEFAULT_MODEL,
    dense: Dense = False,
    tensor_parallel: TensorParallel = None,
    page_size: PageSize = 64,
    dtype: Dtype = "bf16",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="CSV with arrival_ms, input_tokens, output_tokens.  [default: Azure conversations, 2023]",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: the best here]")] = None,
    backend: BackendName = None,
    concurrency: Annotated[int | None, typer.Option(callback=POSITIVE, help="Most requests at once.")] = None,
    layers: Annotated[int | None, typer.Option(callback=POSITIVE, help="Layers of attention in a step.")] = None,
    steps: Annotated[int | None, typer.Option(callback=POSITIVE, help="Most decode steps.")] = None,
    pages: Annotated[int | None, typer.Option(callback=POSITIVE, help="Pages in the pool.")] = None,
    seed: Annotated[int, typer.Option(callback=at_least(0), help="Of the random data.")] = 0,
    hf: Annotated[
        bool,
        typer.Option(
            "--hf",
            help="Instead: a small DeepSeek-V3 of transformers, its attention against ours; --device and --seed.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replay a serving trace with continuous batching, measure it and check it. Exits 1 on a wrong result."""
    if hf:
        _compare_hf(device, seed, as_json=as_json)
        return
    options = DemoOptions(
        model, tensor_parallel, page_size, dtype, trace, device, backend, concurrency, layers, steps, pages, seed, dense
    )
    with clear_refusals(as_json=as_json):
        ready = Demo(options)
    explanation = ready.loop.attention.explanation
    if not as_json:
        show(ready.section(), explaining.as_section(explanation))
    figures = _replay(ready, quiet=as_json)
    if as_json:
        facts = ready.facts() | {"dispatch": explaining.as_json(explanation)}
        show_json(facts | figures.values())
    else:
        show(*figures.sections())
    if not figures.passed:
        for wrong in figures.mismatches:
            print(f"mismatch with the reference: {wrong}", file=sys.stderr)
        if not figures.pages_returned:
            print("pages: some were not returned to the pool", file=sys.stderr)
        raise typer.Exit(FAILED)


def _show_answer(
    note: str | None,
    explanation: Explanation,
    prefill: Explanation,
    time: estimating.Estimate | None,
    *,
    as_json: bool,
) -> None:
    if as_json:
        values = explaining.as_json(explanation) | {"prefill": explaining.as_json(prefill), "note": note}
        show_json(values | ({} if time is None else {"estimate": estimating.as_json(time)}))
    else:
        sections = explaining.as_section(explanation), explaining.as_section(prefill)
        notes = [] if note is None else [explaining.note_section(note)]
        show(*notes, *sections, *([] if time is None else [estimating.as_section(time)]))


def _compare_hf(device: str | None, seed: int, *, as_json: bool) -> None:
    with clear_refusals(as_json=as_json):
        figures = run_hf(device, seed)
    if as_json:
        show_json(figures.facts | {"passed": figures.passed})
    else:
        show(figures.section())
    if not figures.passed:
        raise typer.Exit(FAILED)


def _replay(ready: Demo, *, quiet: bool) -> Figures:
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("decode steps", total=ready.steps)
        return ready.run(lambda: progress.advance(task))

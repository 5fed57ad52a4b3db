"""Commands: what they take, what they print, and how they fail."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import catalog
from ..extras import needs, shortened

app = typer.Typer(no_args_is_help=True, help="See where a transformer looks.", pretty_exceptions_enable=False)
papers_app = typer.Typer(invoke_without_command=True, help="The papers whose methods Regard makes runnable.")
app.add_typer(papers_app, name="papers")
gaze_app = typer.Typer(no_args_is_help=True, help="Models beside human gaze.")
app.add_typer(gaze_app, name="gaze")

out, err = Console(), Console(stderr=True)


def _starting(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell completes a word to."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _of(room: str) -> Callable[[str], list[str]]:
    return _starting(lambda: catalog.methods(room))


_paper, _claim = _starting(catalog.rows), _starting(catalog.claimed)

Model = Annotated[str, typer.Argument(help="A zoo model, a local folder, or a hub id.")]
TextToRead = Annotated[str | None, typer.Option("--text", "-t", help="The text to read.")]
TextFile = Annotated[Path | None, typer.Option("--file", "-f", help="A UTF-8 file to read.")]
Picture = Annotated[Path | None, typer.Option("--image", "-i", help="A picture to look at.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut the text to the positions that the model has.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the model. Only where you trust it.")]


@contextmanager
def _plainly() -> Iterator[None]:
    """Errors that a user can act on as one message, without a traceback; exit status 2."""
    try:
        yield
    except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            message = error.strerror
        err.print(f"[bold red]error:[/] {escape(_quoting_little(str(message)))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _quoting_little(message: str) -> str:
    """The message with what was given on the command line shortened: a text may stand where a name belongs."""
    for given in sys.argv[1:]:
        for form in (given, repr(given)[1:-1]):  # as an error may quote it
            if len(form) > len(short := shortened(form)):
                message = message.replace(form, short)
    return message


def _model(name: str, trust_remote_code: bool) -> None:
    """What every command says and does before it runs a model."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours shows what takes time
    if trust_remote_code:
        err.print(f"[bold yellow]warning:[/] running code that comes with {escape(name)}")


@app.command()
def look(
    model: Model = "reader",
    text: Annotated[str | None, typer.Option("--text", "-t", help="The text to read, or to paint.")] = None,
    file: TextFile = None,
    image: Picture = None,
    audio: Annotated[Path | None, typer.Option("--audio", "-a", help="A WAV file to listen to.")] = None,
    generate: Annotated[int, typer.Option("--generate", "-g", min=0, help="Tokens to generate after the input.")] = 0,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for recording.zarr and report.html.")] = Path(
        "regard-look"
    ),
    truncate: Truncate = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Record where MODEL looks, and write a recording and a report."""
    from . import look as work

    _model(model, trust_remote_code)
    with _plainly():
        seen = work.look(
            model,
            text=text,
            file=file,
            image=image,
            audio=audio,
            generate=generate,
            out=folder,
            truncate=truncate,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    for table in seen.tables:
        out.print(table)
    for observation in seen.observations:
        out.print(f" • {escape(observation.text)}", highlight=False)
    if seen.said is not None:
        out.print(f"\nsaid       {escape(seen.said.strip())}", highlight=False, soft_wrap=True)
    out.print(f"\nrecording  {seen.recording}\nreport     {seen.report}", highlight=False, soft_wrap=True)
    if seen.picture:
        out.print(f"picture    {seen.picture}", highlight=False, soft_wrap=True)
    if seen.partial:
        err.print("[bold yellow]interrupted:[/] what was recorded until then is saved, and says that it is partial")
        raise typer.Exit(130)


@app.command()
def studio(
    model: Annotated[
        str | None, typer.Argument(help="A zoo model, a local folder, or a hub id; reader unless given.")
    ] = None,
    models: Annotated[Path | None, typer.Option("--models", help="A folder of further models to choose from.")] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder in which recordings are kept.")] = Path(
        "regard-studio"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; any that is free unless given.")] = 0,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. Anything but 127.0.0.1 lets other machines in: whoever has the printed address "
            "can run models on this one, and the connection is not encrypted."
        ),
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Serve the studio, a page to look, point and try, on this machine alone."""
    _model(model or "reader", False)
    with _plainly():
        with needs("the studio", "studio"):
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
        from ..studio import serve

        if host not in ("127.0.0.1", "localhost", "::1"):
            err.print(f"[bold yellow]warning:[/] other machines can reach this studio at {escape(host)}, unencrypted")
        out.print("The studio runs until you press Ctrl-C. Open")
        serve(
            model,
            folder=folder,
            models=models,
            port=port,
            host=host,
            browser=browser,
            told=lambda address: out.print(address, highlight=False, soft_wrap=True),
        )


@app.command(epilog=f"Interventions: {', '.join(catalog.methods('interventions'))}.")
def steer(
    model: Annotated[str | None, typer.Argument(help="A zoo model, a local folder, or a hub id.")] = None,
    given: Annotated[
        Path | None,
        typer.Argument(help="What to read, see or hear: a text, a picture or a WAV file, by its name's end."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            "-w",
            help="An intervention, such as var; may be given several times.",
            autocompletion=_of("interventions"),
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", "-l", help="Say which interventions fit MODEL, and why others do not; or all.")
    ] = False,
    knob: Annotated[
        list[str] | None, typer.Option("--knob", "-k", help="NAME=VALUE, or METHOD.NAME=VALUE for one of several.")
    ] = None,
    text: TextToRead = None,
    file: TextFile = None,
    image: Picture = None,
    audio: Annotated[Path | None, typer.Option("--audio", "-a", help="A WAV file to listen to.")] = None,
    truth: Annotated[str | None, typer.Option(help="What is said in the sound, to count words that are wrong.")] = None,
    generate: Annotated[int, typer.Option("--generate", "-g", min=1, help="Tokens to generate at most.")] = 32,
    truncate: Truncate = False,
    place: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="A page (.html) with both beside each other; of a model that paints, also a folder."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What MODEL says without and with interventions, side by side, and the time that a token takes.

    Of a model that paints, such as painter: pictures of each line of the text, before and after, in a folder or a page.
    """
    if model is not None:
        _model(model, trust_remote_code)
    with _plainly():
        if listed:
            from . import fits

            shown = fits.listing(model, methods or (), trust_remote_code=trust_remote_code, progress=err)
        else:
            from . import steer as work
            from .inputs import InputError, placed

            if model is None:
                raise InputError("name a model, such as describer; or --list, for all interventions")
            given_as = placed(given, {"file": file, "image": image, "audio": audio})
            shown = work.steer(
                model,
                methods or (),
                knobs=knob or (),
                text=text,
                **given_as,
                truth=truth,
                generate=generate,
                truncate=truncate,
                out=place,
                trust_remote_code=trust_remote_code,
                console=out,
            )
    out.print(shown)


@app.command(epilog=f"Statistics: {', '.join(catalog.statistics())}.")
def profile(
    model: Model,
    data: Annotated[
        Path, typer.Argument(help="A .txt, .jsonl, .csv or .parquet file, a folder of texts or pictures, a data set.")
    ],
    stat: Annotated[
        list[str],
        typer.Option(
            "--stat",
            "-s",
            help="A statistic; may be given several times.",
            autocompletion=_starting(catalog.statistics),
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="The zarr folder to write.")] = Path("profile.zarr"),
    field: Annotated[str | None, typer.Option(help="The column to read.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read or lack the column, and count them.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Items at most.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of an item at most; the rest is cut, and counted.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Asked about each picture, of a model that reads too.")] = None,
    exemplars: Annotated[int, typer.Option(help="Highest and lowest items to keep for each head.")] = 5,
    batch: Annotated[int, typer.Option(help="Items a batch at most.")] = 64,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a batch at most, with padding.")] = 4096,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Actors of Ray Data.")] = 2,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run each batch plainly, and print the ratio.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Summaries of statistics over DATA for every head of MODEL. Goes on where it was stopped."""
    from . import profile as work

    _model(model, trust_remote_code)
    with _plainly():
        try:
            taken = work.profile(
                model,
                data,
                stat,
                out=folder,
                trust_remote_code=trust_remote_code,
                console=out,
                field=field,
                skip_bad=skip_bad,
                limit=limit,
                length=length,
                prompt=prompt,
                exemplars=exemplars,
                batch=batch,
                batch_tokens=batch_tokens,
                engine=engine,
                workers=workers,
                compare=compare,
            )
        except KeyboardInterrupt:
            err.print(
                f"[bold yellow]interrupted:[/] every batch that was done is kept in {escape(str(folder))}.state; "
                f"give the same command again to go on from there",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    taken.to(out)
    out.print(f"\nprofile    {folder}", highlight=False, soft_wrap=True)


@app.command()
def atlas(
    model: Model = "reader",
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture to look at; generated scenes otherwise.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for atlas.zarr and atlas.html.")] = Path(
        "regard-atlas"
    ),
    threshold: Annotated[
        list[str] | None, typer.Option("--threshold", help="The least that counts, such as induction=0.3.")
    ] = None,
    seed: int = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say of every head of MODEL what it does."""
    from . import atlas as work

    _model(model, trust_remote_code)
    with _plainly():
        recording, page = work.run(
            model,
            out=folder,
            pictures=image or (),
            thresholds=_thresholds(threshold or ()),
            seed=seed,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    out.print(f"\nrecording  {recording}\nreport     {page}", highlight=False, soft_wrap=True)


@app.command()
def circuits(
    model: Model = "reader",
    task: Annotated[
        str,
        typer.Option(
            "--task",
            "-t",
            help="ioi, greater_than, docstring or induction; or a JSONL file of prompts, each with the texts clean, "
            "corrupted (of as many tokens), answer and wrong (what follows, with the blank before it), and, of a model "
            "that sees, the paths image and corrupted_image.",
        ),
    ] = "ioi",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="What ranks heads, of the room circuits; patching each head's output unless given.",
            autocompletion=_of("circuits"),
        ),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", "-n", min=2, help="Prompts to draw, of a named task.")] = 16,
    heads: Annotated[int, typer.Option(min=1, help="Heads that the pictures show.")] = 8,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures and circuit.json.")] = Path(
        "regard-circuits"
    ),
    seed: int = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the heads of MODEL that do a task: a graph, faithfulness against size, where each acts."""
    from . import circuits as work

    _model(model, trust_remote_code)
    with _plainly():
        printed, paths = work.run(
            model,
            task=task,
            method=method,
            prompts=prompts,
            heads=heads,
            out=folder,
            seed=seed,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    printed.to(out)
    for path in paths:
        out.print(f"{path.stem:<14}{path}", highlight=False, soft_wrap=True)


@app.command()
def features(
    model: Annotated[str, typer.Argument(help="A zoo model, a local folder, or a hub id; one that reads text.")],
    data: Annotated[
        Path, typer.Argument(help="A text file, .jsonl, .csv, .parquet, or a folder of texts; the more the better.")
    ],
    layer: Annotated[int, typer.Option("--layer", "-l", min=0, help="Whose heads' outputs are taken apart.")] = 0,
    field: Annotated[str | None, typer.Option(help="The column of a table that holds the text.")] = None,
    number: Annotated[
        int | None, typer.Option("--features", "-n", min=1, help="How many; 32 for each dimension unless given.")
    ] = None,
    sparsity: Annotated[
        float, typer.Option(min=0.0, help="What a feature costs: the more, the fewer there are at a token.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training, of 256 tokens.")] = 1000,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a row of text.")] = 128,
    shown: Annotated[int, typer.Option(min=1, help="Features that the page shows.")] = 20,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for sae/, which SAELens reads, features.html and features.json.")
    ] = Path("regard-features"),
    seed: int = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a sparse autoencoder on what the heads of a layer of MODEL write on DATA, and show its features."""
    from . import features as work

    _model(model, trust_remote_code)
    with _plainly():
        printed, paths = work.run(
            model,
            layer=layer,
            data=data,
            field=field,
            features=number,
            sparsity=sparsity,
            steps=steps,
            length=length,
            shown=shown,
            out=folder,
            seed=seed,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    printed.to(out)
    for path in paths:
        out.print(f"{path.name:<16}{path}", highlight=False, soft_wrap=True)


@app.command(epilog=f"Methods: {', '.join(catalog.methods('attribution'))}.")
def explain(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="The text to read; twice, to compare two.")
    ] = None,
    file: TextFile = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture to look at; twice, to compare two.")
    ] = None,
    audio: Annotated[Path | None, typer.Option("--audio", "-a", help="A WAV file to listen to.")] = None,
    written: Annotated[
        str | None, typer.Option(help="What a model with an encoder has written so far; scored as well.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="A class, by name or number, or a token; the model's own prediction otherwise.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", "--not", help="Another: why the target, and not this.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="How to find out.", autocompletion=_of("attribution"))
    ] = "integrated_gradients",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a method that takes some: fewer are faster, and coarser.")
    ] = None,
    words: Annotated[bool, typer.Option("--words", "-w", help="Join sub-words, and add their scores.")] = False,
    in_words: Annotated[
        bool, typer.Option("--in-words", help="Say in sentences what matters; joins sub-words.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Check the map: what it takes away, what moves it; beside maps by chance.")
    ] = False,
    file_out: Annotated[Path, typer.Option("--out", "-o", help="A page (.html) or a picture (.png).")] = Path(
        "regard-explain.html"
    ),
    truncate: Truncate = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which words or pixels a prediction of MODEL rests on."""
    from . import explain as work

    _model(model, trust_remote_code)
    with _plainly():
        found = work.explain(
            model,
            texts=text or (),
            file=file,
            images=image or (),
            audio=audio,
            written=written,
            target=target,
            against=against,
            method=method,
            steps=steps,
            words=words,
            in_words=in_words,
            judged=judge,
            out=file_out,
            truncate=truncate,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    out.print(escape(found.said), highlight=False)
    for table in found.tables:
        out.print(table)
    for sentence in found.sentences:
        out.print(escape(sentence), highlight=False)
    for note in found.notes:
        out.print(f"[yellow]{escape(note)}", highlight=False)
    out.print(f"\nexplained  {found.file}", highlight=False, soft_wrap=True)


def _thresholds(options: Iterable[str]) -> dict[str, float]:
    found = {}
    for option in options:
        name, _, number = option.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--threshold {option}: write a score and a number, such as induction=0.3") from None
    return found


Columns = Annotated[
    list[str] | None,
    typer.Option("--column", "-c", help="ROLE=NAME of a column of yours, such as x=CURRENT_FIX_X; several times."),
]
Screen = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels of what x and y are in.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="COLUMN=VALUE of the rows that count; several times.")]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--read", "-r", help="NAME=VALUE, another argument of regard.gaze.read, such as units=degrees; several times."
    ),
]
Stimuli = Annotated[Path | None, typer.Option("--stimuli", help="The folder of the pictures.")]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Leave broken rows out, and list them.")]
Json = Annotated[Path | None, typer.Option("--json", help="A file for all numbers.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="A .png or .svg file for the picture.")]
OnScreen = typer.Option(help="How pictures stood on the screen: centre, fit, fill, or left,top,right,bottom.")


@gaze_app.command("read")
def gaze_read(
    data: Annotated[Path, typer.Argument(help="A table, an .asc, a folder of them, or a set that Regard knows.")],
    column: Columns = None,
    screen: Screen = None,
    only: Only = None,
    more: More = None,
    stimuli: Stimuli = None,
    keep_going: KeepGoing = False,
    table: Annotated[Path | None, typer.Option("--out", "-o", help="A new CSV file of all fixations.")] = None,
) -> None:
    """Say how DATA are understood: columns, units, broken rows."""
    from . import gaze as work

    with _plainly():
        told = work.reading(column, screen, only, more, stimuli, keep_going)
        said = work.read(data, told, table)
    said.to(out)


@gaze_app.command("score")
def gaze_score(
    a: Annotated[Path, typer.Argument(help="Scanpaths of people or of a model.")],
    b: Annotated[Path, typer.Argument(help="Those they are compared with, on the same pictures.")],
    column: Columns = None,
    screen: Screen = None,
    only: Only = None,
    more: More = None,
    keep_going: KeepGoing = False,
    same_people: Annotated[
        bool | None,
        typer.Option("--same-people/--different-people", help="Whether a name in both is one person."),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Only this one; several times.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to compare at most, between and within groups.")] = 20_000,
    resamples: Annotated[int, typer.Option(min=0, help="Draws of people, and permutations.")] = 1000,
    kept: Json = None,
    plot: Plot = None,
    seed: int = 0,
) -> None:
    """How alike A and B look at the same pictures, by all metrics, beside people among themselves."""
    from . import gaze as work

    with _plainly():
        told = work.reading(column, screen, only, more, None, keep_going)
        compared = work.score(
            a,
            b,
            told,
            same_people=same_people,
            metrics=metric,
            pairs=pairs,
            resamples=resamples,
            seed=seed,
            out=kept,
            plot=plot,
            console=out,
        )
    compared.to(out)


@gaze_app.command("compare")
def gaze_compare(
    model: Model,
    data: Annotated[Path, typer.Argument(help="The folder of WebQAmGaze; or fixations on pictures, as `read` takes.")],
    task: Annotated[str, typer.Option(help="reading, or search: the question was shown before the text.")] = "reading",
    language: Annotated[str, typer.Option(help="Of the files, as in words_en.csv.")] = "en",
    corpus: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 file that tells how frequent words are; the texts themselves otherwise."),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Draws of texts, and rotations, for intervals and chance.")
    ] = 1000,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Of words: a zarr folder for all numbers.")] = None,
    column: Columns = None,
    screen: Screen = None,
    only: Only = None,
    more: More = None,
    stimuli: Stimuli = None,
    placed: Annotated[str | None, OnScreen] = None,
    keep_going: KeepGoing = False,
    kept: Json = None,
    plot: Plot = None,
    seed: int = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What MODEL attends to, beside how long people looked at each word, or where they looked on pictures."""
    from . import gaze as work

    _model(model, trust_remote_code)
    with _plainly():
        told = work.reading(column, screen, only, more, stimuli, keep_going)
        compared = work.compare(
            model,
            data,
            task=task,
            language=language,
            corpus=corpus,
            resamples=resamples,
            out=folder,
            seed=seed,
            trust_remote_code=trust_remote_code,
            console=out,
            told=told,
            placed=placed,
            kept=kept,
            plot=plot,
        )
    compared.to(out)


@gaze_app.command("scan")
def gaze_scan(
    model: Annotated[str, typer.Argument(help="A zoo model, a local folder, or a hub id; one that sees.")],
    picture: Annotated[Path, typer.Argument(help="The picture to look over.")],
    about: Annotated[
        str | None, typer.Option("--for", help="What is looked for, in words; of models that read too, such as CLIP.")
    ] = None,
    like: Annotated[Path | None, typer.Option(help="What is looked for, as a picture.")] = None,
    fixations: Annotated[int, typer.Option("--fixations", "-n", min=1, help="How many.")] = 10,
    iterations: Annotated[int, typer.Option(min=1, help="Steps to find each; fewer are faster.")] = 20,
    speed: Annotated[float, typer.Option(min=0.01, help="Of what moves; 2 is twice as fast.")] = 1.0,
    file_out: Annotated[
        Path, typer.Option("--out", "-o", help=".png and .svg show all at once, .gif and .html one after another.")
    ] = Path("regard-scan.html"),
    table: Annotated[Path | None, typer.Option(help="A new CSV file of the fixations.")] = None,
    screen: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of the screen that the table is of; the picture's own otherwise.")
    ] = None,
    placed: Annotated[str | None, OnScreen] = None,
    seed: int = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Where MODEL looks in PICTURE, one fixation after another; drawn."""
    from . import gaze as work

    _model(model, trust_remote_code)
    with _plainly():
        scanned = work.scan(
            model,
            picture,
            about=about,
            like=like,
            fixations=fixations,
            iterations=iterations,
            speed=speed,
            seed=seed,
            out=file_out,
            table=table,
            screen=screen,
            placed=placed,
            trust_remote_code=trust_remote_code,
            console=out,
        )
    scanned.to(out)


@papers_app.callback()
def papers(
    context: typer.Context,
    tag: Annotated[
        list[str] | None,
        typer.Option(
            "--tag",
            help="Only papers with this tag, and with all of several.",
            autocompletion=_starting(catalog.tags),
        ),
    ] = None,
    verdict: Annotated[
        str | None, typer.Option(help="Only papers whose claim, when last run here, came out so: held, ...")
    ] = None,
    premise: Annotated[
        str | None, typer.Option(help="Only papers whose premises, when last measured here, were: met, unmet.")
    ] = None,
    parity: Annotated[str | None, typer.Option(help="Only papers whose parity with their authors' code is so.")] = None,
) -> None:
    """List all papers, by room."""
    if context.invoked_subcommand is None:
        with _plainly():
            found = catalog.chosen(catalog.tagged(*(tag or ())), verdict=verdict, premise=premise, parity=parity)
            for name in tag or ():
                _about(name)
            _list(sorted(found, key=lambda row: row.room))


def _about(tag: str) -> None:
    """What a tag means, whose it is, and which heads are of it."""
    out.print(f"[bold]{tag}[/]: {escape(catalog.tags()[tag])}", highlight=False)
    for survey, heading in catalog.surveys(tag):
        out.print(f"  {escape(heading)}, of {survey}: `regard papers show {survey}`", highlight=False)
    if kinds := catalog.heads(tag):
        out.print(f"  heads: {', '.join(kinds)}: `regard atlas MODEL` finds them", highlight=False)


@papers_app.command("tags")
def papers_tags() -> None:
    """The tags, what they mean, how many papers carry each, and the kinds of heads of it that the atlas finds."""
    table = Table(box=None, header_style="bold")
    for name in ("tag", "papers", "meaning", "heads"):
        table.add_column(name, justify="right" if name == "papers" else "left", no_wrap=name == "tag")
    for tag, meaning in catalog.tags().items():
        table.add_row(tag, str(len(catalog.tagged(tag))), meaning, ", ".join(catalog.heads(tag)))
    out.print(table)


@papers_app.command("search")
def papers_search(words: Annotated[list[str], typer.Argument(help="All of them must occur.")]) -> None:
    """Find papers by words in their title, summary or tags."""
    found = catalog.search(" ".join(words))
    if not found:
        err.print(f"no paper holds all of: {escape(' '.join(words))}")
        raise typer.Exit(1)
    _list(found)


@papers_app.command("show")
def papers_show(key: Annotated[str, typer.Argument(autocompletion=_paper)]) -> None:
    """One paper: what it says, what is built of it, what its claim found."""
    with _plainly():
        row = catalog.row(key)
    table = Table.grid(padding=(0, 2))
    for name in ("title", "link", "room", "about", "works", "expects"):
        table.add_row(f"[bold]{name}", escape(getattr(row, name)) or "not established")
    table.add_row("[bold]tags", ", ".join(row.tags))
    if key in catalog.taxonomies():
        for heading, tagging in catalog.taxonomy(key).items():
            counts = ", ".join(f"{tag} ({len(of)})" for tag, of in tagging.items())
            table.add_row("", f"{heading}: {counts or 'no paper here'}")
    table.add_row("[bold]object", row.object or "not built")
    table.add_row("[bold]status", row.status)
    table.add_row("[bold]parity", escape(row.parity))
    for run in row.found:
        table.add_row(f"[bold]{run.scale}", _verdict(run.finding))
        for premise in run.finding.premises:
            table.add_row("", f"premise: {escape(str(premise))}")
        table.add_row("", escape(run.finding.measured))
    out.print(table)


def _verdict(finding: Any) -> str:
    colour = {True: "green", False: "red", None: "yellow"}[finding.holds]
    return f"[bold {colour}]{finding.verdict}[/], seed {finding.seed}, {finding.seconds:.1f} s of processor time"


@app.command()
def reproduce(
    keys: Annotated[list[str] | None, typer.Argument(help="Papers, by key.", autocompletion=_claim)] = None,
    every: Annotated[bool, typer.Option("--all", help="Every claim there is.")] = False,
    scale: Annotated[
        str,
        typer.Option(
            help="small: two minutes on two cores; real: pretrained models and public data, from the folders that "
            "REGARD_MODELS and REGARD_DATA name, or models from the hub; large: more of it."
        ),
    ] = "small",
    seed: int = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="A picture file (svg, png) to draw what was measured into; of several, a folder."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Of several: run only those that did not run here at this scale and seed.")
    ] = False,
) -> None:
    """Run papers' claims here, and say whether they held."""
    from . import claims

    with _plainly():
        if bool(keys) == every:
            raise ValueError("name papers, or give --all: `regard papers` lists them")
        having = [key for key in catalog.claimed() if scale in catalog.row(key).scales]
        chosen = having if every else [catalog.row(key).key for key in keys or []]
        if every or len(chosen) > 1 or (plot is not None and plot.is_dir()):
            found = claims.reproduce(chosen, plot, scale=scale, seed=seed, resume=resume, console=out)
            raise typer.Exit(0 if len(found) == len(chosen) else 1)
        finding = catalog.reproduce(chosen[0], scale=scale, seed=seed, plot=plot)
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]claimed", escape(finding.expected))
    for premise in finding.premises:
        table.add_row("[bold]premise", escape(str(premise)))
    table.add_row("[bold]measured", escape(finding.measured))
    table.add_row("[bold]verdict", _verdict(finding))
    out.print(table)


@app.command()
def compare(
    keys: Annotated[
        list[str] | None,
        typer.Option("--with", "-w", help="A mechanism, such as moba; may be given several times. Otherwise all."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="language, recall, passkey, classify, localise, omniglot; may be given several times. Otherwise all.",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; 3 unless given.")] = None,
    scale: Annotated[
        str, typer.Option(help="tiny: seconds, nothing is learned; small: some seconds a training; large: minutes.")
    ] = "small",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    file_out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write, or to add to.")] = Path(
        "regard-compare.json"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="A picture file (svg, png): quality against cost, with the frontier.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="A Markdown page, of which the section is made anew.")] = None,
) -> None:
    """Train and measure mechanisms beside softmax attention and none. Goes on where it was stopped."""
    from . import compare as work

    with _plainly():
        try:
            compared = work.compare(
                keys or (),
                tasks or (),
                seeds=seeds,
                scale=scale,
                jobs=jobs,
                out=file_out,
                plot=plot,
                page=page,
                console=out,
            )
        except KeyboardInterrupt:
            err.print(
                f"[bold yellow]interrupted:[/] every run that was done is kept in {escape(str(file_out))}.state; give "
                f"the same command again to go on from there",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    compared.to(out)
    out.print(f"\ncompared   {file_out}", highlight=False, soft_wrap=True)
    if plot is not None:
        out.print(f"plot       {plot}", highlight=False, soft_wrap=True)


@app.command()
def convert(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="A mechanism that has a conversion, such as moh.")],
    steps: Annotated[int, typer.Option(min=0, help="Of training, after it was converted.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text to train on; its last tenth is held out. Without --steps, a paragraph will do."
        ),
    ] = None,
    knob: Annotated[
        list[str] | None, typer.Option("--knob", "-k", help="NAME=VALUE, of the conversion, such as shape=[8,8].")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the converted model.")] = None,
    seed: int = 0,
) -> None:
    """Put a mechanism into a trained MODEL, and say what that loses, before and after some training."""
    from . import convert as work

    _model(model, False)
    with _plainly():
        made = work.convert(model, to, steps=steps, data=data, knobs=knob or (), out=folder, seed=seed, console=out)
    made.to(out)


@app.command()
def zoo(name: Annotated[str | None, typer.Argument(help="Show the card of this model.")] = None) -> None:
    """List the trained models that ship with Regard, or show the card of one."""
    from rich.markdown import Markdown

    from .. import zoo as models

    with _plainly():
        if name is not None:
            out.print(Markdown(models.card(name)))
            return
        table = Table(box=None, header_style="bold")
        for column in ("name", "about", "MB"):
            table.add_column(column, no_wrap=column == "name", justify="right" if column == "MB" else "left")
        for model in models.names():
            about = models.card(model).split("\n\n")[1].replace("\n", " ")
            size = sum(p.stat().st_size for p in models.folder(model).rglob("*.safetensors")) / 1e6
            table.add_row(model, escape(re.split(r"(?<=[a-z])[.:;,] ", about)[0]), f"{size:.1f}")
    out.print(table)
    out.print("regard zoo NAME shows what a model can do, measured; regard look NAME runs it", highlight=False)


@app.command()
def info() -> None:
    """Versions, and which path computes statistics here."""
    from importlib.metadata import version

    from .. import library

    for name in ("regard", "torch", "transformers"):
        out.print(f"{name:14}{version(name)}", highlight=False)
    out.print(f"{'python':14}{sys.version.split()[0]}", highlight=False)
    out.print(f"{'statistics':14}{library.describe()}", highlight=False, markup=False)


def _list(rows: list) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("key", "room", "status", "title"):
        table.add_column(name, no_wrap=name != "title")
    for row in rows:
        table.add_row(row.key, row.room, row.status, escape(row.title))
    out.print(table)
    out.print(f"{len(rows)} papers, {sum(row.object != '' for row in rows)} built", highlight=False)

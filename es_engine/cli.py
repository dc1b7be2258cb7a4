"""The `es-engine` command: a thin layer over the Python interface."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from es_engine.config import Config, explain, load_comparison, load_config, load_task, task_kinds
from es_engine.text import discreet, duration, visible

if TYPE_CHECKING:
    from es_engine.scoring import Graded
    from es_engine.status import Status

app = typer.Typer(
    name="es-engine",
    help="Post-train language models without backprop: Evolution Strategies over LoRA subspaces on Ray and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
WIDEST = 10_000
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)

ConfigFile = Annotated[Path, typer.Argument(help="A YAML config.")]
RunDir = Annotated[Path, typer.Argument(help="A run folder.")]
RunsOrFolders = Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, e.g. method.population=64.")
]


@app.command()
def train(
    config: ConfigFile,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run goes; by default runs/NAME.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="End with a line of JSON, for `submit` to read.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model and leave a run folder."""
    chosen = load_config(config, overrides or [])  # first, so that a slip in it is told at once
    from es_engine.trainer import train as start

    if summary:
        from es_engine.submit import summary_line

        _say(summary_line(start(chosen, run_dir).summary))
    else:
        _show_end(start(chosen, run_dir).summary)


@app.command()
def submit(
    config: ConfigFile,
    address: Annotated[str, typer.Option(help="The cluster's job server, such as http://HEAD:8265.")],
    run_dir: Annotated[
        str | None, typer.Option(help="Where the run goes on the cluster's head; by default ~/runs/NAME.")
    ] = None,
    on_cluster: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A file or folder that every node has there; it is not sent."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log to the job's end, and end with its exit code.")] = True,
    overrides: Overrides = None,
) -> None:
    """Train on a Ray cluster: send a config and the files it names as a job."""
    chosen = load_config(config, overrides or [])
    from es_engine.submit import submit as send

    job = send(chosen, address, run_dir, on_cluster or [])
    _say(f"job: {job.id}")
    if not wait:
        return
    try:
        ending = job.follow(_say)
    except _Interrupted:
        _end(f"no longer following; the job goes on: ray job stop {job.id} --address {address} would end it", 130)
    if ending.summary is not None:
        _show_end(ending.summary)
    if ending.exit_code:
        why = f" ({ending.message})" if ending.message else ""
        _end(f"job {job.id} ended with exit code {ending.exit_code}{why}", ending.exit_code)


@app.command()
def resume(run: RunDir) -> None:
    """Go on with a run that was stopped, at whatever instant."""
    from es_engine.trainer import resume as go_on

    _show_end(go_on(run).summary)


@app.command()
def replay(
    run: RunDir,
    step: Annotated[int, typer.Option(help="Rebuild theta after this many steps.")],
    out: Annotated[Path | None, typer.Option(help="Where the adapter goes; by default RUN/replay/step-K.")] = None,
) -> None:
    """Rebuild an adapter from config and ledger alone, without a single rollout."""
    from es_engine.past import replay as rebuild

    _say(rebuild(run, step, out))


@app.command(name="eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder, an adapter folder, or a config (its base model).")],
    config: Annotated[Path | None, typer.Option(help="The config whose model and task an adapter is tried on.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Held-out problems; by default the config's.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions of each problem; by default the config's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature, 0 is greedy; by default the config's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the summary and the completions; by default evaluations/NAME, or NAME-2 if that is "
            "taken, and so on."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a base model, a run or an adapter on held-out problems."""
    from es_engine.run import evaluate as measure
    from es_engine.run_folder import make_first_free, refuse_no_place, refuse_taken, write_json_lines, write_text

    chosen, adapter = _evaluation_target(target, config, overrides or [])
    usual = Path("evaluations") / _name_of(target)
    if out is None:
        refuse_no_place(usual)
    else:
        refuse_taken(out)
    found = measure(chosen, adapter, problems=problems, samples=samples, temperature=temperature)
    folder = out or make_first_free(usual)
    drawn = chosen.evaluation.temperature if temperature is None else temperature
    summary = {"target": str(target), "temperature": drawn, **found.summary}
    write_json_lines(folder / "samples.jsonl", found.samples)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    _print_summary(summary)
    _say(f"completions: {folder / 'samples.jsonl'}")


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="A kind of task, such as countdown, or a YAML config.")],
    source: Annotated[Path, typer.Option("--in", help="JSON lines with prompt, completion and the row's fields.")],
    target: Annotated[Path, typer.Option("--out", help="Where the lines go, with their scores.")],
    overrides: Overrides = None,
) -> None:
    """Score completions of a file, in processes with deadlines, as a run would."""
    from es_engine.scoring import score_file

    _print_summary(score_file(load_task(task, overrides or []), source, target))


@app.command()
def tasks(
    show: Annotated[str | None, typer.Option(help="A kind of task, or a config: five problems, answered.")] = None,
    overrides: Overrides = None,
) -> None:
    """List the tasks, or show problems of one, each with a right and a wrong answer, if known, and their scores."""
    if show is None:
        if overrides:
            raise ValueError("--set: it goes with --show")
        table = Table("task", "what it is", box=None, pad_edge=False)
        for kind, model in task_kinds().items():
            table.add_row(kind, (model.__doc__ or "").splitlines()[0])
        _show(table)
        return
    from es_engine.scoring import graded

    chosen = load_task(show, overrides or [])
    for each in graded(chosen):
        _print_graded(each)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A YAML config of a comparison.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Where it goes; by default comparisons/NAME.")] = None,
    overrides: Overrides = None,
) -> None:
    """Compare methods at equal cost on one pool. Stopped at whatever instant, the same command goes on."""
    chosen = load_comparison(config, overrides or [])
    from es_engine.compare.runner import compare as run

    done = run(chosen, folder)
    _say(f"comparison: {done}\nreport: {done / 'report.html'}")


@app.command()
def diff(run_a: RunDir, run_b: RunDir) -> None:
    """Are two runs' ledgers equal, but for times and places? Exit code 0 if they are, 1 if not."""
    from es_engine.ledger import first_difference
    from es_engine.run_folder import RunFolder, refuse_ways_out

    for run in (run_a, run_b):
        refuse_ways_out(run)
    difference = first_difference(RunFolder(run_a).ledger_file, RunFolder(run_b).ledger_file)
    _say(difference or "the ledgers are equal")
    raise typer.Exit(1 if difference else 0)


@app.command()
def status(run: RunDir) -> None:
    """Where a run is: its state, step, figures, time left and last error."""
    from es_engine.status import read_status

    found = read_status(run)
    table = Table("figure", "value", box=None, pad_edge=False)
    for name, value in {**_status_row(found), "process": found.process or ""}.items():
        if value:
            table.add_row(name, _text(value))
    _show(table)


@app.command()
def runs(folders: RunsOrFolders) -> None:
    """A line for each run, as `status` tells it."""
    from es_engine.report import find_runs
    from es_engine.status import read_status

    found = find_runs(folders)
    if not found:
        raise ValueError(f"{folders[0]}: neither a run folder nor a folder of them")
    shared = Path(os.path.commonpath([run.absolute() for run in found]))  # which would take the columns' room
    rows = [{**_status_row(read_status(run)), "run": str(run.absolute().relative_to(shared.parent))} for run in found]
    table = Table(*(Column(name, overflow="fold") for name in rows[0]), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(_text, row.values()))
    _show(table)


@app.command()
def report(
    runs: RunsOrFolders,
    out: Annotated[
        Path | None, typer.Option(help="The file; by default RUN/report.html, of several runs ./report.html.")
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(help="What curves are drawn over first: generated, processed, flops, worker_seconds or steps."),
    ] = None,
    png: Annotated[bool, typer.Option(help="Every plot as a PNG too, into a folder beside the page.")] = True,
) -> None:
    """Write one page on one run or many: curves, samples, configs."""
    from es_engine.report import find_runs, group_runs, read_run, usual_title, write_report
    from es_engine.report.data import AXES
    from es_engine.run_folder import refuse_no_file

    if over is not None and over not in AXES:
        raise ValueError(f"--over: got {over}, accepted is {', '.join(AXES)}")
    for path in runs:
        if not find_runs([path]):
            raise ValueError(f"{path}: neither a run folder nor a folder of them")
    found = find_runs(runs)
    target = out or (found[0] / "report.html" if len(found) == 1 and found == runs else Path("report.html"))
    refuse_no_file(target)
    groups = group_runs([read_run(run) for run in found])
    write_report(target, groups, title=usual_title(groups), over=over, pngs=png)
    _say(target)


@app.command()
def watch(
    runs: RunsOrFolders,
    host: Annotated[str, typer.Option(help="The address to listen to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 is any free one.")] = 0,
) -> None:
    """Serve the report's page and keep it up to date while runs go on, until Ctrl-C."""
    from es_engine.report.watch import WatchServer

    with WatchServer(runs, host, port) as server:
        try:
            _say(f"watching at {server.url}")
            server.serve_forever()
        except _Interrupted:
            _say("stopped watching; the runs go on")


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    best: Annotated[bool, typer.Option(help="The best adapter by held-out reward, not the last.")] = False,
    merged: Annotated[bool, typer.Option(help="A whole model with the adapter folded in.")] = False,
) -> None:
    """Write a run's adapter as a PEFT folder, or merged as a whole model."""
    from es_engine.run import Run, copy_adapter, merge
    from workers.sources import local_model

    found = Run(run)
    adapter = found.folder.best if best else found.adapter
    if merged:
        merge(adapter, local_model(found.config), out)
    else:
        copy_adapter(adapter, out)
    _say(out)


@app.command(name="config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="A YAML config to resolve and print.")] = None,
    explained: Annotated[bool, typer.Option("--explain", help="What every field means and accepts.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print a config with every field resolved, or explain every field."""
    from es_engine.config import dump_config

    if explained == (config is not None):
        raise ValueError("config: give either a config to print or --explain")
    _say(explain() if config is None else dump_config(load_config(config, overrides or [])))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A YAML config, whose needs are looked at too.")] = None,
    overrides: Overrides = None,
) -> None:
    """What this machine has for a run, and what is missing. Exit code 1 if something needed is."""
    chosen = None if config is None else load_config(config, overrides or [])
    from es_engine.doctor import examine

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("what", "", "found", "remedy", box=None, pad_edge=False)
    checks = examine(chosen)
    for check in checks:
        status = Text(check.status, colours[check.status])
        table.add_row(_text(check.name), status, _text(check.detail), _text(check.remedy))
    _show(table)
    raise typer.Exit(1 if any(check.status == "fail" for check in checks) else 0)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""


def main() -> None:
    """Run the command line. Bad input ends with one sentence and exit code 2, an interrupt with 130."""
    for number in INTERRUPTS:
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():  # the libraries' progress bars would fill a log with half-drawn lines
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(variable, "1")
    try:
        app()
    except (_Interrupted, SystemError) as error:
        # The latter is what Ray makes of an interrupt that comes while it waits.
        if not isinstance(error, _Interrupted) and not isinstance(error.__cause__, _Interrupted):
            raise
        _end("interrupted; `es-engine resume RUN` goes on from here; a comparison goes on when it is begun again", 130)
    except ValueError as error:
        _end(str(error), 2)
    except OSError as error:
        if error.errno not in (*FULL, *NO_PLACE):
            raise
        hint = "; make room or give another place, then resume" if error.errno in FULL else ""
        _end(f"{error.filename or 'the run folder'}: {error.strerror}{hint}", 2)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    for number in INTERRUPTS:  # a second one ends the process at once
        signal.signal(number, signal.SIG_DFL)
    raise _Interrupted


def _end(sentence: str, code: int) -> NoReturn:
    _say(f"es-engine: {sentence}", err=True)
    sys.exit(code)


def _say(what: object, err: bool = False) -> None:
    """Print what may hold anybody's words."""
    typer.echo(visible(discreet(str(what))), err=err)


def _show(table: Table) -> None:
    """Print a table: as wide as it is, where it goes to no terminal."""
    Console(width=None if sys.stdout.isatty() else WIDEST).print(table)


def _text(words: str) -> Text:
    """Anybody's words in a table."""
    return Text(visible(discreet(words)))


def _evaluation_target(target: Path, config: Path | None, overrides: list[str]) -> tuple[Config, Path | None]:
    """The config and the adapter (None: the base model) that `eval` was asked for."""
    from es_engine.run import Run

    if target.is_file():
        if config is not None:
            raise ValueError("--config: only an adapter folder needs one")
        return load_config(target, overrides), None
    if (target / "config.yaml").is_file():
        run = Run(target)
        return load_config(config or run.folder.config_file, overrides), run.adapter
    if not (target / "adapter_config.json").is_file():
        raise ValueError(f"{target}: neither a run folder, nor a PEFT adapter, nor a config")
    if config is not None:
        return load_config(config, overrides), target
    beside = target.resolve().parent
    if not (beside / "config.yaml").is_file():
        raise ValueError("--config: an adapter outside a run folder needs the config whose model and task to use")
    return load_config(Run(beside).folder.config_file, overrides), target


def _name_of(target: Path) -> str:
    """What a run folder, an adapter folder or a config is called; an adapter in a run folder has the run's name too."""
    path = target.resolve()
    in_run = path.is_dir() and (path.parent / "config.yaml").is_file()
    return f"{path.parent.name}-{path.name}" if in_run else path.name.removesuffix(".yaml")


def _show_end(summary: dict[str, Any]) -> None:
    """The held-out figures before and after, and where everything is."""
    table = Table("held-out", "reward", "accuracy", "95% interval", box=None, pad_edge=False)
    for name in ("before", "after"):
        line = summary[name]
        table.add_row(name, _figure(line["reward"]), _figure(line["accuracy"]), _interval(line["accuracy_ci95"]))
    _show(table)
    run = summary["run"]
    _say(f"run: {run}\nadapter: {run}/adapter\nreport: {run}/report.html")


def _print_summary(summary: dict[str, object]) -> None:
    table = Table("figure", "value", box=None, pad_edge=False)
    for key, value in summary.items():
        table.add_row(_text(key), _text(json.dumps(value)))
    _show(table)


def _print_graded(graded: Graded) -> None:
    prompt = graded.example.prompt
    if graded.example.messages is not None:
        prompt = "\n".join(f"[{message['role']}] {message['content']}" for message in graded.example.messages)
    answers = (("right", graded.right, graded.right_score), ("wrong", graded.wrong, graded.wrong_score))
    _say(f"--- {graded.example.id}\n{prompt}")
    for name, completion, score in answers:
        if score is None:
            _say(f"{name}: none known")
            continue
        parts = ", ".join(f"{part} {_figure(value)}" for part, value in score.components.items())
        worth = f"reward {_figure(score.value)}, accuracy {_figure(score.accuracy)}{parts and '; '}{parts}"
        _say(f"{name}: {completion!r}\n  {score.error or worth}")


def _status_row(status: Status) -> dict[str, str]:
    """What is shown of a run, by the names of the columns."""
    left = status.eta_seconds
    return {
        "run": str(status.path),
        "state": status.state,
        "step": f"{status.step}{'' if status.steps is None else f'/{status.steps}'}",
        "stage": status.stage,
        "training reward": _figure(status.training_reward),
        "held-out reward": _figure(status.reward),
        "accuracy": _figure(status.accuracy),
        "ETA": "" if left is None else duration(left),
        "last error": status.error or "",
    }


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"

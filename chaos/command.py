"""What `moemesh chaos` and `python -m chaos` do: a run from its options to its report and exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from chaos.experiment import Experiment, ExperimentError, read_experiment
from chaos.faults.base import allowed_values
from chaos.faults.catalog import FAULTS
from chaos.record.history import History, HistoryError, read_history
from chaos.record.reference import Reference, StoredReferenceError, read_reference, write_reference
from chaos.record.requests import requests_sha256
from chaos.runner import CannotRunError, Run
from chaos.target import Target, TargetError
from chaos.targets.catalog import make_target
from chaos.verdicts.judgement import RunJudgement, judge
from chaos.verdicts.report import COULD_NOT_RUN, EXIT_STATUS, Report

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Hurt a mesh under load; was anything lost?")
OUTPUT = Path("chaos-report")


@app.command("faults")
def print_faults() -> None:
    """Print each kind of fault with its parameters, with defaults and allowed values."""
    for name, fault in sorted(FAULTS.items()):
        described = (sys.modules[fault.__module__].__doc__ or "").partition("\n\n")[0]
        print(f"{name:16} {' '.join(described.split())}")
        for parameter, annotation in fault.parameters().items():
            print(f"{'':16} {parameter}={getattr(fault, parameter)}: {allowed_values(annotation)}.")


@app.command()
def run(
    target: Annotated[str, typer.Option(help="docker or local")] = "local",
    suite: Annotated[str, typer.Option(help="smoke, nightly, soak, or the path of a YAML file")] = "smoke",
    seed: Annotated[int, typer.Option(help="the same seed gives the same requests and faults")] = 0,
    against: Annotated[str, typer.Option(help="URL of a deployment that is already running")] = "",
    output: Annotated[Path, typer.Option(help="folder of the report")] = OUTPUT,
    reference: Annotated[Path | None, typer.Option(help="answers of another run; written if it is missing")] = None,
    timing: Annotated[
        Literal["judge", "report"],
        typer.Option(help="whether stalls and other times count, or are only reported (a busy machine)"),
    ] = "judge",
) -> None:
    """Exit status 0: all held; 1: something is broken; 2: could not run; 3: not known."""
    try:
        experiment = read_experiment(suite)
        output.mkdir(parents=True, exist_ok=True)
        settings = {name: str(value) for name, value in experiment.mesh.items()}
        with (
            (output / "history.jsonl").open("w", encoding="utf-8", buffering=1) as lines,
            make_target(target, settings, against, output / "logs", experiment.links, experiment.hosts) as hurt,
        ):
            name = f"{target} ({against})" if against else target
            made = _run_on(hurt, name, experiment, seed, History(sink=lines.write))
            oracle = _oracle(made, reference)
            judgement = judge(made.history.events, experiment.bounds, oracle, made.sees_processes)
            _report(made.history, judgement, output)
    except (ExperimentError, TargetError, CannotRunError, StoredReferenceError, OSError) as error:
        raise _refusal(error) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise _refusal("stopped; everything is healed, and nothing is judged") from None
    raise typer.Exit(EXIT_STATUS[judgement.state if timing == "judge" else judgement.untimed_state])


@app.command()
def settings(suite: str) -> None:
    """Print the settings of a suite's mesh, one NAME=VALUE per line, to start one for `--target docker`."""
    try:
        for name, value in read_experiment(suite).mesh.items():
            print(f"{name}={value}")
    except ExperimentError as error:
        raise _refusal(error) from None


@app.command("judge")
def judge_again(
    history: Path,
    suite: Annotated[str, typer.Option(help="whose bounds")] = "smoke",
    output: Annotated[Path, typer.Option(help="folder of the report")] = OUTPUT,
) -> None:
    """Judge the history.jsonl of an earlier run again, for example by other bounds."""
    try:
        with history.open(encoding="utf-8") as lines:
            read = read_history(lines)
        experiment = read_experiment(suite)
    except (OSError, HistoryError, ExperimentError) as error:
        raise _refusal(error) from None
    judgement = judge(read.events, experiment.bounds)
    _report(read, judgement, output)
    raise typer.Exit(EXIT_STATUS[judgement.state])


def _run_on(target: Target, name: str, experiment: Experiment, seed: int, history: History) -> Run:
    """Makes a run and returns it when it is over. Messages for people go to stderr, the verdicts to stdout."""
    started_s = time.monotonic()
    made = Run(
        experiment=experiment,
        target=target,
        target_name=name,
        seed=seed,
        history=history,
        clock=lambda: time.monotonic() - started_s,
        began_unix_s=time.time(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    asyncio.run(_execute(made))
    return made


async def _execute(made: Run) -> None:
    """Lets SIGTERM end a run as Ctrl-C does: healed."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await made.execute()


def _oracle(made: Run, path: Path | None) -> Reference | None:
    """Returns the stored reference, with which this run's undisturbed answers must agree, or None without one."""
    if path is None:
        return None
    fingerprint = requests_sha256(made.requests, made.model)
    own = made.reference
    if not path.exists():
        write_reference(path, fingerprint, own)
        return None
    stored = read_reference(path, fingerprint)
    if stored != own:
        raise StoredReferenceError(f"{path}: this mesh gives other answers without any fault (another numeric class?)")
    return stored


def _report(history: History, judgement: RunJudgement, output: Path) -> None:
    report = Report(history.events, judgement)
    output.mkdir(parents=True, exist_ok=True)
    report.write(output)
    for verdict in judgement.verdicts:
        print(f"{verdict.state.value:8} {verdict.name:16} {verdict.sentence}")
    print(f"{report.title}; {output / 'report.html'}")


def _refusal(error: object) -> typer.Exit:
    print(f"moemesh chaos: {error}", file=sys.stderr)
    return typer.Exit(COULD_NOT_RUN)

"""python -m bench [CASE ...]: measure, show, keep and compare."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import (
    bucket,
    coldstart,
    connect,
    count,
    endurance,
    faults,
    fingerprint,
    fleet,
    idle,
    layers,
    limits,
    peers,
    pool,
    proxy,
    relay,
    report,
    scale,
    wire,
)
from bench.case import Case, Result, answer, measure
from bench.micro import Micro
from bench.pages import Pages

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        limits.CASE,
        faults.CASE,
        fleet.CASE,
        proxy.CASE,
        connect.CASE,
        idle.CASE,
        pool.CASE,
        scale.CASE,
        coldstart.CASE,
        endurance.CASE,
        wire.CASE,
        fingerprint.CASE,
        bucket.CASE,
        layers.CASE,
        relay.CASE,
    )
}

#: Where people read; standard output stays free for answers.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def _run(case: Case, names: list[str], *, is_quick: bool) -> list[Result]:
    """Measure one implementation after the other, showing how far it is."""
    results = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    is_live = console.is_terminal
    with Progress(*columns, console=console, disable=not is_live) as progress:
        for number, name in enumerate(names, 1):
            title = f"{case.name} {number}/{len(names)}: {name}"
            task = progress.add_task(title, total=1)
            results.append(measure(case, name, is_quick=is_quick))
            mark = "[red]failed[/]" if results[-1].failures else "[green]ok[/]"
            progress.update(task, completed=1, description=f"{title} {mark}")
            if not is_live:
                console.print(title, mark)
    return results


def _names(
    case: Case, only: tuple[str, ...], corpus: str | None, *, is_quick: bool
) -> list[str]:
    """Which implementations of a case are asked for."""
    names = [
        name
        for name in case.implementations(is_quick=is_quick)
        if not only or name in only
    ]
    if corpus is not None and case is fingerprint.CASE:
        names.append(fingerprint.GROUPING + corpus)
    return names


def _show(case: Case, results: list[Result], pages: Pages, plots: Path | None) -> None:
    """Show a case on the console, and in pages and plots where there are any."""
    found = [result for result in results if result.figures]
    tables = case.tables(found)
    console.print(*tables)
    drawn = []
    if plots is not None:
        # Loaded when it is asked for: it takes longer than many a case.
        drawn = importlib.import_module("bench.plot").draw(found, plots)
    pages.put(case.name, tables, summary=case.summary(found), plots=drawn)


def _peers(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, Path]:
    named = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in peers.PEERS or not os.access(path, os.X_OK):
            raise click.BadParameter(f"{value}: no NAME=PATH of a program")
        named[name] = Path(path).resolve()
    return named


@click.command(
    help="Measure CASES, or all of them:\n\n\b\n"
    + "\n".join(f"{case.name:11} {case.about}" for case in CASES.values())
)
@click.argument("cases", nargs=-1, type=click.Choice(sorted(CASES)), metavar="[CASE]…")
@click.option("--quick", "is_quick", is_flag=True, help="A short form, as in CI.")
@click.option("--only", multiple=True, metavar="NAME", help="These implementations.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write results.")
@click.option("--save", metavar="NAME", help="Keep the results as a baseline.")
@click.option("--compare", metavar="NAME", help="Show a baseline beside the results.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show what --json or --save wrote, and measure nothing.",
)
@click.option(
    "--document",
    "documents",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the tables between the markers in a Markdown file.",
)
@click.option(
    "--plot",
    "plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Draw curves of throughput and latency as SVG.",
)
@click.option(
    "--corpus",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Group the statements of *.sql files here too, by `fingerprint`.",
)
@click.option(
    "--peer",
    "named",
    multiple=True,
    metavar="NAME=PATH",
    callback=_peers,
    help=f"Where the binary of a peer is, of {', '.join(peers.PEERS)}; else on PATH.",
)
@click.option(
    "--count",
    "is_count",
    is_flag=True,
    help="Count instructions under callgrind, of the cases that are made of loops.",
)
@click.option(
    "--fail-above",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="End with 1 if more are counted than that above the baseline.",
)
@click.option("--answer", "is_answer", is_flag=True, hidden=True)
def main(
    cases: tuple[str, ...],
    is_quick: bool,
    only: tuple[str, ...],
    file: Path | None,
    save: str | None,
    compare: str | None,
    source: Path | None,
    documents: tuple[Path, ...],
    plots: Path | None,
    corpus: str | None,
    named: dict[str, Path],
    is_count: bool,
    fail_above: float | None,
    is_answer: bool,
) -> None:
    # Processes that measure are told like this too.
    os.environ.update({peers.variable(name): str(path) for name, path in named.items()})
    if source is not None:
        saved = report.read(source)
        facts, is_quick, results = saved.facts, saved.is_quick, saved.results
        cases = cases or tuple(dict.fromkeys(result.case for result in results))
    chosen = [CASES[name] for name in cases or sorted(CASES)]
    loops = [case for case in chosen if isinstance(case, Micro)]
    if is_answer:
        sys.stdout.buffer.write(
            count.answer(loops)
            if is_count
            else answer(chosen[0], only[0], is_quick=is_quick)
        )
        return
    # Asked first: what is wrong with them should not be told minutes later.
    if compare is not None and not (report.BASELINES / f"{compare}.json").exists():
        raise click.UsageError(f"there is no baseline {compare}")
    if fail_above is not None and not (is_count and compare):
        # Seconds differ by more than any useful bound, from one minute to the next.
        raise click.UsageError("--fail-above goes with --count and --compare")
    if is_count and (only or corpus or plots or len(loops) < len(cases)):
        raise click.UsageError("--count is of loops only, and of all in a case")
    if is_count and source is None and not count.is_possible():
        console.print("not counted: valgrind is missing (apt-get install valgrind)")
        return
    if source is None:
        facts, results = report.machine(), []
    pages = Pages(documents, facts)
    try:
        for name in [count.NAME] if is_count else [case.name for case in chosen]:
            pages.check(name)
    except LookupError as error:
        raise click.UsageError(str(error)) from None
    if is_count:
        results = results or count.count(loops)
        tables = [count.table(results), *count.profile(results)]
        console.print(*tables)
        pages.put(count.NAME, tables)
    else:
        for case in chosen:
            its = [result for result in results if result.case == case.name]
            if source is None:
                names = _names(case, only, corpus, is_quick=is_quick)
                its = _run(case, names, is_quick=is_quick)
                results += its
            _show(case, its, pages, plots)
    content = report.to_json(results, facts, is_quick=is_quick)
    if file is not None:
        file.write_bytes(content)
    if compare is not None:
        console.print(report.comparison(compare, results))
    if save is not None:
        console.print(f"kept as {report.save(save, content)}")
    failures = [failure for result in results for failure in result.failures]
    if compare is not None and fail_above is not None:
        if reason := count.unlike(compare):
            console.print(f"not judged: {reason}", highlight=False)
        else:
            failures += count.regressions(compare, results, fail_above)
    for failure in failures:
        console.print(f"[red]not kept:[/] {failure}", highlight=False)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(prog_name="python -m bench")

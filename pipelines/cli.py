"""``cllmr``: the platform's command line. Commands import what they need when they run, so that help comes at once.

Exit codes: 0 done, 1 a crash, a failed check or a failed run, 2 a mistake the user can mend (one line says how), 124 a deadline
passed, 130 interrupted (Ctrl-C or SIGTERM).
"""

import functools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from components.errors import ConfigError, UserError
from pipelines.champion import asked_of_the_endpoint, champion_endpoint, champion_recommender, endpoint, registry
from pipelines.names import PipelineName
from pipelines.options import (
    Cache,
    Columns,
    Deadline,
    Deployed,
    Files,
    Host,
    Interactions,
    Items,
    JsonFile,
    Namespace,
    Preset,
    Revision,
    Sets,
    Storage,
    Terminate,
    Until,
    Url,
    Users,
    Which,
    filters_of,
    load_config,
    validated,
)
from pipelines.terminal import (
    check_writable,
    connected,
    crash_told,
    ended_with_the_command,
    ends_that_are_asked_for,
    error_line,
    events_told,
    exit_with,
    make_console,
    told_to_the_user,
    watched,
    write_result,
    writing,
)

if TYPE_CHECKING:
    from components.registry import ModelVersion
    from pipelines.cluster import Cluster, Version
    from pipelines.config import PlatformConfig
    from pipelines.local import PlatformRun

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from pipelines.cluster import source_revision

        typer.echo(f"cllmr {version('cllmr-platform')} ({source_revision()})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show version and revision, and exit.")
    ] = False,
) -> None:
    """From interactions and item text to a served, counterfactually debiased recommender."""


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Registers a command under its function's name (``run_`` and so on: without the underscore)."""

    @app.command(function.__name__.rstrip("_"))
    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with told_to_the_user():
            return function(*args, **kwargs)

    return guarded


# -- commands ---------------------------------------------------------------------------------------------------------------


@command
def doctor(
    preset: Preset = "local", config: Files = None, set_: Sets = None, storage: Storage = None, json_file: JsonFile = None
) -> None:
    """Check this machine: Python, packages, cores, memory, disk, storage, port, sample data.

    Exit code 1 when something is missing that a run needs.

    [dim]cllmr doctor
    cllmr doctor --preset gpu --storage s3://bucket/cllmr[/dim]
    """
    from dataclasses import asdict

    from rich import box
    from rich.table import Table

    from pipelines.doctor import examine, worst
    from pipelines.local import absolute_root

    settings = load_config(preset, config, set_, storage)
    needs_sample = settings.ingest.source == "sample"
    asks = {"llm": settings.sideinfo.backend == "vllm", "ann": settings.serve.scoring.ann_above is not None}
    asked = {extra for extra, does in asks.items() if does}
    checks = examine(absolute_root(settings.storage_root), settings.serve.host, settings.serve.port, needs_sample, asked)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "check", "seen", "what to do"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    for check in checks:
        table.add_row(Text(check.state, styles[check.state]), check.name, check.seen, check.fix)
    make_console().print(table)
    write_result(json_file, [asdict(check) for check in checks])
    if worst(checks) == "problem":
        raise typer.Exit(1)


@command
def validate(
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    interactions: Interactions = None,
    items: Items = None,
    users: Users = None,
    column: Columns = None,
    json_file: JsonFile = None,
) -> None:
    """Check settings and input data without running anything.

    [dim]cllmr validate --interactions clicks.csv --items books.csv --column user_id=reader --column item_id=isbn
    cllmr validate --preset gpu --config mine.yaml[/dim]
    """
    from tempfile import TemporaryDirectory

    import pandas as pd

    from components.ingest.build import build
    from components.ingest.dataset import REMOVED_FILE, Dataset
    from pipelines.checks import check_data
    from pipelines.summary import data_table, removed_table

    settings = load_config(preset, config, set_, storage, interactions, items, users, column)
    out = make_console()
    with TemporaryDirectory() as folder, events_told(Path(folder) / "events.jsonl"):
        # the stage itself, so that what is valid here is valid there
        facts = build(Path(folder), settings.ingest)
        out.print(data_table(facts))
        removed = pd.read_parquet(Path(folder) / REMOVED_FILE)
        if len(removed):
            out.print(removed_table(removed))
        check_data(settings, Dataset.load(folder))
    out.print(
        f"valid: settings {settings.fingerprint()}, data set '{facts['name']}'. next: cllmr run with the same options",
        soft_wrap=True,
    )
    write_result(json_file, facts)


@command
def run(
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    interactions: Interactions = None,
    items: Items = None,
    users: Users = None,
    column: Columns = None,
    from_: Annotated[str | None, typer.Option("--from", help="Build this stage and all after it again.")] = None,
    until: Until = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run.")] = False,
    ask_: Annotated[bool, typer.Option("--ask/--no-ask", help="Start the endpoint at the end and ask it for one user.")] = True,
    user: Annotated[str | None, typer.Option("--user", help="The user to ask for; default: a readable example.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Run the pipeline here: ingest, sideinfo, spectrum, features, train, evaluate, promote, serve.

    What is done already is reused. The same pipeline runs on a cluster (see [b]submit[/b]).

    [dim]cllmr run
    cllmr run --interactions clicks.csv --items books.csv --column user_id=reader
    cllmr run --set train.max_epochs=5 --from train --until evaluate
    cllmr run --dry-run[/dim]
    """
    from pipelines import local, plan, summary
    from pipelines.display import make_display

    started = time.monotonic()
    settings = load_config(preset, config, set_, storage, interactions, items, users, column)
    root = local.absolute_root(settings.storage_root)
    configs = settings.stages()
    out, progress = make_console(), make_console(stderr=True)
    pipeline = plan.compiled(settings)
    if dry_run:
        plan.check_order(pipeline.stages(), from_, until)
        out.print(summary.plan_table(plan.plan(pipeline.until(until), configs, root, from_), root))
        return
    asks = ask_ and until is None and "serve" in pipeline.stages()
    if asks and from_ is None and plan.nothing_to_train(plan.plan(pipeline, configs, root)):
        from serving.run import prepare_endpoint

        prepare_endpoint(settings.serve.host, port=0)  # Ray starts while the stages find out that they are done
    with crash_told(progress):
        done = local.run(pipeline, root, lambda stages: make_display(progress, stages), from_, until)
    if done.all_reused:
        progress.print(f"nothing changed: all {len(done.stages)} stages were reused ({done.seconds:.1f} s)", soft_wrap=True)
    out.print(summary.stage_table(done))
    answer = report(settings, done, out, progress, asks, user)
    result = summary.summarise(done, settings, preset, time.monotonic() - started)
    write_result(json_file, {**result, "example": answer} if answer else result)


@command
def compile_(
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("retraining.yaml"),
    until: Until = None,
    which: Which = PipelineName.RETRAINING,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="As Pipeline and PipelineVersion objects, for KFP's Kubernetes-native mode.")
    ] = False,
    namespace: Namespace = None,
    revision: Revision = None,
) -> None:
    """Write the pipeline as a file that Kubeflow Pipelines runs, or that GitOps applies (--kubernetes).

    The settings are its parameters' defaults; those that a cluster could not run with are named.

    [dim]cllmr compile --preset cluster --storage s3://bucket/cllmr --output retraining.yaml
    cllmr compile --preset cluster --kubernetes -n kubeflow --output objects.yaml && kubectl apply -f objects.yaml[/dim]
    """
    from pipelines.cluster import parameters_of, source_revision, version_name
    from pipelines.plan import compiled

    if not kubernetes and (namespace or revision):
        raise ConfigError("--namespace and --revision are for what --kubernetes writes.", "Give --kubernetes as well.")
    settings = load_config(preset, config, set_, storage, namespace=namespace)
    pipeline = compiled(settings, which).until(until)
    version = version_name(pipeline, revision or source_revision()) if kubernetes else ""
    text = pipeline.to_kubernetes(version, namespace) if kubernetes else pipeline.to_yaml()
    with writing("--output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    make_console().print(f"wrote {output}", soft_wrap=True)
    try:
        parameters_of(settings, pipeline)
    except ConfigError as error:  # a default, which whoever starts a run may still replace
        make_console(stderr=True).print(f"note: the defaults do for no cluster: {error}", soft_wrap=True)


@command
def submit(
    preset: Preset = "cluster",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    host: Host = None,
    namespace: Namespace = None,
    until: Until = None,
    which: Which = PipelineName.RETRAINING,
    revision: Revision = None,
    cache: Cache = False,
    wait_: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the run; the exit code is its result.")] = False,
    deadline: Deadline = 86400,
    terminate: Terminate = True,
    json_file: JsonFile = None,
) -> None:
    """Run the pipeline on a cluster, through Kubeflow Pipelines; prints where to see it.

    Credentials: a projected service-account token (cluster.token_file, KF_PIPELINES_SA_TOKEN_PATH), or a token in
    CLLMR_KFP_TOKEN, or a browser's cookies in CLLMR_KFP_COOKIES.

    [dim]cllmr submit --host https://kfp.example.org/pipeline --storage s3://bucket/cllmr --config mine.yaml
    cllmr submit --host https://kfp.example.org/pipeline -n team-a --config mine.yaml --wait --deadline 14400
    cllmr submit --pipeline batch --set batch.k=50 --storage s3://bucket/cllmr[/dim]
    """
    from pipelines import cluster as clusters

    settings = load_config(preset, config, set_, storage, host=host, namespace=namespace)
    cluster, version, parameters = prepared(settings, until, cache, which, revision)
    name = clusters.run_name(version.name)
    run_id: str | None = None
    write = partial(write_run, json_file, cluster, {"name": name, "version": version.name})
    with ended_with_the_command(cluster, lambda: run_id or cluster.find_run(name), terminate, partial(write, interrupted=True)):
        run_id = cluster.submit(version, parameters, name)
        make_console().print(f"run {run_id}: {cluster.url(run_id)}", soft_wrap=True)
        state = watched(cluster, run_id, deadline) if wait_ else "PENDING"
    write(run_id, state)
    if wait_:
        exit_with(state, deadline, run_id)


@command
def schedule(
    cron: Annotated[
        str | None,
        typer.Option("--cron", help="When: minute hour day month weekday, in UTC; with a sixth field in front: seconds."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the schedule; default: cllmr-retraining, cllmr-batch.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the schedule; runs that have begun go on.")] = False,
    preset: Preset = "cluster",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    host: Host = None,
    namespace: Namespace = None,
    until: Until = None,
    which: Which = PipelineName.RETRAINING,
    revision: Revision = None,
    cache: Cache = False,
    json_file: JsonFile = None,
) -> None:
    """Repeat the pipeline on a cluster: one run at a time, none made up for afterwards.

    Says what should be: the same again changes nothing, other settings or other code replace the schedule of that name.

    [dim]cllmr schedule --cron "0 3 * * *" --storage s3://bucket/cllmr --config mine.yaml
    cllmr schedule --pipeline batch --cron "0 6 * * *" --set batch.to_feast=true --storage s3://bucket/cllmr
    cllmr schedule --remove[/dim]
    """
    from pipelines import cluster as clusters

    if (cron is None) == (not remove):
        raise ConfigError("cllmr schedule needs one of --cron and --remove.", "Every night at three: --cron '0 3 * * *'")
    settings = load_config(preset, config, set_, storage, host=host, namespace=namespace)
    out, name = make_console(), name or f"cllmr-{which}"
    if cron is None:
        count = connected(settings).remove_schedule(name)
        out.print(f"schedule {name}: {'removed' if count else 'there was none'}", soft_wrap=True)
        write_result(json_file, {"name": name, "change": "removed" if count else "unchanged"})
        return
    times = clusters.cron_of(cron)
    cluster, version, parameters = prepared(settings, until, cache, which, revision)
    schedule_id, change = cluster.ensure_schedule(name, times, version, parameters)
    out.print(f"schedule {name}: {change}, '{times}' UTC, version {version.name}", soft_wrap=True)
    write_result(
        json_file, {"name": name, "schedule_id": schedule_id, "change": change, "cron": times, "version": version.name}
    )


@command
def runs(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, the newest first.")] = 20,
    preset: Preset = "cluster",
    config: Files = None,
    set_: Sets = None,
    host: Host = None,
    namespace: Namespace = None,
    json_file: JsonFile = None,
) -> None:
    """List the runs on a cluster, newest first.

    [dim]cllmr runs --limit 5[/dim]
    """
    from pipelines.summary import runs_table

    cluster = connected(load_config(preset, config, set_, None, host=host, namespace=namespace))
    found = cluster.runs(limit)
    make_console().print(runs_table(found))
    times = ("created_at", "finished_at")
    rows = [{name: getattr(run, name) for name in ("run_id", "display_name", "state", *times)} for run in found]
    write_result(json_file, [{**row, "url": cluster.url(row["run_id"])} for row in rows])


@command
def wait(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run's id: see cllmr runs.")],
    deadline: Deadline = 86400,
    terminate: Terminate = False,
    preset: Preset = "cluster",
    config: Files = None,
    set_: Sets = None,
    host: Host = None,
    namespace: Namespace = None,
    json_file: JsonFile = None,
) -> None:
    """Wait for a run on a cluster; the exit code is its result: 0 done, 1 failed or cancelled, 124 not yet.

    [dim]cllmr wait 3f2a9c0d-1e4b-5a67-8c9d-0e1f2a3b4c5d --deadline 3600[/dim]
    """
    cluster = connected(load_config(preset, config, set_, None, host=host, namespace=namespace))
    write = partial(write_run, json_file, cluster, {})
    with ended_with_the_command(cluster, lambda: run_id, terminate, partial(write, interrupted=True)):
        state = watched(cluster, run_id, deadline)
    write(run_id, state)
    exit_with(state, deadline, run_id)


@command
def serve(
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 0.0.0.0 opens it to the network.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="TCP port; 0: any free one.")] = None,
) -> None:
    """Keep the endpoint up for the champion; Ctrl-C ends it.

    [dim]cllmr serve
    cllmr serve --port 8080[/dim]
    """
    sets = [*(set_ or [])]
    sets += [f"serve.host={json.dumps(host)}"] if host is not None else []
    sets += [f"serve.port={port}"] if port is not None else []
    settings = load_config(preset, config, sets, storage)
    out = make_console()
    with champion_endpoint(settings) as url, ends_that_are_asked_for() as asked:
        out.print(f"serving at {url} (a page to try it: {url}/ui/, the API: {url}/docs); Ctrl-C ends it", soft_wrap=True)
        asked.get()
    out.print("the endpoint has ended")


@command
def recommend(
    user_ids: Annotated[list[str], typer.Argument(metavar="USER...", help="Users to rank items for.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Items per user.")] = 10,
    liked: Annotated[
        list[str] | None,
        typer.Option("--liked", help="An item the users liked just now; may be repeated. A new user needs it."),
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Only items with one of these values, column=value,value, or with a number from least..most (either may be "
            "left out); may be repeated, and items must pass the filters on all columns.",
        ),
    ] = None,
    debias: Annotated[float | None, typer.Option("--debias", help="Debias strength, 0 to 1; default: the model's own.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the ranking without debiasing beside it.")] = False,
    url: Url = None,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """Rank items for users: from the champion's bundle, or over HTTP with --url.

    [dim]cllmr recommend 42
    cllmr recommend 42 7 --k 5 --compare --url http://127.0.0.1:8000
    cllmr recommend somebody-new --liked 50 --liked 181
    cllmr recommend 42 --filter genres=Comedy,Drama --filter release_year=1990..1999[/dim]
    """
    from pipelines.summary import ranking_table, side_by_side
    from serving.schemas import RecommendRequest

    recent = dict.fromkeys(user_ids, liked) if liked else {}
    asked = {"users": user_ids, "recent": recent, "k": k, "debias": debias, "compare": compare}
    request = validated(RecommendRequest, {**asked, "filters": filters_of(filter_)})
    if url:
        with endpoint(url) as client:
            answer = client.ask(request).model_dump(mode="json")
    else:
        recommender, histories = champion_recommender(load_config(preset, config, set_, storage))
        found = histories(request.users)
        ranked = recommender.recommend(found.told_to(request), found.item_ids, found.profiles)
        answer = ranked.model_copy(update={"results": found.said_of(ranked.results)}).model_dump(mode="json")
    out = make_console()
    for result in answer["results"]:
        out.print(Text.assemble((f"user {result['user_id']}", "bold"), f", model {result['model_version']}"))
        out.print(side_by_side(result, result["debias"]) if compare else ranking_table(result))
    write_result(json_file, answer)


@command
def explain(
    user_id: Annotated[str, typer.Argument(metavar="USER")],
    item_id: Annotated[str, typer.Argument(metavar="ITEM")],
    debias: Annotated[float | None, typer.Option("--debias", help="Debias strength, 0 to 1; default: the model's own.")] = None,
    url: Url = None,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """Take one score apart: what the match gives, what the side information adds, what debiasing removes.

    [dim]cllmr explain 42 50
    cllmr explain 42 50 --url http://127.0.0.1:8000[/dim]
    """
    from pipelines.summary import explanation_table
    from serving.schemas import ExplainRequest

    request = validated(ExplainRequest, {"user_id": user_id, "item_id": item_id, "debias": debias})
    if url:
        with endpoint(url) as client:
            answer = client.explain(user_id, item_id, debias=debias).model_dump(mode="json")
    else:
        recommender, histories = champion_recommender(load_config(preset, config, set_, storage))
        found = histories([request.user_id])
        (explained,) = found.said_of([recommender.explain(found.told_to_one(request), found.item_ids[0])])
        answer = explained.model_dump(mode="json")
    make_console().print(explanation_table(answer))
    write_result(json_file, answer)


@command
def experiment(
    dataset: Annotated[
        list[Path] | None,
        typer.Option("--dataset", "-d", help="Folder with trn.npz, val.npz, tst.npz, or an ingest output; may be repeated."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="Studies: paper, ablation, rank, noise, coldstart, collapse, bias, quick or all."),
    ] = None,
    config: Files = None,
    set_: Sets = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="mf, lightgcn, gccf, sgl, simgcl, dccf, autocf; ease, ials, ensemble; see below."),
    ] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="softmax or bpr.")] = None,
    dim: Annotated[int | None, typer.Option("--dim", min=1, help="Width of the representations.")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="none, mlp, generative, sse, attention, pca or whitening.")
    ] = None,
    effect: Annotated[
        str | None,
        typer.Option(
            "--effect", help="none, factual, tnie, pnde; of ease, ials, ensemble: none, gates, counterfactual_log ..."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Fits of every model that depends on chance; 5, of suite quick 2 at most."),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", help="Only these rivals instead of all; may be repeated.")
    ] = None,
    rival: Annotated[
        str | None, typer.Option("--rival", help="One more rival: backbone+encoder, or rlmrec-con, rlmrec-gen.")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Units of work at once, on Ray's workers.")] = 1,
    work: Annotated[Path, typer.Option("--work", help="Where finished units are kept; the same again goes on.")] = Path(
        ".cllmr/experiments"
    ),
    report_: Annotated[
        Path | None, typer.Option("--report", help="Folder for report.html, results.json, results.md; of a suite: WORK/SUITE.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare the method with its rivals on a fixed split, over seeds, with paired tests; or run a suite of studies.

    Without further options: the default recipe and the baselines, everything tuned on validation alone. Any of --backbone,
    --loss, --dim, --encoder, --effect compares that single model instead of the recipe: a graph model, or the recipe's EASE or
    iALS alone, with side information (EASE with an --encoder: with that of a graph model as well, which has no other part in
    it), or, as "ensemble", the recipe itself with another loss, width, encoder or effect.

    [dim]cllmr experiment --dataset data/books
    cllmr experiment --dataset data/books --backbone lightgcn --loss softmax --dim 64 --encoder sse --effect tnie
    cllmr experiment --dataset data/books --backbone ensemble --dim 32 --effect counterfactual_log
    cllmr experiment --dataset data/books --rival rlmrec-con --seeds 3 --json result.json
    cllmr experiment --suite noise --dataset data/books --dataset data/places --parallel 4
    cllmr experiment --suite quick[/dim]
    """
    from pipelines import experiment as experiments
    from pipelines.display import make_display

    flags = {"backbone": backbone, "loss": loss, "dim": dim, "encoder": encoder, "effect": effect}
    settings = experiments.settings(config or [], set_ or [], flags, seeds, rival, baseline or [], suite)
    out, progress = make_console(), make_console(stderr=True)
    if report_ is not None:
        check_writable("--report", report_ / "report.html")
    with writing("--work", work):
        work.mkdir(parents=True, exist_ok=True)
    with make_display(progress, ["experiment"]) as display:
        display.show({"event": "stage started", "stage": "experiment", "time": time.time()})
        finished = experiments.run(settings, dataset or [], suite, work, parallel, display.show)
    from components.experiment.tables import as_rich, grids

    for study in finished.studies:
        out.print(Text.assemble((study.title, "bold"), f"  {study.text}"))
        for grid in grids(study):
            out.print(as_rich(grid))
    progress.print(f"{finished.executed} units of work were done, the others were found in {work}", soft_wrap=True)
    folder = report_ or (work / suite if suite else None)
    if folder is not None:
        experiments.write_report(folder, finished)
        out.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    write_result(json_file, finished.result)


@command
def batch(
    k: Annotated[int | None, typer.Option("--k", help="Items per user.")] = None,
    users: Annotated[
        Path | None, typer.Option("--users", help="CSV or Parquet with a column user_id; default: all users.")
    ] = None,
    debias: Annotated[float | None, typer.Option("--debias", help="Debias strength, 0 to 1; default: the model's own.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Fingerprint of a train artifact; default: the champion's.")
    ] = None,
    to_feast: Annotated[bool, typer.Option("--to-feast", help="Write the rankings to the online store too.")] = False,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """Rank items for all users with the champion and write the table as Parquet; what is done already is reused.

    [dim]cllmr batch --k 50
    cllmr batch --users customers.csv --set batch.num_workers=4
    cllmr batch --to-feast[/dim]
    """
    from pipelines import local, summary
    from pipelines.batch_scoring import batch_scoring
    from pipelines.config import BATCH
    from pipelines.display import make_display
    from pipelines.plan import compile_pipeline

    path = None if users is None else str(users.expanduser().absolute())
    given = {"k": k, "users": path, "debias": debias, "train": model, "to_feast": to_feast or None}
    sets = [f"batch.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings = load_config(preset, config, [*(set_ or []), *sets], storage)
    registry(settings)  # before the run's log makes a storage root of a mistyped one
    out, shown = make_console(), make_console(stderr=True)
    pipeline = compile_pipeline(batch_scoring(settings))
    with crash_told(shown):
        done = local.run(pipeline, settings.storage_root, lambda stages: make_display(shown, stages))
    manifest = done.manifest(BATCH)
    out.print(summary.stage_table(done))
    out.print(
        f"{manifest.facts['num_users']:,} users, model {manifest.facts['model_version']}: {manifest.uri}/recommendations",
        soft_wrap=True,
    )
    if settings.batch.to_feast:
        out.print("and in the online store, as Feast's view user_recommendations", soft_wrap=True)
    write_result(json_file, {"uri": manifest.uri, "fingerprint": manifest.fingerprint, **manifest.facts})


@command
def promote(
    fingerprint: Annotated[
        str | None, typer.Argument(help="The bundle to promote; without it the versions are listed.")
    ] = None,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """Make a registered model the champion by hand, past the gate; without a fingerprint: list the models.

    A model whose storage root was renamed or is mounted elsewhere is served from where it lies now.

    [dim]cllmr promote
    cllmr promote 3f2a9c0d1e4b5a67[/dim]
    """
    from dataclasses import asdict

    from components.artifacts import Store
    from components.registry import registered_root
    from pipelines.local import absolute_root
    from pipelines.summary import versions_table

    settings = load_config(preset, config, set_, storage)
    models = registry(settings)
    if fingerprint is not None:
        known, root = models.find(fingerprint), registered_root(absolute_root(settings.storage_root))
        if known is not None and known.storage_root != root:
            there, here = (Store(place).find("train", fingerprint) for place in (known.storage_root, root))
            if there is None and here is not None:  # registered when its storage root had another name
                models.relocate(fingerprint, root, known.bundle)
        tell_champion(models.promote(fingerprint), json_file)
        return
    versions = models.versions()
    make_console().print(versions_table(versions))
    write_result(json_file, [asdict(version) for version in versions])


@command
def rollback(
    preset: Preset = "local", config: Files = None, set_: Sets = None, storage: Storage = None, json_file: JsonFile = None
) -> None:
    """Return to the champion before this one; repeat to go further back.

    [dim]cllmr rollback[/dim]
    """
    tell_champion(registry(load_config(preset, config, set_, storage)).rollback(), json_file)


@command
def materialise(
    deployed: Deployed = None,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """Put back the online features of the champion, the challenger and the champion before, where rows are missing.

    With everything in place it only looks; after a lost Redis it writes them all. Exit code 1 when one could not be written.

    [dim]cllmr materialise --preset cluster --storage s3://bucket/cllmr[/dim]
    """
    from components.features.stage import put_back
    from pipelines.local import absolute_root
    from pipelines.materialise import feature_sets
    from serving.run import read_app_args

    settings = load_config(preset, config, set_, storage)
    root, tracking_uri = absolute_root(settings.storage_root), registry(settings).tracking_uri
    found = feature_sets(root, tracking_uri, [read_app_args(file)["train"] for file in deployed or []])
    out, errors, states = make_console(), make_console(stderr=True), {}
    if not found:
        out.print(f"no model below '{root}' is served yet", soft_wrap=True)
    for one in found:
        try:
            states[one.fingerprint] = "written" if put_back(one) else "in place"
        except UserError as error:  # the others may still be written
            states[one.fingerprint] = "missing"
            errors.print(error_line(str(error)), soft_wrap=True)
        out.print(f"feature set {one.fingerprint}: {states[one.fingerprint]}", soft_wrap=True)
    write_result(json_file, {"storage_root": root, "feature_sets": states})
    if "missing" in states.values():
        raise typer.Exit(1)


@command
def clean(
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest models to keep, whatever their age.")] = 5,
    older_than: Annotated[
        int,
        typer.Option("--older-than", min=1, max=36500, help="Days; whatever was made, or reused by a run, since then is kept."),
    ] = 14,
    deployed: Deployed = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only listed.")] = False,
    preset: Preset = "local",
    config: Files = None,
    set_: Sets = None,
    storage: Storage = None,
    json_file: JsonFile = None,
) -> None:
    """List what earlier runs left that nothing needs any more, or remove it with --yes.

    Kept: champion, challenger and the champion before, the newest models, what any of these was made from, began with or was
    evaluated with, and whatever is young. With outputs go their rows in the online store and their versions in the registry.
    Online rows of models that neither are served nor were made within two days go sooner.

    [dim]cllmr clean
    cllmr clean --keep 10 --older-than 30 --yes
    cllmr clean --preset cluster --storage s3://bucket/cllmr --yes[/dim]
    """
    from datetime import timedelta

    from rich.filesize import decimal

    from pipelines import retention, summary
    from pipelines.config import BATCH
    from pipelines.local import absolute_root
    from serving.run import read_app_args

    settings = load_config(preset, config, set_, storage)
    root, tracking_uri = absolute_root(settings.storage_root), registry(settings).tracking_uri
    in_use = [read_app_args(file)["train"] for file in deployed or []]
    found = retention.removable(root, [*settings.stages(), BATCH], tracking_uri, keep, timedelta(days=older_than), in_use)
    gone = retention.remove(root, tracking_uri, found) if yes else []
    out = make_console()
    if found:
        out.print(summary.removable_table(found))
    size = decimal(sum(one.bytes for one in (gone if yes else found)))
    out.print(
        f"removed {len(gone)} of {len(found)}, {size}" if yes else f"{len(found)} can go, {size}. next: cllmr clean --yes"
    )
    rows = [{"what": one.what, "where": one.where, "bytes": one.bytes, "removed": one in gone} for one in found]
    write_result(json_file, {"storage_root": root, "removable": rows})
    if len(gone) < len(found) and yes:
        raise typer.Exit(1)


# -- what commands share ----------------------------------------------------------------------------------------------------


def prepared(
    settings: "PlatformConfig", until: str | None, cache: bool, which: PipelineName, revision: str | None
) -> "tuple[Cluster, Version, dict[str, Any]]":
    """The pipeline of these settings, there to be run: where, which version of it, and with which parameters."""
    from pipelines import cluster as clusters

    pipeline = clusters.pipeline_of(settings, until, cache, which)
    parameters = clusters.parameters_of(settings, pipeline)  # it may refuse: before anything is uploaded
    cluster = connected(settings)
    return cluster, cluster.ensure_version(pipeline, revision or clusters.source_revision()), parameters


def write_run(
    json_file: Path | None,
    cluster: "Cluster",
    described: dict[str, str],
    run_id: str | None,
    state: str | None,
    interrupted: bool = False,
) -> None:
    """Writes what became of a run on a cluster as JSON where it is asked for; null is not known, or there is no run."""
    url = None if run_id is None else cluster.url(run_id)
    result = {"run_id": run_id, **described, "url": url, "state": state, "interrupted": interrupted}
    write_result(json_file, result)


def report(
    settings: "PlatformConfig", run: "PlatformRun", out: Console, progress: Console, ask_user: bool, user: str | None
) -> dict[str, Any] | None:
    """Prints what a run found; when asked to, starts the endpoint, asks it for one user over HTTP and shuts it down.

    Returns the endpoint's answer with the user's last liked titles, or None.
    """
    from components.artifacts import read_json
    from pipelines import summary

    if "evaluate" in run.stages:
        evaluated = run.manifest("evaluate").path()
        out.print(summary.result_table(read_json(evaluated / "metrics.json")))
        out.print(f"report: {evaluated / 'report.html'}", soft_wrap=True)
    if "promote" in run.stages:
        out.print(summary.verdict_line(read_json(run.manifest("promote").path() / "verdict.json")), soft_wrap=True)
    if not ask_user or "serve" not in run.stages:
        return None
    example = partial(summary.last_liked, run.manifest("ingest").path(), user)
    user_id, titles, answer = asked_of_the_endpoint(settings, run, example, progress)
    liked_last = "; ".join(titles) or "nothing that is in the data"
    out.print(Text.assemble("\n", (f"user {user_id}", "bold"), f" liked last: {liked_last}"))
    out.print(f"asked over HTTP for ten items (model {answer['model_version']}):")
    out.print(summary.side_by_side(answer["results"][0], answer["debias"]))
    for line in summary.next_commands(settings, user_id):
        out.print(line, soft_wrap=True)
    return {"user_id": user_id, "last_liked": titles, "answer": answer}


def tell_champion(champion: "ModelVersion", json_file: Path | None) -> None:
    """Says which model is the champion now and what to do next."""
    from dataclasses import asdict

    out = make_console()
    out.print(f"champion: version {champion.version}, {champion.fingerprint}", soft_wrap=True)
    out.print("next: cllmr serve (an endpoint that runs already takes it over within seconds)", soft_wrap=True)
    out.print("a model of earlier days may have no online features any more: cllmr materialise writes them", soft_wrap=True)
    write_result(json_file, asdict(champion))


def main() -> None:
    """The ``cllmr`` command."""
    app(prog_name="cllmr")


if __name__ == "__main__":
    main()

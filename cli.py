"""The command line: parses, calls the pipelines and the report, prints."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.command_line import (
    MODEL_HELP,
    OneLineErrors,
    budgets_of,
    callback_option,
    configurations_of,
    costs_of,
    experiment_options,
    refuse_alone,
    run_folder,
    whole_numbers,
    work,
    work_options,
)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="gross-ray")
def main() -> None:
    """Find the grouped-convolution version of a convnet that is most accurate within your budget.

    \b
    Example:
      gross run --preset quickstart --out runs/quickstart
      gross report runs/quickstart
    """
    sys.path.append(os.getcwd())  # models and callbacks of one's own: a console script does not look there by itself


@main.command()
@click.option("--out", required=True, help="Run folder, or a URI like s3://bucket/folder.")
@click.option(
    "--reuse",
    metavar="RUN",
    help="Take over from another run folder what the settings leave as it is, like its supernets for another search.",
)
@click.option(
    "--reuse-evaluations",
    is_flag=True,
    help="With --reuse: the strategy of this search (search.strategy) begins with what that run evaluated.",
)
@functools.partial(experiment_options, preset_required=True)
@callback_option
@work_options
def run(
    preset_name: str,
    out: str,
    reuse: str | None,
    reuse_evaluations: bool,
    settings: tuple[str, ...],
    callbacks: list[Any],
    resources: Any,
    source: Any,
) -> None:
    """Do every stage, from training to the tables and the page of results; the same command again continues.

    \b
    Example:
      gross run --preset quickstart --out runs/quickstart
      gross run --preset fashion --out runs/short --set training.epochs=3 --set training.seeds=1
      gross run --preset quickstart --out runs/b --reuse runs/quickstart --set 'search.limits=["parameters=60k"]'
    """
    from gross_ray.report.page import write_page
    from gross_ray.report.terminal import results
    from gross_ray.results.store import RunStore
    from pipelines.reuse import take_evaluations, take_over
    from pipelines.run import run_all

    refuse_alone("--reuse", reuse is not None, {"--reuse-evaluations": reuse_evaluations or None})
    other = None if reuse is None else RunStore.open(reuse)
    store = run_folder(out, preset_name, settings, source, other)

    def do(session: Any) -> None:
        if other is not None:
            taken = ", ".join(f"{stage} {num}" for stage, num in take_over(store, other).items())
            session.reporter.note(f"taken over from {other.storage}, units by stage: {taken}")
            if reuse_evaluations:
                num = take_evaluations(store, other)
                session.reporter.note(f"taken over from {other.storage}: {num} evaluated configurations")
        run_all(session)

    text, page = work(store, resources, source, do, callbacks, lambda: (results(store), write_page(store)))
    click.echo(text)
    click.echo(f"page: {page}", err=True)


def _stage_command(name: str, description: str) -> click.Command:
    """Return the command of a stage that has no options of its own."""

    def command(run: str, preset_name: str | None, settings: tuple[str, ...], resources: Any, source: Any) -> None:
        from gross_ray.report.terminal import stage_results
        from pipelines.run import STAGES

        store = run_folder(run, preset_name, settings, source)
        click.echo(work(store, resources, source, STAGES[name].run, show=lambda: stage_results(store, name)))

    help_text = f"{description}\n\n\b\nExample:\n  gross {name} runs/quickstart"
    return click.command(name, help=help_text)(
        click.argument("run", metavar="RUN")(experiment_options(work_options(command)))
    )


for _name, _description in {
    "train": "Train the base networks (with --preset where RUN is new).",
    "decompose": "Decompose every layer at every group-size.",
    "reconstruct": "Reconstruct the responses of the full network in the supernet.",
    "finetune": "Fine-tune the supernet, group-sizes sampled at each step.",
}.items():
    main.add_command(_stage_command(_name, _description))


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--budget",
    "budgets",
    metavar="COST=LIMIT",
    multiple=True,
    callback=budgets_of,
    help="Print the most accurate within this limit on macs, macs_paper, parameters or latency_ms, like macs=2.66M "
    "(k, M, G); may be repeated: all must hold.",
)
@click.option("--top", type=click.IntRange(min=1), help="How many to print under --budget [5].")
@click.option("--pareto", is_flag=True, help="Print the Pareto front of accuracy and --costs.")
@click.option(
    "--costs",
    callback=costs_of,
    help="One or more of macs, macs_paper, parameters, latency_ms, with commas [the first budget's, else macs].",
)
@click.option("--latency", is_flag=True, help="Time the layers on this machine and predict latency_ms of everything.")
@click.option("--latency-batch", type=click.IntRange(min=1), help="Images of a batch that is timed [1].")
@click.option("--latency-threads", type=click.IntRange(min=1), help="CPU threads while it is timed [1].")
@experiment_options
@work_options
def search(
    run: str,
    budgets: tuple[Any, ...],
    top: int | None,
    pareto: bool,
    costs: list[str] | None,
    latency: bool,
    latency_batch: int | None,
    latency_threads: int | None,
    preset_name: str | None,
    settings: tuple[str, ...],
    resources: Any,
    source: Any,
) -> None:
    """Evaluate every configuration and select under budgets.

    Under the experiment's budgets the selection is stored, to be validated; under those given here it is printed.

    \b
    Example:
      gross search runs/quickstart
      gross search runs/quickstart --budget macs=2.66M --budget parameters=90k --top 5
      gross search runs/quickstart --latency --latency-batch 8 --pareto --costs macs,latency_ms
    """
    from gross_ray.report.terminal import budget_table, front_table, latency_table, stage_results
    from pipelines import search as stage
    from pipelines.latency import add_latency
    from pipelines.run import STAGES

    refuse_alone("--budget", bool(budgets), {"--top": top})
    refuse_alone("--pareto", pareto, {"--costs": costs and ",".join(costs)})
    refuse_alone("--latency", latency, {"--latency-batch": latency_batch, "--latency-threads": latency_threads})

    def do(session: Any) -> None:
        STAGES["search"].run(session)
        if latency:
            add_latency(session, batch_size=latency_batch or 1, threads=latency_threads or 1)

    store = run_folder(run, preset_name, settings, source)
    work(store, resources, source, do)
    parts = [latency_table(store)] if latency else []
    if budgets:
        parts.append(budget_table(stage.best(store, budgets, top or 5), budgets))
    if pareto:
        costs = costs or [budgets[0].cost if budgets else "macs"]
        parts.append(front_table(stage.front(store, costs), costs))
    if not budgets and not pareto:
        parts.insert(0, stage_results(store, "search"))
    click.echo("\n\n".join(parts))


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="What is timed, of this machine [cuda where there is one]."
)
@click.option("--batch", type=click.IntRange(min=1), help="Images of a batch [1].")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; more than one need a machine left alone [1].")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds of timings [50].")
@click.option(
    "--to", "target", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also write FILE.parquet."
)
@click.option(
    "--from",
    "source",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Take what --to wrote on another machine, and time nothing.",
)
def latency(
    run: str,
    device: str | None,
    batch: int | None,
    threads: int | None,
    repeats: int | None,
    target: Path | None,
    source: Path | None,
) -> None:
    """Time each layer of RUN at each group-size on this machine, and predict latency_ms of what is searched.

    Needs the base network only: it may come before the search, which then has budgets in milliseconds
    (search.limits). On a device that is not in the cluster, copy RUN there or carry the table: --to there, --from here.

    \b
    Example:
      gross latency runs/quickstart --batch 1
      gross latency runs/quickstart --device cuda --to h200.parquet
      gross latency runs/quickstart --from phone.parquet
    """
    import torch

    from gross_ray.report.terminal import latency_table
    from gross_ray.results.store import RunStore
    from gross_ray.search.latency import LatencyModel, LatencyOptions
    from pipelines import latency as stage
    from pipelines.predictions import put
    from pipelines.progress import Reporter
    from pipelines.session import held

    asked = {"batch_size": batch, "threads": threads, "repeats": repeats}
    given = {name: value for name, value in asked.items() if value is not None}
    if source is not None and (given or device or target):
        raise click.UsageError(f"--from {source} times nothing: leave the other options out")
    if target is not None and not target.absolute().parent.is_dir():
        raise click.UsageError(f"--to {target}: there is no folder {target.parent}; make it, or name another file")
    store = RunStore.open(run)
    with held(store, Reporter()):
        if source is not None:
            model = LatencyModel.load(source)
        else:
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            with click.progressbar(length=1000, label=f"latency on {place}", file=sys.stderr) as bar:

                def advance(done: int, total: int) -> None:
                    bar.update(1000 * done // total - bar.pos)

                model = stage.measure(store, place, LatencyOptions(**given), advance)
        put(store, model)
    if target is not None:
        model.save(target)
    click.echo(latency_table(store))


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--configuration",
    "configurations",
    metavar="GROUP-SIZES",
    multiple=True,
    callback=configurations_of,
    help="Train this one, like 8-16-64, in place of the fixed and the selected ones; may be repeated.",
)
@callback_option
@experiment_options
@work_options
def validate(
    run: str,
    configurations: tuple[Any, ...],
    callbacks: list[Any],
    preset_name: str | None,
    settings: tuple[str, ...],
    resources: Any,
    source: Any,
) -> None:
    """Train the fixed and the selected configurations on their own, each a trial of Ray Tune.

    \b
    Example:
      gross validate runs/quickstart
      gross validate runs/quickstart --configuration 4-8-64
      gross validate runs/quickstart --callback my_callbacks:Notify
    """
    from gross_ray.report.terminal import stage_results
    from pipelines import validate as stage

    def do(session: Any) -> None:
        if configurations:
            stage.run_named(session, configurations)
        else:
            stage.run(session)

    store = run_folder(run, preset_name, settings, source)
    click.echo(work(store, resources, source, do, callbacks, lambda: stage_results(store, "validate")))


@main.command("sweep-alpha")
@click.argument("run", metavar="RUN")
@click.option(
    "--scheduler",
    type=click.Choice(["none", "asha"]),
    default="none",
    show_default=True,
    help="asha: stop trials early whose metric is below the median of those that got as far; none before a tenth "
    "of the fine-tuning.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "optuna"]),
    default="grid",
    show_default=True,
    help="grid: the experiment's sweep, compared with the fixed configurations; optuna: alpha continuous, and one of "
    "the experiment's scalings.",
)
@click.option("--trials", type=int, help="Supernets to train in all under --search optuna [20].")
@click.option("--alpha-low", type=float, help="Smallest alpha under --search optuna [0].")
@click.option("--alpha-high", type=float, help="Largest alpha under --search optuna [8].")
@callback_option
@experiment_options
@work_options
def sweep_alpha(
    run: str,
    scheduler: str,
    search: str,
    trials: int | None,
    alpha_low: float | None,
    alpha_high: float | None,
    callbacks: list[Any],
    preset_name: str | None,
    settings: tuple[str, ...],
    resources: Any,
    source: Any,
) -> None:
    """Train supernets over the sampling temperature alpha, each a trial of Ray Tune, and compare them.

    The metric of a trial, by which a scheduler stops and a search proposes, is supernet_accuracy: the mean accuracy of
    the fixed configurations in the supernet, on the validation split, after the latest epoch. The trials are in the
    table alpha_trials.

    \b
    Example:
      gross sweep-alpha runs/quickstart
      gross sweep-alpha runs/quickstart --scheduler asha
      gross sweep-alpha runs/quickstart --search optuna --trials 30 --alpha-high 6
    """
    from gross_ray.report.terminal import stage_results, trials_table
    from pipelines import sweep
    from pipelines.alpha_trials import OptunaOptions

    limits = {"trials": trials, "alpha_low": alpha_low, "alpha_high": alpha_high}
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    refuse_alone("--search optuna", search == "optuna", {f"--{name.replace('_', '-')}": given[name] for name in given})
    optuna = OptunaOptions(**given) if search == "optuna" else None
    store = run_folder(run, preset_name, settings, source)
    work(store, resources, source, lambda session: sweep.run(session, scheduler=scheduler, optuna=optuna), callbacks)
    click.echo(trials_table(store) if optuna else stage_results(store, "sweep-alpha"))


@main.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the named experiments and their cost, or print every field of the one called NAME.

    \b
    Example:
      gross presets
      gross presets quickstart
    """
    from gross_ray.presets import PRESETS, preset

    if name is not None:
        for field, value in preset(name).fields().items():
            click.echo(f"{field}={_as_setting(value)}")
        return
    for each, entry in PRESETS.items():
        click.echo(f"{each:<12} {entry.description}\n{'':<12} Cost: {entry.cost}.")


def _as_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@main.command()
@click.option("--model", required=True, metavar="NAME", help=MODEL_HELP)
@click.option("--layers", multiple=True, metavar="GLOB", help="Layers to decompose, by name or glob [all]; repeatable.")
@click.option("--group-sizes", metavar="LIST", help="Group-sizes, like 1,4,16,32 [powers of two].")
@click.option(
    "--layer-group-sizes",
    metavar="GLOB=LIST",
    multiple=True,
    help="Other ones for these layers, like 'layer4.*=16,32'.",
)
@click.option("--image-size", type=click.IntRange(1), default=32, show_default=True, help="Pixels of an image's side.")
@click.option("--num-classes", type=click.IntRange(1), default=10, show_default=True, help="Classes it tells apart.")
def inspect(
    model: str,
    layers: tuple[str, ...],
    group_sizes: str | None,
    layer_group_sizes: tuple[str, ...],
    image_size: int,
    num_classes: int,
) -> None:
    """Print what decomposing a network would give: layers, group-sizes, the space and its cheapest configuration.

    \b
    Example:
      gross inspect --model vgg16 --group-sizes 1,4,16,32
      gross inspect --model my_package.networks:small_resnet --image-size 64 --layers 'layer[34].*'
    """
    from gross_ray.decomposition.layers import choice_of, parse_layer_group_sizes
    from gross_ray.models import model_of
    from gross_ray.report.inspection import inspection
    from gross_ray.report.terminal import inspection_page

    network = model_of(model, num_classes=num_classes, image_size=image_size).eval()
    by_layer = parse_layer_group_sizes(layer_group_sizes)
    sizes, shape = whole_numbers("--group-sizes", group_sizes), (3, image_size, image_size)
    choice = choice_of(network, layers, sizes, by_layer, input_shape=shape)
    click.echo(inspection_page(inspection(network, choice, shape)))


@main.command()
@click.argument("run", metavar="RUN")
def status(run: str) -> None:
    """Show how far each stage of RUN is.

    \b
    Example:
      gross status runs/quickstart
    """
    from gross_ray.results.store import RunStore
    from pipelines.run import status as stages

    store = RunStore.open(run)
    click.echo(f"{store.storage}: {store.experiment.name}, experiment {store.experiment.fingerprint()}")
    for name, done, planned in stages(store):
        count = "waits for an earlier stage" if planned is None else f"{done} of {planned} units"
        click.echo(f"  {name:<12} {count}")


@main.command()
@click.argument("run", metavar="RUN")
def check(run: str) -> None:
    """Read every table and checkpoint of RUN whole, and delete the damaged ones: their stages make them anew.

    A command checks what it uses itself; this one is for what nothing has used yet.

    \b
    Example:
      gross check runs/quickstart
    """
    from gross_ray.results.store import RunStore
    from pipelines.progress import Reporter
    from pipelines.session import held, tell_of_damage

    store, reporter = RunStore.open(run), Reporter()
    with held(store, reporter):
        store.check()
        num_damaged = len(store.damaged)
        tell_of_damage(store, reporter)
    click.echo(f"{store.storage}: {num_damaged or 'no'} damaged file{'s' * (num_damaged != 1)}")


@main.command()
@click.argument("run", metavar="RUN")
@click.argument("table", metavar="TABLE")
@click.option("--rows", type=click.IntRange(min=0), default=20, show_default=True, help="Rows to print; 0: all.")
@click.option("--csv", is_flag=True, help="Print all rows as CSV.")
def show(run: str, table: str, rows: int, csv: bool) -> None:
    """Print a table of RUN (docs/tables.md describes them).

    \b
    Example:
      gross show runs/quickstart selections
      gross show runs/quickstart configurations --csv > configurations.csv
    """
    from gross_ray.results.store import read_table

    if csv and click.get_current_context().get_parameter_source("rows") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--rows {rows} with --csv, which prints all rows: leave one of them out")
    frame = read_table(run, table)
    if csv:
        click.echo(frame.to_csv(index=False), nl=False)
        return
    shown = frame.head(rows) if rows else frame
    click.echo(shown.to_string(index=False) if len(frame) else f"{table}: no rows yet")
    if len(shown) < len(frame):
        click.echo(f"... {len(frame) - len(shown)} more rows (--rows 0 for all)")


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown, and write no page.")
@click.option(
    "--to",
    "target",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the page there [RUN/report.html].",
)
def report(run: str, markdown: bool, target: Path | None) -> None:
    """Print the results of RUN: the paper's Tables 2 and 3, and the sweep over alpha; says what is missing.

    Also write them as a page, one HTML file that opens without a network: every configuration by cost and accuracy,
    with a filter by budget, Figure 1, the supernet against training on its own, the decompositions, the training
    curves, the experiment. A run need not be finished.

    \b
    Example:
      gross report runs/quickstart
      gross report s3://bucket/runs/a --to a.html
      gross report runs/quickstart --markdown > results.md
    """
    from gross_ray.report.page import check_target, write_page
    from gross_ray.report.terminal import results
    from gross_ray.results.store import RunStore

    if markdown and target is not None:
        raise click.UsageError(f"--to {target} with --markdown, which writes no page: leave one of them out")
    check_target(target)
    store = RunStore.open(run)
    click.echo(results(store, markdown=markdown))
    if not markdown:
        click.echo(f"page: {write_page(store, target)}", err=True)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--configuration", required=True, help="Group-sizes in layer order, like 8-16-64.")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="FILE.onnx, FILE.pt2 (torch.export) or FILE.safetensors (weights).",
)
@click.option("--seed", type=int, help="Which repeat of it [the most accurate one on the validation split].")
@click.option(
    "--fold",
    "objective",
    type=click.Choice(["none", "macs", "parameters", "activations", "latency_ms"]),
    default="none",
    show_default=True,
    help="Write a layer as the dense convolution that it equals where that has less of this; latency_ms: where it is "
    "faster on this machine.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images of a batch that is timed for --fold latency_ms [1].")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where --fold latency_ms times [cuda where there is one]."
)
def export(
    run: str,
    configuration: str,
    target: Path,
    seed: int | None,
    objective: str,
    batch: int | None,
    device: str | None,
) -> None:
    """Write a validated configuration of RUN as a plain network, and beside it FILE.json: what to know of it.

    The weights are those of its own training. The file is used without gross_ray: the card says how to feed it.

    \b
    Example:
      gross export runs/quickstart --configuration 16-16-16 --to model.onnx
      gross export runs/quickstart --configuration 16-16-16 --to model.onnx --fold latency_ms
    """
    import torch

    from gross_ray.results.store import RunStore
    from gross_ray.search.latency import LatencyOptions
    from pipelines.exporting import export_validated

    timed = {"--batch": batch, "--device": device}
    given = {name: value for name, value in timed.items() if value is not None}
    refuse_alone("--fold latency_ms", objective == "latency_ms", given)
    lines = export_validated(
        RunStore.open(run),
        configuration,
        target,
        seed=seed,
        objective=None if objective == "none" else objective,
        latency=LatencyOptions(batch_size=batch or 1),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    click.echo("\n".join(lines))


if __name__ == "__main__":
    # Ray's workers of a source checkout find the packages beside this file.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()

"""The command line: commands and their options; the bodies of the commands are in `pipelines.commands`."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.commands.one_line_errors import OneLineErrors
from pipelines.commands.options import (
    MODEL_HELP,
    OUT_HELP,
    WORK_PARAMETERS,
    budgets_of,
    callback_option,
    compress_options,
    configurations_of,
    costs_of,
    experiment_options,
    latency_options,
    refuse_alone,
    refuse_beside,
    runtime_options,
    whole_numbers,
    work_options,
)
from pipelines.home import provide_home


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="gross-ray")
def main() -> None:
    """Find the grouped-convolution version of a convnet that is most accurate within your budget.

    \b
    Example:
      gross run --preset quickstart --out runs/quickstart
      gross report runs/quickstart
    """
    provide_home()
    sys.path.append(os.getcwd())  # for the user's models and callbacks: a console script does not search there


@main.command()
@click.option("--out", required=True, help=OUT_HELP)
@click.option(
    "--reuse",
    metavar="RUN",
    help="Take over the units of another run folder that the settings do not change, like supernets for a new search.",
)
@click.option(
    "--reuse-evaluations",
    is_flag=True,
    help="With --reuse: the strategy of this search (search.strategy) begins with the evaluations of that run.",
)
@functools.partial(experiment_options, preset_required=True)
@callback_option
@work_options
def run(out: str, reuse: str | None, reuse_evaluations: bool, **how: Any) -> None:
    """Do every stage, from training to the tables and the page of results; repeat the command to continue.

    \b
    Example:
      gross run --preset quickstart --out runs/quickstart
      gross run --preset fashion --out runs/short --set training.epochs=3 --set training.seeds=1
      gross run --preset quickstart --out runs/b --reuse runs/quickstart --set 'search.limits=["parameters=60k"]'
    """
    refuse_alone("--reuse", reuse is not None, {"--reuse-evaluations": reuse_evaluations or None})
    from pipelines.commands import running

    running.run(out, reuse=reuse, reuse_evaluations=reuse_evaluations, **how)


@main.command()
@compress_options
@runtime_options
@work_options
def compress(runtime: str | None, batch_size: int | None, threads: int | None, **how: Any) -> None:
    """Compress a trained network within a budget: do every stage, and write the best network found as a file.

    Learning rates, batches and choices are made for the network and its images, and printed first. OUT is an ordinary
    run folder; the same command again continues it.

    \b
    Example:
      gross compress --model my.nets:net --weights net.pt --data folder:images --budget macs=40% --out runs/a
      gross compress --model resnet20 --weights resnet20.th --data cifar10 --budget latency_ms=60% --out runs/b
    """
    from pipelines.commands import compressing

    compressing.compress(timed={"runtime": runtime, "batch_size": batch_size, "threads": threads}, **how)


def _add_stage(name: str, description: str) -> None:
    """Add the command of a stage without special options."""

    def command(run: str, **how: Any) -> None:
        from pipelines.commands import running

        running.run_stage(name, run, **how)

    help_text = f"{description}\n\n\b\nExample:\n  gross {name} runs/quickstart"
    decorated = experiment_options(work_options(command))
    main.command(name, help=help_text)(click.argument("run", metavar="RUN")(decorated))


for _name, _description in {
    "train": "Train the base networks (with --preset if RUN is new).",
    "decompose": "Decompose every layer at every group-size.",
    "reconstruct": "Reconstruct the responses of the full network in the supernet.",
    "finetune": "Fine-tune the supernet, group-sizes sampled at each step.",
}.items():
    _add_stage(_name, _description)


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--budget",
    "budgets",
    metavar="COST=LIMIT",
    multiple=True,
    callback=budgets_of,
    help="Print the best configurations within this limit on macs, macs_paper, parameters or latency_ms, like "
    "macs=2.66M (k, M, G) or macs=40%, of the full network's; may be repeated: all limits apply.",
)
@click.option("--top", type=click.IntRange(min=1), help="How many to print under --budget [5].")
@click.option("--pareto", is_flag=True, help="Print the Pareto front of accuracy and --costs.")
@click.option(
    "--costs",
    callback=costs_of,
    help="One or more of macs, macs_paper, parameters, latency_ms, with commas [the first budget's, else macs].",
)
@experiment_options
@work_options
def search(
    run: str, budgets: tuple[Any, ...], top: int | None, pareto: bool, costs: list[str] | None, **how: Any
) -> None:
    """Evaluate every configuration and select under the experiment's budgets, for `gross validate`.

    With --budget or --pareto, only print an answer from a finished search.

    \b
    Example:
      gross search runs/quickstart
      gross search runs/quickstart --budget macs=2.66M --budget parameters=90k --top 5
      gross search runs/quickstart --pareto --costs macs,latency_ms
    """
    refuse_alone("--budget", bool(budgets), {"--top": top})
    refuse_alone("--pareto", pareto, {"--costs": costs and ",".join(costs)})
    if budgets or pareto:
        refuse_beside(f"{'--budget' if budgets else '--pareto'}, which only answers", *WORK_PARAMETERS)
        from pipelines.commands import choosing

        choosing.best_and_front(run, budgets=budgets, top=top or 5, pareto=pareto, costs=costs)
    else:
        from pipelines.commands import running

        running.run_stage("search", run, **how)


@main.command()
@click.argument("run", metavar="RUN")
@latency_options
@runtime_options
def latency(run: str, device: str | None, target: Path | None, source: Path | None, **asked: int | str | None) -> None:
    """Time networks of RUN's layers in a runtime on this machine, and predict latency_ms of each configuration.

    It needs only the base network. Before the search, it allows limits like latency_ms=1.5 and latency_ms=60%
    (search.limits). To time on a device outside the cluster, copy RUN there, or copy the times: --to there, --from
    here.

    \b
    Example:
      gross latency runs/quickstart --batch 1
      gross latency runs/quickstart --runtime openvino --batch 64 --threads 2
      gross latency runs/quickstart --device cuda --to h200.parquet
      gross latency runs/quickstart --from phone.parquet
    """
    from pipelines.commands import measuring

    measuring.latency(run, device, asked, target=target, source=source)


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--configuration",
    "configurations",
    metavar="GROUP-SIZES",
    multiple=True,
    callback=configurations_of,
    help="Train this configuration, like 8-16-64 or 8-d-64, not the fixed and the selected ones; may be repeated.",
)
@callback_option
@experiment_options
@work_options
def validate(run: str, configurations: tuple[Any, ...], **how: Any) -> None:
    """Train the fixed and the selected configurations on their own, each as a trial of Ray Tune.

    \b
    Example:
      gross validate runs/quickstart
      gross validate runs/quickstart --configuration 4-8-64
      gross validate runs/quickstart --callback my_callbacks:Notify
    """
    from pipelines.commands import running

    if configurations:
        running.validate_named(run, configurations, **how)
    else:
        running.run_stage("validate", run, **how)


@main.command("sweep-alpha")
@click.argument("run", metavar="RUN")
@callback_option
@experiment_options
@work_options
def sweep_alpha(run: str, **how: Any) -> None:
    """Train supernets with several sampling temperatures alpha, each as a trial of Ray Tune, and compare them.

    The metric of a trial is supernet_accuracy: the mean accuracy of the fixed configurations in the supernet, on the
    validation split, after the latest epoch.

    \b
    Example:
      gross sweep-alpha runs/quickstart
      gross sweep-alpha runs/quickstart --callback my_callbacks:Notify
    """
    from pipelines.commands import running

    running.run_stage("sweep-alpha", run, **how)


@main.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the named experiments and their cost, or print every field of the experiment NAME.

    \b
    Example:
      gross presets
      gross presets quickstart
    """
    from pipelines.commands import listing

    listing.presets(name)


@main.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--verify", is_flag=True, help="Compare the images with the hashes that were stored with them.")
@click.option("--clear", is_flag=True, help="Delete the files of each KEY, or of all datasets: gross data all --clear.")
@click.option("--data-root", metavar="FOLDER", help="Folder of the datasets [~/.cache/gross_ray].")
def data(keys: tuple[str, ...], verify: bool, clear: bool, data_root: str | None) -> None:
    """List the datasets that were read into files, because memory does not hold them; check or delete the files.

    \b
    Example:
      gross data
      gross data d27f00c66b646daa --verify
      gross data all --clear
    """
    from pipelines.commands import image_files

    image_files.data(keys, verify=verify, clear=clear, root=data_root)


@main.command()
@click.option("--model", required=True, metavar="NAME", help=MODEL_HELP)
@click.option("--layers", multiple=True, metavar="GLOB", help="Layers to decompose, by name or glob [all]; repeatable.")
@click.option("--group-sizes", metavar="LIST", help="Group-sizes, like 1,4,16,32 [powers of two].")
@click.option(
    "--layer-group-sizes",
    metavar="GLOB=LIST",
    multiple=True,
    help="Group-sizes of these layers, like 'layer4.*=16,32'; may be repeated.",
)
@click.option("--keep-dense", is_flag=True, help="Make the original layer a choice too, written d.")
@click.option("--image-size", type=click.IntRange(1), default=32, show_default=True, help="Pixels on an image's side.")
@click.option("--num-classes", type=click.IntRange(1), default=10, show_default=True, help="Number of classes.")
@functools.partial(runtime_options, what="Also time networks of these layers in it.")
def inspect(
    group_sizes: str | None, runtime: str | None, batch_size: int | None, threads: int | None, **what: Any
) -> None:
    """Preview the decomposition of a network: layers, group-sizes, the space and its cheapest configuration.

    \b
    Example:
      gross inspect --model vgg16 --group-sizes 1,4,16,32
      gross inspect --model my_package.networks:small_resnet --image-size 64 --layers 'layer[34].*'
      gross inspect --model resnet18 --group-sizes 1,4,16 --keep-dense --runtime onnxruntime --image-size 224
    """
    sizes = whole_numbers("--group-sizes", group_sizes)
    refuse_alone("--runtime", runtime is not None, {"--batch": batch_size, "--threads": threads})
    from pipelines.commands import inspecting

    timed = None if runtime is None else {"runtime": runtime, "batch_size": batch_size or 1, "threads": threads or 1}
    inspecting.inspect(group_sizes=sizes, timed=timed, **what)


@main.command()
@click.argument("run", metavar="RUN")
def status(run: str) -> None:
    """Print the finished and planned units of each stage of RUN.

    \b
    Example:
      gross status runs/quickstart
    """
    from pipelines.commands import standing

    standing.status(run)


@main.command()
@click.argument("run", metavar="RUN")
def check(run: str) -> None:
    """Read every table and checkpoint of RUN, and delete damaged ones: their stages make them anew.

    Every command checks the files that it reads; this one checks all files.

    \b
    Example:
      gross check runs/quickstart
    """
    from pipelines.commands import checking

    checking.check(run)


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
    if csv:
        refuse_beside("--csv, which prints all rows", "rows")
    from pipelines.commands import showing

    showing.show(run, table, rows=rows, csv=csv)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown, and write no page.")
@click.option(
    "--to",
    "target",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the page to FILE [RUN/report.html].",
)
def report(run: str, markdown: bool, target: Path | None) -> None:
    """Print the results of RUN, the paper's Tables 2 and 3 and the sweep over alpha, and which are missing.

    Also write a page, one HTML file that needs no network: every configuration by cost and accuracy with a filter by
    budget, Figure 1, the supernet against training on its own, the decompositions, the training curves, the
    experiment. The run may be unfinished.

    \b
    Example:
      gross report runs/quickstart
      gross report s3://bucket/runs/a --to a.html
      gross report runs/quickstart --markdown > results.md
    """
    if markdown:
        refuse_beside("--markdown, which writes no page", "target")
    from pipelines.commands import reporting

    reporting.report(run, markdown=markdown, target=target)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--configuration", required=True, help="Group-sizes in layer order, like 8-16-64; d: dense.")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="FILE.onnx, FILE.pt2 (torch.export) or FILE.safetensors (weights).",
)
@click.option("--seed", type=int, help="Seed of its training [the most accurate on the validation split].")
@click.option(
    "--fold",
    "objective",
    type=click.Choice(["none", "macs", "parameters", "activations", "latency_ms"]),
    help="Write a layer as the dense convolution that it equals if that has less of this cost [latency_ms, in the "
    "runtime measured last, if gross latency measured it; else none].",
)
@click.option("--check", is_flag=True, help="Compare the file with the network on the run's test images.")
@click.option("--download", is_flag=True, help="Download the images that --check needs, if they are missing.")
@click.option("--data-root", metavar="FOLDER", help="Folder of the images that --check needs [~/.cache/gross_ray].")
def export(
    run: str,
    configuration: str,
    target: Path,
    seed: int | None,
    objective: str | None,
    check: bool,
    download: bool,
    data_root: str | None,
) -> None:
    """Write a validated configuration of RUN as a plain network, and its model card beside it, as FILE.json.

    The weights are those of its own training. The file works without gross_ray; the card describes its input. On the
    machine of the latency measured last, the file is timed again as written.

    \b
    Example:
      gross export runs/quickstart --configuration 16-16-16 --to model.onnx
      gross export runs/quickstart --configuration 16-16-16 --to model.onnx --fold latency_ms --check
    """
    refuse_alone("--check", check, {"--download": download or None, "--data-root": data_root})
    from pipelines.commands import exporting
    from pipelines.driver import DataSource

    exporting.export(
        run,
        configuration,
        target,
        seed=seed,
        objective=objective,
        images=DataSource(root=data_root, download=download) if check else None,
    )


if __name__ == "__main__":
    # So that Ray's workers of a source checkout find the packages beside this file.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()

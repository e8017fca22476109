"""Every figure that needs a GPU, in ten minutes: for a GPU that is lent seldom and for a quarter of an hour.

    python benchmarks/on_gpu.py --minutes 10 --out FOLDER [--parts training stacks ...] [--data FOLDER] [--reuse RUN]
    python benchmarks/on_gpu.py --cpu --out FOLDER      all of it in miniature, to see that it works
    python benchmarks/on_gpu.py --table FOLDER          write the table of benchmarks/README.md from FOLDER

The parts run one after another, each in a process of its own and under a limit of its own in seconds. Each figure is
written to FOLDER/results.json and FOLDER/results.md as soon as it is measured. When the time is over, the figures that
are missing stay so. A second run into the same folder adds to it: of two figures of one case the later one counts.
FOLDER also gets log.txt, and cifar.tar with the run on CIFAR-10, which --reuse takes over once it is unpacked. The
command needs Python 3.11 with torch, torchvision, pandas, pyarrow, click, rich, scipy, safetensors, pillow and onnx,
for the tests also pytest, hypothesis and filelock, and neither Ray nor TensorLy nor a network. `make gpu-wheels` puts
the images into .gpu/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # where gross_ray is not installed
STARTED = time.monotonic()  # what is imported below takes seconds

import torch  # noqa: E402
from gpu_parts import MINIATURE, PARTS, Figure, Scale, of_machine  # noqa: E402

from gross_ray.atomic import whole_or_not_at_all  # noqa: E402
from gross_ray.errors import one_line  # noqa: E402

README = ROOT / "benchmarks" / "README.md"
START, END = "<!-- on_gpu: python benchmarks/on_gpu.py --table FOLDER -->", "<!-- /on_gpu -->"
RESERVE = 25.0
"""Seconds at the end in which nothing is measured, to end processes and write files."""
NOT_MEASURED = "not measured"
PR_SET_PDEATHSIG = 1
"""Linux's request for a signal when the parent process ends."""


@dataclass
class Results:
    """The figures so far, and how each part ended."""

    machine: dict[str, Any] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By part and name of the case, separated by a slash."""

    @classmethod
    def of(cls, folder: Path) -> Results:
        """Return the results in a folder, none if it does not exist."""
        file = folder / "results.json"
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else cls()

    def write(self, folder: Path) -> None:
        """Replace the files of a folder."""
        texts = {"results.json": json.dumps(asdict(self), indent=1), "results.md": self.table(folder_scale(self))}
        for name, text in texts.items():
            with whole_or_not_at_all(folder / name) as file:
                file.write_text(text, encoding="utf-8")

    def table(self, scale: Scale) -> str:
        """Return every case as a table in Markdown, with its figure or the words that it is not measured."""
        lines = [self._heading(), "", "| what | figure | times as fast as | wanted | |", "|---|---|---|---|---|"]
        for part, (cases_of, limit) in PARTS.items():
            lines.append(f"| **{part}** | {self.ends.get(part, NOT_MEASURED)} | | | at most {limit} s |")
            for name, case in cases_of(scale).items():
                found = self.figures.get(f"{part}/{name}")
                cells = [NOT_MEASURED, "", case.wanted, ""] if found is None else _cells(found, case.wanted)
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _heading(self) -> str:
        if not self.machine:
            return "This command has not run on a GPU yet."
        about = [f"{name} {self.machine.get(name, 'unknown')}" for name in ("device", "python", "torch")]
        return f"{', '.join(about)}. Beside each part stand the day and the commit of its last measurement."


def _cells(found: dict[str, Any], wanted: str) -> list[str]:
    figure = Figure(**found)
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}: {figure.baseline}"
    value = "failed" if figure.value is None else f"{figure.value:,.4g} {figure.unit}"
    return [value, ratio, wanted, figure.note.replace("|", "/")]


def folder_scale(results: Results) -> Scale:
    """Return the scale at which results were measured, by default a GPU's."""
    stored = results.machine.get("scale", {})
    known = {one.name for one in fields(Scale)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Scale(**{name: value for name, value in values.items() if name in known})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="when this time is over, the rest is given up")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="measure only these")
    parser.add_argument("--cpu", action="store_true", help="in miniature, on a CPU")
    parser.add_argument("--data", default=str(ROOT / ".gpu" / "cifar10"), help="folder of CIFAR-10 as Parquet")
    parser.add_argument("--reuse", default="", help="run folder whose units the run on CIFAR-10 takes over")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write the table of benchmarks/README.md")
    asked = parser.parse_args()
    if asked.table is not None:
        README.write_text(with_table(README.read_text(encoding="utf-8"), Results.of(asked.table)), encoding="utf-8")
        return
    if asked.out is None or asked.minutes <= 0:
        parser.error("--out FOLDER is missing, or --minutes is not above 0")
    if asked.cpu and asked.reuse:
        parser.error("--reuse with --cpu: the miniature takes over nothing; leave one of the two out")
    scale = MINIATURE if asked.cpu else Scale(data=asked.data, reuse=asked.reuse)
    run(asked, scale)


def with_table(readme: str, results: Results) -> str:
    """Return benchmarks/README.md with the table of the results between its marks."""
    before, _, rest = readme.partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} lacks the marks {START} and {END}")
    return f"{before}{START}\n\n{results.table(folder_scale(results))}\n{END}{after}"


def measure(part: str, scale: Scale, log: Path, out: Connection) -> None:
    """Measure the cases of a part in this process, a new one, and send each figure."""
    os.setpgid(0, 0)  # its processes end with it; a session of its own would outlive whoever ends this command
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if scale.device == "cpu":
        torch.set_num_threads(1)
        torch._dynamo.config.disable = True  # torch.compile compiles for minutes
    if scale.device == "cuda" and not torch.cuda.is_available():  # only here: with CUDA, a process cannot fork
        out.send({"error": "torch finds no GPU here; --cpu measures everything in miniature"})
        return
    out.send({"machine": of_machine(scale)})
    for name, case in PARTS[part][0](scale).items():
        try:
            figure = case.measure()
        except Exception as error:  # of one case: the others are still measured
            traceback.print_exc()
            figure = Figure(None, "", note=f"failed: {one_line(error)}")
        out.send({"name": name, "figure": asdict(figure)})
    sys.stdout.flush()
    sys.stderr.flush()


def run(asked: argparse.Namespace, scale: Scale) -> None:
    """Run the parts one after another, and write what they send."""
    ends_at = STARTED + 60 * asked.minutes - RESERVE
    asked.out.mkdir(parents=True, exist_ok=True)
    results, when = Results.of(asked.out), f"{time.strftime('%Y-%m-%d')}, commit {_commit()}"
    if results.machine and folder_scale(results).device != scale.device:
        raise SystemExit(f"--out {asked.out}: it has results of {folder_scale(results).device}; name another folder")
    results.machine["scale"] = asdict(replace(scale, data="", reuse="", run=""))  # no paths of this machine
    with tempfile.TemporaryDirectory() as temporary:  # not in --out, from which few files may come back
        scale = replace(scale, run=f"{temporary}/cifar")
        for part in asked.parts:
            limit = min(scale.patience * PARTS[part][1], ends_at - time.monotonic())
            if limit <= 0:
                results.ends.setdefault(part, "given up: the time was over")
            else:
                started = time.monotonic()
                for message in _messages(part, scale, asked.out, limit, results):
                    if "error" in message:
                        raise SystemExit(message["error"])
                    results.machine |= message.get("machine", {})
                    if "figure" in message:
                        results.figures[f"{part}/{message['name']}"] = message["figure"]
                        print(f"{part}: {message['name']}: {message['figure']}", flush=True)
                    results.write(asked.out)
                    _pack(Path(scale.run), asked.out)
                results.ends[part] += f" after {time.monotonic() - started:.0f} s ({when})"
            print(f"{part}: {results.ends[part]}", flush=True)
            results.write(asked.out)
        _pack(Path(scale.run), asked.out)


def _commit() -> str:
    try:
        words = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # git is not installed
        return "unknown"


def _pack(folder: Path, out: Path) -> None:
    """Put the run on CIFAR-10, if there is one, into cifar.tar, without trainings that are under way."""
    if not folder.is_dir():
        return
    with whole_or_not_at_all(out / "cifar.tar") as file, tarfile.open(file, "w") as archive:
        archive.add(folder, "cifar", filter=lambda one: None if one.name.endswith("-under-way") else one)


def _messages(part: str, scale: Scale, folder: Path, limit: float, results: Results) -> Iterator[dict[str, Any]]:
    """Yield what the process of a part sends, until it ends or its time is over; then it is killed."""
    ends_at = time.monotonic() + limit
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # A fork: no part imports everything again, and this process has not touched the GPU.
    context = multiprocessing.get_context("fork")
    process = context.Process(target=measure, args=(part, scale, folder / "log.txt", theirs))
    process.start()
    with suppress(OSError):  # the process does the same; whoever is first
        os.setpgid(process.pid, process.pid)
    theirs.close()
    results.ends[part] = "stopped by its limit"
    try:
        while ours.poll(max(0.0, ends_at - time.monotonic())):
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                results.ends[part] = "failed, see log.txt" if process.exitcode else "done"
                break
            yield message
    finally:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


if __name__ == "__main__":
    main()

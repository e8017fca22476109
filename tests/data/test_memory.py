"""How much memory is free, by the files of a machine and of its container."""

from __future__ import annotations

from pathlib import Path

import pytest

from gross_ray.data import image_files
from gross_ray.data.image_files import Reading
from gross_ray.data.memory import free_memory
from gross_ray.experiment import DataOptions

GB = 10**9
UNLIMITED = 9223372036854771712
"""What a container of cgroups 1 without a limit says."""


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   {8 * GB // 1000 * 1000 // 1024} kB\n"}
TWO = "sys/fs/cgroup"
ONE = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2**32),
        ({"proc/meminfo": "MemTotal: 9 kB\n"}, 2**32),
        ({"proc/meminfo": "MemAvailable: 7 kB\n"}, 7 * 1024),
        ({**MACHINE, f"{TWO}/memory.max": "max\n", f"{TWO}/memory.current": "5\n"}, None),
        ({**MACHINE, f"{TWO}/memory.max": f"{4 * GB}\n", f"{TWO}/memory.current": f"{3 * GB}\n"}, GB),
        ({**MACHINE, f"{TWO}/memory.max": f"{20 * GB}\n", f"{TWO}/memory.current": f"{3 * GB}\n"}, None),
        ({**MACHINE, f"{TWO}/memory.max": "9", f"{TWO}/memory.current": "10"}, 0),
        (
            {
                **MACHINE,
                f"{TWO}/memory.max": f"{4 * GB}",
                f"{TWO}/memory.current": f"{4 * GB}",
                f"{TWO}/memory.stat": f"anon 1\nfile {2 * GB}\nfile_mapped 7\n",
            },
            2 * GB,
        ),
        ({**MACHINE, f"{ONE}/memory.limit_in_bytes": f"{UNLIMITED}", f"{ONE}/memory.usage_in_bytes": "5"}, None),
        (
            {
                **MACHINE,
                f"{ONE}/memory.limit_in_bytes": f"{4 * GB}",
                f"{ONE}/memory.usage_in_bytes": f"{3 * GB}",
                f"{ONE}/memory.stat": f"cache 9\ntotal_cache {GB}\n",
            },
            2 * GB,
        ),
        ({f"{TWO}/memory.max": "1000", f"{TWO}/memory.current": "400"}, 600),
    ],
)
def test_the_least_that_a_file_says(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    of_machine = 8 * GB // 1000 * 1000 // 1024 * 1024
    assert free_memory(system(tmp_path, files)) == (of_machine if expected is None else expected)


def test_this_machine_has_free_memory() -> None:
    assert 2**20 < free_memory() < 2**50


def test_a_quarter_of_the_free_memory_is_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "free_memory", lambda: 400)
    assert Reading(DataOptions()).fits(100) and not Reading(DataOptions()).fits(101)
    assert Reading(DataOptions(memory=300)).fits(300) and not Reading(DataOptions(memory=300)).fits(301)

"""What is done, and by whom: stages, executors, commands."""

import os
import sys
from pathlib import Path

# A user's project may have a folder `pipelines` too: Python searches its modules after ours (gross_ray.own_code).
# Another checkout of this package is not searched.
for _parent in (*sys.path, os.getcwd()):
    _folder = Path(_parent, "pipelines").absolute()
    if str(_folder) not in __path__ and _folder.is_dir():
        _first = _folder / "__init__.py"
        if not _first.is_file() or not _first.read_text(encoding="utf-8").startswith(f'"""{__doc__}"""'):
            __path__.append(str(_folder))

"""Old import path of `watching` and of the terminal's Reporter, for modules that still use it; goes once none does."""

from pipelines.commands.terminal import Reporter
from pipelines.watching import Furthest, Patience, StageProgress

__all__ = ["Furthest", "Patience", "Reporter", "StageProgress"]

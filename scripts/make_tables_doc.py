"""Write docs/tables.md from the schemas in gross_ray/run/tables.py."""

from pathlib import Path

from gross_ray.run.tables import describe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tables.md"

if __name__ == "__main__":
    PAGE.write_text(describe(), encoding="utf-8")
    print(f"wrote {PAGE}")

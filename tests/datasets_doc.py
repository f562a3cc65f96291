"""Write docs/datasets.md: its hand-written head, then the tables that the schemas give."""

from pathlib import Path

from flows.commands.schema import schema_markdown

TARGET = Path(__file__).parent.parent / "docs" / "datasets.md"
MARK = "<!-- generated below by `make docs` from pipeline/schema.py -->"

if __name__ == "__main__":
    head = TARGET.read_text(encoding="utf-8").split(MARK)[0]
    TARGET.write_text(f"{head}{MARK}\n\n{schema_markdown()}", encoding="utf-8")

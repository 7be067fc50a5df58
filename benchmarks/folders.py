"""Where a study writes: records, figures, tables of a page; and that a short run, which only shows that it works, writes over none."""

from __future__ import annotations

import argparse
from pathlib import Path

from ddim_ode.files import output_folder, replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES, SHORT = ROOT / "benchmarks/results", ROOT / "docs/figures", ROOT / "out/paper"


def add_folders(parser: argparse.ArgumentParser, short: str) -> None:
    """The options --out, --figures and --short; `short` says what the last leaves."""
    parser.add_argument("--out", type=Path, help="folder for the record (benchmarks/results; with --short out/paper)")
    parser.add_argument("--figures", type=Path, help="folder for figures (docs/figures; with --short out/paper)")
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--figures-only", action="store_true", help="draw from the record there is, measure nothing")


def folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """Folders for the record and for figures, made where they are missing."""
    found = []
    for given, usual, name in ((options.out, RESULTS, "out"), (options.figures, FIGURES, "figures")):
        folder = given or (SHORT if options.short else usual)
        if options.short and folder.resolve() == usual:
            raise SystemExit(f"--short shows that it works and is no record: give --{name} another folder than {usual}")
        found.append(output_folder(folder))
    return found[0], found[1]


def recorded(path: Path) -> Path:
    """A file that figures are to be drawn from, which must be there."""
    if not path.exists():
        raise SystemExit(f"no {path} to draw from: run it without --figures-only first")
    return path


def into_page(page: str, tables: dict[str, str]) -> None:
    """Put tables into a page of the docs, each between the comments that bear its name."""
    path = ROOT / "docs" / page
    text = path.read_text("utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

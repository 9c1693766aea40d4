"""The table of measured rows: every file names a row that can be made again, and every row what it is made from."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("results", ROOT / "tools/results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows()


def test_rows_are_made_from_rows(table):
    for name, row in table.items():
        made_from = [*row.get("members", []), *(row[k] for k in ("rescores", "exports", "promises") if k in row)]
        assert made_from or row["settings"], name
        for base in made_from:
            assert "settings" in table[base], f"{name}: {base} is not trained"


def test_files_say_how_they_were_made(table):
    files = [json.loads(p.read_text()) for p in (ROOT / "results").glob("*.json")]
    rows = {f["row"]: f for f in files if "row" in f}
    assert len(rows) > 80 and set(rows) <= set(table)
    for name, row in rows.items():
        assert row["made_by"].endswith(name) and row["data"] == table[name]["data"], name
        for setting in table[name].get("settings") or ():
            assert setting in row["settings"], f"{name}: {setting}"

"""Tests of what is recorded under results/, and of what the two READMEs say of it."""

import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

import benchmark
import tables
from common import HERE

TEXTS = {path.relative_to(HERE).as_posix(): path.read_text() for path in tables.FILES}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_up_to_date(name):
    assert tables.rendered(TEXTS[name]) == TEXTS[name], "python results/tables.py writes them anew"
    stale = re.sub(r"\d\.\d", "9.9", TEXTS[name])
    assert tables.rendered(stale) != stale


def test_every_block_is_used():
    used = re.findall(r"<!-- (\w+) -->\n", "".join(TEXTS.values()))
    assert sorted(used) == sorted(["end"] * (len(used) // 2) + list(tables.BLOCKS))


def test_recordings_are_runs():
    for path in tables.RECORDED:
        benchmark.read_run(path)  # raises where it is none
        assert list(pd.read_csv(path)) == benchmark.COLUMNS, path
    assert (HERE / benchmark.RECORDED_PLOT).is_file()


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^):#]+)\)", text):
            assert (HERE / name).parent.joinpath(target).exists(), (name, target)


def test_tables_are_written(tmp_path):
    """The script does what the test above compares with."""
    copy = shutil.copytree(HERE / "results", tmp_path / "results")
    (tmp_path / "README.md").write_text("<!-- headline -->\nold\n<!-- end -->\n")
    subprocess.run([sys.executable, copy / "tables.py"], check=True)
    assert (tmp_path / "README.md").read_text() == f"<!-- headline -->\n{tables.headline()}\n<!-- end -->\n"

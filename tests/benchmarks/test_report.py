"""The files of results, and the page, the table and the index that are written from them."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.common import pictures, results, setting, tables
from benchmarks.measured.section import Section, spent

ROOT = Path(__file__).parents[2]
SECTIONS = [section for sections in report.PARTS.values() for section in sections]


def row(model, method, repeat, cpu, **more):
    scores = {"worst_mean": 0.05, "sd_low": 0.97, "sd_high": 1.04, "seconds": 3.0 * cpu, "cpu_seconds": cpu}
    where = {"machine": "M", "versions": "V", "commit": "abc", "date": "2026-01-01", "task_cpu_seconds": 90.0}
    key = {"model": model, "method": method, "repeat": repeat, "seed": repeat}
    return {**key, **scores, **where, **more}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))


class TestResults:
    def test_a_line_says_where_it_was_measured_and_what_it_took(self, tmp_path):
        path = tmp_path / "new" / "lines.jsonl"
        results.append(path, {"key": 1, "value": float("inf")})
        results.append(path, {"key": 2, "value": 0.5})
        first, second = results.read(path)
        assert first["value"] is None
        assert second["value"] == 0.5
        assert {"machine", "versions", "commit", "date", "task_seconds", "task_cpu_seconds"} <= set(second)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", second["date"])
        assert second["task_seconds"] < 10.0

    def test_what_a_file_has_is_not_run_again(self, tmp_path, capsys):
        path, ran = tmp_path / "lines.jsonl", []

        def run(key):
            ran.append(key["key"])
            if key["key"] == 2:
                raise ValueError("no\nsecond line")
            return {"value": key["key"]}

        for number in (2, 3):
            results.collect([{"key": k} for k in range(number)], path, run, lambda row: f"did {row['key']}")
        results.collect([{"key": 2}], path, run, lambda row: "again")
        assert ran == [0, 1, 2]
        assert [line.get("value") for line in results.read(path)] == [0, 1, None]
        assert results.read(path)[2]["error"] == "ValueError: no"

    def test_settings_are_told_once(self):
        lines = [{"machine": "M", "commit": "abc"}] * 2 + [{"setting": "old"}, {}]
        assert results.settings(lines) == "M; abc\nold\n"

    def test_the_commit_is_the_last_of_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(setting, "ROOT", tmp_path)

        def change(name, text):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

        def git(*arguments):
            told = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments]
            subprocess.run(told, check=True, capture_output=True)

        git("init")
        change("pyro_flowvi/code.py", "1")
        git("add", ".")
        git("commit", "-m", "code")
        first = setting.commit()
        assert re.fullmatch("[0-9a-f]{7,}", first)
        change("docs/page.md", "1")
        git("add", ".")
        git("commit", "-m", "a page")
        change("docs/page.md", "2")
        assert setting.commit() == first
        change("pyro_flowvi/code.py", "2")
        assert setting.commit() == f"{first}-dirty"
        git("commit", "-a", "-m", "code again")
        assert setting.commit() not in (first, f"{first}-dirty")

    def test_figures_are_short(self):
        values = (None, float("inf"), 1234.5, 12.345, 1.2345, -0.001)
        assert [tables.number(value) for value in values] == ["–", "∞", "1,234", "12.3", "1.23", "0.00"]


class TestReport:
    def test_the_pages_are_those_of_the_results(self):
        """Where this fails: `python -m benchmarks.report`."""
        assert report.main(["--check"]) == 0

    def test_writes_and_checks(self, tmp_path, capsys):
        write(tmp_path / "results" / "time_to_right.jsonl", self.times())
        (tmp_path / "docs").mkdir()
        readme = tmp_path / "README.md"
        readme.write_text("# a\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nb\n")
        arguments = ["--results", str(tmp_path / "results"), "--root", str(tmp_path)]
        assert report.main([*arguments, "--check"]) == 1
        assert "old" in readme.read_text()
        assert report.main(arguments) == 0
        assert report.main([*arguments, "--check"]) == 0
        told = readme.read_text()
        assert told.startswith("# a\n")
        assert told.endswith("\n\nb\n")
        assert "old" not in told
        assert "| AR(5) | 2.00 (1.00 to 4.00) | 8.00 | 2 of 3 | 1 of 1 |" in told
        page = (tmp_path / "docs" / "measured.md").read_text()
        assert "benchmarks/results/time_to_right.jsonl" in page
        assert "M; V; commit abc; 2026-01-01" in page
        assert page.count("\n### ") == 1  # no section without results
        assert "no markers <!-- index: begin -->" in capsys.readouterr().err

    def times(self):
        rows = [row("arK-arK", "fit", i, cpu) for i, cpu in enumerate((1.0, 2.0, 4.0))]
        rows[0]["sd_low"] = 0.8
        return [*rows, row("arK-arK", "NUTS", 0, 8.0)]

    def test_a_picture_of_other_results_is_not_shown(self, tmp_path, capsys):
        figure = pytest.importorskip("matplotlib.figure").Figure()
        path = tmp_path / "posteriordb.jsonl"
        write(path, [row("arK-arK", "fit", 0, 1.0, guide="AutoRealNVP", sliced=1.0)])
        (section,) = (section for section in SECTIONS if section.name == "posteriordb")
        picture = tmp_path / section.picture[0]
        figure.savefig(picture)
        assert pictures.drawn_from(picture) is None
        assert "![" not in section.text(tmp_path, tmp_path)
        pictures.save(figure, picture, path)
        assert "![" in section.text(tmp_path, tmp_path)
        write(path, [row("arK-arK", "fit", 0, 2.0, guide="AutoRealNVP", sliced=1.0)])
        assert "![" not in section.text(tmp_path, tmp_path)
        assert "not drawn from these results" in capsys.readouterr().err

    def test_a_file_without_markers_is_left_alone(self):
        assert report.between("# a", "measured", "|") is None

    def test_the_index(self, tmp_path):
        write(tmp_path / "time_to_right.jsonl", self.times())
        lines = report.index(tmp_path).splitlines()
        assert len(lines) == 2 + len(SECTIONS)
        assert "| 6 |" in lines[2]
        assert "no results" in lines[3]

    def test_seconds_of_lines_from_before_they_were_recorded(self):
        assert spent({"seconds": 9.0, "cpu_seconds": 2.0, "cpu_seconds_diagnose": 3.0}) == 5.0
        assert spent({"seconds": 9.0}) == 9.0
        assert spent({"fresh_seconds": 2.0, "refit_seconds": 1.0}) == 3.0

    @pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
    def test_a_section_names_a_script_and_a_picture_that_are_there(self, section: Section):
        assert (ROOT / section.script.replace(".", "/")).with_suffix(".py").exists()
        assert section.picture is None or section.picture[0].endswith(".png")

    def test_every_file_of_results_is_in_the_index(self):
        index = (ROOT / "benchmarks" / "README.md").read_text()
        for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
            assert f"`{path.name}`" in index

    def test_every_script_is_in_the_index(self):
        index = (ROOT / "benchmarks" / "README.md").read_text()
        for folder in ("fits", "mixtures", "layers", "steps", "scale"):
            for path in (ROOT / "benchmarks" / folder).glob("*.py"):
                if "__main__" in path.read_text():
                    assert f"benchmarks.{folder}.{path.stem}" in index, path

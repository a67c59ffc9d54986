"""README's commands and code work as printed.

A fenced block is `bash` or `python`; a second word in its first line, `hub` (it needs the Hub) or `setup` (it changes
the machine: clone, conda), has the block parsed only. Of the others,
- python blocks run in order in one fresh process, in an empty folder;
- `make` lines must name targets that exist;
- `papermill` lines run at the notebook's small parameters, below those that the line itself gives;
- any other command runs as it stands, in a copy of the repository.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from workbench.notebooks import parameters_of, read, settings

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "runs", ".hypothesis", "*.egg-info")
SAMPLE = """# Title
```bash
make test   # the gate
papermill notebooks/01_a.ipynb \\
    runs/a.ipynb -p seed 3
```
```bash hub
workbench fetch a/b
```
```python
x = 1
```
text
```text
not code
```
```python
print(x + 1)
```
"""


class Block(NamedTuple):
    language: str
    only_parsed: bool
    line: int  # of the fence, from 1
    text: str


def blocks(markdown):
    """The bash and python blocks of a text, in order."""
    for found in FENCE.finditer(markdown):
        language, *words = found["info"].split() or [""]
        if language in ("bash", "python"):
            unknown = set(words) - {"hub", "setup"}
            assert not unknown, f"block marked {unknown}; known marks are hub and setup"
            yield Block(language, bool(words), markdown.count("\n", 0, found.start()) + 1, found["text"])


def commands(text):
    """The commands of a bash block, continuation lines joined, comments and blank lines dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]


def environment():
    """The environment's own programs first."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def call(command, folder, timeout=300):
    """Run a command line, or a list of words, in a folder; fail with what it printed."""
    done = subprocess.run(
        command if isinstance(command, list) else ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python(found, folder):
    """Run python blocks in order in one process; tracebacks show the lines of README.md."""
    program = "".join(f"exec(compile({chr(10) * block.line + block.text!r}, 'README.md', 'exec'))\n" for block in found)
    return call([sys.executable, "-c", program], folder)


def papermill_command(words, folder):
    """A papermill command line, its notebook's small parameters put below its own; its own must be parameters."""
    notebook = next((Path(word) for word in words if word.endswith(".ipynb")), None)
    assert notebook, f"{words} names no notebook"
    assert notebook.parts[0] == "notebooks", f"{words} does not begin with a notebook of the repository"
    own = {words[i + 1] for i, word in enumerate(words) if word in ("-p", "-r", "--parameters", "--parameters_raw")}
    known = parameters_of(read(folder / notebook))
    assert own <= set(known), f"{notebook} has no parameters {sorted(own - set(known))}"
    small = {**settings(folder / notebook, "small")[0], "out": str(folder / "out")}
    (folder / "out").mkdir(exist_ok=True)
    return [*words, "-y", json.dumps(small), "--no-progress-bar"]


def run_command(command, folder):
    """Run one command of a bash block, as the module's text says."""
    words = shlex.split(command, comments=True)
    program = Path(words[0]).name
    if program == "make":
        call(["make", "-n", *words[1:]], folder)
    elif program == "papermill":
        (folder / "runs").mkdir(exist_ok=True)
        call(["papermill", *papermill_command(words, folder)[1:]], folder)
    else:
        call(command, folder)


README = list(blocks((ROOT / "README.md").read_text()))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository, for commands that write into it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("readme") / "repository", ignore=NOT_COPIED)


@pytest.mark.slow
def test_readme_python_runs(tmp_path):
    run_python([block for block in README if block.language == "python" and not block.only_parsed], tmp_path)


def asked():
    """The commands to run; the slowest have tests of their own that do the same with less."""
    runs = [block for block in README if block.language == "bash" and not block.only_parsed]
    every = [command for block in runs for command in commands(block.text)]
    slow = ("papermill", "workbench forge", "workbench adapt", "workbench evaluate")
    return [pytest.param(one, marks=[pytest.mark.slow] * one.startswith(slow)) for one in every]


@pytest.mark.parametrize("command", asked())
def test_readme_command_runs(command, repository):
    run_command(command, repository)


def test_readme_parses():
    for block in README:
        if block.language == "python":
            compile("\n" * block.line + block.text, "README.md", "exec")
        else:
            call(["bash", "-n", "-c", block.text], ROOT)


def test_readme_names_the_test_command():
    """The gate in .ci/run is README's own."""
    assert "make test" in {command.partition("#")[0].strip() for block in README for command in commands(block.text)}
    assert 'make "$target"' in (ROOT / ".ci" / "run").read_text()


def test_blocks_of_a_sample():
    found = list(blocks(SAMPLE))
    assert [(b.language, b.only_parsed, b.line) for b in found] == [
        ("bash", False, 2),
        ("bash", True, 7),
        ("python", False, 10),
        ("python", False, 17),
    ]
    make, papermill = commands(found[0].text)
    assert shlex.split(make, comments=True) == ["make", "test"]
    assert shlex.split(papermill) == ["papermill", "notebooks/01_a.ipynb", "runs/a.ipynb", "-p", "seed", "3"]
    with pytest.raises(AssertionError, match="known marks"):
        list(blocks("```bash hubb\nls\n```\n"))


def test_python_blocks_share_their_names_and_a_failure_shows_its_line(tmp_path):
    found = [block for block in blocks(SAMPLE) if block.language == "python"]
    assert run_python(found, tmp_path) == "2\n"
    with pytest.raises(AssertionError, match=r'"README.md", line 18(.|\n)*NameError'):
        run_python(found[1:], tmp_path)


def test_commands_that_do_not_work_are_found(repository):
    run_command("make test  # the gate", repository)
    run_command("ls README.md | cat", repository)
    for command in ("make tset", "ls no-such-file", "ls no-such-file | cat", "papermill elsewhere.ipynb out.ipynb"):
        with pytest.raises(AssertionError):
            run_command(command, repository)


def test_papermill_commands_run_small_and_own_parameters_must_exist(tmp_path):
    from test_notebooks import texts, write

    source = 'print(seed, steps, out, sep="|")'
    write(tmp_path / "notebooks" / "01_a.ipynb", source, metadata={"workbench": {"small": {"steps": 2, "seed": 9}}})
    line = "papermill notebooks/01_a.ipynb runs/a.ipynb -p {} 3"
    with pytest.raises(AssertionError, match=r"has no parameters \['sead'\]"):
        run_command(line.format("sead"), tmp_path)
    run_command(line.format("seed") + " -k python3 -l python", tmp_path)
    assert "".join(texts(tmp_path / "runs" / "a.ipynb")) == f"3|2|{tmp_path / 'out'}\n"


def test_the_benchmark_s_table_is_what_is_stored():
    """README's table: what the usual way and ours take, and their ratio; seconds of merges; gains on two cores."""
    names = ("bench_8B_gpu.parquet", "bench_nano_gpu.parquet")
    lines = pd.concat(pd.read_parquet(ROOT / "figures" / name) for name in names)
    lines = lines.set_index(["area", lines["work"].str.slice(0, 40), "way"]).sort_index()

    def cell(value: float) -> str:
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.{1 if value < 0.03 else 0}f} ms"

    wanted = [
        ("population", "64 candidates of 20", "state dicts and peft", "all candidates in one pass", "16"),
        (
            "population",
            "12 candidates of 20 adapters of rank 16",
            "state dicts and peft",
            "all candidates in one pass",
            "16",
        ),
        ("population", "20 adapters", "one adapter after another", "all adapters side by side", "3.3"),
        ("coefficients", "30 adapters of rank 16 to 64", "a hook for each adapter", "one stack", "17"),
        ("matching", "40 prompts of 128 tokens, 30 to write in", "generate, batches of 40", "teacher forcing", "5.1"),
        ("matching", "40 prompts of 128 tokens, 30 to write in", "generate, batches of 4", "teacher forcing", "45"),
        (
            "matching",
            "40 prompts of 128 tokens behind",
            "demonstrations read for each",
            "demonstrations read once",
            "3.3",
        ),
        ("fits", "240 fits", "one by one", "side by side", "77"),
        ("fits", "72 fits", "one by one", "side by side", "49"),
    ]
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for area, work, usual, ours, ratio in wanted:
        part = lines.loc[area]
        part = part[part.index.get_level_values(0).str.startswith(work)]
        times = [part.xs(way, level=1)["each"].iloc[0] for way in (usual, ours)]
        found = f"{times[0] / times[1]:.{len(ratio.partition('.')[2])}f}"
        shown = [row for row in rows if all(cell(time) in row for time in times) and row.endswith(f" {found} |")]
        assert found == ratio
        assert len(shown) == 1, (area, work, times)
    large = pd.read_parquet(ROOT / "figures" / "bench_8B_gpu.parquet")
    pairs = large[large["work"] == "all pairs of 960 adapters of rank 16 in 224 modules"].set_index("way")["seconds"]
    dense, ours = pairs["one pair after another, from dense ΔW"], pairs["Gram matrices"]
    assert f"pair after pair, dense, {dense / 3600:.1f} h | {ours:.2f} s | {round(dense / ours, -2):,.0f} |" in text
    bare = large[large["work"].str.contains("candidates of 20 adapters of rank 16")].set_index(["per", "way"])["each"]
    for n, times in ((64, "64 candidates take {:.2f} times"), (12, "12 take {:.2f} times")):
        assert f"{1e3 * bare[n, 'bare model, same rows']:.1f} ms)" in text
        assert times.format(bare[n, "all candidates in one pass"] / bare[n, "bare model, same rows"]) in text
    notes = large[large["area"] == "coefficients"].set_index(["adapters", "way"])["note"]
    assert [notes[n, "one stack"] for n in (30, 100)] == ["27.0 GB in all", "41.2 GB in all"]
    told = re.search(r"in seconds: (.*?); ties holds ([\d.]+) GB above the adapters, della (\d+\.\d)", text)
    of = large[(large["way"] == "ours") & (large["unit"] == "module")].set_index("work")
    of.index = of.index.str.partition(":").get_level_values(0)
    for name, seconds in (one.split() for one in told[1].split(", ")):
        assert f"{of['seconds'][name]:.0f}" == seconds, name
    assert [f"{of['peak'][name] / 1e9:.1f}" for name in ("ties", "della")] == [told[2], told[3]]
    small = pd.read_parquet(ROOT / "figures" / "bench_nano_cpu.parquet")
    small = small[small["way"] != small["against"]]
    gains = [
        ("all pairs of 960 adapters {:.0f} times", "all pairs of 960 adapters of rank 16", "Gram matrices"),
        ("demonstrations read once {:.1f}", "40 prompts of 128 tokens behind", "demonstrations read once"),
        ("exact match {:.1f}", "40 prompts of 128 tokens, 30 to write in batches of 40", "teacher forcing"),
        ("(four at a time: {:.0f})", "40 prompts of 128 tokens, 30 to write in batches of 4$", "teacher forcing"),
        ("a step of learned coefficients {:.1f}", "30 adapters of rank 16 to 64", "one stack"),
        ("the population pass ({:.1f})", "64 candidates of 20 adapters", "all candidates in one pass"),
        ("side by side ({:.1f})", "16 fits: coefficients", "side by side"),
    ]
    for words, work, way in gains:
        found = small[small["work"].str.match(work) & (small["way"] == way)]
        assert words.format(found["ratio"].item()) in text

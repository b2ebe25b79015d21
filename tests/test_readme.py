"""What README.md and BUILD_NOTES.md name exists: files, modules, extras, settings, flags."""

import pkgutil
import re
from pathlib import Path

import pytest

from w2sjax.config import default_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "BUILD_NOTES.md", "docs/environments.md")
COMMANDS = (
    "pip install -e . && python launch.py --config=configs/household.py",
    "pip install -e '.[test]' && pytest",
)
FOLDERS = ("benchmarks", "configs", "examples", "tests", "w2sjax")
FILE = re.compile(r"[\w./-]+\.(py|md|toml|cfg|txt|sh|json|jsonl|npz)")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def named(text):
    """Words of all code in a Markdown text: indented lines, fences and backticks."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    commands = re.findall(r"^ {4}(\S.*)$", text, re.M)
    spans = re.findall(r"`([^`]+)`", text)
    for code in fences + commands + spans:
        for word in code.split():
            word = word.strip("'\"(),;")
            if not re.search(r"[<>…*~{}]", word) and not word.startswith(("runs/", "/")):
                yield word


def missing_files(text):
    """Words that name a file or a folder of the repository which is not there.

    A path may leave out the package's folder; a bare file name may be anywhere, or be one that a
    run writes (then the sources say its name).
    """
    missing = []
    for word in named(text):
        path, _, test = re.sub(r"^--?[\w.-]+=", "", word).partition("::")
        path = re.sub(r":\w*$", "", path)  # a config's argument, or a line number
        in_folder = path.partition("/")[0] in FOLDERS and "/" in path
        if not (FILE.fullmatch(path) or in_folder or re.fullmatch(r"[\w/]+/", path)):
            continue
        places = [ROOT / path, ROOT / "w2sjax" / path]
        if "/" not in path:
            places += [source for source in SOURCES if source.name == path]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            written = f'"{path}"'
            if not any(
                written in s.read_text() for s in SOURCES if s.is_relative_to(ROOT / "w2sjax")
            ):
                missing.append(word)
        elif test and f"def {test.partition('[')[0]}(" not in found.read_text():
            missing.append(word)
    return missing


def missing_names(text):
    """Dotted names of the package that are neither a module nor in one."""
    words = [word.rstrip(".") for word in named(text)]
    missing = []
    for word in words:
        if re.fullmatch(r"w2sjax(\.\w+)+", word):
            try:
                pkgutil.resolve_name(word)
            except (ImportError, AttributeError):
                missing.append(word)
    return missing


def missing_settings(text):
    """`config.a.b` and `--config.a.b=x` that the schema does not have."""
    missing = []
    for word in named(text):
        match = re.fullmatch(r"(?:--)?config((?:\.\w+)+)(?:=.*)?", word)
        if match is None or FILE.fullmatch(word):
            continue
        value = default_config()
        for field in match[1].split(".")[1:]:
            if match[1].startswith(".env.options."):
                break  # the environment's own
            if not hasattr(value, "keys") or field not in value:
                missing.append(word)
                break
            value = value[field]
    return missing


@pytest.fixture(params=DOCUMENTS)
def document(request):
    return (ROOT / request.param).read_text()


def test_files_modules_and_settings_that_are_named_exist(document):
    assert missing_files(document) == []
    assert missing_names(document) == []
    assert missing_settings(document) == []


def test_what_does_not_exist_is_found():
    """So that the test above can fail."""
    text = (
        "See `w2sjax/nothing.py`, `w2sjax/config.py`, `nothing.md` and `report.json`, `configs/`, "
        "`runs/x/none.md`, `~/.cache/none.py`, `tests/<room>/test_x.py`, `tests/nothing`,\n"
        "`tests/test_readme.py::test_nothing`, `trees/keys.py`, `trees/nothing.py`.\n\n"
        "    python launch.py --config=configs/nothing.py:smoke --config.train.stepz=3\n\n"
        "`w2sjax.trees.build_tree`, `w2sjax.nothing`, `config.env.options.any`, "
        "`config.nothing.a`\n"
    )
    assert sorted(missing_files(text)) == [
        "--config=configs/nothing.py:smoke",
        "nothing.md",
        "tests/nothing",
        "tests/test_readme.py::test_nothing",
        "trees/nothing.py",
        "w2sjax/nothing.py",
    ]
    assert missing_names(text) == ["w2sjax.nothing"]
    assert sorted(missing_settings(text)) == ["--config.train.stepz=3", "config.nothing.a"]


def test_the_two_commands_are_there_as_they_are_run():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for command in COMMANDS:
        assert lines.count(command) == 1, command
        assert set(command.replace("'", "").split()) <= set(named(f"    {command}\n"))


def test_extras_and_flags_that_are_named_exist(document):
    setup = (ROOT / "setup.py").read_text()
    programs = [ROOT / "launch.py", *(ROOT / "w2sjax").glob("*/__main__.py")]
    flags = "".join(path.read_text() for path in programs)
    for extra in re.findall(r"pip install -e '?\.\[(\w+)\]", document):
        assert f'"{extra}":' in setup
    for flag in re.findall(r"--(\w+)(?=[=`])", document):
        assert f'"{flag}"' in flags or f'"--{flag}"' in flags, flag

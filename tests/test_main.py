"""The commands by their first word: `./launch.sh WORD` and `roadwork WORD`."""

import importlib.util
import runpy
import subprocess
import sys

import pytest

from pipeline.__main__ import COMMANDS, IN_A_CHECKOUT, main, module_of
from pipeline.errors import typed


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["roadwork", *words])
    return main()


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """As where a wheel is installed, without a checkout around it."""
    monkeypatch.setattr("pipeline.errors.LAUNCH_SH", tmp_path / "launch.sh")


def test_help_lists_every_command(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == run(monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {word} " in text for word in (*COMMANDS, *IN_A_CHECKOUT))
    assert "usage: ./launch.sh COMMAND" in text


def test_help_with_a_word_says_what_the_command_does(monkeypatch, capsys):
    assert run(monkeypatch, "help", "export") == 0
    assert capsys.readouterr().out == "  export     write the best weights as a Hugging Face folder\n"


def test_a_wheel_speaks_of_roadwork_and_has_no_words_of_a_checkout(monkeypatch, capsys, wheel):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "usage: roadwork COMMAND" in text
    assert "launch.sh" not in text
    assert "bench" not in text
    assert run(monkeypatch, "setup") == 2
    assert capsys.readouterr().err == "error: unknown command 'setup' (`roadwork --help` lists them)\n"
    assert typed("prep shard") == "roadwork prep shard"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "error: unknown command 'trian'; did you mean 'train'? (`./launch.sh --help` lists them)\n"),
        (["help", "xylophone"], "error: unknown command 'xylophone' (`./launch.sh --help` lists them)\n"),
        (["test"], "error: `./launch.sh test` alone does that\n"),
        (["demo", "--quik"], "error: unknown option 'quik'; did you mean 'quick'?\n"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_two(words, sentence):
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_help_of_a_word_is_its_line(monkeypatch, capsys):
    assert run(monkeypatch, "help", "export") == 0
    assert capsys.readouterr().out == "  export     write the best weights as a Hugging Face folder\n"


@pytest.mark.parametrize(
    ("words", "module", "rest"),
    [
        (["prep", "shard", "--out", "x"], "data_prep", ["shard", "--out", "x"]),
        (["prep", "features", "--out", "x"], "pipeline.launch.launcher", ["prep", "features", "--out", "x"]),
        (["slurm", "prep", "--parts", "2"], "data_prep.shards.slurm", ["--parts", "2"]),
        (["slurm", "demo"], "pipeline.launch.slurm_train", ["demo"]),
        (["slurm", "predict", "--help"], "pipeline.launch.slurm_answering", ["predict", "--help"]),
        (["evaluate", "--run", "r"], "pipeline.launch.answering", ["evaluate", "--run", "r"]),
        (["early-exit", "--run", "r"], "pipeline.early_exit", ["--run", "r"]),
    ],
)
def test_a_word_runs_its_module_with_the_words_after_it(monkeypatch, words, module, rest):
    assert module_of(words) == (module, rest)
    started = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: started.append((name, sys.argv[1:])))
    run(monkeypatch, *words)
    assert started == [(module, rest)]


def test_every_word_has_a_module():
    assert all(importlib.util.find_spec(module) for module, _ in COMMANDS.values())


def test_ctrl_c_while_a_command_is_imported_is_a_stop(monkeypatch, capsys):
    def interrupted(name, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runpy, "run_module", interrupted)
    assert run(monkeypatch, "predict") == 75
    assert capsys.readouterr().err.startswith("stopped: ")


def test_help_imports_the_standard_library_alone():
    """So it comes at once, and also before anything is installed."""
    script = """if True:
        import sys
        sys.argv = ["roadwork", "--help"]
        from pipeline.__main__ import main
        main()
        tops = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
        print(sorted(name for name in tops if not name.startswith("_")))
    """
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=".", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['pipeline']"

"""The commands as a user calls them. Expected texts are those a user reads."""

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from hbll import cli
from hbll.data.vocabulary import load_vocabulary
from hbll.recipes import RECIPES
from hbll.reproduce.tables import PATHS
from hbll.train import checkpoint
from hbll.train.hold import held
from hbll.train.run import open_run, read_json, write_json

SMALL = ["--blocks", "3", "--width", "16", "--epochs", "2", "--train-samples", "300"]

NEEDS_A_RECIPE = f"hbll train needs the name of a recipe first: {', '.join(RECIPES)}"

NEEDS_A_TABLE = "hbll reproduce needs a table first: " + ", ".join(f"table{number}" for number in range(1, 10))

SPEED = "--rates are for how good networks get, and this table is of speed: leave them out"


@pytest.fixture
def hbll(command, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    cli.main(["train", "digits", *SMALL, "--method", "bp", "--seed", "5", "--run-dir", str(folder)])
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["train", "evaluate", "compare", "report"]),
        (["--help"], ["train", "evaluate", "compare", "report", "plan"]),
        (["train", "--help"], ["digits", "mnist-mlp"]),
        (["compare", "--help"], ["digits", "mnist-mlp"]),
        (["train", "digits", "--help"], ["--depth", "--method", "--rule", "greedy", "--optimizer", "--resume"]),
        (["compare", "mnist-mlp", "--help"], ["--depth", "--methods", "--rules", "--seeds", "--json"]),
        (["evaluate", "--help"], ["--path", "--paths", "--exits", "--best", "--json"]),
        (["generate", "--help"], ["--prompt", "--draft", "--num-draft-tokens", "--temperature", "--seed"]),
        (["train", "cifar10-vit", "--help"], ["--preset", "--missing", "--label-noise", "--rand-augment"]),
        (["reproduce", "--help"], ["TABLE", "--scale", "--rules", "--rates", "--workers", "--corpus"]),
        (["report", "--help"], ["FOLDER"]),
        (["plan", "digits", "--help"], ["--devices", "--mbit", "--delay-ms", "--memory-mib", "--refresh", "--plot"]),
        (["sublinear", "--help"], ["bench", "fit"]),
        (["sublinear", "fit", "--help"], ["--data", "--target"]),
    ],
)
def test_help(hbll, arguments, said):
    code, out, err = hbll(*arguments)
    assert code == 0
    assert err == ""
    assert all(word in out for word in said)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("train", NEEDS_A_RECIPE),
        ("train --width 3 digits", NEEDS_A_RECIPE),
        ("train digit", "unknown recipe 'digit'; did you mean digits?"),
        ("train digits --widht 3", "unknown option '--widht'; did you mean --width?"),
        ("train digits --widht=3", "unknown option '--widht'; did you mean --width?"),
        ("train digits --method papr", "unknown rule 'papr'; did you mean paper?"),
        ("train digits --rule papr", "unknown rule 'papr'; did you mean paper?"),
        ("train digits --ruel paper", "unknown option '--ruel'; did you mean --rule?"),
        ("train digits --rule bp --stage 2", "--stage does nothing for bp: leave it out"),
        ("train digits --stage 3 3", "stages of 3, 3 add up to 6 blocks; the network has 7"),
        ("train cifar10-resnet --rule streem", "unknown rule 'streem'; did you mean stream?"),
        ("compare digits --methods papr", "unknown rule 'papr'; did you mean paper?"),
        ("compare digits --rules bp scan --stage 3 3", "stages of 3, 3 add up to 6 blocks; the network has 7"),
        ("train digits --width wide", "--width cannot be 'wide'"),
        ("train digits --depth deep", "--depth cannot be 'deep'"),
        ("train digits --depth 0", "--depth must be at least 1, not 0"),
        ("train digits --depth 2 --blocks 3", "give --depth or --blocks, not both"),
        ("train digits --epochs", "Missing value for argument '--epochs'. Expected 1 values."),
        ("train digits deep", "hbll train digits does not know what to do with deep"),
        ("train digits --train-samples 9999", "--train-samples 9999 is more than the 1437 there are"),
        ("plan", f"hbll plan needs the name of a recipe first: {', '.join(RECIPES)}"),
        ("plan digits --devices 0", "--devices must be at least 1, not 0"),
        ("plan digits --mbit -1", "--mbit must be at least 0 and finite, not -1.0"),
        ("plan digits --memory-mib 0", "--memory-mib must be above 0, not 0.0"),
        ("plan digits --refresh 0", "--refresh must be at least 1, not 0"),
        ("plan digits --devises 2", "unknown option '--devises'; did you mean --devices?"),
        ("plan char-rnn", "char-rnn has no chain of blocks that could be spread over devices"),
        ("train cifar10-vit --preset papr", "unknown preset 'papr'; did you mean paper?"),
        ("train cifar10-vit --preset=papr", "unknown preset 'papr'; did you mean paper?"),
        ("train cifar10-vit --preset paper --heads 3", "--heads must divide 128, not be 3"),
        ("reproduce", NEEDS_A_TABLE),
        ("reproduce --scale paper", NEEDS_A_TABLE),
        ("reproduce table22", "unknown table 'table22'; did you mean table2?"),
        ("reproduce table2 --rules papr", "unknown rule of this table 'papr'; did you mean paper?"),
        ("reproduce table2 --corpus novels", "--corpus is of table5 alone: leave it out"),
        ("reproduce table2 --epochs 0", "--epochs must be at least 1, not 0"),
        ("reproduce table2 --rates", "--rates needs a value"),
        ("reproduce table2 --rules --seeds 2", "--rules needs a value"),
        ("compare digits --rules", "--rules needs a value"),
        ("train digits --rule stream --stage", "--stage needs a value"),
        ("reproduce table2 --rates 0.1 0", "--rates must be above 0 and finite, not 0.0"),
        ("reproduce table9 --rates 0.1", SPEED),
        ("reproduce table2 --workers 0", "--workers must be at least 1, not 0"),
        ("sublinear", "hbll sublinear needs an action first: bench, fit"),
        ("sublinear bensh", "unknown action 'bensh'; did you mean bench?"),
        ("sublinear bench --widht 8", "unknown option '--widht'; did you mean --width?"),
        ("sublinear fit --data no.csv --target y", "no.csv is not a file"),
        ("train digits --seed -1", "--seed must be at least 0, not -1"),
        ("train digits --seed 18446744073709551616", "--seed must be less than 2^64, not 18446744073709551616"),
        ("train digits --run-dir=", "what follows --run-dir is empty"),
        ("train digits --run-dir ''", "what follows --run-dir is empty"),
        ("compare digits --run-dir '' --seeds 1", "what follows --run-dir is empty"),
        ("evaluate ''", "what follows hbll evaluate is empty"),
        ("sublinear bench --engines", "--engines needs a value"),
        ("sublinear bench --seed 4294967296", "seed is 4294967296; at least 0 and less than 2^32 is needed"),
        ("train digits --resume", "--resume needs --run-dir, the folder to go on in"),
        ("train digits --resume --run-dir no", "no is not the folder of a run: it has no configuration.json"),
        ("compare digits --resume --run-dir no", "no is not the folder of a comparison: it has no comparison.json"),
        ("evaluate no", "no is not the folder of a run: it has no configuration.json"),
        ("generate no --prompt x", "no is not the folder of a run: it has no configuration.json"),
        ("report no", "no is not the folder of a run: it has no configuration.json"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(hbll, arguments, sentence):
    assert hbll(*shlex.split(arguments)) == (2, "", f"hbll: {sentence}\n")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("option", [["--blocks", 10**9], ["--width", 10**9], ["--width", 10**20], ["--blocks", 10**20]])
@pytest.mark.parametrize("recipe", ["digits", "char-rnn"])
def test_what_the_machine_has_no_memory_for_is_refused(hbll, recipe, option):
    code, out, err = hbll("train", recipe, *option)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"hbll: to train \d+ blocks of width \d+ would need \S+ GiB of memory, and this machine has \S+ GiB\n", err
    )
    assert not list(Path().iterdir())


def test_a_width_for_whose_screen_there_is_no_memory_is_refused(hbll):
    Path("t.csv").write_text("1,2\n2,3\n3,5\n4,6\n")
    code, _, err = hbll("sublinear", "fit", "--data", "t.csv", "--target", "0", "--width", 10**14)
    assert code == 2
    assert re.fullmatch(r"hbll: engine \S+ with width 10{14} .* would need \S+ GiB of memory, and .*\n", err)
    code, _, err = hbll("sublinear", "bench", "--points", 10**12)
    assert code == 2
    assert re.fullmatch(r"hbll: 10{12} points of 64 features would need \S+ GiB of memory, and .*\n", err)


@pytest.mark.parametrize("folder", ["~nosuchuser", None])
def test_a_user_without_a_home_is_told(hbll, monkeypatch, folder):
    if folder is None:
        monkeypatch.delenv("HBLL_DATA", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it leaves it where there is no home
    else:
        monkeypatch.setenv("HBLL_DATA", folder)
    sentence = f"the data folder {folder or '~/.cache/hbll'} cannot be found, as the user has no home: name another by "
    assert hbll("train", "mnist-mlp") == (2, "", f"hbll: {sentence}--data-dir or HBLL_DATA\n")


def test_a_choice_that_is_none_names_the_choices(hbll):
    code, out, err = hbll("train", "digits", "--schedule", "cosin")
    assert (code, out) == (2, "")
    assert "'cosin'" in err
    assert "'cosine'" in err


@pytest.mark.parametrize(
    "settings", [{"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "ascii"}, {"FORCE_COLOR": "1"}]
)
def test_a_mistake_is_told_alike_in_every_terminal(tmp_path, settings):
    command = [sys.executable, "-m", "hbll", "train", "digits", "--width", "0"]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "hbll: --width must be at least 1, not 0\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "cifar10-conv", "--help"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(arguments):
    command = [sys.executable, "-m", "hbll", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_an_error_of_the_machine_names_the_file_if_there_is_one(hbll, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert hbll("report", "x") == (2, "", "hbll: No space left on device\n")


def test_a_file_where_the_folder_should_be_is_told(hbll):
    Path("run").write_text("mine")
    code, out, err = hbll("train", "digits", "--run-dir", "run")
    assert (code, out) == (2, "")
    assert re.fullmatch("hbll: (File exists|Not a directory): run.*\n", err)
    assert Path("run").read_text() == "mine"


def test_missing_data_are_told_in_one_sentence(hbll, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, out, err = hbll("train", "mnist-mlp", "--data-dir", tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"hbll: MNIST is not under .*\n", err)
    assert not list(tmp_path.iterdir())


def test_train_shows_the_accuracy_of_every_path_and_where_the_run_lies(hbll):
    code, out, err = hbll("train", "digits", *SMALL, "--rule", "paper")
    assert code == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"digits-paper-s0-\d{8}-\d{6}", folder.name)
    assert out.splitlines()[-1] == f"run: {folder}"
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["1-2-3", "block-2", "2-3"]
    assert "epoch 2/2" in err


def test_runs_that_begin_at_once_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    with cli._folder(None, "run") as first, cli._folder(None, "run") as second, cli._folder(None, "run") as third:
        assert [folder.name for folder in (first, second, third)] == ["run-now", "run-now-2", "run-now-3"]
        (second / "file").touch()
    assert list(Path("runs").iterdir()) == [second]


def test_a_terminal_that_says_it_has_no_columns_is_written_on(hbll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    code, out, err = hbll("train", "digits", *SMALL, "--rule", "bp")
    assert code == 0
    assert "epoch 2/2" in err
    assert re.search(r"1-2-3 +3 +\d\d\.\d\d %", out)


def test_a_closed_stdout_ends_nothing(hbll, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    cli.main(["train", "digits", *SMALL, "--rule", "bp", "--run-dir", "run"])
    assert "epoch 2/2" in capsys.readouterr().err
    monkeypatch.undo()


def test_with_a_closed_stderr_errors_are_not_on_stdout(hbll, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert hbll("trian") == (2, "", "")


def test_spreads_are_shown_on_terminals_without_their_sign(hbll, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    hbll("compare", "digits", *SMALL, "--rules", "bp", "--seeds", "2")
    assert re.search(rb"bp +\d+\.\d\d % +\? \d", written.getvalue())


def test_evaluate_prints_one_json_object_and_nothing_else(hbll, trained):
    code, out, err = hbll("evaluate", trained, "--json")
    paths = json.loads(out)["paths"]
    assert (code, err) == (0, "")
    assert [(path["path"], path["blocks"]) for path in paths] == [("1-2-3", 3), ("block-2", 1), ("2-3", 2)]
    assert all(0 <= path["accuracy"] <= 1 for path in paths)


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["--path", "2-3"], ["2-3"]),
        (["--path", "2-3", "chain"], ["2-3", "1-2-3"]),
        (["--path", "2-3", "--path", "block-2"], ["2-3", "block-2"]),
        (["--path", "1", "2", "3"], ["block-2", "2-3", "1-2-3"]),
        (["--path", "rim"], ["2-3"]),
    ],
)
def test_evaluate_takes_paths_by_name(hbll, trained, arguments, paths):
    _, out, _ = hbll("evaluate", trained, "--json", *arguments)
    assert [path["path"] for path in json.loads(out)["paths"]] == paths


def test_evaluate_has_a_table_for_people(hbll, trained):
    code, out, _ = hbll("evaluate", trained)
    assert code == 0
    assert out.splitlines()[0].split() == ["path", "blocks", "accuracy"]
    assert re.fullmatch(r"1-2-3 +3 +\d\d\.\d\d %", out.splitlines()[1].strip())


@pytest.mark.parametrize(
    ("path", "said"), [("1-3", "1-3 is not a path"), ("2-9", "2-9 is not a path"), ("short", "'short' is not a path")]
)
def test_what_is_no_path_is_told(hbll, trained, path, said):
    code, out, err = hbll("evaluate", trained, "--path", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"hbll: {said}")
    assert err.count("\n") == 1


def test_evaluate_takes_corrupted_test_images(hbll, trained, speaking):
    plain, erased = (
        json.loads(hbll("evaluate", trained, "--json", *options)[1]) for options in ([], ["--test-missing", "0.9"])
    )
    assert plain["paths"][0]["accuracy"] > erased["paths"][0]["accuracy"]
    sentence = "hbll: --test-missing is of images, and shakespeare-gpt has none: leave it out\n"
    assert hbll("evaluate", "run", "--test-missing", "0.5") == (2, "", sentence)


def test_evaluate_shows_a_bar_while_a_person_is_looking(hbll, trained, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes anything for a terminal
    assert "1/1" in hbll("evaluate", trained)[2]


def test_evaluate_shows_every_readout_with_its_cost_and_a_plot(hbll, trained):
    code, out, _ = hbll("evaluate", trained, "--paths", "all")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["path", "blocks", "parameters", "ms", "a", "sample", "accuracy"]
    assert re.fullmatch(r"1-2-3 +3 +2,026 +\S+ +\d\d\.\d\d %", lines[1].strip())  # 1,040 + 3 x 272 + 170
    assert [line.split()[0] for line in lines[1:4]] == ["1-2-3", "block-2", "2-3"]
    assert lines[4:] == [f"plot: {trained / 'paths.svg'}"]
    assert (trained / "paths.svg").read_text().startswith("<svg")
    paths = json.loads(hbll("evaluate", trained, "--paths", "all", "--json")[1])["paths"]
    assert {"path", "blocks", "parameters", "milliseconds", "accuracy"} == set(paths[0])


def test_evaluate_leaves_at_the_first_readout_that_is_sure(hbll, trained):
    code, out, _ = hbll("evaluate", trained, "--exits", "0.5", "2")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["rim", "0.5"], ["rim", "2"]]
    half, two = json.loads(hbll("evaluate", trained, "--exits", "0.5", "2", "--json")[1])["exits"]
    assert (half["loss"], two["loss"]) == (0.005, 0.02)
    assert two["blocks"] <= half["blocks"] <= 5  # of the rim two, of the chain three


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--path 2 --exits 1", "give --path, --paths all or --exits, one of them"),
        ("--paths all --exits 1", "give --path, --paths all or --exits, one of them"),
        ("--exits 1 -0.5", "--exits must be at least 0 and finite, not -0.5"),
        ("--exits inf", "--exits must be at least 0 and finite, not inf"),
        ("--exits nan", "--exits must be at least 0 and finite, not nan"),
        ("--exits", "--exits needs a value"),
        ("--exits --json", "--exits needs a value"),
        ("--path", "--path needs a value"),
        ("--path 2-3 --path", "--path needs a value"),
        (
            "--rum 3",
            "unknown option '--rum'; there are --path, --paths, --exits, --best, --test-missing, --test-label-noise, "
            "--data-dir, --json",
        ),
        ("--test-missing 1.5", "--test-missing is a share from 0 to 1, not 1.5"),
        ("--path stage-1", "there is no stage-1: the rule trains no readouts of stages, name a path"),
    ],
)
def test_what_cannot_be_evaluated_is_told(hbll, trained, arguments, sentence):
    assert hbll("evaluate", trained, *arguments.split()) == (2, "", f"hbll: {sentence}\n")


@pytest.fixture
def speaking(hbll, small_data):
    """The options of a language model in `run`."""
    sizes = ["--blocks", "3", "--width", "8", "--context", "24", "--stage", "1", "--epochs", "1"]
    options = ["--method", "greedy", *sizes, "--train-samples", "64", "--data-dir", small_data, "--run-dir", "run"]
    assert hbll("train", "shakespeare-gpt", *options)[0] == 0
    return small_data


def test_generate_prints_the_text_alone(hbll, speaking):
    arguments = ["generate", "run", "--prompt", "abc", "--max-new-tokens", "20"]
    code, out, err = hbll(*arguments, "--temperature", "0")
    assert code == 0
    assert re.fullmatch(r"abc.{20}\n", out)
    assert re.fullmatch(r"[\d.]+ tokens/s, 20 passes\n", err)
    for draft in ("2", "rim", "stage-1", "stage-2"):
        code, drafted, err = hbll(*arguments, "--temperature", "0", "--draft", draft, "--num-draft-tokens", "3")
        assert (code, drafted) == (0, out)
        assert re.fullmatch(r"[\d.]+ tokens/s, [\d.]+ % of \d+ drafted tokens accepted, \d+ passes\n", err)
    sampled = [hbll(*arguments, "--seed", seed, "--top-k", "20")[1] for seed in (0, 1, 0)]
    assert sampled[0] == sampled[2] != sampled[1]
    for number, name in (("1", "block-2"), ("2", "2-3"), ("3", "chain")):
        by_number, by_name = (hbll(*arguments, "--path", path, "--temperature", "0")[1] for path in (number, name))
        assert by_number == by_name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "--prompt ab --max-new-tokens 24",
            "2 tokens and 24 new ones are more than the context of 24 tokens that the network ",
        ),
        ("--prompt aé --max-new-tokens 4", "the vocabulary has no 'é'"),
        ("--prompt= --max-new-tokens 4", "there is nothing to go on from: give a prompt of one token at least\n"),
        ("--prompt a\udce9 --max-new-tokens 4", "the prompt is no text in UTF-8 ('utf-8' codec can't encode"),
        ("--prompt a --seed -1 --max-new-tokens 4", "--seed must be at least 0, not -1\n"),
        ("--prompt a --seed 18446744073709551616 --max-new-tokens 4", "--seed must be less than 2^64, not 18446"),
        ("--prompt a --temperature nan --max-new-tokens 4", "temperature must be at least 0; got nan\n"),
        ("--prompt a --temperature -1 --max-new-tokens 4", "temperature must not be negative; got -1.0\n"),
        ("--prompt a --draft 1-3 --max-new-tokens 4", "1-3 is not a path: the tree has no arc from 1 to 3"),
        ("--prompt a --draft 4 --max-new-tokens 4", "a path has between 1 and 3 blocks here; got 4\n"),
        ("--prompt a --draft stage-7 --max-new-tokens 4", "unknown readout 'stage-7'; did you mean stage-"),
        ("--prompt a --max-new-tokens 0", "max_new_tokens must be at least 1; got 0\n"),
    ],
)
def test_what_cannot_be_generated_is_told(hbll, speaking, arguments, sentence):
    code, out, err = hbll("generate", "run", *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"hbll: {sentence}")
    assert err.count("\n") == 1


def test_generate_takes_the_best_weights(hbll, small_data):
    sizes = ["--blocks", "1", "--width", "8", "--context", "16", "--epochs", "1", "--batch-size", "4"]
    text = ["--tokens", "characters", "--data-dir", small_data, "--run-dir", "run"]
    assert hbll("train", "novels-gpt", *sizes, *text)[0] == 0
    arguments = ["generate", "run", "--prompt", "fox", "--max-new-tokens", "5", "--temperature", "0"]
    last = hbll(*arguments)[1]
    run = open_run(Path("run"))
    best = checkpoint.load(run.best_file)
    best["rule"]["network.head.predict.bias"][load_vocabulary(run.vocabulary_file).encode("z")] = 100.0
    checkpoint.save(run.best_file, best)
    assert hbll(*arguments, "--best")[1] == "foxzzzzz\n"
    assert hbll(*arguments)[1] == last != "foxzzzzz\n"
    best["run"]["seed"] = 1
    checkpoint.save(run.best_file, best)
    assert "best.safetensors is of another run, with --seed 1, not 0" in hbll(*arguments, "--best")[2]
    run.best_file.unlink()
    sentence = "run has no best.safetensors: no epoch of it was measured on validation samples"
    assert hbll(*arguments, "--best") == (2, "", f"hbll: {sentence}\n")


def test_a_vocabulary_that_is_not_the_runs_is_told(hbll, speaking):
    file, sentence = Path("run/vocabulary.json"), "put the run's own back, whose tokens its network was trained on"
    stored = json.loads(file.read_text())
    alphabet = stored["content"]
    file.write_text(json.dumps(stored | {"content": alphabet[:-1] + chr(ord(alphabet[-1]) + 1)}))  # as many tokens
    for command in (["generate", "run", "--prompt", "abc"], ["evaluate", "run"]):
        assert hbll(*command) == (2, "", f"hbll: {file} is damaged, or another run's: {sentence}\n")
    resumed = ["train", "shakespeare-gpt", "--run-dir", "run", "--resume"]
    assert hbll(*resumed)[::2] == (2, f"hbll: {file} is damaged, or another run's: {sentence}\n")
    file.unlink()
    assert hbll("generate", "run", "--prompt", "abc") == (2, "", f"hbll: {file} is missing: {sentence}\n")


def test_a_vocabulary_that_an_earlier_version_did_not_note_is_told_when_it_is_gone(hbll, speaking):
    folder = Path("run")
    stored = read_json(folder, "configuration.json", "run")
    del stored["vocabulary_sha256"]
    write_json(folder / "configuration.json", stored)
    assert hbll("generate", "run", "--prompt", "abc", "--max-new-tokens", "4")[0] == 0
    Path("run/vocabulary.json").unlink()
    assert hbll("generate", "run", "--prompt", "abc") == (2, "", "hbll: there is no vocabulary run/vocabulary.json\n")


def test_a_network_that_is_no_language_model_generates_none(hbll, trained):
    sentence = "digits is no language model of blocks, which alone generates text"
    assert hbll("generate", trained, "--prompt", "abc") == (2, "", f"hbll: {sentence}\n")


def test_resuming_takes_the_options_of_the_run(hbll, trained):
    code, out, _ = hbll("train", "digits", "--run-dir", trained, "--resume")
    assert code == 0
    assert f"run: {trained}" in out
    assert hbll("train", "digits", "--run-dir", trained, "--resume", "--width", "32") == (
        2,
        "",
        f"hbll: {trained} was trained with --width 16, not 32: a run is resumed as it was begun; "
        "start another with another --run-dir\n",
    )
    other = ["--rule", "greedy"]
    assert (
        "was trained with --method bp, not greedy"
        in hbll("train", "digits", "--run-dir", trained, "--resume", *other)[2]
    )
    assert "--seed 5, not 6" in hbll("train", "digits", "--run-dir", trained, "--resume", "--seed", "6")[2]
    assert "was begun with the recipe digits" in hbll("train", "mnist-mlp", "--run-dir", trained, "--resume")[2]


def test_a_depth_and_its_number_of_blocks_are_one_option(hbll):
    assert hbll("train", "digits", "--depth", "2", "--width", "8", "--epochs", "1", "--run-dir", "run")[0] == 0
    for size in (["--blocks", "3"], ["--blocks=3"], ["--depth", "2"]):
        assert hbll("train", "digits", *size, "--run-dir", "run", "--resume")[0] == 0
    assert "--blocks 3, not 7" in hbll("train", "digits", "--depth", "3", "--run-dir", "run", "--resume")[2]


def test_a_run_is_not_trained_over(hbll, trained):
    code, _, err = hbll("train", "digits", "--run-dir", trained)
    assert code == 2
    assert "holds a run already: give --resume" in err


def test_a_run_that_diverges_names_the_place(hbll):
    code, out, err = hbll("train", "digits", *SMALL, "--learning-rate", "1e30", "--run-dir", "run")
    assert (code, out) == (2, "")
    assert re.search(r"NaN or infinite in step 2 of epoch 1, first at block \d; the last good checkpoint is kept", err)
    assert hbll("evaluate", "run", "--json")[0] == 0


def test_plan_says_what_is_the_fastest_and_draws_how_it_grows(hbll, monkeypatch):
    monkeypatch.setattr(cli, "GROWN", (1, 4, 16))
    arguments = [
        "plan",
        "digits",
        "--blocks",
        "4",
        "--width",
        "8",
        "--batch-size",
        "2",
        "--devices",
        "4",
        "--plot",
        "own.svg",
    ]
    code, out, err = hbll(*arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["scheme", "micro-batches"]
    assert {line.split()[0] for line in lines[1 : lines.index("")]} >= {"bp", "stream", "greedy", "paper", "tree"}
    said = lines[lines.index("") + 1 :]
    assert said[0].startswith("The fastest of what fits is ")
    assert "DDP cannot be: a batch of 2 cannot be split over 4 devices." in said
    assert said[-1] == "plot: own.svg"
    assert Path("own.svg").read_text().startswith("<svg")

    code, out, err = hbll(*arguments, "--memory-mib", "0.0001", "--json")
    found = json.loads(out)
    assert (code, err, found["best"]) == (0, "", None)
    assert found["reasons"][0].startswith("Nothing fits: ")
    assert [n for n, _ in found["growth"]["greedy"]] == [2, 5, 17]


def test_report_says_where_the_page_is(hbll, trained):
    assert hbll("report", trained) == (0, f"{trained / 'report.html'}\n", "")


def test_compare_prints_one_json_object_and_nothing_else(hbll):
    arguments = ["compare", "digits", *SMALL, "--rules", "bp", "tree", "--seeds", "2", "--run-dir", "made"]
    code, out, err = hbll(*arguments, "--json")
    methods = json.loads(out)["methods"]
    assert (code, err) == (0, "")
    assert [method["method"] for method in methods] == ["bp", "tree"]
    assert all(0 <= method["accuracy"] <= 1 for method in methods)
    assert (Path("made") / "report.html").exists()

    code, out, _ = hbll("compare", "digits", "--run-dir", "made", "--resume")
    assert code == 0
    assert " ".join(out.splitlines()[0].split()) == "method accuracy spread seconds work span peak memory local"
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["bp", "tree"]
    assert out.splitlines()[-1] == "page: made/report.html"
    assert json.loads(hbll("evaluate", "made/bp-s1", "--json")[1])["paths"]


def test_the_version_is_that_of_the_package(hbll):
    assert hbll("--version") == (0, f"hbll {version('hbll')}\n", "")


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("tyro", ["--version"]),
        ("rich", ["train", "digits"]),
        ("sklearn", ["train", "digits"]),
        ("matplotlib", ["report", "x"]),
    ],
)
def test_without_the_extra_of_the_command_line_one_sentence_says_what_to_install(tmp_path, missing, arguments):
    code = f"import sys; sys.modules['{missing}'] = None; from hbll.__main__ import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == f'hbll: the command line needs {missing}: pip install "hbll[cli]"\n'


def test_a_missing_extra_is_told_with_what_to_install(hbll, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hbll.sublinear.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    sentence = 'hbll: hbll sublinear needs numba: pip install "hbll[sublinear]"\n'
    assert hbll("sublinear", "bench", "--width", "64") == (2, "", sentence)


def test_a_sigmoid_network_learns_mnist_from_the_published_files(hbll, mnist_folder):
    options = ["--depth", "2", "--epochs", "2", "--train-samples", "12800", "--method", "paper", "--run-dir", "run"]
    assert hbll("train", "mnist-mlp", *options, "--data-dir", mnist_folder)[0] == 0
    code, out, _ = hbll("evaluate", "run", "--json")  # which finds the data where the run did
    assert code == 0
    assert all(path["accuracy"] > 0.5 for path in json.loads(out)["paths"])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_run_saves_it_and_says_how_to_go_on(tmp_path, stop):
    command = [sys.executable, "-m", "hbll", "train", "digits", "--epochs", "100000", "--run-dir", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("epoch 1/100000")
        with pytest.raises(ValueError, match=f"is being written by process {process.pid} on "), held(tmp_path / "run"):
            pytest.fail("two processes hold it")
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "hbll: stopped and saved; `hbll train digits --run-dir run --resume` goes on"
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    with held(tmp_path / "run"):
        pass


def test_an_interruption_before_anything_is_begun_is_told(hbll, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hbll.recipes.digits.Digits.load", interrupt)
    assert hbll("train", "digits") == (130, "", "hbll: interrupted\n")
    assert not list(Path().iterdir())


def test_options_that_are_given_go_before_a_preset(hbll, small_data):
    options = ["--epochs", "1", "--width", "16", "--blocks", "1", "--train-samples", "60", "--batch-size", "30"]
    arguments = ["cifar10-vit", *options, "--preset", "paper", "--rule", "bp", "--data-dir", small_data]
    assert hbll("train", *arguments, "--run-dir", "run")[0] == 0
    stored = json.loads(Path("run/configuration.json").read_text())["options"]
    assert {option: stored[option] for option in ("preset", "epochs", "width", "batch_size")} == {
        "preset": "paper",
        "epochs": 1,
        "width": 16,
        "batch_size": 30,
    }
    assert (stored["rand_augment"], stored["noise"], stored["learning_rate"]) == (2, 0.005, 5e-4)
    assert hbll("train", *arguments, "--run-dir", "run", "--resume")[0] == 0
    assert hbll("train", "cifar10-vit", "--run-dir", "run", "--resume")[0] == 0


def test_a_table_is_made_and_shown_beside_the_papers(hbll, small_data):
    arguments = ["reproduce", "table2", "--rules", "greedy", "--epochs", "1", "--data-dir", small_data]
    code, out, _ = hbll(*arguments)
    assert code == 0
    header, row, page = out.splitlines()
    assert header.split() == ["rule", *(word for path in PATHS for word in (*path.split(), "paper"))]
    assert page == "page: runs/table2-small/report.html"
    assert " ".join(row.split()[:4]) == "greedy (stage 3 4)"
    told = (
        "runs/table2-small is the folder of a table, whose page is runs/table2-small/report.html: name one of its runs"
    )
    assert hbll("report", "runs/table2-small") == (2, "", f"hbll: {told}\n")
    (measured,) = json.loads(hbll(*arguments, "--json")[1])["rows"]
    assert [f"{value:.2f}" for figure in measured["figures"] for value in figure["measured"]] == row.split()[4:]


def test_a_table_that_cannot_be_made_says_why(hbll, small_data):
    arguments = ["table4", "--rules", "bp", "--epochs", "1", "--train-samples", "60", "--data-dir", small_data]
    code, out, err = hbll("reproduce", *arguments)
    assert (code, out) == (2, "")
    assert err == "hbll: --train-samples 60 is less than the 128 samples of a step\n"
    assert not Path("runs").exists()

    arguments = ["table5", "--corpus", "novels", "--rules", "bp", "--epochs", "1", "--data-dir", small_data]
    code, out, err = hbll("reproduce", *arguments)
    assert (code, out) == (2, "")
    assert "give --vocabulary-size" in err


def test_a_table_without_its_text_names_the_one_that_stands_in(hbll, small_data):
    code, out, err = hbll("reproduce", "table5", "--data-dir", small_data)
    assert (code, out) == (2, "")
    assert re.search("wiki.train.tokens of WikiText-103 is missing", err)
    assert "--corpus novels" in err
    assert not Path("runs").exists()

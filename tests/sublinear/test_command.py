import subprocess
import sys

import numpy as np
import pytest

from hbll.sublinear.command import BenchOptions, FitOptions, bench, fit, read_table


@pytest.fixture
def table(tmp_path):
    def write(text, name="data.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("target", ["b", "1", "-2"])
def test_a_target_has_a_name_or_an_index(table, target):
    X, y = read_table(table("a,b,c\n1,2,3\n4,5,6\n"), target)
    np.testing.assert_array_equal(X, [[1, 3], [4, 6]])
    np.testing.assert_array_equal(y, [2, 5])


def test_a_header_is_optional(table):
    X, y = read_table(table("1,2\n3,4\n\n"), "0")
    np.testing.assert_array_equal(X, [[2], [4]])
    np.testing.assert_array_equal(y, [1, 3])


def test_arrays(tmp_path):
    path = tmp_path / "data.npz"
    X, y = np.arange(6.0).reshape(3, 2), np.array([5, 6, 7])
    np.savez(path, X=X, y=y, names=np.array(["p", "q"]))
    for target, expected in (("y", (X, y)), ("0", (X[:, 1:], X[:, 0]))):
        for got, wanted in zip(read_table(path, target), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("text", "target", "sentence"),
    [
        ("", "0", "is empty"),
        ("a,b\n1,2\n3\n", "a", "row 2 has 1 values, and 2 are needed"),
        ("a,b\n1,2\n3,x\n", "a", "row 2 holds 'x', which is not a number"),
        ("a,b\n1,2\n", "c", r"no column 'c' among its 2 \(a, b\)"),
        ("1,2\n", "2", "no column '2' among its 2"),
        ("a\n1\n", "a", "has one column"),
    ],
)
def test_bad_tables(table, text, target, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_table(table(text), target)
    assert "\n" not in str(caught.value)


def test_bad_files(table, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_table(tmp_path / "none.csv", "0")
    with pytest.raises(ValueError, match=r"ends in '\.txt'"):
        read_table(table("1", "data.txt"), "0")
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(table("no archive", "data.npz"), "y")
    np.savez(tmp_path / "x.npz", Z=np.ones((2, 2)))
    with pytest.raises(ValueError, match="holds no array X"):
        read_table(tmp_path / "x.npz", "y")
    np.savez(tmp_path / "y.npz", X=np.ones((2, 2)), y=np.ones(3))
    with pytest.raises(ValueError, match=r"y has shape \(3,\), and X has 2 rows"):
        read_table(tmp_path / "y.npz", "y")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a table of comma-separated values"):
        read_table(tmp_path / "binary.csv", "0")


def test_fit_tells_the_errors(tmp_path, capsys):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 3))
    np.savez(tmp_path / "data.npz", X=X, y=X[:, 0])
    fit(FitOptions(tmp_path / "data.npz", "y", width=2048))
    printed = capsys.readouterr().out
    assert "RMSE on 48 training rows" in printed
    assert "RMSE on 12 held-out rows" in printed
    fit(FitOptions(tmp_path / "data.npz", "y", width=2048, test_share=0))
    assert "held-out" not in capsys.readouterr().out


def test_fit_refuses(table):
    path = table("a,b\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="test_share is 1"):
        fit(FitOptions(path, "a", test_share=1))
    with pytest.raises(ValueError, match="has 2 rows, and 2 of them are to be held out"):
        fit(FitOptions(path, "a", test_share=0.9))
    with pytest.raises(ValueError, match="width is 0"):
        fit(FitOptions(path, "a", width=0, test_share=0))


def test_bench_times_every_engine(capsys):
    bench(BenchOptions(width=512, points=16, features=4, engines=("tree", "slack", "compact", "dense"), repeats=1))
    printed = capsys.readouterr().out
    for name in ("tree", "slack", "compact", "dense"):
        assert name in printed
    with pytest.raises(ValueError, match="points is 0"):
        bench(BenchOptions(points=0))


def test_importing_the_package_is_cheap():
    """Neither torch, which the part never needs, nor what only a fit needs: the command line imports the options."""
    code = (
        "import sys, importlib.util, types\n"
        "spec = importlib.util.find_spec('hbll')\n"
        "package = types.ModuleType('hbll'); package.__path__ = spec.submodule_search_locations\n"
        "sys.modules['hbll'] = package\n"  # the part alone, without what hbll itself may import
        "import hbll.sublinear.command\n"
        "assert not {'torch', 'numba', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "from hbll.sublinear import fit, SublinearRegressor\n"
        "assert 'torch' not in sys.modules\n"
        "others = [name for name in sys.modules if name.startswith('hbll.') and 'sublinear' not in name]\n"
        "assert not set(others) - {'hbll.machine'}, others\n"  # how much memory there is
    )
    subprocess.run([sys.executable, "-c", code], check=True)

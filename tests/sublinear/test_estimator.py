import pickle

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from hbll.sublinear import SublinearRegressor


@parametrize_with_checks([SublinearRegressor(width=1024, random_state=0)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_takes_it_for_one_of_its_own(estimator, check):
    check(estimator)


def task(n=40, d=4):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d))
    return X, 1e6 + 1e3 * np.sin(X[:, 0])


def test_training_targets_are_met_in_their_own_units():
    X, y = task()
    regressor = SublinearRegressor(2**13, kappa=0.2, random_state=0).fit(X, y)
    # the loss is at most 1e-6 in units of the variance, so no residual exceeds sqrt(2e-6) of the deviation
    assert np.abs(regressor.predict(X) - y).max() <= np.sqrt(2e-6) * y.std() * 1.01


def test_the_length_of_a_row_is_not_lost():
    X = np.array([[1.0], [4.0], [0.0]])  # one direction, and a row of zeros
    y = np.array([1.0, 3.0, 0.0])
    regressor = SublinearRegressor(2**12, kappa=0.1, random_state=0).fit(X, y)
    np.testing.assert_allclose(regressor.predict(X), y, atol=0.01 * y.std())


def test_several_targets_and_constant_ones():
    X, y = task()
    Y = np.column_stack([y, np.full(40, 7.0)])
    regressor = SublinearRegressor(2**13, kappa=0.2, random_state=0).fit(X, Y)
    assert regressor.predict(X).shape == (40, 2)
    np.testing.assert_allclose(regressor.predict(X)[:, 1], 7, atol=2e-3)


def test_contradicting_points_are_told():
    X, y = np.ones((2, 3)), np.array([0.0, 1.0])
    with pytest.warns(ConvergenceWarning, match="a target's loss is above tol"):
        regressor = SublinearRegressor(500, kappa=0.1, random_state=0).fit(X, y)
    np.testing.assert_allclose(regressor.predict(X), 0.5, atol=1e-3)  # the least squares of both


def test_pickled_it_predicts_the_same():
    X, y = task()
    regressor = SublinearRegressor(2**12, kappa=0.2, random_state=0).fit(X, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(regressor)).predict(X), regressor.predict(X))

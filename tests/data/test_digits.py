import torch
from sklearn.datasets import load_digits

from hbll.data import digits


def test_the_parts_make_up_the_whole_set_and_share_nothing():
    splits = digits()
    parts = [torch.cat([part.inputs * 16, part.labels[:, None]], 1) for part in (splits.train, splits.test)]
    images, labels = load_digits(return_X_y=True)
    whole = torch.cat([torch.from_numpy(images), torch.from_numpy(labels)[:, None]], 1).float()
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


def test_inputs_are_in_the_unit_interval_and_of_the_usual_types():
    train = digits().train
    assert train.inputs.dtype == torch.float32
    assert train.inputs.min() == 0
    assert train.inputs.max() == 1
    assert train.labels.dtype == torch.int64


def test_every_class_has_its_share_of_the_test_samples():
    splits = digits()
    shares = splits.test.labels.bincount() / (splits.train.labels.bincount() + splits.test.labels.bincount())
    assert len(splits.test) == 360
    assert ((shares - 360 / 1797).abs() < 0.005).all()


def test_the_split_is_always_the_same_whatever_the_seed():
    torch.manual_seed(1)
    first = digits()
    torch.manual_seed(2)
    assert first.test.inputs.equal(digits().test.inputs)

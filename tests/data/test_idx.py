import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hbll.data import idx


@given(arrays(np.uint8, array_shapes(max_dims=4)))
def test_what_was_encoded_is_decoded(array):
    decoded = idx.decode(idx.encode(array))
    assert decoded.shape == array.shape
    assert (decoded == array).all()


@given(st.integers(1, 300))
def test_images_have_the_published_magic_number_and_sizes(count):
    content = idx.encode(np.zeros((count, 28, 28), np.uint8))
    header = np.frombuffer(content[:16], ">u4")
    assert header.tolist() == [2051, count, 28, 28]
    assert len(content) == 16 + count * 784

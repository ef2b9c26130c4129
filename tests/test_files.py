import errno
import json
import os

import pytest
import torch

from hbll.files import read_tensors, sealed, unsealed, write_atomically, write_tensors


def test_an_interruption_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_names_the_file_and_leaves_no_unfinished_one(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "old")
    (tmp_path / "file.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(file, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_was_sealed_is_known_again(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"c": "ä"}}
    stored = json.loads(json.dumps(sealed(content)))
    assert unsealed(stored, tmp_path) == content
    for other in (stored | {"b": [1, 2.5]}, stored | {"more": 1}, stored | {"sha256": "0"}, content, {}, [], 3, None):
        with pytest.raises(ValueError, match="its checksum is not that of its content"):
            unsealed(other, tmp_path)


def test_tensors_that_share_memory_are_written_each(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "file", {"whole": whole, "row": whole[1], "turned": whole.T}, {"of": "test"})
    tensors, metadata = read_tensors(tmp_path / "file")
    assert metadata == {"of": "test"}
    assert tensors["row"].equal(whole[1])
    assert tensors["turned"].equal(whole.T)


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path):
    file = tmp_path / "file"
    state = {"weight": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}
    write_tensors(file, state, {"of": "test"})
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            tensors, metadata = read_tensors(file)
        except ValueError as error:
            assert "cannot be read" in str(error)  # noqa: PT017
        else:  # white space between parts of the header
            assert metadata == {"of": "test"}
            assert all(tensors[name].equal(tensor) for name, tensor in state.items())


def test_a_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"file cannot be read: .* its checksum is not that of its content"):
        read_tensors(tmp_path / "file")

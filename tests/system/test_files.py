"""Files: complete under their final names, readable in the encodings that other programs write."""

import codecs
import gzip
import json
from multiprocessing import get_context

import pytest

from nnunet_dycon.errors import UserError
from nnunet_dycon.system.files import is_compressed, new_folder, read_json, read_text, replacing, require_whole

CONTENT = {"labeled": ["Müller_01", "b"]}


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-16-le", b""),
    ],
)
def test_json_and_text_of_other_encodings_are_read(tmp_path, encoding, mark):
    text = json.dumps(CONTENT, ensure_ascii=False)
    (tmp_path / "x.json").write_bytes(mark + text.replace("\n", "\r\n").encode(encoding))
    assert read_json(tmp_path / "x.json") == CONTENT
    if mark or encoding == "utf-8":
        assert read_text(tmp_path / "x.json") == text


def test_damaged_json_raises_value_error(tmp_path):
    (tmp_path / "x.json").write_bytes(b"{")
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


def _write(file, text, barrier):
    for _ in range(50):
        barrier.wait()
        with replacing(file) as partial:
            partial.write_text(text)


def test_two_writers_of_one_file_leave_one_complete_content(tmp_path):
    """With a common temporary name, one of them would rename the half-written file of the other."""
    file, texts = tmp_path / "x.json", ["a" * 100_000, "b" * 200_000]
    context = get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_write, args=(file, text, barrier)) for text in texts]
    for writer in writers:
        writer.start()
    for _ in range(50):
        barrier.wait()
        if file.exists():
            assert file.read_text() in texts
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")

    def fail():
        with replacing(file) as partial:
            partial.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("x", "old")]


def test_uncompressed_file_named_gz_is_whole_and_a_truncated_gzip_is_not(tmp_path):
    plain, compressed = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    plain.write_bytes(b"not compressed")
    require_whole(plain)
    assert not is_compressed(plain)
    compressed.write_bytes(gzip.compress(bytes(10_000))[:-4])
    assert is_compressed(compressed)
    with pytest.raises(EOFError):
        require_whole(compressed)


def test_two_writers_of_one_folder_do_not_mix_their_files(tmp_path):
    """With a common temporary folder, the second one would delete the files of the first one."""
    folder = tmp_path / "x"
    (tmp_path / ".x.1.partial").mkdir()  # remainder of a killed run
    with new_folder(folder) as partial:
        (partial / "first").touch()
        with pytest.raises(UserError, match="a command that writes x is running"), new_folder(folder):
            pass
        (partial / "second").touch()
    assert sorted(entry.name for entry in folder.iterdir()) == ["first", "second"]
    assert list(tmp_path.iterdir()) == [folder]

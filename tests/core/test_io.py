"""Files appear complete or not at all."""

import pytest

from slim.core.io import atomic_path, read_json, write_json


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "a.json"
    with atomic_path(path) as partial:
        partial.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}"
    assert list(path.parent.iterdir()) == [path]


def test_what_failed_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    left = tmp_path / "folder.partial"
    (left / "inside").mkdir(parents=True)
    with atomic_path(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "file").write_text("new")
    names = [path.name for path in (tmp_path / "folder").iterdir()]
    assert names == ["file"]
    assert not left.exists()

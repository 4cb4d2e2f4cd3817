"""The walk of a folder: a fixed order, each real folder once whatever the links, and a count of everything left out."""

import os
from pathlib import Path

import pytest

from titan_attent.data.io.walk import FolderWalk, LeftOut


def _make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def _walked(root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in FolderWalk(root).files()]


def test_files_go_before_folders_each_by_name(tmp_path):
    _make(tmp_path, "b/2.txt", "b/1.txt", "a/z.txt", "c.txt", "a.txt", "b/a/0.txt", "a-b/x.txt")
    assert _walked(tmp_path) == ["a.txt", "c.txt", "a/z.txt", "a-b/x.txt", "b/1.txt", "b/2.txt", "b/a/0.txt"]


def test_what_python_compiled_beside_its_sources_is_hidden(tmp_path):
    """Otherwise a folder of imported modules would have more files left out than read."""
    _make(tmp_path, "a.py", "__pycache__/a.cpython-311.pyc", "__pycache__/a.cpython-312.pyc", "sub/__pycache__/b.pyc")
    walk = FolderWalk(tmp_path)
    assert _walked(tmp_path) == ["a.py"]
    assert walk.left_out.counts == {"hidden": 2} and walk.left_out.num_counted == 0


def test_links_to_folders_are_followed(tmp_path):
    _make(tmp_path / "root", "a/x.txt")
    _make(tmp_path / "elsewhere", "y.txt", "sub/z.txt")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    walk = FolderWalk(tmp_path / "root")
    assert _walked(tmp_path / "root") == ["a/x.txt", "b/y.txt", "b/sub/z.txt"]
    assert not walk.left_out
    assert walk.folders() == ["a", "b"]
    assert [os.path.basename(path) for path in walk.files("b")] == ["y.txt", "z.txt"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "../cat/sub"])
def test_a_link_within_the_tree_gives_no_copy(tmp_path, target):
    """Also if the link sorts before its target: a file is read under its real path."""
    root = tmp_path / "root"
    _make(root, "cat/1.txt", "cat/sub/2.txt", "dog/3.txt")
    (root / "cat/a").symlink_to(target)
    walk = FolderWalk(root)
    assert _walked(root) == ["cat/1.txt", "cat/sub/2.txt", "dog/3.txt"]
    # "../.." leads to a folder outside of the tree, which is read once, without the tree in it.
    assert walk.left_out.counts["linked twice"] == 1


def test_links_that_lead_to_each_other_end(tmp_path):
    _make(tmp_path, "root/1.txt", "one/2.txt", "two/3.txt")
    (tmp_path / "root/one").symlink_to(tmp_path / "one")
    (tmp_path / "one/two").symlink_to(tmp_path / "two")
    (tmp_path / "two/one").symlink_to(tmp_path / "one")
    (tmp_path / "two/root").symlink_to(tmp_path / "root")
    assert _walked(tmp_path / "root") == ["1.txt", "one/2.txt", "one/two/3.txt"]


def test_a_folder_that_two_links_lead_to_is_read_under_the_first(tmp_path):
    _make(tmp_path, "disk/1.txt", "disk/sub/2.txt", "root/0.txt")
    for name, target in (("b", "disk"), ("a", "disk"), ("c", "disk/sub")):
        (tmp_path / "root" / name).symlink_to(tmp_path / target)
    walk = FolderWalk(tmp_path / "root")
    assert _walked(tmp_path / "root") == ["0.txt", "a/1.txt", "a/sub/2.txt"]
    assert walk.left_out.counts == {"linked twice": 2}
    assert list(walk.files("b")) == []


def test_links_to_files_give_no_copies_of_files_that_are_read(tmp_path):
    root = tmp_path / "root"
    _make(tmp_path, "out.txt", "root/b/1.txt", "root/blob", "root/c/other.bin")
    for link, target in {
        "a.txt": "b/1.txt",  # sorts before its target
        "b/out.txt": "../../out.txt",
        "c/out.txt": "../../out.txt",
        "c/blob.txt": "../blob",  # its real path is no .txt
        "c/self.bin": "other.bin",
    }.items():
        (root / link).symlink_to(target)
    walk = FolderWalk(root)
    copies = walk.drop_copies(lambda path: path.endswith(".txt"))
    assert {os.path.relpath(path, root) for path in copies} == {"a.txt", "c/out.txt"}
    read = [os.path.relpath(path, root) for path in walk.files()]
    assert read == ["blob", "b/1.txt", "b/out.txt", "c/blob.txt", "c/other.bin", "c/self.bin"]
    assert walk.left_out.counts == {"linked twice": 2} and walk.left_out.num_counted == 0


def test_what_a_walk_leaves_out_is_counted(tmp_path):
    _make(tmp_path, "a.txt", ".git/config", ".hidden.txt")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "copy.txt").symlink_to("a.txt")
    walk = FolderWalk(tmp_path)
    assert _walked(tmp_path) == ["a.txt", "copy.txt"]
    assert walk.left_out.counts == {"hidden": 2, "dead link": 2, "not a file": 1}
    assert walk.left_out.num_counted == 3


def test_summary_has_count_and_first_of_each_reason():
    left_out = LeftOut()
    assert not left_out
    assert left_out.summary() == ""
    left_out.add("hidden", "a/.x")
    left_out.add("dead link", "b", count=2000)
    left_out.add("hidden", "c/.y")
    assert left_out.summary() == "left out 2,000 dead link (first: b), 2 hidden (first: a/.x)"
    other = LeftOut()
    other.add("hidden", "z")
    other.update(left_out)
    assert other.counts == {"hidden": 3, "dead link": 2000}

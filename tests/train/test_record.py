"""The record in run.json of the code that ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tfcli.train.record import git_commit


def git(folder: Path, *words: str) -> str:
    """Run git in a folder, without the user's settings."""
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *named, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit."""
    folder = tmp_path / "outer"
    folder.mkdir()
    git(folder, "init")
    git(folder, "commit", "--allow-empty", "-m", "one")
    return folder


def test_the_commit_is_that_of_the_checkout(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert git_commit(repository) == commit
    git(repository, "pack-refs", "--all")
    assert git_commit(repository) == commit
    git(repository, "checkout", "--detach")
    assert git_commit(repository) == commit


@pytest.mark.parametrize("how", [["-b", "other"], ["--detach"]])
def test_a_worktree_has_its_own_commit(repository: Path, how: list[str]) -> None:
    """A worktree inside another repository has its own commit."""
    inner = repository / "inner"
    git(repository, "worktree", "add", *how, str(inner))
    git(inner, "commit", "--allow-empty", "-m", "two")
    assert git_commit(inner) == git(inner, "rev-parse", "HEAD") != git(repository, "rev-parse", "HEAD")


def test_a_repository_around_an_installation_is_not_ours(repository: Path) -> None:
    packages = repository / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    assert git_commit(packages) is None

"""Where the cache is when nothing says where."""

import os
import pwd
from pathlib import Path

import pytest

from seppo_fast import config
from seppo_fast.data.fingerprint import cache_root
from seppo_fast.errors import UserError


def test_the_default_folder_needs_a_home(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_root(config.Data()) == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "seppo_fast"
    nobody = 4_000_000_000  # a user id without a name, as containers have
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    for home in (None, ""):
        if home is not None:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(UserError, match="user 4000000000 has no home folder here.*seppo.data.cache_dir"):
            cache_root(config.Data())
    assert cache_root(config.Data(cache_dir=str(tmp_path))) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert cache_root(config.Data(cache_dir="~nobody-of-this-name/x")) == Path("~nobody-of-this-name/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(config.Data(cache_dir="~/x")) == tmp_path / "x"
    (tmp_path / "~").mkdir()
    assert cache_root(config.Data(cache_dir="~")) == Path("~")

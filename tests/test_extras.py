"""A package that only an extra installs and that is missing: the message names it and pip's command."""

import re
import sys
import tomllib

import pytest
from conftest import ROOT

from seppo_fast.data.video.probe import need_av
from seppo_fast.errors import UserError
from seppo_fast.extras import need


def test_a_package_that_is_there_is_given() -> None:
    assert need("json", "nothing", "seppo-fast[video]").loads("1") == 1


@pytest.mark.parametrize("name", ["av", "no_such_package"])
def test_a_package_that_is_missing_is_a_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        need_av() if name == "av" else need(name, "a thing", "seppo-fast[gpu]")
    what, extra = ("reading videos", "video") if name == "av" else ("a thing", "gpu")
    assert str(caught.value).startswith(f"{what} needs the package {name}, which is not here (")
    assert str(caught.value).endswith(f": pip install 'seppo-fast[{extra}]'")


def test_extras_that_messages_name_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    code = "".join(file.read_text() for file in (ROOT / "seppo_fast").rglob("*.py"))
    named = {name for names in re.findall(r"seppo-fast\[([\w,]+)\]", code) for name in names.split(",")}
    assert {"quickstart", "video", "evaluation", "monitor"} <= named <= extras.keys()

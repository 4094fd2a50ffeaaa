"""The prepared set that the tests of the stream share."""

import pytest

pytest.register_assert_rewrite("failing", "numbered", "userrows")

import numbered  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return numbered.write(tmp_path_factory.mktemp("data") / "prepared", [numbered.columns()])

"""docs/http.md names every path and every field."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from tests.router.http.fake_service import FakeService
from xllm.router.http.application import routes_of
from xllm.router.http.context import FrontContext
from xllm.router.http.figures import HttpFigures
from xllm.router.http.schema import ChatBody, CompletionBody

PAGE = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"`([^`]+)`", PAGE))


def test_every_path_is_on_the_page():
    context = FrontContext(FakeService(), None, None)
    paths = {route.path for route in routes_of(context, HttpFigures(CollectorRegistry(), int))}
    assert paths == {name for name in NAMES if name.startswith("/")}


def test_every_field_is_on_the_page():
    fields = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__}
    assert fields - NAMES == set()

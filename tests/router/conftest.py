"""A bench of a router for a test's coroutine."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.router_bench import bench


@pytest.fixture
def in_bench(run_dir, tmp_path):
    """Runs a coroutine function over a fresh bench."""

    def run(test, **router):
        async def body():
            async with bench(run_dir, tmp_path, **router) as made:
                await test(made)

        asyncio.run(asyncio.wait_for(body(), 30))

    return run

"""The fault proxy: passes everything on, and each of its faults does what it says."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from xllm.cli.chaos.fault_proxy import FaultProxy


@contextlib.asynccontextmanager
async def echo_behind(endpoint):
    """A proxy before a server that echoes; gives (proxy, connect)."""

    async def echo(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = FaultProxy(endpoint, random.Random(1), lambda: f"tcp://127.0.0.1:{port}")
    await proxy.start()

    opened = []

    async def connect():
        scheme, _, rest = proxy.endpoint.partition("://")
        if scheme == "ipc":
            pair = await asyncio.open_unix_connection(rest)
        else:
            host, _, port = rest.rpartition(":")
            pair = await asyncio.open_connection(host, int(port))
        opened.append(pair[1])
        return pair

    try:
        async with asyncio.timeout(20):
            yield proxy, connect
    finally:
        for writer in opened:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await proxy.close()
        server.close()
        await server.wait_closed()


async def ask(connection, data):
    reader, writer = connection
    writer.write(data)
    return await reader.readexactly(len(data))


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_bytes_pass(kind, run_dir):
    async def main():
        endpoint = "tcp://127.0.0.1:0" if kind == "tcp" else f"ipc://{run_dir}/p"
        async with echo_behind(endpoint) as (proxy, connect):
            connection = await connect()
            data = random.Random(2).randbytes(1 << 20)
            assert await ask(connection, data) == data
            assert (proxy.num_connections, proxy.num_open) == (1, 1)
            connection[1].close()
            while proxy.num_open:
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_silence_holds_back_and_heals():
    async def main():
        async with echo_behind("tcp://127.0.0.1:0") as (proxy, connect):
            reader, writer = await connect()
            assert await ask((reader, writer), b"one") == b"one"
            proxy.silence(down=False)
            writer.write(b"two")
            while not proxy.num_held:
                await asyncio.sleep(0.001)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), 0.05)
            proxy.heal()
            assert await reader.readexactly(3) == b"two"

    asyncio.run(main())


def test_cutting_ends_connections_and_may_refuse_new_ones():
    async def main():
        async with echo_behind("tcp://127.0.0.1:0") as (proxy, connect):
            first = await connect()
            await ask(first, b"x")
            proxy.silence()
            assert proxy.cut(refuse=True) == 1
            with contextlib.suppress(ConnectionResetError):
                assert await first[0].read() == b""
            while proxy.num_open:
                await asyncio.sleep(0.001)
            second = await connect()
            assert await second[0].read() == b""
            assert proxy.num_refused == 1
            proxy.heal()
            assert await ask(await connect(), b"y") == b"y"

    asyncio.run(main())


def test_half_open_says_nothing():
    async def main():
        async with echo_behind("tcp://127.0.0.1:0") as (proxy, connect):
            reader, writer = await connect()
            await ask((reader, writer), b"x")
            assert proxy.half_open() == 1
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            writer.close()

    asyncio.run(main())


def test_delay_keeps_the_order_and_corruption_changes_one_byte():
    async def main():
        async with echo_behind("tcp://127.0.0.1:0") as (proxy, connect):
            connection = await connect()
            loop = asyncio.get_running_loop()
            proxy.up.delay_s, proxy.up.jitter_s = 0.05, 0.05
            began = loop.time()
            data = b""
            for index in range(20):
                connection[1].write(bytes([index]) * 10)
                data += bytes([index]) * 10
                await asyncio.sleep(0)
            assert await connection[0].readexactly(200) == data
            proxy.heal()
            proxy.down.delay_s = 0.1
            began = loop.time()
            assert await ask(connection, b"late") == b"late"
            assert loop.time() - began >= 0.1
            proxy.heal()
            proxy.down.num_corrupt = 1
            wrong = await ask(connection, bytes(64))
            assert sum(map(bool, wrong)) == 1
            assert await ask(connection, bytes(64)) == bytes(64)
            assert proxy.num_corrupted == 1

    asyncio.run(main())

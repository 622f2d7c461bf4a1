"""What no file may say: ways to run received bytes, the environment, sockets beside the transport.

The rules are themselves tested on small pieces of code that break them.
"""

from __future__ import annotations

import ast

import pytest

from tests.architecture.sources import sources

PICKLERS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "diskcache",
    "joblib", "jsonpickle", "copyreg", "runpy",
}  # fmt: skip
BANNED_MODULES = PICKLERS | {"imp", "xmlrpc", "telnetlib"}
PICKLING_SUBMODULES = {"connection", "managers", "pool", "queues", "reduction", "shared_memory"}
"""Of multiprocessing: what they send between processes they pickle, or leave in /dev/shm."""
MAY_PIPE = {"benchmarks/loading.py", "benchmarks/tensor_parallel.py"}
"""Pipes between one benchmark and the children that it spawned: no byte comes from elsewhere."""
BANNED_CALLS = {
    "eval", "exec", "recv_pyobj", "send_pyobj", "ProcessPoolExecutor", "SocketHandler",
    "DatagramHandler", "broadcast_object_list", "all_gather_object", "gather_object",
    "scatter_object_list", "send_object_list", "recv_object_list", "mktemp", "read_pickle",
    "run_path", "run_module",
}  # fmt: skip
BANNED_MULTIPROCESSING = {"Queue", "SimpleQueue", "JoinableQueue", "Pipe", "Manager", "Pool"}
YAML_LOADERS = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load"}
WIDE_ADDRESSES = ("tcp://*", "tcp://0.0.0.0")


def violations(path, tree):
    """What the file says that it may not, as `line: word`."""
    found = []
    for node in ast.walk(tree):
        words = (*_of_imports(path, node), *_of_uses(path, node))
        found.extend(f"{node.lineno}: {word}" for word in words)
    return found


def _of_imports(path, node):
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [node.module]
        if node.module == "os":
            names += [f"os.{alias.name}" for alias in node.names]
        if node.module.startswith("multiprocessing"):
            names += [f"mp.{alias.name}" for alias in node.names]
    for name in names:
        top = name.split(".")[0]
        if top in BANNED_MODULES:
            yield f"import {name}"
        piped = (
            path not in MAY_PIPE
            and top in ("multiprocessing", "mp")
            and name.split(".")[-1] in PICKLING_SUBMODULES
        )
        if piped or name.startswith("torch.multiprocessing"):
            yield f"import {name}"
        if top == "zmq" and path.startswith("xllm/") and "/transport/" not in path:
            yield "zmq outside of the transport"
        if name in ("os.environ", "os.getenv", "os.putenv") and _no_environment(path):
            yield "the environment outside of config"
        if top == "mp" and name.split(".")[-1] in BANNED_MULTIPROCESSING:
            yield f"multiprocessing {name}"


def _of_uses(path, node):
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        if text in ("os.environ", "os.getenv", "os.putenv") and _no_environment(path):
            yield "the environment outside of config"
    if isinstance(node, ast.Constant) and str(node.value).startswith(WIDE_ADDRESSES):
        yield "an address that listens everywhere"
    if not isinstance(node, ast.Call):
        return
    text = ast.unparse(node.func)
    name = text.split(".")[-1]
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in BANNED_CALLS and not (name in ("eval", "exec") and text != name):
        yield text
    if name in BANNED_MULTIPROCESSING and "." in text:
        owner = text.rpartition(".")[0].lower()
        known = owner in ("multiprocessing", "mp", "ctx") or "context" in owner
        if known and path not in MAY_PIPE:
            yield text
    if name in ("import_module", "__import__") and node.args:
        what = node.args[0]
        if isinstance(what, ast.Constant) and str(what.value).split(".")[0] in BANNED_MODULES:
            yield f"{text} of {what.value}"
    if name == "load" and text.split(".")[0] == "torch" and not _true(keywords, "weights_only"):
        yield f"{text} without weights_only=True"
    numpy_load = name == "load" and text.split(".")[0] in ("np", "numpy")
    if numpy_load and "allow_pickle" in keywords and not _false(keywords, "allow_pickle"):
        yield f"{text} with allow_pickle"
    if text.split(".")[0] == "yaml" and name in YAML_LOADERS:
        yield text
    if "ext_hook" in keywords or "object_hook" in keywords or "dec_hook" in keywords:
        yield f"{text} with a hook for received types"
    if _true(keywords, "trust_remote_code"):
        yield f"{text} trusts remote code"
    if _true(keywords, "shell"):
        yield f"{text} through a shell"
    if text == "hash" and path.startswith("xllm/"):
        yield "hash(): differs from process to process"


def _true(keywords, name):
    value = keywords.get(name)
    return isinstance(value, ast.Constant) and value.value is True


def _false(keywords, name):
    value = keywords.get(name)
    return isinstance(value, ast.Constant) and value.value is False


def _no_environment(path):
    return path.startswith("xllm/") and not path.startswith("xllm/config/")


@pytest.mark.parametrize("folder", ["xllm", "examples", "benchmarks", "scripts"])
def test_nobody_says_what_is_banned(folder):
    found = {}
    for source in sources(folder):
        if words := violations(source.path, source.tree):
            found[source.path] = words
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "socket.recv_pyobj()",
        "eval('1')",
        "exec(code)",
        "import os\nos.environ['A']",
        "from os import environ",
        "import os\nos.getenv('A')",
        "import zmq",
        "import zmq.auth",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "import multiprocessing\nmultiprocessing.Queue()",
        "from multiprocessing import Pipe",
        "mp.Manager()",
        "self._context.Queue()",
        "multiprocessing.get_context('spawn').Pipe()",
        "from multiprocessing.connection import Listener",
        "from multiprocessing import connection",
        "import multiprocessing.managers",
        "import torch.multiprocessing as m",
        "importlib.import_module('pickle')",
        "pd.read_pickle(path)",
        "runpy.run_path(path)",
        "dist.broadcast_object_list(x)",
        "msgpack.unpackb(data, ext_hook=f)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "hash(tokens)",
        "bind('tcp://*:5555')",
        "bind('tcp://0.0.0.0:5555')",
    ],
)
def test_the_rules_catch_what_they_are_for(text):
    assert violations("xllm/router/view.py", ast.parse(text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("xllm/protocol/transport/channel.py", "import zmq"),
        ("xllm/config/environment.py", "import os\nos.environ['A']"),
        ("xllm/worker/loader.py", "torch.load(path, weights_only=True)"),
        ("xllm/worker/x.py", "model.eval()"),
        ("xllm/worker/x.py", "np.load(path, allow_pickle=False)"),
        ("xllm/worker/x.py", "queue.Queue()"),
        ("xllm/kvcache/x.py", "content.hash()"),
    ],
)
def test_the_rules_leave_the_rest_alone(path, text):
    assert violations(path, ast.parse(text)) == []


def test_no_type_is_ignored_without_a_code_and_a_reason():
    found = []
    for source in sources("xllm"):
        for number, line in enumerate(source.text.splitlines(), 1):
            _, mark, rest = line.partition("# type: ignore")
            if mark and not (rest.startswith("[") and "#" in rest):
                found.append(f"{source.path}:{number}")
    assert found == []


def test_no_exception_is_swallowed_without_a_word():
    """`except: pass` needs a comment beside it that says why; a bare except is never right."""
    found = []
    for source in sources("xllm"):
        lines = source.text.splitlines()
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                found.append(f"{source.path}:{node.lineno} bare except")
            if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                spoken = lines[node.lineno - 1 : node.body[0].lineno]
                if not any("#" in line for line in spoken):
                    found.append(f"{source.path}:{node.lineno} pass without a reason")
    assert found == []


def test_asserts_do_not_validate_what_comes_in():
    """An assert on a message's or a setting's field is validation in disguise."""
    found = []
    for source in sources("xllm"):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Assert):
                continue
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            compared = any(isinstance(n, ast.Compare) for n in ast.walk(node.test))
            is_none = " is not None" in ast.unparse(node.test)
            if compared and not is_none and names & {"request", "settings", "environ", "argv"}:
                found.append(f"{source.path}:{node.lineno} {ast.unparse(node.test)}")
    assert found == []


def test_nothing_is_dispatched_by_a_name_that_was_received():
    """Behind the front ends no attribute or module is looked up by a name that is not written
    in the code: messages choose from closed unions instead."""
    behind = ("xllm/protocol/", "xllm/kvcache/", "xllm/master/", "xllm/worker/", "xllm/client/")
    found = []
    for source in sources("xllm"):
        if not source.path.startswith(behind):
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            looks_up = name in ("getattr", "setattr", "import_module", "importlib.import_module")
            written = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            if name.endswith("import_module"):
                written = isinstance(node.args[0], ast.Constant)
            if (looks_up and not written) or name in ("globals", "vars", "locals", "__import__"):
                found.append(f"{source.path}:{node.lineno} {ast.unparse(node)}")
    assert found == []

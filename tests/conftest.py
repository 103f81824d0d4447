"""What every test may ask for."""

import importlib.util
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from flyweight.spaces import Capabilities

# It says that Ray is to ask for tokens, which Ray reads when it is imported: before any test does.
importlib.import_module("flyweight.search")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # as for its scripts

# No deadline: the first example of a property often pays for an import or a trace.
settings.register_profile("flyweight", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("flyweight")

# A shell that starts the tests in the background has SIGINT ignored by all that they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _load(path: Path) -> ModuleType:
    """The module in the file ``path``, once a process (tests/ is on no path)."""
    name = f"flyweight_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Torch on one thread: small networks are slower on more, and runs repeat."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache, and a memory of what commands were told last, that no other run of the tests knows,
    also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWEIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow without any runs, to be copied: making its tables takes a second."""
    from flyweight.search.registries import open_registry

    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_registry("none", "none", f"sqlite:///{place}")
    return place


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """tests/networks.py: small networks, ``networks.make(name)`` -> (model, example)."""
    return _load(ROOT / "tests" / "networks.py")


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """``load(path)``: the module in a file of the repository, once a session."""
    return lambda path: _load(ROOT / path)


@pytest.fixture(scope="session")
def resnet() -> ModuleType:
    """examples/fashion_mnist/resnet.py: the network of the reference task."""
    return _load(ROOT / "examples" / "fashion_mnist" / "resnet.py")


@pytest.fixture(scope="module")
def ray_token() -> Iterator[None]:
    """A token for a Ray that is started in this process, which keeps the first that it reads: also
    that of another module's."""
    from ray._raylet import AuthenticationTokenLoader

    import flyweight.search  # noqa: F401  # before Ray, which it asks for tokens

    loader = AuthenticationTokenLoader.instance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        loader.reset_cache()
        yield
    loader.reset_cache()


@pytest.fixture(scope="module")  # no longer: other tests need the event loop that it holds
def browser() -> Iterator[Any]:
    """A headless Chromium, as playwright drives it: that of the system, which CI lacks."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def capabilities() -> Capabilities:
    """A target like ONNX Runtime on x86 without VNNI."""
    both = ("fp32", "int8")
    return Capabilities({"conv": both, "linear": both}, weight_bits=7, width_multiple=8)


@pytest.fixture(scope="session")
def traced(networks: ModuleType) -> Callable[[str], object]:
    """``traced(name)``: the traced network of tests/networks.py, traced once a session."""
    return networks.traced  # type: ignore[no-any-return]

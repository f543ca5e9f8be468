import pytest


@pytest.fixture(scope="package", autouse=True)
def single_thread():
    """One thread of torch: matrices this small take longer on more, above all on a busy machine."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item):
    """Let each test draw the same numbers, whichever tests ran before it in its process."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

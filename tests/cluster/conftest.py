"""A cluster for the tests of this folder, or the reason why there is none."""

import pytest

from tests.helpers.cluster import Cluster, what_is_missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes, n1 and n2, with Slurm and sshd."""
    if missing := what_is_missing():
        pytest.skip(missing)
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running

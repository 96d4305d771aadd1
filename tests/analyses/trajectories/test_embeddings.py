"""PCA against numpy; PaCMAP is repeatable, quiet and leaves no state behind."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bvit_interp.analyses.trajectories.embeddings import pacmap_embedding, pca_embedding
from bvit_interp.errors import UserError


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    spread = np.array([4, 3, 1, 0.5, 0.1])
    return (rng.normal(size=(90, 5)) * spread + 2).astype(np.float32)


def test_pca_against_the_singular_vectors(points):
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    found = pca_embedding(points, 0)
    np.testing.assert_allclose(abs(found), abs(centred @ axes.T), rtol=1e-3, atol=1e-3)


def test_pacmap_is_repeatable_quiet_and_leaves_no_state(points, caplog):
    pytest.importorskip("pacmap")
    import faiss

    before, threads = np.random.get_state()[1].copy(), faiss.omp_get_max_threads()  # noqa: NPY002
    with caplog.at_level(logging.DEBUG):
        one, two = (pacmap_embedding(points, 0) for _ in range(2))
    assert not [record for record in caplog.records if record.name.startswith("pacmap")]
    assert one.shape == (90, 2)
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, pacmap_embedding(points, 1))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert faiss.omp_get_max_threads() == threads
    assert not logging.getLogger("pacmap.pacmap").disabled


def test_pacmap_leaves_torch_on_its_threads():
    """Also the first time, when it is imported."""
    pytest.importorskip("pacmap")
    code = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "assert torch.get_num_threads() == 1  # only now is it set for good\n"
        "import numpy as np\n"
        "from bvit_interp.analyses.trajectories.embeddings import pacmap_embedding\n"
        "pacmap_embedding(np.random.default_rng(0).normal(size=(200, 8)).astype('f4'), 0)\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_equal_points_have_no_embedding():
    pytest.importorskip("pacmap")
    with pytest.raises(UserError, match="all equal"):
        pacmap_embedding(np.ones((40, 5), dtype=np.float32), 0)


def test_pca_needs_no_extra():
    """Neither pacmap nor faiss, which comes with it, is imported for PCA."""
    code = (
        "import sys; sys.modules['pacmap'] = sys.modules['faiss'] = None;"
        "import bvit_interp.analyses.trajectories.measure"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_shape_is_refused(points):
    with pytest.raises(TypeCheckError):
        pca_embedding(points[0], 0)
    with pytest.raises(TypeCheckError):
        pacmap_embedding(points[0], 0)

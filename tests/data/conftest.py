"""Small data sets on disk, written without the package, and the real ones beside the checkout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def put_image() -> Callable[..., np.ndarray]:
    """``put_image(path, height, width, seed)``: a random picture is written there and returned."""

    def put(path: Path, height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return pixels

    return put


@pytest.fixture
def put_mask() -> Callable[[Path, np.ndarray], None]:
    """``put_mask(path, ids)``: the ids as an RGB PNG of R + 256 G."""

    def put(path: Path, ids: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = [[(int(i) & 255, int(i) >> 8, 0) for i in row] for row in ids]
        Image.fromarray(np.array(pixels, np.uint8)).save(path)

    return put


@pytest.fixture
def masked_set(tmp_path: Path, put_image: Callable, put_mask: Callable) -> Path:
    """ImageNet-S layout: ant/a, ant/b and bee/c, 4 x 6 pixels, each mask its class on the left
    half."""
    for seed, (name, label) in enumerate((("ant/a", 0), ("ant/b", 0), ("bee/c", 1))):
        put_image(tmp_path / "set" / "validation" / f"{name}.JPEG", seed=seed)
        ids = np.zeros((4, 6), int)
        ids[:, :3] = label + 1
        put_mask(tmp_path / "set" / "validation-segmentation" / f"{name}.png", ids)
    return tmp_path / "set"


@pytest.fixture
def put_parquet() -> Callable[..., None]:
    """``put_parquet(path, images, labels, names)``: a Hugging Face parquet file of PNG images."""

    def put(
        path: Path,
        images: list[np.ndarray],
        labels: list[int | None],
        names: list[str] | None = None,
        columns: tuple[str, str] = ("img", "label"),
    ) -> None:
        import io
        import json

        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        rows = []
        for pixels in images:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": "x.png"})
        table = pa.table({columns[0]: rows, columns[1]: pa.array(labels, pa.int64())})
        if names:
            features = {columns[1]: {"names": names, "_type": "ClassLabel"}}
            written = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": written})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)

    return put

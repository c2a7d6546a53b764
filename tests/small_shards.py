"""Small data sets in shards: the same images as parquet files, WebDatasets and in memory."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}


def rows(count, start=0, size=16):
    """Coloured images whose first pixel is their number, and their labels and captions."""
    rng = np.random.default_rng(start)
    for i in range(start, start + count):
        array = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        array[0, 0] = i % 256, i // 256, 1
        yield {"image": Image.fromarray(array), "label": i % len(NAMES), "text": f"number {i}"}


def write_parquet(folder, counts=(40, 25, 7), group=10, features=FEATURES):
    """A parquet file for each count, with so many rows in a group."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for shard, count in enumerate(counts):
        part = datasets.Dataset.from_list([{k: row[k] for k in features} for row in rows(count, start)])
        part = part.cast(datasets.Features(features))
        file = folder / f"train-{shard:05}-of-{len(counts):05}.parquet"
        pq.write_table(part.with_format("arrow")[:], file, row_group_size=group)
        start += count
    return folder


def write_tar(file, count, start=0, json_fields=False):
    """A WebDataset of the same images, with `.cls` and `.txt`, or with `.json`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for i, row in enumerate(rows(count, start), start):
            png = io.BytesIO()
            row["image"].save(png, "PNG")
            contents = {"png": png.getvalue()}
            if json_fields:
                contents["json"] = json.dumps({"label": row["label"], "caption": row["text"]}).encode()
            else:
                contents |= {"cls": str(row["label"]).encode(), "txt": row["text"].encode()}
            for ending, content in contents.items():
                info = tarfile.TarInfo(f"{i:06}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file


def damage(file, start, count):
    """Overwrites some bytes of a file."""
    content = bytearray(file.read_bytes())
    content[start : start + count] = bytes(count)
    file.write_bytes(content)


def spoil_image(file, number):
    """Replaces an image of a parquet file by bytes that are none."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[number]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file, row_group_size=10)
